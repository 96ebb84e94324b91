"""Every command that README.md and docs/ print: it exists with its options, and those that need no weights run."""

import dataclasses
import importlib
import re
import shlex
import subprocess

import pytest
from helpers import ROOT, copy, script

from runtime.options import parse

PAGES = ["README.md", "kernels/README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
FEW = ["--steps", "2", "--batch_size", "4"]
SMALL = {"sft": FEW, "continuation": FEW, "asymdpo": FEW, "make_pairs": ["--nfe", "1"], "sample": ["--nfe", "1"]}
OURS = re.compile(r"(\.venv/bin/python|python|torchrun(?: --[\w-]+ \d+)*) (?=-m [\w.]+|[\w/]+\.py\b)")
SHELL = re.compile(r"(\w+=\S+ )*(\S*python3?|torchrun|make|hf|pip3?|git|cd|cp|rm|export|source|\.|bash|curl|wget) ")
ACTIVATED = ". .venv/bin/activate"


def lines(page: str) -> list[str]:
    """The lines of a page's code blocks; one that is continued is one, and its variables have their values."""
    code = "\n".join(re.findall(r"^ {4}(.*)$", text(page), re.M)).replace("\\\n", " ")
    for name, value in (("BASE", "Wan2.1-T2V-1.3B"), *re.findall(r'^([A-Z]+)="(.*)"$', code, re.M)):
        code = code.replace(f"${name}", value)
    return code.splitlines()


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def spans(page: str) -> list[str]:
    """What stands between backticks; `stage.py --option` and `module --option` as the command that it is short for."""
    found = re.findall(r"`([^`\n]+)`", text(page))
    found = [f"python {word}" if re.match(r"\w+\.py --", word) else word for word in found]
    return [re.sub(r"^(?=(wan|experiments|bench)\.\w+ --)", "python -m ", word) for word in found]


def words_of(line: str) -> list[str] | None:
    """What starts a command of ours, then its script, or -m and a module, and its options; None for another line."""
    line = re.sub(r"^(\w+=\S+ )+", "", line)
    start = OURS.match(line)
    return start and [start[1], *shlex.split(line[start.end() :], comments=True)]


def module_of(words: list[str]) -> tuple[str, list[str]]:
    """The module that a command runs, and its options."""
    if words[0] == "-m":
        return words[1], words[2:]
    return words[0].removesuffix(".py").replace("/", "."), words[1:]


ALL = [(page, words) for page in PAGES for line in lines(page) if (words := words_of(line))]
MENTIONED = [(page, words) for page in PAGES for line in spans(page) if (words := words_of(line))]


def test_every_command_is_looked_at():
    """A line of a code block that a shell would read is one of ours, or one of a few that are checked here."""
    targets = re.findall(r"^([\w$()./]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    targets = {name.replace("$(VENV)", ".venv") for name in targets}
    for page in PAGES:
        for line in lines(page) + [word for word in spans(page) if word.startswith("make ")]:
            if words_of(line) or not SHELL.match(line):
                continue
            for part in re.split(r" +# | && ", line)[: 1 + line.count(" && ")]:
                known = part == ACTIVATED or re.fullmatch(r"export BASE=Wan2\.1-T2V-(1\.3B|14B)", part)
                known = known or part.split()[0] == "make" and part.split()[1] in targets
                known = known or re.fullmatch(r"hf download Wan-AI/(Wan2\.\d-T2V-\w+(\.3B)?) --local-dir \1", part)
                known = known or re.fullmatch(r"hf upload USER/NAME out/\w+", part)
                assert known, f"{page}: {part}"


def test_python_is_the_environments():
    """A command of README names .venv/bin/python, or stands below a line that activates it."""
    own = [line for line in lines("README.md") if ACTIVATED in line or words_of(line)]
    bare = [i for i, line in enumerate(own) if line.startswith(("python", "torchrun"))]
    assert bare and min(bare) > next(i for i, line in enumerate(own) if ACTIVATED in line)


@pytest.mark.parametrize("page, words", ALL + MENTIONED, ids=lambda a: a if isinstance(a, str) else " ".join(a[1:4]))
def test_options_exist(page, words):
    name, options = module_of(words[1:])
    if name == "experiments.cost":  # the stage's own options follow its name, beside those of the machine
        config, options = importlib.import_module(name).options_of(options[0]), options[1:]
    else:
        source = text(f"{name.replace('.', '/')}.py")
        if "class Config" not in source:  # not imported, as that takes seconds
            assert all(f'"{option}"' in source for option in options if option.startswith("--"))
            return
        config = importlib.import_module(name).Config
    if options and options[-1] in (f"--{field.name}" for field in dataclasses.fields(config)):
        options = options[:-1]  # a sentence names it without a value
    parse(config, options, "")


def test_a_folder_has_one_use():
    """No two stages, nor the tiny preset and Wan's, write to one --out."""
    uses = {}
    for _, words in ALL:
        options = dict(zip(words, words[1:]))
        if "--out" in options:
            uses.setdefault(options["--out"], set()).add((module_of(words[1:])[0], "--preset" in options))
    assert len(uses) > 10 and not {out: of for out, of in uses.items() if len(of) > 1}
    assert not [(out, other) for out in uses for other in uses if other.startswith(f"{out}/")]


RUN = [words for page, words in ALL if page == "README.md" and words[0] == ".venv/bin/python"]
RUN = [words for words in RUN if words[1] != "bench/gpu.py"]  # asks for a GPU


def test_readme_runs_from_top_to_bottom(chain, tmp_path):
    """The commands of .venv/bin/python, in their order, beside a finished demo and a folder of clips."""
    copy(chain, tmp_path / "out/demo", *(path.name for path in chain.iterdir()))
    copy(chain, tmp_path, "clips")
    assert len(RUN) >= 4
    for _, *words in RUN:
        name, options = module_of(words)
        program = ["-m", name] if words[0] == "-m" else [str(ROOT / words[0])]
        done = script(*program, *options, *SMALL.get(name, []), cwd=tmp_path, PYTHONPATH=str(ROOT))
        assert done.returncode == 0, (words, done.stderr[-2000:])


def test_clean_leaves_what_is_not_its_own(tmp_path):
    """make clean removes the folders of make demo, tables and bench, and no other, be it called out/demo."""
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text(encoding="utf-8"), encoding="utf-8")
    made = {"seed-0", "seed-12", "tables", "bench"}
    kept = {"mine", "shards", "seeds", "tables_of_mine", "try"}
    for name in made | kept:
        (tmp_path / "out" / name / "deep").mkdir(parents=True)
    (tmp_path / "out/demo").symlink_to("seed-0")
    for left in (kept, kept | {"demo"}):
        done = subprocess.run(["make", "clean"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert {path.name for path in (tmp_path / "out").iterdir()} == left
        (tmp_path / "out/demo").mkdir(exist_ok=True)

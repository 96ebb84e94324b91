"""The commands that README.md and docs/ print: their options exist, and those that need no weights run."""

import importlib
import re
import shlex

import pytest
from helpers import ROOT, copy, script

from runtime.options import parse

PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
FEW = ["--steps", "2", "--batch_size", "4"]
SMALL = {"sft": FEW, "continuation": FEW, "asymdpo": FEW, "make_pairs": ["--nfe", "1"], "sample": ["--nfe", "1"]}


def commands(page: str) -> list[list[str]]:
    """The words of every command of ours in a page: what starts it, then a script, or -m and a module, and options."""
    code = "\n".join(re.findall(r"^ {4}(.*)$", (ROOT / page).read_text(encoding="utf-8"), re.M)).replace("\\\n", " ")
    found = []
    for line in code.splitlines():
        line = line.replace("$BASE", "Wan2.1-T2V-1.3B")
        start = re.match(r"(\.venv/bin/python|python|torchrun --nproc_per_node \d+) (?=-m |\w+\.py)", line)
        if start:
            found.append([start[1], *shlex.split(line[start.end() :], comments=True)])
    return found


def module_of(words: list[str]) -> tuple[str, list[str]]:
    """The module that a command runs, and its options."""
    return (words[1], words[2:]) if words[0] == "-m" else (words[0].removesuffix(".py"), words[1:])


ALL = [(page, words) for page in PAGES for words in commands(page)]


def test_there_are_commands():
    assert len([page for page, _ in ALL if page == "README.md"]) >= 8


@pytest.mark.parametrize("page, words", ALL, ids=lambda a: a if isinstance(a, str) else " ".join(a[1:4]))
def test_options_exist(page, words):
    name, options = module_of(words[1:])
    if name == "experiments.cost":  # the stage's own options follow its name
        name, options = options[0], options[1:]
    module = importlib.import_module(name)
    if hasattr(module, "Config"):
        parse(module.Config, options, "")
    else:
        assert not options


RUN = [words for page, words in ALL if page == "README.md" and words[0] == ".venv/bin/python"]


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

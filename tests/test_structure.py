"""The house rules that a reader relies on: imports run one way, the file map is true, help and docstrings are there."""

import ast
import dataclasses
import importlib
import re
import subprocess
import sys

import pytest
from helpers import ROOT, script

from runtime import run as common

GROUND = {"model", "flow", "generate"}
STAGES = {"prepare", "sft", "continuation", "make_pairs", "asymdpo", "sample"}
COMMANDS = ["tiny.balls", "wan.export"] + [
    f"experiments.{n}" for n in ("evaluate", "labels", "page", "benchmarks", "metrics")
]


def imports(path) -> set[str]:
    """Top-level names of all that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." if node.level else node.module.split(".")[0])
    return found


def test_imports_run_one_way():
    """kernels → torch, triton; ground floor → no stage; stage → no other stage; nothing → tests."""
    tests = {p.stem for p in (ROOT / "tests").glob("*.py")} | {"tests"}
    for path in (ROOT / "kernels").glob("*.py"):
        assert imports(path) - set(sys.stdlib_module_names) <= {"torch", "triton"}, path
    for path in ROOT.glob("*.py"):
        found = imports(path)
        assert path.stem in GROUND | STAGES, f"{path.name} is new: is it ground floor or a stage?"
        assert not found & (tests | {"."}), path
        assert not found & (STAGES - {path.stem} if path.stem in STAGES else STAGES), path


def test_file_map_is_true():
    """README's file map names the Python files of the top level and of kernels/, all of them and no other."""
    section = re.search(
        r"^## File map\n(.*?)(?=^## |\Z)", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M
    )
    assert section, "README.md has no section '## File map'"
    named = set(re.findall(r"`([\w/]+\.py)`", section[1]))
    there = {str(p.relative_to(ROOT)) for p in (*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py"))}
    assert named == there - {"kernels/__init__.py"}


# ---- blocks that stages share, word for word -------------------------------------------------------------------------


def between(stage: str, first: str, last: str) -> str:
    """The lines of a stage's source from the one that begins with `first` to the one that begins with `last`."""
    lines = (ROOT / f"{stage}.py").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip().startswith(first))
    end = next(i for i in range(start, len(lines)) if lines[i].strip().startswith(last))
    return "\n".join(lines[start : end + 1])


def function(stage: str, name: str) -> str:
    source = (ROOT / f"{stage}.py").read_text(encoding="utf-8")
    node = next(n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == name)
    return ast.get_source_segment(source, node)


def test_shared_blocks_are_identical():
    """`diff` of two stages shows the method only if what they share is the same text."""
    trained = ("sft", "continuation", "asymdpo")
    for first, last in [
        ("# ---- what is trained", "names, parameters"),
        ("first, state = run.resume()", "common.unpack_state"),
        ("bar = run.progress", "for step in range"),
        ("mine = order[", "mine = order["),
        ("group.sum_gradients", "optimizer.zero_grad()"),
        ("if (step + 1) % cfg.save_every", "bar.close()"),
    ]:
        assert len({between(stage, first, last) for stage in trained}) == 1, first
    assert between("sft", "optimizer = ", "optimizer = ") == between("continuation", "optimizer = ", "optimizer = ")
    assert between("sft", "# ---- log, save", "bar.close()") == between(
        "continuation", "# ---- log, save", "bar.close()"
    )
    assert function("sft", "learning_rate") == function("continuation", "learning_rate")
    assert len({between(stage, "checkpointing: bool", "checkpointing: bool") for stage in trained}) == 1


# ---- help and docstrings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [*sorted(STAGES), *COMMANDS])
def test_help(stage, capsys):
    """--help works, starts with what the stage does, and every option has a sentence."""
    module = importlib.import_module(stage)
    with pytest.raises(SystemExit) as caught:
        common.parse(module.Config, ["--help"], module.__doc__)
    printed = capsys.readouterr().out
    assert caught.value.code == 0 and module.__doc__.strip().splitlines()[0] in printed
    comments = common.field_comments(module.Config)
    for field in dataclasses.fields(module.Config):
        assert len(comments.get(field.name, "")) > 1, f"{stage}: --{field.name} has no help"
        assert f"--{field.name}" in printed
    for preset in (getattr(module, "PRESETS", {}) | getattr(module, "FROM_SCRATCH", {})).values():
        assert set(preset) <= {f.name for f in dataclasses.fields(module.Config)}


def test_command_line(tmp_path):
    """Types, flags, dashes for underscores, and None where an option is not given; what is not an option is refused."""
    import asymdpo

    cfg = common.parse(
        asymdpo.Config, ["--beta", "500", "--reference-free", "--region=3", "--out=a-b", "--steps", "7"], ""
    )
    assert (cfg.beta, cfg.reference_free, cfg.region, cfg.steps, cfg.lr) == (500.0, True, "3", 7, None)
    assert cfg.out == "a-b"
    assert (
        common.resolve(cfg, asymdpo.PRESETS).lr == asymdpo.PRESETS["tiny"]["lr"]
        and common.resolve(cfg, asymdpo.PRESETS).steps == 7
    )
    for wrong in (["--betta", "5"], ["--steps", "many"], ["--steps"]):
        with pytest.raises(SystemExit) as caught:
            common.parse(asymdpo.Config, wrong, "")
        assert caught.value.code == 2


def test_help_of_a_real_script(tmp_path):
    """As a program, from another folder: the scripts find their modules."""
    done = script(str(ROOT / "asymdpo.py"), "--help", cwd=tmp_path)
    assert done.returncode == 0 and "--self_test" in done.stdout and "--reference_free" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "path", sorted([*(ROOT / "kernels").glob("*.py"), ROOT / "model.py", ROOT / "flow.py"]), ids=lambda p: p.stem
)
def test_public_functions_have_docstrings(path):
    """All public functions of the files that are read or copied on their own; a `*_ref` shares its public twin's."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert path.name == "__init__.py" or ast.get_docstring(tree)
    functions = {
        node.name: node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    }
    for name, node in functions.items():
        twin = functions.get(name.removesuffix("_ref"), node)
        assert ast.get_docstring(node) or ast.get_docstring(twin), f"{path.name}: {name}"


def test_every_python_file_says_what_it_is():
    for path in (*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_the_chain_runs_in_makefiles_order():
    """Every stage's folder is a target of the Makefile: `make -n demo` names every script, in the method's order."""
    done = subprocess.run(["make", "-n", "demo", "OUT=/nowhere/demo"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scripts = re.findall(r"python (?:-m )?([\w.]+?)(?:\.py)? --", done.stdout)
    order = ["tiny.balls", "prepare", "sft", "sft", "continuation", "make_pairs", "asymdpo"]
    order += ["experiments.evaluate", "experiments.page"]
    assert sorted(scripts) == sorted(order)
    assert [scripts.index(s) for s in dict.fromkeys(order)] == sorted(scripts.index(s) for s in dict.fromkeys(order))

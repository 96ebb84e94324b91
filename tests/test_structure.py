"""The house rules that a reader relies on: imports run one way, the file map is true, help and docstrings are there."""

import ast
import dataclasses
import importlib
import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, copy, script

import asymdpo
from runtime.options import field_comments, parse, resolve

STAGES = ["prepare", "sft", "continuation", "make_pairs", "asymdpo", "sample"]
COMMANDS = ["tiny.balls", "wan.export", *(f"experiments.{name}" for name in (
    "evaluate", "pairs", "labels", "baselines", "distill", "tables", "page", "benchmarks", "decode", "figures"
))]  # fmt: skip
ROOMS = {"kernels", "flow", "model", "sampling", "runtime", "wan", "tiny", "experiments", "bench", "tests", "scripts"}
MAY_IMPORT = {  # room -> rooms of the project that it imports
    "kernels": set(), "flow": set(), "model": {"kernels", "flow"}, "runtime": {"runtime"},
    "wan": {"wan", "model", "flow", "runtime"}, "tiny": {"tiny", "model", "flow", "runtime"},
    "sampling": {"model", "flow", "runtime", "wan", "tiny"},
    "scripts": {"model", "flow", "kernels", "sampling", "runtime", "wan", "tiny"},
    "experiments": ROOMS - {"bench", "tests"}, "bench": ROOMS,
}  # fmt: skip
FROM_OUTSIDE = {"kernels": {"torch", "triton"}, "flow": {"torch", "numpy"}}  # room -> packages that it imports


def imports(path) -> set[str]:
    """Top-level names of all that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("tests" if node.level else node.module.split(".")[0])
    return found


def test_imports_run_one_way():
    """By room. At the top stand six scripts, which do not import each other, model.py, flow.py and sampling.py."""
    assert {path.stem for path in ROOT.glob("*.py")} == {*STAGES, "model", "flow", "sampling"}
    helpers = {path.stem for path in (ROOT / "tests").glob("*.py")} | {"emulator"}
    for path in (p for room in ("*.py", *(f"{r}/*.py" for r in ROOMS - {"tests"})) for p in ROOT.glob(room)):
        room = path.parent.name if path.parent != ROOT else path.stem if path.stem in ROOMS else "scripts"
        found = imports(path)
        of_ours = {"scripts" if name in STAGES else "tests" if name in helpers else name for name in found}
        assert of_ours & ROOMS <= MAY_IMPORT[room], f"{path}: {of_ours & ROOMS - MAY_IMPORT[room]}"
        if room in FROM_OUTSIDE:
            assert found - set(sys.stdlib_module_names) <= FROM_OUTSIDE[room], path


COPIED = """
import model, torch
net = model.load_model("base")
x, t, text = torch.randn(1, 28, 13, 2, 3), torch.rand(1), torch.randn(1, 5, 32)
assert net(x, t, text).shape == x.shape
model.add_lora(net, 4, 4)
net(x, t, text).sum().backward()
model.export_lora(model.trained_lora(net), "lora.safetensors")
model.load_lora(model.load_model("base"), "lora.safetensors")
"""


def test_a_copied_model_works(chain, tmp_path):
    """What readers copy: the network alone loads a checkpoint and trains a LoRA."""
    (tmp_path / "kernels").mkdir()
    for file in ("model.py", "flow.py", "kernels/modulate.py", "kernels/norm_rope.py"):
        shutil.copy(ROOT / file, tmp_path / file)
    done = script("-c", COPIED, cwd=copy(chain, tmp_path, "base"))
    assert done.returncode == 0, done.stderr


def test_file_map_is_true():
    """README's file map names the Python files of the top level and of kernels/, all of them and no other."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## File map\n")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([\w/]+\.py)`", section))
    there = {str(p.relative_to(ROOT)) for p in (*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py"))}
    assert named == there - {"kernels/__init__.py"}


# ---- blocks that stages share, word for word -------------------------------------------------------------------------


def between(stage: str, first: str, last: str = "") -> str:
    """The lines of a stage's source from the one that begins with `first` to the next that begins with `last`."""
    lines = [line.strip() for line in (ROOT / f"{stage}.py").read_text(encoding="utf-8").splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith(first))
    end = next(i for i in range(start, len(lines)) if lines[i].startswith(last))
    return "\n".join(lines[start : end + 1])


def test_shared_blocks_are_identical():
    """`diff` of two stages shows the method only if what they share is the same text."""
    everywhere = [
        ("# ---- what is trained", "trained = "),
        ("training = Training", "for step in training"),
        *(
            (f"{field}: ",)
            for field in ("preset", "layers", "steps", "t_mean", "t_shift", "t_min", "t_max", "checkpointing")
        ),
    ]
    of_two = [
        ("optimizer = ", "for index in micro_batches"),
        ("training.backward", "training.log"),
        ("clips = ", "negative = "),
        ("keys = ", "t = flow.draw_t"),
        ("def learning_rate", "return"),
    ]
    for block in everywhere + of_two:
        stages = ("sft", "continuation", "asymdpo") if block in everywhere else ("sft", "continuation")
        assert len({between(stage, *block) for stage in stages}) == 1, block


# ---- help and docstrings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [*STAGES, *COMMANDS])
def test_help(stage, capsys):
    """--help works, starts with what the stage does, and every option has a sentence."""
    module = importlib.import_module(stage)
    with pytest.raises(SystemExit) as caught:
        parse(module.Config, ["--help"], module.__doc__, getattr(module, "PRESETS", None))
    printed = capsys.readouterr().out
    assert not caught.value.code and " ".join(module.__doc__.split("\n\n")[0].split()) in " ".join(printed.split())
    options = printed[printed.index("\noptions:") :]
    assert all(len(line) <= 80 for line in options.splitlines()), "a terminal is that wide"
    comments = field_comments(module.Config)
    for field in dataclasses.fields(module.Config):
        assert len(comments.get(field.name, "")) > 1, f"{stage}: --{field.name} has no help"
        assert f"--{field.name}" in printed
    for preset in (getattr(module, "PRESETS", {}) | getattr(module, "FROM_SCRATCH", {})).values():
        assert all(hasattr(module.Config(), name) for name in preset)


def test_help_that_nobody_reads_to_its_end(monkeypatch):
    """`--help | head` says what it can, and nothing of a broken pipe, at its end neither."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", encoding="utf-8") as cut:
        monkeypatch.setattr(sys, "stdout", cut)
        with pytest.raises(SystemExit) as caught:
            parse(importlib.import_module("prepare").Config, ["--help"], "")
    assert not caught.value.code


def test_command_line():
    """Types, flags, dashes for underscores, and None where an option is not given."""
    cfg = parse(asymdpo.Config, ["--beta", "500", "--reference-free", "--region=3", "--out=a-b", "--steps", "7"], "")
    found = (cfg.beta, cfg.reference_free, cfg.region, cfg.steps, cfg.lr, cfg.out)
    assert found == (500.0, True, "3", 7, None, "a-b")
    resolved = resolve(cfg, asymdpo.PRESETS)
    assert resolved.lr == asymdpo.PRESETS["tiny"]["lr"] and resolved.steps == 7


def test_docstrings():
    """Every file says what it is; the files that are copied, all their public functions: a `*_ref` its twin's."""
    copied = [*(ROOT / "kernels").glob("*.py"), ROOT / "model.py", ROOT / "flow.py"]
    for path in {*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py"), *copied} - {ROOT / "kernels/__init__.py"}:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), path
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        for name in functions if path in copied else ():
            twin = functions.get(name.removesuffix("_ref"), functions[name])
            assert name.startswith("_") or ast.get_docstring(functions[name]) or ast.get_docstring(twin), (path, name)


def in_the_locales_encoding(code: str) -> list[int]:
    """Lines of the calls that read or write text and do not say in what encoding."""
    nodes, found = list(ast.walk(ast.parse(code))), []
    named = [alias for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names]
    modules = {alias.asname or alias.name for alias in named} - {"io"}  # os.open, av.open, Image.open are no text
    for call in (node for node in nodes if isinstance(node, ast.Call)):
        method, name = isinstance(call.func, ast.Attribute), ast.unparse(call.func).rpartition(".")[2]
        words = [arg.value for arg in (*call.args, *(k.value for k in call.keywords)) if isinstance(arg, ast.Constant)]
        modes = [word for word in words if isinstance(word, str) and re.fullmatch("[rwxa][bt+]*", word)]
        opens = name == "fdopen" or name == "open" and not (method and ast.unparse(call.func.value) in modules)
        text = opens and not any("b" in mode for mode in modes)
        text |= name.endswith("TemporaryFile") and any("b" not in mode for mode in modes)
        text |= method and name in ("read_text", "write_text")
        if text and all(k.arg != "encoding" for k in call.keywords):
            found.append(call.lineno)
    return found


def test_text_has_an_encoding():
    """All text is UTF-8, whatever the locale: who opens it says so."""
    wrong = ["open(a)", "open(a, 'w')", "io.open(a, mode='r')", "path.open()", "(a / b).open('a')", "os.fdopen(3)",
             "path.read_text()", "path.write_text(a)", "tempfile.NamedTemporaryFile('w')"]  # fmt: skip
    right = ["open(a, 'rb')", "open(a, encoding='utf-8')", "av.open(a)", "os.open(a, 0)", "path.open('wb')",
             "path.read_text(encoding='utf-8')", "read_text(path)", "path.write_text(a, encoding=b)",
             "tempfile.NamedTemporaryFile()", "os.fdopen(3, 'wb')"]  # fmt: skip
    code = "import av, io, os, tempfile\n" + "\n".join(wrong + right)
    assert in_the_locales_encoding(code) == list(range(2, 2 + len(wrong)))
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for path in (*ROOT.glob("*.py"), *(p for room in ROOMS - {"tests"} for p in ROOT.glob(f"{room}/*.py")))
        for line in in_the_locales_encoding(path.read_text(encoding="utf-8"))
    }
    assert not found


def test_the_chain_runs_in_makefiles_order():
    """Every stage's folder is a target of the Makefile: `make -n demo` names every script, in the method's order."""
    done = subprocess.run(["make", "-n", "demo", "OUT=/nowhere/demo"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scripts = re.findall(r"python (?:-m )?([\w.]+?)(?:\.py)? --", done.stdout)
    order = ["tiny.balls", "prepare", "sft", "sft", "sft", "continuation", "make_pairs", "asymdpo"]
    order += ["experiments.evaluate", "experiments.page"]
    assert sorted(scripts) == sorted(order)
    assert [scripts.index(s) for s in dict.fromkeys(order)] == sorted(scripts.index(s) for s in dict.fromkeys(order))

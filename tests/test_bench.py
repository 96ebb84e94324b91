"""bench/: what it counts, against bytes counted by hand; and all that it asks of a GPU, at toy sizes on the CPU."""

import contextlib
import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch
from helpers import ROOT, environment, script
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")
import asymdpo
import model
from bench import cases, gpu, gpu_kernels, gpu_model, measure, rounding, step, traffic
from runtime import run


def test_eager_bytes_by_hand():
    """A product with a row, and a sum with itself: distinct inputs and outputs, views free, both directions."""
    a, row = torch.ones(4, 8, requires_grad=True), torch.ones(8)
    forward, backward, kept = traffic.step(lambda a, row: (a * row.expand(4, 8)).view(8, 4).cumsum(0), [a, row])
    assert (forward.bytes, forward.launches) == ((128 + 32 + 128) + (128 + 128), 2)
    # cumsum backward: flip, cumsum, flip; then the product with the row
    assert (backward.bytes, backward.launches) == (3 * 256 + (128 + 32 + 128), 4)
    assert kept == 0  # the row is shared


def test_kept_bytes_by_hand():
    """A product keeps both factors; what is kept twice counts once."""
    a, b = torch.ones(4, 8, requires_grad=True), torch.ones(4, 8, requires_grad=True)
    assert traffic.step(lambda a, b: a * b + a * a, [a, b]).kept == 2 * 128


def test_matmul_counts_as_flops():
    a, b = torch.ones(2, 3, requires_grad=True), torch.ones(3, 5)
    forward, backward, _ = traffic.step(torch.mm, [a, b])
    assert (forward.bytes, forward.flops, backward.flops) == (0, 2 * 2 * 3 * 5, 2 * 2 * 3 * 5)


@pytest.mark.parametrize("trained", [False, True])
def test_kernels_move_the_minimum(trained):
    """Beside it: two float32 numbers a token, the rows' index, and sums for the tables, written and read."""
    D, frames, tokens = 64, 3, 16
    found = [*cases.modulation_cases(trained, D, frames, tokens)]
    found.append(cases.norm_rope_case(trained, D, frames * tokens, K=16))
    for case in found:
        forward, backward, kept = traffic.executed(case.function, case.inputs())
        extras = 2 * 4 * frames * tokens + 2 * 4 * frames
        sums = 2 * 3 * 4 * D * frames * trained
        assert 0 <= forward.bytes - case.minimum[0] <= extras, case.name
        assert 0 <= backward.bytes - case.minimum[1] <= extras + sums + 3 * 8 * D * trained, case.name
        with FakeTensorMode():  # what `launched` adds up from arguments is what the emulator saw
            counted = traffic.launched(case.function, case.inputs())
        assert (counted.forward.bytes, counted.kept) == (forward.bytes, kept), case.name
        assert abs(counted.backward.bytes - backward.bytes) <= 4 * D * cases.ROWS, case.name


def test_region_dpo_moves_the_minimum():
    """Beside it: the frames' partial sums, and the loss, which is PyTorch's."""
    case = cases.dpo_case((1, 2, 4, 16, 32), 2)
    forward, backward, _ = traffic.executed(case.function, case.inputs())
    assert 0 <= forward.bytes - case.minimum[0] < 1500 and 0 <= backward.bytes - case.minimum[1] < 1000


def test_inductor_by_hand():
    """ln_modulate with frozen tables is one kernel: x and y, two tables, the rows' index, two numbers a token."""
    D, L, frames = 64, 48, 3
    case = cases.modulation_cases(False, D, frames, L // frames)[0]
    with FakeTensorMode():
        forward, backward, _ = traffic.inductor(case.function, case.inputs())
    assert (forward.launches, backward.launches) == (1, 1)
    u, table, numbers, index = 2 * L * D, 4 * cases.ROWS * D, 2 * 4 * L, 4 * frames
    assert forward.bytes == 3 * u + 2 * table + numbers + index  # x float32, y bfloat16
    assert backward.bytes == 5 * u + table + numbers + index


def test_page():
    """kernels/README.md names its command, and its numbers for ln_modulate are those of the formula."""
    text = (ROOT / "kernels/README.md").read_text(encoding="utf-8")
    assert "`python -m bench.traffic --write`" in text
    forward = re.search(r"tables frozen \(.*?^\| ln_modulate \| forward \| (.*?) \|$", text, re.S | re.M)
    least = cases.modulation_cases(False)[0].minimum[0] / cases.U
    assert forward and forward[1].split(" | ")[:2] == [f"{least:.2f} u", f"{least:.2f} u, 1.00x"]


# ---- gpu.py: sections ------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")
# but those of 14b, which test_the_command_needs_few_packages runs
SECTIONS = [(suite, section) for suite in ("kernels", "1.3b") for section in gpu.SECTIONS[suite]]


def rows_of(suite: str, section: str) -> list[dict]:
    """What a section says at toy sizes, in this process."""
    module = sys.modules[gpu.ELSEWHERE.get(section, gpu.MODULES[suite])]
    return list(getattr(module, section)(CPU, module.TOY[suite]))


@pytest.mark.parametrize("suite, section", SECTIONS)
def test_a_section_runs_and_its_checks_hold(suite, section, monkeypatch):
    if section == "peers":
        pytest.importorskip("diffusers"), pytest.importorskip("peft")
    if section == "compiled":  # Inductor would take a minute
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    rows = rows_of(suite, section)
    assert rows and not any(map(gpu.failed, rows)), rows
    assert all(len(row) > 1 and "\n" not in gpu.text(row) and json.loads(json.dumps(row)) == row for row in rows)


def test_a_resume_is_compared_with_deterministic_attention(monkeypatch):
    """Where PyTorch only warns of what differs from run to run, flash attention's backward goes on differing."""
    seen, real = [], torch.use_deterministic_algorithms

    def spy(mode, *, warn_only=False):
        seen.append((mode, warn_only))
        real(mode, warn_only=warn_only)

    monkeypatch.setattr(torch, "use_deterministic_algorithms", spy)
    rows_of("1.3b", "resume")
    assert seen == [(True, False), (False, False)]


def test_checks_can_fail(monkeypatch):
    """S at step 0 with an adapter that is not zero; a resume that forgets a moment; an operation with noise."""
    with monkeypatch.context() as patch:
        patch.setattr(measure.model, "add_lora", with_b(measure.model.add_lora))
        assert not any(row["S is 0"] for row in rows_of("1.3b", "step_zero"))
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
        patch.setitem(asymdpo.PRESETS["tiny"], "beta", asymdpo.PRESETS["1.3b"]["beta"])
        assert not next(gpu_model.compiled(CPU, gpu_model.TOY["1.3b"]))["beta |S| < 1"]
    with monkeypatch.context() as patch:
        unpack = run._unpack
        patch.setattr(run, "_unpack", lambda state, *rest: unpack(without_moments(state), *rest))
        assert not any(row["same bits"] for row in rows_of("1.3b", "resume"))
    with monkeypatch.context() as patch:
        patch.setattr(gpu_kernels, "both", lambda *given: [torch.rand_like(a) for a in measure.both(*given)])
        assert not any(row["same bits twice"] for row in rows_of("kernels", "twice"))
        assert not any(row["right"] for row in rows_of("kernels", "large"))


def test_a_reference_without_sft_is_seen(monkeypatch):
    """Off is the trained LoRA alone: a reference that loses the frozen one is another model."""

    @contextlib.contextmanager
    def all_off(net):
        terms = [term for layer in model.linears(net).values() for term in layer.lora]
        with contextlib.ExitStack() as stack:
            for term in terms:
                stack.enter_context(mock.patch.object(term, "on", False))
            yield

    monkeypatch.setattr(model, "lora_off", all_off)
    assert [row["S is 0"] for row in rows_of("1.3b", "step_zero")] == [True, True, False, False]


def test_a_compiler_that_rounds_before_it_adds_is_seen(monkeypatch):
    """Of a small LoRA it loses a part that the layer itself keeps."""
    monkeypatch.setattr(torch, "compile", lambda layer, **_: functools.partial(rounding.rounded_first, layer))
    assert [row["is kept"] for row in rows_of("1.3b", "small_term")] == [True, True, False, False]


def with_b(add_lora):
    """add_lora, and an adapter that does something."""

    def changed(net, *rest):
        for p in (added := add_lora(net, *rest)):
            torch.nn.init.normal_(p)
        return added

    return changed


def without_moments(state: dict) -> dict:
    return {name: a * 0 if "exp_avg_sq" in name else a for name, a in state.items()}


BROKEN = """
import torch
from bench import gpu, gpu_kernels
forward = gpu_kernels.model.Block.forward
def broken(self, *inputs):
    torch._dynamo.graph_break()
    return forward(self, *inputs)
gpu_kernels.model.Block.forward = broken
gpu.child("bench.gpu_kernels", "kernels", "block", toy=True)
"""


def test_a_graph_break_ends_the_section():
    """In a process of its own, as sections are: after Dynamo's error, Python frees what a frame holds later."""
    done = script("-c", BROKEN)
    assert done.returncode and "torch._dynamo.exc.Unsupported" in done.stderr


def test_kinds_of_kernels():
    """Names as they stand in profiles of H100 and A100: each counts once, and what is not known is the rest."""
    kinds = {
        "attention": ["void pytorch_flash::flash_fwd_kernel<...>", "cudnn_generated_fort_native_sdpa_sm90_flash_fprop",
                      "fmha_cutlassF_bf16_aligned_64x128_rf_sm80"],
        "ours": ["_forward_kernel", "_backward_kernel", "_fold_kernel", "_errors_kernel", "_gradient_kernel"],
        "products": ["ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_64x3_tn", "nvjet_tst_192x192_64x4_v_bz_TNT",
                     "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu>", "aten::addmm", "aten::mm"],
        "rest": ["void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernelImpl>", "Memcpy DtoD", "aten::mul"],
    }  # fmt: skip
    for kind, names in kinds.items():
        for name in names:
            assert gpu_model.shares({name: 3.0})[kind] == 100, name
    assert gpu_model.shares({"aten::mm": 1.0, "Memcpy DtoD": 3.0})["rest"] == 75


# ---- gpu.py: its processes, its file, README's table -----------------------------------------------------------------

FAKE = """
import os, signal, subprocess, time
SIZES = TOY = {"fake": 7}

def good(device, sizes):
    subprocess.Popen(["sleep", "300"])  # as a compiler, it outlives the section and holds the pipe open
    yield {"name": "first", "size": sizes, "right": True, "in README": 1}

def wrong(device, sizes):
    yield {"name": "second", "right": False}

def crash(device, sizes):
    yield {"name": "third", "ms": 3.0}
    print("about to <fail> | now", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)

def hang(device, sizes):
    yield {"name": "fourth", "ms": 4.0}
    time.sleep(600)
"""
ENDS = {"good": "done", "wrong": "done", "crash": "exit code -11: about to <fail> | now", "hang": "cut after 9 s"}


def test_a_section_runs_as_a_stage_does(monkeypatch, capfd):
    """On a GPU, on its own device and with products of bfloat16 added up in float32."""
    for name, value in (("is_available", True), ("device_count", 1), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = True  # PyTorch's default

    def section(device, sizes):
        yield {"name": str(device), "added in bfloat16": matmul.allow_bf16_reduced_precision_reduction}

    monkeypatch.setattr(gpu_model, "card", section)
    gpu.child("bench.gpu_model", "1.3b", "card", toy=True)
    assert '{"name": "cuda:0", "added in bfloat16": false}' in capfd.readouterr().out


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A suite of four sections, three of which do not end well. Returns the folder of its module."""
    (tmp_path / "fake_sections.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu, "MODULES", {"fake": "fake_sections"})
    monkeypatch.setattr(gpu, "SECTIONS", {"fake": dict(hang=9, good=60, wrong=60, crash=60)})
    return tmp_path


def test_one_bad_section_does_not_end_the_others(fake, capfd):
    """A crash, a section that hangs: the rows before are kept, the sections after run, the others' suites stay."""
    file = fake / "gpu.json"
    file.write_text(json.dumps({"other": {"card": "abc"}}))
    assert not gpu.run_suite("fake", file, toy=False)
    known = gpu.read(file)
    found = known["fake"]
    assert known["other"] == {"card": "abc"} and {name: entry["ended"] for name, entry in found.items()} == ENDS
    assert [row["name"] for entry in found.values() for row in entry["rows"]] == ["fourth", "first", "second", "third"]
    printed = capfd.readouterr().out
    assert "first: 7 size, right: yes" in printed and "second: right: NO" in printed
    table = gpu.table(known | {"kernels": None})
    assert table.splitlines()[2:] == [
        f"| `fake` | commit {gpu.commit()} on {gpu.here()}: 1 of 2 checks hold; hang: cut after 9 s; "
        "crash: exit code -11: about to &lt;fail&gt; \\| now |",
        "|  | first: 7 size, right: yes |",
    ]


def test_only_good_ends_are_a_success(fake, monkeypatch):
    monkeypatch.setattr(gpu, "SECTIONS", {"fake": dict(good=60)})
    assert gpu.run_suite("fake", fake / "gpu.json", toy=True)
    monkeypatch.setattr(gpu, "SECTIONS", {"fake": dict(wrong=60)})
    assert not gpu.run_suite("fake", fake / "gpu.json", toy=True)
    assert not gpu.run_suite("fake", fake / "gpu.json", toy=True, budget=0)
    assert gpu.read(fake / "gpu.json")["fake"]["wrong"]["ended"] == "not started: no time left"


def test_some_sections_run_again(fake):
    """Each section's record says what it was made of; one that is not named, or has no time, keeps its own."""
    file, old = fake / "gpu.json", {"commit": "old", "on": "A100", "toy": False, "ended": "done", "rows": []}
    before = {"hang": old, "good": old, "wrong": old, "crash": old}
    file.write_text(json.dumps({"fake": before}))
    assert gpu.run_suite("fake", file, True, ["good"])
    found = gpu.read(file)["fake"]
    made = {"commit": gpu.commit(), "on": gpu.here(), "toy": True}
    assert {name: entry for name, entry in found.items() if entry != old} == {"good": found["good"]}
    assert made.items() <= found["good"].items() and "torch" in made["on"]
    assert f"commit old on A100; commit {made['commit']} at toy sizes on" in gpu.table({"fake": found})
    assert not gpu.run_suite("fake", file, True, ["wrong"], budget=0) and gpu.read(file)["fake"] == found


def test_a_run_that_is_cut_still_tells(fake):
    """Interrupted in its second section: what was known is in the file, and no process is left."""
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # ignored in the background
        "import pathlib; from bench import gpu; gpu.MODULES = {'fake': 'fake_sections'}; "
        "gpu.SECTIONS = {'fake': dict(good=60, hang=60)}; gpu.run_suite('fake', pathlib.Path('gpu.json'), True)"
    )
    path = f"{fake}{os.pathsep}{ROOT}"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=fake, env=environment(PYTHONPATH=path))
    for _ in range(600):
        time.sleep(0.1)
        if (fake / "gpu.json").is_file() and "fourth" in (fake / "gpu.json").read_text():
            break
    process.send_signal(signal.SIGINT)
    assert process.wait(30) != 0
    found = gpu.read(fake / "gpu.json")["fake"]
    assert [(name, entry["ended"], len(entry["rows"])) for name, entry in found.items()] == [
        ("good", "done", 1), ("hang", "cut", 1)
    ]  # fmt: skip


BARE = """
import sys
sys.modules.update(dict.fromkeys(["av", "decord", "diffusers", "peft", "transformers", "matplotlib"]))
"""


def test_the_command_needs_few_packages(tmp_path):
    """A whole suite as a user starts it, where nothing is installed that reads videos or stands beside."""
    (tmp_path / "sitecustomize.py").write_text(BARE)
    file, bare = tmp_path / "gpu.json", dict(PYTHONPATH=str(tmp_path))
    done = script(str(ROOT / "bench/gpu.py"), "14b", "--toy", "--out", str(file), cwd=tmp_path, **bare)
    assert done.returncode == 0, done.stdout + done.stderr
    sections = gpu.read(file)["14b"]
    assert list(sections) == list(gpu.SECTIONS["14b"]) and all(e["ended"] == "done" for e in sections.values())
    code = "import bench.gpu_kernels, bench.step; print(bench.step.diffusers)"
    assert script("-c", code, **bare).stdout == "None\n"


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "expected a CUDA GPU"),
        (["5b"], "expected kernels, 1.3b, 14b, or readme"),
        (["14b", "--sections", "speed"], "expected some of card, large_forward, large_pair, shard, got speed"),
    ],
)
def test_no_gpu_and_no_such_suite(words, said):
    done = script(str(ROOT / "bench/gpu.py"), *words)
    assert done.returncode == 2 and said in done.stderr.splitlines()[-1]


def test_a_damaged_file_is_said(tmp_path):
    (tmp_path / "gpu.json").write_text('{"kernels": ')
    done = script(str(ROOT / "bench/gpu.py"), "14b", "--toy", "--out", str(tmp_path / "gpu.json"))
    assert done.returncode == 2 and "damaged text" in done.stderr.splitlines()[-1]


def test_readme_has_the_table():
    """README says what docs/gpu.json says, and of a suite that is not in it that it was not run."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    known = gpu.read(ROOT / "docs/gpu.json")
    assert gpu.BEGIN in page and page == gpu.with_table(page, known)
    assert all(f"| `{suite}` | not run yet |" in page for suite in gpu.SECTIONS.keys() - known.keys())


# ---- step.py ---------------------------------------------------------------------------------------------------------


def test_peak_of_a_step_by_hand():
    """Two products of 4 KB in a row, in a net whose weights and moments are there: what is alive at once, and they."""
    side = measure.Trainer.__new__(measure.Trainer)
    side.net, side.step = torch.nn.Linear(8, 8), lambda: torch.ones(1024).mul(2).mul(3)
    side.optimizer = torch.optim.AdamW(side.net.parameters())
    assert step.held(side, CPU) == 4 * (64 + 8) + 2 * 4096


def test_differences_can_be_seen():
    """One entry of one adapter that differs is seen in the loss's gradients."""
    pytest.importorskip("diffusers"), pytest.importorskip("peft")
    sides = step.pair_up(dataclasses.replace(step.TOY["1.3b"], dtype=torch.float32), CPU)
    assert max(step.differences(sides).values()) < 1e-3
    with torch.no_grad():
        next(iter(sides["ours"].trained.values())).mul_(1.01)
    assert max(step.differences(sides).values()) > 1e-3


RESIDENT = """
import torch
from bench import step

class Side:
    def step(self):
        torch.ones(2**26).add_(1)

step.SIDES = {"ours": lambda sizes, device: Side()}
print(step.resident("ours", "float32"))
"""


def test_resident_memory_is_what_a_step_adds():
    """A step that makes 256 MiB and lets go of them."""
    done = script("-c", RESIDENT)
    assert done.returncode == 0, done.stderr
    assert 2**28 <= int(done.stdout) < 1.25 * 2**28

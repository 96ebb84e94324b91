"""kernels/: what a file does before a kernel runs. Bad input, which implementation, torch.compile, each file alone."""

import inspect
import re
import shutil
from unittest import mock

import pytest
import torch
import torch._dynamo
from helpers import ROOT, script
from kernel_cases import calls_to_copy
from torch._subclasses.fake_tensor import FakeTensorMode

import model
from kernels import modulate, norm_rope, region_dpo
from kernels.modulate import gate_residual, ln_modulate, residual_ln_modulate

MODULES = {"modulate": modulate, "norm_rope": norm_rope, "region_dpo": region_dpo}


# ---- bad input: one ValueError that names the argument, what was expected and what came ------------------------------


@pytest.fixture(params=["torch", "triton"])
def chosen(request, monkeypatch):
    """Errors come before any launch: there is no GPU here, so a launch would raise something else."""
    for module in MODULES.values():
        monkeypatch.setattr(module, "implementation", lambda device: request.param)


def tensors(B=2, F_=3, tokens=4, D=8):
    x, h = torch.randn(2, B, F_ * tokens, D)
    row = torch.arange(B * F_, dtype=torch.int32).view(B, F_) % 2  # both of the tables' rows, not by chance
    return x, h, *torch.randn(3, B, 2, D), row


def on_meta(a):
    return a.to("meta")


X, H, GATE, SHIFT, SCALE, ROW = tensors()
MODULATE_ERRORS = [
    (ln_modulate, (X[0], SHIFT, SCALE, ROW), r"^x: expected a non-empty \(B, L, D\), .*got \(12, 8\)"),
    (ln_modulate, (X.int(), SHIFT, SCALE, ROW), r"^x: expected floating point \(2, 12, 8\), got torch.int32"),
    (ln_modulate, (X[:, :0], SHIFT, SCALE, ROW), "^x: expected a non-empty .*2, 0, 8"),
    (ln_modulate, (X[:, :11], SHIFT, SCALE, ROW), "^row: expected a number of frames F that divides L=11 .*F=3"),
    (ln_modulate, (X, SHIFT, SCALE, ROW.float()), "^row: expected an integer .*float32"),
    (ln_modulate, (X, SHIFT, SCALE, ROW[:1]), r"^row: expected an integer or bool \(B=2, F\), got .* \(1, 3\)"),
    (ln_modulate, (X, SHIFT[:, :1], SCALE[:, :1], ROW > 0), r"^row: expected values 0 \.\. 0, .* got 0 \.\. 1"),
    (ln_modulate, (X[:, :11], SHIFT, SCALE), "^row: without it, expected tables of R rows that divide L=11 .* R=2"),
    (ln_modulate, (X, SHIFT, SCALE, ROW + 1), r"^row: expected values 0 \.\. 1, the rows of the tables, got .*2"),
    (ln_modulate, (X, SHIFT, SCALE, ROW - 1), "^row: expected values 0 .. 1, the rows of the tables, got -1"),
    (ln_modulate, (X, SHIFT, SCALE, on_meta(ROW)), "^expected all tensors on one device, got row on meta, x on cpu"),
    (ln_modulate, (X, SHIFT, on_meta(SCALE), ROW), "^expected all tensors on one device, got .*scale on meta"),
    (ln_modulate, (X, SHIFT[..., :7], SCALE, ROW), r"^shift: expected floating point \(2, 2, 8\), .*\(2, 2, 7\)"),
    (ln_modulate, (X, SHIFT, SCALE[:, :1], ROW), r"^scale: expected floating point \(2, 2, 8\), .*\(2, 1, 8\)"),
    (ln_modulate, (X, SHIFT[:, :0], SCALE[:, :0], ROW), r"^shift: expected floating point \(2, 1, 8\), .*\(2, 0, 8\)"),
    (ln_modulate, (X, SHIFT.int(), SCALE, ROW), "^shift: expected floating point .*int32"),
    (ln_modulate, (X, SHIFT[0], SCALE, ROW), r"^shift: expected floating point \(2, 'R', 8\), .*\(2, 8\)"),
    (ln_modulate, (torch.ones(1, 1, 8200), *torch.ones(2, 1, 1, 8200), ROW[:1, :1]), "^x: .*at most 8192, .*8200"),
    (gate_residual, (X, H[:, 1:], GATE, ROW), r"^h: expected floating point \(2, 12, 8\), .*\(2, 11, 8\)"),
    (gate_residual, (X, H.int(), GATE, ROW), "^h: expected floating point .*int32"),
    (gate_residual, (X, on_meta(H), GATE, ROW), "^expected all tensors on one device, got .*h on meta"),
    (gate_residual, (X, H, None, ROW), "^gate: expected a tensor, got NoneType"),
    (ln_modulate, (X, SHIFT, SCALE, [[0, 1, 0]]), "^row: expected a tensor, got list"),
    (ln_modulate, (X, SHIFT, SCALE, ROW.to(torch.uint16)), "^row: expected an integer .*uint16"),
    (ln_modulate, (X, SHIFT, SCALE, ROW, 1e-6, torch.int32), "^dtype: expected bfloat16, .*int32"),
    (residual_ln_modulate, (X, H, GATE[:1], SHIFT, SCALE, ROW), r"^gate: expected floating point \(2, 2, 8\)"),
    (residual_ln_modulate, (X, H, None, SHIFT, SCALE, ROW + 1), "^row: expected values"),
]  # fmt: skip


@pytest.mark.parametrize("function, args, match", MODULATE_ERRORS, ids=[m[:40] for *_, m in MODULATE_ERRORS])
def test_modulate_errors(function, args, match, chosen):
    with pytest.raises(ValueError, match=match):
        function(*args)


def test_row_is_not_read_back_from_a_gpu(monkeypatch):
    """To read its values, the program would wait for the device at every call; on the CPU they are looked at."""
    row = mock.Mock(device=torch.device("cuda"))
    modulate._check_row(row, 2)
    row.aminmax.assert_not_called()


DPO, START = list(torch.randn(3, 3, 4, 5, 3, 2)), torch.tensor([0, 1, 2])
DPO_ERRORS = [
    (DPO, torch.tensor([0, 1, 5]), r"^start: expected 0 … 4, got \[0, 1, 5\]: an empty region has no error"),
    (DPO, torch.tensor([-1, 1, 2]), "^start: expected 0 … 4"),
    (DPO, torch.tensor([0, 1, 5], dtype=torch.uint8), r"^start: expected 0 … 4, got \[0, 1, 5\]"),
    (DPO, [0, 1, 2], "^start: expected a tensor of integers, got list"),
    (DPO, START.float(), r"^start: expected integers \(3,\) .*float32"),
    (DPO, START > 0, "^start: expected integers .*bool"),
    (DPO, START[:2], "^start: expected integers"),
    (DPO, START[:, None], "^start: expected integers"),
    (DPO, on_meta(START), "^start: expected integers .*meta"),
    ([DPO[0], DPO[1][:, :, 1:], DPO[2]], START, r"^ref: expected floating point \(3, 4, 5, 3, 2\)"),
    ([*DPO[:2], DPO[2].int()], START, "^target: expected floating point .*int32"),
    ([on_meta(DPO[0]), *DPO[1:]], START, "^ref: expected floating point .* on meta, got .* on cpu"),
    ([DPO[0][0], *DPO[1:]], START, r"^v: expected floating point non-empty \(B, C, F, H, W\)"),
]


@pytest.mark.parametrize("given, start, match", DPO_ERRORS, ids=[m[:40] for *_, m in DPO_ERRORS])
def test_frame_errors_errors(given, start, match, chosen):
    with pytest.raises(ValueError, match=match):
        region_dpo.frame_errors(*given, start)


@pytest.mark.parametrize("beta, form", [(0.0, "inside"), (-1.0, "outside"), (float("nan"), "inside"), (1.0, "between")])
def test_region_dpo_errors(beta, form):
    with pytest.raises(ValueError, match=f"beta > 0 and form .*{form}"):
        region_dpo.region_dpo(*DPO, *DPO, START, beta, form)


WEIGHT, ROPE = torch.ones(8), torch.ones(12, 4)
ROPE_ERRORS = [
    ((X[0], WEIGHT, ROPE), "^x: expected a non-empty floating point"),
    ((X.int(), WEIGHT, ROPE), "^x: expected a non-empty floating point"),
    ((X[:, :0], WEIGHT, None), "^x: expected a non-empty"),
    ((X, WEIGHT[1:], ROPE), r"^weight: expected floating point \(8,\)"),
    ((X, on_meta(WEIGHT), ROPE), "^weight: .*meta"),
    ((X, WEIGHT, ROPE[1:]), r"^rope: expected float32 \(L=12, K\)"),
    ((X, WEIGHT, ROPE[:, :3]), "^rope: expected"),
    ((X, WEIGHT, torch.ones(12, 6)), "^rope: .*a divisor of D=8"),
    ((X, WEIGHT, ROPE.bfloat16()), "^rope: expected float32"),
    ((X, WEIGHT, torch.ones(12, 2, dtype=torch.complex64)), "^rope: expected float32"),
    ((torch.ones(1, 1, 8200), torch.ones(8200), None), "^x: expected a width D .*8200"),
]


@pytest.mark.parametrize("args, match", ROPE_ERRORS, ids=[m[:40] for *_, m in ROPE_ERRORS])
def test_norm_rope_errors(args, match, chosen):
    with pytest.raises(ValueError, match=match):
        norm_rope.norm_rope(*args)


def test_float64_is_the_definitions(monkeypatch):
    """The definitions compute in float64 what comes in float64; the kernels say that they do not."""
    calls = {
        "modulate": lambda: ln_modulate(X.double(), SHIFT, SCALE, ROW),
        "norm_rope": lambda: norm_rope.norm_rope(X.double(), WEIGHT, None),
        "region_dpo": lambda: region_dpo.frame_errors(*(a.double() for a in DPO), START)[0],
    }
    for name, call in calls.items():
        assert call().dtype == torch.float64
        monkeypatch.setattr(MODULES[name], "implementation", lambda device: "triton")
        with pytest.raises(ValueError, match="float64"):
            call()


# ---- which implementation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_implementation(name, monkeypatch):
    """CUDA takes the kernels, CPU the definitions, KERNELS decides otherwise; CUDA without Triton is an error."""
    module, cpu, cuda = MODULES[name], torch.device("cpu"), torch.device("cuda")
    for value, expected in (("", ["torch", "triton"]), ("torch", ["torch", "torch"])):
        monkeypatch.setattr(module, "KERNELS", value)
        assert [module.implementation(d) for d in (cpu, cuda)] == expected
    monkeypatch.setattr(module, "KERNELS", "pytorch")
    with pytest.raises(ValueError, match="KERNELS: expected torch, or unset it; got .pytorch"):
        module.implementation(cpu)
    monkeypatch.setattr(module, "KERNELS", "")
    monkeypatch.setattr(module, "triton", None)
    assert module.implementation(cpu) == "torch"
    with pytest.raises(RuntimeError, match="pip install triton"):
        module.implementation(cuda)


# ---- what the files say of diffusers ---------------------------------------------------------------------------------


def example(module, first: str) -> str:
    """The indented lines of a file's docstring from the one that begins with `first`: six at most."""
    lines = module.__doc__.partition(f"\n    {first}")[2].split("\n\n")[0].splitlines()
    assert 3 <= len(lines) <= 6
    return "\n".join([f"    {first}{lines[0]}", *lines[1:]])


def test_the_example_is_diffusers_block():
    """Word for word in place of WanTransformerBlock.forward: a row for the clip, and a row a token; and a row a frame,
    which diffusers takes as a row a token."""
    wan = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    block = wan.WanTransformerBlock(24, 48, 2, cross_attn_norm=True)
    torch.nn.init.normal_(block.norm2.weight), torch.nn.init.normal_(block.norm2.bias)
    rotary_emb = wan.WanRotaryPosEmbed(12, (1, 2, 2), 64)(torch.empty(1, 4, 3, 4, 6))
    text, code = torch.randn(2, 5, 24), example(modulate, "table = ")
    scope = vars(modulate).copy()
    exec(f"def forward(self, x, encoder_hidden_states, temb, rotary_emb):\n{code}\n    return x", scope)
    for rows in (None, 18, 3):
        x, temb = torch.randn(2, 18, 24), torch.randn(2, *([rows] if rows else []), 6, 24)
        ours = scope["forward"](block, x, text, temb, rotary_emb)
        theirs = block(x, text, temb.repeat_interleave(18 // rows, 1) if rows else temb, rotary_emb)
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5) and not torch.allclose(ours, x, atol=0.1)


def test_the_example_is_diffusers_query():
    """Word for word in place of norm_q, norm_k and apply_rotary_emb of WanAttnProcessor."""
    wan = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    attn = wan.WanAttention(24, heads=2, dim_head=12, processor=wan.WanAttnProcessor())
    torch.nn.init.normal_(attn.norm_q.weight), torch.nn.init.normal_(attn.norm_k.weight)
    rotary_emb = wan.WanRotaryPosEmbed(12, (1, 2, 2), 64)(torch.empty(1, 4, 3, 4, 6))
    x, scope = torch.randn(2, 18, 24), vars(norm_rope).copy()
    scope |= {"attn": attn, "rotary_emb": rotary_emb, "query": attn.to_q(x), "key": attn.to_k(x)}
    exec(inspect.cleandoc(example(norm_rope, "rope = torch.stack([a[0")), scope)
    q, k, v = (a.unflatten(2, (2, -1)).transpose(1, 2) for a in (scope["query"], scope["key"], attn.to_v(x)))
    ours = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    assert torch.allclose(attn.to_out[0](ours), attn(x, rotary_emb=rotary_emb), rtol=1e-5, atol=1e-6)


def test_the_page_opens_with_calls_that_run():
    made = calls_to_copy()
    assert made["x"].grad.isfinite().all() and made["q"].shape == made["x"].shape and made["loss"].shape == (1,)


# ---- torch.compile ---------------------------------------------------------------------------------------------------


def block_and_inputs():
    """A block whose frames take two rows, as in the continuation model."""
    block = model.Block(model.DiTConfig(64, 128, 2, 1))
    row = torch.tensor([[1, 0, 0], [1, 1, 0]], dtype=torch.int32)
    x = torch.randn(2, 12, 64, requires_grad=True)
    return block, (x, torch.randn(2, 2, 6, 64), row, torch.randn(2, 5, 64), torch.randn(12, 32))


def test_compiles_without_a_break():
    """A block in one graph on the CPU, forward and backward equal to eager's."""
    torch._dynamo.reset()  # whatever was compiled before
    block, inputs = block_and_inputs()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    one, two = block(*inputs), compiled(*inputs)
    assert torch.allclose(one, two, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (inputs[0], block.modulation)) for y in (one, two))):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def launches(graph: torch.fx.GraphModule) -> int:
    nodes = [n for m in graph.modules() if isinstance(m, torch.fx.GraphModule) for n in m.graph.nodes]
    return sum("triton_kernel_wrapper" in str(n.target) for n in nodes)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_with_the_kernels(dynamic, monkeypatch):
    """On fake tensors: the kernels are part of one graph, forward and backward, with nothing to break it.

    The same for the loss. has_triton says no on a machine without a GPU; tracing itself needs none.
    """
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    for module in MODULES.values():
        monkeypatch.setattr(module, "implementation", lambda device: "triton")
    graphs = []
    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        block, inputs = block_and_inputs()
        options = dict(fullgraph=True, dynamic=dynamic, backend=lambda graph, _: graphs.append(graph) or graph)
        function = torch.compile(block, **options)
        assert function(*inputs).shape == (2, 12, 64)
        assert launches(graphs[0]) == 8 + 16  # 4 of modulate, 4 of norm_rope; backward each with a fold
        x, row, rope = (
            torch.randn(2, 20, 64, requires_grad=True),
            torch.zeros(2, 5, dtype=torch.int32),
            torch.randn(20, 32),
        )
        assert function(x, inputs[1], row, inputs[3], rope).shape == (2, 20, 64)
        assert len(graphs) == 2 - dynamic  # one graph for every length, if that was asked for
        pair = [a.requires_grad_(i < 2) for i, a in enumerate(torch.randn(6, 2, 4, 5, 8, 8))]
        function = torch.compile(region_dpo.region_dpo, **options)
        loss, _ = function(*pair, torch.tensor([1, 2]), 2.0, "inside")
        assert loss.shape == (2,) and launches(graphs[-1]) == 4
    torch._dynamo.reset()


# ---- each file alone -------------------------------------------------------------------------------------------------

ALONE = {
    "modulate": "x, t, row = torch.randn(1, 4, 8), torch.zeros(1, 1, 8), torch.zeros(1, 2, dtype=torch.int32)\n"
    "assert m.ln_modulate(x, t, t, row).shape == (1, 4, 8) and m.gate_residual(x, x, t, row).equal(x)",
    "norm_rope": "assert m.norm_rope(torch.randn(1, 4, 8), torch.ones(8), torch.ones(4, 2)).shape == (1, 4, 8)",
    "region_dpo": """
policy = torch.nn.Conv3d(4, 4, 1)  # a linear model learns to prefer the winner; its start is the reference
torch.nn.init.dirac_(policy.weight), torch.nn.init.zeros_(policy.bias)
x_w, x_l, target_w, target_l = torch.randn(4, 8, 4, 13, 2, 2)
optimizer, margins = torch.optim.SGD(policy.parameters(), lr=0.1), []
for _ in range(20):
    loss, parts = m.region_dpo(policy(x_w), policy(x_l), x_w, x_l, target_w, target_l, torch.arange(8), 1.0, "inside")
    optimizer.zero_grad()
    loss.mean().backward()
    optimizer.step()
    margins.append(parts["margin"].mean().item())
assert abs(margins[0]) < 1e-5 < margins[10] < margins[-1], margins
""",
}


@pytest.mark.parametrize("name, shape", [("modulate", (1, 2, 3, 16)), ("norm_rope", (1, 6, 2, 8)),
                                         ("region_dpo", (1, 2, 6, 2, 2))])  # fmt: skip
def test_time(name, shape, monkeypatch, capsys):
    """What is timed on a GPU, run once: every way gets its line."""
    module, runs = MODULES[name], []
    graphs = mock.Mock(testing=mock.Mock(do_bench_cudagraph=lambda run: runs.append(run()) or 2.0))
    monkeypatch.setattr(module, "triton", graphs)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    took = module.time(torch.device("cpu"), shape)
    assert all(ways == {"kernel": 2.0, "eager": 2.0, "torch.compile": 2.0} for ways in took.values())
    assert len(runs) == 3 * len(took) == capsys.readouterr().out.count("2.000 ms")


def test_every_kernel_has_a_line_above_and_a_licence():
    files = {p.stem: p.read_text(encoding="utf-8") for p in (ROOT / "kernels").glob("*.py") if p.stem != "__init__"}
    assert set(files) == set(ALONE) == set(MODULES)
    assert all(text.startswith("# SPDX-License-Identifier: Apache-2.0\n") for text in files.values())


WITHOUT = """
import sys, pytest
sys.modules.update(dict.fromkeys("av decord diffusers matplotlib peft PIL tokenizers tqdm transformers".split()))
sys.exit(pytest.main(["-m", "gpu", "-q", "-p", "no:cacheprovider"]))
"""


def test_gpu_tests_need_little():
    """A GPU's image has torch, triton and numpy, not what reads videos and captions: `pytest -m gpu` runs there."""
    done = script("-c", WITHOUT)
    counts = re.search(r"(\d+) skipped, \d+ deselected", done.stdout)
    assert done.returncode == 0 and counts and int(counts[1]) > 70, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize("triton", ["with", "without"])
def test_kernel_files_work_copied_alone(triton, tmp_path):
    """Readers copy a kernel: its one file must work in an empty folder, on a machine without Triton, too.

    Run as a program it checks itself, and says what it did not do where there is no CUDA device.
    """
    code = ["import runpy, sys, torch", f"assert {str(ROOT)!r} not in sys.path"]
    code += ["sys.modules['triton'] = None"] * (triton == "without")
    for name, use in ALONE.items():
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(ROOT / "kernels" / f"{name}.py", folder)
        code += [f"sys.path[0] = {str(folder)!r}", f"import {name} as m", use, f"print({name!r})"]
        code += [f"runpy.run_path({str(folder / name) + '.py'!r}, run_name='__main__')"]
    done = script("-c", "\n".join(code), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name, output in zip(ALONE, re.split(rf"^(?:{'|'.join(ALONE)})$", done.stdout, flags=re.M)[1:], strict=True):
        assert len(re.findall(r"error [\d.e+-]+, of the definition", output)) >= 3, name
        assert "no CUDA device: what was checked is the definition" in output and "not run" in output, name

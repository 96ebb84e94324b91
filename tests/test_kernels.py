"""kernels/: one set of cases against float64, whoever executes the kernels.

    definition   PyTorch, on the CPU
    interpreter  Triton's own, in a process of its own that test_interpreter.py starts
    emulator     what Triton compiled for sm_80: its PTX, instruction by instruction (emulator/ptx.py)
    cuda         a GPU; skipped, and counted, where there is none

An output or gradient may be off by twice what the definition is off in the same dtype. What a kernel leaves unwritten
is NaN: new tensors are filled with it.
"""

import contextlib
import math
import os
from unittest import mock

import pytest
import torch
from emulator import aot, interpreter, ptx

from kernels import modulate, norm_rope, region_dpo

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    interpreter.repair()
HALF, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
TOLERANCE = {F32: 1e-5, HALF: 2**-8, BF16: 2**-5}  # of the definition, relative to the largest value
LAUNCHERS = ["definition", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)]


@contextlib.contextmanager
def launched_by(launcher: str):
    """The functions of kernels/ take their kernels, or the definitions, whatever the device."""
    with contextlib.ExitStack() as stack:
        if launcher == "emulator":
            stack.enter_context(aot.replaced(ptx.Emulated))
        chosen = "torch" if launcher == "definition" else "triton"
        for module in aot.MODULES:
            stack.enter_context(mock.patch.object(module, "implementation", lambda device: chosen))
        yield


@pytest.fixture(params=["interpreter"] if INTERPRETED else LAUNCHERS, autouse=True)
def launcher(request):
    """Who runs the kernels in a test; on "cuda" the test's tensors are made on the GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device: the kernels were not run on a GPU")
    device = torch.device("cuda") if request.param == "cuda" else contextlib.nullcontext()
    torch.use_deterministic_algorithms(True)  # with torch.utils.deterministic.fill_uninitialized_memory: empty is NaN
    with launched_by(request.param), device:
        yield
    torch.use_deterministic_algorithms(False)


def test_new_tensors_are_nan():
    """Guards the guard: an output that a kernel does not write would be seen."""
    assert all(a.isnan().all() for a in (torch.empty(3), torch.ones(1).new_empty(2), torch.empty_like(torch.ones(2))))


def exactly(tensors):
    """The same leaves in float64."""
    return [a.detach().double().requires_grad_(a.requires_grad) for a in tensors]


def close(names, got, eager, truth, dtypes) -> None:
    """Each result within twice the definition's error; the definition within its own tolerance."""
    for name, a, b, exact, dtype in zip(names, got, eager, truth, dtypes, strict=True):
        size = exact.abs().max().item() + 1e-30
        error, allowed = ((c.double() - exact).abs().max().item() for c in (a, b))
        assert allowed <= TOLERANCE[dtype] * max(size, 1), f"{name}: definition off by {allowed:.2e} of {size:.2e}"
        assert error <= 2 * allowed + 2**-22 * size, f"{name}: off by {error:.2e}, the definition by {allowed:.2e}"


# ---- modulate --------------------------------------------------------------------------------------------------------


def expand(table, row, L):
    """(B, R, D) -> (B, L, D): the table for each token, written with loops. The kernels must never do this."""
    B, F_ = row.shape
    return torch.stack([torch.stack([table[b, row[b, k // (L // F_)]] for k in range(L)]) for b in range(B)])


def ln_modulate_64(x, shift, scale, row, eps, _):
    x, L = x.double(), x.shape[1]
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    return normed * (1 + expand(scale.double(), row, L)) + expand(shift.double(), row, L)


def residual_64(x, h, gate, row):
    return x.double() + (1 if gate is None else expand(gate.double(), row, x.shape[1])) * h.double()


def residual_ln_64(x, h, gate, *rest):
    x_out = residual_64(x, h, gate, rest[2])
    return ln_modulate_64(x_out, *rest), x_out


PLAIN = (ln_modulate_64, residual_ln_64, residual_64)
INPUTS = ("x", "h", "gate", "shift", "scale")
OUTPUTS = {"ln_modulate": ["y"], "gate_residual": ["x_out"]}  # of the other forms: y, x_out
STREAMS = {"float32": (F32, F32, None), "bfloat16": (BF16, BF16, None), "float16": (HALF, HALF, None),
           "mixed": (F32, BF16, BF16)}  # dtypes of x, h and, where it is not x's, y  # fmt: skip
CASES = [  # B, F, tokens a frame, D, rows of the table; streams. Few widths: each is compiled anew
    ((2, 3, 4, 8, "one"), "float32"),
    ((2, 5, 3, 7, "mask"), "float32"),  # odd D, odd L
    ((2, 5, 3, 7, "mask"), "mixed"),
    ((1, 2, 40, 7, "mask"), "float32"),  # several programs a frame
    *(((1, 2, 3, 272, "mask"), streams) for streams in ("float32", "bfloat16", "mixed")),  # two warps
]
CASES = [(form, *case) for form in modulate.FORMS for case in CASES]
CASES += [
    ("residual_ln_modulate", (1, 2, 3, 272, "mask"), "float16"),
    ("residual_ln_modulate", (3, 4, 1, 33, "mask"), "bfloat16"),
    ("residual_ln_modulate", (2, 7, 5, 13, "frames"), "float32"),
    ("residual_ln_modulate", (1, 70, 1, 16, "mask"), "float32"),  # more partial sums than the fold takes at once
]
if not INTERPRETED:  # there each of the many programs of a wide fold costs as much as any
    CASES += [(form, (1, 2, 3, 1536, "mask"), "mixed") for form in modulate.FORMS]
    CASES += [("residual_ln_modulate", (1, 1, 2, 8192, "one"), "mixed")]  # the widest


def inputs(B, F_, tokens, D, rows, streams="float32"):
    """x, h, gate, shift, scale as leaves, row."""
    R = {"one": 1, "mask": 2, "frames": F_}[rows]
    row = torch.randint(0, R, (B, F_), dtype=torch.int32)
    if rows == "frames":
        row = torch.arange(F_, dtype=torch.int32).expand(B, F_)
    x, h = (torch.randn(B, F_ * tokens, D).to(dtype) for dtype in STREAMS[streams][:2])
    return [a.requires_grad_() for a in (x + 1, h, *(torch.randn(3, B, R, D).unbind(0)))], row


def against_float64(form, leaves, row, streams, weights):
    """Compares outputs and gradients; returns those of the kernels."""
    call, dtype, found = modulate.FORMS[form][0], STREAMS[streams][2], []
    for functions in (modulate.KERNEL, modulate.DEFINITION, PLAIN):
        given = exactly(leaves) if functions is PLAIN else leaves
        outputs = call(functions, *given, row, 1e-6, dtype)
        total = sum((a.double() * w).sum() for a, w in zip(outputs, weights))
        gradients = dict(zip(INPUTS, torch.autograd.grad(total, given, allow_unused=True)))
        outputs = dict(zip(OUTPUTS.get(form, ["y", "x_out"]), outputs))
        found.append(outputs | {f"d{name}": a for name, a in gradients.items() if a is not None})
    assert found[0].keys() == found[1].keys() == found[2].keys()
    rounded = min(STREAMS[streams][:2], key=lambda d: torch.finfo(d).bits)
    close(found[0], *(a.values() for a in found), dtypes=[rounded] * len(found[0]))
    return found[0]


@pytest.mark.parametrize("form, shape, streams", CASES, ids=str)
def test_modulate(form, shape, streams):
    """Outputs, every gradient; each token takes its own frame's row, a row's gradient sums the tokens that took it."""
    leaves, row = inputs(*shape, streams)
    weights = torch.randn(2, *leaves[0].shape, dtype=torch.float64)
    dtypes = dict(zip(("dx", "dh", "y"), STREAMS[streams])) | {"x_out": STREAMS[streams][0]}
    for name, a in against_float64(form, leaves, row, streams, weights).items():
        assert a.dtype == (dtypes.get(name) or (STREAMS[streams][0] if name == "y" else F32)), name


def test_modulate_strides():
    """Streams, tables and gradients that are not contiguous, a row that is expanded: as if they were."""
    B, F_, tokens, D = 2, 4, 3, 24
    x, h = (torch.randn(B, D, F_ * tokens).transpose(1, 2) for _ in range(2))
    gate, shift = torch.randn(B, 2, 6, D).unbind(2)[:2]  # rows 6 D apart
    scale = torch.randn(B, D, 2).transpose(1, 2)  # last axis not contiguous
    leaves = [a.requires_grad_() for a in (x, h, gate, shift, scale)]
    row = torch.tensor([[0, 1, 1, 0]], dtype=torch.int32).expand(B, F_)
    weights = torch.randn(2, D, B, F_ * tokens, dtype=torch.float64).permute(0, 2, 3, 1)
    against_float64("residual_ln_modulate", leaves, row, "float32", weights)


def test_modulate_unused_row():
    """A row that no frame takes gets a gradient of exactly 0, not what was in memory."""
    leaves, _ = inputs(2, 3, 2, 8, "mask")
    row = torch.tensor([[0, 0, 0], [1, 1, 1]], dtype=torch.int32)
    y, x_out = modulate.residual_ln_modulate(*leaves, row)
    for gradient in torch.autograd.grad((y + x_out).square().sum(), leaves[2:]):
        assert (gradient[0, 1] == 0).all() and (gradient[1, 0] == 0).all()
        assert (gradient[0, 0] != 0).all() and (gradient[1, 1] != 0).all()


def test_modulate_frozen_tables():
    """Tables that ask for no gradient change no other gradient, and h is then not kept for backward."""
    leaves, row = inputs(2, 3, 5, 16, "mask")
    weights = torch.randn(2, *leaves[0].shape)

    def gradients(tables):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda a: kept.append(a.data_ptr()) or a, lambda a: a):
            outputs = modulate.residual_ln_modulate(*leaves[:2], *tables, row)
        total = sum((a * w).sum() for a, w in zip(outputs, weights))
        return torch.autograd.grad(total, leaves[:2]), leaves[1].data_ptr() in kept

    trained, kept = gradients(leaves[2:])
    frozen, kept_frozen = gradients([a.detach() for a in leaves[2:]])
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in zip(trained, frozen)) and not kept_frozen and kept


def test_modulate_rows_are_equal_to_one_row():
    """A table of equal rows is the one-row table, bit for bit: guards M = 0 being the text-to-video model."""
    (x, h, gate, shift, scale), _ = inputs(2, 4, 3, 16, "one")
    one, frames = torch.zeros(2, 4, dtype=torch.int32), torch.arange(4, dtype=torch.int32).expand(2, 4)
    wide = [a.repeat(1, 4, 1) for a in (gate, shift, scale)]
    for a, b in zip(
        modulate.residual_ln_modulate(x, h, gate, shift, scale, one),
        modulate.residual_ln_modulate(x, h, *wide, frames),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_modulate_writes_into_no_input():
    leaves, row = inputs(2, 3, 4, 8, "mask")
    before = [a.detach().clone() for a in (*leaves, row)]
    y, x_out = modulate.residual_ln_modulate(*leaves, row)
    weight = torch.ones_like(y)
    torch.autograd.grad([y, x_out], leaves, [weight, weight])
    assert all(torch.equal(a, b) for a, b in zip((*leaves, row), before, strict=True)) and (weight == 1).all()


# ---- norm_rope -------------------------------------------------------------------------------------------------------


def norm_rope_64(x, weight, rope, eps=1e-6):
    """Straight from the equations, pair by pair."""
    x = x.double()
    n = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    if rope is None:
        return n
    a, b = n.unflatten(-1, (-1, 2)).unbind(-1)
    heads = x.shape[-1] // rope.shape[1]
    cos, sin = (c.double().repeat(1, heads) for c in rope.unflatten(-1, (-1, 2)).unbind(-1))
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


ROPE_CASES = [  # B, L, heads, K, dtype, rotated
    (2, 9, 3, 12, F32, True),  # K no power of two, L no multiple of the tokens a program takes
    (2, 9, 3, 12, F32, False),
    (1, 70, 1, 10, F32, True),
    (1, 3, 12, 128, F32, True),
    (1, 3, 12, 128, BF16, True),
    (2, 5, 12, 128, BF16, False),
    (1, 3, 12, 128, HALF, True),
]
if not INTERPRETED:  # there it takes seconds
    ROPE_CASES += [(1, 2100, 1, 10, F32, True)]  # more partial sums than the fold takes at once


@pytest.mark.parametrize("B, L, heads, K, dtype, rotated", ROPE_CASES, ids=str)
def test_norm_rope(B, L, heads, K, dtype, rotated):
    D = heads * K
    x, weight = (torch.randn(B, L, D).to(dtype) + 0.5).requires_grad_(), torch.randn(D).requires_grad_()
    angle = 6 * torch.rand(L, K // 2)
    rope = torch.stack([angle.cos(), angle.sin()], -1).flatten(1) if rotated else None
    w, found = torch.randn(B, L, D, dtype=torch.float64), []
    for function in (norm_rope.norm_rope, norm_rope.norm_rope_ref, norm_rope_64):
        leaves = exactly([x, weight]) if function is norm_rope_64 else [x, weight]
        y = function(*leaves, rope)
        found.append([y, *torch.autograd.grad((y.double() * w).sum(), leaves)])
    assert found[0][0].dtype == dtype
    close(["y", "dx", "dweight"], *found, dtypes=[dtype] * 3)


def test_norm_rope_frozen_weight():
    """The gradient of x does not change, and x may be a transposed view."""
    x, weight = torch.randn(2, 16, 6).transpose(1, 2).requires_grad_(), torch.randn(16).requires_grad_()
    rope = torch.randn(6, 8)
    one, two = (torch.autograd.grad(norm_rope.norm_rope(x, w, rope).sum(), x)[0] for w in (weight, weight.detach()))
    assert torch.allclose(one, two, rtol=1e-6, atol=1e-6)


# ---- region_dpo ------------------------------------------------------------------------------------------------------

START = [0, 2, 4]  # of 5 frames: each pair its own


def frame_errors_64(v, ref, target, start):
    """Straight from the equations, in float64, sample by sample: d, the policy's error, the reference's."""
    keep = torch.zeros(len(v), v.shape[2], dtype=torch.float64)
    for i, first in enumerate(start.tolist()):
        keep[i, first:] = 1
    policy, reference = ((a.double() - target.double()).square().mean(dim=(1, 3, 4)) for a in (v, ref))
    return [a * keep for a in (policy - reference, policy, reference)]


def dpo_inputs(n=6, dtype=F32, C=2, H=3, W=3):
    """v_w, v_l, ref_w, ref_l, target_w, target_l, or as many as n; and start."""
    return [a.to(dtype) for a in torch.randn(n, 3, C, 5, H, W)], torch.tensor(START)


DPO_SIZES = [(4, 3, 2), (3, 5, 7), (1, 12, 48), (2, 32, 48)]  # C, H, W: small, odd, aligned, several blocks
DPO_DTYPES = [(F32, F32), (BF16, BF16), (HALF, HALF), (BF16, F32)]  # of the predictions and of the target
DPO_CASES = [((3, 5, 7), dtypes) for dtypes in DPO_DTYPES] + [(size, (BF16, F32)) for size in DPO_SIZES if size[0] != 3]


@pytest.mark.parametrize("size, dtypes", DPO_CASES, ids=str)
def test_frame_errors(size, dtypes):
    """d, both errors and the gradients of all three tensors; every sample with a start of its own, 0 included."""
    given, start = dpo_inputs(3, dtypes[0], *size)
    tensors = [a.to(dtypes[i > 1]).requires_grad_() for i, a in enumerate(given)]
    weights, found = torch.randn(3, 5, dtype=torch.float64), []
    for function in (region_dpo.frame_errors, region_dpo.frame_errors_ref, frame_errors_64):
        leaves = exactly(tensors) if function is frame_errors_64 else tensors
        d, *errors = function(*leaves, start)
        assert not any(a.requires_grad for a in errors) or function is frame_errors_64
        found.append([d, *errors, *torch.autograd.grad((d.double() * weights).sum(), leaves)])
    names = ["d", "policy", "reference", "dv", "dref", "dtarget"]
    dtypes = [F32] * 3 + [a.dtype for a in tensors]
    assert [a.dtype for a in found[0]] == dtypes
    close(names, *found, dtypes)


def test_frame_errors_some_gradients():
    """Only what asks for a gradient gets one, and it is the one it gets among all."""
    tensors, start = dpo_inputs(3)
    every = [a.clone().requires_grad_() for a in tensors]
    all_gradients = torch.autograd.grad(region_dpo.frame_errors(*every, start)[0].sum(), every)
    for wanted in ((0,), (1,), (2,), (0, 2)):
        some = [a.clone().requires_grad_(i in wanted) for i, a in enumerate(tensors)]
        found = torch.autograd.grad(region_dpo.frame_errors(*some, start)[0].sum(), [some[i] for i in wanted])
        assert all(torch.equal(a, all_gradients[i]) for i, a in zip(wanted, found))


def test_frame_errors_select():
    """Whatever stands before start reaches neither a value nor a gradient; its gradient is exactly 0."""
    clean, start = dpo_inputs(3)
    before = (torch.arange(5) < start[:, None])[:, None, :, None, None]
    values = (float("nan"), float("inf"), 1e30)
    moved = [torch.where(before, value, a).requires_grad_() for a, value in zip(clean, values)]
    found = region_dpo.frame_errors(*moved, start)
    assert all(torch.equal(a, b) for a, b in zip(found, region_dpo.frame_errors(*clean, start), strict=True))
    for gradient in torch.autograd.grad(found[0].sum(), moved):
        assert gradient.isfinite().all() and (gradient.masked_select(before) == 0).all()
        assert (gradient.masked_select(~before) != 0).all()


@pytest.mark.parametrize("scale", [0, 1e-5, 1e-3])
def test_frame_errors_near_the_reference(scale):
    """d is 0 at the reference, and near it, as early in training, far closer to float64 than a difference of errors."""
    ref, target = torch.randn(2, 2, 16, 5, 16, 16)
    v, start = ref + scale * torch.randn_like(ref), torch.tensor([0, 1])
    d, policy, reference = region_dpo.frame_errors(v, ref, target, start)
    exact = frame_errors_64(v, ref, target, start)[0]
    off, off_subtracted = ((a.double() - exact).abs().mean() for a in (d, policy - reference))
    assert (off * 10 < off_subtracted) if scale else (d == 0).all()


def test_region_dpo_by_hand():
    """Numbers worked out by hand, for one pair of 3 frames and 2 values a frame, start = 1, so K = 2, β = 2.

    Targets 0. Frame errors are means of squares, frame 0 does not count:
      policy, winner (1, 1), (0, 2) -> 1, 2      reference, winner (2, 0), (1, 1) -> 2, 1      d_w = −1, 1
      policy, loser  (2, 2), (1, 1) -> 4, 1      reference, loser  (0, 0), (1, 1) -> 0, 1      d_l = 4, 0
    S = (−1 − 4) + (1 − 0) = −4: the policy prefers the winner. outside softplus(−8) / 2, inside softplus(−4), margin 4.
    """

    def clip(*values):  # (1, C=2, F=3, 1, 1)
        return torch.tensor(values).T.reshape(1, 2, 3, 1, 1)

    v_w, v_l = clip((9.0, 9.0), (1.0, 1.0), (0.0, 2.0)), clip((7.0, 7.0), (2.0, 2.0), (1.0, 1.0))
    ref_w, ref_l = clip((5.0, 5.0), (2.0, 0.0), (1.0, 1.0)), clip((3.0, 3.0), (0.0, 0.0), (1.0, 1.0))
    zero, start = torch.zeros_like(v_w), torch.tensor([1])
    frames = {"err/w_policy": [0, 1, 2], "err/w_ref": [0, 2, 1], "diff/w": [0, -1, 1],
              "err/l_policy": [0, 4, 1], "err/l_ref": [0, 0, 1], "diff/l": [0, 4, 0]}  # fmt: skip
    for form, expected in (("outside", math.log1p(math.exp(-8)) / 2), ("inside", math.log1p(math.exp(-4)))):
        loss, parts = region_dpo.region_dpo(v_w, v_l, ref_w, ref_l, zero, zero, start, 2.0, form)
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        expected = {name: [a] for name, a in frames.items()} | {"S": [-4], "margin": [4]}
        assert {name: a.tolist() for name, a in parts.items()} == expected


def test_region_dpo_at_step_0():
    """Policy == reference: S is exactly 0 and the loss ln 2 / K or ln 2; the gradient is not 0, and both forms' own."""
    (ref_w, ref_l, target_w, target_l), start = dpo_inputs(4)
    gradients = []
    for form, expected in (("outside", [math.log(2) / (5 - n) for n in START]), ("inside", [math.log(2)] * 3)):
        v_w, v_l = ref_w.clone().requires_grad_(), ref_l.clone().requires_grad_()
        loss, parts = region_dpo.region_dpo(v_w, v_l, ref_w, ref_l, target_w, target_l, start, 800.0, form)
        assert (parts["S"] == 0).all() and (parts["margin"] == 0).all()
        assert loss.tolist() == pytest.approx(expected, rel=1e-6)
        gradients.append(torch.autograd.grad(loss.sum(), (v_w, v_l)))
    for outside, inside in zip(*gradients):
        assert (outside[:, :, 4] != 0).all() and torch.allclose(outside, inside, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("z", [-80.0, 0.0, 80.0])
def test_region_dpo_saturated(z):
    """The loss and its slope stay right, and finite, where β·S is large: no overflow, no cancellation."""
    zero, one, start = torch.zeros(1, 1, 2, 4, 4), torch.ones(1, 1, 2, 4, 4), torch.tensor([1])
    v_w, v_l = ((one if moved else zero).clone().requires_grad_() for moved in (z > 0, z < 0))  # S = 1, 0 or -1
    beta = abs(z) or 1.0
    loss, _ = region_dpo.region_dpo(v_w, v_l, zero, zero, zero, zero, start, beta)
    gradient = torch.autograd.grad(loss.sum(), v_l if z < 0 else v_w)[0][0, 0, 1, 0, 0]
    assert loss.item() == pytest.approx(max(z, 0) + math.log1p(math.exp(-abs(z))), rel=2e-6)
    slope = beta / (1 + math.exp(-z)) * 2 / 16
    assert gradient.item() == pytest.approx(slope * (z > 0) - slope * (z < 0), rel=2e-6)

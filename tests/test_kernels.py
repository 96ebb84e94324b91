"""kernels/: one set of cases against float64, whoever executes the kernels.

    definition   PyTorch, on the CPU
    interpreter  Triton's own, in a process of its own that test_interpreter.py starts
    emulator     what Triton compiled for sm_80: its PTX, instruction by instruction (ptx.py)
    cuda         a GPU; skipped, and counted, where there is none

An output or gradient may be off by twice what the definition is off in the same dtype. What a kernel leaves unwritten
is NaN: new tensors are filled with it.
"""

import functools
import math
import os

import pytest
import torch
import torch.nn.functional as F

from kernels import modulate, norm_rope, region_dpo

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NAN = float("nan")
MODULES = (modulate, norm_rope, region_dpo)
HALF, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
TOLERANCE = {F32: 1e-5, HALF: 2**-8, BF16: 2**-5}  # of the definition, relative to the largest value


@functools.cache
def emulated(module, name):
    from emulator import ptx

    return ptx.Emulated(getattr(module, name))


def emulate(monkeypatch) -> None:
    """The kernels' launches go to the emulator."""
    for module in MODULES:
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            monkeypatch.setattr(module, name, emulated(module, name))


LAUNCHERS = ["definition", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=["interpreter"] if INTERPRETED else LAUNCHERS, autouse=True)
def launcher(request, monkeypatch):
    """Who runs the kernels in a test; on "cuda" the test's tensors are made on the GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device: the kernels were not run on a GPU")
    for module in MODULES:
        chosen = "torch" if request.param == "definition" else "triton"
        monkeypatch.setattr(module, "implementation", lambda device, chosen=chosen: chosen)
    if request.param == "emulator":
        emulate(monkeypatch)
    torch.use_deterministic_algorithms(True)  # with torch.utils.deterministic.fill_uninitialized_memory: empty is NaN
    if request.param == "cuda":
        torch.set_default_device("cuda")
    yield request.param
    torch.set_default_device("cpu")
    torch.use_deterministic_algorithms(False)


if INTERPRETED:
    import interpreter

    interpreter.repair()


def test_new_tensors_are_nan():
    """Guards the guard: an output that a kernel does not write would be seen."""
    assert all(a.isnan().all() for a in (torch.empty(3), torch.ones(1).new_empty(2), torch.empty_like(torch.ones(2))))


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


def residual_64(x, h, gate, row):
    return x.double() + (1 if gate is None else expand(gate.double(), row, x.shape[1])) * h.double()


def ln_modulate_64(x, shift, scale, row, eps=1e-6):
    x, L = x.double(), x.shape[1]
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    return normed * (1 + expand(scale.double(), row, L)) + expand(shift.double(), row, L)


FORMS = {  # name -> which of x, h, gate, shift, scale it reads
    "ln_modulate": "10011",
    "residual_ln_modulate": "11111",
    "residual_ln_modulate_no_gate": "11011",
    "gate_residual": "11100",
}
SHAPES = [  # B, F, tokens a frame, D, rows of the table
    (2, 3, 4, 8, "one"),
    (2, 5, 3, 7, "mask"),  # odd D, odd L
    (3, 4, 1, 33, "mask"),
    (2, 7, 5, 13, "frames"),
    (1, 2, 40, 96, "mask"),  # several programs a frame
    (1, 70, 1, 16, "frames"),  # more partial sums than the fold takes at once
]
STREAMS = {"float32": (F32, F32, None), "bfloat16": (BF16, BF16, None), "float16": (HALF, HALF, None),
           "mixed": (F32, BF16, BF16)}  # dtypes of x, h and, where it is not x's, y  # fmt: skip
CASES = [(form, shape, "float32") for form in FORMS for shape in SHAPES]
CASES += [(form, (1, 2, 3, 1536, "mask"), streams) for form in FORMS for streams in STREAMS]
CASES += [(form, (2, 5, 3, 7, "mask"), streams) for form in FORMS for streams in ("bfloat16", "mixed")]
CASES += [("residual_ln_modulate", (1, 1, 2, 8192, "one"), "mixed")]  # the widest


def inputs(B, F_, tokens, D, rows, streams="float32"):
    """x, h, gate, shift, scale as leaves, row."""
    R = {"one": 1, "mask": 2, "frames": F_}[rows]
    row = torch.randint(0, R, (B, F_), dtype=torch.int32)
    if rows == "frames":
        row = torch.arange(F_, dtype=torch.int32).expand(B, F_)
    x, h = (torch.randn(B, F_ * tokens, D).to(dtype) for dtype in STREAMS[streams][:2])
    return [a.requires_grad_() for a in (x + 1, h, *(torch.randn(3, B, R, D).unbind(0)))], row


def call(form, leaves, row, dtype, functions=None):
    """The outputs of a form that exist, (y, x_out)."""
    x, h, gate, shift, scale = leaves
    ln, residual_ln, residual = functions or (
        modulate.ln_modulate, modulate.residual_ln_modulate, modulate.gate_residual
    )  # fmt: skip
    if form == "ln_modulate":
        return [ln(x, shift, scale, row, dtype=dtype)]
    if form == "gate_residual":
        return [residual(x, h, gate, row)]
    return list(residual_ln(x, h, gate if form == "residual_ln_modulate" else None, shift, scale, row, dtype=dtype))


def definition(form, leaves, row, dtype):
    functions = modulate.ln_modulate_ref, modulate.residual_ln_modulate_ref, modulate.gate_residual_ref
    return call(form, leaves, row, dtype, functions)


def plain(form, leaves, row, _):
    def residual_ln(x, h, gate, shift, scale, row, dtype):
        x_out = residual_64(x, h, gate, row)
        return ln_modulate_64(x_out, shift, scale, row), x_out

    return call(form, leaves, row, None, (lambda *a, dtype: ln_modulate_64(*a), residual_ln, residual_64))


def exactly(tensors):
    """The same leaves in float64."""
    return [a.detach().double().requires_grad_(a.requires_grad) for a in tensors]


def with_gradients(function, form, leaves, row, dtype, weights):
    leaves = exactly(leaves) if function is plain else leaves
    outputs = function(form, leaves, row, dtype)
    read = [a for a, reads in zip(leaves, FORMS[form]) if reads == "1"]
    total = sum((a.double() * w).sum() for a, w in zip(outputs, weights))
    return [*outputs, *torch.autograd.grad(total, read)]


@pytest.mark.parametrize("form, shape, streams", CASES, ids=str)
def test_modulate(form, shape, streams):
    """Outputs, every gradient; each token takes its own frame's row, a row's gradient sums the tokens that took it."""
    leaves, row = inputs(*shape, streams)
    x_dtype, h_dtype, dtype = STREAMS[streams]
    weights = torch.randn(2, *leaves[0].shape, dtype=torch.float64)
    results = [with_gradients(f, form, leaves, row, dtype, weights) for f in (call, definition, plain)]
    names = {"ln_modulate": ["y"], "gate_residual": ["x_out"]}.get(form, ["y", "x_out"])
    names += [n for n, reads in zip(["dx", "dh", "dgate", "dshift", "dscale"], FORMS[form]) if reads == "1"]
    for name, a, b in zip(names, *results[:2]):
        assert a.dtype == b.dtype and a.shape == b.shape, name
    assert results[0][0].dtype == (x_dtype if form == "gate_residual" or dtype is None else dtype)
    rounded = min((x_dtype, h_dtype), key=lambda d: torch.finfo(d).bits)
    close(names, *results, dtypes=[rounded] * len(names))


def test_modulate_strides():
    """Streams, tables and gradients that are not contiguous, a row that is expanded: as if they were."""
    B, F_, tokens, D = 2, 4, 3, 24
    x, h = (torch.randn(B, D, F_ * tokens).transpose(1, 2).requires_grad_() for _ in range(2))
    tables = torch.randn(B, 2, 6, D)
    gate, shift = tables.unbind(2)[:2]  # rows 6 D apart
    scale = torch.randn(B, D, 2).transpose(1, 2)  # last axis not contiguous
    leaves = [x, h, *(a.requires_grad_() for a in (gate, shift, scale))]
    row = torch.tensor([[0, 1, 1, 0]], dtype=torch.int32).expand(B, F_)
    weights = torch.randn(2, D, B, F_ * tokens, dtype=torch.float64).permute(0, 2, 3, 1)
    results = [with_gradients(f, "residual_ln_modulate", leaves, row, None, weights) for f in (call, definition, plain)]
    close(["y", "x_out", "dx", "dh", "dgate", "dshift", "dscale"], *results, dtypes=[F32] * 7)


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
    wide = [a.repeat(1, 4, 1) for a in (shift, scale, gate)]
    f, g = modulate.ln_modulate, modulate.gate_residual
    assert torch.equal(f(x, shift, scale, one), f(x, *wide[:2], frames))
    assert torch.equal(g(x, h, gate, one), g(x, h, wide[2], frames))


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
    (1, 2100, 1, 2, F32, True),  # more partial sums than the fold takes at once
]


@pytest.mark.parametrize("B, L, heads, K, dtype, rotated", ROPE_CASES, ids=str)
def test_norm_rope(B, L, heads, K, dtype, rotated):
    D = heads * K
    x, weight = (torch.randn(B, L, D).to(dtype) + 0.5).requires_grad_(), torch.randn(D).requires_grad_()
    angle = 6 * torch.rand(L, K // 2)
    rope = torch.stack([angle.cos(), angle.sin()], -1).flatten(1) if rotated else None
    w = torch.randn(B, L, D, dtype=torch.float64)

    def results(function):
        leaves = exactly([x, weight]) if function is norm_rope_64 else [x, weight]
        y = function(*leaves, rope)
        return [y, *torch.autograd.grad((y.double() * w).sum(), leaves)]

    found = [results(f) for f in (norm_rope.norm_rope, norm_rope.norm_rope_ref, norm_rope_64)]
    assert found[0][0].dtype == dtype
    close(["y", "dx", "dweight"], *found, dtypes=[dtype] * 3)


def test_norm_rope_frozen_weight():
    """The gradient of x does not change, and x may be a transposed view."""
    x, weight = torch.randn(2, 16, 6).transpose(1, 2).requires_grad_(), torch.randn(16).requires_grad_()
    rope = torch.randn(6, 8)
    one, two = (torch.autograd.grad(norm_rope.norm_rope(x, w, rope).sum(), x)[0] for w in (weight, weight.detach()))
    assert torch.allclose(one, two, rtol=1e-6, atol=1e-6)


# ---- region_dpo ------------------------------------------------------------------------------------------------------


def dpo_inputs(B=3, frames=5, dtype=F32, C=4, H=3, W=2):
    return [a.to(dtype) for a in torch.randn(6, B, C, frames, H, W)]


def dpo_64(v_w, v_l, ref_w, ref_l, target_w, target_l, start, beta, form):
    """Straight from the equation, pair by pair, in float64: loss, S and the other metrics."""
    losses, sums, rows = [], [], []
    for i, first in enumerate(start.tolist()):

        def error(f, target, i=i, first=first):
            return (f[i].double() - target[i].double()).square().mean(dim=(0, 2, 3))[first:]

        errors = [error(*a) for a in ((v_w, target_w), (v_l, target_l), (ref_w, target_w), (ref_l, target_l))]
        S, K = (errors[0] - errors[2] - errors[1] + errors[3]).sum(), v_w.shape[2] - first
        losses.append(-F.logsigmoid(-beta * S) / K if form == "outside" else -F.logsigmoid(-beta * S / K))
        sums.append(S)
        rows.append([*(e.mean() for e in errors), -beta * S / K])
    names = ("err/w_policy", "err/l_policy", "err/w_ref", "err/l_ref", "margin")
    metrics = {name: torch.stack([row[k] for row in rows]) for k, name in enumerate(names)}
    return torch.stack(losses), {**metrics, "S": torch.stack(sums)}


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
    for form, expected in (("outside", math.log1p(math.exp(-8)) / 2), ("inside", math.log1p(math.exp(-4)))):
        loss, more = region_dpo.region_dpo(v_w, v_l, ref_w, ref_l, zero, zero, start, 2.0, form)
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        assert more["S"].item() == -4 and more["margin"].item() == 4
        assert [more[f"err/{k}"].item() for k in ("w_policy", "w_ref", "l_policy", "l_ref")] == [1.5, 1.5, 2.5, 0.5]


DPO_SIZES = [(4, 3, 2), (3, 5, 7), (1, 12, 48), (2, 32, 48)]  # C, H, W: small, odd, aligned, several blocks


DPO_DTYPES = [(F32, F32), (BF16, BF16), (HALF, HALF), (BF16, F32)]  # of the predictions and of the targets
DPO_CASES = [
    (form, size, dtypes)
    for form in ("outside", "inside")
    for size in DPO_SIZES
    for dtypes in DPO_DTYPES
    # the form is one line after the reduction: the smallest size runs both, the others one of them
    if size == DPO_SIZES[0] or (form == "inside") == (dtypes[0] == F32)
]


@pytest.mark.parametrize("form, size, dtypes", DPO_CASES, ids=str)
def test_region_dpo(form, size, dtypes):
    """Loss, metrics and the gradients of all six tensors; every pair with a start of its own, 0 included."""
    C, H, W = size
    prediction, start = dpo_inputs(C=C, H=H, W=W), torch.tensor([0, 2, 4])
    tensors = [a.to(dtypes[i > 3]).requires_grad_() for i, a in enumerate(prediction)]
    weights = torch.rand(3, dtype=torch.float64) + 0.5

    def results(function):
        leaves = exactly(tensors) if function is dpo_64 else tensors
        loss, more = function(*leaves, start, 0.7, form)
        assert not any(a.requires_grad for a in more.values()) or function is dpo_64
        names = sorted(more)
        gradients = torch.autograd.grad((loss.double() * weights).sum(), leaves)
        return ["loss", *names], [loss, *(more[n] for n in names), *gradients]

    (names, ours), (_, eager), (_, truth) = (
        results(f) for f in (region_dpo.region_dpo, region_dpo.region_dpo_ref, dpo_64)
    )
    assert ours[0].dtype == F32
    assert all(a.dtype == b.dtype for a, b in zip(ours[7:], tensors, strict=True))
    close([*names, *(f"d{n}" for n in region_dpo.INPUTS)], ours, eager, truth, [F32] * 7 + [a.dtype for a in tensors])


def test_region_dpo_some_gradients():
    """Only what asks for a gradient gets one, and it is the one it gets among all."""
    tensors, start = dpo_inputs(), torch.tensor([0, 2, 4])
    every = [a.clone().requires_grad_() for a in tensors]
    all_gradients = torch.autograd.grad(region_dpo.region_dpo(*every, start, 0.7)[0].sum(), every)
    for wanted in ((0, 1), (2,), (5,), (1, 4)):
        some = [a.clone().requires_grad_(i in wanted) for i, a in enumerate(tensors)]
        found = torch.autograd.grad(region_dpo.region_dpo(*some, start, 0.7)[0].sum(), [some[i] for i in wanted])
        assert all(torch.equal(a, all_gradients[i]) for i, a in zip(wanted, found))


def test_region_dpo_reference_free():
    """ref := target leaves the reference out: S is the difference of the policy's errors."""
    v_w, v_l, _, _, target_w, target_l = dpo_inputs()
    start = torch.tensor([0, 2, 4])
    _, more = region_dpo.region_dpo(v_w, v_l, target_w, target_l, target_w, target_l, start, 1.0)
    error = (v_w - target_w).double().square().mean(dim=(1, 3, 4))
    error -= (v_l - target_l).double().square().mean(dim=(1, 3, 4))
    S = torch.stack([error[i, n:].sum() for i, n in enumerate((0, 2, 4))])
    assert torch.allclose(more["S"].double(), S, atol=1e-5)
    assert (more["err/w_ref"] == 0).all() and (more["err/l_ref"] == 0).all()


@pytest.mark.parametrize("value", [NAN, float("inf"), 1e30])
@pytest.mark.parametrize("form", ["outside", "inside"])
def test_region_dpo_selects(form, value):
    """Whatever stands before start reaches neither loss nor metrics nor gradients; its gradient is exactly 0."""
    clean, start = dpo_inputs(), torch.tensor([1, 2, 4])
    before = (torch.arange(5) < start[:, None])[:, None, :, None, None]
    moved = [torch.where(before, value, a).requires_grad_() for a in clean]
    loss, more = region_dpo.region_dpo(*clean, start, 0.7, form)
    loss_moved, more_moved = region_dpo.region_dpo(*moved, start, 0.7, form)
    assert torch.equal(loss, loss_moved)
    assert all(torch.equal(more[name], more_moved[name]) for name in more)
    for gradient in torch.autograd.grad(loss_moved.sum(), moved):
        assert gradient.isfinite().all() and (gradient.masked_select(before) == 0).all()
        assert (gradient.masked_select(~before) != 0).all()


@pytest.mark.parametrize("form, expected", [("outside", math.log(2) / 3), ("inside", math.log(2))])
def test_region_dpo_at_step_0(form, expected):
    """Policy == reference: S is exactly 0 and the loss ln 2 / K or ln 2, yet the gradient is not 0."""
    _, _, ref_w, ref_l, target_w, target_l = dpo_inputs()
    v_w, v_l = ref_w.clone().requires_grad_(), ref_l.clone().requires_grad_()
    start = torch.tensor([2, 2, 2])
    loss, more = region_dpo.region_dpo(v_w, v_l, ref_w, ref_l, target_w, target_l, start, 800.0, form)
    assert (more["S"] == 0).all() and (more["margin"] == 0).all()
    assert loss.tolist() == pytest.approx([expected] * 3, rel=1e-6)
    assert all((g[:, :, 2:] != 0).any() for g in torch.autograd.grad(loss.sum(), (v_w, v_l)))


def test_the_two_forms_have_one_gradient_at_step_0():
    """At S = 0 "outside" and "inside" differ by the loss's value only."""
    _, _, ref_w, ref_l, target_w, target_l = dpo_inputs()
    gradients = []
    for form in ("outside", "inside"):
        v_w, start = ref_w.clone().requires_grad_(), torch.tensor([0, 2, 3])
        loss, _ = region_dpo.region_dpo(v_w, ref_l, ref_w, ref_l, target_w, target_l, start, 25.0, form)
        gradients += torch.autograd.grad(loss.sum(), v_w)
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-9)


def test_region_dpo_signs():
    """Swapping winner and loser negates S; a policy nearer to the winner than the reference is has a smaller loss."""
    v_w, v_l, ref_w, ref_l, target_w, target_l = dpo_inputs()
    start = torch.tensor([1, 2, 3])
    _, one = region_dpo.region_dpo(v_w, v_l, ref_w, ref_l, target_w, target_l, start, 1.0)
    _, two = region_dpo.region_dpo(v_l, v_w, ref_l, ref_w, target_l, target_w, start, 1.0)
    assert torch.equal(one["S"], -two["S"]) and (one["S"] != 0).all()
    better = ref_w + 0.1 * (target_w - ref_w)
    loss, more = region_dpo.region_dpo(better, ref_l, ref_w, ref_l, target_w, target_l, start, 1.0, "inside")
    assert (more["margin"] > 0).all() and (loss < math.log(2)).all()


@pytest.mark.parametrize("scale", [1e-5, 1e-3])
def test_difference_is_accurate_near_the_reference(scale):
    """Products of differences are far closer to float64 than a difference of errors: it matters early in training."""
    target_w, target_l, ref_w, ref_l = torch.randn(4, 2, 16, 5, 16, 16)
    v_w, v_l = (a + scale * torch.randn_like(a) for a in (ref_w, ref_l))
    tensors, start = (v_w, v_l, ref_w, ref_l, target_w, target_l), torch.tensor([0, 1])
    exact, more = dpo_64(*tensors, start, 2000.0, "outside")
    loss, found = region_dpo.region_dpo(*tensors, start, 2000.0)
    K = 5 - start
    subtracted = K * (found["err/w_policy"] - found["err/w_ref"] - found["err/l_policy"] + found["err/l_ref"])
    off, off_subtracted = ((a.double() - more["S"]).abs().mean() for a in (found["S"], subtracted))
    assert off * 10 < off_subtracted
    assert (loss.double() - exact).abs().max() < 1e-6


@pytest.mark.parametrize("z", [-80.0, -12.0, -1.0, 0.0, 1.0, 12.0, 80.0])
def test_region_dpo_saturated(z):
    """The loss and its slope stay right, and finite, where β·S is large: no overflow, no cancellation."""
    shape = (1, 1, 2, 4, 4)
    zero, start = torch.zeros(shape), torch.tensor([1])
    tensors = [torch.full(shape, 1.0).requires_grad_(), zero, zero, zero, zero, zero]  # S = 1
    if z < 0:
        tensors = [tensors[1], tensors[0], *tensors[2:]]
    if z == 0:
        tensors[0] = torch.zeros(shape, requires_grad=True)
    beta, moved = abs(z) or 1.0, tensors[1] if z < 0 else tensors[0]
    loss, _ = region_dpo.region_dpo(*tensors, start, beta)
    exact = max(z, 0) + math.log1p(math.exp(-abs(z)))
    (gradient,) = torch.autograd.grad(loss.sum(), moved)
    slope = beta / (1 + math.exp(-z)) * 2 / 16 * (-1 if z < 0 else 1) * (z != 0)
    assert loss.item() == pytest.approx(exact, rel=2e-6)
    assert gradient[0, 0, 1, 0, 0].item() == pytest.approx(slope, rel=2e-6)

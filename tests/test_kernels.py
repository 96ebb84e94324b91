"""kernels/: one set of cases against float64 (kernel_cases.py), whoever executes the kernels.

    definition   PyTorch, on the CPU
    interpreter  Triton's own, in a process of its own that test_interpreter.py starts
    emulator     what Triton compiled for sm_80: its PTX, instruction by instruction (emulator/ptx.py)
    cuda         a GPU; skipped, and counted, where there is none

What a kernel leaves unwritten is NaN: new tensors are filled with it.
"""

import contextlib
import math
from unittest import mock

import pytest
import torch
from emulator import aot, interpreter, ptx
from kernel_cases import CASES, INTERPRETED, START, against_float64, dpo_inputs, frame_errors_64, inputs

from kernels import modulate, norm_rope, region_dpo

if INTERPRETED:
    interpreter.repair()
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
    # With torch.utils.deterministic.fill_uninitialized_memory: empty is NaN. It only warns, as PyTorch may have no
    # deterministic form of what the definitions do on CUDA.
    torch.use_deterministic_algorithms(True, warn_only=True)
    with launched_by(request.param), device:
        yield
    torch.use_deterministic_algorithms(False)


def test_new_tensors_are_nan():
    """Guards the guard: an output that a kernel does not write would be seen."""
    assert all(a.isnan().all() for a in (torch.empty(3), torch.ones(1).new_empty(2), torch.empty_like(torch.ones(2))))


@pytest.mark.parametrize("case", CASES)
def test_against_float64(case):
    """Outputs and every gradient. Each token takes its frame's row; a row's gradient sums the tokens that took it."""
    found = CASES[case]()
    assert max(found.values()) <= 1, found


# ---- modulate --------------------------------------------------------------------------------------------------------


def test_modulate_strides():
    """Streams, tables and gradients that are not contiguous, a row that is expanded: as if they were."""
    B, F_, tokens, D = 2, 4, 3, 24
    x, h = (torch.randn(B, D, F_ * tokens).transpose(1, 2) for _ in range(2))
    gate, shift = torch.randn(B, 2, 6, D).unbind(2)[:2]  # rows 6 D apart
    scale = torch.randn(B, D, 2).transpose(1, 2)  # last axis not contiguous
    leaves = [a.requires_grad_() for a in (x, h, gate, shift, scale)]
    row = torch.tensor([[0, 1, 1, 0]], dtype=torch.int32).expand(B, F_)
    weights = torch.randn(2, D, B, F_ * tokens, dtype=torch.float64).permute(0, 2, 3, 1)
    assert max(against_float64("residual_ln_modulate", leaves, row, "float32", weights).values()) <= 1


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
    """A table of equal rows is the one-row table, bit for bit: guards M = 0 being the text-to-video model.

    Without row, too: then frames, and tokens, take theirs in turn.
    """
    (x, h, gate, shift, scale), row = inputs(2, 4, 3, 16, "one")
    expected = modulate.residual_ln_modulate(x, h, gate, shift, scale, row)
    frames = torch.arange(4, dtype=torch.int32).expand(2, 4)
    for rows, row in ((4, frames), (4, frames > 1), (1, None), (4, None), (12, None)):
        found = modulate.residual_ln_modulate(x, h, *(a.repeat(1, rows, 1) for a in (gate, shift, scale)), row)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), (rows, row)


def test_modulate_writes_into_no_input():
    leaves, row = inputs(2, 3, 4, 8, "mask")
    before = [a.detach().clone() for a in (*leaves, row)]
    y, x_out = modulate.residual_ln_modulate(*leaves, row)
    weight = torch.ones_like(y)
    torch.autograd.grad([y, x_out], leaves, [weight, weight])
    assert all(torch.equal(a, b) for a, b in zip((*leaves, row), before, strict=True)) and (weight == 1).all()


# ---- norm_rope -------------------------------------------------------------------------------------------------------


def test_norm_rope_frozen_weight():
    """The gradient of x does not change, and x may be a transposed view."""
    x, weight = torch.randn(2, 16, 6).transpose(1, 2).requires_grad_(), torch.randn(16).requires_grad_()
    rope = torch.randn(6, 8)
    one, two = (torch.autograd.grad(norm_rope.norm_rope(x, w, rope).sum(), x)[0] for w in (weight, weight.detach()))
    assert torch.allclose(one, two, rtol=1e-6, atol=1e-6)


# ---- region_dpo ------------------------------------------------------------------------------------------------------


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

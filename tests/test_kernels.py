"""kernels/: the definitions against plain float64 computations, their gradients, and each file alone in a folder."""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, script

from kernels.modulate import gate_residual, ln_modulate, residual_ln_modulate
from kernels.region_dpo import frame_errors, region_dpo

NAN = float("nan")

# ---- modulate --------------------------------------------------------------------------------------------------------


def expand(table, row, L):
    """(B, R, D) -> (B, L, D): the table for each token, written with loops. The kernels must never do this."""
    B, F_ = row.shape
    return torch.stack([torch.stack([table[b, row[b, k // (L // F_)]] for k in range(L)]) for b in range(B)])


def ln_modulate_64(x, shift, scale, row, eps=1e-6):
    x, L = x.double(), x.shape[1]
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    return normed * (1 + expand(scale.double(), row, L)) + expand(shift.double(), row, L)


def gate_residual_64(x, h, gate, row):
    return x.double() + (1 if gate is None else expand(gate.double(), row, x.shape[1])) * h.double()


CASES = [  # B, F, tokens a frame, D, rows of the table
    (2, 3, 4, 8, "one"),
    (2, 5, 3, 7, "mask"),  # odd D, odd L
    (3, 4, 1, 33, "mask"),
    (2, 7, 5, 13, "frames"),
    (1, 1, 3, 5, "frames"),
]


def inputs(B, F_, tokens, D, rows, dtype=torch.float32):
    R = {"one": 1, "mask": 2, "frames": F_}[rows]
    row = (
        torch.arange(F_, dtype=torch.int32).expand(B, F_)
        if rows == "frames"
        else torch.randint(0, R, (B, F_), dtype=torch.int32)
    )
    x, h = (torch.randn(B, F_ * tokens, D).to(dtype) for _ in range(2))
    return x + 1, h, *(torch.randn(3, B, R, D)), row


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_modulate_against_float64(case, dtype, tolerance):
    """Every token must take its own frame's row; the result has the stream's dtype and is rounded once."""
    x, h, shift, scale, gate, row = inputs(*case, dtype)
    y = ln_modulate(x, shift, scale, row)
    assert y.dtype == dtype and torch.allclose(
        y.double(), ln_modulate_64(x, shift, scale, row), rtol=tolerance, atol=tolerance
    )
    out = gate_residual(x, h, gate, row)
    assert out.dtype == dtype and torch.allclose(
        out.double(), gate_residual_64(x, h, gate, row), rtol=tolerance, atol=tolerance
    )
    for g in (gate, None):
        y, out = residual_ln_modulate(x, h, g, shift, scale, row)
        assert out.dtype == y.dtype == dtype
        assert torch.allclose(out.double(), gate_residual_64(x, h, g, row), rtol=tolerance, atol=tolerance)
        assert torch.allclose(y.double(), ln_modulate_64(out, shift, scale, row), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_modulate_gradients(case):
    """Of every input, against float64 autograd of the plain computation; a row sums over the tokens that took it."""
    x, h, shift, scale, gate, row = inputs(*case)
    weights = torch.randn(2, *x.shape)

    def gradients(function, dtype):
        leaves = [a.to(dtype).requires_grad_() for a in (x, h, gate, shift, scale)]
        y, out = function(*leaves)
        return torch.autograd.grad((y * weights[0]).sum() + (out * weights[1]).sum(), leaves)

    def plain(x, h, gate, shift, scale):
        out = gate_residual_64(x, h, gate, row)
        return ln_modulate_64(out, shift, scale, row), out

    got = gradients(lambda *leaves: residual_ln_modulate(*leaves, row), torch.float32)
    for name, a, b in zip(("x", "h", "gate", "shift", "scale"), got, gradients(plain, torch.float64), strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-4, atol=1e-4), name


def test_modulate_rows_are_equal_to_one_row():
    """A table of equal rows is the one-row table, bit for bit: guards M = 0 being the text-to-video model."""
    x, h, shift, scale, gate, _ = inputs(2, 4, 3, 16, "one")
    one, frames = torch.zeros(2, 4, dtype=torch.int32), torch.arange(4, dtype=torch.int32).expand(2, 4)
    wide = [a.repeat(1, 4, 1) for a in (shift, scale, gate)]
    assert torch.equal(ln_modulate(x, shift, scale, one), ln_modulate(x, *wide[:2], frames))
    assert torch.equal(gate_residual(x, h, gate, one), gate_residual(x, h, wide[2], frames))


def test_modulate_writes_into_no_input():
    x, h, shift, scale, gate, row = given = inputs(2, 3, 4, 8, "mask")
    before = [a.clone() for a in given]
    residual_ln_modulate(x, h, gate, shift, scale, row)
    gate_residual(x, h, gate, row)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_modulate_errors():
    """Each misfit is a ValueError that names the argument."""
    x, h, shift, scale, gate, row = inputs(2, 3, 4, 8, "mask")
    with pytest.raises(ValueError, match="^x: expected a floating point"):
        ln_modulate(x[0], shift, scale, row)
    with pytest.raises(ValueError, match="^x: expected a floating point"):
        ln_modulate(x.int(), shift, scale, row)
    with pytest.raises(ValueError, match="^row: expected a number of frames"):
        ln_modulate(x[:, :11], shift, scale, row)
    with pytest.raises(ValueError, match="^row: expected an integer"):
        ln_modulate(x, shift, scale, row.float())
    with pytest.raises(ValueError, match="^row: expected an integer"):
        ln_modulate(x, shift, scale, row[:1])
    with pytest.raises(ValueError, match="^shift: expected"):
        ln_modulate(x, shift[..., :7], scale, row)
    with pytest.raises(ValueError, match="one R for all tables"):
        ln_modulate(x, shift[:, :1], scale, row)
    with pytest.raises(ValueError, match="^h: expected"):
        gate_residual(x, h[:, 1:], gate, row)
    with pytest.raises(ValueError, match="^h: expected"):
        gate_residual(x, h.int(), gate, row)
    with pytest.raises(ValueError, match="^gate: expected"):
        residual_ln_modulate(x, h, gate[:1], shift, scale, row)


# ---- region_dpo ------------------------------------------------------------------------------------------------------


def dpo_inputs(B=3, frames=5, dtype=torch.float32):
    return [a.to(dtype) for a in torch.randn(6, B, 4, frames, 3, 2)]


def dpo_64(v_w, v_l, ref_w, ref_l, target_w, target_l, start, beta, form):
    """Straight from the equation, pair by pair, in float64: (losses, S)."""
    losses, sums = [], []
    for i, first in enumerate(start.tolist()):

        def error(f, target, i=i, first=first):
            return (f[i].double() - target[i].double()).square().mean(dim=(0, 2, 3))[first:]

        d_w = error(v_w, target_w) - error(ref_w, target_w)
        d_l = error(v_l, target_l) - error(ref_l, target_l)
        S, K = (d_w - d_l).sum(), v_w.shape[2] - first
        losses.append(-F.logsigmoid(-beta * S) / K if form == "outside" else -F.logsigmoid(-beta * S / K))
        sums.append(S)
    return torch.stack(losses), torch.stack(sums)


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
        loss, more = region_dpo(v_w, v_l, ref_w, ref_l, zero, zero, start, 2.0, form)
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        assert more["S"].item() == -4 and more["margin"].item() == 4
        assert [more[f"err/{k}"].item() for k in ("w_policy", "w_ref", "l_policy", "l_ref")] == [1.5, 1.5, 2.5, 0.5]


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-4)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("form", ["outside", "inside"])
def test_region_dpo_against_float64(form, dtype, tolerance):
    """Loss, S and gradients against the equation in float64, every pair with a start of its own, 0 included."""
    prediction, start = dpo_inputs(dtype=dtype), torch.tensor([0, 2, 4])
    loss, more = region_dpo(*prediction, start, 0.7, form)
    expected, S = dpo_64(*prediction, start, 0.7, form)
    assert loss.dtype == torch.float32 and not more["S"].requires_grad
    assert torch.allclose(loss.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.allclose(more["S"].double(), S, rtol=tolerance, atol=tolerance)

    def gradients(function, dtype):
        leaves = [a.to(dtype).requires_grad_() for a in prediction[:2]]
        return torch.autograd.grad(function(*leaves, *prediction[2:], start, 0.7, form)[0].sum(), leaves)

    pairs = zip(gradients(region_dpo, torch.float32), gradients(dpo_64, torch.float64), strict=True)
    assert all(torch.allclose(a.double(), b, rtol=1e-4, atol=1e-6) for a, b in pairs) or dtype == torch.bfloat16


def test_region_dpo_reference_free():
    """ref := target leaves the reference out: S is the difference of the policy's errors."""
    v_w, v_l, _, _, target_w, target_l = dpo_inputs()
    start = torch.tensor([0, 2, 4])
    _, more = region_dpo(v_w, v_l, target_w, target_l, target_w, target_l, start, 1.0)
    error = (v_w - target_w).double().square().mean(dim=(1, 3, 4)) - (v_l - target_l).double().square().mean(
        dim=(1, 3, 4)
    )
    assert torch.allclose(
        more["S"].double(), torch.stack([error[i, n:].sum() for i, n in enumerate((0, 2, 4))]), atol=1e-5
    )
    assert (more["err/w_ref"] == 0).all() and (more["err/l_ref"] == 0).all()


@pytest.mark.parametrize("value", [NAN, float("inf"), 1e30])
@pytest.mark.parametrize("form", ["outside", "inside"])
def test_region_dpo_selects(form, value):
    """Whatever stands before start reaches neither loss nor metrics nor gradients; its gradient is exactly 0."""
    clean, start = dpo_inputs(), torch.tensor([1, 2, 4])
    before = (torch.arange(5) < start[:, None])[:, None, :, None, None]
    moved = [torch.where(before, value, a).requires_grad_() for a in clean]
    loss, more = region_dpo(*clean, start, 0.7, form)
    loss_moved, more_moved = region_dpo(*moved, start, 0.7, form)
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
    loss, more = region_dpo(v_w, v_l, ref_w, ref_l, target_w, target_l, torch.tensor([2, 2, 2]), 800.0, form)
    assert (more["S"] == 0).all() and (more["margin"] == 0).all()
    assert loss.tolist() == pytest.approx([expected] * 3, rel=1e-6)
    assert all((g[:, :, 2:] != 0).any() for g in torch.autograd.grad(loss.sum(), (v_w, v_l)))


def test_the_two_forms_have_one_gradient_at_step_0():
    """At S = 0 "outside" and "inside" differ by the loss's value only."""
    _, _, ref_w, ref_l, target_w, target_l = dpo_inputs()
    gradients = []
    for form in ("outside", "inside"):
        v_w = ref_w.clone().requires_grad_()
        loss, _ = region_dpo(v_w, ref_l, ref_w, ref_l, target_w, target_l, torch.tensor([0, 2, 3]), 25.0, form)
        gradients += torch.autograd.grad(loss.sum(), v_w)
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-9)


def test_region_dpo_signs():
    """Swapping winner and loser negates S; a policy nearer to the winner than the reference is has a smaller loss."""
    v_w, v_l, ref_w, ref_l, target_w, target_l = dpo_inputs()
    start = torch.tensor([1, 2, 3])
    _, one = region_dpo(v_w, v_l, ref_w, ref_l, target_w, target_l, start, 1.0)
    _, two = region_dpo(v_l, v_w, ref_l, ref_w, target_l, target_w, start, 1.0)
    assert torch.equal(one["S"], -two["S"]) and (one["S"] != 0).all()
    better = ref_w + 0.1 * (target_w - ref_w)
    loss, more = region_dpo(better, ref_l, ref_w, ref_l, target_w, target_l, start, 1.0, "inside")
    assert (more["margin"] > 0).all() and (loss < math.log(2)).all()


def test_difference_is_accurate_near_the_reference():
    """The product form is far closer to float64 than subtracting two float32 errors: it matters early in training."""
    target, ref = torch.randn(2, 4, 16, 5, 16, 16)
    v, start = ref + 1e-5 * torch.randn_like(ref), torch.zeros(4, dtype=torch.long)
    truth = (v.double() - target.double()).square().mean((1, 3, 4)) - (ref.double() - target.double()).square().mean(
        (1, 3, 4)
    )
    policy_error, ref_error, difference = frame_errors(v, ref, target, start)
    ours = (difference.double() - truth).abs().mean()
    subtracted = ((policy_error - ref_error).double() - truth).abs().mean()
    assert ours * 10 < subtracted


def test_region_dpo_errors():
    """An empty region has no loss; misfits are ValueErrors that name the argument."""
    a, start = dpo_inputs(), torch.tensor([0, 1, 2])
    for wrong in (torch.tensor([0, 1, 5]), torch.tensor([-1, 1, 2])):
        with pytest.raises(ValueError, match="^start: expected 0 … 4"):
            region_dpo(*a, wrong, 1.0)
    for wrong in (start.float(), start[:2], start[:, None]):
        with pytest.raises(ValueError, match="^start: expected integers"):
            region_dpo(*a, wrong, 1.0)
    with pytest.raises(ValueError, match="^ref_w: expected floating point"):
        region_dpo(a[0], a[1], a[2][:, :, 1:], *a[3:], start, 1.0)
    with pytest.raises(ValueError, match="^target_l: expected floating point"):
        region_dpo(*a[:5], a[5].int(), start, 1.0)
    for beta, form in ((0.0, "inside"), (-1.0, "outside"), (1.0, "between")):
        with pytest.raises(ValueError, match="beta > 0 and form"):
            region_dpo(*a, start, beta, form)


# ---- each file alone -------------------------------------------------------------------------------------------------

ALONE = {
    "modulate": "x = torch.randn(1, 4, 8); t = torch.zeros(1, 1, 8); row = torch.zeros(1, 2, dtype=torch.int32)\n"
    "print(m.ln_modulate(x, t, t, row).shape, m.gate_residual(x, x, t, row).equal(x))",
    "region_dpo": "a = torch.randn(6, 2, 3, 4, 2, 2)\nprint(m.region_dpo(*a, torch.tensor([0, 3]), 1.0)[0].shape)",
}


def test_every_kernel_has_a_line_below():
    assert {p.stem for p in (ROOT / "kernels").glob("*.py")} - {"__init__"} == set(ALONE)


@pytest.mark.parametrize("name", ALONE)
def test_kernel_file_works_copied_alone(name, tmp_path):
    """Readers copy a kernel: its one file must work in an empty folder, with torch and nothing of the project."""
    shutil.copy(ROOT / "kernels" / f"{name}.py", tmp_path)
    code = f"import sys, torch, {name} as m\nassert {str(ROOT)!r} not in sys.path\n{ALONE[name]}"
    done = script("-c", code, cwd=tmp_path)
    assert done.returncode == 0 and "torch.Size" in done.stdout, done.stderr

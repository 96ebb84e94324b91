"""The cases of kernels/, against float64, for pytest (test_kernels.py) and for programs: nothing here needs pytest.

    for name, case in CASES.items():
        found = case()  # result -> its error over what is allowed, at most 1

Allowed is twice what the definition is off in the same dtype. Tensors are made on PyTorch's default device, so
`with torch.device("cuda")` around a case runs it there.
"""

import math
import os
import re
from functools import partial
from pathlib import Path

import torch

from kernels import modulate, norm_rope, region_dpo

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HALF, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
TOLERANCE = {F32: 1e-5, HALF: 2**-8, BF16: 2**-5}  # of the definition, relative to the largest value


def exactly(tensors):
    """The same leaves in float64."""
    return [a.detach().double().requires_grad_(a.requires_grad) for a in tensors]


def ratios(names, got, eager, truth, dtypes) -> dict[str, float]:
    """Each result's error over twice the definition's; the definition's must be within its own tolerance."""
    found = {}
    for name, a, b, exact, dtype in zip(names, got, eager, truth, dtypes, strict=True):
        size = exact.abs().max().item() + 1e-30
        error, allowed = ((c.double() - exact).abs().max().item() for c in (a, b))
        assert allowed <= TOLERANCE[dtype] * max(size, 1), f"{name}: definition off by {allowed:.2e} of {size:.2e}"
        found[name] = math.inf if math.isnan(error) else error / (2 * allowed + 2**-22 * size)
    return found


def calls_to_copy() -> dict:
    """Runs what kernels/README.md opens with, as it is printed. Returns the names that it leaves."""
    page = (Path(__file__).resolve().parent.parent / "kernels/README.md").read_text(encoding="utf-8")
    scope = {}
    exec("\n".join(re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)), scope)
    return scope


# ---- modulate --------------------------------------------------------------------------------------------------------


def expand(table, row, L):
    """(B, R, D) -> (B, L, D): the table for each token, written with loops. The kernels must never do this."""
    B, R, _ = table.shape
    row = torch.arange(R).expand(B, R) if row is None else row.int()
    F_ = row.shape[1]
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


def inputs(B, F_, tokens, D, rows, streams="float32"):
    """x, h, gate, shift, scale as leaves, row. rows: see MODULATE."""
    R = {"one": 1, "mask": 2, "bool": 2}.get(rows, F_)
    row = torch.randint(0, R, (B, F_), dtype=torch.int32)
    if rows == "frames":
        row = torch.arange(F_, dtype=torch.int32).expand(B, F_)
    row = {"bool": row.bool(), "none": None}.get(rows, row)
    x, h = (torch.randn(B, F_ * tokens, D).to(dtype) for dtype in STREAMS[streams][:2])
    return [a.requires_grad_() for a in (x + 1, h, *(torch.randn(3, B, R, D).unbind(0)))], row


def against_float64(form, leaves, row, streams, weights) -> dict[str, float]:
    """Ratios of the outputs and of every gradient."""
    x_dtype, h_dtype, y_dtype = STREAMS[streams]
    call, found = modulate.FORMS[form][0], []
    for functions in (modulate.KERNEL, modulate.DEFINITION, PLAIN):
        given = exactly(leaves) if functions is PLAIN else leaves
        outputs = call(functions, *given, row, 1e-6, y_dtype)
        total = sum((a.double() * w).sum() for a, w in zip(outputs, weights))
        gradients = dict(zip(INPUTS, torch.autograd.grad(total, given, allow_unused=True)))
        outputs = dict(zip(OUTPUTS.get(form, ["y", "x_out"]), outputs))
        found.append(outputs | {f"d{name}": a for name, a in gradients.items() if a is not None})
    assert found[0].keys() == found[1].keys() == found[2].keys()
    dtypes = {"x_out": x_dtype, "dx": x_dtype, "dh": h_dtype, "y": y_dtype or x_dtype}
    assert all(a.dtype == dtypes.get(name, F32) for name, a in found[0].items()), found[0]
    rounded = min((x_dtype, h_dtype), key=lambda d: torch.finfo(d).bits)
    return ratios(found[0], *(a.values() for a in found), dtypes=[rounded] * len(found[0]))


def modulate_case(form, shape, streams) -> dict[str, float]:
    leaves, row = inputs(*shape, streams)
    weights = torch.randn(2, *leaves[0].shape, dtype=torch.float64)
    return against_float64(form, leaves, row, streams, weights)


# B, F, tokens a frame, D, and how frames find their rows: "one" for all; an index of two, int32 ("mask") or bool; a row
# a frame, with an index ("frames") or without ("none"). Streams. Few widths: each is compiled anew
MODULATE = [
    ((2, 3, 4, 8, "one"), "float32"),
    ((2, 5, 3, 7, "mask"), "float32"),  # odd D, odd L
    ((2, 5, 3, 7, "mask"), "mixed"),
    ((1, 2, 40, 7, "mask"), "float32"),  # several programs a frame
    ((2, 2, 40, 7, "none"), "float32"),
    *(((1, 2, 3, 272, "mask"), streams) for streams in ("float32", "bfloat16", "mixed")),  # two warps
]
MODULATE = [(form, *case) for form in modulate.FORMS for case in MODULATE]
MODULATE += [
    ("residual_ln_modulate", (1, 2, 3, 272, "mask"), "float16"),
    ("residual_ln_modulate", (3, 4, 1, 33, "mask"), "bfloat16"),
    ("residual_ln_modulate", (2, 5, 3, 7, "bool"), "float32"),
    ("residual_ln_modulate", (2, 7, 5, 13, "frames"), "float32"),
    ("residual_ln_modulate", (2, 7, 5, 13, "none"), "float32"),
    ("residual_ln_modulate", (2, 9, 1, 13, "none"), "mixed"),  # a row a token
    ("residual_ln_modulate", (2, 1, 9, 13, "none"), "mixed"),  # a row for the clip
    ("residual_ln_modulate", (1, 70, 1, 16, "mask"), "float32"),  # more partial sums than the fold takes at once
]
if not INTERPRETED:  # there each of the many programs of a wide fold costs as much as any
    MODULATE += [(form, (1, 2, 3, 1536, "mask"), "mixed") for form in modulate.FORMS]
    MODULATE += [("residual_ln_modulate", (1, 1, 2, 8192, "one"), "mixed")]  # the widest


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


def norm_rope_case(B, L, heads, K, dtype, rotated) -> dict[str, float]:
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
    return ratios(["y", "dx", "dweight"], *found, dtypes=[dtype] * 3)


NORM_ROPE = [  # B, L, heads, K, dtype, rotated
    (2, 9, 3, 12, F32, True),  # K no power of two, L no multiple of the tokens a program takes
    (2, 9, 3, 12, F32, False),
    (1, 70, 1, 10, F32, True),
    (1, 3, 12, 128, F32, True),
    (1, 3, 12, 128, BF16, True),
    (2, 5, 12, 128, BF16, False),
    (1, 3, 12, 128, HALF, True),
]
if not INTERPRETED:  # there it takes seconds
    NORM_ROPE += [(1, 2100, 1, 10, F32, True)]  # more partial sums than the fold takes at once


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


def frame_errors_case(size, dtypes) -> dict[str, float]:
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
    return ratios(names, *found, dtypes)


DPO_SIZES = [(4, 3, 2), (3, 5, 7), (1, 12, 48), (2, 32, 48)]  # C, H, W: small, odd, aligned, several blocks
DPO_DTYPES = [(F32, F32), (BF16, BF16), (HALF, HALF), (BF16, F32)]  # of the predictions and of the target
FRAME_ERRORS = [((3, 5, 7), dtypes) for dtypes in DPO_DTYPES]
FRAME_ERRORS += [(size, (BF16, F32)) for size in DPO_SIZES if size[0] != 3]

CASES = {
    " ".join([case.__name__.removesuffix("_case"), *map(str, given)]): partial(case, *given)
    for case, every in ((modulate_case, MODULATE), (norm_rope_case, NORM_ROPE), (frame_errors_case, FRAME_ERRORS))
    for given in every
}

# SPDX-License-Identifier: Apache-2.0
"""The errors of policy and reference in each latent frame, in one pass; and Asymmetrical DPO's loss on them.

    frame_errors   e_i(f; x) = mean over C, H, W of (target_i − f_i)²                     i: latent frame
                   d_i       = e_i(policy; x) − e_i(ref; x) = mean of (v − r)·((v − target) + (r − target))
    region_dpo     S         = Σ_{i ≥ start} (d_i^w − d_i^l),   K = F − start             w: winner, l: loser
                   outside:  loss = softplus(β·S) / K           inside:  loss = softplus(β·S / K)

Frames before `start` are left out by selection, never by a product with zero, and the kernels never read them: whatever
stands there, NaN included, reaches neither the loss nor a gradient, and the gradient there is exactly 0. d is summed as
the product of differences, not as the difference of two errors: it is exactly 0 where policy equals reference, and far
closer to float64 near it.

    from region_dpo import region_dpo          # copy this file; it needs torch, and on CUDA triton
    w, l = ((1 - t) * x0 + t * noise for x0 in (winner, loser))        # t (B, 1, 1, 1, 1), the rest (B, C, F, H, W)
    loss, parts = region_dpo(policy(w), policy(l), ref(w), ref(l), noise - winner, noise - loser, start, beta=800.0)
    loss.mean().backward()

Used in asymdpo.py, and by the baselines in experiments/. Why fused: PyTorch makes some sixty operations of it and moves
17 times the bytes (kernels/README.md counts them). One program sums one frame of one channel, which lies in one piece
of memory; there are no atomics, so every run gives the same bits.

`python region_dpo.py` checks and times the file. `frame_errors_ref` is the definition, in PyTorch: it runs on the CPU,
and on CUDA with KERNELS=torch in the environment.
"""

from __future__ import annotations

import os
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform: the definition remains
    triton = tl = None
jit = triton.jit if triton else lambda function: function

KERNELS = os.environ.get("KERNELS", "")  # "torch": the definition on every device
# Options of every launch, not tuned: the loss takes a ten thousandth of a step. BLOCK: values a program takes at a
# time; STAGES: of how many such blocks the loads are in flight.
OPTIONS = {"BLOCK": 1024, "STAGES": 1, "num_warps": 4}


# ---- the definition --------------------------------------------------------------------------------------------------


def _wide(a: Tensor) -> Tensor:
    """float32, or float64 if a is float64: nothing is computed in less."""
    return a if a.dtype == torch.float64 else a.float()


def frame_errors_ref(v: Tensor, ref: Tensor, target: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    keep = torch.arange(v.shape[2], device=v.device) >= start[:, None]
    v, ref, target = (torch.where(keep[:, None, :, None, None], _wide(a), 0) for a in (v, ref, target))
    policy_error, ref_error = v - target, ref - target
    d = ((v - ref) * (policy_error + ref_error)).mean(dim=(1, 3, 4))
    return d, *(a.detach().square().mean(dim=(1, 3, 4)) for a in (policy_error, ref_error))


# ---- the kernels -----------------------------------------------------------------------------------------------------


@jit
def _errors_kernel(v, ref, target, start, partial, C, FRAMES, HW, SLOT, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """One program: one frame f of one channel c of one sample b.

    Writes its share of d, of the policy's error and of the reference's: partial (3, B, FRAMES, C), SLOT apart.
    """
    f = tl.program_id(0) % FRAMES
    plane = tl.program_id(0) // FRAMES  # b * C + c
    at = tl.program_id(0).to(tl.int64) * HW
    d, policy, reference = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    end = tl.where(f >= tl.load(start + plane // C), HW, 0)  # a frame before start is not read
    for first in tl.range(0, end, BLOCK, num_stages=STAGES):
        i = first + tl.arange(0, BLOCK)
        target_ = tl.load(target + at + i, i < HW, other=0.0).to(tl.float32)
        v_ = tl.load(v + at + i, i < HW, other=0.0).to(tl.float32)
        ref_ = tl.load(ref + at + i, i < HW, other=0.0).to(tl.float32)
        policy_error, ref_error = v_ - target_, ref_ - target_
        d += (v_ - ref_) * (policy_error + ref_error)
        policy += policy_error * policy_error
        reference += ref_error * ref_error
    place = partial + ((plane // C) * FRAMES + f) * C + plane % C
    tl.store(place, tl.sum(d, 0) / (C * HW))
    tl.store(place + SLOT, tl.sum(policy, 0) / (C * HW))
    tl.store(place + 2 * SLOT, tl.sum(reference, 0) / (C * HW))


@jit
def _gradient_kernel(
    v, ref, target, start, d_d, dv, dref, dtarget, C, FRAMES, HW, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    """One program: the gradients of d in one frame of one channel, 0 before start; those that are None are not made.

    dd/dv = 2 (v - target), dd/dref = -2 (ref - target), dd/dtarget = -2 (v - ref), over C * HW.
    """
    f = tl.program_id(0) % FRAMES
    b = tl.program_id(0) // FRAMES // C
    at = tl.program_id(0).to(tl.int64) * HW
    kept = f >= tl.load(start + b)
    factor = 2 * tl.load(d_d + b * FRAMES + f) / (C * HW)
    for first in tl.range(0, HW, BLOCK, num_stages=STAGES):
        i = first + tl.arange(0, BLOCK)
        read = (i < HW) & kept
        if (dv is not None) or (dtarget is not None):
            v_ = tl.load(v + at + i, read, other=0.0).to(tl.float32)
        if (dref is not None) or (dtarget is not None):
            ref_ = tl.load(ref + at + i, read, other=0.0).to(tl.float32)
        if (dv is not None) or (dref is not None):
            target_ = tl.load(target + at + i, read, other=0.0).to(tl.float32)
        if dv is not None:
            tl.store(dv + at + i, (factor * (v_ - target_)).to(dv.dtype.element_ty), i < HW)
        if dref is not None:
            tl.store(dref + at + i, (factor * (target_ - ref_)).to(dref.dtype.element_ty), i < HW)
        if dtarget is not None:
            tl.store(dtarget + at + i, (factor * (ref_ - v_)).to(dtarget.dtype.element_ty), i < HW)


class _FrameErrors(torch.autograd.Function):
    """(3, B, F): d, the policy's error, the reference's; only d has a gradient."""

    @staticmethod
    def forward(ctx, v, ref, target, start):
        v, ref, target, start = (a.contiguous() for a in (v, ref, target, start))
        B, C, frames, H, W = v.shape
        partial = v.new_empty(3, B, frames, C, dtype=torch.float32)
        _errors_kernel[(B * C * frames,)](v, ref, target, start, partial, C, frames, H * W, B * frames * C, **OPTIONS)
        ctx.save_for_backward(v, ref, target, start)
        d, policy, reference = partial.sum(-1).unbind(0)
        ctx.mark_non_differentiable(policy, reference)
        return d, policy, reference

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_d, _policy, _reference):
        *tensors, start = ctx.saved_tensors
        gradients = [torch.empty_like(a) if needed else None for a, needed in zip(tensors, ctx.needs_input_grad)]
        B, C, frames, H, W = tensors[0].shape
        _gradient_kernel[(B * C * frames,)](*tensors, start, d_d.contiguous(), *gradients, C, frames, H * W, **OPTIONS)
        return *gradients, None


# ---- the functions ---------------------------------------------------------------------------------------------------


def implementation(device: torch.device) -> str:
    """Who computes: "triton" on CUDA, "torch" (the definition) elsewhere and if KERNELS=torch is set.

    RuntimeError for CUDA without Triton: a slower path is never taken silently. ValueError for another KERNELS.
    """
    if KERNELS not in ("", "torch"):
        raise ValueError(f"KERNELS: expected torch, or unset it; got {KERNELS!r}")
    if KERNELS == "torch" or device.type != "cuda":
        return "torch"
    if triton is None:
        raise RuntimeError("CUDA tensors need Triton: pip install triton, or set KERNELS=torch (slower)")
    return "triton"


def _check(v: Tensor, ref: Tensor, target: Tensor, start: Tensor) -> None:
    for name, a in {"v": v, "ref": ref, "target": target}.items():
        if a.ndim != 5 or a.shape != v.shape or not a.is_floating_point() or a.device != v.device or not a.numel():
            expected = f"{tuple(v.shape)}" if v.ndim == 5 and v.numel() else "non-empty (B, C, F, H, W)"
            got = f"{a.dtype} {tuple(a.shape)} on {a.device}"
            raise ValueError(f"{name}: expected floating point {expected} on {v.device}, got {got}")
    if not isinstance(start, Tensor):
        raise ValueError(f"start: expected a tensor of integers, got {type(start).__name__}")
    B, frames = len(v), v.shape[2]
    integers = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    if start.shape != (B,) or start.dtype not in integers or start.device != v.device:
        got = f"{start.dtype} {tuple(start.shape)} on {start.device}"
        raise ValueError(f"start: expected integers ({B},) on {v.device}, got {got}")
    inside = (start.long() >= 0) & (start.long() < frames)  # widened: 130 frames are none of int8's numbers
    if start.device.type == "cpu" and not torch.compiler.is_compiling() and not inside.all():
        raise ValueError(f"start: expected 0 … {frames - 1}, got {start.tolist()}: an empty region has no error")


def frame_errors(v: Tensor, ref: Tensor, target: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What each latent frame from `start` on says of policy and reference; 0 before it.

    v, ref, target (B, C, F, H, W) bfloat16, float16 or float32, each its own: the velocities of policy and reference,
    and noise − x0. start (B,) integer in 0 … F−1. Returns d, the policy's error and the reference's, each (B, F)
    float32; d alone has a gradient. ValueError for shapes, dtypes, devices or values that do not fit; the values of
    `start` are looked at on the CPU only, as elsewhere the host would have to wait for them.
    """
    _check(v, ref, target, start)
    if implementation(v.device) == "torch":
        return frame_errors_ref(v, ref, target, start)
    if torch.float64 in (v.dtype, ref.dtype, target.dtype):
        raise ValueError("expected bfloat16, float16 or float32, got float64; KERNELS=torch takes it")
    if torch.compiler.is_compiling():  # a compiled graph launches on its own device
        return _FrameErrors.apply(v, ref, target, start)
    with torch.cuda.device_of(v):  # Triton launches on the current one
        return _FrameErrors.apply(v, ref, target, start)


def region_dpo(
    v_w: Tensor, v_l: Tensor, ref_w: Tensor, ref_l: Tensor, target_w: Tensor, target_l: Tensor,
    start: Tensor, beta: float, form: str = "outside",
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Asymmetrical DPO's loss of each pair, (B,) float32, and its detached parts.

    v_*, ref_*, target_*, start: as in `frame_errors`, of the winner (w) and the loser (l). beta > 0; form "outside" or
    "inside". The parts: `err/{w,l}_{policy,ref}` and `diff/{w,l}` (B, F), 0 before start; `S` (B,); `margin` (B,) =
    −β·S/K, positive where the policy prefers the winner. ValueError as `frame_errors`, and for another beta or form.
    """
    if not 0 < beta < float("inf") or form not in ("outside", "inside"):
        raise ValueError(f"expected beta > 0 and form 'outside' or 'inside', got {beta}, {form!r}")
    d_w, policy_w, reference_w = frame_errors(v_w, ref_w, target_w, start)
    d_l, policy_l, reference_l = frame_errors(v_l, ref_l, target_l, start)
    S = (d_w - d_l).sum(1)
    K = v_w.shape[2] - start.long()
    loss = F.softplus(beta * S) / K if form == "outside" else F.softplus(beta * S / K)
    parts = {
        "err/w_policy": policy_w, "err/w_ref": reference_w, "diff/w": d_w,
        "err/l_policy": policy_l, "err/l_ref": reference_l, "diff/l": d_l, "S": S, "margin": -beta * S / K,
    }  # fmt: skip
    return loss, {name: a.detach() for name, a in parts.items()}


# ---- check and time --------------------------------------------------------------------------------------------------


def _step(function, tensors: list[Tensor], start: Tensor, weights: Tensor) -> list[Tensor]:
    """d and both errors, and the gradients of those of the three tensors that ask for one, d's being weights (B, F)."""
    d, *errors = function(*tensors, start)
    return [d, *errors, *torch.autograd.grad(d, [a for a in tensors if a.requires_grad], weights)]


def check(device: torch.device, shape: tuple[int, ...] = (3, 4, 5, 6, 9)) -> None:
    """Largest error against float64 of values and gradients, ours beside the definition's in the same dtype."""
    start, weights = torch.arange(shape[0], device=device), torch.rand(shape[0], shape[2], device=device)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        tensors = [a.to(dtype).requires_grad_() for a in torch.randn(3, *shape, device=device)]
        exact = [a.detach().double().requires_grad_() for a in tensors]
        truth = _step(frame_errors_ref, exact, start, weights.double())
        error, eager = (
            max((a - b).abs().max().item() for a, b in zip(_step(f, tensors, start, weights), truth))
            for f in (frame_errors, frame_errors_ref)
        )
        print(f"frame_errors {str(dtype)[6:]:9s} error {error:.1e}, of the definition {eager:.1e}")
        assert error <= 2 * eager + 1e-6, "expected at most twice the definition's error"


def time(device: torch.device, shape: tuple[int, ...] = (2, 16, 13, 36, 64)) -> dict[str, dict[str, float]]:
    """Milliseconds of forward and backward at Wan2.1's latents of 49x288x512, in a CUDA graph: no Python is timed."""
    v, ref = (torch.randn(shape, device=device).bfloat16() for _ in range(2))
    tensors = [v.requires_grad_(), ref, torch.randn(shape, device=device)]
    rest = torch.full(shape[:1], 5, device=device), torch.ones(shape[0], shape[2], device=device)
    ways = {"kernel": frame_errors, "eager": frame_errors_ref, "torch.compile": torch.compile(frame_errors_ref)}
    took = {way: triton.testing.do_bench_cudagraph(partial(_step, f, tensors, *rest)) for way, f in ways.items()}
    for way, ms in took.items():
        print(f"frame_errors {way:13s} {ms:.3f} ms")
    return {"frame_errors": took}


if __name__ == "__main__":
    if torch.cuda.is_available():
        check(torch.device("cuda"))
        time(torch.device("cuda"))
    else:
        check(torch.device("cpu"))
        print("no CUDA device: what was checked is the definition, on the CPU; the kernels were not run, nor timed")

"""The asymmetric DPO loss: a region-masked, length-normalised reduction over the latent frames where a pair differs.

    e_i(f; x) = mean over C, H, W of (target_i − f_i)²                      i: latent frame
    d_i       = e_i(policy; x) − e_i(ref; x) = mean (v − r)·((v − target) + (r − target))
    S         = Σ_{i ≥ start} (d_i^w − d_i^l),   K = F − start              w: winner, l: loser
    outside:  loss = softplus(β·S) / K            inside:  loss = softplus(β·S / K)

Frames before `start` are selected away, never multiplied by zero, and the kernels never read them: whatever stands
there, NaN included, reaches neither the loss nor a gradient, and the gradient there is exactly 0. d is accumulated as
the product of differences, not as the difference of two errors: exactly 0 where policy equals reference, and far closer
to float64 near it.

Where it is used: asymdpo.py. Why fused: PyTorch makes some sixty operations of what one pass can reduce, and moves 17
times its bytes (kernels/README.md counts them). For one sample and channel the frames from `start` on are one
contiguous run of memory, so excluding frames costs no index and keeps 16-byte loads. Partial sums are folded by a
second kernel: no atomics, the same bits every run.

`python region_dpo.py` checks and times the file. `region_dpo_ref` is the definition, in PyTorch: it runs on CPU, and on
CUDA with KERNELS=torch in the environment. The file needs torch, and on CUDA triton; it works copied alone.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # no Triton for this platform: the definition remains

    def jit(function):
        return function

    triton = tl = None

KERNELS = os.environ.get("KERNELS", "")  # "torch": the definition on every device
INPUTS = ("v_w", "v_l", "ref_w", "ref_l", "target_w", "target_l")
METRICS = ("err/w_policy", "err/l_policy", "err/w_ref", "err/l_ref", "margin", "S")
BLOCK = 1024  # values of one sample and channel that a program takes


# ---- the definition --------------------------------------------------------------------------------------------------


def _wide(a: Tensor) -> Tensor:
    """float32, or float64 where that is what came in: nothing is computed in less."""
    return a if a.dtype == torch.float64 else a.float()


def frame_errors(v: Tensor, ref: Tensor, target: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per latent frame, 0 before start: policy error, reference error, and their difference d, each (B, F) float32."""
    keep = torch.arange(v.shape[2], device=v.device) >= start[:, None]
    v, ref, target = (torch.where(keep[:, None, :, None, None], _wide(a), 0) for a in (v, ref, target))
    policy_error, ref_error = v - target, ref - target
    difference = (v - ref) * (policy_error + ref_error)
    return tuple(a.mean(dim=(1, 3, 4)) for a in (policy_error.square(), ref_error.square(), difference))


def region_dpo_ref(
    v_w: Tensor, v_l: Tensor, ref_w: Tensor, ref_l: Tensor, target_w: Tensor, target_l: Tensor,
    start: Tensor, beta: float, form: str = "outside",
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    policy_w, reference_w, d_w = frame_errors(v_w, ref_w, target_w, start)
    policy_l, reference_l, d_l = frame_errors(v_l, ref_l, target_l, start)
    K = v_w.shape[2] - start
    S = (d_w - d_l).sum(1)
    loss = F.softplus(beta * S) / K if form == "outside" else F.softplus(beta * S / K)
    averages = [a.sum(1) / K for a in (policy_w, policy_l, reference_w, reference_l)]
    return loss, {name: a.detach() for name, a in zip(METRICS, (*averages, -beta * S / K, S))}


# ---- the kernels -----------------------------------------------------------------------------------------------------


@jit
def _sums(v, ref, target, at, kept, sums, slot, sign):
    target_ = tl.load(target + at, kept, other=0.0).to(tl.float32)
    v_ = tl.load(v + at, kept, other=0.0).to(tl.float32)
    ref_ = tl.load(ref + at, kept, other=0.0).to(tl.float32)
    policy_error, ref_error = v_ - target_, ref_ - target_
    tl.store(sums, tl.sum(policy_error * policy_error, 0))
    tl.store(sums + slot, tl.sum(ref_error * ref_error, 0))
    tl.store(sums + 2 * slot, sign * tl.sum((v_ - ref_) * (policy_error + ref_error), 0))


@jit
def _sums_kernel(v_w, v_l, ref_w, ref_l, target_w, target_l, start, partial, C, N, HW, BLOCK: tl.constexpr):
    """One program: BLOCK of the N = F * HW values of one sample and channel, of the winner or of the loser.

    Writes the sums of both errors and of d, the loser's d negated: partial (3, 2, B, C * blocks).
    """
    plane = tl.program_id(0)  # b * C + c
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    kept = (columns >= tl.load(start + plane // C).to(tl.int32) * HW) & (columns < N)
    at = plane.to(tl.int64) * N + columns
    slot = tl.num_programs(0) * tl.num_programs(1)
    sums = partial + tl.program_id(2) * slot + plane * tl.num_programs(1) + tl.program_id(1)
    if tl.program_id(2) == 0:
        _sums(v_w, ref_w, target_w, at, kept, sums, 2 * slot, 1.0)
    else:
        _sums(v_l, ref_l, target_l, at, kept, sums, 2 * slot, -1.0)


@jit
def _fold(partial, M, BLOCK: tl.constexpr):
    """The sum of M numbers."""
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, M, BLOCK):
        m = first + tl.arange(0, BLOCK)
        total += tl.load(partial + m, m < M, other=0.0)
    return tl.sum(total, 0)


@jit
def _loss_kernel(
    partial, start, loss, out, B, M, FRAMES, FRAME, BETA: tl.constexpr, INSIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: one sample's M partial sums -> loss (B), and out (7, B): METRICS, dloss/dS. FRAME = C * H * W."""
    b = tl.program_id(0)
    K = (FRAMES - tl.load(start + b)).to(tl.float32)
    w = partial + b * M
    l = partial + (B + b) * M  # noqa: E741
    S = (_fold(w + 4 * B * M, M, BLOCK) + _fold(l + 4 * B * M, M, BLOCK)) / FRAME
    margin = -BETA * S / K
    z = -margin if INSIDE else BETA * S
    # softplus(z) = max(z, 0) + log1p(e), e = exp(-|z|); log1p(e) = log(u) * e / (u - 1) with u = 1 + e rounded
    e = tl.exp(-tl.abs(z))
    u = 1 + e
    log1p = tl.where(u == 1, e, tl.log(u) * (e / tl.where(u == 1, 1.0, u - 1)))
    softplus = tl.maximum(z, 0.0) + log1p
    tl.store(loss + b, softplus if INSIDE else softplus / K)
    tl.store(out + b, _fold(w, M, BLOCK) / (FRAME * K))
    tl.store(out + B + b, _fold(l, M, BLOCK) / (FRAME * K))
    tl.store(out + 2 * B + b, _fold(w + 2 * B * M, M, BLOCK) / (FRAME * K))
    tl.store(out + 3 * B + b, _fold(l + 2 * B * M, M, BLOCK) / (FRAME * K))
    tl.store(out + 4 * B + b, margin)
    tl.store(out + 5 * B + b, S)
    tl.store(out + 6 * B + b, tl.where(z >= 0, 1.0, e) / u * (BETA / K))


@jit
def _gradients(v, ref, target, dv, dref, dtarget, at, kept, inside, factor):
    """dS/dv = 2 (v - target), dS/dref = -2 (ref - target), dS/dtarget = -2 (v - ref), over FRAME: those asked for."""
    if (dv is not None) or (dtarget is not None):
        v_ = tl.load(v + at, kept, other=0.0).to(tl.float32)
    if (dref is not None) or (dtarget is not None):
        ref_ = tl.load(ref + at, kept, other=0.0).to(tl.float32)
    if (dv is not None) or (dref is not None):
        target_ = tl.load(target + at, kept, other=0.0).to(tl.float32)
    if dv is not None:
        tl.store(dv + at, (factor * (v_ - target_)).to(dv.dtype.element_ty), inside)
    if dref is not None:
        tl.store(dref + at, (factor * (target_ - ref_)).to(dref.dtype.element_ty), inside)
    if dtarget is not None:
        tl.store(dtarget + at, (factor * (ref_ - v_)).to(dtarget.dtype.element_ty), inside)


@jit
def _gradient_kernel(
    v_w, v_l, ref_w, ref_l, target_w, target_l, start, d_loss, slope,
    dv_w, dv_l, dref_w, dref_l, dtarget_w, dtarget_l, C, N, HW, FRAME, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of what `_sums_kernel` summed, 0 before start; those that are None are not made."""
    plane = tl.program_id(0)
    b = plane // C
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    kept = (columns >= tl.load(start + b).to(tl.int32) * HW) & inside
    at = plane.to(tl.int64) * N + columns
    factor = 2 * tl.load(d_loss + b) * tl.load(slope + b) / FRAME
    if tl.program_id(2) == 0:
        _gradients(v_w, ref_w, target_w, dv_w, dref_w, dtarget_w, at, kept, inside, factor)
    else:
        _gradients(v_l, ref_l, target_l, dv_l, dref_l, dtarget_l, at, kept, inside, -factor)


# ---- autograd --------------------------------------------------------------------------------------------------------


def _sizes(v_w: Tensor) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Grid, and C, N = F * H * W, H * W."""
    B, C, frames, H, W = v_w.shape
    N = frames * H * W
    return (B * C, triton.cdiv(N, BLOCK), 2), (C, N, H * W)


class _RegionDPO(torch.autograd.Function):
    """(loss, out (7, B)) of the six tensors; out holds METRICS and dloss/dS, and has no gradient."""

    @staticmethod
    def forward(ctx, v_w, v_l, ref_w, ref_l, target_w, target_l, start, beta, inside):
        tensors = [a.contiguous() for a in (v_w, v_l, ref_w, ref_l, target_w, target_l)]
        start = start.contiguous()
        B, C, frames, H, W = v_w.shape
        grid, sizes = _sizes(v_w)
        partial = v_w.new_empty(3, *grid, dtype=torch.float32)
        loss, out = v_w.new_empty(B, dtype=torch.float32), v_w.new_empty(7, B, dtype=torch.float32)
        _sums_kernel[grid](*tensors, start, partial, *sizes, BLOCK=BLOCK, num_warps=4)
        _loss_kernel[(B,)](
            partial,
            start,
            loss,
            out,
            B,
            C * grid[1],
            frames,
            C * H * W,
            BETA=beta,
            INSIDE=inside,
            BLOCK=512,
            num_warps=4,
        )
        ctx.save_for_backward(*tensors, start, out)
        ctx.mark_non_differentiable(out)
        return loss, out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss, _):
        *tensors, start, out = ctx.saved_tensors
        gradients = [torch.empty_like(a) if needed else None for a, needed in zip(tensors, ctx.needs_input_grad)]
        grid, sizes = _sizes(tensors[0])
        frame = sizes[0] * sizes[2]
        _gradient_kernel[grid](
            *tensors, start, d_loss.contiguous(), out[6], *gradients, *sizes, frame, BLOCK=BLOCK, num_warps=4
        )
        return *gradients, None, None, None


# ---- the function ----------------------------------------------------------------------------------------------------


def implementation(device: torch.device) -> str:
    """Who computes: "triton" on CUDA devices, "torch" (the definition) on others and where KERNELS=torch is set.

    RuntimeError for CUDA without Triton: a slower path is never taken silently. ValueError for another KERNELS.
    """
    if KERNELS not in ("", "torch"):
        raise ValueError(f"KERNELS: expected torch, or unset it; got {KERNELS!r}")
    if KERNELS == "torch" or device.type != "cuda":
        return "torch"
    if triton is None:
        raise RuntimeError("CUDA tensors need Triton: pip install triton, or set KERNELS=torch (slower)")
    return "triton"


def _check(tensors: dict[str, Tensor], start: Tensor, beta: float, form: str) -> None:
    v_w = tensors["v_w"]
    for name, a in (tensors | {"start": start}).items():
        if not isinstance(a, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(a).__name__}")
    for name, a in tensors.items():
        if a.ndim != 5 or a.shape != v_w.shape or not a.is_floating_point() or a.device != v_w.device or not a.numel():
            expected = f"{tuple(v_w.shape)}" if v_w.ndim == 5 and v_w.numel() else "non-empty (B, C, F, H, W)"
            got = f"{a.dtype} {tuple(a.shape)} on {a.device}"
            raise ValueError(f"{name}: expected floating point {expected} on {v_w.device}, got {got}")
    B, _, frames, _, _ = v_w.shape
    integers = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    if start.shape != (B,) or start.dtype not in integers or start.device != v_w.device:
        got = f"{start.dtype} {tuple(start.shape)} on {start.device}"
        raise ValueError(f"start: expected integers ({B},) on {v_w.device}, got {got}")
    if not 0 < beta < float("inf") or form not in ("outside", "inside"):
        raise ValueError(f"expected beta > 0 and form 'outside' or 'inside', got {beta}, {form!r}")
    if torch.compiler.is_compiling() or (start.is_cuda and torch.cuda.is_current_stream_capturing()):
        return  # a graph cannot look at values
    if ((start < 0) | (start >= frames)).any():
        raise ValueError(f"start: expected 0 … {frames - 1}, got {start.tolist()}: an empty region has no loss")


def region_dpo(
    v_w: Tensor, v_l: Tensor, ref_w: Tensor, ref_l: Tensor, target_w: Tensor, target_l: Tensor,
    start: Tensor, beta: float, form: str = "outside",
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The loss of each pair.

    v_*, ref_*, target_* (B, C, F, H, W) bfloat16, float16 or float32, each its own: velocity of policy and reference,
    and noise − x0, for the winner (w) and the loser (l); start (B,) integer in 0 … F−1: first frame in the loss;
    beta > 0; form "outside" or "inside". Returns loss (B,) float32 and detached (B,) metrics: `err/{w,l}_{policy,ref}`
    averaged over frames ≥ start, `S`, and `margin` = −β·S/K, positive where the policy prefers the winner. ValueError
    for shapes, dtypes, devices or values that do not fit; `start` is not looked at in torch.compile and CUDA graphs.
    """
    tensors = dict(zip(INPUTS, (v_w, v_l, ref_w, ref_l, target_w, target_l)))
    _check(tensors, start, beta, form)
    if implementation(v_w.device) == "torch":
        return region_dpo_ref(*tensors.values(), start, beta, form)
    if wrong := [name for name, a in tensors.items() if a.dtype == torch.float64]:
        raise ValueError(f"{wrong[0]}: expected bfloat16, float16 or float32, got float64; KERNELS=torch takes it")
    if torch.compiler.is_compiling():  # a compiled graph launches on its own device
        loss, out = _RegionDPO.apply(*tensors.values(), start, float(beta), form == "inside")
    else:
        with torch.cuda.device_of(v_w):  # Triton launches on the current one
            loss, out = _RegionDPO.apply(*tensors.values(), start, float(beta), form == "inside")
    return loss, dict(zip(METRICS, out))


# ---- check and time --------------------------------------------------------------------------------------------------


def _step(function, tensors: list[Tensor], start: Tensor, beta: float, form: str = "outside") -> list[Tensor]:
    """Loss, metrics, and the gradients of the six tensors that ask for one."""
    loss, metrics = function(*tensors, start, beta, form)
    return [loss, *metrics.values(), *torch.autograd.grad(loss.sum(), [a for a in tensors if a.requires_grad])]


def check(device: torch.device, shape: tuple[int, ...] = (3, 4, 5, 6, 9)) -> None:
    """Largest error against float64 of loss, metrics and gradients, ours beside the definition's in the same dtype."""
    start = torch.arange(shape[0], device=device)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        tensors = [a.to(dtype).requires_grad_() for a in torch.randn(6, *shape, device=device)]
        exact = [a.detach().double().requires_grad_() for a in tensors]
        for form in ("outside", "inside"):
            truth = _step(region_dpo_ref, exact, start, 2.0, form)
            error, eager = (
                max((a - b).abs().max().item() for a, b in zip(_step(f, tensors, start, 2.0, form), truth))
                for f in (region_dpo, region_dpo_ref)
            )
            print(f"region_dpo, {form:8s} {str(dtype)[6:]:9s} error {error:.1e}, of the definition {eager:.1e}")
            assert error <= 2 * eager + 1e-6, "expected at most twice the definition's error"


def _bench(name: str, runs: dict, least: int) -> dict[str, float]:
    """Milliseconds of each way, the better of two rounds; printed with the rate at which `least` bytes would move."""
    rounds = [{way: triton.testing.do_bench(run) for way, run in runs.items()} for _ in range(2)]
    took = {way: min(r[way] for r in rounds) for way in runs}
    for way, ms in took.items():
        print(f"{name:32s} {way:13s} {ms:.3f} ms, {least / ms / 1e6:5.0f} GB/s, {ms / took['kernel']:.2f}x the kernel")
    return took


def time(device: torch.device, shape: tuple[int, ...] = (2, 16, 13, 36, 64)) -> dict[str, dict[str, float]]:
    """Forward and backward at Wan2.1's latents of 49x288x512, bfloat16, float32 targets: ours, definition, compiled."""
    tensors = [torch.randn(shape, device=device).bfloat16() for _ in range(4)]
    tensors = [a.requires_grad_(i < 2) for i, a in enumerate(tensors)] + list(torch.randn(2, *shape, device=device))
    start = torch.full(shape[:1], 5, device=device)
    ways = {"kernel": region_dpo, "eager": region_dpo_ref, "torch.compile": torch.compile(region_dpo_ref)}
    runs = {way: lambda f=f: _step(f, tensors, start, 2000.0) for way, f in ways.items()}
    v, target, kept = tensors[0].nbytes, tensors[4].nbytes, 1 - 5 / shape[2]
    least = kept * (4 * v + 2 * target) + kept * (2 * v + 2 * target) + 2 * v  # forward; backward, and its gradients
    return {"region_dpo": _bench("region_dpo", runs, int(least))}


if __name__ == "__main__":
    if torch.cuda.is_available():
        check(torch.device("cuda"))
        time(torch.device("cuda"))
    else:
        check(torch.device("cpu"))
        print("no CUDA device: what was checked is the definition, on the CPU; the kernels were not run, nor timed")

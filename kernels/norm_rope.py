# SPDX-License-Identifier: Apache-2.0
"""RMSNorm of queries or keys and their 3-D rotary embedding (RoPE) in one pass, forward and backward.

    n = x / sqrt(mean(x²) + eps) * weight                      mean over all D channels, heads together
    y[2i] + j y[2i+1] = (n[2i] + j n[2i+1]) * (cos + j sin)    adjacent channels are a pair; all heads turn alike

Arithmetic is float32 whatever x's dtype; y is rounded once, at the end.

Where it is used: q and k of every self-attention in model.py, and, without the rotation, of every cross-attention.

How to call it elsewhere:

    from norm_rope import norm_rope
    angle = position[:, None] * frequency                          # (L, K / 2)
    rope = torch.stack([angle.cos(), angle.sin()], -1).flatten(1)  # (L, K) float32
    q = norm_rope(q, q_weight, rope)                               # q (B, L, D), D = heads * K; q_weight (D,)

In diffusers' WanAttnProcessor, in place of norm_q and norm_k and of apply_rotary_emb:

    rope = torch.stack([a[0, :, 0, ::2] for a in rotary_emb], -1).flatten(1)  # theirs: cos and sin, (1, L, 1, K)
    query = norm_rope(query, attn.norm_q.weight, rope, attn.norm_q.eps)
    key = norm_rope(key, attn.norm_k.weight, rope, attn.norm_k.eps)

Why fused: in PyTorch norm, casts and rotation are separate passes, one of them over a complex copy in float32. Here x
is read once and y written once (kernels/README.md counts it).

Limits: D up to 8192; bfloat16, float16 or float32; no gradient of rope, no second derivative. Backward keeps x and one
float32 number a token. The weight's gradient is partial sums, one a program, which a second kernel adds up: no atomics,
the same bits every run.

`python norm_rope.py` checks and times the file. `norm_rope_ref` is the definition, in PyTorch. It runs on the CPU, and
on CUDA if KERNELS=torch is in the environment. The file needs torch, and on CUDA triton; it works alone.
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
MAX_WIDTH = 8192  # largest D
# Options of every launch. STAGES: of how many tokens the loads are in flight; 2 were no faster on an H100. TOKENS,
# num_warps and maxnreg may be added.
OPTIONS = {"STAGES": 1}


# ---- the definition --------------------------------------------------------------------------------------------------


def _wide(a: Tensor) -> Tensor:
    """float32, or float64 if a is float64: nothing is computed in less."""
    return a if a.dtype == torch.float64 else a.float()


def norm_rope_ref(x: Tensor, weight: Tensor, rope: Tensor | None, eps: float = 1e-6) -> Tensor:
    y = _wide(x)
    y = F.rms_norm(y, y.shape[-1:], weight.to(y.dtype), eps)
    if rope is not None:
        rope = rope.detach().contiguous()
        pairs = torch.view_as_complex(y.unflatten(-1, (-1, rope.shape[-1] // 2, 2)))
        y = torch.view_as_real(pairs * torch.view_as_complex(rope.unflatten(-1, (-1, 2))).unsqueeze(1)).flatten(2)
    return y.to(x.dtype)


# ---- the kernels -----------------------------------------------------------------------------------------------------


@jit
def _rotate(a, rope, BLOCK_D: tl.constexpr, inverse: tl.constexpr):
    """Adjacent pairs of a (BLOCK_D) turned by rope (BLOCK_D: cos, sin, cos, ...), or turned back."""
    real, imaginary = tl.split(tl.reshape(a, [BLOCK_D // 2, 2]))
    cos, sin = tl.split(tl.reshape(rope, [BLOCK_D // 2, 2]))
    if inverse:
        sin = -sin
    return tl.reshape(tl.join(real * cos - imaginary * sin, real * sin + imaginary * cos), [BLOCK_D])


@jit
def _forward_kernel(
    x, weight, rope, y, rstd, N, L, D,
    K: tl.constexpr, EPS: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: TOKENS of the N = B * L tokens. rope (L, K) float32 may be None."""
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    w = tl.load(weight + columns, inside, other=0.0).to(tl.float32)
    first = tl.program_id(0) * TOKENS
    for i in tl.range(0, tl.minimum(TOKENS, N - first), num_stages=STAGES):
        token = first + i
        at = token.to(tl.int64) * D + columns
        stream = tl.load(x + at, inside, other=0.0).to(tl.float32)
        s = tl.rsqrt(tl.sum(stream * stream, 0) / D + EPS)
        normed = stream * s * w
        if rope is not None:
            rotation = tl.load(rope + (token % L) * K + columns % K, inside, other=0.0)
            normed = _rotate(normed, rotation, BLOCK_D, False)
        tl.store(y + at, normed.to(y.dtype.element_ty), inside)
        tl.store(rstd + token, s)


@jit
def _backward_kernel(
    x, weight, rope, rstd, dy, dx, partial, N, L, D,
    K: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: TOKENS tokens, and their sum for the weight if partial (programs, D) is not None."""
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    w = tl.load(weight + columns, inside, other=0.0).to(tl.float32)
    d_weight = tl.zeros([BLOCK_D], tl.float32)
    first = tl.program_id(0) * TOKENS
    for i in tl.range(0, tl.minimum(TOKENS, N - first), num_stages=STAGES):
        token = first + i
        at = token.to(tl.int64) * D + columns
        upstream = tl.load(dy + at, inside, other=0.0).to(tl.float32)
        if rope is not None:
            rotation = tl.load(rope + (token % L) * K + columns % K, inside, other=0.0)
            upstream = _rotate(upstream, rotation, BLOCK_D, True)
        s = tl.load(rstd + token)
        normed = tl.load(x + at, inside, other=0.0).to(tl.float32) * s
        g = upstream * w
        grad = s * (g - normed * (tl.sum(g * normed, 0) / D))
        tl.store(dx + at, grad.to(dx.dtype.element_ty), inside)
        d_weight += upstream * normed
    if partial is not None:
        tl.store(partial + tl.program_id(0).to(tl.int64) * D + columns, d_weight, inside)


@jit
def _fold_kernel(partial, out, N, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """out (D) = sum of partial (N, D) over N."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (columns < D)[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK_N):
        n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
        total += tl.load(partial + n * D + columns[None, :], (n < N) & inside, other=0.0)
    tl.store(out + columns, tl.sum(total, 0), columns < D)


# ---- autograd --------------------------------------------------------------------------------------------------------


def _sizes(x: Tensor, rope: Tensor | None, sums: bool = False) -> tuple[tuple[int], tuple, dict]:
    """Grid, the sizes that the kernels take, and their options. Few tokens a program: many programs, and many sums.

    Tokens and warps are an H100's choice, of those that bench/gpu.py's section `options` tries.
    """
    B, L, D = x.shape
    tokens = OPTIONS.get("TOKENS", 16 if sums else 1)
    block = max(16, triton.next_power_of_2(D))
    threads = min(block // (8 if sums else 16), 256)
    options = {"num_warps": max(threads // (32 if torch.version.hip is None else 64), 1)} | OPTIONS
    options |= {"K": 0 if rope is None else rope.shape[-1], "BLOCK_D": block, "TOKENS": tokens}
    return (triton.cdiv(B * L, tokens),), (B * L, L, D), options


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, rope, eps):
        x, weight = x.contiguous(), weight.contiguous()
        y, rstd = torch.empty_like(x), x.new_empty(x.shape[:2], dtype=torch.float32)
        grid, sizes, options = _sizes(x, rope)
        _forward_kernel[grid](x, weight, rope, y, rstd, *sizes, EPS=eps, **options)
        ctx.save_for_backward(x, weight, rope, rstd)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, rope, rstd = ctx.saved_tensors
        dy, dx = dy.contiguous(), torch.empty_like(x)
        grid, sizes, options = _sizes(x, rope, sums=ctx.needs_input_grad[1])
        D = x.shape[2]
        partial = d_weight = None
        if ctx.needs_input_grad[1]:
            partial = x.new_empty(*grid, D, dtype=torch.float32)
            d_weight = x.new_empty(D, dtype=torch.float32)
        _backward_kernel[grid](x, weight, rope, rstd, dy, dx, partial, *sizes, **options)
        if partial is not None:
            _fold_kernel[(triton.cdiv(D, 32),)](partial, d_weight, grid[0], D, BLOCK_N=64, BLOCK_D=32, num_warps=4)
            d_weight = d_weight.to(weight.dtype)
        return dx, d_weight, None, None


# ---- the function ----------------------------------------------------------------------------------------------------


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


def _check(x: Tensor, weight: Tensor, rope: Tensor | None) -> None:
    if x.ndim != 3 or not x.is_floating_point() or not x.numel():
        raise ValueError(f"x: expected a non-empty floating point (B, L, D), got {x.dtype} {tuple(x.shape)}")
    B, L, D = x.shape
    if D > MAX_WIDTH:
        raise ValueError(f"x: expected a width D of at most {MAX_WIDTH}, got {D}")
    if weight.shape != (D,) or not weight.is_floating_point() or weight.device != x.device:
        got = f"{weight.dtype} {tuple(weight.shape)} on {weight.device}"
        raise ValueError(f"weight: expected floating point ({D},) on {x.device}, got {got}")
    if rope is not None and (
        rope.ndim != 2 or rope.shape[0] != L or rope.shape[1] < 2 or rope.shape[1] % 2 or D % rope.shape[1]
        or rope.dtype != (torch.float64 if x.dtype == torch.float64 else torch.float32) or rope.device != x.device
    ):  # fmt: skip
        got = f"{rope.dtype} {tuple(rope.shape)} on {rope.device}"
        raise ValueError(f"rope: expected float32 (L={L}, K), K even and a divisor of D={D}, on {x.device}, got {got}")


def norm_rope(x: Tensor, weight: Tensor, rope: Tensor | None, eps: float = 1e-6) -> Tensor:
    """RMSNorm over D, then the rotation of each head's adjacent pairs.

    x (B, L, D) bfloat16, float16 or float32, D = heads * K up to 8192; weight (D,) floating point; rope (L, K) float32,
    cos and sin of each pair's angle in turn, the same for every head, or None for no rotation; it gets no gradient.
    Returns (B, L, D) in x's dtype. ValueError for shapes, dtypes or devices that do not fit.
    """
    _check(x, weight, rope)
    if implementation(x.device) == "torch":
        return norm_rope_ref(x, weight, rope, eps)
    if x.dtype == torch.float64:  # rope then is, too
        raise ValueError("x: expected bfloat16, float16 or float32, got float64; KERNELS=torch takes it")
    rope = None if rope is None else rope.contiguous()
    if torch.compiler.is_compiling():  # a compiled graph launches on its own device
        return _NormRope.apply(x, weight, rope, eps)
    with torch.cuda.device_of(x):  # Triton launches on the current one
        return _NormRope.apply(x, weight, rope, eps)


# ---- check and time --------------------------------------------------------------------------------------------------


def _case(shape: tuple[int, int, int, int], dtype: torch.dtype, device) -> tuple[list[Tensor], Tensor, Tensor]:
    """x and weight, which ask for gradients; rope; and a gradient of y."""
    B, L, heads, K = shape
    x, dy = torch.randn(2, B, L, heads * K, device=device).to(dtype)
    angle = 6 * torch.rand(L, K // 2, device=device)
    rope = torch.stack([angle.cos(), angle.sin()], dim=-1).flatten(1)
    leaves = [a.detach().requires_grad_() for a in (x, torch.randn(heads * K, device=device))]
    return leaves, rope, dy


def _step(function, leaves: list[Tensor], rope: Tensor, dy: Tensor) -> list[Tensor]:
    """The output and both gradients."""
    y = function(*leaves, rope)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def check(device: torch.device, shape: tuple[int, int, int, int] = (2, 35, 5, 40)) -> None:
    """Largest error against float64 of output and gradients: at most twice the definition's in the same dtype."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        leaves, rope, dy = _case(shape, dtype, device)
        truth = _step(norm_rope_ref, [a.detach().double().requires_grad_() for a in leaves], rope.double(), dy.double())
        error, eager = (
            max((a - b).abs().max().item() for a, b in zip(_step(f, leaves, rope, dy), truth))
            for f in (norm_rope, norm_rope_ref)
        )
        print(f"norm_rope {str(dtype)[6:]:9s} error {error:.1e}, of the definition {eager:.1e}")
        assert error <= 2 * eager + 1e-6, "expected at most twice the definition's error"


def time(device: torch.device, shape: tuple[int, int, int, int] = (2, 7488, 12, 128)) -> dict[str, dict[str, float]]:
    """Milliseconds of forward and backward at Wan2.1-1.3B's shape in bfloat16, in a CUDA graph: no Python is timed."""
    leaves, rope, dy = _case(shape, torch.bfloat16, device)
    ways = {"kernel": norm_rope, "eager": norm_rope_ref, "torch.compile": torch.compile(norm_rope_ref)}
    took = {way: triton.testing.do_bench_cudagraph(partial(_step, f, leaves, rope, dy)) for way, f in ways.items()}
    for way, ms in took.items():  # at least x, y; x, dy, dx move
        print(f"norm_rope {way:13s} {ms:.3f} ms, {5 * dy.nbytes / ms / 1e6:5.0f} GB/s")
    return {"norm_rope": took}


if __name__ == "__main__":
    if torch.cuda.is_available():
        check(torch.device("cuda"))
        time(torch.device("cuda"))
    else:
        check(torch.device("cpu"))
        print("no CUDA device: what was checked is the definition, on the CPU; the kernels were not run, nor timed")

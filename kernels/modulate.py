# SPDX-License-Identifier: Apache-2.0
"""Per-frame timestep modulation (adaLN): residual, gate, LayerNorm, scale and shift in one pass, forward and backward.

    ln_modulate           y     = LN(x) * (1 + scale[row]) + shift[row]
    residual_ln_modulate  x_out = x + gate[row] * h,   y = LN(x_out) * (1 + scale[row]) + shift[row]
    gate_residual         x_out = x + gate[row] * h

LN has no affine part. Its statistics, the modulation and all products are float32, whatever the streams' dtypes.

Where it is used: every block of model.py. `row (B, F)` says which row of the tables `(B, R, D)` a latent frame takes.
Without it there are as many frames as rows, and frame f takes row f:

    R = 1, no row           the ordinary DiT, one time for the clip
    R = 2, row = cond_mask  the continuation model: row 0 is time t, row 1 is time 0 (the given, clean frames)
    R = F, no row           any time for each frame; R = L: for each token

How to call it elsewhere, here in diffusers' WanTransformerBlock, x being its hidden_states. temb is (B, 6, D), or
(B, L, 6, D) with a row a token, or, which diffusers itself does not take, (B, F, 6, D) with a row a frame:

    table = self.scale_shift_table + (temb if temb.ndim == 4 else temb.unsqueeze(1)).float()  # (B, R, 6, D)
    shift, scale, gate, c_shift, c_scale, c_gate = table.unbind(2)
    h = self.attn1(ln_modulate(x, shift, scale), None, None, rotary_emb)
    y, x = residual_ln_modulate(x, h, gate, *(a.expand_as(gate) for a in (self.norm2.bias, self.norm2.weight - 1)))
    y, x = residual_ln_modulate(x, self.attn2(y, encoder_hidden_states, None, None), None, c_shift, c_scale)
    x = gate_residual(x, self.ffn(y), c_gate)

Why fused: memory traffic is the cost. PyTorch's separate operations move about three times the bytes that are needed,
and ten times in bfloat16 (kernels/README.md counts them). The tables are never expanded to L tokens: a program works on
tokens of one frame and loads that frame's row once. At Wan2.1-1.3B and 49x288x512 six tables of two rows are 74 KB a
sample and block; a row for each token would be 276 MB.

Limits: D up to 8192; streams bfloat16, float16 or float32; no second derivative. Backward keeps the normed stream (x or
x_out), two float32 numbers a token, and h only if a table needs a gradient. The tables' gradients are partial sums, one
a program, which a second kernel adds up; without `row` they are the gradients, or a plain sum of them. No atomics, the
same bits every run.

`python modulate.py` checks and times the file. The functions named `*_ref` are the definition, in PyTorch. They run on
the CPU, and on CUDA if KERNELS=torch is in the environment. The file needs torch, and on CUDA triton; it works alone.
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
except ImportError:  # no Triton for this platform: the definitions remain
    triton = tl = None
jit = triton.jit if triton else lambda function: function

KERNELS = os.environ.get("KERNELS", "")  # "torch": the definitions on every device
MAX_WIDTH = 8192  # largest D
STREAMS = (torch.bfloat16, torch.float16, torch.float32)  # dtypes that the kernels take
ROWS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# Options of every launch. STAGES: of how many tokens the loads are in flight; 2 were no faster on an H100. TOKENS,
# num_warps and maxnreg may be added.
OPTIONS = {"STAGES": 1}


# ---- the definition --------------------------------------------------------------------------------------------------


def _wide(a: Tensor) -> Tensor:
    """float32, or float64 if a is float64: nothing is computed in less."""
    return a if a.dtype == torch.float64 else a.float()


def _take(table: Tensor, row: Tensor | None) -> Tensor:
    """Each frame's row of a table: (B, R, D), (B, F) -> (B, F, 1, D), which broadcasts over the frame's tokens."""
    if row is None:
        return _wide(table).unsqueeze(2)
    if table.shape[1] == 1 or table.stride(1) == 0:  # one row, or one row expanded: nothing to gather
        return _wide(table[:, :1]).unsqueeze(1)
    index = row.long().unsqueeze(-1).expand(-1, -1, table.shape[-1])
    return _wide(table).gather(1, index).unsqueeze(2)


def _by_frame(x: Tensor, table: Tensor, row: Tensor | None) -> Tensor:
    """(B, L, D) -> (B, F, L / F, D)"""
    return _wide(x).unflatten(1, (_frames(table, row), -1))


def _frames(table: Tensor, row: Tensor | None) -> int:
    """F: without row each row of a table (B, R, D) is a frame's."""
    return table.shape[1] if row is None else row.shape[1]


def ln_modulate_ref(x: Tensor, shift: Tensor, scale: Tensor, row: Tensor | None = None, eps=1e-6, dtype=None) -> Tensor:
    normed = F.layer_norm(_by_frame(x, shift, row), x.shape[-1:], eps=eps)
    return torch.addcmul(_take(shift, row), normed, 1 + _take(scale, row)).flatten(1, 2).to(dtype or x.dtype)


def gate_residual_ref(x: Tensor, h: Tensor, gate: Tensor | None, row: Tensor | None = None) -> Tensor:
    if gate is None:
        return (_wide(x) + _wide(h)).to(x.dtype)
    x_, h_ = (_by_frame(a, gate, row) for a in (x, h))
    return torch.addcmul(x_, _take(gate, row), h_).flatten(1, 2).to(x.dtype)


def residual_ln_modulate_ref(
    x: Tensor, h: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, row: Tensor | None = None, eps=1e-6,
    dtype=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x_out = gate_residual_ref(x, h, gate, row)
    return ln_modulate_ref(x_out, shift, scale, row, eps, dtype), x_out


# ---- the kernels -----------------------------------------------------------------------------------------------------
# Triton compiles an argument that is None away: one kernel serves the three functions.


@jit
def _forward_kernel(
    x, h, gate, shift, scale, row, y, x_out, mean, rstd,
    gate_b, gate_r, shift_b, shift_r, scale_b, scale_r, row_b, row_f,
    FRAMES, T, D, EPS: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: TOKENS tokens of one frame. Without h: y alone. Without y: x_out alone. T: tokens a frame."""
    b = (tl.program_id(0) // FRAMES).to(tl.int64)
    r = (tl.program_id(0) % FRAMES).to(tl.int64)
    if row is not None:
        r = tl.load(row + b * row_b + r * row_f).to(tl.int64)
    first = tl.program_id(1) * TOKENS
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    if gate is not None:
        g = tl.load(gate + b * gate_b + r * gate_r + columns, inside, other=0.0).to(tl.float32)
    if y is not None:
        factor = 1 + tl.load(scale + b * scale_b + r * scale_r + columns, inside, other=0.0).to(tl.float32)
        offset = tl.load(shift + b * shift_b + r * shift_r + columns, inside, other=0.0).to(tl.float32)
    for i in tl.range(first, tl.minimum(first + TOKENS, T), num_stages=STAGES):
        token = tl.program_id(0).to(tl.int64) * T + i
        at = token * D + columns
        stream = tl.load(x + at, inside, other=0.0).to(tl.float32)
        if h is not None:
            update = tl.load(h + at, inside, other=0.0).to(tl.float32)
            if gate is not None:
                update = g * update
            rounded = (stream + update).to(x_out.dtype.element_ty)
            tl.store(x_out + at, rounded, inside)
            stream = rounded.to(tl.float32)  # normed is what is stored: backward reads it again
        if y is not None:
            m = tl.sum(stream, 0) / D
            centered = tl.where(inside, stream - m, 0.0)
            s = tl.rsqrt(tl.sum(centered * centered, 0) / D + EPS)
            tl.store(y + at, (centered * s * factor + offset).to(y.dtype.element_ty), inside)
            tl.store(mean + token, m)
            tl.store(rstd + token, s)


@jit
def _backward_kernel(
    x, h, gate, scale, row, mean, rstd, dy, dx_out, dx, dh, partial,
    gate_b, gate_r, scale_b, scale_r, row_b, row_f,
    FRAMES, T, D, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: TOKENS tokens of one frame, and their sums for the tables: partial (tables, programs, D)."""
    b = (tl.program_id(0) // FRAMES).to(tl.int64)
    r = (tl.program_id(0) % FRAMES).to(tl.int64)
    if row is not None:
        r = tl.load(row + b * row_b + r * row_f).to(tl.int64)
    first = tl.program_id(1) * TOKENS
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    if gate is not None:
        g = tl.load(gate + b * gate_b + r * gate_r + columns, inside, other=0.0).to(tl.float32)
    if dy is not None:
        factor = 1 + tl.load(scale + b * scale_b + r * scale_r + columns, inside, other=0.0).to(tl.float32)
    d_shift = tl.zeros([BLOCK_D], tl.float32)
    d_scale = tl.zeros([BLOCK_D], tl.float32)
    d_gate = tl.zeros([BLOCK_D], tl.float32)
    for i in tl.range(first, tl.minimum(first + TOKENS, T), num_stages=STAGES):
        token = tl.program_id(0).to(tl.int64) * T + i
        at = token * D + columns
        grad = tl.zeros([BLOCK_D], tl.float32)
        if dx_out is not None:
            grad += tl.load(dx_out + at, inside, other=0.0).to(tl.float32)
        if dy is not None:
            m = tl.load(mean + token)
            s = tl.load(rstd + token)
            upstream = tl.load(dy + at, inside, other=0.0).to(tl.float32)
            stream = tl.load(x + at, inside, other=0.0).to(tl.float32)
            normed = tl.where(inside, (stream - m) * s, 0.0)
            w = upstream * factor
            grad += s * (w - (tl.sum(w, 0) + normed * tl.sum(w * normed, 0)) / D)
            d_shift += upstream
            d_scale += upstream * normed
        if dx is not None:
            tl.store(dx + at, grad.to(dx.dtype.element_ty), inside)
        if dh is not None:
            if gate is not None:
                tl.store(dh + at, (g * grad).to(dh.dtype.element_ty), inside)
            else:
                tl.store(dh + at, grad.to(dh.dtype.element_ty), inside)
        if partial is not None and h is not None:
            d_gate += grad * tl.load(h + at, inside, other=0.0).to(tl.float32)
    if partial is not None:
        table = (tl.num_programs(0) * tl.num_programs(1)).to(tl.int64) * D
        sums = partial + (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * D + columns
        if dy is not None:
            tl.store(sums, d_shift, inside)
            tl.store(sums + table, d_scale, inside)
            sums += 2 * table
        if h is not None:
            tl.store(sums, d_gate, inside)


@jit
def _fold_kernel(partial, row, out, row_b, row_f, B, R, N, PER_FRAME, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """out[k, b, r] = sum of partial[k, b, n] over the n whose frame takes row r; PER_FRAME sums for each frame."""
    k_b = (tl.program_id(0) // R).to(tl.int64)
    r = tl.program_id(0) % R
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (columns < D)[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        takes = tl.load(row + (k_b % B) * row_b + (n // PER_FRAME) * row_f, n < N, other=0).to(tl.int64)
        mine = (n < N) & (takes == r)
        at = partial + (k_b * N + n)[:, None] * D + columns[None, :]
        total += tl.load(at, mine[:, None] & inside, other=0.0)
    tl.store(out + tl.program_id(0).to(tl.int64) * D + columns, tl.sum(total, 0), columns < D)


# ---- autograd --------------------------------------------------------------------------------------------------------


def _strides(*tensors: Tensor | None) -> list[int]:
    return [n for a in tensors for n in ((0, 0) if a is None else a.stride()[:2])]


def _sizes(x: Tensor, frames: int, sums: bool = False) -> tuple[tuple[int, int], tuple[int, int, int], dict]:
    """Grid, the sizes that the kernels take, and their options. sums: does the kernel add up the tables' gradients?

    Fewer tokens a program make more programs, but each program's sums cost as much as three tokens. Tokens and warps
    are an H100's choice, of those that bench/gpu.py's section `options` tries.
    """
    B, L, D = x.shape
    T, tokens = L // frames, OPTIONS.get("TOKENS", 32 if sums else 2)
    while T > 65535 * tokens:  # CUDA takes no more programs along the grid's second axis
        tokens *= 2
    block = max(16, triton.next_power_of_2(D))
    threads = min(block // (8 if sums else 16), 256)
    warps = max(threads // (32 if torch.version.hip is None else 64), 1)
    options = {"num_warps": warps} | OPTIONS | {"BLOCK_D": block, "TOKENS": tokens}
    return (B * frames, triton.cdiv(T, tokens)), (frames, T, D), options


class _Modulate(torch.autograd.Function):
    """(y, x_out) of x, h, gate, shift, scale; (x_out,) without shift and scale, (y,) without h."""

    @staticmethod
    def forward(ctx, x, h, gate, shift, scale, row, eps, dtype):
        x, h = (None if a is None else a.contiguous() for a in (x, h))
        gate, shift, scale = (a if a is None or a.stride(-1) == 1 else a.contiguous() for a in (gate, shift, scale))
        B, L, D = x.shape
        x_out = x.new_empty(B, L, D) if h is not None else None
        y = mean = rstd = None
        if scale is not None:
            y = x.new_empty(B, L, D, dtype=dtype or x.dtype)
            # not halves of one allocation: what a kernel writes into views, Inductor gathers with three more kernels
            mean, rstd = (x.new_empty(B, L, dtype=torch.float32) for _ in range(2))
        grid, sizes, options = _sizes(x, _frames(gate if scale is None else scale, row))
        _forward_kernel[grid](
            x, h, gate, shift, scale, row, y, x_out, mean, rstd,
            *_strides(gate, shift, scale, row), *sizes, eps, **options,
        )  # fmt: skip
        ctx.tables = any(ctx.needs_input_grad[2:5])
        normed = None if y is None else x if h is None else x_out
        ctx.save_for_backward(normed, h if ctx.tables and gate is not None else None, gate, scale, row, mean, rstd)
        ctx.dtypes = [None if a is None else a.dtype for a in (x, h, gate, shift, scale)]
        return tuple(a for a in (y, x_out) if a is not None)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        x, h, gate, scale, row, mean, rstd = ctx.saved_tensors
        x_dtype, h_dtype, *table_dtypes = ctx.dtypes
        gradients = [a.contiguous() for a in gradients]
        dy = gradients[0] if scale is not None else None
        dx_out = gradients[-1] if h_dtype is not None else None
        like = gradients[-1]
        # a gradient that equals one that exists is not written again
        dx = like.new_empty(like.shape, dtype=x_dtype) if dy is not None else None
        own_dh = h_dtype is not None and (gate is not None or h_dtype != x_dtype)
        dh = like.new_empty(like.shape, dtype=h_dtype) if own_dh else None
        table = gate if scale is None else scale
        grid, sizes, options = _sizes(like, _frames(table, row), ctx.tables)
        partial = None
        if ctx.tables:
            slots = 2 * (dy is not None) + (h is not None)
            partial = like.new_empty(slots, *grid, like.shape[2], dtype=torch.float32)
        _backward_kernel[grid](
            x, h, gate, scale, row, mean, rstd, dy, dx_out, dx, dh, partial,
            *_strides(gate, scale, row), *sizes, **options,
        )  # fmt: skip
        sums = [] if partial is None else list(_fold(partial, row, table))
        d_shift, d_scale = (sums.pop(0), sums.pop(0)) if sums and dy is not None else (None, None)
        d_tables = (sums.pop() if sums else None, d_shift, d_scale)
        d_tables = [None if a is None else a.to(dtype) for a, dtype in zip(d_tables, table_dtypes)]
        dx = dx_out if dx is None else dx
        return dx, dx if h_dtype is not None and dh is None else dh, *d_tables, None, None, None


def _fold(partial: Tensor, row: Tensor | None, table: Tensor) -> Tensor:
    """(tables, B * F, blocks, D) -> (tables, B, R, D): what the programs of the frames that take a row add up to."""
    if row is None:  # each row is one frame's; with a row a token there is one program for each, and nothing to add up
        return (partial.sum(2) if partial.shape[2] > 1 else partial).view(-1, *table.shape)
    tables, _, blocks, D = partial.shape
    B, R, _ = table.shape
    out = partial.new_empty(tables, B, R, D)
    grid, frames = (tables * B * R, triton.cdiv(D, 32)), row.shape[1]
    _fold_kernel[grid](
        partial, row, out, *row.stride(), B, R, frames * blocks, blocks, D, BLOCK_N=64, BLOCK_D=32, num_warps=4
    )
    return out


# ---- the functions ---------------------------------------------------------------------------------------------------


def implementation(device: torch.device) -> str:
    """Who computes: "triton" on CUDA, "torch" (the definitions) elsewhere and if KERNELS=torch is set.

    RuntimeError for CUDA without Triton: a slower path is never taken silently. ValueError for another KERNELS.
    """
    if KERNELS not in ("", "torch"):
        raise ValueError(f"KERNELS: expected torch, or unset it; got {KERNELS!r}")
    if KERNELS == "torch" or device.type != "cuda":
        return "torch"
    if triton is None:
        raise RuntimeError("CUDA tensors need Triton: pip install triton, or set KERNELS=torch (slower)")
    return "triton"


def _check_row(row: Tensor, R: int) -> None:
    """On the CPU alone: to read values back, a GPU would have to finish its work first, and a graph has none."""
    if row.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = map(int, row.aminmax())
        if low < 0 or high >= R:
            raise ValueError(f"row: expected values 0 .. {R - 1}, the rows of the tables, got {low} .. {high}")


def _check(row: Tensor | None, streams: dict[str, Tensor], tables: dict[str, Tensor], dtype: torch.dtype | None = None):
    """ValueError unless all streams are (B, L, D), all tables (B, R, D), and row (B, F) or None, on one device."""
    given = ({} if row is None else {"row": row}) | streams | tables
    for name, a in given.items():
        if not isinstance(a, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(a).__name__}")
    if len({a.device for a in given.values()}) > 1:
        places = ", ".join(f"{name} on {a.device}" for name, a in given.items())
        raise ValueError(f"expected all tensors on one device, got {places}")
    x, table = streams["x"], next(iter(tables.values()))
    if x.ndim != 3 or not x.numel() or x.shape[2] > MAX_WIDTH:
        raise ValueError(f"x: expected a non-empty (B, L, D), D at most {MAX_WIDTH}, got {tuple(x.shape)}")
    (B, L, D), R = x.shape, table.shape[1] or 1 if table.ndim == 3 else "R"
    for name, a in (streams | tables).items():
        expected = (B, L, D) if name in streams else (B, R, D)
        if a.shape != expected or not a.is_floating_point():
            raise ValueError(f"{name}: expected floating point {expected}, got {a.dtype} {tuple(a.shape)}")
    if dtype not in (None, *STREAMS, torch.float64):
        raise ValueError(f"dtype: expected bfloat16, float16 or float32, got {dtype}")
    if row is None:
        if L % R:
            raise ValueError(f"row: without it, expected tables of R rows that divide L={L} tokens, got R={R}")
        return
    if row.ndim != 2 or row.shape[0] != B or row.dtype not in ROWS:
        raise ValueError(f"row: expected an integer or bool (B={B}, F), got {row.dtype} {tuple(row.shape)}")
    if row.shape[1] == 0 or L % row.shape[1]:
        raise ValueError(f"row: expected a number of frames F that divides L={L} tokens, got F={row.shape[1]}")
    _check_row(row, R)


def _run(x, h, gate, shift, scale, row, eps=0.0, dtype=None) -> tuple[Tensor, ...]:
    """The kernels. Only the definitions take float64."""
    for name, a in {"x": x, "h": h}.items():
        if a is not None and a.dtype not in STREAMS:
            raise ValueError(f"{name}: expected bfloat16, float16 or float32, got {a.dtype}; KERNELS=torch takes it")
    if torch.compiler.is_compiling():  # a compiled graph launches on its own device
        return _Modulate.apply(x, h, gate, shift, scale, row, eps, dtype)
    with torch.cuda.device_of(x):  # Triton launches on the current one
        return _Modulate.apply(x, h, gate, shift, scale, row, eps, dtype)


def ln_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, row: Tensor | None = None, eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """LN(x) * (1 + scale[row]) + shift[row].

    x (B, L, D) bfloat16, float16 or float32, L = F * tokens a frame, frame-major, D up to 8192; shift, scale (B, R, D)
    float32; row (B, F) integer in 0 .. R-1, or bool, or None: frame f takes row f, so F = R. Returns (B, L, D) in
    `dtype`, x's own by default. ValueError for shapes, dtypes or devices that do not fit, and on the CPU for values of
    `row`. On CUDA they are not read back: a value out of range there makes the kernel read outside the tables.
    """
    _check(row, {"x": x}, {"shift": shift, "scale": scale}, dtype)
    if implementation(x.device) == "torch":
        return ln_modulate_ref(x, shift, scale, row, eps, dtype)
    return _run(x, None, None, shift, scale, row, eps, dtype)[0]


def residual_ln_modulate(
    x: Tensor, h: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, row: Tensor | None = None,
    eps: float = 1e-6, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x_out = x + gate[row] * h (gate None: x + h), y = ln_modulate(x_out). Returns (y, x_out), both (B, L, D).

    h (B, L, D) floating point, gate (B, R, D) float32 or None; x_out in x's dtype, y in `dtype`, x's own by default.
    The rest is as in `ln_modulate`. y is the norm of x_out after its rounding to x's dtype.
    """
    tables = {"shift": shift, "scale": scale} | ({} if gate is None else {"gate": gate})
    _check(row, {"x": x, "h": h}, tables, dtype)
    if implementation(x.device) == "torch":
        return residual_ln_modulate_ref(x, h, gate, shift, scale, row, eps, dtype)
    return _run(x, h, gate, shift, scale, row, eps, dtype)


def gate_residual(x: Tensor, h: Tensor, gate: Tensor, row: Tensor | None = None) -> Tensor:
    """x + gate[row] * h: x, h (B, L, D), gate (B, R, D) float32, row (B, F) or None. Returns (B, L, D) in x's dtype."""
    _check(row, {"x": x, "h": h}, {"gate": gate})
    if implementation(x.device) == "torch":
        return gate_residual_ref(x, h, gate, row)
    return _run(x, h, gate, None, None, row)[0]


# ---- check and time --------------------------------------------------------------------------------------------------

KERNEL = (ln_modulate, residual_ln_modulate, gate_residual)
DEFINITION = (ln_modulate_ref, residual_ln_modulate_ref, gate_residual_ref)
FORMS = {  # what is called, of KERNEL or DEFINITION, and the streams that forward and backward move at least
    "ln_modulate": (lambda f, x, h, gate, *rest: (f[0](x, *rest),), 5),
    "residual_ln_modulate": (lambda f, *rest: f[1](*rest), 10),
    "residual_ln_modulate, no gate": (lambda f, x, h, gate, *rest: f[1](x, h, None, *rest), 8),
    "gate_residual": (lambda f, x, h, gate, shift, scale, row, *_: (f[2](x, h, gate, row),), 6),
}


def _case(shape: tuple[int, int, int, int], dtype: torch.dtype, device) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """x, h, gate, shift, scale, which ask for gradients; row, of 0 and 1; and gradients of two outputs."""
    B, frames, tokens, D = shape
    x, h, *gradients = torch.randn(4, B, frames * tokens, D, device=device).to(dtype)
    tables = torch.randn(B, 2, 3, D, device=device).unbind(2)
    leaves = [a.detach().requires_grad_() for a in (x, h, *tables)]
    return leaves, torch.randint(0, 2, (B, frames), dtype=torch.int32, device=device), gradients


def _step(call, functions: tuple, leaves: list[Tensor], row: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of all inputs that the function reads."""
    outputs = call(functions, *leaves, row)
    found = torch.autograd.grad(outputs, leaves, weights[: len(outputs)], allow_unused=True)
    return [*outputs, *(a for a in found if a is not None)]


def check(device: torch.device, shape: tuple[int, int, int, int] = (2, 5, 7, 200)) -> None:
    """Largest error against float64 of outputs and gradients: at most twice the definition's in the same dtype."""
    for dtype in STREAMS:
        leaves, row, weights = _case(shape, dtype, device)
        exact = [a.detach().double().requires_grad_() for a in leaves]
        for name, (call, _) in FORMS.items():
            truth = _step(call, DEFINITION, exact, row, [a.double() for a in weights])
            error, eager = (
                max((a - b).abs().max().item() for a, b in zip(_step(call, f, leaves, row, weights), truth))
                for f in (KERNEL, DEFINITION)
            )
            print(f"{name:32s} {str(dtype)[6:]:9s} error {error:.1e}, of the definition {eager:.1e}")
            assert error <= 2 * eager + 1e-6, "expected at most twice the definition's error"


def time(device: torch.device, shape: tuple[int, int, int, int] = (2, 13, 576, 1536)) -> dict[str, dict[str, float]]:
    """Milliseconds of forward and backward at Wan2.1-1.3B's shape in bfloat16, in a CUDA graph: no Python is timed."""
    leaves, row, weights = _case(shape, torch.bfloat16, device)
    ways = {"kernel": KERNEL, "eager": DEFINITION, "torch.compile": tuple(map(torch.compile, DEFINITION))}
    took = {}
    for name, (call, streams) in FORMS.items():
        runs = {way: partial(_step, call, f, leaves, row, weights) for way, f in ways.items()}
        took[name] = {way: triton.testing.do_bench_cudagraph(run) for way, run in runs.items()}
        for way, ms in took[name].items():
            print(f"{name:32s} {way:13s} {ms:.3f} ms, {streams * leaves[0].nbytes / ms / 1e6:5.0f} GB/s")
    return took


if __name__ == "__main__":
    if torch.cuda.is_available():
        check(torch.device("cuda"))
        time(torch.device("cuda"))
    else:
        check(torch.device("cpu"))
        print("no CUDA device: what was checked is the definition, on the CPU; the kernels were not run, nor timed")

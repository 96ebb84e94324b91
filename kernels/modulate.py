"""Per-frame timestep modulation (adaLN): residual, gate, LayerNorm, scale and shift in one pass, forward and backward.

    ln_modulate           y     = LN(x) * (1 + scale[row]) + shift[row]
    residual_ln_modulate  x_out = x + gate[row] * h,   y = LN(x_out) * (1 + scale[row]) + shift[row]
    gate_residual         x_out = x + gate[row] * h

LN has no affine part; its statistics, the modulation and every product with it are float32, whatever the
streams' dtypes.

Where it is used: every block of model.py. `row (B, F)` says which row of the table `(B, R, D)` a latent frame takes:

    R = 1, row = 0          the ordinary DiT, one time for the clip
    R = 2, row = cond_mask  the continuation model: row 0 is time t, row 1 is time 0 (the given, clean frames)
    R = F, row = 0 .. F-1   any time for each frame

Why fused: each of these is bound by memory traffic, and PyTorch's separate operations move about three times the bytes
that are needed, ten times in bfloat16 (kernels/README.md counts them). The table is never expanded to the
L = F * (tokens a frame) tokens: a program works on tokens of one frame and loads that frame's row once. At Wan2.1-1.3B
and 49x288x512 it is, by arithmetic, 74 KB a sample and block at R = 2; one row for each token is 276 MB.

Kept for backward: the normed stream (x or x_out), two float32 numbers a token, and h only if a table needs a gradient.
Gradients of the tables are partial sums, one a program, folded by a second kernel: no atomics, the same bits every run.

`python modulate.py` checks and times the file. The functions named `*_ref` are the definition, in PyTorch: they run on
CPU, and on CUDA with KERNELS=torch in the environment. The file needs torch, and on CUDA triton; it works copied alone.
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
except ImportError:  # no Triton for this platform: the definitions remain

    def jit(function):
        return function

    triton = tl = None

KERNELS = os.environ.get("KERNELS", "")  # "torch": the definitions on every device
MAX_WIDTH = 8192  # largest D
STREAMS = (torch.bfloat16, torch.float16, torch.float32)  # dtypes that the kernels take
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


# ---- the definition --------------------------------------------------------------------------------------------------


def _wide(a: Tensor) -> Tensor:
    """float32, or float64 where that is what came in: nothing is computed in less."""
    return a if a.dtype == torch.float64 else a.float()


def _take(table: Tensor, row: Tensor) -> Tensor:
    """Rows of a table: (B, R, D), (B, F) -> (B, F, 1, D), ready to broadcast over a frame's tokens."""
    if table.shape[1] == 1 or table.stride(1) == 0:  # one row, or one row expanded: nothing to gather
        return _wide(table[:, :1]).unsqueeze(1)
    index = row.long().unsqueeze(-1).expand(-1, -1, table.shape[-1])
    return _wide(table).gather(1, index).unsqueeze(2)


def _by_frame(x: Tensor, row: Tensor) -> Tensor:
    """(B, L, D) -> (B, F, L / F, D)"""
    return _wide(x).unflatten(1, (row.shape[1], -1))


def ln_modulate_ref(x: Tensor, shift: Tensor, scale: Tensor, row: Tensor, eps=1e-6, dtype=None) -> Tensor:
    normed = F.layer_norm(_by_frame(x, row), x.shape[-1:], eps=eps)
    return torch.addcmul(_take(shift, row), normed, 1 + _take(scale, row)).flatten(1, 2).to(dtype or x.dtype)


def gate_residual_ref(x: Tensor, h: Tensor, gate: Tensor | None, row: Tensor) -> Tensor:
    if gate is None:
        return (_wide(x) + _wide(h)).to(x.dtype)
    return torch.addcmul(_by_frame(x, row), _take(gate, row), _by_frame(h, row)).flatten(1, 2).to(x.dtype)


def residual_ln_modulate_ref(
    x: Tensor, h: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, row: Tensor, eps=1e-6, dtype=None
) -> tuple[Tensor, Tensor]:
    x_out = gate_residual_ref(x, h, gate, row)
    return ln_modulate_ref(x_out, shift, scale, row, eps, dtype), x_out


# ---- the kernels -----------------------------------------------------------------------------------------------------
# An argument that is None is left out when the kernel is compiled: one kernel serves the three functions.


@jit
def _forward_kernel(
    x, h, gate, shift, scale, row, y, x_out, mean, rstd,
    gate_b, gate_r, shift_b, shift_r, scale_b, scale_r, row_b, row_f,
    FRAMES, T, D, EPS: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One program: TOKENS tokens of one frame. Without h: y alone. Without y: x_out alone. T: tokens a frame."""
    b = (tl.program_id(0) // FRAMES).to(tl.int64)
    f = (tl.program_id(0) % FRAMES).to(tl.int64)
    first = tl.program_id(1) * TOKENS
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    r = tl.load(row + b * row_b + f * row_f).to(tl.int64)
    if gate is not None:
        g = tl.load(gate + b * gate_b + r * gate_r + columns, inside, other=0.0).to(tl.float32)
    if y is not None:
        factor = 1 + tl.load(scale + b * scale_b + r * scale_r + columns, inside, other=0.0).to(tl.float32)
        offset = tl.load(shift + b * shift_b + r * shift_r + columns, inside, other=0.0).to(tl.float32)
    for i in range(first, tl.minimum(first + TOKENS, T)):
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
    FRAMES, T, D, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One program: TOKENS tokens of one frame, and their sums for the tables: partial (tables, programs, D)."""
    b = (tl.program_id(0) // FRAMES).to(tl.int64)
    f = (tl.program_id(0) % FRAMES).to(tl.int64)
    first = tl.program_id(1) * TOKENS
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    r = tl.load(row + b * row_b + f * row_f).to(tl.int64)
    if gate is not None:
        g = tl.load(gate + b * gate_b + r * gate_r + columns, inside, other=0.0).to(tl.float32)
    if dy is not None:
        factor = 1 + tl.load(scale + b * scale_b + r * scale_r + columns, inside, other=0.0).to(tl.float32)
    d_shift = tl.zeros([BLOCK_D], tl.float32)
    d_scale = tl.zeros([BLOCK_D], tl.float32)
    d_gate = tl.zeros([BLOCK_D], tl.float32)
    for i in range(first, tl.minimum(first + TOKENS, T)):
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
        mine = tl.load(row + (k_b % B) * row_b + (n // PER_FRAME) * row_f, n < N, other=-1) == r
        at = partial + (k_b * N + n)[:, None] * D + columns[None, :]
        total += tl.load(at, mine[:, None] & inside, other=0.0)
    tl.store(out + tl.program_id(0).to(tl.int64) * D + columns, tl.sum(total, 0), columns < D)


# ---- autograd --------------------------------------------------------------------------------------------------------


def _strides(*tensors: Tensor | None) -> list[int]:
    return [n for a in tensors for n in ((0, 0) if a is None else a.stride()[:2])]


# Registers a thread, forward and backward, that hold what a program works on without spilling, for streams of two bytes
# and for float32 ones: ptxas takes more if it may, and fewer programs then run side by side.
REGISTERS = {"gate": ((32, 40), (40, 40)), "ln": ((40, 64), (40, 64)), "residual": ((48, 80), (64, 128))}


def _sizes(x: Tensor, row: Tensor, form: str, *streams: Tensor | None, sums: bool | None = None):
    """Grid, the sizes that the kernels take, and their options. sums: None forward; backward, with sums for the tables?

    Fewer tokens a program make more programs, but each program's sums are as long as three tokens' rows.
    """
    B, L, D = x.shape
    frames = row.shape[1]
    tokens = 32 if sums else 8
    block = max(16, triton.next_power_of_2(D))
    nvidia = torch.version.hip is None
    # eight columns a thread: 16-byte accesses; the sums of more than 4096 columns do not fit a 1024-thread program
    threads = min(block // 8, 512 if sums or not nvidia else 1024)
    options = {"BLOCK_D": block, "TOKENS": tokens, "num_warps": max(threads // (32 if nvidia else 64), 1)}
    if nvidia and threads * 8 >= block and not torch.compiler.is_compiling():  # which knows num_warps, not maxnreg
        wide = any(a is not None and a.element_size() > 2 for a in streams)
        options["maxnreg"] = min(REGISTERS[form][wide][sums is not None], 65536 // max(threads, 32))
    return (B * frames, triton.cdiv(L // frames, tokens)), (frames, L // frames, D), options


class _Modulate(torch.autograd.Function):
    """(y, x_out) of x, h, gate, shift, scale; without shift and scale (x_out,), without h (y,): no None."""

    @staticmethod
    def forward(ctx, x, h, gate, shift, scale, row, eps, dtype):
        x, h = (None if a is None else a.contiguous() for a in (x, h))
        gate, shift, scale = (a if a is None or a.stride(-1) == 1 else a.contiguous() for a in (gate, shift, scale))
        B, L, D = x.shape
        x_out = x.new_empty(B, L, D) if h is not None else None
        y = mean = rstd = None
        if scale is not None:
            y = x.new_empty(B, L, D, dtype=dtype or x.dtype)
            mean, rstd = x.new_empty(2, B, L, dtype=torch.float32)
        form = "gate" if y is None else "ln" if h is None else "residual"
        grid, sizes, options = _sizes(x, row, form, x, h, y)
        _forward_kernel[grid](
            x, h, gate, shift, scale, row, y, x_out, mean, rstd,
            *_strides(gate, shift, scale, row), *sizes, eps, **options,
        )  # fmt: skip
        tables = any(ctx.needs_input_grad[2:5])
        normed = None if y is None else x if h is None else x_out
        ctx.save_for_backward(normed, h if tables and gate is not None else None, gate, scale, row, mean, rstd)
        ctx.tables, ctx.form, ctx.x_dtype, ctx.h_dtype = tables, form, x.dtype, None if h is None else h.dtype
        ctx.table_dtypes = [None if a is None else a.dtype for a in (gate, shift, scale)]
        return tuple(a for a in (y, x_out) if a is not None)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        x, h, gate, scale, row, mean, rstd = ctx.saved_tensors
        gradients = [a.contiguous() for a in gradients]
        dy = gradients.pop(0) if ctx.form != "gate" else None
        dx_out = gradients.pop() if ctx.form != "ln" else None
        like = dy if dx_out is None else dx_out
        table = gate if scale is None else scale
        # where a gradient is one that exists already, nothing is written
        dx = like.new_empty(like.shape, dtype=ctx.x_dtype) if dy is not None else None
        own_dh = ctx.h_dtype is not None and (gate is not None or ctx.h_dtype != ctx.x_dtype)
        dh = like.new_empty(like.shape, dtype=ctx.h_dtype) if own_dh else None
        grid, sizes, options = _sizes(like, row, ctx.form, x, h, dy, dx_out, dx, dh, sums=ctx.tables)
        partial = None
        if ctx.tables:
            slots = 2 * (dy is not None) + (h is not None)
            partial = like.new_empty(slots, *grid, like.shape[2], dtype=torch.float32)
        _backward_kernel[grid](
            x, h, gate, scale, row, mean, rstd, dy, dx_out, dx, dh, partial,
            *_strides(gate, scale, row), *sizes, **options,
        )  # fmt: skip
        tables = [] if partial is None else list(_fold(partial, row, table.shape[1]))
        d_shift, d_scale = (tables.pop(0), tables.pop(0)) if tables and dy is not None else (None, None)
        d_gate = tables.pop() if tables else None
        d_tables = (d_gate, d_shift, d_scale)
        d_tables = [None if a is None else a.to(dtype) for a, dtype in zip(d_tables, ctx.table_dtypes)]
        dx = dx_out if dx is None else dx
        return dx, dx if ctx.h_dtype is not None and dh is None else dh, *d_tables, None, None, None


def _fold(partial: Tensor, row: Tensor, R: int) -> Tensor:
    """(tables, B * F, blocks, D) -> (tables, B, R, D)"""
    tables, _, blocks, D = partial.shape
    B, frames = row.shape
    out = partial.new_empty(tables, B, R, D)
    grid = (tables * B * R, triton.cdiv(D, 32))
    _fold_kernel[grid](
        partial, row, out, *row.stride(), B, R, frames * blocks, blocks, D, BLOCK_N=64, BLOCK_D=32, num_warps=4
    )
    return out


# ---- the functions ---------------------------------------------------------------------------------------------------


def implementation(device: torch.device) -> str:
    """Who computes: "triton" on CUDA devices, "torch" (the definitions) on others and where KERNELS=torch is set.

    RuntimeError for CUDA without Triton: a slower path is never taken silently. ValueError for another KERNELS.
    """
    if KERNELS not in ("", "torch"):
        raise ValueError(f"KERNELS: expected torch, or unset it; got {KERNELS!r}")
    if KERNELS == "torch" or device.type != "cuda":
        return "torch"
    if triton is None:
        raise RuntimeError("CUDA tensors need Triton: pip install triton, or set KERNELS=torch (slower)")
    return "triton"


def _check_row(row: Tensor, B: int, L: int, R: int) -> None:
    if row.ndim != 2 or row.shape[0] != B or row.dtype not in INTEGERS:
        raise ValueError(f"row: expected an integer (B={B}, F), got {row.dtype} {tuple(row.shape)}")
    if row.shape[1] == 0 or L % row.shape[1]:
        raise ValueError(f"row: expected a number of frames F that divides L={L} tokens, got F={row.shape[1]}")
    if torch.compiler.is_compiling() or (row.is_cuda and torch.cuda.is_current_stream_capturing()):
        return  # a graph cannot look at values
    version = None if row.is_inference() else row._version  # inference tensors do not tell whether they changed
    if version is None or getattr(row, "_read", [None])[0] != version:
        # kept on the tensor: once for a tensor and not once a call, as on CUDA it waits for the device
        row._read = [version, *map(int, row.aminmax())]
    _, low, high = row._read
    if low < 0 or high >= R:
        raise ValueError(f"row: expected values 0 .. {R - 1}, the rows of the tables, got {low} .. {high}")


def _check(x: Tensor, row: Tensor, tables: dict[str, Tensor | None], h: Tensor | None = None) -> None:
    if len(tables) == 3 and tables["gate"] is None:  # residual_ln_modulate's may be None
        del tables["gate"]
    streams = {"x": x} if h is None else {"x": x, "h": h}
    for name, a in (streams | tables | {"row": row}).items():
        if not isinstance(a, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(a).__name__}")
    for name, a in (streams | tables).items():
        if a.ndim != 3 or not a.is_floating_point() or not a.numel():
            sizes = "(B, L, D)" if name in streams else "(B, R, D)"
            raise ValueError(f"{name}: expected a non-empty floating point {sizes}, got {a.dtype} {tuple(a.shape)}")
    if len({a.device for a in (row, *streams.values(), *tables.values())}) != 1:
        places = ", ".join(f"{name} on {a.device}" for name, a in ({"row": row} | streams | tables).items())
        raise ValueError(f"expected one device for all, got {places}")
    B, L, D = x.shape
    if D > MAX_WIDTH:
        raise ValueError(f"x: expected a width D of at most {MAX_WIDTH}, got {D}")
    if h is not None and h.shape != x.shape:
        raise ValueError(f"h: expected x's {tuple(x.shape)}, got {tuple(h.shape)}")
    R = next(iter(tables.values())).shape[1]
    for name, a in tables.items():
        if a.shape != (B, R, D):
            raise ValueError(f"{name}: expected (B={B}, R, D={D}), one R for all tables, got {tuple(a.shape)}")
    _check_row(row, B, L, R)


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype not in (None, *STREAMS, torch.float64):
        raise ValueError(f"dtype: expected bfloat16, float16 or float32, got {dtype}")


def _run(x, h, gate, shift, scale, row, eps, dtype) -> tuple[Tensor, ...]:
    """The kernels. float64 is the definitions' alone."""
    for name, a in {"x": x, "h": h}.items():
        if a is not None and a.dtype not in STREAMS:
            raise ValueError(f"{name}: expected bfloat16, float16 or float32, got {a.dtype}; KERNELS=torch takes it")
    if torch.compiler.is_compiling():  # a compiled graph launches on its own device
        return _Modulate.apply(x, h, gate, shift, scale, row, eps, dtype)
    with torch.cuda.device_of(x):  # Triton launches on the current one
        return _Modulate.apply(x, h, gate, shift, scale, row, eps, dtype)


def ln_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, row: Tensor, eps: float = 1e-6, dtype: torch.dtype | None = None
) -> Tensor:
    """LN(x) * (1 + scale[row]) + shift[row].

    x (B, L, D) bfloat16, float16 or float32, L = F * tokens a frame, frame-major, D up to 8192; shift, scale (B, R, D)
    float32; row (B, F) integer in 0 .. R-1. Returns (B, L, D) in `dtype`, x's own by default. ValueError for shapes,
    dtypes, devices or rows that do not fit; inside torch.compile and CUDA graphs the values of `row` are not looked at.
    """
    _check(x, row, {"shift": shift, "scale": scale})
    _check_dtype(dtype)
    if implementation(x.device) == "torch":
        return ln_modulate_ref(x, shift, scale, row, eps, dtype)
    return _run(x, None, None, shift, scale, row, eps, dtype)[0]


def residual_ln_modulate(
    x: Tensor, h: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, row: Tensor, eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x_out = x + gate[row] * h (gate None: x + h), y = ln_modulate(x_out). Returns (y, x_out), both (B, L, D).

    h (B, L, D) floating point, x_out in x's dtype, y in `dtype` (x's by default), gate (B, R, D) float32 or None; the
    rest as in `ln_modulate`. y is the norm of x_out as it is rounded to x's dtype.
    """
    _check(x, row, {"gate": gate, "shift": shift, "scale": scale}, h)
    _check_dtype(dtype)
    if implementation(x.device) == "torch":
        return residual_ln_modulate_ref(x, h, gate, shift, scale, row, eps, dtype)
    return _run(x, h, gate, shift, scale, row, eps, dtype)


def gate_residual(x: Tensor, h: Tensor, gate: Tensor, row: Tensor) -> Tensor:
    """x + gate[row] * h: x, h (B, L, D), gate (B, R, D) float32, row (B, F). Returns (B, L, D) in x's dtype."""
    _check(x, row, {"gate": gate}, h)
    if implementation(x.device) == "torch":
        return gate_residual_ref(x, h, gate, row)
    return _run(x, h, gate, None, None, row, 0.0, None)[0]


# ---- check and time --------------------------------------------------------------------------------------------------


def _case(shape: tuple[int, int, int, int], dtype: torch.dtype, device) -> tuple[list[Tensor], Tensor]:
    """x, h, gate, shift, scale, all asking for gradients, and row: every frame takes row 0 or 1."""
    B, frames, tokens, D = shape
    streams = torch.randn(2, B, frames * tokens, D, device=device).to(dtype)
    tables = torch.randn(B, 2, 3, D, device=device).unbind(2)
    leaves = [a.detach().requires_grad_() for a in (*streams, *tables)]
    return leaves, torch.randint(0, 2, (B, frames), dtype=torch.int32, device=device)


FORMS = {  # name -> (x, h, gate, shift, scale, row) to (y, x_out), by the kernels' functions and by the definitions
    "ln_modulate": (
        lambda x, h, gate, shift, scale, row: (ln_modulate(x, shift, scale, row), None),
        lambda x, h, gate, shift, scale, row: (ln_modulate_ref(x, shift, scale, row), None),
    ),
    "residual_ln_modulate": (residual_ln_modulate, residual_ln_modulate_ref),
    "residual_ln_modulate, gate None": (
        lambda x, h, gate, *rest: residual_ln_modulate(x, h, None, *rest),
        lambda x, h, gate, *rest: residual_ln_modulate_ref(x, h, None, *rest),
    ),
    "gate_residual": (
        lambda x, h, gate, shift, scale, row: (None, gate_residual(x, h, gate, row)),
        lambda x, h, gate, shift, scale, row: (None, gate_residual_ref(x, h, gate, row)),
    ),
}

# Streams read and written, forward and backward, if each is read or written once.
PASSES = {"ln_modulate": 5, "residual_ln_modulate": 10, "residual_ln_modulate, gate None": 8, "gate_residual": 6}


def _step(function, leaves: list[Tensor], row: Tensor, weights: Tensor) -> list[Tensor]:
    """Outputs, and the gradients of all inputs that the function reads."""
    outputs = [a for a in function(*leaves, row) if a is not None]
    gradients = torch.autograd.grad(outputs, leaves, list(weights[: len(outputs)]), allow_unused=True)
    return outputs + [a for a in gradients if a is not None]


def check(device: torch.device, shape: tuple[int, int, int, int] = (2, 5, 7, 200)) -> None:
    """Largest error against float64 of every output and gradient, ours beside the definition's in the same dtype."""
    for dtype in STREAMS:
        leaves, row = _case(shape, dtype, device)
        weights = torch.randn(2, *leaves[0].shape, device=device).to(dtype)
        exact = [a.detach().double().requires_grad_() for a in leaves]
        for name, (ours, definition) in FORMS.items():
            truth = _step(definition, exact, row, weights.double())
            error, eager = (
                max((a - b).abs().max().item() for a, b in zip(_step(f, leaves, row, weights), truth))
                for f in (ours, definition)
            )
            print(f"{name:32s} {str(dtype)[6:]:9s} error {error:.1e}, of the definition {eager:.1e}")
            assert error <= 2 * eager + 1e-6, "expected at most twice the definition's error"


def _bench(name: str, runs: dict, least: int) -> dict[str, float]:
    """Milliseconds of each way, the better of two rounds; printed with the rate at which `least` bytes would move."""
    rounds = [{way: triton.testing.do_bench(run) for way, run in runs.items()} for _ in range(2)]
    took = {way: min(r[way] for r in rounds) for way in runs}
    for way, ms in took.items():
        print(f"{name:32s} {way:13s} {ms:.3f} ms, {least / ms / 1e6:5.0f} GB/s, {ms / took['kernel']:.2f}x the kernel")
    return took


def time(device: torch.device, shape: tuple[int, int, int, int] = (2, 13, 576, 1536)) -> dict[str, dict[str, float]]:
    """Forward and backward at Wan2.1-1.3B's shape, in bfloat16: ours, the definition, torch.compile of it."""
    leaves, row = _case(shape, torch.bfloat16, device)
    weights = torch.randn(2, *leaves[0].shape, device=device).bfloat16()
    took = {}
    for name, (ours, definition) in FORMS.items():
        ways = {"kernel": ours, "eager": definition, "torch.compile": torch.compile(definition)}
        runs = {way: lambda f=f: _step(f, leaves, row, weights) for way, f in ways.items()}
        took[name] = _bench(name, runs, PASSES[name] * leaves[0].nbytes)
    return took


if __name__ == "__main__":
    if torch.cuda.is_available():
        check(torch.device("cuda"))
        time(torch.device("cuda"))
    else:
        check(torch.device("cpu"))
        print("no CUDA device: what was checked is the definition, on the CPU; the kernels were not run, nor timed")

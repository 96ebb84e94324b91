"""Per-frame timestep modulation (adaLN): LayerNorm, shift, scale and gate, one table row a latent frame.

    ln_modulate           y     = LN(x) * (1 + scale[row]) + shift[row]
    residual_ln_modulate  x_out = x + gate[row] * h,   y = LN(x_out) * (1 + scale[row]) + shift[row]
    gate_residual         x_out = x + gate[row] * h

LN has no affine part; its statistics, the modulation and every product with it are float32, whatever the
stream's dtype.

Where it is used: every block of model.py. `row (B, F)` says which row of the table `(B, R, D)` a latent frame takes:

    R = 1, row = 0          the ordinary DiT, one time for the clip
    R = 2, row = cond_mask  the continuation model: row 0 is time t, row 1 is time 0 (the given, clean frames)
    R = F, row = 0 .. F-1   any time for each frame

The table is never expanded to the L = F * (tokens a frame) tokens: a token of frame f reads row[b, f] of it. At
Wan2.1-1.3B and 49x288x512 that is, by arithmetic, 74 KB a sample and block at R = 2; one for each token is 276 MB.

The functions named `*_ref` are the definition, in PyTorch; they run on CPU and on CUDA, and autograd
differentiates them. The file needs torch only and works copied alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_WIDTH = 8192  # largest D


def _take(table: Tensor, row: Tensor) -> Tensor:
    """Rows of a table: (B, R, D), (B, F) -> (B, F, 1, D) float32, ready to broadcast over a frame's tokens."""
    if table.shape[1] == 1 or table.stride(1) == 0:  # one row, or one row expanded: nothing to gather
        return table[:, :1].float().unsqueeze(1)
    index = row.long().unsqueeze(-1).expand(-1, -1, table.shape[-1])
    return table.float().gather(1, index).unsqueeze(2)


def _by_frame(x: Tensor, row: Tensor) -> Tensor:
    """(B, L, D) -> (B, F, L / F, D)"""
    return x.unflatten(1, (row.shape[1], -1))


def ln_modulate_ref(x: Tensor, shift: Tensor, scale: Tensor, row: Tensor, eps=1e-6, dtype=None) -> Tensor:
    normed = F.layer_norm(_by_frame(x, row).float(), x.shape[-1:], eps=eps)
    return torch.addcmul(_take(shift, row), normed, 1 + _take(scale, row)).flatten(1, 2).to(dtype or x.dtype)


def gate_residual_ref(x: Tensor, h: Tensor, gate: Tensor | None, row: Tensor) -> Tensor:
    if gate is None:
        return (x.float() + h.float()).to(x.dtype)
    added = torch.addcmul(_by_frame(x, row).float(), _take(gate, row), _by_frame(h, row).float())
    return added.flatten(1, 2).to(x.dtype)


def residual_ln_modulate_ref(
    x: Tensor, h: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, row: Tensor, eps=1e-6, dtype=None
) -> tuple[Tensor, Tensor]:
    x_out = gate_residual_ref(x, h, gate, row)
    return ln_modulate_ref(x_out, shift, scale, row, eps, dtype), x_out


def _check(x: Tensor, row: Tensor, tables: dict[str, Tensor | None], h: Tensor | None = None) -> None:
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"x: expected a floating point (B, L, D), got {x.dtype} {tuple(x.shape)}")
    B, L, D = x.shape
    if D > MAX_WIDTH:
        raise ValueError(f"x: expected a width D of at most {MAX_WIDTH}, got {D}")
    if row.ndim != 2 or row.shape[0] != B or row.is_floating_point():
        raise ValueError(f"row: expected an integer (B={B}, F), got {row.dtype} {tuple(row.shape)}")
    if row.shape[1] == 0 or L % row.shape[1]:
        raise ValueError(f"row: expected a number of frames F that divides L={L} tokens, got F={row.shape[1]}")
    if h is not None and (h.shape != x.shape or not h.is_floating_point()):
        raise ValueError(f"h: expected x's {x.dtype} {tuple(x.shape)}, got {h.dtype} {tuple(h.shape)}")
    rows = {name: table.shape[1] if table.ndim == 3 else None for name, table in tables.items() if table is not None}
    for name, table in tables.items():
        if table is None:
            continue
        if table.ndim != 3 or table.shape[0] != B or table.shape[2] != D or len(set(rows.values())) != 1:
            raise ValueError(f"{name}: expected (B={B}, R, D={D}), one R for all tables, got {tuple(table.shape)}")
        if table.device != x.device or row.device != x.device:
            raise ValueError(
                f"expected one device for all, got x on {x.device}, {name} on {table.device}, row on {row.device}"
            )


def ln_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, row: Tensor, eps: float = 1e-6, dtype: torch.dtype | None = None
) -> Tensor:
    """LN(x) * (1 + scale[row]) + shift[row].

    x (B, L, D) bf16/fp16/fp32, L = F * tokens a frame, frame-major; shift, scale (B, R, D) float32;
    row (B, F) integer in 0 .. R-1. Returns (B, L, D) in x's dtype. ValueError for shapes that do not fit.
    """
    _check(x, row, {"shift": shift, "scale": scale})
    return ln_modulate_ref(x, shift, scale, row, eps, dtype)


def residual_ln_modulate(
    x: Tensor, h: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, row: Tensor, eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """x_out = x + gate[row] * h (gate None: x + h), y = ln_modulate(x_out). Returns (y, x_out), both (B, L, D).

    h (B, L, D) in x's dtype, gate (B, R, D) float32 or None; the rest as in `ln_modulate`.
    """
    _check(x, row, {"gate": gate, "shift": shift, "scale": scale}, h)
    return residual_ln_modulate_ref(x, h, gate, shift, scale, row, eps, dtype)


def gate_residual(x: Tensor, h: Tensor, gate: Tensor, row: Tensor) -> Tensor:
    """x + gate[row] * h: x, h (B, L, D), gate (B, R, D) float32, row (B, F). Returns (B, L, D) in x's dtype."""
    _check(x, row, {"gate": gate}, h)
    return gate_residual_ref(x, h, gate, row)

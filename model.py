"""The video diffusion transformer: Wan2.1's text-to-video architecture under Wan's own parameter names, and LoRA on it.

    v = DiT(config)(x_t, t, text)              one time t for the clip, (B,)
    v = DiT(config)(x_t, t, text)              a time for each latent frame, (B, F)
    v = DiT(config)(x_t, t, text, cond_mask)   continuation: frames with cond_mask are given (clean) and see time 0
    v = Continuation(net, x0, text, n)(x_t, t) the same for a solver's many calls: what they share is computed once

The time convention is flow.py's: t in [0, 1], 0 = data, 1 = noise; the network itself is fed 1000 t, as Wan was
trained.

Read it in this order: `DiTConfig`, `DiT.forward`, `Block.forward`, then the small parts above them, LoRA, files.
Architecture facts are from the Wan2.1 release (github.com/Wan-Video/Wan2.1, wan/modules/model.py, Apache-2.0), restated
in this project's own code and held to its outputs by tests/test_golden.py.

dtype policy, in one place: the residual stream, modulation, norms and rotary embedding are float32 (the RoPE table is
computed in float64); matrix products and attention run in the weights' dtype, bfloat16 or float32. A bfloat16 model
keeps in float32 what Wan does, `FLOAT32`: time embedding, modulation tables, norms and head. LoRA weights are float32
masters.

The file works copied, with kernels/ beside it: `load_model(path)` reads Wan's checkpoints and diffusers'.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from kernels.modulate import gate_residual, ln_modulate, residual_ln_modulate
from kernels.norm_rope import norm_rope

TASK_PROMPT = "task_prompt."  # prefix of the only parameters that Wan does not have
PLACES = ("text", "frame")  # where task prompts are added
ATTENTION = ("full", "prefix")  # of a continuation model: every frame sees all; given frames see given frames alone


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Sizes of a DiT, named as in Wan's config.json. Defaults are those that Wan2.1's 1.3B and 14B share."""

    dim: int  # width D of the residual stream
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 16  # latent channels C
    out_dim: int = 16
    text_dim: int = 4096
    text_len: int = 512  # text tokens S that the network sees; shorter text is padded with zeros, which it attends to
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    frames: int = 0  # latent frames that have an embedding of their place in the clip; 0, as in Wan: none


PRESETS = {
    "tiny": DiTConfig(
        96, 192, 3, 3, in_dim=28, out_dim=28, text_dim=32, text_len=24, freq_dim=64, patch_size=(1, 1, 1), frames=13
    ),
    "1.3b": DiTConfig(1536, 8960, 12, 30),
    "14b": DiTConfig(5120, 13824, 40, 40),
}
PRESETS["a14b"] = PRESETS["14b"]  # each of Wan2.2-T2V-A14B's two experts: Wan-Video/Wan2.2, configs/wan_t2v_A14B.py


class LowRank(nn.Module):
    """What a LoRA adds to one layer: scale · (x Aᵀ) Bᵀ, scale = alpha / rank."""

    def __init__(self, A: Tensor, B: Tensor, scale: float):
        super().__init__()
        self.A, self.B = nn.Parameter(A.float()), nn.Parameter(B.float())  # (rank, in), (out, rank)
        self.scale = scale
        self.on = True

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x Aᵀ (N, rank) and scale · B (out, rank) for rows x (N, in), in x's dtype; zeros if it is off."""
        if not self.on:
            return x.new_zeros(len(x), len(self.A)), x.new_zeros(self.B.shape)
        return F.linear(x, self.A.to(x.dtype)), (self.scale * self.B).to(x.dtype)

    def forward(self, x: Tensor, y: Tensor | None) -> Tensor:
        """y + scale · (x Aᵀ) Bᵀ for rows x (N, in), written into y (N, out) where there is one."""
        if not self.on:
            return x.new_zeros(len(x), len(self.B)) if y is None else y
        low, up = self.factors(x)
        return low @ up.t() if y is None else y.addmm_(low, up.t())


LoRA = dict[str, LowRank]  # by the name of the layer


class _OneProduct(torch.autograd.Function):
    """x Wᵀ + low upᵀ + b, the product of [x low] and [W up]: x (N, in), low (N, r), W (out, in), up (out, r), b (out).

    x is kept for W's gradient alone, so not for the frozen W that a LoRA has as a rule.
    """

    @staticmethod
    def forward(ctx, x, low, weight, up, bias):
        ctx.save_for_backward(x if weight.requires_grad else None, low, weight, up)
        # Zeros make rows of whole 16 bytes, as cuBLAS's fast kernels want them; a rank of 196 would not
        fill = -(x.shape[1] + low.shape[1]) % 8
        return F.linear(*(torch.cat([a, b, a.new_zeros(len(a), fill)], 1) for a, b in ((x, low), (weight, up))), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, low, weight, up = ctx.saved_tensors
        wants_x, wants_low, wants_weight, wants_up, wants_bias = ctx.needs_input_grad
        return (
            dy @ weight if wants_x else None,
            dy @ up if wants_low else None,
            dy.t() @ x if wants_weight else None,
            dy.t() @ low if wants_up else None,
            dy.sum(0) if wants_bias else None,
        )


class Linear(nn.Linear):
    """nn.Linear with low-rank terms, one for each LoRA: y = x Wᵀ + Σ scale · (x Aᵀ) Bᵀ + b.

    In bfloat16 a small term must not be added to an x Wᵀ that was rounded, which does not change by less than half of
    its last bit. So all are one product, summed up in float32 and rounded once. It is not enough to let a product add
    to the terms: cuBLAS on an H100 rounds the product before. In float32 the terms come first, the newest of them at
    the start. If the newest term is off, it takes part as a zero, so that the operations are the same, and a LoRA with
    B = 0 changes no bit.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.lora = nn.ModuleList()  # of LowRank, the oldest first

    def forward(self, x: Tensor) -> Tensor:
        if not self.lora:
            return F.linear(x, self.weight, self.bias)
        rows, y = x.flatten(0, -2), None
        if x.dtype in (torch.bfloat16, torch.float16):
            low, up = (torch.cat(halves, 1) for halves in zip(*(term.factors(rows) for term in self.lora)))
            y = _OneProduct.apply(rows, low, self.weight, up, self.bias)
        else:
            for term in reversed(self.lora):
                y = term(rows, y)
            y = y.addmm_(rows, self.weight.t()).add_(self.bias)
        return y.unflatten(0, x.shape[:-1])


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last axis (all heads together), in float32, and RoPE in the same pass."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        return norm_rope(x, self.weight, rope, self.eps)


def sinusoid(position: Tensor, dim: int) -> Tensor:
    """(...) -> (..., dim): dim/2 cosines, then dim/2 sines, of position · 10000^(−2i/dim), computed in float64."""
    half = dim // 2
    freq = torch.pow(10000.0, -torch.arange(half, dtype=torch.float64, device=position.device) / half)
    angle = position.double().unsqueeze(-1) * freq
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()


def rope_split(head_dim: int) -> tuple[int, int, int]:
    """Head channels that rotate with the frame, the row and the column: 128 -> 44, 42, 42; 16 -> 8, 4, 4."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rope_table(head_dim: int, size: tuple[int, int, int], device) -> Tensor:
    """The 3-D rotary embedding, theta 10000 on each axis, computed in float64.

    Returns cos and sin of every channel pair's angle in turn, (F·H·W, head_dim) float32.
    """
    angles = []
    for axis, dim in enumerate(rope_split(head_dim)):
        freq = torch.pow(10000.0, -torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
        angle = torch.arange(size[axis], dtype=torch.float64, device=device)[:, None] * freq
        angles.append(angle.view([size[a] if a == axis else 1 for a in range(3)] + [-1]).expand(*size, -1))
    angle = torch.cat(angles, dim=-1).flatten(0, 2)
    return torch.stack([angle.cos(), angle.sin()], dim=-1).flatten(1).float()


KeyValues = tuple[Tensor, Tensor]  # of an attention


def attend(q: Tensor, k: Tensor, v: Tensor, given: tuple[int, ...] | None = None) -> Tensor:
    """Attention of q (B, heads, L, head_dim) to k and v (B, heads, S, head_dim).

    given: for each sample, how many of its first tokens attend to one another alone; without it, all attend to all.
    """
    if given is None:
        return F.scaled_dot_product_attention(q, k, v)
    return _attend_by_prefix(q, k, v, given)


@torch.compiler.disable  # a graph for each combination of lengths would be too many
def _attend_by_prefix(q: Tensor, k: Tensor, v: Tensor, given: tuple[int, ...]) -> Tensor:
    """Two calls without a mask, sample by sample where the numbers differ, so that flash kernels take them."""
    if len(set(given)) > 1:
        return torch.cat([attend(*one, (n,)) for *one, n in zip(*(a.split(1) for a in (q, k, v)), given)])
    n = given[0]
    rest = F.scaled_dot_product_attention(q[:, :, n:], k, v)
    return torch.cat([F.scaled_dot_product_attention(*(a[:, :, :n] for a in (q, k, v))), rest], dim=2) if n else rest


class Attention(nn.Module):
    """Multi-head attention with RMS-normed q and k: self-attention, with RoPE, or cross-attention to the text."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.o = (Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, config.eps), RMSNorm(dim, config.eps)

    def keys(self, source: Tensor, rope: Tensor | None = None) -> KeyValues:
        """Of source (B, S, D): keys and values, each (B, heads, S, head_dim)."""
        return self._heads(self.norm_k(self.k(source), rope)), self._heads(self.v(source))

    def forward(
        self, x: Tensor, keys: KeyValues, rope: Tensor | None = None, given: tuple[int, ...] | None = None
    ) -> Tensor:
        """x (B, L, D) attends to `keys`; given: as in `attend`."""
        q = self._heads(self.norm_q(self.q(x), rope))
        return self.o(rearrange(attend(q, *keys, given), "b n l k -> b l (n k)"))

    def _heads(self, a: Tensor) -> Tensor:
        return rearrange(a, "b l (n k) -> b n l k", n=self.num_heads)


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward, modulated by the block's own table plus the time's."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.zeros(1, 6, config.dim))
        self.self_attn, self.cross_attn = Attention(config), Attention(config)
        self.norm3 = nn.LayerNorm(config.dim, config.eps)  # before cross-attention; the other norms have no parameters
        self.ffn = nn.Sequential(
            Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), Linear(config.ffn_dim, config.dim)
        )

    def forward(
        self,
        x: Tensor,
        table: Tensor,
        row: Tensor | None,
        text: Tensor | KeyValues,
        rope: Tensor,
        given: tuple[int, ...] | None = None,
        past: KeyValues | None = None,
    ) -> Tensor:
        """x (B, L, D), table (B, R, 6, D) float32, row as `DiT._time` gives them, text (B, S, D) or its keys.

        given: as in `attend`; past: what self-attention sees before x's own tokens.
        """
        shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = (self.modulation.float() + table).unbind(2)
        # norm3's weight and bias, as the modulation that is the same in every row
        shift_ca, scale_ca = (a.float().expand_as(gate_sa) for a in (self.norm3.bias, self.norm3.weight.float() - 1))
        dtype, eps = self.ffn[0].weight.dtype, self.eps
        h = ln_modulate(x, shift_sa, scale_sa, row, eps, dtype)
        keys = self.self_attn.keys(h, rope)
        if past is not None:
            keys = tuple(torch.cat([before, own], dim=2) for before, own in zip(past, keys))
        h, x = residual_ln_modulate(
            x, self.self_attn(h, keys, rope, given), gate_sa, shift_ca, scale_ca, row, eps, dtype
        )
        text = self.cross_attn.keys(text) if isinstance(text, Tensor) else text
        h, x = residual_ln_modulate(x, self.cross_attn(h, text), None, shift_ff, scale_ff, row, eps, dtype)
        return gate_residual(x, self.ffn(h), gate_ff, row)

    def keys(self, x: Tensor, table: Tensor, row: Tensor | None, rope: Tensor) -> KeyValues:
        """What self-attention has of x: keys and values, as `forward` computes them, for little of its price."""
        shift, scale, *_ = (self.modulation.float() + table).unbind(2)
        return self.self_attn.keys(ln_modulate(x, shift, scale, row, self.eps, self.ffn[0].weight.dtype), rope)


class Head(nn.Module):
    """LayerNorm, modulation by the time embedding itself (not its projection), and the linear map to patches."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))
        self.head = Linear(config.dim, config.out_dim * math.prod(config.patch_size))

    def forward(self, x: Tensor, time: Tensor, row: Tensor | None) -> Tensor:
        """x (B, L, D), time (B, R, D) float32, row as `DiT._time` gives them -> (B, L, out_dim · patch)."""
        shift, scale = (self.modulation.float() + time.unsqueeze(2)).unbind(2)
        return self.head(ln_modulate(x, shift, scale, row, self.eps, self.head.weight.dtype))


class TaskPrompt(nn.Module):
    """Learnable frame-level task prompts of the continuation model: P_task = M ⊙ P_cond + (1 − M) ⊙ P_noisy.

    where "text": they are added to the last F slots of the embedded text, which are padding for a text of up to
    text_len − F tokens; "frame": to the tokens of their frame. Both tables (frames, D) start at zero, so the untrained
    continuation model is exactly the text-to-video model.
    """

    def __init__(self, frames: int, dim: int, where: str):
        super().__init__()
        if where not in PLACES:
            raise ValueError(f"task prompt: expected where = 'text' or 'frame', got {where!r}")
        self.where = where
        self.cond = nn.Parameter(torch.zeros(frames, dim))
        self.noisy = nn.Parameter(torch.zeros(frames, dim))

    def forward(self, cond_mask: Tensor) -> Tensor:
        """(B, F) bool -> (B, F, D)"""
        F_ = cond_mask.shape[1]
        if F_ > len(self.cond):
            raise ValueError(f"task prompt: expected at most {len(self.cond)} latent frames, got {F_}")
        return torch.where(cond_mask.unsqueeze(-1), self.cond[:F_], self.noisy[:F_])


# Parameters that stay float32 in a bfloat16 model: those that Wan computes with under autocast(dtype=torch.float32)
# (wan/modules/model.py: WanModel, WanAttentionBlock, Head, WanLayerNorm, WanRMSNorm), and those that Wan does not have.
FLOAT32 = re.compile(r"^(time_embedding|time_projection|head|task_prompt)\.|modulation$|frame_embedding$|norm|\.lora\.")


def weight_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a DiT's parameter where matrix products run in dtype."""
    return torch.float32 if FLOAT32.search(name) else dtype


def cast(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A DiT whose matrix products run in dtype: changes net's parameters and returns it."""
    for name, p in net.named_parameters():
        p.data = p.data.to(weight_dtype(name, dtype))
    return net


class DiT(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        D = config.dim
        self.patch_embedding = nn.Conv3d(config.in_dim, D, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(Linear(config.text_dim, D), nn.GELU(approximate="tanh"), Linear(D, D))
        self.time_embedding = nn.Sequential(Linear(config.freq_dim, D), nn.SiLU(), Linear(D, D))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(D, 6 * D))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        # RoPE tells how far apart two frames are, and a few layers cannot make out from that which one comes first
        self.frame_embedding = nn.Parameter(torch.zeros(config.frames, D)) if config.frames else None
        self.task_prompt: TaskPrompt | None = None
        self.loras: tuple[str, ...] = ()  # the LoRA files, by `digest`, that are on it or in its weights
        self.prefix = False  # given frames attend to given frames alone
        self.gradient_checkpointing = False
        self._rope: dict[tuple, Tensor] = {}

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor, cond_mask: Tensor | None = None) -> Tensor:
        """The velocity v = noise − x0 at x_t.

        x_t (B, C, F, H, W); t in [0, 1], (B,) or, one for each latent frame, (B, F); text (B, S, text_dim), S ≤
        text_len; cond_mask (B, F) bool or None: the frames that are given. With it t must be (B,): given frames see
        time 0 whatever t is (t' = t·(1 − M)), x_t must hold them clean, and the task prompts, if net has any, are
        switched on. Returns (B, C, F, H, W) float32. ValueError for shapes that do not fit.
        """
        self._check(x_t, t, text, cond_mask)
        x, time, table, row, rope = self._enter(x_t, t, cond_mask)
        text = self._embed_text(text, cond_mask)
        given = None if cond_mask is None or not self.prefix else self._given_tokens(cond_mask, x.shape[1])
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, table, row, text, rope, given, use_reentrant=False)
            else:
                x = block(x, table, row, text, rope, given)
        return self._leave(x, time, row, x_t.shape[2:])

    def _embed_text(self, text: Tensor, cond_mask: Tensor | None) -> Tensor:
        """(B, S, text_dim) -> (B, text_len, D), with the task prompts on the last F of them."""
        text = F.pad(text, (0, 0, 0, self.config.text_len - text.shape[1])).to(self.text_embedding[0].weight.dtype)
        text = self.text_embedding(text)
        if cond_mask is None or self.task_prompt is None or self.task_prompt.where != "text":
            return text
        F_ = cond_mask.shape[1]
        return torch.cat([text[:, :-F_], text[:, -F_:] + self.task_prompt(cond_mask).to(text.dtype)], dim=1)

    def _enter(self, x_t: Tensor, t: Tensor, cond_mask: Tensor | None, first: int = 0):
        """What the blocks work on: tokens (B, L, D) float32, time, table and row as `_time`, rope (L, head_dim).

        x_t: the clip, or its frames from `first` on; cond_mask: of the whole clip.
        """
        pf, ph, pw = self.config.patch_size
        f, h, w = size = x_t.shape[2] // pf, x_t.shape[3] // ph, x_t.shape[4] // pw
        time, table, row = self._time(t, None if cond_mask is None else cond_mask[:, first : first + f])
        x = self.patch_embedding(x_t.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2).float()
        if self.frame_embedding is not None:
            x = x + self.frame_embedding[first : first + f].repeat_interleave(h * w, dim=0)
        if cond_mask is not None and self.task_prompt is not None and self.task_prompt.where == "frame":
            x = x + self.task_prompt(cond_mask)[:, first : first + f].repeat_interleave(h * w, dim=1)
        rope = self._rope_table((first + f, *size[1:]), x.device)[first * h * w :]
        return x, time, table, row, rope

    def _leave(self, x: Tensor, time: Tensor, row: Tensor | None, size: Sequence[int]) -> Tensor:
        """Tokens (B, L, D) -> v (B, C, *size) float32, size in latent frames, rows and columns."""
        pf, ph, pw = self.config.patch_size
        f, h, w = size[0] // pf, size[1] // ph, size[2] // pw
        unpatch = "b (f h w) (pf ph pw c) -> b c (f pf) (h ph) (w pw)"
        v = rearrange(self.head(x, time, row), unpatch, f=f, h=h, w=w, pf=pf, ph=ph, pw=pw).float()
        return v.contiguous()

    def _given_tokens(self, cond_mask: Tensor, tokens: int) -> tuple[int, ...]:
        """Of each sample, how many of its tokens are of given frames, or 0 if all are: they then see all there are.

        ValueError unless the given frames are the first ones.
        """
        frames = cond_mask.shape[1]
        counts = cond_mask.sum(1)
        if not torch.equal(cond_mask, torch.arange(frames, device=counts.device) < counts[:, None]):
            raise ValueError("cond_mask: expected the first frames of each clip, as this model attends by prefix")
        return tuple(n % frames * (tokens // frames) for n in counts.tolist())

    def _time(self, t: Tensor, cond_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Time embedding (B, R, D) and its projection (B, R, 6, D), float32, and each frame's row (B, F) of them: two
        rows with cond_mask, the time of the frames to generate and 0; else None, for one row of the clip or of a frame.
        """
        if cond_mask is not None:
            t = torch.stack([t, torch.zeros_like(t)], dim=1)
        elif t.ndim == 1:
            t = t.unsqueeze(1)
        with torch.autocast(t.device.type, enabled=False):
            angles = sinusoid(1000 * t.double(), self.config.freq_dim)
            time = self.time_embedding(angles.to(self.time_embedding[0].weight.dtype))
            table = self.time_projection(time).unflatten(-1, (6, -1))
        return time.float(), table.float(), cond_mask

    def _rope_table(self, size: tuple[int, int, int], device) -> Tensor:
        key = (*size, device)
        if key not in self._rope:
            with torch.inference_mode(False):  # else no later forward could be trained
                self._rope[key] = rope_table(self.config.dim // self.config.num_heads, size, device)
        return self._rope[key]

    def _check(self, x_t: Tensor, t: Tensor, text: Tensor, cond_mask: Tensor | None) -> None:
        c = self.config
        if x_t.ndim != 5 or x_t.shape[1] != c.in_dim or any(n % p for n, p in zip(x_t.shape[2:], c.patch_size)):
            wanted = f"(B, {c.in_dim}, F, H, W) with F, H, W divisible by {c.patch_size}"
            raise ValueError(f"x_t: expected {wanted}, got {tuple(x_t.shape)}")
        B, F_ = x_t.shape[0], x_t.shape[2]
        if c.frames and F_ // c.patch_size[0] > c.frames:
            raise ValueError(f"x_t: expected at most {c.frames} latent frames, which this model knows, got {F_}")
        shapes = [(B,)] if cond_mask is not None else [(B,), (B, F_)]
        if tuple(t.shape) not in shapes:
            raise ValueError(f"t: expected {' or '.join(map(str, shapes))}, got {tuple(t.shape)}")
        if text.ndim != 3 or text.shape[0] != B or text.shape[1] > c.text_len or text.shape[2] != c.text_dim:
            raise ValueError(f"text: expected (B={B}, S ≤ {c.text_len}, {c.text_dim}), got {tuple(text.shape)}")
        if cond_mask is not None and (tuple(cond_mask.shape) != (B, F_) or cond_mask.dtype != torch.bool):
            raise ValueError(f"cond_mask: expected bool {(B, F_)}, got {cond_mask.dtype} {tuple(cond_mask.shape)}")


class Continuation:
    """A continuation model on clips whose first n frames are given, ready for a solver's many calls.

    What depends on neither t nor the noisy frames is computed once, here: the keys and values of the text and, with
    prefix attention, of the given frames, in every layer. A call then runs on the noisy frames alone. Without prefix
    attention the given frames see the noisy ones, so they take part in every call.

        phi = Continuation(net, x0, text, n)
        v = phi(x_t, t)                          as net(x_t, t, text, cond_mask), but 0 at frames that were left out
    """

    @torch.no_grad()
    def __init__(self, net: DiT, x0: Tensor, text: Tensor, n: int):
        """x0 (B, C, F, H, W), of which n frames are read, 0 ≤ n < F; text (B, S, text_dim)."""
        self.net, self.first = net, n if net.prefix else 0  # the first frame that takes part in a call
        self.cond_mask = (torch.arange(x0.shape[2], device=x0.device) < n).expand(len(x0), -1)
        text = net._embed_text(text, self.cond_mask)
        self.text = [block.cross_attn.keys(text) for block in net.blocks]
        self.past: list[KeyValues | None] = [None] * len(net.blocks)
        if self.first:
            clean = torch.zeros(len(x0), device=x0.device)  # the time of given frames
            x, _, table, row, rope = net._enter(x0[:, :, :n], clean, self.cond_mask)
            for i, block in enumerate(net.blocks):
                self.past[i] = block.keys(x, table, row, rope)
                x = block(x, table, row, self.text[i], rope)

    def __call__(self, x_t: Tensor, t: Tensor, text: Tensor | None = None, cond_mask: Tensor | None = None) -> Tensor:
        """x_t (b, C, F, H, W), t (b,) with b ≤ B: the velocity of the first b clips, (b, C, F, H, W) float32.

        text and cond_mask are those that this was made with.
        """
        net, b, noisy = self.net, len(x_t), x_t[:, :, self.first :]
        x, time, table, row, rope = net._enter(noisy, t, self.cond_mask[:b], self.first)
        for block, *kept in zip(net.blocks, self.text, self.past):
            text_keys, past = (keys and tuple(a[:b] for a in keys) for keys in kept)
            x = block(x, table, row, text_keys, rope, past=past)
        return F.pad(net._leave(x, time, row, noisy.shape[2:]), (0, 0, 0, 0, self.first, 0))


# ---- initialisation --------------------------------------------------------------------------------------------------


def init_from_scratch(net: DiT, seed: int) -> DiT:
    """Random weights for training a small base: PyTorch's Linear init, no modulation at first. Returns net.

    Wan's own init (Xavier, normal(0.02) embeddings, zero head) is made for longer runs.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in net.modules():
            if isinstance(module, (nn.Linear, nn.Conv3d)):
                module.reset_parameters()
    nn.init.zeros_(net.time_projection[1].weight)
    nn.init.zeros_(net.time_projection[1].bias)
    return net


# ---- LoRA ------------------------------------------------------------------------------------------------------------

LORA_LAYERS = {  # name -> the layers that get an adapter, as suffixes of Wan's parameter names
    "attn": ("attn.q", "attn.k", "attn.v", "attn.o"),
    "attn+ffn": ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.0", "ffn.2"),
    "all": ("",),  # every Linear: also text, time and modulation projections and the head
}


def add_lora(net: DiT, rank: int, alpha: float, layers: str = "attn", seed: int = 0) -> list[nn.Parameter]:
    """Freezes net and adds a LoRA (alpha / rank)·B·A to its `layers` (a key of LORA_LAYERS), on top of those it has.

    A is Kaiming-uniform as in PEFT, B is zero, so the output does not move before training. Returns the new parameters.
    """
    if layers not in LORA_LAYERS or rank < 1:
        raise ValueError(f"expected layers of {', '.join(LORA_LAYERS)}, rank of at least 1, got {layers!r}, {rank}")
    net.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, layer in linears(net).items():
        if name.endswith(LORA_LAYERS[layers]):
            bound = 1 / math.sqrt(layer.in_features)
            A = (2 * torch.rand(rank, layer.in_features, generator=generator) - 1) * bound
            layer.lora.append(LowRank(A, torch.zeros(layer.out_features, rank), alpha / rank).to(layer.weight.device))
    return [p for p in net.parameters() if p.requires_grad]


def linears(net: DiT) -> dict[str, Linear]:
    """The layers that a LoRA can be put on, by name."""
    return {name: module for name, module in net.named_modules() if isinstance(module, Linear)}


def trained_lora(net: DiT) -> LoRA:
    """The LoRA that is being trained: what `add_lora` added last."""
    return {name: term for name, layer in linears(net).items() for term in layer.lora if term.B.requires_grad}


def check_lora(net: DiT, lora: LoRA) -> None:
    """ValueError unless every layer of the LoRA is one of net's."""
    layers = linears(net)
    for name, term in lora.items():
        A, B, layer = term.A, term.B, layers.get(name)
        fits = layer is not None and A.ndim == B.ndim == 2 and len(A) == B.shape[1] > 0
        if not fits or (A.shape[1], B.shape[0]) != (layer.in_features, layer.out_features):
            got = f"{name[:99]!r} with A {tuple(A.shape)}, B {tuple(B.shape)}"
            raise ValueError(f"expected a LoRA for this model, got {got}, which do not fit it")


def attach_lora(net: DiT, lora: LoRA) -> DiT:
    """Puts a LoRA on net, frozen, on top of those it has. Returns net. ValueError as `check_lora`."""
    check_lora(net, lora)
    for name, term in lora.items():
        layer = net.get_submodule(name)
        layer.lora.append(LowRank(term.A, term.B, term.scale).to(layer.weight.device).requires_grad_(False))
    return net


@contextlib.contextmanager
def lora_off(net: DiT):
    """Within it net is the model without the LoRA that is being trained: the reference of a DPO run."""
    terms = trained_lora(net).values()
    for term in terms:
        term.on = False
    try:
        yield
    finally:
        for term in terms:
            term.on = True


@torch.no_grad()
def fuse(weight: Tensor, terms: Iterable[LowRank], diffs: Iterable[Tensor] = ()) -> Tensor:
    """W + Σ scale·B·A + Σ diff, float32."""
    weight = sum((diff.to(weight.device) for diff in diffs), weight.float())
    return sum((term.scale * (term.B.to(weight.device) @ term.A.to(weight.device)) for term in terms), weight)


def merge_lora(net: DiT) -> DiT:
    """Fuses every LoRA of net into its weights. Returns net.

    ValueError unless they are float32: a weight that is rounded to bfloat16, and once more after the sum, keeps a half
    of a usual update.
    """
    for name, layer in linears(net).items():
        if layer.lora and layer.weight.dtype != torch.float32:
            raise ValueError(f"{name}: expected float32 weights to fuse a LoRA into, got {layer.weight.dtype}")
        layer.weight.data = fuse(layer.weight, layer.lora)
        layer.lora = nn.ModuleList()
    return net


# ---- files -----------------------------------------------------------------------------------------------------------

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"  # Wan's and diffusers' file name
LORA_PREFIX = "diffusion_model."  # the key format that ComfyUI, diffusers, DiffSynth and musubi-tuner all read

DIFFUSERS_NAMES = [  # facts of github.com/huggingface/diffusers, transformer_wan.py, against wan/modules/model.py
    ("^condition_embedder.text_embedder.linear_1.", "^text_embedding.0."),  # ^: at the start, elsewhere as it stands
    ("^condition_embedder.text_embedder.linear_2.", "^text_embedding.2."),
    ("^condition_embedder.time_embedder.linear_1.", "^time_embedding.0."),
    ("^condition_embedder.time_embedder.linear_2.", "^time_embedding.2."),
    ("^condition_embedder.time_proj.", "^time_projection.1."),
    ("^scale_shift_table", "^head.modulation"),
    ("^proj_out.", "^head.head."),
    (".scale_shift_table", ".modulation"),
    (".attn1.", ".self_attn."),
    (".attn2.", ".cross_attn."),
    (".to_out.0.", ".o."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    (".norm2.", ".norm3."),  # the norm before cross-attention: the only one with parameters
    (".ffn.net.0.proj.", ".ffn.0."),
    (".ffn.net.2.", ".ffn.2."),
]


def rename(name: str, table: list[tuple[str, str]]) -> str:
    """`name` with every old part of `table`, (old, new), replaced by the new one, in order."""
    for old, new in table:
        name = re.sub(re.escape(old).replace(r"\^", "^"), new.removeprefix("^"), name)
    return name


def wan_name(name: str) -> str:
    """The name that Wan gives to a tensor of its own layout, of diffusers' or, with a prefix, of ComfyUI's."""
    return rename(re.sub(r"^(model\.)?diffusion_model\.", "", name), DIFFUSERS_NAMES)


def check_finite(a: Tensor, name: str) -> None:
    """ValueError, with the tensor's name, if it holds NaN or infinity, or numbers that PyTorch cannot compute with.

    One pass, on a's own device and without a copy: on one core of a CPU, 4 GB/s; isfinite would take 8 times as long.
    """
    if not a.is_floating_point() or not a.numel():
        return
    try:
        ends = (a.float() if a.itemsize == 1 else a).aminmax()  # which float8 does not have
    except NotImplementedError:
        raise ValueError(f"{name}: expected numbers of 8 bits or more, got {a.dtype}") from None
    if not all(end.isfinite() for end in ends):
        raise ValueError(f"{name}: expected numbers, got NaN or infinity: a training that diverged, or damage")


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names, dtypes, shapes and bytes: what tells a LoRA from another, whatever its file's header says."""
    sha256 = hashlib.sha256()
    for name, a in sorted(tensors.items()):
        sha256.update(f"{name} {a.dtype} {tuple(a.shape)}\n".encode())
        sha256.update(a.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha256.hexdigest()


def read_json(text: str) -> dict:
    """The object that a JSON text holds. ValueError for any other text."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"JSON of a {type(value).__name__}, not of an object")
    return value


def noted(header: Mapping, key: str) -> set[str]:
    """The digests that stand in a header of ours under "merged" (LoRAs that are in the file's tensors) or under
    "beneath" (those that were on the network when the file's LoRA was trained). Up to 0.8 there were none.
    """
    digests = header.get(key)
    return {one for one in digests if isinstance(one, str)} if isinstance(digests, list) else set()


def read_header(opened: safe_open) -> dict:
    """What this project noted in the header of an open safetensors file, {} in other files. ValueError if damaged."""
    return read_json((opened.metadata() or {}).get("dynamicsboost", "{}"))


def _write(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """ValueError, and no file, for NaN and infinity."""
    for name, a in tensors.items():
        check_finite(a, f"{path}: {name}")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file({name: a.detach().cpu().contiguous() for name, a in tensors.items()}, path, metadata)


def wan_config(config: DiTConfig) -> dict:
    """config.json of Wan's layout, which knows no `frames`: the tensors tell."""
    sizes = {name: size for name, size in dataclasses.asdict(config).items() if name != "frames"}
    return {"_class_name": "WanModel", "model_type": "t2v", **sizes}


def weights_header(loras: Sequence[str]) -> dict[str, str]:
    """The header of weights that have these LoRAs, by `digest`, in them.

    safetensors writes two keys in an order that changes: such files are the same up to their headers.
    """
    return {"format": "pt"} | ({"dynamicsboost": json.dumps({"merged": sorted(loras)})} if loras else {})


def save_model(net: DiT, folder: str | Path) -> list[str]:
    """Writes config.json and the weights under Wan's names, float32 as trained. Returns the file names."""
    _write(Path(folder) / WEIGHTS_NAME, net.state_dict(), weights_header(net.loras))
    (Path(folder) / "config.json").write_text(json.dumps(wan_config(net.config), indent=1) + "\n", encoding="utf-8")
    return ["config.json", WEIGHTS_NAME]


def read_config(shape: Mapping[str, tuple[int, ...]], recipe: Path) -> DiTConfig:
    """The configuration of a checkpoint: sizes from its tensors' shapes; heads, text_len and eps from its config.json.

    shape: by Wan's names. recipe: config.json, of Wan's layout or diffusers'; it may be missing if heads are 128 wide.
    ValueError for another architecture, and for a config.json that is damaged or belongs to other tensors.
    """
    if any(name.startswith("img_emb.") or "image_embedder" in name for name in shape):
        raise ValueError("expected text-to-video weights, got image-to-video ones (img_emb)")
    try:
        dim, in_dim, *patch = shape["patch_embedding.weight"]
        layers = 1 + max(int(name.split(".")[1]) for name in shape if name.startswith("blocks."))
        ffn_dim, text_dim = shape["blocks.0.ffn.0.weight"][0], shape["text_embedding.0.weight"][1]
        freq_dim, out = shape["time_embedding.0.weight"][1], shape["head.head.weight"][0] // math.prod(patch)
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"expected Wan2.1's text-to-video transformer, got other tensors ({error})") from None
    try:
        given = read_json(recipe.read_text(encoding="utf-8")) if recipe.is_file() else {}
        heads = int(given.get("num_heads", given.get("num_attention_heads", dim // 128)))
        text_len, eps = int(given.get("text_len", 512)), float(given.get("eps", 1e-6))
    except (OSError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{recipe}: expected a model's sizes, got: {error}") from None
    if not recipe.is_file() and (heads < 1 or dim % 128):
        raise ValueError(f"{recipe}: expected num_heads, but there is no such file; only heads of 128 need none")
    beside = {name: given.get(name, size) for name, size in (("dim", dim), ("num_layers", layers))}
    if beside != {"dim": dim, "num_layers": layers} or dim % max(1, heads) or dim // max(1, heads) % 2 or heads < 1:
        got = f"{beside['dim']} and {beside['num_layers']}, num_heads {heads}"
        raise ValueError(f"{recipe}: expected the sizes of its weights, dim {dim} and num_layers {layers}, got {got}")
    if text_len < 1 or not 0 < eps < 1:
        raise ValueError(f"{recipe}: expected text_len of at least 1, eps between 0 and 1, got {text_len} and {eps}")
    frames = shape["frame_embedding"][0] if "frame_embedding" in shape else 0
    return DiTConfig(dim, ffn_dim, heads, layers, in_dim, out, text_dim, text_len, freq_dim, tuple(patch), eps, frames)


def check_shapes(net: nn.Module, shape: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError unless a checkpoint's tensors, name -> shape, are exactly net's."""
    wanted = {name: tuple(a.shape) for name, a in net.state_dict().items()}
    for name in {**wanted, **shape}:
        if wanted.get(name) != shape.get(name):
            want, got = wanted.get(name, "no such tensor"), shape.get(name, "nothing")
            raise ValueError(f"expected the tensors of this architecture; {name[:99]}: expected {want}, got {got}")


def fill(net: nn.Module, get: Callable[[str], Tensor]) -> nn.Module:
    """Gives net, built on the meta device, the tensors get(name), one at a time. Returns net, frozen."""
    hidden = os.environ.get("RANK", "0") != "0"
    for name in tqdm(net.state_dict(), "loading weights", unit="tensor", delay=1, leave=False, disable=hidden):
        parent, _, leaf = name.rpartition(".")
        setattr(net.get_submodule(parent), leaf, nn.Parameter(get(name), requires_grad=False))
    return net


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those that its *.safetensors.index.json names, or else all that are there.

    ValueError for an index that is damaged, that names a missing file, or one outside of the folder. A file that is a
    link may lead anywhere: in huggingface_hub's cache all of them are links.
    """
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if not indices:
        return sorted(folder.glob("*.safetensors"))
    try:
        names = sorted(set(read_json(indices[0].read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name or name in ("", "..")]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{indices[0]}: expected a weight_map of shards, got something else ({error})") from None
    if outside:
        raise ValueError(f"{indices[0]}: expected names of files beside it, got {outside[0]!r}")
    # not Path.is_file, which raises an error for a name that is too long
    if missing := [name for name in names if not os.path.isfile(folder / name)]:
        raise ValueError(f"{folder}: expected the {len(names)} shards of its index, {missing[0]} is missing")
    return [folder / name for name in names]


# Wan2.2-T2V-A14B's two networks, for noisy times and for the others: in Wan's release, wan/configs/wan_t2v_A14B.py of
# Wan-Video/Wan2.2; in diffusers', pipelines/wan/pipeline_wan.py
EXPERTS = (("high_noise_model", "low_noise_model"), ("transformer", "transformer_2"))


def weights_path(path: str | Path) -> Path:
    """path, or in it transformer/ or transformer_2/, diffusers' names. ValueError for a release of two networks."""
    path = Path(path)
    for high, low in EXPERTS:
        if (path / high).is_dir() and (path / low).is_dir():
            got = f"got the two experts of Wan2.2-T2V-A14B: choose {path / high} or {path / low}"
            raise ValueError(f"{path}: expected one network, {got}")
    return next((path / part for part in EXPERTS[1] if (path / part).is_dir()), path)


def load_model(path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> DiT:
    """The model of `open_model`'s files on a device, frozen; its matrix products run in dtype."""
    net, read = open_model(path)
    return fill(net, lambda name: read(name, device).to(weight_dtype(name, dtype)))


def open_model(path: str | Path) -> tuple[DiT, Callable[..., Tensor]]:
    """The model of a safetensors file, or of a folder of them with its config.json, in the layout of Wan, of diffusers
    (the folder, or its transformer/) or of ComfyUI: on the meta device, and read(name, device="cpu") -> tensor.

    The layouts are told apart by the tensors' names. ValueError for other architectures (image-to-video among them),
    damaged files, and tensors that do not fit; from `read`, for NaN and infinity.
    """
    path = weights_path(path)
    source, merged = {}, set()  # Wan's name -> the file, opened, and the name in it
    for file in [path] if path.is_file() else weight_files(path):
        try:
            opened = safe_open(file, "pt")
            merged |= noted(read_header(opened), "merged")
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(f"{file}: expected readable weights, *.safetensors, got: {error}") from None
        for key in opened.keys():
            if (name := wan_name(key)) in source:
                raise ValueError(f"{path}: expected each tensor once, found {name} twice; keep one of them")
            source[name] = file, opened, key
    if not source:
        state = "found none" if path.exists() else "but it does not exist"
        raise ValueError(f"{path}: expected weights, *.safetensors, {state}")
    shape = {name: tuple(opened.get_slice(key).get_shape()) for name, (_, opened, key) in source.items()}
    try:
        config = read_config(shape, (path if path.is_dir() else path.parent) / "config.json")
        with torch.device("meta"):
            net = DiT(config)
        check_shapes(net, shape)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    net.loras = tuple(sorted(merged))

    def read(name: str, device: torch.device | str = "cpu") -> Tensor:
        file, opened, key = source[name]
        try:
            a = opened.get_tensor(key).to(device)
        except SafetensorError as error:  # a dtype that it does not read
            raise ValueError(f"{file}: {key}: {error}") from None
        check_finite(a, f"{file}: {key}")
        return a

    return net, read


def _checksum(facts: Mapping, tensors: str) -> str:
    """sha256 of what a LoRA's header says, but for the checksum itself, and of the `digest` of its tensors."""
    told = {key: value for key, value in facts.items() if key != "sha256"}
    return hashlib.sha256(json.dumps([told, tensors], sort_keys=True).encode()).hexdigest()


def export_lora(
    lora: LoRA, path: str | Path, dtype: torch.dtype = torch.float32, /, **provenance: str | Sequence[str]
) -> None:
    """Writes a LoRA: `diffusion_model.<layer>.lora_A.weight (rank, in)` and `.lora_B.weight (out, rank)`, in dtype.

    alpha / rank is folded into B, so the file's W + B·A needs no further number. The header's one key, dynamicsboost,
    tells in JSON: rank, the alpha that was folded in, dtype, layers, provenance, and a checksum of all that and of the
    tensors, which `read_lora_file` compares. provenance: beneath=net.loras lets a reader say what is missing below.
    ValueError, and no file, for NaN and infinity.
    """
    tensors = {}
    for name, term in lora.items():
        tensors[f"{LORA_PREFIX}{name}.lora_A.weight"] = term.A.to(dtype)
        tensors[f"{LORA_PREFIX}{name}.lora_B.weight"] = (term.B * term.scale).to(dtype)
    facts = {
        "rank": {len(term.A) for term in lora.values()},
        "alpha": {f"{term.scale * len(term.A):g}" for term in lora.values()},
        "layers": {re.sub(r"^blocks\.\d+\.", "", name) for name in lora},
        "dtype": {str(dtype).removeprefix("torch.")},
    }
    told = {**provenance, **{key: ",".join(sorted(map(str, values))) for key, values in facts.items()}}
    told["sha256"] = _checksum(told, digest(tensors))
    # one key: safetensors writes several in an order that changes from call to call
    _write(path, tensors, {"dynamicsboost": json.dumps(told, sort_keys=True)})


def read_lora_file(path: str | Path) -> tuple[dict[str, Tensor], dict, str]:
    """The tensors of a LoRA's file, whichever program wrote it; what `export_lora` noted in its header; their `digest`.

    ValueError if it cannot be read, if the header's checksum is another (up to 0.8, and in other programs' files, there
    is none), and for NaN and infinity.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: expected a LoRA's file, got {'a folder' if Path(path).is_dir() else 'no such file'}")
    try:
        with safe_open(path, "pt") as opened:
            tensors, told = {key: opened.get_tensor(key) for key in opened.keys()}, read_header(opened)
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: expected a readable LoRA, got: {error}; make or download it again") from None
    found = digest(tensors)
    if told.get("sha256", checksum := _checksum(told, found)) != checksum:
        raise ValueError(f"{path}: its checksum is not the one in its header: damaged; make or download it again")
    for name, a in tensors.items():
        check_finite(a, f"{path}: {name}")
    return tensors, told, found


def note_lora(net: DiT, path: str | Path, header: Mapping, found: str) -> None:
    """Keeps in net.loras that net has the LoRA of a file, as `read_lora_file` gave it. ValueError if it had it already:
    on it, in its weights, or in the sum of several that wan.export makes.
    """
    own = noted(header, "merged") | {found}
    if own & set(net.loras):
        got = "got one that is in the base, or in another of these files"
        raise ValueError(f"{path}: expected each LoRA once, {got}; leave it out")
    net.loras += tuple(sorted(own))


def load_lora(net: DiT, path: str | Path) -> DiT:
    """Adds the LoRA of a file that `export_lora` wrote, or of one with diffusers' names, frozen. Returns net.

    ValueError as `read_lora_file`, `check_lora` and `note_lora`, and for keys that are not such a LoRA's.
    """
    tensors, header, found = read_lora_file(path)
    parts = {wan_name(re.sub(r"^(diffusion_model|transformer)\.", "", key)): a for key, a in tensors.items()}
    layers = sorted(name.removesuffix(".lora_A.weight") for name in parts if name.endswith(".lora_A.weight"))
    wanted = {f"{layer}.lora_{x}.weight" for layer in layers for x in "AB"}
    if not layers or set(parts) != wanted or len(tensors) != len(wanted):
        got = "got other keys" if set(parts) != wanted or not layers else "got a layer under two names"
        raise ValueError(f"{path}: expected a LoRA, lora_A.weight and lora_B.weight of each layer, {got}")
    halves = {name: [parts[f"{name}.lora_{x}.weight"] for x in "AB"] for name in layers}
    lora = {name: LowRank(A, B, 1.0) for name, (A, B) in halves.items()}
    try:
        check_lora(net, lora)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    note_lora(net, path, header, found)
    return attach_lora(net, lora)


def add_task_prompt(net: DiT, frames: int, where: str = "text") -> DiT:
    """Gives net zero task prompts for up to `frames` latent frames: from now on cond_mask switches them on.

    Returns net.
    """
    net.task_prompt = TaskPrompt(frames, net.config.dim, where).to(net.patch_embedding.weight.device)
    return net


def save_task_prompt(net: DiT, path: str | Path) -> None:
    """Writes the task prompts to a file of their own: in the LoRA's file, other programs would refuse them."""
    tensors = {k: v for k, v in net.state_dict().items() if k.startswith(TASK_PROMPT)}
    _write(path, tensors, {"where": net.task_prompt.where})


def load_task_prompt(net: DiT, path: str | Path) -> DiT:
    """Reads the file of `save_task_prompt`. Returns net. ValueError for another file, or another model's."""
    try:
        with safe_open(path, "pt") as file:
            where, tensors = (file.metadata() or {}).get("where"), {k: file.get_tensor(k) for k in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: expected task prompts, got: {error}") from None
    for name, a in tensors.items():
        check_finite(a, f"{path}: {name}")
    where = "text" if where == "context" else where  # as it was called up to 0.4
    shapes = {name: tuple(a.shape) for name, a in tensors.items()}
    frames = next(iter(shapes.get(f"{TASK_PROMPT}cond", ())), 0)
    if (
        shapes != {f"{TASK_PROMPT}{part}": (frames, net.config.dim) for part in ("cond", "noisy")}
        or where not in PLACES
    ):
        got = f"{str(dict(sorted(shapes.items())[:2]))[:200]} and the place {where!r}"
        raise ValueError(f"{path}: expected task prompts of (frames, {net.config.dim}) and their place, got {got}")
    add_task_prompt(net, frames, where)
    net.load_state_dict(tensors, strict=False)
    return net


def check_fits(net: DiT, preset: str, base: str | Path, data: str | Path, shape: tuple[int, ...]) -> None:
    """ValueError unless net is of the preset's kind (a preset forgotten would be another method, silently) and takes
    latents of this shape (C, F, H, W).
    """
    config = net.config
    if config.in_dim != PRESETS[preset].in_dim:
        raise ValueError(
            f"--preset {preset} is for models of {PRESETS[preset].in_dim} channels, {base} has {config.in_dim}: choose "
            f"the preset of {', '.join(PRESETS)} that it is, or make anew what an earlier version made"
        )
    if shape[0] != config.in_dim:
        raise ValueError(f"{data}: expected latents of {config.in_dim} channels for this model, got {shape[0]}")
    if 0 < (most := config.frames * config.patch_size[0]) < shape[1]:
        got = f"got {shape[1]}: lower --frames"
        raise ValueError(f"{data}: expected at most {most} latent frames for this model, {got}")

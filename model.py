"""The video diffusion transformer: Wan2.1's text-to-video architecture under Wan's own parameter names, and LoRA on it.

    v = DiT(config)(x_t, t, text)              one time t for the clip, (B,)
    v = DiT(config)(x_t, t, text)              a time for each latent frame, (B, F)
    v = DiT(config)(x_t, t, text, cond_mask)   continuation: frames with cond_mask are given (clean) and see time 0

The time convention is flow.py's: t in [0, 1], 0 = data, 1 = noise; the network itself is fed 1000 t, as Wan was
trained.

Read it in this order: `DiTConfig`, `DiT.forward`, `Block.forward`, then the small parts above them, LoRA, files.
Architecture facts are from the Wan2.1 release (github.com/Wan-Video/Wan2.1, wan/modules/model.py, Apache-2.0), restated
in this project's own code and held to its outputs by tests/test_golden.py.

dtype policy, in one place: the residual stream, modulation, norms and rotary embedding are float32 (the RoPE
table computed in float64); matrix products and attention run in the weights' dtype, bfloat16 or float32; LoRA
weights are float32 masters.
"""

import contextlib
import dataclasses
import json
import math
import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.modulate import gate_residual, ln_modulate, residual_ln_modulate
from kernels.norm_rope import norm_rope
from runtime import run as common
from runtime.run import UserError
from wan.checkpoint import WEIGHTS_NAME, Checkpoint, fill, match, renaming

TASK_PROMPT = "task_prompt."  # prefix of the only parameters that Wan does not have


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


PRESETS = {
    "tiny": DiTConfig(
        96, 192, 3, 3, in_dim=48, out_dim=48, text_dim=32, text_len=24, freq_dim=64, patch_size=(1, 1, 1)
    ),
    "1.3b": DiTConfig(1536, 8960, 12, 30),
    "14b": DiTConfig(5120, 13824, 40, 40),
}


class Linear(nn.Linear):
    """nn.Linear with an optional low-rank term: y = x Wᵀ + b + lora_scale · (x Aᵀ) Bᵀ."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.register_parameter("lora_A", None)  # (rank, in_features) float32
        self.register_parameter("lora_B", None)  # (out_features, rank) float32
        self.lora_scale = 0.0  # alpha / rank
        self.lora_on = True

    def forward(self, x: Tensor) -> Tensor:
        if self.lora_A is None or not self.lora_on:
            return F.linear(x, self.weight, self.bias)
        if self.weight.dtype == torch.float32:  # one product; in bfloat16 the sum would round the adapter away
            return F.linear(x, self.weight + self.lora_scale * (self.lora_B @ self.lora_A), self.bias)
        # float32 masters, used in the activations' dtype: float32 activations would be kept for backward
        low = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return F.linear(x, self.weight, self.bias) + low * self.lora_scale


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last axis, in float32, and the rotation, where there is one, in the same pass.

    Wan applies it to q and k, over all heads together.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        return norm_rope(x, self.weight, rope, self.eps)


def sinusoid(position: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding (..., dim): dim/2 cosines, then dim/2 sines, of position · 10000^(−2i/dim).

    float64 inside.
    """
    half = dim // 2
    freq = torch.pow(10000.0, -torch.arange(half, dtype=torch.float64, device=position.device) / half)
    angle = position.double().unsqueeze(-1) * freq
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()


def rope_split(head_dim: int) -> tuple[int, int, int]:
    """Head channels that rotate with the frame, the row and the column: 128 -> 44, 42, 42; 16 -> 8, 4, 4."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rope_table(head_dim: int, size: tuple[int, int, int], device) -> Tensor:
    """The 3-D rotary embedding: cos and sin of every channel pair's angle in turn, (F·H·W, head_dim) float32.

    Computed in float64; theta 10000 on each axis.
    """
    angles = []
    for axis, dim in enumerate(rope_split(head_dim)):
        freq = torch.pow(10000.0, -torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
        angle = torch.arange(size[axis], dtype=torch.float64, device=device)[:, None] * freq
        angles.append(angle.view([size[a] if a == axis else 1 for a in range(3)] + [-1]).expand(*size, -1))
    angle = torch.cat(angles, dim=-1).flatten(0, 2)
    return torch.stack([angle.cos(), angle.sin()], dim=-1).flatten(1).float()


class Attention(nn.Module):
    """Multi-head attention with RMS-normed q and k: self-attention with RoPE, or cross-attention to the text,
    without.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.o = (Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, config.eps), RMSNorm(dim, config.eps)

    def forward(self, x: Tensor, context: Tensor, rope: Tensor | None = None) -> Tensor:
        q, k, v = self.norm_q(self.q(x), rope), self.norm_k(self.k(context), rope), self.v(context)
        q, k, v = (rearrange(a, "b l (n k) -> b n l k", n=self.num_heads) for a in (q, k, v))
        return self.o(rearrange(F.scaled_dot_product_attention(q, k, v), "b n l k -> b l (n k)"))


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward.

    Shift, scale, gate: the block's own table plus the time projection.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.zeros(1, 6, config.dim))
        self.self_attn, self.cross_attn = Attention(config), Attention(config)
        self.norm3 = nn.LayerNorm(
            config.dim, config.eps
        )  # before cross-attention; the other two norms have no parameters
        self.ffn = nn.Sequential(
            Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), Linear(config.ffn_dim, config.dim)
        )

    def forward(self, x: Tensor, e0: Tensor, row: Tensor, context: Tensor, rope: Tensor) -> Tensor:
        """x (B, L, D), e0 (B, R, 6, D) float32, row (B, F) int32, context (B, S, D) -> (B, L, D)"""
        shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = (self.modulation.float() + e0).unbind(2)
        # norm3's weight and bias, as the modulation that is the same in every row
        shift_ca, scale_ca = (a.float().expand_as(gate_sa) for a in (self.norm3.bias, self.norm3.weight.float() - 1))
        dtype, eps = self.ffn[0].weight.dtype, self.eps
        h = ln_modulate(x, shift_sa, scale_sa, row, eps, dtype)
        h, x = residual_ln_modulate(x, self.self_attn(h, h, rope), gate_sa, shift_ca, scale_ca, row, eps, dtype)
        h, x = residual_ln_modulate(x, self.cross_attn(h, context), None, shift_ff, scale_ff, row, eps, dtype)
        return gate_residual(x, self.ffn(h), gate_ff, row)


class Head(nn.Module):
    """LayerNorm, modulation by the time embedding itself (not its projection), and the linear map to patches."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))
        self.head = Linear(config.dim, config.out_dim * math.prod(config.patch_size))

    def forward(self, x: Tensor, e: Tensor, row: Tensor) -> Tensor:
        shift, scale = (self.modulation.float() + e.unsqueeze(2)).unbind(2)
        return self.head(ln_modulate(x, shift, scale, row, self.eps, self.head.weight.dtype))


class TaskPrompt(nn.Module):
    """Learnable frame-level task prompts of the continuation model: P_task = M ⊙ P_cond + (1 − M) ⊙ P_noisy.

    `where="context"` adds them to the last F slots of the embedded text, which are padding for a text of up to
    text_len − F tokens; `where="frame"` adds them to the tokens of their frame. Both tables (frames, D) start at zero,
    so the untrained continuation model is exactly the text-to-video model.
    """

    def __init__(self, frames: int, dim: int, where: str):
        super().__init__()
        if where not in ("context", "frame"):
            raise ValueError(f"task prompt: expected where = 'context' or 'frame', got {where!r}")
        self.where = where
        self.cond = nn.Parameter(torch.zeros(frames, dim))
        self.noisy = nn.Parameter(torch.zeros(frames, dim))

    def forward(self, cond_mask: Tensor) -> Tensor:
        """(B, F) bool -> (B, F, D)"""
        F_ = cond_mask.shape[1]
        if F_ > len(self.cond):
            raise ValueError(f"task prompt: expected at most {len(self.cond)} latent frames, got {F_}")
        return torch.where(cond_mask.unsqueeze(-1), self.cond[:F_], self.noisy[:F_])


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
        self.task_prompt: TaskPrompt | None = None
        self.gradient_checkpointing = False
        self._rope: dict[tuple, Tensor] = {}

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor, cond_mask: Tensor | None = None) -> Tensor:
        """The velocity v = noise − x0 at x_t.

        x_t (B, C, F, H, W); t in [0, 1], (B,) or, one for each latent frame, (B, F); text (B, S, text_dim), S ≤
        text_len; cond_mask (B, F) bool or None: frames that are given. With it t must be (B,): given frames see
        time 0 whatever t is (t' = t·(1 − M)), x_t must hold them clean, and the task prompts, where there are
        any, are switched on. Returns (B, C, F, H, W) float32. ValueError for shapes that do not fit.
        """
        self._check(x_t, t, text, cond_mask)
        pf, ph, pw = self.config.patch_size
        _, _, F_, H, W = x_t.shape
        size = (F_ // pf, H // ph, W // pw)
        e, e0, row = self._time(t, size[0], cond_mask)
        context = self._context(text)
        x = (
            self.patch_embedding(x_t.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2).float()
        )  # (B, L, D)
        if cond_mask is not None and self.task_prompt is not None:
            prompt = self.task_prompt(cond_mask)
            if self.task_prompt.where == "context":
                context = torch.cat([context[:, :-F_], context[:, -F_:] + prompt.to(context.dtype)], dim=1)
            else:
                x = x + prompt.repeat_interleave(size[1] * size[2], dim=1)
        rope = self._rope_table(size, x.device)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, e0, row, context, rope, use_reentrant=False)
            else:
                x = block(x, e0, row, context, rope)
        v = self.head(x, e, row)
        f, h, w = size
        return rearrange(
            v, "b (f h w) (pf ph pw c) -> b c (f pf) (h ph) (w pw)", f=f, h=h, w=w, pf=pf, ph=ph, pw=pw
        ).float()

    def _time(self, t: Tensor, F_: int, cond_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Time embedding e (B, R, D), its projection e0 (B, R, 6, D), both float32, and each frame's row (B,
        F) of them.
        """
        B = t.shape[0]
        if cond_mask is not None:  # two rows: the time of the frames to generate, and 0
            t, row = torch.stack([t, torch.zeros_like(t)], dim=1), cond_mask.int()
        elif t.ndim == 1:
            t, row = t.unsqueeze(1), t.new_zeros(B, F_, dtype=torch.int32)
        else:
            row = torch.arange(F_, dtype=torch.int32, device=t.device).expand(B, F_)
        with torch.autocast(t.device.type, enabled=False):
            weight_dtype = self.time_embedding[0].weight.dtype
            e = self.time_embedding(sinusoid(1000 * t.double(), self.config.freq_dim).to(weight_dtype))
            e0 = self.time_projection(e).unflatten(-1, (6, -1))
        return e.float(), e0.float(), row

    def _context(self, text: Tensor) -> Tensor:
        """Text states (B, S, text_dim), padded with zeros to text_len and embedded: (B, text_len, D)."""
        text = F.pad(text, (0, 0, 0, self.config.text_len - text.shape[1]))
        return self.text_embedding(text.to(self.text_embedding[0].weight.dtype))

    def _rope_table(self, size: tuple[int, int, int], device) -> Tensor:
        key = (*size, device)
        if key not in self._rope:
            self._rope[key] = rope_table(self.config.dim // self.config.num_heads, size, device)
        return self._rope[key]

    def _check(self, x_t: Tensor, t: Tensor, text: Tensor, cond_mask: Tensor | None) -> None:
        c = self.config
        if x_t.ndim != 5 or x_t.shape[1] != c.in_dim or any(n % p for n, p in zip(x_t.shape[2:], c.patch_size)):
            wanted = f"(B, {c.in_dim}, F, H, W) with F, H, W divisible by {c.patch_size}"
            raise ValueError(f"x_t: expected {wanted}, got {tuple(x_t.shape)}")
        B, F_ = x_t.shape[0], x_t.shape[2]
        shapes = [(B,)] if cond_mask is not None else [(B,), (B, F_)]
        if tuple(t.shape) not in shapes:
            raise ValueError(f"t: expected {' or '.join(map(str, shapes))}, got {tuple(t.shape)}")
        if text.ndim != 3 or text.shape[0] != B or text.shape[1] > c.text_len or text.shape[2] != c.text_dim:
            raise ValueError(f"text: expected (B={B}, S ≤ {c.text_len}, {c.text_dim}), got {tuple(text.shape)}")
        if cond_mask is not None and (tuple(cond_mask.shape) != (B, F_) or cond_mask.dtype != torch.bool):
            raise ValueError(f"cond_mask: expected bool {(B, F_)}, got {cond_mask.dtype} {tuple(cond_mask.shape)}")


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
    """Freezes net and adds LoRA W + (alpha / rank)·B·A to its `layers` (a key of LORA_LAYERS).

    A is Kaiming-uniform as in PEFT, B is zero, so the output does not move before training. Returns the new parameters.
    ValueError if net has a LoRA already (merge it first).
    """
    if layers not in LORA_LAYERS or rank < 1:
        raise UserError(
            f"expected --layers {', '.join(LORA_LAYERS)} and --rank of at least 1, got {layers!r} and {rank}"
        )
    net.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, module in net.named_modules():
        if not isinstance(module, Linear) or not name.endswith(LORA_LAYERS[layers]):
            continue
        if module.lora_A is not None:
            raise ValueError(f"{name} has a LoRA already: merge_lora(net) first")
        bound = 1 / math.sqrt(module.in_features)
        A = (2 * torch.rand(rank, module.in_features, generator=generator) - 1) * bound
        module.lora_A = nn.Parameter(A.to(module.weight.device))
        module.lora_B = nn.Parameter(torch.zeros(module.out_features, rank, device=module.weight.device))
        module.lora_scale = alpha / rank
    return [p for p in net.parameters() if p.requires_grad]


def lora_linears(net: DiT) -> dict[str, Linear]:
    """The layers that carry a LoRA, by name."""
    return {n: m for n, m in net.named_modules() if isinstance(m, Linear) and m.lora_A is not None}


@contextlib.contextmanager
def lora_off(net: DiT):
    """Within it net is the model without its LoRA: the reference of a DPO run."""
    layers = lora_linears(net).values()
    for layer in layers:
        layer.lora_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.lora_on = True


def merge_lora(net: DiT) -> DiT:
    """Adds (alpha / rank)·B·A to the weights, in float32, and removes the adapters. Returns net."""
    for layer in lora_linears(net).values():
        with torch.no_grad():
            delta = layer.lora_scale * (layer.lora_B.float() @ layer.lora_A.float())
            layer.weight.copy_(layer.weight.float() + delta)
        layer.lora_A = layer.lora_B = None
    return net


# ---- files -----------------------------------------------------------------------------------------------------------

LORA_PREFIX = "diffusion_model."  # the key format that ComfyUI, diffusers, DiffSynth and musubi-tuner all read


def save_model(net: DiT, folder: str | Path) -> list[str]:
    """Writes config.json and the weights under Wan's names, float32 as trained. Returns the file names."""
    folder = Path(folder)
    common.write_json(folder / "config.json", wan_config(net.config))
    common.write_tensors(folder / WEIGHTS_NAME, dict(net.state_dict()))
    return ["config.json", WEIGHTS_NAME]


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


def _patterns(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(re.escape(old).replace(r"\^", "^"), new.removeprefix("^")) for old, new in pairs]


_rename = renaming([(r"^(model\.)?diffusion_model\.", ""), *_patterns(DIFFUSERS_NAMES)])  # the first is ComfyUI's
diffusers_name = renaming(_patterns([(ours, theirs) for theirs, ours in DIFFUSERS_NAMES]))  # Wan's name -> diffusers'


def wan_config(config: DiTConfig) -> dict:
    """config.json of Wan's layout."""
    return {"_class_name": "WanModel", "model_type": "t2v", **dataclasses.asdict(config)}


def diffusers_config(config: DiTConfig) -> dict:
    """config.json of diffusers' layout; text_len is 512 there, and told only if it is not."""
    same = {
        name: getattr(config, name) for name in ("ffn_dim", "num_layers", "text_dim", "freq_dim", "patch_size", "eps")
    }
    same |= {"text_len": config.text_len} if config.text_len != DiTConfig.text_len else {}
    return {
        "_class_name": "WanTransformer3DModel",
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.dim // config.num_heads,
        "in_channels": config.in_dim,
        "out_channels": config.out_dim,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        **same,
    }


def _sizes(source: Checkpoint, recipe: Path) -> DiTConfig:
    """The configuration of a checkpoint: what its shapes tell, and the heads, text_len and eps of its config.json."""
    shape = {_rename(name): source.shape(name) for name in source}
    if any(name.startswith("img_emb.") or "image_embedder" in name for name in shape):
        raise UserError(f"{source.path}: expected text-to-video weights, got image-to-video ones (img_emb)")
    try:
        dim, in_dim, *patch = shape["patch_embedding.weight"]
        found = {
            "dim": dim, "ffn_dim": shape["blocks.0.ffn.0.weight"][0], "in_dim": in_dim, "patch_size": tuple(patch),
            "num_layers": 1 + max(int(name.split(".")[1]) for name in shape if name.startswith("blocks.")),
            "text_dim": shape["text_embedding.0.weight"][1], "freq_dim": shape["time_embedding.0.weight"][1],
            "out_dim": shape["head.head.weight"][0] // math.prod(patch),
        }  # fmt: skip
    except KeyError as error:
        raise UserError(f"{source.path}: expected Wan2.1's text-to-video transformer, found no {error}") from None
    except (ValueError, IndexError):
        raise UserError(
            f"{source.path}: expected Wan2.1's text-to-video transformer, its tensors have other shapes"
        ) from None
    try:
        given = json.loads(recipe.read_text()) if recipe.is_file() else {}
        heads = given.get("num_heads", given.get("num_attention_heads", dim // 128))  # Wan's are 128 wide
        given = {k: given[k] for k in (*found, "text_len", "eps") if k in given}
        given |= {"patch_size": tuple(given.get("patch_size", patch))}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{recipe}: expected a model's sizes, got: {error}") from None
    for name in found.keys() & given.keys():
        if found[name] != given[name]:
            raise UserError(f"{recipe}: says {name} = {given[name]}, but the tensors beside it are for {found[name]}")
    if not isinstance(heads, int) or heads < 1 or dim % heads or dim // heads % 2:
        said = f"got {heads!r}" if recipe.is_file() else "and there is no such file; only heads of 128 need none"
        raise UserError(f"{recipe}: expected num_heads, a divisor of dim = {dim} into even heads, {said}")
    for name, kind in (("text_len", int), ("eps", float)):
        if not isinstance(given.get(name, kind(1)), kind) or given.get(name, 1) <= 0:
            raise UserError(f"{recipe}: expected {name}, a positive {kind.__name__}, got {given[name]!r}")
    return DiTConfig(**{**given, **found, "num_heads": heads})


def open_model(path: str | Path) -> tuple[DiT, Checkpoint, dict[str, str]]:
    """What a model's file or folder holds, without reading weights.

    Returns the network on the meta device, the checkpoint, and the network's names of tensors -> the checkpoint's.
    Layouts and errors are `load_model`'s.
    """
    path = Path(path)
    if (path / common.MANIFEST).is_file():  # made by this project: its sha256 are known
        common.read_manifest(path, "sft.py or merge.py")
    path = path / "transformer" if (path / "transformer").is_dir() else path
    source = Checkpoint(path)
    config = _sizes(source, (path if path.is_dir() else path.parent) / "config.json")
    with torch.device("meta"):
        net = DiT(config)
    return net, source, match(net, source, _rename)


def load_model(path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> DiT:
    """The model of a file or folder in the layout of Wan, of diffusers (the folder, or its transformer/) or of ComfyUI.

    Told apart by the tensors' names; sizes are read from their shapes, the weights one tensor at a time. UserError for
    other architectures (image-to-video among them), missing or damaged files, and tensors that do not fit.
    """
    net, source, _ = open_model(path)
    return fill(net, source, _rename, dtype, device)


def export_lora(net: DiT, path: str | Path, dtype: torch.dtype = torch.float32, **provenance: str) -> None:
    """Writes net's LoRA: `diffusion_model.<layer>.lora_A.weight (rank, in)` and `.lora_B.weight (out, rank)`, in dtype.

    alpha / rank is folded into B, so the file's W + B·A needs no further number. The header's one key, dynamicsboost,
    tells in JSON: rank, the alpha that was folded in, dtype, layers and provenance.
    """
    layers, tensors = lora_linears(net), {}
    for name, layer in layers.items():
        tensors[f"{LORA_PREFIX}{name}.lora_A.weight"] = layer.lora_A.to(dtype)
        tensors[f"{LORA_PREFIX}{name}.lora_B.weight"] = (layer.lora_B * layer.lora_scale).to(dtype)
    facts = {
        "rank": {len(layer.lora_A) for layer in layers.values()},
        "alpha": {f"{layer.lora_scale * len(layer.lora_A):g}" for layer in layers.values()},
        "layers": {re.sub(r"^blocks\.\d+\.", "", name) for name in layers},
        "dtype": {str(dtype).removeprefix("torch.")},
    }
    told = {**provenance, **{key: ",".join(sorted(map(str, values))) for key, values in facts.items()}}
    # one key: safetensors writes several in an order that changes from call to call
    common.write_tensors(Path(path), tensors, {"dynamicsboost": json.dumps(told, sort_keys=True)})


def lora_file(entry: str) -> Path:
    """The file that a name on a command line means. UserError for unfinished or damaged folders, none, and Φ's."""
    path = Path(entry.strip())
    if any((path / name).is_file() for name in ("run.json", common.MANIFEST)):  # made by this project
        common.read_manifest(path, "sft.py, asymdpo.py or merge.py")
    if (path / "task_prompt.safetensors").is_file():
        raise UserError(
            f"{path}: expected a text-to-video LoRA, got a continuation model, which needs its task prompts"
        )
    file = path / "lora.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file}: expected a LoRA's file, or a folder with lora.safetensors, got no such file")
    return file


def lora_files(names: str) -> list[Path]:
    """`lora_file` of each name in a list separated by commas."""
    return [lora_file(entry) for entry in names.split(",") if entry.strip()]


LORA_KEY = re.compile(r"(.+?)\.(?:(lora_A|lora_down)|(lora_B|lora_up))(?:\.default)?\.weight|(.+)\.alpha")


def _peft_alpha(path: Path) -> float | None:
    """The alpha that PEFT or diffusers keeps beside the tensors, in adapter_config.json or the header, if it does."""
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get("lora_adapter_metadata", "{}")  # diffusers, loaders/lora_base.py
    recipe = path.with_name("adapter_config.json")
    try:
        if path.name == "adapter_model.safetensors" and recipe.is_file():  # peft, utils/constants.py
            text = recipe.read_text()
        told = {key.removeprefix("transformer."): value for key, value in json.loads(text).items()}
        alpha = told.get("lora_alpha")
        alpha = None if alpha is None else float(alpha)
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{path}: expected PEFT's configuration with it, got damaged text") from None
    if told.get("alpha_pattern") or told.get("use_rslora") or told.get("use_dora"):
        raise UserError(f"{path}: expected a LoRA with one alpha, got alpha_pattern, use_rslora or use_dora")
    return alpha


def read_lora(net: DiT, path: str | Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """The LoRA of a file, by layers of net: A (rank, in), B (out, rank), both float32, and alpha / rank.

    Reads what `export_lora` wrote and what others write: layers under Wan's names or diffusers', after
    `diffusion_model.`, `transformer.`, `base_model.model.` or nothing, or kohya's `lora_unet_`; lora_A and lora_B, or
    lora_down and lora_up; with or without alpha, as a tensor or as PEFT keeps it. net may be on the meta device.
    UserError if a key or a shape does not fit net, or if there is none.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: expected a LoRA's file, got {'a folder' if Path(path).is_dir() else 'no such file'}")
    tensors = common.read_tensors(Path(path))
    told = _peft_alpha(Path(path))
    linears = {n: m for n, m in net.named_modules() if isinstance(m, Linear)}
    underscored = {"lora_unet_" + name.replace(".", "_"): name for name in linears}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = LORA_KEY.fullmatch(re.sub(r"^(diffusion_model|transformer|base_model\.model)\.", "", key))
        if not found:
            raise UserError(f"{path}: expected a LoRA for this model, got the key {key!r}")
        layer, down, up, scaled = found.groups()
        layer = underscored.get(layer or scaled, layer or scaled)
        name = _rename(f"{layer}.weight").removesuffix(".weight")
        parts.setdefault(name, {})["A" if down else "B" if up else "alpha"] = tensor
    for name, part in sorted(parts.items()):
        layer, A, B = linears.get(name), part.get("A"), part.get("B")
        if (
            layer is None
            or A is None
            or B is None
            or A.ndim != 2
            or len(A) == 0
            or A.shape[1] != layer.in_features
            or B.shape != (layer.out_features, len(A))
            or part.get("alpha", A[0, 0]).numel() != 1
        ):
            raise UserError(
                f"{path}: expected a LoRA for this model, got keys or shapes for {name!r} that do not fit it"
            )
    if not parts:
        raise UserError(f"{path}: expected a LoRA, got a file without tensors")
    loras = {}
    for name, part in sorted(parts.items()):
        rank, A, B = len(part["A"]), part["A"].float(), part["B"].float()
        alpha = part["alpha"].item() if "alpha" in part else told
        loras[name] = A, B, 1.0 if alpha is None else alpha / rank
    return loras


def load_lora(net: DiT, path: str | Path) -> DiT:
    """Adds the LoRA of a file to net. Returns net. UserError as `read_lora`, or if net has a LoRA already."""
    if lora_linears(net):
        raise UserError(f"{path}: expected a network without a LoRA, it has one already: merge_lora(net) first")
    for name, (A, B, scale) in read_lora(net, path).items():
        layer = net.get_submodule(name)
        device = layer.weight.device
        layer.lora_A, layer.lora_B = nn.Parameter(A.to(device)), nn.Parameter(B.to(device))
        layer.lora_scale = scale
    return net


def add_task_prompt(net: DiT, frames: int, where: str = "context") -> DiT:
    """Gives net zero task prompts for up to `frames` latent frames: from now on cond_mask switches them on.

    Returns net.
    """
    net.task_prompt = TaskPrompt(frames, net.config.dim, where).to(net.patch_embedding.weight.device)
    return net


def save_task_prompt(net: DiT, path: str | Path) -> None:
    """Writes the task prompts to a file of their own: in the LoRA's file, other programs would refuse them."""
    tensors = {k: v for k, v in net.state_dict().items() if k.startswith(TASK_PROMPT)}
    common.write_tensors(Path(path), tensors, {"where": net.task_prompt.where})


def load_task_prompt(net: DiT, path: str | Path) -> DiT:
    """Reads the file of `save_task_prompt`. Returns net. UserError for a file that is none, or another model's."""
    tensors = common.read_tensors(Path(path))
    with safe_open(path, "pt") as file:
        where = (file.metadata() or {}).get("where")
    shapes = {name: tuple(a.shape) for name, a in tensors.items()}
    frames = next(iter(shapes.get(f"{TASK_PROMPT}cond", ())), 0)
    wanted = {f"{TASK_PROMPT}{part}": (frames, net.config.dim) for part in ("cond", "noisy")}
    if not frames or shapes != wanted or where not in ("context", "frame"):
        raise UserError(
            f"{path}: expected task prompts for this model, {' and '.join(wanted)} of (frames, {net.config.dim}), and "
            f"their place in the header; got {dict(sorted(shapes.items())[:2])} and the place {where!r}"
        )
    add_task_prompt(net, frames, where)
    net.load_state_dict(tensors, strict=False)
    return net


def check_preset(net: DiT, preset: str, base: str | Path) -> None:
    """UserError if net is not of the preset's kind: a preset forgotten would be another method, silently."""
    if net.config.in_dim != PRESETS[preset].in_dim:
        raise UserError(
            f"--preset {preset} is for models of {PRESETS[preset].in_dim} channels, {base} has {net.config.in_dim}: "
            f"choose the preset of {', '.join(PRESETS)} that it is"
        )


def load_fused(
    base: str | Path, loras: list[Path], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> DiT:
    """The base with the LoRAs of these files fused in, one after the other, frozen."""
    net = load_model(base, dtype, device)
    for file in loras:
        merge_lora(load_lora(net, file))
    return net.eval().requires_grad_(False)


def load_continuation(
    base: str | Path,
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    loras: list[Path] = (),
    strength: float = 1.0,
) -> DiT:
    """The continuation model Φ, frozen: the base with the LoRA of a continuation.py folder fused in, and its
    task prompts. `loras` are fused into the base before it; `strength` scales Φ's own LoRA.
    """
    net = load_lora(load_fused(base, loras, dtype, device), Path(folder) / "lora.safetensors")
    for layer in lora_linears(net).values():
        layer.lora_scale *= strength
    merge_lora(net)
    if (Path(folder) / "task_prompt.safetensors").exists():
        load_task_prompt(net, Path(folder) / "task_prompt.safetensors")
    return net.eval().requires_grad_(False)

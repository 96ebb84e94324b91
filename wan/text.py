"""Wan2.1's text encoder: UMT5's encoder and its tokenizer.

TextEncoder(folder).encode(captions)    a list of states (S, 4096), one state for each of a caption's tokens
"""

import html
import math
import re
import sys
from pathlib import Path

import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from model import rename
from runtime.options import UserError
from wan.checkpoint import load
from wan.experts import release_of

# Parameter names and arithmetic are those of the release (github.com/Wan-Video/Wan2.1, wan/modules/t5.py, Apache-2.0),
# restated, for inference only.

NEGATIVE = (  # Wan's negative prompt: sample_neg_prompt of github.com/Wan-Video/Wan2.1, wan/configs/shared_config.py
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
MAX_DISTANCE = 128  # tokens; all longer distances share a bucket


class T5Norm(nn.Module):
    """x / rms(x) · weight, in float32."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), 1e-6).to(x.dtype)


class RelativePosition(nn.Module):
    """A bias for each head and distance: a bucket for each short distance, then buckets of logarithmic width."""

    def __init__(self, num_buckets: int, num_heads: int):
        super().__init__()
        self.num_buckets = num_buckets
        self.embedding = nn.Embedding(num_buckets, num_heads)

    def forward(self, length: int) -> Tensor:
        """(1, heads, length, length)"""
        position = torch.arange(length, device=self.embedding.weight.device)
        distance = position[None, :] - position[:, None]  # key − query
        half, exact = self.num_buckets // 2, self.num_buckets // 4
        away = distance.abs()
        log = torch.log(away.clamp(min=1).float() / exact) / math.log(MAX_DISTANCE / exact) * (half - exact)
        far = (exact + log.long()).clamp(max=half - 1)
        bucket = torch.where(away < exact, away, far) + half * (distance > 0)
        return rearrange(self.embedding(bucket), "q k n -> 1 n q k")


class T5Attention(nn.Module):
    """Multi-head attention without the factor 1/√d, as in T5."""

    def __init__(self, dim: int, dim_attn: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v = (nn.Linear(dim, dim_attn, bias=False) for _ in range(3))
        self.o = nn.Linear(dim_attn, dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (rearrange(f(x), "b s (n d) -> b n s d", n=self.num_heads) for f in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-1, -2) + bias).float().softmax(-1).to(x.dtype)
        return self.o(rearrange(weights @ v, "b n s d -> b s (n d)"))


class T5FeedForward(nn.Module):
    def __init__(self, dim: int, dim_ffn: int):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(dim, dim_ffn, bias=False), nn.GELU(approximate="tanh"))
        self.fc1, self.fc2 = nn.Linear(dim, dim_ffn, bias=False), nn.Linear(dim_ffn, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x) * self.gate(x))


class T5Block(nn.Module):
    def __init__(self, dim: int, dim_attn: int, dim_ffn: int, num_heads: int, num_buckets: int):
        super().__init__()
        self.norm1, self.norm2 = T5Norm(dim), T5Norm(dim)
        self.attn, self.ffn = T5Attention(dim, dim_attn, num_heads), T5FeedForward(dim, dim_ffn)
        self.pos_embedding = RelativePosition(num_buckets, num_heads)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        bias = self.pos_embedding(x.shape[1]).to(x.dtype)
        bias = bias.masked_fill(~mask[:, None, None, :], torch.finfo(x.dtype).min)
        x = x + self.attn(self.norm1(x), bias)
        return x + self.ffn(self.norm2(x))


class UMT5(nn.Module):
    """UMT5's encoder. The defaults are UMT5-XXL's, with 5.7 billion parameters; `load_umt5` reads its weights."""

    def __init__(
        self, vocab: int = 256384, dim: int = 4096, dim_attn: int = 4096, dim_ffn: int = 10240, num_heads: int = 64,
        num_layers: int = 24, num_buckets: int = 32,
    ):  # fmt: skip
        super().__init__()
        self.token_embedding = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(T5Block(dim, dim_attn, dim_ffn, num_heads, num_buckets) for _ in range(num_layers))
        self.norm = T5Norm(dim)

    @torch.no_grad()
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids (B, S) integer, mask (B, S), 1 for a token and 0 for padding -> (B, S, dim), 0 where mask is 0."""
        mask, x = mask.bool(), self.token_embedding(ids)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x) * mask.unsqueeze(-1)


TRANSFORMERS_NAMES = [  # facts of github.com/huggingface/transformers, modeling_umt5.py, against wan/modules/t5.py
    ("^shared.", "^token_embedding."),  # one tensor, under this name, the next, or both
    ("^encoder.embed_tokens.", "^token_embedding."),
    ("^encoder.final_layer_norm.", "^norm."),
    ("^encoder.block.", "^blocks."),
    (".layer.0.SelfAttention.relative_attention_bias.", ".pos_embedding.embedding."),
    (".layer.0.SelfAttention.", ".attn."),
    (".layer.0.layer_norm.", ".norm1."),
    (".layer.1.layer_norm.", ".norm2."),
    (".layer.1.DenseReluDense.wi_0.", ".ffn.gate.0."),
    (".layer.1.DenseReluDense.wi_1.", ".ffn.fc1."),
    (".layer.1.DenseReluDense.wo.", ".ffn.fc2."),
]


def load_umt5(path: str | Path, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu") -> UMT5:
    """UMT5's encoder, frozen, from models_t5_umt5-xxl-enc-bf16.pth, the folder that holds it, or diffusers'
    text_encoder/ or the folder above that.

    UserError for a file that does not exist, is damaged or holds other tensors.
    """

    def build(shapes: dict[str, tuple[int, ...]]) -> UMT5:
        vocab, dim = shapes["token_embedding.weight"]
        dim_ffn, dim_attn = shapes["blocks.0.ffn.fc1.weight"][0], shapes["blocks.0.attn.q.weight"][0]
        num_buckets, num_heads = shapes["blocks.0.pos_embedding.embedding.weight"]
        layers = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
        return UMT5(vocab, dim, dim_attn, dim_ffn, num_heads, layers, num_buckets)

    places = ("models_t5_umt5-xxl-enc-bf16.pth", "text_encoder")
    return load(path, lambda name: rename(name, TRANSFORMERS_NAMES), build, "UMT5's encoder", places, dtype, device)


def clean(caption: str) -> str:
    """Wan's cleaning: mends mojibake if `ftfy` is installed, decodes HTML entities twice, and joins white space."""
    try:
        import ftfy

        caption = ftfy.fix_text(caption)
    except ImportError:
        pass
    return re.sub(r"\s+", " ", html.unescape(html.unescape(caption))).strip()


class Tokenizer:
    """UMT5's tokenizer, from its tokenizer.json: caption -> ids, with </s> at the end."""

    END, PAD = 1, 0

    def __init__(self, path: str | Path, max_len: int = 512):
        """path: the file or its folder, or Wan's or diffusers' folder around that. UserError for another tokenizer."""
        self.max_len = max_len
        places = [Path(path) / place / "tokenizer.json" for place in ("", "tokenizer", "google/umt5-xxl")]
        file = next((f for f in [Path(path), *places] if f.is_file()), None)
        if file is None:
            raise UserError(f"{path}: expected a folder with UMT5's tokenizer.json, found none")
        try:
            self.reader = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the class that tokenizers raises
            raise UserError(f"{file}: expected a tokenizer, got: {error}") from None
        pad, end = self.reader.token_to_id("<pad>"), self.reader.token_to_id("</s>")
        if (pad, end) != (self.PAD, self.END):
            raise UserError(f"{file}: expected UMT5's tokenizer, <pad> = 0 and </s> = 1, got {pad} and {end}")

    def __call__(self, caption: str) -> list[int]:
        """At most max_len ids, with </s>. A longer caption is cut, as Wan does, and a line on stderr says so."""
        ids = self.reader.encode(clean(caption), add_special_tokens=False).ids
        if len(ids) >= self.max_len:
            print(f"{len(ids) + 1} tokens, cut to {self.max_len}: {caption[:60]!r} ...", file=sys.stderr)
        return ids[: self.max_len - 1] + [self.END]


class TextEncoder:
    """Captions -> UMT5's states, at the caption's own length. The DiT pads them with zeros."""

    def __init__(self, path: str | Path, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"):
        """path: the folder of Wan's release, or diffusers', or a transformer's in it. UserError for other weights or
        another tokenizer.
        """
        path = release_of(path)
        self.tokenizer, self.net = Tokenizer(path), load_umt5(path, dtype, device)
        self.device = torch.device(device)

    def encode(self, captions: list[str]) -> list[Tensor]:
        """The states (S, 4096) of each caption's S tokens, on the CPU, in the weights' dtype.

        Captions go through one at a time, so nothing is spent on padding. UserError for an id beyond the weights.
        """
        states = []
        for caption in captions:
            ids = torch.tensor([self.tokenizer(caption)], device=self.device)
            if ids.max() >= len(self.net.token_embedding.weight):
                rows = len(self.net.token_embedding.weight)
                raise UserError(f"expected a tokenizer of {rows} tokens for this encoder, got id {int(ids.max())}")
            states.append(self.net(ids, torch.ones_like(ids))[0].cpu())
        return states

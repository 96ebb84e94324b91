"""From captions to text states. One interface for every encoder:

    encode(captions) -> list of (S, text_dim), one state a token, at each caption's true length

`TextEncoder` is Wan2.1's: UMT5's encoder and its tokenizer. `WordVectors` is the tiny preset's: a fixed random vector
for each word, so it knows every word and needs no weights.
"""

import hashlib
import html
import math
import re
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from runtime.run import UserError
from wan.checkpoint import Checkpoint, fill, renaming


class WordVectors:
    """A standard normal vector for each word, drawn from the word itself: the same on every machine and in
    every run.
    """

    dim = 32  # the tiny preset's text_dim
    max_len = 11  # its text_len of 24, less 13 slots for the task prompts of 13 latent frames

    def encode(self, captions: list[str]) -> list[Tensor]:
        """Words are runs of letters and digits, in lower case; those past max_len are dropped. No words: (0, dim)."""
        vectors = [[self._word(w) for w in self.words(caption)[: self.max_len]] for caption in captions]
        return [torch.stack(v) if v else torch.zeros(0, self.dim) for v in vectors]

    @staticmethod
    def words(caption: str) -> list[str]:
        return re.findall(r"\w+", caption.lower())

    def _word(self, word: str) -> Tensor:
        seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=7).digest(), "big")
        return torch.randn(self.dim, generator=torch.Generator().manual_seed(seed))


# ---- UMT5, Wan2.1's text encoder -------------------------------------------------------------------------------------
# Parameter names and arithmetic are those of the release (github.com/Wan-Video/Wan2.1, wan/modules/t5.py, Apache-2.0),
# restated. Inference only.

NEGATIVE = (  # Wan's, sample_neg_prompt of github.com/Wan-Video/Wan2.1, wan/configs/shared_config.py
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
MAX_DISTANCE = 128  # tokens; all that are farther apart share a bucket


class T5Norm(nn.Module):
    """x / rms(x) · weight, in float32."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), 1e-6).to(x.dtype)


class RelativePosition(nn.Module):
    """A bias for each head and distance: exact up to a quarter of the buckets each way, then logarithmic."""

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
    """Without 1/√d, as T5's are."""

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
    """The encoder of UMT5; the defaults are UMT5-XXL's, 5.7 billion parameters. Weights: `load_umt5`."""

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
    (r"^(shared|encoder\.embed_tokens)\.", "token_embedding."),  # one tensor, under either name or both
    (r"^encoder\.final_layer_norm\.", "norm."),
    (r"^encoder\.block\.", "blocks."),
    (r"\.layer\.0\.SelfAttention\.relative_attention_bias\.", ".pos_embedding.embedding."),
    (r"\.layer\.0\.SelfAttention\.", ".attn."),
    (r"\.layer\.0\.layer_norm\.", ".norm1."),
    (r"\.layer\.1\.layer_norm\.", ".norm2."),
    (r"\.layer\.1\.DenseReluDense\.wi_0\.", ".ffn.gate.0."),
    (r"\.layer\.1\.DenseReluDense\.wi_1\.", ".ffn.fc1."),
    (r"\.layer\.1\.DenseReluDense\.wo\.", ".ffn.fc2."),
]


_rename = renaming(TRANSFORMERS_NAMES)


def load_umt5(path: str | Path, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu") -> UMT5:
    """UMT5's encoder: models_t5_umt5-xxl-enc-bf16.pth, the folder that holds it, or diffusers' (or its text_encoder/).

    UserError for a file that is not there, is damaged or holds other tensors.
    """
    path = Path(path)
    path = next((p for p in (path / "models_t5_umt5-xxl-enc-bf16.pth", path / "text_encoder") if p.exists()), path)
    source = Checkpoint(path)
    shapes = {_rename(name): source.shape(name) for name in source}
    try:
        vocab, dim = shapes["token_embedding.weight"]
        dim_ffn, dim_attn = shapes["blocks.0.ffn.fc1.weight"][0], shapes["blocks.0.attn.q.weight"][0]
        num_buckets, num_heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    except KeyError as error:
        raise UserError(f"{path}: expected UMT5's encoder, found no {error}") from None
    except (ValueError, IndexError):
        raise UserError(f"{path}: expected UMT5's encoder, its tensors have other shapes") from None
    layers = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
    with torch.device("meta"):
        net = UMT5(vocab, dim, dim_attn, dim_ffn, num_heads, layers, num_buckets)
    return fill(net, source, _rename, dtype, device).eval()


def clean(caption: str) -> str:
    """Wan's cleaning: mojibake mended where `ftfy` is installed, HTML entities twice, white space to single spaces."""
    try:
        import ftfy

        caption = ftfy.fix_text(caption)
    except ImportError:
        pass
    return re.sub(r"\s+", " ", html.unescape(html.unescape(caption))).strip()


class Tokenizer:
    """UMT5's: caption -> ids, </s> at the end. From tokenizer.json, as Wan's is, or spiece.model by sentencepiece."""

    END, PAD = 1, 0

    def __init__(self, path: str | Path, max_len: int = 512):
        """path: the file, or a folder with it: google/umt5-xxl, or diffusers' with tokenizer/. UserError for others."""
        self.max_len = max_len
        places = [Path(path), Path(path) / "tokenizer", Path(path) / "google/umt5-xxl"]
        files = [p / name for name in ("tokenizer.json", "spiece.model") for p in places]
        file = next((f for f in [Path(path), *files] if f.is_file()), None)
        if file is None or file.suffix not in (".json", ".model"):
            raise UserError(f"{path}: expected tokenizer.json or spiece.model, found neither")
        self._ids, pad, end = self._json(file) if file.suffix == ".json" else self._sentencepiece(file)
        if (pad, end) != (self.PAD, self.END):
            raise UserError(f"{file}: expected UMT5's tokenizer, <pad> = 0 and </s> = 1, got {pad} and {end}")

    @staticmethod
    def _json(file: Path):
        from tokenizers import Tokenizer as Reader

        try:
            reader = Reader.from_file(str(file))
        except Exception as error:  # tokenizers raises Exception itself
            raise UserError(f"{file}: expected a tokenizer, got: {error}") from None
        ids = lambda text: reader.encode(text, add_special_tokens=False).ids  # noqa: E731
        return ids, reader.token_to_id("<pad>"), reader.token_to_id("</s>")

    @staticmethod
    def _sentencepiece(file: Path):
        try:
            import sentencepiece
        except ImportError:
            raise UserError(f"{file}: reading it needs sentencepiece: pip install sentencepiece") from None
        try:
            reader = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{file}: expected a sentencepiece model, got: {error}") from None
        return reader.encode, reader.pad_id(), reader.eos_id()

    def __call__(self, caption: str) -> list[int]:
        """At most max_len ids, </s> among them: what is longer is cut, as Wan does, and said once a caption."""
        ids = list(self._ids(clean(caption)))
        if len(ids) >= self.max_len:
            print(f"{len(ids) + 1} tokens, cut to {self.max_len}: {caption[:60]!r} ...", file=sys.stderr)
        return ids[: self.max_len - 1] + [self.END]


class TextEncoder:
    """Captions -> UMT5's states, at true length: what a shorter text is padded with is zeros, and the DiT pads."""

    def __init__(self, path: str | Path, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"):
        """path: a folder of Wan2.1's, original or diffusers'. UserError if weights and tokenizer are not a pair."""
        self.tokenizer, self.net = Tokenizer(path), load_umt5(path, dtype, device)
        self.device = torch.device(device)

    def encode(self, captions: list[str]) -> list[Tensor]:
        """Each (S, 4096) in the weights' dtype, S its tokens. One at a time: no padding is computed."""
        states = []
        for caption in captions:
            ids = torch.tensor([self.tokenizer(caption)], device=self.device)
            if ids.max() >= len(self.net.token_embedding.weight):
                rows = len(self.net.token_embedding.weight)
                raise UserError(f"expected a tokenizer of {rows} tokens for this encoder, got id {int(ids.max())}")
            states.append(self.net(ids, torch.ones_like(ids))[0].cpu())
        return states

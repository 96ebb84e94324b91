"""The tiny preset's codec: linear, a PCA of whole small pictures, fitted on the clips in seconds.

    encode(video (B, 3, 4k+1, h, w) in [-1, 1]) -> x0 (B, C, k+1, H, W)          decode(x0) -> video, clamped to [-1, 1]

Latent frame 0 is pixel frame 0; latent frame i is pixel frames 4i−3 … 4i, as in Wan's VAE (wan/vae.py).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from runtime.files import read_tensors, write_tensors

GROUP = 4  # pixel frames in a latent frame, after the first
PATCH = 64  # px, side of the patches: a clip of the balls is one, so that it has no seams


class LinearVAE:
    """Codes each patch, of one frame (the first) or of four, by its first principal components: the latent channels.

    One scale for all components makes their mean variance 1 and keeps distances. With a scale for each, the faint
    components, which nobody sees, would weigh as much as a ball's position, and a model would learn visibly slower.
    """

    side = PATCH

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    @property
    def channels(self) -> int:
        return self.tensors["first.basis"].shape[1]

    @classmethod
    def fit(cls, videos: Tensor, components: int = 28) -> "LinearVAE":
        """Fits a codec on videos (B, 3, 4k+1, h, w) in [-1, 1], h and w divisible by PATCH."""
        tensors = {}
        codec = cls(tensors)
        for name, x in zip(("first", "group"), codec._patches(videos)):
            flat = x.reshape(-1, x.shape[-1])
            flat = flat[:: max(1, len(flat) // 3000)]
            mean = flat.mean(0)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # svd_lowrank starts from a random subspace
                _, s, basis = torch.svd_lowrank(flat - mean, q=components + 8, niter=4)
            sign = basis[basis.abs().argmax(0), torch.arange(basis.shape[1])].sign()  # it is free: make it a fixed one
            tensors[f"{name}.mean"] = mean
            basis = (basis * sign)[:, :components]
            # of fewer pictures than components the rest is empty: their channels are 0
            tensors[f"{name}.basis"] = F.pad(basis, (0, components - basis.shape[1])).contiguous()
            scale = s[:components].square().mean().sqrt() / (len(flat) - 1) ** 0.5
            tensors[f"{name}.scale"] = scale.clamp(min=1e-6)  # pictures that are all alike vary by nothing
        return codec

    def encode(self, video: Tensor) -> Tensor:
        """video (B, 3, 4k+1, h, w) in [-1, 1] -> x0 (B, components, k+1, h/PATCH, w/PATCH). Else ValueError."""
        coded = []
        for name, x in zip(("first", "group"), self._patches(video)):
            mean, basis, scale = (self.tensors[f"{name}.{part}"] for part in ("mean", "basis", "scale"))
            coded.append((x - mean) @ (basis / scale))
        return rearrange(torch.cat(coded, dim=1), "b f h w k -> b k f h w")

    def decode(self, x0: Tensor) -> Tensor:
        """The inverse of `encode`, clamped to [-1, 1]."""
        B, _, frames, H, W = x0.shape
        video = x0.new_empty(B, 3, GROUP * (frames - 1) + 1, H * PATCH, W * PATCH)
        join = "(b f h w) (c g p q) -> b c (f g) (h p) (w q)"
        for name, some, g in (("first", slice(0, 1), 1), ("group", slice(1, None), GROUP)):
            mean, basis, scale = (self.tensors[f"{name}.{part}"] for part in ("mean", "basis", "scale"))
            x = rearrange(scale * x0[:, :, some], "b k f h w -> (b f h w) k")
            values = torch.addmm(mean, x, basis.t())
            video[:, :, some] = rearrange(values, join, b=B, h=H, w=W, c=3, g=g, p=PATCH, q=PATCH)
        return video.clamp_(-1, 1)

    def _patches(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """First frame and groups of 4, cut into patches: (B, 1 | k, H, W, values)."""
        T = video.shape[2]
        if T % GROUP != 1:
            raise ValueError(f"video: expected 4k+1 frames, got {T}")
        cut = "b c (f g) (h p) (w q) -> b f h w (c g p q)"
        first, rest = (video[:, :, :1], 1), (video[:, :, 1:], GROUP)
        return tuple(rearrange(part, cut, g=g, p=PATCH, q=PATCH) for part, g in (first, rest))

    def save(self, path: Path) -> None:
        write_tensors(path, self.tensors)


def load(shards: str | Path) -> LinearVAE:
    """The codec that a folder of shards was made with. UserError if there is none."""
    return LinearVAE(read_tensors(Path(shards) / "codec.safetensors"))

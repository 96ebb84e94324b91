"""Between pictures and latents. One interface for every codec:

    encode(video (B, 3, 4k+1, h, w) in [-1, 1]) -> x0 (B, C, k+1, H, W)
    decode(x0) -> video, clamped to [-1, 1]
    channels, side                                 C, and the pixels in a latent position's height and width

Latent frame 0 is pixel frame 0; latent frame i is pixel frames 4i−3 … 4i. So a prefix of latent frames is
exactly a prefix of pixel frames, and no latent frame sees a later pixel.

`VAE` is Wan2.1's. `LinearVAE` is the tiny preset's: a PCA of picture patches, fitted in seconds on the clips.
"""

from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from runtime import run as common
from wan.checkpoint import Checkpoint, fill, renaming

GROUP = 4  # pixel frames in a latent frame, after the first
PATCH = 32  # px, side of LinearVAE's patches


def check_size(preset: str, frames: int, height: int, width: int) -> None:
    """UserError for clips that the preset's codec and transformer cannot take."""
    if frames % GROUP != 1 or frames < 5:
        near = max(5, frames // GROUP * GROUP + 1)
        raise common.UserError(
            f"--frames: expected 4k+1 (a latent frame holds 4), at least 5, got {frames}; try {near}"
        )
    side = PATCH if preset == "tiny" else 16  # px: Wan's 8, two by two in a patch of the transformer
    if height % side or width % side or min(height, width) < side:
        raise common.UserError(f"--height, --width: expected multiples of {side}, got {height} x {width}")


class LinearVAE:
    """A linear codec: each patch of one colour channel, alone (first frame) or over 4 frames, by its first
    principal components.

    Colour channels and patches share one basis. Latent channel = colour · components + component. One scale for
    all components makes the mean variance 1 and keeps distances: scaled to unit variance each, the faint
    components, which nobody sees, would weigh as much as the ball's position, and a model learns visibly
    slower.
    """

    side = PATCH

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    @property
    def channels(self) -> int:
        return 3 * self.tensors["first.basis"].shape[1]

    @classmethod
    def fit(cls, videos: Tensor, components: int = 16) -> "LinearVAE":
        """Fits on videos (B, 3, 4k+1, h, w) float in [-1, 1], h and w divisible by PATCH."""
        tensors = {}
        codec = cls(tensors)
        for name, x in zip(("first", "group"), codec._patches(videos)):
            flat = x.reshape(-1, x.shape[-1])
            flat = flat[:: max(1, len(flat) // 10_000)]
            mean = flat.mean(0)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # svd_lowrank starts from a random subspace
                _, s, basis = torch.svd_lowrank(flat - mean, q=components + 8, niter=4)
            sign = basis[
                basis.abs().argmax(0), torch.arange(basis.shape[1])
            ].sign()  # a basis vector's sign is free: pin it
            tensors[f"{name}.mean"] = mean
            tensors[f"{name}.basis"] = (basis * sign)[:, :components].contiguous()
            tensors[f"{name}.scale"] = s[:components].square().mean().sqrt() / (len(flat) - 1) ** 0.5
        return codec

    def encode(self, video: Tensor) -> Tensor:
        """video (B, 3, 4k+1, h, w) in [-1, 1] -> x0 (B, 3·components, k+1, h / PATCH, w / PATCH).

        ValueError for other lengths.
        """
        coded = []
        for name, x in zip(("first", "group"), self._patches(video)):
            mean, basis, scale = (self.tensors[f"{name}.{part}"] for part in ("mean", "basis", "scale"))
            coded.append((x - mean) @ (basis / scale))
        return rearrange(torch.cat(coded, dim=1), "b f h w c k -> b (c k) f h w")

    def decode(self, x0: Tensor) -> Tensor:
        """The inverse of `encode`, clamped to [-1, 1]."""
        x0 = rearrange(x0, "b (c k) f h w -> b f h w c k", c=3)
        video = []
        for name, x, frames in (("first", x0[:, :1], 1), ("group", x0[:, 1:], GROUP)):
            mean, basis, scale = (self.tensors[f"{name}.{part}"] for part in ("mean", "basis", "scale"))
            pixels = x @ (basis * scale).T + mean
            video.append(rearrange(pixels, "b f h w c (g p q) -> b c (f g) (h p) (w q)", g=frames, p=PATCH))
        return torch.cat(video, dim=2).clamp(-1, 1)

    def _patches(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """First frame and groups of 4, cut into patches: (B, 1 | k, H, W, 3, pixels)."""
        T = video.shape[2]
        if T % GROUP != 1:
            raise ValueError(f"video: expected 4k+1 frames, got {T}")
        cut = "b c (f g) (h p) (w q) -> b f h w c (g p q)"
        return tuple(
            rearrange(part, cut, g=g, p=PATCH, q=PATCH) for part, g in ((video[:, :, :1], 1), (video[:, :, 1:], GROUP))
        )

    def save(self, path: Path) -> None:
        common.write_tensors(path, self.tensors)


def load(shards: str | Path) -> LinearVAE:
    """The codec that a folder of shards was made with."""
    return LinearVAE(common.read_tensors(Path(shards) / "codec.safetensors"))


# ---- Wan2.1's VAE ----------------------------------------------------------------------------------------------------
# Parameter names and arithmetic are those of the release (github.com/Wan-Video/Wan2.1, wan/modules/vae.py, Apache-2.0),
# restated. Every layer looks back in time only. A clip may come in pieces: `past` holds what the layers need of the
# pieces before, and a whole clip is one piece.

LATENT_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
               0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)  # fmt: skip
LATENT_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
              3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)  # fmt: skip


class CausalConv3d(nn.Conv3d):
    """A convolution that sees the present and the past: before the first frame there are zeros."""

    def __init__(self, in_dim: int, out_dim: int, kernel: int | tuple[int, int, int], stride=1):
        kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
        super().__init__(in_dim, out_dim, kernel, stride, (0, kernel[1] // 2, kernel[2] // 2))
        self.history = kernel[0] - 1  # frames of the past that it sees

    def extend(self, x: Tensor, past: dict) -> Tensor:
        """The frames before x, and x. `past` then holds the end of x."""
        if not self.history:
            return x
        before = past.get(self)
        if before is None:
            before = x.new_zeros(*x.shape[:2], self.history, *x.shape[3:])
        x = torch.cat([before, x], dim=2)
        past[self] = x[:, :, -self.history :].clone()
        return x

    def forward(self, x: Tensor, past: dict | None = None) -> Tensor:
        """Without `past`, x is extended already."""
        return super().forward(x if past is None else self.extend(x, past))


class ChannelNorm(nn.Module):
    """x / ‖x‖ · √C · gamma over the channels of each position (RMS norm without eps)."""

    def __init__(self, dim: int, axes: int = 3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * axes))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * x.shape[1] ** 0.5 * self.gamma


class ResidualBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        conv1, conv2 = CausalConv3d(in_dim, out_dim, 3), CausalConv3d(out_dim, out_dim, 3)
        self.residual = nn.ModuleDict({"0": ChannelNorm(in_dim), "2": conv1, "3": ChannelNorm(out_dim), "6": conv2})
        self.shortcut = CausalConv3d(in_dim, out_dim, 1) if in_dim != out_dim else None

    def forward(self, x: Tensor, past: dict) -> Tensor:
        h = x
        for norm, conv in (("0", "2"), ("3", "6")):
            # two statements: while the convolution runs, nothing but its own input is kept
            h = self.residual[conv].extend(F.silu(self.residual[norm](h), inplace=True), past)
            h = self.residual[conv](h)
        h += x if self.shortcut is None else self.shortcut(x, past)
        return h


class FrameAttention(nn.Module):
    """Single-head attention among the positions of each frame."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = ChannelNorm(dim, 2)
        self.to_qkv, self.proj = nn.Conv2d(dim, 3 * dim, 1), nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, past: dict) -> Tensor:
        B, _, T, H, W = x.shape
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        q, k, v = rearrange(self.to_qkv(self.norm(frames)), "n (three c) h w -> three n 1 (h w) c", three=3)
        out = rearrange(F.scaled_dot_product_attention(q, k, v), "n 1 (h w) c -> n c h w", h=H, w=W)
        return x + rearrange(self.proj(out), "(b t) c h w -> b c t h w", b=B)


def _each_frame(layers: nn.Module, x: Tensor) -> Tensor:
    """One after the other: all at once, the widest of the decoder would set its peak memory."""
    return torch.stack([layers(frame) for frame in x.unbind(2)], dim=2)


class Downsample(nn.Module):
    """Half the height and width and, if `temporal`, half the frames after the first, which stays alone."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, past: dict) -> Tensor:
        x = _each_frame(self.resample, x)
        if self.time_conv is None:
            return x
        before = past.get(self)
        past[self] = x[:, :, -1:].clone()
        if before is not None:
            return self.time_conv(torch.cat([before, x], dim=2))
        return torch.cat([x[:, :, :1], self.time_conv(x)], dim=2) if x.shape[2] > 1 else x


class Upsample(nn.Module):
    """Twice the height and width, half the channels and, if `temporal`, twice the frames after the first.

    The first frame never enters the convolution over time, not even as the past of the second.
    """

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(dim, dim // 2, 3, padding=1)
        )
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, past: dict) -> Tensor:
        if self.time_conv is not None:
            first = x[:, :, : 0 if self in past else 1]
            past[self] = True
            rest = x[:, :, first.shape[2] :]
            if rest.shape[2]:
                rest = rearrange(self.time_conv(rest, past), "b (two c) t h w -> b c (t two) h w", two=2)
            x = torch.cat([first, rest], dim=2)
        return _each_frame(self.resample, x)


class Coder(nn.Module):
    """Encoder or decoder: `conv1`, a stack with a middle, `head`."""

    def __init__(self, first: CausalConv3d, stack: str, layers: list[nn.Module], dim: int, head: tuple[int, int]):
        super().__init__()
        self.conv1, self.stack = first, stack
        setattr(self, stack, nn.ModuleList(layers))
        self.middle = nn.ModuleList([ResidualBlock(dim, dim), FrameAttention(dim), ResidualBlock(dim, dim)])
        self.head = nn.ModuleDict({"0": ChannelNorm(head[0]), "2": CausalConv3d(*head, 3)})

    def forward(self, x: Tensor, past: dict) -> Tensor:
        layers, middle = list(getattr(self, self.stack)), list(self.middle)
        x = self.conv1(x, past)
        for layer in layers + middle if self.stack == "downsamples" else middle + layers:
            x = layer(x, past)
        x = self.head["2"].extend(F.silu(self.head["0"](x), inplace=True), past)
        return self.head["2"](x)


class VAE(nn.Module):
    """Wan2.1's: 4x in time, 8x in height and width, 16 channels, scaled to mean 0 and deviation 1 a channel.

    base_dim 96 is the release's. `encode` and `decode` work on the whole clip, or, streaming, on 4 pixel frames (one
    latent frame) at a time: no layer then holds more than 4 frames and the 2 before them. Weights: `load_vae`.
    """

    side = 8

    def __init__(self, base_dim: int = 96, z_dim: int = 16):
        super().__init__()
        self.channels = z_dim
        dims = [base_dim * m for m in (1, 1, 2, 4, 4)]
        layers: list[nn.Module] = []
        for stage, (a, b) in enumerate(zip(dims, dims[1:])):
            layers += [ResidualBlock(a, b), ResidualBlock(b, b)]
            layers += [Downsample(b, temporal=stage > 0)] if stage < 3 else []
        top = dims[-1]
        self.encoder = Coder(CausalConv3d(3, dims[0], 3), "downsamples", layers, top, (top, 2 * z_dim))
        self.conv1, self.conv2 = CausalConv3d(2 * z_dim, 2 * z_dim, 1), CausalConv3d(z_dim, z_dim, 1)
        layers, a = [], top
        for stage, b in enumerate(base_dim * m for m in (4, 4, 2, 1)):
            layers += [ResidualBlock(a, b), ResidualBlock(b, b), ResidualBlock(b, b)]
            layers += [Upsample(b, temporal=stage < 2)] if stage < 3 else []
            a = b // 2
        self.decoder = Coder(CausalConv3d(z_dim, top, 3), "upsamples", layers, top, (base_dim, 3))
        for name, values in (("mean", LATENT_MEAN), ("std", LATENT_STD)):
            self.register_buffer(name, torch.tensor(values[:z_dim]).view(-1, 1, 1, 1), persistent=False)

    @torch.no_grad()
    def encode(self, video: Tensor, streaming: bool = True) -> Tensor:
        """video (B, 3, 4k+1, h, w) in [-1, 1], h and w multiples of 8 -> x0 (B, z_dim, k+1, h / 8, w / 8) float32.

        The posterior's mean, not a sample. ValueError for other sizes.
        """
        if (
            video.ndim != 5
            or video.shape[1] != 3
            or video.shape[2] % 4 != 1
            or video.shape[3] % 8
            or video.shape[4] % 8
        ):
            raise ValueError(f"video: expected (B, 3, 4k+1, 8a, 8b), got {tuple(video.shape)}")
        past: dict = {}
        pieces = [video[:, :, :1], *video[:, :, 1:].split(4, dim=2)] if streaming and video.shape[2] > 1 else [video]
        dtype = self.conv1.weight.dtype
        z = torch.cat([self.conv1(self.encoder(piece.to(dtype), past), past) for piece in pieces], dim=2)
        return (z[:, : self.channels].float() - self.mean) / self.std

    @torch.no_grad()
    def decode(self, x0: Tensor, streaming: bool = True) -> Tensor:
        """x0 (B, z_dim, k+1, H, W) -> video (B, 3, 4k+1, 8H, 8W) float32, clamped to [-1, 1].

        ValueError for other sizes.
        """
        if x0.ndim != 5 or x0.shape[1] != self.channels:
            raise ValueError(f"x0: expected (B, {self.channels}, k+1, H, W), got {tuple(x0.shape)}")
        past: dict = {}
        z = (x0.float() * self.std + self.mean).to(self.conv2.weight.dtype)
        pieces = [self.conv2(piece, past) for piece in (z.split(1, dim=2) if streaming else [z])]
        return torch.cat([self.decoder(piece, past).float().clamp(-1, 1) for piece in pieces], dim=2)


DIFFUSERS_NAMES = [  # facts of github.com/huggingface/diffusers, autoencoder_kl_wan.py, against wan/modules/vae.py
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"\.conv_in\.", ".conv1."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.down_blocks\.(\d+)\.", r".downsamples.\1."),
    (r"\.up_blocks\.(\d)\.resnets\.(\d)\.", lambda m: f".upsamples.{4 * int(m[1]) + int(m[2])}."),
    (r"\.up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f".upsamples.{4 * int(m[1]) + 3}."),
    (r"((?:downsamples|upsamples|middle)\.\d+)\.norm1\.", r"\1.residual.0."),
    (r"((?:downsamples|upsamples|middle)\.\d+)\.conv1\.", r"\1.residual.2."),
    (r"((?:downsamples|upsamples|middle)\.\d+)\.norm2\.", r"\1.residual.3."),
    (r"((?:downsamples|upsamples|middle)\.\d+)\.conv2\.", r"\1.residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
]


_rename = renaming(DIFFUSERS_NAMES)


def load_vae(path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> VAE:
    """Wan2.1's VAE: Wan2.1_VAE.pth, the folder that holds it, or diffusers' (the folder, or its vae/).

    UserError for a file that is not there, is damaged or holds other tensors.
    """
    path = Path(path)
    path = next((p for p in (path / "Wan2.1_VAE.pth", path / "vae") if p.exists()), path)
    source = Checkpoint(path)
    shapes = {_rename(name): source.shape(name) for name in source}
    try:
        base_dim, z_dim = shapes["encoder.conv1.weight"][0], shapes["conv2.weight"][0]
    except KeyError as error:
        raise common.UserError(f"{path}: expected Wan2.1's VAE, found no {error}") from None
    except IndexError:
        raise common.UserError(f"{path}: expected Wan2.1's VAE, its tensors have other shapes") from None
    with torch.device("meta"):
        net = VAE(base_dim, z_dim)
    net = fill(net, source, _rename, dtype, device).eval()
    net.mean, net.std = (torch.tensor(a[:z_dim], device=device).view(-1, 1, 1, 1) for a in (LATENT_MEAN, LATENT_STD))
    return net

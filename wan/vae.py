"""Wan2.1's VAE, from pictures to latents and back.

    encode(video (B, 3, 4k+1, h, w) in [-1, 1]) -> x0 (B, C, k+1, H, W)
    decode(x0) -> video, clamped to [-1, 1]
    channels, side                                 C, and the pixels along each side of a latent position

Latent frame 0 is pixel frame 0; latent frame i is pixel frames 4i−3 … 4i. So a prefix of latent frames is exactly a
prefix of pixel frames, and no latent frame depends on a later pixel.
"""

from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from model import rename
from wan.checkpoint import load
from wan.experts import release_of

# Parameter names and arithmetic are those of the release (github.com/Wan-Video/Wan2.1, wan/modules/vae.py, Apache-2.0),
# restated. Every layer looks back in time only. A clip may come in pieces: `past` keeps what each layer needs from
# earlier pieces. A whole clip is one piece.

LATENT_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
               0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)  # fmt: skip
LATENT_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
              3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)  # fmt: skip


class CausalConv3d(nn.Conv3d):
    """A convolution over the present and the past. Before the first frame there are zeros."""

    def __init__(self, in_dim: int, out_dim: int, kernel: int | tuple[int, int, int], stride=1):
        kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
        super().__init__(in_dim, out_dim, kernel, stride, (0, kernel[1] // 2, kernel[2] // 2))
        self.history = kernel[0] - 1  # frames of the past that it sees

    def extend(self, x: Tensor, past: dict) -> Tensor:
        """x with the frames before it in front. `past` then keeps the end of x for the next piece."""
        if not self.history:
            return x
        before = past.get(self)
        if before is None:
            before = x.new_zeros(*x.shape[:2], self.history, *x.shape[3:])
        x = torch.cat([before, x], dim=2)
        past[self] = x[:, :, -self.history :].clone()
        return x

    def forward(self, x: Tensor, past: dict | None = None) -> Tensor:
        """Without `past`, x must come from `extend`."""
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
            # two statements, so that nothing but the convolution's own input is in memory while it runs
            h = self.residual[conv].extend(F.silu(self.residual[norm](h), inplace=True), past)
            h = self.residual[conv](h)
        h += x if self.shortcut is None else self.shortcut(x, past)
        return h


class FrameAttention(nn.Module):
    """Attention with one head among the positions of each frame."""

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
    """Applies layers to one frame at a time. On all frames at once, the decoder's widest would set its peak memory."""
    return torch.stack([layers(frame) for frame in x.unbind(2)], dim=2)


class Downsample(nn.Module):
    """Halves height and width and, if `temporal`, the number of frames after the first, which stays alone."""

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
    """Doubles height and width, halves the channels and, if `temporal`, doubles the frames after the first.

    The convolution over time never sees the first frame, not even as the past of the second.
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
    """The encoder (conv1, stack, middle, head) or the decoder (conv1, middle, stack, head)."""

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
    """Wan2.1's VAE: 4x in time, 8x in height and width, 16 channels, each scaled to mean 0 and deviation 1.

    The release has base_dim 96; `load_vae` reads its weights. When streaming, `encode` and `decode` work on one latent
    frame (4 pixel frames) at a time, so no layer holds more than 4 frames and the 2 before them.
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

        x0 is the posterior's mean, not a sample. ValueError for other sizes.
        """
        if video.ndim != 5 or video.shape[1] != 3 or video.shape[2] % 4 != 1 or any(n % 8 for n in video.shape[3:]):
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
    ("^quant_conv.", "^conv1."),
    ("^post_quant_conv.", "^conv2."),
    (".conv_in.", ".conv1."),
    (".norm_out.", ".head.0."),
    (".conv_out.", ".head.2."),
]
DIFFUSERS_BLOCKS = [  # of the same: names within its down_blocks, mid_block and up_blocks
    (".norm1.", ".residual.0."),
    (".conv1.", ".residual.2."),
    (".norm2.", ".residual.3."),
    (".conv2.", ".residual.6."),
    (".conv_shortcut.", ".shortcut."),
    (".mid_block.resnets.0.", ".middle.0."),
    (".mid_block.attentions.0.", ".middle.1."),
    (".mid_block.resnets.1.", ".middle.2."),
    (".down_blocks.", ".downsamples."),
    *((f".up_blocks.{i}.resnets.{k}.", f".upsamples.{4 * i + k}.") for i in range(4) for k in range(3)),
    *((f".up_blocks.{i}.upsamplers.0.", f".upsamples.{4 * i + 3}.") for i in range(3)),
]


def load_vae(path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> VAE:
    """Wan2.1's VAE, frozen, from Wan2.1_VAE.pth, the folder that holds it, or diffusers' vae/ or the folder above that,
    or a transformer's folder beside it.

    UserError for a file that does not exist, is damaged or holds other tensors.
    """

    def wan_name(name: str) -> str:
        return rename(name, DIFFUSERS_BLOCKS if "_block" in name else DIFFUSERS_NAMES)

    def build(shapes: dict[str, tuple[int, ...]]) -> VAE:
        return VAE(base_dim=shapes["encoder.conv1.weight"][0], z_dim=shapes["conv2.weight"][0])

    net = load(release_of(path), wan_name, build, "Wan2.1's VAE", ("Wan2.1_VAE.pth", "vae"), dtype, device)
    for name, values in (("mean", LATENT_MEAN), ("std", LATENT_STD)):  # of no checkpoint, so still on the meta device
        setattr(net, name, torch.tensor(values[: net.channels], device=device).view(-1, 1, 1, 1))
    return net

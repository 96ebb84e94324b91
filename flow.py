"""Flow matching: the one statement of this project's time and sign convention, the noise, the times, the solver.

    t in [0, 1]: 0 = data, 1 = noise
    x_t = (1 − t)·x0 + t·noise            the straight path from data to noise
    v   = noise − x0 = d x_t / dt         what the network predicts

Every random number is drawn from a key such as (seed, step, clip id): nothing depends on how many processes
run, on the batch a sample falls in, or on whether the run was interrupted.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator that is a function of its key. Draws are the same on every device: draw on the CPU, then move."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def draw_noise(shape: Sequence[int], keys: Sequence[tuple]) -> Tensor:
    """Standard normal (len(keys), *shape) float32: sample i depends on keys[i] only."""
    return torch.stack([torch.randn(tuple(shape), generator=generator("noise", *key)) for key in keys])


def draw_t(keys: Sequence[tuple], mean: float | None = None, std: float = 1.0, t_shift: float = 1.0) -> Tensor:
    """Training times (len(keys),) float32 in (0, 1): uniform, or with a mean logit-normal(mean, std); then
    `shift_t`.
    """
    if mean is None:
        t = torch.stack([torch.rand((), generator=generator("t", *key)) for key in keys])
    else:
        normal = torch.stack([torch.randn((), generator=generator("t", *key)) for key in keys])
        t = torch.sigmoid(mean + std * normal)
    return shift_t(t, t_shift)


def shift_t(t: Tensor, t_shift: float) -> Tensor:
    """s·t / (1 + (s − 1)·t): moves times towards noise for s > 1; 0 and 1 stay."""
    return t_shift * t / (1 + (t_shift - 1) * t)


def per_sample(t: Tensor, x: Tensor) -> Tensor:
    """t (B,) or per frame (B, F), shaped to multiply x (B, C, F, H, W)."""
    return t.view(-1, 1, 1, 1, 1) if t.ndim == 1 else t[:, None, :, None, None]


def add_noise(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 − t)·x0 + t·noise. x0, noise (B, C, F, H, W); t (B,) or (B, F)."""
    t = per_sample(t, x0)
    return (1 - t) * x0 + t * noise


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """v = noise − x0, the target at every t."""
    return noise - x0


def guided(net: Callable, guidance: float, negative: Tensor | None = None) -> Callable:
    """Classifier-free guidance u + guidance·(c − u) around net(x_t, t, text, cond_mask); guidance = 1 is net itself.

    `negative (S, text_dim)`: text states of the unconditional branch (empty text, or a negative prompt). The
    given frames are given in both branches.
    """
    if guidance == 1:
        return net
    if negative is None:
        raise ValueError(f"guidance {guidance} needs the text states of the unconditional branch, got none")

    def call(x_t: Tensor, t: Tensor, text: Tensor, cond_mask: Tensor | None = None) -> Tensor:
        cond = net(x_t, t, text, cond_mask)
        uncond = net(x_t, t, negative.to(text).expand(len(text), -1, -1), cond_mask)
        return uncond + guidance * (cond - uncond)

    return call


def time_grid(nfe: int, t_shift: float) -> Tensor:
    """The solver's times, nfe + 1 of them, from exactly 1 to exactly 0."""
    return shift_t(torch.linspace(1, 0, nfe + 1, dtype=torch.float64), t_shift).float()


@torch.no_grad()
def euler(
    net: Callable,
    noise: Tensor,
    text: Tensor,
    nfe: int,
    t_shift: float,
    x0: Tensor | None = None,
    cond_mask: Tensor | None = None,
) -> Tensor:
    """Samples x0 from noise by nfe Euler steps of dx/dt = net(x_t, t, text[, cond_mask]).

    noise (B, C, F, H, W), text (B, S, text_dim). With cond_mask (B, F) bool and the clean x0, the given frames
    are x0's at every step, so they come out bit for bit as they went in.
    """
    given = None if cond_mask is None else cond_mask[:, None, :, None, None]
    x = noise if given is None else torch.where(given, x0, noise)
    grid = time_grid(nfe, t_shift).tolist()
    for t, t_next in zip(grid[:-1], grid[1:]):
        now = torch.full((len(x),), t, device=x.device)
        v = net(x, now, text) if cond_mask is None else net(x, now, text, cond_mask)
        x = x + (t_next - t) * v
        if given is not None:
            x = torch.where(given, x0, x)
    return x

"""Flow matching: this project's convention for time and sign, stated once; its noise, times and solvers.

    t in [0, 1]: 0 = data, 1 = noise
    x_t = (1 − t)·x0 + t·noise            the straight path from data to noise
    v   = noise − x0 = d x_t / dt         what the network predicts

Every random number is drawn from a key such as (stage, seed, step, clip id). So no draw depends on the number of
processes, on the batch that a sample is in, or on whether the run was interrupted; and no two stages share one.
"""

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Grid = tuple[Tensor, Tensor]  # what a solver walks along: its noise levels, and the times that the network is told


def generator(*key: int | str) -> np.random.Generator:
    """A generator of its own for each key: Philox (Salmon et al. 2011) with 128 bits of the key's hash as its key.

    NumPy's, because PyTorch's CPU generator keeps 32 bits of a seed: of 100,000 keys some two would draw the same.
    Draw, then move: the numbers are then the same on every device.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "big")))


def draw_noise(shape: Sequence[int], keys: Sequence[tuple]) -> Tensor:
    """Standard normal (len(keys), *shape) float32. Sample i depends on keys[i] only."""
    draws = (generator("noise", *key).standard_normal(tuple(shape), dtype=np.float32) for key in keys)
    return torch.stack([torch.from_numpy(draw) for draw in draws])


def draw_t(
    keys: Sequence[tuple],
    mean: float | None = None,
    std: float = 1.0,
    t_shift: float = 1.0,
    t_min: float = 0.0,
    t_max: float = 1.0,
) -> Tensor:
    """Training times (len(keys),) float32 in (0, 1), one for each key.

    They are uniform without a mean and logit-normal(mean, std) with one; `shift_t` is then applied to them. t_min,
    t_max: of that distribution the part between them, as if every time outside were drawn again. 0 ≤ t_min < t_max ≤ 1.
    """
    draw = np.random.Generator.random if mean is None else np.random.Generator.standard_normal
    t = torch.tensor([draw(generator("t", *key), dtype=np.float32) for key in keys])
    whole = t_min <= 0 and t_max >= 1
    if not whole:
        t = _truncated(t, mean, std, shift_t(torch.tensor([t_min, t_max]).double(), 1 / t_shift))
    t = shift_t(t if mean is None else torch.sigmoid(mean + std * t), t_shift).float()
    return t if whole else t.clamp(t_min, t_max)  # what rounding takes out of it


def _truncated(draws: Tensor, mean: float | None, std: float, ends: Tensor) -> Tensor:
    """Draws, uniform or standard normal, as `draw_t` makes them, moved into the times between two ends, in float64.

    F⁻¹(F(a) + (F(b) − F(a))·F(draw)) with F, the draws' distribution function, between the draws a, b of the ends.
    """
    low, high = ends = ends.clamp(0, 1)  # rounding took one out of it
    if mean is None:
        return low + (high - low) * draws.double()
    low, high = (torch.logit(ends) - mean) / std
    side = -1 if low > 0 else 1  # in the upper tail F is 1 up to rounding: there the lower one, mirrored, is taken
    low, high, drawn = (torch.erfc(-x / math.sqrt(2)) / 2 for x in (side * low, side * high, draws.double()))
    return side * torch.special.ndtri(low + (high - low) * drawn)


def shift_t(t: Tensor, t_shift: float) -> Tensor:
    """s·t / (1 + (s − 1)·t) with s = t_shift > 0: s > 1 moves times towards noise; 0 and 1 stay where they are."""
    return t_shift * t / (1 + (t_shift - 1) * t)


def per_sample(t: Tensor, x: Tensor) -> Tensor:
    """t, (B,) or for each frame (B, F), as a view that broadcasts against x (B, C, F, H, W)."""
    return t.view(-1, 1, 1, 1, 1) if t.ndim == 1 else t[:, None, :, None, None]


def add_noise(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 − t)·x0 + t·noise. x0, noise (B, C, F, H, W); t (B,) or (B, F)."""
    t = per_sample(t, x0)
    return (1 - t) * x0 + t * noise


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """v = noise − x0, the network's target at every t."""
    return noise - x0


def both_branches(text: Tensor, negative: Tensor) -> Tensor:
    """Text states (2B, S, text_dim) of guidance's two branches: text (B, S', text_dim), then B times negative."""
    return torch.nn.utils.rnn.pad_sequence([*text, *[negative.to(text)] * len(text)], batch_first=True)


def guided(
    net: Callable, guidance: float, negative: Tensor | None = None, low: float = 0.0, high: float = 1.0
) -> Callable:
    """Classifier-free guidance u + guidance·(c − u) around net(x_t, t, text, cond_mask); guidance 1 returns net itself.

    Both branches are one batch, c first. negative (S, text_dim): the text states of u, of an empty text or a negative
    prompt. Given frames are given in both. Only at times low < t ≤ high, the same for the whole batch, is there
    guidance; elsewhere c is what comes out (arXiv:2404.07724). ValueError for guidance without negative.
    """
    if guidance == 1:
        return net
    if negative is None:
        raise ValueError(f"guidance {guidance}: expected text states for the unconditional branch, got none")

    def call(x_t: Tensor, t: Tensor, text: Tensor, cond_mask: Tensor | None = None) -> Tensor:
        if (low > 0 or high < 1) and not low < t[0].item() <= high:
            return net(x_t, t, text, cond_mask)
        mask = None if cond_mask is None else cond_mask.repeat(2, 1)
        both = net(x_t.repeat(2, 1, 1, 1, 1), t.repeat(2), both_branches(text, negative), mask)
        cond, uncond = both.chunk(2)
        return uncond + guidance * (cond - uncond)

    return call


def drop_captions(states: Sequence[Tensor], keys: Sequence[tuple], share: float, negative: Tensor | None) -> Tensor:
    """Text states (B, S, text_dim), padded with zeros to the longest, with a random `share` in [0, 1] of them replaced.

    states[i] (S_i, text_dim) gives way to negative (S', text_dim), which may be None at share 0: to what `guided` puts
    into its unconditional branch, so that guidance asks the network for what it was trained on. Whether sample i does
    depends on keys[i] only.
    """
    dropped = (share > 0 and generator("caption", *key).random() < share for key in keys)
    kept = [negative if drop else state for drop, state in zip(dropped, states, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(kept, batch_first=True)


def time_grid(nfe: int, t_shift: float) -> Grid:
    """A solver's noise levels σ (nfe + 1,), and the times (nfe,) that the network is told, both float32.

    σ is `shift_t` of even times and falls from exactly 1 to exactly 0. The network is told σ itself; in other grids
    (wan/grids.py) it may be told other times.
    """
    sigmas = shift_t(torch.linspace(1, 0, nfe + 1, dtype=torch.float64), t_shift).float()
    return sigmas, sigmas[:-1]


def _bind(net: Callable, text: Tensor, x0: Tensor | None, cond_mask: Tensor | None) -> tuple[Callable, Callable]:
    """net as a function of the state and one time; and the function that puts the given frames into a state."""
    more = () if cond_mask is None else (cond_mask,)

    def velocity_at(x: Tensor, t: float) -> Tensor:
        return net(x, torch.full((len(x),), t, device=x.device), text, *more)

    def paste(x: Tensor) -> Tensor:
        return x if cond_mask is None else torch.where(cond_mask[:, None, :, None, None], x0, x)

    return velocity_at, paste


@torch.no_grad()
def euler(
    net: Callable, noise: Tensor, text: Tensor, levels: Grid, x0: Tensor | None = None, cond_mask: Tensor | None = None
) -> Tensor:
    """Samples x0 from noise by Euler steps of dx/dt = net(x_t, t, text[, cond_mask]).

    noise (B, C, F, H, W) float32, text (B, S, text_dim); levels as `time_grid` returns them, one step for each time.
    With cond_mask (B, F) bool and the clean x0, the given frames are set to x0's at every step, so they come out bit
    for bit as they went in.
    """
    velocity_at, paste = _bind(net, text, x0, cond_mask)
    sigmas, times = (level.tolist() for level in levels)
    x = paste(noise)
    for s, s_next, t in zip(sigmas, sigmas[1:], times):
        x = paste(x + (s_next - s) * velocity_at(x, t))
    return x


@torch.no_grad()
def unipc(
    net: Callable, noise: Tensor, text: Tensor, levels: Grid, x0: Tensor | None = None, cond_mask: Tensor | None = None
) -> Tensor:
    """Samples as `euler` does, by UniPC (arXiv:2302.04867) as Wan2.1 runs it: order 2, B(h) = e^h − 1, one call a step.

    m = x − σ·v is the clean x0 that the network sees in x; it changes slowly over λ = ln((1 − σ)/σ). Take the step
    from σ to σ'. m' is the value of m at σ', m₋ that at the level before σ. With h = λ' − λ, E = 1 − e^−h and
    r = (λ₋ − λ)/h:

        x' = (σ'/σ)·x + (1 − σ')·E·(m + ρ₁·(m₋ − m)/r + ρ₂·(m' − m))

        predictor   ρ₁ = 1/2, ρ₂ = 0; ρ₁ = 0 on the first step, which has no m₋, and on the last
        corrector   ρ₁ + ρ₂ = 1/E − 1/h = b,  r·ρ₁ + ρ₂ = 1/E − 2b/h; on the first step ρ₁ = 0, ρ₂ = 1/2

    The network is called on the predictor's x', which gives m'. The corrector then computes x' again, with m', and the
    next step starts from that.
    """
    velocity_at, paste = _bind(net, text, x0, cond_mask)
    sigmas = levels[0].double()
    lam = (torch.log1p(-sigmas) - sigmas.log()).tolist()  # −∞ at σ = 1 and ∞ at 0; neither leads to a NaN
    sigmas, times = (level.tolist() for level in levels)
    last = len(times) - 1

    def step(i: int, x: Tensor, m: Tensor, older: Tensor | None, newer: Tensor | None = None) -> Tensor:
        """x' of step i: the predictor's, or, with m' (newer), the corrector's."""
        h = lam[i + 1] - lam[i]
        E, mean, rho2 = -math.expm1(-h), m, 0.5
        if 0 < i < last:
            r, b = (lam[i - 1] - lam[i]) / h, 1 / E - 1 / h
            rho1 = 0.5 if newer is None else (b - (1 / E - 2 * b / h)) / (1 - r)
            rho2, mean = b - rho1, mean + rho1 / r * (older - m)
        if newer is not None:
            mean = mean + rho2 * (newer - m)
        return sigmas[i + 1] / sigmas[i] * x + (1 - sigmas[i + 1]) * E * mean

    x = start = paste(noise)
    m = older = None
    for i, t in enumerate(times):
        newer = x - sigmas[i] * velocity_at(x, t)
        if i > 0:
            start = step(i - 1, start, m, older, newer)
        m, older = newer, m
        x = paste(step(i, start, m, older))  # entry by entry, so what m holds at given frames reaches no other frame
    return x


SOLVERS = {"euler": euler, "unipc": unipc}

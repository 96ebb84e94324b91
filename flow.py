"""Flow matching: the one statement of this project's time and sign convention, the noise, the times, the solvers.

    t in [0, 1]: 0 = data, 1 = noise
    x_t = (1 − t)·x0 + t·noise            the straight path from data to noise
    v   = noise − x0 = d x_t / dt         what the network predicts

Every random number is drawn from a key such as (seed, step, clip id): nothing depends on how many processes
run, on the batch a sample falls in, or on whether the run was interrupted.
"""

import hashlib
import math
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


def time_grid(nfe: int, t_shift: float, grid: str = "even") -> tuple[Tensor, Tensor]:
    """The solver's noise levels σ (nfe + 1,), falling to exactly 0, and the times (nfe,) that the network is told.

    Both float32; "even" tells the network σ itself, the others ⌊1000 σ⌋ / 1000. ValueError for another grid.

        even        `shift_t` of even times from exactly 1
        wan         of 0.999 (1 − i/nfe): Wan2.1, wan/utils/fm_solvers_unipc.py, FlowUniPCMultistepScheduler
        diffusers   of even times that end at 0.001, the last then set to 0 and the first to 1 − 1e-6: diffusers,
                    UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=t_shift)
    """
    if grid == "even":
        sigmas = shift_t(torch.linspace(1, 0, nfe + 1, dtype=torch.float64), t_shift).float()
        return sigmas, sigmas[:-1]
    ends = {"wan": (torch.tensor(0.999).item(), 0.0), "diffusers": (1.0, 0.001)}  # 0.999 in float32, as there
    if grid not in ends:
        raise ValueError(f"grid: expected even, wan or diffusers, got {grid}")
    first, last = ends[grid]
    # numpy's linspace, to the last bit: a σ that is a whole number of thousandths must not be rounded down
    sigmas = shift_t(torch.arange(nfe, dtype=torch.float64) * ((last - first) / nfe) + first, t_shift)
    sigmas = sigmas.clamp(max=1 - 1e-6)
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float(), ((1000 * sigmas).floor() / 1000).float()


def _bind(net: Callable, text: Tensor, x0: Tensor | None, cond_mask: Tensor | None) -> tuple[Callable, Callable]:
    """net as a function of the state and one time, and what puts the given frames into a state."""
    more = () if cond_mask is None else (cond_mask,)

    def velocity_at(x: Tensor, t: float) -> Tensor:
        return net(x, torch.full((len(x),), t, device=x.device), text, *more)

    def paste(x: Tensor) -> Tensor:
        return x if cond_mask is None else torch.where(cond_mask[:, None, :, None, None], x0, x)

    return velocity_at, paste


@torch.no_grad()
def euler(
    net: Callable,
    noise: Tensor,
    text: Tensor,
    nfe: int,
    t_shift: float,
    x0: Tensor | None = None,
    cond_mask: Tensor | None = None,
    grid: str = "even",
) -> Tensor:
    """Samples x0 from noise by nfe Euler steps of dx/dt = net(x_t, t, text[, cond_mask]) over `time_grid`.

    noise (B, C, F, H, W) float32, text (B, S, text_dim). With cond_mask (B, F) bool and the clean x0, the given frames
    are x0's at every step, so they come out bit for bit as they went in.
    """
    velocity_at, paste = _bind(net, text, x0, cond_mask)
    sigmas, times = (levels.tolist() for levels in time_grid(nfe, t_shift, grid))
    x = paste(noise)
    for s, s_next, t in zip(sigmas, sigmas[1:], times):
        x = paste(x + (s_next - s) * velocity_at(x, t))
    return x


@torch.no_grad()
def unipc(
    net: Callable,
    noise: Tensor,
    text: Tensor,
    nfe: int,
    t_shift: float,
    x0: Tensor | None = None,
    cond_mask: Tensor | None = None,
    grid: str = "even",
) -> Tensor:
    """Samples as `euler` does, by UniPC (arXiv:2302.04867) as Wan2.1 runs it: order 2, B(h) = e^h − 1, one call a step.

    m = x − σ·v, the clean x0 that the network sees in x, changes slowly over λ = ln((1 − σ)/σ). From σ to σ',
    m' being its value at σ' and m₋ at the level before σ, with h = λ' − λ, E = 1 − e^−h and r = (λ₋ − λ)/h:

        x' = (σ'/σ)·x + (1 − σ')·E·(m + ρ₁·(m₋ − m)/r + ρ₂·(m' − m))

        predictor   ρ₁ = 1/2, ρ₂ = 0; both 0 on the first step, which has no m₋, and on the last
        corrector   ρ₁ + ρ₂ = 1/E − 1/h = b,  r·ρ₁ + ρ₂ = 1/E − 2b/h; on the first step ρ₁ = 0, ρ₂ = 1/2

    The network sees the predictor's x'. That gives m', with which x' is corrected before the next step starts from it.
    """
    velocity_at, paste = _bind(net, text, x0, cond_mask)
    sigmas, times = time_grid(nfe, t_shift, grid)
    lam = (torch.log1p(-sigmas.double()) - sigmas.double().log()).tolist()  # −∞ at σ = 1, ∞ at 0: neither makes a NaN
    sigmas, times = sigmas.tolist(), times.tolist()

    def step(i: int, x: Tensor, m: Tensor, older: Tensor | None, newer: Tensor | None = None) -> Tensor:
        """x' of step i; with m' (newer) corrected."""
        h = lam[i + 1] - lam[i]
        E, mean, rho2 = -math.expm1(-h), m, 0.5
        if 0 < i < nfe - 1:
            r, b = (lam[i - 1] - lam[i]) / h, 1 / E - 1 / h
            rho1 = 0.5 if newer is None else (b - (1 / E - 2 * b / h)) / (1 - r)
            rho2, mean = b - rho1, mean + rho1 / r * (older - m)
        if newer is not None:
            mean = mean + rho2 * (newer - m)
        return sigmas[i + 1] / sigmas[i] * x + (1 - sigmas[i + 1]) * E * mean

    x = start = paste(noise)
    m = older = None
    for i in range(nfe):
        newer = x - sigmas[i] * velocity_at(x, times[i])
        if i > 0:
            start = step(i - 1, start, m, older, newer)
        m, older = newer, m
        x = paste(step(i, start, m, older))  # entry by entry: what m holds at given frames reaches no other
    return x


SOLVERS = {"euler": euler, "unipc": unipc}

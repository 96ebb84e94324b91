"""The time grids of Wan2.1's own code and of diffusers, for samples that match theirs step by step.

    even        flow.time_grid, this project's own: even times from exactly 1, and the network is told σ itself
    wan         times 0.999 (1 − i/nfe): Wan2.1, wan/utils/fm_solvers_unipc.py, FlowUniPCMultistepScheduler
    diffusers   even times that end at 0.001, after which the last σ is set to 0 and the first to 1 − 1e-6: diffusers,
                UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=t_shift)

`flow.shift_t` warps the times of each. Under the last two the network is told ⌊1000 σ⌋ / 1000.
"""

import torch

import flow

GRIDS = ("even", "wan", "diffusers")


def time_grid(nfe: int, t_shift: float, grid: str) -> flow.Grid:
    """A solver's levels on one of GRIDS: noise levels σ (nfe + 1,), falling to exactly 0, and times (nfe,), float32.

    ValueError for another grid.
    """
    if grid not in GRIDS:
        raise ValueError(f"grid: expected {', '.join(GRIDS[:-1])} or {GRIDS[-1]}, got {grid!r}")
    if grid == "even":
        return flow.time_grid(nfe, t_shift)
    first, last = (torch.tensor(0.999).item(), 0.0) if grid == "wan" else (1.0, 0.001)  # Wan's 0.999 is a float32
    # as numpy's linspace, to the last bit: a σ that is a whole number of thousandths must not be rounded down
    times = torch.arange(nfe, dtype=torch.float64) * ((last - first) / nfe) + first
    sigmas = flow.shift_t(times, t_shift).clamp(max=1 - 1e-6)
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float(), ((1000 * sigmas).floor() / 1000).float()

"""Samplers as Wan2.1's users know them: grids and solvers against diffusers' schedulers, and their order."""

import math

import pytest
import torch
from helpers import refused

import flow
from wan import grids

SHIFTS = (1.0, 3.0, 5.0, 8.0)
STEPS = (1, 2, 6, 20, 50)
TEXT = torch.zeros(2, 1, 1)


def field(x, t, text):
    """A nonlinear velocity that mixes channels and depends on time."""
    t = t.view(-1, 1, 1, 1, 1)
    return x * (3 * t).cos() + 1.3 * (2 * x + t).sin() - 0.2 * x.roll(1, 1)


def mixed(x, t, text, cond_mask=None):
    """`field`, in which the frames see one another, too."""
    return field(x, t, text) + 0.5 * x.mean(2, keepdim=True)


def peer(name: str, **options):
    return getattr(pytest.importorskip("diffusers"), name)(**options)


def run(scheduler, noise, times=None):
    """What the scheduler makes of `field`. times: what the field is told, in place of the scheduler's timesteps."""
    x = noise
    times = scheduler.timesteps / 1000 if times is None else times
    for step, t in zip(scheduler.timesteps, times):
        x = scheduler.step(field(x, t.expand(len(x)), None), step, x, return_dict=False)[0]
    return x


def error(made, expected) -> float:
    """The error of the worst entry, relative to the largest."""
    return ((made - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("t_shift", SHIFTS)
@pytest.mark.parametrize("nfe", STEPS)
def test_wan_grid(nfe, t_shift):
    """The closed form; the network is told whole thousandths, rounded down, and never one too few."""
    sigmas, times = grids.time_grid(nfe, t_shift, "wan")
    for i, (sigma, t) in enumerate(zip(sigmas.tolist(), times.tolist())):
        u = 0.999 * (1 - i / nfe)
        assert sigma == pytest.approx(t_shift * u / (1 + (t_shift - 1) * u), abs=1e-6)
        assert 1000 * t == pytest.approx(math.floor(1000 * sigma + 1e-4), abs=1e-4)
    assert sigmas[-1] == 0 and len(sigmas) == nfe + 1 == len(times) + 1


@pytest.mark.parametrize(
    "nfe, t_shift, recorded",
    [(50, 3.0, [999, 992, 985]), (50, 5.0, [999, 995, 991, 987, 982, 978]), (4, 8.0, [999, 959, 888, 727])],
)
def test_wan_grid_recorded(nfe, t_shift, recorded):
    """The first timesteps that Wan's own FlowUniPCMultistepScheduler gave."""
    assert (1000 * grids.time_grid(nfe, t_shift, "wan")[1]).round().tolist()[: len(recorded)] == recorded


@pytest.mark.parametrize("t_shift", SHIFTS)
@pytest.mark.parametrize("nfe", [*STEPS, 3, 7, 37, 100])
def test_diffusers_grid_and_unipc(nfe, t_shift):
    """diffusers' own grid, bit for bit; and on it, over all steps, the coefficients of predictor and corrector."""
    options = dict(use_flow_sigmas=True, flow_shift=t_shift, prediction_type="flow_prediction")
    scheduler = peer("UniPCMultistepScheduler", **options)
    scheduler.set_timesteps(nfe)
    scheduler.set_begin_index(0)
    sigmas, times = levels = grids.time_grid(nfe, t_shift, "diffusers")
    assert torch.equal(sigmas, scheduler.sigmas)
    assert torch.equal((1000 * times).round().long(), scheduler.timesteps)
    noise = torch.randn(2, 4, 3, 5, 5)
    assert error(flow.unipc(field, noise, TEXT, levels), run(scheduler, noise)) < 2e-5


@pytest.mark.parametrize("nfe", [1, 6, 50])
def test_unipc_with_given_frames(nfe):
    """diffusers' solver, whose state gets the given frames again after every step, makes the same of the others."""
    options = dict(use_flow_sigmas=True, flow_shift=5.0, prediction_type="flow_prediction")
    scheduler = peer("UniPCMultistepScheduler", **options)
    scheduler.set_timesteps(nfe)
    scheduler.set_begin_index(0)
    x0, noise = torch.randn(2, 2, 4, 3, 5, 5)
    given = torch.tensor([[True, False, False], [True, True, False]])
    mask = given[:, None, :, None, None]
    x = torch.where(mask, x0, noise)
    for step, t in zip(scheduler.timesteps, scheduler.timesteps / 1000):
        x = torch.where(mask, x0, scheduler.step(mixed(x, t.expand(2), None), step, x, return_dict=False)[0])
    made = flow.unipc(mixed, noise, TEXT, grids.time_grid(nfe, 5.0, "diffusers"), x0, given)
    assert error(made, x) < 5e-6


@pytest.mark.parametrize("grid", grids.GRIDS)
def test_euler_against_diffusers(grid):
    scheduler = peer("FlowMatchEulerDiscreteScheduler")
    sigmas, times = levels = grids.time_grid(20, 5.0, grid)
    scheduler.set_timesteps(sigmas=sigmas[:-1].tolist())
    noise = torch.randn(2, 4, 3, 5, 5)
    assert error(flow.euler(field, noise, TEXT, levels), run(scheduler, noise, times)) < 2e-6


def test_the_even_grid_and_no_grid():
    """One function gives all grids; the even one is flow's. A name that is none of theirs is refused."""
    for ours, expected in zip(grids.time_grid(7, 4.0, "even"), flow.time_grid(7, 4.0), strict=True):
        assert torch.equal(ours, expected)
    refused("grid: expected even, wan or diffusers, got 'karras'", grids.time_grid, 2, 1.0, "karras", kind=ValueError)


@pytest.mark.parametrize("solver, order", [("euler", 1.0), ("unipc", 2.0)])
def test_order_of_convergence(solver, order):
    """On the flow of a standard normal, x(t) = noise · √((1 − t)² + t²): half the step, 1/2 or 1/4 the error."""

    def normal(x, t, text):
        t = t.double().view(-1, 1, 1, 1, 1)
        return x * (2 * t - 1) / ((1 - t) ** 2 + t**2)

    noise = torch.randn(2, 3, 2, 2, 2, dtype=torch.float64)
    made = [flow.SOLVERS[solver](normal, noise, TEXT, flow.time_grid(n, 3.0)) for n in (100, 200)]
    coarse, fine = (error(x0, noise) for x0 in made)
    assert abs(math.log2(coarse / fine) - order) < 0.2


@pytest.mark.parametrize("sd, euler, unipc", [(1.0, 0.950, 1.005), (0.3, 0.867, 0.963)])
def test_euler_narrows_what_it_samples(sd, euler, unipc):
    """The spread of the samples over the data's, normal(0, sd²), by 50 steps at shift 5 along the exact flow."""

    def exact(x, t, text):
        t = t.view(-1, 1, 1, 1, 1)
        return x * (t - (1 - t) * sd**2) / ((1 - t) ** 2 * sd**2 + t**2)

    one = torch.ones(1, 1, 1, 1, 1)  # the flow is linear: a sample is so many times its noise
    kept = {
        name: (solve(exact, one, TEXT, flow.time_grid(50, 5.0)) / sd).item() for name, solve in flow.SOLVERS.items()
    }
    assert kept == {"euler": pytest.approx(euler, abs=1e-3), "unipc": pytest.approx(unipc, abs=1e-3)}

"""Samplers as Wan2.1's users know them: grids and solvers against diffusers' schedulers, order, guidance."""

import math

import pytest
import torch

import flow

SHIFTS = (1.0, 3.0, 5.0, 8.0)
STEPS = (1, 2, 6, 20, 50)
TEXT = torch.zeros(2, 1, 1)


def field(x, t, text, cond_mask=None):
    """A nonlinear velocity that mixes channels and depends on time."""
    t = t.view(-1, 1, 1, 1, 1)
    return x * (3 * t).cos() + 1.3 * (2 * x + t).sin() - 0.2 * x.roll(1, 1)


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
    """Of the largest entry."""
    return ((made - expected).abs().max() / expected.abs().max()).item()


# ---- grids -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t_shift", SHIFTS)
@pytest.mark.parametrize("nfe", STEPS)
def test_wan_grid(nfe, t_shift):
    """The closed form; the network is told whole thousandths, rounded down, and never one too few."""
    sigmas, times = flow.time_grid(nfe, t_shift, "wan")
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
    assert (1000 * flow.time_grid(nfe, t_shift, "wan")[1]).round().tolist()[: len(recorded)] == recorded


@pytest.mark.parametrize("t_shift", SHIFTS)
@pytest.mark.parametrize("nfe", [1, 2, 3, 6, 7, 20, 37, 50, 100])
def test_diffusers_grid(nfe, t_shift):
    """diffusers' own, bit for bit."""
    unipc = peer("UniPCMultistepScheduler", use_flow_sigmas=True, flow_shift=t_shift)
    unipc.set_timesteps(nfe)
    sigmas, times = flow.time_grid(nfe, t_shift, "diffusers")
    assert torch.equal(sigmas, unipc.sigmas)
    assert torch.equal((1000 * times).round().long(), unipc.timesteps)


def test_unknown_grid():
    with pytest.raises(ValueError, match="grid: expected even, wan or diffusers, got karras"):
        flow.euler(field, torch.zeros(1, 1, 1, 1, 1), TEXT, 2, 1.0, grid="karras")


# ---- solvers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t_shift", SHIFTS)
@pytest.mark.parametrize("nfe", STEPS)
def test_unipc_against_diffusers(nfe, t_shift):
    """Same grid, same field, all steps: the coefficients of predictor, corrector, first and last step."""
    unipc = peer("UniPCMultistepScheduler", use_flow_sigmas=True, flow_shift=t_shift, prediction_type="flow_prediction")
    unipc.set_timesteps(nfe)
    unipc.set_begin_index(0)
    noise = torch.randn(2, 4, 3, 5, 5)
    assert error(flow.unipc(field, noise, TEXT, nfe, t_shift, grid="diffusers"), run(unipc, noise)) < 2e-5


@pytest.mark.parametrize("grid", ["even", "wan", "diffusers"])
def test_euler_against_diffusers(grid):
    euler = peer("FlowMatchEulerDiscreteScheduler")
    sigmas, times = flow.time_grid(20, 5.0, grid)
    euler.set_timesteps(sigmas=sigmas[:-1].tolist())
    noise = torch.randn(2, 4, 3, 5, 5)
    assert error(flow.euler(field, noise, TEXT, 20, 5.0, grid=grid), run(euler, noise, times)) < 2e-6


@pytest.mark.parametrize("solver, order", [("euler", 1.0), ("unipc", 2.0)])
def test_order_of_convergence(solver, order):
    """On the flow of a standard normal, x(t) = noise · √((1 − t)² + t²): half the step, 1/2 or 1/4 the error."""

    def normal(x, t, text):
        t = t.double().view(-1, 1, 1, 1, 1)
        return x * (2 * t - 1) / ((1 - t) ** 2 + t**2)

    noise = torch.randn(2, 3, 2, 2, 2, dtype=torch.float64)
    coarse, fine = (error(flow.SOLVERS[solver](normal, noise, TEXT, n, 3.0), noise) for n in (100, 200))
    assert abs(math.log2(coarse / fine) - order) < 0.2


@pytest.mark.parametrize("solver", flow.SOLVERS)
def test_guidance_wraps(solver):
    """A guided network is a network: one whose velocity is affine in the text is that of the guided text."""
    x0, noise, mask = *torch.randn(2, 2, 4, 3, 5, 5), torch.tensor([[True, False, False], [True, True, False]])
    text, negative = torch.randn(2, 3, 1), torch.randn(3, 1)

    def net(x, t, text, cond_mask):
        return field(x, t, text) + text.sum((1, 2)).view(-1, 1, 1, 1, 1)

    made = flow.SOLVERS[solver](flow.guided(net, 5.0, negative), noise, text, 6, 5.0, x0, mask, "wan")
    expected = flow.SOLVERS[solver](net, noise, negative + 5 * (text - negative), 6, 5.0, x0, mask, "wan")
    assert error(made, expected) < 1e-5

"""The time and sign convention, the solvers, and draws that depend on their key alone."""

import inspect
import math

import pytest
import torch
from helpers import refused

import flow

SHAPE = (3, 4, 2, 2)


def draw(n: int = 4):
    x0 = torch.randn(n, *SHAPE)
    return x0, flow.draw_noise(SHAPE, [("test", i) for i in range(n)])


def test_path():
    """t = 0 is data and t = 1 is noise, bit for bit: guards the time convention.

    With a time for each frame, frames at time 0 enter clean, the others as on the path of one time.
    """
    x0, noise = draw()
    assert torch.equal(flow.add_noise(x0, noise, torch.zeros(4)), x0)
    assert torch.equal(flow.add_noise(x0, noise, torch.ones(4)), noise)
    t, given = torch.rand(4), torch.arange(4) < 2
    x_t = flow.add_noise(x0, noise, t[:, None] * ~given)
    assert torch.equal(x_t[:, :, given], x0[:, :, given])
    assert torch.equal(x_t[:, :, ~given], flow.add_noise(x0, noise, t)[:, :, ~given])


def test_velocity_is_the_derivative_of_the_path():
    """Guards the sign of v: noise − x0, not x0 − noise."""
    x0, noise = (a.double() for a in draw())
    t, h = torch.rand(4, dtype=torch.float64), 1e-4
    slope = (flow.add_noise(x0, noise, t + h) - flow.add_noise(x0, noise, t - h)) / (2 * h)
    assert torch.allclose(slope, flow.velocity(x0, noise), atol=1e-9)


solvers = pytest.mark.parametrize("solver", flow.SOLVERS)


@pytest.mark.parametrize("t_shift", [1.0, 4.0, 5.0])
@pytest.mark.parametrize("nfe", [1, 2, 7, 50])
@solvers
def test_straight_path(solver, nfe, t_shift):
    """With the constant velocity noise − x0 a solver must land on x0: guards sign, step sizes and end points.

    On the way, each evaluation must see x_t at its own t, the noisy end of its interval.
    """
    x0, noise = draw()
    seen = []

    def net(x, t, text):
        assert torch.allclose(x, flow.add_noise(x0, noise, t), atol=1e-5)
        seen.append(t[0].item())
        return noise - x0

    levels = flow.time_grid(nfe, t_shift)
    assert (flow.SOLVERS[solver](net, noise, None, levels) - x0).abs().max() < 1e-5  # 50 float32 additions
    assert seen == levels[1].tolist() == levels[0][:-1].tolist()


@pytest.mark.parametrize("wild", [1e3, float("nan")])
@solvers
def test_given_frames_come_out_bitwise_and_go_in_clean(solver, wild):
    """The given frames are the real ones at every step, bit for bit.

    The velocity there may be anything: no other frame feels it.
    """
    x0, noise = draw()
    cond_mask = torch.arange(4) < torch.tensor([1, 2, 3, 0])[:, None]
    given = cond_mask[:, None, :, None, None].expand_as(x0)

    def net(x, t, text, mask):
        assert torch.equal(mask, cond_mask) and torch.equal(x[given], x0[given])
        return torch.where(given, wild, (x * t.view(-1, 1, 1, 1, 1)).cos())  # would carry them away

    def pasted(x, t, text):
        return net(torch.where(given, x0, x), t, text, cond_mask)

    solve, levels = flow.SOLVERS[solver], flow.time_grid(5, 4.0)
    made, free = solve(net, noise, None, levels, x0, cond_mask), solve(pasted, noise, None, levels)
    assert torch.equal(made[given], x0[given]) and torch.equal(made[~given], free[~given])


@pytest.mark.parametrize("t_shift", [1.0, 3.0, 5.0, 12.0])
@pytest.mark.parametrize("nfe", [1, 12, 50])
def test_even_grid(nfe, t_shift):
    """From exactly 1 to exactly 0, strictly falling, and the network is told where it is."""
    sigmas, times = flow.time_grid(nfe, t_shift)
    assert len(sigmas) == nfe + 1 and sigmas[0] == 1 and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all() and torch.equal(times, sigmas[:-1])
    even = torch.arange(nfe, -1, -1, dtype=torch.float64) / nfe
    assert torch.allclose(sigmas.double(), flow.shift_t(even, t_shift), atol=1e-7)


def test_shift_t_fixed_points_inverse_and_direction():
    """0 and 1 stay, s and 1/s undo each other, s > 1 moves towards noise, and the closed form at one half holds."""
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    for s in (0.2, 1.0, 4.0):
        moved = flow.shift_t(t, s)
        assert moved[0] == 0 and abs(moved[-1] - 1) < 1e-15 and (s < 1 or moved[-1] == 1)
        assert torch.allclose(flow.shift_t(moved, 1 / s), t, atol=1e-12)
    assert torch.equal(flow.shift_t(t, 1.0), t)
    assert (flow.shift_t(t, 4.0)[1:-1] > t[1:-1]).all()
    assert flow.shift_t(torch.tensor(0.5), 4.0).item() == pytest.approx(0.8)


def test_guidance():
    """1 is the network itself, at one evaluation; otherwise u + g·(c − u), both of them in one call, given frames in
    both. Outside low < t ≤ high it is the network, too.
    """
    calls = []

    def net(x, t, text, cond_mask=None):
        calls.append((t, cond_mask))
        return x * (text.sum(dim=(1, 2)) + t)[:, None, None, None, None]

    assert flow.guided(net, 1.0) is net
    x, mask = torch.randn(2, *SHAPE), torch.tensor([[True] * 4, [False] * 4])
    text, negative = torch.randn(2, 3, 5), torch.randn(4, 5)
    for low, high, at, inside in (
        (0.0, 1.0, 0.3, True),
        (0.0, 1.0, 1.0, True),
        (0.25, 0.75, 0.25, False),
        (0.25, 0.75, 0.5, True),
        (0.25, 0.75, 0.75, True),
        (0.25, 0.75, 0.875, False),
    ):
        t = torch.full((2,), at)
        cond, uncond = net(x, t, text), x * (negative.sum() + at)
        calls.clear()
        got = flow.guided(net, 5.0, negative, low, high)(x, t, text, mask)
        assert torch.allclose(got, uncond + 5 * (cond - uncond) if inside else cond, atol=1e-4)
        [(times, given)] = calls
        assert torch.equal(times, t.repeat(1 + inside)) and torch.equal(given, mask.repeat(1 + inside, 1))
    refused("unconditional", flow.guided, net, 5.0, kind=ValueError)


def test_dropped_captions_are_the_unconditional_branchs():
    """Each dropped text is what guidance puts into its unconditional branch, zeros to the longest after it; which ones
    are dropped is a matter of their keys. Without dropout nothing changes, and no negative prompt is needed."""
    states, negative = [torch.randn(1 + i % 4, 5) for i in range(2000)], torch.randn(6, 5)
    keys, seen = [("sft", 0, i) for i in range(2000)], []
    text = flow.drop_captions(states, keys, 0.1, negative)
    x = torch.zeros(1, *SHAPE)
    flow.guided(lambda x, t, text, mask: seen.append(text) or x, 5.0, negative)(x, torch.ones(1), torch.zeros(1, 2, 5))
    dropped = (text == seen[0][1]).all(dim=(1, 2))
    assert text.shape == (2000, 6, 5) and abs(dropped.double().mean() - 0.1) < 0.03
    kept = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
    assert torch.equal(text[~dropped][:, :4], kept[~dropped]) and not text[~dropped][:, 4:].any()
    assert torch.equal(flow.drop_captions(states[500:700], keys[500:700], 0.1, negative), text[500:700])
    assert torch.equal(flow.drop_captions(states, keys, 0.0, None), kept)


@pytest.mark.parametrize("draw_one", [lambda keys: flow.draw_noise((3, 2), keys), flow.draw_t], ids=["noise", "t"])
def test_a_draw_depends_on_its_key_alone(draw_one):
    """Neighbours, order, the global generator: none may matter, so ranks, batches and resuming do not either."""
    keys = [(0, 7, f"clip-{i}") for i in range(5)]
    together = draw_one(keys)
    torch.manual_seed(123)
    alone = torch.cat([draw_one([key]) for key in reversed(keys)]).flip(0)
    assert torch.equal(together, alone)
    assert len(together.reshape(5, -1).unique(dim=0)) == 5
    for other in ((1, 7, "clip-0"), (0, 8, "clip-0"), (0, 7, "clip-00")):
        assert not torch.equal(draw_one([other]), draw_one(keys[:1]))


def test_noise_is_standard_normal_and_independent_of_the_time():
    """The same key serves noise and t: they must not come from one and the same stream."""
    keys = [(0, i, "clip") for i in range(2000)]
    noise = flow.draw_noise((16,), keys)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    as_uniform = 0.5 * (1 + torch.erf(noise[:, 0] / math.sqrt(2)))
    assert abs(torch.corrcoef(torch.stack([as_uniform, flow.draw_t(keys)]))[0, 1]) < 0.08


def test_distribution_of_training_times():
    """Uniform without a mean; with one, logit-normal of that mean and standard deviation 1; t_shift applied after."""
    keys = [("t", i) for i in range(4000)]
    uniform = flow.draw_t(keys)
    assert 0 < uniform.min() and uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.02 and abs(uniform.std() - 12**-0.5) < 0.01
    logit = torch.logit(flow.draw_t(keys, mean=1.5).double())
    assert abs(logit.mean() - 1.5) < 0.06 and abs(logit.std() - 1) < 0.05
    assert torch.equal(flow.draw_t(keys, 1.5, t_shift=3.0), flow.shift_t(flow.draw_t(keys, 1.5), 3.0))


@pytest.mark.parametrize("mean, t_shift", [(None, 12.0), (1.0, 1.0), (-1.0, 3.0)])
def test_a_part_of_the_training_times(mean, t_shift):
    """Distributed as those of all times that fall into it, every decile; one draw a key, in the same order; finite
    where hardly any fall. The whole is what it is without it, bit for bit.
    """
    many = flow.draw_t([("more", i) for i in range(12_000)], mean, t_shift=t_shift)
    keys, deciles = [("t", i) for i in range(1500)], torch.linspace(0.1, 0.9, 9)
    whole = flow.draw_t(keys, mean, t_shift=t_shift)
    assert torch.equal(flow.draw_t(keys, mean, t_shift=t_shift, t_min=0.0, t_max=1.0), whole)
    for low, high in ((0.875, 1.0), (0.0, 0.875), (0.4, 0.6)):
        part = flow.draw_t(keys, mean, t_shift=t_shift, t_min=low, t_max=high)
        assert part.dtype == torch.float32 and low <= part.min() and part.max() <= high
        assert (part[whole.argsort()].diff() >= 0).all()
        inside = many[(low <= many) & (many <= high)]
        share = torch.stack([(part <= edge).float().mean() for edge in inside.quantile(deciles)])
        assert (share - deciles).abs().max() < 0.1 and len(inside) > 100
    narrow = flow.draw_t(keys[:9], mean, t_shift=t_shift, t_min=1 - 1e-6)
    assert narrow.isfinite().all() and narrow.min() >= 1 - 2e-6 and narrow.max() <= 1


def test_generator_is_the_same_everywhere():
    """A draw recorded once: a machine, NumPy or hash seed that draws something else breaks reproduction."""
    recorded = [0.024899124329748834, 0.7350604350754215, 0.08750489654623927]
    assert flow.generator("pair", 0, "ball-00000").random(3).tolist() == recorded
    noise = [-0.3362765312194824, 2.231999397277832, -0.07597870379686356]
    assert flow.draw_noise((3,), [("pair", 0, "ball-00000")])[0].tolist() == noise
    assert "hash(" not in inspect.getsource(flow.generator)  # Python's own hash of a str changes from run to run


def test_no_two_of_many_keys_draw_the_same():
    """As seeds of 32 bits, which is what PyTorch's generator keeps, the hashes of two of these are the same."""
    drawn = {flow.generator("noise", "sft", 0, step, "clip").random() for step in range(53_000)}
    assert len(drawn) == 53_000

"""Φ on given frames: prefix attention, what `model.Continuation` keeps, and pairs that are made with it."""

import dataclasses
import functools
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import close, randomised, refused, run_stage
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import continuation
import flow
import make_pairs
import model
import sample
from runtime.group import Group, place
from wan.lora import load_continuation

CONFIG = model.DiTConfig(24, 40, 2, 2, in_dim=4, out_dim=4, text_dim=12, text_len=24, freq_dim=32, frames=5)
FRAMES = 5


def network(attention: str, prompts: str = "text", layers: int = 2) -> model.DiT:
    """A small Φ of two by three tokens a frame, with a LoRA, in which nothing is zero or one."""
    net = model.init_from_scratch(model.DiT(dataclasses.replace(CONFIG, num_layers=layers)), seed=0)
    net.prefix = attention == "prefix"
    model.add_lora(net, 4, 4, "all")
    if prompts != "off":
        model.add_task_prompt(net, FRAMES, prompts)
    return randomised(net)


def inputs(B: int = 3):
    """x0, noise, text and t."""
    return *torch.randn(2, B, 4, FRAMES, 4, 6), torch.randn(B, 7, 12), torch.rand(B)


def mask(*given: int) -> torch.Tensor:
    return torch.arange(FRAMES) < torch.tensor(given)[:, None]


def noised(x0, noise, t, given):
    return flow.add_noise(x0, noise, t[:, None] * ~given)


# ---- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, (0, 0), (3, 3), (7, 7), (2, 5), (0, 4)])
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_attend_is_attention_with_a_mask(given, dtype, allowed):
    """The first tokens see one another, the others see all: what a boolean mask says of each sample."""
    q, k, v = torch.randn(3, 2, 3, 7, 8, dtype=dtype)
    n = torch.tensor(given or (0, 0))[:, None, None]
    sees = (torch.arange(7) < n) | (torch.arange(7)[:, None] >= n)
    expected = F.scaled_dot_product_attention(q, k, v, sees[:, None])
    assert (model.attend(q, k, v, given) - expected).abs().max() < allowed


@torch.no_grad()
@pytest.mark.parametrize("attention", model.ATTENTION)
def test_what_given_frames_see(attention):
    """With prefix attention their hidden states depend on neither t nor the noisy frames, bit for bit."""
    net, (x0, noise, text, t), given = network(attention), inputs(), mask(3, 3, 3)
    seen = []
    net.blocks[-1].register_forward_pre_hook(lambda _, args: seen.append(args[0].unflatten(1, (FRAMES, -1))))
    for other in (False, True):
        x_t = noised(x0, noise + 1.0 * other, t, given)
        net(x_t, t / (1 + other), text, given)
    assert torch.equal(seen[0][:, :3], seen[1][:, :3]) == (attention == "prefix")
    assert not torch.isclose(seen[0][:, 3:], seen[1][:, 3:]).all()


@torch.no_grad()
@pytest.mark.parametrize("n", [0, FRAMES])
def test_with_nothing_or_all_given_both_attentions_are_one(n):
    x0, noise, text, t = inputs()
    given = mask(n, n, n)
    full, prefix = (network(name)(noised(x0, noise, t, given), t, text, given) for name in model.ATTENTION)
    assert torch.equal(full, prefix)


def test_given_frames_that_are_not_the_first():
    """Prefix attention has no meaning for them; full attention takes them."""
    (x0, _, text, t), given = inputs(), mask(2, 2, 2)
    given[1] = torch.tensor([True, False, True, False, False])
    refused("cond_mask: expected the first frames", network("prefix"), x0, t, text, given, kind=ValueError)
    assert network("full")(x0, t, text, given).isfinite().all()


@pytest.mark.parametrize("attention", model.ATTENTION)
def test_gradients_of_mixed_lengths(attention):
    """Those of a batch are the sums of the single clips', also where activations are recomputed."""
    (x0, noise, text, t), found = inputs(4), []
    given = mask(1, 3, 3, 4)
    for singly in (False, True):
        net = network(attention)
        net.gradient_checkpointing = not singly
        batch = (x0, text, noise, t, given)
        for part in zip(*(a.split(1) for a in batch)) if singly else [batch]:
            continuation.continuation_loss(net, *part).sum().backward()
        found.append([p.grad for p in net.parameters() if p.requires_grad])
    assert all(close(a, b, 1e-5) for a, b in zip(*found, strict=True))


# ---- what is kept ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("prompts", [*model.PLACES, "off"])
@pytest.mark.parametrize("attention", model.ATTENTION)
def test_kept_is_computed_anew(attention, prompts):
    """For every number of given frames the network's own output, also of the first clips of more, as guidance asks
    for; 0 where no one asks.
    """
    net, (x0, noise, text, t) = network(attention, prompts), inputs()
    for n in range(FRAMES):
        given = mask(n, n, n)
        x_t = noised(x0, noise, t, given)
        phi, expected = model.Continuation(net, x0, text, n), net(x_t, t, text, given)
        for b in (3, 2):
            made = phi(x_t[:b], t[:b])
            assert made.dtype == torch.float32 and close(made[:, :, n:], expected[:b, :, n:], 1e-5)
            assert attention == "full" or not made[:, :, :n].any()


@torch.no_grad()
def test_the_kept_part_of_a_float64_network(monkeypatch):
    """Rounding is what is left between the two: in float64 it is gone."""
    monkeypatch.setattr(torch.Tensor, "float", lambda a: a.double())
    net = network("prefix").double()
    x0, noise, text, t = (a.double() for a in inputs())
    given = mask(2, 2, 2)
    x_t = noised(x0, noise, t, given)
    made, expected = model.Continuation(net, x0, text, 2)(x_t, t), net(x_t, t, text, given)
    assert made.dtype == torch.float64 and close(made[:, :, 2:], expected[:, :, 2:], 1e-12)


# ---- pairs -----------------------------------------------------------------------------------------------------------

GUIDED = [dict(guidance=1.0), dict(guidance=3.0), dict(guidance=3.0, guidance_low=0.3, guidance_high=0.9)]


def settings(**options) -> make_pairs.Config:
    return make_pairs.Config(nfe=4, t_shift=3.0, **{"guidance_low": 0.0, "guidance_high": 1.0, **options})


@pytest.mark.parametrize("attention", model.ATTENTION)
@pytest.mark.parametrize("guidance", GUIDED, ids=["plain", "guided", "interval"])
@pytest.mark.parametrize("solver", flow.SOLVERS)
def test_savings_change_nothing(solver, guidance, attention):
    """Groups of equal length, what they keep and both branches in one batch: the clips of whole forwards, and the same
    for a clip alone. Given frames come out bit for bit, and so does a clip that is given whole.
    """
    net, (x0, _, text, _), lengths = network(attention), inputs(4), [1, 3, FRAMES, 3]
    keys, negative = [("pair", 0, i) for i in range(4)], torch.randn(9, 12)
    cfg = settings(solver=solver, **guidance)
    made, plain = (
        make_pairs.continue_clips(net, x0, text, lengths, keys, dataclasses.replace(cfg, plain=off), negative)
        for off in (False, True)
    )
    alone = make_pairs.continue_clips(net, x0[1:2], text[1:2], [3], keys[1:2], cfg, negative)
    assert close(made, plain, 1e-4) and close(alone, made[1:2], 1e-4)
    for clips in (made, plain):
        for clip, real, n in zip(clips, x0, lengths):
            assert torch.equal(clip[:, :n], real[:, :n]) and (n == FRAMES or not torch.isclose(clip, real).all())


def test_what_a_group_costs(monkeypatch):
    """A clip that is given whole costs nothing; of the others, the noisy frames alone run, twice where guidance is."""
    net, (x0, _, text, _), seen = network("prefix"), inputs(4), []
    net.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    cfg = settings(guidance=3.0, guidance_low=0.5, guidance_high=0.95)  # times 1, 0.9, 0.75, 0.5
    keys = [("pair", 0, i) for i in range(4)]
    make_pairs.continue_clips(net, x0, text, [2, 2, FRAMES, 4], keys, cfg, torch.randn(9, 12))
    two, one = [(4, 12), (2, 18), (4, 18), (4, 18), (2, 18)], [(2, 24), (1, 6), (2, 6), (2, 6), (1, 6)]
    assert seen == two + one


@pytest.fixture
def compiled(monkeypatch):
    """A network under --compile, by the tracing that torch.compile does for every backend."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    return place(network("prefix", layers=1), SimpleNamespace(shard=False, compile=True), Group())


@torch.no_grad()
def test_a_compiled_continuation(compiled):
    """What eager blocks give, without a graph for each number of given frames."""
    (x0, noise, text, t), eager = inputs(2), network("prefix", layers=1)
    for n in (1, 2, 3):
        with torch.compiler.set_stance("fail_on_recompile" if n == 3 else "default"):
            made = model.Continuation(compiled, x0, text, n)(noise, t)
        assert close(made, model.Continuation(eager, x0, text, n)(noise, t), 1e-5)


def test_compiled_training_on_mixed_lengths(compiled):
    """The losses of eager blocks, without a graph for each combination of lengths."""
    (x0, noise, text, t), eager = inputs(2), network("prefix", layers=1)
    for lengths in ((1, 3), (2, 2), (4, 1)):
        with torch.compiler.set_stance("fail_on_recompile" if lengths != (1, 3) else "default"):
            loss = continuation.continuation_loss(compiled, x0, text, noise, t, mask(*lengths))
            loss.sum().backward()
        assert close(loss, continuation.continuation_loss(eager, x0, text, noise, t, mask(*lengths)), 1e-5)


# ---- the folder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", model.ATTENTION)
def test_the_folders_attention_is_followed(attention, chain, tmp_path, monkeypatch):
    """Trained and sampled with; a folder of 0.7 tells nothing: full attention."""
    used, clip = set(), sorted((chain / "clips").glob("*.mp4"))[0]
    forward = model.DiT.forward
    monkeypatch.setattr(model.DiT, "forward", lambda net, *args: used.add(net.prefix) or forward(net, *args))
    out = run_stage(chain, "continuation", out=tmp_path / "phi", attention=attention)
    folders = {name: str(chain / at) for name, at in (("base", "base"), ("data", "shards"))}
    more = dict(continuation=str(out), video=str(clip), prompt="a red ball", nfe=1, out=str(tmp_path / "videos"))
    sample.main(sample.Config(**folders, **more))
    assert used == {load_continuation(chain / "base", out).prefix} == {attention == "prefix"}
    path = out / "lora.safetensors"
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["dynamicsboost"])
    assert told.pop("attention") == attention and told.pop("sha256")
    save_file(load_file(path), path, {"dynamicsboost": json.dumps(told)})
    assert not load_continuation(chain / "base", out).prefix

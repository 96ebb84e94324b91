"""The method's invariants end to end: what a pair is, what the losses see, what a run must read at step 0."""

import contextlib
import dataclasses
import itertools
import math
import re

import pytest
import torch
from helpers import metrics, refused, run_stage, some_clips

import asymdpo
import continuation
import flow
import kernels.region_dpo
import make_pairs
import model
import sft
from experiments import invariants
from runtime.group import Group
from runtime.options import resolve
from runtime.shards import Shards, batch_order
from wan.lora import load_continuation

NAN = float("nan")


def small_net(seed: int = 0) -> model.DiT:
    """A one-block network whose output depends on time and text as that of a trained one does."""
    net = model.DiT(
        model.DiTConfig(24, 48, 2, 1, in_dim=6, out_dim=6, text_dim=8, text_len=20, freq_dim=16, patch_size=(1, 1, 1))
    )
    model.init_from_scratch(net, seed)
    torch.nn.init.normal_(net.time_projection[1].weight, std=0.02)
    return net


def batch(n: int = 4, frames: int = 13):
    """chosen, rejected, noise (n, 6, frames, 2, 2), text, t; pairs share nothing, which no loss may care about."""
    return *(torch.randn(n, 6, frames, 2, 2) for _ in range(3)), torch.randn(n, 5, 8), torch.rand(n)


# ---- the invariants, and that their check has teeth ------------------------------------------------------------------


def test_invariants_hold(capsys):
    assert invariants.main() == 0
    printed = capsys.readouterr().out
    assert "FAIL" not in printed and len(re.findall("^ok  ", printed, re.M)) >= 10


def masked_by_a_product(original):
    def wrong(v, ref, target, start):
        keep = (torch.arange(v.shape[2]) >= start[:, None]).float()
        return [a * keep for a in original(v, ref, target, torch.zeros_like(start))]  # NaN * 0 is NaN

    return wrong


def own_noise_for_the_reference(original):
    def wrong(net, chosen, rejected, text, noise, t):
        other = original(net, chosen, rejected, text, noise + 0.1, t)
        good = original(net, chosen, rejected, text, noise, t)
        return *good[:2], *other[2:4], *good[4:]

    return wrong


def mean_over_the_batch(original):
    def wrong(*args):
        loss, more = original(*args)
        return loss.mean().expand_as(loss), more

    return wrong


def given_frames_not_pasted(original):
    return lambda net, noise, text, levels, x0, mask: original(lambda *a: net(*a, mask), noise, text, levels)


def prompts_not_zero(original):
    return lambda *args: torch.nn.init.normal_(original(*args).task_prompt.noisy)


def sum_is_not_divided(original):
    def wrong(v_w, v_l, ref_w, ref_l, target_w, target_l, start, beta, form):
        loss, more = original(v_w, v_l, ref_w, ref_l, target_w, target_l, start, beta, form)
        return (loss * (v_w.shape[2] - start) if form == "outside" else loss), more

    return wrong


MUTATIONS = {  # what is wrong -> where, the function, and what takes its place
    "region 1 multiplied by 0": (kernels.region_dpo, "frame_errors", masked_by_a_product),
    "every frame in the loss": (
        kernels.region_dpo, "frame_errors", lambda f: lambda *a: f(*a[:3], torch.zeros_like(a[3])),
    ),
    "own noise for the reference": (asymdpo, "predict", own_noise_for_the_reference),
    "LoRA off leaves it on": (model, "lora_off", lambda f: contextlib.nullcontext),
    "mean over the batch": (asymdpo, "region_dpo", mean_over_the_batch),
    "given frames drift": (flow, "euler", given_frames_not_pasted),
    "random task prompts": (model, "add_task_prompt", prompts_not_zero),
    "a loss without 1/K": (asymdpo, "region_dpo", sum_is_not_divided),
}  # fmt: skip


@pytest.mark.parametrize("wrong", MUTATIONS)
def test_a_broken_invariant_is_noticed(wrong, monkeypatch, capsys):
    """In words, and by the exit code."""
    owner, name, wrapped = MUTATIONS[wrong]
    monkeypatch.setattr(owner, name, wrapped(getattr(owner, name)))
    assert invariants.main() == 1 and "FAIL" in capsys.readouterr().out


# ---- a real run ------------------------------------------------------------------------------------------------------


def test_step_0_of_a_real_run(chain):
    """The first logged step is taken at policy == reference: S is 0 exactly and the loss ln 2; the second is not."""
    first, second = metrics(chain / "asymdpo")
    assert first["S"] == first["S_abs"] == first["rewards/margins"] == 0 and first["rewards/accuracies"] == 0.5
    assert first["loss"] == first["softplus"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["grad_norm"] > 0 and second["S_abs"] > 0
    errors = [name for name in first if name.startswith("err/") and "_policy/" in name]
    assert errors and all(first[name] == first[name.replace("policy", "ref")] > 0 for name in errors)


def test_step_0_as_printed_reads_ln2_over_k(chain, tmp_path):
    """Form "outside": the loss starts at the mean of ln 2 / K."""
    out = run_stage(chain, "asymdpo", out=tmp_path / "run", form="outside", steps=1, batch_size=8)
    pairs = Shards(chain / "pairs", "make_pairs.py")
    n1 = [pairs.rows[i]["n1"] for i in batch_order(len(pairs), 8, 0, ("asymdpo", 0), flow.generator)]
    expected = sum(math.log(2) / (13 - n) for n in n1) / len(n1)
    assert metrics(out)[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_training_prefers_the_winner(chain, tmp_path):
    """Guards the sign: a few steps on the same pairs must raise the margin above 0."""
    out = run_stage(chain, "asymdpo", out=tmp_path / "run", steps=12, lr=2e-3, batch_size=8, t_mean=0.0)
    last = metrics(out)[-4:]
    assert sum(row["rewards/margins"] for row in last) > 0
    assert sum(row["loss"] for row in last) / 4 < math.log(2)


@pytest.mark.parametrize("beta, stuck", [(1e-6, True), (50.0, False)])
def test_a_run_that_does_not_move_is_told(beta, stuck, chain, tmp_path, capsys):
    """Gradients under AdamW's eps leave B where it was; S says nothing of it, in bfloat16 it is never small."""
    run_stage(
        chain, "asymdpo", out=tmp_path / "run", steps=51, batch_size=2, warmup=1, rank=2, layers="attn", beta=beta
    )
    assert ("stuck: after 50 steps" in capsys.readouterr().err) == stuck


def test_each_stage_draws_its_own_lora(chain):
    """The LoRAs of two stages begin in other directions: with one A, a sum of both would have the rank of one."""
    options = dict(base=str(chain / "base"), layers="attn", rank=4, prompts="off", sft="")
    first = []
    for stage in (sft, continuation, asymdpo):
        known = {k: v for k, v in options.items() if k in stage.Config.__dataclass_fields__}
        net = stage.build(stage.Config(**known), Group(), (28, 13, 2, 3))
        first.append(model.trained_lora(net)["blocks.0.self_attn.q"].A)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(first, 2))


def test_reference_is_the_cold_start(chain):
    """LoRA off is base + SFT, not the base; and stays so when the policy moves."""
    cfg = asymdpo.Config(base=str(chain / "base"), sft=str(chain / "sft"), layers="attn", rank=4)
    net = asymdpo.build(cfg, Group(), (28, 13, 2, 3))
    sft = model.merge_lora(model.load_lora(model.load_model(chain / "base"), chain / "sft" / "lora.safetensors"))
    x, t, text = torch.randn(2, 28, 13, 2, 3), torch.rand(2), torch.randn(2, 5, 32)
    with torch.no_grad():
        for term in model.trained_lora(net).values():
            torch.nn.init.normal_(term.B, std=0.1)
        with model.lora_off(net):
            assert torch.allclose(net(x, t, text), sft(x, t, text), atol=1e-5)
        assert not torch.allclose(net(x, t, text), sft(x, t, text), atol=1e-2)
        assert not torch.equal(sft(x, t, text), model.load_model(chain / "base")(x, t, text))


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_winner_and_loser_see_the_same_noise_and_time():
    """All frames noised at one scalar t, no given frames: the plain text-to-video forward, for both sides alike."""
    chosen, rejected, noise, text, t = batch()
    seen = []

    class Net(torch.nn.Module):
        def forward(self, x_t, t, text, cond_mask=None):
            seen.append((x_t, t, text, cond_mask))
            return torch.zeros_like(x_t)

    prediction = asymdpo.predict(Net(), chosen, rejected, text, noise, t)
    assert len(seen) == 2  # reference, policy
    for x_t, time, states, cond_mask in seen:
        assert cond_mask is None and time.shape == (8,)
        assert torch.equal(time[:4], t) and torch.equal(time[4:], t)
        assert torch.equal(states[:4], text) and torch.equal(states[4:], text)
        assert torch.equal(x_t[:4], flow.add_noise(chosen, noise, t))
        assert torch.equal(x_t[4:], flow.add_noise(rejected, noise, t))
    assert torch.equal(prediction[4], noise - chosen) and torch.equal(prediction[5], noise - rejected)


@pytest.mark.parametrize("region, first", [("123", 0), ("23", 4), ("3", 11)])
def test_region_option(region, first):
    """Exactly the frames from 0, N1 or N2 on are in the loss."""
    prediction = [a.requires_grad_() for a in torch.randn(6, 2, 6, 13, 2, 2)]
    cfg = asymdpo.Config(beta=1.0, form="inside", region=region)
    loss, _ = asymdpo.asymdpo_loss(cfg, prediction, torch.tensor([4, 4]), torch.tensor([11, 11]))
    gradient = torch.autograd.grad(loss.sum(), prediction[0])[0].abs().amax(dim=(0, 1, 3, 4))
    assert (gradient[:first] == 0).all() and (gradient[first:] > 0).all()


LENGTHS = torch.tensor([4, 2]), torch.tensor([11, 13])  # N1, N2


def test_nan_before_n1_reaches_neither_loss_nor_gradient():
    """Region ① is selected away in every term of the loss, the optional SFT term included."""
    shared = (torch.arange(13) < LENGTHS[0][:, None])[:, None, :, None, None]
    clean = torch.randn(6, 2, 6, 13, 2, 2)
    cfg = asymdpo.Config(beta=1.0, form="inside", sft_weight=0.5)
    v = torch.where(shared, NAN, clean[0]).requires_grad_()
    loss, _ = asymdpo.asymdpo_loss(cfg, (v, *clean[1:]), *LENGTHS)
    assert torch.equal(loss, asymdpo.asymdpo_loss(cfg, tuple(clean), *LENGTHS)[0])
    gradient = torch.autograd.grad(loss.sum(), v)[0]
    assert gradient.isfinite().all() and torch.equal(gradient != 0, ~shared.expand_as(gradient))


def test_sft_term_and_reference_free():
    """λ·β/2 times the winner's flow matching error, averaged over the same frames. Without a reference S is the plain
    difference of errors."""
    v_w, v_l, _, _, target_w, target_l = prediction = torch.randn(6, 2, 6, 13, 2, 2)
    plain, sft, free = (
        asymdpo.asymdpo_loss(asymdpo.Config(beta=2.0, form="inside", **more), prediction, *LENGTHS)
        for more in ({}, dict(sft_weight=0.5), dict(reference_free=True))
    )
    winner, loser = (v_w - target_w).square(), (v_l - target_l).square()
    mean = [winner[i, :, n:].mean() for i, n in enumerate(LENGTHS[0])]
    assert torch.allclose(sft[0] - plain[0], 0.5 * torch.stack(mean), atol=1e-6)
    S = [(winner - loser)[i, :, n:].mean(dim=(0, 2, 3)).sum() for i, n in enumerate(LENGTHS[0])]
    assert torch.allclose(free[1]["S"], torch.stack(S), atol=1e-4)


@pytest.mark.parametrize("beta", [50.0, 800.0])
@pytest.mark.parametrize("form", ["inside", "outside"])
def test_a_weight_of_1_is_what_dpo_pulls_the_winner_with(form, beta):
    """At step 0, policy equal to reference, the winner's gradient is twice DPO's, whatever β; the loser's is DPO's."""
    v_w, v_l, target_w, target_l = torch.randn(4, 2, 6, 13, 2, 2)
    gradients = []
    for weight in (0.0, 1.0):
        policy = v_w.clone().requires_grad_(), v_l.clone().requires_grad_()
        cfg = asymdpo.Config(beta=beta, form=form, sft_weight=weight)
        loss, parts = asymdpo.asymdpo_loss(cfg, (*policy, v_w, v_l, target_w, target_l), *LENGTHS)
        assert not parts["S"].any()
        gradients.append(torch.autograd.grad(loss.sum(), policy))
    (plain_w, plain_l), (both_w, both_l) = gradients
    assert plain_w.abs().max() > 0 and torch.equal(plain_l, both_l)
    assert torch.allclose(both_w, 2 * plain_w, rtol=1e-4)


@pytest.mark.parametrize("decay, expected", [("none", [0.25, 1, 1, 1]), ("cosine", [0.25, 0.96, 0.5, 0.0])])
def test_learning_rate(decay, expected, chain, tmp_path):
    """Linear warm-up; then constant, or a cosine to 0. It is what the log says."""
    cfg = asymdpo.Config(lr=2.0, warmup=4, steps=1000, decay=decay)
    rates = [asymdpo.learning_rate(step, cfg) / 2 for step in (0, 126, 500, 999)]
    assert rates == pytest.approx(expected, abs=2e-3)
    out = run_stage(chain, "asymdpo", out=tmp_path / "run", decay=decay, steps=4, warmup=1, lr=1e-3)
    shares = [1, 1, 1, 1] if decay == "none" else [1, 0.8536, 0.5, 0.1464]
    assert [row["lr"] for row in metrics(out)] == pytest.approx([1e-3 * share for share in shares], rel=1e-3)


def test_wans_presets_are_the_papers():
    """What was tuned on the tiny world is not copied to them: a constant rate, and no term of the winner's own."""
    for preset in ("1.3b", "14b"):
        cfg = resolve(asymdpo.Config(preset=preset), asymdpo.PRESETS)
        assert (cfg.decay, cfg.sft_weight, cfg.form, cfg.beta, cfg.lr) == ("none", 0.0, "outside", 800.0, 5e-6)


# ---- what a run draws and says ---------------------------------------------------------------------------------------


def test_no_two_stages_draw_from_one_key(chain, tmp_path, monkeypatch):
    """Order, noise and times: the cold start and DPO see the same clips, and must not see them in the same noise."""
    drawn, generator = [], flow.generator
    monkeypatch.setattr(flow, "generator", lambda *key: drawn[-1].add(key) or generator(*key))
    for name, more in (("sft", {}), ("continuation", dict(split="align")), ("asymdpo", {})):
        drawn.append(set())
        run_stage(chain, name, out=tmp_path / name, steps=1, **more)
    assert not drawn[0] & drawn[1] and not drawn[0] & drawn[2] and not drawn[1] & drawn[2]
    assert all({key[0] for key in keys} >= {"order", "noise", "t"} for keys in drawn)


def test_a_run_says_its_epochs(chain, tmp_path, capsys):
    """In the first line: steps are absolute, so only the number of samples tells how often each is used."""
    for name, unit in (("sft", "clips"), ("asymdpo", "pairs")):
        run_stage(chain, name, out=tmp_path / name, steps=6)
        count = len(Shards(chain / "pairs", "make_pairs.py"))  # a pair for each clip of the split
        said = f"{name}: 6 steps × 4 = 24 {unit}, {24 / count:.1f} epochs of {count}; 1 process on cpu"
        assert said in capsys.readouterr().err


def test_more_than_the_papers_epoch_is_said():
    """With the number of steps that is one. tiny is tuned for several epochs; a split has about the size asked for."""
    cfg = resolve(asymdpo.Config(preset="1.3b"), asymdpo.PRESETS)
    assert asymdpo.repeated(cfg, 20_000) is None and asymdpo.repeated(cfg, 19_800) is None
    said = asymdpo.repeated(cfg, 2000)
    assert "each pair is used 10.0 times, but once in the paper" in said and said.endswith("--steps 63")
    assert asymdpo.repeated(resolve(asymdpo.Config(), asymdpo.PRESETS), 600) is None


@pytest.mark.parametrize("name", ["sft", "continuation"])
def test_a_dropped_caption_is_the_prompt_of_guidance(name, chain, tmp_path, monkeypatch):
    """What the stage trains on in its place is, bit for bit, the unconditional branch of make_pairs.py."""
    videos = some_clips(chain, tmp_path / "clips", 4)
    data = run_stage(
        chain,
        "shards",
        videos=videos,
        vae=chain / "shards",
        out=tmp_path / "data",
        negative="a blue ball",
        align=1.0,
        train=0.0,
    )
    module, seen = {"sft": sft, "continuation": continuation}[name], []
    loss = f"{name.replace('sft', 'flow')}_loss"
    original = getattr(module, loss)
    monkeypatch.setattr(module, loss, lambda net, x0, text, *rest: seen.append(text) or original(net, x0, text, *rest))
    options = dict(data=data, split="align", steps=1, caption_dropout=1.0)
    run_stage(chain, name, out=tmp_path / "run", **options)
    negative = Shards(data, "prepare.py").negative()
    assert negative.shape == (3, 32) and torch.equal(seen[0], negative.expand(4, -1, -1))

    guided = flow.guided
    monkeypatch.setattr(flow, "guided", lambda *args: seen.append(args[2]) or guided(*args))
    run_stage(chain, "pairs", data=data, out=tmp_path / "pairs", guidance=2.0)
    assert torch.equal(seen[-1], negative)

    (data / "negative.safetensors").unlink()
    refused("negative.safetensors: expected", run_stage, chain, name, out=tmp_path / "none", **options)


def test_wans_presets_drop_captions_where_guidance_samples():
    """Φ is sampled with guidance at Wan's presets, and without at tiny."""
    for preset in continuation.PRESETS:
        dropout, guidance = continuation.PRESETS[preset]["caption_dropout"], make_pairs.PRESETS[preset]["guidance"]
        assert (dropout > 0) == (guidance != 1)


# ---- continuation ----------------------------------------------------------------------------------------------------


def test_continuation_loss_ignores_the_given_frames():
    """Noise and errors on given frames move neither loss nor gradient: they enter clean and are not supervised."""
    net, (x0, _, noise, text, t) = small_net(), batch()
    model.add_task_prompt(net, 13)
    cond_mask = torch.arange(13) < torch.tensor([1, 4, 7, 12])[:, None]
    given = cond_mask[:, None, :, None, None]

    def loss_with(noise):
        return continuation.continuation_loss(net, x0, text, noise, t, cond_mask)

    assert torch.equal(loss_with(noise), loss_with(torch.where(given, noise + 5, noise)))
    assert not torch.equal(loss_with(noise), loss_with(torch.where(given, noise, noise + 5)))

    target = flow.velocity(x0, noise)
    for value in (0.0, 1e3, NAN):
        output = torch.where(given, value, torch.randn_like(x0)).requires_grad_()
        loss = continuation.continuation_loss(lambda *_, out=output: out, x0, text, noise, t, cond_mask)
        error = [(output - target)[i, :, n:].square().mean() for i, n in enumerate(cond_mask.sum(1).tolist())]
        assert torch.allclose(loss, torch.stack(error), rtol=1e-5)
        gradient = torch.autograd.grad(loss.sum(), output)[0]
        assert (gradient.masked_select(given) == 0).all(), f"with {value} on the given frames"
        assert (gradient.masked_select(~given) != 0).all()


@pytest.mark.parametrize("where", ["text", "frame"])
def test_continuation_trains_lora_and_prompts_only(where, chain):
    """The backbone is frozen; both prompts' tables get a gradient, whichever way they enter."""
    cfg = continuation.Config(base=str(chain / "base"), layers="attn", rank=4, prompts=where)
    net = continuation.build(cfg, Group(), (28, 13, 2, 3))
    (x0, noise), text = torch.randn(2, 2, 28, 13, 2, 3), torch.randn(2, 5, 32)
    cond_mask = torch.arange(13) < torch.tensor([3, 6])[:, None]
    continuation.continuation_loss(net, x0, text, noise, torch.rand(2), cond_mask).sum().backward()
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    assert all(".lora." in n or n.startswith("task_prompt.") for n in trained) and len(trained) > 2
    assert net.task_prompt.cond.grad.abs().sum() > 0 and net.task_prompt.noisy.grad.abs().sum() > 0


def test_cond_masks_of_training():
    """A prefix of 1 … F − 1 given frames, each about as often as the others."""
    masks = continuation.draw_cond_mask([(0, step, "clip") for step in range(1200)], 13)
    counts = masks.sum(1)
    assert torch.equal(masks, torch.arange(13) < counts[:, None])
    frequency = counts.bincount(minlength=14)
    assert frequency[0] == 0 and frequency[13] == 0 and (frequency[1:13] > 60).all()


# ---- pairs -----------------------------------------------------------------------------------------------------------


def both(chain, pairs_folder):
    """The pairs and, in their order, the real latents of their clips."""
    pairs, clips = Shards(pairs_folder, "make_pairs.py"), Shards(chain / "shards", "prepare.py")
    index = {row["id"]: i for i, row in enumerate(clips.rows)}
    everything = range(len(pairs))
    real = clips.get("x0", [index[row["id"]] for row in pairs.rows])
    return pairs, pairs.get("chosen", everything), pairs.get("rejected", everything), real


def test_given_frames_of_every_pair_are_the_real_ones(chain):
    """Bit for bit: chosen before N2, rejected before N1; what follows is generated and differs."""
    pairs, chosen, rejected, real = both(chain, chain / "pairs")
    assert len(pairs) >= 8
    for row, winner, loser, x0 in zip(pairs.rows, chosen, rejected, real, strict=True):
        n1, n2 = row["n1"], row["n2"]
        assert 1 <= n1 <= 7 < 11 <= n2 <= 13
        assert torch.equal(winner[:, :n2], x0[:, :n2]) and torch.equal(loser[:, :n1], x0[:, :n1])
        assert not torch.isclose(loser[:, n1:], x0[:, n1:]).all()
        assert n2 == 13 or not torch.isclose(winner[:, n2:], x0[:, n2:]).all()
        assert winner.isfinite().all() and loser.isfinite().all()


def test_a_pair_is_a_function_of_clip_lengths_and_seed(chain, tmp_path):
    """In other batches: the same pairs. Another seed: other pairs."""
    pairs, chosen, rejected, _ = both(chain, chain / "pairs")
    few, c, r, _ = both(chain, run_stage(chain, "pairs", out=tmp_path / "few", shard_size=3, clips=5))
    assert [(a["id"], a["n1"], a["n2"]) for a in few.rows] == [(a["id"], a["n1"], a["n2"]) for a in pairs.rows[:5]]
    assert torch.allclose(c, chosen[:5], atol=1e-4) and torch.allclose(r, rejected[:5], atol=1e-4)
    other, *_ = both(chain, run_stage(chain, "pairs", out=tmp_path / "other", seed=1, clips=5))
    assert [(a["n1"], a["n2"]) for a in other.rows] != [(a["n1"], a["n2"]) for a in pairs.rows[:5]]


def test_both_continuations_start_from_the_same_noise(chain):
    """With equal lengths winner and loser are one and the same: the pair differs by its lengths only."""
    net = load_continuation(chain / "base", chain / "continuation")
    x0, text, keys = torch.randn(2, 28, 13, 2, 3), torch.randn(2, 5, 32), [("pair", 0, "a"), ("pair", 0, "b")]
    cfg = make_pairs.Config(nfe=2, t_shift=4.0, guidance=1.0)
    one, two = (make_pairs.continue_clips(net, x0, text, [3, 5], keys, cfg) for _ in range(2))
    assert torch.equal(one, two)
    whole = make_pairs.continue_clips(net, x0, text, [13, 5], keys, cfg)
    assert torch.equal(whole[0], x0[0]) and torch.allclose(whole[1], one[1], atol=1e-4)


@pytest.mark.parametrize("solver", ["unipc", "euler"])
def test_pairs_are_sampled_by_the_solver(solver, chain):
    """Which one is an option; Wan's own unless another is asked for."""
    net = load_continuation(chain / "base", chain / "continuation")
    x0, text, keys = torch.randn(1, 28, 13, 1, 1), torch.randn(1, 5, 32), [("pair", 0, "a")]
    cfg = make_pairs.Config(nfe=3, t_shift=4.0, guidance=1.0, **({} if solver == "unipc" else {"solver": solver}))
    made = make_pairs.continue_clips(net, x0, text, [5], keys, dataclasses.replace(cfg, plain=True))
    given = torch.arange(13)[None] < 5
    noise = flow.draw_noise(x0.shape[1:], keys)
    with torch.no_grad():
        expected = {
            name: solve(net, noise, text, flow.time_grid(3, 4.0), x0, given) for name, solve in flow.SOLVERS.items()
        }
    assert torch.equal(made, expected.pop(solver)) and not any(torch.allclose(made, a) for a in expected.values())


def test_windows():
    """At 13 latent frames the paper's shares are 1 … 7 and 11 … 13; windows that make no sense are refused."""
    assert make_pairs.windows(make_pairs.Config(), 13) == (1, 7, 11, 13)
    assert make_pairs.windows(make_pairs.Config(n1_min=0, n2_min=13), 13) == (0, 7, 13, 13)
    backwards = dict(n1_min=5, n1_max=4), dict(n2_min=13, n2_max=12)
    for wrong in (dict(n1_min=-1), dict(n1_max=11), dict(n2_max=14), *backwards):
        refused("n1_min <= n1_max < n2_min <= n2_max", make_pairs.windows, make_pairs.Config(**wrong), 13)


def test_draw_lengths_covers_its_windows():
    """Every length of both windows, about equally often, and independently of each other."""
    drawn = torch.tensor([make_pairs.draw_lengths(0, f"clip-{i}", (1, 7, 11, 13)) for i in range(2100)])
    for column, low, high in ((0, 1, 7), (1, 11, 13)):
        counts = drawn[:, column].bincount(minlength=14)
        assert counts[:low].sum() == 0 and counts[low : high + 1].sum() == 2100
        assert (counts[low : high + 1] > 0.75 * 2100 / (high - low + 1)).all()
    assert abs(torch.corrcoef(drawn.T.double())[0, 1]) < 0.08
    assert make_pairs.draw_lengths(0, "clip-3", (1, 7, 11, 13)) == tuple(drawn[3].tolist())


def test_region_3_leaves_out_pairs_without_one(chain, tmp_path):
    """--region 3 cannot learn from a winner that is all real: such pairs are left out; with no other, it says so."""
    pairs = run_stage(chain, "pairs", out=tmp_path / "pairs", n2_min=13, clips=4)
    _, chosen, _, real = both(chain, pairs)
    assert torch.equal(chosen, real)
    refused("region 3", run_stage, chain, "asymdpo", region="3", pairs=pairs, out=tmp_path / "none")
    run_stage(chain, "asymdpo", region="3", out=tmp_path / "mixed")

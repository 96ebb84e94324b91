"""experiments.evaluate: the numbers of summary.json, made again from the chain's folders."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import labelled, refused, run_stage

import flow
from experiments import evaluate, page
from runtime.options import Diverged
from runtime.shards import Shards
from tiny import balls
from tiny import codec as codecs
from wan.lora import load_adapted


@pytest.fixture(scope="module")
def summary(chain) -> dict:
    return json.loads((chain / "eval" / "summary.json").read_text())


def loras(chain, *names: str) -> list:
    return [chain / name / "lora.safetensors" for name in names]


@torch.no_grad()
def judged_again(chain, net, noise=1.0, solver="unipc") -> dict[str, np.ndarray]:
    """The scores of eight prompts."""
    clips = Shards(chain / "shards", "prepare.py", "eval")
    rows = clips.rows[:8]
    drawn = flow.draw_noise(clips.shape("x0"), [("table", 0, row["id"], 0) for row in rows])
    x0 = flow.SOLVERS[solver](net, noise * drawn, clips.text(range(8)), flow.time_grid(2, 4.0))
    return balls.score(codecs.load(chain / "shards"), x0, [row["caption"] for row in rows])


def test_the_tables_rows(chain, summary):
    """Every model on the same noise by UniPC; real clips are at no distance from themselves."""
    longer = "SFT, as many operations"
    assert list(summary["table"]) == ["Pretrain", "SFT", longer, "DynamicsBoost", "real clips"]
    assert all(set(row) == {*balls.METRICS, "w1"} for row in summary["table"].values())
    real = summary["table"]["real clips"]
    assert real["w1"] == 0 and real["valid"] == 1 and summary["clips"] == 8
    for name, folders in (("SFT", ["sft"]), (longer, ["sft_longer"]), ("DynamicsBoost", ["sft", "asymdpo"])):
        found = judged_again(chain, load_adapted(chain / "base", loras(chain, *folders)))
        row = summary["table"][name]
        assert row["score"] == pytest.approx(found["score"].mean(), abs=2e-4)
        assert row["dyn"] == pytest.approx(found["dyn"].mean(), abs=2e-4)
        assert row["w1"] > 0


def test_differences_are_dynamicsboosts(chain, summary):
    """Less each other row, by score and share of valid clips, with an interval about the mean."""
    assert list(summary["difference"]) == ["Pretrain", "SFT", "SFT, as many operations"]
    ours = summary["table"]["DynamicsBoost"]
    for name, found in summary["difference"].items():
        for metric in ("score", "valid"):
            gap, part = ours[metric] - summary["table"][name][metric], found[metric]
            assert part["mean"] == pytest.approx(gap, abs=2e-4) and part["lo"] <= part["mean"] <= part["hi"]


def test_controls(chain, summary):
    """Less noise and the other solver, for both models."""
    assert list(summary["controls"]) == ["noise × 0.95", "noise × 0.85", "solver euler"]
    for kind, options in (("noise × 0.85", dict(noise=0.85)), ("solver euler", dict(solver="euler"))):
        found = summary["controls"][kind]
        for name, folders in (("SFT", ["sft"]), ("DynamicsBoost", ["sft", "asymdpo"])):
            again = judged_again(chain, load_adapted(chain / "base", loras(chain, *folders)), **options)
            assert found[name]["score"] == pytest.approx(again["score"].mean(), abs=2e-4)
        gap = found["DynamicsBoost"]["score"] - found["SFT"]["score"]
        assert found["difference"]["score"]["mean"] == pytest.approx(gap, abs=2e-4)
    assert len({summary["controls"][kind]["SFT"]["traj"] for kind in summary["controls"]}) == 3


@torch.no_grad()
def test_half_strength_halves_the_last_lora(chain, summary):
    """Not the cold start's. The table's row and its difference are of that network."""
    x, t, text = torch.randn(2, 28, 13, 2, 3), torch.rand(2), torch.randn(2, 5, 32)
    files = loras(chain, "sft", "asymdpo")
    seen = []
    nets = [evaluate.adapted(chain / "base", files, strength) for strength in (0.5, 1)]
    for net in (load_adapted(chain / "base", files[:1]), *nets):
        net.blocks[0].self_attn.q.register_forward_hook(lambda *args: seen.append(args[2]))
        net(x, t, text)
    none, half, full = seen
    assert (full - none).abs().max() > 1e-4
    assert torch.allclose(half - none, (full - none) / 2, atol=0.02 * (full - none).abs().max().item())
    again = judged_again(chain, evaluate.adapted(chain / "base", files, 0.5))
    assert summary["half"]["score"] == pytest.approx(again["score"].mean(), abs=2e-4)
    gap = summary["half"]["score"] - summary["table"]["SFT"]["score"]
    assert summary["half"]["difference"]["score"]["mean"] == pytest.approx(gap, abs=2e-4)


def test_without_sft_for_as_many_operations(chain, tmp_path):
    """It is an option: without its folder the row is left out, with another stage's it is refused."""
    out = run_stage(chain, "eval", out=tmp_path / "eval", sft_longer="", clips=2, sweep_clips=2, nfe=1)
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["difference"]) == ["Pretrain", "SFT"] and len(summary["table"]) == 4
    wrong = dict(out=tmp_path / "other", sft_longer=chain / "asymdpo")
    refused("asymdpo: expected a folder made by sft.py", run_stage, chain, "eval", **wrong)


def test_paired_bootstrap():
    """95 of 100 intervals of a normal mean hold it; a constant difference has no width. What a prompt's samples have in
    common is counted once: four equal samples of each of 100 prompts are as good as one."""
    rng, bootstrap = np.random.default_rng(0), evaluate.paired_bootstrap
    prompts = [f"a ball {i}" for i in range(100)]
    draws = [rng.normal(1.0, 2.0, 100) for _ in range(100)]
    found = [bootstrap(draw, prompts, seed, draws=1000) for seed, draw in enumerate(draws)]
    assert 88 <= sum(part["lo"] <= 1 <= part["hi"] for part in found) <= 99
    assert np.mean([part["hi"] - part["lo"] for part in found]) == pytest.approx(2 * 1.96 * 0.2, rel=0.08)
    assert bootstrap(np.full(9, 0.25), prompts[:3] * 3, 0) == {"mean": 0.25, "lo": 0.25, "hi": 0.25}
    assert bootstrap(np.tile(draws[0], 4), prompts * 4, 0, 1000) == pytest.approx(found[0])


def test_centre_errors():
    """Of the ball that was made and of the held picture's, in px; a ball that is not there counts as MISSING px."""
    true = np.stack([[20.0, 30.0], [21.0, 30.0], [22.0, 30.0]])[None]
    made = true + [3.0, 4.0]
    pictures = balls.render(balls.spots(made))
    pictures[0, 2] = balls.WALL
    found = evaluate.centre_errors(pictures, balls.render(balls.spots(true)), balls.render(balls.spots(true[:, 0])))
    assert found.shape == (2, 1, 3)
    assert np.allclose(found[:, 0], [[5, 5, balls.MISSING], [0, 1, 2]], atol=0.4)


def test_sweep_and_labels(chain, summary):
    """From 0 to all frames given; what is all given is the real clip. A label is right where the winner scores more."""
    rows = summary["sweep_rows"]
    assert [row["n_cond"] for row in rows] == list(range(14)) and "generated_score" not in rows[-1]
    clips = Shards(chain / "shards", "prepare.py", "eval")
    real = balls.score(codecs.load(chain / "shards"), clips.get("x0", range(4)), [r["caption"] for r in clips.rows[:4]])
    assert rows[-1]["score"] == pytest.approx(real["score"].mean(), abs=1e-4)
    assert rows[12]["hold"] < balls.MISSING and {"next_frame", "hold"} <= rows[1].keys() - rows[0].keys()
    pairs = Shards(chain / "pairs", "make_pairs.py")
    given = evaluate.label_accuracy(codecs.load(chain / "shards"), pairs, 5)
    assert given["pairs"] == 5 and summary["labels"]["pairs"] == len(pairs)


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_clips_of_another_world_are_named(chain, made, tmp_path, monkeypatch):
    """Latents of other channels, as an earlier version made them, and captions without a ball that moves."""
    codec, out = codecs.load(chain / "shards"), tmp_path / "out"
    balls.check_clips(Shards(chain / "shards", "prepare.py"), "x0", codec)
    other = SimpleNamespace(folder="other", shape=lambda field: (28, 13, 1, 1), rows=[{"caption": "a cat"}])
    refused("a ball that falls or floats, got 'a cat'", balls.check_clips, other, "x0", codec)
    monkeypatch.setattr(codecs.LinearVAE, "channels", 16)
    words = "expected latents \\(16, 13, 1, 1\\) of clips of tiny.balls, got \\(28, 13, 1, 1\\)"
    refused(words, run_stage, chain, "eval", out=out)
    refused(words, labelled, chain, made["flow"], out)
    refused(words, page.main, page.Config(demo=str(chain)))
    assert not out.exists() and not (chain / "report.html").exists()


def test_a_model_that_diverged_is_named(chain, tmp_path, monkeypatch):
    """By its folder: samples that are no numbers have no score."""
    small = dict(out=tmp_path / "out", clips=2, sweep_clips=2, nfe=1)

    def diverges(loader: str, folder: str, is_ours) -> None:
        whole = getattr(evaluate, loader)

        def diverged(*args):
            net = whole(*args)
            net.head.head.bias.data.fill_(math.nan if is_ours(*args) else 0)
            return net

        with monkeypatch.context() as patch:
            patch.setattr(evaluate, loader, diverged)
            words = f"/{folder}: its model samples NaN or infinity"
            refused(words, run_stage, chain, "eval", kind=Diverged, **small)

    diverges("adapted", "asymdpo", lambda base, loras, strength=1.0: loras[1:])
    diverges("load_continuation", "continuation", lambda base, folder: True)
    assert not (tmp_path / "out" / "summary.json").exists()

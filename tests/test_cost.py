"""What --dry-run says: counts against PyTorch's own and published sizes; it needs no file and leaves none."""

import dataclasses
import importlib
import re

import pytest
import torch
from helpers import ROOT, script
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import asymdpo
import common
import cost
import model
import sft
import text
import vae
from common import UserError

WAN = cost.SHAPES["1.3b"]
TERA, GIB = 1e12, 2**30


def with_lora(checkpointing: bool = False, rank: int = 196):
    def build(net):
        net.bfloat16().gradient_checkpointing = checkpointing
        model.add_lora(net, rank, rank, "attn")
        return net

    return build


def pair_loss(net, *batch):
    return asymdpo.example_loss(asymdpo.Config(beta=800.0, form="outside"), net, *batch)


def test_operations_are_flop_counter_modes():
    """Forward and backward with LoRA: products as FlopCounterMode counts them on real tensors, exactly; it leaves out
    the CPU's attention, for which there is PyTorch's formula."""
    ours = cost.measure_dit("tiny", (48, 13, 2, 2), 2, sft.flow_loss, with_lora(rank=4), train=True)
    net, (x0, noise) = with_lora(rank=4)(model.DiT(model.PRESETS["tiny"])), torch.randn(2, 2, 48, 13, 2, 2)
    with FlopCounterMode(display=False) as theirs:
        sft.flow_loss(net, x0, torch.randn(2, 24, 32), noise, torch.rand(2)).sum().backward()
    assert ours["flop"] - ours["attention"] == theirs.get_total_flops() > 0
    q, kv = (2, 3, 52, 32), [(2, 3, 52, 32), (2, 3, 24, 32)]
    attention = sum(sdpa_flop_count(q, k, k) + sdpa_backward_flop_count(q, q, k, k) for k in kv)
    assert ours["attention"] == 3 * attention


def test_memory_is_what_is_alive():
    """Freed storages are gone, views cost nothing, the peak stays; no storage from outside counts."""
    outside = torch.zeros(1000)
    with cost.Count() as count:
        a = outside + 1
        b = a.view(10, 100)[1:]
        outside.add_(1)
        c = torch.cat([a, a])
        del a, c
        assert (count.now, count.peak) == (4000, 12000)
        del b
        assert (count.now, count.peak) == (0, 12000)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_any_depth_is_the_straight_line(checkpointing, monkeypatch):
    """What two and three blocks tell of seven is what seven blocks cost: every number, to the byte."""
    monkeypatch.setitem(model.PRESETS, "tiny", dataclasses.replace(model.PRESETS["tiny"], num_layers=7))
    args = ((48, 13, 2, 2), 2, pair_loss, with_lora(checkpointing, 4))
    line, measure = cost.measure_dit("tiny", *args, train=True), cost.measure
    with monkeypatch.context() as patch:  # all seven, whatever depth is asked for
        patch.setattr(dataclasses, "replace", lambda config, **changes: config)
        seven = cost.measure_dit("tiny", *args, train=True)
    assert measure is cost.measure and line == seven and seven["kept"] < seven["activations"]


def test_published_sizes():
    """Wan2.1 at 7488 tokens, its VAE and UMT5, against counts made apart from this code; LoRAs; a DPO pair's memory."""
    forward = {
        p: cost.measure_dit(p, WAN, 1, lambda net, x0, states, noise, t: net(x0, t, states)) for p in ("1.3b", "14b")
    }
    assert [round(forward[p]["flop"] / TERA, 1) for p in ("1.3b", "14b")] == [29.9, 230.3]
    assert [forward[p]["parameters"] for p in ("1.3b", "14b")] == [1_418_996_800, 14_288_491_584]
    coder = lambda step, size: cost.measure(lambda: vae.VAE(), lambda net: getattr(net, step)(torch.empty(size)))  # noqa: E731
    assert round(coder("encode", (1, 3, 49, 288, 512))["flop"] / TERA, 1) == 36.5
    assert round(coder("decode", (1, *WAN))["flop"] / TERA, 1) == 61.5
    states = cost.measure(lambda: text.UMT5(), lambda net: net(*torch.ones(2, 1, 512, dtype=torch.int64)))
    assert states["parameters"] == 5_680_910_336 and round(states["flop"] / TERA, 1) == 4.8  # 4.7 without attention
    pair = {c: cost.measure_dit("1.3b", WAN, 1, pair_loss, with_lora(c), train=True) for c in (False, True)}
    assert round(pair[True]["trained"] / 1e6, 1) == 144.5
    assert 210 < pair[False]["flop"] / TERA < 240 and 270 < pair[True]["flop"] / TERA < 310
    total = [sum(pair[c][key] for key in ("weights", "state", "activations")) / GIB for c in (False, True)]
    assert 30 < total[0] < 50 and 8 < total[1] < 12


COMMANDS = {  # options -> words of its table
    "sft": (["--preset", "1.3b", "--base", "nowhere"], "94.37 M of them trained"),
    "continuation": (["--preset", "14b", "--base", "nowhere"], "does not fit, take --micro_batch 2 --checkpointing"),
    "make_pairs": (
        ["--preset", "1.3b"],
        "33,333 samples of 100 forwards",
    ),  # 20,000 pairs, a third of N2 the clip whole
    "asymdpo": (["--preset", "1.3b", "--checkpointing", "--micro_batch", "1"], "--micro_batch 1 --checkpointing fits"),
    "evaluate": ([], "samples of 12 forwards"),
}


@pytest.mark.parametrize("stage", COMMANDS)
def test_dry_run(stage, tmp_path, monkeypatch, capsys):
    """With not one file there, at Wan's sizes and at the tiny preset's: a table, and not one file after it."""
    monkeypatch.chdir(tmp_path)
    module, (options, words) = importlib.import_module(stage), COMMANDS[stage]
    for arguments in (options, []):
        module.main(common.parse(module.Config, [*arguments, "--dry-run"], ""))
        printed = capsys.readouterr().out
        assert (words in printed or not arguments) and not list(tmp_path.iterdir())
        assert re.search(
            r"prediction: .* GPU-hours, .* hours on 8 x A800-80GB at 40 % of [\d.]+ TFLOP/s$", printed, re.M
        )


def test_dry_run_as_a_user_does(tmp_path):
    """A script; and what a run would refuse, a dry run refuses."""
    done = script(str(ROOT / "continuation.py"), "--dry-run", cwd=tmp_path)
    assert done.returncode == 0 and "prediction: " in done.stdout and not list(tmp_path.iterdir()), done.stderr
    for wrong in (dict(layers="some"), dict(rank=0), dict(preset="3b"), dict(micro_batch=3)):
        module = importlib.import_module("continuation")
        with pytest.raises(UserError):
            module.main(module.Config(dry_run=True, **wrong))


def test_shards_that_exist_decide(chain, capsys):
    """Latent shape and number of clips come from the folder; a finished run's folder is no obstacle."""
    sft.main(sft.Config(data=str(chain / "shards"), out=str(chain / "base"), dry_run=True))
    assert re.search(r"latents +\(48, 13, 2, 2\)\n.*each of \d+ [\d.]+ times", capsys.readouterr().out, re.S)


def test_readmes_figures():
    """Two rows of README's table, made again."""
    rows = {
        line.split("|")[1].strip(): line
        for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
        if "|" in line
    }
    pair = cost.measure_dit("14b", WAN, 1, pair_loss, with_lora(True, 128), train=True)
    forward = cost.measure_dit("1.3b", WAN, 1, lambda net, x0, states, noise, t: net(x0, t, states))
    hours = [n * m["flop"] / (0.4 * 312e12) / 3600 for n, m in ((20_000, pair), (20_000 * 5 / 3 * 100, forward))]
    assert f"{pair['flop'] / TERA:,.0f} TFLOP" in rows["`asymdpo.py`"] and f"{hours[0]:,.0f} h" in rows["`asymdpo.py`"]
    assert f"{hours[1]:,.0f} h" in rows["`make_pairs.py`"]

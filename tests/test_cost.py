"""What --dry-run says: counts against PyTorch's own and published sizes; it needs no file and leaves none."""

import dataclasses
import importlib
import re

import pytest
import torch
from helpers import ROOT, script
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import asymdpo
import continuation
import model
import sft
from experiments import cost
from runtime import run as common
from runtime.run import UserError
from wan import text, vae

WAN, TINY, TERA, GIB = cost.SHAPES["1.3b"], cost.SHAPES["tiny"], 1e12, 2**30


def with_lora(checkpointing: bool = False, rank: int = 196):
    def build(net):
        net.bfloat16().gradient_checkpointing = checkpointing
        model.add_lora(net, rank, rank, "attn")
        return net

    return build


def pair_loss(net, *batch):
    return asymdpo.example_loss(asymdpo.Config(beta=800.0, form="outside"), net, *batch)


def forward(preset: str) -> dict[str, int]:
    return cost.measure_dit(preset, WAN, 1, lambda net, x0, states, noise, t: net(x0, t, states))


def test_operations_are_flop_counter_modes():
    """Of a forward and backward with LoRA, products as FlopCounterMode counts them on real tensors, exactly; it has no
    formula for the CPU's attention: CUDA's stands in."""
    ours = cost.measure_dit("tiny", TINY, 2, sft.flow_loss, with_lora(rank=4), train=True)
    net, (x0, noise) = with_lora(rank=4)(model.DiT(model.PRESETS["tiny"])), torch.randn(2, 2, *TINY)
    with FlopCounterMode(display=False) as theirs:
        sft.flow_loss(net, x0, torch.randn(2, 24, 32), noise, torch.rand(2)).sum().backward()
    assert ours["flop"] - ours["attention"] == theirs.get_total_flops() > 0
    q, keys = (2, 3, 52, 32), [(2, 3, 52, 32), (2, 3, 24, 32)]
    assert ours["attention"] == 3 * sum(sdpa_flop_count(q, k, k) + sdpa_backward_flop_count(q, q, k, k) for k in keys)


def test_memory_is_what_is_alive():
    """Freed storages are gone, views cost nothing, the peak stays; no storage from outside counts."""
    outside = torch.zeros(1000)
    with cost.Count() as count:
        a = outside.add_(1) + 1
        b, c = a[1:], torch.cat([a, a])
        del a, c
        assert (count.now, count.peak) == (4000, 12000)
        del b
        assert (count.now, count.peak) == (0, 12000)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_any_depth_is_on_the_straight_line(checkpointing, monkeypatch):
    """What two and three blocks tell of seven is what seven blocks cost: every number, to the byte."""
    monkeypatch.setitem(model.PRESETS, "tiny", dataclasses.replace(model.PRESETS["tiny"], num_layers=7))
    arguments = ("tiny", TINY, 2, pair_loss, with_lora(checkpointing, 4), True)
    line = cost.measure_dit(*arguments)
    monkeypatch.setattr(dataclasses, "replace", lambda config, **changes: config)  # now all seven are built
    seven = cost.measure_dit(*arguments)
    assert line == seven and 0 < seven["kept"] < seven["activations"]


def test_published_sizes():
    """Wan2.1 at 7488 tokens, its VAE and UMT5, against counts made apart from this code; LoRAs; a DPO pair's memory."""
    small, large = forward("1.3b"), forward("14b")
    assert (round(small["flop"] / TERA, 1), round(large["flop"] / TERA, 1)) == (29.9, 230.3)
    encoder = cost.measure(vae.VAE, lambda net: net.encode(torch.empty(1, 3, 49, 288, 512)))
    decoder = cost.measure(vae.VAE, lambda net: net.decode(torch.empty(1, *WAN)))
    states = cost.measure(text.UMT5, lambda net: net(*torch.ones(2, 1, 512, dtype=torch.int64)))
    assert [round(m["flop"] / TERA, 1) for m in (encoder, decoder, states)] == [36.5, 61.5, 4.8]
    plain, checkpointing = (cost.measure_dit("1.3b", WAN, 1, pair_loss, with_lora(c), True) for c in (False, True))
    assert round(plain["trained"] / 1e6, 1) == 144.5
    assert 210 < plain["flop"] / TERA < 240 and 270 < checkpointing["flop"] / TERA < 310
    sums = [sum(m[k] for k in ("weights", "state", "activations")) / GIB for m in (plain, checkpointing)]
    assert 30 < sums[0] < 50 and 8 < sums[1] < 12


COMMANDS = {  # options -> words of its table
    "prepare": ("--preset 1.3b --videos nowhere", "100 text tokens: 37.43 TFLOP"),
    "sample": ("--preset 14b --prompt ball --samples 4", "1 at once fits (29.4 of 80 GiB"),  # as README's table
    "sft": ("--preset 1.3b --base nowhere", "94.37 M of them trained"),
    "continuation": ("--preset 14b --base nowhere", "does not fit, take --micro_batch 2 --checkpointing"),
    "make_pairs": ("--preset 1.3b", "33,333 samples of 100 forwards"),  # of 20,000 winners a third is the clip whole
    "asymdpo": ("--preset 1.3b --checkpointing --micro_batch 1", "--micro_batch 1 --checkpointing fits"),
    "evaluate": ("--clips 100", "1,548 samples of 12 forwards"),
}


@pytest.mark.parametrize("stage", COMMANDS)
def test_dry_run(stage, tmp_path, monkeypatch, capsys):
    """With not one file there, at Wan's sizes and at the tiny preset's: a table, and not one file after it."""
    monkeypatch.chdir(tmp_path)
    name = f"experiments.{stage}" if stage == "evaluate" else stage
    module, (options, words) = importlib.import_module(name), COMMANDS[stage]
    tiny = {"prepare": "--videos nowhere", "sample": "--prompt ball"}.get(stage, "")
    for arguments in (options, tiny):
        module.main(common.parse(module.Config, [*arguments.split(), "--dry-run"], ""))
        printed = capsys.readouterr().out
        assert (words in printed or arguments == tiny) and not list(tmp_path.iterdir())
        if (stage, arguments) == ("prepare", tiny):  # nothing to count
            continue
        assert re.search(r"prediction.*: .* GPU-hours, .* hours on 8 x A800-80GB at 40 % of [\d.]+ TFLOP/s\n$", printed)


def test_dry_run_as_a_program(tmp_path):
    """From another folder; and what a run would refuse, a dry run refuses."""
    done = script(str(ROOT / "make_pairs.py"), "--dry-run", cwd=tmp_path)
    assert done.returncode == 0 and "prediction: " in done.stdout and not list(tmp_path.iterdir()), done.stderr
    for wrong in (dict(layers="some"), dict(rank=0), dict(preset="3b"), dict(micro_batch=3)):
        with pytest.raises(UserError):
            continuation.main(continuation.Config(dry_run=True, **wrong))


def test_shards_that_exist_decide(chain, capsys):
    """Latent shape and number of clips come from the folder; a finished run in --out is no obstacle."""
    sft.main(sft.Config(data=str(chain / "shards"), out=str(chain / "base"), dry_run=True))
    assert re.search(r"latents +\(48, 13, 2, 2\)\n.*each of the \d+ taken [\d.,]+ times", capsys.readouterr().out, re.S)


def test_readmes_figures():
    """Two rows of README's table, made again: TFLOP, GiB and GPU-hours."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## What it will cost")[1]
    rows = {line.split("`")[1]: line.split(" | ") for line in section.splitlines() if line.startswith("| `")}
    pair = cost.measure_dit("14b", WAN, 2, pair_loss, with_lora(True, 128), True)
    gib = sum(pair[key] for key in ("weights", "state", "activations")) / GIB
    flop = (pair["flop"] / 2, 100 * forward("1.3b")["flop"])
    hours = [n * each / (0.4 * 312e12) / 3600 for n, each in zip((20_000, 20_000 * 5 / 3), flop)]
    assert rows["asymdpo.py"][5:] == [f"{flop[0] / TERA:,.0f}", f"{gib:.1f}", f"{hours[0]:.0f} |"]
    assert rows["make_pairs.py"][2:5:2] == [f"{flop[1] / TERA:,.0f}", f"{hours[1]:.0f}"]

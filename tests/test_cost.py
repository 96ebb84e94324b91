"""experiments.cost: its counts against PyTorch's own and published sizes. It needs no file and leaves none."""

import dataclasses
import functools
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
from kernels import modulate
from runtime.options import UserError, parse
from wan import text, vae

TINY, TERA = (48, 13, 2, 2), 1e12
pair_loss = functools.partial(cost.loss, asymdpo, asymdpo.Config(beta=800.0, form="outside"))


def with_lora(checkpointing: bool = False, rank: int = 196):
    def build(net):
        model.cast(net, torch.bfloat16).gradient_checkpointing = checkpointing
        model.add_lora(net, rank, rank, "attn")
        return net

    return build


def test_operations_are_flop_counter_modes():
    """Of a forward and backward with LoRA on real tensors, exactly. FlopCounterMode has no formula for the CPU's
    attention, so CUDA's is added to it. Nothing stays replaced.
    """
    ours = cost.measure_dit("tiny", TINY, 2, sft.flow_loss, with_lora(rank=4), train=True)
    assert modulate.implementation(torch.device("cpu")) == "torch" and not torch.compiler.is_compiling()
    net, (x0, noise) = with_lora(rank=4)(model.DiT(model.PRESETS["tiny"])), torch.randn(2, 2, *TINY)
    with FlopCounterMode(display=False) as theirs:
        sft.flow_loss(net, x0, torch.randn(2, 24, 32), noise, torch.rand(2)).sum().backward()
    q, keys = (2, 3, 52, 32), [(2, 3, 52, 32), (2, 3, 24, 32)]
    attention = 3 * sum(sdpa_flop_count(q, k, k) + sdpa_backward_flop_count(q, q, k, k) for k in keys)
    assert ours["flop"] == theirs.get_total_flops() + attention > 2 * attention > 0


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
    assert line == cost.measure_dit(*arguments) and line["activations"] > 0


def test_published_sizes():
    """Wan2.1 at 7488 tokens, its VAE and UMT5, against counts made apart from this code; LoRAs; a DPO pair's memory."""
    call = lambda net, x0, states, noise, t: net(x0, t, states)  # noqa: E731
    forwards = [cost.measure_dit(preset, cost.SHAPE, 1, call) for preset in ("1.3b", "14b")]
    assert [round(m["flop"] / TERA, 1) for m in forwards] == [29.9, 230.3]
    encoder = cost.measure(vae.VAE, lambda net: net.encode(torch.empty(1, 3, 49, 288, 512)))
    decoder = cost.measure(vae.VAE, lambda net: net.decode(torch.empty(1, *cost.SHAPE)))
    states = cost.measure(text.UMT5, lambda net: net(*torch.ones(2, 1, 512, dtype=torch.int64)))
    assert [round(m["flop"] / TERA, 1) for m in (encoder, decoder, states)] == [36.5, 61.5, 4.8]
    plain, checkpointing = (
        cost.measure_dit("1.3b", cost.SHAPE, 1, pair_loss, with_lora(c), True) for c in (False, True)
    )
    assert round(plain["trained"] / 16e6, 1) == 144.5  # float32: value, gradient and two moments
    assert 210 < plain["flop"] / TERA < 240 and 270 < checkpointing["flop"] / TERA < 310
    assert 30 < cost.memory(plain) < 50 and 8 < cost.memory(checkpointing) < 12


RUNS = {  # stage -> the options with which docs/wan.md tells its cost
    "prepare": "--videos nowhere", "sft": "--checkpointing", "continuation": "--checkpointing", "make_pairs": "",
    "asymdpo": "--micro_batch 2 --checkpointing", "sample": "--prompt ball --samples 100",
}  # fmt: skip


def printed(name: str, options: str, capsys) -> str:
    cost.main(name, parse(importlib.import_module(name).Config, options.split(), ""))
    return capsys.readouterr().out


@pytest.mark.parametrize("preset", ["1.3b", "14b"])
@pytest.mark.parametrize("name", RUNS)
def test_the_table_in_the_docs(name, preset, tmp_path, monkeypatch, capsys):
    """TFLOP, GiB and GPU-hours to the digits shown, in a folder without one file, which stays empty."""
    section = (ROOT / "docs/wan.md").read_text(encoding="utf-8").split("## What it will cost")[1]
    row = next(line for line in section.splitlines() if line.startswith(f"| `{name}.py`")).split("|")[3:-1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cost, "CLIPS", 100_000 if name == "prepare" else 20_000)
    found = printed(name, f"--preset {preset} {RUNS[name]}", capsys)
    figures = re.findall(r"^  [A-Za-z -]+ +([\d,]+\.\d+)", found, re.M)
    for figure, cell in zip(figures, row[:3] if preset == "1.3b" else row[3:], strict=True):
        shown = cell.split()[0].rstrip(",")
        step = 10 ** -len(shown.partition(".")[2])
        assert abs(float(figure.replace(",", "")) - float(shown.replace(",", ""))) <= 0.501 * step, (found, cell)
    assert not list(tmp_path.iterdir()) and " fits in 76" in found


def test_what_is_said_of_a_run(capsys):
    """What is assumed, and what does not fit. Of 20,000 winners a third is the clip whole, and is not sampled."""
    assert "does NOT fit in 76" in printed("continuation", "--preset 14b", capsys)
    found = printed("make_pairs", "--preset 1.3b --shard_size 2 --data nowhere", capsys)
    assert "33,333 samples of 100 forwards, 2 at once; latents (16, 13, 36, 64) assumed" in found


def test_as_a_program(tmp_path):
    """A stage's options follow its name. What a run refuses is refused, and so is the tiny preset."""
    run = functools.partial(script, "-m", "experiments.cost", cwd=tmp_path, PYTHONPATH=str(ROOT))
    done = run("make_pairs", "--preset", "1.3b", "--shard-size=2")
    assert done.returncode == 0 and "2 at once" in done.stdout, done.stderr
    assert run("label").returncode == 2
    for wrong in (dict(layers="some"), dict(rank=0), dict(preset="3b"), dict(batch_size=12), dict(preset="tiny")):
        with pytest.raises(UserError):
            cost.main("continuation", continuation.Config(**{"preset": "1.3b"} | wrong))


def test_shards_that_exist_decide(chain, monkeypatch):
    """Shape and number of the latents come from --data if they are of the preset, and are assumed if they are not."""
    assert cost.latents(str(chain / "shards"), "x0")[:2] == (cost.SHAPE, cost.CLIPS)
    monkeypatch.setattr(cost, "SHAPE", TINY)
    shape, count, known = cost.latents(str(chain / "shards"), "x0")
    assert shape == TINY and 70 < count <= 80 and f"{count} latents" in known

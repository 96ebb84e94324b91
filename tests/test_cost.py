"""experiments.cost: its counts against PyTorch's own and published sizes. It needs no file and leaves none."""

import collections
import dataclasses
import functools
import importlib
import itertools

import pytest
import torch
from helpers import ROOT, copy, refused, script
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import asymdpo
import continuation
import make_pairs
import model
import prepare
import sample
import sft
from bench import rounding
from experiments import cost, recipe, scale
from kernels import modulate
from runtime import files
from runtime.group import Group, local_batch
from runtime.options import UserError, parse, resolve
from wan import text, vae
from wan.lora import read_header

TINY, TERA = (28, 13, 2, 3), 1e12
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
    q, keys = (2, 3, 78, 32), [(2, 3, 78, 32), (2, 3, 24, 32)]
    attention = 3 * sum(sdpa_flop_count(q, k, k) + sdpa_backward_flop_count(q, q, k, k) for k in keys)
    assert ours["flop"] == theirs.get_total_flops() + attention > 2 * attention > 0


SAVED = dict(guidance=3.0, guidance_low=0.3, guidance_high=0.9)  # two of four steps, of t_shift 4, have guidance


@pytest.mark.parametrize("attention", model.ATTENTION)
@pytest.mark.parametrize("options", [{}, SAVED | dict(n2_min=13), SAVED | dict(plain=True), dict(shard=True)])
def test_a_pairs_operations_are_flop_counter_modes(attention, options):
    """Of pairs as make_pairs.py makes them, exactly, in batches of equal lengths; attention here is matrix products."""
    cfg = resolve(make_pairs.Config(nfe=4, shard_size=4, **options), make_pairs.PRESETS)
    net, window, ids = model.DiT(model.PRESETS["tiny"]), make_pairs.windows(cfg, 13), ["a", "b", "c", "d"]
    net.prefix = attention == "prefix"
    arguments = torch.randn(4, *TINY), torch.randn(4, 5, 32), ids, cfg, window, torch.randn(7, 32)
    with FlopCounterMode(display=False) as theirs, sdpa_kernel(SDPBackend.MATH):
        _, drawn = make_pairs.make_pair(net, *arguments)
    assert len({pair["n1"] for pair in drawn}) > 1 and 13 in {pair["n2"] for pair in drawn}

    def ours(n1, n2):
        one = dataclasses.replace(cfg, n1_min=n1, n1_max=n1, n2_min=n2, n2_max=n2)
        return cost.pair(one, TINY, attention)["flop"]

    assert theirs.get_total_flops() == sum(ours(**pair) for pair in drawn)
    low1, high1, low2, high2 = window
    every = [ours(n1, n2) for n1 in range(low1, high1 + 1) for n2 in range(low2, high2 + 1)]
    assert cost.pair(cfg, TINY, attention)["flop"] == pytest.approx(sum(every) / len(every), rel=1e-12)


@pytest.mark.parametrize("attention", model.ATTENTION)
def test_operations_of_the_continuation_models_training(attention):
    """Of a step on a clip of each n_cond, with a mask that has values. Prefix attention computes less."""
    cfg = resolve(continuation.Config(attention=attention, prompts="off"), continuation.PRESETS)
    net, (x0, noise) = model.DiT(model.PRESETS["tiny"]), torch.randn(2, 12, *TINY)
    model.add_lora(net, cfg.rank, cfg.rank, cfg.layers)
    net.prefix, mask = attention == "prefix", torch.arange(13) < torch.arange(1, 13)[:, None]
    with FlopCounterMode(display=False) as theirs, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        loss = continuation.continuation_loss(net, x0, torch.randn(12, 24, 32), noise, torch.rand(12), mask)
        loss.sum().backward()
    d, text, tokens = net.config.dim, net.config.text_len, 13 * 6
    given = [6 * n for n in range(1, 13)] if attention == "prefix" else [0] * 12
    scores = sum(n * n + (tokens - n) * tokens + tokens * text for n in given)
    # 2 products forward, and 5 backward, which are 2.5 times as many, of 2 operations a score and channel
    attended = net.config.num_layers * 7 * 2 * d * scores
    assert 12 * cost.train(continuation, cfg, TINY, 2)["flop"] == theirs.get_total_flops() + attended


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


def continue_from(n: int):
    """Builds a model.Continuation with prefix attention and n given frames, and calls it."""

    def call(net, x0, states, noise, t):
        net.prefix = True
        return model.Continuation(net, x0, states, n)(x0, t)

    return call


DEPTHS = [
    (pair_loss, with_lora(False, 4), True),
    (pair_loss, with_lora(True, 4), True),
    *((continue_from(n), cost.in_bfloat16) for n in (0, 6, 12)),
]


@pytest.mark.parametrize("arguments", DEPTHS)
def test_any_depth_is_on_the_straight_line(arguments, monkeypatch):
    """What two and three blocks tell of seven is what seven blocks cost: every number, to the byte."""
    monkeypatch.setitem(model.PRESETS, "tiny", dataclasses.replace(model.PRESETS["tiny"], num_layers=7))
    arguments = ("tiny", TINY, 2, *arguments)
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


def printed(name: str, options: str, capsys) -> str:
    cost.main(name, parse(cost.options_of(name), options.split(), ""))
    return capsys.readouterr().out


def test_the_tables_in_the_docs(tmp_path, monkeypatch):
    """docs/scale.md and recipes.md are what `python -m experiments.scale --write` and experiments.recipe's make of
    them; and they are made without one file.
    """
    shown = (ROOT / "docs/scale.md").read_text(encoding="utf-8").partition(scale.MARK)
    recipes = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert "".join(shown[1:]).splitlines() == scale.page().splitlines()
    assert recipes.splitlines() == recipe.page().splitlines()
    assert not list(tmp_path.iterdir())


def test_measured_beside_counted(tmp_path, monkeypatch):
    """What bench/gpu.py has measured on a GPU, and counted. Not toy sizes, nor rows that nothing was counted for."""
    monkeypatch.setattr(scale, "ROOT", tmp_path)
    assert scale.measured_table() == ""
    step = {"name": "a step", "GiB predicted": 35.07, "GiB at the peak": 34.87, "% MFU": 44.3}
    sections = {
        "large": {"on": "H100, torch", "toy": False, "rows": [step, {"name": "a decode", "GiB at the peak": 3.2}]},
        "small": {"on": "cpu", "toy": True, "rows": [step]},
    }
    (tmp_path / "docs").mkdir()
    files.write_json(tmp_path / "docs/gpu.json", {"1.3b": sections})
    rows = [line for line in scale.measured_table().splitlines() if line.startswith("|")]
    assert rows[2:] == ["| a step | 1.3b | H100 | 35.1 | 34.9 | 44 % |"]


def test_what_is_sent(monkeypatch):
    """By hand: rank 128 on the 8 attention layers of 30 blocks of 1536 is 94.4 M numbers, and a block's frozen weights
    are 44.9 M. On 32 GPUs the sum of the gradients passes the network, and each node gathers for itself.
    """
    lora, block = (
        30 * 8 * 2 * 128 * 1536 * 4,
        model.DiT(dataclasses.replace(model.PRESETS["1.3b"], num_layers=1)).blocks,
    )
    block = sum(p.numel() for p in block.parameters()) * 2
    sft8, sft32 = (scale.job("sft", "1.3b", n, "--split align --checkpointing") for n in (8, 32))
    pairs = scale.job("asymdpo", "1.3b", 8, "--checkpointing --micro_batch 2")
    assert [job.summed for job in (sft8, sft32)] == [2 * 7 / 8 * lora, 2 * 31 / 32 * lora]
    assert (sft8.share, sft8.batch, pairs.share, pairs.batch) == (4, 4, 4, 2)
    assert pairs.gathered == pytest.approx(2 * 3 * 7 / 8 * 30 * block, rel=1e-3)
    assert sft32.gathered == sft8.gathered == pytest.approx(2 * 7 / 8 * 30 * block, rel=1e-3)
    assert (
        sft8.seconds["summing"] == sft8.summed / cost.NVLINK and sft32.seconds["summing"] == sft32.summed / cost.NETWORK
    )
    monkeypatch.setattr(cost, "NVLINK", 1e9)  # so slow that the products wait for the weights
    slow = sft8.seconds
    step = slow["gathering"] + slow["summing"]
    assert slow["gathering"] > slow["computing"] and sft8.hours(shard=True) == pytest.approx(375 * step / 3600)
    assert sft8.hours() == pytest.approx(375 * (slow["computing"] + slow["summing"]) / 3600)


SHARDED = """
import types

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import asymdpo
import model
import sft
from runtime.group import Group, place

class Gathers(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "allgather" in str(func)
        return func(*args, **(kwargs or {}))

dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
dist.new_subgroups = lambda *args, **more: (None, [])  # gloo's, where others would have to answer
for checkpointing in (False, True):
    net = model.DiT(model.PRESETS["tiny"])
    model.add_lora(net, 4, 4, "attn")
    net.gradient_checkpointing = checkpointing
    place(net, types.SimpleNamespace(shard=True, compile=False), Group(0, 8))
    print(sum(p.to_local().nbytes for p in net.blocks.parameters() if not p.requires_grad))
    x0, noise = torch.randn(2, 2, 28, 13, 2, 3)
    batch, n = (torch.randn(2, 24, 32), noise, torch.rand(2)), torch.zeros(2, dtype=torch.int64)
    with Gathers() as clips:
        sft.flow_loss(net, x0, *batch).sum().backward()
    with Gathers() as pairs:
        prediction = asymdpo.predict(net, x0, x0.clone(), *batch)
        asymdpo.asymdpo_loss(asymdpo.Config(beta=1.0, form="inside"), prediction, n, n)[0].sum().backward()
    with Gathers() as forward, torch.no_grad():
        net(x0, batch[2], batch[0])
    print(clips.count, pairs.count, forward.count)
"""


def test_shard_is_counted_as_it_is():
    """What --shard leaves of the blocks on a GPU, and how often it gathers them, on 8 processes that are not there.

    Recomputation shares the backward's gather. FSDP2 pads what 8 does not divide, 6 % of the tiny net at most; its
    gather of what lies outside the 3 blocks, once in a batch, is not counted.
    """
    done = script("-W", "ignore", "-c", SHARDED, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    call = lambda net, x0, states, noise, t: net(x0, t, states)  # noqa: E731
    count = cost.measure_dit("tiny", TINY, 1, call, build=lambda net: net)
    saved = (cost.memory(count) - cost.memory(count, ways=8)) * 2**30
    kept = count["blocks"] - cost.GATHERED * count["block"] - saved
    options = {"sft": "--split align --checkpointing", "asymdpo": "--checkpointing"}
    gathers = [*(scale.job(name, "1.3b", 8, options[name]).gathers for name in options), 1]
    lines = [list(map(int, line.split())) for line in done.stdout.splitlines()]
    for local, counted in (lines[:2], lines[2:]):
        assert kept == pytest.approx(local[0], rel=0.06)
        assert [number // 3 for number in counted] == gathers == [2, 3, 1]


def test_what_is_said_of_a_run(capsys, monkeypatch):
    """All that is assumed, and nothing that was given or is there; what does not fit; --shard, where it is possible."""
    said = printed("continuation", "--preset 14b", capsys)
    assert "does NOT fit in 76" in said and "experiments.recipe chooses options that fit" in said
    options = "--preset 1.3b --shard_size 2 --nfe 4 --data nowhere --continuation nowhere"
    found, whole = (printed("make_pairs", options + more, capsys) for more in ("", " --shard"))
    assert "20,000 pairs (16, 13, 36, 64) by 4 steps, with prefix attention, 2 at once" in found
    assert "  --shard" not in found and "  --shard" in whole
    _, assumed = found.split("  assumed")
    gpus = "8 GPUs, 8 of them a node, 80 GiB of a GPU, 312 TFLOP/s"
    assert all(words in assumed for words in ("20,000 align latents", "no folder nowhere", gpus, "40 %", "100 tokens"))
    monkeypatch.setattr(cost, "latents", lambda *folder: (cost.SHAPE, 77, []))
    given = f"{options} --gpus 2 --node 2 --gpu_gib 24 --tflops 165"
    assert "latents" not in (known := printed("make_pairs", given, capsys)) and "8 x A800" not in known
    assert "on 2 GPUs of 24 GiB, 165 TFLOP/s each" in known and "fits in 20.0 GiB" in known
    refused("--shard: expected several GPUs", printed, "make_pairs", f"{options} --shard --gpus 1", capsys)
    refused("--gpu_gib: expected more than 4", printed, "make_pairs", f"{options} --gpu_gib 4", capsys)


def test_the_text_encoder_is_counted_where_it_is_loaded(capsys):
    """Beside the VAE in prepare.py, before the rest in sample.py; 11.36 GB are UMT5's as they are published."""
    encoder = cost.measure_text()
    assert encoder["weights"] == pytest.approx(11.36e9, rel=0.001)
    stored = cost.job_of("prepare", prepare.Config(preset="1.3b", videos="nowhere"), cost.Machine())
    [both] = stored.turns.values()
    assert both["weights"] - encoder["weights"] == pytest.approx(4 * 126.9e6, rel=0.01)  # the VAE's, in float32
    drawn = cost.job_of("sample", sample.Config(preset="1.3b", prompts="nowhere.txt"), cost.Machine())
    alone, rest = (cost.memory(count) for count in drawn.turns.values())
    assert drawn.gib() == alone > rest and drawn.samples == 1
    said = printed("sample", "--preset 1.3b --gpus 1", capsys)
    assert "text encoder: weights 10.6 GiB" in said and "one prompt, as there is no --prompt" in said


def test_clips_and_pairs_that_exist_are_encoded(tmp_path):
    """Both sides of each pair; what is not there is named, and as many as the paper's are assumed."""
    for side in ("good", "bad"):
        (tmp_path / side).mkdir()
        for name in ("a", "b"):
            (tmp_path / side / f"{name}.mp4").touch()
            (tmp_path / side / f"{name}.txt").write_text("a ball")
    (tmp_path / "pairs.csv").write_text("chosen,rejected,caption\n" + "good/a.mp4,bad/a.mp4,a ball\n" * 3)
    good, bad, table = (str(tmp_path / name) for name in ("good", "bad", "pairs.csv"))

    def encoded(**given):
        return cost.to_encode(prepare, resolve(prepare.Config(preset="1.3b", **given), prepare.PRESETS))

    assert encoded(videos=good) == (2, "") and encoded(chosen=good, rejected=bad) == (4, "")
    assert encoded(pairs=table) == (6, "") and encoded(pairs="none.csv") == (40_000, "none.csv")
    assert encoded(chosen=good, rejected="none") == (40_000, "none") and encoded(videos="none") == (100_000, "none")


def test_units():
    assert [cost.size(gib) for gib in (63.42, 1, 0.01)] == ["63.4 GiB", "1.0 GiB", "10 MiB"]
    seconds = (0.0184, 59, 61, 3600, 45_000)
    assert [cost.duration(s) for s in seconds] == [
        "0.0184 seconds", "59 seconds", "1.02 minutes", "60 minutes", "12.5 hours",
    ]  # fmt: skip
    assert cost.duration(45_000, "GPU-") == "12.5 GPU-hours"


@functools.cache
def toy(name, preset, machine, options, look):
    """A stage on a toy network, in place of recipe.job. Its blocks take 12 of 14 GiB of weights."""
    stage, share, size, GIB = importlib.import_module(name), 1, 1, 2**30
    cfg = resolve(parse(stage.Config, f"--preset {preset} {options}".split(), ""), stage.PRESETS)
    if name == "make_pairs":
        share = size = cfg.shard_size
    elif name not in ("prepare", "sample"):
        share, size = local_batch(cfg, Group(size=machine.gpus))
    again = getattr(cfg, "checkpointing", False)
    count = dict(weights=14 * GIB, trained=GIB, activations=size * (2 if again else 9) * GIB, blocks=12 * GIB)
    count |= dict(block=GIB, flop=0, file=0)
    flop = (4 if again else 3) * 1e13
    return cost.Job("", ["a toy"], machine, 320, share, size, 2, flop, machine.peak("bfloat16"), {"network": count})


def test_a_recipe_is_the_cheapest_that_fits(monkeypatch):
    """Of all options, tried one by one, on machines of many sizes; with links so slow that gathering decides, too."""
    monkeypatch.setattr(recipe, "job", toy)
    seen = collections.Counter()
    for gpus, gib in itertools.product((1, 2, 8), (10, 20, 24, 32, 48, 80)):
        machine = cost.Machine(gpus=gpus, gpu_gib=float(gib))
        sizes = [f"--micro_batch {n}" for n in range(1, 32 // gpus + 1) if 32 // gpus % n == 0]
        every = [
            recipe.Choice(words, toy("sft", "1.3b", machine, words, False))
            for words in map(" ".join, itertools.product(sizes, ("", "--checkpointing"), ("", "--shard")[:gpus]))
        ]
        for link in (160e9, 3e9):
            monkeypatch.setattr(cost, "NVLINK", link)
            best, fitting = recipe.choose("sft", "1.3b", machine), [one for one in every if one.fits]
            assert best.fits == bool(fitting)
            assert best.hours == min(e.hours for e in fitting) if fitting else best.gib == min(e.gib for e in every)
            seen.update([*best.options.split(), "fits" if best.fits else "does not"])
    assert all(seen[word] for word in ("--shard", "--checkpointing", "1", "2", "fits", "does not"))


def test_a_recipe_as_commands(monkeypatch, capsys):
    """Every stage's, with its options; what is assumed; fewer pairs at once, and bfloat16, where else nothing fits."""
    monkeypatch.setattr(recipe, "job", toy)
    recipe.main(recipe.Config(gpus=1, gpu_gib=60.0))
    out = capsys.readouterr().out
    lines = [line for line in out.replace("\\\n", "").splitlines() if line.startswith("python ")]
    assert [line.split()[1] for line in lines] == [*(f"{name}.py" for name in recipe.OPTIONS), "-m"]
    assert "#   a toy" in out and "--micro_batch 1" in lines[1] and "--shard_size 4" in lines[3]
    assert "--shard_size" not in recipe.choose("make_pairs", "1.3b", cost.Machine(gpu_gib=100.0)).options
    refused("1.3b does not fit one GPU of 12 GiB", recipe.main, recipe.Config(gpus=1, gpu_gib=12.0))
    assert recipe.start_of(cost.Machine(gpus=8)) == "torchrun --nproc_per_node 8"
    assert recipe.start_of(cost.Machine(gpus=16)).startswith("torchrun --nnodes 2 --nproc_per_node 8 ")
    refused("--gpus 12: expected a multiple of --node 8", recipe.start_of, cost.Machine(gpus=12))
    refused("--gpus: expected a divisor of 32, sft.py's batch, got 7", recipe.main, recipe.Config(gpus=7))
    refused("--gpus: expected a divisor of 16, continuation.py's batch, got 32", recipe.main, recipe.Config(gpus=32))
    wide = dict(weights=0, trained=0, blocks=0, block=0, flop=0, file=0)

    def by_dtype(name, preset, machine, options, look):
        count = wide | dict(activations=(9 if "bfloat16" in options else 12) * 2**30)
        return dataclasses.replace(toy(name, preset, machine, "", look), turns={"VAE": count})

    monkeypatch.setattr(recipe, "job", by_dtype)
    chosen = [recipe.choose("prepare", "1.3b", cost.Machine(gpus=1, gpu_gib=gib)) for gib in (16.0, 14.0)]
    assert [one.options for one in chosen] == ["", "--dtype bfloat16"]


@pytest.mark.parametrize("held", rounding.HELD[1:])
def test_eight_bits_by_row(held):
    """Off by half of a step at most: of 127 a row, or of an eighth of the number's own power of two."""
    weight = torch.randn(64, 256) * torch.logspace(-3, 3, 64)[:, None]
    most, off = weight.abs().amax(1, keepdim=True), (rounding.by_row(weight, held) - weight).abs()
    scaled = weight.abs() * 448 / most
    floats = (2.0 ** scaled.log2().floor() / 8).clamp(min=2.0**-9) * most / 448
    step = most / 127 if held == torch.int8 else floats
    assert (off <= 0.501 * step).all() and off.any()


def test_the_folder_says_how_its_model_attends(chain, tmp_path):
    """A folder that is not made yet is the preset's, and without one it is the base that continues clips. One that is
    damaged is named.
    """
    header = read_header(chain / "continuation/lora.safetensors")["attention"]
    for folder, attention in ((str(chain / "continuation"), header), ("nowhere", "prefix"), ("", "full")):
        assert cost.attention(make_pairs.Config(continuation=folder)) == attention
    (tmp_path / "lora.safetensors").write_text("damaged")
    refused("lora.safetensors: expected a LoRA's header", cost.attention, make_pairs.Config(continuation=str(tmp_path)))


def test_continuing_is_counted_for_sample(tmp_path):
    """Whole forwards, fewest operations where half of the frames are given; both branches at once."""
    (tmp_path / "clip.mp4").touch()
    given = f"--preset 1.3b --prompt any --nfe 4 --frames 13 --video {tmp_path / 'clip.mp4'} --continuation nowhere"
    options = [f"{given} --n_cond {more}" for more in ("2", "2 --guidance 1", "1")]
    jobs = [cost.job_of("sample", parse(sample.Config, words.split(), ""), cost.Machine()) for words in options]
    decoder = cost.measure(vae.VAE, lambda net: net.decode(torch.empty(1, 16, 4, 36, 64)))["flop"]
    two, alone, one = (job.flop - decoder for job in jobs)
    assert two == 2 * alone < one and jobs[0].gathers == 4


def test_as_a_program(tmp_path):
    """A stage's options follow its name. What a run refuses is refused, and so is the tiny preset."""
    run = functools.partial(script, "-m", "experiments.cost", cwd=tmp_path, PYTHONPATH=str(ROOT))
    done = run("make_pairs", "--preset", "1.3b", "--shard-size=2", "--gpus=1")
    assert done.returncode == 0 and "2 at once" in done.stdout, done.stderr
    done = run("label")
    assert done.returncode == 2 and done.stderr.startswith("error: expected a stage, prepare, "), done.stderr
    for wrong in (dict(layers="some"), dict(rank=0), dict(preset="3b"), dict(batch_size=12), dict(preset="tiny")):
        with pytest.raises(UserError):
            cost.main("continuation", cost.options_of("continuation")(**{"preset": "1.3b"} | wrong))


def test_shards_that_exist_decide(chain, tmp_path, monkeypatch):
    """Shape and number of the latents come from --data if they are of the preset, and are assumed if they are not.

    Nothing is hashed for it, which would take many minutes.
    """
    monkeypatch.delattr(files, "fingerprint")
    data = str(copy(chain, tmp_path, "shards") / "shards")
    assert cost.latents(data, "x0")[:2] == (cost.SHAPE, cost.CLIPS["align"])
    monkeypatch.setattr(cost, "SHAPE", (28, 13, 1, 1))
    shape, count, assumed = cost.latents(data, "x0")
    assert shape == (28, 13, 1, 1) and 70 < count <= 80 and not assumed


def test_a_million_clips_in_small(tmp_path):
    """bench.million measures every step with the functions that the stages call, and leaves no file."""
    done = script("-m", "bench.million", "--clips=40", "--size=4", PYTHONPATH=str(ROOT), TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    steps = [line.split(":")[0].split()[0] for line in done.stdout.splitlines()]
    read = ["Shards", "Shards", "batch_order", "Shards.get"]
    assert steps == ["write_shard", "collect", "write_manifest", *read, "prepare.read_items"]
    assert "10 shards of 4" in done.stdout and "22 files" in done.stdout and not list(tmp_path.iterdir())

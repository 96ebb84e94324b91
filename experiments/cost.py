"""What a run will cost, before anything is loaded: operations and memory, counted, and hours, predicted.

    python -m experiments.cost asymdpo --preset 14b --checkpointing --micro_batch 2          the stage's own options
    python -m experiments.cost prepare | sft | continuation | make_pairs | sample --preset 1.3b
    WORLD_SIZE=16 python -m experiments.cost …                                               16 GPUs in place of 8

It needs no GPU, no weights and no clips. Where the stage's input exists, its number of samples and their size count.

The stage's network and loss run forward and backward on tensors without values. PyTorch's formulas
(torch.utils.flop_counter) add up matrix products, convolutions and attention. Memory is the most that is alive at once;
the Triton kernels allocate and keep what they do on a GPU, but are not launched. All blocks of the DiT cost the same,
so two nets, of two and of three blocks, give the cost of any depth exactly.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import importlib
import os
import sys
import types
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import model
from kernels import modulate, norm_rope, region_dpo
from runtime.group import Group, local_batch
from runtime.options import UserError, program, resolve
from runtime.shards import Shards
from wan import text, vae

GROUP = Group(size=int(os.environ.get("WORLD_SIZE", 8)))
# FLOP/s, dense: NVIDIA's data sheet of the A100 80GB, from which the A800 differs in its NVLink only. TF32 is what
# cuDNN's convolutions run float32 in, unless told otherwise.
PEAK = {"bfloat16": 312e12, "float32": 19.5e12, "TF32": 156e12}
# Assumed. Megatron-LM reports 43 … 52 % (Narayanan et al. 2021, arXiv 2104.04473, table 1), with larger products.
UTILISATION = 0.40
MEMORY, RESERVE = 80, 4  # GiB of an A800-80GB; the reserve is for CUDA, NCCL and fragmentation, which are not counted
SHAPE = (16, 13, 36, 64)  # of the latent of 49 frames of 288 x 512
CLIPS = 20_000  # assumed where the input does not exist: the paper's number of pairs, as its readers report it


# In place, as model.Linear adds to its low-rank terms, PyTorch has no formula for the same product.
flop_registry.setdefault(torch.ops.aten.addmm_, flop_registry[torch.ops.aten.addmm])


# ---- counting --------------------------------------------------------------------------------------------------------


class Count(TorchDispatchMode):
    """Counts what runs under it: FLOP; bytes alive `now`, and at their `peak`.

    FlopCounterMode gives the same FLOP, but it keeps alive what checkpointing frees.
    """

    def __init__(self):
        super().__init__()
        self.flop = self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs := kwargs or {}))
        if formula := flop_registry.get(func.overloadpacket):
            self.flop += formula(*args, **kwargs, out_val=out)
        given = {a.untyped_storage()._cdata for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
        for storage in (a.untyped_storage() for a in tree_leaves(out) if isinstance(a, Tensor)):
            if storage._cdata not in given | self._alive:
                self._alive.add(storage._cdata)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return out

    def _free(self, key: int, size: int) -> None:
        self._alive.remove(key)
        self.now -= size


@contextlib.contextmanager
def valueless():
    """Within it the model runs on the meta device, where tensors have no values, and takes a GPU's paths: the kernels'
    autograd functions run without launching, and attention is CUDA's flash kernel.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    changes = {
        (F, "scaled_dot_product_attention"): lambda q, k, v: flash(q, k, v)[0],
        (torch.compiler, "is_compiling"): lambda: True,  # then the kernels check shapes, and do not look at values
        (torch, "autocast"): lambda *args, **options: contextlib.nullcontext(),  # the meta device has none
        (torch, "rand"): lambda *size, generator: torch.empty(size),  # model.add_lora's generator is the CPU's
    }
    nothing = collections.defaultdict(lambda: lambda *args, **options: None)  # nothing[grid](…)
    triton = types.SimpleNamespace(cdiv=lambda a, b: -(-a // b), next_power_of_2=lambda n: 1 << (n - 1).bit_length())
    for module in (modulate, norm_rope, region_dpo):
        changes |= {(module, "implementation"): lambda device: "triton", (module, "triton"): triton}
        changes |= {(module, name): nothing for name in vars(module) if name.endswith("_kernel")}
    with contextlib.ExitStack() as stack, torch.device("meta"):
        for place, value in changes.items():
            stack.callback(setattr, *place, getattr(*place))
            setattr(*place, value)
        yield


def measure(build: Callable[[], nn.Module], call: Callable[[nn.Module], Tensor], train: bool = False) -> dict[str, int]:
    """Counts call(build()), and if `train` its backward: `flop`, and in bytes the frozen `weights`; the trained ones
    with their gradients and Adam's two moments, `trained`; `activations`, the most that all the rest takes at once.
    """
    with valueless(), torch.set_grad_enabled(train):
        net = build()
        trained = [p for p in net.parameters() if p.requires_grad and train]
        for p in trained:
            p.grad = torch.empty_like(p)
        with Count() as count:
            out = call(net)
            if train:
                out.sum().backward()
    every, trained = (sum(p.nbytes for p in parameters) for parameters in (net.parameters(), trained))
    return {"flop": count.flop, "weights": every - trained, "trained": 4 * trained, "activations": count.peak}


def in_bfloat16(net: model.DiT) -> model.DiT:
    return model.cast(net, torch.bfloat16)


def measure_dit(preset: str, shape, batch: int, call: Callable, build: Callable = in_bfloat16, train=False):
    """`measure` of a DiT. call(net, x0, text, noise, t) with x0 and noise (batch, *shape); build(DiT) -> net."""
    config = model.PRESETS[preset]

    def on_batch(net):
        x0, noise = torch.empty(2, batch, *shape)
        return call(net, x0, torch.empty(batch, config.text_len, config.text_dim), noise, torch.empty(batch))

    def of_depth(layers: int) -> dict[str, int]:
        return measure(lambda: build(model.DiT(dataclasses.replace(config, num_layers=layers))), on_batch, train)

    two, three = of_depth(2), of_depth(3)
    return {key: two[key] + (config.num_layers - 2) * (three[key] - two[key]) for key in two}


def measure_vae(cfg, call: Callable[[vae.VAE], Tensor]) -> dict[str, int]:
    return measure(lambda: vae.VAE().to(getattr(torch, cfg.dtype)), call)


def measure_text() -> dict[str, int]:
    """`measure` of UMT5 on a caption of 100 tokens."""
    return measure(lambda: text.UMT5().bfloat16(), lambda net: net(*torch.ones(2, 1, 100, dtype=torch.int64)))


def memory(count: dict[str, int]) -> float:
    """GiB in all."""
    return (count["weights"] + count["trained"] + count["activations"]) / 2**30


def together(*counts: dict[str, int]) -> dict[str, int]:
    """The counts of networks that are in memory together and run one after the other."""
    return {key: (max if key == "activations" else sum)(count[key] for count in counts) for key in counts[0]}


# ---- the stages: what is done, the number of samples, a GPU's FLOP/s, the counts with a sample's flop ----------------


def latents(folder: str, field: str, split: str | None = None) -> tuple[tuple[int, ...], int, str]:
    """Shape and number of the latents in a folder of shards, or SHAPE and CLIPS if none is Wan's; and words."""
    shards = Shards(folder, "prepare.py or make_pairs.py", split) if Path(folder).is_dir() else None
    if shards and shards.shape(field)[0] == SHAPE[0]:
        return shards.shape(field), len(shards), f"{len(shards):,} latents {shards.shape(field)} in {folder}"
    return SHAPE, CLIPS, f"latents {SHAPE} assumed, as there are none of Wan's in {folder}"


def loss(stage, cfg, net: model.DiT, x0: Tensor, *batch: Tensor) -> Tensor:
    """The loss (B,) of a stage that trains; batch: text, noise, t."""
    if stage.__name__ == "sft":
        return stage.flow_loss(net, x0, *batch)
    if stage.__name__ == "continuation":
        return stage.continuation_loss(net, x0, *batch, torch.zeros(len(x0), x0.shape[2], dtype=torch.bool))
    n = torch.zeros(len(x0), dtype=torch.int64)
    return stage.asymdpo_loss(cfg, stage.predict(net, x0, x0.clone(), *batch), n, n)[0]


def training(stage, cfg):
    """sft.py, continuation.py and asymdpo.py."""
    pairs = stage.__name__ == "asymdpo"
    shape, _, known = latents(cfg.pairs, "chosen") if pairs else latents(cfg.data, "x0", cfg.split)

    def build(net: model.DiT) -> model.DiT:
        model.cast(net, torch.bfloat16 if cfg.rank else torch.float32).gradient_checkpointing = cfg.checkpointing
        if cfg.rank:
            model.add_lora(net, cfg.rank, cfg.rank, cfg.layers)
        if getattr(cfg, "prompts", "off") != "off":
            model.add_task_prompt(net, shape[1], cfg.prompts)
        return net

    size, call = local_batch(cfg, GROUP)[1], functools.partial(loss, stage, cfg)
    count = measure_dit(cfg.preset, shape, size, call, build, train=True)
    work = f"{cfg.steps:,} steps of {cfg.batch_size} {'pairs' if pairs else 'clips'}, {size} a forward; {known}"
    peak = PEAK["bfloat16" if cfg.rank else "float32"]
    return work, cfg.steps * cfg.batch_size, peak, count | {"flop": count["flop"] / size}


def sampling(cfg, shape: tuple[int, ...], known: str, samples: float, batch: int, given: bool):
    """make_pairs.py and sample.py: `batch` samples at once; given: some of their frames are given."""

    def call(net, x0, text, noise, t):
        return net(x0, t, text, torch.empty(len(x0), shape[1], dtype=torch.bool) if given else None)

    forwards, count = cfg.nfe * (1 if cfg.guidance == 1 else 2), measure_dit(cfg.preset, shape, batch, call)
    work = f"{samples:,.0f} samples of {forwards} forwards, {batch} at once; {known}"
    return work, samples, PEAK["bfloat16"], count | {"flop": forwards * count["flop"] / batch}


def make_pairs(stage, cfg):
    shape, clips, known = latents(cfg.data, "x0", cfg.split)
    least, most = stage.windows(cfg, shape[1])[2:]
    whole = (most == shape[1]) / (most - least + 1)  # the share of winners that are the clip itself, and not sampled
    return sampling(cfg, shape, known, (cfg.clips or clips) * (2 - whole), cfg.shard_size, given=True)


def sample(stage, cfg):
    stage.check(cfg)
    samples = cfg.samples * (len(stage.read_prompts(cfg)) if cfg.prompt or cfg.prompts else 1)
    shape = (SHAPE[0], stage.latent_frames(cfg), cfg.height // vae.VAE.side, cfg.width // vae.VAE.side)
    *found, network = sampling(cfg, shape, f"latents {shape}", samples, 1, given=bool(cfg.continuation))
    both = together(network, measure_vae(cfg, lambda net: net.decode(torch.empty(1, *shape))))
    most = max(both, measure_text(), key=memory)  # the text encoder is gone before the network comes
    return *found, most | {"flop": both["flop"]}


def prepare(stage, cfg):
    clips = cfg.clips * len(stage.read_items(cfg)[0]) if Path(cfg.videos).is_dir() else CLIPS
    encoder = measure_vae(cfg, lambda net: net.encode(torch.empty(1, 3, cfg.frames, cfg.height, cfg.width)))
    latent = (SHAPE[0], (cfg.frames - 1) // 4 + 1, cfg.height // vae.VAE.side, cfg.width // vae.VAE.side)
    shown = measure_vae(cfg, lambda net: net.decode(torch.empty(1, *latent)))  # a few clips, for kept.png
    encoder["activations"] = max(encoder["activations"], shown["activations"])
    work = f"{clips:,} clips of {cfg.frames} x {cfg.height} x {cfg.width}, with captions of 100 tokens"
    return work, clips, PEAK["bfloat16" if cfg.dtype == "bfloat16" else "TF32"], together(encoder, measure_text())


STAGES = dict(
    prepare=prepare, sft=training, continuation=training, make_pairs=make_pairs, asymdpo=training, sample=sample
)


def main(name: str, cfg) -> None:
    """Prints what a stage costs: name is a key of STAGES, cfg the stage's Config. UserError for the tiny preset."""
    stage = importlib.import_module(name)
    if cfg.preset == "tiny":
        raise UserError("--preset: expected 1.3b or 14b, got tiny, which runs on a CPU")
    cfg = resolve(cfg, stage.PRESETS)
    work, number, peak, count = STAGES[name](stage, cfg)
    parts = ", ".join(f"{part} {count[part] / 2**30:.1f}" for part in ("weights", "trained", "activations"))
    fits = "fits" if memory(count) <= MEMORY - RESERVE else "does NOT fit"
    hours = number * count["flop"] / (UTILISATION * peak) / 3600
    print(f"{name} --preset {cfg.preset} on {GROUP.size} x A800-80GB: {work}")
    print(f"  operations   {count['flop'] / 1e12:,.1f} TFLOP each")
    print(f"  GiB a GPU    {memory(count):.1f}: {parts}; {fits} in {MEMORY - RESERVE}, which CUDA and NCCL leave")
    print(
        f"  GPU-hours    {hours:,.2f}, in {hours / GROUP.size:,.2f} hours: predicted, without files, at "
        f"{100 * UTILISATION:g} % of {peak / 1e12:g} TFLOP/s"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    name = parser.parse_args(sys.argv[1:2]).stage
    sys.argv[:2] = [f"experiments.cost {name}"]
    program(functools.partial(main, name), importlib.import_module(name).Config, __doc__)

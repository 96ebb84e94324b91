"""What a run will cost, before anything is loaded: operations, memory and bytes, counted, and hours, predicted.

    python -m experiments.cost asymdpo --preset 14b --checkpointing --micro_batch 2          the stage's own options
    python -m experiments.cost prepare | sft | continuation | make_pairs | sample --preset 1.3b
    python -m experiments.cost … --gpus 1 --gpu_gib 24 --tflops 165         another machine than 8 x A800-80GB
    python -m experiments.cost … --gpus 32 --node 8                         four nodes of 8

It needs no GPU, no weights and no clips. Where the stage's input exists, its number of samples and their size count;
what is assumed in its place is said, as all that is assumed. What --preview_every loads is not counted.
experiments/recipe.py chooses options by these counts. docs/scale.md has the tables for both presets
(experiments/scale.py makes them) and the source of each assumption.

The stage's network and loss run forward and backward on tensors without values. PyTorch's formulas
(torch.utils.flop_counter) add up matrix products, convolutions and attention. Memory is the most that is alive at once;
the Triton kernels allocate and keep what they do on a GPU, but are not launched. All blocks of the DiT cost the same,
so two nets, of two and of three blocks, give the cost of any depth exactly.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib
import math
import sys
import types
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import continuation
import model
from kernels import modulate, norm_rope, region_dpo
from make_pairs import guided_steps, windows
from runtime.dataset import Folder
from runtime.files import csv_rows
from runtime.group import Group, local_batch
from runtime.options import UserError, option, program, resolve
from runtime.pairs import COLUMNS, folder_rows
from runtime.shards import Shards
from wan import text, vae
from wan.lora import read_header

# FLOP/s, dense: NVIDIA's data sheet of the A100 80GB, from which the A800 differs in its NVLink only. TF32 is what
# cuDNN's convolutions run float32 in, unless told otherwise. Another GPU is assumed to have these proportions.
PEAK = {"bfloat16": 312e12, "float32": 19.5e12, "TF32": 156e12}
# Assumed. Megatron-LM reports 43 … 52 % (Narayanan et al. 2021, arXiv 2104.04473, table 1), with larger products.
UTILISATION = 0.40
RESERVE = 4  # GiB of a GPU for CUDA, NCCL and fragmentation, which are not counted
# bytes/s that a GPU sends to its node: the A800's NVLink has 400 GB/s, half of it each way, and NCCL's protocol takes
# about 20 % (github.com/NVIDIA/nccl-tests, issue 212)
NVLINK = 0.8 * 200e9
# bytes/s that a node sends: assumed, one port of 200 Gb/s InfiniBand, of which NVIDIA's DGX A100 has eight; as above
NETWORK = 0.8 * 25e9
# FSDP2 holds the block in use and the buffer of one all-gather (torch 2.13, _fsdp_param_group.py, wait_for_unshard)
GATHERED = 2
SHAPE = (16, 13, 36, 64)  # of the latent of 49 frames of 288 x 512
# assumed where the input does not exist: the paper's clips for the continuation model and for pairs, as its readers
# report them
CLIPS = {"train": 80_000, "align": 20_000}
# bytes/s that the job reads: assumed, Amazon's FSx for Lustre with 8 TiB at 250 MB/s/TiB (of 125 … 1000 that it offers)
DISK = 2e9
TOKENS = 100  # of a caption, assumed
TEXT = TOKENS * 4096 * 2  # bytes of its states, as text.TextEncoder gives them in bfloat16
# options of a stage that trains which change nothing of a forward and backward
BESIDE = ("base", "data", "sft", "pairs", "split", "out", "steps", "batch_size", "micro_batch", "shard")


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


def measure(
    build: Callable[[], nn.Module], call: Callable[[nn.Module], Tensor], train: bool = False, stored: int = 4
) -> dict[str, int]:
    """Counts call(build()), and if `train` its backward: `flop`, and in bytes the frozen `weights`; the trained ones
    with their gradients and Adam's two moments, `trained`; `activations`, the most that all the rest takes at once.
    Of the weights, those in a DiT's `blocks`, which --shard splits, and in one `block`; `file`: what all weights take
    as they are published, in numbers of `stored` bytes.
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

    def frozen(part: nn.Module, stored: int = 0) -> int:
        return sum(stored * p.numel() or p.nbytes for p in part.parameters() if not (train and p.requires_grad))

    blocks = [frozen(block) for block in net.blocks] if isinstance(net, model.DiT) else [0]
    return {
        "flop": count.flop,
        "weights": frozen(net),
        "trained": 4 * sum(p.nbytes for p in trained),
        "activations": count.peak,
        "blocks": sum(blocks),
        "block": blocks[0],
        "file": frozen(net, stored),
    }


def in_bfloat16(net: model.DiT) -> model.DiT:
    return model.cast(net, torch.bfloat16)


def measure_dit(
    preset: str,
    shape,
    batch: int,
    call: Callable,
    build: Callable = in_bfloat16,
    train=False,
    given: Sequence[int] = (),
):
    """`measure` of a DiT. call(net, x0, text, noise, t) with x0 and noise (batch, *shape); build(DiT) -> net.

    given: of each clip, the given frames, which prefix attention cannot read off a mask without values.
    """
    config = model.PRESETS[preset]
    mask = torch.arange(shape[1]) < torch.tensor(given or (0,) * batch)[:, None]

    def on_batch(net):
        x0, noise = torch.empty(2, batch, *shape)
        net._given_tokens = lambda _, tokens: model.DiT._given_tokens(net, mask, tokens)
        return call(net, x0, torch.empty(batch, config.text_len, config.text_dim), noise, torch.empty(batch))

    def of_depth(layers: int) -> dict[str, int]:
        return measure(lambda: build(model.DiT(dataclasses.replace(config, num_layers=layers))), on_batch, train)

    two, three = of_depth(2), of_depth(3)
    return {key: two[key] + (config.num_layers - 2) * (three[key] - two[key]) for key in two}


@functools.cache
def measure_vae(dtype: str, way: str, *size: int) -> dict[str, int]:
    """`measure` of the VAE's `encode` or `decode` of one video, or latents, of this size."""
    return measure(lambda: vae.VAE().to(getattr(torch, dtype)), lambda net: getattr(net, way)(torch.empty(1, *size)))


@functools.cache
def measure_text() -> dict[str, int]:
    """`measure` of UMT5 on a caption."""
    call = lambda net: net(*torch.ones(2, 1, TOKENS, dtype=torch.int64))  # noqa: E731
    return measure(lambda: text.UMT5().bfloat16(), call, stored=2)


@functools.cache
def measure_forward(preset: str, shape: tuple[int, ...], batch: int) -> dict[str, int]:
    """`measure` of the text-to-video model's velocity of latents (batch, *shape)."""
    return measure_dit(preset, shape, batch, lambda net, x0, text, noise, t: net(x0, t, text))


def memory(count: dict[str, int], ways: int = 1) -> float:
    """GiB on a GPU; ways: the GPUs that --shard splits the blocks' frozen weights over."""
    weights = count["weights"]
    if ways > 1:
        weights += count["blocks"] / ways - count["blocks"] + GATHERED * count["block"]
    return (weights + count["trained"] + count["activations"]) / 2**30


def together(*counts: dict[str, int]) -> dict[str, int]:
    """The counts of networks that are in memory together and run one after the other."""
    return {key: (max if key == "activations" else sum)(count[key] for count in counts) for key in counts[0]}


# ---- the stages ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a stage runs on."""

    gpus: int = option(8, least=1)  # GPUs in all
    node: int = option(8, least=1)  # GPUs of a node, at most
    gpu_gib: float = option(80.0, above=RESERVE)  # GiB of a GPU, of which 4 are left to CUDA and NCCL
    tflops: float = option(312.0, above=0)  # a GPU's peak in bfloat16, dense, TFLOP/s

    @property
    def ways(self) -> int:
        """GPUs that --shard splits the blocks over: a node's, so that gradients alone leave it."""
        return min(self.gpus, self.node)

    @property
    def room(self) -> float:
        """GiB of a GPU that a run can have."""
        return self.gpu_gib - RESERVE

    def fits(self, gib: float) -> bool:
        return gib <= self.room

    def peak(self, dtype: str) -> float:
        """FLOP/s of products in bfloat16, TF32 or float32."""
        return 1e12 * self.tflops * PEAK[dtype] / PEAK["bfloat16"]

    @property
    def assumed(self) -> list[str]:
        """What nobody gave, in words; a value that is the default counts as not given."""
        words = {
            "gpus": f"{self.gpus} GPUs",
            "node": f"{self.ways} of them a node" * (self.gpus > 1),
            "gpu_gib": f"{self.gpu_gib:g} GiB of a GPU",
            "tflops": f"{self.tflops:g} TFLOP/s of it in bfloat16",
        }
        default = {field.name for field in dataclasses.fields(Machine) if getattr(self, field.name) == field.default}
        unset = [name for name in words if words[name] and name in default]
        like = f"as of 8 x A800-80GB; change with {', '.join('--' + name for name in unset)}"
        own = [f"{', '.join(words[name] for name in unset)}: {like}"] if unset else []
        own += [f"{100 * UTILISATION:g} % of that peak are reached", f"{RESERVE} GiB are left to CUDA and NCCL"]
        if self.gpus > 1:
            own += [f"a GPU sends {NVLINK / 1e9:g} GB/s in its node (an A800's NVLink)"]
        return own + [f"a node sends {NETWORK / 1e9:g} GB/s"] * (self.gpus > self.node)

    def __str__(self) -> str:
        nodes = f", {self.node} a node" if self.gpus > self.node else ""
        return f"{'one GPU' if self.gpus == 1 else f'{self.gpus} GPUs'} of {self.gpu_gib:g} GiB{nodes}"


@dataclasses.dataclass(frozen=True)
class Job:
    """A stage on a machine. A step is one of the optimiser's, and elsewhere one batch on each GPU."""

    work: str  # what is done, in words
    assumed: list[str]  # what is not known of it, in words
    machine: Machine
    samples: float  # in all
    share: int  # a GPU's samples of a step
    batch: int  # of these, at once
    gathers: int  # times that such a batch needs every block, which --shard has to gather
    flop: float  # of a sample
    peak: float  # FLOP/s
    turns: dict[str, dict[str, int]]  # as `measure`: the networks that are in memory by turns, the DiT last
    read: float = 0  # bytes of a sample's files
    inputs: int = 0  # different samples in the files

    def gib(self, shard: bool = False) -> float:
        """GiB of a GPU."""
        return max(memory(count, self.machine.ways if shard else 1) for count in self.turns.values())

    @property
    def weights(self) -> int:
        """Bytes of weights to read at the start, as published. Every process reads them, from a node's cache."""
        return sum(count["file"] for count in self.turns.values())

    @property
    def data(self) -> float:
        """Bytes of the input's shards, which are hashed once."""
        return self.inputs * self.read

    @property
    def summed(self) -> float:
        """Bytes that a GPU sends for the sum of a step's float32 gradients, by a ring: 2 (n − 1) / n of their size.

        A node sends as many to other nodes.
        """
        gpus = self.machine.gpus
        return 2 * (gpus - 1) / gpus * self._network["trained"] / 4

    @property
    def gathered(self) -> float:
        """Bytes that a GPU sends in a step with --shard, for others to gather the blocks' weights."""
        ways = self.machine.ways
        return self.share / self.batch * self.gathers * (ways - 1) / ways * self._network["blocks"]

    @property
    def _network(self) -> dict[str, int]:
        return list(self.turns.values())[-1]

    @property
    def seconds(self) -> dict[str, float]:
        """Of a step, predicted: `computing`, `summing` after it, and with --shard `gathering` meanwhile."""
        link = NVLINK if self.machine.gpus == self.machine.ways else min(NVLINK, NETWORK)
        computing = self.share * self.flop / (UTILISATION * self.peak)
        return {"computing": computing, "summing": self.summed / link, "gathering": self.gathered / NVLINK}

    def hours(self, shard: bool = False) -> float:
        """Predicted, without files. Computing does not wait for blocks that arrive sooner than it is done."""
        s = self.seconds
        step = max(s["computing"], s["gathering"] * shard) + s["summing"]
        return self.samples / (self.machine.gpus * self.share) * step / 3600


def latents(folder: str, field: str, split: str | None = None) -> tuple[tuple[int, ...], int, list[str]]:
    """Shape and number of the latents in a folder of shards; or SHAPE and CLIPS if none is Wan's, which is said."""
    made = Path(folder).is_dir()
    shards = Shards(folder, "prepare.py, prepare.py --pairs or make_pairs.py", split, hashed=False) if made else None
    if shards and shards.shape(field)[0] == SHAPE[0]:
        return shards.shape(field), len(shards), []
    count = CLIPS.get(split, CLIPS["align"])
    return SHAPE, count, [f"{count:,} {split or 'pairs of'} latents {SHAPE}, as there are none of Wan's in {folder}"]


def loss(stage, cfg, net: model.DiT, x0: Tensor, *batch: Tensor) -> Tensor:
    """The loss (B,) of a stage that trains; batch: text, noise, t."""
    if stage.__name__ == "sft":
        return stage.flow_loss(net, x0, *batch)
    if stage.__name__ == "continuation":
        return stage.continuation_loss(net, x0, *batch, torch.zeros(len(x0), x0.shape[2], dtype=torch.bool))
    n = torch.zeros(len(x0), dtype=torch.int64)
    return stage.asymdpo_loss(cfg, stage.predict(net, x0, x0.clone(), *batch), n, n)[0]


def train(stage, cfg, shape: tuple[int, ...], size: int) -> dict[str, float]:
    """`measure` of training on clips or pairs (size, *shape) at once; `flop` of one, on average over n_cond."""
    unset = {field.name: field.default for field in dataclasses.fields(cfg) if field.name in BESIDE}
    step = functools.partial(train_step, stage, dataclasses.replace(cfg, **unset), shape)
    each = tuple(range(1, shape[1]))  # n_cond ~ U{1 … F−1}; which matters to continuation.py alone, not to memory
    count = step(each[:1] * size)
    flop = step(each)["flop"] / len(each) if stage.__name__ == "continuation" else count["flop"] / size
    return count | {"flop": flop}


@functools.cache
def train_step(stage, cfg, shape: tuple[int, ...], given: tuple[int, ...]) -> dict[str, int]:
    """`measure` of training on clips or pairs at once, each with so many given frames."""

    def build(net: model.DiT) -> model.DiT:
        in_half = cfg.rank and cfg.preset != "tiny"  # tiny: as the demo runs, on a CPU
        model.cast(net, torch.bfloat16 if in_half else torch.float32).gradient_checkpointing = cfg.checkpointing
        if cfg.rank:
            model.add_lora(net, cfg.rank, cfg.rank, cfg.layers)
        if getattr(cfg, "prompts", "off") != "off":
            model.add_task_prompt(net, shape[1], cfg.prompts)
        net.prefix = getattr(cfg, "attention", "full") == "prefix"
        return net

    return measure_dit(cfg.preset, shape, len(given), functools.partial(loss, stage, cfg), build, True, given)


def training(stage, cfg, machine: Machine) -> Job:
    """sft.py, continuation.py and asymdpo.py."""
    pairs = stage.__name__ == "asymdpo"
    shape, clips, assumed = latents(cfg.pairs, "chosen") if pairs else latents(cfg.data, "x0", cfg.split)
    share, size = local_batch(cfg, Group(size=machine.gpus))
    count = train(stage, cfg, shape, size)
    return Job(
        f"{cfg.steps:,} steps of {cfg.batch_size} {'pairs' if pairs else 'clips'} {shape}, {size} a forward",
        assumed,
        machine,
        samples=cfg.steps * cfg.batch_size,
        share=share,
        batch=size,
        gathers=2 + pairs,  # forward, backward (recomputation within it) and a pair's reference
        flop=count["flop"],
        peak=machine.peak("bfloat16" if cfg.rank else "float32"),
        turns={"network": count},
        read=TEXT + (1 + pairs) * 4 * math.prod(shape),  # float32 latents
        inputs=clips,
    )


def attention(cfg) -> str:
    """Of the model that continues clips: its folder tells, before it is made the preset; the base itself has full."""
    if not cfg.continuation:
        return "full"
    lora, made = Path(cfg.continuation) / "lora.safetensors", continuation.PRESETS[cfg.preset]["attention"]
    return read_header(lora).get("attention", "full") if lora.is_file() else made


@functools.cache
def continuing(preset: str, shape: tuple[int, ...], attend: str, n: int, batch: int, plain: bool):
    """Continuing a clip of this shape from n given frames, so many at once: a clip's operations of making a
    model.Continuation, those of calling it, and `measure` of both; plain: 0, a whole forward's, and of that.
    """

    def build(net: model.DiT) -> model.DiT:
        net.prefix = attend == "prefix"
        return in_bfloat16(net)

    def make(net, x0, text, noise, t):
        return net if plain else model.Continuation(net, x0, text, n)

    def call(net, x0, text, noise, t):
        return make(net, x0, text, noise, t)(x0, t, text, torch.empty(batch, shape[1], dtype=torch.bool))

    made, both = (measure_dit(preset, shape, batch, run, build, given=(n,) * batch) for run in (make, call))
    return made["flop"] / batch, (both["flop"] - made["flop"]) / batch, both


def pair(cfg, shape: tuple[int, ...], attend: str) -> dict[str, float]:
    """`measure` of one of make_pairs.py's pairs of clips of this shape; `flop` is on average over N1 and N2, the sum
    of `keys`, which are made once, and of the steps of `losers` and `winners`. Memory is that of the worst batch: a
    shard whose clips all have the same N, that which takes most.
    """
    low1, high1, low2, high2 = windows(cfg, shape[1])
    plain, branches = cfg.plain or cfg.shard, 1 + (cfg.guidance != 1)
    calls = cfg.nfe + guided_steps(cfg)
    parts, counts = {"keys": 0, "losers": 0, "winners": 0}, []
    for side, low, high in (("losers", low1, high1), ("winners", low2, high2)):
        for n in range(low, high + 1):
            if n < shape[1] or plain:  # else the clip itself
                seen = n if attend == "prefix" else 0  # with full attention all n are the same
                once, call, count = continuing(cfg.preset, shape, attend, seen, branches * cfg.shard_size, plain)
                parts["keys"] += branches * once / (high - low + 1)
                parts[side] += calls * call / (high - low + 1)
                counts.append(count)
    return max(counts, key=memory) | parts | {"flop": sum(parts.values())}


def make_pairs(stage, cfg, machine: Machine) -> Job:
    """--shard, like --plain, runs whole forwards; what runs without them does not say what --shard would take."""
    stage.check(cfg)
    shape, clips, assumed = latents(cfg.data, "x0", cfg.split)
    attend, pairs = attention(cfg), cfg.clips or clips
    if cfg.continuation and not Path(cfg.continuation).is_dir():
        assumed += [f"{attend} attention, the preset's, as there is no folder {cfg.continuation}"]
    count = pair(cfg, shape, attend)
    return Job(
        f"{pairs:,} pairs {shape} by {cfg.nfe} steps, with {attend} attention, {cfg.shard_size} at once",
        assumed,
        machine,
        samples=pairs,
        share=cfg.shard_size,
        batch=cfg.shard_size,
        gathers=2 * cfg.nfe if cfg.plain or cfg.shard else 0,
        flop=count["flop"],
        peak=machine.peak("bfloat16"),
        turns={"network": count},
        read=TEXT + 4 * math.prod(shape),
        inputs=pairs,
    )


def sample(stage, cfg, machine: Machine) -> Job:
    stage.check(cfg)
    listed = Path(cfg.prompts).is_file()
    samples = cfg.samples * (len(stage.read_prompts(cfg.prompts)) if listed else 1)
    shape = (SHAPE[0], stage.latent_frames(cfg), cfg.height // vae.VAE.side, cfg.width // vae.VAE.side)
    branches = 1 + (cfg.guidance != 1)  # one batch
    if cfg.continuation:
        count = continuing(cfg.preset, shape, attention(cfg), cfg.n_cond, branches, plain=True)[-1]
    else:
        count = measure_forward(cfg.preset, shape, branches)
    decoder = measure_vae(cfg.dtype, "decode", *shape)
    return Job(
        f"{samples:,} video{'s' * (samples > 1)} {shape} of {branches * cfg.nfe} forwards, one at once",
        [] if cfg.prompt or listed else [f"one prompt, as there is no {cfg.prompts or '--prompt'}"],
        machine,
        samples,
        share=1,
        batch=1,
        gathers=cfg.nfe,
        flop=cfg.nfe * count["flop"] + decoder["flop"],
        peak=machine.peak("bfloat16"),
        # the text encoder is gone before the others come
        turns={"text encoder": measure_text(), "network, VAE": together(count, decoder)},
    )


def to_encode(stage, cfg) -> tuple[int, str]:
    """Clips to encode, and the folder or table that is not there, for which as many are assumed."""
    paired = stage.wants_pairs(cfg)
    sources = [cfg.pairs] if cfg.pairs else [cfg.chosen, cfg.rejected] if paired else [cfg.videos]
    if missing := [path for path in sources if not Path(path).exists()]:
        return 2 * CLIPS["align"] if paired else sum(CLIPS.values()), missing[0]
    if not paired:
        return cfg.clips * len(stage.read_items(dataclasses.replace(cfg, bad_rows="reject"), talk=False)[0]), ""
    rows = csv_rows(Path(cfg.pairs), COLUMNS) if cfg.pairs else folder_rows(tuple(map(Folder, sources)))
    return 2 * sum(1 for _ in rows), ""


def prepare(stage, cfg, machine: Machine) -> Job:
    clips, missing = to_encode(stage, cfg)
    encoder = measure_vae(cfg.dtype, "encode", 3, cfg.frames, cfg.height, cfg.width)
    latent = (SHAPE[0], (cfg.frames - 1) // 4 + 1, cfg.height // vae.VAE.side, cfg.width // vae.VAE.side)
    shown = measure_vae(cfg.dtype, "decode", *latent)  # a few clips, for kept.png
    encoder = encoder | {"activations": max(encoder["activations"], shown["activations"])}
    count, dtype = together(encoder, measure_text()), "bfloat16" if cfg.dtype == "bfloat16" else "TF32"
    assumed = [f"{clips:,} clips, as there is no {missing}"] if missing else []
    assumed += [f"TF32, which cuDNN runs float32 in, has {PEAK['TF32'] / PEAK['bfloat16']:g} of bfloat16's peak"] * (
        dtype == "TF32"
    )
    return Job(
        f"{clips:,} clips of {cfg.frames} x {cfg.height} x {cfg.width}",
        assumed,
        machine,
        clips,
        share=1,
        batch=1,
        gathers=0,
        flop=count["flop"],
        peak=machine.peak(dtype),
        turns={"VAE, text encoder": count},
    )


STAGES = dict(
    prepare=prepare, sft=training, continuation=training, make_pairs=make_pairs, asymdpo=training, sample=sample
)


def job_of(name: str, cfg, machine: Machine) -> Job:
    """name is a key of STAGES, cfg the stage's Config. UserError for the tiny preset, and as the stage itself."""
    stage = importlib.import_module(name)
    if cfg.preset == "tiny":
        raise UserError("--preset: expected 1.3b or 14b, got tiny, which runs on a CPU")
    cfg, machine = resolve(cfg, stage.PRESETS), resolve(machine)
    if getattr(cfg, "shard", False) and machine.ways == 1:
        raise UserError("--shard: expected several GPUs of a node, got one alone; give --gpus, or leave --shard out")
    return STAGES[name](stage, cfg, machine)


# ---- in words --------------------------------------------------------------------------------------------------------


def digits(value: float) -> str:
    """Three digits that count, and no zero that stands for one which is not known."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}" if value else "0"


def size(gib: float) -> str:
    return f"{gib:,.1f} GiB" if gib >= 0.95 else f"{1024 * gib:,.0f} MiB"


def duration(seconds: float, of: str = "") -> str:
    """In hours, minutes or seconds, of which there is more than one. of: "GPU-", for GPU-hours."""
    unit, length = next((unit for unit in (("hours", 3600), ("minutes", 60)) if seconds > unit[1]), ("seconds", 1))
    return f"{digits(seconds / length)} {of}{unit}"


def parts(count: dict[str, int]) -> str:
    """What memory is for."""
    names = {"weights": "weights", "trained": "the LoRA with gradients and moments", "activations": "activations"}
    return ", ".join(f"{words} {size(count[part] / 2**30)}" for part, words in names.items() if count[part])


def report(name: str, preset: str, job: Job, shard: bool = False) -> str:
    """What a stage costs, and all that is assumed for it."""
    machine, seconds, took = job.machine, job.seconds, 3600 * job.hours(shard)
    whole, split = (
        f"{size(gib)} a GPU, which {'fits' if machine.fits(gib) else 'does NOT fit'} in {size(machine.room)}"
        for gib in (job.gib(), job.gib(True))
    )
    can_shard, trains = job.gathers and machine.ways > 1, bool(job.summed)
    lines = [("work", job.work), ("operations", f"{job.flop / 1e12:,.1f} TFLOP each"), ("memory", whole)]
    fits = machine.fits(job.gib(shard))
    lines += [("", "python -m experiments.recipe chooses options that fit")] if not fits else []
    lines += [("", f"{turn}: {parts(count)}") for turn, count in job.turns.items()]
    lines += [("--shard", f"{split}, the blocks over {machine.ways} GPUs")] if can_shard else []
    step = f"{duration(seconds['computing'])} of computing"
    step += f", then {duration(seconds['summing'])} to sum {job.summed / 1e9:.2f} GB of gradients" * trains
    gathers = f"; --shard sends {job.gathered / 1e9:,.1f} GB for {duration(seconds['gathering'])} meanwhile"
    lines += [("a step", f"{step}{gathers if can_shard else ''}: predicted")]
    of_all = f", {duration(machine.gpus * took, 'GPU-')}" * (machine.gpus > 1)
    lines += [("takes", f"{duration(took)}{of_all}: predicted, without files")]
    data = f", {job.data / 1e9:,.1f} GB of data" if job.data else ""
    lines += [("reads", f"{job.weights / 1e9:.1f} GB of weights{data}")]
    assumed = job.assumed + machine.assumed + [f"captions of {TOKENS} tokens"]
    lines += [("" if i else "assumed", words) for i, words in enumerate(assumed)]
    told = "".join(f"\n  {head:12} {words}" for head, words in lines)
    return f"{name} --preset {preset} on {machine}, {machine.tflops:g} TFLOP/s each{told}"


@functools.cache
def options_of(name: str) -> type:
    """A dataclass of a stage's options and a Machine's."""

    @dataclasses.dataclass(frozen=True)
    class Config(importlib.import_module(name).Config, Machine):
        pass

    return Config


def main(name: str, cfg) -> None:
    """Prints what a stage costs: name is a key of STAGES, cfg as `options_of`. UserError as `job_of`."""
    machine = Machine(**{field.name: getattr(cfg, field.name) for field in dataclasses.fields(Machine)})
    print(report(name, cfg.preset, job_of(name, cfg, machine), getattr(cfg, "shard", False)))


if __name__ == "__main__":
    name = (sys.argv[1:2] or ["nothing"])[0].removesuffix(".py")
    if name in ("-h", "--help"):
        print(__doc__)
    elif name not in STAGES:
        print(f"error: expected a stage, {', '.join(STAGES)}, got {name}", file=sys.stderr)
        sys.exit(2)
    else:
        sys.argv[:2] = [f"experiments.cost {name}"]
        program(functools.partial(main, name), options_of(name), __doc__, importlib.import_module(name).PRESETS)

"""What a run will cost, before anything is loaded: parameters, operations, memory, hours. What `--dry-run` prints.

Counted, not guessed: the network and the stage's own loss run forward and backward on tensors without values. PyTorch's
formulas (torch.utils.flop_counter) add up matrix products, convolutions and attention; memory is what is alive at once,
at its most. The Triton kernels allocate and keep what they do on a GPU, and are not launched. All blocks of the DiT
cost the same, so nets of two and of three give any depth by a straight line, exactly.

Hours are a prediction: operations over a stated rate. Reading, decoding and writing files is not in them.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import weakref
from collections import defaultdict
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import model
from kernels import modulate, norm_rope, region_dpo
from runtime import run as common
from runtime import shards as data
from wan import text, vae

# the processes that torchrun started, or 8; none is joined
GROUP = common.Group(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 8)), torch.device("cpu"))
# FLOP/s, dense: NVIDIA's data sheet of the A100 80GB; the A800 has a slower NVLink and is otherwise the same
# TF32 is what cuDNN's convolutions run float32 in, unless told otherwise
PEAK = {torch.bfloat16: 312e12, torch.float32: 19.5e12, "TF32": 156e12}
# assumed; Megatron-LM reports 43 … 52 % of it (Narayanan et al. 2021, arXiv 2104.04473, table 1), with larger products
UTILISATION = 0.40
MEMORY, RESERVE = 80, 4  # GiB of an A800-80GB; of them for CUDA, NCCL and fragmentation, which are not counted
SHAPES = {"tiny": (48, 13, 2, 2), "1.3b": (16, 13, 36, 64), "14b": (16, 13, 36, 64)}  # latents of 49 frames
CLIPS = 20_000  # where nothing tells their number: as many pairs as the paper's, as its readers report them


class Count(TorchDispatchMode):
    """What runs under it: FLOP, in all and of `attention`; bytes allocated and alive, `now` and at their `peak`.

    FlopCounterMode gives the same FLOP, but holds what checkpointing frees.
    """

    def __init__(self):
        super().__init__()
        self.flop = self.attention = self.now = self.peak = 0
        self._alive: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs := kwargs or {}))
        if formula := flop_registry.get(func.overloadpacket):
            flop = formula(*args, **kwargs, out_val=out)
            self.flop += flop
            self.attention += flop * ("attention" in func.name())
        given = {a.untyped_storage()._cdata for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
        for storage in (a.untyped_storage() for a in tree_leaves(out) if isinstance(a, Tensor)):
            if storage._cdata not in given | self._alive.keys():
                self._alive[storage._cdata] = weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return out

    def _free(self, key: int, size: int) -> None:
        del self._alive[key]
        self.now -= size


@contextlib.contextmanager
def valueless():
    """Within it the model runs on the meta device, where tensors have no values, as on a GPU: the Triton kernels do all
    but launch, attention is a flash kernel."""
    triton = mock.Mock(cdiv=lambda a, b: -(-a // b), next_power_of_2=lambda n: 1 << (n - 1).bit_length())
    nothing = defaultdict(lambda: lambda *args, **kwargs: None)  # nothing[grid](...)
    with contextlib.ExitStack() as stack:
        for module in (modulate, norm_rope, region_dpo):
            kernels = {name: nothing for name in vars(module) if name.endswith("_kernel")}
            changed = {"implementation": lambda device: "triton", "triton": triton, **kernels}
            stack.enter_context(mock.patch.multiple(module, **changed))
        stack.enter_context(mock.patch.object(modulate, "_check_row"))  # these two look at values
        stack.enter_context(mock.patch.object(region_dpo, "_check"))
        flash = lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]  # noqa: E731
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", flash))  # CUDA's; meta has a slow one
        stack.enter_context(mock.patch.object(torch, "autocast"))  # there is none on meta
        empty = lambda *size, generator: torch.empty(size)  # noqa: E731
        stack.enter_context(mock.patch.object(torch, "rand", empty))  # add_lora's generator is the CPU's
        stack.enter_context(torch.device("meta"))
        yield


def measure(build: Callable[[], nn.Module], call: Callable[[nn.Module], Tensor], train=False) -> dict[str, int]:
    """call(build()), and if `train` its backward: FLOP, numbers of parameters, bytes.

    `weights` are the frozen ones, `state` the trained ones with gradients and Adam's two moments, `activations` the
    rest at its most, `kept` what of it is alive between forward and backward.
    """
    with valueless(), torch.set_grad_enabled(train):
        net = build()
        every, trained = list(net.parameters()), [p for p in net.parameters() if p.requires_grad and train]
        for p in trained:
            p.grad = torch.empty_like(p)
        with Count() as count:
            out = call(net)
            kept = count.now
            if train:
                out.sum().backward()
        state = sum(p.nbytes for p in trained)
        return {
            "parameters": sum(p.numel() for p in every), "trained": sum(p.numel() for p in trained),
            "flop": count.flop, "attention": count.attention, "activations": count.peak, "kept": kept,
            "weights": sum(p.nbytes for p in every) - state, "state": 4 * state,
        }  # fmt: skip


def measure_dit(preset: str, shape: tuple[int, ...], batch: int, call: Callable, build=nn.Module.bfloat16, train=False):
    """`measure` of a DiT. call(net, x0, text, noise, t) with x0 and noise (batch, *shape); build(DiT) -> net."""
    config = model.PRESETS[preset]

    def on_batch(net):
        x0, noise = torch.empty(2, batch, *shape)
        return call(net, x0, torch.empty(batch, config.text_len, config.text_dim), noise, torch.empty(batch))

    deep = lambda n: lambda: build(model.DiT(dataclasses.replace(config, num_layers=n)))  # noqa: E731
    two, three = (measure(deep(n), on_batch, train) for n in (2, 3))
    return {key: two[key] + (config.num_layers - 2) * (three[key] - two[key]) for key in two}


def latents(preset: str, folder: str, made_by: str, split: str | None):
    """Shape of a latent and number of samples in a folder of shards; where there is none, SHAPES and None."""
    if not os.path.isdir(folder):
        return SHAPES[preset], None
    shards = data.Shards(folder, made_by, split, verify=False)
    return shards.shape(next(name for name in ("x0", "chosen", "first") if name in shards.fields())), len(shards)


def words(count: dict[str, int]) -> str:
    return f"{count['flop'] / 1e12:,.4g} TFLOP, {100 * count['attention'] / count['flop']:.0f} % of them attention"


def report(title: str, rows: dict[str, str], options: dict[str, dict], chosen: str, rate=torch.bfloat16) -> None:
    """Prints a stage's cost, on the first process.

    options: words -> what `measure` found with them, and `run`, the FLOP of the whole run; chosen: the user's; rate: a
    key of PEAK.
    """
    if not GROUP.main:
        return
    print(f"{title}: nothing was loaded", *(f"  {name:12s}{value}" for name, value in rows.items()), sep="\n")
    print(f"  {'GiB a GPU, with the kernels':33s}weights + trained + activations (kept for backward) = sum")
    sums = {}
    for option, m in options.items():
        weights, state, most, kept = (m[key] / 2**30 for key in ("weights", "state", "activations", "kept"))
        sums[option] = weights + state + most
        print(f"  {option:33s}{weights:7.1f}{state:10.1f}{most:14.1f}{kept:20.1f}{sums[option]:9.1f}")
    fits = [option for option, gib in sums.items() if gib <= MEMORY - RESERVE]
    taken = chosen if chosen in fits or not fits else fits[0]
    instead = f"take {taken}" if fits else "take shorter or smaller clips, no option splits the weights"
    said = f"{chosen} fits" if chosen in fits else f"{chosen} does not fit, {instead}"
    print(f"  {said} ({sums[chosen]:.1f} of {MEMORY} GiB; CUDA, NCCL and fragmentation take up to {RESERVE} more)")
    hours = options[taken]["run"] / (UTILISATION * PEAK[rate]) / 3600
    each, wall = (f"{h:,.0f}" if h >= 10 else f"{h:.1f}" if h >= 0.1 else "< 0.1" for h in (hours, hours / GROUP.size))
    speed = f"{100 * UTILISATION:g} % of {PEAK[rate] / 1e12:g} TFLOP/s"
    with_ = f" with {taken}" if taken != chosen else ""
    print(f"  prediction{with_}: {each} GPU-hours, {wall} hours on {GROUP.size} x A800-80GB at {speed}")


def training(cfg, stage: str, loss: Callable) -> None:
    """Prints the cost of sft.py, continuation.py or asymdpo.py. loss(net, x0, text, noise, t) -> (B,)."""
    per_process, forwards = common.local_batch(cfg, GROUP)
    lora, unit = cfg.rank or stage != "sft", "pair" if stage == "asymdpo" else "clip"
    dtype = torch.bfloat16 if lora else torch.float32
    source = (cfg.data, "prepare.py", cfg.split) if unit == "clip" else (cfg.pairs, "make_pairs.py", None)
    shape, found = latents(cfg.preset, *source)

    def build(net: model.DiT, option: str) -> model.DiT:
        net.to(dtype).gradient_checkpointing = bool(option)
        if lora:
            model.add_lora(net, cfg.rank, cfg.rank, cfg.layers)
        if getattr(cfg, "prompts", "off") != "off":
            model.add_task_prompt(net, shape[1], cfg.prompts)
        return net

    micro, options, samples = per_process // forwards, {}, cfg.steps * cfg.batch_size
    for size, option in itertools.product(dict.fromkeys((micro, 1)), ("", " --checkpointing")):
        made = functools.partial(build, option=option)
        count = measure_dit(cfg.preset, shape, size, loss, made, train=True)
        options[f"--micro_batch {size}{option}"] = {**count, "run": samples * count["flop"] / size}
    option = " --checkpointing" * cfg.checkpointing
    one = options[f"--micro_batch 1{option}"]
    times = f", each of the {found:,} taken {samples / found:,.1f} times" if found else ""
    rows = {
        "latents": f"{shape}",
        "parameters": f"{one['parameters'] / 1e9:.4g} B, {one['trained'] / 1e6:.4g} M of them trained",
        f"a {unit}": words(one),
        "the run": f"{cfg.steps:,} steps of {cfg.batch_size} {unit}s{times}: {one['run'] / 1e18:.3g} EFLOP",
    }
    report(f"{stage} --preset {cfg.preset}", rows, options, f"--micro_batch {micro}{option}", dtype)


def sampling(
    stage: str, preset: str, shape: tuple[int, ...], samples: float, nfe: int, guidance: float = 1.0, batch: int = 1,
    given: bool = False, decoder: str = "",
) -> None:  # fmt: skip
    """Prints the cost of `samples` samples, `batch` at once.

    given: with given frames; decoder: the dtype of Wan's VAE beside the network, which shows them.
    """

    def call(net, x0, text, noise, t):
        return net(x0, t, text, torch.empty(len(x0), shape[1], dtype=torch.bool) if given else None)

    options, forwards = {}, nfe * (1 if guidance == 1 else 2)
    rows, shown = {"latents": f"{shape}"}, {"flop": 0, "weights": 0, "activations": 0}
    if decoder and preset != "tiny":  # whose codec is a matrix product a patch
        shown, states = _decoder(shape, decoder), measure(lambda: text.UMT5().bfloat16(), _encode_text)
        gib = (states["weights"] + states["activations"]) / 2**30
        rows |= {"decoding": words(shown), "text": f"its encoder, {gib:.1f} GiB, is gone when the network comes"}
    for size in dict.fromkeys((batch, 1)):
        count = measure_dit(preset, shape, size, call)
        run = samples * (forwards * count["flop"] / size + shown["flop"])
        weights, most = count["weights"] + shown["weights"], max(count["activations"], shown["activations"])
        options[f"{size} at once"] = {**count, "weights": weights, "activations": most, "run": run}
    rows["a forward"] = words(count)
    rows["the run"] = f"{samples:,.0f} samples of {forwards} forwards: {run / 1e18:.3g} EFLOP"
    report(f"{stage} --preset {preset}", rows, options, f"{batch} at once")


def _encode_text(net: text.UMT5, tokens: int = 100) -> Tensor:
    return net(*torch.ones(2, 1, tokens, dtype=torch.int64))


def _decoder(shape: tuple[int, ...], dtype: str) -> dict[str, int]:
    return measure(lambda: vae.VAE().to(getattr(torch, dtype)), lambda net: net.decode(torch.empty(1, *shape)))


def decoding(stage: str, preset: str, shape: tuple[int, ...], clips: int, dtype: str) -> None:
    """Prints the cost of showing stored latents by Wan's VAE in dtype."""
    if preset == "tiny":
        return print(f"{stage} --preset tiny: a matrix product a patch, seconds on a CPU")
    one, rate = _decoder(shape, dtype), torch.bfloat16 if dtype == "bfloat16" else "TF32"
    rows = {"a clip": words(one), "the run": f"{clips:,} clips: {clips * one['flop'] / 1e18:.3g} EFLOP"}
    options = {f"VAE in {dtype}": one | {"run": clips * one["flop"]}}
    report(f"{stage} --decode --preset {preset}", rows, options, f"VAE in {dtype}", rate)


def encoding(
    stage: str, preset: str, clips: int, frames: int, height: int, width: int, dtype: str, tokens: int = 100
) -> None:
    """Prints the cost of Wan's VAE, in dtype, and UMT5, in bfloat16, on clips of that many pictures and text tokens."""
    if preset == "tiny":
        return print(f"{stage} --preset tiny: a matrix product a patch and a look-up a word, seconds on a CPU")

    def call(nets):
        nets[0].encode(torch.empty(1, 3, frames, height, width))
        return _encode_text(nets[1], tokens)

    build = lambda: nn.ModuleList([vae.VAE().to(getattr(torch, dtype)), text.UMT5().bfloat16()])  # noqa: E731
    one = measure(build, call)
    rows = {"a clip": f"{frames} x {height} x {width}, {tokens} text tokens: {one['flop'] / 1e12:.4g} TFLOP"}
    rows["the run"] = f"{clips:,} clips: {clips * one['flop'] / 1e18:.3g} EFLOP"
    both, rate = f"VAE in {dtype}, text encoder", torch.bfloat16 if dtype == "bfloat16" else "TF32"
    report(f"{stage} --preset {preset}", rows, {both: one | {"run": clips * one["flop"]}}, both, rate)

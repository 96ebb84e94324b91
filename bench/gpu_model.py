"""Sections of bench/gpu.py on the network at Wan2.1's sizes: asymdpo.py's step, a continuation, the VAE."""

import contextlib
import dataclasses
import functools
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import asymdpo
import make_pairs
import model
from bench.gpu import SHOWN
from bench.measure import (
    CONFIG,
    GIB,
    N1,
    Trainer,
    apart,
    both_passes,
    clock,
    definitions,
    deterministic,
    lora_trainer,
    peak_bytes,
    peak_flops,
    random_dit,
    random_pair,
    seconds,
)
from bench.measure import card as card  # a section, too
from bench.rounding import kept
from experiments import cost
from kernels import modulate, norm_rope, region_dpo
from runtime.group import Group, place, start_group
from runtime.options import resolve
from runtime.run import Run
from wan import vae


@dataclasses.dataclass(frozen=True)
class Sizes:
    preset: str
    shape: tuple[int, ...]  # C, F, H, W
    rank: int
    nfe: int  # of the continuation
    vae_dim: int

    @property
    def config(self) -> model.DiTConfig:
        return model.PRESETS[self.preset]


SIZES = {name: Sizes(name, cost.SHAPE, 128, 50, 96) for name in ("1.3b", "14b")}
TOY = {name: Sizes("tiny", (28, 4, 2, 2), 4, 2, 4) for name in SIZES}


def trainer_of(sizes: Sizes, device: torch.device) -> Trainer:
    return lora_trainer(sizes.config, sizes.shape, sizes.rank, device)


# ---- is it right -----------------------------------------------------------------------------------------------------


def step_zero(device: torch.device, sizes: Sizes) -> Iterator[dict]:
    """Before the first update policy equals reference: S = 0 exactly, the loss ln 2 / K, and there is a gradient."""
    for below, make in (("", trainer_of), (", on a frozen LoRA", on_a_frozen_lora)):
        trainer = make(sizes, device)
        for way, context in (("kernels", contextlib.nullcontext), ("definitions", definitions)):
            with context():
                loss, parts = trainer.loss()
                loss.sum().backward()
            norm = torch.nn.utils.clip_grad_norm_(trainer.trained.values(), 1.0).item()
            trainer.optimizer.zero_grad()
            off = abs(loss.item() * (sizes.shape[1] - N1) - math.log(2))
            yield {
                "name": f"step 0, {way}{below}", "S": parts["S"].item(), "S is 0": not parts["S"].any().item(),
                "loss is ln 2 / K": off < 1e-6, "gradient": norm, "gradient is finite, not 0": 0 < norm < math.inf,
            }  # fmt: skip


def on_a_frozen_lora(sizes: Sizes, device: torch.device) -> Trainer:
    """As trainer_of, on top of a LoRA as SFT leaves it."""
    sft = model.trained_lora(trainer_of(sizes, device).net)
    for term in sft.values():
        torch.nn.init.normal_(term.B, std=3e-3)
    net = model.attach_lora(random_dit(sizes.config, device), sft)
    model.add_lora(net, sizes.rank, sizes.rank, "attn")
    return Trainer(net, random_pair(sizes.config, sizes.shape, device))


def small_term(device: torch.device, sizes: Sizes) -> Iterator[dict]:
    """On minus off is all of a LoRA, however small, in bfloat16: torch.compile may round x Wᵀ before it is added."""
    D, compiler = sizes.config.dim, "inductor" if device.type == "cuda" else "aot_eager"
    with torch.device(device):
        layer, x = model.Linear(D, D).bfloat16(), torch.randn(4096, D, dtype=torch.bfloat16)
    model.add_lora(layer, 16, 16, "all")
    [term] = layer.lora
    for way, run in (("eager", layer), ("compiled", torch.compile(layer, fullgraph=True, backend=compiler))):
        for size, most in ((3e-4, 0.05), (3e-5, 0.2)):
            torch.nn.init.normal_(term.B, std=size)
            on = run(x).detach()
            with torch.no_grad(), model.lora_off(layer):
                share = kept(on - run(x), x.double() @ term.A.double().t() @ term.B.double().t())
            yield {"name": f"a LoRA with B of {size:g}, {way}", "kept": share, "is kept": abs(share - 1) < most}


def resume(device: torch.device, sizes: Sizes) -> Iterator[dict]:
    """A step after Run.save and Run.resume gives the bits of a step without: parameters and AdamW's moments."""
    trainer = trainer_of(sizes, device)
    with tempfile.TemporaryDirectory() as folder, deterministic(strict=True):  # attention, too
        run = Run(asymdpo.Config(out=folder), "asymdpo", Group(device=device))
        for _ in range(2):
            trainer.step()
        run.save(2, trainer.trained, trainer.optimizer)
        trainer.step()
        straight = state(trainer)
        for name in ("resumed", "resumed again"):
            for p in trainer.trained.values():
                p.data.normal_()
            trainer.restart()
            step = run.resume(trainer.trained, trainer.optimizer)
            places = {a.device for s in trainer.optimizer.state.values() for a in s.values()}
            trainer.step()
            same = all(torch.equal(a, b) for a, b in zip(straight, state(trainer), strict=True))
            yield {
                "name": name,
                "at step 2": step == 2,
                "on the device": places == {trainer.n1.device},
                "same bits": same,
            }


def state(trainer: Trainer) -> list[Tensor]:
    moments = [a for s in trainer.optimizer.state.values() for a in s.values()]
    return [a.detach().clone() for a in (*trainer.trained.values(), *moments)]


# ---- how fast is it --------------------------------------------------------------------------------------------------


def predicted(sizes: Sizes, checkpointing: bool) -> dict[str, int]:
    """What experiments/cost.py counts of a step without running it."""

    def build(net: model.DiT) -> model.DiT:
        cost.in_bfloat16(net).gradient_checkpointing = checkpointing
        model.add_lora(net, sizes.rank, sizes.rank, "attn")
        return net

    loss = functools.partial(cost.loss, asymdpo, CONFIG)
    return cost.measure_dit(sizes.preset, sizes.shape, 1, loss, build, train=True)


def forward_flop(sizes: Sizes) -> int:
    """Of one clip."""
    return cost.measure_dit(sizes.preset, sizes.shape, 1, lambda net, x0, text, noise, t: net(x0, t, text))["flop"]


def used(flop: float, took: float, device: torch.device) -> dict[str, float]:
    """The share of the card's peak, where that is known."""
    peak = peak_flops(device)
    return {"% MFU": 100 * flop / took / peak} if peak else {}


def timed_forward(trainer: Trainer, way: str, device: torch.device, sizes: Sizes, calls: int = 3) -> dict:
    took = seconds(trainer.forward, device, calls)
    share = used(2 * forward_flop(sizes), took, device)
    return {"name": f"a forward of both clips, {way}", "ms": 1e3 * took, **share}


def timed_step(
    trainer: Trainer, way: str, device: torch.device, sizes: Sizes, checkpointing: bool, calls: int = 3
) -> dict:
    """MFU is of the operations that a step needs, without what checkpointing does again."""
    trainer.net.gradient_checkpointing = checkpointing
    took = seconds(trainer.step, device, calls)
    count = predicted(sizes, checkpointing)
    flop = (predicted(sizes, False) if checkpointing else count)["flop"]
    counted = {} if "definitions" in way else {"GiB predicted": cost.memory(count)}  # of the kernels, in any case
    return {
        "name": f"a pair's step, {way}{', checkpointing' * checkpointing}", "ms": 1e3 * took, "pairs/s": 1 / took,
        **used(flop, took, device), "GiB at the peak": peak_bytes(trainer.step, device) / GIB, **counted,
    }  # fmt: skip


def speed(trainer: Trainer, way: str, device: torch.device, sizes: Sizes) -> Iterator[dict]:
    yield timed_forward(trainer, way, device, sizes)
    yield timed_step(trainer, way, device, sizes, True)
    yield timed_step(trainer, way, device, sizes, False) | {SHOWN: 1}  # it needs several times the memory


def kernels(device: torch.device, sizes: Sizes) -> Iterator[dict]:
    yield from speed(trainer_of(sizes, device), "kernels", device, sizes)


def eager(device: torch.device, sizes: Sizes) -> Iterator[dict]:
    """The kernels' definitions."""
    with definitions():
        yield from speed(trainer_of(sizes, device), "definitions", device, sizes)


def compiled(device: torch.device, sizes: Sizes) -> Iterator[dict]:
    """torch.compile of the blocks, with the kernels in them and with the definitions."""
    for way, context in (("kernels, compiled", contextlib.nullcontext), ("definitions, compiled", definitions)):
        torch._dynamo.reset()
        trainer = trainer_of(sizes, device)
        place(trainer.net, dataclasses.replace(CONFIG, compile=True), Group(device=device))
        with context():
            S = trainer.loss()[1]["S"].abs().item()
            noise = asymdpo.PRESETS[sizes.preset]["beta"] * S  # not 0 where policy and reference are two graphs
            yield {"name": f"step 0, {way}", "|S|": S, "beta |S|": noise, "beta |S| < 1": noise < 1}
            yield from speed(trainer, way, device, sizes)


KINDS = {  # of kernel names, in this order
    "attention": r"flash|fmha|sdpa|attention",
    "ours": "|".join(name for m in (modulate, norm_rope, region_dpo) for name in vars(m) if name.endswith("_kernel")),
    "products": r"gemm|cutlass|nvjet|xmma|cublas|wgmma|splitk|::(add|b)?mm$",
}


def shares(took: dict[str, float]) -> dict[str, float]:
    """kernel name -> time, as shares in percent of each kind, and of the rest."""
    found = dict.fromkeys([*KINDS, "rest"], 0.0)
    for name, time in took.items():
        kind = next((kind for kind, words in KINDS.items() if re.search(words, name, re.I)), "rest")
        found[kind] += 100 * time / sum(took.values())
    return found


def split(device: torch.device, sizes: Sizes) -> Iterator[dict]:
    """Where the time of a checkpointed step goes, and the longest of the rest."""
    trainer, cuda = trainer_of(sizes, device), device.type == "cuda"
    trainer.net.gradient_checkpointing = True
    trainer.step()
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as found:
        trainer.step()
        trainer.n1.item()  # waits
    kind, column = (DeviceType.CUDA, "self_device_time_total") if cuda else (DeviceType.CPU, "self_cpu_time_total")
    events = [e for e in found.key_averages() if e.device_type == kind and not e.is_user_annotation]
    took = {e.key: getattr(e, column) for e in events}
    yield {"name": "a step's time", **{f"% {kind}": share for kind, share in shares(took).items()}}
    for name, time in sorted(took.items(), key=lambda item: -item[1])[:15]:
        yield {
            "name": name[:100],
            "% of a step": 100 * time / sum(took.values()),
            "kind": next(kind for kind, share in shares({name: 1.0}).items() if share),
        }


def attention(device: torch.device, sizes: Sizes) -> Iterator[dict]:
    """PyTorch's flash kernels beside cuDNN's; on a CPU, beside plain products."""
    other = SDPBackend.CUDNN_ATTENTION if device.type == "cuda" else SDPBackend.MATH
    L, K = math.prod(sizes.shape[1:]) // math.prod(sizes.config.patch_size), sizes.config.dim // sizes.config.num_heads
    for name, keys in (("self-attention", L), ("cross-attention", sizes.config.text_len)):
        made = [torch.randn(1, sizes.config.num_heads, n, K, device=device) for n in (L, keys, keys)]
        inputs = [a.to(torch.bfloat16).requires_grad_() for a in made]
        for backend in (SDPBackend.FLASH_ATTENTION, other):
            with sdpa_kernel(backend):
                ahead, back = both_passes(F.scaled_dot_product_attention, inputs, device)
            yield {
                "name": f"{name}, {backend.name}",
                "ms forward": ahead,
                "ms backward": back,
                "TFLOP/s forward": 4 * L * keys * sizes.config.dim / (ahead / 1e3) / 1e12,
            }


# ---- sampling --------------------------------------------------------------------------------------------------------


def continuation(device: torch.device, sizes: Sizes) -> Iterator[dict]:
    """make_pairs.py's: a clip from its first frames, with guidance."""
    net = random_dit(sizes.config, device)
    model.add_lora(net, sizes.rank, sizes.rank, "attn")
    model.add_task_prompt(net, sizes.shape[1])
    x0, _, text, _, _ = random_pair(sizes.config, sizes.shape, device)

    def sample(nfe: int) -> Tensor:
        everywhere = dict(guidance_low=0.0, guidance_high=1.0)  # two forwards a step
        cfg = resolve(make_pairs.Config(preset="1.3b", nfe=nfe, **everywhere), make_pairs.PRESETS)
        return make_pairs.continue_clips(net, x0, text, [N1], [("bench",)], cfg, text[0])

    sample(1)  # warms up
    made = []
    took = clock(lambda: made.append(sample(sizes.nfe)), device)
    forwards, whole = 2 * sizes.nfe, made[0]
    yield {
        "name": f"a continuation, {forwards} forwards", "s": took, **used(forwards * forward_flop(sizes), took, device),
        "GiB at the peak": peak_bytes(lambda: sample(1), device) / GIB, "finite": whole.isfinite().all().item(),
        "given frames as they were": torch.equal(whole[:, :, :N1], x0[:, :, :N1]), SHOWN: 1,
    }  # fmt: skip


def decode(device: torch.device, sizes: Sizes) -> Iterator[dict]:
    """Wan2.1's VAE."""
    x0 = torch.randn(1, 16, *sizes.shape[1:], device=device)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.device(device):
            net = vae.VAE(base_dim=sizes.vae_dim).to(dtype)
        run: Callable = functools.partial(net.decode, x0)
        took = seconds(run, device, calls=1)
        name = f"a clip decoded, {str(dtype).removeprefix('torch.')}"
        yield {"name": name, "s": took, "GiB at the peak": peak_bytes(run, device) / GIB}


# ---- 14B -------------------------------------------------------------------------------------------------------------


def large_forward(device: torch.device, sizes: Sizes) -> Iterator[dict]:
    trainer = trainer_of(sizes, device)
    yield timed_forward(trainer, "14B", device, sizes, calls=1) | {
        "GiB at the peak": peak_bytes(trainer.forward, device) / GIB
    }


def large_pair(device: torch.device, sizes: Sizes) -> Iterator[dict]:
    yield timed_step(trainer_of(sizes, device), "14B", device, sizes, True, calls=1) | {SHOWN: 1}


def shard(device: torch.device, sizes: Sizes) -> Iterator[dict]:
    """--shard, with one process to split the weights over: the same network, and what the splitting itself costs."""
    trainer = trainer_of(sizes, device)
    expected = trainer.forward()
    alone = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    alone["TORCHELASTIC_RUN_ID"] = "bench"  # as torchrun, without which one process joins no group
    with mock.patch.dict(os.environ, alone):
        place(trainer.net, dataclasses.replace(CONFIG, shard=True), start_group())
    try:
        off = apart(trainer.forward(), expected)
        yield {"name": "sharded", "apart": off, "the same": off < 2**-7}
        yield timed_step(trainer, "14B, sharded", device, sizes, True, calls=1)
    finally:
        dist.destroy_process_group()

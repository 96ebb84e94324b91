"""What bfloat16 rounds away, by where it rounds, and what 8 bits would: figures of docs/, on random weights.

    python -m bench.rounding       on the CPU, in two minutes; the last three lines are docs/scale.md's

Kept is the part of a change that is there in bfloat16: its projection on the same change in float32, 1 if all of it is,
whatever rounding noise is beside.
"""

import dataclasses
import statistics
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import asymdpo
import model

CONFIG = model.DiTConfig(256, 512, 2, 6, text_dim=64, text_len=32)
LATENT = (16, 13, 12, 16)
SEEDS = 5
DEPTHS = (1, 4, 16)  # layers of the 1.3B's shape
HELD = (torch.bfloat16, torch.float8_e4m3fn, torch.int8)  # what may hold the base's frozen weights


def kept(changed: Tensor, truth: Tensor) -> float:
    return ((changed.double() * truth.double()).sum() / truth.double().square().sum()).item()


def rounded_first(layer: model.Linear, x: Tensor) -> Tensor:
    """Linear.forward as a LoRA is usually added: to a product that was rounded."""
    y = F.linear(x, layer.weight, layer.bias)
    for term in layer.lora:
        if term.on:
            y = y + F.linear(F.linear(x, term.A.to(x.dtype)), term.B.to(x.dtype)) * term.scale
    return y


def network(seed: int, size: float) -> tuple[model.DiT, tuple[Tensor, ...]]:
    """A network with a LoRA of B ~ N(0, size²), whose weights bfloat16 holds exactly, and what `predict` takes."""
    torch.manual_seed(seed)
    net = model.init_from_scratch(model.DiT(CONFIG), seed)
    torch.nn.init.normal_(net.time_projection[1].weight, std=0.02)
    model.cast(model.cast(net, torch.bfloat16), torch.float32)
    model.add_lora(net, 16, 16, "attn", seed)
    for term in model.trained_lora(net).values():
        torch.nn.init.normal_(term.B, std=size)
    clips, noise = torch.randn(2, 2, *LATENT), torch.randn(2, *LATENT)
    return net, (clips[0], clips[1], torch.randn(2, 20, CONFIG.text_dim), noise, torch.rand(2))


def predictions(seed: int, size: float, dtype: torch.dtype):
    net, batch = network(seed, size)
    return asymdpo.predict(model.cast(net, dtype), *batch)


def moved(seed: int, size: float, dtype: torch.dtype) -> Tensor:
    """Policy minus reference of the winners."""
    policy, _, reference, *_ = predictions(seed, size, dtype)
    return policy - reference


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def by_row(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight (out, in) as `dtype` holds it with a scale a row, that of the row's largest number."""
    info = torch.iinfo(dtype) if dtype == torch.int8 else torch.finfo(dtype)
    scale = weight.abs().amax(1, keepdim=True) / info.max
    scaled = weight / scale
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype).float() * scale


def wide_network(seed: int) -> tuple[model.DiT, tuple[Tensor, ...]]:
    """The 1.3B's layers with random weights, as many as DEPTHS needs, in float32; and x_t, t, text of a small clip."""
    torch.manual_seed(seed)
    config = dataclasses.replace(model.PRESETS["1.3b"], num_layers=max(DEPTHS))
    net = model.init_from_scratch(model.DiT(config), seed)
    for name, p in net.named_parameters():
        if name.endswith("modulation"):
            torch.nn.init.normal_(p, std=0.5)
        elif p.ndim == 2:
            torch.nn.init.normal_(p, std=0.025)
    return net, (torch.randn(1, 16, 3, 16, 16), torch.rand(1), torch.randn(1, 60, config.text_dim))


def at_each_depth(net: model.DiT, batch: tuple[Tensor, ...]) -> list[Tensor]:
    """v of the first layers alone, as many as each of DEPTHS says."""
    every, found = net.blocks, []
    for depth in DEPTHS:
        net.blocks = every[:depth]
        found.append(net(*batch))
    net.blocks = every
    return found


@torch.no_grad()
def held_in_fewer_bits(seed: int = 0) -> None:
    """Prints the error of v by what holds the blocks' weights, which float32 has in truth. Products are bfloat16's."""
    net, batch = wide_network(seed)
    layers = list(model.linears(net.blocks).values())
    weights, truth = [layer.weight.data for layer in layers], at_each_depth(net, batch)
    model.cast(net, torch.bfloat16)
    off = []
    for held in HELD:
        for layer, weight in zip(layers, weights):
            layer.weight.data = (weight if held == torch.bfloat16 else by_row(weight, held)).bfloat16()
        pairs = zip(at_each_depth(net, batch), truth)
        off.append([((v - exact).norm() / exact.norm()).item() for v, exact in pairs])
    for depth, least, *more in zip(DEPTHS, *off):
        told = [f"{str(held)[6:]} {error:.1e}, {error / least:.1f} times that" for held, error in zip(HELD[1:], more)]
        print(f"error of v, {depth} of the 1.3B's layers, weights in bfloat16 {least:.1e}; in {'; in '.join(told)}")


def main() -> None:
    bfloat16()
    held_in_fewer_bits()


@torch.no_grad()
def bfloat16() -> None:
    torch.manual_seed(0)
    weight, A = torch.randn(1536, 1536) * 0.025, (2 * torch.rand(128, 1536) - 1) / 1536**0.5
    for rms in (5e-6, 2e-5, 1e-4):
        change = torch.randn(1536, 128) @ A
        change *= rms / change.square().mean().sqrt()
        stored = weight.bfloat16().float()
        once, twice = (weight + change).bfloat16() - stored, (stored + change).bfloat16() - stored
        told = f"kept {kept(once, change):.3f} with one rounding, {kept(twice, change):.2f} with two"
        print(f"an update of rms {rms:g} fused into weights of rms 0.025: {told}")
    for size in (3e-5, 3e-4, 3e-3):
        truth = [moved(seed, size, torch.float32) for seed in range(SEEDS)]
        ours = [kept(moved(seed, size, torch.bfloat16), truth[seed]) for seed in range(SEEDS)]
        with mock.patch.object(model.Linear, "forward", rounded_first):
            usual = [kept(moved(seed, size, torch.bfloat16), truth[seed]) for seed in range(SEEDS)]
        print(f"policy − reference, 6 layers, B of {size:g}: kept {spread(ours)}, added afterwards {spread(usual)}")
    cfg, ones = asymdpo.Config(beta=800.0, form="outside"), torch.ones(2, dtype=torch.int64)
    S = [asymdpo.asymdpo_loss(cfg, predictions(s, 1e-7, torch.bfloat16), ones, ones)[1]["S"] for s in range(SEEDS)]
    print(f"|β·S| at β 800, B of 1e-7, where the policy has not moved: {cfg.beta * torch.cat(S).abs().mean():.2g}")
    net, (x, _, text, _, t) = network(0, 0.0)
    exact, table = net(x, t, text), net._time(t, None)[1]
    kept_float32, bfloat16 = model.cast(net, torch.bfloat16)(x, t, text), net.bfloat16()(x, t, text)
    off = [((a - exact).norm() / exact.norm()).item() for a in (kept_float32, bfloat16)]
    time = ((net._time(t, None)[1] - table).norm() / table.norm()).item()
    print(f"error of v {off[0]:.1e} with float32 time, modulation, norms and head; {off[1]:.1e} without,", end=" ")
    print(f"and of the time's projection {time:.1e}")


if __name__ == "__main__":
    main()

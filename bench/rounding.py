"""What bfloat16 rounds away, by where it rounds: the figures of docs/method.md, on random weights.

    python -m bench.rounding       on the CPU, in a minute

Kept is the part of a change that is there in bfloat16: its projection on the same change in float32, 1 if all of it is,
whatever rounding noise is beside.
"""

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


@torch.no_grad()
def main() -> None:
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

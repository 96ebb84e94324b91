"""One step of asymdpo.py beside diffusers + PEFT: the same weights, LoRA, pair and loss.

    python -m bench.step [--rounds 5] [--dtype bfloat16]      1664 tokens, width 512, 8 blocks, on the CPU; some minutes

A step is four forwards (policy and reference of winner and loser; the reference is the network with its adapters off),
the backward and AdamW. First it is checked that both sides give the same loss and the same gradients. Then they take
turns, ours, theirs, ours, theirs, and each turn is timed by the processor time of this process, which other programs on
the machine disturb least. Memory is told in two ways. Counted: the most bytes of tensors that are alive at once in a
step, with weights, gradients and AdamW's moments; what an operation allocates inside itself is not seen. Resident: what
two steps add to the memory of a process of its own, as Linux tells it.

It needs the packages of requirements-dev.txt. On a GPU it is a section of bench/gpu.py.
"""

import argparse
import dataclasses
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flow
import model
from bench.gpu import ROOT, SHOWN, text
from bench.measure import CONFIG, GIB, N1, Trainer, clock, lora_trainer, peak_bytes, random_pair
from experiments.cost import SHAPE

try:
    import diffusers
    import peft
except ImportError:  # without them there is nothing to stand beside
    diffusers = peft = None


@dataclasses.dataclass(frozen=True)
class Sizes:
    config: model.DiTConfig
    shape: tuple[int, ...]  # C, F, H, W
    rank: int
    rounds: int
    dtype: torch.dtype
    checkpointing: bool


CPU = Sizes(
    model.DiTConfig(512, 2048, 4, 8), (16, 13, 16, 32), 128, 5, torch.float32, False
)  # heads of 128 channels, as Wan's
SIZES = {"1.3b": Sizes(model.PRESETS["1.3b"], SHAPE, 128, 3, torch.bfloat16, True)}
TOY = {
    "1.3b": Sizes(model.DiTConfig(32, 48, 2, 2, text_dim=12, freq_dim=32), (16, 3, 4, 4), 4, 2, torch.bfloat16, True)
}


# ---- the other side --------------------------------------------------------------------------------------------------


class Peer(Trainer):
    """The same step as a user of diffusers would write it."""

    def velocity(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        dtype = self.net.patch_embedding.weight.dtype
        return self.net(x_t.to(dtype), 1000 * t, text.to(dtype), return_dict=False)[0].float()

    def loss(self) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected, text, noise, t = self.pair
        x0, noise, t, text = torch.cat([chosen, rejected]), torch.cat([noise] * 2), t.repeat(2), torch.cat([text] * 2)
        x_t, target = flow.add_noise(x0, noise, t), flow.velocity(x0, noise)
        self.net.disable_adapters()
        with torch.no_grad():
            ref = self.velocity(x_t, t, text)
        self.net.enable_adapters()
        policy, ref = (
            (v - target)[:, :, N1:].square().mean(dim=(1, 3, 4)).sum(1) for v in (self.velocity(x_t, t, text), ref)
        )
        winner, loser = (policy - ref).chunk(2)
        return F.softplus(CONFIG.beta * (winner - loser)) / (x0.shape[2] - N1), {}


def their_net(config: model.DiTConfig, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """diffusers' network with random weights, frozen, each in the dtype that from_pretrained gives it."""
    heads = dict(num_attention_heads=config.num_heads, attention_head_dim=config.dim // config.num_heads)
    sizes = dict(num_layers=config.num_layers, ffn_dim=config.ffn_dim, text_dim=config.text_dim)
    with torch.device(device):
        net = diffusers.WanTransformer3DModel(**heads, **sizes, freq_dim=config.freq_dim, eps=config.eps)
    for name, p in net.named_parameters():
        wide = any(part in name.split(".") for part in net._keep_in_fp32_modules)
        p.data = p.data.to(torch.float32 if wide else dtype)
    return net.requires_grad_(False)


def ours(sizes: Sizes, device: torch.device) -> Trainer:
    trainer = lora_trainer(sizes.config, sizes.shape, sizes.rank, device, sizes.dtype)
    trainer.net.gradient_checkpointing = sizes.checkpointing
    return trainer


def theirs(sizes: Sizes, device: torch.device) -> Peer:
    net = their_net(sizes.config, device, sizes.dtype)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    net.add_adapter(peft.LoraConfig(r=sizes.rank, lora_alpha=sizes.rank, target_modules=targets))
    for name, p in net.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()  # masters in float32 on both sides
        if "lora_B" in name:
            nn.init.normal_(p, std=1e-3)
    if sizes.checkpointing:
        net.enable_gradient_checkpointing()
    return Peer(net, random_pair(sizes.config, sizes.shape, device))


SIDES = {"ours": ours, "diffusers": theirs}


# ---- the same --------------------------------------------------------------------------------------------------------


def our_name(name: str) -> str:
    """Our name of a parameter under PEFT's names: …to_q.base_layer.weight, …to_q.lora_A.default.weight."""
    return re.sub(r"lora_(.)\.default\.weight", r"lora.0.\1", model.wan_name(name.replace(".base_layer", "")))


def pair_up(sizes: Sizes, device: torch.device) -> dict[str, Trainer]:
    """Both sides, with the same weights, the same LoRA, whose B is not zero, and the same pair."""
    found = {name: make(sizes, device) for name, make in SIDES.items()}
    mine, peer = found.values()
    mine.pair = peer.pair
    parameters = dict(mine.net.named_parameters())
    with torch.no_grad():
        for name, p in peer.net.named_parameters():
            parameters[our_name(name)].copy_(p)
    return found


def differences(sides: dict[str, Trainer]) -> dict[str, float]:
    """How far losses and gradients are apart, relative to the largest."""
    losses, gradients = [], []
    for side in sides.values():
        losses.append(side.loss()[0])
        losses[-1].sum().backward()
        gradients.append({our_name(name): p.grad for name, p in side.trained.items()})
        side.optimizer.zero_grad()
    mine, peer = gradients
    size = max(a.abs().max().item() for a in peer.values())
    apart = max((mine[name] - a).abs().max().item() for name, a in peer.items())
    return {"loss": (losses[0] / losses[1] - 1).abs().item(), "gradients": apart / size}


# ---- time and memory -------------------------------------------------------------------------------------------------


def spent(run: Callable, device: torch.device) -> float:
    """Seconds: of the clock on a GPU, of this process's processors on a CPU."""
    if device.type == "cuda":
        return clock(run, device)
    before = time.process_time()
    run()
    return time.process_time() - before


def race(sides: dict[str, Trainer], rounds: int, device: torch.device) -> Iterator[dict[str, tuple[float, float]]]:
    """Of each round and side, which take turns: seconds of a forward and of a step."""
    for _ in range(rounds):
        yield {name: (spent(side.forward, device), spent(side.step, device)) for name, side in sides.items()}


def ratio(took: list[dict[str, tuple[float, float]]], i: int) -> str:
    """How many times as fast ours is: by each side's fastest turn, and in brackets by the rounds, least and most."""
    ours, theirs = (min(turn[name][i] for turn in took) for name in SIDES)
    found = sorted(turn["diffusers"][i] / turn["ours"][i] for turn in took)
    return f"{theirs / ours:.2f} x as fast ({found[0]:.2f} to {found[-1]:.2f})"


def held(side: Trainer, device: torch.device) -> int:
    """Bytes at the peak of a step, all in all."""
    moments = [a for state in side.optimizer.state.values() for a in state.values()]
    before = sum(a.nbytes for a in (*side.net.parameters(), *moments)) if device.type == "cpu" else 0
    return before + peak_bytes(side.step, device)


def resident(name: str, dtype: str) -> int:
    """Bytes that two steps add, in this process, which must have done nothing else (Linux)."""
    side = SIDES[name](dataclasses.replace(CPU, dtype=getattr(torch, dtype)), torch.device("cpu"))

    def status(field: str) -> int:
        return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1])

    before = status("VmRSS")
    side.step(), side.step()
    return status("VmHWM") - before


def in_a_process(name: str, dtype: str) -> int:
    """`resident`, in a process of its own."""
    code = f"from bench import step; print(step.resident({name!r}, {dtype!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1])


def peers(device: torch.device, sizes: Sizes) -> Iterator[dict]:
    """The section of bench/gpu.py."""
    if diffusers is None:
        yield {"name": "beside diffusers and PEFT", "not run": "they are not installed"}
        return
    shallow = dataclasses.replace(sizes.config, num_layers=2)
    exact = dataclasses.replace(sizes, config=shallow, dtype=torch.float32)  # bfloat16 rounds each side in its own way
    off = differences(pair_up(exact, device))
    yield {"name": "loss and gradients apart, float32", **off, "the same": max(off.values()) < 1e-3}
    sides = pair_up(sizes, device)
    for side in sides.values():
        side.step()  # warms up, and makes AdamW's moments
    memory = {name: held(side, device) for name, side in sides.items()}
    yield {"name": "GiB at the peak of a step", **{name: size / GIB for name, size in memory.items()}}
    took = list(race(sides, sizes.rounds, device))
    for name in sides:
        forward, step = (min(turn[name][i] for turn in took) for i in (0, 1))
        yield {"name": name, "s a step": step, "s a forward": forward}
    yield {
        "name": "ours beside diffusers and PEFT", "a step": ratio(took, 1), "a forward": ratio(took, 0),
        "of its memory": memory["ours"] / memory["diffusers"], SHOWN: 1,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=CPU.rounds, help="turns of each side")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of products and attention")
    given = parser.parse_args()
    if diffusers is None:
        parser.error("expected diffusers and peft: pip install -r requirements-dev.txt")
    torch.manual_seed(0)
    sizes = dataclasses.replace(CPU, rounds=given.rounds, dtype=getattr(torch, given.dtype))
    for row in peers(torch.device("cpu"), sizes):
        print(text(row), flush=True)
    added = {name: in_a_process(name, given.dtype) / GIB for name in SIDES}
    share = added["ours"] / added["diffusers"]
    print(text({"name": "GiB that two steps add to a process", **added, "of its memory": share}))


if __name__ == "__main__":
    main()

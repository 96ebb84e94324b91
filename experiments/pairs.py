"""Pairs for the baselines: two samples of the model that is to be trained, in no order. experiments.labels finds one.

    --kind flow          two samples of the clip's prompt, each from its own noise: Flow-DPO (arXiv 2501.13918)
    --kind structural    two samples from the clip itself, noised to one time η ~ U(0.65, 0.8), each with its own noise:
                         StructuralDPO and DenseDPO (arXiv 2506.03517)

    python -m experiments.pairs --kind flow --base out/demo/base --lora out/demo/sft --data out/demo/shards \\
        --out out/baseline/pairs

How this differs from make_pairs.py: the model is text-to-video, no frame is given, and no side is better by
construction.

In    a model folder, the LoRAs that training starts from, shards of prepare.py
Out   shards with `first` and `second` (C, F, H, W), text states, and for each pair id and caption; structural: eta
Cost  two samples a clip of nfe forwards each, twice that with guidance; structural takes the steps below eta_max only
"""

import dataclasses
import functools
import math

import torch

import flow
import model
from kernels.modulate import implementation
from make_pairs import PRESETS, read_clips, sample_shards
from runtime.group import place, start_group
from runtime.options import UserError, option, program, resolve, user_errors
from runtime.run import Run
from wan.lora import load_adapted, lora_files

SIDES = ("first", "second")


@dataclasses.dataclass(frozen=True)
class Config:
    """Samples two sides for every clip, in no order."""

    preset: str = "tiny"  # tiny, 1.3b or 14b: sets every option that is not given
    kind: str = option("flow", choices=("flow", "structural"))  # flow or structural: what a sample starts from
    base: str = "out/demo/base"  # model folder
    lora: str = ""  # folders with lora.safetensors, or such files, separated by commas: on the base first
    data: str = "out/demo/shards"  # shards of prepare.py
    split: str = option("align", choices=("train", "align", "eval"))  # which clips
    out: str = option("out/baseline/pairs", neutral=True)  # folder to write
    clips: int = option(0, least=0)  # number of clips; 0: every clip of the split
    eta_min: float = option(0.65, above=0, most=1)  # structural: least time that a clip is noised to
    eta_max: float = option(0.8, above=0, most=1)  # structural: most
    nfe: int | None = option(least=1)  # solver steps
    t_shift: float | None = option(above=0)  # warp of the solver's times towards noise
    guidance: float | None = option(least=0)  # classifier-free guidance weight; 1: none
    shard_size: int | None = option(least=1)  # pairs a shard, and sampled together
    shard: bool = option(False, neutral=True)  # split the frozen weights over a node's processes: less memory
    compile: bool = option(False, neutral=True)  # torch.compile the network's blocks
    seed: int = 0  # of the noise and of η


def structural_steps(cfg) -> int:
    """Solver steps of a structural sample: those that the whole grid has below eta_max."""
    share = float(flow.shift_t(torch.tensor(cfg.eta_max, dtype=torch.float64), 1 / cfg.t_shift))
    return math.ceil(cfg.nfe * share - 1e-9)  # rounding must not turn a level of the grid into one more step


@torch.no_grad()
def denoise(net, x0, noise, text, eta, cfg):
    """Samples (B, C, F, H, W) from the clips x0 noised to the times eta (B,) in (0, 1], in `structural_steps` steps.

    noise as x0, text (B, S, text_dim). The levels are those of flow.time_grid, starting at η instead of 1.
    """
    steps = structural_steps(cfg)
    shares = torch.tensor([1 - k / steps for k in range(steps + 1)], device=eta.device)
    even = flow.shift_t(eta, 1 / cfg.t_shift)  # the inverse of the warp
    levels = flow.shift_t(even * shares[:, None], cfg.t_shift)  # (steps + 1, B)
    x = flow.add_noise(x0, noise, eta)
    for t, t_next in zip(levels, levels[1:]):
        x = x + flow.per_sample(t_next - t, x) * net(x, t, text)
    return x


def sample_pairs(net, x0, text, ids: list[str], cfg):
    """Two samples of each clip: `first` and `second` (B, C, F, H, W), and what is noted of each pair.

    x0 (B, C, F, H, W), of which flow takes the shape alone; text (B, S, text_dim).
    """
    draws = torch.tensor([flow.generator("eta", cfg.seed, i).random() for i in ids])
    eta = cfg.eta_min + (cfg.eta_max - cfg.eta_min) * draws
    sides = {}
    for side in SIDES:
        noise = flow.draw_noise(x0.shape[1:], [("pair", cfg.seed, i, side) for i in ids]).to(x0.device)
        if cfg.kind == "flow":
            sides[side] = flow.euler(net, noise, text, flow.time_grid(cfg.nfe, cfg.t_shift))
        else:
            sides[side] = denoise(net, x0, noise, text, eta.to(x0.device), cfg)
    return sides, [{} if cfg.kind == "flow" else {"eta": round(e, 4)} for e in eta.tolist()]


def main(cfg: Config) -> None:
    # ---- what to do, checked before anything is loaded
    cfg = resolve(cfg, PRESETS)
    if cfg.eta_min > cfg.eta_max:
        raise UserError(f"expected eta_min <= eta_max, got {cfg.eta_min} and {cfg.eta_max}")
    group, loras = start_group(implementation), lora_files(cfg.lora)
    inputs = {"data": cfg.data, "base": cfg.base} | {str(file): file for file in loras}
    run = Run(cfg, "experiments.pairs", group, inputs)
    if run.done:
        return
    clips, count = read_clips(cfg)
    dtype = torch.bfloat16 if group.device.type == "cuda" else torch.float32
    net = place(load_adapted(cfg.base, loras, dtype, group.device), cfg, group)
    with user_errors():
        model.check_fits(net, cfg.preset, cfg.base, cfg.data, clips.shape("x0"))
    negative = clips.negative() if cfg.guidance != 1 else None
    call = flow.guided(net, cfg.guidance, negative)

    # ---- sample
    files = sample_shards(run, clips, count, cfg, functools.partial(sample_pairs, call, cfg=cfg))
    if group.main:
        print(f"experiments.pairs: {count} pairs in no order; experiments.labels finds one")
    run.finish(files)


if __name__ == "__main__":
    program(main, Config, __doc__)

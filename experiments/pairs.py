"""Pairs for the baselines, each of two clips for one prompt. Who won is experiments.labels' to say.

    --kind flow          two samples of the clip's prompt, each from its own noise: Flow-DPO (arXiv 2501.13918)
    --kind structural    two samples from the clip itself, noised to one time η ~ U(0.65, 0.8), each with its own noise:
                         StructuralDPO and DenseDPO (arXiv 2506.03517)
    --kind real          the clip itself and a sample of its prompt: Reg-DPO (arXiv 2511.01450)
    --kind local         the clip itself and the clip with a window of frames that the model made anew, as it does when
                         it fills a gap: LocalDPO (arXiv 2601.04068), whose masks also have a shape in space

    python -m experiments.pairs --kind flow --base out/demo/base --lora out/demo/sft --data out/demo/shards \\
        --out out/baseline/pairs

How this differs from make_pairs.py: the model is text-to-video and the one that is to be trained; there is no
continuation model. Neither side of flow and structural is better by construction.

In    a model folder, the LoRAs that training starts from, shards of prepare.py
Out   shards with `first` and `second` (C, F, H, W), text states, and for each pair id and caption; flow, structural:
      the clip as `x0`, which is `first` in the others; structural: eta; local: the window's `start` and `end`
Cost  two samples a clip of nfe forwards each, one of them for real and local, twice that with guidance; structural
      takes the steps below eta_max only
"""

import dataclasses
import functools
import math

import torch

import flow
import model
from kernels.modulate import implementation
from make_pairs import read_clips, sample_shards
from runtime.group import place, start_group
from runtime.options import SEED, option, program, resolve, user_errors
from runtime.run import Run
from wan.lora import load_adapted, lora_files

PRESETS = {  # a whole sample takes more steps than the rest of a clip that is given in part; Wan's: its own
    "tiny": dict(nfe=6, t_shift=4.0, guidance=1.0, shard_size=64),
    "1.3b": dict(nfe=50, t_shift=5.0, guidance=5.0, shard_size=8),
    "14b": dict(nfe=50, t_shift=5.0, guidance=5.0, shard_size=4),
}
SIDES = ("first", "second")
CLIP = {"flow": "x0", "structural": "x0", "real": "first", "local": "first"}  # kind -> the field with the clip itself


@dataclasses.dataclass(frozen=True)
class Config:
    """Makes a pair of every clip, for a baseline."""

    preset: str = option("tiny", choices=tuple(PRESETS))  # sets every option that is not given
    kind: str = option("flow", choices=tuple(CLIP))  # what the two sides are
    base: str = "out/demo/base"  # model folder
    lora: str = ""  # folders with lora.safetensors, or such files, separated by commas: on the base first
    data: str = "out/demo/shards"  # shards of prepare.py
    split: str = option("align", choices=("train", "align", "eval"))  # which clips
    out: str = option("out/baseline/pairs", neutral=True)  # folder to write
    clips: int = option(0, least=0)  # number of clips; 0: every clip of the split
    eta_min: float = option(0.65, above=0, most="eta_max")  # structural: least time that a clip is noised to
    eta_max: float = option(0.8, above=0, most=1)  # structural: most
    solver: str = option("unipc", choices=tuple(flow.SOLVERS))  # structural has Euler's own part of the grid
    nfe: int | None = option(least=1, most=1000)  # solver steps
    t_shift: float | None = option(above=0)  # warp of the solver's times towards noise
    guidance: float | None = option(least=0)  # classifier-free guidance weight; 1: none
    shard_size: int | None = option(least=1)  # pairs a shard, and sampled together
    shard: bool = option(False, neutral=True)  # split the frozen weights over a node's processes: less memory
    compile: bool = option(False, neutral=True)  # torch.compile the network's blocks
    seed: int = option(0, **SEED)  # of the noise, of η and of the windows


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


def draw_window(seed: int, clip: str, frames: int) -> tuple[int, int]:
    """Start and end of the latent frames of a clip that are made anew: more than a fifth of them, as
    experiments.baselines asks for, and at most 70 %, anywhere.
    """
    g, least = flow.generator("window", seed, clip), frames // 5 + 1
    length = int(g.integers(least, max(least, math.floor(0.7 * frames)), endpoint=True))
    start = int(g.integers(0, frames - length, endpoint=True))
    return start, start + length


def fill_window(net, x0, noise, text, windows: list[tuple[int, int]], cfg):
    """The clips x0 (B, C, F, H, W) with the frames start … end − 1 of each window sampled from noise.

    In every step the network sees the other frames as they are at that step's noise level. They come out bit for bit.
    """
    start, end = torch.tensor(windows, device=x0.device).T[..., None]
    frame = torch.arange(x0.shape[2], device=x0.device)
    kept = ((frame < start) | (frame >= end))[:, None, :, None, None]

    def call(x, t, text):  # the solver takes each entry for itself: what it holds of the kept ones does not matter
        return net(torch.where(kept, flow.add_noise(x0, noise, t), x), t, text)

    return torch.where(kept, x0, flow.SOLVERS[cfg.solver](call, noise, text, flow.time_grid(cfg.nfe, cfg.t_shift)))


def sample_pairs(net, x0, text, ids: list[str], cfg):
    """The pair of each clip x0 (B, C, F, H, W): fields as x0, and what is noted of each pair. text (B, S, text_dim)."""
    fields, facts = {CLIP[cfg.kind]: x0}, [{} for _ in ids]
    if cfg.kind == "structural":
        draws = torch.tensor([flow.generator("eta", cfg.seed, i).random() for i in ids])
        eta = cfg.eta_min + (cfg.eta_max - cfg.eta_min) * draws
        facts = [{"eta": round(e, 4)} for e in eta.tolist()]
    if cfg.kind == "local":
        windows = [draw_window(cfg.seed, i, x0.shape[2]) for i in ids]
        facts = [{"start": start, "end": end} for start, end in windows]
    for side in SIDES:
        if side in fields:
            continue
        noise = flow.draw_noise(x0.shape[1:], [("pair", cfg.seed, i, side) for i in ids]).to(x0.device)
        if cfg.kind == "structural":
            fields[side] = denoise(net, x0, noise, text, eta.to(x0.device), cfg)
        elif cfg.kind == "local":
            fields[side] = fill_window(net, x0, noise, text, windows, cfg)
        else:
            fields[side] = flow.SOLVERS[cfg.solver](net, noise, text, flow.time_grid(cfg.nfe, cfg.t_shift))
    return fields, facts


def main(cfg: Config) -> None:
    # ---- what to do, checked before anything is loaded
    cfg = resolve(cfg, PRESETS)
    group, loras = start_group(implementation), lora_files(cfg.lora)
    inputs = {"data": cfg.data, "base": cfg.base, "lora": loras}
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
    files, kept = sample_shards(run, clips, count, cfg, functools.partial(sample_pairs, call, cfg=cfg))
    run.finish(files, f"{kept:,} pairs", "experiments.labels says who won")


if __name__ == "__main__":
    program(main, Config, __doc__, PRESETS)

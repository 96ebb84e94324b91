"""Step distillation in miniature: a LoRA with which the base samples in a few Euler steps, without guidance.

The levels σ of flow.time_grid(nfe, t_shift) cut [0, 1] into nfe windows, as in PeRFlow (arXiv 2405.07510). In each, one
step of the student is to end where several of the teacher do, as in progressive distillation (arXiv 2202.00512):

    x_s = (1 − s)·x0 + s·noise          a real clip at the start of a window, s = σ_k
    x_e = solver(frozen model, x_s)     at its end, e = σ_k+1, by `substeps` steps, with guidance
    L   = mean ‖ (x_s − x_e)/(s − e) − v_θ(x_s, s, text) ‖²

    python -m experiments.distill --base out/demo/base --data out/demo/shards --out out/distill
    python make_pairs.py --lora out/distill --nfe 4 --guidance 1 --solver euler --out out/fast_pairs

The second command puts it beneath the continuation model, whose own LoRA was trained on the base alone. At Wan's size
such LoRAs are published: docs/wan.md.

In    a model folder, LoRAs to put on it first, shards of prepare.py
Out   lora.safetensors (on top of base and --lora), metrics.jsonl
Cost  substeps forwards, twice that with guidance, then one forward and backward a clip and step
"""

import dataclasses

import torch

import flow
import model
from runtime.files import whole_file
from runtime.group import alone
from runtime.options import SEED, option, program, resolve, user_errors
from runtime.run import Run
from runtime.shards import Shards, batch_order, epochs
from runtime.train import Training
from sft import learning_rate
from wan.lora import load_adapted, lora_files

PRESETS = {"tiny": dict(layers="all", rank=32, batch_size=32, steps=200, lr=2e-3, warmup=20, nfe=4, t_shift=4.0)}


@dataclasses.dataclass(frozen=True)
class Config:
    """Distils a base, or a base with LoRAs, into a LoRA for few steps."""

    preset: str = option("tiny", choices=tuple(PRESETS))  # sets every option that is not given
    base: str = "out/demo/base"  # model folder; its weights stay frozen
    lora: str = ""  # folders with lora.safetensors, or such files, separated by commas: on the base first
    data: str = "out/demo/shards"  # shards of prepare.py
    split: str = option("train", choices=("train", "align", "eval"))  # which clips: those that the base was trained on
    out: str = option("out/distill", neutral=True)  # folder to write
    nfe: int | None = option(least=1, most=1000)  # Euler steps that the LoRA is for: windows
    t_shift: float | None = option(above=0)  # warp of their times towards noise
    solver: str = option("unipc", choices=tuple(flow.SOLVERS))  # of the teacher
    substeps: int = option(3, least=1)  # the teacher's steps in a window
    guidance: float = option(1.0, least=0)  # the teacher's; what comes out is sampled without
    layers: str | None = option(choices=tuple(model.LORA_LAYERS))  # layers that get the LoRA
    rank: int | None = option(least=1, most=1024)  # LoRA rank, alpha = rank
    batch_size: int | None = option(least=1)  # clips a step
    steps: int | None = option(least=1)  # optimiser steps
    lr: float | None = option(above=0)  # peak learning rate of AdamW
    warmup: int | None = option(least=0, most="steps")  # steps of linear warm-up; then a cosine to 0
    save_every: int = option(250, least=1, neutral=True)  # steps between checkpoints
    seed: int = option(0, **SEED)  # of initialisation, order and noise


def window(cfg, k: int) -> flow.Grid:
    """The teacher's levels and times in window k: every `substeps`-th level of the whole grid is the student's."""
    levels, times = flow.time_grid(cfg.nfe * cfg.substeps, cfg.t_shift)
    first, last = k * cfg.substeps, (k + 1) * cfg.substeps
    return levels[first : last + 1], times[first:last]


def window_loss(net, teacher, x0, text, noise, grid: flow.Grid, solver: str):
    """‖(x_s − x_e)/(s − e) − v_θ‖² averaged over C, F, H, W: (B,) float32.

    x0, noise (B, C, F, H, W), text (B, S, text_dim); grid: the window's; teacher(x, t, text): net with guidance, which
    is called without net's newest LoRA.
    """
    s, e = grid[0][[0, -1]].tolist()
    t = torch.full((len(x0),), s)
    x_s = flow.add_noise(x0, noise, t)
    with model.lora_off(net):
        x_e = flow.SOLVERS[solver](teacher, x_s, text, grid)
    error = net(x_s, t, text) - (x_s - x_e) / (s - e)
    return error.square().mean(dim=(1, 2, 3, 4))


def main(cfg: Config) -> None:
    # ---- what to do, checked before anything is loaded
    cfg, asked, loras = resolve(cfg, PRESETS), cfg.batch_size, lora_files(cfg.lora)
    inputs = {"data": cfg.data, "base": cfg.base, "lora": loras}
    run = Run(cfg, "experiments.distill", alone(), inputs)
    if run.done:
        return
    clips = Shards(cfg.data, "prepare.py", cfg.split)
    plan = epochs(len(clips), cfg, "clips", asked)
    negative = clips.negative() if cfg.guidance != 1 else None
    net = load_adapted(cfg.base, loras)
    with user_errors():
        model.check_fits(net, cfg.preset, cfg.base, cfg.data, clips.shape("x0"))
    seed = int(flow.generator("distill", "lora", cfg.seed).integers(2**32))  # another A in each stage
    model.add_lora(net, cfg.rank, cfg.rank, cfg.layers, seed)
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    teacher = flow.guided(net, cfg.guidance, negative)
    optimizer = torch.optim.AdamW(trained.values(), lr=cfg.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)

    # ---- train
    training = Training(run, cfg, trained, optimizer)
    for step in training.steps(plan):
        k, index = step % cfg.nfe, batch_order(len(clips), cfg.batch_size, step, (run.stage, cfg.seed), flow.generator)
        keys = [(run.stage, cfg.seed, step, clips.rows[i]["id"]) for i in index]
        x0, text = clips.get("x0", index), clips.text(index)
        noise = flow.draw_noise(x0.shape[1:], keys)
        losses = window_loss(net, teacher, x0, text, noise, window(cfg, k), cfg.solver)
        training.backward(losses, [clips.rows[i]["id"] for i in index])
        lr = learning_rate(step, cfg)
        if row := training.update(lr):
            training.log({"window": k, **row, "lr": lr}, loss=f"{row['loss']:.4f}")

    # ---- result
    with whole_file(run.folder / "lora.safetensors") as file:
        model.export_lora(model.trained_lora(net), file, base=cfg.base, sft=cfg.lora, beneath=net.loras, task="distill")
    run.finish(["lora.safetensors"], f"{cfg.steps:,} steps", f"loss {run.recent('loss'):.4f}")


if __name__ == "__main__":
    program(main, Config, __doc__, PRESETS)

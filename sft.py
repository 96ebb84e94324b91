"""Plain flow matching on real clips: the LoRA cold start of the method, or a small base model from scratch.

    L = mean ‖ noise − x0 − v_θ(x_t, t, text) ‖²,   x_t = (1 − t)·x0 + t·noise

    python sft.py --data out/demo/shards --out out/demo/base --split train                   # from scratch
    python sft.py --data out/demo/shards --out out/demo/sft --split align --base out/demo/base  # LoRA cold start
    torchrun --nproc_per_node 8 sft.py --preset 1.3b --base Wan2.1-T2V-1.3B --data shards \\
        --split align --out out/sft

Why: every DPO variant starts from one and the same cold start, so that what DPO adds is not just more training
on these clips.

In    shards of prepare.py; with --base, a model folder (config.json + *.safetensors, Wan2.1's names)
Out   lora.safetensors, or with all weights trained config.json + diffusion_pytorch_model.safetensors; metrics.jsonl
Cost  one forward and backward a clip and step
"""

import dataclasses
import functools
import math

import torch

import flow
import model
from kernels.modulate import implementation
from runtime.files import verified, whole_file, write_json, write_tensors
from runtime.group import Group, local_batch, place, start_group
from runtime.options import SEED, UserError, option, program, resolve, user_errors
from runtime.run import Run
from runtime.shards import Shards, check_codec, codec_of, epochs, micro_batches
from runtime.train import Training
from sampling import previews_of_prompts
from wan.experts import check_times

WAN = dict(
    rank=128, batch_size=32, lr=1e-5, steps=375,  # the paper's, as one reader reports: 0.6 epochs of 20,000 clips
    layers="attn", warmup=20,  # chosen
)  # fmt: skip
PRESETS = {  # the LoRA cold start; see docs/method.md
    "tiny": dict(layers="all", rank=32, batch_size=32, steps=2000, lr=3e-3, warmup=50, t_mean=1.0),
    "1.3b": WAN,
    "14b": WAN,
    "a14b": WAN,
}
FROM_SCRATCH = {"tiny": dict(layers="all", rank=0, batch_size=32, steps=1500, lr=4e-3, warmup=100, t_mean=1.0)}


@dataclasses.dataclass(frozen=True)
class Config:
    """Plain flow matching: the LoRA cold start on a base, or a small base from scratch."""

    preset: str = option("tiny", choices=tuple(PRESETS))  # sets every option that is not given
    data: str = "out/demo/shards"  # shards of prepare.py
    split: str = option("train", choices=("train", "align", "eval"))  # which clips
    base: str = ""  # model folder to put the LoRA on; empty: from scratch, all weights
    out: str = option("out/demo/base", neutral=True)  # folder to write
    layers: str | None = option(choices=tuple(model.LORA_LAYERS))  # layers that get the LoRA
    rank: int | None = option(least=0, most=1024)  # LoRA rank, alpha = rank; 0: train all weights
    batch_size: int | None = option(least=1)  # clips a step, over all processes
    micro_batch: int = option(0, least=0, neutral=True)  # clips a forward and process; 0: all at once
    steps: int | None = option(least=1)  # optimiser steps
    lr: float | None = option(above=0)  # peak learning rate of AdamW
    warmup: int | None = option(least=0, most="steps")  # steps of linear warm-up; then a cosine to 0
    t_mean: float | None = option(least=-10, most=10)  # t ~ logit-normal(t_mean, 1); if nothing sets it, uniform
    t_shift: float = option(1.0, above=0)  # warp of the training times towards noise
    t_min: float = option(0.0, least=0, most=1)  # least training time, after the warp: a14b's high noise takes 0.875
    t_max: float = option(1.0, least=0, above="t_min", most=1)  # and most: low noise takes 0.875
    caption_dropout: float = option(0.0, least=0, most=1)  # share of clips that get the negative prompt for a caption
    checkpointing: bool = option(False, neutral=True)  # recompute activations in the backward: less memory, more time
    shard: bool = option(False, neutral=True)  # split the frozen weights over a node's processes: less memory
    compile: bool = option(False, neutral=True)  # torch.compile the network's blocks
    save_every: int = option(250, least=1, neutral=True)  # steps between checkpoints
    preview_every: int = option(0, least=0, neutral=True)  # steps between previews, at the start and end, too; 0: none
    preview_prompts: str = option("", neutral=True)  # text file of the previews' prompts, one on each line
    step_timeout: float = option(600.0, above=0, most=1e6, neutral=True)  # seconds a step waits for a stuck process
    seed: int = option(0, **SEED)  # of initialisation, order, noise and times


def flow_loss(net, x0, text, noise, t):
    """‖v − v_θ‖² averaged over C, F, H, W: (B,) float32.

    x0, noise (B, C, F, H, W), text (B, S, text_dim), t (B,).
    """
    error = net(flow.add_noise(x0, noise, t), t, text) - flow.velocity(x0, noise)
    return error.square().mean(dim=(1, 2, 3, 4))


def learning_rate(step: int, cfg) -> float:
    """Linear warm-up, then a cosine to 0."""
    return cfg.lr * min(1, (step + 1) / max(cfg.warmup, 1)) * 0.5 * (1 + math.cos(math.pi * step / cfg.steps))


def build(cfg, group: Group, shape: tuple[int, ...]) -> model.DiT:
    """The network with just what is to be trained requiring gradients."""
    if cfg.base:
        dtype = torch.bfloat16 if group.device.type == "cuda" and cfg.rank else torch.float32
        net = model.load_model(verified(cfg.base, "sft.py or wan.export"), dtype, group.device)
    else:
        net = model.init_from_scratch(model.DiT(model.PRESETS[cfg.preset]), cfg.seed).to(group.device)
    model.check_fits(net, cfg.preset, cfg.base, cfg.data, shape)
    if cfg.rank:
        seed = int(flow.generator("sft", "lora", cfg.seed).integers(2**32))  # another A in each stage
        model.add_lora(net, cfg.rank, cfg.rank, cfg.layers, seed)
    else:
        net.requires_grad_(True)
    net.gradient_checkpointing = cfg.checkpointing
    return place(net, cfg, group)


def main(cfg: Config) -> None:
    # ---- what to do, checked before anything is loaded
    scratch = not cfg.base and cfg.preset in FROM_SCRATCH
    cfg, asked = resolve(cfg, FROM_SCRATCH if scratch else PRESETS), cfg.batch_size
    check_times(cfg)
    if not cfg.base and (cfg.rank or not scratch):
        raise UserError("expected --base for a LoRA: only the tiny model is trained from scratch, with all its weights")
    group = start_group(implementation, cfg.step_timeout)
    local_batch(cfg, group)
    run = Run(cfg, "sft", group, {"data": cfg.data, "base": cfg.base})
    if run.done:
        return
    clips = Shards(cfg.data, "prepare.py", cfg.split)
    check_codec(cfg.base, cfg.data, clips.manifest)
    plan = epochs(len(clips), cfg, "clips", asked)
    negative = clips.negative() if cfg.caption_dropout else None
    previews = previews_of_prompts(cfg, run, clips.shape("x0"), cfg.data)
    with user_errors():
        net = build(cfg, group, clips.shape("x0"))

    # ---- what is trained, and how far it came before
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=cfg.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    training = Training(run, cfg, trained, optimizer, previews and functools.partial(previews, net))

    # ---- train
    for step in training.steps(plan):
        for index in micro_batches(len(clips), step, cfg, run, flow.generator):
            keys = [(run.stage, cfg.seed, step, clips.rows[i]["id"]) for i in index]
            x0 = clips.get("x0", index)
            text = flow.drop_captions(clips.states(index), keys, cfg.caption_dropout, negative)
            noise = flow.draw_noise(x0.shape[1:], keys)
            t = flow.draw_t(keys, cfg.t_mean, t_shift=cfg.t_shift, t_min=cfg.t_min, t_max=cfg.t_max)
            losses = flow_loss(net, *(a.to(group.device) for a in (x0, text, noise, t)))
            training.backward(losses, [clips.rows[i]["id"] for i in index])
        lr = learning_rate(step, cfg)
        if row := training.update(lr):
            training.log(row | {"lr": lr}, loss=f"{row['loss']:.4f}")

    # ---- result
    files = ["lora.safetensors"] if cfg.rank else ["config.json", model.WEIGHTS_NAME]
    if group.main and cfg.rank:
        with whole_file(run.folder / "lora.safetensors") as file:
            model.export_lora(model.trained_lora(net), file, base=cfg.base, beneath=net.loras, task="sft")
    elif group.main:
        write_json(run.folder / "config.json", model.wan_config(net.config))
        write_tensors(run.folder / model.WEIGHTS_NAME, net.state_dict(), model.weights_header(net.loras))
    facts = dict(clips=len(clips), codec=codec_of(clips.manifest))
    run.finish(files, f"{cfg.steps:,} steps", f"loss {run.recent('loss'):.4f}", **facts)


if __name__ == "__main__":
    program(main, Config, __doc__, PRESETS | {"tiny without --base": FROM_SCRATCH["tiny"]})

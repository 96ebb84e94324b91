"""Stage 1, the continuation model Φ: a frozen text-to-video model, LoRA and task prompts learn to go on from
given frames.

    M       (B, F): True on the given frames, the first n_cond, n_cond ~ U{1 … F−1}
    t'_i    = t·(1 − M_i)                         timestep masking: given frames see time 0
    x'_t,i  = (1 − t'_i)·x0_i + t'_i·noise_i      so they enter clean
    P_task  = M ⊙ P_cond + (1 − M) ⊙ P_noisy      learnable task prompts, one pair a latent frame
    L       = mean over generated frames of ‖ noise − x0 − v_Φ(x'_t, t', text, P_task) ‖²

    python continuation.py --base out/demo/base --data out/demo/shards --out out/demo/continuation
    torchrun --nproc_per_node 8 continuation.py --preset 1.3b --base Wan2.1-T2V-1.3B --data shards \\
        --out out/continuation

Why: a video's beginning is real whatever follows, so the same model continuing one clip from few and from many
given frames makes a worse and a better video of the same scene. Nobody has to label them.

In    a model folder, shards of prepare.py
Out   lora.safetensors, task_prompt.safetensors, metrics.jsonl
Cost  one forward and backward a clip and step
"""

import dataclasses
import functools
import math

import torch

import flow
import model
from kernels.modulate import implementation
from runtime.files import verified, whole_file
from runtime.group import Group, local_batch, place, start_group
from runtime.options import SEED, option, program, resolve, user_errors
from runtime.run import Run
from runtime.shards import Shards, check_codec, epochs, micro_batches
from runtime.train import Training
from sampling import previews_of_clips
from wan.experts import check_times

WAN = dict(
    rank=196, batch_size=16, lr=8e-5, steps=20_000,  # the paper's, as its readers report: 4 epochs of 80,000 clips
    layers="attn", warmup=200, prompts="text", attention="prefix",  # chosen
    caption_dropout=0.1,  # chosen, as Φ is sampled with guidance
)  # fmt: skip
PRESETS = {  # see docs/method.md
    "tiny": dict(
        layers="all", rank=32, batch_size=32, steps=200, lr=4e-3, warmup=20, t_mean=1.0, prompts="text",
        attention="prefix", caption_dropout=0.0,
    ),
    "1.3b": WAN,
    "14b": WAN,
    "a14b": WAN,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """Stage 1: trains LoRA and task prompts until the base continues a clip from given frames."""

    preset: str = option("tiny", choices=tuple(PRESETS))  # sets every option that is not given
    base: str = "out/demo/base"  # model folder; its weights stay frozen
    data: str = "out/demo/shards"  # shards of prepare.py
    split: str = option("train", choices=("train", "align", "eval"))  # which clips
    out: str = option("out/demo/continuation", neutral=True)  # folder to write
    layers: str | None = option(choices=tuple(model.LORA_LAYERS))  # layers that get the LoRA
    rank: int | None = option(least=1, most=1024)  # LoRA rank, alpha = rank
    prompts: str | None = option(choices=("text", "frame", "off"))  # where the task prompts are added
    attention: str | None = option(choices=model.ATTENTION)  # prefix: given frames see given frames alone; full: all
    batch_size: int | None = option(least=1)  # clips a step, over all processes
    micro_batch: int = option(0, least=0, neutral=True)  # clips a forward and process; 0: all at once
    steps: int | None = option(least=1)  # optimiser steps
    lr: float | None = option(above=0)  # peak learning rate of AdamW
    warmup: int | None = option(least=0, most="steps")  # steps of linear warm-up; then a cosine to 0
    t_mean: float | None = option(least=-10, most=10)  # t ~ logit-normal(t_mean, 1); if nothing sets it, uniform
    t_shift: float = option(1.0, above=0)  # warp of the training times towards noise
    t_min: float = option(0.0, least=0, most=1)  # least training time, after the warp: a14b's high noise takes 0.875
    t_max: float = option(1.0, least=0, above="t_min", most=1)  # and most: low noise takes 0.875
    caption_dropout: float | None = option(least=0, most=1)  # share of clips that get the negative prompt for a caption
    checkpointing: bool = option(False, neutral=True)  # recompute activations in the backward: less memory, more time
    shard: bool = option(False, neutral=True)  # split the frozen weights over a node's processes: less memory
    compile: bool = option(False, neutral=True)  # torch.compile the network's blocks
    save_every: int = option(250, least=1, neutral=True)  # steps between checkpoints
    preview_every: int = option(0, least=0, neutral=True)  # steps between previews: --data's first clips, continued
    step_timeout: float = option(600.0, above=0, most=1e6, neutral=True)  # seconds a step waits for a stuck process
    seed: int = option(0, **SEED)  # of initialisation, order, noise, times and n_cond


def draw_cond_mask(keys: list[tuple], frames: int) -> torch.Tensor:
    """(B, F) bool with the first n_cond ~ U{1 … F−1} frames of each sample True: one given, one to generate
    at least.
    """
    n_cond = torch.tensor([flow.generator("n_cond", *key).integers(1, frames) for key in keys])
    return torch.arange(frames) < n_cond[:, None]


def continuation_loss(net, x0, text, noise, t, cond_mask):
    """‖v − v_Φ‖² averaged over C, H, W and the generated frames: (B,) float32.

    x0, noise (B, C, F, H, W), text (B, S, text_dim), t (B,), cond_mask (B, F) bool.
    """
    x_t = flow.add_noise(x0, noise, t[:, None] * ~cond_mask)
    error = net(x_t, t, text, cond_mask) - flow.velocity(x0, noise)
    error = torch.where(cond_mask[:, None, :, None, None], 0, error)  # selected before it is squared
    return error.square().mean(dim=(1, 3, 4)).sum(1) / (~cond_mask).sum(1)


def learning_rate(step: int, cfg) -> float:
    """Linear warm-up, then a cosine to 0."""
    return cfg.lr * min(1, (step + 1) / max(cfg.warmup, 1)) * 0.5 * (1 + math.cos(math.pi * step / cfg.steps))


def build(cfg, group: Group, shape: tuple[int, ...]) -> model.DiT:
    """The network with just what is to be trained requiring gradients."""
    dtype = torch.bfloat16 if group.device.type == "cuda" else torch.float32
    net = model.load_model(verified(cfg.base, "sft.py or wan.export"), dtype, group.device)
    model.check_fits(net, cfg.preset, cfg.base, cfg.data, shape)
    seed = int(flow.generator("continuation", "lora", cfg.seed).integers(2**32))  # another A in each stage
    model.add_lora(net, cfg.rank, cfg.rank, cfg.layers, seed)
    if cfg.prompts != "off":
        model.add_task_prompt(net, shape[1], cfg.prompts)
    net.prefix = cfg.attention == "prefix"
    net.gradient_checkpointing = cfg.checkpointing
    return place(net, cfg, group)


def main(cfg: Config) -> None:
    # ---- what to do, checked before anything is loaded
    cfg, asked = resolve(cfg, PRESETS), cfg.batch_size
    check_times(cfg)
    group = start_group(implementation, cfg.step_timeout)
    local_batch(cfg, group)
    run = Run(cfg, "continuation", group, {"data": cfg.data, "base": cfg.base})
    if run.done:
        return
    clips = Shards(cfg.data, "prepare.py", cfg.split)
    check_codec(cfg.base, cfg.data, clips.manifest)
    plan = epochs(len(clips), cfg, "clips", asked)
    negative = clips.negative() if cfg.caption_dropout else None
    previews = previews_of_clips(cfg, run, clips)
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
            cond_mask = draw_cond_mask(keys, x0.shape[2])
            losses = continuation_loss(net, *(a.to(group.device) for a in (x0, text, noise, t, cond_mask)))
            training.backward(losses, [clips.rows[i]["id"] for i in index])
        lr = learning_rate(step, cfg)
        if row := training.update(lr):
            training.log(row | {"lr": lr}, loss=f"{row['loss']:.4f}")

    # ---- result
    files = ["lora.safetensors"] + ["task_prompt.safetensors"] * (cfg.prompts != "off")
    if group.main:
        with whole_file(run.folder / "lora.safetensors") as file:
            facts = dict(base=cfg.base, beneath=net.loras, task="continuation", attention=cfg.attention)
            model.export_lora(model.trained_lora(net), file, **facts)
        if cfg.prompts != "off":
            with whole_file(run.folder / "task_prompt.safetensors") as file:
                model.save_task_prompt(net, file)
    run.finish(files, f"{cfg.steps:,} steps", f"loss {run.recent('loss'):.4f}")


if __name__ == "__main__":
    program(main, Config, __doc__, PRESETS)

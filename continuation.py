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
import math

import torch

import flow
import model
from experiments import cost
from runtime import run as common
from runtime import shards as data
from runtime.run import UserError

PRESETS = {  # tiny: see README; 1.3b, 14b: the paper's numbers, as its readers report them
    "tiny": dict(layers="all", rank=64, batch_size=32, steps=1500, lr=4e-3, warmup=50, t_mean=2.0, prompts="context"),
    "1.3b": dict(layers="attn", rank=196, batch_size=16, steps=20_000, lr=8e-5, warmup=200, prompts="context"),
    "14b": dict(layers="attn", rank=196, batch_size=16, steps=20_000, lr=8e-5, warmup=200, prompts="context"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Stage 1: trains LoRA and task prompts until the base continues a clip from given frames."""

    preset: str = "tiny"  # tiny, 1.3b or 14b: what every option that is not given stands at
    base: str = "out/demo/base"  # model folder; its weights stay frozen
    data: str = "out/demo/shards"  # shards of prepare.py
    split: str = "train"  # which clips: train, align or eval
    out: str = "out/demo/continuation"  # folder to write
    layers: str | None = None  # layers that get the LoRA: attn, attn+ffn or all
    rank: int | None = None  # LoRA rank, alpha = rank
    prompts: str | None = None  # where the task prompts go: context (padding slots of the text), frame (tokens) or off
    batch_size: int | None = None  # clips a step, over all processes
    micro_batch: int = 0  # clips a forward and process; 0: all at once
    steps: int | None = None  # optimiser steps
    lr: float | None = None  # peak learning rate of AdamW
    warmup: int | None = None  # steps of linear warm-up; then a cosine to 0
    t_mean: float | None = None  # t ~ logit-normal(t_mean, 1); not given and not in the preset: uniform
    t_shift: float = 1.0  # warp of the training times towards noise
    checkpointing: bool = False  # recompute activations in the backward: less memory, more time
    save_every: int = 250  # steps between checkpoints
    seed: int = 0  # of initialisation, order, noise, times and n_cond
    dry_run: bool = False  # print what it will cost, and stop: nothing is loaded or written


def draw_cond_mask(keys: list[tuple], frames: int) -> torch.Tensor:
    """(B, F) bool with the first n_cond ~ U{1 … F−1} frames of each sample True: one given, one to generate
    at least.
    """
    n_cond = [torch.randint(1, frames, (), generator=flow.generator("n_cond", *key)) for key in keys]
    return torch.arange(frames) < torch.stack(n_cond)[:, None]


def continuation_loss(net, x0, text, noise, t, cond_mask):
    """‖v − v_Φ‖² averaged over C, H, W and the generated frames: (B,) float32.

    x0, noise (B, C, F, H, W), text (B, S, text_dim), t (B,), cond_mask (B, F) bool.
    """
    x_t = flow.add_noise(x0, noise, t[:, None] * ~cond_mask)
    error = net(x_t, t, text, cond_mask) - flow.velocity(x0, noise)
    error = torch.where(cond_mask[:, None, :, None, None], 0, error)  # selected before it is squared
    return error.square().mean(dim=(1, 3, 4)).sum(1) / (~cond_mask).sum(1)


def example_loss(net, x0, text, noise, t):
    """`continuation_loss` of clips of these sizes: what `--dry-run` counts."""
    return continuation_loss(net, x0, text, noise, t, torch.zeros(len(x0), x0.shape[2], dtype=torch.bool))


def learning_rate(step: int, cfg) -> float:
    """Linear warm-up, then a cosine to 0."""
    return cfg.lr * min(1, (step + 1) / max(cfg.warmup, 1)) * 0.5 * (1 + math.cos(math.pi * step / cfg.steps))


def build(cfg, group: common.Group, shape: tuple[int, ...]) -> model.DiT:
    """The network with just what is to be trained requiring gradients."""
    dtype = torch.bfloat16 if group.device.type == "cuda" else torch.float32
    net = model.load_model(cfg.base, dtype, group.device)
    model.check_preset(net, cfg.preset, cfg.base)
    if shape[0] != net.config.in_dim:
        raise UserError(f"{cfg.data}: expected latents of {net.config.in_dim} channels for this model, got {shape[0]}")
    model.add_lora(net, cfg.rank, cfg.rank, cfg.layers, cfg.seed)
    if cfg.prompts != "off":
        model.add_task_prompt(net, shape[1], cfg.prompts)
    net.gradient_checkpointing = cfg.checkpointing
    return net


def main(cfg: Config) -> None:
    # ---- what to do, checked before anything is loaded
    cfg = common.resolve(cfg, PRESETS)
    if cfg.prompts not in ("context", "frame", "off"):
        raise UserError(f"--prompts: expected context, frame or off, got {cfg.prompts!r}")
    if cfg.dry_run:
        return cost.training(cfg, "continuation", example_loss)
    group = common.start_group()
    per_process, forwards = common.local_batch(cfg, group)
    run = common.Run(cfg, "continuation", group, {"data": cfg.data, "base": cfg.base})
    if run.done:
        return
    shards = data.Shards(cfg.data, "prepare.py", cfg.split, verify=group.main)
    net = build(cfg, group, shards.shape("x0"))

    # ---- what is trained, and how far it came before
    names, parameters = zip(*[(n, p) for n, p in net.named_parameters() if p.requires_grad])
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    first, state = run.resume()
    if state:
        common.unpack_state(state, names, parameters, optimizer)

    # ---- train
    bar = run.progress(cfg.steps, first)
    for step in range(first, cfg.steps):
        order = data.batch_order(len(shards), cfg.batch_size, step, cfg.seed)
        mine = order[group.rank * per_process : (group.rank + 1) * per_process]
        total = 0.0
        for part in torch.tensor(mine).chunk(forwards):
            part = part.tolist()
            keys = [(cfg.seed, step, shards.rows[i]["id"]) for i in part]
            x0, text = shards.get("x0", part), shards.text(part)
            noise = flow.draw_noise(x0.shape[1:], keys)
            t = flow.draw_t(keys, cfg.t_mean, t_shift=cfg.t_shift)
            cond_mask = draw_cond_mask(keys, x0.shape[2])
            losses = continuation_loss(net, *(a.to(group.device) for a in (x0, text, noise, t, cond_mask)))
            (losses.sum() / cfg.batch_size).backward()
            total += losses.detach().sum().item()
        group.sum_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg)
        optimizer.step()
        optimizer.zero_grad()

        # ---- log, save
        loss = group.sum({"loss": total})["loss"] / cfg.batch_size
        run.log(step + 1, loss=loss, grad_norm=norm.item(), lr=learning_rate(step, cfg))
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        bar.update()
        if (step + 1) % cfg.save_every == 0 and step + 1 < cfg.steps:
            run.save(step + 1, common.pack_state(names, parameters, optimizer))
    bar.close()

    # ---- result
    files = ["lora.safetensors"] + ["task_prompt.safetensors"] * (cfg.prompts != "off")
    if group.main:
        model.export_lora(net, run.folder / "lora.safetensors", base=cfg.base, task="continuation")
        if cfg.prompts != "off":
            model.save_task_prompt(net, run.folder / "task_prompt.safetensors")
    run.finish(files)


if __name__ == "__main__":
    common.run(main, Config, __doc__)

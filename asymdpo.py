"""Stage 3, Asymmetrical DPO: the text-to-video model learns from pairs, on the frames where winner and loser differ.

    e_i(f; x) = mean over C, H, W of (v_i − f(x_t, t, text)_i)²           v = noise − x0, one t for the clip
    d_i       = e_i(policy; x) − e_i(ref; x)
    S         = Σ_{i ≥ N1} (d_i^w − d_i^l),   K = F − N1
    outside:  L = softplus(β·S) / K   (as printed)       inside:  L = softplus(β·S / K)
    with --sft_weight λ:  L + λ·β/2 · Σ_{i ≥ N1} e_i(policy; x^w) / K   (λ: 1 at the tiny preset, 0 at Wan's)

    frames of a pair:  ① i < N1: the same real frames, no loss
                       ② N1 ≤ i < N2: real against generated     ③ i ≥ N2: both generated

    python asymdpo.py --base out/demo/base --sft out/demo/sft --pairs out/demo/pairs --out out/demo/asymdpo
    torchrun --nproc_per_node 8 asymdpo.py --preset 1.3b --base Wan2.1-T2V-1.3B --sft out/sft --pairs out/pairs \\
        --out out/asymdpo

How this differs from the loss as the paper prints it: a reference is subtracted (the SFT model, whose LoRA is a part of
the frozen base, so that "LoRA off" is the reference), and errors are means over C, H, W, not sums; the tiny preset adds
the winner's own loss, λ. docs/choices.md gives reasons. The forward is plain text-to-video: every frame is noised at
one t, no frame is given and there are no task prompts; only the loss is masked. Winner and loser of a pair see the same
noise and the same t.

What step 0 must read: policy equals reference, so S = 0 exactly, and the loss is ln 2 / K (outside) or ln 2 (inside),
plus λ's term.

In    a model folder, a finished sft.py folder (its LoRA), pairs of make_pairs.py or prepare.py --pairs
Out   lora.safetensors (on top of base + SFT), metrics.jsonl
Cost  two forwards and backwards of the policy and two forwards of the reference a pair
"""

import dataclasses
import functools
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import flow
import model
from kernels.modulate import implementation
from kernels.region_dpo import region_dpo
from runtime.files import read_manifest, whole_file
from runtime.group import Group, local_batch, place, start_group
from runtime.options import SEED, UserError, listed, option, program, resolve, user_errors
from runtime.run import Run
from runtime.shards import Shards, check_codec, epochs, micro_batches
from runtime.train import Training
from sampling import previews_of_prompts
from wan.experts import check_times, tell_of_others
from wan.lora import load_adapted

WAN = dict(
    rank=128, batch_size=32, lr=5e-6, beta=800.0, steps=625,  # the paper's, as one reader reports: 20,000 pairs, once
    form="outside", sft_weight=0.0,  # as the paper prints it
    layers="attn", warmup=20, decay="none",  # chosen
)  # fmt: skip
PRESETS = {  # see docs/method.md
    "tiny": dict(
        layers="all", rank=32, batch_size=16, steps=200, lr=1e-3, warmup=20, decay="cosine", beta=5.0, form="inside",
        sft_weight=1.0, t_mean=1.0,
    ),
    "1.3b": WAN,
    "14b": WAN,
    "a14b": WAN,
}  # fmt: skip
BUCKETS = 4  # t in [0, ¼), [¼, ½), [½, ¾), [¾, 1]: what is logged is split by these


@dataclasses.dataclass(frozen=True)
class Config:
    """Stage 3: trains the text-to-video model by Asymmetrical DPO."""

    preset: str = option("tiny", choices=tuple(PRESETS))  # sets every option that is not given
    base: str = "out/demo/base"  # model folder; its weights stay frozen
    sft: str = option("out/demo/sft", empty=True)  # LoRAs of the cold start, separated by commas; empty: none
    pairs: str = "out/demo/pairs"  # folder of make_pairs.py, or of prepare.py --pairs
    out: str = option("out/demo/asymdpo", neutral=True)  # folder to write
    beta: float | None = option(above=0)  # DPO temperature
    form: str | None = option(choices=("outside", "inside"))  # where 1/K stands: see the equations above
    region: str = option("23", choices=("123", "23", "3"))  # frames in the loss: 123 all, 23 from N1, 3 from N2
    reference_free: bool = False  # leave the reference out, as in the loss as printed
    sft_weight: float | None = option(least=0)  # λ: weight of the winner's own loss; 1: DPO's own pull on it at step 0
    layers: str | None = option(choices=tuple(model.LORA_LAYERS))  # layers that get the LoRA
    rank: int | None = option(least=1, most=1024)  # LoRA rank, alpha = rank
    batch_size: int | None = option(least=1)  # pairs a step, over all processes
    micro_batch: int = option(0, least=0, neutral=True)  # pairs a forward and process; 0: all at once
    steps: int | None = option(least=1)  # optimiser steps
    lr: float | None = option(above=0)  # learning rate of AdamW
    warmup: int | None = option(least=0, most="steps")  # steps of linear warm-up
    decay: str | None = option(choices=("none", "cosine"))  # what the learning rate does after the warm-up
    t_mean: float | None = option(least=-10, most=10)  # t ~ logit-normal(t_mean, 1); if nothing sets it, uniform
    t_shift: float = option(1.0, above=0)  # warp of the training times towards noise
    t_min: float = option(0.0, least=0, most=1)  # least training time, after the warp: a14b's high noise takes 0.875
    t_max: float = option(1.0, least=0, above="t_min", most=1)  # and most: low noise takes 0.875
    checkpointing: bool = option(False, neutral=True)  # recompute activations in the backward: less memory, more time
    shard: bool = option(False, neutral=True)  # split the frozen weights over a node's processes: less memory
    compile: bool = option(False, neutral=True)  # torch.compile the network's blocks
    save_every: int = option(50, least=1, neutral=True)  # steps between checkpoints
    preview_every: int = option(0, least=0, neutral=True)  # steps between previews, at the start and end, too; 0: none
    preview_prompts: str = option("", neutral=True)  # text file of the previews' prompts, one on each line
    preview_data: str = option("out/demo/shards", neutral=True)  # tiny: folder with the codec, if --pairs has none
    step_timeout: float = option(600.0, above=0, most=1e6, neutral=True)  # seconds a step waits for a stuck process
    seed: int = option(0, **SEED)  # of initialisation, order, noise and times


def predict(net, chosen, rejected, text, noise, t) -> tuple[Tensor, ...]:
    """Velocities of policy and reference at the same noise and t: v_w, v_l, ref_w, ref_l, target_w, target_l, each
    (B, C, F, H, W).

    chosen, rejected, noise (B, C, F, H, W), text (B, S, text_dim), t (B,). The reference is net without its LoRA.
    """
    x0 = torch.cat([chosen, rejected])
    noise, t, text = noise.repeat(2, 1, 1, 1, 1), t.repeat(2), text.repeat(2, 1, 1)
    x_t, target = flow.add_noise(x0, noise, t), flow.velocity(x0, noise)
    with torch.no_grad(), model.lora_off(net):
        ref = net(x_t, t, text)
    return *net(x_t, t, text).chunk(2), *ref.chunk(2), *target.chunk(2)


def first_frame(region: str, n1: Tensor, n2: Tensor) -> Tensor:
    """The first frame in the loss (B,), for the given frames of loser and winner, n1 and n2 (B,)."""
    return {"123": torch.zeros_like(n1), "23": n1, "3": n2}[region]


def asymdpo_loss(cfg, prediction, n1, n2) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss (B,) of the pairs, and its detached parts, as `region_dpo` gives them.

    prediction: of `predict`. n1, n2 (B,) integers: the given frames of loser and winner.

    --sft_weight λ adds λ·β/2 times the winner's error, averaged over the K frames in the loss. At S = 0 the derivative
    of L by that average is β/2 in both forms, so λ = 1 doubles DPO's own pull on the winner.
    """
    v_w, v_l, ref_w, ref_l, target_w, target_l = prediction
    if cfg.reference_free:
        ref_w, ref_l = target_w, target_l  # an error of 0
    start = first_frame(cfg.region, n1, n2)
    loss, parts = region_dpo(v_w, v_l, ref_w, ref_l, target_w, target_l, start, cfg.beta, cfg.form)
    if cfg.sft_weight:
        keep = torch.arange(v_w.shape[2], device=v_w.device) >= start[:, None]
        error = torch.where(keep[:, None, :, None, None], v_w - target_w, 0)  # selected before it is squared
        loss = loss + cfg.sft_weight * cfg.beta / 2 * error.square().mean(dim=(1, 3, 4)).sum(1) / keep.sum(1)
    return loss, parts


def learning_rate(step: int, cfg) -> float:
    """Linear warm-up; with --decay cosine also a cosine to 0."""
    lr = cfg.lr * min(1, (step + 1) / max(cfg.warmup, 1))
    return lr * 0.5 * (1 + math.cos(math.pi * step / cfg.steps)) if cfg.decay == "cosine" else lr


@torch.no_grad()
def size_of_B(net: model.DiT) -> float:
    """Root mean square of B in the LoRA that is being trained; 0 at the start."""
    every = [term.B for term in model.trained_lora(net).values()]
    return torch.nn.utils.get_total_norm(every).item() / math.sqrt(sum(B.numel() for B in every))


def build(cfg, group: Group, shape: tuple[int, ...]) -> model.DiT:
    """The base with the cold start on it, frozen, and a fresh LoRA: LoRA off is the reference."""
    dtype = torch.bfloat16 if group.device.type == "cuda" else torch.float32
    starts = [Path(folder) / "lora.safetensors" for folder in listed(cfg.sft, "sft")]
    tell_of_others(cfg.base, starts)
    net = load_adapted(cfg.base, starts, dtype, group.device)
    model.check_fits(net, cfg.preset, cfg.base, cfg.pairs, shape)
    seed = int(flow.generator("asymdpo", "lora", cfg.seed).integers(2**32))  # another A in each stage
    model.add_lora(net, cfg.rank, cfg.rank, cfg.layers, seed)
    net.gradient_checkpointing = cfg.checkpointing
    return place(net, cfg, group)


def repeated(cfg, pairs: int) -> str | None:
    """A sentence if the pairs are used clearly more often than the paper's, which are used once.

    None at the preset tiny, which is tuned for several epochs.
    """
    times = cfg.steps * cfg.batch_size / pairs
    if cfg.preset == "tiny" or times < 1.1:  # a split by hash has about the size that was asked for
        return None
    once = f"--steps {math.ceil(pairs / cfg.batch_size)}"
    return f"asymdpo: warning: each pair is used {times:.1f} times, but once in the paper; for one epoch give {once}"


# ---- what is logged --------------------------------------------------------------------------------------------------


def summarise(parts, loss, t, n1, n2, start, beta: float) -> dict[str, Tensor]:
    """The sum of everything that is logged, and under `name#` how many values are in it: `averages` divides them.

    Per region ② and ③, winner and loser: the errors of policy and reference and their difference d; d by time bucket;
    and so `acc`, the share of pairs whose winner gained on the loser. Frames before start, which have no error, are
    left out.
    """
    K, frame = parts["diff/w"].shape[1] - start, torch.arange(parts["diff/w"].shape[1], device=t.device)
    in_loss, bucket = frame >= start[:, None], (t * BUCKETS).long().clamp(max=BUCKETS - 1)
    logged = {}  # name -> values, and which of them count
    for region, where in {"2": (frame >= n1[:, None]) & (frame < n2[:, None]), "3": frame >= n2[:, None]}.items():
        where = where & in_loss
        for name in ("err/w_policy", "err/w_ref", "err/l_policy", "err/l_ref", "diff/w", "diff/l"):
            logged[f"{name}/{region}"] = parts[name], where
        gap = torch.where(where, parts["diff/w"] - parts["diff/l"], 0).sum(1)
        for b in range(BUCKETS):
            inside = bucket == b
            logged[f"diff/w/{region}/t{b}"] = parts["diff/w"], where & inside[:, None]
            logged[f"diff/l/{region}/t{b}"] = parts["diff/l"], where & inside[:, None]
            logged[f"acc/{region}/t{b}"] = (1 - gap.sign()) / 2, where.any(1) & inside
    S, every = parts["S"], torch.ones_like(loss, dtype=torch.bool)
    pairs = {
        "loss": loss.detach(), "S": S, "S_abs": S.abs(), "softplus": F.softplus(beta * S),
        "saturated": ((beta * S).abs() > 10).float(), "rewards/accuracies": (1 - S.sign()) / 2,
        "rewards/chosen": -beta * parts["diff/w"].sum(1) / K, "rewards/rejected": -beta * parts["diff/l"].sum(1) / K,
        "rewards/margins": parts["margin"],
    }  # fmt: skip
    logged |= {name: (values, every) for name, values in pairs.items()}
    sums = {name: torch.where(where, values, 0).sum() for name, (values, where) in logged.items()}
    return sums | {f"{name}#": where.sum() for name, (_, where) in logged.items()}


def averages(sums: dict[str, float]) -> dict[str, float]:
    """Means of what `summarise` summed, without those that have no value in them."""
    return {name: value / sums[f"{name}#"] for name, value in sums.items() if sums.get(f"{name}#")}


def explain(cfg, step: int, row: dict[str, float]) -> str | None:
    """A sentence for whoever watches the run, at the step that calls for one."""
    if step == 0:
        expected = "anything: there is no reference" if cfg.reference_free else "exactly 0"
        at_ln2 = "ln 2 / K" if cfg.form == "outside" else "ln 2 = 0.6931"
        at_ln2 += f" and {cfg.sft_weight * cfg.beta / 2:g} times the flow-matching loss" if cfg.sft_weight else ""
        return f"step 0: S = {row['S']:g} (expected {expected}), loss {row['loss']:.4f} (expected {at_ln2})"
    if step == max(50, 2 * cfg.warmup):
        # AdamW's steps are its rate long, unless the gradient is near its eps of 1e-8; this far they lead at random
        walk = math.sqrt(sum(learning_rate(i, cfg) ** 2 for i in range(step)))
        if not row["lora_B"] > walk / 10:
            return (
                f"stuck: after {step} steps the LoRA's B is {row['lora_B']:.1e}, AdamW's steps come to {walk:.1e} even "
                f"at random; grad_norm is {row['grad_norm']:.1e}: lower --beta if pairs are saturated, else look for "
                "what holds the gradient back"
            )
    if cfg.form == "outside" and row["saturated"] > 0.5 and step % 50 == 0:  # inside, the sigmoid sees beta S / K
        return (
            f"saturated: |beta S| > 10 for {row['saturated']:.0%} of the pairs, they no longer teach; "
            "lower --beta or use --form inside"
        )
    return None


# ---- the stage -------------------------------------------------------------------------------------------------------


def main(cfg: Config) -> None:
    # ---- what to do, checked before anything is loaded
    cfg, asked = resolve(cfg, PRESETS), cfg.batch_size
    check_times(cfg)
    group = start_group(implementation, cfg.step_timeout)
    local_batch(cfg, group)
    starts = listed(cfg.sft, "sft")
    run = Run(cfg, "asymdpo", group, {"pairs": cfg.pairs, "base": cfg.base, "sft": starts})
    if run.done:
        return
    for name in starts:
        read_manifest(name, "sft.py --base, asymdpo.py or experiments.baselines")
    pairs = Shards(cfg.pairs, "make_pairs.py or prepare.py --pairs")
    check_codec(cfg.base, cfg.pairs, pairs.manifest)
    frames = pairs.shape("chosen")[1]
    usable = [i for i, row in enumerate(pairs.rows) if cfg.region != "3" or row["n2"] < frames]
    if not usable:
        got = "expected winners with generated frames for --region 3, got none; give --region 23"
        raise UserError(f"{cfg.pairs}: {got}")
    plan = epochs(len(usable), cfg, "pairs", asked)
    if group.main and (sentence := repeated(cfg, len(usable))):
        print(sentence, file=sys.stderr)
    previews = previews_of_prompts(cfg, run, pairs.shape("chosen"), cfg.pairs, cfg.preview_data)
    with user_errors():
        net = build(cfg, group, pairs.shape("chosen"))

    # ---- what is trained, and how far it came before
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=cfg.lr, betas=(0.9, 0.999), weight_decay=0.01, fused=True)
    training = Training(run, cfg, trained, optimizer, previews and functools.partial(previews, net))

    # ---- train
    for step in training.steps(plan):
        sums: dict[str, Tensor] = {}
        for places in micro_batches(len(usable), step, cfg, run, flow.generator):
            index = [usable[i] for i in places]
            keys = [(run.stage, cfg.seed, step, pairs.rows[i]["id"]) for i in index]
            chosen, rejected, text = pairs.get("chosen", index), pairs.get("rejected", index), pairs.text(index)
            noise = flow.draw_noise(chosen.shape[1:], keys)
            t = flow.draw_t(keys, cfg.t_mean, t_shift=cfg.t_shift, t_min=cfg.t_min, t_max=cfg.t_max)
            n1, n2 = (torch.tensor([pairs.rows[i][n] for i in index], device=group.device) for n in ("n1", "n2"))
            prediction = predict(net, *(a.to(group.device) for a in (chosen, rejected, text, noise, t)))
            losses, parts = asymdpo_loss(cfg, prediction, n1, n2)
            training.backward(losses, [pairs.rows[i]["id"] for i in index])
            start = first_frame(cfg.region, n1, n2)
            for name, value in summarise(parts, losses, t.to(group.device), n1, n2, start, cfg.beta).items():
                sums[name] = sums.get(name, 0) + value
        lr = learning_rate(step, cfg)
        if row := training.update(lr, sums):
            row = averages(row) | {"lora_B": size_of_B(net), "grad_norm": row["grad_norm"], "lr": lr}
            training.log(row, loss=f"{row['loss']:.4f}", acc=f"{row['rewards/accuracies']:.2f}")
            if sentence := explain(cfg, step, row):
                training.say(sentence)

    # ---- result
    if group.main:
        with whole_file(run.folder / "lora.safetensors") as file:
            model.export_lora(
                model.trained_lora(net), file, base=cfg.base, sft=cfg.sft, beneath=net.loras, task="asymdpo"
            )
    known = {name: pairs.manifest[name] for name in ("window", "frames") if name in pairs.manifest}
    right = f"loss {run.recent('loss'):.4f}, {100 * run.recent('rewards/accuracies'):.0f} % of pairs right"
    run.finish(["lora.safetensors"], f"{cfg.steps:,} steps", right, pairs=len(usable), **known)


if __name__ == "__main__":
    program(main, Config, __doc__, PRESETS)

"""The baselines: DPO on two clips and a label that says who won. Read it beside asymdpo.py: the rest is the same.

    e_i(f; x) = mean over C, H, W of (v_i − f(x_t, t, text)_i)²           v = noise − x0, one t for the clip
    d_i       = e_i(policy; x) − e_i(ref; x)
    label_i   = 1 where the first sample won, −1 where the second did, 0 for a tie; one for the clip or for each segment
    S         = Σ_i label_i · (d_i^first − d_i^second),   K = number of frames that are not tied

    --loss flow    L = softplus(β/2 · S / K)     Flow-DPO (arXiv 2501.13918); StructuralDPO (2506.03517) on structural
                                                 pairs; Reg-DPO (2511.01450) on real ones, with --sft_weight
    --loss dense   L = softplus(β · S / K)       DenseDPO (2506.03517), on structural pairs labelled by segment;
                                                 LocalDPO (2601.04068), on local pairs labelled by frame

    python -m experiments.pairs --kind flow --lora out/demo/sft --out out/baseline/pairs
    python -m experiments.labels --pairs out/baseline/pairs --scorer exact --out out/baseline/labels
    python -m experiments.baselines --loss flow --beta 100 --pairs out/baseline/pairs --labels out/baseline/labels \\
        --sft out/demo/sft --out out/baseline/dpo

How this differs from asymdpo.py: a label says who won, and all frames but the tied ones are in the loss. As in
DenseDPO, a clip is left out unless more than a fifth of its frames has a label. --sft_weight λ adds λ·L'(0) times the
flow-matching loss of the real clip, all of its frames, at the pair's noise and t: L'(0), the derivative of L by the
winner's mean error at S = 0, is β/4 for flow and β/2 for dense. So λ = 1 is DPO's own pull there, as in asymdpo.py.

What step 0 must read: policy equals reference, so S = 0 exactly, and the loss is ln 2, plus λ's term.

In    a model folder, a finished sft.py folder (its LoRA), pairs of experiments.pairs, labels of experiments.labels
Out   lora.safetensors (on top of base + SFT), metrics.jsonl
Cost  two forwards and backwards of the policy and two forwards of the reference a pair; with --sft_weight one more of
      the policy, unless the real clip is a side of the pair
"""

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import flow
import model
from asymdpo import BUCKETS, PRESETS, averages, build, explain, learning_rate, predict, size_of_B
from experiments.pairs import CLIP
from kernels.modulate import implementation
from kernels.region_dpo import frame_errors
from runtime.files import read_jsonl, read_manifest, whole_file
from runtime.group import local_batch, start_group
from runtime.options import SEED, UserError, listed, option, program, resolve, user_errors
from runtime.run import Run
from runtime.shards import Shards, epochs, micro_batches
from runtime.train import Training
from sft import flow_loss

LABELLED = 0.2  # a clip is kept if more than this share of its frames has a label


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains the text-to-video model by Flow-DPO, DenseDPO or one of their siblings."""

    preset: str = option("tiny", choices=tuple(PRESETS))  # sets every option that is not given
    base: str = "out/demo/base"  # model folder; its weights stay frozen
    sft: str = option("out/demo/sft", empty=True)  # LoRAs of the cold start, separated by commas; empty: none
    pairs: str = "out/baseline/pairs"  # folder of experiments.pairs
    labels: str = "out/baseline/labels"  # folder of experiments.labels
    out: str = option("out/baseline/dpo", neutral=True)  # folder to write
    loss: str = option("flow", choices=("flow", "dense"))  # flow: Flow-DPO, a label a clip; dense: DenseDPO
    beta: float | None = option(above=0)  # DPO temperature; flow halves it
    sft_weight: float | None = option(least=0)  # λ: weight of the clip's own loss; 1: DPO's pull on a winner at step 0
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
    checkpointing: bool = option(False, neutral=True)  # recompute activations in the backward: less memory, more time
    shard: bool = option(False, neutral=True)  # split the frozen weights over a node's processes: less memory
    compile: bool = option(False, neutral=True)  # torch.compile the network's blocks
    save_every: int = option(50, least=1, neutral=True)  # steps between checkpoints
    step_timeout: float = option(600.0, above=0, most=1e6, neutral=True)  # seconds a step waits for a stuck process
    seed: int = option(0, **SEED)  # of initialisation, order, noise and times

    form, reference_free = "inside", False  # not options: asymdpo.explain asks for them


def temperature(cfg) -> float:
    """What S / K is multiplied by."""
    return cfg.beta / 2 if cfg.loss == "flow" else cfg.beta


def baseline_loss(cfg, prediction, label: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss (B,) of the pairs, and its detached parts: by frame, 0 where it is tied, or by pair.

    prediction: `asymdpo.predict` of first and second. label (B, F): 1 where first won, -1 where second did, 0 for a
    tie; no pair may be tied everywhere.
    """
    labelled, first_won = label != 0, label > 0
    # selected before anything is computed: whatever stands in a tied frame reaches no gradient
    prediction = [torch.where(labelled[:, None, :, None, None], a, 0) for a in prediction]
    start = torch.zeros(len(label), dtype=torch.int64, device=label.device)
    first, second = (frame_errors(*prediction[side::2], start) for side in (0, 1))  # v, ref, target of each
    d_w, policy_w, reference_w = (torch.where(first_won, a, b) for a, b in zip(first, second))
    d_l, policy_l, reference_l = (torch.where(first_won, b, a) for a, b in zip(first, second))
    S, K = (d_w - d_l).sum(1), labelled.sum(1)
    beta = temperature(cfg)
    loss = F.softplus(beta * S / K)
    parts = {
        "err/w_policy": policy_w, "err/w_ref": reference_w, "diff/w": d_w,
        "err/l_policy": policy_l, "err/l_ref": reference_l, "diff/l": d_l, "S": S, "rewards/margins": -beta * S / K,
        "rewards/chosen": -beta * d_w.sum(1) / K, "rewards/rejected": -beta * d_l.sum(1) / K,
    }  # fmt: skip
    return loss, {name: a.detach() for name, a in parts.items()}


def clip_loss(net, prediction, x0, text, noise, t) -> Tensor:
    """The policy's flow-matching loss (B,) of the real clips x0 (B, C, F, H, W), or None where they are the first side.

    prediction: `asymdpo.predict` of the pairs; text, noise, t as there.
    """
    if x0 is None:
        return (prediction[0] - prediction[4]).square().mean(dim=(1, 2, 3, 4))
    return flow_loss(net, x0, text, noise, t)


def read_labels(cfg, made_of: str) -> Tensor:
    """A label for each pair and frame (pairs, F): 1 if the first is better, -1 if the second is, 0 for a tie.

    made_of: the identity of the pairs' folder. UserError unless pairs, labels and loss belong together.
    """
    manifest = read_manifest(cfg.labels, "experiments.labels")
    if manifest["inputs"]["pairs"] != made_of:  # equal ids would not do: they are the clips'
        raise UserError(f"{cfg.labels}: expected labels of {cfg.pairs}, got labels of other pairs")
    cuts = torch.tensor(manifest["cuts"])
    if cfg.loss == "flow" and len(cuts) > 2:
        raise UserError(f"{cfg.labels}: expected a label a clip for --loss flow, got {len(cuts) - 1} segments")
    rows = read_jsonl(Path(cfg.labels) / "labels.jsonl")
    return torch.tensor([row["label"] for row in rows]).repeat_interleave(cuts.diff(), dim=1)


def decided(labels: Tensor) -> list[int]:
    """The pairs with enough labels to train on. labels (pairs, F)."""
    return ((labels != 0).double().mean(1) > LABELLED).nonzero()[:, 0].tolist()


def summarise(parts, loss, t, labelled) -> dict[str, Tensor]:
    """The sum of everything that is logged, and under `name#` how many values are in it: `averages` divides them.

    As in asymdpo.py, but over the frames `labelled` (B, F) and without regions.
    """
    bucket = (t * BUCKETS).long().clamp(max=BUCKETS - 1)
    accuracy, every = (1 - parts["S"].sign()) / 2, torch.ones_like(loss, dtype=torch.bool)
    logged = {name: (values, labelled if values.ndim == 2 else every) for name, values in parts.items()}
    logged |= {"loss": (loss.detach(), every), "S_abs": (parts["S"].abs(), every)}
    logged["rewards/accuracies"] = accuracy, every
    for b in range(BUCKETS):
        logged[f"diff/w/t{b}"] = parts["diff/w"], labelled & (bucket == b)[:, None]
        logged[f"diff/l/t{b}"] = parts["diff/l"], labelled & (bucket == b)[:, None]
        logged[f"acc/t{b}"] = accuracy, bucket == b
    sums = {name: torch.where(where, values, 0).sum() for name, (values, where) in logged.items()}
    return sums | {f"{name}#": where.sum() for name, (_, where) in logged.items()}


def main(cfg: Config) -> None:
    # ---- what to do, checked before anything is loaded
    cfg, asked = resolve(cfg, PRESETS), cfg.batch_size
    group = start_group(implementation, cfg.step_timeout)
    local_batch(cfg, group)
    starts = listed(cfg.sft, "sft")
    inputs = {"pairs": cfg.pairs, "labels": cfg.labels, "base": cfg.base, "sft": starts}
    run = Run(cfg, "experiments.baselines", group, inputs)
    if run.done:
        return
    for name in starts:
        read_manifest(name, "sft.py --base, asymdpo.py or experiments.baselines")
    pairs = Shards(cfg.pairs, "experiments.pairs")
    clip = CLIP[pairs.manifest["config"]["kind"]]
    if clip not in pairs.fields():
        raise UserError(f"{cfg.pairs}: expected the real clips as {clip}, got none; make the pairs anew")
    labels = read_labels(cfg, run.facts["inputs"]["pairs"])
    usable = decided(labels)
    if not usable:
        raise UserError(f"{cfg.labels}: expected pairs that are not tied, got none")
    plan = epochs(len(usable), cfg, "pairs", asked)
    with user_errors():
        net = build(cfg, group, pairs.shape("first"))

    # ---- what is trained, and how far it came before
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=cfg.lr, betas=(0.9, 0.999), weight_decay=0.01, fused=True)
    training = Training(run, cfg, trained, optimizer)
    said = dataclasses.replace(cfg, beta=temperature(cfg))  # what asymdpo.explain takes for its β

    # ---- train
    for step in training.steps(plan):
        sums: dict[str, Tensor] = {}
        for places in micro_batches(len(usable), step, cfg, run, flow.generator):
            index = [usable[i] for i in places]
            keys = [(run.stage, cfg.seed, step, pairs.rows[i]["id"]) for i in index]
            one, two, text = pairs.get("first", index), pairs.get("second", index), pairs.text(index)
            noise = flow.draw_noise(one.shape[1:], keys)
            t = flow.draw_t(keys, cfg.t_mean, t_shift=cfg.t_shift)
            label = labels[index].to(group.device)
            one, two, text, noise, t = (a.to(group.device) for a in (one, two, text, noise, t))
            prediction = predict(net, one, two, text, noise, t)
            losses, parts = baseline_loss(cfg, prediction, label)
            if cfg.sft_weight:
                x0 = None if clip == "first" else pairs.get(clip, index).to(group.device)
                error = clip_loss(net, prediction, x0, text, noise, t)
                losses = losses + cfg.sft_weight * temperature(cfg) / 2 * error
                parts["err/x0"] = error.detach()
            training.backward(losses, [pairs.rows[i]["id"] for i in index])
            for name, value in summarise(parts, losses, t, label != 0).items():
                sums[name] = sums.get(name, 0) + value
        lr = learning_rate(step, cfg)
        if row := training.update(lr, sums):
            row = averages(row) | {"lora_B": size_of_B(net), "grad_norm": row["grad_norm"], "lr": lr}
            training.log(row, loss=f"{row['loss']:.4f}", acc=f"{row['rewards/accuracies']:.2f}")
            if sentence := explain(said, step, row):
                training.say(sentence)

    # ---- result
    if group.main:
        with whole_file(run.folder / "lora.safetensors") as file:
            model.export_lora(
                model.trained_lora(net), file, base=cfg.base, sft=cfg.sft, beneath=net.loras, task="baseline"
            )
    right = f"loss {run.recent('loss'):.4f}, {100 * run.recent('rewards/accuracies'):.0f} % of pairs right"
    run.finish(["lora.safetensors"], f"{cfg.steps:,} steps", right)


if __name__ == "__main__":
    program(main, Config, __doc__, PRESETS)

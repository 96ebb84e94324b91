"""Stage 3, Asymmetrical DPO: the text-to-video model learns from pairs, on the frames where winner and loser differ.

    e_i(f; x) = mean over C, H, W of (v_i − f(x_t, t, text)_i)²           v = noise − x0, one t for the clip
    d_i       = e_i(policy; x) − e_i(ref; x)
    S         = Σ_{i ≥ N1} (d_i^w − d_i^l),   K = F − N1
    outside:  L = softplus(β·S) / K   (default)          inside:  L = softplus(β·S / K)

    frames of a pair:  ① i < N1: the same real frames, no loss
                       ② N1 ≤ i < N2: real against generated     ③ i ≥ N2: both generated

    python asymdpo.py --self-test                       # the method's invariants, checked here and now
    python asymdpo.py --base out/demo/base --sft out/demo/sft --pairs out/demo/pairs --out out/demo/asymdpo
    torchrun --nproc_per_node 8 asymdpo.py --preset 1.3b --base Wan2.1-T2V-1.3B --sft out/sft --pairs out/pairs \\
        --out out/asymdpo

The baselines, on pairs of make_pairs.py --pairs flow or structural with labels of label.py:

    --loss flow    L = softplus(β/2 · mean over all frames of (d_i^w − d_i^l))       Flow-DPO (arXiv 2501.13918)
    --loss dense   L = softplus(β · mean over labelled frames of (d_i^w − d_i^l)), winner and loser by segment
                   (DenseDPO, arXiv 2506.03517)

How this differs from the loss as it is printed in the paper: a reference is subtracted (the SFT model: fused
into the base, so "LoRA off" is the reference), and errors are means over C, H, W, not sums; both for the
reasons in README. The forward is plain text-to-video: every frame noised at one t, no given frames, no task
prompts; only the loss is masked. Winner and loser of a pair see the same noise and t.

What step 0 must read: policy equals reference, so S = 0 exactly, and the loss is ln 2 / K (outside) or ln 2 (else).

In    a model folder, a finished sft.py folder (its LoRA), pairs of make_pairs.py; for the baselines labels of label.py
Out   lora.safetensors (on top of base + SFT), metrics.jsonl
Cost  two forwards and backwards of the policy and two forwards of the reference a pair
"""

import dataclasses
import functools
import hashlib
import math
import sys
from pathlib import Path

import torch

import flow
import model
from experiments import cost
from kernels.region_dpo import METRICS, frame_errors, region_dpo
from runtime import run as common
from runtime import shards as data
from runtime.run import UserError

PRESETS = {  # tiny: see README; 1.3b, 14b: the paper's numbers, as its readers report them
    "tiny": dict(
        layers="attn+ffn", rank=16, batch_size=16, steps=200, lr=5e-5, warmup=20, beta=50.0, form="inside", t_mean=1.0
    ),
    "1.3b": dict(layers="attn", rank=128, batch_size=32, steps=625, lr=5e-6, warmup=20, beta=800.0, form="outside"),
    "14b": dict(layers="attn", rank=128, batch_size=32, steps=625, lr=5e-6, warmup=20, beta=800.0, form="outside"),
}
DECIDED = 0.2  # DenseDPO keeps a clip if more than this share of its frames has a label
BUCKETS = 4  # t in [0, ¼), [¼, ½), [½, ¾), [¾, 1]: what is logged is split by these


@dataclasses.dataclass(frozen=True)
class Config:
    """Stage 3: trains the text-to-video model by Asymmetrical DPO."""

    preset: str = "tiny"  # tiny, 1.3b or 14b: what every option that is not given stands at
    base: str = "out/demo/base"  # model folder
    sft: str = "out/demo/sft"  # LoRA of the cold start, or several separated by commas; empty: start from the base
    pairs: str = "out/demo/pairs"  # folder of make_pairs.py
    labels: str = ""  # folder of label.py, for the baselines' pairs
    out: str = "out/demo/asymdpo"  # folder to write
    loss: str = "asym"  # asym: the method; flow, dense: the baselines Flow-DPO and DenseDPO
    beta: float | None = None  # DPO temperature
    form: str | None = None  # asym: outside, as printed: softplus(beta S)/K; inside: softplus(beta S/K); plain: no 1/K
    region: str = "23"  # frames in the loss: 123 all, 23 from N1 (the method), 3 from N2
    reference_free: bool = False  # leave the reference out, as in the loss as printed
    sft_weight: float = 0.0  # weight of the winner's own flow matching loss, against likelihood displacement
    layers: str | None = None  # layers that get the LoRA: attn, attn+ffn or all
    rank: int | None = None  # LoRA rank, alpha = rank
    batch_size: int | None = None  # pairs a step, over all processes
    micro_batch: int = 0  # pairs a forward and process; 0: all at once
    steps: int | None = None  # optimiser steps
    lr: float | None = None  # learning rate of AdamW
    warmup: int | None = None  # steps of linear warm-up; constant after
    t_mean: float | None = None  # t ~ logit-normal(t_mean, 1); not given and not in the preset: uniform
    t_shift: float = 1.0  # warp of the training times towards noise
    checkpointing: bool = False  # recompute activations in the backward: less memory, more time
    save_every: int = 50  # steps between checkpoints
    seed: int = 0  # of initialisation, order, noise and times
    dry_run: bool = False  # print what it will cost, and stop: nothing is loaded or written
    self_test: bool = False  # check the method's invariants on a small random model, and stop


def predict(net, chosen, rejected, text, noise, t):
    """Velocities of policy and reference at the same noise and t: v_w, v_l, ref_w, ref_l, target_w, target_l
    (B, C, F, H, W).

    chosen, rejected, noise (B, C, F, H, W), text (B, S, text_dim), t (B,). The reference is net without its LoRA.
    """
    x0 = torch.cat([chosen, rejected])
    noise, t, text = noise.repeat(2, 1, 1, 1, 1), t.repeat(2), text.repeat(2, 1, 1)
    x_t, target = flow.add_noise(x0, noise, t), flow.velocity(x0, noise)
    with torch.no_grad(), model.lora_off(net):
        ref = net(x_t, t, text)
    return *net(x_t, t, text).chunk(2), *ref.chunk(2), *target.chunk(2)


def prefer(prediction, label):
    """`predict` of (first, second) as of (winner, loser), frame by frame. label (B, F): 1: the first won, -1: lost."""
    first_won = label[:, None, :, None, None] >= 0
    pairs = zip(prediction[::2], prediction[1::2])
    return [torch.where(first_won, *order) for a, b in pairs for order in ((a, b), (b, a))]


def dense_dpo(v_w, v_l, ref_w, ref_l, target_w, target_l, labelled, beta):
    """`region_dpo` over the frames labelled (B, F) bool, wherever they are, in the form "inside": loss (B,), metrics.

    Velocities (B, C, F, H, W); at least one frame labelled in each pair.
    """
    none, K = torch.zeros(len(labelled), dtype=torch.int64, device=labelled.device), labelled.sum(1)
    # selected before anything is computed: a NaN in a tied frame must reach no gradient
    w, l = ([torch.where(labelled[:, None, :, None, None], a, 0) for a in side]  # noqa: E741
            for side in ((v_w, ref_w, target_w), (v_l, ref_l, target_l)))  # fmt: skip
    errors = *frame_errors(*w, none), *frame_errors(*l, none)
    policy_w, reference_w, d_w, policy_l, reference_l, d_l = (e.sum(1) for e in errors)
    S = d_w - d_l
    averages = [e.detach() / K for e in (policy_w, policy_l, reference_w, reference_l)]
    metrics = dict(zip(METRICS, (*averages, -beta * S.detach() / K, S.detach())))
    return torch.nn.functional.softplus(beta * S / K), metrics


def dpo_loss(cfg, prediction, n1, n2, label=None):
    """Loss (B,) and metrics (dict of (B,)) of the pairs.

    n1, n2 (B,) integers: the given frames of loser and winner. label (B, F): 0 on tied frames, which are left out by
    "dense" and by the SFT term.
    """
    v_w, v_l, ref_w, ref_l, target_w, target_l = prediction
    if cfg.reference_free:
        ref_w, ref_l = target_w, target_l  # an error of 0
    sides = (v_w, v_l, ref_w, ref_l, target_w, target_l)
    start = {"123": torch.zeros_like(n1), "23": n1, "3": n2}["123" if cfg.loss != "asym" else cfg.region]
    if cfg.loss == "asym":
        form = "outside" if cfg.form == "plain" else cfg.form
        loss, metrics = region_dpo(*sides, start, cfg.beta, form)
        if cfg.form == "plain":
            loss = loss * (v_w.shape[2] - start)
    elif cfg.loss == "flow":
        loss, metrics = region_dpo(*sides, start, cfg.beta / 2, "inside")
    else:
        loss, metrics = dense_dpo(*sides, label != 0, cfg.beta)
    if cfg.sft_weight:
        keep = torch.arange(v_w.shape[2], device=v_w.device) >= start[:, None] if label is None else label != 0
        error = torch.where(keep[:, None, :, None, None], v_w - target_w, 0)  # selected before it is squared
        loss = loss + cfg.sft_weight * error.square().mean(dim=(1, 3, 4)).sum(1) / keep.sum(1)
    return loss, metrics


def example_loss(cfg, net, x0, text, noise, t):
    """`dpo_loss` of pairs of these sizes: what `--dry-run` counts."""
    n1, label = torch.ones(len(x0), dtype=torch.int64), torch.ones(len(x0), x0.shape[2])
    return dpo_loss(cfg, predict(net, x0, x0.clone(), text, noise, t), n1, n1, label)[0]


def learning_rate(step: int, cfg) -> float:
    """Linear warm-up, then constant."""
    return cfg.lr * min(1, (step + 1) / max(cfg.warmup, 1))


# ---- what is logged --------------------------------------------------------------------------------------------------


@torch.no_grad()
def summarise(cfg, prediction, metrics, loss, t, n1, n2, label=None) -> dict[str, float]:
    """Sums, with their counts, of everything that is logged; `averages` divides them once all processes' are added.

    Per region ② and ③, winner and loser: errors of policy and reference and their difference; per time bucket the
    difference, and the share of pairs whose winner gained on the loser. Frames without a label are left out.
    """
    v_w, v_l, ref_w, ref_l, target_w, target_l = prediction
    frame = torch.arange(v_w.shape[2], device=v_w.device)
    counted = torch.ones_like(n1)[:, None].bool() if label is None else label != 0
    regions = {"2": counted & (frame >= n1[:, None]) & (frame < n2[:, None]), "3": counted & (frame >= n2[:, None])}
    buckets = [(t * BUCKETS).long().clamp(max=BUCKETS - 1) == b for b in range(BUCKETS)]
    gap = {name: 0.0 for name in regions}  # Σ (d^w − d^l) over a region's frames
    sums = {}

    def add(name, values, where):
        sums[name] = torch.where(where, values, 0).sum().item()
        sums[f"{name}#"] = where.sum().item()

    for side, parts in (("w", (v_w, ref_w, target_w)), ("l", (v_l, ref_l, target_l))):
        policy, ref, difference = frame_errors(*parts, torch.zeros_like(n1))
        for name, where in regions.items():
            add(f"err/{side}_policy/{name}", policy, where)
            add(f"err/{side}_ref/{name}", ref, where)
            add(f"diff/{side}/{name}", difference, where)
            gap[name] = gap[name] + (1 if side == "w" else -1) * torch.where(where, difference, 0).sum(1)
            for b, inside in enumerate(buckets):
                add(f"diff/{side}/{name}/t{b}", difference, where & inside[:, None])
    for name, where in regions.items():
        for b, inside in enumerate(buckets):
            add(f"acc/{name}/t{b}", (1 - gap[name].sign()) / 2, where.any(1) & inside)
    everything = torch.ones_like(loss, dtype=torch.bool)
    beta = cfg.beta / 2 if cfg.loss == "flow" else cfg.beta
    chosen = -beta * (metrics["err/w_policy"] - metrics["err/w_ref"])
    rejected = -beta * (metrics["err/l_policy"] - metrics["err/l_ref"])
    scaled = cfg.beta * metrics["S"]
    for name, values in {
        "loss": loss, "S": metrics["S"], "S_abs": metrics["S"].abs(), "softplus": torch.nn.functional.softplus(scaled),
        "saturated": (scaled.abs() > 10).float(), "rewards/chosen": chosen, "rewards/rejected": rejected,
        "rewards/margins": metrics["margin"], "rewards/accuracies": (1 - metrics["S"].sign()) / 2,
    }.items():  # fmt: skip
        add(name, values, everything)
    return sums


def averages(sums: dict[str, float]) -> dict[str, float]:
    """Means of what `summarise` summed; what no frame contributed to is left out."""
    return {name: sums[name] / sums[f"{name}#"] for name in sums if not name.endswith("#") and sums[f"{name}#"]}


def explain(cfg, step: int, row: dict[str, float]) -> str | None:
    """A sentence for whoever watches the run, at the step that calls for one."""
    if step == 0:
        expected = "anything: there is no reference" if cfg.reference_free else "exactly 0"
        at_ln2 = "ln 2 / K" if cfg.loss == "asym" and cfg.form == "outside" else "ln 2 = 0.6931"
        at_ln2 += f" and {cfg.sft_weight:g} times the winner's own loss" if cfg.sft_weight else ""
        return f"step 0: S = {row['S']:g} (expected {expected}), loss {row['loss']:.4f} (expected {at_ln2})"
    moved = cfg.beta * row["S_abs"]
    if step == max(50, 2 * cfg.warmup) and not cfg.reference_free and moved < 1e-3:
        return (
            f"stuck: |beta S| is {moved:.1e} after {step} steps, so the loss stays where it began: the policy has "
            "hardly left the reference; raise --lr or --beta, or check that the LoRA gets gradients (grad_norm)"
        )
    # of the others the sigmoid's argument is |beta S| divided by the number of frames
    if cfg.loss == "asym" and cfg.form != "inside" and row["saturated"] > 0.5 and step % 50 == 0:
        return (
            f"saturated: |beta S| > 10 for {row['saturated']:.0%} of the pairs, they no longer teach; "
            "lower --beta or use --form inside"
        )
    return None


# ---- the stage -------------------------------------------------------------------------------------------------------


def read_labels(cfg, pairs: data.Shards, made_of: str) -> torch.Tensor | None:
    """A label for each pair and frame (pairs, F), 1: the first is better, -1: the second; None for pairs in order.

    made_of: what tells these pairs from others, as a run notes it of its inputs. UserError unless pairs, labels and
    loss belong together.
    """
    if "chosen" in pairs.fields():
        if cfg.labels or cfg.loss == "dense":
            raise UserError(f"{cfg.pairs}: expected pairs without an order for --labels or --loss dense")
        return None
    if not cfg.labels or cfg.loss == "asym":
        raise UserError(f"{cfg.pairs}: expected pairs in order, or --labels of label.py and --loss flow or dense")
    manifest = common.read_manifest(cfg.labels, "label.py")
    rows = common.read_jsonl(Path(cfg.labels) / "labels.jsonl")
    if manifest["inputs"]["pairs"] != made_of:  # the ids alone are the clips'
        raise UserError(f"{cfg.labels}: expected labels of {cfg.pairs}, got labels of other pairs")
    cuts = torch.tensor(manifest["cuts"])
    if cfg.loss == "flow" and len(cuts) > 2:
        raise UserError(f"{cfg.labels}: expected a label a clip for --loss flow, got {len(cuts) - 1} segments")
    return torch.tensor([row["label"] for row in rows]).repeat_interleave(cuts.diff(), dim=1)


def build(cfg, group: common.Group, shape: tuple[int, ...]) -> model.DiT:
    """Base with the cold start fused in, frozen, and a fresh LoRA: LoRA off is the reference."""
    dtype = torch.bfloat16 if group.device.type == "cuda" else torch.float32
    net = model.load_model(cfg.base, dtype, group.device)
    model.check_preset(net, cfg.preset, cfg.base)
    if shape[0] != net.config.in_dim:
        raise UserError(f"{cfg.pairs}: expected latents of {net.config.in_dim} channels for this model, got {shape[0]}")
    for file in model.lora_files(cfg.sft):
        model.merge_lora(model.load_lora(net, file))
    model.add_lora(net, cfg.rank, cfg.rank, cfg.layers, cfg.seed)
    net.gradient_checkpointing = cfg.checkpointing
    return net


def main(cfg: Config) -> None:
    # ---- what to do, checked before anything is loaded
    if cfg.self_test:
        return self_test()
    cfg = common.resolve(cfg, PRESETS)
    check(cfg)
    if cfg.dry_run:
        return cost.training(cfg, "asymdpo", functools.partial(example_loss, cfg))
    group = common.start_group()
    per_process, forwards = common.local_batch(cfg, group)
    starts = [name.strip() for name in cfg.sft.split(",") if name.strip()]
    inputs = {"sft" + "+" * k: name for k, name in enumerate(starts)}
    run = common.Run(cfg, "asymdpo", group, {"pairs": cfg.pairs, "labels": cfg.labels, "base": cfg.base, **inputs})
    if run.done:
        return
    for name in starts:
        common.read_manifest(name, "sft.py --base or asymdpo.py")
    pairs = data.Shards(cfg.pairs, "make_pairs.py", verify=group.main)
    winner, loser = ("chosen", "rejected") if "chosen" in pairs.fields() else ("first", "second")
    frames = pairs.shape(winner)[1]
    labels = read_labels(cfg, pairs, run.facts["inputs"]["pairs"])
    usable = [
        i for i, row in enumerate(pairs.rows)
        if (cfg.loss != "asym" or cfg.region != "3" or row["n2"] < frames)
        and (labels is None or (labels[i] != 0).float().mean() > DECIDED)
    ]  # fmt: skip
    if not usable:
        where = f"{cfg.labels}: expected pairs that are not tied" if cfg.labels else f"{cfg.pairs}: expected pairs with"
        what = "" if cfg.labels else " generated frames in the winner for --region 3"
        raise UserError(f"{where}{what}, got none")
    net = build(cfg, group, pairs.shape(winner))

    # ---- what is trained, and how far it came before
    names, parameters = zip(*[(n, p) for n, p in net.named_parameters() if p.requires_grad])
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, betas=(0.9, 0.999), weight_decay=0.01, fused=True)
    first, state = run.resume()
    if state:
        common.unpack_state(state, names, parameters, optimizer)

    # ---- train
    bar = run.progress(cfg.steps, first)
    for step in range(first, cfg.steps):
        order = [usable[i] for i in data.batch_order(len(usable), cfg.batch_size, step, cfg.seed)]
        mine = order[group.rank * per_process : (group.rank + 1) * per_process]
        sums: dict[str, float] = {}
        for part in torch.tensor(mine).chunk(forwards):
            part = part.tolist()
            keys = [(cfg.seed, step, pairs.rows[i]["id"]) for i in part]
            chosen, rejected, text = pairs.get(winner, part), pairs.get(loser, part), pairs.text(part)
            noise = flow.draw_noise(chosen.shape[1:], keys)
            t = flow.draw_t(keys, cfg.t_mean, t_shift=cfg.t_shift).to(group.device)
            n1, n2 = (torch.tensor([pairs.rows[i][n] for i in part], device=group.device) for n in ("n1", "n2"))
            prediction = predict(net, *(a.to(group.device) for a in (chosen, rejected, text, noise)), t)
            label = None if labels is None else labels[part].to(group.device)
            prediction = prediction if label is None else prefer(prediction, label)
            losses, metrics = dpo_loss(cfg, prediction, n1, n2, label)
            (losses.sum() / cfg.batch_size).backward()
            for name, value in summarise(cfg, prediction, metrics, losses, t, n1, n2, label).items():
                sums[name] = sums.get(name, 0.0) + value
        group.sum_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg)
        optimizer.step()
        optimizer.zero_grad()

        # ---- log, save
        row = averages(group.sum(sums))
        run.log(step + 1, **row, grad_norm=norm.item(), lr=learning_rate(step, cfg))
        if group.main and (sentence := explain(cfg, step, row)):
            bar.write(sentence, file=sys.stderr)
        bar.set_postfix(loss=f"{row['loss']:.4f}", acc=f"{row['rewards/accuracies']:.2f}", refresh=False)
        bar.update()
        if (step + 1) % cfg.save_every == 0 and step + 1 < cfg.steps:
            run.save(step + 1, common.pack_state(names, parameters, optimizer))
    bar.close()

    # ---- result
    if group.main:
        model.export_lora(net, run.folder / "lora.safetensors", base=cfg.base, sft=cfg.sft, task="asymdpo")
    run.finish(["lora.safetensors"])


def check(cfg) -> None:
    """UserError for options that make no sense."""
    if cfg.region not in ("123", "23", "3"):
        raise UserError(f"--region: expected 123, 23 or 3, got {cfg.region!r}")
    if cfg.form not in ("outside", "inside", "plain") or not 0 < cfg.beta < math.inf:
        raise UserError(f"expected --form outside, inside or plain and --beta > 0, got {cfg.form!r} and {cfg.beta}")
    if cfg.loss not in ("asym", "flow", "dense"):
        raise UserError(f"--loss: expected asym, flow or dense, got {cfg.loss!r}")
    if cfg.loss != "asym" and cfg.region != Config.region:
        raise UserError(f"--region: expected none with --loss {cfg.loss}, which has no regions, got {cfg.region!r}")


# ---- self-test -------------------------------------------------------------------------------------------------------


def self_test() -> None:
    """Checks the method's invariants on a small random model and prints each in words.

    UserError if one does not hold.
    """
    torch.manual_seed(0)
    net = model.init_from_scratch(model.DiT(dataclasses.replace(model.PRESETS["tiny"], num_layers=1)), seed=0)
    torch.nn.init.normal_(net.time_projection[1].weight, std=0.02)  # time must matter
    chosen, rejected, noise = torch.randn(3, 4, 48, 13, 2, 2)
    text, t = torch.randn(4, 7, 32), torch.rand(4)
    n1, n2 = torch.tensor([1, 3, 7, 5]), torch.tensor([11, 12, 13, 11])
    results = [*check_model(net, chosen, noise, text, t), *check_loss(net, chosen, rejected, text, noise, t, n1, n2)]
    for holds, words in results:
        print(f"{'ok  ' if holds else 'FAIL'}  {words}")
    if not all(holds for holds, _ in results):
        raise UserError("self-test: an invariant of the method does not hold, see above")
    print(
        "At step 0 a run must read S = 0 exactly and the loss ln 2 = 0.6931 (inside) or the mean of ln 2 / K (outside)."
    )


@torch.no_grad()
def check_model(net, x0, noise, text, t):
    """Invariants of the model as Φ and as T2V."""
    x_t = flow.add_noise(x0, noise, t)
    plain, none_given = net(x_t, t, text), torch.zeros(4, 13, dtype=torch.bool)
    yield (
        torch.allclose(plain, net(x_t, t[:, None].repeat(1, 13), text), atol=1e-5),
        "a time for each frame, all equal, is the one-time model, to 1e-5",
    )
    for where in ("context", "frame"):
        model.add_task_prompt(net, 13, where)
        yield (
            torch.allclose(plain, net(x_t, t, text, none_given), atol=1e-5),
            f"no frame given and zero task prompts ({where}) is the T2V model, to 1e-5",
        )
    cond_mask = torch.arange(13) < torch.tensor([1, 4, 7, 12])[:, None]
    once, again = (flow.euler(net, noise, text, 3, 4.0, x0, cond_mask) for _ in range(2))
    given = cond_mask[:, None, :, None, None].expand_as(x0)
    yield torch.equal(once[given], x0[given]), "the given frames of a continuation are the real ones, bit for bit"
    yield torch.equal(once, again), "a continuation is a function of clip, given frames and noise"
    net.task_prompt = None


def check_loss(net, chosen, rejected, text, noise, t, n1, n2):
    """Invariants of the loss, before and after a few steps of training."""
    K, ln2 = 13 - n1, math.log(2)
    before = hashlib.sha256(b"".join(p.numpy().tobytes() for p in net.state_dict().values())).digest()
    parameters = model.add_lora(net, 4, 4, "attn")
    base = [p for p in net.state_dict() if ".lora_" not in p]
    for form, expected in (("outside", ln2 / K), ("inside", torch.full((4,), ln2))):
        loss, metrics = dpo_loss(Config(beta=800.0, form=form), predict(net, chosen, rejected, text, noise, t), n1, n2)
        exact = bool((metrics["S"] == 0).all()) and torch.allclose(loss, expected.float(), rtol=1e-6)
        yield (
            exact,
            f"step 0, {form}: S = 0 exactly, loss = {'ln 2 / K' if form == 'outside' else 'ln 2'}",
        )
    cfg = Config(beta=25.0, form="inside")
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for _ in range(3):
        dpo_loss(cfg, predict(net, chosen, rejected, text, noise, t), n1, n2)[0].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = hashlib.sha256(b"".join(net.state_dict()[n].numpy().tobytes() for n in base)).digest()
    yield before == after, "the reference's weights are the same, by sha256, after three steps"
    prediction = [a.detach() for a in predict(net, chosen, rejected, text, noise, t)]
    loss, metrics = dpo_loss(cfg, prediction, n1, n2)
    v_w, v_l, ref_w, ref_l, target_w, target_l = prediction
    _, swapped = dpo_loss(cfg, (v_l, v_w, ref_l, ref_w, target_l, target_w), n1, n2)
    yield (
        torch.equal(metrics["S"], -swapped["S"]) and bool((metrics["S"] != 0).all()),
        "swapping winner and loser negates the margin",
    )
    alone = torch.cat(
        [dpo_loss(cfg, [a[i : i + 1] for a in prediction], n1[i : i + 1], n2[i : i + 1])[0] for i in range(4)]
    )
    yield torch.equal(loss, alone), "a pair's loss does not depend on the other pairs of its batch"
    shared = (torch.arange(13) < n1[:, None])[:, None, :, None, None]
    for word, value in (("moved by 1000", 1e3), ("NaN", float("nan"))):
        moved = [torch.where(shared, a + value, a).requires_grad_() for a in prediction]
        moved_loss, _ = dpo_loss(cfg, moved, n1, n2)
        gradient = torch.autograd.grad(moved_loss.sum(), moved[0])[0]
        silent = (
            torch.equal(loss, moved_loss)
            and bool((gradient.masked_select(shared) == 0).all())
            and bool(gradient.isfinite().all())
        )
        yield silent, f"frames before N1, {word}: same loss bit for bit, gradient exactly 0 there"


if __name__ == "__main__":
    common.run(main, Config, __doc__)

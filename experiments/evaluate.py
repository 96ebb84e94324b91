"""Measures a finished chain by the exact physics of the tiny world.

    python -m experiments.evaluate --base out/demo/base --sft out/demo/sft --asymdpo out/demo/asymdpo \\
        --continuation out/demo/continuation --pairs out/demo/pairs --data out/demo/shards --out out/demo/eval

    sweep       Φ continues the same clips from 0, 1, … F given frames: does quality rise with them? Once over the whole
                clip and once over the generated frames alone, because more given frames make more of the clip real.
    next frame  the first generated frame against the true one, in px, and against holding the last given picture
    labels      how often the exact score agrees that the winner of a pair is better
    table       Pretrain, SFT, SFT for as many operations as the method and DynamicsBoost, on the same prompts and noise
    controls    SFT and DynamicsBoost from less noise and by another solver; DynamicsBoost's LoRA at half strength: what
                a smaller spread, or a part of the training, gains by itself

Differences are paired by prompt, with an interval by bootstrap over the prompts.

In    the folders of the other stages; clips of tiny.balls, whose captions say what physics to expect
Out   summary.json; samples.safetensors, the latents that experiments.page shows
Cost  about 13 continuations of `--sweep_clips` clips and eleven samples of each of `--clips` prompts
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch

import flow
import model
from runtime.files import commit, read_manifest, write_json, write_tensors
from runtime.group import alone
from runtime.options import SEED, Diverged, UserError, option, program, resolve
from runtime.run import Run
from runtime.shards import Shards
from tiny import balls
from tiny import codec as codecs
from wan.lora import load_adapted, load_continuation, lora_files, read_lora

PRESETS = {"tiny": dict(nfe=12, t_shift=4.0)}
SHOWN = 8  # samples kept for the page's players
NOISE = (0.95, 0.85)  # what the initial noise is multiplied by in the controls
DIFFERENCES = ("score", "valid")


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures a finished chain by the exact physics of the tiny world."""

    preset: str = option("tiny", choices=tuple(PRESETS))  # the only one whose physics is known
    base: str = "out/demo/base"  # model folder: the Pretrain row
    sft: str = "out/demo/sft"  # folder of sft.py --base: the SFT row
    sft_longer: str = ""  # one more, for as many operations as sft, continuation, pairs and asymdpo together; or none
    asymdpo: str = "out/demo/asymdpo"  # folder of asymdpo.py: the DynamicsBoost row
    continuation: str = "out/demo/continuation"  # folder of continuation.py
    pairs: str = "out/demo/pairs"  # folder of make_pairs.py
    data: str = "out/demo/shards"  # shards of prepare.py
    split: str = option("eval", choices=("train", "align", "eval"))  # which clips: train, align or eval
    out: str = option("out/demo/eval", neutral=True)  # folder to write
    clips: int = option(512, least=2)  # prompts in the table
    sweep_clips: int = option(96, least=2)  # clips in the sweep
    solver: str = option("unipc", choices=tuple(flow.SOLVERS))  # what samples; the controls have the other one
    nfe: int | None = option(least=1, most=1000)  # solver steps
    t_shift: float | None = option(above=0)  # warp of the solver's times towards noise
    seed: int = option(0, **SEED)  # of the noise and the bootstrap


# ---- numbers ---------------------------------------------------------------------------------------------------------


def means(scores: dict[str, np.ndarray]) -> dict[str, float]:
    return {m: round(float(v.mean()), 4) for m, v in scores.items() if m != "speed"}


def judged(scores: dict[str, np.ndarray], real: dict[str, np.ndarray]) -> dict[str, float]:
    """Mean metrics, and `w1`, the distance of the distribution of speed from the real clips', px/frame."""
    return means(scores) | {"w1": round(balls.wasserstein(scores["speed"], real["speed"]), 4)}


def paired_bootstrap(difference: np.ndarray, prompts: list[str], seed: int, draws: int = 10_000) -> dict[str, float]:
    """Mean of (n,) paired differences and its 95 % percentile interval over `draws` resamples of the prompts.

    Samples of the same prompt, of which the world has 288, are resampled together: they are alike.
    """
    _, prompt = np.unique(prompts, return_inverse=True)
    total, count, rng = np.bincount(prompt, difference), np.bincount(prompt), np.random.default_rng(seed)
    some = (rng.integers(len(count), size=(100, len(count))) for _ in range(draws // 100))
    resampled = [total[of].sum(1) / count[of].sum(1) for of in some]
    lo, hi = np.percentile(np.concatenate(resampled), [2.5, 97.5])
    return {"mean": round(float(difference.mean()), 4), "lo": round(float(lo), 4), "hi": round(float(hi), 4)}


def centre_errors(made: np.ndarray, true: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Distances (2, B, n) px from the ball's true centre: of the ball that was made, and of the held picture's.

    made, true (B, n, h, w, 3): the same n pictures; held (B, h, w, 3): the last given one; all float in [0, 1]. A ball
    that was not made counts as balls.MISSING px.
    """
    (at, seen), (truth, _), (still, _) = (balls.detect(balls.light_of(a)) for a in (made, true, held[:, None]))
    errors, holding = (np.hypot(*np.moveaxis(found - truth, 1, 0)) for found in (at, still))
    return np.stack([np.where(seen, errors, balls.MISSING), holding])


# ---- sweep, labels, table --------------------------------------------------------------------------------------------


def sample_all(net, noise, text, cfg, *given: torch.Tensor, of: str | Path, bar=None) -> torch.Tensor:
    """Samples (B, C, F, H, W), 64 at a time; given x0 and cond_mask, continuations.

    of: the model's folder. Diverged, which names it, if the samples are not finite.
    """
    made, levels, solve = [], flow.time_grid(cfg.nfe, cfg.t_shift), flow.SOLVERS[cfg.solver]
    for part_noise, part_text, *part_given in zip(*(a.split(64) for a in (noise, text, *given))):
        made.append(solve(net, part_noise, part_text, levels, *part_given))
        if bar:
            bar.update(len(part_noise))
        if not made[-1].isfinite().all():
            raise Diverged(f"{of}: its model samples NaN or infinity: it diverged; make it anew with a lower --lr")
    return torch.cat(made)


def sweep(net, codec, clips, cfg, bar=None) -> tuple[list[dict], dict]:
    """Continues the same clips, from the same noise, from 0, 1, … F given frames.

    Returns a row of scores for each number of given frames, and samples to show.
    """
    index = list(range(cfg.sweep_clips))
    x0, text = clips.get("x0", index), clips.text(index)
    captions = [clips.rows[i]["caption"] for i in index]
    noise = flow.draw_noise(x0.shape[1:], [("sweep", cfg.seed, clips.rows[i]["id"]) for i in index])
    true, frames, rows, shown = balls.pixels(codec, x0), x0.shape[2], [], {}
    for n in range(frames + 1):
        cond_mask = (torch.arange(frames) < n).expand(len(index), frames)
        made = sample_all(net, noise, text, cfg, x0, cond_mask, of=cfg.continuation, bar=bar) if n < frames else x0
        row = {"n_cond": n, "score": means(balls.score(codec, made, captions))["score"]}
        if n < frames:
            first = max(4 * n - 3, 0)
            generated = balls.score(codec, made, captions, slice(first, None))
            row["generated_score"] = means(generated)["score"]
        if 0 < n < frames:
            got = balls.pixels(codec, made[:, :, : n + 1])[:, first:]
            found = centre_errors(got, true[:, first : first + 4], true[:, first - 1])
            row |= means(dict(zip(("next_frame", "hold"), found)))
        rows.append(row)
        shown[f"sweep_{n}"] = made[:SHOWN]
    return rows, shown


def label_accuracy(codec, pairs, count: int | None = None, sides=("chosen", "rejected")) -> dict[str, float]:
    """Share of the first `count` pairs whose winner, the first of `sides`, has the better exact score (a tie counts
    half); mean scores.
    """
    index = list(range(len(pairs)))[:count]
    captions = [pairs.rows[i]["caption"] for i in index]
    both = (balls.score(codec, pairs.get(side, index), captions) for side in sides)
    chosen, rejected = (scores["score"] for scores in both)
    agree = float(((chosen > rejected) + 0.5 * (chosen == rejected)).mean())
    return {"accuracy": agree, "chosen": float(chosen.mean()), "rejected": float(rejected.mean()), "pairs": len(index)}


def prompts(clips: Shards, count: int, seed: int) -> tuple[list[int], torch.Tensor, torch.Tensor, list[str]]:
    """What every model is judged on: indices of clips, repeated where there are fewer clips than `count`; noise
    (count, C, F, H, W), text (count, S, text_dim), captions.
    """
    index = [i % len(clips) for i in range(count)]
    keys = [("table", seed, clips.rows[i]["id"], n // len(clips)) for n, i in enumerate(index)]
    return index, flow.draw_noise(clips.shape("x0"), keys), clips.text(index), [clips.rows[i]["caption"] for i in index]


def adapted(base: str, loras: list, strength: float = 1.0) -> model.DiT:
    """The base with LoRAs on it, the last one at `strength`."""
    if strength == 1:
        return load_adapted(base, loras)
    net = load_adapted(base, loras[:-1])
    lora, _ = read_lora(net, loras[-1])  # one that was trained here: low-rank terms alone
    for term in lora.values():
        term.scale *= strength
    return model.attach_lora(net, lora)


def table(cfg, codec, clips, bar) -> tuple[dict, dict]:
    """Every model on the same prompts and noise, the real clips, the controls: what summary.json says of them, and
    samples to show.
    """
    index, noise, text, captions = prompts(clips, cfg.clips, cfg.seed)
    real, shown = balls.score(codec, clips.get("x0", index), captions), {}
    loras = {"Pretrain": "", "SFT": cfg.sft, "SFT, as many operations": cfg.sft_longer}
    loras = {name: folder for name, folder in loras.items() if folder or name == "Pretrain"}
    loras["DynamicsBoost"] = f"{cfg.sft},{cfg.asymdpo}"

    def differences(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
        return {m: paired_bootstrap(one[m].astype(float) - other[m], captions, cfg.seed) for m in DIFFERENCES}

    def measure(name: str, strength=1.0, noise=noise, solver=cfg.solver) -> dict[str, np.ndarray]:
        net = adapted(cfg.base, lora_files(loras[name]), strength)
        folder = loras[name].rpartition(",")[2] or cfg.base
        made = sample_all(net, noise, text, dataclasses.replace(cfg, solver=solver), of=folder, bar=bar)
        shown.setdefault(f"table_{name}", made[:SHOWN])
        return balls.score(codec, made, captions)

    scores = {name: measure(name) for name in loras}
    ours, half = scores["DynamicsBoost"], measure("DynamicsBoost", strength=0.5)
    kinds = {f"noise × {share}": dict(noise=noise * share) for share in NOISE}
    kinds |= {f"solver {name}": dict(solver=name) for name in flow.SOLVERS if name != cfg.solver}
    controls = {}
    for kind, options in kinds.items():
        pair = {name: measure(name, **options) for name in ("SFT", "DynamicsBoost")}
        controls[kind] = {name: judged(s, real) for name, s in pair.items()}
        controls[kind]["difference"] = differences(pair["DynamicsBoost"], pair["SFT"])
    return {
        "table": {name: judged(s, real) for name, s in {**scores, "real clips": real}.items()},
        "difference": {name: differences(ours, s) for name, s in scores.items() if name != "DynamicsBoost"},
        "half": judged(half, real) | {"difference": differences(half, scores["SFT"])},
        "controls": controls,
    }, shown


def main(cfg: Config) -> None:
    # ---- check everything before anything is loaded
    cfg = resolve(cfg, PRESETS)
    inputs = {name: getattr(cfg, name) for name in ("data", "base", "sft", "continuation", "pairs", "asymdpo")}
    read_manifest(cfg.base, "sft.py")
    makers = {"sft": "sft.py", "asymdpo": "asymdpo.py or experiments.baselines", "continuation": "continuation.py"}
    if cfg.sft_longer:
        inputs["sft_longer"], makers["sft_longer"] = cfg.sft_longer, "sft.py"
    for name, maker in makers.items():
        read_manifest(inputs[name], maker)
    clips, pairs = Shards(cfg.data, "prepare.py", cfg.split), Shards(cfg.pairs, "make_pairs.py")
    if cfg.sweep_clips > len(clips):
        raise UserError(f"--sweep_clips: expected at most {len(clips)}, all of {cfg.split!r}, got {cfg.sweep_clips}")
    codec, frames = codecs.load(cfg.data), clips.shape("x0")[1]
    balls.check_clips(clips, "x0", codec)
    balls.check_clips(pairs, "chosen", codec)
    run = Run(cfg, "experiments.evaluate", alone(), inputs)
    if run.done:
        return

    # ---- measure: short enough to do without checkpoints
    with run.progress(frames * cfg.sweep_clips + (10 + bool(cfg.sft_longer)) * cfg.clips, unit="clip") as bar:
        net = load_continuation(cfg.base, cfg.continuation)
        curve, shown = sweep(net, codec, clips, cfg, bar)
        measured, more = table(cfg, codec, clips, bar)
    labels = label_accuracy(codec, pairs)

    # ---- result
    # from two given latent frames on: one picture alone does not show a velocity
    between = [row for row in curve if 2 <= row["n_cond"] <= frames - 1]
    summary = measured | {
        "labels": labels,
        "sweep_rows": curve,
        "next_frame_error": {
            key: round(float(np.mean([row[key] for row in between])), 4) for key in ("next_frame", "hold")
        },
        "clips": cfg.clips,
        "sweep_clips": cfg.sweep_clips,
        "seed": cfg.seed,
        "commit": commit(),
    }
    write_json(run.folder / "summary.json", summary)
    write_tensors(run.folder / "samples.safetensors", shown | more)
    sft, ours = (100 * summary["table"][name]["valid"] for name in ("SFT", "DynamicsBoost"))
    figure = f"SFT {sft:.1f} % valid, DynamicsBoost {ours:.1f} %"
    run.finish(["summary.json", "samples.safetensors"], f"{cfg.clips:,} clips a model", figure)


if __name__ == "__main__":
    program(main, Config, __doc__, PRESETS)

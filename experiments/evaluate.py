"""Measures a finished chain by the exact physics of the tiny world.

    python -m experiments.evaluate --base out/demo/base --sft out/demo/sft --asymdpo out/demo/asymdpo \\
        --continuation out/demo/continuation --pairs out/demo/pairs --data out/demo/shards --out out/demo/eval

    sweep       Φ continues the same clips from 0, 1, … F given frames: does quality rise with them? Once over the whole
                clip and once over the generated frames alone, because more given frames make more of the clip real.
    next frame  the first generated frame against the true one, in px, and against holding the last given picture
    labels      how often the exact score agrees that the winner of a pair is better
    table       Pretrain, SFT and DynamicsBoost on the same prompts and noise; the paired difference and its interval

In    the folders of the other stages; clips of tiny.balls, whose captions say what physics to expect
Out   summary.json; samples.safetensors, the latents that experiments.page shows
Cost  about 13 continuations of `--sweep_clips` clips and three samples of each of `--clips` prompts
"""

import dataclasses

import numpy as np
import torch

import flow
from runtime.files import commit, read_manifest, write_json, write_tensors
from runtime.group import alone
from runtime.options import UserError, option, program, resolve
from runtime.run import Run
from runtime.shards import Shards
from tiny import balls
from tiny import codec as codecs
from wan.lora import load_adapted, load_continuation, lora_files

PRESETS = {"tiny": dict(nfe=12, t_shift=4.0)}
SHOWN = 8  # samples kept for the page's players


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures a finished chain by the exact physics of the tiny world."""

    preset: str = "tiny"  # the only one whose physics is known
    base: str = "out/demo/base"  # model folder: the Pretrain row
    sft: str = "out/demo/sft"  # folder of sft.py --base: the SFT row
    asymdpo: str = "out/demo/asymdpo"  # folder of asymdpo.py: the DynamicsBoost row
    continuation: str = "out/demo/continuation"  # folder of continuation.py
    pairs: str = "out/demo/pairs"  # folder of make_pairs.py
    data: str = "out/demo/shards"  # shards of prepare.py
    split: str = option("eval", choices=("train", "align", "eval"))  # which clips: train, align or eval
    out: str = option("out/demo/eval", neutral=True)  # folder to write
    clips: int = option(512, least=2)  # prompts in the table
    sweep_clips: int = option(96, least=2)  # clips in the sweep
    nfe: int | None = option(least=1)  # solver steps
    t_shift: float | None = option(above=0)  # warp of the solver's times towards noise
    seed: int = 0  # of the noise and the bootstrap


# ---- numbers ---------------------------------------------------------------------------------------------------------


def means(scores: dict[str, np.ndarray]) -> dict[str, float]:
    return {m: round(float(v.mean()), 4) for m, v in scores.items()}


def paired_bootstrap(difference: np.ndarray, seed: int, draws: int = 10_000) -> dict[str, float]:
    """Mean of (n,) paired differences and its 95 % percentile interval over `draws` resamples of the clips."""
    rng, n = np.random.default_rng(seed), len(difference)
    resampled = [difference[rng.integers(n, size=(100, n))].mean(1) for _ in range(draws // 100)]
    lo, hi = np.percentile(np.concatenate(resampled), [2.5, 97.5])
    return {"mean": round(float(difference.mean()), 4), "lo": round(float(lo), 4), "hi": round(float(hi), 4)}


def centre_errors(made: np.ndarray, true: np.ndarray, held: np.ndarray, caption: str) -> np.ndarray:
    """Distances (2, balls, n) px from each ball's true centre: of the ball that was made, and of the held picture's.

    made, true (n, h, w, 3): the same n pictures; held (h, w, 3): the last given one; all float in [0, 1]. A ball that
    was not made counts as balls.MISSING px.
    """
    (at, mass), (truth, _), (still, _) = (balls.detect(pictures) for pictures in (made, true, held[None]))
    colours = list(balls.read_caption(caption)[0])
    errors, holding = (np.hypot(*np.moveaxis((found - truth)[colours], 1, 0)) for found in (at, still))
    return np.stack([np.where(mass[colours] > 0.5, errors, balls.MISSING), holding])


# ---- sweep, labels, table --------------------------------------------------------------------------------------------


def sample_all(net, noise, text, cfg, *given: torch.Tensor, bar=None) -> torch.Tensor:
    """Samples (B, C, F, H, W) by flow.euler, 64 at a time; given x0 and cond_mask, continuations."""
    made, levels = [], flow.time_grid(cfg.nfe, cfg.t_shift)
    for part_noise, part_text, *part_given in zip(*(a.split(64) for a in (noise, text, *given))):
        made.append(flow.euler(net, part_noise, part_text, levels, *part_given))
        if bar:
            bar.update(len(part_noise))
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
        made = sample_all(net, noise, text, cfg, x0, cond_mask, bar=bar) if n < frames else x0
        row = {"n_cond": n, "score": means(balls.score(codec, made, captions))["score"]}
        if n < frames:
            first = max(4 * n - 3, 0)
            generated = balls.score(codec, made, captions, slice(first, None))
            row |= {"generated_score": means(generated)["score"], "generated": means(generated)}
        if 0 < n < frames:
            got = balls.pixels(codec, made[:, :, : n + 1])[:, first:]
            each = [centre_errors(g, t[first : first + 4], t[first - 1], c) for g, t, c in zip(got, true, captions)]
            distances = dict(zip(("next_frame", "hold"), np.concatenate(each, axis=1)))
            row |= means(distances) | means({f"{name}_last": px[:, -1] for name, px in distances.items()})
        rows.append(row)
        shown[f"sweep_{n}"] = made[:SHOWN]
    return rows, shown


def label_accuracy(codec, pairs, count: int | None = None) -> dict[str, float]:
    """Share of the first `count` pairs whose winner has the better exact score (a tie counts half); mean scores."""
    index = list(range(len(pairs)))[:count]
    captions = [pairs.rows[i]["caption"] for i in index]
    both = (balls.score(codec, pairs.get(side, index), captions) for side in ("chosen", "rejected"))
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


def table(cfg, codec, clips, bar) -> tuple[dict, dict, dict]:
    """Every model on the same prompts and noise, and the real clips: mean metrics, scores by clip, samples to show."""
    index, noise, text, captions = prompts(clips, cfg.clips, cfg.seed)
    loras = {"Pretrain": "", "SFT": cfg.sft, "DynamicsBoost": f"{cfg.sft},{cfg.asymdpo}"}
    scores, shown = {}, {}
    for name, folders in loras.items():
        net = load_adapted(cfg.base, lora_files(folders))
        made = sample_all(net, noise, text, cfg, bar=bar)
        scores[name], shown[f"table_{name}"] = balls.score(codec, made, captions), made[:SHOWN]
    real = means(balls.score(codec, clips.get("x0", index), captions))
    return {**{name: means(s) for name, s in scores.items()}, "real clips": real}, scores, shown


def main(cfg: Config) -> None:
    # ---- check everything before anything is loaded
    cfg = resolve(cfg, PRESETS)
    inputs = {name: getattr(cfg, name) for name in ("data", "base", "sft", "continuation", "pairs", "asymdpo")}
    read_manifest(cfg.base, "sft.py")
    makers = {"sft": "sft.py", "asymdpo": "asymdpo.py or experiments.baselines", "continuation": "continuation.py"}
    for name, maker in makers.items():
        read_manifest(inputs[name], maker)
    clips, pairs = Shards(cfg.data, "prepare.py", cfg.split), Shards(cfg.pairs, "make_pairs.py")
    if cfg.sweep_clips > len(clips):
        raise UserError(f"--sweep_clips: expected at most {len(clips)}, all of {cfg.split!r}, got {cfg.sweep_clips}")
    if not all(balls.read_caption(row["caption"])[0] for row in clips.rows + pairs.rows):
        raise UserError(f"{cfg.data}: expected clips of tiny.balls, got other captions, which no physics can score")
    run = Run(cfg, "experiments.evaluate", alone(), inputs)
    if run.done:
        return
    codec, frames = codecs.load(cfg.data), clips.shape("x0")[1]

    # ---- measure: short enough to do without checkpoints
    with run.progress(frames * cfg.sweep_clips + 3 * cfg.clips, unit="clip") as bar:
        net = load_continuation(cfg.base, cfg.continuation)
        curve, shown = sweep(net, codec, clips, cfg, bar)
        rows, scores, more = table(cfg, codec, clips, bar)
    labels = label_accuracy(codec, pairs)

    # ---- result
    difference = scores["DynamicsBoost"]["score"] - scores["SFT"]["score"]
    # from two given latent frames on: one picture alone does not show a velocity
    between = [row for row in curve if 2 <= row["n_cond"] <= frames - 1]
    distances = ("next_frame", "hold", "next_frame_last", "hold_last")
    summary = {
        "label_accuracy": labels["accuracy"],
        "labels": labels,
        "sweep": {
            "score": {row["n_cond"]: row["score"] for row in curve},
            "generated": {row["n_cond"]: row["generated_score"] for row in curve[:-1]},
        },
        "sweep_rows": curve,
        "table": rows,
        "asymdpo_minus_sft": paired_bootstrap(difference, cfg.seed),
        "next_frame_error": {key: round(float(np.mean([row[key] for row in between])), 4) for key in distances},
        "clips": cfg.clips,
        "sweep_clips": cfg.sweep_clips,
        "seed": cfg.seed,
        "commit": commit(),
    }
    write_json(run.folder / "summary.json", summary)
    write_tensors(run.folder / "samples.safetensors", shown | more)
    run.finish(["summary.json", "samples.safetensors"])


if __name__ == "__main__":
    program(main, Config, __doc__)

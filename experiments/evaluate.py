"""Evaluation on the embedded default's exact physics: the sweep over given frames, the pairs' labels, the table
of models.

    python evaluate.py --base out/demo/base --sft out/demo/sft --asymdpo out/demo/asymdpo \\
        --continuation out/demo/continuation --pairs out/demo/pairs --data out/demo/shards --out out/demo/eval
    python evaluate.py --vbench FOLDER … | --phygenbench FILE … | --videogen-eval FILE …    benchmarks.py: its options
    python evaluate.py --videos FOLDER --out out/metrics                                    metrics.py: any mp4 files

    sweep       Φ continues the same clips from 0, 1, … F given frames: does quality rise with them? Whole clip, and
                generated frames only: part of the first is just that more of the clip is real.
    next frame  the first generated frame against the true one, in px, beside holding the last given picture
    labels      how often the exact score agrees that the winner of a pair is better
    table       Pretrain, SFT and DynamicsBoost on the same prompts and noise; the paired difference and its interval

In    the folders of the other stages; clips of the embedded default, whose captions say what physics to expect
Out   summary.json, samples.safetensors (latents shown in the report)
Cost  about 13 continuations of `--sweep_clips` clips and three samples of `--clips` prompts
"""

import dataclasses
import sys

import numpy as np
import torch

import flow
import model
from experiments import benchmarks, cost, metrics
from runtime import run as common
from runtime import shards as data
from runtime.run import UserError
from tiny import balls as world
from wan import vae

PRESETS = {"tiny": dict(nfe=12, t_shift=4.0)}
SHOWN = 8  # samples kept for the report's players


@dataclasses.dataclass(frozen=True)
class Config:
    """Evaluation by the exact physics of the embedded default."""

    preset: str = "tiny"  # tiny: what every option that is not given stands at
    base: str = "out/demo/base"  # model folder: the Pretrain row
    sft: str = "out/demo/sft"  # folder of sft.py --base: the SFT row
    asymdpo: str = "out/demo/asymdpo"  # folder of asymdpo.py: the DynamicsBoost row
    continuation: str = "out/demo/continuation"  # folder of continuation.py
    pairs: str = "out/demo/pairs"  # folder of make_pairs.py
    data: str = "out/demo/shards"  # shards of prepare.py
    split: str = "eval"  # which clips
    out: str = "out/demo/eval"  # folder to write
    clips: int = 512  # prompts in the table
    sweep_clips: int = 96  # clips in the sweep
    nfe: int | None = None  # solver steps
    t_shift: float | None = None  # warp of the solver's times towards noise
    seed: int = 0  # of the noise and the bootstrap
    dry_run: bool = False  # print what it will cost, and stop: nothing is loaded or written


# ---- scores ----------------------------------------------------------------------------------------------------------


def means(scores: dict[str, np.ndarray]) -> dict[str, float]:
    return {m: round(float(v.mean()), 4) for m, v in scores.items()}


def paired_bootstrap(difference: np.ndarray, seed: int, draws: int = 10_000) -> dict[str, float]:
    """Mean of (n,) paired differences with the 95 % percentile interval over `draws` resamples of the clips."""
    rng = np.random.default_rng(seed)
    resampled = np.concatenate([
        difference[rng.integers(len(difference), size=(100, len(difference)))].mean(1) for _ in range(draws // 100)
    ])  # fmt: skip
    lo, hi = np.percentile(resampled, [2.5, 97.5])
    return {"mean": round(float(difference.mean()), 4), "lo": round(float(lo), 4), "hi": round(float(hi), 4)}


def centre_errors(
    made: np.ndarray, true: np.ndarray, held: np.ndarray, caption: str
) -> tuple[list[float], list[float]]:
    """Distances in px of each ball's centre from the true one: in the made frames, and if the held frame just stayed.

    made, true (n, h, w, 3) the same pixel frames; held (h, w, 3) the last given one; all float in [0, 1]. A
    ball that is not there counts world.MISSING.
    """
    (at, mass), (truth, _) = world.detect(made), world.detect(true)
    still, _ = world.detect(held[None])
    errors, holding = [], []
    for c in world.read_caption(caption)[0]:
        there = mass[c] > 0.5
        errors += np.where(there, np.hypot(*(at[c] - truth[c])), world.MISSING).tolist()
        holding += np.hypot(*(still[c] - truth[c])).tolist()
    return errors, holding


# ---- the parts -------------------------------------------------------------------------------------------------------


def sample_all(net, noise, text, cfg, x0=None, cond_mask=None, progress=None) -> torch.Tensor:
    """flow.euler in batches of 64."""
    made = []
    for i in range(0, len(noise), 64):
        part = slice(i, i + 64)
        given = () if x0 is None else (x0[part], cond_mask[part])
        made.append(flow.euler(net, noise[part], text[part], cfg.nfe, cfg.t_shift, *given))
        if progress:
            progress.update(len(noise[part]))
    return torch.cat(made)


def sweep(net, codec, clips, cfg, run, bar) -> tuple[list[dict], dict]:
    """Continues the same clips, from the same noise, from 0 … F given frames.

    Returns a row for each, and samples to show.
    """
    index = list(range(cfg.sweep_clips))
    x0, text = clips.get("x0", index), clips.text(index)
    captions = [clips.rows[i]["caption"] for i in index]
    noise = flow.draw_noise(x0.shape[1:], [("sweep", cfg.seed, clips.rows[i]["id"]) for i in index])
    true, frames, rows, shown = world.pixels(codec, x0), x0.shape[2], [], {}
    for n in range(frames + 1):
        cond_mask = (torch.arange(frames) < n).expand(len(index), frames)
        made = sample_all(net, noise, text, cfg, x0, cond_mask, bar) if n < frames else x0
        row = {"n_cond": n, "score": means(world.score(codec, made, captions))["score"]}
        if n < frames:
            first = max(4 * n - 3, 0)
            generated = world.score(codec, made, captions, slice(first, None))
            row |= {"generated_score": means(generated)["score"], "generated": means(generated)}
        if 0 < n < frames:
            got = world.pixels(codec, made[:, :, : n + 1])[:, first:]
            both = [centre_errors(g, t[first : first + 4], t[first - 1], c) for g, t, c in zip(got, true, captions)]
            error, hold = (np.array([e for pair in both for e in pair[k]]).reshape(-1, 4) for k in (0, 1))
            row |= {"next_frame": round(float(error.mean()), 4), "hold": round(float(hold.mean()), 4)}
            row |= {
                "next_frame_last": round(float(error[:, -1].mean()), 4),
                "hold_last": round(float(hold[:, -1].mean()), 4),
            }
        rows.append(row)
        run.log(n, **{key: value for key, value in row.items() if isinstance(value, float)})
        shown[f"sweep_{n}"] = made[:SHOWN]
    return rows, shown


def label_accuracy(codec, pairs) -> dict[str, float]:
    """Share of the pairs whose winner has the better exact score (a tie counts half), and the mean scores."""
    index = list(range(len(pairs)))
    captions = [row["caption"] for row in pairs.rows]
    both = (world.score(codec, pairs.get(side, index), captions) for side in ("chosen", "rejected"))
    chosen, rejected = (scores["score"] for scores in both)
    agree = (chosen > rejected) + 0.5 * (chosen == rejected)
    return {
        "accuracy": float(agree.mean()),
        "chosen": float(chosen.mean()),
        "rejected": float(rejected.mean()),
        "pairs": len(index),
    }


def load_rows(cfg) -> dict[str, model.DiT]:
    """The models of the table, each fused into one set of weights."""
    loras = {"Pretrain": "", "SFT": cfg.sft, "DynamicsBoost": f"{cfg.sft},{cfg.asymdpo}"}
    return {name: model.load_fused(cfg.base, model.lora_files(files)) for name, files in loras.items()}


def prompts(clips: data.Shards, count: int, seed: int) -> tuple[list[int], torch.Tensor, torch.Tensor, list[str]]:
    """What every model is judged on: clips by index, again and again where they are fewer; their noise (count, C, F, H,
    W), text (count, S, text_dim) and captions.
    """
    index = [i % len(clips) for i in range(count)]
    keys = [("table", seed, clips.rows[i]["id"], n // len(clips)) for n, i in enumerate(index)]
    return index, flow.draw_noise(clips.shape("x0"), keys), clips.text(index), [clips.rows[i]["caption"] for i in index]


def table(cfg, codec, clips, bar) -> tuple[dict, dict, dict]:
    """Every model on the same prompts and noise: mean metrics, scores of each clip, samples to show.

    Real clips beside them.
    """
    index, noise, text, captions = prompts(clips, cfg.clips, cfg.seed)
    scores, shown = {}, {}
    for name, net in load_rows(cfg).items():
        made = sample_all(net, noise, text, cfg, progress=bar)
        scores[name], shown[f"table_{name}"] = world.score(codec, made, captions), made[:SHOWN]
    real = means(world.score(codec, clips.get("x0", index), captions))
    return {**{name: means(s) for name, s in scores.items()}, "real clips": real}, scores, shown


def check_folders(cfg) -> None:
    """UserError unless every input is finished and has what is asked of it."""
    for folder, maker in (
        (cfg.base, "sft.py"),
        (cfg.sft, "sft.py --base"),
        (cfg.asymdpo, "asymdpo.py"),
        (cfg.continuation, "continuation.py"),
    ):
        common.read_manifest(folder, maker)
    if cfg.clips < 2 or cfg.sweep_clips < 2:
        raise UserError(f"--clips, --sweep_clips: expected at least 2 each, got {cfg.clips} and {cfg.sweep_clips}")


def main(cfg: Config) -> None:
    # ---- what to do, checked before anything is loaded
    cfg = common.resolve(cfg, PRESETS)
    if cfg.dry_run:
        shape, _ = cost.latents(cfg.preset, cfg.data, "prepare.py", cfg.split)
        samples = shape[1] * cfg.sweep_clips + 3 * cfg.clips
        return cost.sampling("evaluate", cfg.preset, shape, samples, cfg.nfe, batch=64, given=True)
    group = common.Group(0, 1, torch.device("cpu"))
    inputs = {name: getattr(cfg, name) for name in ("data", "base", "sft", "continuation", "pairs", "asymdpo")}
    check_folders(cfg)
    run = common.Run(cfg, "evaluate", group, inputs)
    if run.done:
        return
    clips, pairs = data.Shards(cfg.data, "prepare.py", cfg.split), data.Shards(cfg.pairs, "make_pairs.py")
    if "chosen" not in pairs.fields():
        raise UserError(f"{cfg.pairs}: expected pairs in order, got samples of make_pairs.py --pairs, which have none")
    if cfg.sweep_clips > len(clips):
        raise UserError(
            f"--sweep_clips: expected at most {len(clips)}, the clips of split {cfg.split!r}, got {cfg.sweep_clips}"
        )
    if not all(world.read_caption(row["caption"])[0] for row in clips.rows + pairs.rows):
        raise UserError(f"{cfg.data}: expected clips of world.py, which name coloured balls: physics is what is scored")
    codec, frames = vae.load(cfg.data), clips.shape("x0")[1]

    # ---- measure; not so long that it needs checkpoints
    run.resume()
    with run.progress(frames * cfg.sweep_clips + 3 * cfg.clips, unit="clip") as bar:
        net = model.load_continuation(cfg.base, cfg.continuation)
        curve, shown = sweep(net, codec, clips, cfg, run, bar)
        rows, scores, more = table(cfg, codec, clips, bar)
    labels = label_accuracy(codec, pairs)

    # ---- result
    difference = scores["DynamicsBoost"]["score"] - scores["SFT"]["score"]
    sweep_scores = {
        "score": {row["n_cond"]: row["score"] for row in curve},
        "generated": {row["n_cond"]: row["generated_score"] for row in curve[:-1]},
    }
    # one given picture says nothing about velocity: from two given latent frames on
    between = [row for row in curve if 2 <= row["n_cond"] <= frames - 1]
    distances = ("next_frame", "hold", "next_frame_last", "hold_last")
    summary = {
        "label_accuracy": labels["accuracy"],
        "labels": labels,
        "sweep": sweep_scores,
        "sweep_rows": curve,
        "table": rows,
        "asymdpo_minus_sft": paired_bootstrap(difference, cfg.seed),
        "next_frame_error": {key: round(float(np.mean([row[key] for row in between])), 4) for key in distances},
        "clips": cfg.clips,
        "sweep_clips": cfg.sweep_clips,
        "seed": cfg.seed,
        "commit": common.commit(),
    }
    common.write_json(run.folder / "summary.json", summary)
    common.write_tensors(run.folder / "samples.safetensors", {k: v.contiguous() for k, v in {**shown, **more}.items()})
    run.finish(["summary.json", "samples.safetensors"])


def mode(argv: list[str]):
    """The module whose main, Config and __doc__ a command line asks for: a mode refuses the options of another."""
    words = [word[2:].split("=")[0].replace("-", "_") for word in argv if word.startswith("--")]
    modes = dict.fromkeys(benchmarks.BENCHMARKS, benchmarks) | {"videos": metrics}
    return next((modes[word] for word in words if word in modes), sys.modules[__name__])


if __name__ == "__main__":
    chosen = mode(sys.argv[1:])
    common.run(chosen.main, chosen.Config, chosen.__doc__)

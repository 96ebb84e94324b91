"""docs/tables.md and docs/tables.json from what bench/tables.py made: means, paired intervals, claims and verdicts.

    python bench/tables_page.py --out out/tables                    prints the page
    python bench/tables_page.py --out out/tables --write            writes it to docs/

A seed is one draw of everything, so the unit of the statistics is the seed: a row's difference is taken prompt by
prompt, averaged within each seed, and the interval is Student's t over the seeds. A difference whose 95 % interval
holds 0 is called not resolved.
"""

import argparse
import json
import math
import os
import platform
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import tables
import torch
from safetensors.numpy import load_file
from tables import PAIRS, ROWS

import asymdpo
import common
import continuation
import cost
import data
import make_pairs
import model
import sft
import vae
import world

DOCS = Path(__file__).resolve().parent.parent / "docs"
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)  # Student's t, 1 … 11 degrees
T800 = (1.376, 1.061, 0.978, 0.941, 0.920, 0.906, 0.896, 0.889, 0.883, 0.879, 0.876)  # its 80 % point, one-sided
GROUPS = {  # heading -> rows
    "Systems": [
        "pretrain", "sft", "sft_more", "flow_exact", "flow_noisy", "flow_appearance", "structural_exact",
        "structural_noisy", "dense_exact", "dense_noisy", "dynamicsboost",
    ],
    "Which frames are given": ["dynamicsboost", "n1_0", "n1_0_n2_13", "n1_1_n2_13", "gt_winner", "n1_late"],
    "The loss": ["dynamicsboost", "region_123", "region_3", "outside", "plain", "reference_free", "lambda"],
    "The continuation model and the cold start": ["dynamicsboost", "context", "frame", "off", "no_cold_start"],
    "Closing the gap": ["dynamicsboost", "t_0", "t_2", "per_clip_2", "strength_half", "on_policy", "round_2"],
}  # fmt: skip


# ---- numbers ---------------------------------------------------------------------------------------------------------


def interval(values: np.ndarray) -> dict[str, float]:
    """Mean over the seeds and half the width of its 95 % interval; sd between seeds."""
    n = len(values)
    sd = float(values.std(ddof=1)) if n > 1 else math.nan
    half = T975[n - 2] * sd / n**0.5 if n > 1 else math.nan
    return {"mean": float(values.mean()), "half": half, "sd": sd, "seeds": [round(float(v), 4) for v in values]}


def resolvable(sd: float, n: int) -> float:
    """The difference that n seeds find in four runs of five, at 5 % two-sided: (t.975 + t.8)·sd/√n."""
    return (T975[n - 2] + T800[n - 2]) * sd / n**0.5


def scores(root: Path, seed: int, row: str) -> dict[str, np.ndarray]:
    return load_file(root / f"seed-{seed}" / "eval" / row / "scores.safetensors")


def compare(root: Path, seeds: list[int], row: str, other: str) -> dict[str, dict]:
    """Paired differences row − other of every metric."""
    found = {m: [] for m in world.METRICS}
    for seed in seeds:
        a, b = scores(root, seed, row), scores(root, seed, other)
        for m in found:
            found[m].append(float((a[m] - b[m]).mean()))
    return {m: interval(np.array(v)) for m, v in found.items()}


def training(folder: Path) -> dict[str, float]:
    """Means over the second half of a DPO run: d of winner and loser by region, accuracy by region and time."""
    rows = common.read_jsonl(folder / "metrics.jsonl")
    rows = rows[len(rows) // 2 :]
    wanted = re.compile(r"(diff|err)/\w+/[23]$|diff/[wl]/[23]/t\d|acc/[23]/t\d|rewards/accuracies|saturated")
    names = {name for row in rows for name in row if wanted.match(name)}
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in sorted(names)}


def averaged(found: list[dict[str, float]]) -> dict[str, float]:
    return {k: float(np.mean([f[k] for f in found if k in f])) for f in found for k in f}


def summary(root: Path, seeds: list[int]) -> dict:
    """All figures of the page."""
    rows = {}
    for name, row in ROWS.items():
        if not all((root / f"seed-{s}" / "eval" / name / common.MANIFEST).is_file() for s in seeds):
            raise common.UserError(f"{root}: expected row {name} of seeds {seeds}, it is not finished; run make tables")
        mean = averaged([{m: v.mean() for m, v in scores(root, s, name).items()} for s in seeds])
        rows[name] = {"title": row.title, "mean": mean, "pairs": row.pairs, "labels": row.labels}
        rows[name] |= {f"vs_{other}": compare(root, seeds, name, other) for other in ("sft", "dynamicsboost")}
        if row.pairs:
            facts = [json.loads((root / f"seed-{s}/facts/{row.labels or row.pairs}.json").read_text()) for s in seeds]
            rows[name] |= {"facts": averaged(facts), "facts_seeds": facts}
            logs = [training(root / f"seed-{s}" / "dpo" / name) for s in seeds]
            rows[name] |= {"training": averaged(logs), "training_seeds": logs}
    sweeps = [json.loads((root / f"seed-{s}/facts/sweep.json").read_text()) for s in seeds]
    spent = [json.loads(line)["processor_seconds"] for s in seeds for line in log_lines(root / f"seed-{s}" / "log.txt")]
    return {
        "commit": common.commit(), "machine": f"{os.cpu_count()} cores, PyTorch {torch.__version__}",
        "python": platform.python_version(), "seeds": seeds, "clips": tables.CLIPS,
        "processor_minutes": round(sum(spent) / 60, 1), "rows": rows, "real": real_clips(root, seeds),
        "sweep": sweeps, "hours": hours(),
    }  # fmt: skip


def log_lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.startswith('{"processor_seconds"')]


def real_clips(root: Path, seeds: list[int]) -> dict[str, float]:
    """The metrics of the real clips after the codec: what a perfect model would score."""
    found = []
    for seed in seeds:
        clips = data.Shards(root / f"seed-{seed}" / "shards", "prepare.py", "eval", verify=False)
        index = list(range(min(tables.CLIPS, len(clips))))
        captions = [clips.rows[i]["caption"] for i in index]
        judged = world.score(vae.load(clips.folder), clips.get("x0", index), captions)
        found.append({m: v.mean() for m, v in judged.items()})
    return averaged(found)


# ---- what the recipes cost on Wan ------------------------------------------------------------------------------------


def hours(preset: str = "1.3b", clips: int = 20_000) -> dict[str, float]:
    """GPU-hours of each row's recipe at the paper's numbers, a prediction: counted FLOP at cost.py's rate.

    The scorer is not counted, decoding the samples for it is.
    """
    shape = cost.SHAPES[preset]

    def per_sample(stage, loss):
        cfg = common.resolve(stage.Config(preset=preset), stage.PRESETS)

        def build(net):
            net.bfloat16().gradient_checkpointing = True
            model.add_lora(net, cfg.rank, cfg.rank, cfg.layers)
            if stage is continuation:
                model.add_task_prompt(net, shape[1], cfg.prompts)
            return net

        call = (lambda *a: loss(cfg, *a)) if stage is asymdpo else loss
        return cfg.steps * cfg.batch_size * cost.measure_dit(preset, shape, 1, call, build, train=True)["flop"]

    start = per_sample(sft, sft.flow_loss)
    phi, dpo = per_sample(continuation, continuation.example_loss), per_sample(asymdpo, asymdpo.example_loss)
    one = cost.measure_dit(preset, shape, 1, lambda net, x0, text, noise, t: net(x0, t, text))["flop"]
    decode = cost.measure(lambda: vae.VAE().bfloat16(), lambda net: net.decode(torch.empty(1, *shape)))["flop"]
    per_hour, found = cost.UTILISATION * cost.PEAK[torch.bfloat16] * 3600, {}
    for name, row in ROWS.items():
        flop = start * (row.start != "") + (dpo - start) * (name == "sft_more")
        if row.pairs:
            options = {k: v for k, v in PAIRS[row.pairs].items() if k not in ("lora", "continuation", "seed")}
            cfg = common.resolve(make_pairs.Config(preset=preset, **options), make_pairs.PRESETS)
            low, high = make_pairs.windows(cfg, shape[1])[2:]
            kind = cfg.pairs
            samples = 2 - (high == shape[1]) / (high - low + 1) if kind == "continuation" else 2
            steps = make_pairs.structural_steps(cfg) if kind == "structural" else cfg.nfe
            flop += clips * cfg.per_clip * samples * 2 * steps * one + dpo
            flop += phi if kind == "continuation" else clips * 2 * decode
        if name == "round_2":
            flop += clips * samples * 2 * steps * one + dpo
        found[name] = flop / per_hour
    return found


# ---- the page --------------------------------------------------------------------------------------------------------


def signed(value: dict | float, digits: int = 3) -> str:
    """+0.050 ± 0.010, bold where the interval does not hold 0."""
    if not isinstance(value, dict):
        return f"{value:+.{digits}f}".replace("-", "−")
    text = f"{value['mean']:+.{digits}f} ± {value['half']:.{digits}f}".replace("-", "−")
    return f"**{text}**" if abs(value["mean"]) > value["half"] else text


def plain(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".replace("-", "−")


def verdict(value: dict, want: int = 1) -> str:
    """In words: a difference of the sign `want` is reproduced, of the other not; one that holds 0 is not resolved."""
    if abs(value["mean"]) <= value["half"]:
        return "not resolved"
    return "reproduced" if value["mean"] * want > 0 else "not reproduced"


def main_table(found: dict, names: list[str]) -> str:
    lines = [
        "| | score | against SFT | against DynamicsBoost | traj, px ↓ | presence ↑ | shape ↓ |"
        " dynamic degree, px/frame | jerkiness, px/frame² ↓ | label accuracy | GPU-h, Wan-1.3B |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        row = found["rows"][name]
        m, facts = row["mean"], row.get("facts", {})
        against = ["" if name == other else signed(row[f"vs_{other}"]["score"]) for other in ("sft", "dynamicsboost")]
        cells = [
            row["title"], plain(m["score"], 3), *against, plain(m["traj"], 2), plain(m["presence"], 4),
            plain(m["shape"], 4), plain(m["dyn"], 3), plain(m["accel"], 3),
            plain(facts["accuracy"], 3) if facts else "", f"{found['hours'][name]:.0f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    m = found["real"]
    cells = ["real clips", plain(m["score"], 3), "", "", plain(m["traj"], 2), plain(m["presence"], 4)]
    cells += [plain(m["shape"], 4), plain(m["dyn"], 3), plain(m["accel"], 3), "", ""]
    return "\n".join([*lines, f"| {' | '.join(cells)} |"])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/tables", help="folder of bench/tables.py (default out/tables)")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(6)), help="default 0 … 5")
    parser.add_argument("--write", action="store_true", help="write docs/tables.md and docs/tables.json")
    args = parser.parse_args(argv)
    found = summary(Path(args.out), args.seeds)
    print("\n\n".join(f"## {heading}\n\n{main_table(found, names)}" for heading, names in GROUPS.items()))
    if args.write:
        common.write_json(DOCS / "tables.json", found)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except common.UserError as error:
        sys.exit(f"error: {error}")

"""docs/tables.md and docs/tables.json from what bench/tables.py made: means, paired intervals, claims and verdicts.

    python bench/tables_page.py --out out/tables                    prints the page
    python bench/tables_page.py --out out/tables --write            writes it to docs/
    python bench/tables_page.py --out out/try --seeds 12 --rows gt_winner       prints these rows' table alone

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

import numpy as np
import torch
from safetensors.numpy import load_file

import asymdpo
import continuation
import make_pairs
import model
import sft
from experiments import cost, tables
from experiments.tables import PAIRS, ROWS
from runtime import run as common
from runtime import shards as data
from tiny import balls as world
from wan import vae

DOCS = Path(__file__).resolve().parent.parent / "docs"
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)  # Student's t, 1 … 11 degrees
T800 = (1.376, 1.061, 0.978, 0.941, 0.920, 0.906, 0.896, 0.889, 0.883, 0.879, 0.876)  # its 80 % point, one-sided
GROUPS = {  # heading -> rows
    "Systems": [
        "pretrain", "sft", "sft_more", "flow_exact", "flow_half", "flow_fast", "flow_noisy", "flow_noisy_fast",
        "flow_appearance", "structural_exact", "dense_exact", "dynamicsboost",
    ],
    "Which frames are given": ["dynamicsboost", "n1_0", "n1_0_n2_13", "n1_1_n2_13", "gt_winner", "n1_late"],
    "The loss": ["dynamicsboost", "region_123", "region_3", "outside", "plain", "reference_free", "lambda"],
    "The continuation model and the cold start": ["dynamicsboost", "context", "frame", "off", "no_cold_start"],
    "Closing the gap": [
        "dynamicsboost", "per_clip_2", "strength_quarter", "strength_zero",
        "on_policy", "round_2",
    ],
}  # fmt: skip

PAPER = {  # row -> VBench's overall score and dynamic degree in the paper, as three published reading notes give them
    "pretrain": (24.48, 34.72), "sft": (24.02, 34.15), "flow_noisy": (25.22, 31.22),
    "structural_exact": (24.18, 35.25), "dense_exact": (25.02, 40.10), "dynamicsboost": (25.64, 44.92),
    "n1_0": (25.31, 43.92), "n1_0_n2_13": (24.42, 34.32), "n1_1_n2_13": (24.94, 35.72), "gt_winner": (25.44, 46.41),
    "region_123": (22.15, 42.48), "region_3": (24.10, 38.21),
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


def summary(root: Path, seeds: list[int], names: list[str]) -> dict:
    """All figures of the page."""
    for name in dict.fromkeys([*names, "sft", "dynamicsboost"]):
        if not all((root / f"seed-{s}" / "eval" / name / common.MANIFEST).is_file() for s in seeds):
            raise common.UserError(f"{root}: expected row {name} of seeds {seeds}, it is not finished; run make tables")
    rows = {}
    for name in names:
        row = ROWS[name]
        mean = averaged([{m: v.mean() for m, v in scores(root, s, name).items()} for s in seeds])
        rows[name] = {"title": row.title, "mean": mean, "pairs": row.pairs, "labels": row.labels}
        rows[name] |= {f"vs_{other}": compare(root, seeds, name, other) for other in ("sft", "dynamicsboost")}
        if row.pairs:
            facts = [json.loads((root / f"seed-{s}/facts/{row.labels or row.pairs}.json").read_text()) for s in seeds]
            rows[name] |= {"facts": averaged(facts), "facts_seeds": facts}
            logs = [training(root / f"seed-{s}" / "dpo" / name) for s in seeds]
            rows[name] |= {"training": averaged(logs), "training_seeds": logs}
    sweeps = [json.loads((root / f"seed-{s}/facts/sweep.json").read_text()) for s in seeds]
    # the seed that was not interrupted, or least: what a killed run spent is not in its log
    spent = max(sum(processor_seconds(root / f"seed-{s}" / "log.txt")) for s in seeds) * len(seeds)
    return rounded({
        "commit": commits(root, seeds, names), "machine": f"{os.cpu_count()} cores, PyTorch {torch.__version__}",
        "python": platform.python_version(), "seeds": seeds, "clips": tables.CLIPS,
        "processor_minutes": round(spent / 60, 1), "rows": rows, "real": real_clips(root, seeds),
        "sweep": sweeps, "sweep_steps": sweep_steps(sweeps), "hours": hours(),
        "groups": {heading: [name for name in some if name in rows] for heading, some in GROUPS.items()},
    })  # fmt: skip


def commits(root: Path, seeds: list[int], names: list[str]) -> str:
    """Of the code that judged the rows, which may be older than the code that makes the page."""
    folders = [root / f"seed-{s}" / "eval" / name for s in seeds for name in names]
    made = {json.loads((folder / common.MANIFEST).read_text()).get("commit", "unknown") for folder in folders}
    return ", ".join(sorted(made))


def rounded(value):
    """Every number in it to five significant digits."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def sweep_steps(sweeps: list[list[dict]]) -> dict:
    """By given frames: mean and interval over the seeds, and of the step from n to n + 1, which is paired; None where
    there is none. Then what becomes of the claim that quality rises with the given frames, but for none.
    """
    found = {}
    for key in ("score", "generated_score"):
        values = np.array([[row.get(key, np.nan) for row in rows] for rows in sweeps]).T
        for name, some in ((key, values), (f"{key}_steps", np.diff(values, axis=0))):
            found[name] = [interval(v) if np.isfinite(v).all() else None for v in some]
    steps = dict(enumerate(found["score_steps"]))
    del steps[0]
    falls = [n for n, step in steps.items() if step["mean"] < -step["half"]]
    flat = [n for n, step in steps.items() if not abs(step["mean"]) > step["half"]]
    word = "reproduced, but for the steps that are not resolved" if flat else "reproduced"
    word = "not resolved" if len(flat) == len(steps) else word
    return found | {"falls": falls, "flat": flat, "verdict": "not reproduced" if falls else word}


def processor_seconds(log: Path) -> list[float]:
    """What each finished run of bench/tables.py spent on a seed."""
    lines = (line for line in log.read_text().splitlines() if line.startswith('{"processor_seconds"'))
    return [json.loads(line)["processor_seconds"] for line in lines]


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

    def run_of(stage, loss):
        cfg = common.resolve(stage.Config(preset=preset), stage.PRESETS)

        def build(net):
            net.bfloat16().gradient_checkpointing = True
            model.add_lora(net, cfg.rank, cfg.rank, cfg.layers)
            if stage is continuation:
                model.add_task_prompt(net, shape[1], cfg.prompts)
            return net

        call = (lambda *a: loss(cfg, *a)) if stage is asymdpo else loss
        return cfg.steps * cfg.batch_size * cost.measure_dit(preset, shape, 1, call, build, train=True)["flop"]

    start = run_of(sft, sft.flow_loss)
    phi, dpo = run_of(continuation, continuation.example_loss), run_of(asymdpo, asymdpo.example_loss)
    longer = 1 + asymdpo.PRESETS[preset]["steps"] / sft.PRESETS[preset]["steps"]
    one = cost.measure_dit(preset, shape, 1, lambda net, x0, text, noise, t: net(x0, t, text))["flop"]
    decode = cost.measure(lambda: vae.VAE().bfloat16(), lambda net: net.decode(torch.empty(1, *shape)))["flop"]
    per_hour, found = cost.UTILISATION * cost.PEAK[torch.bfloat16] * 3600, {}
    for name, row in ROWS.items():
        flop = start * (longer if name == "sft_more" else row.start != "")
        row = ROWS.get(row.half_of, row)
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
    """+0.050 ± 0.010, bold where the interval does not hold 0. A number, or one seed, has no interval."""
    if not isinstance(value, dict) or math.isnan(value["half"]):
        return f"{value['mean'] if isinstance(value, dict) else value:+.{digits}f}".replace("-", "−")
    text = f"{value['mean']:+.{digits}f} ± {value['half']:.{digits}f}".replace("-", "−")
    return f"**{text}**" if abs(value["mean"]) > value["half"] else text


def plain(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".replace("-", "−")


def verdict(value: dict, want: int = 1) -> str:
    """In words: a difference of the sign `want` is reproduced, of the other not; one that holds 0 is not resolved."""
    if not abs(value["mean"]) > value["half"]:
        return "not resolved"
    return "reproduced" if value["mean"] * want > 0 else "not reproduced"


def main_table(found: dict, names: list[str]) -> str:
    lines = [
        "| | score | against SFT | against DynamicsBoost | traj, px ↓ | presence ↑ | shape ↓ |"
        " dynamic degree, px/frame | jerkiness, px/frame² ↓ | label accuracy | GPU-h, Wan-1.3B, predicted |",
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


def compared(words: str, value: dict) -> str:
    return f"* **{words}: {verdict(value)}.** {signed(value)}."


def claims(found: dict) -> str:
    """A line for each claim that two rows can test."""
    rows, ours = found["rows"], "dynamicsboost"
    lines = [compared("DynamicsBoost scores higher than SFT", rows[ours]["vs_sft"]["score"])]
    for name, words in {
        "sft_more": "SFT for as many steps more", "structural_exact": "Flow-StructuralDPO with the exact scorer",
        "dense_exact": "Flow-DenseDPO with the exact scorer",
        "flow_noisy": "Flow-DPO with flipped labels",
        "flow_noisy_fast": "Flow-DPO with flipped labels at 3 × the rate",
        "flow_appearance": "Flow-DPO with the appearance scorer",
        "flow_exact": "Flow-DPO with the exact scorer, which no real user has",
        "flow_fast": "Flow-DPO with the exact scorer at 3 × the rate",
        "n1_0": "with N1 from 0 on", "n1_0_n2_13": "with N1 = 0, N2 = N", "n1_1_n2_13": "with N1 = 1, N2 = N",
        "region_123": "with its loss on ①②③", "region_3": "with its loss on ③", "reference_free": "without a reference",
        "plain": "without 1/K", "gt_winner": "with N2 = N (`gt-winner`)", "no_cold_start": "without the cold start",
    }.items():  # fmt: skip
        value = rows[name]["vs_dynamicsboost"]["score"]
        ours_less_it = {"mean": -value["mean"], "half": value["half"]}
        lines.append(compared(f"DynamicsBoost scores higher than {words}", ours_less_it))
    for name, words in (("context", "in the context"), ("frame", "on the tokens")):  # all of Φs of 300 steps
        each = [np.array(rows[n]["vs_sft"]["score"]["seeds"]) for n in (name, "off")]
        lines.append(compared(f"Task prompts {words} score higher than none", interval(each[0] - each[1])))
    accuracy = [f["accuracy"] for f in rows[ours]["facts_seeds"]]
    held = "reproduced" if min(accuracy) >= 0.9 else "not reproduced"
    lines.append(
        f"* **The order of a pair is right without a label: {held}.** The exact score agrees in {min(accuracy):.3f} to "
        f"{max(accuracy):.3f} of {tables.FACTS} pairs of a seed (expected: 0.90 or more)."
    )
    return "\n".join(lines)


def paper_table(found: dict) -> str:
    """The paper's rows: its figures against SFT, and ours."""
    lines = ["| | VBench overall, paper | score, here | VBench dynamic degree, paper | dynamic degree, here |"]
    lines.append("|---" * 5 + "|")
    for name, (overall, dynamic) in PAPER.items():
        if name in found["rows"] and name != "sft":
            row, base = found["rows"][name], PAPER["sft"]
            theirs = [signed(x - y, 2) for x, y in zip((overall, dynamic), base)]
            here = [signed(row["vs_sft"][m]) for m in ("score", "dyn")]
            lines.append(f"| {row['title']} | {theirs[0]} | {here[0]} | {theirs[1]} | {here[1]} |")
    return "\n".join(lines)


def sweep_claim(found: dict) -> str:
    """Does the score rise with the given frames?"""
    steps = found["sweep_steps"]
    frames = len(steps["score_steps"])
    lines = [f"| given frames | {' | '.join(str(n) for n in range(frames + 1))} |", "|---" * (frames + 2) + "|"]
    for words, key in (("whole clip", "score"), ("generated frames", "generated_score")):
        lines.append(f"| {words} | {' | '.join(plain(v['mean'], 2) if v else '' for v in steps[key])} |")
    flat, falls = steps["flat"], steps["falls"]
    unresolved = f" Not resolved: from {', '.join(map(str, flat))}." if flat else ""
    first = f"From 0 to 1 given frame: {signed(steps['score_steps'][0])}."
    return (
        "\n".join(lines)
        + f"\n\n* **Quality rises with the number of given frames, but for none: {steps['verdict']}.** {first}"
        + unresolved
        + (f" Falls from {', '.join(map(str, falls))}." if falls else "")
        + " Judged by the whole clip, which gets better in part because more of it is real."
    )


def motion_claim(found: dict) -> str:
    """Dynamic degree, also at an equal gain of score."""
    rows, real = found["rows"], found["real"]["dyn"]
    lines = ["| | score against SFT | dynamic degree against SFT | its distance to real clips |", "|---|---|---|---|"]
    for name in ("sft", "flow_half", "flow_exact", "flow_fast", "flow_noisy", "flow_appearance", "dynamicsboost"):
        if not (row := rows.get(name)):
            continue
        gain, motion = (signed(row["vs_sft"][m]) if name != "sft" else "" for m in ("score", "dyn"))
        lines.append(f"| {row['title']} | {gain} | {motion} | {signed(row['mean']['dyn'] - real)} |")
    flow, ours = (rows[name]["vs_sft"] for name in ("flow_exact", "dynamicsboost"))
    return (
        "\n".join(lines)
        + f"\n\n* **Flow-DPO lowers the dynamic degree: {verdict(flow['dyn'], -1)}.** {signed(flow['dyn'])} px/frame."
        + f"\n* **DynamicsBoost keeps it, within 5 %: {kept(ours['dyn'], 0.05 * rows['sft']['mean']['dyn'])}.** "
        + f"{signed(ours['dyn'])} px/frame.\n{slowing_claim(flow, ours)}"
    )


def kept(value: dict, within: float) -> str:
    """In words: whether the whole interval is that near to 0, or none of it."""
    mean, half = abs(value["mean"]), value["half"]
    return "reproduced" if mean + half <= within else "not reproduced" if mean - half > within else "not resolved"


def slowing_claim(flow: dict, ours: dict) -> str:
    """Change of dynamic degree for each point of score. A seed without a gain has no such number, and only where
    Flow-DPO is seen to slow can another slow less.
    """
    words = "* **At an equal gain of score DynamicsBoost slows less:"
    if min(flow["score"]["seeds"] + ours["score"]["seeds"]) <= 0:
        return f"{words} not resolved.** Not every seed has a gain of both to divide by."
    share, own = (np.divide(v["dyn"]["seeds"], v["score"]["seeds"]) for v in (flow, ours))
    gap, share, own = interval(own - share), interval(share), interval(own)
    slows = verdict(share, -1) == "reproduced"
    return (
        f"{words} {verdict(gap) if slows else 'not resolved'}.** Change of dynamic degree for each point of score: "
        f"Flow-DPO {signed(share, 2)}, DynamicsBoost {signed(own, 2)}; the difference {signed(gap, 2)}."
        + ("" if slows else " That Flow-DPO slows at all is not seen here.")
    )


def displacement_table(found: dict) -> str:
    """d of winner and loser by region, in thousandths, over the second half of training."""
    lines = [
        "| | d^w ② | d^l ② | d^w ③ | d^l ③ | score against SFT |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name in ("dynamicsboost", "lambda", "reference_free", "region_3", "gt_winner", "on_policy", "flow_exact"):
        if not (row := found["rows"].get(name)):
            continue
        cells = []
        for key in ("diff/w/2", "diff/l/2", "diff/w/3", "diff/l/3"):
            values = [1000 * t[key] for t in row["training_seeds"] if key in t]
            cells.append(signed(interval(np.array(values)), 2) if len(values) == len(found["seeds"]) else "")
        lines.append(f"| {row['title']} | {' | '.join(cells)} | {signed(row['vs_sft']['score'])} |")
    return "\n".join(lines)


def accuracy_map(found: dict, name: str) -> str:
    """Share of pairs whose winner gained on the loser, by time and region."""
    row = found["rows"][name]["training"]
    buckets = ["0 … ¼", "¼ … ½", "½ … ¾", "¾ … 1"]
    lines = ["| t | " + " | ".join(buckets) + " |", "|---" * 5 + "|"]
    for region, words in (("2", "② real against generated"), ("3", "③ both generated")):
        cells = [plain(row[f"acc/{region}/t{b}"], 3) if f"acc/{region}/t{b}" in row else "" for b in range(4)]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


FACTORS = {  # what a good loser may be made of -> how to read it
    "next frame": lambda facts, training: facts.get("next_frame"),
    "loser's score": lambda facts, training: facts.get("rejected_score"),
    "loser's dynamic degree": lambda facts, training: facts.get("rejected_dyn"),
    "reference's error, loser": lambda facts, training: training.get("err/l_ref/2"),
    "reference's error, winner": lambda facts, training: training.get("err/w_ref/2"),
}


def loser_tables(found: dict) -> tuple[str, str]:
    """Gain beside what the losers are: of one window of N1 and N2, with correlations; of several."""
    alone = [
        name for name, row in ROWS.items()
        if row.pairs and not row.labels and not row.options and row.start == "sft" and name in found["rows"]
    ]  # fmt: skip
    moved = [name for name in alone if any(key[:3] in ("n1_", "n2_") for key in PAIRS[ROWS[name].pairs])]
    same = [name for name in alone if name not in moved]
    return loser_table(found, same, True), loser_table(found, ["dynamicsboost", *moved], False)


def loser_table(found: dict, names: list[str], correlated: bool) -> str:
    heads = list(FACTORS)
    lines = [f"| | score against SFT | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    table, gains = {head: [] for head in heads}, []
    for name in names:
        row = found["rows"][name]
        values = {h: [f(a, b) for a, b in zip(row["facts_seeds"], row["training_seeds"])] for h, f in FACTORS.items()}
        shown = [plain(np.mean(v), 3) if None not in v else "" for v in values.values()]
        lines.append(f"| {row['title']} | {signed(row['vs_sft']['score'])} | {' | '.join(shown)} |")
        gains.append(row["vs_sft"]["score"]["seeds"])
        for head in heads:
            table[head].append([np.nan if v is None else v for v in values[head]])
    if correlated:
        cells = [correlation(np.array(table[head]), np.array(gains)) for head in heads]
        lines.append(f"| correlation with the gain | | {' | '.join(cells)} |")
    return "\n".join(lines)


def correlation(factor: np.ndarray, gain: np.ndarray) -> str:
    """Pearson's r of (rows, seeds) arrays within each seed, as mean ± half of the interval over the seeds; nothing of
    fewer than three rows, or of rows that are all alike.
    """
    there = np.isfinite(factor).all(1)
    if there.sum() < 3 or not np.ptp(factor[there], axis=0).all():
        return ""
    return signed(interval(np.array([np.corrcoef(f, g)[0, 1] for f, g in zip(factor[there].T, gain[there].T)])), 2)


def power(found: dict, pilot: dict | None) -> str:
    """What could be resolved: said beforehand from the pilot's seeds, and what came."""
    n = len(found["seeds"])
    heads = "rows beforehand | their sd between seeds | resolvable beforehand | sd as it came | interval as it came"
    lines = [f"| | {heads} |", "|---" * 6 + "|"]
    for heading, names in GROUPS.items():
        for other in ("sft", "dynamicsboost"):
            used = [name for name in names if name != other and name != "pretrain"]
            came, known = pooled(found, used, other), [name for name in used if pilot and name in pilot["rows"]]
            before = pooled(pilot, known, other)
            words = f"{heading}, against {ROWS[other].title.strip('*')}"
            cells = [plain(before, 4), plain(resolvable(before, n), 3)] if known else ["", ""]
            cells = [str(len(known)), *cells, plain(came, 4), f"± {T975[n - 2] * came / n**0.5:.3f}"]
            lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def pooled(found: dict, names: list[str], other: str) -> float:
    """Standard deviation between seeds of a row's difference of score, pooled over rows."""
    found_sd = [found["rows"][name][f"vs_{other}"]["score"]["sd"] for name in names]
    return float(np.sqrt(np.mean(np.square(found_sd)))) if found_sd else math.nan


def introduction(found: dict) -> str:
    seeds = ", ".join(map(str, found["seeds"]))
    return f"""# The paper's tables in miniature

Made by `make tables`; do not edit. Seeds {seeds}; {found["clips"]} prompts each; {found["machine"]}; commit
{found["commit"]}; {found["processor_minutes"]:.0f} minutes of one core, half that on two: as many times the dearest
seed's processor time as there are seeds. Settings were chosen on seeds 10, 11 and 12.

This is a world of bouncing balls and a model of 0.4 million parameters, not Wan. The score is exact physics
(`world.score_clip`): −traj/4 − 2·(1 − presence) − 10·shape. *traj* is the distance of the balls from the nearest
physically valid motion, *presence* the share of frames and colours that are as the prompt says, *shape* the error of a
ball's picture, *jerkiness* the median second difference of its path. **Dynamic degree is not "more is better"**: real
clips have {found["real"]["dyn"]:.2f} px/frame. A difference is taken prompt by prompt within a seed and given as mean
± half of the 95 % interval over the seeds (Student's t); **bold** where the interval does not hold 0, which one
difference in twenty does by chance alone: nothing is corrected for the number of rows. GPU-hours are
*predictions*: operations of the recipe at the paper's numbers on Wan2.1-1.3B, counted, at
{100 * cost.UTILISATION:g} % of {cost.PEAK[torch.bfloat16] / 1e12:g} TFLOP/s; a scorer's own are not in them."""


def page(found: dict, pilot: dict | None) -> str:
    same, moved = loser_tables(found)
    groups = "\n\n".join(f"### {heading}\n\n{main_table(found, names)}" for heading, names in GROUPS.items())
    return f"""{introduction(found)}

## What could be resolved

Said beforehand from few tuning seeds and rows (`docs/pilot.json`), so roughly: the standard deviation between seeds of
a row's difference, pooled over the rows, and the difference that {len(found["seeds"])} seeds find in four runs of five
at 5 %.

{power(found, pilot)}

## Tables

{groups}

## The claims, one by one

{claims(found)}

### Beside the paper

Differences from SFT. The paper measures VBench on Wan, in per cent; its Flow-DPO is labelled by a reward model, so it
stands beside the row with flipped labels. Signs can be compared, sizes cannot.

{paper_table(found)}

### Quality by the number of given frames

{sweep_claim(found)}

### Motion

{motion_claim(found)}

### Likelihood displacement, and the shortcut of telling real from generated

Change of the error of winner and loser against the reference, in thousandths, by region, mean over the second half of
training. Displacement: the winner's error rises (d^w > 0) and the margin grows only because the loser's rises more. The
shortcut would show as a gain in ② (real against generated) without one in ③ (both generated).

{displacement_table(found)}

Share of the pairs whose winner gained on the loser, DynamicsBoost, by time (1 is noise) and region; ½ is chance:

{accuracy_map(found, "dynamicsboost")}

### What makes a good loser?

*next frame*: px from the truth of the first latent frame that the continuation makes up, of losers given two frames or
more; *reference's error*: flow matching error of the model before DPO on region ②: the lower on the loser, the more the
loser is what this model makes itself. First rows whose N1 and N2 are drawn alike; correlations are within a seed, over
the rows, mean ± half of the interval over the seeds.

{same}

Then rows that differ in N1 and N2:

{moved}
"""


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/tables", help="folder of bench/tables.py (default out/tables)")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(6)), help="default 0 … 5")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW", help="default all")
    parser.add_argument(
        "--pilot", action="store_true", help="write docs/pilot.json instead: what the power is said from"
    )
    parser.add_argument("--write", action="store_true", help="write docs/tables.md and docs/tables.json")
    args = parser.parse_args(argv)
    if len(args.seeds) > len(T975) + 1:
        parser.error(f"--seeds: expected at most {len(T975) + 1}, got {len(args.seeds)}")
    whole = set(args.rows) == set(ROWS) and len(args.seeds) > 1
    if args.write and not whole:
        parser.error("--write: expected every row and two seeds or more; without it the table of these rows is printed")
    found = summary(Path(args.out), args.seeds, args.rows)
    if not whole and not args.pilot:
        return print(main_table(found, args.rows))
    if args.pilot:
        return common.write_json(DOCS / "pilot.json", found)
    before = DOCS / "pilot.json"
    text = page(found, json.loads(before.read_text()) if before.exists() else None)
    if not args.write:
        return print(text)
    common.write_json(DOCS / "tables.json", found)
    common.write_text(DOCS / "tables.md", text)
    print(f"tables: {DOCS / 'tables.md'}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except common.UserError as error:
        sys.exit(f"error: {error}")

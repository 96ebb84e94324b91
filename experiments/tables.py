"""The paper's tables in miniature: every baseline and ablation on the tiny world, over several seeds.

    python -m experiments.tables                                              all of it: 1 h 40 min of two cores
    python -m experiments.tables --out out/try --seeds 12 --rows flow_exact   some of it, written to --out alone

Each seed draws everything anew: clips, base, cold start, continuation model, pairs, order, noise. Within a seed all
rows share the base, the cold start, and the prompts and noise that they are judged on. So rows are compared prompt by
prompt, and an interval is over the seeds. Settings were chosen on seeds 10, 11 and 12, which are not in the tables.

In    nothing
Out   docs/tables.md, tables.json, tables.png; <out>/seed-N/: log.txt and the stages' folders, dpo/<row> among them
Cost  3 GB of memory a process; whatever is finished is kept, and the same command goes on from there
"""

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import re
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import asymdpo
import continuation
import make_pairs
import model
import prepare
import sft
from experiments import baselines, evaluate, labels, pairs
from runtime.files import MANIFEST, read_jsonl, whole_file, write_json, write_text
from runtime.options import UserError, option, program, resolve
from runtime.shards import Shards
from tiny import balls
from tiny import codec as codecs
from wan.lora import load_adapted, load_continuation, lora_files, read_lora

CLIPS = 512  # prompts that every row is judged on
LABELLED = 160  # pairs that label accuracy is taken from
SWEEP = 96  # clips of the sweep
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)  # Student's t, 1 … 11 degrees


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains and judges every row, and writes the tables."""

    seeds: str = "0,1,2,3,4,5"  # up to twelve seeds, separated by commas
    rows: str = ""  # rows by name, separated by commas; empty: every row
    workers: int = option(2, least=1)  # processes, of one thread each
    out: str = "out/tables"  # folder of all that is made, and of tables of some rows or of one seed


# ---- the rows --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """A model of the tables. Without `pairs` it is not trained by preference: `start` is all of it."""

    title: str
    pairs: dict | None = None  # options of experiments.pairs, if there is a kind among them, or of make_pairs.py
    labels: dict | None = None  # options of experiments.labels; with them the row is a baseline
    start: str = "sft"  # folders of the LoRAs that it starts from, separated by commas
    options: dict = dataclasses.field(default_factory=dict)  # of asymdpo.py or experiments.baselines
    phi: dict = dataclasses.field(default_factory=dict)  # options of continuation.py
    strength: float = 1.0  # of the last LoRA


FLOW, STRUCTURAL = dict(kind="flow", lora="sft"), dict(kind="structural", lora="sft")
EXACT, NOISY, LOOKS = (dict(scorer=name) for name in ("exact", "noisy", "appearance"))
# the same inner temperature for all three losses: Flow-DPO's is halved by its definition
BY_CLIP, BY_SEGMENT = dict(loss="flow", beta=100.0), dict(loss="dense", beta=50.0)
FAST = BY_CLIP | dict(lr=1.5e-4)  # of 5e-5 and this, what Flow-DPO liked better on seed 12; the others did not
ROWS = {
    # systems
    "pretrain": Row("Pretrain", start=""),
    "sft": Row("SFT"),
    "sft_more": Row("SFT with as many more steps as DPO", start="sft_more"),
    "flow_exact": Row("Flow-DPO, exact scorer", FLOW, EXACT, options=BY_CLIP),
    "flow_half": Row("Flow-DPO, exact scorer, its LoRA at half strength", start="sft,dpo/flow_exact", strength=0.5),
    "flow_fast": Row("Flow-DPO, exact scorer, 3 × the rate", FLOW, EXACT, options=FAST),
    "flow_noisy": Row("Flow-DPO, 30 % of the labels flipped", FLOW, NOISY, options=BY_CLIP),
    "flow_noisy_fast": Row("Flow-DPO, flipped, 3 × the rate", FLOW, NOISY, options=FAST),
    "flow_appearance": Row("Flow-DPO, appearance scorer", FLOW, LOOKS, options=BY_CLIP),
    "structural_exact": Row("Flow-StructuralDPO, exact scorer", STRUCTURAL, EXACT, options=BY_CLIP),
    "dense_exact": Row("Flow-DenseDPO, exact scorer", STRUCTURAL, EXACT | dict(segments=5), options=BY_SEGMENT),
    "dynamicsboost": Row("**DynamicsBoost**", {}),
    # which frames are given
    "n1_0": Row("N1 ∈ [0, 0.6N], N2 ∈ [0.8N, N]", dict(n1_min=0)),
    "n1_0_n2_13": Row("N1 = 0, N2 = N", dict(n1_min=0, n1_max=0, n2_min=13)),
    "n1_1_n2_13": Row("N1 = 1, N2 = N", dict(n1_min=1, n1_max=1, n2_min=13)),
    "gt_winner": Row("N1 ∈ [1, 0.6N], N2 = N (`gt-winner`)", dict(n2_min=13)),
    "n1_late": Row("N1 ∈ [5, 0.6N], N2 = N", dict(n1_min=5, n2_min=13)),
    # the loss
    "region_123": Row("loss on ①②③", {}, options=dict(region="123")),
    "region_3": Row("loss on ③", {}, options=dict(region="3")),
    "outside": Row("1/K outside, as printed", {}, options=dict(form="outside")),
    "reference_free": Row("no reference", {}, options=dict(reference_free=True)),
    "lambda": Row("λ = 0.04", {}, options=dict(sft_weight=0.04)),  # the winner's own loss at weight λ·β/2 = 1
    # the continuation model and the start
    "context": Row("Φ of 300 steps, prompts in the context", {}, phi=dict(steps=300)),
    "frame": Row("Φ of 300 steps, prompts on the tokens", {}, phi=dict(steps=300, prompts="frame")),
    "off": Row("Φ of 300 steps, no prompts", {}, phi=dict(steps=300, prompts="off")),
    "no_cold_start": Row("no SFT cold start", {}, start=""),
    "on_policy": Row("Φ's LoRA on the SFT model", dict(lora="sft")),
    "round_2": Row("a second round", dict(lora="sft,dpo/dynamicsboost", seed=1), start="sft,dpo/dynamicsboost"),
}
PAPER = {  # row -> VBench's overall score and dynamic degree in the paper, as three published reading notes give them
    "pretrain": (24.48, 34.72), "sft": (24.02, 34.15), "flow_noisy": (25.22, 31.22),
    "structural_exact": (24.18, 35.25), "dense_exact": (25.02, 40.10), "dynamicsboost": (25.64, 44.92),
    "n1_0": (25.31, 43.92), "n1_0_n2_13": (24.42, 34.32), "n1_1_n2_13": (24.94, 35.72), "gt_winner": (25.44, 46.41),
    "region_123": (22.15, 42.48), "region_3": (24.10, 38.21),
}  # fmt: skip


# ---- what is made of a seed ------------------------------------------------------------------------------------------


class Seed:
    """All that is made of one seed, in a folder of its own; whatever is finished already is kept."""

    def __init__(self, root: Path, seed: int):
        """Makes what all rows share: clips, base, cold start."""
        self.root, self.seed = root, seed
        self.shards, self.base = str(root / "shards"), str(root / "base")
        self.given = dict(base=self.base, data=self.shards, seed=seed)
        self.make(balls, "clips", seed=seed, workers=1)
        self.make(prepare, "shards", videos=str(root / "clips"), workers=1)
        self.make(sft, "base", data=self.shards, split="train", seed=seed)
        self.make(sft, "sft", split="align", **self.given)
        self.clips, self.codec = Shards(self.shards, "prepare.py", "eval"), codecs.load(self.shards)

    def make(self, stage, name: str, named: dict = {}, **options) -> str:
        """Runs a stage into a folder that `named` options tell apart, unless it is finished. Returns the folder.

        The preference trainers run even so: they refuse a row whose options changed.
        """
        name += "".join(f",{k}={v}" for k, v in named.items()).replace("/", "-")
        out = self.root / name
        if stage in (asymdpo, baselines) or not (out / MANIFEST).is_file():
            stage.main(stage.Config(out=str(out), **(named | options)))
        return str(out)

    def loras(self, names: str) -> str:
        """The folders of LoRAs, separated by commas as `names` are; what is missing is trained."""
        for name in names.split(","):
            if name.startswith("dpo/"):
                self.train(name.removeprefix("dpo/"))
            elif name == "sft_more":
                steps = sft.PRESETS["tiny"]["steps"] + asymdpo.PRESETS["tiny"]["steps"]
                self.make(sft, name, steps=steps, split="align", **self.given)
        return ",".join(str(self.root / name) for name in names.split(",") if name)

    def phi(self, options: dict = {}) -> str:
        return self.make(continuation, "continuation", options, **self.given)

    def pairs(self, row: Row) -> str:
        given = self.given | dict(lora=self.loras(row.pairs.get("lora", "")))
        if "kind" in row.pairs:
            return self.make(pairs, "pairs", row.pairs, **given)
        given |= dict(continuation=self.phi(row.phi), seed=self.seed + row.pairs.get("seed", 0))
        return self.make(make_pairs, "pairs" + "".join(f",{v}" for v in row.phi.values()), row.pairs, **given)

    def labels(self, row: Row, **other) -> str:
        given = dict(pairs=self.pairs(row), data=self.shards, seed=self.seed)
        return self.make(labels, f"labels,{row.pairs['kind']}", row.labels | other, **given)

    def train(self, name: str) -> list[Path]:
        """The LoRA files that make up a row's model, trained where there are pairs."""
        row = ROWS[name]
        loras = self.loras(row.start)
        if row.pairs is not None:
            stage, more = (baselines, {"labels": self.labels(row)}) if row.labels else (asymdpo, {})
            more |= dict(base=self.base, sft=loras, pairs=self.pairs(row), seed=self.seed)
            loras += "," + self.make(stage, f"dpo/{name}", **row.options, **more)
        return lora_files(loras)

    def row(self, name: str) -> dict:
        """What was measured of a row. It lies beside the row's last weights, so that it is never older than they."""
        row, loras = ROWS[name], self.train(name)
        folder = loras[-1].parent if loras else Path(self.base)
        path = folder / f"measured-{name}.json"
        if not path.exists():
            found = {"scores": self.scores(loras, row.strength)}
            if row.pairs is not None:
                found |= {"accuracy": self.accuracy(row), "training": training(folder)}
            write_json(path, found | {"commit": json.loads((folder / MANIFEST).read_text())["commit"]})
        return json.loads(path.read_text())

    def scores(self, loras: list[Path], strength: float) -> dict[str, float]:
        """Mean scores of samples for the seed's prompts and noise, as in experiments.evaluate's table."""
        _, noise, text, captions = evaluate.prompts(self.clips, CLIPS, self.seed)
        net = load_adapted(self.base, loras if strength == 1 else loras[:-1])
        if strength != 1:
            lora = read_lora(net, loras[-1])
            for term in lora.values():
                term.scale *= strength
            model.attach_lora(net, lora)
        made = evaluate.sample_all(net, noise, text, resolve(evaluate.Config(), evaluate.PRESETS))
        return {m: float(scores.mean()) for m, scores in balls.score(self.codec, made, captions).items()}

    def accuracy(self, row: Row) -> float:
        """How often the order of a row's pairs, or its scorer's labels, agrees with the exact score."""
        if not row.labels:
            made = Shards(self.pairs(row), "make_pairs.py")
            return evaluate.label_accuracy(self.codec, made, LABELLED)["accuracy"]
        files = (Path(folder) / "labels.jsonl" for folder in (self.labels(row), self.labels(row, scorer="exact")))
        given, true = (np.array([line["label"] for line in read_jsonl(file)]) for file in files)
        return float((1 + (given * true)[given != 0]).mean() / 2)

    def sweep(self) -> dict:
        """Φ's scores by given frames, as experiments.evaluate measures them, and the real clips'."""
        path = Path(self.phi()) / "sweep.json"
        if not path.exists():
            cfg = dataclasses.replace(resolve(evaluate.Config(), evaluate.PRESETS), sweep_clips=SWEEP, seed=self.seed)
            rows, _ = evaluate.sweep(load_continuation(self.base, self.phi()), self.codec, self.clips, cfg)
            index, _, _, captions = evaluate.prompts(self.clips, CLIPS, self.seed)
            real = balls.score(self.codec, self.clips.get("x0", index), captions)
            write_json(path, {"sweep": rows, "real": {m: float(v.mean()) for m, v in real.items()}})
        return json.loads(path.read_text())


def training(folder: Path) -> dict[str, float]:
    """Means over the second half of a DPO run. A baseline has no regions: all frames are generated in both, as in ③."""
    rows, means = read_jsonl(folder / "metrics.jsonl"), {}
    for _, _, name, *_ in TRAINING.values():
        values = [row[key] for row in rows[len(rows) // 2 :] for key in (name, name.replace("/3", "")) if key in row]
        if values:
            means[name] = float(np.mean(values))
    return means


def run_seed(job: tuple[Path, int, list[str]]) -> dict:
    """Makes and measures everything of one seed; what the stages print goes to its log."""
    folder, seed, names = job
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a", buffering=1) as log:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            torch.set_num_threads(1)
            made = Seed(folder, seed)
            return {"rows": {name: made.row(name) for name in names}, **made.sweep()}


# ---- figures ---------------------------------------------------------------------------------------------------------


def interval(values) -> dict:
    """Mean over the seeds, half the width of its 95 % interval, the seeds' values. One seed has no interval: ± inf."""
    n, values = len(values), np.array(values, float)
    half = T975[n - 2] * values.std(ddof=1) / n**0.5 if n > 1 else math.inf
    return {"mean": values.mean(), "half": half, "seeds": values.tolist()}


def over_seeds(found: list[dict], names) -> dict[str, dict]:
    """An interval for each name that every seed has."""
    return {name: interval([f[name] for f in found]) for name in names if all(name in f for f in found)}


def means(found: list[dict[str, float]]) -> dict[str, float]:
    return {m: np.mean([scores[m] for scores in found]) for m in balls.METRICS}


def summary(measured: list[dict], seeds: list[int], names: list[str]) -> dict:
    """All figures of the tables, with five significant digits. measured: `run_seed`'s of each seed."""
    scores = {name: [seed["rows"][name]["scores"] for seed in measured] for name in names}
    rows = {}
    for name in names:
        rows[name] = {"title": ROWS[name].title, "mean": means(scores[name])}
        for other in ("sft", "dynamicsboost"):
            if name != other:
                gains = [{m: a[m] - b[m] for m in a} for a, b in zip(scores[name], scores[other])]
                rows[name][f"vs_{other}"] = over_seeds(gains, balls.METRICS)
        if ROWS[name].pairs is not None:
            own = [seed["rows"][name] for seed in measured]
            rows[name] |= over_seeds(own, ["accuracy"])
            rows[name]["training"] = over_seeds([row["training"] for row in own], own[0]["training"])
    given = zip(*(seed["sweep"] for seed in measured))
    found = {
        "commit": ", ".join(sorted({row["commit"] for seed in measured for row in seed["rows"].values()})),
        "machine": f"{os.cpu_count()} cores, PyTorch {torch.__version__}",
        "seeds": seeds,
        "clips": CLIPS,
        "real": means([seed["real"] for seed in measured]),
        "sweep": [over_seeds(some, ("score", "generated_score")) for some in given],
        "rows": rows,
    }
    return json.loads(json.dumps(found), parse_float=lambda digits: float(f"{float(digits):.5g}"))


# ---- the page --------------------------------------------------------------------------------------------------------

MAIN = {  # column -> decimals, where a row holds it
    "score": (3, "mean", "score"),
    "against SFT": (3, "vs_sft", "score"),
    "against DynamicsBoost": (3, "vs_dynamicsboost", "score"),
    "traj, px ↓": (2, "mean", "traj"),
    "presence ↑": (4, "mean", "presence"),
    "shape ↓": (4, "mean", "shape"),
    "jerkiness, px/frame²": (3, "mean", "accel"),
    "dynamic degree, px/frame": (3, "mean", "dyn"),
    "dynamic degree against SFT": (3, "vs_sft", "dyn"),
    "labels right": (3, "accuracy", "mean"),
    "paper: VBench overall, %": (2, "paper", "overall"),
    "paper: dynamic degree, %": (2, "paper", "dyn"),
}
TRAINING = {  # as MAIN
    "winner ②": (5, "training", "diff/w/2"),
    "loser ②": (5, "training", "diff/l/2"),
    "winner ③": (5, "training", "diff/w/3"),
    "loser ③": (5, "training", "diff/l/3"),
    "② gained, t < ¼": (3, "training", "acc/2/t0", "mean"),
    "③ gained, t < ¼": (3, "training", "acc/3/t0", "mean"),
}
GIVEN = {  # as MAIN
    "whole clip": (3, "score", "mean"),
    "gained by the last given frame": (3, "gained"),
    "generated frames only": (3, "generated_score", "mean"),
}


def shown(value: float | dict, digits: int = 3) -> str:
    """0.050; of an interval, +0.050 ± 0.010, bold where it does not hold 0."""
    if isinstance(value, float):
        return f"{value:.{digits}f}".replace("-", "−")
    text = f"{value['mean']:+.{digits}f} ± {value['half']:.{digits}f}".replace("-", "−")
    return f"**{text}**" if abs(value["mean"]) > value["half"] else text


def table(columns: dict[str, tuple], rows: list[dict]) -> str:
    """A table in Markdown; a cell is empty where the row has no such figure."""
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    for row in rows:
        lines.append([row["title"]])
        for digits, *path in columns.values():
            value = row
            for key in path:
                value = value.get(key, {})
            lines[-1].append(shown(value, digits) if value != {} else "")
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def prompts_said(rows: dict) -> str:
    """The task prompts' effect, if their rows are there."""
    if not {"context", "frame", "off"} <= rows.keys():
        return ""
    context, frame, off = (np.array(rows[name]["vs_sft"]["score"]["seeds"]) for name in ("context", "frame", "off"))
    in_context, on_tokens = shown(interval(context - off)), shown(interval(frame - off))
    return f"\nTask prompts against none, for Φ of 300 steps: in the context {in_context}, on the tokens {on_tokens}.\n"


def page(found: dict) -> str:
    """The whole of tables.md."""
    rows = [row | {"paper": dict(zip(("overall", "dyn"), PAPER.get(name, ())))} for name, row in found["rows"].items()]
    sweep = [{"title": str(n), **row} for n, row in enumerate(found["sweep"])]
    for row, gained in zip(sweep[1:], np.diff([row["score"]["seeds"] for row in sweep], axis=0)):
        row["gained"] = interval(gained)
    return f"""# The paper's tables in miniature

Made by `make tables` at commit {found["commit"]}; do not edit. Seeds {", ".join(map(str, found["seeds"]))};
{found["clips"]} prompts each; {found["machine"]}. Settings were chosen on seeds 10, 11 and 12.

This is a world of bouncing balls and a model of 0.4 million parameters, not Wan. The score is exact physics
(`tiny.balls.score_clip`): −traj/4 − 2·(1 − presence) − 10·shape. *traj* is the distance of the balls from the nearest
motion that physics allows, *presence* the share of frames and colours that are as the prompt says, *shape* the error
of a ball's picture, *jerkiness* the median second difference of its path. **More dynamic degree is not better**: real
clips have {found["real"]["dyn"]:.2f} px/frame.

A difference is taken prompt by prompt within a seed and given as mean ± half of the 95 % interval over the seeds
(Student's t). It is **bold** where the interval does not hold 0; else it is not resolved. One difference in twenty is
bold by chance: nothing is corrected for the number of rows. DynamicsBoost is better than a row whose difference
against it is bold and negative.

The paper measures VBench on Wan, in per cent; its Flow-DPO is labelled by a reward model, so it stands beside the row
with flipped labels. The signs of differences from SFT can be compared, sizes cannot.

![Differences in score from SFT, with their intervals](tables.png)

{table(MAIN, [*rows, {"title": "real clips", "mean": found["real"]}])}
{prompts_said(found["rows"])}
## Score of Φ's continuations by the number of given frames

The whole clip's score rises in part because more of the clip is real.

{table(GIVEN, sweep)}

## What training did to winner and loser

Change of the errors of winner and loser against the reference, by region; mean over the second half of training. If
the winner's error rises, too, and the margin grows only because the loser's rises more, that is likelihood
displacement. Beside it: in how many pairs the winner gained on the loser, at low noise; ½ is chance. A gain in ②
(real against generated) without one in ③ (both generated) would mean that the model only learned to tell the two apart.

{table(TRAINING, [row for row in rows if "training" in row])}
"""


def picture(found: dict, path: Path) -> None:
    """Forest plot of the differences in score from SFT."""
    rows = [row for row in found["rows"].values() if "vs_sft" in row]
    figure = Figure(figsize=(8, 1.2 + 0.26 * len(rows)), layout="constrained")
    axes = figure.add_subplot(xlabel="score against SFT: mean, 95 % interval, seeds; filled: resolved")
    for y, row in enumerate(rows):
        gain = row["vs_sft"]["score"]
        resolved = abs(gain["mean"]) > gain["half"]
        colour = "#636973" if not resolved else "#2780b4" if gain["mean"] > 0 else "#c0453f"
        axes.errorbar(gain["mean"], y, xerr=gain["half"], fmt="o", color=colour, mfc=colour if resolved else "white")
        axes.plot(gain["seeds"], [y] * len(gain["seeds"]), "|", color=colour, alpha=0.5)
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set_yticks(range(len(rows)), [row["title"].replace("**", "").replace("`", "") for row in rows])
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


def write(found: dict, folder: Path) -> None:
    """tables.md, tables.json (a row a line) and tables.png."""
    write_text(folder / "tables.md", page(found))
    head = "".join(f" {json.dumps(k)}: {json.dumps(v)},\n" for k, v in found.items() if k != "rows")
    rows = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in found["rows"].items())
    write_text(folder / "tables.json", f'{{\n{head} "rows": {{\n{rows}\n }}\n}}\n')
    picture(found, folder / "tables.png")


def main(cfg: Config) -> None:
    cfg, root = resolve(cfg), Path(cfg.out)
    if not re.fullmatch(r"\d+(,\d+){0,11}", cfg.seeds):
        raise UserError(f"--seeds: expected 1 to 12 numbers, separated by commas, got {cfg.seeds!r}")
    seeds = [int(word) for word in cfg.seeds.split(",")]
    names = list(dict.fromkeys(["sft", *cfg.rows.split(","), "dynamicsboost"])) if cfg.rows else list(ROWS)
    if unknown := [name for name in names if name not in ROWS]:
        raise UserError(f"--rows: expected some of {', '.join(ROWS)}, got {unknown[0]!r}")
    # glibc gives large blocks back to the system and faults them in again, step after step: 15 % of a DPO run
    os.environ |= {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
    jobs = [(root / f"seed-{seed}", seed, names) for seed in seeds]
    with multiprocessing.get_context("spawn").Pool(cfg.workers) as pool:
        measured = list(tqdm(pool.imap(run_seed, jobs), total=len(jobs), unit="seed", desc="tables"))
    folder = root if cfg.rows or len(seeds) == 1 else Path("docs")
    write(summary(measured, seeds, names), folder)
    print(f"tables: {folder / 'tables.md'}")


if __name__ == "__main__":
    program(main, Config, __doc__)

"""The paper's tables in miniature: every baseline and ablation on the tiny world, over several seeds.

    python -m experiments.tables                                              all of it: 1 h 40 min of two cores
    python -m experiments.tables --out out/try --seeds 12 --rows flow_exact   some of it, written to --out alone

Each seed draws everything anew: clips, base, cold start, continuation model, pairs, order, noise. Within a seed all
rows share the base, the cold start, and the prompts and noise that they are judged on. So rows are compared prompt by
prompt, and an interval is over the seeds. Settings were chosen on seeds 10 and 11, which are not in the tables.

SFT trained on and every baseline get as many operations (FLOP, by experiments.cost) as the method, whose pairs and
continuation model count. A baseline is spared what its labels cost.

In    nothing
Out   docs/tables.md, tables.json, tables.png; <out>/seed-N/: log.txt and the stages' folders, rows/<row> among them
Cost  3 GB of memory a process; whatever is finished is kept, and the same command goes on from there
"""

import contextlib
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import re
from pathlib import Path

import matplotlib
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
from experiments import baselines, cost, evaluate, labels, pairs
from runtime.files import MANIFEST, read_jsonl, whole_file, write_json, write_text
from runtime.options import UserError, option, program, resolve
from runtime.shards import Shards
from tiny import balls
from tiny import codec as codecs
from wan.lora import load_continuation, lora_files

CLIPS = 512  # prompts that every row is judged on
FEWER = 256  # the first of them: those of the controls
LABELLED = 160  # pairs that label accuracy is taken from
SWEEP = 96  # clips of the sweep
SWEPT = ("score", "generated_score")  # of the whole clip, of the frames that Φ made
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
    """A model of the tables. All but Pretrain and `sft` start from the cold start; those that SFT makes are the cold
    start, trained for longer.
    """

    title: str
    group: str = "systems"  # the table that it stands in
    stage: object = None  # what trains it: sft, asymdpo or experiments.baselines; None: nothing
    options: dict = dataclasses.field(default_factory=dict)  # of the stage
    pairs: dict = dataclasses.field(default_factory=dict)  # options of make_pairs.py or experiments.pairs
    labels: dict = dataclasses.field(default_factory=dict)  # options of experiments.labels
    phi: dict = dataclasses.field(default_factory=dict)  # options of continuation.py


def baseline(title: str, kind: str, scorer: str, dense: int = 0, group: str = "systems") -> Row:
    """The same inner temperature as the method's for all: Flow-DPO's is halved by its definition. The same winner's
    term, too, by the preset. dense: segments with a label of their own.
    """
    beta, given = asymdpo.PRESETS["tiny"]["beta"], {"segments": dense} if dense > 1 else {}
    options = dict(loss="dense", beta=beta) if dense else dict(loss="flow", beta=2 * beta)
    samples = dict(kind=kind) | (dict(nfe=12) if kind == "structural" else {})  # of which it takes a half: the last
    return Row(title, group, baselines, options, samples, dict(scorer=scorer) | given)


ROWS = {
    "pretrain": Row("Pretrain"),
    "sft": Row("SFT"),
    "sft_longer": Row("SFT, as many operations", stage=sft),
    "flow_exact": baseline("Flow-DPO, exact scorer", "flow", "exact"),
    "flow_noisy": baseline("Flow-DPO, 30 % flipped", "flow", "noisy"),
    "flow_appearance": baseline("Flow-DPO, appearance", "flow", "appearance"),
    "structural_exact": baseline("StructuralDPO, exact scorer", "structural", "exact"),
    "dense_exact": baseline("DenseDPO, exact scorer", "structural", "exact", dense=5),
    "local_dpo": baseline("LocalDPO, no scorer", "local", "real", dense=1),
    "reg_dpo": baseline("Reg-DPO, no scorer", "real", "real"),
    "dynamicsboost": Row("**DynamicsBoost**", stage=asymdpo),
    # which frames are given
    "n1_0": Row("N1 ∈ [0, 0.6N]", "windows", asymdpo, pairs=dict(n1_min=0)),
    "n1_0_n2_13": Row("N1 = 0, N2 = N", "windows", asymdpo, pairs=dict(n1_min=0, n1_max=0, n2_min=13)),
    "n1_1_n2_13": Row("N1 = 1, N2 = N", "windows", asymdpo, pairs=dict(n1_min=1, n1_max=1, n2_min=13)),
    "gt_winner": Row("N2 = N (`gt-winner`)", "windows", asymdpo, pairs=dict(n2_min=13)),
    # the loss
    "region_123": Row("loss on ①②③", "loss", asymdpo, options=dict(region="123")),
    "region_3": Row("loss on ③", "loss", asymdpo, options=dict(region="3")),
    "outside": Row("1/K outside, same β", "loss", asymdpo, options=dict(form="outside")),
    "reference_free": Row("no reference", "loss", asymdpo, options=dict(reference_free=True)),
    "lambda_0": Row("λ = 0", "loss", asymdpo, options=dict(sft_weight=0.0)),
    "lambda_3": Row("λ = 3", "loss", asymdpo, options=dict(sft_weight=3.0)),
    # the continuation model
    "phi_50": Row("Φ of 50 steps", "phi", asymdpo, phi=dict(steps=50)),
    "phi_600": Row("Φ of 600 steps", "phi", asymdpo, phi=dict(steps=600)),
    "phi_off": Row("Φ without task prompts", "phi", asymdpo, phi=dict(prompts="off")),
    "phi_frame": Row("Φ's prompts on the tokens", "phi", asymdpo, phi=dict(prompts="frame")),
}
# Learning rates of each frontier, the method's own among them.
RATES = {
    "sft_longer": (sft.PRESETS["tiny"]["lr"], 6e-3),
    "flow_exact": (3e-4, 1e-3, 3e-3),
    "flow_noisy": (3e-4, 1e-3, 3e-3),
    "flow_appearance": (3e-4, 1e-3, 3e-3),
    "structural_exact": (3e-4, 1e-3, 3e-3),
    "dense_exact": (3e-4, 1e-3, 3e-3),
    "dynamicsboost": (3e-4, asymdpo.PRESETS["tiny"]["lr"], 3e-3),
}


def frontier(name: str) -> dict[str, float]:
    """The rows of a method's frontier with their learning rates; the method's own row has the preset's."""
    own = (sft if name == "sft_longer" else asymdpo).PRESETS["tiny"]["lr"]
    return {name if rate == own else f"{name}@{rate:g}": rate for rate in RATES[name]}


for _name in RATES:
    for _other, _rate in frontier(_name).items():
        if _other != _name:
            _row, _title = ROWS[_name], f"{ROWS[_name].title}, lr {_rate:g}"
            _options = _row.options | dict(lr=_rate)
            ROWS[_other] = dataclasses.replace(_row, title=_title, group="frontier", options=_options)

COMPARED = ("sft", "sft_longer", "dynamicsboost")  # what every row is compared with
MAIN = ("sft", "sft_longer", "flow_exact", "dynamicsboost")  # rows that go through every control
CONTROLS = {  # control -> prompts, factor of the initial noise, solver, strength of the LoRA that DPO trained
    "noise × 1": (CLIPS, 1.0, "unipc", 1.0),
    "noise × 0.95": (FEWER, 0.95, "unipc", 1.0),
    "noise × 0.85": (FEWER, 0.85, "unipc", 1.0),
    "Euler": (FEWER, 1.0, "euler", 1.0),
    "half strength": (CLIPS, 1.0, "unipc", 0.5),
}
PLAIN, LESS = "noise × 1", "noise × 0.85"  # those of every row
PAPER = {  # row -> VBench's overall score and dynamic degree in the paper, as three published reading notes give them
    "pretrain": (24.48, 34.72), "sft": (24.02, 34.15), "flow_noisy": (25.22, 31.22),
    "structural_exact": (24.18, 35.25), "dense_exact": (25.02, 40.10), "dynamicsboost": (25.64, 44.92),
    "n1_0": (25.31, 43.92), "n1_0_n2_13": (24.42, 34.32), "n1_1_n2_13": (24.94, 35.72), "gt_winner": (25.44, 46.41),
    "region_123": (22.15, 42.48), "region_3": (24.10, 38.21),
}  # fmt: skip


# ---- equal operations ------------------------------------------------------------------------------------------------


@functools.cache
def flop(stage=None, prompts: str = "off") -> int:
    """Operations of one clip, or of one pair, in a training step of a stage with a LoRA; without one, of a forward."""
    config = model.PRESETS["tiny"]
    shape = (config.in_dim, config.frames, 1, 1)
    if stage is None:
        return cost.measure_dit("tiny", shape, 1, lambda net, x0, text, noise, t: net(x0, t, text))["flop"]
    cfg = resolve(stage.Config(**({"base": "a LoRA"} if stage is sft else {})), stage.PRESETS)

    def build(net: model.DiT) -> model.DiT:
        model.add_lora(net, cfg.rank, cfg.rank, cfg.layers)
        if prompts != "off":
            model.add_task_prompt(net, config.frames, prompts)
        return net

    call = functools.partial(cost.loss, stage, cfg)
    return cost.measure_dit("tiny", shape, 1, call, build, train=True)["flop"]


def forwards(row: Row) -> float:
    """The network's forwards that a pair takes, on average."""
    if row.labels:
        cfg = resolve(pairs.Config(**row.pairs), make_pairs.PRESETS)
        if cfg.kind == "structural":
            return 2 * pairs.structural_steps(cfg)
        return cfg.nfe * (2 if pairs.CLIP[cfg.kind] == "x0" else 1)
    cfg, frames = resolve(make_pairs.Config(**row.pairs), make_pairs.PRESETS), model.PRESETS["tiny"].frames
    least, most = make_pairs.windows(cfg, frames)[2:]
    return cfg.nfe * (2 - (most == frames) / (most - least + 1))  # a winner given whole is not sampled


def price(row: Row, clips: int) -> tuple[float, float]:
    """Operations before a row's training starts, with pairs of so many clips, and of one step of it."""
    given = asymdpo.PRESETS["tiny"]
    if row.stage is sft:
        return 0, sft.PRESETS["tiny"]["batch_size"] * flop(sft)
    before, step = clips * forwards(row) * flop(), given["batch_size"] * flop(asymdpo)
    if row.stage is baselines:
        third = pairs.CLIP[row.pairs["kind"]] == "x0"  # the winner's term is on a clip that is not in the pair
        return before, step + third * given["batch_size"] * flop(sft)
    phi = continuation.PRESETS["tiny"] | row.phi
    return before + phi["steps"] * phi["batch_size"] * flop(continuation, phi["prompts"]), step


def plan(row: Row, clips: int) -> tuple[int, float]:
    """Steps that a row is trained for beyond what it starts from, and its operations in units of the method's.

    The method and its ablations keep the preset's steps; the others get what the method's operations pay for.
    """
    steps, (before, step) = asymdpo.PRESETS["tiny"]["steps"], price(ROWS["dynamicsboost"], clips)
    total = before + steps * step
    before, step = price(row, clips)
    if row.stage is not asymdpo:
        steps = max(10, round((total - before) / step, -1))
    return int(steps), (before + steps * step) / total


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
        self.cold = self.make(sft, "sft", split="align", **self.given)
        self.clips, self.codec = Shards(self.shards, "prepare.py", "eval"), codecs.load(self.shards)
        self.paired = len(Shards(self.shards, "prepare.py", "align", hashed=False))

    def make(self, stage, name: str, named: dict = {}, **options) -> str:
        """Runs a stage into a folder that `named` options tell apart, unless it is finished. Returns the folder."""
        out = self.root / (name + "".join(f",{k}={v}" for k, v in named.items()))
        if not (out / MANIFEST).is_file():
            stage.main(stage.Config(out=str(out), **(named | options)))
        return str(out)

    def phi(self, options: dict = {}) -> str:
        return self.make(continuation, "continuation", options, **self.given)

    def pairs(self, row: Row) -> str:
        if row.labels:
            return self.make(pairs, "pairs", row.pairs, lora=self.cold, **self.given)
        name = "pairs" + "".join(f",{v}" for v in row.phi.values())
        return self.make(make_pairs, name, row.pairs, continuation=self.phi(row.phi), **self.given)

    def labels(self, row: Row, **other) -> str:
        given = dict(pairs=self.pairs(row), data=self.shards, seed=self.seed)
        return self.make(labels, f"labels,{row.pairs['kind']}", row.labels | other, **given)

    def train(self, name: str) -> list[Path]:
        """The LoRA files that make up a row's model, trained unless they are there.

        The trainer runs even so: it refuses a row whose options changed.
        """
        row = ROWS[name]
        if row.stage is None:
            return lora_files("" if name == "pretrain" else self.cold)
        steps, _ = plan(row, self.paired)
        given, start = dict(base=self.base, seed=self.seed, steps=steps), self.cold + ","
        if row.stage is sft:
            start = ""
            given |= dict(data=self.shards, split="align", steps=sft.PRESETS["tiny"]["steps"] + steps)
        else:
            given |= dict(sft=self.cold, pairs=self.pairs(row))
            given |= {"labels": self.labels(row)} if row.labels else {}
        folder = str(self.root / "rows" / name)
        row.stage.main(row.stage.Config(out=folder, **row.options, **given))
        return lora_files(start + folder)

    def row(self, name: str) -> dict:
        """What was measured of a row. It lies beside the row's weights, so that it is never older than they."""
        row, loras = ROWS[name], self.train(name)
        folder = loras[-1].parent if loras else Path(self.base)
        path = folder / f"measured-{name}.json"
        if not path.exists():
            kinds = [kind for kind in CONTROLS if kind in (PLAIN, LESS) or name in MAIN]
            if row.stage not in (asymdpo, baselines):
                kinds = [kind for kind in kinds if kind != "half strength"]
            found = {"values": {kind: self.judge(loras, *CONTROLS[kind]) for kind in kinds}}
            if row.stage:
                found["steps"], found["operations"] = plan(row, self.paired)
            if row.stage in (asymdpo, baselines):
                found |= {"accuracy": self.accuracy(row), "training": training(folder)}
            write_json(path, found | {"commit": json.loads((folder / MANIFEST).read_text())["commit"]})
        return json.loads(path.read_text())

    @functools.cached_property
    def judged_on(self) -> tuple[torch.Tensor, torch.Tensor, list[str], dict[str, np.ndarray]]:
        """Noise, text, captions and the scores of the real clips of the seed's prompts."""
        index, noise, text, captions = evaluate.prompts(self.clips, CLIPS, self.seed)
        some = sorted(set(index))
        real = balls.score(self.codec, self.clips.get("x0", some), captions[: len(some)])
        return noise, text, captions, {m: scores[index] for m, scores in real.items()}

    def judge(self, loras: list[Path], count: int, factor: float, solver: str, strength: float) -> dict[str, float]:
        """Mean metrics of samples for the seed's first `count` prompts, as in experiments.evaluate's table."""
        noise, text, captions, real = self.judged_on
        cfg = dataclasses.replace(resolve(evaluate.Config(), evaluate.PRESETS), solver=solver)
        net = evaluate.adapted(self.base, loras, strength)
        made = evaluate.sample_all(net, factor * noise[:count], text[:count], cfg)
        scores = balls.score(self.codec, made, captions[:count])
        return evaluate.judged(scores, {m: of_clips[:count] for m, of_clips in real.items()})

    def accuracy(self, row: Row) -> float:
        """How often the order of a row's pairs, or its scorer's labels, agrees with the exact score."""
        if not row.labels:
            made = Shards(self.pairs(row), "make_pairs.py")
            return evaluate.label_accuracy(self.codec, made, LABELLED)["accuracy"]
        if row.labels["scorer"] == "real":
            made = Shards(self.pairs(row), "experiments.pairs")
            return evaluate.label_accuracy(self.codec, made, LABELLED, pairs.SIDES)["accuracy"]
        files = (Path(folder) / "labels.jsonl" for folder in (self.labels(row), self.labels(row, scorer="exact")))
        given, true = (np.array([line["label"] for line in read_jsonl(file)]) for file in files)
        return float((1 + (given * true)[given != 0]).mean() / 2)

    def sweep(self) -> dict:
        """Φ's scores by given frames, as experiments.evaluate measures them, and the real clips'."""
        path = Path(self.phi()) / "sweep.json"
        if not path.exists():
            cfg = dataclasses.replace(resolve(evaluate.Config(), evaluate.PRESETS), sweep_clips=SWEEP, seed=self.seed)
            rows, _ = evaluate.sweep(load_continuation(self.base, self.phi()), self.codec, self.clips, cfg)
            write_json(path, {"sweep": rows, "real": evaluate.means(self.judged_on[-1])})
        return json.loads(path.read_text())


TRAINING = {  # column -> decimals, what asymdpo.py logs
    "winner ②": (5, "diff/w/2"),
    "loser ②": (5, "diff/l/2"),
    "winner ③": (5, "diff/w/3"),
    "loser ③": (5, "diff/l/3"),
    "② gained, t < ¼": (3, "acc/2/t0"),
    "③ gained, t < ¼": (3, "acc/3/t0"),
}


def training(folder: Path) -> dict[str, float]:
    """Means over the second half of a DPO run. A baseline has no regions: all frames are generated in both, as in ③."""
    rows, means = read_jsonl(folder / "metrics.jsonl"), {}
    for _, name in TRAINING.values():
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
    """Mean over the seeds and half the width of its 95 % interval. One seed has no interval: ± inf."""
    n, values = len(values), np.array(values, float)
    half = T975[n - 2] * values.std(ddof=1) / n**0.5 if n > 1 else math.inf
    return {"mean": values.mean(), "half": half}


def lists(found: list[dict]) -> dict:
    """Dictionaries as one, whose numbers are lists; what is not in all of them is left out."""
    every = {k: [f[k] for f in found] for k in found[0] if all(k in f for f in found)}
    return {k: lists(values) if isinstance(values[0], dict) else values for k, values in every.items()}


def summary(measured: list[dict], seeds: list[int], names: list[str]) -> dict:
    """All figures of the tables by seed, with five significant digits. measured: `run_seed`'s of each seed."""
    rows = {name: lists([seed["rows"][name] for seed in measured]) for name in names}
    given = zip(*(seed["sweep"] for seed in measured))
    found = {
        "commit": ", ".join(sorted({commit for row in rows.values() for commit in row.pop("commit")})),
        "machine": f"{os.cpu_count()} cores, PyTorch {torch.__version__}",
        "seeds": seeds,
        "clips": [CLIPS, FEWER],
        "sweep": [lists([{k: row[k] for k in SWEPT if k in row} for row in rows]) for rows in given],
        "rows": {name: {"title": ROWS[name].title, "group": ROWS[name].group, **row} for name, row in rows.items()},
    }
    real = lists([seed["real"] for seed in measured])
    found["rows"]["real"] = {"title": "real clips", "group": "real", "values": {PLAIN: real}}
    return json.loads(json.dumps(found), parse_float=lambda digits: float(f"{float(digits):.5g}"))


def values(found: dict, name: str, metric: str, kind: str = PLAIN) -> np.ndarray | None:
    """A metric of a row by seed, or None if it was not measured."""
    by_seed = found["rows"].get(name, {"values": {}})["values"].get(kind, {}).get(metric)
    return None if by_seed is None else np.array(by_seed)


def gain(found: dict, one: str, other: str, metric: str, kind: str = PLAIN) -> dict | None:
    """The interval of row `one` minus row `other`; at half strength, minus the other at full."""
    whole = kind == "half strength" and one != other
    a, b = values(found, one, metric, kind), values(found, other, metric, PLAIN if whole else kind)
    return None if a is None or b is None or one == other else interval(a - b)


# ---- the page --------------------------------------------------------------------------------------------------------

FORMATS = {  # metric -> factor, decimals, column
    "valid": (100, 1, "valid, %"),
    "score": (1, 3, "score"),
    "dyn": (1, 3, "dynamic degree, px/frame"),
    "w1": (1, 3, "W1 of speed, px/frame ↓"),
    "frozen": (100, 1, "frozen, %"),
    "jump": (100, 1, "jump, %"),
    "traj": (1, 2, "traj, px ↓"),
    "shape": (1, 4, "shape ↓"),
}
MINUS = {"sft": "− SFT", "sft_longer": "− SFT, as many operations", "dynamicsboost": "− DynamicsBoost"}


def resolved(difference: dict) -> bool:
    return abs(difference["mean"]) > difference["half"]


def shown(value, metric: str = "score", digits: int | None = None) -> str:
    """A mean, 0.050; of an interval, +0.050 ± 0.010, bold where it does not hold 0; nothing for None."""
    factor, usual, _ = FORMATS[metric]
    digits = usual if digits is None else digits
    if value is None:
        return ""
    if not isinstance(value, dict):
        return f"{factor * np.mean(value):.{digits}f}".replace("-", "−")
    mean, half = factor * value["mean"], factor * value["half"]
    text = f"{mean:+.{digits}f} ± {half:.{digits}f}".replace("-", "−")
    return f"**{text}**" if resolved(value) else text


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown; the first column has no head."""
    lines = [["", *columns], ["---"] * (len(columns) + 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def compared(found: dict, names: list[str], metric: str) -> str:
    """A metric of the rows, and its differences from those that all are compared with."""
    rows = []
    for name in names:
        cells = [shown(gain(found, name, other, metric), metric) for other in COMPARED]
        rows.append([title(found, name), shown(values(found, name, metric), metric), *cells])
    return table([FORMATS[metric][2], *MINUS.values()], rows)


def looks(found: dict, names: list[str]) -> str:
    """What the rows' clips are like, their labels and operations."""
    metrics, rows = list(FORMATS)[2:], []
    for name in names:
        less = [values(found, name, "valid", LESS), gain(found, name, "sft", "valid", LESS)]
        cells = [shown(values(found, name, m), m) for m in metrics] + [shown(value, "valid") for value in less]
        own = [shown(found["rows"][name].get(key), digits=2) for key in ("accuracy", "operations")]
        rows.append([title(found, name), *cells, *own])
    heads = [FORMATS[m][2] for m in metrics]
    return table([*heads, f"valid, % ({LESS})", "− SFT there", "labels right", "operations"], rows)


def title(found: dict, name: str) -> str:
    return found["rows"][name]["title"]


def controls(found: dict, metric: str) -> str:
    """The main rows under every control, and the method's lead there."""
    rivals, rows = [name for name in MAIN if name in found["rows"] and name != "dynamicsboost"], []
    for kind in CONTROLS:
        cells = [shown(values(found, name, metric, kind), metric) for name in (*rivals, "dynamicsboost")]
        rows.append(
            [kind, *cells, *(shown(gain(found, "dynamicsboost", name, metric, kind), metric) for name in rivals)]
        )
    heads = [title(found, name) for name in (*rivals, "dynamicsboost")]
    return table([*heads, *(f"lead over {title(found, name)}" for name in rivals)], rows)


def frontiers(found: dict) -> str:
    """Each method's rates: valid clips and motion."""
    rows = []
    for name in RATES:
        for row, rate in frontier(name).items():
            if row in found["rows"]:
                of_row = functools.partial(values, found, row)
                cells = [shown(interval(of_row(m)), m).replace("**", "").lstrip("+") for m in ("valid", "dyn")]
                rows.append([ROWS[name].title, f"{rate:g}", *cells, shown(of_row("w1"), "w1")])
    return table(["lr", *(FORMATS[m][2] for m in ("valid", "dyn", "w1"))], rows)


# ---- verdicts --------------------------------------------------------------------------------------------------------

CLAIMS = [  # the paper's, that its method or a choice in it is better than a row
    ("better than SFT", "sft"),
    ("better than Flow-DPO, whose labels are a model's (30 % flipped)", "flow_noisy"),
    ("better than StructuralDPO", "structural_exact"),
    ("better than DenseDPO", "dense_exact"),
    ("loss on ②③ better than on ①②③", "region_123"),
    ("loss on ②③ better than on ③", "region_3"),
    ("N1 ≥ 1 better than N1 ≥ 0", "n1_0"),
    ("N1 = 0, N2 = N worse than the windows", "n1_0_n2_13"),
    ("N1 = 1, N2 = N worse than the windows", "n1_1_n2_13"),
]


def verdict(difference: dict, sign: int = 1) -> str:
    """Of a claim that a difference has a sign."""
    if not resolved(difference):
        return "not resolved"
    return "reproduced" if sign * difference["mean"] > 0 else "not reproduced"


def nearer(found: dict, name: str) -> dict:
    """By how much the method's dynamic degree is nearer to the real clips' than a row's."""
    real = values(found, "real", "dyn")
    far, ours = (abs(values(found, row, "dyn") - real) for row in (name, "dynamicsboost"))
    return interval(far - ours)


def claims(found: dict) -> str:
    """The paper's claims, each with a verdict that follows from the figures."""
    lines, ours = [], functools.partial(gain, found, "dynamicsboost")
    for claim, name in CLAIMS:
        if name in found["rows"]:
            said = f" (the paper: {PAPER['dynamicsboost'][0]:.2f} against {PAPER[name][0]:.2f})"
            figures = f"valid {shown(ours(name, 'valid'), 'valid')} points, score {shown(ours(name, 'score'))}"
            lines.append((claim + said, verdict(ours(name, "valid")), figures))
    if "gt_winner" in found["rows"]:
        lost, gained = ours("gt_winner", "valid"), ours("sft", "valid")
        low, high = (abs(lost["mean"] + side * lost["half"]) for side in (-1, 1))
        within, beyond = max(low, high) < abs(gained["mean"]) / 2, abs(lost["mean"]) - lost["half"] > gained["mean"] / 2
        word = "reproduced" if within else "not reproduced" if beyond else "not resolved"
        lines.append(("N2 = N (`gt-winner`) is close", word, f"valid {shown(lost, 'valid')} points"))
    said = (
        f"dynamic degree nearer to real clips' than {{}} (the paper's rises: {PAPER['dynamicsboost'][1]} against {{}})"
    )
    for name in ("sft", "flow_noisy"):
        if name in found["rows"]:
            closer = nearer(found, name)
            lines.append((said.format(title(found, name), PAPER[name][1]), verdict(closer), shown(closer, "dyn")))
    if "flow_noisy" in found["rows"]:
        lost = gain(found, "flow_noisy", "sft", "dyn")
        lines.append(("Flow-DPO loses dynamic degree against SFT", verdict(lost, -1), shown(lost, "dyn")))
    curve = np.array([row["score"] for row in found["sweep"]])
    risen = interval(curve[-2] - curve[1])
    word = "not resolved" if (np.diff(curve[1:-1].mean(1)) < 0).any() and risen["mean"] > 0 else verdict(risen)
    lines.append(("quality rises with the number of given frames", word, f"score, one to all but one: {shown(risen)}"))
    return "\n".join(f"* {claim}: **{word}** ({figures})" for claim, word, figures in lines)


def headline(found: dict) -> str:
    """The verdict against SFT and SFT for as many operations, and the share of the gap to real clips."""
    shares = [shown(values(found, name, "valid"), "valid") for name in (*COMPARED, "real")]
    leads = {name: gain(found, "dynamicsboost", name, "valid") for name in COMPARED[:2]}
    words = {"reproduced": "ahead of", "not reproduced": "behind", "not resolved": "not told apart from"}
    text = "DynamicsBoost is {} SFT ({} points of valid clips) and {} SFT for as many operations ({} points)".format(
        *(part for lead in leads.values() for part in (words[verdict(lead)], shown(lead, "valid")))
    )
    kept = []
    for name in COMPARED[:2]:
        under = {kind: gain(found, "dynamicsboost", name, "valid", kind) for kind in CONTROLS if kind != PLAIN}
        lost = [kind for kind, lead in under.items() if verdict(lead) != "reproduced"]
        kept.append(f"over {title(found, name)} " + (f"not under {', '.join(lost)}" if lost else "under every control"))
    gaps = []
    for metric in ("valid", "score"):
        real, start, ours = (values(found, name, metric) for name in ("real", "sft", "dynamicsboost"))
        gaps.append(shown(interval((ours - start) / (real - start)), "valid", 0) + f" % in {FORMATS[metric][2][:5]}")
    return (
        f"{text}. Valid: SFT {shares[0]} %, SFT for as many operations {shares[1]} %, DynamicsBoost {shares[2]} %, "
        f"real clips {shares[3]} %. Of the gap between SFT and real clips it closes {gaps[0]}, {gaps[1]}. The lead "
        f"holds {'; '.join(kept)}."
    )


def page(found: dict) -> str:
    """The whole of tables.md."""
    rows = found["rows"]
    systems, ablations = (
        [name for name, row in rows.items() if row["group"] in groups]
        for groups in (("systems", "real"), ("windows", "loss", "phi", "real"))
    )
    after = [*COMPARED, *ablations]
    scores = [row["score"] for row in found["sweep"]]
    steps = ["", *(shown(interval(more)) for more in np.diff(scores, axis=0))]
    sweep = [
        [str(n), shown(row["score"]), steps[n], shown(row.get("generated_score"))]
        for n, row in enumerate(found["sweep"])
    ]
    trained = [
        [row["title"], *(shown(row["training"].get(key), digits=digits) for digits, key in TRAINING.values())]
        for row in rows.values()
        if "training" in row and row["group"] != "frontier"
    ]
    return f"""# The paper's tables in miniature

{headline(found)}

Made by `make tables` at commit {found["commit"]}; do not edit. Seeds {", ".join(map(str, found["seeds"]))};
{found["clips"][0]} prompts each; {found["machine"]}.

![Valid clips against motion for each method and rate; differences in valid clips from SFT](tables.png)

## The paper's claims

By the share of valid clips where nothing else is said. *Reproduced*: the difference has the claimed sign and its
interval does not hold 0; *not reproduced*: the interval lies on the other side; else *not resolved*. `gt-winner` is
close if the interval lies within half of the method's gain over SFT. Quality rises with given frames if the mean score
rises with each, and from one given frame to all but one in every interval.

{claims(found)}

## How to read the tables

This is a world of one bouncing ball and a model of 0.4 million parameters, not Wan. The judge is exact physics
(`tiny.balls.score_clips`). *valid*: within {balls.VALID:g} px (rms) of a motion that physics allows, and nothing jumps.
score = −traj/4 − 10·shape. *traj*: distance of the ball from the nearest such motion, *shape*: error of its picture,
*frozen*, *jump*: share of clips in which the ball stands still or is suddenly elsewhere; *W1*: distance of the
distribution of speed from the real clips'. **More dynamic degree is not better**: real clips have
{shown(values(found, "real", "dyn"), "dyn", 2)} px/frame.

A difference is taken on the same prompts and noise within a seed and given as mean ± half of the 95 % interval over the
seeds (Student's t). It is **bold** where the interval does not hold 0; else it is not resolved. One difference in
twenty is bold by chance: nothing is corrected for the number of rows.

*operations* are in units of the method's: Φ, pairs and training; those of labels are not counted. SFT for as many
operations has one schedule from the base. Of each method's three learning rates the one in the middle is its row: that
with the most valid clips on seeds 10 and 11; LocalDPO, Reg-DPO and the ablations have the preset's. All DPO rows have
the winner's own loss at λ = 1 (as strong as DPO's own pull), Flow-DPO and its kin on the real clip, and the same inner
temperature.

## Systems

{compared(found, systems, "valid")}

{compared(found, systems, "score")}

{looks(found, systems)}

## Controls

What a smaller spread of the noise ({found["clips"][1]} prompts), the other solver (as many) or a part of the training
gains by itself. At half strength the lead is over the other at full strength.

Valid clips, %:

{controls(found, "valid")}

Score:

{controls(found, "score")}

## Frontiers

Mean ± half of the interval over the seeds.

{frontiers(found)}

## Ablations

{compared(found, after, "valid")}

{compared(found, after, "score")}

{looks(found, after)}

## Score of Φ's continuations by the number of given frames

The whole clip's score rises in part because more of the clip is real.

{table(["whole clip", "gained by the last given frame", "generated frames only"], sweep)}

## What training did to winner and loser

Change of the errors of winner and loser against the reference, by region; mean over the second half of training. If
the winner's error rises, too, and the margin grows only because the loser's rises more, that is likelihood
displacement. Beside it: in how many pairs the winner gained on the loser, at low noise; ½ is chance. A gain in ②
(real against generated) without one in ③ (both generated) would mean that the model only learned to tell the two apart.

{table(list(TRAINING), trained)}
"""


# ---- the picture -----------------------------------------------------------------------------------------------------

COLOURS = ("#636973", "#2780b4", "#7fb6d9", "#5b5fc7", "#2e8b57", "#b8860b", "#c0453f")  # of the methods in RATES


def plain(text: str) -> str:
    return text.replace("**", "").replace("`", "")


def spread(places: list[float], apart: float) -> list[float]:
    """The places, moved so that no two are closer than `apart`, in their order."""
    order = np.argsort(places, kind="stable")
    moved = np.array(places, float)[order]
    for _ in range(200):
        short = np.maximum(apart - np.diff(moved), 0) / 2
        moved[:-1] -= short
        moved[1:] += short
    back = np.empty(len(places))
    back[order] = moved
    return back.tolist()


def draw_frontier(axes, found: dict) -> None:
    """Valid share against dynamic degree: a line for each method through its rates, and the real clips."""
    lines = {}
    for name, colour in zip(RATES, COLOURS):
        rows = [row for row in frontier(name) if row in found["rows"]]
        if not rows:
            continue
        x, y = ([interval(k * values(found, row, m)) for row in rows] for k, m in ((1, "dyn"), (100, "valid")))
        ours = name == "dynamicsboost"
        at = [[point["mean"] for point in points] for points in (x, y)]
        bars = ([np.nan_to_num(point["half"], posinf=0) for point in points] for points in (x, y))
        axes.errorbar(*at, *reversed(list(bars)), fmt="none", ecolor=colour, alpha=0.35, linewidth=1.5)
        axes.plot(*at, "-o", color=colour, linewidth=4 if ours else 2.2, markersize=9 if ours else 6)
        lines[name] = (at[0][-1], at[1][-1], colour)
    marks = {"real": ("*", 22, "real clips"), "sft": ("s", 11, "SFT, the start")}
    for name, (marker, size, label) in marks.items():
        x, y = values(found, name, "dyn").mean(), 100 * values(found, name, "valid").mean()
        axes.plot(x, y, marker, color="black", markersize=size)
        axes.annotate(label, (x, y), (0, 12), textcoords="offset points", ha="center")
    axes.axvline(values(found, "real", "dyn").mean(), color="black", linewidth=0.8, linestyle=":")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.08 * (high - low))
    heights = spread([y for _, y, _ in lines.values()], 0.075 * (high - low))
    for (name, (x, y, colour)), height in zip(lines.items(), heights):
        right = axes.get_yaxis_transform()  # x in shares of the width, y in per cent
        weight = "bold" if name == "dynamicsboost" else "normal"
        label = plain(ROWS[name].title)
        axes.annotate(
            label, (x, y), (1.03, height), xycoords="data", textcoords=right, color=colour, va="center", weight=weight,
            arrowprops=dict(arrowstyle="-", color=colour, alpha=0.35), annotation_clip=False,
        )  # fmt: skip


def draw_forest(axes, found: dict) -> None:
    """Differences in valid clips from SFT, but for the frontiers."""
    names = [name for name, row in found["rows"].items() if row["group"] not in ("frontier", "real")]
    names = [name for name in names if name not in ("pretrain", "sft")]
    for y, name in enumerate(names):
        lead = gain(found, name, "sft", "valid")
        colour = "#636973" if not resolved(lead) else "#2780b4" if lead["mean"] > 0 else "#c0453f"
        mean, half = 100 * lead["mean"], 100 * np.nan_to_num(lead["half"], posinf=0)
        axes.errorbar(
            mean,
            y,
            xerr=half,
            fmt="o",
            color=colour,
            mfc=colour if resolved(lead) else "white",
            linewidth=2.2,
            markersize=8,
        )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), [plain(title(found, name)) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)


def picture(found: dict, path: Path) -> None:
    """The frontier, and below it the forest plot."""
    count = sum(row["group"] != "frontier" for row in found["rows"].values())
    with matplotlib.rc_context({"font.size": 14.5}):
        figure = Figure(figsize=(10, 7.5 + 0.33 * count), layout="constrained")
        parts = figure.subfigures(2, 1, height_ratios=(6.5, 1 + 0.33 * count))  # so that each has its own margins
        above, below = (part.add_subplot() for part in parts)
        above.set(xlabel="dynamic degree, px/frame", ylabel="valid clips, %")
        above.set_title("Valid clips and motion, three learning rates each", loc="left", weight="bold")
        below.set_title("Valid clips against SFT", loc="left", weight="bold")
        below.set_xlabel("points, with 95 % intervals over the seeds; filled: resolved")
        draw_frontier(above, found)
        draw_forest(below, found)
        for axes in (above, below):
            axes.spines[["top", "right"]].set_visible(False)
        with whole_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=80)


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
    wanted = [*COMPARED, *cfg.rows.split(",")] if cfg.rows else list(ROWS)
    if unknown := [name for name in wanted if name not in ROWS]:
        raise UserError(f"--rows: expected some of {', '.join(ROWS)}, got {unknown[0]!r}")
    names = [name for name in ROWS if name in wanted]
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

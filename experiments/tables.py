"""The paper's tables in miniature: every baseline and ablation on the tiny world, over several seeds.

    python -m experiments.tables                                              all of it: 1 h 10 min of two cores
    python -m experiments.tables --out out/try --seeds 12 --rows flow_exact   some of it, written to --out alone

Each seed draws everything anew: clips, base, cold start, continuation model, pairs, order, noise. Within a seed all
rows share the base, the cold start, and the prompts and noise that they are judged on. So rows are compared prompt by
prompt, and an interval is over the seeds. The method's settings were chosen on seeds 10 to 12, which are not in the
tables. A rival is trained at each of its RATES; experiments.tables_page shows the best of them, which favours it.

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
import multiprocessing
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import asymdpo
import continuation
import make_pairs
import model
import prepare
import sft
from experiments import baselines, cost, distill, evaluate, labels, pairs, tables_page
from experiments.tables_page import COMPARED, HALF, LESS, MAIN, PLAIN
from runtime.files import MANIFEST, read_json, read_jsonl, write_json
from runtime.options import UserError, listed, option, program, resolve
from runtime.shards import Shards
from tiny import balls
from tiny import codec as codecs
from wan.lora import load_continuation, lora_files

CLIPS = 512  # prompts that every row is judged on
FEWER = 256  # the first of them: those of the controls
LABELLED = 160  # pairs that label accuracy is taken from
SWEEP = 96  # clips of the sweep
SWEPT = ("score", "generated_score")  # of the whole clip, of the frames that Φ made


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
    phi: dict | None = dataclasses.field(default_factory=dict)  # options of continuation.py; None: no such model
    distill: dict | None = None  # options of experiments.distill, whose LoRA lies beneath Φ; None: none does

    @property
    def attention(self) -> str:
        """Of what continues the clips: the base itself has full attention."""
        return "full" if self.phi is None else (continuation.PRESETS["tiny"] | self.phi)["attention"]

    @property
    def lr(self) -> float:
        return (self.stage.PRESETS["tiny"] | self.options)["lr"]


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
    "phi_full": Row("Φ with full attention", "phi", asymdpo, phi=dict(attention="full")),
    "phi_none": Row("no Φ: the base continues", "phi", asymdpo, phi=None),
    "phi_50": Row("Φ of 50 steps", "phi", asymdpo, phi=dict(steps=50)),
    "phi_600": Row("Φ of 600 steps", "phi", asymdpo, phi=dict(steps=600)),
    "phi_off": Row("Φ without task prompts", "phi", asymdpo, phi=dict(prompts="off")),
    "phi_frame": Row("Φ's prompts on the tokens", "phi", asymdpo, phi=dict(prompts="frame")),
}
# Learning rates of a method's frontier; the row of the preset's has the method's name.
RATES = {
    "sft_longer": (sft.PRESETS["tiny"]["lr"], 6e-3),
    "flow_exact": (3e-4, 1e-3, 3e-3),
    "flow_noisy": (1e-3, 3e-3),
    "dense_exact": (1e-3, 3e-3),
    "dynamicsboost": (3e-4, asymdpo.PRESETS["tiny"]["lr"], 3e-3),
}
for _name, _lr in [(name, lr) for name, rates in RATES.items() for lr in rates if lr != ROWS[name].lr]:
    ROWS[f"{_name}@{_lr:g}"] = dataclasses.replace(ROWS[_name], options=ROWS[_name].options | dict(lr=_lr))


def method(name: str) -> str:
    """The method that a row belongs to: without its learning rate."""
    return name.partition("@")[0]


CONTROLS = {  # control -> prompts, factor of the initial noise, solver, strength of the LoRA that DPO trained
    PLAIN: (CLIPS, 1.0, "unipc", 1.0),
    "noise × 0.95": (FEWER, 0.95, "unipc", 1.0),
    LESS: (FEWER, 0.85, "unipc", 1.0),
    "Euler": (FEWER, 1.0, "euler", 1.0),
    HALF: (CLIPS, 1.0, "unipc", 0.5),
}


# ---- equal operations ------------------------------------------------------------------------------------------------


SHAPE = (model.PRESETS["tiny"].in_dim, model.PRESETS["tiny"].frames, 1, 1)  # of a latent clip


@functools.cache
def flop(stage=None, **options) -> float:
    """Operations of one clip, or of one pair, in a training step of a stage with a LoRA; without one, of a forward."""
    if stage is None:
        return cost.measure_dit("tiny", SHAPE, 1, lambda net, x0, text, noise, t: net(x0, t, text))["flop"]
    base = {"base": "a LoRA"} if stage is sft else {}
    return cost.train(stage, resolve(stage.Config(**base, **options), stage.PRESETS), SHAPE, 1)["flop"]


def sampling(row: Row) -> float:
    """Operations that a pair takes, on average."""
    if not row.labels:
        return cost.pair(resolve(make_pairs.Config(**row.pairs), make_pairs.PRESETS), SHAPE, row.attention)["flop"]
    cfg = resolve(pairs.Config(**row.pairs), pairs.PRESETS)
    if cfg.kind == "structural":
        return 2 * pairs.structural_steps(cfg) * flop()
    return cfg.nfe * (2 if pairs.CLIP[cfg.kind] == "x0" else 1) * flop()


def price(row: Row, clips: int) -> tuple[float, float]:
    """Operations before a row's training starts, with pairs of so many clips, and of one step of it."""
    given = asymdpo.PRESETS["tiny"]
    if row.stage is sft:
        return 0, sft.PRESETS["tiny"]["batch_size"] * flop(sft)
    before, step = clips * sampling(row), given["batch_size"] * flop(asymdpo)
    if row.stage is baselines:
        third = pairs.CLIP[row.pairs["kind"]] == "x0"  # the winner's term is on a clip that is not in the pair
        return before, step + third * given["batch_size"] * flop(sft)
    if row.phi is None:
        return before, step
    phi = continuation.PRESETS["tiny"] | row.phi
    return before + phi["steps"] * phi["batch_size"] * flop(continuation, **row.phi), step


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

    def phi(self, options: dict | None = {}) -> str:
        return "" if options is None else self.make(continuation, "continuation", options, **self.given)

    def pairs(self, row: Row) -> str:
        if row.labels:
            return self.make(pairs, "pairs", row.pairs, lora=self.cold, **self.given)
        name = "pairs" + (",none" if row.phi is None else "".join(f",{v}" for v in row.phi.values()))
        beneath = {}
        if row.distill is not None:
            folder = "-".join(map(str, ("distill", *row.distill.values())))  # --lora takes a comma for the next file
            name, beneath = name + ",distilled", {"lora": self.make(distill, folder, **row.distill, **self.given)}
        return self.make(make_pairs, name, row.pairs, continuation=self.phi(row.phi), **beneath, **self.given)

    def labels(self, row: Row, **other) -> str:
        given = dict(pairs=self.pairs(row), data=self.shards, seed=self.seed)
        return self.make(labels, f"labels,{row.pairs['kind']}", row.labels | other, **given)

    def train(self, name: str, row: Row) -> list[Path]:
        """The LoRA files that make up a row's model, trained unless they are there.

        The trainer runs even so: it refuses a row whose options changed.
        """
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
        row = ROWS[name]
        loras = self.train(name, row)
        folder = loras[-1].parent if loras else Path(self.base)
        path, by_dpo = folder / f"measured-{name}.json", row.stage in (asymdpo, baselines)
        found = read_json(path) if path.exists() else {"values": {}}
        kinds = [
            kind for kind in CONTROLS if kind in (PLAIN, LESS) or method(name) in MAIN and (by_dpo or kind != HALF)
        ]
        if missing := [kind for kind in kinds if kind not in found["values"]]:
            found["values"] |= {kind: self.judge(loras, *CONTROLS[kind]) for kind in missing}
            if row.stage:
                found["steps"], found["operations"] = plan(row, self.paired)
            if by_dpo:
                found |= {"accuracy": self.accuracy(row), "training": training(folder)}
            found["commit"] = read_json(folder / MANIFEST)["commit"]
            write_json(path, found)
        return found

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
        cfg, folder = resolve(evaluate.Config(solver=solver), evaluate.PRESETS), loras[-1] if loras else self.base
        net = evaluate.adapted(self.base, loras, strength)
        made = evaluate.sample_all(net, factor * noise[:count], text[:count], cfg, of=folder)
        scores = balls.score(self.codec, made, captions[:count])
        return evaluate.judged(scores, {m: of_clips[:count] for m, of_clips in real.items()})

    def accuracy(self, row: Row) -> float:
        """How often the order of a row's pairs, or its scorer's labels, agrees with the exact score."""
        if row.labels.get("scorer", "real") == "real":
            maker, sides = (
                ("experiments.pairs", pairs.SIDES) if row.labels else ("make_pairs.py", ("chosen", "rejected"))
            )
            made = Shards(self.pairs(row), maker)
            return evaluate.label_accuracy(self.codec, made, LABELLED, sides)["accuracy"]
        files = (Path(folder) / "labels.jsonl" for folder in (self.labels(row), self.labels(row, scorer="exact")))
        given, true = (np.array([line["label"] for line in read_jsonl(file)]) for file in files)
        return float((1 + (given * true)[given != 0]).mean() / 2)

    def sweep(self) -> dict:
        """Φ's scores by given frames, as experiments.evaluate measures them, and the real clips'."""
        path = Path(self.phi()) / "sweep.json"
        if not path.exists():
            cfg = evaluate.Config(continuation=self.phi(), sweep_clips=SWEEP, seed=self.seed)
            cfg = resolve(cfg, evaluate.PRESETS)
            rows, _ = evaluate.sweep(load_continuation(self.base, self.phi()), self.codec, self.clips, cfg)
            write_json(path, {"sweep": rows, "real": evaluate.means(self.judged_on[-1])})
        return read_json(path)


def training(folder: Path) -> dict[str, float]:
    """Means over the second half of a DPO run. A baseline has no regions: all frames are generated in both, as in ③."""
    rows, means = read_jsonl(folder / "metrics.jsonl"), {}
    for name in tables_page.TRAINING.values():
        values = [row[key] for row in rows[len(rows) // 2 :] for key in (name, name.replace("/3", "")) if key in row]
        if values:
            means[name] = float(np.mean(values))
    return means


def measure(made: Seed, names: list[str]) -> dict:
    """Everything of one seed."""
    return {"rows": {name: made.row(name) for name in names}, **made.sweep()}


def run_seed(job: tuple[Callable[[Seed, list[str]], dict], Path, int, list[str]]) -> dict:
    """Makes one seed's folder, and measures with it; what the stages print goes to its log."""
    measure, folder, seed, names = job
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a", buffering=1, encoding="utf-8") as log:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            torch.set_num_threads(1)
            return measure(Seed(folder, seed), names)


def run_seeds(cfg, rows: dict, always: tuple[str, ...], measure: Callable) -> tuple[list[int], list[str], list[dict]]:
    """Measures the rows that cfg names, or all of them, on cfg's seeds: cfg.workers at a time, each in a process.

    rows: those there are; always: those measured in any case; measure(Seed, names) -> what is found. Returns seeds,
    names of the rows, and what was found of each seed. UserError for other seeds and rows.
    """
    words = listed(cfg.seeds, "seeds")
    if not 1 <= len(words) <= 12 or not all(re.fullmatch(r"\d{1,9}", word) for word in words):
        raise UserError(f"--seeds: expected 1 to 12 numbers, separated by commas, got {cfg.seeds!r}")
    seeds = [int(word) for word in words]
    wanted = [*always, *listed(cfg.rows, "rows")] if cfg.rows else list(rows)
    if unknown := [name for name in wanted if name not in rows]:
        raise UserError(f"--rows: expected some of {', '.join(rows)}, got {unknown[0]!r}")
    names = [name for name in rows if name in wanted]
    # glibc gives large blocks back to the system and faults them in again, step after step: 15 % of a DPO run
    os.environ |= {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
    jobs = [(measure, Path(cfg.out) / f"seed-{seed}", seed, names) for seed in seeds]
    with multiprocessing.get_context("spawn").Pool(cfg.workers) as pool:
        return seeds, names, list(tqdm(pool.imap(run_seed, jobs), total=len(jobs), unit="seed"))


def lists(found: list[dict]) -> dict:
    """Dictionaries as one, whose numbers are lists; what is not in all of them is left out."""
    every = {k: [f[k] for f in found] for k in found[0] if all(k in f for f in found)}
    return {k: lists(values) if isinstance(values[0], dict) else values for k, values in every.items()}


def summary(measured: list[dict], seeds: list[int], names: list[str]) -> dict:
    """All figures of the tables by seed, with five significant digits. measured: `run_seed`'s of each seed."""
    rows = {name: lists([seed["rows"][name] for seed in measured]) for name in names}
    commits = {commit for row in rows.values() for commit in row.pop("commit")}
    for name, row in rows.items():
        row |= {"method": method(name), "title": ROWS[name].title, "group": ROWS[name].group}
        row |= {"lr": ROWS[name].lr} if method(name) in RATES else {}
    real = lists([seed["real"] for seed in measured])
    rows["real"] = {"method": "real", "title": "real clips", "group": "real", "values": {PLAIN: real}}
    found = {
        "commit": ", ".join(sorted(commits)),
        "machine": f"{os.cpu_count()} cores, PyTorch {torch.__version__}",
        "seeds": seeds,
        "clips": [CLIPS, FEWER],
        "sweep": [
            lists([{k: row[k] for k in SWEPT if k in row} for row in n]) for n in zip(*(m["sweep"] for m in measured))
        ],
        "rows": rows,
    }
    return json.loads(json.dumps(found), parse_float=lambda digits: float(f"{float(digits):.5g}"))


def main(cfg: Config) -> None:
    cfg = resolve(cfg)
    seeds, names, found = run_seeds(cfg, ROWS, COMPARED, measure)
    folder = Path(cfg.out if cfg.rows or len(seeds) == 1 else "docs")
    tables_page.write(summary(found, seeds, names), folder)
    print(f"tables: {folder / 'tables.md'}")


if __name__ == "__main__":
    program(main, Config, __doc__)

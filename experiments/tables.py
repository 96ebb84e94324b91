"""The paper's tables in miniature: every baseline and every ablation on the tiny world, over several seeds.

    make tables                                            all of it, two processes, resumable; writes docs/tables.*
    python bench/tables.py --seeds 0 --rows sft flow_exact dynamicsboost

Each seed draws everything anew: clips, base, cold start, continuation model, pairs, order, noise, and the noise that is
judged. Within a seed all rows share base, cold start and the judged prompts and noise, so rows are compared in pairs. A
row is a few options of the project's own stages; PAIRS, LABELS and ROWS below say which. Settings were chosen on seeds
10, 11 and 12, which are not in the tables.

Takes some 3 GB of memory a process.

Out   <out>/seed-N/: the stages' folders; dpo/<row>, eval/<row> (scores of each prompt, eight samples), facts/<pairs>
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import errno
import json
import multiprocessing
import os
import sys
import time
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
from experiments import evaluate
from experiments import labels as label
from runtime import run as common
from runtime import shards as data
from tiny import balls as world
from wan import vae

CLIPS = 512  # prompts that every row is judged on
FACTS = 160  # pairs that label accuracy and the losers' facts are taken from
SHOWN = 8  # samples kept of each row
SWEEP = 96  # clips of the sweep

CONTINUATIONS = {  # name -> options of continuation.py beside the demo's
    "continuation": {},
    "context": dict(steps=300),
    "frame": dict(steps=300, prompts="frame"),
    "off": dict(steps=300, prompts="off"),
}
PAIRS = {  # name -> options of make_pairs.py beside the demo's; lora and continuation name folders of the seed
    "flow": dict(pairs="flow", lora="sft"),
    "structural": dict(pairs="structural", lora="sft"),
    "dynamicsboost": {},
    "n1_0": dict(n1_min=0),
    "n1_0_n2_13": dict(n1_min=0, n1_max=0, n2_min=13),
    "n1_1_n2_13": dict(n1_min=1, n1_max=1, n2_min=13),
    "gt_winner": dict(n2_min=13),
    "n1_late": dict(n1_min=5, n2_min=13),
    "context": dict(continuation="context"),
    "frame": dict(continuation="frame"),
    "off": dict(continuation="off"),
    "per_clip_2": dict(per_clip=2),
    "strength_quarter": dict(strength=0.25),
    "strength_zero": dict(strength=0.0),
    "on_policy": dict(lora="sft"),
    "round_2": dict(lora="sft,dpo/dynamicsboost", seed=1),
}
LABELS = {  # name -> options of label.py
    "flow_exact": dict(pairs="flow", scorer="exact"),
    "flow_noisy": dict(pairs="flow", scorer="noisy"),
    "flow_appearance": dict(pairs="flow", scorer="appearance"),
    "structural_exact": dict(pairs="structural", scorer="exact"),
    "dense_exact": dict(pairs="structural", scorer="exact", segments=5),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A model of the tables. Without pairs it is not trained by preference: `start` is all of it."""

    title: str
    pairs: str = "dynamicsboost"  # of PAIRS
    labels: str = ""  # of LABELS
    start: str = "sft"  # folders of LoRAs below it, separated by commas
    options: dict = dataclasses.field(default_factory=dict)  # of asymdpo.py beside the demo's
    half_of: str = ""  # this row is that one with its LoRA at half strength


# the same inner temperature for all three losses: Flow-DPO's is halved by its definition
FLOW, DENSE = dict(loss="flow", beta=100.0), dict(loss="dense", beta=50.0)
FAST = dict(lr=1.5e-4)  # of 5e-5 and this, what Flow-DPO liked better on seed 12; the others did not
ROWS = {
    "pretrain": Row("Pretrain", "", start=""),
    "sft": Row("SFT", ""),
    "sft_more": Row("SFT with as many more steps as DPO", "", start="sft_more"),
    "flow_exact": Row("Flow-DPO, exact scorer", "flow", "flow_exact", options=FLOW),
    "flow_half": Row("Flow-DPO, exact scorer, its LoRA at half strength", "", half_of="flow_exact"),
    "flow_noisy": Row("Flow-DPO, 30 % of the labels flipped", "flow", "flow_noisy", options=FLOW),
    "flow_appearance": Row("Flow-DPO, appearance scorer", "flow", "flow_appearance", options=FLOW),
    "flow_fast": Row("Flow-DPO, exact scorer, 3 × the rate", "flow", "flow_exact", options={**FLOW, **FAST}),
    "flow_noisy_fast": Row("Flow-DPO, flipped, 3 × the rate", "flow", "flow_noisy", options={**FLOW, **FAST}),
    "structural_exact": Row("Flow-StructuralDPO, exact scorer", "structural", "structural_exact", options=FLOW),
    "dense_exact": Row("Flow-DenseDPO, exact scorer", "structural", "dense_exact", options=DENSE),
    "dynamicsboost": Row("**DynamicsBoost**"),
    "n1_0": Row("N1 ∈ [0, 0.6N], N2 ∈ [0.8N, N]", "n1_0"),
    "n1_0_n2_13": Row("N1 = 0, N2 = N", "n1_0_n2_13"),
    "n1_1_n2_13": Row("N1 = 1, N2 = N", "n1_1_n2_13"),
    "gt_winner": Row("N1 ∈ [1, 0.6N], N2 = N (`gt-winner`)", "gt_winner"),
    "n1_late": Row("N1 ∈ [5, 0.6N], N2 = N", "n1_late"),
    "region_123": Row("loss on ①②③", options=dict(region="123")),
    "region_3": Row("loss on ③", options=dict(region="3")),
    "outside": Row("1/K outside, as printed", options=dict(form="outside")),
    # K is 9 on average: at β/9 the mean coefficient of S is about that of the other forms
    "plain": Row("no 1/K, β/9", options=dict(form="plain", beta=50.0 / 9)),
    "reference_free": Row("no reference", options=dict(reference_free=True)),
    "context": Row("Φ of 300 steps, prompts in the context", "context"),
    "frame": Row("Φ of 300 steps, prompts on the tokens", "frame"),
    "off": Row("Φ of 300 steps, no prompts", "off"),
    "no_cold_start": Row("no SFT cold start", start=""),
    "lambda": Row("λ = 1", options=dict(sft_weight=1.0)),
    "per_clip_2": Row("two losers a clip", "per_clip_2"),
    "strength_quarter": Row("Φ's LoRA at a quarter", "strength_quarter"),
    "strength_zero": Row("no LoRA, prompts alone", "strength_zero"),
    "on_policy": Row("Φ's LoRA on the SFT model", "on_policy"),
    "round_2": Row("a second round", "round_2", start="sft,dpo/dynamicsboost"),
}


# ---- one row ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Judged:
    """What a row's evaluation depends on."""

    base: str
    lora: str
    data: str
    out: str
    clips: int
    seed: int
    strength: float


class Seed:
    """All that is made of one seed, in a folder of its own; whatever is finished already is kept."""

    def __init__(self, root: Path, seed: int, **tuned):
        self.root, self.seed, self.tuned = root, seed, tuned
        torch.set_num_threads(1)

    def at(self, names: str) -> str:
        """Folders of this seed by their names."""
        return ",".join(str(self.root / name) for name in names.split(",") if name)

    def make(self, stage, name: str, **options) -> None:
        """Runs a stage of the project into the folder `name`. Of the finished ones asymdpo.py looks again, to
        refuse one that was made with other --options.
        """
        if stage is asymdpo or not (self.root / name / common.MANIFEST).is_file():
            stage.main(stage.Config(out=self.at(name), **{"seed": self.seed, **options}))

    def ground(self) -> None:
        """Clips, base, cold start."""
        base, shards = self.at("base"), self.at("shards")
        self.make(world, "clips", workers=1)
        if not (self.root / "shards" / common.MANIFEST).is_file():
            prepare.main(prepare.Config(videos=self.at("clips"), out=shards, workers=1))
        self.make(sft, "base", data=shards, split="train")
        self.make(sft, "sft", data=shards, split="align", base=base)

    def pairs(self, name: str) -> str:
        """A kind of pairs, and the facts about them."""
        options = {"seed": self.seed, **PAIRS[name]}
        phi = options.pop("continuation", "continuation")
        options |= {"seed": options["seed"] + self.seed} if "seed" in PAIRS[name] else {}
        if options.get("pairs", "continuation") == "continuation":
            self.make(continuation, phi, base=self.at("base"), data=self.at("shards"), **CONTINUATIONS[phi])
            options["continuation"] = self.at(phi)
        options["lora"] = self.at(options.get("lora", ""))
        self.make(make_pairs, f"pairs/{name}", base=self.at("base"), data=self.at("shards"), **options)
        return self.at(f"pairs/{name}")

    def labels(self, name: str) -> str:
        """Labels by a scorer."""
        given = LABELS[name]
        pairs = self.at(f"pairs/{given['pairs']}")
        self.make(label, f"labels/{name}", **{**given, "pairs": pairs, "data": self.at("shards")})
        return self.at(f"labels/{name}")

    def row(self, name: str) -> None:
        """Trains and judges a row."""
        row = ROWS[name]
        if row.start == "sft_more":
            steps = sft.PRESETS["tiny"]["steps"] + asymdpo.PRESETS["tiny"]["steps"]
            self.make(sft, "sft_more", data=self.at("shards"), split="align", base=self.at("base"), steps=steps)
        start = row.start
        if row.half_of:
            self.row(row.half_of)
            start = f"{start},dpo/{row.half_of}"
        if row.pairs:
            if "dpo/" in PAIRS[row.pairs].get("lora", "") + start:
                self.row("dynamicsboost")
            options = dict(base=self.at("base"), sft=self.at(start), pairs=self.pairs(row.pairs))
            if row.labels:
                options["labels"] = self.labels(row.labels)
            self.make(asymdpo, f"dpo/{name}", **options, **{**row.options, **self.tuned})
            self.facts(row)
            start = f"{start},dpo/{name}"
        self.judge(name, start, 0.5 if row.half_of else 1.0)

    def judge(self, name: str, loras: str, strength: float) -> None:
        """Scores of the row's samples for the seed's prompts and noise, as evaluate.py's table.

        strength: of the last LoRA.
        """
        cfg = Judged(
            self.at("base"), self.at(loras), self.at("shards"), self.at(f"eval/{name}"), CLIPS, self.seed, strength
        )
        group = common.Group(0, 1, torch.device("cpu"))
        loras = model.lora_files(cfg.lora)
        run = common.Run(cfg, "tables", group, {"base": cfg.base, "data": cfg.data} | {str(f): f for f in loras})
        if run.done:
            return
        clips, codec = data.Shards(cfg.data, "prepare.py", "eval", verify=False), vae.load(cfg.data)
        _, noise, text, captions = evaluate.prompts(clips, cfg.clips, cfg.seed)
        solver = common.resolve(evaluate.Config(), evaluate.PRESETS)
        net = model.load_fused(cfg.base, loras if strength == 1 else loras[:-1])
        if strength != 1:
            for layer in model.lora_linears(model.load_lora(net, loras[-1])).values():
                layer.lora_scale *= strength
        with run.progress(cfg.clips, unit="clip") as bar:
            made = evaluate.sample_all(net, noise, text, solver, progress=bar)
        scores = world.score(codec, made, captions)
        common.write_tensors(run.folder / "scores.safetensors", {m: torch.from_numpy(s) for m, s in scores.items()})
        common.write_tensors(run.folder / "samples.safetensors", {"x0": made[:SHOWN]})
        run.finish(["scores.safetensors", "samples.safetensors"])

    # ---- facts about pairs and continuation models -------------------------------------------------------------------

    def facts(self, row: Row) -> None:
        """How often the label agrees with the exact score; of continuations also both sides' scores, and how the losers
        begin.
        """
        path = self.root / "facts" / f"{row.labels or row.pairs}.json"
        if path.exists():
            return
        if row.labels:
            exact = LABELS[row.labels] | {"scorer": "exact"}
            twin = next(name for name, options in LABELS.items() if options == exact)
            given, true = (
                torch.tensor([r["label"] for r in common.read_jsonl(Path(self.labels(name)) / "labels.jsonl")])
                for name in (row.labels, twin)
            )
            agree = (given * true)[given != 0]
            return common.write_json(path, {"accuracy": float((1 + agree).double().mean() / 2), "labels": len(agree)})
        pairs = data.Shards(self.at(f"pairs/{row.pairs}"), "make_pairs.py", verify=False)
        codec, index = vae.load(self.at("shards")), list(range(min(FACTS, len(pairs))))
        captions = [pairs.rows[i]["caption"] for i in index]
        scores = {side: world.score(codec, pairs.get(side, index), captions) for side in ("chosen", "rejected")}
        agree = np.sign(scores["chosen"]["score"] - scores["rejected"]["score"])
        found = {"accuracy": float((1 + agree).mean() / 2), "labels": len(agree)}
        found |= {f"{side}_{m}": float(s[m].mean()) for side, s in scores.items() for m in ("score", "dyn")}
        common.write_json(path, found | self.next_frame(pairs, codec, index))

    def next_frame(self, pairs, codec, index: list[int]) -> dict[str, float]:
        """Distance in px of the balls from the truth in the first latent frame that the losers make up, and if the last
        given picture stayed. Of losers given two frames or more: one picture alone has no velocity.
        """
        clips = data.Shards(self.at("shards"), "prepare.py", "align", verify=False)
        place = {row["id"]: i for i, row in enumerate(clips.rows)}
        made, held = [], []
        for i in index:
            row = pairs.rows[i]
            if row["n1"] < 2:
                continue
            true = world.pixels(codec, clips.get("x0", [place[row["id"].partition("+")[0]]]))[0]
            loser = world.pixels(codec, pairs.get("rejected", [i]))[0]
            part = data.pixel_frames(row["n1"], row["n1"] + 1)
            error, hold = evaluate.centre_errors(loser[part], true[part], true[part.start - 1], row["caption"])
            made, held = made + error, held + hold
        return {"next_frame": float(np.mean(made)), "hold": float(np.mean(held))} if made else {}

    def sweep(self) -> None:
        """Φ's score by given frames, as evaluate.py's sweep."""
        path = self.root / "facts" / "sweep.json"
        if path.exists():
            return
        self.make(continuation, "continuation", base=self.at("base"), data=self.at("shards"))
        clips, codec = data.Shards(self.at("shards"), "prepare.py", "eval", verify=False), vae.load(self.at("shards"))
        net = model.load_continuation(self.at("base"), self.at("continuation"))
        cfg = dataclasses.replace(
            common.resolve(evaluate.Config(), evaluate.PRESETS), sweep_clips=SWEEP, seed=self.seed
        )
        rows, _ = evaluate.sweep(net, codec, clips, cfg, Silent(), None)
        common.write_json(path, [{k: v for k, v in row.items() if k != "generated"} for row in rows])


class Silent:
    """A run folder that takes no logs."""

    def log(self, *args, **metrics) -> None:
        pass


# ---- all of them -----------------------------------------------------------------------------------------------------


def run_seed(root: str, seed: int, rows: list[str], tuned: dict) -> float:
    """Everything of one seed; what the stages print goes to its log. Returns the processor's seconds."""
    folder = Path(root) / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    began = time.process_time()
    with (
        open(folder / "log.txt", "a", buffering=1) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        made = Seed(folder, seed, **tuned)
        made.ground()
        for name in rows:
            made.row(name)
        made.sweep()
        spent = time.process_time() - began
        print(json.dumps({"processor_seconds": round(spent, 1), "rows": rows}))
    return spent


def finished(root: Path, seeds: list[int], rows: list[str]) -> int:
    return sum((root / f"seed-{s}" / "eval" / r / common.MANIFEST).is_file() for s in seeds for r in rows)


def run_all(root: Path, seeds: list[int], rows: list[str], workers: int, tuned: dict) -> None:
    """Seeds side by side, a process each: two processes of one thread do more than one of two."""
    bar = tqdm(
        total=len(seeds) * len(rows), initial=finished(root, seeds, rows), unit="row", desc="tables", smoothing=0
    )
    context = multiprocessing.get_context("spawn")
    with bar, concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        waiting = {pool.submit(run_seed, str(root), seed, rows, tuned) for seed in seeds}
        try:
            while waiting:
                done, waiting = concurrent.futures.wait(waiting, 2, concurrent.futures.FIRST_EXCEPTION)
                for job in done:
                    job.result()
                bar.update(finished(root, seeds, rows) - bar.n)
        except BaseException:  # Ctrl-C, or a seed that failed: else the pool would first run all seeds that wait
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/tables", help="folder to write (default out/tables)")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(6)), help="default 0 … 5")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW", help="default all")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each (default 2)")
    parser.add_argument(
        "--options", type=json.loads, default={}, help="asymdpo.py options of every row, for trying: JSON"
    )
    args = parser.parse_args(argv)
    try:
        asymdpo.check(common.resolve(asymdpo.Config(**args.options), asymdpo.PRESETS))
    except TypeError as error:
        parser.error(f"--options: expected a JSON object of asymdpo.py's options, got {args.options!r}: {error}")
    run_all(Path(args.out), args.seeds, args.rows, args.workers, args.options)


if __name__ == "__main__":
    # glibc gives large blocks back to the system and faults them in again, step after step: 15 % of a DPO run
    malloc = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
    os.environ |= {"OMP_NUM_THREADS": "1", **malloc}
    try:
        main(sys.argv[1:])
    except common.UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.exit(f"error: disk full writing {error.filename}: free some space, the same command goes on from here")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from here")

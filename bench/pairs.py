"""What a pair costs and what it teaches: every saving of make_pairs.py, one after the other, in the tiny world.

    python -m bench.pairs                                                  all of it: half an hour of two cores
    python -m bench.pairs --seeds 12 --rows unipc50,unipc4 --out out/try   some of it, written to --out alone

Operations are counted, at the tiny preset and at Wan2.1-1.3B's shape; seconds are measured, all ways in turn; quality
is what experiments.tables judges by: AsymDPO is trained on every row's pairs, from its seed's cold start, and its
samples are judged. Settings were chosen on seeds 10 and 11, which are not on the page.

In    nothing
Out   docs/performance.md, performance.json, performance.png; <out>/seed-N/: log.txt and the stages' folders
Cost  3 GB of memory a process; whatever is finished is kept, and the same command goes on from there
"""

import dataclasses
import functools
import json
import os
import statistics
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

import asymdpo
import make_pairs
from experiments import cost, evaluate
from experiments.tables import CONTROLS, SHAPE, SWEEP, Row, Seed, run_seeds
from experiments.tables_page import PLAIN, Interval, interval, shown, table
from runtime.files import commit, read_json, whole_file, write_json, write_text
from runtime.options import option, program, resolve
from runtime.shards import Shards
from wan.lora import load_adapted, load_continuation

TIMED, ROUNDS = 256, 3  # pairs of which the seconds are taken, and how often
WHOLE = "whole"  # the first row by whole forwards, as --plain: what operations and seconds are compared with


@dataclasses.dataclass(frozen=True)
class Config:
    """Makes pairs in every way, trains on them, and writes the page."""

    seeds: str = "0,1,2,3,4,5"  # up to twelve seeds, separated by commas
    rows: str = ""  # rows by name, separated by commas; empty: every row
    workers: int = option(2, least=1)  # processes, of one thread each
    out: str = "out/bench"  # folder of all that is made, and of a page of some rows or of one seed


# ---- the rows --------------------------------------------------------------------------------------------------------

FULL, GUIDED = dict(attention="full"), dict(caption_dropout=0.1)  # Φ is sampled with guidance at Wan's presets
GUIDANCE = dict(guidance=3.0, guidance_low=0.0, guidance_high=1.0)
INTERVAL = GUIDANCE | {name: make_pairs.WAN[name] for name in ("guidance_low", "guidance_high")}


def row(title: str, nfe: int, phi: dict | None = {}, solver: str = "unipc", distill=None, **options) -> Row:
    pairs = dict(nfe=nfe, solver=solver, **options)
    return Row(title, stage=asymdpo, pairs=pairs, phi=phi, distill=distill)


LADDER = {  # with guidance; up to the fourth each changes one thing of the one before
    "full": row("50 Euler steps, full attention", 50, GUIDED | FULL, "euler", **GUIDANCE),
    "prefix": row("50 Euler steps, prefix attention", 50, GUIDED, "euler", **GUIDANCE),
    "guided_50": row("50 UniPC steps", 50, GUIDED, **GUIDANCE),
    "guided_4": row("4 UniPC steps", 4, GUIDED, **GUIDANCE),
    "interval_7": row("7 steps, guidance at 0.75 < t ≤ 0.95: the presets `1.3b` and `14b`", 7, GUIDED, **INTERVAL),
    "gt_winner": row("4 steps, guidance there, N2 = N (`gt-winner`)", 4, GUIDED, n2_min=13, **INTERVAL),
}
STEPS = {  # without guidance, as at the preset tiny
    "unipc50": row("50 UniPC steps", 50),
    "unipc4": row("4 UniPC steps: the preset `tiny`", 4),
    **{f"unipc{n}": row(f"{n} UniPC steps", n) for n in (3, 2)},
    "full4": row("4 UniPC steps, full attention", 4, FULL),
    "euler4": row("4 Euler steps", 4, solver="euler"),
    "distilled4": row("4 Euler steps, a distilled LoRA beneath Φ", 4, {}, "euler", dict(nfe=4)),
    "distilled2": row("2 Euler steps, a distilled LoRA beneath Φ", 2, {}, "euler", dict(nfe=2, substeps=6)),
    **{f"none{n}": row(f"{n} UniPC steps, no Φ: the base", n, None) for n in (4, 2)},
}
ROWS = LADDER | STEPS


# ---- counted, timed, measured ----------------------------------------------------------------------------------------


def options_of(one: Row, preset: str = "tiny") -> make_pairs.Config:
    """A row's options of make_pairs.py. At Wan's presets guidance has their weight."""
    options = dict(one.pairs)
    if preset != "tiny":
        options["guidance"] = None if "guidance" in options else 1.0
    return resolve(make_pairs.Config(preset=preset, **options), make_pairs.PRESETS)


def operations(one: Row, preset: str, plain: bool = False) -> float:
    """FLOP of a pair; plain: by whole forwards of both clips."""
    cfg, shape = options_of(one, preset), SHAPE if preset == "tiny" else cost.SHAPE
    return cost.pair(dataclasses.replace(cfg, plain=plain), shape, one.attention)["flop"]


def seconds(made: Seed, names: list[str]) -> dict[str, list[float]]:
    """Seconds of the processor for TIMED pairs by each row, and for WHOLE ones, ROUNDS times, all in turn."""
    clips, index = Shards(made.shards, "prepare.py", "align"), range(TIMED)
    x0, text, ids = clips.get("x0", index).float(), clips.text(index), [clips.rows[i]["id"] for i in index]
    ways = {name: (options_of(ROWS[name]), ROWS[name].phi) for name in names}
    first = next(iter(LADDER.values()))
    ways[WHOLE] = dataclasses.replace(options_of(first), plain=True), first.phi
    took = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, (cfg, phi) in ways.items():
            net = load_adapted(made.base, []) if phi is None else load_continuation(made.base, made.phi(phi))
            start = time.process_time()
            make_pairs.make_pair(net, x0, text, ids, cfg, make_pairs.windows(cfg, x0.shape[2]), clips.negative())
            took[name].append(time.process_time() - start)
    return took


def once(path: Path, measure) -> dict:
    """What measure() found, kept in a file."""
    if not path.exists():
        write_json(path, measure())
    return read_json(path)


def measure_row(made: Seed, name: str) -> dict[str, float]:
    """How often the winner is better; winners' and losers' scores; the mean metrics of AsymDPO's samples."""
    one = ROWS[name]
    labels = evaluate.label_accuracy(made.codec, Shards(made.pairs(one), "make_pairs.py"))
    return labels | made.judge(made.train(name, one), *CONTROLS[PLAIN])


def measure_sweep(made: Seed, phi: dict) -> list[dict]:
    """Scores and the next frame's error, px, by the number of given frames; phi: options of continuation.py."""
    cfg = dataclasses.replace(resolve(evaluate.Config(), evaluate.PRESETS), sweep_clips=SWEEP, seed=made.seed)
    net = load_continuation(made.base, made.phi(phi))
    return evaluate.sweep(net, made.codec, made.clips, cfg)[0]


def measure_sft(made: Seed) -> dict[str, float]:
    """The mean metrics of the cold start's samples."""
    return made.judge(made.train("sft", Row("SFT")), *CONTROLS[PLAIN])


def measure(made: Seed, names: list[str]) -> dict:
    """Everything of one seed."""
    found = {"sft": once(made.root / "sft.json", functools.partial(measure_sft, made))}
    found["real"] = {"score": float(made.judged_on[-1]["score"].mean())}
    for name in names:
        found[name] = once(made.root / f"{name}.json", functools.partial(measure_row, made, name))
    for name, phi in (("full", FULL), ("prefix", {})):
        found[f"sweep_{name}"] = once(made.root / f"sweep_{name}.json", functools.partial(measure_sweep, made, phi))
    return found


# ---- the page --------------------------------------------------------------------------------------------------------


class Found:
    """What was found of the rows, by seed."""

    def __init__(self, by_seed: list[dict]):
        self.by_seed = by_seed
        self.names = [name for name in ROWS if name in by_seed[0]]

    def values(self, name: str, metric: str) -> np.ndarray:
        return np.array([seed[name][metric] for seed in self.by_seed])

    def gain(self, one: str, other: str, metric: str) -> Interval:
        return interval(self.values(one, metric) - self.values(other, metric))

    def quality(self, name: str, other: str) -> list[str]:
        """Cells of a row: its pairs, what AsymDPO gains with them over SFT, and over AsymDPO with another row's."""
        cells = [shown(self.values(name, "accuracy"), "valid"), shown(self.values(name, "rejected"))]
        gains = [shown(self.gain(name, start, m), m) for start in ("sft", other) for m in ("valid", "score")]
        return cells + [*gains[:2], *(gains[2:] if name != other else ["", ""])]


QUALITY = ["labels right, %", "loser's score", "− SFT: valid, %", "score"]


def ladder(found: Found, counted: dict, took: dict) -> str:
    """The rows with guidance, against whole forwards."""
    lines = [["50 Euler steps, full attention, whole forwards", "1", "1", "1", "", "", "", "", "", ""]]
    for name in [name for name in LADDER if name in found.names]:
        ratios = [a / b for a, b in zip(took[name], took[WHOLE])]
        share = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} … {max(ratios):.3f})"
        cells = (f"{counted[name][preset] / counted[WHOLE][preset]:.3f}" for preset in ("1.3b", "tiny"))
        lines.append([ROWS[name].title, *cells, share, *found.quality(name, "guided_50")])
    heads = ["", "operations, 1.3b", "tiny", "seconds, tiny", *QUALITY, "− 50 UniPC steps: valid, %", "score"]
    return table(heads, lines)


def steps(found: Found, counted: dict, took: dict) -> str:
    """The rows without guidance, as the preset tiny."""
    lines, start = [], "unipc50"
    for name in [name for name in STEPS if name in found.names]:
        ratio = statistics.median(a / b for a, b in zip(took[name], took[start]))
        counts = f"{counted[name]['tiny'] / counted[start]['tiny']:.3f}"
        lines.append([ROWS[name].title, counts, f"{ratio:.3f}", *found.quality(name, start)])
    heads = ["", "operations", "seconds", *QUALITY, "− 50 UniPC steps: valid, %", "score"]
    return table(heads, lines)


def attention(found: Found) -> str:
    """Φ with prefix attention and with full, by the number of given frames."""
    lines = []
    for n in range(len(found.by_seed[0]["sweep_full"])):
        cells = [str(n)]
        for metric in ("score", "generated_score", "next_frame"):
            both = [
                np.array([seed[f"sweep_{kind}"][n].get(metric, np.nan) for seed in found.by_seed])
                for kind in ("full", "prefix")
            ]
            known = not np.isnan(both).any()
            cells += [shown(both[0]), shown(interval(both[1] - both[0]))] if known else ["", ""]
        lines.append(cells)
    names = ("score", "score: generated frames only", "next frame, px")
    return table(["given", *(f"{name}{part}" for name in names for part in ("", ": prefix − full"))], lines)


def headline(found: Found, counted: dict) -> str:
    """What the presets of Wan's size save, and what that does to AsymDPO here."""
    if not {"guided_50", "interval_7", "gt_winner"} <= set(found.names):
        return ""
    named = ("interval_7", "gt_winner")
    preset, winner = (f"1/{counted[WHOLE]['1.3b'] / counted[name]['1.3b']:.0f}" for name in named)
    more, and_more = (shown(found.gain(name, "guided_50", "valid"), "valid") for name in named)
    return (
        f"A pair of the presets `1.3b` and `14b` takes **{preset}** of the operations of 50 guided Euler steps by "
        f"whole forwards, and of four steps with N2 = N **{winner}**. In the tiny world AsymDPO gains {more} points "
        f"of valid clips more by the former than by 50 guided UniPC steps, and {and_more} by the latter. At Wan's size "
        "nobody has compared them."
    )


def against_full(found: Found) -> str:
    """The pairs of either attention, and what AsymDPO gains with them, without guidance."""
    if not {"unipc4", "full4"} <= set(found.names):
        return ""
    prefix, full = (shown(found.values(name, "accuracy"), "valid") for name in ("unipc4", "full4"))
    valid, score = (shown(found.gain("unipc4", "full4", m), m) for m in ("valid", "score"))
    return (
        f"Of the pairs of 4 UniPC steps {prefix} % are labelled right with prefix attention and {full} % with full. "
        f"AsymDPO gains {valid} points of valid clips and {score} in score more with prefix than with full."
    )


def parts() -> str:
    """Where a pair's operations go at Wan's presets, and the hours of all pairs, predicted."""
    lines = []
    for preset in ("1.3b", "14b"):
        nowhere = dict(data="out/nowhere", continuation="out/nowhere")  # the sizes assumed, whatever folders there are
        job = cost.job_of("make_pairs", make_pairs.Config(preset=preset, **nowhere), cost.Machine())
        cfg = resolve(make_pairs.Config(preset=preset), make_pairs.PRESETS)
        counts = cost.pair(cfg, cost.SHAPE, "prefix")
        shares = [f"{100 * counts[part] / counts['flop']:.0f} %" for part in ("keys", "losers", "winners")]
        lines.append([preset, str(cfg.nfe), f"{counts['flop'] / 1e15:.2f}", *shares, f"{8 * job.hours():,.0f}"])
    heads = ["", "steps", "PFLOP a pair", "keys, once", "losers' steps", "winners' steps", "GPU-hours, predicted"]
    return table(heads, lines)


def draw(found: Found, counted: dict, path: Path) -> None:
    """AsymDPO's lead over SFT, and the losers' score, against the operations of a pair."""
    kinds = {  # label -> names, marker, colour
        "with guidance": ([n for n in LADDER if n != "gt_winner"], "o", "#c0453f"),
        "gt-winner": (["gt_winner"], "D", "#c0453f"),
        "UniPC, no guidance": ([n for n in STEPS if n.startswith("unipc")], "s", "#2780b4"),
        "Euler, no guidance": (["euler4"], "^", "#636973"),
        "… distilled": ([n for n in STEPS if n.startswith("distilled")], "P", "#3a8f5c"),
        "the base, no Φ": ([n for n in STEPS if n.startswith("none")], "v", "#5b5fc7"),
    }
    with matplotlib.rc_context({"font.size": 14.5}):
        figure = Figure(figsize=(10, 11), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        for label, (names, marker, colour) in kinds.items():
            names = [name for name in names if name in found.names]
            x = [counted[name]["1.3b"] / counted[WHOLE]["1.3b"] for name in names]
            gains = [found.gain(name, "sft", "valid") for name in names]
            y, bars = [100 * g.mean for g in gains], np.nan_to_num([100 * g.half for g in gains], posinf=0)
            above.errorbar(x, y, bars, fmt=f"-{marker}", color=colour, label=label, markersize=9, alpha=0.85)
            below.plot(x, [found.values(n, "rejected").mean() for n in names], f"-{marker}", color=colour, markersize=9)
            for name, *place in zip(names, x, y):
                nfe = str(ROWS[name].pairs["nfe"])
                above.annotate(nfe, place, (6, 6), textcoords="offset points", color=colour)
        above.set_title("What AsymDPO gains over SFT in valid clips, points", loc="left", weight="bold")
        below.set_title("Score of the losers", loc="left", weight="bold")
        below.set(xscale="log", xlabel="operations of a pair at 1.3b, of 50 guided Euler steps by whole forwards")
        shares = (80, 40, 20, 10, 5, 2, 1)
        below.set_xticks([1 / share for share in shares], ["1" if n == 1 else f"1/{n}" for n in shares])
        below.minorticks_off()
        figure.legend(loc="outside lower center", frameon=False, ncols=3)
        for axes in (above, below):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.3)
        with whole_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=80)


def page(found: Found, counted: dict, took: dict, facts: dict) -> str:
    """The whole of performance.md: pairs.md with its tables filled in."""
    return Path(__file__).with_suffix(".md").read_text(encoding="utf-8").format(
        headline=headline(found, counted),
        ladder=ladder(found, counted, took), steps=steps(found, counted, took), attention=attention(found),
        against_full=against_full(found), parts=parts(), timed=TIMED, rounds=ROUNDS, sweep=SWEEP,
        real=shown(found.values("real", "score")), **facts,
    )  # fmt: skip


def write(by_seed: list[dict], counted: dict, took: dict, facts: dict, folder: Path) -> None:
    """performance.md, .json and .png."""
    found = Found(by_seed)
    write_text(folder / "performance.md", page(found, counted, took, facts))
    kept = {"facts": facts, "operations": counted, "seconds": took, "rows": by_seed}
    write_text(folder / "performance.json", json.dumps(kept) + "\n")
    draw(found, counted, folder / "performance.png")


def main(cfg: Config) -> None:
    cfg = resolve(cfg)
    seeds, names, by_seed = run_seeds(cfg, ROWS, (*list(LADDER)[:3], "unipc50"), measure)
    torch.set_num_threads(1)
    made = Seed(Path(cfg.out) / f"seed-{seeds[0]}", seeds[0])
    took = seconds(made, names)
    counted = {name: {preset: operations(ROWS[name], preset) for preset in ("tiny", "1.3b")} for name in names}
    counted[WHOLE] = {preset: operations(LADDER["full"], preset, plain=True) for preset in ("tiny", "1.3b")}
    facts = {
        "commit": commit(),
        "machine": f"{os.cpu_count()} cores, PyTorch {torch.__version__}",
        "seeds": ", ".join(map(str, seeds)),
    }
    folder = Path(cfg.out if cfg.rows or len(seeds) == 1 else "docs")
    write(by_seed, counted, took, facts, folder)
    print(f"bench: {folder / 'performance.md'}")


if __name__ == "__main__":
    program(main, Config, __doc__)

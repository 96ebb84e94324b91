"""The page and the picture of experiments.tables: what its figures say, and how sure that is.

A row of tables.json has its figures by seed, as values[control][metric]. It is named after its method, or `method@rate`
for another learning rate. The frontiers show every row, all else one row a method: `Figures.chosen`. The words are in
tables_page.md.
"""

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from runtime.files import whole_file, write_text
from tiny import balls

OURS, PLAIN, LESS, HALF = "dynamicsboost", "noise × 1", "noise × 0.85", "half strength"
COMPARED = ("sft", "sft_longer", OURS)  # what every row is compared with
RIVALS = ("sft", "sft_longer", "flow_exact")  # of the verdict
MAIN = (*RIVALS, OURS)  # methods whose rows go through every control
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
TRAINING = {  # column -> what asymdpo.py logs
    "`diff/w` ②": "diff/w/2",
    "`diff/l` ②": "diff/l/2",
    "`diff/w` ③": "diff/w/3",
    "`diff/l` ③": "diff/l/3",
    "`acc` ②, t < ¼": "acc/2/t0",
    "`acc` ③, t < ¼": "acc/3/t0",
}
PAPER = {  # row -> VBench's overall score and dynamic degree in the paper, as three published reading notes give them
    "pretrain": (24.48, 34.72), "sft": (24.02, 34.15), "flow_noisy": (25.22, 31.22),
    "structural_exact": (24.18, 35.25), "dense_exact": (25.02, 40.10), OURS: (25.64, 44.92),
    "n1_0": (25.31, 43.92), "n1_0_n2_13": (24.42, 34.32), "n1_1_n2_13": (24.94, 35.72), "gt_winner": (25.44, 46.41),
    "region_123": (22.15, 42.48), "region_3": (24.10, 38.21),
}  # fmt: skip


# ---- statistics ------------------------------------------------------------------------------------------------------

T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)  # Student's t, 1 … 11 degrees


class Interval(NamedTuple):
    """A mean over the seeds ± half of its 95 % interval: infinite of one seed."""

    mean: float
    half: float

    @property
    def sign(self) -> int:
        """1 or −1 where the interval does not hold 0, else 0."""
        return int(np.sign(self.mean)) if abs(self.mean) > self.half else 0


def interval(values) -> Interval:
    """Of one value a seed."""
    n, values = len(values), np.array(values, float)
    return Interval(values.mean(), T975[n - 2] * values.std(ddof=1) / n**0.5 if n > 1 else math.inf)


class Figures:
    """The rows of tables.json, and what can be asked of them."""

    def __init__(self, rows: dict[str, dict]):
        self.rows = rows

    def title(self, name: str) -> str:
        return self.rows[name]["title"]

    def values(self, name: str, metric: str, kind: str = PLAIN) -> np.ndarray | None:
        """A metric of a row by seed, or None if it was not measured."""
        by_seed = self.rows[name]["values"].get(kind, {}).get(metric)
        return None if by_seed is None else np.array(by_seed)

    def gain(self, one: str, other: str, metric: str, kind: str = PLAIN) -> Interval | None:
        """Row `one` minus row `other`, seed by seed; at half strength, minus the other at full."""
        a, b = self.values(one, metric, kind), self.values(other, metric, PLAIN if kind == HALF else kind)
        return None if a is None or b is None or one == other else interval(a - b)

    def mean(self, name: str, metric: str, kind: str = PLAIN) -> str:
        return shown(self.values(name, metric, kind), metric)

    def minus(self, one: str, other: str, metric: str, kind: str = PLAIN) -> str:
        return shown(self.gain(one, other, metric, kind), metric)

    def methods(self) -> dict[str, list[str]]:
        """The rows of each method by learning rate."""
        names = sorted(self.rows, key=lambda name: self.rows[name].get("lr", 0))
        methods = dict.fromkeys(row["method"] for row in self.rows.values())
        return {method: [name for name in names if self.rows[name]["method"] == method] for method in methods}

    def frontiers(self) -> dict[str, list[str]]:
        """Those of the methods whose learning rate was varied."""
        return {method: names for method, names in self.methods().items() if "lr" in self.rows[names[0]]}

    def best(self, method: str) -> str:
        """The row that stands for a method. DynamicsBoost's has the preset's learning rate; a rival's has the one with
        the most valid clips, on the very seeds of the tables, which favours the rival.
        """
        return (
            OURS if method == OURS else max(self.methods()[method], key=lambda name: self.values(name, "valid").mean())
        )

    def chosen(self) -> "Figures":
        """One row a method, the best, under the method's name. A rival's title says its rate."""
        rows = {method: self.rows[self.best(method)] for method in self.methods()}
        for method, row in rows.items():
            if "lr" in row and method != OURS:
                rows[method] = row | {"title": f"{row['title']}, lr {row['lr']:g}"}
        return Figures(rows)


# ---- tables ----------------------------------------------------------------------------------------------------------


def shown(value, metric: str = "score", digits: int | None = None) -> str:
    """A mean, 0.050; of an interval, +0.050 ± 0.010, bold where it does not hold 0; nothing for None."""
    factor, usual, _ = FORMATS[metric]
    digits = usual if digits is None else digits
    if value is None:
        return ""
    if not isinstance(value, Interval):
        return f"{factor * np.mean(value):.{digits}f}".replace("-", "−")
    text = f"{factor * value.mean:+.{digits}f} ± {factor * value.half:.{digits}f}".replace("-", "−")
    return f"**{text}**" if value.sign else text


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown. No cell is broken beside one of its signs."""
    lines = [f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *rows]]
    return re.sub(" ([±×/]) ", "\N{NO-BREAK SPACE}\\1\N{NO-BREAK SPACE}", "\n".join(lines))


def tables(chosen: Figures, *groups: str) -> str:
    """The tables of the rows of some groups, with those that all are compared with."""
    names = [name for name, row in chosen.rows.items() if row["group"] in groups]
    names = [*(name for name in COMPARED if name not in names), *names, "real"]
    parts, looks = [], list(FORMATS)[2:]
    for m in ("valid", "score"):
        lines = [
            [chosen.title(n), chosen.mean(n, m), *(chosen.minus(n, other, m) for other in COMPARED)] for n in names
        ]
        parts.append(table(["", FORMATS[m][2], *(f"− {chosen.title(other)}" for other in COMPARED)], lines))
    lines = [[chosen.title(n), *(chosen.mean(n, m) for m in looks)] for n in names]
    parts.append(table(["", *(FORMATS[m][2] for m in looks)], lines))
    lines = []
    for n in names[:-1]:
        labels, operations = (chosen.rows[n].get(key) for key in ("accuracy", "operations"))
        own = [shown(labels, "valid"), shown(operations, digits=2)]
        lines.append([chosen.title(n), chosen.mean(n, "valid", LESS), chosen.minus(n, "sft", "valid", LESS), *own])
    parts.append(table(["", f"valid, %, {LESS}", "− SFT there", "labels right, %", "operations"], lines))
    return "\n\n".join(parts)


def controls(chosen: Figures) -> str:
    """The main rows under every control, and the method's lead there."""
    rivals, kinds = [name for name in RIVALS if name in chosen.rows], list(chosen.rows[OURS]["values"])
    heads, parts = [chosen.title(name) for name in rivals], []
    for m in ("valid", "score"):
        shares = [[kind, *(chosen.mean(name, m, kind) for name in (*rivals, OURS))] for kind in kinds]
        leads = [[kind, *(chosen.minus(OURS, name, m, kind) for name in rivals)] for kind in kinds]
        parts.append(table([FORMATS[m][2], *heads, chosen.title(OURS)], shares))
        parts.append(table([f"lead in {FORMATS[m][2]}", *(f"over {head}" for head in heads)], leads))
    return "\n\n".join(parts)


def rates(every: Figures) -> str:
    """Valid clips and dynamic degree at each of the methods' learning rates, that of a method's row in bold."""
    lines = []
    for method, names in every.frontiers().items():
        for n in names:
            lr = f"{every.rows[n]['lr']:g}"
            cells = [f"**{lr}**" if n == every.best(method) else lr]
            for m in ("valid", "dyn"):
                cells += [every.mean(n, m), every.minus(n, "sft", m)]
            lines.append([every.title(n), *cells, every.mean(n, "w1")])
    return table(["", "lr", FORMATS["valid"][2], "− SFT", FORMATS["dyn"][2], "− SFT", FORMATS["w1"][2]], lines)


def sweep(given: list[dict]) -> str:
    """Φ's score by the number of given frames."""
    steps = ["", *(shown(interval(risen)) for risen in np.diff([row["score"] for row in given], axis=0))]
    whole, generated = ([shown(row.get(key)) for row in given] for key in ("score", "generated_score"))
    heads = ["given", "whole clip", "gained by the last given frame", "generated frames only"]
    return table(heads, [list(line) for line in zip(map(str, range(len(given))), whole, steps, generated)])


def trained(chosen: Figures) -> str:
    """What DPO did to the errors of winner and loser."""
    lines = []
    for row in [row for row in chosen.rows.values() if "training" in row]:
        cells = (shown(row["training"].get(key), digits=3 if "acc" in key else 5) for key in TRAINING.values())
        lines.append([row["title"], *cells])
    return table(["", *TRAINING], lines)


# ---- verdicts --------------------------------------------------------------------------------------------------------

BETTER = {  # row -> the paper's claim that its method, or a choice in it, is better than this row
    "pretrain": "better than Pretrain",
    "sft": "better than SFT",
    "flow_noisy": "better than Flow-DPO, labelled by a model (30 % flipped)",
    "structural_exact": "better than StructuralDPO",
    "dense_exact": "better than DenseDPO",
    "n1_0": "N1 ≥ 1 better than N1 ≥ 0",
    "n1_0_n2_13": "better than N1 = 0, N2 = N",
    "n1_1_n2_13": "better than N1 = 1, N2 = N",
    "region_123": "loss on ②③ better than on ①②③",
    "region_3": "loss on ②③ better than on ③",
}
# rows that have less dynamic degree than the method, in the paper
MOVES = ("pretrain", "sft", "flow_noisy", "structural_exact", "dense_exact")


def verdict(difference: Interval, sign: int = 1) -> str:
    """Of a claim that a difference has a sign."""
    return {0: "not resolved", sign: "reproduced", -sign: "not reproduced"}[difference.sign]


def nearer(chosen: Figures, name: str) -> Interval:
    """By how much the method's dynamic degree is nearer to the real clips' than a row's."""
    far, ours = (abs(chosen.values(row, "dyn") - chosen.values("real", "dyn")) for row in (name, OURS))
    return interval(far - ours)


def close(difference: Interval, gained: Interval) -> str:
    """Of the claim that a difference is small: within half of what the method gains over SFT, if it does."""
    low, high = abs(difference.mean) - difference.half, abs(difference.mean) + difference.half
    if gained.sign < 1 or low <= gained.mean / 2 <= high:
        return "not resolved"
    return "reproduced" if high < gained.mean / 2 else "not reproduced"


def claims(chosen: Figures, given: list[dict]) -> str:
    """The paper's claims, each with a verdict that follows from the figures. given: the sweep."""
    lines = []

    def claim(words: str, here: str, word: str, *paper: float) -> None:
        lines.append([words, " / ".join(f"{number:.2f}" for number in paper), here, f"**{word}**"])

    for name in [name for name in (*BETTER, "gt_winner") if name in chosen.rows]:
        lead, gained = (chosen.gain(OURS, other, "valid") for other in (name, "sft"))
        word = verdict(lead) if name in BETTER else close(lead, gained)
        here = f"valid {shown(lead, 'valid')}, score {chosen.minus(OURS, name, 'score')}"
        claim(BETTER.get(name, "N2 = N (`gt-winner`) is close"), here, word, PAPER[OURS][0], PAPER[name][0])
    for name in [name for name in MOVES if name in chosen.rows]:
        words, closer = f"dynamic degree nearer to real clips' than that of {chosen.title(name)}", nearer(chosen, name)
        claim(words, f"{shown(closer, 'dyn')} px/frame", verdict(closer), PAPER[OURS][1], PAPER[name][1])
    if "flow_noisy" in chosen.rows:
        lost, paper = chosen.gain("flow_noisy", "sft", "dyn"), (PAPER["flow_noisy"][1], PAPER["sft"][1])
        words = "Flow-DPO loses dynamic degree against SFT"
        claim(words, f"{shown(lost, 'dyn')} px/frame", verdict(lost, -1), *paper)
    curve = np.array([row["score"] for row in given])
    risen, falls = interval(curve[-2] - curve[1]), (np.diff(curve[1:-1].mean(1)) < 0).any()
    word = "not resolved" if falls and risen.mean > 0 else verdict(risen)
    claim("quality rises with the number of given frames", f"score, one to all but one: {shown(risen)}", word)
    return table(["claim", "paper", "here", "verdict"], lines)


def headline(chosen: Figures) -> str:
    """The lead over each rival, with the controls that take it away, and the share of the gap to real clips."""
    words = {1: "ahead of", 0: "not told apart from", -1: "behind"}
    lines = ["In valid clips DynamicsBoost is\n"]
    for name in [name for name in RIVALS if name in chosen.rows]:
        under = {kind: chosen.gain(OURS, name, "valid", kind) for kind in chosen.rows[OURS]["values"]}
        lead = under.pop(PLAIN)
        lost = ", ".join(kind for kind, other in under.items() if other.sign < 1)
        kept = "" if lead.sign < 1 else f", but not under {lost}" if lost else ", and so under every control"
        lines.append(f"* **{words[lead.sign]}** {chosen.title(name)}: {shown(lead, 'valid')} points{kept}")
    closed, three = [], ("sft", OURS, "real")
    for m in ("valid", "score"):
        start, ours, real = (chosen.values(name, m) for name in three)
        closed.append(shown(interval((ours - start) / (real - start)), "valid", 0).replace("+", ""))
    shares, degrees = ([chosen.mean(name, m) for name in three] for m in ("valid", "dyn"))
    return "\n".join(lines) + (
        "\n\nSFT has {} % of valid clips, DynamicsBoost {} %, real clips {} %.".format(*shares)
        + " Of the gap between SFT and real clips it closes {} % in valid clips, {} % in score.".format(*closed)
        + " Dynamic degree: SFT {}, DynamicsBoost {}, real clips {} px/frame.".format(*degrees)
    )


# ---- the page --------------------------------------------------------------------------------------------------------


def page(found: dict) -> str:
    """The whole of tables.md: tables_page.md with its parts filled in."""
    every, given, (clips, fewer) = Figures(found["rows"]), found["sweep"], found["clips"]
    chosen = every.chosen()
    return Path(__file__).with_suffix(".md").read_text(encoding="utf-8").format(
        headline=headline(chosen), claims=claims(chosen, given), controls=controls(chosen), frontiers=rates(every),
        systems=tables(chosen, "systems"), ablations=tables(chosen, "windows", "loss", "phi"), sweep=sweep(given),
        trained=trained(chosen), real=shown(chosen.values("real", "dyn"), digits=2), commit=found["commit"],
        seeds=", ".join(map(str, found["seeds"])), clips=clips, fewer=fewer, machine=found["machine"], **vars(balls),
    )  # fmt: skip


# ---- the picture -----------------------------------------------------------------------------------------------------

COLOURS = ("#636973", "#2780b4", "#7fb6d9", "#5b5fc7", "#c0453f")  # of the frontiers


def plain(text: str) -> str:
    return text.replace("**", "").replace("`", "")


def draw_frontiers(axes, every: Figures) -> None:
    """Valid share against dynamic degree: a line for each method through its rates, SFT and the real clips.

    The bars are the intervals of the differences from SFT: what the seeds have in common is not in them.
    """
    places = {name: (every.values(name, "dyn").mean(), 100 * every.values(name, "valid").mean()) for name in every.rows}
    for (method, names), colour in zip(every.frontiers().items(), COLOURS):
        x, y = zip(*(places[name] for name in names))
        halves = ([factor * every.gain(n, "sft", m).half for n in names] for m, factor in (("valid", 100), ("dyn", 1)))
        bars, wide = (np.nan_to_num(half, posinf=0) for half in halves), 4 if method == OURS else 2.2
        axes.errorbar(x, y, *bars, fmt="none", ecolor=colour, alpha=0.35, linewidth=1.5)
        axes.plot(x, y, "-o", color=colour, linewidth=wide, markersize=4 + wide, label=plain(every.title(names[0])))
    for name, marker, size, label, apart in (
        ("real", "*", 22, "real clips", 12),
        ("sft", "s", 11, "SFT, the start", -24),
    ):
        axes.plot(*places[name], marker, color="black", markersize=size)
        axes.annotate(label, places[name], (0, apart), textcoords="offset points", ha="center")
    axes.axvline(places["real"][0], color="black", linewidth=0.8, linestyle=":")
    axes.margins(y=0.12)


def draw_forest(axes, chosen: Figures, names: list[str]) -> None:
    """Differences in valid clips from SFT."""
    for y, name in enumerate(names):
        lead = chosen.gain(name, "sft", "valid")
        colour, half = COLOURS[-1 if name == OURS else 0], 100 * np.nan_to_num(lead.half, posinf=0)
        fill = colour if lead.sign else "white"
        axes.errorbar(100 * lead.mean, y, xerr=half, fmt="o", c=colour, mfc=fill, linewidth=2.2, markersize=8)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), [plain(chosen.title(name)) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.get_yticklabels()[names.index(OURS)].set_weight("bold")
    axes.grid(axis="x", alpha=0.3)


def picture(every: Figures, path: Path) -> None:
    """The frontiers, and below them the forest plot."""
    chosen = every.chosen()
    names = [name for name in chosen.rows if name not in ("pretrain", "sft", "real")]
    heights = (7.5, 1.6 + 0.33 * len(names))
    with matplotlib.rc_context({"font.size": 14.5}):
        figure = Figure(figsize=(10, sum(heights)), layout="constrained")
        parts = figure.subfigures(2, 1, height_ratios=heights)  # so that each has its own margins
        above, below = (part.add_subplot() for part in parts)
        above.set(xlabel="dynamic degree, px/frame", ylabel="valid, %")
        above.set_title("Valid clips and dynamic degree, by learning rate", loc="left", weight="bold")
        below.set_title("Valid clips against SFT", loc="left", weight="bold")
        below.set_xlabel("points, with 95 % intervals over the seeds; filled: resolved")
        draw_frontiers(above, every)
        draw_forest(below, chosen, names)
        parts[0].legend(loc="outside lower left", ncols=2, frameon=False)
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
    picture(Figures(found["rows"]), folder / "tables.png")

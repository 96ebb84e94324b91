"""The demo's report: one HTML page of what came out, and its figures as one file.

    python -m experiments.page --demo out/demo

Videos, plots, style and script are all inside the page, so it opens from disk without a network. The sentences with a
mark are made from the figures and change with them. An address that ends in #t=0.5 opens the page with every video
halfway.

In    a demo folder whose stages are finished: those of STAGES, sft_longer where there is one
Out   in the same folder: report.html; demo.png and demo.gif, pictures of the first prompts; summary.json, eval's with
      the seconds of every stage
Cost  seconds
"""

import base64
import dataclasses
import html
import io
import math
import os
import platform
import string
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from experiments.trails import Watched, pictures, watch
from runtime import video
from runtime.files import read_json, read_jsonl, read_manifest, read_tensors, read_text, write_json, write_text
from runtime.options import UserError, program, resolve
from runtime.shards import Shards
from tiny import balls
from tiny import codec as codecs

STAGES = {  # folder -> the command that makes it, in the order they run
    "clips": "tiny.balls",
    "shards": "prepare.py",
    "base": "sft.py",
    "sft": "sft.py --base",
    "sft_longer": "sft.py --base",
    "continuation": "continuation.py",
    "pairs": "make_pairs.py",
    "asymdpo": "asymdpo.py",
    "eval": "experiments.evaluate",
}
OPTIONAL = ("sft_longer",)
OURS, LONGER, REAL = "DynamicsBoost", "SFT, as many operations", "real clips"  # rows of eval's table
METRICS = {  # -> its name, factor, decimals, which way is better, meaning
    "valid": (
        "valid, %", 100, 1, "↑",
        f"clips whose ball is at most {balls.VALID:g} px (rms) off a path that physics allows, never jumps nor freezes",
    ),
    "score": (
        "score", 1, 3, "↑",
        "−traj/4 − 10·shape; not even the real clips reach 0, because codec and ball finder are a little inexact",
    ),
    "dyn": (
        "dynamic degree", 1, 3, "→ real",
        "px/frame that the ball moves; slower motion than the real clips’ can be valid, too, and this would show it",
    ),
    "w1": ("W1 of speed", 1, 3, "↓", "distance (Wasserstein) of the balls’ speeds from the real clips’, px/frame"),
    "frozen": ("frozen, %", 100, 1, "↓", f"clips whose ball stands still for {balls.STILL_FRAMES} pictures"),
    "jump": ("jump, %", 100, 1, "↓", f"clips whose ball moves by over {balls.JUMP:g} px from one picture to the next"),
    "traj": ("traj, px", 1, 2, "↓", "distance of the ball from the nearest path that physics allows, rms"),
    "shape": ("shape", 1, 4, "↓", "how unlike a perfect round ball it looks, as a difference in light from 0 to 1"),
}  # fmt: skip
BETTER = {"↑": lambda x, real: -x, "↓": lambda x, real: x, "→ real": lambda x, real: abs(x - real)}  # smallest is best
ASKS = {  # first word of a control -> what it asks
    "as": "both models as in the table above",
    "noise": "both models start from less noise, which alone makes motion calmer: does that buy the gain?",
    "solver": "both models are sampled by another solver: is the gain one solver’s error undone?",
    "SFT,": "SFT is trained on for what Φ, the pairs and preference training cost together: is more SFT as good?",
    "LoRA": "half of what preference training changed: is half of it enough?",
}
# 8 × 4 players, 4 continuations and 2 × 2 of pairs: phones allow 40 videos to be open
PLAYERS, CONTINUED, PAIRS = 8, (1, 3, 6, 10), 2
R2, R3 = "#2780b4", "#d67a22"  # as in page.css
STYLE = {
    "svg.hashsalt": "report", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#d9d6cf", "grid.linewidth": 0.5, "legend.frameon": False, "legend.fontsize": 9,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """Writes report.html, demo.png, demo.gif and summary.json of a finished demo."""

    demo: str = "out/demo"  # folder of the demo


# ---- words -----------------------------------------------------------------------------------------------------------


def num(x: float, digits: int = 2, sign: str = "") -> str:
    """A number for reading: fixed digits, a true minus; sign "+" shows a plus, too."""
    return f"{x:{sign}.{digits}f}".replace("-", "−")


def percent(share: float) -> str:
    return f"{num(100 * share, 0)}\N{NO-BREAK SPACE}%"


def interval(difference: dict, factor: float = 1, digits: int = 3) -> str:
    """A difference with its 95 % interval."""
    mean, lo, hi = (num(factor * difference[key], digits, "+") for key in ("mean", "lo", "hi"))
    return f"{mean} [{lo},\N{NO-BREAK SPACE}{hi}]"


def said(good: bool | None, sentence: str) -> str:
    """A sentence made from the figures: True is marked as good news, False as bad, None as neither."""
    name, mark = {True: ("good", "✓"), False: ("bad", "✗"), None: ("open", "·")}[good]
    return f"<p class={name}><b aria-hidden=true>{mark}</b> {sentence}</p>"


def resolved(difference: dict) -> bool | None:
    """Whether an interval lies above 0 (True) or below (False), or includes it (None)."""
    return True if difference["lo"] > 0 else False if difference["hi"] < 0 else None


def verdict(summary: dict) -> str:
    """What came out, in one sentence: the shares of valid clips, and whether the gain survives every control."""
    table, difference = summary["table"], summary["difference"]
    share = {name: percent(row["valid"]) for name, row in table.items()}
    controls = {kind: found["difference"]["valid"] for kind, found in summary["controls"].items()}
    first = longer = ""
    if LONGER in table:
        longer = f"SFT’s for as many operations {share[LONGER]}, "
        controls["SFT for as many operations"] = difference[LONGER]["valid"]
        if resolved(difference[LONGER]["valid"]) is False:
            first = "SFT for as many operations is better. "
    shares = f"{share[OURS]} of its clips are valid, SFT’s {share['SFT']}, {longer}real clips’ {share[REAL]}"
    gain = difference["SFT"]["valid"]
    points = f"{interval(gain, 100, 1)} points"
    if not resolved(gain):
        words = "a loss" if resolved(gain) is False else "no gain that is resolved"
        return f"{first}{OURS}: {shares}; against SFT that is {words} ({points})."
    controls["half the LoRA's strength"] = summary["half"]["difference"]["valid"]
    lost = [f"{kind} ({interval(found, 100, 1)})" for kind, found in controls.items() if not resolved(found)]
    held = f"does not hold under {', '.join(lost)}" if lost else f"holds under all {len(controls)} controls"
    bought = [
        f"; but {kind} alone brings SFT to {percent(found['SFT']['valid'])}"
        for kind, found in summary["controls"].items()
        if found["SFT"]["valid"] >= table[OURS]["valid"]
    ]
    return f"{first}{OURS}: {shares}; the gain, {points}, {held}{''.join(bought)}."


def short(table: dict, row: str, metric: str) -> float:
    """How far a row falls short in a metric, up to a constant: the smallest is the best."""
    return BETTER[METRICS[metric][3]](table[row][metric], table[REAL][metric])


def gap_closed(table: dict) -> str:
    """How much of the way from SFT to real clips was made, in valid clips and score; and what became worse."""
    parts = []
    for metric, name in (("valid", "valid clips"), ("score", "score")):
        start, ours, real = (table[row][metric] for row in ("SFT", OURS, REAL))
        made = percent((ours - start) / (real - start)) if real > start else "nothing (there is no gap)"
        parts.append(f"{made} in {name}")
    values = (f"{m} {' → '.join(num(table[row][key]) for row in ('SFT', OURS))} (real {num(table[REAL][key])})"
              for key, m in (("score", "score"), ("dyn", "dynamic degree")))  # fmt: skip
    worse = [m[0].split(",")[0] for key, m in METRICS.items() if short(table, OURS, key) > short(table, "SFT", key)]
    cost = f" It is worse than SFT in {', '.join(worse)}." if worse else ""
    return f"Of the gap between SFT and real clips it closes {' and '.join(parts)}: {', '.join(values)}.{cost}"


def sweep_said(summary: dict) -> str:
    """Whether Φ continues, by the mean over 2 … F − 1 given frames; and from one given frame."""
    made, held = (summary["next_frame_error"][key] for key in ("next_frame", "hold"))
    one = summary["sweep_rows"][1]
    change = f"{num(100 * abs(1 - made / max(held, 1e-9)), 0)} % {'nearer' if made < held else 'further'}"
    words = f"The model’s ball is {num(made)} px from where it truly went, {change} than when holding"
    first = f"From one given frame, which shows no motion, {num(one['next_frame'])} px against {num(one['hold'])}"
    return said(made < held, f"{words} ({num(held)} px), mean over two given frames and more. {first}.")


def training_said(rows: list[dict]) -> str:
    """Which side of a pair the margin comes from, by region: is the winner fitted better?"""
    sentences = []
    for region, name in (("2", "②"), ("3", "③")):
        sides = [[row[key] for row in rows if key in row] for key in (f"diff/w/{region}", f"diff/l/{region}")]
        if not all(sides):
            sentences.append(said(None, f"Region {name}: no pair of the last quarter of training has frames there."))
            continue
        winner, loser = (1000 * float(np.mean(side)) for side in sides)
        if loser <= winner:
            good, words = False, "the winner did not gain on the loser, so nothing was learned here"
        elif winner < 0:
            good, words = True, "the winner is fitted better than before, and gained on the loser"
        else:
            good, words = None, "the loser’s error rose more than the winner’s: likelihood displacement"
        changed = f"the winner’s error changed by {num(winner, 2, '+')} thousandths, the loser’s by"
        sentences.append(said(good, f"Region {name}: {changed} {num(loser, 2, '+')}; {words}."))
    return "".join(sentences)


# ---- pictures --------------------------------------------------------------------------------------------------------


def plot(title: str, xlabel: str, ylabel: str, *lines: tuple, level: float | None = None) -> str:
    """A plot of `lines`, each (x, y, label, style, colour), and a thin line at `level`."""
    with rc_context(STYLE):
        figure = Figure(figsize=(4.7, 3.1), layout="constrained")
        axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
        for x, y, label, style, colour in lines:
            axes.plot(x, y, style, label=label, color=colour, markersize=3.5)
        if level is not None:
            axes.axhline(level, color="black", linewidth=0.6)
        if len(lines) > 1:
            axes.legend()
        out = io.BytesIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    uri = f"data:image/svg+xml;base64,{base64.b64encode(out.getvalue()).decode()}"
    return f'<figure class=plot><figcaption>{title}</figcaption><img alt="{title}" src="{uri}"></figure>'


def line(rows: list[dict], key: str, label: str = "", style: str = "-", colour: str = R2, x: str = "step") -> tuple:
    """A line of `plot`: a value, averaged over a twelfth of the rows that have it, at most 400 points."""
    some = [(row[x], row[key]) for row in rows if key in row]
    steps, values = np.array(some, float).reshape(-1, 2).T
    kernel = np.ones(max(1, len(some) // 12))
    if some:
        values = np.convolve(values, kernel, "same") / np.convolve(np.ones(len(some)), kernel, "same")
    thin = slice(None, None, max(1, len(some) // 400))
    return steps[thin], values[thin], label, style, colour


def diagram(n1: int, n2: int, frames: int) -> str:
    """A pair as a table: a cell for each latent frame, coloured by region; solid is real, hatched is generated."""
    regions = {"①": n1, "②": n2 - n1, "③": frames - n2}
    rows = ["<th></th>" + "".join(f"<td colspan={count}>{mark}</td>" for mark, count in regions.items() if count)]
    colours = [f"r{k + 1}" for k, count in enumerate(regions.values()) for _ in range(count)]
    for name, given in ((f"winner, N2 = {n2}", n2), (f"loser, N1 = {n1}", n1)):
        cells = (f'<td class="{c}{" hatched" if i >= given else ""}"></td>' for i, c in enumerate(colours))
        rows.append(f"<th scope=row>{name}</th>" + "".join(cells))
    return f"<table class=diagram>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


# ---- the parts of the page -------------------------------------------------------------------------------------------


def figures(head: list[str], rows: list[tuple[str, list[str], str]]) -> str:
    """A table: of each row its name, its cells (with their tags) and, below them, what it means. Names are escaped."""
    columns = (html.escape(name.replace("sB", "s\N{SOFT HYPHEN}B")) for name in head)
    parts = [f"<tr><th></th>{''.join(f'<th scope=col>{name}</th>' for name in columns)}</tr>"]
    for name, cells, meaning in rows:
        parts.append(f"<tr><th scope=row>{html.escape(name)}</th>{''.join(cells)}</tr>")
        parts.append(f"<tr class=meaning><td colspan={len(head) + 1}>{meaning}</td></tr>")
    return f"<table class=figures>{''.join(parts)}</table>"


def results_table(table: dict) -> str:
    """A row for each metric, a column for each model and the real clips; the best of the models bold."""
    rows = []
    for metric, (name, factor, digits, arrow, meaning) in METRICS.items():
        shown = {model: num(factor * row[metric], digits) for model, row in table.items()}
        models = [model for model in table if model != REAL]
        best = min(models, key=lambda model: short(table, model, metric))
        bold = {model for model in models if shown[model] == shown[best]}
        cells = [f"<td{' class=best' if model in bold else ''}>{value}</td>" for model, value in shown.items()]
        rows.append((f"{name} {arrow}", cells, meaning))
    return figures(list(table), rows)


def controls_table(summary: dict) -> str:
    """Valid clips and score of SFT and DynamicsBoost under each control, and their difference."""
    table, difference, half = summary["table"], summary["difference"], summary["half"]
    found = [("as above", table["SFT"], table[OURS], difference["SFT"])]
    found += [(kind, c["SFT"], c[OURS], c["difference"]) for kind, c in summary["controls"].items()]
    if LONGER in table:
        found.append((LONGER, table[LONGER], table[OURS], difference[LONGER]))
    found.append(("LoRA at half strength", table["SFT"], half, half["difference"]))
    rows = []
    for kind, sft, ours, d in found:
        cells = [f"<td>{num(100 * m['valid'], 1)} %<small>{num(m['score'], 3)}</small></td>" for m in (sft, ours)]
        name = {True: "good", False: "bad", None: "open"}[resolved(d["valid"])]
        asks = ASKS.get(kind.partition(" ")[0], "")
        words = f"{interval(d['valid'], 100, 1)}<small>{interval(d['score'])}</small>"
        rows.append((kind, [*cells, f"<td class={name}><b>{words}</b></td>"], asks))
    return figures(["SFT", OURS, "difference"], rows)


def sweep_plots(rows: list[dict]) -> str:
    scores = ("score", "whole clip", "o-", R2), ("generated_score", "generated frames only", "s--", R3)
    errors = ("next_frame", "Φ", "o-", R2), ("hold", "holding", ":", R3)
    scores, errors = ([line(rows, *looks, x="n_cond") for looks in lines] for lines in (scores, errors))
    left = plot("Score (higher is better)", "given latent frames", "score", *scores)
    return left + plot("Next frame (lower is better)", "given latent frames", "px from the truth", *errors)


def training_plots(rows: list[dict]) -> str:
    changes = [
        line(rows, f"diff/{side}/{region}", f"{name} {word}", style, colour)
        for region, name, colour in (("2", "②", R2), ("3", "③", R3))
        for side, word, style in (("w", "winner", "-"), ("l", "loser", "--"))
    ]
    left = plot("Change of error against the SFT model", "step", "diff: policy − reference", *changes, level=0)
    accuracy = line(rows, "rewards/accuracies")
    return left + plot("Pairs with a margin above 0", "step", "rewards/accuracies (½: chance)", accuracy, level=0.5)


def videos(clips: list[Watched], labels: list[str], caption: str, given: bool = False) -> str:
    """A row of players with a label each. given: each label begins with the number of given frames."""
    cells = []
    for clip, label in zip(clips, labels, strict=True):
        with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
            video.write_mp4(file.name, np.rint(255 * clip.pictures).astype(np.uint8), balls.FPS, crf=16)
            coded = base64.b64encode(Path(file.name).read_bytes()).decode()
        more = f" data-given={label.split()[0]}" if given else ""
        player = f'<video muted playsinline preload=auto data-mp4="{coded}"></video>'
        at, valid = (" ".join(f"{x:.1f},{y:.1f}" for x, y in line.T) for line in (clip.path, clip.nearest))
        bad, box = "".join(map(str, clip.bad.astype(int))), f"0 0 {balls.SIZE} {balls.SIZE}"
        trail = f'<svg viewBox="{box}" data-path="{at}" data-bad="{bad}"><polyline points="{valid}" /></svg>'
        name = "good" if clip.valid else "bad"
        words = f"<figcaption>{label} <small class={name}><b>{clip.mark}</b></small></figcaption>"
        cells.append(f"<figure class=cell{more}><div class=screen>{player}{trail}</div>{words}</figure>")
    return f"<p class=caption>“{html.escape(caption)}”</p><div class=cells>{''.join(cells)}</div>"


def pair_rows(codec, pairs: Shards) -> str:
    """Some pairs, from the fewest given frames to the most."""
    order = sorted(range(len(pairs)), key=lambda i: (pairs.rows[i]["n2"], pairs.rows[i]["n1"], pairs.rows[i]["id"]))
    shown = []
    for k in np.linspace(0, len(order) - 1, min(PAIRS, len(order))).round().astype(int):
        row, both = pairs.rows[order[k]], torch.cat([pairs.get(side, [order[k]]) for side in ("chosen", "rejected")])
        shown.append(diagram(row["n1"], row["n2"], both.shape[2]))
        shown.append(videos(watch(codec, both, 2 * [row["caption"]]), ["winner", "loser"], row["caption"]))
    return "".join(shown)


def players(rows: dict[str, list[Watched]], captions: list[str]) -> str:
    return "".join(videos([clips[k] for clips in rows.values()], [*rows], c) for k, c in enumerate(captions))


def continuations(codec, samples: dict, caption: str) -> str:
    """The first clip, continued from more and more given frames."""
    made = {f"{n} given": samples[f"sweep_{n}"][:1] for n in CONTINUED if f"sweep_{n}" in samples}
    return videos(watch(codec, torch.cat([*made.values()]), len(made) * [caption]), [*made], caption, given=True)


def page(demo: Path, manifests: dict[str, dict], summary: dict, codec, samples: dict, rows: dict, captions) -> str:
    """The whole file: page.html with its parts filled in. rows: what is shown of each model, a clip a caption."""
    here, pairs = Path(__file__).parent, Shards(demo / "pairs", "make_pairs.py")
    metrics = read_jsonl(demo / "asymdpo" / "metrics.jsonl")
    check_figures(metrics, demo / "asymdpo" / "metrics.jsonl")
    frames, labels = pairs.shape("chosen")[1], summary["labels"]
    stages = (f"<code>{name}</code>&nbsp;{seconds:.1f}" for name, seconds in summary["seconds"].items())
    return string.Template(read_text(here / "page.html")).substitute(
        seed=summary["seed"], clips=summary["clips"], sweep_clips=summary["sweep_clips"], shown=len(captions),
        style=read_text(here / "page.css"), script=read_text(here / "page.js"),
        pictures=balls.FRAMES, fps=balls.FPS, size=balls.SIZE, off=f"{balls.VALID:g}",
        frozen=f"{100 * balls.FAULTS['freeze']:.0f}", cut=f"{100 * balls.FAULTS['cut']:.0f}",
        verdict=html.escape(verdict(summary)), gap_closed=gap_closed(summary["table"]),
        players=players(rows, captions),
        table=results_table(summary["table"]), controls=controls_table(summary),
        diagram=diagram(round(0.3 * frames), round(0.85 * frames), frames),
        continuations=continuations(codec, samples, captions[0]),
        sweep_plots=sweep_plots(summary["sweep_rows"]),
        sweep_said=sweep_said(summary),
        accuracy=num(100 * labels["accuracy"], 1) + " %", pair_count=labels["pairs"],
        chosen=num(labels["chosen"]), rejected=num(labels["rejected"]), pairs=pair_rows(codec, pairs),
        training_plots=training_plots(metrics),
        training_said=training_said(metrics[-max(1, len(metrics) // 4) :]),
        stages=", ".join(stages),
        commit=html.escape(", ".join(dict.fromkeys(str(made["commit"]) for made in manifests.values()))),
        machine=f"{platform.system()} with {os.cpu_count()} cores, PyTorch {torch.__version__}",
    )  # fmt: skip


def check_figures(found, path: Path, *place: str) -> None:
    """UserError if something in a JSON value is no finite number: by its place, and not shown as markup."""
    if isinstance(found, dict | list):
        for key, value in found.items() if isinstance(found, dict) else enumerate(found):
            check_figures(value, path, *place, str(key))
    elif not isinstance(found, int | float) or not math.isfinite(found):
        raise UserError(f"{path}: expected a finite number for {' '.join(place)}, got {found!r:.80}; make it again")


def main(cfg: Config) -> None:
    # ---- check everything before anything is read
    cfg, demo = resolve(cfg), Path(cfg.demo)
    if not demo.is_dir():
        raise UserError(f"{demo}: expected the folder of a demo, but it does not exist; make one with: make demo")
    made = {name: maker for name, maker in STAGES.items() if name not in OPTIONAL or (demo / name).exists()}
    manifests = {name: read_manifest(demo / name, maker) for name, maker in made.items()}
    clips = Shards(demo / "shards", "prepare.py", manifests["eval"]["config"]["split"])
    codec = codecs.load(demo / "shards")
    balls.check_clips(clips, "x0", codec)

    # ---- the figures, and the first prompts
    summary = read_json(demo / "eval" / "summary.json")
    seconds = {name: manifest["seconds"] for name, manifest in manifests.items()}
    check_figures({key: found for key, found in summary.items() if key != "commit"}, demo / "eval" / "summary.json")
    check_figures(seconds, demo, "seconds of")
    summary["seconds"] = {**seconds, "total": round(sum(seconds.values()), 2)}
    samples = read_tensors(demo / "eval" / "samples.safetensors")
    count = min(PLAYERS, len(clips), len(samples["table_SFT"]))
    captions = [row["caption"] for row in clips.rows[:count]]
    latents = {name: samples[f"table_{name}"][:count] for name in ("SFT", OURS, "Pretrain")}
    latents["real clip"] = clips.get("x0", list(range(count)))
    rows = {name: watch(codec, x0, captions) for name, x0 in latents.items()}

    # ---- result: the page last, because make looks for it
    text = page(demo, manifests, summary, codec, samples, rows, captions)
    pictures(demo, {name: rows[name] for name in ("Pretrain", "SFT", OURS, "real clip")}, captions)
    write_json(demo / "summary.json", summary)
    write_text(demo / "report.html", text)
    print(verdict(summary), gap_closed(summary["table"]), sep="\n")
    print(f"report: {demo / 'report.html'}, {len(text) / 2**20:.1f} MiB")


if __name__ == "__main__":
    program(main, Config, __doc__)

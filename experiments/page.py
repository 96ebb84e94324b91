"""The demo's report: one HTML page of what came out, and its figures as one file.

    python -m experiments.page --demo out/demo

Videos, plots, style and script are all inside the page, so it opens from disk without a network. The sentences with a
mark are made from the figures and change with them. An address that ends in #t=0.5 opens the page with every video
halfway.

In    a demo folder whose stages are finished: clips, shards, base, sft, continuation, pairs, asymdpo, eval
Out   in the same folder: report.html; demo.png, a picture of the results; summary.json, eval's with the seconds of
      every stage
Cost  seconds
"""

import base64
import dataclasses
import html
import io
import json
import os
import platform
import string
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from runtime import video
from runtime.files import read_jsonl, read_manifest, read_tensors, whole_file, write_json, write_text
from runtime.options import UserError, program, resolve
from runtime.shards import Shards
from tiny import balls
from tiny import codec as codecs

STAGES = {  # folder -> the command that makes it, in the order they run
    "clips": "tiny.balls",
    "shards": "prepare.py",
    "base": "sft.py",
    "sft": "sft.py --base",
    "continuation": "continuation.py",
    "pairs": "make_pairs.py",
    "asymdpo": "asymdpo.py",
    "eval": "experiments.evaluate",
}
MODELS = ("Pretrain", "SFT", "DynamicsBoost")
METRICS = {  # column -> which way is better, decimals
    "score": ("↑", 2), "traj": ("↓", 2), "presence": ("↑", 3), "shape": ("↓", 4), "dyn": ("→ real", 2),
    "accel": ("→ real", 3),
}  # fmt: skip
BETTER = {"↑": lambda x, real: -x, "↓": lambda x, real: x, "→ real": lambda x, real: abs(x - real)}  # smallest is best
# 6 × 4 players, 5 continuations and 3 × 2 of pairs: phones allow 40 videos to be open
PLAYERS, CONTINUED, PAIRS = 6, (1, 3, 6, 9, 13), 3
R2, R3 = "#2780b4", "#d67a22"  # as in page.css
STYLE = {
    "svg.hashsalt": "report", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#d9d6cf", "grid.linewidth": 0.5, "legend.frameon": False, "legend.fontsize": 9,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """Writes report.html and summary.json of a finished demo."""

    demo: str = "out/demo"  # folder of the demo


# ---- words -----------------------------------------------------------------------------------------------------------


def num(x: float, digits: int = 2, sign: str = "") -> str:
    """A number for reading: fixed digits, a true minus; sign "+" shows a plus, too."""
    return f"{x:{sign}.{digits}f}".replace("-", "−")


def said(good: bool | None, sentence: str) -> str:
    """A sentence made from the figures: True is marked as good news, False as bad, None as neither."""
    name, mark = {True: ("good", "✓"), False: ("bad", "✗"), None: ("open", "·")}[good]
    return f"<p class={name}><b aria-hidden=true>{mark}</b> {sentence}</p>"


def result_said(table: dict, difference: dict) -> str:
    """What the table shows: is the score better, and do the balls still move as much?"""
    if difference["lo"] <= 0 <= difference["hi"]:
        first = said(None, "No difference can be claimed: the interval includes 0.")
    else:
        better = difference["lo"] > 0
        words = "higher" if better else "lower"
        first = said(better, f"DynamicsBoost scores {words} than SFT: the interval does not include 0.")
    change = 100 * (table["DynamicsBoost"]["dyn"] / max(table["SFT"]["dyn"], 1e-9) - 1)
    kept = "stays within" if abs(change) <= 10 else "differs by more than"
    return first + said(abs(change) <= 10, f"The amount of motion {kept} 10 % of SFT’s ({num(change, 1, '+')} %).")


def sweep_said(summary: dict) -> str:
    """Whether Φ continues, by the mean over 2 … F − 1 given frames; and from one given frame."""
    made, held = (summary["next_frame_error"][key] for key in ("next_frame", "hold"))
    one = summary["sweep_rows"][1]
    change = f"{num(100 * abs(1 - made / max(held, 1e-9)), 0)} % {'nearer' if made < held else 'further'}"
    words = f"The model’s balls are {num(made)} px from where they truly went, {change} than when holding"
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


def videos(codec, x0: torch.Tensor, labels: list[str], caption: str, given: bool = False) -> str:
    """A row of clips of one caption: x0 (B, C, F, H, W), a label each. given: each label begins with the number of
    given frames.
    """
    cells = []
    for pixels, label in zip(codec.decode(x0.float()), labels, strict=True):
        with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
            video.write_mp4(file.name, video.to_frames(pixels), balls.FPS, crf=16)
            coded = base64.b64encode(Path(file.name).read_bytes()).decode()
        score = balls.score_clip(((pixels + 1) / 2).permute(1, 2, 3, 0).numpy(), caption)["score"]
        more = f" data-given={label.split()[0]}" if given else ""
        player = f'<video muted playsinline preload=auto data-mp4="{coded}"></video>'
        caption_line = f"<figcaption>{label}<small>{num(score)}</small></figcaption>"
        cells.append(f"<figure class=cell{more}>{player}{caption_line}</figure>")
    words = f"<p class=caption>“{html.escape(caption)}”</p>"
    return f"<div class=cells>{''.join(cells)}</div>{words}"


# ---- the parts of the page -------------------------------------------------------------------------------------------


def results_table(table: dict) -> str:
    """A row of means for each model and for the real clips; the best of the models bold, and what reads as good."""
    head = "".join(f"<th scope=col>{metric} {arrow}</th>" for metric, (arrow, _) in METRICS.items())
    best = {}
    for metric, (arrow, digits) in METRICS.items():
        better = min(MODELS, key=lambda name: BETTER[arrow](table[name][metric], table["real clips"][metric]))
        best[metric] = num(table[better][metric], digits)
    body = []
    for name, row in table.items():
        cells = {metric: num(row[metric], digits) for metric, (_, digits) in METRICS.items()}
        bold = {metric for metric, value in cells.items() if name in MODELS and value == best[metric]}
        shown = (f"<td{' class=best' if metric in bold else ''}>{value}</td>" for metric, value in cells.items())
        body.append(f"<tr><th scope=row>{name}</th>{''.join(shown)}</tr>")
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def picture(path: Path, codec, samples: dict, captions: list[str], sweep: dict) -> None:
    """The results as a picture: film strips of two prompts by each model, and the sweep over given frames."""
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(3, 1.15))
    for k, axes in enumerate(left.subplots(2 * len(MODELS))):
        row, name = k // len(MODELS), MODELS[k % len(MODELS)]
        frames = video.to_frames(codec.decode(samples[f"table_{name}"][row : row + 1].float())[0])[::4]
        axes.imshow(np.concatenate([*frames], axis=1))
        axes.set(xticks=[], yticks=[])
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
        if k % len(MODELS) == 0:
            axes.set_title(f"“{captions[row]}”: the same noise; time runs to the right", loc="left")
    axes = right.subplots()
    for key, label, style in (("score", "whole clip", "o-"), ("generated", "generated frames only", "s--")):
        axes.plot([int(n) for n in sweep[key]], [*sweep[key].values()], style, label=label, markersize=3.5)
    axes.set(xlabel="given latent frames", ylabel="score (higher is better)", title="Continuations")
    axes.legend()
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def sweep_plots(rows: list[dict]) -> str:
    scores = ("score", "whole clip", "o-", R2), ("generated_score", "generated frames only", "s--", R3)
    errors = ("next_frame", "model", "o-", R2), ("hold", "holding", ":", R3)
    scores, errors = ([line(rows, *looks, x="n_cond") for looks in lines] for lines in (scores, errors))
    left = plot("Score (higher is better)", "given latent frames", "score", *scores)
    return left + plot("Error right after them (lower is better)", "given latent frames", "px from the truth", *errors)


def training_plots(rows: list[dict]) -> str:
    changes = [
        line(rows, f"diff/{side}/{region}", f"{name} {word}", style, colour)
        for region, name, colour in (("2", "②", R2), ("3", "③", R3))
        for side, word, style in (("w", "winner", "-"), ("l", "loser", "--"))
    ]
    accuracies, margins, losses = (line(rows, key) for key in ("rewards/accuracies", "rewards/margins", "loss"))
    return (
        plot("Change of error against the SFT model", "step", "policy − reference", *changes, level=0)
        + plot("Accuracy: share of pairs in the right order", "step", "accuracy (½: chance)", accuracies, level=0.5)
        + plot("Margin: how far the winner is preferred", "step", "margin", margins, level=0)
        + plot("Loss", "step", "loss", losses)
    )


def pair_rows(codec, pairs: Shards) -> str:
    """Some pairs, from the fewest given frames to the most."""
    order = sorted(range(len(pairs)), key=lambda i: (pairs.rows[i]["n2"], pairs.rows[i]["n1"], pairs.rows[i]["id"]))
    shown = []
    for k in np.linspace(0, len(order) - 1, min(PAIRS, len(order))).round().astype(int):
        row, both = pairs.rows[order[k]], torch.cat([pairs.get(side, [order[k]]) for side in ("chosen", "rejected")])
        shown.append(diagram(row["n1"], row["n2"], both.shape[2]))
        shown.append(videos(codec, both, ["winner", "loser"], row["caption"]))
    return "".join(shown)


def page(demo: Path, manifests: dict[str, dict], summary: dict, codec, samples: dict, clips: Shards) -> str:
    """The whole file: page.html with its parts filled in."""
    here, pairs = Path(__file__).parent, Shards(demo / "pairs", "make_pairs.py")
    metrics = {name: read_jsonl(demo / name / "metrics.jsonl") for name in ("base", "continuation", "asymdpo")}
    count, frames = min(PLAYERS, len(clips), len(samples["table_SFT"])), pairs.shape("chosen")[1]
    captions, real = [row["caption"] for row in clips.rows[:count]], clips.get("x0", list(range(count)))
    columns = torch.stack([*(samples[f"table_{name}"][:count].float() for name in MODELS), real.float()], dim=1)
    continued = {f"{n} given": samples[f"sweep_{n}"][:1] for n in CONTINUED if f"sweep_{n}" in samples}
    d = {name: num(value, 3, "+") for name, value in summary["asymdpo_minus_sft"].items()}
    labels, losses = summary["labels"], (("base", "Base model"), ("continuation", "Continuation model"))
    stages = [(f"<code>{STAGES.get(name, name)}</code>", seconds) for name, seconds in summary["seconds"].items()]
    return string.Template((here / "page.html").read_text(encoding="utf-8")).substitute(
        seed=summary["seed"], clips=summary["clips"], sweep_clips=summary["sweep_clips"],
        style=(here / "page.css").read_text(), script=(here / "page.js").read_text(),
        pictures=balls.FRAMES, fps=balls.FPS,
        diagram=diagram(round(0.3 * frames), round(0.85 * frames), frames),
        table=results_table(summary["table"]),
        difference=f"{d['mean']}, 95 % interval {d['lo']} … {d['hi']}",
        result_said=result_said(summary["table"], summary["asymdpo_minus_sft"]),
        players="".join(videos(codec, x0, [*MODELS, "a real clip"], c) for x0, c in zip(columns, captions)),
        continuations=videos(codec, torch.cat([*continued.values()]), [*continued], captions[0], given=True),
        sweep_plots=sweep_plots(summary["sweep_rows"]),
        sweep_said=sweep_said(summary),
        accuracy=num(100 * labels["accuracy"], 1) + " %", pair_count=labels["pairs"],
        chosen=num(labels["chosen"]), rejected=num(labels["rejected"]), pairs=pair_rows(codec, pairs),
        training_plots=training_plots(metrics["asymdpo"]),
        training_said=training_said(metrics["asymdpo"][-max(1, len(metrics["asymdpo"]) // 4) :]),
        loss_plots="".join(plot(f"{n}: loss", "step", "loss", line(metrics[s], "loss")) for s, n in losses),
        stages="".join(f"<tr><th scope=row>{name}</th><td>{seconds:.1f}</td></tr>" for name, seconds in stages),
        commit=", ".join(dict.fromkeys(made["commit"] for made in manifests.values())),
        machine=f"{platform.system()} with {os.cpu_count()} cores, PyTorch {torch.__version__}",
    )  # fmt: skip


def main(cfg: Config) -> None:
    # ---- check everything before anything is read
    cfg, demo = resolve(cfg), Path(cfg.demo)
    if not demo.is_dir():
        raise UserError(f"{demo}: expected the folder of a demo, but it does not exist; make one with: make demo")
    manifests = {name: read_manifest(demo / name, maker) for name, maker in STAGES.items()}

    # ---- the figures
    summary = json.loads((demo / "eval" / "summary.json").read_text())
    seconds = {name: manifest["seconds"] for name, manifest in manifests.items()}
    summary["seconds"] = {**seconds, "total": round(sum(seconds.values()), 2)}
    codec, samples = codecs.load(demo / "shards"), read_tensors(demo / "eval" / "samples.safetensors")
    clips = Shards(demo / "shards", "prepare.py", manifests["eval"]["config"]["split"])

    # ---- result: the page last, because make looks for it
    text = page(demo, manifests, summary, codec, samples, clips)
    with rc_context(STYLE):
        picture(demo / "demo.png", codec, samples, [row["caption"] for row in clips.rows], summary["sweep"])
    write_json(demo / "summary.json", summary)
    write_text(demo / "report.html", text)
    print(f"report: {demo / 'report.html'}, {len(text) / 2**20:.1f} MiB")


if __name__ == "__main__":
    program(main, Config, __doc__)

"""The demo's last stage: one self-contained HTML page that shows what came out, and the numbers as one file.

    python report.py --demo out/demo

Videos, plots, styles and scripts are all inside the page: it opens from disk, without a network. The sentences that
judge a result are made from the numbers, so they turn with them. An address that ends in #t=0.5 opens the page with
every video halfway; &pair=3 chooses a pair, &pairs (or another section's name) goes there.

    python report.py --tables out/tables      the page of `make tables`: report_tables.py

In    a demo folder whose stages are finished: clips, shards, base, sft, continuation, pairs, asymdpo, eval
Out   in the same folder: report.html; summary.json, eval's with the seconds of every stage; --figure, a picture
Cost  seconds
"""

import dataclasses
import html
import itertools
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from experiments import report_tables
from experiments.parts import BUCKETS, CONTROLS, INK, R2, R3, Clips, cell, heat, listed, num, plot, shell
from runtime import run as common
from runtime import shards as data
from tiny import balls as world
from wan import vae

PRESETS = {"tiny": {}}
STAGES = {  # folder -> the command that makes it, in the order they run
    "clips": "world.py",
    "shards": "prepare.py",
    "base": "sft.py",
    "sft": "sft.py --base",
    "continuation": "continuation.py",
    "pairs": "make_pairs.py",
    "asymdpo": "asymdpo.py",
    "eval": "evaluate.py",
}
MODELS = ("Pretrain", "SFT", "DynamicsBoost")
METRICS = {  # column -> which way is better, unit, decimals
    "score": ("↑", "", 2),
    "traj": ("↓", "px", 2),
    "presence": ("↑", "share", 3),
    "shape": ("↓", "0 … 1", 4),
    "dyn": ("→ real", "px/frame", 2),
    "accel": ("↓", "px/frame²", 3),
}
BETTER = {"↑": lambda x, real: -x, "↓": lambda x, real: x, "→ real": lambda x, real: abs(x - real)}  # smallest is best
TERMS = """<dl>
<dt>score</dt><dd>all of it in one number: −traj/4 − 2·(1 − presence) − 10·shape. Higher is better. Not even the real
clips reach 0: codec and ball finder are a little inexact.</dd>
<dt>traj</dt><dd>how far a ball’s path is from the nearest path that physics allows, root mean square over the
pictures. Lower is better.</dd>
<dt>presence</dt><dd>share of pictures in which each colour is as the prompt says: a ball there if it is named, none
if it is not. Higher is better, 1 is perfect.</dd>
<dt>shape</dt><dd>how unlike a perfect round ball the balls look, root mean square of the brightness difference (0 …
1). Lower is better.</dd>
<dt>dyn</dt><dd>how far a ball moves from one picture to the next. Closest to the real clips is best: a model could
score well by hardly moving anything, and this column would show it.</dd>
<dt>accel</dt><dd>how much the motion jerks from picture to picture (median second difference). Lower is steadier; the
real clips show what is left when nothing jerks.</dd></dl>"""
WEIGHTS = {"traj": -1 / 4, "presence": 2, "shape": -10}  # what world.score_clip's score is made of
SWEEP_SHOWN = (1, 3, 6, 9)  # given frames of the continuations shown
PAIRS_SHOWN = 8  # with the players' 32 and the sweep's 5 videos, two on the page at a time: phones allow 40 to be open


@dataclasses.dataclass(frozen=True)
class Config:
    """Writes report.html and summary.json of a finished demo; or the tables' report.html."""

    preset: str = "tiny"  # tiny: the only one that has a demo
    demo: str = "out/demo"  # folder of the demo
    tables: str = ""  # folder of bench/tables.py, e.g. out/tables: write its page instead, <tables>/report.html
    json: str = "docs/tables.json"  # the tables' figures, of bench/tables_page.py
    figure: str = ""  # also write the main results as a picture to this file (.png or .svg)


# ---- words and numbers -----------------------------------------------------------------------------------------------


def percent(share: float, sign: bool = False) -> str:
    return num(100 * share, 1 if sign else 0, sign) + " %"


def small(x: float) -> str:
    """A small difference for reading, with its sign, in thousandths."""
    return num(1000 * x, 2, sign=True)


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


def verdicts(summary: dict) -> Iterator[tuple[str, str]]:
    """What the table does and does not show: (mark, sentence); mark is good, bad or open."""
    table, difference = summary["table"], summary["asymdpo_minus_sft"]
    sft, dpo, real = (table[name] for name in ("SFT", "DynamicsBoost", "real clips"))
    if difference["lo"] > 0:
        yield "good", "DynamicsBoost scores higher than SFT: the interval of the difference does not include 0."
    elif difference["hi"] < 0:
        yield "bad", "DynamicsBoost scores lower than SFT: the interval of the difference does not include 0."
    else:
        yield "open", "No difference can be claimed: the interval of DynamicsBoost − SFT includes 0."
    gap = real["score"] - sft["score"]
    if difference["lo"] > 0 and gap > 0:
        yield "open", f"That is {percent(difference['mean'] / gap)} of the way from SFT to the real clips."
    parts = ", ".join(f"{m} {num(w * (dpo[m] - sft[m]), 3, sign=True)}" for m, w in WEIGHTS.items())
    yield "open", f"Where the difference in score comes from: {parts}."

    change = dpo["dyn"] / max(sft["dyn"], 1e-9) - 1
    nearer = abs(dpo["dyn"] - real["dyn"]) < abs(sft["dyn"] - real["dyn"])
    by = f"dyn {percent(change, sign=True)}"
    if abs(change) <= 0.1:
        yield (
            "good",
            f"The amount of motion stayed within 10 % of SFT’s ({by}): nothing was bought by moving less or more.",
        )
    elif nearer:
        yield "open", f"The amount of motion is more than 10 % off SFT’s ({by}), towards the real clips’ value."
    else:
        yield "bad", f"The amount of motion is more than 10 % off SFT’s ({by}), away from the real clips’ value."
    change = dpo["shape"] / max(sft["shape"], 1e-9) - 1
    if change > 0.25:
        yield "bad", f"The balls look worse than SFT’s: shape rose by {percent(change)}."
    else:
        words = "no worse than" if change <= 0 else "about as good as"
        yield "good", f"The balls look {words} SFT’s (shape {percent(change, sign=True)}; above +25 % would be worse)."


def sweep_verdicts(summary: dict) -> Iterator[tuple[str, str]]:
    """Does Φ continue? From the mean over 2 … F − 1 given frames."""
    error, beaten = summary["next_frame_error"], 0
    for made, held, where in (
        ("next_frame", "hold", "Over the four pictures that follow the given ones"),
        ("next_frame_last", "hold_last", "In the fourth of them, the hardest"),
    ):
        ratio, beats = error[made] / max(error[held], 1e-9), error[made] < error[held]
        words = f"{percent(1 - ratio)} nearer than" if beats else f"{num(ratio, 1)} times as far off as"
        yield (
            "good" if beats else "bad",
            f"{where}, the model’s balls are {num(error[made])} px from where they truly went, {words} holding the "
            f"last given picture ({num(error[held])} px).",
        )
        beaten += beats
    if beaten == 2:
        yield "good", "It beats holding on both counts: it has learned where things move."
    else:
        yield "bad", "It does not beat holding on both counts: it has not learned well enough where things move."
    made, whole = (list(summary["sweep"][key].values()) for key in ("generated", "score"))
    yield (
        "open",
        f"Score of the generated frames only: {num(made[1])} with one frame given, {num(made[-1])} with all but one.",
    )
    rises = sum(after > before for before, after in itertools.pairwise(whole))
    yield "open", f"The whole clip’s score rises in {rises} of {len(whole) - 1} steps from no given frame to all given."


def margin_verdict(rows: list[dict]) -> Iterator[tuple[str, str]]:
    """Which side of a pair the margin comes from, region by region: likelihood displacement or not."""
    for region, name in (("2", "②"), ("3", "③")):
        winner, loser = (average([row.get(f"diff/{side}/{region}") for row in rows]) for side in "wl")
        if winner is None or loser is None:
            yield "open", f"Region {name}: no pair of the last quarter has frames there."
            continue
        if loser <= winner:
            mark, words = "bad", "the winner did not gain on the loser, so nothing was learned here"
        elif winner < 0 < loser:
            mark, words = "good", "the margin comes from both sides: the winner is fitted better, the loser worse"
        elif winner < 0:
            mark, words = "good", "both are fitted better, the winner more"
        else:
            mark = "open"
            words = (
                "there is a margin only because the loser’s error rose more than the winner’s: likelihood displacement"
            )
        yield (
            mark,
            f"Region {name}: the winner’s error changed by {small(winner)}, the loser’s by {small(loser)}; {words}.",
        )


def average(values: list[float | None]) -> float | None:
    """Mean of what is there, None if nothing is."""
    there = [v for v in values if v is not None]
    return float(np.mean(there)) if there else None


# ---- curves ----------------------------------------------------------------------------------------------------------


def smooth(values: list[float | None]) -> np.ndarray:
    """Moving average over a twelfth of the values, over what is there."""
    x = np.array([np.nan if v is None else v for v in values], float)
    kernel = np.ones(max(1, len(x) // 12))
    there = np.convolve(~np.isnan(x), kernel, "same")
    total = np.convolve(np.nan_to_num(x), kernel, "same")
    return np.where(there > 0, total / np.maximum(there, 1), np.nan)


def curve(axes, rows: list[dict], key: str, colour=R2, style="-", label=None, raw: bool = True) -> None:
    """Draws a logged value, smoothed, and faintly as it was; at most 400 points."""
    steps, values = [r["step"] for r in rows], [r.get(key) for r in rows]
    thin = slice(None, None, max(1, len(rows) // 400))
    if raw:
        axes.plot(
            steps[thin], [np.nan if v is None else v for v in values][thin], color=colour, alpha=0.25, linewidth=0.8
        )
    axes.plot(steps[thin], smooth(values)[thin], style, color=colour, label=label)


# ---- pictures --------------------------------------------------------------------------------------------------------


def timeline(n1: int, n2: int, frames: int, playhead: bool = True) -> str:
    """SVG of a pair: a cell a latent frame, coloured by region; solid is real, hatched is generated."""
    left, side = 54, 28
    parts = []
    for y, name, given in ((24, "winner", n2), (52, "loser", n1)):
        parts.append(f"<text x=0 y={y + 16}>{name}</text>")
        for i in range(frames):
            region = 1 if i < n1 else 2 if i < n2 else 3
            box = f"x={left + side * i + 1} y={y} width={side - 2} height=24 rx=3"
            parts.append(f'<rect {box} fill="var(--r{region})"/>')
            if i >= given:
                parts.append(f'<rect {box} fill="url(#hatch)"/>')
    for mark, lo, hi in (("①", 0, n1), ("②", n1, n2), ("③", n2, frames)):
        if hi > lo:
            parts.append(f"<text class=mark x={left + side * (lo + hi) / 2} y=17>{mark}</text>")
    for n, words in ((n1, f"N1 = {n1}"), (n2, f"N2 = {n2}")):
        x = left + side * n
        parts.append(
            f'<path d="M{x} 22V84" class=cut />'
            f"<text class=tick x={min(x, left + side * frames - 22)} y=97>{words}</text>"
        )
    if playhead:
        parts.append(f"<line class=playhead data-left={left} data-side={side} x1={left} x2={left} y1=20 y2=82 />")
    box = f'viewBox="0 0 {left + side * frames + 2} 102"'
    return f'<svg class=timeline {box} role="img" aria-label="time line of the pair">{"".join(parts)}</svg>'


def figure(path: Path, codec, samples: dict, captions: list[str], summary: dict) -> None:
    """The main results as one picture: film strips of two prompts by each model, and the sweep over given frames."""
    picture = Figure(figsize=(11, 5.2), layout="constrained")
    left, right = picture.subfigures(1, 2, width_ratios=(3, 1.15))
    strips = left.subplots(2 * len(MODELS), 1)
    for k, axes in enumerate(strips):
        row, name = k // len(MODELS), MODELS[k % len(MODELS)]
        pixels = codec.decode(samples[f"table_{name}"][row : row + 1].float())[0, :, ::4]  # a picture a latent frame
        axes.imshow(np.concatenate([*((pixels + 1) / 2).permute(1, 2, 3, 0).numpy()], axis=1))
        axes.set(xticks=[], yticks=[])
        axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        if k % len(MODELS) == 0:
            axes.set_title(f"“{captions[row]}”: same noise; time runs to the right", fontsize=9, loc="left")
    axes = right.subplots()
    for key, style, words in (("score", "o-", "whole clip"), ("generated", "s--", "generated frames only")):
        given = summary["sweep"][key]
        axes.plot([int(n) for n in given], [*given.values()], style, markersize=3.5, label=words)
    axes.set(xlabel="given latent frames", ylabel="score (higher is better)")
    axes.set_title("Continuations, by given frames", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    with common.whole_file(path) as temporary:
        picture.savefig(temporary, format=path.suffix[1:], dpi=110)


# ---- sections --------------------------------------------------------------------------------------------------------

LEGEND = """<ul class=legend><li><i class=r1></i>① the same real frames in both: nothing to compare, no loss</li>
<li><i class=r2></i>② real in the winner, generated in the loser</li><li><i class=r3></i>③ generated in both</li>
<li><i class="plain"></i>solid: real</li><li><i class="plain hatched"></i>hatched: generated</li></ul>"""


def method_section(frames: int) -> str:
    n1, n2 = round(0.3 * frames), round(0.85 * frames)
    return f"""<section id=method><h2>What the method does</h2>
<p>A model that makes videos from text is trained on real clips (<b>Pretrain</b>) and tuned on some more of them
(<b>SFT</b>), and still lets things move in ways they cannot. <b>DynamicsBoost</b> teaches it better motion by
preference, without anybody labelling anything. For that a second model learns to <em>continue</em> real clips: given
many real frames it does well, given few it has to make up more and does worse. So two continuations of the same clip
come with their order known: the one that was given more frames is the
<em>winner</em>, the other the <em>loser</em>. Training then makes the text-to-video model favour the winner over the
loser, judged only on the frames where the two differ.</p>
{timeline(n1, n2, frames, playhead=False)}{LEGEND}
<p>Time runs from left to right. One cell is a <em>latent frame</em>, the unit the models work in: the first stands
for one picture, each of the others for four. The winner was given N2 real frames, the loser only N1; both differ from
pair to pair.</p>
<p class=note>Here all of this is done for real, but tiny: clips of 64 × 64 pixels in which coloured balls float or
fall and bounce off the walls under exact physics. So a computer can say exactly how well something moves, and no
other model has to judge it.</p></section>"""


def interval_svg(difference: dict[str, float]) -> str:
    """Mean and interval of the paired difference on a line with its zero."""
    ends = (min(0, difference["lo"]), max(0, difference["hi"]))
    pad = 0.15 * (ends[1] - ends[0]) or 1.0
    lo, hi = ends[0] - pad, ends[1] + pad
    at = {name: 10 + 300 * (x - lo) / (hi - lo) for name, x in (*difference.items(), ("zero", 0.0))}
    return f"""<svg class=interval viewBox="0 0 320 50" role="img" aria-label="the difference and its interval">
<path d="M10 20H310" class=axis /><path d="M{at["zero"]:.1f} 8V32" class=axis />
<text x={at["zero"]:.1f} y=46 class=tick>0: as SFT</text>
<path d="M{at["lo"]:.1f} 20H{at["hi"]:.1f}" class=whisker /><circle cx={at["mean"]:.1f} cy=20 r=5 class=dot /></svg>"""


def result_section(summary: dict) -> str:
    table, difference = summary["table"], summary["asymdpo_minus_sft"]

    def entry(name, metric):
        way, _, digits = METRICS[metric]
        best = min(MODELS, key=lambda m: BETTER[way](table[m][metric], table["real clips"][metric]))
        as_good = name in MODELS and num(table[name][metric], digits) == num(table[best][metric], digits)
        return f"<td{' class=best' if as_good else ''}>{num(table[name][metric], digits)}</td>"

    head = "".join(
        f"<th scope=col>{name} {arrow}<small>{unit}</small></th>" for name, (arrow, unit, _) in METRICS.items()
    )
    body = "".join(
        f"<tr{' class=real' if name == 'real clips' else ''}><th scope=row>{name}</th>"
        f"{''.join(entry(name, m) for m in METRICS)}</tr>"
        for name in (*MODELS, "real clips")
    )
    d = {k: num(v, 3, sign=True) for k, v in difference.items()}
    return f"""<section id=result><h2>The result</h2>
<p>Each model made {summary["clips"]} clips, for the same prompts and from the same noise; every number is a mean over
them. The arrow says which way is better, and the best of the three models is set in bold. The real clips show what is
possible.</p>
<div class=wide><table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>
<div class=difference><p><b>DynamicsBoost − SFT</b>, the difference in score clip by clip: <b>{d["mean"]}</b>, 95 %
interval {d["lo"]} … {d["hi"]},
{summary["clips"]} clips.</p>{interval_svg(difference)}</div>
{listed(verdicts(summary))}
<details open><summary>What the columns mean</summary>{TERMS}
<p>px are pixels of the 64-pixel picture; a frame is one of 16 pictures a second. The interval is a bootstrap over the
clips: it says how far the mean would move with other prompts, not with another training run.</p></details></section>"""


def players_section(clips: Clips, samples: dict, rows: list[dict], real: torch.Tensor) -> str:
    captions = [row["caption"] for row in rows]
    columns = [(name, clips.show(samples[f"table_{name}"][: len(rows)], captions)) for name in MODELS]
    columns.append(("a real clip", clips.show(real, captions)))
    body = "".join(
        f"<div class=row><div class=cells>{''.join(cell(name, shown[i]) for name, shown in columns)}</div>"
        f"<p class=caption>“{html.escape(caption)}”</p></div>"
        for i, caption in enumerate(captions)
    )
    return f"""<section id=players><h2>Look for yourself</h2>
<p>The three models side by side: in each row the same prompt and the same noise. Look for balls that stop, turn in
mid-air, change colour, melt or vanish; a good clip shows just the balls of the prompt, round, moving straight or
falling, and bouncing off the walls. The real clip is where the prompt was taken from, not what the models should have
copied: a prompt does not say where a ball starts. The number under a video is its score; higher is
better.</p>{CONTROLS}{body}</section>"""


def sweep_section(summary: dict, clips: Clips, samples: dict, caption: str) -> str:
    rows, frames = summary["sweep_rows"], len(summary["sweep_rows"]) - 1
    some = [row for row in rows if "next_frame" in row]
    n = [row["n_cond"] for row in some]

    def scores(axes):
        axes.plot(
            [r["n_cond"] for r in rows], [r["score"] for r in rows], "o-", color=R2, markersize=3.5, label="whole clip"
        )
        made = [r for r in rows if "generated_score" in r]
        axes.plot(
            [r["n_cond"] for r in made],
            [r["generated_score"] for r in made],
            "s--",
            color=R3,
            markersize=3.5,
            label="generated frames only",
        )

    def errors(axes):
        for made, held, colour, words in (
            ("next_frame", "hold", R2, "all four"),
            ("next_frame_last", "hold_last", R3, "the fourth"),
        ):
            axes.plot(n, [r[made] for r in some], "o-", color=colour, markersize=3.5, label=f"model, {words}")
            axes.plot(n, [r[held] for r in some], ":", color=colour, label=f"holding, {words}")
        axes.set_ylim(bottom=0)

    shown = [k for k in (*SWEEP_SHOWN, frames) if f"sweep_{k}" in samples and k <= frames]
    one = [clips.show(samples[f"sweep_{k}"][:1], [caption])[0] for k in shown]
    cells = "".join(
        cell(f"{k} given" if k < frames else "the real clip", clip, f" data-given={k}")
        for k, clip in zip(shown, one, strict=True)
    )
    return f"""<section id=sweep><h2>Does the continuation model continue?</h2>
<p>The pairs are only worth something if the second model really continues a clip, and does it better the more of it
is given. Here it was given 0, 1, … {frames} latent frames of the same {summary["sweep_clips"]} clips and made up the
rest.</p>{CONTROLS}
<div class=row><div class="cells five">{cells}</div><p class=caption>“{html.escape(caption)}”</p></div>
<p>One clip, continued from more and more given frames. The border is <b class=c1>grey</b> while a video is given and
<b class=c3>orange</b> once the model makes it up; the number is the score.</p>
<div class=plots>{plot("Score by given frames (higher is better)", scores, "given latent frames", "score")}
{plot("Error right after them (lower is better)", errors, "given latent frames", "px from the true place")}</div>
<p><b>First plot:</b> the whole clip’s score must rise, if only because more of the clip is real. The dashed line
judges just what the model made: where it rises, more given frames help. Towards the right it judges fewer and fewer
pictures, in which less can go wrong.</p>
<p><b>Second plot:</b> the balls’ distance from where they truly went, in the first latent frame that the model makes:
over its four pictures, and in the fourth, furthest from what was given. <em>Holding</em> means that the last given
picture just stays; a model that does no better has not learned motion. A ball that is missing counts as
{num(world.MISSING, 0)} px. The sentences take the mean over 2 … {frames - 1} given frames: one frame alone does not
show where a ball is going.</p>{listed(sweep_verdicts(summary))}</section>"""


def pairs_section(summary: dict, clips: Clips, pairs: data.Shards) -> str:
    frames = pairs.shape("chosen")[1]
    order = sorted(range(len(pairs)), key=lambda i: (pairs.rows[i]["n2"], pairs.rows[i]["n1"], pairs.rows[i]["id"]))
    index = [order[k] for k in np.linspace(0, len(order) - 1, min(PAIRS_SHOWN, len(order))).round().astype(int)]
    rows = [pairs.rows[i] for i in index]
    captions = [row["caption"] for row in rows]
    sides = [clips.show(pairs.get(side, index), captions) for side in ("chosen", "rejected")]
    shown = []
    for row, winner, loser in zip(rows, *sides, strict=True):
        whole = " The winner is the real clip, whole: there is no ③." if row["n2"] == frames else ""
        shown.append({
            "winner": winner[0], "loser": loser[0], "scores": [f"score {num(s)}" for s in (winner[1], loser[1])],
            "timeline": timeline(row["n1"], row["n2"], frames), "caption": f"“{row['caption']}”",
            "note": f"The loser was given {row['n1']} of {frames} frames, the winner {row['n2']}.{whole}",
        })  # fmt: skip
    in_script = json.dumps(shown, ensure_ascii=False).replace("<", "\\u003c")  # a caption must not end the script
    buttons = "".join(f"<button type=button data-pair={i}>{i + 1}</button>" for i in range(len(shown)))
    labels = summary["labels"]
    cells = "".join(
        f"<figure class=cell><video muted playsinline preload=auto class={side}></video>"
        f"<figcaption>{side}<small></small></figcaption></figure>"
        for side in ("winner", "loser")
    )
    return f"""<section id=pairs><h2>The pairs it learns from</h2>
<p>Winner and loser are the same in ①, part at N1, and from there the winner should look better. Nobody labelled them;
the exact score, which training never sees, says afterwards how often the order is right: it prefers the winner in
<b>{num(100 * labels["accuracy"], 1)} %</b> of {labels["pairs"]} pairs (mean score {num(labels["chosen"])} against
{num(labels["rejected"])}; 50 % would be chance).</p>
<div class=choose role=group aria-label="choose a pair"><span>Pair</span>{buttons}</div>{CONTROLS}
<div class=row id=pair-box><div class="cells two">{cells}</div><div class=line></div><p class=caption></p>
<p class=whole></p></div>{LEGEND}<script type="application/json" id=pair-data>{in_script}</script></section>"""


def dpo_section(rows: list[dict]) -> str:
    last = rows[-max(1, len(rows) // 4) :]

    def differences(axes):
        axes.axhline(0, color=INK, linewidth=0.6)
        for region, name, colour in (("2", "②", R2), ("3", "③", R3)):
            for side, word, style in (("w", "winner", "-"), ("l", "loser", "--")):
                curve(axes, rows, f"diff/{side}/{region}", colour, style, f"{name} {word}", raw=False)

    def accuracy(axes):
        axes.axhline(0.5, color=INK, linewidth=0.6)
        curve(axes, rows, "rewards/accuracies")

    plots = [
        plot("Change of error against the SFT model", differences, "step", "policy − reference"),
        plot("Loss", lambda axes: curve(axes, rows, "loss"), "step", "loss"),
        plot("Accuracy: share of pairs in the right order", accuracy, "step", "accuracy (½: chance)"),
        plot(
            "Margin: how far winner is preferred to loser",
            lambda axes: curve(axes, rows, "rewards/margins"),
            "step",
            "margin",
        ),
    ]
    return f"""<section id=dpo><h2>What preference training did</h2>
<p>How well a model fits a clip is its error in predicting it from noise. The first plot shows how that error changed
against the SFT model, where training began: below 0 a clip is fitted better than before, above 0 worse. Learning
means that the solid line (winner) lies <em>below</em> the dashed line (loser) of its colour; best if the solid one is
below 0, too. If both rise and the loser’s just rises more, the margin grows although the model moves away from the
winner: that is called likelihood displacement. Strong lines are moving averages, faint ones the steps themselves.</p>
<div class=plots>{"".join(plots)}</div>
<p>Mean over the last quarter of training, {len(last)} steps, in thousandths of the error’s
unit:</p>{listed(margin_verdict(last))}</section>"""


def time_section(rows: list[dict]) -> str:
    last = rows[-max(1, len(rows) // 4) :]
    values = {}
    for b in range(len(BUCKETS)):
        for region in "23":
            sides = [[r.get(f"diff/{side}/{region}/t{b}") for r in last] for side in "wl"]
            both = [a - b for a, b in zip(*sides, strict=True) if None not in (a, b)]
            values[b, region] = both
    biggest = max(abs(average(v)) for v in values.values() if v) if any(values.values()) else 1

    def entry(b, region):
        value, steps = average(values[b, region]), len(values[b, region])
        if value is None:
            return "<td class=heat>–<small>no step</small></td>"
        error = f"± {num(1000 * np.std(values[b, region], ddof=1) / steps**0.5)}, " if steps > 1 else ""
        counted = f"{error}{steps} {'step' if steps == 1 else 'steps'}"
        return heat(small(value), counted, abs(value) / (biggest or 1), good=value < 0)

    body = "".join(
        f"<tr><th scope=row>{name}</th>{entry(b, '2')}{entry(b, '3')}</tr>" for b, name in enumerate(BUCKETS)
    )
    return f"""<section id=time><h2>Where in the noise it learns</h2>
<p>A model makes a clip out of noise step by step, and the time t says where it is: 1 is pure noise, 0 the finished
clip. The table takes the gap between the solid and the dashed line of the first plot above (winner − loser) apart by
t and by region: mean over the last quarter of training, in thousandths, ± its standard error over the steps.
<b class=good>Negative is good</b> (the winner gained on the loser), <b class=bad>positive is bad</b>. Roughly, motion
is decided at high t, the look of things at low t; if only ② had colour, the model might just be telling real from
generated.</p>
<div class=wide><table class=heatmap><thead><tr><th scope=col>t</th><th scope=col><i class=r2></i>② real against
generated</th>
<th scope=col><i class=r3></i>③ both generated</th></tr></thead><tbody>{body}</tbody></table></div></section>"""


def run_section(cfg, demo: Path, summary: dict, manifests: dict[str, dict]) -> str:
    def loss(stage):
        rows = common.read_jsonl(demo / stage / "metrics.jsonl")
        return lambda axes: curve(axes, rows, "loss")

    plots = [
        plot("Base model (Pretrain): loss", loss("base"), "step", "loss"),
        plot("Continuation model: loss", loss("continuation"), "step", "loss"),
    ]
    seconds = summary["seconds"]
    body = "".join(
        f"<tr><th scope=row>{stage}</th><td><code>{STAGES[stage]}</code></td><td>{duration(seconds[stage])}</td>"
        f"<td>{manifest['config'].get('steps', '')}</td></tr>"
        for stage, manifest in manifests.items()
    )
    commits: dict[str, list[str]] = {}
    for stage, manifest in manifests.items():
        commits.setdefault(manifest["commit"], []).append(stage)
    made_by = (
        ", ".join(f"{c} ({' '.join(which)})" for c, which in commits.items()) if len(commits) > 1 else summary["commit"]
    )
    facts = {
        "Seed": str(summary["seed"]), "Commit": made_by, "This page’s command": f"python report.py --demo {cfg.demo}",
        "The whole demo": f"make demo SEED={summary['seed']}",
        "Written on": f"{platform.platform()}, {os.cpu_count()} cores",
        "With": f"Python {platform.python_version()}, PyTorch {torch.__version__}",
    }  # fmt: skip
    listing = "".join(f"<dt>{k}</dt><dd><code>{html.escape(v)}</code></dd>" for k, v in facts.items())
    return f"""<section id=run><h2>The run</h2>
<p>The losses of the two models that the rest builds on. They should fall and level off; they cannot reach 0, because
noise cannot be predicted.</p><div class=plots>{"".join(plots)}</div>
<div class=wide><table class=stages><thead><tr><th scope=col>stage</th><th scope=col>made
by</th><th scope=col>time</th>
<th scope=col>steps</th></tr></thead><tbody>{body}
<tr class=real><th scope=row>total</th><td></td><td>{duration(seconds["total"])}</td><td></td></tr>
</tbody></table></div><dl class=facts>{listing}</dl>
<p>Add <code>#t=0.5</code> to this page’s address to open it at a moment (0 is the start, 1 the end of the clips),
<code>&amp;pair=3</code> to choose a pair, <code>&amp;pairs</code> or another section’s name to go there:
<a href="#pairs&amp;t=0.5&amp;pair=3">an example</a>.</p></section>"""


# ---- the page --------------------------------------------------------------------------------------------------------

HATCH = """<svg width=0 height=0 style="position:absolute" aria-hidden=true><defs>
<pattern id=hatch width=6 height=6 patternUnits=userSpaceOnUse patternTransform="rotate(45)">
<rect width=3.2 height=6 fill="var(--bg)" opacity=".8"/></pattern></defs></svg>"""

NAMES = {  # section -> its name in the list at the top
    "method": "Method",
    "result": "Result",
    "players": "Videos",
    "sweep": "Continuation",
    "pairs": "Pairs",
    "dpo": "Training",
    "time": "Noise levels",
    "run": "The run",
}


def page(sections: list[str], seed: int) -> str:
    lead = (
        f"What came out of the demo with seed {seed}: a text-to-video model that learns better motion from\n"
        "continuations of real clips."
    )
    title = f"DynamicsBoost: the demo’s report, seed {seed}"
    return shell(title, "DynamicsBoost on bouncing balls", lead, NAMES, "".join(sections), hidden=HATCH)


def main(cfg: Config) -> None:
    cfg = common.resolve(cfg, PRESETS)
    if cfg.tables:
        if cfg.figure:
            raise common.UserError(f"--figure: expected none with --tables, got {cfg.figure!r}: it is of the demo")
        return report_tables.write(Path(cfg.tables), Path(cfg.json))

    # ---- what there is, checked before anything is read
    demo = Path(cfg.demo)
    if not demo.is_dir():
        raise common.UserError(
            f"{demo}: expected the folder of a demo, but it does not exist; make one with: make demo"
        )
    manifests = {stage: common.read_manifest(demo / stage, maker, verify=False) for stage, maker in STAGES.items()}

    # ---- the numbers
    summary = json.loads((demo / "eval" / "summary.json").read_text())
    seconds = {stage: manifest["seconds"] for stage, manifest in manifests.items()}
    summary["seconds"] = {**seconds, "total": round(sum(seconds.values()), 2)}

    # ---- the page
    split = manifests["eval"]["config"]["split"]
    evaluated = data.Shards(demo / "shards", "prepare.py", split, verify=False)
    pairs = data.Shards(demo / "pairs", "make_pairs.py", verify=False)
    samples = common.read_tensors(demo / "eval" / "samples.safetensors")
    clips = Clips(vae.load(demo / "shards"))
    count = min(len(evaluated), len(samples["table_SFT"]))
    real, rows = evaluated.get("x0", list(range(count))).float(), evaluated.rows[:count]
    steps = common.read_jsonl(demo / "asymdpo" / "metrics.jsonl")
    sections = [
        method_section(real.shape[2]),
        result_section(summary),
        players_section(clips, samples, rows, real),
        sweep_section(summary, clips, samples, rows[0]["caption"]),
        pairs_section(summary, clips, pairs),
        dpo_section(steps),
        time_section(steps),
        run_section(cfg, demo, summary, manifests),
    ]

    # ---- result: the page last, which make takes for both
    if cfg.figure:
        figure(Path(cfg.figure), clips.codec, samples, [row["caption"] for row in rows], summary)
    common.write_json(demo / "summary.json", summary)
    common.write_text(demo / "report.html", page(sections, summary["seed"]))
    print(f"report: {demo / 'report.html'}, {(demo / 'report.html').stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    common.run(main, Config, __doc__)

"""The tables' page, made by `report.py --tables`: forest plots, the sweep, maps of accuracy, and players.

It shows the figures of bench/tables_page.py's json and computes none; the samples, the real clips and the codec are
those of the tables' first seed.
"""

import html
import json
import math
import re
from pathlib import Path

from experiments.parts import BUCKETS, CONTROLS, INK, R2, R3, Clips, heat, listed, num, plot, shell
from runtime import run as common
from runtime import shards as data
from wan import vae

HERE = Path(__file__).parent
REFERENCES = {"sft": "SFT", "dynamicsboost": "DynamicsBoost"}
COLUMNS = {  # metric -> heading, unit, decimals: those of docs/tables.md
    "traj": ("traj\u00a0↓", "px", 2),
    "presence": ("presence\u00a0↑", "share", 4),
    "shape": ("shape\u00a0↓", "0 … 1", 4),
    "dyn": ("dyn\u00a0→\u00a0real", "px/frame", 3),
    "accel": ("accel\u00a0↓", "px/frame²", 3),
}
NEEDED = "seeds clips commit machine python processor_minutes groups rows real hours sweep_steps".split()
SHOWN = 8  # prompts of the players
LEGEND = """<ul class=legend><li><i class="mark full"></i>mean; its interval does not hold 0</li>
<li><i class=mark></i>mean; not resolved</li><li><i class=bar></i>95 % interval, ‹ › where it goes on</li>
<li><i class=seed></i>one seed</li></ul>"""


def read(path: Path) -> dict:
    """The figures of bench/tables_page.py. UserError for a file that is not there or holds something else."""
    if not path.is_file():
        raise common.UserError(f"{path}: expected the figures of bench/tables_page.py, got no file; run make tables")
    try:
        found = json.loads(common.read_text(path))
    except json.JSONDecodeError:
        found = None
    found = found if isinstance(found, dict) else {}
    lacking = [key for key in NEEDED if found.get(key) in (None, [], {})]
    needed, rows = {"title", "mean", *(f"vs_{name}" for name in REFERENCES)}, found.get("rows")
    if not isinstance(rows, dict) or not all(isinstance(row, dict) and needed <= set(row) for row in rows.values()):
        lacking = ["rows"]
    if lacking:
        raise common.UserError(
            f"{path}: expected the figures of bench/tables_page.py, it has no {', '.join(lacking)}; "
            "make them with: make tables"
        )
    return found


# ---- words and numbers -----------------------------------------------------------------------------------------------


def resolved(value: dict | None) -> bool:
    """Whether the interval leaves 0 out. One seed has no interval, and resolves nothing."""
    return value is not None and abs(value["mean"]) > value["half"]


def signed(value: dict, digits: int = 3) -> str:
    """+0.050 ± 0.010; bold if resolved."""
    text = num(value["mean"], digits, sign=True)
    if not math.isnan(value["half"]):
        text += f" ± {num(value['half'], digits)}"
    return f"<b>{text}</b>" if resolved(value) else text


def marked(title: str) -> str:
    """A title's Markdown as HTML: bold, and code."""
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(title))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)


def bare(title: str) -> str:
    return re.sub(r"[*`]", "", title)


def counted(values: list[dict], other: str) -> str:
    """How many differences from the reference are resolved, as a sentence."""
    higher = sum(resolved(v) and v["mean"] > 0 for v in values)
    lower = sum(resolved(v) and v["mean"] < 0 for v in values)
    unresolved = len(values) - higher - lower
    return f"Against {REFERENCES[other]}: {higher} higher, {lower} lower, {unresolved} not resolved."


# ---- forest plots ----------------------------------------------------------------------------------------------------


def span(values: list[dict]) -> tuple[float, float]:
    """The axis: all seeds and 0, and of intervals that are far wider only a part."""
    points = [0.0, *(x for v in values for x in (v["mean"], *v["seeds"]))]
    lo, hi = min(points), max(points)
    room = (hi - lo) / 3 or 0.01
    ends = [e for v in values for e in (v["mean"] - v["half"], v["mean"] + v["half"]) if math.isfinite(e)]
    lo, hi = max(min([lo, *ends]), lo - room), min(max([hi, *ends]), hi + room)
    pad = 0.04 * (hi - lo) or 0.01
    return lo - pad, hi + pad


def ticks(lo: float, hi: float) -> list[float]:
    """One to four round numbers between lo and hi, 0 among them."""
    for step in (s * 10.0**k for k in range(-6, 9) for s in (1, 2, 5)):
        places = range(math.ceil(lo / step), math.floor(hi / step) + 1)
        if len(places) <= 4:
            return [n * step for n in places]
    raise ValueError(f"no axis from {lo} to {hi}")


def strip(value: dict, lo: float, hi: float) -> str:
    """SVG of one difference: interval and mean above, the seeds below. Its places are in percent, so any width does."""

    def at(x):
        return f"{100 * (min(max(x, lo), hi) - lo) / (hi - lo):.2f}%"

    mean, half = value["mean"], value["half"]
    sign = ("good" if mean > 0 else "bad") if resolved(value) else "open"
    parts = [f'<line class=zero x1="{at(0)}" x2="{at(0)}" y1=-10 y2=44 />']
    if not math.isnan(half):
        parts.append(f'<line class=bar x1="{at(mean - half)}" x2="{at(mean + half)}" y1=12 y2=12 />')
        parts += ['<text class=more x="-9" y=17>‹</text>'] if mean - half < lo else []
        parts += ['<text class=more x="100%" dx=3 y=17>›</text>'] if mean + half > hi else []
    parts.append(f'<circle class=mean cx="{at(mean)}" cy=12 r=5 />')
    parts += [f'<circle class=seed cx="{at(x)}" cy=26 r=2.2 />' for x in value["seeds"]]
    words = re.sub("<.*?>", "", signed(value))
    return f'<svg class="strip {sign}" role=img aria-label="{words}"><title>{words}</title>{"".join(parts)}</svg>'


def axis(lo: float, hi: float) -> str:
    marks = ticks(lo, hi)
    digits = max(0, -math.floor(math.log10(marks[1] - marks[0]))) if len(marks) > 1 else 2
    texts = "".join(
        f'<text class=tick x="{100 * (x - lo) / (hi - lo):.2f}%" y=14>{num(x, digits, sign=True) if x else 0}</text>'
        for x in marks
    )
    return f"<svg class=ticks aria-hidden=true>{texts}</svg>"


def forest(rows: dict, names: list[str]) -> str:
    """A row a system; a column for each reference, on an axis of its own. Below, how many are resolved."""
    values = {o: [rows[n][f"vs_{o}"]["score"] for n in names if n != o] for o in REFERENCES}
    spans = {o: span(some) for o, some in values.items()}
    lines = ["<div class=heads><span></span>" + "".join(f"<span>against {w}</span>" for w in REFERENCES.values())]
    for name in names:
        strips = "".join(
            "<span class=same>—</span>" if name == o else strip(rows[name][f"vs_{o}"]["score"], *spans[o])
            for o in REFERENCES
        )
        lines.append(f"<div><span class=name>{marked(rows[name]['title'])}</span>{strips}")
    axes = "".join(axis(*spans[o]) if values[o] else "<svg class=ticks></svg>" for o in REFERENCES)
    said = " ".join(counted(some, o) for o, some in values.items() if some)
    return f"<div class=forest>{'</div>'.join(lines)}</div><div><span></span>{axes}</div></div>{LEGEND}<p>{said}</p>"


def numbers(found: dict, names: list[str]) -> str:
    """The table of docs/tables.md, the real clips last."""
    heads = [("score\u00a0↑", ""), *((f"against {words}", "score") for words in REFERENCES.values())]
    heads += [(words, unit) for words, unit, _ in COLUMNS.values()]
    heads += [("label accuracy", ""), ("GPU\u2011h", "Wan-1.3B, predicted")]
    head = "".join(f"<th scope=col>{words}<small>{unit}</small></th>" for words, unit in heads)

    def line(title, mean, against, last, kind=""):
        cells = [num(mean["score"], 3), *against, *(num(mean[m], digits) for m, (_, _, digits) in COLUMNS.items())]
        tds = "".join(f"<td>{c}</td>" for c in (*cells, *last))
        return f"<tr{kind}><th scope=row>{title}</th>{tds}</tr>"

    body = ""
    for name in names:
        row = found["rows"][name]
        against = ["" if name == o else signed(row[f"vs_{o}"]["score"]) for o in REFERENCES]
        accuracy = row.get("facts", {}).get("accuracy")
        hours = found["hours"].get(name)
        last = ["" if accuracy is None else num(accuracy, 3), "" if hours is None else num(hours, 0)]
        body += line(marked(row["title"]), row["mean"], against, last)
    body += line("real clips", found["real"], ["", ""], ["", ""], " class=real")
    return (
        f"<div class=wide><table class=numbers><thead><tr><td></td>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def group_section(found: dict, place: int, heading: str, names: list[str]) -> str:
    return f"""<section id=group-{place}><h2>{html.escape(heading)}</h2>
<p>Difference of score, prompt by prompt; to the right is better.</p>{forest(found["rows"], names)}
{numbers(found, names)}</section>"""


# ---- the other sections ----------------------------------------------------------------------------------------------


def sweep_section(found: dict) -> str:
    steps, keys = found["sweep_steps"], {"score": (R2, "whole clip"), "generated_score": (R3, "generated frames only")}

    def draw(axes):
        for key, (colour, words) in keys.items():
            there = [(n, v) for n, v in enumerate(steps[key]) if v]
            n, mean, half = [k for k, _ in there], [v["mean"] for _, v in there], [v["half"] for _, v in there]
            ends = [[m + side * h for m, h in zip(mean, half)] for side in (-1, 1)]
            axes.fill_between(n, *ends, color=colour, alpha=0.18, linewidth=0)
            axes.plot(n, mean, "o", color=colour, markersize=3.5, label=words)
            for k, step in enumerate(steps[f"{key}_steps"]):
                if step:
                    axes.plot(n[k : k + 2], mean[k : k + 2], "-" if resolved(step) else ":", color=colour)
        axes.plot([], [], ":", color=INK, label="step not resolved")
        seeds = [x for key in keys for v in steps[key] if v for x in v["seeds"]]
        edge = 0.1 * (max(seeds) - min(seeds)) or 0.1
        axes.set_ylim(min(seeds) - edge, max(seeds) + edge)  # few seeds have bands far wider than all there is

    def entry(value, digits=2):
        return f"{num(value['mean'], digits)} ± {num(value['half'], digits)}" if value else ""

    def step(values, n):
        value = values[n] if n < len(values) else None
        return (signed(value) + ("" if resolved(value) else " <small>not resolved</small>")) if value else ""

    body = "".join(
        f"<tr><th scope=row>{n}</th>"
        + "".join(f"<td>{entry(steps[k][n])}</td><td>{step(steps[f'{k}_steps'], n)}</td>" for k in keys)
        + "</tr>"
        for n in range(len(steps["score"]))
    )
    mark = "bad" if steps["falls"] else "open" if steps["flat"] else "good"
    said = [(mark, f"On this world: {steps['verdict']}.")]
    for words, which in (("falls from", steps["falls"]), ("Not resolved: the steps from", steps["flat"])):
        said += [("open", f"{words[0].upper()}{words[1:]} {', '.join(map(str, which))} given frames.")] if which else []
    first = steps["score_steps"][0]
    direction = ("higher" if first["mean"] > 0 else "lower") if resolved(first) else "neither higher nor lower"
    said.append(("open", f"With one frame given the score is {direction} than with none "
                 f"({re.sub('<.*?>', '', signed(first))}); the claim leaves that step out."))  # fmt: skip
    return f"""<section id=sweep><h2>Quality by the number of given frames</h2>
<div class=plots>{plot("Score by given frames (higher is better)", draw, "given latent frames", "score")}
<div><p><b>The paper’s claim:</b> quality rises with the number of given frames, except from none: with no frame given
the continuation model is a pure text-to-video model.</p>{listed(said)}</div></div>
<p>The continuation model was given 0, 1, … {len(steps["score"]) - 1} latent frames of real clips and made up the rest.
The band is the interval of the mean over the seeds; a step is paired within a seed, so it can be resolved where bands
overlap. The whole clip’s score rises in part because more of it is real; the orange line judges only what the model
made.</p>
<div class=wide><table class=numbers><thead><tr><th scope=col>given</th><th scope=col>whole clip</th>
<th scope=col>to the next</th><th scope=col>generated frames only</th><th scope=col>to the next</th></tr></thead>
<tbody>{body}</tbody></table></div></section>"""


def map_section(found: dict, names: list[str]) -> str:
    def entry(value):
        if value is None:
            return "<td class=heat>–</td>"
        return heat(num(value, 3), "", abs(value - 0.5) / 0.5, good=value > 0.5)

    body = ""
    for name in names:
        row = found["rows"][name]
        logged = [row.get("training", {}).get(f"acc/{r}/t{b}") for r in "23" for b in range(len(BUCKETS))]
        if any(value is not None for value in logged):
            cells = "".join(map(entry, logged))
            body += f"<tr><th scope=row>{marked(row['title'])}</th>{cells}</tr>"
    head = "".join(f"<th scope=col>{b}</th>" for b in BUCKETS)
    return f"""<section id=map><h2>Where in noise and clip the winner gains</h2>
<p>Share of the pairs whose winner gained on the loser against the reference, by the time t (1 is pure noise) and by
region, over the second half of training and all seeds: ½ is chance. <b class=good>Green is above it</b>,
<b class=bad>red below</b>, the further the stronger; these are means without an interval. Accuracy in ② alone would
mean that a model tells real from generated. A dash: the method has no such frames, or does not look at them.</p>
<div class=wide><table class="heatmap map"><thead><tr><td></td>
<th scope=colgroup colspan={len(BUCKETS)}><i class=r2></i>② real against generated</th>
<th scope=colgroup colspan={len(BUCKETS)}><i class=r3></i>③ both generated</th></tr>
<tr><th scope=col>t</th>{head}{head}</tr></thead><tbody>{body}</tbody></table></div></section>"""


def players_section(found: dict, groups: dict[str, list[str]], folder: Path) -> str:
    """Each method's samples of the same prompts and noise; one prompt of one group is on the page at a time, so that
    few videos are open: phones allow 40.
    """
    names = list(dict.fromkeys(name for some in groups.values() for name in some))
    samples = {n: common.read_tensors(folder / "eval" / n / "samples.safetensors")["x0"] for n in names}
    real = data.Shards(folder / "shards", "prepare.py", "eval", verify=False)
    count = min(SHOWN, len(real), *map(len, samples.values()))
    captions, clips = [real.rows[i]["caption"] for i in range(count)], Clips(vae.load(folder / "shards"))
    samples = {"": real.get("x0", list(range(count))), **samples}
    shown = {
        "captions": [f"“{caption}”" for caption in captions],
        "groups": [["", *some] for some in groups.values()],
        "titles": {"": "a real clip", **{n: bare(found["rows"][n]["title"]) for n in names}},
        "clips": {n: [(u, num(s)) for u, s in clips.show(x0[:count], captions)] for n, x0 in samples.items()},
    }
    in_script = json.dumps(shown, ensure_ascii=False).replace("<", "\\u003c")  # a caption must not end the script
    slots = "".join(
        "<figure class=cell><video muted playsinline preload=auto></video><figcaption></figcaption></figure>"
        for _ in range(max(map(len, shown["groups"])))
    )

    def buttons(kind, words):
        return "".join(f"<button type=button data-{kind}={i}>{html.escape(w)}</button>" for i, w in enumerate(words))

    return f"""<section id=players><h2>Look for yourself</h2>
<p>All methods side by side, for the same prompt and from the same noise, all of seed
{found["seeds"][0]}. The real clip is where the prompt was taken from, not what the models should have copied: a prompt
does not say where a ball starts. The number under a video is its score; higher is better.</p>
<div class=choose role=group aria-label="choose methods"><span>Methods</span>{buttons("group", groups)}</div>
<div class=choose role=group aria-label="choose a prompt"><span>Prompt</span>
{buttons("prompt", [str(i + 1) for i in range(count)])}</div>
<p class=caption id=shown-caption></p>{CONTROLS}<div class="row cells" id=shown>{slots}</div>
<script type="application/json" id=shown-data>{in_script}</script></section>"""


def made_section(found: dict, tables: Path, path: Path) -> str:
    seeds = ", ".join(map(str, found["seeds"]))
    facts = {
        "Seeds": seeds, "Prompts": f"{found['clips']} each", "Commit": found["commit"],
        "Machine": found["machine"], "With": f"Python {found['python']}",
        "Processor time": f"{num(found['processor_minutes'], 0)} minutes of one core, all seeds and rows",
        "All of it again": "make tables", "This page’s command": f"python report.py --tables {tables} --json {path}",
    }  # fmt: skip
    listing = "".join(f"<dt>{k}</dt><dd><code>{html.escape(str(v))}</code></dd>" for k, v in facts.items())
    return f"""<section id=made><h2>How it was made</h2>
<p>Within a seed all rows share base, cold start, and the prompts and noise that they are judged on. The score is
exact physics: −traj/4 − 2·(1 − presence) − 10·shape. <b>traj</b> is the distance of the balls from the nearest motion
that physics allows, <b>presence</b> the share of pictures and colours that are as the prompt says, <b>shape</b> the
error of a ball’s picture, <b>dyn</b> how far a ball moves from one picture to the next (closest to the real clips is
best), <b>accel</b> how much it jerks. GPU-hours are predictions: operations of the recipe at the paper’s numbers,
counted, at an assumed rate; nothing here ran on Wan.</p><dl class=facts>{listing}</dl></section>"""


def write(tables: Path, path: Path) -> None:
    """Writes report.html into `tables`, a folder of bench/tables.py, from it and the json `path`.

    UserError, before any work, for a json that is not one of bench/tables_page.py or a seed that is not there.
    """
    found = read(path)
    folder = tables / f"seed-{found['seeds'][0]}"
    if not folder.is_dir():
        raise common.UserError(f"{folder}: expected a seed's folder of bench/tables.py, got none; run make tables")
    groups = {heading: [n for n in some if n in found["rows"]] for heading, some in found["groups"].items()}
    groups = {heading: some for heading, some in groups.items() if some}
    players = players_section(found, groups, folder)
    names = {f"group-{k}": html.escape(heading) for k, heading in enumerate(groups)}
    sections = [group_section(found, k, heading, some) for k, (heading, some) in enumerate(groups.items())]
    rows = list(dict.fromkeys(name for some in groups.values() for name in some))
    sections += [sweep_section(found), map_section(found, rows), players, made_section(found, tables, path)]
    names |= {"sweep": "Given frames", "map": "Noise levels", "players": "Videos", "made": "How it was made"}
    lead = (
        f"Every baseline and ablation on a tiny world of bouncing balls, {len(found['seeds'])} seeds of "
        f"{found['clips']} prompts each. A seed is one draw of everything, clips, base model, pairs and noise, so an "
        "interval is taken over the seeds and says how far a difference would move if all were drawn again. Bold "
        "and colour mark a difference only where its 95\u00a0% interval does not hold 0; without them nothing can be "
        "claimed."
    )
    text = shell(
        "DynamicsBoost: the tables’ report", "The paper’s tables in miniature", lead, names, "".join(sections),
        style=(HERE / "report_tables.css").read_text(), script=(HERE / "report_tables.js").read_text(),
    )  # fmt: skip
    common.write_text(tables / "report.html", text)
    print(f"report: {tables / 'report.html'}, {(tables / 'report.html').stat().st_size / 2**20:.1f} MiB")

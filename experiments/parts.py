"""What every page of the project is made of: its look, its plots, its videos and the clock that drives them.

A page is one HTML file: videos, plots, styles and scripts are all inside, and it asks for nothing from outside. Colours
follow the reader's light or dark.
"""

import base64
import html
import io
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from runtime import video
from tiny import balls as world

BUCKETS = ("0 – ¼", "¼ – ½", "½ – ¾", "¾ – 1")  # of asymdpo.py's metrics


# ---- words and numbers -----------------------------------------------------------------------------------------------


def num(x: float, digits: int = 2, sign: bool = False) -> str:
    """A number for reading: fixed digits, a true minus."""
    return f"{x:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def listed(said: Iterable[tuple[str, str]]) -> str:
    marks = {"good": "✓", "bad": "✗", "open": "·"}
    return (
        "<ul class=said>"
        + "".join(
            f"<li class={m}><b aria-hidden=true>{marks[m]}</b><span>{html.escape(t)}</span></li>" for m, t in said
        )
        + "</ul>"
    )


# ---- plots -----------------------------------------------------------------------------------------------------------

# Stand-ins that become the page's own colours, so that one SVG is right in light and in dark.
INK, R2, R3, SOFT = "#010203", "#010205", "#010206", "#010207"
PAGE_COLOURS = {INK: "currentColor", R2: "var(--r2)", R3: "var(--r3)", SOFT: "var(--line)"}
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "report", "font.family": "sans-serif", "font.size": 10,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": SOFT, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": SOFT, "grid.linewidth": 0.5,
    "legend.frameon": False, "legend.fontsize": 9, "lines.linewidth": 1.8,
}  # fmt: skip


def plot(title: str, draw: Callable, xlabel: str, ylabel: str) -> str:
    """Inline SVG of what `draw(axes)` draws: transparent, in the page's font and colours, with no address in it."""
    with rc_context(STYLE):
        figure = Figure(figsize=(4.7, 3.1), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.tick_params(length=0)
        if axes.get_legend_handles_labels()[1]:
            axes.legend()
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()[out.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"| version="[^"]*"', "", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # matplotlib's ids repeat from plot to plot
    svg = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font-size: \1", svg)
    for stand_in, colour in PAGE_COLOURS.items():
        svg = svg.replace(stand_in, colour)
    svg = re.sub(
        r'<svg [^>]*viewBox="([^"]*)"[^>]*>',
        rf'<svg viewBox="\1" role="img" aria-label="{html.escape(title)}">',
        svg,
        count=1,
    )
    return f"<figure class=plot><figcaption>{html.escape(title)}</figcaption>{svg}</figure>"


# ---- videos ----------------------------------------------------------------------------------------------------------


class Clips:
    """Turns latents into what the page shows: a small mp4 as a data URI, and the exact score."""

    def __init__(self, codec):
        self.codec = codec

    def show(self, x0: torch.Tensor, captions: list[str]) -> list[tuple[str, float]]:
        """x0 (B, C, F, H, W) -> (data URI, score) of each clip."""
        shown = []
        with tempfile.TemporaryDirectory() as folder:
            for pixels, caption in zip(self.codec.decode(x0.float()), captions, strict=True):
                video.write_mp4(Path(folder) / "clip.mp4", video.to_frames(pixels), world.FPS, crf=16)
                coded = base64.b64encode((Path(folder) / "clip.mp4").read_bytes()).decode()
                score = world.score_clip(((pixels + 1) / 2).permute(1, 2, 3, 0).numpy(), caption)["score"]
                shown.append((f"data:video/mp4;base64,{coded}", score))
        return shown


def cell(label: str, clip: tuple[str, float], more: str = "") -> str:
    uri, score = clip
    return (f'<figure class=cell{more}><video muted playsinline preload=auto data-src="{uri}"></video>'
            f"<figcaption>{html.escape(label)}<small>{num(score)}</small></figcaption></figure>")  # fmt: skip


CONTROLS = """<div class=controls><button type=button class=play aria-label="play or pause all videos">Pause</button>
<input type=range min=0 value=0 step=1 class=scrub aria-label="moment of all videos">
<output class=when></output></div>"""


# ---- the page --------------------------------------------------------------------------------------------------------

CSS = (Path(__file__).parent / "page.css").read_text()

ERRORS = "addEventListener('error', e => { if (e.message) document.body.dataset.error = e.message; });"

SCRIPT = (Path(__file__).parent / "page.js").read_text()


def heat(words: str, more: str, share: float, good: bool) -> str:
    """A cell of a map, the stronger coloured the greater its share (0 … 1) of the strongest; `more` is set small."""
    colour = f"background:color-mix(in srgb, var(--{'good' if good else 'bad'}) {round(45 * share)}%, transparent)"
    return f'<td class=heat style="{colour}">{words}<small>{more}</small></td>'


def shell(
    title: str,
    heading: str,
    lead: str,
    names: dict[str, str],
    body: str,
    style: str = "",
    script: str = "",
    hidden: str = "",
) -> str:
    """The whole file. names: section -> its name in the list at the top; style, script: beside those of all pages;
    hidden: what the body refers to.
    """
    links = "".join(f'<a href="#{name}">{words}</a>' for name, words in names.items())
    return f"""<!doctype html>
<html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1">
<link rel=icon href="data:,">
<title>{title}</title><style>{CSS}{style}</style></head>
<body data-frames={world.FRAMES} data-fps={world.FPS}><script>{ERRORS}</script>{hidden}
<header><h1>{heading}</h1>
<p class=lead>{lead}</p><nav>{links}</nav>
<p id=broken hidden>This browser could not load some of the videos (H.264 in mp4); the rest is complete.</p></header>
<main>{body}</main><script>{SCRIPT}{script}</script></body></html>
"""

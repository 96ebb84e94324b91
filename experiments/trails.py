"""The path of the ball, drawn: what is wrong with a clip can be seen, and how well it keeps to physics.

experiments.page puts paths over its players; `pictures` draws demo.png and demo.gif for readers who open no page.
"""

import dataclasses
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from PIL import Image

from runtime.files import whole_file
from tiny import balls

PROMPTS = 4  # in demo.png and demo.gif
NIGHT, GOOD, BAD, NEAREST = "#14161f", "#e8fbff", "#ff5468", "#58c4e8"  # as in page.css


@dataclasses.dataclass(frozen=True)
class Watched:
    """A clip, and what physics says of it."""

    pictures: np.ndarray  # (T, h, w, 3) float32 in [0, 1]
    path: np.ndarray  # (2, T) px: the ball's centre, or where it was last seen
    nearest: np.ndarray  # (2, T) px: the nearest path that physics allows
    bad: np.ndarray  # (T − 1,) bool: steps to a place off any valid path, jumps, and steps of a ball that stands still
    valid: bool
    jump: bool
    frozen: bool
    traj: float  # px

    @property
    def mark(self) -> str:
        faults = {"✗ jump": self.jump, "✗ frozen": self.frozen, f"✗ {self.traj:.1f} px": not self.valid}
        return next((words for words, there in faults.items() if there), f"✓ {self.traj:.1f} px")


def watch(codec, x0: torch.Tensor, captions: list[str]) -> list[Watched]:
    """Latent clips (B, C, F, H, W), looked at as `balls.score_clips` does."""
    pictures = balls.pixels(codec, x0.float())
    light = balls.light_of(pictures)
    scores = balls.score_clips(light, captions)
    centres, seen = balls.detect(light)
    nearest = balls.nearest_valid(centres, seen, np.array([balls.falls(text) for text in captions]))
    off = (np.hypot(*np.moveaxis(centres - nearest, 1, 0)) > balls.VALID) | ~seen
    speed = np.nan_to_num(scores["speed"])
    bad = off[:, 1:] | (speed > balls.JUMP)
    for k in range(speed.shape[1] - balls.STILL_FRAMES + 1):
        window = slice(k, k + balls.STILL_FRAMES)
        bad[:, window] |= speed[:, window].mean(1, keepdims=True) < balls.STILL
    last = np.maximum.accumulate(np.where(seen, np.arange(seen.shape[1]), 0), axis=1)
    paths = np.take_along_axis(centres, last[:, None], axis=2)
    facts = (scores[name] for name in ("valid", "jump", "frozen", "traj"))
    return [Watched(*clip) for clip in zip(pictures, paths, nearest, bad, *facts)]


def board(rows: dict[str, list[Watched]], captions: list[str]) -> Callable[[int | None, int], Image.Image]:
    """A board with a row of clips for each name and a column for each caption.

    Returns draw(at, dpi): the paths up to picture `at`; or, if that is None, whole, with the ball at several moments.
    """
    names, count = list(rows), len(captions)
    figure = Figure(figsize=(8, 0.8 + 2.1 * len(rows)), facecolor=NIGHT)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), count, squeeze=False)
    figure.subplots_adjust(0.045, 0.045, 0.995, 1 - 0.75 / figure.get_figheight(), wspace=0.04, hspace=0.12)
    drawn = []
    for (i, k), ax in np.ndenumerate(axes):
        clip = rows[names[i]][k]
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        image = ax.imshow(clip.pictures[0], extent=(0, balls.SIZE, balls.SIZE, 0), interpolation="bicubic")
        ax.plot(*clip.nearest, color=NEAREST, linewidth=1.2, path_effects=[withStroke(linewidth=2.4, foreground=NIGHT)])
        outline = [withStroke(linewidth=3, foreground=NIGHT)]
        looks = (("-", GOOD), ((0, (2, 1)), BAD))
        lines = [ax.plot([], [], ls=style, color=c, linewidth=1.8, path_effects=outline)[0] for style, c in looks]
        drawn.append((clip, image, lines))
        ax.set_xlabel(clip.mark, color=GOOD if clip.valid else BAD, fontsize=9, labelpad=2)
        if k == 0:
            ax.set_ylabel(names[i], color=GOOD, fontsize=10, fontweight="bold", labelpad=3)
        if i == 0:
            words = "\n".join(textwrap.wrap(captions[k], 24))
            ax.set_title(words, color=GOOD, fontsize=9, style="italic", parse_math=False)

    def draw(at: int | None, dpi: int) -> Image.Image:
        figure.set_dpi(dpi)
        for clip, image, lines in drawn:
            image.set_data(clip.pictures[at] if at is not None else clip.pictures[::16].max(0))
            steps = np.arange(len(clip.bad)) < (len(clip.bad) if at is None else at)
            for line, some in zip(lines, (~clip.bad & steps, clip.bad & steps)):
                edges = np.flatnonzero(np.diff(some, prepend=False, append=False)).reshape(-1, 2)
                runs = [np.pad(clip.path[:, a : b + 1], ((0, 0), (0, 1)), constant_values=np.nan) for a, b in edges]
                line.set_data(*(np.concatenate(runs, axis=1) if runs else ([], [])))
        figure.canvas.draw()
        return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])

    return draw


def pictures(demo: Path, rows: dict[str, list[Watched]], captions: list[str]) -> None:
    """Draws the first prompts: demo.png, whole paths, and demo.gif, where they grow, every second picture."""
    draw = board(rows, captions[:PROMPTS])
    whole = draw(None, 100)
    with whole_file(demo / "demo.png") as temporary:
        whole.save(temporary, format="png", optimize=True)
    # few colours, the lines' among them, without dither: less than half as large
    colours = whole.quantize(24).getpalette()[: 3 * 24]
    marks = bytes.fromhex((NIGHT + GOOD + BAD + NEAREST).replace("#", ""))
    palette = Image.new("P", (1, 1))
    palette.putpalette([*colours, *marks])
    moments = range(0, balls.FRAMES, 2)
    first, *others = (draw(k, 72).quantize(palette=palette, dither=Image.Dither.NONE) for k in moments)
    times = [2000 // balls.FPS] * len(others) + [1000]  # ms; the end stays
    with whole_file(demo / "demo.gif") as temporary:
        first.save(temporary, format="gif", save_all=True, append_images=others, duration=times, loop=0)

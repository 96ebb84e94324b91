"""The figures of docs/method.md, from a finished demo's own clips and the method's own functions.

    python -m experiments.figures --demo out/demo

In    a demo folder with shards, pairs and asymdpo finished
Out   in --out: method-continuation.png, method-pairs.png and method-loss.png
Cost  seconds
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import asymdpo
import flow
from runtime.files import open_manifest, read_jsonl, whole_file
from runtime.options import program, resolve
from runtime.shards import Shards
from tiny import balls
from tiny import codec as codecs

R1, R2, R3 = "#8d96a5", "#2780b4", "#d67a22"  # regions ①, ② and ③, as in page.css
STYLE = {"font.size": 15, "axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 2.5}
NOISED = 0.6  # t of the picture of what the continuation model sees


@dataclasses.dataclass(frozen=True)
class Config:
    """Draws docs/method.md's figures from a finished demo."""

    demo: str = "out/demo"  # folder of the demo
    out: str = "docs"  # folder that the pictures are written to


def strip(axes, y: float, codec, x0, words: str, colours: list[str], given: int) -> None:
    """A row at y: x0 (C, F, H, W), the last picture of each latent frame, under its words.

    Below each frame is a bar, hatched where it is generated.
    """
    axes.text(0, y - 0.08, words, va="bottom")
    for i, picture in enumerate(balls.pixels(codec, x0[None])[0, :: codecs.GROUP]):
        axes.imshow(picture, extent=(i + 0.03, i + 0.97, y + 0.97, y + 0.03), interpolation="bicubic")
        looks = dict(hatch="///", edgecolor="white") if i >= given else {}
        axes.add_patch(Rectangle((i + 0.03, y + 1.02), 0.94, 0.22, facecolor=colours[i], linewidth=0, **looks))


def spans(axes, y: float, bottom: float, *parts: tuple[float, float, str, str]) -> None:
    """Lines below the frames, from each part's start to its end, and what is there. Makes room down to bottom."""
    for start, end, colour, words in parts:
        axes.plot([start + 0.06, end - 0.06], [y, y], color=colour, linewidth=4, solid_capstyle="butt")
        axes.text((start + end) / 2, y + 0.12, words, ha="center", va="top")
    axes.set(xlim=(0, end + 0.4), ylim=(bottom, -0.6), aspect="equal")  # x counts latent frames, y points down
    axes.axis("off")


def draw_continuation(figure: Figure, codec, clip, made, n: int) -> None:
    """A clip, what the continuation model sees of it, and what a solver makes of that. clip, made (C, F, H, W)."""
    frames = clip.shape[1]
    generated = torch.arange(frames)[None] >= n
    x_t = flow.add_noise(clip[None], flow.draw_noise(clip.shape, [("figure", 0)]), NOISED * generated)[0]
    axes, grey = figure.add_subplot(), [R1] * frames
    strip(axes, 0, codec, clip, "a real clip: a picture of each latent frame", grey, frames)
    strip(axes, 2, codec, x_t, f"what Φ reads in training, here at t = {NOISED:g}", grey, frames)
    strip(axes, 6, codec, made, f"what Φ makes of the first {n} frames (hatched: generated)", grey, n)
    words = f"to generate\nt′ = t = {NOISED:g}\nloss: mean of ‖v − $v_\\Phi$‖²"
    spans(axes, 3.5, 7.45, (0, n, R1, "given\nt′ = 0\nno loss"), (n, frames, R3, words))


def draw_pairs(figure: Figure, codec, rows: list[dict], chosen, rejected, n1: int, n2: int) -> None:
    """How many given frames the pairs' sides have, and the sides of one pair, chosen and rejected (C, F, H, W)."""
    frames = chosen.shape[1]
    above, below = figure.subplots(2, 1, height_ratios=(0.75, 1.5))
    for name, colour, words in (("n1", R1, "N1: losers"), ("n2", R2, "N2: winners")):
        places, counts = np.unique([row[name] for row in rows], return_counts=True)
        above.bar(places, counts, 0.7, color=colour)
        above.text(places.mean(), counts.max() * 1.08, words, ha="center")
    above.set(xlim=(0, frames + 0.4), xticks=range(frames + 1), ylabel="pairs", xlabel="given latent frames")
    above.margins(y=0.2)
    colours = [R1] * n1 + [R2] * (n2 - n1) + [R3] * (frames - n2)
    strip(below, 0, codec, chosen, f"a pair's winner, N2 = {n2}", colours, n2)
    strip(below, 2.1, codec, rejected, f"its loser, N1 = {n1} (hatched: generated)", colours, n1)
    parts = (0, n1, R1, "① the same:\nno loss"), (n1, n2, R2, "② real against\ngenerated")
    spans(below, 3.6, 4.9, *parts, *[(n2, frames, R3, "③ both\ngenerated")] * (n2 < frames))


def curve(cfg, x: np.ndarray, n1: int, frames: int) -> np.ndarray:
    """The loss of pairs for which β·S/K is x (B,): `asymdpo_loss` of errors made up to that end."""
    none, start = torch.zeros(len(x), 1, frames, 1, 1), torch.full((len(x),), n1)
    rejected = none + 1 + np.abs(x).max() / cfg.beta  # errors; the winner's must not be below 0
    chosen = rejected + torch.from_numpy(x).float().view(-1, 1, 1, 1, 1) / cfg.beta
    return asymdpo.asymdpo_loss(cfg, (chosen.sqrt(), rejected.sqrt(), *[none] * 4), start, start)[0].numpy()


def push(cfg, n1: int, n2: int, frames: int) -> np.ndarray:
    """−dL/de at step 0 for the errors e of winner and loser, (2, F): below 0 the error is pushed down."""
    one, none = torch.ones(1, 1, frames, 1, 1), torch.zeros(1, 1, frames, 1, 1)
    sides = [one.clone().requires_grad_() for _ in range(2)]  # v − target is 1, and e its square
    prediction = (*sides, one, one, none, none)
    loss, _ = asymdpo.asymdpo_loss(cfg, prediction, torch.tensor([n1]), torch.tensor([n2]))
    return torch.stack([-side.flatten() / 2 for side in torch.autograd.grad(loss.sum(), sides)]).numpy()


def draw_loss(figure: Figure, cfg, ended: float, n1: int, n2: int, frames: int) -> None:
    """The loss against β·S/K in both forms, with where training ended, and the push on each frame's error."""
    above, below = figure.subplots(2, 1)
    x, dpo = np.linspace(-4, 4, 161), dataclasses.replace(cfg, sft_weight=0.0)
    for form, style, words in (("inside", "-", "softplus(β·S/K)"), ("outside", "--", "softplus(β·S) / K, as printed")):
        y = curve(dataclasses.replace(dpo, form=form), x, n1, frames)
        above.plot(x, y, style, color="black", linewidth=3, label=f"{form}: {words}")
    above.axvline(0, color=R2, linewidth=3, linestyle=":", label="step 0: S = 0")
    above.axvline(ended, color=R3, linewidth=3, linestyle="-.", label="the demo's mean at the end")
    above.set(xlabel="β·S/K: below 0 the policy prefers the winner", ylabel="loss of a pair")
    above.legend(loc="upper left", framealpha=1, edgecolor="white")
    (winner, loser), places = push(dpo, n1, n2, frames), np.arange(frames)
    own = push(cfg, n1, n2, frames)[0] - winner
    below.bar(places + 0.3, loser, 0.38, color=R3, label="loser's: up")
    below.bar(places + 0.7, winner, 0.38, color=R2, label="winner's: down")
    looks = dict(color="white", edgecolor=R2, hatch="///", linewidth=0)
    below.bar(places + 0.7, own, 0.38, winner, label="by λ", **looks)
    below.axhline(0, color="black", linewidth=0.8)
    regions = ["①" if i < n1 else "②" if i < n2 else "③" for i in places]
    below.set(xticks=places + 0.5, xticklabels=[f"{region}\n{i}" for i, region in enumerate(regions)])
    below.set(xlabel="latent frame", ylabel="push on its error")
    below.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 0.98), ncols=3)


def main(cfg: Config) -> None:
    cfg, demo, out = resolve(cfg), Path(cfg.demo), Path(cfg.out)
    trained = asymdpo.Config(**open_manifest(demo / "asymdpo", "asymdpo.py")["config"])
    metrics = read_jsonl(demo / "asymdpo" / "metrics.jsonl")
    pairs, clips = Shards(demo / "pairs", "make_pairs.py"), Shards(demo / "shards", "prepare.py")
    codec, frames = codecs.load(demo / "shards"), pairs.shape("chosen")[1]
    # the first pair with lengths near the middles of their windows, whatever it looks like
    k, row = min(enumerate(pairs.rows), key=lambda one: abs(one[1]["n1"] - 4) + abs(one[1]["n2"] - 11))
    chosen, rejected = (pairs.get(side, [k])[0].float() for side in ("chosen", "rejected"))
    clip = clips.get("x0", [[one["id"] for one in clips.rows].index(row["id"])])[0].float()
    n1, n2 = row["n1"], row["n2"]
    ended = -float(np.mean([one["rewards/margins"] for one in metrics[-max(1, len(metrics) // 4) :]]))

    drawn = {
        "continuation": (5.1, draw_continuation, codec, clip, rejected, n1),
        "pairs": (5.6, draw_pairs, codec, pairs.rows, chosen, rejected, n1, n2),
        "loss": (7, draw_loss, trained, ended, n1, n2, frames),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, (height, draw, *args) in drawn.items():
        with rc_context(STYLE), whole_file(out / f"method-{name}.png") as temporary:
            figure = Figure(figsize=(8, height), layout="constrained")
            draw(figure, *args)
            figure.savefig(temporary, format="png", dpi=100)
    print(f"figures: {out}/method-*.png, of pair {row['id']}")


if __name__ == "__main__":
    program(main, Config, __doc__)

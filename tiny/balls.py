"""The tiny preset's data: clips of one or two coloured balls under exact physics, and an exact score for them.

    python -m tiny.balls --out out/demo/clips --clips 3000 --seed 0

A clip is 49 frames of 64×64 px at 16 fps. A ball is a Gaussian spot in one colour channel: red, green or blue. The
channels add up, so balls that overlap stay separable. A ball floats in a straight line or falls. It bounces elastically
off the walls, and passes through the other ball. So each axis of each ball moves on its own, and a table of all valid
motions along an axis gives the one nearest to any observed motion: the score needs no learned model.

Out   `<id>.mp4` (H.264, about 3 KB each), metadata.csv with OpenVid-1M's columns

Units: px of the 64-px picture, px/frame, px/frame². y points down.
"""

import contextlib
import csv
import dataclasses
import functools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from runtime import video
from runtime.files import whole_file
from runtime.group import alone
from runtime.options import option, program, resolve
from runtime.run import Run

SIZE, FRAMES, FPS = 64, 49, 16
RADIUS = 7.2  # standard deviation of a ball's Gaussian, px
WALLS = (11.2, 52.8)  # where a ball's centre turns back, px
SPEED = (0.4, 1.1)  # |velocity| along each axis at the start, px/frame
GRAVITY = 0.035  # px/frame², when falling
COLOURS = ("red", "green", "blue")
MISSING = 16.0  # px that a missing ball counts for in the trajectory error
METRICS = ("score", "traj", "presence", "shape", "dyn", "accel")
COLUMNS = "video,caption,aesthetic score,motion score,temporal consistency score,camera motion,frame,fps,seconds"


@dataclasses.dataclass(frozen=True)
class Config:
    """Renders mp4 clips of bouncing balls with captions."""

    out: str = option("out/demo/clips", neutral=True)  # folder to write
    clips: int = option(3000, least=1)  # number of clips
    seed: int = 0  # of the random motions
    workers: int = option(0, least=0, neutral=True)  # processes; 0: one for each core


# ---- physics ---------------------------------------------------------------------------------------------------------


def simulate(position: np.ndarray, velocity: np.ndarray, gravity: np.ndarray | float, frames: int = FRAMES):
    """Positions (..., frames) px of balls along one axis: constant acceleration, elastic walls, exact bounce times.

    position, velocity: (...,) px and px/frame at frame 0; gravity broadcasts against them. There may be at most one
    bounce in a frame.
    """
    p, v, g = (np.array(a, np.float64) for a in np.broadcast_arrays(position, velocity, gravity))
    track = [p]
    for _ in range(frames - 1):
        free = p + v + g / 2
        wall = np.clip(free, *WALLS)
        bounced = free != wall
        # the time of the hit: the root s of p + v·s + g·s²/2 = wall in (0, 1], in a form that holds for g = 0, too
        root = np.sqrt(np.maximum(v * v - 2 * g * (p - wall), 0)) * np.sign(wall - p + 1e-12 * np.sign(v))
        hit = np.clip(2 * (wall - p) / np.where(v + root == 0, 1, v + root), 0, 1)
        speed = -(v + g * hit)  # just after it
        left = 1 - hit
        p = np.where(bounced, wall + speed * left + g * left * left / 2, free)
        v = np.where(bounced, speed + g * left, v + g)
        track.append(p)
    return np.stack(track, -1)


def draw_motion(rng: np.random.Generator, balls: int, falling: bool) -> np.ndarray:
    """Random tracks (balls, 2, FRAMES) of x and y in px."""
    position = rng.uniform(*WALLS, (balls, 2))
    velocity = rng.uniform(*SPEED, (balls, 2)) * rng.choice([-1, 1], (balls, 2))
    return simulate(position, velocity, np.array([0, GRAVITY * falling]))


def spots(tracks: np.ndarray) -> np.ndarray:
    """Pictures (..., SIZE, SIZE) float32 in [0, 1] of one ball each, at tracks (..., 2) px. Pixel centres: i + 0.5."""
    axis = np.arange(SIZE, dtype=np.float32) + 0.5
    x, y = (np.exp(-0.5 * ((axis - tracks[..., i, None]) / RADIUS) ** 2).astype(np.float32) for i in (0, 1))
    return y[..., :, None] * x[..., None, :]


def caption(colours: tuple[int, ...], falling: bool) -> str:
    """For example "a red ball and a blue ball fall". colours: channels, 0 … 2."""
    names = " and ".join(f"a {COLOURS[c]} ball" for c in colours)
    return f"{names} {'fall' if falling else 'float'}{'s' if len(colours) == 1 else ''}"


def read_caption(text: str) -> tuple[tuple[int, ...], bool]:
    """The colour channels and whether the balls fall: the inverse of `caption`."""
    words = text.split()
    return tuple(COLOURS.index(w) for w in words if w in COLOURS), words[-1].startswith("fall")


def make_clip(seed: int, index: int) -> tuple[np.ndarray, str, np.ndarray]:
    """A clip of the data set: video (FRAMES, SIZE, SIZE, 3) uint8, caption, tracks (balls, 2, FRAMES) px."""
    rng = np.random.default_rng([seed, index])
    colours = tuple(sorted(rng.choice(3, rng.integers(1, 3), replace=False).tolist()))
    falling = bool(rng.integers(2))
    tracks = draw_motion(rng, len(colours), falling)
    frames = np.zeros((FRAMES, SIZE, SIZE, 3), np.float32)
    for c, track in zip(colours, tracks):
        frames[..., c] = spots(track.T)
    return np.rint(frames * 255).astype(np.uint8), caption(colours, falling), tracks


# ---- score -----------------------------------------------------------------------------------------------------------


@functools.cache
def _bank(falling: bool) -> tuple[np.ndarray, np.ndarray]:
    """Valid motions along one axis on a grid of 53 positions × 60 velocities, (3180, FRAMES) px, and their squares."""
    speed = np.linspace(*SPEED, 30)
    position, velocity = np.meshgrid(np.linspace(*WALLS, 53), np.concatenate([-speed, speed]), indexing="ij")
    bank = simulate(position.ravel(), velocity.ravel(), GRAVITY * falling)
    return bank, bank * bank


WHOLE = np.maximum(spots(np.array([SIZE / 2, SIZE / 2])) - 0.1, 0).sum()  # the mass of a ball, as `detect` sees it


def detect(clip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds the balls: clip (T, H, W, 3) in [0, 1] -> centres (3, 2, T) px and mass (3, T), 1 = a whole ball."""
    channels = np.ascontiguousarray(clip.transpose(3, 0, 1, 2), np.float32)
    light = np.maximum(channels - 0.1, 0)  # below 10 % is the codec's noise
    axis = np.arange(SIZE, dtype=np.float32) + 0.5
    row, row_x = np.moveaxis(light @ np.stack([np.ones_like(axis), axis], 1), -1, 0)  # (3, T, H): mass, first moment
    total = row.sum(-1) + 1e-9
    return np.stack([row_x.sum(-1), row @ axis], 1) / total[:, None], total / WHOLE


def distance_to_valid(track: np.ndarray, seen: np.ndarray, judged: np.ndarray, falling: bool) -> float:
    """Sum of squared distances (px²) along one axis to the valid motion that is nearest to all frames seen.

    track: (FRAMES,) px; seen, judged: (FRAMES,) bool. The sum is over the frames that are both.
    """
    bank, square = _bank(falling)
    w = seen.astype(np.float64)
    nearest = bank[np.argmin(square @ w - 2 * bank @ (w * track))]
    return float(((track - nearest)[seen & judged] ** 2).sum())


def score_clip(clip: np.ndarray, text: str, frames: slice = slice(None)) -> dict[str, float]:
    """The exact score of a clip for its caption.

    clip: (FRAMES, SIZE, SIZE, 3) float in [0, 1]. frames: those that are judged. The valid motion is the one nearest
    to the whole clip, so generated frames must go on from the given ones. Returns
      traj      px: distance of the balls' centres from the nearest valid motion, rms over frames
      presence  share of (frame, colour) that agree with the caption: a ball where it names one, none elsewhere
      shape     rms difference between a ball's picture and a perfect ball at the same centre
      dyn       px/frame: mean distance that a ball's centre moves from one frame to the next
      accel     px/frame²: median second difference of the centres
      score     −traj/4 − 2·(1 − presence) − 10·shape; higher is better
    """
    colours, falling = read_caption(text)
    centre, mass = detect(clip)
    judged = np.zeros(len(clip), bool)
    judged[frames] = True
    there = (mass > 0.5) & (mass < 2)
    as_prompted = np.array([there[c] if c in colours else mass[c] < 0.25 for c in range(3)])
    traj, shape, dyn, accel = [], [], [], []
    for c in colours:
        fit = sum(distance_to_valid(centre[c, axis], there[c], judged, falling and axis == 1) for axis in (0, 1))
        seen = there[c] & judged
        traj.append(np.sqrt((fit + MISSING**2 * (judged & ~seen).sum()) / judged.sum()))
        blurred = (clip[judged, ..., c] - spots(centre[c].T[judged])).ravel()
        shape.append(np.sqrt(blurred @ blurred / len(blurred)))
        step = np.diff(centre[c], axis=1)
        both = seen[1:] & seen[:-1]
        dyn.append(np.sqrt((step**2).sum(0))[both].mean() if both.any() else 0.0)
        turn = np.sqrt((np.diff(step, axis=1) ** 2).sum(0))[both[1:] & both[:-1]]
        accel.append(np.median(turn) if len(turn) else 0.0)
    result = dict(zip(METRICS[1:], map(np.mean, (traj, as_prompted[:, judged], shape, dyn, accel))))
    result["score"] = -result["traj"] / 4 - 2 * (1 - result["presence"]) - 10 * result["shape"]
    return {k: float(v) for k, v in result.items()}


def pixels(codec, x0) -> np.ndarray:
    """Latents (B, C, F, H, W) -> pictures (B, T, h, w, 3) float32 in [0, 1]."""
    return ((codec.decode(x0.cpu()) + 1) / 2).permute(0, 2, 3, 4, 1).numpy()


def score(codec, x0, captions: list[str], frames: slice = slice(None)) -> dict[str, np.ndarray]:
    """`score_clip` of the latent clips x0 (B, C, F, H, W): an array (B,) for each of METRICS."""
    rows = []
    for i in range(0, len(x0), 4):  # a few at a time: fresh memory for many costs more than the score
        clips = pixels(codec, x0[i : i + 4])
        rows += [score_clip(clip, text, frames) for clip, text in zip(clips, captions[i : i + 4])]
    return {m: np.array([row[m] for row in rows]) for m in METRICS}


# ---- the data set ----------------------------------------------------------------------------------------------------


def write_clip(folder: str, seed: int, index: int) -> dict:
    """Renders clip `index` into the folder, unless it is there. Returns its row of metadata.csv."""
    frames, text, tracks = make_clip(seed, index)
    name = f"ball-{index:05d}.mp4"
    if not (Path(folder) / name).exists():
        video.write_mp4(Path(folder) / name, frames, FPS)
    motion = np.sqrt((np.diff(tracks, axis=-1) ** 2).sum(1)).mean()
    values = (name, text, "", f"{motion:.3f}", "", "static", FRAMES, FPS, f"{FRAMES / FPS:.3f}")
    return dict(zip(COLUMNS.split(","), values))


def main(cfg: Config) -> None:
    cfg = resolve(cfg)
    run = Run(cfg, "tiny.balls", alone())
    if run.done:
        return
    with contextlib.ExitStack() as stack, run.progress(cfg.clips, unit="clip") as bar:
        each, rows = map, []
        if cfg.workers != 1:  # a pool of one process would be left behind if this one were killed
            pool = ProcessPoolExecutor(cfg.workers or os.cpu_count(), multiprocessing.get_context("spawn"))
            each = functools.partial(stack.enter_context(pool).map, chunksize=16)
        for row in each(functools.partial(write_clip, cfg.out, cfg.seed), range(cfg.clips)):
            rows.append(row)
            bar.update()
    with whole_file(run.folder / "metadata.csv") as temporary, open(temporary, "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    run.finish(["metadata.csv"] + [row["video"] for row in rows])


if __name__ == "__main__":
    program(main, Config, __doc__)

"""The embedded default data: clips of one or two coloured balls under exact physics, and an exact score for them.

    python world.py --out out/demo/clips --clips 3000 --seed 0

A clip is 49 frames of 64×64 px at 16 fps. A ball is a Gaussian spot in one pure colour channel (red, green or
blue; the channels add up, so balls that overlap stay separable), moves in a straight line or falls, bounces
elastically off the walls and does not touch the other ball. So each axis of each ball moves on its own, and the
nearest physically valid motion to any observed one is a look-up in a table of all of them: the score needs no
learned model.

Out: `<out>/<id>.mp4` (H.264), `<out>/metadata.csv` with OpenVid-1M's columns, `MANIFEST.json`. About 3 KB a clip.

Units: px of the 64-px picture, px/frame, px/frame². y points down.
"""

import contextlib
import csv
import dataclasses
import functools
import io
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from runtime import run as common
from runtime import video
from runtime.run import UserError

SIZE, FRAMES, FPS = 64, 49, 16
RADIUS = 7.2  # standard deviation of a ball's Gaussian, px
WALLS = (11.2, 52.8)  # where a ball's centre turns back, px
SPEED = (0.4, 1.1)  # |velocity| along each axis at the start, px/frame
GRAVITY = 0.035  # px/frame², when falling
COLOURS = ("red", "green", "blue")
MISSING = 16.0  # px that a ball which is not there counts for in the trajectory error


@dataclasses.dataclass(frozen=True)
class Config:
    """Renders the embedded default: mp4 clips of bouncing balls with captions."""

    out: str = "out/demo/clips"  # folder to write
    clips: int = 3000  # number of clips
    seed: int = 0  # another seed, other clips
    workers: int = 0  # processes; 0: one a core


# ---- physics ---------------------------------------------------------------------------------------------------------


def simulate(
    position: np.ndarray, velocity: np.ndarray, gravity: np.ndarray | float, frames: int = FRAMES
) -> np.ndarray:
    """Positions (..., frames) of balls along one axis: constant acceleration, elastic walls, exact bounce times.

    position, velocity (...,) at frame 0 in px and px/frame; gravity broadcasts against them. At most one bounce
    a frame.
    """
    p, v, g = (np.array(a, np.float64) for a in np.broadcast_arrays(position, velocity, gravity))
    track = [p]
    for _ in range(frames - 1):
        free = p + v + g / 2
        wall = np.clip(free, *WALLS)
        bounced = free != wall
        # time of the hit: the root of p + v·s + g·s²/2 = wall in (0, 1], written so that g = 0 is no special case
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
    """Pictures (..., SIZE, SIZE) float32 in [0, 1] of one ball each at tracks (..., 2) in px.

    Pixel centres are at i + 0.5.
    """
    axis = np.arange(SIZE, dtype=np.float32) + 0.5
    x, y = (np.exp(-0.5 * ((axis - tracks[..., i, None]) / RADIUS) ** 2).astype(np.float32) for i in (0, 1))
    return y[..., :, None] * x[..., None, :]


def caption(colours: tuple[int, ...], falling: bool) -> str:
    names = " and ".join(f"a {COLOURS[c]} ball" for c in colours)
    return f"{names} {'fall' if falling else 'float'}{'s' if len(colours) == 1 else ''}"


def read_caption(text: str) -> tuple[tuple[int, ...], bool]:
    """Caption -> (colour channels, falling): the inverse of `caption`."""
    words = text.split()
    return tuple(COLOURS.index(w) for w in words if w in COLOURS), words[-1].startswith("fall")


def make_clip(seed: int, index: int) -> tuple[np.ndarray, str, np.ndarray]:
    """One clip of the data set: video (FRAMES, SIZE, SIZE, 3) uint8, caption, tracks (balls, 2, FRAMES) px."""
    rng = np.random.default_rng([seed, index])
    colours = tuple(sorted(rng.choice(3, rng.integers(1, 3), replace=False).tolist()))
    falling = bool(rng.integers(2))
    tracks = draw_motion(rng, len(colours), falling)
    video = np.zeros((FRAMES, SIZE, SIZE, 3), np.float32)
    for c, track in zip(colours, tracks):
        video[..., c] = spots(track.T)
    return np.rint(video * 255).astype(np.uint8), caption(colours, falling), tracks


# ---- score -----------------------------------------------------------------------------------------------------------


@functools.cache
def _bank(falling: bool) -> tuple[np.ndarray, np.ndarray]:
    """Every valid motion along one axis, on a grid: 53 positions × 60 velocities -> (3180, FRAMES) px, and
    its square.
    """
    speed = np.linspace(*SPEED, 30)
    position, velocity = np.meshgrid(np.linspace(*WALLS, 53), np.concatenate([-speed, speed]), indexing="ij")
    bank = simulate(position.ravel(), velocity.ravel(), GRAVITY * falling)
    return bank, bank * bank


WHOLE = np.maximum(spots(np.array([SIZE / 2, SIZE / 2])) - 0.1, 0).sum()  # mass of a ball


def detect(video: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds the balls: video (T, H, W, 3) in [0, 1] -> centres (3, 2, T) px and mass (3, T), 1 = a whole ball."""
    light = np.maximum(
        np.ascontiguousarray(video.transpose(3, 0, 1, 2), np.float32) - 0.1, 0
    )  # below 10 % is codec noise
    axis = np.arange(SIZE, dtype=np.float32) + 0.5
    row, row_x = np.moveaxis(light @ np.stack([np.ones_like(axis), axis], 1), -1, 0)  # (3, T, H): mass, first moment
    total = row.sum(-1) + 1e-9
    return np.stack([row_x.sum(-1), row @ axis], 1) / total[:, None], total / WHOLE


def distance_to_valid(track: np.ndarray, seen: np.ndarray, judged: np.ndarray, falling: bool) -> float:
    """Summed squared distance (px²) along one axis, over the frames seen and judged, to the valid motion
    nearest to all frames seen.

    track (FRAMES,) px; seen, judged (FRAMES,) bool.
    """
    bank, square = _bank(falling)
    w = seen.astype(np.float64)
    nearest = bank[np.argmin(square @ w - 2 * bank @ (w * track))]
    return float(((track - nearest)[seen & judged] ** 2).sum())


def score_clip(video: np.ndarray, text: str, frames: slice = slice(None)) -> dict[str, float]:
    """The exact score of a clip for its caption.

    video (FRAMES, SIZE, SIZE, 3) float in [0, 1]. `frames` limits which frames are judged; the valid motion is
    the nearest to the whole clip all the same, so generated frames must go on from the given ones. Returns
      traj      px: distance of the balls' centres from the nearest physically valid motion, rms over frames
      presence  share of (frame, colour) that are as the caption says: a prompted ball there, any other absent
      shape     rms difference between a ball's picture and a perfect ball at the same centre
      dyn       px/frame: mean distance that a ball's centre moves from one frame to the next
      accel     px/frame²: median second difference of the centres
      score     −traj/4 − 2·(1 − presence) − 10·shape; higher is better
    """
    colours, falling = read_caption(text)
    centre, mass = detect(video)
    judged = np.zeros(len(video), bool)
    judged[frames] = True
    there = (mass > 0.5) & (mass < 2)
    as_prompted = np.array([there[c] if c in colours else mass[c] < 0.25 for c in range(3)])
    traj, shape, dyn, accel = [], [], [], []
    for c in colours:
        fit = sum(distance_to_valid(centre[c, axis], there[c], judged, falling and axis == 1) for axis in (0, 1))
        seen = there[c] & judged
        traj.append(np.sqrt((fit + MISSING**2 * (judged & ~seen).sum()) / judged.sum()))
        blurred = (video[judged, ..., c] - spots(centre[c].T[judged])).ravel()
        shape.append(np.sqrt(blurred @ blurred / len(blurred)))
        step = np.diff(centre[c], axis=1)
        both = seen[1:] & seen[:-1]
        dyn.append(np.sqrt((step**2).sum(0))[both].mean() if both.any() else 0.0)
        turn = np.sqrt((np.diff(step, axis=1) ** 2).sum(0))[both[1:] & both[:-1]]
        accel.append(np.median(turn) if len(turn) else 0.0)
    result = {
        "traj": np.mean(traj), "presence": as_prompted[:, judged].mean(), "shape": np.mean(shape),
        "dyn": np.mean(dyn), "accel": np.mean(accel),
    }  # fmt: skip
    result["score"] = -result["traj"] / 4 - 2 * (1 - result["presence"]) - 10 * result["shape"]
    return {k: float(v) for k, v in result.items()}


METRICS = ("score", "traj", "presence", "shape", "dyn", "accel")


def pixels(codec, x0) -> np.ndarray:
    """Latents (B, C, F, H, W) -> pictures (B, T, h, w, 3) float32 in [0, 1]."""
    return ((codec.decode(x0.cpu()) + 1) / 2).permute(0, 2, 3, 4, 1).numpy()


def score(codec, x0, captions: list[str], frames: slice = slice(None)) -> dict[str, np.ndarray]:
    """`score_clip` of the clips x0 (B, C, F, H, W): an array (B,) for each of METRICS."""
    rows = []
    for i in range(0, len(x0), 4):  # few at a time: fresh memory for many costs more than the score
        clips = pixels(codec, x0[i : i + 4])
        rows += [score_clip(clip, text, frames) for clip, text in zip(clips, captions[i : i + 4])]
    return {m: np.array([row[m] for row in rows]) for m in METRICS}


# ---- the data set ----------------------------------------------------------------------------------------------------

COLUMNS = "video,caption,aesthetic score,motion score,temporal consistency score,camera motion,frame,fps,seconds".split(
    ","
)


def write_clip(folder: str, seed: int, index: int) -> dict:
    """Renders clip `index` into folder, unless it is there, and returns its row of metadata.csv."""
    frames, text, tracks = make_clip(seed, index)
    name = f"ball-{index:05d}.mp4"
    if not (Path(folder) / name).exists():
        video.write_mp4(Path(folder) / name, frames, FPS)
    motion = np.sqrt((np.diff(tracks, axis=-1) ** 2).sum(1)).mean()
    values = (name, text, "", f"{motion:.3f}", "", "static", FRAMES, FPS, f"{FRAMES / FPS:.3f}")
    return dict(zip(COLUMNS, values))


def main(cfg: Config) -> None:
    if cfg.clips < 1:
        raise UserError(f"--clips: expected at least 1, got {cfg.clips}")
    run = common.Run(cfg, "world", common.Group(0, 1, None))
    if run.done:
        return
    run.claim()
    with contextlib.ExitStack() as stack:
        each = map
        if cfg.workers != 1:  # one is this process: a pool's would stay behind where this one is killed
            pool = ProcessPoolExecutor(cfg.workers or os.cpu_count(), multiprocessing.get_context("spawn"))
            each = functools.partial(stack.enter_context(pool).map, chunksize=16)
        jobs = each(write_clip, *zip(*[(cfg.out, cfg.seed, i) for i in range(cfg.clips)]))
        with run.progress(cfg.clips, unit="clip") as bar:
            rows = [(row, bar.update())[0] for row in jobs]
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    common.write_text(run.folder / "metadata.csv", table.getvalue())
    run.resume()  # an interrupted run's metrics are dropped
    run.log(cfg.clips, motion=float(np.mean([float(row["motion score"]) for row in rows])))
    run.finish(["metadata.csv"] + [row["video"] for row in rows])


if __name__ == "__main__":
    common.run(main, Config, __doc__)

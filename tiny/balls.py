"""The tiny preset's data: clips of a ball under exact physics, and an exact score for them.

    python -m tiny.balls --out out/demo/clips --clips 2100 --seed 0

A clip is 49 frames of 64×64 px at 16 fps: a ball, a soft Gaussian spot, before a dusky wall. It floats in a straight
line or falls, and bounces elastically off the four sides. Each axis moves on its own, so a table of all valid motions
along an axis gives the one nearest to any observed motion: the score needs no learned model. The caption names the
ninth of the picture in which the ball starts and how it sets out.

The clips that a base model is trained on, the split `train`, are such as the web has: in four of ten the ball all but
freezes in mid-clip, in three it is suddenly elsewhere, as after a cut. Those of `align` and `eval` are all good.

Out   `<id>.mp4` (H.264, about 3 KB each), metadata.csv with OpenVid-1M's columns and `split`

Units: px of the 64-px picture, px/frame, px/frame². y points down.
"""

import contextlib
import csv
import dataclasses
import functools
import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from runtime import video
from runtime.files import checksum, unchanged, whole_file
from runtime.group import alone, slow
from runtime.options import SEED, UserError, option, program, resolve, user_errors
from runtime.run import Run
from tiny.codec import GROUP, PATCH

SIZE, FRAMES, FPS = 64, 49, 16
RADIUS = 9.0  # standard deviation of the ball's Gaussian, px
WALLS = (12.0, 52.0)  # where the ball's centre turns back, px
SPEED = (0.4, 1.1)  # |velocity| along each axis at the start, px/frame
GRAVITY = 0.035  # px/frame², when falling
BALL = np.array([255, 208, 96], np.float32) / 255
WALL = np.linspace([26, 30, 62], [66, 52, 92], SIZE, dtype=np.float32)[:, None].repeat(SIZE, 1) / 255  # (h, w, 3)
COLUMNS = "video,caption,aesthetic score,motion score,temporal consistency score,camera motion,frame,fps,seconds,split"
FAULTS = {"freeze": 0.4, "cut": 0.3}  # shares of the clips of `train`
CREEP = 0.1  # the part of its speed that a freezing ball keeps: prepare.py would leave out a picture that stands still

METRICS = ("score", "valid", "traj", "shape", "dyn", "frozen", "jump")
MISSING = 16.0  # px that a missing ball counts for in traj
VALID = 3.0  # px: the traj that a valid clip has at most
JUMP = 5.0  # px/frame: no ball is faster than 2.3, and the codec adds less than 1
STILL, STILL_FRAMES = 0.2, 8  # px/frame, as the mean over so many frames: no ball is slower than 0.35


@dataclasses.dataclass(frozen=True)
class Config:
    """Renders mp4 clips of a bouncing ball with captions."""

    out: str = option("out/demo/clips", neutral=True)  # folder to write
    clips: int = option(2100, least=7)  # number of clips: 4 in 7 for train, 2 for align, 1 for eval
    faults: float = option(1.0, least=0, most=1)  # 1: the train clips as the web has them; 0: all good
    seed: int = option(0, **SEED)  # of the random motions
    workers: int | None = option(least=1, neutral=True)  # processes; not given: one for each core


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


def draw_start(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A random position (2,) px and velocity (2,) px/frame, x and y."""
    return rng.uniform(*WALLS, 2), rng.uniform(*SPEED, 2) * rng.choice([-1, 1], 2)


def path(position: np.ndarray, velocity: np.ndarray, falling: bool) -> np.ndarray:
    """The ball's centre (2, FRAMES) px, x and y."""
    return simulate(position, velocity, np.array([0, GRAVITY * falling]))


def spots(centres: np.ndarray) -> np.ndarray:
    """Light (..., SIZE, SIZE) float32 in [0, 1] of a ball at centres (..., 2) px. Pixel centres: i + 0.5."""
    axis = np.arange(SIZE, dtype=np.float32) + 0.5
    x, y = (np.exp(-0.5 * ((axis - centres[..., i, None]) / RADIUS) ** 2).astype(np.float32) for i in (0, 1))
    return y[..., :, None] * x[..., None, :]


def render(light: np.ndarray) -> np.ndarray:
    """Pictures (..., SIZE, SIZE, 3) in [0, 1] of the ball before the wall: `light` (..., SIZE, SIZE) mixes the two."""
    return WALL + light[..., None] * (BALL - WALL)


def light_of(pictures: np.ndarray) -> np.ndarray:
    """The inverse of `render`, for any pictures (..., SIZE, SIZE, 3): the nearest mixture of ball and wall."""
    direction = BALL - WALL
    weights = direction / (direction**2).sum(-1, keepdims=True)
    return sum(pictures[..., c] * weights[..., c] for c in range(3)) - (WALL * weights).sum(-1)


def caption(position: np.ndarray, velocity: np.ndarray, falling: bool) -> str:
    """For example "a ball from top left falls slowly rightwards and sharply upwards".

    No word occurs in two places, because the tiny text encoder does not tell its words' order.
    """
    column, row = np.minimum(3 * (position - WALLS[0]) / (WALLS[1] - WALLS[0]), 2).astype(int)
    at = f"{('top', 'middle', 'bottom')[row]} {('left', 'centre', 'right')[column]}"
    across, along = (int(fast) for fast in np.abs(velocity) > sum(SPEED) / 2)
    aside = f"{('slowly', 'quickly')[across]} {'rightwards' if velocity[0] > 0 else 'leftwards'}"
    up = f"{('gently', 'sharply')[along]} {'downwards' if velocity[1] > 0 else 'upwards'}"
    return f"a ball from {at} {'falls' if falling else 'floats'} {aside} and {up}"


def falls(text: str) -> bool:
    """Whether a caption's ball falls, or floats. ValueError for other captions."""
    for falling, word in enumerate(("floats", "falls")):
        if word in text.split():
            return bool(falling)
    raise ValueError(f"expected a caption of a ball that falls or floats, got {text!r}")


def split_of(index: int, clips: int) -> str:
    """The split of clip `index` of so many."""
    return "train" if 7 * index < 4 * clips else "align" if 7 * index < 6 * clips else "eval"


def make_clip(seed: int, index: int, faults: float = 0.0) -> tuple[np.ndarray, str, np.ndarray]:
    """A clip of the data set: pictures (FRAMES, SIZE, SIZE, 3) uint8, caption, path (2, FRAMES) px.

    faults scales the shares of clips whose ball freezes or jumps in mid-clip.
    """
    rng = np.random.default_rng([seed, index])
    position, velocity = draw_start(rng)
    falling, fault, when = bool(rng.integers(2)), rng.random(), int(rng.integers(8, 41))
    track = path(position, velocity, falling)
    if fault < faults * FAULTS["freeze"]:
        time = np.arange(FRAMES)
        time = np.where(time < when, time, when + CREEP * (time - when))
        track = np.stack([np.interp(time, np.arange(FRAMES), axis) for axis in track])
    elif fault < faults * sum(FAULTS.values()):
        track[:, when:] = path(*draw_start(rng), falling)[:, : FRAMES - when]
    frames = np.rint(255 * render(spots(track.T))).astype(np.uint8)
    return frames, caption(position, velocity, falling), track


# ---- score -----------------------------------------------------------------------------------------------------------


@functools.cache
def _bank(falling: bool) -> tuple[np.ndarray, np.ndarray]:
    """Valid motions along one axis on a grid of 53 positions × 60 velocities, (3180, FRAMES) px, and their squares."""
    speed = np.linspace(*SPEED, 30)
    position, velocity = np.meshgrid(np.linspace(*WALLS, 53), np.concatenate([-speed, speed]), indexing="ij")
    bank = simulate(position.ravel(), velocity.ravel(), GRAVITY * falling)
    return bank, bank * bank


DIM = 0.1  # light below this is the codec's noise
WHOLE = np.maximum(spots(np.array([SIZE / 2, SIZE / 2])) - DIM, 0).sum()  # the mass of a ball, as `detect` sees it


def detect(light: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds the ball: light (B, T, SIZE, SIZE) -> centres (B, 2, T) px, and seen (B, T): is there about one ball?"""
    bright = np.maximum(light - DIM, 0)
    axis = np.arange(SIZE, dtype=np.float32) + 0.5
    columns, rows = bright.sum(-2), bright.sum(-1)
    total = rows.sum(-1)
    centres = np.stack([columns @ axis, rows @ axis], 1) / (total[:, None] + 1e-9)
    return centres, (total > 0.5 * WHOLE) & (total < 2 * WHOLE)


def nearest_valid(centres: np.ndarray, seen: np.ndarray, falling: np.ndarray) -> np.ndarray:
    """The paths (B, 2, T) px that physics allows and that are nearest to the centres (B, 2, T) where they are seen.

    seen (B, T) and falling (B,) bool.
    """
    weight, nearest = seen.astype(np.float64), np.empty(centres.shape)
    for axis in (0, 1):
        for gravity in (False, True):
            some = (falling & (axis == 1)) == gravity
            bank, square = _bank(gravity)
            distance = weight[some] @ square.T - 2 * (weight[some] * centres[some, axis]) @ bank.T
            nearest[some, axis] = bank[distance.argmin(1)]
    return nearest


def score_clips(light: np.ndarray, captions: list[str], frames: slice = slice(None)) -> dict[str, np.ndarray]:
    """The exact score of clips for their captions: an array (B,) for each of METRICS, and `speed` (B, T − 1).

    light: (B, FRAMES, SIZE, SIZE) of `light_of`. frames: those that are judged. The valid path is the one nearest to
    the whole clip, so generated frames must go on from the given ones.
      score     −traj/4 − 10·shape; higher is better
      valid     1 if traj ≤ VALID and nothing jumps or freezes, else 0
      traj      px: distance of the ball's centre from the nearest valid path, rms over frames
      shape     rms difference between the light and a perfect ball's at the same centre
      dyn       px/frame: mean distance that the ball moves from one frame to the next
      frozen    1 if it hardly moves for STILL_FRAMES frames, else 0
      jump      1 if it moves by more than JUMP in a frame, else 0
      speed     px/frame between judged frames; NaN where the ball is not seen in both
    """
    centres, seen = detect(light)
    nearest = nearest_valid(centres, seen, np.array([falls(text) for text in captions]))
    centres, nearest, seen, light = centres[..., frames], nearest[..., frames], seen[:, frames], light[:, frames]
    off = np.where(seen, ((centres - nearest) ** 2).sum(1), MISSING**2)
    traj = np.sqrt(off.mean(1))
    blurred = light - spots(np.moveaxis(centres, 1, 2))
    shape = np.sqrt((blurred**2).mean((1, 2, 3)))
    speed = np.where(seen[:, 1:] & seen[:, :-1], np.hypot(*np.moveaxis(np.diff(centres), 1, 0)), np.nan)
    moves = np.nan_to_num(speed)
    count = np.maximum(np.isfinite(speed).sum(1), 1)
    window = min(STILL_FRAMES, moves.shape[1])
    still = np.lib.stride_tricks.sliding_window_view(speed, window, axis=1).mean(-1) < STILL if window else moves > 0
    frozen, jump = still.any(1), (moves > JUMP).any(1)
    return {
        "score": -traj / 4 - 10 * shape, "valid": (traj <= VALID) & ~jump & ~frozen, "traj": traj, "shape": shape,
        "dyn": moves.sum(1) / count, "frozen": frozen, "jump": jump, "speed": speed,
    }  # fmt: skip


def check_clips(shards, field: str, codec) -> None:
    """UserError unless a field of the shards holds clips of this world, coded by this codec."""
    wanted, got = (codec.channels, (FRAMES - 1) // GROUP + 1, SIZE // PATCH, SIZE // PATCH), shards.shape(field)
    if got != wanted:
        made = "made by another version, or of other videos? make them anew"
        raise UserError(f"{shards.folder}: expected latents {wanted} of clips of tiny.balls, got {got}; {made}")
    with user_errors():
        for row in shards.rows:
            falls(row["caption"])


def pixels(codec, x0) -> np.ndarray:
    """Latents (B, C, F, H, W) -> pictures (B, T, h, w, 3) float32 in [0, 1]."""
    return codec.decode(x0.cpu()).add_(1).div_(2).permute(0, 2, 3, 4, 1).numpy()


def score(codec, x0, captions: list[str], frames: slice = slice(None)) -> dict[str, np.ndarray]:
    """`score_clips` of the latent clips x0 (B, C, F, H, W)."""
    rows = []
    # a few at a time: fresh memory for many costs more than the score
    for i in slow(range(0, len(x0), 8), "scoring clips", "batch"):
        rows.append(score_clips(light_of(pixels(codec, x0[i : i + 8])), captions[i : i + 8], frames))
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def wasserstein(one: np.ndarray, other: np.ndarray) -> float:
    """Distance between two distributions of speed, px/frame: the mean difference of their quantiles.

    NaN, where no ball is seen, is left out; if there is nothing else, all speeds are 0, as in `dyn`.
    """
    at = np.linspace(0, 1, 1001)
    quantiles = (np.nanquantile(a, at) if np.isfinite(a).any() else np.zeros(len(at)) for a in (one, other))
    return float(np.abs(np.subtract(*quantiles)).mean())


# ---- the data set ----------------------------------------------------------------------------------------------------


def write_clip(cfg: Config, index: int) -> dict:
    """Renders clip `index` into the folder, unless it is there as it was written. Returns its row of metadata.csv."""
    split, name = split_of(index, cfg.clips), f"ball-{index:05d}.mp4"
    frames, text, track = make_clip(cfg.seed, index, cfg.faults * (split == "train"))
    path = Path(cfg.out) / name
    if not unchanged(path):
        video.write_mp4(path, frames, FPS)
        checksum(path)  # remembered, for the next start
    motion = np.hypot(*np.diff(track)).mean()
    values = (name, text, "", f"{motion:.3f}", "", "static", FRAMES, FPS, f"{FRAMES / FPS:.3f}", split)
    return dict(zip(COLUMNS.split(","), values))


def main(cfg: Config) -> None:
    cfg = resolve(cfg)
    run = Run(cfg, "tiny.balls", alone())
    if run.done:
        return
    with contextlib.ExitStack() as stack, run.progress(cfg.clips, unit="clip") as bar:
        each, rows = map, []
        if cfg.workers != 1:  # a pool of one process would be left behind if this one were killed
            deaf = dict(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))  # Ctrl-C is for this one
            pool = ProcessPoolExecutor(cfg.workers or os.cpu_count(), multiprocessing.get_context("spawn"), **deaf)
            stack.callback(pool.shutdown, cancel_futures=True)
            each = functools.partial(pool.map, chunksize=16)
        for row in each(functools.partial(write_clip, cfg), range(cfg.clips)):
            rows.append(row)
            bar.update()
    with whole_file(run.folder / "metadata.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    run.finish(["metadata.csv"] + [row["video"] for row in rows], f"{len(rows):,} clips")


if __name__ == "__main__":
    program(main, Config, __doc__)

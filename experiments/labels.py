"""Labels for the baselines' pairs: which of two clips is better, whole or segment by segment, by a named scorer.

DynamicsBoost needs none of this: in its pairs the winner is the side that was given more real frames.

    python -m experiments.labels --scorer exact --data out/demo/shards --pairs out/baseline/pairs \\
        --out out/baseline/labels
    python -m experiments.labels --scorer file --scores out_single.csv --pairs out/baseline/pairs \\
        --out out/baseline/labels

    exact        the tiny world's physics score, which also judges the models: no real user has such a scorer
    noisy        exact, with a share `--flip` of the labels turned round: a scorer that is often wrong
    appearance   what single frames show, the ball's shape: blind to motion
    real         no scorer: real frames are better than generated ones, in pairs that hold the clip itself
                 (experiments.pairs --kind real or local); of local pairs each frame has a label, outside the window 0
    file         a csv with one row a video, as VideoAlign's inference writes it: the video's name under `path`, its
                 score under --column

For `file`, experiments.decode writes the pairs as videos under the names that are looked up here. With --segments 5,
given to both, each segment is also a video of its own. A label is the sign of the difference of two scores. It is 0,
a tie, where they differ by `--tie` or less.

In    pairs of experiments.pairs
Out   labels.jsonl: for each pair its id, the scores of `first` and `second`, and the label of each segment: 1 where
      `first` is better, -1 where `second` is
Cost  decoding and scoring two clips a pair; with a file, reading it; real: none
"""

import dataclasses
import math
from pathlib import Path

import torch
from torch import Tensor

import flow
from experiments.pairs import CLIP, SIDES
from runtime.files import read_csv, read_manifest, write_jsonl
from runtime.group import alone
from runtime.options import SEED, UserError, option, program, resolve
from runtime.run import Run
from runtime.shards import Shards, pixel_frames
from tiny import balls
from tiny import codec as codecs


@dataclasses.dataclass(frozen=True)
class Config:
    """Labels the baselines' pairs."""

    pairs: str = "out/baseline/pairs"  # folder of experiments.pairs
    scorer: str = option("exact", choices=("exact", "noisy", "appearance", "real", "file"))  # who says so
    scores: str = ""  # file: the csv
    column: str = "reward_Overall"  # column with the score; by default VideoAlign's sum of all aspects
    segments: int = option(1, least=1)  # pieces of a clip, each with a label of its own; DenseDPO: 5
    flip: float = option(0.3, least=0, most=1)  # noisy: share of the labels that are turned round
    tie: float = option(0.0, least=0)  # scores that differ by no more than this are a tie
    data: str = option("out/demo/shards", empty=True)  # folder of prepare.py with the tiny world's codec; or none
    out: str = option("out/baseline/labels", neutral=True)  # folder to write
    seed: int = option(0, **SEED)  # of the flips


def segment_cuts(frames: int, segments: int) -> list[int]:
    """Where `segments` pieces of a clip's latent frames begin, and the end: 13 frames in 5: 0, 3, 6, 9, 11, 13.

    UserError if there are more pieces than frames.
    """
    if segments > frames:
        raise UserError(f"--segments: expected at most {frames}, the number of latent frames, got {segments}")
    size, longer = divmod(frames, segments)
    return [k * size + min(k, longer) for k in range(segments + 1)]


def video_name(place: int, row: dict, field: str, segment: int | None = None) -> str:
    """The file in which experiments.decode shows a field of sample `place`, whole or one segment of it."""
    side = "" if field == "x0" else f"-{field}"
    piece = "" if segment is None else f"-s{segment}"
    return f"{place:05d}-{Path(row['id']).name}{side}{piece}.mp4"


def physics_scores(codec, pairs: Shards, cuts: list[int], scorer: str, bar) -> Tensor:
    """Scores (pairs, 2, segments) by the exact physics, or by what single frames show."""
    scores = torch.zeros(len(pairs), 2, len(cuts) - 1, dtype=torch.float64)
    for first in range(0, len(pairs), 8):
        index = list(range(len(pairs)))[first : first + 8]
        captions = [pairs.rows[i]["caption"] for i in index]
        for side, field in enumerate(SIDES):
            light = balls.light_of(balls.pixels(codec, pairs.get(field, index)))
            for k, cut in enumerate(zip(cuts, cuts[1:])):
                found = balls.score_clips(light, captions, pixel_frames(*cut))
                frames_alone = found["score"] + found["traj"] / 4  # the score without its term of motion
                scores[index, side, k] = torch.from_numpy(frames_alone if scorer == "appearance" else found["score"])
        bar.update(len(index))
    return scores


def real_cuts(pairs: Shards) -> list[int]:
    """The segments in which a pair is real against generated: each frame of local pairs, the whole clip of others.

    UserError for pairs without a real side.
    """
    kind, frames = pairs.manifest["config"]["kind"], pairs.shape("first")[1]
    if CLIP[kind] not in SIDES:
        raise UserError(f"{pairs.folder}: expected pairs of --kind real or local for --scorer real, got {kind}")
    return list(range(frames + 1)) if kind == "local" else [0, frames]


def real_scores(pairs: Shards, cuts: list[int]) -> Tensor:
    """Scores (pairs, 2, segments): 1 where a segment is real, as `first` is everywhere, 0 where it is generated."""
    scores = torch.ones(len(pairs), 2, len(cuts) - 1, dtype=torch.float64)
    for i, row in enumerate(pairs.rows):
        scores[i, 1, row.get("start", 0) : row.get("end")] = 0
    return scores


def read_scores(path: Path, column: str) -> dict[str, float]:
    """The score of each video that a csv names, NaN if it is no number.

    UserError if the file is no csv, lacks the columns or names a video twice.
    """
    scores, rows = {}, read_csv(path)
    columns = rows[0].keys() if rows else ()
    if not {"path", column} <= set(columns):
        got = ", ".join(map(str, columns)) or "none"
        raise UserError(f"{path}: expected the columns path and {column}, or another --column; its columns are {got}")
    for row in rows:
        name = Path(row["path"] or "").name
        if name in scores:
            raise UserError(f"{path}: expected one score a video, got {name} twice")
        try:
            scores[name] = float(row[column] or "nan")
        except ValueError:
            scores[name] = math.nan
    return scores


def file_scores(path: Path, column: str, pairs: Shards, segments: int) -> Tensor:
    """Scores (pairs, 2, segments) of the videos that experiments.decode makes of the pairs.

    UserError as `read_scores`; for videos without a score, by name; and for pieces beyond those that are wanted.
    """

    def videos(pieces) -> list[str]:
        return [video_name(i, row, side, k) for i, row in enumerate(pairs.rows) for side in SIDES for k in pieces]

    score_of, whole = read_scores(path, column), videos([None])
    expected = videos(range(segments)) if segments > 1 else whole
    without = [video for video in expected if not math.isfinite(score_of.get(video, math.nan))]
    unknown = sorted(score_of.keys() - {*expected, *whole}) if segments > 1 else []  # other pieces have other scores
    for wrong, fault in ((without, "without one"), (unknown, "unknown")):
        if wrong:
            some = ", ".join(wrong[:3]) + (", …" if len(wrong) > 3 else "")
            raise UserError(f"{path}: expected a number for each video of the pairs, got {len(wrong)} {fault}: {some}")
    return torch.tensor([score_of[video] for video in expected], dtype=torch.float64).view(len(pairs), 2, segments)


def flipped(label: Tensor, ids: list[str], share: float, seed: int) -> Tensor:
    """Labels (pairs, segments), each turned round with probability `share`, by (seed, id, segment)."""
    draw = torch.tensor([flow.generator("flip", seed, i).random(label.shape[1]).tolist() for i in ids])
    return torch.where(draw < share, -label, label)


def main(cfg: Config) -> None:
    # ---- what to do, checked before anything is loaded
    cfg, from_file = resolve(cfg), cfg.scorer == "file"
    by_physics = cfg.scorer in ("exact", "noisy", "appearance")
    if from_file != bool(cfg.scores):
        raise UserError(f"expected --scores with --scorer file, and only there, got {cfg.scores!r} and {cfg.scorer!r}")
    if cfg.scorer == "real" and cfg.segments > 1:
        raise UserError(f"--segments: expected none with --scorer real, which has its own, got {cfg.segments}")
    inputs = {"pairs": cfg.pairs, "scores": cfg.scores, "data": cfg.data if by_physics else ""}
    run = Run(cfg, "experiments.labels", alone(), inputs)
    if run.done:
        return
    pairs = Shards(cfg.pairs, "experiments.pairs")
    cuts = real_cuts(pairs) if cfg.scorer == "real" else segment_cuts(pairs.shape("first")[1], cfg.segments)
    if by_physics:
        read_manifest(cfg.data, "prepare.py")
        codec = codecs.load(cfg.data)
        balls.check_clips(pairs, "first", codec)

    # ---- score, label
    if from_file:
        scores = file_scores(Path(cfg.scores), cfg.column, pairs, cfg.segments)
        run.claim()
    elif cfg.scorer == "real":
        scores = real_scores(pairs, cuts)
        run.claim()
    else:
        with run.progress(len(pairs), unit="pair") as bar:
            scores = physics_scores(codec, pairs, cuts, cfg.scorer, bar)
    difference = scores[:, 0] - scores[:, 1]
    label = (difference.sign() * (difference.abs() > cfg.tie)).long()
    if cfg.scorer == "noisy":
        label = flipped(label, [row["id"] for row in pairs.rows], cfg.flip, cfg.seed)

    # ---- result
    rows = [
        {"id": row["id"], "first": first, "second": second, "label": signs}
        for row, (first, second), signs in zip(pairs.rows, scores.tolist(), label.tolist())
    ]
    write_jsonl(run.folder / "labels.jsonl", rows)
    counts = [int((label == sign).sum()) for sign in (1, -1, 0)]
    figure = "{} first, {} second, {} ties".format(*counts)
    run.finish(["labels.jsonl"], f"{len(rows):,} pairs", figure, cuts=cuts)


if __name__ == "__main__":
    program(main, Config, __doc__)

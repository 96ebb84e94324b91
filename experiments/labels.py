"""Labels for the baselines' pairs: which of two samples is better, whole or segment by segment, by a named scorer.

DynamicsBoost needs none of this: of its pairs the winner is the one that was given more real frames.

    python label.py --pairs out/samples --scorer exact --data out/demo/shards --out out/labels          # tiny world
    python label.py --pairs out/samples --scorer file --scores out_single.csv --out out/labels          # real clips

    exact        the physics score of world.py, which the models are judged by, too: no real user has it
    noisy        exact, with `--flip` of the labels turned round: a scorer that is often wrong
    appearance   what single frames show, presence and shape: blind to motion
    file         a csv with a row a video, as VideoAlign's inference writes it: its name under `path` or `video`, its
                 score under `reward_Overall`, `reward_ALL`, `Overall`, `ALL` or `score`, or the `--column` you name

For `file`, sample.py --decode writes the pairs as videos to be scored, under the names that are looked for here; with
--segments 5, given to both, each segment as a video of its own, beside the whole one. A label is the sign of the
difference of two scores; 0, a tie, where they differ by `--tie` or less.

In    pairs of make_pairs.py --pairs flow or structural
Out   labels.jsonl: for each pair its id, the scores of `first` and `second` and the label of each segment, 1 where
      `first` is better, -1 where `second` is
Cost  decoding and scoring two clips a pair; of a file, reading it
"""

import csv
import dataclasses
import io
import json
import math
import os
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

import flow
from runtime import run as common
from runtime import shards as data
from runtime.run import UserError
from tiny import balls as world
from wan import vae

SCORERS = ("exact", "noisy", "appearance", "file")
SIDES = ("first", "second")
# VideoAlign, eval_videogen_rewardbench.py: out_single.csv has `path` and reward_VQ, reward_MQ, reward_TA and their sum;
# inference.py, VideoVLMRewardInference.reward: VQ, MQ, TA, Overall
NAMES, SCORES = ("path", "video"), ("reward_Overall", "reward_ALL", "Overall", "ALL", "score")


@dataclasses.dataclass(frozen=True)
class Config:
    """Labels the baselines' pairs."""

    pairs: str = "out/samples"  # folder of make_pairs.py --pairs flow or structural
    scorer: str = "exact"  # exact, noisy, appearance or file
    scores: str = ""  # file: the csv
    column: str = ""  # file: its column with the score; empty: the first it has of those above
    segments: int = 1  # pieces of a clip that are labelled one by one; DenseDPO: 5
    flip: float = 0.3  # noisy: share of the labels that are turned round
    tie: float = 0.0  # scores that differ by no more than this are a tie
    data: str = "out/demo/shards"  # folder of prepare.py with the tiny world's codec; file needs none
    out: str = "out/labels"  # folder to write
    seed: int = 0  # of the flips


def physics_scores(codec, pairs: data.Shards, cuts: list[int], scorer: str, bar) -> Tensor:
    """Scores (pairs, 2, segments) by the exact physics, or by what single frames show."""
    scores = torch.zeros(len(pairs), 2, len(cuts) - 1, dtype=torch.float64)
    for i, row in enumerate(pairs.rows):
        for side, field in enumerate(SIDES):
            clip = world.pixels(codec, pairs.get(field, [i]))[0]
            for k, (first, end) in enumerate(zip(cuts, cuts[1:])):
                found = world.score_clip(clip, row["caption"], data.pixel_frames(first, end))
                frames_alone = found["score"] + found["traj"] / 4  # what is left of the score without its motion term
                scores[i, side, k] = frames_alone if scorer == "appearance" else found["score"]
        bar.update()
    return scores


def file_scores(path: Path, column: str, pairs: data.Shards, segments: int) -> Tensor:
    """Scores (pairs, 2, segments) of the videos that sample.py --decode makes of the pairs.

    UserError for a file without the columns, a score that is no number, and videos missing, twice or unknown, by name.
    """
    parts = range(segments) if segments > 1 else [None]
    expected = [
        data.video_name(i, row, field, k)
        for i, row in enumerate(pairs.rows) for field in SIDES for k in parts
    ]  # fmt: skip
    try:
        table = csv.DictReader(io.StringIO(common.read_text(path).removeprefix("\ufeff")))
        there, lines = table.fieldnames or [], list(table)
    except csv.Error as error:
        raise UserError(f"{path}: expected a csv table, got: {error}") from None
    name = next((n for n in NAMES if n in there), None)
    column = next((n for n in ([column] if column else SCORES) if n in there), None)
    if not name or not column:
        raise UserError(
            f"{path}: expected a column {' or '.join(NAMES)} and one of {', '.join(SCORES)}, or --column; "
            f"its columns are {', '.join(there) or 'none'}"
        )
    rows = [(Path(row[name] or "").name, row[column]) for row in lines]
    count = Counter(video for video, _ in rows)
    # what sample.py writes beside them: the whole clips; for labels of whole clips, the pieces
    beside = [None, *(parts if segments > 1 else range(pairs.shape("first")[1]))]
    known = {data.video_name(i, row, f, k) for i, row in enumerate(pairs.rows) for f in SIDES for k in beside}
    wrong = {
        "a score of each video of the pairs": [video for video in expected if video not in count],
        "one score a video": [video for video, n in count.items() if n > 1],
        "videos of these pairs only": sorted(set(count) - known),
    }
    for (wanted, videos), found in zip(wrong.items(), ("without one", "twice or more", "unknown")):
        if videos:
            some = ", ".join(videos[:3]) + (", …" if len(videos) > 3 else "")
            raise UserError(f"{path}: expected {wanted}, got {len(videos)} {found}: {some}")
    score_of = dict(rows)
    for video in expected:
        try:
            score_of[video] = float(score_of[video])
        except (TypeError, ValueError):
            score_of[video] = math.nan
        if not math.isfinite(score_of[video]):
            raise UserError(f"{path}: expected a number under {column} for {video}, got {dict(rows)[video]!r}")
    return torch.tensor([score_of[video] for video in expected], dtype=torch.float64).view(len(pairs), 2, segments)


def flipped(label: Tensor, ids: list[str], share: float, seed: int) -> Tensor:
    """Labels (pairs, segments) of which each is turned round with this probability, by (seed, id, segment)."""
    draw = torch.stack([torch.rand(label.shape[1], generator=flow.generator("flip", seed, i)) for i in ids])
    return torch.where(draw < share, -label, label)


def check(cfg) -> None:
    """UserError for options that make no sense."""
    if cfg.scorer not in SCORERS:
        raise UserError(f"--scorer: expected one of {', '.join(SCORERS)}, got {cfg.scorer!r}")
    if (cfg.scorer == "file") != bool(cfg.scores):
        raise UserError(f"expected --scores with --scorer file, and only there, got {cfg.scores!r} and {cfg.scorer!r}")
    if not 0 <= cfg.flip <= 1 or not cfg.tie >= 0:
        raise UserError(f"expected --flip from 0 to 1 and --tie of at least 0, got {cfg.flip} and {cfg.tie}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"expected one process, got {os.environ['WORLD_SIZE']}: start label.py without torchrun")


def main(cfg: Config) -> None:
    # ---- what to do, checked before anything is loaded
    check(cfg)
    group = common.Group(0, 1, torch.device("cpu"))
    from_file = cfg.scorer == "file"
    inputs = {"pairs": cfg.pairs, "scores": cfg.scores, "data": "" if from_file else cfg.data}
    run = common.Run(cfg, "label", group, inputs)
    if run.done:
        return
    pairs = data.Shards(cfg.pairs, "make_pairs.py")
    if "first" not in pairs.fields():
        raise UserError(
            f"{cfg.pairs}: expected pairs of make_pairs.py --pairs flow or structural; others have an order"
        )
    frames = pairs.shape("first")[1]
    if not 1 <= cfg.segments <= frames:
        raise UserError(f"--segments: expected 1 to {frames}, the latent frames, got {cfg.segments}")
    cuts = data.segment_cuts(frames, cfg.segments)
    if not from_file:
        common.read_manifest(cfg.data, "prepare.py", verify=False)
        if not all(world.read_caption(row["caption"])[0] for row in pairs.rows):
            raise UserError(f"{cfg.pairs}: expected clips of world.py for --scorer {cfg.scorer}; else --scorer file")
        codec, channels = vae.load(cfg.data), pairs.shape("first")[0]
        if channels != codec.channels:
            raise UserError(f"{cfg.data}: expected the codec of the pairs, {channels} channels, got {codec.channels}")

    # ---- score, label
    if from_file:
        scores = file_scores(Path(cfg.scores), cfg.column, pairs, cfg.segments)
        run.claim()
    else:
        with run.progress(len(pairs), unit="pair") as bar:
            scores = physics_scores(codec, pairs, cuts, cfg.scorer, bar)
    difference = scores[:, 0] - scores[:, 1]
    label = (difference.sign() * (difference.abs() > cfg.tie)).long()
    if cfg.scorer == "noisy":
        label = flipped(label, [row["id"] for row in pairs.rows], cfg.flip, cfg.seed)

    # ---- result
    lines = [
        json.dumps({"id": row["id"], "first": s[0], "second": s[1], "label": sign})
        for row, s, sign in zip(pairs.rows, scores.tolist(), label.tolist())
    ]
    common.write_text(run.folder / "labels.jsonl", "\n".join(lines) + "\n")
    counts = [int((label == sign).sum()) for sign in (1, -1, 0)]
    print(f"label: {label.numel()} labels by {cfg.scorer}: {counts[0]} first, {counts[1]} second, {counts[2]} ties")
    run.finish(["labels.jsonl"], cuts=cuts)


if __name__ == "__main__":
    common.run(main, Config, __doc__)

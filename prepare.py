"""Stage 0, videos and captions to shards of latents and text states.

    python prepare.py --videos out/demo/clips --out out/demo/shards

The folder's captions come from metadata.csv (columns `video,caption`, as in OpenVid-1M), metadata.jsonl (the
same keys), or a `name.txt` beside each `name.mp4`. Each clip's first frames are read by decord, resized,
encoded and stored; the clips are dealt to the splits train (base and continuation model), align (pairs and cold
start) and eval by a hash of their id.

The tiny preset's VAE is a linear codec fitted on the train clips and stored beside the shards; its text states
are fixed word vectors.

In    a folder of videos
Out   shards with `x0` (C, F, H, W) and text states, and for each clip id, caption, split, motion, video;
      codec.safetensors, negative.safetensors (text states of the empty caption), rejects.jsonl (what was left
      out, and why)
Cost  decoding, and one encoder pass a clip
"""

import csv
import dataclasses
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

import common
import data
import text
import vae
import video
from common import UserError

PRESETS = {"tiny": dict(frames=49, height=64, width=64, shard_size=250)}
FIT_CLIPS = 150  # clips that the linear codec is fitted on


@dataclasses.dataclass(frozen=True)
class Config:
    """Stage 0: encodes a folder of captioned videos."""

    preset: str = "tiny"  # tiny: linear codec and word vectors
    videos: str = "out/demo/clips"  # folder of videos and captions
    out: str = "out/demo/shards"  # folder to write
    frames: int | None = None  # pixel frames a clip, of the form 4k+1; longer videos are cut to their first ones
    exact: bool = False  # reject a video that has more frames than that, too
    height: int | None = None  # px that the picture is resized to
    width: int | None = None  # px that the picture is resized to
    motion: str = "frames"  # score: frames (mean absolute difference of neighbours, 0 … 255) or column (`motion score`)
    min_motion: float = 0.0  # reject clips whose motion score is lower
    max_motion: float = float("inf")  # reject clips whose motion score is higher
    train: float = 0.6  # share of the clips for base and continuation model
    align: float = 0.2  # share for pairs and cold start; the rest is for evaluation
    bad_rows: str = "stop"  # a metadata row that cannot be used: stop the run, or reject the row and go on
    shard_size: int | None = None  # videos a shard
    workers: int = 2  # decoding threads


@dataclasses.dataclass(frozen=True)
class Item:
    """A row of the metadata."""

    id: str
    path: Path
    caption: str
    motion: str  # the `motion score` column as it stands


def read_text(path: Path) -> str:
    """The text of a file. UserError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 text, got: {error}") from None


def read_rows(folder: Path) -> tuple[str, list[dict]]:
    """Name of the metadata and its rows, dicts with `video` and `caption`. UserError if there is nothing to read."""
    if not folder.is_dir():
        raise UserError(
            f"{folder}: expected a folder of videos, got {'a file' if folder.exists() else 'no such folder'}"
        )
    if (folder / "metadata.csv").is_file():
        with open(folder / "metadata.csv", newline="", encoding="utf-8-sig") as f:
            try:
                rows = list(csv.DictReader(f))
            except (csv.Error, UnicodeDecodeError) as error:
                raise UserError(f"{folder / 'metadata.csv'}: expected a UTF-8 csv table, got: {error}") from None
        name = "metadata.csv"
    elif (folder / "metadata.jsonl").is_file():
        name, rows = "metadata.jsonl", []
        for number, line in enumerate(read_text(folder / name).splitlines(), 1):
            try:
                rows.append(json.loads(line) if line.strip() else None)
            except ValueError:
                raise UserError(f"{folder / name} line {number}: expected a JSON object, got {line[:60]!r}") from None
        rows = [row for row in rows if row is not None]
    else:
        name, rows = "name.txt", []
        for path in sorted(
            p for p in folder.rglob("*") if p.suffix.lower() in (".mp4", ".mkv", ".webm", ".mov", ".avi")
        ):
            caption = path.with_suffix(".txt")
            rows.append(
                {"video": str(path.relative_to(folder)), "caption": read_text(caption) if caption.is_file() else ""}
            )
    if not rows:
        raise UserError(
            f"{folder}: expected videos with metadata.csv, metadata.jsonl or name.mp4 + name.txt, found none"
        )
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not {"video", "caption"} <= row.keys():
            got = ", ".join(map(str, row)) if isinstance(row, dict) else repr(row)
            raise UserError(f"{folder / name} row {number}: expected the columns video,caption, got {got}")
    return name, rows


def problem(folder: Path, row: dict, seen: set[str]) -> str | None:
    """Why a metadata row cannot be used, or None."""
    name = row["video"] if isinstance(row["video"], str) else ""
    if not name or "\0" in name:
        return "it names no video"
    if not (folder / name).resolve().is_relative_to(folder.resolve()):
        return "its path leaves the folder"
    if name in seen:
        return "the video is listed twice"
    if not isinstance(row["caption"], str) or not text.WordVectors.words(row["caption"]):
        return "its caption is empty"
    return None


def read_items(cfg) -> tuple[list[Item], list[dict]]:
    """The usable rows in file order, and the rejected ones.

    UserError at the first bad row unless cfg.bad_rows is reject.
    """
    folder = Path(cfg.videos)
    name, rows = read_rows(folder)
    items, rejects, seen = [], [], set()
    for number, row in enumerate(rows, 1):
        reason = problem(folder, row, seen)
        if reason and cfg.bad_rows != "reject":
            where = f"{folder / name} row {number} ({row['video']!r})"
            raise UserError(f"{where}: {reason}; mend it, or leave such rows out with --bad_rows reject")
        if reason:
            rejects.append({"video": row["video"], "reason": reason})
            continue
        seen.add(row["video"])
        clip = str(Path(row["video"]).with_suffix(""))
        items.append(Item(clip, folder / row["video"], row["caption"].strip(), str(row.get("motion score") or "")))
    return items, rejects


def split_of(clip: str, train: float, align: float) -> str:
    """train, align or eval, by a hash of the clip's id: adding or dropping other clips moves no clip."""
    u = int.from_bytes(hashlib.blake2b(clip.encode(), digest_size=8).digest(), "big") / 2**64
    return "train" if u < train else "align" if u < train + align else "eval"


def motion_score(cfg, item: Item, frames: np.ndarray) -> float:
    """The clip's motion score. BadVideo if it lies outside the limits, or the column holds no number."""
    if cfg.motion == "column":
        try:
            score = float(item.motion)
        except ValueError:
            raise video.BadVideo(f"motion score column: expected a number, got {item.motion!r}") from None
    else:
        score = float(np.abs(np.diff(frames.astype(np.int16), axis=0)).mean())
    if not cfg.min_motion <= score <= cfg.max_motion:
        raise video.BadVideo(f"motion score {score:.3f} is outside {cfg.min_motion} … {cfg.max_motion}")
    return score


def read(cfg, item: Item) -> tuple[np.ndarray, float] | str:
    """Frames and motion score of a clip, or why it is rejected."""
    try:
        frames = video.read_clip(item.path, cfg.frames, (cfg.height, cfg.width), cfg.exact)
        return frames, motion_score(cfg, item, frames)
    except video.BadVideo as error:
        return str(error)


def fit_codec(cfg, items: list[Item], path: Path, pool) -> None:
    """Fits the linear codec on the first readable clips, train clips first, and stores it."""
    order = sorted(items, key=lambda item: split_of(item.id, cfg.train, cfg.align) != "train")
    clips = []
    for start in range(0, len(order), FIT_CLIPS):
        found = pool.map(lambda item: read(cfg, item), order[start : start + FIT_CLIPS])
        clips += [video.to_pixels(clip[0]) for clip in found if not isinstance(clip, str)]
        if len(clips) >= FIT_CLIPS:
            break
    if len(clips) < 2:
        first = next((f"; {i.path.name}: {r}" for i in order if isinstance(r := read(cfg, i), str)), "")
        raise UserError(f"{cfg.videos}: expected at least 2 usable videos, got {len(clips)}{first}")
    vae.LinearVAE.fit(torch.stack(clips[:FIT_CLIPS])).save(path)


def encode_shard(cfg, k: int, items: list[Item], codec, encoder, folder: Path, pool) -> None:
    """Reads, encodes and writes shard k."""
    rows, x0, kept, rejects = [], [], [], []
    for item, clip in zip(items, pool.map(lambda item: read(cfg, item), items)):
        if isinstance(clip, str):
            rejects.append({"video": str(item.path.relative_to(cfg.videos)), "reason": clip})
            continue
        frames, motion = clip
        x0.append(codec.encode(video.to_pixels(frames)[None])[0])
        split = split_of(item.id, cfg.train, cfg.align)
        row = {"id": item.id, "caption": item.caption, "split": split, "motion": round(motion, 4)}
        rows.append({**row, "video": str(item.path.relative_to(cfg.videos))})
        kept.append(item.caption)
    data.write_shard(folder, k, rows, {"x0": x0}, encoder.encode(kept), rejects)


def main(cfg: Config) -> None:
    # ---- what to do, checked before anything is decoded
    cfg = common.resolve(cfg, PRESETS)
    group = common.start_group()
    if cfg.frames % 4 != 1 or cfg.frames < 5:
        near = max(5, cfg.frames // 4 * 4 + 1)
        raise UserError(f"--frames: expected 4k+1 (a latent frame holds 4), at least 5, got {cfg.frames}; try {near}")
    if cfg.height % vae.PATCH or cfg.width % vae.PATCH:
        raise UserError(f"--height, --width: expected multiples of {vae.PATCH}, got {cfg.height} x {cfg.width}")
    if cfg.train < 0 or cfg.align < 0 or cfg.train + cfg.align > 1:
        raise UserError(f"--train, --align: expected shares that add up to at most 1, got {cfg.train} and {cfg.align}")
    if cfg.motion not in ("frames", "column") or cfg.bad_rows not in ("stop", "reject"):
        raise UserError(
            f"expected --motion frames or column and --bad_rows stop or reject, got {cfg.motion} and {cfg.bad_rows}"
        )
    items, rejects = read_items(cfg)
    run = common.Run(cfg, "prepare", group)
    if run.done:
        return
    run.claim()

    # ---- the codec, then a shard at a time; shards that an earlier run finished are kept
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))  # the other half decodes
    with ThreadPoolExecutor(cfg.workers) as pool:
        if group.main and not (run.folder / "codec.safetensors").exists():
            fit_codec(cfg, items, run.folder / "codec.safetensors", pool)
        group.barrier()
        codec, encoder = vae.load(run.folder), text.WordVectors()
        shards = [items[i : i + cfg.shard_size] for i in range(0, len(items), cfg.shard_size)]
        bar = run.progress(len(items), unit="clip")
        for k in range(group.rank, len(shards), group.size):
            if not data.shard_is_whole(run.folder, k):
                encode_shard(cfg, k, shards[k], codec, encoder, run.folder, pool)
            bar.update(len(shards[k]) * group.size)
        bar.close()

    # ---- result
    group.barrier()
    files, kept = [], 0
    if group.main:
        files, kept, rejected = data.collect(run.folder, len(shards), rejects)
        print(
            f"prepare: kept {kept} clips, rejected {rejected}"
            + (f", see {run.folder / 'rejects.jsonl'}" if rejected else "")
        )
        common.write_tensors(run.folder / "negative.safetensors", {"text": encoder.encode([""])[0]})
        files += ["codec.safetensors", "negative.safetensors"]
    run.finish(files, clips=kept)


if __name__ == "__main__":
    common.run(main, Config, __doc__)

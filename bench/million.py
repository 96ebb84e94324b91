"""What a million clips cost before a GPU has work: shards, rows and a table, made up, with tensors of a few bytes.

    python -m bench.million                            1,000,000 clips in shards of 32, as prepare.py makes them
    python -m bench.million --clips 400000 --size 4    100,000 shards, as make_pairs.py --preset 14b makes them

Prints seconds, and growth of memory, of what every process does at the start of a stage, and the first one at its end.
All is written to a temporary folder, and removed. The bytes of real latents come on top: docs/scale.md counts them.
"""

import contextlib
import csv
import dataclasses
import os
import tempfile
import time
from pathlib import Path

import torch

import flow
import prepare
from runtime.files import write_manifest
from runtime.options import arguments, option
from runtime.shards import Shards, batch_order, collect, write_shard

CAPTION = "the camera moves slowly past trees and houses while people walk along the river " * 8  # 640 characters


@dataclasses.dataclass(frozen=True)
class Config:
    """Makes shards up and reads them."""

    clips: int = option(1_000_000, least=1)  # number of clips
    size: int = option(32, least=1)  # clips of a shard


def resident() -> float:
    """MiB of this process in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextlib.contextmanager
def timed(what: str):
    before, start = resident(), time.perf_counter()
    yield
    print(f"{what:50s} {time.perf_counter() - start:8.1f} s  {resident() - before:+7.0f} MiB", flush=True)


def name_of(i: int) -> str:
    return f"OpenVid_part{i % 100}/clip_{i:08d}_0_100"


def make_shards(folder: Path, clips: int, size: int) -> None:
    """A finished folder of shards, by the functions that prepare.py ends with."""
    folder.mkdir()
    shards = -(-clips // size)
    with timed(f"write_shard: {shards:,} shards of {size}"):
        for k in range(shards):
            inside = range(k * size, min((k + 1) * size, clips))
            facts = {"caption": CAPTION, "split": "train", "motion": 3.25, "start": 0.0}
            rows = [{"id": name_of(i), "video": f"{name_of(i)}.mp4", **facts} for i in inside]
            write_shard(folder, k, rows, {"x0": torch.zeros(len(rows), 1)}, [torch.zeros(2, 4)] * len(rows), [])
    with timed("collect"):
        files = collect(folder, shards, [])[0]
    with timed(f"write_manifest: {len(files):,} files"):
        write_manifest(folder, files, stage="prepare")


def read_shards(folder: Path, size: int) -> None:
    """What a stage that trains does at its start; then it reads a clip of every shard."""
    with timed("Shards: opened for the first time"):
        Shards(folder, "prepare.py")
    with timed("Shards: opened again"):
        clips = Shards(folder, "prepare.py")
    with timed("batch_order: the first of an epoch"):
        batch_order(len(clips), 32, 0, ("sft", 0), flow.generator)
    with timed("Shards.get: a clip of every shard"):
        for i in range(0, len(clips), size):
            clips.get("x0", [i])


def make_videos(folder: Path, clips: int) -> Path:
    """Empty videos in 100 folders, and a table of them like OpenVid-1M's, which does not name the folders."""
    for part in range(100):
        (folder / f"OpenVid_part{part}").mkdir(parents=True)
    with open(folder / "table.csv", "w", newline="", encoding="utf-8") as f:
        table = csv.writer(f)
        table.writerow(["video", "caption", "aesthetic score", "motion score"])
        for i in range(clips):
            (folder / f"{name_of(i)}.mp4").touch()
            table.writerow([f"{Path(name_of(i)).name}.mp4", CAPTION, 5.0, 3.25])
    return folder / "table.csv"


def main() -> None:
    given = arguments(Config, __doc__)
    with tempfile.TemporaryDirectory() as root:
        make_shards(Path(root, "shards"), given.clips, given.size)
        read_shards(Path(root, "shards"), given.size)
        table = make_videos(Path(root, "videos"), given.clips)
        with timed("prepare.read_items"):
            prepare.read_items(prepare.Config(videos=str(table.parent), metadata=str(table)))


if __name__ == "__main__":
    main()

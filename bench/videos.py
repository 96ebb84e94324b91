"""Measures what video.Decoder does with videos of every kind, right, wrong or refused, and how fast. Needs no GPU.

    python -m bench.videos             prints the page
    python -m bench.videos --write     writes it to docs/videos.md

tests/hostile.py makes every file and draws each picture's number into it. video.Decoder is compared with a plain loop:
decord.VideoReader(path, width, height, num_threads=1).get_batch(range(n)). Takes some five minutes on one core.
"""

import collections
import os
import platform
import re
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import av
import hostile
from helpers import real_clips
from tqdm import tqdm

from runtime import video
from runtime.files import commit

ROOT = Path(__file__).resolve().parent.parent
WAYS = ((49, None, None), (49, (288, 512), 16))  # frames, size, fps
DEADLINE = 10.0  # s a file
DAMAGED = ("25 fps", "HEVC", "VP9", "AV1", "B-frames, MPEG-4", "MPEG-2, ts", "Motion JPEG", "alpha, FFV1")
COPIES = 63  # damaged copies of each
FRAMES = 33  # read of a damaged file
ROUNDS = 15  # of the race
PLAIN = """
import json, sys
import decord
decord.logging.set_level(decord.logging.QUIET)
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    height, width = request["size"]
    try:
        reader = decord.VideoReader(request["path"], width=width, height=height, num_threads=1)
        pictures = reader.get_batch(range(request["frames"])).asnumpy()
        del reader
        answer = {"clips": [{}] * request["send"], "shape": pictures.shape}
    except Exception as error:
        answer = {"clips": [], "error": type(error).__name__}
    print(json.dumps(answer), flush=True)
    if answer["clips"]:
        sys.stdout.buffer.write(pictures.data)
        sys.stdout.flush()
"""


class Plain(video.Decoder):
    """The plain decord loop, in a process that is killed and started again as video.Decoder's is."""

    program = [sys.executable, "-c", PLAIN]

    def load(self, path: Path, frames: int, size: tuple[int, int], send: bool = False) -> tuple[dict, list]:
        """Reads frames; send: into this process."""
        return self._ask(path=str(path), frames=frames, size=size, send=send)

    def wrong(self, case: hostile.Case, frames: int) -> int | str:
        """The number of wrong pictures that it returns, or the error's name."""
        try:
            answer, pictures = self.load(case.path, frames, case.shape, send=True)
        except video.BadVideo as error:
            return str(error).split(" (")[0]
        return answer.get("error") or case.wrong(pictures[0], case.expected(frames), stretched=True)


def table(head: str, rows: list) -> str:
    lines = [head, "|".join(["", *["---"] * (head.count("|") - 1), ""])]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]) + "\n"


def count_class(case: hostile.Case, name: str, ours: video.Decoder, plain: Plain, total: collections.Counter) -> list:
    """A row of the table. Adds its numbers to the total."""
    results, wrong, slowest, frames = [], 0, 0.0, WAYS[0][0]
    for count, size, fps in WAYS:
        began, expected = time.perf_counter(), case.expected(count, fps)
        try:
            clip = ours.read(case.path, count, size, fps)[0]
            wrong += case.wrong(clip.frames, expected, stretched=size is None)
            results.append(f"read by {clip.reader}")
        except video.BadVideo as error:
            results.append(f"refused: {str(error).replace('|', '/')}")
        slowest = max(slowest, time.perf_counter() - began)
    read = [result.startswith("read") for result in results]
    healthy = case.must == "read" and case.expected(frames) is not None
    bad = plain.wrong(case, frames)
    known = isinstance(bad, int)
    total.update(wrong=wrong, read=any(read), healthy=healthy, good=healthy and read[0])
    total.update(plain=bad if known else 0, plain_files=known and bad > 0)
    total["slowest"] = max(total["slowest"], slowest)
    result = results[0] + ("" if read[0] == read[1] else f"; at 16 a second {results[1]}")
    return [name, result, wrong if any(read) else "", f"{slowest:.2f}", f"{bad} of {frames}" if known else bad]


def classes(folder: Path) -> str:
    total, rest = collections.Counter(), collections.Counter()
    with video.Decoder(DEADLINE) as ours, Plain(DEADLINE) as plain:
        names = tqdm(hostile.CASES, "classes", unit="class")
        rows = [count_class(hostile.make(name, folder), name, ours, plain, total) for name in names]
        unseen = [count_class(hostile.make(name, folder), name, ours, plain, rest) for name in hostile.UNSEEN]
    head = "| class | result | wrong frames | s | plain decord: wrong frames |"
    return f"""## Classes

{len(rows)} classes, each read twice: its first 49 frames at their own size, and 49 frames at 16 a
second and 288x512. Of the {total["healthy"]} that are healthy and long enough {total["good"]} were read; of all,
in one way or both, {total["read"]}. The slowest took {total["slowest"]:.1f} s.
**Frames that were accepted and wrong: {total["wrong"]}.** Plain decord returned {total["plain"]} wrong frames,
in {total["plain_files"]} classes, without an error.

{table(head, rows)}
## What is not seen

These files are not among the classes above. A packet is cut out of a stream, and the times after it
are moved up, so that there is no gap to see. The same may happen to streams that were joined
elsewhere than at a key frame, and to a stream that holds a packet twice.

{table(head, unseen)}"""


def count_damage(case: hostile.Case, ours: video.Decoder, plain: Plain) -> collections.Counter:
    """What happened to damaged copies of one file."""
    whole, tally, expected = case.path.read_bytes(), collections.Counter(), case.expected(FRAMES)
    for seed in range(COPIES):
        case.path.write_bytes(hostile.spoil(whole, seed))
        kind, bad = "cut" if seed % 2 else "flipped", plain.wrong(case, FRAMES)
        tally.update({kind: 1, f"plain, {kind}": isinstance(bad, int) and bad > 0})
        try:
            frames = ours.read(case.path, FRAMES)[0].frames
        except video.BadVideo:
            tally[f"refused, {kind}"] += 1
            continue
        wrong = case.wrong(frames, expected, stretched=True)
        tally.update({f"wrong, {kind}": wrong > 0, "frames": len(frames), "wrong frames": wrong})
    return tally


def damage(folder: Path) -> str:
    with video.Decoder(DEADLINE) as ours, Plain(DEADLINE) as plain:
        names = tqdm(DAMAGED, "random damage", unit="codec")
        rows = {name: count_damage(hostile.make(name, folder), ours, plain) for name in names}
    rows["**all**"] = sum(rows.values(), collections.Counter())
    kinds = [f"{what}{kind}" for kind in ("cut", "flipped") for what in ("", "refused, ", "wrong, ", "plain, ")]
    cells = [[name, *(t[kind] for kind in kinds), f"{t['wrong frames']} of {t['frames']}"] for name, t in rows.items()]
    head = "| file | cut | refused | wrong | plain decord: wrong | flipped | refused | wrong | plain decord: wrong | "
    return f"""## Random damage

{len(DAMAGED) * COPIES} files: half of them cut at a random place, half with 1 … 100 random bits flipped,
anywhere in the file; {FRAMES} frames are asked for. Most video formats carry no checksum of the picture:
if a decoder can make sense of a flipped bit, it becomes a picture, and nothing in the file shows
that it is wrong. "Wrong" counts the files of which a frame with an unexpected number was accepted.

{table(head + "wrong frames |", cells)}"""


def speed(folder: Path, frames: int = 49, size: tuple[int, int] = (288, 512)) -> str:
    real = real_clips()
    files = {"bigbuckbunny": (real["bigbuckbunny"], (720, 1280)), "bikes": (real["bikes"], (272, 640))}
    for codec in ("libx264", "libx265"):
        case = hostile.write(folder / f"{codec}.mp4", codec=codec, shape=(480, 832))
        files[f"rendered, {codec}"] = case.path, case.shape
    spent, readers = {name: [] for name in files}, {}
    with video.Decoder() as ours, Plain() as plain:
        for _ in tqdm(range(ROUNDS + 1), "speed", unit="round"):
            for name, (path, shape) in files.items():
                scale = max(a / b for a, b in zip(size, shape))
                cover = [max(a, round(b * scale)) for a, b in zip(size, shape)]
                began = time.perf_counter()
                clip = ours.read(path, frames, size, fps=16)[0]
                between, readers[name] = time.perf_counter(), clip.reader
                plain.load(path, clip.index[-1] + 1, cover)
                spent[name].append((time.perf_counter() - between, between - began))
    rows = []
    for name, rounds in spent.items():
        theirs, mine = (min(times) for times in zip(*rounds[1:]))  # the first round starts processes
        rows.append((name, readers[name], f"{1 / theirs:.1f}", f"{1 / mine:.1f}", f"{theirs / mine:.2f}"))
    return f"""## Speed

A clip as prepare.py reads it, {frames} pictures of {size[0]}x{size[1]} at 16 a second. Plain decord decodes the
same run of frames, at the size that covers the picture. One worker each, {ROUNDS} rounds by turns:
the fastest of each. The time of video.Decoder ends when the checked pictures are in the parent
process; plain decord does not send its pictures anywhere.

{table("| file | read by | plain decord, clips/s | video.Decoder, clips/s | ratio |", rows)}"""


def head() -> str:
    names = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
    cpu = (re.findall(r"model name\s*: (.*)", names) or [platform.processor()])[0]
    packages = ", ".join(f"{name} {version(name)}" for name in ("decord", "av", "numpy"))
    return f"""# Videos of every kind

Written by `python -m bench.videos --write`: {cpu}, {os.cpu_count()} cores, {platform.system()}; Python
{platform.python_version()}, {packages}, FFmpeg {av.ffmpeg_version_info} in av; commit {commit()}.

Every file is made for this page, and each of its pictures shows its own number as black and white
blocks, so that each frame that comes back is checked. What a file shows follows from how it was
made. "Plain decord" is `VideoReader(path, width, height, num_threads=1).get_batch(range(n))`, in a
process that is killed after {DEADLINE:g} s.
"""


def main() -> None:
    if sys.argv[1:] not in ([], ["--write"]):
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        parts = [head()]
        for part in (classes, damage, speed):
            (home := Path(folder, part.__name__)).mkdir()
            parts.append(part(home))
    text = "\n".join(parts)
    print(text)
    if sys.argv[1:] == ["--write"]:
        page = ROOT / "docs/videos.md"
        cuts = page.read_text(encoding="utf-8").partition("\n## Cuts\n")[1:]  # bench.cuts's part stays
        page.write_text(text + "".join(cuts), encoding="utf-8")


if __name__ == "__main__":
    main()

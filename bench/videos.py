"""What becomes of videos of every kind: read right, read wrong or refused, and what that costs. Needs no GPU.

    python bench/videos.py             prints the page
    python bench/videos.py --write     writes it to docs/videos.md

Every file is made here (tests/hostile.py), with its number drawn into each picture. Beside video.Decoder stands a plain
decord loop: VideoReader(path, width, height, num_threads=1).get_batch(range(n)). Some five minutes on one core.
"""

import argparse
import collections
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import av
import hostile
import numpy as np
from helpers import real_clips
from tqdm import tqdm

from runtime import video

ROOT = Path(__file__).resolve().parent.parent
WAYS = ((49, None, None), (49, (288, 512), 16))  # frames, size, fps
DEADLINE = 10.0  # s a file
DAMAGED = ("25 fps", "HEVC", "VP9", "AV1", "B-frames, MPEG-4", "MPEG-2, ts", "Motion JPEG", "alpha, FFV1")
FRAMES = 33  # of a damaged file
PLAIN = """
import json, sys, time
import decord
decord.logging.set_level(decord.logging.QUIET)
print("ready", flush=True)
for line in sys.stdin:
    path, frames, h, w, send = json.loads(line)
    began, pictures = time.perf_counter(), None
    try:
        reader = decord.VideoReader(path, width=w, height=h, num_threads=1)
        pictures = reader.get_batch(range(frames)).asnumpy()
        del reader
        answer = {"clips": [{"shape": pictures.shape}] * send, "seconds": time.perf_counter() - began}
    except Exception as error:
        answer = {"failed": type(error).__name__}
    print(json.dumps(answer), flush=True)
    if answer.get("clips"):
        sys.stdout.buffer.write(pictures.data)
        sys.stdout.flush()
"""


class Plain(video.Decoder):
    """The plain decord loop, in a process that is killed and started again as video.Decoder's is."""

    program = [sys.executable, "-c", PLAIN]

    def seconds(self, path: Path, frames: int, size: tuple[int, int]) -> float:
        """What the loop takes, without sending the pictures anywhere."""
        return self._ask(json.dumps([str(path), frames, *size, False]))[0]["seconds"]

    def pictures(self, path: Path, frames: int, size: tuple[int, int]) -> np.ndarray | str:
        """(T, h, w, 3), or what went wrong."""
        try:
            answer, arrays = self._ask(json.dumps([str(path), frames, *size, True]))
        except video.BadVideo as error:
            return str(error).split(" (")[0]
        return answer.get("failed") or arrays[0]


def table(head: str, rows: list[tuple]) -> str:
    lines = [head, "|".join(["", *["---"] * (head.count("|") - 1), ""])]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]) + "\n"


def plainly(reason: str, case: hostile.Case) -> str:
    """A refusal without what differs from run to run."""
    reason = re.sub(r"\[Errno \d+\] |: '?" + re.escape(str(case.path)) + "'?| @ 0x[0-9a-f]+", "", reason)
    return reason.replace("|", "/")


# ---- every class -----------------------------------------------------------------------------------------------------


def count_class(name: str, folder: Path, ours: video.Decoder, plain: Plain) -> tuple[list, dict]:
    """A row of the table, and its numbers."""
    case, results, wrong, spent = hostile.make(name, folder), [], 0, 0.0
    for frames, size, fps in WAYS:
        began, expected = time.perf_counter(), case.expected(frames, fps)
        try:
            clip = ours.read(case.path, frames, size, fps)[0]
            wrong += case.wrong(clip.frames, expected, stretched=size is None)
            results.append(f"read by {clip.reader}")
        except video.BadVideo as error:
            results.append(f"refused: {plainly(str(error), case)}")
        spent = max(spent, time.perf_counter() - began)
    frames = WAYS[0][0]
    pictures, expected = plain.pictures(case.path, frames, case.shape), case.expected(frames)
    bad = None if isinstance(pictures, str) else case.wrong(pictures, expected, stretched=True)
    read = [result.startswith("read") for result in results]
    result = results[0] + ("" if read[0] == read[1] else f"; at 16 a second {results[1]}")
    row = [name, result, wrong if any(read) else "", f"{spent:.2f}", pictures if bad is None else f"{bad} of {frames}"]
    healthy = case.must == "read" and expected is not None
    facts = dict(wrong=wrong, read=any(read), healthy=healthy, spent=spent, good=healthy and read[0])
    return row, facts | dict(plain=bad or 0, plain_files=bool(bad))


def classes(folder: Path) -> str:
    rows, total = [], collections.Counter()
    with video.Decoder(DEADLINE) as ours, Plain(DEADLINE) as plain:
        for name in tqdm(hostile.CASES, "classes", unit="class"):
            row, facts = count_class(name, folder, ours, plain)
            rows.append(row)
            slowest = max(total["slowest"], facts.pop("spent"))
            total.update(facts)
            total["slowest"] = slowest
        unseen = [count_class(name, folder, ours, plain)[0] for name in hostile.UNSEEN]
    head = "| class | result | wrong frames | s | plain decord: wrong frames |"
    text = CLASSES.format(classes=len(rows), **total)
    return "\n".join([text, table(head, rows), UNSEEN, table(head, unseen)])


# ---- random damage ---------------------------------------------------------------------------------------------------


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each picture, dB."""
    return 10 * np.log10(255**2 / np.maximum(1e-9, ((a.astype(np.float32) - b) ** 2).mean((1, 2, 3))))


def count_damage(name: str, files: int, folder: Path, ours, plain) -> tuple[collections.Counter, collections.Counter]:
    """Of one class of file: what happened, and why files were refused."""
    case, tally, reasons = hostile.make(name, folder), collections.Counter(), collections.Counter()
    whole, healthy, expected = case.path.read_bytes(), ours.read(case.path, FRAMES)[0].frames, case.expected(FRAMES)
    for seed in range(files):
        case.path.write_bytes(hostile.spoil(whole, seed))
        kind = "cut" if seed % 2 else "flipped"
        tally[kind] += 1
        pictures = plain.pictures(case.path, FRAMES, case.shape)
        bad = 0 if isinstance(pictures, str) else case.wrong(pictures, expected, stretched=True)
        tally[f"plain, {kind}"] += bad > 0
        try:
            frames = ours.read(case.path, FRAMES)[0].frames
        except video.BadVideo as error:
            reason = plainly(str(error), case)
            tally["hung"] += "longer than" in reason
            tally["died"] += "died" in reason
            tally[f"refused, {kind}"] += 1
            reasons[re.sub(r"[\d.]+", "N", reason.split(":")[0])] += 1
            continue
        wrong = case.wrong(frames, expected, stretched=True)
        tally[f"wrong, {kind}"] += wrong > 0
        tally["frames"] += len(frames)
        tally["wrong frames"] += wrong
        if wrong == 0:
            low = int((psnr(frames, healthy) < 30).sum())
            tally["damaged frames"] += low
            tally["files damaged"] += low > 0
    return tally, reasons


def damage(folder: Path, files: int) -> str:
    rows, total, reasons = [], collections.Counter(), collections.Counter()
    with video.Decoder(DEADLINE) as ours, Plain(DEADLINE) as plain:
        for name in tqdm(DAMAGED, "random damage", unit="codec"):
            tally, why = count_damage(name, -(-files // len(DAMAGED)), folder, ours, plain)
            total += tally
            reasons += why
            rows.append((name, tally))
    cells = []
    for name, t in [*rows, ("**all**", total)]:
        cells.append((
            name, t["cut"], t["refused, cut"], t["wrong, cut"], t["plain, cut"],
            t["flipped"], t["refused, flipped"], t["wrong, flipped"], t["plain, flipped"],
            f"{t['wrong frames']} of {t['frames']}", t["damaged frames"], t["hung"], t["died"],
        ))  # fmt: skip
    why = table("| reason | files |", reasons.most_common(12))
    text = DAMAGE.format(files=total["cut"] + total["flipped"], frames=FRAMES)
    return "\n".join([text, table(DAMAGE_HEAD, cells), why])


# ---- spinning decoders and speed -------------------------------------------------------------------------------------


def spins(folder: Path, times: int, deadline: float = 0.5) -> str:
    healthy, late, read = hostile.make("25 fps", folder), [], 0
    spin = folder / "spin.mp4"
    spin.write_bytes(b"")
    with video.Decoder() as decoder:
        decoder.program = [sys.executable, "-c", hostile.SPIN]
        for _ in tqdm(range(times), "spins", unit="spin"):
            decoder.deadline = DEADLINE
            read += healthy.wrong(decoder.read(healthy.path, 17)[0].frames, healthy.expected(17), stretched=True) == 0
            began, decoder.deadline = time.perf_counter(), deadline
            try:
                decoder.read(spin, 17)
            except video.BadVideo as error:
                late += [time.perf_counter() - began - deadline] if "longer than" in str(error) else []
    return SPINS.format(times=times, deadline=deadline, killed=len(late), late=max(late), read=read)


def speed(folder: Path, rounds: int = 15, frames: int = 49, size: tuple[int, int] = (288, 512)) -> str:
    """A B A B: a clip as prepare.py reads it, with the pictures in the parent, and the plain loop's own seconds on the
    frames that were decoded for it.
    """
    real = real_clips()
    files = {"bigbuckbunny": (real["bigbuckbunny"], (720, 1280)), "bikes": (real["bikes"], (272, 640))}
    for codec in ("libx264", "libx265"):
        case = hostile.write(folder / f"{codec}.mp4", codec=codec, shape=(480, 832))
        files[f"rendered, {codec}"] = case.path, case.shape
    spent, readers = {name: [] for name in files}, {}
    with video.Decoder() as ours, Plain() as plain:
        for _ in tqdm(range(rounds + 1), "speed", unit="round"):
            for name, (path, shape) in files.items():
                scale = max(a / b for a, b in zip(size, shape))
                cover = [max(a, round(b * scale)) for a, b in zip(size, shape)]
                began = time.perf_counter()
                clip = ours.read(path, frames, size, fps=16)[0]
                mine, readers[name] = time.perf_counter() - began, clip.reader
                spent[name].append((plain.seconds(path, clip.index[-1] + 1, cover), mine))
    rows, kept = [], {name: np.array(pairs[1:]) for name, pairs in spent.items()}  # the first round starts processes
    for name, seconds in [*kept.items(), ("**all**", sum(kept.values()))]:
        ratio, fastest = seconds[:, 0] / seconds[:, 1], seconds.min(0)
        rates = [f"{(1 if name in files else len(files)) / each:.1f}" for each in fastest]
        spread = f"{np.median(ratio):.2f} ({ratio.min():.2f} … {ratio.max():.2f})"
        rows.append((name, readers.get(name, ""), *rates, f"{fastest[0] / fastest[1]:.2f}", spread))
    text = SPEED.format(frames=frames, h=size[0], w=size[1], rounds=rounds)
    head = "| file | read by | plain decord, clips/s | video.Decoder, clips/s | ratio | of each round |"
    return "\n".join([text, table(head, rows)])


# ---- the page --------------------------------------------------------------------------------------------------------

HEAD = """# Videos of every kind

Written by `python bench/videos.py --write`: {made}.

Every file is made for this page, with its number drawn into each picture as black and white blocks, so that each frame
that comes back is checked. What a file shows follows from how it was made. "Plain decord" is
`VideoReader(path, width, height, num_threads=1).get_batch(range(n))`, in a process that is killed after {deadline:g} s.
"""
CLASSES = """## Classes

{classes} classes, each read twice: its first 49 frames at their own size, and 49 frames at 16 a second and 288x512.
Of the {healthy} that are healthy and long enough {good} were read; of all, in one way or both, {read}. The slowest
took {slowest:.1f} s. **Frames that were accepted and wrong: {wrong}.** Plain decord returned {plain} wrong frames, in
{plain_files} classes, without an error.
"""
UNSEEN = """## What is not seen

Not among the classes above: a packet is cut out of a stream and the times after it are moved up, so that no gap tells.
So it may be with streams that were joined where no key frame is, and with a packet that is there twice.
"""
DAMAGE = """## Random damage

{files} files: half of them cut at a random place, half with 1 … 100 random bits flipped, anywhere in the file; {frames}
frames are asked for. Most video formats carry no checksum of the picture: a flipped bit that a decoder can make sense
of becomes a picture, and nothing in the file tells it from a right one. "Wrong": files of which a frame was accepted
whose number is not the expected one. "Damaged frames": those with the right number, in files without a wrong one, that
have less than 30 dB PSNR against the undamaged file's.
"""
DAMAGE_HEAD = (
    "| file | cut | refused | wrong | plain decord: wrong | flipped | refused | wrong | plain decord: wrong | "
    "wrong frames | damaged frames | killed at the deadline | died |"
)
SPINS = """## Decoders that hang

{times} times a decoder was made to spin for ever while it holds Python's lock, with a deadline of {deadline:g} s:
{killed} were killed, at most {late:.2f} s late, and {read} of the {times} healthy files between them were read right.
"""
SPEED = """## Speed

A clip as prepare.py takes it, {frames} pictures of {h}x{w} at 16 a second, against plain decord on the run of
frames that has to be decoded for it, at the size that covers the picture. One worker each, {rounds} rounds by turns:
the fastest round of each, and the median (and range) of the rounds' own ratios. Plain decord's time is its loop's own;
video.Decoder's ends when the checked pictures are in the parent.
"""


def page(files: int, times: int) -> str:
    """The whole page, as Markdown."""
    git = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    names = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    cpu = (re.findall(r"model name\s*: (.*)", names) or [platform.processor()])[0]
    made = f"{cpu}, {os.cpu_count()} cores, {platform.system()}; Python {platform.python_version()}, "
    made += ", ".join(f"{n} {version(n)}" for n in ("decord", "av", "numpy"))
    made += f", FFmpeg {av.ffmpeg_version_info} in av; commit {git.stdout.strip() or 'unknown'}"
    with tempfile.TemporaryDirectory() as folder:
        at = [Path(folder) / part for part in ("classes", "damage", "spins", "speed")]
        for part in at:
            part.mkdir()
        parts = [classes(at[0]), damage(at[1], files), spins(at[2], times), speed(at[3])]
    return "\n".join([HEAD.format(made=made, deadline=DEADLINE), *parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/videos.md")
    parser.add_argument("--files", type=int, default=500, help="damaged files")
    parser.add_argument("--spins", type=int, default=100, help="decoders that hang")
    args = parser.parse_args()
    text = page(args.files, args.spins)
    print(text)
    if args.write:
        (ROOT / "docs/videos.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

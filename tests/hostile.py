"""Videos of every kind that a folder of clips may hold, healthy, odd, damaged and malicious.

    case = hostile.make("HEVC, open GOP", folder)       writes case.path; `hostile.CASES` names the classes
    hostile.number(frame, case.shape)                   the number that a picture carries, or None

Every picture carries its number as black and white blocks, so that each frame that a reader returns can be checked.
What a file shows follows from how it was made and from the timestamps that were written; no decoder is asked.
"""

import functools
import os
import random
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np

os.environ["SVT_LOG"] = "0"  # the AV1 encoder talks otherwise
N = 90  # frames of most files
SHAPE = (144, 256)
SLACK = Fraction(2, 1000)  # s that a frame may be early: some containers round to a millisecond
ROOT = Path(__file__).resolve().parent.parent
# decode.py, except that it spins on "spin.mp4" as decord may: for ever, while it holds Python's lock
SPIN = f"""
import re, sys; sys.path.insert(0, {str(ROOT)!r})
from runtime import decode
look = decode.look
decode.look = lambda path, *a: re.match("(a+)+$", "a" * 64 + "b") if path.endswith("spin.mp4") else look(path, *a)
decode.main()
"""


# ---- pictures --------------------------------------------------------------------------------------------------------


@functools.lru_cache(1000)
def picture(n: int, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    """Picture n, (h, w, 3) uint8: 4 x 4 blocks in the middle over a moving texture. The blocks: 8 bits, 8 to check."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    waves = (x / 9 + 0.35 * n, y / 7 - 0.2 * n, (x + y) / 15 + 0.3 * n)
    out = np.stack([128 + 55 * np.sin(a) * np.cos(b / 3) for a, b in zip(waves, waves[1:] + waves[:1])], -1)
    cell = min(shape) // 8
    top, left = (shape[0] - 4 * cell) // 2, (shape[1] - 4 * cell) // 2
    code = np.array([_word(n) >> i & 1 for i in range(16)], np.float32).reshape(4, 4)
    out[top : top + 4 * cell, left : left + 4 * cell] = 16 + 219 * np.kron(code, np.ones((cell, cell)))[..., None]
    return out.astype(np.uint8)


def _word(n: int) -> int:
    return n | (n * 181 + 90 & 255) << 8  # 181 is odd: no two numbers share their check


def number(frame: np.ndarray, shape: tuple[int, int], stretched: bool = False) -> int | None:
    """The number in a frame of a video whose pictures are shown as `shape` (h, w), or None.

    The frame must be scaled to cover and cropped in the middle, or stretched: in any other geometry no number is found.
    """
    scale = [out / own for out, own in zip(frame.shape, shape)]
    cell = [min(shape) // 8 * s for s in (scale if stretched else [max(scale)] * 2)]
    grey, word = frame.astype(np.float32).mean(-1), 0
    for i in range(16):
        middle = [size / 2 + (k - 1.5) * c for size, k, c in zip(grey.shape, (i // 4, i % 4), cell)]
        level = grey[tuple(slice(round(m - c / 4), round(m + c / 4) + 1) for m, c in zip(middle, cell))].mean()
        if not (level < 90 or level > 165):
            return None
        word |= int(level > 128) << i
    return word & 255 if _word(word & 255) == word else None


# ---- what a file shows -----------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A file and what it shows. must: read (healthy), refuse (no video in it) or either (right frames, or refused)."""

    path: Path
    times: list[Fraction] = field(default_factory=list)  # s, of each picture in the order of showing
    numbers: list[int] = field(default_factory=list)
    must: str = "read"
    shape: tuple[int, int] = SHAPE  # (h, w) as shown

    def expected(self, frames: int, fps: int | None = None, start: float = 0) -> list[int] | None:
        """Numbers of a clip that begins `start` seconds after the first picture; None if the video is too short."""
        times = [t - self.times[0] for t in self.times]
        if fps is None:
            first = sum(t < start - SLACK for t in times)
            return self.numbers[first : first + frames] if len(times) >= first + frames else None
        wanted = [Fraction(round(start * 1000), 1000) + Fraction(i, fps) for i in range(frames)]
        if not times or wanted[-1] > times[-1] + SLACK:
            return None
        return [self.numbers[sum(s <= t + SLACK for s in times) - 1] for t in wanted]

    def wrong(self, pictures: np.ndarray, expected: list[int] | None, stretched: bool) -> int:
        """How many of these pictures are not the expected ones at their places."""
        expected = expected or [-1] * len(pictures)
        numbers = [number(picture, self.shape, stretched) for picture in pictures]
        return sum(a != b for a, b in zip(numbers, expected))


SPEED = {
    "libx264": {"preset": "veryfast", "crf": "20"},
    "libx265": {"preset": "ultrafast", "crf": "20", "x265-params": "log-level=none"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "b": "3M"},
    "libsvtav1": {"preset": "10", "crf": "8", "svtav1-params": "lp=1"},
}


def write(
    path: Path, numbers=range(N), codec="libx264", rate=25, ticks=None, base=None, shape=SHAPE, pix_fmt="yuv420p",
    options={}, mux={}, drawn=lambda a: a, pixels=1, sound=False, cover=False, second=(), must="read",
) -> Case:  # fmt: skip
    """Encodes these pictures, shown at ticks·base seconds (by default at `rate`, from 0).

    drawn: upright picture -> stored picture. pixels: a pixel's width over its height. second: pictures of a second
    video in the file.
    """
    base, ticks = Fraction(base or 1 / Fraction(rate)), ticks or range(len(numbers))
    options = {"threads": "1"} | SPEED.get(codec, {"b": "3M"}) | options
    with av.open(str(path), "w", options=mux) as file:
        streams = [file.add_stream(codec, rate=Fraction(rate), options=options) for _ in range(1 + bool(second))]
        for stream in streams:
            stream.height, stream.width = drawn(picture(0, shape)).shape[:2]
            stream.pix_fmt, stream.codec_context.time_base, stream.time_base = pix_fmt, base, base
            stream.codec_context.sample_aspect_ratio = Fraction(pixels)
        audio = file.add_stream("aac", rate=48000, layout="mono") if sound else None
        if cover:
            image = file.add_stream("mjpeg", rate=25)
            image.height, image.width, image.pix_fmt = *SHAPE, "yuvj420p"
            image.disposition = av.stream.Disposition.attached_pic
            file.mux(image.encode(av.VideoFrame(*SHAPE[::-1], "yuvj420p")) + image.encode())
        for stream, shown in zip(streams, (numbers, second)):
            for tick, n in zip(ticks, shown):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(drawn(picture(n, shape))), format="rgb24")
                frame.pts, frame.time_base = tick, base
                file.mux(stream.encode(frame))
            file.mux(stream.encode())
        if sound:
            _sound(file, audio, seconds=float(ticks[-1] * base))
    return Case(path, [tick * base for tick in ticks], list(numbers), must, shape)


def _sound(file, stream, seconds: float) -> None:
    for start in range(0, int(48000 * seconds), 1024):
        tone = np.sin(np.arange(start, start + 1024, dtype=np.float32) / 20)[None]
        frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 48000, start
        file.mux(stream.encode(frame))
    file.mux(stream.encode())


# ---- what is done to files -------------------------------------------------------------------------------------------


def copy_packets(path: Path, sources: list[Path], choose: Callable, mux={}) -> None:
    """A stream copy. choose: the packets of each source, in decoding order -> [(packet, seconds to shift it by)]."""
    files = [av.open(str(source)) for source in sources]
    with av.open(str(path), "w", options=mux) as out:
        stream = out.add_stream_from_template(files[0].streams.video[0])
        for packet, shift in choose(*[[p for p in file.demux(video=0) if p.size] for file in files]):
            packet.pts += round(shift / packet.time_base)
            packet.dts += round(shift / packet.time_base)
            packet.stream = stream
            out.mux(packet)
    for file in files:
        file.close()


def cut(percent: float, raw: bytearray) -> bytearray:
    return raw[: int(len(raw) * percent / 100)]


def flip(bits: int, raw: bytearray, start: int = 0, stop: int | None = None, seed: int = 0) -> None:
    """Flips random bits of raw[start:stop]."""
    draw = random.Random(bits + 1000 * seed)
    for _ in range(bits):
        raw[draw.randrange(start, stop or len(raw))] ^= 1 << draw.randrange(8)


def spoil(raw: bytes, seed: int) -> bytes:
    """A file with random damage: it is cut, or 1 … 100 bits of it are flipped, wherever in it."""
    draw, raw = random.Random(seed), bytearray(raw)
    if seed % 2:
        return cut(draw.uniform(1, 100), raw)
    flip(draw.choice((1, 1, 3, 10, 30, 100)), raw, seed=seed)
    return raw


def flip_packets(bits: int, raw: bytearray) -> None:
    """Flips random bits of an mp4's packets."""
    at = raw.index(b"mdat")
    flip(bits, raw, at + 4, at - 4 + struct.unpack_from(">I", raw, at - 4)[0])


def put(raw: bytearray, tag: bytes, offset: int, *values: int, form: str = ">I") -> None:
    """Writes these values `offset` bytes after the beginning of each tag."""
    for at in [m.start() for m in re.finditer(re.escape(tag), raw)]:
        for i, value in enumerate(values):
            struct.pack_into(form, raw, at + offset + i * struct.calcsize(form), value)


def _written(path: Path, content: bytes) -> Case:
    path.write_bytes(content)
    return Case(path, must="refuse")


def _damaged(path: Path, change: Callable[[bytearray], bytes | None], **how) -> Case:
    """change(bytes) alters a file's bytes or returns others. An mp4's tables come first, so that it opens when cut."""
    case = write(path, **{"must": "either", "mux": {"movflags": "faststart"} if path.suffix == ".mp4" else {}, **how})
    raw = bytearray(path.read_bytes())
    changed = change(raw)
    path.write_bytes(raw if changed is None else changed)
    return case


def _turned(path: Path, quarters: int = 0, mirrored: bool = False) -> Case:
    """Stored turned anticlockwise or mirrored, with a matrix in `tkhd` that undoes it (ISO 14496-12, 8.3.2)."""
    a, b = ((-1 if mirrored else 1, 0), (0, 1), (-1, 0), (0, -1))[quarters]
    matrix = [65536 * a, 65536 * b, 0, -65536 * b, 65536 * (1 if mirrored else a), 0, 0, 0, 2**30]
    stored = (lambda p: p[:, ::-1]) if mirrored else (lambda p: np.rot90(p, quarters))
    change, must = lambda raw: put(raw, b"tkhd", 44, *matrix, form=">i"), "either" if mirrored else "read"
    return _damaged(path, change, must=must, drawn=stored)


def _two_edits(path: Path) -> Case:
    """An edit list of two parts (ISO 14496-12, 8.6.6): pictures 0 … 19, then 45 … 84. Written over the one it has."""
    case = write(path, options={"bf": "0", "g": "12"})
    with av.open(str(path)) as file:
        tick = Fraction(1, 25) / file.streams.video[0].time_base
    raw = bytearray(path.read_bytes())
    at = raw.index(b"elst") + 8
    raw[at : at + 16] = struct.pack(">IIiIIiI", 2, 20 * 40, 0, 65536, 40 * 40, int(45 * tick), 65536)
    for box in (b"elst", b"edts", b"trak", b"moov"):
        at = raw.index(box) - 4
        struct.pack_into(">I", raw, at, struct.unpack_from(">I", raw, at)[0] + 12)
    path.write_bytes(raw)
    return replace(case, times=case.times[:60], numbers=[*range(20), *range(45, 85)])


def _jpeg(path: Path) -> Case:
    case = write(path.with_suffix(".jpg"), range(1), "mjpeg", pix_fmt="yuvj420p", mux={"update": "1"}, must="refuse")
    return replace(case, path=case.path.rename(path))


def _cut(path: Path, keyframe: int, skip: int, zero: int, shown: int, mux={}, **how) -> Case:
    """A stream copy that begins `skip` packets after a keyframe, as `ffmpeg -ss … -c copy` writes it: picture `zero`
    gets the time 0, earlier ones get negative times. shown: the first picture that a player shows.
    """
    whole = write(path.with_stem("whole"), **{"options": {"g": "12", "bf": "0", "sc_threshold": "0"}, **how})

    def choose(packets: list) -> list:
        first = [i for i, p in enumerate(packets) if p.is_keyframe][keyframe] + skip
        return [(p, Fraction(-zero, 25)) for p in packets[first:]]

    copy_packets(path, [whole.path], choose, mux)
    return replace(whole, path=path, times=whole.times[shown:], numbers=whole.numbers[shown:], must="either")


def _lost(path: Path, drop: int, close: bool = False, **how) -> Case:
    """A stream copy without one packet: pictures that refer to it cannot be right. close: later ones are moved up."""
    whole = write(path.with_stem("whole"), **{"options": {"bf": "0", "g": "30"}, **how})
    left, late = [i for i in range(N) if i != drop], Fraction(-1 if close else 0, 25)
    copy_packets(path, [whole.path], lambda packets: [(packets[i], late * (i > drop)) for i in left])
    times = [whole.times[i] + late * (i > drop) for i in left]
    return replace(whole, path=path, must="either", times=times, numbers=left)


def _joined(path: Path, byte_by_byte: bool = False, shown: int = N, **second) -> Case:
    """Two halves, one after the other: a stream copy with rising timestamps, or the two files' bytes."""
    half = N // 2
    parts = [
        write(path.with_stem(f"part{i}"), range(half * i, half * (i + 1)), **(second if i else {})) for i in (0, 1)
    ]
    if byte_by_byte:
        path.write_bytes(b"".join(part.path.read_bytes() for part in parts))
    else:
        shifted = lambda a, b: [(p, 0) for p in a] + [(p, Fraction(half, 25)) for p in b]  # noqa: E731
        copy_packets(path, [part.path for part in parts], shifted)
    times, must = [Fraction(i, 25) for i in range(shown)], "either" if byte_by_byte else "read"
    return Case(path, times, list(range(shown)), must)


def _packed(path: Path) -> Case:
    """DivX's B-frames: a packet holds a P-frame and the B-frame shown before it, the next a frame that is not coded."""
    how = dict(codec="mpeg4", options={"bf": "1", "b_strategy": "0", "sc_threshold": "1000000000"})
    case = write(path.with_stem("plain"), **how)

    def choose(packets: list) -> list:
        raws = [bytes(packet) for packet in packets]
        b_frame = [raw[raw.index(b"\0\0\1\xb6") + 4] >> 6 == 2 for raw in raws] + [False]
        out = []
        for i, packet in enumerate(packets):
            raw = b"\0\0\1\xb6\x50\x4f" if b_frame[i] else raws[i] + (raws[i + 1] if b_frame[i + 1] else b"")
            out.append((av.Packet(raw), 0))
            out[-1][0].pts, out[-1][0].dts, out[-1][0].time_base = i, i, packet.time_base
            out[-1][0].is_keyframe = packet.is_keyframe
        return out

    copy_packets(path, [case.path], choose)
    raw = re.sub(rb"Lavc[\d.]+", lambda found: b"DivX503b1393p".ljust(len(found[0]), b"\0"), path.read_bytes())
    path.write_bytes(raw)
    return replace(case, path=path)


def _sound_alone(path: Path) -> Case:
    with av.open(str(path), "w") as file:
        _sound(file, file.add_stream("aac", rate=48000, layout="mono"), 2.0)
    return Case(path, must="refuse")


def _empty_samples(path: Path) -> Case:
    """The table of sizes gives ten pictures 0 bytes: they are not in the file (ISO 14496-12, 8.7.3)."""
    case = _damaged(path, lambda raw: put(raw, b"stsz", 16 + 4 * 20, *[0] * 10), options={"bf": "0"})
    left = [i for i in range(N) if not 20 <= i < 30]
    return replace(case, times=[case.times[i] for i in left], numbers=left)


def _long(path: Path) -> Case:
    """5,000 pictures of 1024 x 1024 in a few megabytes: 16 GB once they are decoded."""
    one = write(path.with_stem("one"), [0], "libvpx-vp9", drawn=lambda p: np.zeros((1024, 1024, 3), np.uint8))
    copy_packets(path, [one.path], lambda packets: [(packets[0], Fraction(i > 0, 25)) for i in range(5000)])
    return Case(path, must="either", shape=(1024, 1024))


def _ten_times(raw: bytearray) -> None:
    put(raw, b"avih", 24, 10 * N, form="<I")
    put(raw, b"strh", 40, 10 * N, form="<I")


def _latin_1(raw: bytearray) -> bytes:
    return raw.replace(b"Lavf", b"Lav\xe9")


def _no_delay(raw: bytearray) -> None:
    """H.264 that does not say how many frames a decoder holds back (bitstream_restriction_flag, ITU-T H.264, E.1.1)."""
    for found in re.finditer(rb"\0\0\x01\x67.*?(?=\0\0\x01|\0\0\0\x01)", bytes(raw), re.DOTALL):
        bits = "".join(f"{byte:08b}" for byte in found[0])
        at = re.search("1111(0001...){2}(01.|001..){2}10*$", bits).start()
        raw[found.start() + at // 8] ^= 128 >> at % 8


def _many(raw: bytearray) -> None:
    """Tables that claim one chunk of 10^8 samples of 100 bytes (ISO 14496-12, 8.6.1, 8.7.3, 8.7.4)."""
    for tag, offset, values in ((b"stsz", 8, (100, 10**8)), (b"stts", 12, (10**8,)), (b"stsc", 16, (10**8,))):
        put(raw, tag, offset, *values)


HTML = b"<!doctype html><html><head><title>404</title></head><body><h1>Not found</h1></body></html>\n"
VARIED = np.cumsum([0, *random.Random(5).choices([10, 20, 25, 33, 40, 50], k=N - 1)]).tolist()
MILLISECONDS = dict(ticks=VARIED, base=Fraction(1, 1000))
UNEVEN = [i + i // 3 for i in range(N)]
GAP = [i if i < 30 else i + 60 for i in range(N)]
STILL = [min(i, 20) if i < 50 else i for i in range(N)]
B_FRAMES = {"bf": "3", "x264-params": "b-adapt=0", "g": "12", "sc_threshold": "0"}
PYRAMID = {"bf": "7", "x264-params": "b-adapt=2:b-pyramid=normal", "g": "60"}
OPEN = "open-gop=1:keyint=12:min-keyint=12:scenecut=0"
OPEN_264 = dict(options={"x264-params": OPEN, "bf": "2"})
OPEN_265 = dict(codec="libx265", options={"x265-params": f"log-level=none:{OPEN}:bframes=2:b-adapt=0"})
MPEG2 = dict(codec="mpeg2video", options={"bf": "2", "g": "12", "b": "4M"})
CUT = dict(keyframe=1, skip=0, zero=12, shown=12)
LOST = {"H.264": ".mp4 libx264", "HEVC": ".mp4 libx265", "VP9": ".webm libvpx-vp9", "MPEG-4": ".avi mpeg4"}
LOST |= {"MPEG-2": ".ts mpeg2video"}
PLAIN = {  # ending, codec, pixel format
    "AV1": ".mp4 libsvtav1 yuv420p", "VP9": ".webm libvpx-vp9 yuv420p", "MS-MPEG-4": ".avi msmpeg4 yuv420p",
    "HEVC": ".mp4 libx265 yuv420p", "HEVC, 10 bits": ".mp4 libx265 yuv420p10le", "10 bits": ".mp4 libx264 yuv420p10le",
    "4:4:4": ".mp4 libx264 yuv444p", "grey": ".mp4 libx264 gray", "alpha, ProRes": ".mov prores_ks yuva444p10le",
    "alpha, FFV1": ".mkv ffv1 yuva420p", "HuffYUV": ".avi huffyuv yuv422p", "Motion JPEG": ".avi mjpeg yuvj420p",
}  # fmt: skip


def _size(tag: bytes, offset: int, side: int, form: str, **how) -> dict:
    return dict(change=lambda raw: put(raw, tag, offset, side, side, form=form), **how)


CASES: dict[str, tuple] = {  # name of the class -> ending of the file, its maker, the maker's arguments
    "zero length": (".mp4", _written, dict(content=b"")),
    "text": (".mp4", _written, dict(content=b"a red ball falls\n" * 40)),
    "GIF": (".gif", write, dict(codec="gif", pix_fmt="rgb8", must="refuse")),
    "H.264 without a container": (".h264", write, dict(must="refuse")),
    "web page": (".mp4", _written, dict(content=HTML)),
    "random bytes": (".mp4", _written, dict(content=random.Random(1).randbytes(20_000))),
    "zeros": (".mp4", _written, dict(content=bytes(20_000))),
    "JPEG named mp4": (".mp4", _jpeg, {}),
    "no index (moov)": (".mp4", _damaged, dict(change=lambda raw: raw[: raw.index(b"moov") - 4], mux={})),
    **{f"cut at {p} %": (".mp4", _damaged, dict(change=partial(cut, p))) for p in (30, 60, 90, 99)},
    "cut at 60 %, mkv": (".mkv", _damaged, dict(change=partial(cut, 60))),
    "cut at 60 %, ts": (".ts", _damaged, dict(change=partial(cut, 60))),
    "cut at 60 %, avi": (".avi", _damaged, dict(change=partial(cut, 60), codec="mpeg4")),
    **{f"{n} bits flipped": (".mp4", _damaged, dict(change=partial(flip_packets, n))) for n in (1, 10, 100)},
    "4 KiB of zeros inside": (".mp4", _damaged, dict(change=lambda raw: raw[:30000] + bytes(4096) + raw[34096:])),
    **{f"a packet lost, {n}": (a.split()[0], _lost, dict(drop=40, codec=a.split()[1])) for n, a in LOST.items()},
    "a keyframe lost": (".mp4", _lost, dict(drop=30)),
    "empty samples": (".mp4", _empty_samples, {}),
    "1 frame": (".mp4", write, dict(numbers=range(1))),
    "48 frames": (".mp4", write, dict(numbers=range(48))),
    "49 frames": (".mp4", write, dict(numbers=range(49))),
    **{f"{r / 1001:.5g} fps": (".mp4", write, dict(rate=Fraction(r, 1001))) for r in (24000, 30000)},
    **{f"{r} fps": (".mp4", write, dict(rate=r, numbers=range(200 if r > 25 else N))) for r in (10, 16, 25, 60)},
    "variable rate": (".mp4", write, MILLISECONDS),
    "variable rate, VP9": (".mkv", write, dict(codec="libvpx-vp9", **MILLISECONDS)),
    "a gap of 2.4 s": (".mp4", write, dict(ticks=GAP, must="either")),
    "timestamps wrap": (".ts", write, dict(ticks=range(2_386_063, 2_386_063 + N))),  # 2^33 / 90 kHz is 95,443 s
    "starts at 10 s": (".mp4", write, dict(ticks=range(250, 250 + N))),
    "starts at 10 s, ts": (".ts", write, dict(ticks=range(250, 250 + N))),
    "a still of 30 frames": (".mp4", write, dict(numbers=STILL, must="either")),
    "B-frames": (".mp4", write, dict(options=B_FRAMES)),
    "B-frames, no edit list": (".mp4", write, dict(options=B_FRAMES, mux={"use_editlist": "0"})),
    "B-frames, MPEG-4": (".avi", write, dict(codec="mpeg4", options={"bf": "2"})),
    "B-frames, MPEG-4, packed": (".avi", _packed, {}),
    "B-frames, AVI": (".avi", write, dict(options=PYRAMID)),
    "B-frames, AVI, delay not told": (".avi", _damaged, dict(change=_no_delay, must="read", options=PYRAMID)),
    "B-frames, AVI, a packet lost": (".avi", _lost, dict(drop=40, options=B_FRAMES)),
    "B-frames, AVI, cut at no keyframe": (".avi", _cut, CUT | dict(skip=2, options=B_FRAMES)),
    "B-frames, AVI, a key frame cut out": (".avi", _lost, dict(drop=0, close=True, options=B_FRAMES)),
    "B-frames, AVI, variable rate": (".avi", write, dict(ticks=UNEVEN, must="either", options=B_FRAMES)),
    "B-frames, ASF": (".asf", write, dict(options=B_FRAMES)),
    "fragmented": (".mp4", write, dict(mux={"movflags": "frag_keyframe+empty_moov"})),
    "intra refresh": (".mp4", write, dict(options={"x264-params": "intra-refresh=1:keyint=20", "bf": "0"})),
    "open GOP": (".mp4", write, OPEN_264),
    "HEVC, open GOP": (".mp4", write, OPEN_265),
    "HEVC, open GOP, cut": (".mp4", _cut, OPEN_265 | CUT),
    "MPEG-2": (".mpg", write, MPEG2),
    "MPEG-2, ts": (".ts", write, MPEG2),
    "MPEG-2, open GOP, cut": (".mpg", _cut, MPEG2 | CUT),
    **{name: (a.split()[0], write, dict(zip(("codec", "pix_fmt"), a.split()[1:]))) for name, a in PLAIN.items()},
    "Cinepak": (".avi", write, dict(codec="cinepak", pix_fmt="rgb24", shape=(64, 64))),
    "alpha, QuickTime RLE": (".mov", write, dict(codec="qtrle", pix_fmt="argb", shape=(64, 64))),
    "interlaced": (".mp4", write, dict(options={"x264-params": "tff=1"})),
    "turned by 90°": (".mp4", _turned, dict(quarters=1)),
    "turned by 270°": (".mp4", _turned, dict(quarters=3)),
    "mirrored": (".mp4", _turned, dict(mirrored=True)),
    "turned by 180°": (".mp4", _turned, dict(quarters=2)),
    "pixels 2:1": (".mp4", write, dict(pixels=2, drawn=lambda p: p[:, ::2])),
    "odd size": (".webm", write, dict(codec="libvpx-vp9", shape=(241, 427))),
    "odd size, 4:4:4": (".mp4", write, dict(pix_fmt="yuv444p", shape=(241, 427))),
    "cut at a keyframe": (".mp4", _cut, dict(keyframe=2, skip=0, zero=24, shown=24)),
    "cut at no keyframe": (".mp4", _cut, dict(keyframe=2, skip=6, zero=30, shown=36)),
    "cut at no keyframe, ts": (".ts", _cut, dict(keyframe=2, skip=6, zero=30, shown=36)),
    "cut by an edit list": (".mp4", _cut, dict(keyframe=2, skip=0, zero=30, shown=30)),
    "cut by an edit list, B-frames": (".mp4", _cut, dict(keyframe=2, skip=0, zero=30, shown=30, options=B_FRAMES)),
    "cut without its edit list": (".mp4", _cut, CUT | dict(zero=18, mux={"use_editlist": "0"})),
    "an edit list of two parts": (".mp4", _two_edits, {}),
    "two copies joined": (".mp4", _joined, {}),
    "two mp4 glued": (".mp4", _joined, dict(byte_by_byte=True, shown=N // 2)),
    "two ts glued": (".ts", _joined, dict(byte_by_byte=True)),
    "the size changes": (".ts", _joined, dict(byte_by_byte=True, shape=(384, 640), ticks=range(N // 2 + 2, N + 2))),
    "sound": (".mp4", write, dict(sound=True)),
    "a tag in Latin-1": (".avi", _damaged, dict(change=_latin_1, must="read", codec="mpeg4")),
    "sound alone": (".mp4", _sound_alone, {}),
    "two videos": (".mp4", write, dict(second=range(100, 130), must="either")),
    "a cover": (".mp4", write, dict(cover=True)),
    "header says ten times as many": (".avi", _damaged, dict(change=_ten_times, codec="mpeg4")),
    "header says 30000 x 30000": (".mp4", _damaged, _size(b"avc1", 28, 30000, ">H")),
    "bomb: 16384 x 16384": (".mov", _damaged, _size(b"rle ", 28, 16384, ">H", codec="qtrle", pix_fmt="rgb24")),
    "bomb: 100 million frames": (".mp4", _damaged, dict(change=_many)),
    "bomb: 16 GB of pictures": (".webm", _long, {}),
}  # fmt: skip

UNSEEN: dict[str, tuple] = {  # a packet is cut out and later ones are moved up: neither decoders nor times show it
    "a keyframe cut out, H.264": (".mp4", _lost, dict(drop=30, close=True)),
    **{f"a packet cut out, {name[15:]}": (*CASES[name][:2], CASES[name][2] | {"close": True})
       for name in CASES if name.startswith("a packet lost, ")},
}  # fmt: skip


def make(name: str, folder: Path) -> Case:
    """Makes the file of a class, in a new folder of its own."""
    ending, maker, arguments = (CASES | UNSEEN)[name]
    home = folder / f"{list(CASES | UNSEEN).index(name):02d}"
    home.mkdir(parents=True)
    return maker(home / f"video{ending}", **arguments)

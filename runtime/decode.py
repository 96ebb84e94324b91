"""The program that video.Decoder runs and may kill: reads clips out of video files, and refuses what cannot be trusted.

A request is a line of JSON on stdin. The answer on stdout is a line of JSON, {"error": why} or {"clips": [...]}, and
after it the pictures of each clip, (T, h, w, 3) uint8 RGB.

decord reads one run of frames from the file's first and never jumps: after a jump in open-GOP HEVC it returns other
frames than were asked for, without an error. Neither it nor FFmpeg raises an error for a picture that was lost or made
up. So what decord returns is accepted only if

    its frame times are those of the file's packets    (a stream-copied cut is padded with its last frame)
    its decoder printed no complaint                   (damaged parts of a picture are concealed: only the log says so)
    its first and its last key frame are PyAV's        (the first frames of an MPEG-2 file may be lost)

What decord cannot read, or not so, is read by PyAV under the same rules. Of either, a clip in which the picture stands
still for more than 4 frames is refused, and one with a gap in an otherwise steady rate.
"""

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import tempfile
from fractions import Fraction

import av
import av.logging
import numpy as np

try:
    import decord
except ImportError:  # it has no wheel for ARM
    decord = None

MAX_PICTURE = 2**25  # pixels of a picture: 8192 x 4096
MAX_PIXELS = 2**36  # pixels decoded of a video: 20 minutes of 1080p at 27 frames a second
MAX_MEMORY = 2**33  # bytes of address space
STILL = 4  # frames in a row that may be alike
REPEATS = 0.1  # share of a clip's frames that resampling may show twice
SLACK = 0.002  # s that a timestamp may be late: some containers round to a millisecond
BATCH = 32  # frames decoded at a time
HARMLESS = ("[swscaler", "deprecated pixel format")  # what FFmpeg says about sound files, too


class Refused(Exception):
    """Why a video is not accepted."""


@dataclasses.dataclass
class Source:
    """What a file says before its pictures are decoded, and PyAV's first picture. Times are in seconds."""

    file: av.container.InputContainer
    stream: av.video.stream.VideoStream
    first: av.VideoFrame
    times: np.ndarray  # of the frames that are shown, rising, from the first that can be decoded
    keys: np.ndarray  # of those that need no other frame
    lost: int  # frames before the first that can be decoded

    @property
    def turns(self) -> int:
        """Quarter turns to the left that show the picture upright."""
        return round(self.first.rotation / 90) % 4

    @property
    def shown(self) -> tuple[int, int]:
        """(h, w) of the picture upright and with square pixels."""
        h, w = self.first.height, round(self.first.width * (self.stream.sample_aspect_ratio or Fraction(1)))
        return (w, h) if self.turns % 2 else (h, w)


# ---- what the file says ----------------------------------------------------------------------------------------------


def open_video(path: str):
    """PyAV's container and its largest moving picture."""
    try:
        file = av.open(path)
    except (av.FFmpegError, ValueError) as error:
        raise Refused(f"FFmpeg knows no such video: {said(error)}") from None
    streams = [s for s in file.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        raise Refused("there is no video in it")
    stream = max(streams, key=lambda s: (s.width or 0) * (s.height or 0))
    if len(streams) > 1:
        raise Refused(f"there are {len(streams)} videos in it")
    check_size(stream.width, stream.height)
    stream.codec_context.thread_count = 1
    return file, stream


def check_size(width: int, height: int, frames: int = 1) -> None:
    """Refuses a decode bomb by its header, before its pictures take memory."""
    if not (width and height):
        raise Refused("its header gives no picture size")
    if width * height > MAX_PICTURE or width * height * frames > MAX_PIXELS:
        raise Refused(f"too large: {frames} frames of {width} x {height}")


def look(path: str, seconds: float) -> Source:
    """The times of a file's frames, at least of its first `seconds`, from its packets, and its first picture."""
    file, stream = open_video(path)
    times, keys, first = [], [], None
    try:
        for packet in file.demux(stream):
            time = packet.pts if packet.pts is not None else packet.dts
            if first is None:
                first = next(iter(packet.decode()), None)
            if time is None or packet.is_discard:
                continue
            times.append(float(time * stream.time_base))
            keys += times[-1:] if packet.is_keyframe else []
            if first is not None and times[-1] > times[0] + seconds + 2:  # B-frames come late: 2 s are plenty
                break
    except (av.FFmpegError, OSError) as error:
        raise Refused(f"PyAV cannot read it: {said(error)}") from None
    if first is None or not times:
        raise Refused("no picture in it can be decoded")
    check_size(first.width, first.height)
    if first.rotation % 90:
        raise Refused(f"it is turned by {first.rotation} degrees")
    matrix = first.side_data.get("DISPLAYMATRIX")
    if matrix and np.linalg.det(np.frombuffer(bytes(matrix), np.int32).reshape(3, 3)[:2, :2]) < 0:
        raise Refused("it is to be shown mirrored")
    if len(set(times)) < len(times):
        raise Refused("two of its frames have one timestamp")
    begin = min(times) if first.time is None else float(first.time)
    times, lost = np.sort(times), int((np.array(times) <= begin - SLACK).sum())
    return Source(file, stream, first, times[lost:], np.sort(keys), lost)


def plan(times: np.ndarray, frames: int | None, fps: float | None, clips: int, exact: bool) -> list[np.ndarray]:
    """Which frame each picture of each clip shows: with fps, the one on the screen at that time."""
    index = np.arange(len(times))
    if fps:
        count = math.floor((times[-1] - times[0] + SLACK) * fps) + 1
        index = np.searchsorted(times, times[0] + np.arange(count) / fps + SLACK, side="right") - 1
    frames = frames or len(index)
    wanted = f"{frames} frames" + (f" at {fps:g} a second" if fps else "")
    if len(index) < frames:
        raise Refused(f"too short: expected {wanted}, got {len(index)}")
    if exact and len(index) != frames:
        raise Refused(f"wrong frame count: expected {wanted}, got {len(index)}")
    clips = min(clips, len(index) // frames)
    starts = np.linspace(0, len(index) - frames, clips).round().astype(int)
    chosen = [index[start : start + frames] for start in starts]
    repeats = max(int((np.diff(c) == 0).sum()) for c in chosen)
    if repeats > REPEATS * frames:
        raise Refused(f"slower than {fps:g} frames a second: {repeats} of {frames} pictures would be shown twice")
    return chosen


# ---- its pictures ----------------------------------------------------------------------------------------------------


def by_decord(path: str, source: Source, last: int, size: tuple[int, int]):
    """Frames 0 ... last at size (h, w), in order, once decord's account of the file is PyAV's."""
    if decord is None:
        raise Refused("decord is not installed")
    if source.turns or source.lost or source.stream.codec_context.name == "vp9":
        raise Refused("decord does not read such a file reliably")
    try:
        reader = decord.VideoReader(path, width=size[1], height=size[0], num_threads=1)
        if len(reader) <= last:
            raise Refused(f"decord finds {len(reader)} frames")
        times = reader.get_frame_timestamp(range(last + 1))[:, 0]
        if np.abs((times - times[0]) - (source.times[: last + 1] - source.times[0])).max() > SLACK:
            raise Refused("decord finds other timestamps")
        spots = {0: source.first, **key_frame(source, last)}
        for start in range(0, last + 1, BATCH):
            pictures = reader.get_batch(range(start, min(start + BATCH, last + 1))).asnumpy()
            for i in spots.keys() & set(range(start, start + len(pictures))):
                compare(to_rgb(spots[i], size), pictures, i - start)
            yield from pictures
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        raise Refused(f"decord cannot read it: {said(error)}") from None


def key_frame(source: Source, last: int) -> dict[int, av.VideoFrame]:
    """PyAV's picture of the last key frame up to `last` by its number, if there is one after the first frame."""
    keys = source.keys[(source.keys > source.times[0] + SLACK) & (source.keys < source.times[last] + SLACK)]
    if not len(keys):
        return {}
    with contextlib.suppress(av.FFmpegError, OSError):
        source.file.seek(round(keys[-1] / source.stream.time_base), stream=source.stream)
        for _, frame in zip(range(16), source.file.decode(source.stream)):
            if frame.time is not None and abs(frame.time - keys[-1]) < SLACK:
                return {int(np.searchsorted(source.times, keys[-1] - SLACK)): frame}
    raise Refused("PyAV does not find its last key frame")


def compare(picture: np.ndarray, pictures: np.ndarray, i: int) -> None:
    """Refuses unless pictures[i] is the picture, but for rounding, and its neighbours are farther from it."""
    near = range(max(0, i - 1), min(len(pictures), i + 2))
    some = (slice(None, None, 4),) * 2  # a sixteenth of the pixels will do
    distance = {j: np.abs(pictures[j][some].astype(np.int16) - picture[some]).mean() for j in near}
    if distance[i] > 0.6 + 0.25 * min((d for j, d in distance.items() if j != i), default=0):
        raise Refused("decord and PyAV see different pictures")


def by_pyav(path: str, source: Source, last: int, size: tuple[int, int]):
    """The same by PyAV, every frame by its own timestamp."""
    file, stream = open_video(path)
    size = size[::-1] if source.turns % 2 else size
    with file:
        try:
            for i, frame in zip(range(last + 1), decoded(file, stream)):
                at = f"at {source.times[i]:.2f} s"
                if frame.time is None or abs(frame.time - source.times[i]) > SLACK:
                    raise Refused(f"the frame {at} cannot be decoded")
                if frame.is_corrupt:
                    raise Refused(f"the picture {at} is damaged")
                if (frame.width, frame.height) != (source.first.width, source.first.height):
                    raise Refused(f"the picture's size changes {at}")
                yield np.rot90(to_rgb(frame, size), source.turns)
        except (av.FFmpegError, OSError) as error:
            raise Refused(f"PyAV cannot read it: {said(error)}") from None


def decoded(file, stream):
    """Its frames. VP9's by libvpx, which refuses most damage; FFmpeg's own decoder, as in decord, shows it."""
    name = stream.codec_context.name
    try:
        decoder = av.CodecContext.create("libvpx-vp9", "r") if name == "vp9" else stream
    except av.codec.codec.UnknownCodecError:  # another build of FFmpeg
        decoder = stream
    for packet in file.demux(stream):
        yield from decoder.decode(packet)


def to_rgb(frame: av.VideoFrame, size: tuple[int, int]) -> np.ndarray:
    """A frame resized to (h, w): (h, w, 3) uint8."""
    return frame.to_ndarray(format="rgb24", height=size[0], width=size[1])


def collect(pictures, chosen: list[np.ndarray], size: tuple[int, int], log) -> list[list[np.ndarray]]:
    """Clip by clip, the chosen of all frames that an iterator gives, cut to size (h, w).

    Refuses what the decoder complained of.
    """
    wanted, kept, i = set(np.concatenate(chosen).tolist()), {}, -1
    log.seek(0)
    log.truncate()
    for i, picture in enumerate(pictures):
        if i in wanted:
            top, left = (picture.shape[0] - size[0]) // 2, (picture.shape[1] - size[1]) // 2
            kept[i] = picture[top : top + size[0], left : left + size[1]]
    log.seek(0)
    complaints = [line for line in log.read().splitlines() if line.strip() and not any(h in line for h in HARMLESS)]
    if complaints:
        raise Refused(f"its decoder complains: {complaints[0].strip()[:160]}")
    if wanted - kept.keys():
        raise Refused(f"its pictures end after {i + 1} frames")
    return [[kept[i] for i in clip] for clip in chosen]


def stands_still(clip: list[np.ndarray]) -> int:
    """The longest run of pictures that are the same in every byte."""
    longest = run = 1
    for a, b in zip(clip, clip[1:]):
        run = run + 1 if np.array_equal(a[0], b[0]) and np.array_equal(a, b) else 1
        longest = max(longest, run)
    return longest


def missing(source: Source, clip: np.ndarray) -> float | None:
    """When (s) a frame is missing, by a gap in an otherwise steady rate, that pictures of the clip may be made from.

    Only H.264 and HEVC number their frames: where another decoder misses one, it says nothing and shows a wrong picture
    until the next key frame. So does H.264's where a key frame is missing.
    """
    times, steps = source.times, np.diff(source.times)
    if len(times) < 3 or (np.abs(steps - np.median(steps)) > SLACK).mean() > 0.1:  # the rate varies
        return None
    key = max(source.keys[source.keys < times[clip[0]] + SLACK], default=times[0])
    gaps = np.flatnonzero((steps > 1.5 * np.median(steps)) & (times[1:] > key) & (times[:-1] < times[clip[-1]]))
    return float(times[gaps[0]] + np.median(steps)) if len(gaps) else None


def fit(source: Source, size: list[int] | None) -> tuple[tuple[int, int], tuple[int, int]]:
    """The size (h, w) to return, the file's own if none is asked for, and the one to resize to, which covers it."""
    if size is None:
        h, w = source.first.height, source.first.width
        return (((w, h) if source.turns % 2 else (h, w)),) * 2
    scale = max(size[0] / source.shown[0], size[1] / source.shown[1])
    return tuple(size), tuple(max(a, round(b * scale)) for a, b in zip(size, source.shown))


# ---- requests --------------------------------------------------------------------------------------------------------


def read(request: dict, log) -> tuple[dict, list[np.ndarray]]:
    """The answer to a request, and the pictures of its clips that are accepted, in one list."""
    path, frames, fps = request["path"], request["frames"], request["fps"]
    everything = not frames or request["clips"] > 1 or request["exact"]
    source = look(path, math.inf if everything else frames / (fps or 1e-3))
    with source.file:
        chosen = plan(source.times, frames, fps, request["clips"], request["exact"])
        last = max(int(clip[-1]) for clip in chosen)
        check_size(source.first.width, source.first.height, last + 1)
        size, cover = fit(source, request["size"])
        by, clips = "decord", None
        with contextlib.suppress(Refused):
            clips = collect(by_decord(path, source, last, cover), chosen, size, log)
        if clips is None:  # not in an exception's handler: it would keep decord's threads alive, and complaining
            by, clips = "PyAV", collect(by_pyav(path, source, last, cover), chosen, size, log)
    answer, kept = [], []
    for index, clip in zip(chosen, clips):
        start = round(float(source.times[index[0]] - source.times[0]), 3)
        rate = round(1 / float(np.median(np.diff(source.times))), 3) if len(source.times) > 1 else 0.0
        facts = {"start": start, "index": index.tolist(), "reader": by, "rate": rate}
        facts["shape"] = (len(clip), *clip[0].shape)
        if (frames or 0) > STILL and (still := stands_still(clip)) > STILL:
            facts["error"] = f"the picture stands still for {still} frames"
        elif (hole := missing(source, index)) is not None:
            facts["error"] = f"the frame at {hole:.2f} s is missing"
        else:
            kept += clip
        answer.append(facts)
    return {"clips": answer}, kept


def said(error: Exception) -> str:
    """The last line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:160] if lines else type(error).__name__


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    log = tempfile.TemporaryFile("w+", errors="replace")
    for printed in (1, 2):  # what the libraries print is read here
        os.dup2(log.fileno(), printed)
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    av.logging.restore_default_callback()
    av.logging.set_libav_level(av.logging.ERROR)
    if decord:
        decord.logging.set_level(decord.logging.INFO)  # what FFmpeg conceals it says at this level
    answers.write(b"ready\n")
    answers.flush()
    alarm = getattr(signal, "alarm", lambda seconds: None)  # not on Windows
    for line in sys.stdin:
        request = json.loads(line)
        alarm(math.ceil(request["deadline"]) + 10)  # should the parent be gone: a decoder that spins lets no Python run
        try:
            answer, pictures = read(request, log)
        except Refused as error:
            answer, pictures = {"error": str(error)}, []
        except IndexError:  # by PyAV, where damage in a transport stream looks like another stream
            answer, pictures = {"error": "another stream begins in its middle"}, []
        except Exception as error:  # of damaged files anything may come; the run must go on, and this stands out
            answer, pictures = {"error": f"decode.py failed: {type(error).__name__}: {said(error)}"}, []
        answers.write(json.dumps(answer).encode() + b"\n")
        for picture in pictures:
            answers.write(np.ascontiguousarray(picture).data)
        answers.flush()
        alarm(0)


if __name__ == "__main__":
    main()

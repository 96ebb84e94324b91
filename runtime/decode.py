"""The program behind video.Decoder: reads clips out of video files and refuses what cannot be trusted.

A request is a line of JSON on stdin. The answer on stdout is a line of JSON, {"clips": [facts or {"error": reason}],
"shape": [T, h, w, 3]}, and after it the pictures of each clip without an error, uint8 RGB.

decord reads, because it is fast. But neither decord nor FFmpeg raises an error for a picture that was lost or made up,
and after a jump in open-GOP HEVC decord returns the wrong frames. So it reads one run of frames from the file's first,
and its pictures are accepted only if

    its frame times are those of the file's packets    (it pads a stream-copied cut with the last frame)
    its decoder printed no complaint                   (damaged parts of a picture are concealed: only the log says so)
    its first and its last key frame are PyAV's        (it may lose the first frames of an MPEG-2 file)

PyAV reads the files that fail these checks, and the time of each of its frames is checked. Of either reader a clip is
refused if its picture stands still for more than 4 frames, or if a frame is missing from an otherwise steady rate.

FFmpeg also reads playlists, which name other files and servers. So PyAV opens containers alone, and decord, which has
no such option, gets only those that no playlist can pass for.

With `cuts` PySceneDetect looks for cuts in all frames from the first to just after the last that is wanted, at 48 x 27:
a frame unlike those around it, or a way through black. "reject" refuses the clips with one inside, "split" reads the
file once more and takes the clips from its shots.

Colours become RGB by the matrix and the range that the file names; where it names no matrix, by BT.601's at any size,
as other readers do. Wide primaries (BT.2020, P3) are taken for BT.709's. HDR is refused, but for Dolby Vision that says
so nowhere else (profile 5).
"""

import contextlib
import ctypes
import dataclasses
import itertools
import json
import math
import os
import re
import resource
import signal
import sys
import tempfile
from fractions import Fraction

import av
import av.logging
import numpy as np
from av.video.reformatter import ColorTrc  # PyAV 17's: older ones turn BT.709 into RGB by another matrix

try:
    import decord
except ImportError:  # it has no wheel for ARM
    decord = None

CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,asf"  # FFmpeg's names; mov is mp4, too, and matroska is webm
NO_SIGNATURE = ("mpegts", "mpeg")  # a playlist may begin a file that FFmpeg 8 takes for one of these, but not decord's
HDR = {ColorTrc.SMPTE2084: "PQ", ColorTrc.ARIB_STD_B67: "HLG"}
TO_SDR = (
    "zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709,tonemap=hable,zscale=t=bt709:m=bt709:r=tv,format=yuv420p"
)
UNSPECIFIED = 2  # colour matrix, ITU-T H.273 table 4
MATRICES = (0, 1, UNSPECIFIED, 4, 5, 6, 7, 9)  # that FFmpeg turns into RGB
IN_DECODING_ORDER = ("avi", "asf")  # formats whose timestamps may count frames as they are decoded
DELAY = 16  # frames that H.264 may decode before it shows one
PR_SET_PDEATHSIG = 1  # linux/prctl.h
MAX_PICTURE = 2**25  # pixels of a picture: 8192 x 4096
MAX_PIXELS = 2**36  # pixels decoded of a video: 20 minutes of 1080p at 27 frames a second
MAX_MEMORY = 2**33  # bytes of address space
STILL = 4  # equal frames in a row that are accepted
REPEATS = 0.1  # share of a clip's frames that resampling may show twice
SLACK = 0.002  # s by which a timestamp may be off: some containers round to a millisecond
BATCH = 32  # frames decoded at a time
SMALL = (48, 27)  # px: what PySceneDetect sees of a frame; it finds no more in larger ones (docs/videos.md)
QUICK = 144  # px: the shorter side of the pictures that are decoded for their cuts alone
AHEAD = 4  # frames after a clip in which a cut at its end shows
BESIDE = 2  # frames on either side of a cut that may show both shots
FLASH = 4  # frames after which the picture is as before a flash, which is no cut
ALIKE = 0.5  # mean difference up to which a frame repeats the one before, as in drawings on threes
UNREADABLE = (av.FFmpegError, OSError, IndexError)  # the last when damage in a transport stream looks like a new stream
HARMLESS = ("[swscaler", "deprecated pixel format")  # FFmpeg prints these for healthy files, too


class Refused(Exception):
    """Why a video is not accepted."""


@dataclasses.dataclass
class Source:
    """An open file, its first picture by PyAV, and the times (s) of its frames, before the others are decoded."""

    file: av.container.InputContainer
    stream: av.video.stream.VideoStream
    first: av.VideoFrame
    times: np.ndarray  # of the frames that are shown, rising, from the first that can be decoded
    keys: np.ndarray  # of the key frames
    lost: int  # frames before the first that can be decoded
    colours: int  # the container's colour matrix, for pictures that name none
    reordered: bool  # the file's timestamps count frames as they are decoded, not as they are shown

    @property
    def turns(self) -> int:
        """Quarter turns to the left that show the picture upright."""
        return round(self.first.rotation / 90) % 4

    def sizes(self, size: list[int] | None) -> tuple[tuple[int, int], tuple[int, int]]:
        """The size (h, w) to return, by default the file's own, and the size to resize to, which covers it."""
        h, w = self.first.height, self.first.width
        if size:
            w = round(w * (self.stream.sample_aspect_ratio or Fraction(1)))  # square pixels
        upright = (w, h) if self.turns % 2 else (h, w)
        wanted = size or upright
        scale = max(a / b for a, b in zip(wanted, upright))
        return tuple(wanted), tuple(max(a, round(b * scale)) for a, b in zip(wanted, upright))


# ---- the file and its frames' times ----------------------------------------------------------------------------------


def open_video(path: str, log):
    """PyAV's container and its one video stream; a cover picture does not count. path: absolute."""
    complaints(log)
    try:
        options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
        file = av.open(f"file:{path}", options=options, metadata_errors="replace")  # old files' tags are not UTF-8
    except (av.FFmpegError, ValueError) as error:
        reasons = complaints(log)
        if other := re.search(r"\[(\S+)\] Format not on whitelist", "\n".join(reasons)):
            raise Refused(f"its format is {other[1]}: expected one of {CONTAINERS}") from None
        raise Refused(f"FFmpeg cannot open it: {(reasons or [said(error)])[0]}") from None
    streams = [s for s in file.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if len(streams) != 1:
        raise Refused(f"it holds {len(streams) or 'no'} video streams")
    check_size(streams[0].width, streams[0].height)
    streams[0].codec_context.thread_count = 1
    return file, streams[0]


def check_size(width: int, height: int, frames: int = 1) -> None:
    """Refuses a decompression bomb by its header, before its pictures take memory."""
    if not (width and height):
        raise Refused("its header gives no picture size")
    if width * height > MAX_PICTURE or width * height * frames > MAX_PIXELS:
        raise Refused(f"too large: {frames} frames of {width} x {height}")


def look(path: str, seconds: float, log) -> Source:
    """Reads the packets of at least the first `seconds` of a file, and decodes its first picture."""
    file, stream = open_video(path, log)
    context = stream.codec_context
    colours, transfer = context.colorspace or UNSPECIFIED, context.color_trc  # decoding may overwrite them
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
    except UNREADABLE as error:
        raise Refused(f"PyAV cannot read it: {said(error)}") from None
    if first is None or not times:
        raise Refused("no picture in it can be decoded")
    check_size(first.width, first.height)
    check_colours(first, transfer)
    if first.rotation % 90:
        raise Refused(f"it is turned by {first.rotation} degrees")
    matrix = first.side_data.get("DISPLAYMATRIX")
    if matrix and np.linalg.det(np.frombuffer(bytes(matrix), np.int32).reshape(3, 3)[:2, :2]) < 0:
        raise Refused("it is meant to be shown mirrored")
    if len(set(times)) < len(times):
        raise Refused("two of its frames have the same timestamp")
    reordered = file.format.name in IN_DECODING_ORDER and context.has_b_frames and evenly_rising(times)
    begin = min(times) if first.time is None or reordered else float(first.time)
    times, lost = np.sort(times), int((np.array(times) <= begin - SLACK).sum())
    return Source(file, stream, first, times[lost:], np.sort(keys), lost, colours, reordered)


def evenly_rising(times: list[float]) -> bool:
    """Whether they rise by equal steps."""
    steps = np.diff(times)
    return len(steps) > 0 and bool(steps.min() > 0 and np.ptp(steps) < SLACK)


def check_colours(picture: av.VideoFrame, transfer: int) -> None:
    """Refuses colours that would come out wrong. transfer: the container's transfer function."""
    if name := HDR.get(transfer) or HDR.get(picture.color_trc):
        raise Refused(f"its colours are HDR ({name}): convert it to SDR first, e.g. ffmpeg -i IN -vf {TO_SDR} OUT")
    if picture.colorspace not in MATRICES:
        raise Refused(f"its colour matrix is number {picture.colorspace} of H.273: convert it to BT.709 first")


def plan(times: np.ndarray, frames: int | None, fps: float | None, clips: int) -> np.ndarray:
    """Which frame each picture of each clip shows, (clips, frames): with fps the one on the screen at its time."""
    index = np.arange(len(times))
    if fps:
        count = math.floor((times[-1] - times[0] + SLACK) * fps) + 1
        index = np.searchsorted(times, times[0] + np.arange(count) / fps + SLACK, side="right") - 1
    frames = frames or len(index)
    if len(index) < frames:
        rate = f" at {fps:g} a second" if fps else ""
        raise Refused(f"too short: expected {frames} frames{rate}, got {len(index)}")
    starts = np.linspace(0, len(index) - frames, min(clips, len(index) // frames)).round().astype(int)
    chosen = index[starts[:, None] + np.arange(frames)]
    repeats = int((np.diff(chosen) == 0).sum(1).max())
    if repeats > REPEATS * frames:
        raise Refused(f"slower than {fps:g} frames a second: {repeats} of {frames} pictures would be shown twice")
    return chosen


# ---- pictures --------------------------------------------------------------------------------------------------------


def by_decord(path: str, source: Source, last: int, size: tuple[int, int]):
    """Frames 0 … last at size (h, w), in order, by decord, checked against PyAV."""
    if decord is None:
        raise Refused("decord is not installed")
    if source.file.format.name in NO_SIGNATURE:
        raise Refused("decord might take such a file for a playlist")
    if source.turns or source.lost or source.reordered or source.stream.codec_context.name == "vp9":
        raise Refused("decord does not read such a file reliably")
    try:
        reader = decord.VideoReader(path, width=size[1], height=size[0], num_threads=1)
        times = reader.get_frame_timestamp(range(last + 1))[:, 0]
        if np.abs((times - times[0]) - (source.times[: last + 1] - source.times[0])).max() > SLACK:
            raise Refused("decord finds other timestamps")
        known = {0: source.first, **last_key_frame(source, last)}
        for start in range(0, last + 1, BATCH):
            pictures = reader.get_batch(range(start, min(start + BATCH, last + 1))).asnumpy()
            for i in known.keys() & set(range(start, start + len(pictures))):
                compare(to_rgb(known[i], size, source.colours), pictures, i - start)
            yield from pictures
    except (decord.DECORDError, RuntimeError, IndexError, UnicodeEncodeError) as error:  # it takes names in UTF-8
        raise Refused(f"decord cannot read it: {said(error)}") from None


def last_key_frame(source: Source, last: int) -> dict[int, av.VideoFrame]:
    """PyAV's picture of the last key frame in 1 … last, by its number; empty if there is none."""
    keys = source.keys[(source.keys > source.times[0] + SLACK) & (source.keys < source.times[last] + SLACK)]
    if not len(keys):
        return {}
    with contextlib.suppress(*UNREADABLE):
        source.file.seek(round(keys[-1] / source.stream.time_base), stream=source.stream)
        for _, frame in zip(range(16), source.file.decode(source.stream)):
            if frame.time is not None and abs(frame.time - keys[-1]) < SLACK:
                return {int(np.searchsorted(source.times, keys[-1] - SLACK)): frame}
    raise Refused("PyAV does not find its last key frame")


def compare(picture: np.ndarray, pictures: np.ndarray, i: int) -> None:
    """Refuses unless pictures[i] equals `picture` up to rounding, and is closer to it than its neighbours are."""
    near = range(max(0, i - 1), min(len(pictures), i + 2))
    some = (slice(None, None, 4),) * 2  # a sixteenth of the pixels will do
    distance = {j: np.abs(pictures[j][some].astype(np.int16) - picture[some]).mean() for j in near}
    if distance[i] > 0.6 + 0.25 * min((d for j, d in distance.items() if j != i), default=0):
        raise Refused("decord and PyAV see different pictures")


def by_pyav(path: str, source: Source, last: int, size: tuple[int, int], log):
    """Frames 0 … last at size (h, w), in order, by PyAV, each checked by its timestamp.

    Where timestamps are in the order of decoding, no frame may be missing: only then the n-th that is shown has the
    n-th time.
    """
    file, stream = open_video(path, log)
    size, seen = size[::-1] if source.turns % 2 else size, []
    if source.reordered:
        stream.codec_context.options = {"strict": "1"}  # or H.264 may guess how many frames it has to hold back
    with file:
        try:
            frames = itertools.islice(decoded(file, stream), last + 1 + DELAY * source.reordered)
            for i, frame in enumerate(frames):
                seen.append(frame.time)
                if i > last:
                    continue
                at = f"at {source.times[i]:.2f} s"
                if frame.time is None or not source.reordered and abs(frame.time - source.times[i]) > SLACK:
                    raise Refused(f"the frame {at} cannot be decoded")
                if frame.is_corrupt:
                    raise Refused(f"the picture {at} is damaged")
                if (frame.width, frame.height) != (source.first.width, source.first.height):
                    raise Refused(f"the picture's size changes {at}")
                yield np.rot90(to_rgb(frame, size, source.colours), source.turns)
        except UNREADABLE as error:
            raise Refused(f"PyAV cannot read it: {said(error)}") from None
    if source.reordered and np.abs(np.sort(seen)[: last + 1] - source.times[: len(seen)][: last + 1]).max() > SLACK:
        raise Refused("a frame in it cannot be decoded, and its timestamps do not tell which")


def decoded(file, stream):
    """The frames of a stream. libvpx decodes VP9: it refuses most damage, which FFmpeg's own decoder lets pass."""
    decoder = stream
    if stream.codec_context.name == "vp9":
        with contextlib.suppress(av.codec.codec.UnknownCodecError):  # FFmpeg may be built without it
            decoder = av.CodecContext.create("libvpx-vp9", "r")
    for packet in file.demux(stream):
        yield from decoder.decode(packet)


def to_rgb(frame: av.VideoFrame, size: tuple[int, int], colours: int) -> np.ndarray:
    """A frame resized to (h, w): (h, w, 3) uint8. colours: its matrix, if it names none."""
    if frame.colorspace == UNSPECIFIED:
        frame.colorspace = colours
    return frame.to_ndarray(format="rgb24", height=size[0], width=size[1])


def gather(frames, last: int, chosen: np.ndarray, size: tuple[int, int], log, shrink) -> tuple[np.ndarray, list]:
    """The chosen (clips, T) of an iterator's frames 0 … last, cut at the centre: (clips, T, h, w, 3) uint8; and
    shrink(frame) of every frame, if there is such a function.

    Refuses the file if its decoder complained in the log or if the frames end too early.
    """
    pictures, small, count = np.empty((*chosen.shape, *size, 3), np.uint8), [], 0
    complaints(log)
    for count, frame in enumerate(frames, 1):
        top, left = (frame.shape[0] - size[0]) // 2, (frame.shape[1] - size[1]) // 2
        pictures[chosen == count - 1] = frame[top : top + size[0], left : left + size[1]]
        small += [shrink(frame)] if shrink else []
    if lines := complaints(log):
        raise Refused(f"its decoder complains: {lines[0]}")
    if count <= last:
        raise Refused(f"its pictures end after {count} frames")
    return pictures, small


def by_either(path: str, source: Source, last: int, cover: tuple[int, int], log, chosen, size, shrink):
    """Which of the two read frames 0 … last at size `cover`, and what `gather` makes of them."""
    with contextlib.suppress(Refused):
        return "decord", *gather(by_decord(path, source, last, cover), last, chosen, size, log, shrink)
    # outside the exception's handler, which would keep decord's threads alive and complaining
    return "PyAV", *gather(by_pyav(path, source, last, cover, log), last, chosen, size, log, shrink)


def complaints(log) -> list[str]:
    """What the libraries have printed since the last call, but for what they print for healthy files, too."""
    log.seek(0)
    lines = [re.sub(" @ 0x[0-9a-f]+", "", line.strip())[:160] for line in log.read().splitlines()]
    log.seek(0)
    log.truncate()
    return [line for line in lines if line and not any(h in line for h in HARMLESS)]


# ---- cuts ------------------------------------------------------------------------------------------------------------


def shrinker():
    """frame (h, w, 3) uint8 RGB -> (27, 48, 3) BGR, as PySceneDetect takes it."""
    import cv2

    cv2.setNumThreads(1)
    return lambda frame: cv2.resize(frame, SMALL, interpolation=cv2.INTER_AREA)[..., ::-1].copy()


def cuts_in(small: list[np.ndarray]) -> list[int]:
    """The frames at which a shot begins, but for the first; small: the frames from the first, by `shrinker`."""
    from scenedetect import FrameTimecode
    from scenedetect.detectors import AdaptiveDetector, ThresholdDetector

    def apart(i: int, j: int) -> float:
        return np.abs(small[i].astype(np.int16) - small[j]).mean()

    new, found = [i for i in range(len(small)) if not i or apart(i - 1, i) > ALIKE], set()
    for detector in (AdaptiveDetector(min_scene_len=1), ThresholdDetector(min_scene_len=1)):
        for place, i in enumerate(new):  # the rate is of no consequence: all limits are in frames
            found |= {at.frame_num for at in detector.process_frame(FrameTimecode(place, 25.0), small[i])}
    cuts = sorted(new[place] for place in found)
    near = [(a, b) for a, b in zip(cuts, cuts[1:]) if b - a <= FLASH]
    flashes = {i for a, b in near if apart(a - 1, b) < apart(a - 1, a) / 2 for i in (a, b)}
    return [i for i in cuts if i not in flashes]


def cuts_of_file(path: str, source: Source, cover: tuple[int, int], log, shrink) -> list[int]:
    """The cuts in all of a file, read once at a small size. cover: its larger one, for the shape."""
    last, scale = len(source.times) - 1, min(1, QUICK / min(cover))
    check_size(source.first.width, source.first.height, last + 1)
    quick, none = tuple(round(side * scale) for side in cover), np.empty((0, 0), int)
    return cuts_in(by_either(path, source, last, quick, log, none, quick, shrink)[2])


def ahead(times: np.ndarray, last: int) -> int:
    """The last frame that is looked at for a cut in frames 0 … last: within a second, as `look` may end there."""
    return min(last + AHEAD, int((times <= times[last] + 1).sum()) - 1)


def of_shots(times: np.ndarray, cuts: list[int], frames: int, fps: float | None, clips: int) -> np.ndarray:
    """`plan` of the shots that are long enough, without the frames beside a cut: spread evenly over all of their clips.

    Refuses a video that has none, by what is wrong with its longest.
    """
    ends = [0, *cuts, len(times)]
    shots = [(a + BESIDE * (a > 0), b - BESIDE * (b < len(times))) for a, b in zip(ends, ends[1:])]
    if not cuts:
        return plan(times, frames, fps, clips)
    found, why = [], {}
    for a, b in shots:
        if b > a:
            try:
                found += [*(a + plan(times[a:b], frames, fps, len(times)))]
            except Refused as error:
                why[times[b - 1] - times[a]] = error
    if not found:
        raise Refused(f"{cut_at(times, cuts)}, and its longest shot is {why[max(why)]}" if why else cut_at(times, cuts))
    return np.stack(found)[np.linspace(0, len(found) - 1, min(clips, len(found))).round().astype(int)]


def cut_at(times: np.ndarray, cuts: list[int]) -> str:
    """Where the first cut is, in words."""
    return f"a cut at {times[cuts[0]] - times[0]:.1f} s"


# ---- clips -----------------------------------------------------------------------------------------------------------


def longest_still(clip: np.ndarray) -> int:
    """The longest run of equal pictures."""
    longest = run = 1
    for a, b in zip(clip, clip[1:]):
        run = run + 1 if np.array_equal(a[0], b[0]) and np.array_equal(a, b) else 1
        longest = max(longest, run)
    return longest


def missing(source: Source, clip: np.ndarray) -> float | None:
    """The time (s) of the first missing frame that may have spoilt a picture of the clip, or None.

    A frame is missing where there is a gap in an otherwise steady rate. Only H.264 and HEVC number their frames: other
    decoders do not notice the loss and show wrong pictures until the next key frame. So does H.264's after a lost key
    frame.
    """
    times, steps = source.times, np.diff(source.times)
    if len(times) < 3 or (np.abs(steps - np.median(steps)) > SLACK).mean() > 0.1:  # the rate varies
        return None
    key = max(source.keys[source.keys < times[clip[0]] + SLACK], default=times[0])
    gaps = np.flatnonzero((steps > 1.5 * np.median(steps)) & (times[1:] > key) & (times[:-1] < times[clip[-1]]))
    return float(times[gaps[0]] + np.median(steps)) if len(gaps) else None


def read(request: dict, log) -> tuple[list[dict], list[np.ndarray]]:
    """The facts of each clip that is asked for, or why it is refused, and the pictures of each that is accepted."""
    path, frames, fps, clips, look_for = (request[key] for key in ("path", "frames", "fps", "clips", "cuts"))
    some = frames and clips == 1 and look_for != "split"
    source, shrink = look(path, frames / (fps or 1e-3) if some else math.inf, log), shrinker() if look_for else None
    with source.file:
        times = source.times
        size, cover = source.sizes(request["size"])
        chosen, cuts = plan(times, frames, fps, clips), []
        if look_for == "split":
            chosen, shrink = of_shots(times, cuts_of_file(path, source, cover, log, shrink), frames, fps, clips), None
        last = ahead(times, int(chosen.max())) if shrink else int(chosen.max())
        check_size(source.first.width, source.first.height, last + 1)
        reader, pictures, small = by_either(path, source, last, cover, log, chosen, size, shrink)
        cuts = cuts_in(small) if shrink else []
    facts, kept = [], []
    for index, clip in zip(chosen, pictures):
        if not request["still"] and (still := longest_still(clip)) > STILL:
            facts.append({"error": f"the picture stands still for {still} frames"})
        elif inside := [c for c in cuts if index[0] < c + BESIDE and c - BESIDE <= index[-1]]:
            facts.append({"error": cut_at(times, inside)})
        elif (time := missing(source, index)) is not None:
            facts.append({"error": f"the frame at {time:.2f} s is missing"})
        else:
            start = round(float(source.times[index[0]] - source.times[0]), 3)
            facts.append({"start": start, "index": index.tolist(), "reader": reader})
            kept.append(clip)
    return facts, kept


def said(error: Exception) -> str:
    """The last line of an error's text, without the path that an OSError's has."""
    text = getattr(error, "strerror", None) or str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:160] if lines else type(error).__name__


def end_with_parent() -> None:
    """Linux kills this process when the thread that started it ends, even while a decoder spins."""
    with contextlib.suppress(AttributeError, OSError):  # other systems wait for the end of the input, or for the alarm
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    end_with_parent()  # a parent that is gone already has sent no request: the input ends
    answers = os.fdopen(os.dup(1), "wb")
    log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
    for printed in (1, 2):  # whatever the libraries print goes to the log
        os.dup2(log.fileno(), printed)
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    av.logging.restore_default_callback()
    av.logging.set_libav_level(av.logging.ERROR)
    if decord:
        decord.logging.set_level(decord.logging.INFO)  # the level at which FFmpeg says what it conceals
    answers.write(b"ready\n")
    answers.flush()
    for line in sys.stdin:
        request, pictures = json.loads(line), []
        signal.alarm(math.ceil(request["deadline"]) + 10)  # in case the parent is gone and a decoder spins
        try:
            clips, pictures = read(request, log)
        except Refused as error:
            clips = [{"error": str(error)}]
        except MemoryError:
            clips = [{"error": f"too large: its pictures take more than {MAX_MEMORY / 2**30:g} GiB"}]
        except Exception as error:  # a damaged file may cause any error, and the run must go on; this text stands out
            clips = [{"error": f"decode.py failed: {type(error).__name__}: {said(error)}"}]
        answer = {"clips": clips, "shape": pictures[0].shape if pictures else None}
        answers.write(json.dumps(answer).encode() + b"\n")
        for clip in pictures:
            answers.write(clip.data)
        answers.flush()
        signal.alarm(0)


if __name__ == "__main__":
    main()

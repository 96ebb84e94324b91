"""Pictures from and to video files: decord reads, PyAV writes.

Frames are (T, h, w, 3) uint8 RGB arrays. Where decord has no wheel (it has none for ARM), PyAV reads too, and
says so once.
"""

import functools
import importlib.util
import sys
from pathlib import Path

import numpy as np

import common


class BadVideo(ValueError):
    """A video that cannot be used, and why."""


def read_clip(path: str | Path, frames: int, size: tuple[int, int] | None = None, exact: bool = False) -> np.ndarray:
    """The first `frames` frames of a video: (frames, h, w, 3) uint8 RGB.

    size (h, w) resizes, None keeps the file's. exact: the file must have just this number of frames.
    BadVideo if it cannot be read, is too short, or has another number of frames than its header says.
    """
    if not Path(path).is_file():
        raise BadVideo("no such file")
    count, clip = (_read_decord if _has_decord() else _read_av)(str(path), frames, size)
    if exact and count != frames:
        raise BadVideo(f"wrong frame count: expected {frames} frames, got {count}")
    if len(clip) != frames:
        raise BadVideo(f"wrong frame count: its header says {count}, decoding gave {len(clip)}")
    return clip


@functools.cache
def _has_decord() -> bool:
    if importlib.util.find_spec("decord"):
        return True
    print("video: decord is not installed (it has no wheel for this machine): reading with PyAV", file=sys.stderr)
    return False


def _read_decord(path: str, frames: int, size: tuple[int, int] | None) -> tuple[int, np.ndarray]:
    """The header's frame count, and the first frames."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)  # what goes wrong is said once, in the exception
    h, w = size or (-1, -1)
    try:
        reader = decord.VideoReader(path, width=w, height=h, num_threads=1)
        count = len(reader)
        if count < frames:
            raise BadVideo(f"too short: expected {frames} frames, got {count}")
        return count, reader.get_batch(range(frames)).asnumpy()
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        raise BadVideo(f"decord cannot read it: {_first_line(error)}") from None


def _read_av(path: str, frames: int, size: tuple[int, int] | None) -> tuple[int, np.ndarray]:
    """The same by PyAV, which decodes every frame to count them."""
    import av

    shape = {} if size is None else {"height": size[0], "width": size[1]}
    clip, count = [], 0
    try:
        with av.open(path) as file:
            for count, frame in enumerate(file.decode(video=0), 1):
                if count <= frames:
                    clip.append(frame.to_ndarray(format="rgb24", **shape))
    except (av.FFmpegError, IndexError) as error:
        raise BadVideo(f"PyAV cannot read it: {error}") from None
    if count < frames:
        raise BadVideo(f"too short: expected {frames} frames, got {count}")
    return count, np.stack(clip)


def _first_line(error: Exception) -> str:
    return next(
        (line.strip()[:160] for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__
    )


def write_mp4(path: str | Path, frames: np.ndarray, fps: int = 16, crf: int = 12) -> None:
    """Writes (T, h, w, 3) uint8 RGB, h and w even, as H.264 yuv420p; whole or not at all."""
    import av

    # no B-frames: with them the bytes vary from run to run
    options = {"crf": str(crf), "preset": "veryfast", "threads": "1", "bf": "0"}
    with common.whole_file(Path(path)) as temporary, av.open(str(temporary), "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        file.mux(stream.encode())


def to_pixels(frames: np.ndarray):
    """(T, h, w, 3) uint8 -> (3, T, h, w) float32 in [-1, 1]."""
    import torch

    return torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1


def to_frames(video) -> np.ndarray:
    """(3, T, h, w) float in [-1, 1] -> (T, h, w, 3) uint8."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()

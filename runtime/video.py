"""Pictures from and to video files. Frames are (T, h, w, 3) uint8 RGB arrays.

Reading goes through decode.py in a process of its own: decoders hang and crash on damaged files, and what they do then
must not stop a run.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from runtime import run as common

FATAL = ("took longer", "its decoder died")  # how the reasons begin of what one does not want to read again
CJK_FONTS = ("Noto Sans CJK SC", "Noto Sans SC", "WenQuanYi Zen Hei", "Microsoft YaHei", "PingFang SC", "SimHei")
STARTUP = 120  # s that the decoding process may take to start


class BadVideo(ValueError):
    """A video, or a clip of one, that cannot be used, and why."""


@dataclasses.dataclass(frozen=True)
class Clip:
    """What was read of a video, and from where in it."""

    frames: np.ndarray  # (T, h, w, 3) uint8 RGB
    start: float  # s from the video's first frame
    index: list[int]  # which of the video's frames each picture is
    reader: str  # decord or PyAV
    rate: float  # the video's frames a second, the median


class Decoder:
    """A process that reads videos. It is killed, and started again for the next one, when a video takes too long."""

    program = [sys.executable, str(Path(__file__).with_name("decode.py"))]

    def __init__(self, deadline: float = 60.0):
        """deadline: seconds a video."""
        self.deadline = deadline
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def read(
        self,
        path: str | Path,
        frames: int | None,
        size: tuple[int, int] | None = None,
        fps: float | None = None,
        clips: int = 1,
        exact: bool = False,
    ) -> list[Clip | BadVideo]:
        """Up to `clips` clips of `frames` pictures each, spread evenly over the video and without overlap. frames None:
        one clip, the whole video, and its picture may stand still.

        size (h, w) px: the picture, upright and with square pixels, is resized to cover it and cut at the centre; None
        keeps the file's. fps: each picture is the frame on the screen at its time, counted from the first; None takes
        every frame. exact: the video must have just this number. Of several clips one that is no good comes as a
        BadVideo. Raises BadVideo if there is no clip in it that can be trusted.
        """
        if not Path(path).is_file():
            raise BadVideo("no such file")
        request = dict(path=str(path), frames=frames, size=size, fps=fps, clips=clips, exact=exact)
        answer, arrays = self._ask(json.dumps({**request, "deadline": self.deadline}))
        if "error" in answer:
            raise BadVideo(answer["error"])
        found = []
        for facts in answer["clips"]:
            error, _ = facts.pop("error", None), facts.pop("shape")
            found.append(BadVideo(error) if error else Clip(frames=arrays.pop(0), **facts))
        if not any(isinstance(clip, Clip) for clip in found):
            raise found[0]
        return found

    def _ask(self, request: str) -> tuple[dict, list[np.ndarray]]:
        """Sends a request, reads the answer. BadVideo if the process dies of it, or is killed for its deadline."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        process, late = self._process, threading.Event()
        try:
            with _timer(self.deadline, lambda: (late.set(), process.kill())):
                process.stdin.write(request.encode() + b"\n")
                process.stdin.flush()
                answer = json.loads(process.stdout.readline())
                good = [facts["shape"] for facts in answer.get("clips", []) if "error" not in facts]
                arrays = [_read_array(process.stdout, shape) for shape in good]
        except (OSError, ValueError):  # no line, or less than all: it is gone, or about to be
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
            self.close()
            reason = f"{FATAL[0]} than {self.deadline:g} s" if late.is_set() else FATAL[1]
            raise BadVideo(f"{reason} (exit {process.returncode})") from None
        if late.is_set():  # it was killed just after it had answered
            self.close()
        return answer, arrays

    def _start(self) -> None:
        self.close()
        # a session of its own: Ctrl-C is for this process alone, the other one ends when its input does
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        alone = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # numpy reserves memory for each: decode.py limits its own
        process = self._process = subprocess.Popen(self.program, **pipes, env=alone, start_new_session=True)
        with contextlib.suppress(ImportError, AttributeError, OSError):  # on Linux; fewer turns for a clip of megabytes
            import fcntl

            fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 2**20)
        with _timer(STARTUP, process.kill):
            ready = process.stdout.readline()
        if ready != b"ready\n":
            self.close()
            raise common.UserError(f"{self.program[-1]} did not start: check that av and numpy can be imported")

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        process, self._process = self._process, None  # first: two threads may close
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # what was not sent is not missed
                    pipe.close()


@contextlib.contextmanager
def _timer(seconds: float, function: Callable) -> Iterator[None]:
    """Within it, function is called once `seconds` are over."""
    timer = threading.Timer(seconds, function)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _read_array(file, shape: list[int]) -> np.ndarray:
    array = np.empty(shape, np.uint8)
    if file.readinto(array.data.cast("B")) != array.nbytes:
        raise OSError("cut short")
    return array


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


def read_clip(
    path: str | Path, frames: int, size: tuple[int, int] | None = None, fps: float | None = None, exact: bool = False
) -> np.ndarray:
    """A video's first clip, (frames, h, w, 3) uint8 RGB, read as `Decoder.read` does. Raises BadVideo."""
    with Decoder() as decoder:
        return decoder.read(path, frames, size, fps, exact=exact)[0].frames


def contact_sheet(path: Path, title: str, cells: list[tuple[np.ndarray | None, str]]) -> None:
    """Draws a PNG of clips: words, and below them pictures (n, h, w, 3) side by side, or a grey box for None."""
    from matplotlib import font_manager
    from matplotlib.figure import Figure

    columns = 3
    rows = max(1, -(-len(cells) // columns))
    figure = Figure(figsize=(5 * columns, 1.5 * rows + 0.5), dpi=100, layout="constrained")
    figure.suptitle(title)
    installed = {font.name for font in font_manager.fontManager.ttflist}
    family = ["DejaVu Sans", *(name for name in CJK_FONTS if name in installed)]
    for place, ax in enumerate(np.ravel(figure.subplots(rows, columns))):
        ax.axis("off")
        if place < len(cells):
            pictures, words = cells[place]
            if pictures is None:
                pictures = np.full((1, 9, 16, 3), 200, np.uint8)
            gap = [(0, 0), (0, 0), (0, pictures.shape[2] // 32), (0, 0)]
            ax.imshow(np.concatenate(np.pad(pictures, gap, constant_values=255), axis=1))
            ax.set_title("\n".join(textwrap.wrap(words, 80)[:2]), fontsize=8, family=family, parse_math=False)
    with common.whole_file(path) as temporary, warnings.catch_warnings(category=UserWarning, action="ignore"):
        figure.savefig(temporary, format="png")  # a script that no installed font has is drawn as boxes


def to_pixels(frames: np.ndarray):
    """(T, h, w, 3) uint8 -> (3, T, h, w) float32 in [-1, 1]."""
    import torch

    return torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1


def to_frames(video) -> np.ndarray:
    """(3, T, h, w) float in [-1, 1] -> (T, h, w, 3) uint8."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()

"""Pictures from and to video files. Frames are (T, h, w, 3) uint8 RGB arrays.

decode.py reads the files in a process of its own: decoders hang and crash on damaged files, and that must not stop a
run.
"""

import collections
import contextlib
import dataclasses
import fcntl
import json
import os
import queue
import stat
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from runtime.files import whole_file
from runtime.options import UserError

FATAL = ("took longer", "its decoder died")  # how the reasons begin for which a file should not be read again
CJK_FONTS = ("Noto Sans CJK SC", "Noto Sans SC", "WenQuanYi Zen Hei", "Microsoft YaHei", "PingFang SC", "SimHei")


def check_size(frames: int, height: int, width: int, side: int) -> None:
    """UserError unless the codec takes such clips: 4k+1 frames, height and width multiples of `side` px."""
    if frames % 4 != 1 or frames < 5:
        near = max(5, frames // 4 * 4 + 1)
        raise UserError(f"--frames: expected 4k+1 (a latent frame holds 4), at least 5, got {frames}; try {near}")
    if height % side or width % side or min(height, width) < side:
        raise UserError(f"--height, --width: expected multiples of {side}, got {height} x {width}")


# ---- reading ---------------------------------------------------------------------------------------------------------


class BadVideo(ValueError):
    """Why a video, or a clip of it, cannot be used."""


@dataclasses.dataclass(frozen=True)
class Clip:
    """Pictures of a video, and where they are from."""

    frames: np.ndarray  # (T, h, w, 3) uint8 RGB
    start: float  # s after the video's first frame
    index: list[int]  # which frame of the video each picture is
    reader: str  # decord or PyAV


def regular_file(path: str | Path) -> str:
    """The path without links, absolute: no decoder takes it for a protocol. BadVideo if it leads to anything else."""
    try:
        real = os.path.realpath(path, strict=True)
        if stat.S_ISREG(os.stat(real).st_mode):
            return real
    except FileNotFoundError:
        raise BadVideo("no such file") from None
    except (OSError, ValueError) as error:  # ValueError: NUL, or half of a surrogate pair
        raise BadVideo(f"it cannot be opened: {getattr(error, 'strerror', error)}") from None
    raise BadVideo("it is no regular file")


class Decoder(contextlib.AbstractContextManager):
    """A process that reads videos. It is killed when a video takes too long, and started again for the next one.

    On Linux it also ends with the thread that started it, by reading a video.
    """

    program = [sys.executable, str(Path(__file__).with_name("decode.py"))]

    def __init__(self, deadline: float = 60.0):
        """deadline: seconds that a video may take."""
        self.deadline = deadline
        self._process: subprocess.Popen | None = None

    def __exit__(self, *error) -> None:
        self.close()

    def read(
        self,
        path: str | Path,
        frames: int | None,
        size: tuple[int, int] | None = None,
        fps: float | None = None,
        clips: int = 1,
        still: bool = False,
        cuts: str = "",
    ) -> list[Clip | BadVideo]:
        """Reads up to `clips` clips of `frames` pictures each, spread evenly over the video without overlap.

        frames None: one clip of the whole video. size (h, w) px: the upright picture, with square pixels, is resized to
        cover it and cut at the centre; None keeps the file's size. fps: each picture is the frame on the screen at its
        time, counted from the first; None takes every frame. still: the picture may stand still, as in whole videos.
        cuts: "reject" refuses clips with a cut inside, "split" takes them from the shots; both need PySceneDetect.

        A BadVideo stands in the place of a clip that cannot be trusted. Raises BadVideo if there is no good clip.
        """
        request = dict(frames=frames, size=size, fps=fps, clips=clips, still=still or not frames, cuts=cuts)
        answer, arrays = self._ask(path=regular_file(path), **request)
        found = [BadVideo(f["error"]) if "error" in f else Clip(arrays.pop(0), **f) for f in answer["clips"]]
        if not any(isinstance(clip, Clip) for clip in found):
            raise found[0]
        return found

    def _ask(self, **request) -> tuple[dict, list[np.ndarray]]:
        """Sends a request and reads the answer. BadVideo if the process dies or is killed at its deadline."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        process, late = self._process, threading.Event()
        timer = threading.Timer(self.deadline, lambda: (late.set(), process.kill()))
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(json.dumps({**request, "deadline": self.deadline}).encode() + b"\n")
            process.stdin.flush()
            answer, arrays = json.loads(process.stdout.readline()), []
            for _ in (facts for facts in answer["clips"] if "error" not in facts):
                arrays.append(np.empty(answer["shape"], np.uint8))
                if process.stdout.readinto(arrays[-1].data.cast("B")) != arrays[-1].nbytes:
                    raise OSError("cut short")
        except (OSError, ValueError):  # no answer, or only a part of one: the process is gone, or about to be
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
            self.close()
            reason = f"{FATAL[0]} than {self.deadline:g} s" if late.is_set() else FATAL[1]
            raise BadVideo(f"{reason} (exit {process.returncode})") from None
        finally:
            timer.cancel()
            timer.join()  # or it may still kill
        if late.is_set():  # it was killed just after it had answered
            self.close()
        return answer, arrays

    def _start(self) -> None:
        self.close()
        process = self._process = subprocess.Popen(
            self.program,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # each takes address space, which decode.py limits
            start_new_session=True,  # Ctrl-C is for this process alone; the other one ends when its input does
        )
        with contextlib.suppress(AttributeError, OSError):  # on Linux: a clip of megabytes in fewer turns
            fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 2**20)
        if process.stdout.readline() != b"ready\n":
            self.close()
            raise UserError(f"{self.program[-1]} did not start: check that numpy and av>=17.1 can be imported")

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        process, self._process = self._process, None  # first, as two threads may close it
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # nobody misses what was not sent
                    pipe.close()


@contextlib.contextmanager
def readers(count: int, deadline: float = 60.0) -> Iterator[Callable]:
    """Yields each(function, rows), which yields function(decoder, row) of every row, in order.

    `count` decoding processes work at most two rows each ahead of whoever asks. Leaving the block stops them at once.
    deadline: seconds that a video may take.
    """
    decoders, free, pool = [Decoder(deadline) for _ in range(count)], queue.SimpleQueue(), ThreadPoolExecutor(count)
    for decoder in decoders:
        free.put(decoder)

    def call(function: Callable, row):
        decoder = free.get()
        try:
            return function(decoder, row)
        finally:
            free.put(decoder)

    def each(function: Callable, rows: Iterable) -> Iterator:
        waiting = collections.deque()
        for row in rows:
            waiting.append(pool.submit(call, function, row))
            if len(waiting) > 2 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        yield each
    finally:
        for wait in (False, True):  # closing a decoder ends its reading; the second time ends what was just starting
            pool.shutdown(wait, cancel_futures=True)
            for decoder in decoders:
                decoder.close()


def read_clip(
    path: str | Path, frames: int | None, size: tuple[int, int] | None = None, fps: float | None = None
) -> np.ndarray:
    """The first clip of a video as `Decoder.read` reads it, (T, h, w, 3) uint8 RGB. Raises BadVideo."""
    with Decoder() as decoder:
        return decoder.read(path, frames, size, fps)[0].frames


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_mp4(path: str | Path, frames: np.ndarray, fps: int = 16, crf: int = 12) -> None:
    """Writes (T, h, w, 3) uint8 RGB, h and w even, as H.264 yuv420p, whole or not at all."""
    import av

    # no B-frames: with them the bytes vary from run to run
    options = {"crf": str(crf), "preset": "veryfast", "threads": "1", "bf": "0"}
    with whole_file(Path(path)) as temporary, av.open(str(temporary), "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        file.mux(stream.encode())


def contact_sheet(path: Path, title: str, cells: list[tuple[np.ndarray | None, str]], columns: int = 3) -> None:
    """Draws a PNG of cells: words, and below them pictures (n, h, w, 3) side by side, or a grey box for None."""
    from matplotlib import font_manager
    from matplotlib.figure import Figure

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
    with whole_file(path) as temporary, warnings.catch_warnings(category=UserWarning, action="ignore"):
        figure.savefig(temporary, format="png")  # letters that no installed font has are drawn as boxes


def histogram(path: Path, title: str, scores: tuple[list[float], list[float]], option: str, least: float) -> None:
    """Draws a PNG of the scores that were kept and of those that were rejected, below `least` as `option` has it.

    The highest hundredth of them counts into the last bar.
    """
    from matplotlib.figure import Figure

    end = max([*np.quantile(scores[0] + scores[1], [0.99]), least * 1.1, 1e-6] if any(scores) else [1.0])
    start = min([0.0, *scores[0], *scores[1]])
    figure = Figure(figsize=(6.4, 3.8), dpi=125, layout="constrained")
    ax = figure.add_subplot()
    labels = [f"{words}: {len(some):,}" for words, some in zip(("kept", f"rejected by {option}"), scores)]
    bins = np.linspace(start, end, 41)
    ax.hist([np.minimum(some, end) for some in scores], bins, stacked=True, label=labels, color=["#4477aa", "#ee6677"])
    ax.axvline(least, color="#222222", linestyle="--", label=f"{option} {least:g}")
    ax.set_xlabel(title)
    ax.set_ylabel("clips")
    ax.set_xlim(start, end)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png")


def to_pixels(frames: np.ndarray):
    """(T, h, w, 3) uint8 -> (3, T, h, w) float32 in [-1, 1]."""
    import torch

    return torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1


def to_frames(video) -> np.ndarray:
    """(3, T, h, w) float in [-1, 1] -> (T, h, w, 3) uint8."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()

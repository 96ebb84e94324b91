"""video.Decoder on files of every kind: each is read right in every picture, or refused, and the next one is read."""

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

import hostile
import pytest

from runtime import video

LIMIT, DEADLINE = 10.0, 8.0  # s: what a file may take, and the decoder's own deadline
WAYS = [(49, None, None), (17, (96, 120), 16)]  # frames, size, fps
HEALTHY = "B-frames"  # a class of healthy files


@pytest.fixture(scope="module")
def decoder():
    with video.Decoder(DEADLINE) as decoder:
        yield decoder


def read(decoder, case: hostile.Case, frames: int, size=None, fps=None) -> video.Clip | str:
    """The first clip, with every picture checked, or the reason why there is none."""
    began, expected = time.monotonic(), case.expected(frames, fps)
    try:
        clip = decoder.read(case.path, frames, size, fps)[0]
    except video.BadVideo as error:
        return str(error)
    finally:
        assert time.monotonic() - began < LIMIT
    assert case.wrong(clip.frames, expected, stretched=size is None) == 0
    assert len(clip.frames) == frames and size in (None, clip.frames.shape[1:3]) and clip.start == 0
    assert [case.numbers[i] for i in clip.index] == expected
    return clip


def healthy(decoder, folder: Path) -> None:
    """A healthy file is read."""
    name = next(str(i) for i in range(100) if not (folder / str(i)).exists())
    assert isinstance(read(decoder, hostile.make(HEALTHY, folder / name), 49), video.Clip)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", hostile.CASES)
def test_right_or_refused(decoder, name, tmp_path):
    """Every picture is the one that the file shows at its time. Healthy files are read, others may be refused."""
    case = hostile.make(name, tmp_path)
    for frames, size, fps in WAYS:
        got, expected = read(decoder, case, frames, size, fps), case.expected(frames, fps)
        twice = sum(a == b for a, b in zip(expected or [], (expected or [])[1:])) if fps else 0
        if case.must == "refuse" or expected is None or case.must == "read" and twice > 0.1 * frames:
            assert isinstance(got, str) and got
        elif case.must == "read":
            assert isinstance(got, video.Clip), got


def test_number_is_read_from_no_other_picture():
    """The check itself: a number is found only at its size and place, and in no mixture of two pictures."""
    a, b = hostile.picture(77), hostile.picture(78)
    assert [hostile.number(hostile.picture(n), hostile.SHAPE) for n in range(256)] == list(range(256))
    for other in (a // 2 + b // 2, a[::-1], a[:, ::-1], a[::-1, ::-1], a[:, 40:], a.swapaxes(0, 1), a * 0):
        assert hostile.number(other, hostile.SHAPE) is None


@pytest.mark.parametrize("name", ["B-frames", "open GOP", "HEVC, open GOP", "MPEG-2", "VP9", "turned by 90°"])
def test_several_clips(decoder, name, tmp_path):
    """Clips from a file's beginning, middle and end: each with its own pictures, none in two of them."""
    case = hostile.make(name, tmp_path)
    for fps in (None, 16):
        clips = decoder.read(case.path, 17, (96, 120), fps, clips=3)
        assert len(clips) == 3 and clips[0].start == 0
        for clip in clips:
            start = round(clip.start * 16) / 16 if fps else clip.start  # the time of its picture, or that picture's
            assert case.wrong(clip.frames, case.expected(17, fps, start), stretched=False) == 0
        index = sum((clip.index for clip in clips), [])
        assert index == sorted(set(index)) and index[-1] > 80


@pytest.mark.parametrize("codec", ["H.264", "HEVC", "VP9"])
def test_a_packet_is_cut_out(decoder, codec, tmp_path):
    """No gap in the times shows it, but these decoders notice."""
    assert isinstance(read(decoder, hostile.make(f"a packet cut out, {codec}", tmp_path), 49), str)


def test_the_whole_video(decoder, tmp_path):
    """Without a number of frames all of them are read, if they fit into the memory."""
    for name, count in (("1 frame", 1), (HEALTHY, hostile.N)):
        case = hostile.make(name, tmp_path / name)
        pictures = decoder.read(case.path, None)[0].frames
        assert len(pictures) == count and case.wrong(pictures, case.expected(count), stretched=True) == 0
    with pytest.raises(video.BadVideo, match="too large"):
        decoder.read(hostile.make("bomb: 16 GB of pictures", tmp_path).path, None)


def test_random_damage(decoder, tmp_path):
    """30 random cuts and flips: whatever is read from a cut file is right, and the next file is read."""
    for name in ("25 fps", "VP9", "MPEG-2, ts"):
        case = hostile.make(name, tmp_path)
        whole = case.path.read_bytes()
        for seed in range(10):
            case.path.write_bytes(hostile.spoil(whole, seed))
            if seed % 2:
                read(decoder, case, 33)
            else:  # no decoder notices every flip: bench/videos.py counts those that pass
                with contextlib.suppress(video.BadVideo):
                    decoder.read(case.path, 33)
    healthy(decoder, tmp_path)


# ---- decoders --------------------------------------------------------------------------------------------------------


def test_a_decoder_that_spins_is_killed(monkeypatch, tmp_path):
    """At its deadline, which the error names. The next file is read."""
    monkeypatch.setattr(video.Decoder, "program", [sys.executable, "-c", hostile.SPIN])
    (tmp_path / "spin.mp4").write_bytes(b"")
    with video.Decoder() as decoder:
        for _ in range(3):
            decoder.deadline = DEADLINE
            healthy(decoder, tmp_path)
            began, decoder.deadline = time.monotonic(), 1.0
            with pytest.raises(video.BadVideo, match="1 s"):
                decoder.read(tmp_path / "spin.mp4", 49)
            assert time.monotonic() - began < 3


def test_a_decoder_that_is_killed(tmp_path):
    """Between two files or while it reads: no other file than the one it was reading is lost."""
    with video.Decoder(DEADLINE) as decoder:
        healthy(decoder, tmp_path)
        os.kill(decoder._process.pid, signal.SIGKILL)
        decoder._process.wait()
        healthy(decoder, tmp_path)
        case = hostile.make(HEALTHY, tmp_path / "while")
        for delay in (0.0, 0.01, 0.03):
            killer = threading.Timer(delay, os.kill, (decoder._process.pid, signal.SIGKILL))
            killer.start()
            read(decoder, case, 49)
            killer.join()
            healthy(decoder, tmp_path / str(delay))


def test_no_decoder_is_left(tmp_path):
    """Leaving the block ends the process, by an exception too."""
    with pytest.raises(KeyError), video.Decoder(DEADLINE) as decoder:
        healthy(decoder, tmp_path)
        process = decoder._process
        raise KeyError
    assert process.poll() is not None

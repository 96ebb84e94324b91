"""video.Decoder on files of every kind: each is read right in every picture, or refused, and the next one is read."""

import contextlib
import functools
import http.server
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import hostile
import numpy as np
import pytest

from bench import torture
from runtime import dataset, video

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


def test_number_is_read_from_no_other_picture():
    """The check itself: a number is found only at its size and place, and in no mixture of two pictures."""
    a, b = hostile.picture(77), hostile.picture(78)
    assert [hostile.number(hostile.picture(n), hostile.SHAPE) for n in range(256)] == list(range(256))
    for other in (a // 2 + b // 2, a[::-1], a[:, ::-1], a[::-1, ::-1], a[:, 40:], a.swapaxes(0, 1), a * 0):
        assert hostile.number(other, hostile.SHAPE) is None


@pytest.mark.parametrize("name", [name for name in hostile.CASES if name.startswith(("B-frames, ", "a tag", "GIF"))])
def test_right_or_refused(decoder, name, tmp_path):
    """B-frames in every container, tags in Latin-1, formats that are not read. bench/torture.py reads all classes."""
    case = hostile.make(name, tmp_path)
    for way in WAYS:
        assert torture.right_or_refused(decoder, case, *way) == ""


@pytest.mark.parametrize("ending", [".3gp", ".MTS", ".m4v"])
def test_phones_and_cameras(decoder, ending, tmp_path):
    """Their endings, in capitals, too, are those of containers that are read."""
    assert isinstance(read(decoder, hostile.write(tmp_path / f"video{ending}"), 49), video.Clip)
    assert f"video{ending}".lower().endswith(dataset.VIDEOS)


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


# ---- other files -----------------------------------------------------------------------------------------------------

PLAYLISTS = {  # what each makes a reader open
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile {}\n",
    "sdp": "v=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=control:{}\n",
}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A healthy file (.ts), its address on a server, and the requests that the server got."""
    case, requests = hostile.make("MPEG-2, ts", tmp_path_factory.mktemp("elsewhere")), []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *words):
            requests.append(words)

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=case.path.parent)
    ) as server:
        threading.Thread(target=server.serve_forever).start()
        yield case.path, f"http://127.0.0.1:{server.server_port}/{case.path.name}", requests
        server.shutdown()


@pytest.mark.parametrize("ending", [".mp4", ".m3u8", ".ts"])
@pytest.mark.parametrize("kind", PLAYLISTS)
def test_a_playlist_is_refused(decoder, elsewhere, kind, ending, tmp_path):
    """By its format's name, whatever it points at, even if a stream follows that makes it a healthy file, too."""
    path, address, requests = elsewhere
    shutil.copy(path, tmp_path)
    os.mkfifo(tmp_path / "fifo.ts")  # whoever opens it waits for ever
    for target in (path, path.name, f"file:{path}", tmp_path / "fifo.ts", address):
        text = PLAYLISTS[kind].format(target).encode()
        for more in (b"", b"\n" * (-len(text) % 188) + path.read_bytes()):
            (tmp_path / f"video{ending}").write_bytes(text + more)
            with pytest.raises(video.BadVideo, match=kind):
                decoder.read(tmp_path / f"video{ending}", 33)
    assert not requests


def test_a_path_is_no_address(decoder, elsewhere, monkeypatch, tmp_path):
    """Names that FFmpeg gives a meaning are files' names. What is no regular file is refused."""
    path, address, requests = elsewhere
    case = hostile.make(HEALTHY, tmp_path)
    monkeypatch.chdir(tmp_path)
    names = [
        "file:a.mp4",
        "concat:a.mp4",
        "subfile,,start,0,end,9,,:a",
        "data:a",
        "-i",
        "a%03d.mp4",
        "*.mp4",
        "é\n.mp4",
    ]
    for name in [*names, os.fsdecode(b"\xff.mp4")]:
        shutil.copy(case.path, name)
        assert len(decoder.read(name, 49)[0].frames) == 49
    os.mkfifo("fifo")
    os.symlink("loop", "loop")
    os.symlink("/dev/zero", "zero.mp4")
    others = [f"file:{path}", f"concat:{path}", f"subfile,,start,0,end,0,,:{path}", address, "pipe:0", "-", "img%03d"]
    for name in [*others, "", ".", "fifo", "loop", "zero.mp4", "/dev/stdin", "a\0", "\ud800", "x" * 300, f"{path}/x"]:
        with pytest.raises(video.BadVideo, match="no such file|no regular file|cannot be opened"):
            decoder.read(name, 49)
    assert not requests


# ---- colours ---------------------------------------------------------------------------------------------------------

PATCHES = np.array([(r, g, b) for r in (16, 96, 240) for g in (16, 128, 240) for b in (16, 200)], float)
WEIGHTS = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 5: (0.299, 0.114), 7: (0.212, 0.087), 9: (0.2627, 0.0593)}
WEIGHTS |= {2: WEIGHTS[5], 6: WEIGHTS[5]}  # of red and blue, by the matrix's number (ITU-T H.273, table 4)


def coloured(path: Path, matrix=2, full=False, codec="libx264", bits=8, transfer=2, named=True) -> Path:
    """Four equal pictures of PATCHES, each 32 x 32, as Y'CbCr. named: by the pictures, not only by the container."""
    (red, blue), colours = WEIGHTS.get(matrix, WEIGHTS[5]), PATCHES / 255
    y = colours @ (red, 1 - red - blue, blue)
    planes = [y, (colours[:, 2] - y) / (2 - 2 * blue), (colours[:, 0] - y) / (2 - 2 * red)]
    scales = [(255, 0), (255, 128), (255, 128)] if full else [(219, 16), (224, 128), (224, 128)]
    levels = [(plane * scale + zero) * 2 ** (bits - 8) for plane, (scale, zero) in zip(planes, scales)]
    pix_fmt = "yuv444p10le" if bits == 10 else "yuv444p"
    options = {"libx265": {"x265-params": "log-level=none:qp=4"}, "libx264": {"crf": "4"}}.get(codec, {})
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 32 * len(PATCHES), 32, pix_fmt
        context = stream.codec_context
        context.colorspace, context.color_trc, context.color_primaries = matrix, transfer, 1
        context.color_range = 1 + full
        for i in range(4):
            frame = av.VideoFrame(stream.width, stream.height, pix_fmt)
            frame.pts, frame.time_base = i, Fraction(1, 25)
            if named:
                frame.colorspace, frame.color_range = matrix, 1 + full
            for plane, level in zip(frame.planes, levels):
                row = np.repeat(level.round(), 32).astype(np.uint16 if bits == 10 else np.uint8)
                plane.update(np.tile(np.resize(row, plane.line_size // row.itemsize), (plane.height, 1)))
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def test_colours(decoder, tmp_path):
    """Of every matrix and range, by both readers. Where a file names no matrix it is BT.601's."""
    cases = [dict(matrix=matrix, full=full) for matrix in WEIGHTS for full in (False, True)]
    cases += [dict(matrix=matrix, codec="libx265", bits=10) for matrix in (1, 9)]
    cases += [dict(matrix=1, codec="prores_ks", bits=10, transfer=1, named=False)]
    for i, case in enumerate(cases):
        clip = decoder.read(coloured(tmp_path / f"{i}.mov", **case), 4)[0]
        seen = clip.frames[0].reshape(32, -1, 32, 3)[8:24, :, 8:24].mean((0, 2))
        assert np.abs(seen - PATCHES).max() < 3, (case, clip.reader)


def test_colours_that_are_refused(decoder, tmp_path):
    """HDR by its name, and matrices that FFmpeg cannot turn into RGB."""
    for codec, bits in (("libx264", 8), ("libx265", 10), ("prores_ks", 10)):
        for transfer, name in ((16, "PQ"), (18, "HLG")):
            path = coloured(tmp_path / f"{codec}{name}.mov", 9, False, codec, bits, transfer)
            with pytest.raises(video.BadVideo, match=f"HDR .{name}.*zscale"):
                decoder.read(path, 4)
    for matrix in (8, 10, 14):
        with pytest.raises(video.BadVideo, match=f"matrix is number {matrix}"):
            decoder.read(coloured(tmp_path / f"{matrix}.mov", matrix), 4)


# ---- decoders --------------------------------------------------------------------------------------------------------


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


# a process that starts a decoder, as video.Decoder does, and makes it spin
PARENT = """
import subprocess, sys
decoder = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=-1, stdout=-1, start_new_session=True)
decoder.stdout.readline()
decoder.stdin.write(b'{"path": "spin.mp4", "frames": 1, "fps": 1, "clips": 1, "cuts": "", "deadline": 60}\\n')
decoder.stdin.flush()
print(decoder.pid, flush=True)
decoder.wait()
"""


def gone(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return "Z" in Path(f"/proc/{pid}/stat").read_text().split(") ")[-1].split()[0]
    return True


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process that its parent is gone")
def test_no_decoder_is_left():
    """A process that is killed, or told to end, takes its decoder along, even one that spins."""
    for number in (signal.SIGKILL, signal.SIGTERM):
        with subprocess.Popen([sys.executable, "-c", PARENT, hostile.SPIN], stdout=subprocess.PIPE) as parent:
            pid = int(parent.stdout.readline())
            time.sleep(0.1)  # it spins now
            assert not gone(pid)
            parent.send_signal(number)
            parent.wait()
            began = time.monotonic()
            while not gone(pid) and time.monotonic() - began < 5:
                time.sleep(0.01)
            assert time.monotonic() - began < 1


def test_leaving_the_block(tmp_path):
    """It ends the process, by an exception too."""
    with pytest.raises(KeyError), video.Decoder(DEADLINE) as decoder:
        healthy(decoder, tmp_path)
        process = decoder._process
        raise KeyError
    assert process.poll() is not None

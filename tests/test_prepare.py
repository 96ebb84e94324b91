"""Stage 0: what is read from videos and captions, how clips are split, and what is left out by name."""

import csv
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from helpers import contents, cut, real_clips, refused

import flow
import prepare
from prepare import Config
from runtime import decode, video
from runtime.files import inside, read_csv, read_jsonl, write_jsonl
from runtime.options import UserError, resolve
from runtime.shards import Shards, batch_order
from tiny import codec as codecs
from tiny.words import WordVectors

CLIPS = 6


def clip(T: int = 49, size: int = 64, speed: float = 1.0) -> np.ndarray:
    """A picture (T, size, size, 3) that moves."""
    ramp = np.arange(size)[None, :] + speed * np.arange(T)[:, None]
    row = (127 + 100 * np.sin(ramp / 6)).astype(np.uint8)
    return np.broadcast_to(row[:, None, :, None], (T, size, size, 3)).copy()


def write_csv(folder: Path, rows: list[dict]) -> None:
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def captions(chain) -> list[dict]:
    return list(csv.DictReader((chain / "clips" / "metadata.csv").open(encoding="utf-8")))[:CLIPS]


@pytest.fixture
def folder(chain, tmp_path) -> Path:
    """Some rendered clips with their metadata.csv."""
    to = tmp_path / "videos"
    to.mkdir()
    write_csv(to, captions(chain))
    for row in captions(chain):
        (to / row["video"]).write_bytes((chain / "clips" / row["video"]).read_bytes())
    return to


def run(folder: Path, out: str = "out", **changes) -> Shards:
    to = folder.parent / out
    prepare.main(Config(**{"videos": str(folder), "out": str(to), "shard_size": 4, "workers": 1, **changes}))
    return Shards(to, "prepare.py")


def rejects(folder: Path, out: str = "out") -> dict[str, str]:
    return {row["video"]: row["reason"] for row in read_jsonl(folder.parent / out / "rejects.jsonl")}


def replace(folder: Path, fps: int = 16, **videos: np.ndarray) -> None:
    """Puts these videos into the folder in place of its own; the caption of each is its name."""
    for path in folder.iterdir():
        path.unlink()
    for name, frames in videos.items():
        video.write_mp4(folder / f"{name}.mp4", frames, fps)
        (folder / f"{name}.txt").write_text(name)


# ---- captions --------------------------------------------------------------------------------------------------------


def test_both_kinds_of_captions_give_the_same_shards(chain, folder):
    """metadata.csv and name.txt: byte for byte, where the table says no more."""
    write_csv(folder, [{"video": row["video"], "caption": row["caption"]} for row in captions(chain)])
    assert [row["caption"] for row in run(folder, "csv").rows] == [row["caption"] for row in captions(chain)]
    (folder / "metadata.csv").unlink()
    for row in captions(chain):
        (folder / row["video"]).with_suffix(".txt").write_text(row["caption"] + "\n")
    run(folder, "txt")
    assert contents(folder.parent / "csv") == contents(folder.parent / "txt")


def test_what_a_shard_holds(chain, folder):
    """Latents are the codec's of the decoded frames, text states the words', facts those of the metadata.

    A rejected clip in the middle of a shard does not shift the captions of those after it.
    """
    rows = captions(chain)
    (folder / rows.pop(1)["video"]).write_text("no video")
    shards, codec, true = run(folder), codecs.load(folder.parent / "out"), []
    assert shards.shape("x0") == (28, 13, 1, 1)
    assert [(row["video"], row["caption"]) for row in shards.rows] == [(row["video"], row["caption"]) for row in rows]
    with video.Decoder() as decoder:
        for i, row in enumerate(shards.rows):
            true.append(video.to_pixels(decoder.read(folder / row["video"], 49)[0].frames))
            assert torch.equal(shards.get("x0", [i])[0], codec.encode(true[i][None])[0])
            assert torch.equal(shards.states([i])[0], WordVectors().encode([row["caption"]])[0])
    back, true = codec.decode(shards.get("x0", range(CLIPS - 1))), torch.stack(true)
    assert (back - true).square().mean() < 0.03 * true.var()  # the codec keeps what is seen


# ---- videos ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, size",
    [("bigbuckbunny", (720, 1280)), ("bikes", (272, 640)), ("carphone_pristine", (144, 176)), ("cityCC0", (405, 720)),
     ("vtest", (576, 768))],
)  # fmt: skip
def test_frames_of_real_files(name, size):
    """Real files at their own size: the frames of read_clip are PyAV's, from the first.

    Bit for bit, but for MS-MPEG4, whose inverse transform each version of FFmpeg may round as it likes.
    """
    if name not in real_clips():
        pytest.skip(f"needs {name}, see tests/helpers.py")
    frames = video.read_clip(real_clips()[name], 33)
    assert frames.shape == (33, *size, 3) and frames.dtype == np.uint8
    with av.open(str(real_clips()[name])) as file:
        for i, frame in enumerate(itertools.islice(file.decode(video=0), 33)):
            if not np.array_equal(frames[i], frame.to_ndarray(format="rgb24")):
                difference = np.abs(frames[i].astype(np.int16) - frame.to_ndarray(format="rgb24"))
                assert name == "vtest" and difference.max() <= 8 and difference.mean() < 0.2, i


def test_a_folder_of_real_files(folder):
    """Real clips of as many sizes become one shard at 49 frames of 64 × 64; one is too slow for 16 a second."""
    replace(folder)
    for name, path in real_clips().items():
        (folder / path.name).write_bytes(path.read_bytes())
        (folder / f"{name}.txt").write_text(f"the clip {name}")
    shards, found = run(folder), rejects(folder)
    slow = {"vtest.avi"} & {path.name for path in real_clips().values()}
    assert found.keys() == slow and all("slower than 16 frames a second" in reason for reason in found.values())
    assert len(shards) == len(real_clips()) - len(slow) and shards.shape("x0") == (28, 13, 1, 1)
    assert all((folder.parent / "out" / name).read_bytes()[1:4] == b"PNG" for name in ("kept.png", "rejected.png"))
    assert shards.get("x0", range(3)).isfinite().all() and all(row["motion"] > 0.5 for row in shards.rows)


def test_written_videos_read_back(tmp_path):
    """write_mp4 then read_clip: every frame, near what went in; half-written files are never left."""
    frames = clip()
    video.write_mp4(tmp_path / "a.mp4", frames)
    back = video.read_clip(tmp_path / "a.mp4", None)
    assert back.shape == frames.shape and np.abs(back.astype(int) - frames).mean() < 3
    with pytest.raises(av.FFmpegError):  # H.264 yuv420p has no odd widths
        video.write_mp4(tmp_path / "b.mp4", np.zeros((3, 7, 7, 3), np.uint8))
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def without_decord(monkeypatch) -> None:
    """decode.py runs as it would where decord cannot be installed."""
    hide = "import sys, runpy; sys.modules['decord'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    monkeypatch.setattr(video.Decoder, "program", [sys.executable, "-c", hide, video.Decoder.program[-1]])


def test_pyav_reads_what_decord_reads(chain, monkeypatch):
    """Where decord has no wheel the same clips give the same frames at the file's size."""
    path = chain / "clips" / "ball-00003.mp4"
    with_decord = video.read_clip(path, 49)
    without_decord(monkeypatch)
    assert np.array_equal(video.read_clip(path, 49), with_decord)
    with pytest.raises(video.BadVideo, match="too short"):
        video.read_clip(path, 53)


@pytest.mark.parametrize("reader", ["decord", "PyAV"])
def test_bad_videos_are_rejected_by_name(chain, folder, reader, monkeypatch):
    """Each bad file stands in rejects.jsonl with its reason, and the run goes on with the others."""
    if reader == "PyAV":
        without_decord(monkeypatch)
    bad = {
        **dict.fromkeys(("text.mp4", "cut.mp4", "empty.mp4"), "FFmpeg cannot open it"),
        "gone.mp4": "no such file",
        "short.mp4": "too short: expected 49 frames at 16 a second, got 48",
    }
    (folder / "text.mp4").write_text("this is no video\n" * 100)
    (folder / "cut.mp4").write_bytes((folder / "ball-00000.mp4").read_bytes())
    cut(folder / "cut.mp4")
    (folder / "empty.mp4").touch()
    video.write_mp4(folder / "short.mp4", clip(48))
    video.write_mp4(folder / "long.mp4", clip(53))
    write_csv(folder, [{"video": name, "caption": "a ball"} for name in (*bad, "long.mp4", "ball-00001.mp4")])
    shards, found = run(folder), rejects(folder)
    assert found.keys() == bad.keys() and all(words in found[name] for name, words in bad.items()), found
    assert len(shards) == 2  # a longer video is cut to its first frames


def test_a_dataset_table_beside_part_folders(chain, folder, tmp_path, capsys):
    """OpenVid-1M's csv as it is: all its columns, videos in whichever part folder, rows of parts that are not here."""
    for part, index in (("OpenVid_part0", 0), ("OpenVid_part1/video", 1), ("OpenVid_part1", 2), ("OpenVid_part2", 3)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / f"ball-{index:05d}.mp4").rename(folder / part / f"---_{index}to241.mp4")
    (folder / "ball-00004.mp4").rename(folder / "a_b.mp4")  # unpacked without its folder
    columns = "video,caption,aesthetic score,motion score,temporal consistency score,camera motion,frame,fps,seconds"
    names = [f"---_{i}to241.mp4" for i in range(4)] + ["a/b.mp4", "elsewhere.mp4"]
    rows = [f'{name},"a ball, {i}",5.1,{2.5 + i},0.99,static,241,30.0,8.0' for i, name in enumerate(names)]
    (tmp_path / "OpenVid-1M.csv").write_text("\n".join([columns, *rows]) + "\n")
    shards = run(folder, metadata=str(tmp_path / "OpenVid-1M.csv"), motion="column", min_motion=3)
    assert [(row["caption"], row["motion"]) for row in shards.rows] == [(f"a ball, {i}", 2.5 + i) for i in range(1, 5)]
    assert [row["video"] for row in shards.rows][::3] == ["OpenVid_part1/video/---_1to241.mp4", "a_b.mp4"]
    assert rejects(folder).keys() == {"OpenVid_part0/---_0to241.mp4"}
    assert "skipped 1 of 6 rows" in capsys.readouterr().out
    (folder / "OpenVid_part2" / "---_0to241.mp4").touch()
    with pytest.raises(UserError, match=r"row 1 .*there are 2 videos of that name"):
        run(folder, "twice", metadata=str(tmp_path / "OpenVid-1M.csv"))
    for bad, wanted in {"nowhere.csv": "a UTF-8 csv table", "ball-00005.mp4": "the columns video,caption"}.items():
        refused(f"{bad}: expected {wanted}, got", run, folder, "bad", metadata=str(folder / bad))


def test_several_clips_of_a_video(folder):
    """Spread evenly, without overlap, all in one split; each the pictures that a player shows at its times."""
    frames = clip(T=300, speed=0.7)
    for i, frame in enumerate(frames):
        frame[:16, :16] = i * 255 // 299  # a clock
    replace(folder, 24, long=frames, short=frames[:100])
    shards = run(folder, clips=3)
    starts = [("long", 0.0), ("long#1", 4.75), ("long#2", 9.417), ("short", 0.0)]
    assert [(row["id"], row["start"]) for row in shards.rows] == starts
    assert len({row["split"] for row in shards.rows[:3]}) == 1 and not rejects(folder)
    with video.Decoder() as decoder:
        for found, start in zip(decoder.read(folder / "long.mp4", 49, fps=16, clips=3), (0, 76, 151)):
            assert found.index == [3 * (start + i) // 2 for i in range(49)]
            clock = found.frames[:, 4:12, 4:12].mean(axis=(1, 2, 3)) * 299 / 255
            assert np.abs(clock - found.index).max() < 4


def test_lines_of_jsonl_end_as_json_says(tmp_path):
    """At a line feed alone: U+2028, U+2029 and U+0085 are text. What a kill or a damage left of a line is dropped."""
    rows = [{"prompt": "a\u2028b\u2029c\u0085d"}, {"prompt": "é"}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    good = (tmp_path / "a.jsonl").read_bytes()
    for bad in (b"", b'{"prompt": "a', b'{"prompt": "\xff"}\n', b"[" * 100_000 + b"\n", b"3\n", b"\r\n"):
        (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + good + bad)
        assert read_jsonl(tmp_path / "a.jsonl") == rows


def test_names_are_confined(tmp_path):
    """`inside` gives the path of a name that stays in the folder, whatever links there are, and refuses the others."""
    root = tmp_path / "root"
    (root / "part").mkdir(parents=True)
    for name, to in {"link": "part/a", "out": "../canary", "up": "..", "loop": "loop", "../way": "root"}.items():
        (root / name).symlink_to(to)
    names = ["part/a", "./part//a", "part/../part/a", "link", "up/root/part/a", "up/../link", str(root / "part/a")]
    assert {inside(tmp_path / "way", name) for name in names} == {(root / "part/a").resolve()}
    for name in ("http://host/a", "file:/a", "~/a", "x" * 300):
        assert inside(root, name) == root.resolve() / name.replace("//", "/")
    for name in ("", "a\0b", "\ud800", "..", "../canary", "part/../../canary", "/etc/passwd", "loop"):
        for links_out in (False, True):
            with pytest.raises(ValueError):
                inside(root, name, links_out)
    for name in ("out", "up/canary"):
        assert inside(root, name, links_out=True) == tmp_path.resolve() / "canary"
        with pytest.raises(ValueError, match="leaves the folder through a link"):
            inside(root, name)


HOSTILE = {  # a line of a table -> why it is refused
    b"../canary.mp4,a ball": "leaves the folder by its path",
    b"/etc/hostname,a ball": "leaves the folder by its path",
    b"part/../../canary.mp4,a ball": "leaves the folder by its path",
    b"out.mp4,a ball": "leaves the folder through a link; --links_out follows",
    b"up/canary.mp4,a ball": "leaves the folder through a link",
    b"loop.mp4,a ball": "a link to itself",
    b"file:/etc/hostname,a ball": "an address",
    b"http://127.0.0.1:9/a.mp4,a ball": "an address",
    b"concat:a.mp4|b.mp4,a ball": "an address",
    b"subfile,,a ball": "expected 2 cells as in the header, got 3; put quotes",
    b'"subfile,,start,0,end,9,,:../canary.mp4",a ball': "an address",
    b'"subfile,,start,0,end,9,,:a.mp4",a ball': "an address",
    rb"part\b.mp4,a ball": r"no such file; in its path write / for \ ",
    b"a\0.mp4,a ball": "names no video",
    b",a ball": "names no video",
    b"\xff.mp4,a ball": "not UTF-8",
    b"a.mp4,a \xed\xa0\x80 ball": "not UTF-8",
    "a.mp4,ein Fu\u00dfball".encode("latin-1"): "not UTF-8",
    "a.mp4,\u7ea2\u7403".encode("gbk"): "not UTF-8",
    b"a.mp4": "expected 2 cells as in the header, got 1",
    b"a.mp4,a ball falls, then bounces": "got 3; put quotes around a text with commas",
    b'a.mp4,"a "red" ball"': "line 6: .*is a quote not closed",
    b"a.mp4," + b"x" * 200_000: "field larger than field limit",
    b"a.mp4, \t": "caption is missing or empty",
    "a.mp4,\u26bd\u3002".encode(): "no word, and --preset tiny",
    b"part/a.mp4,a ball": "listed twice",
    b"part/a.mov,a ball": "another video's only in the ending",
}


@pytest.fixture
def hostile(tmp_path) -> Path:
    """A folder with a part, and links out of it, to themselves and to a part. Beside it lies what no row may read."""
    root = tmp_path / "hostile"
    (root / "part").mkdir(parents=True)
    for name in ("a.mp4", "a.mov", "b.mp4", "c.mp4", "../../canary.mp4"):
        (root / "part" / name).touch()
    for name, to in {"out.mp4": "../canary.mp4", "up": "..", "loop.mp4": "loop.mp4", "again": "part"}.items():
        (root / name).symlink_to(to)
    return root


def items(folder: Path, **changes) -> tuple[list[prepare.Item], dict[str, str]]:
    """The rows that prepare.py takes from a folder, and the names that it rejects, each with the reason."""
    taken, rejected = prepare.read_items(Config(videos=str(folder), **changes))
    return taken, {row["video"]: row["reason"] for row in rejected}


def test_each_hostile_row_stands_alone(hostile):
    """It stops the run by its number and reason; with --bad_rows reject it is listed, and the rows around it are read.

    Lines end as on any system, within a caption, too; U+2028, U+2029 and U+0085 end none.
    """
    good = [b"video,caption", b"part/a.mp4,a ball", b'c.mp4,"a ball\r\nthat \xe2\x80\xa8 ""jumps"", twice"']
    last = b"again/b.mp4,the \xc2\x85 last \xf0\x9f\xa7\xa8"
    for line, words in HOSTILE.items():
        (hostile / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([*good, b"", line, last]))
        refused(f"metadata.csv row 3 .*{words.replace(chr(92), chr(92) * 2)}", items, hostile)
        taken, rejected = items(hostile, bad_rows="reject")
        assert [item.video for item in taken] == ["part/a.mp4", "part/c.mp4", "part/b.mp4"], line
        assert taken[1].caption == 'a ball\r\nthat \u2028 "jumps", twice' and len(rejected) == 1
        json.dumps([*rejected.items()], ensure_ascii=False).encode()


def test_names_that_are_found_and_that_are_not(hostile):
    """A folder, a name of 300 letters: listed, or skipped where the table is another's. Absolute, in a part: read."""
    names = [".", "x" * 300 + ".mp4", str((hostile / "part/a.mp4").resolve()), "b.mp4", "part/./c.mp4"]
    write_csv(hostile, [{"video": name, "caption": "a ball"} for name in names])
    taken, rejected = items(hostile)
    assert [(item.id, item.video) for item in taken] == [
        ("part/a", "part/a.mp4"),
        ("b", "part/b.mp4"),
        ("part/c", "part/c.mp4"),
    ]
    assert rejected == dict.fromkeys(names[:2], "no such file")
    assert items(hostile, metadata=str(hostile / "metadata.csv")) == (taken, {})


def test_tables_that_are_refused(hostile):
    """A column of captions twice; a table that is a link out; a quote that is never closed takes no row silently.

    Other commands' tables end at their first bad row.
    """
    table = hostile / "metadata.csv"
    table.write_text("path,score\na.mp4,1\nb.mp4,2,3\n")
    refused("expected a csv table, got row 2: expected 2 cells as in the header, got 3", read_csv, table)
    table.write_text("video,caption,caption\na.mp4,a,b\n")
    refused("metadata.csv: expected columns of different names, got 'caption' twice", items, hostile)
    table.write_text('video,caption\na.mp4,"a ball\n' + "".join(f"{i}.mp4,a ball\n" for i in range(50)))
    refused(r"row 1 \(''\): line 2 to 52: unexpected end of data", items, hostile)
    table.unlink()
    (hostile.parent / "captions.csv").write_text("video,caption\npart/a.mp4,a ball\n")
    table.symlink_to("../captions.csv")
    refused("metadata.csv: it leaves the folder through a link; --links_out", items, hostile)
    assert len(items(hostile, links_out=True)[0]) == 1


def test_what_lies_in_folders(hostile, capsys):
    """Debris is passed over, any ending of a container is a video, accents are found however they are written.

    Captions are read beside videos, and each bad one stands alone.
    """
    shutil.rmtree(hostile / "part")
    for name in (
        "._a.mp4",
        ".DS_Store",
        "__MACOSX/._a.mp4",
        ".cache/h.mp4",
        "a.MP4",
        "b.3gp",
        "c.MTS",
        "d.mkv",
        "e.gif",
    ):
        (hostile / name).parent.mkdir(exist_ok=True)
        (hostile / name).touch()
    for name, text in {"._a": b"\0", "a": b"\xef\xbb\xbfone\r\n", "b": b"two", "c": b"three", "e": b"gif"}.items():
        (hostile / f"{name}.txt").write_bytes(text)
    (hostile / "d.TXT").write_text("four")
    for name in ("caf\u00e9", "cafe\u0301", "\udce9"):
        (hostile / f"{name}.mp4").touch()
    (hostile / "cafe\u0301.txt").write_text("five")
    bad = {"f": b"\xe9", "g": b"x" * 2**21, "h": b""}
    for name, text in bad.items():
        (hostile / f"{name}.mp4").touch()
        (hostile / f"{name}.txt").write_bytes(text)
    (hostile / "i.mp4").touch()
    (hostile / "i.txt").symlink_to("../captions.csv")
    (hostile.parent / "captions.csv").write_text("a secret")
    taken, rejected = items(hostile, bad_rows="reject")
    assert [item.caption for item in taken] == ["one", "two", "three", "five", "four"]
    why = {
        "f": "UTF-8",
        "g": "at most 1048576 bytes",
        "h": "empty",
        "i": "through a link",
        "caf\u00e9": "accent",
        r"\udce9": "name",
    }
    assert {f"{name}.mp4" for name in why} | {"out.mp4", "loop.mp4"} == rejected.keys()
    assert all(words in rejected[f"{name}.mp4"] for name, words in why.items()), rejected
    said = capsys.readouterr().out
    assert "skipped 1 captioned, of ending .gif" in said and "'up': it leaves the folder through a link" in said
    (hostile / "caf\u00e9.mp4").unlink()
    write_csv(hostile, [{"video": "caf\u00e9.mp4", "caption": "five"}])
    assert [(item.id, item.video) for item in items(hostile)[0]] == [("caf\u00e9", "cafe\u0301.mp4")]
    write_csv(hostile, [{"video": "a.MP4", "caption": "\u26bd\u3002"}])
    refused("no word, and --preset tiny", items, hostile)
    assert len(items(hostile, preset="1.3b")[0]) == 1  # UMT5 has tokens for them


def test_not_one_caption(hostile):
    """Said as such, with the three ways to give them; another text in the folder is none of them."""
    (hostile / "README.txt").write_text("clips")
    ways = "metadata.csv in the folder, .* or as name.txt beside each .*, or by --metadata any.csv"
    refused(f"hostile: [0-9] videos and not one caption; give them as {ways}", items, hostile)
    (hostile / "part/b.txt").write_text("a ball")
    assert [item.video for item in items(hostile, bad_rows="reject")[0]] == ["part/b.mp4"]


def test_a_snapshot_of_hugging_faces_cache(tmp_path):
    """Links to blobs and to folders beside it are followed when asked for; those that lead back end."""
    blobs, root = tmp_path / "blobs", tmp_path / "snapshots/main"
    for folder in (blobs, root / "part", tmp_path / "more"):
        folder.mkdir(parents=True)
    for name in ("0f", "1f", "2f"):
        (blobs / name).write_text("a ball")
    links = {"part/a.mp4": "../../../blobs/0f", "part/a.txt": "../../../blobs/1f", "../../more/b.mp4": "../blobs/2f"}
    for name, to in {**links, "more": "../../more", "part/back": "..", "all": "../.."}.items():
        (root / name).symlink_to(to)
    (tmp_path / "more/b.txt").write_text("a ball")
    refused(r"row 1 \('part/a.mp4'\): its caption: it leaves the folder through a link; --links_out", items, root)
    taken, rejected = items(root, links_out=True)
    assert [item.video for item in taken] == ["more/b.mp4", "part/a.mp4"] and not rejected


def test_interrupted_readers_leave_nothing(chain, monkeypatch):
    """Ctrl-C while several decoders work, some just starting: no process and no thread is left, and it is quick."""
    paths, started, real = sorted((chain / "clips").glob("*.mp4")), [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **more: started.append(real(*args, **more)) or started[-1])
    before = threading.active_count()
    for wanted in (1, 30):
        with pytest.raises(KeyboardInterrupt), video.readers(4) as each:
            found = each(lambda decoder, path: decoder.read(path, 49), paths)
            for _ in range(wanted):
                next(found)
            raise KeyboardInterrupt
        assert started and all(process.poll() is not None for process in started)
        assert threading.active_count() <= before


def test_what_makes_another_dataset(folder, monkeypatch, capsys):
    """Its clips do, however the folder is spelled and wherever it lies; half made, a file changed in place does, too.

    Shards made from other videos are never mixed with new ones.
    """
    run(folder)
    moved = folder.rename(folder.with_name("moved"))
    table = shutil.copy(moved / "metadata.csv", folder.with_name("table.csv"))
    monkeypatch.chdir(folder.parent)
    for spelled in ("moved", "moved/", "./moved", str(moved), "moved/../moved"):
        run(folder, videos=spelled)
        run(folder, videos=spelled, metadata=table)
        assert capsys.readouterr().out.count("finished already") == 2
    video, stat = moved / "ball-00002.mp4", (moved / "ball-00002.mp4").stat()
    os.utime(video, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    run(folder, videos="moved")
    manifest = (folder.parent / "out/MANIFEST.json").rename("finished")
    refused("was begun with files that have changed since", run, folder, videos="moved")
    manifest.rename("out/MANIFEST.json")
    video.write_bytes((moved / "ball-00003.mp4").read_bytes())
    refused("was made with inputs items", run, folder, videos="moved")


# ---- motion and splits -----------------------------------------------------------------------------------------------


def test_motion_by_frames(folder):
    """Still and slow clips are rejected by the mean difference of neighbouring frames."""
    replace(folder, still=clip(speed=0.0), slow=clip(speed=0.5), walk=clip(speed=1.0), fast=clip(speed=8.0))
    motion = {row["id"]: row["motion"] for row in run(folder, "all").rows}
    assert rejects(folder, "all") == {"still.mp4": "the picture stands still for 49 frames"}
    assert 0.5 < motion["slow"] < motion["walk"] < motion["fast"]
    shards = run(folder, min_motion=motion["walk"] - 0.01)
    assert [row["id"] for row in shards.rows] == ["fast", "walk"]
    assert rejects(folder).keys() == {"still.mp4", "slow.mp4"} and "motion score" in rejects(folder)["slow.mp4"]
    scores = {row["video"]: row.get("motion") for row in read_jsonl(folder.parent / "out/rejects.jsonl")}
    assert scores == {"still.mp4": None, "slow.mp4": motion["slow"]}  # for the picture of what the limit takes away


def item(clip: str = "a", motion: str = "", split: str = "") -> prepare.Item:
    return prepare.Item(clip, f"{clip}.mp4", "a ball", motion, split)


def splits(count: int, cfg: Config, said: str = "") -> list[str]:
    return [prepare.split_of(item(f"clip-{i}", split=said), cfg) for i in range(count)]


@pytest.mark.parametrize("score", ["", "fast", "nan"])
def test_motion_by_column_is_a_number(score):
    """A row without one is rejected with the reason."""
    found = prepare.with_motion(Config(motion="column"), item(motion=score), clip=None)
    assert isinstance(found, video.BadVideo) and f"expected a number, got {score!r}" in str(found)


def test_splits_have_their_shares():
    """By a hash of the id alone: near the shares that were asked for. What the table says goes before it."""
    names = splits(2000, Config(train=0.6, align=0.2))
    assert abs(names.count("train") / 2000 - 0.6) < 0.035
    assert abs(names.count("align") / 2000 - 0.2) < 0.03 and abs(names.count("eval") / 2000 - 0.2) < 0.03
    assert set(splits(100, Config(train=1.0, align=0.0))) == {"train"}
    assert all(set(splits(20, Config(train=1.0, align=0.0), said)) == {said} for said in ("train", "align", "eval"))


@pytest.mark.parametrize("preset, expected", [("1.3b", (80, 20, 0)), ("14b", (80, 20, 0)), ("tiny", (60, 20, 20))])
def test_splits_of_the_presets(preset, expected):
    """Of 100 clips. Of 100,000 the paper's: 80,000 for the continuation model, 20,000 for cold start and pairs."""
    names = splits(5000, resolve(Config(preset), prepare.PRESETS))
    assert [round(names.count(s) / 50) for s in ("train", "align", "eval")] == pytest.approx(expected, abs=2)
    assert "eval" not in names or preset == "tiny"


def test_the_tables_splits(chain, folder):
    """Its column is honoured for all clips of a video, and where it is empty the hash is; a wrong word is a bad row."""
    rows = [{**row, "split": said} for row, said in zip(captions(chain), ("eval", "", "align", "train", "", "align"))]
    write_csv(folder, rows)
    found = [row["split"] for row in run(folder, "one", train=1.0, align=0.0).rows]
    assert found == [row["split"] or "train" for row in rows]
    rows[2]["split"] = "test"
    write_csv(folder, rows)
    with pytest.raises(
        UserError, match=r"metadata.csv row 3 \('ball-00002.mp4'\): its split is 'test', expected train,"
    ):
        run(folder, "bad")
    assert len(run(folder, "fewer", bad_rows="reject").rows) == CLIPS - 1
    assert rejects(folder, "fewer") == {"ball-00002.mp4": "its split is 'test', expected train, align, eval or nothing"}


def test_splits_are_disjoint_and_stay(chain, folder):
    """No clip is lost or in two splits. Dropping clips moves no other: nothing trained on is ever evaluated on."""
    found = {split: Shards(chain / "shards", "prepare.py", split).rows for split in ("train", "align", "eval")}
    before = {row["id"]: split for split, rows in found.items() for row in rows}
    assert [len(found[split]) for split in ("train", "align", "eval")] == [46, 23, 11] and len(before) == 80
    write_csv(folder, [{k: v for k, v in row.items() if k != "split"} for row in captions(chain)])
    hashed = [{row["id"]: row["split"] for row in run(folder, "all").rows}]
    write_csv(folder, [{k: v for k, v in row.items() if k != "split"} for row in captions(chain)[2:]])
    hashed.append({row["id"]: row["split"] for row in run(folder, "fewer").rows})
    assert len(hashed[0]) == CLIPS and hashed[1].items() < hashed[0].items() and len(set(hashed[0].values())) > 1


def test_batch_order_reads_every_clip_once_an_epoch():
    """A permutation an epoch, another one the next, whatever the batch size; a function of its arguments alone."""
    batches = functools.partial(batch_order, generator=flow.generator)
    order = [i for step in range(6) for i in batches(10, 5, step, ("sft", 0))]
    assert all(sorted(order[k : k + 10]) == list(range(10)) for k in (0, 10, 20))
    assert len({tuple(order[k : k + 10]) for k in (0, 10, 20)}) == 3
    assert [i for step in range(10) for i in batches(10, 3, step, ("sft", 0))] == order[:30]
    for other in (("sft", 1), ("asymdpo", 0)):
        assert batches(10, 10, 0, other) != batches(10, 10, 0, ("sft", 0))


def test_reasons_that_differ_in_a_number_are_one(capsys):
    """The table of what was kept, and why others were not: the commonest reasons, then the number of the rest."""
    several = [{"reason": f"'{n}.txt': expected UTF-8 text, got {n}.5 bytes"} for n in range(30)]
    prepare.print_table(960, several + [{"reason": "reason " + "x" * n} for n in range(10)], "clips")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "   share    clips",
        "   96.0%      960  kept",
        "    3.0%       30  …: expected UTF-8 text, got … bytes",
    ]
    assert len(lines) == 13 and lines[-1] == "    0.1%        1  1 other reasons: see rejects.jsonl"


def test_the_picture_of_motion(tmp_path):
    """Drawn of no scores, too, and of negative ones, which a table's column may have."""
    for number, scores in enumerate((([], []), ([-3.0, 2.0], [-5.0]))):
        video.histogram(tmp_path / f"{number}.png", "motion", scores, "--min_motion", 0.7)
        assert (tmp_path / f"{number}.png").read_bytes()[1:4] == b"PNG"


# ---- cuts ------------------------------------------------------------------------------------------------------------


def joined() -> np.ndarray:
    """Two shots, cut after 40 of their 100 pictures."""
    other = 255 - clip(60, speed=2.0).swapaxes(1, 2) // 3
    other[..., 2] //= 4
    return np.concatenate([clip(40, speed=5.0), other])


def test_cuts(folder):
    """A clip with a cut inside is left out, or taken from a shot. Fast motion and a flash are none. Without --cuts all
    are read.
    """
    pytest.importorskip("scenedetect", reason="needs PySceneDetect: pip install -r requirements-dev.txt")
    flash = clip()
    flash[20:22] = 255 - (255 - flash[20:22]) // 4
    replace(folder, cut=joined(), fast=clip(speed=9.0), flash=flash, short=joined()[:55])
    expected = {  # where the clip begins, or why there is none
        "ignore": {"cut": 0.0, "short": 0.0},
        "reject": {"cut": "a cut at 2.5 s", "fast": 0.0, "flash": 0.0, "short": "a cut at 2.5 s"},
    }
    with video.Decoder() as decoder:
        for cuts, wanted in expected.items():
            cfg = resolve(Config(videos=str(folder), cuts=cuts), prepare.PRESETS)
            found = {name: prepare.read(cfg, decoder, item(name))[0] for name in wanted}
            got = {name: str(f) if isinstance(f, video.BadVideo) else f[0].start for name, f in found.items()}
            assert got == wanted
    shards = run(folder, cuts="split")
    assert {row["id"]: row["start"] for row in shards.rows} == {"cut": 2.625, "fast": 0.0, "flash": 0.0}
    longest = "its longest shot is too short: expected 49 frames at 16 a second, got 38"
    assert rejects(folder) == {"short.mp4": f"a cut at 2.5 s, and {longest}"}
    assert "PySceneDetect" in shards.manifest["cuts_found_by"]


def test_clips_of_shots():
    """Each lies in one shot, no picture beside a cut; spread over all of them; without a cut they are `plan`'s."""
    times = np.arange(100) / 16
    assert np.array_equal(decode.of_shots(times, [], 17, 16, 3), decode.plan(times, 17, 16, 3))
    for clips in (1, 2, 9):
        found = decode.of_shots(times, [30, 40], 17, 16, clips)
        assert [row[0] for row in found] == {1: [0], 2: [0, 83], 9: [0, 42, 62, 83]}[clips]
        assert not {28, 29, *range(30, 42)} & set(found.ravel()) and found.max() == (99 if clips > 1 else 16)
    with pytest.raises(decode.Refused, match="a cut at 1.9 s, and its longest shot is too short: expected 65"):
        decode.of_shots(times, [30, 40], 65, 16, 1)
    with pytest.raises(decode.Refused, match="a cut at 0.1 s$"):
        decode.of_shots(times[:4], [2], 17, 16, 1)


def test_cuts_without_what_finds_them(folder, monkeypatch, capsys):
    """One line says how to get it; without --cuts, too."""
    monkeypatch.setitem(sys.modules, "scenedetect", None)
    refused("--cuts split needs PySceneDetect: pip install scenedetect-headless", run, folder, cuts="split")
    assert prepare.detector_of_cuts(Config(), talk=True) == {}
    assert "nobody looks for cuts: --cuts reject or split does" in capsys.readouterr().out

"""Stage 0: what is read from videos and captions, how clips are split, and what is left out by name."""

import csv
import itertools
import json
import subprocess
import sys
import threading
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from helpers import contents, cut, real_clips

import prepare
from prepare import Config
from runtime import shards as data
from runtime import video
from runtime.run import UserError
from tiny import balls as world
from wan import vae

CLIPS = 6


def clip(T: int = 49, size: int = 64, speed: float = 1.0) -> np.ndarray:
    """A picture (T, size, size, 3) that moves."""
    ramp = np.arange(size)[None, :] + speed * np.arange(T)[:, None]
    row = (127 + 100 * np.sin(ramp / 6)).astype(np.uint8)
    return np.broadcast_to(row[:, None, :, None], (T, size, size, 3)).copy()


@pytest.fixture
def folder(chain, tmp_path) -> Path:
    """Some rendered clips, without metadata."""
    to = tmp_path / "videos"
    to.mkdir()
    for index in range(CLIPS):
        name = f"ball-{index:05d}.mp4"
        (to / name).write_bytes((chain / "clips" / name).read_bytes())
    return to


def captions(chain) -> list[dict]:
    return list(csv.DictReader((chain / "clips" / "metadata.csv").open(encoding="utf-8")))[:CLIPS]


def write_csv(folder: Path, rows: list[dict]) -> None:
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def run(folder: Path, out: str = "out", **changes) -> data.Shards:
    to = folder.parent / out
    prepare.main(Config(videos=str(folder), out=str(to), shard_size=4, workers=1, **changes))
    return data.Shards(to, "prepare.py")


def rejects(folder: Path, out: str = "out") -> dict[str, str]:
    rows = [json.loads(line) for line in (folder.parent / out / "rejects.jsonl").read_text().splitlines()]
    return {row["video"]: row["reason"] for row in rows}


# ---- captions --------------------------------------------------------------------------------------------------------


def test_three_kinds_of_captions_give_the_same_shards(chain, folder):
    """metadata.csv, metadata.jsonl and name.txt: byte for byte."""
    rows = captions(chain)
    write_csv(folder, rows)
    shards = run(folder, "csv")
    assert [row["caption"] for row in shards.rows] == [row["caption"] for row in rows]
    (folder / "metadata.csv").unlink()
    lines = [json.dumps({"video": row["video"], "caption": row["caption"]}) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    run(folder, "jsonl")
    (folder / "metadata.jsonl").unlink()
    for row in rows:
        (folder / row["video"]).with_suffix(".txt").write_text(row["caption"] + "\n")
    run(folder, "txt")
    assert contents(folder.parent / "csv") == contents(folder.parent / "jsonl") == contents(folder.parent / "txt")


def test_what_a_shard_holds(chain, folder):
    """Latents are the codec's of the decoded frames, text states the words', facts those of the metadata."""
    write_csv(folder, captions(chain))
    shards = run(folder)
    codec, encoder = vae.load(folder.parent / "out"), prepare.text.WordVectors()
    assert shards.shape("x0") == (48, 13, 2, 2)
    for i, row in enumerate(shards.rows):
        frames = video.read_clip(folder / row["video"], 49, (64, 64))
        assert torch.equal(shards.get("x0", [i])[0], codec.encode(video.to_pixels(frames)[None])[0])
        assert torch.equal(shards.states([i])[0], encoder.encode([row["caption"]])[0])
    back = codec.decode(shards.get("x0", range(CLIPS)))
    true = torch.stack([video.to_pixels(video.read_clip(folder / row["video"], 49)) for row in shards.rows])
    assert (back - true).square().mean() < 0.03 * true.var()  # the codec keeps what is seen


def test_a_video_in_a_folder_and_a_caption_with_a_comma(chain, folder):
    """Ids keep the folder; csv quoting and characters outside ASCII survive."""
    (folder / "a b").mkdir()
    (folder / "ball-00000.mp4").rename(folder / "a b" / "é.mp4")
    rows = [{"video": "a b/é.mp4", "caption": 'a ball, "red" — fällt'}] + [
        {"video": r["video"], "caption": "x"} for r in captions(chain)[1:]
    ]
    write_csv(folder, rows)
    first = run(folder).rows[0]
    assert (first["id"], first["caption"]) == ("a b/é", 'a ball, "red" — fällt')


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
    frames = video.read_clip(real_clips()[name], 49)
    assert frames.shape == (49, *size, 3) and frames.dtype == np.uint8
    with av.open(str(real_clips()[name])) as file:
        for i, frame in enumerate(itertools.islice(file.decode(video=0), 49)):
            difference = np.abs(frames[i].astype(int) - frame.to_ndarray(format="rgb24"))
            assert difference.max() <= (8 if name == "vtest" else 0) and difference.mean() < 0.2, i


def test_a_folder_of_real_files(folder):
    """Real clips of as many sizes become one shard at 49 frames of 64 × 64; one is too slow for 16 a second."""
    for path in folder.iterdir():
        path.unlink()
    for name, path in real_clips().items():
        (folder / path.name).write_bytes(path.read_bytes())
        (folder / f"{name}.txt").write_text(f"the clip {name}")
    shards, found = run(folder), rejects(folder)
    slow = {"vtest.avi"} & {path.name for path in real_clips().values()}
    assert found.keys() == slow and all("slower than 16 frames a second" in reason for reason in found.values())
    assert len(shards) == len(real_clips()) - len(slow) and shards.shape("x0") == (48, 13, 2, 2)
    assert all((folder.parent / "out" / name).read_bytes()[1:4] == b"PNG" for name in ("kept.png", "rejected.png"))
    assert shards.get("x0", range(3)).isfinite().all() and all(row["motion"] > 0.5 for row in shards.rows)


def test_written_videos_read_back(tmp_path):
    """write_mp4 then read_clip: every frame, near what went in; half-written files are never left."""
    frames = clip()
    video.write_mp4(tmp_path / "a.mp4", frames)
    back = video.read_clip(tmp_path / "a.mp4", 49, exact=True)
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
    write_csv(folder, [{"video": r["video"], "caption": r["caption"]} for r in captions(chain)])
    bad = {
        "text.mp4": "FFmpeg knows no such video",
        "cut.mp4": "FFmpeg knows no such video",
        "empty.mp4": "FFmpeg knows no such video",
        "gone.mp4": "no such file",
        "short.mp4": "too short: expected 49 frames at 16 a second, got 48",
    }
    (folder / "text.mp4").write_text("this is no video\n" * 100)
    (folder / "cut.mp4").write_bytes((folder / "ball-00000.mp4").read_bytes())
    cut(folder / "cut.mp4")
    (folder / "empty.mp4").touch()
    video.write_mp4(folder / "short.mp4", clip(48))
    video.write_mp4(folder / "long.mp4", clip(53))
    with open(folder / "metadata.csv", "a", encoding="utf-8") as f:
        f.writelines(f"{name},a ball\n" for name in (*bad, "long.mp4"))
    shards = run(folder)
    found = rejects(folder)
    assert found.keys() == bad.keys() and all(words in found[name] for name, words in bad.items()), found
    assert len(shards) == CLIPS + 1  # a longer video is cut to its first frames
    exact = run(folder, "exact", exact=True)
    found = rejects(folder, "exact")
    assert len(exact) == CLIPS and found["long.mp4"] == "wrong frame count: expected 49 frames at 16 a second, got 53"


def test_text_states_belong_to_their_clips_after_rejects(chain, folder):
    """A rejected clip in the middle of a shard must not shift the captions of those after it."""
    rows = captions(chain)
    write_csv(folder, [{"video": r["video"], "caption": r["caption"]} for r in rows])
    (folder / rows[1]["video"]).write_text("no video")
    shards = run(folder)
    truth = {row["video"]: row["caption"] for row in rows}
    encoder = prepare.text.WordVectors()
    assert len(shards) == CLIPS - 1
    for i, row in enumerate(shards.rows):
        assert row["caption"] == truth[row["video"]]
        assert torch.equal(shards.states([i])[0], encoder.encode([row["caption"]])[0])


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
    shards = run(folder, metadata=str(tmp_path / "OpenVid-1M.csv"), motion="column", max_motion=5.5)
    assert [(row["caption"], row["motion"]) for row in shards.rows] == [(f"a ball, {i}", 2.5 + i) for i in range(4)]
    assert shards.rows[1]["video"] == "OpenVid_part1/video/---_1to241.mp4" and rejects(folder).keys() == {"a_b.mp4"}
    assert "1 of 6 rows" in capsys.readouterr().out
    (folder / "OpenVid_part2" / "---_0to241.mp4").touch()
    with pytest.raises(UserError, match=r"row 1 .*there are 2 videos of that name"):
        run(folder, "twice", metadata=str(tmp_path / "OpenVid-1M.csv"))
    for bad in ("nowhere.csv", "ball-00005.mp4"):
        with pytest.raises(UserError, match="--metadata: expected a .csv or .jsonl file"):
            run(folder, "bad", metadata=str(folder / bad))


def test_several_clips_of_a_video(folder):
    """Spread evenly, without overlap, all in one split; each the pictures that a player shows at its times."""
    for path in folder.iterdir():
        path.unlink()
    frames = clip(T=300, speed=0.7)
    for i, frame in enumerate(frames):
        frame[:16, :16] = i * 255 // 299  # a clock
    video.write_mp4(folder / "long.mp4", frames, fps=24)
    video.write_mp4(folder / "short.mp4", frames[:100], fps=24)
    for name in ("long", "short"):
        (folder / f"{name}.txt").write_text(name)
    shards = run(folder, clips=3)
    starts = [("long", 0.0), ("long#1", 4.75), ("long#2", 9.417), ("short", 0.0)]
    assert [(row["id"], row["start"]) for row in shards.rows] == starts
    assert len({row["split"] for row in shards.rows[:3]}) == 1 and not rejects(folder)
    with video.Decoder() as decoder:
        for found, start in zip(decoder.read(folder / "long.mp4", 49, fps=16, clips=3), (0, 76, 151)):
            assert found.index == [3 * (start + i) // 2 for i in range(49)]
            clock = found.frames[:, 4:12, 4:12].mean(axis=(1, 2, 3)) * 299 / 255
            assert np.abs(clock - found.index).max() < 4


def test_names_that_are_no_files(chain, folder):
    """Too long, not UTF-8, two that differ in their ending, an absolute one inside the folder: named, or read."""
    first, second, third = (folder / f"ball-{i:05d}.mp4" for i in range(3))
    (folder / "ball-00000.mkv").write_bytes(first.read_bytes())
    names = [".", first.name, "ball-00000.mkv", "x" * 300 + ".mp4", "\udce9.mp4", str(second.resolve()), third.name]
    lines = [json.dumps({"video": name, "caption": "a ball", "motion score": 0.0}) for name in names]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    shards = run(folder, bad_rows="reject", motion="column")
    assert [(row["id"], row["motion"]) for row in shards.rows] == [(f"ball-{i:05d}", 0.0) for i in range(3)]
    found = rejects(folder)
    assert "in the ending alone" in found["ball-00000.mkv"] and len(found) == 4
    assert found["."] == "no such file"
    assert all("its name is none of a file" in found[name] for name in (names[3], r"\udce9.mp4"))


def test_interrupted_readers_leave_nothing(chain, monkeypatch):
    """Ctrl-C while several decoders work, some just starting: no process and no thread is left, and it is quick."""
    paths, started, real = sorted((chain / "clips").glob("*.mp4")), [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **more: started.append(real(*args, **more)) or started[-1])
    before = threading.active_count()
    for wanted in (1, 30):
        with pytest.raises(KeyboardInterrupt), prepare.Readers(4, 60.0) as readers:
            found = readers.each(lambda decoder, path: decoder.read(path, 49), paths)
            for _ in range(wanted):
                next(found)
            raise KeyboardInterrupt
        assert started and all(process.poll() is not None for process in started)
        assert threading.active_count() <= before


def test_a_changed_input_is_not_resumed(chain, folder):
    """Shards made from other videos are never mixed with new ones."""
    write_csv(folder, captions(chain))
    run(folder)
    (folder / "ball-00002.mp4").write_bytes((folder / "ball-00003.mp4").read_bytes())
    with pytest.raises(UserError, match="was made with inputs items"):
        run(folder)


# ---- motion and splits -----------------------------------------------------------------------------------------------


def test_motion_by_frames(folder):
    """Still and wild clips are rejected by the mean difference of neighbouring frames."""
    for path in folder.iterdir():
        path.unlink()
    for name, speed in (("still", 0.0), ("slow", 0.5), ("walk", 1.0), ("fast", 8.0)):
        video.write_mp4(folder / f"{name}.mp4", clip(speed=speed))
        (folder / f"{name}.txt").write_text(name)
    motion = {row["id"]: row["motion"] for row in run(folder, "all").rows}
    assert rejects(folder, "all") == {"still.mp4": "the picture stands still for 49 frames"}
    assert 0.5 < motion["slow"] < motion["walk"] < motion["fast"]
    shards = run(folder, min_motion=motion["slow"] - 0.01, max_motion=motion["walk"] + 0.01)
    assert [row["id"] for row in shards.rows] == ["slow", "walk"]
    assert rejects(folder).keys() == {"still.mp4", "fast.mp4"} and "motion score" in rejects(folder)["fast.mp4"]


def test_motion_by_column(chain, folder):
    """The csv's own score decides; a row without one is rejected with the reason."""
    rows = [{"video": r["video"], "caption": "a ball", "motion score": score}
            for r, score in zip(captions(chain), ("0.5", "1.5", "2.5", "", "fast", "9"), strict=True)]  # fmt: skip
    write_csv(folder, rows)
    shards = run(folder, motion="column", min_motion=1.0, max_motion=5.0)
    assert [row["motion"] for row in shards.rows] == [1.5, 2.5]
    reasons = rejects(folder)
    assert len(reasons) == 4 and sum("expected a number" in reason for reason in reasons.values()) == 2


def test_splits_have_their_shares():
    """By a hash of the id alone: near the shares that were asked for."""
    names = [prepare.split_of(f"clip-{i}", 0.6, 0.2) for i in range(2000)]
    assert abs(names.count("train") / 2000 - 0.6) < 0.035
    assert abs(names.count("align") / 2000 - 0.2) < 0.03 and abs(names.count("eval") / 2000 - 0.2) < 0.03
    assert {prepare.split_of(f"clip-{i}", 1.0, 0.0) for i in range(100)} == {"train"}


def test_splits_stay_when_other_clips_go(chain, folder):
    """Dropping clips moves no other clip to another split: nothing trained on is ever evaluated on."""
    rows = [{"video": r["video"], "caption": r["caption"]} for r in captions(chain)]
    write_csv(folder, rows)
    before = {row["id"]: row["split"] for row in run(folder, "all").rows}
    write_csv(folder, rows[1::2] + rows[4:5])
    after = {row["id"]: row["split"] for row in run(folder, "some").rows}
    assert after == {key: before[key] for key in after} and len(after) == 4


def test_the_world_is_split_disjointly(chain):
    """No clip is in two splits, and none is lost."""
    ids = {
        split: {row["id"] for row in data.Shards(chain / "shards", "prepare.py", split).rows}
        for split in ("train", "align", "eval")
    }
    assert sum(map(len, ids.values())) == len(set.union(*ids.values())) == 80
    assert all(ids.values()) and world.FRAMES == 49


def test_batch_order_reads_every_clip_once_an_epoch():
    """A permutation an epoch, another one the next, whatever the batch size; a function of its arguments alone."""
    order = [i for step in range(6) for i in data.batch_order(10, 5, step, 0)]
    assert all(sorted(order[k : k + 10]) == list(range(10)) for k in (0, 10, 20))
    assert len({tuple(order[k : k + 10]) for k in (0, 10, 20)}) == 3
    assert [i for step in range(10) for i in data.batch_order(10, 3, step, 0)] == order[:30]
    assert data.batch_order(10, 10, 0, 1) != data.batch_order(10, 10, 0, 0)

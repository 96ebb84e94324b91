"""Stage 0: what is read from videos and captions, how clips are split, and what is left out by name."""

import csv
import itertools
import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from helpers import contents, cut, real_clips

import data
import prepare
import vae
import video
import world
from prepare import Config

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
    "name, size", [("bigbuckbunny", (720, 1280)), ("bikes", (272, 640)), ("carphone_pristine", (144, 176))]
)
def test_frames_of_real_files(name, size):
    """Real H.264 files at their own size: the frames of read_clip are PyAV's, bit for bit."""
    frames = video.read_clip(real_clips()[name], 49)
    assert frames.shape == (49, *size, 3) and frames.dtype == np.uint8
    with av.open(str(real_clips()[name])) as file:
        for i, frame in enumerate(itertools.islice(file.decode(video=0), 49)):
            assert np.array_equal(frames[i], frame.to_ndarray(format="rgb24")), i


def test_a_folder_of_real_files(folder):
    """Three real clips of three sizes become one shard at 49 frames of 64 × 64."""
    for path in folder.iterdir():
        path.unlink()
    for name, path in real_clips().items():
        (folder / path.name).write_bytes(path.read_bytes())
        (folder / f"{name}.txt").write_text(f"the clip {name}")
    shards = run(folder)
    assert len(shards) == 3 and shards.shape("x0") == (48, 13, 2, 2) and not rejects(folder)
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


def test_pyav_reads_what_decord_reads(chain, monkeypatch):
    """Where decord has no wheel the same clips give the same frames at the file's size."""
    path = chain / "clips" / "ball-00003.mp4"
    with_decord = video.read_clip(path, 49)
    monkeypatch.setattr(video, "_has_decord", lambda: False)
    assert np.array_equal(video.read_clip(path, 49), with_decord)
    with pytest.raises(video.BadVideo, match="too short"):
        video.read_clip(path, 53)


@pytest.mark.parametrize("reader", ["decord", "PyAV"])
def test_bad_videos_are_rejected_by_name(chain, folder, reader, monkeypatch):
    """Each bad file stands in rejects.jsonl with its reason, and the run goes on with the others."""
    monkeypatch.setattr(video, "_has_decord", lambda: reader == "decord")
    write_csv(folder, [{"video": r["video"], "caption": r["caption"]} for r in captions(chain)])
    bad = {
        "text.mp4": reader,
        "cut.mp4": reader,
        "empty.mp4": reader,
        "gone.mp4": "no such file",
        "short.mp4": "too short: expected 49 frames, got 48",
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
    assert len(exact) == CLIPS and found["long.mp4"] == "wrong frame count: expected 49 frames, got 53"


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


# ---- motion and splits -----------------------------------------------------------------------------------------------


def test_motion_by_frames(folder):
    """Still and wild clips are rejected by the mean difference of neighbouring frames."""
    for path in folder.iterdir():
        path.unlink()
    for name, speed in (("still", 0.0), ("slow", 0.5), ("walk", 1.0), ("fast", 8.0)):
        video.write_mp4(folder / f"{name}.mp4", clip(speed=speed))
        (folder / f"{name}.txt").write_text(name)
    motion = {row["id"]: row["motion"] for row in run(folder, "all").rows}
    assert motion["still"] < 0.5 < motion["slow"] < motion["walk"] < motion["fast"]
    shards = run(folder, min_motion=motion["slow"] - 0.01, max_motion=motion["walk"] + 0.01)
    assert [row["id"] for row in shards.rows] == ["slow", "walk"]
    assert all("motion score" in reason for reason in rejects(folder).values()) and len(rejects(folder)) == 2


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

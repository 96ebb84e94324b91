"""Pairs of one's own: what is read from tables and folders of them, and that Asymmetrical DPO trains on it."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import DPO, contents, cut, metrics, refused, stop_at

import asymdpo
import prepare
import sft
from experiments import decode
from runtime import pairs, video
from runtime.files import read_jsonl
from runtime.options import UserError
from runtime.shards import Shards, latent_frame, pixel_frames
from tiny import codec as codecs

CAPTION = "a ball falls"


def table(folder: Path, *rows: tuple, columns: str = "chosen,rejected,caption,start") -> Path:
    """folder/pairs.csv with these rows."""
    with open(folder / "pairs.csv", "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([columns.split(","), *rows])
    return folder / "pairs.csv"


@pytest.fixture(scope="module")
def mine(chain, tmp_path_factory) -> Path:
    """Four videos of the chain in `good` and four others under the same names in `bad`. Read only."""
    root = tmp_path_factory.mktemp("mine")
    for side, first in (("good", 0), ("bad", 4)):
        (root / side).mkdir()
        for i in range(4):
            shutil.copy(chain / "clips" / f"ball-{first + i:05d}.mp4", root / side / f"{i}.mp4")
    return root


def run(chain: Path, out: Path, **options) -> Shards:
    given = {"vae": str(chain / "shards"), "shard_size": 2, "workers": 1, "out": str(out)}
    prepare.main(prepare.Config(**given, **{name: str(value) for name, value in options.items()}))
    return Shards(out, "prepare.py --pairs")


def test_the_latent_frame_of_a_picture():
    """Counted by hand: latent frame 0 is picture 0, latent frame k > 0 the pictures 4k − 3 … 4k."""
    by_hand = {0: 0, 1: 1, 4: 1, 5: 2, 8: 2, 9: 3, 12: 3, 45: 12, 48: 12}
    assert {picture: latent_frame(picture) for picture in by_hand} == by_hand
    assert all(s in range(49)[pixel_frames(latent_frame(s), latent_frame(s) + 1)] for s in range(49))


def test_a_table_of_pairs_trains(chain, mine, tmp_path, capsys):
    """Latents are the codec's of both videos, with the base's codec; asymdpo.py trains from N1 on, and decode shows
    both sides. Region 3, which such pairs have not, is refused; so are pairs for clips, and clips for pairs.
    """
    rows = [(f"good/{i}.mp4", f"bad/{i}.mp4", CAPTION, start) for i, start in enumerate(("", 0, 4, 48))]
    made = run(chain, tmp_path / "pairs", pairs=table(mine, *rows))
    line = rf"^prepare.py --pairs: {tmp_path}/pairs, 4 pairs in [\d.]+ s, 0 rejected; see its kept.png$"
    assert re.search(line, capsys.readouterr().out, re.M)
    assert [(row["n1"], row["n2"], row["start"]) for row in made.rows] == [
        (0, 13, 0),
        (0, 13, 0),
        (1, 13, 4),
        (12, 13, 48),
    ]
    assert made.rows[2].items() >= {"id": "good/2 over bad/2", "caption": CAPTION, "rejected": "bad/2.mp4"}.items()
    codec = codecs.load(chain / "shards")
    for side, folder in (("chosen", "good"), ("rejected", "bad")):
        true = video.to_pixels(video.read_clip(mine / folder / "2.mp4", 49))
        assert torch.equal(made.get(side, [2])[0], codec.encode(true[None])[0])
    folders = {name: str(chain / name) for name in ("base", "sft")}
    for region in ("123", "23"):
        out = tmp_path / region
        asymdpo.main(asymdpo.Config(**folders, pairs=str(made.folder), out=str(out), region=region, **DPO))
        first, second = metrics(out)
        assert first["S"] == 0 and second["S"] != 0 and "diff/w/2" in second and "diff/w/3" not in second
    cfg = asymdpo.Config(**folders, pairs=str(made.folder), out=str(tmp_path / "3"), region="3", **DPO)
    refused("winners with generated frames for --region 3, got none; give --region 23", asymdpo.main, cfg)
    cfg = asymdpo.Config(**folders, pairs=str(chain / "shards"), out=str(tmp_path / "3"), **DPO)
    refused("expected a folder of samples with chosen, got one made by prepare, with x0", asymdpo.main, cfg)
    cfg = sft.Config(data=str(made.folder), out=str(tmp_path / "3"))
    refused("folder made by prepare.py, got one made by prepare.py --pairs", sft.main, cfg)
    decode.main(decode.Config(shards=str(made.folder), clips=1, out=str(tmp_path / "look")))
    assert [row["video"] for row in read_jsonl(tmp_path / "look/prompts.jsonl")] == [
        "00000-0-chosen.mp4",
        "00000-0-rejected.mp4",
    ]


def test_two_folders_are_pairs_by_name(chain, mine, tmp_path, capsys, monkeypatch):
    """Captions beside either side or in its table; videos without a partner are counted and named. Interrupted after
    a shard and started again, it makes what it makes at once.
    """
    root = shutil.copytree(mine, tmp_path / "mine")
    (root / "good/0.txt").write_text(CAPTION)
    for i in (0, 1):
        (root / f"bad/{i}.txt").write_text(CAPTION)
    (root / "bad/2.mp4").rename(root / "bad/2.mkv")
    (root / "bad/2.txt").write_text("two words")
    shutil.copy(root / "good/3.mp4", root / "good/3b.mp4")
    (root / "bad/3.mp4").rename(root / "bad/4.mp4")
    folders = {"chosen": root / "good", "rejected": root / "bad"}
    made = run(chain, tmp_path / "once", **folders)
    assert [(row["id"], row["caption"], row["n1"]) for row in made.rows] == [
        ("0", CAPTION, 0), ("1", CAPTION, 0), ("2", "two words", 0),
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert f"skipped 2 of 5 videos of {root}/good that {root}/bad lacks: '3', '3b'" in said
    assert f"skipped 1 of 4 videos of {root}/bad that {root}/good lacks: '4'" in said
    with stop_at(monkeypatch, prepare, "write_shard", 1), pytest.raises(KeyboardInterrupt):
        run(chain, tmp_path / "again", **folders)
    assert [row["id"] for row in run(chain, tmp_path / "again", **folders).rows] == ["0", "1", "2"]
    assert contents(tmp_path / "again") == contents(tmp_path / "once")
    (root / "good/metadata.csv").write_text("video,caption\n0.mp4,other words\n")
    bad = {**folders, "out": tmp_path / "bad"}
    refused(r"good row 1 \('0.mp4', '0.mp4'\): its two videos have different captions", run, chain, **bad)
    (root / "bad/2.txt").unlink()
    (root / "captions.csv").write_text(f"video,caption\n0.mp4,{CAPTION}\n")
    refused(r"good row 3 .*: its caption is missing or empty", run, chain, **bad, metadata=root / "captions.csv")


BAD = {  # a row -> why it is refused
    ("gone.mp4", "bad/1.mp4", CAPTION, ""): "its chosen video: no such file in ",
    ("good/1.mp4", "../canary.mp4", CAPTION, ""): "its rejected video: it leaves the folder by its path",
    ("good/1.mp4", "link.mp4", CAPTION, ""): "its rejected video: it leaves the folder through a link",
    ("", "bad/1.mp4", CAPTION, ""): "its chosen video: it names no video",
    ("good/1.mp4", "http://host/1.mp4", CAPTION, ""): "its rejected video: it is an address",
    ("good/1.mp4", "1.mp4", CAPTION, ""): "its rejected video: there are 2 videos of that name",
    ("good/1.mp4", "bad/1.mp4", " ", ""): "its caption is missing or empty",
    ("good/1.mp4", "bad/1.mp4", "…", ""): "its caption has no word",
    ("good/1.mp4", "bad/1.mp4", CAPTION): "expected 4 cells as in the header, got 3",
    ("good/1.mp4", "bad/1.mp4", CAPTION, "49"): "its start is '49', expected a whole number from 0 to 48",
    ("good/1.mp4", "bad/1.mp4", CAPTION, "-1"): "its start is '-1'",
    ("good/1.mp4", "bad/1.mp4", CAPTION, "1.5 s"): "its start is '1.5 s'",
    ("good/1.mp4", "good/1.mp4", CAPTION, ""): "its two videos are the same file, or equal ones",
    ("good/1.mp4", "copy.mp4", CAPTION, ""): "its two videos are the same file, or equal ones",
    ("bad/0.mp4", "good/0.mp4", CAPTION, ""): "its two videos are another row's pair",
}


def test_each_bad_row_stands_alone(mine, tmp_path):
    """It stops the run by its number and reason; with --bad_rows reject it is listed, and the others are read."""
    root = shutil.copytree(mine, tmp_path / "mine")
    shutil.copy(root / "good/1.mp4", root / "copy.mp4")
    (tmp_path / "canary.mp4").touch()
    (root / "link.mp4").symlink_to("../canary.mp4")
    good = [("good/0.mp4", "bad/0.mp4", CAPTION, "7.0"), ("good/2.mp4", "bad/2.mp4", CAPTION, "")]

    def read(**changes) -> tuple[list[pairs.Pair], list[dict]]:
        cfg = prepare.Config(pairs=str(root / "pairs.csv"), videos=str(root), frames=49, **changes)
        return pairs.read_pairs(cfg, lambda caption: prepare.check_caption(caption, "tiny"))

    for row, words in BAD.items():
        table(root, good[0], row, good[1])
        refused(rf"pairs.csv row 2 \(.*\): {words}.*; mend it, or leave such rows out", read)
        found, rejected = read(bad_rows="reject")
        assert [(pair.chosen, pair.start) for pair in found] == [("good/0.mp4", 7), ("good/2.mp4", 0)], row
        assert [words in row["reason"] for row in rejected] == [True]
    table(root, *list(BAD)[:-1])
    refused("expected pairs of videos, found none; its chosen video", read, bad_rows="reject")
    table(root, good[0], columns="chosen,rejected,caption, Start")
    refused("pairs.csv: expected the column 'start', got ' Start': name it so", read)
    table(root, good[0][:2], columns="chosen,rejected")
    refused("expected the columns chosen,rejected,caption, got 'chosen, rejected'", read)


def test_videos_that_make_no_pair(chain, mine, tmp_path):
    """Each is rejected by its side and reason: damaged, too short, and pairs that show the same where the loss looks.

    A rejected video may stand still, a chosen one may not.
    """
    root, moving = shutil.copytree(mine, tmp_path / "mine"), video.read_clip(mine / "good/0.mp4", 49)
    cut(root / "good/1.mp4")
    late = moving.copy()
    late[:5] = 255 - late[:5]  # latent frames 0 and 1
    for name, frames in {"a": moving, "late": late, "short": moving[:48], "still": moving[:1].repeat(49, 0)}.items():
        video.write_mp4(root / f"{name}.mp4", frames, crf=0)
    video.write_mp4(root / "b.mp4", np.concatenate([moving, moving]), crf=0)  # other bytes, the same pictures
    rows = [
        ("good/1.mp4", "bad/1.mp4", ""), ("a.mp4", "short.mp4", ""), ("a.mp4", "b.mp4", ""), ("a.mp4", "late.mp4", 5),
        ("still.mp4", "good/2.mp4", ""), ("a.mp4", "still.mp4", ""), ("late.mp4", "b.mp4", 4),
    ]  # fmt: skip
    made = run(chain, tmp_path / "pairs", pairs=table(root, *((a, b, CAPTION, start) for a, b, start in rows)))
    assert [row["id"] for row in made.rows] == ["a over still", "late over b"]
    reasons = [
        "its chosen video: FFmpeg cannot open it", "its rejected video: too short: expected 49 frames",
        "the same from picture 0 on", "the same from picture 5 on", "its chosen video: the picture stands still",
    ]  # fmt: skip
    found = [row["reason"] for row in read_jsonl(made.folder / "rejects.jsonl")]
    assert all(words in reason for words, reason in zip(reasons, found, strict=True)), json.dumps(found)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(pairs="a.csv", chosen="b", rejected="c"), "expected --pairs, a table, or --chosen and --rejected"),
        (dict(chosen="b"), "expected --pairs, a table, or --chosen and --rejected, two folders, got '', 'b' and ''"),
        (dict(pairs="a.csv"), "need --vae, the shards that --base was trained on"),
        (dict(pairs="a.csv", preset="1.3b", base="wan", clips=2), "--clips says nothing of --pairs: leave it out"),
        (dict(pairs="a.csv", preset="1.3b", base="wan", metadata="b.csv"), "--metadata says nothing of --pairs"),
        (dict(chosen="b", rejected="c", preset="1.3b", base="wan", videos="d"), "--videos says nothing of --chosen"),
        (dict(pairs="gone/a.csv", preset="1.3b", base="wan"), "gone: expected a folder of videos, got no such folder"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(options, words, tmp_path):
    with pytest.raises(UserError, match=words):
        prepare.main(prepare.Config(**options, out=str(tmp_path / "out")))

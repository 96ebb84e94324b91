"""label.py: scores of exact physics, of appearance and of a file; what does not fit is refused, by name."""

import csv
import functools
import math
from types import SimpleNamespace

import av
import pytest
import torch
from helpers import labelled, run_stage, stop_at

import sample
from experiments import labels as label
from runtime import run as common
from runtime import shards as data
from runtime.run import UserError, read_jsonl
from tiny import balls as world
from wan import vae


def test_appearance_is_blind_to_motion():
    """Real clips with their frames shuffled or turned round: as good to it as before, worse by the exact score."""
    clips, orders = [world.make_clip(0, i) for i in range(2)], [torch.randperm(49), torch.arange(49).roll(24)]
    pixels = [torch.from_numpy(clip).permute(3, 0, 1, 2) / 127.5 - 1 for clip, *_ in clips]
    sides = {"first": pixels, "second": [p[:, order] for p, order in zip(pixels, orders)]}

    class Clips(list):
        rows, get = [{"caption": c[1]} for c in clips], lambda self, side, index: sides[side][index[0]][None]

    codec, bar = SimpleNamespace(decode=lambda x: x), SimpleNamespace(update=lambda: None)
    seen, exact = (label.physics_scores(codec, Clips(pixels), [0, 13], s, bar)[..., 0] for s in ("appearance", "exact"))
    assert torch.allclose(seen[:, 0], seen[:, 1], atol=1e-5) and (exact[:, 0] - exact[:, 1] > 0.1).all()


def test_exact_and_noisy_labels(chain, made, tmp_path, monkeypatch):
    """Scores are score_clip's of each segment's own pictures, ties 0. Of the noisy labels about the share asked for is
    turned round, by (seed, pair, segment). A run that was cut ends in the same labels."""
    codec, shards = vae.load(chain / "shards"), data.Shards(made["structural"], "make_pairs.py")
    exact = read_jsonl(made["by_segment"] / "labels.jsonl")
    assert common.read_manifest(made["by_segment"], "label.py")["cuts"] == [0, 3, 6, 9, 11, 13]
    for i, side in ((0, "first"), (5, "second")):
        clip = ((codec.decode(shards.get(side, [i]))[0] + 1) / 2).permute(1, 2, 3, 0).numpy()
        parts = [slice(*ends) for ends in ((0, 9), (9, 21), (21, 33), (33, 41), (41, 49))]
        expected = [world.score_clip(clip, shards.rows[i]["caption"], part)["score"] for part in parts]
        assert exact[i][side] == pytest.approx(expected, abs=1e-6)
    gaps = [[a - b for a, b in zip(row["first"], row["second"])] for row in exact]
    assert [row["label"] for row in exact] == [[(g > 0) - (g < 0) for g in row] for row in gaps]
    tie = sorted(abs(g) for row in gaps for g in row)[9]
    options = dict(tie=tie, segments=5)
    with stop_at(monkeypatch, world, "score_clip", 7), pytest.raises(KeyboardInterrupt):
        labelled(chain, made["structural"], tmp_path / "tied", **options)
    tied = labelled(chain, made["structural"], tmp_path / "tied", **options)
    assert [row["label"] for row in tied] == [[(g > tie) - (g < -tie) for g in row] for row in gaps]
    noisy = [labelled(chain, made["structural"], tmp_path / f"{k}", scorer="noisy", segments=5, seed=k // 2)
             for k in range(3)]  # fmt: skip
    assert noisy[0] == noisy[1] != noisy[2] and [row["first"] for row in noisy[0]] == [row["first"] for row in exact]
    assert any(0 < sum(a != b for a, b in zip(x["label"], y["label"])) < 5 for x, y in zip(noisy[0], exact))
    ids, ones = [f"clip-{i}" for i in range(2000)], torch.ones(2000, 5, dtype=torch.int64)
    shares = [(label.flipped(ones, ids, share, 0) < 0).double().mean().item() for share in (0.0, 0.3, 1.0)]
    assert shares == pytest.approx([0, 0.3, 1], abs=0.02) and shares[::2] == [0, 1]


@pytest.fixture(scope="module")
def videos(chain, made, tmp_path_factory):
    """What sample.py writes of the structural pairs: each side whole and in five pieces."""
    out, codec = tmp_path_factory.mktemp("videos") / "out", str(chain / "shards")
    sample.main(sample.Config(decode=str(made["structural"]), segments=5, data=codec, out=str(out)))
    return sorted(out.glob("*.mp4"))


COLUMNS = ("path", "prompt", "reward_VQ", "reward_MQ", "reward_TA", "reward_Overall")  # as VideoAlign writes them


def from_file(chain, made, videos, out, harm=lambda rows: rows, columns=COLUMNS, **options):
    """Labels of the structural pairs' videos, of which the i-th scores i, and −i under reward_MQ; harm: of the rows."""
    rows = [[str(v), 'a "ball",\nfalling', 0.1, -i, 0.2, i] for i, v in enumerate(videos)]
    out.mkdir()
    with open(out / "scores.csv", "w", newline="", encoding="utf-8-sig") as f:
        csv.writer(f).writerows([columns, *harm(rows)])
    options |= dict(scorer="file", scores=str(out / "scores.csv"), data="")
    return labelled(chain, made["structural"], out / "labels", **options)


def test_scores_of_a_file(chain, made, videos, tmp_path):
    """Of the videos that sample.py writes, each side whole and in pieces whose pictures add up; columns new and old."""
    counts = [sum(1 for _ in av.open(str(video)).decode(video=0)) for video in videos[:12]]
    assert len(videos) == 8 * 2 * 6 and counts == [9, 12, 12, 8, 8, 49] * 2  # -first-s0 … -first-s4, -first.mp4
    give = functools.partial(from_file, chain, made, videos)
    pieces, whole = give(tmp_path / "a", segments=5), give(tmp_path / "b")
    for i, (row, one) in enumerate(zip(pieces, whole, strict=True)):
        assert row["first"] == [12 * i + k for k in range(5)] and row["label"] == [-1] * 5
        assert (one["first"], one["second"], one["label"]) == ([12 * i + 5], [12 * i + 11], [-1])
    assert [row["label"] for row in give(tmp_path / "c", column="reward_MQ")] == [[1]] * 8
    old = give(tmp_path / "d", lambda rows: [[r[0], r[5]] for r in rows], ("video", "reward_ALL"))
    assert old == whole


def score(value):
    return lambda rows: [[*r[:5], value] if "00001" in r[0] else r for r in rows]


BAD = {  # what is wrong with the csv -> a change of its rows, words, options
    "missing": (lambda rows: rows[24:], r"got 4 without one: 00000-.*-first\.mp4, .*00001-.*, …"),
    "a missing piece": (lambda rows: rows[1:], r"got 1 without one: 00000-.*-first-s0\.mp4$", dict(segments=5)),
    "other pieces": (lambda rows: rows, r"got 16 unknown: 00000-.*-first-s4\.mp4", dict(segments=4)),
    "twice": (lambda rows: [*rows, ["b/" + rows[5][0].rpartition("/")[2], *rows[5][1:]]], r"twice.*00000-.*first\.mp4"),
    "unknown": (lambda rows: [*rows, ["other.mp4", "", 0, 0, 0, 0]], r"got 1 unknown: other\.mp4"),
    "no number": (score("good"), r"a number under reward_Overall for 00001-.*-first\.mp4, got 'good'"),
    "NaN": (score("nan"), r"00001-.*mp4, got 'nan'"),
    "empty": (score(""), r"00001-.*mp4, got ''"),
    "short rows": (lambda rows: [row[:4] for row in rows], "00000-.*mp4, got None"),
    "no score": (lambda rows: rows, "its columns are path, prompt", dict(column="reward_XY")),
    "no name": (lambda rows: rows, "expected a column path or video", dict(columns=("name", *COLUMNS[1:]))),
    "nothing": (lambda rows: rows, "its columns are none", dict(columns=())),
    "no table": (lambda rows: [[rows[0][0], "x" * 200_000]], "expected a csv table"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_scores_are_refused(name, chain, made, videos, tmp_path):
    """In one line that names the videos; nothing is written."""
    harm, words, *options = BAD[name]
    with pytest.raises(UserError, match=words) as caught:
        from_file(chain, made, videos, tmp_path / "out", harm, **(options[0] if options else {}))
    assert "\n" not in str(caught.value) and not (tmp_path / "out" / "labels").exists()


REFUSED = {  # what -> stage, options with names of folders in braces, words
    "no labels": ("asymdpo", dict(loss="flow", pairs="{flow}"), "--labels of label.py"),
    "labels for asym": ("asymdpo", dict(pairs="{flow}", labels="{by_clip}"), "expected pairs in order"),
    "labels of pieces": ("asymdpo", dict(loss="flow", pairs="{structural}", labels="{by_segment}"), "got 5 segments"),
    "labels of others": ("asymdpo", dict(loss="dense", pairs="{flow}", labels="{by_segment}"), "of other pairs"),
    "in order": ("asymdpo", dict(loss="dense", labels="{by_clip}"), "pairs without an order"),
    "evaluation": ("eval", dict(pairs="{flow}"), "expected pairs in order"),
    "ordered": (label, dict(pairs="{pairs}"), "others have an order"),
    "scorer": (label, dict(scorer="videoreward"), "--scorer: expected one of exact"),
    "no scores": (label, dict(scorer="file"), "--scores with --scorer file"),
    "no file": (label, dict(scorer="file", scores="/nowhere.csv"), "/nowhere.csv"),
    "segments": (label, dict(segments=14), "--segments: expected 1 to 13"),
    "flip": (label, dict(scorer="noisy", flip=1.5), "--flip from 0 to 1"),
    "tie": (label, dict(tie=math.nan), "--tie of at least 0"),
    "torchrun": (label, {}, "expected one process, got 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_is_named(name, chain, made, tmp_path, monkeypatch):
    """In one line, before anything is written."""
    stage, options, words = REFUSED[name]
    given = {"data": "{chain}/shards", "pairs": "{flow}"} if stage is label else {}
    options = given | options | {"out": str(tmp_path / "out")}
    folders = {**made, "pairs": chain / "pairs", "chain": chain}
    options = {k: v.format(**folders) if isinstance(v, str) else v for k, v in options.items()}
    monkeypatch.setenv("WORLD_SIZE", "2" if name == "torchrun" else "1")
    with pytest.raises(UserError, match=words) as caught:
        run_stage(chain, stage, **options) if isinstance(stage, str) else stage.main(stage.Config(**options))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()

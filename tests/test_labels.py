"""experiments.labels: scores of exact physics, of appearance and of a file; what does not fit is refused, by name."""

import csv
import dataclasses
import functools
from types import SimpleNamespace

import av
import pytest
import torch
from helpers import flip_bit, labelled, run_stage, stop_at

from experiments import baselines, decode, labels, pairs
from experiments.pairs import SIDES
from runtime import video
from runtime.files import read_jsonl, read_manifest
from runtime.options import UserError
from runtime.shards import Shards
from tiny import balls
from tiny import codec as codecs


def test_appearance_is_blind_to_motion():
    """Real clips with their frames shuffled or turned round: as good to it as before, worse by the exact score."""
    clips, orders = [balls.make_clip(0, i) for i in range(2)], [torch.randperm(49), torch.arange(49).roll(24)]
    pixels = [torch.from_numpy(clip).permute(3, 0, 1, 2) / 127.5 - 1 for clip, *_ in clips]
    sides = {"first": pixels, "second": [p[:, order] for p, order in zip(pixels, orders)]}

    class Clips(list):
        rows = [{"caption": c[1]} for c in clips]
        get = lambda self, side, index: torch.stack([sides[side][i] for i in index])  # noqa: E731

    codec, bar = SimpleNamespace(decode=lambda x: x), SimpleNamespace(update=lambda n: None)
    seen, exact = (
        labels.physics_scores(codec, Clips(pixels), [0, 13], s, bar)[..., 0] for s in ("appearance", "exact")
    )
    assert torch.allclose(seen[:, 0], seen[:, 1], atol=1e-5) and (exact[:, 0] - exact[:, 1] > 0.1).all()


def test_exact_and_noisy_labels(chain, made, tmp_path, monkeypatch):
    """Scores are balls.score's of each segment's own pictures, ties 0. Of the noisy labels about the share asked for is
    turned round, by (seed, pair, segment). A run that was cut ends in the same labels."""
    codec, shards = codecs.load(chain / "shards"), Shards(made["structural"], "experiments.pairs")
    exact = read_jsonl(made["by_segment"] / "labels.jsonl")
    assert read_manifest(made["by_segment"], "experiments.labels")["cuts"] == [0, 3, 6, 9, 11, 13]
    for i, side in ((0, "first"), (5, "second")):
        pixels = ((codec.decode(shards.get(side, [i])) + 1) / 2).permute(0, 2, 3, 4, 1).numpy()
        light, caption = balls.light_of(pixels), [shards.rows[i]["caption"]]
        parts = [slice(*ends) for ends in ((0, 9), (9, 21), (21, 33), (33, 41), (41, 49))]
        expected = [balls.score_clips(light, caption, part)["score"][0] for part in parts]
        assert exact[i][side] == pytest.approx(expected, abs=1e-6)
    gaps = [[a - b for a, b in zip(row["first"], row["second"])] for row in exact]
    assert [row["label"] for row in exact] == [[(g > 0) - (g < 0) for g in row] for row in gaps]
    tie = sorted(abs(g) for row in gaps for g in row)[9]
    options = dict(tie=tie, segments=5)
    with stop_at(monkeypatch, balls, "score_clips", 7), pytest.raises(KeyboardInterrupt):
        labelled(chain, made["structural"], tmp_path / "tied", **options)
    tied = labelled(chain, made["structural"], tmp_path / "tied", **options)
    assert [row["label"] for row in tied] == [[(g > tie) - (g < -tie) for g in row] for row in gaps]
    noisy = [labelled(chain, made["structural"], tmp_path / f"{k}", scorer="noisy", segments=5, seed=k // 2)
             for k in range(3)]  # fmt: skip
    assert noisy[0] == noisy[1] != noisy[2] and [row["first"] for row in noisy[0]] == [row["first"] for row in exact]
    assert any(0 < sum(a != b for a, b in zip(x["label"], y["label"])) < 5 for x, y in zip(noisy[0], exact))
    ids, ones = [f"clip-{i}" for i in range(2000)], torch.ones(2000, 5, dtype=torch.int64)
    shares = [(labels.flipped(ones, ids, share, 0) < 0).double().mean().item() for share in (0.0, 0.3, 1.0)]
    assert shares == pytest.approx([0, 0.3, 1], abs=0.02) and shares[::2] == [0, 1]


def names(made) -> list[str]:
    """The videos that experiments.decode writes of the structural pairs, sorted: each side in five pieces and whole."""
    ids = [row["id"] for row in Shards(made["structural"], "experiments.pairs").rows]
    parts = [f"-{side}{piece}" for side in SIDES for piece in ("-s0", "-s1", "-s2", "-s3", "-s4", "")]
    return [f"{i:05d}-{name}{part}.mp4" for i, name in enumerate(ids) for part in parts]


COLUMNS = ("path", "prompt", "reward_VQ", "reward_MQ", "reward_TA", "reward_Overall")  # as VideoAlign writes them


def from_file(chain, made, out, harm=lambda rows: rows, columns=COLUMNS, **options):
    """Labels of the structural pairs' videos, of which the i-th scores i, and −i under reward_MQ; harm: of the rows."""
    rows = [["videos/" + v, 'a "ball",\nfalling', 0.1, -i, 0.2, i] for i, v in enumerate(names(made))]
    out.mkdir()
    with open(out / "scores.csv", "w", newline="", encoding="utf-8-sig") as f:
        csv.writer(f).writerows([columns, *harm(rows)])
    options |= dict(scorer="file", scores=str(out / "scores.csv"), data="")
    return labelled(chain, made["structural"], out / "labels", **options)


def test_scores_of_a_file(chain, made, tmp_path):
    """Each side whole and in pieces; VideoAlign's column, and one that is named."""
    give = functools.partial(from_file, chain, made)
    pieces, whole = give(tmp_path / "a", segments=5), give(tmp_path / "b")
    for i, (row, one) in enumerate(zip(pieces, whole, strict=True)):
        assert row["first"] == [12 * i + k for k in range(5)] and row["label"] == [-1] * 5
        assert (one["first"], one["second"], one["label"]) == ([12 * i + 5], [12 * i + 11], [-1])
    assert [row["label"] for row in give(tmp_path / "c", column="reward_MQ")] == [[1]] * 8


def test_the_videos_to_score(chain, made, tmp_path, monkeypatch):
    """What experiments.decode writes has the names that are looked up; the pieces' pictures add up to the clip's. What
    was damaged while it was cut is made again.
    """
    folders = dict(shards=made["structural"], data=chain / "shards", out=tmp_path / "out")
    cfg = decode.Config(segments=5, **{name: str(folder) for name, folder in folders.items()})
    with stop_at(monkeypatch, video, "write_mp4", 8), pytest.raises(KeyboardInterrupt):
        decode.main(cfg)
    damaged = tmp_path / "out" / names(made)[0]
    whole = damaged.read_bytes()
    flip_bit(damaged)
    decode.main(dataclasses.replace(cfg, data=f"{chain}/./shards"))
    assert damaged.read_bytes() == whole
    videos = sorted((tmp_path / "out").glob("*.mp4"))
    counts = [sum(1 for _ in av.open(str(path)).decode(video=0)) for path in videos[:12]]
    assert [path.name for path in videos] == names(made) and counts == [9, 12, 12, 8, 8, 49] * 2


def score(value):
    return lambda rows: [[*r[:5], value] if "00001" in r[0] else r for r in rows]


BAD = {  # what is wrong with the csv -> a change of its rows, words, options
    "missing": (lambda rows: rows[24:], r"got 4 without one: 00000-.*-first\.mp4, .*00001-.*, …"),
    "a missing piece": (lambda rows: rows[1:], r"got 1 without one: 00000-.*-first-s0\.mp4$", dict(segments=5)),
    "other pieces": (lambda rows: rows, r"got 16 unknown: 00000-.*-first-s4\.mp4", dict(segments=4)),
    "unknown": (lambda rows: [*rows, ["other.mp4", *rows[0][1:]]], r"got 1 unknown: other\.mp4", dict(segments=5)),
    "twice": (lambda rows: [*rows, ["b/" + rows[5][0].rpartition("/")[2], *rows[5][1:]]], r"00000-.*first\.mp4 twice"),
    "no number": (score("good"), r"got 2 without one: 00001-.*-first\.mp4, 00001-.*-second\.mp4$"),
    "NaN": (score("nan"), "a number for each video of the pairs, got 2"),
    "empty": (score(""), "got 2 without one"),
    "short rows": (lambda rows: [row[:4] for row in rows], "got row 1: expected . cells as in the header, got 4"),
    "no score": (lambda rows: rows, "path and reward_XY.* columns are path, prompt", dict(column="reward_XY")),
    "no name": (lambda rows: rows, "expected the columns path", dict(columns=("name", *COLUMNS[1:]))),
    "nothing": (lambda rows: [], "its columns are none", dict(columns=())),
    "no table": (lambda rows: [[rows[0][0], "x" * 200_000]], "expected a csv table"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_scores_are_refused(name, chain, made, tmp_path):
    """In one line that names the videos; nothing is written."""
    harm, words, *options = BAD[name]
    with pytest.raises(UserError, match=words) as caught:
        from_file(chain, made, tmp_path / "out", harm, **(options[0] if options else {}))
    assert "\n" not in str(caught.value) and not (tmp_path / "out" / "labels").exists()


GIVEN = {  # module -> its folders; names in braces are folders of the fixtures
    pairs: dict(base="{chain}/base", data="{chain}/shards"),
    labels: dict(pairs="{flow}", data="{chain}/shards"),
    baselines: dict(base="{chain}/base", sft="{chain}/sft", pairs="{flow}", labels="{by_clip}"),
}
REFUSED = {  # what -> module or stage, options, words
    "eta": (pairs, dict(kind="structural", eta_min=0.9), "--eta_min: expected .* at most --eta_max .0.8., got 0.9"),
    "clips": (pairs, dict(clips=99), "--clips: expected at most"),
    "no LoRA": (pairs, dict(lora="/nowhere"), "/nowhere: expected a LoRA|/nowhere/lora.safetensors: expected a LoRA"),
    "no labels": (baselines, dict(labels="/nowhere"), "/nowhere: expected a folder"),
    "labels of pieces": (baselines, dict(pairs="{structural}", labels="{by_segment}"), "got 5 segments"),
    "labels of others": (baselines, dict(loss="dense", labels="{by_segment}"), "of other pairs"),
    "in order": (baselines, dict(pairs="{chain}/pairs"), "got one made by make_pairs"),
    "in no order": ("asymdpo", dict(pairs="{flow}"), "got one made by experiments.pairs"),
    "evaluation": ("eval", dict(pairs="{flow}"), "got one made by experiments.pairs"),
    "ordered": (labels, dict(pairs="{chain}/pairs"), "got one made by make_pairs"),
    "no scores": (labels, dict(scorer="file"), "--scores with --scorer file"),
    "no file": (labels, dict(scorer="file", scores="/nowhere.csv"), "/nowhere.csv"),
    "segments": (labels, dict(segments=14), "--segments: expected at most 13"),
    "nobody real": (labels, dict(scorer="real"), "of --kind real or local for --scorer real, got flow"),
    "segments of its own": (labels, dict(scorer="real", segments=5), "--segments: expected none with --scorer real"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_is_named(name, chain, made, tmp_path):
    """In one line, before anything is written."""
    stage, options, words = REFUSED[name]
    options = GIVEN.get(stage, {}) | options | {"out": str(tmp_path / "out")}
    options = {k: v.format(chain=chain, **made) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(UserError, match=words) as caught:
        run_stage(chain, stage, **options) if isinstance(stage, str) else stage.main(stage.Config(**options))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_clips_with_few_labels_are_left_out(chain, made, tmp_path):
    """A fifth of the frames is not enough, and if no clip has more, there is nothing to train on."""
    rows = labelled(chain, made["structural"], tmp_path / "ties", tie=1e9, segments=5)
    assert all(row["label"] == [0] * 5 for row in rows)
    folders = dict(base=chain / "base", sft=chain / "sft", pairs=made["structural"], labels=tmp_path / "ties")
    cfg = baselines.Config(loss="dense", out=str(tmp_path / "out"), **{k: str(v) for k, v in folders.items()})
    with pytest.raises(UserError, match="expected pairs that are not tied, got none"):
        baselines.main(cfg)
    frames = torch.ones(4, 15).where(torch.arange(15) < torch.tensor([0, 3, 4, 15])[:, None], 0)
    assert baselines.decided(frames) == [2, 3]

"""Mistakes of the user and of the machine: one line that says what is wrong and what to do, code 2, nothing lost."""

import csv
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, command_line, contents, copy, cut, flip_bit, run_stage, script, stage

import prepare
from runtime import run as common
from runtime import shards as data
from runtime.run import UserError
from tiny import balls as world

EVERYTHING = ("clips", "shards", "base", "sft", "continuation", "pairs", "asymdpo")


def one_line(error: Exception) -> str:
    """The error's text, which must be a line of a reasonable length."""
    text = str(error)
    assert "\n" not in text.strip() and 20 < len(text) < 600, text
    return text


# ---- a stage's options and folders -----------------------------------------------------------------------------------


def remove(name):
    def harm(root):
        (root / name).unlink()

    return harm


def rewrite(name, text):
    def harm(root):
        (root / name).write_text(text)

    return harm


def put(name, in_place_of):
    def harm(root):
        shutil.rmtree(root / in_place_of)
        (root / name).rename(root / in_place_of)

    return harm


CASES = {  # what is wrong -> stage, options, harm done to the folders, words that the error must have
    "unknown preset": ("sft", dict(preset="huge"), None, "--preset: expected one of .*tiny.*got 'huge'"),
    "no steps": ("sft", dict(steps=0), None, "--steps: expected at least 1, got 0"),
    "negative rank": ("sft", dict(rank=-1), None, "--rank: expected at least 0"),
    "micro_batch does not divide": ("sft", dict(micro_batch=3), None, "batch_size 4: expected a multiple"),
    "negative micro_batch": ("asymdpo", dict(micro_batch=-1), None, "micro_batch"),
    "unknown split": ("sft", dict(split="test"), None, "split 'test', its splits are align, eval, train"),
    "unknown layers": ("sft", dict(layers="some"), None, "layers.*attn"),
    "unknown prompts": ("continuation", dict(prompts="everywhere"), None, "prompts.*context"),
    "LoRA of rank 0": ("continuation", dict(rank=0), None, "rank"),
    "frames not 4k+1": ("shards", dict(frames=48), None, "--frames: expected 4k\\+1 .*got 48; try 49"),
    "size the codec cannot cut": ("shards", dict(height=60), None, "multiples of 32, got 60"),
    "shares above 1": ("shards", dict(train=0.9, align=0.2), None, "add up to at most 1"),
    "unknown motion": ("shards", dict(motion="flow"), None, "--motion: expected frames or column"),
    "N1 above N2": ("pairs", dict(n1_max=12), None, "n1_min <= n1_max < n2_min"),
    "N2 past the clip": ("pairs", dict(n2_max=14), None, "n2_max <= 13"),
    "more pairs than clips": ("pairs", dict(clips=1000), None, "--clips: expected at most"),
    "unknown kind of pairs": ("pairs", dict(pairs="two"), None, "--pairs: expected one of continuation, flow, struct"),
    "no pair a clip": ("pairs", dict(per_clip=0), None, "--per_clip >= 1"),
    "strength that is no number": ("pairs", dict(strength=float("nan")), None, "--strength: expected at least 0"),
    "lengths of two samples": ("pairs", dict(pairs="flow", n2_min=13), None, "expected none with --pairs flow"),
    "eta_min above eta_max": ("pairs", dict(pairs="structural", eta_min=0.9), None, "eta_min <= eta_max"),
    "no LoRA to fuse": ("pairs", dict(pairs="flow", lora="/nowhere"), None, "/nowhere: expected a LoRA"),
    "no shard": ("pairs", dict(shard_size=0), None, "shard_size"),
    "unknown region": ("asymdpo", dict(region="2"), None, "--region: expected 123, 23 or 3, got '2'"),
    "unknown form": ("asymdpo", dict(form="around"), None, "--form outside, inside or plain"),
    "unknown loss": ("asymdpo", dict(loss="simpo"), None, "--loss: expected asym, flow or dense, got 'simpo'"),
    "regions of Flow-DPO": ("asymdpo", dict(loss="flow", region="3"), None, "--region: expected none with --loss flow"),
    "beta that is no number": ("asymdpo", dict(beta=float("nan")), None, "--beta > 0"),
    "beta 0": ("asymdpo", dict(beta=0.0), None, "--beta > 0"),
    "too few clips to compare": ("eval", dict(clips=1), None, "at least 2"),
    "more sweep clips than there are": ("eval", dict(sweep_clips=1000), None, "--sweep_clips: expected at most"),
    "missing base": ("sft", dict(base="/nowhere/base"), None, "/nowhere/base: expected a folder"),
    "missing data": ("sft", dict(data="/nowhere/shards"), None, "/nowhere/shards"),
    "missing pairs": ("asymdpo", dict(pairs="/nowhere/pairs"), None, "/nowhere/pairs"),
    "base is another thing": ("continuation", dict(base=str(ROOT / "kernels")), None, "kernels: expected weights"),
    "continuation is another thing": ("pairs", dict(continuation=str(ROOT / "kernels")), None, "continuation.py"),
    "data is a folder of pairs": ("sft", {}, put("pairs", "shards"), "got one made by make_pairs.py"),
    "pairs are shards of clips": (
        "asymdpo", {}, put("shards", "pairs"), "got one made by prepare.py",
    ),
    "continuation is a cold start": (
        "pairs", {}, put("sft", "continuation"), "got one made by sft.py",
    ),
    "cold start is a continuation": (
        "asymdpo", {}, put("continuation", "sft"), "got one made by continuation.py",
    ),
    "unfinished shards": ("sft", {}, remove("shards/MANIFEST.json"), "shards: .*unfinished; run prepare.py first"),
    "unfinished cold start": ("asymdpo", {}, remove("sft/MANIFEST.json"), "sft: .*unfinished; run sft.py"),
    "unfinished continuation": ("pairs", {}, remove("continuation/MANIFEST.json"), "continuation: .*unfinished"),
    "damaged manifest": (
        "asymdpo", {}, rewrite("pairs/MANIFEST.json", '{"files": {"sha'), "pairs/MANIFEST.json: .*damaged",
    ),
    "empty manifest": ("asymdpo", {}, rewrite("pairs/MANIFEST.json", ""), "pairs/MANIFEST.json: .*damaged"),
    "manifest of something else": (
        "asymdpo", {}, rewrite("pairs/MANIFEST.json", "[1, 2]"), "pairs/MANIFEST.json: .*damaged",
    ),
    "manifest without sizes": (
        "asymdpo", {}, rewrite("pairs/MANIFEST.json", '{"files": {"rejects.jsonl": 3}}'),
        "pairs/MANIFEST.json: .*damaged",
    ),
    "shard cut short": (
        "sft", {}, lambda r: cut(r / "shards/shard-00000.safetensors"),
        "shard-00000.safetensors: expected .* bytes, got",
    ),
    "shard with a flipped bit": (
        "sft", {}, lambda r: flip_bit(r / "shards/shard-00001.safetensors"), "shard-00001.safetensors: .*damaged",
    ),
    "pairs with a flipped bit": (
        "asymdpo", {}, lambda r: flip_bit(r / "pairs/shard-00001.safetensors"), "shard-00001.safetensors: .*damaged",
    ),
    "shard is gone": ("sft", {}, remove("shards/shard-00001.json"), "shard-00001.json: .*no such file"),
    "weights with a flipped bit": (
        "sft", {}, lambda r: flip_bit(r / "base/diffusion_pytorch_model.safetensors"), "base.*damaged",
    ),
    "LoRA with a flipped bit": (
        "asymdpo", {}, lambda r: flip_bit(r / "sft/lora.safetensors"), "sft/lora.safetensors: .*damaged",
    ),
    "damaged run.json": (
        "sft", {}, lambda r: ((r / "sft").mkdir(), (r / "sft/run.json").write_text('{"stage":')), "run.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_named(name, chain, tmp_path):
    """Each ends in a UserError that names the option or the file, and leaves nothing that passes for a result."""
    to_run, changes, harm, words = CASES[name]
    needed = [n for n in EVERYTHING if n != to_run]
    root = copy(chain, tmp_path, *needed)
    if harm:
        harm(root)
    with pytest.raises(UserError, match=words) as caught:
        run_stage(root, to_run, **changes)
    one_line(caught.value)
    assert not (root / to_run / "MANIFEST.json").exists() and not list(root.glob(f"{to_run}/*.safetensors"))


@pytest.mark.parametrize(
    "to_run, wrong", [("pairs", dict(n1_max=12)), ("sft", dict(split="test")), ("eval", dict(sweep_clips=1000))]
)
def test_a_mended_mistake_is_accepted(to_run, wrong, chain, tmp_path):
    """After a refused command the right one works in the same folder: the mistake did not claim it."""
    with pytest.raises(UserError):
        run_stage(chain, to_run, out=str(tmp_path / "out"), **wrong)
    run_stage(chain, to_run, out=str(tmp_path / "out"))


# ---- folders of videos -----------------------------------------------------------------------------------------------


def videos(chain, folder: Path, rows: list[dict], clips: int = 3) -> Path:
    """A folder with some good clips, and metadata.csv with their rows and then `rows`."""
    folder.mkdir()
    good = []
    for row in list(csv.DictReader(open(chain / "clips" / "metadata.csv", encoding="utf-8")))[:clips]:
        (folder / row["video"]).write_bytes((chain / "clips" / row["video"]).read_bytes())
        good.append({"video": row["video"], "caption": row["caption"]})
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, ["video", "caption"])
        writer.writeheader()
        writer.writerows(good + rows)
    return folder


def shards(folder: Path, **changes):
    prepare.main(prepare.Config(videos=str(folder), out=str(folder.parent / "out"), workers=1, **changes))


ROWS = {
    "parent": ("../secret.mp4", "a ball", "leaves the folder"),
    "absolute": ("/etc/hostname.mp4", "a ball", "leaves the folder"),
    "link": ("link.mp4", "a ball", "leaves the folder"),
    "no name": ("", "a ball", "names no video"),
    "twice": ("ball-00000.mp4", "a ball", "listed twice"),
    "empty caption": ("more.mp4", "", "caption is empty"),
    "blank caption": ("more.mp4", " \t", "caption is empty"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row_stops_the_run_or_is_rejected(name, chain, tmp_path, monkeypatch):
    """By its number, name and reason; with --bad_rows reject the run goes on and the row stands in rejects.jsonl.

    No file outside the folder is opened, not for the contact sheet either.
    """
    video, caption, words = ROWS[name]
    opened, read = [], prepare.video.Decoder.read
    monkeypatch.setattr(
        prepare.video.Decoder, "read", lambda *args, **more: opened.append(args[1]) or read(*args, **more)
    )
    folder = videos(chain, tmp_path / "videos", [{"video": video, "caption": caption}])
    secret = tmp_path / "secret.mp4"
    secret.write_bytes((folder / "ball-00000.mp4").read_bytes())
    (folder / "link.mp4").symlink_to(secret)
    with pytest.raises(UserError, match=f"metadata.csv row 4 .*{words}") as caught:
        shards(folder)
    one_line(caught.value)
    assert not (tmp_path / "out").exists()
    shards(folder, bad_rows="reject")
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert len(rejects) == 1 and rejects[0]["video"] == video and words in rejects[0]["reason"]
    assert len(data.Shards(tmp_path / "out", "prepare.py")) == 3
    assert len(opened) >= 6 and all(path.resolve().is_relative_to(folder) for path in opened)


def empty(folder):
    folder.mkdir()


def write(name, text, encoding="utf-8"):
    def make(folder):
        folder.mkdir()
        (folder / name).write_text(text, encoding=encoding)

    return make


FOLDERS = {
    "missing": (lambda folder: None, "no such folder"),
    "a file": (lambda folder: folder.write_text("x"), "a file"),
    "empty": (empty, "found none"),
    "other files": (write("notes.doc", "x"), "found none"),
    "csv without captions": (write("metadata.csv", "video,text\na.mp4,ball\n"), "expected the columns video,caption"),
    "csv without rows": (write("metadata.csv", "video,caption\n"), "found none"),
    "csv that is not text": (write("metadata.csv", "video,caption\né.mp4,ball\n", "latin-1"), "UTF-8"),
    "jsonl that is not json": (
        write("metadata.jsonl", '{"video": "a.mp4", "caption": "x"}\nhello\n'), "metadata.jsonl line 2",
    ),
    "jsonl row without a caption": (
        write("metadata.jsonl", '{"video": "a.mp4", "caption": "x"}\n{"video": "b.mp4"}\n'),
        "metadata.jsonl.* 2.*caption",
    ),
    "jsonl row that is a list": (
        write("metadata.jsonl", '{"video": "a.mp4", "caption": "x"}\n[1]\n'), "metadata.jsonl.* 2",
    ),
    "jsonl that is not text": (write("metadata.jsonl", '{"video": "é.mp4", "caption": "x"}\n', "latin-1"), "UTF-8"),
    "no usable video": (
        write("metadata.csv", "video,caption\na.mp4,ball\nb.mp4,ball\n"), "found none of 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_none_of_videos(name, tmp_path):
    """Each ends in one line that says what was expected of the folder and what is there."""
    make, words = FOLDERS[name]
    make(tmp_path / "videos")
    with pytest.raises(UserError, match=words) as caught:
        shards(tmp_path / "videos")
    one_line(caught.value)
    assert not (tmp_path / "out" / "MANIFEST.json").exists()


def test_a_caption_file_that_is_not_text(chain, tmp_path):
    folder = videos(chain, tmp_path / "videos", [])
    (folder / "metadata.csv").unlink()
    for clip in folder.glob("*.mp4"):
        clip.with_suffix(".txt").write_text("a ball")
    (folder / "ball-00001.txt").write_text("une boule dorée", encoding="latin-1")
    with pytest.raises(UserError, match="ball-00001.*UTF-8"):
        shards(folder)


# ---- as a user sees it -----------------------------------------------------------------------------------------------


def test_scripts_end_in_one_line_and_code_2(chain, tmp_path):
    """As programs: nothing but the line on stderr, no traceback, exit code 2."""
    commands = [
        [str(ROOT / "prepare.py"), "--videos", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")],
        command_line("asymdpo", stage(chain, "asymdpo", out=str(tmp_path / "out"), pairs=str(tmp_path))[1]),
        command_line("pairs", stage(chain, "pairs", seed=5)[1]),
        [str(ROOT / "sample.py"), "--prompt", " "],
    ]
    for words in commands:
        done = script(*words)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stdout == ""


def test_an_interrupt_says_how_to_go_on(monkeypatch, capsys):
    """Ctrl-C is no crash: one line, exit code 130."""

    def main(cfg):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["world.py"])
    with pytest.raises(SystemExit) as caught:
        common.run(main, world.Config, "")
    assert caught.value.code == 130 and "run the same command again" in capsys.readouterr().err


# ---- a full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [0, 1, 2, 5])
@pytest.mark.parametrize("name", ["sft", "pairs"])
def test_a_full_disk_loses_nothing(name, call, chain, tmp_path, monkeypatch, capsys):
    """The disk fills up at some write: one line, exit code 2; with space again the run ends like any other."""
    changes = dict(out=str(tmp_path / "out")) | (dict(steps=4, save_every=1) if name == "sft" else {})
    main, cfg = stage(chain, name, **changes)
    calls, original = [0], os.fsync

    def full(handle):
        calls[0] += 1
        if calls[0] > call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(handle)

    monkeypatch.setattr(sys, "argv", command_line(name, cfg))
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(os, "fsync", full)
        common.run(main, type(cfg), "")
    said = capsys.readouterr().err
    assert caught.value.code == 2 and "error: disk full" in said and "Traceback" not in said
    assert f"writing {tmp_path / 'out'}" in said, "it must name the file"
    assert not (tmp_path / "out" / "MANIFEST.json").exists()
    assert not list((tmp_path / "out").rglob("*.tmp")), "half-written files are left"
    main(cfg)
    monkeypatch.undo()
    expected = run_stage(chain, name, **{**changes, "out": str(tmp_path / "straight")})
    assert contents(tmp_path / "out") == contents(expected)


def test_a_real_full_disk(chain, tmp_path):
    """A file system of 250 KB: make_pairs fills it, keeps its whole shards, and finishes once there is room."""
    out = tmp_path / "small"
    out.mkdir()
    if os.name != "posix" or os.geteuid() != 0:
        pytest.skip("needs root, to mount a small file system")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=250k", "tmpfs", str(out)], capture_output=True).returncode:
        pytest.skip("needs a machine where a small file system can be mounted")
    try:
        main, cfg = stage(chain, "pairs", out=str(out / "pairs"))
        done = script(*command_line("pairs", cfg))
        assert done.returncode == 2, done.stderr
        line = done.stderr.splitlines()[-1]
        assert line.startswith("error: disk full writing ") and "MiB free" in line and "Traceback" not in done.stderr
        assert sum(data.shard_is_whole(out / "pairs", k) for k in range(4)) >= 1
        assert not (out / "pairs" / "MANIFEST.json").exists()
        subprocess.run(["mount", "-o", "remount,size=5m", str(out)], check=True)
        main(cfg)
        assert contents(out / "pairs") == contents(chain / "pairs")
    finally:
        subprocess.run(["umount", str(out)], check=True)

"""Interrupted runs: what was stopped, killed or damaged ends, when started again, in the bytes of a straight run."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import types
from pathlib import Path

import helpers
import pytest
import torch
from helpers import contents, copy, cut, flip_bit, metrics, refused, run_stage, some_clips, stop_at

import make_pairs
import prepare
import runtime.files
import runtime.run
import runtime.shards
from runtime.files import CHECKED, read_manifest, read_sealed, write_json, write_manifest, write_sealed, write_tensors
from runtime.group import Group
from runtime.options import UserError
from runtime.run import EVENTS, Run
from runtime.shards import Shards, shard_is_whole, write_shard

TRAINED = ("base", "sft", "continuation", "asymdpo")
SIX = dict(steps=6, save_every=2)


@pytest.fixture(scope="module")
def straight(chain, tmp_path_factory) -> Path:
    """A folder with an uninterrupted run of six steps of every training stage."""
    root = tmp_path_factory.mktemp("straight")
    for name in TRAINED:
        run_stage(chain, name, out=root / name, **SIX)
    return root


def interrupted(chain, name, out, monkeypatch, logged: int = 4):
    """Runs a stage until it has logged `logged` steps, then interrupts it."""
    with stop_at(monkeypatch, Run, "log", logged), pytest.raises(KeyboardInterrupt):
        run_stage(chain, name, out=out, **SIX)
    assert not (out / "MANIFEST.json").exists() and not list(out.glob("*.safetensors"))


@pytest.fixture(scope="module")
def stopped(chain, tmp_path_factory) -> Path:
    """A folder with sft, stopped after its fourth step. Read only."""
    root = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        interrupted(chain, "sft", root / "sft", patch)
    return root


@pytest.mark.parametrize("name", TRAINED)
def test_a_stopped_run_ends_like_a_straight_one(name, chain, straight, tmp_path, monkeypatch):
    """Weights, optimiser, order, noise and log: stopped between two checkpoints, resumed, equal bit for bit."""
    out = tmp_path / name
    interrupted(chain, name, out, monkeypatch, logged=5)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-0000002", "step-0000004"]
    run_stage(chain, name, out=out, **SIX)
    assert contents(out) == contents(straight / name)
    assert [row["step"] for row in metrics(out)] == [1, 2, 3, 4, 5, 6]
    assert not (out / "checkpoints").exists()


@pytest.mark.parametrize("logged", [(1,), (3, 3)], ids=["before the first checkpoint", "twice"])
def test_stopped_early_or_twice(logged, chain, straight, tmp_path, monkeypatch):
    """Without a checkpoint it starts anew, and no line logged before stays; a resumed run resumes again."""
    for steps in logged:
        interrupted(chain, "sft", tmp_path / "sft", monkeypatch, steps)
    run_stage(chain, "sft", out=tmp_path / "sft", **SIX)
    assert contents(tmp_path / "sft") == contents(straight / "sft")


def test_all_of_the_state_goes_to_the_parameters_device():
    """Fused AdamW on a GPU refuses a step that was left on the CPU; the meta device stands for the GPU."""
    there = {"w": torch.nn.Parameter(torch.ones(3))}
    optimizer = torch.optim.AdamW(there.values(), fused=True)
    there["w"].sum().backward()
    optimizer.step()
    state = runtime.run._pack(there, optimizer)
    here = {"w": torch.nn.Parameter(torch.ones(3, device="meta"))}
    resumed = torch.optim.AdamW(here.values())
    runtime.run._unpack(state, here, resumed)
    assert {a.device.type for a in resumed.state[here["w"]].values()} == {"meta"}
    assert resumed.state[here["w"]].keys() == optimizer.state[there["w"]].keys()


@pytest.mark.parametrize("name", helpers.STAGES)
def test_a_finished_run_does_nothing(name, chain, capsys):
    """The second call says so and touches no file."""
    before = {p: p.stat().st_mtime_ns for p in chain.rglob("*")}
    run_stage(chain, name)
    assert "finished already" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in chain.rglob("*")} == before


# ---- stages that write shards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shards", "pairs"])
def test_shards_cut_between_two_are_resumed(name, chain, tmp_path, monkeypatch):
    """prepare and make_pairs, stopped after the first shard: it is kept, all bytes are those of a straight run."""
    owner, options, straight, out = make_pairs, {}, chain / "pairs", tmp_path / "out"
    if name == "shards":
        owner, options = prepare, dict(videos=some_clips(chain, tmp_path / "clips", 6), shard_size=2)
        straight = run_stage(chain, "shards", out=tmp_path / "straight", **options)
    with stop_at(monkeypatch, owner, "write_shard", 1), pytest.raises(KeyboardInterrupt):
        run_stage(chain, name, out=out, **options)
    kept = out / "shard-00000.safetensors"
    before = kept.stat().st_mtime_ns
    assert not (out / "MANIFEST.json").exists() and len(list(out.glob("shard-*"))) == 2
    run_stage(chain, name, out=out, **options)
    assert contents(out) == contents(straight) and kept.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "harm, file", [(cut, "safetensors"), (flip_bit, "safetensors"), (cut, "json"), (Path.unlink, "json")]
)
def test_a_damaged_shard_of_an_unfinished_run_is_made_again(harm, file, chain, tmp_path, monkeypatch):
    with stop_at(monkeypatch, make_pairs, "write_shard", 1), pytest.raises(KeyboardInterrupt):
        run_stage(chain, "pairs", out=tmp_path)
    harm(tmp_path / f"shard-00000.{file}")
    run_stage(chain, "pairs", out=tmp_path)
    assert contents(tmp_path) == contents(chain / "pairs")


# ---- what is hashed, and when ----------------------------------------------------------------------------------------


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """The names of the files that are hashed from now on."""
    names, fingerprint = [], runtime.files.fingerprint

    def noted(path):
        names.append(path.name)
        return fingerprint(path)

    monkeypatch.setattr(runtime.files, "fingerprint", noted)
    return names


def test_a_file_is_hashed_once(chain, tmp_path, hashed):
    """Of a copied folder every file at the first start, none at the next; of one that a stage wrote, none at all."""
    data = copy(chain, tmp_path, "shards") / "shards"
    clips = Shards(data, "prepare.py")
    assert sorted(hashed) == sorted(clips.manifest["files"])
    hashed.clear()
    assert len(Shards(data, "prepare.py")) == len(clips) and read_manifest(data, "prepare.py") and not hashed
    pairs = run_stage(tmp_path, "pairs", **{n: chain / n for n in ("base", "continuation")}, out=tmp_path / "pairs")
    made = list(pairs.glob("shard-*.safetensors"))
    assert len(made) > 1 and all(hashed.count(path.name) == 1 for path in made)  # when it was written
    hashed.clear()
    Shards(pairs, "make_pairs.py")
    assert not hashed


def test_what_was_remembered_is_read_once(tmp_path, monkeypatch):
    """With every shard its folder's memory grows by a line, and no line before it is read again."""
    lines, loads = [], runtime.files.json.loads
    noted = lambda text: (lines.append(text), loads(text))[1]  # noqa: E731
    monkeypatch.setattr(runtime.files, "json", types.SimpleNamespace(loads=noted, dumps=runtime.files.json.dumps))
    for k in range(9):
        write_shard(tmp_path, k, [{}], {"x0": torch.zeros(1, 1)}, [torch.zeros(2, 4)], [])
    assert 0 < len(lines) <= 9
    (tmp_path / CHECKED).unlink()
    assert shard_is_whole(tmp_path, 8) and shard_is_whole(tmp_path, 8) and len(lines) <= 11


def test_few_files_stay_open(chain, monkeypatch):
    """However many shards there are: each open file is a map of memory, and a process may have 65,530."""
    clips = Shards(chain / "shards", "prepare.py")
    order = random.Random(0).sample(range(len(clips)), len(clips))
    every = clips.get("x0", order)
    files = len(clips._open)
    monkeypatch.setattr(runtime.shards, "OPEN", 2)
    clips = Shards(chain / "shards", "prepare.py")
    few = [(clips.get("x0", [i]), len(clips._open)) for i in order]
    assert torch.equal(torch.cat([x0 for x0, _ in few]), every) and max(n for _, n in few) == 2 < files


def test_processes_share_the_hashing(chain, tmp_path, monkeypatch, hashed):
    """Each file is hashed by one of three, and none takes more than a third of the bytes and a file."""
    copy(chain, tmp_path, "shards", "continuation")
    monkeypatch.setenv("WORLD_SIZE", "3")
    files, shares = read_manifest(chain / "shards", "prepare.py")["files"], []
    for rank in "012":
        monkeypatch.setenv("RANK", rank)
        (tmp_path / "shards" / CHECKED).unlink(missing_ok=True)
        hashed.clear()
        read_manifest(tmp_path / "shards", "prepare.py")
        shares.append([*hashed])
    assert sorted(sum(shares, [])) == sorted(files)
    size = [sum(files[name]["bytes"] for name in share) for share in shares]
    assert 0 < min(size) and max(size) <= max(facts["bytes"] for facts in files.values()) + sum(size) / 3
    hashed.clear()
    read_manifest(tmp_path / "continuation", "continuation.py", together=False)  # as a checkpoint, by every process
    assert "lora.safetensors" in hashed


def test_shards_of_other_splits_are_not_hashed(chain, tmp_path, hashed):
    """Damage in a shard that the stage does not read does not stop it; in one that it reads it does."""
    data = run_stage(chain, "shards", videos=some_clips(chain, tmp_path / "clips", 6), shard_size=1, out=tmp_path / "a")
    split = {row["id"]: row["split"] for row in Shards(data, "prepare.py").rows}
    assert len(set(split.values())) > 1
    (data / CHECKED).unlink(missing_ok=True)
    hashed.clear()
    kept = Shards(data, "prepare.py", "train")
    assert sum(name.endswith(".safetensors") and "shard" in name for name in hashed) == len(kept) < len(split)
    for k, of in enumerate(split.values()):
        flip_bit(data / f"shard-{k:05d}.safetensors")
        if of == "train":
            refused(f"shard-{k:05d}.safetensors: .*damaged", Shards, data, "prepare.py", "train")
            break
        Shards(data, "prepare.py", "train")


def keep_times(path: Path) -> None:
    """Damage by something that puts the time of the last change back."""
    stat = path.stat()
    flip_bit(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("harm", [flip_bit, keep_times, cut])
def test_damage_after_a_file_was_remembered_is_found(harm, chain, tmp_path):
    data = copy(chain, tmp_path, "shards") / "shards"
    Shards(data, "prepare.py")
    harm(data / "shard-00001.safetensors")
    refused("shard-00001.safetensors: .*(damaged|expected .* bytes)", Shards, data, "prepare.py")


MIXED_UP = b'{"name": "kept.png", "byt{"name"\0\n[1]\n{"name": "kept.png"}\n{"na'  # the next line is lost, too
MEMORY = {  # what becomes of a folder's memory, and how many files are hashed at the second start; None: all of them
    "it cannot be written": (lambda path: (path.unlink(), path.mkdir()), None),
    "its lines are mixed up": (lambda path: path.write_bytes(MIXED_UP), 1),
    "it came with a copy": (lambda path: None, 0),
}


@pytest.mark.parametrize("how", MEMORY)
def test_a_memory_of_no_use_is_no_harm(how, chain, tmp_path, hashed):
    """Then the files are hashed, and what is damaged is found."""
    data, (change, again) = copy(chain, tmp_path, "shards") / "shards", MEMORY[how]
    change(data / CHECKED)
    files = Shards(data, "prepare.py").manifest["files"]
    assert sorted(hashed) == sorted(files)
    hashed.clear()
    Shards(data, "prepare.py")
    assert len(hashed) == (len(files) if again is None else again)
    flip_bit(data / "shard-00001.safetensors")
    refused("shard-00001.safetensors: .*damaged", Shards, data, "prepare.py")


# ---- folders of another run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, field, value", [("sft", "lr", 0.5), ("sft", "rank", 5), ("pairs", "n1_max", 6)])
def test_a_folder_of_another_configuration_is_refused(name, field, value, chain):
    """By the name of the field and both values: results of two configurations never mix."""
    refused(f"was made with config {field} = .*, now {value}", run_stage, chain, name, **{field: value})


def test_a_folder_of_something_else_is_refused(chain, tmp_path):
    """Of another stage, or of nothing that a run wrote."""
    refused("was made with stage = 'sft', now 'continuation'", run_stage, chain, "continuation", out=chain / "sft")
    (tmp_path / "holiday.jpg").touch()
    refused("expected an empty folder or an earlier sft run", run_stage, chain, "sft", out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["holiday.jpg"]


def test_inputs_count_by_content(chain, tmp_path, capsys):
    """The same pairs in another place are the same pairs; pairs of another seed in their place are refused."""
    run_stage(chain, "asymdpo", pairs=copy(chain, tmp_path, "pairs") / "pairs")
    assert "finished already" in capsys.readouterr().out
    other = run_stage(chain, "pairs", out=tmp_path / "other", seed=1)
    refused("was made with inputs pairs", run_stage, chain, "asymdpo", pairs=other)


def test_options_without_effect_may_change(chain, straight, stopped, tmp_path):
    """save_every and micro_batch change no result's meaning: a run may go on with others."""
    copy(stopped, tmp_path, "sft")
    run_stage(chain, "sft", out=tmp_path / "sft", **{**SIX, "save_every": 3, "micro_batch": 4})
    assert contents(tmp_path / "sft") == contents(straight / "sft")


# ---- whose folder it is ----------------------------------------------------------------------------------------------


def test_one_command_at_a_time(chain, tmp_path, monkeypatch):
    """A folder that a living process writes, of another start or left over from a killed one, is refused; then not."""
    out = tmp_path / "run"
    code = "import sys, fcntl; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, fcntl.LOCK_SH); print(flush=True); input()"
    with stop_at(monkeypatch, make_pairs, "write_shard", 1), pytest.raises(KeyboardInterrupt):
        run_stage(chain, "pairs", out=out)
    other = [sys.executable, "-c", code, str(out / ".lock")]
    with subprocess.Popen(other, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        refused("another command is writing it", run_stage, chain, "pairs", out=out)
        process.communicate(b"\n")
    assert contents(run_stage(chain, "pairs", out=out)) == contents(chain / "pairs")


def test_what_other_draws_began_is_not_gone_on_with(chain, tmp_path):
    """A half-made folder of a version with other random draws is refused; a finished one is finished."""
    out = run_stage(chain, "pairs", out=tmp_path / "run")
    facts = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({key: facts[key] for key in facts if key not in ("draws", "seal")}))
    run_stage(chain, "pairs", out=out)
    (out / "MANIFEST.json").unlink()
    refused("was begun with another version of this program", run_stage, chain, "pairs", out=out)


def test_a_folder_that_cannot_be_written(chain, tmp_path, monkeypatch):
    (tmp_path / "mine" / ".lock").mkdir(parents=True)  # another user's file would be as closed to us
    with pytest.raises(OSError, match=r"mine/\.lock"):
        run_stage(chain, "pairs", out=tmp_path / "mine")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    refused("--out: expected a folder to write, .* cannot be written", run_stage, chain, "pairs", out=tmp_path / "run")


def test_one_of_two_that_start_together(chain, tmp_path, monkeypatch):
    """The second finds no run.json yet when it looks, but the first's when it has the lock: what it wants is compared
    again; and a folder that was finished meanwhile is left alone.
    """
    second = Run(helpers.stage(chain, "sft", out=tmp_path / "run", seed=1)[1], "sft", Group())
    third = Run(helpers.stage(chain, "sft", out=tmp_path / "run")[1], "sft", Group())
    Run(helpers.stage(chain, "sft", out=tmp_path / "run")[1], "sft", Group()).claim()
    refused("was made with config seed = 0, now 1", second.claim)
    (tmp_path / "run" / "MANIFEST.json").touch()
    refused("another command has finished it", third.claim)


@pytest.mark.parametrize("again", [False, True], ids=["deleted", "replaced"])
@pytest.mark.parametrize("name, owner, call", [("sft", Run, "log"), ("pairs", make_pairs, "write_shard")])
def test_a_folder_that_is_deleted_under_its_run(name, owner, call, again, chain, tmp_path, monkeypatch):
    """The run ends at its next step or shard, and does not make the folder anew."""
    out, original, calls = tmp_path / "out", getattr(owner, call), iter(range(9))

    def deleting(*args, **kwargs):
        if next(calls) == 1:
            shutil.rmtree(out)
            if again:
                out.mkdir()
                (out / ".lock").touch()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, call, deleting)
    options = dict(steps=6) if name == "sft" else dict(shard_size=1)
    with pytest.raises((UserError, FileNotFoundError)) as caught:
        run_stage(chain, name, out=out, **options)
    assert "deleted or replaced" in str(caught.value) or str(out) in caught.value.filename
    assert out.exists() == again and next(calls) == 2


def test_what_a_kill_leaves_is_swept(chain, straight, tmp_path):
    """A folder with nothing but temporaries is empty; they are gone when a run goes on, not when it ends."""
    for name in (".run.json.17.tmp", ".tmpMHNqGM", ".lock"):
        (tmp_path / name).write_bytes(b"half")
    with pytest.MonkeyPatch.context() as patch:
        interrupted(chain, "sft", tmp_path, patch, logged=0)
    assert {p.name for p in tmp_path.iterdir()} - {p.name for p in tmp_path.glob(EVENTS)} == {".lock", "run.json"}
    run_stage(chain, "sft", out=tmp_path, **SIX)
    (tmp_path / "checkpoints").mkdir()
    run_stage(chain, "sft", out=tmp_path, **SIX)
    assert contents(tmp_path) == contents(straight / "sft") and not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("file", ["run.json", "checkpoints/step-0000004/MANIFEST.json", "shard-00000.json"])
def test_a_flipped_bit_in_what_is_believed_is_seen(file, chain, stopped, tmp_path):
    """Each of 40 places, keys and digits among them."""
    folder = copy(stopped, tmp_path, "sft") / "sft" if "shard" not in file else copy(chain, tmp_path, "pairs") / "pairs"
    path = folder / file
    raw = path.read_bytes()
    for at in range(0, len(raw) - 1, len(raw) // 40):
        changed = raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :]
        if changed.split() != raw.split():  # not white space for white space
            path.write_bytes(changed)
            refused("damaged", read_sealed, path)


def test_inputs_are_spelled_as_one_likes(chain, tmp_path, monkeypatch, capsys):
    """A folder with a slash, from another directory, absolute, or moved, is the same folder."""
    copy(chain, tmp_path, "base", "shards")
    monkeypatch.chdir(tmp_path)
    for base in ("base", "base/", "./base", str(tmp_path / "base"), "moved"):
        if base == "moved":
            (tmp_path / "base").rename(base)
        run_stage(tmp_path, "sft", base=base, out=tmp_path / "sft")
    assert capsys.readouterr().out.count("finished already") == 4


def test_a_shard_that_is_cut_under_a_run(chain, tmp_path):
    """One line with its name: to read on in a mapped file that was cut would end the process without a word."""
    clips = Shards(copy(chain, tmp_path, "shards") / "shards", "prepare.py")
    clips.get("x0", [0])
    cut(tmp_path / "shards" / "shard-00000.safetensors")
    refused("^[^:]*shard-00000.safetensors: expected [0-9]+ bytes as before.*under this run$", clips.get, "x0", [0])


LIES = {  # what a shard's rows and tensors say, whose manifest fits: others may have made it
    "more rows than tensors": dict(rows=[{"id": "a"}, {"id": "b"}]),
    "no rows": dict(rows=7),
    "no such tensor": dict(tensors={"y": torch.zeros(1, 2)}),
    "text that ends early": dict(tensors={"x0": torch.zeros(1, 2), "text_start": torch.tensor([0, 9])}),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_shard_that_lies_is_named(lie, tmp_path):
    text = {"text": torch.zeros(2, 4), "text_start": torch.tensor([0, 2])}
    facts = {"rows": [{"id": "a"}], "tensors": {"x0": torch.zeros(1, 2)}} | LIES[lie]
    write_tensors(tmp_path / "shard-00000.safetensors", text | facts["tensors"])
    write_json(tmp_path / "shard-00000.json", {"rows": facts["rows"]})
    write_manifest(tmp_path, ["shard-00000.safetensors", "shard-00000.json"], stage="prepare")

    def read():
        clips = Shards(tmp_path, "prepare.py")
        index = range(len(clips))
        return clips.get("x0", index), clips.text(index)

    refused("shard-00000.(safetensors|json): expected", read)


FACTS = {"bytes": 0, "sha256": ""}  # of a file, in a manifest


@pytest.mark.parametrize("name", ["../canary", "/etc/hostname", "link.txt"])
def test_a_manifest_names_files_of_its_folder_alone(name, chain, tmp_path):
    folder = copy(chain, tmp_path, "base") / "base"
    (tmp_path / "canary").touch()
    (folder / "link.txt").symlink_to(tmp_path / "canary")
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    manifest["files"][name] = FACTS
    del manifest["seal"]
    write_sealed(folder / "MANIFEST.json", manifest)
    refused("leaves the folder", read_manifest, folder, "sft.py")


def test_a_manifest_of_nonsense(tmp_path):
    for facts, words in (({"stage": 5, "files": {}}, "made by 5"), ({"files": {"x" * 300: FACTS}}, "no such file")):
        (tmp_path / "MANIFEST.json").write_text(json.dumps(facts))
        refused(words, read_manifest, tmp_path, "sft.py")


def test_file_systems_that_know_less(tmp_path, monkeypatch):
    """No sync of folders, no modes: what is written is whole all the same. Other errors are errors."""
    for name, code in (("fsync", errno.EINVAL), ("fsync", errno.ENOTSUP), ("chmod", errno.EPERM)):
        with stop_at(monkeypatch, os, name, 0, OSError(code, os.strerror(code))):
            write_json(tmp_path / "a.json", {})
        assert (tmp_path / "a.json").read_text() == "{}\n"
    with stop_at(monkeypatch, os, "fsync", 0, OSError(errno.EIO, "")), pytest.raises(OSError):
        write_json(tmp_path / "b.json", {})
    assert not (tmp_path / "b.json").exists()

"""Interrupted runs: what was stopped, killed or damaged ends, when started again, in the bytes of a straight run."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import command_line, contents, copy, cut, environment, flip_bit, metrics, run_stage, stage, stop_at

from runtime import run as common
from runtime import shards as data
from runtime.run import UserError

TRAINED = ("sft", "continuation", "asymdpo")
SIX = dict(steps=6, save_every=2)


@pytest.fixture(scope="module")
def straight(chain, tmp_path_factory) -> Path:
    """A folder with an uninterrupted run of six steps of every training stage."""
    root = tmp_path_factory.mktemp("straight")
    for name in TRAINED:
        run_stage(chain, name, out=str(root / name), **SIX)
    return root


def interrupted(chain, name, out, monkeypatch, logged: int = 4, **changes):
    """Runs a stage until it has logged `logged` steps, then interrupts it."""
    with stop_at(monkeypatch, common.Run, "log", logged), pytest.raises(KeyboardInterrupt):
        run_stage(chain, name, out=str(out), **{**SIX, **changes})
    assert not (out / "MANIFEST.json").exists() and not (out / "lora.safetensors").exists()


@pytest.mark.parametrize("name", TRAINED)
def test_a_stopped_run_ends_like_a_straight_one(name, chain, straight, tmp_path, monkeypatch):
    """Weights, optimiser, order, noise and log: stopped between two checkpoints, resumed, equal bit for bit."""
    interrupted(chain, name, tmp_path / name, monkeypatch, logged=5)
    assert sorted(p.name for p in (tmp_path / name / "checkpoints").iterdir()) == ["step-0000002", "step-0000004"]
    run_stage(chain, name, out=str(tmp_path / name), **SIX)
    assert contents(tmp_path / name) == contents(straight / name)
    assert [row["step"] for row in metrics(tmp_path / name)] == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / name / "checkpoints").exists()


def test_all_weights_resume(chain, tmp_path, monkeypatch):
    """Training from scratch, every weight: its checkpoint must hold them all."""
    run_stage(chain, "base", out=str(tmp_path / "straight"), **SIX)
    with stop_at(monkeypatch, common.Run, "log", 3), pytest.raises(KeyboardInterrupt):
        run_stage(chain, "base", out=str(tmp_path / "base"), **SIX)
    run_stage(chain, "base", out=str(tmp_path / "base"), **SIX)
    assert contents(tmp_path / "base") == contents(tmp_path / "straight")


def test_a_run_stopped_before_its_first_checkpoint_starts_anew(chain, straight, tmp_path, monkeypatch):
    """No line logged before may stay: step 1 once, not twice."""
    interrupted(chain, "sft", tmp_path / "sft", monkeypatch, logged=1)
    run_stage(chain, "sft", out=str(tmp_path / "sft"), **SIX)
    assert contents(tmp_path / "sft") == contents(straight / "sft")


def test_stopped_twice(chain, straight, tmp_path, monkeypatch):
    """A resumed run that is stopped again resumes again."""
    for _ in range(2):
        interrupted(chain, "asymdpo", tmp_path / "run", monkeypatch, logged=2 + 1)
    run_stage(chain, "asymdpo", out=str(tmp_path / "run"), **SIX)
    assert contents(tmp_path / "run") == contents(straight / "asymdpo")


def test_a_process_killed_at_any_moment_ends_like_a_straight_run(chain, tmp_path):
    """kill -9 of a real process, at another moment each time this test runs."""
    changes = dict(steps=40, save_every=3, out=str(tmp_path / "killed"))
    main, cfg = stage(chain, "asymdpo", **changes)
    child = subprocess.Popen(
        [sys.executable, *command_line("asymdpo", cfg)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        log, lines = tmp_path / "killed" / "metrics.jsonl", random.randint(3, 25)
        deadline = time.time() + 120
        while (
            time.time() < deadline
            and child.poll() is None
            and (not log.exists() or log.read_bytes().count(b"\n") < lines)
        ):
            time.sleep(0.005)
        time.sleep(random.random() * 0.1)
    finally:
        os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (tmp_path / "killed" / "MANIFEST.json").exists()
    main(cfg)
    straight = run_stage(chain, "asymdpo", **{**changes, "out": str(tmp_path / "straight")})
    assert contents(tmp_path / "killed") == contents(straight), f"killed after {lines} lines"


DAMAGE = {
    "cut short": lambda step: cut(step / "state.safetensors"),
    "flipped bit": lambda step: flip_bit(step / "state.safetensors"),
    "state gone": lambda step: (step / "state.safetensors").unlink(),
    "manifest gone": lambda step: (step / "MANIFEST.json").unlink(),
    "manifest cut": lambda step: cut(step / "MANIFEST.json"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(how, chain, straight, tmp_path, monkeypatch, capsys):
    """The newest checkpoint is damaged: it says so, goes on from the one before, and ends in the same bytes."""
    interrupted(chain, "asymdpo", tmp_path / "run", monkeypatch)
    DAMAGE[how](tmp_path / "run" / "checkpoints" / "step-0000004")
    capsys.readouterr()
    run_stage(chain, "asymdpo", out=str(tmp_path / "run"), **SIX)
    said = capsys.readouterr().err
    assert "damaged checkpoint" in said and "step-0000004" in said
    assert contents(tmp_path / "run") == contents(straight / "asymdpo")


def test_two_damaged_checkpoints_start_anew(chain, straight, tmp_path, monkeypatch, capsys):
    interrupted(chain, "sft", tmp_path / "sft", monkeypatch)
    for step in (tmp_path / "sft" / "checkpoints").iterdir():
        flip_bit(step / "state.safetensors")
    run_stage(chain, "sft", out=str(tmp_path / "sft"), **SIX)
    assert capsys.readouterr().err.count("damaged checkpoint") == 2
    assert contents(tmp_path / "sft") == contents(straight / "sft")


def test_half_a_checkpoint_is_none(chain, straight, tmp_path, monkeypatch):
    """Stopped while a checkpoint was written: what is there of it is not taken for one."""
    with stop_at(monkeypatch, common, "write_manifest", 1), pytest.raises(KeyboardInterrupt):
        run_stage(chain, "sft", out=str(tmp_path / "sft"), **SIX)
    assert (tmp_path / "sft" / "checkpoints" / ".step-0000004.tmp" / "state.safetensors").exists()
    run_stage(chain, "sft", out=str(tmp_path / "sft"), **SIX)
    assert contents(tmp_path / "sft") == contents(straight / "sft")


@pytest.mark.parametrize("name", ["shards", "sft", "pairs", "asymdpo", "eval"])
def test_a_finished_run_does_nothing(name, chain, tmp_path, capsys):
    """The second call says so and touches no file."""
    root = copy(chain, tmp_path, *("clips", "shards", "base", "sft", "continuation", "pairs", "asymdpo", "eval"))
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    # prepare's folder is an option that makes the result, so it is asked for where the chain's was
    run_stage(root, name, **({"videos": str(chain / "clips")} if name == "shards" else {}))
    assert "finished already" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before


# ---- stages that write shards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, size", [("shards", 30), ("pairs", 4)])
def test_shards_cut_between_two_are_resumed(name, size, chain, tmp_path, monkeypatch):
    """prepare and make_pairs, stopped after the first shard: it is kept, all bytes are those of a straight run."""
    with stop_at(monkeypatch, data, "write_shard", 1), pytest.raises(KeyboardInterrupt):
        run_stage(chain, name, out=str(tmp_path / "out"), shard_size=size)
    kept = tmp_path / "out" / "shard-00000.safetensors"
    before = kept.stat().st_mtime_ns
    assert not (tmp_path / "out" / "MANIFEST.json").exists() and len(list((tmp_path / "out").glob("shard-*"))) == 2
    run_stage(chain, name, out=str(tmp_path / "out"), shard_size=size)
    assert contents(tmp_path / "out") == contents(chain / name)
    assert kept.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "harm, file", [(cut, "safetensors"), (flip_bit, "safetensors"), (cut, "json"), (Path.unlink, "json")]
)
def test_a_damaged_shard_of_an_unfinished_run_is_made_again(harm, file, chain, tmp_path, monkeypatch):
    with stop_at(monkeypatch, data, "write_shard", 1), pytest.raises(KeyboardInterrupt):
        run_stage(chain, "pairs", out=str(tmp_path / "out"))
    harm(tmp_path / "out" / f"shard-00000.{file}")
    run_stage(chain, "pairs", out=str(tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(chain / "pairs")


# ---- folders of another run ------------------------------------------------------------------------------------------

CHANGES = [
    ("sft", "lr", 0.5),
    ("sft", "seed", 1),
    ("asymdpo", "beta", 26.0),
    ("pairs", "n1_max", 6),
    ("continuation", "rank", 5),
]


@pytest.mark.parametrize("name, field, value", CHANGES)
def test_a_folder_of_another_configuration_is_refused(name, field, value, chain):
    """By the name of the field and both values: results of two configurations never mix."""
    with pytest.raises(UserError, match=f"was made with config {field} = .*, now {value}"):
        run_stage(chain, name, **{field: value})


def test_a_folder_of_another_stage_is_refused(chain):
    with pytest.raises(UserError, match="was made with stage = 'sft', now 'continuation'"):
        run_stage(chain, "continuation", out=str(chain / "sft"))


def test_a_folder_of_something_else_is_refused(chain, tmp_path):
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(UserError, match="expected an empty folder or an earlier sft run"):
        run_stage(chain, "sft", out=str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["holiday.jpg"]


def test_changed_inputs_are_refused(chain, tmp_path):
    """Pairs made anew with another seed: the run that began on the old ones does not go on."""
    root = copy(chain, tmp_path, "shards", "base", "sft", "continuation", "asymdpo")
    run_stage(root, "pairs", seed=1)
    with pytest.raises(UserError, match="was made with inputs pairs"):
        run_stage(root, "asymdpo")


def test_moved_inputs_are_accepted(chain, tmp_path, capsys):
    """Inputs count by content: the same pairs in another place are the same pairs."""
    root = copy(chain, tmp_path, "base", "sft", "pairs", "asymdpo")
    run_stage(root, "asymdpo")
    assert "finished already" in capsys.readouterr().out


def test_options_without_effect_may_change(chain, straight, tmp_path, monkeypatch):
    """save_every and micro_batch change no result's meaning: a run may go on with others."""
    interrupted(chain, "sft", tmp_path / "sft", monkeypatch)
    run_stage(chain, "sft", out=str(tmp_path / "sft"), **{**SIX, "save_every": 3, "micro_batch": 4})
    assert contents(tmp_path / "sft") == contents(straight / "sft")

"""How scripts end: by signals, by a process that hangs or dies, by a disk; and which of these torchrun tries again."""

import errno
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist
from helpers import ROOT, refused, script

from runtime import roll
from runtime.group import start_group
from runtime.options import Diverged, Interrupted, UserError, asked_to_stop, patient, program, user_errors
from tiny import balls


def ends(monkeypatch, capsys, main) -> tuple[int, str]:
    """The exit code and the error output of a program."""
    monkeypatch.setattr(sys, "argv", ["balls"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & may have switched it off
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.raises(SystemExit) as caught:
        program(main, balls.Config, "")
    assert before == {number: signal.getsignal(number) for number in before}, "handlers are left"
    return caught.value.code, capsys.readouterr().err


def raising(error: BaseException):
    def main(_):
        raise error

    return main


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals(number, monkeypatch, capsys):
    """The first one ends a program at once; a patient one when it has asked. The second ends it wherever it is."""
    left, again = [], "interrupted: run the same command again"
    monkeypatch.setattr(os, "_exit", left.append)
    code, said = ends(monkeypatch, capsys, lambda _: signal.raise_signal(number))
    assert code == 128 + number and said.startswith(again) and not left

    def train(_):
        with patient():
            assert not asked_to_stop()
            signal.raise_signal(number)
            assert asked_to_stop() == number
            os.kill(os.getpid(), number)
            end = time.monotonic() + 5
            while not left and time.monotonic() < end:
                time.sleep(0.01)
            raise Interrupted(asked_to_stop())

    code, said = ends(monkeypatch, capsys, train)
    assert code == 128 + number and again in said and left == [128 + number]


def test_every_end_is_a_line(monkeypatch, capsys, tmp_path):
    """A file's error, whatever it is, names the file. A full disk tells the space of no other disk than the file's."""
    gone = tmp_path / "gone" / "metrics.jsonl"
    cases = [
        (UserError("bad"), 2, "error: bad"),
        (Diverged("not finite"), 3, "error: not finite"),
        (roll.Lost("rank 1 ended"), 4, "error: rank 1 ended"),
        (OSError(errno.ENOSPC, "No space left on device", str(gone)), 2, f"error: disk full writing {gone}; free some"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: disk full; free some"),  # which, it does not say
        (OSError(errno.EDQUOT, "Disk quota exceeded", str(tmp_path / "a")), 2, f"disk full writing {tmp_path}/a: "),
    ]
    for number in (errno.ENOENT, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ESTALE, errno.EIO):
        error = OSError(number, os.strerror(number), str(gone))
        cases.append((error, 2, f"error: {gone}: {os.strerror(number).lower()}; see that its folder is there"))
    for error, expected, text in cases:
        code, said = ends(monkeypatch, capsys, raising(error))
        assert code == expected and text in said and said.count("\n") == 1, said
    monkeypatch.setattr(sys, "argv", ["balls"])
    for bug in (KeyError("a bug"), OSError(errno.EBADF, "a bug that names no file"), RuntimeError("a bug")):
        with pytest.raises(type(bug)):
            program(raising(bug), balls.Config, "")
    with pytest.raises(UserError, match="too deep"), user_errors():
        raise RecursionError("too deep")


def test_nonsense_for_torchruns_variables(monkeypatch):
    for values, text in (
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x: expected a whole number"),
        ({"RANK": "-1"}, "RANK=-1: expected a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2: expected less than WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2"}, "expected torchrun to start 2 processes, got"),  # nobody says where they meet
    ):
        with monkeypatch.context() as patch:
            for name, value in values.items():
                patch.setenv(name, value)
            refused(text, start_group)


def test_a_start_is_not_taken_for_the_one_before():
    """What those wrote who died meets nobody. Who does not come is named."""
    store = dist.HashStore()
    store.set("hello 1", "dead")
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda rank: roll._of_this_start(store, rank, 2, 5.0), range(2))
    one.set("address", "new")
    assert other.get("address") == b"new" and not store.check(["address"])
    with pytest.raises(roll.Lost, match="waited 0.1 s for rank 1 to start"):
        roll._of_this_start(store, 0, 2, 0.1)


# three processes, two starts: in each, something else happens to rank 1
WORKER = f"""
import dataclasses, os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch
from runtime import roll
from runtime.group import start_group
from runtime.options import Interrupted, asked_to_stop, patient, program

start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])

@dataclasses.dataclass(frozen=True)
class Config:
    out: str = ""

def main(cfg):
    group = start_group(step_timeout=2.0)
    if start == 0:
        roll.FIRST_WORD = 0.5
        group.mesh
        time.sleep(3 * group.main)  # longer than a step may take
        assert group.from_node_main("a shard" if group.main else None) == "a shard"
        time.sleep(60 * (group.rank == 1))
        group.meet("step 0")
    group.wait()
    with patient():
        for step in range(3):
            if step == 1 and group.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            group.meet(f"step {{step}}")
            if told := group.sum({{"told": torch.tensor(asked_to_stop())}})["told"]:
                os.write(1, f"saved {{group.rank}} {{step}}\\n".encode())  # whole, where print mixes with the others'
                raise Interrupted(int(told))

program(main, Config, "")
"""


def test_processes_that_hang_are_named(tmp_path):
    """One that sleeps for longer than a step may take is named by all, and torchrun starts all again. A signal to one
    process ends all after a step, and is not tried again. Long waits for other work end in nothing but a word.
    """
    (tmp_path / "worker.py").write_text(WORKER, encoding="utf-8")
    words = "--standalone", "--nproc_per_node", "3", "--max_restarts", "3"
    done = script("-m", "torch.distributed.run", *words, str(tmp_path / "worker.py"))
    *said, last = [line for line in done.stderr.splitlines() if line.startswith("[rank ")]
    assert said and all("error: step 0: waited 2 s for rank 1, stopped, stuck or slow" in line for line in said), said
    assert last.startswith("[rank 0] interrupted: run the same command again"), done.stderr
    assert sorted(done.stdout.split("\n")) == ["", "saved 0 1", "saved 1 1", "saved 2 1"] and done.returncode
    assert "sharing out work: waiting since" in done.stderr and "for rank 0\n" in done.stderr

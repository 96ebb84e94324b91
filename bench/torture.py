"""Kills, signals, full disks, damage, NaN and hostile files against the real commands: what was tried, held and lost.

    python -m bench.torture                          every row; writes docs/reliability.md; exit code 1 if a case is lost
    python -m bench.torture --rows C1,N1 --share 0.1          a tenth of the cases of two rows; prints, writes nothing

A row is a function of the smallest chain of stages, an empty folder, the share of its cases to try, and a seed. Commands
run in forked processes, so that a kill costs 0.2 s and not the seconds of an import: sys.argv, `program`, exit codes and
what is printed are the command's own, and several processes meet by gloo as under torchrun. Some rows start torchrun.
"""

import argparse
import contextlib
import dataclasses
import functools
import http.server
import json
import math
import multiprocessing
import os
import pickle
import platform
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import helpers
import hostile
import matplotlib.figure  # noqa: F401  before the forks, which else import it one by one
import torch
import tqdm
from helpers import SMALLEST, contents, copy, some_clips
from safetensors.torch import load_file, save_file

import asymdpo
import flow
import sft
from runtime import video
from runtime.files import commit, fingerprint, write_manifest
from runtime.group import Group
from runtime.options import program
from runtime.run import Run
from runtime.shards import Shards, micro_batches
from wan.checkpoint import Checkpoint

TRAINED = ("base", "sft", "continuation", "asymdpo")
NAN, LIMIT = math.nan, 60.0  # s that anything may take


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing that was tried. note: what went wrong; empty: it held."""

    name: str
    note: str = ""


class Job:
    """Forked processes, one a rank, that call run(rank) as a program of their own."""

    def __init__(self, run: Callable[[int], None], folder: Path, ranks: int = 1):
        self.log = Path(tempfile.mkdtemp(dir=folder, prefix="said-"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.codes: list[int | None] = [None] * ranks
        self.pids, self.peak = [], 0
        for rank in range(ranks):
            group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            pid = os.fork()
            if not pid:
                self._child(run, rank, group if ranks > 1 else {})
            self.pids.append(pid)

    def _child(self, run: Callable, rank: int, group: dict) -> None:
        code = 1
        try:
            os.setsid()
            os.environ.update({key: str(value) for key, value in group.items()})
            for number in (1, 2):
                os.dup2(os.open(self.log / f"{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
            sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False, encoding="utf-8") for n in (1, 2))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            tqdm.tqdm.monitor_interval = 0
            run(rank)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(code)

    def send(self, number: int, *ranks: int) -> None:
        for rank in ranks or range(len(self.pids)):
            if self.codes[rank] is None:
                os.kill(self.pids[rank], number)

    def poll(self) -> bool:
        """Whether all have ended."""
        for rank, pid in enumerate(self.pids):
            if self.codes[rank] is None:
                ended, status, used = os.wait4(pid, os.WNOHANG)
                if ended:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
                    self.peak = max(self.peak, used.ru_maxrss * 1024)
        return None not in self.codes

    def wait(self, seconds: float = LIMIT) -> list[int | None]:
        """The exit codes; None of a process that had not ended in time, and was killed."""
        end = time.monotonic() + seconds
        while not self.poll() and time.monotonic() < end:
            time.sleep(0.005)
        codes = [*self.codes]
        self.send(signal.SIGKILL)
        while not self.poll():
            time.sleep(0.005)
        return codes

    def said(self, rank: int | None = None) -> str:
        ranks = range(len(self.pids)) if rank is None else [rank]
        return "".join((self.log / str(r)).read_text(errors="replace") for r in ranks if (self.log / str(r)).exists())

    def last(self) -> str:
        """The last line that was said."""
        return (self.said().replace("\r", "\n").strip().splitlines() or ["nothing"])[-1][:200]


def command(chain: Path, name: str, before: Callable[[int], None] = lambda rank: None, **changes) -> Callable:
    """What runs a stage's script; `before` may patch the process that will run it."""
    module, cfg = SMALLEST[name][0], helpers.stage(chain, name, **changes)[1]

    def run(rank: int) -> None:
        before(rank)
        sys.argv = helpers.command_line(name, cfg)
        program(module.main, module.Config, module.__doc__)

    return run


def clean(found: dict[str, str]) -> dict[str, str]:
    return {name: sha256 for name, sha256 in found.items() if Path(name).name != ".lock"}


def straight(chain: Path, folder: Path, name: str, ranks: int = 1, **changes) -> tuple[dict, float]:
    """The files of a run that nothing disturbs, and its seconds."""
    out, began = folder / f"straight-{name}-{ranks}", time.monotonic()
    job = Job(command(chain, name, **{**changes, "out": out}), folder, ranks)
    if any(job.wait(10 * LIMIT)):
        raise RuntimeError(f"{name} does not run: {job.said()}")
    return clean(contents(out)), time.monotonic() - began


def goes_on(chain: Path, folder: Path, name: str, expected: dict, ranks: int = 1, **changes) -> str:
    """The same command again: it must end well, in the bytes of a straight run and no other file. Returns a note."""
    job = Job(command(chain, name, **changes), folder, ranks)
    if any(codes := job.wait()):
        return f"the next start ended with {codes}: {job.last()}"
    got = clean(contents(Path(changes["out"])))
    other = sorted(n for n in expected.keys() | got.keys() if expected.get(n) != got.get(n))
    return f"other files than of a straight run: {', '.join(other[:3])}" if other else ""


def refused(job: Job, words: str = "", codes: tuple = (2,)) -> str:
    """A job must have ended with one of these codes and a line that has these words. Returns a note."""
    got, said = job.wait(), job.said()
    if not set(got) <= set(codes):
        return f"it ended with {got}: {job.last()}"
    if "Traceback" in said or not re.search(words, said):
        return f"it said: {job.last()}"
    return ""


def logged(out: Path) -> int:
    """Lines of metrics.jsonl."""
    return (out / "metrics.jsonl").read_bytes().count(b"\n") if (out / "metrics.jsonl").exists() else 0


def newest(out: Path) -> int:
    """The step of the newest checkpoint."""
    return max((int(p.parent.name[5:]) for p in out.glob("checkpoints/step-*/MANIFEST.json")), default=0)


def some(full: int, share: float) -> int:
    return max(1, round(full * share))


def evenly(things: list, share: float) -> list:
    count = some(len(things), share)
    return [things[i * len(things) // count] for i in range(count)]


def at_call(owner, name: str, call: int, act: Callable, last: bool = True) -> None:
    """From now on owner.name's call number `call`, from 0, and unless `last` all after it, are act(original, …)."""
    original, calls = getattr(owner, name), iter(range(10**9))

    @functools.wraps(original)
    def counted(*args, **kwargs):
        n = next(calls)
        return act(original, *args, **kwargs) if n == call or n > call and not last else original(*args, **kwargs)

    setattr(owner, name, counted)


# ---- C: kills, signals, full disks, damage ---------------------------------------------------------------------------


def c1(chain: Path, folder: Path, share: float, seed: int) -> Iterator[Case]:
    """kill -9 at random instants of training and saving; every fifth run has two processes, of which one or both die"""
    draw, changes, known = random.Random(seed), dict(steps=12, save_every=3), {}
    for i in range(some(200, share)):
        name, ranks, out = TRAINED[i % 4], 1 + (i % 5 == 4), folder / str(i)
        if (name, ranks) not in known:
            known[name, ranks] = straight(chain, folder, name, ranks, **changes)
        expected, seconds = known[name, ranks]
        codes, start = [0], command(chain, name, out=out, **changes)
        while not any(codes):  # it ended before it could be killed
            shutil.rmtree(out, ignore_errors=True)
            job, delay = Job(start, folder, ranks), draw.uniform(0, seconds)
            time.sleep(delay)
            job.send(signal.SIGKILL, *draw.choice([(0,), (ranks - 1,), ()]))
            codes = job.wait()
        lost = logged(out) - newest(out) if (out / "metrics.jsonl").exists() else 0
        note = f"{lost} steps lost" if lost > 3 else "a process did not end" if None in codes else ""
        note = note or goes_on(chain, folder, name, expected, ranks, out=out, **changes)
        yield Case(f"{name}, {ranks} process(es), killed after {delay:.3f} s, at step {logged(out)}", note)
        shutil.rmtree(out, ignore_errors=True)


CHANGING = {"open", "write", "fsync", "replace", "rename", "mkdir", "rmdir", "unlink", "chmod", "lockf", "flock"}
CHANGING |= {"serialize_file", "close", "flush", "truncate", "ftruncate"}


def killed_at(point: int, start: Callable) -> Callable:
    """Calls start with a kill just before or after a C function that may change a file: at the point-th such moment
    since the run's folder was opened. Without one (-1) it prints how many there are.
    """

    def run(rank: int) -> None:
        seen, begin = [0], Run.__init__

        def watch(frame, event, function) -> None:
            if event in ("c_call", "c_return") and getattr(function, "__name__", "") in CHANGING:
                if seen[0] == point:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen[0] += 1

        def watched(*args, **kwargs):
            sys.setprofile(watch)
            begin(*args, **kwargs)

        Run.__init__ = watched
        start(rank)
        sys.setprofile(None)
        print("\nmoments", seen[0])

    return run


def c2(chain: Path, folder: Path, share: float, seed: int) -> Iterator[Case]:
    """kill -9 before and after every call that may change a file, while run.json, three checkpoints and the result are
    written
    """
    changes = dict(steps=4, save_every=1)
    expected = straight(chain, folder, "sft", **changes)[0]
    out = folder / "out"
    job = Job(killed_at(-1, command(chain, "sft", out=folder / "counted", **changes)), folder)
    job.wait()
    for point in evenly(range(int(job.last().split()[-1])), share):
        job = Job(killed_at(point, command(chain, "sft", out=out, **changes)), folder)
        note = "" if job.wait() == [-signal.SIGKILL] else f"it was not killed: {job.last()}"
        yield Case(f"moment {point}", note or goes_on(chain, folder, "sft", expected, out=out, **changes))
        shutil.rmtree(out)


def orphans(mark: str) -> list[int]:
    """Processes that were started by one with this in its environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def stopped_note(codes: list, number: int, job: Job, out: Path) -> str:
    """What is wrong with how a run ended that was asked to end by a signal."""
    if logged(out) == 0 and set(codes) <= {-number, 128 + number}:
        return ""  # it had not begun
    if codes == [0] * len(codes):
        return ""  # it was done
    if set(codes) != {128 + number}:
        return f"it ended with {codes}: {job.last()}"
    if "Traceback" in job.said() or "interrupted" not in job.said():
        return f"it said: {job.last()}"
    done = logged(out) in (newest(out), 40)
    return "" if done else f"{logged(out)} steps were logged, the checkpoint is of step {newest(out)}"


def c3(chain: Path, folder: Path, share: float, seed: int) -> Iterator[Case]:
    """SIGTERM and Ctrl-C: a checkpoint at the end of the step, one line, exit 143 or 130, the same result in the end; and
    no decoder of prepare.py is left, whatever ends it
    """
    draw, changes, known = random.Random(seed), dict(steps=40, save_every=1000), {}
    for i in range(some(20, share)):
        name, ranks, out = TRAINED[i % 4], 1 + (i % 5 == 4), folder / str(i)
        number = (signal.SIGTERM, signal.SIGINT)[i % 2]
        if (name, ranks) not in known:
            known[name, ranks] = straight(chain, folder, name, ranks, **changes)
        expected, seconds = known[name, ranks]
        job = Job(command(chain, name, out=out, **changes), folder, ranks)
        time.sleep(draw.uniform(0.2, 0.9) * seconds)
        job.send(number, *draw.choice([(0,), (ranks - 1,), ()]))
        note, step = stopped_note(job.wait(), number, job, out), logged(out)
        note = note or goes_on(chain, folder, name, expected, ranks, out=out, **changes)
        yield Case(f"{number.name} to {name}, {ranks} process(es), at step {step}", note)
    clips = some_clips(chain, folder / "clips", 30)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)[: some(3, share)]:
        mark = f"TORTURE={os.getpid()}-{number}"
        marked = lambda rank, mark=mark: os.environ.update([mark.split("=")])  # noqa: E731
        job = Job(command(chain, "shards", marked, videos=clips, workers=2, out=folder / number.name), folder)
        end = time.monotonic() + 30
        while len(orphans(mark)) < 2 and time.monotonic() < end:
            time.sleep(0.02)
        started, _ = len(orphans(mark)), job.send(number)
        codes, end = job.wait(), time.monotonic() + 2
        while orphans(mark) and time.monotonic() < end:
            time.sleep(0.02)
        left = len(orphans(mark))
        note = f"{left} of its {started} decoders ran on for 2 s" if left else "" if started else "no decoder started"
        wanted = (-signal.SIGKILL,) if number == signal.SIGKILL else (128 + number,)
        if not note and codes[0] not in wanted:
            note = f"it ended with {codes}: {job.last()}"
        yield Case(f"{number.name} to prepare.py while it decodes", note)


def mount(folder: Path, size: int, again: bool = False) -> None:
    folder.mkdir(exist_ok=True)
    options = f"{'remount,' * again}size={size}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True, capture_output=True)


def c4(chain: Path, folder: Path, share: float, seed: int) -> Iterator[Case]:
    """a disk that is full at ten levels (needs root, to mount one): one line with what is free, exit 2 of all processes;
    with more space the same command ends well
    """
    changes, disk = dict(steps=6, save_every=2), folder / "disk"
    for i in range(some(10, share)):
        name, ranks = ("base", "pairs")[i % 2], 1 + (i % 4 == 0)
        changes = {} if name == "pairs" else dict(steps=6, save_every=2)
        expected = straight(chain, folder, name, ranks, **changes)[0]
        size = sum(p.stat().st_size for p in (folder / f"straight-{name}-{ranks}").rglob("*"))
        shutil.rmtree(folder / f"straight-{name}-{ranks}")
        size *= 8 if name == "base" else 1  # a checkpoint is three times the weights, and there are two and a half
        with contextlib.ExitStack() as stack:
            try:
                mount(disk, level := 4096 * max(1, int(size * (i + 0.5) / 10 / 4096)))
            except (OSError, subprocess.CalledProcessError):
                return
            stack.callback(subprocess.run, ["umount", str(disk)], check=True)
            job = Job(command(chain, name, out=disk / "out", **changes), folder, ranks)
            note = refused(job, r"full.*\bfree\b", (0, 1, 2) if ranks > 1 else (0, 2)) if any(job.wait()) else ""
            fits = not any(job.codes)
            mount(disk, 10 * size, again=True)
            note = note or goes_on(chain, folder, name, expected, ranks, out=disk / "out", **changes)
        yield Case(f"{name}, {ranks} process(es), {level // 1024} KiB{', which was enough' * fits}", note)


def damages(state: Path, draw: random.Random, share: float) -> Iterator[tuple[str, Path, Callable]]:
    """What is done to which file, and how: 1,066 in all."""
    checkpoint = sorted(p for p in (state / "checkpoints/step-0000004").iterdir() if p.is_file())
    files = [*checkpoint, state / "run.json", state / "metrics.jsonl"]
    for path in files[: some(len(files), share)]:
        yield f"{path.name} is empty", path, lambda raw: b""
        yield f"a byte after {path.name}", path, lambda raw: raw + b"\0"
    for i in range(some(64, share)):
        path, part = files[i % len(files)], draw.random()
        yield f"{path.name} cut at {part:.1%}", path, lambda raw, part=part: raw[: int(part * len(raw))]
    for i in range(some(1000, share)):
        path, part, bit = files[i % len(files)], draw.random(), 1 << draw.randrange(8)

        def flip(raw: bytes, part=part, bit=bit) -> bytes:
            at = int(part * len(raw))
            return raw[:at] + bytes([raw[at] ^ bit]) + raw[at + 1 :]

        yield f"{path.name}, {part:.2%}: bit {bit} flipped", path, flip


def c5(chain: Path, folder: Path, share: float, seed: int) -> Iterator[Case]:
    """damage to what a resume reads (the newest checkpoint's files, run.json, metrics.jsonl): truncations, single flipped
    bits, a byte too many, empty files. It is named, and passed over for the checkpoint before or refused
    """
    changes, out, kept = dict(steps=6, save_every=2), folder / "out", folder / "kept"
    expected = straight(chain, folder, "sft", **changes)[0]
    die = lambda rank: at_call(Run, "log", 5, lambda *_, **__: os._exit(9))  # noqa: E731
    Job(command(chain, "sft", die, out=out, **changes), folder).wait()
    out.rename(kept)
    for name, path, change in damages(kept, random.Random(seed), share):
        shutil.copytree(kept, out)
        place = out / path.relative_to(kept)
        place.write_bytes(change(path.read_bytes()))
        job = Job(command(chain, "sft", out=out, **changes), folder)
        if job.wait() == [2]:
            note = refused(job, re.escape(path.name))
        else:
            named = path.parent == kept or path.name in job.said() or "step-0000004" in job.said()
            note = goes_on(chain, folder, "sft", expected, out=out, **changes) if job.codes == [0] else job.last()
            note = note or "" if named else "it was passed over without a word"
        yield Case(name, note)
        shutil.rmtree(out)


# ---- D: the same run, cut, and by more processes ---------------------------------------------------------------------


def d1(chain: Path, folder: Path, share: float, seed: int) -> Iterator[Case]:
    """40 steps, cut after a random one and resumed: the weights and the log of 40 steps straight, bit for bit"""
    draw, changes, known = random.Random(seed), dict(steps=40, save_every=7), {}
    for i in range(some(20, share)):
        name, step, out = TRAINED[i % 4], draw.randint(1, 39), folder / str(i)
        known[name] = known.get(name) or straight(chain, folder, name, **changes)[0]
        die = lambda rank, step=step: at_call(Run, "log", step, lambda *_, **__: os._exit(9))  # noqa: E731
        Job(command(chain, name, die, out=out, **changes), folder).wait()
        note = "" if logged(out) == step else "it was not cut"
        yield Case(
            f"{name}, cut after {step} steps",
            note or goes_on(chain, folder, name, expected=known[name], out=out, **changes),
        )


def shares(n: int, world: int, batch: int, step: int) -> list[list[list[int]]]:
    """What each of `world` processes reads at a step, forward by forward."""
    cfg = types.SimpleNamespace(batch_size=batch, micro_batch=0, seed=0)
    run = lambda rank: types.SimpleNamespace(group=Group(rank, world), stage="sft")  # noqa: E731
    return [micro_batches(n, step, cfg, run(rank), flow.generator) for rank in range(world)]


def d2(chain: Path, folder: Path, share: float, seed: int) -> Iterator[Case]:
    """1, 2 and 4 processes read the same samples at each step, in the same order"""
    for world in (1, 2, 4):
        read = [sum(sum(shares(23, world, 8, step), []), []) for step in range(20)]
        one = [sum(sum(shares(23, 1, 8, step), []), []) for step in range(20)]
        yield Case(f"{world} process(es)", "" if read == one else "another order")


def d3(chain: Path, folder: Path, share: float, seed: int) -> Iterator[Case]:
    """1 … 33 samples for 1, 2, 4 and 8 processes: every process has as many forwards of equal size at each step, and each
    epoch reads every sample once
    """
    shapes = [(n, world) for world in (1, 2, 4, 8) for n in range(1, 34)]
    for n, world in evenly(shapes, share):
        steps = [shares(n, world, 8, step) for step in range(n)]  # eight epochs
        even = all([len(part) for part in own] == [len(part) for part in step[0]] for step in steps for own in step)
        order = [i for step in steps for own in step for part in own for i in part]
        epochs = [sorted(order[k : k + n]) == list(range(n)) for k in range(0, 8 * n, n)]
        note = "" if even and all(epochs) else "uneven" if not even else "an epoch is no permutation"
        yield Case(f"{n} samples, {world} process(es)", note)


# ---- F, G, J: other processes ----------------------------------------------------------------------------------------


def fault(kind: str) -> Callable:
    """What befalls a process in the middle of its work."""

    def act(*args, **kwargs):
        if kind == "exception":
            raise ZeroDivisionError("torture")
        os.kill(os.getpid(), {"kill -9": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP}[kind])
        time.sleep(1000)

    return act


def faulty(kind: str, where: str, bad: int) -> Callable[[int], None]:
    def before(rank: int) -> None:
        if rank == bad:
            owner, name, call = {
                "loading": (sft, "build", 0),
                "step": (flow, "draw_noise", 3),
                "saving": (Run, "save", 0),
            }[where]
            at_call(owner, name, call, fault(kind))

    return before


TORCHRUN = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
import os
from bench import torture
torture.command(Path({chain!r}), "sft", torture.faulty({kind!r}, "step", {bad}), **{changes!r})(int(os.environ["RANK"]))
"""


def f1(chain: Path, folder: Path, share: float, seed: int) -> Iterator[Case]:
    """an exception, kill -9 or SIGSTOP in one process of several: within 60 s the job is down and has named the rank; six
    by torchrun, the others by themselves
    """
    changes = dict(steps=40, save_every=2, batch_size=12)
    if "step_timeout" in {field.name for field in dataclasses.fields(sft.Config)}:
        changes["step_timeout"] = 5.0
    faults = [
        (kind, where, bad, 2)
        for kind in ("exception", "kill -9")
        for where in ("loading", "step", "saving")
        for bad in (0, 1)
    ]
    faults += [("SIGSTOP", "step", bad, ranks) for ranks in (2, 3) for bad in (0, 1)]
    faults += [(kind, "step", 2, 3) for kind in ("exception", "kill -9")]
    for i, (kind, where, bad, ranks) in enumerate(evenly(faults, share)):
        started = command(chain, "sft", faulty(kind, where, bad), out=folder / str(i), **changes)
        job, began = Job(started, folder, ranks), time.monotonic()
        while not all(job.codes[r] is not None for r in range(ranks) if r != bad) and time.monotonic() < began + LIMIT:
            job.poll()
            time.sleep(0.01)
        others = [r for r in range(ranks) if r != bad]
        alive, said = [r for r in others if job.codes[r] is None], "".join(job.said(r) for r in others)
        job.wait(1)
        note = f"{alive} of {ranks} did not end" if alive else ""
        note = note or ("a traceback" if "Traceback" in said else "")
        if not note and kind == "SIGSTOP" and not re.search(rf"rank\W+{bad}\b|process\W+{bad}\b", said):
            note = f"rank {bad} is not named: {job.last()}"
        yield Case(f"{kind} in {where}, rank {bad} of {ranks}, {time.monotonic() - began:.1f} s", note)
    for i, (kind, bad) in enumerate(
        [(kind, bad) for kind in ("exception", "kill -9", "SIGSTOP") for bad in (0, 1)][: round(6 * share)]
    ):
        script, out = folder / f"{i}.py", str(folder / f"torchrun-{i}")
        script.write_text(
            TORCHRUN.format(root=str(ROOT), chain=str(chain), kind=kind, bad=bad, changes={**changes, "out": out})
        )
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
        began = time.monotonic()
        process = subprocess.Popen(
            words, cwd=ROOT, env=helpers.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            said = process.communicate(timeout=LIMIT + 15)[0]  # 15: its start
            note = "" if process.returncode else "exit 0"
            note = note or ("" if re.search(rf"rank\W+{bad}\b", said) else f"rank {bad} is not named: {said[-200:]}")
        except subprocess.TimeoutExpired:
            process.kill()
            note = "it was not down in 60 s"
        yield Case(f"{kind}, rank {bad} of 2 under torchrun, {time.monotonic() - began:.0f} s", note)


def g1(chain: Path, folder: Path, share: float, seed: int) -> Iterator[Case]:
    """pairs and shards, made by up to four processes of which one is killed again and again: none twice, none missing, the
    same bytes, whoever made them
    """
    draw = random.Random(seed)
    options = {"pairs": dict(shard_size=1), "shards": dict(shard_size=2, workers=1)}
    options["shards"]["videos"] = some_clips(chain, folder / "clips", 12)
    known = {name: straight(chain, folder, name, **changes) for name, changes in options.items()}
    for i in range(some(20, share)):
        name, out, kills, note = ("pairs", "shards")[i % 2], folder / str(i), 0, ""
        expected, seconds = known[name]
        for _ in range(5):
            ranks = draw.randint(1, 4)
            job = Job(command(chain, name, out=out, **options[name]), folder, ranks)
            time.sleep(draw.uniform(0, seconds + 0.1 * ranks))
            job.send(signal.SIGKILL, draw.randrange(ranks))
            codes = job.wait()
            kills += -signal.SIGKILL in codes
            note = note or ("a process did not end" if None in codes else "")
        note = note or goes_on(chain, folder, name, expected, draw.randint(1, 4), out=out, **options[name])
        yield Case(f"{name}, {kills} kills", note)


def two_jobs(chain: Path, folder: Path, share: float, seed: int) -> Iterator[Case]:
    """two commands in one --out, at once or one after the other: one works, the other ends with a line and exit 2, and the
    log is not doubled; an --out that is deleted meanwhile ends its run with a line
    """
    draw, long = random.Random(seed), dict(steps=40, save_every=5)
    options = {"sft": long, "pairs": dict(shard_size=1), "asymdpo": long}
    known = {name: straight(chain, folder, name, **changes) for name, changes in options.items()}
    for i in range(some(24, share)):
        name, out = list(options)[i % 3], folder / str(i)
        expected, seconds = known[name]
        delay = 0.0 if i % 2 else draw.uniform(0, 0.8 * seconds)
        jobs = [Job(command(chain, name, out=out, **options[name]), folder)]
        time.sleep(delay)
        jobs.append(Job(command(chain, name, out=out, **options[name]), folder))
        codes = [job.wait()[0] for job in jobs]
        loser = jobs[codes.index(2)] if 2 in codes else None
        late = "finished already" in jobs[1].said()
        note = "" if sorted(codes) == [0, 2] or late else f"they ended with {codes}: {jobs[1].last()}"
        note = note or (refused(loser, "writing it|another") if loser else "")
        yield Case(
            f"{name}, {delay:.2f} s apart", note or goes_on(chain, folder, name, expected, out=out, **options[name])
        )
    for name in TRAINED if share == 1 else TRAINED[:1]:
        out = folder / f"gone-{name}"
        job = Job(command(chain, name, out=out, steps=2000, save_every=5), folder)
        while not logged(out) and not job.poll():
            time.sleep(0.01)
        with contextlib.suppress(OSError):
            out.rename(folder / f"moved-{name}")
        began, note = time.monotonic(), refused(job, re.escape(str(out)), (1, 2))
        slow = time.monotonic() - began
        yield Case(f"--out of {name} moved away", note or ("" if slow < 5 else f"noticed after {slow:.0f} s"))


# ---- N: NaN ----------------------------------------------------------------------------------------------------------


def unsound(out: Path) -> str:
    """The first tensor below a folder that is not finite."""
    for path in sorted(out.rglob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                return f"{path.relative_to(out)} holds a {name} that is not finite"
    return ""


def poison(chain: Path, folder: Path, name: str, file: str, tensor: str, value: float, every: bool) -> Path:
    """A sealed copy of a stage's folder in which one value of a tensor, or of every sample's, is not finite."""
    at = copy(chain, folder, name) / name
    for path in sorted(at.glob(file)):
        held = load_file(path)
        key = next(k for k in held if re.fullmatch(tensor, k))
        held[key].flatten(1)[slice(None) if every else 0, 0] = value
        header = helpers.safe_open(path, "pt").metadata()
        save_file(held, path, header)
        facts = path.with_suffix(".json")
        if facts.is_file():
            row = json.loads(facts.read_text()) | fingerprint(path)
            facts.write_text(json.dumps(row))
        if not every:
            break
    manifest = json.loads((at / "MANIFEST.json").read_text())
    rest = {k: v for k, v in manifest.items() if k not in ("files", "sha256", "seal")}
    write_manifest(at, list(manifest["files"]), **rest)
    return at


def wrong_inputs(chain: Path, folder: Path) -> Iterator[tuple[str, str, dict, str, tuple]]:
    """Name, stage, changes, words that must be said, allowed exit codes."""
    B, every = ".*lora_B.*|.*[.]B", dict(every=True)
    shard, weights = "shard-*.safetensors", "diffusion_pytorch_model.safetensors"
    kinds = [
        ("latents", "sft", "data", "shards", shard, "x0", {}), ("latents of all", "sft", "data", "shards", shard, "x0", every),
        ("text states", "base", "data", "shards", shard, "text", {}),
        ("a winner", "asymdpo", "pairs", "pairs", shard, "chosen", {}),
        ("a loser", "asymdpo", "pairs", "pairs", shard, "rejected", {}),
        ("losers of all", "asymdpo", "pairs", "pairs", shard, "rejected", every),
        ("the base's weights", "sft", "base", "base", weights, "blocks.0.*q.weight", {}),
        ("the cold start", "asymdpo", "sft", "sft", "lora.safetensors", B, {}),
        ("the continuation's LoRA", "pairs", "continuation", "continuation", "lora.safetensors", B, {}),
        ("a task prompt", "pairs", "continuation", "continuation", "task_prompt.safetensors", ".*", {}),
    ]  # fmt: skip
    for i, (what, stage, option, of, file, tensor, how) in enumerate(kinds):
        value = (NAN, math.inf)[i % 2]
        at = poison(chain, folder / f"poisoned-{i}", of, file, tensor, value, how.get("every", False))
        yield (
            f"{value} in {what}, {stage}",
            stage,
            {option: at},
            "finite|NaN|nan",
            (2, 3) if of != "shards" and of != "pairs" else (0, 2, 3),
        )


def spoilt(value: float, call: int, last: bool, bad: int, gradient: bool) -> Callable[[int], None]:
    """The loss of a step of one rank, or its gradient alone, becomes `value`."""

    def act(original, *args, **kwargs):
        losses = original(*args, **kwargs)
        if gradient:
            losses.register_hook(lambda g: g * value)
            return losses
        return losses * value

    return lambda rank: at_call(sft, "flow_loss", call, act, last) if rank == bad else None


def n1(chain: Path, folder: Path, share: float, seed: int) -> Iterator[Case]:
    """NaN and infinity in inputs, loss and gradient, of one process of two too: refused by name, or the step changes no
    weight and is named; three in a row stop the run with exit 3, its last checkpoint whole; nothing of it is sealed
    """
    six = dict(steps=6, save_every=2)
    for i, (name, stage, changes, words, codes) in enumerate(wrong_inputs(chain, folder)):
        if i >= some(10, share):
            break
        out = folder / f"input-{i}"
        job = Job(command(chain, stage, out=out, **(changes if stage == "pairs" else {**six, **changes})), folder)
        yield Case(name, refused(job, words, codes) or unsound(out))
    steps, kept = dict(steps=6, save_every=5), folder / "kept"
    straight_run = straight(chain, folder, "base", **six)[0]
    cases = [(v, g, ranks) for v in (NAN, math.inf) for g in (False, True) for ranks in (1, 2)]
    for i, (value, gradient, ranks) in enumerate(evenly(cases, share)):
        what, out = (
            f"{value} in the {'gradient' if gradient else 'loss'} of rank {ranks - 1} of {ranks}",
            folder / f"step-{i}",
        )

        def before(rank: int, spoil=spoilt(value, 5, True, ranks - 1, gradient)) -> None:
            spoil(rank)
            finish = Run.finish
            Run.finish = lambda run, *a, **k: (rank or shutil.copytree(out / "checkpoints", kept), finish(run, *a, **k))

        job = Job(command(chain, "base", before, out=out, **steps), folder, ranks)
        note = refused(job, "finite|NaN|nan", (0,)) or unsound(out)
        if not note:
            saved = load_file(kept / "step-0000005/state.safetensors")
            made = load_file(out / "diffusion_pytorch_model.safetensors")
            note = (
                "" if all(torch.equal(saved[f"param/{k}"], v) for k, v in made.items()) else "the step changed a weight"
            )
        yield Case(f"{what}, in the last step", note)
        shutil.rmtree(kept, ignore_errors=True)
        out = folder / f"ever-{i}"
        job = Job(command(chain, "base", spoilt(value, 3, False, ranks - 1, gradient), out=out, **six), folder, ranks)
        note = refused(job, "in a row|finite", (3,)) or unsound(out) or ("" if newest(out) else "no checkpoint is left")
        if ranks == 1:
            note = note or goes_on(chain, folder, "base", straight_run, out=out, **six)
        yield Case(f"{what}, from a step on", note)
    for i, lr in enumerate([1e3, NAN, math.inf, -1.0][: some(4, share)]):
        out = folder / f"lr-{i}"
        job = Job(command(chain, "sft", out=out, **{**six, "steps": 40, "lr": lr, "warmup": 1}), folder)
        yield Case(f"--lr {lr}", refused(job, "", (0, 3) if lr == 1e3 else (2,)) or unsound(out))


def n2(chain: Path, folder: Path, share: float, seed: int) -> Iterator[Case]:
    """NaN and infinity in the frames that winner and loser share: loss and gradients are what they are without"""
    for form in ("inside", "outside"):
        for value in (NAN, math.inf, 1e30):
            cfg = asymdpo.resolve(asymdpo.Config(form=form, sft_weight=1.0), asymdpo.PRESETS)
            made, n1, found = torch.Generator().manual_seed(seed), torch.tensor([1, 3]), []
            sides = [torch.randn(2, 4, 6, 2, 2, generator=made) for _ in range(6)]
            shared = torch.arange(6)[None, None, :, None, None] < n1[:, None, None, None, None]
            for filler in (None, value):
                inputs = [a if filler is None else torch.where(shared, filler, a) for a in sides]
                inputs = [a.clone().requires_grad_() for a in inputs]
                loss = asymdpo.asymdpo_loss(cfg, inputs, n1, n1 + 2)[0]
                found.append((loss, *torch.autograd.grad(loss.sum(), inputs[:2])))
            same = all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*found))
            yield Case(f"{value}, {form}", "" if same else "loss or gradient changed")


# ---- S, V: hostile files ---------------------------------------------------------------------------------------------


class Evil:
    """Unpickled, it leaves a mark."""

    def __init__(self, function: Callable, *words):
        self.function, self.words = function, words

    def __reduce__(self):
        return self.function, self.words


def s1(chain: Path, folder: Path, share: float, seed: int) -> Iterator[Case]:
    """pickles that run code, as .pth of weights: refused by name, and nothing is run"""
    mark = folder / "run"
    evils = {
        "os.system": Evil(os.system, f"touch {mark}"), "eval": Evil(eval, f"open({str(mark)!r}, 'w')"),
        "subprocess": Evil(subprocess.call, ["touch", str(mark)]), "open": Evil(open, str(mark), "w"),
        "exec": Evil(exec, f"open({str(mark)!r}, 'w')"), "mkdir": Evil(os.mkdir, str(mark)),
    }  # fmt: skip
    for name, evil in evils.items():
        for how in ("torch", "plain", "in a dict"):
            path = folder / f"{name}-{how}.pth".replace(" ", "-")
            held = {"w": torch.ones(2), "evil": evil} if how == "in a dict" else evil
            path.write_bytes(pickle.dumps(held)) if how == "plain" else torch.save(held, path)
            read = lambda rank, path=path: program(lambda cfg: [*Checkpoint(path).items()], sft.Config, "")  # noqa: E731
            note = refused(Job(lambda rank: (sys.argv.__setitem__(slice(1, None), []), read(rank)), folder), path.name)
            yield Case(f"{name}, {how}", "it was run" if mark.exists() else note)


def hostile_rows(home: Path, port: int) -> dict[str, str]:
    """What may stand in a table as a video: name -> the cell. home is the folder; its neighbour secret.mp4 is no part of
    it.
    """
    secret = home.parent / "secret.mp4"
    lists = {
        "m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{secret}\n#EXT-X-ENDLIST\n",
        "m3u8 of a server": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:{port}/a.ts\n#EXT-X-ENDLIST\n",
        "ffconcat": f"ffconcat version 1.0\nfile {secret}\n", "ffconcat, relative": "ffconcat version 1.0\nfile ../secret.mp4\n",
        "ffconcat of a server": f"ffconcat version 1.0\nfile http://127.0.0.1:{port}/a.mp4\n",
        "sdp": f"v=0\nc=IN IP4 127.0.0.1\nm=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        "dash": f'<?xml version="1.0"?><MPD type="static"><Period><BaseURL>http://127.0.0.1:{port}/</BaseURL></Period></MPD>',
    }  # fmt: skip
    for name, text in lists.items():
        (home / f"{name}.mp4").write_text(text)
    links = {"link": secret, "link, relative": "../secret.mp4", "itself": "itself.mp4", "nowhere": "nothing.mp4",
             "device": "/dev/zero", "memory": "/proc/self/mem"}  # fmt: skip
    for name, to in links.items():
        (home / f"{name}.mp4").symlink_to(to)
    (home / "out").symlink_to(home.parent)
    os.mkfifo(home / "fifo.mp4")
    (home / "folder.mp4").mkdir()
    written = [f"{name}.mp4" for name in (*lists, *links, "fifo", "folder")] + ["out/secret.mp4", "./out/secret.mp4"]
    urls = [
        f"{scheme}{secret}"
        for scheme in ("file:", "file://", "concat:", "subfile,,start,0,end,0,,:", "cache:", "async:")
    ]
    urls += [
        f"http://127.0.0.1:{port}/a.mp4",
        f"tcp://127.0.0.1:{port}",
        f"hls+http://127.0.0.1:{port}/a.m3u8",
        "pipe:0",
        "data:,a",
    ]
    paths = [str(secret), "../secret.mp4", "a/../../secret.mp4", "./../secret.mp4", "..\\secret.mp4", "~/secret.mp4"]
    paths += [
        "/dev/zero",
        "/dev/stdin",
        "-i",
        "",
        ".",
        "..",
        "a" * 300 + ".mp4",
        "a/" * 3000 + "b.mp4",
        "a\0b.mp4",
        "%03d.mp4",
    ]
    return {cell[:60]: cell for cell in written + urls + paths}


class Server(http.server.BaseHTTPRequestHandler):
    """Counts the requests that it gets."""

    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_error(404)

    def log_message(self, *words) -> None:
        pass


def s2(chain: Path, folder: Path, share: float, seed: int) -> Iterator[Case]:
    """names in a table of videos that lead elsewhere, lists that FFmpeg would follow, links, devices: the row is rejected
    by itself, what is outside is not read, and nothing is asked of the network
    """
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    clips = some_clips(chain, folder / "clips", 2)
    good = sorted(p.stem for p in clips.glob("*.mp4"))
    shutil.copy(next(clips.glob("*.mp4")), folder / "secret.mp4")
    rows = hostile_rows(clips, server.server_port)
    cases = {name: [(cell, "a ball falls")] for name, cell in rows.items()}
    cases["a lone surrogate"] = [(b"ball-00001.mp4", b"a ball \xed\xa0\x80 falls")]
    cases["the same name twice"] = [("ball-00001.mp4", "a ball falls")]
    table = (clips / "metadata.csv").read_bytes()
    for i, (name, extra) in enumerate(evenly([*cases.items()], share)):
        lines = [[cell if isinstance(cell, bytes) else cell.encode() for cell in row] for row in extra]
        (clips / "metadata.csv").write_bytes(table + b"".join(b'"%s","%s"\r\n' % tuple(line) for line in lines))
        Server.asked.clear()
        out = folder / f"out-{i}"
        job = Job(command(chain, "shards", videos=clips, bad_rows="reject", out=out, workers=1, deadline=5.0), folder)
        note = refused(job, "", (0,))
        if not note:
            kept = sorted(row["id"] for row in Shards(out, "prepare.py").rows)
            note = "" if kept == good else f"read: {', '.join(set(kept) - set(good))}"
        yield Case(name, f"asked for {Server.asked[0]}" if Server.asked else note)
    server.shutdown()
    outside = {"a caption outside": "a.txt", "a table outside": "metadata.csv"}
    for name, file in outside.items():
        home = folder / file
        home.mkdir()
        for clip in good:
            shutil.copy(clips / f"{clip}.mp4", home)
            (home / f"{clip}.txt").write_text("a ball falls")
        (folder / "secret.txt").write_text("video,caption\nball-00001.mp4,red secret ball\n")
        (home / (file if file == "metadata.csv" else f"{good[0]}.txt")).unlink(missing_ok=True)
        (home / (file if file == "metadata.csv" else f"{good[0]}.txt")).symlink_to(folder / "secret.txt")
        out = folder / f"out-{file}"
        Job(command(chain, "shards", videos=home, bad_rows="reject", out=out, workers=1), folder).wait()
        read = any("secret ball" in p.read_text(errors="replace") for p in out.glob("*.json*"))
        yield Case(name, "it was read" if read else "")


def right_or_refused(decoder: video.Decoder, case: hostile.Case, frames: int, size=None, fps=None) -> str:
    """Every picture of the first clip is the one that the file shows at its time, or there is a reason why there is none:
    of a healthy file none, and of a file without such a clip always. Returns a note.
    """
    began, expected = time.monotonic(), case.expected(frames, fps)
    twice = sum(a == b for a, b in zip(expected or [], (expected or [])[1:])) if fps else 0
    unfit = case.must == "refuse" or expected is None or case.must == "read" and twice > 0.1 * frames
    try:
        clip = decoder.read(case.path, frames, size, fps)[0]
        wrong = case.wrong(clip.frames, expected, stretched=size is None)
        note = f"{wrong} wrong frames" if wrong else "it was read" if unfit else ""
    except video.BadVideo as error:
        note = "" if unfit or case.must == "either" else f"a healthy file was refused: {error}"
    return note or ("" if time.monotonic() - began < 10 else "it took more than 10 s")


def v1(chain: Path, folder: Path, share: float, seed: int) -> Iterator[Case]:
    """classes of videos, healthy, odd, damaged: every frame that is returned is the right one, or the file is refused"""
    with video.Decoder(8.0) as decoder:
        for name in evenly([*hostile.CASES], share):
            case = hostile.make(name, folder)
            notes = [right_or_refused(decoder, case, *way) for way in ((49, None, None), (17, (96, 120), 16))]
            yield Case(name, "; ".join(note for note in notes if note))


def v2(chain: Path, folder: Path, share: float, seed: int) -> Iterator[Case]:
    """random cuts and flipped bits: the reader lives, in time, and what it returns of a cut file is right; of flipped bits
    docs/videos.md counts the frames that no decoder finds wrong
    """
    names = ("25 fps", "HEVC", "VP9", "AV1", "B-frames, MPEG-4", "MPEG-2, ts", "Motion JPEG", "alpha, FFV1")
    names = names[: some(len(names), share)]
    with video.Decoder(8.0) as decoder:
        for name in names:
            case = hostile.make(name, folder)
            whole = case.path.read_bytes()
            for k in range(some(500, share) // len(names)):
                case.path.write_bytes(hostile.spoil(whole, seed + k))
                note = right_or_refused(decoder, dataclasses.replace(case, must="either"), 33)
                yield Case(f"{name}, damage {seed + k}", "" if (seed + k) % 2 == 0 and "wrong" in note else note)


class Spinning(video.Decoder):
    program = [sys.executable, "-c", hostile.SPIN]


def v3(chain: Path, folder: Path, share: float, seed: int) -> Iterator[Case]:
    """a decoder that spins for ever while it holds Python's lock: killed at its deadline, and the next file is read"""
    healthy = hostile.make("B-frames", folder)
    (folder / "spin.mp4").write_bytes(healthy.path.read_bytes())
    with Spinning() as decoder:
        for i in range(some(100, share)):
            began, decoder.deadline, note = time.monotonic(), 0.3, "it was read"
            try:
                decoder.read(folder / "spin.mp4", 49)
            except video.BadVideo as error:
                note = "" if "0.3 s" in str(error) and time.monotonic() - began < 3 else str(error)
            decoder.deadline = 8.0
            yield Case(f"time {i}", note or right_or_refused(decoder, healthy, 49))


def v4(chain: Path, folder: Path, share: float, seed: int) -> Iterator[Case]:
    """bombs: videos of gigabytes once decoded, a header of 100,000 tensors, a header that lies, 100 MB in one cell: refused
    in a line (videos: or read) within 10 s and 1 GiB
    """
    cases: dict[str, Job] = {}
    clips = some_clips(chain, folder / "clips", 2, ("huge.mp4", "a" * 10**8))
    cases["100 MB in a cell"] = lambda out: command(chain, "shards", videos=clips, out=out)
    many = {f"t{i}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i in range(100_000)}
    header = json.dumps(many).encode()
    heads = {"100,000 tensors": len(header).to_bytes(8, "little") + header + bytes(400_000)}
    heads["a header of 2^60 bytes"] = (2**60).to_bytes(8, "little") + header[:1000]
    for i, (name, raw) in enumerate(heads.items()):
        base = folder / f"base-{i}"
        shutil.copytree(chain / "base", base)
        (base / "MANIFEST.json").unlink()
        (base / "diffusion_pytorch_model.safetensors").write_bytes(raw)
        cases[name] = lambda out, base=base: command(chain, "sft", base=base, out=out)
    for name, start in cases.items():
        began = time.monotonic()
        job = Job(start(folder / f"out-{name}".replace(" ", "-")), folder)
        note, used = refused(job, "", (2,)), job.peak - resident()
        yield Case(name, note or limits(time.monotonic() - began, used))
    with video.Decoder(8.0) as decoder:
        for name in (n for n in hostile.CASES if n.startswith("bomb")):
            case, began = hostile.make(name, folder), time.monotonic()
            note = right_or_refused(decoder, dataclasses.replace(case, must="either"), 49)
            peak = int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{decoder._process.pid}/status").read_text())[1]) * 1024
            yield Case(name, note or limits(time.monotonic() - began, peak))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def limits(seconds: float, used: int) -> str:
    return f"{seconds:.0f} s" if seconds > 10 else f"{used / 2**30:.1f} GiB" if used > 2**30 else ""


# ---- all of them -----------------------------------------------------------------------------------------------------

ROWS: dict[str, tuple[Callable, str]] = {  # its function, and the goal at full size
    "C1": (c1, "200 kills"), "C2": (c2, "every moment"), "C3": (c3, "20 signals"), "C4": (c4, "10 levels"),
    "C5": (c5, "1,066 damaged"), "D1": (d1, "20 cuts"), "D2": (d2, "3 sizes"), "D3": (d3, "132 shapes"),
    "F1": (f1, "24 faults"), "G1": (g1, "20 runs"), "N1": (n1, "13 cases"), "N2": (n2, "3 cases"), "S1": (s1, "5 pickles"),
    "S2": (s2, "40 paths"), "V1": (v1, "30 classes"), "V2": (v2, "500 videos"), "V3": (v3, "100 times"),
    "V4": (v4, "6 bombs"), "two jobs": (two_jobs, "24 pairs of jobs"),
}  # fmt: skip


def make_chain(root: Path) -> Path:
    """The smallest run of every stage, made by a process of its own: this one forks, so it starts no thread."""
    job = Job(lambda rank: [helpers.run_stage(root, name) for name in helpers.STAGES if name != "eval"], root)
    if any(job.wait(10 * LIMIT)):
        raise RuntimeError(f"the chain of stages does not run: {job.said()}")
    return root


def tried(name: str, chain: Path, folder: Path, share: float, seed: int) -> tuple[str, list[Case], float]:
    """A row's cases, and its seconds. An error in the row is a case that is lost."""
    began, cases, home = time.monotonic(), [], folder / name.replace(" ", "-")
    home.mkdir()
    torch.set_num_threads(1)
    try:
        for case in ROWS[name][0](chain, home, share, seed):
            cases.append(case)
    except Exception as error:
        cases.append(Case("the row itself", f"{type(error).__name__}: {error}; {traceback.format_exc()[-400:]}"))
    shutil.rmtree(home, ignore_errors=True)
    return name, cases, time.monotonic() - began


def line(name: str, cases: list[Case], seconds: float) -> str:
    lost = sum(bool(case.note) for case in cases)
    state = (
        f"{len(cases):5d} tried {len(cases) - lost:5d} held {lost:4d} lost"
        if cases
        else "skipped: needs root, for a disk"
    )
    return f"{name:9s}{state}{seconds:7.0f} s"


def page(found: dict[str, tuple[list[Case], float]], words: str, seconds: float) -> str:
    total, lost = sum(len(cases) for cases, _ in found.values()), []
    rows = ["| | what | goal | tried | held | lost | s |", "|---|---|---|---|---|---|---|"]
    for name, (cases, spent) in found.items():
        bad = [case for case in cases if case.note]
        lost += [f"* {name}, {case.name}: {case.note}".replace("\n", " ")[:300] for case in bad[:5]]
        what = " ".join(ROWS[name][0].__doc__.split())
        rows.append(
            f"| {name} | {what} | {ROWS[name][1]} | {len(cases) or 'skipped'} | {len(cases) - len(bad)} | {len(bad)} | {spent:.0f} |"
        )
    misses = "\n".join(lost) or "None."
    return f"""# What it withstands

Written by `{words}`: {platform.processor() or platform.machine()}, {os.cpu_count()} cores, {platform.system()}
{platform.release().split("-")[0]}; Python {platform.python_version()}, torch {torch.__version__}; commit {commit()};
{time.strftime("%Y-%m-%d")}. {total:,} cases in {seconds / 60:.0f} minutes, seed by seed the same but for the instants of kills.

A case holds if the next start of the same command ends in the bytes of a run that nothing disturbed, or the command
refuses in one line that names the cause, with the exit code of the table in README. Nothing is asked of the reader's
patience: a case that takes more than 60 s is lost.

{chr(10).join(rows)}

## Lost

The first five of each row.

{misses}

## Not covered

* A GPU, NCCL, several machines, a network's file system: all of this ran on one machine's CPU and disk.
* A power cut: files are synced before they are renamed, which a kill cannot tell from files that are not.
* A process that is stopped (SIGSTOP) while it loads or saves: the others wait, and name it after a minute.
* Flipped bits in a video that its decoder takes for pictures: `docs/videos.md` counts them.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help="rows to try, separated by commas")
    parser.add_argument("--share", type=float, default=1.0, help="share of each row's cases")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 10**6, help="of the random instants and damage")
    parser.add_argument("--jobs", type=int, default=2, help="rows at a time")
    parser.add_argument("--keep", action="store_true", help="leave docs/reliability.md as it is")
    cfg = parser.parse_args()
    names = [name.strip() for name in cfg.rows.split(",")]
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"--rows: expected some of {', '.join(ROWS)}, got {unknown[0]}")
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    began, found = time.monotonic(), {}
    with (
        tempfile.TemporaryDirectory() as scratch,
        ProcessPoolExecutor(cfg.jobs, multiprocessing.get_context("fork")) as pool,
    ):
        (chain := Path(scratch, "chain")).mkdir()
        make_chain(chain)
        print(f"seed {cfg.seed}; the chain of stages took {time.monotonic() - began:.0f} s", flush=True)
        for row in as_completed([pool.submit(tried, n, chain, Path(scratch), cfg.share, cfg.seed) for n in names]):
            name, cases, seconds = row.result()
            found[name] = cases, seconds
            print(line(name, cases, seconds), flush=True)
            for case in [case for case in cases if case.note][:5]:
                print(f"         lost: {case.name}: {case.note}", flush=True)
    found = {name: found[name] for name in names}
    if set(names) == set(ROWS) and not cfg.keep:
        words = "make torture" if cfg.share == 1 else f"python -m bench.torture --share {cfg.share:g}"
        (ROOT / "docs/reliability.md").write_text(page(found, words, time.monotonic() - began), encoding="utf-8")
    return int(any(case.note for cases, _ in found.values() for case in cases))


if __name__ == "__main__":
    sys.exit(main())

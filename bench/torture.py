"""Kills, signals, full disks, damage, NaN and hostile files against the real commands: what was tried, held and lost.

    python -m bench.torture                             every row; writes docs/reliability.md; exit code 1: some lost
    python -m bench.torture --rows C1,N1 --share 0.1    a tenth of the cases of two rows; writes nothing

A row is a function of a bench of its own, the share of its cases to try and a source of random numbers. Commands run in
forked processes, so that a kill costs 0.2 s and not the seconds of an import: sys.argv, `program`, exit codes and what
is printed are the command's own. Several processes meet by gloo, alone or under torchrun's agent.
"""

import contextlib
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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import helpers
import hostile
import matplotlib.figure  # noqa: F401  once, and not in every process that draws
import torch
import tqdm
from helpers import SMALLEST, some_clips
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import asymdpo
import flow
import make_pairs
import sft
from runtime import video
from runtime.files import commit, read_json, read_jsonl, read_text, write_manifest
from runtime.group import Group
from runtime.options import SEED, arguments, option, program
from runtime.run import Run
from runtime.shards import Shards, micro_batches
from wan.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parent.parent
TRAINED = ("base", "sft", "continuation", "asymdpo")
WEIGHTS = "diffusion_pytorch_model.safetensors"
LIMIT = 60.0  # s that a command may take
SIX = dict(steps=6, save_every=2)
Case = tuple[str, str]  # its name, and what went wrong; empty: it held


class Job:
    """A command as `ranks` forked processes, or as one that is torchrun's agent and has them started."""

    def __init__(self, run: Callable[[], None], folder: Path, ranks: int = 1, agent: bool = False):
        """run: what each process does, to exit 0 or as SystemExit says. folder: for what they say."""
        self.log, self.codes, self.peak = Path(tempfile.mkdtemp(dir=folder, prefix="said-")) / "log", {}, 0
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        meeting = dict(run_id=port, rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0")
        agents = LaunchConfig(1, 1, ranks, **meeting, max_restarts=0, start_method="fork")
        self.pids, self.agent, self.started = [], agent, []  # started: by the agent, as far as anybody asked
        for rank in range(1 if agent else ranks):
            env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            pid = os.fork()
            if not pid:
                self._child(elastic_launch(agents, run) if agent else run, {} if agent or ranks == 1 else env)
            self.pids.append(pid)

    def _child(self, run: Callable, env: dict) -> None:
        code = 1
        try:
            os.setsid()
            os.environ.update({key: str(value) for key, value in env.items()})
            for number in (1, 2):
                os.dup2(os.open(self.log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
            sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False, encoding="utf-8") for n in (1, 2))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            tqdm.tqdm.monitor_interval = 0
            run()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def send(self, number: int) -> None:
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                os.kill(pid, number)

    def poll(self) -> bool:
        """Whether all have ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                gone, status, used = os.wait4(pid, os.WNOHANG)
                if gone:
                    self.codes[rank], self.peak = os.waitstatus_to_exitcode(status), used.ru_maxrss * 1024
        return len(self.codes) == len(self.pids)

    def wait(self, seconds: float = LIMIT) -> set[int | str]:
        """The exit codes, "alive" for a process that had not ended in time. All are gone then, and an agent's, too."""
        until(self.poll, seconds=seconds)
        codes = {self.codes.get(rank, "alive") for rank in range(len(self.pids))}
        for pid in (*self.pids, *self.started):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        until(self.poll)
        until(lambda: all(map(ended, self.started)))
        return codes

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n") if self.log.exists() else ""

    def refused(self, words: str = "", codes: tuple = (2,)) -> str:
        """It must end with such a code, without a traceback, and say these words. What is wrong, if not."""
        got, said = self.wait(), self.said
        last = (said.strip().splitlines() or ["nothing"])[-1][:200]
        well = got <= set(codes) and "Traceback" not in said and re.search(words, said)
        return "" if well else f"exit {', '.join(map(str, got))}, it said: {last}"


def until(met: Callable[..., bool], *args, seconds: float = LIMIT) -> bool:
    """Waits until met(*args). Whether it came to that."""
    end = time.monotonic() + seconds
    while not (found := met(*args)) and time.monotonic() < end:
        time.sleep(0.005)
    return found


class Bench:
    """The smallest chain of stages, and a folder for what a row does with them."""

    def __init__(self, chain: Path, folder: Path):
        self.chain, self.folder, self._straight = chain, folder, {}

    def run(self, name: str, patch: Callable[[], None] = lambda: None, **changes) -> Callable[[], None]:
        """What runs a stage's script in a process that `patch` may prepare."""
        module, cfg = SMALLEST[name][0], helpers.stage(self.chain, name, **changes)[1]

        def run() -> None:
            patch()
            sys.argv = helpers.command_line(name, cfg)
            program(module.main, module.Config, module.__doc__)

        return run

    def start(self, name: str, ranks: int = 1, patch: Callable = lambda: None, agent=False, **changes) -> Job:
        return Job(self.run(name, patch, **changes), self.folder, ranks, agent)

    def straight(self, name: str, ranks: int = 1, **changes) -> tuple[dict[str, str], float]:
        """The files of a run that nothing disturbs, and its seconds."""
        key = f"{name}-{ranks}-{sorted((k, str(v)) for k, v in changes.items() if k != 'out')}"
        if key not in self._straight:
            out, began = self.folder / f"straight-{len(self._straight)}", time.monotonic()
            if note := self.start(name, ranks, **{**changes, "out": out}).refused(codes=(0,)):
                raise RuntimeError(f"{name} does not run: {note}")
            self._straight[key] = helpers.contents(out), time.monotonic() - began
        return self._straight[key]

    def goes_on(self, name: str, ranks: int = 1, like: int | None = None, **changes) -> str:
        """The same command again must end well, in the bytes of a straight run (of `like` processes) and no other file.
        What is wrong, if not.
        """
        expected = self.straight(name, like or ranks, **changes)[0]
        if note := self.start(name, ranks, **changes).refused(codes=(0,)):
            return f"the next start: {note}"
        got = helpers.contents(Path(changes["out"]))
        other = sorted(n for n in expected.keys() | got.keys() if expected.get(n) != got.get(n))
        shutil.rmtree(changes["out"])
        return f"other files than a straight run's: {', '.join(other[:3])}" if other else ""


def logged(out: Path) -> int:
    """Steps in metrics.jsonl."""
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def saved(out: Path) -> int:
    """The step of the newest checkpoint."""
    return max((int(p.parent.name[5:]) for p in out.glob("checkpoints/step-*/MANIFEST.json")), default=0)


def kill_some(job: Job, draw: random.Random) -> None:
    """`kill -9` to a process of the job, of several to one of them or to all, its agent too."""
    pid = job.pids[0]
    with contextlib.suppress(OSError):  # it has ended
        if job.agent:
            job.started = list(map(int, read_text(Path(f"/proc/{pid}/task/{pid}/children")).split()))
        one = draw.choice([*job.started, pid])
        os.killpg(pid, signal.SIGKILL) if one == pid else os.kill(one, signal.SIGKILL)


def ended(pid: int) -> bool:
    """Whether there is no such process any more, or nobody has asked for its exit code."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"Z"
    return True


def hung(codes: set[int | str], out: Path) -> str:
    """What is wrong if a killed job did not end. Not if all was made before: torch's agent of forked functions, but not
    torchrun's, waits for ever when one of them is killed while it waits for the others' end.
    """
    return "a process did not end" if "alive" in codes and not (out / "MANIFEST.json").exists() else ""


def begun(job: Job, out: Path) -> bool:
    """Whether its first step is logged, or it has ended."""
    return logged(out) > 0 or job.poll()


def some(full: int, share: float) -> range:
    return range(max(1, round(full * share)))


def evenly(things, share: float) -> list:
    things = list(things)
    return [things[i * len(things) // len(some(len(things), share))] for i in some(len(things), share)]


def at_call(owner, name: str, call: int, act: Callable, ever: bool = False) -> None:
    """From now on call number `call` of owner.name, from 0, is act(original, …); ever: and all after it."""
    original, calls = getattr(owner, name), iter(range(10**9))

    @functools.wraps(original)
    def counted(*args, **kwargs):
        n = next(calls)
        return act(original, *args, **kwargs) if n == call or (ever and n > call) else original(*args, **kwargs)

    setattr(owner, name, counted)


def dies(*args, **kwargs) -> None:
    """An `at_call` in which the process ends."""
    os._exit(9)


# ---- C: kills, signals, full disks, damage ---------------------------------------------------------------------------


def c1(bench: Bench, share: float, draw: random.Random) -> Iterator[Case]:
    """`kill -9` at random instants of training and saving; every fifth is torchrun of two: one of them or all"""
    for i in some(200, share):
        name, ranks, out = TRAINED[i % 4], 1 + (i % 5 == 4), bench.folder / str(i)
        changes = dict(steps=12, save_every=3, out=out)
        seconds, codes = bench.straight(name, ranks, **changes)[1], {0}
        while codes == {0}:  # it ended before it could be killed
            shutil.rmtree(out, ignore_errors=True)
            job = bench.start(name, ranks, agent=ranks > 1, **changes)
            time.sleep(delay := draw.uniform(0, seconds + 0.5 * (ranks > 1)))
            kill_some(job, draw)
            codes = job.wait()
        step = logged(out)
        lost = 0 if (out / "MANIFEST.json").exists() else step - saved(out)
        note = f"{lost} steps lost" if lost > 3 else hung(codes, out)
        yield f"{name} of {ranks}, killed at {delay:.2f} s, step {step}", note or bench.goes_on(name, ranks, **changes)


CHANGING = {"open", "write", "fsync", "replace", "rename", "mkdir", "rmdir", "unlink", "chmod", "lockf", "truncate"}
CHANGING |= {"serialize_file", "close", "flush"}
BELOW = ("/runtime/", "shutil.py", "pathlib.py", "/safetensors/")  # whose calls


def killed_at(moment: int, run: Callable[[], None]) -> None:
    """run(), killed before or after a call that may change a file, at the moment of that number since the run's folder
    was opened. Prints how many there are where it is not killed.
    """
    moments, begin = iter(range(10**9)), Run.__init__

    def watch(frame, event, function) -> None:
        if event in ("c_call", "c_return") and getattr(function, "__name__", "") in CHANGING:
            if any(part in frame.f_code.co_filename for part in BELOW) and next(moments) == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    Run.__init__ = lambda *args, **kwargs: (sys.setprofile(watch), begin(*args, **kwargs))[1]
    run()
    sys.setprofile(None)
    print("moments:", next(moments))


def c2(bench: Bench, share: float, draw: random.Random) -> Iterator[Case]:
    """`kill -9` before and after every call that may change a file while run.json, three checkpoints and the result are
    written
    """
    changes = dict(steps=4, save_every=1, out=bench.folder / "out")
    run = bench.run("sft", **changes)
    counted = Job(partial(killed_at, -1, bench.run("sft", **{**changes, "out": bench.folder / "all"})), bench.folder)
    counted.wait()
    for moment in evenly(range(int(counted.said.split()[-1])), share):
        job = Job(partial(killed_at, moment, run), bench.folder)
        note = job.refused(codes=(-signal.SIGKILL,))
        yield f"moment {moment}", note or bench.goes_on("sft", **changes)


def left(mark: str, count: int) -> bool:
    """Whether so many processes have a word in the environment that they were started with."""
    found = 0
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            found += mark.encode() in path.read_bytes()
    return found == count


def c3(bench: Bench, share: float, draw: random.Random) -> Iterator[Case]:
    """SIGTERM and Ctrl-C: a checkpoint at the end of the step, one line, exit 143 or 130, and the next start goes on;
    every fifth by torchrun. No decoder of prepare.py outlives it, whatever ends it
    """
    for i in some(20, share):
        name, ranks, number = TRAINED[i % 4], 1 + (i % 5 == 4), (signal.SIGTERM, signal.SIGINT)[i % 2]
        changes = dict(steps=24, save_every=1000, out=bench.folder / str(i))
        seconds = bench.straight(name, ranks, **changes)[1]
        job = bench.start(name, ranks, agent=ranks > 1, **changes)
        until(begun, job, changes["out"])
        time.sleep(draw.uniform(0, 0.7) * seconds)
        job.send(number)
        codes, step = job.wait(), logged(changes["out"])
        if ranks == 1:
            note = job.refused("interrupted" if codes != {0} else "", (0, 128 + number))
        else:  # the agent ends in a traceback of its own
            told = step == 24 or re.search("interrupted|at the end of this step", job.said)
            note = "" if codes <= {0, 1} and told else job.said[-300:]
        if not note and step not in (saved(changes["out"]), 24):
            note = f"{step} steps were logged, the checkpoint is of step {saved(changes['out'])}"
        yield f"{number.name} to {name} of {ranks}, step {step}", note or bench.goes_on(name, ranks, **changes)
    clips = some_clips(bench.chain, bench.folder / "clips", 30)
    for number in evenly((signal.SIGTERM, signal.SIGINT, signal.SIGKILL), share):
        mark = f"TORTURE={os.getpid()}-{number}"
        patch = partial(os.environ.update, [mark.split("=")])
        job = bench.start("shards", patch=patch, videos=clips, workers=2, out=bench.folder / number.name)
        started = until(left, mark, 2, seconds=30)
        job.send(number)
        note = job.refused(codes=(-number, 128 + number)) if started else "no decoder was started"
        note = note or ("" if until(left, mark, 0, seconds=2) else "a decoder ran on for 2 s")
        yield f"{number.name} to prepare.py", note


def mount(folder: Path, size: int, options: str = "") -> None:
    folder.mkdir(exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"{options}size={size}", "tmpfs", str(folder)]
    subprocess.run(words, check=True, capture_output=True)


def c4(bench: Bench, share: float, draw: random.Random) -> Iterator[Case]:
    """a disk full at ten levels (needs root, to mount it): a line, exit 2; with more space the same command goes on"""
    for i in some(10, share):
        name, disk = ("base", "pairs")[i % 2], bench.folder / f"disk-{i}"
        changes = {**({} if name == "pairs" else SIX), "out": disk / "out"}
        size = sum(path.stat().st_size for path in (bench.chain / name).iterdir())
        size *= 8 if name == "base" else 1  # two checkpoints and a half, each of them three times the weights
        level = 4096 * max(4, int(size * (i + 0.5) / 10 / 4096))
        try:
            mount(disk, level)
        except (OSError, subprocess.CalledProcessError):
            return
        try:
            job = bench.start(name, **changes)
            note = "" if job.wait() == {0} else job.refused("full")
            mount(disk, 10 * size, "remount,")
            case = f"{name}, {level // 1024} KiB{', which was enough' * (job.codes == {0: 0})}"
            yield case, note or bench.goes_on(name, **changes)
        finally:
            subprocess.run(["umount", str(disk)], check=True)


def damages(files: list[Path], flips: int, share: float, draw: random.Random) -> Iterator[tuple]:
    """What is done, to which file, and what it becomes, None: it is gone."""
    for path in evenly(files, share):
        yield f"{path.name} gone", path, None
        yield f"{path.name} empty", path, b""
        yield f"{path.name} and a byte", path, path.read_bytes() + b"\0"
    for i in some(64, share):
        path, part = files[i % len(files)], draw.random()
        yield f"{path.name} cut at {part:.2%}", path, path.read_bytes()[: int(part * path.stat().st_size)]
    for i in some(flips, share):
        path, raw = files[i % len(files)], bytearray(files[i % len(files)].read_bytes())
        at, bit = draw.randrange(len(raw)), draw.randrange(8)
        raw[at] ^= 1 << bit
        yield f"{path.name}: bit {bit} of byte {at}", path, bytes(raw)


STATE = ["state.safetensors", "MANIFEST.json", "metrics.jsonl"]  # of a checkpoint
HALF_MADE = {  # stage -> its options, the call in which it dies, its files, and how many bits are flipped in them
    "sft": (
        SIX,
        (Run, "log", 5),
        [*(f"checkpoints/step-0000004/{n}" for n in STATE), "metrics.jsonl", "run.json"],
        1000,
    ),
    "pairs": ({}, (make_pairs, "write_shard", 2), ["shard-00000.json", "shard-00001.safetensors", "run.json"], 200),
}


def c5(bench: Bench, share: float, draw: random.Random) -> Iterator[Case]:
    """damage to what a half-made run believes (the newest checkpoint, the log, shards, run.json): gone, empty, longer,
    cut, one bit flipped. A checkpoint is named and the one before is taken; the rest is made again, or refused by name
    """
    for stage, (changes, call, names, flips) in HALF_MADE.items():
        kept, changes = bench.folder / f"kept-{stage}", {**changes, "out": bench.folder / "out"}
        bench.start(stage, patch=partial(at_call, *call, dies), **changes).wait()
        changes["out"].rename(kept)
        for what, path, raw in damages([kept / name for name in names], flips, share, draw):
            shutil.copytree(kept, changes["out"])
            place = changes["out"] / path.relative_to(kept)
            place.unlink() if raw is None else place.write_bytes(raw)
            job = bench.start(stage, **changes)
            words = "step-0000004" if path.parent.name == "step-0000004" else ""
            note = job.refused(words, (0, 2)) or (job.refused("run.json|other files") if job.codes == {0: 2} else "")
            yield f"{stage}, {what}", note or (bench.goes_on(stage, **changes) if job.codes == {0: 0} else "")
            shutil.rmtree(changes["out"], ignore_errors=True)


# ---- D: the same run, cut, and by more processes ---------------------------------------------------------------------


def d1(bench: Bench, share: float, draw: random.Random) -> Iterator[Case]:
    """40 steps, cut after a random one and resumed: weights and log of 40 steps straight, bit for bit"""
    for i in some(20, share):
        name, step = TRAINED[i % 4], draw.randint(1, 39)
        changes = dict(steps=40, save_every=7, out=bench.folder / "out")
        note = bench.start(name, patch=partial(at_call, Run, "log", step, dies), **changes).refused(codes=(9,))
        yield f"{name}, cut after {step}", note or bench.goes_on(name, **changes)


def shares(n: int, world: int, step: int) -> list[list[list[int]]]:
    """The samples of n that each of `world` processes reads at a step of batch 8, forward by forward."""
    cfg = types.SimpleNamespace(batch_size=8, micro_batch=0, seed=0)
    runs = [types.SimpleNamespace(group=Group(rank, world), stage="sft") for rank in range(world)]
    return [micro_batches(n, step, cfg, run, flow.generator) for run in runs]


def d2(bench: Bench, share: float, draw: random.Random) -> Iterator[Case]:
    """1, 2, 4 and 8 processes read the same samples at each step, in the same order"""
    orders = {world: [sum(sum(shares(23, world, step), []), []) for step in range(20)] for world in (1, 2, 4, 8)}
    for world, order in orders.items():
        yield f"{world} processes", "" if order == orders[1] else "another order"


def d3(bench: Bench, share: float, draw: random.Random) -> Iterator[Case]:
    """1 … 33 samples for 1, 2, 4 and 8 processes: all have forwards of equal number and size at each step, and each
    epoch reads every sample once
    """
    for n, world in evenly([(n, world) for world in (1, 2, 4, 8) for n in range(1, 34)], share):
        steps = [shares(n, world, step) for step in range(n)]  # eight epochs
        even = all([*map(len, own)] == [*map(len, step[0])] for step in steps for own in step)
        order = sum(sum(sum(steps, []), []), [])
        whole = all(sorted(order[k : k + n]) == [*range(n)] for k in range(0, 8 * n, n))
        yield f"{n} samples, {world} processes", "" if even and whole else "an epoch misses some" if even else "uneven"


# ---- F, G, J: several processes --------------------------------------------------------------------------------------

KINDS = ("exception", "kill -9", "SIGSTOP")
PLACES = {"loading": (sft, "build", 0), "step": (flow, "draw_noise", 3), "saving": (Run, "save", 0)}


def strike(kind: str, place: str, bad: int) -> None:
    """A patch: in the middle of its work something befalls the process of rank `bad`."""

    def act(*args, **kwargs):
        if kind == "exception":
            raise ZeroDivisionError
        os.kill(os.getpid(), signal.SIGKILL if kind == "kill -9" else signal.SIGSTOP)

    if os.environ.get("RANK") == str(bad):
        at_call(*PLACES[place], act)


def f1(bench: Bench, share: float, draw: random.Random) -> Iterator[Case]:
    """an exception, `kill -9` or SIGSTOP in one process of torchrun's two or three: the job is down within 60 s, and
    has named the rank
    """
    faults = [(kind, "step", bad, ranks) for ranks in (2, 3) for bad in range(ranks) for kind in KINDS]
    faults += [(kind, place, bad, 2) for place in ("loading", "saving") for bad in (0, 1) for kind in KINDS[:2]]
    for i, (kind, place, bad, ranks) in enumerate(evenly(faults, share)):
        changes = dict(steps=40, save_every=2, batch_size=12, step_timeout=5.0, out=bench.folder / str(i))
        began = time.monotonic()
        job = bench.start("sft", ranks, partial(strike, kind, place, bad), agent=True, **changes)
        codes, spent = job.wait(), time.monotonic() - began
        named = re.search(rf"\branks? [\d, ]*\b{bad}\b", job.said)  # by another process
        if kind != "SIGSTOP":  # or by torchrun
            named = named or re.search(rf"rank\s*:\s*{bad}\b[^:]*exitcode\s*:\s*(1|-9)\b", job.said)
        note = "it was not down in 60 s" if "alive" in codes else "exit 0" if codes == {0} else ""
        note = note or ("" if named else f"no rank {bad}: {job.said[-300:]}")
        yield f"{kind} in {place}, rank {bad} of {ranks}, {spent:.0f} s", note


def g1(bench: Bench, share: float, draw: random.Random) -> Iterator[Case]:
    """pairs and shards, made by up to four processes of which some are killed, five times over: none twice, none lost,
    the bytes of one process
    """
    clips = some_clips(bench.chain, bench.folder / "clips", 12)
    options = {"pairs": dict(shard_size=1), "shards": dict(shard_size=2, workers=1, videos=clips)}
    for i in some(20, share):
        name, kills, note = ("pairs", "shards")[i % 2], 0, ""
        changes = {**options[name], "out": bench.folder / "out"}
        seconds = bench.straight(name, **changes)[1]
        for ranks in draw.choices((1, 2, 3, 4), k=5):
            job = bench.start(name, ranks, agent=ranks > 1, **changes)
            time.sleep(draw.uniform(0, seconds + 0.5 * (ranks > 1)))
            kill_some(job, draw)
            codes = job.wait()
            kills += codes != {0}
            note = note or hung(codes, changes["out"])
        yield f"{name}, {kills} kills", note or bench.goes_on(name, draw.randint(1, 4), like=1, **changes)


def two_jobs(bench: Bench, share: float, draw: random.Random) -> Iterator[Case]:
    """two commands in one --out, at once or one after the other: one works, the other ends with a line and exit 2, the
    log is not doubled; and an --out that is moved away ends its run with a line
    """
    long = dict(steps=40, save_every=5)
    for i in some(24, share):
        name, changes = TRAINED[i // 2 % 4] if i % 3 else "pairs", dict(out=bench.folder / "out")
        changes |= dict(shard_size=1) if name == "pairs" else long
        delay = draw.uniform(0, 0.8) * bench.straight(name, **changes)[1] * (i % 2)
        jobs = [bench.start(name, **changes)]
        time.sleep(delay)
        jobs.append(bench.start(name, **changes))
        for job in jobs:
            until(job.poll)
        notes = [job.refused("" if job.codes == {0: 0} else "another", (0, 2)) for job in jobs]
        if [job.codes[0] for job in jobs].count(0) != 1 and "finished already" not in jobs[1].said:
            notes.append("both ended well, or neither")
        yield f"{name}, {delay:.2f} s apart", "; ".join(filter(None, notes)) or bench.goes_on(name, **changes)
    for name in evenly(TRAINED, share):
        out = bench.folder / f"gone-{name}"
        job = bench.start(name, out=out, steps=20_000, save_every=5)
        until(begun, job, out)
        out.rename(bench.folder / f"moved-{name}")
        began, note = time.monotonic(), job.refused(re.escape(str(out)))
        yield f"--out of {name} moved", note or ("" if time.monotonic() - began < 5 else "it took more than 5 s")


# ---- N: NaN ----------------------------------------------------------------------------------------------------------


def unsound(out: Path) -> str:
    """The first tensor below a folder that is not finite."""
    for path in out.rglob("*.safetensors"):
        for name, tensor in load_file(path).items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                return f"{path.name} holds a {name} that is not finite"
    return ""


def poisoned(bench: Bench, stage: str, file: str, tensor: str, value: float) -> Path:
    """A sealed copy of a stage's folder in which a tensor, each sample's, is not finite."""
    at = bench.folder / f"poisoned-{stage}-{tensor.replace('*', '')}-{value}"
    shutil.copytree(bench.chain / stage, at)
    path = at / file
    with safe_open(path, "pt") as opened:
        told = json.loads((opened.metadata() or {}).get("dynamicsboost", "{}"))
    told.pop("sha256", None)  # a file without a checksum is believed
    held = load_file(path)
    spoilt = held[next(name for name in held if re.search(tensor, name))]
    spoilt.view(len(spoilt), -1)[:, 0] = value
    save_file(held, path, {"dynamicsboost": json.dumps(told)} if told else None)
    manifest = read_json(at / "MANIFEST.json")
    write_manifest(at, [*manifest["files"]], **{k: v for k, v in manifest.items() if k not in ("files", "seal")})
    return at


POISON = [  # stage that reads it, its option, folder, file, tensor
    ("base", "data", "shards", "shard-00000.safetensors", "x0"),
    ("sft", "data", "shards", "shard-00001.safetensors", "text$"),
    ("asymdpo", "pairs", "pairs", "shard-00000.safetensors", "chosen"),
    ("asymdpo", "pairs", "pairs", "shard-00001.safetensors", "rejected"), ("sft", "base", "base", WEIGHTS, "q.weight"),
    ("asymdpo", "sft", "sft", "lora.safetensors", "B"),
    ("pairs", "continuation", "continuation", "lora.safetensors", "A"),
    ("pairs", "continuation", "continuation", "task_prompt.safetensors", ""),
]  # fmt: skip


def spoil(value: float, call: int, ever: bool, bad: int, gradient: int) -> None:
    """A patch: the loss of a step of one rank, or its gradient alone, is multiplied by `value`."""

    def act(original, *args):
        losses = original(*args)
        if gradient:
            losses.register_hook(lambda g: g * value)
        return losses if gradient else losses * value

    if os.environ.get("RANK", "0") == str(bad):
        at_call(sft, "flow_loss", call, act, ever)


def spoil_the_last(value: float, bad: int, gradient: bool) -> None:
    """A patch: `spoil` the sixth step; what is in checkpoints/ at the end stays, in kept/ beside the run."""

    def act(finish, run, *args, **kwargs):
        if run.group.main:
            shutil.copytree(run.folder / "checkpoints", run.folder.parent / "kept", dirs_exist_ok=True)
        finish(run, *args, **kwargs)

    spoil(value, 5, False, bad, gradient)
    at_call(Run, "finish", 0, act)


def n1(bench: Bench, share: float, draw: random.Random) -> Iterator[Case]:
    """NaN and infinity: an input is refused by name; in loss or gradient, of one process of two too, the step changes
    no weight and is told; three in a row end the run with exit 3, its last checkpoint whole; nothing of it is sealed
    """
    for i, (stage, flag, folder, file, tensor) in enumerate(evenly(POISON, share)):
        at, out = poisoned(bench, folder, file, tensor, (math.nan, math.inf)[i % 2]), bench.folder / f"input-{i}"
        job = bench.start(stage, **{flag: at, "out": out, **({} if stage == "pairs" else SIX)})
        yield f"{stage} --{option}, {tensor or 'prompt'}", job.refused("finite|NaN") or unsound(out)
    kinds = [(value, gradient, ranks) for value in (math.nan, math.inf) for gradient in (0, 1) for ranks in (1, 2)]
    for i, (value, gradient, ranks) in enumerate(evenly(kinds, share)):
        what, out = f"{value} in {('loss', 'gradient')[gradient]} of {ranks}", bench.folder / f"step-{i}"
        last = partial(spoil_the_last, value, ranks - 1, gradient)
        job = bench.start("base", ranks, last, out=out, steps=6, save_every=5)
        note = job.refused("finite|NaN", (0,)) or unsound(out)
        if not note:
            before, after = load_file(bench.folder / "kept/step-0000005/state.safetensors"), load_file(out / WEIGHTS)
            same = all(torch.equal(before[f"param/{name}"], a) for name, a in after.items())
            note = "" if same else "the step changed a weight"
        yield f"{what}, the last step", note
        out = bench.folder / f"ever-{i}"
        changes = dict(steps=8, save_every=4, out=out)
        job = bench.start("base", ranks, partial(spoil, value, 4, True, ranks - 1, gradient), **changes)
        note = job.refused("finite|NaN", (3,)) or unsound(out) or ("" if saved(out) else "no checkpoint is left")
        yield f"{what}, every step", note or bench.goes_on("base", ranks, **changes)
    for lr in evenly((1e3, math.nan, math.inf, -1.0), share):
        job = bench.start("sft", out=bench.folder / f"lr-{lr}", steps=40, save_every=2, lr=lr, warmup=1)
        yield f"--lr {lr}", job.refused("", (0, 3) if lr == 1e3 else (2,)) or unsound(bench.folder / f"lr-{lr}")


def n2(bench: Bench, share: float, draw: random.Random) -> Iterator[Case]:
    """NaN and infinity in the frames that winner and loser share: loss and gradients are what they are without"""
    for form, value in [(form, value) for form in ("inside", "outside") for value in (math.nan, math.inf, 1e30)]:
        cfg = asymdpo.resolve(asymdpo.Config(form=form, sft_weight=1.0), asymdpo.PRESETS)
        made, n1, found = torch.Generator().manual_seed(0), torch.tensor([1, 3]), []
        sides = [torch.randn(2, 4, 6, 2, 2, generator=made) for _ in range(6)]
        shared = torch.arange(6)[:, None, None] < n1[:, None, None, None, None]
        for inputs in (sides, [torch.where(shared, value, a) for a in sides]):
            inputs = [a.clone().requires_grad_() for a in inputs]
            loss = asymdpo.asymdpo_loss(cfg, inputs, n1, n1 + 2)[0]
            found.append((loss, *torch.autograd.grad(loss.sum(), inputs[:2])))
        same = all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*found))
        yield f"{value}, {form}", "" if same else "loss or gradient changed"


# ---- S, V: hostile files ---------------------------------------------------------------------------------------------


class Evil:
    """Unpickled, it calls a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def read_pth(path: Path) -> None:
    sys.argv = ["read", f"--base={path}"]
    program(lambda cfg: [*Checkpoint(cfg.base).items()], sft.Config, "")


def s1(bench: Bench, share: float, draw: random.Random) -> Iterator[Case]:
    """pickles that run code, as .pth of weights: refused by name, and nothing is run"""
    mark, path = str(bench.folder / "mark"), bench.folder / "evil.pth"
    evils = [Evil(os.system, f"touch {mark}"), Evil(subprocess.call, ["touch", mark]), Evil(open, mark, "w")]
    evils += [Evil(eval, f"open({mark!r}, 'w')"), Evil(exec, f"open({mark!r}, 'w')"), Evil(os.mkdir, mark)]
    for evil in evils:
        for held in (evil, {"w": torch.ones(2), "evil": evil}, pickle.dumps(evil)):
            path.write_bytes(held) if isinstance(held, bytes) else torch.save(held, path)
            job = Job(partial(read_pth, path), bench.folder)
            note = job.refused("evil.pth")
            yield f"{evil.call[0].__name__} in {type(held).__name__}", "it was run" if Path(mark).exists() else note


class Server(http.server.BaseHTTPRequestHandler):
    """Notes what it is asked for."""

    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_error(404)

    def log_message(self, *words) -> None:
        """Says nothing."""


def hostile_names(home: Path, port: int) -> list[str]:
    """What may stand in a table as a video of the folder home; secret.mp4 beside home is no part of it."""
    secret, server = home.parent / "secret.mp4", f"http://127.0.0.1:{port}"
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n"
    texts = {
        "m3u8": playlist.format(secret), "m3u8, server": playlist.format(f"{server}/a.ts"),
        "ffconcat": f"ffconcat version 1.0\nfile {secret}\n", "relative": "ffconcat version 1.0\nfile ../secret.mp4\n",
        "ffconcat, server": f"ffconcat version 1.0\nfile {server}/a.mp4\n",
        "sdp": f"v=0\nc=IN IP4 127.0.0.1\nm=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        "dash": f'<?xml version="1.0"?><MPD type="static"><Period><BaseURL>{server}/</BaseURL></Period></MPD>',
    }  # fmt: skip
    links = {"link": secret, "link, relative": "../secret.mp4", "itself": "itself.mp4", "nowhere": "nothing.mp4",
             "device": "/dev/zero", "memory": "/proc/self/mem"}  # fmt: skip
    for name, text in texts.items():
        (home / f"{name}.mp4").write_bytes(text.encode())
    for name, to in links.items():
        (home / f"{name}.mp4").symlink_to(to)
    (home / "out").symlink_to(home.parent)
    os.mkfifo(home / "fifo.mp4")
    (home / "folder.mp4").mkdir()
    schemes = ("file:", "file://", "concat:", "subfile,,start,0,end,0,,:", "cache:", "async:")
    return [
        *(f"{name}.mp4" for name in [*texts, *links, "fifo", "folder"]), *(f"{scheme}{secret}" for scheme in schemes),
        "out/secret.mp4", "./out/secret.mp4", str(secret), "../secret.mp4", "a/../../secret.mp4", "./../secret.mp4",
        "..\\secret.mp4", "~/secret.mp4", f"{server}/a.mp4", f"hls+{server}/a.m3u8", f"tcp://127.0.0.1:{port}",
        "pipe:0", "data:,a", "/dev/zero", "/dev/stdin", "-i", "", ".", "..", "a" * 300 + ".mp4", "a/" * 3000 + "b.mp4",
        "a\0b.mp4", "%03d.mp4",
    ]  # fmt: skip


def s2(bench: Bench, share: float, draw: random.Random) -> Iterator[Case]:
    """names in a table that lead elsewhere, playlists that FFmpeg would follow, links, devices, captions that are no
    text: each row is rejected by itself, nothing outside is read, and no server is asked
    """
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    clips = some_clips(bench.chain, bench.folder / "clips", 2)
    good = sorted(path.stem for path in clips.glob("*.mp4"))
    shutil.copy(clips / f"{good[0]}.mp4", bench.folder / "secret.mp4")
    rows = {name[:40]: f'"{name}","a ball falls"\r\n'.encode() for name in hostile_names(clips, server.server_port)}
    rows["no UTF-8"], rows["twice"] = (f"{good[0]}.mp4,{text}\r\n".encode("latin-1") for text in ("caf\xe9", "a ball"))
    table = (clips / "metadata.csv").read_bytes()
    for name, row in evenly(rows.items(), share):
        (clips / "metadata.csv").write_bytes(table + row)
        Server.asked.clear()
        out = bench.folder / "out"
        job = bench.start("shards", videos=clips, bad_rows="reject", out=out, workers=1, deadline=5.0)
        note = job.refused(codes=(0,))
        if not note and (kept := sorted(row["id"] for row in Shards(out, "prepare.py").rows)) != good:
            note = f"read: {kept}"
        elif not note and not read_jsonl(out / "rejects.jsonl"):
            note = "no reason is given"
        yield name, f"a server was asked for {Server.asked[0]}" if Server.asked else note
        shutil.rmtree(out, ignore_errors=True)
    server.shutdown()
    (bench.folder / "secret.txt").write_bytes(b"video,caption\nball-00000.mp4,a red secret falls\n")
    for name in evenly(("metadata.csv", f"{good[0]}.txt"), share):
        home, out = bench.folder / "beside", bench.folder / "out"
        shutil.copytree(clips, home, symlinks=True, ignore=lambda _, names: set(names) - {f"{n}.mp4" for n in good})
        (home / f"{good[1]}.txt").write_bytes(b"a ball falls")
        (home / name).symlink_to(bench.folder / "secret.txt")
        bench.start("shards", videos=home, bad_rows="reject", out=out, workers=1).wait()
        read = any("red secret" in read_text(path) for path in out.glob("shard-*.json"))
        yield f"{name}, a link out", "it was read" if read else ""
        shutil.rmtree(home)
        shutil.rmtree(out, ignore_errors=True)


def right_or_refused(decoder: video.Decoder, case: hostile.Case, frames: int, size=None, fps=None) -> str:
    """Every picture of the first clip is the one that the file shows at its time, or there is a reason why there is no
    clip. What is wrong, if not.
    """
    began, expected = time.monotonic(), case.expected(frames, fps)
    twice = sum(a == b for a, b in zip(expected or [], (expected or [])[1:])) if fps else 0
    unfit = case.must == "refuse" or expected is None or case.must == "read" and twice > 0.1 * frames
    try:
        clip = decoder.read(case.path, frames, size, fps)[0]
        wrong = case.wrong(clip.frames, expected, stretched=size is None)
        wrong += [case.numbers[i] for i in clip.index] != expected or size not in (None, clip.frames.shape[1:3])
        note = f"{wrong} wrong frames" if wrong else "it was read" if unfit else ""
    except video.BadVideo as error:
        note = "" if unfit or case.must == "either" else f"a healthy file was refused: {error}"
    return note or ("" if time.monotonic() - began < 10 else "it took more than 10 s")


def v1(bench: Bench, share: float, draw: random.Random) -> Iterator[Case]:
    """classes of videos, healthy, odd and damaged: every frame that is read is the right one, or the file is refused"""
    with video.Decoder(8.0) as decoder:
        for name in evenly(hostile.CASES, share):
            case = hostile.make(name, bench.folder)
            notes = [right_or_refused(decoder, case, *way) for way in ((49, None, None), (17, (96, 120), 16))]
            yield name, "; ".join(filter(None, notes))


def v2(bench: Bench, share: float, draw: random.Random) -> Iterator[Case]:
    """videos with random cuts and flipped bits: the reader lives, in time, and what it reads of a cut file is right"""
    names = evenly(
        ("25 fps", "HEVC", "VP9", "AV1", "B-frames, MPEG-4", "MPEG-2, ts", "Motion JPEG", "alpha, FFV1"), share
    )
    with video.Decoder(8.0) as decoder:
        for name in names:
            case = replace(hostile.make(name, bench.folder), must="either")
            whole = case.path.read_bytes()
            for k in draw.sample(range(10**6), len(some(500, share)) // len(names)):
                case.path.write_bytes(hostile.spoil(whole, k))
                note = right_or_refused(decoder, case, 33)
                yield f"{name}, damage {k}", note if k % 2 or "wrong" not in note else ""


class Spinning(video.Decoder):
    program = [sys.executable, "-c", hostile.SPIN]


def v3(bench: Bench, share: float, draw: random.Random) -> Iterator[Case]:
    """a decoder that spins for ever while it holds Python's lock: killed at its deadline, and the next file is read"""
    healthy = hostile.make("B-frames", bench.folder)
    shutil.copy(healthy.path, bench.folder / "spin.mp4")
    with Spinning() as decoder:
        for i in some(100, share):
            began, decoder.deadline, note = time.monotonic(), 0.3, "it was read"
            try:
                decoder.read(bench.folder / "spin.mp4", 49)
            except video.BadVideo as error:
                note = "" if "0.3 s" in str(error) and time.monotonic() - began < 3 else str(error)
            decoder.deadline = 8.0
            yield f"time {i}", note or right_or_refused(decoder, healthy, 49)


def small(seconds: float, peak: int) -> str:
    return f"it took {seconds:.0f} s" if seconds > 20 else f"it took {peak / 2**30:.1f} GiB" if peak > 2**30 else ""


def v4(bench: Bench, share: float, draw: random.Random) -> Iterator[Case]:
    """bombs: videos of gigabytes once decoded, a header of 100,000 tensors, a header that lies, 100 MB in one cell:
    read right or refused in a line, in 20 s and 1 GiB
    """
    header = {f"t{i}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i in range(100_000)}
    raw = json.dumps(header).encode()
    files = {
        "100,000 tensors": len(raw).to_bytes(8, "little") + raw + bytes(400_000),
        "a header of 2^60 bytes": b"\0" * 7 + b"\x10{}",
    }
    jobs = {}
    for name, content in files.items():
        base = bench.folder / name
        base.mkdir()
        shutil.copy(bench.chain / "base/config.json", base)
        (base / WEIGHTS).write_bytes(content)
        jobs[name] = dict(name="sft", base=base)
    clips = some_clips(bench.chain, bench.folder / "clips", 2, ("huge.mp4", "a" * 10**8))
    jobs["100 MB in a cell"] = dict(name="shards", videos=clips)
    for name, changes in jobs.items():
        began, own = time.monotonic(), int(read_text(Path("/proc/self/statm")).split()[1]) * 4096
        job = bench.start(**changes, out=bench.folder / f"out {name}")
        yield name, job.refused() or small(time.monotonic() - began, job.peak - own)
    with video.Decoder(8.0) as decoder:
        for name in (name for name in hostile.CASES if name.startswith("bomb")):
            case, began = replace(hostile.make(name, bench.folder), must="either"), time.monotonic()
            note = right_or_refused(decoder, case, 49)
            status = read_text(Path(f"/proc/{decoder._process.pid}/status"))
            yield name, note or small(time.monotonic() - began, int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024)


# ---- all of them -----------------------------------------------------------------------------------------------------

ROWS: dict[str, Callable[[Bench, float, random.Random], Iterator[Case]]] = {
    "C1": c1, "C2": c2, "C3": c3, "C4": c4, "C5": c5, "D1": d1, "D2": d2, "D3": d3, "F1": f1, "G1": g1, "N1": n1,
    "N2": n2, "S1": s1, "S2": s2, "V1": v1, "V2": v2, "V3": v3, "V4": v4, "two jobs": two_jobs,
}  # fmt: skip
ORDER = ("C5", "G1", "C1", "C2", "F1", "V3")  # the longest first, so that two at a time end together


def make_chain(root: Path) -> Path:
    """The smallest run of every stage, in a process of its own: this one forks, so it starts no threads."""
    job = Job(lambda: [helpers.run_stage(root, name) for name in helpers.STAGES if name != "eval"], root)
    if job.wait(10 * LIMIT) != {0}:
        raise RuntimeError(f"the chain of stages does not run: {job.said}")
    return root


def tried(name: str, chain: Path, folder: Path, share: float, seed: int) -> tuple[list[Case], float]:
    """A row's cases, and its seconds. An error in the row is a case that is lost."""
    began, cases, home = time.monotonic(), [], folder / name
    home.mkdir()
    torch.set_num_threads(1)
    try:
        cases.extend(ROWS[name](Bench(chain, home), share, random.Random(seed)))
    except Exception:
        cases.append(("the row itself", traceback.format_exc()[-600:]))
    shutil.rmtree(home, ignore_errors=True)
    return cases, time.monotonic() - began


def line(row: str, cases: list[Case], spent: float) -> str:
    """What the terminal shows of a row, with the first cases that it lost."""
    bad = [case for case in cases if case[1]]
    count = f"{len(cases):5d} tried{len(cases) - len(bad):5d} held{len(bad):4d} lost" if cases else "skipped (no root)"
    return "\n".join([f"{row:9s}{count}{spent:6.0f} s", *(f"   {name}: {note}" for name, note in bad[:5])])


def page(found: dict[str, tuple[list[Case], float]], words: str) -> str:
    """docs/reliability.md."""
    table, misses = ["| | what | tried | held | lost | s |", "|---|---|---|---|---|---|"], []
    for row, (cases, spent) in found.items():
        bad, what = [case for case in cases if case[1]], " ".join(ROWS[row].__doc__.split())
        count = f"{len(cases) or 'skipped'} | {len(cases) - len(bad)} | {len(bad)}"
        table.append(f"| {row} | {what} | {count} | {spent:.0f} |")
        misses += [f"* {row}, {' '.join(f'{name}: {note}'.split())[:300]}" for name, note in bad[:5]]
    notes = [note for cases, _ in found.values() for _, note in cases]
    total, lost = len(notes), len([*filter(None, notes)])
    machine = f"{platform.system()}, {os.cpu_count()} cores, torch {torch.__version__}"
    return f"""# What it withstands

Written by `{words}` on {time.strftime("%Y-%m-%d")}: commit {commit()},
{machine}. {total:,} cases, {total - lost:,} held, {lost} lost, with the smallest chain of stages at
the preset tiny. `make torture` tries every row in ten minutes and writes this page; `python -m
bench.torture --rows C1,N1 --share 0.1` a tenth of two rows. `make test` tries a few cases of each.

A case holds if the next start of the same command ends in the bytes of a run that nothing
disturbed, or the command refuses in a line that names the cause, without a traceback, with its exit
code. One that takes more than 60 s is lost.

{chr(10).join(table)}

## Lost

{chr(10).join(misses) or "Nothing."}

## Not covered

* A GPU, NCCL, several machines, a network's file system.
* A power cut: files are synced before they are renamed, but a kill does not show whether.
* A process that is stopped (SIGSTOP) while all load or save: the others wait, and name it after a minute.
* Flipped bits in a video that its decoder takes for pictures: `docs/videos.md` counts them.
"""


@dataclass(frozen=True)
class Config:
    """Tries rows."""

    rows: str = ""  # rows to try, separated by commas; empty: every row
    share: float = option(1.0, above=0, most=1)  # share of each row's cases
    seed: int | None = option(**SEED)  # of random instants and damage; not given: another one each time
    jobs: int = option(2, least=1)  # rows at a time


def main() -> int:
    cfg = arguments(Config, __doc__)
    seed = int(time.time()) % 10**6 if cfg.seed is None else cfg.seed
    names = [name.strip() for name in cfg.rows.split(",")] if cfg.rows else list(ROWS)
    if unknown := set(names) - ROWS.keys():
        print(f"error: --rows: expected some of {', '.join(ROWS)}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    found: dict[str, tuple[list[Case], float]] = {}
    pool = ProcessPoolExecutor(cfg.jobs, multiprocessing.get_context("fork"))
    with tempfile.TemporaryDirectory() as scratch, pool:
        chain = Path(scratch, "chain")
        chain.mkdir()
        make_chain(chain)
        print(f"seed {seed}", flush=True)
        order = sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
        rows = {pool.submit(tried, name, chain, Path(scratch), cfg.share, seed): name for name in order}
        for row in as_completed(rows):
            found[rows[row]] = row.result()
            print(line(rows[row], *found[rows[row]]), flush=True)
    if not cfg.rows:
        share = f" --share {cfg.share:g}" if cfg.share != 1 else ""
        words = f"python -m bench.torture --seed {seed}{share}"
        text = page({name: found[name] for name in names}, words)
        (ROOT / "docs/reliability.md").write_text(text, encoding="utf-8")
    return int(any(note for cases, _ in found.values() for _, note in cases))


if __name__ == "__main__":
    sys.exit(main())

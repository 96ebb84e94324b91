"""A stage's output folder: what makes it, what it logs, its checkpoints, its end.

Where `tensorboard` is installed, what goes to metrics.jsonl goes to event files beside it, too, under the same names.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from runtime.files import (
    MANIFEST,
    commit,
    identity,
    is_temporary,
    read_jsonl,
    read_manifest,
    read_sealed,
    read_tensors,
    whole_file,
    write_manifest,
    write_sealed,
    write_tensors,
)
from runtime.group import Group
from runtime.options import UserError, neutral

DRAWS = 3  # changes when a stage's random draws or its checkpoints' form do: what is half made is not gone on with
LOCK, LOG = ".lock", "metrics.jsonl"
EVENTS = "events.out.tfevents.*"  # as TensorBoard names them


class Run:
    """The folder cfg.out: run.json (what makes it), metrics.jsonl, .lock, checkpoints/ or claims/ while it is made,
    results, and MANIFEST.json last.
    """

    def __init__(
        self,
        cfg,
        stage: str,
        group: Group,
        inputs: Mapping[str, str | Path | Sequence[str | Path]] = {},
        times: str = "",
        **digests: str,
    ):
        """Opens cfg.out. `inputs`: option -> finished folder or file, or several, that the result depends on: by what
        is in them, however they are spelled. times: a digest of input files' times, which must not change before the
        folder is finished; `digests`: other things that the result depends on.

        UserError if the folder was made by another stage, configuration or input.
        """
        self.folder, self.stage, self.group = Path(cfg.out), stage, group
        self.started, self.spent = time.time(), 0.0
        self.resumed = 0  # the step that `resume` found
        self.skipped: list[int] = []  # steps that changed nothing, as they were not finite
        left_out = neutral(type(cfg)) | inputs.keys()
        self._defaults = {field.name: field.default for field in dataclasses.fields(cfg)}
        config = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in left_out}
        digests |= {name: _identity(paths) for name, paths in inputs.items() if paths}
        facts = {"stage": stage, "config": config, "inputs": digests, "times": times, "draws": DRAWS}
        self.facts = json.loads(json.dumps(facts))
        self._lock = self._events = None
        self._compare()
        there = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        if not there.is_dir() or not (os.access(there, os.W_OK) or (self.folder / MANIFEST).exists()):
            state = "cannot be written" if there.is_dir() else "is a file"
            raise UserError(f"--out: expected a folder to write, got {self.folder}, and {there} {state}")
        group.wait()

    def claim(self) -> None:
        """Locks the folder until this process ends and writes run.json: from now on it is this run's.

        After all checks, so that a mistake claims nothing. Sweeps what a kill left half-written, and forgets what the
        processes of an earlier start had claimed in `share`. UserError if one of them is alive, or another command
        writes the folder, where the file system has locks.
        """
        if self._lock:
            return
        if self.group.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._hold(fcntl.LOCK_EX)  # nobody else is here
            self._compare()  # what another command wrote since
            if (self.folder / MANIFEST).is_file():
                raise UserError(f"{self.folder}: another command has finished it meanwhile; nothing is left to do")
            shutil.rmtree(self.folder / "claims", ignore_errors=True)
            self._sweep()
            if not (self.folder / "run.json").exists():
                write_sealed(self.folder / "run.json", self.facts)
            self._hold(fcntl.LOCK_SH)
        self.group.wait()
        lock, end = self.folder / LOCK, time.time() + 60
        while not lock.exists():  # a network's file system may show a new file late
            if time.time() > end:
                raise UserError(f"--out: expected a folder that all nodes share, but {lock} is not there")
            time.sleep(1)
        self._hold(fcntl.LOCK_SH)

    def _hold(self, lock: int) -> None:
        """Locks the folder for this process, whose end frees it, whatever ends it."""
        self._lock = self._lock or open(self.folder / LOCK, "a+b")
        try:
            fcntl.lockf(self._lock, lock | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            got = "another command is writing it, or what is left of one"
            raise UserError(f"{self.folder}: {got}; wait for it to end, or end it") from None
        except OSError:  # this file system has no locks
            pass

    def check(self) -> None:
        """UserError if the folder that this process locked is no longer there, or another one is in its place."""
        path = self.folder / LOCK
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(self._lock.fileno())):
            raise UserError(f"{self.folder} was deleted or replaced while {self.stage} wrote it; start it again")

    def _compare(self) -> None:
        """UserError unless the folder is empty, or one that this command began."""
        recipe, half_made = self.folder / "run.json", not (self.folder / MANIFEST).is_file()
        if not recipe.exists():
            if self.folder.is_dir() and any(p.name != LOCK and not is_temporary(p) for p in self.folder.iterdir()):
                got = f"expected an empty folder or an earlier {self.stage} run, got other files; use another --out"
                raise UserError(f"{self.folder}: {got}")
            return
        try:
            before = read_sealed(recipe, old=True)
        except UserError:
            raise UserError(f"{recipe}: expected a run's recipe, got damaged text; delete {self.folder}") from None
        way_out = "use another --out or delete the folder"
        for part, other in (("draws", "another version of this program"), ("times", "files that have changed since")):
            if half_made and before.get(part) != self.facts[part]:
                raise UserError(f"{self.folder} was begun with {other}; {way_out}")
        for part in ("stage", "config", "inputs"):
            old, new = before.get(part), self.facts[part]
            if part == "config" and isinstance(old, dict):
                old = {key: old.get(key, self._defaults[key]) for key in new}  # it may be from before an option came
            if old == new:
                continue
            if isinstance(old, dict) and isinstance(new, dict):
                key = next(k for k in {**old, **new} if old.get(k) != new.get(k))
                old, new, part = old.get(key), new.get(key), f"{part} {key}"
            raise UserError(f"{self.folder} was made with {part} = {old!r}, now {new!r}; {way_out}")

    @property
    def done(self) -> bool:
        """Whether the folder is finished; says so once, and what is in it."""
        finished = (self.folder / MANIFEST).is_file()
        if finished and self.group.main:
            with contextlib.suppress(OSError):  # a folder of others, to be read alone
                self._tidy()  # a kill may have come just before
            try:
                manifest = read_sealed(self.folder / MANIFEST)
                what = self._closing(manifest["files"], manifest["made"])
            except (UserError, KeyError):  # damaged, which whoever reads it is told; or up to 0.9
                what = f"{self.stage}: {self.folder}"
            print(f"{what}: finished already, nothing to do")
        return finished

    def _closing(self, files: Sequence[str], made: str) -> str:
        """What a stage ends with: who made what, where, and its figure."""
        own = [name for name in files if name != LOG]
        return f"{self.stage}: {self.folder / own[0] if len(own) == 1 else self.folder}, {made}"

    def progress(self, items: int, start: int = 0, unit: str = "step", plan: str = "") -> tqdm:
        """A progress bar with rate and time left, on the first process only; first, a line that says what runs.

        plan: what is done in all, in words, for that line.
        """
        self.claim()
        if self.group.main:
            again = f"goes on from {unit} {start:,} of {items:,}" if start else ""
            print(f"{self.stage}: {'; '.join(filter(None, (plan, again, str(self.group))))}", file=sys.stderr)
        return tqdm(
            total=items, initial=start, unit=unit, desc=self.stage,
            disable=not self.group.main, dynamic_ncols=True, mininterval=1.0,
        )  # fmt: skip

    def share(
        self, count: int, unit: str, done: Callable[[int], bool], items: int = 0, lockstep: bool = False
    ) -> Iterator[tuple[int, bool]]:
        """Yields the pieces of work, of 0 … count − 1 but those that are `done`, that this process has to do, and True.
        Each is done when it asks for more.

        A piece goes to the first process that claims it, so a slow process does fewer and holds up nobody. A claim is
        an empty file in claims/, created atomically, with a word in it once the piece is done. Claims hold for one
        start of a command: if a process dies, all end, and the next start takes over at once.

        lockstep: for a network that is split over a node, which its processes must call equally often. They take a
        piece each at the same time. For whom none is left repeats another's, to be dropped: it comes with False.

        It ends when everything is done. The bar counts what all have done, in `items` if those are given.
        """
        claims, others, items = self.folder / "claims", [], items or count
        with self.progress(items, unit=unit) as bar:

            def advance(tried: int) -> None:
                """Shows how much is done, of `tried` pieces in all that somebody claimed."""
                others[:] = [piece for piece in others if not piece.stat().st_size]
                bar.update((tried - len(others)) * items // count - bar.n)

            def claimed() -> Iterator[int]:
                for i in range(count):
                    self.check()
                    try:
                        (claims / str(i)).touch(exist_ok=False)
                    except FileExistsError:
                        others.append(claims / str(i))
                    else:
                        if not done(i):
                            yield i
                        (claims / str(i)).write_bytes(b"done")
                    if self.group.main:
                        advance(i + 1)

            claims.mkdir(exist_ok=True)
            if lockstep:
                own, size, pieces = self.group.place_in_node, self.group.node_size, claimed()
                while some := self.group.from_node_main(list(itertools.islice(pieces, size)) if own == 0 else None):
                    yield (some[own], True) if own < len(some) else (some[0], False)
            else:
                for i in claimed():
                    yield i, True
            self.group.wait(lambda: advance(count) if self.group.main else None)
            if self.group.main:
                advance(count)

    def log(self, step: int, **metrics: float) -> None:
        """Appends a line to metrics.jsonl, and its figures to TensorBoard's events."""
        if self.group.main:
            self.check()
            line, path = json.dumps({"step": step, **metrics}) + "\n", self.folder / LOG
            try:
                with open(path, "a", encoding="utf-8") as f:
                    f.write(line)
            except OSError as error:
                error.filename = str(path)  # an error of writing names no file
                raise
            if self._events:
                for name, value in metrics.items():
                    self._events.add_scalar(name, value, step)
                self._events.flush()  # whatever ends the run, they have what metrics.jsonl has

    def recent(self, name: str) -> float:
        """The mean of what was logged under a name in the last tenth of the lines; NaN if there is none."""
        rows = read_jsonl(self.folder / LOG) if (self.folder / LOG).exists() else []
        values = [row[name] for row in rows[-max(1, len(rows) // 10) :] if name in row]
        return sum(values) / len(values) if values else math.nan

    def _open_events(self, done: int) -> None:
        """Starts an event file after so many steps, if it can: what others hold of later steps no longer counts."""
        if not done:
            for path in self.folder.glob(EVENTS):
                path.unlink()
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(self.folder, purge_step=done + 1 if done else None)

    def save(self, step: int, trained: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Writes parameters, AdamW's state and what was logged to checkpoints/step-N, whole or not at all, and keeps
        the newest two.
        """
        self.claim()
        if self.group.main:
            self.check()
            root = self.folder / "checkpoints"
            fresh = root / f".step-{step:07d}.tmp"
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
            try:
                write_tensors(fresh / "state.safetensors", _pack(trained, optimizer))
                (self.folder / LOG).touch()
                shutil.copyfile(self.folder / LOG, fresh / LOG)
                facts = dict(step=step, seconds=self.seconds, skipped=self.skipped, draws=DRAWS)
                write_manifest(fresh, ["state.safetensors", LOG], **facts)
                shutil.rmtree(root / f"step-{step:07d}", ignore_errors=True)
                os.replace(fresh, root / f"step-{step:07d}")
            except OSError:
                shutil.rmtree(fresh, ignore_errors=True)
                raise
            for old in sorted(root.glob("step-*"))[:-2]:
                shutil.rmtree(old)
        self.group.wait()

    def resume(self, trained: dict[str, Tensor] = {}, optimizer: torch.optim.Optimizer | None = None) -> int:
        """The step of the newest whole checkpoint, which is put into `trained`, optimizer and metrics.jsonl, or 0."""
        self.claim()
        for folder in sorted((self.folder / "checkpoints").glob("step-*"), reverse=True):
            try:
                facts = read_manifest(folder, self.stage, together=False)  # all must come to the same verdict
                state = read_tensors(folder / "state.safetensors")
            except UserError as error:
                print(f"skipping a damaged checkpoint: {error}", file=sys.stderr)
                continue
            self.spent, self.skipped, self.resumed = facts["seconds"], facts["skipped"], facts["step"]
            _unpack(state, trained, optimizer)
            if self.group.main:
                with whole_file(self.folder / LOG) as temporary:
                    shutil.copyfile(folder / LOG, temporary)
                self._open_events(facts["step"])
            self.group.wait()
            return facts["step"]
        if self.group.main:
            (self.folder / LOG).unlink(missing_ok=True)
            self._open_events(0)
        self.group.wait()
        return 0

    @property
    def seconds(self) -> float:
        """Time spent in this run so far, earlier attempts up to their last checkpoint included."""
        return self.spent + time.time() - self.started

    def finish(self, files: list[str], what: str, figure: str = "", **facts) -> None:
        """The first process writes MANIFEST.json over `files` and drops checkpoints and claims: the run is done. It
        says so: what was made, where, in what time, and the figure to know about it.

        The others wait. They do not end before: when all processes of a node have ended, torchrun waits 300 s for other
        nodes (exit_barrier_timeout in torch/distributed/elastic/agent/server/api.py) and then ends there, with the
        rendezvous of all nodes if this node holds it.
        """
        if self.group.main:
            self.check()
            logged = [LOG] if (self.folder / LOG).exists() else []
            facts = {**self.facts, "commit": commit(), "seconds": round(self.seconds, 2), **facts}
            if self.skipped:
                facts["skipped"] = len(self.skipped)
                print(f"{self.stage}: steps that were not finite and changed nothing: {len(self.skipped)}")
            if self._events:
                self._events.close()
            what = re.sub(r"^(1 \w+)s$", r"\1", what)  # one thing
            facts["made"] = f"{what} in {_spoken(self.seconds)}" + f", {figure}" * bool(figure)
            write_manifest(self.folder, files + logged, **facts)
            self._tidy()
            print(self._closing(files, facts["made"]))
        self.group.wait()

    def _tidy(self) -> None:
        """Drops what is of use only while the run is made, and what a kill left half-written."""
        for name in ("checkpoints", "claims"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        self._sweep()
        (self.folder / LOCK).unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Drops what a kill left half-written."""
        for path in [p for p in self.folder.rglob("*") if is_temporary(p)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _spoken(seconds: float) -> str:
    """A time in words, in two of its units at most."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _identity(paths: str | Path | Sequence[str | Path]) -> str | list[str]:
    """What tells an input, or several, from another."""
    several = [paths] if isinstance(paths, str | Path) else paths
    found = [identity(Path(path)) for path in several]
    return found[0] if len(found) == 1 else found


def _pack(trained: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters, and AdamW's state of each, as one flat dict."""
    state = {f"param/{name}": p for name, p in trained.items()}
    for name, p in trained.items():
        state |= {f"optimizer/{key}/{name}": value for key, value in optimizer.state[p].items()}
    return state


@torch.no_grad()
def _unpack(state: dict[str, Tensor], trained: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """The inverse of `_pack`, in place."""
    for name, p in trained.items():
        p.copy_(state[f"param/{name}"])
        # AdamW's fused kernels want its step on the device, too
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"optimizer/{key}/{name}" in state]
        optimizer.state[p] = {key: state[f"optimizer/{key}/{name}"].to(p.device) for key in keys}

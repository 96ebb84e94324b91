"""A stage's output folder: what makes it, what it logs, its checkpoints, its end."""

import dataclasses
import fcntl
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from runtime.files import (
    MANIFEST,
    commit,
    identity,
    read_jsonl,
    read_manifest,
    read_tensors,
    write_json,
    write_jsonl,
    write_manifest,
    write_tensors,
)
from runtime.group import Group
from runtime.options import UserError, neutral

DRAWS = 2  # changes when a stage's random draws or its checkpoints' names do: what is half made is not gone on with


class Run:
    """The folder cfg.out: run.json (what makes it), metrics.jsonl, checkpoints/ or claims/ while it is made, results,
    and MANIFEST.json last.
    """

    def __init__(self, cfg, stage: str, group: Group, inputs: dict[str, str | Path] = {}, **digests: str):
        """Opens or creates cfg.out. `inputs`: name -> finished folder, or file, that the result depends on; `digests`:
        other things that it depends on.

        UserError if the folder was made by another stage, configuration or input.
        """
        self.folder, self.stage, self.group = Path(cfg.out), stage, group
        self.started, self.spent = time.time(), 0.0
        left_out = neutral(type(cfg)) | inputs.keys()
        config = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in left_out}
        digests |= {name: identity(Path(path)) for name, path in inputs.items() if path}
        self.facts = json.loads(json.dumps({"stage": stage, "config": config, "inputs": digests, "draws": DRAWS}))
        self._lock = None
        recipe = self.folder / "run.json"
        if recipe.exists():
            try:
                before = json.loads(recipe.read_text(encoding="utf-8"))
            except ValueError:
                before = None
            if not isinstance(before, dict):
                raise UserError(f"{recipe}: expected a run's recipe, got damaged text; delete {self.folder}")
            self._compare(before)
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise UserError(
                f"{self.folder}: expected an empty folder or an earlier {stage} run, got other files; use another --out"
            )
        there = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        if not there.is_dir() or not (os.access(there, os.W_OK) or (self.folder / MANIFEST).exists()):
            state = "cannot be written" if there.is_dir() else "is a file"
            raise UserError(f"--out: expected a folder to write, got {self.folder}, and {there} {state}")
        group.wait()

    def claim(self) -> None:
        """Writes run.json: from now on the folder is this run's. After all checks, so that a mistake claims nothing.

        Forgets what the processes of an earlier start had claimed in `share`. UserError if one of them is alive, or
        another command writes the folder, where the file system has locks.
        """
        if self._lock:
            return
        recipe = self.folder / "run.json"
        if self.group.main:
            if not recipe.exists():
                write_json(recipe, self.facts)
            self._hold(recipe, fcntl.LOCK_EX)  # nobody else is here
            if (self.folder / "claims").exists():
                shutil.rmtree(self.folder / "claims")
            self._hold(recipe, fcntl.LOCK_SH)
        self.group.wait()
        for _ in range(60):  # a network's file system may show a new file late
            if recipe.exists():
                break
            time.sleep(1)
        self._hold(recipe, fcntl.LOCK_SH)

    def _hold(self, recipe: Path, lock: int) -> None:
        """Locks run.json until this process ends. A process does not keep itself out."""
        try:
            self._lock = self._lock or open(recipe, "r+")
            fcntl.lockf(self._lock, lock | fcntl.LOCK_NB)
        except FileNotFoundError:
            raise UserError(f"--out: expected a folder that all nodes share, but {recipe} is not there") from None
        except (BlockingIOError, PermissionError):
            got = "another command is writing it, or what is left of one"
            raise UserError(f"{self.folder}: {got}; wait for it to end, or end it") from None
        except OSError:  # this file system has no locks
            pass

    def _compare(self, before: dict) -> None:
        half_made = not (self.folder / MANIFEST).is_file()
        for part in ("stage", "config", "inputs") + ("draws",) * half_made:
            old, new = before.get(part), self.facts[part]
            if old == new:
                continue
            if isinstance(old, dict) and isinstance(new, dict):
                key = next(k for k in {**old, **new} if old.get(k) != new.get(k))
                old, new, part = old.get(key), new.get(key), f"{part} {key}"
            raise UserError(
                f"{self.folder} was made with {part} = {old!r}, now {new!r}; use another --out or delete the folder"
            )

    @property
    def done(self) -> bool:
        """Whether the folder is finished; says so once."""
        finished = (self.folder / MANIFEST).is_file()
        if finished and self.group.main:
            self._tidy()  # a kill may have come just before
            print(f"{self.stage}: {self.folder} is finished already, nothing to do")
        return finished

    def progress(self, items: int, start: int = 0, unit: str = "step", plan: str = "") -> tqdm:
        """A progress bar with rate and time left, on the first process only; first, a line that says what runs.

        plan: what is done in all, in words, for that line.
        """
        self.claim()
        if self.group.main:
            print(f"{self.stage}: {plan}{'; ' * bool(plan)}{self.group}", file=sys.stderr)
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
                    try:
                        (claims / str(i)).touch(exist_ok=False)
                    except FileExistsError:
                        others.append(claims / str(i))
                    else:
                        if not done(i):
                            yield i
                        (claims / str(i)).write_text("done")
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
        """Appends a line to metrics.jsonl."""
        if self.group.main:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps({"step": step, **metrics}) + "\n")

    def save(self, step: int, trained: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Writes parameters and AdamW's state to checkpoints/step-N, whole or not at all, and keeps the newest two."""
        if self.group.main:
            root = self.folder / "checkpoints"
            fresh = root / f".step-{step:07d}.tmp"
            shutil.rmtree(fresh, ignore_errors=True)
            try:
                write_tensors(fresh / "state.safetensors", _pack(trained, optimizer))
                write_manifest(fresh, ["state.safetensors"], step=step, seconds=self.seconds)
                shutil.rmtree(root / f"step-{step:07d}", ignore_errors=True)
                os.replace(fresh, root / f"step-{step:07d}")
            except OSError:
                shutil.rmtree(fresh, ignore_errors=True)
                raise
            for old in sorted(root.glob("step-*"))[:-2]:
                shutil.rmtree(old)
        self.group.wait()

    def resume(self, trained: dict[str, Tensor] = {}, optimizer: torch.optim.Optimizer | None = None) -> int:
        """The step of the newest whole checkpoint, which is put into `trained` and optimizer, or 0.

        Drops logged lines past it.
        """
        self.claim()
        step = 0
        for folder in sorted((self.folder / "checkpoints").glob("step-*"), reverse=True):
            try:
                facts = read_manifest(folder, self.stage, together=False)  # all must come to the same verdict
            except UserError as error:
                print(f"skipping a damaged checkpoint: {error}", file=sys.stderr)
                continue
            self.spent, step = facts["seconds"], facts["step"]
            _unpack(read_tensors(folder / "state.safetensors"), trained, optimizer)
            break
        if self.group.main and (self.folder / "metrics.jsonl").exists():
            rows = read_jsonl(self.folder / "metrics.jsonl")
            write_jsonl(self.folder / "metrics.jsonl", [row for row in rows if row["step"] <= step])
        self.group.wait()
        return step

    @property
    def seconds(self) -> float:
        """Time spent in this run so far, earlier attempts up to their last checkpoint included."""
        return self.spent + time.time() - self.started

    def finish(self, files: list[str], **facts) -> None:
        """The first process writes MANIFEST.json over `files` and drops checkpoints and claims: the run is done.

        The others wait. They do not end before: when all processes of a node have ended, torchrun waits 300 s for other
        nodes (exit_barrier_timeout in torch/distributed/elastic/agent/server/api.py) and then ends there, with the
        rendezvous of all nodes if this node holds it.
        """
        if self.group.main:
            logged = ["metrics.jsonl"] if (self.folder / "metrics.jsonl").exists() else []
            facts = {**self.facts, "commit": commit(), "seconds": round(self.seconds, 2), **facts}
            write_manifest(self.folder, files + logged, **facts)
            self._tidy()
        self.group.wait()

    def _tidy(self) -> None:
        """Drops what is of use only while the run is made, and what a kill left half-written."""
        for name in ("checkpoints", "claims"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for pattern in (".*.tmp", ".tmp*"):  # temporary names of `whole_file` and of safetensors
            for path in self.folder.rglob(pattern):
                path.unlink(missing_ok=True)


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
        keys = ("step", "exp_avg", "exp_avg_sq")
        optimizer.state[p] = {key: state[f"optimizer/{key}/{name}"].to(p.device) for key in keys}

"""What every stage needs and no stage is about: errors, whole files, the process group, the command line, the
run folder.

Files are written to a temporary name, synced and renamed; a folder counts as whole once its MANIFEST.json,
written last, names every file with its size and sha256. So whatever kills a run, nothing half-written is ever
taken for whole.
"""

import contextlib
import dataclasses
import datetime
import errno
import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import time
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from kernels.modulate import implementation

MANIFEST = "MANIFEST.json"


class UserError(ValueError):
    """A mistake in what the user gave: shown as one line, without a traceback, with exit code 2."""


# ---- whole files -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path`, synced to disk, when the block ends well, and is removed when it
    does not.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        mask = os.umask(0o077)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # safetensors leaves its files to the owner alone
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(AttributeError):  # PyAV's cannot be told
            error.filename = error.filename or str(path)  # writing and syncing name no file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_text(path: Path) -> str:
    """The text of a file. UserError if there is none, or it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected UTF-8 text, got: {error}") from None


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    with whole_file(path) as temporary:
        try:
            save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, temporary, metadata)
        except SafetensorError as error:  # its Rust side reports a full disk as a plain error
            if "os error 28" in str(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
            raise


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: expected a readable safetensors file, got: {error}; make or download it again"
        ) from None


def fingerprint(path: Path) -> dict:
    """Size in bytes and sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(2**20):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def write_manifest(folder: Path, files: list[str], **facts) -> None:
    """Marks `folder` as whole: names `files` in it with size and sha256, beside any facts about them."""
    write_json(folder / MANIFEST, {**facts, "files": {name: fingerprint(folder / name) for name in sorted(files)}})


def read_manifest(folder: str | Path, made_by: str, verify: bool = True) -> dict:
    """The manifest of a finished folder, after every file it names was compared with it.

    made_by: the command that makes such a folder, for the error. UserError if the folder is missing, unfinished
    or damaged.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        state = "has no MANIFEST.json: it is unfinished" if folder.is_dir() else "does not exist"
        raise UserError(f"{folder}: expected a finished folder made by {made_by}, but it {state}; run {made_by} first")
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = {name: (facts["bytes"], facts["sha256"]) for name, facts in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{folder / MANIFEST}: expected a manifest, got damaged text; make the folder again") from None
    stage = manifest.get("stage", "")
    if stage and f"{stage}.py" not in made_by:
        raise UserError(f"{folder}: expected a folder made by {made_by}, got one made by {stage}.py")
    for name, (size, sha256) in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            got = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
            raise UserError(f"{path}: expected {size} bytes, got {got}; delete {folder} and run {made_by} again")
        if verify and fingerprint(path)["sha256"] != sha256:
            raise UserError(
                f"{path}: its sha256 is not the manifest's: damaged; delete {folder} and run {made_by} again"
            )
    return manifest


def commit() -> str:
    """The git commit of this code, "+" appended if the tree is changed, or "unknown"."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


# ---- processes -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Group:
    """This process among those that torchrun started; alone without torchrun."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def announce(self, stage: str) -> None:
        """A run's first line, from the first process: on what it computes."""
        if self.main and self.device is not None:
            kernels = {"triton": "Triton", "torch": "PyTorch definitions"}[implementation(self.device)]
            processes = "1 process" if self.size == 1 else f"{self.size} processes"
            print(f"{stage}: {processes} on {self.device.type}, kernels: {kernels}", file=sys.stderr)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def sum_gradients(self, parameters: list[Tensor]) -> None:
        """Sums the gradients over all processes: each process has scaled its loss by the global batch already."""
        if self.size > 1:
            flat = torch.cat([p.grad.flatten() for p in parameters])
            dist.all_reduce(flat)
            for p, g in zip(parameters, flat.split([p.numel() for p in parameters])):
                p.grad.copy_(g.view_as(p.grad))

    def sum(self, values: dict[str, float]) -> dict[str, float]:
        """Sums every value over all processes, which must hold the same keys."""
        if self.size == 1:
            return values
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return dict(zip(values, total.tolist()))


def start_group() -> Group:
    """Joins the process group that torchrun describes: NCCL with CUDA, gloo on the CPU. One process needs no group.

    UserError for CUDA without Triton and for a wrong KERNELS in the environment.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        # the first process reads and hashes whole folders while the others wait; torchrun ends them all if one fails
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=2))
    try:
        implementation(device)
    except (RuntimeError, ValueError) as error:
        raise UserError(str(error)) from None
    return Group(rank, size, device)


def local_batch(cfg, group: Group) -> tuple[int, int]:
    """Samples of the global batch that this process takes, and in how many forwards.

    UserError if it does not divide.
    """
    per_process, rest = divmod(cfg.batch_size, group.size)
    micro = min(cfg.micro_batch or per_process, per_process)
    if rest or micro < 1 or per_process % micro:
        raise UserError(
            f"batch_size {cfg.batch_size}: expected a multiple of {group.size} process(es) "
            f"x micro_batch {cfg.micro_batch or 1}; change --batch_size or --micro_batch"
        )
    return per_process, per_process // micro


# ---- command line ----------------------------------------------------------------------------------------------------


def field_comments(config: type) -> dict[str, str]:
    """The trailing comments of a dataclass's fields and of those that it inherits."""
    sources = "".join(inspect.getsource(c) for c in reversed(config.__mro__[:-1]))
    return dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", sources, re.M))


def parse(config: type, argv: list[str], doc: str):
    """Command line -> config (a frozen dataclass). A field's trailing comment is its help; None means: not given."""
    import argparse

    comments = field_comments(config)
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        shown = comments.get(field.name, "") + (
            " (by preset)"
            if field.default is None
            else ""
            if field.default in ("", False)
            else f" (default {field.default})"
        )
        options = (
            {"action": "store_true"}
            if kind is bool
            else {"type": kind, "metavar": kind.__name__, "default": field.default}
        )
        parser.add_argument(f"--{field.name}", help=shown.replace("%", "%%"), **options)
    # --self-test is --self_test; what stands after "=" is a value
    spelled = [re.sub(r"^--[^=]*", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in argv]
    return config(**vars(parser.parse_args(spelled)))


def resolve(cfg, presets: dict[str, dict]):
    """cfg with every field that is None set to what its preset says.

    UserError for an unknown preset or nothing to do.
    """
    if cfg.preset not in presets:
        raise UserError(f"--preset: expected one of {', '.join(presets)}, got {cfg.preset!r}")
    values = {k: v for k, v in presets[cfg.preset].items() if getattr(cfg, k) is None}
    cfg = dataclasses.replace(cfg, **values)
    for name in ("steps", "batch_size", "nfe", "save_every", "shard_size", "rank"):
        value = getattr(cfg, name, None)
        if value is not None and value < (0 if name == "rank" else 1):
            raise UserError(f"--{name}: expected at least {0 if name == 'rank' else 1}, got {value}")
    return cfg


def run(main: Callable, config: type, doc: str) -> None:
    """Runs main(config from the command line) as a program: a user's mistake is one line and exit code 2."""
    where = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
    try:
        main(parse(config, sys.argv[1:], doc))
    except UserError as error:
        sys.exit(_fail(f"{where}error: {error}", 2))
    except KeyboardInterrupt:
        sys.exit(_fail(f"{where}interrupted: run the same command again to go on from the last checkpoint", 130))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        folder = Path(error.filename or ".").absolute()
        while not folder.is_dir():
            folder = folder.parent
        free = shutil.disk_usage(folder).free / 2**20
        line = (
            f"{where}error: disk full writing {error.filename}: {free:.1f} MiB free; free some space and run the same "
        )
        sys.exit(_fail(line + "command again, what was finished is kept", 2))
    finally:
        if dist.is_initialized() and sys.exc_info()[0] is None:
            dist.destroy_process_group()


def _fail(line: str, code: int) -> int:
    for bar in list(getattr(tqdm, "_instances", ())):  # so that the line stands alone, and last
        bar.close()
    print(line, file=sys.stderr, flush=True)
    return code


# ---- run folder ------------------------------------------------------------------------------------------------------


def _identity(folder: Path) -> str:
    """What tells an input from another: a file's sha256; a folder's manifest's, or its files' names and sizes."""
    if folder.is_file():
        return fingerprint(folder)["sha256"]
    if (folder / MANIFEST).is_file():
        return fingerprint(folder / MANIFEST)["sha256"]
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a folder or a file, got neither")
    files = sorted((str(p.relative_to(folder)), p.stat().st_size) for p in folder.rglob("*") if p.is_file())
    return hashlib.sha256(repr(files).encode()).hexdigest()


NO_EFFECT = (
    "out",
    "save_every",
    "workers",
    "micro_batch",
    "checkpointing",
    "self_test",
    "dry_run",
)  # options that do not change a result


class Run:
    """A stage's output folder: run.json (what makes it), metrics.jsonl, checkpoints/, results, MANIFEST.json last."""

    def __init__(self, cfg, stage: str, group: Group, inputs: dict[str, str | Path] = {}, **digests: str):
        """Opens or creates cfg.out. `inputs`: name -> finished folder, or file, that the result depends on; `digests`:
        other things that it depends on.

        UserError if the folder was made by another stage, configuration or input.
        """
        self.folder, self.stage, self.group = Path(cfg.out), stage, group
        self.started, self.spent = time.time(), 0.0
        config = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in NO_EFFECT and k not in inputs}
        digests |= {name: _identity(Path(path)) for name, path in inputs.items() if path}
        self.facts = json.loads(json.dumps({"stage": stage, "config": config, "inputs": digests}))
        recipe = self.folder / "run.json"
        if recipe.exists():
            try:
                before = json.loads(recipe.read_text())
            except ValueError:
                raise UserError(f"{recipe}: expected a run's recipe, got damaged text; delete {self.folder}") from None
            self._compare(before)
        elif self.folder.is_file() or self.folder.is_dir() and any(self.folder.iterdir()):
            raise UserError(
                f"{self.folder}: expected an empty folder or an earlier {stage} run, got other files; use another --out"
            )
        group.barrier()

    def claim(self) -> None:
        """Writes run.json: from now on the folder is this run's. After all checks, so that a mistake claims nothing."""
        if self.group.main and not (self.folder / "run.json").exists():
            write_json(self.folder / "run.json", self.facts)
        self.group.barrier()

    def _compare(self, before: dict) -> None:
        for part in ("stage", "config", "inputs"):
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
            print(f"{self.stage}: {self.folder} is finished already, nothing to do")
        return finished

    def progress(self, items: int, start: int = 0, unit: str = "step") -> tqdm:
        """A progress bar with rate and time left, on the first process only; first, a line that says what runs."""
        self.claim()
        self.group.announce(self.stage)
        return tqdm(
            total=items,
            initial=start,
            unit=unit,
            desc=self.stage,
            disable=not self.group.main,
            dynamic_ncols=True,
            mininterval=1.0,
        )

    def log(self, step: int, **metrics: float) -> None:
        """Appends a line to metrics.jsonl."""
        if self.group.main:
            with open(self.folder / "metrics.jsonl", "a") as f:
                f.write(json.dumps({"step": step, **metrics}) + "\n")

    def save(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Writes checkpoints/step-N, whole or not at all, and keeps the newest two."""
        if self.group.main:
            root = self.folder / "checkpoints"
            fresh = root / f".step-{step:07d}.tmp"
            shutil.rmtree(fresh, ignore_errors=True)
            try:
                write_tensors(fresh / "state.safetensors", tensors)
                write_manifest(fresh, ["state.safetensors"], step=step, seconds=self.seconds)
                shutil.rmtree(root / f"step-{step:07d}", ignore_errors=True)
                os.replace(fresh, root / f"step-{step:07d}")
            except OSError:
                shutil.rmtree(fresh, ignore_errors=True)
                raise
            for old in sorted(root.glob("step-*"))[:-2]:
                shutil.rmtree(old)
        self.group.barrier()

    def resume(self) -> tuple[int, dict[str, Tensor] | None]:
        """Step and tensors of the newest whole checkpoint, or (0, None). Drops logged lines past it."""
        self.claim()
        found = (0, None)
        for folder in sorted((self.folder / "checkpoints").glob("step-*"), reverse=True):
            try:
                facts = read_manifest(folder, self.stage)
            except UserError as error:
                print(f"skipping a damaged checkpoint: {error}", file=sys.stderr)
                continue
            self.spent = facts["seconds"]
            found = facts["step"], read_tensors(folder / "state.safetensors")
            break
        if self.group.main and (self.folder / "metrics.jsonl").exists():
            kept = [row for row in read_jsonl(self.folder / "metrics.jsonl") if row["step"] <= found[0]]
            write_text(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
        self.group.barrier()
        return found

    @property
    def seconds(self) -> float:
        """Time spent in this run so far, earlier attempts up to their last checkpoint included."""
        return self.spent + time.time() - self.started

    def finish(self, files: list[str], **facts) -> None:
        """Writes MANIFEST.json over `files` and drops the checkpoints: the run is done."""
        self.group.barrier()
        if self.group.main:
            logged = ["metrics.jsonl"] if (self.folder / "metrics.jsonl").exists() else []
            facts = {**self.facts, "commit": commit(), "seconds": round(self.seconds, 2), **facts}
            write_manifest(self.folder, files + logged, **facts)
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        self.group.barrier()


def read_jsonl(path: Path) -> list[dict]:
    """Rows of a .jsonl file; a last line cut short by a kill is dropped."""
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


# ---- training state --------------------------------------------------------------------------------------------------


def pack_state(
    names: list[str], parameters: list[Tensor], optimizer: torch.optim.Optimizer, **more: list[Tensor]
) -> dict[str, Tensor]:
    """Parameters, the optimizer's moments, and more lists of tensors alongside, as one flat dict for a checkpoint."""
    state = {f"param/{n}": p for n, p in zip(names, parameters)}
    for name, p in zip(names, parameters):
        state |= {f"optimizer/{key}/{name}": value for key, value in optimizer.state[p].items()}
    for key, tensors in more.items():
        state |= {f"{key}/{n}": t for n, t in zip(names, tensors)}
    return state


def unpack_state(
    state: dict[str, Tensor], names: list[str], parameters: list[Tensor], optimizer, **more: list[Tensor]
) -> None:
    """The inverse of `pack_state`, in place."""
    with torch.no_grad():
        for name, p in zip(names, parameters):
            p.copy_(state[f"param/{name}"])
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = state[f"optimizer/{key}/{name}"]
                optimizer.state[p][key] = value.clone() if key == "step" else value.to(p.device)
        for key, tensors in more.items():
            for name, t in zip(names, tensors):
                t.copy_(state[f"{key}/{name}"])

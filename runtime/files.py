"""Files and folders that are whole or not there.

A file is written under a temporary name, synced and renamed. A folder counts as whole once its MANIFEST.json, written
last, names every file with its size and sha256. So whatever kills a run, nothing half-written is taken for whole.
What a run believes when it goes on (`write_sealed`) carries a sha256 of itself.

Hashing takes minutes on large folders, so a folder remembers the sha256 of its files, with their sizes and times, in
.checked.jsonl: a file is hashed when it is new in its folder, or changed, and not at every start.
"""

import collections
import contextlib
import csv
import difflib
import errno
import glob
import hashlib
import itertools
import json
import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime.group import rank_and_size, slow
from runtime.options import Diverged, UserError

MANIFEST = "MANIFEST.json"
CHECKED = ".checked.jsonl"


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path`, synced to disk, when the block ends well, and is removed when it does not.

    The folder must be there: if it is not, somebody deleted it under the run. A full disk is an OSError that names
    `path`, whoever reports it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        mask = os.umask(0o077)
        os.umask(mask)
        with if_it_can():
            os.chmod(temporary, 0o666 & ~mask)  # safetensors leaves its files to the owner alone
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except SafetensorError as error:  # its Rust side reports a full disk, for one, as a plain error
        if not (code := re.search(r"os error (\d+)", str(error))):
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None
    except OSError as error:
        with contextlib.suppress(AttributeError):  # PyAV's cannot be changed
            error.filename = str(path)  # errors of writing name no file, or the temporary one
        raise
    finally:
        temporary.unlink(missing_ok=True)


def inside(root: Path, name: str, links_out: bool = False) -> Path:
    """The path of root/name without links: open this one. For a name that others wrote, in a table or a manifest.

    ValueError if name is empty, has a NUL or is no text, or leads out of root: as an absolute path, by `..` or through
    a link. links_out: a link may lead out.
    """
    if not name or "\0" in name:
        raise ValueError(f"expected the name of a file, got {name!r}")
    root = root.resolve()
    named = Path(os.path.normpath(root / name))  # before links: a link and `..` after it lead elsewhere
    try:
        path = named.resolve()
    except (OSError, RuntimeError):  # the latter before Python 3.13
        raise ValueError("it is a link to itself") from None
    if not (path.is_relative_to(root) or (links_out and named.is_relative_to(root))):
        way = "through a link" if named.is_relative_to(root) else "by its path"
        raise ValueError(f"it leaves the folder {way}")
    return path


def is_temporary(path: Path) -> bool:
    """Whether a kill may have left it: a name of `whole_file`'s or of safetensors' own temporaries."""
    return path.name.startswith(".tmp") or (path.name.startswith(".") and path.name.endswith(".tmp"))


@contextlib.contextmanager
def if_it_can():
    """Within it an operation is passed over that this file system does not know: the file is whole without it.

    CIFS and sshfs do not sync folders, gcsfuse and mounts of S3 do not know modes.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EPERM):
            raise


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        with if_it_can():
            os.fsync(opened)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(opened)


def read_text(path: Path) -> str:
    """The text of a file, without a byte order mark. UserError if there is no such file, or it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: expected a text file, got no such file{nearest(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected UTF-8 text, got: {error}") from None


def csv_rows(
    path: Path, columns: tuple[str, ...] = (), more: tuple[str, ...] = ()
) -> Iterator[tuple[dict[str, str], str]]:
    """The rows of a csv table, and beside each what is wrong with it, or "". A bad row leaves the others as they are.

    UserError if the file cannot be read, lacks one of `columns`, has two of the same name, or spells one of them, or of
    `more`, which it may lack, otherwise: with capitals or blanks, for one.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as f:
            reader = csv.reader(f, strict=True)  # or a quote that is not closed takes the rest of the table
            header = next(reader, [])
            names = {name.strip().lower(): name for name in header}
            if odd := [name for name in (*columns, *more) if name not in header and name in names]:
                raise UserError(f"{path}: expected the column {odd[0]!r}, got {names[odd[0]]!r}: name it so")
            if not {*columns} <= {*header}:
                got = repr(", ".join(header)[:60]) if header else "none"
                raise UserError(f"{path}: expected the columns {','.join(columns)}, got {got}")
            twice = [name for name, count in collections.Counter(filter(None, header)).items() if count > 1]
            if twice:
                raise UserError(f"{path}: expected columns of different names, got {twice[0]!r} twice")
            while True:
                start, cells, wrong = reader.line_num + 1, [], ""
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:  # the reader goes on with the next line
                    lines = f"line {start}" + f" to {reader.line_num}" * (reader.line_num > start)
                    wrong = f"{lines}: {error}; is a quote not closed?"
                if cells and len(cells) != len(header):
                    commas = "; put quotes around a text with commas" if len(cells) > len(header) else ""
                    wrong = f"expected {len(header)} cells as in the header, got {len(cells)}{commas}"
                elif re.search(r"[\ud800-\udfff]", "".join(cells)):  # what surrogateescape made of other bytes
                    wrong = "its text is not UTF-8"
                if cells or wrong:
                    yield dict(zip(header, cells)), wrong
    except FileNotFoundError:
        raise UserError(f"{path}: expected a UTF-8 csv table, got no such file{nearest(path)}") from None
    except (OSError, csv.Error) as error:
        raise UserError(f"{path}: expected a UTF-8 csv table, got: {error}") from None


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a csv table. UserError if it cannot be read, or names the first bad row."""
    rows = []
    for number, (row, wrong) in enumerate(csv_rows(path), 1):
        if wrong:
            raise UserError(f"{path}: expected a csv table, got row {number}: {wrong}")
        rows.append(row)
    return rows


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value) -> None:
    """Diverged rather than a file with NaN or infinity in it, which is no JSON."""
    try:
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise Diverged(f"{path} is not written: a figure in it is not finite") from None
    write_text(path, text + "\n")


def write_jsonl(path: Path, rows: list[dict]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict]:
    """Rows of a .jsonl file. A line that is none is dropped, as the last one that a kill cut short."""
    rows = []
    for line in path.read_bytes().split(b"\n"):  # str.splitlines cuts at U+2028, U+2029 and U+0085, too
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))  # of bytes: it drops a byte order mark
    return [row for row in rows if isinstance(row, dict)]


def read_json(path: Path):
    """The value in a JSON file. UserError if it cannot be read, or is nested too deeply."""
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON, got damaged text: {error}") from None


def _seal(value: dict) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_sealed(path: Path, value: dict) -> None:
    """Writes a JSON object with the sha256 of the rest as its last entry, `seal`."""
    write_json(path, {**value, "seal": _seal(value)})


def read_sealed(path: Path, old: bool = False) -> dict:
    """What `write_sealed` wrote, without the seal. old: what 0.8 wrote, by its number of draws, has none.

    UserError if it cannot be read, or is not what was written.
    """
    value = read_json(path)
    if isinstance(value, dict):
        seal = value.pop("seal", None)
        if seal == _seal(value) or (old and seal is None and value.get("draws") in (None, 1, 2)):
            return value
    raise UserError(f"{path}: expected what a run wrote, got damaged text")


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor that holds NaN or infinity, or None."""

    def bad(a: Tensor) -> bool:  # isfinite would take eight times as long; float8 has no aminmax
        return not all(end.isfinite() for end in (a.float() if a.itemsize == 1 else a).aminmax())

    return next((name for name, a in tensors.items() if a.is_floating_point() and a.numel() and bad(a)), None)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Diverged rather than a file with NaN or infinity in it."""
    if bad := not_finite(tensors):
        raise Diverged(f"{path} is not written: its tensor {bad} is not finite")
    try:
        with whole_file(path) as temporary:
            save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, temporary, metadata)
    except OSError as error:
        error.needed = sum(a.nbytes for a in tensors.values())  # for who tells of a full disk
        raise


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. UserError if it cannot be read, or holds NaN or infinity."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: expected a readable safetensors file, got: {error}; make or download it again"
        ) from None
    if bad := not_finite(tensors):
        raise UserError(f"{path}: expected finite numbers, got NaN or infinity in {bad}; make or download it again")
    return tensors


def fingerprint(path: Path) -> dict:
    """Size in bytes and sha256 of a file."""
    digest, size = hashlib.sha256(), path.stat().st_size
    with open(path, "rb") as f, slow(None, f"hashing {path.name}", "B", size) as bar:
        while chunk := f.read(2**20):
            digest.update(chunk)
            bar.update(len(chunk))
    return {"bytes": size, "sha256": digest.hexdigest()}


_checked: dict[Path, tuple[int, dict[str, dict]]] = {}  # of a folder's memory: the bytes read, and what they say


def _read_checked(memory: Path) -> dict[str, dict]:
    """The newest line of each file in a folder's memory. Lines are only added, so none is read twice: a folder may have
    100,000 files, and another line with each of them.
    """
    start, rows = _checked.pop(memory, (0, {}))
    with contextlib.suppress(OSError), open(memory, "rb") as f:
        if start > os.fstat(f.fileno()).st_size:
            start, rows = 0, {}  # another folder of that name
        f.seek(start)
        for line in f:
            if not line.endswith(b"\n"):
                break  # somebody is writing it
            start += len(line)
            with contextlib.suppress(ValueError, TypeError, KeyError):
                row = json.loads(line)
                rows[row["name"]] = row
        _checked[memory] = start, rows
    return _checked.get(memory, (0, {}))[1]


def checksums(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Names of files in a run's folder, each with its sha256: the remembered one if size and times are the same.

    Other files are hashed, and then remembered. ctime is compared, too, because a copy may keep mtime. Processes may
    add lines at once: one that got mixed up is dropped, or fits no file. Where the folder cannot be written, nothing is
    remembered.
    """
    memory = folder / CHECKED
    known = _read_checked(memory)
    for name in slow(names, f"checking {folder}", "file"):
        stat, row = (folder / name).stat(), known.get(name, {})
        stamp = {"name": name, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}
        sha256 = row.get("sha256")
        if row != {**stamp, "sha256": sha256}:
            sha256 = fingerprint(folder / name)["sha256"]
            with contextlib.suppress(OSError), open(memory, "a", encoding="utf-8") as f:
                f.write(json.dumps({**stamp, "sha256": sha256}) + "\n")
        yield name, sha256


def checksum(path: Path, folder: Path | None = None) -> str:
    """sha256 of one file, as `checksums` gives it. folder: the run's, if the file lies deeper in it."""
    folder = folder or path.parent
    return next(checksums(folder, [str(path.relative_to(folder))]))[1]


def unchanged(path: Path, folder: Path | None = None) -> bool:
    """Whether a file of an unfinished run is what its `checksum` was taken of after it was written."""
    folder = folder or path.parent
    remembered = _read_checked(folder / CHECKED).get(str(path.relative_to(folder)))
    return bool(remembered) and path.is_file() and fingerprint(path)["sha256"] == remembered["sha256"]


WAN = r"Wan2\.\d-[\w-]+"  # a release's folder, as on Hugging Face


def nearest(path: str | Path) -> str:
    """The end of an error about a path where nothing is: what its author may have meant, or where to get it.

    Empty if something is there, and for an absolute path that is like no other.
    """
    path, found = Path(path), []
    with contextlib.suppress(OSError):
        if path.exists():
            return ""
        named = (
            p for depth in ("[!.]*", "[!.]*/[!.]*") for p in sorted(Path().glob(f"{depth}/{glob.escape(path.name)}"))
        )
        here = next(folder for folder in path.absolute().parents if folder.is_dir())
        missing, *below = path.absolute().relative_to(here).parts
        alike = difflib.get_close_matches(missing, sorted(os.listdir(here)), 1, 0.75)
        like = (p for name in alike if (p := Path(os.path.relpath(here.joinpath(name, *below)))).exists())
        found += itertools.islice(itertools.chain(named, like), 1)
    if found:
        return f"; did you mean {found[0]}?"
    if re.fullmatch(WAN, path.name):
        return f"; to download it: hf download Wan-AI/{path.name} --local-dir {path}"
    return "" if path.is_absolute() else f"; it was looked for in {Path.cwd()}"


READ = (".safetensors", ".pth", ".json", ".model")  # what is read of a folder of weights
SAMPLE = 2**16  # bytes


def _sampled(path: Path) -> str:
    """sha256 of the beginning, the middle and the end of a file."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as f:
        for start in (0, size // 2, size - SAMPLE):
            f.seek(max(0, start))
            digest.update(f.read(SAMPLE))
    return digest.hexdigest()


def identity(path: Path) -> str:
    """What tells an input from another: a file's sha256; of a folder its manifest's; of a folder of others, with tens
    of GB that nobody hashed, the names, sizes and some bytes of its weights and configurations.

    UserError if there is nothing at path.
    """
    if path.is_file():
        ours = (path.parent / MANIFEST).is_file()  # no file is left beside those of others
        return checksum(path) if ours else fingerprint(path)["sha256"]
    if (path / MANIFEST).is_file():
        return fingerprint(path / MANIFEST)["sha256"]
    if not path.is_dir():
        raise UserError(f"{path}: expected a folder or a file, got neither{nearest(path)}")
    files = sorted(p for p in path.rglob("*") if p.suffix in READ and p.is_file())
    facts = [(str(p.relative_to(path)), p.stat().st_size, _sampled(p)) for p in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def write_manifest(folder: Path, files: list[str], **facts) -> None:
    """Marks `folder` as whole: names `files` in it, on disk by then, with size and sha256, beside facts about them."""
    for name in files:
        sync(folder / name)
    hashes = checksums(folder, sorted(files))
    named = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256} for name, sha256 in hashes}
    write_sealed(folder / MANIFEST, {**facts, "files": named})


def read_manifest(folder: str | Path, made_by: str, together: bool = True) -> dict:
    """The manifest of a finished folder, after every file that it names was compared with it.

    made_by: the command that makes such a folder, for the error; together: as in `verify`. UserError if the folder is
    missing, unfinished, damaged or made by another command.
    """
    manifest = open_manifest(folder, made_by)
    verify(folder, manifest, manifest["files"], made_by, together)
    return manifest


def open_manifest(folder: str | Path, made_by: str) -> dict:
    """As `read_manifest`, but of the files only the sizes are compared: `verify` those that are read."""
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        state = "has no MANIFEST.json: it is unfinished" if folder.is_dir() else "does not exist"
        run = f"run {made_by} first{nearest(folder)}"
        raise UserError(f"{folder}: expected a finished folder made by {made_by}, but it {state}; {run}")
    try:
        manifest = read_sealed(folder / MANIFEST, old=True)
        files = {name: (facts["bytes"], facts["sha256"]) for name, facts in manifest["files"].items()}
    except (UserError, KeyError, TypeError, AttributeError):
        raise UserError(f"{folder / MANIFEST}: expected a manifest, got damaged text; make the folder again") from None
    stage = manifest.get("stage", "")
    if stage and not re.search(rf"\b{re.escape(str(stage))}\b", made_by):
        raise UserError(f"{folder}: expected a folder made by {made_by}, got one made by {stage}")
    for name, (size, _) in files.items():
        try:
            path = inside(folder, name)
        except ValueError as error:
            again = "make or download the folder again, as files"
            raise UserError(f"{folder / MANIFEST}: {name!r}: {error}; {again}") from None
        found = os.path.isfile(path)  # Path.is_file raises an error for a name that is too long
        if not found or path.stat().st_size != size:
            got = f"{path.stat().st_size} bytes" if found else "no such file"
            raise UserError(f"{path}: expected {size} bytes, got {got}; delete {folder} and run {made_by} again")
    return manifest


def verify(folder: str | Path, manifest: dict, names: Iterable[str], made_by: str, together: bool = True) -> None:
    """Compares the sha256 of these files with the manifest's. UserError for one that is damaged.

    together: each process that torchrun started takes its share of them, so they must meet before they work with the
    files, as they do in `Run.claim`; if one finds a damaged file, torchrun ends all. Otherwise this process takes all.
    """
    rank, size = rank_and_size() if together else (0, 1)
    files = manifest["files"]
    share = sorted(names, key=lambda name: (-files[name]["bytes"], name))[rank::size]  # of about equal sizes
    for name, sha256 in checksums(Path(folder), share):
        wanted = files[name]["sha256"]
        if sha256 != wanted and fingerprint(Path(folder) / name)["sha256"] != wanted:  # not the memory that is damaged
            got = f"{Path(folder) / name}: its sha256 is not the manifest's: damaged"
            raise UserError(f"{got}; delete {folder} and run {made_by} again")


def verified(path: str | Path, made_by: str) -> Path:
    """path, after it was compared with its manifest, if it has one: a folder that others made has none."""
    if (Path(path) / MANIFEST).is_file():
        read_manifest(path, made_by)
    return Path(path)


def commit() -> str:
    """The git commit of this code, with "+" where the tree is changed, or "unknown"."""

    def git(*words: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + "+" * bool(git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"

"""Shards: the files between the stages, and the order in which training reads them.

A folder of shards (clips or pairs from prepare.py, pairs from make_pairs.py) holds

    shard-00000.safetensors   each field stacked over the shard's samples, e.g. `x0 (n, C, F, H, W)`; the text states
                              of all samples in a row in `text (sum of S, text_dim)`, cut at `text_start (n + 1,)`
    shard-00000.json          its size and sha256, a row of facts (id, caption, …) a sample, and what was rejected
    rejects.jsonl             everything rejected, and why
    metrics.jsonl             a line a shard: numbers kept and rejected, means
    MANIFEST.json             written last

Shard k holds what was kept of items k·size … (k+1)·size − 1, so it does not matter which process makes it, or when.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from runtime.files import (
    MANIFEST,
    checksum,
    not_finite,
    open_manifest,
    read_json,
    read_sealed,
    read_tensors,
    verify,
    write_jsonl,
    write_sealed,
    write_tensors,
)
from runtime.group import local_batch
from runtime.options import UserError
from runtime.run import Run

OPEN = 1024  # files that stay open: each is a map of memory, and Linux gives a process 65,530 (vm.max_map_count)


def shard_name(k: int) -> str:
    return f"shard-{k:05d}"


def pixel_frames(first: int, end: int) -> slice:
    """The pixel frames of the latent frames first … end − 1: latent 0 is pixel frame 0, latent i is 4i − 3 … 4i."""
    return slice(max(4 * first - 3, 0), max(4 * end - 3, 0))


def latent_frame(picture: int) -> int:
    """The latent frame that holds a pixel frame: the inverse of `pixel_frames`."""
    return (picture + 3) // 4


def write_shard(
    folder: Path, k: int, rows: list[dict], fields: dict[str, Sequence[Tensor]], text: list[Tensor], rejects: list[dict]
) -> None:
    """Writes shard k: rows[i] describes sample i, fields[name][i] and text[i] (S, text_dim) are its tensors.

    A sample that holds NaN or infinity is rejected.
    """
    bad = [not_finite({**{name: a[i] for name, a in fields.items()}, "text": text[i]}) for i in range(len(rows))]
    good = [i for i, name in enumerate(bad) if not name]
    why = [
        {**{key: row[key] for key in ("id", "video") if key in row}, "reason": f"its {name} is not finite"}
        for row, name in zip(rows, bad)
        if name
    ]
    rows, text, rejects = [rows[i] for i in good], [text[i] for i in good], rejects + why
    fields = {name: [a[i] for i in good] for name, a in fields.items()}
    path = folder / f"{shard_name(k)}.safetensors"
    tensors = {name: torch.stack(tuple(values)) for name, values in fields.items() if len(values)}
    if text:
        tensors["text"] = torch.cat(text)
        tensors["text_start"] = torch.tensor([0] + [len(t) for t in text]).cumsum(0)
    write_tensors(path, tensors)
    facts = {"bytes": path.stat().st_size, "sha256": checksum(path)}
    write_sealed(path.with_suffix(".json"), {**facts, "rows": rows, "rejects": rejects})


def shard_is_whole(folder: Path, k: int) -> bool:
    """Whether shard k was finished before: its rows and its tensors are what was written."""
    path = folder / f"{shard_name(k)}.safetensors"
    if not path.is_file() or not path.with_suffix(".json").is_file():
        return False
    try:
        facts = read_sealed(path.with_suffix(".json"))
    except UserError as error:
        print(f"made again: {error}", file=sys.stderr)
        return False
    return path.stat().st_size == facts["bytes"] and checksum(path) == facts["sha256"]


def unfinished(run: Run, items: int, size: int, unit: str, lockstep: bool = False) -> Iterator[tuple[int, range, bool]]:
    """Yields k and the items of every shard of `size` items that this process has to make, its part of `Run.share`; and
    whether to keep it, as there.

    Shards that an earlier run finished are kept. When it ends in the first process, every shard is whole.
    """
    done = functools.partial(shard_is_whole, run.folder)
    for k, own in run.share(-(-items // size), unit, done, items, lockstep):
        yield k, range(k * size, min((k + 1) * size, items)), own


def collect(folder: Path, shards: int, more: list[dict]) -> tuple[list[str], int, int]:
    """Gathers what the shards say: rejects.jsonl from all of them and `more`; metrics.jsonl, a line a shard
    with the numbers kept and rejected and the mean of each numeric fact. Returns the folder's files, and the
    numbers kept and rejected in all.
    """
    files, metrics, rejects = ["rejects.jsonl", "metrics.jsonl"], [], list(more)
    for k in range(shards):
        facts = read_sealed(folder / f"{shard_name(k)}.json")
        files += [f"{shard_name(k)}.safetensors", f"{shard_name(k)}.json"]
        rows = facts["rows"]
        numeric = [key for key in (rows[0] if rows else ()) if isinstance(rows[0][key], int | float)]
        means = {key: round(sum(row[key] for row in rows) / len(rows), 4) for key in numeric}
        metrics.append({"step": k, "kept": len(rows), "rejected": len(facts["rejects"]), **means})
        rejects += facts["rejects"]
    for name, lines in (("rejects.jsonl", rejects), ("metrics.jsonl", metrics)):
        write_jsonl(folder / name, lines)
    return files, sum(m["kept"] for m in metrics), len(rejects)


class Shards:
    """Random access to a finished folder of shards.

    `rows[i]` are the facts of sample i; tensors are read when asked for.
    """

    def __init__(self, folder: str | Path, made_by: str, split: str | None = None, hashed: bool = True):
        """split: only samples whose row says so, and shards without one are not hashed. See `verify`. hashed: without
        it, of the files the sizes alone are compared.

        UserError if the folder is missing, unfinished or damaged, or has no sample of that split.
        """
        self.folder = Path(folder)
        self.manifest = open_manifest(folder, made_by)
        self.rows, self._path, self._place, self._open, splits = [], [], [], {}, set()
        shards = sorted(n for n in self.manifest["files"] if n.startswith("shard-") and n.endswith(".json"))
        if hashed:
            verify(folder, self.manifest, shards, made_by, together=False)  # as every process reads them now
        for name in shards:
            path = (self.folder / name).with_suffix(".safetensors")
            for i, row in enumerate(_rows(self.folder / name)):
                splits.add(str(row.get("split")))
                if split in (None, row.get("split")):
                    self.rows.append(row)
                    self._path.append(path)  # two lists: a million tuples take twice the time
                    self._place.append(i)
        if not self.rows:
            wanted, got = f" of split {split!r}" if split else "", ", ".join(sorted(splits)) or "none"
            raise UserError(f"{folder}: expected samples{wanted}, its splits are {got}; see its rejects.jsonl")
        if hashed:
            read = {path.name for path in set(self._path)}
            files = [n for n in self.manifest["files"] if n in read or not n.startswith("shard-")]
            verify(folder, self.manifest, files, made_by)

    def __len__(self) -> int:
        return len(self.rows)

    def _sample(self, i: int):
        """The open file that holds sample i, its place there, and where the text states of the file's samples start."""
        path, place = self._path[i], self._place[i]
        size = self.manifest["files"][path.name]["bytes"]
        if not path.is_file() or path.stat().st_size != size:  # to read on in a file cut short would kill the process
            raise UserError(f"{path}: expected {size} bytes as before, got others: it was changed under this run")
        if path not in self._open:
            if len(self._open) == OPEN:
                del self._open[next(iter(self._open))]  # the one that was opened first
            file = safe_open(path, "pt")
            self._open[path] = file, (file.get_tensor("text_start").tolist() if "text_start" in file.keys() else [])
        file, start = self._open[path]
        return file, place, start

    def _read(self, field: str, i: int) -> Tensor:
        """A field of sample i, or its text states. UserError if they are not in its file, or not finite."""
        try:
            file, place, start = self._sample(i)
            if field == "text":
                first, end = start[place : place + 2]
                tensor = file.get_slice(field)[first:end]
                if len(tensor) != end - first:
                    raise LookupError(f"{len(tensor)} of {end - first} states")
            else:
                tensor = file.get_slice(field)[place]
        except UserError:
            raise
        except (SafetensorError, LookupError, TypeError, ValueError) as error:
            got = f"expected {field} of sample {self._place[i]}, got: {error}"
            raise UserError(f"{self._path[i]}: {got}; make {self.folder} again") from None
        if not_finite({field: tensor}):
            got = f"got NaN or infinity in {field} of {self.rows[i].get('id')!r}"
            raise UserError(f"{self._path[i]}: expected finite numbers, {got}; make {self.folder} again")
        return tensor

    def get(self, field: str, index: Sequence[int]) -> Tensor:
        """A field of the samples index, stacked: (B, *shape). UserError if one is missing or not finite."""
        return torch.stack([self._read(field, i) for i in index])

    def states(self, index: Sequence[int]) -> list[Tensor]:
        """Text states of the samples index, each (S, text_dim) at its true length. UserError as `get`."""
        return [self._read("text", i) for i in index]

    def text(self, index: Sequence[int]) -> Tensor:
        """Text states (B, S, text_dim) of the samples index, padded with zeros to the longest."""
        return torch.nn.utils.rnn.pad_sequence(self.states(index), batch_first=True)

    def negative(self) -> Tensor:
        """Text states (S, text_dim) of the negative prompt: guidance's unconditional branch, and dropped captions.

        UserError if the folder has none.
        """
        return read_tensors(self.folder / "negative.safetensors")["text"]

    def fields(self) -> list[str]:
        """Names of a sample's tensors, its text states left out."""
        return sorted(set(self._sample(0)[0].keys()) - {"text", "text_start"})

    def shape(self, field: str) -> tuple[int, ...]:
        """Shape of one sample's field. UserError if samples have none of that name."""
        if field not in (found := self.fields()):
            got = f"got one made by {self.manifest.get('stage', 'others')}, with {', '.join(found)}"
            raise UserError(f"{self.folder}: expected a folder of samples with {field}, {got}")
        return tuple(self._sample(0)[0].get_slice(field).get_shape()[1:])


def codec_of(manifest: dict) -> str:
    """sha256 of the codec of a folder's latents, or "" if none is noted, as for Wan's VAE and in older folders."""
    return manifest["files"].get("codec.safetensors", {}).get("sha256") or manifest.get("codec", "")


def check_codec(base: str | Path, folder: str | Path, manifest: dict) -> None:
    """UserError if a base that this project made knows the latents of another codec than those of a folder."""
    path = Path(base) / MANIFEST
    known, found = codec_of(read_sealed(path, old=True)) if base and path.is_file() else "", codec_of(manifest)
    if known and found and known != found:
        again = "give the shards that the base was trained on, or make these with prepare.py --vae and those"
        raise UserError(f"{folder}: expected the codec of {base}, got another one; {again}")


def _rows(path: Path) -> list[dict]:
    """The rows of a shard. UserError if there are none: others may have made it."""
    facts = read_json(path)
    rows = facts.get("rows") if isinstance(facts, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected rows, a JSON object for each sample, got something else")
    return rows


def batch_order(n: int, batch_size: int, step: int, key: tuple, generator: Callable) -> list[int]:
    """The samples of global batch `step`: each epoch is a permutation of 0 … n−1, and they are read one after another.

    generator("order", *key, epoch) gives a numpy.random.Generator. The batches are a function of the arguments alone,
    so a resumed run and a run on another number of processes see the same ones.
    """
    order = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, i = divmod(position, n)
        order.append(int(_permutation(n, key, epoch, generator)[i]))
    return order


@functools.lru_cache(maxsize=2)  # a batch may span two epochs
def _permutation(n: int, key: tuple, epoch: int, generator: Callable) -> np.ndarray:
    return generator("order", *key, epoch).permutation(n)


def micro_batches(n: int, step: int, cfg, run: Run, generator: Callable) -> list[list[int]]:
    """This process's share of global batch `step` of n samples, one list of sample numbers for each forward.

    cfg: batch_size, micro_batch, seed; generator: as in `batch_order`, whose key is (stage, seed).
    """
    per_process, micro = local_batch(cfg, run.group)
    order = batch_order(n, cfg.batch_size, step, (run.stage, cfg.seed), generator)
    first = run.group.rank * per_process
    return [order[i : i + micro] for i in range(first, first + per_process, micro)]


def epochs(n: int, cfg, unit: str, asked: int | None = None) -> str:
    """What a training run reads of its n samples: "625 steps × 32 = 20,000 pairs, 10.0 epochs of 2,000".

    UserError if more samples a step were asked for than there are: a preset may take one twice, where there are few.
    """
    if asked and asked > n:
        twice = f"each would be {asked / n:.1f} times in a step, with the same noise"
        raise UserError(f"--batch_size: expected at most {n:,}, as there are no more {unit}, got {asked:,}: {twice}")
    read = cfg.steps * cfg.batch_size
    return f"{cfg.steps:,} steps × {cfg.batch_size} = {read:,} {unit}, {read / n:.1f} epochs of {n:,}"

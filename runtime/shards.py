"""Shards: the files between the stages, and the order in which training reads them.

A folder of shards (clips from prepare.py, pairs from make_pairs.py) holds

    shard-00000.safetensors   each field stacked over the shard's samples, e.g. `x0 (n, C, F, H, W)`; the text states
                              of all samples in a row in `text (sum of S, text_dim)`, cut at `text_start (n + 1,)`
    shard-00000.json          its size and sha256, a row of facts (id, caption, …) a sample, and what was rejected
    rejects.jsonl             everything rejected, and why
    metrics.jsonl             a line a shard: numbers kept and rejected, means
    MANIFEST.json             written last

Shard k holds what was kept of items k·size … (k+1)·size − 1, so it does not matter which process makes it, or when.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from flow import generator
from runtime import run as common
from runtime.run import UserError


def shard_name(k: int) -> str:
    return f"shard-{k:05d}"


def video_name(place: int, row: dict, field: str, segment: int | None = None) -> str:
    """The file in which sample.py --decode shows a field of sample `place`, whole or one segment of it."""
    return "-".join([f"{place:05d}", Path(row["id"]).name, *[field] * (field != "x0")]) + (
        ".mp4" if segment is None else f"-s{segment}.mp4"
    )


def segment_cuts(frames: int, segments: int) -> list[int]:
    """Where `segments` pieces of a clip's latent frames begin, and the end: 13 frames in 5: 0, 3, 6, 9, 11, 13."""
    size, longer = divmod(frames, segments)
    return [k * size + min(k, longer) for k in range(segments + 1)]


def pixel_frames(first: int, end: int) -> slice:
    """The pixel frames of the latent frames first … end − 1: latent 0 is pixel frame 0, latent i is 4i − 3 … 4i."""
    return slice(max(4 * first - 3, 0), max(4 * end - 3, 0))


def write_shard(
    folder: Path, k: int, rows: list[dict], fields: dict[str, list[Tensor]], text: list[Tensor], rejects: list[dict]
) -> None:
    """Writes shard k: rows[i] describes sample i, fields[name][i] and text[i] (S, text_dim) are its tensors."""
    path = folder / f"{shard_name(k)}.safetensors"
    tensors = {name: torch.stack(values) for name, values in fields.items() if values}
    if text:
        tensors["text"] = torch.cat(text)
        tensors["text_start"] = torch.tensor([0] + [len(t) for t in text]).cumsum(0)
    common.write_tensors(path, tensors)
    common.write_json(path.with_suffix(".json"), {**common.fingerprint(path), "rows": rows, "rejects": rejects})


def shard_is_whole(folder: Path, k: int) -> bool:
    """Whether shard k was finished before, by its size and sha256."""
    path = folder / f"{shard_name(k)}.safetensors"
    if not path.is_file() or not path.with_suffix(".json").is_file():
        return False
    try:
        facts = json.loads(path.with_suffix(".json").read_text())
        return common.fingerprint(path) == {key: facts[key] for key in ("bytes", "sha256")}
    except (ValueError, KeyError, TypeError):
        return False


def collect(folder: Path, shards: int, more: list[dict]) -> tuple[list[str], int, int]:
    """Gathers what the shards say: rejects.jsonl from all of them and `more`; metrics.jsonl, a line a shard
    with the numbers kept and rejected and the mean of each numeric fact. Returns the folder's files, and the
    numbers kept and rejected in all.
    """
    files, metrics, rejects = ["rejects.jsonl", "metrics.jsonl"], [], list(more)
    for k in range(shards):
        facts = json.loads((folder / f"{shard_name(k)}.json").read_text())
        files += [f"{shard_name(k)}.safetensors", f"{shard_name(k)}.json"]
        rows = facts["rows"]
        numeric = [key for key in (rows[0] if rows else ()) if isinstance(rows[0][key], int | float)]
        means = {key: round(sum(row[key] for row in rows) / len(rows), 4) for key in numeric}
        metrics.append({"step": k, "kept": len(rows), "rejected": len(facts["rejects"]), **means})
        rejects += facts["rejects"]
    for name, lines in (("rejects.jsonl", rejects), ("metrics.jsonl", metrics)):
        common.write_text(folder / name, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return files, sum(m["kept"] for m in metrics), len(rejects)


class Shards:
    """Random access to a finished folder of shards.

    `rows[i]` are the facts of sample i; tensors are read when asked for.
    """

    def __init__(self, folder: str | Path, made_by: str, split: str | None = None, verify: bool = True):
        """split: only samples whose row says so. verify: compare every file's sha256 first (let one process do it).

        UserError if the folder is missing, unfinished or damaged, or has no sample of that split.
        """
        self.folder = Path(folder)
        self.manifest = common.read_manifest(folder, made_by, verify)
        self.rows, self._where, self._open, splits = [], [], {}, set()
        for name in sorted(n for n in self.manifest["files"] if n.startswith("shard-") and n.endswith(".json")):
            for i, row in enumerate(json.loads((self.folder / name).read_text())["rows"]):
                splits.add(str(row.get("split")))
                if split in (None, row.get("split")):
                    self.rows.append(row)
                    self._where.append((self.folder / name).with_suffix(".safetensors"))
                    row["index"] = i
        if not self.rows:
            wanted, got = f" of split {split!r}" if split else "", ", ".join(sorted(splits)) or "none"
            raise UserError(f"{folder}: expected samples{wanted}, its splits are {got}; see its rejects.jsonl")

    def __len__(self) -> int:
        return len(self.rows)

    def _shard(self, path: Path):
        if path not in self._open:
            file = safe_open(path, "pt")
            self._open[path] = file, (file.get_tensor("text_start").tolist() if "text_start" in file.keys() else [])
        return self._open[path]

    def get(self, field: str, index: Sequence[int]) -> Tensor:
        """A field of the samples index, stacked: (B, *shape)."""
        return torch.stack([self._shard(self._where[i])[0].get_slice(field)[self.rows[i]["index"]] for i in index])

    def states(self, index: Sequence[int]) -> list[Tensor]:
        """Text states of the samples index, each (S, text_dim) at its true length."""
        states = []
        for i in index:
            file, start = self._shard(self._where[i])
            row = self.rows[i]["index"]
            states.append(file.get_slice("text")[start[row] : start[row + 1]])
        return states

    def text(self, index: Sequence[int]) -> Tensor:
        """Text states (B, S, text_dim) of the samples index, padded with zeros to the longest."""
        return torch.nn.utils.rnn.pad_sequence(self.states(index), batch_first=True)

    def fields(self) -> list[str]:
        """Names of what a sample holds."""
        return list(self._shard(self._where[0])[0].keys())

    def shape(self, field: str) -> tuple[int, ...]:
        """Shape of one sample's field."""
        return tuple(self._shard(self._where[0])[0].get_slice(field).get_shape()[1:])


def batch_order(n: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The samples of global batch `step`: each epoch is a permutation of 0 … n−1 drawn from (seed, epoch), read
    on and on.

    A function of its arguments alone, so a resumed run and a run on another number of processes see the same batches.
    """
    order = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, i = divmod(position, n)
        order.append(_permutation(n, seed, epoch)[i])
    return order


@functools.lru_cache(maxsize=2)  # a batch may span two epochs
def _permutation(n: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(n, generator=generator("order", seed, epoch)).tolist()

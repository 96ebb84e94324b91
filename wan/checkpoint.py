"""Checkpoints, one file or shards: .safetensors and .pth read tensor by tensor, .safetensors written file by file.

    source = Checkpoint(path)           names and shapes; no weights are read yet
    match(net, source, rename)          net's names -> the checkpoint's, if names and shapes are just net's
    fill(net, source, rename, dtype)    a network that was built on the meta device gets its weights, tensor by tensor
    write_checkpoint(folder, shapes, get, dtype)    safetensors files of at most 5 GB, and their index

A .pth file is read with weights_only=True: it cannot run code. Peak memory is the network's own weights and one tensor
(a .pth from before PyTorch 1.6 is read whole).
"""

import json
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import safe_open
from torch import Tensor

from runtime import run as common
from runtime.run import UserError

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"  # Wan's and diffusers' file name


class Checkpoint(Mapping):
    """name -> tensor.

    A folder's `*.index.json` names its shards; without one, all its *.safetensors are read, or else its only .pth.
    UserError for a path without weights, a missing or damaged file, and a .pth that holds anything but tensors.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.files: dict[str, Path] = {}  # tensor name -> file
        self._open: dict[Path, Mapping] = {}
        for file in self._listed():
            for name in self._names(file):
                if name in self.files:
                    raise UserError(f"{self.path}: {name} is in {self.files[name].name} and in {file.name}; keep one")
                self.files[name] = file

    def _listed(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        indices = sorted(self.path.glob("*.safetensors.index.json"))
        if indices:
            try:
                names = sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))
                files = [self.path / name for name in names]
            except (ValueError, KeyError, AttributeError, TypeError):
                raise UserError(f"{indices[0]}: expected a weight_map of shards, got something else") from None
            if missing := [f.name for f in files if not f.is_file()]:
                raise UserError(f"{self.path}: expected the {len(files)} shards of its index, {missing[0]} is missing")
            return files
        files, pickles = (sorted(self.path.glob(kind)) for kind in ("*.safetensors", "*.pth"))
        if not files and len(pickles) == 1:
            return pickles
        if not files:
            state = f"has {len(pickles) or 'none'}" + " .pth files" * bool(pickles)
            state = state if self.path.is_dir() else "does not exist"
            raise UserError(f"{self.path}: expected weights, *.safetensors or the path of a .pth file, but it {state}")
        return files

    def _names(self, file: Path) -> list[str]:
        try:
            if file.suffix == ".safetensors":
                self._open[file] = safe_open(file, "pt")
                return list(self._open[file].keys())
            zipped = zipfile.is_zipfile(file)
            with open(file, "rb") as opened:
                pickled = opened.read(1) == b"\x80"
            if not zipped and not pickled:  # neither kind of file that PyTorch writes
                raise UserError(
                    f"{file}: expected readable weights, got another file, or a download that was cut short"
                )
            tensors = self._open[file] = torch.load(file, "cpu", weights_only=True, mmap=zipped)
        except pickle.UnpicklingError:
            raise UserError(f"{file}: expected tensors alone, got a damaged file, or code, which is refused") from None
        except UserError:
            raise
        except Exception as error:  # an unpickler on damaged bytes may raise anything
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{file}: expected readable weights, got: {said}") from None
        if not isinstance(tensors, dict) or not all(
            isinstance(k, str) and isinstance(a, Tensor) for k, a in tensors.items()
        ):
            raise UserError(f"{file}: expected a dictionary of names and tensors, got something else")
        return list(tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        opened = self._open[self.files[name]]
        return tuple(opened[name].shape if isinstance(opened, dict) else opened.get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        opened = self._open[self.files[name]]
        return opened[name] if isinstance(opened, dict) else opened.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def renaming(table: list[tuple[str, str | Callable]]) -> Callable[[str], str]:
    """A tensor's name in others' checkpoints -> ours, by the patterns of `table` one after the other."""

    def rename(name: str) -> str:
        for theirs, ours in table:
            name = re.sub(theirs, ours, name)
        return name

    return rename


def match(net: nn.Module, source: Checkpoint, rename: Callable[[str], str]) -> dict[str, str]:
    """net's name of every tensor -> the checkpoint's.

    rename: the checkpoint's name of a tensor -> net's. UserError if names or shapes are not exactly net's.
    """
    wanted = {name: tuple(a.shape) for name, a in net.state_dict().items()}
    found = {rename(name): name for name in source}
    for name in {**wanted, **found}:
        got = source.shape(found[name]) if name in found else None
        if got != wanted.get(name):
            raise UserError(
                f"{source.path}: expected the tensors of this architecture; {name}: "
                f"expected {wanted.get(name, 'no such tensor')}, got {got or 'nothing'}"
            )
    return {name: found[name] for name in wanted}


def fill(net: nn.Module, source: Checkpoint, rename: Callable[[str], str], dtype: torch.dtype, device) -> nn.Module:
    """Gives net, built on the meta device, the tensors of `source`. Returns net, frozen. UserError as `match`."""
    for name, its_name in match(net, source, rename).items():
        parent, _, leaf = name.rpartition(".")
        tensor = source[its_name].to(device, dtype)
        setattr(net.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=False))
    return net


def write_checkpoint(
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    get: Callable[[str], Tensor],
    dtype: torch.dtype,
    limit: int = 5 * 10**9,
) -> list[str]:
    """Writes get(name), rounded to dtype, for every name of `shapes`: one file, or shards and, last, their index.

    limit: bytes of tensors a file, unless one alone has more. One file's tensors are held at a time. Returns the files'
    names, which are Wan's and diffusers'.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards, used = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    stem, count = WEIGHTS_NAME.removesuffix(".safetensors"), len(shards)
    files = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)] if count > 1 else [WEIGHTS_NAME]
    for file, names in zip(files, shards):
        common.write_tensors(folder / file, {name: get(name).to(dtype) for name in names}, {"format": "pt"})
    if count > 1:
        where = {name: file for file, names in zip(files, shards) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        common.write_json(folder / f"{WEIGHTS_NAME}.index.json", index)
        files.append(f"{WEIGHTS_NAME}.index.json")
    return files

"""Checkpoints of one file or of shards: .safetensors and .pth are read tensor by tensor, .safetensors is written.

    source = Checkpoint(path)               names and shapes; no weights are read yet
    match(net, source, rename)              net's names -> the checkpoint's, if names and shapes are exactly net's
    load(path, rename, build, ...)          a network of the checkpoint's sizes, with its weights
    write_checkpoint(folder, shapes, ...)   safetensors files of at most 5 GB, and their index

A .pth file is read with weights_only=True, so it cannot run code. Peak memory is the network's own weights and one
tensor; a .pth from before PyTorch 1.6 is read whole.
"""

import math
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model import WEIGHTS_NAME, check_finite, check_shapes, fill, noted, read_header, weight_files, weights_header
from runtime.files import nearest, write_json, write_tensors
from runtime.options import UserError, user_errors


class Checkpoint(Mapping):
    """name -> tensor, of a file or a folder.

    A folder's `*.index.json` names its shards. Without one, all *.safetensors are read; without those, the only .pth.
    UserError for a path without weights, a missing or damaged file, and a .pth that holds anything but tensors.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file: dict[str, Path] = {}  # tensor name -> file
        self._open: dict[Path, Mapping] = {}
        for file in self._listed():
            self._open[file] = _open_file(file)
            for name in self._open[file].keys():
                if name in self._file:
                    raise UserError(f"{self.path}: {name} is in {self._file[name].name} and in {file.name}; keep one")
                self._file[name] = file

    def _listed(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        with user_errors():
            files, pickles = weight_files(self.path), sorted(self.path.glob("*.pth"))
        if files or len(pickles) == 1:
            return files or pickles
        found = f"has {len(pickles)} .pth files" if pickles else "has none"
        found = found if self.path.is_dir() else f"does not exist{nearest(self.path)}"
        raise UserError(f"{self.path}: expected weights, *.safetensors or the path of a .pth file, but it {found}")

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read for it."""
        opened = self._open[self._file[name]]
        return tuple(opened[name].shape if isinstance(opened, dict) else opened.get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        opened = self._open[self._file[name]]
        return opened[name] if isinstance(opened, dict) else opened.get_tensor(name)

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """A tensor, on a device. UserError if it holds NaN or infinity, or is of a dtype that is not read."""
        try:
            tensor = self[name].to(device)
            check_finite(tensor, f"{self._file[name]}: {name}")
        except SafetensorError as error:
            raise UserError(f"{self._file[name]}: {name}: {error}") from None
        except ValueError as error:
            raise UserError(str(error)) from None
        return tensor

    def loras(self) -> tuple[str, ...]:
        """The digests of the LoRAs that are in the weights. UserError for a damaged header."""
        opened = [one for one in self._open.values() if not isinstance(one, dict)]
        try:
            return tuple(sorted(set().union(*(noted(read_header(one), "merged") for one in opened))))
        except ValueError as error:
            raise UserError(f"{self.path}: expected a header of wan.export, got: {error}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __len__(self) -> int:
        return len(self._file)


def _open_file(file: Path):
    """A safetensors file, opened, or the dictionary of a .pth, mapped where its format allows it."""
    try:
        if file.suffix == ".safetensors":
            return safe_open(file, "pt")
        zipped = zipfile.is_zipfile(file)
        with open(file, "rb") as opened:
            pickled = opened.read(1) == b"\x80"
        if not zipped and not pickled:  # PyTorch writes no third kind of file
            raise ValueError("another file, or a download that was cut short")
        tensors = torch.load(file, "cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError:
        raise UserError(f"{file}: expected tensors alone, got a damaged file, or code, which is refused") from None
    except Exception as error:  # an unpickler may raise anything on damaged bytes
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file}: expected readable weights, got: {said}") from None
    named = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
    if not named or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"{file}: expected a dictionary of names and tensors, got something else")
    return tensors


def match(net: nn.Module, source: Checkpoint, rename: Callable[[str], str]) -> dict[str, str]:
    """The network's name of every tensor -> the checkpoint's.

    rename: the checkpoint's name of a tensor -> net's. UserError if names or shapes are not exactly net's.
    """
    found = {rename(name): name for name in source}
    try:
        check_shapes(net, {name: source.shape(its_name) for name, its_name in found.items()})
    except ValueError as error:
        raise UserError(f"{source.path}: {error}") from None
    return {name: found[name] for name in net.state_dict()}


def load(
    path: str | Path,
    rename: Callable[[str], str],
    build: Callable[[dict[str, tuple[int, ...]]], nn.Module],
    what: str,
    places: tuple[str, ...],
    dtype: torch.dtype,
    device: torch.device | str,
) -> nn.Module:
    """A network of the sizes that a checkpoint's tensors have, with their values; frozen, in eval mode.

    rename: as in `match`; build: the shapes, under the network's names, -> the network; what: the network, in words;
    places: where in the folder `path` the checkpoint may be. UserError if there is none, or one of another network.
    """
    path = next((p for p in (Path(path) / place for place in places) if p.exists()), Path(path))
    source = Checkpoint(path)
    try:
        with torch.device("meta"):
            net = build({rename(name): source.shape(name) for name in source})
    except KeyError as error:
        raise UserError(f"{path}: expected {what}, found no {error}") from None
    except (ValueError, IndexError):
        raise UserError(f"{path}: expected {what}, its tensors have other shapes") from None
    names = match(net, source, rename)
    return fill(net, lambda name: source.read(names[name], device).to(dtype)).eval()


def write_checkpoint(
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    get: Callable[[str], Tensor],
    dtype: torch.dtype,
    limit: int = 5 * 10**9,
    loras: Sequence[str] = (),
) -> list[str]:
    """Writes get(name), rounded to dtype, for every name of `shapes`: one file, or shards and then their index.

    limit: the bytes of tensors in a file; a larger tensor gets a file of its own; loras: the digests of those that are
    in the weights, for the files' headers. Only one file's tensors are in memory at a time. Returns the files' names,
    which are Wan's and diffusers'.
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
        write_tensors(folder / file, {name: get(name).to(dtype) for name in names}, weights_header(loras))
    if count > 1:
        where = {name: file for file, names in zip(files, shards) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        write_json(folder / f"{WEIGHTS_NAME}.index.json", index)
        files.append(f"{WEIGHTS_NAME}.index.json")
    return files

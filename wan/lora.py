"""LoRA files, whichever program wrote them, and models with LoRAs on them.

    lora_files("out/sft,style.safetensors")   the files that such an option names; folders are checked
    read_lora(net, path)                      the low-rank term of each layer, and what is added to whole tensors
    read_loras(net, files)                    the same of several, none twice, none without what it was trained on
    load_adapted(base, files)                 the base with LoRAs on it
    load_continuation(base, folder)           the continuation model Φ

A file or folder that does not serve is a UserError that names it.
"""

import math
import re
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import model
from runtime.files import MANIFEST, nearest, read_manifest, verified
from runtime.group import rank_and_size
from runtime.options import UserError, listed, user_errors


def lora_file(entry: str) -> Path:
    """The file that an entry of --lora names.

    UserError if it does not exist, if its folder is unfinished or damaged, and for a continuation model Φ.
    """
    path = Path(entry)
    if any((path / name).is_file() for name in ("run.json", MANIFEST)):  # made by this project
        read_manifest(path, "sft.py, asymdpo.py, experiments.baselines, experiments.distill or wan.export")
    file = path / "lora.safetensors" if path.is_dir() else path
    if not file.is_file():
        expected = "expected a LoRA file, or a folder with lora.safetensors"
        raise UserError(f"{file}: {expected}, got no such file{nearest(path)}")
    if (path / "task_prompt.safetensors").is_file() or read_header(file).get("task") == "continuation":
        raise UserError(f"{path}: expected a text-to-video LoRA, got a continuation model's")
    return file


def lora_files(names: str) -> list[Path]:
    """The files of --lora's list. UserError as `listed` and `lora_file`."""
    return [lora_file(entry) for entry in listed(names, "lora")]


def read_header(path: Path) -> dict:
    """What `model.export_lora` noted in a LoRA file's header, or nothing in another program's.

    UserError if it cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            return model.read_header(file)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: expected a LoRA's header, got: {error}; make or download the file again") from None


def _peft_alpha(path: Path) -> float | None:
    """The alpha that PEFT keeps in adapter_config.json and diffusers in the header, or None."""
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get("lora_adapter_metadata", "{}")  # diffusers, loaders/lora_base.py
    recipe = path.with_name("adapter_config.json")
    try:
        if path.name == "adapter_model.safetensors" and recipe.is_file():  # peft, utils/constants.py
            text = recipe.read_text(encoding="utf-8")
        told = {key.removeprefix("transformer."): value for key, value in model.read_json(text).items()}
        alpha = told.get("lora_alpha")
        alpha = None if alpha is None else float(alpha)
    except (OSError, ValueError, TypeError, OverflowError):
        raise UserError(f"{path}: expected PEFT's configuration beside it or in its header, got damaged text") from None
    if told.get("alpha_pattern") or told.get("use_rslora") or told.get("use_dora"):
        raise UserError(f"{path}: expected a LoRA with one alpha, got alpha_pattern, use_rslora or use_dora")
    return alpha


Diffs = dict[str, Tensor]  # what is added to whole tensors, by their names in the network

# What is too small for a low-rank term is kept as a difference: biases, norms, modulation, small matrices.
# github.com/ModelTC/LightX2V, tools/extract/lora_extractor.py _generate_lora_diff_key. ComfyUI passes over diff_m
# (github.com/Comfy-Org/ComfyUI/issues/8922); diffusers over that and the norms' diff
# (loaders/lora_conversion_utils.py _convert_non_diffusers_wan_lora_to_diffusers). Here all of them count.
DIFFS = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}
KEY = re.compile(r"(.+?)\.(?:(lora_A|lora_down)|(lora_B|lora_up))(?:\.default)?\.weight|(.+)\.alpha")


def parse_lora(net: model.DiT, tensors: dict[str, Tensor], alpha: float | None = None) -> tuple[model.LoRA, Diffs]:
    """What a LoRA file's tensors hold for net: the low-rank term of each layer, and the differences of whole tensors.

    Layers have Wan's names, diffusers' or kohya's (lora_unet_blocks_0_…), after `diffusion_model.`, `transformer.`,
    `base_model.model.` or nothing; lora_A and lora_B, or lora_down and lora_up; with or without a tensor alpha, which
    is not for differences. alpha: that of the layers without one. ValueError if a key does not fit net, if there is
    none, if one layer stands under two names, and for an alpha that is 0 or no number.
    """
    kohya = {"lora_unet_" + name.replace(".", "_"): name for name in model.linears(net)}
    shapes = {name: a.shape for name, a in net.state_dict().items()}
    parts: dict[str, dict[str, Tensor]] = {}
    diffs: Diffs = {}
    for key, tensor in tensors.items():
        short = re.sub(r"^(diffusion_model|transformer|base_model\.model)\.", "", key)
        layer, _, kind = short.rpartition(".")
        if kind in DIFFS:
            name = model.wan_name(f"{kohya.get(layer, layer)}.{DIFFS[kind]}")
            if shapes.get(name) != tensor.shape:
                got = f"{key[:99]!r} {tuple(tensor.shape)}"
                raise ValueError(f"expected a LoRA for this model, got {got}, which does not fit it")
            if name in diffs:
                raise ValueError(f"expected each tensor once, got {name!r} again as {key!r}")
            diffs[name] = tensor
            continue
        found = KEY.fullmatch(short)
        if not found:
            raise ValueError(f"expected a LoRA for this model, got the key {key[:99]!r}")
        layer, down, up, scaled = found.groups()
        name = model.wan_name(f"{kohya.get(layer or scaled, layer or scaled)}.weight").removesuffix(".weight")
        part, kind = parts.setdefault(name, {}), "A" if down else "B" if up else "alpha"
        if kind in part:
            raise ValueError(f"expected each layer once, got {name!r} again as {key!r}")
        part[kind] = tensor
    if not tensors:
        raise ValueError("expected a LoRA, got a file without tensors")
    loras = {}
    for name, part in sorted(parts.items()):
        if not {"A", "B"} <= part.keys() or part.get("alpha", torch.ones(1)).numel() != 1:
            raise ValueError(f"expected a LoRA for this model, got half of one for {name!r}, or a strange alpha")
        own = part["alpha"].item() if "alpha" in part else alpha
        if own is not None and not (math.isfinite(own) and own):
            raise ValueError(f"expected an alpha that is a number and not 0, got {own} for {name!r}")
        loras[name] = model.LowRank(part["A"], part["B"], 1.0 if own is None else own / max(1, len(part["A"])))
    return loras, diffs


def _read(net: model.DiT, path: Path) -> tuple[model.LoRA, Diffs, dict, str]:
    """As `read_lora`, and the file's header and digest, as `model.read_lora_file` gives them."""
    with user_errors():
        tensors, header, found = model.read_lora_file(path)
    told = _peft_alpha(path)
    try:
        lora, diffs = parse_lora(net, tensors, told)
        model.check_lora(net, lora)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return lora, diffs, header, found


def read_lora(net: model.DiT, path: str | Path) -> tuple[model.LoRA, Diffs]:
    """What a LoRA file holds for net: the low-rank term of each layer, and the differences of whole tensors.

    Keys as in `parse_lora`; alpha may also stand where PEFT keeps it. net may be on the meta device. UserError for
    anything but a LoRA for net, for a file that is damaged, and for NaN and infinity.
    """
    lora, diffs, *_ = _read(net, Path(path))
    return lora, diffs


def read_loras(net: model.DiT, files: list[Path]) -> list[tuple[model.LoRA, Diffs]]:
    """As `read_lora`, of the files that belong on net together: net.loras says afterwards what it then has.

    UserError for the same LoRA twice, in whatever files or in net's own weights. A line on stderr for one that was
    trained on top of another that is in neither: alone it is half of what was trained.
    """
    read = [_read(net, file) for file in files]
    with user_errors():
        for file, (_, _, header, found) in zip(files, read):
            model.note_lora(net, file, header, found)
    for file, (_, _, header, _) in zip(files, read):
        if model.noted(header, "beneath") - set(net.loras) and rank_and_size()[0] == 0:
            below = header.get("sft") or header.get("base")
            missing = f"{below}, which is not among these LoRAs: give both, or train it anew"
            print(f"warning: {file} was trained on top of {missing}", file=sys.stderr)
    return [(lora, diffs) for lora, diffs, *_ in read]


def load_adapted(
    base: str | Path, loras: list[Path], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> model.DiT:
    """The base with these LoRAs on it, frozen; its matrix products run in dtype.

    A weight that is rounded once at most takes the LoRAs in: it is float32 in the base's files, or dtype is. A second
    rounding would lose most of a small update: there the LoRAs stay terms of their own. Differences of whole tensors
    are always taken in: they were taken from weights of such a rounding.

    UserError for a base that is damaged or no model, and as `read_loras`.
    """
    with user_errors():
        net, read = model.open_model(verified(base, "sft.py or wan.export"))
    files = read_loras(net, loras)

    def weight(name: str) -> Tensor:
        tensor, layer, wanted = read(name, device), name.removesuffix(".weight"), model.weight_dtype(name, dtype)
        once = torch.float32 in (tensor.dtype, wanted)
        terms = [lora.pop(layer) for lora, _ in files if once and layer in lora]
        return model.fuse(tensor, terms, [diffs[name] for _, diffs in files if name in diffs]).to(wanted)

    with user_errors():
        model.fill(net, weight)
    for lora, _ in files:
        model.attach_lora(net, lora)
    return net.eval()


def load_continuation(
    base: str | Path,
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    loras: list[Path] = (),
) -> model.DiT:
    """The continuation model Φ, frozen: the base with `loras`, and with the LoRA, the attention and the prompts of
    continuation.py's folder. UserError as `load_adapted`, and for task prompts that do not fit.
    """
    folder = Path(folder)
    net = load_adapted(base, [*loras, folder / "lora.safetensors"], dtype, device)
    net.prefix = read_header(folder / "lora.safetensors").get("attention") == "prefix"  # up to 0.7 not noted: full
    if (folder / "task_prompt.safetensors").exists():
        with user_errors():
            model.load_task_prompt(net, folder / "task_prompt.safetensors")
    return net.requires_grad_(False)

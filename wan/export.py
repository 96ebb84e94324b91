"""One checkpoint, or one LoRA, out of a base and the LoRAs that were trained on it: what other programs open.

    W' = round(W + Σ (alpha_i / rank_i)·B_i·A_i)    the sum in float32, rounded once

    python merge.py --base Wan2.1-T2V-1.3B --lora out/sft,out/asymdpo --out out/lora --layout lora --dtype bfloat16
    python merge.py --base Wan2.1-T2V-1.3B --lora out/sft,out/asymdpo --out out/merged --layout wan
    python merge.py --base Wan2.1-T2V-1.3B --lora out/sft,out/asymdpo --out out/diffusers --layout diffusers

A LoRA of asymdpo.py stands on its cold start: give both, as above.

In    a model folder or file, of which `--layout lora` reads the names and shapes alone; folders with a
      lora.safetensors, or LoRA files of any program that model.read_lora knows
Out   lora       lora.safetensors: the LoRAs as one, their ranks side by side, for ComfyUI, diffusers and others
      wan        config.json and diffusion_pytorch_model*.safetensors under Wan's names, for Wan's code and ComfyUI
      diffusers  transformer/, for diffusers.WanTransformer3DModel.from_pretrained(out, subfolder="transformer")
Cost  one pass over the weights; in memory the LoRAs and one file of at most 5 GB, beside the base as it is mapped
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

import model
from runtime import run as common
from runtime.run import UserError
from wan import checkpoint as weights

LAYOUTS = ("wan", "diffusers", "lora")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LoRA = dict[str, tuple[Tensor, Tensor, float]]  # layer -> A, B, alpha / rank


@dataclasses.dataclass(frozen=True)
class Config:
    """Fuses LoRAs into a base, or several LoRAs into one."""

    base: str = "out/demo/base"  # model folder or file, in the layout of Wan, diffusers or ComfyUI
    lora: str = "out/demo/sft,out/demo/asymdpo"  # folders with lora.safetensors, or files, separated by commas
    out: str = "out/merged"  # folder to write
    layout: str = "wan"  # wan or diffusers: the whole model under their names; lora: one LoRA file
    dtype: str = "float32"  # of what is written: float32 or bfloat16


def cold_start(file: Path) -> str:
    """The LoRA below this one, as the header of one of asymdpo.py tells it; of others nothing."""
    with safe_open(file, "pt") as opened:
        told = (opened.metadata() or {}).get("dynamicsboost", "{}")
    return json.loads(told).get("sft", "")


def joined(net: model.DiT, loras: list[LoRA]) -> model.DiT:
    """net, on the meta device, with the LoRAs' sum as one LoRA: A (Σ rank, in), B (out, Σ rank).

    Layers with fewer ranks get zeros: older diffusers takes the first layer's rank for every layer's alpha
    (utils/peft_utils.py, get_peft_kwargs).
    """
    parts = {name: [lora[name] for lora in loras if name in lora] for lora in loras for name in lora}
    rank = max(sum(len(A) for A, _, _ in part) for part in parts.values())
    for name, part in parts.items():
        A, B = torch.cat([A for A, _, _ in part]), torch.cat([scale * B for _, B, scale in part], dim=1)
        layer, missing = net.get_submodule(name), rank - len(A)
        layer.lora_A, layer.lora_B = nn.Parameter(F.pad(A, (0, 0, 0, missing))), nn.Parameter(F.pad(B, (0, missing)))
        layer.lora_scale = 1.0
    return net


def main(cfg: Config) -> None:
    # ---- what to do, checked before anything is loaded
    if cfg.layout not in LAYOUTS:
        raise UserError(f"--layout: expected one of {', '.join(LAYOUTS)}, got {cfg.layout!r}")
    if cfg.dtype not in DTYPES:
        raise UserError(f"--dtype: expected one of {', '.join(DTYPES)}, got {cfg.dtype!r}")
    files = model.lora_files(cfg.lora)
    if not files:
        raise UserError("--lora: expected folders or files, separated by commas, got none")
    run = common.Run(cfg, "merge", common.Group(0, 1, None), {"base": cfg.base} | {str(file): file for file in files})
    if run.done:
        return
    net, source, names = model.open_model(cfg.base)
    loras = [model.read_lora(net, file) for file in files]
    if len(files) == 1 and (below := cold_start(files[0])):
        print(f"merge: note: {files[0]} was trained on top of {below}; give both, that one first", file=sys.stderr)
    run.claim()

    # ---- one LoRA
    if cfg.layout == "lora":
        model.export_lora(joined(net, loras), run.folder / "lora.safetensors", DTYPES[cfg.dtype], lora=cfg.lora)
        run.finish(["lora.safetensors"])
        print(f"merge: {run.folder / 'lora.safetensors'}")
        return

    # ---- the whole model
    wan = cfg.layout == "wan"
    ours = {name if wan else model.diffusers_name(name): name for name in names}
    shapes = {name: source.shape(names[ours[name]]) for name in ours}
    bar = run.progress(len(ours), unit="tensor")

    def merged(name: str) -> Tensor:
        weight, layer = source[names[ours[name]]].float(), ours[name].removesuffix(".weight")
        for A, B, scale in (lora[layer] for lora in loras if layer in lora):
            weight = weight + scale * (B @ A)
        bar.update()
        return weight

    folder = "" if wan else "transformer/"
    config = model.wan_config(net.config) if wan else model.diffusers_config(net.config)
    common.write_json(run.folder / folder / "config.json", config)
    written = weights.write_checkpoint(run.folder / folder, shapes, merged, DTYPES[cfg.dtype])
    bar.close()
    run.finish([folder + file for file in ("config.json", *written)])
    print(f"merge: {run.folder / folder}")


if __name__ == "__main__":
    common.run(main, Config, __doc__)

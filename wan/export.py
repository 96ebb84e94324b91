"""Fuses LoRAs into their base, or several LoRAs into one, for other programs to open.

    W' = round(W + Σ (alpha_i / rank_i)·B_i·A_i + Σ diff_i)    the sum is float32 and rounded once

    python -m wan.export --base Wan2.1-T2V-1.3B --lora out/sft,out/asymdpo --out out/lora --layout lora --dtype bfloat16
    python -m wan.export --base Wan2.1-T2V-1.3B --lora out/sft,out/asymdpo --out out/merged --layout wan
    python -m wan.export --base Wan2.1-T2V-1.3B --lora out/sft,out/asymdpo --out out/diffusers --layout diffusers

The LoRA of asymdpo.py was trained on top of its cold start, so give both, as above.

In    a model folder or file (--layout lora reads only its tensors' names and shapes); folders with lora.safetensors,
      or LoRA files of any program that wan.lora.read_lora knows
Out   lora       lora.safetensors: one LoRA with the ranks of all, for ComfyUI, diffusers and others
      wan        config.json and diffusion_pytorch_model*.safetensors under Wan's names, for Wan's code and ComfyUI
      diffusers  transformer/, for diffusers.WanTransformer3DModel.from_pretrained(out, subfolder="transformer")
Cost  one pass over the weights; memory for the LoRAs and one file of at most 5 GB, beside the memory-mapped base
"""

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import model
from runtime.files import verified, whole_file, write_json
from runtime.group import alone
from runtime.options import UserError, option, program, resolve, user_errors
from runtime.run import Run
from wan.checkpoint import Checkpoint, match, write_checkpoint
from wan.lora import lora_files, read_header, read_loras

LAYOUTS = ("wan", "diffusers", "lora")


@dataclasses.dataclass(frozen=True)
class Config:
    """Fuses LoRAs into a base, or several LoRAs into one."""

    base: str = "out/demo/base"  # model folder or file, in the layout of Wan, diffusers or ComfyUI
    lora: str = option("out/demo/sft,out/demo/asymdpo", empty=True)  # folders or files of LoRAs, separated by commas
    out: str = option("out/merged", neutral=True)  # folder to write
    layout: str = option("wan", choices=LAYOUTS)  # wan or diffusers: the whole model, by their names; lora: one LoRA
    dtype: str = option("float32", choices=("float32", "bfloat16"))  # of what is written


def open_model(path: str | Path) -> tuple[model.DiT, Checkpoint, dict[str, str]]:
    """The model of a file or folder, opened without reading its weights.

    Returns the network, on the meta device; the checkpoint; and the network's name of each tensor -> the checkpoint's.
    UserError for anything but a text-to-video transformer of Wan's.
    """
    path = verified(path, "sft.py or wan.export")
    path = path / "transformer" if (path / "transformer").is_dir() else path
    source = Checkpoint(path)
    shape = {model.wan_name(name): source.shape(name) for name in source}
    try:
        config = model.read_config(shape, (path if path.is_dir() else path.parent) / "config.json")
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    with torch.device("meta"):
        net = model.DiT(config)
    net.loras = source.loras()
    return net, source, match(net, source, model.wan_name)


def diffusers_name(name: str) -> str:
    """Wan's name of a tensor -> diffusers'."""
    return model.rename(name, [(ours, theirs) for theirs, ours in model.DIFFUSERS_NAMES])


def diffusers_config(config: model.DiTConfig) -> dict:
    """config.json of diffusers' layout. Any text_len but 512 is unknown to diffusers, but kept for our own loader."""
    same = ("ffn_dim", "num_layers", "text_dim", "freq_dim", "patch_size", "eps")
    same += ("text_len",) * (config.text_len != model.DiTConfig.text_len)
    return {
        "_class_name": "WanTransformer3DModel",
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.dim // config.num_heads,
        "in_channels": config.in_dim,
        "out_channels": config.out_dim,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        **{name: getattr(config, name) for name in same},
    }


def joined(loras: list[model.LoRA]) -> model.LoRA:
    """The sum of LoRAs as one: A (Σ rank, in), B (out, Σ rank).

    Every layer gets the same rank, where necessary with zeros: older diffusers takes the first layer's rank for every
    layer's alpha (utils/peft_utils.py, get_peft_kwargs).
    """
    parts = {name: [lora[name] for lora in loras if name in lora] for lora in loras for name in lora}
    rank, one = max(sum(len(term.A) for term in part) for part in parts.values()), {}
    for name, part in parts.items():
        A, B = torch.cat([term.A for term in part]), torch.cat([term.scale * term.B for term in part], dim=1)
        missing = rank - len(A)
        one[name] = model.LowRank(F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing)), 1.0)
    return one


def main(cfg: Config) -> None:
    # ---- the options, checked before anything is loaded
    cfg = resolve(cfg)
    files, dtype = lora_files(cfg.lora), getattr(torch, cfg.dtype)
    if not files and cfg.layout == "lora":
        raise UserError("--lora: expected folders or files, separated by commas, got none")
    run = Run(cfg, "wan.export", alone(), {"base": cfg.base, "lora": files})
    if run.done:
        return
    net, source, names = open_model(cfg.base)
    of_base, read = set(net.loras), read_loras(net, files)
    for file, (_, diffs) in zip(files, read):
        if diffs and cfg.layout == "lora":
            got = f"got differences of {len(diffs)} whole tensors, {min(diffs)} among them"
            raise UserError(f"{file}: expected low-rank terms alone for --layout lora, {got}; choose another layout")
    run.claim()

    # ---- one LoRA
    if cfg.layout == "lora":
        merged = set(net.loras) - of_base
        beneath = set().union(*(model.noted(read_header(file), "beneath") for file in files)) - merged
        provenance = dict(lora=cfg.lora, merged=sorted(merged), beneath=sorted(beneath))
        with user_errors(), whole_file(run.folder / "lora.safetensors") as file:
            model.export_lora(joined([lora for lora, _ in read]), file, dtype, **provenance)
        run.finish(["lora.safetensors"], f"{len(read)} LoRA{'s' * (len(read) > 1)} as one")
        return

    # ---- the whole model
    wan = cfg.layout == "wan"
    ours = {name if wan else diffusers_name(name): name for name in names}
    shapes = {name: source.shape(names[ours[name]]) for name in ours}
    bar = run.progress(len(ours), unit="tensor")

    def fused(name: str) -> Tensor:
        name = ours[name]
        weight, layer = source.read(names[name]), name.removesuffix(".weight")
        bar.update()
        terms = [lora[layer] for lora, _ in read if layer in lora]
        return model.fuse(weight, terms, [diffs[name] for _, diffs in read if name in diffs])

    folder = "" if wan else "transformer/"
    config = model.wan_config(net.config) if wan else diffusers_config(net.config)
    (run.folder / folder).mkdir(exist_ok=True)
    write_json(run.folder / folder / "config.json", config)
    written = write_checkpoint(run.folder / folder, shapes, fused, dtype, loras=net.loras)
    bar.close()
    run.finish([folder + file for file in ("config.json", *written)], f"{len(ours):,} tensors")


if __name__ == "__main__":
    program(main, Config, __doc__)

"""The model card that wan.export writes: README.md, whose front matter the Hugging Face hub reads.

It says what is known, and nothing else: of a base by its folder's name and its sizes, of a LoRA by its header and by
the manifest beside it. No path is in it.
"""

import re
from pathlib import Path

import model
from runtime.files import MANIFEST, open_manifest
from wan.lora import MADE_BY, read_header

PAPER = (
    "*DynamicsBoost: Dynamic Plausible Video Generation via Annotation-Free Continuation Preference Optimization*, "
    "CVPR 2026, pp. 20024–20033"
)
METHOD = (
    "Asymmetrical DPO trained a text-to-video model on pairs of videos, to prefer the one over the other. The "
    "loss is on {frames}."
)
FRAMES = {  # --region -> the frames in the loss
    "23": "just the frames where the two differ",
    "3": "just the frames that are generated in both",
    "123": "all frames",
}
PAIRS = (
    " Each pair is one real clip whose beginning a continuation model went on with: from few given frames (the loser) "
    "and from many (the winner). So nobody had to label them, and there is no reward model."
)
SOURCE = f" The method is {PAPER}; this was made by an open implementation of it, not by its authors' code."
HALF = "It was trained on top of another LoRA, which is not in it: alone it is half of what was trained."
LICENCE = (
    "Wan's published models are Apache-2.0, and so is the code that made this. What may be done with weights that were "
    "trained on videos and captions depends on those, too, and they are not named here: whoever publishes this states "
    "the licence, here and as `license` above."
)
STAGES = {  # task in a LoRA's header -> its command, and what it does
    "sft": ("sft.py", "flow matching on real clips, the cold start"),
    "asymdpo": ("asymdpo.py", "Asymmetrical DPO on pairs"),
    "baseline": ("experiments.baselines", "a DPO baseline on labelled pairs"),
    "distill": ("experiments.distill", "step distillation"),
}
RELEASE = re.compile(r"(Wan2\.1-T2V-1\.3B|Wan2\.1-T2V-14B|Wan2\.2-T2V-A14B)(-Diffusers)?$")
SIZES = {"Wan2.1-T2V-1.3B": "1.3b", "Wan2.1-T2V-14B": "14b", "Wan2.2-T2V-A14B": "a14b"}


def release(base: str | Path, config: model.DiTConfig) -> str:
    """The name of the published model that base is, without "-Diffusers", or "": by a folder's name in its path, which
    may be that of the hub's cache, if the sizes are that model's.
    """
    found = (RELEASE.search(part) for part in reversed(Path(base).absolute().parts))
    name = next((match[1] for match in found if match), "")
    return name if name and config == model.PRESETS[SIZES[name]] else ""


def stages_of(file: Path) -> list[dict]:
    """What is known of how a LoRA's file was made: for each training that is in it task, rank, and the options and
    counts that its manifest has. Of another program's file, its name.
    """
    header = read_header(file)
    if isinstance(header.get("stages"), list):  # several in one, by wan.export
        return [stage for stage in header["stages"] if isinstance(stage, dict)]
    if not header.get("task"):
        return [{"file": file.name}]
    manifest = open_manifest(file.parent, MADE_BY) if (file.parent / MANIFEST).is_file() else {}
    told = manifest if file.name in manifest.get("files", ()) else {}
    known = {name: told[name] for name in ("clips", "pairs", "window", "frames") if name in told}
    options = ("steps", "batch_size", "lr", "layers", "beta", "form", "region", "sft_weight", "t_min", "t_max")
    known |= {name: value for name, value in told.get("config", {}).items() if name in options}
    return [{"task": header["task"], "rank": header.get("rank", ""), **known}]


def _sentence(stage: dict) -> str:
    """A training in a line of the card, whatever another version, or another program, has put into a header."""
    try:
        return " ".join(_words(stage).split())
    except (KeyError, TypeError, ValueError):
        return "a training that its LoRA tells of in another form than this program's"


def _words(stage: dict) -> str:
    if "task" not in stage:
        return f"`{stage['file']}`, a LoRA that does not say how it was trained"
    command, what = STAGES.get(stage["task"], (stage["task"], ""))
    unit = "pairs" if "pairs" in stage or stage["task"] in ("asymdpo", "baseline") else "clips"
    parts = [f"`{command}`" + f": {what}" * bool(what)]
    if "steps" in stage:
        parts.append(f"{stage['steps']:,} steps of {stage['batch_size']} {unit}")
    if count := stage.get("pairs", stage.get("clips")):
        parts.append(f"from a folder of {count:,} {unit}")
    if window := stage.get("window"):
        low1, high1, low2, high2 = window
        given = f"the loser was given {low1} to {high1}, the winner {low2} to {high2}"
        parts.append(f"{given} of {stage['frames']} latent frames")
    parts += [f"learning rate {stage['lr']:g}"] if "lr" in stage else []
    parts.append(f"rank {stage['rank']}" + (f" on `{stage['layers']}`" if "layers" in stage else ""))
    if stage["task"] == "asymdpo" and "beta" in stage:
        parts.append(f"β {stage['beta']:g}, {stage['form']}, region {stage['region']}, λ {stage['sft_weight']:g}")
    if (stage.get("t_min", 0), stage.get("t_max", 1)) != (0, 1):
        parts.append(f"times {stage['t_min']:g} to {stage['t_max']:g}")
    return "; ".join(parts)


def _front_matter(layout: str, base: str, noise: str, aligned: bool) -> str:
    """The YAML of the hub: huggingface.co/docs/hub/model-cards, "Model card metadata"."""
    tags = ["lora"] * (layout == "lora") + ["text-to-video", "wan", "diffusers"]
    tags += [f"{noise}-noise"] * bool(noise) + ["dpo", "dynamicsboost"] * aligned
    lines = ["license: unknown"]  # the data's, which whoever publishes it knows
    if base:
        relation = "adapter" if layout == "lora" else "finetune"
        lines += [f"base_model: Wan-AI/{base}", f"base_model_relation: {relation}"]
    lines += ["library_name: diffusers"] * (layout != "wan") + ["pipeline_tag: text-to-video", "tags:"]
    return "\n".join(["---", *lines, *(f"- {tag}" for tag in tags), "---"])


def _loading(layout: str, base: str, noise: str, file: str) -> str:
    """How to load it in ComfyUI and in diffusers."""
    which = f"the {noise}-noise model" if noise else "the base model"
    part = "transformer_2" if noise == "low" else "transformer"
    pipe = f'pipe = WanPipeline.from_pretrained("{f"Wan-AI/{base}-Diffusers" if base else "BASE"}"'
    rounded = "torch_dtype=torch.bfloat16"
    code = ["import torch", "from diffusers import WanPipeline" + ", WanTransformer3DModel" * (layout != "lora"), ""]
    if layout == "lora":
        comfy = f"Copy `{file}` to `models/loras/` and load it with *LoraLoaderModelOnly*, strength 1, after {which}."
        second = ", load_into_transformer_2=True" * (noise == "low")  # diffusers, loaders/lora_pipeline.py
        code += [f"{pipe}, {rounded})"]
        code += [f'pipe.to("cuda").load_lora_weights("REPOSITORY", weight_name="{file}"{second})']
    elif layout == "wan":
        comfy = f"Copy the weights to `models/diffusion_models/`, for *Load Diffusion Model* in place of {which}."
        code += [f'net = WanTransformer3DModel.from_single_file("FILE.safetensors", {rounded})']
    else:
        comfy = "The tensors have diffusers' names; `wan.export --layout wan` writes what ComfyUI loads."
        code += [f'net = WanTransformer3DModel.from_pretrained("REPOSITORY", subfolder="{part}", {rounded})']
    if layout != "lora":
        code += [f"{pipe}, {part}=net, {rounded})"]
    where = "`REPOSITORY` is this one's name, or a folder" + ", `BASE` the base in diffusers' layout" * (not base)
    other = "\n\nThe other expert is a model of its own, with a LoRA of its own." * bool(noise)
    code = "\n".join(code)
    return f"**ComfyUI.** {comfy}\n\n**diffusers.** {where}:\n\n```python\n{code}\n```{other}"


def model_card(
    layout: str, known: str, noise: str, config: model.DiTConfig, stages: list[dict], missing: bool, file: str = ""
) -> str:
    """README.md of what wan.export wrote.

    known: the base as `release` names it; noise: as `expert_of` names it; config: the network's; stages: of `stages_of`
    all files; missing: whether one was trained on top of a LoRA that is in none; file: a LoRA's name.
    """
    regions = [stage.get("region") for stage in stages if stage.get("task") == "asymdpo"]
    aligned = bool(regions)
    name = (known or "a text-to-video transformer") + f", {noise} noise" * bool(noise)
    shape = f"{config.num_layers} blocks of width {config.dim}"
    link = f"[Wan-AI/{known}](https://huggingface.co/Wan-AI/{known})"
    of = link if known else "a network under Wan's parameter names"
    times = {"high": "t ≥ 0.875", "low": "t < 0.875", "": ""}[noise]
    expert = f" This is for its {noise}-noise expert, which samples at {times}." * bool(noise)
    sections = [
        _front_matter(layout, known, noise, aligned),
        f"# LoRA for {name}" if layout == "lora" else f"# Weights from {name}",
        f"Base: {of} ({shape}).{expert}{f' {HALF}' * missing}",
    ]
    made = any("window" in stage for stage in stages)  # by make_pairs.py
    method = METHOD.format(frames=FRAMES.get(regions[-1], "all of their frames, or some")) if aligned else ""
    sections += ["## Method", method + PAIRS * made + SOURCE] if aligned else []
    sections += ["## What it was trained on", "\n".join(f"* {_sentence(stage)}" for stage in stages)] if stages else []
    sections += ["## How to load it", _loading(layout, known, noise, file), "## Licence", LICENCE]
    return "\n\n".join(sections) + "\n"

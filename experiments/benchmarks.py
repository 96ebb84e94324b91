"""Videos of a benchmark's prompts, named as the benchmark reads them, and the command line that measures them.

    python -m experiments.benchmarks --vbench VBench/prompts/prompts_per_dimension --preset 1.3b --base $BASE \\
        --lora out/aligned --out out/vbench
    python -m experiments.benchmarks --phygenbench PhyGenBench/PhyGenBench/prompts.json --out out/phygenbench …
    python -m experiments.benchmarks --videogen-eval VideoAlign/datasets/video_eval_prompts/videogen_eval.csv …

    VBench         the paper's six dimensions: three of its prompt lists, 251 prompts, samples 0 to 4 of each. A prompt
                   in two lists is sampled once. Other lists are its custom input, measured in all six dimensions
    PhyGenBench    a folder for each sample, to be measured one after the other. Its scripts hold paths, the model's
                   name and the key for GPT-4o, and there are others for open models: read its README first
    VideoGen-Eval  VideoReward's scores of each video; with one seed, two models are compared video by video

None of them is imported: each needs an environment of its own, with its repository and its weights.

In    the prompts from the benchmark's repository; a model folder, LoRAs and a codec as sample.py takes them
Out   videos/, the mp4 files at 16 fps and nothing else; prompts.jsonl: video, prompt, sample and seed; COMMAND.txt. The
      noise depends on seed, prompt and sample alone, so every model gets the same
Cost  nfe forwards a sample, twice that with guidance
"""

import dataclasses
import re
import shlex
from pathlib import Path

import sample
from kernels.modulate import implementation
from runtime.files import read_csv, read_json, read_text, write_text
from runtime.group import start_group
from runtime.options import UserError, listed, option, program, resolve

VBENCH = {  # prompt list -> the paper's dimensions that are measured on it: Vchitect/VBench, prompts/README.md
    "overall_consistency": ("overall_consistency", "aesthetic_quality", "imaging_quality"),
    "scene": ("background_consistency",),
    "subject_consistency": ("motion_smoothness", "dynamic_degree"),
}
LONGEST = 240  # bytes of a file name: file systems take 255, its temporary name is up to 15 longer


@dataclasses.dataclass(frozen=True)
class Config(sample.Options):
    """Samples the videos of a benchmark's prompts."""

    vbench: str = option("", neutral=True)  # VBench's prompts_per_dimension, or text files, separated by commas
    phygenbench: str = option("", neutral=True)  # PhyGenBench's prompts.json, or a csv
    videogen_eval: str = option("", neutral=True)  # VideoAlign's videogen_eval.csv
    samples: int = option(5, least=1)  # samples a prompt
    out: str = option("out/benchmark", neutral=True)  # folder to write


# ---- prompts ---------------------------------------------------------------------------------------------------------


def read_lists(given: str) -> dict[Path, list[str]]:
    """Text files -> their prompts, a line each, stripped as VBench does. A folder stands for the three lists of VBENCH.

    UserError for a file that cannot be read or has no prompt.
    """
    paths = [Path(entry) for entry in listed(given, "vbench")]
    if len(paths) == 1 and paths[0].is_dir():
        paths = [paths[0] / f"{name}.txt" for name in VBENCH]
    lists = {path: [line.strip() for line in read_text(path).split("\n") if line.strip()] for path in paths}
    if empty := [path for path, prompts in lists.items() if not prompts]:
        raise UserError(f"{empty[0]}: expected a prompt on each line, got none")
    return lists


def read_column(path: Path) -> list[str]:
    """The column `prompt`, or else `caption`, of a csv table, or that key of a json list's objects.

    UserError for another file, for one without rows, and for a row without a prompt.
    """
    rows = read_json(path) if path.suffix.lower() == ".json" else read_csv(path)
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected a table with a prompt in each row, got none")
    # caption: OpenGVLab/PhyGenBench, PhyGenBench/prompts.json; prompt: KwaiVGI/VideoAlign, datasets/video_eval_prompts
    prompts = [row.get("prompt", row.get("caption")) for row in rows]
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str) or not prompt.strip() or re.search("[\ud800-\udfff]", prompt):  # half a letter
            raise UserError(f"{path} row {number}: expected a text in its column prompt or caption, got {prompt!r}")
    return prompts


# ---- benchmarks: each gives its prompts, the name of a video, and the command ----------------------------------------


def vbench(cfg, out: Path) -> tuple[list[str], str, str]:
    """VBench's: the lists' own dimensions, or all six of its custom input. UserError for a prompt that is no name."""
    lists = read_lists(cfg.vbench)
    prompts = list(dict.fromkeys(prompt for part in lists.values() for prompt in part))  # one may stand in two
    # build_full_info_json in vbench/__init__.py of Vchitect/VBench: it looks for "{prompt}-{i}" in the folder's listing
    for prompt in prompts:
        size = len(f"{prompt}-00.mp4".encode())
        if "/" in prompt or "\0" in prompt or size > LONGEST:
            expected = f"expected prompts that can be file names, up to {LONGEST} bytes and without '/'"
            raise UserError(f"--vbench: {expected}, got {prompt[:60]!r} and {size} bytes; VBench looks for such names")
    own = any(path.stem not in VBENCH for path in lists)
    dimensions = [d for name in VBENCH for d in VBENCH[name] if own or name in {path.stem for path in lists}]
    # vbench/cli/evaluate.py of Vchitect/VBench hands --dimension on unquoted: the names in one argument, spaces between
    command = f"vbench evaluate --dimension '{' '.join(dimensions)}' --videos_path {shlex.quote(str(out / 'videos'))}"
    command += " --mode custom_input" * own + f" --output_path {shlex.quote(str(out / 'vbench'))}"
    return prompts, "{prompt}-{sample}.mp4", command


def phygenbench(cfg, out: Path) -> tuple[list[str], str, str]:
    """PhyGenBench's: the three stages with closed models, on sample 0."""
    # README.md of OpenGVLab/PhyGenBench: the file names and the order of the scripts, which read
    # /PhyGenBench/PhyVideos/kelingall and, in multi/multiimage_clip.py, a path from /
    videos, root = shlex.quote(str(out / "videos" / "sample-0")), "/PhyGenBench"
    command = f"mkdir -p {root}/PhyVideos && ln -sfn {videos} {root}/PhyVideos/kelingall && cd / && for stage in "
    command += "single/vqascore multi/multiimage_clip multi/GPT4o video/GPT4o; do "
    command += f"python {root}/PhyGenEval/$stage.py || break; done"
    return read_column(Path(cfg.phygenbench)), "sample-{sample}/output_video_{number}.mp4", command


def videogen_eval(cfg, out: Path) -> tuple[list[str], str, str]:
    """VideoGen-Eval's: VideoReward, with its weights in VideoAlign/checkpoints, into videoreward.json."""
    # VideoVLMRewardInference and its reward() in inference.py of KwaiVGI/VideoAlign, from the repository's root
    program = (
        "import json, pathlib, sys, torch, inference; torch.set_grad_enabled(False); out = pathlib.Path(sys.argv[1]); "
        'judge = inference.VideoVLMRewardInference("checkpoints", device="cuda:0", dtype=torch.bfloat16); '
        'rows = [json.loads(line) for line in open(out / "prompts.jsonl", encoding="utf-8")]; '
        'scores = [row | judge.reward([str(out / row["video"])], [row["prompt"]])[0] for row in rows]; '
        'json.dump(scores, open(out / "videoreward.json", "w"), indent=1)'
    )
    command = f"cd VideoAlign && python -c {shlex.quote(program)} {shlex.quote(str(out))}"
    return read_column(Path(cfg.videogen_eval)), "{number}-{sample}.mp4", command


BENCHMARKS = {"vbench": vbench, "phygenbench": phygenbench, "videogen_eval": videogen_eval}


def main(cfg: Config) -> None:
    # ---- what to do, checked before anything is loaded
    cfg = resolve(cfg, sample.PRESETS)
    sample.check(cfg)
    asked = [name for name in BENCHMARKS if getattr(cfg, name)]
    if len(asked) != 1:
        raise UserError(f"expected one of --{', --'.join(BENCHMARKS)}, got {', '.join(asked) or 'none'}")
    prompts, pattern, command = BENCHMARKS[asked[0]](cfg, Path(cfg.out).absolute())
    group = start_group(implementation)
    run = sample.start(cfg, "experiments.benchmarks", group, [pattern, *prompts])  # in whatever file they stand

    # ---- sample. In videos/ there is nothing else: VBench takes the first file's suffix for all (vbench/__init__.py)
    rows = [
        dict(video=f"videos/{pattern.format(prompt=p, number=n, sample=s)}", prompt=p, sample=s, seed=cfg.seed)
        for n, p in enumerate(prompts, 1)
        for s in range(cfg.samples)
    ]
    if not run.done:
        jobs = [(row["video"], row["prompt"], ("benchmark", cfg.seed, row["prompt"], row["sample"])) for row in rows]
        sample.write_videos(cfg, run, jobs)
        if group.main:
            write_text(run.folder / "COMMAND.txt", command + "\n")
        sample.finish(run, rows)
    if group.main:
        print(f"next, in the benchmark's own environment:\n{command}")


if __name__ == "__main__":
    program(main, Config, __doc__, sample.PRESETS)

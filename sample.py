"""Prompts, and first frames where they are given, to mp4 files.

    python sample.py --prompt "a ball from top left falls quickly rightwards and gently upwards" \\
        --lora out/demo/sft,out/demo/asymdpo --out out/one
    python sample.py --prompts prompts.txt --samples 4 --out out/many
    python sample.py --prompt "a ball from middle centre floats slowly leftwards and gently downwards" \\
        --continuation out/demo/continuation --video clip.mp4 --out out/more
    torchrun --nproc_per_node 8 sample.py --preset 1.3b --base Wan2.1-T2V-1.3B --lora out/sft --prompts prompts.txt

The noise of a video depends only on the seed and on the numbers of its prompt and sample: not on the process that makes
it. A run that was interrupted keeps the videos that it has.

In    a model folder, at the preset a14b two of them; LoRAs to fuse into it, in order; the codec: Wan's from --base, the
      tiny preset's from --data
Out   <out>/<prompt number>-<sample number>.mp4 at 16 fps, prompts.jsonl
Cost  nfe forwards a sample, twice that with guidance
"""

import dataclasses
import functools
import hashlib
from pathlib import Path

import torch
from torch import Tensor

import flow
import model
from kernels.modulate import implementation
from runtime import video
from runtime.files import checksum, nearest, read_manifest, unchanged, write_jsonl
from runtime.group import Group, place, start_group
from runtime.options import UserError, option, program, resolve, user_errors
from runtime.run import Run
from sampling import (
    PRESETS,
    Options,
    check_tiny,
    encode_text,
    guidances,
    load_codec,
    read_prompts,
    sample_latents,
    write_video,
)
from tiny import codec as codecs
from wan import experts, lora


@dataclasses.dataclass(frozen=True)
class Config(Options):
    """Samples mp4 files from prompts, or continues a video."""

    prompt: str = ""  # a prompt
    prompts: str = ""  # or a text file with one on each line
    continuation: str = ""  # folder of continuation.py, to continue --video
    continuation_low: str = ""  # a14b: folder of continuation.py for low noise
    video: str = ""  # file of the video whose first frames are given
    n_cond: int = option(4, least=1)  # given latent frames: n of them are 1 + 4(n − 1) pictures
    fps: float = option(16.0, least=0, most=1000)  # pictures a second taken from --video; 0: every frame
    out: str = option("out/samples", neutral=True)  # folder to write


def latent_frames(cfg) -> int:
    return (cfg.frames - 1) // 4 + 1


def check(cfg) -> None:
    """UserError for a size of video that the preset does not take, and for options that do not go together."""
    video.check_size(cfg.frames, cfg.height, cfg.width, codecs.PATCH if cfg.preset == "tiny" else 16)
    if bool(cfg.continuation) != bool(cfg.video):
        one, other = ("continuation", "video") if cfg.video else ("video", "continuation")
        raise UserError(f"--{one}: expected it with --{other} {getattr(cfg, other)}, got nothing")
    if cfg.video and not Path(cfg.video).is_file():
        got = "a folder" if Path(cfg.video).is_dir() else f"no such file{nearest(cfg.video)}"
        raise UserError(f"--video: {cfg.video}: expected a file, got {got}")
    if cfg.video and cfg.n_cond >= latent_frames(cfg):
        most = f"{latent_frames(cfg) - 1}, for one of the {latent_frames(cfg)} latent frames to be made"
        raise UserError(f"--n_cond: expected at most {most}, got {cfg.n_cond}")
    for field in dataclasses.fields(cfg):
        if field.name in ("n_cond", "fps") and not cfg.video and getattr(cfg, field.name) != field.default:
            raise UserError(f"--{field.name}: expected it with --video alone, which it is about, got no --video")


def start(cfg, stage: str, group: Group, prompts: list[str]) -> Run:
    """The folder to write, whose videos depend on the prompts and on every file that cfg names, not on its path.

    UserError for another number of networks than the preset has.
    """
    experts.bases(cfg)
    inputs = {name: getattr(cfg, name) for name in ("base", "vae", "text", "continuation", "video")}
    inputs |= {"data": cfg.data if cfg.preset == "tiny" else "", "lora": lora.lora_files(cfg.lora)}
    inputs |= {"base_low": cfg.base_low, "continuation_low": cfg.continuation_low}
    inputs |= {"lora_low": lora.lora_files(cfg.lora_low)}
    inputs["prompts"] = ""  # which file they are read from does not count
    return Run(cfg, stage, group, inputs, prompts=hashlib.sha256(repr(prompts).encode()).hexdigest())


def given_frames(cfg, codec, device: torch.device) -> tuple[Tensor, Tensor]:
    """Latents (1, C, F, H, W) of --video, and the mask (1, F) of the n_cond frames that are given."""
    try:
        clip = video.read_clip(cfg.video, 1 + 4 * (cfg.n_cond - 1), (cfg.height, cfg.width), cfg.fps or None)
    except video.BadVideo as error:
        raise UserError(f"{cfg.video}: {error}") from None
    coded, frames = codec.encode(video.to_pixels(clip)[None].to(device)), latent_frames(cfg)
    padded = torch.nn.functional.pad(coded, (0, 0, 0, 0, 0, frames - cfg.n_cond))
    return padded, (torch.arange(frames) < cfg.n_cond)[None]


@torch.no_grad()
def write_videos(cfg, run: Run, jobs: list[tuple[str, str, tuple]]) -> None:
    """Samples every job, (file name, prompt, key of the noise), into run's folder, but for the files that are there and
    are what was written.

    UserError if the network is not of the preset's kind; Diverged for a video that is not finite, which is not written.
    """
    device = run.group.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    # ---- the text comes first, so that its encoder is gone when the network is loaded
    states, negative = encode_text(cfg, list(dict.fromkeys(prompt for _, prompt, _ in jobs)), device)
    codec, codec_device = load_codec(cfg, device)
    given = given_frames(cfg, codec, codec_device) if cfg.continuation else ()
    size = (codec.channels, latent_frames(cfg), cfg.height // codec.side, cfg.width // codec.side)

    def finish(net: model.DiT, base: str) -> model.DiT:
        with user_errors():
            model.check_fits(net, cfg.preset, base, cfg.data, size)
        if net.task_prompt and size[1] > len(net.task_prompt.cond):
            raise UserError(f"--frames: expected at most {4 * len(net.task_prompt.cond) - 3}, as in --continuation")
        return place(net, cfg, run.group)

    net = experts.load_networks(cfg, dtype, device, finish)

    # ---- sample
    run.claim()
    for folder in {(run.folder / name).parent for name, _, _ in jobs}:  # a benchmark's names have folders
        folder.mkdir(parents=True, exist_ok=True)  # not in the loop: there a folder that is missing was deleted
    wraps = (functools.partial(flow.guided, guidance=weight, negative=negative) for weight in guidances(cfg))
    call = experts.each(net, *wraps)

    def done(i: int) -> bool:
        return unchanged(run.folder / jobs[i][0], run.folder)

    for i, own in run.share(len(jobs), "video", done, lockstep=cfg.shard):
        name, prompt, key = jobs[i]
        x0 = sample_latents(cfg, call, size, key, states[prompt].to(device), given)
        if own:
            write_video(run.folder / name, x0, codec, codec_device, f"{prompt[:80]!r} with --seed {cfg.seed}")
            checksum(run.folder / name, run.folder)  # remembered, for the next start


def finish(run: Run, rows: list[dict]) -> None:
    """Writes prompts.jsonl, a row for each video, and marks the folder as finished."""
    if run.group.main:
        write_jsonl(run.folder / "prompts.jsonl", rows)
    run.finish(["prompts.jsonl", *(row["video"] for row in rows)], f"{len(rows):,} videos")


def main(cfg: Config) -> None:
    # ---- what to do, checked before anything is loaded
    cfg = resolve(cfg, PRESETS)
    check(cfg)
    if bool(cfg.prompt) == bool(cfg.prompts):
        raise UserError(f"expected --prompt or --prompts, got {'both' if cfg.prompt else 'neither'}")
    prompts = read_prompts(cfg.prompts) if cfg.prompts else [cfg.prompt]
    group = start_group(implementation)
    run = start(cfg, "sample", group, prompts)
    if run.done:
        return
    if cfg.continuation:
        read_manifest(cfg.continuation, "continuation.py")
    check_tiny(cfg, prompts, run)

    # ---- sample
    pairs = [(p, s, prompt) for p, prompt in enumerate(prompts) for s in range(cfg.samples)]
    jobs = [(f"{p}-{s}.mp4", prompt, ("sample", cfg.seed, p, s)) for p, s, prompt in pairs]
    write_videos(cfg, run, jobs)
    finish(run, [{"video": name, "caption": prompt, "seed": cfg.seed} for name, prompt, _ in jobs])


if __name__ == "__main__":
    program(main, Config, __doc__, PRESETS)

"""Prompts, and first frames where they are given, to mp4 files; or stored latents to mp4 files.

    python sample.py --prompt "a red ball and a blue ball fall" --lora out/demo/sft,out/demo/asymdpo --out out/samples
    python sample.py --prompts prompts.txt --samples 4 --out out/samples
    python sample.py --prompt "a green ball floats" --continuation out/demo/continuation --video clip.mp4 --n_cond 4
    python sample.py --preset 1.3b --base Wan2.1-T2V-1.3B --prompt "a cat runs" --lora out/sft,out/asymdpo
    python sample.py --preset 1.3b --base Wan2.1-T2V-1.3B --decode out/pairs --clips 8 --out out/look

With torchrun the videos are dealt to the processes. --decode shows what shards hold: the clips of prepare.py, or both
sides of make_pairs.py's pairs.

In    a model folder; folders with a lora.safetensors to fuse into it, in order; the codec: Wan's from --base, the tiny
      preset's from beside the shards
Out   <out>/<prompt number>-<sample number>.mp4 at 16 fps, prompts.jsonl; or <out>/<number>-<name>.mp4, with
      -chosen and -rejected or -first and -second, and -s<segment>
Cost  nfe forwards a sample, twice that with guidance
"""

import dataclasses
import hashlib
from pathlib import Path

import torch

import generate
import model
from experiments import cost
from runtime import run as common
from runtime import shards as data
from runtime import video
from runtime.run import UserError


@dataclasses.dataclass(frozen=True)
class Config(generate.Options):
    """Samples mp4 files from prompts, or continues a video, or decodes stored latents."""

    prompt: str = ""  # a prompt
    prompts: str = ""  # or a text file with one on each line
    samples: int = 1  # samples a prompt
    continuation: str = ""  # folder of continuation.py, to continue --video
    video: str = ""  # video whose first frames are given
    n_cond: int = 4  # given latent frames: n of them are 1 + 4(n − 1) pictures
    fps: float = 16.0  # pictures a second that are taken from --video; 0: every frame, whatever its rate
    decode: str = ""  # folder of prepare.py or make_pairs.py: show its clips, and sample nothing
    clips: int = 0  # of them, evenly chosen; 0: all
    segments: int = 0  # and each cut into so many, in files of their own, for label.py --segments
    out: str = "out/samples"  # folder to write


def read_prompts(cfg) -> list[str]:
    """The prompts asked for. UserError if there are none, or one is empty."""
    if cfg.prompts and not Path(cfg.prompts).is_file():
        raise UserError(f"--prompts: expected a text file, got {cfg.prompts}: no such file")
    prompts = common.read_text(Path(cfg.prompts)).splitlines() if cfg.prompts else [cfg.prompt]
    if not prompts or not all(p.strip() for p in prompts):
        raise UserError("expected --prompt or --prompts with a prompt on each line, got an empty one")
    return prompts


def check(cfg) -> None:
    """UserError for options that make no sense."""
    generate.check(cfg)
    if cfg.video and not cfg.continuation:
        raise UserError("--video needs --continuation: the model that goes on from given frames")
    if cfg.continuation and cfg.lora:
        raise UserError(
            "--lora: expected none with --continuation, whose LoRA is its own; merge.py fuses one into a base"
        )
    frames = (cfg.frames - 1) // 4 + 1
    if cfg.continuation and not (Path(cfg.video).is_file() and 1 <= cfg.n_cond < frames):
        expected = f"--continuation needs --video, a file, and --n_cond from 1 to {frames - 1}"
        raise UserError(f"{expected}; got {cfg.video!r} and {cfg.n_cond}")
    if cfg.segments and not cfg.decode:
        raise UserError(f"--segments: expected none without --decode, got {cfg.segments}")
    if cfg.clips < 0 or not 0 <= cfg.fps < 1000:
        raise UserError(f"expected --clips of at least 0 and --fps from 0 to 1000, got {cfg.clips} and {cfg.fps}")


def dry_run(cfg) -> None:
    """Prints what the samples, or the clips to decode, will cost."""
    if cfg.decode:
        shape, found = cost.latents(cfg.preset, cfg.decode, "prepare.py or make_pairs.py", None)
        return cost.decoding("sample", cfg.preset, shape, min(cfg.clips or cost.CLIPS, found or cost.CLIPS), cfg.dtype)
    prompts = len(read_prompts(cfg)) if cfg.prompt or cfg.prompts else 1
    generate.dry_run(cfg, "sample", cfg.samples * prompts, given=bool(cfg.continuation))


def given_frames(cfg, codec, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (1, C, F, H, W) of --video and the mask (1, F) of the n_cond frames of them that are given."""
    frames, needed = (cfg.frames - 1) // 4 + 1, 1 + 4 * (cfg.n_cond - 1)
    try:
        clip = video.read_clip(cfg.video, needed, (cfg.height, cfg.width), cfg.fps or None)
    except video.BadVideo as error:
        raise UserError(f"{cfg.video}: {error}") from None
    coded = codec.encode(video.to_pixels(clip)[None].to(device))
    padded = torch.nn.functional.pad(coded, (0, 0, 0, 0, 0, frames - cfg.n_cond))
    return padded, (torch.arange(frames) < cfg.n_cond)[None]


def load_continuation(cfg, device) -> model.DiT:
    """The continuation model."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return model.load_continuation(cfg.base, cfg.continuation, dtype, device)


def decode_shards(cfg, group: common.Group, run: common.Run) -> None:
    """Writes an mp4 for each clip, or for each side of each pair, of --decode."""
    shards = data.Shards(cfg.decode, "prepare.py or make_pairs.py", verify=group.main)
    fields = next(f for f in (("x0",), ("chosen", "rejected"), ("first", "second")) if f[0] in shards.fields())
    codec, device = generate.load_codec(cfg, group.device, cfg.decode)
    if shards.shape(fields[0])[0] != codec.channels:
        got = f"got {shards.shape(fields[0])[0]}: choose the --preset that it was made with"
        raise UserError(f"{cfg.decode}: expected latents of {codec.channels} channels for this codec, {got}")
    length, fps = shards.shape(fields[0])[1], max(1, round(shards.manifest.get("fps", 16)))
    if not 0 <= cfg.segments <= length:
        raise UserError(f"--segments: expected 0 to {length}, the latent frames, got {cfg.segments}")
    cuts = data.segment_cuts(length, cfg.segments) if cfg.segments else []
    count = min(cfg.clips or len(shards), len(shards))
    some = [round(i * (len(shards) - 1) / max(1, count - 1)) for i in range(count)]
    bar, rows = run.progress(count, unit="clip"), []
    for place, i in enumerate(some):
        for field in fields:
            row = {k: v for k, v in shards.rows[i].items() if k != "index"}
            parts = {data.video_name(i, row, field): slice(None)}
            for s, (first, end) in enumerate(zip(cuts, cuts[1:])):
                parts[data.video_name(i, row, field, s)] = data.pixel_frames(first, end)
            rows += [{**row, "video": name} for name in parts]
            todo = [name for name in parts if not (run.folder / name).exists()]
            if place % group.size == group.rank and todo:
                frames = video.to_frames(codec.decode(shards.get(field, [i]).float().to(device))[0])
                for name in todo:
                    video.write_mp4(run.folder / name, frames[parts[name]], fps)
        bar.update()
    bar.close()
    generate.finish(run, rows)


@torch.no_grad()
def main(cfg: Config) -> None:
    # ---- what to do, checked before anything is loaded
    cfg = common.resolve(cfg, generate.PRESETS)
    check(cfg)
    if cfg.dry_run:
        return dry_run(cfg)
    group = common.start_group()
    prompts = [] if cfg.decode else read_prompts(cfg)
    names = ("vae", "decode") if cfg.decode else ("base", "vae", "text", "continuation")
    inputs = {name: getattr(cfg, name) for name in names} | {str(file): file for file in model.lora_files(cfg.lora)}
    run = common.Run(cfg, "sample", group, inputs, prompts=hashlib.sha256(repr(prompts).encode()).hexdigest())
    if run.done:
        return
    if cfg.decode:
        return decode_shards(cfg, group, run)
    if cfg.continuation:
        common.read_manifest(cfg.continuation, "continuation.py", verify=group.main)

    # ---- sample
    jobs = [
        (f"{p}-{s}.mp4", prompt, ("sample", cfg.seed, p, s))
        for p, prompt in enumerate(prompts)
        for s in range(cfg.samples)
    ]
    more = dict(load=load_continuation, given=given_frames) if cfg.continuation else {}
    generate.write_videos(cfg, run, jobs, **more)
    generate.finish(run, [{"video": name, "caption": prompt, "seed": cfg.seed} for name, prompt, _ in jobs])


if __name__ == "__main__":
    common.run(main, Config, __doc__)

"""Prompts, and first frames where they are given, to mp4 files.

    python sample.py --prompt "a ball from top left falls quickly rightwards and gently upwards" \\
        --lora out/demo/sft,out/demo/asymdpo --out out/one
    python sample.py --prompts prompts.txt --samples 4 --out out/many
    python sample.py --prompt "a ball from middle centre floats slowly leftwards and gently downwards" \\
        --continuation out/demo/continuation --video clip.mp4 --out out/more
    torchrun --nproc_per_node 8 sample.py --preset 1.3b --base Wan2.1-T2V-1.3B --lora out/sft --prompts prompts.txt

The noise of a video depends only on the seed and on the numbers of its prompt and sample: not on the process that makes
it. A run that was interrupted keeps the videos that it has.

In    a model folder; LoRAs to fuse into it, in order; the codec: Wan's from --base, the tiny preset's from --data
Out   <out>/<prompt number>-<sample number>.mp4 at 16 fps, prompts.jsonl
Cost  nfe forwards a sample, twice that with guidance
"""

import dataclasses
import hashlib
from pathlib import Path

import torch
from torch import Tensor

import flow
import model
from kernels.modulate import implementation
from runtime import video
from runtime.files import checksum, read_manifest, read_text, unchanged, write_jsonl
from runtime.group import Group, place, start_group
from runtime.options import Diverged, UserError, option, program, resolve, user_errors
from runtime.run import Run
from tiny import codec as codecs
from tiny import words
from wan import grids, lora, text, vae

WAN = dict(  # Wan2.1's command line: 50 steps, shift 5, guidance 5; its README: shift 8 … 12, guidance 6 for the 1.3B
    frames=49, height=288, width=512, nfe=50, t_shift=5.0, guidance=5.0, solver="unipc", grid="wan",
    negative=text.NEGATIVE,
)  # fmt: skip
TINY = dict(frames=49, height=64, width=64, nfe=12, t_shift=4.0, guidance=1.0, solver="unipc", grid="even", negative="")
PRESETS = {"tiny": TINY, "1.3b": WAN, "14b": WAN}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to sample with."""

    preset: str = "tiny"  # tiny: linear codec and word vectors; 1.3b, 14b: Wan2.1's VAE and text encoder
    base: str = "out/demo/base"  # model folder; for 1.3b, 14b the release's folder, or diffusers'
    vae: str = ""  # 1.3b, 14b: file or folder of the VAE, if it is not in --base
    text: str = ""  # 1.3b, 14b: folder of the text encoder and its tokenizer, if they are not in --base
    lora: str = ""  # folders with lora.safetensors, or such files, separated by commas
    data: str = "out/demo/shards"  # tiny: folder of prepare.py that holds the codec
    samples: int = option(1, least=1)  # samples a prompt
    frames: int | None = option()  # pictures, of the form 4k+1
    height: int | None = option()  # px
    width: int | None = option()  # px
    nfe: int | None = option(least=1)  # solver steps
    solver: str | None = option(choices=tuple(flow.SOLVERS))  # how the steps are taken
    grid: str | None = option(choices=grids.GRIDS)  # noise levels: this project's own, or Wan2.1's or diffusers'
    t_shift: float | None = option(above=0)  # warp of the solver's times towards noise
    guidance: float | None = option(least=0)  # classifier-free guidance weight; 1: none
    negative: str | None = option()  # prompt of the unconditional branch; 1.3b, 14b: Wan's own
    dtype: str = option("float32", choices=("float32", "bfloat16"))  # of the VAE
    shard: bool = option(False, neutral=True)  # split the network's weights over a node's processes: less memory
    compile: bool = option(False, neutral=True)  # torch.compile the network's blocks
    seed: int = 0  # of the noise

    continuation = video = ""  # options of sample.py alone


@dataclasses.dataclass(frozen=True)
class Config(Options):
    """Samples mp4 files from prompts, or continues a video."""

    prompt: str = ""  # a prompt
    prompts: str = ""  # or a text file with one on each line
    continuation: str = ""  # folder of continuation.py, to continue --video
    video: str = ""  # video whose first frames are given
    n_cond: int = option(4, least=1)  # given latent frames: n of them are 1 + 4(n − 1) pictures
    fps: float = option(16.0, least=0, most=1000)  # pictures a second taken from --video; 0: every frame
    out: str = option("out/samples", neutral=True)  # folder to write


def read_prompts(cfg) -> list[str]:
    """The prompts that were asked for. UserError if there are none, or if one is empty."""
    # not splitlines, which also ends a line at U+2028 and others that may stand within a prompt
    prompts = read_text(Path(cfg.prompts)).removesuffix("\n").split("\n") if cfg.prompts else [cfg.prompt]
    if not prompts or not all(p.strip() for p in prompts):
        raise UserError("expected --prompt, or --prompts with a prompt on each line, got an empty one")
    return prompts


def latent_frames(cfg) -> int:
    return (cfg.frames - 1) // 4 + 1


def check(cfg) -> None:
    """UserError for a size of video that the preset does not take, and for options that do not go together."""
    video.check_size(cfg.frames, cfg.height, cfg.width, codecs.PATCH if cfg.preset == "tiny" else 16)
    most = latent_frames(cfg) - 1
    if (cfg.video or cfg.continuation) and not (cfg.continuation and Path(cfg.video).is_file() and cfg.n_cond <= most):
        got = f"{cfg.continuation!r}, {cfg.video!r} and {cfg.n_cond}"
        raise UserError(f"expected --continuation with --video, a file, and --n_cond from 1 to {most}, got {got}")


def start(cfg, stage: str, group: Group, prompts: list[str]) -> Run:
    """The folder to write, whose videos depend on the prompts and on every file that cfg names, not on its path."""
    inputs = {name: getattr(cfg, name) for name in ("base", "vae", "text", "continuation", "video")}
    inputs |= {"data": cfg.data if cfg.preset == "tiny" else "", "lora": lora.lora_files(cfg.lora)}
    inputs["prompts"] = ""  # which file they are read from does not count
    return Run(cfg, stage, group, inputs, prompts=hashlib.sha256(repr(prompts).encode()).hexdigest())


def load_codec(cfg, device: torch.device) -> tuple[vae.VAE | codecs.LinearVAE, torch.device]:
    """The codec between latents and pictures, and the device that it runs on: the tiny preset's stays on the CPU."""
    if cfg.preset != "tiny":
        return vae.load_vae(cfg.vae or cfg.base, getattr(torch, cfg.dtype), device), device
    read_manifest(cfg.data, "prepare.py")
    return codecs.load(cfg.data), torch.device("cpu")


def encode_text(cfg, prompts: list[str], device: torch.device) -> tuple[dict[str, Tensor], Tensor | None]:
    """The states (S, text_dim) of each prompt, and of the negative one if guidance needs it. Drops the encoder."""
    encoder = words.WordVectors() if cfg.preset == "tiny" else text.TextEncoder(cfg.text or cfg.base, device=device)
    negative = encoder.encode([cfg.negative])[0] if cfg.guidance != 1 else None
    return dict(zip(prompts, encoder.encode(prompts))), negative


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
    loras = lora.lora_files(cfg.lora)
    if cfg.continuation:
        net = lora.load_continuation(cfg.base, cfg.continuation, dtype, device, loras)
    else:
        net = lora.load_adapted(cfg.base, loras, dtype, device)
    size = (codec.channels, latent_frames(cfg), cfg.height // codec.side, cfg.width // codec.side)
    with user_errors():
        model.check_fits(net, cfg.preset, cfg.base, cfg.data, size)
    if net.task_prompt and size[1] > len(net.task_prompt.cond):
        raise UserError(f"--frames: expected at most {4 * len(net.task_prompt.cond) - 3}, as in --continuation")

    net = place(net, cfg, run.group)

    # ---- sample
    run.claim()
    for folder in {(run.folder / name).parent for name, _, _ in jobs}:  # a benchmark's names have folders
        folder.mkdir(parents=True, exist_ok=True)  # not in the loop: there a folder that is missing was deleted
    call, solve = flow.guided(net, cfg.guidance, negative), flow.SOLVERS[cfg.solver]
    levels = grids.time_grid(cfg.nfe, cfg.t_shift, cfg.grid)

    def done(i: int) -> bool:
        return unchanged(run.folder / jobs[i][0], run.folder)

    for i, own in run.share(len(jobs), "video", done, lockstep=cfg.shard):
        name, prompt, key = jobs[i]
        noise = flow.draw_noise(size, [key]).to(device)
        x0 = solve(call, noise, states[prompt][None].to(device), levels, *(a.to(device) for a in given))
        if own:
            pixels = codec.decode(x0.to(codec_device))[0]
            if not (x0.isfinite().all() and pixels.isfinite().all()):  # a codec may clamp infinity
                which = f"{run.folder / name}, {prompt[:80]!r} with --seed {cfg.seed}"
                raise Diverged(f"{which}, is not written: it is not finite; a training of this model has diverged")
            video.write_mp4(run.folder / name, video.to_frames(pixels))
            checksum(run.folder / name, run.folder)  # remembered, for the next start


def finish(run: Run, rows: list[dict]) -> None:
    """Writes prompts.jsonl, a row for each video, and marks the folder as finished."""
    if run.group.main:
        write_jsonl(run.folder / "prompts.jsonl", rows)
        print(f"{run.stage}: {len(rows)} videos in {run.folder}")
    run.finish(["prompts.jsonl", *(row["video"] for row in rows)])


def main(cfg: Config) -> None:
    # ---- what to do, checked before anything is loaded
    cfg = resolve(cfg, PRESETS)
    check(cfg)
    prompts = read_prompts(cfg)
    group = start_group(implementation)
    run = start(cfg, "sample", group, prompts)
    if run.done:
        return
    if cfg.continuation:
        read_manifest(cfg.continuation, "continuation.py")

    # ---- sample
    pairs = [(p, s, prompt) for p, prompt in enumerate(prompts) for s in range(cfg.samples)]
    jobs = [(f"{p}-{s}.mp4", prompt, ("sample", cfg.seed, p, s)) for p, s, prompt in pairs]
    write_videos(cfg, run, jobs)
    finish(run, [{"video": name, "caption": prompt, "seed": cfg.seed} for name, prompt, _ in jobs])


if __name__ == "__main__":
    program(main, Config, __doc__)

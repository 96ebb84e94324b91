"""From prompts to mp4 files: what sample.py and the benchmarks share. Options, their presets, and `write_videos`.

A job is a file's name, its prompt and the key of its noise (`flow.draw_noise`). Jobs are dealt to the processes, and a
file that is there already is not made again: it does not matter which process makes it, or when.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import flow
import model
from experiments import cost
from runtime import run as common
from runtime import video
from runtime.run import UserError
from wan import text, vae

WAN = dict(  # Wan2.1's command line: 50 steps, shift 5, guidance 5; its README: shift 8 … 12, guidance 6 for the 1.3B
    frames=49, height=288, width=512, nfe=50, t_shift=5.0, guidance=5.0, solver="unipc", grid="wan",
    negative=text.NEGATIVE,
)  # fmt: skip
PRESETS = {
    "tiny": dict(
        frames=49, height=64, width=64, nfe=12, t_shift=4.0, guidance=1.0, solver="euler", grid="even", negative=""
    ),
    "1.3b": WAN,
    "14b": WAN,
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to sample with."""

    preset: str = "tiny"  # tiny: linear codec and word vectors; 1.3b, 14b: Wan2.1's VAE and text encoder
    base: str = "out/demo/base"  # model folder; for 1.3b, 14b the release's folder, or diffusers'
    vae: str = ""  # 1.3b, 14b: file or folder of the VAE, if it is not in --base
    text: str = ""  # 1.3b, 14b: folder of the text encoder and its tokenizer, if they are not in --base
    lora: str = ""  # folders with lora.safetensors, or such files, separated by commas, fused in this order
    data: str = "out/demo/shards"  # tiny: folder of prepare.py that holds the codec
    frames: int | None = None  # pictures, of the form 4k+1
    height: int | None = None  # px
    width: int | None = None  # px
    nfe: int | None = None  # solver steps
    solver: str | None = None  # euler or unipc
    grid: str | None = None  # noise levels: even, or those of wan or diffusers, which UniPC's users know
    t_shift: float | None = None  # warp of the solver's times towards noise
    guidance: float | None = None  # classifier-free guidance weight; 1: none
    negative: str | None = None  # prompt of the unconditional branch; 1.3b, 14b: Wan's own
    dtype: str = "float32"  # of the VAE: float32 or bfloat16
    seed: int = 0  # of the noise
    dry_run: bool = False  # print what it will cost, and stop: nothing is loaded or written


def check(cfg) -> None:
    """UserError for sampling options that make no sense."""
    vae.check_size(cfg.preset, cfg.frames, cfg.height, cfg.width)
    if cfg.samples < 1:
        raise UserError(f"--samples: expected at least 1, got {cfg.samples}")
    for name, values in {
        "solver": tuple(flow.SOLVERS), "grid": ("even", "wan", "diffusers"), "dtype": ("float32", "bfloat16")
    }.items():  # fmt: skip
        if getattr(cfg, name) not in values:
            raise UserError(f"--{name}: expected one of {', '.join(values)}, got {getattr(cfg, name)!r}")


def dry_run(cfg, stage: str, samples: int, given: bool = False) -> None:
    """Prints what that many samples will cost. given: with given frames."""
    side = vae.PATCH if cfg.preset == "tiny" else vae.VAE.side
    shape = (cost.SHAPES[cfg.preset][0], (cfg.frames - 1) // 4 + 1, cfg.height // side, cfg.width // side)
    cost.sampling(stage, cfg.preset, shape, samples, cfg.nfe, cfg.guidance, given=given, decoder=cfg.dtype)


def load_codec(cfg, device: torch.device, shards: str = "") -> tuple[vae.VAE | vae.LinearVAE, torch.device]:
    """The codec between latents and pictures, and the device it runs on. The tiny one's comes from `shards` if it is
    there, or else from --data.
    """
    if cfg.preset != "tiny":
        return vae.load_vae(cfg.vae or cfg.base, getattr(torch, cfg.dtype), device), device
    its_own = shards and (Path(shards) / "codec.safetensors").is_file()
    folder = shards if its_own else cfg.data
    common.read_manifest(folder, "prepare.py", verify=False)
    return vae.load(folder), torch.device("cpu")


def encode_text(cfg, prompts: list[str], device: torch.device) -> tuple[list[Tensor], Tensor | None]:
    """Text states of the prompts, and of the negative one if guidance needs it. The encoder is dropped again."""
    encoder = text.WordVectors() if cfg.preset == "tiny" else text.TextEncoder(cfg.text or cfg.base, device=device)
    return encoder.encode(prompts), encoder.encode([cfg.negative])[0] if cfg.guidance != 1 else None


def load(cfg, device: torch.device) -> model.DiT:
    """The network with every LoRA fused in: bfloat16 on CUDA, float32 on the CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return model.load_fused(cfg.base, model.lora_files(cfg.lora), dtype, device)


@torch.no_grad()
def write_videos(
    cfg, run: common.Run, jobs: list[tuple[str, str, tuple]], load: Callable = load, given: Callable | None = None
) -> None:
    """Samples every job into run's folder, at 16 frames a second; those that are there already are left.

    jobs: (file name, prompt, noise key); load(cfg, device) gives the network; given(cfg, codec, device) the latents
    x0 (1, C, F, H, W) and the mask (1, F) of the frames that are given. UserError for a network of another codec.
    """
    group = run.group

    # ---- text first: its encoder is gone when the network comes
    prompts = list(dict.fromkeys(prompt for _, prompt, _ in jobs))
    encoded, negative = encode_text(cfg, prompts, group.device)
    states = dict(zip(prompts, encoded))
    codec, codec_device = load_codec(cfg, group.device)
    clip = tuple(part.to(group.device) for part in given(cfg, codec, codec_device)) if given else ()
    net = load(cfg, group.device)
    if net.config.in_dim != codec.channels:
        raise UserError(
            f"{cfg.base}: expected a model of {codec.channels} channels, the codec's, got {net.config.in_dim}"
        )
    size = (codec.channels, (cfg.frames - 1) // 4 + 1, cfg.height // codec.side, cfg.width // codec.side)

    # ---- sample
    call, solve = flow.guided(net, cfg.guidance, negative), flow.SOLVERS[cfg.solver]
    with run.progress(len(jobs), unit="video") as bar:
        for name, prompt, key in jobs[group.rank :: group.size]:
            path = run.folder / name
            if not path.exists():  # of an earlier run that was interrupted
                noise = flow.draw_noise(size, [key]).to(group.device)
                x0 = solve(
                    call, noise, states[prompt][None].to(group.device), cfg.nfe, cfg.t_shift, *clip, grid=cfg.grid
                )
                video.write_mp4(path, video.to_frames(codec.decode(x0.to(codec_device))[0]))
            bar.update(min(group.size, len(jobs) - bar.n))


def finish(run: common.Run, rows: list[dict]) -> None:
    """Writes prompts.jsonl, a row a video, and marks the folder as whole."""
    run.group.barrier()
    if run.group.main:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        common.write_text(run.folder / "prompts.jsonl", lines)
        print(f"{run.stage}: {len(rows)} videos in {run.folder}")
    run.finish(["prompts.jsonl", *(row["video"] for row in rows)])

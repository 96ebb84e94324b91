"""What sample.py and the previews of a training share: their options, the codec, the text states, a video of a prompt.

A video is a function of the network, its text and the key of its noise, so a preview is the video that sample.py makes
of the same weights.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import flow
from runtime import video
from runtime.files import read_manifest, read_text
from runtime.options import SEED, Diverged, UserError, option
from tiny import codec as codecs
from tiny import words
from wan import grids, text, vae

WAN = dict(  # Wan2.1's command line: 50 steps, shift 5, guidance 5; its README: shift 8 … 12, guidance 6 for the 1.3B
    frames=49, height=288, width=512, nfe=50, t_shift=5.0, guidance=5.0, solver="unipc", grid="wan",
    negative=text.NEGATIVE,
)  # fmt: skip
TINY = dict(frames=49, height=64, width=64, nfe=12, t_shift=4.0, guidance=1.0, solver="unipc", grid="even", negative="")
PRESETS = {"tiny": TINY, "1.3b": WAN, "14b": WAN}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to sample with."""

    preset: str = option("tiny", choices=tuple(PRESETS))  # tiny: linear codec and word vectors; else Wan2.1's encoders
    base: str = "out/demo/base"  # model folder; for 1.3b, 14b the release's folder, or diffusers'
    vae: str = ""  # 1.3b, 14b: file or folder of the VAE, if it is not in --base
    text: str = ""  # 1.3b, 14b: folder of the text encoder and its tokenizer, if they are not in --base
    lora: str = ""  # folders with lora.safetensors, or such files, separated by commas
    data: str = option("out/demo/shards", empty=True)  # tiny: folder of prepare.py that holds the codec
    samples: int = option(1, least=1)  # samples a prompt
    frames: int | None = option(least=1)  # pictures, of the form 4k+1
    height: int | None = option(least=1, most=8192)  # px
    width: int | None = option(least=1, most=8192)  # px
    nfe: int | None = option(least=1, most=1000)  # solver steps
    solver: str | None = option(choices=tuple(flow.SOLVERS))  # how the steps are taken
    grid: str | None = option(choices=grids.GRIDS)  # noise levels: this project's own, or Wan2.1's or diffusers'
    t_shift: float | None = option(above=0)  # warp of the solver's times towards noise
    guidance: float | None = option(least=0)  # classifier-free guidance weight; 1: none
    negative: str | None = option()  # prompt of the unconditional branch; 1.3b, 14b: Wan's own
    dtype: str = option("float32", choices=("float32", "bfloat16"))  # of the VAE
    shard: bool = option(False, neutral=True)  # split the network's weights over a node's processes: less memory
    compile: bool = option(False, neutral=True)  # torch.compile the network's blocks
    seed: int = option(0, **SEED)  # of the noise

    continuation = video = ""  # options of sample.py alone


def read_prompts(path: str) -> list[str]:
    """The prompts of a text file, a line each. UserError if there are none, and for blank lines among them."""
    # not splitlines, which also ends a line at U+2028 and others that may stand within a prompt
    prompts = read_text(Path(path)).removesuffix("\n").split("\n")
    if blank := [str(number) for number, prompt in enumerate(prompts, 1) if not prompt.strip()]:
        where = f"line {', '.join(blank[:5])}{', …' if len(blank) > 5 else ''}"
        raise UserError(f"{path} {where}: expected a prompt on each line, got a blank one; delete it")
    return prompts


def load_codec(cfg, device: torch.device) -> tuple[vae.VAE | codecs.LinearVAE, torch.device]:
    """The codec between latents and pictures, and the device that it runs on: the tiny preset's stays on the CPU."""
    if cfg.preset != "tiny":
        return vae.load_vae(cfg.vae or cfg.base, getattr(torch, cfg.dtype), device), device
    read_manifest(cfg.data, "prepare.py or prepare.py --pairs")
    return codecs.load(cfg.data), torch.device("cpu")


def encode_text(cfg, prompts: list[str], device: torch.device) -> tuple[dict[str, Tensor], Tensor | None]:
    """The states (S, text_dim) of each prompt, and of the negative one if guidance needs it. Drops the encoder."""
    encoder = words.WordVectors() if cfg.preset == "tiny" else text.TextEncoder(cfg.text or cfg.base, device=device)
    negative = encoder.encode([cfg.negative])[0] if cfg.guidance != 1 else None
    return dict(zip(prompts, encoder.encode(prompts))), negative


def sample_latents(cfg, call: Callable, size: tuple[int, ...], key: tuple, states: Tensor, given=()) -> Tensor:
    """x0 (1, C, F, H, W) of one video on the device of states, by cfg's solver.

    call: net, or `flow.guided` around it. size (C, F, H, W); key: of the noise; states (S, text_dim). given: latents
    (1, C, F, H, W), and a mask (1, F) of those that are given.
    """
    noise = flow.draw_noise(size, [key]).to(states.device)
    levels = grids.time_grid(cfg.nfe, cfg.t_shift, cfg.grid)
    return flow.SOLVERS[cfg.solver](call, noise, states[None], levels, *(a.to(states.device) for a in given))


def write_video(path: Path, x0: Tensor, codec, device: torch.device, what: str) -> None:
    """Decodes x0 (1, C, F, H, W) with the codec on its device, to an mp4 file. what: the video, in words.

    Diverged for a video that is not finite, which is not written.
    """
    pixels = codec.decode(x0.to(device))[0]
    if not (x0.isfinite().all() and pixels.isfinite().all()):  # a codec may clamp infinity
        raise Diverged(f"{path}, {what}, is not written: it is not finite; a training of this model has diverged")
    video.write_mp4(path, video.to_frames(pixels))

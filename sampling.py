"""What sample.py and the previews of a training share: their options, the codec, the text states, a video of a prompt.

A video is a function of the network, its text and the key of its noise, so a preview is the video that sample.py makes
of the same weights.
"""

import contextlib
import dataclasses
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import flow
from runtime import video
from runtime.files import open_manifest, read_jsonl, read_manifest, read_text, write_jsonl
from runtime.group import slow
from runtime.options import SEED, Diverged, UserError, asked_to_stop, option, resolve
from runtime.run import Run
from runtime.shards import Shards, check_codec
from tiny import codec as codecs
from tiny import words
from wan import grids, text, vae

WAN = dict(  # Wan2.1's command line: 50 steps, shift 5, guidance 5; its README: shift 8 … 12, guidance 6 for the 1.3B
    frames=49, height=288, width=512, nfe=50, t_shift=5.0, guidance=5.0, solver="unipc", grid="wan",
    negative=text.NEGATIVE,
)  # fmt: skip
TINY = dict(frames=49, height=64, width=64, nfe=12, t_shift=4.0, guidance=1.0, solver="unipc", grid="even", negative="")
A14B = WAN | dict(  # github.com/Wan-Video/Wan2.2, wan/configs/wan_t2v_A14B.py
    nfe=40, t_shift=12.0, guidance=4.0, guidance_low_noise=3.0,
)  # fmt: skip
PRESETS = {"tiny": TINY, "1.3b": WAN, "14b": WAN, "a14b": A14B}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to sample with."""

    preset: str = option("tiny", choices=tuple(PRESETS))  # tiny: linear codec and word vectors; else Wan's encoders
    base: str = "out/demo/base"  # model folder; of Wan the release's folder, or diffusers'
    base_low: str = ""  # a14b: model folder of low noise, if --base is that of high noise alone
    vae: str = ""  # file or folder of Wan's VAE, if it is not in --base
    text: str = ""  # folder of Wan's text encoder and its tokenizer, if they are not in --base
    lora: str = ""  # folders with lora.safetensors, or such files, separated by commas
    lora_low: str = ""  # a14b: folders or files for low noise; --lora is for high noise
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
    guidance_low_noise: float | None = option(least=0)  # a14b: guidance of low noise
    negative: str | None = option()  # prompt of the unconditional branch
    dtype: str = option("float32", choices=("float32", "bfloat16"))  # of the VAE
    shard: bool = option(False, neutral=True)  # split the network's weights over a node's processes: less memory
    compile: bool = option(False, neutral=True)  # torch.compile the network's blocks
    seed: int = option(0, **SEED)  # of the noise

    continuation = continuation_low = video = ""  # options of sample.py alone


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


def check_tiny(cfg, prompts: list[str], run: Run) -> None:
    """At the preset tiny: UserError for a codec in cfg.data that cfg.base does not know, and for a prompt of no word
    that it knows; a warning for single ones.
    """
    if cfg.preset == "tiny":
        check_codec(cfg.base, cfg.data, open_manifest(cfg.data, "prepare.py or prepare.py --pairs"))
        if (sentence := words.unknown(prompts, cfg.data)) and run.group.main:
            print(f"{run.stage}: warning: {sentence}", file=sys.stderr)


def guidances(cfg) -> tuple[float, float]:
    """The guidance weights of high and low noise."""
    return cfg.guidance, cfg.guidance if cfg.guidance_low_noise is None else cfg.guidance_low_noise


def encode_text(cfg, prompts: list[str], device: torch.device) -> tuple[dict[str, Tensor], Tensor | None]:
    """The states (S, text_dim) of each prompt, and of the negative one if guidance needs it. Drops the encoder."""
    encoder = words.WordVectors() if cfg.preset == "tiny" else text.TextEncoder(cfg.text or cfg.base, device=device)
    negative = encoder.encode([cfg.negative])[0] if {*guidances(cfg)} != {1} else None
    return {prompt: encoder.encode([prompt])[0] for prompt in slow(prompts, "encoding prompts", "prompt")}, negative


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


# ---- previews of a training ------------------------------------------------------------------------------------------

ROWS, COLUMNS = 8, 6  # of a contact sheet: videos, and steps so far
Subject = tuple[str, Tensor, tuple]  # what a preview is of: its words, text states, and given latents with their mask


class Previews:
    """Videos of the model that is being trained, of the same noise step after step: that of `sample.py --seed 0`.

    <out>/previews/step-0000050/<number>.mp4; prompts.jsonl; sheet.png, a row for each video, steps side by side. The
    codec waits on the CPU, and blocks run as they are written, so that what --compile makes of a training stays as it
    is without.
    """

    def __init__(
        self, run: Run, options: Options, size: tuple[int, ...], subjects: list[Subject], negative: Tensor | None
    ):
        """size: (C, F, H, W) of a video's latents. negative (S, text_dim): if options.guidance needs it.

        UserError for a codec of other latents.
        """
        self.run, self.options, self.size, self.subjects, self.negative = run, options, size, subjects, negative
        self.folder = run.folder / "previews"
        self.codec, _ = load_codec(options, torch.device("cpu"))
        if self.codec.channels != size[0]:
            got = f"latents of {size[0]} channels, and a codec of {self.codec.channels}"
            raise UserError(f"--preview_every: expected the codec of the training's data, got {got}")

    @torch.no_grad()
    def __call__(self, net: nn.Module, done: int) -> bool:
        """Makes those after `done` steps, unless they are there. All processes must call it: each makes some.

        Returns whether one of them was asked to stop meanwhile. Then these previews are left out.
        """
        group, folder = self.run.group, self.folder / f"step-{done:07d}"
        there = group.main and self._there(folder, done)
        group.wait(where=f"previews of step {done}")
        if group.sum({"there": there})["there"]:
            return False
        fresh = folder.with_name(f".{folder.name}.tmp")
        if group.main:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir()
        group.wait()
        with slow(None, f"{self.run.stage}: previews", "video", len(self.subjects)) as bar:
            for first in range(0, len(self.subjects), group.size):
                with torch.compiler.set_stance("force_eager") if self.options.compile else contextlib.nullcontext():
                    self._make(net, fresh, first + group.rank)
                group.wait(where=f"previews of step {done}")
                if group.sum({"stop": bool(asked_to_stop())})["stop"]:
                    return True
                bar.update(min(group.size, bar.total - bar.n))
        if isinstance(self.codec, nn.Module):
            self.codec.cpu()
        if group.main:
            os.replace(fresh, folder)
            self._draw()
            tqdm.write(f"{self.run.stage}: previews of step {done}: {self.folder / 'sheet.png'}", file=sys.stderr)
        group.wait(where="the contact sheet")
        return False

    def _there(self, folder: Path, done: int) -> bool:
        """Whether an earlier start made these. Drops its others of later steps, which are trained anew, or prompts."""
        self.run.check()
        self.folder.mkdir(exist_ok=True)
        told = self.folder / "prompts.jsonl"
        rows = [{"video": f"{i}.mp4", "caption": words} for i, (words, *_) in enumerate(self.subjects)]
        same = told.exists() and read_jsonl(told) == rows
        for other in self.folder.glob("step-[0-9]*"):
            if not same or other.name > folder.name or (other == folder and done > self.run.resumed):
                shutil.rmtree(other)
        if not same:
            write_jsonl(told, rows)
        if folder.exists():
            self._draw()  # a kill may have come before
        return folder.exists()

    def _make(self, net: nn.Module, folder: Path, i: int) -> None:
        """Makes video i, if there is one. If weights are split the others still need this process: it repeats one."""
        if i >= len(self.subjects) and not self.options.shard:
            return
        words, states, given = self.subjects[i if i < len(self.subjects) else 0]
        device = self.run.group.device
        call = flow.guided(net, self.options.guidance, self.negative)
        x0 = sample_latents(self.options, call, self.size, ("sample", 0, i, 0), states.to(device), given)
        if i >= len(self.subjects):
            return
        if isinstance(self.codec, nn.Module):
            self.codec.to(device)
        else:
            device = torch.device("cpu")
        try:
            write_video(folder / f"{i}.mp4", x0, self.codec, device, repr(words[:80]))
        except Diverged as error:  # whether the training has is for the training to say
            print(f"warning: {error}", file=sys.stderr)

    def _draw(self) -> None:
        """The contact sheet, with the first step and the newest."""
        steps = sorted(self.folder.glob("step-[0-9]*"))
        if len(steps) > COLUMNS:
            steps = [steps[i] for i in np.linspace(0, len(steps) - 1, COLUMNS).round().astype(int)]
        with video.Decoder() as decoder:
            cells = [
                (_four_pictures(decoder, step / f"{i}.mp4"), f"step {int(step.name[5:])}: {words}")
                for i, (words, *_) in enumerate(self.subjects[:ROWS])
                for step in steps
            ]
        video.contact_sheet(self.folder / "sheet.png", f"{self.run.folder}", cells, len(steps))


def _four_pictures(decoder: video.Decoder, path: Path) -> np.ndarray | None:
    """Four pictures (4, h, w, 3) of a video, or None if it was not written."""
    try:
        pictures = decoder.read(path, None)[0].frames
    except video.BadVideo:
        return None
    return pictures[np.linspace(0, len(pictures) - 1, 4).round().astype(int)]


def previews_of_prompts(cfg, run: Run, size: tuple[int, ...], *data: str) -> Previews | None:
    """Previews of the prompts in cfg.preview_prompts, or None without cfg.preview_every.

    data: folders, of which the first that has a codec has the tiny preset's; cfg.base has Wan's, and its text encoder,
    which is loaded and dropped here: call it before the network is loaded. UserError for one of the two options without
    the other.
    """
    if not cfg.preview_every and not cfg.preview_prompts:
        return None
    if not cfg.preview_every or not cfg.preview_prompts:
        got = f"{cfg.preview_every} and {cfg.preview_prompts!r}"
        raise UserError(f"expected --preview_every and --preview_prompts, a file, together, got {got}")
    own = next((folder for folder in data if (Path(folder) / "codec.safetensors").is_file()), data[-1])
    options, prompts = _options(cfg, own), read_prompts(cfg.preview_prompts)
    check_tiny(options, prompts, run)
    states, negative = encode_text(options, prompts, run.group.device)
    return Previews(run, options, size, [(prompt, states[prompt], ()) for prompt in prompts], negative)


def previews_of_clips(cfg, run: Run, clips: Shards) -> Previews | None:
    """Previews that go on from the first third of the first clips, or None without cfg.preview_every."""
    if not cfg.preview_every:
        return None
    options, size = _options(cfg, cfg.data), clips.shape("x0")
    mask = (torch.arange(size[1]) < max(1, size[1] // 3))[None]
    index = range(min(ROWS, len(clips)))
    subjects = [(clips.rows[i]["caption"], clips.states([i])[0], (clips.get("x0", [i]).float(), mask)) for i in index]
    return Previews(run, options, size, subjects, clips.negative() if options.guidance != 1 else None)


def _options(cfg, data: str) -> Options:
    return resolve(Options(preset=cfg.preset, base=cfg.base, data=data, shard=cfg.shard, compile=cfg.compile), PRESETS)

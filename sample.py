"""Prompts, and first frames where they are given, to mp4 files.

    python sample.py --prompt "a red ball and a blue ball fall" --lora out/demo/sft,out/demo/asymdpo --out out/samples
    python sample.py --prompts prompts.txt --samples 4 --out out/samples
    python sample.py --prompt "a green ball floats" --continuation out/demo/continuation --video clip.mp4 --n_cond 4

In    a model folder; folders with a lora.safetensors to fuse into it, in order; the codec beside the shards
Out   <out>/<prompt number>-<sample number>.mp4 at 16 fps, prompts.jsonl
Cost  nfe forwards a sample, twice that with guidance
"""

import dataclasses
import json
from pathlib import Path

import torch
from tqdm import tqdm

import common
import flow
import model
import text
import vae
import video
from common import UserError

PRESETS = {"tiny": dict(frames=49, height=64, width=64, nfe=12, t_shift=4.0, guidance=1.0)}


@dataclasses.dataclass(frozen=True)
class Config:
    """Samples mp4 files from prompts, or continues a video."""

    preset: str = "tiny"  # tiny: linear codec and word vectors
    prompt: str = ""  # a prompt
    prompts: str = ""  # or a text file with one on each line
    samples: int = 1  # samples a prompt
    base: str = "out/demo/base"  # model folder
    lora: str = ""  # folders with lora.safetensors, separated by commas, fused in this order
    continuation: str = ""  # folder of continuation.py, to continue --video
    video: str = ""  # video whose first frames are given
    n_cond: int = 4  # given latent frames: n of them are 1 + 4(n − 1) pictures
    data: str = "out/demo/shards"  # folder of prepare.py that holds the codec
    out: str = "out/samples"  # folder to write
    frames: int | None = None  # pixel frames, of the form 4k+1
    height: int | None = None  # px
    width: int | None = None  # px
    nfe: int | None = None  # solver steps
    t_shift: float | None = None  # warp of the solver's times towards noise
    guidance: float | None = None  # classifier-free guidance weight; 1: none
    seed: int = 0  # of the noise


def read_prompts(cfg) -> list[str]:
    """The prompts asked for. UserError if there are none, or one is empty."""
    if cfg.prompts and not Path(cfg.prompts).is_file():
        raise UserError(f"--prompts: expected a text file, got {cfg.prompts}: no such file")
    prompts = Path(cfg.prompts).read_text().splitlines() if cfg.prompts else [cfg.prompt]
    if not prompts or not all(p.strip() for p in prompts):
        raise UserError("expected --prompt or --prompts with a prompt on each line, got an empty one")
    return prompts


def given_frames(cfg, codec) -> torch.Tensor:
    """Latents (C, F, H, W) of --video, of which the first n_cond frames will be given."""
    frames = (cfg.frames - 1) // 4 + 1
    if not cfg.video or not 1 <= cfg.n_cond < frames:
        raise UserError(
            f"--continuation needs --video, and --n_cond from 1 to {frames - 1}; got {cfg.video!r} and {cfg.n_cond}"
        )
    needed = 1 + 4 * (cfg.n_cond - 1)
    try:
        clip = video.read_clip(cfg.video, needed, (cfg.height, cfg.width))
    except video.BadVideo as error:
        raise UserError(f"{cfg.video}: {error}") from None
    coded = codec.encode(video.to_pixels(clip)[None])[0]
    return torch.nn.functional.pad(coded, (0, 0, 0, 0, 0, frames - cfg.n_cond))


def load(cfg, device) -> model.DiT:
    """The network with every adapter fused in."""
    if cfg.continuation:
        return model.load_continuation(cfg.base, cfg.continuation, device=device)
    net = model.load_model(cfg.base, device=device)
    for folder in filter(None, cfg.lora.split(",")):
        common.read_manifest(folder, "sft.py or asymdpo.py")
        model.merge_lora(model.load_lora(net, Path(folder) / "lora.safetensors"))
    return net


@torch.no_grad()
def main(cfg: Config) -> None:
    cfg = common.resolve(cfg, PRESETS)
    group = common.start_group()
    prompts = read_prompts(cfg)
    if cfg.video and not cfg.continuation:
        raise UserError("--video needs --continuation: the model that goes on from given frames")
    if cfg.samples < 1:
        raise UserError(f"--samples: expected at least 1, got {cfg.samples}")
    if cfg.frames % 4 != 1 or cfg.frames < 5 or cfg.height % vae.PATCH or cfg.width % vae.PATCH:
        raise UserError(
            f"expected 4k+1 frames and sides that {vae.PATCH} divides, got {cfg.frames} of {cfg.height} x {cfg.width}"
        )
    common.read_manifest(cfg.data, "prepare.py", verify=False)
    codec = vae.load(cfg.data)
    net = load(cfg, group.device)
    size = (net.config.in_dim, (cfg.frames - 1) // 4 + 1, cfg.height // vae.PATCH, cfg.width // vae.PATCH)
    given = given_frames(cfg, codec).to(group.device) if cfg.continuation else None
    negative = common.read_tensors(Path(cfg.data) / "negative.safetensors")["text"] if cfg.guidance != 1 else None
    states = torch.nn.utils.rnn.pad_sequence(text.WordVectors().encode(prompts), batch_first=True)

    group.announce("sample")
    out, jobs = Path(cfg.out), [(p, s) for p in range(len(prompts)) for s in range(cfg.samples)]
    for p, s in tqdm(jobs[group.rank :: group.size], desc="sample", unit="video", disable=not group.main):
        noise = flow.draw_noise(size, [("sample", cfg.seed, p, s)]).to(group.device)
        call = flow.guided(net, cfg.guidance, negative)
        clip = () if given is None else (given[None], (torch.arange(size[1], device=group.device) < cfg.n_cond)[None])
        x0 = flow.euler(call, noise, states[p : p + 1].to(group.device), cfg.nfe, cfg.t_shift, *clip)
        video.write_mp4(out / f"{p}-{s}.mp4", video.to_frames(codec.decode(x0.cpu())[0]))
    group.barrier()
    if group.main:
        rows = [{"video": f"{p}-{s}.mp4", "caption": prompts[p], "seed": cfg.seed} for p, s in jobs]
        common.write_text(out / "prompts.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"sample: {len(rows)} videos in {out}")


if __name__ == "__main__":
    common.run(main, Config, __doc__)

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
import json
from pathlib import Path

import torch

import common
import cost
import data
import flow
import model
import text
import vae
import video
from common import UserError

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
class Config:
    """Samples mp4 files from prompts, or continues a video, or decodes stored latents."""

    preset: str = "tiny"  # tiny: linear codec and word vectors; 1.3b, 14b: Wan2.1's VAE and text encoder
    prompt: str = ""  # a prompt
    prompts: str = ""  # or a text file with one on each line
    samples: int = 1  # samples a prompt
    base: str = "out/demo/base"  # model folder; for 1.3b, 14b the release's folder, or diffusers'
    vae: str = ""  # 1.3b, 14b: file or folder of the VAE, if it is not in --base
    text: str = ""  # 1.3b, 14b: folder of the text encoder and its tokenizer, if they are not in --base
    lora: str = ""  # folders with lora.safetensors, or such files, separated by commas, fused in this order
    continuation: str = ""  # folder of continuation.py, to continue --video
    video: str = ""  # video whose first frames are given
    n_cond: int = 4  # given latent frames: n of them are 1 + 4(n − 1) pictures
    decode: str = ""  # folder of prepare.py or make_pairs.py: show its clips, and sample nothing
    clips: int = 0  # of them, evenly chosen; 0: all
    segments: int = 0  # and each cut into so many, in files of their own, for label.py --segments
    data: str = "out/demo/shards"  # tiny: folder of prepare.py that holds the codec
    out: str = "out/samples"  # folder to write
    frames: int | None = None  # pictures, of the form 4k+1
    height: int | None = None  # px
    width: int | None = None  # px
    fps: float = 16.0  # pictures a second that are taken from --video; 0: every frame, whatever its rate
    nfe: int | None = None  # solver steps
    solver: str | None = None  # euler or unipc
    grid: str | None = None  # noise levels: even, or those of wan or diffusers, which UniPC's users know
    t_shift: float | None = None  # warp of the solver's times towards noise
    guidance: float | None = None  # classifier-free guidance weight; 1: none
    negative: str | None = None  # prompt of the unconditional branch; 1.3b, 14b: Wan's own
    dtype: str = "float32"  # of the VAE: float32 or bfloat16
    seed: int = 0  # of the noise
    dry_run: bool = False  # print what it will cost, and stop: nothing is loaded or written


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
    vae.check_size(cfg.preset, cfg.frames, cfg.height, cfg.width)
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
    if cfg.samples < 1 or cfg.clips < 0 or not 0 <= cfg.fps < 1000:
        got = f"{cfg.samples}, {cfg.clips} and {cfg.fps}"
        raise UserError(f"expected --samples of at least 1, --clips of at least 0 and --fps from 0 to 1000, got {got}")
    for name, values in {
        "solver": tuple(flow.SOLVERS), "grid": ("even", "wan", "diffusers"), "dtype": ("float32", "bfloat16")
    }.items():  # fmt: skip
        if getattr(cfg, name) not in values:
            raise UserError(f"--{name}: expected one of {', '.join(values)}, got {getattr(cfg, name)!r}")


def dry_run(cfg) -> None:
    """Prints what the samples, or the clips to decode, will cost."""
    if cfg.decode:
        shape, found = cost.latents(cfg.preset, cfg.decode, "prepare.py or make_pairs.py", None)
        return cost.decoding("sample", cfg.preset, shape, min(cfg.clips or cost.CLIPS, found or cost.CLIPS), cfg.dtype)
    prompts = len(read_prompts(cfg)) if cfg.prompt or cfg.prompts else 1
    side, samples = vae.PATCH if cfg.preset == "tiny" else vae.VAE.side, cfg.samples * prompts
    shape = (cost.SHAPES[cfg.preset][0], (cfg.frames - 1) // 4 + 1, cfg.height // side, cfg.width // side)
    given = bool(cfg.continuation)
    cost.sampling("sample", cfg.preset, shape, samples, cfg.nfe, cfg.guidance, given=given, decoder=cfg.dtype)


def load_codec(cfg, device):
    """The codec between latents and pictures, and the device it runs on."""
    if cfg.preset != "tiny":
        return vae.load_vae(cfg.vae or cfg.base, getattr(torch, cfg.dtype), device), device
    its_own = cfg.decode and (Path(cfg.decode) / "codec.safetensors").is_file()
    folder = cfg.decode if its_own else cfg.data
    common.read_manifest(folder, "prepare.py", verify=False)
    return vae.load(folder), torch.device("cpu")


def encode_text(cfg, prompts: list[str], device) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Text states of the prompts, and of the negative one if guidance needs it. The encoder is dropped again."""
    encoder = text.WordVectors() if cfg.preset == "tiny" else text.TextEncoder(cfg.text or cfg.base, device=device)
    return encoder.encode(prompts), encoder.encode([cfg.negative])[0] if cfg.guidance != 1 else None


def given_frames(cfg, codec, device) -> torch.Tensor:
    """Latents (C, F, H, W) of --video, of which the first n_cond frames will be given."""
    frames, needed = (cfg.frames - 1) // 4 + 1, 1 + 4 * (cfg.n_cond - 1)
    try:
        clip = video.read_clip(cfg.video, needed, (cfg.height, cfg.width), cfg.fps or None)
    except video.BadVideo as error:
        raise UserError(f"{cfg.video}: {error}") from None
    coded = codec.encode(video.to_pixels(clip)[None].to(device))[0]
    return torch.nn.functional.pad(coded, (0, 0, 0, 0, 0, frames - cfg.n_cond))


def load(cfg, device) -> model.DiT:
    """The network with every adapter fused in."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if cfg.continuation:
        return model.load_continuation(cfg.base, cfg.continuation, dtype, device)
    return model.load_fused(cfg.base, model.lora_files(cfg.lora), dtype, device)


def decode_shards(cfg, group: common.Group, run: common.Run) -> None:
    """Writes an mp4 for each clip, or for each side of each pair, of --decode."""
    shards = data.Shards(cfg.decode, "prepare.py or make_pairs.py", verify=group.main)
    fields = next(f for f in (("x0",), ("chosen", "rejected"), ("first", "second")) if f[0] in shards.fields())
    codec, device = load_codec(cfg, group.device)
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
    finish(run, rows)


def finish(run: common.Run, rows: list[dict]) -> None:
    """Writes prompts.jsonl, a row a video, and marks the folder as whole."""
    run.group.barrier()
    if run.group.main:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        common.write_text(run.folder / "prompts.jsonl", lines)
        print(f"sample: {len(rows)} videos in {run.folder}")
    run.finish(["prompts.jsonl", *(row["video"] for row in rows)])


@torch.no_grad()
def main(cfg: Config) -> None:
    # ---- what to do, checked before anything is loaded
    cfg = common.resolve(cfg, PRESETS)
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

    # ---- text first: its encoder is gone when the network comes
    states, negative = encode_text(cfg, prompts, group.device)
    states = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
    codec, codec_device = load_codec(cfg, group.device)
    given = given_frames(cfg, codec, codec_device).to(group.device) if cfg.continuation else None
    net = load(cfg, group.device)
    if net.config.in_dim != codec.channels:
        raise UserError(
            f"{cfg.base}: expected a model of {codec.channels} channels, the codec's, got {net.config.in_dim}"
        )
    size = (codec.channels, (cfg.frames - 1) // 4 + 1, cfg.height // codec.side, cfg.width // codec.side)

    # ---- sample
    jobs = [(p, s) for p in range(len(prompts)) for s in range(cfg.samples)]
    call, solve = flow.guided(net, cfg.guidance, negative), flow.SOLVERS[cfg.solver]
    clip = () if given is None else (given[None], (torch.arange(size[1], device=group.device) < cfg.n_cond)[None])
    bar = run.progress(len(jobs), unit="video")
    for p, s in jobs[group.rank :: group.size]:
        path = run.folder / f"{p}-{s}.mp4"
        if not path.exists():  # of an earlier run that was interrupted
            noise = flow.draw_noise(size, [("sample", cfg.seed, p, s)]).to(group.device)
            x0 = solve(call, noise, states[p : p + 1].to(group.device), cfg.nfe, cfg.t_shift, *clip, grid=cfg.grid)
            video.write_mp4(path, video.to_frames(codec.decode(x0.to(codec_device))[0]))
        bar.update(min(group.size, len(jobs) - bar.n))
    bar.close()
    finish(run, [{"video": f"{p}-{s}.mp4", "caption": prompts[p], "seed": cfg.seed} for p, s in jobs])


if __name__ == "__main__":
    common.run(main, Config, __doc__)

"""Stored latents to mp4 files, to be looked at or scored: prepare.py's clips, or both sides of pairs.

    python -m experiments.decode --shards out/demo/pairs --clips 8 --out out/look
    python -m experiments.decode --shards out/two --segments 5 --preset 1.3b --base Wan2.1-T2V-1.3B --out out/to_score

With torchrun the processes share the clips. --segments writes what experiments.labels scores: each clip whole,
and in so many pieces.

In    a folder of shards; the codec: Wan's from --base, the tiny preset's from --shards or else from --data
Out   <number>-<id>.mp4 at the clips' rate; of a pair, with -chosen and -rejected, or -first and -second, at the end;
      of a piece, with -s<number>; prompts.jsonl
Cost  a pass of the decoder for each video
"""

import dataclasses
from pathlib import Path

import torch

import sample
from experiments.labels import segment_cuts, video_name
from runtime import video
from runtime.files import checksum, unchanged
from runtime.group import start_group
from runtime.options import UserError, option, program, resolve
from runtime.run import Run
from runtime.shards import Shards, pixel_frames


@dataclasses.dataclass(frozen=True)
class Config:
    """Decodes stored clips or pairs."""

    preset: str = option("tiny", choices=tuple(sample.PRESETS))  # the preset that the shards were made with
    shards: str = "out/demo/pairs"  # folder of prepare.py, make_pairs.py or experiments.pairs
    base: str = ""  # 1.3b, 14b: the release's folder, or diffusers'
    vae: str = ""  # 1.3b, 14b: file or folder of the VAE, if it is not in --base
    data: str = option("out/demo/shards", empty=True)  # tiny: folder with the codec, if --shards has none
    dtype: str = option("float32", choices=("float32", "bfloat16"))  # of the VAE
    clips: int = option(0, least=0)  # number of them, evenly chosen; 0: all
    segments: int = option(1, least=1)  # pieces that each is cut into, in files of their own; 1: none
    out: str = option("out/look", neutral=True)  # folder to write


@torch.no_grad()
def main(cfg: Config) -> None:
    # ---- what to do, checked before anything is written
    cfg = resolve(cfg)
    group = start_group()
    own = (Path(cfg.shards) / "codec.safetensors").is_file()
    inputs = {name: getattr(cfg, name) for name in ("shards", "base", "vae")}
    inputs["data"] = "" if own or cfg.preset != "tiny" else cfg.data
    run = Run(cfg, "experiments.decode", group, inputs)
    if run.done:
        return
    codec, device = sample.load_codec(dataclasses.replace(cfg, data=cfg.shards) if own else cfg, group.device)
    shards = Shards(cfg.shards, "prepare.py, prepare.py --pairs, make_pairs.py or experiments.pairs")
    fields = [name for name in shards.fields() if name != "x0"] or ["x0"]  # of a pair its sides
    channels, frames = shards.shape(fields[0])[:2]
    if channels != codec.channels:
        expected = f"expected latents of {codec.channels} channels for this codec, got {channels}"
        raise UserError(f"{cfg.shards}: {expected}; choose the --preset that made them")
    if cfg.clips > len(shards):
        raise UserError(f"--clips: expected at most {len(shards)}, all of {cfg.shards}, got {cfg.clips}")
    cuts = segment_cuts(frames, cfg.segments)

    # ---- decode
    parts = {None: slice(None)}  # segment -> its pictures
    if cfg.segments > 1:
        parts |= {s: pixel_frames(*cut) for s, cut in enumerate(zip(cuts, cuts[1:]))}
    rate, count = max(1, round(shards.manifest.get("fps", 16))), cfg.clips or len(shards)
    chosen = [round(place * (len(shards) - 1) / max(1, count - 1)) for place in range(count)]
    jobs = [(i, field, [video_name(i, shards.rows[i], field, s) for s in parts]) for i in chosen for field in fields]
    for job, _ in run.share(len(jobs), "video", lambda job: all(unchanged(run.folder / name) for name in jobs[job][2])):
        i, field, names = jobs[job]
        pictures = video.to_frames(codec.decode(shards.get(field, [i]).float().to(device))[0])
        for name, part in zip(names, parts.values()):
            video.write_mp4(run.folder / name, pictures[part], rate)
            checksum(run.folder / name)  # remembered, for the next start
    sample.finish(run, [{**shards.rows[i], "video": name} for i, _, names in jobs for name in names])


if __name__ == "__main__":
    program(main, Config, __doc__)

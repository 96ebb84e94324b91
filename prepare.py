"""Stage 0: encodes videos and captions into shards of latents and text states.

    python prepare.py --videos out/demo/clips --out out/demo/shards
    torchrun --nproc_per_node 8 prepare.py --preset 1.3b --base Wan2.1-T2V-1.3B --videos clips --out shards --workers 8
    torchrun --nproc_per_node 8 prepare.py --preset 1.3b --base Wan2.1-T2V-1.3B --videos OpenVid \\
        --metadata OpenVid-1M.csv --motion column --min_motion 2 --out shards --workers 8

Captions come from --metadata, from the folder's metadata.csv, or from a `name.txt` beside each `name.mp4`. A table has
the columns `video,caption`, as OpenVid-1M's does. A video is looked for under its name in the table, then by the last
part of that name in every folder below, because OpenVid-1M's parts unpack into folders of their own. Hidden files are
passed over. But for --metadata nothing outside of --videos is read; --links_out follows links out of it.

Clips are read at 16 pictures a second, by timestamps. Pictures are resized to cover the wanted size and cut at the
centre. Videos that cannot be trusted are left out and listed (see runtime/decode.py). All clips of a video are in one
split: train (base and continuation model), align (pairs and cold start) or, where --train and --align leave some, eval.
The table's column `split` says which, if it has one, else a hash of the video's id.

The presets 1.3b and 14b make the same shards with Wan2.1's VAE and text encoder from --base. The preset tiny fits a
linear codec on the train clips, stores it beside the shards, and encodes text by a fixed vector for each word.

In    a folder of videos with captions; for Wan also the folder of its release, or of diffusers' version
Out   shards with `x0` (C, F, H, W) and text states, and for each clip id, caption, split, motion, video, start;
      negative.safetensors (text states of the negative prompt), codec.safetensors (tiny), rejects.jsonl (what was left
      out, and why); to look at: kept.png, some clips decoded again, and rejected.png, some rejected videos
Cost  decoding, and one pass of the encoders for each clip; of the VAE's decoder for the few of kept.png
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from runtime import dataset, video
from runtime.files import checksum, read_jsonl, read_sealed, unchanged, write_tensors
from runtime.group import start_group
from runtime.options import UserError, option, program, resolve
from runtime.run import Run
from runtime.shards import collect, shard_name, unfinished, write_shard
from tiny import codec as codecs
from tiny import words
from wan import text, vae

WAN = dict(
    frames=49, height=288, width=512,  # the paper's
    train=0.8, align=0.2,  # the paper's 80,000 clips for Φ and 20,000 for cold start and pairs; it evaluates on prompts
    shard_size=32, negative=text.NEGATIVE,
)  # fmt: skip
TINY = dict(frames=49, height=64, width=64, train=0.6, align=0.2, shard_size=250, negative="")  # a fifth to evaluate on
PRESETS = {"tiny": TINY, "1.3b": WAN, "14b": WAN}
SPLITS = ("train", "align", "eval")
FIT_CLIPS = 150  # clips that the linear codec is fitted on
SHOWN = 24  # clips on a contact sheet


@dataclasses.dataclass(frozen=True)
class Config:
    """Stage 0: encodes a folder of captioned videos."""

    preset: str = "tiny"  # tiny: linear codec and word vectors; 1.3b, 14b: Wan2.1's VAE and text encoder
    base: str = ""  # folder of Wan2.1's VAE, text encoder and tokenizer, as released or as diffusers has it
    vae: str = ""  # file or folder of the VAE, if it is not in --base
    text: str = ""  # folder of the text encoder and its tokenizer, if they are not in --base
    videos: str = option("out/demo/clips", neutral=True)  # folder of videos and captions
    metadata: str = option("", neutral=True)  # csv of captions outside the folder; its rows without a video are skipped
    links_out: bool = option(False, neutral=True)  # follow links out of --videos, as in Hugging Face's cache
    out: str = option("out/demo/shards", neutral=True)  # folder to write
    frames: int | None = option(least=5)  # pictures in a clip, of the form 4k+1
    fps: float = option(16.0, least=0, most=1000)  # pictures a second; 0: every frame of the file, whatever its rate
    clips: int = option(1, least=1)  # clips of a video, at most, spread evenly over it; 1: its beginning
    height: int | None = option(least=1)  # px
    width: int | None = option(least=1)  # px
    motion: str = option("frames", choices=("frames", "column"))  # score of the frames, or of the csv's column
    min_motion: float = 0.0  # reject clips with a lower motion score
    train: float | None = option(least=0, most=1)  # share of the videos for base and continuation model
    align: float | None = option(least=0, most=1)  # share for pairs and cold start; the rest is for evaluation
    negative: str | None = option()  # prompt of guidance's unconditional branch, and of dropped captions
    bad_rows: str = option("stop", choices=("stop", "reject"))  # at an unusable row: stop, or reject it and go on
    deadline: float = option(60.0, above=0, most=1_000_000)  # seconds that a video may take to decode
    dtype: str = option("float32", choices=("float32", "bfloat16"))  # of the VAE
    shard_size: int | None = option(least=1)  # videos in a shard
    workers: int = option(2, least=1, neutral=True)  # decoding processes of each process


@dataclasses.dataclass(frozen=True)
class Item:
    """A usable row of the metadata."""

    id: str  # the name in the table without its ending, so a video stays in its split wherever it lies
    video: str  # path in the folder
    caption: str
    motion: str  # the text in the column `motion score`, if there is one
    split: str  # the text in the column `split`, if there is one


# ---- videos and captions ---------------------------------------------------------------------------------------------


def find_item(folder: dataset.Folder, row: dict[str, str], seen: set, preset: str) -> Item | None:
    """The row's video, or None if there is none; `seen` collects the paths and ids. ValueError: the row is unusable."""
    name, caption = row.get("video", ""), row.get("caption", "").strip()
    if not name or "\0" in name:
        raise ValueError("it names no video")
    if re.search(r"[\ud800-\udfff]", name):
        raise ValueError("its name is not UTF-8")
    path = folder.find(name)
    if path is None:
        return None
    if not caption:
        raise ValueError("its caption is empty")
    if preset == "tiny" and not words.WordVectors.words(caption):
        raise ValueError("its caption has no word, and --preset tiny reads nothing else")
    clip = dataset.plain(str(Path(path if Path(name).is_absolute() else name).with_suffix("")))
    if path in seen:
        raise ValueError("the video is listed twice")
    if clip in seen:
        raise ValueError("its name differs from another video's only in the ending or in the spelling of an accent")
    split = row.get("split", "")
    if split not in ("", *SPLITS):
        raise ValueError(f"its split is {split!r}, expected {', '.join(SPLITS)} or nothing")
    seen |= {path, clip}
    return Item(clip, path, caption, row.get("motion score", ""), split)


def read_items(cfg, talk: bool = True) -> tuple[list[Item], list[dict]]:
    """The usable rows in the table's order, and the rejected ones with their reasons.

    UserError at the first bad row, unless --bad_rows is reject. Rows of --metadata without a video are skipped, because
    the folder may hold a part of the dataset. talk: print how many.
    """
    folder = dataset.Folder(cfg.videos, cfg.links_out)
    table, rows = folder.table(cfg.metadata)
    items, rejects, seen, number, absent = [], [], set(), 0, 0
    for number, (row, wrong) in enumerate(rows, 1):
        name = row.get("video", "").encode(errors="backslashreplace").decode()  # to be written, even if it is not UTF-8
        try:
            if wrong:
                raise ValueError(wrong)
            item = find_item(folder, row, seen, cfg.preset)
        except ValueError as error:
            if cfg.bad_rows != "reject":
                where = f"{table} row {number} ({name[:200]!r})"
                raise UserError(f"{where}: {error}; mend it, or leave such rows out with --bad_rows reject") from None
            rejects.append({"video": name, "reason": str(error)})
            continue
        if item:
            items.append(item)
        elif cfg.metadata:
            absent += 1
        else:
            rejects.append({"video": name, "reason": "no such file"})
    if absent:
        folder.passed.append(f"{absent} of {number} rows of {table}: their videos are not in {cfg.videos}")
    if talk and folder.passed:
        more = [f"and {len(folder.passed) - 20} more"] * (len(folder.passed) > 20)
        print("\n".join(f"prepare: skipped {passed}" for passed in folder.passed[-20:] + more))
    if not items:
        why = [f"{row['video']!r}: {row['reason']}" for row in rejects] + folder.passed
        found = f"found none of {number}{'; ' * bool(why)}{''.join(why[:1])}"
        raise UserError(f"{table}: expected captioned videos of {cfg.videos}, {found}")
    return items, rejects


def split_of(item: Item, cfg) -> str:
    """What the table says, else by a hash of the video's id: adding or dropping other videos does not move it."""
    u = int.from_bytes(hashlib.blake2b(item.id.encode(), digest_size=8).digest(), "big") / 2**64
    return item.split or ("train" if u < cfg.train else "align" if u < cfg.train + cfg.align else "eval")


# ---- clips -----------------------------------------------------------------------------------------------------------


def read(cfg, decoder: video.Decoder, item: Item) -> list[tuple[video.Clip, float] | video.BadVideo]:
    """The clips of a video with their motion scores. A BadVideo stands in the place of each rejected clip."""
    size = (cfg.height, cfg.width)
    try:
        clips = decoder.read(Path(cfg.videos, item.video), cfg.frames, size, cfg.fps or None, cfg.clips)
    except video.BadVideo as error:
        return [error]
    return [clip if isinstance(clip, video.BadVideo) else with_motion(cfg, item, clip) for clip in clips]


def with_motion(cfg, item: Item, clip: video.Clip) -> tuple[video.Clip, float] | video.BadVideo:
    """A clip with its motion score, or why it is rejected."""
    if cfg.motion == "frames":
        pairs = zip(clip.frames.astype(np.int16), clip.frames[1:])
        score = float(np.mean([np.abs(b - a).mean() for a, b in pairs]))
    else:
        try:
            score = float(item.motion)
        except ValueError:
            score = math.nan
    if not math.isfinite(score):
        return video.BadVideo(f"motion score column: expected a number, got {item.motion!r}")
    if score < cfg.min_motion:
        return video.BadVideo(f"motion score {score:.3f} is below --min_motion {cfg.min_motion:g}")
    return clip, score


def fit_codec(cfg, items: list[Item], path: Path, each: Callable) -> None:
    """Fits the linear codec on the first clips that can be read, train clips first, and stores it."""
    order = sorted(items, key=lambda item: split_of(item, cfg) != "train")
    clips, bad = [], []
    for item, found in zip(order, each(functools.partial(read, cfg), order)):
        bad += [f"; {item.video}: {clip}" for clip in found if isinstance(clip, video.BadVideo)]
        clips += [video.to_pixels(clip[0].frames) for clip in found if not isinstance(clip, video.BadVideo)]
        if len(clips) >= FIT_CLIPS:
            break
    if len(clips) < 2:
        raise UserError(f"{cfg.videos}: expected at least 2 usable videos, got {len(clips)}{''.join(bad[:1])}")
    codecs.LinearVAE.fit(torch.stack(clips[:FIT_CLIPS])).save(path)


def load_encoders(cfg, folder: Path, device):
    """The codec, the text encoder, and the device they run on."""
    if cfg.preset == "tiny":
        return codecs.load(folder), words.WordVectors(), torch.device("cpu")
    codec = vae.load_vae(cfg.vae or cfg.base, getattr(torch, cfg.dtype), device)
    return codec, text.TextEncoder(cfg.text or cfg.base, device=device), device


def encode_shard(cfg, k: int, items: list[Item], codec, encoder, device, folder: Path, each: Callable) -> None:
    """Reads, encodes and writes shard k."""
    rows, x0, rejects = [], [], []
    for item, clips in zip(items, each(functools.partial(read, cfg), items)):
        for number, found in enumerate(clips):
            if isinstance(found, video.BadVideo):
                rejects.append({"video": item.video, "reason": str(found)})
                continue
            clip, motion = found
            x0.append(codec.encode(video.to_pixels(clip.frames)[None].to(device))[0].cpu())
            split = split_of(item, cfg)
            row = {"id": f"{item.id}#{number}" if number else item.id, "caption": item.caption, "split": split}
            rows.append({**row, "motion": round(motion, 4), "video": item.video, "start": clip.start})
    captions = list(dict.fromkeys(row["caption"] for row in rows))
    states = dict(zip(captions, encoder.encode(captions)))
    write_shard(folder, k, rows, {"x0": x0}, [states[row["caption"]] for row in rows], rejects)


# ---- what to look at -------------------------------------------------------------------------------------------------


def first_picture(cfg, decoder: video.Decoder, row: dict) -> np.ndarray | None:
    """The first picture (1, h, w, 3) of a rejected video, or None if it cannot be read."""
    if row["reason"].startswith(video.FATAL):
        return None
    with contextlib.suppress(video.BadVideo):
        return decoder.read(Path(cfg.videos, row["video"]), 1, (cfg.height, cfg.width))[0].frames


def contact_sheets(cfg, folder: Path, shards: int, codec, device, each: Callable) -> list[str]:
    """Draws kept.png, clips as the codec gives them back, and rejected.png, what was read and rejected.

    Some of each, evenly chosen. Returns the files' names.
    """
    kept, rejected, cells = [], [], []
    for k in range(shards):
        facts = read_sealed(folder / f"{shard_name(k)}.json")
        kept += [(folder / f"{shard_name(k)}.safetensors", i, row) for i, row in enumerate(facts["rows"])]
        rejected += facts["rejects"]
    for path, i, row in evenly(kept):
        with safe_open(path, "pt") as shard:
            x0 = shard.get_slice("x0")[i : i + 1].to(device)
        frames = video.to_frames(codec.decode(x0)[0])[[0, cfg.frames // 2, -1]]
        facts = f"{row['split']}, motion {row['motion']:.1f}, from {row['start']:.1f} s"
        cells.append((frames, f"{row['id']}: {facts}: {row['caption']}"))
    video.contact_sheet(folder / "kept.png", f"kept: {len(cells)} of {len(kept)}", cells)
    some = evenly(rejected)
    pictures = each(functools.partial(first_picture, cfg), some)
    cells = [(picture, f"{row['video']}: {row['reason']}") for picture, row in zip(pictures, some)]
    video.contact_sheet(folder / "rejected.png", f"rejected: {len(cells)} of {len(rejected)}", cells)
    return ["kept.png", "rejected.png"]


def evenly(rows: list) -> list:
    """The rows of a contact sheet."""
    return [rows[i] for i in np.linspace(0, len(rows) - 1, min(SHOWN, len(rows))).round().astype(int)]


def print_reasons(rejects: list[dict]) -> None:
    """Prints the commonest reasons with their counts. Reasons that differ only in a name or a number count as one."""
    kinds = collections.Counter(re.sub(r"'.*'|(?<![\w-])-?\d[\d.]*", "…", row["reason"]) for row in rejects)
    for reason, count in kinds.most_common(10):
        print(f"{count:8d}  {reason}")


def main(cfg: Config) -> None:
    # ---- what to do, checked before anything is decoded
    cfg = resolve(cfg, PRESETS)
    side = codecs.PATCH if cfg.preset == "tiny" else 16  # Wan's 8, two by two in a patch of the transformer
    video.check_size(cfg.frames, cfg.height, cfg.width, side)
    if cfg.train + cfg.align > 1:
        raise UserError(f"--train, --align: expected shares that add up to at most 1, got {cfg.train} and {cfg.align}")
    if cfg.preset != "tiny" and not (cfg.base or (cfg.vae and cfg.text)):
        raise UserError(f"--preset {cfg.preset} needs --base, the folder of Wan2.1's VAE and text encoder")
    group = start_group()
    items, rejects = read_items(cfg, group.main)
    stats = [Path(cfg.videos, item.video).stat() for item in items]
    facts = [(*dataclasses.astuple(item), stat.st_size) for item, stat in zip(items, stats)]
    items_hash, times = (
        hashlib.sha256(repr(value).encode()).hexdigest() for value in (facts, [stat.st_mtime_ns for stat in stats])
    )
    inputs = {name: getattr(cfg, name) for name in ("base", "vae", "text")}
    run = Run(cfg, "prepare", group, inputs, items=items_hash, times=times)
    if run.done:
        return

    # ---- the encoders, then one shard after the other
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))  # the other half decodes
    shards = -(-len(items) // cfg.shard_size)
    with video.readers(cfg.workers, cfg.deadline) as each:
        if cfg.preset == "tiny":
            run.claim()
            fitted = run.folder / "codec.safetensors"
            if group.main and not unchanged(fitted):
                fit_codec(cfg, items, fitted, each)
                checksum(fitted)  # remembered, for the next start
            group.wait()
        codec, encoder, device = load_encoders(cfg, run.folder, group.device)
        for k, index, _ in unfinished(run, len(items), cfg.shard_size, unit="video"):
            encode_shard(cfg, k, [items[i] for i in index], codec, encoder, device, run.folder, each)

        # ---- result
        files, kept = [], 0
        if group.main:
            files, kept, rejected = collect(run.folder, shards, rejects)
            files += contact_sheets(cfg, run.folder, shards, codec, device, each)
            write_tensors(run.folder / "negative.safetensors", {"text": encoder.encode([cfg.negative])[0]})
            files += ["negative.safetensors"] + ["codec.safetensors"] * (cfg.preset == "tiny")
            print(f"prepare: kept {kept} clips, rejected {rejected}; look at {run.folder}/kept.png and rejected.png")
            print_reasons(read_jsonl(run.folder / "rejects.jsonl"))
            if not kept:
                raise UserError(f"{cfg.videos}: expected videos to keep, every one was rejected; delete {run.folder}")
    run.finish(files, clips=kept, fps=cfg.fps or 16)


if __name__ == "__main__":
    program(main, Config, __doc__)

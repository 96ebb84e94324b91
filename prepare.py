"""Stage 0: encodes videos and captions into shards of latents and text states.

    python prepare.py --videos out/demo/clips --out out/demo/shards
    torchrun --nproc_per_node 8 prepare.py --preset 1.3b --base Wan2.1-T2V-1.3B --videos clips --out shards --workers 8
    torchrun --nproc_per_node 8 prepare.py --preset 1.3b --base Wan2.1-T2V-1.3B --videos OpenVid \\
        --metadata OpenVid-1M.csv --motion column --min_motion 2 --out shards --workers 8

Captions come from --metadata, from the folder's metadata.csv, or from a `name.txt` beside each `name.mp4`. A table has
the columns `video,caption`, as OpenVid-1M's does. A video is looked for under its name in the table, then by the last
part of that name in every folder below, because OpenVid-1M's parts unpack into folders of their own. Hidden files are
passed over. But for --metadata nothing outside of --videos is read; --links_out follows links out of it.

With --cuts reject a clip with a cut inside is left out, with --cuts split the clips are taken from a video's shots that
are long enough. PySceneDetect finds the cuts (pip install scenedetect-headless; docs/videos.md says how well). Without
--cuts nobody looks for them: what a folder gives must not depend on what is installed.

Clips are read at 16 pictures a second, by timestamps. Pictures are resized to cover the wanted size and cut at the
centre. Videos that cannot be trusted are left out and listed (see runtime/decode.py). All clips of a video are in one
split: train (base and continuation model), align (pairs and cold start) or, where --train and --align leave some, eval.
The table's column `split` says which, if it has one, else a hash of the video's id.

The other presets make the same shards with Wan's VAE and text encoder from --base. The preset tiny fits a linear codec
on the train clips, stores it beside the shards, and encodes text by a fixed vector for each word. With --vae it takes
the codec of other shards.

Your own pairs, in place of make_pairs.py's:

    python prepare.py --pairs mine/pairs.csv --vae out/demo/shards --out out/mine/pairs
    torchrun --nproc_per_node 8 prepare.py --preset 1.3b --base Wan2.1-T2V-1.3B --chosen good --rejected bad --out pairs

--pairs is a table with the columns `chosen,rejected,caption`. Its videos are looked for below --videos, or below the
table's own folder if --videos is not given. Or --chosen and --rejected are two folders, in which videos of equal names
are a pair; the captions are those of either folder, or --metadata's. Both sides are read from their beginning. The
table may have a column `start`: the first picture that differs, counted from 0 in the clip as it is read, at --fps. The
loss leaves out the latent frames before the one that holds it: N1 = (start + 3) // 4. Without it a pair differs from 0
on. A winner is given whole, N2 = F: asymdpo.py trains with --region 23 or 123, and for --region 3 there is nothing.

In    a folder of videos with captions, or pairs; for Wan also the folder of its release, or of diffusers' version
Out   shards with `x0` (C, F, H, W) and text states, and for each clip id, caption, split, motion, video, start; of
      pairs `chosen` and `rejected`, and for each id, caption, n1, n2, the videos, start;
      negative.safetensors (text states of the negative prompt), codec.safetensors (tiny), rejects.jsonl (what was left
      out, and why); to look at: kept.png, some clips or pairs decoded again, rejected.png, some rejected videos, and
      motion.png, how much the clips move
Cost  decoding, and one pass of the encoders for each clip; of the VAE's decoder for the few of kept.png
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from tqdm import tqdm

from runtime import dataset, pairs, video
from runtime.files import checksum, read_jsonl, read_manifest, read_sealed, unchanged, whole_file, write_tensors
from runtime.group import start_group
from runtime.options import UserError, option, program, resolve
from runtime.run import Run
from runtime.shards import collect, latent_frame, shard_name, unfinished, write_shard
from tiny import codec as codecs
from tiny import words
from wan import text, vae

WAN = dict(
    frames=49, height=288, width=512,  # the paper's
    train=0.8, align=0.2,  # the paper's 80,000 clips for Φ and 20,000 for cold start and pairs; it evaluates on prompts
    shard_size=32, negative=text.NEGATIVE, videos="out/demo/clips",
)  # fmt: skip
TINY = dict(
    frames=49, height=64, width=64, train=0.6, align=0.2,  # a fifth to evaluate on
    shard_size=250, negative="", videos="out/demo/clips",
)  # fmt: skip
PRESETS = {"tiny": TINY, "1.3b": WAN, "14b": WAN, "a14b": WAN}
SPLITS = ("train", "align", "eval")
FIT_CLIPS = 150  # clips that the linear codec is fitted on
SHOWN = 24  # clips on a contact sheet
bar = functools.partial(tqdm, dynamic_ncols=True, mininterval=1.0, delay=2.0, leave=False)  # for what takes longer


@dataclasses.dataclass(frozen=True)
class Config:
    """Stage 0: encodes a folder of captioned videos."""

    preset: str = option("tiny", choices=tuple(PRESETS))  # tiny: linear codec and word vectors; else Wan's encoders
    base: str = ""  # folder of Wan2.1's VAE, text encoder and tokenizer, as released or as diffusers has it
    vae: str = ""  # file or folder of the VAE, if it is not in --base; tiny: shards whose codec is to be used
    text: str = ""  # folder of the text encoder and its tokenizer, if they are not in --base
    videos: str | None = option(neutral=True)  # folder of videos and captions; not given with --pairs: the table's
    metadata: str = option("", neutral=True)  # csv of captions outside the folder; its rows without a video are skipped
    links_out: bool = option(False, neutral=True)  # follow links out of --videos, as in Hugging Face's cache
    pairs: str = option("", neutral=True)  # csv of your own pairs: chosen,rejected,caption and, if need be, start
    chosen: str = option("", neutral=True)  # or two folders: the better videos
    rejected: str = option("", neutral=True)  # and the folder of the worse ones, of the same names
    out: str = option("out/demo/shards", neutral=True)  # folder to write
    frames: int | None = option(least=5)  # pictures in a clip, of the form 4k+1
    fps: float = option(16.0, least=0, most=1000)  # pictures a second; 0: every frame of the file, whatever its rate
    clips: int = option(1, least=1)  # clips of a video, at most, spread evenly over it; 1: its beginning
    cuts: str = option("ignore", choices=("ignore", "reject", "split"))  # refuse a clip with a cut, or use the shots
    height: int | None = option(least=1, most=8192)  # px
    width: int | None = option(least=1, most=8192)  # px
    motion: str = option("frames", choices=("frames", "column"))  # score of the frames, or of the csv's column
    min_motion: float = option(0.0, least=0)  # reject clips with a lower motion score
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
    path = folder.find(name)
    if path is None:
        return None
    check_caption(caption, preset)
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


def check_caption(caption: str, preset: str) -> None:
    """ValueError for a caption that says nothing."""
    if not caption:
        raise ValueError("its caption is missing or empty")
    if preset == "tiny" and not words.WordVectors.words(caption):
        raise ValueError("its caption has no word, and --preset tiny reads nothing else")


def read_items(cfg, talk: bool = True) -> tuple[list[Item], list[dict]]:
    """The usable rows in the table's order, and the rejected ones with their reasons.

    UserError at the first bad row, unless --bad_rows is reject. Rows of --metadata without a video are skipped, because
    the folder may hold a part of the dataset. talk: print how many.
    """
    folder = dataset.Folder(cfg.videos, cfg.links_out, talk)
    table, rows = folder.table(cfg.metadata)
    if table == folder.root:
        folder.check_captions()
    rows = bar(rows, f"prepare: {table}", unit="row", disable=not talk)
    find = functools.partial(find_item, folder, seen=set(), preset=cfg.preset)
    items, rejects, number = [], [], 0
    for names, item, wrong in dataset.judged(cfg, table, rows, ("video",), find):
        number += 1
        if item:
            items.append(item)
        elif wrong or not cfg.metadata:
            rejects.append({**names, "reason": wrong or "no such file"})
    if absent := number - len(items) - len(rejects):
        folder.passed.append(f"{absent} of {number} rows of {table}: their videos are not in {cfg.videos}")
    if talk:
        dataset.say_skipped(folder)
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


class TooLittleMotion(video.BadVideo):
    """Why a clip is rejected, with its motion score."""

    motion: float


def read(cfg, decoder: video.Decoder, item: Item) -> list[tuple[video.Clip, float] | video.BadVideo]:
    """The clips of a video with their motion scores. A BadVideo stands in the place of each rejected clip."""
    size, cuts = (cfg.height, cfg.width), "" if cfg.cuts == "ignore" else cfg.cuts
    try:
        clips = decoder.read(Path(cfg.videos, item.video), cfg.frames, size, cfg.fps or None, cfg.clips, cuts=cuts)
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
        error = TooLittleMotion(f"motion score {score:.3f} is below --min_motion {cfg.min_motion:g}")
        error.motion = score
        return error
    return clip, score


def fit_codec(cfg, items: list[Item], path: Path, each: Callable) -> None:
    """Fits the linear codec on the first clips that can be read, train clips first, and stores it."""
    order = sorted(items, key=lambda item: split_of(item, cfg) != "train")
    clips, bad = [], []
    videos, count = each(functools.partial(read, cfg), order), min(FIT_CLIPS, len(order))
    for item, found in zip(order, bar(videos, "prepare: clips for the codec", count, unit="video")):
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
                motion = {"motion": round(found.motion, 4)} if isinstance(found, TooLittleMotion) else {}
                rejects.append({"video": item.video, "reason": str(found), **motion})
                continue
            clip, motion = found
            x0.append(encode(codec, clip.frames, device))
            split = split_of(item, cfg)
            row = {"id": f"{item.id}#{number}" if number else item.id, "caption": item.caption, "split": split}
            rows.append({**row, "motion": round(motion, 4), "video": item.video, "start": clip.start})
    write(folder, k, rows, {"x0": x0}, rejects, encoder)


def encode_pairs(cfg, k: int, items: list[pairs.Pair], codec, encoder, device, folder: Path, each: Callable) -> None:
    """Reads, encodes and writes shard k of pairs, as make_pairs.py would: the winner is given whole."""
    rows, fields, rejects = [], {side: [] for side in pairs.SIDES}, []
    for pair, found in zip(items, each(functools.partial(pairs.read_pair, cfg), items)):
        names = {side: getattr(pair, side) for side in pairs.SIDES}
        if isinstance(found, video.BadVideo):
            rejects.append({**names, "reason": str(found)})
            continue
        for side, frames in zip(pairs.SIDES, found):
            fields[side].append(encode(codec, frames, device))
        given = {"n1": latent_frame(pair.start), "n2": latent_frame(cfg.frames)}
        rows.append({"id": pair.id, "caption": pair.caption, **given, **names, "start": pair.start})
    write(folder, k, rows, fields, rejects, encoder)


def encode(codec, frames: np.ndarray, device) -> torch.Tensor:
    """The latents (C, F, H, W) of pictures (T, h, w, 3)."""
    return codec.encode(video.to_pixels(frames)[None].to(device))[0].cpu()


def write(folder: Path, k: int, rows: list[dict], fields: dict[str, list], rejects: list[dict], encoder) -> None:
    """Writes shard k with the text states of its rows' captions."""
    captions = list(dict.fromkeys(row["caption"] for row in rows))
    states = dict(zip(captions, encoder.encode(captions)))
    write_shard(folder, k, rows, fields, [states[row["caption"]] for row in rows], rejects)


# ---- what to look at -------------------------------------------------------------------------------------------------


def first_picture(cfg, decoder: video.Decoder, row: dict) -> np.ndarray | None:
    """The first picture (1, h, w, 3) of a rejected video, or None if it cannot be read."""
    if row["reason"].startswith(video.FATAL):
        return None
    with contextlib.suppress(video.BadVideo):
        return decoder.read(Path(cfg.videos, row["video"]), 1, (cfg.height, cfg.width))[0].frames


def contact_sheets(cfg, folder: Path, shards: int, codec, device, each: Callable) -> list[str]:
    """Draws kept.png, clips as the codec gives them back, rejected.png, what was read and rejected, and motion.png.

    Some of each, evenly chosen; of pairs those that were kept alone. Returns the files' names.
    """
    kept, rejected, cells = [], [], []
    for k in range(shards):
        facts = read_sealed(folder / f"{shard_name(k)}.json")
        kept += [(folder / f"{shard_name(k)}.safetensors", i, row) for i, row in enumerate(facts["rows"])]
        rejected += facts["rejects"]
    for path, i, row in bar(evenly(kept), "prepare: kept.png", unit="clip"):
        if "split" in row:
            fields, facts = ["x0"], f"{row['split']}, motion {row['motion']:.1f}, from {row['start']:.1f} s"
        else:
            fields, facts = pairs.SIDES, f"chosen above rejected, from picture {row['start']}"
        with safe_open(path, "pt") as shard:
            latents = [shard.get_slice(field)[i : i + 1].to(device) for field in fields]
        frames = [video.to_frames(codec.decode(x0)[0])[[0, cfg.frames // 2, -1]] for x0 in latents]
        gap = np.full_like(frames[0][:, : cfg.height // 32], 255)
        shown = np.concatenate(frames if len(frames) == 1 else [frames[0], gap, frames[1]], axis=1)
        cells.append((shown, f"{row['id']}: {facts}: {row['caption']}"))
    video.contact_sheet(folder / "kept.png", f"kept: {len(cells)} of {len(kept)}", cells)
    if wants_pairs(cfg):
        return ["kept.png"]
    some = evenly(rejected)
    pictures = bar(each(functools.partial(first_picture, cfg), some), "prepare: rejected.png", len(some), unit="video")
    cells = [(picture, f"{row['video']}: {row['reason']}") for picture, row in zip(pictures, some)]
    video.contact_sheet(folder / "rejected.png", f"rejected: {len(cells)} of {len(rejected)}", cells)
    show_motion(cfg, folder / "motion.png", [row for *_, row in kept], rejected)
    return ["kept.png", "rejected.png", "motion.png"]


def show_motion(cfg, path: Path, kept: list[dict], rejected: list[dict]) -> None:
    """Draws how many clips move how much, and prints what most of those that were kept do."""
    scores = tuple([row["motion"] for row in rows if "motion" in row] for rows in (kept, rejected))
    if kept:
        low, half, high = (f"{score:.2f}" for score in np.quantile(scores[0], [0.1, 0.5, 0.9]))
        print(f"prepare: motion of what was kept: 10 % below {low}, 50 % below {half}, 90 % below {high}")
    score = "mean difference of neighbouring pictures, of 255" if cfg.motion == "frames" else "the table's column"
    video.histogram(path, f"motion score: {score}", scores, "--min_motion", cfg.min_motion)


def evenly(rows: list) -> list:
    """The rows of a contact sheet."""
    return [rows[i] for i in np.linspace(0, len(rows) - 1, min(SHOWN, len(rows))).round().astype(int)]


def print_table(kept: int, rejects: list[dict], unit: str) -> None:
    """Prints how many were kept, and the commonest reasons why others were not, with shares of all.

    Reasons that differ only in a name or a number count as one.
    """
    kinds = collections.Counter(re.sub(r"'.*'|(?<![\w-])-?\d[\d.]*", "…", row["reason"]) for row in rejects)
    rows = [("kept", kept), *kinds.most_common(10)]
    if rest := len(rejects) - sum(count for _, count in rows[1:]):
        rows.append((f"{len(kinds) - 10} other reasons: see rejects.jsonl", rest))
    print(f"   share {unit:>8}")
    for reason, count in rows:
        print(f"{count / (kept + len(rejects)):8.1%} {count:8,d}  {reason}")


def wants_pairs(cfg) -> bool:
    """Whether cfg names pairs, not clips."""
    return bool(cfg.pairs or cfg.chosen or cfg.rejected)


def check(cfg) -> None:
    """UserError for a size of clips that the preset does not take, and for options that do not go together."""
    preset, side = PRESETS[cfg.preset], codecs.PATCH if cfg.preset == "tiny" else 16  # Wan's 8, two by two in a patch
    video.check_size(cfg.frames, cfg.height, cfg.width, side)
    if cfg.train + cfg.align > 1:
        raise UserError(f"--train, --align: expected shares that add up to at most 1, got {cfg.train} and {cfg.align}")
    if cfg.preset != "tiny" and not (cfg.base or (cfg.vae and cfg.text)):
        raise UserError(f"--preset {cfg.preset} needs --base, the folder of Wan2.1's VAE and text encoder")
    if cfg.preset == "tiny" and cfg.vae:
        read_manifest(cfg.vae, "prepare.py")
    if wants_pairs(cfg):
        check_pairs(cfg, preset)


def check_pairs(cfg, preset: dict) -> None:
    """UserError for options that do not go together with pairs."""
    if bool(cfg.pairs) == bool(cfg.chosen or cfg.rejected) or bool(cfg.chosen) != bool(cfg.rejected):
        got = f"{cfg.pairs!r}, {cfg.chosen!r} and {cfg.rejected!r}"
        raise UserError(f"expected --pairs, a table, or --chosen and --rejected, two folders, got {got}")
    if cfg.preset == "tiny" and not cfg.vae:
        raise UserError("pairs at --preset tiny need --vae, the shards that --base was trained on: their codec is used")
    unused = {"clips": 1, "motion": "frames", "min_motion": 0.0, "train": preset["train"], "align": preset["align"]}
    unused |= {"cuts": "ignore"} | ({"metadata": ""} if cfg.pairs else {"videos": preset["videos"]})
    if given := [name for name, value in unused.items() if getattr(cfg, name) != value]:
        way = "--pairs" if cfg.pairs else "--chosen and --rejected"
        raise UserError(f"--{given[0]} says nothing of {way}: leave it out")


def detector_of_cuts(cfg, talk: bool) -> dict[str, str]:
    """What finds cuts, for the manifest. talk: say so where nothing does. UserError if it is not installed."""
    install = "pip install scenedetect-headless"
    if cfg.cuts == "ignore":
        if talk and not wants_pairs(cfg):
            print(f"prepare: nobody looks for cuts: --cuts reject or split does, after {install}")
        return {}
    try:
        import scenedetect
    except ImportError as error:
        raise UserError(f"--cuts {cfg.cuts} needs PySceneDetect: {install} ({error})") from None
    return {"cuts_found_by": f"PySceneDetect {scenedetect.__version__}"}


def what_to_read(cfg, talk: bool) -> tuple[list, list[dict], dict[str, str]]:
    """The items, the rejected rows, and digests: of the items with their files' sizes, and of the files' times."""
    if wants_pairs(cfg):
        items, rejects = pairs.read_pairs(cfg, functools.partial(check_caption, preset=cfg.preset), talk)
        paths = (pairs.paths(cfg, item) for item in items)
    else:
        items, rejects = read_items(cfg, talk)
        paths = ([Path(cfg.videos, item.video)] for item in items)
    paths = bar(paths, "prepare: sizes", len(items), unit="video", disable=not talk)
    stats = [[path.stat() for path in some] for some in paths]
    facts = [(*dataclasses.astuple(item), *(stat.st_size for stat in some)) for item, some in zip(items, stats)]
    told = {"items": facts, "times": [stat.st_mtime_ns for some in stats for stat in some]}
    return items, rejects, {name: hashlib.sha256(repr(value).encode()).hexdigest() for name, value in told.items()}


def make_codec(cfg, run: Run, items: list, each: Callable) -> None:
    """The tiny preset's codec, in run's folder, unless it is there: that of --vae, or one of these clips."""
    run.claim()
    path = run.folder / "codec.safetensors"
    if run.group.main and not unchanged(path):
        if cfg.vae:
            with whole_file(path) as file:  # the same bytes, by which a codec is known
                shutil.copyfile(Path(cfg.vae, path.name), file)
        else:
            fit_codec(cfg, items, path, each)
        checksum(path)  # remembered, for the next start
    run.group.wait()


def main(cfg: Config) -> None:
    # ---- what to do, checked before anything is decoded
    if cfg.pairs and cfg.videos is None:
        cfg = dataclasses.replace(cfg, videos=str(Path(cfg.pairs).parent))
    cfg = resolve(cfg, PRESETS)
    check(cfg)
    stage, unit, item, make = "prepare", "clips", "video", encode_shard
    if wants_pairs(cfg):
        stage, unit, item, make = "prepare.py --pairs", "pairs", "pair", encode_pairs
    group = start_group()
    items, rejects, digests = what_to_read(cfg, group.main)
    run = Run(cfg, stage, group, {name: getattr(cfg, name) for name in ("base", "vae", "text")}, **digests)
    if run.done:
        return
    found_by = detector_of_cuts(cfg, group.main)

    # ---- the encoders, then one shard after the other
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))  # the other half decodes
    with video.readers(cfg.workers, cfg.deadline) as each:
        if cfg.preset == "tiny":
            make_codec(cfg, run, items, each)
        codec, encoder, device = load_encoders(cfg, run.folder, group.device)
        for k, index, _ in unfinished(run, len(items), cfg.shard_size, item):
            make(cfg, k, [items[i] for i in index], codec, encoder, device, run.folder, each)

        # ---- result
        files, kept, figure = [], 0, ""
        if group.main:
            shards = -(-len(items) // cfg.shard_size)
            files, kept, rejected = collect(run.folder, shards, rejects)
            sheets = contact_sheets(cfg, run.folder, shards, codec, device, each)
            write_tensors(run.folder / "negative.safetensors", {"text": encoder.encode([cfg.negative])[0]})
            files += sheets + ["negative.safetensors"] + ["codec.safetensors"] * (cfg.preset == "tiny")
            figure = f"{rejected:,} rejected; see its {', '.join(sheets)}"
            print_table(kept, read_jsonl(run.folder / "rejects.jsonl"), unit)
            if not kept:
                where = cfg.pairs or cfg.chosen or cfg.videos
                raise UserError(f"{where}: expected {unit} to keep, every one was rejected; delete {run.folder}")
    run.finish(files, f"{kept:,} {unit}", figure, **{unit: kept}, fps=cfg.fps or 16, **found_by)


if __name__ == "__main__":
    program(main, Config, __doc__, PRESETS)

"""Stage 0, videos and captions to shards of latents and text states.

    python prepare.py --videos out/demo/clips --out out/demo/shards
    torchrun --nproc_per_node 8 prepare.py --preset 1.3b --base Wan2.1-T2V-1.3B --videos clips --out shards --workers 8
    torchrun --nproc_per_node 8 prepare.py --preset 1.3b --base Wan2.1-T2V-1.3B --videos OpenVid \\
        --metadata OpenVid-1M.csv --motion column --min_motion 2 --out shards --workers 8

The captions come from --metadata, or from the folder's metadata.csv (columns `video,caption`, as in OpenVid-1M),
metadata.jsonl (the same keys), or a `name.txt` beside each `name.mp4`. A video is looked for under its name, and then
by the last part of it in every folder below, as OpenVid-1M's parts unpack. Clips are read at 16 pictures a second, by
timestamps, resized to cover the picture and cut at the centre; what cannot be trusted is left out and named (see
decode.py).
They are dealt to the splits train (base and continuation model), align (pairs and cold start) and eval by a hash of the
video's id: all clips of a video go to one split.

The presets 1.3b and 14b take Wan2.1's VAE and text encoder from --base and make the same shards. The tiny preset's VAE
is a linear codec fitted on the train clips and stored beside the shards; its text states are fixed word vectors.

In    a folder of videos; for Wan the release's folder, or diffusers'
Out   shards with `x0` (C, F, H, W) and text states, and for each clip id, caption, split, motion, video, start;
      negative.safetensors (text states of the negative prompt), codec.safetensors (tiny), rejects.jsonl (what was left
      out, and why), kept.png and rejected.png (to look at)
Cost  decoding, and one pass of the encoders a clip
"""

import collections
import contextlib
import csv
import dataclasses
import functools
import hashlib
import json
import os
import queue
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from experiments import cost
from runtime import run as common
from runtime import shards as data
from runtime import video
from runtime.run import UserError
from wan import text, vae

WAN = dict(frames=49, height=288, width=512, shard_size=32, negative=text.NEGATIVE)
PRESETS = {"tiny": dict(frames=49, height=64, width=64, shard_size=250, negative=""), "1.3b": WAN, "14b": WAN}
FIT_CLIPS = 150  # clips that the linear codec is fitted on
SHOWN = 24  # clips on a contact sheet
MISSING = "no such file"
VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv")


@dataclasses.dataclass(frozen=True)
class Config:
    """Stage 0: encodes a folder of captioned videos."""

    preset: str = "tiny"  # tiny: linear codec and word vectors; 1.3b, 14b: Wan2.1's VAE and text encoder
    base: str = ""  # folder with Wan2.1's VAE, text encoder and tokenizer, the release's or diffusers'
    vae: str = ""  # file or folder of the VAE, if it is not in --base
    text: str = ""  # folder of the text encoder and its tokenizer, if they are not in --base
    videos: str = "out/demo/clips"  # folder of videos and captions
    metadata: str = ""  # csv or jsonl of the captions, if it is not in the folder; rows without a video are left out
    out: str = "out/demo/shards"  # folder to write
    frames: int | None = None  # pictures a clip, of the form 4k+1
    fps: float = 16.0  # pictures a second; 0: every frame of the file, whatever its rate
    clips: int = 1  # clips of a video, at most, spread evenly over it; 1: its beginning
    exact: bool = False  # reject a video that is longer than one clip, too
    height: int | None = None  # px
    width: int | None = None  # px
    motion: str = "frames"  # score: frames (mean absolute difference of neighbours, 0 … 255) or column (`motion score`)
    min_motion: float = 0.0  # reject clips whose motion score is lower
    max_motion: float = float("inf")  # reject clips whose motion score is higher
    train: float = 0.6  # share of the videos for base and continuation model
    align: float = 0.2  # share for pairs and cold start; the rest is for evaluation
    negative: str | None = None  # prompt of the unconditional branch of guidance; 1.3b, 14b: Wan's own
    bad_rows: str = "stop"  # a metadata row that cannot be used: stop the run, or reject the row and go on
    deadline: float = 60.0  # s that decoding a video may take
    dtype: str = "float32"  # of the VAE: float32 or bfloat16
    shard_size: int | None = None  # videos a shard
    workers: int = 2  # decoding processes, for each process
    dry_run: bool = False  # print what it will cost, and stop: nothing is loaded or written


@dataclasses.dataclass(frozen=True)
class Item:
    """A row of the metadata."""

    id: str
    path: Path
    caption: str
    motion: str  # the `motion score` column as it stands


# ---- videos and captions ---------------------------------------------------------------------------------------------


def read_table(path: Path) -> list[dict]:
    """The rows of a csv or jsonl file. UserError if it is none."""
    if path.suffix == ".csv":
        try:
            with open(path, newline="", encoding="utf-8-sig") as f:
                table = csv.DictReader(f)
                if not {"video", "caption"} <= set(table.fieldnames or ()):
                    got = ", ".join(table.fieldnames or ()) or "none"
                    raise UserError(f"{path}: expected the columns video,caption, got {got}")
                wanted = ("video", "caption", "motion score")  # of a million rows, only what is used
                return [{k: row[k] for k in row if k in wanted} for row in table]
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}: expected a UTF-8 csv table, got: {error}") from None
    rows = []
    for number, line in enumerate(common.read_text(path).splitlines(), 1):
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line) if line.strip() else None)
            continue
        raise UserError(f"{path} line {number}: expected a JSON object, got {line[:60]!r}")
    return [row for row in rows if row is not None]


def read_rows(folder: Path, metadata: str) -> tuple[Path, list[dict]]:
    """The metadata's path and its rows, dicts with `video` and `caption`. UserError if there is nothing to read."""
    if not folder.is_dir():
        raise UserError(
            f"{folder}: expected a folder of videos, got {'a file' if folder.exists() else 'no such folder'}"
        )
    places = [Path(metadata)] if metadata else [folder / "metadata.csv", folder / "metadata.jsonl"]
    table = next((p for p in places if p.is_file()), None)
    if metadata and (table is None or table.suffix not in (".csv", ".jsonl")):
        raise UserError(f"--metadata: expected a .csv or .jsonl file, got {metadata}")
    if table:
        rows = read_table(table)
    else:
        table, rows = folder, []
        for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in VIDEOS):
            caption = path.with_suffix(".txt")
            rows.append(
                {
                    "video": str(path.relative_to(folder)),
                    "caption": common.read_text(caption) if caption.is_file() else "",
                }
            )
    if not rows:
        raise UserError(
            f"{folder}: expected videos with metadata.csv, metadata.jsonl or name.mp4 + name.txt, found none"
        )
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not {"video", "caption"} <= row.keys():
            got = ", ".join(map(str, row)) if isinstance(row, dict) else repr(row)
            raise UserError(f"{table} row {number}: expected the columns video,caption, got {got}")
    return table, rows


def locate(folder: Path):
    """A function from a name in the metadata to the video's path in `folder`, or to why there is none."""
    root = folder.resolve()

    @functools.cache
    def everywhere() -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        for here, _, names in os.walk(folder):
            for name in names:
                found.setdefault(name, []).append(Path(here) / name)
        return found

    def find(name) -> Path | str:
        if not isinstance(name, str) or not name or "\0" in name:
            return "it names no video"
        try:
            name.encode()
            path = (folder / name).resolve()
            if not path.is_relative_to(root):
                return "its path leaves the folder"
            if path.is_file():
                return folder / path.relative_to(root) if Path(name).is_absolute() else folder / name
            for flat in (Path(name).name, name.replace("/", "_")):  # unpacked part by part, or to names without folders
                if len(paths := everywhere().get(flat, [])) > 1:
                    return f"there are {len(paths)} videos of that name"
                if paths and paths[0].resolve().is_relative_to(root):
                    return paths[0]
        except (OSError, UnicodeEncodeError) as error:
            return f"its name is none of a file: {getattr(error, 'strerror', None) or 'it is not UTF-8'}"
        return MISSING

    return find


def read_items(cfg, talk: bool = True) -> tuple[list[Item], list[dict]]:
    """The usable rows in file order, and the rejected ones.

    UserError at the first bad row unless cfg.bad_rows is reject. Rows of --metadata without a video are only counted:
    who has a part of a dataset has its whole table. talk: say so.
    """
    folder = Path(cfg.videos)
    table, rows = read_rows(folder, cfg.metadata)
    find, items, rejects, seen, gone = locate(folder), [], [], set(), 0
    for number, row in enumerate(rows, 1):
        path = find(row["video"])
        missing = path == MISSING
        if missing and cfg.metadata:
            gone += 1
            continue
        reason = path if isinstance(path, str) and not missing else None
        clip = "" if isinstance(path, str) else clip_id(folder, path, row["video"])
        names = {str(row["video"])} if isinstance(path, str) else {clip, path.resolve()}
        if not reason and names & seen:
            reason = "the video is listed twice, or its name differs from another's in the ending alone"
        if not reason and not (isinstance(row["caption"], str) and text.WordVectors.words(row["caption"])):
            reason = "its caption is empty, or there is none"
        if reason and cfg.bad_rows != "reject":
            where = f"{table} row {number} ({row['video']!r})"
            raise UserError(f"{where}: {reason}; mend it, or leave such rows out with --bad_rows reject")
        seen |= set() if reason else names
        if reason or missing:
            name = str(row["video"]).encode(errors="backslashreplace").decode()  # it may be none that can be written
            rejects.append({"video": name, "reason": reason or MISSING})
        else:
            score = row.get("motion score")
            items.append(Item(clip, path, row["caption"].strip(), "" if score is None else str(score)))
    if gone and talk:
        print(f"prepare: {gone} of {len(rows)} rows of {table} have no video in {folder}, they are left out")
    if not items:
        first = f"; {rejects[0]['video']}: {rejects[0]['reason']}" if rejects else ""
        raise UserError(f"{table}: expected rows whose videos are in {folder}, found none of {len(rows)}{first}")
    return items, rejects


def clip_id(folder: Path, path: Path, name: str) -> str:
    """A video's id, its name in the metadata without the ending: wherever it lies, it stays in its split."""
    return str((path.relative_to(folder) if Path(name).is_absolute() else Path(name)).with_suffix(""))


def split_of(clip: str, train: float, align: float) -> str:
    """train, align or eval, by a hash of the clip's id: adding or dropping other clips moves no clip."""
    u = int.from_bytes(hashlib.blake2b(clip.encode(), digest_size=8).digest(), "big") / 2**64
    return "train" if u < train else "align" if u < train + align else "eval"


# ---- clips -----------------------------------------------------------------------------------------------------------


class Readers:
    """A few decoding processes that work ahead of who asks. Leaving the block stops them at once."""

    def __init__(self, count: int, deadline: float):
        self._decoders, self._free = [video.Decoder(deadline) for _ in range(count)], queue.SimpleQueue()
        for decoder in self._decoders:
            self._free.put(decoder)
        self._pool = ThreadPoolExecutor(count)

    def __enter__(self) -> "Readers":
        return self

    def __exit__(self, *error) -> None:
        for wait in (False, True):  # what is being read ends by its decoder; then one that was just being started
            self._pool.shutdown(wait, cancel_futures=True)
            for decoder in self._decoders:
                decoder.close()

    def each(self, function, rows: list):
        """function(decoder, row) of every row, in order; no more than twice as many as there are decoders wait."""

        def call(row):
            decoder = self._free.get()
            try:
                return function(decoder, row)
            finally:
                self._free.put(decoder)

        waiting = collections.deque()
        for row in rows:
            waiting.append(self._pool.submit(call, row))
            if len(waiting) > 2 * len(self._decoders):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def read_clips(cfg, decoder: video.Decoder, path: Path) -> list[video.Clip | video.BadVideo]:
    """The clips of a video as cfg asks for them, or why they are rejected."""
    try:
        return decoder.read(path, cfg.frames, (cfg.height, cfg.width), cfg.fps or None, cfg.clips, cfg.exact)
    except video.BadVideo as error:
        return [error]


def read(cfg, decoder: video.Decoder, item: Item) -> list[tuple[video.Clip, float] | video.BadVideo]:
    """An item's clips with their motion scores, or why they are rejected."""
    clips = read_clips(cfg, decoder, item.path)
    return [clip if isinstance(clip, video.BadVideo) else with_motion(cfg, item, clip) for clip in clips]


def with_motion(cfg, item: Item, clip: video.Clip) -> tuple[video.Clip, float] | video.BadVideo:
    """A clip with its motion score, or why it is rejected: outside the limits, or the column holds no number."""
    if cfg.motion == "column":
        try:
            score = float(item.motion)
        except ValueError:
            return video.BadVideo(f"motion score column: expected a number, got {item.motion!r}")
    else:
        pairs = zip(clip.frames.astype(np.int16), clip.frames[1:])
        score = float(np.mean([np.abs(b - a).mean() for a, b in pairs]))
    if not cfg.min_motion <= score <= cfg.max_motion:
        return video.BadVideo(f"motion score {score:.3f} is outside {cfg.min_motion} … {cfg.max_motion}")
    return clip, score


def fit_codec(cfg, items: list[Item], path: Path, readers: Readers) -> None:
    """Fits the linear codec on the first readable clips, train clips first, and stores it."""
    order = sorted(items, key=lambda item: split_of(item.id, cfg.train, cfg.align) != "train")
    clips, first = [], ""
    for start in range(0, len(order), FIT_CLIPS):
        part = order[start : start + FIT_CLIPS]
        for item, found in zip(part, readers.each(functools.partial(read, cfg), part)):
            for clip in found:
                if isinstance(clip, video.BadVideo):
                    first = first or f"; {item.path.name}: {clip}"
                else:
                    clips.append(video.to_pixels(clip[0].frames))
        if len(clips) >= FIT_CLIPS:
            break
    if len(clips) < 2:
        raise UserError(f"{cfg.videos}: expected at least 2 usable videos, got {len(clips)}{first}")
    vae.LinearVAE.fit(torch.stack(clips[:FIT_CLIPS])).save(path)


def load_encoders(cfg, folder: Path, device):
    """The codec, the text encoder, and the device they run on."""
    if cfg.preset == "tiny":
        return vae.load(folder), text.WordVectors(), torch.device("cpu")
    codec = vae.load_vae(cfg.vae or cfg.base, getattr(torch, cfg.dtype), device)
    return codec, text.TextEncoder(cfg.text or cfg.base, device=device), device


def encode_shard(cfg, k: int, items: list[Item], codec, encoder, device, folder: Path, readers: Readers) -> None:
    """Reads, encodes and writes shard k."""
    rows, x0, rejects = [], [], []
    for item, clips in zip(items, readers.each(functools.partial(read, cfg), items)):
        name = str(item.path.relative_to(cfg.videos))
        for number, found in enumerate(clips):
            if isinstance(found, video.BadVideo):
                rejects.append({"video": name, "reason": str(found)})
                continue
            clip, motion = found
            x0.append(codec.encode(video.to_pixels(clip.frames)[None].to(device))[0].cpu())
            split = split_of(item.id, cfg.train, cfg.align)
            row = {"id": f"{item.id}#{number}" if number else item.id, "caption": item.caption, "split": split}
            rows.append({**row, "motion": round(motion, 4), "video": name, "start": clip.start})
    states = dict(zip(captions := list(dict.fromkeys(row["caption"] for row in rows)), encoder.encode(captions)))
    data.write_shard(folder, k, rows, {"x0": x0}, [states[row["caption"]] for row in rows], rejects)


def shown(cfg, decoder: video.Decoder, row: dict) -> tuple[np.ndarray | None, str]:
    """What a contact sheet shows of a clip: its first, middle and last picture; of a rejected one its first."""
    folder, name = Path(cfg.videos), str(row["video"]).replace("\0", "")
    path = folder / name
    if "reason" in row:
        with contextlib.suppress(video.BadVideo, OSError, UnicodeEncodeError):
            inside = path.resolve().is_relative_to(folder.resolve())  # it may be rejected because it is not
            if inside and not row["reason"].startswith(video.FATAL):
                return decoder.read(path, 1, (cfg.height, cfg.width))[0].frames, f"{name}: {row['reason']}"
        return None, f"{name}: {row['reason']}"
    for clip in read_clips(cfg, decoder, path):
        if isinstance(clip, video.Clip) and clip.start == row["start"]:
            facts = f"{row['split']}, motion {row['motion']:.1f}, from {clip.start:.1f} s"
            return clip.frames[[0, cfg.frames // 2, -1]], f"{row['id']}: {facts}: {row['caption']}"
    return None, f"{name}: it has changed since it was read"


def contact_sheets(cfg, folder: Path, shards: int, readers: Readers) -> list[str]:
    """kept.png and rejected.png: some clips of each kind, evenly chosen. Returns the names."""
    facts = [json.loads((folder / f"{data.shard_name(k)}.json").read_text()) for k in range(shards)]
    kept, rejected = [row for shard in facts for row in shard["rows"]], common.read_jsonl(folder / "rejects.jsonl")
    for name, rows in (("kept", kept), ("rejected", rejected)):
        some = [rows[i] for i in np.linspace(0, len(rows) - 1, min(SHOWN, len(rows))).round().astype(int)]
        cells = list(readers.each(functools.partial(shown, cfg), some))
        video.contact_sheet(folder / f"{name}.png", f"{name}: {len(some)} of {len(rows)}", cells)
    return ["kept.png", "rejected.png"]


def print_reasons(rejects: Path) -> None:
    """How many were rejected for what, the commonest first: reasons that differ in a number are told by their first."""
    kinds: dict[str, list[str]] = {}
    for row in common.read_jsonl(rejects):
        kinds.setdefault(re.sub(r"'.*'|-?\d[\d.]*", "…", row["reason"]), []).append(row["reason"])
    for reasons in sorted(kinds.values(), key=len, reverse=True)[:10]:
        print(f"{len(reasons):8d}  {reasons[0]}" + ", or with other numbers" * (len(set(reasons)) > 1))


def check(cfg) -> None:
    """UserError for options that make no sense."""
    vae.check_size(cfg.preset, cfg.frames, cfg.height, cfg.width)
    if cfg.train < 0 or cfg.align < 0 or cfg.train + cfg.align > 1:
        raise UserError(f"--train, --align: expected shares that add up to at most 1, got {cfg.train} and {cfg.align}")
    if not 0 <= cfg.fps < 1000 or cfg.clips < 1 or cfg.workers < 1 or not 0 < cfg.deadline < 1e6:
        raise UserError(
            "expected --fps from 0 to 1000, --clips and --workers of at least 1 and --deadline from 0 to 1e6, "
            f"got {cfg.fps}, {cfg.clips}, {cfg.workers} and {cfg.deadline}"
        )
    for name, values in {
        "motion": ("frames", "column"), "bad_rows": ("stop", "reject"), "dtype": ("float32", "bfloat16")
    }.items():  # fmt: skip
        if getattr(cfg, name) not in values:
            raise UserError(f"--{name}: expected {' or '.join(values)}, got {getattr(cfg, name)!r}")
    if cfg.preset != "tiny" and not (cfg.base or (cfg.vae and cfg.text)) and not cfg.dry_run:
        raise UserError(f"--preset {cfg.preset} needs --base, the folder of Wan2.1's VAE and text encoder")


def main(cfg: Config) -> None:
    # ---- what to do, checked before anything is decoded
    cfg = common.resolve(cfg, PRESETS)
    check(cfg)
    if cfg.dry_run:
        clips = cfg.clips * len(read_items(cfg)[0]) if Path(cfg.videos).is_dir() else cost.CLIPS
        return cost.encoding("prepare", cfg.preset, clips, cfg.frames, cfg.height, cfg.width, cfg.dtype)
    group = common.start_group()
    items, rejects = read_items(cfg, group.main)
    facts = [(item.id, item.caption, item.motion, item.path.stat().st_size) for item in items]
    inputs = {name: getattr(cfg, name) for name in ("base", "vae", "text")}
    run = common.Run(cfg, "prepare", group, inputs, items=hashlib.sha256(repr(facts).encode()).hexdigest())
    if run.done:
        return

    # ---- the encoders, then a shard at a time; shards that an earlier run finished are kept
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))  # the other half decodes
    shards = [items[i : i + cfg.shard_size] for i in range(0, len(items), cfg.shard_size)]
    with Readers(cfg.workers, cfg.deadline) as readers:
        if cfg.preset == "tiny":
            run.claim()
            if group.main and not (run.folder / "codec.safetensors").exists():
                fit_codec(cfg, items, run.folder / "codec.safetensors", readers)
            group.barrier()
        codec, encoder, device = load_encoders(cfg, run.folder, group.device)
        bar = run.progress(len(items), unit="video")
        for k in range(group.rank, len(shards), group.size):
            if not data.shard_is_whole(run.folder, k):
                encode_shard(cfg, k, shards[k], codec, encoder, device, run.folder, readers)
            bar.update(min(len(shards[k]) * group.size, len(items) - bar.n))
        bar.close()

        # ---- result
        group.barrier()
        files, kept = [], 0
        if group.main:
            files, kept, rejected = data.collect(run.folder, len(shards), rejects)
            files += contact_sheets(cfg, run.folder, len(shards), readers)
            common.write_tensors(run.folder / "negative.safetensors", {"text": encoder.encode([cfg.negative])[0]})
            files += ["negative.safetensors"] + ["codec.safetensors"] * (cfg.preset == "tiny")
            print(f"prepare: kept {kept} clips, rejected {rejected}; look at {run.folder}/kept.png and rejected.png")
            print_reasons(run.folder / "rejects.jsonl")
            if not kept:
                raise UserError(f"{cfg.videos}: expected videos to keep, every one was rejected; delete {run.folder}")
    run.finish(files, clips=kept, fps=cfg.fps or 16)


if __name__ == "__main__":
    common.run(main, Config, __doc__)

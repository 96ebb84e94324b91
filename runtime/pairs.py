"""Pairs of videos that people bring: a table of them, or two folders whose files have equal names.

Both sides of a pair are read alike: from their first frame, at one rate and size, as many pictures of each.
"""

import collections
import dataclasses
import filecmp
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from runtime.dataset import VIDEOS, Folder, judged, plain, say_skipped
from runtime.files import csv_rows
from runtime.options import UserError
from runtime.shards import latent_frame, pixel_frames
from runtime.video import BadVideo, Decoder

SIDES = ("chosen", "rejected")
COLUMNS = (*SIDES, "caption")  # of a table
MORE = ("start",)  # that it may have
NAMED = 5  # videos without a partner that are named


@dataclasses.dataclass(frozen=True)
class Pair:
    """A usable row of a table of pairs."""

    id: str
    chosen: str  # path in its folder
    rejected: str
    caption: str
    start: int  # the first picture of the clips, as they are read, in which the sides differ


def paths(cfg, pair: Pair) -> list[Path]:
    """Both videos of a pair."""
    return [Path(getattr(cfg, side) or cfg.videos, getattr(pair, side)) for side in SIDES]


# ---- tables and folders ----------------------------------------------------------------------------------------------


def read_pairs(cfg, check_caption: Callable, talk: bool = True) -> tuple[list[Pair], list[dict]]:
    """The usable rows of cfg.pairs, or of the folders cfg.chosen and cfg.rejected, in order; and the rejected ones with
    their reasons.

    cfg.pairs names videos below cfg.videos. check_caption: raises ValueError for a caption that is of no use. talk:
    print what was passed over. UserError if there is none, or at the first bad row, unless cfg.bad_rows is "reject".
    """
    if cfg.pairs:
        folders = (Folder(cfg.videos, cfg.links_out),) * 2
        table, rows = cfg.pairs, csv_rows(Path(cfg.pairs), COLUMNS, MORE)
    else:
        folders = tuple(Folder(getattr(cfg, side), cfg.links_out) for side in SIDES)
        table, rows = cfg.chosen, folder_rows(folders, cfg.metadata)
    find = functools.partial(find_pair, folders, seen=set(), pictures=cfg.frames, check_caption=check_caption)
    found, rejects = [], []
    for names, pair, wrong in judged(cfg, table, rows, SIDES, find):
        if wrong:
            rejects.append({**names, "reason": wrong})
        else:
            found.append(pair)
    if talk:
        say_skipped(folders[0])
    if not found:
        why = [row["reason"] for row in rejects] + folders[0].passed
        raise UserError(f"{table}: expected pairs of videos, found none{'; ' * bool(why)}{''.join(why[:1])}")
    return found, rejects


def folder_rows(folders: tuple[Folder, Folder], captions: str = "") -> Iterator[tuple[dict[str, str], str]]:
    """A row of each name that a video has in both folders, whatever the ending; folders[0].passed names the others.

    Its caption is the one beside the chosen video, or in that folder's table, or at `captions`; without it, the one
    beside the rejected video. UserError as `Folder.table`.
    """
    videos = [_by_stem((name, name) for name in folder.names if name.lower().endswith(VIDEOS)) for folder in folders]
    texts = [_captions(folder, table) for folder, table in zip(folders, (captions, ""))]
    for stem in sorted(videos[0].keys() & videos[1].keys()):
        sides = [found[stem] for found in videos]
        said = [text for found in texts for text in found.get(stem, []) if any(text)]
        wrong = next((wrong for _, wrong in said if wrong), "")
        if several := [names for names in sides if len(names) > 1]:
            wrong = f"expected one video of that name, got {' and '.join(several[0])}"
        elif not wrong and len(set(said)) > 1:
            wrong = "its two videos have different captions"
        row = {side: names[0] for side, names in zip(SIDES, sides)}
        yield {**row, "caption": said[0][0] if said else ""}, wrong
    for i, folder in enumerate(folders):
        if alone := sorted(videos[i].keys() - videos[1 - i].keys()):
            some = ", ".join(map(repr, alone[:NAMED])) + ", …" * (len(alone) > NAMED)
            count = f"{len(alone)} of {len(videos[i])} videos of {folder.root}"
            folders[0].passed.append(f"{count} that {folders[1 - i].root} lacks: {some}")


def _by_stem(found: Iterable[tuple[str, object]]) -> dict[str, list]:
    """Values by the names that they stand beside, without their endings."""
    gathered = collections.defaultdict(list)
    for name, value in found:
        gathered[plain(os.path.splitext(name)[0])].append(value)
    return gathered


def _captions(folder: Folder, table: str) -> dict[str, list[tuple[str, str]]]:
    """The captions by their videos' names, and what is wrong with each, or ""."""
    rows = folder.table(table)[1]
    return _by_stem((row.get("video", ""), (row.get("caption", "").strip(), wrong)) for row, wrong in rows)


def find_pair(
    folders: tuple[Folder, Folder], row: dict[str, str], seen: set, pictures: int, check_caption: Callable
) -> Pair:
    """The pair of a row; `seen` collects the videos and ids. ValueError: the row is unusable. pictures: of a clip."""
    names, videos = [], []
    for side, folder in zip(SIDES, folders):
        try:
            if (name := folder.find(row.get(side, ""))) is None:
                raise ValueError(f"no such file in {folder.root}")
        except ValueError as error:
            raise ValueError(f"its {side} video: {error}") from None
        names.append(name)
        videos.append(folder.root / name)
    caption = row.get("caption", "").strip()
    check_caption(caption)
    if filecmp.cmp(*videos, shallow=False):
        raise ValueError("its two videos are the same file, or equal ones: they teach nothing")
    stems = [plain(os.path.splitext(name)[0]) for name in names]
    pair = Pair(stems[0] if stems[0] == stems[1] else " over ".join(stems), *names, caption, start_of(row, pictures))
    if frozenset(videos) in seen:
        raise ValueError("its two videos are another row's pair")
    if pair.id in seen:
        raise ValueError("its names differ from another pair's only in the ending or in the spelling of an accent")
    seen |= {frozenset(videos), pair.id}
    return pair


def start_of(row: dict[str, str], pictures: int) -> int:
    """The picture in the column `start`; 0 if there is nothing. ValueError unless it is one of the clip's."""
    text = row.get("start", "").strip().removesuffix(".0") or "0"  # pandas writes 4.0 where another row has no start
    if text.isdecimal() and len(text) < 9 and int(text) < pictures:
        return int(text)
    wanted = f"a whole number from 0 to {pictures - 1}, the first picture of the clip that differs"
    raise ValueError(f"its start is {text[:80]!r}, expected {wanted}")


# ---- pictures --------------------------------------------------------------------------------------------------------


def read_pair(cfg, decoder: Decoder, pair: Pair) -> list[np.ndarray] | BadVideo:
    """The pictures (T, h, w, 3) of both sides, as many as cfg.frames, or why there are none.

    The rejected video may stand still, which may be why it is rejected.
    """
    sides = []
    for side, path in zip(SIDES, paths(cfg, pair)):
        try:
            clips = decoder.read(path, cfg.frames, (cfg.height, cfg.width), cfg.fps or None, still=side == "rejected")
            sides.append(clips[0].frames)
        except BadVideo as error:
            return BadVideo(f"its {side} video: {error}")
    in_loss = pixel_frames(latent_frame(pair.start), latent_frame(cfg.frames))
    if np.array_equal(sides[0][in_loss], sides[1][in_loss]):
        return BadVideo(f"its two videos show the same from picture {in_loss.start} on: they teach nothing")
    return sides

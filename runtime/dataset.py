"""A folder of captioned videos as people have them: in parts, with links, unpacked on a Mac, named on Windows."""

import collections
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from runtime.files import csv_rows, inside, nearest, read_text
from runtime.options import UserError

VIDEOS = (  # endings of the containers that runtime/decode.py reads
    *(".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".f4v", ".mkv", ".webm", ".avi", ".flv", ".wmv", ".asf"),
    *(".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".vob"),
)
COLUMNS = ("video", "caption")  # of a table
MORE = ("motion score", "split")  # that it may have
LONGEST = 2**20  # bytes of a caption's file


class Folder:
    """The files of a folder and of those below. Hidden ones are passed over, as macOS's `._x.mp4`.

    Links are followed, and each folder is read once. Nothing outside of the folder is named or read through a link,
    unless links_out. `passed` says what else was passed over.
    """

    def __init__(self, path: str | Path, links_out: bool = False, talk: bool = False):
        """talk: show a bar while it takes long. UserError if path is no folder."""
        path = Path(path)
        if not path.is_dir():
            got = "a file" if path.exists() else f"no such folder{nearest(path)}"
            raise UserError(f"{path}: expected a folder of videos, got {got}")
        self.root, self.links_out, self.passed = path.resolve(), links_out, []
        self._own = set()  # files without any link on their way
        walk = tqdm(self._walk(), str(path), unit="file", delay=2, leave=False, disable=not talk)
        self.names = sorted(walk)  # paths from root
        self._places = collections.defaultdict(list)
        for name in self.names:
            for key in {plain(os.path.basename(name)), *([] if name.isascii() else [plain(name)])}:
                self._places[key].append(name)

    def _walk(self) -> Iterator[str]:
        folders, seen = collections.deque([""]), set()
        while folders:
            here = folders.popleft()
            if (real := os.path.realpath(self.root / here)) in seen:
                continue
            seen.add(real)
            through_link = Path(real) != self.root / here
            try:
                entries = [entry for entry in os.scandir(real) if not entry.name.startswith(".")]
            except OSError as error:
                self.passed.append(f"{here or self.root.name!r}: {error.strerror}")
                continue
            for entry in entries:
                name = os.path.join(here, entry.name)
                if entry.is_dir(follow_symlinks=False):
                    folders.appendleft(name)
                elif entry.is_symlink() and os.path.isdir(entry.path):
                    folders += self._followed(name)  # after all real ones, which it may lead to
                else:
                    if not through_link and entry.is_file(follow_symlinks=False):
                        self._own.add(name)
                    yield name

    def _followed(self, name: str) -> list[str]:
        try:
            self.path(name)
        except ValueError as error:
            self.passed.append(f"{name!r}: {error}")
            return []
        return [name]

    def path(self, name: str) -> Path:
        """The path of a name in the folder, without links. ValueError if it leaves the folder, as in `inside`."""
        try:
            return inside(self.root, name)
        except ValueError:
            path = inside(self.root, name, links_out=True)  # what else is wrong with the name
            if not self.links_out:
                raise ValueError("it leaves the folder through a link; --links_out follows such links") from None
            return path

    def find(self, name: str) -> str | None:
        """The path from root of the file that a table calls `name`, or None. Links are followed as far as root goes.

        A name that is no file is looked for as another spelling of its accents has it, then by its last part in every
        folder, then as if it had been unpacked without its folder. ValueError if it is no name, or has no place in the
        folder, or several.
        """
        if not name or "\0" in name:
            raise ValueError("it names no video")
        if re.search(r"[\ud800-\udfff]", name):
            raise ValueError("its name is not UTF-8")
        if name not in self._own and not os.path.isfile(self.path(name)):
            last = plain(os.path.basename(name))
            flat = plain(name.replace("/", "_"))
            found = next(filter(None, map(self._places.get, (plain(name), last, flat))), [])
            if not found and "\\" in name:
                raise ValueError(r"no such file; in its path write / for \ and begin below the folder")
            if re.match(r"[\w+.-]+(:|,,)", name) and (not found or "/" in name):
                raise ValueError("it is an address, expected the name of a file in the folder")
            if len(found) > 1:
                raise ValueError(f"there are {len(found)} videos of that name")
            if not found:
                return None
            name = found[0]
        if name in self._own:
            return name
        path = self.path(name)
        if not os.path.isfile(path):
            return None
        return os.path.relpath(path if path.is_relative_to(self.root) else os.path.join(self.root, name), self.root)

    def table(self, path: str) -> tuple[Path, Iterable[tuple[dict[str, str], str]]]:
        """The csv of the captions, at `path` or the folder's metadata.csv, or the folder if it has none, and its rows
        with the columns `video`, `caption` and others. Beside each row stands what is wrong with it, or "".

        UserError, from the first row on, if it cannot be read.
        """
        if path:
            return Path(path), csv_rows(Path(path), COLUMNS, MORE)
        table = self.root / "metadata.csv"
        try:
            found = self.path(table.name).is_file()
        except ValueError as error:
            raise UserError(f"{table}: {error}") from None
        return (table, csv_rows(table, COLUMNS, MORE)) if found else (self.root, self._captioned())

    def check_captions(self) -> None:
        """UserError if none of its videos has a text beside it."""
        texts, videos = set(), []
        for stem, ending in map(os.path.splitext, self.names):
            if ending.lower() == ".txt":
                texts.add(plain(stem))
            elif ending.lower() in VIDEOS:
                videos.append(plain(stem))
        if videos and not texts & set(videos):
            ways = "metadata.csv in the folder, with the columns video,caption", "name.txt beside each name.mp4"
            found = f"{len(videos)} videos and not one caption"
            raise UserError(f"{self.root}: {found}; give them as {ways[0]}, or as {ways[1]}, or by --metadata any.csv")

    def _captioned(self) -> Iterator[tuple[dict[str, str], str]]:
        """A row of each video, with the text of `name.txt` beside it."""
        texts, stems = collections.defaultdict(list), collections.defaultdict(list)
        for name in self.names:
            stem, ending = os.path.splitext(name)
            (texts if ending.lower() == ".txt" else stems)[plain(stem)].append(name)
        others = collections.Counter()
        for stem, names in stems.items():
            videos = [name for name in names if name.lower().endswith(VIDEOS)]
            if not videos and stem in texts:
                others.update({os.path.splitext(name)[1].lower() for name in names})
            for name in videos:
                try:
                    yield {"video": name, "caption": self._caption(texts.get(stem, []))}, ""
                except ValueError as error:
                    yield {"video": name, "caption": ""}, f"its caption: {error}"
        self.passed += [f"{count} captioned, of ending {ending or 'none'}" for ending, count in others.items()]

    def _caption(self, names: list[str]) -> str:
        if len(names) > 1:
            raise ValueError(f"expected one file, got {' and '.join(names)}")
        path = self.path(names[0]) if names else None
        if not path or not path.is_file():
            return ""
        if path.stat().st_size > LONGEST:
            raise ValueError(f"expected at most {LONGEST} bytes, got {path.stat().st_size}")
        return read_text(path)


def judged(
    cfg, table: str | Path, rows: Iterable[tuple[dict[str, str], str]], names: Sequence[str], find: Callable
) -> Iterator[tuple[dict[str, str], object, str]]:
    """Yields of every row of a table its columns `names`, as they can be written; what find(row) gives; and why the row
    is bad, or "": for what stands beside it, or because find(row) raises ValueError.

    UserError at the first bad row, by its number, unless cfg.bad_rows is "reject".
    """
    for number, (row, wrong) in enumerate(rows, 1):
        named = {name: row.get(name, "").encode(errors="backslashreplace").decode() for name in names}
        item = None
        try:
            item = None if wrong else find(row)
        except ValueError as error:
            wrong = str(error)
        if wrong and cfg.bad_rows != "reject":
            where = f"{table} row {number} ({', '.join(repr(name[:200]) for name in named.values())})"
            raise UserError(f"{where}: {wrong}; mend it, or leave such rows out with --bad_rows reject")
        yield named, item, wrong


def say_skipped(folder: Folder) -> None:
    """Prints what was passed over, the last of it."""
    more = [f"and {len(folder.passed) - 20} more"] * (len(folder.passed) > 20)
    print("".join(f"prepare: skipped {passed}\n" for passed in folder.passed[-20:] + more), end="")


def plain(name: str) -> str:
    """A name with its accents composed: macOS may take them apart."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)

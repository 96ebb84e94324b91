"""The command line of every script: a frozen dataclass becomes options, their help, their checks, one-line errors.

    @dataclasses.dataclass(frozen=True)
    class Config:
        steps: int | None = option(least=1)  # the trailing comment is the help; None: the preset says

    if __name__ == "__main__":
        program(main, Config, __doc__)

main(Config(steps=2)) does the same in a program of one's own; it calls `resolve` first.
"""

import argparse
import contextlib
import dataclasses
import errno
import inspect
import math
import os
import re
import shutil
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm


class UserError(ValueError):
    """A mistake in what the user gave: shown as one line, without a traceback, with exit code 2."""


class Diverged(RuntimeError):
    """A run that cannot go on, though nothing is wrong with what the user gave: one line, exit code 3."""


@contextlib.contextmanager
def user_errors():
    """Within it a ValueError is the user's mistake: what reads the files that the user named raises it."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from None


def option(default=None, *, least=None, above=None, most=None, choices=(), neutral=False):
    """A field of a Config with the values that it may take.

    default None: the preset's value. least, most: inclusive limits; above: an exclusive one; choices: all there are.
    neutral: the option changes how a run goes, not what it makes, so a run may go on with another value of it.
    """
    facts = {"least": least, "above": above, "most": most, "choices": choices, "neutral": neutral}
    return dataclasses.field(default=default, metadata=facts)


def resolve(cfg, presets: dict[str, dict] | None = None):
    """cfg with every field that is None set to what its preset says, and every field checked.

    UserError for an unknown preset, for a value that its field does not take, and for NaN and infinity.
    """
    if presets is not None:
        if cfg.preset not in presets:
            raise UserError(f"--preset: expected one of {', '.join(presets)}, got {cfg.preset!r}")
        cfg = dataclasses.replace(cfg, **{k: v for k, v in presets[cfg.preset].items() if getattr(cfg, k) is None})
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{field.name}: expected a finite number, got {value}")
        if value is not None and not _fits(value, field.metadata):
            raise UserError(f"--{field.name}: expected {_wanted(field)}, got {value!r}")
    return cfg


def _fits(value, facts: typing.Mapping) -> bool:
    if facts.get("choices"):
        return value in facts["choices"]
    low, above, high = (facts.get(name) for name in ("least", "above", "most"))
    return (low is None or value >= low) and (above is None or value > above) and (high is None or value <= high)


def _wanted(field: dataclasses.Field) -> str:
    facts = field.metadata
    if facts.get("choices"):
        return " or ".join(map(str, facts["choices"]))
    words = {"least": "at least", "above": "more than", "most": "at most"}
    limits = [f"{word} {facts[name]}" for name, word in words.items() if facts.get(name) is not None]
    return " and ".join(limits)


def neutral(config: type) -> set[str]:
    """The names of the fields that do not change a result."""
    return {field.name for field in dataclasses.fields(config) if field.metadata.get("neutral")}


def field_comments(config: type) -> dict[str, str]:
    """The trailing comments of a dataclass's fields and of those that it inherits."""
    sources = "".join(inspect.getsource(c) for c in reversed(config.__mro__[:-1]))
    return dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", sources, re.M))


def parse(config: type, argv: list[str], doc: str):
    """Command line -> config. Dashes in an option's name may be written for underscores."""
    comments, hints = field_comments(config), typing.get_type_hints(config)
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(config):
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        facts = [wanted] if (wanted := _wanted(field)) else []
        facts += ["by preset"] if field.default is None and field.metadata else []
        facts += [f"default {field.default}"] if str(field.default) not in ("None", "", "False") else []
        shown = comments.get(field.name, "") + (f" ({'; '.join(facts)})" if facts else "")
        value = {"type": kind, "metavar": kind.__name__, "default": field.default}
        options = {"action": "store_true"} if kind is bool else value
        parser.add_argument(f"--{field.name}", help=shown.replace("%", "%%"), **options)
    # --save-every is --save_every; what stands after "=" is a value
    spelled = [re.sub(r"^--[^=]*", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in argv]
    return config(**vars(parser.parse_args(spelled)))


def program(main: Callable, config: type, doc: str) -> None:
    """Runs main(config from the command line) as a program: a user's mistake is one line and exit code 2."""
    where = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
    try:
        main(parse(config, sys.argv[1:], doc))
    except UserError as error:
        sys.exit(_last_line(f"{where}error: {error}", 2))
    except Diverged as error:
        sys.exit(_last_line(f"{where}error: {error}", 3))
    except KeyboardInterrupt:
        again = "run the same command again to go on from the last checkpoint"
        sys.exit(_last_line(f"{where}interrupted: {again}", 130))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.exit(_last_line(f"{where}error: {_disk_full(error)}", 2))
    finally:
        if dist.is_initialized() and sys.exc_info()[0] is None:
            dist.destroy_process_group()


def _disk_full(error: OSError) -> str:
    again = "free some space and run the same command again, what was finished is kept"
    if not error.filename:  # a write to a file that was open: it may be on any disk
        return f"disk full; {again}"
    folder = Path(error.filename).absolute()
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 2**20
    return f"disk full writing {error.filename}: {free:.1f} MiB free; {again}"


def _last_line(line: str, code: int) -> int:
    for bar in list(getattr(tqdm, "_instances", ())):  # so that the line stands alone, and last
        with contextlib.suppress(Exception):
            bar.close()
    print(line, file=sys.stderr, flush=True)
    return code

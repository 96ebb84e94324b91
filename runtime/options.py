"""The command line of every script: a frozen dataclass becomes options, their help, their checks, one-line errors. And
how a script ends when it is told to.

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
import faulthandler
import inspect
import locale
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import types
import typing
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from runtime import roll


class UserError(ValueError):
    """A mistake in what the user gave: shown as one line, without a traceback, with exit code 2."""


class Diverged(RuntimeError):
    """A run that cannot go on though nothing is wrong with what the user gave: one line, exit code 3."""


@contextlib.contextmanager
def user_errors():
    """Within it a ValueError is the user's mistake: what reads the files that the user named raises it."""
    try:
        yield
    except (ValueError, RecursionError) as error:
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

    UserError for an unknown preset, for a value that its field does not take, for NaN and infinity, and for text that
    is not UTF-8.
    """
    if presets is not None:
        if cfg.preset not in presets:
            raise UserError(f"--preset: expected one of {', '.join(presets)}, got {cfg.preset!r}")
        cfg = dataclasses.replace(cfg, **{k: v for k, v in presets[cfg.preset].items() if getattr(cfg, k) is None})
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{field.name}: expected a finite number, got {value}")
        if isinstance(value, str) and re.search(r"[\ud800-\udfff]", value):  # bytes of the command line
            raise UserError(f"--{field.name}: expected UTF-8 text, got {value!r}")
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


# ---- how a script ends ----------------------------------------------------------------------------------------------

SIGNALS = (signal.SIGTERM, signal.SIGINT)  # a scheduler's, torchrun's and kill's; Ctrl-C
SAME = 5.0  # seconds in which torchrun and who told it, a scheduler for one, may both send what is one signal


class Interrupted(KeyboardInterrupt):
    """A signal told this process to end. args: its number. One line, exit code 128 + number."""


class _Told:
    """What signals told this process so far."""

    signal = 0  # the first one, or none
    patient = False  # whether somebody asks for it, and ends in good order
    cut = False  # whether it was interrupted at once
    ending = False  # whether the process is ending for another reason


def asked_to_stop() -> int:
    """The number of the signal that told this process to end, or 0."""
    return _Told.signal


@contextlib.contextmanager
def patient():
    """Within it the first SIGTERM or Ctrl-C interrupts nothing: who is in it reads `asked_to_stop`, saves, and raises
    Interrupted. The second one ends the process at once. Who leaves it without having asked goes on to the end.
    """
    _Told.patient = True
    try:
        yield
    finally:
        _Told.patient = False


def _answer(number: int, _) -> None:
    """The handler. Python calls it in the main thread, once that is back from C++: from a collective, for one."""
    first, _Told.signal = not _Told.signal, _Told.signal or number
    if first and not _Told.patient and not _Told.ending:
        _Told.cut = True
        raise Interrupted(number)


def _watch(pipe: int) -> None:
    """Reads the signals as they come, whatever the main thread is in, and ends the process at the second one.

    A call that holds Python's lock and never returns holds up this thread, too: against that only SIGKILL helps.
    """
    first = 0.0
    while number := os.read(pipe, 1):
        number, now = number[0], time.monotonic()
        if not first:
            first = now
            if _Told.patient and _main_process():
                name, again = signal.Signals(number).name, "once more to leave at once"
                os.write(2, f"\n{name}: saving at the end of this step, then leaving; {again}\n".encode())
        elif now - first > SAME * dist.is_torchelastic_launched():
            os._exit(128 + number)
    os.close(pipe)


@contextlib.contextmanager
def _signals():
    """Within it SIGTERM and Ctrl-C are answered as `Interrupted` and `patient` say, but for what nohup or a shell's &
    has switched off.
    """
    _Told.signal, _Told.ending, _Told.cut = 0, False, False
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = {n: signal.signal(n, _answer) for n in SIGNALS if signal.getsignal(n) != signal.SIG_IGN}
    wakeup = signal.set_wakeup_fd(write)
    threading.Thread(target=_watch, args=(read,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(write)  # ends the thread


def _main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def program(main: Callable, config: type, doc: str) -> None:
    """Runs main(config from the command line) as a program, which ends in one line where something is wrong.

    Exit codes: 2 a user's mistake or a disk's, 3 a run that diverged, 4 another process that ended or hangs, 128 + the
    signal's number. Of these torchrun --max-restarts retries 4 alone, and crashes.
    """
    _in_utf8()
    if not faulthandler.is_enabled():
        faulthandler.enable()  # a mapped file that was cut short ends a process by SIGBUS, without a word
    with _signals():
        try:
            main(parse(config, sys.argv[1:], doc))
        except BaseException as error:
            _Told.ending = True
            line, code = _ending(error)
            if not code:
                raise
            _leave(line, code)
    if dist.is_initialized():
        dist.destroy_process_group()


def _in_utf8() -> None:
    """Starts the program again in Python's UTF-8 mode where the locale has another encoding: what is read and written,
    names of files among it, is UTF-8 everywhere. After it no print fails.
    """
    if locale.getpreferredencoding(False).lower() not in ("utf-8", "utf8"):
        os.environ["PYTHONUTF8"] = "1"  # for the processes that it starts, too
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")


def _ending(error: BaseException) -> tuple[str, int]:
    """The last line and the exit code; 0 for an error that deserves its traceback."""
    if isinstance(error, RuntimeError):
        error = roll.explained(error) or error
    if _Told.cut and isinstance(error, Interrupted) and dist.is_initialized():
        error = roll.told() or error
    for kind, code in ((UserError, 2), (Diverged, 3), (roll.Lost, 4)):
        if isinstance(error, kind):
            return f"error: {error}", code
    if isinstance(error, KeyboardInterrupt):
        again = "interrupted: run the same command again to go on from where it was"
        number = error.args[0] if isinstance(error, Interrupted) else signal.SIGINT
        return again if _main_process() else "", 128 + number
    if isinstance(error, SystemExit) and isinstance(error.code, int):  # argparse has said what is wrong
        return "", error.code
    if isinstance(error, OSError) and (text := _disk_error(error)):
        return f"error: {text}", 2
    return "", 0


def _leave(line: str, code: int) -> None:
    """Ends the process."""
    for bar in list(getattr(tqdm, "_instances", ())):  # so that the line stands alone, and last
        with contextlib.suppress(Exception):
            bar.close()
    if line:
        where = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
        sys.stderr.write(f"{where}{line}\n")  # at once: print would let another process come before the line's end
    if code != 4:
        _no_restart()
    if dist.is_initialized():  # Python's own end would wait for collectives that the others never join
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _no_restart() -> None:
    """Ends torchrun if it would start all again, as --max-restarts tells it to: it has no exit code for that."""
    count, most = (int(os.environ.get(f"TORCHELASTIC_{name}", 0)) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    if dist.is_torchelastic_launched() and count < most and os.getppid() == _PARENT:
        os.kill(_PARENT, signal.SIGTERM)


_PARENT = os.getppid()  # torchrun, if that started this process


def _disk_error(error: OSError) -> str:
    """What is wrong with the file that the error names, or with the disk. Empty if it is neither."""
    name = error.filename2 or error.filename
    again = "run the same command again, what was finished is kept"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        named = f" writing {name}{_space(error, name)}" if name else ""  # without: a file that was open, on any disk
        return f"disk full{named}; free some space and {again}"
    if not isinstance(name, (str, os.PathLike)):
        return ""
    reason = f"{error.strerror or error}".lower()
    return f"{name}: {reason}; see that its folder is there and can be read and written, then {again}"


def _space(error: OSError, name: str) -> str:
    """The space that a file needs, and what is left there, in words, if they are known."""
    facts = [f"{error.needed / 2**20:.1f} MiB needed"] if hasattr(error, "needed") else []
    with contextlib.suppress(OSError):
        facts.append(f"{shutil.disk_usage(Path(name).absolute().parent).free / 2**20:.1f} MiB free")
    return f": {', '.join(facts)}" if facts else ""

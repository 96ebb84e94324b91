"""The command line of every script: a frozen dataclass becomes options, their help, their checks, one-line errors. And
how a script ends when it is told to.

    @dataclasses.dataclass(frozen=True)
    class Config:
        steps: int | None = option(least=1)  # the trailing comment is the help; None: the preset says

    if __name__ == "__main__":
        program(main, Config, __doc__, PRESETS)

main(Config(steps=2)) does the same in a program of one's own; it calls `resolve` first.
"""

import contextlib
import dataclasses
import difflib
import errno
import faulthandler
import inspect
import locale
import math
import operator
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
import time
import typing
from collections.abc import Callable, Iterable
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


def option(default=None, *, least=None, above=None, most=None, choices=(), empty=False, neutral=False):
    """A field of a Config with the values that it may take: --help, the check and the error tell them.

    default None: the preset's value. least, most: inclusive limits; above: an exclusive one; a limit may be the name of
    another option, which binds a value that was given, not a preset's own. choices: all there are. empty: text may be
    empty though its default is not.
    neutral: the option changes how a run goes, not what it makes, so a run may go on with another value of it.
    """
    facts = {"least": least, "above": above, "most": most, "choices": choices, "empty": empty, "neutral": neutral}
    return dataclasses.field(default=default, metadata=facts)


SEED = dict(least=0, most=2**32 - 1)  # of option: what every generator of random numbers takes


def resolve(cfg, presets: dict[str, dict] | None = None):
    """cfg with every field that is None set to what its preset says, and every field checked.

    UserError for an unknown preset, for a value that its field does not take, for NaN and infinity, and for text that
    is not UTF-8, is blank, or is empty where the field has a default, as a shell's unset variable leaves it.
    """
    given = cfg
    if presets is not None:
        if cfg.preset not in presets:
            raise UserError(f"--preset: expected {_one_of(presets)}, got {cfg.preset!r}")
        cfg = dataclasses.replace(cfg, **{k: v for k, v in presets[cfg.preset].items() if getattr(cfg, k) is None})
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{field.name}: expected a finite number, got {value}")
        if isinstance(value, str) and re.search(r"[\ud800-\udfff]", value):  # bytes of the command line
            raise UserError(f"--{field.name}: expected UTF-8 text, got {value!r}")
        if isinstance(value, str) and value and not value.strip():
            raise UserError(f"--{field.name}: expected text, got {value!r}, which is blank; to leave it empty give ''")
        if value == "" and field.default and not field.metadata.get("empty"):
            raise UserError(f"--{field.name}: expected a value, got ''")
        if value is not None and not _fits(value, field):
            raise UserError(f"--{field.name}: expected {_wanted(field)}, got {value!r}")
    for field in dataclasses.fields(cfg):  # then the limits that are other options
        value = getattr(given, field.name)
        if value is not None and not _fits(value, field, cfg):
            raise UserError(f"--{field.name}: expected {_wanted(field, cfg)}, got {value!r}")
    return cfg


LIMITS = {"least": ("at least", operator.ge), "above": ("more than", operator.gt), "most": ("at most", operator.le)}


def _limits(field: dataclasses.Field, cfg=None):
    """The name of each limit of a field, its value, and its words. cfg: tells those that are another option's value."""
    for name in LIMITS:
        limit = field.metadata.get(name)
        if isinstance(limit, str):
            value = getattr(cfg, limit, None)
            yield name, value, f"--{limit}" + (f" ({_shown(value)})" if value is not None else "")
        elif limit is not None:
            yield name, limit, _shown(limit)


def _fits(value, field: dataclasses.Field, cfg=None) -> bool:
    if choices := field.metadata.get("choices"):
        return value in choices
    return all(LIMITS[name][1](value, limit) for name, limit, _ in _limits(field, cfg) if limit is not None)


def _wanted(field: dataclasses.Field, cfg=None) -> str:
    """The values that a field takes, in words; empty: every value."""
    if choices := field.metadata.get("choices"):
        return _one_of(choices)
    limits = {name: words for name, _, words in _limits(field, cfg)}
    if limits.keys() == {"least", "most"}:
        return f"from {limits['least']} to {limits['most']}"
    return " and ".join(f"{LIMITS[name][0]} {words}" for name, words in limits.items())


def _one_of(choices: Iterable[str]) -> str:
    """a, b or c"""
    *first, last = choices
    return f"{', '.join(first)} or {last}" if first else last


def _shown(value) -> str:
    """A default, a preset's value or a limit, as a line of --help has it."""
    if isinstance(value, float):
        return f"{value:.12g}"
    return repr(value) if value == "" else f"{value}" if len(f"{value}") <= 24 else f"{value}"[:8] + "…"


def neutral(config: type) -> set[str]:
    """The names of the fields that do not change a result."""
    return {field.name for field in dataclasses.fields(config) if field.metadata.get("neutral")}


def listed(text: str, name: str) -> list[str]:
    """The items of an option's list separated by commas, without the blanks around them; of empty text none.

    UserError for an empty item: one that a shell's unset variable has left, for one.
    """
    items = [item.strip() for item in text.split(",")] if text else []
    if not all(items):
        raise UserError(f"--{name}: expected a list separated by commas, got {text!r}, where an item is empty")
    return items


# ---- the command line ------------------------------------------------------------------------------------------------


def field_comments(config: type) -> dict[str, str]:
    """The trailing comments of a dataclass's fields and of those that it inherits."""
    sources = "".join(inspect.getsource(c) for c in reversed(config.__mro__[:-1]))
    return dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", sources, re.M))


def _kinds(config: type) -> dict[str, type]:
    """What the value of each field is: bool, int, float or str."""
    hints = typing.get_type_hints(config)
    optional = {name: [k for k in typing.get_args(hint) if k is not type(None)] for name, hint in hints.items()}
    return {name: (optional[name] or [hint])[0] for name, hint in hints.items()}


def parse(config: type, argv: list[str], doc: str, presets: dict[str, dict] | None = None):
    """Command line -> config, checked as `resolve` does it without the presets, which --help alone tells.

    Dashes in an option's name may be written for underscores. Of an option that is given twice the last one counts.
    SystemExit after --help; UserError for what is no option, and for a value that its option does not take.
    """
    if {"-h", "--help"} & {*argv}:
        _tell(_help(config, doc, presets or {}))
        sys.exit()
    fields, kinds, given = {field.name: field for field in dataclasses.fields(config)}, _kinds(config), {}
    words, flag = iter(argv), ""
    for word in words:
        spelled, equals, value = word.partition("=")  # what stands after "=" is a value, whatever it begins with
        name = spelled.removeprefix("--").replace("-", "_")
        if flag and not word.startswith("-"):
            raise UserError(f"--{flag}: expected no value, got {word[:80]!r}")
        if name not in fields or spelled == name:
            raise UserError(_no_option(word, spelled, list(fields)))
        flag = name if kinds[name] is bool else ""
        if flag:
            if equals:
                raise UserError(f"--{name}: expected no value, got {value[:80]!r}")
            given[name] = True
            continue
        value = value if equals else next(words, None)
        try:
            if value is None or value.startswith("--") and not equals:
                raise ValueError
            given[name] = kinds[name](value)
        except ValueError:
            kind = {int: "a whole number", float: "a number", str: "a value"}[kinds[name]]
            wanted = ", ".join(filter(None, (kind, _wanted(fields[name]))))
            got = "nothing" if value is None or value.startswith("--") and not equals else repr(value[:80])
            raise UserError(f"--{name}: expected {wanted}, got {got}") from None
    return resolve(config(**given))


def _tell(text: str) -> None:
    """Prints text, as far as somebody reads it: `--help | head` is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries again as it ends


def arguments(config: type, doc: str, presets: dict[str, dict] | None = None):
    """`parse` of the command line, for what is no `program`: a mistake ends it in one line, with exit code 2."""
    try:
        return parse(config, sys.argv[1:], doc, presets)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _no_option(word: str, spelled: str, names: list[str]) -> str:
    """What is wrong with a word that stands in an option's place."""
    if not spelled.startswith(("-", "–", "—")):
        return f"{word[:80]!r}: expected an option; quote a value that has blanks (--help lists all options)"
    near = difflib.get_close_matches(spelled.strip("-–—").replace("-", "_"), [*names, "help"], 1)
    return f"{spelled[:80]}: no such option{f'; did you mean --{near[0]}?' if near else ''} (--help lists all)"


def _help(config: type, doc: str, presets: dict[str, dict]) -> str:
    """What --help prints: the program's docstring, and each option with its values, what presets set, its default."""
    width = min(shutil.get_terminal_size().columns, 120)
    comments, kinds, lines = field_comments(config), _kinds(config), [*_wrapped(doc.strip(), width), "", "options:"]
    for field in dataclasses.fields(config):
        comment = comments.get(field.name, "")
        facts = [] if field.metadata.get("choices") else [_wanted(field)]
        facts += [", ".join(f"{k} {_shown(v[field.name])}" for k, v in presets.items() if field.name in v)]
        facts += [f"default {_shown(field.default)}"] if str(field.default) not in ("None", "", "False") else []
        told = "; ".join(filter(None, facts))
        head = f"  --{field.name} {_metavar(field, kinds[field.name], comment)}"
        body = textwrap.wrap(comment + (f" ({told})" if told else ""), width - 24) or [""]
        lines += [f"{head:24}{body.pop(0)}"] if len(head) < 24 else [head]
        lines += [" " * 24 + line for line in body]
    return "\n".join(line.rstrip() for line in lines)


def _metavar(field: dataclasses.Field, kind: type, comment: str) -> str:
    if choices := field.metadata.get("choices"):
        return "|".join(choices)
    path = "PATH" if re.search(r"\b(folders?|files?|csv|shards of)\b", comment) else "TEXT"
    return {bool: "", int: "N", float: "X", str: path}[kind]


def _wrapped(doc: str, width: int) -> list[str]:
    """The lines of a docstring, its prose wrapped; a line that begins with a word and two blanks is an entry of a list,
    and what is indented stands as it is.
    """
    lines = []
    for paragraph in doc.split("\n\n"):
        if paragraph.startswith(" "):
            lines += [*paragraph.splitlines(), ""]
            continue
        for entry in re.split(r"\n(?=\S+  )", paragraph):
            label = re.match(r"\S+  +", entry)
            indent = " " * len(label[0]) if label else ""
            text = (label[0] if label else "") + " ".join(entry[len(indent) :].split())
            lines += textwrap.wrap(text, width, subsequent_indent=indent)
        lines.append("")
    return lines[:-1]


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


def program(main: Callable, config: type, doc: str, presets: dict[str, dict] | None = None) -> None:
    """Runs main(config from the command line) as a program, which ends in one line where something is wrong.

    presets: what --help tells beside each option that they set.

    Exit codes: 2 a user's mistake or a disk's, 3 a run that diverged, 4 another process that ended or hangs, 128 + the
    signal's number. Of these torchrun --max-restarts retries 4 alone, and crashes.
    """
    _in_utf8()
    if not faulthandler.is_enabled():
        faulthandler.enable()  # a mapped file that was cut short ends a process by SIGBUS, without a word
    with _signals():
        try:
            main(parse(config, sys.argv[1:], doc, presets))
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
    if isinstance(error, SystemExit) and isinstance(error.code, int):  # after --help, for one
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

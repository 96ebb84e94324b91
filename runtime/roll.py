"""How the processes that torchrun started wait for each other, and name the one that is missing.

Each counts its meetings in the store that torchrun gives them, so who is stopped or hangs is told by its count. Who
ended is told by its connections, which close. The first to find it out writes it in the store, and all say the same.
"""

import collections
import contextlib
import datetime
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from tqdm import tqdm

GRACE = 5.0  # seconds for an answer of the store, and between the processes' sights of one failure
FIRST_WORD = 60.0  # seconds of waiting after which it is said for whom, and again after twice as long each time
PATIENCE = datetime.timedelta(days=30)
_WATCH = 1  # tag of a message that nobody sends: to wait for it fails when its sender has ended


class Lost(RuntimeError):
    """A process of the group ended, was stopped or hangs: shown as one line, with exit code 4."""


class Broken(RuntimeError):
    """Waiting for the others failed. args: what for, and how; `explained` makes it a Lost that names them."""


_AGAIN = "see what it said, then run the same command again to go on"
_store: dist.Store | None = None
_everybody: dist.ProcessGroup | None = None
_watches: dict[int, dist.Work] = {}
_met: collections.Counter = collections.Counter()  # meeting -> how often this process came


def start(backend: str, rank: int, size: int, seconds: float) -> None:
    """Joins the process group. Its collectives fail after `seconds`; those of this module's own group, gloo, never."""
    global _store, _everybody
    limit = datetime.timedelta(seconds=seconds)
    store, _, _ = next(dist.rendezvous("env://", timeout=limit))
    store = _of_this_start(store, rank, size, seconds)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    _everybody = dist.new_group(backend="gloo", timeout=PATIENCE)
    _store = dist.PrefixStore("roll", store)
    for other in set(range(size)) - {rank}:
        _watches[other] = dist.irecv(torch.zeros(1), group=_everybody, group_src=other, tag=_WATCH)


def _of_this_start(store: dist.Store, rank: int, size: int, seconds: float) -> dist.Store:
    """The part of the store that is this start's alone. Rank 0 names it, and tells each process that has come.

    After a restart torchrun's store still holds what those who died wrote, their addresses for one; and on several
    nodes nothing that torchrun says is the same for all and new. (TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is the other way
    out.)
    """
    name, late, end = uuid.uuid4().hex, set(range(1, size)), time.monotonic() + seconds
    if rank:
        store.set(f"hello {rank}", name)
        while not store.check([f"welcome {name}"]):  # store.get would wait, too, but answer no signal
            if time.monotonic() > end:
                raise Lost(f"waited {seconds:g} s for rank 0 to start")
            time.sleep(0.01)
        name = store.get(f"welcome {name}").decode()
        store.set(f"here {name} {rank}", "")
        return dist.PrefixStore(name, store)
    while late:
        for other in late:
            if store.check([f"hello {other}"]):  # it may be an earlier start's, which hears nothing any more
                store.set(f"welcome {store.get(f'hello {other}').decode()}", name)
        late = {other for other in late if not store.check([f"here {name} {other}"])}
        if time.monotonic() > end:
            raise Lost(f"waited {seconds:g} s for {_named(sorted(late))} to start")
        time.sleep(0.01)
    return dist.PrefixStore(name, store)


def gather(
    where: str, seconds: float = float("inf"), meanwhile: Callable[[], None] = lambda: None,
    group: dist.ProcessGroup | None = None, ranks: Sequence[int] | None = None,
) -> None:  # fmt: skip
    """Waits until all processes, or the `ranks` of `group`, are here, and calls `meanwhile` twice a second.

    where: what they meet for, in words. Says after 1, 2, 4… minutes who is missing. Lost after `seconds`; Broken at
    once if one of them has ended.
    """
    if _store is None:  # a program of one's own has started the processes
        dist.barrier(group=group)
        return
    ranks, meeting = (ranks, "node") if group else (range(dist.get_world_size()), "all")
    began, tell, waited = time.monotonic(), FIRST_WORD, 0.0
    try:
        _answer(meeting)
        work = dist.barrier(group=group or _everybody, async_op=True)
        while not _completed(work, min(0.5, seconds)) and waited < seconds:
            meanwhile()
            waited = time.monotonic() - began
            if waited > tell:
                _tell(f"{where}: waiting since {waited:.0f} s", missing(meeting, ranks), ranks)
                tell *= 2
        if work.is_completed():
            work.wait()  # raises what went wrong
            return
    except (RuntimeError, TimeoutError) as error:
        raise Broken(where, str(error)) from None
    late = _named(missing(meeting, ranks), "another process")
    hint = "stopped, stuck or slow; see what it does, or give --step_timeout more seconds"
    raise _verdict(f"{where}: waited {seconds:g} s for {late}, {hint}")


def _completed(work: dist.Work, seconds: float) -> bool:
    """Whether it is done, or has failed, within `seconds`."""
    with contextlib.suppress(RuntimeError):  # they are over
        work.wait(datetime.timedelta(seconds=seconds))
    return work.is_completed()


def explained(error: RuntimeError) -> Lost | None:
    """What a collective's failure says of the other processes; None for another error: gloo's are RuntimeErrors, too.

    It takes up to 20 s. All is lost: it closes the connections to the others.
    """
    collective = isinstance(error, (Broken, dist.DistError)) or "/gloo/" in str(error) and not isinstance(error, Lost)
    if not collective or _store is None:
        return None
    where, reason = error.args if isinstance(error, Broken) else ("a step", str(error))
    if ended := _ended():
        return _verdict(f"{where}: {_named(ended)} ended; {_AGAIN}")
    with contextlib.suppress(RuntimeError, TimeoutError):  # those who still run meet the same failure
        _answer("failure")
        end = time.monotonic() + GRACE
        while missing("failure") and time.monotonic() < end:
            time.sleep(0.1)
    how = reason.splitlines()[0] if reason else "no answer from the store of torchrun, or of rank 0"
    return _verdict(f"{where}: {_named(missing('failure'), 'another process')} ended or hangs ({how}); {_AGAIN}")


def told() -> Lost | None:
    """What a signal to end means: torchrun sends it, too, once another process ended. Then it is that one's fault.

    All is lost: it closes the connections to the others.
    """
    with contextlib.suppress(RuntimeError, TimeoutError):
        _answer("told")  # first, so that nobody who was told the same takes this process for the one at fault
    gone = sorted(set(_ended()) & set(missing("told")))
    return _verdict(f"{_named(gone)} ended; {_AGAIN}") if gone else None


def missing(meeting: str, ranks: Sequence[int] | None = None) -> list[int]:
    """The processes, of `ranks`, that came to fewer of these meetings than this one. Empty if the store is gone."""
    ranks, found = range(dist.get_world_size()) if ranks is None else ranks, []

    def look() -> None:
        found.extend(rank for rank in ranks if _store.add(f"{meeting}/{rank}", 0) < _met[meeting])

    with contextlib.suppress(RuntimeError, TimeoutError):
        _soon(look)
    return found


def _answer(meeting: str) -> None:
    _met[meeting] += 1
    _soon(lambda: _store.add(f"{meeting}/{dist.get_rank()}", 1))


def _ended() -> list[int]:
    """The processes whose connections are closed. To be called once all is lost: gloo closes the others by it."""
    found = []
    for rank, work in _watches.items():
        try:
            work.wait(datetime.timedelta(seconds=0.2))
        except RuntimeError as error:
            if "timed out" not in str(error).lower() and "timeout" not in str(error).lower():
                found.append(rank)
    return found


def _verdict(text: str) -> Lost:
    """Lost, with the text of the first process that found a fault: what others see may be the end of that one."""
    first = [text]
    with contextlib.suppress(RuntimeError, TimeoutError):
        _soon(lambda: first.append(_store.compare_set("verdict", "", text).decode()))
    return Lost(first[-1])


def _named(ranks: Sequence[int], unknown: str = "") -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" if ranks else unknown


def _tell(what: str, late: Sequence[int], ranks: Sequence[int]) -> None:
    """One line, by the first of those who wait."""
    if late and dist.get_rank() == min(set(ranks) - set(late)):
        tqdm.write(f"{what} for {_named(late)}", file=sys.stderr)


def _soon(call: Callable[[], object]) -> None:
    """Calls it. TimeoutError if that takes longer than GRACE: the store waits for ever where its holder is stopped."""
    failed = []

    def attempt() -> None:
        try:
            call()
        except RuntimeError as error:
            failed.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(GRACE)
    if thread.is_alive():
        raise TimeoutError
    if failed:
        raise failed[0]

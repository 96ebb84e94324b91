"""What a GPU says of this code: checks first, then times. Nothing is downloaded, weights are random.

    python bench/gpu.py [kernels] [1.3b] [14b]     each at most 8 minutes of one H100 or A800; none named: all three
    python bench/gpu.py 1.3b --sections split,eager --seconds 90     these alone; the record of the others stays
    python bench/gpu.py readme                     writes README's table from docs/gpu.json

Each section runs in a process of its own, as an illegal access to memory spoils its process, and has a time limit.
Every line is printed, and the JSON file written anew, as soon as it is known: a run that is cut still tells. Exit code
1 says that a check failed or a section did not come to its end.

It needs torch, triton, einops, safetensors, numpy, tqdm and tokenizers; beside diffusers and PEFT where they are
installed. `--toy` runs all of it at toy sizes, on the CPU where there is no GPU.
"""

import argparse
import collections
import contextlib
import html
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a script, Python looks in bench/ alone

import torch

from runtime.files import commit, read_json, write_json
from runtime.group import start_group
from runtime.options import UserError

try:
    import triton
except ImportError:  # no Triton for this platform
    triton = None

ROOT = Path(__file__).resolve().parent.parent
MODULES = {"kernels": "bench.gpu_kernels", "1.3b": "bench.gpu_model", "14b": "bench.gpu_model"}
ELSEWHERE = {"peers": "bench.step"}  # it imports diffusers, which takes seconds
SECTIONS = {  # suite -> section -> its seconds at most; the most important first
    "kernels": dict(
        card=30, cases=120, twice=40, graph=40, large=60, block=100, speed=150, inductor=200, options=90
    ),
    "1.3b": dict(
        card=30, step_zero=60, small_term=60, resume=60, kernels=60, split=60, eager=60, compiled=150, attention=40,
        continuation=60, decode=40, peers=90,
    ),
    "14b": dict(card=30, large_forward=90, large_pair=150, shard=150),
}  # fmt: skip
BUDGET = 470  # seconds of a suite, unless --seconds says otherwise
MARK, DONE = "row ", "no more rows"  # what a section's process prints before each row, and after the last
SHOWN = "in README"  # a row that has it is a line of README's table
BEGIN, END = "<!-- written by python bench/gpu.py readme -->", "<!-- end of what it wrote -->"


# ---- a section, in a process of its own ------------------------------------------------------------------------------


def child(module: str, suite: str, section: str, toy: bool) -> None:
    """Runs the section's function, (device, sizes) -> rows, and prints each row: `name`, and what is known of it."""
    found = importlib.import_module(module)
    torch.manual_seed(0)
    device = start_group().device  # as a stage does, with what it asks of bfloat16 products
    for row in getattr(found, section)(device, (found.TOY if toy else found.SIZES)[suite]):
        print(MARK + json.dumps(row), flush=True)
    print(DONE, flush=True)


def run_section(suite: str, section: str, limit: float, toy: bool, found: Callable[[dict], None]) -> str:
    """Starts the process, gives each row to `found` as it comes, and returns how the process ended."""
    module = ELSEWHERE.get(section, MODULES[suite])
    code = f"from bench.gpu import child; child({module!r}, {suite!r}, {section!r}, {toy})"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    cut = threading.Event()
    timer = threading.Timer(limit, lambda: (cut.set(), kill(process)))
    timer.start()
    said: collections.deque[str] = collections.deque(maxlen=30)
    try:
        for line in process.stdout:
            if line.strip() == DONE:
                return "done"
            if line.startswith(MARK):
                found(json.loads(line[len(MARK) :]))
            elif line.strip():
                said.append(line.rstrip())
        code = process.wait()
    finally:
        timer.cancel()
        kill(process)
    if cut.is_set():
        return f"cut after {limit:.0f} s"
    print("\n".join(said), file=sys.stderr)
    return f"exit code {code}: {said[-1] if said else 'it said nothing'}"


def kill(process: subprocess.Popen) -> None:
    """Ends a section's process and the compilers that it started, which may outlive it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# ---- a suite ---------------------------------------------------------------------------------------------------------


def text(row: dict) -> str:
    """A row in words: its name, then each number with what it counts, and of each check whether it holds."""

    def value(key, a) -> str:
        if isinstance(a, bool):
            return f"{key}: {'yes' if a else 'NO'}"
        return f"{a:.4g} {key}" if isinstance(a, int | float) else f"{key} {a}"

    return f"{row['name']}: " + ", ".join(value(key, a) for key, a in row.items() if key not in ("name", SHOWN))


def failed(row: dict) -> bool:
    """Whether it is a check that did not hold: a value that is false."""
    return any(a is False for a in row.values())


def read(file: Path) -> dict:
    """What is known: suite -> section -> commit, on, toy, ended, seconds, rows. UserError for a damaged file."""
    return read_json(file) if file.is_file() else {}


def here() -> str:
    """The card, or the CPU, and the versions of what computes."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{card}, torch {torch.__version__}, triton {triton.__version__ if triton else 'none'}"


def run_suite(suite: str, file: Path, toy: bool, sections: Collection[str] = (), budget: float = BUDGET) -> bool:
    """Runs the sections and writes what they say under the suite's name. Returns whether all came to a good end.

    sections: those to run, and the record of the others stays; none named: all, and nothing of the suite's record
    stays. One that no time is left for keeps its old record.
    """
    known, end = read(file), time.monotonic() + budget
    record = known[suite] = known.get(suite, {}) if sections else {}
    made, good = {"commit": commit(), "on": here(), "toy": toy}, True
    for section, most in SECTIONS[suite].items():
        if sections and section not in sections:
            continue
        print(f"{suite}, {section}", flush=True)
        start = time.monotonic()
        limit = min(most, end - start)
        if limit < 5:
            good = False
            record.setdefault(section, {**made, "ended": "not started: no time left", "seconds": 0, "rows": []})
            write_json(file, known)
            print("  not started: no time left", flush=True)
            continue
        entry = record[section] = {**made, "ended": "cut", "rows": []}

        def found(row: dict, entry=entry) -> None:
            entry["rows"].append(row)
            write_json(file, known)
            print(f"  {text(row)}", flush=True)

        entry["ended"] = run_section(suite, section, limit, toy, found)
        entry["seconds"] = round(time.monotonic() - start, 1)
        write_json(file, known)
        print(f"  {entry['ended']}, {entry['seconds']} s", flush=True)
        good &= entry["ended"] == "done" and not any(map(failed, entry["rows"]))
    return good


# ---- README's table --------------------------------------------------------------------------------------------------


def summary(suite: str, record: dict | None) -> Iterator[list[str]]:
    """Lines of the table: commits, cards, checks, sections without a good end or a run; then the rows to show."""
    if not record:
        yield [f"`{suite}`", "not run yet"]
        return
    entries = {name: record[name] for name in SECTIONS[suite] if name in record}
    rows = [row for entry in entries.values() for row in entry["rows"]]
    checks = [a for row in rows for a in row.values() if isinstance(a, bool)]
    commits = {}
    for e in entries.values():
        commits.setdefault(" at toy sizes" * e["toy"] + f" on {e['on']}", {})[e["commit"]] = True
    made = "; ".join(f"commit {', '.join(found)}{how}" for how, found in commits.items())
    ends = {name: e["ended"] for name, e in entries.items() if e["ended"] != "done"}
    ends |= {name: "not run yet" for name in SECTIONS[suite] if name not in record}
    said = [f"{sum(checks)} of {len(checks)} checks hold"] if checks else []
    yield [f"`{suite}`", f"{made}: " + "; ".join(said + [f"{name}: {end}" for name, end in ends.items()])]
    yield from (["", text(row)] for row in rows if SHOWN in row)


def table(known: dict) -> str:
    lines = [["`python bench/gpu.py`", "what it said"], ["---", "---"]]
    for suite in SECTIONS:
        lines += summary(suite, known.get(suite))
    # what a process said may hold markup, or a cell's end
    cells = ([html.escape(cell, quote=False).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def with_table(page: str, known: dict) -> str:
    """The page with the table between its two marks written anew."""
    return re.sub(f"(?<={re.escape(BEGIN)}\n).*?(?={re.escape(END)})", lambda _: table(known) + "\n", page, flags=re.S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="kernels | 1.3b | 14b | readme", help="what to do")
    parser.add_argument("--sections", default="", metavar="a,b", help="these alone; the record of the others stays")
    parser.add_argument("--seconds", type=float, default=BUDGET, help=f"a suite's at most (default {BUDGET})")
    parser.add_argument("--toy", action="store_true", help="toy sizes, to see that everything runs")
    parser.add_argument("--out", type=Path, help="JSON file to write: docs/gpu.json, or out/gpu.json with --toy")
    given = parser.parse_args()
    figures = ROOT / "docs/gpu.json"
    if given.suites == ["readme"]:
        page = ROOT / "README.md"
        page.write_text(with_table(page.read_text(encoding="utf-8"), read(figures)), encoding="utf-8")
        return
    if unknown := set(given.suites) - SECTIONS.keys():
        parser.error(f"expected {', '.join(SECTIONS)}, or readme alone, got {' '.join(sorted(unknown))}")
    suites, sections = given.suites or list(SECTIONS), [name for name in given.sections.split(",") if name]
    names = dict.fromkeys(name for suite in suites for name in SECTIONS[suite])
    if unknown := set(sections) - names.keys():
        parser.error(f"--sections: expected some of {', '.join(names)}, got {' '.join(sorted(unknown))}")
    if not given.toy and not torch.cuda.is_available():
        parser.error("expected a CUDA GPU, got none that PyTorch can use; --toy runs on the CPU")
    file = given.out or (ROOT / "out/gpu.json" if given.toy else figures)
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        good = [run_suite(suite, file, given.toy, sections, given.seconds) for suite in suites]
    except UserError as error:
        parser.error(str(error))
    sys.exit(not all(good))


if __name__ == "__main__":
    main()

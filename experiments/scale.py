"""The tables of docs/scale.md: memory, bytes and hours of every stage, on one node of 8 GPUs and on four.

    python -m experiments.scale            prints them
    python -m experiments.scale --write    writes them into docs/scale.md

Counted by experiments/cost.py on tensors without values; seconds and hours are predictions. It takes half a
minute of one core, and needs no GPU, no weights and no clips.
"""

import argparse
import functools
import importlib
from pathlib import Path

import flow
import make_pairs
from experiments import cost
from runtime.files import read_json
from runtime.options import parse, resolve

ROOT = Path(__file__).resolve().parent.parent
MARK = "## The tables\n"  # from here on docs/scale.md is written by this file
PRESETS = ("1.3b", "14b")
NOWHERE = "out/nowhere"  # so that the sizes assumed are used, whatever folders there are
INPUTS = {
    "prepare": ["videos"],
    "sft": ["data"],
    "continuation": ["data"],
    "make_pairs": ["data", "continuation"],
    "asymdpo": ["pairs"],
}
MEMORY = [  # stage and options
    ("prepare", ""),
    ("sft", "--checkpointing"),
    ("sft", "--micro_batch 1"),
    ("continuation", "--checkpointing"),
    ("continuation", "--micro_batch 1"),
    ("make_pairs", ""),
    ("make_pairs", "--plain"),
    ("asymdpo", "--checkpointing"),
    ("asymdpo", "--checkpointing --micro_batch 2"),
    ("asymdpo", "--micro_batch 1"),
    ("sample", ""),
]
STEPS = {  # stage -> its options on 8 GPUs, and on 32
    "prepare": ("", ""),
    "sft": ("--split align --checkpointing", "--split align --checkpointing"),
    "continuation": ("--checkpointing", "--checkpointing --batch_size 32 --steps 10000"),
    "make_pairs": ("", ""),
    "asymdpo": ("--checkpointing --micro_batch 2", "--checkpointing"),
    "sample": ("", ""),
}
PAIRS = [  # attention of the continuation model, solver steps, those of them with guidance; without any, no guidance
    ("full", 50, 50),
    *(("prefix", *steps) for steps in [(50, 50), (25, 25), (12, 12), (7, 7), (7, 3), (4, 4), (4, 2), (4, 0)]),
]


@functools.cache
def job(name: str, preset: str, gpus: int, options: str) -> cost.Job:
    """What a stage costs with these options of its own."""
    given = ["--preset", preset, *options.split()]
    given += [word for folder in INPUTS.get(name, []) for word in (f"--{folder}", NOWHERE)]
    given += ["--prompt", "any", "--samples", "100"] if name == "sample" else []
    return cost.job_of(name, parse(importlib.import_module(name).Config, given, ""), cost.Machine(gpus=gpus))


def markdown(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def memory_table() -> str:
    """GiB of one of 8 GPUs, with and without --shard."""

    def cell(gib: float) -> str:
        return f"{gib:.1f}" if cost.Machine().fits(gib) else f"({gib:.1f})"

    rows = []
    for name, options in MEMORY:
        jobs = [job(name, preset, 8, options) for preset in PRESETS]
        gib = [cell(j.gib(shard)) if j.gathers or not shard else "" for j in jobs for shard in (False, True)]
        rows.append(
            [f"`{name}.py`", f"`{options}`" if options else "", " and ".join({str(j.batch): 0 for j in jobs}), *gib]
        )
    head = ["stage", "options", "at once", *(f"{preset}{shard}" for preset in PRESETS for shard in ("", " `--shard`"))]
    return markdown(head, rows)


def step_table(preset: str) -> str:
    """What a step computes, sends and reads, and the hours of the stage."""
    rows = []
    for name, both in STEPS.items():
        for gpus, options in zip((8, 32), both):
            j = job(name, preset, gpus, options)
            s = j.seconds
            sent = [cost.digits(j.summed / 1e9), cost.digits(j.gathered / 1e9)] if j.gathers else ["", ""]
            took = [cost.digits(s[part]) for part in ("computing", "summing", "gathering")[: 3 if j.gathers else 1]]
            read = cost.digits(gpus * j.share * j.read / 1e6) if j.read else ""
            cells = [cost.digits(j.flop / 1e12), j.share, *sent, read, *took, *[""] * (3 - len(took))]
            rows.append([f"`{name}.py`", gpus, *cells, cost.digits(j.hours()), cost.digits(gpus * j.hours())])
    head = ["stage", "GPUs", "TFLOP each", "a GPU's share", "GB sent: gradients", "blocks", "MB read"]
    return markdown([*head, "s computing", "summing", "gathering", "hours", "GPU-hours"], rows)


@functools.cache
def pair_share(preset: str, attention: str, nfe: int, guided: int, n2_min: int | None = None) -> float:
    """Operations of a pair, as a share of those by 50 steps, whole forwards, two branches and two continuations.

    guided: of nfe steps, the first ones, which have guidance; 0: no guidance.
    """

    def flop(attend: str, **options) -> float:
        cfg = make_pairs.Config(preset=preset, **options)
        return cost.pair(resolve(cfg, make_pairs.PRESETS), cost.SHAPE, attend)["flop"]

    low = flow.time_grid(nfe, make_pairs.PRESETS[preset]["t_shift"])[0][guided].item() if guided else 0.0
    given = dict(nfe=nfe, guidance=5.0 if guided else 1.0, guidance_low=low, guidance_high=1.0)
    whole = dict(nfe=50, guidance=5.0, guidance_low=0.0, guidance_high=1.0, plain=True)
    return flop(attention, n2_min=n2_min, **given) / flop("full", **whole)


def pair_table() -> str:
    """What a pair takes by fewer steps and with less guidance; on the right, where the winner is the clip itself."""
    rows = []
    for attention, nfe, guided in PAIRS:
        cells = [pair_share(preset, attention, nfe, guided, n2) for preset in PRESETS for n2 in (None, cost.SHAPE[1])]
        rows.append([attention, nfe, guided, *(f"{100 * cell:.3g} %" for cell in cells)])
    whole = [f"{preset}{n2}" for preset in PRESETS for n2 in ("", f" `--n2_min {cost.SHAPE[1]}`")]
    return markdown(["attention", "steps", "with guidance", *whole], rows)


def start_table() -> str:
    """What is read at the start."""
    rows = []
    for name in STEPS:
        jobs = [job(name, preset, 8, STEPS[name][0]) for preset in PRESETS]
        weights, data = [cost.digits(j.weights / 1e9) for j in jobs], jobs[0].data
        seconds = [cost.digits((j.weights + data) / cost.DISK) for j in jobs]
        rows.append([f"`{name}.py`", *weights, cost.digits(data / 1e9) if data else "", *seconds])
    return markdown(["stage", "GB of weights: 1.3b", "14b", "GB of data", "s to read: 1.3b", "14b"], rows)


def assumed_table() -> str:
    """The figures that are not counted, each with its reason."""
    text, least = cost.TEXT / 4096 / 2, cost.DISK / 250e6
    rows = [
        ["products in bfloat16, TFLOP/s", cost.PEAK["bfloat16"] / 1e12, "NVIDIA's data sheet of the A100 80GB"],
        [
            "`prepare.py`'s in TF32, TFLOP/s",
            cost.PEAK["TF32"] / 1e12,
            "as above; `--dtype bfloat16` has the line above",
        ],
        ["share of that", cost.UTILISATION, "Megatron-LM: 0.43 … 0.52 (arXiv 2104.04473, table 1)"],
        ["a GPU sends in its node, GB/s", cost.NVLINK / 1e9, "A800: NVLink of 400 both ways; NCCL keeps 80 % [1]"],
        ["a node sends, GB/s", cost.NETWORK / 1e9, "one port of 200 Gb/s InfiniBand, of a DGX A100's eight; 80 %"],
        ["the job reads, GB/s", cost.DISK / 1e9, f"FSx for Lustre, {least:g} TiB at 250 MB/s/TiB [2]"],
        ["tokens of a caption", f"{text:g}", "a choice; states of 4096 bfloat16 numbers each"],
        ["blocks held with `--shard`", cost.GATHERED, "the one in use, and the buffer of one all-gather (FSDP2)"],
        ["GiB left to CUDA and NCCL", cost.RESERVE, "a choice"],
    ]
    return markdown(
        ["what", "figure", "why"],
        [[what, f"{figure:g}" if type(figure) is float else figure, why] for what, figure, why in rows],
    )


def measured_table() -> str:
    """What one GPU took, by bench/gpu.py, beside what was counted for it; empty if it was not run yet."""
    file = ROOT / "docs/gpu.json"
    suites = read_json(file) if file.is_file() else {}
    rows = [
        [row["name"], suite, section["on"].split(",")[0], f"{row['GiB predicted']:.1f}",
         f"{row['GiB at the peak']:.1f}", f"{row['% MFU']:.0f} %" if "% MFU" in row else ""]
        for suite, sections in suites.items()
        for section in sections.values()
        for row in section["rows"]
        if "GiB predicted" in row and not section["toy"]
    ]  # fmt: skip
    if not rows:
        return ""
    return f"""
### Counted beside measured

By `bench/gpu.py`, with random weights: `asymdpo.py`'s step on one pair. The share of the peak leaves out what
`--checkpointing` computes again; the {100 * cost.UTILISATION:g} % that are assumed above have it in.

{markdown(["what", "preset", "on", "GiB counted", "GiB measured", "of the card's peak"], rows)}"""


def page() -> str:
    """The tables, as Markdown."""
    steps = "\n".join(f"### A step and a stage: {preset}\n\n{step_table(preset)}" for preset in PRESETS)
    return f"""{MARK}
Made by `python -m experiments.scale --write`: do not edit. Seconds and hours are predictions.

### Assumed

{assumed_table()}
[1] A maintainer of NCCL, github.com/NVIDIA/nccl-tests/issues/212.
[2] Amazon's API reference, UpdateFileSystemLustreConfiguration: 125 … 1000 MB/s/TiB can be had.

### GiB of one of 8 GPUs (counted)

{cost.Machine().room:g} GiB can be had of {cost.Machine().gpu_gib:g}; what is in brackets does not fit.

{memory_table()}
{steps}
### A pair (counted)

Operations, as a share of those of 50 steps with whole forwards, two branches of guidance and two continuations, as
`--plain` with `--attention full` and every winner sampled.

{pair_table()}
### Read at the start (counted; seconds predicted)

{start_table()}{measured_table()}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/scale.md")
    write, text = parser.parse_args().write, page()
    print(text)
    if write:
        file = ROOT / "docs/scale.md"
        file.write_text(file.read_text(encoding="utf-8").split(MARK)[0] + text, encoding="utf-8")


if __name__ == "__main__":
    main()

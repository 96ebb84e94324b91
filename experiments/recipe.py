"""The commands of a whole run that fit a machine, with the options that take the fewest GPU-hours, by counting.

    python -m experiments.recipe --preset 1.3b --gpus 1 --gpu_gib 24 --tflops 165
    python -m experiments.recipe --write         docs/recipes.md, for the machines in it

It needs no GPU and no weights. Folders that exist are counted as they are, others as experiments/cost.py assumes, which
is said. Tried are the options that change how a stage runs and not what it makes, up to rounding: --checkpointing,
--micro_batch, --shard, and of make_pairs.py fewer pairs at once. Where nothing else fits, the VAE may round
(--dtype bfloat16). Batches stay the recipe's own. Predicted hours do not tell one --micro_batch from another, so the
smallest is taken, which leaves most memory.
"""

import dataclasses
import functools
import importlib
import textwrap
from collections.abc import Iterator

from experiments import cost, scale
from runtime.options import UserError, option, parse, program, resolve

OPTIONS = {  # of every stage, in their order; what is after --preset and --base
    "prepare": "--videos clips --out out/shards --workers 8",
    "sft": "--data out/shards --split align --out out/sft",
    "continuation": "--data out/shards --out out/continuation",
    "make_pairs": "--data out/shards --continuation out/continuation --out out/pairs",
    "asymdpo": "--sft out/sft --pairs out/pairs --out out/asymdpo",
    "sample": "--lora out/sft,out/asymdpo --prompts prompts.txt --out out/samples",
}
EXPORT = "python -m wan.export --base $BASE --lora out/sft,out/asymdpo --layout lora --dtype bfloat16 --out out/aligned"
BASES = {"1.3b": "Wan2.1-T2V-1.3B", "14b": "Wan2.1-T2V-14B"}
# Peaks: NVIDIA's white papers of Ada and GA102, its data sheet of the A100; bfloat16 with float32 sums, dense
MACHINES = {
    "one RTX 4090 of 24 GB": cost.Machine(gpus=1, gpu_gib=24, tflops=165),
    "one RTX A6000 of 48 GB": cost.Machine(gpus=1, gpu_gib=48, tflops=155),
    "two RTX A6000 of 48 GB": cost.Machine(gpus=2, gpu_gib=48, tflops=155),
    "one A800 of 80 GB": cost.Machine(gpus=1),
    "8 A800 of 80 GB": cost.Machine(),
}
PAGE = [(preset, title) for preset in BASES for title in MACHINES if (preset, title[:3]) != ("1.3b", "two")]


@dataclasses.dataclass(frozen=True)
class Config(cost.Machine):
    """Chooses the options of every stage for a machine."""

    preset: str = option("1.3b", choices=tuple(BASES))  # which Wan2.1
    write: bool = False  # write docs/recipes.md instead


@dataclasses.dataclass(frozen=True)
class Choice:
    """Options of a stage, and what it takes with them."""

    options: str
    job: cost.Job

    @property
    def shard(self) -> bool:
        return "--shard" in self.options.split()

    @property
    def gib(self) -> float:
        return self.job.gib(self.shard)

    @property
    def hours(self) -> float:
        return self.job.hours(self.shard)

    @property
    def fits(self) -> bool:
        return self.job.machine.fits(self.gib)


@functools.cache
def job(name: str, preset: str, machine: cost.Machine, options: str, look: bool) -> cost.Job:
    """What a stage costs with its own OPTIONS and these. look: count the folders that exist."""
    words = f"--preset {preset} --base {BASES[preset]} {OPTIONS[name]} {options}".split()
    cfg = parse(importlib.import_module(name).Config, words, "")
    hidden = {} if look else {field: scale.NOWHERE for field in scale.INPUTS.get(name, ["prompts"])}
    return cost.job_of(name, dataclasses.replace(cfg, **hidden), machine)


def candidates(name: str, preset: str, machine: cost.Machine, look: bool) -> Iterator[Choice]:
    """What may be chosen, of equals the preferred first. Left out is what takes more memory, and no less time, than
    one that is in.
    """

    def choice(*options: str) -> Choice:
        words = " ".join(filter(None, options))
        return Choice(words, job(name, preset, machine, words, look))

    shards = ("", "--shard")[: 1 + (machine.ways > 1)]
    stage = importlib.import_module(name)
    if name in ("prepare", "sample"):
        for dtype in ("", "--dtype bfloat16"):
            for shard in shards if name == "sample" else [""]:
                yield choice(shard, dtype)
    elif name == "make_pairs":
        whole = stage.PRESETS[preset]["shard_size"]
        for shard in shards:
            for size in (whole >> i for i in range(whole.bit_length())):
                yield (one := choice(f"--shard_size {size}" * (size < whole), shard))
                if one.fits:  # smaller ones take as long, and --shard runs whole forwards
                    return
    else:
        batch = stage.PRESETS[preset]["batch_size"]
        share, rest = divmod(batch, machine.gpus)
        if rest:
            raise UserError(f"--gpus: expected a divisor of {batch}, {name}.py's batch, got {machine.gpus}")
        for checkpointing in ("", "--checkpointing"):
            for shard in shards:
                for size in (size for size in range(1, share + 1) if share % size == 0):
                    yield (one := choice(checkpointing, f"--micro_batch {size}", shard))
                    waits = shard and one.job.seconds["gathering"] > one.job.seconds["computing"]
                    if not (one.fits and waits):  # more at once would gather less often
                        break


def choose(name: str, preset: str, machine: cost.Machine, look: bool = True) -> Choice:
    """The options of a stage that fit and take the fewest hours; those that take the least memory if none fits."""
    tried = list(candidates(name, preset, machine, look))
    fitting = [one for one in tried if one.fits]
    exact = [one for one in fitting if "bfloat16" not in one.options]
    return min(exact or fitting, key=lambda one: one.hours) if fitting else min(tried, key=lambda one: one.gib)


def start_of(machine: cost.Machine) -> str:
    """What a command begins with. UserError for nodes that are not all alike."""
    if machine.gpus == 1:
        return "python"
    if machine.gpus <= machine.node:
        return f"torchrun --nproc_per_node {machine.gpus}"
    if machine.gpus % machine.node:
        raise UserError(f"--gpus {machine.gpus}: expected a multiple of --node {machine.node}, so that nodes are alike")
    nodes = f"--nnodes {machine.gpus // machine.node} --nproc_per_node {machine.node}"
    return f"torchrun {nodes} --rdzv_backend c10d --rdzv_endpoint $HEAD:29500"


def wrapped(command: str) -> str:
    """A command over several lines, no option apart from its value."""
    bound = command.replace(" --", "\n--").replace(" ", "\0").replace("\n", " ")
    lines = textwrap.wrap(bound, 88, break_long_words=False, break_on_hyphens=False)
    return " \\\n    ".join(lines).replace("\0", " ")


def lacking(preset: str, machine: cost.Machine, chosen: dict[str, Choice]) -> str:
    """Which stages do not fit, in words; empty if all do."""
    lack = [
        f"{name}.py {cost.size(one.gib)} ({one.options or 'no options'})"
        for name, one in chosen.items()
        if not one.fits
    ]
    if not lack:
        return ""
    of_each = " each" if machine.gpus > 1 else ""
    return f"{preset} does not fit {machine}: a run can have {machine.room:g}{of_each}, and needs {', '.join(lack)}"


def block(preset: str, machine: cost.Machine, chosen: dict[str, Choice]) -> str:
    """The commands of the run, to copy, each under what it takes."""
    lines = [f"export BASE={BASES[preset]}"]
    if machine.gpus > machine.node:
        lines += ["export HEAD=first-node           # run each command on every node"]
    for name, one in chosen.items():
        took, gpus = 3600 * one.hours, machine.gpus
        each = "a video" if name == "sample" else "" if gpus == 1 else f", {cost.duration(took * gpus, 'GPU-')}"
        if name == "sample":
            took = took * gpus / one.job.samples  # a GPU's seconds of one
        spent = f"{cost.duration(took)}{' ' * (name == 'sample')}{each}"
        lines += [f"# {cost.size(one.gib)} of {machine.room:g}, {spent}"]
        command = f"{start_of(machine)} {name}.py --preset {preset} --base $BASE {OPTIONS[name]} {one.options}"
        lines += [wrapped(command.strip())]
    return "\n".join([*lines, wrapped(EXPORT)])


def chosen_for(preset: str, machine: cost.Machine, look: bool) -> dict[str, Choice]:
    return {name: choose(name, preset, machine, look) for name in OPTIONS}


def page() -> str:
    """docs/recipes.md."""
    share, reserve = f"{100 * cost.UTILISATION:g} %", cost.RESERVE
    train, align = (f"{cost.CLIPS[split]:,}" for split in ("train", "align"))
    text = f"""# Recipes for one GPU and for eight

Commands to copy, from a folder of clips to a LoRA, for the machines that are asked for most. Made
by `python -m experiments.recipe --write`: do not edit. For another machine, or another option:

    python -m experiments.recipe --preset 1.3b --gpus 1 --gpu_gib 24 --tflops 165
    python -m experiments.cost asymdpo --preset 1.3b --gpus 1 --gpu_gib 24 --micro_batch 1

The first chooses every stage's options for a machine; the second says what one stage takes, where
that goes, and what is assumed for it. `--tflops` is the card's peak in bfloat16, dense. GiB are
**counted** on the real networks and losses; times are **predictions**, at {share} of the peak.
Nobody has trained these recipes to their end.

* Chosen by counting: of `--checkpointing`, `--micro_batch`, `--shard` and the pairs at once, what
  leaves {reserve} GiB to CUDA and takes the fewest GPU-hours. Results stay the same but for rounding.
  Batches are the paper's on any machine, so one GPU takes them in parts, and the hours of eight.
* The clips are as many as the paper's, {train} and {align} of 49 x 288 x 512. With fewer,
  `prepare.py` and `make_pairs.py` take less in proportion; the others take what `--steps` says.
* What is free on the card counts. With a desktop on it, or ECC, that is less than its name says:
  `nvidia-smi` tells, `--gpu_gib` takes it.
* `prepare.py` has the text encoder, 10.6 GiB, and the VAE on the GPU together; `sample.py` drops the
  encoder before it loads the rest. What `--preview_every` loads in a training is not counted.
* Of several cards the links count as an A800's. Slower ones make `--shard` wait, not fail.
"""
    for preset, title in PAGE:
        machine = MACHINES[title]
        chosen = chosen_for(preset, machine, look=False)
        text += f"\n## {preset} on {title}\n\n"
        if told := lacking(preset, machine, chosen):
            text += textwrap.fill(f"{told}.", 100, break_on_hyphens=False) + "\n"
            continue
        hours = sum(one.hours for name, one in chosen.items() if name != "sample")
        text += f"In all {cost.duration(3600 * hours)}, predicted for {machine.tflops:g} TFLOP/s a card.\n\n"
        text += textwrap.indent(block(preset, machine, chosen), "    ") + "\n"
    return text


def main(cfg: Config) -> None:
    cfg = resolve(cfg)
    if cfg.write:
        (scale.ROOT / "docs/recipes.md").write_text(page(), encoding="utf-8")
        return
    machine = cost.Machine(**{field.name: getattr(cfg, field.name) for field in dataclasses.fields(cost.Machine)})
    start_of(machine)
    chosen = chosen_for(cfg.preset, machine, look=True)
    if told := lacking(cfg.preset, machine, chosen):
        more = "; more GPUs in a node may do, as --shard splits the weights: try --gpus" * (machine.ways == 1)
        raise UserError(told + more)
    assumed = dict.fromkeys(words for one in chosen.values() for words in one.job.assumed + machine.assumed)
    print(f"# {cfg.preset} on {machine}, {machine.tflops:g} TFLOP/s each; GiB are counted, times predicted; assumed:")
    print("".join(f"#   {words}\n" for words in assumed), end="")
    print(block(cfg.preset, machine, chosen))


if __name__ == "__main__":
    program(main, Config, __doc__)

"""What the Triton kernels save: memory traffic, launches, kept memory, registers. Needs no GPU.

    python bench/traffic.py            prints the page
    python bench/traffic.py --write    writes it to kernels/README.md

counting.py counts; here is what is counted, and the page. Every sentence of it that states a result is worded by the
numbers. Some two minutes on one core.
"""

import argparse
import functools
import math
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import model
from kernels import modulate, norm_rope, region_dpo

try:
    import counting
    from counting import Passes
except ImportError as error:  # another platform, or a PyTorch whose internals moved
    sys.exit(f"bench/traffic.py needs Linux, Triton (pip install triton) and a PyTorch with Inductor: {error}")

ROOT = Path(__file__).resolve().parent.parent
BF16, FP32 = torch.bfloat16, torch.float32
WAN = model.PRESETS["1.3b"]
FRAMES, TOKENS, ROWS = 13, 576, 2  # of 49x288x512; rows of a table: the frames that are given, and the others
LATENT, START = (1, 16, 13, 36, 64), 5  # of the DPO loss
L = FRAMES * TOKENS
U = L * WAN.dim * 2  # bytes of one bfloat16 stream
SIDES, REAL = ("forward", "backward"), ", real rotation"
BANDWIDTH, FLOPS = 0.85 * 2.04e12, 0.5 * 312e12  # of an A800, bytes and operations a second that are taken as reached


# ---- other ways to write it ------------------------------------------------------------------------------------------


def to_tokens(table: Tensor, row: Tensor, x: Tensor) -> Tensor:
    """A row for each token of x, (1, R, D) -> (1, L, D)."""
    return table[:, row[0].long()].repeat_interleave(x.shape[1] // row.shape[1], 1)


def per_token_ln(x, shift, scale, row, eps, dtype):
    """ln_modulate with a row of the tables for each token, as Wan2.2 and diffusers write it."""
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)
    return (normed.float() * (1 + to_tokens(scale, row, x)) + to_tokens(shift, row, x)).to(dtype)


def per_token_gate(x, h, gate, row):
    """gate_residual with such a row."""
    return x + h if gate is None else (x + h * to_tokens(gate, row, x)).to(x.dtype)


def per_token_residual_ln(x, h, gate, shift, scale, row, eps, dtype):
    """residual_ln_modulate with such rows."""
    x = per_token_gate(x, h, gate, row)
    return per_token_ln(x, shift, scale, row, eps, dtype), x


def per_token_block(block: model.Block, x, e0, context, rope):
    """Block.forward with e0 (B, L, 6, D) float32, a row for each token, as in Wan2.2."""
    shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = (block.modulation.float().unsqueeze(1) + e0).unbind(2)
    dtype, width = block.ffn[0].weight.dtype, x.shape[-1:]
    h = (F.layer_norm(x, width, eps=block.eps) * (1 + scale_sa) + shift_sa).to(dtype)
    x = x + block.self_attn(h, h, rope) * gate_sa
    h = F.layer_norm(x, width, block.norm3.weight.float(), block.norm3.bias.float(), block.eps).to(dtype)
    x = x + block.cross_attn(h, context)
    h = (F.layer_norm(x, width, eps=block.eps) * (1 + scale_ff) + shift_ff).to(dtype)
    return x + block.ffn(h) * gate_ff


def real_norm_rope(x, weight, rope, eps=1e-6):
    """norm_rope_ref without complex numbers, which Inductor makes no code for."""
    y = F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps)
    if rope is not None:
        real, imaginary = y.unflatten(-1, (-1, rope.shape[-1] // 2, 2)).unbind(-1)
        cos, sin = rope.unflatten(-1, (-1, 2)).unsqueeze(1).unbind(-1)
        y = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1).flatten(2)
    return y.to(x.dtype)


# ---- cases -----------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One operation at one shape. minimum: bytes that must move forward and backward if everything moves once."""

    name: str
    streams: str
    ways: dict[str, Callable]  # "ours", "eager", "per token": those that there are
    inputs: Callable[[], list]
    minimum: tuple[int, int]
    unit: int = U


WAYS = {
    "ours": (modulate.ln_modulate, modulate.residual_ln_modulate, modulate.gate_residual),
    "eager": (modulate.ln_modulate_ref, modulate.residual_ln_modulate_ref, modulate.gate_residual_ref),
    "per token": (per_token_ln, per_token_residual_ln, per_token_gate),
}
# name -> call; the streams that must move forward and backward (x: of x's dtype, h: of h's), and backward besides if
# the tables are trained; tables read forward and backward. Gradients that are equal are one stream.
FORMS = {
    "ln_modulate": (lambda f, x, h, g, s, c, row: f[0](x, s, c, row, 1e-6, BF16), "xh", "xhx", "", 2, 1),
    "residual_ln_modulate": (lambda f, x, h, g, s, c, row: f[1](x, h, g, s, c, row, 1e-6, BF16),
                             "xhxh", "xhxxh", "h", 3, 2),
    "residual_ln_modulate, no gate": (lambda f, x, h, g, s, c, row: f[1](x, h, None, s, c, row, 1e-6, BF16),
                                      "xhxh", "xhxx", "", 2, 1),
    "gate_residual": (lambda f, x, h, g, s, c, row: f[2](x, h, g, row), "xhx", "xh", "h", 1, 1),
}  # fmt: skip


def modulation_cases(x_dtype, trained: bool, D=WAN.dim, frames=FRAMES, tokens=TOKENS) -> list[Case]:
    """x, x_out in x_dtype; h, y bfloat16. trained: the tables ask for gradients."""
    L, table = frames * tokens, ROWS * D * 4
    size = {"x": L * D * x_dtype.itemsize, "h": L * D * 2}

    def inputs():
        streams = [torch.empty(1, L, D, dtype=dtype, requires_grad=True) for dtype in (x_dtype, BF16)]
        tables = [torch.empty(1, ROWS, D, requires_grad=trained) for _ in range(3)]
        return [*streams, *tables, (torch.arange(frames) < frames * START // FRAMES).int()[None]]

    cases, streams = [], "bf16" if x_dtype == BF16 else "x float32, rest bf16"
    for name, (call, forward, backward, besides, read, again) in FORMS.items():
        if name.endswith("no gate") and x_dtype != BF16:
            backward += "h"  # dx and dh differ in dtype
        least = sum(size[a] for a in forward) + read * table
        backward_least = sum(size[a] for a in backward + besides * trained) + (again + read * trained) * table
        ways = {way: functools.partial(call, functions) for way, functions in WAYS.items()}
        cases.append(Case(name, streams, ways, inputs, (least, backward_least)))
    return cases


def norm_rope_cases(trained: bool, D=WAN.dim, frames=FRAMES, tokens=TOKENS, K=128) -> list[Case]:
    """Queries or keys, bfloat16 whatever x is, and the definition in real numbers. trained: the weight's gradient."""
    L = frames * tokens
    u, table = L * D * 2, L * K * 4 + D * 2

    def inputs():
        weight = torch.empty(D, dtype=BF16, requires_grad=trained)
        return [torch.empty(1, L, D, dtype=BF16, requires_grad=True), weight, torch.empty(L, K)]

    minimum = (2 * u + table, 3 * u + table + trained * D * 2)
    ways = {"ours": norm_rope.norm_rope, "eager": norm_rope.norm_rope_ref}
    real = Case("norm_rope" + REAL, "bf16", {"eager": real_norm_rope}, inputs, minimum)
    return [Case("norm_rope", "bf16", ways, inputs, minimum), real]


def dpo_case(shape=LATENT, start=START) -> Case:
    """One pair. Of what stands before `start` only the gradients' zeros must move."""
    u = math.prod(shape) * 2
    kept = u * (shape[2] - start) // shape[2]

    def inputs():
        v = [torch.empty(shape, dtype=BF16, requires_grad=i < 2) for i in range(4)]
        return [*v, torch.empty(shape), torch.empty(shape), torch.tensor([start])]

    functions = {"ours": region_dpo.region_dpo, "eager": region_dpo.region_dpo_ref}
    ways = {way: functools.partial(lambda f, *a: f(*a, 2000.0), f) for way, f in functions.items()}
    return Case("region_dpo", "v bf16, targets float32", ways, inputs, (8 * kept, 6 * kept + 2 * u), u)


def settings() -> dict[str, list[Case]]:
    """Title of a table -> its cases."""
    lora, full = norm_rope_cases(False), norm_rope_cases(True)
    return {
        "LoRA training: tables frozen, x float32": [*modulation_cases(FP32, False), *lora, dpo_case()],
        "Full training: tables trained, x float32": [*modulation_cases(FP32, True), *full],
        "LoRA training, all streams bfloat16": modulation_cases(BF16, False),
        "Full training, all streams bfloat16": modulation_cases(BF16, True),
    }


def count(case: Case) -> dict[str, Passes]:
    """way -> what the case moves and keeps."""
    ways = {"ours": counting.executed(case.ways["ours"], case.inputs())} if "ours" in case.ways else {}
    with counting.fake():
        ways |= {w: counting.step(f, case.inputs()) for w, f in case.ways.items() if w != "ours"}
        return ways | {"Inductor": counting.inductor(case.ways["eager"], case.inputs())}


def count_block(trained: bool) -> dict[str, Passes]:
    """way -> what one block of the 1.3B model in bfloat16 moves and keeps. Adapters are not counted."""
    with counting.fake():
        torch.set_default_dtype(BF16)
        block = model.Block(WAN).requires_grad_(trained)
        torch.set_default_dtype(FP32)
        D, names, parameters = WAN.dim, *zip(*block.named_parameters())
        x, row = torch.empty(1, L, D, requires_grad=True), torch.empty(1, FRAMES, dtype=torch.int32)
        shared = [torch.empty(1, WAN.text_len, D, dtype=BF16), torch.empty(L, D // WAN.num_heads)]  # text, rope
        inputs, wide = [x, torch.empty(1, ROWS, 6, D), row, *shared], [x, torch.empty(1, L, 6, D), *shared]

        def compiled(*a):
            return torch.func.functional_call(block, dict(zip(names, a[5:])), a[:5])

        ways = {"per token": counting.step(functools.partial(per_token_block, block), wide, parameters)}
        for way, modules in (("eager", ()), ("ours without norm_rope", (modulate,)), ("ours", (modulate, norm_rope))):
            ways[way] = counting.launched(block, inputs, parameters, modules)
        ways["Inductor"] = counting.inductor(compiled, inputs, parameters)
        with mock.patch.object(norm_rope, "norm_rope_ref", real_norm_rope):
            ways["Inductor" + REAL] = counting.inductor(compiled, inputs, parameters)
    return ways


# ---- sentences and tables --------------------------------------------------------------------------------------------


def markdown(sentence: str, head: list[str], rows: list[list]) -> str:
    """A sentence and the table that it is about."""
    lines = ["| " + " | ".join(map(str, line)) + " |" for line in (head, ["---"] * len(head), *rows)]
    return "\n".join([textwrap.fill(sentence, 120), "", *lines, ""])


def less(ours: float, other: float) -> str:
    """How many per cent, in words."""
    percent = round(100 * (1 - ours / other))
    return f"{abs(percent)} % {'less' if percent > 0 else 'more'} than" if percent else "as much as"


def traffic_sentence(results: list) -> str:
    """Where Inductor moves less than ours; the largest multiples of the minimum; Inductor's real norm_rope."""
    pairs = [(c, side, {way: p[side].bytes for way, p in ways.items()}) for c, ways in results for side in (0, 1)]
    more = [f"{c.name} {SIDES[side]}" for c, side, b in pairs if b.get("ours", 0) > 1.01 * b["Inductor"]]
    never = f"moves more than Inductor in {', '.join(more)}" if more else "never moves more than Inductor (to 1 %)"
    most = [max(b[way] / c.minimum[side] for c, side, b in pairs if way in b) for way in ("ours", "Inductor", "eager")]
    text = f"Operation by operation ours {never}. Ours moves at most {most[0]:.2f} times the minimum, Inductor at most "
    text += f"{most[1]:.2f}, eager at most {most[2]:.2f}."
    real, ours = ([b for c, _, b in pairs if c.name == name] for name in ("norm_rope" + REAL, "norm_rope"))
    if real:
        ratio = [f"{r['Inductor'] / o['ours']:.2f} ({side})" for r, o, side in zip(real, ours, SIDES)]
        text += f" With a real rotation Inductor's norm_rope moves {' and '.join(ratio)} times what ours does."
    return text


def traffic_table(results: list) -> str:
    """A row for each case and pass: bytes in units and in multiples of the minimum, launches, memory kept."""
    rows, columns = [], ("ours", "Inductor", "eager", "per token")
    for case, ways in results:
        for side, name in enumerate(SIDES):
            least, moved = case.minimum[side], {way: passes[side] for way, passes in ways.items()}
            bytes_ = {way: f"{c.bytes / case.unit:.2f} u, {c.bytes / least:.2f}x" for way, c in moved.items()}
            again = f"{(moved['ours'].bytes + moved['ours'].again) / case.unit:.2f} u" if "ours" in moved else ""
            launches = " / ".join(str(moved[w].launches) if w in moved else "-" for w in columns)
            kept = " / ".join(f"{ways[w].kept / 1e6:.1f}" if w in ways else "-" for w in columns) if side == 0 else ""
            cells = [bytes_.get("ours", ""), again, *(bytes_.get(w, "") for w in columns[1:]), launches, kept]
            rows.append([case.name, name, f"{least / case.unit:.2f} u", *cells])
    head = ["operation", "", "minimum", "ours", "ours, tables each time", *columns[1:]]
    return markdown(traffic_sentence(results), [*head, "launches, in this order", "MB kept, in this order"], rows)


def block_table(ways: dict[str, Passes]) -> str:
    """One block; and a step, predicted: 30 blocks, forward and backward of one sample, without checkpointing."""
    products = WAN.num_layers * sum(c.flops for c in ways["eager"][:2]) / FLOPS
    moved = {way: sum(c.bytes for c in passes[:2]) for way, passes in ways.items()}
    seconds = {way: WAN.num_layers * b / BANDWIDTH for way, b in moved.items()}
    saved = {way: 100 * (s - seconds["ours"]) / (s + products) for way, s in seconds.items()}
    kept = {way: passes.kept for way, passes in ways.items()}
    real, without = "Inductor" + REAL, "ours without norm_rope"
    step = {way: f"{round(percent)} %" for way, percent in saved.items()}
    size = {way: less(moved["ours"], b) for way, b in moved.items()}
    memory = 100 * (1 - kept["ours"] / kept["per token"])
    text = f"""Predicted: the kernels save about {step["eager"]} of a step over eager, about {step["Inductor"]} over
        torch.compile of the definitions, and about {step[real]} over it where the rotation is written in real numbers.
        They move {size["eager"]} eager, {size["Inductor"]} Inductor, {size[real]} Inductor with a real rotation, and
        {size[without]} they would without norm_rope's. Over a row a token the larger gain is
        {"memory" if memory > saved["per token"] else "time"}: {memory:.0f} % of what is kept, and about
        {step["per token"]} of a step; they keep {less(kept["ours"], kept["Inductor"])} torch.compile."""
    rows = [[way, *(f"{c.bytes / U:.1f}" for c in passes[:2]), f"{moved[way] / U:.1f}",
             sum(c.launches for c in passes[:2]), f"{kept[way] / 1e6:.1f}",
             f"{1e3 * seconds[way]:.0f} + {1e3 * products:.0f}",
             "" if way == "ours" else f"{saved[way]:.1f} %"] for way, passes in ways.items()]  # fmt: skip
    head = ["one block", "forward, u", "backward, u", "sum, u", "launches", "MB kept", "a step, ms", "of it ours saves"]
    return markdown(" ".join(text.split()), head, rows)


def sectors_table(results: list) -> str:
    """The streams of the kernels in these cases, by dtype, direction and ratio (counting._sectors)."""
    groups, found = {}, [c.sectors for _, ways in results if "ours" in ways for c in ways["ours"][:2]]
    for what, module, name, ratio in sorted(set().union(*found)):
        groups.setdefault((what, f"{ratio:.2f}"), []).append(f"{module}.{name}")
    more = [f"{what} of {', '.join(names)}: {ratio}" for (what, ratio), names in groups.items() if float(ratio) > 1.01]
    sentence = f"More than once: {'; '.join(more) or 'none'}. All other streams: once."
    rows = [[*group, ", ".join(names)] for group, names in groups.items()]
    return markdown(sentence, ["", "bytes of sectors touched / bytes asked for", "streams"], rows)


def specialisations(D: int) -> dict[tuple, tuple]:
    """(kernel, streams) -> its launch on NVIDIA GPUs, and on AMD's: of every case at this width, each once."""
    cases = [c for x in (BF16, FP32) for trained in (True, False) for c in modulation_cases(x, trained, D)]
    cases += [norm_rope_cases(trained, D)[0] for trained in (True, False)] + [dpo_case()] * (D == WAN.dim)
    found = {}
    for case in cases:
        launches, amd = (counting.recorded(case.ways["ours"], case.inputs(), hip) for hip in (None, "6"))
        sums = any(kernel.__name__ == "_fold_kernel" for kernel, *_ in launches)
        for launch, other in zip(launches, amd):
            name = launch[0].__name__.strip("_").removesuffix("_kernel")
            label = f"{case.name}: {name}" + " with sums" * (sums and name == "backward"), case.streams
            label = (f"{launch[0].fn.__module__.split('.')[-1]}: fold", "float32") if name == "fold" else label
            found.setdefault(label, (launch, other))
    return found


def compiled_table() -> str:
    """All kernels at the 1.3B model's width; at the 14B model's, those that spill."""
    rows, text, amd, targets = [], "", [], ("sm_80", "sm_90")
    for D in (WAN.dim, model.PRESETS["14b"].dim):
        kernels, spilling = specialisations(D), 0
        for label, (launch, other) in tqdm(kernels.items(), f"compiled code, D = {D}", unit="kernel"):
            registers, spilled = zip(*(counting.registers(launch, target) for target in targets))
            spilling += any(spilled)
            amd.append(counting.compiles_for_amd(other))
            if any(spilled) or D == WAN.dim:
                numbers = registers, spilled, [counting.wide_accesses(launch, target) for target in targets]
                rows.append([*label, D, *(" / ".join(map(str, both)) for both in numbers)])
        spilled = f"{spilling} spill registers and the others do not" if spilling else "none spills registers"
        text += f"Of {len(kernels)} kernels at D = {D} {spilled}. "
    text += f"{'All' if all(amd) else sum(amd)} of these {len(amd)} compile for AMD's gfx942."
    head = ["kernel", "streams", "D", "registers, sm_80 / sm_90", "spilled bytes a thread", "16-byte accesses"]
    return markdown(text, head, rows)


# ---- the page --------------------------------------------------------------------------------------------------------

HEAD = """# The kernels, counted

Made by `python bench/traffic.py --write`: do not edit. {made}.

No GPU was used. **executed**: on the PTX emulator of `tests/ptx.py`, which counts bytes. **counted**: from traced
operations or compiled code. **predicted**: arithmetic from bandwidth; nobody ran it on a GPU.

Shape: Wan2.1-1.3B at 49x288x512, one sample: 13 latent frames of 576 tokens, D = 1536, two rows in a table. 1 u is one
(tokens, D) bfloat16 stream, {u:.1f} MB; for `region_dpo` one bfloat16 prediction, {prediction:.2f} MB.
In the model x is float32, h and y are bfloat16.

- **minimum** (counted): each stream that must be read is read once, each result is written once, tables are read once.
- **ours** (executed; of a block counted): streams as requested, a table's distinct bytes once, partial sums written and
  read. Two rows are {rows:.0f} KB and stay in L2; "tables each time" counts every read, as L2 sees it.
- **eager** (counted): the definitions. **per token** (counted): a row a token in float32, as Wan2.2 and diffusers do.
- **Inductor** (counted): the kernels that torch.compile's scheduler forms of the definitions for an A800 (sm_80), each
  buffer read or written once a kernel, the least that they can move. It makes no code for complex numbers: the
  definition's rotation stays eager. "Real rotation" is the definition in real numbers.
- **kept** (counted): storages that autograd holds for backward, without parameters and what all blocks share.

## One block and a step (counted; times predicted)

Everything but matrix products and attention; LoRA's own operations are left out. Under Inductor a whole block also
fuses what the kernels leave to PyTorch, such as sums of gradients. A table of six rows a token is {wide:.0f} MB
a block, of two rows {narrow:.0f} KB. A step: 30 blocks, forward and backward of one sample, without checkpointing (with
it one block is kept at a time); these operations at 85 % of an A800's nominal 2.04 TB/s + products and attention at
half of its 312 TFLOP/s.
"""
TRAFFIC = """## Traffic of each operation (ours: executed; the rest: counted)

Launches of `region_dpo` include those that check `start`.
"""
SECTORS = """## float32 streams and sectors (executed)

Memory is addressed in sectors of 32 bytes. A lane that owns eight columns loads its eight float32 in two instructions,
and both touch the sector: L1 has to keep it in between. Bytes of the sectors that the instructions of a warp touch,
over the bytes asked for; x float32, streams of 64 KB and more:
"""
COMPILED = """## Compiled code (counted)

Two numbers: sm_80 / sm_90. 16-byte accesses: of the global loads and stores in the machine code; a loop's count once.
"""


def page() -> str:
    """The whole page, as Markdown."""
    git = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    made = f"torch {torch.__version__}, triton {version('triton')}, commit {git.stdout.strip() or 'unknown'}"
    row = WAN.dim * 4
    sizes = {"u": U / 1e6, "prediction": math.prod(LATENT) * 2 / 1e6, "rows": ROWS * row / 1e3}
    parts = [HEAD.format(made=made, wide=6 * L * row / 1e6, narrow=6 * ROWS * row / 1e3, **sizes)]
    for title in tqdm(("LoRA", "Full"), "one block", unit="block"):
        parts += [f"### {title} training\n", block_table(count_block(title == "Full"))]
    parts.append(TRAFFIC)
    mixed = []
    for title, cases in settings().items():
        results = [(case, count(case)) for case in tqdm(cases, title, unit="case")]
        parts += [f"### {title}\n", traffic_table(results)]
        mixed += results if "x float32" in title else []
    return "\n".join([*parts, SECTORS, sectors_table(mixed), COMPILED, compiled_table()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write kernels/README.md")
    write = parser.parse_args().write
    try:
        counting.check()
    except RuntimeError as error:
        sys.exit(f"bench/traffic.py cannot count here: {error}")
    text = page()
    print(text)
    if write:
        (ROOT / "kernels/README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

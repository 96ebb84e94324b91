"""What the Triton kernels save: memory traffic, launches, memory kept for backward; and their registers. Needs no GPU.

    python -m bench.traffic            prints the numbers
    python -m bench.traffic --write    writes them into kernels/README.md

    executed   ours: the PTX emulator (tests/emulator/ptx.py) counts what the kernels load and store
    launched   ours in a whole block, not run: the distinct tensors that each launch is given
    step       eager PyTorch: the distinct inputs and outputs of every operation
    inductor   torch.compile: what the kernels that its scheduler forms for an sm_80 GPU read and write

Not counted: time, caches, and the bytes of matrix products and attention, which are the same in every way. `executed`
computes; the others run on fake tensors. It takes two minutes on one core, and needs Linux and Triton.
"""

import contextlib
import copy
import functools
import math
import re
import sys
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
import torch.nn.functional as F
from emulator import aot, ptx
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import scheduler
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes import reinplace
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

import model
from bench.cases import (
    BF16,
    FP32,
    FRAMES,
    LATENT,
    ROWS,
    WAN,
    Case,
    L,
    U,
    dpo_case,
    modulation_cases,
    norm_rope_case,
    real_norm_rope,
)
from kernels import modulate, norm_rope, region_dpo
from runtime.options import arguments

ROOT = Path(__file__).resolve().parent.parent
REAL = ", real rotation"
BANDWIDTH, FLOPS = 0.85 * 2.04e12, 0.5 * 312e12  # of an A800, bytes and operations a second that are taken as reached
TABLES = {"gate", "shift", "scale", "weight", "rope"}  # every program reads a row of them: memory serves it once
SCALARS = {"row", "mean", "rstd", "start", "d_d"}  # one number for a whole program, loaded by all its lanes


# ---- eager -----------------------------------------------------------------------------------------------------------


@dataclass
class Count:
    """What one pass, forward or backward, moves between a GPU and its memory. flops: of products and attention."""

    bytes: int = 0
    launches: int = 0
    flops: int = 0


class Passes(NamedTuple):
    forward: Count
    backward: Count
    kept: int  # bytes that autograd keeps for the backward pass


def distinct_bytes(tensors: list) -> int:
    """Bytes of the tensors among these, each once; an expanded dimension counts as one element."""
    found = {id(a): a for a in tensors if isinstance(a, Tensor)}.values()
    return sum(a.itemsize * math.prod(n for n, s in zip(a.shape, a.stride()) if s) for a in found if a.numel())


class Counter(TorchDispatchMode):
    """Counts operations as CUDA's eager mode runs them, one launch each; views and allocations are free."""

    FREE = re.compile(r"prim::|aten::(empty|new_empty|_unsafe_view|detach|lift_fresh|_local_scalar_dense|alias)")
    MATMUL = re.compile(r"aten::(mm|addmm|bmm|_scaled_dot_product)")

    def __init__(self):
        super().__init__()
        self.count = Count()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name
        if "scaled_dot_product" in name:  # two products forward, five backward
            q, k = args[1:3] if "backward" in name else args[:2]
            self.count.flops += (10 if "backward" in name else 4) * q.numel() * k.shape[2]
        elif self.MATMUL.match(name):
            self.count.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        elif not func.is_view and not self.FREE.match(name):
            self.count.bytes += distinct_bytes(tree_leaves((args, kwargs))) + distinct_bytes(tree_leaves(out))
            self.count.launches += 1
        return out


# RMSNorm is one operation on CUDA and six on the CPU. LayerNorm is one on both and stands in for it; it moves and keeps
# a mean, one number a token, in vain.
FUSED = mock.patch.object(F, "rms_norm", lambda x, shape, weight, eps: F.layer_norm(x, shape, weight, None, eps))


@contextlib.contextmanager
def unchecked():
    """As on CUDA, nobody looks at the values of `row` and `start`; fake tensors have none."""
    with mock.patch.object(modulate, "_check_row"), mock.patch.object(region_dpo, "_check"):
        yield


@contextlib.contextmanager
def held(inputs: list, parameters: list):
    """Collects storage -> bytes of what autograd keeps, without what all blocks share: parameters, frozen inputs."""
    shared = {a.untyped_storage()._cdata for a in (*parameters, *(a for a in inputs if not a.requires_grad))}
    found = {}

    def pack(a):
        if a.untyped_storage()._cdata not in shared:
            found[a.untyped_storage()._cdata] = a.untyped_storage().nbytes()
        return a

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda a: a):
        yield found


def run_backward(outputs, inputs: list) -> None:
    """Gradients of all inputs that ask for one, for gradients of all outputs; making the latter is an allocation."""
    outputs = [a for a in tree_leaves(outputs) if isinstance(a, Tensor) and a.requires_grad]
    wanted = [a for a in inputs if a.requires_grad]
    torch.autograd.grad(outputs, wanted, [torch.empty_like(a) for a in outputs], allow_unused=True)


def step(function: Callable, inputs: list, parameters: list = []) -> Passes:
    """Eager PyTorch. Not counted: a cache that serves an operation what the one before it wrote."""
    forward, backward = Counter(), Counter()
    with unchecked(), forward, FUSED, held(inputs, parameters) as kept:
        outputs = function(*inputs)
    with backward:
        run_backward(outputs, [*inputs, *parameters])
    return Passes(forward.count, backward.count, sum(kept.values()))


# ---- the Triton kernels ----------------------------------------------------------------------------------------------


def launched(function: Callable, inputs: list, parameters: list = []) -> Passes:
    """As `step`, and each launch moves its tensors once. Wrong for region_dpo, whose kernels read a part of them."""

    def launch(kernel, grid, args, kwargs):
        count = _get_current_dispatch_mode().count
        count.bytes += distinct_bytes(args)
        count.launches += 1

    with aot.replaced(lambda kernel: aot.StandIn(kernel, launch)):
        return step(function, inputs, parameters)


def executed(function: Callable, inputs: list) -> Passes:
    """As `step`, and each launch moves what its threads load and store when the emulator runs it.

    Streams count as often as they are asked for; tables and scalars once a launch, as the L2 cache serves the rest.
    """

    def launch(kernel, grid, args, kwargs):
        count = _get_current_dispatch_mode().count
        with _disable_current_modes():
            emulated = ptx.Emulated(kernel)
            emulated[grid](*args, **kwargs)
        count.launches += 1
        for name, t in emulated.launches[0][2].items():
            count.bytes += (t.read_once if name in TABLES | SCALARS else t.read) + t.written

    with aot.replaced(lambda kernel: aot.StandIn(kernel, launch)):
        return step(function, inputs)


# ---- Inductor --------------------------------------------------------------------------------------------------------

A800 = SimpleNamespace(major=8, multi_processor_count=108, warp_size=32, max_threads_per_multi_processor=2048)


class Counted(Exception):
    """Ends a compilation before code is generated."""


@contextlib.contextmanager
def an_sm_80_gpu():
    """Inductor lowers for an A800, as far as its scheduler, on any build of PyTorch, with any GPU or none."""
    patches = (
        # "is there Triton for this GPU?" asks the driver
        (scheduler, "has_triton", lambda *_: True),
        # sizes by which reductions are split; the current device is asked of CUDA
        (CudaInterface, "get_device_properties", staticmethod(lambda *_: A800)),
        (CudaInterface, "get_compute_capability", staticmethod(lambda *_: 80)),
        (CudaInterface, "is_bf16_supported", staticmethod(lambda *_, **__: True)),
        (CudaInterface.Worker, "current_device", staticmethod(lambda: 0)),
        # run for its result's shape alone, it would copy from a fake tensor into a fake view, and fail
        (reinplace, "_inplace_generalized_scatter", lambda out, source, views: out),
    )
    with contextlib.ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(torch._inductor.config.patch(fx_graph_cache=False))  # a graph found there is not lowered
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex")
        yield


def _on_cuda(graph: torch.fx.GraphModule, example: list) -> tuple[torch.fx.GraphModule, list]:
    """A graph that was traced on the CPU, where autograd needs no driver, and its inputs, as if on a GPU."""
    moved = copy.deepcopy(graph)
    for node in moved.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda")}
    moved.recompile()
    mode = next(a.fake_mode for a in example if hasattr(a, "fake_mode"))
    with mode:
        example = [torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="cuda") for a in example]
    FakeTensorProp(moved, mode).propagate_dont_convert_inputs(*example)
    return moved, example


def _is_kernel(node) -> bool:
    """True for a node of the scheduler that moves memory and is neither a matrix product nor attention."""
    if not isinstance(node, scheduler.ExternKernelSchedulerNode):
        return not isinstance(node, scheduler.NopKernelSchedulerNode)
    operation = getattr(node.node, "op_overload", None)  # None: one output of several
    return operation is not None and not operation.is_view and not Counter.MATMUL.match(operation._schema.name)


def inductor(function: Callable, inputs: list, parameters: list = []) -> Passes:
    """torch.compile, by Inductor's own count: each kernel reads and writes each of its buffers once.

    That is the least that its kernels can move; what they do move, and tables read again, is not counted.
    """
    counts = []

    def count(graph: GraphLowering):
        graph.init_wrapper_code()
        graph._update_scheduler()
        nodes = [n for n in graph.scheduler.nodes if _is_kernel(n)]
        counts.append(Count(sum(n.get_read_write_buffers_sizes() for n in nodes), len(nodes)))
        raise Counted

    def compiler(graph, example, is_backward: bool):
        before = len(counts)
        try:
            with an_sm_80_gpu(), torch.no_grad():
                compile_fx_inner(*_on_cuda(graph, example), is_backward=is_backward)
        except Exception:  # Counted, which Inductor wraps in an error of its own
            if len(counts) == before:
                raise
        return make_boxed_func(graph.forward)

    compiled = aot_function(
        function, *(functools.partial(compiler, is_backward=b) for b in (False, True)),
        min_cut_rematerialization_partition, decompositions=select_decomp_table(),
    )  # fmt: skip
    # in place of code generation: the scheduler's kernels are known, and this machine may have no compiler for them
    with mock.patch.object(GraphLowering, "compile_to_module", count), unchecked():
        with held(inputs, parameters) as kept:
            outputs = compiled(*inputs, *parameters)
        run_backward(outputs, [*inputs, *parameters])
    return Passes(*counts, sum(kept.values()))


# ---- what is counted -------------------------------------------------------------------------------------------------


def per_token_block(block: model.Block, x, e0, context, rope):
    """Block.forward with e0 (B, L, 6, D) float32, a row for each token, as in Wan2.2."""
    shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = (block.modulation.float().unsqueeze(1) + e0).unbind(2)
    dtype, width = block.ffn[0].weight.dtype, x.shape[-1:]
    h = (F.layer_norm(x, width, eps=block.eps) * (1 + scale_sa) + shift_sa).to(dtype)
    x = x + block.self_attn(h, block.self_attn.keys(h, rope), rope) * gate_sa
    h = F.layer_norm(x, width, block.norm3.weight.float(), block.norm3.bias.float(), block.eps).to(dtype)
    x = x + block.cross_attn(h, block.cross_attn.keys(context))
    h = (F.layer_norm(x, width, eps=block.eps) * (1 + scale_ff) + shift_ff).to(dtype)
    return x + block.ffn(h) * gate_ff


def count(case: Case) -> dict[str, Passes]:
    """way -> what the case moves and keeps."""
    ways = {"ours": executed(case.function, case.inputs())}
    with FakeTensorMode():
        ways |= {"Inductor": inductor(case.function, case.inputs()), "eager": step(case.function, case.inputs())}
        if case.name == "norm_rope":
            ways["Inductor" + REAL] = inductor(real_norm_rope, case.inputs())
    return ways


def count_block(trained: bool) -> dict[str, Passes]:
    """way -> what one block of the 1.3B model in bfloat16 moves and keeps. Adapters are not counted."""
    with FakeTensorMode():
        torch.set_default_dtype(BF16)
        block = model.Block(WAN).requires_grad_(trained)
        torch.set_default_dtype(FP32)
        D, names, parameters = WAN.dim, *zip(*block.named_parameters())
        x, row = torch.empty(1, L, D, requires_grad=True), torch.empty(1, FRAMES, dtype=torch.int32)
        shared = [torch.empty(1, WAN.text_len, D, dtype=BF16), torch.empty(L, D // WAN.num_heads)]  # text, rope
        inputs, wide = [x, torch.empty(1, ROWS, 6, D), row, *shared], [x, torch.empty(1, L, 6, D), *shared]

        def compiled(*a):
            return torch.func.functional_call(block, dict(zip(names, a[5:])), a[:5])

        ways = {"per token": step(functools.partial(per_token_block, block), wide, parameters)}
        ways |= {"eager": step(block, inputs, parameters), "ours": launched(block, inputs, parameters)}
        ways["Inductor"] = inductor(compiled, inputs, parameters)
        with mock.patch.object(norm_rope, "norm_rope_ref", real_norm_rope):
            ways["Inductor" + REAL] = inductor(compiled, inputs, parameters)
    return ways


# ---- the page --------------------------------------------------------------------------------------------------------


def markdown(head: list[str], rows: list[list]) -> str:
    lines = ["| " + " | ".join(map(str, line)) + " |" for line in (head, ["---"] * len(head), *rows)]
    return "\n".join([*lines, ""])


def block_table(ways: dict[str, Passes]) -> str:
    """One block; and a step, predicted: 30 blocks, forward and backward of one sample, without checkpointing."""
    products = WAN.num_layers * sum(c.flops for c in ways["eager"][:2]) / FLOPS
    moved = {way: sum(c.bytes for c in passes[:2]) for way, passes in ways.items()}
    seconds = {way: WAN.num_layers * b / BANDWIDTH for way, b in moved.items()}
    saved = {way: 100 * (s - seconds["ours"]) / (s + products) for way, s in seconds.items()}
    percent = {way: round(p) for way, p in saved.items()}
    memory = round(100 * (1 - ways["ours"].kept / ways["per token"].kept))
    text = f"""Predicted: the kernels save {percent["eager"]} % of a step over eager, {percent["Inductor"]} % over
        torch.compile of the definitions, {percent["Inductor" + REAL]} % over it where the rotation is written in real
        numbers. Over a row for each token they save {percent["per token"]} % of a step and {memory} % of the memory
        that is kept."""
    rows = [[way, *(f"{c.bytes / U:.1f}" for c in passes[:2]), f"{moved[way] / U:.1f}",
             sum(c.launches for c in passes[:2]), f"{passes.kept / 1e6:.1f}",
             f"{1e3 * seconds[way]:.0f} + {1e3 * products:.0f}",
             "" if way == "ours" else f"{saved[way]:.1f} %"] for way, passes in ways.items()]  # fmt: skip
    head = ["one block", "forward, u", "backward, u", "sum, u", "launches", "MB kept", "a step, ms", "of it ours saves"]
    sentence = textwrap.fill(" ".join(text.split()).replace(" %", "\N{NO-BREAK SPACE}%"), 100)
    return f"{sentence}\n\n{markdown(head, rows)}"


def traffic_table(cases: list[Case]) -> str:
    """A row for each case and pass: bytes in units and in multiples of the minimum, launches, memory kept."""
    rows, columns = [], ("ours", "Inductor", "eager")
    for case in tqdm(cases, "operations", unit="case"):
        ways = count(case)
        for side, name in enumerate(("forward", "backward")):
            least, moved = case.minimum[side], {way: passes[side] for way, passes in ways.items()}
            cells = {way: f"{c.bytes / case.unit:.2f} u, {c.bytes / least:.2f}x" for way, c in moved.items()}
            real = f" ({moved['Inductor' + REAL].bytes / case.unit:.2f} u{REAL})" if "Inductor" + REAL in ways else ""
            cells["Inductor"] += real
            launches = " / ".join(str(moved[w].launches) for w in columns)
            kept = "" if side else " / ".join(f"{ways[w].kept / 1e6:.1f}" for w in columns)
            rows.append([case.name, name, f"{least / case.unit:.2f} u", *map(cells.get, columns), launches, kept])
    head = ["operation", "", "minimum", *columns, "launches, in this order", "MB kept, in this order"]
    return markdown(head, rows)


def compiled_table() -> str:
    """Every kernel that these cases launch, at the widths of the 1.3B and the 14B model."""
    found = {}
    for D in (WAN.dim, model.PRESETS["14b"].dim):
        for trained in (True, False):
            cases = [*modulation_cases(trained, D, 3, 48), norm_rope_case(trained, D, 144)]
            for case in [*cases, dpo_case()] if D == WAN.dim and not trained else cases:
                inputs = case.inputs()
                with aot.recorded() as launches, unchecked():
                    run_backward(case.function(*inputs), inputs)
                for kernel, args, kwargs in launches:
                    module, name = kernel.fn.__module__.split(".")[-1], kernel.__name__.strip("_").split("_")[0]
                    sums = " with sums" * (trained and name == "backward")
                    label = f"{module if name == 'fold' else case.name}: {name}{sums}"
                    found.setdefault((label, D), (kernel, args, kwargs))
    rows = []
    for label, launch in tqdm(found.items(), "compiled code", unit="kernel"):
        compiled = [aot.compile_launch(*launch, target) for target in ("sm_80", "sm_90")]
        numbers = [(c.resources["reg"], c.resources["stack"] + c.resources["local"], c.warps) for c in compiled]
        rows.append([*label, compiled[0].num_warps, *(" / ".join(map(str, both)) for both in zip(*numbers))])
    head = ["kernel", "D", "warps a program", "registers a thread", "spilled bytes a thread", "warps a multiprocessor"]
    return markdown(head, rows)


MARK = "## The numbers\n"  # from here on kernels/README.md is written by this file
MADE = """
Made by `python -m bench.traffic --write` with torch {torch} and triton {triton}: do not edit.
1 u is one (tokens, D) bfloat16 stream, {u:.1f} MB; for `region_dpo` one bfloat16 prediction, {prediction:.2f} MB.
A table of six rows for each token is {wide:.0f} MB a block, of two rows {narrow:.0f} KB.

### One block and a step (counted; times predicted)
"""


def page() -> str:
    """The numbers, as Markdown."""
    row, made = WAN.dim * 4, {"torch": torch.__version__, "triton": version("triton")}
    sizes = {"u": U, "prediction": math.prod(LATENT) * 2, "wide": 6 * L * row, "narrow": 6 * ROWS * row * 1e3}
    parts = [MARK + MADE.format(**made, **{name: size / 1e6 for name, size in sizes.items()})]
    for title in tqdm(("LoRA", "Full"), "one block", unit="block"):
        parts += [f"#### {title} training\n", block_table(count_block(title == "Full"))]
    for title, trained in (("LoRA training: tables frozen", False), ("Full training: tables trained", True)):
        cases = [*modulation_cases(trained), norm_rope_case(trained), *[dpo_case()] * (not trained)]
        parts += [f"### Each operation. {title} (ours: executed; the rest: counted)\n", traffic_table(cases)]
    return "\n".join([*parts, "### Compiled code (counted): sm_80 / sm_90\n", compiled_table()])


@dataclass(frozen=True)
class Config:
    """Counts."""

    write: bool = False  # write kernels/README.md


def main() -> None:
    write, text = arguments(Config, __doc__).write, page()
    print(text)
    if write:
        file = ROOT / "kernels/README.md"
        file.write_text(file.read_text(encoding="utf-8").split(MARK)[0] + text, encoding="utf-8")


if __name__ == "__main__":
    main()

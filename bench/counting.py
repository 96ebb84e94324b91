"""How memory traffic, launches and kept memory are counted without a GPU. bench/traffic.py says of what.

    step       eager PyTorch: the distinct inputs and outputs of every operation
    executed   the Triton kernels, run by the PTX emulator (tests/ptx.py), which counts what they load and store
    launched   the Triton kernels, not run: the distinct tensors that each launch is given
    inductor   torch.compile: what the kernels that Inductor's scheduler forms for an sm_80 GPU read and write

Each takes a function, its inputs and the parameters that it uses beside them, and returns `Passes`. On fake tensors
(`fake`) nothing is computed; `executed` needs real ones. Not counted anywhere: time, caches, and the bytes of matrix
products and attention, which are the same in every way.
"""

import contextlib
import copy
import functools
import math
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import aot
import torch
import torch.nn.functional as F
from emulator import ptx
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

from kernels import modulate, norm_rope, region_dpo

MODULES = (modulate, norm_rope, region_dpo)
TABLES = {"gate", "shift", "scale", "weight", "rope"}  # every program reads a row of them: memory serves it once
SCALARS = {"row", "mean", "rstd", "start", "d_loss", "slope"}  # one number for a whole program, loaded by all its lanes


@dataclass
class Count:
    """What one pass, forward or backward, moves between a GPU and its memory."""

    bytes: int = 0
    launches: int = 0
    flops: int = 0  # of matrix products and attention, by `step` and `launched`
    again: int = 0  # bytes of tables that programs read after the first, by `executed`; not in `bytes`
    sectors: set = field(default_factory=set)  # by `executed`: see `_sectors`


class Passes(NamedTuple):
    forward: Count
    backward: Count
    kept: int  # bytes that autograd keeps for the backward pass


# ---- eager -----------------------------------------------------------------------------------------------------------


# RMSNorm is one operation on CUDA and six on the CPU, as LayerNorm is one on both: it stands in, with the mean, one
# float32 number a token, moved and kept in vain
FUSED = mock.patch.object(F, "rms_norm", lambda x, shape, weight, eps: F.layer_norm(x, shape, weight, None, eps))


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


@contextlib.contextmanager
def held(inputs: list, parameters: list):
    """Collects storage -> bytes of what autograd keeps, but for what all blocks share: parameters, frozen inputs."""
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
    with forward, FUSED, held(inputs, parameters) as kept:
        outputs = function(*inputs)
    with backward:
        run_backward(outputs, [*inputs, *parameters])
    return Passes(forward.count, backward.count, sum(kept.values()))


@contextlib.contextmanager
def fake():
    """Tensors without values. The check of `row`'s values is left out: there are none."""
    with FakeTensorMode(), mock.patch.object(modulate, "_check_row"):
        yield


# ---- the Triton kernels ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def launches_to(launch: Callable, modules=MODULES):
    """These modules take their kernels, for CPU tensors too, but call launch(kernel, grid, args, kwargs) instead."""

    class StandIn:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **kwargs: launch(self.kernel, grid, args, kwargs)

    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "implementation", lambda device: "triton"))
            for name in [n for n in vars(module) if n.endswith("_kernel")]:
                stack.enter_context(mock.patch.object(module, name, StandIn(getattr(module, name))))
        yield


def launched(function: Callable, inputs: list, parameters: list = [], modules=MODULES) -> Passes:
    """As `step`, and each launch moves its tensors once. Wrong for region_dpo, whose kernels read a part of them."""

    def launch(kernel, grid, args, kwargs):
        count = _get_current_dispatch_mode().count
        count.bytes += distinct_bytes(args)
        count.launches += 1

    with launches_to(launch, modules):
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
            count.again += t.read - t.read_once if name in TABLES else 0
        count.sectors |= _sectors(kernel, args, emulated.launches[0][2])

    # the check of `row` looks at a tensor's values once, not once a call
    with launches_to(launch), mock.patch.object(modulate, "_check_row"):
        return step(function, inputs)


def _sectors(kernel, args, traffic: dict) -> set:
    """(what, module, parameter, ratio) of streams: bytes of the 32-byte sectors that instructions touch / asked for.

    2 says that two instructions of a warp touch each sector. Whether L1 serves the second is not known.
    """
    module, found = kernel.fn.__module__.split(".")[-1], set()
    for name, tensor in zip(kernel.arg_names, args):
        t = traffic.get(name)
        if t and t.read + t.written and tensor.nbytes >= 1 << 16:  # less is a table or single numbers
            what = f"{str(tensor.dtype)[6:]} {'stores' if t.written else 'loads'}"
            found.add((what, module, name, round(32 * t.sectors / (t.read + t.written), 2)))
    return found


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
    """Does this node of the scheduler move memory, and is no matrix product and no attention?"""
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
    with mock.patch.object(GraphLowering, "compile_to_module", count):
        with held(inputs, parameters) as kept:
            outputs = compiled(*inputs, *parameters)
        run_backward(outputs, [*inputs, *parameters])
    return Passes(*counts, sum(kept.values()))


# ---- compiled code ---------------------------------------------------------------------------------------------------


def recorded(function: Callable, inputs: list, hip: str | None = None) -> list[tuple]:
    """The launches of both passes, none of them run: (kernel, args, kwargs). hip: ROCm's version."""
    launches = []
    with launches_to(lambda kernel, grid, args, kwargs: launches.append((kernel, args, kwargs))):
        with mock.patch.object(torch.version, "hip", hip):
            run_backward(function(*inputs), inputs)
    return launches


def registers(launch: tuple, target: str) -> tuple[int, int]:
    """Registers and spilled bytes a thread, for sm_80 or sm_90. Not: how many programs fit on a multiprocessor."""
    used = aot.resources(aot.compile_launch(*launch, target))
    return used["reg"], used["stack"] + used["local"]


def wide_accesses(launch: tuple, target: str) -> str:
    """How many loads and stores of global memory in the machine code take 16 bytes; one in a loop counts once."""
    accesses = re.findall(r"\b(?:LDG|STG)\.\S*", aot.sass(aot.compile_launch(*launch, target)))
    return f"{sum('.128' in a for a in accesses)} of {len(accesses)}"


def compiles_for_amd(launch: tuple) -> bool:
    """Whether Triton makes machine code of it for gfx942. Nothing is said of its registers."""
    return bool(aot.compile_launch(*launch, "gfx942").asm.get("hsaco"))


def check() -> None:
    """RuntimeError, one line, where something is missing: Triton's binaries, or Inductor as it is patched here."""
    if missing := [n for n in ("ptxas", "cuobjdump", "nvdisasm") if not (aot.NVIDIA / n).exists()]:
        raise RuntimeError(f"this build of Triton comes without {', '.join(missing)}")
    try:
        with fake():
            inductor(torch.neg, [torch.empty(8, requires_grad=True)])
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise RuntimeError(f"torch {torch.__version__} has another Inductor than is patched: {reason}") from error

"""Triton's own compiler without a GPU: what a launch would compile, its PTX, and what ptxas and nvdisasm say of it."""

import contextlib
import functools
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from kernels import modulate, norm_rope, region_dpo

MODULES = (modulate, norm_rope, region_dpo)
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NVIDIA = Path(triton.__file__).parent / "backends/nvidia/bin"  # ptxas, cuobjdump, nvdisasm come in Triton's wheel


@dataclass(eq=False)
class Compiled:
    """One specialisation of a kernel. parameters: (name, Triton type) in the order of the PTX's .param list."""

    name: str
    asm: dict
    parameters: list[tuple[str, str]]
    num_warps: int
    shared: int

    def _inspect(self, tool: str, option: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.asm["cubin"])
            file.flush()
            command = [NVIDIA / tool, option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    @functools.cached_property
    def resources(self) -> dict[str, int]:
        """Registers, stack and local bytes a thread, shared bytes a program, as cuobjdump reports them."""
        found = re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", self._inspect("cuobjdump", "--dump-resource-usage"))
        return {name.lower(): int(value) for name, value in found}

    @functools.cached_property
    def sass(self) -> str:
        """The machine code, disassembled."""
        return self._inspect("nvdisasm", "-c")

    @property
    def warps(self) -> int:
        """Warps that run side by side on a multiprocessor of 65,536 registers, which are dealt out by 256 a warp."""
        programs = 65536 // (-(-self.resources["reg"] * 32 // 256) * 256 * self.num_warps)
        return min(programs * self.num_warps, 64)


_compiled: dict = {}


def compile_launch(kernel, args: tuple, kwargs: dict, target: str = "sm_80", hints: bool = True) -> Compiled:
    """What `kernel[grid](*args, **kwargs)` would compile for `target`, specialised on these arguments as a launch does.

    hints=False takes away the divisibility by 16 that Triton sees in pointers, sizes and strides.
    """
    backend = make_backend(TARGETS[target])
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, None)
    if not hints:
        attributes = {}
    key = (kernel.cache_key, str(signature), str(constants), str(attributes), str(options), target)
    if key not in _compiled:
        source = ASTSource(kernel, signature, constants, attributes)
        done = triton.compile(source, target=TARGETS[target], options=options.__dict__)
        parameters = [(name, kind) for name, kind in signature.items() if kind != "constexpr"]
        _compiled[key] = Compiled(kernel.__name__, dict(done.asm), parameters, options.num_warps, done.metadata.shared)
    return _compiled[key]


class StandIn:
    """In place of a kernel: `stand_in[grid](*args, **kwargs)` calls launch(kernel, grid, args, kwargs)."""

    def __init__(self, kernel, launch: Callable):
        self.kernel, self.launch = kernel, launch

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launch(self.kernel, grid, args, kwargs)


@contextlib.contextmanager
def replaced(make: Callable, modules=MODULES):
    """make(kernel) in place of each kernel of these modules, which take their kernels, for CPU tensors too.

    Yields those made, by the module's and the kernel's name.
    """
    made = {}
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "implementation", lambda device: "triton"))
            for name in [n for n in vars(module) if n.endswith("_kernel")]:
                made[module.__name__.split(".")[-1], name] = stand_in = make(getattr(module, name))
                stack.enter_context(mock.patch.object(module, name, stand_in))
        yield made


@contextlib.contextmanager
def recorded():
    """Within it no kernel is launched: (kernel, args, kwargs) go to the list that this yields."""
    launches: list[tuple] = []
    with replaced(lambda kernel: StandIn(kernel, lambda kernel, _, *launch: launches.append((kernel, *launch)))):
        yield launches

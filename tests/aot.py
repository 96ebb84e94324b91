"""Triton's own compiler without a GPU: what a launch would compile, its PTX, and what ptxas and nvdisasm say of it."""

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NVIDIA = Path(triton.__file__).parent / "backends/nvidia/bin"  # ptxas, cuobjdump, nvdisasm come in Triton's wheel


@dataclass
class Compiled:
    """One specialisation of a kernel. parameters: (name, Triton type) in the order of the PTX's .param list."""

    name: str
    asm: dict
    parameters: list[tuple[str, str]]
    num_warps: int
    shared: int
    vectorizable: bool  # False: the divisibility hints were taken away


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
        done = triton.compile(
            ASTSource(kernel, signature, constants, attributes), target=TARGETS[target], options=options.__dict__
        )
        parameters = [(name, kind) for name, kind in signature.items() if kind != "constexpr"]
        _compiled[key] = Compiled(
            kernel.__name__, dict(done.asm), parameters, options.num_warps, done.metadata.shared, hints
        )
    return _compiled[key]


@functools.cache
def _tool(name: str) -> str:
    return str(NVIDIA / name)


def _inspect(cubin: bytes, *command: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout


def resources(compiled: Compiled) -> dict[str, int]:
    """Registers, stack and local bytes a thread, shared bytes a program, as cuobjdump reports them."""
    text = _inspect(compiled.asm["cubin"], _tool("cuobjdump"), "--dump-resource-usage")
    found = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text))
    return {name.lower(): int(value) for name, value in found.items()}


def sass(compiled: Compiled) -> str:
    """The machine code, disassembled."""
    return _inspect(compiled.asm["cubin"], _tool("nvdisasm"), "-c")


class Recorder:
    """Stands in for a kernel: `recorder[grid](*args, **kwargs)` writes the launch down and does not make it."""

    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.kernel, grid, args, kwargs))


def record(monkeypatch, *modules) -> list:
    """From now on the kernels of these modules are not launched: (kernel, grid, args, kwargs) go to the list."""
    launches: list = []
    for module in modules:
        monkeypatch.setattr(module, "implementation", lambda device: "triton")
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), launches))
    return launches

"""Executes the PTX that Triton makes of a kernel, on the CPU, in NumPy: one lane for each CUDA thread.

`Emulated(kernel)[grid](*args, **kwargs)` compiles what that launch would compile (aot.py) and runs it in place on
CPU tensors. Lanes of many CTAs advance together, the lowest program counter first; registers are arrays over the lanes.

Proven for the launch that ran: every access lies inside the storage of the tensor whose pointer it derives from, and is
aligned; nothing in shared memory is read before it is written, or touched by two threads, one of them writing, without
a barrier between them; no byte of global memory is stored twice, or stored by one CTA and loaded by another; barriers
and shuffles are reached by all the threads that they name; the results. An instruction that the kernels do not compile
to (ptx_ops.py, and `_step` below) is an error, never a guess; one whose lanes point to several tensors is OutOfBounds.

Not proven: anything below PTX (ptxas, registers, time), memory order other than barriers. rsqrt.approx, ex2.approx and
div.full are exact before one rounding to float32: on hardware their last bits may differ, as may the payload of a NaN.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from . import aot
from .ptx_ops import KINDS, OPS


class PtxError(AssertionError):
    """What the emulator flags. Uninitialized: shared memory read that nothing wrote. Divergence: a barrier or a shuffle
    that some of its threads never reach."""


OutOfBounds, Misaligned, Race, WrittenTwice, Uninitialized, Divergence, UnknownInstruction = (
    type(name, (PtxError,), {})
    for name in "OutOfBounds Misaligned Race WrittenTwice Uninitialized Divergence UnknownInstruction".split()
)

# ---- text to program -------------------------------------------------------------------------------------------------


@dataclass
class _Instruction:
    text: str  # with the line of the kernel that it is for
    guard: str | None  # a predicate
    mnemonic: str
    operands: list[str]


class _Program:
    """registers: types of the names with a prefix. labels: number of the instruction that follows."""

    def __init__(self, ptx: str):
        # a mov of two halves: instructions of our own, in ptx_ops.py
        ptx = re.sub(r"^\s*mov\.b32\s+(%\w+), \{(%\w+), (%\w+)\};", r"pack \1, \2, \3;", ptx, flags=re.M)
        ptx = re.sub(r"^\s*mov\.b32\s+\{(\S+), (\S+)\}, (%\w+);", r"low \1, \3; high \2, \3;", ptx, flags=re.M)
        ptx = re.sub(r"(low|high) _, %\w+;", "", ptx)
        registers = re.findall(r"\.reg \.(pred|b16|b32|b64)\s+(%[a-z]+)<\d+>;", ptx)
        self.registers = {prefix: KINDS[kind] for kind, prefix in registers}
        self.parameters = re.findall(r"^\s*\.param\b.*?(\w+),?$", ptx, re.M)
        self.instructions: list[_Instruction] = []
        self.labels: dict[str, int] = {}
        line_of_kernel = ""
        for line in re.search(r"^\{$(.*?)^\}$", ptx, re.M | re.S)[1].splitlines():
            code, _, comment = (part.strip() for part in line.partition("//"))
            if code.startswith(".loc"):
                line_of_kernel = f" ({comment})"
            elif code.endswith(":"):
                self.labels[code[:-1]] = len(self.instructions)
            elif not code.startswith("."):
                for statement in filter(None, map(str.strip, code.split(";"))):
                    guard, mnemonic, rest = re.fullmatch(r"(?:@(%\w+)\s+)?(\S+)\s*(.*)", statement).groups()
                    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
                    self.instructions.append(_Instruction(statement + line_of_kernel, guard, mnemonic, operands))


# ---- global memory ---------------------------------------------------------------------------------------------------

WINDOW = 40  # each parameter's addresses: 2**40 bytes, its storage in the middle
NOBODY, MANY = -1, -2


@dataclass
class Traffic:
    """What a launch moved between global memory and its threads through one parameter."""

    read: int = 0  # bytes that loads of active lanes asked for
    read_once: int = 0  # distinct bytes among them
    written: int = 0
    sectors: int = 0  # of 32 bytes, touched by each instruction of a warp, summed
    widths: set[int] = field(default_factory=set)  # bytes of one thread's accesses


class _Marks:
    """Who touched each granule of a memory, NOBODY at first. The granule shrinks to the narrowest access so far."""

    def __init__(self, size: int, dtype=np.int32):
        self.granule, self.values = 16, np.full(-(-size // 16), NOBODY, dtype)

    def shrink(self, width: int) -> None:
        if width < self.granule:
            self.values, self.granule = np.repeat(self.values, self.granule // width), width

    def visit(self, offset: np.ndarray, width: int, who: np.ndarray, mark: bool = True) -> tuple[np.ndarray, ...]:
        """The granules of these accesses, and for each who accesses it, who did before, and whose mark it has now."""
        self.shrink(width)
        index, count = offset // self.granule, width // self.granule
        if count > 1:
            index, who = (index[:, None] + np.arange(count)).ravel(), np.repeat(who, count)
        before = self.values[index]
        if mark:
            self.values[index] = who
        return index, who, before, self.values[index] if mark else before


class _Storage:
    """A copy of a tensor's whole storage, at the same address modulo 256; written back when the launch is over."""

    def __init__(self, tensor: torch.Tensor):
        untyped = tensor.untyped_storage()
        self.tensor = torch.empty(0, dtype=torch.uint8).set_(untyped)
        self.first, self.size = untyped.data_ptr() % 256, untyped.nbytes()
        self.bytes = np.zeros(-(-(self.first + self.size) // 256) * 256, np.uint8)
        self.inside = self.bytes[self.first : self.first + self.size]
        self.inside[:] = self.tensor.numpy()
        self.writers = _Marks(len(self.bytes))  # threads, numbered in the grid


class _Parameter:
    """A pointer of the kernel; several may point into one storage."""

    def __init__(self, name: str, index: int, tensor: torch.Tensor, storage: _Storage):
        self.name, self.storage, self.traffic = name, storage, Traffic()
        self.start = (index + 1 << WINDOW) + (1 << WINDOW - 1)  # the address of the storage's bytes
        self.address = self.start + storage.first + tensor.storage_offset() * tensor.element_size()
        self.readers = _Marks(len(storage.bytes))  # CTAs, or MANY


class _Launch:
    """A grid, and global memory as its threads see it."""

    def __init__(self, pointers: dict[str, torch.Tensor], grid: tuple, threads: int):
        self.grid, self.threads, self.ctas = grid, threads, grid[0] * grid[1] * grid[2]
        keys = {name: tensor.untyped_storage().data_ptr() or name for name, tensor in pointers.items()}
        storages = {key: _Storage(pointers[name]) for name, key in keys.items()}
        self.parameters = [_Parameter(n, i, a, storages[keys[n]]) for i, (n, a) in enumerate(pointers.items())]

    def describe(self, thread: int) -> str:
        cta, (x, y, _) = int(thread) // self.threads, self.grid
        return f"CTA ({cta % x}, {cta // x % y}, {cta // (x * y)}) thread {int(thread) % self.threads}"

    def finish(self) -> dict[str, Traffic]:
        """Loads of one CTA against the stores of another; the storages' bytes back to the tensors."""
        for parameter in self.parameters:
            read, write = parameter.readers, parameter.storage.writers
            parameter.traffic.read_once = int(np.count_nonzero(read.values != NOBODY)) * read.granule
            read.shrink(write.granule)
            write.shrink(read.granule)
            both = (write.values != NOBODY) & (read.values != NOBODY)
            clash = both & (read.values != write.values // self.threads)
            if clash.any():
                i = int(np.argmax(clash))
                reader = "several CTAs" if read.values[i] == MANY else f"CTA {read.values[i]}"
                place = f"byte {i * read.granule - parameter.storage.first} of {parameter.name}'s storage"
                raise Race(f"{place} is loaded by {reader} and stored by {self.describe(write.values[i])}")
        for parameter in self.parameters:
            if parameter.traffic.written:
                parameter.storage.tensor.copy_(torch.from_numpy(parameter.storage.inside))
        return {parameter.name: parameter.traffic for parameter in self.parameters}


# ---- the machine -----------------------------------------------------------------------------------------------------
# `mask` is True where every lane runs, else an array of bool; `lanes` are the indices of those that run.

LANES = 1 << 15  # threads that run together: few enough for the caches, enough to hide the interpreter
SHARED = 1 << 16  # address of shared memory
POISON = {1: 0, 2: 0x7FAD, 4: 0x7FADBEEF, 8: 0x7FFDEADBEEFDEADB}  # registers at first: NaN, and no address
ITEM = {1: np.dtype("u1"), 2: np.dtype("u2"), 4: np.dtype("u4"), 8: np.dtype("u8"), 16: np.dtype("c16")}  # by bytes
EPOCH = 32  # a shared access's stamp: barriers passed, thread
SEVERAL = (1 << EPOCH) - 1  # in place of a thread

CONTROL = re.compile(r"bra(\.uni)? \$\w+|bar\.sync 0|ret")
MEMORY = re.compile(r"(ld|st)\.(global|shared)(?:\.v([24]))?\.b(8|16|32|64)")
LDMATRIX = re.compile(r"ldmatrix\.sync\.aligned\.m8n8\.x([124])\.shared\.b16")
SHUFFLE = re.compile(r"shfl\.sync\.(bfly|idx)\.b32")


def _simple(mask):
    """True for a mask of every lane, False for one of none."""
    return True if np.all(mask) else mask if np.any(mask) else False


def _join(groups: dict, number: int, mask) -> None:
    if mask is not False:
        groups[number] = _simple(mask | groups.get(number, False))


def _seen(array: np.ndarray, kind: str) -> np.ndarray:
    if array.itemsize != KINDS[kind].itemsize:
        raise ValueError(kind)
    return array.view(KINDS[kind])


def _clash(before: np.ndarray, mine: np.ndarray) -> np.ndarray:
    """Whether it is another thread's access, with no barrier between it and this one."""
    return (before >> EPOCH == mine >> EPOCH) & (before != mine)


class _Machine:
    """Some CTAs of a launch, from `first` on, their lanes side by side."""

    def __init__(self, program: _Program, launch: _Launch, constants: dict, shared: int, first: int, ctas: int):
        self.program, self.launch, self.shared_size = program, launch, shared
        self.threads, self.lanes = launch.threads, np.arange(ctas * launch.threads)
        self.thread, self.warp = self.lanes % self.threads, self.lanes // 32 << 42  # above a sector's number
        self.number = (first * self.threads + self.lanes).astype(np.int32)  # in the grid
        self.cta = self.number // self.threads
        self.registers: dict[str, np.ndarray] = {}
        x, y, _ = launch.grid
        special = {"%tid.x": self.thread, "global_smem": np.array([SHARED])}  # Triton's name of shared memory
        special |= {"%ctaid.x": self.cta % x, "%ctaid.y": self.cta // x % y, "%ctaid.z": self.cta // (x * y)}
        special |= {f"%nctaid.{axis}": np.array([size]) for axis, size in zip("xyz", launch.grid)}
        self.named = constants | {name: value.astype(np.uint32) for name, value in special.items()}
        stride = -(-shared // 16) * 16
        self.shared, self.home = np.zeros(ctas * stride, np.uint8), self.lanes // self.threads * stride
        self.writers, self.readers = (_Marks(ctas * stride, np.int64) for _ in range(2))
        self.stamp = self.thread.copy()

    # -- which lanes run next

    def run(self) -> None:
        steps = [(i, *self._decode(i)) for i in self.program.instructions]
        groups, parked = {0: True}, {}  # number of the next instruction: mask of the lanes
        while groups or parked:
            if not groups:
                self._release(groups, parked)
            number = min(groups)
            mask = groups.pop(number)
            instruction, step, guard = steps[number]
            taken, rest = (mask, False) if guard is None else (_simple(guard & mask), _simple(~guard & mask))
            if step is not None:
                if taken is not False:
                    step(taken)
                rest = mask
            elif instruction.mnemonic.startswith("bar"):
                _join(parked, number + 1, taken)
            elif instruction.mnemonic != "ret":
                _join(groups, self.program.labels[instruction.operands[0]], taken)
            _join(groups, number + 1, rest)

    def _release(self, groups: dict, parked: dict) -> None:
        """Those at a barrier go on where a whole CTA is there."""
        for number, mask in list(parked.items()):
            here = np.broadcast_to(mask, len(self.lanes))
            whole = np.repeat(here.reshape(-1, self.threads).all(1), self.threads)
            self.stamp[whole] += 1 << EPOCH
            _join(groups, number, _simple(whole))
            del parked[number]
            _join(parked, number, _simple(here & ~whole))
        if not groups:
            number, mask = next(iter(parked.items()))
            lane, text = int(np.argmax(mask)), self.program.instructions[number - 1].text
            there = int((mask & (self.cta == self.cta[lane])).sum())
            raise Divergence(f"{text}: only {there} of {self.threads} threads, {self.describe(lane)} first, are here")

    def describe(self, lane: int) -> str:
        return self.launch.describe(self.number[lane])

    def _whole_warps(self, instruction: _Instruction, mask) -> None:
        warps = np.broadcast_to(mask, len(self.lanes)).reshape(-1, 32)
        broken = warps.any(1) & ~warps.all(1)
        if broken.any():
            who = self.describe(int(np.argmax(broken)) * 32)
            raise Divergence(f"{instruction.text}: only a part of the warp of {who} is here")

    # -- instructions to functions of the mask

    def _decode(self, instruction: _Instruction) -> tuple[Callable | None, np.ndarray | None]:
        """What the instruction does, None if it is for `run`; its guard, None if it has none."""
        try:
            guard = self._register(instruction.guard, "pred") if instruction.guard else None
            return self._step(instruction), guard
        except (KeyError, ValueError) as error:
            raise UnknownInstruction(instruction.text) from error

    def _step(self, instruction: _Instruction) -> Callable | None:
        if instruction.mnemonic in OPS:
            return self._arithmetic(*OPS[instruction.mnemonic], instruction.operands)
        for pattern, decode in ((MEMORY, self._memory), (LDMATRIX, self._ldmatrix), (SHUFFLE, self._shuffle)):
            if found := pattern.fullmatch(instruction.mnemonic):
                return decode(instruction, *found.groups())
        control = " ".join([instruction.mnemonic, *instruction.operands])
        # a warp's barrier is the CTA's where the CTA is one warp; the kernels have none elsewhere
        if not CONTROL.fullmatch(control) and (control, self.threads) != ("bar.warp.sync -1", 32):
            raise ValueError(control)

    def _register(self, name: str, kind: str) -> np.ndarray:
        dtype = self.program.registers[name.rstrip("0123456789")]
        if name not in self.registers:
            self.registers[name] = np.full(len(self.lanes), POISON[dtype.itemsize], dtype)
        return _seen(self.registers[name], kind)

    def _operand(self, text: str, kind: str) -> np.ndarray:
        """A register's lanes seen as `kind`, or one number for all lanes."""
        if text in self.named:
            return _seen(self.named[text], kind)
        if text.startswith("%"):
            return self._register(text, kind)
        real = text.startswith("0f")
        if kind not in ("b32", "f32") if real else KINDS[kind].kind == "f":
            raise ValueError(text)
        size = KINDS[kind].itemsize
        bits = (int(text[2:], 16) if real else int(text, 0)) % (1 << 8 * size)
        return np.array([bits != 0]) if kind == "pred" else np.array([bits], ITEM[size]).view(KINDS[kind])

    def _arithmetic(self, kinds: list[str], function: Callable, operands: list[str]) -> Callable:
        sources = [self._operand(text, kind) for text, kind in zip(operands[1:], kinds[1:], strict=True)]
        out = self._register(operands[0], kinds[0])

        def run(mask):
            where = mask if mask is True or out.ndim == 1 else mask[:, None]
            if isinstance(function, np.ufunc):
                function(*sources, out=out, where=where)
            else:
                np.copyto(out, function(*sources), "unsafe", where)

        return run

    def _place(self, text: str, kind: str) -> tuple[np.ndarray, int]:
        ((base, offset),) = re.findall(r"^\[\s*([%\w]+)\s*(?:\+\s*(-?\d+)\s*)?\]$", text)
        return np.broadcast_to(self._operand(base, kind), self.lanes.shape), int(offset or 0)

    def _memory(self, instruction: _Instruction, what: str, space: str, count: str | None, bits: str) -> Callable:
        data, place = instruction.operands[:: -1 if what == "st" else 1]
        access, kind = (self._global, "b64") if space == "global" else (self._shared, "b32")
        base, offset = self._place(place, kind)
        # a byte is loaded into a register of 16 bits, zeros above it
        registers = [self._register(name, f"b{max(int(bits), 16)}") for name in re.findall(r"%\w+", data)]
        width = len(registers) * int(bits) // 8
        if len(registers) != int(count or 1) or (what, bits) == ("st", "8"):
            raise ValueError(data)

        def run(mask):
            lanes = self.lanes if mask is True else np.flatnonzero(mask)
            address = base[lanes].astype(np.int64) + offset
            if what == "st":
                items = np.stack([a[lanes] for a in registers], -1).view(ITEM[width])[:, 0]
                return access(instruction, lanes, address, width, items)
            items = access(instruction, lanes, address, width).view(ITEM[int(bits) // 8])
            for register, column in zip(registers, items.reshape(-1, len(registers)).T):
                register[lanes] = column

        return run

    def _ldmatrix(self, instruction: _Instruction, count: str) -> Callable:
        """Row t of matrix j lies where thread 8 j + t points; each thread gets 4 bytes of row t // 4 of each."""
        data, place = instruction.operands
        registers = [self._register(name, "b32") for name in re.findall(r"%\w+", data)]
        base, offset = self._place(place, "b32")
        if len(registers) != int(count):
            raise ValueError(data)
        lane = self.thread % 32

        def run(mask):
            self._whole_warps(instruction, mask)
            lanes, t = self.lanes[mask].ravel(), lane[mask].ravel()
            rows = [base[lanes - t + 8 * j + t // 4].astype(np.int64) + offset for j in range(int(count))]
            for register, row in zip(registers, rows):
                access = instruction, lanes, row - SHARED
                self._check((row & 15) != 0, Misaligned, access, "of shared memory, a row of 16")
                register[lanes] = self._shared(instruction, lanes, row + 4 * (t % 4), 4)

        return run

    def _shuffle(self, instruction: _Instruction, mode: str) -> Callable:
        """Each lane gets the value of a lane of its warp: its own number xor the operand, or the operand's."""
        to, source, operand, clamp, members = instruction.operands
        if (clamp, members) != ("31", "-1"):
            raise ValueError(clamp)
        out, value, by = self._register(to, "b32"), self._register(source, "b32"), self._operand(operand, "b32")

        def run(mask):
            self._whole_warps(instruction, mask)
            partner = (self.lanes ^ by if mode == "bfly" else by) & 31
            np.copyto(out, value[(self.lanes & ~31) | partner], where=mask)

        return run

    # -- accesses of these lanes to these addresses; a store has the items that it writes, a load returns them

    def _global(self, instruction: _Instruction, lanes, address, width: int, items=None):
        window = (int(address[0]) >> WINDOW) - 1
        if not 0 <= window < len(self.launch.parameters):
            who = self.describe(lanes[0])
            raise OutOfBounds(f"{instruction.text}: address {address[0]:#x} near no tensor, {who}")
        parameter = self.launch.parameters[window]
        storage, traffic, offset = parameter.storage, parameter.traffic, address - parameter.start
        access = instruction, lanes, offset - storage.first
        self._check_place(access, address, width, storage.size, f"of {parameter.name}'s storage")
        sectors = np.sort((address >> 5) + self.warp[lanes])
        traffic.sectors += int(np.count_nonzero(np.diff(sectors))) + 1
        traffic.widths.add(width)
        data = storage.bytes.view(ITEM[width])
        if items is None:
            traffic.read += len(address) * width
            index, mine, before, after = parameter.readers.visit(offset, width, self.cta[lanes])
            parameter.readers.values[index[(after != mine) | ((before != NOBODY) & (before != mine))]] = MANY
            return data[offset // width]
        traffic.written += len(address) * width
        index, mine, before, after = storage.writers.visit(offset, width, self.number[lanes])
        twice = (before != NOBODY) | (after != mine)
        if twice.any():
            i = int(np.argmax(twice))
            one, two = map(self.launch.describe, (after[i] if before[i] == NOBODY else before[i], mine[i]))
            place = f"byte {index[i] * storage.writers.granule - storage.first} of {parameter.name}'s storage"
            raise WrittenTwice(f"{instruction.text}: {place}, by {one} and {two}")
        data[offset // width] = items

    def _shared(self, instruction: _Instruction, lanes, address, width: int, items=None):
        access, memory = (instruction, lanes, address - SHARED), "of shared memory"
        self._check_place(access, address, width, self.shared_size, memory)
        place, stamp = address - SHARED + self.home[lanes], self.stamp[lanes]
        data, at = self.shared.view(ITEM[width]), place // width
        if items is None:
            _, mine, wrote, _ = self.writers.visit(place, width, stamp, mark=False)
            self._check(_clash(wrote, mine), Race, access, memory)
            self._check(wrote == NOBODY, Uninitialized, access, memory)
            index, mine, before, after = self.readers.visit(place, width, stamp)
            several = (after != mine) | _clash(before, mine)
            self.readers.values[index[several]] = mine[several] | SEVERAL
            return data[at]
        _, mine, read, _ = self.readers.visit(place, width, stamp, mark=False)
        self._check(_clash(read, mine), Race, access, memory)
        _, mine, wrote, _ = self.writers.visit(place, width, stamp)
        self._check(_clash(wrote, mine), Race, access, memory)
        data[at] = items
        # threads that hold the same value may store it together: Triton does where a layout repeats it
        self._check(data[at].view(np.uint16) != items.view(np.uint16), Race, access, memory)

    def _check_place(self, access: tuple, address, width: int, size: int, place: str) -> None:
        outside = (access[2] < 0) | (access[2] + width > size)
        self._check(outside, OutOfBounds, access, f"{place} with {size} bytes")
        self._check((address & (width - 1)) != 0, Misaligned, access, f"{place}, {width} at once")

    def _check(self, bad, error, access: tuple, place: str) -> None:
        """Raises for the first access that is bad; several entries of `bad` may be of one."""
        if bad.any():
            instruction, lanes, offset = access
            i = int(np.argmax(bad)) * len(offset) // len(bad)
            raise error(f"{instruction.text}: byte {offset[i]} {place}, {self.describe(lanes[i])}")


# ---- launches --------------------------------------------------------------------------------------------------------


def execute(ptx: str, parameters: list, values: dict, grid: tuple, threads: int, shared: int) -> dict[str, Traffic]:
    """Runs the kernel in place on the tensors in `values` (name: CPU tensor or int); traffic by parameter.

    parameters: (name, Triton type) in the order of the PTX's own, which has more: scratch pointers that are not used.
    """
    program = _Program(ptx)
    launch = _Launch({name: values[name] for name, kind in parameters if kind[0] == "*"}, (*grid, 1, 1)[:3], threads)
    address = {parameter.name: parameter.address for parameter in launch.parameters}
    constants = {}
    for own, (name, kind) in zip(program.parameters, parameters):
        constants[f"[{own}]"] = np.array([address.get(name, values[name])], "i4" if kind == "i32" else "i8")
    if launch.ctas * threads >= 1 << 31:
        raise ValueError(f"{launch.ctas * threads} threads")
    step = max(1, LANES // threads)
    with np.errstate(all="ignore"):
        for first in range(0, launch.ctas, step):
            _Machine(program, launch, constants, shared, first, min(step, launch.ctas - first)).run()
    return launch.finish()


class Emulated:
    """Stands in for a @triton.jit kernel: `Emulated(kernel)[grid](*args, **kwargs)` compiles and runs it on the CPU.

    edit: what to do to the text between the two.
    """

    def __init__(self, kernel, edit: Callable[[str], str] = str):
        self.kernel, self.edit = kernel, edit
        self.launches: list[tuple[str, tuple, dict[str, Traffic]]] = []

    def __getitem__(self, grid: tuple) -> Callable:
        def launch(*args, **kwargs):
            done = aot.compile_launch(self.kernel, args, kwargs, "sm_80")
            values = dict(zip(self.kernel.arg_names, args)) | kwargs
            source, threads = self.edit(done.asm["ptx"]), 32 * done.num_warps
            self.launches.append(
                (done.name, tuple(grid), execute(source, done.parameters, values, grid, threads, done.shared))
            )

        return launch

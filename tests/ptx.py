"""Executes the PTX that Triton makes of a kernel, on the CPU, in NumPy: one lane for each CUDA thread.

`Emulated(kernel)[grid](*args, **kwargs)` compiles what that launch would compile (tests/aot.py) and runs it in place on
CPU tensors. Lanes of many CTAs advance together, the lowest program counter first; registers are arrays over the lanes.

Proven for the launch that ran: every access lies inside the storage of the tensor whose pointer it derives from, and is
aligned; nothing in shared memory is read before it is written, or touched by two threads, one of them writing, without
a barrier between them; no byte of global memory is stored twice, or stored by one CTA and loaded by another; barriers
and shuffles are reached by all the threads that they name; the results. An instruction that is not in the tables below
is an error, never a guess.

Not proven: anything below PTX (ptxas, registers, time), memory order other than barriers. rsqrt.approx, ex2.approx and
their like, and div.full, are exact before one rounding to float32: on hardware their last bits may differ, as may the
payload of a NaN. An fma whose float32 result is subnormal is rounded twice.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

import aot
import numpy as np
import torch


class PtxError(AssertionError):
    """What the emulator flags."""


class OutOfBounds(PtxError): ...


class Misaligned(PtxError): ...


class Race(PtxError): ...


class WrittenTwice(PtxError): ...


class Uninitialized(PtxError):
    """Shared memory read that nothing wrote."""


class Divergence(PtxError):
    """A barrier or a shuffle that some of its threads never reach."""


class UnknownInstruction(PtxError): ...


# ---- the instruction table -------------------------------------------------------------------------------------------
# OPS[mnemonic] = kinds of the destination and the sources, and a function(out, *sources) on arrays over the lanes.
# A kind is how a register's bits are seen; f16x2 and bf16x2 registers are arrays of twice the length.

INT = {f"{sign}{bits}": np.dtype(f"{letter}{bits // 8}") for sign, letter in (("s", "i"), ("u", "u"), ("b", "u"))
       for bits in (8, 16, 32, 64)}  # fmt: skip
KINDS = INT | {"pred": np.dtype(bool), "f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8")}
KINDS |= {"bf16": np.dtype("u2"), "f16x2": np.dtype("f2"), "bf16x2": np.dtype("u2")}
ELEMENTS = {"bf16x2": 2, "f16x2": 2}  # in one register
ITEM = {1: np.dtype("u1"), 2: np.dtype("u2"), 4: np.dtype("u4"), 8: np.dtype("u8"), 16: np.dtype("c16")}
OPS: dict[str, tuple[list[str], Callable]] = {}


def _op(mnemonic: str, kinds: str, function: Callable) -> None:
    OPS[mnemonic] = (kinds.split(), function)


def _ufunc(function: np.ufunc) -> Callable:
    return lambda out, *sources: function(*sources, out=out)


def _copy(function: Callable) -> Callable:
    """A function that returns its result. The sources may be the destination: it is written last."""

    def run(out, *sources):
        out[...] = function(*sources)

    return run


def widen_bf16(a: np.ndarray) -> np.ndarray:
    return (a.astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_bf16(a: np.ndarray) -> np.ndarray:
    """float32 or float64 to bfloat16 bits, to nearest even; NaN becomes 0x7FFF, as the hardware's does."""
    if a.dtype == np.float64:  # to float32 with the last bit sticky: no second rounding to nearest
        near = a.astype(np.float32)
        over = np.abs(near) > np.abs(a)
        bits = near.view(np.uint32) - over.astype(np.uint32)
        a = np.where(np.isnan(a), near, (bits | (near != a).astype(np.uint32)).view(np.float32))
    bits = a.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(a), np.uint32(0x7FFF), rounded).astype(np.uint16)


def _bf16(function: Callable) -> Callable:
    return lambda *sources: round_bf16(np.asarray(function(*(widen_bf16(a).astype(np.float64) for a in sources))))


def _fma32(out, a, b, c):
    """The product is exact in float64. A sum that float64 rounded onto the middle of two float32 is moved off it."""
    total = np.multiply(a, b, dtype=np.float64)
    total += c
    tie = (total.view(np.int64) << 35) == np.iinfo(np.int64).min
    if tie.any():
        product, addend = (np.broadcast_to(x, total.shape)[tie] for x in (np.multiply(a, b, dtype=np.float64), c))
        s = total[tie]
        back = s - product
        error = (product - (s - back)) + (addend.astype(np.float64) - back)
        total[tie] = np.where(error == 0, s, np.nextafter(s, np.copysign(np.inf, error)))
    out[...] = total


def _fma64(a: float, b: float, c: float) -> float:
    try:
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        return float(exact) if exact else float(a * b + c)
    except (ValueError, OverflowError):  # infinities and NaN, or past the largest
        return float(a * b + c)


def _ftz(function: Callable) -> Callable:
    """Subnormal float32 sources and results are zero, the sign kept."""

    def flush(a):
        return np.where(np.abs(a) < np.float32(2.0**-126), np.copysign(np.float32(0), a), a) if a.dtype == "f4" else a

    def run(out, *sources):
        result = np.empty_like(out)
        function(result, *(flush(a) for a in sources))
        out[...] = flush(result)

    return run


def _exact(function: Callable) -> Callable:
    return _copy(lambda *sources: function(*(a.astype(np.float64) for a in sources)))


def _extreme(pick: Callable, zeros: Callable) -> Callable:
    """min and max: -0 is less than +0."""

    def run(out, a, b):
        same = np.broadcast_to(a == b, out.shape)
        bits = zeros(a.view(ITEM[a.itemsize]), b.view(ITEM[b.itemsize]))
        out[...] = np.where(same, bits.view(out.dtype), pick(a, b))

    return run


def _quotient(a, b):
    """Towards zero. By zero: all ones, as the hardware's."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    return np.where(b == 0, ~b.dtype.type(0), (a - np.fmod(a, safe)) // safe)


def _high(a, b):
    """Upper half of a product of integers."""
    bits = a.itemsize * 8
    if bits < 64:
        wide = np.dtype(f"{a.dtype.kind}{a.itemsize * 2}")
        return (a.astype(wide) * b.astype(wide)) >> wide.type(bits)
    return np.array([(int(x) * int(y)) >> 64 for x, y in np.broadcast(a, b)], dtype=object).astype(a.dtype)


def _shift(left: bool) -> Callable:
    def run(a, by):
        bits = a.itemsize * 8
        inside = np.minimum(by, bits - 1).astype(a.dtype)
        shifted = np.left_shift(a, inside) if left else np.right_shift(a, inside)
        return shifted if a.dtype.kind == "i" else np.where(by < bits, shifted, a.dtype.type(0))

    return run


def _bfe(a, at, length):
    at, length = np.minimum(at & 255, 63).astype(np.int64), np.minimum(length & 255, 32).astype(np.int64)
    field_ = (a.astype(np.int64) >> at) & ((np.int64(1) << length) - 1)
    if a.dtype.kind == "i":
        length = np.minimum(length, np.maximum(32 - at, 1))  # past the last bit the sign is repeated
        field_ = (field_ << (64 - np.maximum(length, 1))) >> (64 - np.maximum(length, 1))
        field_ = np.where(length == 0, 0, field_)
    return field_.astype(a.dtype)


def _bfi(a, b, at, length):
    at, length = np.minimum(at & 255, 32).astype(np.uint64), np.minimum(length & 255, 32).astype(np.uint64)
    mask = ((np.uint64(1) << length) - np.uint64(1)) << at
    return ((b.astype(np.uint64) & ~mask) | ((a.astype(np.uint64) << at) & mask)).astype(np.uint32)


def _prmt(a, b, selector):
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    out = np.uint32(0)
    for i in range(4):
        s = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (both >> ((s & np.uint32(7)) * np.uint32(8)).astype(np.uint64)) & np.uint64(255)
        byte = np.where(s & 8, np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0)), byte)
        out = out | (byte.astype(np.uint32) << np.uint32(8 * i))
    return out


def _lop3(a, b, c, table):
    out = np.uint32(0)
    for i in range(8):
        term = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        out = out | np.where((table >> np.uint32(i)) & 1, term, np.uint32(0))
    return out


def _funnel(left: bool, wrap: bool) -> Callable:
    def run(low, high, by):
        by = (by & np.uint32(31) if wrap else np.minimum(by, np.uint32(32))).astype(np.uint64)
        both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
        return (((both << by) >> np.uint64(32)) if left else (both >> by)).astype(np.uint32)

    return run


def _to_integer(rounding: Callable, kind: str) -> Callable:
    """Saturating; NaN becomes 0."""
    limits = np.iinfo(INT[kind])

    def run(a):
        a = rounding(a.astype(np.float64))
        inside = (a >= float(limits.min)) & (a < float(limits.max + 1))
        whole = np.where(inside, a, 0).astype(INT[kind])
        return np.where(inside | np.isnan(a), whole, np.where(a > 0, limits.max, limits.min).astype(INT[kind]))

    return run


ORDER = {"eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
BOOLEAN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _unordered(a, b):
    return np.isnan(a) | np.isnan(b)


def _setp(name: str, kind: str, compare: Callable) -> None:
    if kind == "bf16":
        plain, compare = compare, lambda a, b: plain(widen_bf16(a), widen_bf16(b))
    _op(f"setp.{name}.{kind}", f"pred {kind} {kind}", _copy(compare))
    for word, combine in BOOLEAN.items():
        _op(f"setp.{name}.{word}.{kind}", f"pred {kind} {kind} pred",
            _copy(lambda a, b, p, combine=combine: combine(compare(a, b), p)))  # fmt: skip


def _fill_integers() -> None:
    for t in ("s16", "u16", "s32", "u32", "s64", "u64"):
        two, three, wide = f"{t} {t} {t}", f"{t} {t} {t} {t}", t[0] + str(2 * int(t[1:]))
        for name, function in {"add": np.add, "sub": np.subtract, "mul.lo": np.multiply, "min": np.minimum,
                               "max": np.maximum}.items():  # fmt: skip
            _op(f"{name}.{t}", two, _ufunc(function))
        _op(f"mad.lo.{t}", three, _copy(lambda a, b, c: a * b + c))
        _op(f"mul.hi.{t}", two, _copy(_high))
        _op(f"mad.hi.{t}", three, _copy(lambda a, b, c: _high(a, b).astype(c.dtype) + c))
        _op(f"div.{t}", two, _copy(_quotient))
        _op(f"rem.{t}", two, _copy(lambda a, b: (a - _quotient(a, b) * b).astype(a.dtype)))
        _op(f"shr.{t}", f"{t} {t} u32", _copy(_shift(left=False)))
        if wide in INT:
            _op(f"mul.wide.{t}", f"{wide} {t} {t}", _copy(lambda a, b, k=INT[wide]: a.astype(k) * b.astype(k)))
            _op(f"mad.wide.{t}", f"{wide} {t} {t} {wide}",
                _copy(lambda a, b, c, k=INT[wide]: a.astype(k) * b.astype(k) + c))  # fmt: skip
        if t[0] == "s":
            _op(f"neg.{t}", f"{t} {t}", _ufunc(np.negative))
            _op(f"abs.{t}", f"{t} {t}", _ufunc(np.abs))
    for t in ("b16", "b32", "b64", "pred"):
        for name, function in {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}.items():
            _op(f"{name}.{t}", f"{t} {t} {t}", _ufunc(function))
        _op(f"not.{t}", f"{t} {t}", _ufunc(np.invert))
        if t != "pred":
            _op(f"shl.{t}", f"{t} {t} u32", _copy(_shift(left=True)))
            _op(f"shr.{t}", f"{t} {t} u32", _copy(_shift(left=False)))
    for t in INT:
        names = dict(ORDER if t[0] != "b" else {"eq": np.equal}, ne=np.not_equal)
        names |= {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal} if t[0] == "u" else {}
        for name, compare in names.items() if t[1:] != "8" else ():
            _setp(name, t, compare)
    _op("bfe.u32", "u32 u32 u32 u32", _copy(_bfe))
    _op("bfe.s32", "s32 s32 u32 u32", _copy(_bfe))
    _op("bfi.b32", "b32 b32 b32 u32 u32", _copy(_bfi))
    _op("prmt.b32", "b32 b32 b32 b32", _copy(_prmt))
    _op("lop3.b32", "b32 b32 b32 b32 b32", _copy(_lop3))
    _op("popc.b32", "u32 b32", _copy(lambda a: sum((a >> np.uint32(i)) & np.uint32(1) for i in range(32))))
    _op("clz.b32", "u32 b32", _copy(lambda a: 32 - np.ceil(np.log2(a.astype(np.float64) + 1)).astype(np.uint32)))
    for side in "lr":
        for mode in ("wrap", "clamp"):
            _op(f"shf.{side}.{mode}.b32", "b32 b32 b32 u32", _copy(_funnel(side == "l", mode == "wrap")))


def _fill_floats() -> None:
    for t in ("f32", "f64"):
        two, three = f"{t} {t} {t}", f"{t} {t} {t} {t}"
        plain = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
        for name, function in plain.items():
            _op(f"{name}.{t}", two, _ufunc(function))
            _op(f"{name}.rn.{t}", two, _ufunc(function))
        _op(f"div.rn.{t}", two, _ufunc(np.divide))
        _op(f"sqrt.rn.{t}", f"{t} {t}", _ufunc(np.sqrt))
        _op(f"rcp.rn.{t}", f"{t} {t}", _ufunc(np.reciprocal))
        _op(f"neg.{t}", f"{t} {t}", _ufunc(np.negative))
        _op(f"abs.{t}", f"{t} {t}", _ufunc(np.abs))
        _op(f"copysign.{t}", two, _copy(lambda a, b: np.copysign(b, a)))
        _op(f"fma.rn.{t}", three, _fma32 if t == "f32" else _copy(np.frompyfunc(_fma64, 3, 1)))
        _op(f"min.{t}", two, _extreme(np.fmin, np.bitwise_or))
        _op(f"max.{t}", two, _extreme(np.fmax, np.bitwise_and))
    _op("min.NaN.f32", "f32 f32 f32", _extreme(np.minimum, np.bitwise_or))
    _op("max.NaN.f32", "f32 f32 f32", _extreme(np.maximum, np.bitwise_and))
    approximate = {"ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt, "sin": np.sin, "cos": np.cos, "tanh": np.tanh}
    approximate |= {"rcp": lambda a: 1 / a, "rsqrt": lambda a: 1 / np.sqrt(a)}
    for name, function in approximate.items():
        _op(f"{name}.approx.f32", "f32 f32", _exact(function))
    for name in ("full", "approx"):
        _op(f"div.{name}.f32", "f32 f32 f32", _ufunc(np.divide))
    for mnemonic in [m for m in OPS if m.endswith(".f32") and not m.startswith(("setp", "copysign", "tanh"))]:
        kinds, function = OPS[mnemonic]
        stem = mnemonic.removesuffix(".f32")
        name = f"{stem.removesuffix('.NaN')}.ftz.NaN.f32" if stem.endswith(".NaN") else f"{stem}.ftz.f32"
        OPS[name] = (kinds, _ftz(function))
    small = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "fma.rn": lambda a, b, c: a * b + c,
             "neg": np.negative, "abs": np.abs, "min": np.fmin, "max": np.fmax, "min.NaN": np.minimum,
             "max.NaN": np.maximum}  # fmt: skip
    for name, function in small.items():
        for t in ("f16", "bf16", "f16x2", "bf16x2"):  # in float64, rounded once
            arity = 1 if name in ("neg", "abs") else 3 if name == "fma.rn" else 2
            wrapped = _copy(_bf16(function)) if t.startswith("bf") else _exact(function)
            for mnemonic in (f"{name}.{t}", f"{name}.rn.{t}") if name in ("add", "sub", "mul") else (f"{name}.{t}",):
                _op(mnemonic, " ".join([t] * (arity + 1)), wrapped)
    for t in ("f16", "bf16", "f32", "f64"):
        for name, compare in ORDER.items():
            _setp(name, t, compare)
            _setp(name + "u", t, lambda a, b, compare=compare: compare(a, b) | _unordered(a, b))
        _setp("ne", t, lambda a, b: (a != b) & ~_unordered(a, b))
        _setp("neu", t, np.not_equal)
        _setp("nan", t, _unordered)
        _setp("num", t, lambda a, b: ~_unordered(a, b))


def _fill_moves() -> None:
    for t in KINDS:
        if t not in ELEMENTS and t[1:] != "8":
            _op(f"mov.{t}", f"{t} {t}", _copy(lambda a: a))
            if t != "pred":
                _op(f"selp.{t}", f"{t} {t} {t} pred", _copy(lambda a, b, p: np.where(p, a, b)))
    for to in (t for t in INT if t[0] != "b"):
        for source in (t for t in INT if t[0] != "b"):
            _op(f"cvt.{to}.{source}", f"{to} {source}", _copy(lambda a, k=INT[to]: a.astype(k)))
        for t in ("f32", "f64"):
            _op(f"cvt.rn.{t}.{to}", f"{t} {to}", _copy(lambda a, k=KINDS[t]: a.astype(k)))
            for word, rounding in {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}.items():
                if to[1:] != "8":
                    _op(f"cvt.{word}.{to}.{t}", f"{to} {t}", _copy(_to_integer(rounding, to)))
                _op(f"cvt.{word}.{t}.{t}", f"{t} {t}", _copy(rounding))
    _op("cvt.f32.f16", "f32 f16", _copy(lambda a: a))
    _op("cvt.f32.bf16", "f32 bf16", _copy(widen_bf16))
    _op("cvt.f64.f32", "f64 f32", _copy(lambda a: a))
    _op("cvt.rn.f32.f64", "f32 f64", _copy(lambda a: a))
    _op("cvt.rn.f16.f32", "f16 f32", _copy(lambda a: a))
    _op("cvt.rn.bf16.f32", "bf16 f32", _copy(round_bf16))
    _op("cvt.rn.f16x2.f32", "f16x2 f32 f32", _pair(lambda a: a))  # the first source is the upper half
    _op("cvt.rn.bf16x2.f32", "bf16x2 f32 f32", _pair(round_bf16))
    _op("cvta.to.global.u64", "u64 u64", _copy(lambda a: a))
    _op("cvta.global.u64", "u64 u64", _copy(lambda a: a))


def _pair(function: Callable) -> Callable:
    def run(out, high, low):
        high, low = function(high), function(low)
        out[1::2], out[::2] = high, low

    return run


_fill_integers()
_fill_floats()
_fill_moves()

MEMORY = re.compile(
    r"(?P<what>ld|st)\.(?P<space>global|shared|param)(\.(ca|cg|cs|lu|cv|wb|wt|nc))?"
    r"(\.L1::(evict_(normal|unchanged|first|last)|no_allocate))?(?P<hint>\.L2::cache_hint)?(\.L2::(64|128|256)B)?"
    r"(\.v(?P<count>[24]))?\.(?P<kind>[bsu](8|16|32|64)|f(32|64))"
)
LDMATRIX = re.compile(r"ldmatrix\.sync\.aligned\.m8n8\.x(?P<count>[124])\.shared\.b16")
SHUFFLE = re.compile(r"shfl\.sync\.(?P<mode>bfly|idx|down|up)\.b32")
POLICY = re.compile(r"createpolicy\.fractional\.L2::evict_(normal|unchanged|first|last)\.b64")
DIRECTIVES = {".version", ".target", ".address_size", ".visible", ".param", ".reqntid", ".maxntid", ".maxnreg",
              ".minnctapersm", ".loc", ".file", ".section", ".b8", ".b16", ".b32", ".b64", ".global",
              ".pragma"}  # fmt: skip


# ---- text to program -------------------------------------------------------------------------------------------------


@dataclass
class _Instruction:
    text: str  # with the line of the kernel that it is for
    mnemonic: str
    operands: list[str]
    guard: str | None
    negated: bool


@dataclass
class _Block:
    """Instructions that run one after another; the last may be a branch, a barrier or a return."""

    body: list[_Instruction] = field(default_factory=list)
    end: _Instruction | None = None


@dataclass
class _Program:
    blocks: list[_Block]
    labels: dict[str, int]  # label: number of its block
    registers: dict[str, int]  # prefix or name: bytes, 0 for a predicate
    parameters: list[str]
    dynamic_shared: str | None  # name


@functools.lru_cache(maxsize=64)
def _parse(ptx: str, drop_barrier: int | None) -> _Program:
    program = _Program([_Block()], {}, {}, re.findall(r"^\s*\.param\b.*?(\w+),?$", ptx, re.M), None)
    targets = set(re.findall(r"\bbra(?:\.uni)?\s+([$%\w.]+)\s*;", ptx))
    line_of_kernel, barriers, inside = "", 0, False
    for line in ptx.splitlines():
        code, _, comment = (part.strip() for part in line.partition("//"))
        if code.startswith(".loc"):
            line_of_kernel = comment
        if code == "{":
            inside = True
        elif code.startswith(".reg "):
            for kind, name, many in re.findall(r"\.reg\s+\.(\w+)\s+([%\w$]+)(<\d+>)?\s*;", code):
                program.registers[name + "#" * bool(many)] = 0 if kind == "pred" else KINDS[kind].itemsize
        elif found := re.fullmatch(r"\.extern \.shared \.align \d+ \.b8 (\w+)\[\];", code):
            program.dynamic_shared = found[1]
        elif code.startswith("."):
            if code.split()[0] not in DIRECTIVES:
                raise UnknownInstruction(code)
        elif found := re.fullmatch(r"([$%\w.]+):", code):
            if found[1] in targets:
                program.blocks.append(_Block())
                program.labels[found[1]] = len(program.blocks) - 1
        elif inside and code != "}":
            for statement in filter(None, map(str.strip, code.split(";"))):
                instruction = _instruction(statement, line_of_kernel)
                if instruction.mnemonic == "bar.sync":
                    barriers += 1
                    if barriers - 1 == drop_barrier:
                        continue
                if instruction.mnemonic in ("bra", "bra.uni", "ret", "bar.sync"):
                    program.blocks[-1].end = instruction
                    program.blocks.append(_Block())
                else:
                    program.blocks[-1].body.append(instruction)
    if drop_barrier is not None and drop_barrier >= barriers:
        raise ValueError(f"drop_barrier: there are {barriers}")
    return program


def _instruction(statement: str, line: str) -> _Instruction:
    text = f"{statement} ({line})" if line else statement
    found = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)(?:\s+(.*))?", statement, re.S)
    if not found:
        raise UnknownInstruction(text)
    operands = [a.strip() for a in re.split(r",(?![^{]*\})(?![^\[]*\])", found[4] or "") if a.strip()]
    return _Instruction(text, found[3], operands, found[2], bool(found[1]))


# ---- global memory ---------------------------------------------------------------------------------------------------

WINDOW = 40  # each parameter's addresses: 2**40 bytes, its storage in the middle
MANY = -1


@dataclass
class Traffic:
    """What a launch moved between global memory and its threads through one parameter."""

    read: int = 0  # bytes that loads of active lanes asked for
    read_once: int = 0  # distinct bytes among them
    written: int = 0
    sectors: int = 0  # of 32 bytes, touched by each instruction of a warp, summed
    widths: set[int] = field(default_factory=set)  # bytes of one thread's accesses


class _Marks:
    """A number for each granule of a storage, 0 at first. The granule shrinks to the narrowest access so far."""

    def __init__(self, size: int):
        self.granule, self.values = 16, np.zeros(-(-size // 16), np.int32)

    def shrink(self, width: int) -> None:
        if width < self.granule:
            self.values, self.granule = np.repeat(self.values, self.granule // width), width

    def at(self, offset: np.ndarray, width: int) -> tuple[np.ndarray, int]:
        """Indices of the granules, so many for each access."""
        self.shrink(width)
        return _spread(offset // self.granule, width // self.granule)


def _spread(index: np.ndarray, count: int) -> tuple[np.ndarray, int]:
    return (index if count == 1 else (index[:, None] + np.arange(count)).ravel()), count


class _Storage:
    """A copy of a tensor's whole storage, at the same address modulo 256; written back when the launch is over."""

    def __init__(self, tensor: torch.Tensor):
        untyped = tensor.untyped_storage()
        self.tensor = torch.empty(0, dtype=torch.uint8).set_(untyped)
        self.first = untyped.data_ptr() % 256
        self.last = self.first + untyped.nbytes()
        self.bytes = np.zeros(-(-self.last // 256) * 256, np.uint8)
        self.bytes[self.first : self.last] = self.tensor.numpy()
        self.writers = _Marks(len(self.bytes))  # number of the thread in the grid, from 1
        self.written = False


@dataclass
class _Parameter:
    name: str
    storage: _Storage
    readers: _Marks  # number of the CTA, from 1; MANY
    traffic: Traffic


class _Global:
    def __init__(self, pointers: dict[str, torch.Tensor]):
        self.storages: dict[int, _Storage] = {}
        self.parameters: list[_Parameter] = []
        self.address: dict[str, int] = {}
        for name, tensor in pointers.items():
            key = tensor.untyped_storage().data_ptr() or id(tensor)
            if key not in self.storages:
                self.storages[key] = _Storage(tensor)
            storage = self.storages[key]
            inside = storage.first + tensor.storage_offset() * tensor.element_size()
            self.parameters.append(_Parameter(name, storage, _Marks(len(storage.bytes)), Traffic()))
            self.address[name] = self.start(len(self.parameters) - 1) + inside

    @staticmethod
    def start(index: int) -> int:
        return (index + 1 << WINDOW) + (1 << WINDOW - 1)

    def finish(self, describe: Callable[[int], str], threads: int) -> dict[str, Traffic]:
        """Loads of one CTA against the stores of another; the storages' bytes back to the tensors."""
        for parameter in self.parameters:
            read, write = parameter.readers, parameter.storage.writers
            parameter.traffic.read_once = int(np.count_nonzero(read.values)) * read.granule
            if parameter.storage.written and parameter.traffic.read:
                granule = min(read.granule, write.granule)
                read.shrink(granule)
                write.shrink(granule)
                writer = np.where(write.values == 0, 0, (write.values - 1) // threads + 1)
                clash = (writer != 0) & (read.values != 0) & (read.values != writer)
                if clash.any():
                    i = int(clash.argmax())
                    reader = "several CTAs" if read.values[i] == MANY else f"CTA {read.values[i] - 1}"
                    at = i * granule - parameter.storage.first
                    who = describe(int(write.values[i]) - 1)
                    raise Race(f"{parameter.name}: byte {at} of its storage is loaded by {reader} and stored by {who}")
        for storage in self.storages.values():
            if storage.written:
                storage.tensor.copy_(torch.from_numpy(storage.bytes[storage.first : storage.last]))
        return {parameter.name: parameter.traffic for parameter in self.parameters}


# ---- the machine -----------------------------------------------------------------------------------------------------

LANES = 1 << 15  # threads that run together: few enough for the caches, enough to hide the interpreter
SHARED = 1 << 16  # address of shared memory
POISON = {1: 0, 2: 0x7FAD, 4: 0x7FADBEEF, 8: 0x7FFDEADBEEFDEADB}  # registers at first: NaN, and no address
EPOCH, WARP_EPOCH = 32, 12  # a shared access's stamp: barriers passed, warp barriers passed, thread
SEVERAL, ALL = 1024, 4095  # in place of a thread: SEVERAL + warp, threads of one warp; ALL, of several


class _Machine:
    """Some CTAs of a launch, their lanes side by side."""

    def __init__(
        self, program: _Program, memory: _Global, constants: dict, grid: tuple, threads: int, shared: int, ctas
    ):
        self.program, self.memory, self.constants, self.threads = program, memory, constants, threads
        self.grid, self.shared_size = grid, shared
        self.lanes = ctas * threads
        self.registers: dict[str, np.ndarray] = {}
        self.thread = np.tile(np.arange(threads), ctas)
        self.cta = np.zeros(self.lanes, np.int64)  # number in the grid
        self.special = {f"%ctaid.{axis}": np.zeros(self.lanes, np.uint32) for axis in "xyz"}
        self.special |= {f"%nctaid.{axis}": np.full(self.lanes, n, np.uint32) for axis, n in zip("xyz", grid)}
        for axis in "yz":
            self.special |= {f"%tid.{axis}": np.zeros(self.lanes, np.uint32)}
            self.special |= {f"%ntid.{axis}": np.ones(self.lanes, np.uint32)}
        self.special["%tid.x"] = self.thread.astype(np.uint32)
        self.special["%ntid.x"] = np.full(self.lanes, threads, np.uint32)
        self.special["%laneid"] = (self.thread % 32).astype(np.uint32)
        self.stride = -(-shared // 16) * 16
        self.home = np.repeat(np.arange(ctas) * self.stride, threads)
        self.granule = self._shared_granule()
        self.blocks = [([self.decode(i) for i in block.body], self._end(block.end)) for block in program.blocks]

    def _shared_granule(self) -> int:
        widths = [16]
        for instruction in (i for block in self.program.blocks for i in block.body):
            if (found := MEMORY.fullmatch(instruction.mnemonic)) and found["space"] == "shared":
                widths.append(int(found["count"] or 1) * KINDS[found["kind"]].itemsize)
            elif LDMATRIX.fullmatch(instruction.mnemonic):
                widths.append(4)
        return min(widths)

    def start(self, first: int) -> None:
        """Lanes of the CTAs from `first` on, nothing run yet."""
        self.cta[:] = first + np.arange(self.lanes) // self.threads
        x, y, _ = self.grid
        for axis, value in zip("xyz", (self.cta % x, self.cta // x % y, self.cta // (x * y))):
            self.special[f"%ctaid.{axis}"][:] = value
        for register in self.registers.values():
            register[:] = POISON[register.itemsize]
        ctas = self.lanes // self.threads
        self.shared = np.zeros(ctas * self.stride, np.uint8)
        self.writers = np.full(ctas * self.stride // self.granule, -1, np.int64)
        self.readers = self.writers.copy()
        self.stamp = self.thread.astype(np.int64)
        self.exited = np.zeros(self.lanes, bool)

    def describe(self, lane: int) -> str:
        return _describe(int(self.cta[lane]) * self.threads + int(self.thread[lane]), self.threads, self.grid)

    # -- which lanes run next

    def run(self) -> None:
        groups: dict[int, np.ndarray | None] = {0: None}  # block: its lanes, None for all of them
        parked: dict[int, np.ndarray | None] = {}
        while groups or parked:
            if not groups:
                self._release(groups, parked)
                continue
            number = min(groups)
            mask = groups.pop(number)
            steps, end = self.blocks[number]
            for step in steps:
                step(mask)
            if end is None:
                self._join(groups, number + 1, mask)
                continue
            kind, target, guard = end
            taken, rest = (mask, _NONE) if guard is None else _split(guard(), mask)
            if kind == "bar":
                self._join(parked, number + 1, taken)
            elif kind == "bra":
                self._join(groups, target, taken)
            elif taken is not _NONE:
                self.exited |= True if taken is None else taken
            self._join(groups, number + 1, rest)

    @staticmethod
    def _join(groups: dict, number: int, mask) -> None:
        if mask is _NONE:
            return
        if mask is not None and number in groups:
            mask = mask | groups[number]
        groups[number] = None if mask is None or mask.all() else mask

    def _release(self, groups: dict, parked: dict) -> None:
        """Those at a barrier go on where a whole CTA is there."""
        released = False
        for number, mask in list(parked.items()):
            here = np.ones(self.lanes, bool) if mask is None else mask
            whole = np.repeat(here.reshape(-1, self.threads).all(1), self.threads)
            if whole.any():
                released = True
                self.stamp[whole] += 1 << EPOCH
                self._join(groups, number, whole)
                left = here & ~whole
                del parked[number]
                if left.any():
                    parked[number] = left
        if not released:
            number, mask = next(iter(parked.items()))
            lane = int(np.argmax(mask))
            cta = self.cta == self.cta[lane]
            text = self.program.blocks[number - 1].end.text
            there, returned = int((mask & cta).sum()), int((self.exited & cta).sum())
            counts = f"of {self.threads} threads {there} are there and {returned} have returned"
            raise Divergence(f"{text}: {self.describe(lane)} waits; {counts}")

    # -- instructions to closures

    def decode(self, instruction: _Instruction) -> Callable:
        """A function of the mask of the lanes that run, None for all."""
        mnemonic = instruction.mnemonic
        guard = self._guard(instruction)
        if mnemonic in OPS and not any("{" in a for a in instruction.operands):
            return self._arithmetic(instruction, guard)
        if mnemonic in ("mov.b32", "mov.b64"):
            plain = self._pack(instruction)
        elif found := MEMORY.fullmatch(mnemonic):
            plain = self._memory(instruction, found)
        elif found := LDMATRIX.fullmatch(mnemonic):
            plain = self._ldmatrix(instruction, int(found["count"]))
        elif found := SHUFFLE.fullmatch(mnemonic):
            plain = self._shuffle(instruction, found["mode"])
        elif POLICY.fullmatch(mnemonic):
            return lambda mask: None
        elif mnemonic == "bar.warp.sync":
            plain = self._warp_barrier(instruction)
        else:
            raise UnknownInstruction(instruction.text)
        if guard is None:
            return plain

        def guarded(mask):
            taken, _ = _split(guard(), mask)
            if taken is not _NONE:
                plain(taken)

        return guarded

    def _guard(self, instruction: _Instruction) -> Callable | None:
        if instruction.guard is None:
            return None
        predicate = self._register(instruction.guard, instruction)
        return (lambda: ~predicate) if instruction.negated else (lambda: predicate)

    def _end(self, instruction: _Instruction | None):
        if instruction is None:
            return None
        kind, operands = instruction.mnemonic.split(".")[0], instruction.operands
        expected = {"bra": 1, "ret": 0, "bar": len(operands)}[kind]
        if len(operands) != expected or (kind == "bar" and operands not in (["0"], ["0", str(self.threads)])):
            raise UnknownInstruction(instruction.text)
        if kind == "bra" and operands[0] not in self.program.labels:
            raise UnknownInstruction(instruction.text)
        target = self.program.labels[operands[0]] if kind == "bra" else None
        return kind, target, self._guard(instruction)

    def _register(self, name: str, instruction: _Instruction) -> np.ndarray:
        if name not in self.registers:
            width = self.program.registers.get(name, self.program.registers.get(re.sub(r"\d+$", "#", name)))
            if width is None:
                raise UnknownInstruction(f"{name} in {instruction.text}")
            self.registers[name] = np.zeros(self.lanes, ITEM[width] if width else bool)
        return self.registers[name]

    def _source(self, text: str, kind: str, instruction: _Instruction) -> np.ndarray:
        """A register's lanes seen as `kind`, or a constant of one element."""
        if text in self.special:
            return self.special[text].view(KINDS[kind])
        if text.startswith("%") or text in self.program.registers:
            register = self._register(text, instruction)
            if (register.dtype == bool) != (kind == "pred"):
                raise UnknownInstruction(instruction.text)
            seen = register.view(KINDS[kind])
            return seen if len(seen) == self.lanes * ELEMENTS.get(kind, 1) else seen[:: len(seen) // self.lanes]
        bits = self._constant(text, kind, instruction)
        if kind == "pred":
            return np.array([bits != 0])
        if kind in ELEMENTS:
            return np.full(self.lanes, bits, np.uint32).view(KINDS[kind])
        size = KINDS[kind].itemsize
        return np.array([bits % (1 << 8 * size)], ITEM[size]).view(KINDS[kind])

    def _constant(self, text: str, kind: str, instruction: _Instruction) -> int:
        if text == self.program.dynamic_shared:
            return SHARED
        if found := re.fullmatch(r"0([fd])([0-9A-Fa-f]{8}|[0-9A-Fa-f]{16})", text):
            if kind[-2:] not in ({"f": ("32",), "d": ("64",)}[found[1]]) or len(found[2]) * 4 != int(kind[-2:]):
                raise UnknownInstruction(instruction.text)
            return int(found[2], 16)
        if not re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)", text) or kind in ("f32", "f64"):
            raise UnknownInstruction(f"{text} in {instruction.text}")
        return int(text, 0)

    def _arithmetic(self, instruction: _Instruction, guard: Callable | None) -> Callable:
        kinds, function = OPS[instruction.mnemonic]
        if len(instruction.operands) != len(kinds):
            raise UnknownInstruction(instruction.text)
        sources = [self._source(a, kind, instruction) for a, kind in zip(instruction.operands[1:], kinds[1:])]
        register, dtype = self._register(instruction.operands[0], instruction), KINDS[kinds[0]]
        if (register.dtype == bool) != (kinds[0] == "pred"):
            raise UnknownInstruction(instruction.text)
        each = ELEMENTS.get(kinds[0], 1)
        whole = register.itemsize == dtype.itemsize * each
        if not whole and (each > 1 or dtype.kind not in "iu" or register.itemsize < dtype.itemsize):
            raise UnknownInstruction(instruction.text)
        # a register wider than the type takes the result extended, by the type's sign
        out = register.view(dtype if whole else f"{dtype.kind}{register.itemsize}")

        def run(mask):
            if guard is not None:
                mask, _ = _split(guard(), mask)
            if mask is _NONE:
                return
            if mask is None and whole:
                function(out, *sources)
                return
            result = np.empty(self.lanes * each, dtype)
            function(result, *sources)
            if each > 1:
                np.copyto(register, result.view(register.dtype), where=_where(mask))
            else:
                np.copyto(out, result, where=_where(mask))

        return run

    def _pack(self, instruction: _Instruction) -> Callable:
        """mov between a register and the parts in braces, the lowest first."""
        to, source = instruction.operands
        packs = source.startswith("{")
        parts = [a.strip() for a in (source if packs else to).strip("{} ").split(",")]
        one = self._register(to if packs else source, instruction)
        size = int(instruction.mnemonic[5:]) // 8 // len(parts)
        columns = one.view(ITEM[size]).reshape(-1, len(parts))
        if packs:
            sources = [self._source(a, f"b{size * 8}", instruction) for a in parts]
            pairs = [(columns[:, i], a) for i, a in enumerate(sources)]
        else:
            pairs = [(self._register(a, instruction), columns[:, i]) for i, a in enumerate(parts) if a != "_"]
        if one.itemsize * 8 != int(instruction.mnemonic[5:]) or any(a.itemsize != size for p in pairs for a in p):
            raise UnknownInstruction(instruction.text)

        def run(mask):
            for out, value in pairs:
                np.copyto(out, value, where=_where(mask))

        return run

    def _address(self, text: str, instruction: _Instruction) -> tuple[np.ndarray, int]:
        found = re.fullmatch(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\d+)\s*)?\]", text)
        if not found:
            raise UnknownInstruction(instruction.text)
        if found[1] == self.program.dynamic_shared:
            return np.full(self.lanes, SHARED, np.int64), int(found[2] or 0)
        register = self._register(found[1], instruction)
        if register.itemsize not in (4, 8):
            raise UnknownInstruction(instruction.text)
        return register if register.itemsize == 4 else register.view(np.int64), int(found[2] or 0)

    def _memory(self, instruction: _Instruction, found: re.Match) -> Callable:
        store, count, kind = found["what"] == "st", int(found["count"] or 1), found["kind"]
        operands = instruction.operands[: -1 if found["hint"] else None]
        if len(operands) != 2:
            raise UnknownInstruction(instruction.text)
        place, data = operands if store else reversed(operands)
        names = [a.strip() for a in data.strip("{} ").split(",")]
        size = KINDS[kind].itemsize
        if len(names) != count or (found["space"] == "param" and (store or count > 1)):
            raise UnknownInstruction(instruction.text)
        if found["space"] == "param":
            return self._parameter(instruction, place, names[0], kind)
        address, offset = self._address(place, instruction)
        access = self._global if found["space"] == "global" else self._shared
        if store:
            sources = [self._source(a, f"b{size * 8}", instruction) for a in names]

            def run(mask):
                pick = slice(None) if mask is None else np.flatnonzero(mask)
                rows = np.empty((self.lanes if mask is None else len(pick), count), ITEM[size])
                for i, source in enumerate(sources):
                    rows[:, i] = source[pick] if len(source) > 1 else source
                access(instruction, address[pick].astype(np.int64) + offset, pick, mask, count * size, rows)

            return run
        registers = [self._register(a, instruction) for a in names]
        if any(a.dtype == bool or a.itemsize < size for a in registers):
            raise UnknownInstruction(instruction.text)
        letter = "i" if kind[0] == "s" else "u"  # into a wider register: with the sign, or zeros
        registers = [a.view(f"{letter}{a.itemsize}") for a in registers]

        def run(mask):
            pick = slice(None) if mask is None else np.flatnonzero(mask)
            items = access(instruction, address[pick].astype(np.int64) + offset, pick, mask, count * size, None)
            rows = items.view(f"{letter}{size}").reshape(-1, count)
            for i, register in enumerate(registers):
                register[pick] = rows[:, i]

        return run

    def _parameter(self, instruction: _Instruction, place: str, name: str, kind: str) -> Callable:
        raw = self.constants.get(place.strip("[] "))
        dtype, register = KINDS[kind], self._register(name, instruction)
        if raw is None or len(raw) < dtype.itemsize or register.itemsize < dtype.itemsize:
            raise UnknownInstruction(instruction.text)
        value = np.frombuffer(raw[: dtype.itemsize], dtype)
        register = register.view(np.dtype(f"{'u' if dtype.kind == 'f' else dtype.kind}{register.itemsize}"))
        value = value.view(ITEM[dtype.itemsize]) if dtype.kind == "f" else value
        return lambda mask: np.copyto(register, value, where=_where(mask))

    # -- accesses: `pick` selects the active lanes, `address` is theirs; `rows` is what a store writes

    def _global(self, instruction, address, pick, mask, width, rows):
        if not len(address):
            return np.empty(0, ITEM[width])
        window = (address >> WINDOW) - 1
        w = int(window[0])
        if (window != w).any():
            return self._several_tensors(instruction, address, window, pick, width, rows)
        if not 0 <= w < len(self.memory.parameters):
            value, lane = int(address[0]), int(np.arange(self.lanes)[pick][0])
            raise OutOfBounds(f"{instruction.text}: address {value:#x} near no tensor, {self.describe(lane)}")
        parameter = self.memory.parameters[w]
        storage, traffic = parameter.storage, parameter.traffic
        offset = address - self.memory.start(w)
        name, place = f"{parameter.name}'s storage", offset - storage.first
        size = storage.last - storage.first
        self._check(
            (place < 0) | (place + width > size), OutOfBounds, instruction, place, pick, f"of the {size} of {name}"
        )
        self._check((offset & (width - 1)) != 0, Misaligned, instruction, place, pick, f"of {name}, {width} at once")
        traffic.sectors += self._sectors(address, pick, mask)
        traffic.widths.add(width)
        data = storage.bytes.view(ITEM[width])
        if rows is None:
            traffic.read += len(address) * width
            self._mark_reads(parameter.readers, offset, width, self.cta[pick])
            return data[offset // width]
        traffic.written += len(address) * width
        storage.written = True
        self._mark_writes(instruction, parameter, offset, width, pick)
        data[offset // width] = rows.view(ITEM[width])[:, 0]

    def _several_tensors(self, instruction, address, window, pick, width, rows):
        """An access whose lanes point to several tensors: one after another."""
        lanes, out = np.arange(self.lanes)[pick], np.empty(len(address), ITEM[width])
        for here in (window == w for w in np.unique(window)):
            mask = np.zeros(self.lanes, bool)
            mask[lanes[here]] = True
            part = None if rows is None else rows[here]
            got = self._global(instruction, address[here], lanes[here], mask, width, part)
            if rows is None:
                out[here] = got
        return out

    def _sectors(self, address, pick, mask) -> int:
        sector = address >> 5
        off = 0
        if mask is not None:
            every = np.full(self.lanes, 1 << 60)
            every[pick] = sector
            sector = every
            off = int((~mask).reshape(-1, 32).any(1).sum())
        sector = sector.reshape(-1, 32)
        step = np.diff(sector, axis=1)
        if (step < 0).any():
            step = np.diff(np.sort(sector, axis=1), axis=1)
        return int(np.count_nonzero(step)) + len(sector) - off

    @staticmethod
    def _mark_reads(marks: _Marks, offset, width, cta) -> None:
        index, count = marks.at(offset, width)
        mine = np.repeat(cta + 1, count).astype(np.int32) if count > 1 else (cta + 1).astype(np.int32)
        before = marks.values[index]
        marks.values[index] = mine
        clash = (marks.values[index] != mine) | ((before != 0) & (before != mine))
        if clash.any():
            marks.values[index[clash]] = MANY

    def _mark_writes(self, instruction, parameter: _Parameter, offset, width, pick) -> None:
        marks = parameter.storage.writers
        index, count = marks.at(offset, width)
        mine = np.repeat((self.cta[pick] * self.threads + self.thread[pick] + 1).astype(np.int32), count)
        before = marks.values[index]
        marks.values[index] = mine
        after = marks.values[index]
        if before.any() or (after != mine).any():
            i = int(np.argmax((before != 0) | (after != mine)))
            at = int(index[i]) * marks.granule - parameter.storage.first
            threads = (int(t) - 1 for t in (before[i] or after[i], mine[i]))
            one, two = (_describe(t, self.threads, self.grid) for t in threads)
            raise WrittenTwice(f"{instruction.text}: byte {at} of {parameter.name}'s storage, by {one} and {two}")

    def _shared(self, instruction, address, pick, mask, width, rows):
        offset, size = address - SHARED, self.shared_size
        if not len(offset):
            return np.empty(0, ITEM[width])

        def check(bad, error):
            self._check(bad, error, instruction, offset, pick, f"of {size} shared", len(bad) // len(offset))

        check((offset < 0) | (offset + width > size), OutOfBounds)
        check((offset & (width - 1)) != 0, Misaligned)
        place = offset + self.home[pick]
        index, count = _spread(place // self.granule, width // self.granule)
        mine, wrote = np.repeat(self.stamp[pick], count), self.writers[index]
        check(_unordered_access(wrote, mine), Race)
        data, at = self.shared.view(ITEM[width]), place // width
        if rows is None:
            check(wrote < 0, Uninitialized)
            _mark_shared_reads(self.readers, index, mine)
            return data[at]
        check(_unordered_access(self.readers[index], mine), Race)
        self.writers[index] = mine
        data[at] = rows.view(ITEM[width])[:, 0]
        # threads that hold the same value may store it together: Triton does where a layout repeats it
        check((data[at].view(rows.dtype).reshape(rows.shape) != rows).any(1), Race)

    def _check(self, bad, error, instruction, offset, pick, place: str, count: int = 1) -> None:
        """Raises for the first access that is bad; `count` entries of `bad` are of one access."""
        if bad.any():
            i = int(np.argmax(bad)) // count
            lane = int(np.arange(self.lanes)[pick][i])
            raise error(f"{instruction.text}: byte {int(offset[i])} {place}, {self.describe(lane)}")

    # -- warps

    def _whole_warps(self, instruction: _Instruction, mask) -> None:
        if mask is not None:
            warps = mask.reshape(-1, 32)
            broken = warps.any(1) & ~warps.all(1)
            if broken.any():
                lane = int(np.argmax(broken)) * 32
                raise Divergence(f"{instruction.text}: only a part of the warp of {self.describe(lane)} is here")

    def _warp_barrier(self, instruction: _Instruction) -> Callable:
        if instruction.operands not in (["-1"], ["0xffffffff"]):
            raise UnknownInstruction(instruction.text)

        def run(mask):
            self._whole_warps(instruction, mask)
            self.stamp[slice(None) if mask is None else mask] += 1 << WARP_EPOCH

        return run

    def _shuffle(self, instruction: _Instruction, mode: str) -> Callable:
        if len(instruction.operands) != 5 or instruction.operands[4] not in ("-1", "0xffffffff"):
            raise UnknownInstruction(instruction.text)
        to, _, valid = instruction.operands[0].partition("|")
        out = self._register(to, instruction)
        inside = self._register(valid, instruction) if valid else None
        value, by, clamp = (self._source(a, "b32", instruction) for a in instruction.operands[1:4])
        lane, constant = self.special["%laneid"].astype(np.int64), len(by) == len(clamp) == 1

        def partner():
            b, c = by.astype(np.int64) & 31, clamp.astype(np.int64)
            segment, limit = (c >> 8) & 31, c & 31
            last = (lane & segment) | (limit & ~segment)
            first = lane & segment
            j = {"bfly": lane ^ b, "idx": first | (b & ~segment), "down": lane + b, "up": lane - b}[mode]
            ok = j >= last if mode == "up" else j <= last
            return np.arange(self.lanes) - lane + np.where(ok, j, lane), ok

        known = partner() if constant else None

        def run(mask):
            self._whole_warps(instruction, mask)
            index, ok = known or partner()
            np.copyto(out, value[index] if len(value) > 1 else value, where=_where(mask))
            if inside is not None:
                np.copyto(inside, ok, where=_where(mask))

        return run

    def _ldmatrix(self, instruction: _Instruction, count: int) -> Callable:
        """Row t of matrix j lies where thread 8 j + t points; each thread gets 4 bytes of row t // 4 of each."""
        data, place = instruction.operands
        registers = [self._register(a.strip(), instruction) for a in data.strip("{} ").split(",")]
        address, offset = self._address(place, instruction)
        if len(registers) != count or any(a.itemsize != 4 or a.dtype == bool for a in registers):
            raise UnknownInstruction(instruction.text)
        lane = self.thread % 32

        def run(mask):
            self._whole_warps(instruction, mask)
            pick = slice(None) if mask is None else np.flatnonzero(mask)
            for j, register in enumerate(registers):
                row = address[np.arange(self.lanes) - lane + 8 * j + lane // 4].astype(np.int64)[pick] + offset
                self._check((row & 15) != 0, Misaligned, instruction, row - SHARED, pick, "shared, a row of 16")
                register[pick] = self._shared(instruction, row + 4 * (lane % 4)[pick], pick, mask, 4, None)

        return run


_NONE = object()  # no lane


def _where(mask: np.ndarray | None):
    return True if mask is None else mask


def _split(guard: np.ndarray, mask: np.ndarray | None) -> tuple:
    """The lanes of the mask whose guard is true, and the others; None where that is every lane, _NONE where none."""
    yes, no = (guard.copy(), ~guard) if mask is None else (guard & mask, mask & ~guard)
    if not no.any():
        return mask, _NONE
    if not yes.any():
        return _NONE, mask
    return yes, no


def _warp(stamp: np.ndarray) -> np.ndarray:
    code = stamp & ((1 << WARP_EPOCH) - 1)
    return np.where(code < SEVERAL, code >> 5, code - SEVERAL)


def _unordered_access(before: np.ndarray, mine: np.ndarray) -> np.ndarray:
    """Whether another thread's access has neither a barrier nor, in one warp, a warp's barrier between it and this."""
    clash = (before >> EPOCH) == (mine >> EPOCH)
    if clash.any():
        threads = (1 << WARP_EPOCH) - 1
        clash &= (before & threads) != (mine & threads)
        clash &= (_warp(before) != _warp(mine)) | (before >> WARP_EPOCH == mine >> WARP_EPOCH)
    return clash


def _mark_shared_reads(readers: np.ndarray, index: np.ndarray, mine: np.ndarray) -> None:
    before = readers[index]
    readers[index] = mine
    for other in (readers[index], before):
        shared = ((other >> EPOCH) == (mine >> EPOCH)) & (other != mine)
        if not shared.any():
            continue
        at, me, other = index[shared], mine[shared], other[shared]
        threads = (1 << WARP_EPOCH) - 1
        several = (me & ~threads) | (SEVERAL + _warp(me))
        differs = _warp(other) != _warp(me)
        readers[at[~differs]] = np.maximum(readers[at[~differs]], several[~differs])
        readers[at[differs]] = me[differs] | threads


def _describe(number: int, threads: int, grid: tuple) -> str:
    cta = number // threads
    return f"CTA ({cta % grid[0]}, {cta // grid[0] % grid[1]}, {cta // (grid[0] * grid[1])}) thread {number % threads}"


# ---- launches --------------------------------------------------------------------------------------------------------


def execute(
    ptx: str,
    parameters: list,
    values: dict,
    grid: tuple,
    num_threads: int,
    shared: int,
    drop_barrier: int | None = None,
) -> dict[str, Traffic]:
    """Runs the kernel in place on the tensors in `values` (name: CPU tensor, int or float); traffic by parameter.

    parameters: (name, Triton type) in the order of the PTX's own. drop_barrier: leave out this bar.sync of the text.
    """
    grid = (*grid, 1, 1)[:3]
    program = _parse(ptx, drop_barrier)
    memory = _Global({name: values[name] for name, kind in parameters if kind.startswith("*")})
    raw = [_raw(memory.address.get(name, values[name]), kind) for name, kind in parameters]
    raw += [bytes(8)] * (len(program.parameters) - len(raw))  # Triton's scratch pointers, not used
    constants = dict(zip(program.parameters, raw))
    total = grid[0] * grid[1] * grid[2]
    if total * num_threads >= 1 << 31:
        raise ValueError(f"{total * num_threads} threads")
    step = max(1, min(total, LANES // num_threads))
    machine = None
    with np.errstate(all="ignore"):
        for first in range(0, total, step):
            count = min(step, total - first)
            if machine is None or count != step:
                machine = _Machine(program, memory, constants, grid, num_threads, shared, count)
            machine.start(first)
            machine.run()
    return memory.finish(lambda thread: _describe(thread, num_threads, grid), num_threads)


def _raw(value, kind: str) -> bytes:
    if kind.startswith("*"):
        return value.to_bytes(8, "little")
    if kind in ("fp32", "fp64"):
        return np.dtype({"fp32": "f4", "fp64": "f8"}[kind]).type(value).tobytes()
    size = max(int(kind[1:]) // 8, 1)
    return (int(value) % (1 << 8 * size)).to_bytes(size, "little")


class Emulated:
    """Stands in for a @triton.jit kernel: `Emulated(kernel)[grid](*args, **kwargs)` compiles and runs it on the CPU."""

    def __init__(self, kernel, drop_barrier: int | None = None):
        self.kernel, self.drop_barrier = kernel, drop_barrier
        self.launches: list[tuple[str, tuple, dict[str, Traffic]]] = []

    def __getitem__(self, grid: tuple) -> Callable:
        def launch(*args, **kwargs):
            compiled = aot.compile_launch(self.kernel, args, kwargs, "sm_80")
            names = self.kernel.signature.parameters
            bound = self.kernel.signature.bind(*args, **{n: value for n, value in kwargs.items() if n in names})
            bound.apply_defaults()
            source, threads = compiled.asm["ptx"], 32 * compiled.num_warps
            launched = source, compiled.parameters, bound.arguments, grid, threads, compiled.shared
            traffic = execute(*launched, self.drop_barrier)
            self.launches.append((compiled.name, tuple(grid), traffic))

        return launch

"""The arithmetic of the PTX that Triton makes of the kernels: OPS[mnemonic] = kinds of the operands, and a function.

The first kind is the destination's. A kind is how a register's bits are seen: bfloat16, which NumPy lacks, as uint16;
two halves as a row of two, the lower first. A function takes an array for each source, of one number for each lane or
one for all; its result is converted to the destination, with one rounding.
"""

from collections.abc import Callable

import numpy as np

KINDS = {f"{sign}{bits}": np.dtype(f"{letter}{bits // 8}")
         for sign, letter in (("s", "i"), ("u", "u"), ("b", "u")) for bits in (16, 32, 64)}  # fmt: skip
KINDS |= {"pred": np.dtype(bool), "f16": np.dtype("f2"), "bf16": np.dtype("u2"), "f32": np.dtype("f4")}
KINDS |= {"f16x2": np.dtype(("f2", 2)), "bf16x2": np.dtype(("u2", 2)), "b16x2": np.dtype(("u2", 2))}
OPS: dict[str, tuple[list[str], Callable]] = {}


def _widen(a: np.ndarray) -> np.ndarray:
    """bfloat16 to float32."""
    return (a.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _round(a: np.ndarray) -> np.ndarray:
    """float32 to bfloat16, to nearest even; NaN becomes 0x7FFF, as the hardware's does."""
    bits = a.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(a), np.uint32(0x7FFF), rounded).astype(np.uint16)


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """In float64, where the product is exact. A sum that float64 rounded onto the middle of two narrower numbers, whose
    last bits are then 0, is moved off it, so that rounding it once more gives what rounding once gives."""
    product = np.multiply(a, b, dtype=np.float64)
    total = product + c
    short = (total.view(np.int64) << 36) == 0
    if short.any():
        product, c = (np.broadcast_to(x, total.shape)[short].astype(np.float64) for x in (product, c))
        s = total[short]
        back = s - product
        error = (product - (s - back)) + (c - back)
        total[short] = np.where(error == 0, s, np.nextafter(s, np.copysign(np.inf, error)))
    return total


def _fma_bf16(*sources: np.ndarray) -> np.ndarray:
    """Through a float32 whose last bit says whether anything follows it: no second rounding to nearest."""
    exact = _fma(*map(_widen, sources))
    near = exact.astype(np.float32)
    toward_zero = near.view(np.uint32) - (np.abs(near) > np.abs(exact))
    return _round((toward_zero | (near != exact)).view(np.float32))


def _flushed(function: Callable) -> Callable:
    """Subnormal float32 sources and results are zero, the sign kept."""

    def flush(a):
        return np.where(np.abs(a) < np.float32(2.0**-126), np.copysign(np.float32(0), a), a)

    return lambda *sources: flush(function(*map(flush, sources)).astype(np.float32))


def _max(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of a NaN and a number, the number; +0 is more than -0."""
    equal = (a.view(np.uint32) & b.view(np.uint32)).view(np.float32)
    return np.where(a == b, equal, np.fmax(a, b))


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Towards zero. By zero: all ones, as the hardware's."""
    return np.where(b == 0, ~b, (a - np.fmod(a, b)) // b)


def _high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Upper half of the product."""
    bits = 8 * a.itemsize
    return np.multiply(a, b, dtype=f"{a.dtype.kind}{bits // 4}") >> bits


def _field(a: np.ndarray, at: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Bits of a, moved to the top of 64 and back: the sign is repeated where the type has one."""
    at, length = np.minimum(at & 255, 32), np.minimum(length & 255, 32)
    wide = a.astype(f"{a.dtype.kind}8")
    return ((wide << (64 - at - length)) >> (64 - length)) * (length > 0)


def _permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Each byte of the result is one of the eight of a and b, or that one's sign."""
    a, b, selector = np.broadcast_arrays(a, b, selector)
    nibble = (selector[:, None] >> (4 * np.arange(4))) & 15
    byte = np.take_along_axis(np.stack([a, b], -1).view(np.uint8), nibble & 7, 1)
    sign = np.where(byte & 128, 255, 0)
    return np.where(nibble & 8, sign, byte).astype(np.uint8).view(np.uint32)[:, 0]


def _same(a: np.ndarray) -> np.ndarray:
    return a


def _define(mnemonic: str, kinds: str, function: Callable, types: str = "-") -> None:
    for t in types.split():
        OPS[mnemonic.format(t)] = (kinds.format(t).split(), function)


BITS, WHOLE = "b16 b32 b64", "s16 s32 s64 u16 u32 u64"
for _name, _types, _function in (
    ("add", f"{WHOLE} f32 f16 f16x2", np.add), ("sub", f"{WHOLE} f32", np.subtract), ("mul.lo", WHOLE, np.multiply),
    ("mul.hi", "s16 u16 s32 u32", _high),
    ("min", "s32 u32", np.minimum), ("div", "s32 u32", _quotient), ("rem", "s32 u32", np.fmod),
    ("and", f"{BITS} pred", np.bitwise_and), ("or", f"{BITS} pred", np.bitwise_or),
    ("xor", f"{BITS} pred", np.bitwise_xor), ("mul", "f32", np.multiply), ("div.full", "f32", np.divide),
    ("max", "f32", _max),
):  # fmt: skip
    _define(_name + ".{}", "{0} {0} {0}", _function, _types)
for _name, _compare in {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}.items():
    _define(f"setp.{_name}.{{}}", "pred {0} {0}", _compare, f"{WHOLE} f32")
_define("setp.eq.{}", "pred {0} {0}", np.equal, f"{BITS} f32")
_define("setp.ne.{}", "pred {0} {0}", np.not_equal, BITS)
for _s, _wide in (("s32", "s64"), ("u32", "u64")):
    _define(f"mul.wide.{_s}", f"{_wide} {_s} {_s}", lambda a, b, k=KINDS[_wide]: np.multiply(a, b, dtype=k))
    _define(f"mad.wide.{_s}", f"{_wide} {_s} {_s} {_wide}",
            lambda a, b, c, k=KINDS[_wide]: np.multiply(a, b, dtype=k) + c)  # fmt: skip
    _define(f"bfe.{_s}", f"{_s} {_s} u32 u32", _field)
_define("mad.lo.{}", "{0} {0} {0} {0}", lambda a, b, c: a * b + c, "s32 s64")
_define("shl.{}", "{0} {0} u32", np.left_shift, BITS)  # NumPy too shifts out every bit where the distance is large
_define("shr.{}", "{0} {0} u32", np.right_shift, WHOLE)
_define("prmt.b32", "b32 b32 b32 b32", _permute)
_define("not.pred", "pred pred", np.invert)
_define("neg.{}", "{0} {0}", np.negative, "s32 s64 f32")
_define("abs.f32", "f32 f32", np.abs)
_define("ex2.approx.f32", "f32 f32", lambda a: np.exp2(a.astype(np.float64)))
_define("rsqrt.approx.ftz.f32", "f32 f32", _flushed(lambda a: 1 / np.sqrt(a.astype(np.float64))))
_define("fma.rn.{}", "{0} {0} {0} {0}", _fma, "f32 f16 f16x2")
_define("fma.rn.{}", "{0} {0} {0} {0}", _fma_bf16, "bf16 bf16x2")
_define("fma.rn.ftz.f32", "f32 f32 f32 f32", _flushed(_fma))
_define("mov.{}", "{0} {0}", _same, f"{BITS} {WHOLE} pred")
_define("selp.{}", "{0} {0} {0} pred", lambda a, b, p: np.where(p, a, b), f"{BITS} f32")
_define("ld.param.{}", "{0} {0}", _same, "b32 b64")
_define("ld.param.s32", "s64 s32", _same)
_define("pack", "b16x2 b16 b16", lambda low, high: np.stack([low, high], -1))  # these three: mov.b32 with braces
_define("low", "b16 b16x2", lambda a: a[:, 0])
_define("high", "b16 b16x2", lambda a: a[:, 1])
for _to in WHOLE.split():
    _define(f"cvt.{_to}.{{}}", f"{_to} {{0}}", _same, WHOLE)
_define("cvt.rn.f32.{}", "f32 {}", _same, "s32 s64 u32 u64")
_define("cvt.f32.f16", "f32 f16", _same)
_define("cvt.f32.bf16", "f32 bf16", _widen)
_define("cvt.rn.f16.f32", "f16 f32", _same)
_define("cvt.rn.bf16.f32", "bf16 f32", _round)
_define("cvt.rn.f16x2.f32", "f16x2 f32 f32", lambda high, low: np.stack([low, high], -1))
_define("cvt.rn.bf16x2.f32", "bf16x2 f32 f32", lambda high, low: np.stack([_round(low), _round(high)], -1))

"""Repairs to Triton 3.7's interpreter, without which a test that runs on it can pass on wrong numbers.

`repair()` makes float32 -> bfloat16 round to nearest even, as GPUs do and the interpreter does not. It makes three
things raise that the interpreter computes silently and wrongly, or that no GPU promises: arithmetic on bfloat16 values
and their sum (it works on their bit patterns, as integers), and a masked load without `other`.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle


def to_bfloat16(data: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 as uint16, to nearest even; NaN stays NaN."""
    bits = np.asarray(data, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)


def refuse_bfloat16(*values) -> None:
    for value in values:
        if getattr(value, "dtype", None) is not None and value.dtype.scalar == tl.bfloat16:
            raise TypeError("arithmetic on bfloat16: convert what was loaded with .to(tl.float32)")


def repair() -> None:
    convert = interpreter._convert_float
    binary, unary = InterpreterBuilder.binary_op, InterpreterBuilder.unary_op
    load, total = InterpreterBuilder.create_masked_load, ReduceOps.sum

    def convert_float(data, source, target, rounding):
        if source == tl.float32 and target == tl.bfloat16:
            return to_bfloat16(data)
        if source == tl.bfloat16 and target == tl.float32:
            return (np.asarray(data).astype(np.uint32) << 16).view(np.float32)
        return convert(data, source, target, rounding)

    def masked_load(self, pointers, mask, other, *rest):
        if other is None and not mask.data.all():
            raise TypeError("a masked load without other: what it gives where the mask is off is not defined")
        return load(self, pointers, mask, other, *rest)

    def checked(function):
        def call(self, *values):
            refuse_bfloat16(*(v for v in values if isinstance(v, TensorHandle)))
            return function(self, *values)

        return call

    def summed(self, value):
        refuse_bfloat16(value)
        return total(self, value)

    interpreter._convert_float = convert_float
    InterpreterBuilder.create_masked_load = masked_load
    InterpreterBuilder.binary_op, InterpreterBuilder.unary_op = checked(binary), checked(unary)
    ReduceOps.sum = summed

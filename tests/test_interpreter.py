"""Triton's interpreter: starts it, in a process of its own, on the cases of test_kernels.py; and tests its repairs."""

import os
import re
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from helpers import ROOT

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_on_the_interpreter():
    """All of test_kernels.py and of this file, where Triton interprets its kernels."""
    files = [str(ROOT / "tests" / name) for name in ("test_kernels.py", "test_interpreter.py")]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    counts = re.search(r"(\d+) passed, 1 skipped", done.stdout.splitlines()[-1])
    assert counts and int(counts[1]) > 50, done.stdout.splitlines()[-1]


if INTERPRETED:
    from emulator import interpreter
    from triton.runtime.errors import InterpreterError

    interpreter.repair()

    @triton.jit
    def copy(source, target, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(target + i, tl.load(source + i).to(target.dtype.element_ty))

    @triton.jit
    def add(source, target, N: tl.constexpr):
        i = tl.arange(0, N)
        value = tl.load(source + i)
        tl.store(target + i, value + value)

    @triton.jit
    def total(source, target, N: tl.constexpr):
        tl.store(target, tl.sum(tl.load(source + tl.arange(0, N)), 0))

    @triton.jit
    def half_masked(source, target, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(target + i, tl.load(source + i, i < N // 2))

    def test_rounds_to_nearest_even():
        """float32 -> bfloat16 and back as PyTorch does it: ties, subnormals, infinities and NaN among the values."""
        x = torch.randint(-(2**31), 2**31 - 1, (4096,), dtype=torch.int32).view(torch.float32)
        x[:6] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("inf"), float("nan"), 3.4e38, 1e-40])
        half = torch.empty(4096, dtype=torch.bfloat16)
        copy[(1,)](x, half, 4096)
        assert torch.equal(half.isnan(), x.isnan()) and torch.equal(half.nan_to_num(7), x.bfloat16().nan_to_num(7))
        back = torch.empty(4096)
        copy[(1,)](half, back, 4096)
        assert torch.equal(back.nan_to_num(7), half.float().nan_to_num(7))

    @pytest.mark.parametrize("kernel", [add, total], ids=["add", "sum"])
    def test_bfloat16_arithmetic_is_refused(kernel):
        """Left alone, the interpreter adds the bit patterns."""
        x = torch.ones(16, dtype=torch.bfloat16)
        with pytest.raises(InterpreterError, match="arithmetic on bfloat16"):
            kernel[(1,)](x, torch.zeros(16, dtype=torch.bfloat16), 16)
        kernel[(1,)](x.float(), out := torch.zeros(16), 16)
        assert out[0] in (2, 16)

    def test_masked_load_without_other_is_refused():
        with pytest.raises(InterpreterError, match="masked load without other"):
            half_masked[(1,)](torch.ones(16), torch.zeros(16), 16)

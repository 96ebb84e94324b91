"""bench/: what it counts, against bytes counted by hand."""

import re

import pytest
import torch
from helpers import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")
from bench import traffic


def test_eager_bytes_by_hand():
    """A product with a row, and a sum with itself: distinct inputs and outputs, views free, both directions."""
    a, row = torch.ones(4, 8, requires_grad=True), torch.ones(8)
    forward, backward, kept = traffic.step(lambda a, row: (a * row.expand(4, 8)).view(8, 4).cumsum(0), [a, row])
    assert (forward.bytes, forward.launches) == ((128 + 32 + 128) + (128 + 128), 2)
    # cumsum backward: flip, cumsum, flip; then the product with the row
    assert (backward.bytes, backward.launches) == (3 * 256 + (128 + 32 + 128), 4)
    assert kept == 0  # the row is shared


def test_kept_bytes_by_hand():
    """A product keeps both factors; what is kept twice counts once."""
    a, b = torch.ones(4, 8, requires_grad=True), torch.ones(4, 8, requires_grad=True)
    assert traffic.step(lambda a, b: a * b + a * a, [a, b]).kept == 2 * 128


def test_matmul_counts_as_flops():
    a, b = torch.ones(2, 3, requires_grad=True), torch.ones(3, 5)
    forward, backward, _ = traffic.step(torch.mm, [a, b])
    assert (forward.bytes, forward.flops, backward.flops) == (0, 2 * 2 * 3 * 5, 2 * 2 * 3 * 5)


@pytest.mark.parametrize("trained", [False, True])
def test_kernels_move_the_minimum(trained):
    """Beside it: two float32 numbers a token, the rows' index, and sums for the tables, written and read."""
    D, frames, tokens = 64, 3, 16
    cases = [*traffic.modulation_cases(trained, D, frames, tokens)]
    cases.append(traffic.norm_rope_case(trained, D, frames * tokens, K=16))
    for case in cases:
        forward, backward, kept = traffic.executed(case.function, case.inputs())
        extras = 2 * 4 * frames * tokens + 2 * 4 * frames
        sums = 2 * 3 * 4 * D * frames * trained
        assert 0 <= forward.bytes - case.minimum[0] <= extras, case.name
        assert 0 <= backward.bytes - case.minimum[1] <= extras + sums + 3 * 8 * D * trained, case.name
        with FakeTensorMode():  # what `launched` adds up from arguments is what the emulator saw
            counted = traffic.launched(case.function, case.inputs())
        assert (counted.forward.bytes, counted.kept) == (forward.bytes, kept), case.name
        assert abs(counted.backward.bytes - backward.bytes) <= 4 * D * traffic.ROWS, case.name


def test_region_dpo_moves_the_minimum():
    """Beside it: the frames' partial sums, and the loss, which is PyTorch's."""
    case = traffic.dpo_case((1, 2, 4, 16, 32), 2)
    forward, backward, _ = traffic.executed(case.function, case.inputs())
    assert 0 <= forward.bytes - case.minimum[0] < 1500 and 0 <= backward.bytes - case.minimum[1] < 1000


def test_inductor_by_hand():
    """ln_modulate with frozen tables is one kernel: x and y, two tables, the rows' index, two numbers a token."""
    D, L, frames = 64, 48, 3
    case = traffic.modulation_cases(False, D, frames, L // frames)[0]
    with FakeTensorMode():
        forward, backward, _ = traffic.inductor(case.function, case.inputs())
    assert (forward.launches, backward.launches) == (1, 1)
    u, table, numbers, index = 2 * L * D, 4 * traffic.ROWS * D, 2 * 4 * L, 4 * frames
    assert forward.bytes == 3 * u + 2 * table + numbers + index  # x float32, y bfloat16
    assert backward.bytes == 5 * u + table + numbers + index


def test_page():
    """kernels/README.md names its command, and its numbers for ln_modulate are those of the formula."""
    text = (ROOT / "kernels/README.md").read_text(encoding="utf-8")
    assert "`python -m bench.traffic --write`" in text
    forward = re.search(r"tables frozen \(.*?^\| ln_modulate \| forward \| (.*?) \|$", text, re.S | re.M)
    least = traffic.modulation_cases(False)[0].minimum[0] / traffic.U
    assert forward and forward[1].split(" | ")[:2] == [f"{least:.2f} u", f"{least:.2f} u, 1.00x"]

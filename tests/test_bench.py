"""bench/: what it counts, against bytes counted by hand."""

import importlib
import re
import sys

import pytest
import torch
from helpers import ROOT

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def traffic():
    path = list(sys.path)
    sys.path.insert(0, str(ROOT / "bench"))
    module = importlib.import_module("traffic")
    sys.path[:] = path
    return module


def test_eager_bytes_by_hand(traffic):
    """A product with a row, and a sum with itself: distinct inputs and outputs, views free, both directions."""
    a, row = torch.ones(4, 8, requires_grad=True), torch.ones(8)
    forward, backward, kept = traffic.counting.step(
        lambda a, row: (a * row.expand(4, 8)).view(8, 4).cumsum(0), [a, row]
    )
    assert (forward.bytes, forward.launches) == ((128 + 32 + 128) + (128 + 128), 2)
    # cumsum backward: flip, cumsum, flip; then the product with the row
    assert (backward.bytes, backward.launches) == (3 * 256 + (128 + 32 + 128), 4)
    assert kept == 0  # the row is shared


def test_kept_bytes_by_hand(traffic):
    """A product keeps both factors; what is kept twice counts once."""
    a, b = torch.ones(4, 8, requires_grad=True), torch.ones(4, 8, requires_grad=True)
    assert traffic.counting.step(lambda a, b: a * b + a * a, [a, b]).kept == 2 * 128


def test_matmul_counts_as_flops(traffic):
    a, b = torch.ones(2, 3, requires_grad=True), torch.ones(3, 5)
    forward, backward, _ = traffic.counting.step(torch.mm, [a, b])
    assert (forward.bytes, forward.flops, backward.flops) == (0, 2 * 2 * 3 * 5, 2 * 2 * 3 * 5)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_kernels_move_the_minimum(traffic, dtype, trained):
    """Beside it: two float32 numbers a token, the rows' index, and sums for the tables, written and read."""
    D, frames, tokens = 64, 3, 16
    cases = traffic.modulation_cases(dtype, trained, D, frames, tokens)
    cases.append(traffic.norm_rope_cases(trained, D, frames, tokens, K=16)[0])
    for case in cases:
        forward, backward, kept = traffic.counting.executed(case.ways["ours"], case.inputs())
        extras = 2 * 4 * frames * tokens + 2 * 4 * frames
        sums = 2 * 3 * 4 * D * frames * trained
        assert 0 <= forward.bytes - case.minimum[0] <= extras, case.name
        assert 0 <= backward.bytes - case.minimum[1] <= extras + sums + 3 * 8 * D * trained, case.name
        with traffic.counting.fake():  # what `launched` adds up from arguments is what the emulator saw
            counted = traffic.counting.launched(case.ways["ours"], case.inputs())
        assert (counted.forward.bytes, counted.kept) == (forward.bytes, kept), case.name
        assert abs(counted.backward.bytes - backward.bytes) <= 4 * D * traffic.ROWS, case.name


def test_region_dpo_moves_the_minimum(traffic):
    case = traffic.dpo_case((1, 2, 4, 16, 32), 2)
    forward, backward, _ = traffic.counting.executed(case.ways["ours"], case.inputs())
    assert 0 <= forward.bytes - case.minimum[0] < 1000 and 0 <= backward.bytes - case.minimum[1] < 100


def test_float32_loads_touch_a_sector_twice(traffic):
    """Eight columns a lane: two instructions for eight float32 that are loaded, one for eight bfloat16."""
    case = traffic.modulation_cases(torch.float32, False, 1536, 1, 32)[0]
    found = traffic.counting.executed(case.ways["ours"], case.inputs()).forward.sectors
    ratio = {name: ratio for _, _, name, ratio in found}
    assert ratio == {"x": 2, "y": 1}, found


def test_inductor_by_hand(traffic):
    """ln_modulate with frozen tables is one kernel: x and y, two tables, the rows' index, two numbers a token."""
    D, L, frames = 64, 48, 3
    case = traffic.modulation_cases(torch.bfloat16, False, D, frames, L // frames)[0]
    with traffic.counting.fake():
        forward, backward, kept = traffic.counting.inductor(case.ways["eager"], case.inputs())
    assert (forward.launches, backward.launches) == (1, 1)
    x, table, numbers, index = 2 * L * D, 4 * traffic.ROWS * D, 2 * 4 * L, 4 * frames
    assert forward.bytes == 2 * x + 2 * table + numbers + index
    assert backward.bytes == 3 * x + table + numbers + index


def test_page(traffic):
    """kernels/README.md names its command, and its numbers for ln_modulate are those of the formula."""
    page = ROOT / "kernels/README.md"
    if not page.exists():
        pytest.skip("kernels/README.md is not written yet: python bench/traffic.py --write")
    text = page.read_text(encoding="utf-8")
    assert "`python bench/traffic.py --write`" in text
    forward = re.search(r"tables frozen, x float32\n.*?^\| ln_modulate \| forward \| (.*?) \|$", text, re.S | re.M)
    least = traffic.modulation_cases(torch.float32, False)[0].minimum[0] / traffic.U
    assert forward and forward[1].split(" | ")[:2] == [f"{least:.2f} u", f"{least:.2f} u, 1.00x"]

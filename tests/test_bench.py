"""bench/traffic.py: what it counts, against bytes counted by hand."""

import importlib.util
import sys

import pytest
import torch
from helpers import ROOT

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def traffic():
    spec = importlib.util.spec_from_file_location("traffic", ROOT / "bench/traffic.py")
    module = sys.modules["traffic"] = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def test_eager_bytes_by_hand(traffic):
    """A product with a row, and a sum with itself: distinct inputs and outputs, views free, both directions."""
    a, row = torch.ones(4, 8, requires_grad=True), torch.ones(8)
    forward, backward = traffic.step(lambda a, row: (a * row.expand(4, 8)).view(8, 4).cumsum(0), [a, row])
    assert (forward.bytes, forward.launches) == ((128 + 32 + 128) + (128 + 128), 2)
    # cumsum backward: flip, cumsum, flip; then the product with the row
    assert (backward.bytes, backward.launches) == (3 * 256 + (128 + 32 + 128), 4)


def test_matmul_counts_as_flops(traffic):
    a, b = torch.ones(2, 3, requires_grad=True), torch.ones(3, 5)
    forward, backward = traffic.step(torch.mm, [a, b])
    assert (forward.bytes, forward.flops, backward.flops) == (0, 2 * 2 * 3 * 5, 2 * 2 * 3 * 5)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_kernels_move_the_minimum(traffic, dtype, trained):
    """Beside it: two float32 numbers a token, the rows' index, and sums for the tables, written and read."""
    D, frames, tokens = 64, 3, 16
    cases = traffic.modulation_cases(dtype, trained, D, frames, tokens)
    cases.append(traffic.norm_rope_case(trained, D=D, frames=frames, tokens=tokens, K=16))
    for case in cases:
        forward, backward = traffic.executed(case.ways["ours"], case.inputs())
        extras = 2 * 4 * frames * tokens + 2 * 4 * frames
        sums = 2 * 3 * 4 * D * frames * trained
        assert 0 <= forward.bytes - case.minimum[0] <= extras, case.name
        assert 0 <= backward.bytes - case.minimum[1] <= extras + sums + 3 * 8 * D * trained, case.name
        with traffic.fake():  # what `launched` adds up from arguments is what the emulator saw
            counted = traffic.launched(case.ways["ours"], case.inputs())
        assert counted[0].bytes == forward.bytes, case.name
        assert abs(counted[1].bytes - backward.bytes) <= 4 * D * traffic.ROWS, case.name


def test_region_dpo_moves_the_minimum(traffic):
    case = traffic.dpo_case((1, 2, 4, 16, 32), 2)
    forward, backward = traffic.executed(case.ways["ours"], case.inputs())
    assert 0 <= forward.bytes - case.minimum[0] < 1000 and 0 <= backward.bytes - case.minimum[1] < 100


def test_inductor_fuses_into_one_kernel(traffic):
    """ln_modulate with frozen tables: read x, write y."""
    case = traffic.modulation_cases(torch.bfloat16, False, 64, 3, 16)[0]
    with traffic.fake():
        (forward, _), _ = traffic.inductor(case.ways["eager"], case.inputs())
    assert forward.launches == 1 and 0 <= forward.bytes - case.minimum[0] <= 1000


def test_page_names_its_command():
    page = ROOT / "kernels/README.md"
    if not page.exists():
        pytest.skip("not written yet")
    assert "`python bench/traffic.py --write`" in page.read_text(encoding="utf-8")

"""bench/torture.py, a small share of each row: kills, damage, NaN and hostile files. `make torture` tries them all."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest

from bench import torture

SHARES = {  # of each row's cases: what takes a second or two
    "C1": 0.015, "C2": 0.015, "C3": 0.05, "C4": 0.1, "C5": 0.004, "D1": 0.05, "D2": 1, "D3": 1, "F1": 0.05, "G1": 0.05,
    "N1": 0.3, "N2": 1, "S1": 1, "S2": 0.06, "V1": 0.5, "V2": 0.06, "V3": 0.03, "V4": 1, "two jobs": 0.05,
}  # fmt: skip


@pytest.fixture(scope="module")
def bench():
    """A process that starts no threads: the rows fork theirs from it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("row", torture.ROWS)
def test_what_is_tried_holds(row, chain, tmp_path, bench):
    cases, _ = bench.submit(torture.tried, row, chain, tmp_path, SHARES[row], 0).result()
    if row == "C4" and not cases:
        pytest.skip("needs root, to mount a full disk")
    assert cases and not [case for case in cases if case[1]]

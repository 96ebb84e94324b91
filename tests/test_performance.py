"""bench/pairs.py: its goals by counting, the page in docs/, and one small run."""

import dataclasses
import json
import multiprocessing.dummy
import types

import pytest
import torch
from helpers import ROOT, copy

import asymdpo
import continuation
from bench import pairs
from experiments import distill, tables
from experiments.tables_page import PLAIN


@pytest.mark.parametrize("row, most", [("prefix", 0.42), ("interval_7", 1 / 20), ("gt_winner", 1 / 40)])
def test_operations_of_a_pair_at_wan_size(row, most):
    """Against 50 Euler steps of whole forwards, two branches and two continuations."""
    whole = pairs.operations(pairs.LADDER["full"], "1.3b", plain=True)
    assert pairs.operations(pairs.ROWS[row], "1.3b") <= most * whole


def page_of(folder) -> str:
    kept = json.loads((folder / "performance.json").read_text(encoding="utf-8"))
    return pairs.page(pairs.Found(kept["rows"]), kept["operations"], kept["seconds"], kept["facts"])


def test_docs_hold_every_row_and_what_the_page_makes_of_it():
    folder = ROOT / "docs"
    text = (folder / "performance.md").read_text(encoding="utf-8")
    assert page_of(folder) == text and all(row.title in text for row in pairs.ROWS.values())
    kept = json.loads((folder / "performance.json").read_text(encoding="utf-8"))
    for name, row in pairs.ROWS.items():
        assert kept["operations"][name]["1.3b"] == pairs.operations(row, "1.3b")


def test_one_small_run(chain, tmp_path, monkeypatch):
    """Some rows of one seed in few steps, in this process, written to --out."""
    few = dict(steps=2, batch_size=4)
    for stage in (asymdpo, continuation, distill):
        monkeypatch.setitem(stage.PRESETS, "tiny", stage.PRESETS["tiny"] | few)
    for module, name, value in (
        (tables, "CLIPS", 4),
        (pairs, "CONTROLS", {PLAIN: (4, 1.0, "unipc", 1.0)}),
        (pairs, "SWEEP", 2),
        (pairs, "TIMED", 4),
        (pairs, "ROUNDS", 1),
        (tables, "multiprocessing", types.SimpleNamespace(get_context=lambda method: multiprocessing.dummy)),
    ):
        monkeypatch.setattr(module, name, value)
    for name, row in pairs.LADDER.items():
        monkeypatch.setitem(pairs.ROWS, name, dataclasses.replace(row, pairs=row.pairs | dict(nfe=2)))
    copy(chain, tmp_path / "seed-3", "clips", "shards", "base", "sft")
    cfg = pairs.Config(out=str(tmp_path), seeds="3", rows="unipc2,none2", workers=1)
    threads = torch.get_num_threads()
    pairs.main(cfg)
    torch.set_num_threads(threads)
    text = (tmp_path / "performance.md").read_text(encoding="utf-8")
    assert page_of(tmp_path) == text and "2 UniPC steps, no Φ" in text and "3 UniPC steps" not in text
    assert (tmp_path / "performance.png").stat().st_size > 10_000
    (kept,) = json.loads((tmp_path / "performance.json").read_text(encoding="utf-8"))["rows"]
    assert {"sft", "full", "unipc2", "none2", "sweep_prefix"} <= kept.keys()

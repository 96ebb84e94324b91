"""experiments/tables.py: what the rows are, the statistics, the files in docs/, and one small run of all of it."""

import json
import math
import multiprocessing.dummy
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, copy

import asymdpo
import continuation
import make_pairs
from experiments import baselines, evaluate, labels, pairs, tables
from runtime.options import UserError, resolve
from tiny import balls

FEW = "pretrain,flow_noisy,flow_half,dense_exact,round_2"  # beside SFT, DynamicsBoost and what these stand on


@pytest.mark.parametrize("name", tables.ROWS)
def test_options_of_every_row_exist(name):
    """Each row is made of options that the stages take."""
    row = tables.ROWS[name]
    resolve(continuation.Config(**row.phi), continuation.PRESETS)
    stage = baselines if row.labels else asymdpo
    resolve(stage.Config(**row.options), asymdpo.PRESETS)
    if row.labels:
        resolve(pairs.Config(**row.pairs))
        resolve(labels.Config(**row.labels))
    elif row.pairs is not None:
        make_pairs.windows(make_pairs.Config(**row.pairs), 13)


# ---- statistics ------------------------------------------------------------------------------------------------------


def test_students_t():
    """The point below which Student's t has probability 0.975, by adding up its density; five degrees of freedom."""
    t = np.linspace(-100, 100, 500_001)
    below = np.cumsum((1 + t * t / 5) ** -3)
    assert tables.T975[4] == pytest.approx(t[np.searchsorted(below / below[-1], 0.975)], rel=2e-3)


def test_interval():
    """Five differences with mean 2 and sd √2.5: half of the interval is 2.776·√2.5/√5; by hand."""
    found = tables.interval([0, 1, 2, 3, 4])
    assert found["mean"] == 2 and found["half"] == pytest.approx(2.776 / math.sqrt(2))
    assert tables.shown(found) == "**+2.000 ± 1.963**"
    assert tables.shown({"mean": -1.0, "half": 1.5}, 1) == "−1.0 ± 1.5"
    assert tables.shown(tables.interval([1])) == "+1.000 ± inf" and tables.shown(-0.25, 2) == "−0.25"


# ---- the files in docs/ ----------------------------------------------------------------------------------------------


def test_docs_hold_every_row_and_what_the_page_makes_of_it():
    found = json.loads((ROOT / "docs/tables.json").read_text())
    assert list(found["rows"]) == list(tables.ROWS)
    assert all(row["title"] == tables.ROWS[name].title for name, row in found["rows"].items())
    assert tables.page(found) == (ROOT / "docs/tables.md").read_text()
    assert (ROOT / "docs/tables.png").stat().st_size > 10_000
    for row in found["rows"].values():  # the intervals are those of the seeds, which are given to four digits
        for against in (row[name] for name in ("vs_sft", "vs_dynamicsboost") if name in row):
            again = tables.interval(against["score"]["seeds"])
            assert again["mean"] == pytest.approx(against["score"]["mean"], abs=1e-4)
            assert again["half"] == pytest.approx(against["score"]["half"], abs=2e-4)


# ---- one small run ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(chain, tmp_path_factory):
    """Two seeds that share the chain's folders, few rows, 2 steps, 4 prompts, in this process."""
    root, threads = tmp_path_factory.mktemp("tables"), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"CLIPS": 4, "LABELLED": 4, "SWEEP": 2}.items():
            patch.setattr(tables, name, value)
        for stage, few in (
            (asymdpo, dict(steps=2, batch_size=4, lr=1e-3)),
            (make_pairs, dict(nfe=2)),  # experiments.pairs takes the same
            (evaluate, dict(nfe=2)),
        ):
            patch.setitem(stage.PRESETS, "tiny", stage.PRESETS["tiny"] | few)
        patch.setattr(
            tables, "multiprocessing", types.SimpleNamespace(get_context=lambda method: multiprocessing.dummy)
        )
        for seed in (0, 1):
            copy(chain, root / f"seed-{seed}", "clips", "shards", "base", "sft", "continuation")
        tables.main(tables.Config(out=str(root), seeds="0,1", rows=FEW, workers=1))
        yield root
    torch.set_num_threads(threads)


def scores(root: Path, name: str, seed: int) -> dict[str, float]:
    folder = "sft" if name == "sft" else f"dpo/{name}"
    return json.loads((root / f"seed-{seed}" / folder / f"measured-{name}.json").read_text())["scores"]


def test_small_run_writes_the_tables(small):
    """The figures are those of the score files, and every row is in the text."""
    found, text = json.loads((small / "tables.json").read_text()), (small / "tables.md").read_text()
    rows, ours, start = found["rows"], scores(small, "dynamicsboost", 1), scores(small, "sft", 1)
    assert list(rows) == ["sft", *FEW.split(","), "dynamicsboost"] and "nan" not in text
    assert all(row["title"] in text for row in rows.values()) and len(found["sweep"]) == 14
    gain = rows["dynamicsboost"]["vs_sft"]["score"]["seeds"][1]
    assert gain == pytest.approx(ours["score"] - start["score"], abs=1e-4) and gain != 0
    assert "vs_sft" not in rows["sft"] and rows["pretrain"]["vs_sft"]["score"]["mean"] != 0
    assert set(ours) == set(balls.METRICS) and (small / "tables.png").stat().st_size > 10_000
    assert len((small / "tables.json").read_text().splitlines()) < len(rows) + 15
    assert rows["flow_noisy"]["accuracy"]["mean"] < 1 == rows["dense_exact"]["accuracy"]["mean"]
    assert {"diff/w/3", "acc/3/t0"} & rows["flow_noisy"]["training"].keys()


def test_a_second_run_makes_nothing(small):
    def files() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in small.glob("seed-*/**/*") if p.is_file() and p.name != "log.txt"}

    before = files()
    tables.main(tables.Config(out=str(small), seeds="0,1", rows=FEW, workers=1))
    assert files() == before


def test_a_row_of_other_options_is_refused(small, monkeypatch):
    """A row that was trained with other options is not shown as this one."""
    monkeypatch.setitem(asymdpo.PRESETS, "tiny", asymdpo.PRESETS["tiny"] | dict(steps=3))
    with pytest.raises(UserError, match="dynamicsboost was made with config steps = 2, now 3"):
        tables.Seed(small / "seed-0", 0).row("dynamicsboost")


@pytest.mark.parametrize("wrong", [dict(seeds="a"), dict(seeds=",".join("0" * 13)), dict(rows="plain")])
def test_wrong_options_are_one_line(wrong, tmp_path):
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}: expected"):
        tables.main(tables.Config(out=str(tmp_path), **wrong))

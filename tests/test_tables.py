"""experiments/tables.py and its page: what the rows are, the statistics, docs/, and one small run of all of it."""

import dataclasses
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
import sft
from experiments import baselines, evaluate, labels, pairs, tables, tables_page
from runtime.options import UserError, resolve
from tiny import balls

FEW = "pretrain,flow_exact@0.003,flow_noisy,dense_exact,local_dpo,n1_0,phi_off"  # beside those of tables_page.COMPARED


def test_a_method_has_a_row_for_each_of_its_rates():
    """Its own, of the preset's rate, and `method@rate` for the others, which differ in the rate alone."""
    for method, rates in tables.RATES.items():
        rows = {name: row for name, row in tables.ROWS.items() if tables.method(name) == method}
        assert sorted(row.lr for row in rows.values()) == sorted(rates) and method in rows
        assert all(name == method or name == f"{method}@{row.lr:g}" for name, row in rows.items())
        assert len({str(dataclasses.replace(row, options=row.options | dict(lr=0))) for row in rows.values()}) == 1


@pytest.mark.parametrize("name", tables.ROWS)
def test_options_of_every_row_exist(name):
    """Each row is made of options that the stages take."""
    row = tables.ROWS[name]
    resolve(continuation.Config(**row.phi or {}), continuation.PRESETS)
    if row.stage:
        resolve(row.stage.Config(**row.options), row.stage.PRESETS)
    if row.labels:
        resolve(pairs.Config(**row.pairs))
        resolve(labels.Config(**row.labels))
    else:
        make_pairs.windows(make_pairs.Config(**row.pairs), 13)


# ---- operations ------------------------------------------------------------------------------------------------------


def test_operations_of_the_method():
    """Φ, pairs and training, from what torch counts of a clip: a pair is two clips and the reference's two forwards."""
    row = tables.ROWS["dynamicsboost"]
    clip, forward = tables.flop(sft), tables.flop()
    assert tables.flop(asymdpo) == pytest.approx(2 * clip + 2 * forward, rel=0.02)
    assert tables.flop(continuation) == pytest.approx(clip, rel=0.05)
    before, step = tables.price(row, 600)
    assert step == 16 * tables.flop(asymdpo)
    assert before == pytest.approx(600 * tables.sampling(row) + 200 * 32 * tables.flop(continuation))
    nfe = make_pairs.PRESETS["tiny"]["nfe"]
    plain = tables.sampling(dataclasses.replace(row, pairs=dict(plain=True), phi=None))
    assert plain == pytest.approx(nfe * 2 * forward, rel=0.02)
    # a call for each loser, and for two of three winners, which N2 = 13 of 11, 12, 13 gives whole
    assert 0.3 < tables.sampling(row) / (nfe * (1 + 2 / 3) * forward) < 0.6
    assert tables.plan(row, 600) == (200, 1.0)


@pytest.mark.parametrize("name", [n for n, row in tables.ROWS.items() if row.stage in (sft, baselines)])
def test_others_get_as_many_operations(name):
    """Within the rounding of their steps to tens."""
    steps, operations = tables.plan(tables.ROWS[name], 600)
    assert steps % 10 == 0 and abs(operations - 1) < 0.025


def test_make_demo_gives_sft_as_many_operations():
    """The Makefile's number of steps follows from the presets of all that the method costs."""
    clips = [balls.split_of(i, balls.Config.clips) for i in range(balls.Config.clips)].count("align")
    more, _ = tables.plan(tables.ROWS["sft_longer"], clips)
    steps = sft.PRESETS["tiny"]["steps"] + more
    assert f"--out $(OUT)/sft_longer --steps {steps} " in (ROOT / "Makefile").read_text()


# ---- statistics ------------------------------------------------------------------------------------------------------


def test_students_t():
    """The point below which Student's t has probability 0.975, by adding up its density; five degrees of freedom."""
    t = np.linspace(-100, 100, 500_001)
    below = np.cumsum((1 + t * t / 5) ** -3)
    assert tables_page.T975[4] == pytest.approx(t[np.searchsorted(below / below[-1], 0.975)], rel=2e-3)


def test_interval():
    """Five differences with mean 2 and sd √2.5: half of the interval is 2.776·√2.5/√5; by hand."""
    found, shown = tables_page.interval([0, 1, 2, 3, 4]), tables_page.shown
    assert found.mean == 2 and found.half == pytest.approx(2.776 / math.sqrt(2)) and found.sign == 1
    assert shown(found) == "**+2.000 ± 1.963**"
    assert shown(tables_page.Interval(-0.01, 0.015), "valid") == "−1.0 ± 1.5"
    assert shown(tables_page.interval([1])) == "+1.000 ± inf" and shown(-0.25, "traj") == "−0.25"


def figures(**changed: list[float]) -> dict:
    """Made-up figures of three seeds: the valid clips of every row, whose score and dynamic degree are as high."""
    valid = dict(sft=[0.5] * 3, sft_longer=[0.52] * 3, dynamicsboost=[0.7, 0.71, 0.72]) | changed | dict(real=[1.0] * 3)
    rows = {}
    for name, share in valid.items():
        method = name.partition("@")[0]
        kinds = tables.CONTROLS if method in tables_page.MAIN else [tables_page.PLAIN, tables_page.LESS]
        rows[name] = {
            "title": method,
            "group": tables.ROWS[name].group if name in tables.ROWS else "real",
            "method": method,
            "values": {kind: dict.fromkeys(tables_page.FORMATS, share) for kind in kinds},
        } | ({"lr": tables.ROWS[name].lr} if method in tables.RATES else {})
    sweep = [{"score": [n / 13 + seed / 100 for seed in range(3)]} for n in range(14)]
    about = {"seeds": [0, 1, 2], "clips": [4, 2], "commit": "abc", "machine": "a machine"}
    return {"rows": rows, "sweep": sweep} | about


def claims(**changed: list[float]) -> str:
    found = figures(**changed)
    return tables_page.claims(tables_page.Figures(found["rows"]), found["sweep"])


def headline(found: dict) -> str:
    return tables_page.headline(tables_page.Figures(found["rows"]))


def test_a_rival_gets_its_best_rate_and_the_method_the_presets():
    """In the tables, the claims, the verdict and the picture; the frontiers have all rates."""
    rival, better = [0.6] * 3, [0.8] * 3
    found = figures(**{"dense_exact": rival, "dense_exact@0.003": better, "dynamicsboost@0.003": better})
    every = tables_page.Figures(found["rows"])
    assert every.best("dense_exact") == "dense_exact@0.003"
    assert every.best("dynamicsboost") == "dynamicsboost"
    rows = every.chosen().rows
    assert list(rows) == ["sft", "sft_longer", "dynamicsboost", "dense_exact", "real"]
    assert rows["dense_exact"]["title"] == "dense_exact, lr 0.003" and rows["dynamicsboost"]["title"] == "dynamicsboost"
    text = tables_page.page(found)
    assert "| dense_exact, lr 0.003 | 80.0 |" in text and "| dense_exact, lr 0.001 |" not in text
    assert "| dense_exact | 0.001 | 60.0 |" in text and "| dense_exact | **0.003** | 80.0 |" in text
    assert "| dynamicsboost | **0.001** | 71.0 |" in text and "| dynamicsboost | 0.003 | 80.0 |" in text


@pytest.mark.parametrize(
    ("rival", "word"),
    [([0.6] * 3, "reproduced"), ([0.8] * 3, "not reproduced"), ([0.6, 0.71, 0.85], "not resolved")],
)
def test_a_claim_is_judged_by_its_interval(rival, word):
    (line,) = [line for line in claims(dense_exact=rival).splitlines() if "than DenseDPO" in line]
    assert f"**{word}**" in line and "25.64 / 25.02" in line.replace("\N{NO-BREAK SPACE}", " ")


@pytest.mark.parametrize(
    ("rival", "word"),
    [([0.7, 0.71, 0.72], "reproduced"), ([0.5] * 3, "not reproduced"), ([0.5, 0.71, 0.92], "not resolved")],
)
def test_gt_winner_is_close_within_half_of_the_gain(rival, word):
    def line(**changed) -> str:
        (found,) = [line for line in claims(gt_winner=rival, **changed).splitlines() if "gt-winner" in line]
        return found

    assert f"**{word}**" in line()
    assert "**not resolved**" in line(sft=[0.5, 0.7, 0.9])  # then there is no gain to be close to


def test_headline_says_who_is_ahead_and_which_control_takes_it_away():
    """The gap closed is 0.21 of 0.5; a control in which SFT is as good as the method is named."""
    found = figures()
    assert "**ahead of** sft: **+21.0 ± 2.5** points, and so under every control" in headline(found)
    assert "it closes **42 ± 5** % in valid clips" in headline(found)
    found["rows"]["sft"]["values"]["Euler"] = dict.fromkeys(tables_page.FORMATS, [0.71] * 3)
    assert "points, but not under Euler\n" in headline(found)
    behind = headline(figures(sft_longer=[0.9] * 3, flow_exact=[0.7, 0.71, 0.73]))
    assert (
        "**behind** sft_longer: **−19.0 ± 2.5** points\n" in behind and "**not told apart from** flow_exact" in behind
    )


# ---- the files in docs/ ----------------------------------------------------------------------------------------------


def test_docs_hold_every_row_and_what_the_page_makes_of_it():
    found = json.loads((ROOT / "docs/tables.json").read_text())
    assert list(found["rows"]) == [*tables.ROWS, "real"]
    assert all(row["title"] == tables.ROWS[name].title for name, row in found["rows"].items() if name != "real")
    assert tables_page.page(found) == (ROOT / "docs/tables.md").read_text()
    assert (ROOT / "docs/tables.png").stat().st_size > 10_000


# ---- one small run ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(chain, tmp_path_factory):
    """Two seeds that share the chain's folders, few rows, few steps, 4 prompts, in this process."""
    root, threads = tmp_path_factory.mktemp("tables"), torch.get_num_threads()
    few = dict(steps=2, batch_size=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "CONTROLS", {k: (min(v[0], 4), *v[1:]) for k, v in tables.CONTROLS.items()})
        for name, value in {"CLIPS": 4, "LABELLED": 4, "SWEEP": 2}.items():
            patch.setattr(tables, name, value)
        for stage, changed in (
            (asymdpo, few),
            (sft, few),
            (continuation, few),
            (make_pairs, dict(nfe=2)),  # experiments.pairs takes the same
            (evaluate, dict(nfe=3)),  # of two steps UniPC and Euler are the same
        ):
            patch.setitem(stage.PRESETS, "tiny", stage.PRESETS["tiny"] | changed)
        patch.setattr(
            tables, "multiprocessing", types.SimpleNamespace(get_context=lambda method: multiprocessing.dummy)
        )
        tables.flop.cache_clear()
        for seed in (0, 1):
            copy(chain, root / f"seed-{seed}", "clips", "shards", "base", "sft", "continuation")
        tables.main(tables.Config(out=str(root), seeds="0,1", rows=FEW, workers=1))
        yield root
    torch.set_num_threads(threads)


def measured(root: Path, name: str, seed: int) -> dict[str, float]:
    folder = "sft" if name == "sft" else f"rows/{name}"
    return json.loads((root / f"seed-{seed}" / folder / f"measured-{name}.json").read_text())["values"]


def test_small_run_writes_the_tables(small):
    """The figures are those of the measured files, and every row is in the text."""
    found, text = json.loads((small / "tables.json").read_text()), (small / "tables.md").read_text()
    rows, ours, start = found["rows"], *(measured(small, name, 1) for name in ("dynamicsboost", "sft"))
    assert list(rows) == [n for n in tables.ROWS if n in {*FEW.split(","), *tables_page.COMPARED}] + ["real"]
    assert all(row["title"] in text for row in rows.values()) and "nan" not in text
    expected = tables_page.interval(
        [
            a["noise × 1"]["score"] - b["noise × 1"]["score"]
            for a, b in ([measured(small, name, seed) for name in ("dynamicsboost", "sft")] for seed in (0, 1))
        ]
    )
    assert tables_page.Figures(rows).gain("dynamicsboost", "sft", "score") == pytest.approx(expected, abs=1e-4)
    assert expected.mean != 0
    assert set(ours) == set(tables.CONTROLS) and set(start) == {*tables.CONTROLS} - {"half strength"}
    assert set(ours["Euler"]) == {*balls.METRICS, "w1"} and len({str(values) for values in ours.values()}) == 5
    assert set(measured(small, "n1_0", 0)) == {"noise × 1", "noise × 0.85"}
    assert set(measured(small, "flow_exact@0.003", 0)) == set(tables.CONTROLS)
    assert len((small / "tables.json").read_text().splitlines()) < len(rows) + 15
    assert rows["flow_noisy"]["accuracy"][0] < 1 == rows["dense_exact"]["accuracy"][0]
    assert rows["flow_noisy"]["operations"][0] > 0 and len(found["sweep"]) == 14
    assert "diff/w/3" in rows["n1_0"]["training"] and (small / "tables.png").stat().st_size > 10_000


def test_a_second_run_makes_nothing(small):
    def files() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in small.glob("seed-*/**/*") if p.is_file() and p.name != "log.txt"}

    before = files()
    tables.main(tables.Config(out=str(small), seeds="0,1", rows=FEW, workers=1))
    assert files() == before


def test_a_control_that_is_missing_is_measured(small):
    """A row that was measured before it had to go through all controls."""
    path = small / "seed-0/rows/flow_exact@0.003/measured-flow_exact@0.003.json"
    whole = json.loads(path.read_text())
    euler = whole["values"].pop("Euler")
    path.write_text(json.dumps(whole))
    assert tables.Seed(small / "seed-0", 0).row("flow_exact@0.003")["values"] == whole["values"] | {"Euler": euler}
    assert json.loads(path.read_text())["values"]["Euler"] == euler


@pytest.mark.parametrize("name", ["dynamicsboost", "sft_longer"])
def test_a_row_of_other_options_is_refused(small, name, monkeypatch):
    """A row that was trained with other options is not shown as this one."""
    row = tables.ROWS[name]
    monkeypatch.setitem(tables.ROWS, name, dataclasses.replace(row, options=row.options | dict(lr=0.5)))
    with pytest.raises(UserError, match=f"{name} was made with config lr = .*, now 0.5"):
        tables.Seed(small / "seed-0", 0).row(name)


@pytest.mark.parametrize("wrong", [dict(seeds="a"), dict(seeds=",".join("0" * 13)), dict(rows="plain")])
def test_wrong_options_are_one_line(wrong, tmp_path):
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}: expected"):
        tables.main(tables.Config(out=str(tmp_path), **wrong))

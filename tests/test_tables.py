"""bench/tables.py and its page: what the rows are, the statistics, and one small run of all of it."""

import json
import math

import numpy as np
import pytest
import torch
from helpers import copy

import asymdpo
import make_pairs
import sft
from experiments import labels as label
from experiments import tables, tables_page
from runtime import run as common
from tiny import balls as world

FEW = ["pretrain", "sft", "flow_noisy", "flow_exact", "flow_half", "dense_exact", "dynamicsboost", "round_2"]


def test_every_row_is_shown_and_its_options_exist():
    """Each row stands in a group of the page, and is made of options that the stages take."""
    assert {name for names in tables_page.GROUPS.values() for name in names} == set(tables.ROWS)
    for name, row in tables.ROWS.items():
        asymdpo.check(common.resolve(asymdpo.Config(**row.options), asymdpo.PRESETS))
        assert not row.pairs or row.pairs in tables.PAIRS, name
        assert not row.labels or tables.LABELS[row.labels]["pairs"] == tables.PAIRS[row.pairs].get("pairs"), name
    for options in tables.PAIRS.values():
        make_pairs.windows(make_pairs.Config(**options), 13)
    for options in tables.LABELS.values():
        label.check(label.Config(**options))


def student(p: float, degrees: int) -> float:
    """The point below which Student's t has probability p, by adding up its density."""
    t = np.linspace(-2000, 2000, 8_000_001) if degrees < 3 else np.linspace(-100, 100, 2_000_001)
    density = (1 + t * t / degrees) ** (-(degrees + 1) / 2)
    below = np.cumsum(density) / density.sum()
    return float(t[np.searchsorted(below, p)])


@pytest.mark.parametrize("degrees", [2, 5, 11])
def test_students_t(degrees):
    assert tables_page.T975[degrees - 1] == pytest.approx(student(0.975, degrees), rel=2e-3)
    assert tables_page.T800[degrees - 1] == pytest.approx(student(0.8, degrees), rel=4e-3)


def test_interval_and_verdict():
    """Five differences with mean 2 and sd √2.5: half of the interval is 2.776·√2.5/√5; by hand."""
    found = tables_page.interval(np.array([0.0, 1.0, 2.0, 3.0, 4.0]))
    assert found["mean"] == 2 and found["sd"] == pytest.approx(math.sqrt(2.5))
    assert found["half"] == pytest.approx(2.776 / math.sqrt(2))
    assert tables_page.verdict(found) == "reproduced" and tables_page.verdict(found, -1) == "not reproduced"
    assert tables_page.verdict({"mean": 1.9, "half": 1.96}) == "not resolved"
    assert tables_page.signed(found) == "**+2.000 ± 1.963**" and tables_page.signed({"mean": -1.0, "half": 1.5}, 1) == (
        "−1.0 ± 1.5"
    )
    assert tables_page.resolvable(1.0, 5) == pytest.approx((2.776 + 0.941) / math.sqrt(5))


def difference(*seeds: float) -> dict:
    return tables_page.interval(np.array(seeds))


def test_near_enough_is_said_of_the_whole_interval():
    """±1.96 wide: within 5 of 0 or past it, else not resolved, whichever side the mean is on."""
    for mean, words in ((2.9, "reproduced"), (4, "not resolved"), (-6, "not resolved"), (-8, "not reproduced")):
        assert tables_page.kept({"mean": mean, "half": 1.96}, 5.0) == words


@pytest.mark.parametrize(
    "steps, words",
    [
        ((9.0, 1.0, 1.0), "reproduced"),
        ((-9.0, 1.0, 1.0), "reproduced"),  # the claim leaves the step from none out
        ((9.0, 1.0, 0.0), "reproduced, but for the steps that are not resolved"),
        ((9.0, 0.0, 0.0), "not resolved"),
        ((9.0, 1.0, -1.0), "not reproduced"),
    ],
)
def test_verdict_of_the_sweep(steps, words):
    """Three seeds that differ by a little: a step of 0 cannot be told from none."""
    sweeps = [[{"score": float(s)} for s in np.cumsum([0, *np.add(steps, noise)])] for noise in (-0.1, 0, 0.1)]
    assert tables_page.sweep_steps(sweeps)["verdict"] == words


def test_equal_gain_needs_a_gain():
    """Change of dynamic degree by point of score, seed by seed: −4, −4.4 and −3.6 against −1."""
    flow = {"score": difference(0.1, 0.1, 0.1), "dyn": difference(-0.4, -0.44, -0.36)}
    ours = {"score": difference(0.1, 0.05, 0.2), "dyn": difference(-0.1, -0.05, -0.2)}
    text = tables_page.slowing_claim(flow, ours)
    assert "less: reproduced" in text and "**−4.00 ± 0.99**" in text and "**+3.00 ± 0.99**" in text
    still = {"score": flow["score"], "dyn": difference(-0.01, 0.0, 0.01)}
    faster = {"score": ours["score"], "dyn": difference(0.1, 0.05, 0.2)}
    text = tables_page.slowing_claim(still, faster)
    assert "less: not resolved" in text and "**+1.00 ± 0.25**" in text and "slows at all is not seen" in text
    ours["score"] = difference(0.1, 0.05, -0.2)
    assert "less: not resolved" in tables_page.slowing_claim(flow, ours)


def test_correlation_is_within_a_seed():
    """Seeds that differ as a whole do not make a correlation."""
    factor = np.array([[1.0, 101.0], [2.0, 102.0], [3.0, 103.0]])
    gain = np.array([[3.0, 53.0], [2.0, 52.0], [1.0, 51.0]])
    assert tables_page.correlation(factor, gain) == "**−1.00 ± 0.00**"
    assert tables_page.correlation(factor[:2], gain[:2]) == tables_page.correlation(np.ones((3, 2)), gain) == ""


@pytest.fixture(scope="module")
def small(chain, tmp_path_factory):
    """Two seeds that share the chain's folders, few rows, 2 steps, 8 prompts."""
    root, patch = tmp_path_factory.mktemp("tables"), pytest.MonkeyPatch()
    for name, value in {"CLIPS": 8, "FACTS": 6, "SWEEP": 4}.items():
        patch.setattr(tables, name, value)
    threads = torch.get_num_threads()
    for seed in (0, 1):
        copy(chain, root / f"seed-{seed}", "clips", "shards", "base", "sft", "continuation")
        tables.run_seed(str(root), seed, FEW, {"steps": 2})
    torch.set_num_threads(threads)
    yield root
    patch.undo()


def test_rows_are_judged_on_the_same_prompts_and_noise(small):
    """Half of a LoRA lies between none and all of it; the labels of `noisy` are those of `exact`, some turned round."""
    x0 = {name: common.read_tensors(small / f"seed-0/eval/{name}/samples.safetensors")["x0"] for name in FEW}
    whole, half = (x0[name] - x0["sft"] for name in ("flow_exact", "flow_half"))
    assert 0 < half.abs().max() < whole.abs().max()
    assert torch.corrcoef(torch.stack([whole.flatten(), half.flatten()]))[0, 1] > 0.9
    facts = json.loads((small / "seed-0/facts/flow_noisy.json").read_text())
    assert facts["accuracy"] < 1 and json.loads((small / "seed-0/facts/flow_exact.json").read_text())["accuracy"] == 1


def test_a_second_run_makes_nothing(small, monkeypatch):
    monkeypatch.setattr(make_pairs.common.Run, "progress", None)
    tables.run_seed(str(small), 0, FEW, {"steps": 2})
    assert tables.finished(small, [0, 1], FEW) == 2 * len(FEW)


def test_page(small, monkeypatch):
    """The figures of the page are those of the score files; an unfinished row is named."""
    found = tables_page.summary(small, [0, 1], FEW)
    rows = found["rows"]
    ours, sft = (common.read_tensors(small / f"seed-1/eval/{n}/scores.safetensors")["score"] for n in FEW[6:0:-5])
    assert rows["dynamicsboost"]["vs_sft"]["score"]["seeds"][1] == pytest.approx((ours - sft).mean().item(), abs=1e-4)
    assert rows["pretrain"]["vs_sft"]["score"]["mean"] != 0 and rows["sft"]["vs_sft"]["score"]["mean"] == 0
    assert set(rows["dynamicsboost"]["mean"]) == set(world.METRICS)
    table = tables_page.main_table(found, FEW)
    assert all(tables.ROWS[name].title in table for name in FEW) and table.count("\n") == len(FEW) + 2
    assert "| 0 | 1 |" in tables_page.sweep_claim(found)
    with pytest.raises(common.UserError, match="expected row region_3 of seeds"):
        tables_page.summary(small, [0, 1], [*FEW, "region_3"])


def test_whole_page():
    """Every row of the page, from made up differences: DynamicsBoost 0.2 above SFT, every other row 0.1 below it."""
    rows, metrics = {}, dict.fromkeys(world.METRICS, 1.0)
    for k, (name, row) in enumerate(tables.ROWS.items()):
        gain = {"sft": 0.0, "dynamicsboost": 0.2}.get(name, -0.1)
        vs = {f"vs_{o}": {m: difference(g - 1e-3, g, g + 1e-3) for m in metrics} for o, g in
              (("sft", gain), ("dynamicsboost", gain - 0.2))}  # fmt: skip
        logs = [{"err/l_ref/2": k + s, "diff/w/2": 0.001, "acc/2/t1": 0.75} for s in range(3)]
        facts = {"accuracy": 1.0, "rejected_score": -k}
        rows[name] = {"title": row.title, "mean": metrics, **vs, "facts": facts, "facts_seeds": [facts] * 3}
        rows[name] |= {"training": logs[0], "training_seeds": logs}
    sweep = tables_page.sweep_steps([[{"score": n + s, "generated_score": n} for n in range(4)] for s in range(3)])
    found = dict(
        rows=rows, seeds=[0, 1, 2], clips=8, machine="two cores", commit="abc", processor_minutes=1.0, real=metrics,
        hours=dict.fromkeys(rows, 10.0), sweep_steps=sweep,
    )  # fmt: skip
    few = {"rows": {name: rows[name] for name in ("sft", "dynamicsboost", "region_3")}}
    text = tables_page.page(found, few)
    assert "nan" not in text and all(row.title in text for row in tables.ROWS.values())
    assert text.count("higher than") == 20 and text.count(": reproduced.** **+0.300 ± 0.002**") == 17
    assert "without a label: reproduced" in text and "[not" not in text and "not resolved.** Not every seed" in text
    assert "| The loss, against DynamicsBoost | 1 | 0.0010 | 0.003 |" in text
    assert "| Closing the gap, against DynamicsBoost | 0 |  |  |" in text and "nan" not in tables_page.page(found, None)


def test_rows_alone(small, capsys):
    """Without all rows their table is printed, of one seed without intervals; nothing is written."""
    tables_page.main(["--out", str(small), "--seeds", "1", "--rows", "flow_exact", "dynamicsboost"])
    printed = capsys.readouterr().out
    assert "| Flow-DPO, exact scorer |" in printed and "±" not in printed and "nan" not in printed
    for more in (["--rows", "sft", "--write"], ["--seeds", *map(str, range(13))]):
        with pytest.raises(SystemExit):
            tables_page.main(["--out", str(small), *more])


def test_other_options_are_refused(small):
    """A row that was trained with other --options is not shown as one of these."""
    with pytest.raises(common.UserError, match="dynamicsboost was made with config steps = 2, now 3"):
        tables.run_seed(str(small), 0, ["dynamicsboost"], {"steps": 3})
    for options in ('{"stepz": 3}', "[1]"):
        with pytest.raises(SystemExit):
            tables.main(["--out", str(small), "--options", options])


def test_hours():
    """What a recipe costs: flow's samples need no continuation model, structural's take fewer steps, `gt-winner` one
    continuation a clip in place of 5/3.
    """
    found = tables_page.hours()
    assert found["pretrain"] == 0 < found["sft"] < found["structural_exact"] < found["flow_exact"]
    cold = asymdpo.PRESETS["1.3b"]["steps"] / sft.PRESETS["1.3b"]["steps"] + 1
    assert found["sft_more"] == pytest.approx(cold * found["sft"])
    sampled = {name: found[name] - found["n1_1_n2_13"] for name in ("gt_winner", "dynamicsboost", "per_clip_2")}
    assert sampled["gt_winner"] == pytest.approx(0) and sampled["dynamicsboost"] > 0
    assert sampled["per_clip_2"] == pytest.approx((2 * 5 / 3 - 1) / (5 / 3 - 1) * sampled["dynamicsboost"])

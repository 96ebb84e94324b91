"""The report: complete, self-contained, judged from its numbers; and it works when a browser opens it."""

import copy
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch

from experiments import page as report
from experiments import parts as page
from experiments import report_tables
from runtime import run as common
from runtime import shards as data
from tiny import balls as world
from wan import vae

VIDEOS = 4 * 8 + 5 + 2  # players, continuations, the chosen pair


@pytest.fixture(scope="module")
def demo(chain, tmp_path_factory) -> Path:
    """A copy of the chain with its report."""
    folder = helpers.copy(chain, tmp_path_factory.mktemp("report"), *helpers.STAGES)
    report.main(report.Config(demo=str(folder)))
    return folder


@pytest.fixture
def summary(demo) -> dict:
    """As an untrained chain gives it, with a table as a trained one does."""
    found = json.loads((demo / "summary.json").read_text())
    row = dict(score=-1.93, traj=4.0, presence=0.85, shape=0.063, dyn=1.0, accel=0.2)
    better = dict(row, score=-1.6, traj=3.2, presence=0.9, shape=0.06)
    real = dict(row, score=-0.37, traj=0.6, presence=1.0, shape=0.02, dyn=1.1)
    found["table"] = {"Pretrain": dict(row), "SFT": row, "DynamicsBoost": better, "real clips": real}
    found["asymdpo_minus_sft"] = {"mean": 0.33, "lo": 0.28, "hi": 0.38}
    return found


# ---- the files -------------------------------------------------------------------------------------------------------


def test_summary_has_the_numbers_and_the_times(demo):
    summary = json.loads((demo / "summary.json").read_text())
    assert {"label_accuracy", "sweep", "table", "next_frame_error", "seconds", "commit", "seed"} <= set(summary)
    assert set(summary["asymdpo_minus_sft"]) == {"mean", "lo", "hi"}
    assert set(summary["table"]) == {*report.MODELS, "real clips"}
    *stages, total = summary["seconds"].items()
    assert [name for name, _ in stages] == list(helpers.STAGES)
    assert total == ("total", pytest.approx(sum(seconds for _, seconds in stages), abs=0.01))


def test_page_asks_for_nothing_from_outside(demo):
    page = (demo / "report.html").read_text()
    assert not re.search(r"https?://|@import|<link rel=stylesheet|<script src", page)
    assert all(at.startswith(("data:", "#")) for at in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert all(at.startswith("#") for at in re.findall(r"url\(([^)]*)\)", page))
    assert len(page) < 6 * 2**20


def test_page_says_what_went_in(demo):
    page = " ".join((demo / "report.html").read_text().split())
    rows = data.Shards(demo / "shards", "prepare.py", "eval").rows
    shown = len(common.read_tensors(demo / "eval" / "samples.safetensors")["table_SFT"])
    for row in rows[:shown]:
        assert row["caption"] in page
    for word in ("N1 =", "N2 =", "95 % interval", "total", "make demo SEED=0"):
        assert word in page


def test_captions_are_escaped(demo, summary):
    caption = "<script>alert('a')</script> & a red ball falls"
    clips, pairs = page.Clips(vae.load(demo / "shards")), data.Shards(demo / "pairs", "make_pairs.py")
    samples = common.read_tensors(demo / "eval" / "samples.safetensors")
    for row in pairs.rows:
        row["caption"] = caption
    players = report.players_section(clips, samples, [{"caption": caption}], samples["table_SFT"][:1])
    for section in (players, report.pairs_section(summary, clips, pairs)):
        assert "<script>alert" not in section and "</script> &" not in section
    shown = re.search(r"id=pair-data>(.*?)</script>", report.pairs_section(summary, clips, pairs), re.S).group(1)
    assert json.loads(shown)[0]["caption"] == f"“{caption}”"


# ---- what the numbers are taken to say -------------------------------------------------------------------------------


def test_score_is_what_its_parts_say(demo):
    for row in json.loads((demo / "summary.json").read_text())["table"].values():
        assert sum(weight * row[metric] for metric, weight in report.WEIGHTS.items()) - 2 == pytest.approx(
            row["score"], abs=2e-3
        )


def mark_of(verdicts, part: str) -> str:
    (mark,) = [mark for mark, text in verdicts if part in text]
    return mark


def test_table_verdicts_turn_with_the_numbers(summary):
    assert mark_of(report.verdicts(summary), "scores higher than SFT") == "good"
    assert mark_of(report.verdicts(summary), "21 % of the way") == "open"
    assert mark_of(report.verdicts(summary), "within 10 % of SFT") == "good"
    assert mark_of(report.verdicts(summary), "no worse than") == "good"
    worse = copy.deepcopy(summary)
    worse["asymdpo_minus_sft"] = {"mean": -0.3, "lo": -0.4, "hi": -0.2}
    worse["table"]["DynamicsBoost"] |= {"dyn": 0.5, "shape": 0.09}
    assert mark_of(report.verdicts(worse), "scores lower than SFT") == "bad"
    assert mark_of(report.verdicts(worse), "away from the real clips") == "bad"
    assert mark_of(report.verdicts(worse), "shape rose by 43 %") == "bad"
    worse["asymdpo_minus_sft"] = {"mean": 0.1, "lo": -0.1, "hi": 0.3}
    assert mark_of(report.verdicts(worse), "No difference can be claimed") == "open"


def test_best_is_bold_and_dyn_is_best_near_the_real_clips(summary):
    summary["table"]["Pretrain"]["dyn"] = 9.0
    summary["table"]["SFT"]["dyn"] = 1.08
    row = re.search(r"<th scope=row>SFT</th>(.*?)</tr>", report.result_section(summary)).group(1)
    assert re.findall(r"<td class=best>([^<]*)", row) == ["1.08", "0.200"]  # accel: as good as the others


def test_sweep_verdict(summary):
    summary["next_frame_error"] = {"next_frame": 2.0, "hold": 3.4, "next_frame_last": 3.0, "hold_last": 4.4}
    assert mark_of(report.sweep_verdicts(summary), "41 % nearer than holding") == "good"
    assert mark_of(report.sweep_verdicts(summary), "It beats holding") == "good"
    summary["next_frame_error"]["next_frame_last"] = 8.8
    assert mark_of(report.sweep_verdicts(summary), "2.0 times as far off") == "bad"
    assert mark_of(report.sweep_verdicts(summary), "It does not beat holding") == "bad"


@pytest.mark.parametrize(
    "winner, loser, mark, words",
    [
        (-0.002, 0.003, "good", "both sides"),
        (-0.003, -0.001, "good", "the winner more"),
        (0.001, 0.003, "open", "likelihood displacement"),
        (0.002, 0.001, "bad", "nothing was learned"),
    ],
)
def test_margin_verdict(winner, loser, mark, words):
    verdicts = list(report.margin_verdict([{"diff/w/2": winner, "diff/l/2": loser}]))
    assert mark_of(verdicts, words) == mark
    assert mark_of(verdicts, "no pair of the last quarter") == "open"  # region ③ was not logged


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_missing_and_unfinished_demo_is_one_line(chain, tmp_path):
    unfinished = helpers.copy(chain, tmp_path / "demo", *helpers.STAGES)
    (unfinished / "asymdpo" / common.MANIFEST).unlink()
    for folder, words in ((tmp_path / "nowhere", "does not exist"), (unfinished, "run asymdpo.py first")):
        done = helpers.script("-m", "experiments.page", "--demo", str(folder))
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1 and words in done.stderr
    assert not (unfinished / "report.html").exists()


# ---- in a browser ----------------------------------------------------------------------------------------------------

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --virtual-time-budget=20000 --dump-dom"
).split()


def opened(demo: Path, profile: Path, fragment: str = "") -> str:
    """The page's DOM once its scripts have run."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if not browser:
        pytest.skip("no chromium installed: the report page was not opened in a browser")
    address = (demo / "report.html").as_uri() + fragment
    done = subprocess.run(
        [browser, *FLAGS, f"--user-data-dir={profile}", address], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def body(dom: str) -> dict[str, str]:
    return dict(re.findall(r'data-(\w+)="([^"]*)"', re.search(r"<body[^>]*>", dom).group()))


def test_page_works_in_a_browser(demo, tmp_path):
    dom = opened(demo, tmp_path)
    facts = body(dom)
    assert facts["ready"] == "1" and "error" not in facts
    assert facts["videos"] == f"{VIDEOS} of {VIDEOS}" and dom.count("<video") == VIDEOS
    assert re.search(r'<p id="broken" hidden', dom)
    for name in report.NAMES:
        assert f'<section id="{name}">' in dom
    assert dom.count('<svg viewBox="') >= 8  # the plots
    assert 'aria-pressed="true">1<' in dom and "The loser was given" in dom


def test_address_opens_a_moment_and_a_pair(demo, tmp_path):
    heads = []
    for t, picture in ((0, "0"), (0.5, "24"), (1, "48")):
        dom = opened(demo, tmp_path, f"#t={t}&pair=2")
        facts = body(dom)
        assert facts["picture"] == picture and "error" not in facts
        assert 'aria-pressed="true">2<' in dom
        heads.append(float(re.search(r'class="playhead"[^>]* x1="([\d.]+)"', dom).group(1)))
    assert heads[0] < heads[1] < heads[2]


# ---- the tables' page ------------------------------------------------------------------------------------------------

ROWS = {"sft": 0.0, "flow_exact": -0.1, "dynamicsboost": 0.1, "gt_winner": 0.1}  # row -> gain of score


def tables_tree(chain: Path, root: Path) -> None:
    """Two seeds of bench/tables.py that differ by numbers alone: random samples, made up scores."""
    clips = data.Shards(chain / "shards", "prepare.py", "eval")
    for seed in (0, 1):
        folder, rng = helpers.copy(chain, root / f"seed-{seed}", "shards"), np.random.default_rng(seed)
        for name, gain in ROWS.items():
            judged, prompts = folder / "eval" / name, rng.normal(size=16)
            gains = gain * (1 + (seed if name == "gt_winner" else 0.01 * seed) * np.array([-1.5, 0.5] * 8))
            scores = {m: torch.from_numpy(prompts * 0 - 2 + gains) for m in world.METRICS}
            common.write_tensors(judged / "scores.safetensors", scores)
            common.write_tensors(judged / "samples.safetensors", {"x0": torch.randn(8, *clips.shape("x0"))})
            common.write_manifest(judged, ["scores.safetensors", "samples.safetensors"])
            logged = {"diff/w/2": 0.01, "acc/2/t3": 0.75 + 0.01 * seed, "acc/3/t0": 0.4}
            common.write_text(folder / "dpo" / name / "metrics.jsonl", json.dumps({"step": 1, **logged}) + "\n")
            common.write_json(folder / "facts" / f"{name}.json", {"accuracy": 0.9876, "labels": 4})
        sweep = [{"n_cond": n, "score": n / 8 - 2 - seed * (n == 1), "generated_score": n / 8 - 3} for n in range(4)]
        common.write_json(folder / "facts" / "sweep.json", sweep)
        common.write_text(folder / "log.txt", '{"processor_seconds": 90.0, "rows": []}\n')


@pytest.fixture(scope="module")
def tables(chain, tmp_path_factory) -> Path:
    """A folder of two seeds with the figures that bench/tables_page.py finds in it, and its page."""
    root, path = tmp_path_factory.mktemp("tables"), list(sys.path)
    tables_tree(chain, root)
    bench = importlib.import_module("experiments.tables_page")
    sys.path[:] = path
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "hours", lambda: dict.fromkeys(bench.ROWS, 321.0))
        found = bench.summary(root, [0, 1], list(ROWS))
    found["groups"]["The loss"].append("region_3")  # a row that is not there
    common.write_json(root / "tables.json", found)
    report.main(report.Config(tables=str(root), json=str(root / "tables.json")))
    return root


def test_tables_page_has_every_row_and_number(tables):
    text, found = (tables / "report.html").read_text(), json.loads((tables / "tables.json").read_text())
    assert not re.search(r"https?://|@import|region_3|nan", re.sub(r"base64,[\w+/=]*", "", text))
    for name, row in found["rows"].items():
        assert report_tables.marked(row["title"]) in text
        for other in ("sft", "dynamicsboost"):
            assert name == other or report_tables.signed(row[f"vs_{other}"]["score"]) in text
    section = re.search(r"<section id=group-0>.*?</section>", text, re.S).group()
    assert "Against SFT: 1 higher, 1 lower, 0 not resolved" in section and section.count('class="strip') == 4
    assert "<td>0.988</td><td>321</td>" in section and "<td><b>−0.100 ± 0.0" in section
    assert "Against SFT: 1 higher, 0 lower, 1 not resolved" in text and ">0.755<small>" in text
    sweep = re.search(r"<section id=sweep>.*?</section>", text, re.S).group()
    assert "the steps from 1 given" in sweep and "except from none" in sweep and "<b>+0.125 ± 0.000</b>" in sweep
    for row in data.Shards(tables / "seed-0/shards", "prepare.py", "eval").rows[:8]:
        assert f"“{row['caption']}”" in text


def test_tables_page_works_in_a_browser(tables, tmp_path):
    dom = opened(tables, tmp_path, "#group=2&prompt=2&t=0.5")
    assert body(dom)["videos"] == "4 of 4" and body(dom)["picture"] == "24" and "error" not in body(dom)
    assert re.findall(r'aria-pressed="true">([^<]*)<', dom) == ["Which frames are given", "2"]
    assert re.findall(r'<figure class="cell"( hidden="")?', dom) == ["", "", "", ' hidden=""']


@pytest.mark.parametrize(
    "broken", ["tables.json", "seed-0", "seed-0/eval/gt_winner/samples.safetensors", "a list", "no mean"]
)
def test_what_the_tables_page_lacks_is_one_line(tables, tmp_path, broken):
    root = tmp_path / "tables"
    shutil.copytree(tables, root)
    given = root / broken
    if "json" in broken or "seed" in broken:
        shutil.rmtree(given) if given.is_dir() else given.unlink()
    else:
        given = root / "tables.json"
        given.write_text("[1, 2]" if broken == "a list" else re.sub('"mean": {', '"means": {', given.read_text()))
    with pytest.raises(common.UserError) as caught:
        report.main(report.Config(tables=str(root), json=str(root / "tables.json")))
    assert str(given) in str(caught.value) and "\n" not in str(caught.value)

"""The report: complete, self-contained, judged from its figures; and it works when a browser opens it."""

import html
import json
import re
import shutil
import string
import subprocess
from pathlib import Path

import helpers
import pytest
import torch

from experiments import page
from runtime.files import MANIFEST
from runtime.options import UserError
from runtime.shards import Shards
from tiny import codec as codecs

VIDEOS = 4 * 6 + 5 + 2 * 3  # players, continuations, pairs


@pytest.fixture(scope="module")
def demo(chain, tmp_path_factory) -> Path:
    """A copy of the chain with its report."""
    folder = helpers.copy(chain, tmp_path_factory.mktemp("report"), *helpers.STAGES)
    page.main(page.Config(demo=str(folder)))
    return folder


@pytest.fixture(scope="module")
def text(demo) -> str:
    return (demo / "report.html").read_text()


def test_summary_has_the_figures_and_the_times(demo):
    summary = json.loads((demo / "summary.json").read_text())
    *stages, total = summary.pop("seconds").items()
    assert summary == json.loads((demo / "eval" / "summary.json").read_text())
    assert [name for name, _ in stages] == list(helpers.STAGES)
    assert total == ("total", pytest.approx(sum(seconds for _, seconds in stages), abs=0.01))


def test_page_asks_for_nothing_from_outside(text):
    assert not re.search(r"https?://|@import|<link rel=stylesheet|<script src", text)
    assert all(at.startswith(("data:", "#")) for at in re.findall(r'(?:src|href)="([^"]*)"', text))
    assert all(at.startswith("#") for at in re.findall(r"url\(([^)]*)\)", text))
    assert len(text) < 6 * 2**20


def test_page_is_complete(demo, text):
    """Every part of the template is filled in; prompts, figures and the seconds of the stages are there."""
    template = string.Template((Path(page.__file__).parent / "page.html").read_text())
    assert not any(f"${name}" in text for name in template.get_identifiers())
    summary = json.loads((demo / "summary.json").read_text())
    for row in Shards(demo / "shards", "prepare.py", "eval").rows[: page.PLAYERS]:
        assert f"“{row['caption']}”" in text
    for word in ("N1 =", "N2 =", "95 % interval", "make demo SEED=0", *page.STAGES.values()):
        assert word in text
    for name, row in summary["table"].items():
        cells = re.search(rf"<th scope=row>{name}</th>(.*?)</tr>", text).group(1)
        shown = [page.num(row[metric], digits) for metric, (_, digits) in page.METRICS.items()]
        assert re.findall(r"<td[^>]*>([^<]*)", cells) == shown
    assert f"<b>{page.num(100 * summary['label_accuracy'], 1)} %</b>" in text
    assert f"<td>{summary['seconds']['total']:.1f}</td>" in text


def test_captions_are_escaped(demo):
    caption = "<script>alert('a')</script> & a red ball falls"
    shown = page.videos(codecs.load(demo / "shards"), torch.zeros(1, 48, 13, 2, 2), ["SFT"], caption)
    assert f"“{html.escape(caption)}”" in shown and "<script>" not in shown


# ---- what the figures are taken to say -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lo, hi, dyn, first, second",
    [
        (0.2, 0.4, 1.05, "good>✓ DynamicsBoost scores higher", "good>✓ The amount of motion stays within"),
        (-0.4, -0.2, 0.5, "bad>✗ DynamicsBoost scores lower", "bad>✗ The amount of motion differs by more than"),
        (-0.1, 0.3, 1.0, "open>· No difference can be claimed: the interval includes 0", "good>✓"),
    ],
)
def test_result_is_judged_from_the_figures(lo, hi, dyn, first, second):
    said = page.result_said({"SFT": {"dyn": 1.0}, "DynamicsBoost": {"dyn": dyn}}, {"lo": lo, "hi": hi})
    one, two = re.findall(r"<p class=(.*?)</p>", said.replace("<b aria-hidden=true>", "").replace("</b>", ""))
    assert one.startswith(first) and two.startswith(second)


def test_best_is_bold_and_dyn_is_best_near_the_real_clips():
    row = dict(score=-1.93, traj=4.0, presence=0.85, shape=0.063, dyn=1.08, accel=0.2)
    better = dict(row, score=-1.6, traj=3.2, presence=0.9, shape=0.06, dyn=1.0)
    table = {"Pretrain": row | {"dyn": 9.0}, "SFT": row, "DynamicsBoost": better, "real clips": row | {"dyn": 1.1}}
    cells = re.search(r"<th scope=row>SFT</th>(.*?)</tr>", page.results_table(table)).group(1)
    assert re.findall(r"<td class=best>([^<]*)", cells) == ["1.08", "0.200"]  # accel: as good as the others


@pytest.mark.parametrize("made, held, mark, words", [(2.0, 3.4, "✓", "41 % nearer"), (4.0, 2.0, "✗", "100 % further")])
def test_continuation_is_judged_against_holding(made, held, mark, words):
    found = {"next_frame": made, "hold": held}
    said = page.sweep_said({"next_frame_error": found, "sweep_rows": [{}, found]})
    assert mark in said and words in said


@pytest.mark.parametrize(
    "winner, loser, mark, words",
    [
        (-0.002, 0.003, "✓", "fitted better than before"),
        (0.001, 0.003, "·", "likelihood displacement"),
        (0.002, 0.001, "✗", "nothing was learned"),
    ],
)
def test_training_is_judged_by_region(winner, loser, mark, words):
    second, third = page.training_said([{"diff/w/2": winner, "diff/l/2": loser}]).split("</p>")[:2]
    assert mark in second and words in second
    assert "·" in third and "no pair of the last quarter" in third  # region ③ was not logged


def test_line_averages_what_is_there():
    """Twelve logged values: a moving average over one twelfth of them is the values themselves."""
    rows = [{"step": n, "loss": float(n)} if n % 2 else {"step": n} for n in range(24)]
    steps, values, *_ = page.line(rows, "loss")
    assert steps.tolist() == values.tolist() == list(range(1, 24, 2))
    steps, values, *_ = page.line([{"step": n, "loss": 3.0} for n in range(2000)], "loss")
    assert len(steps) == 400 and values == pytest.approx(3.0)  # the ends, too


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_missing_and_unfinished_demo_is_one_line(chain, tmp_path):
    with pytest.raises(UserError, match="nowhere: expected the folder of a demo, but it does not exist"):
        page.main(page.Config(demo=str(tmp_path / "nowhere")))
    unfinished = helpers.copy(chain, tmp_path / "demo", *helpers.STAGES)
    (unfinished / "asymdpo" / MANIFEST).unlink()
    with pytest.raises(UserError, match="run asymdpo.py first"):
        page.main(page.Config(demo=str(unfinished)))
    assert not (unfinished / "report.html").exists()


# ---- in a browser ----------------------------------------------------------------------------------------------------

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --virtual-time-budget=20000 --dump-dom"
).split()


@pytest.mark.parametrize("fragment", ["", "#t=0.5"])
def test_page_works_in_a_browser(demo, tmp_path, fragment):
    """Every video loads and no script fails; the address opens the page at a moment."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not browser:
        pytest.skip("no chromium installed: the report page was not opened in a browser")
    address = (demo / "report.html").as_uri() + fragment
    command = [browser, *FLAGS, f"--user-data-dir={tmp_path}", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    facts = dict(re.findall(r'data-(\w+)="([^"]*)"', re.search(r"<body[^>]*>", done.stdout).group()))
    assert "error" not in facts
    assert facts["videos"] == f"{VIDEOS} of {VIDEOS}" and done.stdout.count("<video") == VIDEOS
    assert re.search(r'<p id="broken" hidden', done.stdout)
    if fragment:
        made_up = re.findall(r'<figure class="cell( made)?" data-given="(\d+)"', done.stdout)
        assert facts["picture"] == "24" and [n for made, n in made_up if made] == ["1", "3", "6"]

"""The report: complete, self-contained, judged from its figures; and it works when a browser opens it."""

import dataclasses
import html
import json
import math
import re
import shutil
import string
import subprocess
import types
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from PIL import Image

import asymdpo
from experiments import figures, page, trails
from runtime.files import MANIFEST, open_manifest, write_manifest
from runtime.options import UserError
from runtime.shards import Shards
from tiny import balls

VIDEOS = 4 * 8 + 4 + 2 * 2  # players, continuations, pairs


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
    for word in ("N1 =", "N2 =", "95 % interval", "make demo SEED=0", page.verdict(summary), *summary["controls"]):
        assert word in text
    for metric, (name, factor, digits, arrow, _) in page.METRICS.items():
        cells = re.search(rf"<th scope=row>{name} {arrow}</th>(.*?)</tr>", text).group(1)
        shown = [page.num(factor * row[metric], digits) for row in summary["table"].values()]
        assert re.findall(r"<td[^>]*>([^<]*)", cells) == shown
    for found in (*summary["controls"].values(), summary["half"]):
        assert f"<small>{page.interval(found['difference']['score'])}</small>" in text
    assert f"<b>{page.num(100 * summary['labels']['accuracy'], 1)} %</b>" in text
    assert f"<code>total</code>&nbsp;{summary['seconds']['total']:.1f}" in text


def test_last_lines_are_the_verdict_and_the_report(demo, capsys):
    page.main(page.Config(demo=str(demo)))
    *_, first, second, last = capsys.readouterr().out.splitlines()
    summary = json.loads((demo / "summary.json").read_text())
    assert (first, second) == (page.verdict(summary), page.gap_closed(summary["table"]))
    assert re.fullmatch(rf"report: {demo}/report.html, \d\.\d MiB", last)


def test_pictures_for_the_readme(demo):
    """A still as wide as a README is read, and an animation that is small enough to open it."""
    with Image.open(demo / "demo.png") as still, Image.open(demo / "demo.gif") as moving:
        assert still.width == 800 and moving.n_frames == 25
    assert (demo / "demo.gif").stat().st_size < 1.5 * 2**20


# ---- the figures of docs/method.md -----------------------------------------------------------------------------------


def test_figures_of_the_method(chain, tmp_path, capsys):
    figures.main(figures.Config(demo=str(chain), out=str(tmp_path / "docs")))
    assert ", of pair ball-" in capsys.readouterr().out
    for name in ("continuation", "pairs", "loss"):
        with (
            Image.open(tmp_path / "docs" / f"method-{name}.png") as drawn,
            Image.open(helpers.ROOT / "docs" / f"method-{name}.png") as shown,
        ):
            assert drawn.width == shown.width == 800 and np.ptp(np.asarray(drawn.convert("L"))) > 200


@pytest.mark.parametrize("form, K", [("inside", 1), ("outside", 9)])
def test_curve_and_push_are_the_loss(form, K):
    """At S = 0 the loss is ln 2, or ln 2 / K; the push on frames before N1 is 0, and λ = 1 doubles the winner's."""
    cfg = asymdpo.Config(beta=5.0, form=form, sft_weight=0.0)
    assert figures.curve(cfg, np.array([-1.0, 0.0, 1.0]), 4, 13) == pytest.approx(
        [math.log1p(math.exp(x * K)) / K for x in (-1, 0, 1)], rel=1e-5
    )
    plain, own = (figures.push(dataclasses.replace(cfg, sft_weight=w), 4, 11, 13) for w in (0.0, 1.0))
    assert (plain[:, :4] == 0).all() and plain[:, 4:] == pytest.approx(np.outer([-1, 1], np.full(9, 5 / 2 / 9)))
    assert own == pytest.approx(plain * [[2], [1]])


# ---- the ball's path -------------------------------------------------------------------------------------------------

DECODED = types.SimpleNamespace(decode=lambda x0: x0)  # a codec whose latents are the pictures


def watched(track: np.ndarray, faint: slice = slice(0)) -> trails.Watched:
    """A ball that floats along track (2, T) px and is hardly there in some pictures, as trails.watch sees it."""
    light = balls.spots(track.T)
    light[faint] *= 0.3
    pictures = torch.from_numpy(balls.render(light))
    return trails.watch(DECODED, (2 * pictures - 1).permute(3, 0, 1, 2)[None], ["a ball floats"])[0]


def path(*start: float) -> np.ndarray:
    return balls.path(np.array(start), np.array([0.8, 0.6]), falling=False)


def test_valid_path_has_no_fault():
    clip = watched(path(20, 20))
    assert clip.valid and clip.mark.startswith("✓ ") and not clip.bad.any()
    for found in (clip.path, clip.nearest):  # at a wall the ball is cut off
        assert np.abs(found - path(20, 20)).max() < 2


def test_ball_that_stands_still_is_marked_where_it_does():
    track = path(20, 20)
    track[:, 20:] = track[:, 20:21]
    clip = watched(track)
    assert not clip.valid and clip.mark == "✗ frozen"
    assert clip.bad[20:].all()


def test_jump_is_marked_and_named():
    track = path(20, 20)
    track[:, 24] += 8
    clip = watched(track)
    assert clip.bad[23:25].all() and clip.bad.sum() == 2
    assert clip.traj < balls.VALID and clip.mark == "✗ jump"


def test_missing_ball_stays_where_it_was_and_is_a_fault():
    clip = watched(path(20, 20), faint=slice(30, 32))
    assert np.array_equal(clip.path[:, 30:32], clip.path[:, [29, 29]])
    assert clip.bad[29:31].all()


def test_captions_are_escaped():
    caption = "<script>alert('a')</script> & a ball falls"
    shown = page.videos([watched(path(20, 20))], ["SFT"], caption)
    assert f"“{html.escape(caption)}”" in shown and "<script>" not in shown


IMAGE = "<img src=x onerror=alert(1)></script>"


def test_names_of_figures_are_escaped():
    """Of models and of controls: they are keys of summary.json."""
    found = summary_of()
    found["controls"] = {IMAGE: found["controls"]["noise × 0.85"]}
    for shown in (page.controls_table(found), page.results_table({IMAGE: row(0.5), **found["table"]})):
        assert html.escape(IMAGE) in shown and "<img" not in shown


FIGURES = [("table", "SFT", "valid"), ("clips",), ("labels", "pairs"), ("sweep_rows", 3, "score"), ("seconds",)]


@pytest.mark.parametrize(
    "place, value",
    [  # no manifest with NaN can be written
        *((place, value) for place in FIGURES[:-1] for value in (IMAGE, None, math.nan, math.inf)),
        *((FIGURES[-1], value) for value in (IMAGE, None)),
    ],
)
def test_a_figure_that_is_no_number_is_refused(chain, tmp_path, place, value):
    """By its place, in a file whose manifest fits."""
    root = helpers.copy(chain, tmp_path, *helpers.STAGES)
    facts = open_manifest(root / "eval", "experiments.evaluate")
    summary = json.loads((root / "eval" / "summary.json").read_text(encoding="utf-8"))
    inside = facts if place == ("seconds",) else summary
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    (root / "eval" / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    write_manifest(root / "eval", list(facts.pop("files")), **facts)
    words = "seconds of eval" if inside is facts else " ".join(map(str, place))
    helpers.refused(f"expected a finite number for {words}, got", page.main, page.Config(demo=str(root)))
    assert not (root / "report.html").exists()


# ---- what the figures are taken to say -------------------------------------------------------------------------------


def row(valid: float, score: float = -1.0, dyn: float = 1.0) -> dict:
    return dict(valid=valid, score=score, dyn=dyn, w1=0.1, frozen=0.0, jump=0.1, traj=2.0, shape=0.02)


def difference(mean: float) -> dict:
    """A difference with an interval of ± 2 points."""
    valid = {"mean": mean, "lo": mean - 0.02, "hi": mean + 0.02}
    return {"valid": valid, "score": valid}


def summary_of(gain=0.12, longer=0.06, noise=0.1, bought=0.85) -> dict:
    """What eval might have found: DynamicsBoost's gains, and the share that noise alone brings SFT to."""
    table = {"Pretrain": row(0.6), "SFT": row(0.83), page.LONGER: row(0.95 - longer)}
    return {
        "table": {**table, page.OURS: row(0.95), page.REAL: row(1.0)},
        "difference": {"SFT": difference(gain), page.LONGER: difference(longer)},
        "controls": {"noise × 0.85": {"SFT": row(bought), page.OURS: row(0.97), "difference": difference(noise)}},
        "half": {**row(0.9), "difference": difference(0.07)},
    }


SHARES = "95 % of its clips are valid, SFT’s 83 %"


@pytest.mark.parametrize(
    "found, words",
    [
        ({}, f"DynamicsBoost: {SHARES}, SFT’s for as many operations 89 %, real clips’ 100 %; the gain"),
        ({}, "; the gain, +12.0 [+10.0, +14.0] points, holds under all 3 controls."),
        ({"gain": 0.01}, "; against SFT that is no gain that is resolved (+1.0 [−1.0, +3.0] points)."),
        ({"gain": -0.1}, "; against SFT that is a loss (−10.0 [−12.0, −8.0] points)."),
        ({"noise": 0.01}, " points, does not hold under noise × 0.85 (+1.0 [−1.0, +3.0])."),
        ({"noise": -0.1}, " points, does not hold under noise × 0.85 (−10.0 [−12.0, −8.0])."),
        ({"longer": 0.01}, " does not hold under SFT for as many operations (+1.0 [−1.0, +3.0])."),
        ({"longer": -0.03}, "SFT for as many operations is better. DynamicsBoost: 95 %"),
        ({"bought": 0.96}, "all 3 controls; but noise × 0.85 alone brings SFT to 96 %."),
    ],
)  # fmt: skip
def test_verdict_is_made_from_the_figures(found, words):
    said = page.verdict(summary_of(**found)).replace("\N{NO-BREAK SPACE}", " ")
    assert said.startswith(words) if "DynamicsBoost" in words else said.endswith(words)


def test_verdict_without_longer_training():
    summary = summary_of()
    del summary["table"][page.LONGER], summary["difference"][page.LONGER]
    said = page.verdict(summary)
    assert "as many operations" not in said and said.endswith("under all 2 controls.")
    assert "as many operations" not in page.controls_table(summary)


def test_share_of_the_gap_that_is_closed():
    table = {"SFT": row(0.8, -1.0), page.OURS: row(0.9, -0.8, 1.04), page.REAL: row(1.0, -0.2, 1.1)}
    said = page.gap_closed(table).replace("\N{NO-BREAK SPACE}", " ")
    assert "closes 50 % in valid clips and 25 % in score: score −1.00 → −0.80 (real −0.20)" in said
    assert said.endswith("dynamic degree 1.00 → 1.04 (real 1.10).")
    table[page.OURS] |= {"shape": 0.03, "dyn": 0.9}
    assert page.gap_closed(table).endswith(" It is worse than SFT in dynamic degree, shape.")
    assert "nothing (there is no gap) in valid clips" in page.gap_closed({**table, page.REAL: row(0.8)})


def test_control_is_coloured_by_its_interval():
    shown = page.controls_table(summary_of(noise=-0.1))
    cells = re.search(r"<th scope=row>noise × 0.85</th>(.*?)</tr>", shown).group(1)
    assert "<td class=bad><b>−10.0 [" in cells and "as above</th><td>83.0 %<small>−1.000</small></td>" in shown


def test_best_is_bold_and_dyn_is_best_near_the_real_clips():
    table = {"Pretrain": row(0.6, dyn=9.0), "SFT": row(0.8, dyn=1.08), "DynamicsBoost": row(0.9, dyn=1.0)}
    shown = page.results_table({**table, page.REAL: row(1.0, dyn=1.1)})
    best = {name: re.findall(r"<td class=best>([^<]*)", cells)
            for name, cells in re.findall(r"<th scope=row>(.*?)</th>(.*?)</tr>", shown)}  # fmt: skip
    assert best["dynamic degree → real"] == ["1.080"] and best["valid, % ↑"] == ["90.0"]
    assert best["jump, % ↓"] == 3 * ["10.0"]  # as good as the others


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
PROBE = """<style>html { width: 400px; }</style><script>
const cut = e => e.getBoundingClientRect().right > 400 || e.scrollWidth > e.clientWidth + 1;
const all = [...document.querySelectorAll('main, table, td, th, figure, figcaption, small, p')];
document.body.dataset.looked = all.length;
document.body.dataset.cut = all.filter(e => e.clientWidth && cut(e)).map(e => e.textContent).join();
</script>"""


def browse(address: str, folder: Path, *flags: str) -> tuple[dict[str, str], str]:
    """What the page's body says of itself, and the page as it then is."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not browser:
        pytest.skip("no chromium installed: the report page was not opened in a browser")
    command = [browser, *FLAGS, f"--user-data-dir={folder}", *flags, address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(re.findall(r'data-(\w+)="([^"]*)"', re.search(r"<body[^>]*>", done.stdout).group())), done.stdout


@pytest.mark.parametrize("fragment", ["", "#t=0.5"])
def test_page_works_in_a_browser(demo, tmp_path, fragment):
    """Every video loads and no script fails; the address opens the page at a moment; paths are drawn up to it."""
    facts, text = browse((demo / "report.html").as_uri() + fragment, tmp_path)
    assert "error" not in facts
    assert facts["videos"] == f"{VIDEOS} of {VIDEOS}" and text.count("<video") == VIDEOS
    assert re.search(r'<p id="broken" hidden', text)
    if fragment:
        made_up = re.findall(r'<figure class="cell( made)?" data-given="(\d+)"', text)
        assert facts["picture"] == "24" and [n for made, n in made_up if made] == ["1", "3", "6"]
        for points, drawn in re.findall(r'<svg[^>]*data-path="([^"]*)"[^>]*>(.*?)</svg>', text):
            whole, _, now = drawn.partition("<g")[2].partition("</g>")
            points = points.split()
            assert set(re.findall(r"[\d.]+,[\d.]+", whole)) == set(points)
            assert set(re.findall(r"[\d.]+,[\d.]+", now)) == set(points[:25])


def test_nothing_is_cut_on_a_narrow_screen(demo, tmp_path):
    """400 px: every table, caption and player ends within the screen, and every text within its own place."""
    widest = page.results_table(summary_of()["table"]) + page.controls_table(summary_of())  # with longer SFT
    text = (demo / "report.html").read_text().replace("</main>", f"{widest}</main>{PROBE}")
    (tmp_path / "report.html").write_text(text)
    facts, _ = browse((tmp_path / "report.html").as_uri(), tmp_path / "browser", "--window-size=500,900")
    assert int(facts["looked"]) > 200 and facts["cut"] == ""

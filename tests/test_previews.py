"""What a training shows on its way: previews of the model so far, TensorBoard's events, the line at its end."""

import re
import signal

import pytest
from helpers import contents, metrics, refused, run_stage, stop_at

import runtime.run
import sample
import sampling
from runtime.group import Group
from runtime.options import Interrupted
from runtime.run import EVENTS
from runtime.video import read_clip

FOUR = dict(steps=4, save_every=3)
PROMPTS = "a ball floats\na ball falls quickly\n"


@pytest.fixture(autouse=True)
def two_evaluations(monkeypatch):
    """What a preview and a sample take, to be quick."""
    monkeypatch.setitem(sampling.PRESETS, "tiny", sampling.PRESETS["tiny"] | {"nfe": 2})


def shown(tmp_path, **options) -> dict:
    """Options for previews of two prompts."""
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    return dict(preview_every=2, preview_prompts=str(tmp_path / "prompts.txt"), **options)


def trained(folder) -> dict[str, str]:
    """What a run makes without its previews."""
    return {name: digest for name, digest in contents(folder).items() if not name.startswith("previews")}


def test_a_preview_is_the_later_sample(chain, tmp_path, capsys):
    """asymdpo's last preview is what sample.py makes of its LoRA, but for what fusing it rounds; the first, what it
    makes of the cold start. The training is what it is without, to the bit.
    """
    out = run_stage(chain, "asymdpo", out=tmp_path / "asymdpo", **shown(tmp_path, preview_data=str(chain / "shards")))
    line = r"^asymdpo: \S+/asymdpo/lora.safetensors, 2 steps in [\d.]+ s, loss \d+\.\d{4}, \d+ % of pairs right$"
    assert re.search(line, capsys.readouterr().out, re.M)
    assert trained(out) == trained(chain / "asymdpo")
    assert (out / "previews" / "sheet.png").stat().st_size > 10_000
    options = dict(base=str(chain / "base"), data=str(chain / "shards"), prompts=str(tmp_path / "prompts.txt"))
    for step, loras in ((0, ["sft"]), (2, ["sft", "asymdpo"])):
        lora = ",".join(str(chain / name) for name in loras)
        sample.main(sample.Config(**options, lora=lora, out=str(tmp_path / f"videos-{step}")))
        paths = tmp_path / f"videos-{step}" / "1-0.mp4", out / "previews" / f"step-{step:07d}" / "1.mp4"
        later, preview = (read_clip(path, None).astype(int) for path in paths)
        assert later.std() > 10 and abs(later - preview).max() <= 2, step


def test_a_continuation_goes_on_from_its_own_clips(chain, tmp_path, monkeypatch):
    """Its previews begin with the clips' own frames, and change nothing."""
    decoded, write = [], sampling.write_video
    monkeypatch.setattr(sampling, "ROWS", 2)
    monkeypatch.setattr(sampling, "write_video", lambda path, x0, *args: (decoded.append(x0), write(path, x0, *args)))
    out = run_stage(chain, "continuation", out=tmp_path, preview_every=2)
    assert trained(out) == trained(chain / "continuation")
    clips = sampling.Shards(chain / "shards", "prepare.py", "train")
    real = clips.get("x0", [0, 1, 0, 1])
    assert len(decoded) == 4
    for x0, clip in zip(decoded, real):
        assert (x0[0, :, :4] == clip[:, :4]).all() and (x0[0, :, 4:] != clip[:, 4:]).any()


def test_previews_that_were_cut_are_made_again(chain, tmp_path, monkeypatch, capsys):
    """Killed in one, and asked to stop in another: the run ends in the bytes of a straight one, previews among them."""
    monkeypatch.setattr(sampling.Previews, "_draw", lambda self: None)
    options = shown(tmp_path, **FOUR)
    straight = run_stage(chain, "sft", out=tmp_path / "straight", **options)
    assert len([name for name in contents(straight) if name.endswith(".mp4")]) == 6
    cut = tmp_path / "cut"
    with stop_at(monkeypatch, sampling, "write_video", 3), pytest.raises(KeyboardInterrupt):
        run_stage(chain, "sft", out=cut, **options)
    assert not (cut / "previews" / "step-0000002").exists()
    stops = iter((0, 0, signal.SIGTERM))  # the first process asks after each round of videos, of step 2 here
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(sampling, "asked_to_stop", lambda: next(stops))
        (cut / "previews" / "step-0000004").mkdir()  # of an earlier start that came further
        (cut / "previews" / "step-0000000").rename(cut / "previews" / "step-0000003")
        run_stage(chain, "sft", out=cut, **options)
    assert [path.name for path in sorted((cut / "previews").glob("step*"))] == ["step-0000000"]
    assert [path.name for path in (cut / "checkpoints").iterdir()] == ["step-0000002"]
    (cut / "previews" / "step-0000004").mkdir()
    capsys.readouterr()
    run_stage(chain, "sft", out=cut, **options)
    assert "; goes on from step 2 of 4; 1 process" in capsys.readouterr().err
    assert contents(cut) == contents(straight)


def test_previews_of_other_prompts_replace_those_that_are_there(chain, tmp_path, monkeypatch):
    """A run may go on with other prompts, as they change nothing that is trained: no sheet shows both."""
    monkeypatch.setattr(sampling.Previews, "_draw", lambda self: None)
    options = shown(tmp_path, **FOUR)
    with stop_at(monkeypatch, runtime.run.Run, "log", 3), pytest.raises(KeyboardInterrupt):
        run_stage(chain, "sft", out=tmp_path / "run", **options)
    (tmp_path / "prompts.txt").write_text("a ball\n")
    run_stage(chain, "sft", out=tmp_path / "run", **options)
    found = sorted(str(path.relative_to(tmp_path / "run" / "previews")) for path in tmp_path.glob("run/**/*.mp4"))
    assert found == ["step-0000004/0.mp4"]


def test_a_preview_that_is_not_finite_ends_nothing(chain, tmp_path, monkeypatch, capsys):
    """It is said, and left out: its cell is empty. No process goes into a collective, which could not say whom it waits
    for, before all are there.
    """
    calls = []

    def noted(name: str, method):
        return lambda *args, **options: (calls.append(name), method(*args, **options))[1]

    for name in ("meet", "wait", "sum"):
        monkeypatch.setattr(Group, name, noted(name, getattr(Group, name)))
    solve = sampling.flow.SOLVERS["unipc"]
    monkeypatch.setitem(sampling.flow.SOLVERS, "unipc", lambda *args: solve(*args).log())
    out = run_stage(chain, "sft", out=tmp_path / "run", **shown(tmp_path))
    assert "0.mp4, 'a ball floats', is not written: it is not finite" in capsys.readouterr().err
    assert trained(out) == trained(chain / "sft") and not list(out.glob("previews/*/*.mp4"))
    assert calls.count("sum") == 8 and all(before != "sum" for before, call in zip(calls, calls[1:]) if call == "sum")


def test_what_previews_need_is_asked_for_before_anything_is_loaded(chain, tmp_path):
    options = shown(tmp_path)
    refused("--preview_every and --preview_prompts.* together, got 2 and ''", run_stage, chain, "sft",
            out=tmp_path / "a", preview_every=2)  # fmt: skip
    refused("no.txt: expected a text file", run_stage, chain, "sft", out=tmp_path / "a",
            **options | {"preview_prompts": str(tmp_path / "no.txt")})  # fmt: skip
    refused("shards: expected a finished folder made by prepare.py", run_stage, chain, "asymdpo", out=tmp_path / "a",
            **options, preview_data=str(tmp_path / "shards"))  # fmt: skip
    (tmp_path / "prompts.txt").write_text("a ball\nzebras\n")
    refused(
        "prompt 'zebras': expected words of the captions of", run_stage, chain, "sft", out=tmp_path / "a", **options
    )
    assert not (tmp_path / "a").exists()


# ---- TensorBoard -----------------------------------------------------------------------------------------------------


def test_events_hold_what_metrics_hold(chain, tmp_path, monkeypatch):
    """As TensorBoard reads them: the same names, steps and figures, after a start anew and a resume, too."""
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard: pip install tensorboard"
    )
    six = dict(steps=6, save_every=2)
    for logged in (1, 5):  # before the first checkpoint, and after the second
        with stop_at(monkeypatch, runtime.run.Run, "log", logged), pytest.raises(KeyboardInterrupt):
            run_stage(chain, "asymdpo", out=tmp_path, **six)
    run_stage(chain, "asymdpo", out=tmp_path, **six)
    assert len(list(tmp_path.glob(EVENTS))) == 2
    events = reader.EventAccumulator(str(tmp_path)).Reload()
    rows = metrics(tmp_path)
    assert set(events.Tags()["scalars"]) == {name for row in rows for name in row} - {"step"}
    for name in events.Tags()["scalars"]:
        wanted = [(row["step"], row[name]) for row in rows if name in row]
        assert [(e.step, e.value) for e in events.Scalars(name)] == [(s, pytest.approx(v, rel=1e-6)) for s, v in wanted]


def test_times_are_told_in_words():
    told = {0.04: "0.0 s", 9.96: "10 s", 59.6: "1 min 0 s", 3599: "59 min 59 s", 7384: "2 h 3 min"}
    assert {seconds: runtime.run._spoken(seconds) for seconds in told} == told

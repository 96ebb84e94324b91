"""A training loop that meets NaN, a signal, or a weight that is gone: no weight changes by it, and all is said."""

import json
import math
import signal

import pytest
import torch
from helpers import contents, metrics, refused, run_stage
from safetensors.torch import save_file

import asymdpo
import runtime.files
import runtime.group
import runtime.train
import sft
from runtime.options import Diverged, Interrupted
from runtime.shards import Shards, write_shard
from runtime.train import Training

SIX = dict(steps=6, save_every=2)


def bad_at(monkeypatch, steps, owner=sft, name="flow_loss", harm=math.nan):
    """Within the test the loss of one sample is not finite at these steps."""
    original, calls = getattr(owner, name), iter(range(100))

    def harmed(*args):
        found = original(*args)
        losses = found[0] if isinstance(found, tuple) else found
        losses.data[1] = harm if next(calls) + 1 in steps else losses.data[1]
        return found

    monkeypatch.setattr(owner, name, harmed)


@pytest.mark.parametrize("name, owner, loss", [("sft", sft, "flow_loss"), ("asymdpo", asymdpo, "asymdpo_loss")])
def test_a_step_that_is_not_finite_changes_nothing(name, owner, loss, chain, tmp_path, monkeypatch, capsys):
    """It is counted, logged and shown with its sample; the run goes on, and its manifest has the number."""
    bad_at(monkeypatch, (2, 3, 5), owner, loss, math.inf)
    weights, update = [], Training.update

    def noted(self, *args):
        before = [p.clone() for p in self.trained.values()]
        row = update(self, *args)
        weights.append(all(torch.equal(a, b) for a, b in zip(before, self.trained.values())))
        return row

    monkeypatch.setattr(Training, "update", noted)
    out = run_stage(chain, name, out=tmp_path, **SIX)
    said = capsys.readouterr().err
    assert weights == [False, True, True, False, True, False]
    assert [row.get("skipped") for row in metrics(out)] == [None, 1, 2, None, 3, None]
    read = chain / ("shards" if name == "sft" else "pairs")
    ids = [row["id"] for row in Shards(read, "prepare.py make_pairs.py").rows]
    line = next(line for line in said.splitlines() if "step 5 changed nothing: its loss is not finite at" in line)
    assert sum(repr(name) in line for name in ids) == 1 and "3 skipped so far" in line
    assert json.loads((out / "MANIFEST.json").read_text())["skipped"] == 3


def test_three_in_a_row_end_the_run(chain, tmp_path, monkeypatch):
    """Also across a restart; the last checkpoint stays as it was, and nothing is sealed."""
    bad_at(monkeypatch, (4, 5, 6))
    said = refused("3 steps in a row were not finite, up to step 6.*step-0000004", run_stage, chain, "sft",
                   kind=Diverged, out=tmp_path, **SIX)  # fmt: skip
    assert "use another --out" in said and not (tmp_path / "MANIFEST.json").exists()
    assert not list(tmp_path.glob("*.safetensors"))
    monkeypatch.undo()
    bad_at(monkeypatch, (1, 2))  # steps 5 and 6 of the resumed run, whose fourth step is one already
    refused("3 steps in a row", run_stage, chain, "sft", kind=Diverged, out=tmp_path, **SIX)


def test_a_gradient_that_is_not_finite(chain, tmp_path, monkeypatch, capsys):
    """Of a finite loss: all samples of the batch are named. The rows that are left are those of a run without it."""
    total, calls = runtime.group.Group.sum_gradients, iter(range(100))

    def harmed(self, parameters):
        total(self, parameters)
        if next(calls) == 1:
            parameters[0].grad[0] = math.nan

    monkeypatch.setattr(runtime.group.Group, "sum_gradients", harmed)
    run_stage(chain, "sft", out=tmp_path, **SIX)
    line = next(line for line in capsys.readouterr().err.splitlines() if "step 2 changed nothing" in line)
    assert "its gradient is not finite, of" in line and line.count("'") == 8


def test_a_rate_that_is_too_high_is_no_success(chain, tmp_path):
    """The reported case: it ended with a manifest and weights of NaN."""
    with pytest.raises(Diverged):
        run_stage(chain, "base", out=tmp_path, steps=20, lr=1e30, save_every=1)
    assert not (tmp_path / "MANIFEST.json").exists()


# ---- what is read and written ----------------------------------------------------------------------------------------


def test_inputs_that_are_not_finite_are_refused(chain, tmp_path):
    """By file, field and sample; what a writer is given is rejected by its name."""
    rows = [{"id": name, "caption": "", "split": "train"} for name in "abc"]
    x0 = [torch.zeros(2, 3, 2, 2) for _ in rows]
    x0[1][0, 0] = math.nan
    text = [torch.zeros(1, 4), torch.zeros(1, 4), torch.full((1, 4), math.inf)]
    write_shard(tmp_path, 0, rows, {"x0": x0}, text, [])
    told = json.loads((tmp_path / "shard-00000.json").read_text())
    assert [row["id"] for row in told["rows"]] == ["a"]
    assert {row["id"]: row["reason"] for row in told["rejects"]} == {
        "b": "its x0 is not finite",
        "c": "its text is not finite",
    }
    path = tmp_path / "x.safetensors"
    with pytest.raises(Diverged, match="x.safetensors is not written: its tensor b is not finite"):
        runtime.files.write_tensors(path, {"a": torch.zeros(1), "b": torch.tensor([math.inf])})
    save_file({"b": torch.tensor([math.nan])}, path)
    refused("x.safetensors: expected finite numbers, got NaN or infinity in b", runtime.files.read_tensors, path)


# ---- signals ---------------------------------------------------------------------------------------------------------


def test_a_signal_saves_at_the_end_of_the_step(chain, tmp_path, monkeypatch):
    """And the run goes on to the bytes of one that nobody interrupted."""
    straight = run_stage(chain, "sft", out=tmp_path / "straight", **SIX)
    calls = iter((0, 0, 0, *[signal.SIGTERM] * 9))  # the third step asks, once in `update` and once at its end
    monkeypatch.setattr(runtime.train, "asked_to_stop", lambda: next(calls))
    with pytest.raises(Interrupted):
        run_stage(chain, "sft", out=tmp_path / "cut", **SIX)
    monkeypatch.undo()
    assert sorted(p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()) == ["step-0000002", "step-0000004"]
    assert contents(run_stage(chain, "sft", out=tmp_path / "cut", **SIX)) == contents(straight)

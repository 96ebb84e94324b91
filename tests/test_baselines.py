"""The baselines: their losses by hand and in plain float64, their pairs, and runs on them."""

import math

import pytest
import torch
from helpers import contents, make_samples, metrics, run_stage

import asymdpo
import flow
from experiments import baselines, pairs
from experiments.pairs import SIDES
from runtime.group import Group
from runtime.shards import Shards
from wan.lora import load_adapted, lora_files

LABELS = torch.tensor([[1, 1, -1, 0, 0], [-1, 0, 1, 1, -1]])
CLIPS = torch.tensor([1, -1])[:, None].expand(2, 5)  # a label a clip: Flow-DPO's


# ---- losses ----------------------------------------------------------------------------------------------------------


def loss_of(name, sides, beta):
    """The loss of first and second (v, v, ref, ref, target, target)."""
    labels = {"flow": CLIPS, "dense": LABELS}[name]
    return baselines.baseline_loss(baselines.Config(loss=name, beta=beta), sides, labels)[0]


def plain_loss(name, sides, beta):
    """The papers' equations, read off: frame by frame, two errors and their difference, of who won and who lost."""
    losses = []
    for v_1, v_2, r_1, r_2, y_1, y_2, signs, won in zip(*sides, LABELS.tolist(), CLIPS[:, 0].tolist()):
        e = lambda f, y, i: ((y[:, i] - f[:, i]) ** 2).mean()  # noqa: E731
        d_1, d_2 = ([e(v, y, i) - e(r, y, i) for i in range(5)] for v, r, y in ((v_1, r_1, y_1), (v_2, r_2, y_2)))
        d_w, d_l = (d_1, d_2) if won > 0 else (d_2, d_1)
        z = {
            "flow": beta / 2 * (sum(d_w) / 5 - sum(d_l) / 5),
            "dense": beta * sum(g * (a - b) for g, a, b in zip(signs, d_1, d_2)) / sum(g != 0 for g in signs),
        }[name]
        losses.append(torch.log1p(z.exp()))
    return torch.stack(losses)


@pytest.mark.parametrize("name", ["flow", "dense"])
def test_losses_are_the_equations(name):
    """Value, and gradient at both policies: in float64 to 1e-12, of float32 inputs to 1e-6."""
    sides = [a.requires_grad_(i < 2) for i, a in enumerate(torch.randn(6, 2, 3, 5, 2, 2, dtype=torch.float64))]
    truth, found = plain_loss(name, sides, 1.5), loss_of(name, sides, 1.5)
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(found.sum(), sides[:2]), torch.autograd.grad(truth.sum(), sides[:2])):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)
    single = [a.detach().float() for a in sides]
    truth = plain_loss(name, [a.double() for a in single], 1.5)
    torch.testing.assert_close(loss_of(name, single, 1.5).double(), truth, rtol=1e-6, atol=1e-7)


def test_ties_reach_neither_loss_nor_gradient():
    """Whatever stands in a frame without a label, NaN included."""
    clean = torch.randn(6, 2, 3, 5, 2, 2)
    tied = (LABELS == 0)[:, None, :, None, None]
    sides = [torch.where(tied, float("nan"), a).requires_grad_() for a in clean]
    loss = loss_of("dense", sides, 2.0)
    assert torch.equal(loss, loss_of("dense", list(clean), 2.0))
    for gradient in torch.autograd.grad(loss.sum(), sides[:2]):
        assert gradient.isfinite().all() and (gradient.masked_select(tied) == 0).all()
        assert (gradient.masked_select(~tied) != 0).all()


# ---- pairs, and training on them -------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss, of, labels", [("flow", "flow", "by_clip"), ("dense", "structural", "by_segment")])
def test_a_run_begins_at_ln2_and_prefers_the_winner(loss, of, labels, chain, made, tmp_path, capsys):
    """Margin 0 and accuracies ½ at step 0. Who was preferred is also told by time."""
    options = dict(steps=12, warmup=1, lr=2e-3, rank=4, layers="attn", batch_size=8, t_mean=0.0, beta=50.0)
    folders = dict(base=chain / "base", sft=chain / "sft", pairs=made[of], labels=made[labels], out=tmp_path / "run")
    baselines.main(baselines.Config(loss=loss, **options, **{k: str(v) for k, v in folders.items()}))
    assert load_adapted(chain / "base", lora_files(f"{chain / 'sft'},{tmp_path / 'run'}"))  # as sample.py --lora does
    first, *rest = metrics(tmp_path / "run")
    assert "S = 0 (expected exactly 0), loss 0.6931 (expected ln 2 = 0.6931)" in capsys.readouterr().err
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["S_abs"] == first["rewards/margins"] == 0 and first["rewards/accuracies"] == 0.5
    assert {first[k] for k in first if k.startswith("acc/")} == {0.5}
    assert first["err/w_policy"] == first["err/w_ref"] > 0
    assert sum(row["rewards/margins"] for row in rest[-4:]) > 0 and rest[-1]["loss"] < math.log(2)
    assert all(0 <= row[k] <= 1 for row in rest for k in row if k.startswith("acc/t"))
    assert any(row.get("acc/t1", 0.5) != 0.5 for row in rest)
    for row in rest:
        assert row["rewards/chosen"] - row["rewards/rejected"] == pytest.approx(row["rewards/margins"], abs=1e-4)
        assert row["err/w_policy"] - row["err/w_ref"] == pytest.approx(row["diff/w"], abs=1e-5)


def test_what_is_said_of_a_run():
    """What step 0 must read; that nothing moves; and no word of saturation, which these losses do not have."""
    row = {"saturated": 0.75, "S": 0.0, "loss": 0.7, "lora_B": 1e-5, "grad_norm": 1e-3}
    cfg = baselines.Config(beta=50.0, warmup=20, lr=5e-6)
    assert asymdpo.explain(cfg, 100, row) is None and asymdpo.explain(cfg, 50, row) is None
    for size in (1e-7, math.nan):
        assert "stuck" in asymdpo.explain(cfg, 50, {**row, "lora_B": size})
    first = asymdpo.explain(asymdpo.Config(beta=50.0, sft_weight=0.5), 0, row)
    assert "(expected ln 2 = 0.6931 and 12.5 times the winner's own loss)" in first


@pytest.mark.parametrize("kind", ["flow", "structural"])
def test_samples_in_no_order(kind, chain, made, tmp_path):
    """Two sides that differ, a function of (clip, seed): the same bytes again, 1e-4 in other batches; --lora counts."""
    before, few = Shards(made[kind], "experiments.pairs"), range(3)
    first, second = (before.get(side, few) for side in SIDES)
    assert all(not torch.isclose(a, b).all() for a, b in zip(first, second)) and first.isfinite().all()
    make_samples(chain, tmp_path / "again", kind=kind)
    assert contents(tmp_path / "again") == contents(made[kind])
    for options, same in ((dict(shard_size=3), True), (dict(seed=1), False), (dict(lora=""), False)):
        other = make_samples(chain, tmp_path / str(options), kind=kind, clips=3, **options)
        assert torch.allclose(other.get("first", few), first, atol=1e-4) == same, options
    eta = [row.get("eta", 0.7) for row in before.rows]
    assert all(0.65 <= e <= 0.8 for e in eta) and len(set(eta)) == (1 if kind == "flow" else len(eta))


def test_structural_samples_start_at_one_time_and_stay_on_the_path():
    """Both sides start at the clip's own η; the exact velocity to some x0 leads there; as many calls as the whole grid
    has steps below eta_max: of the tiny preset's 12, whose level 0.8 is, 6; of Wan's 50, 23."""
    x0, goal, text, seen = *torch.randn(2, 3, 6, 13, 2, 2), torch.randn(3, 5, 8), []

    def net(x, t, text):
        seen.append((t, x))
        return (x - goal) / flow.per_sample(t, x)

    cfg = pairs.Config(kind="structural", nfe=12, t_shift=4.0)
    fields, rows = pairs.sample_pairs(net, x0, text, ["a", "b", "d"], cfg)
    assert all(torch.allclose(fields[side], goal, atol=1e-4) for side in SIDES)
    times, eta = torch.stack([t for t, _ in seen]), torch.tensor([row["eta"] for row in rows])
    assert len(times) == 12 and torch.equal(times[:6], times[6:]) and (times[:6].diff(dim=0) < 0).all()
    assert torch.allclose(times[0], eta, atol=1e-4) and len(set(eta.tolist())) == 3
    one, two = ((seen[k][1] - (1 - flow.per_sample(eta, x0)) * x0) / flow.per_sample(eta, x0) for k in (0, 6))
    assert abs(one.std() - 1) < 0.1 and abs((one * two).mean()) < 0.1  # each its own noise, of 936 numbers
    for nfe, shift, most, steps in ((12, 4.0, 0.8, 6), (50, 5.0, 0.8, 23), (50, 5.0, 1.0, 50), (12, 4.0, 1.0, 12)):
        assert pairs.structural_steps(pairs.Config(nfe=nfe, t_shift=shift, eta_max=most)) == steps


def test_a_second_round(chain, tmp_path):
    """Of the method: pairs on base + SFT + DPO, and training that starts there: the reference is all three."""
    both = f"{chain / 'sft'}, {chain / 'asymdpo'}"
    run_stage(chain, "pairs", lora=both, clips=4, out=str(tmp_path / "pairs"))
    out = run_stage(chain, "asymdpo", pairs=str(tmp_path / "pairs"), sft=both, out=str(tmp_path / "dpo"), steps=1)
    cfg = asymdpo.Config(base=str(chain / "base"), sft=both, layers="attn", rank=4)
    net = asymdpo.build(cfg, Group(), (48, 13, 2, 2)).state_dict()
    fused = [load_adapted(chain / "base", lora_files(names)) for names in (both, str(chain / "sft"))]
    one, two = (f.state_dict()["blocks.0.self_attn.q.weight"] for f in fused)
    assert metrics(out)[0]["S_abs"] == 0
    assert torch.equal(net["blocks.0.self_attn.q.weight"], one) and not torch.equal(one, two)

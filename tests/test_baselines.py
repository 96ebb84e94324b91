"""The baselines: their losses by hand and in plain float64, their pairs, and runs on them."""

import math

import pytest
import torch
from helpers import contents, make_samples, metrics, run_stage

import asymdpo
import flow
import make_pairs
import model
from runtime import run as common
from runtime import shards as data

LOSSES = {  # name -> options
    "outside": dict(form="outside"), "inside": dict(form="inside"), "plain": dict(form="plain"),
    "flow": dict(loss="flow"), "dense": dict(loss="dense"),
}  # fmt: skip
LABELS = torch.tensor([[1, 1, -1, 0, 0], [-1, 0, 1, 1, -1]])
SIDES = ("first", "second")


# ---- losses ----------------------------------------------------------------------------------------------------------


def loss_of(name, sides, beta, labels=LABELS, **more):
    """asymdpo.dpo_loss from frame 2 on, of first and second (v, v, ref, ref, target, target)."""
    labels = labels[: len(sides[0])] if name == "dense" else None
    n1 = torch.full((len(sides[0]),), 2)
    sides = sides if labels is None else asymdpo.prefer(sides, labels)
    return asymdpo.dpo_loss(asymdpo.Config(beta=beta, **LOSSES[name], **more), sides, n1, n1 + 2, labels)[0]


def plain_loss(name, sides, beta):
    """The equations in asymdpo.py's head, read off: frame by frame, two errors and their difference."""
    losses = []
    for v_w, v_l, r_w, r_l, y_w, y_l, label_ in zip(*sides, LABELS.tolist()):
        e = lambda f, y, i: ((y[:, i] - f[:, i]) ** 2).mean()  # noqa: E731
        s_w, s_l = ([e(v, y, i) - e(r, y, i) for i in range(5)] for v, r, y in ((v_w, r_w, y_w), (v_l, r_l, y_l)))
        S, K = sum(s_w[2:]) - sum(s_l[2:]), 3
        z = {
            "outside": beta * S, "plain": beta * S, "inside": beta * S / K,
            "flow": beta / 2 * (sum(s_w) / 5 - sum(s_l) / 5),
            "dense": beta * sum(g * (a - b) for g, a, b in zip(label_, s_w, s_l)) / sum(g != 0 for g in label_),
        }[name]  # fmt: skip
        losses.append(torch.log1p(z.exp()) / (K if name == "outside" else 1))
    return torch.stack(losses)


def test_losses_by_hand():
    """Five frames of one number, every target 0. d = policy² − reference²:

    winner  policy 1 0 2 0 1   reference 0 1 1 1 0   d   1 −1  3 −1  1
    loser   policy 2 1 0 1 2   reference 1 1 1 2 1   d   3  0 −1 −3  3     difference −2 −1 4 2 −2
    N1 = 2: S = 4 + 2 − 2 = 4, K = 3; mean over all frames 1/5; labels + + − 0 0: (−2 − 1 − 4)/3 = −7/3
    """
    numbers = [[1, 0, 2, 0, 1], [2, 1, 0, 1, 2], [0, 1, 1, 1, 0], [1, 1, 1, 2, 1], [0] * 5, [0] * 5]
    sides = list(torch.tensor(numbers, dtype=torch.float32).view(6, 1, 1, 5, 1, 1))
    for name, beta, expected in (
        ("outside", 0.75, math.log(1 + math.e**3) / 3),
        ("inside", 0.75, math.log(1 + math.e)),
        ("plain", 0.75, math.log(1 + math.e**3)),
        ("flow", 10.0, math.log(1 + math.e)),  # 10/2 · 1/5 = 1
        ("dense", 3 / 7, math.log(1 + 1 / math.e)),  # 3/7 · −7/3 = −1
    ):
        assert loss_of(name, sides, beta).item() == pytest.approx(expected, rel=1e-6), name


@pytest.mark.parametrize("name", LOSSES)
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


@pytest.mark.parametrize("sft_weight", [0.0, 0.5])
def test_ties_reach_neither_loss_nor_gradient(sft_weight):
    """Whatever stands in a frame without a label, NaN included; the optional SFT term leaves it out, too."""
    clean = torch.randn(6, 2, 3, 5, 2, 2)
    tied = (LABELS == 0)[:, None, :, None, None]
    sides = [torch.where(tied, float("nan"), a).requires_grad_() for a in clean]
    loss = loss_of("dense", sides, 2.0, sft_weight=sft_weight)
    assert torch.equal(loss, loss_of("dense", list(clean), 2.0, sft_weight=sft_weight))
    for gradient in torch.autograd.grad(loss.sum(), sides[:2]):
        assert gradient.isfinite().all() and (gradient.masked_select(tied) == 0).all()
        assert sft_weight or (gradient.masked_select(~tied) != 0).all()


def test_dense_is_flow_where_one_side_always_won():
    """At twice the temperature; and with the sides swapped and the labels negated nothing changes."""
    sides = list(torch.randn(6, 2, 3, 5, 2, 2, dtype=torch.float64))
    won = loss_of("dense", sides, 1.5, labels=torch.ones_like(LABELS))
    torch.testing.assert_close(won, loss_of("flow", sides, 3.0), rtol=1e-12, atol=0)
    swapped = [sides[i] for i in (1, 0, 3, 2, 5, 4)]
    torch.testing.assert_close(loss_of("dense", sides, 1.5), loss_of("dense", swapped, 1.5, labels=-LABELS))
    assert not torch.isclose(loss_of("dense", sides, 1.5), loss_of("dense", swapped, 1.5)).any()


# ---- pairs, and training on them -------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss, of, labels", [("flow", "flow", "by_clip"), ("dense", "structural", "by_segment")])
def test_a_run_begins_at_ln2_and_prefers_the_winner(loss, of, labels, chain, made, tmp_path, capsys):
    """Margin 0 and accuracies ½ at step 0, whatever --form says; all of such a pair is region ③."""
    options = dict(form="outside", steps=12, lr=2e-3, batch_size=8, t_mean=0.0, beta=50.0, out=str(tmp_path / "run"))
    out = run_stage(chain, "asymdpo", loss=loss, pairs=str(made[of]), labels=str(made[labels]), **options)
    first, *rest = metrics(out)
    assert "loss 0.6931 (expected ln 2 = 0.6931)" in capsys.readouterr().err
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["S_abs"] == first["rewards/margins"] == 0 and first["rewards/accuracies"] == 0.5
    assert {first[k] for k in first if k.startswith("acc/")} == {0.5}
    assert sum(row["rewards/margins"] for row in rest[-4:]) > 0 and rest[-1]["loss"] < math.log(2)
    assert all(0 <= row[k] <= 1 for row in rest for k in row if k.startswith("acc/3/t"))
    assert not any("/2" in k for row in rest for k in row) and any(row.get("acc/3/t1", 0.5) != 0.5 for row in rest)
    for row in rest:
        assert row["rewards/chosen"] - row["rewards/rejected"] == pytest.approx(row["rewards/margins"], abs=1e-4)
    assert any(k.startswith("acc/2/t") for k in metrics(chain / "asymdpo")[1])  # of continuations, that is told apart


def test_what_is_said_of_a_run():
    """Saturation where |βS| is the sigmoid's argument, and not where it is divided; what step 0 must read."""
    row, options = {"saturated": 0.75, "S_abs": 1.0, "S": 0.0, "loss": 0.7}, dict(beta=50.0, warmup=20)
    for more, said in (dict(form="outside"), 1), (dict(form="inside"), 0), (dict(loss="flow", form="outside"), 0):
        sentence = asymdpo.explain(asymdpo.Config(**options, **more), 100, row)
        assert bool(sentence) == said and (not said or "75% of the pairs" in sentence)
    first = asymdpo.explain(asymdpo.Config(**options, form="inside", sft_weight=0.5), 0, row)
    assert "(expected ln 2 = 0.6931 and 0.5 times the winner's own loss)" in first


@pytest.mark.parametrize("loss", ["flow", "dense"])
def test_what_a_run_will_cost(loss, tmp_path, capsys):
    """Counted with not one file there; the loss itself is small beside the network."""
    asymdpo.main(asymdpo.Config(loss=loss, pairs=str(tmp_path / "none"), batch_size=8, dry_run=True))
    assert "200 steps of 8 pairs" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["flow", "structural"])
def test_samples_in_no_order(kind, chain, made, tmp_path, capsys):
    """Two sides that differ, a function of (clip, seed): the same bytes again, 1e-4 in other batches; --lora counts."""
    before, few = data.Shards(made[kind], "make_pairs.py"), range(3)
    first, second = (before.get(side, few) for side in SIDES)
    assert all(not torch.isclose(a, b).all() for a, b in zip(first, second)) and first.isfinite().all()
    make_samples(chain, tmp_path / "again", pairs=kind)
    assert contents(tmp_path / "again") == contents(made[kind])
    for options, same in ((dict(shard_size=3), True), (dict(seed=1), False), (dict(lora=""), False)):
        other = make_samples(chain, tmp_path / str(options), pairs=kind, clips=3, **options)
        assert torch.allclose(other.get("first", few), first, atol=1e-4) == same, options
    eta = [row.get("eta", 0.7) for row in before.rows]
    assert all(0.65 <= e <= 0.8 for e in eta) and len(set(eta)) == (1 if kind == "flow" else len(eta))
    make_pairs.main(make_pairs.Config(pairs=kind, data=str(tmp_path / "none"), dry_run=True))
    assert f"40,000 samples of {12 if kind == 'flow' else 6} forwards" in capsys.readouterr().out


def test_structural_samples_start_at_one_time_and_stay_on_the_path():
    """Both sides start at the clip's own η; the exact velocity to some x0 leads there; as many calls as the whole grid
    has steps below eta_max: of the tiny preset's 12, whose level 0.8 is, 6; of Wan's 50, 23."""
    x0, goal, text, seen = *torch.randn(2, 3, 6, 13, 2, 2), torch.randn(3, 5, 8), []

    def net(x, t, text):
        seen.append((t, x))
        return (x - goal) / flow.per_sample(t, x)

    cfg = make_pairs.Config(pairs="structural", nfe=12, t_shift=4.0, guidance=1.0)
    fields, rows = make_pairs.structural_pairs(net, x0, text, ["a", "b", "d"], cfg, None)
    assert all(torch.allclose(fields[side], goal, atol=1e-4) for side in SIDES)
    times, eta = torch.stack([t for t, _ in seen]), torch.tensor([row["eta"] for row in rows])
    assert len(times) == 12 and torch.equal(times[:6], times[6:]) and (times[:6].diff(dim=0) < 0).all()
    assert torch.allclose(times[0], eta, atol=1e-4) and len(set(eta.tolist())) == 3
    one, two = ((seen[k][1] - (1 - flow.per_sample(eta, x0)) * x0) / flow.per_sample(eta, x0) for k in (0, 6))
    assert abs(one.std() - 1) < 0.05 and abs((one * two).mean()) < 0.05  # each its own noise
    for nfe, shift, most, steps in ((12, 4.0, 0.8, 6), (50, 5.0, 0.8, 23), (50, 5.0, 1.0, 50), (12, 4.0, 1.0, 12)):
        assert make_pairs.structural_steps(make_pairs.Config(nfe=nfe, t_shift=shift, eta_max=most)) == steps


def test_more_pairs_a_clip_and_a_weaker_continuation(chain, tmp_path):
    """--per_clip 2: the pairs of 1, bit for bit, and as many of other lengths and noise. --strength 0 is the base with
    Φ's prompts, 1 the whole Φ."""
    one, two = (make_samples(chain, tmp_path / f"{n}", per_clip=n, clips=4, n2_max=12) for n in (1, 2))
    weak = make_samples(chain, tmp_path / "weak", strength=0.5, clips=4, n2_max=12)
    assert [row["id"] for row in two.rows] == [r["id"] for r in one.rows] + [r["id"] + "+1" for r in one.rows]
    assert [r["n1"] for r in two.rows[:4]] != [r["n1"] for r in two.rows[4:]]
    for side in ("chosen", "rejected"):
        a, b, c, d = (s.get(side, range(*n)) for s, *n in ((one, 4), (two, 4), (two, 4, 8), (weak, 4)))
        assert torch.equal(a, b) and not any(torch.isclose(x[:, :, 12:], a[:, :, 12:]).all() for x in (c, d))
    base = model.load_task_prompt(model.load_model(chain / "base"), chain / "continuation/task_prompt.safetensors")
    phi = [model.load_continuation(chain / "base", chain / "continuation", **o) for o in ({}, dict(strength=0.0))]
    inputs = torch.randn(2, 48, 13, 2, 2), torch.rand(2), torch.randn(2, 5, 32), torch.arange(13).expand(2, 13) < 4
    with torch.no_grad():
        whole, none, plain = (net(*inputs) for net in (*phi, base))
    assert torch.equal(none, plain) and not torch.isclose(whole, plain).all()


def test_a_second_round(chain, tmp_path):
    """Pairs on base + SFT + DPO, and training that starts there: the reference is all three."""
    both = f"{chain / 'sft'}, {chain / 'asymdpo'}"
    make_samples(chain, tmp_path / "pairs", lora=both, clips=4)
    out = run_stage(chain, "asymdpo", pairs=str(tmp_path / "pairs"), sft=both, out=str(tmp_path / "dpo"), steps=1)
    cfg = asymdpo.Config(base=str(chain / "base"), sft=both, layers="attn", rank=4)
    net = asymdpo.build(cfg, common.start_group(), (48, 13, 2, 2)).state_dict()
    fused = [model.load_fused(chain / "base", model.lora_files(names)) for names in (both, str(chain / "sft"))]
    one, two = (f.state_dict()["blocks.0.self_attn.q.weight"] for f in fused)
    assert metrics(out)[0]["S_abs"] == 0
    assert torch.equal(net["blocks.0.self_attn.q.weight"], one) and not torch.equal(one, two)

"""The baselines: their losses by hand and in plain float64, their pairs, and runs on them."""

import math

import pytest
import torch
from helpers import contents, labelled, make_samples, metrics, refused, run_stage

import asymdpo
import flow
from experiments import baselines, pairs
from experiments.pairs import SIDES
from runtime.files import read_manifest
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

SHORT = dict(warmup=1, lr=2e-3, rank=4, layers="attn", batch_size=8, t_mean=0.0, beta=50.0, sft_weight=0.0)
KINDS = {  # loss, pairs and labels of each baseline
    "Flow-DPO": ("flow", "flow", "by_clip"),
    "DenseDPO": ("dense", "structural", "by_segment"),
    "Reg-DPO": ("flow", "real", "of_real"),
    "LocalDPO": ("dense", "local", "of_local"),
}


@pytest.fixture(scope="module")
def at(chain, made, tmp_path_factory):
    """The folders `made`, and those of the two baselines without a scorer."""
    root = tmp_path_factory.mktemp("real")
    for kind in ("real", "local"):
        make_samples(chain, root / kind, kind=kind)
        labelled(chain, root / kind, root / f"of_{kind}", scorer="real", data="")
    return made | {path.name: path for path in root.iterdir()}


def train(name, chain, at, out, **options) -> list[dict]:
    """What a short run of a baseline logs."""
    loss, of, labels = KINDS[name]
    folders = dict(base=chain / "base", sft=chain / "sft", pairs=at[of], labels=at[labels], out=out)
    baselines.main(baselines.Config(loss=loss, **SHORT | options, **{k: str(v) for k, v in folders.items()}))
    return metrics(out)


@pytest.mark.parametrize("name", KINDS)
def test_a_run_begins_at_ln2_and_prefers_the_winner(name, chain, at, tmp_path, capsys):
    """Margin 0 and accuracies ½ at step 0. Who was preferred is also told by time."""
    first, *rest = train(name, chain, at, tmp_path / "run", steps=12)
    assert load_adapted(chain / "base", lora_files(f"{chain / 'sft'},{tmp_path / 'run'}"))  # as sample.py --lora does
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


@pytest.mark.parametrize("name, pull", [("Flow-DPO", 12.5), ("DenseDPO", 25.0), ("Reg-DPO", 12.5), ("LocalDPO", 25.0)])
def test_the_clips_own_loss(name, pull, chain, at, tmp_path, capsys):
    """λ·β/4 times it (flow) or λ·β/2 (dense) is added to the loss, and to its gradient: of the real clip, whole, at the
    pair's noise and t, by hand in float64. It is all that λ changes at step 0."""
    plain, more = (train(name, chain, at, tmp_path / f"{w}", steps=1, sft_weight=w)[0] for w in (0.0, 0.4))
    both, clips = Shards(at[KINDS[name][1]], "experiments.pairs"), Shards(chain / "shards", "prepare.py", "align")
    assert len(both) == SHORT["batch_size"]  # the first step reads each of them once
    own = [[row["id"] for row in clips.rows].index(row["id"]) for row in both.rows]
    keys = [("experiments.baselines", 0, 0, row["id"]) for row in both.rows]
    x0 = clips.get("x0", own).double()
    noise, t = flow.draw_noise(x0.shape[1:], keys).double(), flow.draw_t(keys, 0.0).double()
    net = load_adapted(chain / "base", lora_files(str(chain / "sft")))
    at_t = t[:, None, None, None, None]
    with torch.no_grad():
        v = net(((1 - at_t) * x0 + at_t * noise).float(), t.float(), both.text(range(len(both))))
    error = (v.double() - (noise - x0)).square().mean().item()
    assert more["err/x0"] == pytest.approx(error, rel=1e-5) and "err/x0" not in plain
    assert more["loss"] == pytest.approx(math.log(2) + 0.4 * pull * error, rel=1e-5)
    assert plain["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert abs(more["grad_norm"] / plain["grad_norm"] - 1) > 0.01
    assert f"(expected ln 2 = 0.6931 and {0.4 * pull:g} times the flow-matching loss)" in capsys.readouterr().err
    same = set(plain) - {"loss", "grad_norm", "lora_B"}
    assert {k: plain[k] for k in same} == {k: more[k] for k in same}


def test_a_clip_that_is_a_side_is_not_predicted_twice():
    """Its loss is that of the prediction that is there already, with the same gradient."""
    x0, noise, t = torch.randn(2, 3, 5, 2, 2), torch.randn(2, 3, 5, 2, 2), torch.tensor([0.3, 0.8])
    weight = torch.tensor(1.5, requires_grad=True)
    net = lambda x, t, text: weight * x  # noqa: E731
    v, target = net(flow.add_noise(x0, noise, t), t, None), flow.velocity(x0, noise)
    sides = (v, v, v, v, target, target)
    one, two = (baselines.clip_loss(net, sides, clip, None, noise, t) for clip in (None, x0))
    assert torch.equal(one, two)
    assert torch.equal(*(torch.autograd.grad(a.sum(), weight, retain_graph=True)[0] for a in (one, two)))


def test_the_rate_decays(chain, at, tmp_path):
    """As asymdpo.py's does, by the same option."""
    for decay, last in (("none", 2e-3), ("cosine", 2e-3 * (1 + math.cos(0.75 * math.pi)) / 2)):
        rows = train("Flow-DPO", chain, at, tmp_path / decay, steps=4, decay=decay)
        assert rows[0]["lr"] == 2e-3 and rows[-1]["lr"] == pytest.approx(last)


def test_what_is_said_of_a_run():
    """What step 0 must read; that nothing moves; and no word of saturation, which these losses do not have."""
    row = {"saturated": 0.75, "S": 0.0, "loss": 0.7, "lora_B": 1e-5, "grad_norm": 1e-3}
    cfg = baselines.Config(beta=50.0, warmup=20, lr=5e-6)
    assert asymdpo.explain(cfg, 100, row) is None and asymdpo.explain(cfg, 50, row) is None
    for size in (1e-7, math.nan):
        assert "stuck" in asymdpo.explain(cfg, 50, {**row, "lora_B": size})
    first = asymdpo.explain(asymdpo.Config(beta=50.0, sft_weight=0.5), 0, row)
    assert "(expected ln 2 = 0.6931 and 12.5 times the flow-matching loss)" in first


@pytest.mark.parametrize("kind", ["flow", "structural"])
def test_samples_in_no_order(kind, chain, made, tmp_path):
    """Two sides that differ, a function of (clip, seed): the same bytes again, 1e-4 in other batches; --lora counts.
    The clip itself lies beside them."""
    before, few = Shards(made[kind], "experiments.pairs"), range(3)
    clips = Shards(chain / "shards", "prepare.py", "align")
    assert torch.equal(before.get("x0", few), clips.get("x0", few))
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
    has steps below eta_max: of 12 at shift 4, whose level 0.8 is, 6; of Wan's 50, 23."""
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


@pytest.mark.parametrize("kind", ["real", "local"])
def test_the_clip_against_the_model(kind, chain, at, tmp_path):
    """The first side is the clip, bit for bit, and always wins. So are the second's frames outside the window: tied.
    Another seed is another second side."""
    both, clips = Shards(at[kind], "experiments.pairs"), Shards(chain / "shards", "prepare.py", "align")
    every, labels = (
        range(len(both)),
        baselines.read_labels(
            baselines.Config(loss="dense", labels=str(at[f"of_{kind}"])),
            read_manifest(at[f"of_{kind}"], "experiments.labels")["inputs"]["pairs"],
        ),
    )
    real, other = both.get("first", every), both.get("second", every)
    assert torch.equal(real, clips.get("x0", every)) and both.fields() == ["first", "second"]
    if kind == "real":
        assert not torch.isclose(real, other).all(dim=1).any() and torch.equal(labels, torch.ones(8, 13).long())
    for i, row in enumerate(both.rows if kind == "local" else []):
        inside = torch.tensor([row["start"] <= frame < row["end"] for frame in range(13)])
        assert torch.equal(real[i, :, ~inside], other[i, :, ~inside]) and torch.equal(labels[i], inside.long())
        assert not torch.isclose(real[i, :, inside], other[i, :, inside]).all(dim=0).any()
    assert baselines.decided(labels) == list(every)
    again = make_samples(chain, tmp_path / "again", kind=kind, seed=1)
    assert torch.equal(again.get("first", every), real) and not torch.allclose(again.get("second", every), other)


@pytest.mark.parametrize("solver", flow.SOLVERS)
def test_free_samples_are_the_solvers(solver):
    """Of flow and real alike, from the noise of the side's name."""
    x0, text, keys = torch.randn(2, 3, 5, 2, 2), torch.randn(2, 5, 8), [("pair", 7, i, "second") for i in "ab"]
    net = lambda x, t, text: x * x / 5 + flow.per_sample(t, x)  # noqa: E731
    truth = flow.SOLVERS[solver](net, flow.draw_noise(x0.shape[1:], keys), text, flow.time_grid(4, 3.0))
    for kind in ("flow", "real"):
        cfg = pairs.Config(kind=kind, solver=solver, nfe=4, t_shift=3.0, seed=7)
        assert torch.equal(pairs.sample_pairs(net, x0, text, ["a", "b"], cfg)[0]["second"], truth)


@pytest.mark.parametrize("frames", [2, 5, 13, 21])
def test_windows(frames):
    """More than a fifth of the frames, which baselines asks for, at most 70 %, anywhere; every length comes up."""
    windows = [pairs.draw_window(0, f"clip-{i}", frames) for i in range(2000)]
    lengths = {end - start for start, end in windows}
    assert min(lengths) / frames > baselines.LABELLED and lengths == set(range(frames // 5 + 1, int(0.7 * frames) + 1))
    assert {start for start, _ in windows} == set(range(frames - min(lengths) + 1))
    assert max(end for _, end in windows) == frames
    assert windows != [pairs.draw_window(1, f"clip-{i}", frames) for i in range(2000)]


@pytest.mark.parametrize("solver", flow.SOLVERS)
def test_a_window_is_filled_between_frames_at_its_own_noise(solver):
    """In each step the network sees the frames outside as (1 − t)·x0 + t·noise, whatever it answers there, NaN
    included; inside the exact velocity to some x0 leads there."""
    x0, noise, goal, text, seen = *torch.randn(3, 2, 6, 13, 2, 2), torch.randn(2, 5, 8), []
    inside = torch.zeros(2, 1, 13, 1, 1, dtype=torch.bool)
    inside[0, :, 4:9] = inside[1, :, :3] = True

    def net(x, t, text):
        seen.append(t[0].item())
        kept = flow.add_noise(x0, noise, t)
        assert torch.equal(torch.where(inside, 0, x), torch.where(inside, 0, kept))
        return torch.where(inside, (x - goal) / flow.per_sample(t, x), float("nan"))

    cfg = pairs.Config(kind="local", solver=solver, nfe=6, t_shift=4.0)
    made = pairs.fill_window(net, x0, noise, text, [(4, 9), (0, 3)], cfg)
    assert torch.equal(torch.where(inside, 0, made), torch.where(inside, 0, x0))
    assert torch.allclose(torch.where(inside, made, 0), torch.where(inside, goal, 0), atol=1e-4)
    assert seen == flow.time_grid(6, 4.0)[1].tolist()


def test_pairs_without_the_clip(chain, at, tmp_path, monkeypatch):
    """Those of an earlier version are refused before anything is written."""
    monkeypatch.setattr(Shards, "fields", lambda self: list(SIDES))
    refused("expected the real clips as x0, got none", train, "Flow-DPO", chain, at, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_second_round(chain, tmp_path):
    """Of the method: pairs on base + SFT + DPO, and training that starts there: the reference is all three."""
    both = f"{chain / 'sft'}, {chain / 'asymdpo'}"
    run_stage(chain, "pairs", lora=both, clips=4, out=str(tmp_path / "pairs"))
    out = run_stage(chain, "asymdpo", pairs=str(tmp_path / "pairs"), sft=both, out=str(tmp_path / "dpo"), steps=1)
    cfg = asymdpo.Config(base=str(chain / "base"), sft=both, layers="attn", rank=4)
    net = asymdpo.build(cfg, Group(), (28, 13, 1, 1)).state_dict()
    fused = [load_adapted(chain / "base", lora_files(names)) for names in (both, str(chain / "sft"))]
    one, two = (f.state_dict()["blocks.0.self_attn.q.weight"] for f in fused)
    assert metrics(out)[0]["S_abs"] == 0
    assert torch.equal(net["blocks.0.self_attn.q.weight"], one) and not torch.equal(one, two)

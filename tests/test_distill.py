"""experiments.distill: its windows, its loss, and pairs that are made with its LoRA beneath Φ."""

import json

import pytest
import torch
from helpers import metrics, run_stage

import flow
import model
from experiments import distill
from runtime.files import identity
from runtime.options import resolve
from runtime.shards import Shards
from wan.lora import load_adapted, lora_file

SHORT = dict(steps=16, batch_size=8, rank=8, warmup=1, lr=1e-2)


@pytest.fixture(scope="module")
def run(chain, tmp_path_factory):
    """A short run on the smallest base."""
    out = tmp_path_factory.mktemp("distill") / "run"
    distill.main(distill.Config(base=str(chain / "base"), data=str(chain / "shards"), out=str(out), **SHORT))
    return out


def inputs(chain, count=8):
    """Clips, text and noise."""
    clips = Shards(chain / "shards", "prepare.py", "train")
    x0 = clips.get("x0", list(range(count)))
    return x0, clips.text(list(range(count))), flow.draw_noise(x0.shape[1:], [("test", i) for i in range(count)])


def test_windows_make_up_the_teachers_grid(chain):
    """They begin and end at the student's levels; Euler's steps through all of them are those through the whole grid,
    bit for bit.
    """
    cfg = resolve(distill.Config(substeps=5), distill.PRESETS)
    _, text, noise = inputs(chain, 2)
    net, x, levels = model.load_model(chain / "base"), noise, flow.time_grid(cfg.nfe, cfg.t_shift)[0]
    for k in range(cfg.nfe):
        grid = distill.window(cfg, k)
        assert torch.equal(grid[0][[0, -1]], levels[k : k + 2]) and len(grid[1]) == 5
        x = flow.euler(net, x, text, grid)
    assert torch.equal(x, flow.euler(net, noise, text, flow.time_grid(5 * cfg.nfe, cfg.t_shift)))


@pytest.mark.parametrize("guidance, solver, k", [(1.0, "unipc", 0), (1.0, "euler", 3), (3.0, "unipc", 2)])
def test_the_loss_is_how_far_a_step_misses_the_windows_end(guidance, solver, k, chain):
    """The student's one Euler step from the noised clip, against where the solver takes the frozen model, with
    guidance: by two networks here, one of which never had the LoRA. Only the LoRA gets a gradient.
    """
    cfg = resolve(distill.Config(), distill.PRESETS)
    (x0, text, noise), grid = inputs(chain), distill.window(cfg, k)
    net, frozen = model.load_model(chain / "base"), model.load_model(chain / "base")
    model.add_lora(net, 4, 4, "all")
    for term in model.trained_lora(net).values():
        torch.nn.init.normal_(term.B, std=0.1)
    negative = torch.ones(3, text.shape[2])
    loss = distill.window_loss(net, flow.guided(net, guidance, negative), x0, text, noise, grid, solver)
    s, e = grid[0][0], grid[0][-1]
    x_s = (1 - s) * x0 + s * noise
    x_e = flow.SOLVERS[solver](flow.guided(frozen, guidance, negative), x_s, text, grid)
    step = flow.euler(net, x_s, text, (torch.stack([s, e]), s[None]))
    missed = ((step - x_e) / (s - e)).square().mean(dim=(1, 2, 3, 4))
    assert torch.allclose(loss, missed, rtol=1e-3) and missed.min() > 1e-4
    loss.sum().backward()
    trained = {p for term in model.trained_lora(net).values() for p in term.parameters()}
    assert {p for p in net.parameters() if p.grad is not None} == trained


@torch.no_grad()
def test_a_run_brings_few_steps_nearer_to_many(run, chain):
    """What it is for: four Euler steps with the LoRA end nearer to where the base's many steps end; the log agrees."""
    _, text, noise = inputs(chain)
    base, student = (load_adapted(chain / "base", loras) for loras in ([], [lora_file(str(run))]))
    many = flow.unipc(base, noise, text, flow.time_grid(12, 4.0))
    far, near = (
        (flow.euler(net, noise, text, flow.time_grid(4, 4.0)) - many).square().mean() for net in (base, student)
    )
    assert near < 0.9 * far
    rows = metrics(run)
    first, last = (sum(row["loss"] for row in some) for some in (rows[:4], rows[-4:]))
    assert [row["window"] for row in rows[:5]] == [0, 1, 2, 3, 0] and last < first


def test_pairs_with_it_beneath_the_continuation_model(run, chain, tmp_path):
    """make_pairs.py takes the folder as a LoRA and its manifest names the file; other pairs come out, as whole."""
    options = dict(nfe=4, solver="euler", clips=4)
    plain = run_stage(chain, "pairs", out=tmp_path / "plain", **options)
    fast = run_stage(chain, "pairs", out=tmp_path / "fast", lora=run, **options)
    told = json.loads((fast / "MANIFEST.json").read_text())
    assert told["inputs"]["lora"] == identity(run / "lora.safetensors")
    one, two = (Shards(folder, "make_pairs.py") for folder in (plain, fast))
    given = one.rows[0]["n1"]
    assert one.rows == two.rows
    a, b = (pairs.get("rejected", [0])[0] for pairs in (one, two))
    assert torch.equal(a[:, :given], b[:, :given]) and not torch.equal(a[:, given:], b[:, given:])

"""Wan2.2-T2V-A14B on small random weights: which network runs when, against diffusers; layouts, options, mistakes."""

import dataclasses
import functools
import math
import shutil
import weakref

import pytest
import torch
from helpers import dit_inputs, metrics, randomised, refused, run_stage, wan_folder

import asymdpo
import continuation
import flow
import make_pairs
import model
import sample
import sampling
import sft
from runtime import video
from runtime.options import resolve
from wan import experts, export, grids

CONFIG = model.DiTConfig(40, 56, 2, 2, text_dim=12, freq_dim=32)
WANS, DIFFUSERS = model.EXPERTS


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Two networks in a folder as Wan's release, and in one as diffusers'."""
    root, wide = tmp_path_factory.mktemp("a14b"), model.DiTConfig(40, 48, 2, 2, text_dim=16, freq_dim=32)
    wan_folder(root / "wan")
    for seed, name in enumerate(WANS):
        model.save_model(randomised(model.DiT(wide), seed), root / "wan" / name)
    for name in ("config.json", model.WEIGHTS_NAME):
        (root / "wan" / name).unlink()
    for seed, name in enumerate(DIFFUSERS):
        model.save_model(randomised(model.DiT(CONFIG), seed), root / name)
        export.main(export.Config(str(root / name), "", str(root / "out" / name), "diffusers"))
        shutil.move(root / "out" / name / name, root / "diffusers" / name)
    return root


def options(base, **more):
    """What sample.py takes of a preset a14b."""
    return resolve(sample.Config(preset="a14b", base=str(base), **more), sample.PRESETS)


def load(cfg):
    return experts.load_networks(cfg, torch.float32, torch.device("cpu"), lambda net, base: net)


def test_it_is_diffusers_pipeline(released):
    """The same latents after eight steps of UniPC at shift 12, by the same network at each step, and its guidance."""
    diffusers = pytest.importorskip("diffusers")
    peers = [diffusers.WanTransformer3DModel.from_pretrained(released / "diffusers" / name) for name in DIFFUSERS]
    unipc = dict(use_flow_sigmas=True, flow_shift=12.0, prediction_type="flow_prediction")
    parts = dict(tokenizer=None, text_encoder=None, vae=None, scheduler=diffusers.UniPCMultistepScheduler(**unipc))
    pipeline = diffusers.WanPipeline(**parts, transformer=peers[0], transformer_2=peers[1], boundary_ratio=0.875)
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    noise, states, negative = torch.randn(1, 16, 3, 4, 6), torch.randn(1, 9, 12), torch.randn(5, 12)
    padded = [torch.nn.functional.pad(a, (0, 0, 0, 512 - a.shape[1])) for a in (states, negative[None])]
    ran = {"theirs": [], "ours": []}
    for name, peer in zip(("high", "low"), peers):
        peer.register_forward_hook(lambda *_, name=name: ran["theirs"].append(name))
    sizes = dict(height=32, width=48, num_frames=9, num_inference_steps=8, guidance_scale=4.0, guidance_scale_2=3.0)
    theirs = pipeline(
        latents=noise, prompt_embeds=padded[0], negative_prompt_embeds=padded[1], output_type="latent", **sizes
    ).frames

    def noting(name, net, weight):
        call = flow.guided(net, weight, negative)
        return lambda *given: ran["ours"].append(name) or call(*given)

    cfg = options(released / "diffusers")
    wraps = [functools.partial(noting, name, weight=w) for name, w in zip(("high", "low"), sampling.guidances(cfg))]
    call = experts.each(load(cfg), *wraps)
    ours = flow.unipc(call, noise, states, grids.time_grid(8, cfg.t_shift, "diffusers"))
    assert (ours - theirs).abs().max() < 1e-4 < 1 < theirs.abs().max()
    assert ran["ours"] == ran["theirs"][::2] == ["high"] * 6 + ["low"] * 2 and len(ran["theirs"]) == 16
    assert (ours - flow.unipc(load(cfg), noise, states, grids.time_grid(8, 12.0, "diffusers"))).abs().max() > 0.01


class Stub:
    """What `Experts` asks of a network."""

    def __init__(self, device):
        self.to(device)

    def to(self, device):
        self.patch_embedding = torch.nn.Conv3d(1, 1, 1, device=device)

    def __call__(self, x_t, t, text, cond_mask):
        return self

    @property
    def device(self):
        return self.patch_embedding.weight.device.type


def test_one_network_at_a_time_is_on_the_device():
    """That of high noise from 0.875 on, the boundary included, else the other; split ones stay where they are. What is
    called in their place is there one at a time, too.
    """
    high, low = Stub("meta"), Stub("cpu")
    both = experts.Experts(high, low, torch.device("meta"), keep=False)
    for t, called, waiting in ((1.0, high, low), (0.875, high, low), (0.874, low, high), (0.0, low, high)):
        assert both(None, torch.tensor([t]), None) is called
        assert (called.device, waiting.device) == ("meta", "cpu")
    split = experts.Experts(Stub("meta"), Stub("cpu"), torch.device("meta"), keep=True)
    assert split(None, torch.tensor([0.5]), None).device == "cpu"
    alive, made = weakref.WeakSet(), []

    class Shared:
        def __init__(self, net):
            assert not alive
            made.append(net)
            alive.add(self)

        def __call__(self, x_t, t, text, cond_mask):
            return made[-1]

    call = experts.each(both, Shared)
    assert [call(None, torch.tensor([t]), None) for t in (1.0, 0.9, 0.5, 0.2, 1.0)] == [high, high, low, low, high]
    assert made == [high, low, high] and (high.device, low.device) == ("meta", "cpu")


def test_sample_takes_a_release_or_two_networks(released, tmp_path):
    """The same video; the VAE and the text encoder are those beside the network. A LoRA of low noise changes it."""
    base, size = released / "wan", dict(prompt="a red ball", nfe=4, frames=9, height=32, width=48)
    net = model.load_model(base / WANS[1])
    model.add_lora(net, 2, 2)
    for term in model.trained_lora(net).values():
        torch.nn.init.normal_(term.B, std=0.5)
    model.export_lora(model.trained_lora(net), tmp_path / "low.safetensors")
    made = {}
    for name, more in {
        "release": dict(base=base),
        "two": dict(base=base / WANS[0], base_low=str(base / WANS[1])),
        "lora": dict(base=base, lora_low=str(tmp_path / "low.safetensors")),
    }.items():
        sample.main(sample.Config("a14b", **{**size, **more, "base": str(more["base"])}, out=str(tmp_path / name)))
        made[name] = (tmp_path / name / "0-0.mp4").read_bytes()
    assert made["release"] == made["two"] != made["lora"]
    assert video.read_clip(tmp_path / "two/0-0.mp4", None).shape == (9, 32, 48, 3)


def test_continuations_by_two_networks(released):
    """With what the steps share, and by whole forwards: the same; of one network twice, what that network makes."""
    torch.manual_seed(0)
    (x0, _, states), negative = dit_inputs(frames=5), torch.randn(4, 12)
    cfg = resolve(make_pairs.Config(preset="a14b", nfe=6, guidance_low=0.0, guidance_high=1.0), make_pairs.PRESETS)
    given = [1, 3], [("pair", 0, "a"), ("pair", 0, "b")]
    net = load(options(released / "diffusers"))
    for one in net.nets:
        one.prefix = True
    shared = make_pairs.continue_clips(net, x0, states, *given, cfg, negative)
    whole = make_pairs.continue_clips(net, x0, states, *given, dataclasses.replace(cfg, plain=True), negative)
    assert (shared - whole).abs().max() < 1e-4 * whole.abs().max()
    alone = make_pairs.continue_clips(net.nets[0], x0, states, *given, cfg, negative)
    twice = experts.Experts(net.nets[0], net.nets[0], torch.device("cpu"), False)
    assert torch.equal(make_pairs.continue_clips(twice, x0, states, *given, cfg, negative), alone)
    assert (shared - alone).abs().max() > 0.01


def test_training_stays_within_its_times(chain, tmp_path, monkeypatch):
    """Every stage draws t where --t_min and --t_max say; what asymdpo.py logs has no empty time bucket in it."""
    drawn, draw = [], flow.draw_t
    monkeypatch.setattr(flow, "draw_t", lambda *a, **k: drawn.append(draw(*a, **k)) or drawn[-1])
    for name in ("sft", "continuation", "asymdpo"):
        out = run_stage(chain, name, out=tmp_path / name, t_min=0.875, t_shift=2.0)
    t = torch.cat(drawn)
    assert len(t) == 3 * 2 * 4 and 0.875 <= t.min() < t.max() <= 1
    keys = {key for row in metrics(out) for key in row}
    assert {key[-2:] for key in keys if key[-2:-1] == "t"} == {"t3"}
    assert all(math.isfinite(value) for row in metrics(out) for value in row.values())


def mistakes(root):
    """What to call, with which options, and words of the error."""
    low, high = str(root / "wan" / WANS[1]), str(root / "wan" / WANS[0])
    train, take = dict(preset="a14b", out=str(root / "no")), dict(preset="a14b", prompt="a", out=str(root / "no"))
    yield sft, train | dict(base=high), "expected --t_min 0.875 for the high-noise expert, .*got --t_min 0.0"
    yield continuation, train | dict(base=high, t_max=0.875), "high_noise_model: expected --t_min 0.875"
    yield asymdpo, train | dict(base=low, t_min=0.875), "low_noise_model: expected --t_min 0.875 .*--t_max 0.875 for"
    yield sft, train | dict(base=high, preview_every=5, preview_prompts="x"), "one of its two networks makes no video"
    yield asymdpo, dict(t_min=0.5, t_max=0.5, out=train["out"]), "more than --t_min .0.5. and at most 1, got 0.5"
    yield sft, dict(t_max=1.5, out=train["out"]), "--t_max: expected"
    yield sample, take | dict(base=high), "with the release's two networks, or --base and --base_low"
    for one, other in ((low, high), (high, high), (low, low)):
        yield sample, take | dict(base=one, base_low=other), f"high and low noise, got '{one}' and '{other}'"
    yield sample, take | dict(preset="14b", lora_low="x"), "--lora_low: is for the two networks of --preset a14b"
    yield make_pairs, dict(preset="a14b", base=high, out=train["out"]), "with the release's two networks"
    base = str(root / "wan")
    yield make_pairs, dict(preset="a14b", base=base, out=train["out"]), "expected --continuation and --continuation_low"
    yield export, dict(base=str(root / "diffusers"), lora="", out=train["out"]), "choose .*transformer or .*former_2"


def test_mistakes_are_named(released):
    for module, given, words in mistakes(released):
        refused(words, module.main, module.Config(**given))
    refused("the two experts of Wan2.2-T2V-A14B", model.load_model, released / "wan", kind=ValueError)
    assert not (released / "no").exists()

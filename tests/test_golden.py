"""The network against the outputs of Wan2.1's own code, on the same random weights: tests/golden/dit.safetensors.

Tolerance 1e-5 in float32. That the golden has teeth is a test of its own: one wrong fact of the architecture at a time
must move the output by more than that.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import load_file

import model

GOLDEN = Path(__file__).parent / "golden" / "dit.safetensors"
TOLERANCE = 1e-5


def load(**changes):
    tensors = load_file(GOLDEN)
    with safe_open(GOLDEN, "pt") as file:
        metadata = file.metadata()
    config = dataclasses.replace(model.DiTConfig(**json.loads(metadata["config"])), **changes)
    net = model.DiT(config)
    net.load_state_dict({k[2:]: v for k, v in tensors.items() if k.startswith("w.")})
    return net, tensors, json.loads(metadata["text_lens"])


@torch.no_grad()
def error(net, tensors, time: str = "t", out: str = "out") -> float:
    # float64: the golden's t runs from 0 to 1000, and t / 1000 * 1000 must come back exactly enough
    v = net(tensors["x"], tensors[time].double() / 1000, tensors["text"])
    return (v - tensors[out]).abs().max().item()


def test_one_time_for_the_clip():
    """Guards every architecture fact on the text-to-video path."""
    net, tensors, _ = load()
    assert error(net, tensors) < TOLERANCE


def test_a_time_for_each_frame():
    """Guards the per-frame path (given frames at time 0), against Wan2.2's code for a time for each token."""
    net, tensors, _ = load()
    assert error(net, tensors, "t_frames", "out_frames") < TOLERANCE


def test_the_two_goldens_differ():
    """The per-frame golden would be no test of its own if its times were those of the clip."""
    _, tensors, _ = load()
    assert (tensors["out"] - tensors["out_frames"]).abs().max() > 0.01


# ---- mutations: each makes one fact wrong ----------------------------------------------------------------------------


def sin_before_cos(monkeypatch):
    original = model.sinusoid
    monkeypatch.setattr(model, "sinusoid", lambda position, dim: original(position, dim).roll(dim // 2, -1))
    return load()[0]


def rope_by_halves(monkeypatch):
    def halves(x, weight, rope, eps):
        y = torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)
        if rope is None:
            return y
        a, b = y.unflatten(-1, (-1, rope.shape[-1])).chunk(2, -1)
        turned = torch.complex(a, b) * torch.view_as_complex(rope.unflatten(-1, (-1, 2))).unsqueeze(1)
        return torch.cat([turned.real, turned.imag], -1).flatten(2)

    monkeypatch.setattr(model, "norm_rope", halves)
    return load()[0]


def rope_split_reversed(monkeypatch):
    original = model.rope_split
    monkeypatch.setattr(model, "rope_split", lambda head_dim: original(head_dim)[::-1])
    return load()[0]


def eps_too_large(monkeypatch):
    return load(eps=1e-5)[0]


def exact_gelu(monkeypatch):
    net = load()[0]
    for module in net.modules():
        if isinstance(module, nn.GELU):
            module.approximate = "none"
    return net


def shift_and_scale_swapped(monkeypatch):
    original = model.ln_modulate
    monkeypatch.setattr(model, "ln_modulate", lambda x, shift, scale, *rest: original(x, scale, shift, *rest))
    return load()[0]


def norm_of_each_head(monkeypatch):
    original = model.norm_rope

    def forward(self, x, rope=None):
        heads = x.unflatten(-1, (2, -1))
        y = torch.nn.functional.rms_norm(heads, heads.shape[-1:], eps=self.eps).flatten(-2)
        rms = y.square().mean(-1, keepdim=True).sqrt()  # the norm over all heads that follows divides by it
        return original(y, self.weight, rope, 0.0) * rms

    monkeypatch.setattr(model.RMSNorm, "forward", forward)
    return load()[0]


def time_not_in_thousands(monkeypatch):
    original = model.sinusoid
    monkeypatch.setattr(model, "sinusoid", lambda position, dim: original(position / 1000, dim))
    return load()[0]


MUTATIONS = [
    sin_before_cos, rope_by_halves, rope_split_reversed, eps_too_large, exact_gelu, shift_and_scale_swapped,
    norm_of_each_head, time_not_in_thousands,
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.__name__)
def test_a_wrong_fact_shows(mutation, monkeypatch):
    """Guards the guard: with one fact wrong, the comparison above fails."""
    net = mutation(monkeypatch)
    assert error(net, load()[1]) > 2 * TOLERANCE


@torch.no_grad()
def test_unattended_padding_shows(monkeypatch):
    """Text is padded with zeros and the padding is attended: leaving it out must show, sample by sample."""
    net, tensors, text_lens = load()
    monkeypatch.setattr(model.DiT, "_context", lambda self, text: self.text_embedding(text))  # no padding
    for i, length in enumerate(text_lens):
        v = net(tensors["x"][i : i + 1], tensors["t"][i : i + 1].double() / 1000, tensors["text"][i : i + 1, :length])
        assert (v - tensors["out"][i : i + 1]).abs().max() > 0.01


def test_short_text_is_padded_by_the_network():
    """Callers pass text at its true length: the network must pad it as the golden's text is padded."""
    net, tensors, text_lens = load()
    assert max(text_lens) < tensors["text"].shape[1]
    tensors["text"] = tensors["text"][:, : max(text_lens)]
    assert error(net, tensors) < TOLERANCE

"""The network against the outputs of Wan2.1's own code, on the same random weights: tests/golden/dit.safetensors.

Tolerance 1e-5 in float32. That the golden has teeth is a test of its own: one wrong fact of the architecture at a time
must move the output by more than that.
"""

import json

import pytest
import torch
from helpers import golden

import model

TOLERANCE = 1e-5


def load(**changes):
    weights, tensors, metadata = golden("dit")
    net = model.DiT(model.DiTConfig(**json.loads(metadata["config"]) | changes))
    net.load_state_dict(weights)
    return net, tensors, json.loads(metadata["text_lens"])


@torch.no_grad()
def error(net, tensors, time: str = "t", out: str = "out") -> float:
    # float64: the golden's t runs from 0 to 1000, and t / 1000 * 1000 must come back exactly enough
    v = net(tensors["x"], tensors[time].double() / 1000, tensors["text"])
    return (v - tensors[out]).abs().max().item()


def test_wans_outputs():
    """One time for the clip; and a time for each frame, against Wan2.2's code for a time for each token.

    The second would be no test of its own if its times were those of the clip, so the two goldens must differ.
    """
    net, tensors, _ = load()
    assert error(net, tensors) < TOLERANCE and error(net, tensors, "t_frames", "out_frames") < TOLERANCE
    assert (tensors["out"] - tensors["out_frames"]).abs().max() > 0.01


# ---- mutations: each makes one fact wrong ----------------------------------------------------------------------------


def rope_by_halves(original):
    def wrong(x, weight, rope, eps):
        y = torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)
        if rope is None:
            return y
        a, b = y.unflatten(-1, (-1, rope.shape[-1])).chunk(2, -1)
        turned = torch.complex(a, b) * torch.view_as_complex(rope.unflatten(-1, (-1, 2))).unsqueeze(1)
        return torch.cat([turned.real, turned.imag], -1).flatten(2)

    return wrong


def norm_of_each_head(original):
    def wrong(x, weight, rope, eps):
        heads = x.unflatten(-1, (2, -1))
        y = torch.nn.functional.rms_norm(heads, heads.shape[-1:], eps=eps).flatten(-2)
        rms = y.square().mean(-1, keepdim=True).sqrt()  # the norm over all heads that follows divides by it
        return original(y, weight, rope, 0.0) * rms

    return wrong


MUTATIONS = {  # what is wrong -> a function of model.py, and what takes its place
    "sin before cos": ("sinusoid", lambda f: lambda position, dim: f(position, dim).roll(dim // 2, -1)),
    "time not in thousands": ("sinusoid", lambda f: lambda position, dim: f(position / 1000, dim)),
    "rope by halves": ("norm_rope", rope_by_halves),
    "rope split reversed": ("rope_split", lambda f: lambda head_dim: f(head_dim)[::-1]),
    "norm of each head": ("norm_rope", norm_of_each_head),
    "shift and scale swapped": ("ln_modulate", lambda f: lambda x, shift, scale, *rest: f(x, scale, shift, *rest)),
}


@pytest.mark.parametrize("wrong", MUTATIONS)
def test_a_wrong_function_shows(wrong, monkeypatch):
    """Guards the guard: with one fact wrong, the comparison above fails."""
    name, wrapped = MUTATIONS[wrong]
    net, tensors, _ = load()
    monkeypatch.setattr(model, name, wrapped(getattr(model, name)))
    assert error(net, tensors) > 2 * TOLERANCE


@pytest.mark.parametrize("name, wrong", [("eps", 1e-5), ("approximate", "none")])
def test_a_wrong_setting_shows(name, wrong):
    """The same for the eps of all norms and the GELU's approximation."""
    net, tensors, _ = load()
    changed = [module for module in net.modules() if hasattr(module, name)]
    for module in changed:
        setattr(module, name, wrong)
    assert changed and error(net, tensors) > 2 * TOLERANCE


@torch.no_grad()
def test_text_is_padded_and_the_padding_attended():
    """The network pads text of its true length as the golden's is padded. Without the padding, every sample moves."""
    net, tensors, text_lens = load()
    assert max(text_lens) < tensors["text"].shape[1]
    assert error(net, {**tensors, "text": tensors["text"][:, : max(text_lens)]}) < TOLERANCE
    for i, length in enumerate(text_lens):
        alone = {name: tensors[name][i : i + 1] for name in ("x", "t", "out")}
        assert error(load(text_len=length)[0], {**alone, "text": tensors["text"][i : i + 1, :length]}) > 0.01

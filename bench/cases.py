"""The operations of kernels/ at the shapes of a model: what bench/traffic.py counts and bench/gpu.py times."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import model
from kernels import modulate, norm_rope, region_dpo

BF16, FP32 = torch.bfloat16, torch.float32
WAN = model.PRESETS["1.3b"]
FRAMES, TOKENS, ROWS = 13, 576, 2  # of 49x288x512; rows of a table: the frames that are given, and the others
LATENT, START = (1, 16, 13, 36, 64), 5  # of the DPO loss
L = FRAMES * TOKENS
U = L * WAN.dim * 2  # bytes of one bfloat16 stream


@dataclass
class Case:
    """One operation at one shape. `function` is the kernel on CUDA and for the kernels' stand-ins, else the definition.

    inputs() makes its arguments on PyTorch's default device. minimum: bytes that must move forward and backward if
    everything moves once.
    """

    name: str
    function: Callable
    inputs: Callable[[], list]
    minimum: tuple[int, int]
    unit: int = U


# The streams that must move forward and backward (x: of x's dtype, h: of h's), and backward besides if the tables are
# trained; tables read forward and backward. Gradients that are equal are one stream.
STREAMS = {
    "ln_modulate": ("xh", "xhx", "", 2, 1),
    "residual_ln_modulate": ("xhxh", "xhxxh", "h", 3, 2),
    "residual_ln_modulate, no gate": ("xhxh", "xhxxh", "", 2, 1),
    "gate_residual": ("xhx", "xh", "h", 1, 1),
}


def modulation_cases(trained: bool, D=WAN.dim, frames=FRAMES, tokens=TOKENS) -> list[Case]:
    """x, x_out float32; h, y bfloat16, as in the model. trained: the tables ask for gradients."""
    table, size = ROWS * D * 4, {"x": frames * tokens * D * 4, "h": frames * tokens * D * 2}

    def inputs():
        streams = [torch.randn(1, frames * tokens, D, dtype=dtype, requires_grad=True) for dtype in (FP32, BF16)]
        tables = [torch.randn(1, ROWS, D, requires_grad=trained) for _ in range(3)]
        return [*streams, *tables, (torch.arange(frames) < frames * START // FRAMES).int()[None]]

    cases = []
    for name, (forward, backward, besides, read, again) in STREAMS.items():
        least = sum(size[a] for a in forward) + read * table
        backward_least = sum(size[a] for a in backward + besides * trained) + (again + read * trained) * table
        call = modulate.FORMS[name][0]
        cases.append(
            Case(name, lambda *a, call=call: call(modulate.KERNEL, *a, 1e-6, BF16), inputs, (least, backward_least))
        )
    return cases


def norm_rope_case(trained: bool, D=WAN.dim, tokens=L, K=128) -> Case:
    """Queries or keys in bfloat16. trained: the weight's gradient, too."""
    u, table = tokens * D * 2, tokens * K * 4 + D * 2

    def inputs():
        weight = torch.randn(D, dtype=BF16, requires_grad=trained)
        return [torch.randn(1, tokens, D, dtype=BF16, requires_grad=True), weight, torch.randn(tokens, K)]

    return Case("norm_rope", norm_rope.norm_rope, inputs, (2 * u + table, 3 * u + table + trained * D * 2))


def dpo_case(shape=LATENT, start=START) -> Case:
    """One pair. Of what stands before `start` only the gradients' zeros must move."""
    u = math.prod(shape) * 2
    kept = u * (shape[2] - start) // shape[2]

    def inputs():
        v = [torch.randn(shape, dtype=BF16, requires_grad=i < 2) for i in range(4)]
        return [*v, torch.randn(shape), torch.randn(shape), torch.tensor([start])]

    return Case("region_dpo", lambda *a: region_dpo.region_dpo(*a, 2000.0), inputs, (8 * kept, 6 * kept + 2 * u), u)


def real_norm_rope(x, weight, rope, eps=1e-6):
    """norm_rope_ref without complex numbers, which Inductor makes no code for."""
    y = F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps)
    if rope is not None:
        real, imaginary = y.unflatten(-1, (-1, rope.shape[-1] // 2, 2)).unbind(-1)
        cos, sin = rope.unflatten(-1, (-1, 2)).unsqueeze(1).unbind(-1)
        y = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1).flatten(2)
    return y.to(x.dtype)

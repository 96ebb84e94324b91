"""Sections of bench/gpu.py on the kernels: are they right, and how fast are they."""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
from kernel_cases import CASES
from torch import Tensor
from torch._dynamo.utils import counters

import model
from bench.cases import BF16, ROWS, Case, dpo_case, modulation_cases, norm_rope_case, real_norm_rope
from bench.measure import (
    GIB,
    apart,
    both,
    both_passes,
    copy_bandwidth,
    definitions,
    deterministic,
    fill_random,
    upstream,
)
from bench.measure import card as card  # a section, too
from kernels import modulate, norm_rope, region_dpo


@dataclasses.dataclass(frozen=True)
class Sizes:
    widths: tuple[int, ...]  # D
    head: int  # channels of a head
    frames: int
    tokens: int  # a frame
    latent: tuple[int, ...]  # C, F, H, W of the loss
    many: int  # elements of the large tensors, at least
    copied: int  # bytes of the copy whose bandwidth the others are compared with


SIZES = {"kernels": Sizes((1536, 5120), 128, 13, 576, (16, 13, 36, 64), 2**31, GIB)}  # Wan2.1's widths, 49x288x512
TOY = {"kernels": Sizes((48,), 16, 4, 4, (4, 3, 4, 4), 2**10, 2**16)}


def operations(sizes: Sizes, D: int, trained: bool) -> list[Case]:
    """Every operation at width D; the loss, which has no width and no tables, once."""
    found = modulation_cases(trained, D, sizes.frames, sizes.tokens)
    found.append(norm_rope_case(trained, D, sizes.frames * sizes.tokens, sizes.head))
    if D == sizes.widths[0] and not trained:
        found.append(dpo_case((1, *sizes.latent), sizes.latent[1] // 2))
    return found


def inputs_of(case: Case, device: torch.device) -> list[Tensor]:
    with torch.device(device):
        return case.inputs()


# ---- are they right --------------------------------------------------------------------------------------------------


def cases(device: torch.device, sizes: Sizes) -> Iterator[dict]:
    """The tests' own cases against float64: errors of outputs and gradients, over what they may be."""
    for name, case in CASES.items():
        with deterministic(), torch.device(device):
            worst = max(case().values())
        yield {"name": name, "of the error allowed": worst, "right": worst <= 1}


def twice(device: torch.device, sizes: Sizes) -> Iterator[dict]:
    """The same bits twice, outputs and all gradients."""
    for D in sizes.widths:
        for case in operations(sizes, D, True) + operations(sizes, D, False):
            inputs = inputs_of(case, device)
            run = functools.partial(both, case.function, inputs, upstream(case.function, inputs))
            same = all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
            yield {"name": f"{case.name}, D = {D}", "same bits twice": same}


def graph(device: torch.device, sizes: Sizes) -> Iterator[dict]:
    """A CUDA graph of forward and backward, replayed on other values, gives the bits of a plain call on these."""
    for case in operations(sizes, sizes.widths[0], True) + operations(sizes, sizes.widths[0], False)[-1:]:
        inputs = inputs_of(case, device)
        run = functools.partial(both, case.function, inputs, upstream(case.function, inputs))
        found, replay = captured(run, device)
        with torch.no_grad():
            for a in inputs:
                if a.is_floating_point():
                    a.copy_(torch.randn_like(a))
        replay()
        same = all(torch.equal(a, b) for a, b in zip(found, run(), strict=True))
        yield {"name": f"{case.name}, CUDA graph", "a replay is a call": same}


def captured(run: Callable[[], list[Tensor]], device: torch.device) -> tuple[list[Tensor], Callable]:
    """What a run gives, and the replay that computes it anew in place: on a CPU, another run."""
    if device.type != "cuda":
        found = run()
        return found, lambda: [a.copy_(b) for a, b in zip(found, run(), strict=True)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what the first call compiles and allocates is no part of the graph
        run()
    torch.cuda.current_stream().wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        found = run()
    return found, recorded.replay


def large(device: torch.device, sizes: Sizes) -> Iterator[dict]:
    """Tensors of more than 2^31 elements: their end must be what it is in a small tensor, so no index overflows."""
    D, frames = sizes.widths[0], sizes.frames
    tokens = sizes.many // (D * frames) + 1
    with torch.device(device):
        x, h = (torch.randn(1, frames * tokens, D, dtype=BF16, requires_grad=True) for _ in range(2))
        tables = [*torch.randn(3, 1, ROWS, D).unbind(), (torch.arange(frames) % ROWS).int()[None]]
        yield the_end(
            "residual_ln_modulate", modulate.residual_ln_modulate, [x, h, *tables], [1, 1, None, None, None, 1]
        )
        rope = torch.randn(frames * tokens, sizes.head)
        yield the_end("norm_rope", norm_rope.norm_rope, [x, torch.randn(D), rope], [1, None, 0])
        del x, h, rope
        pairs = sizes.many // torch.Size(sizes.latent).numel() + 1
        v, ref, target = (torch.randn(pairs, *sizes.latent, dtype=BF16) for _ in range(3))
        start = torch.arange(pairs) % sizes.latent[1]
        yield the_end("frame_errors", region_dpo.frame_errors, [v.requires_grad_(), ref, target, start], [0, 0, 0, 0])


def the_end(name: str, function: Callable, whole: list[Tensor], axes: list[int | None]) -> dict:
    """Compares the last entries along `axes` of all outputs and gradients with the definition of these entries alone.

    axes: of each input, None for one that all entries share. Outputs are cut along the first input's.
    """

    def cut(a: Tensor, axis: int | None) -> Tensor:
        return a if axis is None else a.narrow(axis, a.shape[axis] - 1, 1)

    end = [cut(a, axis).detach().requires_grad_(a.requires_grad) for a, axis in zip(whole, axes, strict=True)]
    gradients = upstream(function, whole)
    found = [cut(a, axes[0]) for a in both(function, whole, gradients)]
    with definitions():
        expected = both(function, end, [cut(a, axes[0]) for a in gradients])
    off = max(apart(a, b) for a, b in zip(found, expected, strict=True))
    return {"name": f"{name}, a large tensor", "elements": whole[0].numel(), "apart": off, "right": off < 2**-6}


def block(device: torch.device, sizes: Sizes) -> Iterator[dict]:
    """torch.compile of a block without a graph break, beside the block as it is.

    Static shapes are a graph each; else the second length tells PyTorch that lengths differ, and the third needs none.
    """
    D = sizes.widths[0]
    config = dataclasses.replace(model.PRESETS["1.3b"], dim=D, num_heads=D // sizes.head)
    with torch.device("meta"):
        net = model.Block(config)
    net = fill_random(net, device)
    backend, most = ("inductor", 2**-5) if device.type == "cuda" else ("aot_eager", 1e-4)
    for kind, dynamic, lengths in (("static", False, 1), ("dynamic", None, 3)):
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(net, fullgraph=True, dynamic=dynamic, backend=backend)
        for frames in range(sizes.frames, sizes.frames - lengths, -1):
            inputs = block_inputs(config, frames, sizes, device)
            gradients = upstream(net, inputs)
            began = time.perf_counter()
            found = both(compiled, inputs, gradients)
            took, expected = time.perf_counter() - began, both(net, inputs, gradients)
            off = max(apart(a, b) for a, b in zip(found, expected, strict=True))
            graphs = counters["stats"]["unique_graphs"]
            yield {
                "name": f"a compiled block, {kind}, {frames} frames", "apart": off, "right": off < most,
                "s of the first call": took, "graphs so far": graphs, "no graph too many": graphs <= 2,
            }  # fmt: skip


def block_inputs(config: model.DiTConfig, frames: int, sizes: Sizes, device: torch.device) -> list[Tensor]:
    """x, table, row, text and rope of model.Block."""
    with torch.device(device):
        x = torch.randn(1, frames * sizes.tokens, config.dim, requires_grad=True)
        table, row = torch.randn(1, ROWS, 6, config.dim), (torch.arange(frames) % ROWS).bool()[None]
        text = torch.randn(1, config.text_len, config.dim)
        return [
            x,
            table,
            row,
            text.to(BF16 if device.type == "cuda" else text.dtype),
            torch.randn(x.shape[1], sizes.head),
        ]


# ---- how fast are they -----------------------------------------------------------------------------------------------


def a_row_a_token(inputs: list[Tensor]) -> list[Tensor | None]:
    """x, h, three tables and row, with each table expanded to the tokens in float32, as Wan2.2's code has it."""
    x, h, *tables, row = inputs
    take = row.long().repeat_interleave(x.shape[1] // row.shape[1], 1).unsqueeze(-1).expand(-1, -1, x.shape[2])
    return [x, h, *(a.detach().gather(1, take).requires_grad_(a.requires_grad) for a in tables), None]


def timed(sizes: Sizes) -> Iterator[tuple[Case, int, bool]]:
    """Every operation: those of the model whose LoRA is trained first, then those with trained tables."""
    for trained in (False, True):
        for D in sizes.widths:
            yield from ((case, D, trained) for case in operations(sizes, D, trained))


def rows(case: Case, D: int, trained: bool, ways: dict[str, tuple[float, float]], bandwidth: float) -> Iterator[dict]:
    """Forward and backward: milliseconds of each way, and the share of a copy's bandwidth that the first reaches."""
    for i, direction in enumerate(("forward", "backward")):
        tables = "" if case.name == "region_dpo" else f", D = {D}, tables {'trained' if trained else 'frozen'}"
        took = {f"ms {way}": ms[i] for way, ms in ways.items()}
        share = case.minimum[i] / (next(iter(took.values())) / 1e3) / bandwidth
        yield {"name": f"{case.name}, {direction}{tables}", **took, "% of a copy's bandwidth": 100 * share}


def speed(device: torch.device, sizes: Sizes) -> Iterator[dict]:
    """The kernels, the definitions, and a row a token."""
    bandwidth = copy_bandwidth(device, sizes.copied)
    for case, D, trained in timed(sizes):
        inputs = inputs_of(case, device)
        ways = {"ours": both_passes(case.function, inputs, device)}
        with definitions():
            ways["eager"] = both_passes(case.function, inputs, device)
            if case.name in modulate.FORMS:
                ways["a row a token"] = both_passes(case.function, a_row_a_token(inputs), device)
        yield from rows(case, D, trained, ways, bandwidth)


def inductor(device: torch.device, sizes: Sizes) -> Iterator[dict]:
    """torch.compile of the definitions; the rotation in real numbers, as it makes no code for complex ones."""
    bandwidth, backend = copy_bandwidth(device, sizes.copied), "inductor" if device.type == "cuda" else "aot_eager"
    for case, D, trained in timed(sizes):
        function = real_norm_rope if case.name == "norm_rope" else case.function
        torch._dynamo.reset()
        with definitions():
            compiled = torch.compile(function, backend=backend)
            ways = {"Inductor": both_passes(compiled, inputs_of(case, device), device)}
        yield from rows(case, D, trained, ways, bandwidth)


def options(device: torch.device, sizes: Sizes) -> Iterator[dict]:
    """Tokens and warps of a program, and stages of its loop, beside what the kernels are launched with."""
    tried = [{}, {"STAGES": 2}, *({"num_warps": w, "TOKENS": n} for w in (2, 4, 8, 16) for n in (1, 2, 4, 8))]
    for D in sizes.widths:
        for case in operations(sizes, D, False)[1:5:3]:  # residual_ln_modulate and norm_rope
            inputs = inputs_of(case, device)
            for change in tried:
                words = ", ".join(f"{k} = {v}" for k, v in change.items()) or "as it is"
                row = {"name": f"{case.name}, D = {D}, {words}"}
                with mock.patch.dict(modulate.OPTIONS, change), mock.patch.dict(norm_rope.OPTIONS, change):
                    try:
                        ahead, back = both_passes(case.function, inputs, device)
                        yield row | {"ms forward": ahead, "ms backward": back}
                    except Exception as error:  # whatever the compiler or the driver says of it
                        yield row | {"refused": str(error).strip().partition("\n")[0][:200]}

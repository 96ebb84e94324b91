"""What the benchmarks share: networks with random weights, made where they run, and asymdpo.py's step on them; time
and memory on a GPU or a CPU.
"""

import contextlib
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils._pytree import tree_leaves

import asymdpo
import flow
import model
from experiments.cost import Count
from kernels import modulate, norm_rope, region_dpo

try:
    from triton.testing import do_bench_cudagraph
except ImportError:  # no Triton for this platform, and so no CUDA
    do_bench_cudagraph = None

MODULES = (modulate, norm_rope, region_dpo)
# FLOP/s of products in bfloat16 with float32 sums, dense: NVIDIA's data sheets of A100, H100 and H200. The A800 and the
# H800 differ from A100 and H100 in their NVLink only. The first name that is part of the card's counts.
BF16_PEAK = {"A100": 312e12, "A800": 312e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H800": 989e12,
             "H200": 989e12}  # fmt: skip
GIB = 2**30
# Of the loss. beta multiplies what is lost in a difference of two errors, as others write it: small, losses compare.
CONFIG = asymdpo.Config(beta=50.0, form="outside")
N1 = 1  # frames that a loser was given


def dtype_of(device: torch.device) -> torch.dtype:
    """Of the weights, as the stages choose it."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s that the data sheet promises, None for a device that is not known here."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for card, flops in BF16_PEAK.items() if card in name), None)


def fill_random(net: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """Random weights, each made on the device, for a network of the meta device. Returns net, frozen.

    Normal of deviation 0.02, and around 1 for the weights of norms: activations stay of order 1. Matrix products run in
    dtype, by default that of the stages.
    """
    shapes = {name: a.shape for name, a in net.state_dict().items()}

    def get(name: str) -> Tensor:
        a = 0.02 * torch.randn(shapes[name], device=device) + bool(re.search(r"norm\w*\.weight$", name))
        return a.to(model.weight_dtype(name, dtype or dtype_of(device)))

    return model.fill(net, get)


def random_dit(config: model.DiTConfig, device: torch.device, dtype: torch.dtype | None = None) -> model.DiT:
    """As `model.load_model` gives it."""
    with torch.device("meta"):
        net = model.DiT(config)
    return fill_random(net, device, dtype)


def random_pair(config: model.DiTConfig, shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
    """chosen, rejected, text, noise and t of one pair, as asymdpo.predict takes them."""
    chosen, rejected, noise = torch.randn(3, 1, *shape, device=device)
    text = torch.randn(1, config.text_len, config.text_dim, device=device)
    # early: later, the sinusoid that diffusers computes in float32 is off
    return chosen, rejected, text, noise, torch.full((1,), 0.02, device=device)


class Trainer:
    """asymdpo.py's step on one pair. net: with its LoRA, which alone is trained."""

    def __init__(self, net: nn.Module, pair: tuple[Tensor, ...]):
        self.net, self.pair = net, pair
        self.n1 = torch.full((1,), N1, device=pair[0].device)
        self.trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
        self.restart()

    def restart(self) -> None:
        """A new optimiser, as a resumed run makes it."""
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=5e-6, fused=True)

    def loss(self) -> tuple[Tensor, dict[str, Tensor]]:
        return asymdpo.asymdpo_loss(CONFIG, asymdpo.predict(self.net, *self.pair), self.n1, self.n1)

    def step(self) -> None:
        self.loss()[0].sum().backward()
        nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def velocity(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return self.net(x_t, t, text)

    @torch.no_grad()
    def forward(self) -> Tensor:
        """The policy's velocity of both clips."""
        chosen, rejected, text, noise, t = self.pair
        x_t = flow.add_noise(torch.cat([chosen, rejected]), torch.cat([noise] * 2), t.repeat(2))
        return self.velocity(x_t, t.repeat(2), torch.cat([text] * 2))


def lora_trainer(
    config: model.DiTConfig, shape: tuple[int, ...], rank: int, device: torch.device, dtype=None
) -> Trainer:
    net = random_dit(config, device, dtype)
    model.add_lora(net, rank, rank, "attn")
    return Trainer(net, random_pair(config, shape, device))


@contextlib.contextmanager
def definitions():
    """Within it the kernels' definitions are taken on every device."""
    with contextlib.ExitStack() as stack:
        for module in MODULES:
            stack.enter_context(mock.patch.object(module, "implementation", lambda device: "torch"))
        yield


@contextlib.contextmanager
def deterministic(strict: bool = False):
    """Within it PyTorch's operations give the same bits each time, and new tensors are filled with NaN.

    What has no such form runs all the same, or, if strict, is a RuntimeError. Flash attention's backward has one, but
    takes it only if strict (aten/src/ATen/native/transformers/cuda/attention_backward.cu).
    """
    if strict:  # cuBLAS then asks for one of two settings
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# ---- time and memory -------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(run: Callable, device: torch.device) -> float:
    """Of one call, for operations that take less time than Python takes to start them: a CUDA graph repeats the call.

    On a CPU, the best of three by the clock.
    """
    if device.type == "cuda":
        return do_bench_cudagraph(run, rep=10, return_mode="median")
    return 1e3 * min(clock(run, device) for _ in range(3))


def clock(run: Callable, device: torch.device) -> float:
    """Seconds of one call, with what it takes to start it."""
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - began


def seconds(run: Callable, device: torch.device, calls: int = 3) -> float:
    """The median of `calls`, after one that warms up."""
    return statistics.median([clock(run, device) for _ in range(calls + 1)][1:])


def peak_bytes(run: Callable, device: torch.device) -> int:
    """The most bytes of tensors alive at once during one call; on a CPU, of those that the call makes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device)
    with Count() as count, torch.compiler.set_stance("force_eager"):  # compiled code hides its tensors
        run()
    return count.peak


def forward(function: Callable, inputs: list) -> list[Tensor]:
    """The outputs that have a gradient."""
    return [a for a in tree_leaves(function(*inputs)) if a.requires_grad]


def upstream(function: Callable, inputs: list) -> list[Tensor]:
    """Gradients of the outputs."""
    return [torch.randn_like(a) for a in forward(function, inputs)]


def both(function: Callable, inputs: list, gradients: list[Tensor]) -> list[Tensor]:
    """Forward and backward: the outputs, and the gradients of all inputs that are used and ask for one."""
    outputs, wanted = forward(function, inputs), [a for a in inputs if a is not None and a.requires_grad]
    found = torch.autograd.grad(outputs, wanted, gradients, allow_unused=True)
    return [a.detach() for a in (*outputs, *found) if a is not None]


def both_passes(function: Callable, inputs: list, device: torch.device) -> tuple[float, float]:
    """Milliseconds of the forward pass, and of the backward: of both together, less the forward."""
    gradients = upstream(function, inputs)
    ahead = milliseconds(lambda: forward(function, inputs), device)
    return ahead, milliseconds(lambda: both(function, inputs, gradients), device) - ahead


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second that a copy of `size` bytes reads and writes: what the share of other operations refers to."""
    source = torch.randint(255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / (milliseconds(lambda: target.copy_(source), device) / 1e3)


def apart(one: Tensor, two: Tensor) -> float:
    """The largest difference, relative to the largest value of `two`."""
    return ((one.double() - two.double()).abs().max() / two.double().abs().max().clamp(min=1e-30)).item()


def card(device: torch.device, sizes) -> Iterator[dict]:
    """The first section of every suite: what it runs on, and what that can do."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    about = {"torch": torch.__version__, "CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version())}
    yield {"name": name, **about}
    size, n = (GIB, 8192) if device.type == "cuda" else (2**20, 128)
    a, b = torch.randn(2, n, n, device=device).to(dtype_of(device))
    flops = 2 * n**3 / (milliseconds(lambda: a @ b, device) / 1e3)
    yield {
        "name": "at most",
        "TB/s of a copy": copy_bandwidth(device, size) / 1e12,
        "TFLOP/s of a product": flops / 1e12,
    }

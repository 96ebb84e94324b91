"""On a GPU, `pytest -m gpu`: speed beside eager and torch.compile. The cases of test_kernels.py run there, too."""

import pytest
import torch

from kernels import modulate, norm_rope, region_dpo

pytestmark = pytest.mark.gpu
MODULES = pytest.mark.parametrize("module", [modulate, norm_rope, region_dpo], ids=lambda m: m.__name__)


@pytest.fixture(autouse=True)
def a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: the kernels were not timed on a GPU")


@MODULES
def test_check(module):
    """What `python kernels/...` checks."""
    module.check(torch.device("cuda"))


@MODULES
def test_faster_than_eager(module, capsys):
    """Forward and backward at Wan2.1-1.3B's shape, with Triton's do_bench; the figures are printed."""
    for name, took in module.time(torch.device("cuda")).items():
        with capsys.disabled():
            print(f"\n{name}: " + ", ".join(f"{way} {ms:.3f} ms" for way, ms in took.items()))
        assert took["kernel"] < took["eager"], name
        assert took["kernel"] < 1.1 * took["torch.compile"], name


@MODULES
def test_same_bits_twice(module, monkeypatch):
    """No atomics: two runs give the same bits, gradients of the tables included."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    if module is region_dpo:
        tensors = [a.requires_grad_() for a in torch.randn(6, 2, 16, 13, 36, 64, device=device)]
        start = torch.tensor([1, 5], device=device)
        runs = [module._step(module.region_dpo, tensors, start, 2.0) for _ in range(2)]
    elif module is norm_rope:
        leaves, rope = module._case((2, 7488, 12, 128), torch.bfloat16, device)
        weights = torch.randn_like(leaves[0])
        runs = [module._step(module.norm_rope, leaves, rope, weights) for _ in range(2)]
    else:
        leaves, row = module._case((2, 13, 576, 1536), torch.bfloat16, device)
        weights = torch.randn(2, *leaves[0].shape, device=device)
        runs = [module._step(module.residual_ln_modulate, leaves, row, weights) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))

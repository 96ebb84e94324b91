"""On a GPU, `pytest -m gpu`, with the cases of test_kernels.py. Needs torch, triton, numpy and pytest, and no more; the
test of the stages needs what they need.
"""

import pytest
import torch
from kernel_cases import calls_to_copy

from kernels import modulate, norm_rope, region_dpo

pytestmark = pytest.mark.gpu
MODULES = pytest.mark.parametrize("module", [modulate, norm_rope, region_dpo], ids=lambda m: m.__name__)


@pytest.fixture(autouse=True)
def a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: the kernels were not run on a GPU")


@MODULES
def test_check(module):
    """What `python kernels/...` checks."""
    module.check(torch.device("cuda"))


@MODULES
def test_time(module, capsys):
    """All ways can be captured in a CUDA graph and replayed. Their times are printed; no one machine's are a norm."""
    with capsys.disabled():
        took = module.time(torch.device("cuda"))
    assert all(ms > 0 for ways in took.values() for ms in ways.values())


@MODULES
def test_same_bits_twice(module):
    """No atomics: two runs give the same bits, gradients of the tables included."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    if module is region_dpo:
        tensors = [a.requires_grad_() for a in torch.randn(3, 2, 16, 13, 36, 64, device=device)]
        run = (module.frame_errors, tensors, torch.tensor([1, 5], device=device), torch.rand(2, 13, device=device))
    elif module is norm_rope:
        run = (module.norm_rope, *module._case((2, 7488, 12, 128), torch.bfloat16, device))
    else:
        case = module._case((2, 13, 576, 1536), torch.bfloat16, device)
        run = (module.FORMS["residual_ln_modulate"][0], module.KERNEL, *case)
    assert all(torch.equal(a, b) for a, b in zip(module._step(*run), module._step(*run), strict=True))


def test_the_page_opens_with_calls_that_run():
    made = calls_to_copy()
    assert made["x"].is_cuda and made["x"].grad.isfinite().all() and made["loss"].isfinite().all()


def test_every_stage(tmp_path):
    """All of the demo, as small as it goes; then AsymDPO compiled, with activations that are computed anew."""
    for package in ("av", "tqdm", "safetensors", "einops", "tokenizers"):
        pytest.importorskip(package)
    from helpers import STAGES, metrics, run_stage  # here, as the other tests do without what the stages import

    for name in STAGES:
        run_stage(tmp_path, name)
    other = run_stage(tmp_path, "asymdpo", out=tmp_path / "compiled", compile=True, checkpointing=True)
    for folder, most in ((tmp_path / "asymdpo", 0), (other, 1e-3)):  # compiled, policy and reference are two graphs
        first, second = metrics(folder)
        assert abs(first["S"]) <= most and second["grad_norm"] > 0

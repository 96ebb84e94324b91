"""The asymmetric DPO loss: a region-masked, length-normalised reduction over the latent frames where a pair differs.

    e_i(f; x) = mean over C, H, W of (target_i − f_i)²                      i: latent frame
    d_i       = e_i(policy; x) − e_i(ref; x) = mean (v − r)·((v − target) + (r − target))
    S         = Σ_{i ≥ start} (d_i^w − d_i^l),   K = F − start              w: winner, l: loser
    outside:  loss = softplus(β·S) / K            inside:  loss = softplus(β·S / K)

Frames before `start` are selected away, never multiplied by zero: whatever stands there, NaN included, reaches
neither the loss nor a gradient, and the gradient there is exactly 0. d is accumulated as the product of
differences, not as the difference of two errors: exactly 0 where policy equals reference, and far closer to
float64 near it.

Where it is used: asymdpo.py. `region_dpo_ref` is the definition, in PyTorch, and runs on CPU and CUDA. The file
needs torch only and works copied alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def frame_errors(v: Tensor, ref: Tensor, target: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per latent frame, 0 before start: policy error, reference error, and their difference d, each (B, F) float32."""
    keep = torch.arange(v.shape[2], device=v.device) >= start[:, None]
    v, ref, target = (torch.where(keep[:, None, :, None, None], a.float(), 0) for a in (v, ref, target))
    policy_error, ref_error = v - target, ref - target
    difference = (v - ref) * (policy_error + ref_error)
    return tuple(a.mean(dim=(1, 3, 4)) for a in (policy_error.square(), ref_error.square(), difference))


def region_dpo_ref(
    v_w: Tensor, v_l: Tensor, ref_w: Tensor, ref_l: Tensor, target_w: Tensor, target_l: Tensor,
    start: Tensor, beta: float, form: str = "outside",
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    policy_w, reference_w, d_w = frame_errors(v_w, ref_w, target_w, start)
    policy_l, reference_l, d_l = frame_errors(v_l, ref_l, target_l, start)
    K = v_w.shape[2] - start
    S = (d_w - d_l).sum(1)
    loss = F.softplus(beta * S) / K if form == "outside" else F.softplus(beta * S / K)
    sums = {"err/w_policy": policy_w, "err/l_policy": policy_l, "err/w_ref": reference_w, "err/l_ref": reference_l}
    metrics = {name: (a.sum(1) / K).detach() for name, a in sums.items()}
    return loss, {**metrics, "margin": -(beta * S / K).detach(), "S": S.detach()}


def region_dpo(
    v_w: Tensor, v_l: Tensor, ref_w: Tensor, ref_l: Tensor, target_w: Tensor, target_l: Tensor,
    start: Tensor, beta: float, form: str = "outside",
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The loss of each pair.

    v_*, ref_*, target_* (B, C, F, H, W) floating point: velocity of policy and reference, and noise − x0, for
    the winner (w) and the loser (l); start (B,) integer in 0 … F−1: first frame in the loss; beta > 0; form
    "outside" or "inside". Returns loss (B,) float32 and detached (B,) metrics: `err/{w,l}_{policy,ref}`
    averaged over frames ≥ start, `S`, and `margin` = −β·S/K, positive where the policy prefers the winner.
    ValueError for shapes or values that do not fit.
    """
    tensors = {"v_w": v_w, "v_l": v_l, "ref_w": ref_w, "ref_l": ref_l, "target_w": target_w, "target_l": target_l}
    for name, a in tensors.items():
        if a.ndim != 5 or a.shape != v_w.shape or not a.is_floating_point() or a.device != v_w.device:
            got = f"{a.dtype} {tuple(a.shape)} on {a.device}"
            raise ValueError(f"{name}: expected floating point {tuple(v_w.shape)} on {v_w.device}, got {got}")
    frames = v_w.shape[2]
    if start.shape != v_w.shape[:1] or start.is_floating_point():
        raise ValueError(f"start: expected integers ({v_w.shape[0]},), got {start.dtype} {tuple(start.shape)}")
    if ((start < 0) | (start >= frames)).any():
        raise ValueError(f"start: expected 0 … {frames - 1}, got {start.tolist()}: an empty region has no loss")
    if beta <= 0 or form not in ("outside", "inside"):
        raise ValueError(f"expected beta > 0 and form 'outside' or 'inside', got {beta}, {form!r}")
    return region_dpo_ref(v_w, v_l, ref_w, ref_l, target_w, target_l, start, beta, form)

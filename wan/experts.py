"""Wan2.2-T2V-A14B: two networks of the 14B shape, told apart by the time; VAE and text encoder are Wan2.1's.

    high noise    t ≥ 0.875    high_noise_model/ in Wan's release, transformer/ in diffusers'
    low noise     t < 0.875    low_noise_model/, transformer_2/

Each is trained alone: --base names its folder, --t_min 0.875 or --t_max 0.875 its times. Sampling takes both: --base
the release, or --base and --base_low a network each.

Facts of github.com/Wan-Video/Wan2.2, wan/configs/wan_t2v_A14B.py (the boundary, the folders' names) and
wan/text2video.py (`t.item() >= boundary`, on whole thousandths); and of github.com/huggingface/diffusers, which has the
same in pipelines/wan/pipeline_wan.py (boundary_ratio, transformer_2).
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from model import EXPERTS, DiT
from runtime.group import rank_and_size
from runtime.options import UserError
from wan.lora import load_adapted, load_continuation, lora_files, read_header

BOUNDARY = 0.875
HIGH, LOW = (tuple(names[i] for names in EXPERTS) for i in (0, 1))


def expert_of(base: str | Path) -> str:
    """Which one a network is, "high" or "low", if the name of its folder or file says so, else "": as in the two
    releases, or with high_noise or low_noise in it, as in ComfyUI's and LightX2V's files.
    """
    base = Path(base)
    if "high_noise" in base.name or (base.name == HIGH[1] and (base.parent / LOW[1]).is_dir()):
        return "high"
    return "low" if "low_noise" in base.name or base.name == LOW[1] else ""


def release_of(path: str | Path) -> Path:
    """The folder of VAE and text encoder: what is around a network's own folder, or else path itself."""
    path = Path(path)
    return path.parent if path.name in HIGH + LOW else path


def check_times(cfg) -> None:
    """At the preset a14b UserError unless cfg.t_min and cfg.t_max are within the times of the network of cfg.base, and
    for previews: it makes no video alone.
    """
    if cfg.preset != "a14b":
        return
    if cfg.preview_every:
        raise UserError("--preview_every: expected 0 at --preset a14b: one of its two networks makes no video alone")
    within = "high" if cfg.t_min >= BOUNDARY else "low" if cfg.t_max <= BOUNDARY else ""
    if not within or within != (expert_of(cfg.base) or within):
        each = f"--t_min {BOUNDARY} for the high-noise expert, --t_max {BOUNDARY} for the low-noise one"
        raise UserError(f"{cfg.base}: expected {each}, got --t_min {cfg.t_min} and --t_max {cfg.t_max}")


def bases(cfg) -> tuple[str, ...]:
    """The networks that cfg.base and cfg.base_low name: at the preset a14b high and low noise, elsewhere the one.

    UserError for another number of them, and for one in the other's place.
    """
    if cfg.preset != "a14b":
        options = ("base_low", "lora_low", "continuation_low", "guidance_low_noise")
        if beside := [name for name in options if getattr(cfg, name, None) not in ("", None)]:
            raise UserError(f"--{beside[0]}: is for the two networks of --preset a14b, got --preset {cfg.preset}")
        return (cfg.base,)
    given = (cfg.base, cfg.base_low) if cfg.base_low else ()
    for names in () if given else EXPERTS:
        if all((Path(cfg.base) / name).is_dir() for name in names):
            given = tuple(str(Path(cfg.base) / name) for name in names)
    if not given or expert_of(given[0]) == "low" or expert_of(given[1]) == "high":
        expected = "expected --base with the release's two networks, or --base and --base_low, high and low noise"
        raise UserError(f"--preset a14b: {expected}, got {cfg.base!r} and {cfg.base_low!r}")
    if bool(cfg.continuation) != bool(cfg.continuation_low):
        expected = "expected --continuation and --continuation_low, one for each network, or neither"
        raise UserError(f"--preset a14b: {expected}, got {cfg.continuation!r} and {cfg.continuation_low!r}")
    return given


def tell_of_others(base: str | Path, files: list[Path]) -> None:
    """A line on stderr for each LoRA that was made for the other one of the two networks, by its name or its header."""
    for file in files if rank_and_size()[0] == 0 else ():
        made_for = expert_of(file) or expert_of(read_header(file).get("base", ""))
        if {made_for, expert_of(base)} == {"high", "low"}:
            print(f"warning: {file} was made for {made_for} noise, {base} is the other network", file=sys.stderr)


class Experts:
    """Networks of high and low noise as one: called as a network is, it calls that of the batch's one time.

    Only that one is on the device; the other waits on the CPU, unless it is split over a node's GPUs (`keep`).
    wraps: what is called of each in its place (`each`), made when its times come. It may hold gigabytes, so it is
    dropped when those of the other one come.
    """

    def __init__(self, high: DiT, low: DiT, device: torch.device, keep: bool, wraps: Sequence[Callable] = ()):
        self.nets, self.device, self.keep, self.wraps = (high, low), device, keep, wraps
        self.which, self.call = -1, None

    def __call__(self, x_t: Tensor, t: Tensor, text: Tensor, cond_mask: Tensor | None = None) -> Tensor:
        which = int(t[0].item() < BOUNDARY)
        if which != self.which:
            self.which, self.call = which, None
        net = self._bring(which)
        self.call = self.call or (self.wraps[which](net) if self.wraps else net)
        return self.call(x_t, t, text, cond_mask)

    def _bring(self, which: int) -> DiT:
        """The network of high (0) or low (1) noise, on the device."""
        if not self.keep and self.nets[which].patch_embedding.weight.device != self.device:
            self.nets[1 - which].to("cpu")
            self.nets[which].to(self.device)
        return self.nets[which]


def each(net: DiT | Experts, high: Callable[[DiT], Callable], low: Callable[[DiT], Callable] | None = None) -> Callable:
    """high(net); of two networks, what calls high of the one and low, or high, of the other in their place."""
    if not isinstance(net, Experts):
        return high(net)
    return Experts(*net.nets, net.device, net.keep, (high, low or high))


def load_networks(cfg, dtype: torch.dtype, device: torch.device, finish: Callable[[DiT, str], DiT]) -> DiT | Experts:
    """The network of cfg.base with cfg.lora, and of cfg.continuation if that is given; at the preset a14b both.

    finish: what is done to a network of a folder on its device, which may still be refused. UserError as `bases`,
    `load_adapted` and `load_continuation`.
    """
    found, nets = bases(cfg), []
    kinds = zip(found, (cfg.lora, cfg.lora_low), (cfg.continuation, cfg.continuation_low))
    for base, loras, folder in reversed(list(kinds)):  # high noise last, so that it is on the device
        files = lora_files(loras)
        tell_of_others(base, files)
        if folder:
            net = load_continuation(base, folder, dtype, device, files)
        else:
            net = load_adapted(base, files, dtype, device)
        nets.append(finish(net, base))
        if len(nets) < len(found) and not cfg.shard:
            net.to("cpu")
    return nets[0] if len(nets) == 1 else Experts(nets[1], nets[0], device, cfg.shard)

"""Stage 2, preference pairs without labels: one real clip continued from few and from many given frames.

    N1 ~ U{1 … ⌊0.6·F⌋}    loser  = [real frames < N1 ; Φ samples the rest]
    N2 ~ U{⌈0.8·F⌉ … F}    winner = [real frames < N2 ; Φ samples the rest]      N2 = F: the winner is the real clip

        frames   0 ……… N1 ……………… N2 ……… F−1
        winner   real  ① real    ② generated ③
        loser    real  ① generated ② generated ③

    python make_pairs.py --base out/demo/base --continuation out/demo/continuation --data out/demo/shards \\
        --out out/demo/pairs
    torchrun --nproc_per_node 8 make_pairs.py --preset 1.3b --base Wan2.1-T2V-1.3B --continuation out/continuation \\
        --data shards --out out/pairs

Both continuations of a clip start from the same noise, so a pair differs by the number of given frames only. A
pair is a function of (clip, N1, N2, seed). Everything stays in latents: nothing is decoded and encoded again.

The baselines' pairs are two samples of the model that is to be trained, in no order: label.py finds one.

    --pairs flow          two samples of the clip's prompt, each from its own noise (Flow-DPO, arXiv 2501.13918)
    --pairs structural    both from the clip itself, noised to one time η ~ U(0.65, 0.8), each with its own noise
                          (StructuralDPO and DenseDPO, arXiv 2506.03517)

    python make_pairs.py --pairs flow --base out/demo/base --lora out/demo/sft --data out/demo/shards --out out/samples

In    a model folder, shards of prepare.py; a finished continuation.py folder
Out   shards with `chosen` and `rejected` (C, F, H, W), of the baselines `first` and `second`; text states, and for each
      pair id, caption, n1, n2
Cost  nfe forwards a continuation, twice that with guidance, two continuations a clip (one where N2 = F); two samples
      for flow; structural takes the part of the steps below η
"""

import dataclasses
import math
from pathlib import Path

import torch

import flow
import model
from experiments import cost
from runtime import run as common
from runtime import shards as data
from runtime.run import UserError

PRESETS = {  # tiny: see README; 1.3b, 14b: the paper's numbers, as its readers report them, and Wan's sampler settings
    "tiny": dict(nfe=12, t_shift=4.0, guidance=1.0, shard_size=64),
    "1.3b": dict(nfe=50, t_shift=5.0, guidance=5.0, shard_size=8),
    "14b": dict(nfe=50, t_shift=5.0, guidance=5.0, shard_size=4),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Stage 2: samples the two sides of every clip's pair."""

    preset: str = "tiny"  # tiny, 1.3b or 14b: what every option that is not given stands at
    pairs: str = "continuation"  # continuation: the method's; flow, structural: the baselines', for label.py
    base: str = "out/demo/base"  # model folder
    lora: str = ""  # folders with lora.safetensors, or such files, separated by commas, fused into the base first
    continuation: str = "out/demo/continuation"  # folder of continuation.py; flow and structural need none
    strength: float = 1.0  # factor of the continuation's LoRA: below 1 the losers have more of the base's own faults
    data: str = "out/demo/shards"  # shards of prepare.py
    split: str = "align"  # which clips: train, align or eval
    out: str = "out/demo/pairs"  # folder to write
    clips: int = 0  # number of clips; 0: every clip of the split
    per_clip: int = 1  # pairs a clip, each with lengths and noise of its own
    n1_min: int | None = None  # fewest given frames of a loser, in latent frames; not given: 1
    n1_max: int | None = None  # most given frames of a loser; not given: 60 % of the clip, rounded down
    n2_min: int | None = None  # fewest given frames of a winner; not given: 80 % of the clip, rounded up
    n2_max: int | None = None  # most given frames of a winner; not given: all of them
    eta_min: float = 0.65  # structural: least time that a clip is noised to
    eta_max: float = 0.8  # structural: most
    nfe: int | None = None  # solver steps
    t_shift: float | None = None  # warp of the solver's times towards noise
    guidance: float | None = None  # classifier-free guidance weight; 1: none
    shard_size: int | None = None  # pairs a shard, and sampled together
    seed: int = 0  # of N1, N2 and the noise
    dry_run: bool = False  # print what it will cost, and stop: nothing is loaded or written


def windows(cfg, frames: int) -> tuple[int, int, int, int]:
    """n1_min, n1_max, n2_min, n2_max in latent frames.

    UserError unless 0 ≤ n1_min ≤ n1_max < n2_min ≤ n2_max ≤ F.
    """
    default = (1, math.floor(0.6 * frames), math.ceil(0.8 * frames), frames)
    given = (cfg.n1_min, cfg.n1_max, cfg.n2_min, cfg.n2_max)
    low1, high1, low2, high2 = (d if g is None else g for g, d in zip(given, default))
    if not 0 <= low1 <= high1 < low2 <= high2 <= frames:
        raise UserError(
            f"expected 0 <= n1_min <= n1_max < n2_min <= n2_max <= {frames} (the clip's latent frames), "
            f"got n1 {low1}..{high1}, n2 {low2}..{high2}: the loser must be given fewer frames than the winner"
        )
    return low1, high1, low2, high2


def draw_lengths(seed: int, clip: str, window: tuple[int, int, int, int]) -> tuple[int, int]:
    """N1 and N2 of a clip's pair, uniform on the windows."""
    low1, high1, low2, high2 = window
    g = flow.generator("lengths", seed, clip)
    return tuple(int(torch.randint(low, high + 1, (), generator=g)) for low, high in ((low1, high1), (low2, high2)))


def continue_clips(net, x0, text, n_cond, keys, cfg, negative=None):
    """Continues each clip x0 (B, C, F, H, W) from its first n_cond (B,) frames. Returns (B, C, F, H, W).

    The given frames come out bit for bit. Clips given whole are returned as they are, unsampled.
    """
    result = x0.clone()
    todo = [i for i, n in enumerate(n_cond.tolist()) if n < x0.shape[2]]
    if todo:
        cond_mask = torch.arange(x0.shape[2], device=x0.device) < n_cond[todo, None].to(x0.device)
        noise = flow.draw_noise(x0.shape[1:], [keys[i] for i in todo]).to(x0.device)
        call = flow.guided(net, cfg.guidance, negative)
        result[todo] = flow.euler(call, noise, text[todo], cfg.nfe, cfg.t_shift, x0[todo], cond_mask)
    return result


def denoise(net, x0, noise, text, eta, cfg):
    """Samples (B, C, F, H, W) from the clips x0 noised to the times eta (B,) in (0, 1], all in `structural_steps`.

    noise as x0, text (B, S, text_dim). The levels are those of flow.time_grid, ending at η in place of 1.
    """
    warped = lambda u: flow.shift_t(u, cfg.t_shift)  # noqa: E731
    even = lambda t: flow.shift_t(t, 1 / cfg.t_shift)  # noqa: E731  its inverse
    steps = structural_steps(cfg)
    x = flow.add_noise(x0, noise, eta)
    for k in range(steps):
        t, t_next = (warped(even(eta) * (1 - i / steps)) for i in (k, k + 1))
        x = x + flow.per_sample(t_next - t, x) * net(x, t, text)
    return x


def structural_steps(cfg) -> int:
    """Solver steps of a structural sample: those that the whole grid has below eta_max."""
    share = float(flow.shift_t(torch.tensor(cfg.eta_max, dtype=torch.float64), 1 / cfg.t_shift))
    return math.ceil(cfg.nfe * share - 1e-9)  # a level of the grid is no step more for its last bit


# ---- the kinds of pairs: x0 (B, C, F, H, W), text (B, S, text_dim), B ids -> fields shaped as x0, a fact a pair ------


def continuation_pairs(net, x0, text, ids, cfg, negative):
    """The method's: winner and loser from one noise, of N1 and N2 given frames."""
    lengths = [draw_lengths(cfg.seed, i, windows(cfg, x0.shape[2])) for i in ids]
    keys = [("pair", cfg.seed, i) for i in ids]
    rejected, chosen = (continue_clips(net, x0, text, torch.tensor(n), keys, cfg, negative) for n in zip(*lengths))
    return {"chosen": chosen, "rejected": rejected}, [{"n1": n1, "n2": n2} for n1, n2 in lengths]


def flow_pairs(net, x0, text, ids, cfg, negative):
    """Flow-DPO's: two samples of the prompt; of x0 the shape alone is used."""
    call, sides = flow.guided(net, cfg.guidance, negative), {}
    for side in ("first", "second"):
        noise = flow.draw_noise(x0.shape[1:], [("pair", cfg.seed, i, side) for i in ids]).to(x0.device)
        sides[side] = flow.euler(call, noise, text, cfg.nfe, cfg.t_shift)
    return sides, [{"n1": 0, "n2": 0} for _ in ids]


@torch.no_grad()
def structural_pairs(net, x0, text, ids, cfg, negative):
    """StructuralDPO's and DenseDPO's: two samples from x0 noised to one η ~ U(eta_min, eta_max)."""
    call, sides = flow.guided(net, cfg.guidance, negative), {}
    draws = torch.stack([torch.rand((), generator=flow.generator("eta", cfg.seed, i)) for i in ids])
    eta = (cfg.eta_min + (cfg.eta_max - cfg.eta_min) * draws).to(x0.device)
    for side in ("first", "second"):
        noise = flow.draw_noise(x0.shape[1:], [("pair", cfg.seed, i, side) for i in ids]).to(x0.device)
        sides[side] = denoise(call, x0, noise, text, eta, cfg)
    return sides, [{"n1": 0, "n2": 0, "eta": round(e, 4)} for e in eta.tolist()]


KINDS = {"continuation": continuation_pairs, "flow": flow_pairs, "structural": structural_pairs}


# ---- the stage -------------------------------------------------------------------------------------------------------


def check(cfg) -> None:
    """UserError for options that make no sense."""
    if cfg.pairs not in KINDS:
        raise UserError(f"--pairs: expected one of {', '.join(KINDS)}, got {cfg.pairs!r} (how many: --clips)")
    if cfg.per_clip < 1 or cfg.clips < 0:
        raise UserError(f"expected --clips >= 0 and --per_clip >= 1, got {cfg.clips} and {cfg.per_clip}")
    if not 0 <= cfg.strength < math.inf:
        raise UserError(f"--strength: expected at least 0, got {cfg.strength}")
    lengths = any(getattr(cfg, name) is not None for name in ("n1_min", "n1_max", "n2_min", "n2_max"))
    if cfg.pairs != "continuation" and (lengths or cfg.strength != 1):
        raise UserError(f"--n1_min … --n2_max, --strength: expected none with --pairs {cfg.pairs}")
    if not 0 < cfg.eta_min <= cfg.eta_max <= 1:
        raise UserError(f"expected 0 < eta_min <= eta_max <= 1, got {cfg.eta_min} and {cfg.eta_max}")


def dry_run(cfg) -> None:
    """Prints what it will cost: a winner given whole is not sampled."""
    shape, found = cost.latents(cfg.preset, cfg.data, "prepare.py", cfg.split)
    given, samples = cfg.pairs == "continuation", 2
    if given:
        low, high = windows(cfg, shape[1])[2:]
        samples -= (high == shape[1]) / (high - low + 1)
    count, nfe = (cfg.clips or found or cost.CLIPS) * cfg.per_clip, cfg.nfe
    if cfg.pairs == "structural":
        nfe = structural_steps(cfg)
    cost.sampling("make_pairs", cfg.preset, shape, count * samples, nfe, cfg.guidance, cfg.shard_size, given)


def main(cfg: Config) -> None:
    # ---- what to do, checked before anything is loaded
    cfg = common.resolve(cfg, PRESETS)
    check(cfg)
    if cfg.dry_run:
        return dry_run(cfg)
    group = common.start_group()
    continuing, loras = cfg.pairs == "continuation", model.lora_files(cfg.lora)
    inputs = {"data": cfg.data, "base": cfg.base, "continuation": cfg.continuation if continuing else ""}
    run = common.Run(cfg, "make_pairs", group, inputs | {str(file): file for file in loras})
    if run.done:
        return
    if continuing:
        common.read_manifest(cfg.continuation, "continuation.py")
    clips = data.Shards(cfg.data, "prepare.py", cfg.split, verify=group.main)
    frames = clips.shape("x0")[1]
    window = windows(cfg, frames) if continuing else None
    count = cfg.clips or len(clips)
    if count > len(clips):
        raise UserError(f"--clips: expected at most {len(clips)}, the clips of split {cfg.split!r}, got {cfg.clips}")
    dtype = torch.bfloat16 if group.device.type == "cuda" else torch.float32
    if continuing:
        net = model.load_continuation(cfg.base, cfg.continuation, dtype, group.device, loras, cfg.strength)
    else:
        net = model.load_fused(cfg.base, loras, dtype, group.device)
    model.check_preset(net, cfg.preset, cfg.base)
    negative = common.read_tensors(Path(cfg.data) / "negative.safetensors")["text"] if cfg.guidance != 1 else None

    # ---- sample, a shard at a time; shards that an earlier run finished are kept
    jobs = [(i, clips.rows[i]["id"] + f"+{k}" * (k > 0)) for k in range(cfg.per_clip) for i in range(count)]
    starts = list(range(0, len(jobs), cfg.shard_size))
    bar = run.progress(len(starts[group.rank :: group.size]), unit="shard")
    for k in range(group.rank, len(starts), group.size):
        if not data.shard_is_whole(run.folder, k):
            index, ids = zip(*jobs[starts[k] : starts[k] + cfg.shard_size])
            x0, text = clips.get("x0", index).float().to(group.device), clips.text(index).to(group.device)
            fields, facts = KINDS[cfg.pairs](net, x0, text, ids, cfg, negative)
            rows = [
                {"id": name, "caption": clips.rows[i]["caption"], **fact, "seed": cfg.seed}
                for i, name, fact in zip(index, ids, facts)
            ]
            fields = {name: list(values.cpu()) for name, values in fields.items()}
            data.write_shard(run.folder, k, rows, fields, clips.states(index), [])
        bar.update()
    bar.close()

    # ---- result
    group.barrier()
    if group.main:
        files, kept, _ = data.collect(run.folder, len(starts), [])
        given = "in no order: label.py finds one"
        if continuing:
            given = f"loser given {window[0]}..{window[1]}, winner {window[2]}..{window[3]} of {frames} frames"
        print(f"make_pairs: {kept} pairs, {given}")
    run.finish(files if group.main else [], window=window, frames=frames)


if __name__ == "__main__":
    common.run(main, Config, __doc__)

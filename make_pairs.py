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

In    a model folder, a finished continuation.py folder, shards of prepare.py
Out   shards with `chosen` and `rejected` (C, F, H, W), text states, and for each pair id, caption, n1, n2
Cost  nfe forwards a continuation, twice that with guidance, two continuations a clip (one where N2 = F)
"""

import dataclasses
import math
from pathlib import Path

import torch

import common
import cost
import data
import flow
import model
from common import UserError

PRESETS = {  # tiny: see README; 1.3b, 14b: the paper's numbers, as its readers report them, and Wan's sampler settings
    "tiny": dict(nfe=12, t_shift=4.0, guidance=1.0, shard_size=64),
    "1.3b": dict(nfe=50, t_shift=5.0, guidance=5.0, shard_size=8),
    "14b": dict(nfe=50, t_shift=5.0, guidance=5.0, shard_size=4),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Stage 2: samples the winner and the loser of every clip."""

    preset: str = "tiny"  # tiny, 1.3b or 14b: what every option that is not given stands at
    base: str = "out/demo/base"  # model folder
    continuation: str = "out/demo/continuation"  # folder of continuation.py
    data: str = "out/demo/shards"  # shards of prepare.py
    split: str = "align"  # which clips: train, align or eval
    out: str = "out/demo/pairs"  # folder to write
    pairs: int = 0  # number of pairs, one a clip; 0: every clip of the split
    n1_min: int | None = None  # fewest given frames of a loser, in latent frames; not given: 1
    n1_max: int | None = None  # most given frames of a loser; not given: 60 % of the clip, rounded down
    n2_min: int | None = None  # fewest given frames of a winner; not given: 80 % of the clip, rounded up
    n2_max: int | None = None  # most given frames of a winner; not given: all of them
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


def dry_run(cfg) -> None:
    """Prints what it will cost: a winner given whole is not sampled."""
    shape, found = cost.latents(cfg.preset, cfg.data, "prepare.py", cfg.split)
    low, high = windows(cfg, shape[1])[2:]
    continuations = 2 - (high == shape[1]) / (high - low + 1)
    count = cfg.pairs or found or cost.CLIPS
    cost.sampling("make_pairs", cfg.preset, shape, count * continuations, cfg.nfe, cfg.guidance, cfg.shard_size, True)


def main(cfg: Config) -> None:
    # ---- what to do, checked before anything is loaded
    cfg = common.resolve(cfg, PRESETS)
    if cfg.dry_run:
        return dry_run(cfg)
    group = common.start_group()
    run = common.Run(cfg, "make_pairs", group, {"data": cfg.data, "base": cfg.base, "continuation": cfg.continuation})
    if run.done:
        return
    common.read_manifest(cfg.continuation, "continuation.py")
    clips = data.Shards(cfg.data, "prepare.py", cfg.split, verify=group.main)
    frames = clips.shape("x0")[1]
    window = windows(cfg, frames)
    count = cfg.pairs or len(clips)
    if count > len(clips):
        raise UserError(f"--pairs: expected at most {len(clips)}, the clips of split {cfg.split!r}, got {cfg.pairs}")
    dtype = torch.bfloat16 if group.device.type == "cuda" else torch.float32
    net = model.load_continuation(cfg.base, cfg.continuation, dtype, group.device)
    model.check_preset(net, cfg.preset, cfg.base)
    negative = common.read_tensors(Path(cfg.data) / "negative.safetensors")["text"] if cfg.guidance != 1 else None

    # ---- sample, a shard at a time; shards that an earlier run finished are kept
    starts = list(range(0, count, cfg.shard_size))
    bar = run.progress(len(starts[group.rank :: group.size]), unit="shard")
    for k in range(group.rank, len(starts), group.size):
        if not data.shard_is_whole(run.folder, k):
            index = list(range(starts[k], min(starts[k] + cfg.shard_size, count)))
            x0, text = clips.get("x0", index).float(), clips.text(index)
            lengths = [draw_lengths(cfg.seed, clips.rows[i]["id"], window) for i in index]
            keys = [("pair", cfg.seed, clips.rows[i]["id"]) for i in index]
            x0, text = x0.to(group.device), text.to(group.device)
            rejected, chosen = (
                continue_clips(net, x0, text, torch.tensor(n), keys, cfg, negative).cpu() for n in zip(*lengths)
            )
            rows = [
                {"id": clips.rows[i]["id"], "caption": clips.rows[i]["caption"], "n1": n1, "n2": n2, "seed": cfg.seed}
                for i, (n1, n2) in zip(index, lengths)
            ]
            fields = {"chosen": list(chosen), "rejected": list(rejected)}
            data.write_shard(run.folder, k, rows, fields, clips.states(index), [])
        bar.update()
    bar.close()

    # ---- result
    group.barrier()
    if group.main:
        files, kept, _ = data.collect(run.folder, len(starts), [])
        given = f"loser given {window[0]}..{window[1]}, winner {window[2]}..{window[3]} of {frames} frames"
        print(f"make_pairs: {kept} pairs, {given}")
    run.finish(files if group.main else [], window=window, frames=frames)


if __name__ == "__main__":
    common.run(main, Config, __doc__)

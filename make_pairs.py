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

Both continuations of a clip start from the same noise, so a pair differs by the number of given frames only. A pair is
a function of (clip, N1, N2, seed), up to rounding. Everything stays in latents: nothing is decoded and encoded again.

In    a model folder, shards of prepare.py, a finished continuation.py folder or none
Out   shards with `chosen` and `rejected` (C, F, H, W), text states, and for each pair id, caption, n1, n2
Cost  nfe forwards a continuation, and one more for each step with guidance. With prefix attention they run on the
      frames to make alone: given frames, as text, are computed once a clip (model.Continuation). docs/performance.md
      has what that saves, and what fewer steps do to pairs
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import torch

import flow
import model
from kernels.modulate import implementation
from runtime.files import read_manifest
from runtime.group import place, start_group
from runtime.options import SEED, Diverged, UserError, option, program, resolve, user_errors
from runtime.run import Run
from runtime.shards import Shards, check_codec, codec_of, collect, unfinished, write_shard
from wan.experts import bases, each, load_networks
from wan.lora import lora_files

# Shift and guidance are Wan's own; steps and interval were chosen, as no reader reports them. Wan's own, 50 steps with
# guidance in each (--nfe 50 --guidance_low 0 --guidance_high 1), cost eight times as much, and in the tiny world they
# teach no better (docs/performance.md). Nobody has compared the two at Wan's size.
WAN = dict(nfe=7, t_shift=5.0, guidance=5.0, guidance_low=0.75, guidance_high=0.95)
PRESETS = {
    "tiny": dict(nfe=4, t_shift=4.0, guidance=1.0, guidance_low=0.0, guidance_high=1.0, shard_size=256),
    "1.3b": WAN | dict(shard_size=8),
    "14b": WAN | dict(shard_size=3),
    "a14b": WAN | dict(shard_size=3, t_shift=12.0, guidance=4.0),  # Wan2.2's own, the guidance that of high noise
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Stage 2: samples the two sides of every clip's pair."""

    preset: str = option("tiny", choices=tuple(PRESETS))  # sets every option that is not given
    base: str = "out/demo/base"  # model folder; a14b: the release's
    base_low: str = ""  # a14b: model folder of low noise, if --base is that of high noise alone
    lora: str = ""  # folders with lora.safetensors, or such files, separated by commas: on the base first
    lora_low: str = ""  # a14b: folders or files for low noise; --lora is for high noise
    continuation: str = option("out/demo/continuation", empty=True)  # folder of continuation.py; empty: the base itself
    continuation_low: str = ""  # a14b: folder of continuation.py for low noise
    data: str = "out/demo/shards"  # shards of prepare.py
    split: str = option("align", choices=("train", "align", "eval"))  # which clips
    out: str = option("out/demo/pairs", neutral=True)  # folder to write
    clips: int = option(0, least=0)  # number of clips; 0: every clip of the split
    n1_min: int | None = option(least=0)  # fewest given frames of a loser, in latent frames; not given: 1
    n1_max: int | None = option(least=0)  # most given frames of a loser; not given: 60 % of the clip, rounded down
    n2_min: int | None = option(least=0)  # fewest given frames of a winner; not given: 80 % of the clip, rounded up
    n2_max: int | None = option(least=0)  # most given frames of a winner; not given: all of them
    solver: str = option("unipc", choices=tuple(flow.SOLVERS))  # Wan's own; euler shrinks what it samples
    nfe: int | None = option(least=1, most=1000)  # solver steps
    t_shift: float | None = option(above=0)  # warp of the solver's times towards noise
    guidance: float | None = option(least=0)  # classifier-free guidance weight; 1: none
    guidance_low: float | None = option(least=0, most=1)  # guidance only at times above this: elsewhere half the price
    guidance_high: float | None = option(least=0, most=1)  # and only up to this
    shard_size: int | None = option(least=1)  # pairs a shard; the continuations of equal length are one batch
    plain: bool = False  # no savings, to compare with: whole forwards, even for clips given whole
    shard: bool = option(False, neutral=True)  # split the frozen weights over a node's processes: less memory
    compile: bool = option(False, neutral=True)  # torch.compile the network's blocks
    seed: int = option(0, **SEED)  # of N1, N2 and the noise


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


def guided_steps(cfg) -> int:
    """How many of the solver's steps have guidance."""
    times = flow.time_grid(cfg.nfe, cfg.t_shift)[1].tolist()
    return 0 if cfg.guidance == 1 else sum(cfg.guidance_low < t <= cfg.guidance_high for t in times)


def check(cfg) -> None:
    """UserError for guidance that no step would have."""
    if cfg.guidance != 1 and not guided_steps(cfg):
        got = f"{cfg.guidance_low} and {cfg.guidance_high} with --nfe {cfg.nfe}; for no guidance give --guidance 1"
        raise UserError(f"expected guidance_low < t <= guidance_high at one step or more, got {got}")


def draw_lengths(seed: int, clip: str, window: tuple[int, int, int, int]) -> tuple[int, int]:
    """N1 and N2 of a clip's pair, uniform on the windows."""
    low1, high1, low2, high2 = window
    g = flow.generator("lengths", seed, clip)
    return tuple(int(g.integers(low, high, endpoint=True)) for low, high in ((low1, high1), (low2, high2)))


def continue_clips(net, x0, text, n_cond, keys, cfg, negative=None):
    """Continues each clip x0 (B, C, F, H, W) from its first n_cond[i] frames. Returns (B, C, F, H, W).

    text (B, S, text_dim); keys: of the noise, one a clip; negative (S, text_dim): as in `flow.guided`. The given frames
    come out bit for bit. Clips given whole are not sampled; those given equally many frames are one batch, for which
    `model.Continuation` computes once what the solver's steps share. With cfg.plain, or cfg.shard, whose processes must
    call the network as often as each other, all clips are one batch of whole forwards.
    """
    if cfg.plain or cfg.shard:
        return solve(net, x0, text, torch.tensor(n_cond), keys, cfg, negative)
    made = x0.clone()
    for n in sorted({n for n in n_cond if n < x0.shape[2]}):
        some = [i for i, given in enumerate(n_cond) if given == n]
        clips, texts = x0[some], text[some]
        if cfg.guidance == 1:
            wrap = functools.partial(model.Continuation, x0=clips, text=texts, n=n)
        else:
            both = clips.repeat(2, 1, 1, 1, 1), flow.both_branches(texts, negative)
            wrap = functools.partial(model.Continuation, x0=both[0], text=both[1], n=n)
        phi = each(net, wrap)
        given = torch.full((len(some),), n)
        made[some] = solve(phi, clips, texts, given, [keys[i] for i in some], cfg, negative)
    return made


def solve(net, x0, text, n_cond, keys, cfg, negative=None):
    """One solver's run for a batch, as in `continue_clips`. n_cond (B,)."""
    cond_mask = (torch.arange(x0.shape[2]) < n_cond[:, None]).to(x0.device)
    noise = flow.draw_noise(x0.shape[1:], keys).to(x0.device)
    call = flow.guided(net, cfg.guidance, negative, cfg.guidance_low, cfg.guidance_high)
    levels = flow.time_grid(cfg.nfe, cfg.t_shift)
    return flow.SOLVERS[cfg.solver](call, noise, text, levels, x0, cond_mask)


def make_pair(net, x0, text, ids, cfg, window, negative=None):
    """Winner and loser of each clip x0 (B, C, F, H, W), from one noise: fields as x0, and each pair's N1 and N2."""
    lengths = [draw_lengths(cfg.seed, clip, window) for clip in ids]
    keys = [("pair", cfg.seed, clip) for clip in ids]
    rejected, chosen = (continue_clips(net, x0, text, n_cond, keys, cfg, negative) for n_cond in zip(*lengths))
    return {"chosen": chosen, "rejected": rejected}, [{"n1": n1, "n2": n2} for n1, n2 in lengths]


def read_clips(cfg) -> tuple[Shards, int]:
    """The clips of cfg.split, and how many of them get a pair. UserError if cfg.clips are more."""
    clips = Shards(cfg.data, "prepare.py", cfg.split)
    if cfg.clips > len(clips):
        raise UserError(f"--clips: expected at most {len(clips)}, the clips of split {cfg.split!r}, got {cfg.clips}")
    return clips, cfg.clips or len(clips)


def sample_shards(run: Run, clips: Shards, count: int, cfg, sample: Callable) -> tuple[list[str], int]:
    """Samples the pairs of the first `count` clips, shard by shard. Returns the folder's files, and how many pairs are
    finite and kept, on the first process.

    sample(x0 (B, C, F, H, W), text (B, S, text_dim), ids) -> fields and facts, as `make_pair` gives them. Diverged if
    no pair is finite.
    """
    device = run.group.device
    for k, index, own in unfinished(run, count, cfg.shard_size, "pair", cfg.shard):
        x0, text = clips.get("x0", index).float().to(device), clips.text(index).to(device)
        fields, facts = sample(x0, text, [clips.rows[i]["id"] for i in index])
        named = [{name: clips.rows[i][name] for name in ("id", "caption")} for i in index]
        rows = [{**names, **fact, "seed": cfg.seed} for names, fact in zip(named, facts)]
        if own:
            write_shard(run.folder, k, rows, fields, clips.states(index), [])
    if not run.group.main:
        return [], 0
    files, kept, rejected = collect(run.folder, -(-count // cfg.shard_size), [])
    if not kept:
        raise Diverged(f"no pair of {count} is finite: the model that samples them has diverged; delete {run.folder}")
    if rejected:
        print(f"{run.stage}: left out {rejected} of {count} pairs that are not finite; see {run.folder}/rejects.jsonl")
    return files, kept


def main(cfg: Config) -> None:
    # ---- what to do, checked before anything is loaded
    cfg = resolve(cfg, PRESETS)
    check(cfg)
    bases(cfg)
    group = start_group(implementation)
    inputs = {name: getattr(cfg, name) for name in ("data", "base", "base_low", "continuation", "continuation_low")}
    inputs |= {name: lora_files(getattr(cfg, name)) for name in ("lora", "lora_low")}
    run = Run(cfg, "make_pairs", group, inputs)
    if run.done:
        return
    for folder in filter(None, (cfg.continuation, cfg.continuation_low)):
        read_manifest(folder, "continuation.py")
    clips, count = read_clips(cfg)
    check_codec(cfg.base, cfg.data, clips.manifest)
    shape = clips.shape("x0")
    window = windows(cfg, shape[1])
    dtype = torch.bfloat16 if group.device.type == "cuda" else torch.float32

    def finish(net: model.DiT, base: str) -> model.DiT:
        with user_errors():
            model.check_fits(net, cfg.preset, base, cfg.data, shape)
        return place(net, cfg, group)

    net = load_networks(cfg, dtype, group.device, finish)
    negative = clips.negative() if cfg.guidance != 1 else None

    # ---- sample
    call = functools.partial(make_pair, net, cfg=cfg, window=window, negative=negative)
    files, kept = sample_shards(run, clips, count, cfg, call)
    low1, high1, low2, high2 = window
    given = f"loser given {low1}..{high1}, winner {low2}..{high2} of {shape[1]} frames"
    run.finish(files, f"{kept:,} pairs", given, window=window, frames=shape[1], codec=codec_of(clips.manifest))


if __name__ == "__main__":
    program(main, Config, __doc__, PRESETS)

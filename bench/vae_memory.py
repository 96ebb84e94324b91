"""Peak memory of Wan2.1's VAE at its full size, random weights, 288x512, on a CPU. Prints a markdown table.

    python bench/vae_memory.py --frames 5 9 17      streaming: a latent frame at a time, as by default
    python bench/vae_memory.py --frames 5 --whole   the clip as one piece
    nohup nice -n 10 python bench/vae_memory.py &   49 frames: half an hour and more on two cores

Each measurement is a process of its own. "before" is with weights and input in place, and counts in the peak.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from wan import vae


def rss() -> float:
    """The most memory that this process ever held, GiB (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(direction: str, dtype: str, frames: int, whole: bool, threads: int) -> None:
    """One call in this process; prints GiB before, GiB at the peak, and seconds, as JSON."""
    torch.set_num_threads(threads)
    torch.set_default_dtype(getattr(torch, dtype))  # weights are made in it: a float32 copy would count in the peak
    net = vae.VAE()
    torch.set_default_dtype(torch.float32)
    x = torch.rand((1, 3, frames, 288, 512) if direction == "encode" else (1, 16, (frames - 1) // 4 + 1, 36, 64))
    before, start = rss(), time.perf_counter()
    out = getattr(net, direction)(2 * x - 1, streaming=not whole)
    assert out.isfinite().all()
    print(json.dumps([before, rss(), time.perf_counter() - start]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[49], help="pixel frames, 4k+1")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--direction", nargs="+", default=["encode", "decode"], choices=["encode", "decode"])
    parser.add_argument("--whole", action="store_true", help="the clip as one piece")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    cfg = parser.parse_args()
    if cfg.child:
        return measure(*json.loads(cfg.child))
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    print(f"{(names or ['CPU'])[0]}, {cfg.threads} threads, PyTorch {torch.__version__}, commit {commit}")
    print("\n| | frames | dtype | before, GiB | peak, GiB | seconds |\n|---|---|---|---|---|---|", flush=True)
    for frames in cfg.frames:
        for dtype in cfg.dtype:
            for direction in cfg.direction:
                job = json.dumps([direction, dtype, frames, cfg.whole, cfg.threads])
                child = subprocess.run([sys.executable, __file__, "--child", job], stdout=subprocess.PIPE, check=True)
                before, peak, seconds = json.loads(child.stdout)
                name = direction + cfg.whole * ", whole"
                print(f"| {name} | {frames} | {dtype} | {before:.2f} | {peak:.2f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()

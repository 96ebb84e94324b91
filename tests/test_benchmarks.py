"""evaluate.py's benchmark modes: folders that the benchmarks can read, and what is measured of any video."""

import csv
import json
import os
import shlex
import subprocess
import sys

import av
import numpy as np
import pytest
from helpers import contents, environment, script, stop_at

from experiments import benchmarks, evaluate, metrics
from runtime import run as common
from runtime import video
from runtime.run import UserError

A, B, C = "a red ball falls", "a blue ball, slowly; it's falling.", "a green ball floats"


def config(chain, out, **more) -> benchmarks.Config:
    given = dict(base=str(chain / "base"), data=str(chain / "shards"), out=str(out), nfe=1, samples=2)
    return benchmarks.Config(**given | more)


def lists(folder, **prompts: str) -> str:
    """Text files of prompts, as --vbench takes them."""
    folder.mkdir(exist_ok=True)
    for name, content in prompts.items():
        (folder / f"{name}.txt").write_text(content, encoding="utf-8")
    return ",".join(str(folder / f"{name}.txt") for name in prompts)


# ---- folders for benchmarks ------------------------------------------------------------------------------------------


def test_vbench(chain, tmp_path, monkeypatch):
    """Each prompt once, samples 0 and 1, 16 fps in the container, nothing beside the videos, the dimensions of the
    lists alone; cut short and run again, the same bytes. A prompt's video depends on no other prompt.
    """
    given = lists(tmp_path / "lists", scene=f"{A}\r\n {B} ", subject_consistency=f"{B}\n{C}\n\n")
    benchmarks.main(config(chain, tmp_path / "out", vbench=given))
    names = {f"{prompt}-{sample}.mp4" for prompt in (A, B, C) for sample in (0, 1)}
    assert set(os.listdir(tmp_path / "out/videos")) == names
    with av.open(str(tmp_path / f"out/videos/{B}-1.mp4")) as file:
        assert file.streams.video[0].average_rate == 16 and file.streams.video[0].frames == 49
    assert common.read_jsonl(tmp_path / "out/prompts.jsonl")[3] == {
        "video": f"videos/{B}-1.mp4",
        "prompt": B,
        "sample": 1,
        "seed": 0,
    }
    command = (tmp_path / "out/COMMAND.txt").read_text()
    words = ["--dimension", "background_consistency motion_smoothness dynamic_degree", "--videos_path"]
    assert shlex.split(command)[2:6] == [*words, str(tmp_path / "out/videos")] and command.count("\n") == 1
    again = config(chain, tmp_path / "cut", vbench=given)
    with stop_at(monkeypatch, video, "write_mp4", 3), pytest.raises(KeyboardInterrupt):
        benchmarks.main(again)
    (tmp_path / "cut/videos/.left by a kill.mp4.1.tmp").write_bytes(b"half")
    with stop_at(monkeypatch, video, "write_mp4", 3):  # just three are left to do
        benchmarks.main(again)
    same = [{k: v for k, v in contents(tmp_path / name).items() if k != "COMMAND.txt"} for name in ("out", "cut")]
    assert same[0] == same[1] and len(set(same[0].values())) == 7

    own = lists(tmp_path / "lists", mine=C)
    benchmarks.main(config(chain, tmp_path / "one", vbench=own, samples=1))
    assert contents(tmp_path / "one/videos") == {f"{C}-0.mp4": same[0][f"videos/{C}-0.mp4"]}
    command = (tmp_path / "one/COMMAND.txt").read_text()
    assert "--mode custom_input" in command and all(d in command for part in benchmarks.VBENCH.values() for d in part)


def test_vbench_from_its_folder(tmp_path):
    """The three lists of the paper's six dimensions, whatever else is there; one that is missing is named."""
    files = dict(scene="a", overall_consistency="b\na", subject_consistency="c", human_action="d")
    lists(tmp_path, **files)
    prompts, _, command = benchmarks.vbench(benchmarks.Config(vbench=str(tmp_path)), tmp_path)
    assert sorted(prompts) == ["a", "b", "c"] and "custom_input" not in command
    assert len(command.split("'")[1].split()) == 6
    (tmp_path / "scene.txt").unlink()
    with pytest.raises(UserError, match="scene.txt.*No such file"):
        benchmarks.vbench(benchmarks.Config(vbench=str(tmp_path)), tmp_path)


def test_phygenbench_and_videogen_eval(chain, tmp_path):
    """Numbers from 1 in the order of the table: a json list's captions; a csv's prompts, of several lines too. The
    command for VideoReward runs, and joins its scores to the rows.
    """
    (tmp_path / "prompts.json").write_text(json.dumps([dict(caption=p, physical_laws="x") for p in (A, B)]))
    benchmarks.main(config(chain, tmp_path / "p", phygenbench=str(tmp_path / "prompts.json")))
    assert [row["video"] for row in common.read_jsonl(tmp_path / "p/prompts.jsonl")] == [
        f"videos/sample-{sample}/output_video_{number}.mp4" for number in (1, 2) for sample in (0, 1)
    ]
    assert (tmp_path / "p/videos/sample-1/output_video_2.mp4").is_file()
    with open(tmp_path / "v.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["prompt", "prompt_zh"], [f"{A},\n{B}", "球"], [C, ""]])
    benchmarks.main(config(chain, tmp_path / "it's v", videogen_eval=str(tmp_path / "v.csv"), samples=1))
    made = common.read_jsonl(tmp_path / "it's v/prompts.jsonl")
    assert [(row["video"], row["prompt"]) for row in made] == [("videos/1-0.mp4", f"{A},\n{B}"), ("videos/2-0.mp4", C)]

    (tmp_path / "VideoAlign").mkdir()
    (tmp_path / "VideoAlign/inference.py").write_text(
        "class VideoVLMRewardInference:\n    def __init__(self, path, device, dtype): pass\n"
        "    def reward(self, videos, prompts): return [{'MQ': len(open(videos[0], 'rb').read()), 'of': prompts[0]}]\n"
    )
    path = environment(PATH=f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
    subprocess.run((tmp_path / "it's v/COMMAND.txt").read_text(), shell=True, cwd=tmp_path, env=path, check=True)
    scores = json.loads((tmp_path / "it's v/videoreward.json").read_text())
    sizes = [(tmp_path / "it's v" / row["video"]).stat().st_size for row in made]
    assert scores == [{**row, "MQ": size, "of": row["prompt"]} for row, size in zip(made, sizes)]


def test_two_processes(chain, tmp_path):
    """torchrun deals the videos out: the same folder, byte for byte; and measures them: the same table."""
    given = lists(tmp_path, scene=f"{A}\n{C}")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "experiments.evaluate")
    cfg, videos = config(chain, tmp_path / "one", vbench=given), str(tmp_path / "one/videos")
    benchmarks.main(cfg)
    metrics.main(metrics.Config(videos, str(tmp_path / "table one")))
    options = [f"--{name}={getattr(cfg, name)}" for name in ("vbench", "base", "data", "nfe", "samples")]
    for more in ([*options, f"--out={tmp_path}/two"], [f"--videos={videos}", f"--out={tmp_path}/table two"]):
        done = script(*torchrun, *more)
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "one/videos") == contents(tmp_path / "two/videos")
    assert contents(tmp_path / "table one") == contents(tmp_path / "table two")


@pytest.mark.parametrize(
    "option, name, content, words",
    [
        ("vbench", "scene.txt", "\n \n", "scene.txt: expected a prompt on each line, got none"),
        ("vbench", "scene.txt", "a cat\nhis and/or hers", "without '/'.*'his and/or hers'; VBench"),
        ("vbench", "scene.txt", "猫" * 90, "up to 240 bytes.*a name of 277 bytes.*猫"),
        ("videogen_eval", "v.csv", "id,text\n1,a cat\n", "expected a column prompt or caption, got id, text"),
        ("videogen_eval", "v.csv", "prompt\n", "expected a table with a prompt in each row, got none"),
        ("videogen_eval", "v.csv", "id,prompt\n1,a cat\n2\n", "row 2: expected a prompt in column prompt, got None"),
        ("phygenbench", "p.json", "[{", "p.json: expected a csv table or a json list, got"),
        ("phygenbench", "p.json", '{"caption": "a cat"}', "expected a table with a prompt in each row"),
        ("phygenbench", "nowhere.csv", None, "nowhere.csv.*No such file"),
    ],
)
def test_mistakes_are_named(chain, tmp_path, option, name, content, words):
    """One line, before anything is loaded or written."""
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=words) as caught:
        benchmarks.main(config(chain, tmp_path / "out", **{option: str(tmp_path / name)}))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_modes_do_not_mix(chain, tmp_path, monkeypatch):
    """The options of one mode are unknown to another, two benchmarks at once are refused, and so are names that a
    file system takes for one.
    """
    assert evaluate.mode(["--videogen-eval=x"]) is evaluate.mode(["--sft", "--vbench"]) is benchmarks
    assert evaluate.mode(["--out", "x", "--videos", "y"]) is metrics and evaluate.mode(["--sft", "x"]) is evaluate
    with pytest.raises(SystemExit):
        common.parse(benchmarks.Config, ["--vbench", "x", "--sft", "out/sft"], "")
    with pytest.raises(UserError, match="expected one of --vbench, .*, got vbench, phygenbench"):
        benchmarks.main(config(chain, tmp_path / "out", vbench="x", phygenbench="y"))
    benchmarks.check_names(["A cat", "a cat"])
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UserError, match="one for 'A cat' and 'a cat'"):
        benchmarks.check_names(["A cat", "a cat"])


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_by_hand():
    """Two alternating pictures: 60 levels of red in a quarter of the pixels, 10 of each colour in the rest."""
    frames = np.full((5, 8, 8, 3), 100, np.uint8)
    frames[1::2, :4, :4, 0] += 60
    frames[1::2, 4:], frames[1::2, :4, 4:] = 90, 90
    found = metrics.measure(frames, 25.0)
    assert found["flicker"] == pytest.approx((255 - (0.25 * 20 + 0.75 * 10)) / 255)
    assert found["difference"] == pytest.approx(25 * (0.25 * 0.299 * 60 + 0.75 * 10), rel=1e-5)
    still = metrics.measure(frames[:1].repeat(4, axis=0), 16.0)
    assert still["flicker"] == 1 and still["difference"] == 0


def moving(shifts: list[float]) -> np.ndarray:
    """Smooth noise of 96 px, moved to the right by so many pixels in all from frame to frame."""
    rng, x, y = np.random.default_rng(0), *np.meshgrid(np.arange(96), np.arange(96))
    waves = [(*rng.uniform(-0.35, 0.35, 2), rng.uniform(0, 7)) for _ in range(24)]
    made = [sum(np.sin(a * (x - shift) + b * y + c) for a, b, c in waves) for shift in np.cumsum([0, *shifts])]
    return (127 + 12 * np.array(made)).clip(0, 255).astype(np.uint8)


def test_optical_flow(monkeypatch):
    """A pattern that moves by 2 px a frame: flow 2, no change; to and fro: a change of 4; unsteady: between them. The
    change is a point's own: where the flow is x/10, the point goes on to 1.1 x and has changed by x/100.
    """
    cv2 = pytest.importorskip("cv2", reason="needs OpenCV: pip install -r requirements-dev.txt")
    steady, unsteady, turning = (metrics.flow(moving(s)) for s in ([2] * 7, [1, 3, 2, 1, 3, 1, 3], [2, -2] * 4))
    assert steady["flow"] == pytest.approx(2, rel=0.1) and turning["flow"] == pytest.approx(2, rel=0.1)
    assert 3 * steady["flow_change"] < unsteady["flow_change"] < turning["flow_change"] == pytest.approx(4, rel=0.15)
    assert metrics.flow(moving([0, 0]))["flow_change"] < 1e-3 and "flow_change" not in metrics.flow(moving([1]))
    field = np.dstack([np.tile(np.arange(96) / 10, (96, 1)), np.zeros((96, 96))]).astype(np.float32)
    monkeypatch.setattr(cv2, "calcOpticalFlowFarneback", lambda *_: field)
    stays = np.arange(96)[np.arange(96) * 1.1 <= 95]
    assert metrics.flow(moving([0, 0])) == pytest.approx({"flow": 4.75, "flow_change": stays.mean() / 100}, rel=1e-2)


def test_a_folder_of_videos(tmp_path, monkeypatch, capsys):
    """Any length, size and rate, a picture that stands still too; without OpenCV one line says what is missing. One
    broken file: named, the others are in the table, and there is no mean.
    """
    monkeypatch.setitem(sys.modules, "cv2", None)
    (tmp_path / "v/below").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 255, (5, 32, 48, 3), np.uint8)
    video.write_mp4(tmp_path / "v/still.mp4", np.full((60, 32, 48, 3), 90, np.uint8))
    video.write_mp4(tmp_path / "v/below/noise.mp4", noise, fps=25)
    metrics.main(metrics.Config(str(tmp_path / "v"), str(tmp_path / "out")))
    table = list(csv.DictReader((tmp_path / "out/metrics.csv").open()))
    facts = [tuple(row[k] for k in metrics.FACTS) for row in table]
    assert facts == [("below/noise.mp4", "5", "32", "48", "25.0"), ("still.mp4", "60", "32", "48", "16.0")]
    assert float(table[1]["flicker"]) == 1 and float(table[1]["difference"]) == 0 and table[1]["flow"] == ""
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    a, b = (float(row["flicker"]) for row in table)
    assert summary["flicker"] == {"mean": (a + b) / 2, "sd": pytest.approx(abs(a - b) / 2**0.5), "count": 2}
    assert "flow" not in summary and capsys.readouterr().out.count("OpenCV") == 1

    with stop_at(monkeypatch, metrics, "row_of", 1):  # one and the other: what was measured is kept
        with pytest.raises(KeyboardInterrupt):
            metrics.main(metrics.Config(str(tmp_path / "v"), str(tmp_path / "cut")))
    with stop_at(monkeypatch, metrics, "row_of", 1):
        metrics.main(metrics.Config(str(tmp_path / "v"), str(tmp_path / "cut")))
    assert contents(tmp_path / "cut") == contents(tmp_path / "out")

    (tmp_path / "v/broken.mp4").write_bytes((tmp_path / "v/still.mp4").read_bytes()[:-300])
    with pytest.raises(UserError, match="1 of 3 videos cannot be measured, first broken.mp4: ") as caught:
        metrics.main(metrics.Config(str(tmp_path / "v"), str(tmp_path / "second")))
    assert "\n" not in str(caught.value) and not (tmp_path / "second/summary.json").exists()
    table = list(csv.DictReader((tmp_path / "second/metrics.csv").open()))
    assert [bool(row["error"]) for row in table] == [False, True, False] and table[2]["flicker"] == "1.0"
    (tmp_path / "empty").mkdir()
    for name, got in (("empty", "none"), ("nowhere", "no such folder"), ("v/still.mp4", "a file")):
        with pytest.raises(UserError, match=f"expected a folder with mp4 files, got {got}"):
            metrics.main(metrics.Config(str(tmp_path / name), str(tmp_path / "third")))
    with pytest.raises(UserError, match="--out: expected a folder outside of --videos"):
        metrics.main(metrics.Config(str(tmp_path / "v"), str(tmp_path / "v/out")))

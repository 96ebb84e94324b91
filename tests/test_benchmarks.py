"""experiments.benchmarks: folders that the benchmarks can read."""

import csv
import dataclasses
import json
import os
import shlex
import subprocess
import sys

import av
import pytest
from helpers import contents, environment, script, stop_at

from experiments import benchmarks
from runtime import video
from runtime.files import read_jsonl
from runtime.options import UserError

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
    assert read_jsonl(tmp_path / "out/prompts.jsonl")[3] == {
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
    with stop_at(monkeypatch, video, "write_mp4", 3):  # just three are left to do, however the lists are spelled
        benchmarks.main(dataclasses.replace(again, vbench=given.replace("/lists/", "/./lists/")))
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
    with pytest.raises(UserError, match="scene.txt.*no such file"):
        benchmarks.vbench(benchmarks.Config(vbench=str(tmp_path)), tmp_path)


def test_phygenbench_and_videogen_eval(chain, tmp_path):
    """Numbers from 1 in the order of the table: a json list's captions; a csv's prompts, of several lines too. The
    command for VideoReward runs, and joins its scores to the rows.
    """
    (tmp_path / "p.JSON").write_text(json.dumps([dict(caption=p, physical_laws="x") for p in (A, B)]))
    benchmarks.main(config(chain, tmp_path / "p", phygenbench=str(tmp_path / "p.JSON")))
    assert [row["video"] for row in read_jsonl(tmp_path / "p/prompts.jsonl")] == [
        f"videos/sample-{sample}/output_video_{number}.mp4" for number in (1, 2) for sample in (0, 1)
    ]
    assert (tmp_path / "p/videos/sample-1/output_video_2.mp4").is_file()
    with open(tmp_path / "v.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["prompt", "prompt_zh"], [f"{A},\n{B}", "球"], [C, ""]])
    benchmarks.main(config(chain, tmp_path / "it's v", videogen_eval=str(tmp_path / "v.csv"), samples=1))
    made = read_jsonl(tmp_path / "it's v/prompts.jsonl")
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
    """torchrun's processes share the videos: the same folder, byte for byte."""
    cfg = config(chain, tmp_path / "one", vbench=lists(tmp_path, scene=f"{A}\n{C}"))
    benchmarks.main(cfg)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "experiments.benchmarks")
    options = [f"--{name}={getattr(cfg, name)}" for name in ("vbench", "base", "data", "nfe", "samples")]
    done = script(*torchrun, *options, f"--out={tmp_path}/two")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "one/videos") == contents(tmp_path / "two/videos")


@pytest.mark.parametrize(
    "option, name, content, words",
    [
        ("vbench", "scene.txt", "\n \n", "scene.txt: expected a prompt on each line, got none"),
        ("vbench", "scene.txt", "a cat\nhis and/or hers", "without '/', got 'his and/or hers'"),
        ("vbench", "scene.txt", "猫" * 90, "up to 240 bytes.*猫' and 277 bytes"),
        ("videogen_eval", "v.csv", "id,text\n1,a cat\n", "row 1: expected a text in its column prompt or"),
        ("videogen_eval", "v.csv", "prompt\n", "expected a table with a prompt in each row, got none"),
        ("videogen_eval", "v.csv", "id,prompt\n1,a cat\n2,\n", "row 2: expected a text in its column prompt or"),
        ("phygenbench", "p.json", "[{", "p.json: expected JSON, got damaged text"),
        ("phygenbench", "p.json", '{"caption": "a cat"}', "expected a table with a prompt in each row"),
        ("phygenbench", "p.json", r'[{"caption": "a \ud800 cat"}]', "row 1: expected a text in its column prompt or"),
        ("phygenbench", "nowhere.csv", None, "nowhere.csv.*[Nn]o such file"),
    ],
)
def test_mistakes_are_named(chain, tmp_path, option, name, content, words):
    """One line, before anything is loaded or written."""
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=words) as caught:
        benchmarks.main(config(chain, tmp_path / "out", **{option: str(tmp_path / name)}))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_one_benchmark_at_a_time(chain, tmp_path):
    with pytest.raises(UserError, match="expected one of --vbench, .*, got vbench, phygenbench"):
        benchmarks.main(config(chain, tmp_path / "out", vbench="x", phygenbench="y"))

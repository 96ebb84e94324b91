"""sample.py and experiments.decode: prompts, first frames where they are given, and stored latents to mp4 files."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import contents, flip_bit, run_stage, some_clips, stop_at

import sample
from experiments import decode
from runtime import video
from runtime.options import Diverged, UserError
from runtime.shards import Shards
from tiny import codec as codecs


def config(chain, out, **more):
    return sample.Config(base=str(chain / "base"), data=str(chain / "shards"), out=str(out), nfe=2, **more)


def test_prompts_become_mp4_files(chain, tmp_path):
    """Each prompt's samples, 49 frames of 64 px; other noise is another video."""
    (tmp_path / "prompts.txt").write_text("a red ball falls\na green ball floats\n")
    more = dict(prompts=str(tmp_path / "prompts.txt"), samples=2, lora=f"{chain / 'sft'},{chain / 'asymdpo'}")
    sample.main(config(chain, tmp_path / "a", **more))
    names = sorted(p.name for p in (tmp_path / "a").glob("*.mp4"))
    assert names == ["0-0.mp4", "0-1.mp4", "1-0.mp4", "1-1.mp4"]
    clips = [video.read_clip(tmp_path / "a" / name, None) for name in names]
    assert clips[0].shape == (49, 64, 64, 3) and not np.array_equal(clips[0], clips[1])


def test_an_interrupted_run_goes_on(chain, tmp_path, monkeypatch):
    """Stopped after one of three videos, and again: the rest is made, the same bytes, and what was damaged meanwhile.
    Another prompt is another run.
    """
    more = dict(prompt="a red ball falls", samples=3)
    sample.main(config(chain, tmp_path / "straight", **more))
    for _ in range(2):
        with stop_at(monkeypatch, video, "write_mp4", 1), pytest.raises(KeyboardInterrupt):
            sample.main(config(chain, tmp_path / "cut", **more))
    assert sorted(p.name for p in (tmp_path / "cut").glob("*.mp4")) == ["0-0.mp4", "0-1.mp4"]
    flip_bit(tmp_path / "cut/0-0.mp4")
    with stop_at(monkeypatch, video, "write_mp4", 2):  # the damaged one and the third
        sample.main(config(chain, tmp_path / "cut", **more))
    assert contents(tmp_path / "cut") == contents(tmp_path / "straight")
    with pytest.raises(UserError, match="was made with"):
        sample.main(config(chain, tmp_path / "cut", prompt="another"))


def test_spelling_is_not_another_run(chain, tmp_path, monkeypatch, capsys):
    """The same base, data, LoRAs and prompts: by other paths, or in another file."""
    monkeypatch.chdir(chain)
    for name in ("one", "two"):
        (tmp_path / name).write_text("a red ball falls\n")
    spelled = dict(base="base", data="shards", lora="sft,asymdpo", prompts=f"{tmp_path}/one")
    again = dict(base="./base/", data=str(chain / "shards"), lora=f"./sft/,{chain}/asymdpo/lora.safetensors")
    for words in (spelled, again | {"prompts": f"{tmp_path}/two"}):
        sample.main(dataclasses.replace(config(chain, tmp_path / "out"), **words))
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(UserError, match="was made with inputs lora"):
        sample.main(dataclasses.replace(config(chain, tmp_path / "out"), **spelled | {"lora": "sft"}))


def test_a_line_is_a_prompt(tmp_path):
    """Whatever else ends a line in Unicode, and without a byte order mark."""
    (tmp_path / "prompts.txt").write_bytes("\ufeffa ball\u2028falls\r\na\x85b\x0cc".encode())
    assert sample.read_prompts(str(tmp_path / "prompts.txt")) == ["a ball\u2028falls", "a\x85b\x0cc"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_no_video_of_what_is_not_finite(value, chain, tmp_path, monkeypatch):
    """Prompt and seed are named, the folder is unfinished, and no file passes for a video."""
    solve = sample.flow.SOLVERS["euler"]
    monkeypatch.setitem(sample.flow.SOLVERS, "euler", lambda *args: solve(*args).index_fill(2, torch.tensor(3), value))
    with pytest.raises(Diverged, match="0-0.mp4, 'a red ball' with --seed 7, is not written"):
        sample.main(config(chain, tmp_path / "out", prompt="a red ball", seed=7, solver="euler"))
    assert not list((tmp_path / "out").glob("*.mp4")) and not (tmp_path / "out/MANIFEST.json").exists()


@pytest.mark.parametrize("n_cond, lora", [(1, ""), (4, "sft")])
def test_given_frames_are_shown_as_they_are(chain, tmp_path, n_cond, lora):
    """The first 1 + 4(n − 1) pictures are the given ones, as the codec and H.264 show them; the rest is not."""
    given = sorted((chain / "clips").glob("*.mp4"))[0]
    more = dict(continuation=str(chain / "continuation"), video=str(given), n_cond=n_cond)
    more |= dict(prompt="a red ball falls", lora=lora and str(chain / lora))
    sample.main(config(chain, tmp_path, **more))
    made, real = video.read_clip(tmp_path / "0-0.mp4", 49), video.read_clip(given, 49)
    codec = codecs.load(chain / "shards")
    coded = video.to_frames(codec.decode(codec.encode(video.to_pixels(real)[None]))[0])
    difference = np.abs(made.astype(int) - coded).mean(axis=(1, 2, 3))
    first = 1 + 4 * (n_cond - 1)
    assert difference[:first].max() < 3 < difference[first:].min()


def test_several_patches_a_frame_go_through_the_chain(chain, tmp_path):
    """prepare, sft and sample at 128 × 64 px: a clip of the balls is one patch, other clips are not."""
    videos = some_clips(chain, tmp_path / "clips", 5)
    size = dict(height=128, width=64)
    data = run_stage(chain, "shards", videos=videos, out=tmp_path / "data", train=1.0, align=0.0, **size)
    assert Shards(data, "prepare.py").shape("x0") == (28, 13, 2, 1)
    base = run_stage(chain, "base", data=data, out=tmp_path / "base")
    cfg = config(chain, tmp_path / "out", prompt="a ball falls", **size)
    sample.main(dataclasses.replace(cfg, base=str(base), data=str(data)))
    assert video.read_clip(tmp_path / "out" / "0-0.mp4", None).shape == (49, 128, 64, 3)
    codec, x0 = codecs.load(data), Shards(data, "prepare.py").get("x0", [0])
    upper, lower = codec.decode(x0[:, :, :, :1]), codec.decode(x0[:, :, :, 1:])  # rows are rows, not columns
    assert torch.allclose(codec.decode(x0), torch.cat([upper, lower], dim=3), atol=1e-5)
    assert not torch.allclose(upper, lower, atol=0.1)


@pytest.mark.parametrize(
    "more, words",
    [
        (dict(prompt=" "), "--prompt: expected text, got .* blank"),
        (dict(prompts="nowhere.txt"), "nowhere.txt: expected a text file, got no such file"),
        (dict(prompt="a", video="x.mp4"), "--continuation: expected it with --video x.mp4, got nothing"),
        (dict(prompt="a", frames=48), "4k"),
        (dict(prompt="a", frames=53), "at most 13 latent frames for this model, got 14: lower --frames"),
        (dict(prompt="a", lora="nowhere"), "no such file"),
        (
            dict(prompt="a", continuation="nowhere", video="nowhere.mp4"),
            "--video: nowhere.mp4: expected a file, got no such file",
        ),
        (
            dict(prompt="a", continuation="nowhere", video=__file__, n_cond=13),
            "--n_cond: expected at most 12, .* got 13",
        ),
        (dict(prompts=__file__.replace("test_sample.py", "golden/vae.safetensors")), "expected UTF-8 text"),
    ],
)
def test_mistakes_are_named(chain, tmp_path, more, words):
    with pytest.raises(UserError, match=words):
        sample.main(config(chain, tmp_path, **more))
    assert not any(tmp_path.iterdir())


def test_stored_clips_are_decoded_by_their_own_codec(chain, tmp_path):
    """The codec that the shards were made with, whatever --data says; a file for each clip. Mistakes are named."""
    cfg = decode.Config(shards=str(chain / "shards"), data="nowhere", clips=4, out=str(tmp_path / "out"))
    decode.main(cfg)
    made = sorted((tmp_path / "out").glob("*.mp4"))
    assert len(made) == 4
    true = video.read_clip(sorted((chain / "clips").glob("*.mp4"))[0], 49)
    assert np.abs(video.read_clip(made[0], 49).astype(int) - true).mean() < 5
    for more, words in (
        (dict(segments=14), "at most 13, the number of latent"),
        (dict(preset="2b"), "--preset: expected"),
    ):
        with pytest.raises(UserError, match=words):
            decode.main(dataclasses.replace(cfg, out=str(tmp_path / "other"), **more))
    assert not (tmp_path / "other").exists()

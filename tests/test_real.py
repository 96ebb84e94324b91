"""All stages on Wan2.1's layout: small random weights in the release's files, real clips, as a user runs them."""

import numpy as np
import pytest
import torch
from helpers import metrics, real_clips, script, wan_folder

import continuation
import prepare
import sft
from experiments import decode
from runtime import video
from runtime.files import read_tensors
from runtime.options import UserError
from runtime.shards import Shards
from wan import text, vae

SIZE = dict(frames=9, height=32, width=48)
LITTLE = ("--steps", "1", "--rank", "4", "--batch_size", "2", "--warmup", "1")


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """A release's folder, and shards made of real clips with it."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("real")
    wan_folder(root / "Wan2.1")
    (root / "clips").mkdir()
    for name, path in real_clips().items():
        (root / "clips" / path.name).write_bytes(path.read_bytes())
        (root / "clips" / f"{name}.txt").write_text(f"the ball of {name}")
    prepare.main(config(root, "shards", clips=2, train=0.0, align=1.0, shard_size=2))
    return root


def config(root, out: str, **changes) -> prepare.Config:
    """prepare.py on the clips in root."""
    folders = dict(base=str(root / "Wan2.1"), videos=str(root / "clips"), out=str(root / out))
    return prepare.Config("1.3b", **{**folders, **SIZE, "fps": 8, "workers": 1, **changes})


def test_prepare_stores_what_wans_parts_make(wan):
    """Latents of the clip that was read, text states of its caption, the negative prompt's; 16 channels, 8 px."""
    shards = Shards(wan / "shards", "prepare.py", "align")
    assert len(shards) == 2 * len(real_clips()) and shards.shape("x0") == (16, 3, 4, 6)
    codec, encoder = vae.load_vae(wan / "Wan2.1"), text.TextEncoder(wan / "Wan2.1")
    with video.Decoder() as decoder:
        for i, row in enumerate(shards.rows):
            clips = decoder.read(wan / "clips" / row["video"], 9, (32, 48), 8, clips=2)
            found = next(clip for clip in clips if clip.start == row["start"])
            assert torch.equal(shards.get("x0", [i]), codec.encode(video.to_pixels(found.frames)[None]))
            states = shards.states([i])[0]
            assert torch.equal(states, encoder.encode([row["caption"]])[0]) and states.dtype == torch.bfloat16
    negative = read_tensors(wan / "shards/negative.safetensors")["text"]
    assert torch.equal(negative, encoder.encode([text.NEGATIVE])[0])


def test_stored_clips_come_back_as_mp4(wan):
    """experiments.decode: the codec's view of each clip, at the rate that it was read at."""
    look, base = str(wan / "look"), str(wan / "Wan2.1")
    decode.main(decode.Config("1.3b", shards=str(wan / "shards"), base=base, clips=3, out=look))
    shards = Shards(wan / "shards", "prepare.py")
    some = [0, round((len(shards) - 1) / 2), len(shards) - 1]
    names = {f"{i:05d}-{shards.rows[i]['id']}.mp4": i for i in some}
    assert {path.name for path in (wan / "look").glob("*.mp4")} == names.keys() and len(names) == 3
    codec = vae.load_vae(wan / "Wan2.1")
    for name, i in names.items():
        made = video.read_clip(wan / "look" / name, None, fps=8)
        expected = video.to_frames(codec.decode(shards.get("x0", [i]))[0])
        # random weights make coloured noise, which H.264 drops: its light and dark stay
        assert np.corrcoef(made.mean(axis=3).ravel(), expected.mean(axis=3).ravel())[0, 1] > 0.9


def test_every_stage_to_an_aligned_lora(wan):
    """README's command lines, one after the other, from the shards to videos of the aligned model."""
    at = {name: str(wan / name) for name in ("shards", "sft", "continuation", "pairs", "asymdpo", "samples", "both")}
    base = ("--preset", "1.3b", "--base", str(wan / "Wan2.1"))
    lora = f"{at['sft']},{at['asymdpo']}"
    commands = [
        ("sft.py", *base, "--data", at["shards"], "--split", "align", "--out", at["sft"], *LITTLE),
        ("continuation.py", *base, "--data", at["shards"], "--split", "align", "--out", at["continuation"], *LITTLE),
        ("make_pairs.py", *base, "--continuation", at["continuation"], "--data", at["shards"], "--out", at["pairs"],
         "--nfe", "2", "--n1_max", "1", "--n2_min", "2"),
        ("asymdpo.py", *base, "--sft", at["sft"], "--pairs", at["pairs"], "--out", at["asymdpo"], *LITTLE,
         "--steps", "8"),
        ("sample.py", *base, "--prompt", "a red ball falls", "--lora", lora, "--out", at["samples"], "--nfe", "2",
         "--frames", "9", "--height", "32", "--width", "48"),
        ("-m", "experiments.decode", *base, "--shards", at["pairs"], "--clips", "1", "--out", at["both"]),
    ]  # fmt: skip
    for command in commands:
        done = script(*command)
        assert done.returncode == 0, (command[0], done.stderr)
        repeats = command[0] == "asymdpo.py"  # 16 pairs, of no more than ten
        assert ("but once in the paper; for one epoch give --steps" in done.stderr) == repeats
    assert video.read_clip(f"{at['samples']}/0-0.mp4", None).shape == (9, 32, 48, 3)
    assert {p.name.rsplit("-", 1)[1] for p in (wan / "both").glob("*.mp4")} == {"chosen.mp4", "rejected.mp4"}
    assert metrics(wan / "asymdpo")[0]["S"] == 0


def test_nothing_to_keep_is_an_error(wan, capsys):
    """Said with the reasons, and never taken for a finished folder."""
    with pytest.raises(UserError, match="every one was rejected"):
        prepare.main(config(wan, "none", min_motion=200.0))
    assert f" {len(real_clips())}  motion score … is below --min_motion …\n" in capsys.readouterr().out
    assert not (wan / "none" / "MANIFEST.json").exists()


def test_a_preset_forgotten_is_named(wan):
    """It would be another method, silently."""
    options = dict(base=str(wan / "Wan2.1"), data=str(wan / "shards"), split="align", steps=1)
    for stage in (sft, continuation):
        with pytest.raises(UserError, match="--preset tiny is for models of 28 channels, .* has 16"):
            stage.main(stage.Config(out=str(wan / f"forgotten-{stage.__name__}"), **options))


@pytest.mark.parametrize(
    "more, words",
    [
        (dict(base=""), "--preset 1.3b needs --base"),
        (dict(height=40), "expected multiples of 16, got 40"),
        (dict(base="nowhere"), "nowhere: expected a folder or a file"),
        (dict(train=0.7, align=0.4), "shares that add up to at most 1"),
    ],
)
def test_mistakes_are_named(wan, more, words):
    with pytest.raises(UserError, match=words):
        prepare.main(config(wan, "bad", **more))

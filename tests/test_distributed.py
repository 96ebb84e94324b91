"""Two and four processes with gloo against one: the same global batch gives the same result."""

import pytest
from helpers import ROOT, contents, metrics, run_stage, script
from safetensors.torch import load_file

TRAINING = dict(steps=4, micro_batch=2, save_every=2)  # micro_batch: forwards of equal size
CODE = f"""
import os
import sys
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from helpers import run_stage
chain, out = map(Path, sys.argv[1:])
"""


def torchrun(chain, out, processes: int, lines: str):
    """Runs `lines` of Python, with run_stage, chain and out, in several processes. Returns the folder out."""
    (out / "stages.py").write_text(CODE + lines)
    start = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)
    done = script(*start, str(out / "stages.py"), str(chain), str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def two(chain, tmp_path_factory):
    """The folder in which two processes of one torchrun wrote three stages."""
    lines = f"""
for name, changes in (("shards", {{}}), ("pairs", {{}}), ("asymdpo", {TRAINING})):
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
    """asymdpo: two processes log the losses of one and end in its LoRA."""
    assert same_training(one, two / "asymdpo", 1e-6)


@pytest.mark.parametrize("processes, node", [(2, 2), (4, 2)])
def test_training_on_sharded_weights(processes, node, one, chain, tmp_path):
    """The frozen weights split over a node of two processes, on one node and on two: one process's LoRA.

    With recomputed activations. Only what is trained is whole, so checkpoints and the gradients' sum are as without.
    """
    changes = TRAINING | dict(micro_batch=0, checkpointing=True, shard=True)
    lines = f"""
os.environ["LOCAL_WORLD_SIZE"] = "{node}"
import asymdpo, runtime.group
def seen(net, cfg, group):
    full = sum(p.numel() for p in net.parameters() if not p.requires_grad)
    net = runtime.group.place(net, cfg, group)
    own = sum(p.to_local().numel() for p in net.parameters() if not p.requires_grad)
    assert own < 0.6 * full, (own, full)
    return net
asymdpo.place = seen
run_stage(chain, "asymdpo", out=out / "asymdpo", **{changes})
"""
    assert same_training(one, torchrun(chain, tmp_path, processes, lines) / "asymdpo", 1e-5)


@pytest.mark.parametrize("name", ["shards", "pairs"])
def test_shards_on_two_processes(name, chain, two):
    """Dealt to two processes they are those of one, byte for byte; so are rejects and contact sheets."""
    assert contents(two / name) == contents(chain / name)
    assert (two / name / "shard-00001.safetensors").exists()  # more than one shard, so both had work

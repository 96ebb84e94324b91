"""Two processes with gloo against one: the same global batch gives the same result."""

import pytest
from helpers import ROOT, contents, metrics, run_stage, script
from safetensors.torch import load_file

TRAINING = dict(steps=4, micro_batch=2, save_every=2)  # micro_batch: forwards of equal size
CODE = f"""
import sys
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from helpers import run_stage
chain, out = map(Path, sys.argv[1:])
for name, changes in (("shards", {{}}), ("pairs", {{}}), ("asymdpo", {TRAINING})):
    run_stage(chain, name, out=out / name, **changes)
"""


@pytest.fixture(scope="module")
def two(chain, tmp_path_factory):
    """The folder in which two processes of one torchrun wrote three stages."""
    out = tmp_path_factory.mktemp("two")
    (out / "stages.py").write_text(CODE)
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"
    done = script(*torchrun, str(out / "stages.py"), str(chain), str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_training_on_two_processes(chain, two, tmp_path):
    """asymdpo: two processes log the losses of one and end in its LoRA."""
    one, two = run_stage(chain, "asymdpo", out=tmp_path, **TRAINING), two / "asymdpo"
    a, b = load_file(one / "lora.safetensors"), load_file(two / "lora.safetensors")
    assert a.keys() == b.keys() and max((a[k] - b[k]).abs().max() for k in a) < 1e-6
    assert max(v.abs().max() for k, v in a.items() if "lora_B" in k) > 1e-4  # it did move
    rows = list(zip(metrics(one), metrics(two), strict=True))
    assert len(rows) == 4
    for x, y in rows:
        assert x.keys() == y.keys()
        assert all(abs(x[k] - y[k]) <= 1e-6 * max(1, abs(x[k])) for k in x), (x, y)


@pytest.mark.parametrize("name", ["shards", "pairs"])
def test_shards_on_two_processes(name, chain, two):
    """Dealt to two processes they are those of one, byte for byte; so are rejects and contact sheets."""
    assert contents(two / name) == contents(chain / name)
    assert (two / name / "shard-00001.safetensors").exists()  # more than one shard, so both had work

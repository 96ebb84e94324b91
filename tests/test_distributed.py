"""Two processes with gloo against one: the same global batch gives the same result."""

from helpers import command_line, contents, metrics, run_stage, script, stage
from safetensors.torch import load_file


def torchrun(name: str, cfg) -> None:
    done = script("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *command_line(name, cfg))
    assert done.returncode == 0, done.stderr[-3000:]


def test_training_on_two_processes(chain, tmp_path):
    """asymdpo: with forwards of equal size (micro_batch 2), two processes log the losses of one and end in its LoRA."""
    changes = dict(steps=4, micro_batch=2, save_every=2)
    one = run_stage(chain, "asymdpo", out=str(tmp_path / "one"), **changes)
    torchrun("asymdpo", stage(chain, "asymdpo", out=str(tmp_path / "two"), **changes)[1])
    two = tmp_path / "two"
    a, b = load_file(one / "lora.safetensors"), load_file(two / "lora.safetensors")
    assert a.keys() == b.keys() and max((a[k] - b[k]).abs().max() for k in a) < 1e-6
    assert max(v.abs().max() for k, v in a.items() if "lora_B" in k) > 1e-4  # it did move
    rows = list(zip(metrics(one), metrics(two), strict=True))
    assert len(rows) == 4
    for x, y in rows:
        assert x.keys() == y.keys()
        assert all(abs(x[k] - y[k]) <= 1e-6 * max(1, abs(x[k])) for k in x), (x, y)


def test_pairs_on_two_processes(chain, tmp_path):
    """make_pairs: shards dealt to two processes are, byte for byte, those of one."""
    torchrun("pairs", stage(chain, "pairs", out=str(tmp_path / "pairs"))[1])
    assert contents(tmp_path / "pairs") == contents(chain / "pairs")
    assert (tmp_path / "pairs" / "shard-00001.safetensors").exists()  # more than one shard, so both had work


def test_shards_on_two_processes(chain, tmp_path):
    """prepare: the same shards, rejects and contact sheets, byte for byte."""
    torchrun("shards", stage(chain, "shards", out=str(tmp_path / "shards"))[1])
    assert contents(tmp_path / "shards") == contents(chain / "shards")
    assert (tmp_path / "shards" / "shard-00001.safetensors").exists() and (tmp_path / "shards" / "kept.png").exists()

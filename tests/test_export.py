"""merge.py: what it writes is the same model in our loader, in diffusers and by the key rules of others."""

import functools
import json
import shutil

import pytest
import torch
from helpers import contents, peak_memory, script, stop_at
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import model
from runtime import run as common
from runtime.run import UserError
from wan import checkpoint as weights
from wan import export as merge

CONFIG = model.DiTConfig(40, 56, 2, 2, text_dim=12, freq_dim=32)  # heads of 20: RoPE's split is unequal


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """base/, sft/ (attn+ffn, rank 4, alpha 8), dpo/ (attn, rank 3) and all/ (rank 2), in which nothing is zero or one.

    kohya.safetensors is dpo's as kohya's scripts write it: lora_unet_, down and up, here with alpha 6, so B halved.
    """
    folder = tmp_path_factory.mktemp("merge")
    torch.manual_seed(0)
    net = model.DiT(CONFIG)
    for p in net.parameters():
        p.data = p.data + 0.2 * torch.randn_like(p)
    model.save_model(net, folder / "base")
    for name, rank, alpha, layers in (("sft", 4, 8, "attn+ffn"), ("dpo", 3, 3, "attn"), ("all", 2, 4, "all")):
        lora = model.load_model(folder / "base")
        model.add_lora(lora, rank, alpha, layers, seed=rank)
        for layer in model.lora_linears(lora).values():
            torch.nn.init.normal_(layer.lora_B, std=0.1)
        model.export_lora(lora, folder / name / "lora.safetensors")
    tensors = {}
    for key, a in load_file(folder / "dpo/lora.safetensors").items():
        name = "lora_unet_" + key.removeprefix("diffusion_model.").partition(".lora_")[0].replace(".", "_")
        down = key.endswith("A.weight")
        tensors[f"{name}.lora_{'down' if down else 'up'}.weight"] = a if down else a / 2
        tensors[f"{name}.alpha"] = torch.tensor(6.0)
    save_file(tensors, folder / "kohya.safetensors")
    return folder


def run(root, out, layout, lora="sft,dpo", **more):
    """Runs the stage on folders of root. Returns what it wrote."""
    lora = ",".join(str(root / name) for name in lora.split(","))
    merge.main(merge.Config(str(root / "base"), lora, str(out), layout, **more))
    return out


def sequential(root, dtype=torch.float32):
    """Base and LoRAs, one fused after the other."""
    net = model.load_model(root / "base", dtype)
    for name in ("sft", "dpo"):
        model.merge_lora(model.load_lora(net, root / name / "lora.safetensors"))
    return net


def inputs():
    torch.manual_seed(1)
    return torch.randn(2, 16, 3, 4, 6), torch.tensor([0.004, 0.02]), torch.randn(2, 9, CONFIG.text_dim)


@torch.no_grad()
def ours(net):
    return net(*inputs())


@torch.no_grad()
def theirs(peer):
    x, t, states = inputs()
    states = torch.nn.functional.pad(states, (0, 0, 0, 512 - states.shape[1]))
    return peer(x, 1000 * t, states, return_dict=False)[0]


def close(one, two, tolerance=5e-5):
    return (one - two).abs().max() < tolerance * max(1, two.abs().max())


def same(one, two):
    """Two networks of the same configuration and tensors, bit for bit."""
    one_state, two_state = one.state_dict(), two.state_dict()
    return one.config == two.config and all(torch.equal(a, two_state[name]) for name, a in one_state.items())


def opened(diffusers, layout, folder, config_folder):
    """What diffusers makes of the written folder."""
    if layout == "diffusers":
        return diffusers.WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    file = str(folder / model.WEIGHTS_NAME)
    return diffusers.WanTransformer3DModel.from_single_file(
        file, config=str(config_folder / "transformer"), local_files_only=True
    )


# ---- whole checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["wan", "diffusers"])
def test_merged_opens_in_diffusers(layout, root, tmp_path):
    """It gives our merged network's output there, and not the base's; we read it back bit for bit."""
    diffusers = pytest.importorskip("diffusers")
    expected = sequential(root)
    run(root, tmp_path / "diffusers", "diffusers")
    out = run(root, tmp_path / layout, layout)
    assert same(model.load_model(out), expected)
    peer = opened(diffusers, layout, out, tmp_path / "diffusers")
    assert close(theirs(peer), ours(expected))
    assert (theirs(peer) - ours(model.load_model(root / "base"))).abs().max() > 0.1
    common.read_manifest(out, "merge.py")
    assert same(model.load_model(run(root, tmp_path / "again", layout, "sft,kohya.safetensors")), expected)


def test_config_files(root, tmp_path):
    """config.json has Wan's keys and values, and diffusers' those that its own folder has."""
    diffusers = pytest.importorskip("diffusers")
    told = json.loads((run(root, tmp_path / "wan", "wan") / "config.json").read_text())
    keys = {"_class_name", "model_type", "dim", "eps", "ffn_dim", "freq_dim", "in_dim"}
    assert keys | {"num_heads", "num_layers", "out_dim", "text_len"} <= set(told)
    assert (told["_class_name"], told["model_type"], told["text_len"]) == ("WanModel", "t2v", 512)
    folder = run(root, tmp_path / "diffusers", "diffusers") / "transformer"
    told = json.loads((folder / "config.json").read_text())
    peer = diffusers.WanTransformer3DModel.from_pretrained(folder)
    peer.save_pretrained(tmp_path / "peer")
    theirs = json.loads((tmp_path / "peer/config.json").read_text())
    assert set(told) <= set(theirs) and all(theirs[key] == told[key] for key in told)
    assert set(peer.state_dict()) == set(load_file(folder / model.WEIGHTS_NAME))


@pytest.mark.parametrize("layout", ["wan", "diffusers"])
def test_shards(layout, root, tmp_path, monkeypatch):
    """Larger checkpoints are cut into files of at most the limit, with an index: read here and in diffusers alike."""
    limit = 40_000
    monkeypatch.setattr(weights, "write_checkpoint", functools.partial(weights.write_checkpoint, limit=limit))
    out = run(root, tmp_path / "out", layout)
    folder = out / "transformer" if layout == "diffusers" else out
    index = json.loads((folder / f"{model.WEIGHTS_NAME}.index.json").read_text())
    shards = {file: load_file(folder / file) for file in sorted(set(index["weight_map"].values()))}
    assert len(shards) > 4 and f"diffusion_pytorch_model-00002-of-{len(shards):05d}.safetensors" in shards
    sizes = {file: [a.nbytes for a in tensors.values()] for file, tensors in shards.items()}
    assert all(sum(size) <= limit or len(size) == 1 for size in sizes.values())
    assert index["metadata"]["total_size"] == sum(map(sum, sizes.values()))
    assert index["weight_map"] == {name: file for file, tensors in shards.items() for name in tensors}
    assert same(model.load_model(out), sequential(root))
    assert len(common.read_manifest(out, "merge.py")["files"]) == len(shards) + 2
    if layout == "diffusers":
        peer = pytest.importorskip("diffusers").WanTransformer3DModel.from_pretrained(folder)
        assert close(theirs(peer), ours(sequential(root)))


@pytest.mark.parametrize("call", [0, 2])
def test_an_interrupted_merge(call, root, tmp_path, monkeypatch):
    """Stopped at a shard: nothing that loads, no half file; the same command then gives what a straight run gives."""
    monkeypatch.setattr(weights, "write_checkpoint", functools.partial(weights.write_checkpoint, limit=40_000))
    with stop_at(monkeypatch, common, "write_tensors", call), pytest.raises(KeyboardInterrupt):
        run(root, tmp_path / "out", "diffusers")
    assert not (tmp_path / "out/MANIFEST.json").exists() and not list(tmp_path.rglob("*.tmp"))
    with pytest.raises(UserError):
        model.load_model(tmp_path / "out")
    assert contents(run(root, tmp_path / "out", "diffusers")) == contents(run(root, tmp_path / "straight", "diffusers"))


def test_the_sum_is_rounded_once(root, tmp_path):
    """bfloat16, also from a bfloat16 base: float32 until the end. Rounding after each LoRA would give other bits."""
    shutil.copytree(root / "sft", tmp_path / "sft")
    shutil.copytree(root / "dpo", tmp_path / "dpo")
    rounded = {name: a.bfloat16() for name, a in load_file(root / "base" / model.WEIGHTS_NAME).items()}
    (tmp_path / "base").mkdir()
    shutil.copy(root / "base/config.json", tmp_path / "base")
    save_file(rounded, tmp_path / "base" / model.WEIGHTS_NAME)
    out = run(tmp_path, tmp_path / "out", "wan", dtype="bfloat16")
    written, expected = load_file(out / model.WEIGHTS_NAME), sequential(tmp_path).state_dict()
    assert all(torch.equal(a, expected[name].bfloat16()) for name, a in written.items())
    twice = sequential(tmp_path, torch.bfloat16).state_dict()
    assert any(not torch.equal(a, twice[name]) for name, a in written.items())


def test_a_diffusers_base(root, tmp_path):
    """A folder or a file in, any layout in and out; sizes that diffusers does not know come back as well."""
    net = model.DiT(model.DiTConfig(40, 56, 2, 2, text_dim=12, freq_dim=32, text_len=24, eps=1e-5))
    model.save_model(net, tmp_path / "base")
    lora = f"{root}/dpo"
    for source, layout in ((f"base/{model.WEIGHTS_NAME}", "diffusers"), ("diffusers", "wan")):
        merge.main(merge.Config(str(tmp_path / source), lora, str(tmp_path / layout), layout))
    assert model.load_model(tmp_path / "wan").config == net.config
    once = model.merge_lora(model.load_lora(model.load_model(tmp_path / "base"), root / "dpo/lora.safetensors"))
    assert same(model.load_model(tmp_path / "diffusers"), once)


def test_names_and_back():
    """Wan's names -> diffusers' -> Wan's, for every tensor of the 1.3B; none is left as it was but patch_embedding."""
    with torch.device("meta"):
        names = list(model.DiT(model.PRESETS["1.3b"]).state_dict())
    others = [model.diffusers_name(name) for name in names]
    assert [model._rename(name) for name in others] == names and len(set(others)) == len(names) == 825
    alike = {name for name, other in zip(names, others) if name == other}
    assert alike == {"patch_embedding.weight", "patch_embedding.bias"}


def test_merging_holds_one_file(tmp_path):
    """Peak memory: the base as it is mapped, a shard, and a little; not the merged weights. In a process of its own."""
    net = model.DiT(model.DiTConfig(512, 2048, 4, 12))
    model.save_model(net, tmp_path / "base")
    model.add_lora(net, 4, 4)
    model.export_lora(net, tmp_path / "lora.safetensors")
    size = sum(p.numel() * 4 for p in net.parameters())
    code = """
from wan import checkpoint as weights, export as merge
weights.write_checkpoint = functools.partial(weights.write_checkpoint, limit=20 * 10**6)
merge.main(merge.Config(sys.argv[2] + "/base", sys.argv[2] + "/lora.safetensors", sys.argv[2] + "/out"))
"""
    held = peak_memory(code, str(tmp_path))
    assert held < size + 60 * 10**6, f"{held / size:.2f} of the weights"


# ---- one LoRA --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", ["dpo", "kohya.safetensors"])
def test_one_lora_is_their_sum(second, root, tmp_path):
    """Ranks side by side, one rank in all layers, whoever wrote the files: W + BA as fused one after the other."""
    run(root, tmp_path / "out", "lora", f"sft,{second}")
    path, expected = tmp_path / "out/lora.safetensors", sequential(root)
    net = model.merge_lora(model.load_lora(model.load_model(root / "base"), path))
    for name, a in net.state_dict().items():
        assert close(a, expected.state_dict()[name], 1e-6), name
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["dynamicsboost"])
    assert (told["rank"], told["alpha"], told["lora"]) == ("7", "7", f"{root}/sft,{root}/{second}")
    assert {min(a.shape) for a in load_file(path).values()} == {7}
    assert path.stat().st_mode == (tmp_path / "out/run.json").stat().st_mode  # others may read it as well


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_lora_opens_in_diffusers(dtype, root, tmp_path):
    """By a pipeline's load_lora_weights: W + (alpha / r) B A, and the output moves; in bfloat16 within its rounding."""
    diffusers, _ = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    run(root, tmp_path / "base", "diffusers")  # its config; the weights are replaced
    peer = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "base/transformer")
    base = model.load_model(root / "base")
    peer.load_state_dict({model.diffusers_name(name): a for name, a in base.state_dict().items()})
    before = theirs(peer)
    path = run(root, tmp_path / "out", "lora", dtype=dtype) / "lora.safetensors"
    assert {str(a.dtype) for a in load_file(path).values()} == {f"torch.{dtype}"}
    pipeline = diffusers.WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=peer)
    pipeline.load_lora_weights(path)
    after, expected = theirs(peer), ours(sequential(root))
    assert (after - before).abs().max() > 0.1
    if dtype == "float32":
        assert close(after, expected, 1e-5)
    assert close(after, ours(model.load_lora(base, path)), 1e-5)
    pipeline.fuse_lora()
    exact, loras = (
        sequential(root),
        [model.read_lora(base, root / f"{name}/lora.safetensors") for name in ("sft", "dpo")],
    )
    for key in ("blocks.1.self_attn.k", "blocks.0.ffn.0"):  # of both LoRAs, of one
        weight = peer.get_submodule(model.diffusers_name(f"{key}.weight").removesuffix(".weight")).weight
        size = sum(lora[key][1].abs() @ lora[key][0].abs() for lora in loras if key in lora)
        allowed = 2**-7 * size if dtype == "bfloat16" else 0  # A and B are each off by 2^-8 at most
        assert ((weight - exact.get_submodule(key).weight).abs() <= allowed + 1e-5).all(), key


# ---- the key rules of others -----------------------------------------------------------------------------------------


def test_comfyuis_keys(root, tmp_path):
    """Every tensor is one that ComfyUI looks for, and every one that it finds is complete.

    github.com/comfyanonymous/ComfyUI, comfy/lora.py model_lora_keys_unet: a model key diffusion_model.<layer>.weight
    offers the LoRA name diffusion_model.<layer>; comfy/weight_adapter/lora.py LoRAAdapter.load: .lora_B.weight and
    .lora_A.weight of a name, alpha / rank 1 where there is no .alpha.
    """
    names = [f"diffusion_model.{key}" for key in model.load_model(root / "base").state_dict()]
    offered = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    tensors = load_file(run(root, tmp_path, "lora", "dpo,all") / "lora.safetensors")
    found = {name for name in offered if f"{name}.lora_B.weight" in tensors}
    assert set(tensors) == {f"{name}.lora_{x}.weight" for name in found for x in "AB"} and len(found) == 26


def musubi(tensors):
    """What musubi-tuner makes of a file with the prefix diffusion_model. at load.

    github.com/kohya-ss/musubi-tuner, src/musubi_tuner/convert_lora.py convert_from_diffusers: lora_unet_ and the layer
    with underscores, down and up, and an alpha that is the rank, an integer.
    """
    out = {}
    for key, a in tensors.items():
        prefix, _, rest = key.partition(".")
        layer, _, part = rest.rpartition(".lora_")
        assert prefix == "diffusion_model"
        name = f"lora_unet_{layer}".replace(".", "_")
        out[f"{name}.lora_{ {'A.weight': 'down', 'B.weight': 'up'}[part] }.weight"] = a
        if part == "A.weight":
            out[f"{name}.alpha"] = torch.tensor(len(a))
    return out


def test_musubis_keys(root, tmp_path):
    """Converted as musubi-tuner does, every layer is one of its network's, and the file says the same to us.

    Its names, src/musubi_tuner/utils/lora_utils.py: lora_unet_ and a weight's key with underscores.
    """
    net = model.load_model(root / "base")
    path = run(root, tmp_path, "lora", "dpo,all") / "lora.safetensors"
    converted = musubi(load_file(path))
    known = {"lora_unet_" + key.removesuffix(".weight").replace(".", "_") for key in net.state_dict()}
    assert {key.partition(".")[0] for key in converted} <= known and len(converted) == 78
    save_file(converted, tmp_path / "musubi.safetensors")
    one, two = (model.read_lora(net, file) for file in (path, tmp_path / "musubi.safetensors"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[n][0], two[n][0]) and torch.equal(one[n][1], two[n][1]) for n in one)
    assert all(one[n][2] == two[n][2] == 1 for n in one)


# ---- mistakes --------------------------------------------------------------------------------------------------------


def other_files(root):
    (root / "out").mkdir()
    (root / "out/notes.txt").write_text("mine")


def no_match(root):
    save_file({"lora_unet_down_blocks_0.lora_down.weight": torch.zeros(2, 3)}, root / "sdxl.safetensors")


def wider(root):
    net = model.DiT(model.DiTConfig(80, 56, 2, 2, text_dim=12, freq_dim=32))
    model.add_lora(net, 2, 2)
    model.export_lora(net, root / "wider.safetensors")


def continued(root):
    shutil.copytree(root / "dpo", root / "phi")
    model.save_task_prompt(
        model.add_task_prompt(model.load_model(root / "base"), 3), root / "phi/task_prompt.safetensors"
    )


MISTAKES = {  # what is wrong -> options, what is prepared, words of the error
    "no LoRA": (dict(lora=","), None, "--lora: expected folders or files"),
    "unknown layout": (dict(layout="comfy"), None, "--layout: expected one of wan, diffusers, lora, got 'comfy'"),
    "unknown dtype": (dict(dtype="float16"), None, "--dtype: expected one of float32, bfloat16, got 'float16'"),
    "missing LoRA": (dict(lora="{}/nowhere"), None, "nowhere: expected"),
    "folder without a LoRA": (dict(lora="{}/base"), None, "base/lora.safetensors: expected"),
    "unfinished LoRA": (dict(lora="{}/sft"), lambda r: (r / "sft/run.json").touch(), "sft: expected a finished folder"),
    "LoRA of another model": (dict(lora="{}/sdxl.safetensors"), no_match, "sdxl.safetensors: expected a LoRA for this"),
    "LoRA of another size": (dict(lora="{}/sft,{}/wider.safetensors"), wider, "wider.safetensors: .*do not fit"),
    "continuation model": (dict(lora="{}/phi"), continued, "phi: expected a text-to-video LoRA"),
    "missing base": (dict(base="{}/nobase"), None, "nobase: expected"),
    "base is another thing": (dict(base="{}/sft"), None, "sft: expected Wan2.1's text-to-video transformer"),
    "other files in --out": ({}, other_files, "out: expected an empty folder or an earlier merge run, got other files"),
    "--out is a file": ({}, lambda r: (r / "out").touch(), "out: expected an empty folder"),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("layout", ["wan", "lora"])
def test_a_mistake_is_named(name, layout, root, tmp_path, monkeypatch):
    """In one line, before a weight is read or a file is written."""
    options, prepare, words = MISTAKES[name]
    at = tmp_path / "copy"
    shutil.copytree(root, at)
    if prepare:
        prepare(at)
    monkeypatch.setattr(weights.Checkpoint, "__getitem__", lambda self, name: pytest.fail("read a weight"))
    before = contents(at)
    given = dict(base="{}/base", lora="{}/sft,{}/dpo", out="{}/out", layout=layout) | options
    with pytest.raises(UserError, match=words) as caught:
        merge.main(merge.Config(**{key: value.replace("{}", str(at)) for key, value in given.items()}))
    assert "\n" not in str(caught.value) and contents(at) == before


def test_as_a_program(root, tmp_path):
    """Twice the same command: finished already. A changed LoRA: refused in one line with code 2, not passed over."""
    at = tmp_path / "copy"
    shutil.copytree(root, at)
    words = ["-m", "wan.export", "--base", f"{at}/base", "--lora", f"{at}/sft,{at}/dpo", "--out", f"{at}/out"]
    done = script(*words)
    assert done.returncode == 0 and (at / "out/MANIFEST.json").exists(), done.stderr
    assert "finished already" in script(*words).stdout
    shutil.copy(at / "sft/lora.safetensors", at / "dpo/lora.safetensors")
    done = script(*words)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: "), (
        done.stderr
    )


def test_a_cold_start_left_out_is_told(chain, tmp_path, capsys):
    """asymdpo.py's LoRA alone is half of what was trained: a note says what goes below it; with both there is none."""
    for lora, note in ((chain / "asymdpo", True), (f"{chain / 'sft'},{chain / 'asymdpo'}", False)):
        merge.main(merge.Config(base=str(chain / "base"), lora=str(lora), layout="lora", out=str(tmp_path / str(note))))
        assert (f"trained on top of {chain / 'sft'}" in capsys.readouterr().err) == note

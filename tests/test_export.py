"""wan.export: what it writes is the same model in our loader, in diffusers and by the key rules of others."""

import dataclasses
import functools
import json
import re
import shutil

import pytest
import torch
from helpers import close, contents, copy, dit_inputs, peak_memory, randomised, refused, run_stage, stop_at, theirs
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import model
from runtime.files import read_manifest
from runtime.shards import Shards
from wan import card, checkpoint, experts, export
from wan.lora import load_adapted, lora_files, read_lora

CONFIG = model.DiTConfig(40, 56, 2, 2, text_dim=12, freq_dim=32)  # heads of 20: RoPE's split is unequal


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """base/, sft/ (attn+ffn, rank 4, alpha 8), dpo/ (attn, rank 3) and all/ (rank 2), in which nothing is zero or one.

    kohya.safetensors is dpo's as kohya's scripts write it, here with twice the alpha, so half of B.
    """
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    model.save_model(randomised(model.DiT(CONFIG)), folder / "base")
    for name, rank, alpha, layers in (("sft", 4, 8, "attn+ffn"), ("dpo", 3, 3, "attn"), ("all", 2, 4, "all")):
        lora = model.load_model(folder / "base")
        model.add_lora(lora, rank, alpha, layers, seed=rank)
        for term in model.trained_lora(lora).values():
            torch.nn.init.normal_(term.B, std=0.1)
        model.export_lora(model.trained_lora(lora), folder / name / "lora.safetensors")
    factor = {"lora_down.weight": 1, "lora_up.weight": 0.5, "alpha": 2}
    tensors = musubi(load_file(folder / "dpo/lora.safetensors"))
    save_file({k: factor[k.partition(".")[2]] * a for k, a in tensors.items()}, folder / "kohya.safetensors")
    return folder


def musubi(tensors):
    """What musubi-tuner makes of a file with the prefix diffusion_model. at load.

    github.com/kohya-ss/musubi-tuner, src/musubi_tuner/convert_lora.py convert_from_diffusers: lora_unet_ and the layer
    with underscores, down and up, and an alpha that is the rank, an integer.
    """
    out = {}
    for key in tensors:
        if key.endswith(".lora_A.weight"):
            layer = key.removeprefix("diffusion_model.").removesuffix(".lora_A.weight")
            name = "lora_unet_" + layer.replace(".", "_")
            out[f"{name}.lora_down.weight"] = tensors[key]
            out[f"{name}.lora_up.weight"] = tensors[f"diffusion_model.{layer}.lora_B.weight"]
            out[f"{name}.alpha"] = torch.tensor(len(tensors[key]))
    return out


def run(root, out, layout, lora="sft,dpo", **more):
    """Runs the stage on folders of root. Returns what it wrote."""
    lora = ",".join(str(root / name) for name in lora.split(","))
    export.main(export.Config(str(root / "base"), lora, str(out), layout, **more))
    return out


def sequential(root, dtype=torch.float32, names=("sft", "dpo")):
    """Base and LoRAs, one fused after the other."""
    return load_adapted(root / "base", [root / name / "lora.safetensors" for name in names], dtype)


@torch.no_grad()
def output(net, forward=model.DiT.__call__):
    """What a network gives on the same inputs each time; diffusers' network with forward=theirs."""
    torch.manual_seed(1)
    return forward(net, *dit_inputs())


def same(one, two):
    """Two networks of the same configuration and tensors, bit for bit."""
    two_state = two.state_dict()
    return one.config == two.config and all(torch.equal(a, two_state[name]) for name, a in one.state_dict().items())


@pytest.fixture
def small_files(monkeypatch):
    """Files of at most 40 kB."""
    monkeypatch.setattr(export, "write_checkpoint", functools.partial(export.write_checkpoint, limit=40_000))


# ---- whole checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["wan", "diffusers"])
def test_merged_opens_in_diffusers(layout, root, tmp_path):
    """It gives our merged network's output there, and not the base's; we read it back bit for bit."""
    diffusers = pytest.importorskip("diffusers")
    expected = sequential(root)
    config = run(root, tmp_path / "diffusers", "diffusers") / "transformer"
    out = run(root, tmp_path / layout, layout)
    assert same(model.load_model(out), expected)
    if layout == "diffusers":
        peer = diffusers.WanTransformer3DModel.from_pretrained(out, subfolder="transformer")
    else:
        file = str(out / model.WEIGHTS_NAME)
        peer = diffusers.WanTransformer3DModel.from_single_file(file, config=str(config), local_files_only=True)
    assert close(output(peer, theirs), output(expected))
    assert (output(peer, theirs) - output(model.load_model(root / "base"))).abs().max() > 0.1
    read_manifest(out, "wan.export")
    assert same(model.load_model(run(root, tmp_path / "again", layout, "sft,kohya.safetensors")), expected)


def test_config_files(root, tmp_path):
    """config.json has Wan's keys and values, and diffusers' those that its own folder has."""
    diffusers = pytest.importorskip("diffusers")
    told = json.loads((run(root, tmp_path / "wan", "wan") / "config.json").read_text())
    keys = {"dim", "eps", "ffn_dim", "freq_dim", "in_dim", "num_heads", "num_layers", "out_dim"}
    assert keys <= set(told)
    assert (told["_class_name"], told["model_type"], told["text_len"]) == ("WanModel", "t2v", 512)
    folder = run(root, tmp_path / "diffusers", "diffusers") / "transformer"
    told = json.loads((folder / "config.json").read_text())
    peer = diffusers.WanTransformer3DModel.from_pretrained(folder)
    peer.save_pretrained(tmp_path / "peer")
    assert told.items() <= json.loads((tmp_path / "peer/config.json").read_text()).items()
    assert set(peer.state_dict()) == set(load_file(folder / model.WEIGHTS_NAME))


@pytest.mark.parametrize("layout", ["wan", "diffusers"])
def test_shards(layout, root, tmp_path, small_files):
    """Larger checkpoints are cut into files of at most the limit, with an index: read here and in diffusers alike."""
    out = run(root, tmp_path / "out", layout)
    folder = out / "transformer" if layout == "diffusers" else out
    index = json.loads((folder / f"{model.WEIGHTS_NAME}.index.json").read_text())
    shards = {file: load_file(folder / file) for file in sorted(set(index["weight_map"].values()))}
    assert len(shards) > 4 and f"diffusion_pytorch_model-00002-of-{len(shards):05d}.safetensors" in shards
    sizes = {file: [a.nbytes for a in tensors.values()] for file, tensors in shards.items()}
    assert all(sum(size) <= 40_000 or len(size) == 1 for size in sizes.values())
    assert index["metadata"]["total_size"] == sum(map(sum, sizes.values()))
    assert index["weight_map"] == {name: file for file, tensors in shards.items() for name in tensors}
    assert same(model.load_model(out), sequential(root))
    assert len(read_manifest(out, "wan.export")["files"]) == len(shards) + 3
    if layout == "diffusers":
        peer = pytest.importorskip("diffusers").WanTransformer3DModel.from_pretrained(folder)
        assert close(output(peer, theirs), output(sequential(root)))


@pytest.mark.parametrize("call", [0, 2])
def test_an_interrupted_export(call, root, tmp_path, monkeypatch, small_files):
    """Stopped at a shard: nothing that loads, no half file; the same command then gives what a straight run gives."""
    with stop_at(monkeypatch, checkpoint, "write_tensors", call), pytest.raises(KeyboardInterrupt):
        run(root, tmp_path / "out", "diffusers")
    assert not (tmp_path / "out/MANIFEST.json").exists() and not list(tmp_path.rglob("*.tmp"))
    with pytest.raises(ValueError):
        model.load_model(tmp_path / "out")
    assert contents(run(root, tmp_path / "out", "diffusers")) == contents(run(root, tmp_path / "straight", "diffusers"))


def test_the_sum_is_rounded_once(root, tmp_path):
    """bfloat16, also from a bfloat16 base: float32 until the end. Rounding after each LoRA would give other bits."""
    copy(root, tmp_path, "base", "sft", "dpo")
    rounded = {name: a.bfloat16() for name, a in load_file(root / "base" / model.WEIGHTS_NAME).items()}
    save_file(rounded, tmp_path / "base" / model.WEIGHTS_NAME)
    out = run(tmp_path, tmp_path / "out", "wan", dtype="bfloat16")
    written, expected = load_file(out / model.WEIGHTS_NAME), sequential(tmp_path).state_dict()
    assert all(torch.equal(a, expected[name].bfloat16()) for name, a in written.items())
    twice = load_file(run(tmp_path, tmp_path / "one", "wan", "sft", dtype="bfloat16") / model.WEIGHTS_NAME)
    save_file(twice, tmp_path / "base" / model.WEIGHTS_NAME)
    twice = load_file(run(tmp_path, tmp_path / "two", "wan", "dpo", dtype="bfloat16") / model.WEIGHTS_NAME)
    assert any(not torch.equal(a, twice[name]) for name, a in written.items())


def test_a_diffusers_base(root, tmp_path):
    """A folder or a file in, any layout in and out; sizes that diffusers does not know come back as well."""
    net = model.DiT(dataclasses.replace(CONFIG, text_len=24, eps=1e-5, frames=5))
    torch.nn.init.normal_(net.frame_embedding)
    model.save_model(net, tmp_path / "base")
    for source, lora, layout in ((f"base/{model.WEIGHTS_NAME}", "dpo", "diffusers"), ("diffusers", "sft", "wan")):
        export.main(export.Config(str(tmp_path / source), f"{root}/{lora}", str(tmp_path / layout), layout))
    assert model.load_model(tmp_path / "wan").config == net.config
    fused = load_adapted(tmp_path / "base", [root / "dpo/lora.safetensors"])
    assert same(model.load_model(tmp_path / "diffusers"), fused)


def test_names_and_back():
    """Wan's names -> diffusers' -> Wan's, for every tensor of the 1.3B; none is left as it was but patch_embedding."""
    with torch.device("meta"):
        names = list(model.DiT(model.PRESETS["1.3b"]).state_dict())
    others = [export.diffusers_name(name) for name in names]
    assert [model.wan_name(name) for name in others] == names and len(set(others)) == len(names) == 825
    alike = {name for name, other in zip(names, others) if name == other}
    assert alike == {"patch_embedding.weight", "patch_embedding.bias"}


def test_export_holds_one_file(tmp_path):
    """Peak memory: the base as it is mapped, a shard, and a little; not the merged weights. In a process of its own."""
    net = model.DiT(model.DiTConfig(512, 2048, 4, 6))
    model.save_model(net, tmp_path / "base")
    model.add_lora(net, 4, 4)
    model.export_lora(model.trained_lora(net), tmp_path / "lora.safetensors")
    size = sum(p.numel() * 4 for p in net.parameters())
    code = """
from wan import export
export.write_checkpoint = functools.partial(export.write_checkpoint, limit=20 * 10**6)
export.main(export.Config(sys.argv[2] + "/base", sys.argv[2] + "/lora.safetensors", sys.argv[2] + "/out"))
"""
    held = peak_memory(code, str(tmp_path))
    assert held < size + 60 * 10**6, f"{held / size:.2f} of the weights"


@torch.no_grad()
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_bfloat16_keeps_the_loras(stored, tmp_path):
    """Two LoRAs on weights of Wan's size, at sizes that Wan's training reaches: in bfloat16 all of both is there,
    whatever dtype the base's files have. Fused into weights that are rounded already, half of it was.
    """
    base = model.DiT(dataclasses.replace(CONFIG, dim=512, num_heads=4, num_layers=1))
    torch.nn.init.normal_(base.blocks[0].self_attn.q.weight, std=0.025)
    model.save_model(model.cast(base, stored), tmp_path / "base")
    files, truth = [tmp_path / "sft.safetensors", tmp_path / "dpo.safetensors"], 0
    for seed, file in enumerate(files):
        model.add_lora(base, 16, 16, "attn", seed)
        for term in model.trained_lora(base).values():
            torch.nn.init.normal_(term.B, std=2e-4)
        model.export_lora(model.trained_lora(base), file)
        term = base.blocks[0].self_attn.q.lora[-1]
        truth += term.B @ term.A
    plain, adapted = (load_adapted(tmp_path / "base", loras, torch.bfloat16) for loras in ([], files))
    plain, adapted = plain.blocks[0].self_attn.q, adapted.blocks[0].self_attn.q
    weight = adapted.weight.float() + sum(term.B @ term.A for term in adapted.lora)
    assert adapted.weight.dtype == torch.bfloat16 and bool(adapted.lora) == (stored == torch.bfloat16)
    kept = ((weight - plain.weight.float()) * truth).sum() / truth.square().sum()
    assert abs(kept - 1) < 0.01


# ---- a LoRA with differences of whole tensors ------------------------------------------------------------------------


def distilled(base):
    """A LoRA file as LightX2V's tools/extract/lora_extractor.py writes it of a model whose every tensor changed: low
    rank where it pays, or else .diff of a weight, .diff_b of a bias, .diff_m of a modulation. And the changed model's
    tensors, in float64.
    """
    tensors, truth = {}, {}
    for name, a in base.items():
        layer, _, leaf = f"diffusion_model.{name}".rpartition(".")
        if a.ndim == 2 and "blocks." in name:
            down, up = torch.randn(3, a.shape[1]), 0.1 * torch.randn(a.shape[0], 3)
            tensors |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
            tensors[f"{layer}.alpha"] = torch.tensor(6.0)  # the scale of a low-rank term alone
            change = 2 * up.double() @ down.double()
        else:
            change = 0.1 * torch.randn(a.shape)
            tensors[f"{layer}.{dict(weight='diff', bias='diff_b', modulation='diff_m')[leaf]}"] = change
        truth[name] = a.double() + change
    return tensors, truth


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_differences_are_added(dtype, root, tmp_path):
    """W + BA, and bias, norm, modulation + their diff, up to one rounding; whole models are exported with them."""
    model.save_model(model.load_model(root / "base", dtype), tmp_path / "base")
    tensors, truth = distilled(load_file(tmp_path / "base" / model.WEIGHTS_NAME))
    assert {key.rpartition(".")[2] for key in tensors} == {"weight", "alpha", "diff", "diff_b", "diff_m"}
    save_file(tensors, tmp_path / "distilled.safetensors")
    net = load_adapted(tmp_path / "base", [tmp_path / "distilled.safetensors"], dtype)
    terms = {f"{name}.weight": model.fuse(0 * layer.weight, layer.lora) for name, layer in model.linears(net).items()}
    for name, a in net.state_dict().items():
        if ".lora." not in name:
            assert close(a.double() + terms.get(name, 0), truth[name], 2**-8 if dtype == torch.bfloat16 else 1e-6), name
    if dtype == torch.float32:
        assert same(model.load_model(run(tmp_path, tmp_path / "out", "diffusers", "distilled.safetensors")), net)


def test_a_lora_cannot_keep_differences(root, tmp_path):
    """Others would pass over some of them: one LoRA is not made, and the line says what can be."""
    save_file(distilled(load_file(root / "base" / model.WEIGHTS_NAME))[0], root / "distilled.safetensors")
    words = "distilled.safetensors: expected low-rank terms alone for --layout lora, .*blocks.0.*choose another layout"
    refused(words, run, root, tmp_path / "out", "lora", "sft,distilled.safetensors")
    assert not (tmp_path / "out").exists()


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
    assert (told["rank"], told["alpha"]) == ("7", "7") and str(root) not in str(told)
    assert {min(a.shape) for a in load_file(path).values()} == {7}
    assert path.stat().st_mode == (tmp_path / "out/run.json").stat().st_mode  # others may read it as well


@pytest.mark.parametrize("names, dtype", [("sft", "float32"), ("sft,dpo", "float32"), ("sft,dpo", "bfloat16")])
def test_one_lora_opens_in_diffusers(names, dtype, root, tmp_path):
    """By a pipeline's load_lora_weights: W + (alpha / r) B A, and the output moves; in bfloat16 within its rounding.

    One LoRA alone is the file that its training wrote.
    """
    diffusers, _ = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    base, loras = model.load_model(root / "base"), names.split(",")
    run(root, tmp_path / "base", "diffusers")  # its config; the weights are replaced
    peer = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "base/transformer")
    peer.load_state_dict({export.diffusers_name(name): a for name, a in base.state_dict().items()})
    before, exact = output(peer, theirs), sequential(root, names=loras)
    folder = run(root, tmp_path / "out", "lora", names, dtype=dtype) if len(loras) > 1 else root / names
    path = folder / "lora.safetensors"
    assert {str(a.dtype) for a in load_file(path).values()} == {f"torch.{dtype}"}
    pipeline = diffusers.WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=peer)
    pipeline.load_lora_weights(path)
    after = output(peer, theirs)
    assert (after - before).abs().max() > 0.1
    if dtype == "float32":
        assert close(after, output(exact), 1e-5)
    assert close(after, output(model.load_lora(base, path)), 1e-5)
    pipeline.fuse_lora()
    loras = [read_lora(base, root / f"{name}/lora.safetensors")[0] for name in loras]
    for key in ("blocks.1.self_attn.k", "blocks.0.ffn.0"):  # of both LoRAs, of sft alone
        weight = peer.get_submodule(export.diffusers_name(f"{key}.weight").removesuffix(".weight")).weight
        size = sum(lora[key].B.abs() @ lora[key].A.abs() for lora in loras if key in lora)
        allowed = 2**-7 * size if dtype == "bfloat16" else 0  # A and B are each off by 2^-8 at most
        assert ((weight - exact.get_submodule(key).weight).abs() <= allowed + 1e-5).all(), key


def test_the_key_rules_of_others(root, tmp_path):
    """Every tensor is one that ComfyUI and, converted, musubi-tuner look for; converted, it says the same to us.

    ComfyUI: diffusion_model.<layer> of each <layer>.weight, comfy/lora.py model_lora_keys_unet; alpha / rank 1 where
    there is no .alpha, comfy/weight_adapter/lora.py. musubi: src/musubi_tuner/utils/lora_utils.py.
    """
    net = model.load_model(root / "base")
    path, again = run(root, tmp_path, "lora", "dpo,all") / "lora.safetensors", tmp_path / "musubi.safetensors"
    tensors = load_file(path)
    offered = [key.removesuffix(".weight") for key in net.state_dict() if key.endswith(".weight")]
    layers = {layer for layer in offered if f"diffusion_model.{layer}.lora_B.weight" in tensors}
    assert set(tensors) == {f"diffusion_model.{layer}.lora_{x}.weight" for layer in layers for x in "AB"}
    save_file(musubi(tensors), again)
    assert {key.partition(".")[0] for key in load_file(again)} == {f"lora_unet_{a.replace('.', '_')}" for a in layers}
    (one, _), (two, _) = read_lora(net, path), read_lora(net, again)
    assert one.keys() == two.keys() == layers and len(layers) == 26
    for layer, term in one.items():
        assert torch.equal(term.A, two[layer].A) and torch.equal(term.B, two[layer].B)
        assert term.scale == two[layer].scale == 1


# ---- mistakes --------------------------------------------------------------------------------------------------------


def wider(root):
    net = model.DiT(model.DiTConfig(80, 56, 2, 2, text_dim=12, freq_dim=32))
    model.add_lora(net, 2, 2)
    model.export_lora(model.trained_lora(net), root / "wider.safetensors")


def continued(root):
    net = model.add_task_prompt(model.load_model(root / "base"), 3)
    model.save_task_prompt(net, root / "dpo/task_prompt.safetensors")


def phi(root):
    tensors = load_file(root / "dpo/lora.safetensors")
    save_file(tensors, root / "phi.safetensors", {"dynamicsboost": '{"task": "continuation"}'})


MISTAKES = {  # what is wrong -> options, what is prepared, words of the error
    "unknown layout": (dict(layout="comfy"), None, "--layout: expected wan, diffusers or lora, got 'comfy'"),
    "unknown dtype": (dict(dtype="float16"), None, "--dtype: expected float32 or bfloat16, got 'float16'"),
    "missing LoRA": (dict(lora="{}/nowhere"), None, "nowhere: expected"),
    "folder without a LoRA": (dict(lora="{}/base"), None, "base/lora.safetensors: expected"),
    "unfinished LoRA": (dict(lora="{}/sft"), lambda r: (r / "sft/run.json").touch(), "sft: expected a finished folder"),
    "LoRA of another size": (dict(lora="{}/sft,{}/wider.safetensors"), wider, "wider.safetensors: .*do not fit"),
    "continuation model": ({}, continued, "dpo: expected a text-to-video LoRA"),
    "continuation's file": (dict(lora="{}/phi.safetensors"), phi, "phi.safetensors: expected a text-to-video LoRA"),
    "missing base": (dict(base="{}/nobase"), None, "nobase: expected"),
    "base is another thing": (dict(base="{}/sft"), None, "sft: expected Wan2.1's text-to-video transformer"),
    "other files in --out": (dict(out="{}/base"), None, "base: expected an empty folder or an earlier wan.export run"),
}


def test_no_lora(root, tmp_path):
    """A whole model may be written without one, which converts a .pth; a LoRA may not."""
    torch.save(model.load_model(root / "base").state_dict(), tmp_path / "model.pth")
    shutil.copy(root / "base/config.json", tmp_path)
    with pytest.raises(ValueError, match="model.pth: expected readable weights, \\*.safetensors"):
        model.load_model(tmp_path / "model.pth")
    given = dict(base=str(tmp_path / "model.pth"), lora="", out=str(tmp_path / "out"))
    export.main(export.Config(**given))
    a, b = (model.load_model(path).state_dict() for path in (root / "base", tmp_path / "out"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(ValueError, match="--lora: expected folders or files"):
        export.main(export.Config(**{**given, "layout": "lora", "out": str(tmp_path / "lora")}))


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("layout", ["wan", "lora"])
def test_a_mistake_is_named(name, layout, root, tmp_path, monkeypatch):
    """In one line, before a weight is read or a file is written."""
    options, prepare, words = MISTAKES[name]
    at = tmp_path / "copy"
    shutil.copytree(root, at)
    if prepare:
        prepare(at)
    monkeypatch.setattr(checkpoint.Checkpoint, "__getitem__", lambda self, name: pytest.fail("read a weight"))
    before = contents(at)
    given = dict(base="{}/base", lora="{}/sft,{}/dpo", out="{}/out", layout=layout) | options
    cfg = export.Config(**{key: value.replace("{}", str(at)) for key, value in given.items()})
    refused(words, export.main, cfg)
    assert contents(at) == before


def test_twice_the_same_command(root, tmp_path, capsys):
    """Finished already. A changed LoRA is refused, not passed over."""
    copy(root, tmp_path, "base", "sft", "dpo")
    out = run(tmp_path, tmp_path / "out", "wan")
    assert "finished already" not in capsys.readouterr().out
    run(tmp_path, out, "wan")
    assert "finished already" in capsys.readouterr().out
    shutil.copy(tmp_path / "sft/lora.safetensors", tmp_path / "dpo/lora.safetensors")
    refused("out was made with inputs", run, tmp_path, out, "wan")


def test_a_cold_start_left_out_is_told(chain, tmp_path, capsys):
    """asymdpo.py's LoRA alone is half of what was trained: a line says what goes below it, but not if that is there: on
    the base, in its weights, or in a sum of several. A file from before 0.10 does not know.
    """
    sft, dpo = chain / "sft", chain / "asymdpo"
    for layout, name, loras in (
        ("lora", "alone", f"{dpo}"),
        ("lora", "both", f"{sft},{dpo}"),
        ("wan", "alone", f"{dpo}"),
        ("wan", "cold", f"{sft}"),
    ):
        export.main(export.Config(str(chain / "base"), loras, str(tmp_path / layout / name), layout))
        note = f"warning: {dpo}/lora.safetensors was trained on top of {sft}, which is not among these LoRAs: give both"
        assert (note in capsys.readouterr().err) == (name == "alone")
    old, (tensors, header, _) = tmp_path / "old.safetensors", model.read_lora_file(dpo / "lora.safetensors")
    save_file(
        tensors, old, {"dynamicsboost": json.dumps({k: header[k] for k in header if k not in ("beneath", "sha256")})}
    )
    for base, loras, note in (
        (chain / "base", f"{dpo}", True),
        (chain / "base", f"{tmp_path}/lora/alone", True),
        (tmp_path / "wan/alone", "", False),
        (chain / "base", f"{dpo},{sft}", False),
        (chain / "base", f"{tmp_path}/lora/both", False),
        (tmp_path / "wan/cold", f"{dpo}", False),
        (chain / "base", f"{old}", False),
    ):
        load_adapted(base, lora_files(loras))
        err = capsys.readouterr().err
        assert ("was trained on top of" in err) == note and "None" not in err, (base, loras)


def test_no_lora_counts_twice(chain, tmp_path):
    """In whatever file: the same one, a copy, a sum that holds it, the base's weights; by every command's loader."""
    sft, base = chain / "sft", chain / "base"
    for layout in ("lora", "wan", "diffusers"):
        export.main(export.Config(str(base), f"{sft},{chain / 'asymdpo'}", str(tmp_path / layout), layout))
    shutil.copy(sft / "lora.safetensors", tmp_path / "copy.safetensors")
    for under, loras in (
        (base, f"{sft},{sft}/"),
        (base, f"{sft},{tmp_path}/copy.safetensors"),
        (base, f"{sft},{tmp_path}/lora"),
        (tmp_path / "wan", f"{sft}"),
        (tmp_path / "diffusers", f"{tmp_path}/lora"),
        (tmp_path / "wan" / model.WEIGHTS_NAME, f"{tmp_path}/copy.safetensors"),
    ):
        words = "lora.safetensors|copy.safetensors: expected each LoRA once, got one that is in the base, or in another"
        refused(words, load_adapted, under, lora_files(loras))
        refused(words, export.main, export.Config(str(under), loras, str(tmp_path / "out"), "wan"))
    refused("expected each LoRA once", run_stage, chain, "asymdpo", sft=f"{sft},{sft}", out=tmp_path / "out")
    net = model.load_model(tmp_path / "wan")
    refused("expected each LoRA once", model.load_lora, net, sft / "lora.safetensors", kind=ValueError)
    assert not (tmp_path / "out").exists()
    model.save_model(net, tmp_path / "saved")  # what is made of such a base says so, too
    refused("expected each LoRA once", load_adapted, tmp_path / "saved", lora_files(str(sft)))
    again = run_stage(chain, "sft", base=tmp_path / "wan", out=tmp_path / "again")
    assert model.read_lora_file(again / "lora.safetensors")[1]["beneath"] == sorted(net.loras)
    again = run_stage(chain, "sft", base=tmp_path / "wan", rank=0, out=tmp_path / "full")
    assert model.load_model(again).loras == net.loras


# ---- the model card --------------------------------------------------------------------------------------------------


def read_card(folder):
    """README.md as the hub's client reads it: its front matter and its text."""
    card = pytest.importorskip("huggingface_hub").ModelCard.load(folder / "README.md")
    assert (card.data.pipeline_tag, card.data.license) == ("text-to-video", "unknown")
    assert {"text-to-video", "wan", "diffusers"} <= {*card.data.tags} and card.text.strip()
    assert not re.search(r"None|\bnan\b|\{|^\* *$", card.text, re.M)
    return card.data, card.text


@pytest.mark.parametrize("layout", export.LAYOUTS)
def test_a_card_says_what_is_known(layout, chain, tmp_path):
    """Stages, steps and the folder of pairs, by header and manifest; half of a training; and no path or user's name."""
    sft, dpo = chain / "sft", chain / "asymdpo"
    export.main(export.Config(str(chain / "base"), f"{sft},{dpo}", str(tmp_path / "out"), layout))
    data, told = read_card(tmp_path / "out")
    count = len(Shards(chain / "pairs", "make_pairs.py"))
    assert data.base_model is None and ("lora" in data.tags) == (layout == "lora") and "dynamicsboost" in data.tags
    assert f"asymdpo.py`: Asymmetrical DPO on pairs; 2 steps of 4 pairs; from a folder of {count} pairs" in told
    assert (
        "2 steps of 4 clips; from a folder of" in told
        and "given 1 to 7, the winner 11 to 13 of 13 latent frames" in told
    )
    assert "β 25, inside, region 23, λ 0" in told and "CVPR 2026" in told and "half of what" not in told
    everything = (tmp_path / "out/README.md").read_text()
    if layout == "lora":  # what is made of it knows as much
        with safe_open(tmp_path / "out/lora.safetensors", "pt") as file:
            everything += str(file.metadata())
        export.main(export.Config(str(chain / "base"), str(tmp_path / "out"), str(tmp_path / "again"), "wan"))
        assert "2 steps of 4 pairs" in read_card(tmp_path / "again")[1]
    assert str(chain) not in everything and str(tmp_path) not in everything
    export.main(export.Config(str(chain / "base"), str(dpo), str(tmp_path / "half"), layout))
    assert "alone it is half of what was trained" in read_card(tmp_path / "half")[1]


def test_a_card_of_what_others_made(root, tmp_path):
    """A LoRA of another program, by its file's name; no LoRA at all: no method, no training that nobody knows of.

    One of ours without its folder is told of by its header; one with a header of another form does no harm.
    """
    data, told = read_card(run(root, tmp_path / "lora", "lora", "kohya.safetensors"))
    assert "* `kohya.safetensors`, a LoRA that does not say how it was trained" in told and "## Method" not in told
    assert {*data.tags} == {"lora", "text-to-video", "wan", "diffusers"}
    export.main(export.Config(str(root / "base"), "", str(tmp_path / "none"), "diffusers"))
    assert "trained on\n" not in read_card(tmp_path / "none")[1]
    lora, _ = read_lora(model.load_model(root / "base"), root / "kohya.safetensors")
    for header, words in (
        (dict(task="sft"), "* `sft.py`: flow matching on real clips, the cold start; rank 3\n"),
        (dict(task="new\n# stage"), "* `new # stage`; rank 3\n"),
        (dict(stages=[dict(task="sft", steps="many")]), "* a training that its LoRA tells of in another form"),
    ):
        model.export_lora(lora, tmp_path / "alone.safetensors", **header)
        assert words in card.model_card("wan", "", "", CONFIG, card.stages_of(tmp_path / "alone.safetensors"), False)


@pytest.mark.parametrize(
    "base, preset, expected",
    [
        ("models/Wan2.1-T2V-1.3B", "1.3b", "Wan2.1-T2V-1.3B"),
        ("hub/models--Wan-AI--Wan2.1-T2V-14B-Diffusers/snapshots/0a1b/transformer", "14b", "Wan2.1-T2V-14B"),
        ("Wan2.2-T2V-A14B/low_noise_model", "a14b", "Wan2.2-T2V-A14B"),
        ("models/Wan2.1-T2V-1.3B", "14b", ""),
        ("models/Wan2.1-T2V-1.3B-style", "1.3b", ""),
        ("out/mine", "14b", ""),
    ],
)
def test_a_card_names_a_published_base(base, preset, expected, tmp_path):
    """By a folder's name and the network's sizes, as the hub's client takes it; of an expert, which one."""
    assert card.release(base, model.PRESETS[preset]) == expected
    noise = experts.expert_of(base)
    for layout in export.LAYOUTS:
        text = card.model_card(layout, expected, noise, model.PRESETS[preset], [], False, "lora_low_noise.safetensors")
        (tmp_path / "README.md").write_text(text)
        data, told = read_card(tmp_path)
        relation = "adapter" if layout == "lora" else "finetune"
        assert data.base_model == (f"Wan-AI/{expected}" if expected else None)
        assert data.to_dict().get("base_model_relation") == (relation if expected else None)
        assert ("transformer_2" in told) == (noise == "low") and ("low-noise" in data.tags) == (noise == "low")


def test_an_experts_files_are_named(root, tmp_path, capsys):
    """As ComfyUI's and LightX2V's end; a folder with one is one LoRA, with two it is not. A line tells of a LoRA
    on the other network.
    """
    shutil.copytree(root / "base", tmp_path / "low_noise_model")
    base, made = str(tmp_path / "low_noise_model"), tmp_path / "lora"
    export.main(export.Config(base, str(root / "sft"), str(made), "lora"))
    assert lora_files(str(made)) == [made / "lora_low_noise.safetensors"]
    assert "low-noise expert, which samples at t < 0.875" in read_card(made)[1]
    export.main(export.Config(base, str(made), str(tmp_path / "out"), "diffusers"))
    assert (tmp_path / "out/transformer_2/config.json").is_file() and not capsys.readouterr().err.count("warning")
    assert same(model.load_model(tmp_path / "out"), sequential(root, names=("sft",)))
    shutil.copytree(root / "base", tmp_path / "high_noise_model")
    export.main(export.Config(str(tmp_path / "high_noise_model"), str(made), str(tmp_path / "other"), "wan"))
    assert "lora_low_noise.safetensors was made for low noise" in capsys.readouterr().err
    shutil.copy(made / "lora_low_noise.safetensors", made / "lora_high_noise.safetensors")
    refused("expected one LoRA, got lora_high_noise.safetensors and lora_low_noise.safetensors", lora_files, str(made))

"""The network beside its golden: per-frame times, given frames, LoRA, files, Wan's names and sizes, dtypes, cost."""

import json

import pytest
import torch
from helpers import cut, flip_bit
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import model
from model import DiT, DiTConfig
from runtime.run import UserError

CONFIG = DiTConfig(40, 56, 2, 2, in_dim=4, out_dim=4, text_dim=12, text_len=24, freq_dim=32)
FRAMES = 5


def make(config: DiTConfig = CONFIG) -> DiT:
    """A network in which nothing is zero or one, as in a trained one."""
    net = DiT(config)
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(torch.randn_like(p) * (0.5 if p.ndim == 1 or "modulation" in name else p[0].numel() ** -0.5))
            if "norm" in name and name.endswith("weight"):
                p.add_(1)
    return net


def inputs(B: int = 2, config: DiTConfig = CONFIG):
    return torch.randn(B, config.in_dim, FRAMES, 4, 6), torch.rand(B), torch.randn(B, 7, config.text_dim)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to float32 rounding: a matrix product over 2 rows and one over 10 may add in another order."""
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def masks(*given: int) -> torch.Tensor:
    return torch.arange(FRAMES) < torch.tensor(given)[:, None]


# ---- times and given frames ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_one_time_for_every_frame_is_the_one_time_path():
    """A per-frame t that is constant equals the scalar path; one that is not, does not."""
    net, (x, t, text) = make(), inputs()
    plain, frames = net(x, t, text), t[:, None].repeat(1, FRAMES)
    assert close(plain, net(x, frames, text))
    frames[:, 1] = 0
    assert not torch.allclose(plain, net(x, frames, text))


@torch.no_grad()
def test_given_frames_see_time_0():
    """cond_mask with zero prompts is the explicit t' = t·(1 − M)."""
    net, (x, t, text) = make(), inputs()
    mask = masks(2, 4)
    expected = net(x, t[:, None] * ~mask, text)
    assert close(net(x, t, text, mask), expected)
    for where in ("context", "frame"):
        model.add_task_prompt(net, FRAMES, where)
        assert close(net(x, t, text, mask), expected)


@torch.no_grad()
@pytest.mark.parametrize("where", ["context", "frame"])
def test_task_prompts(where):
    """Zero prompts and nothing given: the text-to-video model. Prompts that are not zero move it, each table where its
    frames are; and without cond_mask they are off."""
    net, (x, t, text) = make(), inputs()
    plain, nothing = net(x, t, text), masks(0, 0)
    untouched = net(x, t, text, nothing)
    model.add_task_prompt(net, FRAMES, where)
    assert close(untouched, plain) and torch.equal(net(x, t, text, nothing), untouched)
    torch.nn.init.normal_(net.task_prompt.cond)
    assert torch.equal(net(x, t, text, nothing), untouched)
    assert not torch.allclose(net(x, t, text, masks(1, 3)), net(x, t[:, None] * ~masks(1, 3), text))
    torch.nn.init.normal_(net.task_prompt.noisy)
    assert not torch.allclose(net(x, t, text, nothing), plain)
    assert torch.equal(net(x, t, text), plain)


@torch.no_grad()
def test_prompts_in_the_context_take_the_last_padding_slots():
    """They are added to the embedded text's last F slots, which a text of up to text_len − F tokens leaves free."""
    net, (x, t, text) = make(), inputs()
    seen = []
    net.blocks[0].cross_attn.register_forward_pre_hook(lambda _, args: seen.append(args[1].clone()))
    net(x, t, text, masks(2, 2))
    model.add_task_prompt(net, FRAMES)
    torch.nn.init.normal_(net.task_prompt.cond)
    torch.nn.init.normal_(net.task_prompt.noisy)
    net(x, t, text, masks(2, 3))
    difference = seen[1] - seen[0]
    assert (difference[:, :-FRAMES] == 0).all()
    for b, n in enumerate((2, 3)):
        expected = torch.cat([net.task_prompt.cond[:n], net.task_prompt.noisy[n:]])
        assert torch.allclose(difference[b, -FRAMES:], expected, atol=1e-5)


@torch.no_grad()
def test_samples_do_not_mix():
    """A sample's output does not depend on its neighbours' content, whatever their time, text or given frames."""
    net, (x, t, text) = make(), inputs(3)
    model.add_task_prompt(net, FRAMES)
    torch.nn.init.normal_(net.task_prompt.cond)
    one = net(x, t, text, masks(1, 2, 3))
    x[1:], t[1:], text[1:] = 9, 0.1, 9
    assert torch.equal(one[:1], net(x, t, text, masks(1, 4, 0))[:1])


def test_shape_errors():
    """A ValueError that names the argument, before anything is computed."""
    net, (x, t, text) = make(), inputs()
    for name, arguments in {
        "x_t": (x[:, :3], t, text),
        "x_t ": (x[..., :5], t, text),
        "t": (x, t[:1], text),
        "t ": (x, t[:, None].repeat(1, 3), text),
        "text": (x, t, text[..., :5]),
        "text ": (x, t, torch.zeros(2, 25, 12)),
        "cond_mask": (x, t, text, masks(1, 2).int()),
        "cond_mask ": (x, t, text, masks(1)),
        "t  ": (x, t[:, None].repeat(1, FRAMES), text, masks(1, 2)),
    }.items():
        with pytest.raises(ValueError, match=f"^{name.strip()}: expected"):
            net(*arguments)


# ---- cost ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, FRAMES])
def test_modulation_is_never_expanded_to_tokens(rows, monkeypatch):
    """The tables that reach the kernels have 1, 2 or F rows, not one a token; the time network runs on as many."""
    seen = []
    for name in ("ln_modulate", "residual_ln_modulate", "gate_residual"):
        original = getattr(model, name)

        def spy(x, *rest, name=name, original=original):
            seen.extend(a.shape[1] for a in rest if torch.is_tensor(a) and a.ndim == 3 and a.shape != x.shape)
            return original(x, *rest)

        monkeypatch.setattr(model, name, spy)
    net, (x, t, text) = make(), inputs()
    net.time_projection.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    net(x, t if rows < 3 else t[:, None].repeat(1, FRAMES), text, masks(1, 2) if rows == 2 else None)
    assert len(seen) > 10 and set(seen) == {rows}


@pytest.mark.parametrize("cond", [False, True])
def test_gradient_checkpointing_changes_nothing(cond):
    """Outputs and every gradient are those of the plain run."""
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        net = make()
        net.gradient_checkpointing = checkpointing
        x, t, text = inputs()
        v = net(x, t, text, masks(1, 3) if cond else None)
        v.square().mean().backward()
        results.append([v.detach()] + [p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)) and all(g is not None for g in results[0])


@torch.no_grad()
def test_bfloat16_weights_keep_a_float32_stream(monkeypatch):
    """bf16 matmuls; residual stream, modulation tables and output stay float32, and near the float32 network.

    What a layer adds to the stream, and what is normed for the next matmul, is in the weights' dtype.
    """
    net, (x, t, text) = make(), inputs()
    exact = net(x, t, text)
    net.bfloat16()
    stream, added = [], []
    for name in ("ln_modulate", "residual_ln_modulate", "gate_residual"):
        original = getattr(model, name)

        def spy(x, *rest, name=name, original=original):
            given = [a for a in (x, *rest) if torch.is_tensor(a) and a.is_floating_point()]
            stream.extend(a.dtype for a in given if a is not rest[0] or name == "ln_modulate")
            added.extend(a.dtype for a in given if a is rest[0] and name != "ln_modulate")
            return original(x, *rest)

        monkeypatch.setattr(model, name, spy)
    matmuls = []
    net.blocks[0].ffn[0].register_forward_pre_hook(lambda _, args: matmuls.append(args[0].dtype))
    v = net(x, t, text)
    assert v.dtype == torch.float32 and set(stream) == {torch.float32} and {*added, *matmuls} == {torch.bfloat16}
    assert 0 < (v - exact).abs().max() < 0.1 * exact.abs().max()


# ---- Wan's names and sizes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset, parameters, tensors", [("1.3b", 1_418_996_800, 825), ("14b", 14_288_491_584, 1095)])
def test_sizes_are_wans(preset, parameters, tensors):
    """Counts of the published checkpoints, on the meta device; spot checks of names and shapes."""
    with torch.device("meta"):
        state = DiT(model.PRESETS[preset]).state_dict()
    c = model.PRESETS[preset]
    assert sum(p.numel() for p in state.values()) == parameters and len(state) == tensors
    last, D = f"blocks.{c.num_layers - 1}.", c.dim
    for name, shape in {
        "patch_embedding.weight": (D, 16, 1, 2, 2), "text_embedding.0.weight": (D, 4096), "text_embedding.2.bias": (D,),
        "time_embedding.0.weight": (D, 256), "time_projection.1.weight": (6 * D, D), "head.head.weight": (64, D),
        "head.modulation": (1, 2, D), f"{last}modulation": (1, 6, D),
        f"{last}norm3.weight": (D,), f"{last}norm3.bias": (D,),
        f"{last}self_attn.norm_q.weight": (D,), f"{last}cross_attn.norm_k.weight": (D,),
        f"{last}cross_attn.o.weight": (D, D),
        f"{last}ffn.0.weight": (c.ffn_dim, D), f"{last}ffn.2.weight": (D, c.ffn_dim),
    }.items():  # fmt: skip
        assert tuple(state[name].shape) == shape, name


def test_new_parameters_have_one_prefix():
    """All that Wan does not have stands under task_prompt."""
    net = DiT(CONFIG)
    before = set(net.state_dict())
    model.add_task_prompt(net, FRAMES)
    assert {name.split(".")[0] for name in set(net.state_dict()) - before} == {"task_prompt"}


def test_rope_split():
    """Wan's 128 channels a head turn as 44, 42, 42; every split adds up and is even."""
    assert model.rope_split(128) == (44, 42, 42)
    for head_dim in (8, 16, 20, 24, 32, 64, 96):
        assert sum(model.rope_split(head_dim)) == head_dim and all(n % 2 == 0 for n in model.rope_split(head_dim))


# ---- LoRA ------------------------------------------------------------------------------------------------------------


def with_lora(alpha: float = 8.0, layers: str = "attn+ffn", rank: int = 4) -> DiT:
    net = make()
    model.add_lora(net, rank, alpha, layers)
    for layer in model.lora_linears(net).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return net


@torch.no_grad()
@pytest.mark.parametrize("layers, count", [("attn", 16), ("attn+ffn", 20), ("all", 26)])
def test_a_fresh_lora_does_not_move(layers, count):
    """B = 0: the same output bit for bit; only the new parameters train, float32; adding twice raises."""
    net, (x, t, text) = make(), inputs()
    before, plain = len(list(net.parameters())), net(x, t, text)
    new = model.add_lora(net, 4, 8.0, layers)
    assert len(new) == 2 * count == len(list(net.parameters())) - before
    assert torch.equal(net(x, t, text), plain)
    assert all(p.dtype == torch.float32 for p in new) and {id(p) for p in net.parameters() if p.requires_grad} == {
        id(p) for p in new
    }
    with pytest.raises(ValueError, match="merge_lora"):
        model.add_lora(net, 4, 8.0, layers)


@torch.no_grad()
def test_lora_off_and_merge():
    """Off is the base, and after the block it is on again, even after an error; merged equals unmerged; W + α/r·BA."""
    net, (x, t, text) = with_lora(), inputs()
    with model.lora_off(net):
        off = net(x, t, text)
    on = net(x, t, text)
    assert not torch.allclose(on, off, atol=1e-3)
    with pytest.raises(RuntimeError), model.lora_off(net):
        raise RuntimeError
    assert torch.equal(net(x, t, text), on)
    q = net.blocks[0].self_attn.q
    expected = q.weight + 8 / 4 * q.lora_B @ q.lora_A
    model.merge_lora(net)
    assert torch.allclose(q.weight, expected, atol=1e-6)
    assert (net(x, t, text) - on).abs().max() < 1e-6 * max(1, on.abs().max().item()) * 10
    assert not model.lora_linears(net) and not any("lora" in name for name in net.state_dict())


@torch.no_grad()
def test_lora_file(tmp_path):
    """The key format that other programs read, α/r folded into B, and back: the same output."""
    net, (x, t, text) = with_lora(alpha=6.0), inputs()
    model.export_lora(net, tmp_path / "lora.safetensors", task="test")
    tensors = load_file(tmp_path / "lora.safetensors")
    assert (
        set(tensors) == {f"diffusion_model.{name}.lora_{x}.weight" for name in model.lora_linears(net) for x in "AB"}
        and "diffusion_model.blocks.1.cross_attn.k.lora_A.weight" in tensors
    )
    layer = net.blocks[0].ffn[2]
    assert torch.equal(tensors["diffusion_model.blocks.0.ffn.2.lora_B.weight"], layer.lora_B * 1.5)
    assert tensors["diffusion_model.blocks.0.ffn.2.lora_A.weight"].shape == (4, 56)
    assert all(a.dtype == torch.float32 for a in tensors.values())
    expected = net(x, t, text)
    with model.lora_off(net):
        base = net(x, t, text)
    torch.manual_seed(0)
    again = make()
    assert torch.equal(again(x, t, text), base)
    model.load_lora(again, tmp_path / "lora.safetensors")
    assert torch.allclose(again(x, t, text), expected, atol=1e-6)
    model.merge_lora(again)
    assert torch.allclose(again(x, t, text), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_header(dtype, tmp_path):
    """Rank, the alpha that stands in B, dtype, layers and provenance; the tensors are rounded once, after folding."""
    net, path = with_lora(alpha=6.0), tmp_path / "lora.safetensors"
    model.export_lora(net, path, dtype, task="test")
    with safe_open(path, "pt") as file:
        assert list(file.metadata()) == ["dynamicsboost"]
        told = json.loads(file.metadata()["dynamicsboost"])
    layers = "cross_attn.k,cross_attn.o,cross_attn.q,cross_attn.v,ffn.0,ffn.2,"
    layers += "self_attn.k,self_attn.o,self_attn.q,self_attn.v"
    name = str(dtype).removeprefix("torch.")
    assert told == {"rank": "4", "alpha": "6", "dtype": name, "layers": layers, "task": "test"}
    tensors = load_file(path)
    assert {a.dtype for a in tensors.values()} == {dtype}
    layer = net.blocks[1].ffn[0]
    assert torch.equal(tensors["diffusion_model.blocks.1.ffn.0.lora_B.weight"], (layer.lora_B * 1.5).to(dtype))


def test_lora_file_is_the_same_bytes_each_time(tmp_path):
    """Its sha256 stands in a manifest: the same LoRA and provenance must give the same file."""
    net = with_lora()
    files = set()
    for _ in range(12):
        model.export_lora(net, tmp_path / "lora.safetensors", base="b", sft="s", task="asymdpo")
        files.add((tmp_path / "lora.safetensors").read_bytes())
    assert len(files) == 1


def test_lora_files_that_do_not_fit(tmp_path):
    """One line that names the file: a foreign key, a wrong shape, half a pair, no tensor, no file, damage."""
    path = tmp_path / "lora.safetensors"
    model.export_lora(with_lora(), path)
    good = load_file(path)
    name = "diffusion_model.blocks.0.self_attn.q.lora_"
    for wrong in (
        good | {"lora_unet_blocks_0.alpha": torch.ones(1)},
        good | {f"{name}A.weight": torch.zeros(4, 41)},
        {k: v for k, v in good.items() if k != f"{name}B.weight"},
        good | {f"{name}A.weight": torch.zeros(5, 40)},  # rank 5 beside B of rank 4
        {},
    ):
        save_file(wrong, path)
        with pytest.raises(UserError, match="lora.safetensors: expected a LoRA"):
            model.load_lora(make(), path)
    save_file(good, path)
    cut(path)
    for _ in range(2):
        with pytest.raises(UserError, match="lora.safetensors: expected a (readable safetensors|LoRA's) file"):
            model.load_lora(make(), path)
        path.unlink(missing_ok=True)


def test_task_prompt_file(tmp_path):
    """Prompts go to a file of their own and come back bit for bit, with their place."""
    net = model.add_task_prompt(make(), FRAMES, "frame")
    torch.nn.init.normal_(net.task_prompt.cond)
    torch.nn.init.normal_(net.task_prompt.noisy)
    model.save_task_prompt(net, tmp_path / "task_prompt.safetensors")
    assert set(load_file(tmp_path / "task_prompt.safetensors")) == {"task_prompt.cond", "task_prompt.noisy"}
    again = model.load_task_prompt(make(), tmp_path / "task_prompt.safetensors")
    assert again.task_prompt.where == "frame"
    assert torch.equal(again.task_prompt.cond, net.task_prompt.cond) and torch.equal(
        again.task_prompt.noisy, net.task_prompt.noisy
    )


def test_task_prompt_files_that_do_not_fit(tmp_path):
    """A file of something else, without its place, of another width or with half of it: one line that names it."""
    path, net = tmp_path / "task_prompt.safetensors", make()
    good = {f"task_prompt.{part}": torch.zeros(FRAMES, 40) for part in ("cond", "noisy")}
    lora = {f"transformer.blocks.{i}.lora_A.weight": torch.zeros(4, 40) for i in range(99)}
    for tensors, header in (
        (good, None),
        (good, {"where": "everywhere"}),
        (good | {"more": torch.zeros(1)}, {"where": "frame"}),
        ({"task_prompt.cond": torch.zeros(FRAMES, 40)}, {"where": "frame"}),
        ({name: torch.zeros(FRAMES, 48) for name in good}, {"where": "frame"}),
        ({name: torch.zeros(()) for name in good}, {"where": "frame"}),
        (lora, {"format": "pt"}),
        ({}, None),
    ):
        save_file(tensors, path, header)
        with pytest.raises(UserError, match="task_prompt.safetensors: expected task prompts") as caught:
            model.load_task_prompt(net, path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 and net.task_prompt is None
    save_file(good, path, {"where": "frame"})
    assert model.load_task_prompt(net, path).task_prompt.where == "frame"


# ---- files -----------------------------------------------------------------------------------------------------------


def test_model_files_come_back_bitwise(tmp_path):
    net = make()
    assert model.save_model(net, tmp_path) == ["config.json", model.WEIGHTS_NAME]
    again = model.load_model(tmp_path)
    assert again.config == net.config and not any(p.requires_grad for p in again.parameters())
    assert again.state_dict().keys() == net.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), net.state_dict().values(), strict=True))
    x, t, text = inputs()
    with torch.no_grad():
        assert torch.equal(again(x, t, text), net(x, t, text))
    assert model.load_model(tmp_path, torch.bfloat16).head.head.weight.dtype == torch.bfloat16


def test_a_folder_in_wans_layout(tmp_path):
    """Wan's config.json has keys of its own and lacks patch_size and text_dim; its 14B weights lie in several files."""
    config = DiTConfig(40, 56, 2, 2, text_len=24, freq_dim=32)
    net = make(config)
    ours = {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "model_type": "t2v",
        "dim": 40,
        "eps": 1e-06,
        "ffn_dim": 56,
    }
    more = {"freq_dim": 32, "in_dim": 16, "num_heads": 2, "num_layers": 2, "out_dim": 16, "text_len": 24}
    (tmp_path / "config.json").write_text(json.dumps(ours | more))
    state = net.state_dict()
    names = list(state)
    for k, part in enumerate((names[::2], names[1::2])):
        save_file({n: state[n] for n in part}, tmp_path / f"diffusion_pytorch_model-0000{k + 1}-of-00002.safetensors")
    again = model.load_model(tmp_path)
    assert again.config == config and all(torch.equal(again.state_dict()[n], state[n]) for n in names)


def test_a_base_with_task_prompts_is_refused(tmp_path):
    """Where they are added is not in the file: task prompts have a file of their own."""
    model.save_model(model.add_task_prompt(make(), FRAMES), tmp_path)
    with pytest.raises(UserError, match="task_prompt.cond: expected no such tensor, got \\(5, 40\\)"):
        model.load_model(tmp_path)


def damaged(folder, what):
    weights = folder / model.WEIGHTS_NAME
    if what in ("wrong shape", "missing tensor", "extra tensor", "image to video"):
        tensors = load_file(weights)
        name = "blocks.1.ffn.0.weight"
        tensors = {k: v for k, v in tensors.items() if what != "missing tensor" or k != name}
        tensors |= {"wrong shape": {name: torch.zeros(3, 40)}, "extra tensor": {"extra.proj": torch.zeros(2)},
                    "image to video": {"img_emb.proj": torch.zeros(2)}}.get(what, {})  # fmt: skip
        save_file(tensors, weights)
    elif what == "truncated file":
        cut(weights)
    elif what == "damaged header":
        flip_bit(weights, 0.0)
    elif what == "no config.json":
        (folder / "config.json").unlink()
    elif what == "no weights":
        weights.unlink()
    elif what == "config.json cut":
        cut(folder / "config.json")
    elif what == "config.json of another model":
        config = json.loads((folder / "config.json").read_text())
        config["dim"] = 48
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "what, words",
    [
        ("wrong shape", "blocks.1.ffn.0.weight: expected \\(56, 40\\), got \\(3, 40\\)"),
        ("missing tensor", "blocks.1.ffn.0.weight: expected \\(56, 40\\), got nothing"),
        ("extra tensor", "extra.proj: expected no such tensor"),
        ("image to video", "expected text-to-video weights, got image-to-video ones"),
        ("truncated file", "diffusion_pytorch_model.safetensors: expected readable"),
        ("damaged header", "diffusion_pytorch_model.safetensors: expected readable"),
        ("no config.json", "config.json: expected num_heads"),
        ("no weights", "expected weights, \\*.safetensors or the path of a .pth file, but it has none"),
        ("config.json cut", "config.json"),
        ("config.json of another model", "config.json: says dim = 48, but the tensors beside it are for 40"),
        ("no folder", "expected weights, .*does not exist"),
    ],
)
def test_model_folders_that_do_not_fit(what, words, tmp_path):
    """One line that names the folder or file, and the tensor."""
    folder = tmp_path / "base"
    if what != "no folder":
        model.save_model(make(), folder)
    damaged(folder, what)
    with pytest.raises(UserError, match=words) as caught:
        model.load_model(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_lora_header_tells_rank_and_task(tmp_path):
    model.export_lora(with_lora(), tmp_path / "lora.safetensors", base="somewhere", task="sft")
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        said = " ".join(f"{k}={v}" for k, v in file.metadata().items())
    assert "rank" in said and "4" in said and "sft" in said and "somewhere" in said


def test_initialisation_is_a_function_of_the_seed():
    """And leaves the global generator alone: nothing else in a run moves with it."""
    nets = [DiT(CONFIG) for _ in range(3)]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, two, other = (
        model.init_from_scratch(net, seed).state_dict() for net, seed in zip(nets, (0, 0, 1), strict=True)
    )
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert sum(not torch.equal(one[k], other[k]) for k in one) > 20

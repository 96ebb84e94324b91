"""The network beside its golden: per-frame times, given frames, LoRA, files, Wan's names and sizes, dtypes, cost."""

import copy
import dataclasses
import functools
import json
import shutil
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers import cut, flip_bit, refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import model
from bench import rounding
from model import DiT, DiTConfig
from runtime.group import Group, place

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
@pytest.mark.parametrize("where", ["text", "frame"])
def test_task_prompts(where):
    """Given frames see time 0. Zero prompts change nothing; others move the output, each table where its frames are.

    Without cond_mask they are off; with nothing given and zero prompts it is the text-to-video model.
    """
    net, (x, t, text) = make(), inputs()
    plain, given, nothing = net(x, t, text), masks(2, 4), masks(0, 0)
    at_time_0 = net(x, t[:, None] * ~given, text)
    assert close(net(x, t, text, given), at_time_0) and close(net(x, t, text, nothing), plain)
    model.add_task_prompt(net, FRAMES, where)
    assert close(net(x, t, text, given), at_time_0) and close(net(x, t, text, nothing), plain)
    torch.nn.init.normal_(net.task_prompt.cond)
    assert close(net(x, t, text, nothing), plain) and not close(net(x, t, text, given), at_time_0)
    torch.nn.init.normal_(net.task_prompt.noisy)
    assert not close(net(x, t, text, nothing), plain) and torch.equal(net(x, t, text), plain)


@torch.no_grad()
def test_prompts_in_the_context_take_the_last_padding_slots():
    """They are added to the embedded text's last F slots, which a text of up to text_len − F tokens leaves free."""
    net, (x, t, text) = make(), inputs()
    seen = []
    net.blocks[0].cross_attn.k.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
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
    for name, *arguments in (
        ("x_t", x[:, :3], t, text),
        ("x_t", x[..., :5], t, text),
        ("t", x, t[:1], text),
        ("t", x, t[:, None].repeat(1, 3), text),
        ("t", x, t[:, None].repeat(1, FRAMES), text, masks(1, 2)),
        ("text", x, t, text[..., :5]),
        ("text", x, t, torch.zeros(2, 25, 12)),
        ("cond_mask", x, t, text, masks(1, 2).int()),
        ("cond_mask", x, t, text, masks(1)),
    ):
        refused(f"^{name}: expected", net, *arguments, kind=ValueError)


# ---- places in space and time ----------------------------------------------------------------------------------------

TINY = model.PRESETS["tiny"]


def moved(x: torch.Tensor, how: str) -> torch.Tensor:
    """x (B, C, F, H, W) with its tokens in another order. Each is its own inverse, as far as a network can tell."""
    axis = {"frames": 2, "rows": 3, "columns": 4}.get(how)
    return x.flip(axis) if axis else x.transpose(3, 4)


@torch.no_grad()
@pytest.mark.parametrize("how", ["frames", "rows", "columns", "rows for columns"])
def test_every_axis_has_places(how, monkeypatch):
    """Of the tiny network on several tokens a frame, where the demo has one: frames, rows and columns are told apart.

    By RoPE alone: without its turns, and frames' embedding, the output moves with the input.
    """
    net = make(dataclasses.replace(TINY, frames=0))
    x, t, text = torch.randn(2, 28, 3, 4, 2), torch.rand(2), torch.randn(2, 5, 32)
    difference = (net(moved(x, how), t, text) - moved(net(x, t, text), how)).abs().max()
    assert difference > 0.01
    flat = torch.zeros_like(model.rope_table(32, (3, 4, 2), "cpu"))
    flat[:, ::2] = 1  # cos 0, sin 0
    monkeypatch.setattr(model, "rope_table", lambda *_: flat)
    net._rope.clear()
    assert close(net(moved(x, how), t, text), moved(net(x, t, text), how))


def known_frames(frames: int = FRAMES) -> DiT:
    return make(dataclasses.replace(CONFIG, frames=frames))


@torch.no_grad()
def test_frame_embedding():
    """A row for each latent frame, added to all of its tokens; zeros are none; more frames than rows are refused."""
    net, (x, t, text) = known_frames(), inputs()
    plain = make()
    plain.load_state_dict({k: a for k, a in net.state_dict().items() if k != "frame_embedding"})
    assert not close(net(x, t, text), plain(x, t, text))
    seen = []
    for one in (net, plain):
        one.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        one(x, t, text)
        one(x[:, :, :2], t, text)
    for with_rows, without in zip(seen[:2], seen[2:]):
        added = (with_rows - without).unflatten(1, (-1, 6)) - net.frame_embedding[: with_rows.shape[1] // 6, None]
        assert added.abs().max() < 1e-5
    net.frame_embedding.zero_()
    assert torch.equal(net(x, t, text), plain(x, t, text))
    longer = torch.cat([x, x[:, :, :1]], 2)
    refused("at most 5 latent frames, which this model knows, got 6", net, longer, t, text, kind=ValueError)
    assert plain(longer, t, text).shape == longer.shape


def test_without_frame_embedding_it_is_wans_network(tmp_path):
    """Names and configuration: nothing in a checkpoint tells of an option that Wan does not have."""
    assert [config.frames for config in model.PRESETS.values()] == [13, 0, 0, 0]
    net = make()
    assert "frame_embedding" not in net.state_dict()
    assert net.state_dict().keys() | {"frame_embedding"} == known_frames().state_dict().keys()
    for one in (net, known_frames()):
        model.save_model(one, tmp_path)
        assert "frames" not in json.loads((tmp_path / "config.json").read_text())


def test_frame_embedding_is_a_part_of_the_base(tmp_path):
    """Trained with the network, written and read with it, float32 in bfloat16, frozen under a LoRA, kept by a merge."""
    net, (x, t, text) = known_frames(), inputs()
    net(x, t, text).sum().backward()
    assert net.frame_embedding.grad.abs().sum() > 0
    model.save_model(net, tmp_path)
    again = model.load_model(tmp_path, torch.bfloat16)
    assert again.config == net.config and torch.equal(again.frame_embedding, net.frame_embedding)
    model.add_lora(again, 4, 4, "all")
    assert not again.frame_embedding.requires_grad
    assert not any("frame_embedding" in name for name in model.trained_lora(again))
    merged = model.merge_lora(model.load_model(tmp_path))
    assert torch.equal(merged.frame_embedding, net.frame_embedding)
    change_tensors(tmp_path, frame_embedding=torch.zeros(FRAMES, 41))
    refused("frame_embedding: expected \\(5, 40\\), got \\(5, 41\\)", model.load_model, tmp_path, kind=ValueError)


# ---- cost ------------------------------------------------------------------------------------------------------------


def spy_on_ops(monkeypatch) -> list:
    """The name and the tensors of each call of a fused op from now on."""
    calls = []
    for name in ("ln_modulate", "residual_ln_modulate", "gate_residual"):
        original = getattr(model, name)

        def spy(*args, name=name, original=original):
            calls.append((name, [a for a in args if torch.is_tensor(a)]))
            return original(*args)

        monkeypatch.setattr(model, name, spy)
    return calls


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, FRAMES])
def test_modulation_is_never_expanded_to_tokens(rows, monkeypatch):
    """The tables that reach the kernels have 1, 2 or F rows, not one a token; the time network runs on as many."""
    net, (x, t, text), calls, seen = make(), inputs(), spy_on_ops(monkeypatch), []
    net.time_projection.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    net(x, t if rows < 3 else t[:, None].repeat(1, FRAMES), text, masks(1, 2) if rows == 2 else None)
    for _, (stream, *rest) in calls:
        seen += [a.shape[1] for a in rest if a.ndim == 3 and a.shape != stream.shape]
    assert len(seen) > 10 and set(seen) == {rows}


def test_compiled_blocks(monkeypatch):
    """--compile: no graph break, and the outputs and gradients of eager blocks, also where they are recomputed.

    By the tracing that torch.compile does for every backend; Inductor's C++ takes a minute.
    """
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    net, args, found = with_lora(layers="attn"), inputs(), []
    net.gradient_checkpointing = True
    for compiled in (False, True):
        place(net, SimpleNamespace(shard=False, compile=compiled), Group())
        out = net(*args)
        out.square().mean().backward()
        found.append([out, *(p.grad for p in net.parameters() if p.requires_grad)])
        net.zero_grad()
    assert all(close(a, b) for a, b in zip(*found, strict=True))


def test_inference_mode_leaves_a_network_that_can_be_trained():
    """What a forward remembers, the RoPE table, is no tensor of inference mode."""
    net = with_lora()
    with torch.inference_mode():
        net(*inputs())
    net(*inputs()).sum().backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


def test_gradient_checkpointing_changes_nothing():
    """Outputs and every gradient are those of the plain run."""
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        net = make()
        net.gradient_checkpointing = checkpointing
        v = net(*inputs(), masks(1, 3))
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
    calls, stream, added = spy_on_ops(monkeypatch), set(), set()
    net.blocks[0].ffn[0].register_forward_pre_hook(lambda _, args: added.add(args[0].dtype))
    v = net(x, t, text)
    for name, tensors in calls:
        dtypes = [a.dtype for a in tensors if a.is_floating_point()]
        if name != "ln_modulate":
            added.add(dtypes.pop(1))
        stream.update(dtypes)
    assert v.dtype == torch.float32 and stream == {torch.float32} and added == {torch.bfloat16}
    assert 0 < (v - exact).abs().max() < 0.1 * exact.abs().max()


# ---- Wan's sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset, parameters, tensors", [("1.3b", 1_418_996_800, 825), ("14b", 14_288_491_584, 1095)])
def test_sizes_are_wans(preset, parameters, tensors):
    """Counts of the published checkpoints, on the meta device. The golden's weights hold the names."""
    with torch.device("meta"):
        state = DiT(model.PRESETS[preset]).state_dict()
    assert sum(p.numel() for p in state.values()) == parameters and len(state) == tensors


def test_rope_split():
    """Wan's 128 channels a head turn as 44, 42, 42; every split adds up and is even."""
    assert model.rope_split(128) == (44, 42, 42)
    for head_dim in (8, 16, 20, 24, 32, 64, 96):
        assert sum(model.rope_split(head_dim)) == head_dim and all(n % 2 == 0 for n in model.rope_split(head_dim))


# ---- LoRA ------------------------------------------------------------------------------------------------------------


def with_lora(alpha: float = 8.0, layers: str = "attn+ffn", rank: int = 4) -> DiT:
    net = make()
    model.add_lora(net, rank, alpha, layers)
    for term in model.trained_lora(net).values():
        torch.nn.init.normal_(term.B, std=0.1)
    return net


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers, count", [("attn", 16), ("attn+ffn", 20), ("all", 26)])
def test_a_fresh_lora_does_not_move(layers, count, dtype):
    """B = 0: on and off are the same bits, for a first LoRA and one on top; only the new, in float32, is trained."""
    net, (x, t, text) = model.cast(make(), dtype), inputs()
    before, plain = len(list(net.parameters())), net(x, t, text)
    for lora in range(2):
        new = model.add_lora(net, 4, 8.0, layers)
        assert len(new) == 2 * count == len(list(net.parameters())) - before
        assert all(p.dtype == torch.float32 for p in new)
        assert {id(p) for p in net.parameters() if p.requires_grad} == {id(p) for p in new}
        on = net(x, t, text)
        with model.lora_off(net):
            assert torch.equal(net(x, t, text), on)
        if lora == 0:
            assert dtype == torch.bfloat16 or close(on, plain)
            before += 2 * count
            for term in model.trained_lora(net).values():
                torch.nn.init.normal_(term.B, std=0.1)


def test_a_fresh_lora_adds_no_other_operation():
    """On and off, what is added to a sum is added by the same operations: on a GPU, a product alone and one that adds
    to a zero need not be the same kernel.
    """
    net, args = with_lora(layers="attn"), inputs()
    model.add_lora(net, 4, 4, "attn")

    class Additions(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, given, named=None):
            if operation is torch.ops.aten.addmm_.default:
                seen.append([tuple(a.shape) for a in given])
            return operation(*given, **(named or {}))

    seen = on = []
    with Additions():
        net(*args)
    seen = off = []
    with Additions(), model.lora_off(net):
        net(*args)
    assert on == off and len(on) == 2 * 16  # the older term and x Wᵀ, in each layer


@torch.no_grad()
@pytest.mark.parametrize("below", [0, 3e-3])
@pytest.mark.parametrize("size, off", [(3e-5, 0.1), (3e-4, 0.01)])
def test_a_small_term_counts_in_bfloat16(size, off, below):
    """On minus off is the term, all of it, and rounding that knows nothing of it: of a B of this size, alone or on top
    of a frozen term. Added to a rounded x Wᵀ, it would lose what lies under the last bit.
    """
    layer, x = model.Linear(256, 256).bfloat16(), torch.randn(2, 4096, 256).bfloat16()
    for std in (below, size) if below else (size,):
        term = model.LowRank(torch.randn(16, 256) / 16, torch.randn(256, 16) * std, 1.0)
        layer.lora.append(term)
    with AsOnHopper():
        on, term.on = layer(x), False
        change = on - layer(x)
    truth = x.double() @ term.A.double().T @ term.B.double().T
    assert abs(rounding.kept(change, truth) - 1) < off


class AsOnHopper(TorchDispatchMode):
    """A product that adds to what is there rounds before it adds, as cuBLAS does on an H100 (CUDA 13.0)."""

    def __torch_dispatch__(self, operation, types, given, named=None):
        if operation is torch.ops.aten.addmm_.default:
            y, a, b = given
            return y.add_(a @ b)
        return operation(*given, **(named or {}))


@pytest.mark.parametrize("trained", ["weight", "bias", ""])
def test_one_product_has_the_gradients_of_many(trained, monkeypatch):
    """In bfloat16, of the input, of the newest of two terms and of what else is trained, beside float64's.

    Its rows are of whole 16 bytes, whatever the ranks.
    """
    linear, sizes = model.F.linear, set()
    monkeypatch.setattr(model.F, "linear", lambda x, *rest: sizes.add(x.shape[1]) or linear(x, *rest))
    layer, x = model.Linear(64, 48).bfloat16().requires_grad_(False), torch.randn(2, 96, 64).bfloat16().requires_grad_()
    for rank in (8, 5):
        layer.lora.requires_grad_(False)
        layer.lora.append(model.LowRank(torch.randn(rank, 64) / 8, torch.randn(48, rank) / 8, 0.5))
    if trained:
        layer.get_parameter(trained).requires_grad_()
    exact, upstream = copy.deepcopy(layer).double(), torch.randn(2, 96, 48).bfloat16()
    found = []
    for net, given in ((layer, x), (exact, x.detach().double().requires_grad_())):
        wanted = [given, *(p for p in net.parameters() if p.requires_grad)]
        found.append(torch.autograd.grad(net(given), wanted, upstream.to(given.dtype)))
    for ours, expected in zip(*found, strict=True):
        assert (ours.double() - expected).norm() < 0.01 * expected.norm()
    assert sizes == {64, 80}


@torch.no_grad()
def test_a_small_lora_counts_in_bfloat16():
    """The same of policy and reference, networks of six layers: half of it was lost, added to a rounded product."""
    truth, ours = ([rounding.moved(s, 3e-4, dtype) for s in range(3)] for dtype in (torch.float32, torch.bfloat16))
    with mock.patch.object(model.Linear, "forward", rounding.rounded_first):
        usual = [rounding.moved(s, 3e-4, torch.bfloat16) for s in range(3)]
    assert all(abs(rounding.kept(a, b) - 1) < 0.2 for a, b in zip(ours, truth))
    assert all(rounding.kept(a, b) < 0.7 for a, b in zip(usual, truth))


@torch.no_grad()
def test_bfloat16_keeps_what_wan_keeps_in_float32():
    """Times and modulation are float32's; with the head, the velocity's error falls by a quarter at least."""
    net, (x, t, text) = make(), inputs(8)
    exact, (time, table, _) = net(x, t, text), net._time(t, None)
    net = model.cast(net, torch.bfloat16)
    for ours, expected in zip(net._time(t, None), (time, table)):
        assert torch.equal(ours, expected)
    assert {p.dtype for p in net.blocks[0].self_attn.q.parameters()} == {torch.bfloat16}
    kept, all_bfloat16 = net(x, t, text), net.bfloat16()(x, t, text)
    assert (kept - exact).norm() < 0.75 * (all_bfloat16 - exact).norm()


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
    expected = q.weight + 8 / 4 * q.lora[0].B @ q.lora[0].A
    refused("expected float32 weights", model.merge_lora, model.cast(with_lora(), torch.bfloat16), kind=ValueError)
    model.merge_lora(net)
    assert torch.allclose(q.weight, expected, atol=1e-6)
    assert (net(x, t, text) - on).abs().max() < 1e-6 * max(1, on.abs().max().item()) * 10
    assert not any("lora" in name for name in net.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_file(dtype, tmp_path):
    """The keys that other programs look for, with α/r folded into B and one rounding after; and back.

    The header has the rank, the alpha that stands in B, the dtype, the layers and what the caller says of its origin.
    """
    net, (x, t, text), path = with_lora(alpha=6.0), inputs(), tmp_path / "lora.safetensors"
    lora = model.trained_lora(net)
    model.export_lora(lora, path, dtype, task="test")
    tensors = load_file(path)
    assert set(tensors) == {f"diffusion_model.{name}.lora_{x}.weight" for name in lora for x in "AB"}
    for name, term in lora.items():
        assert torch.equal(tensors[f"diffusion_model.{name}.lora_A.weight"], term.A.to(dtype))
        assert torch.equal(tensors[f"diffusion_model.{name}.lora_B.weight"], (term.B * 1.5).to(dtype))
    with safe_open(path, "pt") as file:
        assert list(file.metadata()) == ["dynamicsboost"]
        told = json.loads(file.metadata()["dynamicsboost"])
    attention = [f"{attn}.{x}" for attn in ("cross_attn", "self_attn") for x in "koqv"]
    assert told.pop("layers").split(",") == sorted([*attention, "ffn.0", "ffn.2"])
    assert told.pop("sha256")
    assert told == {"rank": "4", "alpha": "6", "dtype": str(dtype).removeprefix("torch."), "task": "test"}
    if dtype == torch.float32:
        torch.manual_seed(0)
        again, expected = model.load_lora(make(), path), net(x, t, text)
        assert torch.allclose(again(x, t, text), expected, atol=1e-6)
        assert torch.allclose(model.merge_lora(again)(x, t, text), expected, atol=1e-5)


def test_lora_file_is_the_same_bytes_each_time(tmp_path):
    """Its sha256 stands in a manifest: the same LoRA and provenance must give the same file."""
    lora = model.trained_lora(with_lora())
    files = set()
    for _ in range(12):
        model.export_lora(lora, tmp_path / "lora.safetensors", base="b", sft="s", task="asymdpo")
        files.add((tmp_path / "lora.safetensors").read_bytes())
    assert len(files) == 1


def test_a_lora_file_knows_its_damage(tmp_path):
    """A changed bit in a tensor, or in what the header says, is told. A file without a checksum is read as it is."""
    path = tmp_path / "lora.safetensors"
    model.export_lora(model.trained_lora(with_lora()), path, attention="prefix", beneath=["0" * 64])
    tensors, told, found = model.read_lora_file(path)
    raw, told_at = path.read_bytes(), path.read_bytes().index(b"prefix")
    for at in (told_at, raw.index(b"0000"), *range(len(raw) // 2, len(raw), len(raw) // 20), len(raw) - 1):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        refused("lora.safetensors: its checksum .* damaged", model.load_lora, make(), path, kind=ValueError)
    path.write_bytes(raw)  # to which the tensors are mapped
    told.pop("sha256")
    save_file(tensors, path, {"dynamicsboost": json.dumps(told)})  # as up to 0.9
    assert model.read_lora_file(path)[1:] == (told, found)
    for header in ("[" * 9999, "[]", "{", '"x"'):
        save_file(tensors, path, {"dynamicsboost": header})
        refused("lora.safetensors: expected a readable LoRA, got", model.load_lora, make(), path, kind=ValueError)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_what_is_not_finite_is_refused(value, tmp_path):
    """By the file and the tensor, when it is read and when it is to be written; float8 and integers are looked at."""
    nets = {"model": make(), "lora": with_lora(), "task_prompt": model.add_task_prompt(make(), FRAMES)}
    write = {
        "model": lambda path: model.save_model(nets["model"], path.parent),
        "lora": lambda path: model.export_lora(model.trained_lora(nets["lora"]), path),
        "task_prompt": lambda path: model.save_task_prompt(nets["task_prompt"], path),
    }
    read = {"model": model.load_model, "lora": functools.partial(model.load_lora, make())}
    read["task_prompt"] = functools.partial(model.load_task_prompt, make())
    for kind, net in nets.items():
        path = tmp_path / (WEIGHTS if kind == "model" else f"{kind}.safetensors")
        write[kind](path)
        with safe_open(path, "pt") as file:
            tensors, header = load_file(path), file.metadata()
        name = max(tensors)
        tensors[name].view(-1)[-1] = value
        save_file(tensors, path, header and {k: v for k, v in header.items() if k != "dynamicsboost"})
        where = f"{path.name}: {name.replace('.', '.')}: expected numbers, got NaN or infinity"
        refused(where, read[kind], path if kind != "model" else tmp_path, kind=ValueError)
        path.unlink()
        for p in net.parameters():
            p.data.view(-1)[0] = value
        refused(f"{path.name}: .*: expected numbers, got NaN", write[kind], path, kind=ValueError)
        assert not path.exists()
    model.check_finite(torch.arange(3), "integers")
    model.check_finite(torch.ones(3).to(torch.float8_e4m3fn), "float8")
    refused(
        "float8", model.check_finite, torch.tensor([torch.nan]).to(torch.float8_e4m3fn), "float8: ", kind=ValueError
    )


def test_lora_files_that_do_not_fit(tmp_path):
    """One line that names the file: a foreign key, a wrong shape, half a pair, no tensor, a layer under two names, no
    file, damage.
    """
    path = tmp_path / "lora.safetensors"
    model.export_lora(model.trained_lora(with_lora()), path)
    good = load_file(path)
    name = "diffusion_model.blocks.0.self_attn.q.lora_"
    for wrong in (
        good | {"lora_unet_blocks_0.alpha": torch.ones(1)},
        good | {f"{name}A.weight": torch.zeros(4, 41)},
        {k: v for k, v in good.items() if k != f"{name}B.weight"},
        good | {f"{name}A.weight": torch.zeros(5, 40)},  # rank 5 beside B of rank 4
        good | {key.replace("diffusion_model", "transformer"): a.clone() for key, a in good.items()},
        {},
    ):
        save_file(wrong, path)
        refused("lora.safetensors: expected a LoRA", model.load_lora, make(), path, kind=ValueError)
    save_file(good, path)
    cut(path)
    for _ in range(2):
        refused("lora.safetensors: ", model.load_lora, make(), path, kind=ValueError)
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
    for one, other in zip(again.task_prompt.parameters(), net.task_prompt.parameters(), strict=True):
        assert torch.equal(one, other)


def test_task_prompts_of_0_4(tmp_path):
    """Their place on the text was called context."""
    tensors = {f"task_prompt.{part}": torch.ones(FRAMES, 40) for part in ("cond", "noisy")}
    save_file(tensors, tmp_path / "task_prompt.safetensors", {"where": "context"})
    assert model.load_task_prompt(make(), tmp_path / "task_prompt.safetensors").task_prompt.where == "text"


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
        refused("task_prompt.safetensors: expected task prompts", model.load_task_prompt, net, path, kind=ValueError)
        assert net.task_prompt is None
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
    assert model.load_model(tmp_path, torch.bfloat16).blocks[0].ffn[0].weight.dtype == torch.bfloat16


def test_wans_config(tmp_path):
    """Wan's config.json has keys of its own and lacks patch_size and text_dim."""
    config = DiTConfig(40, 56, 2, 2, text_len=24, freq_dim=32)
    model.save_model(make(config), tmp_path)
    wans = {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "model_type": "t2v", "dim": 40, "eps": 1e-06}
    wans |= {"ffn_dim": 56, "freq_dim": 32, "in_dim": 16, "num_heads": 2, "num_layers": 2, "out_dim": 16}
    (tmp_path / "config.json").write_text(json.dumps(wans | {"text_len": 24}))
    assert model.load_model(tmp_path).config == config


def test_a_base_with_task_prompts_is_refused(tmp_path):
    """Where they are added is not in the file: task prompts have a file of their own."""
    model.save_model(model.add_task_prompt(make(), FRAMES), tmp_path)
    refused("task_prompt.cond: expected no such tensor, got \\(5, 40\\)", model.load_model, tmp_path, kind=ValueError)


def change_tensors(folder, without="", **more):
    """Weights that lack a tensor, or have more or other ones."""
    tensors = load_file(folder / model.WEIGHTS_NAME)
    save_file({k: a for k, a in tensors.items() if k != without} | more, folder / model.WEIGHTS_NAME)


def other_config(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"dim": 40', '"dim": 48'))


NAME, WEIGHTS = "blocks.1.ffn.0.weight", "diffusion_pytorch_model.safetensors"
DAMAGE = {  # what is wrong -> how it comes about, words of the error
    "wrong shape": (
        lambda f: change_tensors(f, **{NAME: torch.zeros(3, 40)}),
        f"{NAME}: expected \\(56, 40\\), got \\(3, 40\\)",
    ),
    "missing tensor": (lambda f: change_tensors(f, NAME), f"{NAME}: expected \\(56, 40\\), got nothing"),
    "extra tensor": (lambda f: change_tensors(f, extra=torch.zeros(2)), "extra: expected no such tensor"),
    "image to video": (
        lambda f: change_tensors(f, **{"img_emb.proj": torch.zeros(2)}),
        "expected text-to-video weights, got image-to-video ones",
    ),
    "weights cut": (lambda f: cut(f / WEIGHTS), f"{WEIGHTS}: expected readable"),
    "damaged header": (lambda f: flip_bit(f / WEIGHTS, 0.0), f"{WEIGHTS}: expected readable"),
    "no config.json": (
        lambda f: (f / "config.json").unlink(),
        "config.json: expected num_heads, but there is no such file",
    ),
    "config.json cut": (lambda f: cut(f / "config.json"), "config.json"),
    "config.json too deep": (lambda f: (f / "config.json").write_text("[" * 9999), "config.json: .*nested too deeply"),
    "one tensor under two names": (
        lambda f: change_tensors(f, **{f"model.diffusion_model.{NAME}": torch.zeros(56, 40)}),
        f"expected each tensor once, found {NAME} twice",
    ),
    "config.json of another model": (
        other_config,
        "config.json: expected the sizes of its weights, dim 40 .*got 48 and 2",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "expected weights, \\*.safetensors, found none"),
    "no folder": (shutil.rmtree, "expected weights, .*does not exist"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_model_folders_that_do_not_fit(what, tmp_path):
    """One line that names the folder or file, and the tensor."""
    folder, (damage, words) = tmp_path / "base", DAMAGE[what]
    model.save_model(make(), folder)
    damage(folder)
    assert str(folder) in refused(words, model.load_model, folder, kind=ValueError)


def test_initialisation_is_a_function_of_the_seed():
    """And leaves the global generator alone: nothing else in a run moves with it."""
    nets, state = [DiT(CONFIG) for _ in range(3)], torch.get_rng_state()
    one, two, other = (model.init_from_scratch(net, seed).state_dict() for net, seed in zip(nets, (0, 0, 1)))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert sum(not torch.equal(one[k], other[k]) for k in one) > 20

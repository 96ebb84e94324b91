"""Wan2.1's parts on random weights: VAE, UMT5, checkpoints and LoRA files, against the original and its peers."""

import copy
import pickle
import shutil

import pytest
import torch
from helpers import close, cut, dit_inputs, golden, peak_memory, randomised, refused, theirs, trained_tokenizer
from safetensors.torch import save_file

import model
from wan import text, vae
from wan.checkpoint import write_checkpoint
from wan.export import diffusers_name, open_model
from wan.lora import read_lora


@pytest.mark.parametrize("build, count, names", [(vae.VAE, 126_892_531, 194), (text.UMT5, 5_680_910_336, 242)])
def test_sizes_are_wans(build, count, names):
    with torch.device("meta"):
        net = build()
    assert (sum(p.numel() for p in net.parameters()), len(net.state_dict())) == (count, names)


# ---- VAE -------------------------------------------------------------------------------------------------------------


def golden_vae(folder) -> tuple[vae.VAE, dict]:
    """The original's weights, read from a folder like the release's, and its outputs."""
    weights, tensors, _ = golden("vae")
    torch.save(weights, folder / "Wan2.1_VAE.pth")
    return vae.load_vae(folder), tensors


@pytest.mark.parametrize("streaming", [True, False])
def test_vae_golden(streaming, tmp_path):
    """Wan's own outputs, to 1e-5 (its decoder does not clamp)."""
    net, tensors = golden_vae(tmp_path)
    assert (net.encode(tensors["video"], streaming) - tensors["z"]).abs().max() < 1e-5
    assert (net.decode(tensors["z"], streaming) - tensors["decoded"].clamp(-1, 1)).abs().max() < 1e-5


def test_vae_is_causal_bit_for_bit(tmp_path):
    """A prefix's latents are the prefix of the latents; what is decoded does not depend on what comes later."""
    net, tensors = golden_vae(tmp_path)
    video, z = tensors["video"], tensors["z"]
    whole, decoded = net.encode(video), net.decode(z)
    for k in range(1, z.shape[2]):
        pixels = 4 * (k - 1) + 1
        assert torch.equal(net.encode(video[:, :, :pixels]), whole[:, :, :k])
        later = torch.cat([z[:, :, :k], torch.randn_like(z[:, :, k:])], 2)
        assert torch.equal(net.decode(later)[:, :, :pixels], decoded[:, :, :pixels])


@pytest.mark.parametrize("shape", [(1, 3, 6, 16, 16), (1, 3, 5, 12, 16), (1, 4, 5, 16, 16), (3, 5, 16, 16)])
def test_vae_refuses(shape):
    """Lengths that are not 4k+1 lose their end in the original, silently: here they are refused."""
    refused(r"video: expected \(B, 3, 4k\+1, 8a, 8b\)", vae.VAE(base_dim=4).encode, torch.zeros(shape), kind=ValueError)


@pytest.mark.parametrize("base_dim, frames, size", [(4, 1, (16, 24)), (8, 5, (24, 16)), (6, 49, (8, 16))])
def test_vae_against_diffusers(base_dim, frames, size, tmp_path):
    """Its folder is read as it is; encode and decode agree in float32."""
    diffusers = pytest.importorskip("diffusers")
    peer = randomised(diffusers.AutoencoderKLWan(base_dim=base_dim, z_dim=16), base_dim)
    peer.save_pretrained(tmp_path / "vae")
    ours = vae.load_vae(tmp_path)
    video = torch.rand(1, 3, frames, *size) * 2 - 1
    with torch.no_grad():
        mean = peer.encode(video).latent_dist.mode()
        decoded = peer.decode(mean).sample.clamp(-1, 1)
    x0 = ours.encode(video)
    assert close(x0 * ours.std + ours.mean, mean)
    assert (ours.decode(x0) - decoded).abs().max() < 1e-4


# ---- UMT5 ------------------------------------------------------------------------------------------------------------


def test_umt5_golden(tmp_path):
    """Wan's own outputs, to 1e-5; a text that is not padded gives what it gives padded."""
    weights, tensors, _ = golden("umt5")
    torch.save(weights, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    net = text.load_umt5(tmp_path, torch.float32)
    ids, mask, out = tensors["ids"], tensors["mask"], tensors["out"]
    assert (net(ids, mask) - out).abs().max() < 1e-5
    for i, length in enumerate(mask.sum(1).tolist()):
        alone = net(ids[i : i + 1, :length], mask[i : i + 1, :length])
        assert (alone - out[i, :length]).abs().max() < 1e-5


@pytest.mark.parametrize("heads, width, layers, length", [(2, 8, 1, 5), (4, 4, 3, 200), (3, 8, 2, 512)])
def test_umt5_against_transformers(heads, width, layers, length, tmp_path):
    """Its folder is read as it is; states agree in float32, also past the distance where buckets are shared."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=50, d_model=24, d_kv=width, d_ff=40, num_layers=layers, num_heads=heads)
    config = transformers.UMT5Config(**sizes, feed_forward_proj="gated-gelu")
    peer = randomised(transformers.UMT5EncoderModel(config))
    peer.save_pretrained(tmp_path / "text_encoder")
    ours = text.load_umt5(tmp_path, torch.float32)
    ids, mask = torch.randint(0, 50, (2, length)), torch.ones(2, length, dtype=torch.long)
    mask[1, length // 2 :] = 0
    with torch.no_grad():
        expected = peer(ids, attention_mask=mask).last_hidden_state * mask[..., None]
    assert close(ours(ids, mask), expected)


# ---- text ------------------------------------------------------------------------------------------------------------


def test_tokenizer(tmp_path, capsys):
    """Ends with </s>; cleans as Wan does; what is too long is cut, </s> kept, and said."""
    reader = trained_tokenizer(tmp_path / "google/umt5-xxl/tokenizer.json")
    tokenizer = text.Tokenizer(tmp_path, max_len=16)
    plain = reader.encode("a red ball falls", add_special_tokens=False).ids + [1]
    assert tokenizer("a red ball falls") == plain and not capsys.readouterr().err
    assert tokenizer("  a \n red&amp;#32;ball \t falls ") == plain
    assert tokenizer("") == [1]
    long = tokenizer("a red ball falls " * 10)
    assert len(long) == 16 and long[-1] == 1 and "cut to 16" in capsys.readouterr().err


def test_a_tokenizer_of_another_model(tmp_path):
    trained_tokenizer(tmp_path / "tokenizer.json", ("<s>", "<pad>", "</s>", "<unk>"))
    refused("tokenizer.json: expected UMT5's tokenizer, .* got 1 and 2", text.Tokenizer, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    refused("tokenizer.json: expected a tokenizer", text.Tokenizer, tmp_path)
    refused("nowhere: expected a folder with UMT5's tokenizer.json, found none", text.Tokenizer, tmp_path / "nowhere")


def test_text_encoder(tmp_path):
    """Captions at their true length, from a folder in diffusers' layout; a vocabulary too large is named."""
    transformers = pytest.importorskip("transformers")
    trained_tokenizer(tmp_path / "tokenizer/tokenizer.json")
    captions = ["a red ball", "", "two balls meet the red ball"]
    for vocab in (60, 5):
        config = transformers.UMT5Config(vocab_size=vocab, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
        transformers.UMT5EncoderModel(config).save_pretrained(tmp_path / "text_encoder")
        encoder = text.TextEncoder(tmp_path, torch.float32)
        if vocab == 60:
            assert [s.shape for s in encoder.encode(captions)] == [(len(encoder.tokenizer(c)), 8) for c in captions]
    refused("expected a tokenizer of 5 tokens for this encoder", encoder.encode, captions)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def small_dit(**changes) -> model.DiT:
    sizes = dict(dim=40, ffn_dim=56, num_heads=2, num_layers=2, text_dim=12, text_len=9, freq_dim=32)
    return randomised(model.DiT(model.DiTConfig(**{**sizes, **changes})))


def diffusers_dit(heads: int = 2, width: int = 20, layers: int = 2):
    diffusers = pytest.importorskip("diffusers")
    sizes = dict(num_attention_heads=heads, attention_head_dim=width, num_layers=layers, ffn_dim=48, text_dim=12)
    net = diffusers.WanTransformer3DModel(**sizes, freq_dim=32, in_channels=16, out_channels=16, rope_max_seq_len=64)
    return randomised(net, heads)


# heads, head width (whose RoPE split is unequal), layers, latent frames, text tokens
@pytest.mark.parametrize(
    "heads, width, layers, frames, tokens", [(2, 20, 2, 1, 9), (1, 32, 1, 2, 3), (3, 14, 2, 13, 9)]
)
def test_dit_against_diffusers(heads, width, layers, frames, tokens, tmp_path):
    """Its folder is read as it is, one file and shards; outputs agree to 5e-5.

    Gradients of all parameters, against it in float64: within 1e-4 of their size, or twice its own error in float32.
    """
    peer = diffusers_dit(heads, width, layers)
    peer.save_pretrained(tmp_path / "one/transformer")
    peer.save_pretrained(tmp_path / "shards/transformer", max_shard_size="20KB")
    assert len(list((tmp_path / "shards/transformer").glob("*.safetensors"))) > 2
    ours, sharded = (model.load_model(tmp_path / name) for name in ("one", "shards"))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), sharded.parameters(), strict=True))
    inputs = dit_inputs(frames, tokens)
    one, two = ours.requires_grad_(True)(*inputs), theirs(peer, *inputs)
    assert close(one, two)
    weight = torch.randn_like(one)
    (one * weight).sum().backward(), (two * weight).sum().backward()
    exact = copy.deepcopy(peer).double()
    exact.zero_grad()
    (theirs(exact, *(a.double() for a in inputs)) * weight).sum().backward()
    gradients = [{model.wan_name(name): p.grad for name, p in net.named_parameters()} for net in (exact, peer)]
    exact, float32 = gradients
    for name, p in ours.named_parameters():
        error, allowed = ((g.double() - exact[name]).abs().max() for g in (p.grad, float32[name]))
        assert error < max(1e-4 * exact[name].abs().max(), 2 * allowed), name


def holds(path, net) -> bool:
    """Whether a checkpoint is net's, opened as the export opens it."""
    opened, source, names = open_model(path)
    return opened.config == net.config and all(torch.equal(source[names[k]], a) for k, a in net.state_dict().items())


def test_layouts_are_one_model(tmp_path):
    """Wan's names and ComfyUI's, one file without a folder, a .pth: the same tensors."""
    net = small_dit(num_heads=1, dim=128, ffn_dim=64, text_len=512)
    state = dict(net.state_dict())
    save_file(state, tmp_path / "plain.safetensors")
    save_file({f"model.diffusion_model.{k}": v for k, v in state.items()}, tmp_path / "comfy.safetensors")
    torch.save(state, tmp_path / "pickle.pth")
    for name in ("plain.safetensors", "comfy.safetensors", "pickle.pth"):
        assert holds(tmp_path / name, net)
        if name != "pickle.pth":
            again = model.load_model(tmp_path / name)
            assert again.config == net.config and all(torch.equal(a, state[k]) for k, a in again.state_dict().items())


def test_a_folder_with_one_pth(tmp_path):
    """Read if it is the only one and nothing else is there; of several, the one to take must be named."""
    net = small_dit()
    model.save_model(net, tmp_path)
    (tmp_path / model.WEIGHTS_NAME).unlink()
    torch.save(dict(net.state_dict()), tmp_path / "wan.pth")
    assert holds(tmp_path, net)
    torch.save({"a": torch.zeros(1)}, tmp_path / "Wan2.1_VAE.pth")
    refused("expected weights, .*path of a .pth file, but it has 2 .pth files", open_model, tmp_path)
    assert holds(tmp_path / "wan.pth", net)


class Evil:
    def __reduce__(self):
        return print, ("this must not run",)


def test_a_pickle_with_code_is_refused(tmp_path, capsys):
    """Like every other .pth that holds more than tensors, or none."""
    with open(tmp_path / "evil.pth", "wb") as f:
        pickle.dump({"patch_embedding.weight": Evil()}, f, protocol=2)
    torch.save({"patch_embedding.weight": Evil()}, tmp_path / "evil2.pth")
    torch.save({"step": 3}, tmp_path / "other.pth")
    (tmp_path / "page.pth").write_text("<html>Access denied")
    (tmp_path / "empty.pth").touch()
    torch.save({"a": torch.zeros(100)}, tmp_path / "cut.pth", _use_new_zipfile_serialization=False)
    cut(tmp_path / "cut.pth")
    words = {name: "(readable weights|tensors alone)" for name in ("page", "empty", "cut")}
    words |= {"evil": ".*refused", "evil2": ".*refused", "other": ".*names and tensors"}
    for name, expected in words.items():
        refused(f"{name}.pth: expected {expected}", open_model, tmp_path / f"{name}.pth")
    assert "must not run" not in capsys.readouterr().out


def test_shards_that_are_not_whole(tmp_path):
    """A shard that is missing, cut, or there twice is named, by the export and by what trains."""
    net = small_dit()
    model.save_model(net, tmp_path)
    (tmp_path / model.WEIGHTS_NAME).unlink()
    state, limit = net.state_dict(), sum(a.nbytes for a in net.parameters()) // 2
    names = write_checkpoint(tmp_path, {k: a.shape for k, a in state.items()}, state.get, torch.float32, limit)
    one, two, *_, index = (tmp_path / name for name in names)
    assert holds(tmp_path, net)
    shutil.copy(one, tmp_path / "another.safetensors")
    assert holds(tmp_path, net)  # what the index does not name is not read
    assert all(torch.equal(a, state[name]) for name, a in model.load_model(tmp_path).state_dict().items())
    index.rename(tmp_path / "index.bak")
    refused("keep one", open_model, tmp_path)
    (tmp_path / "index.bak").rename(index)
    (tmp_path / "blobs").mkdir()
    two.rename(tmp_path / "blobs/two")
    two.symlink_to("blobs/two")  # as in huggingface_hub's cache
    assert holds(tmp_path, net) and model.load_model(tmp_path)
    elsewhere = ("../other.safetensors", f"{tmp_path}/{one.name}", f"blobs/{two.name}", "..", "")
    for harm, words in (
        (lambda: cut(one), f"{one.name}: expected readable weights"),
        (two.unlink, f"{two.name} is missing"),
        (lambda: index.write_text("[]"), "index.json: expected a weight_map of shards"),
        (lambda: index.write_text('{"a":' * 9999), "index.json: expected a weight_map .*nested too deeply"),
        (lambda: index.write_text(f'{{"weight_map": {{"x": "{"x" * 300}"}}}}'), "x is missing"),
        *((lambda name=name: index.write_text(f'{{"weight_map": {{"x": "{name}"}}}}'),
           f"index.json: expected names of files beside it, got '{name}'") for name in elsewhere),
    ):  # fmt: skip
        harm()
        refused(words, open_model, tmp_path)
        refused(words, model.load_model, tmp_path, kind=ValueError)


def test_a_shallower_network_is_none(tmp_path):
    """Without an index, a missing shard that held whole blocks shows by config.json's num_layers."""
    net = small_dit()
    model.save_model(net, tmp_path)
    kept = {name: a for name, a in net.state_dict().items() if not name.startswith("blocks.1.")}
    save_file(kept, tmp_path / model.WEIGHTS_NAME)
    refused(
        "config.json: expected the sizes of its weights, .*got 40 and 2", model.load_model, tmp_path, kind=ValueError
    )


@pytest.mark.parametrize("load, found_no", [
    (model.load_model, "patch_embedding.weight"), (open_model, "patch_embedding.weight"),
    (vae.load_vae, "encoder.conv1.weight"), (text.load_umt5, "token_embedding.weight"),
])  # fmt: skip
def test_another_architecture(load, found_no, tmp_path):
    """Weights of something else are named as such, in one line."""
    save_file({"unet.conv.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    refused(f"other.safetensors: expected .*'{found_no}'", load, tmp_path / "other.safetensors", kind=ValueError)


def test_loading_holds_one_copy(tmp_path):
    """Peak memory of a load is the weights and a little: at most 1.2 of them, measured in a process of its own."""
    net = model.DiT(model.DiTConfig(512, 2048, 4, 6))
    model.save_model(net, tmp_path / "base")
    model.save_model(small_dit(), tmp_path / "small")
    size = sum(p.numel() * 4 for p in net.parameters())
    code = """
import model
model.load_model(sys.argv[2] + "/small")
net = model.load_model(sys.argv[2] + "/base")
"""
    held = peak_memory(code, str(tmp_path))
    assert held < 1.2 * size, f"{held / size:.2f} of the weights"


# ---- LoRA, in and out ------------------------------------------------------------------------------------------------


def diffusers_layer(layer: str) -> str:
    return diffusers_name(f"{layer}.weight").removesuffix(".weight")


def with_file(net: model.DiT, path) -> model.DiT:
    """net with the LoRA of a file that anybody wrote."""
    lora, _ = read_lora(net, path)
    return model.attach_lora(net, lora)


FILES = {  # how others write a LoRA: keys, their words for A and B, their names of layers, and whether alpha is there
    "peft": ("base_model.model.{}.lora_{}.default.weight", "AB", str, False),
    "no prefix": ("{}.lora_{}.weight", "AB", str, False),
    "down and up": ("diffusion_model.{}.lora_{}.weight", ("down", "up"), str, True),
    "kohya": ("lora_unet_{}.lora_{}.weight", ("down", "up"), lambda layer: layer.replace(".", "_"), True),
    "diffusers": ("transformer.{}.lora_{}.weight", "AB", diffusers_layer, False),
}


@pytest.mark.parametrize("style", FILES)
def test_loras_of_others(style, tmp_path):
    """Every usual way to write the same LoRA gives the same output."""
    key, (down, up), rename, has_alpha = FILES[style]
    again = small_dit()
    ours, inputs, tensors = copy.deepcopy(again), dit_inputs(), {}
    model.add_lora(ours, rank=4, alpha=8, layers="attn+ffn")
    for name, term in model.trained_lora(ours).items():
        torch.nn.init.normal_(term.B, std=0.1)
        name = rename(name)
        tensors[key.format(name, down)] = term.A.detach()
        tensors[key.format(name, up)] = term.B.detach() * (1 if has_alpha else 2)
        if has_alpha:
            tensors[key.partition(".lora_")[0].format(name) + ".alpha"] = torch.tensor(8.0)
    save_file(tensors, tmp_path / "lora.safetensors")
    with torch.no_grad():
        before, after = again(*inputs), with_file(again, tmp_path / "lora.safetensors")(*inputs)
        assert (after - before).abs().max() > 0.01 and torch.allclose(after, ours(*inputs), atol=1e-5)


@pytest.mark.parametrize("writer", ["save_lora_adapter", "save_pretrained"])
def test_alpha_as_peft_keeps_it(writer, tmp_path):
    """diffusers writes alpha into the header, PEFT into adapter_config.json beside: read, not taken for the rank."""
    peft, peer = pytest.importorskip("peft"), diffusers_dit()
    peer.save_pretrained(tmp_path / "transformer")
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["to_q", "to_v"], init_lora_weights=False)
    if writer == "save_pretrained":
        adapted, path = peft.get_peft_model(peer, config), tmp_path / "adapter_model.safetensors"
        adapted.save_pretrained(tmp_path)
    else:
        peer.add_adapter(config)
        adapted, path = peer, tmp_path / "pytorch_lora_weights.safetensors"
        peer.save_lora_adapter(tmp_path)
    ours, inputs = model.load_model(tmp_path), dit_inputs()
    with torch.no_grad():
        before, expected = ours(*inputs), theirs(adapted, *inputs)
        after = with_file(ours, path)(*inputs)
    assert (after - before).abs().max() > 0.01 and close(after, expected)


ALPHAS = ['{"use_rslora": true}', '{"alpha_pattern": {"x": 3}}', "[1]", '{"lora_alpha": "x"}', '{"a":' * 9999]
ALPHAS += ['{"lora_alpha": NaN}', '{"lora_alpha": 1e999}', '{"lora_alpha": 0}']


@pytest.mark.parametrize("told", ALPHAS)
def test_alphas_that_are_not_read(told, tmp_path):
    """What would change the scale and is not implemented is refused; so is a header that is none."""
    tensors = {f"blocks.0.ffn.0.lora_{x}.weight": torch.zeros(s) for x, s in (("A", (4, 40)), ("B", (56, 4)))}
    path, words = tmp_path / "lora.safetensors", "expected (a LoRA with one alpha|PEFT's configuration|an alpha that)"
    save_file(tensors, path, {"lora_adapter_metadata": told})
    refused(f"lora.safetensors: {words}", read_lora, small_dit(), path)


def test_a_lora_that_matches_nothing(tmp_path):
    """An error that names a key, never silence: image-to-video's layers, and differences of another size, too."""
    others = ("blocks.0.attn.q.x", "blocks.0.cross_attn.norm_k_img.diff", "blocks.0.diff_m", "blocks.0.ffn.0.diff_b")
    for key in ("lora_unet_blocks_0_attn_x.lora_down.weight", *(f"diffusion_model.{key}" for key in others)):
        save_file({key: torch.zeros(4, 40)}, tmp_path / "lora.safetensors")
        refused("expected a LoRA for this model", read_lora, small_dit(), tmp_path / "lora.safetensors")


def test_what_a_lora_may_not_hold(tmp_path):
    """A layer, or a difference, under two names; NaN, as an alpha as well."""
    path, A, B = tmp_path / "lora.safetensors", torch.zeros(4, 40), torch.zeros(40, 4)
    good = {"blocks.0.self_attn.q.lora_A.weight": A, "blocks.0.self_attn.q.lora_B.weight": B}
    good["blocks.0.norm3.diff_b"] = torch.zeros(40)
    for more, words in (
        ({"transformer.blocks.0.attn1.to_q.lora_A.weight": A}, "expected each layer once, got 'blocks.0.self_attn.q'"),
        ({"lora_unet_blocks_0_self_attn_q.lora_up.weight": B}, "expected each layer once, got 'blocks.0.self_attn.q'"),
        (
            {"diffusion_model.blocks.0.norm3.diff_b": torch.ones(40)},
            "expected each tensor once, got 'blocks.0.norm3.bias'",
        ),
        ({"blocks.0.self_attn.q.alpha": torch.tensor(torch.nan)}, "q.alpha: expected numbers"),
        ({"blocks.0.self_attn.q.alpha": torch.tensor(0)}, "expected an alpha that is a number and not 0, got 0"),
        ({"blocks.0.norm3.diff_b": torch.full((40,), torch.inf)}, "norm3.diff_b: expected numbers"),
    ):
        save_file({key: a.clone() for key, a in {**good, **more}.items()}, path)  # it refuses shared memory
        refused(f"lora.safetensors: .*{words}", read_lora, small_dit(), path)


@pytest.mark.parametrize("load", [vae.load_vae, text.load_umt5])
def test_weights_that_are_not_finite(load, tmp_path):
    """Of the VAE and of the text encoder: the file and the tensor are named."""
    weights, _, _ = golden("vae" if load is vae.load_vae else "umt5")
    name = min(weights)
    weights[name].view(-1)[0] = torch.nan
    torch.save(weights, tmp_path / "weights.pth")
    refused(f"weights.pth: {name}: expected numbers, got NaN", load, tmp_path / "weights.pth")

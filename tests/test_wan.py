"""Real Wan2.1's parts on random weights: VAE, UMT5 and checkpoints, against the original's outputs and peers."""

import copy
import json
import pickle
import shutil

import pytest
import torch
from helpers import ROOT, cut, peak_memory, trained_tokenizer
from safetensors.torch import load_file, save_file

import model
from runtime.run import UserError
from wan import text, vae

GOLDEN = ROOT / "tests/golden"


def golden(name: str) -> tuple[dict, dict]:
    """Weights and the other tensors of a golden file."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    weights = {k[2:]: a for k, a in tensors.items() if k.startswith("w.")}
    return weights, {k: a for k, a in tensors.items() if not k.startswith("w.")}


def randomised(net, seed: int = 0):
    """Random weights where a new network has zeros or ones."""
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data = p.data + 0.2 * torch.randn(p.shape, generator=generator)
    return net.eval()


# ---- VAE -------------------------------------------------------------------------------------------------------------


def golden_vae() -> tuple[vae.VAE, dict]:
    weights, tensors = golden("vae")
    net = vae.VAE(base_dim=4)
    net.load_state_dict(weights)
    return net, tensors


@pytest.mark.parametrize("streaming", [True, False])
def test_vae_golden(streaming):
    """Wan's own outputs, to 1e-5 (its decoder does not clamp)."""
    net, tensors = golden_vae()
    assert (net.encode(tensors["video"], streaming) - tensors["z"]).abs().max() < 1e-5
    assert (net.decode(tensors["z"], streaming) - tensors["decoded"].clamp(-1, 1)).abs().max() < 1e-5


def test_vae_is_causal_bit_for_bit():
    """A prefix's latents are the prefix of the latents; what is decoded does not depend on what comes later."""
    net, tensors = golden_vae()
    video, z = tensors["video"], tensors["z"]
    whole, decoded = net.encode(video), net.decode(z)
    for k in range(1, z.shape[2]):
        pixels = 4 * (k - 1) + 1
        assert torch.equal(net.encode(video[:, :, :pixels]), whole[:, :, :k])
        later = torch.cat([z[:, :, :k], torch.randn_like(z[:, :, k:])], 2)
        assert torch.equal(net.decode(later)[:, :, :pixels], decoded[:, :, :pixels])


def test_vae_sizes_are_wans():
    with torch.device("meta"):
        net = vae.VAE()
    assert (sum(p.numel() for p in net.parameters()), len(net.state_dict())) == (126_892_531, 194)


@pytest.mark.parametrize("shape", [(1, 3, 6, 16, 16), (1, 3, 5, 12, 16), (1, 4, 5, 16, 16), (3, 5, 16, 16)])
def test_vae_refuses(shape):
    """Lengths that are not 4k+1 lose their end in the original, silently: here they are refused."""
    with pytest.raises(ValueError, match=r"video: expected \(B, 3, 4k\+1, 8a, 8b\)"):
        vae.VAE(base_dim=4).encode(torch.zeros(shape))


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
    assert (x0 * ours.std + ours.mean - mean).abs().max() < 5e-5 * max(1, mean.abs().max())
    assert (ours.decode(x0) - decoded).abs().max() < 1e-4


# ---- UMT5 ------------------------------------------------------------------------------------------------------------


def test_umt5_golden():
    """Wan's own outputs, to 1e-5; a text that is not padded gives what it gives padded."""
    weights, tensors = golden("umt5")
    net = text.UMT5(vocab=64, dim=16, dim_attn=16, dim_ffn=24, num_heads=4, num_layers=2)
    net.load_state_dict(weights)
    ids, mask, out = tensors["ids"], tensors["mask"], tensors["out"]
    assert (net(ids, mask) - out).abs().max() < 1e-5
    for i, length in enumerate(mask.sum(1).tolist()):
        alone = net(ids[i : i + 1, :length], mask[i : i + 1, :length])
        assert (alone - out[i, :length]).abs().max() < 1e-5


def test_umt5_sizes_are_wans():
    with torch.device("meta"):
        net = text.UMT5()
    assert (sum(p.numel() for p in net.parameters()), len(net.state_dict())) == (5_680_910_336, 242)


@pytest.mark.parametrize("heads, width, layers, length", [(2, 8, 1, 5), (4, 4, 3, 200), (3, 8, 2, 512)])
def test_umt5_against_transformers(heads, width, layers, length, tmp_path):
    """Its folder is read as it is; states agree in float32, also past the distance where buckets are shared."""
    transformers = pytest.importorskip("transformers")
    config = transformers.UMT5Config(
        vocab_size=50,
        d_model=24,
        d_kv=width,
        d_ff=40,
        num_layers=layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
    )
    peer = randomised(transformers.UMT5EncoderModel(config))
    peer.save_pretrained(tmp_path / "text_encoder")
    ours = text.load_umt5(tmp_path, torch.float32)
    ids, mask = torch.randint(0, 50, (2, length)), torch.ones(2, length, dtype=torch.long)
    mask[1, length // 2 :] = 0
    with torch.no_grad():
        expected = peer(ids, attention_mask=mask).last_hidden_state * mask[..., None]
    assert (ours(ids, mask) - expected).abs().max() < 5e-5 * max(1, expected.abs().max())


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
    with pytest.raises(
        UserError, match="tokenizer.json: expected UMT5's tokenizer, <pad> = 0 and </s> = 1, got 1 and 2"
    ):
        text.Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json: expected a tokenizer"):
        text.Tokenizer(tmp_path)
    with pytest.raises(UserError, match="expected tokenizer.json or spiece.model, found neither"):
        text.Tokenizer(tmp_path / "nowhere")


def test_text_encoder(tmp_path):
    """Captions at their true length, from a folder in diffusers' layout; a vocabulary too large is named."""
    transformers = pytest.importorskip("transformers")
    trained_tokenizer(tmp_path / "tokenizer/tokenizer.json")
    for vocab, fits in ((60, True), (5, False)):
        config = transformers.UMT5Config(vocab_size=vocab, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
        shutil.rmtree(tmp_path / "text_encoder", ignore_errors=True)
        transformers.UMT5EncoderModel(config).save_pretrained(tmp_path / "text_encoder")
        encoder = text.TextEncoder(tmp_path, torch.float32)
        if fits:
            states = encoder.encode(["a red ball", "", "two balls meet the red ball"])
            assert [s.shape for s in states] == [
                (len(encoder.tokenizer(c)), 8) for c in ("a red ball", "", "two balls meet the red ball")
            ]
        else:
            with pytest.raises(UserError, match="expected a tokenizer of 5 tokens for this encoder"):
                encoder.encode(["a red ball"])


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def small_dit(**changes) -> model.DiT:
    sizes = dict(
        dim=40, ffn_dim=56, num_heads=2, num_layers=2, in_dim=16, out_dim=16, text_dim=12, text_len=9, freq_dim=32
    )
    return randomised(model.DiT(model.DiTConfig(**{**sizes, **changes})))


def dit_inputs(net, frames=3, text_len=5):
    x, t = torch.randn(2, 16, frames, 4, 6), torch.rand(2)
    return x, t, torch.randn(2, text_len, net.config.text_dim)


PEERS = [  # heads, head width (whose RoPE split is unequal), layers, latent frames, text tokens
    (2, 20, 2, 1, 9),
    (1, 32, 1, 2, 3),
    (3, 14, 2, 13, 9),
]


@pytest.mark.parametrize("heads, width, layers, frames, tokens", PEERS)
def test_dit_against_diffusers(heads, width, layers, frames, tokens, tmp_path):
    """Its folder is read as it is, one file and shards; outputs agree to 5e-5.

    Gradients of all parameters, against it in float64: within 1e-4 of their size, or twice its own error in float32.
    """
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=width, num_layers=layers, ffn_dim=48, text_dim=12, freq_dim=32,
        in_channels=16, out_channels=16, rope_max_seq_len=64,
    )  # fmt: skip
    randomised(peer, heads)
    peer.save_pretrained(tmp_path / "one/transformer")
    peer.save_pretrained(tmp_path / "shards/transformer", max_shard_size="20KB")
    assert len(list((tmp_path / "shards/transformer").glob("*.safetensors"))) > 2
    ours, sharded = (model.load_model(tmp_path / name) for name in ("one", "shards"))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), sharded.parameters(), strict=True))
    x, _, states = dit_inputs(ours, frames, tokens)
    t = torch.tensor([0.004, 0.02])  # early, where its float32 sinusoid is not yet off
    padded = torch.nn.functional.pad(states, (0, 0, 0, 512 - tokens))
    ours.requires_grad_(True)
    one = ours(x, t, states)
    two = peer(x, 1000 * t, padded, return_dict=False)[0]
    assert (one - two).abs().max() < 5e-5 * max(1, two.abs().max())
    weight = torch.randn_like(one)
    (one * weight).sum().backward(), (two * weight).sum().backward()
    exact = copy.deepcopy(peer).double()
    exact.zero_grad()
    (exact(x.double(), 1000 * t, padded.double(), return_dict=False)[0] * weight).sum().backward()
    theirs = {model._rename(name): p.grad for name, p in peer.named_parameters()}
    exact = {model._rename(name): p.grad for name, p in exact.named_parameters()}
    for name, p in ours.named_parameters():
        error, allowed = ((g.double() - exact[name]).abs().max() for g in (p.grad, theirs[name]))
        assert error < max(1e-4 * exact[name].abs().max(), 2 * allowed), name


def test_layouts_are_one_model(tmp_path):
    """ComfyUI's prefixes, one file without a folder, a .pth: the same tensors."""
    net = small_dit(num_heads=1, dim=128, ffn_dim=64)
    state = dict(net.state_dict())
    save_file(state, tmp_path / "plain.safetensors")
    save_file({f"model.diffusion_model.{k}": v for k, v in state.items()}, tmp_path / "comfy.safetensors")
    torch.save(state, tmp_path / "pickle.pth")
    for name in ("plain.safetensors", "comfy.safetensors", "pickle.pth"):
        again = model.load_model(tmp_path / name)
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in state.items())
        assert again.config.num_heads == 1 and not any(p.requires_grad for p in again.parameters())


def test_a_folder_with_one_pth(tmp_path):
    """Read if it is the only one and nothing else is there; of several, the one to take must be named."""
    net = small_dit()
    model.save_model(net, tmp_path)
    (tmp_path / model.WEIGHTS_NAME).unlink()
    torch.save(dict(net.state_dict()), tmp_path / "wan.pth")
    assert torch.equal(model.load_model(tmp_path).head.head.weight, net.head.head.weight)
    torch.save({"a": torch.zeros(1)}, tmp_path / "Wan2.1_VAE.pth")
    with pytest.raises(UserError, match="expected weights, .*path of a .pth file, but it has 2 .pth files"):
        model.load_model(tmp_path)
    assert model.load_model(tmp_path / "wan.pth").config == net.config


class Evil:
    def __reduce__(self):
        return print, ("this must not run",)


def test_a_pickle_with_code_is_refused(tmp_path, capsys):
    with open(tmp_path / "evil.pth", "wb") as f:
        pickle.dump({"patch_embedding.weight": Evil()}, f, protocol=2)
    torch.save({"patch_embedding.weight": Evil()}, tmp_path / "evil2.pth")
    torch.save({"step": 3}, tmp_path / "other.pth")
    (tmp_path / "page.pth").write_text("<html>Access denied")
    (tmp_path / "empty.pth").touch()
    whole = tmp_path / "whole.pth"
    torch.save({"a": torch.zeros(100)}, whole, _use_new_zipfile_serialization=False)
    (tmp_path / "cut.pth").write_bytes(whole.read_bytes()[:200])
    for name in ("page.pth", "empty.pth", "cut.pth"):
        with pytest.raises(UserError, match=f"{name}: expected (readable weights|tensors alone)"):
            model.load_model(tmp_path / name)
    for name, words in (("evil.pth", "refused"), ("evil2.pth", "refused"), ("other.pth", "names and tensors")):
        with pytest.raises(UserError, match=f"{name}: expected .*{words}"):
            model.load_model(tmp_path / name)
    assert "must not run" not in capsys.readouterr().out


def test_shards_that_are_not_whole(tmp_path):
    """A shard that is missing, cut, or there twice is named."""
    net = small_dit()
    model.save_model(net, tmp_path / "base")
    folder, state = tmp_path / "base", dict(net.state_dict())
    (folder / model.WEIGHTS_NAME).unlink()
    names = sorted(state)
    parts = {f"w-0000{i}-of-00002.safetensors": {n: state[n] for n in names[i - 1 :: 2]} for i in (1, 2)}
    for name, tensors in parts.items():
        save_file(tensors, folder / name)
    index = {"weight_map": {n: file for file, tensors in parts.items() for n in tensors}}
    (folder / "w.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(model.load_model(folder).head.head.weight, net.head.head.weight)
    shutil.copy(folder / "w-00001-of-00002.safetensors", folder / "w-00001-of-00002 (1).safetensors")
    model.load_model(folder)  # what the index does not name is not read
    (folder / "w.safetensors.index.json").rename(folder / "index.bak")
    with pytest.raises(UserError, match="keep one"):
        model.load_model(folder)
    (folder / "index.bak").rename(folder / "w.safetensors.index.json")
    cut(folder / "w-00001-of-00002.safetensors")
    with pytest.raises(UserError, match="w-00001-of-00002.safetensors: expected readable weights"):
        model.load_model(folder)
    (folder / "w-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="w-00002-of-00002.safetensors is missing"):
        model.load_model(folder)


@pytest.mark.parametrize("load", [model.load_model, vae.load_vae, text.load_umt5], ids=lambda f: f.__name__)
def test_another_architecture(load, tmp_path):
    """Weights of something else are named as such, in one line."""
    save_file({"unet.conv.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="expected .*, found no '") as caught:
        load(tmp_path / "other.safetensors")
    assert "\n" not in str(caught.value)


def test_loading_holds_one_copy(tmp_path):
    """Peak memory of a load is the weights and a little: at most 1.2 of them, measured in a process of its own."""
    net = model.DiT(model.DiTConfig(512, 2048, 4, 12))
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


def test_lora_opens_in_diffusers(tmp_path):
    """The exported file, loaded there, gives W + (alpha / r) B A: the output moves, and as ours does."""
    diffusers, _ = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    peer = randomised(
        diffusers.WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=20, num_layers=2, ffn_dim=48, text_dim=12, freq_dim=32,
            in_channels=16, out_channels=16, rope_max_seq_len=64,
        )
    )  # fmt: skip
    peer.save_pretrained(tmp_path / "transformer")
    ours = model.load_model(tmp_path)
    model.add_lora(ours, rank=4, alpha=8, layers="attn+ffn")
    for layer in model.lora_linears(ours).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    model.export_lora(ours, tmp_path / "lora.safetensors", task="test")
    x, t, states = dit_inputs(ours)
    padded = torch.nn.functional.pad(states, (0, 0, 0, 512 - states.shape[1]))
    with torch.no_grad():
        before = peer(x, 1000 * t, padded, return_dict=False)[0]
        peer.load_lora_adapter(
            diffusers.loaders.WanLoraLoaderMixin.lora_state_dict(str(tmp_path / "lora.safetensors")),
            prefix="transformer",
        )
        after = peer(x, 1000 * t, padded, return_dict=False)[0]
        expected = ours(x, t, states)
    assert (after - before).abs().max() > 0.01
    assert (after - expected).abs().max() < 5e-5 * max(1, expected.abs().max())


FILES = {  # how others write a LoRA: keys of A and B, the layer's name from Wan's, and of alpha
    "peft": ("base_model.model.{}.lora_A.default.weight", "base_model.model.{}.lora_B.default.weight", str, False),
    "no prefix": ("{}.lora_A.weight", "{}.lora_B.weight", str, False),
    "down and up": (
        "diffusion_model.{}.lora_down.weight",
        "diffusion_model.{}.lora_up.weight",
        str,
        "diffusion_model.{}",
    ),
    "kohya": (
        "lora_unet_{}.lora_down.weight",
        "lora_unet_{}.lora_up.weight",
        lambda n: n.replace(".", "_"),
        "lora_unet_{}",
    ),
    "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight", None, False),
}


def diffusers_name(layer: str) -> str:
    layer = layer.replace("self_attn", "attn1").replace("cross_attn", "attn2").replace("ffn.0", "ffn.net.0.proj")
    layer = (
        layer.replace("ffn.2", "ffn.net.2").replace("attn1.o", "attn1.to_out.0").replace("attn2.o", "attn2.to_out.0")
    )
    for x in "qkv":
        layer = layer.replace(f"attn1.{x}", f"attn1.to_{x}").replace(f"attn2.{x}", f"attn2.to_{x}")
    return layer


@pytest.mark.parametrize("style", FILES)
def test_loras_of_others(style, tmp_path):
    """Every usual way to write the same LoRA gives the same output."""
    a_key, b_key, rename, alpha = FILES[style]
    ours = small_dit()
    again = copy.deepcopy(ours)
    model.add_lora(ours, rank=4, alpha=8, layers="attn+ffn")
    tensors = {}
    for name, layer in model.lora_linears(ours).items():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
        name = (rename or diffusers_name)(name)
        tensors[a_key.format(name)] = layer.lora_A.detach()
        tensors[b_key.format(name)] = layer.lora_B.detach() * (1 if alpha else 2)
        if alpha:
            tensors[f"{alpha.format(name)}.alpha"] = torch.tensor(8.0)
    save_file(tensors, tmp_path / "lora.safetensors")
    x, t, states = dit_inputs(ours)
    with torch.no_grad():
        before = again(x, t, states)
        after = model.load_lora(again, tmp_path / "lora.safetensors")(x, t, states)
        assert (after - before).abs().max() > 0.01 and torch.allclose(after, ours(x, t, states), atol=1e-5)


@pytest.mark.parametrize("writer", ["save_lora_adapter", "save_pretrained"])
def test_alpha_as_peft_keeps_it(writer, tmp_path):
    """diffusers writes alpha into the header, PEFT into adapter_config.json beside: read, not taken for the rank."""
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    sizes = dict(num_attention_heads=2, attention_head_dim=20, num_layers=2, ffn_dim=48, text_dim=12, freq_dim=32)
    peer = randomised(diffusers.WanTransformer3DModel(**sizes))
    peer.save_pretrained(tmp_path / "transformer")
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["to_q", "to_v"], init_lora_weights=False)
    if writer == "save_pretrained":
        adapted, path = peft.get_peft_model(peer, config), tmp_path / "adapter_model.safetensors"
        adapted.save_pretrained(tmp_path)
    else:
        peer.add_adapter(config)
        adapted, path = peer, tmp_path / "pytorch_lora_weights.safetensors"
        peer.save_lora_adapter(tmp_path)
    ours = model.load_model(tmp_path)
    x, t, states = dit_inputs(ours)
    t = t / 50  # early, where its float32 sinusoid is not yet off
    padded = torch.nn.functional.pad(states, (0, 0, 0, 512 - states.shape[1]))
    with torch.no_grad():
        before, expected = ours(x, t, states), adapted(x, 1000 * t, padded, return_dict=False)[0]
        after = model.load_lora(ours, path)(x, t, states)
    assert (after - before).abs().max() > 0.01
    assert (after - expected).abs().max() < 5e-5 * max(1, expected.abs().max())


@pytest.mark.parametrize("told", ['{"use_rslora": true}', '{"alpha_pattern": {"x": 3}}', "[1]", '{"lora_alpha": "x"}'])
def test_alphas_that_are_not_read(told, tmp_path):
    """What would change the scale and is not implemented is refused; so is a header that is none."""
    tensors = {f"blocks.0.ffn.0.lora_{x}.weight": torch.zeros(s) for x, s in (("A", (4, 40)), ("B", (56, 4)))}
    save_file(tensors, tmp_path / "lora.safetensors", {"lora_adapter_metadata": told})
    with pytest.raises(UserError, match="lora.safetensors: expected (a LoRA with one alpha|PEFT's configuration)"):
        model.load_lora(small_dit(), tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    "key", ["lora_unet_blocks_0_self_attn_x.lora_down.weight", "diffusion_model.blocks.0.self_attn.q.x"]
)
def test_a_lora_that_matches_nothing(key, tmp_path):
    """An error that names a key, never silence."""
    save_file({key: torch.zeros(4, 40)}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="expected a LoRA for this model"):
        model.load_lora(small_dit(), tmp_path / "lora.safetensors")

"""What Triton compiles the kernels to, for GPUs that are not here: registers, spills, atomics, accesses, traffic."""

import collections
import re

import aot
import pytest
import torch
from emulator import ptx

from kernels import modulate, norm_rope, region_dpo

BF16, F32 = torch.bfloat16, torch.float32
WAN = dict(B=1, frames=13, tokens=576, D=1536)  # Wan2.1-1.3B, 49x288x512
MODULATE = ("ln_modulate", "residual_ln_modulate", "residual_ln_modulate_no_gate", "gate_residual")
OPS = (*MODULATE, "norm_rope", "region_dpo")
STREAMS = {"bfloat16": (BF16, BF16), "mixed": (F32, BF16), "float32": (F32, F32)}  # of x, of h and y

# Registers a thread for sm_80 and bfloat16 streams, forward and backward: what these operations can do with.
REGISTERS = {"ln_modulate": (40, 64), "residual_ln_modulate": (48, 80), "gate_residual": (32, 40)}
REGISTERS |= {"norm_rope": (40, 64), "region_dpo": (40, 28)}


def run(op, streams="bfloat16", tables=True, B=1, frames=13, tokens=576, D=1536):
    """Forward and backward of an op. tables: its tables, or weight, ask for gradients too."""
    x_dtype, h_dtype = STREAMS[streams]
    if op == "region_dpo":
        pair = [torch.zeros(B, 16, 13, 36, 64, dtype=h_dtype, requires_grad=i < 2) for i in range(4)]
        loss, _ = region_dpo.region_dpo(*pair, *torch.zeros(2, B, 16, 13, 36, 64), torch.full((B,), 5), 2000.0)
        return loss.sum().backward()
    x = torch.zeros(B, frames * tokens, D, dtype=x_dtype, requires_grad=True)
    h = torch.zeros(B, frames * tokens, D, dtype=h_dtype, requires_grad=True)
    if op == "norm_rope":
        weight = torch.ones(D, requires_grad=tables)
        return norm_rope.norm_rope(x, weight, torch.zeros(frames * tokens, 128)).sum().backward()
    gate, shift, scale = torch.zeros(B, 2, 6, D, requires_grad=tables).unbind(2)[:3]
    row = torch.zeros(B, frames, dtype=torch.int32)
    if op == "ln_modulate":
        outputs = [modulate.ln_modulate(x, shift, scale, row, dtype=h_dtype)]
    elif op == "gate_residual":
        outputs = [modulate.gate_residual(x, h, gate, row)]
    else:
        gate = None if op.endswith("no_gate") else gate
        outputs = modulate.residual_ln_modulate(x, h, gate, shift, scale, row, dtype=h_dtype)
    sum(a.float().sum() for a in outputs).backward()


@pytest.fixture
def launches(monkeypatch):
    return aot.record(monkeypatch, modulate, norm_rope, region_dpo)


CASES = [(op, streams, tables) for op in OPS[:5] for streams in STREAMS for tables in (True, False)]
CASES += [("region_dpo", streams, True) for streams in ("bfloat16", "float32")]
SCALAR = {"row", "mean", "rstd", "start", "d_loss", "slope"}  # one number a token or a sample
PARTLY = {"_loss_kernel", "_fold_kernel"}  # the small ones, over partial sums


def accesses(text: str) -> collections.Counter:
    """Widths in bytes of the global loads and stores in PTX."""
    found = collections.Counter()
    for kind, vector, bits in re.findall(r"\b(ld|st)\.global(?:\.[A-Za-z]\S*?)??(?:\.v(\d))?\.[a-z](\d+)\b", text):
        found[kind, int(vector or 1) * int(bits) // 8] += 1
    return found


def gate(compiled, minimum: dict | None) -> None:
    """No spills, no local memory, no atomics; every stream in 16-byte accesses, none more than the minimum."""
    used, code = aot.resources(compiled), aot.sass(compiled)
    assert used["stack"] == used["local"] == 0, f"{compiled.name} spills: {used}"
    assert not re.search(r"\b(LDL|STL)\b", code), f"{compiled.name} uses local memory"
    assert not re.search(r"\b(ATOMG?|ATOMS|RED)\b", code) and "atom." not in compiled.asm["ptx"], compiled.name
    threads = 32 * compiled.num_warps
    assert 65536 // (used["reg"] * threads) * compiled.num_warps >= 16 or compiled.num_warps < 4, used
    if minimum is not None:
        found = accesses(compiled.asm["ptx"])
        wide = {kind: found[kind, 16] for kind in ("ld", "st")}
        narrow = {kind: sum(n for (k, width), n in found.items() if k == kind and width < 16) for kind in ("ld", "st")}
        assert (wide, narrow) == (minimum["wide"], minimum["narrow"]), f"{compiled.name}: {dict(found)}"


def least(kernel, args) -> dict:
    """The accesses a thread that takes eight columns cannot do without: loads and stores of the launch's tensors."""
    names = [name for name in kernel.arg_names[: len(args)]]
    given = {n: a for n, a in zip(names, args) if torch.is_tensor(a)}
    outputs = {"y", "x_out", "dx", "dh", "dv_w", "dv_l", "partial"} | ({"mean", "rstd"} if "y" in given else set())
    wide, narrow = {"ld": 0, "st": 0}, {"ld": 0, "st": 0}
    for name, a in given.items():
        kind = "st" if name in outputs else "ld"
        if name in SCALAR:
            narrow[kind] += 1
        elif kernel.__name__ == "_sums_kernel" and name == "partial":
            narrow["st"] += 6  # three sums each of the winner's and the loser's branch
        elif name not in ("ref_w", "ref_l") or kernel.__name__ == "_sums_kernel":
            wide[kind] += a.element_size() * 8 // 16 * (a.shape[0] if name == "partial" and a.ndim == 4 else 1)
    return {"wide": wide, "narrow": narrow}


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("op, streams, tables", CASES, ids=str)
def test_compiled_for_nvidia(op, streams, tables, target, launches):
    """The gate, at the shapes of Wan2.1-1.3B."""
    run(op, streams, tables)
    assert len(launches) == (3 if tables else 2)
    for kernel, _, args, kwargs in launches:
        compiled = aot.compile_launch(kernel, args, kwargs, target)
        gate(compiled, None if kernel.__name__ in PARTLY else least(kernel, args))


@pytest.mark.parametrize("op", REGISTERS)
def test_registers(op, launches):
    """sm_80, bfloat16, tables trained: no more registers than programs that many can run side by side."""
    run(op)
    main = [(k, a, kw) for k, _, a, kw in launches if k.__name__ not in PARTLY]
    used = [aot.resources(aot.compile_launch(k, a, kw))["reg"] for k, a, kw in main]
    assert all(n <= most for n, most in zip(used, REGISTERS[op], strict=True)), used


@pytest.mark.parametrize("op", OPS[:5])
def test_wide_models_do_not_spill_in_lora_training(op, launches):
    """D = 5120, Wan2.1-14B, tables frozen. (With trained tables and a float32 stream the gated backward does spill.)"""
    run(op, "mixed", tables=False, D=5120, frames=3, tokens=16)
    for kernel, _, args, kwargs in launches:
        gate(aot.compile_launch(kernel, args, kwargs), None)


@pytest.mark.parametrize("op", OPS)
def test_compiled_for_amd(op, launches, monkeypatch):
    """gfx942 as it would be launched there, 64 threads a wave: no spills, no scratch, no atomics, 16-byte loads."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    run(op)
    for kernel, _, args, kwargs in launches:
        code = aot.compile_launch(kernel, args, kwargs, "gfx942").asm["amdgcn"]
        spilled = re.findall(r"\.(?:vgpr|sgpr)_spill_count:\s*(\d+)|\.private_segment_fixed_size:\s*(\d+)", code)
        assert len(spilled) >= 3 and all(int(a or b) == 0 for a, b in spilled), spilled
        assert "atomic" not in code and "scratch_" not in code
        if kernel.__name__ not in PARTLY:
            assert re.search(r"(global|buffer)_load_dwordx4", code), kernel.__name__


@pytest.mark.parametrize("op", OPS)
def test_the_gate_has_teeth(op, launches):
    """Without the hint that pointers and strides divide by 16, no access is 16 bytes wide and the gate fails."""
    run(op)
    for kernel, _, args, kwargs in launches:
        if kernel.__name__ in PARTLY:
            continue
        with pytest.raises(AssertionError, match=kernel.__name__):
            gate(aot.compile_launch(kernel, args, kwargs, hints=False), least(kernel, args))


# ---- executed at full size -------------------------------------------------------------------------------------------


def test_full_size_forward_moves_little_more_than_it_must(monkeypatch):
    """LN-modulate at 7488 x 1536: right, and from memory within 1.05 of reading x once and writing y once.

    The table's rows are 25 KB: every program asks for its row again, and the caches have it.
    """
    monkeypatch.setattr(modulate, "implementation", lambda device: "triton")
    emulated = ptx.Emulated(modulate._forward_kernel)
    monkeypatch.setattr(modulate, "_forward_kernel", emulated)
    B, frames, tokens, D = WAN.values()
    x = torch.randn(B, frames * tokens, D).bfloat16()
    shift, scale = torch.randn(2, B, 2, D)
    row = (torch.arange(frames) < 5).int().unsqueeze(0)
    y = modulate.ln_modulate(x, shift, scale, row)
    exact = modulate.ln_modulate_ref(x.double(), shift.double(), scale.double(), row)
    eager = modulate.ln_modulate_ref(x, shift, scale, row)
    assert (y.double() - exact).abs().max() <= 2 * (eager.double() - exact).abs().max()
    ((_, grid, traffic),) = emulated.launches
    assert grid == (13, 72)
    moved = sum(t.read if name == "x" else t.read_once for name, t in traffic.items())
    moved += sum(t.written for t in traffic.values())
    assert moved <= 1.05 * 2 * x.numel() * x.element_size()
    assert traffic["x"].read == traffic["y"].written == x.numel() * 2 and traffic["x"].widths == {16}
    assert traffic["x"].sectors * 32 == traffic["x"].read  # coalesced: no sector is fetched for half

"""What Triton compiles the kernels to, for GPUs that are not here: registers, spills, atomics, accesses, traffic."""

import collections
import re

import pytest
import torch
from emulator import aot, ptx

from kernels import modulate, norm_rope, region_dpo

BF16, F32 = torch.bfloat16, torch.float32
OPS = (*modulate.FORMS, "norm_rope", "region_dpo")
STREAMS = {"bfloat16": (BF16, BF16), "mixed": (F32, BF16), "float32": (F32, F32)}  # of x, of h and y

# Registers a thread for sm_80 and bfloat16 streams, forward and backward with trained tables. No kernel has a cap, and
# ptxas takes what it likes: 128 registers leave room for two programs of eight warps on a multiprocessor, 16 of its 64.
REGISTERS = {"ln_modulate": (72, 64), "residual_ln_modulate": (96, 128), "gate_residual": (56, 48)}
REGISTERS |= {"norm_rope": (48, 64), "region_dpo": (48, 32)}


def launches_of(op, streams="bfloat16", tables=True, D=1536, rows=None) -> list[tuple]:
    """Forward and backward, not run, as (kernel, args, kwargs). tables: do the tables, or the weight, get gradients?
    rows: of tables that come without an index; else there are two, and an index.

    They compile to what they compile to at Wan2.1-1.3B's 13 frames of 576 tokens: what divides by 16 there does here.
    """
    x_dtype, h_dtype = STREAMS[streams]
    with aot.recorded() as launches:
        if op == "region_dpo":
            v, ref = torch.zeros(2, 1, 16, 13, 36, 64, dtype=h_dtype)
            target = torch.zeros(v.shape, dtype=x_dtype)
            region_dpo.frame_errors(v.requires_grad_(), ref, target, torch.tensor([5]))[0].sum().backward()
        elif op == "norm_rope":
            x, weight = torch.zeros(1, 144, D, dtype=x_dtype, requires_grad=True), torch.ones(D, requires_grad=tables)
            norm_rope.norm_rope(x, weight, torch.zeros(144, 128)).sum().backward()
        else:
            x, h = (torch.zeros(1, 144, D, dtype=a, requires_grad=True) for a in STREAMS[streams])
            given = torch.zeros(1, rows or 2, 6, D, requires_grad=tables).unbind(2)[:3]
            row = None if rows else torch.zeros(1, 3, dtype=torch.int32)
            outputs = modulate.FORMS[op][0](modulate.KERNEL, x, h, *given, row, 1e-6, h_dtype)
            sum(a.float().sum() for a in outputs).backward()
    return launches


SCALAR = {"row", "mean", "rstd", "start", "d_d"}  # one number a token, a sample or a frame
PARTLY = {"_fold_kernel"}  # the small ones, over partial sums


def accesses(text: str) -> collections.Counter:
    """Widths in bytes of the global loads and stores in PTX."""
    found = collections.Counter()
    for kind, vector, bits in re.findall(r"\b(ld|st)\.global(?:\.[A-Za-z]\S*?)??(?:\.v(\d))?\.[a-z](\d+)\b", text):
        found[kind, int(vector or 1) * int(bits) // 8] += 1
    return found


def gate(compiled, minimum: dict | None) -> None:
    """No spills, no local memory, no atomics; every stream in 16-byte accesses, none more than the minimum.

    Eight warps at least run side by side on a multiprocessor, by their registers.
    """
    used, text = compiled.resources, compiled.asm["ptx"]
    assert used["stack"] == used["local"] == 0, f"{compiled.name} spills: {used}"
    assert not re.search(r"\b(ld|st)\.local|\.local\b|\b(atom|red)\.", text), compiled.name
    assert compiled.warps >= 8, (compiled.name, used)
    if minimum is not None:
        found = accesses(text)
        wide = {kind: found[kind, 16] for kind in ("ld", "st")}
        narrow = {kind: sum(n for (k, width), n in found.items() if k == kind and width < 16) for kind in ("ld", "st")}
        assert (wide, narrow) == (minimum["wide"], minimum["narrow"]), f"{compiled.name}: {dict(found)}"


def least(kernel, args, kwargs) -> dict:
    """The accesses that a thread cannot do without for its columns: loads and stores of the launch's tensors."""
    eights = (
        kwargs["BLOCK" if kernel.__module__.endswith("region_dpo") else "BLOCK_D"] // (32 * kwargs["num_warps"]) // 8
    )
    given = {n: a for n, a in zip(kernel.arg_names, args) if torch.is_tensor(a)}
    outputs = {"y", "x_out", "dx", "dh", "dv", "partial"} | ({"mean", "rstd"} if "y" in given else set())
    wide, narrow = {"ld": 0, "st": 0}, {"ld": 0, "st": 0}
    for name, a in given.items():
        kind = "st" if name in outputs else "ld"
        if name in SCALAR:
            narrow[kind] += 1
        elif kernel.__name__ == "_errors_kernel" and name == "partial":
            narrow["st"] += 3
        elif name != "ref" or kernel.__name__ == "_errors_kernel":  # the gradient of v does without ref
            tables = a.shape[0] if name == "partial" and a.ndim == 4 else 1
            wide[kind] += eights * a.element_size() * 8 // 16 * tables
    return {"wide": wide, "narrow": narrow}


# x is float32 in the model and the rest bfloat16; sm_90 gets what the model launches
CASES = [(op, streams, True, "sm_80") for op in OPS[:-1] for streams in STREAMS]
CASES += [(op, streams, False, "sm_80") for op in OPS[:-1] for streams in ("bfloat16", "mixed")]
CASES += [(op, "mixed", tables, "sm_90") for op in OPS[:-1] for tables in (True, False)]
CASES += [("region_dpo", streams, True, target) for streams in ("mixed", "float32") for target in ("sm_80", "sm_90")]


@pytest.mark.parametrize("op, streams, tables, target", CASES, ids=str)
def test_compiled_for_nvidia(op, streams, tables, target):
    """The gate, at Wan2.1-1.3B's width."""
    launches = launches_of(op, streams, tables)
    assert len(launches) == 2 + (tables and op != "region_dpo")
    for kernel, args, kwargs in launches:
        compiled = aot.compile_launch(kernel, args, kwargs, target)
        gate(compiled, None if kernel.__name__ in PARTLY else least(kernel, args, kwargs))


@pytest.mark.parametrize("op", REGISTERS)
def test_registers(op):
    """A change that costs registers is seen."""
    main = [launch for launch in launches_of(op) if launch[0].__name__ not in PARTLY]
    used = [aot.compile_launch(*launch).resources["reg"] for launch in main]
    assert all(n <= most for n, most in zip(used, REGISTERS[op], strict=True)), used


@pytest.mark.parametrize("rows", [1, 3, 144])  # for the clip, a frame, a token
@pytest.mark.parametrize("op", modulate.FORMS)
def test_rows_without_an_index_need_no_fold(op, rows):
    """Forward and backward and no third kernel, and the gate holds for them, with nothing read to find a row."""
    launches = launches_of(op, "mixed", rows=rows)
    assert [kernel.__name__ for kernel, _, _ in launches] == ["_forward_kernel", "_backward_kernel"]
    for kernel, args, kwargs in launches:
        gate(aot.compile_launch(kernel, args, kwargs), least(kernel, args, kwargs))


def test_what_is_saved_has_memory_of_its_own():
    """Two numbers a token in the halves of one allocation cost three more kernels a call under Inductor."""
    kept, inputs = [], [a.clone().requires_grad_() for a in (*torch.randn(2, 1, 6, 16), *torch.randn(3, 1, 2, 16))]
    with aot.recorded(), torch.autograd.graph.saved_tensors_hooks(lambda a: kept.append(a) or a, lambda a: a):
        modulate.residual_ln_modulate(*inputs, torch.tensor([[0, 1]]))
        norm_rope.norm_rope(inputs[0], torch.ones(16), torch.ones(6, 4))
    assert len(kept) >= 8 and all(a.untyped_storage().nbytes() == a.nbytes for a in kept)


@pytest.mark.parametrize("F_, L", [(1, 1_500_000), (100_000, 100_000), (3, 3 * 524_288)])
def test_grids_of_long_clips(F_, L):
    """CUDA takes 2^31 - 1 programs along the first axis and 65,535 along the second: they reach every token."""
    grids = []
    x, tables = torch.empty(1, L, 8, device="meta", requires_grad=True), torch.empty(2, 1, F_, 8, device="meta")
    with aot.replaced(lambda kernel: aot.StandIn(kernel, lambda _, grid, args, kw: grids.append((grid, kw["TOKENS"])))):
        modulate.ln_modulate(x, *tables.requires_grad_()).sum().backward()
    assert len(grids) == 2
    for (frames, blocks), tokens in grids:
        assert frames == F_ and blocks <= 65535 and (blocks - 1) * tokens < L // F_ <= blocks * tokens


@pytest.mark.parametrize("op", ["residual_ln_modulate", "norm_rope", "region_dpo"])
def test_options_reach_every_launch(op, monkeypatch):
    """Pipelined loads and a cap on registers, for whoever tunes on a GPU; without them the loads are plain."""
    for options, pipelined, most in (({}, False, 255), ({"STAGES": 2, "maxnreg": 32}, True, 32)):
        for module in aot.MODULES:
            monkeypatch.setattr(module, "OPTIONS", module.OPTIONS | options)
        for launch in launches_of(op):
            if launch[0].__name__ not in PARTLY:
                compiled = aot.compile_launch(*launch)
                assert ("cp.async" in compiled.asm["ptx"]) == pipelined and compiled.resources["reg"] <= most


@pytest.mark.parametrize("op", OPS[:-1])
def test_wide_models_do_not_spill_in_lora_training(op):
    """D = 5120, Wan2.1-14B, tables frozen. (With trained tables and a float32 stream the gated backward does spill.)"""
    for launch in launches_of(op, "mixed", tables=False, D=5120):
        gate(aot.compile_launch(*launch), None)


@pytest.mark.parametrize("op", OPS)
def test_compiled_for_amd(op, monkeypatch):
    """gfx942 as it would be launched there, 64 threads a wave: no spills, no scratch, no atomics, 16-byte loads."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for kernel, args, kwargs in launches_of(op, "mixed"):
        code = aot.compile_launch(kernel, args, kwargs, "gfx942").asm["amdgcn"]
        spilled = re.findall(r"\.(?:vgpr|sgpr)_spill_count:\s*(\d+)|\.private_segment_fixed_size:\s*(\d+)", code)
        assert len(spilled) >= 3 and all(int(a or b) == 0 for a, b in spilled), spilled
        assert "atomic" not in code and "scratch_" not in code
        if kernel.__name__ not in PARTLY:
            assert re.search(r"(global|buffer)_load_dwordx4", code), kernel.__name__


@pytest.mark.parametrize("op", ["residual_ln_modulate", "norm_rope", "region_dpo"])
def test_the_gate_has_teeth(op):
    """Without the hint that pointers and strides divide by 16, no access is 16 bytes wide and the gate fails."""
    for kernel, args, kwargs in launches_of(op):
        if kernel.__name__ not in PARTLY:
            with pytest.raises(AssertionError, match=kernel.__name__):
                gate(aot.compile_launch(kernel, args, kwargs, hints=False), least(kernel, args, kwargs))


# ---- executed at full size -------------------------------------------------------------------------------------------


def test_full_size_forward_moves_little_more_than_it_must():
    """LN-modulate at 7488 x 1536: right, and from memory within 1.05 of reading x once and writing y once.

    The table's rows are 25 KB: every program asks for its row again, and the caches have it.
    """
    frames, tokens, D = 13, 576, 1536
    x = torch.randn(1, frames * tokens, D).bfloat16()
    shift, scale = torch.randn(2, 1, 2, D)
    row = (torch.arange(frames) < 5).int().unsqueeze(0)
    with aot.replaced(ptx.Emulated) as emulated:
        y = modulate.ln_modulate(x, shift, scale, row)
    exact = modulate.ln_modulate_ref(x.double(), shift.double(), scale.double(), row)
    eager = modulate.ln_modulate_ref(x, shift, scale, row)
    assert (y.double() - exact).abs().max() <= 2 * (eager.double() - exact).abs().max()
    ((_, grid, traffic),) = emulated["modulate", "_forward_kernel"].launches
    assert grid == (13, 288)
    moved = sum(t.read if name == "x" else t.read_once for name, t in traffic.items())
    moved += sum(t.written for t in traffic.values())
    assert moved <= 1.05 * 2 * x.numel() * x.element_size()
    assert traffic["x"].read == traffic["y"].written == x.numel() * 2
    for a in (traffic["x"], traffic["y"]):  # coalesced: no sector is fetched for half
        assert a.widths == {16} and 32 * a.sectors == a.read + a.written


def test_gradients_of_a_row_a_token_move_once():
    """They are written by the program that has the token, and read by none: no sums, no fold."""
    L, D = 48, 256
    x, shift, scale = torch.randn(3, 1, L, D).requires_grad_().unbind(0)
    with aot.replaced(ptx.Emulated) as emulated:
        modulate.ln_modulate(x, shift, scale).sum().backward()
    ((_, grid, traffic),) = emulated["modulate", "_backward_kernel"].launches
    assert grid == (L, 1) and not emulated["modulate", "_fold_kernel"].launches
    assert {name: t.written for name, t in traffic.items() if t.written} == {"dx": 4 * L * D, "partial": 8 * L * D}
    assert traffic["partial"].read == 0 and traffic["scale"].read == 4 * L * D


def test_float32_loads_touch_a_sector_twice():
    """A lane loads eight float32 in two instructions, and both touch its 32-byte sector: L1 keeps it in between."""
    x, tables, row = torch.randn(1, 16, 1536), torch.randn(2, 1, 2, 1536), torch.zeros(1, 1, dtype=torch.int32)
    with aot.replaced(ptx.Emulated) as emulated:
        modulate.ln_modulate(x, *tables, row, dtype=BF16)
    ((_, _, traffic),) = emulated["modulate", "_forward_kernel"].launches
    assert {name: 32 * traffic[name].sectors / (2 * x.numel()) for name in ("x", "y")} == {"x": 4, "y": 1}

"""The PTX emulator itself (ptx.py): each check catches a kernel that deserves it, its arithmetic is PTX's, and what the
kernels' functions compute on it is what their definitions do."""

import numpy as np
import ptx
import pytest
import torch
import triton
import triton.language as tl

from kernels import modulate, region_dpo


def text(body: str, parameters: int = 2) -> str:
    """A kernel of 64-bit parameters a0, a1 … with %rd0, %rd1 … loaded from them, and %r0 the thread."""
    names = [f"a{i}" for i in range(parameters)]
    declared = ",\n".join(f"\t.param .u64 {name}" for name in names)
    loads = "\n".join(f"\tld.param.b64 %rd{i}, [{name}];" for i, name in enumerate(names))
    registers = "\t.reg .pred %p<9>;\n\t.reg .b16 %rs<20>;\n\t.reg .b32 %r<20>;\n\t.reg .b64 %rd<20>;"
    shared = ".extern .shared .align 16 .b8 global_smem[];"
    start = "\tmov.u32 %r0, %tid.x;"
    return f"{shared}\n.visible .entry k(\n{declared}\n)\n{{\n{registers}\n{loads}\n{start}\n{body}\n\tret;\n}}\n"


def run(body: str, *tensors: torch.Tensor, grid=(1,), threads: int = 64, shared: int = 256, drop_barrier=None):
    names = [f"a{i}" for i in range(len(tensors))]
    parameters, values = [(name, "*fp32") for name in names], dict(zip(names, tensors))
    return ptx.execute(text(body, len(tensors)), parameters, values, grid, threads, shared, drop_barrier)


MINE = "mul.wide.u32 %rd9, %r0, 4;\nadd.s64 %rd10, %rd0, %rd9;\nshl.b32 %r9, %r0, 2;\nmov.b32 %r8, global_smem;\n"
MINE += "add.s32 %r10, %r8, %r9;\n"  # %rd10, %r10: the thread's own word of a0 and of shared memory
SWAP = "st.shared.b32 [%r10], %r0;\nbar.sync 0;\nxor.b32 %r9, %r9, 128;\nadd.s32 %r11, %r8, %r9;\n"
SWAP += "ld.shared.b32 %r1, [%r11];\nst.global.b32 [%rd10], %r1;\n"  # through shared memory, between two warps


# ---- the checks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body, error, says",
    [
        ("ld.global.b32 %r1, [%rd10+4];", ptx.OutOfBounds, r"byte 256 of the 256 of a0.*CTA \(0, 0, 0\) thread 63"),
        ("ld.global.b32 %r1, [%rd10+-4];", ptx.OutOfBounds, "byte -4 of"),
        ("add.s64 %rd1, %rd9, 64;\nld.global.b32 %r1, [%rd1];", ptx.OutOfBounds, "near no tensor"),
        ("ld.global.v2.b32 {%r1, %r2}, [%rd0+4];", ptx.Misaligned, "8 at once"),
        ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd0+8];", ptx.Misaligned, "16 at once"),
        ("st.global.b32 [%rd0], %r0;", ptx.WrittenTwice, "thread 0 and|thread 63"),
        ("st.shared.b32 [%r10+4], %r0;", ptx.OutOfBounds, "byte 256 of 256 shared"),
        ("st.shared.v2.b32 [%r8+4], {%r0, %r0};", ptx.Misaligned, "byte 4 of 256 shared"),
        ("ld.shared.b32 %r1, [%r10];", ptx.Uninitialized, "byte 0 of 256 shared"),
        ("st.shared.b32 [%r8], %r0;", ptx.Race, "byte 0 of 256 shared"),
        ("frobnicate.rn.f32 %r1, %r2;", ptx.UnknownInstruction, r"frobnicate\.rn\.f32 %r1, %r2"),
        ("add.rz.f32 %r1, %r2, %r2;", ptx.UnknownInstruction, r"add\.rz\.f32"),
        ("ld.global.L1::evict_maybe.b32 %r1, [%rd10];", ptx.UnknownInstruction, "evict_maybe"),
        ("add.f32 %r1, %r2, 1.0;", ptx.UnknownInstruction, r"1\.0"),
        ("add.s32 %r1, %r2;", ptx.UnknownInstruction, "add.s32 %r1, %r2"),
        ("mov.u32 %r1, %clock;", ptx.UnknownInstruction, "%clock"),
        ("setp.lt.u32 %p1, %r0, 16;\n@%p1 ret;\nbar.sync 0;", ptx.Divergence, "48 are there and 16 have returned"),
        ("setp.lt.u32 %p1, %r0, 32;\n@%p1 bar.sync 0;\n@!%p1 bar.sync 0;", ptx.Divergence, "32 are there"),
        ("setp.lt.u32 %p1, %r0, 8;\n@%p1 shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;", ptx.Divergence, "part of the warp"),
    ],
)
def test_flags(body, error, says):
    with pytest.raises(error, match=says):
        run(MINE + body, torch.zeros(64))


def test_a_barrier_between_warps():
    out = torch.zeros(64, dtype=torch.int32)
    run(MINE + SWAP, out)
    assert out.tolist() == [*range(32, 64), *range(32)]
    with pytest.raises(ptx.Race):
        run(MINE + SWAP, out, drop_barrier=0)


def test_a_read_before_a_write_needs_a_barrier():
    again = "bar.sync 0;\nst.shared.b32 [%r10], %r1;\n"
    run(MINE + SWAP + again, torch.zeros(64))
    with pytest.raises(ptx.Race):
        run(MINE + SWAP + again, torch.zeros(64), drop_barrier=1)


def test_a_warp_barrier_orders_one_warp():
    def body(distance: int, first: str = "bar.warp.sync -1;", second: str = "bar.warp.sync -1;") -> str:
        swap = SWAP.replace("bar.sync 0;", first).replace("128", str(distance))
        return MINE + swap + second + "\nst.shared.b32 [%r10], %r1;\n"

    out = torch.zeros(64, dtype=torch.int32)
    run(body(4), out)
    assert out.tolist() == [i ^ 1 for i in range(64)]
    for wrong in (body(128), body(4, first=""), body(4, second="")):
        with pytest.raises(ptx.Race):
            run(wrong, out)


def test_divided_lanes_meet_again():
    out = torch.zeros(64, dtype=torch.int32)
    loop = "mov.b32 %r1, 0;\nand.b32 %r2, %r0, 7;\n$again:\nsetp.ge.u32 %p1, %r1, %r2;\n@%p1 bra $done;\n"
    loop += "add.s32 %r1, %r1, 1;\nbra.uni $again;\n$done:\nbar.sync 0;\nshfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;\n"
    run(MINE + loop + "st.global.b32 [%rd10], %r3;", out)
    assert out.tolist() == [(i ^ 1) % 8 for i in range(64)]


def test_loaded_by_one_cta_and_stored_by_another():
    place = "mov.u32 %r5, %ctaid.x;\nshl.b32 %r6, %r5, 8;\ncvt.u64.u32 %rd5, %r6;\nadd.s64 %rd11, %rd10, %rd5;\n"
    store = MINE + place + "st.global.b32 [%rd11], %r0;\n"
    run(store + "ld.global.b32 %r1, [%rd11];", torch.zeros(256), grid=(4,))
    with pytest.raises(ptx.Race, match="several CTAs.*thread"):
        run(store + "ld.global.b32 %r1, [%rd10];", torch.zeros(256), grid=(4,))


def test_traffic():
    strided = "mul.wide.u32 %rd11, %r0, 32;\nadd.s64 %rd12, %rd1, %rd11;\nsetp.lt.u32 %p1, %r0, 48;\n"
    strided += "@%p1 ld.global.b32 %r1, [%rd12];\nst.global.b32 [%rd10], %r0;"
    one, two = run(MINE + strided, torch.zeros(64), torch.zeros(64 * 8)).values()
    assert one == ptx.Traffic(read=0, read_once=0, written=256, sectors=8, widths={4})
    assert two == ptx.Traffic(read=192, read_once=192, written=0, sectors=48, widths={4})


@triton.jit
def _copy_kernel(x, y, n, BLOCK: tl.constexpr, SHIFT: tl.constexpr, PROGRAMS: tl.constexpr):
    i = (tl.program_id(0) % PROGRAMS) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i + SHIFT, i < n), i < n)


@pytest.mark.parametrize("n", [256, 250])
def test_a_view_may_be_read_only_where_its_storage_is(n):
    copy = ptx.Emulated(_copy_kernel)
    base, y = torch.arange(3 * n, dtype=torch.float32), torch.zeros(n)
    copy[(2,)](base[n : 2 * n], y, n, BLOCK=128, SHIFT=0, PROGRAMS=2)
    assert torch.equal(y, base[n : 2 * n])
    copy[(2,)](base[n : 2 * n], y, n, 128, SHIFT=n, PROGRAMS=2)  # its neighbour is in the same storage
    assert torch.equal(y, base[2 * n :])
    with pytest.raises(ptx.OutOfBounds, match=f"byte {12 * n} of the {12 * n} of x's"):
        copy[(2,)](base[n : 2 * n], y, n, 128, n + 1, PROGRAMS=2)
    with pytest.raises(ptx.WrittenTwice, match="of y's storage"):
        copy[(2,)](base, y, n, 128, 0, PROGRAMS=1)
    assert [launch[:2] for launch in copy.launches] == [("_copy_kernel", (2,))] * 2


# ---- arithmetic ------------------------------------------------------------------------------------------------------

N = 1 << 14
REGISTER = {2: "%rs", 4: "%r", 8: "%rd"}


def compute(mnemonic: str, out: str, *sources: np.ndarray) -> np.ndarray:
    """One instruction on N lanes; source i in register 10 + i, destination 19."""
    body = "mov.u32 %r1, %ctaid.x;\nmov.u32 %r2, %ntid.x;\nmad.lo.s32 %r1, %r1, %r2, %r0;\n"
    for i, a in enumerate(sources):
        bits, register = a.itemsize * 8, f"{REGISTER[a.itemsize]}{10 + i}"
        body += f"mad.wide.u32 %rd9, %r1, {a.itemsize}, %rd{i};\nld.global.b{bits} {register}, [%rd9];\n"
    size = np.dtype(out).itemsize
    operands = ", ".join([f"{REGISTER[size]}19", *(f"{REGISTER[a.itemsize]}{10 + i}" for i, a in enumerate(sources))])
    body += f"{mnemonic} {operands};\nmad.wide.u32 %rd9, %r1, {size}, %rd{len(sources)};\n"
    body += f"st.global.b{size * 8} [%rd9], {REGISTER[size]}19;"
    result = np.zeros(N, out)
    tensors = [torch.from_numpy(a.view(f"i{a.itemsize}")) for a in (*sources, result)]
    run(body, *tensors, grid=(N // 64,))
    return result


def bits(dtype: str, seed: int = 0) -> np.ndarray:
    """Random bits: every exponent, subnormals, infinities and NaN among them."""
    size = np.dtype(dtype).itemsize
    a = np.random.default_rng(seed).integers(0, 256, N * size, np.uint8).view(f"u{size}")
    special = {2: [0, 0x8000, 0x7C00, 0xFC00, 0x7E00, 0x7F80],
               4: [0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00000, 1, 0x7F7FFFFF, 0x3F808000, 0x3F818000, 0x3F808001,
                   0x477FF000, 0x33000000, 0x33000001, 0x38802000]}.get(size, [0, 1])  # fmt: skip
    a[: len(special)] = special
    return a.view(dtype)


def same(a: np.ndarray, b: np.ndarray) -> None:
    """Bit for bit; any NaN is as good as another."""
    if a.dtype.kind == "f":
        assert np.array_equal(np.isnan(a), np.isnan(b))
        a, b = (np.where(np.isnan(x), 0, x).view(f"u{x.itemsize}") for x in (a, b))
    assert np.array_equal(a, b), np.flatnonzero(a != b)[:5]


def bf16(a: np.ndarray) -> np.ndarray:
    return (a.astype(np.uint32) << 16).view("f4")


def test_conversions():
    x = bits("f4")
    tensor = torch.from_numpy(x)
    halves, brains = tensor.half().numpy(), tensor.bfloat16().view(torch.int16).numpy().view("u2")
    same(compute("cvt.rn.f16.f32", "f2", x), halves)
    same(bf16(compute("cvt.rn.bf16.f32", "u2", x)), bf16(brains))
    other = np.roll(x, 1)
    packed = compute("cvt.rn.bf16x2.f32", "u4", other, x).view("u2")  # the first source is the upper half
    same(bf16(packed[::2]), bf16(brains))
    same(bf16(packed[1::2]), bf16(np.roll(brains, 1)))
    packed = compute("cvt.rn.f16x2.f32", "u4", other, x).view("f2")
    same(packed[::2], halves)
    same(packed[1::2], np.roll(halves, 1))
    h = bits("f2")
    same(compute("cvt.f32.f16", "f4", h), h.astype("f4"))
    same(compute("cvt.f32.bf16", "f4", h.view("u2")), bf16(h.view("u2")))
    i = bits("i8")
    same(compute("cvt.rn.f32.s64", "f4", i), torch.from_numpy(i).float().numpy())
    same(compute("cvt.s64.s32", "i8", bits("i4")), bits("i4").astype("i8"))
    same(compute("cvt.u64.u32", "u8", bits("u4")), bits("u4").astype("u8"))
    with np.errstate(invalid="ignore"):
        whole = np.where(np.isnan(x), 0, np.trunc(x.astype("f8"))).clip(-(2**31), 2**31 - 1)
    same(compute("cvt.rzi.s32.f32", "i4", x), whole.astype("i4"))


def test_floats():
    a, b, c = (bits("f4", i) for i in range(3))
    with np.errstate(all="ignore"):
        for name, function in {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div.rn": np.divide,
                               "min": np.fmin, "max": np.fmax, "min.NaN": np.minimum,
                               "max.NaN": np.maximum}.items():  # fmt: skip
            same(compute(f"{name}.f32", "f4", a, b), function(a, b))
        same(compute("neg.f32", "f4", a), -a)
        same(compute("sqrt.rn.f32", "f4", a), np.sqrt(a))
        flushed = np.where(np.abs(a) < 2.0**-126, np.copysign(np.float32(0), a), a)
        same(compute("add.ftz.f32", "f4", a, np.zeros_like(a)), flushed + np.float32(0))
        for t, item in (("f32", "f4"), ("f64", "f8")):
            x, y = bits(item, 3), bits(item, 4)
            y[::3] = x[::3]
            nan = np.isnan(x) | np.isnan(y)
            for name, truth in {"lt": x < y, "ge": x >= y, "eq": x == y, "ne": (x != y) & ~nan, "neu": x != y,
                                "ltu": (x < y) | nan, "geu": (x >= y) | nan, "nan": nan,
                                "num": ~nan}.items():  # fmt: skip
                r = REGISTER[x.itemsize]
                chosen = f"setp.{name}.{t} %p1, {r}10, {r}11;\nselp.b32 %r19, 1, 0, %p1;\n//"
                same(compute(chosen, "u4", x, y), truth.astype("u4"))
    # fma: one rounding, also where float64 would round onto the middle of two float32
    near = np.random.default_rng(5).standard_normal((3, N)).astype("f4")
    near[:, 0] = 1 + 2.0**-12, 1 + 2.0**-12, 2.0**-80  # 1 + 2^-11 + 2^-24, a middle, and a little more
    near[:, 1] = 1 + 2.0**-12, 1 + 2.0**-12, -(2.0**-80)
    got = compute("fma.rn.f32", "f4", *near)
    assert got[0] == np.float32(1 + 2.0**-11 + 2.0**-23) and got[1] == np.float32(1 + 2.0**-11)
    long = (near[0].astype("g") * near[1].astype("g") + near[2].astype("g")).astype("f4")
    same(got[2:], long[2:])


def test_packed_halves():
    x, y, z = (np.random.default_rng(i).standard_normal(2 * N).astype("f2") for i in range(3))
    words = [a.view("u4") for a in (x, y, z)]
    exact = (x.astype("f8") * y.astype("f8") + z.astype("f8")).astype("f2")
    same(compute("fma.rn.f16x2", "u4", *words).view("f2"), exact)
    same(compute("add.f16x2", "u4", *words[:2]).view("f2"), x + y)
    wide = [torch.from_numpy(a.astype("f4")).bfloat16() for a in (x, y, z)]
    words = [a.view(torch.int16).numpy().view("u4") for a in wide]
    expected = (wide[0].double() * wide[1].double() + wide[2].double()).float().bfloat16()  # these round alike
    same(compute("fma.rn.bf16x2", "u4", *words).view("u2"), expected.view(torch.int16).numpy().view("u2"))


def test_integers():
    a, b, c = bits("i4"), bits("i4", 1), bits("u4", 2) % 40
    b[b == 0] = 3
    u, v = a.view("u4"), b.view("u4")
    wide_a, wide_b = a.astype("i8"), b.astype("i8")
    shift = np.minimum(c, 31).astype("i4")
    quotient = np.trunc(wide_a / wide_b).astype("i8")
    for mnemonic, sources, expected in [
        ("add.s32", (a, b), (wide_a + wide_b).astype("i4")),
        ("mul.lo.s32", (a, b), (wide_a * wide_b).astype("i4")),
        ("mul.hi.s32", (a, b), ((wide_a * wide_b) >> 32).astype("i4")),
        ("mul.hi.u32", (u, v), ((u.astype("u8") * v.astype("u8")) >> np.uint64(32)).astype("u4")),
        ("mul.wide.s32", (a, b), wide_a * wide_b),
        ("mad.wide.u32", (u, v, wide_a.view("u8")), u.astype("u8") * v.astype("u8") + wide_a.view("u8")),
        ("div.s32", (a, b), quotient.astype("i4")),
        ("rem.s32", (a, b), (wide_a - quotient * wide_b).astype("i4")),
        ("div.u32", (u, v), u // v),
        ("min.s32", (a, b), np.minimum(a, b)),
        ("max.u32", (u, v), np.maximum(u, v)),
        ("shl.b32", (u, c), (u.astype("u8") << c.astype("u8")).astype("u4")),
        ("shr.u32", (u, c), (u.astype("u8") >> c.astype("u8")).astype("u4")),
        ("shr.s32", (a, c), a >> shift),
        ("xor.b32", (u, v), u ^ v),
        ("not.b32", (u,), ~u),
        ("bfe.u32", (u, c % 32, np.full_like(u, 5)), (u >> (c % 32)) & 31),
        ("bfe.s32", (a, np.full_like(u, 4), np.full_like(u, 8)), (a << 20) >> 24),
        ("popc.b32", (u,), np.array([bin(x).count("1") for x in u], "u4")),
        ("clz.b32", (u,), np.array([32 - int(x).bit_length() for x in u], "u4")),
        ("prmt.b32", (u, v, np.full_like(u, 0x5410)), (u & 0xFFFF) | (v << 16)),
        ("prmt.b32", (u, v, np.full_like(u, 0x7632)), (u >> 16) | (v & 0xFFFF0000)),
        ("shf.l.wrap.b32", (u, u, np.full_like(u, 7)), (u << 7) | (u >> 25)),
        ("lop3.b32", (u, v, c, np.full_like(u, 0x96)), u ^ v ^ c),
    ]:
        same(compute(mnemonic, expected.dtype.str, *sources), expected)


@pytest.mark.parametrize(
    "mode, by, clamp, partner",
    [
        ("bfly", 4, 31, lambda i: i ^ 4),
        ("idx", 3, 31, lambda i: i - i % 32 + 3),
        ("down", 8, 31, lambda i: i + 8 if i % 32 < 24 else i),
        ("up", 8, 0, lambda i: i - 8 if i % 32 >= 8 else i),
        ("bfly", 1, 0x1C1F, lambda i: i ^ 1),
    ],
)
def test_shuffles(mode, by, clamp, partner):
    out = torch.zeros(64, dtype=torch.int32)
    run(MINE + f"shfl.sync.{mode}.b32 %r1, %r0, {by}, {clamp}, -1;\nst.global.b32 [%rd10], %r1;", out)
    assert out.tolist() == [partner(i) for i in range(64)]


# ---- the kernels -----------------------------------------------------------------------------------------------------

NAMES = {modulate: ("_forward_kernel", "_backward_kernel", "_fold_kernel"),
         region_dpo: ("_sums_kernel", "_loss_kernel", "_gradient_kernel")}  # fmt: skip
KERNELS = {(module, name): getattr(module, name) for module, names in NAMES.items() for name in names}


@pytest.fixture
def emulate(monkeypatch):
    """Launches go to the emulator. Returns a function that leaves out a barrier of one kernel from then on."""

    def put(dropped: str = "", barrier: int | None = None) -> None:
        for (module, name), kernel in KERNELS.items():
            monkeypatch.setattr(module, name, ptx.Emulated(kernel, barrier if name == dropped else None))

    for module in NAMES:
        monkeypatch.setattr(module, "KERNELS", "triton")
    put()
    return put


def tables(D: int, frames: int) -> tuple[list, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    all_six = torch.randn(2, 2, 6, D, generator=generator)
    return [a.requires_grad_() for a in all_six.unbind(2)][:3], torch.arange(2 * frames).view(2, frames) % 2


def barriers(kernel: str, monkeypatch) -> int:
    """How many the text of its launches has."""
    counts, parse = [], ptx._parse

    def counting(source, drop):
        counts.append(source.count("bar.sync") if f".entry {kernel}(" in source else 0)
        return parse(source, drop)

    monkeypatch.setattr(ptx, "_parse", counting)
    layer_norm(modulate.ln_modulate)
    monkeypatch.setattr(ptx, "_parse", parse)
    return max(counts)


def layer_norm(function) -> None:
    (_, shift, scale), row = tables(300, 1)
    x = torch.randn(2, 40, 300).bfloat16().requires_grad_()
    function(x, shift, scale, row).float().sum().backward()


@pytest.mark.parametrize("kernel", ["_forward_kernel", "_backward_kernel"])
def test_every_barrier_is_needed(emulate, monkeypatch, kernel):
    total = barriers(kernel, monkeypatch)
    assert total >= 4
    for i in range(total):
        emulate(kernel, i)
        with pytest.raises((ptx.Race, ptx.Uninitialized), match="shared"):
            layer_norm(modulate.ln_modulate)


def close(got, expected, tolerance: float) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        scale = b.float().abs().max() + 1e-6
        assert (a.float() - b.float()).abs().max() <= tolerance * scale


def with_gradients(function, leaves: list) -> list:
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    weights = [torch.randn(a.shape, generator=torch.Generator().manual_seed(2)).to(a.dtype) for a in outputs]
    return outputs + list(torch.autograd.grad(outputs, leaves, weights))


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TYPES = [(F32, F32, 1e-5), (F32, BF16, 2e-2), (BF16, BF16, 2e-2), (F16, F16, 4e-3)]


@pytest.mark.parametrize("x_dtype, h_dtype, tolerance", TYPES)
@pytest.mark.parametrize("D", [37, 192])
def test_modulation(emulate, D, x_dtype, h_dtype, tolerance):
    (gate, shift, scale), row = tables(D, 3)
    x, h = (torch.randn(2, 3 * 11, D).to(dtype).requires_grad_() for dtype in (x_dtype, h_dtype))

    def agree(function, definition, leaves):
        close(with_gradients(function, leaves), with_gradients(definition, leaves), tolerance)

    with_row = lambda f: lambda *leaves: f(*leaves, row)  # noqa: E731
    ungated = lambda f: lambda x, h, shift, scale: f(x, h, None, shift, scale, row)  # noqa: E731
    agree(with_row(modulate.ln_modulate), with_row(modulate.ln_modulate_ref), [x, shift, scale])
    agree(with_row(modulate.gate_residual), with_row(modulate.gate_residual_ref), [x, h, gate])
    both = modulate.residual_ln_modulate, modulate.residual_ln_modulate_ref
    agree(*map(with_row, both), [x, h, gate, shift, scale])
    agree(*map(ungated, both), [x, h, shift, scale])


@pytest.mark.parametrize("form", ["outside", "inside"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_region_dpo(emulate, dtype, form):
    leaves = [torch.randn(2, 3, 5, 9, 8).to(dtype).requires_grad_() for _ in range(4)]
    leaves += [torch.randn(2, 3, 5, 9, 8).requires_grad_() for _ in range(2)]
    start = torch.tensor([1, 3])

    def whole(function):
        loss, metrics = function(*leaves, start, 1.5, form)
        return [loss, *metrics.values(), *torch.autograd.grad(loss.sum(), leaves)]

    close(whole(region_dpo.region_dpo), whole(region_dpo.region_dpo_ref), 1e-5 if dtype == torch.float32 else 2e-2)


def test_wan_shape_is_coalesced(emulate):
    """Wan2.1-1.3B's width, a few tokens: 16 bytes a thread, and no sector that is not used whole."""
    (_, shift, scale), row = tables(1536, 2)
    x = torch.randn(2, 16, 1536).bfloat16()
    modulate.ln_modulate(x, shift, scale, row)
    [(name, grid, traffic)] = modulate._forward_kernel.launches
    assert name == "_forward_kernel" and traffic["y"].written == traffic["x"].read == 2 * x.numel()
    for a in (traffic["x"], traffic["y"]):
        assert a.widths == {16} and 32 * a.sectors == a.read + a.written

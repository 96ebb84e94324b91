"""The PTX emulator itself: each check catches a kernel that deserves it, and its arithmetic is PTX's. What the kernels
compute on it, test_kernels.py compares."""

import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from emulator import aot, ptx

from kernels import modulate, norm_rope, region_dpo


def text(body: str, parameters: int = 2) -> str:
    """A kernel of 64-bit parameters a0, a1 … with %rd0, %rd1 … loaded from them, and %r0 the thread."""
    names = [f"a{i}" for i in range(parameters)]
    declared = ",\n".join(f"\t.param .u64 {name}" for name in names)
    loads = "\n".join(f"\tld.param.b64 %rd{i}, [{name}];" for i, name in enumerate(names))
    registers = "\t.reg .pred %p<9>;\n\t.reg .b16 %rs<20>;\n\t.reg .b32 %r<20>;\n\t.reg .b64 %rd<20>;"
    shared = ".extern .shared .align 16 .b8 global_smem[];"
    start = "\tmov.u32 %r0, %tid.x;"
    return f"{shared}\n.visible .entry k(\n{declared}\n)\n{{\n{registers}\n{loads}\n{start}\n{body}\n\tret;\n}}\n"


BARRIER = r"\bbar\.(?:warp\.)?sync[^;]*;"


def without_barrier(source: str, number: int) -> str:
    """The text without one barrier, counted from 0."""
    found = list(re.finditer(BARRIER, source))[number]
    return source[: found.start()] + source[found.end() :]


def run(body: str, *tensors: torch.Tensor, grid=(1,), threads: int = 64, shared: int = 256):
    names = [f"a{i}" for i in range(len(tensors))]
    parameters, values = [(name, "*fp32") for name in names], dict(zip(names, tensors))
    return ptx.execute(text(body, len(tensors)), parameters, values, grid, threads, shared)


MINE = "mul.wide.u32 %rd9, %r0, 4;\nadd.s64 %rd10, %rd0, %rd9;\nshl.b32 %r9, %r0, 2;\nmov.b32 %r8, global_smem;\n"
MINE += "add.s32 %r10, %r8, %r9;\n"  # %rd10, %r10: the thread's own word of a0 and of shared memory
SWAP = "st.shared.b32 [%r10], %r0;\nbar.sync 0;\nxor.b32 %r9, %r9, 128;\nadd.s32 %r11, %r8, %r9;\n"
SWAP += "ld.shared.b32 %r1, [%r11];\nst.global.b32 [%rd10], %r1;\n"  # through shared memory, between two warps
LDMATRIX = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r10];"


# ---- the checks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body, error, says",
    [
        ("ld.global.b32 %r1, [%rd10+4];", ptx.OutOfBounds, r"byte 256 of a0.*CTA \(0, 0, 0\) thread 63"),
        ("ld.global.b32 %r1, [%rd10+-4];", ptx.OutOfBounds, "byte -4 of"),
        ("add.s64 %rd1, %rd9, 64;\nld.global.b32 %r1, [%rd1];", ptx.OutOfBounds, "near no tensor"),
        ("ld.global.v2.b32 {%r1, %r2}, [%rd0+4];", ptx.Misaligned, "8 at once"),
        ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd0+8];", ptx.Misaligned, "16 at once"),
        ("st.global.b32 [%rd0], %r0;", ptx.WrittenTwice, "thread 0 and|thread 63"),
        ("st.global.b32 [%rd10], %r0;\n" * 2, ptx.WrittenTwice, r"byte 0 of a0.*thread 0.*thread 0"),
        ("st.shared.b32 [%r10+4], %r0;", ptx.OutOfBounds, "byte 256 of shared memory with 256 bytes"),
        ("st.shared.v2.b32 [%r8+4], {%r0, %r0};", ptx.Misaligned, "byte 4 of shared memory, 8 at once"),
        ("ld.shared.b32 %r1, [%r10];", ptx.Uninitialized, "byte 0 of shared"),
        ("st.shared.b32 [%r8], %r0;", ptx.Race, "byte 0 of shared"),
        ("frobnicate.rn.f32 %r1, %r2;", ptx.UnknownInstruction, r"frobnicate\.rn\.f32 %r1, %r2"),
        ("add.rz.f32 %r1, %r2, %r2;", ptx.UnknownInstruction, r"add\.rz\.f32"),
        ("ld.global.L1::evict_maybe.b32 %r1, [%rd10];", ptx.UnknownInstruction, "evict_maybe"),
        ("add.f32 %r1, %r2, 1.0;", ptx.UnknownInstruction, r"1\.0"),
        ("add.s32 %r1, %r2;", ptx.UnknownInstruction, "add.s32 %r1, %r2"),
        ("add.f32 %r1, %r2, 1;", ptx.UnknownInstruction, r"add\.f32 %r1, %r2, 1"),
        ("add.s32 %r1, %rd1, %r2;", ptx.UnknownInstruction, r"%rd1"),
        ("mov.u32 %r1, %clock;", ptx.UnknownInstruction, "%clock"),
        ("ld.shared.b16 %r1, [%r8];", ptx.UnknownInstruction, "%r1"),
        ("st.global.v2.b32 [%rd10], {%r1};", ptx.UnknownInstruction, "{%r1}"),
        ("st.global.b8 [%rd10], %rs1;", ptx.UnknownInstruction, "b8"),
        ("ld.global.b32 %r1, [%r8];", ptx.UnknownInstruction, "%r8"),
        ("bar.warp.sync -1;", ptx.UnknownInstruction, "warp"),
        ("bar.sync 1;", ptx.UnknownInstruction, "bar.sync 1"),
        ("@!%p1 bar.sync 0;", ptx.UnknownInstruction, "@!%p1"),
        ("shfl.sync.bfly.b32 %r1, %r0, 1, 31, 15;", ptx.UnknownInstruction, "15"),
        ("setp.lt.u32 %p1, %r0, 16;\n@%p1 ret;\nbar.sync 0;", ptx.Divergence, "48 of 64 threads.*thread 16"),
        ("setp.lt.u32 %p1, %r0, 32;\n@%p1 bar.sync 0;\nbar.sync 0;", ptx.Divergence, "32 of 64 threads"),
        ("setp.lt.u32 %p1, %r0, 8;\n@%p1 shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;", ptx.Divergence, "part of the warp"),
        (f"setp.lt.u32 %p1, %r0, 8;\n@%p1 {LDMATRIX}", ptx.Divergence, "part of the warp"),
        (f"{LDMATRIX}", ptx.Misaligned, "byte 4 of shared memory, a row of 16"),
        (
            f"shl.b32 %r9, %r0, 3;\nand.b32 %r9, %r9, 240;\nadd.s32 %r10, %r8, %r9;\n{LDMATRIX}",
            ptx.Uninitialized,
            "byte 0 of shared",
        ),
    ],
)
def test_flags(body, error, says):
    with pytest.raises(error, match=says):
        run(MINE + body, torch.zeros(64))


@pytest.mark.parametrize("threads, barrier", [(64, "bar.sync 0;\n"), (32, "bar.warp.sync -1;\n")])
def test_a_barrier(threads, barrier):
    """Between a write and another thread's read, and between a read and another's write; of one warp, too."""
    swap = MINE + SWAP.replace("bar.sync 0;\n", barrier).replace("128", str(2 * threads))
    again = "st.shared.b32 [%r10], %r1;\n"
    out = torch.zeros(threads, dtype=torch.int32)
    run(swap + barrier + again, out, threads=threads)
    assert out.tolist() == [i ^ threads // 2 for i in range(threads)]
    for missing in (swap.replace(barrier, ""), swap + again):
        with pytest.raises(ptx.Race):
            run(missing, out, threads=threads)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("writer", [0, 63])
def test_a_read_by_several_before_a_write_needs_a_barrier(writer, together):
    """Threads 0 and 63 read a word, in one instruction or one after the other; one of the two then writes it."""
    read = MINE + "st.shared.b32 [%r10], %r0;\nsetp.eq.b32 %p1, %r0, 0;\nsetp.eq.b32 %p2, %r0, 63;\nbar.sync 0;\n"
    guards = [""] if together else ["@%p1 ", "@%p2 "]
    read += "".join(f"{guard}ld.shared.b32 %r1, [%r8];\n" for guard in guards)
    write = f"setp.eq.b32 %p3, %r0, {writer};\n@%p3 st.shared.b32 [%r8], %r0;\n"
    run(read + "bar.sync 0;\n" + write, torch.zeros(64))
    with pytest.raises(ptx.Race, match=f"byte 0 of shared.*thread {writer}"):
        run(read + write, torch.zeros(64))


def test_shared_memory_is_checked_by_the_half_word():
    """Two threads' halves of a word are no race; a word is, with a half of it another thread's."""
    address = MINE + "shl.b32 %r9, %r0, 1;\nadd.s32 %r10, %r8, %r9;\ncvt.u16.u32 %rs1, %r0;\n"
    store = address + "st.shared.b16 [%r10], %rs1;\n"
    setp = "setp.lt.u32 %p1, %r0, 1;\n"
    load = "@%p1 ld.shared.b32 %r1, [%r8];\n@%p1 st.global.b32 [%rd10], %r1;"
    out = torch.zeros(64, dtype=torch.int32)
    run(store + "bar.sync 0;\n" + setp + load, out)
    assert out[0] == 1 << 16
    with pytest.raises(ptx.Race, match="byte 0 of shared"):
        run(store + setp + load, out)
    with pytest.raises(ptx.Uninitialized, match="byte 128 of shared"):
        run(store + "bar.sync 0;\nld.shared.b32 %r1, [%r8+128];", out)


def test_the_same_value_may_be_stored_together():
    store = "st.shared.b32 [%r8], %r8;\n"
    run(MINE + store, torch.zeros(64))
    with pytest.raises(ptx.Race):
        run(MINE + store + store, torch.zeros(64))


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


def test_a_byte_is_loaded_with_zeros_above_it():
    """As of a bool or an index of bytes: 200 is not -56."""
    load = MINE + "cvt.u64.u32 %rd11, %r0;\nadd.s64 %rd12, %rd1, %rd11;\nld.global.b8 %rs1, [%rd12];\n"
    out, data = torch.zeros(64, dtype=torch.int32), torch.arange(64, dtype=torch.uint8) * 4
    traffic = run(load + "cvt.u32.u16 %r1, %rs1;\nst.global.b32 [%rd10], %r1;", out, data)
    assert out.tolist() == data.tolist()
    assert traffic["a1"] == ptx.Traffic(read=64, read_once=64, written=0, sectors=2, widths={1})


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
    with pytest.raises(ptx.OutOfBounds, match=f"byte {12 * n} of x's storage with {12 * n} bytes"):
        copy[(2,)](base[n : 2 * n], y, n, 128, n + 1, PROGRAMS=2)
    with pytest.raises(ptx.WrittenTwice, match="of y's storage"):
        copy[(2,)](base, y, n, 128, 0, PROGRAMS=1)
    assert [launch[:2] for launch in copy.launches] == [("_copy_kernel", (2,))] * 2


# ---- arithmetic ------------------------------------------------------------------------------------------------------

N = 1 << 14
REGISTER = {2: "%rs", 4: "%r", 8: "%rd"}


def compute(mnemonic: str, out: str, *sources: np.ndarray) -> np.ndarray:
    """One instruction on N lanes; source i in register 10 + i, destination 19."""
    body = "mov.u32 %r1, %ctaid.x;\nmad.lo.s32 %r1, %r1, 64, %r0;\n"
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
    same(compute("cvt.u16.u64", "u2", bits("u8")), bits("u8").astype("u2"))
    words = bits("u4")
    lower, upper = words.view("u2").reshape(-1, 2).T
    same(compute("mov.b32 {%rs19, _}, %r10;\n//", "u2", words), lower)
    same(compute("mov.b32 {%rs18, %rs19}, %r10;\n//", "u2", words), upper)
    same(compute("mov.b32 %r19, {%rs10, %rs11};\n//", "u4", lower.copy(), upper.copy()), words)


def fused(a, b, c) -> float:
    """a * b + c of finite float32, rounded once to float32, subnormals too."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    if not exact:
        return float(np.float64(a) * np.float64(b) + np.float64(c))  # the zero's sign
    exponent = math.frexp(float(exact))[1] if abs(exact) > Fraction(2) ** -300 else -300
    unit = Fraction(2) ** max(exponent - 24, -149)
    whole = round(exact / unit)  # halves to even
    return math.copysign(float(whole * unit), exact)


def test_floats():
    a, b, c = (bits("f4", i) for i in range(3))
    with np.errstate(all="ignore"):
        for name, function in {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div.full": np.divide,
                               "max": np.fmax}.items():  # fmt: skip
            same(compute(f"{name}.f32", "f4", a, b), function(a, b))
        same(compute("neg.f32", "f4", a), -a)
        same(compute("abs.f32", "f4", a), np.abs(a))
        same(compute("ex2.approx.f32", "f4", a), np.exp2(a.astype("f8")).astype("f4"))
        zeros = np.resize(np.array([0, 1 << 31], "u4").view("f4"), N)
        assert not compute("max.f32", "u4", zeros, zeros[::-1].copy()).any()  # +0 is more than -0
        flushed = np.where(np.abs(a) < 2.0**-126, np.copysign(np.float32(0), a), a)
        same(compute("fma.rn.ftz.f32", "f4", a, np.ones_like(a), np.zeros_like(a)), flushed + np.float32(0))
        same(compute("rsqrt.approx.ftz.f32", "f4", a), (1 / np.sqrt(flushed.astype("f8"))).astype("f4"))
        c[::3] = a[::3]
        for name, truth in {"lt": a < c, "le": a <= c, "gt": a > c, "ge": a >= c, "eq": a == c}.items():
            chosen = f"setp.{name}.f32 %p1, %r10, %r11;\nselp.b32 %r19, 1, 0, %p1;\n//"
            same(compute(chosen, "u4", a, c), truth.astype("u4"))
    # fma: one rounding, also where float64 would round onto the middle of two float32
    near = np.random.default_rng(5).standard_normal((3, N)).astype("f4")
    near[:, 0] = 1 + 2.0**-12, 1 + 2.0**-12, 2.0**-80  # 1 + 2^-11 + 2^-24, a middle, and a little more
    near[:, 1] = 1 + 2.0**-12, 1 + 2.0**-12, -(2.0**-80)
    got = compute("fma.rn.f32", "f4", *near)
    assert got[0] == np.float32(1 + 2.0**-11 + 2.0**-23) and got[1] == np.float32(1 + 2.0**-11)
    same(got[:2000], np.array([fused(*x) for x in near.T[:2000]], "f4"))
    small = near * np.float32([[2.0**-70], [2.0**-66], [2.0**-136]])  # subnormal products and sums
    small[2] *= np.arange(N) % 3 - 1
    same(compute("fma.rn.f32", "f4", *small)[:2000], np.array([fused(*x) for x in small.T[:2000]], "f4"))


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
    # (1 + 2^-4)^2 = 1 + 2^-3 + 2^-8, a middle of two bfloat16; a little less, a little more, past float64's bits
    one, little = torch.full((N,), 1 + 2.0**-4), 2.0**-60 * (2 * (torch.arange(N) % 2) - 1)
    words = [a.bfloat16().view(torch.int16).numpy().view("u2") for a in (one, one, little)]
    same(bf16(compute("fma.rn.bf16", "u2", *words))[:2], np.float32([1 + 2.0**-3, 1 + 2.0**-3 + 2.0**-7]))


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
        ("min.u32", (u, v), np.minimum(u, v)),
        ("shl.b32", (u, c), (u.astype("u8") << c.astype("u8")).astype("u4")),
        ("shr.u32", (u, c), (u.astype("u8") >> c.astype("u8")).astype("u4")),
        ("shr.s32", (a, c), a >> shift),
        ("xor.b32", (u, v), u ^ v),
        ("bfe.u32", (u, c % 32, np.full_like(u, 5)), (u >> (c % 32)) & 31),
        ("bfe.s32", (a, np.full_like(u, 4), np.full_like(u, 8)), (a << 20) >> 24),
        ("bfe.s32", (a, np.full_like(u, 4), np.full_like(u, 0)), np.zeros_like(a)),
        ("prmt.b32", (u, v, np.full_like(u, 0x5410)), (u & 0xFFFF) | (v << 16)),
        ("prmt.b32", (u, v, np.full_like(u, 0xBBBB)), (a >> 31).view("u4")),  # the sign of byte 3, four times
        ("prmt.b32", (u, v, np.full_like(u, 0x7632)), (u >> 16) | (v & 0xFFFF0000)),
    ]:
        same(compute(mnemonic, expected.dtype.str, *sources), expected)


@pytest.mark.parametrize(
    "shuffle, partner",
    [
        ("bfly.b32 %r1, %r0, 4", lambda i: i ^ 4),
        ("idx.b32 %r1, %r0, 3", lambda i: i - i % 32 + 3),
        ("idx.b32 %r1, %r0, %r9", lambda i: i - i % 32 + 4 * i % 32),
    ],
)
def test_shuffles(shuffle, partner):
    out = torch.zeros(64, dtype=torch.int32)
    run(MINE + f"shfl.sync.{shuffle}, 31, -1;\nst.global.b32 [%rd10], %r1;", out)
    assert out.tolist() == [partner(i) for i in range(64)]


@pytest.mark.parametrize("count", [1, 4])
def test_ldmatrix(count):
    """A warp's matrices of 8 rows of 16 bytes, each row where its thread says: here the last row first."""
    registers = [f"%r{i}" for i in range(4, 4 + count)]
    body = "mov.b32 %r8, global_smem;\nshl.b32 %r9, %r0, 4;\nadd.s32 %r10, %r8, %r9;\nxor.b32 %r12, %r0, 31;\n"
    body += "mad.lo.s32 %r11, %r12, 16, %r8;\nmul.lo.s32 %r13, %r0, 4;\n"
    words = []
    for i in range(4):  # thread t's row: words 4 t, 4 t + 1 ...
        body += f"add.s32 %r{14 + i}, %r13, {i};\n"
        words.append(f"%r{14 + i}")
    body += f"st.shared.v4.b32 [%r10], {{{', '.join(words)}}};\nbar.sync 0;\n"
    body += f"ldmatrix.sync.aligned.m8n8.x{count}.shared.b16 {{{', '.join(registers)}}}, [%r11];\n"
    for j, register in enumerate(registers):
        body += (
            f"mul.wide.u32 %rd9, %r0, 4;\nadd.s64 %rd10, %rd0, %rd9;\nst.global.b32 [%rd10+{128 * j}], {register};\n"
        )
    out = torch.zeros(32 * count, dtype=torch.int32)
    run(body, out, threads=32, shared=512)
    assert out.tolist() == [4 * (31 - 8 * j - t // 4) + t % 4 for j in range(count) for t in range(32)]


# ---- the kernels -----------------------------------------------------------------------------------------------------


class WithoutEach:
    """Stands in for a kernel: runs without one barrier after the other, each of which is missed, and then with all."""

    def __init__(self, kernel):
        self.kernel, self.barriers = kernel, []

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            barriers = re.findall(BARRIER, aot.compile_launch(self.kernel, args, kwargs).asm["ptx"])
            for i in range(len(barriers)):
                with pytest.raises((ptx.Race, ptx.Uninitialized), match="shared"):
                    ptx.Emulated(self.kernel, lambda text, i=i: without_barrier(text, i))[grid](*args, **kwargs)
            ptx.Emulated(self.kernel)[grid](*args, **kwargs)
            self.barriers += barriers

        return launch


def test_every_barrier_is_needed(monkeypatch):
    """And whatever is missing where one is left out is found: between the tokens of a program, too, so it gets some."""
    for module in (modulate, norm_rope):
        monkeypatch.setitem(module.OPTIONS, "TOKENS", 2)
    x, h = (torch.randn(1, 6, 600).bfloat16().requires_grad_() for _ in range(2))
    gate, shift, scale = torch.randn(3, 1, 2, 600).requires_grad_()
    row = torch.tensor([[0, 1]])
    with aot.replaced(WithoutEach) as made:
        modulate.residual_ln_modulate(x, h, gate, shift, scale, row)[0].float().sum().backward()
        modulate.ln_modulate(x, shift, scale, row).float().sum().backward()
        for heads, K in ((60, 10), (20, 10)):  # several warps, one warp
            q, weight = torch.randn(1, 6, heads * K).requires_grad_(), torch.ones(heads * K, requires_grad=True)
            norm_rope.norm_rope(q, weight, torch.randn(6, K)).sum().backward()
        v, ref, target = torch.randn(3, 2, 1, 5, 40, 40).bfloat16()
        region_dpo.frame_errors(v.requires_grad_(), ref, target, torch.tensor([1, 3]))[0].sum().backward()
    assert [name for name, kernel in made.items() if not kernel.barriers] == [("region_dpo", "_gradient_kernel")]
    assert {text.split()[0] for kernel in made.values() for text in kernel.barriers} == {"bar.sync", "bar.warp.sync"}

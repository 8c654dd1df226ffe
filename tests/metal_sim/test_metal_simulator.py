# ruff: noqa: E501 - tables of source snippets
"""The simulator itself: every operation that our kernels use, every error the checker must see, every rule of the syntax check."""

import re

import metal_simulator as sim
import msl_lint
import msl_translate
import numpy as np
import pytest

HEADER = """#include <metal_stdlib>
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
using namespace metal;
"""
INDICES = "uint i [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]], uint sg [[simdgroup_index_in_threadgroup]]"


def run(
    body, x, out, *, mode="check", threads=32, grid=1, extra="", before="", types=("float", "float"), check=True, **options
):
    """One kernel `k` with input x, output y; returns the output array."""
    source = (
        HEADER + before + f"kernel void k(const device {types[0]}* x [[buffer(0)]], device {types[1]}* y [[buffer(1)]], {extra}"
        f"{INDICES}, uint tg [[threadgroup_position_in_grid]]) {{ {body} }}\n"
    )
    result = sim.Output(out[0], out[1])
    buffers = {0: x, 1: result} | options.pop("buffers", {})
    stats = sim.build(source, mode=mode).run("k", buffers, (grid,), (threads,), check=check, **options)
    return result.array if check else stats.report


LANES = np.arange(32)
F = np.float32


# --- operations -------------------------------------------------------------------------------------------------------

VALUES = np.random.default_rng(0).normal(size=32).astype(F)
SIMD = {
    "simd_sum(x[i])": lambda x: np.full(32, x.sum()),
    "simd_max(x[i])": lambda x: np.full(32, x.max()),
    "simd_min(x[i])": lambda x: np.full(32, x.min()),
    "simd_shuffle_xor(x[i], ushort(5))": lambda x: x[LANES ^ 5],
    "simd_shuffle_xor(x[i], ushort(16))": lambda x: x[LANES ^ 16],
    "simd_shuffle(x[i], ushort(7))": lambda x: np.full(32, x[7]),
    "simd_shuffle(x[i], ushort((i * 3u) % 32u))": lambda x: x[LANES * 3 % 32],
    "float(simd_any(x[i] > 1.5f))": lambda x: np.full(32, float((x > 1.5).any())),
    "float(simd_any(x[i] > 99.0f))": lambda x: np.zeros(32),
    "float(simd_all(x[i] < 99.0f))": lambda x: np.ones(32),
    "float(simd_all(lane < 31u))": lambda x: np.zeros(32),
    "float(simd_or(x[i] >= 0.0f ? 1u << lane : 0u) >> 16)": lambda x: np.full(
        32, (int(((x >= 0) << LANES.astype(np.int64)).sum())) >> 16
    ),
}


@pytest.mark.parametrize("expression", SIMD)
def test_simulator_simd_operation(expression):
    np.testing.assert_allclose(
        run(f"y[i] = {expression};", VALUES, (32, F)), SIMD[expression](VALUES.astype(np.float64)), rtol=2e-6
    )


HALF_CODES = np.array([0, 1, 3, 0x00C0, 0x0300, 0x03FF, 0x0400, 0x3C00, 0x8001, 0x7C00, 0x7BFF, 0xFC00] + [7] * 20, np.uint16)
EDGES = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 3.49, -2.51, 1e-40, 0.0, -0.0, np.inf, -np.inf, np.nan, 1e30] + [1.0] * 18, F)
SCALAR = {
    "rint(x[i])": lambda x: np.rint(x),
    "exp2(x[i])": lambda x: np.exp2(x.astype(np.float64)),
    "precise::sqrt(abs(x[i]))": lambda x: np.sqrt(np.abs(x)),
    "clamp(x[i], -1.0f, 2.0f)": lambda x: np.fmin(np.fmax(x, -1), 2),
    "max(x[i], 1.0f)": lambda x: np.fmax(x, 1),
    "min(x[i], 1.0f)": lambda x: np.fmin(x, 1),
    "fma(x[i], x[i], 1.0f)": lambda x: (x.astype(np.float64) ** 2 + 1).astype(F),
    "float(isnan(x[i]))": lambda x: np.isnan(x).astype(F),
    "float(isinf(x[i]))": lambda x: np.isinf(x).astype(F),
    "as_type<float>(as_type<uint>(x[i]) ^ 0x80000000u)": lambda x: -x,
    "float(half(x[i]))": lambda x: x.astype(np.float16).astype(F),
    "float(bfloat(x[i]))": lambda x: _bfloat(x),
    "dot(float2(x[i], 2.0f), float2(1.0f, 1.0f))": lambda x: x + 2,
}


def _bfloat(x):
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(F)
    return np.where(np.isnan(x), x, rounded)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("expression", SCALAR)
def test_simulator_scalar_operation(expression):
    np.testing.assert_allclose(run(f"y[i] = {expression};", EDGES, (32, F)), SCALAR[expression](EDGES), rtol=3e-7)


def test_simulator_half_subnormals_are_exact():
    """Value codes are read as fp16 subnormals: the bits must survive the conversion, and a product with fp32."""
    got = run("y[i] = float(as_type<half>(x[i])) * 16777216.0f;", HALF_CODES, (32, F), types=("ushort", "float"))
    np.testing.assert_array_equal(got, HALF_CODES.view(np.float16).astype(np.float64) * 2.0**24)


def test_simulator_half_is_rounded_after_every_operation():
    x = np.float16(np.linspace(0.1, 3, 32))
    got = run("y[i] = x[i] * x[i] + half(0.1h);", x, (32, np.float16), types=("half", "half"))
    np.testing.assert_array_equal(got, x * x + np.float16(0.1))


def test_simulator_byte_vectors_split_words_low_byte_first():
    words = np.arange(32, dtype=np.uint32) * 0x01030507
    body = (
        "uchar4 b = *reinterpret_cast<const device uchar4*>(x + i); uchar2 c = *reinterpret_cast<const device uchar2*>(x + i);"
    )
    got = run(
        body + "y[4 * i] = b[0]; y[4 * i + 1] = b[1]; y[4 * i + 2] = c[1]; y[4 * i + 3] = b[3];",
        words,
        ((32, 4), np.uint32),
        types=("uint", "uint"),
    )
    want = words.view(np.uint8).reshape(32, 4)[:, [0, 1, 1, 3]]
    np.testing.assert_array_equal(got, want)


def test_simulator_half2_of_a_word():
    pairs = np.float16(np.arange(64)).view(np.uint32)
    got = run("half2 h = as_type<half2>(x[i]); y[2 * i] = h.x; y[2 * i + 1] = h.y;", pairs, (64, F), types=("uint", "float"))
    np.testing.assert_array_equal(got, np.arange(64))


def test_simulator_matrix_multiply_and_its_layout():
    """D = A B + C with the lane layout that MLX's kernels rely on: rows by lane bits 1, 2, 4, columns by bits 0 and 3."""
    rng = np.random.default_rng(1)
    a, b, c = (rng.normal(size=(8, 8)).astype(F) for _ in range(3))
    body = """
      const int row = int(lane / 4 & 4u) + int(lane / 2 & 3u), col = int(lane / 4 & 2u) * 2 + int(lane & 1u) * 2;
      simdgroup_float8x8 A, B, C;
      reinterpret_cast<thread float2&>(A.thread_elements()) = float2(x[row * 8 + col], x[row * 8 + col + 1]);
      reinterpret_cast<thread float2&>(B.thread_elements()) = float2(x[64 + row * 8 + col], x[65 + row * 8 + col]);
      reinterpret_cast<thread float2&>(C.thread_elements()) = float2(x[128 + row * 8 + col], x[129 + row * 8 + col]);
      simdgroup_multiply_accumulate(C, A, B, C);
      float2 d = reinterpret_cast<thread float2&>(C.thread_elements());
      y[row * 8 + col] = d.x; y[row * 8 + col + 1] = d.y;"""
    got = run(body, np.concatenate([a.ravel(), b.ravel(), c.ravel()]), ((8, 8), F))
    np.testing.assert_allclose(got, a.astype(np.float64) @ b + c, rtol=0, atol=2e-6)


def test_simulator_barriers_order_writes_of_the_threadgroup():
    body = "threadgroup float t[256]; t[i] = x[i]; threadgroup_barrier(mem_flags::mem_threadgroup); y[i] = t[255 - i];"
    x = np.arange(256, dtype=F)
    for schedule in (sim.IN_ORDER, sim.REVERSE, sim.RANDOM):
        np.testing.assert_array_equal(run(body, x, (256, F), threads=256, schedule=schedule), x[::-1])
    body = "threadgroup float t[256]; t[i] = x[i]; simdgroup_barrier(mem_flags::mem_threadgroup); y[i] = t[i ^ 31];"
    np.testing.assert_array_equal(run(body, x, (256, F), threads=256), x[np.arange(256) ^ 31])


def test_simulator_function_constants_and_threadgroup_arguments():
    before = "constant bool twice [[function_constant(0)]]; constant int add [[function_constant(3)]];\n"
    body = "t[i] = x[i]; simdgroup_barrier(mem_flags::mem_threadgroup); y[i] = t[i ^ 1] * (twice ? 2.0f : 1.0f) + float(add);"
    x = np.arange(32, dtype=F)
    for twice, add in ((0, 5), (1, -7)):
        got = run(
            body, x, (32, F), before=before, extra="threadgroup float* t [[threadgroup(0)]], ",
            constants={0: twice, 3: add}, threadgroup_memory={0: 128},
        )  # fmt: skip
        np.testing.assert_array_equal(got, x[LANES ^ 1] * (1 + twice) + add)


def test_simulator_buffer_indices_may_be_enumerators():
    before = "enum Index : int { kFirst, kSecond };\n"
    source = (
        HEADER
        + before
        + "kernel void k(device float* y [[buffer(kSecond)]], uint i [[thread_index_in_threadgroup]]) { y[i] = 1; }"
    )
    out = sim.Output(32, F)
    sim.build(source, mode="check").run("k", {1: out}, (1,), (32,))
    assert out.array.all()


def test_simulator_counts_bytes_per_buffer():
    x = np.zeros(64, F)
    out = sim.Output(32, F)
    source = (
        HEADER
        + f"kernel void k(const device float* x [[buffer(0)]], device float* y [[buffer(1)]], {INDICES}) {{ y[i] = x[i] + x[i] + x[32]; }}"
    )
    stats = sim.build(source, mode="check").run("k", {0: x, 1: out}, (1,), (32,))
    assert (stats.buffer_read[0], stats.buffer_written[1]) in ((256, 128), (384, 128))  # the compiler may merge equal loads
    assert stats.simd_operations == 0 and stats.barriers == 0


# --- what the checker must report -------------------------------------------------------------------------------------

FAULTS = {
    "RACE": "threadgroup float t[64]; t[i] = x[i]; y[i] = t[63 - i];",
    "RACE write-after-read": "threadgroup float t[64]; t[i] = 0; threadgroup_barrier(mem_flags::mem_threadgroup); y[i] = t[i ^ 32]; t[i] = 1;",
    "RACE write-after-write": "threadgroup float t[1]; t[0] = x[i]; threadgroup_barrier(mem_flags::mem_threadgroup); y[i] = t[0];",
    "OUT OF BOUNDS": "y[i] = x[i + 1];",
    "OUT OF BOUNDS: write": "y[i] = x[i]; if (i == 3) y[64] = 1;",
    "READ OF UNINITIALISED": "threadgroup float t[64]; y[i] = t[i];",
    "OUTPUT NOT COVERED": "if (i != 7) y[i] = x[i];",
    "DIVERGENT simd_sum": "float s = x[i]; if (i < 5) s = simd_sum(s); y[i] = s;",
    "DIVERGENT BARRIER": "y[i] = x[i]; if (i < 32) return; threadgroup_barrier(mem_flags::mem_threadgroup);",
    "misaligned": "float4 v = *reinterpret_cast<const device float4*>(x + 1 + (i & 1u)); y[i] = v.x;",
    "WRITE TO CONST": "y[i] = x[i]; if (i == 0) const_cast<device float*>(x)[0] = 1;",
    "array index out of bounds": "float l[4] = {1, 2, 3, 4}; uint j = i; float s = 0; for (uint n = 0; n < 2; n++) s += l[(j & 3u) + n + (j > 40 ? 1u : 0u)]; y[i] = s;",
    "threadgroup memory": "threadgroup float t[9000]; t[i] = x[i]; y[i] = t[i];",
    "shift amount": "y[i] = float(1u << (i + uint(x[i])));",
}


@pytest.mark.parametrize("what", FAULTS)
def test_simulator_reports(what):
    x = np.ones(64, F)
    report = run(FAULTS[what], x, (64, F), threads=64, check=False)
    assert what.split(":")[0] in report, report
    assert re.search(r"\.metal:\d+|threadgroup memory|OUTPUT", report), "no source line in the report"


def test_simulator_raises_what_it_reports():
    with pytest.raises(sim.Fault, match="OUT OF BOUNDS"):
        run("y[i] = x[i + 1];", np.ones(32, F), (32, F))


def test_simulator_races_between_threadgroups_and_simdgroups_only_when_unordered():
    """Barriers of the wrong kind do not order: the checker knows which memory and which threads a barrier covers."""
    fine = "threadgroup float t[64]; t[i] = x[i]; simdgroup_barrier(mem_flags::mem_threadgroup); y[i] = t[i ^ 1];"
    assert not run(fine, np.ones(64, F), (64, F), threads=64, check=False)
    wrong = "threadgroup float t[64]; t[i] = x[i]; simdgroup_barrier(mem_flags::mem_threadgroup); y[i] = t[i ^ 32];"
    assert "RACE" in run(wrong, np.ones(64, F), (64, F), threads=64, check=False)
    none = "threadgroup float t[64]; t[i] = x[i]; threadgroup_barrier(mem_flags::mem_none); y[i] = t[63 - i];"
    assert "RACE" in run(none, np.ones(64, F), (64, F), threads=64, check=False)
    groups = "if (i == 0) y[0] = x[tg]; if (i > 0 && tg == 0) y[i] = x[i];"
    assert "RACE" in run(groups, np.ones(64, F), (64, F), threads=64, grid=2, check=False)


# --- what the Metal compiler would refuse -----------------------------------------------------------------------------

Y = "kernel void k(device float* y [[buffer(0)]]) "
REFUSED = {
    "device pointer to thread pointer": "kernel void k(device float* x [[buffer(0)]]) { thread float* p = x; p[0] = 1; }",
    "cast across address spaces": "kernel void k(device float* x [[buffer(0)]]) { threadgroup float* p = (threadgroup float*)x; p[0] = 1; }",
    "threadgroup pointer for a device parameter": "inline float f(const device float* p) { return p[0]; } kernel void k(device float* x [[buffer(0)]], threadgroup float* t [[threadgroup(0)]]) { x[0] = f(t); }",
    "write to constant": "kernel void k(constant float* c [[buffer(0)]]) { c[0] = 1; }",
    "write to const device": "kernel void k(const device float* c [[buffer(0)]]) { c[0] = 1; }",
    "write to a program constant": "constant float tab[2] = {1, 2}; " + Y + "{ tab[0] = y[0]; }",
    "kernel pointer without a space": "kernel void k(float* x [[buffer(0)]]) { x[0] = 1; }",
    "helper pointer without a space": "inline float f(const float* p) { return p[0]; } "
    + Y
    + "{ float l[2] = {1, 2}; y[0] = f(l); }",
    "double": Y + "{ double d = y[0]; y[0] = float(d); }",
    "recursion": "inline int f(int n) { return n < 2 ? 1 : n * f(n - 1); } " + Y + "{ y[0] = f(5); }",
    "global variable": "static float tab[2]; " + Y + "{ y[0] = tab[0]; }",
    "global constexpr without a space": "constexpr int N = 4; " + Y + "{ y[0] = N; }",
    "exceptions": Y + "{ if (y[0] > 0) throw 1; }",
    "virtual": "struct A { virtual int f() { return 1; } }; " + Y + "{ A a; y[0] = a.f(); }",
    "new": Y + "{ thread int* p = new int(3); y[0] = *p; }",
    "lambda": Y + "{ auto f = [&](int a) { return a + 1; }; y[0] = f(1); }",
    "function pointer": "inline float f(float a) { return a; } " + Y + "{ float (*p)(float) = f; y[0] = p(1); }",
    "wrong number of components": "kernel void k(device float4* y [[buffer(0)]]) { y[0] = float4(1, 2, 3); }",
    "variable-length array": "kernel void k(device float* y [[buffer(0)]], constant int& n [[buffer(1)]]) { float a[n]; a[0] = 1; y[0] = a[0]; }",
    "initialised threadgroup variable": Y + "{ threadgroup float a = y[0]; y[0] = a; }",
    "threadgroup variable in a helper": "inline float f() { threadgroup float a[4]; a[0] = 1; return a[0]; } "
    + Y
    + "{ y[0] = f(); }",
    "kernel that returns a value": "kernel int k(device float* y [[buffer(0)]]) { return 1; }",
    "parameter without an attribute": "kernel void k(device float* y [[buffer(0)]], int n) { y[0] = n; }",
    "pointer without an index": "kernel void k(device float* y) { y[0] = 1; }",
    "duplicate buffer index": "kernel void k(device float* y [[buffer(0)]], device float* z [[buffer(0)]]) { y[0] = z[0]; }",
    "wrong type of a position": "kernel void k(device float* y [[buffer(0)]], float i [[thread_position_in_grid]]) { y[0] = i; }",
    "unknown attribute": "kernel void k(device float* y [[buffer(0)]], uint i [[thread_pos_in_grid]]) { y[i] = 1; }",
    "goto": Y + "{ goto e; y[0] = 1; e: y[0] = 2; }",
    "ambiguous max": Y + "{ y[0] = max(y[0], 1); }",
    "local static": Y + "{ static int c = 0; c++; y[0] = c; }",
    "reference into threadgroup memory": "inline void f(thread float& a) { a = 1; } "
    + Y
    + "{ threadgroup float t[2]; f(t[0]); y[0] = t[0]; }",
    "standard library": Y + "{ y[0] = std::exp(1.0f); }",
}


def refusals(text):
    """Everything the syntax check and the lint say about a source."""
    path = sim._as_file(text)
    found = sim.strict_errors(path)
    try:
        plain = msl_translate.preprocess(path, shim=sim.INCLUDE / "msl_pp", clang=sim.CLANG)
    except msl_translate.TranslationError as error:
        return [*found, str(error)]
    return found + msl_lint.lint(plain, lambda file: file == str(path))


@pytest.mark.parametrize("what", REFUSED)
def test_syntax_check_refuses(what):
    assert refusals(HEADER + REFUSED[what] + "\n")


def test_syntax_check_accepts_what_metal_accepts():
    text = (
        "kernel void k(const device float* x [[buffer(0)]], device float* y [[buffer(1)]], constant int& n [[buffer(2)]],"
        " uint i [[thread_position_in_grid]]) { threadgroup float b[32]; b[i & 31] = x[i] * 1.5;"
        " threadgroup_barrier(mem_flags::mem_threadgroup); thread float* p; float l[4]; p = l; p[0] = b[0];"
        " y[i] = float4(p[0], 1, 2, 3).y + n; }"
    )
    assert refusals(HEADER + text + "\n") == []

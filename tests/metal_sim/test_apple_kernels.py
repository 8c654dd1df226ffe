"""Kernels of MLX that Apple's compiler made, run on the simulated GPU and compared with NumPy.

They bind what our kernels use (sums, maxima, votes, shuffles, 8x8 matrices, half precision) to what MLX gets from it on
every Mac. `TQEXT_MLX_METALLIB` names the `mlx.metallib` of a macOS wheel; tests/macos_link/check.py leaves one in its
folder.
"""

import os
import re
import shutil
import zlib

import air
import metal_simulator as sim
import numpy as np
import pytest

SCHEDULES = [sim.IN_ORDER, sim.REVERSE, sim.RANDOM]
HALF, SINGLE = 2.0**-11, 2.0**-24  # unit roundoff


@pytest.fixture(scope="module")
def mlx():
    path = os.environ.get("TQEXT_MLX_METALLIB")
    if not path:
        pytest.skip("TQEXT_MLX_METALLIB does not name the mlx.metallib of a macOS wheel")
    return air.Metallib(path)


@pytest.fixture
def run(mlx, request):
    """Runs a kernel of MLX with every access checked, in an order that the test's name decides."""
    number = zlib.crc32(request.node.name.encode())

    def run(kernel, buffers, grid, group, constants=None, **options):
        library = air.build(mlx, kernel, **options)
        return library.run(kernel, buffers, grid, group, constants=constants, schedule=SCHEDULES[number % 3], seed=number)

    return run


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def attention_reference(q, k, v, scale, mask=None):
    """Attention of [H, L, D] with [Hkv, N, D] in float64, and a bound of what fp32 arithmetic may add."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    k, v = (x.repeat(len(q) // len(x), 0) for x in (k, v))
    scores = scale * q @ k.swapaxes(1, 2)
    # A score has D products and the scale; fast::exp takes the difference times log2(e), and exp2 adds two units.
    size = scale * abs(q) @ abs(k).swapaxes(1, 2)
    error = (q.shape[-1] + 4) * SINGLE * size.max() + 4 * SINGLE * (scores.max() - scores.min()) + 4 * SINGLE
    if mask is not None:
        scores = scores + mask
    weights = softmax(scores)
    # Both the weight and the sum of weights are off; every step of the running sums rounds.
    return weights @ v, (2 * error + (2 * k.shape[1] + 4) * SINGLE) * (weights @ abs(v)).max()


def assert_close(out, reference, bound, unit=0.0):
    """Within a bound of the arithmetic, and the rounding of the result's type."""
    error = abs(out.astype(np.float64) - reference)
    assert np.isfinite(out).all()
    assert (error <= bound + unit * abs(reference) + (2.0**-25 if unit == HALF else 0)).all(), error.max()


# attention of one query: simd_sum, simd_max, fmax, fast::exp, barriers


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float", "sinks"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_sdpa_vector(run, dtype, mask):
    rng = np.random.default_rng(0)
    heads, kv_heads, length, dim = 4, 2, 75, 64
    queries = 3 if mask == "causal" else 1
    q, k, v = (
        rng.normal(size=(h, n, dim)).astype(dtype) for h, n in ((heads, queries), (kv_heads, length), (kv_heads, length))
    )
    allowed = rng.random((heads, queries, length)) < 0.7
    added = np.where(allowed, rng.normal(size=allowed.shape), -np.inf).astype(dtype)
    out, scale = sim.Output((heads, queries, dim), dtype), 0.125
    buffers = dict(enumerate([q, k, v, out, np.int32(heads // kv_heads), np.int32(length)]))
    buffers |= {6 + i: np.uint64(x) for i, x in enumerate([length * dim, dim] * 2)} | {10: np.float32(scale)}
    buffers |= {13: np.int32(1), 14: np.int32(length), 15: np.int32(queries * length)}
    buffers |= {11: allowed} if mask == "bool" else {12: added} if mask == "float" else {}
    sinks = rng.normal(size=heads).astype(dtype)
    buffers |= {16: sinks, 17: np.int32(heads)} if mask == "sinks" else {}
    flags = {
        20: mask in ("bool", "float"),
        21: 0,
        22: mask == "causal",
        23: mask == "bool",
        24: mask == "float",
        25: mask == "sinks",
    }
    name = f"sdpa_vector_{'float16_t' if dtype == np.float16 else 'float'}_64_64"
    stats = run(name, buffers, (heads, queries, 1), (1024, 1, 1), flags)
    assert stats.barriers and stats.simd_operations and stats.device_read and stats.threadgroup_written

    bias = {
        "causal": np.where(np.arange(length) <= length - queries + np.arange(queries)[:, None], 0, -np.inf),
        "bool": np.where(allowed, 0, -np.inf),
        "float": added.astype(np.float64),
    }.get(mask)
    if mask == "sinks":  # a token of value 0 that every head scores as it likes
        k = np.concatenate([k, np.zeros_like(k[:, :1])], 1)
        v = np.concatenate([v, np.zeros_like(v[:, :1])], 1)
        bias = np.zeros((heads, 1, length + 1))
        bias[:, :, -1] = sinks[:, None]
    reference, bound = attention_reference(q, k, v, scale, bias)
    assert_close(out.array, reference, bound, HALF if dtype == np.float16 else SINGLE)


def test_sdpa_vector_second_pass(run):
    rng = np.random.default_rng(1)
    heads, blocks, dim = 3, 64, 128
    partials = rng.normal(size=(heads, blocks, dim)).astype(np.float16)
    sums, maxima = rng.uniform(1, 9, (heads, blocks)).astype(np.float32), rng.normal(size=(heads, blocks)).astype(np.float32)
    maxima[:, ::5], sums[:, ::5] = np.finfo(np.float32).min, 0  # blocks without a token
    partials[:, ::5] = 0
    out = sim.Output((heads, dim), np.float16)
    buffers = {0: partials, 1: sums, 2: maxima, 3: out, 4: np.int32(blocks)}
    run("sdpa_vector_2pass_2_float16_t_128", buffers, (heads, 1, 1), (1024, 1, 1))
    factor = np.exp(maxima.astype(np.float64) - maxima.max(1, keepdims=True))
    total = (factor * sums).sum(1, keepdims=True)
    reference = np.einsum("hb,hbd->hd", factor, partials) / total
    bound = (blocks + 16) * SINGLE * (np.einsum("hb,hbd->hd", factor, abs(partials)) / total).max()
    assert_close(out.array, reference, bound, HALF)


# matrices: the lane layout of simdgroup_matrix, multiply_accumulate, shuffles along a row


def gemm(run, layout, m, n, k, dtype=np.float16, **options):
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(m, k)).astype(dtype), rng.normal(size=(k, n)).astype(dtype)
    stored_a, stored_b = (np.ascontiguousarray(x.T if c == "t" else x) for x, c in zip((a, b), layout, strict=True))
    out, tiles = sim.Output((m, n), dtype), (-(-n // 32), -(-m // 32))
    sizes = np.array([m, n, k, stored_a.shape[1], stored_b.shape[1], n, *tiles], np.int32)
    strides = np.zeros(3, np.int64)
    last = np.array([0, k // 16, 0, 0], np.int32)  # no swizzle, whole steps of k, no batch
    buffers = {
        0: stored_a,
        1: stored_b,
        3: out,
        4: np.frombuffer(sizes.tobytes() + strides.tobytes() + last.tobytes(), np.uint8),
    }
    buffers[5] = np.full(24, 255, np.uint8)  # read, but not used without a matrix to add
    flags = {10: 0, 100: 0, 110: 0, 200: m % 32 == 0, 201: n % 32 == 0, 202: k % 16 == 0}
    name = {np.float16: "float16", np.float32: "float32"}[dtype]
    kernel = f"steel_gemm_fused_{layout}_{name}_{name}_bm32_bn32_bk16_wm2_wn2"
    run(kernel, buffers, (*tiles, 1), (32, 2, 2), flags, **options)
    a, b = a.astype(np.float64), b.astype(np.float64)
    return out.array, a @ b, (k + 2) * SINGLE * (abs(a) @ abs(b))


@pytest.mark.parametrize("layout", ["nn", "nt", "tn", "tt"])
@pytest.mark.parametrize("shape", [(64, 32, 32), (40, 50, 29)], ids=["aligned", "odd"])
def test_steel_gemm(run, layout, shape):
    out, reference, bound = gemm(run, layout, *shape)
    assert_close(out, reference, bound, HALF)


@pytest.mark.parametrize("fused", [True, False])
def test_steel_gemm_fp32(run, fused):
    assert_close(*gemm(run, "nt", 40, 50, 29, np.float32, fused=fused), SINGLE)


def steel_attention(run, dim, mask, **options):
    rng = np.random.default_rng(3)
    heads, kv_heads, queries, length = 2, 1, 40, 70
    block_q, block_k = 32, 16 if dim == 256 else 32
    columns = 2 if dim == 256 else 1  # simdgroups side by side; then the operands of the product are half
    q, k, v = (
        rng.normal(size=(h, n, dim)).astype(np.float16) for h, n in ((heads, queries), (kv_heads, length), (kv_heads, length))
    )
    out, scale = sim.Output((heads, queries, dim), np.float16), dim**-0.5
    blocks = [-(-queries // block_q), -(-length // block_k), queries // block_q, length // block_k]
    first = np.array([1, heads, dim, queries, length, heads // kv_heads], np.int32).tobytes() + np.float32(scale).tobytes()
    first += np.array([*blocks, queries % block_q, length % block_k, length - queries], np.int32).tobytes()
    strides = [x for n in (queries, length, length, queries) for x in (0, n * dim, dim)]
    buffers = {0: q, 1: k, 2: v, 3: out, 4: np.frombuffer(first + np.array(strides, np.int64).tobytes(), np.uint8)}
    allowed = rng.random((heads, queries, length)) < 0.7
    if mask == "bool":
        buffers |= {5: np.array([0, queries * length, length], np.int64), 6: allowed}
    flags = {200: 0, 201: 0, 300: mask == "bool", 301: mask == "causal", 302: 0, 303: 0}
    kernel = f"steel_attention_float16_bq{block_q}_bk{block_k}_bd{dim}_bv{dim}_wm4_wn{columns}_maskbool_"
    run(kernel, buffers, (blocks[0], heads, 1), (32, 4, columns), flags, **options)
    causal = np.arange(length) <= length - queries + np.arange(queries)[:, None]
    bias = {"causal": np.where(causal, 0, -np.inf), "bool": np.where(allowed, 0, -np.inf)}.get(mask)
    reference, bound = attention_reference(q, k, v, scale, bias)
    if columns == 2:  # queries are scaled before they are rounded to half
        bound += 2 * HALF * scale * (abs(q.astype(float)) @ abs(k.astype(float)).swapaxes(1, 2)).max() * abs(v).max()
    return out.array, reference, bound


@pytest.mark.parametrize("mask", ["none", "causal", "bool"])
@pytest.mark.parametrize("dim", [64, 256])
def test_steel_attention(run, dim, mask):
    assert_close(*steel_attention(run, dim, mask), HALF)


# half precision: subnormals as operands, conversions, rounding

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def mxfp4_product(run, **options):
    """All values are small whole numbers times a power of two: any order of the sum is exact."""
    rng = np.random.default_rng(4)
    rows, columns, tokens = 16, 1024, 2
    codes = rng.integers(0, 16, (rows, columns))
    assert (codes % 8 == 1).any()
    exponents = rng.integers(125, 130, (rows, columns // 32)).astype(np.uint8)
    x = rng.integers(-8, 9, (tokens, columns)).astype(np.float32)
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)
    y = sim.Output((tokens, rows), np.float32)
    buffers = {0: packed, 1: exponents, 3: x, 4: y, 5: np.int32(columns), 6: np.int32(rows)}
    run("mxfp4_qmv_fast_float_gs_32_b_4_batch_0_pr_0_hgs_0_r_4", buffers, (tokens, rows // 8, 1), (32, 2, 1), **options)
    return y.array, x @ (E2M1[codes] * np.exp2(exponents.astype(np.float64) - 127).repeat(32, 1)).T


def test_mxfp4_product_is_exact(run):
    np.testing.assert_array_equal(*mxfp4_product(run))


def test_mxfp4_needs_half_subnormals(run):
    """Code 1 becomes the half 0x0200, a subnormal, times 2**14."""

    def flush(ir):
        ir, n = re.subn(r"fmul half (%\d+), 0xH7400", r"call half @flushed(half \1)", ir)
        assert n
        lines = ["%bits = bitcast half %x to i16", "%small = icmp ult i16 %bits, 1024"]
        lines += ["%kept = select i1 %small, half 0.0, half %x", "%y = fmul half %kept, 0xH7400", "ret half %y"]
        return ir + "define internal half @flushed(half %x) {\n" + "\n".join(lines) + "\n}\n"

    y, reference = mxfp4_product(run, edit=flush)
    assert (y != reference).all()


def test_mxfp4_numbers(run):
    """Every code with every exponent that keeps the result normal."""
    codes = np.tile(np.arange(16), 2 * 250).reshape(250, 32)
    exponents = np.arange(3, 253).astype(np.uint8)
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)
    out = sim.Output((250, 32), np.float32)
    run("mxfp4_dequantize_float_gs_32_b_4_hgs_false", {0: packed, 1: exponents, 3: out}, (packed.size // 32, 1, 1), (32, 1, 1))
    np.testing.assert_array_equal(out.array, E2M1[codes] * np.exp2(exponents.astype(np.float64) - 127)[:, None])


def test_rounding_of_every_half(run):
    x = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    x = np.where(np.isnan(x), np.float16(np.nan), x)
    out = sim.Output(x.shape, np.float16)
    run("v_Roundfloat16float16", {0: x, 1: out, 2: np.uint32(x.size)}, (x.size // 1024, 1, 1), (1024, 1, 1))
    np.testing.assert_array_equal(out.array, np.rint(x))


def test_conversions_to_and_from_half(run):
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    single = sim.Output(halves.shape, np.float32)
    run("v_copyfloat16float32", {0: halves, 1: single, 2: np.uint32(halves.size)}, (halves.size // 1024, 1, 1), (1024, 1, 1))
    np.testing.assert_array_equal(single.array, halves.astype(np.float32))
    # Halves, the numbers half way between two of them, and their neighbours.
    finite = np.unique(halves[np.isfinite(halves)].astype(np.float32))
    middle = (finite[1:] + finite[:-1]) / 2
    x = np.concatenate(
        [finite, middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf), [65519, 65520, 1e9, np.inf]]
    )
    x = np.resize(x, -(-x.size // 1024) * 1024).astype(np.float32)
    half = sim.Output(x.shape, np.float16)
    run("v_copyfloat32float16", {0: x, 1: half, 2: np.uint32(x.size)}, (x.size // 1024, 1, 1), (1024, 1, 1))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(half.array, x.astype(np.float16))


# reductions, votes and scans


def softmax_of(run, precise, **options):
    x = (np.random.default_rng(5).normal(size=(3, 1000)) * 3).astype(np.float16)
    out = sim.Output(x.shape, np.float16)
    kernel = "block_softmax_precise_float16" if precise else "block_softmax_float16"
    run(kernel, {0: x, 1: out, 2: np.int32(1000)}, (3, 1, 1), (256, 1, 1), **options)
    x = x.astype(np.float64)
    reference, total = softmax(x), np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)
    # Rounded: the difference (its error is the weight's relative one), the exponential, 14 sums (4 of a thread, 5 of a
    # simdgroup, 5 of the threadgroup), the inverse, the product. Exponentials below 2**-14 are subnormal halves.
    unit, least = (SINGLE, 0) if precise else (HALF, 2.0**-25)
    bound = (unit * (np.ptp(x) + 17) + 4 * SINGLE * np.ptp(x) + 1000 * least / total) * reference + least / total
    return out.array, reference, bound


@pytest.mark.parametrize("precise", [True, False], ids=["fp32", "half"])
def test_softmax(run, precise):
    assert_close(*softmax_of(run, precise), HALF)


@pytest.mark.parametrize("hit", [None, 0, 33, 999])
def test_votes(run, hit):
    for kernel, rest in (("all_reduce_orbool_", False), ("all_reduce_andbool_", True)):
        x = np.full(1000, rest)
        if hit is not None:
            x[hit] = not rest
        out = sim.Output(1, np.bool_)
        run(kernel, {0: x, 1: out, 2: np.uint64(1000), 3: np.uint64(1000)}, (1, 1, 1), (64, 1, 1))
        assert out.array[0] == (rest if hit is None else not rest)


@pytest.mark.parametrize("special", ["none", "nan", "inf"])
@pytest.mark.parametrize("kind", ["min", "max"])
def test_minimum_and_maximum(run, kind, special):
    x = np.random.default_rng(6).normal(size=1000).astype(np.float32)
    if special != "none":
        x[::97] = np.nan if special == "nan" else np.inf
        x[5::97] = -np.inf if special == "inf" else x[5::97]
    out = sim.Output(1, np.float32)
    run(f"all_reduce_{kind}float32", {0: x, 1: out, 2: np.uint64(1000), 3: np.uint64(1000)}, (1, 1, 1), (64, 1, 1))
    np.testing.assert_array_equal(out.array[0], getattr(np, kind)(x))


def test_scan_passes_the_last_lane_on(run):
    """Whole numbers: sums are exact. The carry of 32 rows is `simd_shuffle` from lane 31."""
    x = np.random.default_rng(7).integers(-9, 10, (100, 40)).astype(np.float32)
    out = sim.Output(x.shape, np.float32)
    buffers = {0: x, 1: out, 2: np.uint64(100), 3: np.uint64(40), 4: np.uint64(2)}
    run("strided_scan_inclusive_sum_float32_float32", buffers, (1, 2, 1), (256, 1, 1))
    np.testing.assert_array_equal(out.array, x.cumsum(0))


def test_rms_norm(run):
    rng = np.random.default_rng(8)
    x, w = rng.normal(size=(3, 1000)).astype(np.float16), rng.normal(size=1000).astype(np.float16)
    out = sim.Output(x.shape, np.float16)
    buffers = {0: x, 1: w, 2: out, 3: np.float32(1e-5), 4: np.uint32(1000), 5: np.uint32(1)}
    run("rmsfloat16", buffers, (3, 1, 1), (256, 1, 1))
    x, w = x.astype(np.float64), w.astype(np.float64)
    reference = w * x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-5)
    # x times the inverse root is rounded to half before it is multiplied by w.
    assert_close(out.array, reference, (HALF + 40 * SINGLE) * abs(reference), HALF)


# what the modules say


def test_arithmetic_that_the_modules_ask_for(mlx):
    """Compiled as MLX compiles: no fast-math flag on any operation, yet `a * b + c` may be rounded once."""
    kernels = ["sdpa_vector_float16_t_64_64", "mxfp4_qmv_fast_float_gs_32_b_4_batch_0_pr_0_hgs_0_r_4", "rmsfloat16"]
    for kernel in kernels:
        found = air.facts(air.disassemble(mlx.bitcode(kernel)))
        assert found["air.compile.fast_math_disable"] == found["air.compile.denorms_disable"] == 1
        assert not [name for name in found if name.startswith(("operation with", "attribute"))]
        assert found["llvm.fmuladd.f32"], kernel


def test_checker_sees_a_barrier_that_is_missing(run):
    def without_first_barrier(ir):
        ir, n = re.subn(r"^.*call void @air\.wg\.barrier.*\n", "", ir, count=1, flags=re.M)
        assert n
        return ir

    with pytest.raises(sim.Fault, match=r"RACE|UNINITIALISED"):
        softmax_of(run, True, edit=without_first_barrier)


# The same kernels must fail when a function of the simulator means something else.

LAYOUT = "q = l / 4, r = (q & 4) + (l / 2) % 4, c = (q & 2) * 2 + (l % 2) * 2"
MUTATIONS = {
    "another lane layout": (LAYOUT, "r = l / 4, c = l % 4 * 2", 2, "gemm"),
    "the accumulator is left out": ("float s = m->c ? float(m->c->e[k]) : 0.f;", "float s = 0;", 1, "gemm"),
    "operands exchanged": ("s += a[r * 8 + i] * b[i * 8 + c + k]", "s += b[r * 8 + i] * a[i * 8 + c + k]", 1, "gemm"),
    "shuffle_xor adds": ("in[(l ^ a[l]) & 31]", "in[(l + a[l]) & 31]", 1, "attention"),
    "shuffle from the next lane": ("in[a[l] & 31]", "in[(a[l] + 1) & 31]", 1, "scan"),
    "a sum of all but one lane": ("for (int l = 0; l < d; l++) {", "for (int l = d < 16; l < d; l++) {", 1, "scores"),
    "only lower lanes get a sum": ("out[l] = t[0];", "out[l] = l < 16 ? t[0] : in[l];", 1, "scores"),
    "a maximum that ignores half of the lanes": ("MSL_RED(RMax, (a < b || a != a) ? b : a)", "MSL_RED(RMax, a)", 1, "maximum"),
    "a vote of one lane": (
        'exch<msl::ROr>(uint(b), 0u, 0, "simd_any"',
        'exch<msl::First>(uint(b), 0u, 0, "simd_any"',
        1,
        "votes",
    ),
}
CHECKS = {
    "gemm": lambda run: assert_close(*gemm(run, "nt", 40, 50, 29), HALF),
    "attention": lambda run: assert_close(*steel_attention(run, 64, "none"), HALF),
    "scan": lambda run: test_scan_passes_the_last_lane_on(run),
    "scores": lambda run: test_sdpa_vector(run, np.float32, "none"),
    "maximum": lambda run: test_minimum_and_maximum(run, "max", "none"),
    "votes": lambda run: test_votes(run, 33),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_another_meaning_of_a_function_is_caught(run, tmp_path, name):
    old, new, times, check = MUTATIONS[name]
    shutil.copytree(sim.INCLUDE, tmp_path / "include")
    header = tmp_path / "include" / "msl" / "simd.h"
    text = header.read_text()
    assert text.count(old) == times
    header.write_text(text.replace(old, new))

    def mutated(*args, **options):
        return run(*args, **options, include=tmp_path / "include")

    CHECKS[check](run)
    with pytest.raises(AssertionError):
        CHECKS[check](mutated)

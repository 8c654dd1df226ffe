"""What must hold of the Metal kernels beyond their results: bytes, launches, cost, schedules, sources."""

import ctypes
import itertools
import json
import math
import re

import cost
import metal_ops
import metal_simulator as sim
import mlx.core as mx
import msl_lint
import msl_translate
import numpy as np
import pytest
from instances import INSTANCES

import tqext
from covering import FULL
from support import KERNEL_TOLERANCE, Problem, assert_close

METAL = metal_ops.ROOT / "metal"
SOURCES = sorted(METAL.glob("*.metal")) + sorted(METAL.glob("*.h")) + [METAL / "instances.inc"]


def attend(device, problem, **changes):
    return metal_ops.turboquant_attention(
        device, problem.q, problem.packed_k, problem.packed_v, **{**problem.arguments(), **changes}
    )


def device_for(n_rows, **options):
    """A checked device with the split kernel for up to 4 rows and the matrix kernel for more, whatever the plan chooses."""
    return metal_ops.Device("check", kernel="split" if n_rows <= 4 else "matrix", **options)


def packed_bytes(problem):
    """Bytes of key codes, key norms, value codes and value parameters."""
    return [x.nbytes for x in (*problem.packed_k[:2], *problem.packed_v[:2])]


def bytes_read(device, buffer):
    index = metal_ops.ENUM[buffer]
    return sum(stats.buffer_read[index] for _, stats in device.log)


CODINGS = [("groups", 2), ("lloyd", 3)]


# --- bytes and launches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coding, value_bits", CODINGS)
@pytest.mark.parametrize(
    "kernel, n_repeats, n_rows",
    [
        *(("split", n, 1) for n in (1, 2, 3, 4)),
        *(("matrix", n, 1) for n in (2, 8, 16)),
        *(("prompt32", *n) for n in ((16, 1), (4, 8))),
    ],
)
def test_every_packed_byte_is_read_once_for_all_rows(kernel, n_repeats, n_rows, coding, value_bits):
    problem = Problem(
        n_repeats=n_repeats, n_rows=n_rows, n_coded=600, n_tail=9, value_coding=coding, value_bits=value_bits, means=True,
        balance=True,
    )  # fmt: skip
    checked = metal_ops.Device("check", kernel=kernel)
    assert_close(attend(checked, problem), problem.answer(), KERNEL_TOLERANCE[mx.float32])
    read = [sum(stats.buffer_read[i] for _, stats in checked.log) for i in range(1, 5)]
    assert read == packed_bytes(problem)


@pytest.mark.parametrize("n_repeats", [1, 4, 8, 16])
def test_means_are_read_once_for_all_rows(n_repeats):
    """Once by simdgroups with whole blocks to themselves; a range of 256 tokens gives those of the split kernel half of one."""
    for n_coded, n_cores in ((4096, 1), (4096 - 37, 1), (1024, 80)):
        problem = Problem(n_kv_heads=1, n_repeats=n_repeats, n_coded=n_coded, head_dim=64, means=True)
        device = device_for(n_repeats, n_cores=n_cores)
        attend(device, problem)
        readers = 2 if n_repeats <= 4 and n_cores == 80 else 1
        assert bytes_read(device, "kAttentionMeans") == readers * problem.packed_k.means.nbytes


def test_residual_signs_are_read_once():
    for n_repeats in (4, 8):
        checked = device_for(n_repeats)
        problem = Problem(n_repeats=n_repeats, n_coded=300, qjl=True)
        attend(checked, problem)
        signs, norms = problem.packed_k.signs, problem.packed_k.residual_norms
        indices = metal_ops.ENUM["kAttentionKeySigns"], metal_ops.ENUM["kAttentionResidualNorms"]
        read = [sum(stats.buffer_read[i] for _, stats in checked.log) for i in indices]
        assert read == [signs.nbytes, norms.nbytes]


@pytest.mark.parametrize("n_coded, expected", [(0, 1), (1, 1), (256, 1), (257, 2), (4096, 2)])
def test_launches_below_and_above_the_split(fast, n_coded, expected):
    for n_repeats, n_rows in ((1, 1), (4, 1), (8, 1), (4, 8)):
        problem = Problem(n_repeats=n_repeats, n_rows=n_rows, n_coded=n_coded, n_first=4, n_tail=63, options={"mask": "causal"})
        fast.reset()
        attend(fast, problem)
        assert len(fast.log) == expected if n_repeats * n_rows <= 4 else len(fast.log) <= 2


def test_matvec_reads_every_weight_byte_once(checked):
    rng = __import__("numpy").random.default_rng(0)
    for n in (1, 2, 4, 8):
        weight = mx.array(rng.integers(0, 2**32, (37, 40), dtype="uint32"))
        checked.reset()
        metal_ops.q1_matmul(checked, mx.ones((n, 1280)), weight, mx.ones((37, 10), mx.float16))
        ((_, stats),) = checked.log
        assert stats.buffer_read[metal_ops.ENUM["kQ1Weight"]] == weight.nbytes
        checked.reset()
        metal_ops.ternary_matmul(checked, mx.ones((n, 640)), weight, mx.ones((37, 5), mx.float16))
        ((_, stats),) = checked.log
        assert stats.buffer_read[metal_ops.ENUM["kQ1Weight"]] == weight.nbytes


# --- realistic sizes, schedules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [sim.IN_ORDER, sim.RANDOM])
@pytest.mark.parametrize("n_repeats", [4, 8])
def test_realistic_size_on_any_schedule(n_repeats, schedule):
    """4096 keys, 4 KV heads, head dimension 128, exact tokens, mean: no report, the tolerance of the CPU."""
    problem = Problem(n_kv_heads=4, n_repeats=n_repeats, n_coded=4096, n_first=4, n_tail=40, means=True, dtype=mx.float16)
    checked = device_for(n_repeats, schedule=schedule, seed=n_repeats)
    assert_close(attend(checked, problem), problem.answer(), KERNEL_TOLERANCE[mx.float16])
    assert all(not stats.report for _, stats in checked.log)


@pytest.mark.parametrize("coding, value_bits", CODINGS)
@pytest.mark.parametrize("n_cores", [1, 3, 10, 80])
def test_any_number_of_ranges_gives_the_same_answer(n_cores, coding, value_bits):
    for n_repeats in (4, 8):
        device = device_for(n_repeats, n_cores=n_cores)
        problem = Problem(
            n_kv_heads=1, n_repeats=n_repeats, n_coded=3001, n_first=4, n_tail=33, head_dim=64, value_coding=coding,
            value_bits=value_bits, means=True, balance=True,
        )  # fmt: skip
        assert_close(attend(device, problem), problem.answer(), KERNEL_TOLERANCE[mx.float32])


@pytest.mark.parametrize("n_repeats", [1, 8])
@pytest.mark.parametrize("padding", [0, 31, 45, 64, 200, 511, 700])
def test_blocks_begin_where_they_were_coded_whatever_the_padding(padding, n_repeats):
    """Tiles and shares are counted from a block's first token; several tiles per simdgroup."""
    device = device_for(n_repeats, n_cores=1)
    problem = Problem(
        n_kv_heads=1, n_repeats=n_repeats, n_coded=1301, head_dim=64, means=True, balance=True,
        options={"left_padding": mx.array([padding])},
    )  # fmt: skip
    assert_close(attend(device, problem), problem.answer(), KERNEL_TOLERANCE[mx.float32])


@pytest.mark.parametrize("n_repeats", [1, 4, 8, 9])
def test_means_of_a_dense_rotation_are_fp32(n_repeats):
    problem = Problem(n_repeats=n_repeats, n_coded=300, head_dim=64, rotation="none", means=True)
    means = problem.packed_k.means.astype(mx.float32) * 1.0001
    problem.packed_k = problem.packed_k._replace(means=means)
    assert_close(attend(device_for(n_repeats), problem), problem.answer(), KERNEL_TOLERANCE[mx.float32])


@pytest.mark.parametrize("coding, value_bits", CODINGS)
@pytest.mark.parametrize("n_repeats", [1, 4, 8])
def test_tokens_beyond_the_lengths_may_hold_anything(n_repeats, coding, value_bits):
    """One row, several tiles per simdgroup, lengths that end in a tile, with a tile and with a block."""
    device = device_for(n_repeats, n_cores=1)
    lengths = [300, 352, 384, 0, 700]
    problem = Problem(
        batch=5, n_kv_heads=1, n_repeats=n_repeats, n_coded=700, n_tail=3, head_dim=64, means=True, value_coding=coding,
        value_bits=value_bits, options={"lengths": mx.array([[0, n, 3] for n in lengths])},
    )  # fmt: skip
    want = problem.answer()
    norms, params, means = (np.array(x) for x in (problem.packed_k.norms, problem.packed_v.params, problem.packed_k.means))
    for b, n in enumerate(lengths):
        norms[b, :, n:], params[b, :, n:], means[b, :, -(-n // 64) :] = np.nan, np.nan, np.nan
    problem.packed_k = problem.packed_k._replace(norms=mx.array(norms), means=mx.array(means))
    problem.packed_v = problem.packed_v._replace(params=mx.array(params))
    assert_close(attend(device, problem), want, KERNEL_TOLERANCE[mx.float32])


@pytest.mark.parametrize(
    "dtype, dim", [(mx.float16, 128), (mx.float32, 96)] + [(mx.float16, 96), (mx.float32, 128)] * FULL, ids=str
)
def test_encoded_bytes_of_3000_tokens_are_the_cpus(fast, dtype, dim):
    """Every byte of 3000 tokens, 1000 in each of three heads. Roundings that differ show in some parameters of a thousand."""
    rng = np.random.default_rng(5)
    x = mx.array((rng.normal(size=(1, 3, 1000, dim)) * np.exp(rng.normal(size=dim))).astype(np.float32)).astype(dtype)
    means, balance = tqext.block_means(x), mx.array(np.exp(rng.normal(size=(3, dim))).astype(np.float32))
    for bits in (2, 3, 4):
        options = dict(bits=bits, means=means, balance=balance, qjl=True)
        packed = tqext.quantize_keys(x, **options)
        want = packed.codes, packed.norms, packed.signs, packed.residual_norms
        for got, array in zip(metal_ops.quantize_keys(fast, x, **options), want, strict=True):
            assert mx.array_equal(got, array).item()
    for coding, bits in (("groups", 2), ("groups", 4), ("lloyd", 2), ("lloyd", 3), ("lloyd", 4)):
        want = tqext.quantize_values(x, coding=coding, bits=bits)[:2]
        for got, array in zip(metal_ops.quantize_values(fast, x, coding=coding, bits=bits), want, strict=True):
            assert mx.array_equal(got, array).item()


def test_preempted_threads_change_nothing(checked):
    """A switch between threads at any access, not only at barriers."""
    problem = Problem(n_kv_heads=1, n_coded=300, n_tail=5, head_dim=64)
    checked.reset()
    checked.schedule, checked.seed = sim.RANDOM + sim.PREEMPT, 3
    try:
        out = attend(checked, problem)
    finally:
        checked.schedule = sim.IN_ORDER
    assert_close(out, problem.answer(), KERNEL_TOLERANCE[mx.float32])


# --- counted cost -----------------------------------------------------------------------------------------------------


def counted_per_token(head_dim, rows, **options):
    """Operations per token and KV head in the split kernel's loop: the difference of two lengths, without the prologue."""
    totals = []
    for n_coded in (2048, 4096):
        problem = Problem(n_kv_heads=1, n_repeats=rows, n_coded=n_coded, head_dim=head_dim, dtype=mx.float16, **options)
        # Equal scores: the maximum is found in the first tile. A new one costs some 20 operations per row and comes ever rarer.
        problem.q = mx.zeros_like(problem.q)
        count, check = (metal_ops.Device(mode, n_cores=1, kernel="split") for mode in ("count", "check"))
        # The first call loads the library; its counters run from then on.
        attend(count, problem)
        kernel = count.log[0][0]
        library = next(lib for lib in sim.loaded("count") if kernel in lib.kernels)
        before = [library.counter("fma"), library.counter("exp2")]
        attend(count, problem)
        fma, exp2 = (library.counter(name) - old for name, old in zip(("fma", "exp2"), before, strict=True))
        attend(check, problem)
        stats = check.log[0][1]
        # One vote per tile is no shuffle.
        shuffles = 32 * stats.simd_operations - n_coded
        totals.append([fma, exp2, shuffles, stats.threadgroup_read + stats.threadgroup_written])
    return cost.Counted(*((b - a) / 2048 for a, b in zip(*totals, strict=True)))


def SELECTION(name, params):
    """(a kernel exists for these parameters, they run by default)."""
    if name == "test_counted_cost_at_dimension_128":
        return True, params["rows"] != 2 and params["lloyd"] == params["means"]
    return True, True


@pytest.mark.parametrize(
    "rows, lloyd, means, most",
    [
        (1, False, False, 5.3),
        (2, False, False, 7.8),
        (4, False, False, 13.2),
        (1, False, True, 5.4),
        (2, False, True, 8.0),
        (4, False, True, 13.4),
        (1, True, True, 5.1),
        (2, True, True, 7.5),
        (4, True, True, 12.3),
    ],
)
def test_counted_cost_at_dimension_128(rows, lloyd, means, most):
    """Core cycles per key and KV head stay within the model that the design was chosen by."""
    coding = dict(value_coding="lloyd", value_bits=3) if lloyd else {}
    counted = counted_per_token(128, rows, means=means, balance=means, **coding)
    cycles = cost.core_cycles(counted, cost.Loop(128, rows, lloyd, means))
    print(f"rows {rows}: {counted}, {cycles:.2f} core cycles")
    assert round(cycles, 1) <= most
    if lloyd and means:
        # A compiler's code holds these operations and loads, stores and addresses beside them.
        compiled = metal_ops.kernel_figures("split", 256, rows)["tile"] / cost.LANES_PER_CYCLE
        assert cycles <= compiled <= 2.5 * cycles
    # Scores and values are 2 x 128 FMA per row; what is above them is the norm, the biases, the means and the sums.
    assert 256 * rows <= counted.fma <= 256 * rows * 1.2
    assert counted.exp2 <= 1.1 * rows


def shape_of(n_rows, head_dim, n_coded, n_exact, n_cores=10, **more):
    """A call of one KV head as the plan sees it; 3-bit keys and Lloyd-Max values."""
    return metal_ops.AttentionShape(
        **dict(
            type=1, batch=1, n_q_heads=1, n_kv_heads=1, n_queries=n_rows, head_dim=head_dim, value_dim=head_dim,
            n_coded=n_coded, n_tail=n_exact, key_bits=3, value_bits=3, value_coding=1, hadamard=1, n_cores=n_cores, scale=1.0,
        )
        | more
    )  # fmt: skip


def figures_of(kernel, dims, rows=0):
    known = metal_ops.kernel_figures(kernel, dims, rows)
    known.pop("dims")
    return cost.Figures(**known)


@pytest.mark.parametrize("n_cores", [1, 10, 80])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_the_models_of_the_plan_and_of_the_tests_agree(head_dim, n_cores):
    """metal/dispatch_plan.h and cost.py: occupancy, threadgroup memory, staging, beginnings, exact tokens, joining."""
    dims, split = 2 * head_dim, 2 if head_dim > metal_ops.ENUM["kPromptDim"] else 1
    for rows, coded, exact in itertools.product((1, 2, 3, 4, 5, 8, 17, 32, 33, 100, 2048), (0, 100, 8192), (0, 64, 2048)):
        if coded + exact == 0:
            continue
        theirs = metal_ops.attention_cycles(shape_of(rows, head_dim, coded, exact, n_cores))
        tiles, wanted, exact_ranges = -(-coded // 256), 4 * n_cores, -(-exact // 32)
        n = -(-tiles // max(1, -(-tiles // wanted)))
        ours = dict.fromkeys(metal_ops.KERNELS, float("inf"))
        if rows <= 4:
            template, direct = rows if rows <= 2 else 4, n <= 1 and exact <= metal_ops.ENUM["kExactTokens"]
            work = cost.Work(rows, dims, coded, exact, n, exact_ranges, 0 if direct else n + exact_ranges, n_cores)
            padded = 64 * cost.power_of_two(head_dim // 32)
            ours["split"] = cost.split_cycles(figures_of("split", padded, template), template, work)
        row_blocks = min(-(-rows // 8), max(1, 16384 // (32 * head_dim)), 8)
        room = 32768 - 8 * row_blocks * 4 * head_dim - 2048 - 512  # for tiles: codes, two norms
        groups = min(max(1, 4 // row_blocks), room // (4 * 32 * (6 * head_dim // 32 + 2)))
        work = cost.Work(rows, dims, coded, exact, n, exact_ranges, n * groups + exact_ranges, n_cores)
        ours["matrix"] = cost.matrix_cycles(figures_of("matrix", dims), row_blocks, groups, work)
        for block in (32, 64)[: 3 - split]:
            ranges = max(1, 2 * n_cores // -(-rows // block))
            tokens = max(512, math.ceil(math.ceil((coded + exact) / ranges) / 64) * 64)
            direct = coded + exact <= tokens
            n_prompt = 1 if direct else -(-coded // tokens) + -(-exact // tokens)
            work = cost.Work(rows, dims, coded, exact, n_prompt, 0, 0 if direct else n_prompt, n_cores)
            ours[f"prompt{block}"] = cost.prompt_cycles(figures_of(f"prompt{block}", dims, block), block, split, work)
        assert theirs == pytest.approx(ours, rel=1e-9)


@pytest.mark.parametrize("lloyd, rows, most_bytes", [(True, 64, 165), (False, 64, 185), (True, 32, 180)])
def test_counted_operations_of_the_prompt_kernel_at_dimension_128(lloyd, rows, most_bytes):
    """Per tile of 32 tokens: products of 8x8 matrices as in the plan's cost model, barriers, threadgroup bytes."""
    coding = dict(value_coding="lloyd", value_bits=3) if lloyd else {}
    totals = []
    for n_coded in (1024, 2048):
        problem = Problem(n_kv_heads=2, n_repeats=1, n_rows=rows, n_coded=n_coded, means=True, dtype=mx.float16, **coding)
        problem.q = mx.zeros_like(problem.q)  # the maximum is found in the first tile
        device = metal_ops.Device("check", n_cores=1)
        attend(device, problem)
        ((name, stats),) = device.log
        assert name.endswith(f"_r{rows}")
        totals.append([stats.simd_operations, stats.barriers, stats.threadgroup_read])
    operations, barriers, read = ((b - a) / (2 * 1024 / 32) for a, b in zip(*totals, strict=True))
    eight_rows = rows / 8
    products = 128 + (0 if lloyd else 4)  # biases of value groups
    # A vote, a shuffle of the mean's score; every 16 tiles 16 products for the means.
    assert operations == eight_rows * (products + 3)
    assert barriers == 4 + 2 / 16
    print(f"{read / (eight_rows * 128):.0f} threadgroup bytes per product")
    assert 128 <= read / (eight_rows * 128) <= most_bytes


# --- plan -------------------------------------------------------------------------------------------------------------


def test_plan_fits_every_shape(fast):
    """No shape asks for more threads or threadgroup memory than any Apple GPU has."""
    lib = metal_ops.plans()
    for k, v, repeats, queries, key_bits, (coding, value_bits), qjl, means_kind in itertools.product(
        (32, 64, 80, 128, 192, 256), (64, 128, 256), (1, 3, 8, 71), (1, 8, 300), (2, 3, 4),
        ((0, 2), (0, 4), (1, 2), (1, 3), (1, 4)), (0, 1), range(3),
    ):  # fmt: skip
        shape = metal_ops.AttentionShape(
            batch=1, n_q_heads=2 * repeats, n_kv_heads=2, n_queries=queries, head_dim=k, value_dim=v, n_coded=5000, n_tail=50,
            key_bits=key_bits, value_bits=value_bits, value_coding=coding, hadamard=1, means_kind=means_kind,
            has_residual=qjl, n_cores=10, scale=1.0,
        )  # fmt: skip
        plan = metal_ops.plan_attention(lib, shape)[0]
        assert len(plan["dispatches"]) <= 3
        tables = 2 if coding and (key_bits, metal_ops.padded(k)) != (value_bits, v) else 1
        for dispatch in plan["dispatches"]:
            assert 32 <= dispatch["threads"] <= 256 and dispatch["threads"] % 32 == 0
            assert sum(dispatch["threadgroup_bytes"]) + 2048 * tables + 256 <= 32768
            assert all(n >= 1 for n in dispatch["grid"])


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 160, 256])
def test_plan_takes_the_kernel_that_costs_least(head_dim):
    """By the model of dispatch_plan.h: the split kernel, the matrix kernel, then blocks of 32 or 64 rows."""
    chosen = {}
    rows_of_calls = (1, 2, 3, 4, 5, 8, 9, 12, 16, 17, 32, 33, 64, 65, 100, 2048)
    for rows, n_coded, n_tail in itertools.product(rows_of_calls, (0, 100, 8192), (0, 64, 2048)):
        shape = shape_of(rows, head_dim, n_coded, n_tail, n_q_heads=8, n_kv_heads=8)
        kernel = metal_ops.plan_attention(metal_ops.plans(), shape)[0]["dispatches"][0]["kernel"]
        cycles = metal_ops.attention_cycles(shape)
        matrix_blocks = min(-(-rows // 8), 16384 // (32 * head_dim), 8)
        passes = {"split": 1, "matrix": -(-rows // (8 * matrix_blocks)), "prompt32": -(-rows // 32), "prompt64": -(-rows // 64)}
        close = [k for k in cycles if cycles[k] <= 1.1 * min(cycles.values())]
        best = min(close, key=lambda k: (passes[k], cycles[k]))
        assert best == (kernel.split("_")[2] + (kernel.rsplit("_r")[-1] if "prompt" in kernel else ""))
        chosen[rows, n_coded, n_tail] = best
    print({key: best for key, best in chosen.items() if key[1] == 8192})
    wide = "prompt32" if head_dim > 128 else "prompt64"
    # One launch where the context is short; few rows of a long one: the split kernel unless lanes are idle; eight: matrices.
    assert all(chosen[rows, 100, tail] == "split" for rows in (1, 2, 3, 4) for tail in (0, 64))
    idle = head_dim in (96, 160)
    assert all(chosen[rows, 8192, 0] == ("matrix" if idle and rows > 2 else "split") for rows in (1, 2, 3, 4))
    assert (
        chosen[8, 8192, 0] == ("prompt32" if head_dim == 256 else "matrix")
        and chosen[17, 8192, 64] == chosen[32, 8192, 2048] == "prompt32"
    )
    assert chosen[65, 8192, 2048] == chosen[2048, 0, 2048] == wide


def test_plan_of_latents():
    """Two launches; a row block and a range for each threadgroup; ranges of whole blocks, of at least 512 tokens."""
    for n_cores, n_heads, n_queries, n_coded, n_exact in (
        (10, 128, 1, 131072, 192), (80, 16, 1, 131072, 192), (40, 20, 8, 5000, 0), (10, 128, 8, 0, 7), (1, 1, 1, 0, 0),
    ):  # fmt: skip
        shape = metal_ops.AttentionShape(
            type=1, batch=1, n_q_heads=n_heads, n_kv_heads=1, n_queries=n_queries, head_dim=512, value_dim=512,
            n_coded=n_coded, n_tail=n_exact, key_bits=3, value_bits=3, value_coding=1, hadamard=1, latent=1, n_cores=n_cores,
            scale=1.0,
        )  # fmt: skip
        plan, _ = metal_ops.plan_attention(metal_ops.plans(), shape)
        *attend, combine = plan["dispatches"]
        assert len(attend) == (n_coded + n_exact > 0) and combine["grid"] == [n_heads * n_queries, 1, 1]
        for dispatch in attend:
            blocks = -(-n_heads * n_queries // 16)
            assert dispatch["grid"] == [plan["n_parts"], 1, blocks] and dispatch["threads"] == 256
            assert blocks * plan["n_ranges"] <= max(2 * n_cores, blocks) and plan["n_ranges"] <= -(-n_coded // 512)
            assert plan["part_numbers"] == plan["n_parts"] * n_heads * n_queries * 512
    assert metal_ops.has_latent_kernel(mx.zeros((1, 1, 64, 512)))
    assert not metal_ops.has_latent_kernel(mx.zeros((1, 1, 65, 512)))
    assert not metal_ops.has_latent_kernel(mx.zeros((1, 1, 1, 384)))


@pytest.mark.parametrize("means_kind, hadamard", [(0, 1), (1, 1), (2, 0)])
@pytest.mark.parametrize("n_repeats, head_dim", [(1, 128), (4, 128), (7, 64), (2, 256), (8, 128)])
def test_a_prompt_prepares_the_pipelines_of_its_generation(n_repeats, head_dim, means_kind, hadamard):
    """Steps after a chunk of a prompt launch nothing that was not compiled with it, however long the context grows."""
    lib = metal_ops.plans()

    def shape(n_queries, n_coded, n_tail):
        return metal_ops.AttentionShape(
            type=1, batch=1, n_q_heads=8 * n_repeats, n_kv_heads=8, n_queries=n_queries, head_dim=head_dim, value_dim=head_dim,
            n_first=64, n_coded=n_coded, n_tail=n_tail, key_bits=3, value_bits=3, value_coding=1, hadamard=hadamard,
            causal=n_queries > 1, means_kind=means_kind if n_coded else 0, has_balance=1, n_cores=16, scale=1.0,
        )  # fmt: skip

    def keys(dispatches):
        return {(d["kernel"], tuple(sorted(d["constants"].items()))) for d in dispatches}

    for chunk in (512, 2048):
        # The first chunk finds nothing coded, nor means.
        text = lib.tq_pipelines_of_a_generation(ctypes.byref(shape(chunk, 0, chunk)), int(means_kind > 0))
        prepared = keys(json.loads(text))
        assert len(prepared) <= 24
        used = set()
        for n_coded in (0, 64, 256, 512, 640, 4096, 32768, 200000):
            used |= keys(metal_ops.plan_attention(lib, shape(chunk, n_coded, chunk + 64))[0]["dispatches"])
            for n_queries, more in (*((n, 64) for n in range(1, 65)), (1, 127), (60, 100), (300, 127)):
                used |= keys(metal_ops.plan_attention(lib, shape(n_queries, n_coded, n_queries - 1 + more))[0]["dispatches"])
        print(len(prepared), len(used), len(used - prepared))
        assert used <= prepared


def test_buffers_fit_the_argument_table():
    """31 on every Metal device."""
    assert metal_ops.ENUM["kAttentionParams"] < 31 and metal_ops.ENUM["kEncodeParams"] < 31


def test_library_instances_have_the_names_of_the_plan():
    """metal/instances.inc must spell kernels as dispatch_plan.h does, or the metallib would never be used."""
    text = msl_translate.preprocess(METAL / "library.metal", metal_ops.INCLUDES, shim=sim.INCLUDE / "msl_pp", clang=sim.CLANG)
    names = {re.sub(r'"\s*"', "", match).strip('" ') for match in re.findall(r"host_name\(((?:\s*\"[^\"]*\")+)\)", text)}
    lib, planned = metal_ops.plans(), set()
    for kind, d, bits, repeats in itertools.product(
        range(3), (64, 128), ((3, 2, 0), (3, 3, 1), (4, 4, 1), (2, 2, 1)), (1, 2, 4, 8, 32, 64)
    ):
        shape = metal_ops.AttentionShape(
            type=kind, batch=1, n_q_heads=8 * repeats, n_kv_heads=8, n_queries=1, head_dim=d, value_dim=d, n_coded=5000,
            key_bits=bits[0], value_bits=bits[1], value_coding=bits[2], hadamard=1, n_cores=10, scale=1.0,
        )  # fmt: skip
        planned |= {dispatch["kernel"] for dispatch in metal_ops.plan_attention(lib, shape)[0]["dispatches"]}
    assert planned <= names
    for kind, d, bits in itertools.product(range(3), (64, 128), (2, 3, 4)):
        shape = metal_ops.EncodeShape(type=kind, batch=1, n_heads=1, n_tokens=1, head_dim=d, bits=bits)
        operations = [x for x in metal_ops.ENCODE_OPS if "groups" not in x or bits == 2]
        planned |= {metal_ops.plan_encode(lib, op, shape)[0]["kernel"] for op in operations}
    assert planned == names


# --- sources ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_sources_are_ascii(path):
    """MLX hands the text to the run-time compiler as ASCII."""
    path.read_bytes().decode("ascii")


@pytest.mark.parametrize("name", INSTANCES)
def test_sources_pass_the_strict_syntax_check_and_the_lint(name):
    text = f'#include "{name}.metal"\n' + "\n".join(INSTANCES[name]) + "\n"
    assert sim.strict_errors(text, includes=metal_ops.INCLUDES) == []
    path = METAL / f"{name}.metal"
    plain = msl_translate.preprocess(path, metal_ops.INCLUDES, shim=sim.INCLUDE / "msl_pp", clang=sim.CLANG)
    ours = {str(metal_ops.ROOT / folder) for folder in ("metal", "csrc")}
    assert msl_lint.lint(plain, lambda file: any(file.startswith(folder) for folder in ours)) == []


def test_latents_of_a_long_step_fill_the_gpu_by_their_rows():
    """64 tokens of DeepSeek V3's 128 heads: one range of coded tokens and one of exact ones. More tokens are composed."""
    lib = metal_ops.plans()
    for n_cores in (8, 80):
        shape = metal_ops.AttentionShape(
            batch=1, n_q_heads=128, n_kv_heads=1, n_queries=64, head_dim=512, value_dim=512, n_first=4, n_coded=1 << 17,
            n_tail=200, key_bits=3, value_bits=3, value_coding=1, hadamard=1, latent=1, n_cores=n_cores, scale=1.0,
        )  # fmt: skip
        plan = metal_ops.plan_attention(lib, shape)[0]
        assert plan["dispatches"][0]["grid"] == [2, 1, 128 * 64 // 16] and plan["part_numbers"] == 2 * 128 * 64 * 512
    assert lib.tq_has_latent_kernel(512, 64) and not lib.tq_has_latent_kernel(512, 65)

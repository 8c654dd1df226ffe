"""What must hold of the Metal kernels beyond their results: bytes, launches, cost, schedules, sources."""

import itertools
import re

import cost
import metal_ops
import metal_simulator as sim
import mlx.core as mx
import msl_lint
import msl_translate
import pytest
from instances import INSTANCES

from support import KERNEL_TOLERANCE, Problem, assert_close

METAL = metal_ops.ROOT / "metal"
SOURCES = sorted(METAL.glob("*.metal")) + sorted(METAL.glob("*.h")) + [METAL / "instances.inc"]


def attend(device, problem, **changes):
    return metal_ops.turboquant_attention(
        device, problem.q, problem.packed_k, problem.packed_v, **{**problem.arguments(), **changes}
    )


def packed_bytes(problem):
    """Bytes of key codes, key norms, value codes and value parameters."""
    return [x.nbytes for x in (*problem.packed_k[:2], *problem.packed_v[:2])]


# --- bytes and launches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_repeats, n_rows", [(1, 1), (2, 1), (3, 1), (4, 1), (8, 1), (16, 1), (4, 8)])
def test_every_packed_byte_is_read_once_for_all_rows(checked, n_repeats, n_rows):
    problem = Problem(n_repeats=n_repeats, n_rows=n_rows, n_coded=600, n_tail=9)
    checked.reset()
    assert_close(attend(checked, problem), problem.answer(), KERNEL_TOLERANCE[mx.float32])
    read = [sum(stats.buffer_read[i] for _, stats in checked.log) for i in range(1, 5)]
    assert read == packed_bytes(problem)


def test_residual_signs_are_read_once(checked):
    for n_repeats in (4, 8):
        problem = Problem(n_repeats=n_repeats, n_coded=300, qjl=True)
        checked.reset()
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


# --- realistic sizes, schedules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [sim.IN_ORDER, sim.RANDOM])
@pytest.mark.parametrize("n_repeats", [4, 8])
def test_realistic_size_on_any_schedule(checked, n_repeats, schedule):
    """4096 keys, 4 KV heads, head dimension 128, exact tokens, mean: no report, the tolerance of the CPU."""
    problem = Problem(n_kv_heads=4, n_repeats=n_repeats, n_coded=4096, n_first=4, n_tail=40, mean=True, dtype=mx.float16)
    checked.reset()
    checked.schedule, checked.seed = schedule, n_repeats
    try:
        out = attend(checked, problem)
    finally:
        checked.schedule = sim.IN_ORDER
    assert_close(out, problem.answer(), KERNEL_TOLERANCE[mx.float16])
    assert all(not stats.report for _, stats in checked.log)


@pytest.mark.parametrize("n_cores", [1, 3, 10, 80])
def test_any_number_of_ranges_gives_the_same_answer(checked, n_cores):
    device = metal_ops.Device("check", n_cores=n_cores)
    for n_repeats in (4, 8):
        problem = Problem(n_kv_heads=1, n_repeats=n_repeats, n_coded=3001, n_first=4, n_tail=33, head_dim=64)
        assert_close(attend(device, problem), problem.answer(), KERNEL_TOLERANCE[mx.float32])


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


def counted_per_token(head_dim, rows):
    """Operations per token and KV head in the split kernel's loop: the difference of two lengths, without the prologue."""
    totals = []
    for n_coded in (2048, 4096):
        problem = Problem(n_kv_heads=1, n_repeats=rows, n_coded=n_coded, head_dim=head_dim, dtype=mx.float16)
        # Equal scores: the maximum is found in the first tile. A new one costs some 20 operations per row and comes ever rarer.
        problem.q = mx.zeros_like(problem.q)
        count, check = (metal_ops.Device(mode, n_cores=1) for mode in ("count", "check"))
        # The first call loads the library; its counters run from then on.
        attend(count, problem)
        library = next(lib for lib in sim.loaded("count") if any("_split_" in k for k in lib.kernels))
        before = [library.counter("fma"), library.counter("exp2")]
        attend(count, problem)
        fma, exp2 = (library.counter(name) - old for name, old in zip(("fma", "exp2"), before, strict=True))
        attend(check, problem)
        stats = check.log[0][1]
        # One vote per tile is no shuffle.
        shuffles = 32 * stats.simd_operations - n_coded
        totals.append([fma, exp2, shuffles, stats.threadgroup_read + stats.threadgroup_written])
    return cost.Counted(*((b - a) / 2048 for a, b in zip(*totals, strict=True)))


@pytest.mark.parametrize("rows, most", [(1, 5.3), (2, 7.8), (4, 13.2)])
def test_counted_cost_at_dimension_128(rows, most):
    """Core cycles per key and KV head stay within the model that the design was chosen by."""
    counted = counted_per_token(128, rows)
    cycles = cost.core_cycles(counted, cost.Loop(128, rows))
    print(f"rows {rows}: {counted}, {cycles:.2f} core cycles")
    assert round(cycles, 1) <= most
    # Scores and values are 2 x 128 FMA per row; what is above them is the norm, the biases and the sums.
    assert 256 * rows <= counted.fma <= 256 * rows * 1.2
    assert counted.exp2 <= 1.1 * rows


# --- plan -------------------------------------------------------------------------------------------------------------


def test_plan_fits_every_shape(fast):
    """No shape asks for more threads or threadgroup memory than any Apple GPU has."""
    lib = metal_ops.plans()
    for k, v, repeats, queries, key_bits, value_bits, qjl in itertools.product(
        (32, 64, 80, 128, 192, 256), (64, 128, 256), (1, 3, 8, 71), (1, 8), (2, 3, 4), (2, 4), (0, 1)
    ):
        shape = metal_ops.AttentionShape(
            batch=1, n_q_heads=2 * repeats, n_kv_heads=2, n_queries=queries, head_dim=k, value_dim=v, n_coded=5000, n_tail=50,
            key_bits=key_bits, value_bits=value_bits, hadamard=1, has_residual=qjl, n_cores=10, scale=1.0,
        )  # fmt: skip
        plan = metal_ops.plan_attention(lib, shape)[0]
        assert len(plan["dispatches"]) <= 3
        for dispatch in plan["dispatches"]:
            assert 32 <= dispatch["threads"] <= 256 and dispatch["threads"] % 32 == 0
            assert sum(dispatch["threadgroup_bytes"]) + 2048 + 256 <= 32768
            assert all(n >= 1 for n in dispatch["grid"])


def test_library_instances_have_the_names_of_the_plan():
    """metal/instances.inc must spell kernels as dispatch_plan.h does, or the metallib would never be used."""
    text = msl_translate.preprocess(METAL / "library.metal", metal_ops.INCLUDES, shim=sim.INCLUDE / "msl_pp", clang=sim.CLANG)
    names = {re.sub(r'"\s*"', "", match).strip('" ') for match in re.findall(r"host_name\(((?:\s*\"[^\"]*\")+)\)", text)}
    lib, planned = metal_ops.plans(), set()
    for kind, d, bits, repeats in itertools.product(range(3), (64, 128), ((3, 2), (4, 4)), (1, 2, 4, 8)):
        shape = metal_ops.AttentionShape(
            type=kind, batch=1, n_q_heads=repeats, n_kv_heads=1, n_queries=1, head_dim=d, value_dim=d, n_coded=5000,
            key_bits=bits[0], value_bits=bits[1], hadamard=1, n_cores=10, scale=1.0,
        )  # fmt: skip
        planned |= {dispatch["kernel"] for dispatch in metal_ops.plan_attention(lib, shape)[0]["dispatches"]}
    assert planned <= names
    assert len(names) == 3 * 2 * (2 * 4 + 1 + 8 + 1)


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

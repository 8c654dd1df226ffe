# ruff: noqa: E501 - tables of source snippets
"""Bugs seeded into our kernels: each must be reported by the checker or change a result by more than the tolerance.

A mutation is an edit of the kernel's source that must apply; many leave the values right on most schedules, so a comparison
of values alone would miss them.
"""

import re

import metal_ops
import metal_simulator as sim
import mlx.core as mx
import numpy as np
import pytest

import tqext
from support import KERNEL_TOLERANCE, Problem, assert_close

ATTENTION = (metal_ops.ROOT / "metal" / "turboquant_attention.metal").read_text()
ENCODE = (metal_ops.ROOT / "metal" / "turboquant_encode.metal").read_text()
Q1 = (metal_ops.ROOT / "metal" / "q1_matmul.metal").read_text()


def body(source, kernel):
    """Start and end of a kernel in the source."""
    start = source.index(f" {kernel}(")
    return start, source.index("\n}\n", start)


def replace(source, kernel, old, new, nth=1):
    """Replaces the nth occurrence of `old` inside a kernel."""
    start, end = body(source, kernel)
    at = start - 1
    for _ in range(nth):
        at = source.find(old, at + 1, end)
        assert at >= 0, f"{kernel}: mutation does not apply: {old}"
    return source[:at] + new + source[at + len(old) :]


SIMD_BARRIER = "simdgroup_barrier(mem_flags::mem_threadgroup);"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
SPLIT, MATRIX, COMBINE = (f"turboquant_attention_{x}" for x in ("split", "matrix", "combine"))

# name -> (kernel function, text, replacement, occurrence, shape of the problem)
SMALL = dict(n_kv_heads=1, n_coded=300, head_dim=64)
TAIL = dict(n_kv_heads=1, n_coded=40, head_dim=64, n_first=4, n_tail=33)
ROWS = dict(n_kv_heads=1, n_coded=100, head_dim=64, n_repeats=8)
MANY = dict(n_kv_heads=1, n_coded=100, head_dim=64, n_repeats=9)
MUTATIONS = {
    "missing barrier before the weights are read": (SPLIT, SIMD_BARRIER, "", 2, SMALL),
    "missing barrier before norms are overwritten": (SPLIT, SIMD_BARRIER, "", 3, dict(SMALL, n_coded=1300)),
    "missing barrier after the table is filled": (SPLIT, BARRIER, "", 1, SMALL),
    "missing barrier between the simdgroups' sums": (SPLIT, BARRIER, "", 3, SMALL),
    "barrier that orders nothing": (SPLIT, BARRIER, "threadgroup_barrier(mem_flags::mem_none);", 2, SMALL),
    "simdgroup barrier in place of the threadgroup's": (SPLIT, BARRIER, SIMD_BARRIER, 2, SMALL),
    "keys read past the last token": (SPLIT, "const bool load = t < n && has_unit;", "const bool load = has_unit;", 1, SMALL),
    "values read past the last token": (SPLIT, "x[i] = t < n && has_word ?", "x[i] = has_word ?", 1, SMALL),
    "parameters of tokens beyond the range": (SPLIT, "const bool mine = int(lane) < n;", "const bool mine = int(lane) <= n;", 1, SMALL),
    "idle lanes decode": (SPLIT, "const bool has_unit = unit < NU,", "const bool has_unit = true,", 1, dict(SMALL, head_dim=96)),
    "shuffle in a divergent branch": (SPLIT, "if (simd_any(tile_max > row_max)) {", "if (tile_max > row_max) {", 1, dict(SMALL, n_coded=1300)),
    "sums not rescaled at a new maximum": (SPLIT, "row_sum *= factor;", "", 1, dict(SMALL, n_coded=1300)),
    "accumulators not rescaled": (SPLIT, "acc[i][r] *= row_factor;", ";", 1, dict(SMALL, n_coded=1300)),
    "wrong transposed reduction": (SPLIT, "const bool up = key_lane & h;", "const bool up = int(lane) & 1;", 1, SMALL),
    "bias of another group": (SPLIT, "bias_sums[(s * R + r) * NG + d / 32]", "bias_sums[(s * R + r) * NG]", 1, SMALL),
    "output rows not all written": (SPLIT, "i < n_rows * V; i += NSG * 32", "i < n_rows * V - 1; i += NSG * 32", 1, SMALL),
    "write to a part of another range": (SPLIT, "p.n_parts + int(tg.x)) * n_rows;", "p.n_parts) * n_rows;", 2, SMALL),
    "threadgroup array one short": (SPLIT, "threadgroup float weights_all[NSG * 32 * R];", "threadgroup float weights_all[NSG * 32 * R - 1];", 1, SMALL),
    "first tokens taken for the tail": ("attend_exact", "const bool is_tail = e >= p.n_first;", "const bool is_tail = e > p.n_first;", 1, TAIL),
    "exact weights read before they are made": ("attend_exact", BARRIER, "", 2, TAIL),
    "tile overwritten while in use": (MATRIX, "tile_barrier(n_blocks == 1);", "", 1, dict(MANY, n_coded=700)),
    "tile read before it is staged": (MATRIX, "tile_barrier(n_blocks == 1);", "", 2, ROWS),
    "simdgroup barrier where two simdgroups share a tile": (MATRIX, "tile_barrier(n_blocks == 1);", "tile_barrier(true);", 2, MANY),
    "wrong column of the operand": (MATRIX, "const float2 offset = float2(offsets[8 * block + column],", "const float2 offset = float2(offsets[8 * block + row],", 1, dict(ROWS, mean=True)),
    "rows beyond the last one written": (MATRIX, "if (row0 + k >= n_rows) continue;", "", 1, MANY),
    "scale of another token": (MATRIX, "tile_params[t * NG + g]", "tile_params[row * NG + g]", 1, ROWS),
    "one part left out": (COMBINE, "p.n_parts, p.n_ranges", "p.n_parts - 1, p.n_ranges", 1, SMALL),
    "misaligned read": (SPLIT, "+ NB * part_of_unit;", "+ NB * part_of_unit + 1;", 1, SMALL),
    "write through an input": (SPLIT, "const int n_exact = p.n_first + p.n_tail;", "const int n_exact = p.n_first + p.n_tail; const_cast<device half*>(key_norms)[0] = 0;", 1, SMALL),
}  # fmt: skip


def caught(device, run, tolerance_check):
    """Whether a report or a wrong value shows the bug; a mutation that does not compile is an error."""
    try:
        out = run(device)
    except sim.Fault:
        return True
    try:
        tolerance_check(out)
    except AssertionError:
        return True
    return False


def attention(device, problem):
    return metal_ops.turboquant_attention(device, problem.q, problem.packed_k, problem.packed_v, **problem.arguments())


@pytest.fixture
def mutant():
    # One core: several tiles per simdgroup, so that what goes wrong between tiles shows.
    return metal_ops.Device("check", n_cores=1)


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_of_attention_is_caught(name, mutant):
    kernel, old, new, nth, shape = MUTATIONS[name]
    problem = Problem(**shape)
    mutant.source = replace(ATTENTION, kernel, old, new, nth)
    assert caught(
        mutant, lambda d: attention(d, problem), lambda out: assert_close(out, problem.answer(), KERNEL_TOLERANCE[mx.float32])
    )


def test_unmutated_kernels_pass_the_same_check(mutant):
    mutant.source = ATTENTION
    for shape in (SMALL, TAIL, ROWS, MANY):
        problem = Problem(**shape)
        assert not caught(
            mutant, lambda d, p=problem: attention(d, p), lambda out, p=problem: assert_close(out, p.answer(), 1e-5)
        )


ENCODE_MUTATIONS = {
    "codes shared without a barrier": ("quantize_values", SIMD_BARRIER, "", 1),
    "level below the boundary": ("quantize_keys", ">= boundary", "> boundary + 0.02f", 1),
    "last token of a full threadgroup": ("quantize_keys", "if (row >= p.n_rows) return;", "if (row > p.n_rows) return;", 1),
    "spare bits of the wrong word": ("quantize_keys", ">> uint(k) & 1u) << 3", ">> uint(2 - k) & 1u) << 3", 1),
    "slots in another order": ("quantize_values", "codes[W * s + w]", "codes[SLOTS * w + s]", 1),
}


def encode_is_caught(mutant, kernel):
    """Whether the source's bug in an encoding kernel shows."""
    x = mx.array(np.random.default_rng(0).normal(size=(1, 1, 7, 64)).astype(np.float32))
    want = getattr(tqext, kernel)(x)

    def same(out):
        assert all(mx.array_equal(a, b).item() for a, b in zip(out, want[:2], strict=True))

    return caught(mutant, lambda d: getattr(metal_ops, kernel)(d, x), same)


@pytest.mark.parametrize("name", ENCODE_MUTATIONS)
def test_mutation_of_encode_is_caught(name, mutant):
    kernel, old, new, nth = ENCODE_MUTATIONS[name]
    mutant.source = replace(ENCODE, kernel, old, new, nth)
    assert encode_is_caught(mutant, kernel)


@pytest.mark.parametrize("kernel", ["quantize_keys", "quantize_values"])
def test_unmutated_encode_passes_the_same_check(kernel, mutant):
    mutant.source = ENCODE
    assert not encode_is_caught(mutant, kernel)


Q1_MUTATIONS = {
    "columns of the next group": ("q1_matvec", "byte / 16]", "byte / 32]", 2),
    "rows beyond the last one": ("q1_matvec", "if (row0 + r >= p.n_rows || !mine) continue;", "if (!mine) continue;", 2),
    "tile staged without a barrier": ("q1_matmul", BARRIER, "", 9),
    "sign of the wrong bit": ("q1_matmul", "8 * (step % 4) + row)", "8 * (step % 4) + column)", 9),
}


def q1_is_caught(mutant, n_inputs):
    """Whether the source's bug in a 1-bit product shows."""
    rng = np.random.default_rng(0)
    weight = mx.array(rng.integers(0, 2**32, (21, 16), dtype=np.uint32))
    scales = mx.array(rng.normal(size=(21, 4)).astype(np.float16))
    x = mx.array(rng.normal(size=(n_inputs, 512)).astype(np.float32))
    bits = (np.array(weight)[..., None] >> np.arange(32, dtype=np.uint32) & 1).reshape(21, -1) * 2.0 - 1
    want = np.array(x).astype(np.float64) @ (bits * np.repeat(np.array(scales).astype(np.float64), 128, 1)).T
    return caught(mutant, lambda d: metal_ops.q1_matmul(d, x, weight, scales), lambda out: assert_close(out, want, 1e-5))


@pytest.mark.parametrize("name", Q1_MUTATIONS)
def test_mutation_of_q1_is_caught(name, mutant):
    kernel, old, new, n_inputs = Q1_MUTATIONS[name]
    mutant.source = replace(Q1, kernel, old, new, 1)
    assert q1_is_caught(mutant, n_inputs)


@pytest.mark.parametrize("n_inputs", [2, 9])
def test_unmutated_q1_passes_the_same_check(n_inputs, mutant):
    mutant.source = Q1
    assert not q1_is_caught(mutant, n_inputs)


def test_at_least_twelve_kinds_of_bugs_are_seeded():
    kinds = {re.sub(r"[^a-z ]", "", name) for name in (*MUTATIONS, *ENCODE_MUTATIONS, *Q1_MUTATIONS)}
    assert len(kinds) >= 12

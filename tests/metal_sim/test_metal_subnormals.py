"""A GPU that makes zero of subnormal numbers: what our kernels rely on, and what not."""

import metal_ops
import metal_simulator as sim
import mlx.core as mx
import numpy as np
import pytest
from test_metal_kernels import attend
from test_metal_simulator import run

import tqext
from support import KERNEL_TOLERANCE, Problem, assert_close

# Rows of the split and of the matrix kernel.
ROWS = [4, 8]
CODINGS = [("groups", 2), ("lloyd", 3)]


def problem_of(n_repeats, coding, value_bits):
    return Problem(
        n_kv_heads=1, n_repeats=n_repeats, n_coded=500, n_tail=5, head_dim=64, means=True, balance=True, value_coding=coding,
        value_bits=value_bits,
    )  # fmt: skip


def test_flushing_can_be_seen():
    floats = np.array([1e-39, -1e-39, 2e-38, 1.0] * 8, np.float32)
    for schedule, want in ((sim.IN_ORDER, floats), (sim.FLUSH_FLOATS, np.where(abs(floats) < 1.2e-38, 0, floats))):
        got = run("y[i] = x[i] * (lane < 32u ? 1.0f : 2.0f);", floats, (32, np.float32), schedule=schedule)
        np.testing.assert_array_equal(got, want)
    halves = np.array([1e-5, -1e-5, 7e-5, 1.0] * 8, np.float16)
    kept = np.where(abs(halves) < 6e-5, np.float16(0), halves).astype(np.float32)
    body = "y[i] = float(x[i]);"
    for mode, want in (("fast", halves.astype(np.float32)), ("flush", kept)):
        np.testing.assert_array_equal(run(body, halves, (32, np.float32), mode=mode, types=("half", "float")), want)
    narrowed = run("y[i] = half(x[i]);", halves.astype(np.float32), (32, np.float16), mode="flush", types=("float", "half"))
    np.testing.assert_array_equal(narrowed, kept.astype(np.float16))


@pytest.mark.parametrize("coding, value_bits", CODINGS)
@pytest.mark.parametrize("n_repeats", ROWS)
def test_attention_needs_no_float_subnormals(n_repeats, coding, value_bits):
    device = metal_ops.Device("fast", schedule=sim.FLUSH_FLOATS, n_cores=1)
    problem = problem_of(n_repeats, coding, value_bits)
    assert_close(attend(device, problem), problem.answer(), KERNEL_TOLERANCE[mx.float32])


def test_encoded_bytes_need_no_float_subnormals():
    device = metal_ops.Device("fast", schedule=sim.FLUSH_FLOATS)
    x = mx.array(np.random.default_rng(5).normal(size=(1, 2, 200, 128)).astype(np.float32))
    options = dict(bits=3, means=tqext.block_means(x), balance=mx.full((2, 128), 1.5))
    packed = tqext.quantize_keys(x, **options)
    for got, want in zip(metal_ops.quantize_keys(device, x, **options), (packed.codes, packed.norms), strict=True):
        assert mx.array_equal(got, want).item()
    for coding, bits in CODINGS:
        want = tqext.quantize_values(x, coding=coding, bits=bits)[:2]
        for got, array in zip(metal_ops.quantize_values(device, x, coding=coding, bits=bits), want, strict=True):
            assert mx.array_equal(got, array).item()


@pytest.mark.parametrize("coding, value_bits", CODINGS)
@pytest.mark.parametrize("n_repeats", ROWS)
def test_only_groups_of_values_need_half_subnormals(n_repeats, coding, value_bits):
    """Their codes are read as the bits of a half; a codebook's levels and norms are normal numbers."""
    device, problem = metal_ops.Device("flush", n_cores=1), problem_of(n_repeats, coding, value_bits)
    error = np.abs(np.array(attend(device, problem)) - problem.answer()).max() / np.abs(problem.answer()).max()
    assert error > 0.1 if coding == "groups" else error < KERNEL_TOLERANCE[mx.float32]

"""q1_matmul against float64 over the same bits."""

import threading

import mlx.core as mx
import numpy as np
import pytest

import reference
import tqext
from support import DTYPES, KERNEL_TOLERANCE, WEIGHT_TOLERANCE, assert_close, to_numpy

pytestmark = pytest.mark.usefixtures("device")


def problem(rng, rows, cols):
    """Random words, and scales of both signs with some zeros."""
    weight = rng.integers(0, 2**32, (rows, cols // 32), dtype=np.uint32)
    scales = rng.normal(size=(rows, cols // 128)).astype(np.float16)
    return mx.array(weight), mx.array(np.where(rng.random(scales.shape) < 0.1, np.float16(0), scales))


def tolerance(dtype):
    return KERNEL_TOLERANCE[dtype] if dtype == mx.float32 else WEIGHT_TOLERANCE[dtype]


def exact(x, weight, scales):
    return to_numpy(x).astype(np.float64) @ reference.q1_weights(to_numpy(weight), to_numpy(scales)).T


def check(x, weight, scales):
    out = tqext.q1_matmul(x, weight, scales)
    assert out.dtype == x.dtype
    assert_close(out, exact(x, weight, scales), tolerance(x.dtype))
    return out


@pytest.mark.covering(pairs=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 64])
@pytest.mark.parametrize(("rows", "cols"), [(1, 128), (31, 256), (33, 640), (257, 384), (300, 4224), (64, 12288)])
def test_q1_matmul_matches_float64(rows, cols, n, dtype, rng):
    x = mx.array(rng.normal(size=(n, cols)).astype(np.float32)).astype(DTYPES[dtype])
    check(x, *problem(rng, rows, cols))


@pytest.mark.parametrize("rows", [*range(1, 20), 31, 32, 33, 63, 64, 65, 511, 513])
def test_q1_matmul_every_number_of_rows(rows, rng):
    weight, scales = problem(rng, rows, 256)
    for n in (1, 5):
        check(mx.array(rng.normal(size=(n, 256)).astype(np.float32)), weight, scales)


@pytest.mark.covering(pairs=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [15, 16, 32, 33, 65, 96, 97, 127, 128, 129, 193, 257, 400])
@pytest.mark.parametrize(("rows", "cols"), [(1, 128), (77, 640), (264, 1152), (520, 2304)])
def test_q1_matmul_many_rows_of_x(rows, cols, n, dtype, rng):
    """Around the sizes of tiles; groups that fill no whole span, rows that fill no 16 bytes of the output."""
    x = mx.array(rng.normal(size=(n, cols)).astype(np.float32)).astype(DTYPES[dtype])
    check(x, *problem(rng, rows, cols))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("n", [20, 130])
def test_q1_matmul_many_tiles(n, dtype, device, rng):
    """More tiles than a GPU has multiprocessors: a block takes several, one after the other. A CPU has few threads."""
    x = mx.array(rng.normal(size=(n, 640)).astype(np.float32)).astype(DTYPES[dtype])
    check(x, *problem(rng, (70000 if n == 20 else 40003) // (1 if device == "gpu" else 10), 640))


@pytest.mark.parametrize("device", [pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("n", "rows", "cols"), [(40, 70000, 640), (64, 32000, 4096), (130, 40003, 640), (200, 4096, 12288)])
def test_q1_matmul_of_many_tiles_is_the_same_every_time(device, n, rows, cols, dtype, rng):
    """A tile of x in shared memory makes way for the next one: a warp that still reads the old one gets some of both."""
    x = mx.array(rng.normal(size=(n, cols)).astype(np.float32)).astype(DTYPES[dtype])
    weight, scales = problem(rng, rows, cols)
    first = check(x, weight, scales)
    for _ in range(20):
        again = [tqext.q1_matmul(x, weight, scales) for _ in range(5)]
        assert all(mx.all(out == first).item() for out in again)


@pytest.mark.parametrize("shape", [(256,), (0, 256), (2, 0, 256), (2, 3, 256), (1, 1, 1, 256)])
def test_q1_matmul_shapes_of_x(shape, rng):
    x = mx.array(rng.normal(size=shape).astype(np.float32))
    weight, scales = problem(rng, 40, 256)
    out = tqext.q1_matmul(x, weight, scales)
    assert out.shape == (*shape[:-1], 40)
    assert_close(out, exact(x, weight, scales), 1e-5)


def test_q1_matmul_without_rows_or_columns():
    empty = tqext.q1_matmul(mx.ones((3, 128)), mx.zeros((0, 4), mx.uint32), mx.zeros((0, 1), mx.float16))
    assert empty.shape == (3, 0)
    zero = tqext.q1_matmul(mx.ones((3, 0)), mx.zeros((5, 0), mx.uint32), mx.zeros((5, 0), mx.float16))
    assert to_numpy(zero).tolist() == [[0.0] * 5] * 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_q1_matmul_strided_inputs(dtype, rng):
    """Views into buffers that hold NaN and set bits everywhere else."""
    weight, scales = problem(rng, 45, 384)
    wide = mx.full((99, 20), 0xFFFFFFFF, dtype=mx.uint32)
    wide[1:91:2, 4:16] = weight
    tall = mx.full((99, 9), np.nan, dtype=mx.float16)
    tall[1:91:2, 2:5] = scales
    for n in (1, 3, 20, 140):
        x = mx.array(rng.normal(size=(n, 384)).astype(np.float32)).astype(DTYPES[dtype])
        buffer = mx.full((2 * n + 1, 500), np.nan, dtype=x.dtype)
        buffer[1::2, 50:434] = x
        views = [buffer[1::2, 50:434], mx.contiguous(x.T).T, mx.contiguous(x[:, ::-1])[:, ::-1]]
        for view in views:
            check(view, wide[1:91:2, 4:16], tall[1:91:2, 2:5])
        check(x, mx.contiguous(weight.T).T, mx.contiguous(scales.T).T)
    row = mx.broadcast_to(mx.array(rng.normal(size=(1, 384)).astype(np.float32)), (4, 384))
    check(row, weight, scales)


def test_q1_matmul_zero_scales_give_zero(rng):
    weight, _ = problem(rng, 70, 512)
    x = mx.array(rng.normal(size=(3, 512)).astype(np.float32))
    assert not to_numpy(tqext.q1_matmul(x, weight, mx.zeros((70, 4), mx.float16))).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 3, 8, 12, 70])
def test_q1_matmul_nan_reaches_its_row_only(n, dtype, rng):
    weight, scales = problem(rng, 70, 512)
    x = rng.normal(size=(n, 512)).astype(np.float32)
    x[n // 2, 300] = np.nan
    out = to_numpy(tqext.q1_matmul(mx.array(x).astype(DTYPES[dtype]), weight, scales))
    assert np.isnan(out[n // 2]).all() and np.isfinite(np.delete(out, n // 2, 0)).all()
    x[n // 2, 300] = np.inf
    out = to_numpy(tqext.q1_matmul(mx.array(x).astype(DTYPES[dtype]), weight, mx.ones((70, 4), mx.float16)))
    assert not np.isfinite(out[n // 2]).any() and np.isfinite(np.delete(out, n // 2, 0)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 3, 12, 70])
@pytest.mark.parametrize("special", [np.nan, np.inf])
def test_q1_matmul_scale_that_is_not_finite_reaches_its_column_only(special, n, dtype, rng):
    weight, scales = problem(rng, 70, 512)
    scales[41, 2] = special
    x = mx.array(rng.normal(size=(n, 512)).astype(np.float32)).astype(DTYPES[dtype])
    out = to_numpy(tqext.q1_matmul(x, weight, scales))
    assert not np.isfinite(out[:, 41]).any() and np.isfinite(np.delete(out, 41, 1)).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n", [2, 20])
@pytest.mark.parametrize("magnitude", [1e-20, 1e-6, 1e6, 1e20])
def test_q1_matmul_any_magnitude(magnitude, n, dtype, rng):
    x = mx.array((rng.normal(size=(n, 512)) * magnitude).astype(np.float32))
    check(x.astype(DTYPES[dtype]), *problem(rng, 70, 512))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n", [2, 20])
def test_q1_matmul_magnitudes_of_rows_beside_each_other(n, dtype, rng):
    """Each row of x is as exact as it would be alone."""
    x = rng.normal(size=(n, 640)) * 10.0 ** np.linspace(-30, 30, n)[:, None]
    x = mx.array(x.astype(np.float32)).astype(DTYPES[dtype])
    weight, scales = problem(rng, 70, 640)
    out, want = tqext.q1_matmul(x, weight, scales), exact(x, weight, scales)
    for i in range(n):
        assert_close(out[i], want[i], tolerance(x.dtype))


def test_q1_matmul_half_overflow_is_infinity():
    weight, scales = mx.full((1, 4), 0xFFFFFFFF, dtype=mx.uint32), mx.full((1, 1), 1000, dtype=mx.float16)
    assert to_numpy(tqext.q1_matmul(mx.ones((1, 128), mx.float16), weight, scales)).tolist() == [[np.inf]]


def test_q1_matmul_half_rounding_is_to_nearest_even(rng):
    """Every fp16 value passes through a row that copies it: x, and then 127 zeros."""
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)]
    x = np.zeros((every.size, 128), np.float16)
    x[:, 0] = every
    out = tqext.q1_matmul(mx.array(x), mx.full((1, 4), 0xFFFFFFFF, dtype=mx.uint32), mx.ones((1, 1), mx.float16))
    np.testing.assert_array_equal(to_numpy(out)[:, 0], every)
    values = np.concatenate([rng.normal(size=4000) * 10.0 ** rng.integers(-9, 5, 4000), every[:-1] + np.diff(every) / 2])
    values = values.astype(np.float16).astype(np.float64)
    pair = np.zeros((values.size, 128), np.float16)
    pair[:, 0], pair[:, 1] = values, values[::-1]
    out = tqext.q1_matmul(mx.array(pair), mx.full((1, 4), 0xFFFFFFFF, dtype=mx.uint32), mx.ones((1, 1), mx.float16))
    with np.errstate(over="ignore"):
        want = (values.astype(np.float32) + values[::-1].astype(np.float32)).astype(np.float16)
    if mx.default_device() == mx.gpu:  # tensor cores add with a few bits beyond fp16: a tie may be lost
        assert_close(to_numpy(out)[:, 0][np.isfinite(want)], want[np.isfinite(want)].astype(np.float64), 1e-3)
    else:
        np.testing.assert_array_equal(to_numpy(out)[:, 0], want)


@pytest.mark.parametrize("shapeless", [False, True])
def test_q1_matmul_compiles(shapeless, rng):
    weight, scales = problem(rng, 70, 512)
    compiled = mx.compile(lambda x: mx.sin(tqext.q1_matmul(x * 2, weight, scales)), shapeless=shapeless)
    for n in (1, 5, 1):
        x = mx.array(rng.normal(size=(n, 512)).astype(np.float32))
        want = np.sin(2 * exact(x, weight, scales))
        assert_close(compiled(x), want, 10 * KERNEL_TOLERANCE[mx.float32])


def test_q1_matmul_threads_and_streams(rng):
    weight, scales = problem(rng, 1000, 512)
    x = mx.array(rng.normal(size=(2, 512)).astype(np.float32))
    mx.eval(weight, scales, x)
    want = exact(x, weight, scales)
    errors = []

    def work():
        stream = mx.new_stream(mx.default_device())
        for _ in range(20):
            try:
                assert_close(tqext.q1_matmul(x, weight, scales, stream=stream), want, 1e-5)
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not errors

"""ternary_matmul against float64 over the same codes."""

import mlx.core as mx
import numpy as np
import pytest

import reference
import tqext
from support import DTYPES, WEIGHT_TOLERANCE, assert_close, on_cuda, to_numpy

pytestmark = pytest.mark.usefixtures("device")


def problem(rng, rows, cols):
    """Random codes, all four, and scales of both signs with some zeros."""
    weight = rng.integers(0, 2**32, (rows, cols // 16), dtype=np.uint32)
    scales = rng.normal(size=(rows, cols // 128)).astype(np.float16)
    return mx.array(weight), mx.array(np.where(rng.random(scales.shape) < 0.1, np.float16(0), scales))


def exact(x, weight, scales):
    return to_numpy(x).astype(np.float64) @ reference.ternary_weights(to_numpy(weight), to_numpy(scales)).T


def tolerance(x):
    """On a GPU many rows of x are MLX's product: TF32 of fp32 rows, and of bf16 rows, which it multiplies as fp32."""
    mlx = mx.default_device() == mx.gpu and x.size > (24 if on_cuda() and x.dtype != mx.float16 else 7) * x.shape[-1]
    return max(WEIGHT_TOLERANCE[x.dtype], 5e-3) if mlx else WEIGHT_TOLERANCE[x.dtype]


def check(x, weight, scales):
    out = tqext.ternary_matmul(x, weight, scales)
    assert out.dtype == x.dtype and out.shape == (*x.shape[:-1], weight.shape[0])
    assert_close(out, exact(x, weight, scales), tolerance(x))
    return out


SHAPES = {"small": [(1, 128), (31, 256), (33, 640)], "large": [(257, 384), (300, 4096), (64, 12288), (530, 1024)]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SHAPES)
def test_ternary_matmul_matches_float64(size, dtype, rng):
    for rows, cols in SHAPES[size]:
        weight, scales = problem(rng, rows, cols)
        x = mx.array(rng.normal(size=(65, cols)).astype(np.float32)).astype(DTYPES[dtype])
        want = exact(x, weight, scales)
        for n in (1, 2, 3, 5, 8, 9, 33, 65):
            out = tqext.ternary_matmul(x[:n], weight, scales)
            assert out.dtype == x.dtype
            assert_close(out, want[:n], tolerance(x[:n]))


def test_ternary_matmul_is_the_product_of_mlx_with_its_words(rng):
    """The words are MLX's: affine 2-bit weights with groups of 128, and biases of -scale."""
    weight, scales = problem(rng, 70, 512)
    dense = mx.dequantize(weight, scales.astype(mx.float32), -scales.astype(mx.float32), group_size=128, bits=2)
    np.testing.assert_array_equal(to_numpy(dense), reference.ternary_weights(to_numpy(weight), to_numpy(scales)))
    x = mx.array(rng.normal(size=(3, 512)).astype(np.float32))
    assert_close(
        tqext.ternary_matmul(x, weight, scales), to_numpy(x).astype(np.float64) @ to_numpy(dense).T.astype(np.float64), 1e-5
    )


def test_ternary_matmul_every_number_of_rows(rng):
    for rows in (*range(1, 20), 31, 32, 33, 63, 64, 65, 127, 129, 511, 513):
        weight, scales = problem(rng, rows, 256)
        for n in (1, 5):
            check(mx.array(rng.normal(size=(n, 256)).astype(np.float32)), weight, scales)


def test_ternary_matmul_shapes_of_x_and_nothing(rng):
    weight, scales = problem(rng, 40, 256)
    for shape in [(256,), (0, 256), (2, 0, 256), (2, 3, 256), (1, 1, 1, 256), (4, 5, 256)]:
        check(mx.array(rng.normal(size=shape).astype(np.float32)), weight, scales)
    check(mx.ones((3, 128)), mx.zeros((0, 8), mx.uint32), mx.zeros((0, 1), mx.float16))
    for n in (3, 20):
        check(mx.ones((n, 0)), mx.zeros((5, 0), mx.uint32), mx.zeros((5, 0), mx.float16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ternary_matmul_strided_inputs(dtype, rng):
    """Views into buffers that hold NaN and set bits everywhere else."""
    weight, scales = problem(rng, 45, 384)
    wide = mx.full((99, 40), 0xFFFFFFFF, dtype=mx.uint32)
    wide[1:91:2, 4:28] = weight
    tall = mx.full((99, 9), np.nan, dtype=mx.float16)
    tall[1:91:2, 2:5] = scales
    for n in (1, 3, 20):
        x = mx.array(rng.normal(size=(n, 384)).astype(np.float32)).astype(DTYPES[dtype])
        buffer = mx.full((2 * n + 1, 500), np.nan, dtype=x.dtype)
        buffer[1::2, 50:434] = x
        for view in (buffer[1::2, 50:434], mx.contiguous(x.T).T, mx.contiguous(x[:, ::-1])[:, ::-1]):
            check(view, wide[1:91:2, 4:28], tall[1:91:2, 2:5])
        check(x, mx.contiguous(weight.T).T, mx.contiguous(scales.T).T)
    check(mx.broadcast_to(x[:1], (4, 384)), weight, scales)


def test_ternary_matmul_codes_of_zero_give_zero(rng):
    """Exactly, and for groups of any size beside them."""
    x = mx.array((rng.normal(size=(3, 512)) * 1e3).astype(np.float32))
    zeros = mx.full((70, 32), 0x55555555, dtype=mx.uint32)
    out = to_numpy(tqext.ternary_matmul(x, zeros, mx.ones((70, 4), mx.float16)))
    # Integers sum up exactly on GPUs and NEON; on x86 and without instruction sets each pair of codes is 0 on its own.
    assert np.abs(out).max() <= (0 if tqext.isa() in ("avx512", "portable") else 1e-3)
    weight, _ = problem(rng, 70, 512)
    assert not to_numpy(tqext.ternary_matmul(x, weight, mx.zeros((70, 4), mx.float16))).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_ternary_matmul_what_is_not_finite_stays_in_its_row(dtype, rng):
    weight, scales = problem(rng, 70, 512)
    for n in (1, 3, 8, 12):
        x = rng.normal(size=(n, 512)).astype(np.float32)
        x[n // 2, 300] = np.nan
        out = to_numpy(tqext.ternary_matmul(mx.array(x).astype(DTYPES[dtype]), weight, scales))
        assert np.isnan(out[n // 2]).all() and np.isfinite(np.delete(out, n // 2, 0)).all()
        broken = mx.array(to_numpy(scales))
        broken[41, 2] = np.inf
        x[n // 2, 300] = 1
        out = to_numpy(tqext.ternary_matmul(mx.array(x).astype(DTYPES[dtype]), weight, broken))
        assert not np.isfinite(out[:, 41]).any() and np.isfinite(np.delete(out, 41, 1)).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ternary_matmul_any_magnitude(dtype, rng):
    """Each row of x is as exact as it would be alone."""
    weight, scales = problem(rng, 70, 640)
    for n in (2, 8):
        x = rng.normal(size=(n, 640)) * 10.0 ** np.linspace(-30, 30, n)[:, None]
        x = mx.array(x.astype(np.float32)).astype(DTYPES[dtype])
        out, want = tqext.ternary_matmul(x, weight, scales), exact(x, weight, scales)
        for i in range(n):
            assert_close(out[i], want[i], WEIGHT_TOLERANCE[x.dtype])


@pytest.mark.parametrize("shapeless", [False, True])
def test_ternary_matmul_compiles(shapeless, rng):
    weight, scales = problem(rng, 70, 512)
    compiled = mx.compile(lambda x: tqext.ternary_matmul(x * 2, weight, scales) + 1, shapeless=shapeless)
    for n in (1, 5, 21, 1):
        x = mx.array(rng.normal(size=(n, 512)).astype(np.float32))
        assert_close(compiled(x), 2 * exact(x, weight, scales) + 1, tolerance(x))

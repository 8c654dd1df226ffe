"""q1_quantize, q1_dequantize: signs and group means, in the published block layout."""

import struct

import mlx.core as mx
import numpy as np
import pytest

import tqext
from support import DTYPES, error_line, to_numpy

pytestmark = pytest.mark.usefixtures("device")


def reference(w):
    """(words, scales) of float64 weights, bit by bit."""
    groups = np.asarray(w, np.float64).reshape(*w.shape[:-1], w.shape[-1] // 128, 128)
    scales = np.minimum(np.abs(groups).mean(-1), 65504).astype(np.float32).astype(np.float16)
    bits = (groups >= 0).reshape(*w.shape[:-1], w.shape[-1] // 32, 32).astype(np.uint64)
    return (bits << np.arange(32, dtype=np.uint64)).sum(-1).astype(np.uint32), scales


def decode_ggml(block):
    """The 128 weights of a ggml block_q1_0 (fp16 d, 16 bytes; ggml-common.h), as dequantize_row_q1_0 reads them."""
    (scale,) = struct.unpack("<e", block[:2])
    return [scale if block[2 + i // 8] >> (i % 8) & 1 else -scale for i in range(128)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(128,), (1, 128), (3, 256), (33, 384), (2, 5, 640), (0, 128), (4, 0)])
def test_q1_quantize_matches_reference(shape, dtype, rng):
    w = mx.array(rng.normal(size=shape).astype(np.float32)).astype(DTYPES[dtype])
    weight, scales = tqext.q1_quantize(w)
    words, want = reference(to_numpy(w))
    np.testing.assert_array_equal(to_numpy(weight), words)
    np.testing.assert_array_equal(to_numpy(scales), want)


def test_q1_quantize_low_bit_first_and_one_is_plus():
    w = -np.ones((1, 256), np.float32)
    w[0, [0, 33, 127, 128 + 31]] = 1
    weight, scales = tqext.q1_quantize(mx.array(w))
    assert to_numpy(weight).tolist() == [[1, 1 << 1, 0, 1 << 31, 1 << 31, 0, 0, 0]]
    assert to_numpy(scales).tolist() == [[1.0, 1.0]]


def test_q1_bytes_are_ggml_blocks(rng):
    weight, scales = tqext.q1_quantize(mx.array(rng.normal(size=(7, 256)).astype(np.float32)))
    got = to_numpy(tqext.q1_dequantize(weight, scales))
    words, halves = to_numpy(weight).astype("<u4"), to_numpy(scales).astype("<f2")
    for row in range(7):
        for group in range(2):
            block = halves[row, group].tobytes() + words[row, 4 * group : 4 * group + 4].tobytes()
            assert len(block) * 8 / 128 == 1.125
            assert got[row, 128 * group : 128 * group + 128].tolist() == decode_ggml(block)


def test_q1_words_are_mlx_affine_words(rng):
    w = mx.array((rng.integers(0, 2, (4, 256)) * 2 - 1).astype(np.float32)) * 0.5
    weight, scales = tqext.q1_quantize(w)
    with mx.stream(mx.cpu):  # MLX's CUDA backend has no 1-bit weights
        plain = mx.dequantize(weight, 2 * scales, -scales, group_size=128, bits=1)
    np.testing.assert_array_equal(to_numpy(plain), to_numpy(w))


@pytest.mark.parametrize("dtype", DTYPES)
def test_q1_dequantize_round_trip_is_exact(dtype, rng):
    signs = rng.integers(0, 2, (9, 384)) * 2 - 1
    sizes = rng.normal(size=(9, 3, 1)).astype(np.float16).astype(np.float32)
    w = mx.array((signs.reshape(9, 3, 128) * np.abs(sizes)).reshape(9, 384)).astype(mx.bfloat16).astype(DTYPES[dtype])
    weight, scales = tqext.q1_quantize(w)
    back = tqext.q1_dequantize(weight, scales, dtype=DTYPES[dtype])
    assert back.dtype == DTYPES[dtype]
    # Absolute: zero weights come back as +0.
    np.testing.assert_array_equal(to_numpy(back), to_numpy(w))


def test_q1_quantize_edges():
    w = np.ones((6, 128), np.float32)
    w[0] = 0
    w[1] = -0.0
    w[2] = 1e30
    w[3, 5] = np.nan
    w[4, 5] = -np.inf
    w[5] = 1e-30
    weight, scales = tqext.q1_quantize(mx.array(w))
    scales = to_numpy(scales)[:, 0]
    assert scales[[0, 1, 5]].tolist() == [0, 0, 0] and scales[[2, 4]].tolist() == [65504, 65504] and np.isnan(scales[3])
    assert (to_numpy(weight)[:2] == 0xFFFFFFFF).all()
    assert np.isfinite(to_numpy(tqext.q1_dequantize(weight, mx.array(scales[:, None])))[[0, 1, 2, 4, 5]]).all()


def test_q1_quantize_views_are_read_in_place(rng):
    w = mx.array(rng.normal(size=(256, 40)).astype(np.float32)).T[3:29:2]
    weight, scales = tqext.q1_quantize(w)
    words, want = reference(to_numpy(w))
    np.testing.assert_array_equal(to_numpy(weight), words)
    np.testing.assert_array_equal(to_numpy(scales), want)
    wide = mx.concatenate([mx.full((13, 4), 7, dtype=mx.uint32), weight], axis=1)[:, 4:]
    np.testing.assert_array_equal(to_numpy(tqext.q1_dequantize(wide, scales)), to_numpy(tqext.q1_dequantize(weight, scales)))


@pytest.mark.parametrize(
    ("call", "op", "argument"),
    [
        (lambda: tqext.q1_quantize(mx.zeros((2, 96))), "q1_quantize", "w"),
        (lambda: tqext.q1_quantize(mx.zeros((2, 128), mx.int32)), "q1_quantize", "w"),
        (lambda: tqext.q1_quantize(mx.array(1.0)), "q1_quantize", "w"),
        (
            lambda: tqext.q1_dequantize(mx.zeros((2, 4), mx.int32), mx.zeros((2, 1), mx.float16)),
            "q1_dequantize",
            "weight",
        ),
        (lambda: tqext.q1_dequantize(mx.zeros((2, 4), mx.uint32), mx.zeros((2, 1))), "q1_dequantize", "scales"),
        (
            lambda: tqext.q1_dequantize(mx.zeros((2, 4), mx.uint32), mx.zeros((2, 2), mx.float16)),
            "q1_dequantize",
            "scales",
        ),
        (
            lambda: tqext.q1_dequantize(mx.zeros((2, 3), mx.uint32), mx.zeros((2, 1), mx.float16)),
            "q1_dequantize",
            "weight",
        ),
        (
            lambda: tqext.q1_dequantize(mx.zeros((2, 4), mx.uint32), mx.zeros((2, 1), mx.float16), dtype=mx.int8),
            "q1_dequantize",
            "dtype",
        ),
    ],
)
def test_q1_bad_input_is_a_value_error(call, op, argument):
    with pytest.raises(ValueError, match=error_line(op, argument)):
        call()

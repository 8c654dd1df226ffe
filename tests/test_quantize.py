"""quantize_keys, quantize_values, dequantize: quantisation error against theory, limits of the input range."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

import reference
import tqext
from support import (
    DTYPES,
    ROUNDING_TOLERANCE,
    assert_close,
    decoded_keys,
    decoded_values,
    error_line,
    matrix,
    poisoned,
    poisoned_tokens,
    reference_keys,
    reference_values,
    to_numpy,
)
from tqext import _ext

pytestmark = pytest.mark.usefixtures("device")

DIMS = [32, 64, 80, 112, 128, 160, 192, 224, 256, 288, 512]
ROTATIONS = ["hadamard", "orthogonal", "none"]
VALUE_CODINGS = [(2, "groups"), (4, "groups"), (2, "lloyd"), (3, "lloyd"), (4, "lloyd")]


def normal(rng, *shape, dtype=mx.float32):
    return mx.array(rng.normal(size=shape).astype(np.float32)).astype(dtype)


def arrays_of(packed):
    names = ("codes", "norms", "params", "signs", "residual_norms")
    return [to_numpy(x) for x in (getattr(packed, name, None) for name in names) if x is not None]


def same(a, b):
    return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(arrays_of(a), arrays_of(b), strict=True))


# ---- error against theory ---------------------------------------------------------------------


@pytest.mark.parametrize("bits, distortion", [(2, 0.1160), (3, 0.0340), (4, 0.0093)])
def test_quantize_keys_distortion_is_the_theory(bits, distortion, rng):
    """Squared error of the centroids for unit vectors; the stored norm trades it for an unbiased product."""
    k = normal(rng, 1, 4, 4096, 128)
    packed = tqext.quantize_keys(k, bits=bits)
    unit = to_numpy(k).astype(np.float64)
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    levels, scale = reference.codebook(bits, 128)
    centroids = levels[reference.unpack_keys(to_numpy(packed.codes), bits)] / 127 * scale
    assert ((reference.rotate(unit) - centroids) ** 2).sum(-1).mean() == pytest.approx(distortion, rel=0.03)

    k_hat = decoded_keys(packed)
    k = to_numpy(k).astype(np.float64)
    square = (k * k).sum(-1)
    assert ((k_hat * k).sum(-1) / square).mean() == pytest.approx(1, abs=0.003)
    assert (((k_hat - k) ** 2).sum(-1) / square).mean() == pytest.approx(distortion / (1 - distortion), rel=0.03)


@pytest.mark.parametrize("bits, distortion", [(2, 0.1160), (3, 0.0340), (4, 0.0093)])
def test_quantize_lloyd_values_distortion_is_the_theory(bits, distortion, rng):
    """The norm of least squared error loses what the codebook loses, and no other norm loses less."""
    v = normal(rng, 1, 4, 2048, 128)
    v_hat, exact = decoded_values(tqext.quantize_values(v, bits=bits, coding="lloyd")), to_numpy(v).astype(np.float64)
    square = (exact * exact).sum(-1)
    error = ((v_hat - exact) ** 2).sum(-1)
    assert (error / square).mean() == pytest.approx(distortion, rel=0.03)
    for factor in (0.99, 1.01):
        assert ((((factor * v_hat) - exact) ** 2).sum(-1) > error).all()


@pytest.mark.parametrize("bits, distortion", [(2, 0.1008), (4, 0.0057)])
def test_quantize_values_distortion(bits, distortion, rng):
    """Groups of 32 normal numbers; plain min-max coding loses 0.125 with 2 bits."""
    v = normal(rng, 1, 4, 2048, 128)
    error = decoded_values(tqext.quantize_values(v, bits=bits)) - to_numpy(v)
    assert (error**2).mean() == pytest.approx(distortion, rel=0.03)


def test_quantize_keys_residual_signs_leave_the_product_unbiased(rng):
    """E<q, k_hat + residual> = <q, k>, and the residual's part lowers the error of a 2-bit key by a third."""
    k, q = normal(rng, 1, 1, 4096, 128), rng.normal(size=(64, 128))
    packed = tqext.quantize_keys(k, bits=2, qjl=True)
    exact = q @ to_numpy(k)[0, 0].T
    plain = q @ decoded_keys(packed, residual=False)[0, 0].T
    full = q @ decoded_keys(packed)[0, 0].T
    slope = (exact * full).sum() / (exact * exact).sum()
    assert slope == pytest.approx(1, abs=0.01)
    assert ((full - exact) ** 2).mean() < 0.67 * ((plain - exact) ** 2).mean()


def test_quantize_keys_without_the_means_of_their_blocks_are_closer(rng):
    drift = mx.repeat(normal(rng, 1, 2, 8, 64) * 3, 64, axis=2)
    k = normal(rng, 1, 2, 512, 64) + drift
    exact = to_numpy(k)

    def error(means):
        return ((decoded_keys(tqext.quantize_keys(k, means=means)) - exact) ** 2).mean()

    assert error(tqext.block_means(k)) < 0.2 * error(None)


def test_quantize_keys_balanced_score_closer(rng):
    """Queries that weigh channels unlike the keys' sizes: the balance of the format lowers the scores' error to its theory."""
    size = 2.0 ** rng.uniform(-4, 4, (1, 2, 1, 64))
    k, q = rng.normal(size=(1, 2, 1024, 64)), rng.normal(size=(1, 2, 256, 64))
    k = mx.array((k * size).astype(np.float32))
    balance = mx.array((((q**2).mean(2) / (to_numpy(k) ** 2).mean(2)) ** 0.25)[0].astype(np.float32))

    def error(balance):
        return ((q @ (decoded_keys(tqext.quantize_keys(k, balance=balance)) - to_numpy(k)).swapaxes(-1, -2)) ** 2).mean()

    # E = D * distortion / (1 - distortion) * (mean over channels of the sizes of q k)^2; of their squares without the balance.
    sizes = size[0, :, 0]
    theory = (0.0340 / 0.966) * (sizes.mean(-1) ** 2).mean() * 64
    assert error(balance) == pytest.approx(theory, rel=0.15)
    assert error(balance) < 0.75 * error(None)


# ---- means of blocks ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_tokens", [0, 1, 63, 64, 65, 200])
def test_block_means_match_reference(n_tokens, dtype, rng):
    k = normal(rng, 2, 3, n_tokens, 80, dtype=DTYPES[dtype]) * 3 + 1
    got, want = to_numpy(tqext.block_means(k)), reference.block_means(to_numpy(k))
    assert got.dtype == np.float16 and got.shape == want.shape == (2, 3, -(-n_tokens // 64), 80)
    # One rounding to fp16, and fp32 sums that may fall on its other side.
    assert (np.abs(got.astype(np.float64) - want) <= np.spacing(np.abs(want)).astype(np.float64)).all()


def test_block_means_leave_out_tokens_that_are_not_finite(rng):
    k = to_numpy(normal(rng, 1, 2, 130, 64)).copy()
    k[0, 0, 3, 5], k[0, 1, 70, 0], k[0, 1, 128:] = np.nan, np.inf, -np.inf
    got = to_numpy(tqext.block_means(mx.array(k)))
    assert np.isfinite(got).all() and not got[0, 1, 2].any()
    assert_close(got.astype(np.float32), reference.block_means(k).astype(np.float64), 2**-10)


@pytest.mark.covering
@pytest.mark.parametrize("n_tokens", [0, 1, 63, 64, 200])
@pytest.mark.parametrize(
    "dim, bits, qjl, dtype", [(128, 3, False, "float16"), (80, 4, True, "float32"), (512, 2, False, "bfloat16")]
)
@pytest.mark.parametrize("rotation", ["hadamard", "orthogonal"])
def test_quantize_blocks_is_quantize_keys_with_the_means_of_the_blocks(n_tokens, dim, bits, qjl, dtype, rotation, rng):
    if qjl:
        dim = 96  # with a Hadamard matrix
    k = normal(rng, 2, 3, n_tokens, dim, dtype=DTYPES[dtype]) * 3 + 1
    balance = mx.exp(normal(rng, 3, dim))
    for x in (k, mx.swapaxes(mx.contiguous(mx.swapaxes(k, 1, 2)), 1, 2)):
        for balanced in (None, balance):
            *parts, means = _ext.quantize_blocks(x, bits, balanced, qjl, rotation, None)
            want = reference.block_means(to_numpy(k))
            got = to_numpy(means)
            assert got.dtype == np.float16 and got.shape == want.shape
            assert (np.abs(got.astype(np.float64) - want) <= np.spacing(np.abs(want)).astype(np.float64)).all()
            packed = tqext.quantize_keys(k, bits=bits, means=means, balance=balanced, qjl=qjl, rotation=rotation)
            for part, other in zip(parts, arrays_of(packed), strict=True):
                assert np.array_equal(to_numpy(part), other)


def test_quantize_blocks_leaves_out_tokens_that_are_not_finite(rng):
    k = to_numpy(normal(rng, 1, 2, 130, 64)).copy()
    k[0, 0, 3, 5], k[0, 1, 70, 0], k[0, 1, 128:] = np.nan, np.inf, -np.inf
    got = to_numpy(_ext.quantize_blocks(mx.array(k), 3, None, False, "hadamard", None)[-1])
    assert np.isfinite(got).all() and not got[0, 1, 2].any()
    assert_close(got.astype(np.float32), reference.block_means(k).astype(np.float64), 2**-10)
    for dtype, largest in ((mx.float32, 3e38), (mx.float16, 65504.0)):
        *_, means = _ext.quantize_blocks(mx.full((1, 1, 64, 32), largest, dtype=dtype), 3, None, False, "hadamard", None)
        assert np.isfinite(to_numpy(means)).all()


def test_block_means_of_the_largest_keys_are_finite():
    for dtype, largest in ((mx.float32, 3e38), (mx.float16, 65504.0)):
        means = to_numpy(tqext.block_means(mx.full((1, 1, 64, 32), largest, dtype=dtype)))
        assert (means == 65504).all()


# ---- agreement with the reference on arbitrary input --------------------------------------------


@pytest.mark.covering(by="parameter")
@pytest.mark.parametrize(
    "head_dim, rotation",
    # Unrotated padding lies on a boundary: every decision about it is close.
    [(dim, rotation) for dim in DIMS for rotation in ROTATIONS if rotation != "none" or dim % 32 == 0],
)
def test_quantize_matches_reference_wherever_no_decision_is_close(head_dim, rotation, rng):
    dim = reference.padded_dim(head_dim)
    map_ = matrix(dim, rotation)
    qjl = reference.factor(dim) is not None
    # The dense rotation is a matrix product in fp32: its own error is larger than the decisions' margin.
    margin = 1e-5 if rotation == "orthogonal" or not qjl else 3e-6
    # Two blocks; halves and quarters, so that the means and the balance add no rounding of their own to a decision.
    x = mx.round(normal(rng, 2, 2, 80, head_dim) * 256) / 256
    means = (mx.round(normal(rng, 2, 2, 2, head_dim) * 16) / 16).astype(mx.float16)
    balance = 2.0 ** mx.array(rng.integers(-2, 3, (2, head_dim)))
    for bits in (2, 3, 4):
        packed = tqext.quantize_keys(x, bits=bits, means=means, balance=balance, qjl=qjl, rotation=rotation)
        want = reference.encode_keys(to_numpy(x), bits, to_numpy(means), to_numpy(balance), qjl, map_)
        sure = want.margin > margin
        assert sure.mean() > 0.1
        assert np.array_equal(to_numpy(packed.codes)[sure], want.codes[sure])
        assert np.array_equal(to_numpy(packed.norms)[sure], want.norms[sure])
        if qjl:
            assert np.array_equal(to_numpy(packed.signs)[sure], want.signs[sure])
            assert np.array_equal(to_numpy(packed.residual_norms)[sure], want.residual_norms[sure])
    for bits, coding in VALUE_CODINGS:
        packed = tqext.quantize_values(x, bits=bits, coding=coding, rotation=rotation)
        encode = reference.encode_values if coding == "groups" else reference.encode_values_lloyd
        want = encode(to_numpy(x), bits, matrix=map_)
        sure = want.margin > margin
        assert sure.mean() > 0.1
        assert np.array_equal(to_numpy(packed.codes)[sure], want.codes[sure])
        assert np.array_equal(to_numpy(packed.params)[sure], want.params[sure])


@pytest.mark.covering
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("head_dim", [32, 80, 96, 128, 288, 512])
def test_dequantize_matches_reference(head_dim, rotation, dtype, rng):
    dim, dtype = reference.padded_dim(head_dim), DTYPES[dtype]
    map_ = matrix(dim, rotation)
    x, means = normal(rng, 2, 3, 77, head_dim), normal(rng, 1, 3, 2, head_dim, dtype=mx.float16)
    balance = mx.exp(normal(rng, 3, head_dim))
    tolerance = max(ROUNDING_TOLERANCE[dtype], 1e-5 if rotation == "orthogonal" or head_dim == 288 else 0)
    for bits in (2, 3, 4):
        packed = tqext.quantize_keys(x, bits=bits, means=means, balance=balance, rotation=rotation)
        keys = reference_keys(packed)
        got, want = tqext.dequantize(packed, dtype=dtype), reference.decode_keys(keys, matrix=map_)
        assert got.dtype == dtype
        # A coordinate's error before the balance is that of the vector's largest; the balance divides it.
        balanced = reference.decode_keys(replace(keys, means=None, balance=None), matrix=map_)
        amplified = np.abs(balanced).max() / to_numpy(balance).min() / np.abs(want).max()
        assert_close(got, want, tolerance + ROUNDING_TOLERANCE[mx.float32] * amplified)
        got = tqext.dequantize(packed, rotated=True, dtype=dtype)
        assert_close(got, reference.decode_keys(keys, rotated=True), tolerance)
    for bits, coding in VALUE_CODINGS:
        packed = tqext.quantize_values(x, bits=bits, coding=coding, rotation=rotation)
        values = reference_values(packed)
        got = tqext.dequantize(packed, dtype=dtype)
        assert_close(got, reference.decode_values(values, matrix=map_), tolerance)
        got = tqext.dequantize(packed, rotated=True, dtype=dtype)
        assert_close(got, reference.decode_values(values, rotated=True), tolerance)


def test_quantize_padding_is_zeros_before_the_rotation(rng):
    """Head dimension 80 is coded as 96 dimensions of which the last 16 are zero."""
    x = normal(rng, 1, 2, 9, 80)
    padded = mx.pad(x, [(0, 0)] * 3 + [(0, 16)])
    assert same(tqext.quantize_keys(x), tqext.quantize_keys(padded))
    assert same(tqext.quantize_values(x), tqext.quantize_values(padded))


# ---- limits of the input --------------------------------------------------------------------


def test_quantize_zero_vectors_decode_to_zero():
    x = mx.zeros((1, 1, 3, 64))
    k, v = tqext.quantize_keys(x, qjl=True), tqext.quantize_values(x)
    assert not to_numpy(k.norms).any() and not to_numpy(k.residual_norms).any()
    # Zero lies on the middle boundary, and ties go up.
    for bits in (2, 3, 4):
        codes = to_numpy(tqext.quantize_keys(x, bits=bits).codes)
        assert (reference.unpack_keys(codes, bits) == 2 ** (bits - 1)).all()
    assert not to_numpy(tqext.dequantize(k)).any() and not to_numpy(tqext.dequantize(v)).any()


def test_quantize_keys_equal_to_their_mean_decode_to_the_mean(rng):
    means = normal(rng, 1, 2, 1, 64, dtype=mx.float16)
    k = mx.broadcast_to(means, (1, 2, 3, 64))
    assert np.array_equal(to_numpy(tqext.dequantize(tqext.quantize_keys(k, means=means))), to_numpy(k).astype(np.float32))


def test_quantize_values_of_a_constant_group_are_exact():
    v = mx.full((1, 1, 2, 64), 1.5)
    packed = tqext.quantize_values(v, rotation="none")
    assert np.array_equal(to_numpy(packed.params)[0, 0, 0], np.array([0, 1.5, 0, 1.5], np.float16))
    assert np.array_equal(to_numpy(tqext.dequantize(packed)), to_numpy(v))


@pytest.mark.parametrize("magnitude", [1e-38, 1e-20, 1e-6, 1e4, 1e8, 1e20, 1e37])
def test_quantize_any_finite_input_gives_finite_parameters(magnitude, rng):
    """Up to where the rotation itself would overflow fp32."""
    x = mx.array(np.clip(rng.normal(size=(1, 2, 20, 128)), -3, 3).astype(np.float32)) * magnitude
    for rotation in ("hadamard", "none"):
        for packed in (tqext.quantize_keys(x, qjl=True, rotation=rotation), tqext.quantize_values(x, rotation=rotation)):
            for array in arrays_of(packed):
                assert np.isfinite(array.astype(np.float64)).all()
        if magnitude <= 1e4:
            k_hat = to_numpy(tqext.dequantize(tqext.quantize_keys(x, rotation=rotation))).astype(np.float64)
            assert np.abs(k_hat - to_numpy(x)).max() <= max(0.6 * 3 * magnitude, 6e-8 * 127)


def test_quantize_keys_of_the_largest_norm_are_clipped_not_infinite():
    k = mx.full((1, 1, 1, 128), 65504.0, dtype=mx.float16)
    assert to_numpy(tqext.quantize_keys(k).norms).item() == 65504


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_quantize_not_finite_input_stays_in_its_token(bad, dtype, rng):
    x = normal(rng, 1, 2, 5, 64, dtype=DTYPES[dtype])
    clean = tqext.quantize_keys(x, qjl=True), tqext.quantize_values(x)
    x[0, 1, 2, 7] = bad
    for before, after in zip(clean, (tqext.quantize_keys(x, qjl=True), tqext.quantize_values(x)), strict=True):
        decoded = to_numpy(tqext.dequantize(after))
        assert not np.isfinite(decoded[0, 1, 2]).all()
        for a, b in zip(arrays_of(before), arrays_of(after), strict=True):
            others = np.ones(a.shape[:3], bool)
            others[0, 1, 2] = False
            assert np.array_equal(a[others], b[others])


def test_quantize_nan_decodes_to_nan(rng):
    x = normal(rng, 1, 1, 3, 64)
    x[0, 0, 1, 0] = float("nan")
    for packed in (tqext.quantize_keys(x), tqext.quantize_values(x)):
        decoded = to_numpy(tqext.dequantize(packed))[0, 0]
        assert np.isnan(decoded[1]).all() and np.isfinite(decoded[[0, 2]]).all()


# ---- shapes, strides, compile -------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 0, 64), (0, 2, 3, 64), (2, 0, 3, 64)])
def test_quantize_nothing_gives_nothing(shape):
    x = mx.zeros(shape)
    k, v = tqext.quantize_keys(x, qjl=True), tqext.quantize_values(x)
    assert k.codes.shape == (*shape[:3], 6) and v.params.shape == (*shape[:3], 4)
    assert tqext.dequantize(k).shape == shape and tqext.dequantize(v).shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_reads_strided_inputs(dtype, rng):
    x = normal(rng, 2, 3, 77, 64, dtype=DTYPES[dtype])
    means, balance = normal(rng, 1, 3, 2, 64, dtype=mx.float16), mx.exp(normal(rng, 3, 64))
    centre = dict(means=means, balance=balance)
    strided = dict(means=mx.swapaxes(mx.contiguous(mx.swapaxes(means, 1, 2)), 1, 2), balance=mx.contiguous(balance.T).T)
    for view in (poisoned(x, float("nan")), mx.swapaxes(mx.contiguous(mx.swapaxes(x, 1, 2)), 1, 2)):
        assert same(tqext.quantize_keys(x, **centre), tqext.quantize_keys(view, **strided))
        for bits, coding in VALUE_CODINGS:
            assert same(
                tqext.quantize_values(x, bits=bits, coding=coding), tqext.quantize_values(view, bits=bits, coding=coding)
            )
    every_other = mx.repeat(x, 2, axis=-1)[..., ::2]
    assert same(tqext.quantize_keys(x), tqext.quantize_keys(every_other))
    assert same(tqext.quantize_values(x), tqext.quantize_values(every_other))


def test_dequantize_reads_strided_inputs(rng):
    x, means = normal(rng, 2, 3, 77, 64), normal(rng, 2, 3, 2, 64, dtype=mx.float16)
    k = tqext.quantize_keys(x, means=means, balance=mx.exp(normal(rng, 3, 64)))
    for rotated in (False, True):
        for packed in (k, tqext.quantize_values(x), tqext.quantize_values(x, bits=3, coding="lloyd")):
            got, want = (to_numpy(tqext.dequantize(p, rotated=rotated)) for p in (poisoned_tokens(packed), packed))
            assert np.array_equal(got, want)


def test_quantize_one_token_at_a_time_gives_the_same_bytes(rng):
    x = normal(rng, 2, 3, 33, 96)
    for quantize in (
        lambda x: tqext.quantize_keys(x, qjl=True),
        tqext.quantize_values,
        lambda x: tqext.quantize_values(x, bits=3, coding="lloyd"),
    ):
        whole = arrays_of(quantize(x))
        parts = [arrays_of(quantize(x[:, :, t : t + 1])) for t in range(33)]
        for i, array in enumerate(whole):
            assert np.array_equal(array, np.concatenate([part[i] for part in parts], 2))


def test_quantize_means_of_batch_one_serve_every_sequence(rng):
    x, means = normal(rng, 3, 2, 70, 64), normal(rng, 1, 2, 2, 64, dtype=mx.float16)
    assert same(tqext.quantize_keys(x, means=means), tqext.quantize_keys(x, means=mx.repeat(means, 3, axis=0)))


def test_quantize_centred_keys_are_the_keys_less_their_means_times_the_balance(rng):
    """The operator's own subtraction and product, in fp32: the bytes of keys that were centred before."""
    x, means = normal(rng, 2, 3, 150, 96), normal(rng, 2, 3, 3, 96, dtype=mx.float16)
    balance = mx.exp(normal(rng, 3, 96))
    centred = (x - mx.repeat(means.astype(mx.float32), 64, axis=2)[:, :, :150]) * balance[:, None]
    for rotation in ("hadamard", "none"):
        got = tqext.quantize_keys(x, means=means, balance=balance, rotation=rotation)
        assert same(got, tqext.quantize_keys(centred, rotation=rotation))


@pytest.mark.parametrize("shapeless", [False, True])
def test_quantize_under_compile(shapeless, rng):
    def both(x, means, balance):
        k = tqext.quantize_keys(x, means=means, balance=balance, qjl=True)
        outs = [k.codes, k.norms, k.signs, k.residual_norms, tqext.dequantize(k)]
        for bits, coding in VALUE_CODINGS:
            v = tqext.quantize_values(x, bits=bits, coding=coding)
            outs += [v.codes, v.params, tqext.dequantize(v)]
        return outs

    compiled = mx.compile(both, shapeless=shapeless)
    balance = mx.exp(normal(rng, 2, 64))
    # Without shapes the number of blocks stays what it was traced with.
    for n in (5, 9) if shapeless else (5, 9, 200):
        x = normal(rng, 1, 2, n, 64)
        means = tqext.block_means(x)
        for got, want in zip(compiled(x, means, balance), both(x, means, balance), strict=True):
            assert np.array_equal(to_numpy(got), to_numpy(want))


def test_block_means_under_compile(rng):
    compiled = mx.compile(tqext.block_means)
    for n in (5, 64, 200):
        x = normal(rng, 1, 2, n, 64)
        assert np.array_equal(to_numpy(compiled(x)), to_numpy(tqext.block_means(x)))


# ---- what is refused ----------------------------------------------------------------------------


def x(*shape, dtype=mx.float32):
    return mx.zeros(shape, dtype)


def half(*shape):
    return mx.zeros(shape, mx.float16)


BAD = {
    "keys-rank": ("quantize_keys", "k", lambda: tqext.quantize_keys(x(2, 3, 64))),
    "keys-rank-5": ("quantize_keys", "k", lambda: tqext.quantize_keys(x(1, 2, 3, 4, 64))),
    "keys-dtype": ("quantize_keys", "k", lambda: tqext.quantize_keys(x(1, 2, 3, 64, dtype=mx.int32))),
    "keys-head-dim": ("quantize_keys", "k", lambda: tqext.quantize_keys(x(1, 2, 3, 60))),
    "keys-head-dim-0": ("quantize_keys", "k", lambda: tqext.quantize_keys(x(1, 2, 3, 0))),
    "keys-head-dim-520": ("quantize_keys", "k", lambda: tqext.quantize_keys(x(1, 2, 3, 520))),
    "keys-bits-1": ("quantize_keys", "bits", lambda: tqext.quantize_keys(x(1, 2, 3, 64), bits=1)),
    "keys-bits-5": ("quantize_keys", "bits", lambda: tqext.quantize_keys(x(1, 2, 3, 64), bits=5)),
    "keys-bits-negative": ("quantize_keys", "bits", lambda: tqext.quantize_keys(x(1, 2, 3, 64), bits=-3)),
    "means-heads": ("quantize_keys", "means", lambda: tqext.quantize_keys(x(1, 2, 3, 64), means=half(1, 3, 1, 64))),
    "means-batch": ("quantize_keys", "means", lambda: tqext.quantize_keys(x(3, 2, 3, 64), means=half(2, 2, 1, 64))),
    "means-blocks": ("quantize_keys", "means", lambda: tqext.quantize_keys(x(1, 2, 65, 64), means=half(1, 2, 1, 64))),
    "means-dim": ("quantize_keys", "means", lambda: tqext.quantize_keys(x(1, 2, 3, 64), means=half(1, 2, 1, 32))),
    "means-rank": ("quantize_keys", "means", lambda: tqext.quantize_keys(x(1, 2, 3, 64), means=half(1, 2, 64))),
    "means-dtype": ("quantize_keys", "means", lambda: tqext.quantize_keys(x(1, 2, 3, 64), means=x(1, 2, 1, 64))),
    "balance-heads": ("quantize_keys", "balance", lambda: tqext.quantize_keys(x(1, 2, 3, 64), balance=x(3, 64))),
    "balance-rank": ("quantize_keys", "balance", lambda: tqext.quantize_keys(x(1, 2, 3, 64), balance=x(1, 2, 64))),
    "balance-dtype": ("quantize_keys", "balance", lambda: tqext.quantize_keys(x(1, 2, 3, 64), balance=half(2, 64))),
    "block-means-rank": ("block_means", "k", lambda: tqext.block_means(x(2, 3, 64))),
    "block-means-dtype": ("block_means", "k", lambda: tqext.block_means(x(1, 2, 3, 64, dtype=mx.int32))),
    "values-coding": ("quantize_values", "coding", lambda: tqext.quantize_values(x(1, 2, 3, 64), coding="huffman")),
    "values-lloyd-bits": ("quantize_values", "bits", lambda: tqext.quantize_values(x(1, 2, 3, 64), bits=5, coding="lloyd")),
    "keys-rotation": ("quantize_keys", "rotation", lambda: tqext.quantize_keys(x(1, 2, 3, 64), rotation="dct")),
    "values-rank": ("quantize_values", "v", lambda: tqext.quantize_values(x(64))),
    "values-dtype": ("quantize_values", "v", lambda: tqext.quantize_values(x(1, 2, 3, 64, dtype=mx.bool_))),
    "values-head-dim": ("quantize_values", "v", lambda: tqext.quantize_values(x(1, 2, 3, 4))),
    "values-bits-3": ("quantize_values", "bits", lambda: tqext.quantize_values(x(1, 2, 3, 64), bits=3)),
    "values-rotation": ("quantize_values", "rotation", lambda: tqext.quantize_values(x(1, 2, 3, 64), rotation="")),
    "dequantize-dtype": (
        "dequantize",
        "dtype",
        lambda: tqext.dequantize(tqext.quantize_keys(x(1, 2, 3, 64)), dtype=mx.int8),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_quantize_rejects(name):
    op, argument, call = BAD[name]
    with pytest.raises(ValueError, match=error_line(op, argument)):
        call()

"""Packed format 2: layout numbers, codebooks, golden bytes."""

import json

import mlx.core as mx
import numpy as np
import pytest

import make_golden
import reference
import tqext
from support import DTYPES, to_numpy

pytestmark = pytest.mark.usefixtures("device")

GOLDEN = json.loads(make_golden.PATH.read_text())
DIMS = range(32, 513, 32)


def case_name(case):
    parts = [case["kind"], f"d{case['head_dim']}", f"{case['bits']}bits"]
    parts += [name for name in ("means", "balance", "signs") if case.get(name)]
    return "-".join(parts + ([case["rotation"]] if case.get("rotation") == "orthogonal" else []))


def words(texts, dtype):
    """Hexadecimal rows, one a token -> [1, 1, n_tokens, n]."""
    width = 2 * np.dtype(dtype).itemsize
    rows = [[int(t[i : i + width], 16) for i in range(0, len(t), width)] for t in texts]
    return np.array(rows, np.uint32 if width == 8 else np.uint16)[None, None]


def bits_of(x):
    x = to_numpy(x)
    return x.view(np.uint16) if x.dtype == np.float16 else x


# ---- layout -----------------------------------------------------------------------------------


def test_format_version_is_2():
    assert tqext.format.VERSION == GOLDEN["format_version"] == 2


def test_format_layout_numbers():
    f = tqext.format
    assert (f.UNIT, f.GROUP, f.MIN_DIM, f.MAX_DIM, f.DIM_STEP, f.CODEBOOK_TOP) == (32, 32, 32, 512, 8, 127)
    assert [f.padded_dim(n) for n in (8, 32, 40, 80, 112, 128)] == [32, 32, 64, 96, 128, 128]
    assert [f.code_words(128, bits) for bits in (2, 3, 4)] == [8, 12, 16]
    assert (f.sign_words(128), f.value_params(128), f.value_params(128, "lloyd")) == (4, 8, 1)
    assert f.BLOCK == reference.BLOCK == 64
    assert [f.n_blocks(n) for n in (0, 1, 64, 65, 128)] == [0, 1, 1, 2, 2]
    assert {bits: f.value_shrink(bits) for bits in (2, 4)} == pytest.approx(reference.VALUE_SHRINK)
    for dim in DIMS:
        assert f.hadamard_factor(dim) == (reference.factor(dim) or 0)


def test_format_bytes_per_token_at_128():
    k = tqext.quantize_keys(mx.zeros((1, 1, 1, 128)))
    v = tqext.quantize_values(mx.zeros((1, 1, 1, 128)))
    assert [x.nbytes for x in (k.codes, k.norms, v.codes, v.params)] == [48, 2, 32, 16]
    v = tqext.quantize_values(mx.zeros((1, 1, 1, 128)), bits=3, coding="lloyd")
    assert [x.nbytes for x in (v.codes, v.params)] == [48, 2]
    assert tqext.block_means(mx.zeros((1, 1, 64, 128))).nbytes == 4 * 64


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_format_keys_take_exactly_their_bits(bits):
    for head_dim in (32, 80, 96, 128, 288, 512):
        dim = reference.padded_dim(head_dim)
        packed = tqext.quantize_keys(mx.zeros((2, 3, 5, head_dim)), bits=bits, qjl=reference.factor(dim) is not None)
        assert packed.codes.dtype == mx.uint32 and packed.codes.shape == (2, 3, 5, dim * bits // 32)
        assert packed.norms.dtype == mx.float16 and packed.norms.shape == (2, 3, 5, 1)
        assert (packed.bits, packed.head_dim) == (bits, head_dim)
        if packed.signs is not None:
            assert packed.signs.dtype == mx.uint32 and packed.signs.shape == (2, 3, 5, dim // 32)
            assert packed.residual_norms.dtype == mx.float16 and packed.residual_norms.shape == (2, 3, 5, 1)


@pytest.mark.parametrize("bits", [2, 4])
def test_format_values_take_exactly_their_bits(bits):
    for head_dim in (32, 80, 96, 128, 288, 512):
        dim = reference.padded_dim(head_dim)
        packed = tqext.quantize_values(mx.zeros((2, 3, 5, head_dim)), bits=bits)
        assert packed.codes.dtype == mx.uint32 and packed.codes.shape == (2, 3, 5, dim * bits // 32)
        assert packed.params.dtype == mx.float16 and packed.params.shape == (2, 3, 5, 2 * dim // 32)
        assert (packed.bits, packed.head_dim) == (bits, head_dim)


# ---- bytes written by hand --------------------------------------------------------------------

# 32 dimensions; code = the dimension modulo the number of codes, then code = its place among the dimensions.
HAND_KEYS = {
    (2, "modulo"): "fa50fa50 fa50fa50",
    (2, "place"): "88888888 dddddddd",
    (3, "modulo"): "f6d4b290 fe54ba10 fedc3210",
    (3, "place"): "99990000 bbbbaaaa ddddcccc",
    (4, "modulo"): "76543210 fedcba98 76543210 fedcba98",
    (4, "place"): "33221100 77665544 bbaa9988 ffeeddcc",
}


@pytest.mark.parametrize("bits, order", HAND_KEYS)
def test_format_key_words_by_hand(bits, order):
    """Nibble n of word i: see DESIGN. 3 bits: dimension 24 + n has its bit i at the top of nibble n of word i."""
    codes = mx.array(words([HAND_KEYS[bits, order].replace(" ", "")], np.uint32))
    norms = mx.full((1, 1, 1, 1), 127.0, dtype=mx.float16)
    packed = tqext.PackedKeys(codes=codes, norms=norms, bits=bits, head_dim=32)
    dims = np.arange(32)
    code = dims % 2**bits if order == "modulo" else dims * 2**bits // 32
    levels = np.array(tqext.format.codebook(bits, 32)[0], np.float32)
    assert np.allclose(to_numpy(tqext.dequantize(packed, rotated=True))[0, 0, 0], levels[code], rtol=1e-6, atol=0)


def test_format_value_words_by_hand():
    """Slot-major: word w, bits 2s..2s+1 hold dimension W s + w; scale and bias interleaved."""
    # dim 64, W = 4 words. Dimension 4s + w has code (s + w) % 4.
    hand = ["e4e4e4e4", "39393939", "4e4e4e4e", "93939393"]
    codes = mx.array(words(["".join(hand)], np.uint32))
    params = mx.array(np.array([2.0, -1.0, 0.5, 3.0], np.float16).reshape(1, 1, 1, 4))
    packed = tqext.PackedValues(codes=codes, params=params, bits=2, head_dim=64)
    got = to_numpy(tqext.dequantize(packed, rotated=True))[0, 0, 0]
    code = np.array([(d // 4 + d % 4) % 4 for d in range(64)])
    assert np.array_equal(got, np.where(np.arange(64) < 32, 2 * code - 1, 0.5 * code + 3).astype(np.float32))


def test_format_4_bit_value_words_by_hand():
    # dim 32, W = 4 words. Dimension 4s + w has code (s + 8 w) % 16.
    hand = ["76543210", "fedcba98", "76543210", "fedcba98"]
    codes = mx.array(words(["".join(hand)], np.uint32))
    params = mx.array(np.array([1.0, 0.0], np.float16).reshape(1, 1, 1, 2))
    packed = tqext.PackedValues(codes=codes, params=params, bits=4, head_dim=32)
    got = to_numpy(tqext.dequantize(packed, rotated=True))[0, 0, 0]
    assert np.array_equal(got, [(d // 4 + 8 * (d % 4)) % 16 for d in range(32)])


def test_format_first_sign_words():
    """splitmix64's published first output for seed 0 is 0xE220A8397B1DCDAF; the signs are its high half."""
    assert reference.splitmix64(0, 3) == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    for seed in (reference.ROTATION_SEED, reference.RESIDUAL_SEED):
        for dim in (32, 128, 512):
            words = [tqext.format.sign_word(seed, i) for i in range(dim // 32)]
            assert words == reference.sign_words(dim, seed).tolist()
    assert (tqext.format.ROTATION_SEED, tqext.format.RESIDUAL_SEED) == (
        reference.ROTATION_SEED,
        reference.RESIDUAL_SEED,
    )


# ---- golden file ------------------------------------------------------------------------------


def test_format_golden_file_is_what_the_reference_makes():
    assert make_golden.PATH.read_text() == make_golden.text(make_golden.document())


def golden_input(case, dtype):
    x = np.array(case["input"], np.float32) * GOLDEN["input_unit"]
    return mx.array(x[None, None]).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [c for c in GOLDEN["cases"] if c["kind"] == "keys"], ids=case_name)
def test_format_golden_keys(case, dtype):
    means, balance = case["means"], case["balance"]
    if means is not None:
        means = mx.array((np.array(means, np.float32)[None, None] * GOLDEN["input_unit"]).astype(np.float16))
    if balance is not None:
        balance = mx.array(np.array(balance, np.float32)[None])
    packed = tqext.quantize_keys(
        golden_input(case, DTYPES[dtype]),
        bits=case["bits"],
        means=means,
        balance=balance,
        qjl=case["signs"] is not None,
        rotation=case["rotation"],
    )
    assert np.array_equal(bits_of(packed.codes), words(case["codes"], np.uint32))
    assert np.array_equal(bits_of(packed.norms), words(case["norms"], np.uint16))
    if case["signs"] is None:
        assert packed.signs is None and packed.residual_norms is None
    else:
        assert np.array_equal(bits_of(packed.signs), words(case["signs"], np.uint32))
        assert np.array_equal(bits_of(packed.residual_norms), words(case["residual_norms"], np.uint16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [c for c in GOLDEN["cases"] if c["kind"] != "keys"], ids=case_name)
def test_format_golden_values(case, dtype):
    coding = "groups" if case["kind"] == "values" else "lloyd"
    packed = tqext.quantize_values(golden_input(case, DTYPES[dtype]), bits=case["bits"], coding=coding)
    assert np.array_equal(bits_of(packed.codes), words(case["codes"], np.uint32))
    assert np.array_equal(bits_of(packed.params), words(case["params"], np.uint16))


# ---- dense rotation ---------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [32, 64, 288, 352, 512])
def test_format_dense_rotation_is_the_documented_matrix(dim):
    """The columns of the package's matrix, from the specification alone: to a rounding of fp32."""
    columns = to_numpy(tqext.rotate(mx.eye(dim), rotation="orthogonal"))
    want = reference.dense_matrix(dim)
    assert np.abs(want.astype(np.float64) @ want.T - np.eye(dim)).max() < 1e-6
    assert np.abs(columns.T - want).max() <= 2.0**-24


# ---- codebook ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_format_codebook_is_lloyd_max_of_the_beta_law(bits):
    for dim in DIMS:
        levels, scale = tqext.format.codebook(bits, dim)
        want_levels, want_scale = reference.codebook(bits, dim)
        assert np.array_equal(np.array(levels), want_levels), dim
        assert scale == pytest.approx(want_scale, rel=1e-6)


@pytest.mark.parametrize("bits, cost", [(2, 0.0002), (3, 0.0013), (4, 0.0021)])
def test_format_codebook_rounding_costs_a_thousandth_of_the_distortion(bits, cost):
    """0.05 % at 3 bits and D = 128; never more than 0.21 %."""
    for dim in DIMS:
        levels, scale = tqext.format.codebook(bits, dim)
        assert levels[-1] == 127 and levels[0] == -127
        exact = reference.distortion(reference.lloyd_max(bits, dim), dim)
        rounded = reference.distortion(np.array(levels) / 127 * scale, dim)
        assert exact <= rounded <= (1 + cost) * exact


@pytest.mark.parametrize("bits, published", [(2, 0.1160), (3, 0.0340), (4, 0.0093)])
def test_format_codebook_distortion_is_the_published_one_at_128(bits, published):
    assert reference.distortion(reference.lloyd_max(bits, 128), 128) == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize("call", [lambda: tqext.format.codebook(5, 128), lambda: tqext.format.codebook(3, 100)])
def test_format_codebook_rejects(call):
    with pytest.raises(ValueError, match=r"^\[\w+\] \w+: expected .+, got .+"):
        call()

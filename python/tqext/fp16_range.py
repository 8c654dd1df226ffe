"""Whether a layer's keys and values are of a size that the packed format's fp16 numbers hold."""

from __future__ import annotations

import mlx.core as mx

from tqext.ops import PackedKeys, PackedValues

# Norms, scales, biases and means are fp16 and saturate at 65504. A text may have larger tokens than the calibration's prompt.
HEADROOM = 8.0
LARGEST = 65504.0 / HEADROOM
# Of a layer whose largest number is below this, tokens that are 8 times smaller have parameters without enough digits: fp16 has
# steps of 2^-24, and the scale of a 4-bit group, a fifteenth of the group's range, is multiplied by up to 15.
SMALLEST = 2.0**-11


def fits_fp16(k: mx.array, v: mx.array, packed_k: PackedKeys, packed_v: PackedValues) -> tuple[mx.array, mx.array]:
    """bool arrays without axes: whether the keys, and the values, are within the range.

    Args:
        k: Keys ``[batch, n_kv_heads, n_tokens, D]``, of any float type.
        v: Values.
        packed_k: The same tokens, packed.
        packed_v: The same tokens, packed.
    """
    keys = [packed_k.norms] + [x for x in (packed_k.means, packed_k.residual_norms) if x is not None]
    return _fits(k, keys), _fits(v, [packed_v.params])


def _fits(tokens: mx.array, parts: list[mx.array]) -> mx.array:
    largest = mx.abs(tokens).max()
    packed = mx.stack([mx.abs(x).max().astype(mx.float32) for x in parts]).max()
    # A layer whose heads are all zero has nothing to lose. NaN does not fit.
    return (largest == 0) | ((largest >= SMALLEST) & (packed <= LARGEST))

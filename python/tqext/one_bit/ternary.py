"""Ternary weights of GGUF files: their blocks taken apart, and put together as MLX's affine 2-bit weights.

Every type here stores codes 0 to 3 for -scale, 0, +scale and 2 * scale (which no ternary model uses) and one float16 scale per
group. MLX's affine form computes scale * code + bias, which is the same number for bias = -scale.

Sources of the layouts: ggml-common.h of ggml-org/llama.cpp (TQ1_0, TQ2_0, Q2_0) and of PrismML-Eng/llama.cpp (PQ2_0),
independent readers that cite the latter's sources (PTQ1_0); MODEL-FORMATS.md of PrismML-Eng/Bonsai-demo (Q2_0 of older files).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

BITS = 2
CODES_PER_WORD = 32 // BITS
_POWERS = np.array([1, 3, 9, 27, 81], np.uint8)


class Type(NamedTuple):
    """A tensor type.

    Attributes:
        name: As in the program that writes it.
        block: Weights in a block.
        block_bytes: Bytes of a block.
        group: Weights that share a scale in MLX's form, 64 or 128.
        scale_at: The byte of the block where its scale begins.
        codes: From the blocks' other bytes ``[n, bytes]`` to codes ``[n, block]``.
    """

    name: str
    block: int
    block_bytes: int
    group: int
    scale_at: int
    codes: Callable[[np.ndarray], np.ndarray]


def _pairs_of_bits(data: np.ndarray) -> np.ndarray:
    """Four codes a byte in the order of the weights, low bits first."""
    return np.stack([data >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1).reshape(len(data), -1)


def _planes_of_bits(data: np.ndarray) -> np.ndarray:
    """Four codes a byte, the same bits of 32 bytes side by side."""
    parts = [data[:, at : at + 32] >> shift & 3 for at in range(0, data.shape[1], 32) for shift in (0, 2, 4, 6)]
    return np.concatenate(parts, axis=1)


def _trits(data: np.ndarray, n: int) -> np.ndarray:
    """n base-3 digits of each byte, the same digit of all bytes side by side, the highest digit first.

    A byte is a fraction: of 256 times the digits' number over 3 ** 5, rounded up. Times 3, the carry is the next digit.
    """
    shifted = data[:, None, :] * _POWERS[:n, None]  # uint8: the higher digits fall off
    return (shifted.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(len(data), -1)


def _trits_of(*sizes: int) -> Callable[[np.ndarray], np.ndarray]:
    """Runs of so many bytes with five digits each, and the bytes after them with four."""

    def codes(data: np.ndarray) -> np.ndarray:
        parts, at = [], 0
        for size in sizes:
            parts.append(_trits(data[:, at : at + size], 5))
            at += size
        return np.concatenate([*parts, _trits(data[:, at:], 4)], axis=1)

    return codes


_PTQ1_0 = Type("PTQ1_0", 128, 28, 128, 26, _trits_of(16, 8))
_PQ2_0 = Type("PQ2_0", 128, 34, 128, 0, _pairs_of_bits)
_Q2_0 = Type("Q2_0", 64, 18, 64, 0, _pairs_of_bits)
# By ggml's numbers. TQ1_0 and TQ2_0 have one scale for two of MLX's groups.
TYPES = {
    34: Type("TQ1_0", 256, 54, 128, 52, _trits_of(32, 16)),
    35: Type("TQ2_0", 256, 66, 128, 64, _planes_of_bits),
    42: _Q2_0,
    142: _PQ2_0,
    143: _PTQ1_0,
}
Q2_0 = 42
# PrismML's files from before ggml had a Q2_0 have PQ2_0's blocks under Q2_0's number.
OLD_Q2_0 = _PQ2_0


def unpack(data: np.ndarray, kind: Type, name: str = "tensor") -> tuple[np.ndarray, np.ndarray]:
    """Bytes ``[rows, bytes]`` as codes uint8 ``[rows, cols]`` and scales float16 ``[rows, cols / kind.group]``.

    Raises:
        ValueError: Rows that are not whole blocks.
    """
    if data.ndim != 2 or data.dtype != np.uint8 or data.shape[1] % kind.block_bytes:
        raise ValueError(f"[gguf] {name}: expected rows of {kind.block_bytes}-byte blocks, got {data.dtype} {data.shape}")
    n_rows = len(data)
    blocks = np.ascontiguousarray(data).reshape(-1, kind.block_bytes)
    end = kind.scale_at + 2
    scales = np.ascontiguousarray(blocks[:, kind.scale_at : end]).view("<f2")
    codes = kind.codes(blocks[:, end:] if kind.scale_at == 0 else blocks[:, : kind.scale_at])
    return codes.reshape(n_rows, -1), np.repeat(scales, kind.block // kind.group, axis=1).reshape(n_rows, -1)


def pack(codes: np.ndarray) -> np.ndarray:
    """Codes ``[rows, cols]`` as MLX's words uint32 ``[rows, cols / 16]``, low bits first."""
    quads = codes.reshape(len(codes), -1, 4)
    packed = quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6
    return np.ascontiguousarray(packed).view("<u4")


def dequantize(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The weights as fp32, exactly."""
    values = (codes.astype(np.float32) - 1).reshape(*scales.shape, -1) * scales[..., None].astype(np.float32)
    return values.reshape(codes.shape)

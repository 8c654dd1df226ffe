"""Tensor types of GGUF files that are decoded to floats here: those of the built-in model, which needs no package ``gguf``.

Source of the layouts: ggml-common.h of ggml-org/llama.cpp (block_q4_1, block_q8_0).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Type(NamedTuple):
    """A tensor type.

    Attributes:
        name: ggml's.
        block: Weights in a block.
        block_bytes: Bytes of a block.
        decode: From rows of numbers, or of blocks' bytes ``[rows, bytes]``, to fp32 numbers ``[rows, cols]``.
    """

    name: str
    block: int
    block_bytes: int
    decode: Callable[[np.ndarray], np.ndarray]


def _floats(data: np.ndarray) -> np.ndarray:
    return data.astype(np.float32)


def _q4_1(data: np.ndarray) -> np.ndarray:
    """A scale and a minimum in fp16, then 16 bytes: the first half of the weights in their low four bits, the second above."""
    blocks = np.ascontiguousarray(data).reshape(-1, 20)
    scales, minima = blocks[:, :4].copy().view("<f2").astype(np.float32).T[..., None]
    codes = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return (scales * codes + minima).reshape(len(data), -1)


def _q8_0(data: np.ndarray) -> np.ndarray:
    """A scale in fp16, then 32 signed bytes."""
    blocks = np.ascontiguousarray(data).reshape(-1, 34)
    scales = blocks[:, :2].copy().view("<f2").astype(np.float32)
    return (scales * blocks[:, 2:].view(np.int8)).reshape(len(data), -1)


# By ggml's numbers.
TYPES = {
    0: Type("F32", 1, 4, _floats),
    1: Type("F16", 1, 2, _floats),
    3: Type("Q4_1", 32, 20, _q4_1),
    8: Type("Q8_0", 32, 34, _q8_0),
}

"""Layers with 1-bit and ternary weights, under the name by which other programs import them; see `tqext.one_bit.nn`."""

from tqext.one_bit.nn import (
    GROUP_SIZE,
    Q1AllToShardedLinear,
    Q1Embedding,
    Q1Linear,
    Q1ShardedToAllLinear,
    Swap,
    TernaryAllToShardedLinear,
    TernaryEmbedding,
    TernaryLinear,
    TernaryShardedToAllLinear,
    from_quantized,
    insert_empty,
    q1_paths,
    quantize,
    ternary_paths,
)

__all__ = [
    "GROUP_SIZE",
    "Q1AllToShardedLinear",
    "Q1Embedding",
    "Q1Linear",
    "Q1ShardedToAllLinear",
    "Swap",
    "TernaryAllToShardedLinear",
    "TernaryEmbedding",
    "TernaryLinear",
    "TernaryShardedToAllLinear",
    "from_quantized",
    "insert_empty",
    "q1_paths",
    "quantize",
    "ternary_paths",
]

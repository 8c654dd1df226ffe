"""tqext: attention on packed keys and values, a compressed KV cache for mlx-lm, and 1-bit weights, for Apple's MLX."""

from tqext._load import load_extension

load_extension()

from tqext._ext import available_isas, format, isa, num_threads  # noqa: E402
from tqext.ops import (  # noqa: E402
    PackedKeys,
    PackedValues,
    dequantize,
    quantize_keys,
    quantize_values,
    rotate,
    turboquant_attention,
)

__version__ = "0.1.0"

__all__ = [
    "PackedKeys",
    "PackedValues",
    "__version__",
    "available_isas",
    "dequantize",
    "format",
    "isa",
    "num_threads",
    "quantize_keys",
    "quantize_values",
    "rotate",
    "turboquant_attention",
]

"""tqext: attention on packed keys and values, a compressed KV cache for mlx-lm, and 1-bit weights, for Apple's MLX."""

from typing import TYPE_CHECKING, Any

from tqext._lazy import attribute
from tqext._load import load_extension, runs_command

# Why the extension is not there, while a command runs that can say so itself: `tqext --help`, `tqext doctor`.
load_error: ImportError | None = None
try:
    load_extension()
except ImportError as error:
    if not runs_command():
        raise
    load_error = error
else:
    from tqext._ext import (
        available_isas,
        block_means,
        format,
        isa,
        num_threads,
        q1_dequantize,
        q1_matmul,
        q1_quantize,
        ternary_matmul,
    )
    from tqext.ops import (
        PackedKeys,
        PackedValues,
        dequantize,
        latent_attention,
        quantize_keys,
        quantize_values,
        rotate,
        shared_prefix_attention,
        turboquant_attention,
    )

__version__ = "0.1.0"

# Imported on first use: they need mlx-lm, which takes a second to import and which the operators do without.
_LAZY = {
    "BatchTurboQuantKVCache": "tqext.kv.batch",
    "BatchTurboQuantWindowKVCache": "tqext.kv.window_batch",
    "PRESETS": "tqext.presets",
    "Policy": "tqext.presets",
    "PrefixStore": "tqext.mlx_lm.prefix_store",
    "Recipe": "tqext.presets",
    "TurboQuantKVCache": "tqext.kv.cache",
    "TurboQuantLatentCache": "tqext.kv.latent",
    "TurboQuantWindowKVCache": "tqext.kv.window",
    "attach": "tqext.mlx_lm",
    "calibrate": "tqext.mlx_lm",
    "detach": "tqext.mlx_lm",
    "get_policy": "tqext.presets",
    "install": "tqext.mlx_lm",
    "load": "tqext.models",
    "make_prompt_cache": "tqext.mlx_lm",
    "probe": "tqext.mlx_lm",
    "uninstall": "tqext.mlx_lm",
    "upgrade": "tqext.mlx_lm",
    "verify": "tqext.mlx_lm",
}

if TYPE_CHECKING:
    from tqext.kv.batch import BatchTurboQuantKVCache
    from tqext.kv.cache import TurboQuantKVCache
    from tqext.kv.latent import TurboQuantLatentCache
    from tqext.kv.window import TurboQuantWindowKVCache
    from tqext.kv.window_batch import BatchTurboQuantWindowKVCache
    from tqext.mlx_lm import attach, calibrate, detach, install, make_prompt_cache, probe, uninstall, upgrade, verify
    from tqext.mlx_lm.prefix_store import PrefixStore
    from tqext.models import load
    from tqext.presets import PRESETS, Policy, Recipe, get_policy


def __dir__() -> list[str]:
    return sorted([*__all__, "__all__", "__doc__", "__file__", "__name__", "__path__"])


def __getattr__(name: str) -> Any:
    return attribute(__name__, _LAZY, name)


__all__ = [
    "PRESETS",
    "BatchTurboQuantKVCache",
    "BatchTurboQuantWindowKVCache",
    "PackedKeys",
    "PackedValues",
    "Policy",
    "PrefixStore",
    "Recipe",
    "TurboQuantKVCache",
    "TurboQuantLatentCache",
    "TurboQuantWindowKVCache",
    "__version__",
    "attach",
    "available_isas",
    "block_means",
    "calibrate",
    "dequantize",
    "detach",
    "format",
    "get_policy",
    "install",
    "isa",
    "latent_attention",
    "load",
    "make_prompt_cache",
    "num_threads",
    "probe",
    "q1_dequantize",
    "q1_matmul",
    "q1_quantize",
    "quantize_keys",
    "quantize_values",
    "rotate",
    "shared_prefix_attention",
    "ternary_matmul",
    "turboquant_attention",
    "uninstall",
    "upgrade",
    "verify",
]

"""The compressed KV cache of one layer: of one sequence, and of a batch.

From the bottom up: tokens; schedule; codec; prefix (that caches share); columns (of a batch); snapshot; prefixed_snapshot;
buffers; state; cache; batch; forked; latent.
Beside the last ones those of sliding windows: window_snapshot; window; window_batch.
"""

from tqext.kv.batch import BatchTurboQuantKVCache
from tqext.kv.cache import TurboQuantKVCache
from tqext.kv.forked import ForkedKVCache, fork
from tqext.kv.latent import BatchTurboQuantLatentCache, TurboQuantLatentCache
from tqext.kv.window import TurboQuantWindowKVCache
from tqext.kv.window_batch import BatchTurboQuantWindowKVCache

__all__ = [
    "BatchTurboQuantKVCache",
    "BatchTurboQuantLatentCache",
    "BatchTurboQuantWindowKVCache",
    "ForkedKVCache",
    "TurboQuantKVCache",
    "TurboQuantLatentCache",
    "TurboQuantWindowKVCache",
    "fork",
]

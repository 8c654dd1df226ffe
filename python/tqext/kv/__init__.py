"""The compressed KV cache of one layer: of one sequence, and of a batch.

From the bottom up: tokens; schedule; codec; columns (of a batch); snapshot; buffers; state; cache; batch; forked.
"""

from tqext.kv.batch import BatchTurboQuantKVCache
from tqext.kv.cache import TurboQuantKVCache
from tqext.kv.forked import ForkedKVCache, fork

__all__ = ["BatchTurboQuantKVCache", "ForkedKVCache", "TurboQuantKVCache", "fork"]

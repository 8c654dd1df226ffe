"""The cache of a batch, under the name by which other programs import it; see `tqext.kv`."""

from tqext.kv.batch import BatchTurboQuantKVCache

__all__ = ["BatchTurboQuantKVCache"]

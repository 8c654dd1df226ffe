"""The cache of one sequence, under the name by which other programs import it; see `tqext.kv`."""

from tqext.kv.cache import TurboQuantKVCache
from tqext.kv.schedule import BLOCK, GROWTH
from tqext.kv.snapshot import Snapshot
from tqext.kv.state import STATE_MAGIC, STATE_VERSION
from tqext.kv.tokens import Exact

__all__ = ["BLOCK", "GROWTH", "STATE_MAGIC", "STATE_VERSION", "Exact", "Snapshot", "TurboQuantKVCache"]

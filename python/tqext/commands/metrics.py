"""What ``tqext server`` holds and does, in numbers: for ``/metrics``, for its page and for its log."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqext.protocols import SizedCache, is_compressed

# Seconds over which tokens per second are counted.
WINDOW = 10.0
# Points of the page's curve, and the seconds between two.
N_POINTS, POINT_SECONDS = 720, 5.0


@dataclass(frozen=True, slots=True)
class Holding:
    """What caches hold.

    Attributes:
        n_sequences: Sequences.
        n_coded: Their coded tokens. ``n_exact``: their exact ones.
        used: Bytes of the tokens. ``reserved``: of the buffers, room for growth included. Both without prefixes.
        fp16: Bytes that the same tokens would take in fp16.
        copies: Bytes of the prefixes' tokens if each sequence had its own.
        roots: The buffers of prefixes by their number: bytes of the longest prefix's tokens, and of the buffers.
    """

    n_sequences: int = 0
    n_coded: int = 0
    n_exact: int = 0
    used: int = 0
    reserved: int = 0
    fp16: int = 0
    copies: int = 0
    roots: dict[int, tuple[int, int]] = field(default_factory=dict)

    def __add__(self, other: Holding) -> Holding:
        roots = dict(self.roots)
        for number, (used, reserved) in other.roots.items():
            roots[number] = max(used, roots.get(number, (0, 0))[0]), reserved
        names = ("n_sequences", "n_coded", "n_exact", "used", "reserved", "fp16", "copies")
        return Holding(**{name: getattr(self, name) + getattr(other, name) for name in names}, roots=roots)

    def numbers(self, elsewhere: Collection[int] = ()) -> dict[str, int]:
        """What `GAUGES` tell. The buffers of each prefix count once, and not at all if they count `elsewhere`."""
        roots = [root for number, root in self.roots.items() if number not in elsewhere]
        used, reserved = (sum(root[i] for root in roots) for i in range(2))
        return {
            "n_sequences": self.n_sequences,
            "n_coded": self.n_coded,
            "n_exact": self.n_exact,
            "used": self.used + used,
            "reserved": self.reserved + reserved,
            "fp16": self.fp16,
            "shared": self.copies - used,
        }


def holding(cache: Sequence[SizedCache], n_sequences: int = 1) -> Holding:
    """What a prompt cache holds: a cache of every layer, compressed or mlx-lm's own."""
    layers = list(flat(cache))
    used, reserved, fp16 = (sum(column) for column in zip(*map(_bytes, layers), strict=True)) if layers else (0, 0, 0)
    copies = 0
    roots: dict[int, tuple[int, int]] = {}
    for prefix in (p for layer in layers if is_compressed(layer) for p in layer.prefixes if p is not None):
        number, n = prefix.root.number, prefix.used_nbytes
        copies += n
        roots[number] = max(n, roots.get(number, (0, 0))[0]), prefix.root.nbytes
    counts = [(layer.n_coded, layer.n_exact) for layer in layers if is_compressed(layer)]
    n_coded, n_exact = max(counts, key=sum, default=(0, 0))  # windows hold fewer tokens than other layers
    if not counts:
        n_exact = max((_n_tokens(layer) for layer in layers), default=0) * n_sequences
    return Holding(n_sequences, n_coded, n_exact, used, reserved, fp16, copies, roots)


def flat(cache: Sequence[SizedCache]) -> Iterator[SizedCache]:
    """The cache of every layer, also where mlx-lm keeps several as one."""
    for layer in cache:
        if hasattr(layer, "caches"):
            yield from flat(layer.caches)
        else:
            yield layer


def _n_tokens(layer: SizedCache) -> int:
    """Tokens of each sequence in one of mlx-lm's own caches."""
    offset = getattr(layer, "_idx", getattr(layer, "offset", 0))
    return offset if isinstance(offset, int) else 0


def _bytes(layer: SizedCache) -> tuple[int, int, int]:
    """Bytes used, reserved and in fp16; the first two without prefixes."""
    if is_compressed(layer):
        prefixes = {id(p): p for p in layer.prefixes if p is not None}.values()
        of_prefixes = sum(p.used_nbytes for p in prefixes), sum({p.root.number: p.root.nbytes for p in prefixes}.values())
        return layer.used_nbytes - of_prefixes[0], layer.nbytes - of_prefixes[1], layer.fp16_nbytes
    reserved = int(layer.nbytes)
    keys = getattr(layer, "keys", None)
    if keys is None or isinstance(keys, (tuple, list)) or keys.ndim != 4 or keys.shape[2] == 0:
        return reserved, reserved, reserved
    used = reserved * min(_n_tokens(layer), keys.shape[2]) // keys.shape[2]
    return used, reserved, used * 2 // keys.dtype.size


class Stats:
    """Counts; several threads may."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(COUNTERS, 0)
        self._kept: dict[Hashable, Holding] = {}
        self._running = Holding()
        self._recent: deque[tuple[float, int]] = deque()
        self._points: deque[tuple[float, int, int]] = deque(maxlen=N_POINTS)
        self.model = ""
        self.prefix_store: Callable[[], dict[str, int]] | None = None

    def count(self, name: str, n: int = 1) -> None:
        """Add to one of `COUNTERS`."""
        with self._lock:
            self._counts[name] += n
            if name == "generated_tokens":
                now = time.monotonic()
                self._recent.append((now, n))
                while self._recent[0][0] < now - WINDOW:
                    self._recent.popleft()

    def keep(self, key: Hashable, cache: Holding) -> None:
        """A cache was put aside for later requests."""
        with self._lock:
            self._kept[key] = cache

    def drop(self, key: Hashable) -> None:
        """It was thrown away."""
        with self._lock:
            self._kept.pop(key, None)

    def run(self, cache: Holding) -> None:
        """What the requests hold that are served now."""
        with self._lock:
            self._running = cache
            self._point()

    def kept_roots(self) -> set[int]:
        """The numbers of the buffers of prefixes that kept caches hold."""
        with self._lock:
            return {number for cache in self._kept.values() for number in cache.roots}

    def kept_bytes(self) -> int:
        """Bytes of the buffers of all kept caches."""
        with self._lock:
            return sum(self._kept.values(), Holding()).numbers()["reserved"]

    def _point(self) -> tuple[float, int, int]:
        total = sum(self._kept.values(), self._running).numbers()
        now = (round(time.time(), 1), total["used"], total["fp16"])
        if not self._points or now[0] - self._points[-1][0] >= POINT_SECONDS:
            self._points.append(now)
        return now

    def read(self) -> dict[str, Any]:
        """Everything at this moment."""
        prefix_store = self.prefix_store and self.prefix_store()
        with self._lock:
            now = self._point()
            since = time.monotonic() - WINDOW
            recent = sum(n for when, n in self._recent if when >= since)
            kept = sum(self._kept.values(), Holding())
            return {
                "model": self.model,
                "counters": dict(self._counts),
                "tokens_per_second": recent / WINDOW,
                "running": self._running.numbers(kept.roots),
                "kept": kept.numbers(),
                "points": [*self._points, now],  # the curve ends now
                "prefix_store": prefix_store,
            }


COUNTERS = {
    "requests": "Requests for a completion",
    "refused_requests": "Requests that were refused",
    "prompt_tokens": "Tokens of prompts",
    "reused_tokens": "Tokens of prompts that a kept cache held already",
    "generated_tokens": "Tokens that were generated",
    "prompt_cache_hits": "Prompts of which a kept cache held a part",
    "prompt_cache_misses": "Prompts of which no kept cache held a part",
    "prompt_cache_evictions": "Kept caches that were thrown away for others",
}
GAUGES = {
    "n_sequences": ("sequences", "Sequences"),
    "n_coded": ("coded_tokens", "Coded tokens"),
    "n_exact": ("exact_tokens", "Exact tokens"),
    "used": ("used_bytes", "Bytes of the tokens"),
    "reserved": ("reserved_bytes", "Bytes of the buffers, room for growth included"),
    "fp16": ("fp16_equivalent_bytes", "Bytes that the same tokens would take in fp16"),
    "shared": ("shared_bytes", "Bytes that the tokens would take on top if no sequences shared a prefix"),
}
STORE_COUNTERS = {
    "hits": "Prompts of which the prefix store gave a part",
    "misses": "Prompts of which nothing was kept, in memory or in the prefix store",
    "restored_tokens": "Tokens of prompts that were read from the prefix store",
    "skipped_tokens": "Tokens that were not stored yet because too much waited to be written",
    "read_bytes": "Bytes that were read from the prefix store",
    "written_bytes": "Bytes that were written to it",
    "evicted": "Entries that were removed to make room",
    "damaged": "Entries that were dropped because their checksum was wrong",
    "errors": "Reads and writes of the prefix store that failed",
}
STORE_GAUGES = {
    "bytes": "Bytes of the prefix store, of all processes",
    "entries": "Its entries",
    "max_bytes": "Bytes that it may take",
}
stats = Stats()


def prometheus() -> tuple[bytes, str]:
    """The numbers in Prometheus' text format, and its content type.

    Raises:
        ImportError: prometheus-client is not installed.
    """
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    registry.register(_Collector())
    return generate_latest(registry), CONTENT_TYPE_LATEST


class _Collector:
    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        now = stats.read()
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"tqext_{name}", text, value=now["counters"][name])
        yield GaugeMetricFamily(
            "tqext_tokens_per_second", f"Generated in the last {WINDOW:.0f} s", value=now["tokens_per_second"]
        )
        if (store := now["prefix_store"]) is not None:
            for name, text in STORE_COUNTERS.items():
                yield CounterMetricFamily(f"tqext_prefix_store_{name}", text, value=store[name])
            for name, text in STORE_GAUGES.items():
                yield GaugeMetricFamily(f"tqext_prefix_store_{name}", text, value=store[name])
        for key, (name, text) in GAUGES.items():
            gauge = GaugeMetricFamily(f"tqext_cache_{name}", f"{text}, by where they are", labels=["where"])
            for where in ("running", "kept"):
                gauge.add_metric([where], now[where][key])
            yield gauge

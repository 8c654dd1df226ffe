"""``tqext eval --by-position``: what compression costs, over the length of the context that a token finds."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from tqext.mlx_lm import probe, stock_cache
from tqext.mlx_lm.caches import compressed
from tqext.mlx_lm.guard import judged
from tqext.mlx_lm.packages import AnyModel
from tqext.mlx_lm.reports import Layer
from tqext.presets import Policy, get_policy
from tqext.protocols import Cache, Model

EDGES = (0, 512, 2048, 4096, 8192, 16384, 32768)
CHUNK = 256
STOCK_BITS = (8, 4, 3)
# Rows of logits that are compared at once: on a CPU 39 MB for each array in use, with 152 thousand words. A GPU has the room,
# and waits for the host after each comparison.
_ROWS, _GPU_ROWS = 64, 512
# Neighbouring positions go wrong together: standard errors are those of the means of so many.
_BATCH = 64


@dataclass(slots=True)
class Contender:
    """A cache that is measured.

    Attributes:
        name: What it is called in tables.
        cache: A prompt cache of the model, empty.
        bytes_per_token: Mean bytes of a stored token per layer and KV head, over the layers with a growing cache.
        pieces: Forward passes that a chunk is cut into.
        stock: Whether it is mlx-lm's own: if it fails, that is a result.
        seconds: Spent in the model so far.
        failure: How it failed, empty if it did not.
        layers: What the probe and the guard say about the layers, empty for mlx-lm's own caches.
    """

    name: str
    cache: list[Any]
    bytes_per_token: float
    pieces: int = 1
    stock: bool = False
    seconds: float = 0.0
    failure: str = ""
    layers: str = ""
    # KL, loss and agreement of every position so far.
    kl: list[np.ndarray] = field(default_factory=list)
    nll: list[np.ndarray] = field(default_factory=list)
    same: list[np.ndarray] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Span:
    """Quality at the positions from `begin` to `end` - 1, at which a token finds as many tokens before it.

    Attributes:
        kl: Mean of KL(uncompressed || compressed) of the next token in nats, `kl_se` its standard error, from means of 64
            consecutive positions, `kl_p99` its 99th percentile.
        ratio: Of the perplexity to the uncompressed cache's.
        top1: Share of positions at which both find the same token most probable.
    """

    begin: int
    end: int
    kl: float
    kl_se: float
    kl_p99: float
    ratio: float
    top1: float


@dataclass(frozen=True, slots=True)
class ByPosition:
    """One cache over one text.

    Attributes:
        cache: The contender's name.
        bytes_per_token: See `Contender`.
        n_tokens: Positions that were compared.
        chunk: Tokens that were fed at a time.
        reference: The uncompressed cache's perplexity.
        whole: All positions; its spans are in `spans`.
        seconds: Spent in the model with this cache.
        failure: How the cache failed, empty if it did not.
        layers: See `Contender`.
    """

    cache: str
    bytes_per_token: float
    n_tokens: int
    chunk: int
    reference: float
    whole: Span | None
    spans: tuple[Span, ...]
    seconds: float
    failure: str = ""
    layers: str = ""


def contenders(model: AnyModel, presets: Sequence[str | Policy], *, stock_bits: Sequence[int] = STOCK_BITS) -> list[Contender]:
    """The control (uncompressed, fed in halves of a chunk), the presets, and mlx-lm's caches of so many bits.

    Args:
        model: Any mlx-lm model.
        presets: See `tqext.install`.
        stock_bits: 8, 6, 4, 3 or 2.
    """
    out = []
    for preset in presets:
        policy = get_policy(preset)
        report = judged(model, policy)
        layers = report.layers
        heads = sum(layer.n_kv_heads for layer in layers if _grows(layer))
        packed = sum(layer.bytes_per_token or layer.fp16_bytes_per_token for layer in layers if _grows(layer))
        out.append(Contender(policy.name, compressed(stock_cache(model), report), packed / max(heads, 1), layers=str(report)))
    grown = [layer for layer in probe(model, get_policy()).layers if _grows(layer)]
    heads = sum(layer.n_kv_heads for layer in grown)
    plain = sum(layer.fp16_bytes_per_token for layer in grown) / max(heads, 1)
    for bits in stock_bits:
        dim = min((layer.head_dim for layer in grown), default=64)
        group = 64 if dim % 64 == 0 else 32
        size = plain / 16 * (bits + 32 / group)
        out.append(Contender(f"mlx-lm {bits}-bit", _quantised(stock_cache(model), bits, group), size, stock=True))
    return [Contender("uncompressed, other chunks", stock_cache(model), plain, pieces=2), *out]


def _grows(layer: Layer) -> bool:
    """Whether a layer's cache is one of those that could be compressed, also if its policy leaves it alone."""
    return bool(layer.n_kv_heads) and layer.cache == "KVCache"


def _quantised(stock: Sequence[Cache], bits: int, group_size: int) -> list[Cache]:
    return [QuantizedKVCache(group_size, bits) if type(c) is KVCache else c for c in stock]


def by_position(
    model: AnyModel,
    tokens: Sequence[int],
    entries: Sequence[Contender],
    *,
    chunk: int = CHUNK,
    edges: Sequence[int] = EDGES,
    progress: Callable[[int], object] = lambda n: None,
    at_edge: Callable[[list[ByPosition]], object] = lambda results: None,
) -> list[ByPosition]:
    """Feed a text in order through mlx-lm's own cache and through others, side by side, and compare the next token's logits.

    No more than a chunk's logits are held.

    Args:
        model: Any mlx-lm model.
        tokens: The text.
        entries: See `contenders`. Their caches are filled.
        chunk: Tokens to feed at a time. The tokens of a chunk see each other exactly.
        edges: Ascending positions between which results are averaged, from 0 on.
        progress: Called with the number of new tokens after each chunk.
        at_edge: Called with the results so far when a position of `edges` is reached.

    Raises:
        ValueError: Fewer than two tokens, or a chunk that cannot be cut as the entries want.
    """
    if len(tokens) < 2:
        raise ValueError(f"[by_position] tokens: expected at least 2, got {len(tokens)}")
    most = max((entry.pieces for entry in entries), default=1)
    if chunk < most:
        raise ValueError(f"[by_position] chunk: expected at least {most}, got {chunk}")
    reference = Contender("uncompressed", stock_cache(model), 0.0)
    reached = 0
    for begin in range(0, len(tokens) - 1, chunk):
        fed = mx.array([list(tokens[begin : begin + chunk])])
        n = min(chunk, len(tokens) - 1 - begin)  # nothing follows the last token
        following = mx.array(list(tokens[begin + 1 : begin + 1 + n]))[:, None]
        expected = _logits(model, fed, reference)[:n]
        reference.nll.append(_loss(expected, following))
        for entry in entries:
            if entry.failure:
                continue
            try:
                got = _logits(model, fed, entry)[:n]
            except Exception as error:
                if not entry.stock:
                    raise
                entry.failure = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            _compare(expected, got, following, entry)
            del got
        progress(fed.shape[1])
        position = begin + n
        if any(reached < edge <= position for edge in edges):
            reached = position
            at_edge(_results(reference, entries, chunk, edges))
    return _results(reference, entries, chunk, edges)


def _logits(model: Model, fed: mx.array, entry: Contender) -> mx.array:
    """fp32 logits ``[n_tokens, n_vocab]``."""
    start = time.perf_counter()
    n, parts = fed.shape[1], []
    size = -(-n // entry.pieces)
    for begin in range(0, n, size):
        parts.append(model(fed[:, begin : begin + size], cache=entry.cache)[0])
        mx.eval(parts[-1], [c.state for c in entry.cache])
    entry.seconds += time.perf_counter() - start
    return (mx.concatenate(parts) if len(parts) > 1 else parts[0]).astype(mx.float32)


def _rows(n: int) -> Iterator[slice]:
    size = _GPU_ROWS if mx.default_device() == mx.gpu else _ROWS
    return (slice(begin, begin + size) for begin in range(0, n, size))


def _loss(logits: mx.array, following: mx.array) -> np.ndarray:
    found = [mx.logsumexp(logits[r], axis=-1) - mx.take_along_axis(logits[r], following[r], axis=-1)[:, 0]
             for r in _rows(len(logits))]  # fmt: skip
    return np.concatenate([np.array(x, np.float64) for x in found])


def _compare(expected: mx.array, got: mx.array, following: mx.array, entry: Contender) -> None:
    for r in _rows(len(expected)):
        p, q = (x[r] - mx.logsumexp(x[r], axis=-1, keepdims=True) for x in (expected, got))
        kl = (mx.exp(p) * (p - q)).sum(axis=-1)
        nll = -mx.take_along_axis(q, following[r], axis=-1)[:, 0]
        same = p.argmax(axis=-1) == q.argmax(axis=-1)
        mx.eval(kl, nll, same)
        for found, kept in ((kl, entry.kl), (nll, entry.nll), (same, entry.same)):
            kept.append(np.array(found, np.float64))


def _results(reference: Contender, entries: Sequence[Contender], chunk: int, edges: Sequence[int]) -> list[ByPosition]:
    expected = np.concatenate(reference.nll)
    out = []
    for entry in entries:
        whole, spans, n = None, [], 0
        if entry.kl and not entry.failure:
            kl, nll, same = (np.concatenate(x) for x in (entry.kl, entry.nll, entry.same))
            n = kl.size
            whole = _span(0, n, kl, nll - expected, same)
            cuts = [*(edge for edge in edges if edge < n), n]
            spans = [_span(a, b, kl, nll - expected, same) for a, b in itertools.pairwise(cuts)]
        perplexity, seconds = float(np.exp(expected.mean())), round(entry.seconds, 1)
        found = (
            entry.name,
            entry.bytes_per_token,
            n,
            chunk,
            perplexity,
            whole,
            tuple(spans),
            seconds,
            entry.failure,
            entry.layers,
        )
        out.append(ByPosition(*found))
    return out


def _span(begin: int, end: int, kl: np.ndarray, more: np.ndarray, same: np.ndarray) -> Span:
    part = kl[begin:end]
    means = [part[i : i + _BATCH].mean() for i in range(0, part.size - part.size % _BATCH, _BATCH)]
    error = float(np.std(means, ddof=1) / len(means) ** 0.5) if len(means) > 1 else float("nan")
    return Span(
        begin,
        end,
        kl=float(part.mean()),
        kl_se=error,
        kl_p99=float(np.quantile(part, 0.99)),
        ratio=float(np.exp(more[begin:end].mean())),
        top1=float(same[begin:end].mean()),
    )


def table(results: Sequence[ByPosition]) -> str:
    """The results as text: the whole, then KL by position."""
    spans = max((r.spans for r in results), key=len, default=())
    heads = [f"<{span.end}" for span in spans]
    lines = [f"{'cache':<27} {'bytes':>6} {'KL':>8} {'s.e.':>7} {'p99':>7} {'ppl x':>8} {'top-1':>7}  KL at"]
    lines[0] += "".join(f"{head:>9}" for head in heads)
    for r in results:
        name = f"{r.cache:<27} {r.bytes_per_token:>6.1f} "
        if r.whole is None:
            lines.append(f"{name}does not run: {r.failure}")
            continue
        w = r.whole
        body = f"{w.kl:>8.4f} {w.kl_se:>7.4f} {w.kl_p99:>7.3f} {w.ratio:>8.4f} {w.top1:>7.2%}       "
        lines.append(name + body + "".join(f"{span.kl:>9.4f}" for span in r.spans))
    return "\n".join(lines)


def as_row(result: ByPosition) -> Mapping[str, Any]:
    """A result for JSON: what is not a number is None."""

    def clean(value: Any) -> Any:
        return None if isinstance(value, float) and not np.isfinite(value) else value

    def span(s: Span) -> dict[str, Any]:
        return {name: clean(getattr(s, name)) for name in Span.__dataclass_fields__}

    row = {name: clean(getattr(result, name)) for name in ByPosition.__dataclass_fields__ if name not in ("whole", "spans")}
    return row | {"whole": span(result.whole) if result.whole else None, "spans": [span(s) for s in result.spans]}

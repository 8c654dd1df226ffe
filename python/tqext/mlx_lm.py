"""mlx-lm on compressed caches: one hook on attention, one on model loading, and the proof that both are in effect."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx_lm.models.cache as mlx_lm_cache
import mlx_lm.utils

from tqext._ext import format as packed_format
from tqext.batch import BatchTurboQuantKVCache
from tqext.cache import Exact, Snapshot, TurboQuantKVCache
from tqext.presets import DEFAULT_PRESET, Policy, Recipe, get_policy

MAX_HEAD_DIM = 512
UPGRADE_CHUNK = 2048
# Least coded tokens of the path proof's prompt.
VERIFY_CODED = 96

_lock = threading.RLock()
_previous_attention: Callable[..., mx.array] | None = None
_previous_load_model: Callable[..., Any] | None = None
_load_policy: Policy | None = None
_observers: list[Callable[[Report, list[Any]], None]] = []


# Hooks


def hook() -> None:
    """Route ``mx.fast.scaled_dot_product_attention`` over a snapshot to the snapshot; all other calls go on as before."""
    global _previous_attention
    with _lock:
        if _previous_attention is not None:
            return
        previous = mx.fast.scaled_dot_product_attention

        @functools.wraps(previous)
        def scaled_dot_product_attention(q: mx.array, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(k, Snapshot):
                return _attend_snapshot(q, k, v, *args, **kwargs)
            if isinstance(k, _ProbeTokens):
                return k.hit(q, v)
            return previous(q, k, v, *args, **kwargs)

        scaled_dot_product_attention.tqext_hook = True  # type: ignore[attr-defined]
        _previous_attention = previous
        mx.fast.scaled_dot_product_attention = scaled_dot_product_attention
        for cls in (TurboQuantKVCache, BatchTurboQuantKVCache):
            setattr(mlx_lm_cache, cls.__name__, cls)  # where load_prompt_cache looks classes up


def _attend_snapshot(
    q: mx.array,
    k: Snapshot,
    v: Any,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    **options: Any,
) -> mx.array:
    if v is not k:
        raise TypeError("[scaled_dot_product_attention] v: expected the values of the keys' snapshot")
    stream = options.pop("stream", None)
    options.pop("force_fused", None)  # there is no unfused form
    if options:
        raise TypeError(f"[scaled_dot_product_attention] unknown arguments {sorted(options)} for a compressed cache")
    if stream is None:
        return k.attend(q, scale, mask, sinks)
    with mx.stream(stream):
        return k.attend(q, scale, mask, sinks)


def install(preset: str | Policy = DEFAULT_PRESET, **overrides: Any) -> Policy:
    """Compress the caches of every model that mlx-lm loads from now on.

    Args:
        preset: A name of `tqext.presets.PRESETS`, or a policy.
        **overrides: See `tqext.presets.get_policy`.

    Returns:
        The policy in effect.
    """
    global _previous_load_model, _load_policy
    policy = get_policy(preset, **overrides)
    hook()
    with _lock:
        _load_policy = policy
        if _previous_load_model is not None:
            return policy
        previous = mlx_lm.utils.load_model

        @functools.wraps(previous)
        def load_model(*args: Any, **kwargs: Any) -> Any:
            loaded = previous(*args, **kwargs)
            if _load_policy is not None:
                attach(loaded[0], _load_policy)
            return loaded

        _previous_load_model = previous
        mlx_lm.utils.load_model = load_model
    return policy


def uninstall() -> None:
    """Take both hooks back. Models that were loaded meanwhile need `detach`, or their caches cannot be attended to.

    Raises:
        RuntimeError: Another extension has wrapped a hook since; take that one back first.
    """
    global _previous_attention, _previous_load_model, _load_policy
    with _lock:
        if _previous_attention is not None:
            if not getattr(mx.fast.scaled_dot_product_attention, "tqext_hook", False):
                raise RuntimeError("[uninstall] mx.fast.scaled_dot_product_attention was replaced again after tqext's hook")
            mx.fast.scaled_dot_product_attention = _previous_attention
            _previous_attention = None
        if _previous_load_model is not None:
            mlx_lm.utils.load_model = _previous_load_model
            _previous_load_model = None
        _load_policy = None


def attach(model: Any, preset: str | Policy = DEFAULT_PRESET, **overrides: Any) -> Any:
    """Let a loaded model make compressed caches; returns the model.

    Which layers can be compressed is found out (`probe`) when the first cache is made.
    """
    policy = get_policy(preset, **overrides)
    hook()
    detach(model)
    probed: list[Report] = []

    def make_cache() -> list[Any]:
        if not probed:
            probed.append(probe(model, policy))
        cache = _compressed(stock_cache(model), probed[0])
        for observer in _observers:
            observer(probed[0], cache)
        return cache

    model.make_cache = make_cache
    return model


def on_cache(observer: Callable[[Report, list[Any]], None]) -> None:
    """Call ``observer(report, cache)`` for every cache that an attached model makes."""
    _observers.append(observer)


def detach(model: Any) -> Any:
    """Undo `attach`; returns the model."""
    vars(model).pop("make_cache", None)
    return model


def make_prompt_cache(model: Any, preset: str | Policy = DEFAULT_PRESET, **overrides: Any) -> list[Any]:
    """A prompt cache for ``mlx_lm.generate(..., prompt_cache=)``, compressed where the model allows it."""
    hook()
    return _compressed(stock_cache(model), probe(model, get_policy(preset, **overrides)))


def stock_cache(model: Any) -> list[Any]:
    """The cache mlx-lm would make for the model without tqext."""
    own = vars(model).pop("make_cache", None)
    try:
        return list(mlx_lm_cache.make_prompt_cache(model))
    finally:
        if own is not None:
            model.make_cache = own


# Probe


@dataclass(frozen=True, slots=True)
class Layer:
    """What the probe found about one cache of a model.

    Attributes:
        path: The cache's place: ``"3"``, or ``"3.1"`` for the second member of a ``CacheList``.
        cache: The class of the cache mlx-lm makes.
        recipe: How it is compressed, None if it is not.
        reason: Why not, empty if it is.
        n_kv_heads: 0 for a cache without keys and values. So are `head_dim` and `value_dim`.
        dtype_size: Bytes of an element of its keys.
        shared: Whether other layers attend to its tokens.
    """

    path: str
    cache: str
    recipe: Recipe | None = None
    reason: str = ""
    n_kv_heads: int = 0
    head_dim: int = 0
    value_dim: int = 0
    dtype_size: int = 2
    shared: bool = False

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a coded token in all heads."""
        return self.n_kv_heads * self.recipe.bytes_per_token(self.head_dim, self.value_dim) if self.recipe else 0

    @property
    def fp16_bytes_per_token(self) -> int:
        return self.n_kv_heads * (self.head_dim + self.value_dim) * 2


@dataclass(frozen=True, slots=True)
class Report:
    """Which caches of a model are compressed, and why the others are not."""

    policy: Policy
    layers: tuple[Layer, ...]

    @property
    def compressed(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.recipe is not None)

    def __str__(self) -> str:
        done = self.compressed
        lines = [f"{self.policy.name}: {len(done)} of {len(self.layers)} layers compressed"]
        if packed := sum(layer.bytes_per_token for layer in done):
            plain = sum(layer.fp16_bytes_per_token for layer in done)
            lines[0] += f", {packed} bytes per token in place of {plain} in fp16 ({plain / packed:.2f} times less)"
        for (cache, reason), paths in _grouped(self.layers).items():
            lines.append(f"  layers {', '.join(paths)}: {cache} stays: {reason}")
        return "\n".join(lines)

    def table(self) -> str:
        """One line for every layer."""
        lines = [str(self).splitlines()[0]]
        for layer in self.layers:
            r = layer.recipe
            how = f"{layer.cache} stays: {layer.reason}"
            if r is not None:
                bits = f"K{r.key_bits}{'+1' if r.qjl else ''} V{r.value_bits}{' Lloyd' if r.value_coding == 'lloyd' else ''}"
                dims = f"{layer.n_kv_heads} heads of {layer.head_dim}/{layer.value_dim}"
                how = f"{bits}, tail {r.tail}, first {r.first}, {dims}, {layer.bytes_per_token} bytes per token"
            lines.append(f"  {layer.path:>5}  {how}")
        return "\n".join(lines)


def _grouped(layers: Sequence[Layer]) -> dict[tuple[str, str], list[str]]:
    groups: dict[tuple[str, str], list[str]] = {}
    for layer in layers:
        if layer.recipe is None:
            groups.setdefault((layer.cache, layer.reason), []).append(layer.path)
    return groups


class _ProbeTokens:
    """Stands in for the keys and values of a layer, and notes whether they reach the hook."""

    __slots__ = ("dtype", "hits", "shape", "value_dim")

    def __init__(self, keys: mx.array, values: mx.array, n_tokens: int) -> None:
        self.shape = (*keys.shape[:2], n_tokens, keys.shape[3])
        self.dtype = keys.dtype
        self.value_dim = values.shape[3]
        self.hits = 0

    @property
    def ndim(self) -> int:
        return 4

    def astype(self, dtype: mx.Dtype) -> _ProbeTokens:
        return self

    def hit(self, queries: mx.array, values: Any) -> mx.array:
        if values is not self:
            raise TypeError("attention got other values than the cache's")
        self.hits += 1
        return mx.zeros((*queries.shape[:3], self.value_dim), queries.dtype)


class _ProbeCache(TurboQuantKVCache):
    """Counts tokens in place of storing them."""

    def __init__(self, path: str, seen: list[str]) -> None:
        super().__init__()
        self.path = path
        self.seen = seen
        self.tokens: list[_ProbeTokens] = []
        self.asked = False

    @property
    def keys(self) -> mx.array:
        """Something for a pipeline to hang a dependency on."""
        return mx.zeros(1)

    @keys.setter
    def keys(self, value: mx.array) -> None:
        pass

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        self.seen.append(self.path)
        if keys.ndim != 4 or values.ndim != 4:
            raise TypeError(f"the cache holds arrays of shape {keys.shape} and {values.shape}")
        self.n_tail += keys.shape[2]
        self.tokens.append(_ProbeTokens(keys, values, self.offset))
        return self.tokens[-1], self.tokens[-1]

    def keys_and_values(self) -> Any:
        self.asked = True
        return self.tokens[-1], self.tokens[-1]


def probe(model: Any, preset: str | Policy = DEFAULT_PRESET, **overrides: Any) -> Report:
    """Find out which caches of a model can be compressed, by a dry run that computes nothing.

    The model is called on two tokens and then on one, with stand-ins for the keys and values, and the result is
    never evaluated. A layer can be compressed if its stand-ins come to ``mx.fast.scaled_dot_product_attention``
    untouched.

    Args:
        model: Any mlx-lm model.
        preset: See `install`.

    Returns:
        A report with one entry for every cache.
    """
    policy = get_policy(preset, **overrides)
    hook()
    stock = stock_cache(model)
    first, n_layers = _layer_range(model, len(stock))
    reasons: dict[str, str] = {}
    members = dict(_members(stock))
    for path, cache in members.items():
        if type(cache) is not mlx_lm_cache.KVCache:
            reasons[path] = _WHY_NOT.get(type(cache).__name__, "not a plain KV cache")
        elif policy.of_layer(first + int(path.split(".")[0]), n_layers) is None:
            reasons[path] = "left out by the policy"
    while True:
        tried, failure = _dry_run(model, reasons)
        if failure is None:
            break
        reasons.update([failure])
    layers = []
    for path in members:
        recipe = policy.of_layer(first + int(path.split(".")[0]), n_layers)
        layers.append(_judge(path, members[path], recipe, reasons.get(path), tried[path]))
    return Report(policy, tuple(layers))


_WHY_NOT = {
    "RotatingKVCache": "a sliding window is small already",
    "ChunkedKVCache": "chunked attention is small already",
    "ArraysCache": "a state of fixed size, not tokens",
    "MambaCache": "a state of fixed size, not tokens",
}


def _members(caches: Sequence[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for i, cache in enumerate(caches):
        if type(cache) is mlx_lm_cache.CacheList:
            yield from _members(cache.caches, f"{prefix}{i}.")
        else:
            yield f"{prefix}{i}", cache


def _cache_list(*members: Any) -> Any:
    new: Any = mlx_lm_cache.CacheList
    return new(*members)


def _replaced(caches: Sequence[Any], new: Callable[[str, Any], Any], prefix: str = "") -> list[Any]:
    out = []
    for i, cache in enumerate(caches):
        if type(cache) is mlx_lm_cache.CacheList:
            out.append(_cache_list(*_replaced(cache.caches, new, f"{prefix}{i}.")))
        else:
            out.append(new(f"{prefix}{i}", cache))
    return out


def _compressed(stock: Sequence[Any], report: Report) -> list[Any]:
    layers = {layer.path: layer for layer in report.layers}

    def new(path: str, cache: Any) -> Any:
        layer = layers[path]
        return cache if layer.recipe is None else TurboQuantKVCache(layer.recipe, shared=layer.shared)

    return _replaced(stock, new)


def _layer_range(model: Any, n_caches: int) -> tuple[int, int]:
    """The index of the first cache's layer in the whole model, and the whole model's layers (pipelines hold a part)."""
    inner = getattr(model, "model", model)
    total = getattr(getattr(model, "args", None), "num_hidden_layers", None)
    if getattr(inner, "pipeline_size", 1) == 1 or not isinstance(total, int):
        return 0, n_caches
    return int(inner.start_idx), total


def _dry_run(model: Any, reasons: dict[str, str]) -> tuple[dict[str, Any], tuple[str, str] | None]:
    """Call the model on stand-ins for every cache without a reason; if it fails, the layer at which it did, and how."""
    seen: list[str] = []
    caches = _replaced(stock_cache(model), lambda path, cache: cache if path in reasons else _ProbeCache(path, seen))
    tried = dict(_members(caches))
    try:
        for tokens in ([[0, 0]], [[0]]):
            model(mx.array(tokens), cache=caches)
    except Exception as error:  # whatever a model does with keys that are not an array
        if not seen or seen[-1] in reasons:
            raise
        return tried, (seen[-1], f"the model computes with the keys itself ({type(error).__name__}: {error})")
    return tried, None


def _judge(path: str, stock: Any, recipe: Recipe | None, reason: str | None, tried: Any) -> Layer:
    cache = type(stock).__name__
    if reason is not None:
        keys, values = getattr(tried, "keys", None), getattr(tried, "values", None)
        if isinstance(keys, mx.array) and isinstance(values, mx.array) and keys.ndim == values.ndim == 4:
            return Layer(path, cache, None, reason, keys.shape[1], keys.shape[3], values.shape[3], keys.dtype.size)
        return Layer(path, cache, None, reason)
    if not tried.tokens:
        return Layer(path, cache, None, "the model stored nothing in it")
    tokens = tried.tokens[0]
    shape = (tokens.shape[1], tokens.shape[3], tokens.value_dim, tokens.dtype.size)
    if not all(t.hits for t in tried.tokens):
        return Layer(path, cache, None, "attention does not go through mx.fast.scaled_dot_product_attention", *shape)
    if any(dim % 8 or not 8 <= dim <= MAX_HEAD_DIM for dim in shape[1:3]):
        why = f"head dimensions {shape[1:3]} are not multiples of 8 up to {MAX_HEAD_DIM}"
        return Layer(path, cache, None, why, *shape)
    return Layer(path, cache, recipe, "", *shape, shared=tried.asked)


# Path proof


class PathError(AssertionError):
    """A compressed layer is not what the model's logits come from."""


def verify(model: Any, preset: str | Policy = DEFAULT_PRESET, *, n_tokens: int | None = None, **overrides: Any) -> Report:
    """Prove that every compressed layer's codes are what attention reads.

    A random prompt is stored. Then, for one layer at a time, its packed bytes are overwritten and the logits of
    the next token must change; and bytes that no token owns are overwritten and the logits must not change.

    Args:
        model: Any mlx-lm model.
        preset: See `install`.
        n_tokens: Length of the prompt; some of it must come out of the exact tail. Default: enough for every layer's recipe.

    Returns:
        The probe's report.

    Raises:
        PathError: A layer fails; the message names it.
    """
    policy = get_policy(preset, **overrides)
    report = probe(model, policy)
    if n_tokens is None:
        n_tokens = max((_n_to_verify(layer.recipe) for layer in report.compressed if layer.recipe), default=1)
    cache = _compressed(stock_cache(model), report)
    # A fixed linear congruence: a proof should not depend on a random state, nor change one. No model has so few tokens.
    prompt = mx.array([[(7919 * i + 13) % 61 + 1 for i in range(n_tokens)]])
    model(prompt, cache=cache)
    mx.eval([c.state for c in cache])
    expected = _next_logits(model, cache)
    paths = [layer.path for layer in report.compressed]
    for path in paths:
        if _at(cache, path).n_coded == 0:
            raise PathError(f"[verify] layer {path}: nothing was encoded after {n_tokens} tokens")
        if _same(_next_logits(model, cache, [path]), expected, fp32=1e-6, half=1e-3):
            raise PathError(f"[verify] layer {path}: overwriting its codes leaves the logits as they were")
    if not _same(_next_logits(model, cache, paths, attended=False), expected, fp32=1e-4, half=2e-2):
        raise PathError("[verify] a layer reads bytes that belong to no token")
    return report


def _n_to_verify(recipe: Recipe) -> int:
    """The length of a prompt of which at least `VERIFY_CODED` tokens are encoded, and no fewer than stay in the tail."""
    n_blocks = -(-max(VERIFY_CODED, recipe.tail) // packed_format.BLOCK)
    return recipe.first + recipe.tail + n_blocks * packed_format.BLOCK


def _same(a: mx.array, b: mx.array, *, fp32: float, half: float) -> bool:
    """Whether two runs differ by no more than a share of the largest logit: threads may sum in another order."""
    tolerance = fp32 if a.dtype == mx.float32 else half
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    return bool((mx.abs(a - b).max() <= tolerance * mx.abs(b).max()).item())


def _at(cache: Sequence[Any], path: str) -> Any:
    return dict(_members(cache))[path]


def _next_logits(model: Any, cache: Sequence[Any], corrupt: Sequence[str] = (), attended: bool = True) -> mx.array:
    trial = copy.deepcopy(cache)
    for path in corrupt:
        _at(trial, path).overwrite(attended=attended)
    logits: mx.array = model(mx.array([[1]]), cache=trial)[0, -1]
    mx.eval(logits)
    return logits


# Caches that exist already


def upgrade(cache: list[Any], preset: str | Policy = DEFAULT_PRESET, *, model: Any = None, **overrides: Any) -> list[Any]:
    """Compress a prompt cache, also in the middle of a generation.

    Args:
        cache: What ``mlx_lm.models.cache.make_prompt_cache`` made; changed in place.
        preset: See `install`.
        model: The cache's model, to leave the layers alone that it cannot attend to when compressed. Without it
            every plain ``KVCache`` is compressed, and such a model stops with an error.

    Returns:
        The same list.
    """
    policy = get_policy(preset, **overrides)
    hook()
    allowed = None if model is None else {layer.path for layer in probe(model, policy).compressed}
    first, n_layers = (0, len(cache)) if model is None else _layer_range(model, len(cache))

    def new(path: str, member: Any) -> Any:
        recipe = policy.of_layer(first + int(path.split(".")[0]), n_layers)
        if type(member) is not mlx_lm_cache.KVCache or recipe is None or (allowed is not None and path not in allowed):
            return member
        return _encoded(member, recipe)

    for i, member in enumerate(cache):
        cache[i] = _replaced([member], lambda path, c, i=i: new(f"{i}{path[1:]}", c))[0]  # type: ignore[misc]
    return cache


def _encoded(member: Any, recipe: Recipe) -> TurboQuantKVCache:
    out = TurboQuantKVCache(recipe)
    for begin in range(0, member.offset, UPGRADE_CHUNK):
        end = min(member.offset, begin + UPGRADE_CHUNK)
        tokens = Exact(member.keys, member.values).cut(begin, end)
        out.update_and_fetch(*tokens)
        mx.eval(out.state)
    return out

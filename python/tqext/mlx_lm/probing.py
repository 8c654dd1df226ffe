"""Which caches of a model can be compressed: found out by a dry run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx_lm.models.cache as mlx_lm_cache

from tqext.kv.cache import TurboQuantKVCache
from tqext.kv.latent import Projectable, ProjectedLatents, first_use, latent_recipe, why_not_latent
from tqext.kv.schedule import BLOCK
from tqext.kv.snapshot import AttendsItself
from tqext.mlx_lm import hooks
from tqext.mlx_lm.caches import check_model, layer_range, members, policy_for, replaced, stock_cache
from tqext.mlx_lm.packages import AnyModel, is_stock, logits, of_mlx_vlm, text_model
from tqext.mlx_lm.reports import Layer, Queries, Report
from tqext.mlx_lm.windows import LEAST_SAVING, saving, without_windows
from tqext.presets import Policy, Recipe
from tqext.protocols import Cache, Model

MAX_HEAD_DIM = 512
LEFT_OUT = "left out by the policy"


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


class _ProbeTokens(AttendsItself):
    """Stands in for the keys and values of a layer, and notes whether they reach the hook."""

    __slots__ = ("dtype", "hits", "queries", "shape", "value_dim")

    def __init__(self, keys: mx.array, values: mx.array, n_tokens: int) -> None:
        self.shape = (*keys.shape[:2], n_tokens, keys.shape[3])
        self.dtype = keys.dtype
        self.value_dim = values.shape[3]
        self.hits = 0
        self.queries: list[Queries] = []

    def _note(self, queries: mx.array, options: Mapping[str, object]) -> None:
        self.hits += 1
        self.queries.append(Queries(queries.shape[1], _name(queries.dtype), options.get("sinks") is not None))

    def attention(self, previous: Callable[..., mx.array], queries: mx.array, values: object, **options: Any) -> mx.array:
        if values is not self:
            raise TypeError("attention got other values than the cache's")
        self._note(queries, options)
        return mx.zeros((*queries.shape[:3], self.value_dim), queries.dtype)


class _ProbeLatents(Projectable, _ProbeTokens):
    """Stands in for the latents of a layer."""

    __slots__ = ()

    def attention(self, previous: Callable[..., mx.array], queries: mx.array, values: object, **options: Any) -> mx.array:
        if values is not self:
            raise TypeError("attention got other values than the latents")
        self._note(queries, options)
        return mx.zeros_like(queries)

    def attend_projected(
        self,
        previous: Callable[..., mx.array],
        queries: mx.array,
        keys: ProjectedLatents,
        values: ProjectedLatents,
        **options: Any,
    ) -> mx.array:
        self._note(keys.absorbed(keys.split(queries, 1.0, None)[0]), options)
        return values.of(mx.zeros((*queries.shape[:3], self.shape[3]), queries.dtype))


class _ProbeCache(TurboQuantKVCache):
    """Counts tokens instead of storing them."""

    def __init__(self, path: str, seen: list[str], window: int | None, *, latent: bool = False) -> None:
        super().__init__()
        self.latent = latent
        self.path = path
        self.seen = seen
        self.window = window
        self.asked_for_other_mask = False
        self.tokens: list[_ProbeTokens] = []
        self.asked = False

    @property
    def may_be_latent(self) -> bool:
        """Whether what came has one head, and the values other dimensions than the keys."""
        return bool(self.tokens) and self.tokens[0].shape[1] == 1 and self.tokens[0].value_dim != self.tokens[0].shape[3]

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
        self.tokens.append((_ProbeLatents if self.latent else _ProbeTokens)(keys, values, self.offset))
        return self._fetched()

    def _fetched(self) -> Any:
        tokens = self.tokens[-1]
        if not self.latent:
            return tokens, tokens
        return tokens, mx.zeros((*tokens.shape[:3], tokens.value_dim), tokens.dtype)

    def keys_and_values(self) -> Any:
        self.asked = True
        return self._fetched()

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        other = return_array or window_size not in (None, self.window)
        self.asked_for_other_mask |= self.window is not None and other
        return super().make_mask(N, return_array, window_size)


def probe(model: AnyModel, preset: str | Policy | None = None, **overrides: Any) -> Report:
    """Find out which caches of a model can be compressed, by a dry run that computes nothing.

    The model is called on two tokens and then on one, with stand-ins for the keys and values, and the result is
    never evaluated. A layer can be compressed if its stand-ins come to ``mx.fast.scaled_dot_product_attention``
    untouched; or if what it stores as keys are latents, which come there as they are or through mlx-lm's ``MultiLinear``.

    Args:
        model: Any mlx-lm model.
        preset: See `install`. None: what the model is attached or installed with, else ``tq3``.

    Returns:
        A report with one entry for every cache.
    """
    check_model("probe", model)
    model = text_model(model)
    policy = policy_for(model, preset, overrides)
    hooks.hook()
    stock = stock_cache(model)
    first, n_layers = layer_range(model, len(stock))
    windows = policy.windows is not False and not of_mlx_vlm(model)  # which makes masks of its own
    reasons: dict[str, str] = {}
    by_path = dict(members(stock))
    for path, cache in by_path.items():
        recipe = policy.of_layer(first + int(path.split(".")[0]), n_layers)
        if reason := why_not(cache, recipe, windows=windows):
            reasons[path] = reason
    latent: set[str] = set()
    failures: dict[str, str] = {}
    while True:
        tried, failure = _dry_run(model, reasons, latent)
        if failure is None:
            break
        path, reason = failure
        at = tried[path]
        assert isinstance(at, _ProbeCache)  # those with a reason do not fail
        window = window_of(by_path[path])
        if window is None and path not in latent and path not in failures and at.may_be_latent:
            # What one layer stores as latents, the others do most likely.
            alike = {other for other in by_path if other.split(".")[1:] == path.split(".")[1:] and other not in failures}
            latent |= alike - set(reasons)
        else:
            latent.discard(path)
            if path in failures or not at.latent:
                # A window that one layer cannot attend to stays in all of them: one more run is enough.
                same = [p for p, c in by_path.items() if window is not None and window_of(c) == window and p not in reasons]
                reasons.update(dict.fromkeys([path, *same], failures.get(path, reason)))
        failures.setdefault(path, reason)
    layers = []
    for path in by_path:
        recipe = policy.of_layer(first + int(path.split(".")[0]), n_layers)
        layer = _judge(path, by_path[path], recipe, reasons.get(path), tried[path])
        layers.append(replace(layer, window=window_of(by_path[path])))
    report = Report(policy, _alike(layers))
    if policy.windows is None and any(layer.window is not None for layer in report.compressed):
        share = saving(model, report)
        return report if share > LEAST_SAVING else without_windows(report, share)
    return report


def _alike(layers: list[Layer]) -> tuple[Layer, ...]:
    """The layers, those of a window left alone if one of them has to be: the mask that they share has its cache's columns."""
    bad: dict[int, Layer] = {}
    for layer in layers:
        if layer.window is not None and layer.reason not in ("", LEFT_OUT) and layer.n_kv_heads:
            bad.setdefault(layer.window, layer)

    def left_alone(layer: Layer) -> Layer:
        other = None if layer.window is None else bad.get(layer.window)
        if other is None or layer.recipe is None:
            return layer
        return replace(layer, recipe=None, reason=f"a sliding window like that of layer {other.path}: {other.reason}")

    return tuple(left_alone(layer) for layer in layers)


def window_of(cache: Cache) -> int | None:
    """The tokens of mlx-lm's cache of a sliding window, None for any other cache."""
    return int(cache.max_size) if type(cache) is mlx_lm_cache.RotatingKVCache and cache.keep == 0 else None


def why_not(cache: Cache, recipe: Recipe | None, *, windows: bool = False) -> str:
    """Why a cache cannot be replaced by a compressed one, as far as its class and the policy tell; empty if it can.

    `windows`: Sliding windows are compressed as well.
    """
    kind = type(cache)
    window = window_of(cache) if windows else None
    if window is not None and recipe is not None and window < recipe.tail + 2 * BLOCK:
        return f"a sliding window of {window} tokens leaves no room for codes beside the exact ones"
    if is_stock(cache, "KVCache") or window is not None:
        return LEFT_OUT if recipe is None else ""
    if kind.__module__.partition(".")[0] not in ("mlx_lm", "mlx_vlm"):
        return f"a class of {kind.__module__}, not mlx-lm's own KVCache"
    return _WHY_NOT.get(kind.__name__, "not a plain KV cache")


_WHY_NOT = {
    "RotatingKVCache": "a sliding window is small already",
    "ChunkedKVCache": "chunked attention is small already",
    "ArraysCache": "a state of fixed size, not tokens",
    "MambaCache": "a state of fixed size, not tokens",
}


def _dry_run(model: Model, reasons: dict[str, str], latent: set[str]) -> tuple[dict[str, Cache], tuple[str, str] | None]:
    """Call the model on stand-ins for every cache without a reason; if it fails, the layer at which it did, and how."""
    seen: list[str] = []
    if latent:
        first_use.note()

    def stand_in(path: str, cache: Cache) -> Cache:
        return cache if path in reasons else _ProbeCache(path, seen, window_of(cache), latent=path in latent)

    caches = replaced(stock_cache(model), stand_in)
    tried = dict(members(caches))
    try:
        for tokens in ([[0, 0]], [[0]]):
            logits(model, mx.array(tokens), caches)
    except Exception as error:  # whatever a model does with keys that are not an array
        if not seen or seen[-1] in reasons:
            raise
        return tried, (seen[-1], f"the model computes with the keys itself ({type(error).__name__}: {error})")
    return tried, None


def _judge(path: str, stock: Cache, recipe: Recipe | None, reason: str | None, tried: Cache) -> Layer:
    cache = type(stock).__name__
    if reason is not None:
        keys, values = getattr(tried, "keys", None), getattr(tried, "values", None)
        if isinstance(keys, mx.array) and isinstance(values, mx.array) and keys.ndim == values.ndim == 4:
            return Layer(path, cache, None, reason, keys.shape[1], keys.shape[3], values.shape[3], keys.dtype.size)
        return Layer(path, cache, None, reason)
    assert recipe is not None and isinstance(tried, _ProbeCache)
    if not tried.tokens:
        return Layer(path, cache, None, "the model stored nothing in it")
    tokens = tried.tokens[0]
    shape = (tokens.shape[1], tokens.shape[3], tokens.value_dim, tokens.dtype.size)
    if not all(t.hits for t in tried.tokens):
        return Layer(path, cache, None, "attention does not go through mx.fast.scaled_dot_product_attention", *shape)
    if tried.asked_for_other_mask:
        return Layer(path, cache, None, "the model asks for another mask than that of a sliding window", *shape)
    if any(dim % 8 or not 8 <= dim <= MAX_HEAD_DIM for dim in shape[1:3]):
        why = f"head dimensions {shape[1:3]} are not multiples of 8 up to {MAX_HEAD_DIM}"
        return Layer(path, cache, None, why, *shape)
    if tried.latent:
        if why := why_not_latent(recipe, shape[1]):
            return Layer(path, cache, None, why, *shape)
        recipe = latent_recipe(recipe)
    queries = tuple(dict.fromkeys(q for t in tried.tokens for q in t.queries))
    found = Layer(path, cache, recipe, "", *shape, shared=tried.asked, dtype=_name(tokens.dtype), queries=queries)
    return replace(found, is_latent=tried.latent)

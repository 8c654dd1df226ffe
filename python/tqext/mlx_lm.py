"""mlx-lm on compressed caches: hooks on attention, on loading and on cache making, and the proof that they are in effect."""

from __future__ import annotations

import copy
import html
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx_lm.models.cache as mlx_lm_cache
from mlx import nn

from tqext import hooks
from tqext._ext import format as packed_format
from tqext.batch import BatchTurboQuantKVCache
from tqext.cache import Exact, Snapshot, TurboQuantKVCache
from tqext.calibration import Calibration, LayerCalibration, ObservedTokens, calibrate_layers, ladder
from tqext.presets import DEFAULT_PRESET, Policy, Recipe, get_policy

MAX_HEAD_DIM = 512
UPGRADE_CHUNK = 2048
# Least coded tokens of the path proof's prompt.
VERIFY_CODED = 96

_lock = hooks.lock
_load_policy: Policy | None = None
_observers: list[Callable[[Report, list[Any]], None]] = []
_attached: list[weakref.ref[Any]] = []
_LOAD_STEP = "kv"


# Hooks


def hook() -> None:
    """Route ``mx.fast.scaled_dot_product_attention`` over a snapshot to the snapshot; all other calls go on as before.

    Also make mlx-lm's ``make_prompt_cache`` see `install` and refuse what compressed caches cannot do.
    """
    with _lock:
        for part in (_attention_hook, _make_prompt_cache_hook, _cache_classes):
            part.put()


def _attention(previous: Callable[..., Any], q: mx.array, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(k, Snapshot):
        return _attend_snapshot(q, k, v, *args, **kwargs)
    if isinstance(k, _ProbeTokens):
        return k.hit(q, v)
    if isinstance(k, ObservedTokens):
        if v is not k:
            raise TypeError("[scaled_dot_product_attention] v: expected the values of the keys' cache")
        return k.attend(previous, q, *args, **kwargs)
    return previous(q, k, v, *args, **kwargs)


def _make_mlx_lm_cache(previous: Callable[..., Any], model: Any, max_kv_size: int | None = None) -> Any:
    """mlx-lm's own ``make_prompt_cache``, where `install` finds the models that were loaded before it."""
    if _load_policy is not None:
        with _lock:
            if _load_policy is not None and isinstance(model, nn.Module) and _KEY not in vars(model):
                _attach(model, _Attachment(_load_policy, installed=True))
    if max_kv_size is not None and isinstance(model, _CompressedCaches):
        if model._tqext_report().compressed:
            return model._tqext_cache(max_kv_size)
        if _stock_make_cache(model) is None:
            return previous(_layers_of(model), max_kv_size)
    return previous(model, max_kv_size)


_attention_hook = hooks.Hook(mx.fast, "scaled_dot_product_attention", _attention)
_make_prompt_cache_hook = hooks.Hook(mlx_lm_cache, "make_prompt_cache", _make_mlx_lm_cache, everywhere=True)
_cache_classes = hooks.CacheClasses(TurboQuantKVCache, BatchTurboQuantKVCache)


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
    """Compress the caches that mlx-lm makes from now on, also those of models that are loaded already.

    Models given to `attach` or `detach` keep what was asked for there.

    Args:
        preset: A name of `tqext.presets.PRESETS`, or a policy.
        **overrides: See `tqext.presets.get_policy`.

    Returns:
        The policy in effect.
    """
    global _load_policy
    policy = get_policy(preset, **overrides)
    with _lock:
        hook()
        hooks.add_load_step(_LOAD_STEP, _load_attached)
        _load_policy = policy
        for model in _attached_models():
            if vars(model)[_KEY].installed:
                _attach(model, _Attachment(policy, installed=True))
    return policy


def _load_attached(load: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    loaded = load(*args, **kwargs)
    with _lock:
        if _load_policy is not None:
            _attach(loaded[0], _Attachment(_load_policy, installed=True))
    return loaded


def uninstall() -> None:
    """Take `install`, `attach`, `on_cache` and all hooks back; loading of 1-bit checkpoints stays.

    Compressed caches that exist already cannot be attended to without the hooks.

    Raises:
        RuntimeError: Another extension has wrapped a hook since; take that one back first. Nothing was changed.
    """
    global _load_policy
    with _lock:
        _attention_hook.check()
        _make_prompt_cache_hook.check()
        _cache_classes.check()
        hooks.remove_load_step(_LOAD_STEP)
        _attention_hook.take_back()
        _make_prompt_cache_hook.take_back()
        _cache_classes.take_back()
        for model in _attached_models():
            _detach(model)
        _observers.clear()
        _load_policy = None


def attach(model: Any, preset: str | Policy = DEFAULT_PRESET, **overrides: Any) -> Any:
    """Let a loaded model make compressed caches; returns the model.

    Which layers can be compressed is found out (`probe`) when the first cache is made. The model's class becomes a
    subclass of its own, with another ``make_cache``; copies of the model are attached as well.
    """
    policy = get_policy(preset, **overrides)
    with _lock:
        hook()
        return _attach(model, _Attachment(policy))


# The place of a model's attachment in its ``__dict__``; None there: `detach` has excluded it from `install`.
_KEY = "_tqext_attachment"


@dataclass(eq=False)
class _Attachment:
    """What `attach` leaves on a model. It does not refer to the model, whose weights would then outlive their last user.

    Attributes:
        policy: How to compress.
        installed: Whether `install` attached the model.
        own: The ``make_cache`` that was set on this very model before.
        report: The probe's, once a cache was made.
    """

    policy: Policy
    installed: bool = False
    own: Callable[[], Any] | None = None
    report: Report | None = None


class _CompressedCaches:
    """Comes before the class of an attached model."""

    __slots__ = ()

    def make_cache(self) -> list[Any]:
        """A compressed cache for every layer that allows it."""
        return self._tqext_cache(None)

    def _tqext_cache(self, max_kv_size: int | None) -> list[Any]:
        hook()
        report = self._tqext_report()
        cache = _compressed(stock_cache(self), report, max_kv_size)
        for observer in list(_observers):
            observer(report, cache)
        return cache

    def _tqext_report(self) -> Report:
        attachment: _Attachment = vars(self)[_KEY]
        with _lock:
            if attachment.report is None:
                attachment.report = _judged(self, attachment.policy)
        return attachment.report


def _attach(model: Any, attachment: _Attachment) -> Any:
    if not isinstance(model, nn.Module):
        raise ValueError(f"[attach] model: expected a model of mlx.nn, got {_kind(model)}")
    names = vars(model)
    attachment.own = names.get("make_cache")
    if isinstance(model, _CompressedCaches):
        attachment.own = attachment.own or names[_KEY].own
        names[_KEY] = attachment
    else:
        names[_KEY] = attachment
        cls = type(model)
        like = {"__slots__": (), "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        object.__setattr__(model, "__class__", type(cls.__name__, (_CompressedCaches, cls), like))
        _attached[:] = [known for known in _attached if known() is not None]
        _attached.append(weakref.ref(model))
    names.pop("make_cache", None)
    return model


def _check_model(op: str, model: Any) -> None:
    """Raise a ValueError for a name, a path, None, or what ``load`` returns as a whole."""
    if not callable(model):
        raise ValueError(f"[{op}] model: expected a model, got {_kind(model)}")


def _kind(model: Any) -> str:
    if isinstance(model, str):
        return f"{model!r}: model, tokenizer = tqext.load({model!r}) loads it"
    return "a tuple: model, tokenizer = tqext.load(...)" if isinstance(model, tuple) else type(model).__name__


def _attached_models() -> list[Any]:
    return [model for known in _attached if (model := known()) is not None]


def _detach(model: Any) -> None:
    attachment = vars(model).pop(_KEY, None)
    if isinstance(model, _CompressedCaches):
        object.__setattr__(model, "__class__", type(model).__mro__[2])
        if attachment.own is not None:
            vars(model).setdefault("make_cache", attachment.own)
    _attached[:] = [known for known in _attached if known() is not model]


def on_cache(observer: Callable[[Report, list[Any]], None]) -> None:
    """Call ``observer(report, cache)`` for every cache that an attached model makes, until `uninstall`."""
    _observers.append(observer)


def detach(model: Any) -> Any:
    """Undo `attach`, and let `install` pass the model by; returns the model."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"[detach] model: expected a model of mlx.nn, got {_kind(model)}")
    with _lock:
        _detach(model)
        vars(model)[_KEY] = None
    return model


def make_prompt_cache(
    model: Any, preset: str | Policy = DEFAULT_PRESET, *, max_kv_size: int | None = None, **overrides: Any
) -> list[Any]:
    """A prompt cache for ``mlx_lm.generate(..., prompt_cache=)``, compressed where the model allows it.

    Args:
        model: Any mlx-lm model.
        preset: See `install`.
        max_kv_size: Tokens that each compressed layer keeps at most: the first ones, and of the others the last ones
            (`TurboQuantKVCache`'s ``max_size``). None: all.
        **overrides: See `tqext.presets.get_policy`.

    Raises:
        ValueError: A bound that leaves no room for codes, or one for a model in which other layers keep all tokens.
    """
    _check_model("make_prompt_cache", model)
    hook()
    return _compressed(stock_cache(model), _judged(model, get_policy(preset, **overrides)), max_kv_size)


def stock_cache(model: Any) -> list[Any]:
    """The cache mlx-lm would make for the model without tqext."""
    make = _stock_make_cache(model)
    return list(_make_prompt_cache_hook.unhooked()(_layers_of(model)) if make is None else make())


def _stock_make_cache(model: Any) -> Callable[[], Any] | None:
    """The model's own ``make_cache``, which is looked up without a change of the model: other threads may use it."""
    if not isinstance(model, _CompressedCaches):
        return getattr(model, "make_cache", None)
    own: Callable[[], Any] | None = vars(model)[_KEY].own
    return own or getattr(super(_CompressedCaches, model), "make_cache", None)


def _layers_of(model: Any) -> Any:
    """What mlx-lm's ``make_prompt_cache`` asks a model without ``make_cache`` for."""
    return types.SimpleNamespace(layers=model.layers)


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
        calibration: Its balance and errors under `recipe`, None before the calibration (`probe`) or without a need for one.
        note: Why the guard chose another recipe than the policy's, empty if it did not.
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
    calibration: LayerCalibration | None = None
    note: str = ""

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a coded token in all heads."""
        return self.n_kv_heads * self.recipe.bytes_per_token(self.head_dim, self.value_dim) if self.recipe else 0

    @property
    def fp16_bytes_per_token(self) -> int:
        return self.n_kv_heads * (self.head_dim + self.value_dim) * 2

    def nbytes_at(self, n_tokens: int) -> int:
        """Bytes of so many tokens, without room for growth, as the layer would hold them if it is compressed."""
        if self.recipe is None:
            return 0
        n_recent = max(0, n_tokens - self.recipe.first)
        block = packed_format.BLOCK
        n_coded = max(0, (n_recent - self.recipe.tail) // block * block)
        exact = self.n_kv_heads * (self.head_dim + self.value_dim) * self.dtype_size
        return n_coded * self.bytes_per_token + (n_tokens - n_coded) * exact


@dataclass(frozen=True, slots=True, repr=False)
class Report:
    """Which caches of a model are compressed, and why the others are not. Notebooks show it as a table."""

    policy: Policy
    layers: tuple[Layer, ...]

    @property
    def compressed(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.recipe is not None)

    def nbytes_at(self, n_tokens: int) -> int:
        """Bytes of so many tokens in the compressed layers, without room for growth."""
        return sum(layer.nbytes_at(n_tokens) for layer in self.compressed)

    def fp16_nbytes_at(self, n_tokens: int) -> int:
        """Bytes of so many tokens in the same layers in fp16."""
        return n_tokens * sum(layer.fp16_bytes_per_token for layer in self.compressed)

    def __str__(self) -> str:
        done = self.compressed
        lines = [f"{self.policy.name}: {len(done)} of {len(self.layers)} layers compressed"]
        if packed := sum(layer.bytes_per_token for layer in done):
            plain = sum(layer.fp16_bytes_per_token for layer in done)
            lines[0] += f", {packed} bytes per token instead of {plain} in fp16 ({plain / packed:.2f} times less)"
        for (cache, reason), paths in _grouped(self.layers).items():
            lines.append(f"  layers {', '.join(paths)}: {cache} stays: {reason}")
        lines += [f"  layer {layer.path}: {layer.note}" for layer in done if layer.note]
        return "\n".join(lines)

    def table(self) -> str:
        """One line for every layer."""
        lines = [str(self).splitlines()[0]]
        for layer in self.layers:
            r = layer.recipe
            how = f"{layer.cache} stays: {layer.reason}"
            if r is not None:
                dims = f"{layer.n_kv_heads} heads of {layer.head_dim}/{layer.value_dim}"
                how = f"{r.label}, tail {r.tail}, first {r.first}, {dims}, {layer.bytes_per_token} bytes per token"
                how += "".join(f", {x}" for x in (layer.calibration, layer.note) if x)
            lines.append(f"  {layer.path:>5}  {how}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Report {self}>"

    def _repr_html_(self) -> str:
        """For notebooks: a table with one row for every kind of layer."""
        rows: dict[tuple[str, ...], list[str]] = {}
        for layer in self.layers:
            rows.setdefault(_row(layer), []).append(layer.path)
        head = ("layers", "cache", "bytes per token", "in fp16", "output error", "why")
        lines = ["".join(f"<th>{name}</th>" for name in head)]
        lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in (_spans(paths), *row)) for row, paths in rows.items()]
        table = "".join(f"<tr>{line}</tr>" for line in lines)
        return f"<p>{html.escape(str(self).splitlines()[0])}</p><table>{table}</table>"


def _row(layer: Layer) -> tuple[str, ...]:
    if layer.recipe is None:
        return (layer.cache, "", "", "", layer.reason)
    error = "" if layer.calibration is None else f"{layer.calibration.output_error:.1f}"
    return (layer.recipe.label, str(layer.bytes_per_token), str(layer.fp16_bytes_per_token), error, layer.note)


def _spans(paths: Sequence[str]) -> str:
    """Neighbouring layers as ``0-3, 5``; members of a list of caches one by one."""
    spans: list[list[str]] = []
    for path in paths:
        if spans and path.isdigit() and spans[-1][-1].isdigit() and int(path) == int(spans[-1][-1]) + 1:
            spans[-1].append(path)
        else:
            spans.append([path])
    return ", ".join(span[0] if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans)


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
    _check_model("probe", model)
    hook()
    stock = stock_cache(model)
    first, n_layers = _layer_range(model, len(stock))
    reasons: dict[str, str] = {}
    members = dict(_members(stock))
    for path, cache in members.items():
        if reason := _why_not(cache, policy.of_layer(first + int(path.split(".")[0]), n_layers)):
            reasons[path] = reason
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


def _why_not(cache: Any, recipe: Recipe | None) -> str:
    """Why a cache cannot be replaced by a compressed one, as far as its class and the policy tell; empty if it can."""
    kind = type(cache)
    if kind is mlx_lm_cache.KVCache:
        return "left out by the policy" if recipe is None else ""
    if not kind.__module__.startswith("mlx_lm."):
        return f"a class of {kind.__module__}, not mlx-lm's own KVCache"
    return _WHY_NOT.get(kind.__name__, "not a plain KV cache")


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


def _compressed(stock: Sequence[Any], report: Report, max_kv_size: int | None = None) -> list[Any]:
    layers = {layer.path: layer for layer in report.layers}
    unbounded = [layer.path for layer in report.layers if layer.recipe is None and layer.cache == "KVCache"]
    if max_kv_size is not None and unbounded:
        raise ValueError(
            f"[make_prompt_cache] max_kv_size: expected None, as the layers {', '.join(unbounded)} are not compressed "
            f"({report.policy.name}) and keep every token, got {max_kv_size}; tqext.detach(model) gives mlx-lm's bounded cache"
        )

    def new(path: str, cache: Any) -> Any:
        layer = layers[path]
        if layer.recipe is None:
            return cache
        balance = None if layer.calibration is None else layer.calibration.balance
        return TurboQuantKVCache(layer.recipe, balance=balance, shared=layer.shared, max_size=max_kv_size)

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


# Calibration and guard


def calibrate(model: Any, preset: str | Policy = DEFAULT_PRESET, **overrides: Any) -> Calibration:
    """The balance and the errors of every layer that a policy compresses, from a fixed prompt of 512 tokens.

    What the prompt shows at its own place is turned to other positions of the context that the model was trained for. The
    result is kept in the cache folder under a fingerprint of the weights and of the model's arguments. An attached model is
    calibrated when it makes its first cache; after its weights have changed, attach it again.

    Args:
        model: Any mlx-lm model.
        preset: See `install`.
        **overrides: See `tqext.presets.get_policy`.

    Raises:
        RuntimeError: The model cannot be run on the prompt.
    """
    return _calibrate(model, probe(model, preset, **overrides).compressed)


def report(model: Any) -> Report:
    """What an attached model's caches are like: compressed or not, and why, with the errors that the calibration found.

    Raises:
        ValueError: The model is not attached.
    """
    if not isinstance(model, _CompressedCaches):
        raise ValueError(f"[report] model: expected an attached model, got {type(model).__name__}")
    return model._tqext_report()


def _calibrate(model: Any, layers: Sequence[Layer]) -> Calibration:
    wanted = {layer.path: layer.recipe for layer in layers if layer.recipe is not None}

    def make_cache(new: Callable[[], Any]) -> tuple[list[Any], dict[str, Any]]:
        made: dict[str, Any] = {}

        def replace_wanted(path: str, cache: Any) -> Any:
            if path in wanted:
                made[path] = cache = new()
            return cache

        return _replaced(stock_cache(model), replace_wanted), made

    return calibrate_layers(model, make_cache, wanted)


def _judged(model: Any, policy: Policy, *, always: bool = False) -> Report:
    """What the probe finds, calibrated, with the layers stepped up that the guard finds inaccurate.

    Args:
        model: Any mlx-lm model.
        policy: What to look for.
        always: Calibrate also without a balance and a guard.
    """
    probed = probe(model, policy)
    need = [x for x in probed.compressed if always or policy.guard or (x.recipe is not None and x.recipe.balance)]
    calibration = _calibrate(model, need)
    return Report(policy, tuple(_guarded(layer, calibration, policy.guard) for layer in probed.layers))


def _guarded(layer: Layer, calibration: Calibration, guard: bool) -> Layer:
    if layer.recipe is None or (layer.path, layer.recipe) not in calibration.layers:
        return layer
    first = calibration.layers[layer.path, layer.recipe]
    for recipe in ladder(layer.recipe):
        found = calibration.layers[layer.path, recipe]
        if found.accurate or not guard:
            note = (
                "" if found is first else f"stepped up to {recipe.key_bits}-bit keys: with {layer.recipe.key_bits} bits {first}"
            )
            return replace(layer, recipe=recipe, calibration=found, note=note)
    assert not found.accurate
    bits = recipe.key_bits
    reason = f"compression is not accurate here: with {bits}-bit keys {found}"
    return replace(layer, recipe=None, reason=reason)


# Path proof


class PathError(AssertionError):
    """A compressed layer is not what the model's logits come from."""


def verify(model: Any, preset: str | Policy = DEFAULT_PRESET, *, n_tokens: int | None = None, **overrides: Any) -> Report:
    """Prove that every compressed layer's codes are accurate (`calibrate`) and are what attention reads.

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
    report = _judged(model, policy, always=True)
    for layer in report.compressed:
        if layer.calibration is not None and not layer.calibration.accurate:
            raise PathError(f"[verify] layer {layer.path}: not accurate: {layer.calibration}")
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
        model: The cache's model, for its calibration, and to leave the layers alone that it cannot attend to when compressed.
            Without it every plain ``KVCache`` is compressed, without a balance and a guard, and such a model stops with an
            error.

    Returns:
        The same list.

    Warns:
        UserWarning: Nothing was compressed, nor was it before; the message says why.
    """
    policy = get_policy(preset, **overrides)
    if not isinstance(cache, list):
        raise ValueError(f"[upgrade] cache: expected a list of caches, got {type(cache).__name__}")
    hook()
    judged = {} if model is None else {layer.path: layer for layer in _judged(model, policy).layers}
    first, n_layers = (0, len(cache)) if model is None else _layer_range(model, len(cache))
    reasons: dict[tuple[str, str], list[str]] = {}

    def new(path: str, member: Any) -> Any:
        layer = judged.get(path)
        recipe = policy.of_layer(first + int(path.split(".")[0]), n_layers) if layer is None else layer.recipe
        if isinstance(member, TurboQuantKVCache):
            reason = "" if member.recipe == recipe else "it is compressed with another recipe"
        elif not (reason := layer.reason if layer is not None else _why_not(member, recipe)):
            assert recipe is not None
            calibration = None if layer is None else layer.calibration
            return _encoded(member, recipe, None if calibration is None else calibration.balance)
        reasons.setdefault((type(member).__name__, reason), []).append(path)
        return member

    before = [id(member) for _, member in _members(cache)]
    for i, member in enumerate(cache):
        cache[i] = _replaced([member], lambda path, c, i=i: new(f"{i}{path[1:]}", c))[0]  # type: ignore[misc]
    if before == [id(member) for _, member in _members(cache)] and all(reason for _, reason in reasons):
        why = "; ".join(f"layers {', '.join(paths)}: {kind} stays: {reason}" for (kind, reason), paths in reasons.items())
        warnings.warn(f"[upgrade] cache: expected layers to compress, got none ({why or 'an empty list'})", stacklevel=2)
    return cache


def _encoded(member: Any, recipe: Recipe, balance: mx.array | None) -> TurboQuantKVCache:
    out = TurboQuantKVCache(recipe, balance=balance)
    for begin in range(0, member.offset, UPGRADE_CHUNK):
        end = min(member.offset, begin + UPGRADE_CHUNK)
        tokens = Exact(member.keys, member.values).cut(begin, end)
        out.update_and_fetch(*tokens)
        mx.eval(out.state)
    return out

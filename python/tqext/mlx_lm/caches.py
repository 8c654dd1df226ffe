"""The caches of a model: those that mlx-lm would make for it, and compressed ones instead."""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from tqext.kv.cache import TurboQuantKVCache
from tqext.kv.latent import TurboQuantLatentCache
from tqext.kv.window import TurboQuantWindowKVCache
from tqext.mlx_lm import hooks
from tqext.mlx_lm.packages import AnyModel, is_group, of_mlx_vlm, text_model
from tqext.mlx_lm.reports import Layer, Report
from tqext.presets import Policy, Recipe, get_policy
from tqext.protocols import Cache, Model

MakeCache = Callable[[], Sequence[Any]]
# The place of a model's attachment in its ``__dict__``; None there: `detach` has excluded it from `install`.
KEY = "_tqext_attachment"
# What `install` has put into effect.
installed: Policy | None = None


@dataclass(eq=False)
class Attachment:
    """What `attach` leaves on a model. It does not refer to the model, whose weights would then outlive their last user.

    Attributes:
        policy: How to compress.
        installed: Whether `install` attached the model.
        own: The ``make_cache`` that was set on this very model before.
        report: The probe's, once a cache was made.
    """

    policy: Policy
    installed: bool = False
    own: MakeCache | None = None
    report: Report | None = None


def policy_for(model: Any, preset: str | Policy | None, overrides: dict[str, Any]) -> Policy:
    """A preset with changes; None: what the model's caches are compressed with, or would be: else the default preset."""
    if preset is not None:
        return get_policy(preset, **overrides)
    attachment = getattr(text_model(model), "__dict__", {}).get(KEY, Attachment(installed or get_policy()))
    return get_policy(get_policy() if attachment is None else attachment.policy, **overrides)


class Attached:
    """Comes before the class of a model whose caches are made by its `Attachment`."""

    __slots__ = ()


def stock_cache(model: AnyModel | Attached) -> list[Any]:
    """The cache mlx-lm, or mlx-vlm for its own models, would make for the model without tqext."""
    make = stock_make_cache(model)
    if make is not None:
        return list(make())
    hook = hooks.vlm_make_prompt_cache if of_mlx_vlm(model) else hooks.make_prompt_cache
    return list(hook.unhooked()(layers_of(model)))


def stock_make_cache(model: AnyModel | Attached) -> MakeCache | None:
    """The model's own ``make_cache``, which is looked up without a change of the model: other threads may use it."""
    if not isinstance(model, Attached):
        return getattr(model, "make_cache", None)
    own: MakeCache | None = vars(model)[KEY].own
    return own or getattr(super(Attached, model), "make_cache", None)


def layers_of(model: AnyModel | Attached) -> types.SimpleNamespace:
    """What mlx-lm's ``make_prompt_cache`` asks a model without ``make_cache`` for."""
    return types.SimpleNamespace(layers=cast(Model, model).layers)


def members(caches: Sequence[Cache], prefix: str = "") -> Iterator[tuple[str, Cache]]:
    """Every cache of a model with its place, as `Layer` has it."""
    for i, cache in enumerate(caches):
        if is_group(cache):
            yield from members(cache.caches, f"{prefix}{i}.")
        else:
            yield f"{prefix}{i}", cache


def replaced(caches: Sequence[Cache], new: Callable[[str, Cache], Cache], prefix: str = "") -> list[Any]:
    """The caches with ``new(place, cache)`` instead of each."""
    out: list[Cache] = []
    for i, cache in enumerate(caches):
        if is_group(cache):
            out.append(cast(Any, type(cache))(*replaced(cache.caches, new, f"{prefix}{i}.")))
        else:
            out.append(new(f"{prefix}{i}", cache))
    return out


def compressed_windows(report: Report) -> set[int]:
    """The sliding windows of which any layer is compressed."""
    return {layer.window for layer in report.compressed if layer.window is not None}


def compressed(stock: Sequence[Cache], report: Report, max_kv_size: int | None = None) -> list[Any]:
    """The caches with compressed ones instead of those that the report names."""
    layers = {layer.path: layer for layer in report.layers}
    windows = compressed_windows(report)
    unbounded = [layer.path for layer in report.layers if layer.recipe is None and layer.cache == "KVCache"]
    if max_kv_size is not None and unbounded:
        raise ValueError(
            f"[make_prompt_cache] max_kv_size: expected None, as the layers {', '.join(unbounded)} are not compressed "
            f"({report.policy.name}) and keep every token, got {max_kv_size}; tqext.detach(model) gives mlx-lm's bounded cache"
        )

    latent = [layer.path for layer in report.compressed if layer.is_latent]
    if max_kv_size is not None and latent:
        raise ValueError(
            f"[make_prompt_cache] max_kv_size: expected None, as the layers {', '.join(latent)} keep all latents, "
            f"got {max_kv_size}; tqext.detach(model) gives mlx-lm's bounded cache"
        )

    def new(path: str, cache: Cache) -> Cache:
        made = compressed_cache(layers[path], windows, max_kv_size)
        return cache if made is None else made

    return replaced(stock, new)


def compressed_cache(layer: Layer, windows: Collection[int], max_kv_size: int | None = None) -> TurboQuantKVCache | None:
    """An empty cache in place of a layer's own, None if it keeps its own.

    Args:
        layer: What the probe and the guard say.
        windows: The sliding windows of which any layer is compressed. All layers of one share a mask, whose columns are
            those of one kind of cache. So a layer among them that is not compressed gets a cache whose tokens all stay exact.
        max_kv_size: See `tqext.make_prompt_cache`.
    """
    balance = None if layer.calibration is None or layer.recipe is None else layer.calibration.balance
    if layer.window is not None and layer.window in windows and layer.n_kv_heads:
        recipe = layer.recipe or Recipe(first=0, tail=layer.window, balance=False)
        return TurboQuantWindowKVCache(layer.window, recipe, balance=balance, shared=layer.shared)
    if layer.recipe is None:
        return None
    if layer.is_latent:
        return TurboQuantLatentCache(layer.recipe, shared=layer.shared)
    return TurboQuantKVCache(layer.recipe, balance=balance, shared=layer.shared, max_size=max_kv_size)


def layer_range(model: Model, n_caches: int) -> tuple[int, int]:
    """The index of the first cache's layer in the whole model, and the whole model's layers (pipelines hold a part)."""
    inner: Any = getattr(model, "model", model)
    total = getattr(getattr(model, "args", None), "num_hidden_layers", None)
    if getattr(inner, "pipeline_size", 1) == 1 or not isinstance(total, int):
        return 0, n_caches
    return int(inner.start_idx), total


def check_model(op: str, model: object) -> None:
    """Raise a ValueError for a name, a path, None, or what ``load`` returns as a whole."""
    if not callable(model):
        raise ValueError(f"[{op}] model: expected a model, got {kind(model)}")


def kind(model: object) -> str:
    """What a message says of something that is no model."""
    if isinstance(model, str):
        return f"{model!r}: model, tokenizer = tqext.load({model!r}) loads it"
    return "a tuple: model, tokenizer = tqext.load(...)" if isinstance(model, tuple) else type(model).__name__

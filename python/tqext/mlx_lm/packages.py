"""What differs between the packages whose models get compressed caches: mlx-lm, and mlx-vlm for models that see."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TypeGuard

import mlx.core as mx
import mlx.nn as nn

from tqext.protocols import Cache, CacheGroup, Model

# A model as users have it: type checkers other than mypy see no layers and no call in what mlx-lm's loaders return.
AnyModel = Model | nn.Module

_CACHE_MODULES = ("mlx_lm.models.cache", "mlx_vlm.models.cache")


def of_mlx_vlm(model: object) -> bool:
    """Whether a model's class, or the class that `attach` has made a subclass of, is mlx-vlm's."""
    return any(cls.__module__.partition(".")[0] == "mlx_vlm" for cls in type(model).__mro__)


def text_model(model: AnyModel) -> Model:
    """The part of a model that keeps caches: of mlx-vlm's its ``language_model``, of mlx-lm's the model itself."""
    return getattr(model, "language_model", model) if of_mlx_vlm(model) else model


def is_stock(cache: object, name: str) -> bool:
    """Whether a cache is of this very class, mlx-lm's or mlx-vlm's (not of a subclass)."""
    return type(cache).__name__ == name and type(cache).__module__ in _CACHE_MODULES


def is_group(cache: object) -> TypeGuard[CacheGroup]:
    """Whether a layer's cache holds several."""
    return is_stock(cache, "CacheList")


def logits(model: Model, tokens: mx.array, cache: Sequence[Cache]) -> mx.array:
    """What a model says to tokens of text that follow those in the cache.

    Args:
        model: A model of mlx-lm, or a `text_model` of mlx-vlm.
        tokens: int ``[B, n_tokens]``.
        cache: One cache for every layer.

    Returns:
        ``[B, n_tokens, vocabulary]``.
    """
    with _positions_of_text(model):
        out = model(tokens, cache=cache)
    return getattr(out, "logits", out)


@contextlib.contextmanager
def _positions_of_text(model: Model) -> Iterator[None]:
    """Let the tokens' places be those of the cache.

    mlx-vlm's models with positions in three dimensions keep those of the last prompt, images included, and use them again.
    """
    if not (of_mlx_vlm(model) and hasattr(model, "_rope_deltas") and hasattr(model, "_position_ids")):
        yield
        return
    kept = model._position_ids, model._rope_deltas
    try:
        model._position_ids, model._rope_deltas = None, mx.zeros((1, 1), mx.int32)
        yield
    finally:
        model._position_ids, model._rope_deltas = kept

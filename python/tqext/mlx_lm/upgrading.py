"""Prompt caches that exist already, compressed."""

from __future__ import annotations

import warnings
from typing import Any

import mlx.core as mx

from tqext.kv.cache import TurboQuantKVCache
from tqext.kv.tokens import Exact
from tqext.kv.window import TurboQuantWindowKVCache
from tqext.mlx_lm import hooks
from tqext.mlx_lm.caches import compressed_cache, compressed_windows, layer_range, members, policy_for, replaced
from tqext.mlx_lm.guard import judged
from tqext.mlx_lm.packages import AnyModel, text_model
from tqext.mlx_lm.probing import why_not, window_of
from tqext.presets import Policy
from tqext.protocols import Cache

UPGRADE_CHUNK = 2048


def upgrade(
    cache: list[Any], preset: str | Policy | None = None, *, model: AnyModel | None = None, **overrides: Any
) -> list[Any]:
    """Compress a prompt cache, also in the middle of a generation.

    Args:
        cache: What ``mlx_lm.models.cache.make_prompt_cache`` made; changed in place.
        preset: See `install`. None: what `model` is attached or installed with, else ``tq3``.
        model: The cache's model, for its calibration, and to leave the layers alone that it cannot attend to when compressed.
            Without it every plain ``KVCache`` is compressed, without a balance and a guard, and such a model stops with an
            error; sliding windows only with ``windows=True``.

    Returns:
        The same list.

    Warns:
        UserWarning: Nothing was compressed, nor was it before; the message says why.
    """
    policy = policy_for(model, preset, overrides)
    if not isinstance(cache, list):
        raise ValueError(f"[upgrade] cache: expected a list of caches, got {type(cache).__name__}")
    hooks.hook()
    model = None if model is None else text_model(model)
    report = None if model is None else judged(model, policy)
    layers = {} if report is None else {layer.path: layer for layer in report.layers}
    windows = set() if report is None else compressed_windows(report)
    first, n_layers = (0, len(cache)) if model is None else layer_range(model, len(cache))
    reasons: dict[tuple[str, str], list[str]] = {}

    def new(path: str, member: Cache) -> Cache:
        layer = layers.get(path)
        recipe = policy.of_layer(first + int(path.split(".")[0]), n_layers) if layer is None else layer.recipe
        if isinstance(member, TurboQuantKVCache):
            reason = "" if member.recipe == recipe else "it is compressed with another recipe"
        elif layer is None:
            window = window_of(member) if policy.windows else None
            reason = why_not(member, recipe, windows=window is not None)
            if not reason:
                return _filled(TurboQuantWindowKVCache(window, recipe) if window else TurboQuantKVCache(recipe), member)
        else:
            made = compressed_cache(layer, windows) if window_of(member) == layer.window else None
            if made is not None:
                return _filled(made, member)
            reason = layer.reason
        reasons.setdefault((type(member).__name__, reason), []).append(path)
        return member

    before = [id(member) for _, member in members(cache)]
    for i, member in enumerate(cache):
        cache[i] = replaced([member], lambda path, c, i=i: new(f"{i}{path[1:]}", c))[0]  # type: ignore[misc]
    if before == [id(member) for _, member in members(cache)] and all(reason for _, reason in reasons):
        why = "; ".join(f"layers {', '.join(paths)}: {kind} stays: {reason}" for (kind, reason), paths in reasons.items())
        warnings.warn(f"[upgrade] cache: expected layers to compress, got none ({why or 'an empty list'})", stacklevel=2)
    return cache


def _filled(out: TurboQuantKVCache, member: Any) -> TurboQuantKVCache:
    """An empty cache with the tokens of mlx-lm's own."""
    tokens, end = Exact(member.keys, member.values), member.offset
    if isinstance(out, TurboQuantWindowKVCache) and end:
        tokens = Exact(*(member._temporal_order(x) for x in tokens))
        n_held = min(tokens.n_tokens, out.window)
        tokens = tokens.cut(tokens.n_tokens - n_held, tokens.n_tokens)
        out.n_dropped, end = end - n_held, n_held
    for begin in range(0, end, UPGRADE_CHUNK):
        out.update_and_fetch(*tokens.cut(begin, min(end, begin + UPGRADE_CHUNK)))
        mx.eval(out.state)
    return out

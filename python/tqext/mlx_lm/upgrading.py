"""Prompt caches that exist already, compressed."""

from __future__ import annotations

import warnings
from typing import Any

import mlx.core as mx

from tqext.kv import TurboQuantKVCache, TurboQuantLatentCache
from tqext.kv.tokens import Exact
from tqext.mlx_lm import hooks
from tqext.mlx_lm.caches import layer_range, members, replaced
from tqext.mlx_lm.guard import judged
from tqext.mlx_lm.packages import text_model
from tqext.mlx_lm.probing import why_not
from tqext.presets import DEFAULT_PRESET, Policy, get_policy

UPGRADE_CHUNK = 2048


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
    hooks.hook()
    model = text_model(model)
    layers = {} if model is None else {layer.path: layer for layer in judged(model, policy).layers}
    first, n_layers = (0, len(cache)) if model is None else layer_range(model, len(cache))
    reasons: dict[tuple[str, str], list[str]] = {}

    def new(path: str, member: Any) -> Any:
        layer = layers.get(path)
        recipe = policy.of_layer(first + int(path.split(".")[0]), n_layers) if layer is None else layer.recipe
        if isinstance(member, TurboQuantKVCache):
            reason = "" if member.recipe == recipe else "it is compressed with another recipe"
        elif not (reason := layer.reason if layer is not None else why_not(member, recipe)):
            assert recipe is not None
            if layer is not None and layer.is_latent:
                return _encoded(member, TurboQuantLatentCache(recipe, shared=layer.shared))
            calibration = None if layer is None else layer.calibration
            balance = None if calibration is None else calibration.balance
            return _encoded(member, TurboQuantKVCache(recipe, balance=balance))
        reasons.setdefault((type(member).__name__, reason), []).append(path)
        return member

    before = [id(member) for _, member in members(cache)]
    for i, member in enumerate(cache):
        cache[i] = replaced([member], lambda path, c, i=i: new(f"{i}{path[1:]}", c))[0]  # type: ignore[misc]
    if before == [id(member) for _, member in members(cache)] and all(reason for _, reason in reasons):
        why = "; ".join(f"layers {', '.join(paths)}: {kind} stays: {reason}" for (kind, reason), paths in reasons.items())
        warnings.warn(f"[upgrade] cache: expected layers to compress, got none ({why or 'an empty list'})", stacklevel=2)
    return cache


def _encoded(member: Any, out: TurboQuantKVCache) -> TurboQuantKVCache:
    for begin in range(0, member.offset, UPGRADE_CHUNK):
        end = min(member.offset, begin + UPGRADE_CHUNK)
        tokens = Exact(member.keys, member.values).cut(begin, end)
        out.update_and_fetch(*tokens)
        mx.eval(out.state)
    return out

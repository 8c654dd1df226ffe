"""The proof that attention reads the codes of every compressed layer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from tqext._ext import format as packed_format
from tqext.mlx_lm.caches import compressed, members, policy_for, stock_cache
from tqext.mlx_lm.guard import judged
from tqext.mlx_lm.packages import AnyModel, logits, text_model
from tqext.mlx_lm.reports import Report
from tqext.presets import Policy, Recipe
from tqext.protocols import Cache, Model

# Least coded tokens of the path proof's prompt.
VERIFY_CODED = 96


class PathError(AssertionError):
    """A compressed layer is not what the model's logits come from."""


def verify(model: AnyModel, preset: str | Policy | None = None, *, n_tokens: int | None = None, **overrides: Any) -> Report:
    """Prove that every compressed layer's codes are accurate (`calibrate`) and are what attention reads.

    A random prompt is stored. Then, for one layer at a time, its packed bytes are overwritten and the logits of
    the next token must change; and bytes that no token owns are overwritten and the logits must not change.

    Args:
        model: Any mlx-lm model.
        preset: See `install`. None: what the model is attached or installed with, else ``tq3``.
        n_tokens: Length of the prompt; some of it must come out of the exact tail. Default: enough for every layer's recipe.

    Returns:
        The probe's report.

    Raises:
        PathError: A layer fails; the message names it.
    """
    model = text_model(model)
    policy = policy_for(model, preset, overrides)
    report = judged(model, policy, always=True)
    for layer in report.compressed:
        if layer.calibration is not None and not layer.calibration.accurate:
            raise PathError(f"[verify] layer {layer.path}: not accurate: {layer.calibration}")
    if n_tokens is None:
        n_tokens = max((_n_to_verify(layer.recipe) for layer in report.compressed if layer.recipe), default=1)
    cache = compressed(stock_cache(model), report)
    # A fixed linear congruence: a proof should not depend on a random state, nor change one. No model has so few tokens.
    prompt = mx.array([[(7919 * i + 13) % 61 + 1 for i in range(n_tokens)]])
    logits(model, prompt, cache)
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


def _at(cache: Sequence[Cache], path: str) -> Any:
    return dict(members(cache))[path]


def _next_logits(model: Model, cache: Sequence[Cache], corrupt: Sequence[str] = (), attended: bool = True) -> mx.array:
    trial = copy.deepcopy(cache)
    for path in corrupt:
        _at(trial, path).overwrite(attended=attended)
    found = logits(model, mx.array([[1]]), trial)[0, -1]
    mx.eval(found)
    return found

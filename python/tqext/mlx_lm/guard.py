"""The calibration of a model's layers, and the guard that steps inaccurate ones up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tqext.calibration import Calibration, ObservingCache, calibrate_layers, ladder
from tqext.mlx_lm.caches import replaced, stock_cache
from tqext.mlx_lm.packages import AnyModel, text_model
from tqext.mlx_lm.probing import probe
from tqext.mlx_lm.reports import Layer, Report
from tqext.presets import Policy
from tqext.protocols import Cache, Model


def calibrate(model: AnyModel, preset: str | Policy | None = None, **overrides: Any) -> Calibration:
    """The balance and the errors of every layer that a policy compresses, from a fixed prompt of 512 tokens.

    What the prompt shows at its own place is turned to other positions of the context that the model was trained for. The
    result is kept in the cache folder under a fingerprint of the weights and of the model's arguments. An attached model is
    calibrated when it makes its first cache; after its weights have changed, attach it again.

    Args:
        model: Any mlx-lm model.
        preset: See `install`. None: what the model is attached or installed with, else ``tq3``.
        **overrides: See `tqext.presets.get_policy`.

    Raises:
        RuntimeError: The model cannot be run on the prompt.
    """
    return _calibrate(text_model(model), probe(model, preset, **overrides).compressed)


def _calibrate(model: Model, layers: Sequence[Layer]) -> Calibration:
    wanted = {layer.path: layer.recipe for layer in layers if layer.recipe is not None}
    latent = {layer.path for layer in layers if layer.is_latent}

    def make_cache(new: Callable[[bool], ObservingCache]) -> tuple[list[Cache], dict[str, ObservingCache]]:
        made: dict[str, ObservingCache] = {}

        def replace_wanted(path: str, cache: Cache) -> Cache:
            if path in wanted:
                made[path] = cache = new(path in latent)
            return cache

        return replaced(stock_cache(model), replace_wanted), made

    return calibrate_layers(model, make_cache, wanted)


def judged(model: AnyModel, policy: Policy, *, always: bool = False) -> Report:
    """What the probe finds, calibrated, with the layers stepped up that the guard finds inaccurate.

    Args:
        model: Any mlx-lm model.
        policy: What to look for.
        always: Calibrate also without a balance and a guard.
    """
    model = text_model(model)
    probed = probe(model, policy)
    need = [x for x in probed.compressed if always or policy.guard or (x.recipe is not None and x.recipe.balance)]
    calibration = _calibrate(model, need)
    return Report(policy, tuple(_guarded(layer, calibration, policy.guard) for layer in probed.layers))


def _guarded(layer: Layer, calibration: Calibration, guard: bool) -> Layer:
    if layer.recipe is None or (layer.path, layer.recipe) not in calibration.layers:
        return layer
    first = calibration.layers[layer.path, layer.recipe]
    what = "latents" if layer.is_latent else "keys"
    for recipe in ladder(layer.recipe):
        found = calibration.layers[layer.path, recipe]
        if found.accurate or not guard:
            note = (
                ""
                if found is first
                else f"stepped up to {recipe.key_bits}-bit {what}: with {layer.recipe.key_bits} bits {first}"
            )
            return replace(layer, recipe=recipe, calibration=found, note=note)
    assert not found.accurate
    bits = recipe.key_bits
    reason = f"compression is not accurate here: with {bits}-bit {what} {found}"
    return replace(layer, recipe=None, reason=reason)

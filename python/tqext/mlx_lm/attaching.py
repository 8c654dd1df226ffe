"""Compressed caches from mlx-lm itself: for one model, or for all of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar, cast

from mlx import nn

from tqext.mlx_lm import caches, first_use, hooks
from tqext.mlx_lm.caches import (
    KEY,
    Attached,
    Attachment,
    check_model,
    compressed,
    kind,
    layers_of,
    policy_for,
    stock_cache,
    stock_make_cache,
)
from tqext.mlx_lm.guard import judged
from tqext.mlx_lm.packages import AnyModel, text_model
from tqext.mlx_lm.reports import Report
from tqext.presets import DEFAULT_PRESET, Policy, get_policy
from tqext.protocols import Model

_observers: list[Callable[[Report, list[Any]], None]] = []
_attached: list[weakref.ref[nn.Module]] = []
# A model of any class: it is given back.
M = TypeVar("M", bound=AnyModel)
_LOAD_STEP = "kv"


def install(preset: str | Policy = DEFAULT_PRESET, **overrides: Any) -> Policy:
    """Compress the caches that mlx-lm makes from now on, also those of models that are loaded already.

    Models given to `attach` or `detach` keep what was asked for there.

    Args:
        preset: A name of `tqext.presets.PRESETS`, or a policy.
        **overrides: See `tqext.presets.get_policy`.

    Returns:
        The policy in effect.
    """
    policy = get_policy(preset, **overrides)
    with hooks.lock:
        hooks.hook()
        hooks.add_load_step(_LOAD_STEP, _load_attached)
        hooks.vlm_load_model.put()
        caches.installed = policy
        for model in _attached_models():
            if vars(model)[KEY].installed:
                _attach(model, Attachment(policy, installed=True))
    return policy


def _load_attached(load: hooks.Function, *args: Any, **kwargs: Any) -> Any:
    loaded = load(*args, **kwargs)
    _attach_installed(loaded[0])
    return loaded


def _attach_installed(model: AnyModel) -> None:
    with hooks.lock:
        if caches.installed is not None:
            _attach(model, Attachment(caches.installed, installed=True))


def _load_vlm_model(previous: hooks.Function, *args: Any, **kwargs: Any) -> Any:
    """mlx-vlm's ``load_model``; what it loads besides may also be a model without a text model, such as an encoder."""
    model = previous(*args, **kwargs)
    text = text_model(model)
    if isinstance(text, nn.Module) and hasattr(text, "layers"):
        _attach_installed(text)
    return model


hooks.load_vlm_models_with(_load_vlm_model)


def uninstall() -> None:
    """Take `install`, `attach`, `on_cache` and all hooks back; loading of 1-bit checkpoints stays.

    Compressed caches that exist already cannot be attended to without the hooks.

    Raises:
        RuntimeError: Another extension has wrapped a hook since; take that one back first. Nothing was changed.
    """
    with hooks.lock:
        hooks.check()
        hooks.vlm_load_model.check()
        hooks.remove_load_step(_LOAD_STEP)
        hooks.vlm_load_model.take_back()
        hooks.take_back()
        for model in _attached_models():
            _detach(model)
        _observers.clear()
        caches.installed = None


def attach(model: M, preset: str | Policy = DEFAULT_PRESET, **overrides: Any) -> M:
    """Let a loaded model make compressed caches; returns the model.

    Which layers can be compressed is found out (`probe`) when the first cache is made; Metal compiles their kernels then.
    The model's class becomes a subclass of its own, with another ``make_cache``; copies of the model are attached as well.
    """
    policy = get_policy(preset, **overrides)
    with hooks.lock:
        hooks.hook()
        _attach(text_model(model), Attachment(policy))
    return model


class _CompressedCaches(Attached):
    """Makes an attached model's caches."""

    __slots__ = ()

    def make_cache(self) -> list[Any]:
        """A compressed cache for every layer that allows it."""
        return self._tqext_cache(None)

    def _tqext_cache(self, max_kv_size: int | None) -> list[Any]:
        hooks.hook()
        report = self._tqext_report()
        cache = compressed(stock_cache(self), report, max_kv_size)
        for observer in list(_observers):
            observer(report, cache)
        return cache

    def _tqext_report(self) -> Report:
        attachment: Attachment = vars(self)[KEY]
        with hooks.lock:
            if attachment.report is None:
                attachment.report = judged(cast(Model, self), attachment.policy)
                first_use.prepare(attachment.report)
        return attachment.report


def _attach(model: AnyModel, attachment: Attachment) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"[attach] model: expected a model of mlx.nn, got {kind(model)}")
    names = vars(model)
    attachment.own = names.get("make_cache")
    if isinstance(model, _CompressedCaches):
        attachment.own = attachment.own or names[KEY].own
        names[KEY] = attachment
    else:
        names[KEY] = attachment
        cls = type(model)
        like = {"__slots__": (), "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        object.__setattr__(model, "__class__", type(cls.__name__, (_CompressedCaches, cls), like))
        _attached[:] = [known for known in _attached if known() is not None]
        _attached.append(weakref.ref(model))
    names.pop("make_cache", None)


def _make_prompt_cache(previous: hooks.Function, model: AnyModel, max_kv_size: int | None = None) -> Any:
    """mlx-lm's or mlx-vlm's own ``make_prompt_cache``, where `install` finds the models that were loaded before it."""
    if caches.installed is not None:
        with hooks.lock:
            if caches.installed is not None and isinstance(model, nn.Module) and KEY not in vars(model):
                _attach(model, Attachment(caches.installed, installed=True))
    if max_kv_size is not None and isinstance(model, _CompressedCaches):
        if model._tqext_report().compressed:
            return model._tqext_cache(max_kv_size)
        if stock_make_cache(model) is None:
            return previous(layers_of(model), max_kv_size)
    return previous(model, max_kv_size)


hooks.make_prompt_caches_with(_make_prompt_cache)


def _attached_models() -> list[nn.Module]:
    return [model for known in _attached if (model := known()) is not None]


def _detach(model: nn.Module) -> None:
    attachment = vars(model).pop(KEY, None)
    if isinstance(model, _CompressedCaches):
        object.__setattr__(model, "__class__", type(model).__bases__[1])
        if attachment.own is not None:
            vars(model).setdefault("make_cache", attachment.own)
    _attached[:] = [known for known in _attached if known() is not model]


def on_cache(observer: Callable[[Report, list[Any]], None]) -> None:
    """Call ``observer(report, cache)`` for every cache that an attached model makes, until `uninstall`."""
    _observers.append(observer)


def detach(model: M) -> M:
    """Undo `attach`, and let `install` pass the model by; returns the model."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"[detach] model: expected a model of mlx.nn, got {kind(model)}")
    with hooks.lock:
        text = cast(nn.Module, text_model(model))
        _detach(text)
        vars(text)[KEY] = None
    return model


def make_prompt_cache(
    model: AnyModel, preset: str | Policy | None = None, *, max_kv_size: int | None = None, **overrides: Any
) -> list[Any]:
    """A prompt cache for ``mlx_lm.generate(..., prompt_cache=)``, compressed where the model allows it.

    Args:
        model: Any mlx-lm model.
        preset: See `install`. None: what the model is attached or installed with, else ``tq3``.
        max_kv_size: Tokens that each compressed layer keeps at most: the first ones, and of the others the last ones
            (`TurboQuantKVCache`'s ``max_size``). None: all.
        **overrides: See `tqext.presets.get_policy`.

    Raises:
        ValueError: A bound that leaves no room for codes, or one for a model in which other layers keep all tokens.
    """
    check_model("make_prompt_cache", model)
    model = text_model(model)
    hooks.hook()
    report = judged(model, policy_for(model, preset, overrides))
    first_use.prepare(report)
    return compressed(stock_cache(model), report, max_kv_size)


def report(model: AnyModel) -> Report:
    """What an attached model's caches are like: compressed or not, and why, with the errors that the calibration found.

    Raises:
        ValueError: The model is not attached.
    """
    model = text_model(model)
    if not isinstance(model, _CompressedCaches):
        raise ValueError(f"[report] model: expected an attached model, got {type(model).__name__}")
    return model._tqext_report()

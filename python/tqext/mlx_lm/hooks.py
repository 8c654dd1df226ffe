"""Functions of MLX and mlx-lm that are replaced, and given back: the one owner of every such replacement."""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.models.cache as mlx_lm_cache
import mlx_lm.utils

from tqext.kv import (
    BatchTurboQuantKVCache,
    BatchTurboQuantLatentCache,
    BatchTurboQuantWindowKVCache,
    TurboQuantKVCache,
    TurboQuantLatentCache,
    TurboQuantWindowKVCache,
)
from tqext.kv.latent import Projectable, ProjectedLatents, first_use
from tqext.kv.snapshot import AttendsItself
from tqext.mlx_lm.packages import AnyModel
from tqext.protocols import Cache

# Of another package, with whatever arguments it takes; or what is called with one and these arguments.
Function = Callable[..., Any]

lock = threading.RLock()


class Hook:
    """A function of another package, with a wrapper in its place.

    Args:
        owner: The module or the class that holds the function, or the module's name if it is of a package that need not be
            there: the function is replaced once somebody imports it.
        name: The function's name there.
        call: ``call(previous, *args, **kwargs)``, which is run instead.
        everywhere: Also replace the function in the modules that imported it by name.
    """

    def __init__(self, owner: Any, name: str, call: Function, *, everywhere: bool = False) -> None:
        self._owner = owner
        self.name = name
        self.call = call
        self.everywhere = everywhere
        self.previous: Function | None = None
        self._wrapper: Function | None = None

    def put(self) -> None:
        """Replace the function, unless it is replaced already."""
        with lock:
            if self.previous is not None:
                return
            if self.owner is None:
                _imports.wait_for(self._owner, self)
                return
            previous, call = getattr(self.owner, self.name), self.call

            # A partial, not a function: every call of MLX's attention goes through it.
            wrapper: Any = functools.update_wrapper(functools.partial(call, previous), previous)
            if isinstance(self.owner, type):  # a partial is no method
                wrapper = _method(call, previous)

            self.previous, self._wrapper = previous, wrapper
            self._replace(previous, wrapper)

    @property
    def owner(self) -> Any:
        """The module; None if it has a name and is not imported."""
        return sys.modules.get(self._owner) if isinstance(self._owner, str) else self._owner

    def check(self) -> None:
        """Raise a RuntimeError if the function cannot be given back, because somebody else has replaced ours."""
        if self.previous is not None and getattr(self.owner, self.name) is not self._wrapper:
            where = f"{self.owner.__name__}.{self.name}"
            raise RuntimeError(f"[uninstall] {where} was replaced again after tqext's hook: take that one back first")

    def take_back(self) -> None:
        """Give the function back; nothing happens if it is not replaced."""
        with lock:
            self.check()
            _imports.forget(self)
            if self.previous is not None:
                self._replace(self._wrapper, self.previous)
                self.previous = self._wrapper = None

    def unhooked(self) -> Function:
        """The function as it is without this hook."""
        with lock:
            return self.previous or getattr(self.owner or importlib.import_module(self._owner), self.name)

    def _replace(self, old: object, new: object) -> None:
        for module in self._modules(old):
            setattr(module, self.name, new)

    def _modules(self, function: object) -> Iterator[object]:
        yield self.owner
        for module in list(sys.modules.values()) if self.everywhere else []:
            names = getattr(module, "__dict__", None)
            if module is not self.owner and isinstance(names, dict) and names.get(self.name) is function:
                yield module


def _method(call: Function, previous: Function) -> Function:
    @functools.wraps(previous)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return call(previous, self, *args, **kwargs)

    return wrapper


class _Imports(importlib.abc.MetaPathFinder):
    """Puts hooks into modules right after they were imported. It finds no module itself."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[Hook]] = {}

    def wait_for(self, module: str, hook: Hook) -> None:
        hooks = self._waiting.setdefault(module, [])
        if hook not in hooks:
            hooks.append(hook)
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def forget(self, hook: Hook) -> None:
        for module in [module for module, hooks in self._waiting.items() if hook in hooks]:
            self._waiting[module].remove(hook)
            if not self._waiting[module]:
                del self._waiting[module]
        if not self._waiting and self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._waiting:
            return None
        others = (finder for finder in list(sys.meta_path) if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            # Of this very loader, which belongs to this very module.
            vars(spec.loader)["exec_module"] = functools.partial(self._run, spec.loader.exec_module)
        return spec

    def _run(self, execute: Callable[[types.ModuleType], None], module: types.ModuleType) -> None:
        execute(module)
        with lock:
            for hook in self._waiting.pop(module.__name__, []):
                hook.put()
            if not self._waiting and self in sys.meta_path:
                sys.meta_path.remove(self)


_imports = _Imports()


# By name: ``step(load, path, *args, **kwargs)`` runs ``load(path, *args, **kwargs)``, which is mlx-lm's load_model or the step
# before, and returns what it does.
LoadStep = Function
_load_steps: dict[str, LoadStep] = {}


def _load_model(previous: Function, model_path: Any, *args: Any, **kwargs: Any) -> Any:
    load = previous
    for step in list(_load_steps.values()):
        load = functools.partial(step, load)
    return load(Path(model_path), *args, **kwargs)


_load_model_hook = Hook(mlx_lm.utils, "load_model", _load_model, everywhere=True)


def add_load_step(name: str, step: LoadStep) -> None:
    """Let ``mlx_lm.utils.load_model`` take another step, or replace the one of this name."""
    with lock:
        _load_steps[name] = step
        _load_model_hook.put()


def check_load_step(name: str) -> None:
    """Raise a RuntimeError if the step cannot be taken back."""
    if set(_load_steps) == {name}:
        _load_model_hook.check()


def remove_load_step(name: str) -> None:
    """Take a step back, and with the last one the hook. The other steps stay."""
    with lock:
        check_load_step(name)
        _load_steps.pop(name, None)
        if not _load_steps:
            _load_model_hook.take_back()


class CacheClasses:
    """Cache classes in ``mlx_lm.models.cache``, where load_prompt_cache looks them up by name.

    A file gets names that say what to do: without tqext, mlx-lm's load_prompt_cache ends in a KeyError that is the name and
    nothing else.
    """

    def __init__(self, *classes: type) -> None:
        self.classes = classes
        self._as_saved = {cls: _as_saved(cls) for cls in classes}
        self._hook = Hook(mlx_lm_cache, "save_prompt_cache", self._save, everywhere=True)

    def put(self) -> None:
        for name, cls in self._names():
            setattr(mlx_lm_cache, name, cls)
        self._hook.put()

    def check(self) -> None:
        """Raise a RuntimeError if the function that saves cannot be given back."""
        self._hook.check()

    def take_back(self) -> None:
        self._hook.take_back()
        for name, cls in self._names():
            if getattr(mlx_lm_cache, name, None) is cls:
                delattr(mlx_lm_cache, name)

    def _names(self) -> Iterator[tuple[str, type]]:
        for cls in self.classes:
            yield cls.__name__, cls  # what was saved without the hook
            yield self._as_saved[cls].__name__, cls

    def _save(self, previous: Function, file_name: str, cache: Sequence[Cache], *args: Any, **kwargs: Any) -> Any:
        return previous(file_name, [self._named(c) for c in cache], *args, **kwargs)

    def _named(self, cache: Cache) -> Cache:
        if type(cache) in self._as_saved:
            return self._as_saved[type(cache)](cache)
        if isinstance(cache, mlx_lm_cache.CacheList):
            return mlx_lm_cache.CacheList(*(self._named(c) for c in cache.caches))
        return cache


def _as_saved(cls: type) -> type:
    """A class of stand-ins for caches, which mlx-lm asks for the state and for the name of the class."""

    class StandIn:
        def __init__(self, cache: Cache) -> None:
            self._cache = cache

        def __getattr__(self, name: str) -> Any:
            return getattr(self._cache, name)

    StandIn.__name__ = f"{cls.__name__} of tqext: call tqext.install() before load_prompt_cache"
    return StandIn


# Attention to compressed caches, and mlx-lm's making of caches


def _attention(previous: Function, q: mx.array, k: Any, v: Any, *args: Any, **options: Any) -> Any:
    if isinstance(k, AttendsItself):
        return k.attention(previous, q, v, *args, **options)
    return previous(q, k, v, *args, **options)


def _multi_linear(previous: Function, layer: Any, x: Any, transpose: bool = True) -> Any:
    """``MultiLinear`` of mlx-lm, with which models make the keys and values of all heads of latents."""
    if isinstance(x, Projectable):
        return ProjectedLatents(x, functools.partial(previous, layer), transpose)
    return previous(layer, x, transpose)


def _take_along_axis(previous: Function, x: Any, *args: Any, **kwargs: Any) -> Any:
    """MLX's function, with which models with sparse attention take some of their latents."""
    if isinstance(x, Projectable):
        return _gathered(x, *args, **kwargs)
    return previous(x, *args, **kwargs)


def _concatenate(previous: Function, arrays: Any, *args: Any, **kwargs: Any) -> Any:
    """MLX's function, with which mistral4 joins rotary keys to the keys of a prompt."""
    if isinstance(arrays, list) and arrays and isinstance(arrays[0], ProjectedLatents):
        if len(arrays) != 2 or (args, kwargs) not in (((-1,), {}), ((), {"axis": -1}), ((3,), {}), ((), {"axis": 3})):
            raise TypeError("concatenate: expected keys made of latents and their rotary keys along the last axis")
        return arrays[0].joined(arrays[1])
    return previous(arrays, *args, **kwargs)


def _gathered(x: Projectable, indices: Any, axis: int | None = None, **options: Any) -> Any:
    if axis not in (2, -2) or options:
        raise TypeError(f"take_along_axis of latents: expected axis 2, got {axis}")
    return x.gathered(indices)


def _multi_linear_hooks() -> list[Hook]:
    """None where mlx-lm has no such layers: its models then make keys and values of latents themselves."""
    try:
        mla = importlib.import_module("mlx_lm.models.mla")
    except ImportError:
        return []
    return [Hook(getattr(mla, name), "__call__", _multi_linear) for name in ("MultiLinear", "QuantizedMultiLinear")]


_make: Function | None = None


def make_prompt_caches_with(make: Function) -> None:
    """Let ``make(previous, model, max_kv_size)`` do what mlx-lm's ``make_prompt_cache`` does, while it is hooked."""
    global _make
    _make = make


def _make_prompt_cache(previous: Function, model: AnyModel, max_kv_size: int | None = None) -> Any:
    return previous(model, max_kv_size) if _make is None else _make(previous, model, max_kv_size)


_load_vlm: Function | None = None


def load_vlm_models_with(load: Function) -> None:
    """Let ``load(previous, path, ...)`` do what mlx-vlm's ``load_model`` does, while `vlm_load_model` is put."""
    global _load_vlm
    _load_vlm = load


def _load_vlm_model(previous: Function, *args: Any, **kwargs: Any) -> Any:
    return previous(*args, **kwargs) if _load_vlm is None else _load_vlm(previous, *args, **kwargs)


def _trim_prompt_cache(previous: Function, cache: list[Any], num_tokens: int) -> Any:
    """mlx-lm's own forgets nothing, and says nothing, where a window has moved on: a wrong draft would stay."""
    windows = [c for c in cache if isinstance(c, TurboQuantWindowKVCache)]
    if num_tokens and any(not c.is_trimmable() for c in windows) and all(c.is_trimmable() for c in cache if c not in windows):
        if not all(c.can_trim(num_tokens) for c in windows):
            raise ValueError(
                f"[trim_prompt_cache] num_tokens: expected tokens whose sliding window is still held, got {num_tokens}; "
                "windows=False leaves windows to mlx-lm's cache"
            )
        return next(iter([c.trim(num_tokens) for c in cache]))
    return previous(cache, num_tokens)


def _all_sum(previous: Callable[..., Any], x: Any, *, group: Any = None, stream: Any = None) -> Any:
    is_cpu = isinstance(stream, mx.DeviceType) and stream == mx.cpu
    return previous(x, group=group, stream=None if is_cpu else stream)


def _sharded_load(previous: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """mlx-lm waits for the other ranks with a sum on the CPU, which MLX's NCCL refuses.

    Without a device each backend takes its own: the CPU, but for NCCL.
    """
    hook = Hook(mx.distributed, "all_sum", _all_sum)
    hook.put()
    try:
        return previous(*args, **kwargs)
    finally:
        hook.take_back()


attention = Hook(mx.fast, "scaled_dot_product_attention", _attention)
sharded_load = Hook(mlx_lm.utils, "sharded_load", _sharded_load, everywhere=True)
make_prompt_cache = Hook(mlx_lm_cache, "make_prompt_cache", _make_prompt_cache, everywhere=True)
take_along_axis = Hook(mx, "take_along_axis", _take_along_axis)
concatenate = Hook(mx, "concatenate", _concatenate)
trim_prompt_cache = Hook(mlx_lm_cache, "trim_prompt_cache", _trim_prompt_cache, everywhere=True)
cache_classes = CacheClasses(
    TurboQuantKVCache,
    BatchTurboQuantKVCache,
    TurboQuantLatentCache,
    BatchTurboQuantLatentCache,
    TurboQuantWindowKVCache,
    BatchTurboQuantWindowKVCache,
)
# mlx-vlm has its own caches and its own loader.
vlm_make_prompt_cache = Hook("mlx_vlm.models.cache", "make_prompt_cache", _make_prompt_cache, everywhere=True)
vlm_load_model = Hook("mlx_vlm.utils", "load_model", _load_vlm_model, everywhere=True)
_parts: tuple[Any, ...] = (
    attention,
    make_prompt_cache,
    vlm_make_prompt_cache,
    trim_prompt_cache,
    sharded_load,
    cache_classes,
)
# Calls of theirs take 0.8 us longer, whoever makes them: they are replaced once there are latents.
_latent_parts = (take_along_axis, concatenate, *_multi_linear_hooks())


def _hook_latents() -> None:
    for part in _latent_parts:
        part.put()


def hook() -> None:
    """Route ``mx.fast.scaled_dot_product_attention`` over a snapshot to the snapshot; all other calls go on as before.

    Also make ``make_prompt_cache`` of mlx-lm and of mlx-vlm see `install` and refuse what compressed caches cannot do, and
    ``sharded_load`` of mlx-lm work over NCCL.
    """
    with lock:
        for part in _parts:
            part.put()
        first_use.then(_hook_latents)


def check() -> None:
    """Raise a RuntimeError if `hook` cannot be taken back."""
    for part in (*_parts, *_latent_parts):
        part.check()


def take_back() -> None:
    """Take `hook` back."""
    first_use.then(None)
    for part in (*_parts, *_latent_parts):
        part.take_back()

"""Checkpoints with 1-bit weights in mlx-lm: MLX's affine ones, native scale-only ones, and writing one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
from mlx.nn import Module

from tqext._ext import format as _format
from tqext.mlx_lm import hooks
from tqext.one_bit import nn
from tqext.protocols import SavedTokenizer

# A config.json.
Config = dict[str, Any]
# The key of config.json that marks a native checkpoint. mlx-lm without tqext stops at the unknown *.scales.
CONFIG_KEY = "tqext_weights"
_FORMAT = {"format": "q1_0", "group_size": nn.GROUP_SIZE, "version": 1}
FLOATS = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

_LOAD_STEP = "1-bit"


def hook() -> None:
    """Let ``mlx_lm.utils.load_model`` load 1-bit and ternary checkpoints into `tqext.nn` layers; others load as before."""
    hooks.add_load_step(_LOAD_STEP, _load_model)


def unhook() -> None:
    """Take `hook` back.

    Raises:
        RuntimeError: Another extension has wrapped ``load_model`` since; take that one back first.
    """
    hooks.remove_load_step(_LOAD_STEP)


def _load_model(previous: Callable[..., Any], path: Path, *args: Any, **kwargs: Any) -> Any:
    config = mlx_lm.utils.load_config(path)
    native = config.get(CONFIG_KEY)
    refuse_hadamard(config)
    if native is not None:
        check_native(native)
        kwargs = {**kwargs, "get_model_classes": _native_classes(kwargs.get("get_model_classes"))}
        return previous(path, *args, **kwargs)
    loaded = previous(path, *args, **kwargs)
    swap = nn.from_quantized(loaded[0], strict=False)
    if swap.kept:
        print(f"tqext: {swap}", file=sys.stderr)
    return loaded


def check_native(native: object) -> None:
    """Raise a ValueError unless `native`, the config's entry, is a format this version reads."""
    if native != _FORMAT:
        raise ValueError(f"[load] config.{CONFIG_KEY}: expected {_FORMAT}, got {native}; a newer tqext may read it")


def refuse_hadamard(config: Config) -> None:
    """Raise a ValueError for 1-bit weights that are stored in a rotated space, which is not undone here."""
    quantization = config.get("quantization") or {}
    one_bit = CONFIG_KEY in config or quantization.get("bits") == 1
    if one_bit and "hadamard" in json.dumps(config).lower():
        raise ValueError(
            "[load] config: expected plain 1-bit weights, got Hadamard-folded ones ('Bonsai 2'); their inputs must be rotated "
            "before every product, which this version does not do, and without it the model would answer nonsense"
        )


def _native_classes(given: Callable[..., Any] | None) -> Callable[..., Any]:
    """mlx-lm's choice of classes, with a model that takes 1-bit layers when it is given their weights."""
    choose = given or mlx_lm.utils._get_classes

    def classes(config: Config) -> tuple[type, type]:
        model_class, args_class = choose(config=config)
        name = config.get("torch_dtype") or config.get("dtype") or "float16"
        if name not in FLOATS:
            raise ValueError(f"[load] config.torch_dtype: expected one of {sorted(FLOATS)}, got {name!r}")

        class OneBitModel(model_class):  # type: ignore[misc, valid-type]
            def load_weights(self, weights: Any, strict: bool = True) -> Any:
                check_tensors(dict(weights))
                nn.insert_empty(self, one_bit_paths(dict(weights)), FLOATS[name])
                return super().load_weights(weights, strict=strict)

        OneBitModel.__name__ = model_class.__name__
        return OneBitModel, args_class

    return classes


def one_bit_paths(weights: dict[str, mx.array]) -> set[str]:
    """Layers that have scales."""
    return {name.removesuffix(".scales") for name in weights if name.endswith(".scales")}


def check_tensors(weights: dict[str, mx.array]) -> None:
    """Raise a ValueError unless every scale tensor has its words beside it."""
    for path in sorted(one_bit_paths(weights)):
        scales, words = weights[f"{path}.scales"], weights.get(f"{path}.weight")
        if words is None or words.dtype != mx.uint32 or words.ndim != 2:
            got = "none" if words is None else f"{words.dtype} {words.shape}"
            raise ValueError(f"[load] {path}.weight: expected uint32 [rows, cols / 32], got {got}")
        shape = (words.shape[0], words.shape[1] * 32 / _format.Q1_GROUP)
        if scales.dtype != mx.float16 or scales.shape != shape:
            raise ValueError(f"[load] {path}.scales: expected float16 {shape}, got {scales.dtype} {scales.shape}")
        if f"{path}.biases" in weights:
            raise ValueError(f"[load] {path}.biases: expected none in a native checkpoint, got a tensor")


def save(folder: str | Path, model: Module, config: Config, tokenizer: SavedTokenizer | None = None) -> None:
    """Write a native checkpoint: an mlx-lm folder with sign words and float16 scales, 1.125 bits per weight.

    Args:
        folder: Made if it does not exist.
        model: A model with `tqext.nn` layers; other layers are written as they are.
        config: The model's config.json as a dictionary.
        tokenizer: With ``save_pretrained``, or None.

    Raises:
        ValueError: The model has no 1-bit layer, or layers that are quantised otherwise.
    """
    folder = Path(folder)
    if not nn.q1_paths(model):
        raise ValueError("[save] model: expected 1-bit layers, got none")
    if ternary := nn.ternary_paths(model):
        raise ValueError(f"[save] model: expected no ternary layers beside 1-bit ones, got {ternary[0]}")
    mlx_lm.utils.save_model(folder, model)
    write_config(folder, config)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


def write_config(folder: Path, config: Config) -> None:
    """config.json of a native checkpoint."""
    plain = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
    (folder / "config.json").write_text(json.dumps({**plain, CONFIG_KEY: _FORMAT}, indent=2))

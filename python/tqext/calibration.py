"""What compression does to a model's own attention: the balance of each layer, and the error that is left.

RoPE attention depends on distances alone, so a short prompt that is told to start elsewhere shows the queries and keys of that
place. The prompt is fixed: the balance is a property of the model and not of a text.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from tqext._ext import block_means
from tqext._ext import format as packed_format
from tqext.cache import create_mask
from tqext.ops import dequantize, quantize_keys, quantize_values
from tqext.presets import Recipe

# Raised when the prompt, the offsets or what is derived from them changes: earlier results are then made again.
VERSION = 2
N_TOKENS = 512
# Places in the trained context. Observed at position 0 alone, the balance of Qwen2.5 is worse than none at 31k.
N_OFFSETS = 6
# Positions that are looked at when a model does not say how far it was trained.
DEFAULT_CONTEXT = 32768
# Further than any RoPE table of a model that is not scaled.
MAX_CONTEXT = 131072
# What models' arguments call it.
CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "n_ctx")
# Queries whose scores and outputs are compared, the last of the prompt.
N_QUERIES = 32
BALANCE_RANGE = 64.0

# A layer above one of these is stepped up. 2-bit values alone have an output error of 0.31 where one token gets all attention.
# Qwen2.5-Coder 0.5B and 1.5B stay below both with tq3, tq33 and tq4.
MAX_OUTPUT_ERROR = 0.4
MAX_SCORE_ERROR = 1.5


@dataclass(frozen=True, slots=True)
class LayerCalibration:
    """What was observed at one layer.

    Attributes:
        balance: float32 ``[n_kv_heads, head_dim]``, see docs/format.md; None for a recipe without it.
        output_error: Root mean square error of the attention output relative to the length of the values that are attended to,
            over coded tokens alone. (The output itself may be a small difference of large values.)
        score_error: Root mean square error of the scores in nats, their mean over the tokens left out: softmax cannot see it.
    """

    balance: mx.array | None = field(compare=False, repr=False)
    output_error: float
    score_error: float

    @property
    def accurate(self) -> bool:
        """Whether both errors are within the guard's bounds (NaN is not)."""
        return self.output_error <= MAX_OUTPUT_ERROR and self.score_error <= MAX_SCORE_ERROR

    def __str__(self) -> str:
        return f"output error {self.output_error:.3f}, score error {self.score_error:.2f} nats"


@dataclass(frozen=True, slots=True)
class Calibration:
    """The layers of a model under the recipes that were asked for.

    Attributes:
        layers: By path and recipe; a layer has further steps of its `ladder` only where the ones before are not accurate.
        seconds: What it took; 0 if it was read from disk.
    """

    layers: Mapping[tuple[str, Recipe], LayerCalibration]
    seconds: float = 0.0


def ladder(recipe: Recipe) -> tuple[Recipe, ...]:
    """The recipe, and what the guard tries before it leaves a layer uncompressed."""
    return (recipe,) if recipe.key_bits == 4 else (recipe, replace(recipe, key_bits=4))


def offsets(model: Any) -> tuple[int, ...]:
    """Positions at which the prompt is fed, spread over the context that the model was trained for."""
    context = min(trained_context(model), MAX_CONTEXT)
    last = max(0, context - N_TOKENS)
    return tuple(sorted({round(last * i / (N_OFFSETS - 1)) for i in range(N_OFFSETS)}))


def trained_context(model: Any) -> int:
    """Positions that the model knows, from its arguments; `DEFAULT_CONTEXT` where they do not say.

    A table of positions ends there: the least number counts.
    """
    args = getattr(model, "args", None)
    found = []
    for holder in (args, getattr(args, "text_config", None)):
        names = holder if isinstance(holder, dict) else vars(holder) if hasattr(holder, "__dict__") else {}
        found += [n for name in CONTEXT_NAMES if isinstance(n := names.get(name), int) and n > 0]
    return min(found, default=DEFAULT_CONTEXT)


def prompt(context: int = DEFAULT_CONTEXT) -> mx.array:
    """int ``[1, N_TOKENS]``, whole blocks as far as the context goes and two at least: one that stays exact, one that is coded.

    A fixed linear congruence over 61 tokens, which every vocabulary has.
    """
    block = packed_format.BLOCK
    n = max(2 * block, min(N_TOKENS, context) // block * block)
    return mx.array([[(7919 * i * (i + 3) + 13 * i) % 61 + 1 for i in range(n)]])


class ObservingCache:
    """Stands in for a layer's cache for one call of the model, which it tells another position than the first.

    What attention asks for is computed exactly, and queries, keys and values are kept.
    """

    def __init__(self, shift: int) -> None:
        self.shift = shift
        self.n_tokens = 0
        self.seen: ObservedTokens | None = None

    @property
    def offset(self) -> int:
        return self.shift + self.n_tokens

    def size(self) -> int:
        return self.n_tokens

    def empty(self) -> bool:
        return self.n_tokens == 0

    def is_trimmable(self) -> bool:
        return False

    @property
    def keys(self) -> mx.array | None:
        """The keys: pipeline-parallel models hang the next stage's dependency on them."""
        return None if self.seen is None else self.seen.keys

    @keys.setter
    def keys(self, value: mx.array) -> None:
        assert self.seen is not None
        self.seen.keys = value

    @property
    def state(self) -> list[mx.array]:
        return []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[ObservedTokens, ObservedTokens]:
        self.n_tokens += keys.shape[2]
        self.seen = ObservedTokens(keys, values)
        return self.seen, self.seen

    def keys_and_values(self) -> tuple[ObservedTokens, ObservedTokens]:
        assert self.seen is not None
        return self.seen, self.seen

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        return create_mask(N, self.n_tokens, return_array, window_size)


class ObservedTokens:
    """Keys and values on their way to attention, which is computed exactly while the queries are noted."""

    def __init__(self, keys: mx.array, values: mx.array) -> None:
        self.keys = keys
        self.values = values
        self.queries: list[mx.array] = []
        self.scale = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.keys.shape)

    @property
    def dtype(self) -> mx.Dtype:
        return self.keys.dtype

    @property
    def ndim(self) -> int:
        return 4

    def astype(self, dtype: mx.Dtype) -> ObservedTokens:
        """Itself: attention takes the model's own type."""
        return self

    def attend(self, previous: Any, queries: mx.array, **options: Any) -> mx.array:
        self.queries.append(queries)
        self.scale = float(options["scale"])
        return previous(queries, self.keys, self.values, **options)


# Statistics of one layer


@dataclass(frozen=True, slots=True)
class _Observation:
    """One layer at one offset, without the first block: first tokens are exact in every recipe that is not for study.

    Attributes:
        query_square: fp32 ``[n_kv_heads, D]``: mean over tokens and the group's query heads.
        key_square: fp32 ``[n_kv_heads, D]``: of the keys less their block's mean.
        queries: The last `N_QUERIES` ``[1, n_q_heads, N_QUERIES, D]``. ``keys``, ``values``: whole blocks.
    """

    query_square: mx.array
    key_square: mx.array
    queries: mx.array
    keys: mx.array
    values: mx.array
    scale: float


def _observation(seen: ObservedTokens, means: bool) -> _Observation:
    block = packed_format.BLOCK
    k, v = seen.keys[:1, :, block:], seen.values[:1, :, block:]
    n_kv_heads, n_tokens, dim = k.shape[1:]
    squares = []
    for queries in seen.queries:  # of all layers that attend to these tokens
        q = queries[:1, :, block:].astype(mx.float32)
        squares.append((q * q).reshape(n_kv_heads, -1, dim).mean(axis=1))
    x = k.astype(mx.float32)
    if means:
        x = x - mx.repeat(block_means(k).astype(mx.float32), block, axis=2)[:, :, :n_tokens]
    return _Observation(
        query_square=mx.stack(squares).mean(axis=0),
        key_square=(x * x).mean(axis=(0, 2)),
        queries=seen.queries[0][:1, :, -N_QUERIES:],
        keys=mx.contiguous(k),
        values=mx.contiguous(v),
        scale=seen.scale,
    )


def balance_of(query_square: mx.array, key_square: mx.array) -> mx.array:
    """``(E[q^2] / E[x^2])^(1/4)`` per channel, median 1 in each head, within 1/64 to 64.

    A channel that is always zero, of queries or of keys, gets the nearest bound: its product is zero whatever it is.
    """
    q, x = (np.array(y, np.float64) for y in (query_square, key_square))
    tiny = np.finfo(np.float64).tiny
    factor = (np.maximum(q, tiny) / np.maximum(x, tiny)) ** 0.25
    factor[(q <= 0) & (x <= 0)] = np.nan
    with np.errstate(all="ignore"):
        median = np.nanmedian(factor, axis=-1, keepdims=True)
    factor = np.where(np.isfinite(factor) & np.isfinite(median) & (median > 0), factor / median, 1.0)
    return mx.array(np.clip(factor, 1 / BALANCE_RANGE, BALANCE_RANGE).astype(np.float32))


def _errors(o: _Observation, recipe: Recipe, balance: mx.array | None) -> tuple[mx.array, mx.array]:
    """(output, score) error of one observation; all tokens are coded and every query sees all of them."""
    k, v = o.keys, o.values
    means = block_means(k) if recipe.means else None
    packed_k = quantize_keys(k, bits=recipe.key_bits, means=means, balance=balance, qjl=recipe.qjl, rotation=recipe.rotation)
    packed_v = quantize_values(v, bits=recipe.value_bits, coding=recipe.value_coding, rotation=recipe.rotation)
    n_kv_heads = k.shape[1]
    q = o.queries.astype(mx.float32)
    q = q.reshape(1, n_kv_heads, -1, q.shape[-1]) * o.scale

    def attend(keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        scores = q @ keys.swapaxes(-1, -2)
        return scores, mx.softmax(scores, axis=-1) @ values

    v32 = v.astype(mx.float32)
    scores, exact = attend(k.astype(mx.float32), v32)
    attended = mx.softmax(scores, axis=-1) @ (v32 * v32).sum(axis=-1, keepdims=True)
    coded_scores, coded = attend(dequantize(packed_k), dequantize(packed_v))
    difference = coded_scores - scores
    difference = difference - difference.mean(axis=-1, keepdims=True)
    output = mx.sqrt(((coded - exact) ** 2).sum() / mx.maximum(attended.sum(), 1e-30))
    return output, mx.sqrt((difference**2).mean())


def _calibrated(observations: Sequence[_Observation], recipe: Recipe) -> LayerCalibration:
    balance = None
    if recipe.balance:
        balance = balance_of(
            mx.stack([o.query_square for o in observations]).mean(axis=0),
            mx.stack([o.key_square for o in observations]).mean(axis=0),
        )
    errors = mx.stack([mx.stack(list(_errors(o, recipe, balance))) for o in observations])
    # The worst place decides; NaN stays NaN.
    output, score = np.array(errors, np.float64).max(axis=0).tolist()
    return LayerCalibration(balance, output, score)


def observe(
    model: Any, make_cache: Any, recipes: Mapping[str, Recipe], at: Sequence[int]
) -> dict[tuple[str, Recipe], LayerCalibration]:
    """Run the prompt at each offset and calibrate the layers of `recipes` (by path), each with its `ladder`.

    Args:
        model: An mlx-lm model.
        make_cache: ``make_cache(new)`` makes the model's cache with ``new()`` for each layer of `recipes`, and returns it with
            these by path.
        recipes: The layers' recipes by path.
        at: Offsets.
    """
    observations: dict[str, list[_Observation]] = {path: [] for path in recipes}
    tokens = prompt(trained_context(model))
    for shift in at:
        cache, observing = make_cache(lambda shift=shift: ObservingCache(shift))
        out = model(tokens, cache=cache)
        step = {path: _observation(observing[path].seen, recipe.means) for path, recipe in recipes.items()}
        arrays = [x for o in step.values() for x in (o.query_square, o.key_square, o.queries, o.keys, o.values)]
        # Ranks wait for each other in the last layer, too; one number stands for all logits.
        mx.eval(arrays, out[:, -1:, :1] if _world_size() > 1 else [])
        for path, observation in step.items():
            observations[path].append(observation)
    layers = {}
    for path, recipe in recipes.items():
        for rung in ladder(recipe):
            layers[path, rung] = _calibrated(observations[path], rung)
            if layers[path, rung].accurate:
                break
    return layers


# Kept results


def fingerprint(model: Any) -> str:
    """A hash of the model's parameters: names, shapes, types, and 32 numbers of each."""
    digest = hashlib.sha256()
    samples = []
    for name, x in sorted(dict(tree_flatten(model.parameters())).items()):
        digest.update(f"{name} {x.shape} {x.dtype};".encode())
        flat = x.reshape(-1)
        sample = flat[:: max(1, flat.size // 32)][:32] if flat.size else flat
        samples.append(sample.astype(mx.float32) if sample.dtype == mx.bfloat16 else sample)
    mx.eval(samples)
    for sample in samples:
        digest.update(np.array(sample).tobytes())
    return digest.hexdigest()


def _key(model: Any, recipes: Mapping[str, Recipe], at: Sequence[int]) -> str:
    codings = {path: _coding(recipe) for path, recipe in sorted(recipes.items())}
    text = json.dumps([VERSION, packed_format.VERSION, fingerprint(model), codings, list(at), N_TOKENS])
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def _coding(recipe: Recipe) -> list[Any]:
    """What of a recipe decides its errors: not how many tokens stay exact."""
    return [getattr(recipe, name) for name in ("key_bits", "value_bits", "value_coding", "qjl", "rotation", "means", "balance")]


def _read(path: Path, recipes: Mapping[str, Recipe]) -> dict[tuple[str, Recipe], LayerCalibration] | None:
    """What was kept, None if there is none or it is damaged: it can be made again."""
    try:
        loaded: Any = mx.load(str(path), return_metadata=True)
        arrays, metadata = loaded
        errors = json.loads(metadata["errors"])
        layers = {}
        for layer, recipe in recipes.items():
            for i, step in enumerate(ladder(recipe)):
                name = f"{layer}/{i}"
                output, score = (float(x) for x in errors[name])
                balance = arrays.get(name)
                if (balance is not None) != step.balance:
                    return None
                if balance is not None and (balance.dtype != mx.float32 or balance.ndim != 2 or not mx.all(balance > 0).item()):
                    return None
                layers[layer, step] = LayerCalibration(balance, output, score)
                if layers[layer, step].accurate:
                    break
        return layers
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, layers: Mapping[tuple[str, Recipe], LayerCalibration], recipes: Mapping[str, Recipe]) -> None:
    arrays, errors = {}, {}
    for layer, recipe in recipes.items():
        for i, step in enumerate(ladder(recipe)):
            if (layer, step) not in layers:
                break
            found = layers[layer, step]
            errors[f"{layer}/{i}"] = [found.output_error, found.score_error]
            if found.balance is not None:
                arrays[f"{layer}/{i}"] = found.balance
    if not arrays:
        arrays["none"] = mx.zeros(1)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=".safetensors", dir=path.parent)
    os.close(handle)
    try:
        mx.save_safetensors(name, arrays, metadata={"errors": json.dumps(errors)})
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _world_size() -> int:
    return int(mx.distributed.init().size()) if mx.distributed.is_available() else 1


def _all_ranks(flag: bool) -> bool:
    """Whether it holds on every rank: all of them run the model, or none."""
    if _world_size() == 1:
        return flag
    return bool((mx.distributed.all_sum(mx.array(int(flag)), stream=mx.cpu) == _world_size()).item())


def calibrate_layers(model: Any, make_cache: Any, recipes: Mapping[str, Recipe]) -> Calibration:
    """The calibration of these layers: read from disk where it was kept, else made, kept and announced."""
    from tqext.models import cache_dir

    # A rank without layers to calibrate still takes part in the others' runs of the model.
    if not recipes and _world_size() == 1:
        return Calibration({})
    at = offsets(model)
    path = cache_dir() / "calibration" / f"{_key(model, recipes, at)}.safetensors"
    kept = _read(path, recipes) if recipes else {}
    if _all_ranks(kept is not None) and kept is not None:
        return Calibration(kept)
    begin = time.perf_counter()
    layers = observe(model, make_cache, recipes, at)
    seconds = time.perf_counter() - begin
    if not recipes:
        return Calibration({})
    try:
        _write(path, layers, recipes)
        where = "kept for the next time"
    except OSError as error:
        where = f"not kept: {error}"
    print(f"tqext: calibrated {len(recipes)} layers at {len(at)} positions in {seconds:.1f} s ({where})", file=sys.stderr)
    return Calibration(layers, seconds)


# Command


def main(argv: Sequence[str] | None = None) -> None:
    """``tqext calibrate``: what compression does to each layer's attention, and what the guard makes of it."""
    import argparse

    from tqext.cli import add_kv_options, policy_of
    from tqext.mlx_lm import attach, report
    from tqext.models import load

    parser = argparse.ArgumentParser(prog="tqext calibrate", description=main.__doc__)
    parser.add_argument("--model", required=True, help="a folder, a GGUF file, a hub id, or smollm2")
    add_kv_options(parser)
    options = parser.parse_args(argv)
    policy = policy_of(options)
    if policy is None:
        parser.error("--kv none: expected a preset to calibrate for")
    model, _ = load(options.model)
    print(report(attach(model, policy)).table())

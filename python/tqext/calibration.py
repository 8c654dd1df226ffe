"""What compression does to a model's own attention: the balance of each layer, and the error that is left.

The prompt is fixed, because the balance is a property of the model and not of a text. Its place is not: the angles between
queries and keys depend on distances alone, but which channels are large depends on where in the context a token is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_reduce

from tqext import blas
from tqext._ext import block_means
from tqext._ext import format as packed_format
from tqext.disk import cache_dir
from tqext.fp16_range import fits_fp16
from tqext.kv.latent import Projectable, ProjectedLatents
from tqext.kv.snapshot import AttendsItself, create_mask
from tqext.mlx_lm import hooks
from tqext.mlx_lm.packages import AnyModel, logits
from tqext.ops import dequantize, quantize_keys, quantize_values
from tqext.presets import Recipe
from tqext.protocols import Cache, Model
from tqext.ranks import Ranks

# Raised when the prompt, the positions or what is derived from them changes: earlier results are then made again.
VERSION = 4
N_TOKENS = 512
# First tokens that are left out: their keys and values are unlike all others', and recipes for use keep them exact.
N_LEFT_OUT = packed_format.BLOCK
# Positions in the trained context, denser at its start. Observed at position 0 alone, the balance of Qwen2.5-Coder-0.5B is
# 6 % worse in the squared error of the scores at position 31k than at 16 places; 64 are no better than 16.
N_OFFSETS = 16
# Runs, each at another position, of a model whose queries and keys cannot be turned from one position to another.
N_RUNS = 5
# Positions that are looked at when a model does not say how far it was trained.
DEFAULT_CONTEXT = 32768
# Queries whose scores and outputs are compared, the last of the prompt.
N_QUERIES = 32
BALANCE_RANGE = 64.0
# A model of so many bytes takes long enough to say what is going on.
LARGE = 1 << 28

# A layer above one of these is stepped up. 2-bit values alone have an output error of 0.31 where one token gets all attention.
MAX_OUTPUT_ERROR = 0.4
MAX_SCORE_ERROR = 1.5


@dataclass(frozen=True, slots=True)
class LayerCalibration:
    """What was observed at one layer, at the worst of three positions in the context.

    Attributes:
        balance: float32 ``[n_kv_heads, head_dim]``, see docs/format.md; None for a recipe without it.
        output_error: Root mean square error of the attention output relative to the length of the values that are attended to,
            over coded tokens alone. (The output itself may be a small difference of large values.) Infinite where the values
            are beyond what the format's fp16 numbers hold.
        score_error: Root mean square error of the scores in nats, their mean over the tokens left out: softmax cannot see it.
            Infinite where the keys are beyond what the format's fp16 numbers hold.
    """

    balance: mx.array | None = field(compare=False, repr=False)
    output_error: float
    score_error: float

    @property
    def accurate(self) -> bool:
        """Whether both errors are within the guard's bounds (NaN is not)."""
        return self.output_error <= MAX_OUTPUT_ERROR and self.score_error <= MAX_SCORE_ERROR

    def __str__(self) -> str:
        beyond = [name for name, x in (("values", self.output_error), ("keys", self.score_error)) if not math.isfinite(x)]
        why = f" ({' and '.join(beyond)} beyond the range of fp16)" if beyond else ""
        return f"output error {self.output_error:.3f}, score error {self.score_error:.2f} nats{why}"


@dataclass(frozen=True, slots=True)
class Calibration:
    """The layers of a model under the recipes that were asked for.

    Attributes:
        layers: By path and recipe; a layer has further steps of its `ladder` only where the ones before are not accurate.
        seconds: What it took; 0 if it was kept from before.
    """

    layers: Mapping[tuple[str, Recipe], LayerCalibration]
    seconds: float = 0.0

    def table(self) -> str:
        """One line for every layer and recipe; an asterisk marks what the guard does not accept."""
        head = f"{'layer':>5}  {'recipe':<11}  {'output error':>12}  {'scores (nats)':>13}  balance"
        lines = [head]
        for (path, recipe), c in self.layers.items():
            balance = "" if c.balance is None else f"{c.balance.min().item():.2f} to {c.balance.max().item():.2f}"
            figures = f"{c.output_error:>12.3f}  {c.score_error:>13.2f}"
            lines.append(f"{path:>5}  {recipe.label:<11}  {figures}  {balance}{'' if c.accurate else ' *'}".rstrip())
        return "\n".join(lines)


def ladder(recipe: Recipe) -> tuple[Recipe, ...]:
    """The recipe, and what the guard tries before it leaves a layer uncompressed."""
    return (recipe,) if recipe.key_bits == 4 else (recipe, replace(recipe, key_bits=4))


# The prompt and its places


def _arguments(model: AnyModel) -> Any:
    """What the model was made with; some of mlx-vlm's call it ``config``."""
    return getattr(model, "args", None) or getattr(model, "config", None)


def _setting(model: AnyModel, *names: str) -> Any:
    """The first of these names that the model's arguments have, or those of its text model."""
    args = _arguments(model)
    text = args.get("text_config") if isinstance(args, dict) else getattr(args, "text_config", None)
    for name in names:
        for holder in (args, text):
            value = holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)
            if value is not None:
                return value
    return None


_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")


def known_context(model: AnyModel) -> int | None:
    """As `trained_context`, but None where the model's arguments do not say."""
    trained = _setting(model, *_CONTEXT_NAMES)
    return trained_context(model) if isinstance(trained, int) and trained > 0 else None


def trained_context(model: AnyModel) -> int:
    """Tokens that the model was trained for, RoPE scaling included; `DEFAULT_CONTEXT` where its arguments do not say."""
    trained = _setting(model, *_CONTEXT_NAMES)
    context = trained if isinstance(trained, int) and trained > 0 else DEFAULT_CONTEXT
    scaling = _setting(model, "rope_scaling", "rope_parameters")
    if isinstance(scaling, dict):
        factor, original = scaling.get("factor"), scaling.get("original_max_position_embeddings")
        if isinstance(factor, (int, float)) and isinstance(original, int):
            context = max(context, int(factor * original))
    return context


def offsets(model: Model, n: int = N_OFFSETS) -> list[int]:
    """Where the prompt begins: n places in the trained context, the first and the last among them."""
    last = max(0, trained_context(model) - N_TOKENS)
    return sorted({round(last * (i / (n - 1)) ** 2) for i in range(n)})


def prompt(model: Model) -> mx.array:
    """int ``[1, N_TOKENS]``: a linear congruence, its cube spread over the vocabulary.

    Tokenizers number common tokens first. Over 61 tokens, and over all alike, the balance of Qwen2.5-Coder-0.5B has 11 and 3 %
    more squared error of the scores on other texts; one taken from another text has 2 % less.
    """
    n_vocabulary = _setting(model, "vocab_size")
    n_vocabulary = n_vocabulary if isinstance(n_vocabulary, int) and n_vocabulary > 0 else 64
    x, tokens = 1, []
    for _ in range(N_TOKENS):
        x = (1103515245 * x + 12345) % 2**31
        tokens.append(x**3 * n_vocabulary >> 93)
    return mx.array([tokens])


# From one position to another

_local = threading.local()


class _RopeCall(NamedTuple):
    """A call of ``mx.fast.rope``."""

    out: Any
    rope: hooks.Function
    args: tuple[Any, ...]
    options: dict[str, Any]


def rope(previous: hooks.Function, x: Any, *args: Any, **options: Any) -> Any:
    """``mx.fast.rope``, noted while a calibration runs in this thread."""
    out = previous(x, *args, **options)
    calls = getattr(_local, "rope_calls", None)
    if calls is not None:
        calls.append(_RopeCall(out, previous, args, options))
    return out


@contextlib.contextmanager
def _noted_rope_calls() -> Iterator[None]:
    """A layer's own calls are among the last few: keys may wait for other layers' queries, but those come first."""
    hook = hooks.Hook(mx.fast, "rope", rope)
    hook.put()
    _local.rope_calls = deque(maxlen=8)
    try:
        yield
    finally:
        _local.rope_calls = None
        with contextlib.suppress(RuntimeError):  # somebody wrapped it meanwhile; without a list it does nothing
            hook.take_back()


class Turn:
    """What turns queries or keys to other positions, as the ``mx.fast.rope`` that made them would have.

    Every channel has a partner in its rotary pair: ``x' = x * cos + x[partner] * sin``, with signs in ``sin``.

    Attributes:
        partner: int ``[D]``.
        cos: fp32 ``[n_positions, D]``. ``sin``: likewise.
    """

    def __init__(self, call: _RopeCall, dim: int, at: Sequence[int]) -> None:
        dims = int(call.args[0] if call.args else call.options["dims"])
        channel = np.arange(dim)
        if call.options["traditional"]:
            first, partner = channel % 2 == 0, channel ^ 1
        else:
            first, partner = channel < dims // 2, (channel + dims // 2) % dims
        rotated = channel < dims
        self.partner = mx.array(np.where(rotated, partner, channel))
        # The rotation of the pairs' first and second members: [2 * n_positions, 1, 1, D].
        members = mx.array(np.stack([first & rotated, ~first & rotated]).astype(np.float32))
        x = mx.repeat(members, len(at), axis=0)[:, None, None]
        options = {**call.options, "offset": mx.array([*at, *at])}
        of_first, of_second = mx.split(call.rope(x, *call.args, **options).reshape(2, len(at), dim), 2)
        is_first, is_rotated = mx.array(first), mx.array(rotated)
        self.cos = mx.where(is_rotated, mx.where(is_first, of_first[0], of_second[0]), 1.0)
        self.sin = mx.where(is_rotated, mx.where(is_first, of_second[0], of_first[0]), 0.0)

    def __call__(self, x: mx.array, i: int) -> mx.array:
        """fp32 ``x [..., D]`` at the i-th position."""
        x = x.astype(mx.float32)
        return x * self.cos[i] + x[..., self.partner] * self.sin[i]

    def mean_square(self, x: mx.array) -> mx.array:
        """Mean of squares ``[n, D]`` of ``x [n, rows, D]`` over rows and positions."""
        other = x[..., self.partner]
        own, others, both = ((a * b).mean(axis=1) for a, b in ((x, x), (other, other), (x, other)))
        c, s, cs = ((a * b).mean(axis=0) for a, b in ((self.cos, self.cos), (self.sin, self.sin), (self.cos, self.sin)))
        return own * c + others * s + 2 * both * cs


def _turn_of(x: mx.array, turns: _Turns) -> Turn | None:
    """How `x` is turned to other positions, None if it did not come right out of ``mx.fast.rope``."""
    call = next((call for call in getattr(_local, "rope_calls", None) or () if call.out is x), None)
    return None if call is None else turns.of(call, x.shape[-1])


class _Turns:
    """The turns of a model: its layers share one or two."""

    def __init__(self, at: Sequence[int]) -> None:
        self.at = at
        self.known: dict[Any, tuple[Any, Turn]] = {}

    def of(self, call: _RopeCall, dim: int) -> Turn:
        freqs = call.options.get("freqs")
        numbers = tuple(sorted((k, v) for k, v in call.options.items() if k not in ("offset", "freqs", "stream")))
        key = (dim, call.args, numbers, id(freqs))
        if key not in self.known:
            self.known[key] = (freqs, Turn(call, dim, self.at))  # the array is kept: its id would be given to another
        return self.known[key][1]


# Observation


class ObservingCache:
    """Stands in for a layer's cache for one call of the model, which it tells another position than the first.

    What attention asks for is computed exactly, and queries, keys and values are kept.
    """

    def __init__(self, shift: int, turns: _Turns) -> None:
        self.shift = shift
        self.turns = turns
        self.seen: ObservedTokens | None = None

    @property
    def offset(self) -> int:
        return self.shift + self.size()

    def size(self) -> int:
        return 0 if self.seen is None else int(self.seen.keys.shape[2])

    def empty(self) -> bool:
        return self.seen is None

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
        if self.seen is not None:
            raise ValueError("[calibrate] model: expected one call of the cache for one of the model, got another")
        self.seen = ObservedTokens(keys, values, _turn_of(keys, self.turns), self.turns)
        return self.seen, self.seen

    def keys_and_values(self) -> tuple[ObservedTokens, ObservedTokens]:
        assert self.seen is not None
        return self.seen, self.seen

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        return create_mask(N, self.size(), return_array, window_size)


class ObservingLatentCache(ObservingCache):
    """The same for a layer of latents."""

    seen: Any

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        if self.seen is not None:
            raise ValueError("[calibrate] model: expected one call of the cache for one of the model, got another")
        self.seen = ObservedLatents(keys)
        return self.seen, values

    def keys_and_values(self) -> Any:
        raise ValueError("[calibrate] model: expected latents that one layer reads, got layers that share them")


class ObservedLatents(Projectable):
    """Latents on their way to attention, which is computed exactly while the queries are noted.

    The rotary part of the scores, which is exact, depends on distances alone, and the latents do not turn: what is seen at one
    position holds at all.
    """

    def __init__(self, keys: mx.array) -> None:
        self.keys = keys
        self.queries: list[tuple[mx.array, mx.array]] = []  # of the last tokens: queries times the scale, and the mask

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.keys.shape)

    @property
    def dtype(self) -> mx.Dtype:
        return self.keys.dtype

    def attend_projected(
        self,
        previous: Callable[..., mx.array],
        queries: mx.array,
        keys: ProjectedLatents,
        values: ProjectedLatents,
        *,
        scale: float,
        mask: mx.array | str | None = None,
        **options: Any,
    ) -> mx.array:
        queries, mask = keys.split(queries, scale, mask)
        last = keys.absorbed(queries[:1, :, -N_QUERIES:])[0].astype(mx.float32)
        n_keys = self.keys.shape[2]
        bias = mx.zeros((1, n_keys))
        if isinstance(mask, mx.array) and mask.dtype != mx.bool_:
            bias = mx.broadcast_to(mask, (*queries.shape[:3], n_keys))[0, :, -N_QUERIES:].reshape(-1, n_keys).astype(mx.float32)
        self.queries.append((last.reshape(1, -1, last.shape[-1]) * scale, bias[:, N_LEFT_OUT:]))
        return previous(queries, keys.of(self.keys), values.of(self.keys), scale=scale, mask=mask, **options)


class ObservedTokens(AttendsItself):
    """Keys and values on their way to attention, which is computed exactly while the queries are noted."""

    def __init__(self, keys: mx.array, values: mx.array, turn: Turn | None, turns: _Turns) -> None:
        self.keys = keys
        self.values = values
        self.turn = turn
        self.turns = turns
        self.queries: list[_Queries] = []

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.keys.shape)

    @property
    def dtype(self) -> mx.Dtype:
        return self.keys.dtype

    def attention(self, previous: Callable[..., mx.array], queries: mx.array, values: object, **options: Any) -> mx.array:
        if values is not self:
            raise TypeError("[scaled_dot_product_attention] v: expected the values of the keys' cache")
        n_kv_heads = self.keys.shape[1]
        turn = None if self.turn is None else _turn_of(queries, self.turns)
        rows = queries[0, :, N_LEFT_OUT:].astype(mx.float32).reshape(n_kv_heads, -1, queries.shape[-1])
        last = queries[0, :, -N_QUERIES:].astype(mx.float32).reshape(n_kv_heads, -1, queries.shape[-1])
        square = (rows * rows).mean(axis=1) if turn is None else turn.mean_square(rows)
        self.queries.append(_Queries(square, last * options["scale"], turn))
        if blas.is_faster():
            return blas.attention(queries, self.keys, self.values, **options)
        return previous(queries, self.keys, self.values, **options)


class _Queries(NamedTuple):
    """The queries of one layer, in the groups of their KV heads.

    Attributes:
        square: fp32 ``[n_kv_heads, D]``: their mean square.
        last: fp32 ``[n_kv_heads, n_repeats * N_QUERIES, D]``, times the scale of the scores.
        turn: To other positions, None if that takes another run.
    """

    square: mx.array
    last: mx.array
    turn: Turn | None


class _View(NamedTuple):
    """At one position: keys and values ``[1, n_kv_heads, n_tokens, D]``, and `_Queries.last` of each layer."""

    keys: mx.array
    values: mx.array
    queries: list[mx.array]
    biases: list[mx.array] | None = None  # of latents, which are keys and values: ``[rows, n_tokens]``, the rest of the scores


@dataclass(frozen=True, slots=True)
class _Observed:
    """One layer in one run.

    Attributes:
        query_square: fp32 ``[n_kv_heads, D]``: mean over tokens, the group's query heads and positions.
        key_square: likewise of the keys, less their block's mean if the recipe has means.
        views: At the positions whose errors are taken, without the first block.
        inputs: What the views are made of.
        turned: Whether positions other than the run's are in it.
    """

    query_square: mx.array
    key_square: mx.array
    views: list[_View]
    inputs: list[mx.array]
    turned: bool

    @classmethod
    def of(cls, seen: ObservedTokens | ObservedLatents | None, means: bool, *, with_view: bool) -> _Observed:
        if seen is None or not seen.queries:
            raise ValueError("[calibrate] model: expected attention over the cache's tokens, got none")
        if isinstance(seen, ObservedLatents):
            latents, nothing = seen.keys[:1, :, N_LEFT_OUT:], mx.zeros(1)
            last, biases = [q for q, _ in seen.queries], [bias for _, bias in seen.queries]
            view = _View(latents.astype(mx.float32), latents, last, biases)
            return cls(nothing, nothing, [view], [latents, *last, *biases], True)
        queries, keys, values = seen.queries, seen.keys[:1, :, N_LEFT_OUT:], seen.values[:1, :, N_LEFT_OUT:]
        x = keys.astype(mx.float32)
        if means:
            mean = mx.repeat(block_means(keys).astype(mx.float32), packed_format.BLOCK, axis=2)
            x = x - mean[:, :, : keys.shape[2]]
        turns = [q.turn for q in queries if q.turn is not None]
        query_square = mx.stack([q.square for q in queries]).mean(axis=0)
        inputs = [keys, values, *(q.last for q in queries)]
        if seen.turn is None or len(turns) < len(queries):  # queries that stay would meet keys that move
            views = [_View(keys.astype(mx.float32), values, [q.last for q in queries])] if with_view else []
            return cls(query_square, (x[0] * x[0]).mean(axis=1), views, inputs if with_view else [], False)
        n = len(seen.turns.at)
        views = [
            _View(seen.turn(keys, i), values, [turn(q.last, i) for turn, q in zip(turns, queries, strict=True)])
            for i in _first_middle_last(n)
        ]
        return cls(query_square, seen.turn.mean_square(x[0]), views, inputs, True)

    def arrays(self) -> list[mx.array]:
        """What a run has to compute. Views are made when they are looked at."""
        return [self.query_square, self.key_square, *self.inputs]


def _first_middle_last(n: int) -> list[int]:
    return sorted({0, n // 2, n - 1})


def balance_of(query_square: mx.array, key_square: mx.array) -> mx.array:
    """``(E[q^2] / E[x^2])^(1/4)`` per channel, median 1 in each head, within 1/64 to 64.

    A channel in which both are always zero gets 1; one of queries or of keys alone the nearest bound.
    """
    q, x = (np.array(y, np.float64) for y in (query_square, key_square))
    factor = np.full(q.shape, np.nan)
    tiny = np.finfo(np.float64).tiny
    with np.errstate(all="ignore"):
        np.power(np.maximum(q, tiny) / np.maximum(x, tiny), 0.25, out=factor, where=(q > 0) | (x > 0))
        for head in factor:
            known = head[np.isfinite(head)]
            head /= np.median(known) if known.size else 1.0
    factor = np.nan_to_num(factor, nan=1.0, posinf=BALANCE_RANGE)
    return mx.array(np.clip(factor, 1 / BALANCE_RANGE, BALANCE_RANGE).astype(np.float32))


def _errors(view: _View, recipe: Recipe, balance: mx.array | None) -> mx.array:
    """Output and score error ``[n_layers, 2]``; all tokens are coded and every query sees all of them."""
    k, v = view.keys, view.values
    means = block_means(k) if recipe.means else None
    packed_k = quantize_keys(k, bits=recipe.key_bits, means=means, balance=balance, qjl=recipe.qjl, rotation=recipe.rotation)
    packed_v = quantize_values(v, bits=recipe.value_bits, coding=recipe.value_coding, rotation=recipe.rotation)
    keys_fit, values_fit = fits_fp16(k, v, packed_k, packed_v)
    k, v = k[0], v[0].astype(mx.float32)
    coded_k, coded_v = dequantize(packed_k)[0], dequantize(packed_v)[0]
    if view.biases is not None:
        coded_v, values_fit = coded_k, keys_fit
    errors = []
    for i, q in enumerate(view.queries):
        scores = blas.matmul(q, k.swapaxes(-1, -2))
        if view.biases is not None:
            scores = scores + view.biases[i]
        # Products with the difference, not the difference of products: in TF32 those of large keys are off by nats.
        change = blas.matmul(q, (coded_k - k).swapaxes(-1, -2))
        exact, coded = (mx.softmax(s, axis=-1) for s in (scores, scores + change))
        attended = blas.matmul(exact, (v * v).sum(axis=-1, keepdims=True)).sum()
        output = mx.sqrt(((blas.matmul(coded, coded_v) - blas.matmul(exact, v)) ** 2).sum() / mx.maximum(attended, 1e-30))
        change = change - change.mean(axis=-1, keepdims=True)
        output = mx.where(values_fit, output, math.inf)
        errors.append(mx.stack([output, mx.where(keys_fit, mx.sqrt((change * change).mean()), math.inf)]))
    return mx.stack(errors)


def _calibrated(runs: Sequence[_Observed], recipe: Recipe) -> LayerCalibration:
    balance = None
    if recipe.balance:
        query_square, key_square = (
            mx.stack([getattr(o, name) for o in runs]).mean(axis=0) for name in ("query_square", "key_square")
        )
        balance = balance_of(query_square, key_square)
    errors = [np.array(_errors(view, recipe, balance), np.float64) for o in runs for view in o.views]
    # The worst place decides; what is not a number is as bad as can be.
    output, scores = np.nan_to_num(np.concatenate(errors), nan=math.inf, posinf=math.inf).max(axis=0).tolist()
    return LayerCalibration(balance, output, scores)


MakeCache = Callable[[Callable[[bool], "ObservingCache"]], tuple[list[Cache], dict[str, "ObservingCache"]]]
# By path: a layer under the recipes of its `ladder`, up to the first that is accurate.
Steps = dict[str, tuple[LayerCalibration, ...]]


def observe(model: Model, make_cache: MakeCache, recipes: Mapping[str, Recipe], ranks: Ranks) -> Steps:
    """Run the prompt and calibrate the layers of `recipes`, each with its `ladder`.

    One run is enough where queries and keys come right out of ``mx.fast.rope``: they are turned to other positions. Where they
    do not, and are not the same at another position either, the prompt is run at `N_RUNS`.

    Args:
        model: An mlx-lm model.
        make_cache: ``make_cache(new)`` makes the model's cache with ``new(is_latent)`` for each layer of `recipes`, and returns
            it with these by path.
        recipes: The layers' recipes by path.
        ranks: The processes that run parts of the model.
    """
    tokens, turns = prompt(model), _Turns(offsets(model))

    def run(shift: int, with_view: bool = True) -> dict[str, _Observed]:
        kinds = (ObservingCache, ObservingLatentCache)
        cache, observing = make_cache(lambda is_latent: kinds[is_latent](shift, turns))
        out = logits(model, tokens, cache)
        step = {path: _Observed.of(observing[path].seen, r.means, with_view=with_view) for path, r in recipes.items()}
        # Parts of a model wait for each other up to its end; alone, nobody needs the logits.
        mx.eval([o.arrays() for o in step.values()], out[:, -1:, :1] if ranks.n > 1 else [])
        return step

    with _noted_rope_calls(), blas.products(model, skip_rows=_setting(model, "vocab_size")):
        runs = [run(turns.at[0])]
        moves = {path: not o.turned for path, o in runs[0].items()}
        places = offsets(model, N_RUNS)
        for i in range(1, len(places)):
            if ranks.all(not any(moves.values())):
                break
            runs.append(run(places[i], i in _first_middle_last(len(places))))
            if i == 1:
                moves = {path: moves[path] and not _same(o, runs[1][path]) for path, o in runs[0].items()}
    steps: Steps = {}
    for path, recipe in recipes.items():
        observed = [step.pop(path) for step in (runs if moves[path] else runs[:1])]
        found: list[LayerCalibration] = []
        for r in ladder(recipe):
            found.append(_calibrated(observed, r))
            if found[-1].accurate and not ranks.split:  # another rank may need the next one
                break
        steps[path] = tuple(found)
    return steps


def _same(a: _Observed, b: _Observed) -> bool:
    """Whether queries and keys are the same at two positions, up to rounding."""
    pairs = [(a.query_square, b.query_square), (a.key_square, b.key_square)]
    return all(bool(mx.allclose(x, y, rtol=1e-3, atol=1e-6).item()) for x, y in pairs)


def _worst(steps: Steps, ranks: Ranks) -> Steps:
    """Each layer's errors on the rank where they are largest, so that all choose the same recipe for their heads."""
    if not ranks.split:
        return steps
    errors = mx.array([[c.output_error, c.score_error] for layer in steps.values() for c in layer])
    rows: Any = ranks.largest(errors).tolist()
    next_row = iter(rows)
    return {path: tuple(LayerCalibration(c.balance, *next(next_row)) for c in layer) for path, layer in steps.items()}


# Kept results


def fingerprint(model: Model) -> str:
    """A hash of the model's arguments and parameters: names, shapes, types, and 32 numbers of each."""
    digest = hashlib.sha256()
    args = _arguments(model)
    if dataclasses.is_dataclass(args):
        digest.update(repr(args).encode())
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


def _key(model: Model, recipes: Mapping[str, Recipe]) -> str:
    codings = {path: _coding(recipe) for path, recipe in sorted(recipes.items())}
    text = json.dumps([VERSION, packed_format.VERSION, fingerprint(model), codings])
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def _coding(recipe: Recipe) -> list[Any]:
    """What of a recipe decides its errors: not how many tokens stay exact."""
    return [getattr(recipe, name) for name in ("key_bits", "value_bits", "value_coding", "qjl", "rotation", "means", "balance")]


def _checksum(errors: str, arrays: Mapping[str, mx.array]) -> str:
    digest = hashlib.sha256(errors.encode())
    for name, x in sorted(arrays.items()):
        digest.update(f"{name} {x.shape} {x.dtype}".encode() + np.array(x).tobytes())
    return digest.hexdigest()


def _read(path: Path, recipes: Mapping[str, Recipe]) -> Steps | None:
    """What was kept, None if there is none or it is damaged: it can be made again."""
    try:
        loaded: Any = mx.load(str(path), return_metadata=True)
        arrays, metadata = loaded
        if metadata["checksum"] != _checksum(metadata["errors"], arrays):
            return None
        errors = json.loads(metadata["errors"])
        return {
            layer: tuple(
                LayerCalibration(arrays.get(name), *errors[name])
                for name in (f"{layer}/{i}" for i in range(len(ladder(recipe))))
                if name in errors
            )
            for layer, recipe in recipes.items()
        }
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, steps: Steps) -> None:
    arrays = {"none": mx.zeros(1)}  # a file without an array cannot be read
    numbers = {}
    for layer, found in steps.items():
        for i, c in enumerate(found):
            numbers[f"{layer}/{i}"] = [c.output_error, c.score_error]
            if c.balance is not None:
                arrays[f"{layer}/{i}"] = c.balance
    errors = json.dumps(numbers)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=".safetensors", dir=path.parent)
    os.close(handle)
    try:
        mx.save_safetensors(name, arrays, metadata={"errors": errors, "checksum": _checksum(errors, arrays)})
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def folder() -> Path:
    """Where calibrations are kept."""
    return cache_dir() / "calibration"


_running = threading.Lock()
_MAX_KEPT = 32
_kept: dict[Path, Steps] = {}  # of this process, oldest first


def calibrate_layers(model: Model, make_cache: MakeCache, recipes: Mapping[str, Recipe]) -> Calibration:
    """The calibration of these layers: what was kept, else made, kept and announced.

    Threads that ask for the same wait for one of them.
    """
    with _running:
        ranks = Ranks(model)
        if not recipes and ranks.n == 1:
            return Calibration({})
        path = folder() / f"{_key(model, recipes)}.safetensors"
        # A rank without layers to calibrate still takes part in the others' runs of the model.
        steps = (_kept.get(path) or _read(path, recipes)) if recipes else {}
        seconds = 0.0
        if not ranks.all(steps is not None) or steps is None:
            begin = time.perf_counter()
            steps = _made(model, make_cache, recipes, ranks, path)
            seconds = time.perf_counter() - begin
        if path not in _kept and len(_kept) >= _MAX_KEPT:
            del _kept[next(iter(_kept))]
        _kept[path] = steps
    layers = {
        (layer, step): found
        for layer, recipe in recipes.items()
        for step, found in zip(ladder(recipe), steps[layer], strict=False)
    }
    return Calibration(layers, seconds)


def _made(model: Model, make_cache: MakeCache, recipes: Mapping[str, Recipe], ranks: Ranks, path: Path) -> Steps:
    def say(text: str) -> None:
        if ranks.is_first:
            print(f"tqext: {text}", file=sys.stderr, flush=True)

    if tree_reduce(lambda n, x: n + x.nbytes, model.parameters(), 0) >= LARGE:
        say(f"calibrating {len(recipes)} layers with {N_TOKENS} tokens, once for these weights")
    begin = time.perf_counter()
    try:
        steps = _worst(observe(model, make_cache, recipes, ranks), ranks)
    except Exception as error:
        raise RuntimeError(
            f"[calibrate] model: expected one that attends to {N_TOKENS} tokens, got {type(error).__name__}: {error}; "
            "balance=False with guard=False needs no calibration"
        ) from error
    seconds = time.perf_counter() - begin
    try:
        _write(path, steps)
        where = "kept for the next time"
    except OSError as error:
        where = f"not kept: {error}"
    say(f"calibrated {len(recipes)} layers in {seconds:.1f} s, {where}")
    return steps

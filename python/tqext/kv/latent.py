"""The cache of a layer with latent attention: one latent per token, which is coded, and one rotary key, which is not.

The latent is key and value of every head at once (multi-head latent attention, DeepSeek-V2, arXiv:2405.04434). Such a layer
stores it where others store keys, and its rotary key where others store values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from tqext._ext import format as packed_format
from tqext._ext import quantize_blocks, quantize_keys
from tqext.kv.batch import BatchTurboQuantKVCache
from tqext.kv.cache import TurboQuantKVCache
from tqext.kv.codec import Codec, History, native_history
from tqext.kv.schedule import BLOCK
from tqext.kv.snapshot import AttendsItself, Snapshot
from tqext.kv.tokens import Exact
from tqext.ops import PackedKeys, PackedValues, dequantize
from tqext.presets import Recipe

# Memory that a prompt's attention takes beside its mask: half for tokens, half for scores.
PIECE_BYTES = 1 << 28


def latent_recipe(recipe: Recipe) -> Recipe:
    """What of a recipe goes for latents: their bits are those of the keys, and there is no balance.

    A balance trades the error of some channels for that of others by what scores need; latents are values as well.
    """
    return replace(recipe, value_bits=recipe.key_bits, value_coding="lloyd", balance=False)


def why_not_latent(recipe: Recipe, dim: int) -> str:
    """Why latents of this dimension cannot be coded by a recipe; empty if they can."""
    if recipe.qjl:
        return "residual signs estimate scores, and latents are values too"
    if recipe.rotation != "hadamard" or not packed_format.hadamard_factor(packed_format.padded_dim(dim)):
        return f"latents of dimension {dim} are coded with a Hadamard rotation, not with a dense one"
    return ""


class LatentCodec(Codec):
    """Latents coded as keys are, and rotary keys as they come: codes and norms, rotary keys, means of the blocks, if any."""

    __slots__ = ("rope_dtype",)

    def __init__(
        self,
        recipe: Recipe,
        head_dim: int,
        value_dim: int,
        balance: mx.array | None = None,
        *,
        rope_dtype: mx.Dtype = mx.float32,
    ):
        super().__init__(recipe, head_dim, value_dim, balance)
        self.rope_dtype = rope_dtype
        self.per_row = (1, 1, 1) + (BLOCK,) * recipe.means

    def encode(self, tokens: Exact) -> list[mx.array]:
        r = self.recipe
        if r.means:
            latents = quantize_blocks(tokens.keys, r.key_bits, self.balance, False, r.rotation, None)
        else:
            latents = quantize_keys(tokens.keys, r.key_bits, None, self.balance, False, r.rotation, None)
        return [*latents[:2], tokens.values, *latents[2:]]

    def pack(self, parts: Sequence[mx.array]) -> tuple[PackedKeys, PackedValues]:
        """The latents, and the same bytes as values: without the means, which the attention adds."""
        r = self.recipe
        means = parts[3] if r.means else None
        keys = PackedKeys(parts[0], parts[1], means, self.balance, bits=r.key_bits, head_dim=self.head_dim, rotation=r.rotation)
        return keys, PackedValues(parts[0], parts[1], r.key_bits, self.head_dim, "lloyd", r.rotation)

    def history(self, parts: Sequence[mx.array], first: Exact | None) -> History:
        keys, values = self.pack(parts)
        latents = None if first is None else first.keys
        native = native_history(keys, values, None if latents is None else Exact(latents, latents), latent=True)

        def attend(q: mx.array, tail: mx.array, _rope: mx.array, *args: Any, **options: Any) -> mx.array:
            return native.attend(q, tail, tail, *args, **options)

        return History(keys, values, first, attend, parts[2])

    def decode(self, parts: Sequence[mx.array], begin: int, end: int, key_dtype: mx.Dtype, value_dtype: mx.Dtype) -> Exact:
        whole = self.cut(parts, begin, -(-end // BLOCK) * BLOCK)
        keys, _ = self.pack(whole)
        return Exact(dequantize(keys, dtype=key_dtype), whole[2]).cut(0, end - begin)

    def empty(self, batch: int, n_kv_heads: int) -> list[mx.array]:
        no_rope = mx.zeros((batch, n_kv_heads, 0, self.value_dim), self.rope_dtype)
        return self.encode(Exact(mx.zeros((batch, n_kv_heads, 0, self.head_dim)), no_rope))


class FirstUse:
    """Lets `tqext.mlx_lm.hook` replace functions of MLX for latents only in processes that have some."""

    def __init__(self) -> None:
        self._happened = False
        self._call: Callable[[], None] | None = None

    def then(self, call: Callable[[], None] | None) -> None:
        """What to do at every use from now on, and at once if there was one."""
        self._call = call
        if self._happened:
            self.note()

    def note(self) -> None:
        """Latents are about to be made."""
        self._happened = True
        if self._call is not None:
            self._call()


first_use = FirstUse()


class Projectable(AttendsItself):
    """Stands in for the latents that a cache returns: a model's ``MultiLinear`` of it is put off until attention."""

    __slots__ = ()

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
        """The output of attention over keys and values that are made of these latents; arguments as of `attention`."""
        raise NotImplementedError

    def gathered(self, indices: mx.array) -> mx.array:
        """The latents of some tokens: ``mx.take_along_axis`` along the tokens."""
        raise TypeError(f"take_along_axis of {type(self).__name__}")


class ProjectedLatents(AttendsItself):
    """Stands in for the keys or values of all heads that a model makes of its latents.

    Args:
        latents: What they are made of.
        project: ``project(x, transpose)``, the model's ``MultiLinear``.
        transpose: How the model called it.
        rope: ``[B, H, n_tokens, R]``: rotary keys that the model has joined to the keys' ends, as some do for prompts.
    """

    __slots__ = ("latents", "project", "rope", "transpose")

    def __init__(
        self,
        latents: Projectable,
        project: Callable[[mx.array, bool], mx.array],
        transpose: bool,
        rope: mx.array | None = None,
    ) -> None:
        self.latents = latents
        self.project = project
        self.transpose = transpose
        self.rope = rope

    def joined(self, rope: mx.array) -> ProjectedLatents:
        """``mx.concatenate([self, rope], axis=-1)``."""
        if self.rope is not None:
            raise TypeError("[concatenate] arrays: expected keys made of latents and one array of rotary keys, got another")
        return ProjectedLatents(self.latents, self.project, self.transpose, rope)

    def split(self, queries: mx.array, scale: float, mask: mx.array | str | None) -> tuple[mx.array, mx.array | str | None]:
        """Queries without a rotary part, and a mask with its scores."""
        if self.rope is None:
            return queries, mask
        n_queries, n_keys, rope_dim = queries.shape[2], self.rope.shape[2], self.rope.shape[3]
        q, q_rope = mx.split(queries, [queries.shape[3] - rope_dim], axis=-1)
        scores = (q_rope * scale) @ self.rope.swapaxes(-1, -2)
        if isinstance(mask, str):
            mask = mx.arange(n_keys) <= mx.arange(n_keys - n_queries, n_keys)[:, None]
        if mask is None:
            return q, scores
        return q, mx.where(mask, scores, -mx.inf) if mask.dtype == mx.bool_ else scores + mask

    def at(self, x: mx.array, column: int) -> mx.array:
        """`of` the latents of the tokens from `column` on, with their rotary keys if they are joined."""
        keys = self.of(x)
        if self.rope is None:
            return keys
        return mx.concatenate([keys, self.rope[:, :, column : column + x.shape[2]].astype(keys.dtype)], axis=-1)

    def of(self, x: mx.array) -> mx.array:
        """``[B, H, n, dim]`` of latents ``[B, 1 or H, n, latent dim]``."""
        return self.project(x, self.transpose)

    def absorbed(self, x: mx.array) -> mx.array:
        """``[B, H, n, latent dim]`` of ``[B, H, n, dim]``: its products with latents are those of `x` with `of` them."""
        return self.project(x, not self.transpose)

    def attention(self, previous: Callable[..., mx.array], queries: mx.array, values: object, **options: Any) -> mx.array:
        if not isinstance(values, ProjectedLatents) or values.latents is not self.latents:
            raise TypeError("[scaled_dot_product_attention] v: expected values that are made of the keys' latents")
        return self.latents.attend_projected(previous, queries, self, values, **options)


class Latents(Projectable):
    """The latents of one step, in place of both keys and values. It is not an array: see `Snapshot`."""

    __slots__ = ("snapshot",)

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot

    def __deepcopy__(self, memo: dict[int, object]) -> Latents:
        """Itself, as a snapshot."""
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        return self.snapshot.shape

    @property
    def dtype(self) -> mx.Dtype:
        return self.snapshot.dtype

    def attention(self, previous: Callable[..., mx.array], queries: mx.array, values: object, **options: Any) -> mx.array:
        if values is not self:
            raise TypeError("[scaled_dot_product_attention] v: expected the latents that are the keys")
        return self.snapshot.attention(previous, queries, self.snapshot, **options)

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
        # For every token either all heads' keys and values are made, or products are as long as the latent.
        n_queries, dim, latent_dim = queries.shape[2], queries.shape[3], self.shape[3]
        if self.snapshot.columns is not None or n_queries <= BLOCK or n_queries * (latent_dim - dim) <= latent_dim * dim:
            queries, mask = keys.split(queries, scale, mask)
            absorbed = keys.absorbed(queries)
            out = self.snapshot.attention(previous, absorbed, self.snapshot, scale=scale, mask=mask, **options)
            return values.of(out)
        if options.pop("sinks", None) is not None:
            raise TypeError("[scaled_dot_product_attention] sinks: expected None for a prompt of latents")
        with mx.stream(options.get("stream") or mx.default_stream(mx.default_device())):
            return attend_in_pieces(queries, self._pieces, keys, values, scale, mask, n_keys=self.shape[2])

    def rope(self) -> mx.array:
        """The rotary keys of all tokens, in mlx-lm's columns; zero for padding."""
        snapshot = self.snapshot
        first, coded, tail = snapshot.first, snapshot.history.rope, snapshot.tail.values
        parts = [x for x in (None if first is None else first.values, coded) if x is not None and x.shape[2]]
        all_tokens = mx.concatenate([*parts, tail], axis=2) if parts else tail
        if snapshot.columns is None:
            return all_tokens
        ours, is_token = snapshot.columns.of_stock()
        ours = mx.broadcast_to(ours, (*ours.shape[:3], tail.shape[3]))
        return mx.where(is_token, mx.take_along_axis(all_tokens, ours, axis=2), mx.array(0, tail.dtype))

    def _pieces(self, n_most: int, begins: Callable[[mx.array], mx.array]) -> Iterator[mx.array]:
        """All latents in order, at most `n_most` at a time, a multiple of a block; ``begins(x)``: x, but not yet."""
        snapshot, dtype = self.snapshot, self.dtype
        if snapshot.first is not None:
            yield from _cut(snapshot.first.keys, n_most)
        packed = snapshot.packed_keys
        n_coded = packed.codes.shape[2]
        for begin in range(0, n_coded, n_most):
            end = min(begin + n_most, n_coded)
            means = None if packed.means is None else packed.means[:, :, begin // BLOCK : -(-end // BLOCK)]
            codes = begins(packed.codes[:, :, begin:end])
            yield dequantize(packed._replace(codes=codes, norms=packed.norms[:, :, begin:end], means=means), dtype=dtype)
        yield from _cut(snapshot.tail.keys, n_most)

    def gathered(self, indices: mx.array) -> mx.array:
        """The latents at ``indices [B, 1, k, latent dim]``, the same along the last axis, as an array."""
        packed, first, tail = self.snapshot.packed_keys, self.snapshot.first, self.snapshot.tail.keys
        at = indices[..., :1].astype(mx.int32)
        if self.snapshot.columns is not None:
            at = mx.take_along_axis(self.snapshot.columns.of_stock()[0], at, axis=2)
        n_first, n_coded = (0 if first is None else first.n_tokens), packed.codes.shape[2]

        def take(x: mx.array, rows: mx.array) -> mx.array:
            return mx.take_along_axis(x, mx.broadcast_to(rows, (*rows.shape[:-1], x.shape[3])), axis=2)

        exact = tail if first is None else mx.concatenate([first.keys, tail], axis=2)
        out = take(exact, mx.clip(mx.where(at < n_first, at, at - n_coded), 0, exact.shape[2] - 1))
        if n_coded == 0:
            return out
        row = mx.clip(at - n_first, 0, n_coded - 1)
        some = packed._replace(codes=take(packed.codes, row), norms=take(packed.norms, row), means=None)
        coded = dequantize(some, dtype=mx.float32)
        if packed.means is not None:
            coded = coded + take(packed.means, row // BLOCK)
        return mx.where((at >= n_first) & (at < n_first + n_coded), coded.astype(self.dtype), out)


def _cut(x: mx.array, n_most: int) -> Iterator[mx.array]:
    for begin in range(0, x.shape[2], n_most):
        yield x[:, :, begin : begin + n_most]


def attend_in_pieces(
    queries: mx.array,
    pieces: Callable[[int, Callable[[mx.array], mx.array]], Iterator[mx.array]],
    keys: ProjectedLatents,
    values: ProjectedLatents,
    scale: float,
    mask: mx.array | str | None,
    n_keys: int,
) -> mx.array:
    """softmax(scale q k^T + mask) v of many queries, with the keys and values of a few tokens at a time.

    An online softmax in fp32 over pieces of tokens and of queries: `PIECE_BYTES` at a time, and no copy of the history.

    Args:
        queries: ``[B, H, L, D]``.
        pieces: Of the latents, as `Latents._pieces`.
        keys: Makes the keys of latents. ``values``: likewise.
        scale: Of the scores.
        mask: None, ``"causal"``, or an array that broadcasts to ``[B, H, L, n_keys]``.
        n_keys: Latents in all.

    Returns:
        ``[B, H, L, Dv]`` in the queries' type.
    """
    batch, n_heads, n_queries, dim = queries.shape
    token_bytes = batch * n_heads * 2 * dim * queries.dtype.size
    score_bytes = batch * n_heads * 12  # in the queries' type, in fp32, and as weights
    n_most = min(PIECE_BYTES // 2 // token_bytes, PIECE_BYTES // 2 // (score_bytes * min(n_queries, 256)))
    n_most = max(n_most // BLOCK, 1) * BLOCK
    n_rows = max(1, PIECE_BYTES // 2 // (score_bytes * n_most))
    rows = [_Rows(begin, queries[:, :, begin : begin + n_rows] * scale) for begin in range(0, n_queries, n_rows)]
    last: list[mx.array] = []

    def after(x: mx.array) -> mx.array:
        """MLX runs what does not depend on another piece as it likes: each one waits for all of the one before."""
        return mx.depends(x, last) if last else x

    column = 0
    for latents in pieces(n_most, after):
        x = after(latents).astype(queries.dtype)
        k, v = keys.at(x, column).swapaxes(-1, -2), values.of(x)
        n = x.shape[2]
        for row in rows:
            last = row.attend(after, k, v, _mask_of(mask, row, column, n, n_queries, n_keys))
        column += n
    outs = [row.output() for row in rows]
    return outs[0] if len(outs) == 1 else mx.concatenate(outs, axis=2)


def _mask_of(mask: mx.array | str | None, row: _Rows, column: int, n: int, n_queries: int, n_keys: int) -> mx.array | None:
    """The part of a mask for some queries and `n` tokens from `column` on."""
    if mask is None:
        return None
    end = row.begin + row.q.shape[2]
    if isinstance(mask, str):
        seen = mx.arange(row.begin, end)[:, None] + n_keys - n_queries
        return mx.arange(column, column + n) <= seen
    if mask.ndim > 1 and mask.shape[-2] > 1:
        mask = mask[..., row.begin : end, :]
    return mask[..., column : column + n] if mask.shape[-1] > 1 else mask


class _Rows:
    """Some queries, with their softmax so far."""

    def __init__(self, begin: int, q: mx.array) -> None:
        self.begin = begin
        self.q = q
        self.max = mx.full((*q.shape[:3], 1), -mx.inf, mx.float32)
        self.sum = mx.zeros((*q.shape[:3], 1))
        self.out: mx.array | None = None

    def attend(self, after: Callable[[mx.array], mx.array], k: mx.array, v: mx.array, mask: mx.array | None) -> list[mx.array]:
        """Adds a piece; returns the sums so far, on which nothing of the piece is left out."""
        scores = (after(self.q) @ k).astype(mx.float32)
        if mask is not None:
            scores = mx.where(mask, scores, -mx.inf) if mask.dtype == mx.bool_ else scores + mask
        top = mx.maximum(self.max, scores.max(axis=-1, keepdims=True))
        finite = mx.where(top == -mx.inf, 0.0, top)
        weights, keep = mx.exp(scores - finite), mx.exp(self.max - finite)
        out = (weights.astype(v.dtype) @ v).astype(mx.float32)
        self.sum = self.sum * keep + weights.sum(axis=-1, keepdims=True)
        self.out = out if self.out is None else self.out * keep + out
        self.max = top
        return [self.out, self.sum]

    def output(self) -> mx.array:
        assert self.out is not None
        return mx.where(self.sum == 0, 0.0, self.out / mx.where(self.sum == 0, 1.0, self.sum)).astype(self.q.dtype)


class TurboQuantLatentCache(TurboQuantKVCache):
    """The cache of one layer with latent attention: latents coded, rotary keys exact.

    Takes the place of mlx-lm's ``KVCache`` in such a layer. `update_and_fetch` returns `Latents` and the rotary keys of all
    tokens as an array, from which the model makes their part of the scores.

    Args:
        recipe: What to store; its key bits are the latents'. Default: that of `tq3`.
    """

    is_latent = True
    can_share = False

    def __init__(self, recipe: Recipe | None = None, *, shared: bool = False) -> None:
        first_use.note()
        super().__init__(latent_recipe(recipe or Recipe()), shared=shared)

    def _make_codec(self, head_dim: int, value_dim: int, balance: mx.array | None, value_dtype: mx.Dtype) -> Codec:
        return LatentCodec(self.recipe, head_dim, value_dim, balance, rope_dtype=value_dtype)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Append tokens and return what the step attends to.

        Args:
            keys: The latents, ``[B, 1, L, D]``, any float type.
            values: The rotary keys, ``[B, 1, L, R]``.

        Returns:
            The latents of all tokens as `Latents`, and the rotary keys of all tokens, ``[B, 1, n_tokens, R]``.

        Raises:
            ValueError: As `TurboQuantKVCache.update_and_fetch`.
        """
        if self._codec is None and keys.ndim == 4 and (why := why_not_latent(self.recipe, keys.shape[3])):
            raise ValueError(f"[TurboQuantLatentCache] keys: expected latents that can be coded, got others: {why}")
        latents = Latents(super().update_and_fetch(keys, values)[0])
        return latents, latents.rope()

    def keys_and_values(self) -> Any:
        """What the last `update_and_fetch` returned."""
        latents = Latents(super().keys_and_values()[0])
        return latents, latents.rope()

    def _new_batch(self, left_padding: Sequence[int]) -> BatchTurboQuantLatentCache:
        return BatchTurboQuantLatentCache(left_padding, self.recipe, shared=self.shared)


class BatchTurboQuantLatentCache(BatchTurboQuantKVCache):
    """The cache of one layer with latent attention for a batch: see `BatchTurboQuantKVCache`.

    Args:
        left_padding: Padding of each sequence of the prompt to come.
        recipe: See `TurboQuantLatentCache`.
        shared: See `TurboQuantLatentCache`.
    """

    is_latent = True
    can_share = False

    def __init__(self, left_padding: Sequence[int], recipe: Recipe | None = None, *, shared: bool = False) -> None:
        first_use.note()
        super().__init__(left_padding, latent_recipe(recipe or Recipe()), shared=shared)

    def _make_codec(self, head_dim: int, value_dim: int, balance: mx.array | None, value_dtype: mx.Dtype) -> Codec:
        return LatentCodec(self.recipe, head_dim, value_dim, balance, rope_dtype=value_dtype)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """As `TurboQuantLatentCache.update_and_fetch`, in the columns of mlx-lm's left-padded batch."""
        latents = Latents(super().update_and_fetch(keys, values)[0])
        return latents, latents.rope()

    def keys_and_values(self) -> Any:
        """What the last `update_and_fetch` returned."""
        latents = Latents(super().keys_and_values()[0])
        return latents, latents.rope()

    def _new_single(self) -> TurboQuantLatentCache:
        return TurboQuantLatentCache(self.recipe, shared=self.shared)


TurboQuantLatentCache.batch_class = BatchTurboQuantLatentCache

"""The operators on packed keys and values (format version 2, csrc/format.h)."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple, TypeVar

import mlx.core as mx

from tqext import _ext

Stream = mx.Stream | mx.Device | None


class PackedKeys(NamedTuple):
    """Packed keys of ``n_tokens`` tokens.

    A tuple of arrays and numbers: it passes through ``mx.compile`` and ``tree_map``. The token axis of codes, norms and signs
    is -2, so slicing tokens is slicing arrays; ``means`` has one row for each block of 64 tokens (``format.BLOCK``).

    Attributes:
        codes: uint32 ``[batch, n_kv_heads, n_tokens, padded_dim * bits / 32]``.
        norms: float16 ``[batch, n_kv_heads, n_tokens, 1]``.
        means: float16 ``[batch, n_kv_heads, ceil(n_tokens / 64), head_dim]``, subtracted from the keys of each block, or None.
        balance: float32 ``[n_kv_heads, head_dim]``, multiplied to keys and divided from queries, or None.
        signs: uint32 ``[batch, n_kv_heads, n_tokens, padded_dim / 32]``, residual signs (QJL), or None.
        residual_norms: float16 ``[batch, n_kv_heads, n_tokens, 1]``, or None.
        bits: 2, 3 or 4 per dimension.
        head_dim: of the unpacked keys; None: as many as the codes hold.
        rotation: ``"hadamard"``, ``"orthogonal"``, or ``"none"`` for keys that were rotated by the caller.
    """

    codes: mx.array
    norms: mx.array
    means: mx.array | None = None
    balance: mx.array | None = None
    signs: mx.array | None = None
    residual_norms: mx.array | None = None
    bits: int = 3
    head_dim: int | None = None
    rotation: str = "hadamard"

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(x.nbytes for x in self if isinstance(x, mx.array))

    @property
    def shape(self) -> tuple[int, ...]:
        """``(batch, n_kv_heads, n_tokens, head_dim)`` of the keys they stand for."""
        return (*self.codes.shape[:-1], _head_dim(self))

    def __repr__(self) -> str:
        return _repr(self, self.norms)


class PackedValues(NamedTuple):
    """Packed values of ``n_tokens`` tokens.

    Attributes:
        codes: uint32 ``[batch, n_kv_heads, n_tokens, padded_dim * bits / 32]``.
        params: float16; ``"groups"``: ``[batch, n_kv_heads, n_tokens, 2 * padded_dim / 32]``, scale and bias of each group of
            32; ``"lloyd"``: ``[batch, n_kv_heads, n_tokens, 1]``, the norm.
        bits: 2 or 4 per dimension (``"groups"``), or 2, 3 or 4 (``"lloyd"``).
        head_dim: of the unpacked values; None: as many as the codes hold.
        coding: ``"groups"`` or ``"lloyd"``.
        rotation: as in `PackedKeys`.
    """

    codes: mx.array
    params: mx.array
    bits: int = 2
    head_dim: int | None = None
    coding: str = "groups"
    rotation: str = "hadamard"

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.codes.nbytes + self.params.nbytes

    @property
    def shape(self) -> tuple[int, ...]:
        """``(batch, n_kv_heads, n_tokens, head_dim)`` of the values they stand for."""
        return (*self.codes.shape[:-1], _head_dim(self))

    def __repr__(self) -> str:
        return _repr(self, self.params)


def _repr(packed: PackedKeys | PackedValues, side: object) -> str:
    """One line, also of what `tree_map` or a mistake has put in the arrays' places."""
    if not (isinstance(packed.codes, mx.array) and isinstance(side, mx.array) and packed.codes.ndim):
        return f"{type(packed).__name__}{tuple(packed)!r}"
    coding = f", {packed.coding}" if isinstance(packed, PackedValues) else ""
    return f"{type(packed).__name__}({packed.shape}, {packed.bits} bits{coding}, {packed.nbytes} bytes)"


def _head_dim(packed: PackedKeys | PackedValues) -> int:
    if packed.head_dim is not None:
        return packed.head_dim
    return packed.codes.shape[-1] * 32 // packed.bits if packed.codes.ndim and packed.bits else 0


def _explained(op: str, error: TypeError, **arguments: object) -> Exception:
    """What is wrong with the arguments of an operator that MLX's bindings refused with a list of all signatures."""
    for name, value in arguments.items():
        for item in value if isinstance(value, tuple) else (value,):
            if not isinstance(item, mx.array):
                hint = f"; mx.array({name}) converts it" if type(item).__module__ == "numpy" else ""
                got = "None" if item is None else type(item).__name__
                return ValueError(f"[{op}] {name}: expected an mlx.core.array, got {got}{hint}")
    return error


def _given(**arguments: object) -> dict[str, object]:
    """The optional arguments that were given."""
    return {name: value for name, value in arguments.items() if value is not None and not isinstance(value, str)}


def quantize_keys(
    k: mx.array,
    *,
    bits: int = 3,
    means: mx.array | None = None,
    balance: mx.array | None = None,
    qjl: bool = False,
    rotation: str = "hadamard",
    stream: Stream = None,
) -> PackedKeys:
    """Packed keys: ``(k - mean of the block) * balance``, rotated, coded by a Lloyd-Max codebook, with one norm per token.

    The norm is ``|x|**2 / <x, levels>``, so scores have no bias. The means spare the codebook what the keys of a block of 64
    tokens share; attention adds their products with the queries. The balance gives each channel the precision that the queries
    need.

    Args:
        k: float32, float16 or bfloat16 ``[batch, n_kv_heads, n_tokens, head_dim]``; head_dim a multiple of 8 up to 512,
            zero-padded inside to a multiple of 32.
        bits: 2, 3 or 4.
        means: float16 ``[batch or 1, n_kv_heads, ceil(n_tokens / 64), head_dim]``, from `block_means`, or None. Keys
            that the caller rotated (``rotation="none"``) may have float32 means.
        balance: float32 ``[n_kv_heads, head_dim]``, positive: ``(E[q**2] / E[(k - mean)**2]) ** 0.25`` of each channel, from
            `tqext.calibrate`; or None.
        qjl: add one sign bit per dimension of the residual (Zandieh et al., QJL, arXiv:2406.03482; TurboQuant,
            arXiv:2504.19874), with an orthogonal sketch.
        rotation: ``"hadamard"`` (random signs, then Walsh-Hadamard; a dense matrix where head_dim has none),
            ``"orthogonal"`` (dense), or ``"none"``.
        stream: stream or device.

    Returns:
        Packed keys; ``means`` and ``balance`` are kept in them.

    Raises:
        ValueError: a wrong shape, dtype or number.
    """
    try:
        parts = _ext.quantize_keys(k, bits, means, balance, qjl, rotation, stream)
    except TypeError as error:
        raise _explained("quantize_keys", error, k=k, **_given(means=means, balance=balance)) from None
    signs, residual_norms = (parts[2], parts[3]) if qjl else (None, None)
    return PackedKeys(parts[0], parts[1], means, balance, signs, residual_norms, bits, k.shape[-1], rotation)


def quantize_values(
    v: mx.array, *, bits: int = 2, coding: str = "groups", rotation: str = "hadamard", stream: Stream = None
) -> PackedValues:
    """Packed values: rotated, then coded.

    ``"groups"``: ``scale * code + bias`` per group of 32, fitted by least squares; 3 bits per dimension with 2-bit codes.
    ``"lloyd"``: the keys' Lloyd-Max codebook and one norm per token, of least squared error; 3-bit codes take 2 bytes more
    than 2-bit groups at head dimension 128 and have a third of their squared error.

    Args:
        v: float32, float16 or bfloat16 ``[batch, n_kv_heads, n_tokens, head_dim]``, as for `quantize_keys`.
        bits: 2 or 4 for ``"groups"``; 2, 3 or 4 for ``"lloyd"``.
        coding: ``"groups"`` or ``"lloyd"``.
        rotation: as for `quantize_keys`.
        stream: stream or device.

    Raises:
        ValueError: a wrong shape, dtype or number.
    """
    try:
        codes, params = _ext.quantize_values(v, bits, coding, rotation, stream)
    except TypeError as error:
        raise _explained("quantize_values", error, v=v) from None
    return PackedValues(codes, params, bits, v.shape[-1], coding, rotation)


def dequantize(
    packed: PackedKeys | PackedValues,
    *,
    rotated: bool = False,
    dtype: mx.Dtype = mx.float32,
    stream: Stream = None,
) -> mx.array:
    """The vectors that packed bytes stand for (without the residual signs, which only estimate scores).

    Args:
        packed: from `quantize_keys` or `quantize_values`.
        rotated: leave them in the rotated space: padded head dimension, balanced, without the means.
        dtype: float32, float16 or bfloat16.
        stream: stream or device.

    Returns:
        ``[batch, n_kv_heads, n_tokens, head_dim]``.

    Raises:
        ValueError: arrays that do not fit together.
    """
    if isinstance(packed, PackedKeys):
        return _ext.dequantize_keys(
            packed.codes,
            packed.norms,
            packed.means,
            packed.balance,
            packed.bits,
            _head_dim(packed),
            packed.rotation,
            rotated,
            dtype,
            stream,
        )
    if isinstance(packed, PackedValues):
        return _ext.dequantize_values(
            packed.codes,
            packed.params,
            packed.bits,
            _head_dim(packed),
            packed.coding,
            packed.rotation,
            rotated,
            dtype,
            stream,
        )
    raise ValueError(f"[dequantize] packed: expected PackedKeys or PackedValues, got {type(packed).__name__}")


def rotate(x: mx.array, inverse: bool = False, *, rotation: str = "hadamard", stream: Stream = None) -> mx.array:
    """``x`` in the space where keys and values are coded: ``H (signs * x) / sqrt(head_dim)`` over the last axis.

    Args:
        x: float32, float16 or bfloat16 ``[..., head_dim]``, head_dim a multiple of 32 up to 512.
        inverse: map back.
        rotation: ``"hadamard"``, ``"orthogonal"`` or ``"none"``.
        stream: stream or device.

    Returns:
        The same shape and dtype.

    Raises:
        ValueError: a wrong shape, dtype or name.
    """
    try:
        return _ext.rotate(x, inverse, rotation=rotation, stream=stream)
    except TypeError as error:
        raise _explained("rotate", error, x=x) from None


def turboquant_attention(
    q: mx.array,
    packed_k: PackedKeys,
    packed_v: PackedValues,
    *,
    scale: float | None = None,
    mask: mx.array | str | None = None,
    tail: tuple[mx.array, mx.array] | None = None,
    sinks: mx.array | None = None,
    first: tuple[mx.array, mx.array] | None = None,
    left_padding: mx.array | None = None,
    lengths: mx.array | None = None,
    indices: mx.array | None = None,
    stream: Stream = None,
) -> mx.array:
    """Attention of ``q`` over packed keys and values, in one pass over the packed bytes.

    ``softmax(scale * q @ K.T + mask) @ V`` with K, V the exact ``first`` tokens, the packed tokens and the exact ``tail``, in
    this order; there is one softmax, no score matrix and no decompressed copy. Query heads share KV heads by shape
    (grouped-query attention). A row that attends to nothing is zero.

    Args:
        q: float32, float16 or bfloat16 ``[batch, n_q_heads, n_queries, head_dim]``, not rotated.
        packed_k: packed keys of ``n_coded >= 0`` tokens; strided views of longer buffers are read in place.
        packed_v: packed values of as many tokens; their head dimension may differ.
        scale: of the scores; None: ``head_dim ** -0.5``.
        mask: None, ``"causal"`` (row i of L sees keys up to ``n_keys - L + i``), or an array that broadcasts to
            ``[batch, n_q_heads, n_queries, n_keys]``: bool (True attends) or added to the scores.
        tail: exact keys and values behind the packed ones, ``[batch, n_kv_heads, n_tail, head_dim]``.
        sinks: attention-sink logits ``[n_q_heads]``: they join the softmax's denominator only.
        first: exact keys and values before the packed ones.
        left_padding: int32 ``[batch]``: keys before this index are not attended.
        lengths: int32 ``[batch, 3]``: how many first, packed and tail tokens each sequence holds, counted from each part's
            start; the rest is not attended. With ``mask="causal"`` the last ``n_queries`` tail tokens are the queries' own, are
            always held, and are not counted.
        indices: int32 or uint32 ``[batch, n_kv_heads or 1, n_queries or 1, n_listed]``: of the packed tokens a query attends to
            those that its list names, in any order; heads or queries share a list where the axis is 1. Ids count from the
            first packed token. An id outside ``0 ... n_coded - 1``, a negative one say, is an empty slot. A token that is
            listed twice counts twice. Mask, padding and lengths restrict a listed token by its place in the history, as
            without a list. Exact tokens have no ids: ``first`` and ``tail`` are attended to as without a list.
        stream: stream or device.

    Returns:
        ``[batch, n_q_heads, n_queries, value_dim]`` in q's dtype.

    Raises:
        ValueError: shapes, dtypes or numbers that do not fit; ``[turboquant_attention] argument: expected X, got Y``.

    Example:
        >>> k = mx.random.normal((1, 2, 100, 64))
        >>> v = mx.random.normal((1, 2, 100, 64))
        >>> q = mx.random.normal((1, 8, 1, 64))
        >>> tqext.turboquant_attention(q, tqext.quantize_keys(k), tqext.quantize_values(v)).shape
        (1, 8, 1, 64)
    """
    return _attend(
        "turboquant_attention", q, packed_k, packed_v, scale=scale, mask=mask, tail=tail, sinks=sinks, first=first,
        left_padding=left_padding, lengths=lengths, indices=indices, stream=stream,
    )  # fmt: skip


def _attend(
    op: str,
    q: mx.array,
    packed_k: PackedKeys,
    packed_v: PackedValues,
    *,
    scale: float | None,
    mask: mx.array | str | None = None,
    tail: tuple[mx.array, mx.array] | None = None,
    sinks: mx.array | None = None,
    first: tuple[mx.array, mx.array] | None = None,
    left_padding: mx.array | None = None,
    lengths: mx.array | None = None,
    indices: mx.array | None = None,
    stream: Stream = None,
    lse: bool = False,
) -> mx.array:
    """`turboquant_attention`. lse: in fp32, with the log of the sum of weights as one column more."""
    packed_k, packed_v = _rebuild(PackedKeys, packed_k, "packed_k", op), _rebuild(PackedValues, packed_v, "packed_v", op)
    try:
        return _ext.turboquant_attention(
            q,
            packed_k.codes,
            packed_k.norms,
            packed_k.means,
            packed_k.balance,
            packed_k.signs,
            packed_k.residual_norms,
            packed_k.bits,
            _head_dim(packed_k),
            packed_k.rotation,
            packed_v.codes,
            packed_v.params,
            packed_v.bits,
            _head_dim(packed_v),
            packed_v.coding,
            packed_v.rotation,
            scale,
            mask,
            first,
            tail,
            sinks,
            left_padding,
            lengths,
            indices,
            stream,
            lse,
        )
    except TypeError as error:
        given = _given(
            mask=mask, tail=tail, sinks=sinks, first=first, left_padding=left_padding, lengths=lengths, indices=indices
        )
        raise _explained(op, error, q=q, **given) from None


def shared_prefix_attention(
    q: mx.array,
    prefix_k: PackedKeys,
    prefix_v: PackedValues,
    packed_k: PackedKeys,
    packed_v: PackedValues,
    *,
    scale: float | None = None,
    mask: mx.array | str | None = None,
    tail: tuple[mx.array, mx.array] | None = None,
    sinks: mx.array | None = None,
    first: tuple[mx.array, mx.array] | None = None,
    lengths: mx.array | None = None,
    stream: Stream = None,
) -> mx.array:
    """Attention of sequences that begin with the same tokens, of which there is one copy.

    The same, but for a few roundings of fp32, as `turboquant_attention` over ``first``, the prefix, a sequence's own packed
    tokens and its ``tail``. The queries of all sequences read the prefix together. That result and the one over the own tokens
    are joined by the logs of their sums of weights (log-sum-exp).

    Args:
        q: float32, float16 or bfloat16 ``[batch, n_q_heads, n_queries, head_dim]``, not rotated.
        prefix_k: packed keys of the tokens that all sequences begin with, ``[1, n_kv_heads, n_prefix, ...]``.
        prefix_v: packed values of as many tokens.
        packed_k: packed keys of each sequence's own tokens, ``[batch, n_kv_heads, n_coded >= 0, ...]``.
        packed_v: packed values of as many tokens.
        scale: of the scores; None: ``head_dim ** -0.5``.
        mask: as for `turboquant_attention`, over the own packed tokens and the tail. Every query sees the prefix.
        tail: exact keys and values behind the own packed ones, ``[batch, n_kv_heads, n_tail, head_dim]``.
        sinks: attention-sink logits ``[n_q_heads]``.
        first: exact keys and values before the prefix, ``[1, n_kv_heads, n_first, head_dim]``.
        lengths: int32 ``[batch, 2]``: how many own packed and tail tokens each sequence holds, as for `turboquant_attention`.
        stream: stream or device.

    Returns:
        ``[batch, n_q_heads, n_queries, value_dim]`` in q's dtype.

    Raises:
        ValueError: shapes, dtypes or numbers that do not fit.

    Example:
        >>> k, v = mx.random.normal((1, 2, 640, 64)), mx.random.normal((1, 2, 640, 64))
        >>> prefix = tqext.quantize_keys(k), tqext.quantize_values(v)
        >>> own = mx.random.normal((8, 2, 64, 64))
        >>> q = mx.random.normal((8, 4, 1, 64))
        >>> tqext.shared_prefix_attention(q, *prefix, tqext.quantize_keys(own), tqext.quantize_values(own)).shape
        (8, 4, 1, 64)
    """
    op = "shared_prefix_attention"
    packs = [(prefix_k, prefix_v, "prefix"), (packed_k, packed_v, "packed")]
    (prefix_k, prefix_v), (packed_k, packed_v) = (
        (_rebuild(PackedKeys, k, f"{name}_k", op), _rebuild(PackedValues, v, f"{name}_v", op)) for k, v, name in packs
    )
    _check_shared(op, q, prefix_k, prefix_v, packed_k, packed_v, lengths)
    with nullcontext() if stream is None else mx.stream(stream):
        shared = _attend(op, folded(q), prefix_k, prefix_v, scale=scale, first=first, lse=True)
        counts = None if lengths is None else mx.pad(lengths, [(0, 0), (1, 0)])
        own = _attend(op, q, packed_k, packed_v, scale=scale, mask=mask, tail=tail, sinks=sinks, lengths=counts, lse=True)
        return joined(unfolded(shared, q), own).astype(q.dtype)


def folded(x: mx.array) -> mx.array:
    """``[B, n_q_heads, L, D]`` as rows of one sequence: ``[1, n_q_heads, B * L, D]``."""
    return x.transpose(1, 0, 2, 3).reshape(1, x.shape[1], x.shape[0] * x.shape[2], x.shape[3])


def unfolded(x: mx.array, q: mx.array) -> mx.array:
    """The inverse of `folded` for what became of q."""
    return x.reshape(q.shape[1], q.shape[0], q.shape[2], x.shape[3]).transpose(1, 0, 2, 3)


def joined(a: mx.array, b: mx.array) -> mx.array:
    """The result over two parts of the tokens, each with the log of its sum of weights in the last column; fp32."""
    parts = [mx.split(x, [x.shape[3] - 1], axis=3) for x in (a, b)]
    return _weigh(*parts[0], *parts[1])


def _check_shared(
    op: str,
    q: mx.array,
    prefix_k: PackedKeys,
    prefix_v: PackedValues,
    packed_k: PackedKeys,
    packed_v: PackedValues,
    lengths: mx.array | None,
) -> None:
    """What the two calls of attention do not see: that they fit together."""

    def got(x: object) -> str:
        return f"shape {x.shape}" if isinstance(x, mx.array) else type(x).__name__

    if not isinstance(q, mx.array) or q.ndim != 4:
        raise ValueError(f"[{op}] q: expected 4 axes [batch, n_q_heads, n_queries, head_dim], got {got(q)}")
    for name, x in (("prefix_k", prefix_k), ("packed_k", packed_k)):
        if not isinstance(x.codes, mx.array) or x.codes.ndim != 4:
            raise ValueError(f"[{op}] {name}.codes: expected 4 axes [batch, n_kv_heads, n_tokens, words], got {got(x.codes)}")
    if prefix_k.codes.shape[0] != 1:
        raise ValueError(f"[{op}] prefix_k.codes: expected one sequence, which all share, got shape {prefix_k.codes.shape}")
    if prefix_k.codes.shape[1] != packed_k.codes.shape[1]:
        heads = packed_k.codes.shape[1]
        raise ValueError(f"[{op}] prefix_k.codes: expected {heads} heads as in packed_k, got shape {prefix_k.codes.shape}")
    if _head_dim(prefix_v) != _head_dim(packed_v):
        dims = _head_dim(packed_v), _head_dim(prefix_v)
        raise ValueError(f"[{op}] prefix_v: expected head dimension {dims[0]} as in packed_v, got {dims[1]}")
    if lengths is not None and (not isinstance(lengths, mx.array) or lengths.shape != (q.shape[0], 2)):
        raise ValueError(f"[{op}] lengths: expected shape {(q.shape[0], 2)}, got {got(lengths)}")


@mx.compile
def _weigh(a: mx.array, lse_a: mx.array, b: mx.array, lse_b: mx.array) -> mx.array:
    top = mx.maximum(lse_a, lse_b)
    top = mx.where(top == -mx.inf, 0.0, top)  # nothing is attended to
    of_a, of_b = mx.exp(lse_a - top), mx.exp(lse_b - top)
    total = of_a + of_b
    return (a * of_a + b * of_b) / mx.where(total == 0, 1.0, total)


def latent_attention(
    q: mx.array,
    packed: PackedKeys,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    q_rope: mx.array | None = None,
    k_rope: mx.array | None = None,
    tail: mx.array | None = None,
    first: mx.array | None = None,
    stream: Stream = None,
) -> mx.array:
    """Attention of ``q`` over packed latents, which are keys and values at once, in one pass over the packed bytes.

    ``softmax(scale * (q @ X.T + q_rope @ k_rope.T) + mask) @ X`` with X the exact ``first`` latents, the packed ones and the
    exact ``tail``, in this order: multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) with the projections of keys and
    values absorbed into the query and into what follows. A row that attends to nothing is zero.

    Args:
        q: float32, float16 or bfloat16 ``[batch, n_q_heads, n_queries, dim]``, in the latents' space, not rotated.
        packed: packed latents of ``n_coded >= 0`` tokens, from `quantize_keys` without residual signs and without a dense
            rotation. Models have one KV head.
        scale: of the scores. There is no default: it belongs to the heads before the absorption.
        mask: None, ``"causal"`` (row i of L sees latents up to ``n_keys - L + i``), or an array that broadcasts to
            ``[batch, n_q_heads, n_queries, n_keys]``: bool (True attends) or added to the scores.
        q_rope: the rotary part of the query, ``[batch, n_q_heads, n_queries, rope_dim]``; its scores are made in fp32 for all
            keys at once. None where the mask has them already.
        k_rope: the rotary keys of all latents, ``[batch, n_kv_heads, n_keys, rope_dim]``.
        tail: exact latents behind the packed ones, ``[batch, n_kv_heads, n_tail, dim]``.
        first: exact latents before the packed ones.
        stream: stream or device.

    Returns:
        ``[batch, n_q_heads, n_queries, dim]`` in q's dtype.

    Raises:
        ValueError: shapes, dtypes or numbers that do not fit; ``[latent_attention] argument: expected X, got Y``.

    Example:
        >>> latents = mx.random.normal((1, 1, 128, 512))
        >>> q, q_rope = mx.random.normal((1, 16, 1, 512)), mx.random.normal((1, 16, 1, 64))
        >>> k_rope = mx.random.normal((1, 1, 128, 64))
        >>> packed = tqext.quantize_keys(latents, means=tqext.block_means(latents))
        >>> tqext.latent_attention(q, packed, scale=192**-0.5, q_rope=q_rope, k_rope=k_rope).shape
        (1, 16, 1, 512)
    """
    packed = _rebuild(PackedKeys, packed, "packed", "latent_attention")
    dim, arrays = _head_dim(packed), (*packed[:6], packed.bits)
    try:
        return _ext.latent_attention(q, *arrays, dim, packed.rotation, scale, mask, q_rope, k_rope, first, tail, stream)
    except TypeError as error:
        given = _given(mask=mask, q_rope=q_rope, k_rope=k_rope, tail=tail, first=first)
        raise _explained("latent_attention", error, q=q, **given) from None


Packed = TypeVar("Packed", PackedKeys, PackedValues)


def _rebuild(kind: type[Packed], packed: object, name: str, op: str) -> Packed:
    """What was packed; mx.compile hands packed tuples on as plain tuples."""
    if isinstance(packed, kind):
        return packed
    if isinstance(packed, tuple) and len(packed) == len(kind._fields):
        return kind(*packed)
    raise ValueError(f"[{op}] {name}: expected {kind.__name__}, got {type(packed).__name__}")

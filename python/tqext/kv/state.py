"""The saved state of a cache, version 2: a header of numbers with a checksum, then the arrays."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from tqext._ext import format as packed_format
from tqext._ext import word_sum
from tqext.kv.codec import Codec
from tqext.kv.schedule import BLOCK, MIN_WINDOW
from tqext.kv.tokens import FLOATS
from tqext.presets import ROTATIONS, VALUE_BITS, Recipe

STATE_MAGIC = 0x54515854
LATENT_MAGIC = 0x5451584C  # of a cache of latents, whose arrays are others
STATE_VERSION = 2

_CODINGS = tuple(VALUE_BITS)
_HEADER_INTS = 23  # with the checksum


class Header(NamedTuple):
    """The numbers of a state.

    Attributes:
        recipe: The cache's.
        head_dim: Of the keys; 0, as all sizes, in a cache without tokens.
        value_dim: Of the values.
        batch: Sequences.
        n_kv_heads: KV heads.
        counts: First, coded and recent tokens.
        has_balance: Whether a balance is among the arrays.
        max_size: The bound of a bounded cache.
        n_dropped: Tokens that it dropped, or that have left the window.
        window: Tokens of a sliding window, None for a cache of all of them. It is one number more.
        is_latent: Whether the keys are latents and the values rotary keys.
    """

    recipe: Recipe
    head_dim: int
    value_dim: int
    batch: int
    n_kv_heads: int
    counts: tuple[int, int, int]
    has_balance: bool
    max_size: int | None
    n_dropped: int
    window: int | None = None
    is_latent: bool = False

    def numbers(self) -> list[int]:
        """As they are saved, without the checksum."""
        r = self.recipe
        recipe = [r.key_bits, r.value_bits, int(r.qjl), ROTATIONS.index(r.rotation), int(r.means), r.tail, r.first]
        recipe += [_CODINGS.index(r.value_coding)]
        sizes = [self.head_dim, self.value_dim, self.batch]
        more = [self.n_kv_heads, int(r.balance), int(self.has_balance), self.max_size or 0, self.n_dropped]
        more += [] if self.window is None else [self.window]
        magic = LATENT_MAGIC if self.is_latent else STATE_MAGIC
        return [magic, STATE_VERSION, packed_format.VERSION, *recipe, *sizes, *self.counts, *more]

    @property
    def n_exact(self) -> tuple[int, int]:
        """Tokens in the arrays of first and of recent tokens: they are apart once there are or were codes between them."""
        n_first, n_coded, n_tail = self.counts
        return (n_first, n_tail) if n_coded or self.n_dropped else (0, n_first + n_tail)


def check(ok: bool, expected: str, got: object) -> None:
    """Refuse a state."""
    if not ok:
        raise ValueError(f"[TurboQuantKVCache] state: expected {expected}, got {got}")


def read_header(arrays: Any) -> Header:
    """The header of a state, its numbers checked as far as they go without the arrays.

    Raises:
        ValueError: The arrays are not a state, are one of another version, or have numbers that no cache has.
    """
    check(isinstance(arrays, (list, tuple)) and len(arrays) > 0, "a list of arrays", type(arrays).__name__)
    for x in arrays:
        check(isinstance(x, mx.array), "a list of arrays", f"one with {type(x).__name__} in it")
    first = arrays[0]
    check(first.dtype == mx.int32 and first.ndim == 1, "an int32 header first", f"{first.shape} of {first.dtype}")
    ints: Any = first.tolist() if first.size <= 1 << 10 else []
    check(len(ints) >= 3 and ints[0] in (STATE_MAGIC, LATENT_MAGIC), "a tqext cache", "arrays of something else")
    versions = (STATE_VERSION, packed_format.VERSION)
    check((ints[1], ints[2]) == versions, f"state and format versions {versions}", (ints[1], ints[2]))
    check(len(ints) in (_HEADER_INTS, _HEADER_INTS + 1), f"a header of {_HEADER_INTS} numbers", len(ints))
    window = ints[22] if len(ints) > _HEADER_INTS else None
    key_bits, value_bits, qjl, rotation, means, tail, n_first, coding = ints[3:11]
    sizes, counts = [*ints[11:14], ints[17]], ints[14:17]
    balance, has_balance, max_size, n_dropped = ints[18:22]
    flags = (qjl, means, balance, has_balance)
    check(set(flags) <= {0, 1}, "flags of 0 or 1", flags)
    check(coding in range(len(_CODINGS)), "a known value coding", coding)
    check(rotation in range(len(ROTATIONS)), "a known rotation", rotation)
    check(min(sizes) >= 0, "sizes of at least 0", sizes)
    recipe = Recipe(
        key_bits=key_bits,
        value_bits=value_bits,
        value_coding=_CODINGS[coding],
        qjl=bool(qjl),
        rotation=ROTATIONS[rotation],
        means=bool(means),
        balance=bool(balance),
        tail=tail,
        first=n_first,
    )
    check_counts(counts, recipe, has_first=window is None or n_dropped == 0)
    check(recipe.balance or not has_balance, "no balance with a recipe without", has_balance)
    head_dim, value_dim, batch, n_kv_heads = sizes
    check(n_dropped >= 0, "dropped tokens", n_dropped)
    if window is None:
        least = recipe.first + recipe.tail + 2 * BLOCK
        check(max_size == 0 or max_size >= least, f"a bound of at least {least} tokens", max_size)
        check(n_dropped == 0 or (max_size > 0 and counts[0] == recipe.first), "dropped tokens if bounded", n_dropped)
        check(n_dropped % BLOCK == 0, f"whole blocks of {BLOCK} dropped tokens", n_dropped)
    else:
        check(window >= MIN_WINDOW, f"a window of at least {MIN_WINDOW} tokens", window)
        check(max_size == 0, "no other bound than the window", max_size)
        held = sum(counts)
        check(n_dropped == 0 or held >= window - 1, f"the last {window - 1} tokens", f"{held} of {held + n_dropped}")
    return Header(
        recipe,
        head_dim,
        value_dim,
        batch,
        n_kv_heads,
        (counts[0], counts[1], counts[2]),
        bool(has_balance),
        max_size or None,
        n_dropped,
        window,
        ints[0] == LATENT_MAGIC,
    )


def check_counts(counts: Sequence[int], recipe: Recipe, *, has_first: bool = True) -> None:
    """A cache of the recipe may have so many first, coded and recent tokens. `has_first`: no window has left the first ones."""
    check(min(counts) >= 0, "counts of tokens", counts)
    n_first, n_coded, n_tail = counts
    check(n_coded % BLOCK == 0, f"whole blocks of {BLOCK} coded tokens", n_coded)
    most_first = recipe.first if has_first else 0
    check(n_first == min(most_first, sum(counts)), f"the first {most_first} tokens exact", f"{n_first} of {sum(counts)}")
    most = recipe.tail + 2 * BLOCK - 1  # a block that is due, and as many tokens of a last short step
    check(n_tail <= most, f"at most {most} recent tokens", n_tail)


def check_arrays(arrays: Sequence[mx.array], header: Header, codec: Codec) -> None:
    """Every array has the shape and the type that the header implies.

    Args:
        arrays: Without the header. With tokens: codes, first keys and values, recent keys and values, any of them perhaps of no
            token. Then the balance, if there is one.
    """
    rows, dims = (header.batch, header.n_kv_heads), (header.head_dim, header.value_dim)
    expected: list[tuple[tuple[int, ...], mx.Dtype]] = []
    if sum(header.counts):
        most, step = packed_format.MAX_DIM, packed_format.DIM_STEP
        check(all(dim % step == 0 and 0 < dim <= most for dim in dims), f"head dimensions up to {most} by {step}", dims)
        n_parts = len(codec.per_row)
        n_arrays = n_parts + 4 + header.has_balance
        check(len(arrays) == n_arrays, f"{n_arrays} arrays after the header", len(arrays))
        dtypes = [x.dtype for x in arrays[n_parts + 2 : n_parts + 4]]
        check(all(dtype in FLOATS for dtype in dtypes), "recent tokens of a float type", dtypes)
        for template, per in zip(codec.empty(1, 1), codec.per_row, strict=True):
            expected.append(((*rows, header.counts[1] // per, template.shape[-1]), template.dtype))
        for n in header.n_exact:
            expected += [((*rows, n, dim), dtype) for dim, dtype in zip(dims, dtypes, strict=True)]
    if header.has_balance:
        expected.append(((header.n_kv_heads, header.head_dim), mx.float32))
    check(len(arrays) == len(expected), f"{len(expected)} arrays after the header", len(arrays))
    for x, (shape, dtype) in zip(arrays, expected, strict=True):
        check(x.shape == shape and x.dtype == dtype, f"{shape} of {dtype}", f"{x.shape} of {x.dtype}")


# Checksum. mlx-lm asks for the state after every chunk of a prompt, only to evaluate it. So the checksum is a lazy array, where
# the codes are, and the codes' part of it is a sum that grows with them: a CRC would have to go through all of them. On CPUs
# and CUDA `word_sum` does in one operation what takes about 15 for each array here.

_ROW, _WORD, _ARRAY = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D


def _uint(n: int) -> mx.array:
    return mx.array(n & 0xFFFFFFFF, mx.uint32)


def _mixed(words: mx.array) -> mx.array:
    """The finaliser of MurmurHash3 (Appleby): a bijection of 32-bit words in which every bit moves half of the others."""
    words = (words ^ (words >> 16)) * _uint(0x85EBCA6B)
    words = (words ^ (words >> 13)) * _uint(0xC2B2AE35)
    return words ^ (words >> 16)


@functools.lru_cache(maxsize=8)  # the layers of a model ask for the same ones
def _word_keys(spans: tuple[tuple[int, int, int], ...]) -> npt.NDArray[np.uint32]:
    keys = [(np.arange(begin, end, dtype=np.uint64) * _WORD + salt * _ARRAY).astype(np.uint32) for begin, end, salt in spans]
    return np.concatenate(keys)


def _row_words(x: mx.array) -> mx.array:
    """uint32 ``[rows, words of a row]``; the rows are heads of sequences, or of the balance."""
    rows = x.shape[0] * x.shape[1] if x.ndim == 4 else x.shape[0] if x.ndim else 1
    flat = x.reshape(rows, -1)
    if x.dtype.size == 4:
        return flat.view(mx.uint32)
    return flat.view(mx.uint32) if flat.shape[1] % 2 == 0 else flat.view(mx.uint16).astype(mx.uint32)


def sum_of(arrays: Sequence[mx.array], begin: Sequence[int] = (), first: int = 1, previous: mx.array | None = None) -> mx.array:
    """uint32 ``[1]``: the sum of all words, each mixed with its place, modulo 2**32.

    One damaged word is always seen; several, or words that changed places, with a chance of all but 2**-32.

    Args:
        arrays: ``[B, H, n, words]`` with as many rows each, or any with at least one axis.
        begin: Where each array begins on its token axis; default: at 0.
        first: The place of the first array in the state.
        previous: Is added: the sum of other arrays.
    """
    found = word_sum(list(arrays), list(begin), first, 0, previous)
    if found is not None:
        return found
    total = _composed_sum(arrays, begin, first)
    return total if previous is None else total + previous


def _composed_sum(arrays: Sequence[mx.array], begin: Sequence[int] = (), first: int = 1) -> mx.array:
    """`sum_of` by MLX's own operations."""
    words, spans = [], []
    for i, x in enumerate(arrays):
        row_words = _row_words(x)
        start = (begin[i] * row_words.shape[1] // x.shape[2]) if begin else 0
        words.append(row_words)
        spans.append((start, start + row_words.shape[1], first + i))
    rows = mx.arange(words[0].shape[0], dtype=mx.uint32)[:, None] * _uint(_ROW)
    keys = rows + mx.array(_word_keys(tuple(spans)))
    joined = words[0] if len(words) == 1 else mx.concatenate(words, axis=1)
    return _mixed(joined ^ keys).sum().reshape(1)


@functools.lru_cache(maxsize=8)
def _number_sum(numbers: tuple[int, ...]) -> int:
    """The part of the header's numbers: each is a row of the array at place 0."""
    words = np.array(numbers, np.int32).view(np.uint32)
    words ^= np.arange(len(words), dtype=np.uint32) * np.uint32(_ROW)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        words = (words ^ (words >> np.uint32(shift))) * np.uint32(factor)
    return int((words ^ (words >> np.uint32(16))).sum(dtype=np.uint32))


def checksum(numbers: Sequence[int], arrays: Sequence[mx.array], begin: int = 1, previous: mx.array | None = None) -> mx.array:
    """uint32 ``[1]``: of the header's numbers and of the arrays whose first has the place `begin`; empty ones do not count.

    `previous` is added: the sum of other arrays.
    """
    constant = _number_sum(tuple(numbers))
    found = word_sum(list(arrays), [], begin, constant, previous)
    if found is not None:
        return found
    total = _uint(constant).reshape(1) if previous is None else _uint(constant) + previous
    for i, x in enumerate(arrays, begin):
        if x.size:
            total = total + _composed_sum([x], first=i)
    return total


def header_array(numbers: Sequence[int], total: mx.array) -> mx.array:
    """The numbers and the checksum as the first array of a state."""
    return mx.concatenate([mx.array(list(numbers), mx.int32), total.view(mx.int32)])


def header_of(numbers: Sequence[int], arrays: Sequence[mx.array], begin: int, previous: mx.array | None) -> mx.array:
    """`header_array` with the `checksum`, in one operation where there is one."""
    found = word_sum(list(arrays), [], begin, _number_sum(tuple(numbers)), previous, list(numbers))
    return header_array(numbers, checksum(numbers, arrays, begin, previous)) if found is None else found


def check_checksum(arrays: Sequence[mx.array]) -> None:
    """The last number of the header is the checksum of all else."""
    numbers: Any = arrays[0].tolist()
    *numbers, stored = numbers
    found = checksum(numbers, arrays[1:]).view(mx.int32).item()
    check(found == stored, f"arrays with the checksum {stored} (the file is damaged)", found)

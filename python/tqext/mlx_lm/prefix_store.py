"""Caches of prompts on disk: the beginning of a prompt that was seen before is read instead of computed.

A prompt is cut where the cache itself cuts it: the exact first tokens, then blocks of 64 coded tokens. Each part is an entry
whose key is a hash of its tokens and of the key before it, so prompts with a common beginning share entries. What comes after
the last whole block, and the caches of layers that do not keep tokens, can be stored as an end: then a prompt goes on exactly
where it was.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import queue
import struct
import threading
import weakref
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.cache as mlx_lm_cache
import numpy as np
import numpy.typing as npt

from tqext._ext import format as packed_format
from tqext.calibration import fingerprint
from tqext.entry_store import BLOCK_KIND, END_KIND, VERSION, Entry, EntryStore, now
from tqext.kv.cache import TurboQuantKVCache
from tqext.kv.codec import Codec
from tqext.kv.latent import LatentCodec, TurboQuantLatentCache
from tqext.kv.schedule import BLOCK
from tqext.kv.state import STATE_VERSION
from tqext.kv.tokens import Exact
from tqext.kv.window import TurboQuantWindowKVCache
from tqext.mlx_lm.caches import KEY, check_model, members, replaced
from tqext.mlx_lm.packages import AnyModel
from tqext.presets import Recipe
from tqext.protocols import Cache
from tqext.ranks import Ranks

DEFAULT_BYTES = 20 * 10**9
# Bytes that wait to be written. Of a prompt that is larger the rest is stored when it is next saved.
MAX_PENDING = 1 << 30
ID_BYTES = 4096
COMPRESSED, PLAIN, STATE = "compressed", "plain", "state"
_LENGTH = struct.Struct("<I")

Array = npt.NDArray[Any]


class _Layer(NamedTuple):
    """A layer's cache as entries describe it; the sizes of a `STATE` are 0, its types empty."""

    path: str
    kind: str
    n_kv_heads: int = 0
    head_dim: int = 0
    value_dim: int = 0
    key_dtype: str = ""
    value_dtype: str = ""

    def exact(self, n: int) -> list[tuple[tuple[int, ...], str]]:
        """Shapes and types of the keys and values of n tokens."""
        rows = (1, self.n_kv_heads, n)
        return [((*rows, self.head_dim), self.key_dtype), ((*rows, self.value_dim), self.value_dtype)]


@functools.lru_cache(maxsize=64)
def _row_shapes(recipe: Recipe, head_dim: int, value_dim: int, rope_dtype: str | None) -> tuple[tuple[int, int, str], ...]:
    """Tokens per row, width and type of each packed array; ``rope_dtype``: of the rotary keys beside latents."""
    codec = Codec(recipe, head_dim, value_dim)
    if rope_dtype is not None:
        codec = LatentCodec(recipe, head_dim, value_dim, rope_dtype=getattr(mx, rope_dtype))
    empty = codec.empty(1, 1)
    return tuple((per, x.shape[-1], _dtype_name(x.dtype)) for per, x in zip(codec.per_row, empty, strict=True))


def _dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]


def _numpy_dtype(name: str) -> np.dtype[Any]:
    return np.dtype("uint16" if name == "bfloat16" else "bool" if name == "bool_" else name)


def _to_numpy(x: mx.array) -> Array:
    return np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)


def _to_mlx(x: Array, dtype: str) -> mx.array:
    out = mx.array(x)
    return out.view(mx.bfloat16) if dtype == "bfloat16" else out


class _Kinds:
    """What becomes of each layer of a prompt cache in the store.

    Raises:
        ValueError: A cache that cannot be stored.
    """

    def __init__(self, op: str, caches: Sequence[Cache]) -> None:
        self.op = op
        self.caches: list[tuple[str, Any]] = list(members(caches))  # of the classes that the kinds say
        self.kinds = {path: self._kind(path, cache) for path, cache in self.caches}
        firsts = {c.recipe.first for c in self.of(COMPRESSED).values()}
        if len(firsts) > 1:
            raise ValueError(f"[{op}] cache: expected one number of exact first tokens in all layers, got {sorted(firsts)}")
        if not self.of(COMPRESSED) and not self.of(PLAIN):
            raise ValueError(f"[{op}] cache: expected a layer that keeps keys and values of every token, got none")
        self.first = firsts.pop() if firsts else 0
        self.needs_end = bool(self.of(STATE))

    def of(self, kind: str) -> dict[str, Any]:
        """By path: of one class, `TurboQuantKVCache` or mlx-lm's ``KVCache``, unless they are of the kind `STATE`."""
        return {path: cache for path, cache in self.caches if self.kinds[path] == kind}

    def _kind(self, path: str, cache: Cache) -> str:
        if isinstance(cache, TurboQuantWindowKVCache):
            return STATE
        if isinstance(cache, TurboQuantKVCache):
            if cache.max_size is not None:
                raise ValueError(f"[{self.op}] cache: expected caches that keep every token, got max_size at layer {path}")
            return COMPRESSED
        if type(cache) is mlx_lm_cache.KVCache:
            return PLAIN
        cls = type(cache)
        own = cls.__module__ == mlx_lm_cache.__name__ and not cls.__name__.startswith("Batch")
        if not own or cls is mlx_lm_cache.QuantizedKVCache:
            raise ValueError(f"[{self.op}] cache: expected compressed caches or mlx-lm's, got {cls.__name__} at layer {path}")
        return STATE

    def space(self, model_hash: str, part: list[Any] | None) -> bytes:
        """A hash of all that decides what stored bytes mean; `part`: that of the model which a rank has, None if all."""
        layers = []
        for path, cache in self.caches:
            how: Any = None
            if isinstance(cache, TurboQuantKVCache):
                balance = None if cache.balance is None else hashlib.sha256(np.array(cache.balance).tobytes()).hexdigest()
                how = [dataclasses.asdict(cache.recipe), balance]
                how += [cache.window] if isinstance(cache, TurboQuantWindowKVCache) else []
            layers.append([path, type(cache).__name__, self.kinds[path], how])
        what = [VERSION, packed_format.VERSION, STATE_VERSION, model_hash, layers, *([] if part is None else [part])]
        text = json.dumps(what, sort_keys=True)
        return hashlib.sha256(text.encode()).digest()

    # Places

    def begins(self, n: int) -> list[int]:
        """Where the parts of n tokens begin, and where the last whole one ends."""
        leading = [0] if self.first else []
        return leading + list(range(self.first, max(self.first, n) + 1, BLOCK)) if n >= self.first else [0]

    def n_tokens(self, tokens: Sequence[int]) -> int:
        """Tokens that all layers hold, of these."""
        held = [c.offset for kind in (COMPRESSED, PLAIN) for c in self.of(kind).values()]
        return min(len(tokens), *held)

    def n_stored(self, n: int) -> int:
        """Tokens in whole blocks, the first ones included: as many as the compressed layers have encoded."""
        coded = {c.n_coded for c in self.of(COMPRESSED).values()}
        if len(coded) > 1:
            raise ValueError(f"[{self.op}] cache: expected as many coded tokens in all layers, got {sorted(coded)}")
        n_coded = min([max(0, n - self.first) // BLOCK * BLOCK, *coded])
        return self.first + n_coded if n_coded else 0


def _link(parent: bytes, tokens: Sequence[int], what: bytes) -> bytes:
    return hashlib.sha256(what + parent + np.array(tokens, "<i8").tobytes()).digest()


def _chain(space: bytes, tokens: Sequence[int], begins: Sequence[int]) -> list[bytes]:
    """The keys of the parts of tokens."""
    keys, parent = [], space
    for begin, end in itertools.pairwise(begins):
        parent = _link(parent, tokens[begin:end], b"block")
        keys.append(parent)
    return keys


class _Job(NamedTuple):
    """Entries that are to be written.

    Attributes:
        entries: With the parts of their payloads, in the order of the tokens.
        used: Keys of entries that are there already, and are used.
        stamp: When.
        nbytes: Of all payloads.
    """

    entries: list[tuple[Entry, list[memoryview]]]
    used: list[bytes]
    stamp: int
    nbytes: int


class PrefixStore:
    """Caches of prompts in a folder, which survive the process; see docs/prefix_store.md.

    Several processes of one user may share a folder. What is written is written in the background.

    Args:
        path: The folder. It is made if it is not there; what is in it can be read by its owner alone.
        max_bytes: Of all entries together. Beyond it those go that were not used for the longest time.

    Raises:
        ValueError: The folder cannot be made or is another user's, or the bound is below 1 MB.
    """

    COUNTERS = ("hits", "misses", "restored_tokens", "skipped_tokens", *EntryStore.COUNTERS)

    def __init__(self, path: str | Path, *, max_bytes: int = DEFAULT_BYTES) -> None:
        if not isinstance(path, (str, Path)):
            raise ValueError(f"[PrefixStore] path: expected a folder's name, got {type(path).__name__}")
        if max_bytes < 1 << 20:
            raise ValueError(f"[PrefixStore] max_bytes: expected at least {1 << 20}, got {max_bytes}")
        self.path = Path(path)
        self._entries = EntryStore(self.path, max_bytes)
        self._counts = dict.fromkeys(("hits", "misses", "restored_tokens", "skipped_tokens"), 0)
        self._models: dict[int, tuple[weakref.ref[AnyModel], object, str, Ranks]] = {}
        self._lock = threading.Lock()
        self._pending: set[bytes] = set()
        self._pending_bytes = 0
        self._jobs: queue.SimpleQueue[_Job | threading.Event | None] = queue.SimpleQueue()
        self._writer: threading.Thread | None = threading.Thread(target=self._write, name="tqext-prefix-write", daemon=True)
        self._writer.start()
        atexit.register(self.close)

    def __repr__(self) -> str:
        if self._writer is None:
            return f"PrefixStore({str(self.path)!r}, closed)"
        nbytes, n = self._entries.totals()
        return f"PrefixStore({str(self.path)!r}, {n} entries, {nbytes / 1e6:.1f} MB)"

    def __enter__(self) -> PrefixStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what waits, and give the folder back."""
        atexit.unregister(self.close)
        writer, self._writer = self._writer, None
        if writer is not None:
            self._jobs.put(None)
            writer.join()
            self._entries.close()

    def flush(self) -> None:
        """Wait until everything that was saved is on disk."""
        if self._writer is not None:
            done = threading.Event()
            self._jobs.put(done)
            done.wait()

    def stats(self) -> dict[str, int]:
        """`COUNTERS` of this process, and ``bytes``, ``entries`` and ``max_bytes`` of the folder."""
        nbytes, n = self._entries.totals()
        sizes = {"bytes": nbytes, "entries": n, "max_bytes": self._entries.max_bytes}
        return {**self._counts, **self._entries.counts, **sizes}

    def _known(self, model: AnyModel) -> tuple[str, Ranks]:
        """The model's fingerprint, and the processes that hold it."""
        attachment = vars(model).get(KEY)
        known = self._models.get(id(model))
        if known is None or known[0]() is not model or known[1] is not attachment:
            known = self._models[id(model)] = (weakref.ref(model), attachment, fingerprint(model), Ranks(model))
        return known[2:]

    # Reading

    def fetch(
        self, model: AnyModel, tokens: Sequence[int], *, like: Sequence[Cache] | None = None, beyond: int = 0
    ) -> tuple[list[Any] | None, int]:
        """A cache that holds the beginning of a prompt.

        Args:
            model: The model that it is for.
            tokens: The prompt. At least its last token is left to be computed.
            like: A prompt cache without tokens, of the kind that is wanted. Default: what mlx-lm makes for the model.
            beyond: Nothing that holds no more than so many tokens is of use.

        Of a model that several processes hold all of them have to call this, with the same tokens: each restores its part from
        its own entries, as many tokens as all of them have.

        Returns:
            The cache and how many of the tokens it holds; None and 0 if nothing of use is stored.

        Raises:
            ValueError: A cache that cannot be stored, on this rank or on another, or ranks with other tokens.
        """
        check_model("PrefixStore.fetch", model)
        model_hash, ranks = self._known(model)
        tokens = _countable(tokens)[: max(0, len(tokens) - 1)]
        refusal: ValueError | None = None
        try:
            empty = list(mlx_lm_cache.make_prompt_cache(cast(nn.Module, model)) if like is None else like)
            kinds = _Kinds("PrefixStore.fetch", empty)
        except ValueError as error:
            refusal = error
        if not ranks.all(refusal is None):
            raise refusal or ValueError("[PrefixStore.fetch] cache: expected one that can be stored on all ranks, got another")
        if not ranks.agree([len(tokens), zlib.crc32(np.array(tokens, "<i8").tobytes()) >> 1]):
            raise ValueError("[PrefixStore.fetch] tokens: expected the same on all ranks, got others")
        begins = kinds.begins(len(tokens))
        keys = _chain(kinds.space(model_hash, ranks.place), tokens, begins)
        places = {n: end for n, end in self._places(kinds, keys, begins, tokens).items() if n > beyond}
        found = None
        while found is None and (n := _longest(places, len(tokens), ranks)):
            found = self._restored(empty, kinds, keys, begins, n, places[n])
            n_got = found[1] if found else 0
            # Without an end all places up to what was read are left; one that is damaged leaves all places before it.
            most = n - 1 if places[n] is not None else min(n - 1, n_got)
            places = {m: end for m, end in places.items() if m <= most}
            if ranks.least(n_got) < n and (ranks.n > 1 or n_got <= beyond):
                found = None  # parts are damaged, here or elsewhere
        with self._lock:
            if found is not None:
                self._counts["hits"] += 1
                self._counts["restored_tokens"] += found[1]
            elif beyond == 0:
                self._counts["misses"] += 1
        return found or (None, 0)

    def _places(
        self, kinds: _Kinds, keys: Sequence[bytes], begins: Sequence[int], tokens: Sequence[int]
    ) -> dict[int, tuple[int, bytes, int] | None]:
        """How many of these tokens can be restored: with an end (see `_ends`), or None from blocks alone."""
        known = self._entries.known(keys)
        n_known = next((i for i, key in enumerate(keys) if key not in known), len(keys))
        places: dict[int, tuple[int, bytes, int] | None] = {}
        if not kinds.needs_end:
            places = dict.fromkeys(n for n in begins[: n_known + 1] if n > kinds.first)
        for end in self._ends(keys[:n_known], begins, tokens):
            places[begins[end[0]] + end[2]] = end
        return places

    def _ends(self, keys: Sequence[bytes], begins: Sequence[int], tokens: Sequence[int]) -> list[tuple[int, bytes, int]]:
        """The ends of prompts that these tokens begin with: parts before it, key, tokens."""
        place = {key: i + 1 for i, key in enumerate(keys)}
        found = []
        for key, parent, n in self._entries.ends(keys):
            i = place[parent]
            if begins[i] + n <= len(tokens) and _link(parent, tokens[begins[i] : begins[i] + n], b"end") == key:
                found.append((i, key, n))
        return found

    def _restored(
        self,
        empty: Sequence[Cache],
        kinds: _Kinds,
        keys: Sequence[bytes],
        begins: Sequence[int],
        n: int,
        end: tuple[int, bytes, int] | None,
    ) -> tuple[list[Any], int] | None:
        """The cache of n tokens, perhaps with an end; of fewer, if parts are damaged and there is no end."""
        n_parts = end[0] if end else list(begins).index(n)
        used = [*([end[1]] if end else []), *keys[:n_parts]]
        try:
            found = self._put_together(empty, kinds, used, begins[: n_parts + 1], end)
        except (ValueError, LookupError, TypeError, AttributeError, struct.error):
            # Whole files, but not what this version writes under these keys: nobody has a use for them.
            logging.warning("prefix store: entries with other contents than their keys say were dropped")
            self._entries.discard(used)
            return None
        if found is not None:
            self._enqueue(_Job([], used[: len(used) - n_parts + found[2]], now(), 0))
        return found and found[:2]

    def _put_together(
        self,
        empty: Sequence[Cache],
        kinds: _Kinds,
        keys: Sequence[bytes],
        begins: Sequence[int],
        end: tuple[int, bytes, int] | None,
    ) -> tuple[list[Any], int, int] | None:
        """The cache, its tokens, and the parts that it is made of; the key of the end comes first."""
        tail = None
        if end is not None:
            tail = next(self._entries.read(keys[:1]), None)
            if tail is None:
                return None
            keys = keys[1:]
        reader = _Reader(kinds, begins)
        for key, payload in zip(keys, self._entries.read(keys), strict=False):  # which ends at one that is damaged
            reader.take(key, payload)
        if reader.n_coded == 0 or (end is not None and reader.n_taken < len(keys)):
            return None
        n_tail = end[2] if end else 0
        return reader.caches(empty, tail, n_tail), begins[reader.n_taken] + n_tail, reader.n_taken

    # Writing

    def save(self, model: AnyModel, tokens: Sequence[int], cache: Sequence[Cache], *, end: bool | None = True) -> int:
        """Store what a cache holds of a prompt; nothing of it is kept, and what is stored already is not written again.

        Args:
            model: The model.
            tokens: What the cache was computed from, in order.
            cache: A prompt cache of one sequence.
            end: Also store the exact recent tokens, so that this very prompt goes on as if it had not been interrupted. They
                take as much as some hundred coded tokens. Without them the last 64 to 191 tokens are computed again.
                Layers that do not keep every token (recurrent ones, sliding windows) are restored at such ends alone;
                None stores an end where there are such layers.

        Returns:
            The number of tokens that are stored or wait for it.

        Raises:
            ValueError: A cache that cannot be stored.
        """
        check_model("PrefixStore.save", model)
        kinds = _Kinds("PrefixStore.save", cache)
        plain = _countable(tokens)
        n = kinds.n_tokens(plain)
        n_stored = kinds.n_stored(n)
        if n_stored == 0:
            return 0
        begins = kinds.begins(n_stored)
        model_hash, ranks = self._known(model)
        space = kinds.space(model_hash, ranks.place)
        keys = _chain(space, plain, begins)
        with self._lock:
            known = self._entries.known(keys) | self._pending
        at = next((i for i, key in enumerate(keys) if key not in known), len(keys))
        writer = _Writer(kinds)
        entries: list[tuple[Entry, list[memoryview]]] = []
        room, nbytes, done = MAX_PENDING - self._pending_bytes, 0, len(keys)
        for i, parts in enumerate(writer.blocks(begins, at) if at < len(keys) else [], at):
            if keys[i] in known:
                continue
            size = sum(map(len, parts))
            if size > room - nbytes:
                done = i
                break
            nbytes += size
            parent = keys[i - 1] if i else space
            entries.append((Entry(keys[i], parent, space, BLOCK_KIND, begins[i], begins[i + 1] - begins[i]), parts))
        n_done = begins[done]
        if done < len(keys):
            with self._lock:
                self._counts["skipped_tokens"] += n_stored - n_done
        elif (kinds.needs_end if end is None else end) and n == len(tokens):
            key = _link(keys[-1], plain[n_stored:], b"end")
            n_done = n
            if self._entries.known([key]) or key in self._pending:
                known.add(key)
                keys.append(key)
            else:
                parts = writer.end(n_stored, n)
                nbytes += sum(map(len, parts))
                entries.append((Entry(key, keys[-1], space, END_KIND, n_stored, n - n_stored), parts))
        self._enqueue(_Job(entries, [key for key in keys if key in known], now(), nbytes))
        return n_done

    def _enqueue(self, job: _Job) -> None:
        with self._lock:
            self._pending.update(entry.key for entry, _ in job.entries)
            self._pending_bytes += job.nbytes
        self._jobs.put(job)

    def _write(self) -> None:
        while (job := self._jobs.get()) is not None:
            if isinstance(job, threading.Event):
                job.set()
                continue
            try:
                if job.used:
                    self._entries.touch(job.used, job.stamp)
                for entry, parts in job.entries:
                    if not self._entries.write(entry, parts, job.stamp):
                        break
            except Exception:  # the next job may be written, and whoever waits for this one goes on
                logging.exception("prefix store: a prompt was not written")
                self._entries.count("errors")
            finally:
                with self._lock:
                    self._pending.difference_update(entry.key for entry, _ in job.entries)
                    self._pending_bytes -= job.nbytes


def _longest(places: Collection[int], n_tokens: int, ranks: Ranks) -> int:
    """The largest number of tokens that all ranks can restore, 0 if there is none."""
    if ranks.n == 1:
        return max(places, default=0)
    flags = np.zeros(n_tokens + 1, np.int32)
    flags[list(places)] = 1
    return int(np.flatnonzero(np.array(ranks.sums(flags)) == ranks.n).max(initial=0))


def _countable(tokens: Sequence[int]) -> list[int]:
    """The tokens before the first that is none: mlx-lm numbers images below zero, and they are not to be cut."""
    listed: Any = tokens.tolist() if isinstance(tokens, (mx.array, np.ndarray)) else tokens
    out = [int(token) for token in listed]
    return out[: next((i for i, token in enumerate(out) if token < 0), len(out))]


# Payloads: a description in JSON, then the arrays as they are


def _payload(description: dict[str, Any], arrays: Sequence[Array]) -> list[memoryview]:
    text = json.dumps(description, separators=(",", ":")).encode()
    views = [np.ascontiguousarray(x).data.cast("B") for x in arrays if x.size]
    return [memoryview(_LENGTH.pack(len(text)) + text), *views]


def _opened(payload: memoryview) -> tuple[bytes, memoryview]:
    """The description and the bytes of the arrays."""
    (n,) = _LENGTH.unpack(payload[: _LENGTH.size])
    return bytes(payload[_LENGTH.size : _LENGTH.size + n]), payload[_LENGTH.size + n :]


class _Writer:
    """Makes payloads of a prompt cache."""

    def __init__(self, kinds: _Kinds) -> None:
        self.kinds = kinds

    def _layers(self) -> list[_Layer]:
        out = []
        for path, cache in self.kinds.caches:
            kind = self.kinds.kinds[path]
            if kind == STATE:
                out.append(_Layer(path, kind))
                continue
            keys, values = cache.exact_parts()[1] if kind == COMPRESSED else (cache.keys, cache.values)
            if keys.shape[0] != 1:
                raise ValueError(f"[{self.kinds.op}] cache: expected one sequence, got {keys.shape[0]} at layer {path}")
            dims = (keys.shape[1], keys.shape[3], values.shape[3])
            out.append(_Layer(path, kind, *dims, _dtype_name(keys.dtype), _dtype_name(values.dtype)))
        return out

    def blocks(self, begins: Sequence[int], at: int) -> Iterator[list[memoryview]]:
        """The payloads of the parts from the one numbered `at` on.

        The arrays of all of them are fetched at once: a graph of some arrays a layer, however many blocks there are.
        """
        description = {"layers": self._layers()}
        first = self.kinds.first
        if first and at == 0:
            arrays: list[mx.array] = []
            for path, cache in self.kinds.caches:
                kind = self.kinds.kinds[path]
                if kind == COMPRESSED:
                    arrays += cache.exact_parts()[0] or ()
                elif kind == PLAIN:
                    arrays += (x[:, :, :first] for x in (cache.keys, cache.values))
            mx.eval(arrays)
            yield _payload(description, [_to_numpy(x) for x in arrays])
            at = 1
        begin, end = begins[at], begins[-1]
        n = (end - begin) // BLOCK
        arrays = []
        for path, cache in self.kinds.caches:
            kind = self.kinds.kinds[path]
            if kind == COMPRESSED:
                arrays += cache.coded_parts(begin - first, end - first)
            elif kind == PLAIN:
                arrays += (x[:, :, begin:end] for x in (cache.keys, cache.values))
        mx.eval(arrays)
        whole = [_to_numpy(x) for x in arrays]
        for i in range(n):
            rows = [x.shape[2] // n for x in whole]
            yield _payload(description, [x[:, :, i * r : (i + 1) * r] for x, r in zip(whole, rows, strict=True)])

    def end(self, begin: int, end: int) -> list[memoryview]:
        """The payload of what comes after the blocks."""
        arrays: list[mx.array] = []
        states: dict[str, Any] = {}
        for path, cache in self.kinds.caches:
            kind = self.kinds.kinds[path]
            if kind == COMPRESSED:
                arrays += cache.exact_parts()[1]
            elif kind == PLAIN:
                arrays += (x[:, :, begin:end] for x in (cache.keys, cache.values))
            else:
                meta = getattr(cache, "meta_state", None)  # of mlx-lm up to 0.31.3
                states[path] = [_tree(cache.state, arrays), _tree(meta, arrays)]
        mx.eval(arrays)
        return _payload({"layers": self._layers(), "states": states}, [_to_numpy(x) for x in arrays])


def _tree(x: Any, arrays: list[mx.array]) -> Any:
    """A cache's state as JSON, its arrays by type and shape; they are added to the list in their order."""
    if isinstance(x, mx.array):
        arrays.append(x)
        return {"array": [_dtype_name(x.dtype), list(x.shape)]}
    if isinstance(x, (list, tuple)):
        return {"tuple" if isinstance(x, tuple) else "list": [_tree(y, arrays) for y in x]}
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    raise ValueError(f"[PrefixStore.save] cache: expected a state of arrays and numbers, got {type(x).__name__} in it")


class _Arrays:
    """Takes arrays off a payload, one after another."""

    def __init__(self, content: memoryview) -> None:
        self.content = content
        self.at = 0

    def take(self, shape: Sequence[int], dtype: str) -> Array:
        numpy_dtype = _numpy_dtype(dtype)
        n = int(np.prod(shape, dtype=np.int64))
        out = np.frombuffer(self.content, numpy_dtype, n, self.at) if n else np.zeros(0, numpy_dtype)
        self.at += n * numpy_dtype.itemsize
        return out.reshape(shape)

    def finish(self) -> None:
        """Nothing is left."""
        if self.at != len(self.content):
            raise ValueError(f"{len(self.content)} bytes of arrays, of which the description names {self.at}")

    def untree(self, x: Any) -> Any:
        if not isinstance(x, dict):
            return x
        if "array" in x:
            dtype, shape = x["array"]
            return _to_mlx(self.take(shape, dtype), dtype)
        items = [self.untree(y) for y in (x["tuple"] if "tuple" in x else x["list"])]
        return tuple(items) if "tuple" in x else items


class _Reader:
    """Puts the payloads of a prompt's parts together.

    Attributes:
        n_taken: Parts so far.
    """

    def __init__(self, kinds: _Kinds, begins: Sequence[int]) -> None:
        self.kinds = kinds
        self.begins = begins
        self.n_taken = 0
        self.layers: list[_Layer] = []
        self._description = b""
        self._first: dict[str, list[Array]] = {}
        self._whole: dict[str, list[Array]] = {}  # with room for all blocks
        self._chain = b""
        self._ids: list[int] = []

    @property
    def n_coded(self) -> int:
        return max(0, self.begins[self.n_taken] - self.kinds.first)

    def take(self, key: bytes, payload: memoryview) -> None:
        """The next part, and its key.

        Raises:
            ValueError: It does not fit those before, or the caches.
        """
        description, content = _opened(payload)
        if not self.layers:
            found = json.loads(description)["layers"]
            self.layers, self._description = [_Layer(*layer) for layer in found], description
            if {layer.path: layer.kind for layer in self.layers} != self.kinds.kinds:
                raise ValueError("a description of other layers")
            n = self.begins[-1] - self.kinds.first
            self._whole = {x.path: [np.empty(s, _numpy_dtype(d)) for s, d in self._block_shapes(x, n)] for x in self.layers}
        if description != self._description:
            raise ValueError("another description than that of the parts before")
        arrays = _Arrays(content)
        # Caches that are read from the same files may share them. The same tokens can have been computed twice, and differ in
        # the last bits: the end of a payload, of the last layer, tells.
        self._chain = hashlib.sha256(self._chain + key + payload[-ID_BYTES:]).digest()
        begin, end = self.begins[self.n_taken], self.begins[self.n_taken + 1]
        if begin < self.kinds.first:
            for layer in self.layers:
                if layer.kind != STATE:
                    self._first[layer.path] = [arrays.take(*x).copy() for x in layer.exact(end - begin)]
        else:
            i = (begin - self.kinds.first) // BLOCK
            for layer in self.layers:
                for whole, (shape, dtype) in zip(self._whole[layer.path], self._block_shapes(layer, BLOCK), strict=True):
                    rows = shape[2]
                    whole[:, :, i * rows : (i + 1) * rows] = arrays.take(shape, dtype)
            self._ids.append(-1 - (int.from_bytes(self._chain[:8], "big") >> 1))  # those made here are above 0
        arrays.finish()
        self.n_taken += 1

    def _block_shapes(self, layer: _Layer, n: int) -> list[tuple[tuple[int, ...], str]]:
        if layer.kind == STATE:
            return []
        if layer.kind == PLAIN:
            return layer.exact(n)
        cache = self.kinds.of(COMPRESSED)[layer.path]
        rows = _row_shapes(cache.recipe, layer.head_dim, layer.value_dim, layer.value_dtype if cache.is_latent else None)
        return [((1, layer.n_kv_heads, n // per, width), dtype) for per, width, dtype in rows]

    def caches(self, empty: Sequence[Cache], tail: memoryview | None, n_tail: int) -> list[Any]:
        """Caches that hold the parts, and the end if there is one."""
        states: dict[str, Any] = {}
        rest = _Arrays(memoryview(b""))
        if tail is not None:
            description, content = _opened(tail)
            states = json.loads(description)["states"]
            rest = _Arrays(content)
        by_path = {layer.path: layer for layer in self.layers}

        def new(path: str, cache: Any) -> Cache:
            layer = by_path[path]
            if layer.kind == STATE:
                state, meta = (rest.untree(x) for x in states[path])
                cls = type(cache)
                out = cls.from_state(state) if meta is None else cls.from_state(state, meta)
                if isinstance(out, TurboQuantWindowKVCache):
                    out.shared = cache.shared
                return out
            recent = [rest.take(*x) for x in layer.exact(n_tail)]
            if layer.kind == PLAIN:
                return self._plain(layer, recent)
            out = TurboQuantKVCache(cache.recipe, balance=cache.balance, shared=cache.shared)
            if cache.is_latent:
                out = TurboQuantLatentCache(cache.recipe, shared=cache.shared)
            names = (layer.key_dtype, layer.value_dtype)
            first = self._exact(self._first[path], names) if self.kinds.first else None
            whole = zip(self._whole[path], self._block_shapes(layer, self.n_coded), strict=True)
            packed = [_to_mlx(x[:, :, : shape[2]], dtype) for x, (shape, dtype) in whole]
            ids = np.array(self._ids[: self.n_coded // BLOCK], np.int64)
            out.fill(packed, first, self._exact(recent, names), ids)
            return out

        caches = replaced(empty, new)
        rest.finish()
        return caches

    @staticmethod
    def _exact(arrays: Sequence[Array], names: Sequence[str]) -> Exact:
        return Exact(*(_to_mlx(x, name) for x, name in zip(arrays, names, strict=True)))

    def _plain(self, layer: _Layer, recent: Sequence[Array]) -> Cache:
        cache: Any = mlx_lm_cache.KVCache()
        parts = []
        for i, whole in enumerate(self._whole[layer.path]):
            pieces = [*([self._first[layer.path][i]] if self.kinds.first else []), whole[:, :, : self.n_coded], recent[i]]
            parts.append(np.concatenate(pieces, axis=2))
        keys, values = parts
        cache.keys, cache.values = _to_mlx(keys, layer.key_dtype), _to_mlx(values, layer.value_dtype)
        cache.offset = cast(int, keys.shape[2])
        return cache

"""Random calls of every operator, compared with float64 (tests/reference.py), on one instruction set.

Arrays are laid out in every way that a view can have, and what surrounds them holds NaN and set bits. A sixth of the calls are
wrong in one thing and must be refused. A case is decided by its number alone:

    TQEXT_ISA=avx2 python tests/fuzz_operators.py --cases 10000
    TQEXT_ISA=avx2 python tests/fuzz_operators.py --first 1234 --cases 1
"""

import argparse
import collections
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the reference's products: they are small
os.environ.setdefault("MLX_ENABLE_TF32", "0")  # too coarse for a comparison of fp32

import mlx.core as mx
import numpy as np

import reference
import tqext
from support import DTYPES, matrix, on_cuda, reference_keys, reference_values, to_numpy

BLOCK = 64
SPREAD = 2.0  # standard deviation of scores, about
# Error relative to (1 + largest score) * largest value: fp32 sums and a 16-bit query; then one rounding to the result's type,
# and the exact tokens' products in the query's type.
TOLERANCE = {mx.float32: 3e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}


class Mismatch(AssertionError):
    pass


# ---- layouts --------------------------------------------------------------------------------------


def filler(dtype):
    return 0xFFFFFFFF if dtype == mx.uint32 else np.nan if mx.issubdtype(dtype, mx.floating) else True


def laid_out(rng, x):
    """An array equal to x, in some layout; what it does not own is filled."""
    if x.size == 0 or x.ndim == 0:
        return x
    kind = rng.integers(8)
    fill = filler(x.dtype)
    if kind == 0:  # in a larger buffer, on some axes
        before, after = rng.integers(0, 3, (2, x.ndim))
        buffer = mx.full([int(b + n + a) for b, n, a in zip(before, x.shape, after, strict=True)], fill, dtype=x.dtype)
        where = tuple(slice(int(b), int(b) + n) for b, n in zip(before, x.shape, strict=True))
        buffer[where] = x
        return buffer[where]
    if kind == 1:  # other order of axes
        order = [int(i) for i in rng.permutation(x.ndim)]
        return mx.contiguous(x.transpose(order)).transpose([int(i) for i in np.argsort(order)])
    if kind == 2:  # every second
        axis = int(rng.integers(x.ndim))
        shape = list(x.shape)
        shape[axis] *= 2
        buffer = mx.full(shape, fill, dtype=x.dtype)
        where = (slice(None),) * axis + (slice(None, None, 2),)
        buffer[where] = x
        return buffer[where]
    if kind == 3:  # backwards
        axis = int(rng.integers(x.ndim))
        where = (slice(None),) * axis + (slice(None, None, -1),)
        return mx.contiguous(x[where])[where]
    if kind == 4:  # from anywhere on
        begin = int(rng.integers(1, 9))
        flat = mx.concatenate([mx.full(begin, fill, dtype=x.dtype), x.reshape(-1), mx.full(3, fill, dtype=x.dtype)])
        return flat[begin : begin + x.size].reshape(x.shape)
    if kind == 5:  # strides given by hand: a gap after each row of the last axis
        width = x.shape[-1] + int(rng.integers(1, 4))
        n = x.size // x.shape[-1]
        buffer = mx.full((n + 1, width), fill, dtype=x.dtype)
        buffer[:n, : x.shape[-1]] = x.reshape(n, -1)
        strides = [1]
        for size in (*x.shape[:0:-1],):
            strides.insert(0, strides[0] * (width if len(strides) == 1 else size))
        return mx.as_strided(buffer, x.shape, strides, 0)
    return x


def normal(rng, *shape, dtype=mx.float32, size=1.0):
    return mx.array((rng.normal(size=shape) * size).astype(np.float32)).astype(dtype)


def words(rng, *shape):
    return mx.array(rng.integers(0, 2**32, shape, dtype=np.uint32))


def halves(rng, *shape, size=1.0):
    return mx.array((rng.normal(size=shape) * size).astype(np.float16))


def choose(rng, *values):
    return values[rng.integers(len(values))]


def evaluate(rng, call, arrays):
    """The call's outputs, sometimes compiled, in another thread's stream or as one of several."""
    how = rng.integers(8)
    if how == 0:
        return mx.compile(lambda *xs: call(*xs))(*arrays)
    if how == 1:
        with mx.stream(mx.new_stream(mx.default_device())) if rng.integers(30) == 0 else mx.stream(mx.default_device()):
            return call(*arrays)
    if how == 2:
        mx.async_eval(arrays)
    return call(*arrays)


def compare(got, want, tolerance, largest, what, where=True):
    """Within tolerance * largest, and finite, at the places `where`."""
    got = to_numpy(got).astype(np.float64)
    if got.shape != want.shape:
        raise Mismatch(f"{what}: expected shape {want.shape}, got {got.shape}")
    got, want = (x[np.broadcast_to(where, got.shape)] for x in (got, want))
    if not np.isfinite(got).all():
        raise Mismatch(f"{what}: expected numbers, got {np.count_nonzero(~np.isfinite(got))} others")
    error = np.abs(got - want).max(initial=0.0)
    if error > tolerance * largest:
        raise Mismatch(f"{what}: error {error:.3g}, tolerance {tolerance:.3g} of {largest:.3g}")
    return error / max(tolerance * largest, 1e-300)


# ---- attention ------------------------------------------------------------------------------------


def attention_call(rng):
    """Arguments of turboquant_attention, legal ones, by name; random codes and parameters."""
    batch, n_kv_heads, n_repeats = choose(rng, 1, 1, 2, 3), int(rng.integers(1, 4)), int(rng.integers(1, 6))
    n_rows = choose(rng, 1, 1, 1, 2, 3, 5, 8, 9, 13)
    counts = n_first, n_coded, n_tail = (
        choose(rng, 0, 0, 1, 4, 9),
        choose(rng, 0, 1, 7, 31, 32, 33, 63, 64, 65, 128, int(rng.integers(0, 200))),
        choose(rng, 0, 1, 5, int(rng.integers(0, 70))),
    )
    n_keys = sum(counts)
    dims = [8 * int(rng.integers(1, 33)), choose(rng, 32, 64, 96, 128, 160, 256)]
    head_dim, value_dim = (choose(rng, *dims) for _ in range(2))
    rotation = choose(rng, "hadamard", "hadamard", "hadamard", "orthogonal", "none")
    if rotation != "hadamard":
        head_dim, value_dim = choose(rng, 32, 64), choose(rng, 32, 96)
    key_bits = int(rng.integers(2, 5))
    coding, value_bits = choose(rng, ("groups", 2), ("groups", 4), ("lloyd", 2), ("lloyd", 3), ("lloyd", 4))
    dtype = choose(rng, *DTYPES.values())
    dim, padded_value = reference.padded_dim(head_dim), reference.padded_dim(value_dim)
    n_blocks = -(-n_coded // BLOCK)
    heads = (batch, n_kv_heads)

    size = SPREAD**0.5
    keys = {
        "codes": words(rng, *heads, n_coded, tqext.format.code_words(dim, key_bits)),
        "norms": halves(rng, *heads, n_coded, 1, size=size * head_dim**0.5),
        "means": None,
        "balance": None,
        "signs": None,
        "residual_norms": None,
        "bits": key_bits,
        "head_dim": head_dim,
        "rotation": rotation,
    }
    if rng.integers(2):
        keys["means"] = normal(
            rng, choose(rng, batch, 1), n_kv_heads, n_blocks, head_dim, size=size,
            dtype=choose(rng, mx.float16, mx.float32) if rotation == "none" else mx.float16,
        )  # fmt: skip
    if rng.integers(2):
        keys["balance"] = mx.array(2.0 ** rng.uniform(-2, 2, (n_kv_heads, head_dim)).astype(np.float32))
    if rotation == "hadamard" and reference.factor(dim) and rng.integers(5) == 0:
        keys["signs"] = words(rng, *heads, n_coded, dim // 32)
        keys["residual_norms"] = mx.abs(halves(rng, *heads, n_coded, 1, size=head_dim**0.5 / 3))
    n_params = tqext.format.value_params(padded_value, coding)
    values = {
        "codes": words(rng, *heads, n_coded, tqext.format.code_words(padded_value, value_bits)),
        "params": halves(rng, *heads, n_coded, n_params, size=value_dim**0.5 if coding == "lloyd" else 0.5),
        "bits": value_bits,
        "head_dim": value_dim,
        "coding": coding,
        "rotation": rotation,
    }
    exact_type = choose(rng, dtype, dtype, dtype, mx.float32)
    call = {
        "q": normal(rng, batch, n_kv_heads * n_repeats, n_rows, head_dim, dtype=dtype, size=size),
        "keys": keys,
        "values": values,
        "scale": choose(rng, None, None, float(rng.uniform(-1.5, 1.5)) * head_dim**-0.5, 0.0),
        "first": None,
        "tail": None,
        "sinks": None,
        "mask": None,
        "left_padding": None,
        "lengths": None,
        "indices": None,
    }
    for name, n in (("first", n_first), ("tail", n_tail)):
        if n or rng.integers(3) == 0:
            call[name] = tuple(normal(rng, *heads, n, d, dtype=exact_type) for d in (head_dim, value_dim))
    if rng.integers(4) == 0:
        logits = rng.normal(0, 2, n_kv_heads * n_repeats).astype(np.float32)
        call["sinks"] = mx.array(np.where(rng.random(logits.shape) < 0.1, -np.inf, logits).astype(np.float32))

    kind = choose(rng, None, None, "causal", "bool", *DTYPES)
    if kind == "causal":
        call["mask"] = "causal"
    elif kind:
        full = (batch, n_kv_heads * n_repeats, n_rows, n_keys)
        shape = tuple(n if rng.integers(2) else 1 for n in full)[rng.integers(4) :]
        allowed = rng.random(shape) < choose(rng, 0.02, 0.6, 1.0)
        numbers = np.where(allowed, rng.normal(size=shape), -np.inf).astype(np.float32)
        call["mask"] = mx.array(allowed) if kind == "bool" else mx.array(numbers).astype(DTYPES[kind])
    extreme = rng.integers(6) == 0
    if rng.integers(4) == 0:
        low, high = (-(2**31), 2**31) if extreme else (0, n_keys + 1)
        call["left_padding"] = mx.array(rng.integers(low, high, batch).astype(np.int32))
    if rng.integers(4) == 0 and (kind != "causal" or n_tail >= n_rows):
        top = [n - n_rows if kind == "causal" and i == 2 else n for i, n in enumerate(counts)]
        numbers = np.stack([rng.integers(0, n + 1, batch) for n in top], 1)
        if extreme:
            numbers = rng.integers(-(2**31), 2**31, numbers.shape)
        call["lengths"] = mx.array(numbers.astype(np.int32))
    if rng.integers(5) == 0:
        shape = (batch, choose(rng, 1, n_kv_heads), choose(rng, 1, n_rows), choose(rng, 0, 1, 5, 64, int(rng.integers(0, 200))))
        low, high = (-(2**31), 2**31) if extreme else (-2, n_coded + 2)
        call["indices"] = mx.array(rng.integers(low, high, shape).astype(np.int32))
        if rng.integers(3) == 0:
            call["indices"] = call["indices"].view(mx.uint32)
    return call


def poison(rng, call):
    """Put something that is no number into a query or a token; returns which array and what it is."""
    bad = choose(rng, np.nan, np.inf, -np.inf)

    def spoil(x):
        if x is None or x.size == 0:
            return x
        numbers = to_numpy(x).copy()
        numbers[tuple(rng.integers(n) for n in x.shape)] = bad
        return mx.array(numbers).astype(x.dtype)

    where = choose(rng, "q", "norms", "params", "first", "tail")
    if where == "q":
        call["q"] = spoil(call["q"])
    elif where == "norms":
        call["keys"]["norms"] = spoil(call["keys"]["norms"])
    elif where == "params":
        call["values"]["params"] = spoil(call["values"]["params"])
    elif call[where] is not None:
        i = int(rng.integers(2))
        call[where] = tuple(spoil(x) if j == i else x for j, x in enumerate(call[where]))
        where = ("keys", "values")[i]
    return where, bad


def run_attention(call, change=lambda x: x):
    """The operator's output; `change` is applied to every array."""

    def of(x):
        if isinstance(x, tuple):
            return tuple(map(of, x))
        return change(x) if isinstance(x, mx.array) else x

    keys = tqext.PackedKeys(**{name: of(x) for name, x in call["keys"].items()})
    values = tqext.PackedValues(**{name: of(x) for name, x in call["values"].items()})
    options = {name: of(x) for name, x in call.items() if name not in ("q", "keys", "values")}
    return tqext.turboquant_attention(of(call["q"]), keys, values, **options)


def touched_rows(q, k, v, plain):
    """NaN for the rows that are no number or attend to a token that is none, in whichever part."""

    def marked(keys, values):
        """Keys that are NaN where a token has something that is no number, and values that do not matter."""
        good = np.isfinite(keys).all(-1, keepdims=True) & np.isfinite(values).all(-1, keepdims=True)
        return np.where(good, 0.0, np.nan) * np.ones(keys.shape), np.zeros((*keys.shape[:3], 1))

    parts = {name: None if plain[name] is None else marked(*plain[name]) for name in ("first", "tail")}
    queries = np.where(np.isfinite(q).all(-1, keepdims=True), 1.0, np.nan) * np.ones(q.shape)
    return reference.attention(queries, *marked(k, v), **{**plain, **parts, "scale": 1.0})


def check_attention(rng):
    call = attention_call(rng)
    where, bad = poison(rng, call) if rng.integers(8) == 0 else (None, 0.0)
    keys, values = tqext.PackedKeys(**call["keys"]), tqext.PackedValues(**call["values"])
    dims = [reference.padded_dim(d) for d in (keys.head_dim, values.head_dim)]
    with np.errstate(all="ignore"):
        k = reference.decode_keys(reference_keys(keys), matrix=matrix(dims[0], keys.rotation), residual=True)
        v = reference.decode_values(reference_values(values), matrix=matrix(dims[1], values.rotation))
        plain = {
            name: tuple(map(to_numpy, x)) if isinstance(x, tuple) else to_numpy(x) if isinstance(x, mx.array) else x
            for name, x in call.items()
            if name not in ("q", "keys", "values")
        }
        if plain["indices"] is not None:
            plain["indices"] = plain["indices"].view(np.int32)
        # Exact tokens are taken in the query's type.
        for name in ("first", "tail"):
            if call[name] is not None:
                plain[name] = tuple(to_numpy(x.astype(call["q"].dtype)) for x in call[name])
        q = to_numpy(call["q"])
        want = reference.attention(q, k, v, **plain)
        # Rows that do not attend to what is no number are right; others are none, unless its weight vanishes.
        touched = np.isnan(touched_rows(q, k, v, plain)) if where else np.zeros((*q.shape[:3], 1), bool)
        if on_cuda() and where in ("params", "values"):
            # Tensor cores multiply the values of a tile by all rows' weights, and zero times infinity is no number. What
            # padding and lengths leave out is not multiplied.
            any_mask = "causal" if isinstance(plain["mask"], str) else None
            near = np.isnan(touched_rows(q, k, v, {**plain, "mask": any_mask}))
            heads = near.reshape(len(q), k.shape[1], -1).any(-1)
            touched = touched | np.repeat(heads, q.shape[1] // k.shape[1], 1)[..., None, None]
        scale = keys.head_dim**-0.5 if call["scale"] is None else call["scale"]
        every_k, every_v = ([p[i] for p in (plain["first"], (k, v), plain["tail"]) if p is not None] for i in (0, 1))
        longest = max((np.linalg.norm(x, axis=-1).max(initial=0.0, where=np.isfinite(x).all(-1)) for x in every_k), default=0.0)
        rows = np.linalg.norm(q.astype(np.float64), axis=-1).max(initial=0.0, where=np.isfinite(q).all(-1))
        largest = max((np.abs(x).max(initial=0.0, where=np.isfinite(x)) for x in every_v), default=0.0)
    arrays = []

    def collect(x):
        arrays.append(laid_out(rng, x))
        return x

    run_attention(call, collect)  # in the order in which the next call asks for them

    def again(*given):
        it = iter(given)
        return run_attention(call, lambda _: next(it))

    out = evaluate(rng, again, arrays)
    tolerance = max(TOLERANCE[call["q"].dtype], 1e-3 if on_cuda() else 0)
    if np.isnan(bad) and where in ("q", "keys", "norms") and np.isfinite(to_numpy(out)[touched[..., 0]]).any():
        raise Mismatch("turboquant_attention: expected NaN for a row with a score that is none")
    return compare(out, want, tolerance, (1 + abs(scale) * longest * rows) * largest, "turboquant_attention", ~touched)


def illegal(rng, call):
    """Make one thing wrong; returns what."""
    keys, values, q = call["keys"], call["values"], call["q"]
    kinds = []

    def add(name, change):
        kinds.append((name, change))

    def put(holder, name, x):
        def change():
            holder[name] = x

        return change

    def other(x):
        """Another shape, which does not broadcast to what x is."""
        axis = int(rng.integers(x.ndim))
        shape = list(x.shape)
        shape[axis] += choose(rng, 1, 2)
        return mx.zeros(shape, x.dtype)

    wrong_type = {mx.uint32: mx.int32, mx.float16: mx.float32, mx.float32: mx.float16, mx.int32: mx.int64}
    for holder, names in ((keys, ("codes", "norms", "balance", "signs", "residual_norms")), (values, ("codes", "params"))):
        for name in names:
            x = holder[name]
            if x is not None:
                add(f"dtype of {name}", put(holder, name, x.astype(wrong_type[x.dtype])))
                add(f"rank of {name}", put(holder, name, x[None] if rng.integers(2) or x.ndim < 3 else x[0]))
                add(f"shape of {name}", put(holder, name, other(x)))
    means = keys["means"]
    if means is not None:
        add("rank of means", put(keys, "means", means[0]))
        # Batch 1 serves all sequences, so a batch of 1 may only grow.
        add("shape of means", put(keys, "means", other(mx.zeros((q.shape[0] + 1, *means.shape[1:]), means.dtype))))
        if keys["rotation"] != "none":
            add("dtype of means", put(keys, "means", means.astype(mx.float32)))
    add("key bits", put(keys, "bits", choose(rng, 0, 1, 5, 8, -3, 2**31 - 1, keys["bits"] % 3 + 2)))
    add("value bits", put(values, "bits", choose(rng, 0, 1, 5, 8, -2, -(2**31))))
    add("head dimension", put(keys, "head_dim", choose(rng, 0, -64, 60, 520, 2**31 - 1, keys["head_dim"] + 32)))
    add("value dimension", put(values, "head_dim", choose(rng, 0, -64, 60, 520, values["head_dim"] + 32)))
    add("rotation", put(keys, "rotation", choose(rng, "", "dct", {"none": "hadamard"}.get(keys["rotation"], "none"))))
    add("coding", put(values, "coding", choose(rng, "", "huffman")))
    add("no codes", put(keys, "codes", None))
    add("type of q", put(call, "q", q.astype(choose(rng, mx.int32, mx.bool_, mx.complex64))))
    add("rank of q", put(call, "q", q[0]))
    add("sequences of q", put(call, "q", mx.concatenate([q, q[:1]], axis=0)))
    add("dimension of q", put(call, "q", mx.concatenate([q, q[..., :8]], axis=-1)))
    if values["codes"].shape[1] > 1:
        add("heads of q", put(call, "q", mx.concatenate([q, q[:, :1]], axis=1)))
    for name in ("first", "tail"):
        if call[name] is not None:
            k, v = call[name]
            add(f"shape of {name} keys", put(call, name, (other(k), v)))
            add(f"shape of {name} values", put(call, name, (k, other(v))))
            add(f"type of {name}", put(call, name, (k, v.astype(mx.int32))))
            add(f"half of {name}", put(call, name, (k,)))
    n_keys = sum(call[name][0].shape[2] for name in ("first", "tail") if call[name] is not None) + keys["codes"].shape[2]
    full = (q.shape[0], q.shape[1], q.shape[2], n_keys)
    add("mask's name", put(call, "mask", choose(rng, "", "sliding")))
    add("mask's type", put(call, "mask", mx.zeros(full, mx.int32)))
    add("mask's shape", put(call, "mask", other(mx.zeros([n + 1 for n in full], mx.bool_))))
    add("mask's rank", put(call, "mask", mx.zeros((1, *full), mx.bool_)))
    add("sinks' type", put(call, "sinks", mx.zeros(q.shape[1], mx.int32)))
    add("sinks' shape", put(call, "sinks", mx.zeros(q.shape[1] + 1)))
    add("lengths' type", put(call, "lengths", mx.zeros((q.shape[0], 3), choose(rng, mx.int64, mx.float32))))
    add("lengths' shape", put(call, "lengths", mx.zeros((q.shape[0] + 1, 3), mx.int32)))
    add("parts of lengths", put(call, "lengths", mx.zeros((q.shape[0], 2), mx.int32)))
    add("padding's type", put(call, "left_padding", mx.zeros(q.shape[0], choose(rng, mx.int64, mx.float32))))
    add("padding's shape", put(call, "left_padding", mx.zeros(q.shape[0] + 1, mx.int32)))
    lists = (q.shape[0], choose(rng, 1, keys["codes"].shape[1]), choose(rng, 1, q.shape[2]))
    add("indices' type", put(call, "indices", mx.zeros((*lists, 4), choose(rng, mx.int64, mx.float32, mx.bool_))))
    add("indices' rank", put(call, "indices", mx.zeros(lists, mx.int32)))
    add("sequences of indices", put(call, "indices", mx.zeros((lists[0] + 1, *lists[1:], 4), mx.int32)))
    add("heads of indices", put(call, "indices", mx.zeros((lists[0], keys["codes"].shape[1] + 1, lists[2], 4), mx.int32)))
    add("queries of indices", put(call, "indices", mx.zeros((*lists[:2], q.shape[2] + 1, 4), mx.int32)))
    add("scale", put(call, "scale", choose(rng, float("nan"), float("inf"), -float("inf"), "x")))
    name, change = kinds[rng.integers(len(kinds))]
    change()
    return name


def check_refused(rng):
    call = attention_call(rng)
    name = illegal(rng, call)
    try:
        mx.eval(run_attention(call, lambda x: laid_out(rng, x)))
    except (ValueError, TypeError):
        return 0.0
    raise Mismatch(f"turboquant_attention: accepted with a wrong {name}")


def check_latent(rng):
    """latent_attention over random codes; a sixth of the calls is wrong in one thing."""
    batch, n_kv_heads, n_repeats = choose(rng, 1, 1, 2), choose(rng, 1, 1, 2), choose(rng, 1, 3, 16)
    n_rows, rope_dim = choose(rng, 1, 1, 2, 5, 13), choose(rng, 0, 8, 64)
    dim = choose(rng, 8 * int(rng.integers(1, 33)), 64, 256, 512)
    n_first, n_tail = choose(rng, 0, 0, 4), choose(rng, 0, 1, int(rng.integers(0, 70)))
    n_coded = choose(rng, 0, 1, 63, 64, 65, int(rng.integers(0, 200)))
    n_keys, dtype, bits = n_first + n_coded + n_tail, choose(rng, *DTYPES.values()), int(rng.integers(2, 5))
    heads, q_heads = (batch, n_kv_heads), n_kv_heads * n_repeats
    words_of_row = tqext.format.code_words(reference.padded_dim(dim), bits)
    means, balance = None, None
    if rng.integers(3):
        means = normal(rng, *heads, -(-n_coded // BLOCK), dim, dtype=mx.float16)
    if rng.integers(3) == 0:
        balance = mx.array(2.0 ** rng.uniform(-1, 1, (n_kv_heads, dim)).astype(np.float32))
    codes = words(rng, *heads, n_coded, words_of_row)
    norms = halves(rng, *heads, n_coded, 1, size=dim**0.5)
    packed = tqext.PackedKeys(codes, norms, means, balance, None, None, bits, dim, "hadamard")
    call = {
        "q": normal(rng, batch, q_heads, n_rows, dim, dtype=dtype),
        "q_rope": normal(rng, batch, q_heads, n_rows, rope_dim, dtype=dtype) if rope_dim else None,
        "k_rope": normal(rng, *heads, n_keys, rope_dim, dtype=dtype) if rope_dim else None,
        "first": normal(rng, *heads, n_first, dim, dtype=dtype) if n_first else None,
        "tail": normal(rng, *heads, n_tail, dim, dtype=dtype) if n_tail else None,
        "mask": choose(rng, None, "causal", mx.array(rng.random((n_rows, n_keys)) < 0.7)),
    }
    scale = SPREAD / (dim + rope_dim) ** 0.5

    def run(call, change=lambda x: x):
        # MLX's matmul on CUDA refuses views at odd addresses; the product of the rope parts is such a one.
        kept = ("q_rope", "k_rope") if on_cuda() else ()
        given = {name: change(x) if isinstance(x, mx.array) and name not in kept else x for name, x in call.items()}
        named = {name: change(x) for name, x in packed._asdict().items() if isinstance(x, mx.array)}
        return tqext.latent_attention(given.pop("q"), packed._replace(**named), scale=scale, **given)

    if rng.integers(6) == 0:
        name = choose(rng, *(name for name, x in call.items() if isinstance(x, mx.array)))
        wider = mx.zeros((*call[name].shape[:-1], call[name].shape[-1] + 2), call[name].dtype)
        wrong = wider if name == "mask" else choose(rng, wider, call[name][None])
        try:
            mx.eval(run({**call, name: wrong}))
        except ValueError:
            return 0.0
        raise Mismatch(f"latent_attention: accepted {name} of shape {wrong.shape}")

    scores = np.zeros((batch, q_heads, n_rows, n_keys))
    if rope_dim:
        rope = np.repeat(to_numpy(call["k_rope"]).astype(np.float64), n_repeats, 1)
        scores += scale * to_numpy(call["q_rope"]).astype(np.float64) @ rope.swapaxes(2, 3)
    if isinstance(call["mask"], str):
        scores = np.where(reference.allowed_columns(n_rows, 0, n_keys, 0, causal=True), scores, -np.inf)
    elif call["mask"] is not None:
        scores = np.where(to_numpy(call["mask"]), scores, -np.inf)
    x = reference.decode_keys(reference_keys(packed), matrix=matrix(reference.padded_dim(dim), "hadamard"))
    first, tail = (None if call[name] is None else (to_numpy(call[name]),) * 2 for name in ("first", "tail"))
    want = reference.attention(to_numpy(call["q"]), x, x, scale=scale, mask=scores, first=first, tail=tail)
    every = [p[0] for p in (first, (x,), tail) if p is not None]
    largest = max(np.abs(y).max(initial=0.0) for y in every)
    tokens = np.repeat(np.concatenate(every, 2), n_repeats, 1)
    size = scale * np.abs(to_numpy(call["q"]).astype(np.float64) @ tokens.swapaxes(2, 3)).max(initial=0.0)
    tolerance = max(TOLERANCE[dtype], 2e-3 if on_cuda() else 0)
    out = run(call, lambda x: laid_out(rng, x))
    return compare(out, want, tolerance, (1 + size) * largest, "latent_attention")


# ---- the other operators --------------------------------------------------------------------------


def check_codec(rng):
    """A layout changes no byte; what is decoded is what float64 decodes; what was coded is near what was given."""
    head_dim = 8 * int(rng.integers(1, 65))
    rotation = choose(rng, "hadamard", "hadamard", "none")
    if rotation == "none":
        head_dim += -head_dim % 32
    if not reference.factor(reference.padded_dim(head_dim)):
        head_dim = 64
    shape = (int(rng.integers(1, 3)), int(rng.integers(1, 4)), choose(rng, 1, 5, 64, 70, 130), head_dim)
    magnitude = choose(rng, 1.0, 1.0, 1e-3, 100.0)
    x = normal(rng, *shape, size=magnitude, dtype=choose(rng, *DTYPES.values()))
    view = laid_out(rng, x)
    if rng.integers(2):
        bits = int(rng.integers(2, 5))
        means = tqext.block_means(view) if rng.integers(2) else None
        if means is not None:
            exact = reference.block_means(to_numpy(x))
            compare(means, exact.astype(np.float64), 1.5e-3, np.abs(exact).max(), "block_means")
        balance = mx.array(2.0 ** rng.uniform(-1, 1, (shape[1], head_dim)).astype(np.float32)) if rng.integers(2) else None
        options = dict(
            bits=bits, means=means, balance=balance, rotation=rotation, qjl=bool(rng.integers(3) == 0) and rotation != "none"
        )
        packed, plain = (tqext.quantize_keys(y, **options) for y in (view, x))
        want = reference.decode_keys(reference_keys(packed), matrix=matrix(reference.padded_dim(head_dim), rotation))
        bound = {2: 0.60, 3: 0.32, 4: 0.18}[bits]
    else:
        coding, bits = choose(rng, ("groups", 2), ("groups", 4), ("lloyd", 2), ("lloyd", 3), ("lloyd", 4))
        packed, plain = (tqext.quantize_values(y, bits=bits, coding=coding, rotation=rotation) for y in (view, x))
        want = reference.decode_values(reference_values(packed), matrix=matrix(reference.padded_dim(head_dim), rotation))
        bound = {2: 0.55, 3: 0.30, 4: 0.17}[bits]
    for a, b in zip(packed, plain, strict=True):
        if isinstance(a, mx.array) and not np.array_equal(to_numpy(a), to_numpy(b)):
            raise Mismatch(f"quantize: {view.dtype} {shape}: other bytes for another layout")
    names = [name for name in ("codes", "norms", "params", "means", "balance") if getattr(packed, name, None) is not None]
    spread = packed._replace(**{name: laid_out(rng, getattr(packed, name)) for name in names})
    dtype = choose(rng, *DTYPES.values())
    rounding = {mx.float32: 3e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}[dtype]
    error = compare(tqext.dequantize(spread, dtype=dtype), want, rounding, np.abs(want).max(initial=0.0), "dequantize")
    if head_dim >= 64 and shape[1] * shape[2] >= 64:
        given = to_numpy(x).astype(np.float64)
        lost = np.sqrt(((want - given) ** 2).sum() / (given**2).sum())
        if lost > bound * 1.5:
            raise Mismatch(f"quantize: {bits} bits lost {lost:.3f}, expected less than {bound * 1.5:.3f}")
    return error


def check_rotate(rng):
    dim = choose(rng, 32, 64, 96, 128, 160, 192, 224, 256, 384, 512)
    x = normal(rng, *rng.integers(1, 4, rng.integers(0, 4)), dim, dtype=choose(rng, *DTYPES.values()))
    inverse = bool(rng.integers(2))
    exact = to_numpy(x).astype(np.float64)
    want = (reference.unrotate if inverse else reference.rotate)(exact, matrix(dim))
    tolerance = {mx.float32: 2e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}[x.dtype]
    return compare(tqext.rotate(laid_out(rng, x), inverse), want, tolerance, np.abs(want).max(), "rotate")


def check_one_bit(rng):
    """q1_matmul, q1_dequantize, q1_quantize and ternary_matmul over the same random bits."""
    rows, groups = int(rng.integers(1, 70)), int(rng.integers(1, 9))
    weight = words(rng, rows, 4 * groups)
    scales = halves(rng, rows, groups)
    x = normal(rng, *rng.integers(1, 6, rng.integers(0, 3)), 128 * groups, dtype=choose(rng, *DTYPES.values()))
    bits = to_numpy(weight)[..., None] >> np.arange(32, dtype=np.uint32) & 1
    dense = (bits.reshape(rows, -1) * 2.0 - 1) * np.repeat(to_numpy(scales).astype(np.float64), 128, axis=-1)
    views = laid_out(rng, weight), laid_out(rng, scales)
    exact = to_numpy(x).astype(np.float64)
    largest = np.abs(exact).max() * np.abs(dense).max() * (128 * groups) ** 0.5
    tolerance = {mx.float32: 1e-5, mx.float16: 1e-3, mx.bfloat16: 8e-3}[x.dtype]
    # CUDA's products take rows that follow each other, and say so.
    rows_of_x = x if on_cuda() and x.ndim > 2 else laid_out(rng, x)
    error = compare(evaluate(rng, tqext.q1_matmul, [rows_of_x, *views]), exact @ dense.T, tolerance, largest, "q1_matmul")
    compare(tqext.q1_dequantize(*views), dense, 1e-6, np.abs(dense).max(), "q1_dequantize")
    again = tqext.q1_quantize(laid_out(rng, mx.array(dense.astype(np.float32))))
    # Of +-scale the mean of the magnitudes is the scale; its sign goes into the bits.
    compare(tqext.q1_dequantize(*again), dense, 1e-3, np.abs(dense).max(), "q1_quantize")
    # The same words as codes of two bits, of half as many columns.
    groups = weight.shape[1] // 8
    if groups == 0:
        return error
    views = laid_out(rng, weight[:, : 8 * groups]), laid_out(rng, scales[:, :groups])
    dense = reference.ternary_weights(to_numpy(views[0]), to_numpy(views[1]))
    x, exact = x[..., : 128 * groups], exact[..., : 128 * groups]
    # On a GPU many rows are MLX's product, in TF32 unless they are fp16.
    many = on_cuda() and x.size > 8 * x.shape[-1]
    largest = np.abs(exact).max() * np.abs(dense).max() * (128 * groups) ** 0.5
    rows_of_x = x if on_cuda() and x.ndim > 2 else laid_out(rng, x)
    ternary = compare(
        evaluate(rng, tqext.ternary_matmul, [rows_of_x, *views]), exact @ dense.T,
        max(tolerance, 5e-3 if many else 0), largest, "ternary_matmul",
    )  # fmt: skip
    return max(error, ternary)


KINDS = [
    (0.62, check_attention),
    (0.18, check_refused),
    (0.10, check_codec),
    (0.03, check_rotate),
    (0.04, check_one_bit),
    (0.03, check_latent),
]


def run_case(number, only=None):
    """Name of what was checked, and its error as a share of the tolerance; None if it is not the kind asked for."""
    rng = np.random.default_rng([15, number])
    check = KINDS[rng.choice(len(KINDS), p=[share for share, _ in KINDS])][1]
    if only and check.__name__ != f"check_{only}":
        return None
    try:
        return check.__name__, check(rng)
    except Exception as error:
        raise Mismatch(f"case {number}, {check.__name__}: {type(error).__name__}: {error}") from error


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", choices=[check.__name__.removeprefix("check_") for _, check in KINDS])
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--go-on", action="store_true", help="after a case that fails")
    options = parser.parse_args()
    mx.set_default_device(getattr(mx, options.device))
    counts, worst, failures = collections.Counter(), collections.defaultdict(float), 0
    begin = time.perf_counter()
    for number in range(options.first, options.first + options.cases):
        try:
            found = run_case(number, options.only)
        except Mismatch as mismatch:
            if not options.go_on:
                raise
            failures += 1
            print(mismatch, flush=True)
            continue
        if found is None:
            continue
        name, error = found
        counts[name] += 1
        worst[name] = max(worst[name], error)
    print(f"{tqext.isa()}: {sum(counts.values())} cases in {time.perf_counter() - begin:.0f} s, {failures} failures")
    for name in counts:
        print(f"  {name}: {counts[name]}, largest error {worst[name]:.2f} of the tolerance")
    raise SystemExit(failures > 0)


if __name__ == "__main__":
    main()

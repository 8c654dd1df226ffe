"""What several test files share: tolerances, conversions, random attention problems and their float64 answer."""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import reference
import tqext

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def on_cuda():
    return mx.default_device() == mx.gpu and not mx.metal.is_available()


class _KernelTolerance(dict):
    """By dtype and default device. On NVIDIA GPUs the softmax weights enter fp16 tensor cores, whatever the query's type."""

    def __getitem__(self, dtype):
        return max(super().__getitem__(dtype), 1e-3) if on_cuda() else super().__getitem__(dtype)


# Kernel error against float64 over the same bytes, relative to the largest output.
KERNEL_TOLERANCE = _KernelTolerance({mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 1.2e-2})
# One rounding to the result's type, relative to the largest output: rotate and dequantise.
ROUNDING_TOLERANCE = {mx.float32: 2e-6, mx.float16: 6e-4, mx.bfloat16: 5e-3}
# Products with coded weights, whose sums are fp32: of fp16 and bf16 the last rounding, to the result's type.
WEIGHT_TOLERANCE = {mx.float32: 1e-5, mx.float16: 6e-4, mx.bfloat16: 5e-3}


def tool(*names):
    """Path of the first of these programs that is installed; without any the test fails in CI and is skipped elsewhere."""
    for name in names:
        if path := shutil.which(name):
            return path
    message = f"not installed: {' or '.join(names)}"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


def with_blas():
    """The environment of a process that runs the small real model (tests/blas/sitecustomize.py)."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent / "blas"), os.environ.get("PYTHONPATH", "")])}


def with_steady_malloc():
    """The environment of a process whose resident memory is looked at.

    Without this glibc keeps buffers that were freed, by a threshold that it moves as it likes.
    """
    return os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def to_numpy(x):
    """Any mx.array as NumPy; bf16 as fp32, which holds it exactly."""
    return np.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x)


def assert_close(got, want, tolerance):
    """|got - want| <= tolerance * max|want|; NaN where `want` is NaN."""
    got = to_numpy(got) if isinstance(got, mx.array) else got
    assert got.shape == want.shape
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    if want.size == 0:
        return
    finite = np.isfinite(want)
    largest = np.abs(want[finite]).max(initial=0.0)
    error = np.abs(got.astype(np.float64) - want)[finite].max(initial=0.0)
    assert error <= tolerance * largest, f"error {error:.3g} is {error / max(largest, 1e-300):.3g} of {largest:.3g}"


def error_line(op, argument):
    """Pattern of `[op] argument: expected X, got Y`."""
    return rf"^\[{op}\] {argument}: expected .+, got .+"


def matrix(dim, rotation="hadamard"):
    """R of `rotate` for a padded dimension."""
    if rotation == "none":
        return np.eye(dim)
    if rotation == "hadamard" and reference.factor(dim):
        return reference.rotation_matrix(dim)
    return reference.dense_matrix(dim).astype(np.float64)


def optional_numpy(x):
    return None if x is None else to_numpy(x)


def reference_keys(packed):
    """PackedKeys of the package as reference.Keys: the same bytes."""
    return reference.Keys(
        to_numpy(packed.codes),
        to_numpy(packed.norms),
        packed.bits,
        packed.head_dim,
        means=optional_numpy(packed.means),
        balance=optional_numpy(packed.balance),
        signs=optional_numpy(packed.signs),
        residual_norms=optional_numpy(packed.residual_norms),
    )


def reference_values(packed):
    return reference.Values(to_numpy(packed.codes), to_numpy(packed.params), packed.bits, packed.head_dim, packed.coding)


def decoded_keys(packed, residual=True):
    dim = reference.padded_dim(packed.head_dim)
    return reference.decode_keys(reference_keys(packed), matrix=matrix(dim, packed.rotation), residual=residual)


def decoded_values(packed):
    dim = reference.padded_dim(packed.head_dim)
    return reference.decode_values(reference_values(packed), matrix=matrix(dim, packed.rotation))


def poisoned(x, fill, before=3, after=70):
    """A view equal to x into a buffer that is longer on the token axis, and one head and one sequence larger.

    Everything outside the view holds `fill`, so a kernel that strays reads it.
    """
    batch, heads, n_tokens, width = x.shape
    buffer = mx.full((batch + 1, heads + 1, before + n_tokens + after, width), fill, dtype=x.dtype)
    buffer[:batch, :heads, before : before + n_tokens] = x
    mx.eval(buffer)
    return buffer[:batch, :heads, before : before + n_tokens]


def poisoned_tokens(packed, **where):
    """PackedKeys or PackedValues whose token arrays are such views."""
    fills = {"codes": 0xFFFFFFFF, "signs": 0xFFFFFFFF, "norms": np.nan, "residual_norms": np.nan, "params": np.nan}
    return packed._replace(
        **{
            name: poisoned(getattr(packed, name), fill, **where)
            for name, fill in fills.items()
            if getattr(packed, name, None) is not None
        }
    )


@dataclass
class Problem:
    """One call of turboquant_attention on random data. Shapes as in the docstring of the op."""

    batch: int = 1
    n_kv_heads: int = 2
    n_repeats: int = 4
    n_rows: int = 1
    n_coded: int = 129
    head_dim: int = 128
    value_dim: int | None = None
    key_bits: int = 3
    value_bits: int = 2
    value_coding: str = "groups"
    dtype: mx.Dtype = mx.float32
    means: bool = False  # of blocks; the keys drift from block to block
    balance: bool = False
    qjl: bool = False
    rotation: str = "hadamard"
    n_first: int = 0
    n_tail: int = 0
    scale: float | None = None
    sinks: bool = False
    seed: int = 0
    magnitude: float = 1.0
    options: dict = field(default_factory=dict)  # mask, left_padding, lengths: passed on

    def __post_init__(self):
        if self.value_dim is None:
            self.value_dim = self.head_dim
        self.rng = np.random.default_rng(self.seed)
        draw = self._draw
        self.q = draw(self.n_kv_heads * self.n_repeats, self.n_rows, self.head_dim, dtype=self.dtype)
        k = draw(self.n_kv_heads, self.n_coded, self.head_dim)
        means = balance = None
        if self.balance:
            # Factors of 1/8 to 8, and queries and keys that call for them.
            balance = mx.array(2.0 ** self.rng.uniform(-3, 3, (self.n_kv_heads, self.head_dim)).astype(np.float32))
            k = k / balance[:, None]
            self.q = (self.q * mx.repeat(balance, self.n_repeats, axis=0)[:, None]).astype(self.dtype)
        if self.means:
            drift = draw(self.n_kv_heads, tqext.format.n_blocks(self.n_coded), self.head_dim) * 2
            k = (
                k
                + mx.repeat(drift if balance is None else drift / balance[:, None], tqext.format.BLOCK, 2)[:, :, : self.n_coded]
            )
        k, v = k * self.magnitude, draw(self.n_kv_heads, self.n_coded, self.value_dim) * self.magnitude
        if self.means:
            means = tqext.block_means(k)
        self.packed_k = tqext.quantize_keys(
            k, bits=self.key_bits, means=means, balance=balance, qjl=self.qjl, rotation=self.rotation
        )
        self.packed_v = tqext.quantize_values(v, bits=self.value_bits, coding=self.value_coding, rotation=self.rotation)
        self.first, self.tail = (
            (
                draw(self.n_kv_heads, n, self.head_dim, dtype=self.dtype),
                draw(self.n_kv_heads, n, self.value_dim, dtype=self.dtype),
            )
            if n
            else None
            for n in (self.n_first, self.n_tail)
        )
        # Logits near the scores', so that they take a share of the denominator and not all of it.
        self.sink_logits = (
            mx.array(self.rng.normal(1, 1, self.n_kv_heads * self.n_repeats).astype(np.float32)) if self.sinks else None
        )

    @property
    def n_keys(self):
        return self.n_first + self.n_coded + self.n_tail

    @property
    def n_q_heads(self):
        return self.n_kv_heads * self.n_repeats

    def _draw(self, *shape, dtype=mx.float32):
        # Cubes of normal numbers are mixed in: a few large coordinates, as keys have.
        x = self.rng.normal(size=(self.batch, *shape))
        x = np.where(self.rng.random(x.shape) < 0.05, x**3, x)
        return mx.array(x.astype(np.float32)).astype(dtype)

    def arguments(self):
        return dict(scale=self.scale, first=self.first, tail=self.tail, sinks=self.sink_logits, **self.options)

    def run(self, q=None, packed_k=None, packed_v=None, **changes):
        return tqext.turboquant_attention(
            self.q if q is None else q,
            packed_k or self.packed_k,
            packed_v or self.packed_v,
            **{**self.arguments(), **changes},
        )

    def answer(self, keys_as=lambda x: x, values_as=lambda x: x):
        """float64 attention over the decoded bytes, keys and values through these functions."""
        plain = {
            name: tuple(map(to_numpy, value))
            if isinstance(value, tuple)
            else to_numpy(value)
            if isinstance(value, mx.array)
            else value
            for name, value in self.arguments().items()
        }
        keys, values = keys_as(decoded_keys(self.packed_k)), values_as(decoded_values(self.packed_v))
        return reference.attention(to_numpy(self.q), keys, values, **plain)

    def check(self, **changes):
        want, tolerance = self.answer(), KERNEL_TOLERANCE[self.dtype]
        if on_cuda() and max(self.packed_k.head_dim, self.packed_v.head_dim) > 256:
            # No kernel: MLX's products read decoded tokens that are rounded, keys of bf16 queries to fp32.
            def rounded(dtype):
                return lambda x: to_numpy(mx.array(x.astype(np.float32)).astype(dtype))

            other = self.answer(rounded(mx.float32 if self.dtype == mx.bfloat16 else self.dtype), rounded(self.dtype))
            tolerance += np.nanmax(np.abs(other - want)) / max(np.nanmax(np.abs(want)), 1e-300)
        assert_close(self.run(**changes), want, tolerance)


def token_lists(problem, n_listed, *, per_head=True, per_query=True, seed=0):
    """`indices` for a Problem: ids without repetition, in no order. An eighth of the slots is empty, in every way there is."""
    rng = np.random.default_rng(seed)
    shape = (problem.batch, problem.n_kv_heads if per_head else 1, problem.n_rows if per_query else 1)
    n = problem.n_coded
    ids = np.stack([rng.permutation(max(n, n_listed))[:n_listed] for _ in range(int(np.prod(shape)))]).reshape(*shape, n_listed)
    empty = rng.choice([-1, -(2**31), n, n + 63, 2**31 - 1], ids.shape)
    return mx.array(np.where(rng.random(ids.shape) < 0.125, empty, ids).astype(np.int32))

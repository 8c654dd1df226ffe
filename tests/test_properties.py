"""What holds of the operators for every shape, type and mask (hypothesis)."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tqext
from covering import FULL
from support import DTYPES, KERNEL_TOLERANCE, Problem, assert_close, poisoned, poisoned_tokens, to_numpy

pytestmark = pytest.mark.usefixtures("device")
examples = settings(
    max_examples=60 if FULL else 30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
few = settings(examples, max_examples=20)
head_dims = st.integers(1, 36).map(lambda n: 8 * n)
dtypes = st.sampled_from(list(DTYPES.values()))
codings = st.sampled_from([("groups", 2), ("groups", 4), ("lloyd", 2), ("lloyd", 3), ("lloyd", 4)])


@st.composite
def problems(draw, with_mask=True):
    """Any call of turboquant_attention that is allowed, on small sizes."""
    n_rows, batch = draw(st.integers(1, 12)), draw(st.integers(1, 2))
    counts = n_first, n_coded, n_tail = draw(st.integers(0, 5)), draw(st.integers(0, 300)), draw(st.integers(0, 40))
    n_kv_heads, n_repeats = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    options = {}
    kind = draw(st.sampled_from([None, "causal", "bool", *DTYPES])) if with_mask else None
    if kind == "causal":
        options["mask"] = "causal"
    elif kind:
        full = (batch, n_kv_heads * n_repeats, n_rows, sum(counts))
        shape = tuple(n if draw(st.booleans()) else 1 for n in full)[draw(st.integers(0, 3)) :]
        allowed = rng.random(shape) < draw(st.sampled_from([0.02, 0.6, 1.0]))
        values = np.where(allowed, rng.normal(size=shape), -np.inf).astype(np.float32)
        options["mask"] = mx.array(allowed) if kind == "bool" else mx.array(values).astype(DTYPES[kind])
    if draw(st.booleans()):
        options["left_padding"] = mx.array(rng.integers(0, sum(counts) + 1, batch).astype(np.int32))
    elif kind is None:
        options["lengths"] = mx.array(np.stack([rng.integers(0, n + 1, batch) for n in counts], 1).astype(np.int32))
    rotation = draw(st.sampled_from(["hadamard", "hadamard", "orthogonal", "none"]))
    value_coding, value_bits = draw(codings)
    head_dim, value_dim = draw(head_dims), draw(head_dims)
    if rotation == "none":
        head_dim, value_dim = (n + -n % 32 for n in (head_dim, value_dim))
    return Problem(
        batch=batch, n_kv_heads=n_kv_heads, n_repeats=n_repeats, n_rows=n_rows,
        n_first=n_first, n_coded=n_coded, n_tail=n_tail, head_dim=head_dim, value_dim=value_dim,
        key_bits=draw(st.integers(2, 4)), value_bits=value_bits, value_coding=value_coding, dtype=draw(dtypes),
        means=draw(st.booleans()), balance=draw(st.booleans()),
        qjl=rotation == "hadamard" and tqext.format.hadamard_factor(head_dim + -head_dim % 32) > 0 and draw(st.booleans()),
        rotation=rotation, sinks=draw(st.booleans()),
        scale=draw(st.none() | st.floats(-0.25, 0.25, width=32)), seed=draw(st.integers(0, 2**16)), options=options,
    )  # fmt: skip


@examples
@given(problem=problems())
def test_turboquant_attention_matches_float64(problem):
    problem.check()


@examples
@given(problem=problems())
def test_turboquant_attention_of_views_is_that_of_arrays(problem):
    """Bit for bit, whatever surrounds the views."""
    exact = {
        name: None if part is None else tuple(poisoned(x, np.nan) for x in part)
        for name, part in (("first", problem.first), ("tail", problem.tail))
    }
    got = problem.run(
        q=poisoned(problem.q, np.nan),
        packed_k=poisoned_tokens(problem.packed_k),
        packed_v=poisoned_tokens(problem.packed_v),
        **exact,
    )
    assert np.array_equal(to_numpy(got), to_numpy(problem.run()), equal_nan=True)


@few
@given(problem=problems(with_mask=False), shift=st.floats(-50, 50))
def test_turboquant_attention_does_not_see_a_constant_in_the_mask(problem, shift):
    problem.sink_logits = None  # they do not move with the scores
    mask = mx.full((problem.n_rows, problem.n_keys), shift)
    assert_close(problem.run(mask=mask), problem.answer(), KERNEL_TOLERANCE[problem.dtype])


@few
@given(problem=problems(with_mask=False), data=st.data())
def test_turboquant_attention_does_not_depend_on_the_order_of_tokens(problem, data):
    """Of those in a block, which share a mean; of all where there is none."""
    problem.options.clear()
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    length = problem.n_coded if problem.packed_k.means is None else tqext.format.BLOCK
    blocks = np.split(np.arange(problem.n_coded), range(length, problem.n_coded, length)) if problem.n_coded else []
    order = mx.array(np.concatenate([rng.permutation(block) for block in blocks] or [[]]).astype(np.int32))

    def shuffled(packed):
        names = ("codes", "norms", "signs", "residual_norms", "params")
        return packed._replace(
            **{n: mx.take(getattr(packed, n), order, axis=2) for n in names if getattr(packed, n, None) is not None}
        )

    got = problem.run(packed_k=shuffled(problem.packed_k), packed_v=shuffled(problem.packed_v))
    assert_close(got, problem.answer(), KERNEL_TOLERANCE[problem.dtype])


def packed_arrays(packed):
    """Of tokens: the balance is the layer's."""
    names = [name for name in packed._fields if name != "balance"]
    return [np.array(x) for x in (getattr(packed, name) for name in names) if isinstance(x, mx.array)]


@examples
@given(
    dtype=dtypes,
    head_dim=head_dims,
    n_tokens=st.integers(1, 70),
    heads=st.integers(1, 3),
    key_bits=st.integers(2, 4),
    coding=codings,
    balanced=st.booleans(),
    qjl=st.booleans(),
    rotation=st.sampled_from(["hadamard", "orthogonal"]),
    magnitude=st.sampled_from([0.0, 1e-30, 1e-6, 1.0, 300.0, 6e4]),
    data=st.data(),
)
def test_quantize_treats_every_token_alone(
    dtype, head_dim, n_tokens, heads, key_bits, coding, balanced, qjl, rotation, magnitude, data
):
    """A token's bytes do not depend on what is coded with it, nor on the type that holds the same numbers; all are finite."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    x = mx.array((rng.normal(size=(2, heads, n_tokens, head_dim)) * magnitude).astype(np.float32))
    x = mx.clip(x, -6.5e4, 6.5e4).astype(dtype)
    begin = data.draw(st.integers(0, n_tokens - 1))
    end = data.draw(st.integers(begin + 1, n_tokens))
    qjl = qjl and rotation == "hadamard" and tqext.format.hadamard_factor(head_dim + -head_dim % 32) > 0

    balance = mx.array(2.0 ** rng.uniform(-3, 3, (heads, head_dim)).astype(np.float32)) if balanced else None

    def keys(x):
        return tqext.quantize_keys(x, bits=key_bits, qjl=qjl, rotation=rotation, balance=balance)

    def values(x):
        return tqext.quantize_values(x, bits=coding[1], coding=coding[0], rotation=rotation)

    for quantize in (keys, values):
        whole = quantize(x)
        part = packed_arrays(quantize(x[1:, :, begin:end]))
        for a, b, c in zip(packed_arrays(whole), part, packed_arrays(quantize(x.astype(mx.float32))), strict=True):
            assert np.array_equal(a[1:, :, begin:end], b)
            assert np.array_equal(a, c)
        assert mx.isfinite(tqext.dequantize(whole)).all()
        assert tqext.dequantize(whole).shape == x.shape

"""turboquant_attention and dequantize with wrong arguments: one form of ValueError, and never a crash."""

import re

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tqext
from support import Problem, error_line, to_numpy

pytestmark = pytest.mark.usefixtures("device")


def zeros(*shape, dtype=mx.float32):
    return mx.zeros(shape, dtype)


def good():
    """B = 2, 8 query and 2 KV heads, L = 3, 40 packed tokens, D = 64, Dv = 96."""
    keys = tqext.PackedKeys(
        codes=zeros(2, 2, 40, 6, dtype=mx.uint32),
        norms=zeros(2, 2, 40, 1, dtype=mx.float16),
        means=zeros(2, 2, 1, 64, dtype=mx.float16),
        balance=mx.ones((2, 64)),
        signs=zeros(2, 2, 40, 2, dtype=mx.uint32),
        residual_norms=zeros(2, 2, 40, 1, dtype=mx.float16),
        bits=3,
        head_dim=64,
    )
    values = tqext.PackedValues(
        codes=zeros(2, 2, 40, 6, dtype=mx.uint32), params=zeros(2, 2, 40, 6, dtype=mx.float16), bits=2, head_dim=96
    )
    options = {
        "first": (zeros(2, 2, 4, 64), zeros(2, 2, 4, 96)),
        "tail": (zeros(2, 2, 5, 64), zeros(2, 2, 5, 96)),
        "mask": zeros(2, 8, 3, 49),
        "sinks": zeros(8),
        "left_padding": mx.array([0, 1]),
        "lengths": mx.array([[1, 1, 1], [4, 40, 5]]),
        "indices": mx.array([[[[3, -1, 39]]], [[[0, 40, 7]]]]),
    }
    return zeros(2, 8, 3, 64), keys, values, options


def attend(q=None, keys=None, values=None, **options):
    """The call with one argument of `good` replaced. keys, values: fields to replace."""
    good_q, good_keys, good_values, good_options = good()
    return tqext.turboquant_attention(
        good_q if q is None else q,
        good_keys._replace(**keys) if isinstance(keys, dict) else good_keys if keys is None else keys,
        good_values._replace(**values) if isinstance(values, dict) else good_values if values is None else values,
        **{**good_options, **options},
    )


def u32(*shape):
    return zeros(*shape, dtype=mx.uint32)


def f16(*shape):
    return zeros(*shape, dtype=mx.float16)


# Argument that the message must name -> what is wrong -> the call.
BAD = {
    "q": {
        "rank 3": dict(q=zeros(8, 3, 64)),
        "rank 5": dict(q=zeros(1, 2, 8, 3, 64)),
        "scalar": dict(q=mx.array(1.0)),
        "integers": dict(q=zeros(2, 8, 3, 64, dtype=mx.int32)),
        "complex": dict(q=zeros(2, 8, 3, 64, dtype=mx.complex64)),
        "head dimension": dict(q=zeros(2, 8, 3, 32)),
        "heads": dict(q=zeros(2, 7, 3, 64)),
    },
    "packed_k.codes": {
        "dtype": dict(keys=dict(codes=zeros(2, 2, 40, 6, dtype=mx.int32))),
        "rank": dict(keys=dict(codes=u32(2, 40, 6))),
        "words": dict(keys=dict(codes=u32(2, 2, 40, 8))),
        "no words": dict(keys=dict(codes=u32(2, 2, 40, 0))),
        "batch": dict(q=zeros(3, 8, 3, 64)),
        "scalar": dict(keys=dict(codes=mx.array(0, mx.uint32))),
    },
    "packed_k.norms": {
        "dtype": dict(keys=dict(norms=zeros(2, 2, 40, 1))),
        "tokens": dict(keys=dict(norms=f16(2, 2, 39, 1))),
        "heads": dict(keys=dict(norms=f16(2, 1, 40, 1))),
        "width": dict(keys=dict(norms=f16(2, 2, 40, 2))),
        "rank": dict(keys=dict(norms=f16(2, 2, 40))),
    },
    "packed_k.signs": {
        "dtype": dict(keys=dict(signs=f16(2, 2, 40, 2))),
        "width": dict(keys=dict(signs=u32(2, 2, 40, 1))),
        "tokens": dict(keys=dict(signs=u32(2, 2, 41, 2))),
    },
    "packed_k.residual_norms": {
        "missing": dict(keys=dict(residual_norms=None)),
        "alone": dict(keys=dict(signs=None)),
        "dtype": dict(keys=dict(residual_norms=zeros(2, 2, 40, 1))),
        "tokens": dict(keys=dict(residual_norms=f16(2, 2, 1, 1))),
    },
    "means": {
        "batch": dict(keys=dict(means=f16(3, 2, 1, 64))),
        "heads": dict(keys=dict(means=f16(2, 8, 1, 64))),
        "blocks": dict(keys=dict(means=f16(2, 2, 2, 64))),
        "no blocks": dict(keys=dict(means=f16(2, 2, 0, 64))),
        "dimension": dict(keys=dict(means=f16(2, 2, 1, 96))),
        "rank": dict(keys=dict(means=f16(2, 2, 64))),
        "dtype": dict(keys=dict(means=zeros(2, 2, 1, 64))),
    },
    "balance": {
        "heads": dict(keys=dict(balance=zeros(8, 64))),
        "dimension": dict(keys=dict(balance=zeros(2, 96))),
        "rank": dict(keys=dict(balance=zeros(2, 2, 64))),
        "dtype": dict(keys=dict(balance=f16(2, 64))),
    },
    "bits": {
        "keys 5": dict(keys=dict(bits=5)),
        "keys 0": dict(keys=dict(bits=0)),
        "keys negative": dict(keys=dict(bits=-3)),
        "values 3": dict(values=dict(bits=3)),
        "lloyd values 1": dict(values=dict(bits=1, coding="lloyd")),
        "values 0": dict(values=dict(bits=0)),
    },
    "packed_k": {
        "head dimension 0": dict(keys=dict(head_dim=0)),
        "head dimension 60": dict(keys=dict(head_dim=60)),
        "head dimension negative": dict(keys=dict(head_dim=-64)),
        "head dimension 1024": dict(keys=dict(head_dim=1024)),
        "an array": dict(keys=zeros(2, 2, 40, 64)),
        "a short tuple": dict(keys=(u32(2, 2, 40, 6), f16(2, 2, 40, 1))),
        "values": dict(keys=good()[2]),
        "text": dict(keys="tq3"),
    },
    "packed_v": {
        "head dimension 0": dict(values=dict(head_dim=0)),
        "head dimension 520": dict(values=dict(head_dim=520)),
        "keys": dict(values=good()[1]),
    },
    "packed_v.codes": {
        "dtype": dict(values=dict(codes=f16(2, 2, 40, 6))),
        "tokens": dict(values=dict(codes=u32(2, 2, 41, 6), params=f16(2, 2, 41, 6))),
        "heads": dict(values=dict(codes=u32(2, 4, 40, 6), params=f16(2, 4, 40, 6))),
        "batch": dict(values=dict(codes=u32(1, 2, 40, 6), params=f16(1, 2, 40, 6))),
        "words": dict(values=dict(codes=u32(2, 2, 40, 5))),
    },
    "packed_v.params": {
        "dtype": dict(values=dict(params=zeros(2, 2, 40, 6))),
        "width": dict(values=dict(params=f16(2, 2, 40, 3))),
        "tokens": dict(values=dict(params=f16(2, 2, 1, 6))),
        "of groups for lloyd": dict(values=dict(codes=u32(2, 2, 40, 9), bits=3, coding="lloyd")),
    },
    "coding": {"unknown": dict(values=dict(coding="huffman")), "empty": dict(values=dict(coding=""))},
    "packed_v.rotation": {"not the keys'": dict(values=dict(rotation="orthogonal"))},
    "rotation": {"unknown": dict(keys=dict(rotation="dct"), values=dict(rotation="dct"))},
    "first": {
        "keys' dimension": dict(first=(zeros(2, 2, 4, 96), zeros(2, 2, 4, 96))),
        "values' dimension": dict(first=(zeros(2, 2, 4, 64), zeros(2, 2, 4, 64))),
        "tokens": dict(first=(zeros(2, 2, 4, 64), zeros(2, 2, 3, 96))),
        "heads": dict(first=(zeros(2, 8, 4, 64), zeros(2, 8, 4, 96))),
        "dtype": dict(first=(zeros(2, 2, 4, 64, dtype=mx.int32), zeros(2, 2, 4, 96))),
        "rank": dict(first=(zeros(2, 4, 64), zeros(2, 4, 96))),
    },
    "tail": {
        "keys' dimension": dict(tail=(zeros(2, 2, 5, 32), zeros(2, 2, 5, 96))),
        "values' dimension": dict(tail=(zeros(2, 2, 5, 64), zeros(2, 2, 5, 64))),
        "tokens": dict(tail=(zeros(2, 2, 5, 64), zeros(2, 2, 0, 96))),
        "batch": dict(tail=(zeros(1, 2, 5, 64), zeros(1, 2, 5, 96))),
        "dtype": dict(tail=(zeros(2, 2, 5, 64), zeros(2, 2, 5, 96, dtype=mx.uint32))),
    },
    "mask": {
        "columns": dict(mask=zeros(2, 8, 3, 40)),
        "rows": dict(mask=zeros(2, 8, 2, 49)),
        "heads": dict(mask=zeros(2, 2, 3, 49)),
        "rank": dict(mask=zeros(1, 2, 8, 3, 49)),
        "integers": dict(mask=zeros(3, 49, dtype=mx.int32)),
        "name": dict(mask="sliding"),
        "empty name": dict(mask=""),
    },
    "sinks": {
        "heads": dict(sinks=zeros(2)),
        "rank": dict(sinks=zeros(1, 8)),
        "dtype": dict(sinks=zeros(8, dtype=mx.int32)),
    },
    "left_padding": {
        "dtype": dict(left_padding=zeros(2)),
        "batch": dict(left_padding=mx.array([1])),
        "rank": dict(left_padding=mx.array([[0, 1]])),
    },
    "lengths": {
        "dtype": dict(lengths=zeros(2, 3)),
        "parts": dict(lengths=mx.array([[1, 1], [1, 1]])),
        "batch": dict(lengths=mx.array([[1, 1, 1]])),
        "no room for the causal rows": dict(mask="causal", tail=None),
    },
    "indices": {
        "dtype": dict(indices=mx.zeros((2, 1, 1, 5), mx.int64)),
        "floats": dict(indices=zeros(2, 1, 1, 5)),
        "rank": dict(indices=mx.zeros((2, 1, 5), mx.int32)),
        "batch": dict(indices=mx.zeros((1, 1, 1, 5), mx.int32)),
        "query heads": dict(indices=mx.zeros((2, 8, 1, 5), mx.int32)),
        "queries": dict(indices=mx.zeros((2, 2, 2, 5), mx.int32)),
        "scalar": dict(indices=mx.array(3)),
    },
    "scale": {"NaN": dict(scale=float("nan")), "infinite": dict(scale=float("inf"))},
}


@pytest.mark.parametrize("argument, what", [(argument, what) for argument, cases in BAD.items() for what in cases])
def test_turboquant_attention_rejects(argument, what):
    with pytest.raises(ValueError, match=error_line("turboquant_attention", re.escape(argument) + r"(\[[01]\])?")):
        mx.eval(attend(**BAD[argument][what]))


def test_turboquant_attention_accepts_what_the_others_change():
    """The unchanged call runs: every refusal above is of the one thing that was changed."""
    assert attend().shape == (2, 8, 3, 96)


@pytest.mark.parametrize("call", [lambda: attend(first=3), lambda: attend(tail=(zeros(1),)), lambda: attend(scale="x")])
def test_turboquant_attention_of_the_wrong_python_type_raises(call):
    with pytest.raises((TypeError, ValueError)):
        call()


def test_turboquant_attention_lengths_out_of_range_are_clamped():
    """Numbers in arrays are not seen before the computation: whatever they are, no memory outside is read."""
    problem = Problem(batch=2, n_first=4, n_coded=64, n_tail=9, head_dim=64)
    every = to_numpy(problem.run())
    huge = mx.array([[2**31 - 1] * 3] * 2)
    assert np.array_equal(to_numpy(problem.run(lengths=huge)), every)
    assert not to_numpy(problem.run(lengths=-huge)).any()
    assert np.array_equal(to_numpy(problem.run(left_padding=mx.array([-(2**31), -1]))), every)
    assert not to_numpy(problem.run(left_padding=mx.array([2**31 - 1, 77]))).any()


@pytest.mark.parametrize("shape", [(0, 8, 1, 64), (1, 0, 1, 64), (1, 8, 0, 64)], ids=["no sequence", "no head", "no query"])
def test_turboquant_attention_of_no_query_is_empty(shape):
    batch = shape[0]
    k, v = tqext.quantize_keys(zeros(batch, 2, 5, 64)), tqext.quantize_values(zeros(batch, 2, 5, 64))
    assert tqext.turboquant_attention(zeros(*shape), k, v).shape == shape
    assert to_numpy(tqext.turboquant_attention(zeros(*shape), k, v)).shape == shape


def test_turboquant_attention_without_kv_heads_is_refused():
    k, v = tqext.quantize_keys(zeros(1, 0, 5, 64)), tqext.quantize_values(zeros(1, 0, 5, 64))
    with pytest.raises(ValueError, match=error_line("turboquant_attention", "q")):
        tqext.turboquant_attention(zeros(1, 8, 1, 64), k, v)


def test_packed_of_another_kind_is_refused():
    for wrong in (zeros(1, 2, 3, 64), None, (u32(1, 2, 3, 6), f16(1, 2, 3, 1))):
        with pytest.raises(ValueError, match=error_line("dequantize", "packed")):
            tqext.dequantize(wrong)


@pytest.mark.parametrize("keys", [dict(norms=f16(2, 2, 39, 1)), dict(bits=2), dict(codes=u32(2, 2, 40, 7)), dict(head_dim=96)])
def test_dequantize_rejects_arrays_that_do_not_fit(keys):
    with pytest.raises(ValueError, match=r"^\[dequantize\] packed\S*: expected .+, got .+"):
        tqext.dequantize(good()[1]._replace(**keys))


# ---- fuzzing --------------------------------------------------------------------------------------

dtypes = st.sampled_from([mx.float32, mx.float16, mx.bfloat16, mx.uint32, mx.int32, mx.bool_, mx.int8])
shapes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 8, 40, 49, 64, 96]), max_size=5).map(tuple)
arrays = st.builds(mx.zeros, shapes, dtypes)
near = st.one_of(st.none(), arrays)
fuzz = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzz
@given(
    changes=st.fixed_dictionaries(
        {},
        optional={
            "q": arrays,
            "keys": st.fixed_dictionaries(
                {},
                optional={
                    "codes": arrays,
                    "norms": arrays,
                    "means": near,
                    "balance": near,
                    "signs": near,
                    "residual_norms": near,
                    "bits": st.integers(-(2**31), 2**31 - 1) | st.integers(0, 8),
                    "head_dim": st.none() | st.integers(-(2**31), 2**31 - 1) | st.integers(0, 600),
                    "rotation": st.sampled_from(["hadamard", "orthogonal", "none", "", "x"]),
                },
            ),
            "values": st.fixed_dictionaries(
                {},
                optional={
                    "codes": arrays,
                    "params": arrays,
                    "bits": st.integers(0, 8),
                    "head_dim": st.none() | st.integers(0, 600),
                },
            ),
            "first": st.none() | st.tuples(arrays, arrays),
            "tail": st.none() | st.tuples(arrays, arrays),
            "mask": near | st.sampled_from(["causal", "", "x"]),
            "sinks": near,
            "left_padding": near,
            "lengths": near,
            "indices": near,
            "scale": st.none() | st.floats(width=32),
        },
    )
)
def test_turboquant_attention_of_arbitrary_arguments_answers_or_refuses(changes):
    try:
        out = attend(**changes)
        mx.eval(out)
    except ValueError as error:
        assert str(error).startswith("[turboquant_attention] "), error
    else:
        assert out.shape[-1] == attend_value_dim(changes)


def attend_value_dim(changes):
    values = good()[2]._replace(**changes.get("values", {}))
    return values.head_dim if values.head_dim is not None else values.codes.shape[-1] * 32 // values.bits


@fuzz
@given(
    x=arrays,
    bits=st.integers(-(2**31), 2**31 - 1) | st.integers(0, 8),
    means=near,
    balance=near,
    qjl=st.booleans(),
    rotation=st.sampled_from(["hadamard", "orthogonal", "none", "x"]),
)
def test_quantize_of_arbitrary_arguments_answers_or_refuses(x, bits, means, balance, qjl, rotation):
    for op, call in (
        ("quantize_keys", lambda: tqext.quantize_keys(x, bits=bits, means=means, balance=balance, qjl=qjl, rotation=rotation)),
        ("quantize_values", lambda: tqext.quantize_values(x, bits=bits, rotation=rotation)),
    ):
        try:
            packed = call()
            mx.eval(tqext.dequantize(packed))
        except ValueError as error:
            assert str(error).startswith(f"[{op}] "), error
        else:
            assert packed.codes.shape[:3] == x.shape[:3]

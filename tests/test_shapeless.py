"""``mx.compile(shapeless=True)``: a traced operator is right for other shapes, or says which argument does not fit.

MLX runs a traced graph again on arrays of other shapes, and calls no operator for it: only the primitives see them.
"""

import os

import mlx.core as mx
import numpy as np
import pytest

import tqext
from support import to_numpy
from tqext import PackedKeys, PackedValues

# TQEXT_FUZZ=100000 tries that many calls of every operator, others than the usual ones.
CALLS = int(os.environ.get("TQEXT_FUZZ", 0))
F32, F16, U32, I32, BOOL = mx.float32, mx.float16, mx.uint32, mx.int32, mx.bool_
SIZES = {
    "B": 2,
    "H": 2,
    "Q": 4,
    "L": 3,
    "n": 70,
    "m": 2,
    "f": 4,
    "t": 9,
    "K": 83,
    "D": 64,
    "R": 5,
    "W": 8,
    "V": 16,
    "G": 2,
    "C": 256,
}


class Operator:
    """An operator on named arrays, whose axes are sizes of `SIZES` or numbers."""

    def __init__(self, call, **arrays):
        self.call = call
        self.arrays = arrays
        self.names = list(arrays)

    def shapes(self, sizes):
        return {name: tuple(sizes.get(axis, axis) for axis in axes) for name, (_, *axes) in self.arrays.items()}

    def draw(self, shapes, rng):
        out = {}
        for name, shape in shapes.items():
            kind = self.arrays[name][0]
            if kind == U32:
                out[name] = mx.array(rng.integers(0, 2**32, shape, np.uint32))
            elif kind == I32:
                out[name] = mx.array(rng.integers(0, 5, shape).astype(np.int32))
            elif kind == BOOL:
                out[name] = mx.array(rng.random(shape) < 0.8)
            else:
                out[name] = mx.array(np.abs(rng.normal(size=shape)).astype(np.float32) + 0.1).astype(kind)
        return out

    def run(self, values):
        """The outputs of the operator on values in the order of the names, as a list."""
        out = self.call(**dict(zip(self.names, values, strict=True)))
        return [x for x in out if isinstance(x, mx.array)] if isinstance(out, tuple | list) else [out]


def keys(a, rotation="hadamard"):
    return PackedKeys(
        a["codes"], a["norms"], a.get("means"), a.get("balance"), a.get("signs"), a.get("residuals"), 3, 64, rotation
    )


def attention(mask=None, rotation="hadamard", **options):
    def call(q, codes, norms, value_codes, params, **a):
        k = keys({"codes": codes, "norms": norms, **a}, rotation)
        v = PackedValues(value_codes, params, 2, 64, "groups", rotation)
        pairs = {part: (a[f"{part}_k"], a[f"{part}_v"]) if f"{part}_k" in a else None for part in ("first", "tail")}
        rest = {name: a.get(name) for name in ("sinks", "left_padding", "lengths")}
        return tqext.turboquant_attention(q, k, v, mask=a.get("mask", mask), **pairs, **rest, **options)

    return call


Q = dict(q=(F32, "B", "Q", "L", "D"))
CODED = dict(
    codes=(U32, "B", "H", "n", 6),
    norms=(F16, "B", "H", "n", 1),
    value_codes=(U32, "B", "H", "n", 4),
    params=(F16, "B", "H", "n", 4),
)
CENTRE = dict(means=(F16, "B", "H", "m", "D"), balance=(F32, "H", "D"))
SIGNS = dict(signs=(U32, "B", "H", "n", 2), residuals=(F16, "B", "H", "n", 1))
FIRST = dict(first_k=(F32, "B", "H", "f", "D"), first_v=(F32, "B", "H", "f", "D"))
TAIL = dict(tail_k=(F32, "B", "H", "t", "D"), tail_v=(F32, "B", "H", "t", "D"))
MEANS_FP32 = dict(means=(F32, "B", "H", "m", "D"))

OPERATORS = {
    "attention": Operator(attention(), **Q, **CODED),
    "attention, causal": Operator(attention("causal"), **Q, **CODED, **CENTRE, **TAIL, sinks=(F32, "Q")),
    "attention, all": Operator(
        attention("causal"), **Q, **CODED, **CENTRE, **SIGNS, **FIRST, **TAIL, left_padding=(I32, "B"), lengths=(I32, "B", 3)
    ),
    "attention, mask": Operator(attention(), **Q, **CODED, **FIRST, **TAIL, mask=(BOOL, "B", "Q", "L", "K")),
    "attention, mask of columns": Operator(attention(), **Q, **CODED, **FIRST, **TAIL, mask=(F32, 1, 1, 1, "K")),
    "attention, rotated": Operator(attention(rotation="none"), **Q, **CODED, **MEANS_FP32, **TAIL),
    "attention, dense": Operator(attention(rotation="orthogonal"), **Q, **CODED, **CENTRE, **TAIL),
    "quantize_keys": Operator(lambda k: tqext.quantize_keys(k, qjl=True), k=(F32, "B", "H", "n", "D")),
    "quantize_keys, centred": Operator(
        lambda k, means, balance: tqext.quantize_keys(k, means=means, balance=balance), k=(F32, "B", "H", "n", "D"), **CENTRE
    ),
    "quantize_keys, dense": Operator(
        lambda k: tqext.quantize_keys(k, rotation="orthogonal"), k=(F32, "B", "H", "n", "D")
    ),
    "quantize_keys, dense and balanced": Operator(
        lambda k, balance: tqext.quantize_keys(k, balance=balance, rotation="orthogonal"),
        k=(F32, "B", "H", "n", "D"), balance=(F32, "H", "D"),
    ),
    "quantize_keys, dense and centred": Operator(
        lambda k, means, balance: tqext.quantize_keys(k, means=means, balance=balance, rotation="orthogonal"),
        k=(F32, "B", "H", "n", "D"),
        **CENTRE,
    ),
    "quantize_values": Operator(lambda v: tqext.quantize_values(v), v=(F32, "B", "H", "n", "D")),
    "quantize_values, dense": Operator(
        lambda v: tqext.quantize_values(v, bits=3, coding="lloyd", rotation="orthogonal"), v=(F32, "B", "H", "n", "D")
    ),
    "dequantize keys": Operator(
        lambda codes, norms, means, balance: tqext.dequantize(PackedKeys(codes, norms, means, balance)),
        codes=(U32, "B", "H", "n", 6), norms=(F16, "B", "H", "n", 1), **CENTRE,
    ),
    "dequantize keys, dense": Operator(
        lambda codes, norms: tqext.dequantize(PackedKeys(codes, norms, rotation="orthogonal")),
        codes=(U32, "B", "H", "n", 6), norms=(F16, "B", "H", "n", 1),
    ),
    "dequantize keys, dense and balanced": Operator(
        lambda codes, norms, balance: tqext.dequantize(PackedKeys(codes, norms, None, balance, rotation="orthogonal")),
        codes=(U32, "B", "H", "n", 6), norms=(F16, "B", "H", "n", 1), balance=(F32, "H", "D"),
    ),
    "dequantize keys, dense and centred": Operator(
        lambda codes, norms, means: tqext.dequantize(PackedKeys(codes, norms, means, rotation="orthogonal")),
        codes=(U32, "B", "H", "n", 6), norms=(F16, "B", "H", "n", 1), means=(F16, "B", "H", "m", "D"),
    ),
    "dequantize values": Operator(
        lambda codes, params: tqext.dequantize(PackedValues(codes, params)),
        codes=(U32, "B", "H", "n", 4), params=(F16, "B", "H", "n", 4),
    ),
    "block_means": Operator(lambda k: tqext.block_means(k), k=(F32, "B", "H", "n", "D")),
    "rotate": Operator(lambda x: tqext.rotate(x), x=(F32, "B", "n", "D")),
    "rotate, many axes": Operator(lambda x: tqext.rotate(x), x=(F32, "B", "H", "L", "t", "D")),
    "rotate, dense": Operator(lambda x: tqext.rotate(x, rotation="orthogonal"), x=(F32, "B", "n", "D")),
    "q1_quantize": Operator(lambda w: tqext.q1_quantize(w), w=(F32, "R", "C")),
    "q1_dequantize": Operator(
        lambda weight, scales: tqext.q1_dequantize(weight, scales), weight=(U32, "R", "W"), scales=(F16, "R", "G")
    ),
    "q1_matmul": Operator(
        lambda x, weight, scales: tqext.q1_matmul(x, weight, scales),
        x=(F32, "n", "C"), weight=(U32, "R", "W"), scales=(F16, "R", "G"),
    ),
    "ternary_matmul": Operator(
        lambda x, weight, scales: tqext.ternary_matmul(x, weight, scales),
        x=(F32, "n", "C"), weight=(U32, "R", "V"), scales=(F16, "R", "G"),
    ),
}  # fmt: skip
# These reshape or slice by the traced numbers: other shapes are errors, also where the operator itself would take them.
TRACED_SHAPES_ONLY = (
    "block_means",
    "rotate, many axes",
    "quantize_keys, dense and centred",
    "dequantize keys, dense and centred",
)
# Sizes that may change together, and what changes with them.
DEPENDENT = {
    "n": lambda s: {"m": -(-s["n"] // 64), "K": s["f"] + s["n"] + s["t"]},
    "f": lambda s: {"K": s["f"] + s["n"] + s["t"]},
    "t": lambda s: {"K": s["f"] + s["n"] + s["t"]},
    "H": lambda s: {"Q": 2 * s["H"]},
    "C": lambda s: {"W": s["C"] // 32, "V": s["C"] // 16, "G": s["C"] // 128},
}


def another(size, rng):
    return int(rng.choice([0, 1, max(size - 1, 0), size + 1, 2 * size, size // 2, size + 64, int(rng.integers(0, 140))]))


def compare(operator, compiled, values):
    """What a traced call made of it: "right" or "refused". Anything else fails."""
    shapes = [value.shape for value in values]
    try:
        want = operator.run(values)
        mx.eval(want)
    except ValueError as error:
        with pytest.raises(ValueError):
            mx.eval(compiled(values))
        assert str(error)
        return "refused"
    try:
        got = compiled(values)
        mx.eval(got)
    except ValueError:
        return "refused"
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape, (shapes, a.shape, b.shape)
        np.testing.assert_allclose(to_numpy(a), to_numpy(b), rtol=1e-3, atol=1e-4, err_msg=str(shapes))
    return "right"


@pytest.mark.parametrize("name", OPERATORS)
def test_shapeless_calls_are_right_or_refused(name, rng):
    """One array of another shape, which never fits; and one size of all of them, which does."""
    operator = OPERATORS[name]
    if CALLS:
        rng = np.random.default_rng()
    compiled = mx.compile(operator.run, shapeless=True)
    traced = operator.shapes(SIZES)
    begin = list(operator.draw(traced, rng).values())
    if name in TRACED_SHAPES_ONLY and name != "rotate, many axes":
        with pytest.raises(ValueError):  # MLX's slice and pad know no other shapes
            compiled(begin)
        return
    assert compare(operator, compiled, begin) == "right"
    symbols = sorted({axis for _, *axes in operator.arrays.values() for axis in axes if isinstance(axis, str)})
    outcomes = {symbol: set() for symbol in symbols}
    for i in range(CALLS or 60):
        sizes, shapes = dict(SIZES), dict(traced)
        symbol = symbols[i % len(symbols)]
        if rng.random() < 0.5:
            array = str(rng.choice(operator.names))
            axis = int(rng.integers(len(shapes[array])))
            shape = list(shapes[array])
            shape[axis] = another(shape[axis], rng)
            shapes[array] = tuple(shape)
            compare(operator, compiled, list(operator.draw(shapes, rng).values()))
        else:
            sizes[symbol] = another(sizes[symbol], rng)
            sizes |= DEPENDENT.get(symbol, lambda s: {})(sizes)
            outcomes[symbol].add(compare(operator, compiled, list(operator.draw(operator.shapes(sizes), rng).values())))
    for symbol in ("n", "B", "L", "t"):
        if symbol in outcomes and name not in TRACED_SHAPES_ONLY:
            assert "right" in outcomes[symbol], f"no other {symbol} was taken"


@pytest.mark.parametrize("n", [64, 128])
@pytest.mark.parametrize("name", TRACED_SHAPES_ONLY)
def test_shapeless_calls_of_traced_shapes_only(name, n, rng):
    """Of an array with as many elements in other axes too: a reshape would take its sequences for others' blocks."""
    operator = OPERATORS[name]
    compiled = mx.compile(operator.run, shapeless=True)
    sizes = SIZES | {"n": 2 * n, "m": 2 * n // 64, "B": 2, "t": 2 * n}
    assert compare(operator, compiled, list(operator.draw(operator.shapes(sizes), rng).values())) == "right"
    other = sizes | {"B": 4, "n": n, "m": n // 64, "t": n}
    values = list(operator.draw(operator.shapes(other), rng).values())
    assert operator.run(values)
    with pytest.raises(ValueError, match="which this function was compiled with"):
        compiled(values)


@pytest.mark.parametrize("part", ["first", "tail", "coded"])
def test_shapeless_calls_do_not_leave_out_what_was_empty_when_traced(part, rng):
    operator = OPERATORS["attention, all" if part != "coded" else "attention, causal"]
    compiled = mx.compile(operator.run, shapeless=True)
    empty = {"first": {"f": 0}, "tail": {"t": 3}, "coded": {"n": 0, "m": 0}}[part]
    if part == "tail":  # without the lengths, which want the queries' own tokens in it
        operator = Operator(attention(), **Q, **CODED, **TAIL)
        compiled, empty = mx.compile(operator.run, shapeless=True), {"t": 0}
    assert compare(operator, compiled, list(operator.draw(operator.shapes(SIZES | empty), rng).values())) == "right"
    with pytest.raises(ValueError, match="which this function was compiled with"):
        compiled(list(operator.draw(operator.shapes(SIZES), rng).values()))
    again = SIZES | empty | {"L": 2}
    assert compare(operator, compiled, list(operator.draw(operator.shapes(again), rng).values())) == "right"


@pytest.mark.parametrize("dim", [48, 72, 80])
def test_shapeless_dense_rotation_of_padded_head_dimensions(dim, rng):
    def call(q, k, v):
        packed = (
            tqext.quantize_keys(k, rotation="orthogonal"),
            tqext.quantize_values(v, bits=3, coding="lloyd", rotation="orthogonal"),
        )
        return tqext.turboquant_attention(q, *packed), tqext.dequantize(packed[0]), tqext.dequantize(packed[1])

    compiled = mx.compile(call, shapeless=True)
    for n in (50, 20, 130):
        q, k, v = (mx.array(rng.normal(size=(1, h, m, dim)).astype(np.float32)) for h, m in ((4, 1), (2, n), (2, n)))
        for got, want in zip(compiled(q, k, v), call(q, k, v), strict=True):
            assert got.shape == want.shape
            np.testing.assert_allclose(to_numpy(got), to_numpy(want), atol=1e-5)


def test_shapeless_rotation_of_a_dimension_without_a_hadamard_matrix(rng):
    """Which of the two rotations it is was decided when the function was traced."""
    for call in (
        tqext.rotate,
        lambda x: tqext.quantize_keys(x)[0],
        lambda x: tqext.quantize_values(x)[0],
    ):
        compiled = mx.compile(call, shapeless=True)
        mx.eval(compiled(mx.ones((1, 2, 3, 64))))
        mx.eval(compiled(mx.ones((1, 2, 3, 128))))
        with pytest.raises(ValueError, match="Hadamard matrix, as compiled"):
            compiled(mx.ones((1, 2, 3, 288)))


def test_shapeless_means_of_batch_one(rng):
    """They are spread over the sequences of the traced call: more of them are an error, not a read beyond the means."""
    operator = OPERATORS["quantize_keys, centred"]
    compiled = mx.compile(operator.run, shapeless=True)
    for sizes, outcome in ((SIZES, "right"), (SIZES | {"n": 90}, "right"), (SIZES | {"B": 4}, "refused")):
        values = operator.draw(operator.shapes(sizes), rng)
        values["means"] = values["means"][:1]
        assert compare(operator, compiled, list(values.values())) == outcome

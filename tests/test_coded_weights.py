"""What q1_matmul and ternary_matmul have in common: refusals, instruction sets, no silent transform."""

import os
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

import reference
import tqext
from support import DTYPES, WEIGHT_TOLERANCE, assert_close, error_line, to_numpy

# Operator -> bits of a weight, its primitive's name, its weights in float64.
PRODUCTS = {
    "q1_matmul": (1, "Q1Matmul", reference.q1_weights),
    "ternary_matmul": (2, "TernaryMatmul", reference.ternary_weights),
}

CHILD = """
import sys, numpy as np, mlx.core as mx, tqext
data, op = np.load(sys.argv[1]), getattr(tqext, sys.argv[3])
for dtype in ("float32", "float16", "bfloat16"):
    for n in (1, 6, 20):
        x = mx.array(data["x"][:n]).astype(getattr(mx, dtype))
        out = op(x, mx.array(data["weight"]), mx.array(data["scales"]), stream=mx.cpu)
        np.save(f"{sys.argv[2]}_{dtype}_{n}.npy", np.array(out.astype(mx.float32)))
print(tqext.isa())
"""


@pytest.mark.parametrize("isa", tqext.available_isas())
@pytest.mark.parametrize("op", PRODUCTS)
def test_coded_weights_every_instruction_set(op, isa, rng, tmp_path):
    bits, _, weights = PRODUCTS[op]
    words = rng.integers(0, 2**32, (333, 5248 * bits // 32), dtype=np.uint32)
    scales = rng.normal(size=(333, 41)).astype(np.float16)
    x = mx.array(rng.normal(size=(20, 5248)).astype(np.float32))
    np.savez(tmp_path / "in.npz", x=to_numpy(x), weight=words, scales=scales)
    command = [sys.executable, "-c", CHILD, str(tmp_path / "in.npz"), str(tmp_path / "out"), op]
    done = subprocess.run(command, env={**os.environ, "TQEXT_ISA": isa}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == isa
    for name, dtype in DTYPES.items():
        want = to_numpy(x.astype(dtype)).astype(np.float64) @ weights(words, scales).T
        for n in (1, 6, 20):
            assert_close(np.load(tmp_path / f"out_{name}_{n}.npy"), want[:n], WEIGHT_TOLERANCE[dtype])


@pytest.mark.parametrize("call", [lambda f, x: mx.grad(f)(x), lambda f, x: mx.vmap(f)(x)], ids=["grad", "vmap"])
@pytest.mark.parametrize("op", PRODUCTS)
def test_coded_weights_have_no_silent_transform(op, call, device):
    bits, primitive, _ = PRODUCTS[op]
    weight, scales = mx.zeros((8, 4 * bits), mx.uint32), mx.ones((8, 1), mx.float16)
    with pytest.raises(ValueError, match=rf"{primitive}|not implemented"):
        mx.eval(call(lambda x: getattr(tqext, op)(x, weight, scales).sum(), mx.ones((2, 128))))


def view(shape, dtype):
    """An array of one element and any shape."""
    return mx.broadcast_to(mx.array(0, dtype), shape)


# What is wrong with x [2, 256], weight [3, 256 * bits / 32] or scales [3, 2] -> the argument, the three of them.
BAD = {
    "columns of x": ("x", lambda x, w, s: (x[:, :128], w, s)),
    "dtype of x": ("x", lambda x, w, s: (x.astype(mx.int32), w, s)),
    "scalar x": ("x", lambda x, w, s: (mx.array(1.0), w, s)),
    "dtype of weight": ("weight", lambda x, w, s: (x, w.astype(mx.int32), s)),
    "axes of weight": ("weight", lambda x, w, s: (x, w[None], s[None])),
    "part of a group": ("weight", lambda x, w, s: (x, w[:, :-1], s)),
    "one axis of weight": ("weight", lambda x, w, s: (x, w[0], s[0])),
    # As 32-bit numbers the columns would be as many as those of x.
    "2^32 columns": (
        "weight",
        lambda x, w, s: (x[:, :0], view((3, w.shape[1] << 24), mx.uint32), view((3, 1 << 25), mx.float16)),
    ),
    "2^32 + 256 columns": (
        "weight",
        lambda x, w, s: (x, view((3, w.shape[1] * (1 + (1 << 24))), mx.uint32), view((3, 2 + (1 << 25)), mx.float16)),
    ),
    "dtype of scales": ("scales", lambda x, w, s: (x, w, s.astype(mx.float32))),
    "rows of scales": ("scales", lambda x, w, s: (x, w, s[:2])),
    "columns of scales": ("scales", lambda x, w, s: (x, w, s[:, :1])),
    "axes of scales": ("scales", lambda x, w, s: (x, w, s[0])),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("op", PRODUCTS)
def test_coded_weights_bad_input_is_a_value_error(op, what, device):
    argument, change = BAD[what]
    good = mx.zeros((2, 256)), mx.zeros((3, 8 * PRODUCTS[op][0]), mx.uint32), mx.zeros((3, 2), mx.float16)
    assert getattr(tqext, op)(*good).shape == (2, 3)
    with pytest.raises(ValueError, match=error_line(op, argument)):
        getattr(tqext, op)(*change(*good))


@pytest.mark.parametrize("words", [1 << 26, 1 << 27])
def test_q1_dequantize_of_too_many_columns_is_a_value_error(words):
    """2^31 and 2^32: a negative length, and none, as 32-bit numbers."""
    with pytest.raises(ValueError, match=error_line("q1_dequantize", "weight")):
        tqext.q1_dequantize(view((1, words), mx.uint32), view((1, words // 4), mx.float16))

"""TQEXT_LOG=1: a line on stderr for every kernel that runs."""

import os
import re
import subprocess
import sys

import pytest

import tqext

SOME_KERNELS = """
import mlx.core as mx, tqext
mx.set_default_device(mx.cpu)
x = mx.zeros((1, 2, 128, 64))
k, v = tqext.quantize_keys(x, means=tqext.block_means(x)), tqext.quantize_values(x)
mx.eval(*(tqext.turboquant_attention(mx.zeros((1, 4, n, 64)), k, v) for n in (1, 9)))
mx.eval(tqext.dequantize(v), tqext.rotate(x))
words, scales = tqext.q1_quantize(mx.zeros((8, 128)))
mx.eval(tqext.q1_matmul(mx.zeros((2, 128)), words, scales), tqext.q1_dequantize(words, scales))
"""


REFUSED = """
import sys, mlx.core as mx, tqext
try:
    tqext.rotate(mx.zeros((32,)))
except ValueError as error:
    print(str(error).replace("[tqext]", "tqext:"), file=sys.stderr)
"""


def lines(value, code=SOME_KERNELS):
    environment = {name: x for name, x in os.environ.items() if name != "TQEXT_LOG"}
    environment |= {} if value is None else {"TQEXT_LOG": value}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return [line for line in done.stderr.splitlines() if line.startswith("tqext: ")]


def test_log_names_each_kernel_with_its_inputs_and_time():
    found = lines("1")
    line = re.compile(rf"tqext: (\w+[\w ]*) \({tqext.isa()}\), ((?:\w+ \[[\d, ]+\](?:, )?)+): ran in (\d+\.\d{{3}}) ms")
    parsed = [line.fullmatch(x) for x in found]
    assert all(parsed), found
    inputs = {m[1]: m[2] for m in parsed}
    kernels = {"turboquant_attention of a step", "turboquant_attention of a prompt", "quantize_keys", "quantize_values"}
    kernels |= {"dequantize", "rotate", "q1_quantize", "q1_matmul", "q1_dequantize"}
    assert len(found) == 9 and inputs.keys() == kernels
    step = "float32 [1, 4, 1, 64], uint32 [1, 2, 128, 6], float16 [1, 2, 128, 1]"
    assert inputs["turboquant_attention of a step"].startswith(step)
    assert inputs["turboquant_attention of a prompt"].startswith("float32 [1, 4, 9, 64]")
    assert inputs["quantize_keys"] == "float32 [1, 2, 128, 64], float16 [1, 2, 2, 64]"
    assert inputs["q1_matmul"] == "float32 [2, 128], uint32 [8, 4], float16 [8, 1]"
    assert 0 < sum(float(m[3]) for m in parsed) < 60_000


@pytest.mark.parametrize("value", [None, "", "0"])
def test_log_is_silent_unless_asked_for(value):
    assert lines(value) == []


def test_log_refuses_other_values():
    assert lines("yes", REFUSED) == ["tqext: TQEXT_LOG: expected 0 or 1, got yes"]

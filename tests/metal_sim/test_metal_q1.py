"""1-bit and ternary weights on the simulated Metal kernels: the CPU backend's own tests."""

import metal_ops
import mlx.core as mx
import pytest

import test_q1_matmul
import test_q1_quantize
import test_ternary_matmul
import tqext

# What the kernels cannot show: argument checks, compilation, threads. The rounding of every half takes minutes on a simulator.
OP_ONLY = ("compiles", "threads", "bad_input", "half_rounding")

for _module in (test_q1_matmul, test_q1_quantize, test_ternary_matmul):
    for _name, _test in vars(_module).items():
        if _name.startswith("test_") and not any(part in _name for part in OP_ONLY):
            globals()[_name] = _test


def SELECTION(name, params):
    """(a kernel exists for these parameters, they run by default)."""
    if name == "test_q1_matmul_matches_float64":
        few = params["n"] in (1, 2, 3, 8, 9) if params["dtype"] == "float32" else params["n"] in (1, 17)
        return True, few and params["cols"] <= 640
    if name == "test_ternary_matmul_matches_float64":
        return True, params["size"] == "small" and params["dtype"] != "float16"
    if name == "test_q1_matmul_every_number_of_rows":
        return True, params["rows"] in (1, 15, 16, 17, 65, 513)
    return True, True


@pytest.fixture(autouse=True)
def on_the_simulated_gpu(scheduled, monkeypatch):
    """The operators of tqext, replaced by those on the simulated GPU."""
    launched = []

    def replace(name, with_dtype=False):
        def call(*arguments, stream=None, **options):
            launched.append(name)
            if with_dtype and len(arguments) > 2:
                arguments, options = arguments[:2], {"dtype": arguments[2]}
            return getattr(metal_ops, name)(scheduled, *arguments, **options)

        monkeypatch.setattr(tqext, name, call)

    replace("q1_matmul")
    replace("ternary_matmul")
    replace("q1_quantize")
    replace("q1_dequantize", with_dtype=True)
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)
    assert launched, "the test never reached the kernels"

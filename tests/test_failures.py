"""Failures inside kernels: an exception of a task, of the environment or of the allocator is one clean Python exception."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import tool

ROOT = Path(__file__).parent.parent
THREADS = "2"

# Calls each operator until it has failed several times; ends with the words "all refused" and status 0.
OPERATORS = """
import mlx.core as mx
mx.set_default_device(mx.cpu)
import tqext
PackedKeys, PackedValues = tqext.PackedKeys, tqext.PackedValues
k, half = mx.ones((1, 4, 5000, 64)), lambda *shape: mx.zeros(shape, mx.float16)
words = lambda *shape: mx.zeros(shape, mx.uint32)
pk, pv = PackedKeys(words(1, 4, 5000, 6), half(1, 4, 5000, 1)), PackedValues(words(1, 4, 5000, 4), half(1, 4, 5000, 4))
calls = dict(
    quantize_keys=lambda: tqext.quantize_keys(k),
    quantize_values=lambda: tqext.quantize_values(k),
    dequantize_keys=lambda: tqext.dequantize(pk),
    dequantize_values=lambda: tqext.dequantize(pv),
    rotate=lambda: tqext.rotate(k),
    turboquant_attention=lambda: tqext.turboquant_attention(mx.ones((1, 8, 1, 64)), pk, pv),
    q1_quantize=lambda: tqext.q1_quantize(mx.ones((600, 128))),
    q1_dequantize=lambda: tqext.q1_dequantize(words(600, 4), half(600, 1)),
    q1_matmul=lambda: tqext.q1_matmul(mx.ones((1, 128)), words(600, 4), half(600, 1)),
    ternary_matmul=lambda: tqext.ternary_matmul(mx.ones((1, 128)), words(600, 8), half(600, 1)),
)
for name, call in calls.items():
    for _ in range(5):
        try:
            call()
        except ValueError as error:
            assert str(error).startswith("[tqext] VARIABLE: expected"), (name, error)
        else:
            raise SystemExit(f"{name}: accepted")
assert (mx.ones(3) + 1).sum().item() == 6
print("all refused")
"""


def run(code, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=os.environ | environment, timeout=300
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.parametrize(
    ("variable", "value"), [("TQEXT_ISA", "avx9"), ("TQEXT_NUM_THREADS", "many"), ("TQEXT_NUM_THREADS", "0")]
)
def test_a_wrong_environment_is_refused_when_an_operator_is_called(variable, value):
    """At the call and not in a task of another thread: there nothing would be left of the type, nor of the array."""
    environment = {"TQEXT_NUM_THREADS": THREADS} | {variable: value}
    assert "all refused" in run(OPERATORS.replace("VARIABLE", variable), **environment)


# Little memory: MLX's output still fits, the queries' rows inside the kernel do not (1 GB).
SHORT_OF_MEMORY = """
import resource
import mlx.core as mx
mx.set_default_device(mx.cpu)
import tqext
packed = tqext.quantize_keys(mx.zeros((1, 16, 8, 512))), tqext.quantize_values(mx.zeros((1, 16, 8, 512)))
few = mx.ones((1, 16, 8, 512), mx.float16)
q = mx.broadcast_to(mx.zeros((1, 1, 1, 512)), (1, 16 * 2048, 8, 512)).astype(mx.float16)
mx.eval(q, [list(p[:2]) for p in packed], tqext.turboquant_attention(few, *packed))
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (600 << 20),) * 2)
for ask in (mx.eval, mx.async_eval, mx.eval):
    out = tqext.turboquant_attention(q, *packed)
    try:
        ask(out)
        mx.synchronize()
    except (RuntimeError, MemoryError) as error:
        assert "bad_alloc" in str(error), error
    else:
        raise SystemExit("there was memory enough, so this shows nothing")
    del out
assert tqext.turboquant_attention(few, *packed).sum().item() == 0
print("refused")
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the address space is read from /proc")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer needs the whole address space")
def test_memory_that_runs_out_in_a_kernel_is_an_exception():
    """Also of work that is evaluated in the background; the process goes on."""
    assert "refused" in run(SHORT_OF_MEMORY, TQEXT_NUM_THREADS=THREADS)


@pytest.mark.parametrize("options", [["-fsanitize=address,undefined"], ["-fsanitize=thread"], ["-DNO_THREADS"]])
def test_tasks_that_throw(options, tmp_path):
    """From four callers at once: each sees its own exception, and no task runs after its caller has left."""
    (mlx,) = importlib.util.find_spec("mlx").submodule_search_locations
    program, sources = tmp_path / "parallel_check", [ROOT / "tests/native/parallel_check.cpp", ROOT / "csrc/cpu/parallel.cpp"]
    flags = ["-std=c++20", "-O1", "-g", "-pthread", *options, "-I", ROOT / "csrc", "-isystem", f"{mlx}/include"]
    subprocess.run([tool("c++", "g++", "clang++"), *flags, *sources, "-o", program], check=True)
    for threads in ("1", "2", "5"):
        environment = os.environ | {"TQEXT_NUM_THREADS": threads}
        environment.pop("LD_PRELOAD", None)
        done = subprocess.run([program, "1000"], capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.startswith(f"{threads} threads,")

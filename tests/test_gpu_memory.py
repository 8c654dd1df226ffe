"""Memory that the CUDA kernels keep beside MLX's own."""

import time
from types import SimpleNamespace

import mlx.core as mx
import pytest

import tqext
from support import on_cuda
from tqext._load import extend_clear_cache


def test_clear_cache_frees_both_kinds_of_memory():
    calls = []
    core = SimpleNamespace(clear_cache=lambda: calls.append("MLX's"))
    extend_clear_cache(core, SimpleNamespace(clear_gpu_memory=lambda: calls.append("ours")))
    assert core.clear_cache() is None
    assert calls == ["MLX's", "ours"]


def test_without_cuda_there_is_nothing_to_free():
    if mx.cuda.is_available():
        pytest.skip("this MLX has CUDA")
    assert tqext._ext.clear_gpu_memory() == 0
    assert not hasattr(mx.clear_cache, "__wrapped__")


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("device", [pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
def test_clear_cache_gives_back_outputs_that_are_free():
    if not on_cuda():
        pytest.skip("Metal's kernels get their memory from MLX")
    weight, scales = tqext.q1_quantize(mx.random.normal((8192, 4096)))
    x = mx.random.normal((64, 4096))
    want = tqext.q1_matmul(x, weight, scales)
    mx.eval(want)
    mx.clear_cache()
    assert tqext._ext.clear_gpu_memory() == 0
    for _ in range(3):
        out = tqext.q1_matmul(x, weight, scales)
        mx.async_eval(out)
        del out
        mx.synchronize()
        # MLX lets go of an output a little after the kernel that wrote it has ended.
        freed, end = 0, time.monotonic() + 5
        while freed < want.nbytes and time.monotonic() < end:
            freed += tqext._ext.clear_gpu_memory()
        assert freed >= want.nbytes
    assert mx.array_equal(tqext.q1_matmul(x, weight, scales), want)
    mx.clear_cache()
    assert tqext._ext.clear_gpu_memory() == 0

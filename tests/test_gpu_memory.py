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


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("device", [pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
def test_the_layers_of_a_prompt_are_not_in_memory_together():
    """MLX's limit alone is a thousand kernels: the temporary arrays of all 60 layers here, 1.5 GB."""
    if not on_cuda():
        pytest.skip("MLX counts Metal's work in other parts")
    n_layers, n_queries, heads = 60, 512, (1, 8)
    keys, values = (mx.random.normal((*heads, 1024, 128)).astype(mx.float16) for _ in range(2))
    k, v = tqext.quantize_keys(keys, bits=3), tqext.quantize_values(values, bits=2)
    q = mx.random.normal((1, 32, n_queries, 128)).astype(mx.float16)
    mx.eval(q, k.codes, v.codes)
    del keys, values

    def prompt():
        x = q
        for _ in range(n_layers):
            y = tqext.turboquant_attention(x, k, v)
            x = mx.concatenate([y * 2, y * 3, y * 5, y * 7], axis=3)[..., 64:192]
        return x

    mx.eval(prompt())
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(prompt())
    per_layer = 6 * q.nbytes + 2 * q.nbytes  # the output, what is joined, the joined, and room
    assert mx.get_peak_memory() - before < 6 * per_layer

import os
import random

# MLX multiplies fp32 matrices in TF32 on NVIDIA GPUs: too coarse for a test of fp32.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
# OpenBLAS would start a thread per core in every worker of the reference.
os.environ.setdefault("OMP_NUM_THREADS", "2")

import mlx.core as mx
import numpy as np
import pytest

HAS_GPU = mx.is_available(mx.gpu)


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    """The MLX default device of the test: the CPU, and the GPU where there is one."""
    if request.param == "gpu" and not HAS_GPU:
        pytest.fail("this machine has no GPU that MLX can use")
    before = mx.default_device()
    mx.set_default_device(getattr(mx, request.param))
    yield request.param
    mx.set_default_device(before)


def pytest_collection_modifyitems(config, items):
    # Without a GPU its variants are not tests of this machine; asked for by name they fail (see `device`).
    if HAS_GPU or config.getoption("-m"):
        return
    kept = [item for item in items if not item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("gpu")])
    items[:] = kept


@pytest.fixture(autouse=True)
def seed(request):
    """The same random numbers in every run, and alone as in company."""
    value = sum(request.node.name.encode()) % 2**31
    random.seed(value)
    np.random.seed(value)
    mx.random.seed(value)
    return value


@pytest.fixture
def rng(seed):
    return np.random.default_rng(seed)

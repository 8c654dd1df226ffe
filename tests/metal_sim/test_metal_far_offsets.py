"""Sequences that lie more than 2^32 bytes, and 2^31 numbers, apart: offsets that 32 bits do not hold."""

import metal_ops
import mlx.core as mx
import numpy as np
import pytest
from test_metal_kernels import attend

from support import KERNEL_TOLERANCE, Problem, assert_close

GAP = (1 << 32) + (1 << 20)  # bytes


def far(x):
    """A view of the same numbers whose sequences are GAP bytes apart; what lies between them takes no memory."""
    x = np.array(x)
    space = np.zeros(GAP * (len(x) - 1) + x[0].nbytes, np.uint8)
    view = np.lib.stride_tricks.as_strided(space.view(x.dtype), x.shape, (GAP, *x.strides[1:]))
    view[...] = x
    return view


@pytest.mark.parametrize("n_repeats", [4, 8])
@pytest.mark.parametrize("part", ["codes", "norms", "value codes", "params"])
def test_offsets_beyond_32_bits(part, n_repeats):
    problem = Problem(batch=2, n_kv_heads=1, n_repeats=n_repeats, n_coded=300, head_dim=64)
    want, field = problem.answer(), part.removeprefix("value ")
    if part in ("codes", "norms"):
        problem.packed_k = problem.packed_k._replace(**{field: far(getattr(problem.packed_k, field))})
    else:
        problem.packed_v = problem.packed_v._replace(**{field: far(getattr(problem.packed_v, field))})
    assert_close(attend(metal_ops.Device("fast"), problem), want, KERNEL_TOLERANCE[mx.float32])

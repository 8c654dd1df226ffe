"""What must hold of the Metal kernel for prompts beyond its results: bytes per row block, memory, schedules, NaN."""

import metal_ops
import metal_simulator as sim
import mlx.core as mx
import numpy as np
import pytest

from support import KERNEL_TOLERANCE, Problem, assert_close


def run(device, problem):
    """With the kernel of prompts, also where the plan expects less time of another one."""
    n_rows = problem.q.shape[2] * problem.n_repeats
    wide = n_rows > 32 and max(problem.head_dim, problem.value_dim) <= 128
    device.kernel = "prompt64" if wide else "prompt32"
    device.reset()
    out = metal_ops.turboquant_attention(device, problem.q, problem.packed_k, problem.packed_v, **problem.arguments())
    assert_close(out, problem.answer(), KERNEL_TOLERANCE[problem.dtype])
    assert "prompt" in device.log[0][0]


PACKED = {
    "kAttentionKeyCodes": lambda p: p.packed_k.codes,
    "kAttentionKeyNorms": lambda p: p.packed_k.norms,
    "kAttentionValueCodes": lambda p: p.packed_v.codes,
    "kAttentionValueParams": lambda p: p.packed_v.params,
    "kAttentionMeans": lambda p: p.packed_k.means,
    "kAttentionKeySigns": lambda p: p.packed_k.signs,
    "kAttentionResidualNorms": lambda p: p.packed_k.residual_norms,
}


@pytest.mark.parametrize("n_cores", [1, 80])
@pytest.mark.parametrize(
    "head_dim, n_rows, blocks", [(64, 32, 1), (64, 64, 1), (64, 130, 3), (128, 64, 1), (256, 32, 1), (256, 64, 2)]
)
@pytest.mark.parametrize("coding, value_bits", [("groups", 2), ("lloyd", 3)])
def test_every_packed_byte_is_read_once_per_row_block(head_dim, n_rows, blocks, coding, value_bits, n_cores):
    """64 rows up to dimension 128, 32 above, whether the context is split or not."""
    device = metal_ops.Device("check", n_cores=n_cores)
    problem = Problem(
        n_kv_heads=2, n_repeats=1, n_rows=n_rows, n_coded=1100, head_dim=head_dim, means=True, balance=True, qjl=True,
        value_coding=coding, value_bits=value_bits,
    )  # fmt: skip
    run(device, problem)
    assert len(device.log) == (2 if n_cores == 80 else 1)
    for name, array in PACKED.items():
        assert sum(stats.buffer_read[metal_ops.ENUM[name]] for _, stats in device.log) == blocks * array(problem).nbytes, name


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=str)
def test_exact_tokens_are_read_once_per_row_block_as_far_as_it_sees(dtype):
    """Tiles of 32 tokens; under the causal mask a block of rows reads up to the tile of its last query."""
    device = metal_ops.Device("check", n_cores=1)
    problem = Problem(
        n_kv_heads=1, n_repeats=1, n_rows=192, n_coded=64, n_first=4, n_tail=192, head_dim=64, dtype=dtype,
        options={"mask": "causal"},
    )  # fmt: skip
    run(device, problem)
    item = problem.tail[0].itemsize
    for part in ("Keys", "Values"):
        read = [
            sum(s.buffer_read[metal_ops.ENUM[f"kAttention{name}{part}"]] for _, s in device.log) for name in ("First", "Tail")
        ]
        assert read == [3 * 4 * 64 * item, (64 + 128 + 192) * 64 * item]


@pytest.mark.parametrize("head_dim, value_dim", [(64, 64), (128, 128), (256, 256), (256, 64), (160, 192)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_threadgroup_memory_stays_below_the_limit(head_dim, value_dim, dtype):
    """32 KiB of every Apple GPU, with tables of keys and of values."""
    device = metal_ops.Device("check", n_cores=1)
    for n_rows in (20, 40):
        problem = Problem(
            n_kv_heads=1, n_repeats=1, n_rows=n_rows, n_coded=40, n_tail=3, head_dim=head_dim, value_dim=value_dim, key_bits=3,
            value_bits=4, value_coding="lloyd", dtype=dtype, means=True,
        )  # fmt: skip
        run(device, problem)
        print(device.log[0][0], device.log[0][1].threadgroup_bytes)
        assert 4096 < device.log[0][1].threadgroup_bytes <= 32768


@pytest.mark.parametrize("n_cores", [1, 80])
@pytest.mark.parametrize("schedule", [sim.RANDOM, sim.RANDOM + sim.PREEMPT])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_any_schedule_gives_the_same_answer(head_dim, schedule, n_cores):
    device = metal_ops.Device("check", schedule=schedule, seed=head_dim, n_cores=n_cores)
    problem = Problem(
        n_kv_heads=1, n_repeats=2, n_rows=33, n_coded=700, n_first=4, n_tail=50, head_dim=head_dim, means=True, balance=True,
        value_coding="lloyd", value_bits=3, options={"mask": "causal"},
    )  # fmt: skip
    run(device, problem)


@pytest.mark.parametrize("n_repeats", [1, 3])
def test_residual_signs(n_repeats):
    device = metal_ops.Device("check", n_cores=1)
    for head_dim, n_rows in ((64, 40), (160, 20)):
        problem = Problem(n_repeats=n_repeats, n_rows=n_rows, n_coded=150, n_tail=7, head_dim=head_dim, qjl=True, means=True)
        if n_repeats * n_rows > 16:
            run(device, problem)


@pytest.mark.parametrize("coding, value_bits", [("groups", 2), ("lloyd", 3)])
def test_tokens_that_a_mask_hides_may_hold_anything(coding, value_bits):
    """NaN in coded and exact tokens that no row attends to, and in one that only some rows attend to."""
    device = metal_ops.Device("check", n_cores=1)
    problem = Problem(
        n_kv_heads=1, n_repeats=1, n_rows=40, n_coded=150, n_first=3, n_tail=45, head_dim=64, value_coding=coding,
        value_bits=value_bits, means=True,
    )  # fmt: skip
    hidden = np.arange(problem.n_keys) % 7 == 3
    allowed = np.broadcast_to(~hidden, (40, problem.n_keys)).copy()
    problem.options["mask"] = mx.array(allowed)
    want = problem.answer()
    coded = hidden[3:153]
    norms, params = np.array(problem.packed_k.norms), np.array(problem.packed_v.params)
    norms[:, :, coded], params[:, :, coded] = np.nan, np.nan
    problem.packed_k = problem.packed_k._replace(norms=mx.array(norms))
    problem.packed_v = problem.packed_v._replace(params=mx.array(params))
    for name, part in (("first", hidden[:3]), ("tail", hidden[153:])):
        arrays = [np.array(x) for x in getattr(problem, name)]
        for x in arrays:
            x[:, :, part] = np.nan
        setattr(problem, name, tuple(map(mx.array, arrays)))
    out = metal_ops.turboquant_attention(device, problem.q, problem.packed_k, problem.packed_v, **problem.arguments())
    assert_close(out, want, KERNEL_TOLERANCE[mx.float32])
    # Rows 30 and later attend to a token of each kind that holds NaN: they alone become NaN.
    allowed[30:, 10] = True
    assert hidden[10] and hidden[157]
    for column in (10, 157):
        seen = np.broadcast_to(~hidden, (40, problem.n_keys)).copy()
        seen[30:, column] = True
        problem.options["mask"] = mx.array(seen)
        out = np.array(
            metal_ops.turboquant_attention(device, problem.q, problem.packed_k, problem.packed_v, **problem.arguments())
        )[0, 0]
        assert np.isnan(out[30:]).all() and np.isfinite(out[:30]).all()

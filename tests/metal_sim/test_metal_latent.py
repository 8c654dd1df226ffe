"""The Metal kernel of attention over latents: the operator's tests on it, and what must hold beyond its results."""

import metal_ops
import metal_simulator as sim
import mlx.core as mx
import numpy as np
import pytest

import reference
import test_latent_attention as shared
import tqext
from support import KERNEL_TOLERANCE, assert_close, decoded_keys, poisoned, poisoned_tokens, to_numpy
from test_latent_attention import SCALE, Problem, way  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("device")

# Of the operator's tests those whose shapes the kernel takes.
for name in ("", "_types", "_of_half_precision", "_of_half_precision_in_a_long_context"):
    globals()[f"test_latent_attention{name}"] = getattr(shared, f"test_latent_attention{name}")

# Parameter sets that run by default.
DEFAULT = {
    "test_latent_attention": lambda p: (p["dim"], p["bits"]) in ((512, 3), (256, 2)),
    "test_latent_attention_types": lambda p: (p["dtype"], p["n_rows"]) == (mx.float16, 1),
    "test_latent_attention_of_half_precision": lambda _: False,
    "test_latent_attention_of_half_precision_in_a_long_context": lambda _: False,
    "test_options_of_batches": lambda p: p["causal"] == (p["case"] % 2 == 0),
    "test_threadgroup_memory_and_operations_per_tile": lambda p: p["dtype"] == mx.float32,
    "test_any_schedule_gives_the_same_answer": lambda p: p["schedule"] != sim.RANDOM,
    "test_every_byte_is_read_once_per_row_block": lambda p: (p["n_cores"] == 1) == (p["blocks"] == 2),
}


def SELECTION(name, params):
    """(the kernel takes these parameters, they run by default)."""
    has_kernel = (
        params.get("way", "kernel") == "kernel" and params.get("dim", 512) in (256, 512) and params.get("n_rows", 1) <= 64
    )
    return has_kernel, DEFAULT.get(name, lambda _: True)(params)


@pytest.fixture
def device(scheduled, monkeypatch):
    """`tqext.latent_attention` runs on the simulated GPU; packing stays on the CPU."""

    def simulated(q, packed, **options):
        return metal_ops.latent_attention(scheduled, q, packed, **options)

    monkeypatch.setattr(tqext, "latent_attention", simulated)
    with mx.stream(mx.cpu):
        yield scheduled
    assert any("latent" in name for name, _ in scheduled.log), "the test never reached the kernel"


def run(device, problem, mask=None, **options):
    """With more options than `tqext.latent_attention` has: those of the caches' batches."""
    packed = problem.packed
    values = tqext.PackedValues(packed.codes, packed.norms, packed.bits, packed.head_dim, "lloyd", packed.rotation)
    tokens = {name: None if getattr(problem, name) is None else (getattr(problem, name),) * 2 for name in ("first", "tail")}
    return metal_ops.turboquant_attention(
        device, problem.q, packed, values, scale=SCALE, mask=mask, latent=True, **tokens, **options
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", range(4))
def test_options_of_batches(device, case, causal):
    """Padding, lengths, sinks, means in the rotated space; every part may be empty."""
    rng = np.random.default_rng(case)
    problem = Problem(
        dim=(256, 248, 512, 256)[case], rope_dim=None, batch=3, n_kv_heads=2, n_repeats=3, n_rows=3, bits=(2, 3, 3, 4)[case],
        n_first=(4, 0, 2, 0)[case], n_coded=(150, 70, 0, 129)[case], n_tail=(9, 5, 12, 3)[case], balance=case != 3,
        rotation="none" if case == 3 else "hadamard", dtype=(mx.float32, mx.float16, mx.float32, mx.bfloat16)[case], seed=case,
    )  # fmt: skip
    n_first, n_coded, n_tail = (0 if x is None else x.shape[2] for x in (problem.first, problem.packed.codes, problem.tail))
    options = {"sinks": mx.array(rng.normal(size=6).astype(np.float32))}
    if case != 2:
        options["left_padding"] = mx.array(rng.integers(0, 80, 3).astype(np.int32))
    if case != 1:
        tops = n_first, n_coded, n_tail - 3 * causal
        options["lengths"] = mx.array(np.stack([rng.integers(0, n + 1, 3) for n in tops], 1).astype(np.int32))
    mask = "causal" if causal else None
    x = decoded_keys(problem.packed)
    first, tail = (None if part is None else (to_numpy(part),) * 2 for part in (problem.first, problem.tail))
    given = {name: to_numpy(value) for name, value in options.items()}
    want = reference.attention(to_numpy(problem.q), x, x, scale=SCALE, mask=mask, first=first, tail=tail, **given)
    assert_close(run(device, problem, mask, **options), want, KERNEL_TOLERANCE[problem.dtype])


READ = {
    "kAttentionKeyCodes": lambda p: p.packed.codes,
    "kAttentionKeyNorms": lambda p: p.packed.norms,
    "kAttentionMeans": lambda p: p.packed.means,
    "kAttentionFirstKeys": lambda p: p.first,
    "kAttentionTailKeys": lambda p: p.tail,
    "kAttentionValueCodes": lambda p: mx.zeros(0),
    "kAttentionValueParams": lambda p: mx.zeros(0),
}


@pytest.mark.parametrize("n_cores", [1, 80])
@pytest.mark.parametrize("n_repeats, blocks", [(16, 1), (20, 2)])
def test_every_byte_is_read_once_per_row_block(device, n_repeats, blocks, n_cores):
    """16 rows; codes for scores and values together; each number of the mask once."""
    device.n_cores = n_cores
    problem = Problem(dim=256, rope_dim=None, n_repeats=n_repeats, n_coded=64 * 19 + 5, n_first=4, n_tail=21, dtype=mx.float16)
    mask = problem.rng.normal(size=problem.full).astype(np.float32)
    assert_close(run(device, problem, mx.array(mask)), problem.answer(mask), KERNEL_TOLERANCE[mx.float16])
    (attend, stats), (combine, _) = device.log
    assert "combine" in combine and "combine" not in attend
    assert {name: stats.buffer_read[metal_ops.ENUM[name]] for name in READ} == {
        name: blocks * array(problem).nbytes for name, array in READ.items()
    }
    assert stats.buffer_read[metal_ops.ENUM["kAttentionMask"]] == mask.nbytes
    for _, counted in device.log:
        assert counted.threadgroup_bytes <= 32768


@pytest.mark.parametrize("n_rows, n_repeats, mask", [(9, 3, "causal"), (33, 1, "bool"), (64, 1, "float"), (64, 2, "causal")])
def test_steps_of_many_tokens(device, n_rows, n_repeats, mask):
    """Follow-ups: blocks of 16 rows, of one head and of several; codes are read once for each, its mask once."""
    device.n_cores = 1
    problem = Problem(
        dim=512 if n_rows == 33 else 256, bits=2, rope_dim=None, n_repeats=n_repeats, n_rows=n_rows, n_coded=100, n_first=3,
        n_tail=n_rows - 5, batch=2 if n_rows == 9 else 1, balance=n_rows == 9, dtype=mx.float16,
    )  # fmt: skip
    given = mask
    if mask != "causal":
        allowed = problem.rng.random(problem.full) < 0.6
        given = allowed if mask == "bool" else np.where(allowed, problem.rng.normal(size=problem.full), -np.inf)
    array = given if mask == "causal" else mx.array(given.astype(np.float32) if mask == "float" else given)
    assert_close(run(device, problem, array), problem.answer(given), KERNEL_TOLERANCE[mx.float16])
    (attend, stats), (combine, _) = device.log
    blocks = -(-n_rows * n_repeats // 16)
    assert "combine" in combine and "combine" not in attend
    assert {name: stats.buffer_read[metal_ops.ENUM[name]] for name in READ} == {
        name: blocks * array(problem).nbytes for name, array in READ.items()
    }


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=str)
def test_threadgroup_memory_and_operations_per_tile(device, dtype):
    """What the kernel's comment says at D = 512: memory below the limit, products, barriers."""
    device.n_cores = 1
    totals = []
    for n_coded in (1024, 2048):  # two ranges
        problem = Problem(rope_dim=None, n_repeats=16, n_coded=n_coded, dtype=dtype)
        problem.q = mx.zeros_like(problem.q)  # the maximum is found in the first tile
        device.reset()
        run(device, problem)
        stats = device.log[0][1]
        totals.append([stats.simd_operations, stats.barriers])
    assert 31000 < stats.threadgroup_bytes <= 32768
    operations, barriers = ((b - a) / (1024 / 16) for a, b in zip(*totals, strict=True))
    # 64 products of matrices, a vote, four shuffles for the maximum in each of eight simdgroups; every four tiles two times
    # five shuffles of the mean, eight of its scores, four of the block's sum.
    assert operations == 8 * (64 + 1 + 4 + (10 + 4 + 4) / 4)
    assert barriers == 4


@pytest.mark.parametrize("schedule", [sim.RANDOM, sim.RANDOM + sim.PREEMPT])
def test_any_schedule_gives_the_same_answer(device, schedule):
    device.schedule = schedule
    for n_cores in (1, 80):
        device.n_cores = n_cores
        Problem(dim=256, bits=2, n_repeats=5, n_rows=2, n_coded=550, n_first=4, n_tail=20, balance=True).check("causal")


def test_reads_nothing_beside_its_tokens(device):
    problem = Problem(dim=256, bits=2, n_coded=150, n_first=3, n_tail=20, batch=2, means=False)
    want = problem.run()
    packed = poisoned_tokens(problem.packed)
    got = problem.run(packed=packed, first=poisoned(problem.first, np.nan), tail=poisoned(problem.tail, np.nan))
    np.testing.assert_array_equal(to_numpy(got), to_numpy(want))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_number_that_is_not_finite_is_seen_by_who_attends_to_it(device, bad):
    """And by no other row: a norm, a mean, an exact latent."""
    problem = Problem(dim=256, bits=2, n_coded=192, n_first=2, n_tail=9, n_rows=2, rope_dim=None)
    mask = np.ones(problem.full, bool)
    mask[:, :, 0, 66:130] = mask[:, :, 0, 1] = mask[:, :, 0, -1] = False  # the second block, a first token, the last one
    means, norms, first, tail = (np.array(x) for x in (problem.packed.means, problem.packed.norms, problem.first, problem.tail))
    means[:, :, 1], norms[:, :, 70], first[:, :, 1, 7], tail[:, :, -1, 200] = bad, bad, bad, bad
    packed = problem.packed
    for changes in (
        {"packed": packed._replace(means=mx.array(means))},
        {"packed": packed._replace(norms=mx.array(norms))},
        {"first": mx.array(first)},
        {"tail": mx.array(tail)},
    ):
        got = to_numpy(problem.run(mask=mx.array(mask), **changes))
        assert np.isfinite(got[:, :, 0]).all() and np.isnan(got[:, :, 1]).all(), changes.keys()

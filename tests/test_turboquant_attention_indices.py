"""turboquant_attention over a list of tokens (`indices`), against float64 attention over the same bytes."""

import mlx.core as mx
import numpy as np
import pytest

from support import DTYPES, KERNEL_TOLERANCE, Problem, assert_close, poisoned, poisoned_tokens, to_numpy, token_lists

pytestmark = pytest.mark.usefixtures("device")


def listed(n_listed=70, *, per_head=True, per_query=True, **problem):
    problem = Problem(**problem)
    problem.options["indices"] = token_lists(problem, n_listed, per_head=per_head, per_query=per_query)
    return problem


CODINGS = [(3, 2, "groups"), (3, 3, "lloyd"), (4, 4, "lloyd"), (2, 2, "lloyd"), (4, 4, "groups")]


@pytest.mark.covering
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 224, 256, 512])
def test_indices_every_head_dim(head_dim, dtype):
    listed(head_dim=head_dim, n_coded=300, dtype=DTYPES[dtype], means=True, balance=True, n_first=3, n_tail=5).check()


@pytest.mark.covering
@pytest.mark.parametrize("key_bits, value_bits, coding", CODINGS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_indices_all_bits(head_dim, key_bits, value_bits, coding):
    for n_rows, n_repeats in ((1, 4), (2, 3), (1, 12)):
        listed(
            head_dim=head_dim, key_bits=key_bits, value_bits=value_bits, value_coding=coding, n_rows=n_rows,
            n_repeats=n_repeats, n_coded=250, means=True, balance=True, n_tail=9, dtype=mx.float16,
        ).check()  # fmt: skip


@pytest.mark.covering(pairs=True)
@pytest.mark.parametrize("per_query", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("n_rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 40])
def test_indices_every_number_of_queries(n_rows, per_head, per_query):
    for n_repeats, batch, mask in ((1, 2, "causal"), (4, 1, None), (5, 1, "causal")):
        listed(
            n_rows=n_rows, n_repeats=n_repeats, batch=batch, n_coded=150, n_first=2, n_tail=20, head_dim=64, means=True,
            per_head=per_head, per_query=per_query, options={"mask": mask},
        ).check()  # fmt: skip


@pytest.mark.parametrize("n_listed", [0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 511, 512, 513, 1500])
def test_indices_every_length(n_listed):
    for dtype in (mx.float32, mx.float16):
        listed(n_listed, n_coded=2000, n_kv_heads=1, head_dim=64, means=True, balance=True, n_tail=3, dtype=dtype).check()


def test_indices_far_apart():
    """Ids beyond what 16 bits hold, and blocks that share a place in the table of means (1024 apart)."""
    problem = Problem(n_kv_heads=1, n_coded=131_400, head_dim=32, means=True)
    near = np.arange(64) * 3
    problem.options["indices"] = mx.array(
        np.concatenate([near, near + 65536, near + 2 * 65536, near, [131_399]]).astype(np.int32)[None, None, None]
    )
    problem.check()


@pytest.mark.parametrize("n_rows", [1, 3, 12])
def test_indices_of_all_tokens_equal_no_list(n_rows):
    problem = Problem(n_coded=700, n_rows=n_rows, means=True, balance=True, n_first=4, n_tail=30, options={"mask": "causal"})
    dense = to_numpy(problem.run())
    rng = np.random.default_rng(3)
    for order in (np.arange(700), rng.permutation(700)):
        ids = mx.array(order.astype(np.int32))[None, None, None]
        assert_close(problem.run(indices=ids), dense, KERNEL_TOLERANCE[mx.float32])


def test_indices_of_one_token_give_its_value():
    problem = Problem(n_coded=300, head_dim=64, means=True)
    alone = problem.run(indices=mx.array([[[[211]]]]))
    token = problem.packed_v._replace(
        codes=problem.packed_v.codes[:, :, 211:212], params=problem.packed_v.params[:, :, 211:212]
    )
    k = problem.packed_k
    key = k._replace(codes=k.codes[:, :, 211:212], norms=k.norms[:, :, 211:212], means=k.means[:, :, 3:4])
    assert_close(alone, to_numpy(problem.run(packed_k=key, packed_v=token)), KERNEL_TOLERANCE[mx.float32])


def test_indices_listed_twice_count_twice():
    problem = Problem(n_coded=100, head_dim=64, means=True, n_tail=2)
    problem.options["indices"] = mx.array([[[[5, 70, 5, 5, -1, 8]]]])
    problem.check()


def test_indices_as_uint32_are_those_of_int32():
    problem = Problem(n_coded=100, head_dim=64, means=True, n_tail=2)
    ids = mx.array([[[[5, 70, -1, 8, -(2**31), 99, 100]]]])
    want = to_numpy(problem.run(indices=ids))
    assert np.array_equal(to_numpy(problem.run(indices=ids.view(mx.uint32))), want)


@pytest.mark.parametrize("n_rows", [1, 10])
def test_indices_of_nothing_leave_the_exact_tokens(n_rows):
    empty = mx.full((1, 1, 1, 40), -1, dtype=mx.int32)
    problem = Problem(n_coded=100, n_rows=n_rows, head_dim=64, means=True, n_first=2, n_tail=5)
    nothing = mx.array([[2, 0, 5]])
    assert_close(problem.run(indices=empty), to_numpy(problem.run(lengths=nothing)), KERNEL_TOLERANCE[mx.float32])
    assert not to_numpy(problem.run(indices=empty, first=None, tail=None)).any()
    for n_coded in (0, 1):
        listed(n_coded=n_coded, n_rows=n_rows, head_dim=64, n_tail=3, means=True).check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_indices_with_residual_signs(dtype):
    problem = listed(qjl=True, dtype=DTYPES[dtype], n_rows=2, n_coded=200, means=True, balance=True, n_tail=3)
    problem.check()


@pytest.mark.parametrize("rotation", ["orthogonal", "none"])
@pytest.mark.parametrize("head_dim, value_dim", [(64, 64), (80, 112), (288, 96)])
def test_indices_with_other_rotations(head_dim, value_dim, rotation):
    listed(
        head_dim=head_dim, value_dim=value_dim, rotation=rotation, means=True, balance=True, n_coded=200, n_first=3, n_tail=9,
        n_rows=2, options={"mask": "causal"},
    ).check()  # fmt: skip


@pytest.mark.parametrize("case", range(60))
def test_indices_random_mixtures(case):
    """With every other option: masks, padding and lengths restrict what is listed."""
    rng = np.random.default_rng(case)

    def one_of(*choices):
        return choices[rng.integers(len(choices))]

    coding, value_bits = one_of(("groups", 2), ("groups", 4), ("lloyd", 3))
    problem = Problem(
        batch=one_of(1, 2, 3), n_kv_heads=one_of(1, 2, 3), n_repeats=one_of(1, 3, 4, 8), n_rows=one_of(1, 1, 2, 5, 12),
        n_coded=one_of(1, 64, 130, 500), head_dim=one_of(64, 128), value_dim=one_of(64, 96), key_bits=one_of(2, 3, 4),
        value_bits=value_bits, value_coding=coding, dtype=one_of(*DTYPES.values()), means=one_of(True, False),
        balance=one_of(True, False), n_first=one_of(0, 5), n_tail=one_of(0, 20), sinks=one_of(True, False), seed=case,
    )  # fmt: skip
    options, batch, n_rows = problem.options, problem.batch, problem.n_rows
    options["indices"] = token_lists(
        problem, one_of(1, 40, 64, 200), per_head=one_of(True, False), per_query=one_of(True, False)
    )
    kind = one_of(None, "causal", "bool", "float32")
    if kind == "causal":
        options["mask"] = kind
    elif kind:
        shape = (one_of(1, batch), one_of(1, problem.n_q_heads), one_of(1, n_rows), problem.n_keys)
        allowed = rng.random(shape) < 0.6
        numbers = np.where(allowed, rng.normal(size=shape), -np.inf).astype(np.float32)
        options["mask"] = mx.array(allowed if kind == "bool" else numbers)
    if one_of(True, False):
        options["left_padding"] = mx.array(rng.integers(0, problem.n_keys, batch).astype(np.int32))
    if one_of(True, False) and (kind != "causal" or problem.n_tail >= n_rows):
        tops = (problem.n_first, problem.n_coded, problem.n_tail - (n_rows if kind == "causal" else 0))
        options["lengths"] = mx.array(np.stack([rng.integers(0, n + 1, batch) for n in tops], 1).astype(np.int32))
    problem.check()


@pytest.mark.parametrize("qjl", [False, True])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_indices_read_nothing_else(head_dim, qjl):
    """What is not listed may hold anything; views are read in place, the list as well."""
    problem = listed(100, head_dim=head_dim, n_coded=300, n_rows=2, means=True, qjl=qjl, n_tail=3)
    want, ids = problem.answer(), problem.options["indices"]
    named = np.unique(np.array(ids))
    unlisted = np.setdiff1d(np.arange(300), named)
    # Each head has its own list, so what no head names is spoilt.
    changes = {}
    for packed, name in ((problem.packed_k, "packed_k"), (problem.packed_v, "packed_v")):
        spoilt = {}
        for field, fill in (("norms", np.nan), ("params", np.nan), ("residual_norms", np.inf), ("codes", 0xFFFFFFFF)):
            if getattr(packed, field, None) is not None:
                x = np.array(getattr(packed, field))
                x[:, :, unlisted] = fill
                spoilt[field] = mx.array(x)
        changes[name] = poisoned_tokens(packed._replace(**spoilt))
    assert len(unlisted) > 50
    around = poisoned(ids, 7, before=1, after=1)
    assert_close(problem.run(indices=around, **changes), want, KERNEL_TOLERANCE[mx.float32])
    strided = mx.repeat(ids, 2, axis=3)[..., ::2]
    assert_close(problem.run(indices=strided, **changes), want, KERNEL_TOLERANCE[mx.float32])
    turned = mx.contiguous(ids.swapaxes(1, 3)).swapaxes(1, 3)
    assert_close(problem.run(indices=turned), want, KERNEL_TOLERANCE[mx.float32])


@pytest.mark.parametrize("n_rows", [1, 20])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_indices_a_mean_that_is_not_finite_stays_in_its_block(bad, n_rows):
    for dtype in (mx.float32, mx.float16):
        problem = Problem(n_coded=192, n_rows=n_rows, head_dim=64, means=True, n_tail=3, dtype=dtype)
        means = to_numpy(problem.packed_k.means).copy()
        means[:, :, 1] = bad
        spoilt = problem.packed_k._replace(means=mx.array(means))
        outside, inside = (mx.array([[[ids]]]) for ids in ([0, 63, 128, 191], [0, 63, 64, 191]))
        want = to_numpy(problem.run(indices=outside))
        assert np.array_equal(to_numpy(problem.run(packed_k=spoilt, indices=outside)), want)
        assert np.isnan(to_numpy(problem.run(packed_k=spoilt, indices=inside))).all()


@pytest.mark.parametrize("where", ["keys", "values"])
def test_indices_nan_of_a_listed_token_reaches_the_output(where):
    problem = Problem(n_coded=192, head_dim=64, means=True, n_tail=3)
    name, field = ("packed_k", "norms") if where == "keys" else ("packed_v", "params")
    x = np.array(getattr(getattr(problem, name), field))
    x[:, :, 77] = np.nan
    spoilt = {name: getattr(problem, name)._replace(**{field: mx.array(x)})}
    assert np.isnan(to_numpy(problem.run(indices=mx.array([[[[3, 77]]]]), **spoilt))).any()
    assert np.isfinite(to_numpy(problem.run(indices=mx.array([[[[3, 78]]]]), **spoilt))).all()


@pytest.mark.parametrize("shapeless", [False, True])
def test_indices_under_compile(shapeless):
    problem = listed(n_coded=200, n_rows=3, head_dim=64, means=True, n_tail=5)
    call = mx.compile(lambda q, ids: problem.run(q=q, indices=ids), shapeless=shapeless)
    want = to_numpy(problem.run())
    assert np.array_equal(to_numpy(call(problem.q, problem.options["indices"])), want)
    fewer = problem.options["indices"][..., :20]
    assert np.array_equal(to_numpy(call(problem.q, fewer)), to_numpy(problem.run(indices=fewer)))


def test_indices_large_means_cost_no_precision():
    """As without a list: scores are large and their differences must stay right."""
    problem = listed(n_coded=200, head_dim=64, n_tail=3)
    means = mx.array(np.random.default_rng(1).normal(0, 30, (1, 2, 1, 64)).astype(np.float16))
    problem.packed_k = problem.packed_k._replace(means=mx.repeat(means, 4, axis=2))
    keys, values = problem.tail
    problem.tail = keys + means.astype(mx.float32), values
    largest = np.abs(to_numpy(problem.q)).sum(-1).max() * 120 / 8
    assert_close(problem.run(), problem.answer(), max(KERNEL_TOLERANCE[mx.float32], 16 * largest * 2.0**-24))

"""turboquant_attention against float64 attention over the same bytes, feature by feature and mixed."""

import threading

import mlx.core as mx
import numpy as np
import pytest
from tqext.bench.shapes import TODAY

import reference
import tqext
from support import (
    DTYPES,
    KERNEL_TOLERANCE,
    Problem,
    assert_close,
    decoded_keys,
    decoded_values,
    on_cuda,
    poisoned,
    poisoned_tokens,
    to_numpy,
)

pytestmark = pytest.mark.usefixtures("device")

DIMS = [32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 288, 512]
EDGES = [0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257, 1000, 4096]
BITS = [(key, value) for key in (2, 3, 4) for value in (2, 4)]
LLOYD_BITS = [(3, 2), (2, 3), (3, 3), (4, 4)]


# ---- one thing at a time ------------------------------------------------------------------------


def test_turboquant_attention_plain_call(rng):
    """The call as the README writes it, on arrays straight from quantize_keys and quantize_values."""
    k, v, q = (mx.array(rng.normal(size=(1, h, n, 128)).astype(np.float32)) for h, n in ((2, 50), (2, 50), (8, 1)))
    packed_k, packed_v = tqext.quantize_keys(k), tqext.quantize_values(v)
    out = tqext.turboquant_attention(q, packed_k, packed_v)
    want = reference.attention(to_numpy(q), decoded_keys(packed_k), decoded_values(packed_v))
    assert out.shape == q.shape and out.dtype == q.dtype
    assert_close(out, want, KERNEL_TOLERANCE[mx.float32])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", DIMS)
def test_turboquant_attention_every_head_dim(head_dim, dtype):
    Problem(head_dim=head_dim, n_coded=161, dtype=DTYPES[dtype], means=True, balance=True, n_tail=5).check()


@pytest.mark.covering(pairs=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key_bits, value_bits", BITS)
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
def test_turboquant_attention_all_bits(head_dim, key_bits, value_bits, dtype):
    Problem(head_dim=head_dim, key_bits=key_bits, value_bits=value_bits, n_coded=97, dtype=DTYPES[dtype]).check()


@pytest.mark.covering
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key_bits, value_bits", LLOYD_BITS)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512])
def test_turboquant_attention_lloyd_values(head_dim, key_bits, value_bits, dtype):
    for n_coded, n_rows, n_repeats in ((97, 1, 4), (257, 3, 3), (130, 1, 1)):
        Problem(
            head_dim=head_dim, key_bits=key_bits, value_bits=value_bits, value_coding="lloyd", n_coded=n_coded, n_rows=n_rows,
            n_repeats=n_repeats, means=True, balance=True, n_first=2, n_tail=5, dtype=DTYPES[dtype],
        ).check()  # fmt: skip


@pytest.mark.parametrize("coding, value_bits", [("groups", 2), ("lloyd", 3)])
@pytest.mark.parametrize("key_dim, value_dim", [(64, 128), (128, 64), (192, 128), (96, 80), (80, 288), (288, 32)])
def test_turboquant_attention_value_dim_differs(key_dim, value_dim, coding, value_bits):
    Problem(
        head_dim=key_dim, value_dim=value_dim, value_bits=value_bits, value_coding=coding, means=True, balance=True, n_first=4,
        n_tail=33,
    ).check()  # fmt: skip


@pytest.mark.covering
@pytest.mark.parametrize("coding, value_bits", [("groups", 2), ("lloyd", 3)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("n_coded", [*EDGES, 2049, 20000])
def test_turboquant_attention_block_means_at_every_length(n_coded, dtype, coding, value_bits):
    """Each block's own mean, wherever tiles, shares of threads and the last block end."""
    for n_rows in (1, 2, 40) if n_coded < 1000 else (1,):
        Problem(
            n_coded=n_coded, dtype=DTYPES[dtype], n_kv_heads=1, n_rows=n_rows, value_bits=value_bits, value_coding=coding,
            means=True, balance=True, head_dim=64, n_tail=1,
        ).check()  # fmt: skip


@pytest.mark.parametrize("n_rows", [1, 3, 20])
def test_turboquant_attention_large_means_cost_no_precision(n_rows):
    """Means of 300 times a key's size, as a key bias leaves them: scores are large and their differences must stay right."""
    problem = Problem(n_coded=200, n_rows=n_rows, head_dim=64, n_tail=3)
    means = mx.array(np.random.default_rng(1).normal(0, 30, (1, 2, 1, 64)).astype(np.float16))
    problem.packed_k = problem.packed_k._replace(means=mx.repeat(means, 4, axis=2))
    keys, values = problem.tail
    problem.tail = keys + means.astype(mx.float32), values
    # fp32 scores of size s are right to s * 2^-24 * a few: weights to that, times the spread of the values.
    largest = np.abs(to_numpy(problem.q)).sum(-1).max() * 120 / 8
    assert_close(problem.run(), problem.answer(), max(KERNEL_TOLERANCE[mx.float32], 16 * largest * 2.0**-24))


@pytest.mark.parametrize("n_rows", [1, 20])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_turboquant_attention_a_mean_that_is_not_finite_stays_in_its_block(bad, n_rows):
    problem = Problem(n_coded=192, n_rows=n_rows, head_dim=64, means=True, n_tail=3)
    want = problem.run(lengths=mx.array([[0, 128, 3]]))
    means = to_numpy(problem.packed_k.means).copy()
    means[:, :, 2] = bad
    spoilt = problem.packed_k._replace(means=mx.array(means))
    assert np.array_equal(to_numpy(problem.run(packed_k=spoilt, lengths=mx.array([[0, 128, 3]]))), to_numpy(want))
    assert np.isnan(to_numpy(problem.run(packed_k=spoilt))).all()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("n_coded", EDGES)
def test_turboquant_attention_every_length(n_coded, dtype):
    Problem(n_coded=n_coded, dtype=DTYPES[dtype], n_kv_heads=1).check()


@pytest.mark.parametrize("n_tail", [1, 31, 32, 33, 63, 64, 65, 200])
@pytest.mark.parametrize("n_first", [0, 1, 4, 33])
def test_turboquant_attention_first_and_tail_lengths(n_first, n_tail):
    for n_coded in (0, 1, 64):
        Problem(n_first=n_first, n_coded=n_coded, n_tail=n_tail, head_dim=64).check()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n_repeats", range(1, 17))
def test_turboquant_attention_every_group_ratio(n_repeats, dtype):
    for n_rows in (1, 2):
        Problem(n_repeats=n_repeats, n_rows=n_rows, dtype=DTYPES[dtype], n_tail=7, head_dim=64).check()


@pytest.mark.covering
@pytest.mark.parametrize("head_dim, n_repeats, n_kv_heads", TODAY)
@pytest.mark.parametrize("n_rows", range(1, 9))
def test_turboquant_attention_shapes_of_todays_models(head_dim, n_repeats, n_kv_heads, n_rows):
    """A step of decoding, and of checking up to seven drafted tokens, over what a cache holds."""
    lloyd = n_rows in (1, 4, 6, 8)
    Problem(
        head_dim=head_dim,
        n_repeats=n_repeats,
        n_kv_heads=min(n_kv_heads, 2),  # all heads do the same
        n_rows=n_rows,
        n_coded=129,
        n_first=4,
        n_tail=40,
        means=True,
        balance=lloyd,
        value_coding="lloyd" if lloyd else "groups",
        value_bits=3 if lloyd else 2,
        dtype=mx.float16,
        options={"mask": "causal"},
    ).check()


@pytest.mark.parametrize("mask", [None, "causal"])
@pytest.mark.parametrize("n_rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 33, 100])
def test_turboquant_attention_every_number_of_rows(n_rows, mask):
    for head_dim, n_tail in ((64, 40), (128, 0)):
        Problem(n_rows=n_rows, n_coded=129, n_tail=n_tail, head_dim=head_dim, n_repeats=3, options={"mask": mask}).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_rows", [1, 4, 40])
def test_turboquant_attention_residual_signs(n_rows, dtype):
    for key_bits in (2, 3):
        Problem(
            qjl=True, key_bits=key_bits, n_rows=n_rows, dtype=DTYPES[dtype], means=True, balance=True, n_first=2, n_tail=3
        ).check()


@pytest.mark.parametrize("head_dim", [32, 80, 96, 224, 256, 512])
def test_turboquant_attention_residual_signs_every_head_dim(head_dim):
    problem = Problem(qjl=True, head_dim=head_dim)
    if head_dim > 256 and on_cuda():
        with pytest.raises(
            ValueError, match=r"^\[turboquant_attention\] packed_k.signs: expected none where the GPU has no kernel"
        ):
            problem.run()
    else:
        problem.check()


@pytest.mark.parametrize("rotation", ["orthogonal", "none"])
@pytest.mark.parametrize("head_dim, value_dim", [(64, 64), (80, 112), (288, 96), (128, 480)])
def test_turboquant_attention_other_rotations(head_dim, value_dim, rotation):
    Problem(
        head_dim=head_dim, value_dim=value_dim, rotation=rotation, means=True, balance=True, n_first=3, n_tail=9, n_rows=2,
        options={"mask": "causal"},
    ).check()  # fmt: skip


def test_turboquant_attention_scale():
    for scale in (0.0, 0.05, 1.0, -0.3):
        Problem(scale=scale, means=True, balance=True, n_tail=3).check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_turboquant_attention_many_sequences_and_heads(dtype):
    Problem(
        batch=3, n_kv_heads=5, n_repeats=2, n_rows=2, means=True, balance=True, n_first=4, n_tail=33, dtype=DTYPES[dtype]
    ).check()


@pytest.mark.parametrize("qjl", [False, True])
def test_turboquant_attention_more_sequences_than_a_grid_has_rows(qjl):
    """CUDA launches at most 65535 heads at once; with residual signs, which no other path knows, it says so."""
    one = Problem(head_dim=32, n_coded=3, n_kv_heads=1, n_repeats=1, n_tail=2, qjl=qjl)
    want, n = one.answer(), 65537

    def many(x):
        return mx.broadcast_to(x, (n, *x.shape[1:]))

    packed = [p._replace(**{name: many(x) for name, x in p._asdict().items() if isinstance(x, mx.array)})
              for p in (one.packed_k, one.packed_v)]  # fmt: skip
    out = one.run(many(one.q), *packed, tail=tuple(map(many, one.tail)))
    if on_cuda() and qjl:
        with pytest.raises(ValueError, match=r"^\[turboquant_attention\] q: expected at most 65535 KV heads"):
            mx.eval(out)
        return
    assert_close(out[0:1], want, KERNEL_TOLERANCE[mx.float32])
    assert mx.array_equal(out, many(out[:1]))


def test_turboquant_attention_long_context_is_split():
    """Long enough that every thread and every split gets a share of one head."""
    for n_rows in (1, 8):
        Problem(n_kv_heads=1, n_repeats=1, n_coded=20011, n_rows=n_rows, head_dim=64, n_tail=33).check()


def test_turboquant_attention_mean_of_batch_one_serves_every_sequence():
    problem = Problem(batch=3, means=True, balance=True)
    shared = problem.packed_k.means[:1]
    assert_close(
        problem.run(packed_k=problem.packed_k._replace(means=shared)),
        to_numpy(problem.run(packed_k=problem.packed_k._replace(means=mx.repeat(shared, 3, axis=0)))),
        1e-6,
    )


def test_turboquant_attention_tail_of_another_dtype_is_cast():
    problem = Problem(dtype=mx.float16, n_first=2, n_tail=9)
    want = to_numpy(problem.run())
    wide = {name: tuple(x.astype(mx.float32) for x in getattr(problem, name)) for name in ("first", "tail")}
    assert np.array_equal(to_numpy(problem.run(**wide)), want)


# ---- sinks and masks ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_rows", [1, 3, 33])
def test_turboquant_attention_sinks(n_rows, dtype):
    Problem(
        sinks=True, n_rows=n_rows, n_tail=33, means=True, balance=True, dtype=DTYPES[dtype], options={"mask": "causal"}
    ).check()


@pytest.mark.parametrize("logit", [-1e4, 1e4, -np.inf])
def test_turboquant_attention_extreme_sinks(logit):
    problem = Problem(sinks=True)
    problem.sink_logits = mx.full((8,), logit)
    problem.check()


def random_mask(rng, shape, kind):
    allowed = rng.random(shape) < 0.6
    if kind == "bool":
        return mx.array(allowed)
    values = np.where(allowed, rng.normal(size=shape), -np.inf)
    return mx.array(values.astype(np.float32)).astype(DTYPES[kind])


@pytest.mark.parametrize("kind", ["bool", *DTYPES])
@pytest.mark.parametrize("n_rows", [1, 4, 9])
@pytest.mark.parametrize("axes", ["full", "shared heads", "shared rows", "two axes", "one axis", "one column"])
def test_turboquant_attention_array_mask(kind, n_rows, axes, rng):
    problem = Problem(batch=2, n_rows=n_rows, n_first=4, n_coded=70, n_tail=33, head_dim=64, means=True, balance=True)
    shape = {
        "full": (2, 8, n_rows, 107),
        "shared heads": (2, 1, n_rows, 107),
        "shared rows": (1, 8, 1, 107),
        "two axes": (n_rows, 107),
        "one axis": (107,),
        "one column": (2, 1, n_rows, 1),
    }[axes]
    problem.options["mask"] = random_mask(rng, shape, kind)
    problem.check()


@pytest.mark.parametrize("kind", ["bool", "float32"])
def test_turboquant_attention_long_array_mask(kind, rng):
    """A mask over more tokens than one block or split holds, most of a block masked."""
    problem = Problem(n_coded=3000, n_tail=33, n_rows=2, head_dim=64)
    allowed = rng.random((1, 1, 2, 3033)) < 0.01
    allowed[..., 512:1536] = False
    mask = allowed if kind == "bool" else np.where(allowed, 0.5, -np.inf).astype(np.float32)
    problem.options["mask"] = mx.array(mask)
    problem.check()


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float32"])
def test_turboquant_attention_row_that_attends_to_nothing_is_zero(kind, sinks):
    problem = Problem(n_rows=3, n_first=2, n_tail=4, sinks=sinks)
    allowed = np.ones((1, 1, 3, problem.n_keys), bool)
    allowed[:, :, 1] = False
    mask = allowed if kind == "bool" else np.where(allowed, 0, -np.inf).astype(np.float32)
    problem.options["mask"] = mx.array(mask)
    got = to_numpy(problem.run())
    assert not got[:, :, 1].any() and got[:, :, [0, 2]].all()
    problem.check()


def test_turboquant_attention_over_no_tokens_is_zero():
    for n_rows in (1, 9):
        for sinks in (False, True):
            got = to_numpy(Problem(n_coded=0, n_rows=n_rows, sinks=sinks).run())
            assert got.shape == (1, 8, n_rows, 128) and not got.any()


def test_turboquant_attention_more_causal_rows_than_keys():
    """Bottom-right alignment: the first rows see nothing."""
    problem = Problem(n_coded=3, n_rows=5, options={"mask": "causal"})
    got = to_numpy(problem.run())
    assert not got[:, :, :2].any()
    problem.check()


def test_turboquant_attention_additive_mask_of_large_negatives():
    """What mlx-lm writes for "not attended" in fp16: finite, and still nothing."""
    problem = Problem(n_coded=64, n_rows=2, dtype=mx.float16)
    mask = np.zeros((1, 1, 2, 64), np.float16)
    mask[..., 10:] = np.finfo(np.float16).min
    problem.options["mask"] = mx.array(mask)
    problem.check()


# ---- ragged batches -----------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, "causal"])
@pytest.mark.parametrize("n_rows", [1, 4, 12])
def test_turboquant_attention_left_padding(n_rows, mask):
    # Padding inside the first tokens, across them into the coded ones, into the tail, none at all.
    for padding in ([0, 2, 3, 50], [4, 68, 70, 101]):
        Problem(
            batch=4, n_rows=n_rows, n_first=4, n_coded=64, n_tail=36, head_dim=64, means=True, balance=True,
            options={"mask": mask, "left_padding": mx.array(padding)},
        ).check()  # fmt: skip


@pytest.mark.parametrize("n_rows", [1, 3])
def test_turboquant_attention_all_padding_is_zero(n_rows):
    problem = Problem(batch=2, n_rows=n_rows, n_coded=64, options={"left_padding": mx.array([64, 0])})
    assert not to_numpy(problem.run())[0].any()
    problem.check()


@pytest.mark.parametrize("n_rows", [1, 5, 20])
def test_turboquant_attention_lengths(n_rows):
    lengths = mx.array([[4, 64, 40], [0, 0, 0], [2, 33, 0], [0, 1, 7], [4, 0, 1], [1, 63, 39]])
    problem = Problem(
        batch=6, n_rows=n_rows, n_first=4, n_coded=64, n_tail=40, head_dim=64, means=True, balance=True,
        options={"lengths": lengths},
    )  # fmt: skip
    assert not to_numpy(problem.run())[1].any()
    problem.check()


@pytest.mark.parametrize("n_rows", [1, 5, 20])
def test_turboquant_attention_lengths_with_causal_rows(n_rows):
    """The last tail columns are the rows' own tokens: always there; lengths count the tail before them."""
    own = n_rows
    lengths = mx.array([[4, 64, 30], [0, 0, 0], [2, 33, 0], [0, 1, 7]])
    Problem(
        batch=4, n_rows=n_rows, n_first=4, n_coded=64, n_tail=30 + own, head_dim=64, means=True, balance=True, sinks=True,
        options={"lengths": lengths, "mask": "causal"},
    ).check()  # fmt: skip


def test_turboquant_attention_ragged_batch_equals_each_sequence_alone():
    """A sequence must not see what it is batched with; its sums may be taken in other parts."""
    lengths = [[4, 300, 9], [1, 70, 0], [4, 0, 33]]
    batch = Problem(batch=3, n_first=4, n_coded=320, n_tail=34, n_rows=1, dtype=mx.float16, means=True, balance=True)
    together = to_numpy(batch.run(lengths=mx.array(lengths), mask="causal"))
    for b, (n_first, n_coded, n_tail) in enumerate(lengths):

        def cut(x, n, b=b):
            return None if x is None else x[b : b + 1, :, :n]

        k, v = batch.packed_k, batch.packed_v
        n_blocks = tqext.format.n_blocks(n_coded)
        tail = tuple(mx.concatenate([x[b : b + 1, :, :n_tail], x[b : b + 1, :, -1:]], 2) for x in batch.tail)
        alone = tqext.turboquant_attention(
            batch.q[b : b + 1],
            k._replace(codes=cut(k.codes, n_coded), norms=cut(k.norms, n_coded), means=k.means[b : b + 1, :, :n_blocks]),
            v._replace(codes=cut(v.codes, n_coded), params=cut(v.params, n_coded)),
            first=tuple(cut(x, n_first) for x in batch.first),
            tail=tail,
            mask="causal",
        )
        assert_close(alone, together[b : b + 1].astype(np.float64), KERNEL_TOLERANCE[mx.float16] / 2)


def test_turboquant_attention_tokens_beyond_the_lengths_may_hold_anything():
    problem = Problem(batch=2, n_first=4, n_coded=96, n_tail=40, n_rows=2, head_dim=64)
    lengths = [[2, 40, 10], [4, 96, 40]]
    problem.options["lengths"] = mx.array(lengths)
    want = problem.answer()
    problem.packed_k.norms[0, :, 40:] = float("nan")
    problem.packed_k.codes[0, :, 40:] = 0xFFFFFFFF
    problem.packed_v.params[0, :, 40:] = float("nan")
    for part, length in ((problem.first, 2), (problem.tail, 10)):
        for x in part:
            x[0, :, length:] = float("nan")
    assert_close(problem.run(), want, KERNEL_TOLERANCE[mx.float32])


def test_turboquant_attention_left_padding_may_hold_anything():
    problem = Problem(batch=2, n_coded=96, n_tail=5, head_dim=64, options={"left_padding": mx.array([37, 0])})
    want = problem.answer()
    problem.packed_k.norms[0, :, :37] = float("nan")
    problem.packed_v.params[0, :, :37] = float("nan")
    assert_close(problem.run(), want, KERNEL_TOLERANCE[mx.float32])


# ---- everything at once -------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(120))
def test_turboquant_attention_random_mixtures(case):
    rng = np.random.default_rng(case)

    def pick(*choices):
        return choices[rng.integers(len(choices))]

    n_rows = pick(1, 1, 1, 2, 3, 5, 8, 9, 17)
    batch = pick(1, 1, 2, 3)
    n_first, n_coded = pick(0, 1, 4), pick(0, 1, 31, 64, 100, 257)
    n_tail = n_rows + pick(0, 1, 31, 40)
    n_keys = n_first + n_coded + n_tail
    mask = pick(None, "causal", "causal", "bool", "float32", "float16")
    options = {"mask": mask}
    if mask not in (None, "causal"):
        shape = (pick(1, batch), 1, n_rows, n_keys)
        options["mask"] = random_mask(rng, shape, mask)
    ragged = pick(None, "left_padding", "lengths")
    if ragged == "left_padding":
        options["left_padding"] = mx.array(rng.integers(0, n_keys + 1, batch).astype(np.int32))
    elif ragged == "lengths" and mask in (None, "causal"):
        ends = [n_first, n_coded, n_tail - n_rows]
        options["lengths"] = mx.array(np.stack([rng.integers(0, n + 1, batch) for n in ends], 1).astype(np.int32))
    head_dim = pick(32, 64, 64, 80, 96, 128, 128, 192, 256, 288)
    Problem(
        batch=batch,
        n_kv_heads=pick(1, 2, 3),
        n_repeats=pick(1, 2, 3, 4, 7, 8),
        n_rows=n_rows,
        n_first=n_first,
        n_coded=n_coded,
        n_tail=n_tail,
        head_dim=head_dim,
        value_dim=pick(head_dim, head_dim, 64),
        key_bits=pick(2, 3, 3, 4),
        value_coding=(coding := pick("groups", "lloyd")),
        value_bits=pick(2, 3, 4) if coding == "lloyd" else pick(2, 2, 4),
        dtype=pick(mx.float32, mx.float16, mx.bfloat16),
        means=pick(False, True),
        balance=pick(False, True),
        qjl=head_dim != 288 and pick(False, False, True),
        sinks=pick(False, False, True),
        scale=pick(None, 0.1),
        seed=case,
        options=options,
    ).check()


# ---- memory layout ------------------------------------------------------------------------------


@pytest.mark.covering
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("n_coded", [1, 33, 64, 257])
def test_turboquant_attention_reads_nothing_around_its_views(n_coded, head_dim):
    for dtype in (mx.float32, mx.float16):
        for key_bits, value_bits in BITS:
            problem = Problem(
                batch=2, n_coded=n_coded, n_first=3, n_tail=5, key_bits=key_bits, value_bits=value_bits,
                head_dim=head_dim, qjl=key_bits == 2, means=True, balance=True, dtype=dtype, n_repeats=2, n_rows=2,
            )  # fmt: skip
            want = to_numpy(problem.run())
            exact = {name: tuple(poisoned(x, np.nan) for x in getattr(problem, name)) for name in ("first", "tail")}
            got = problem.run(
                q=poisoned(problem.q, np.nan),
                packed_k=poisoned_tokens(problem.packed_k),
                packed_v=poisoned_tokens(problem.packed_v),
                **exact,
            )
            assert np.array_equal(to_numpy(got), want)


def test_turboquant_attention_reads_transposed_inputs():
    """Queries and exact tokens as models make them: [B, L, H, D] with two axes swapped."""
    problem = Problem(batch=2, n_rows=3, n_first=4, n_tail=9, means=True, balance=True)
    want = to_numpy(problem.run())

    def swapped(x):
        y = mx.contiguous(mx.swapaxes(x, 1, 2))
        mx.eval(y)
        return mx.swapaxes(y, 1, 2)

    exact = {name: tuple(swapped(x) for x in getattr(problem, name)) for name in ("first", "tail")}
    k, v = problem.packed_k, problem.packed_v
    got = problem.run(
        q=swapped(problem.q),
        packed_k=k._replace(codes=swapped(k.codes), norms=swapped(k.norms), means=swapped(k.means)),
        packed_v=v._replace(codes=swapped(v.codes), params=swapped(v.params)),
        **exact,
    )
    assert np.array_equal(to_numpy(got), want)


def test_turboquant_attention_reads_arrays_whose_last_axis_is_strided():
    def spread(x):
        y = mx.repeat(x, 2, axis=-1)
        mx.eval(y)
        return y[..., ::2]

    for coding, value_bits in (("groups", 2), ("lloyd", 3)):
        problem = Problem(
            batch=2, n_first=4, n_tail=9, value_coding=coding, value_bits=value_bits, means=True, balance=True, n_coded=150
        )
        want = to_numpy(problem.run())
        k, v = problem.packed_k, problem.packed_v
        got = problem.run(
            q=spread(problem.q),
            packed_k=k._replace(codes=spread(k.codes), norms=spread(k.norms), means=spread(k.means), balance=spread(k.balance)),
            packed_v=v._replace(codes=spread(v.codes), params=spread(v.params)),
            **{name: tuple(map(spread, getattr(problem, name))) for name in ("first", "tail")},
        )
        # Other loads, another order of sums.
        assert_close(got, want.astype(np.float64), KERNEL_TOLERANCE[mx.float32])


@pytest.mark.parametrize("coding, value_bits", [("groups", 2), ("lloyd", 2), ("lloyd", 3), ("lloyd", 4)])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_turboquant_attention_reads_arrays_that_begin_anywhere(head_dim, coding, value_bits):
    """Arrays that follow something else in one buffer, as parts of a loaded file do: no alignment beyond an element's."""
    problem = Problem(
        batch=2, head_dim=head_dim, value_bits=value_bits, value_coding=coding, key_bits=value_bits, n_first=4, n_tail=9,
        means=True, balance=True, dtype=mx.float16,
    )  # fmt: skip
    want = to_numpy(problem.run())

    def shifted(x):
        buffer = mx.concatenate([mx.zeros((1,), x.dtype), x.reshape(-1)])
        mx.eval(buffer)
        y = buffer[1:].reshape(x.shape)
        mx.eval(y)
        return y

    def shift(packed, *names):
        return packed._replace(**{name: shifted(getattr(packed, name)) for name in names})

    got = problem.run(
        q=shifted(problem.q),
        packed_k=shift(problem.packed_k, "codes", "norms", "means", "balance"),
        packed_v=shift(problem.packed_v, "codes", "params"),
        **{name: tuple(map(shifted, getattr(problem, name))) for name in ("first", "tail")},
    )
    assert_close(got, want.astype(np.float64), KERNEL_TOLERANCE[mx.float16])
    # One array alone: what the others are may decide how it is read.
    for name in ("codes", "norms", "means"):
        got = problem.run(packed_k=shift(problem.packed_k, name))
        assert_close(got, want.astype(np.float64), KERNEL_TOLERANCE[mx.float16])
    for name in ("codes", "params"):
        got = problem.run(packed_v=shift(problem.packed_v, name))
        assert_close(got, want.astype(np.float64), KERNEL_TOLERANCE[mx.float16])


@pytest.mark.parametrize("n_rows", [1, 40])
def test_turboquant_attention_takes_empty_arrays_without_memory(n_rows):
    """MLX gives the result of an update of nothing no memory at all on CUDA."""
    problem = Problem(n_coded=0, n_rows=n_rows, n_first=4, n_tail=9, means=True, balance=True, dtype=mx.float16)

    def updated(x):
        y = mx.zeros(x.shape, x.dtype)
        y[:, :, 0:0] = x
        mx.eval(y)
        return y

    k, v = problem.packed_k, problem.packed_v
    k = k._replace(codes=updated(k.codes), norms=updated(k.norms), means=updated(k.means))
    v = v._replace(codes=updated(v.codes), params=updated(v.params))
    assert np.array_equal(to_numpy(problem.run(packed_k=k, packed_v=v)), to_numpy(problem.run()))
    empty = mx.zeros((1, 2, 0, 128), mx.float16)
    none = tuple(updated(empty) for _ in range(2))
    other = Problem(n_coded=70, n_rows=n_rows, dtype=mx.float16)
    assert np.array_equal(to_numpy(other.run(first=none, tail=none)), to_numpy(other.run()))


def test_turboquant_attention_reads_broadcast_tokens():
    """One sequence's tokens serving a batch by a stride of zero."""
    problem = Problem(batch=1)
    k, v = problem.packed_k, problem.packed_v

    def spread(x):
        return mx.broadcast_to(x, (3, *x.shape[1:]))

    q = mx.repeat(problem.q, 3, axis=0)
    got = problem.run(
        q=q,
        packed_k=k._replace(codes=spread(k.codes), norms=spread(k.norms)),
        packed_v=v._replace(codes=spread(v.codes), params=spread(v.params)),
    )
    assert np.array_equal(to_numpy(got), np.repeat(to_numpy(problem.run()), 3, 0))


def test_turboquant_attention_does_not_change_its_inputs():
    problem = Problem(n_first=4, n_tail=9, means=True, balance=True, qjl=True, n_rows=2, sinks=True)
    inputs = [problem.q, *problem.packed_k[:6], *problem.packed_v[:2], *problem.first, *problem.tail, problem.sink_logits]
    before = [to_numpy(x).copy() for x in inputs]
    mx.eval(problem.run())
    for x, y in zip(inputs, before, strict=True):
        assert np.array_equal(to_numpy(x), y)


# ---- numbers at the limits ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", [1e-3, 0.03, 30.0, 1000.0])
def test_turboquant_attention_any_magnitude(magnitude, dtype):
    """Large keys make one token take all the weight, small ones give the average."""
    problem = Problem(magnitude=magnitude, dtype=DTYPES[dtype], n_coded=257)
    # Scores of thousands lose bits behind the point, of fp32 or of the query's 16, whatever the type of queries and output. On
    # CUDA as well: what is coarser there is the weights.
    of_scores = magnitude / 3 * dict.__getitem__(KERNEL_TOLERANCE, mx.float32) if magnitude > 1 else 0
    assert_close(problem.run(), problem.answer(), KERNEL_TOLERANCE[DTYPES[dtype]] + of_scores)


def test_turboquant_attention_equal_scores_give_the_average():
    problem = Problem(n_coded=1000)
    q = mx.zeros_like(problem.q)
    want = np.repeat(decoded_values(problem.packed_v).mean(2, keepdims=True), 4, 1)
    assert_close(problem.run(q=q), want, 1e-5)


@pytest.mark.parametrize("n_rows", [1, 20])
@pytest.mark.parametrize("coding, bits", [("groups", 2), ("lloyd", 3)])
def test_turboquant_attention_many_like_tokens(coding, bits, n_rows, rng):
    """One token 300000 times: a sum in fp32 that rounds every term the same way drifts off."""
    k, v = (mx.array(rng.normal(size=(1, 1, 1, 64)).astype(np.float32)) for _ in range(2))
    packed_v = tqext.quantize_values(v, bits=bits, coding=coding)
    many_k, many_v = (
        packed._replace(**{
            name: mx.repeat(x, 300000, axis=2) for name, x in packed._asdict().items() if isinstance(x, mx.array)
        })
        for packed in (tqext.quantize_keys(k), packed_v)
    )  # fmt: skip
    q = mx.array(rng.normal(size=(1, 1, n_rows, 64)).astype(np.float32))
    want = np.broadcast_to(decoded_values(packed_v), q.shape)
    assert_close(tqext.turboquant_attention(q, many_k, many_v), want, KERNEL_TOLERANCE[mx.float32])


def test_turboquant_attention_rising_and_falling_scores():
    """The running maximum moves at every token, up or down."""
    problem = Problem(n_coded=600, n_kv_heads=1, n_repeats=1)
    direction = to_numpy(problem.q)[0, 0, 0]
    for order in (1, -1):
        k = direction * np.linspace(-2, 2, 600)[::order, None]
        problem.packed_k = tqext.quantize_keys(mx.array(k[None, None].astype(np.float32)))
        problem.check()


@pytest.mark.parametrize("where", ["q", "coded keys", "coded values", "tail keys", "tail values"])
def test_turboquant_attention_nan_reaches_the_output(where):
    for dtype in (mx.float32, mx.float16):
        problem = Problem(n_tail=5, n_rows=2, n_first=1, dtype=dtype)
        array, index = {
            "q": (problem.q, (0, 1, 0, 3)),
            "coded keys": (problem.packed_k.norms, (0, 0, 17, 0)),
            "coded values": (problem.packed_v.params, (0, 0, 17, 1)),
            "tail keys": (problem.tail[0], (0, 0, 2, 3)),
            "tail values": (problem.tail[1], (0, 0, 2, 3)),
        }[where]
        array[index] = float("nan")
        got = to_numpy(problem.run())
        touched = got[0, 1, 0] if where == "q" else got[0, 0]
        if where == "tail values":
            assert np.isnan(touched[:, 3]).all()
        else:
            assert np.isnan(touched).all()
        # Another KV head's queries are not touched.
        assert np.isfinite(got[0, 4:]).all()


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("n_rows", [1, 3, 40])
def test_turboquant_attention_masked_keys_may_hold_anything(n_rows, kind):
    for dtype in (mx.float32, mx.float16):
        problem = Problem(n_coded=150, n_tail=5, n_rows=n_rows, n_first=3, dtype=dtype, means=True)
        mask = np.ones((n_rows, 158), bool)
        mask[:, [1, 3 + 17, 153 + 2]] = False
        problem.options["mask"] = mx.array(mask if kind == "bool" else np.where(mask, 0.0, -np.inf).astype(np.float32)).astype(
            mx.bool_ if kind == "bool" else dtype
        )
        want = problem.answer()
        problem.packed_k.norms[0, :, 17] = float("nan")
        problem.first[0][0, :, 1] = float("nan")
        problem.tail[0][0, :, 2] = float("nan")
        assert_close(problem.run(), want, KERNEL_TOLERANCE[dtype])


# ---- compile, streams, threads ------------------------------------------------------------------


@pytest.mark.parametrize("shapeless", [False, True])
def test_turboquant_attention_under_compile(shapeless):
    def call(q, packed_k, packed_v, tail, sinks):
        return tqext.turboquant_attention(q * 2, packed_k, packed_v, tail=tail, sinks=sinks, mask="causal") + 1

    compiled = mx.compile(call, shapeless=shapeless)
    for n_coded in (33, 64, 65):
        problem = Problem(n_coded=n_coded, n_tail=3, n_rows=2, means=True, balance=True, sinks=True)
        inputs = problem.q, problem.packed_k, problem.packed_v, problem.tail, problem.sink_logits
        assert_close(compiled(*inputs), to_numpy(call(*inputs)), 1e-6)


@pytest.mark.parametrize("shapeless", [False, True])
def test_turboquant_attention_of_fresh_codes_under_compile(shapeless):
    """Quantise and attend in one compiled function, with every optional argument."""

    def call(q, k, v, means, balance, tail, mask, lengths):
        packed_k = tqext.quantize_keys(k, means=means, balance=balance, qjl=True)
        packed_v = tqext.quantize_values(v, bits=3, coding="lloyd")
        return tqext.turboquant_attention(q, packed_k, packed_v, tail=tail, first=tail, mask=mask, lengths=lengths)

    compiled = mx.compile(call, shapeless=shapeless)
    for n in (20, 50, 130) if not shapeless else (20, 50):
        p = Problem(n_coded=n, n_tail=3, n_rows=2, means=True, balance=True, head_dim=64)
        k, v = (tqext.dequantize(x) for x in (p.packed_k, p.packed_v))
        mask = mx.array(np.random.default_rng(n).random((1, 1, 2, n + 6)) < 0.7)
        inputs = p.q, k, v, p.packed_k.means, p.packed_k.balance, p.tail, mask, mx.array([[3, n - 3, 2]])
        assert_close(compiled(*inputs), to_numpy(call(*inputs)), 1e-6)


def test_turboquant_attention_on_another_stream(device):
    problem = Problem(n_tail=3)
    want = to_numpy(problem.run())
    stream = mx.new_stream(mx.default_device())
    assert np.array_equal(to_numpy(problem.run(stream=stream)), want)
    assert np.array_equal(to_numpy(problem.run(stream=mx.default_device())), want)
    with mx.stream(stream):
        assert np.array_equal(to_numpy(problem.run()), want)


def test_turboquant_attention_from_many_threads():
    """Each thread evaluates on its own stream while the others do; all share one pool."""
    problems = [Problem(n_coded=500 + 100 * i, n_tail=3, n_rows=1 + i % 3, seed=i, head_dim=64) for i in range(4)]
    for problem in problems:
        mx.eval(problem.q, *problem.packed_k[:2], *problem.packed_v[:2], *problem.tail)
    want = [to_numpy(problem.run()) for problem in problems]
    failures = []
    start = threading.Barrier(4)
    device = mx.default_device()

    def work(i):
        try:
            stream = mx.new_stream(device)
            start.wait(timeout=30)
            for _ in range(25):
                out = problems[i].run(stream=stream)
                mx.eval(out)
                if not np.array_equal(to_numpy(out), want[i]):
                    failures.append(f"thread {i}: another result")
        except Exception as error:
            failures.append(f"thread {i}: {error!r}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert not failures


def test_turboquant_attention_repeated_runs_are_identical():
    problem = Problem(n_coded=5000, n_tail=33, n_repeats=8)
    first = to_numpy(problem.run())
    for _ in range(5):
        assert np.array_equal(to_numpy(problem.run()), first)


@pytest.mark.parametrize("device", [pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("n_rows", [1, 2, 6, 40])
def test_turboquant_attention_of_many_blocks_is_the_same_every_time(device, n_rows):
    """A stage of shared memory makes way for the next one: a warp that still reads the old one gets some of both."""
    problem = Problem(batch=2, n_kv_heads=8, n_coded=8192, n_first=4, n_tail=40, n_rows=n_rows, means=True, dtype=mx.float16)
    first = problem.run()
    for _ in range(20):
        again = [problem.run() for _ in range(5)]
        assert all(mx.all(out == first).item() for out in again)


# ---- transforms -----------------------------------------------------------------------------------


def test_turboquant_attention_has_no_gradient():
    problem = Problem(n_coded=33)
    with pytest.raises(ValueError, match=r"(?i)vjp|gradient"):
        mx.eval(mx.grad(lambda q: problem.run(q=q).sum())(problem.q))
    with pytest.raises(ValueError, match=r"(?i)jvp|gradient"):
        mx.eval(mx.jvp(lambda q: problem.run(q=q), [problem.q], [problem.q]))


def test_turboquant_attention_has_no_vmap():
    problem = Problem(n_coded=33)
    with pytest.raises(ValueError, match=r"(?i)vmap"):
        mx.eval(mx.vmap(lambda q: problem.run(q=q))(problem.q[None]))

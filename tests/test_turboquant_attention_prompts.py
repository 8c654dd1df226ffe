"""turboquant_attention of many query rows: on NVIDIA GPUs a kernel of its own, by tiles of rows and of 64 tokens."""

import mlx.core as mx
import numpy as np
import pytest

import tqext
from support import DTYPES, KERNEL_TOLERANCE, Problem, assert_close, poisoned, poisoned_tokens, to_numpy

pytestmark = pytest.mark.usefixtures("device")

CODINGS = [("groups", 2), ("groups", 4), ("lloyd", 2), ("lloyd", 3), ("lloyd", 4)]


@pytest.mark.covering
@pytest.mark.parametrize("mask", [None, "causal"])
@pytest.mark.parametrize("n_rows", [9, 16, 17, 33, 64, 65, 100, 257, 2048])
def test_prompt_attention_every_number_of_rows(n_rows, mask):
    for dtype, n_repeats, n_kv_heads in ((mx.float16, 4, 2), (mx.float32, 1, 1), (mx.bfloat16, 3, 1)):
        Problem(
            n_rows=n_rows, n_coded=200, n_first=4, n_tail=n_rows + 21, head_dim=64, n_repeats=n_repeats,
            n_kv_heads=n_kv_heads, dtype=dtype, means=True, balance=True, value_bits=3, value_coding="lloyd",
            options={"mask": mask},
        ).check()  # fmt: skip


@pytest.mark.parametrize("n_repeats", range(1, 17))
def test_prompt_attention_every_group_ratio(n_repeats):
    Problem(
        n_rows=40, n_repeats=n_repeats, n_coded=130, n_tail=45, dtype=mx.float16, means=True, options={"mask": "causal"}
    ).check()


@pytest.mark.covering
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("coding, value_bits", CODINGS)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 112, 128, 160, 192, 224, 256])
def test_prompt_attention_every_head_dim_and_coding(head_dim, coding, value_bits, dtype):
    Problem(
        head_dim=head_dim, key_bits=max(2, value_bits), value_bits=value_bits, value_coding=coding, n_rows=35, n_repeats=2,
        n_kv_heads=1, n_coded=97, n_first=2, n_tail=40, dtype=DTYPES[dtype], means=True, balance=True,
        options={"mask": "causal"},
    ).check()  # fmt: skip


@pytest.mark.parametrize("coding, value_bits", [("groups", 2), ("lloyd", 3)])
@pytest.mark.parametrize("key_dim, value_dim", [(64, 128), (128, 64), (192, 128), (96, 80), (32, 256), (256, 32)])
def test_prompt_attention_value_dim_differs(key_dim, value_dim, coding, value_bits):
    Problem(
        head_dim=key_dim, value_dim=value_dim, value_bits=value_bits, value_coding=coding, n_rows=40, n_coded=140,
        n_kv_heads=1, means=True, balance=True, n_first=4, n_tail=33,
    ).check()  # fmt: skip


@pytest.mark.covering
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("n_coded", [0, 1, 63, 64, 65, 127, 128, 129, 511, 512, 513, 1000, 4096, 20011])
def test_prompt_attention_every_length(n_coded, dtype):
    """Tiles, runs of eight means, shares of blocks that split a context: wherever they end."""
    for n_tail in (0, 37, 64):
        Problem(
            n_coded=n_coded, dtype=DTYPES[dtype], n_kv_heads=1, n_rows=37, n_repeats=1, head_dim=64, means=True, balance=True,
            n_tail=n_tail, sinks=True, options={"mask": "causal"},
        ).check()  # fmt: skip


@pytest.mark.parametrize("mask", [None, "causal"])
@pytest.mark.parametrize("n_rows", [40, 150])
def test_prompt_attention_left_padding(n_rows, mask):
    for padding in ([0, 2, 3, 150], [4, 68, 70, 190]):
        Problem(
            batch=4, n_rows=n_rows, n_first=4, n_coded=150, n_tail=36, head_dim=64, means=True, balance=True,
            options={"mask": mask, "left_padding": mx.array(padding)},
        ).check()  # fmt: skip


def test_prompt_attention_rows_of_padding_read_nothing_behind_the_tokens():
    """Causal rows that all lie in the padding, of every row tile, over tokens that end within a tile."""
    for padding in ([1, 150], [186, 190], [150, 149], [133, 190]):
        problem = Problem(
            batch=2, n_rows=150, n_first=4, n_coded=150, n_tail=36, head_dim=64, means=True, balance=True,
            options={"mask": "causal", "left_padding": mx.array(padding)},
        )  # fmt: skip
        got = problem.run(packed_k=poisoned_tokens(problem.packed_k), packed_v=poisoned_tokens(problem.packed_v))
        assert_close(got, problem.answer(), KERNEL_TOLERANCE[problem.dtype])


@pytest.mark.parametrize("n_rows", [40, 150])
@pytest.mark.parametrize("causal", [False, True])
def test_prompt_attention_lengths(n_rows, causal):
    lengths = [[4, 150, 30], [0, 0, 0], [2, 33, 0], [0, 1, 7], [4, 128, 1], [1, 63, 29]]
    own = n_rows if causal else 0
    Problem(
        batch=6, n_rows=n_rows, n_first=4, n_coded=150, n_tail=30 + own, head_dim=64, means=True, balance=True, sinks=causal,
        options={"lengths": mx.array(lengths), "mask": "causal" if causal else None},
    ).check()  # fmt: skip


@pytest.mark.parametrize("kind", ["bool", *DTYPES])
@pytest.mark.parametrize("shape", [(2, 8, 40, 207), (2, 1, 40, 207), (1, 8, 1, 207), (207,), (2, 1, 40, 1)])
def test_prompt_attention_array_mask(kind, shape, rng):
    problem = Problem(batch=2, n_rows=40, n_first=4, n_coded=170, n_tail=33, head_dim=64, means=True, balance=True)
    allowed = rng.random(shape) < 0.6
    if kind == "bool":
        problem.options["mask"] = mx.array(allowed)
    else:
        values = np.where(allowed, rng.normal(size=shape), -np.inf).astype(np.float32)
        problem.options["mask"] = mx.array(values).astype(DTYPES[kind])
    problem.check()


def test_prompt_attention_rows_that_attend_to_nothing_are_zero():
    problem = Problem(n_rows=60, n_coded=20, options={"mask": "causal"})
    got = to_numpy(problem.run())
    assert not got[:, :, :40].any() and got[:, :, 40:].all()
    problem.check()
    assert not to_numpy(Problem(n_coded=0, n_rows=60, sinks=True).run()).any()


def test_prompt_attention_scale():
    for scale in (0.0, 0.05, 1.0, -0.3):
        Problem(scale=scale, n_rows=40, means=True, balance=True, n_tail=3).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", [1e-3, 0.03, 30.0, 1000.0])
def test_prompt_attention_any_magnitude(magnitude, dtype):
    problem = Problem(magnitude=magnitude, dtype=DTYPES[dtype], n_coded=257, n_rows=40)
    of_scores = magnitude / 3 * KERNEL_TOLERANCE[mx.float32] if magnitude > 1 else 0
    assert_close(problem.run(), problem.answer(), KERNEL_TOLERANCE[DTYPES[dtype]] + of_scores)


def test_prompt_attention_rising_and_falling_scores():
    """The running maximum moves at every tile, up or down."""
    problem = Problem(n_coded=600, n_kv_heads=1, n_repeats=1, n_rows=70)
    direction = to_numpy(problem.q)[0, 0, 0]
    # Scores are sums of 128 products of one sign; where a unit for matrices adds them one after another, fp32 rounds 128 times.
    largest_score = 2 * (direction @ direction) / np.sqrt(128)
    of_scores = largest_score * np.sqrt(128) * 2.0**-24
    for order in (1, -1):
        k = direction * np.linspace(-2, 2, 600)[::order, None]
        problem.packed_k = tqext.quantize_keys(mx.array(k[None, None].astype(np.float32)))
        assert_close(problem.run(), problem.answer(), KERNEL_TOLERANCE[mx.float32] + of_scores)


@pytest.mark.parametrize("where", ["q", "coded keys", "coded values", "means", "tail keys", "tail values"])
def test_prompt_attention_nan_reaches_the_output(where):
    for dtype in (mx.float32, mx.float16):
        problem = Problem(n_tail=5, n_rows=40, n_first=1, dtype=dtype, means=True)
        array, index = {
            "q": (problem.q, (0, 1, 0, 3)),
            "coded keys": (problem.packed_k.norms, (0, 0, 17, 0)),
            "coded values": (problem.packed_v.params, (0, 0, 17, 1)),
            "means": (problem.packed_k.means, (0, 0, 1, 5)),
            "tail keys": (problem.tail[0], (0, 0, 2, 3)),
            "tail values": (problem.tail[1], (0, 0, 2, 3)),
        }[where]
        array[index] = float("nan")
        got = to_numpy(problem.run())
        touched = got[0, 1, 0] if where == "q" else got[0, 0]
        assert np.isnan(touched[:, 3] if where == "tail values" else touched).all()
        assert np.isfinite(got[0, 4:]).all()


def test_prompt_attention_tokens_beyond_the_lengths_may_hold_anything():
    problem = Problem(batch=2, n_first=4, n_coded=196, n_tail=70, n_rows=40, head_dim=64)
    problem.options["lengths"] = mx.array([[2, 70, 10], [4, 196, 70]])
    want = problem.answer()
    problem.packed_k.norms[0, :, 70:] = float("nan")
    problem.packed_k.codes[0, :, 70:] = 0xFFFFFFFF
    problem.packed_v.params[0, :, 70:] = float("nan")
    for part, length in ((problem.first, 2), (problem.tail, 10)):
        for x in part:
            x[0, :, length:] = float("nan")
    assert_close(problem.run(), want, KERNEL_TOLERANCE[mx.float32])


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
def test_prompt_attention_reads_views_of_any_strides(head_dim, dtype):
    """Poisoned surroundings, swapped axes, a strided last axis: the same numbers."""

    def swapped(x):
        return mx.swapaxes(mx.contiguous(mx.swapaxes(x, 1, 2)), 1, 2)

    def spread(x):
        return mx.repeat(x, 2, axis=-1)[..., ::2]

    for coding, bits in CODINGS[:1] + CODINGS[3:]:
        problem = Problem(
            batch=2, n_coded=150, n_first=3, n_tail=50, value_coding=coding, value_bits=bits, head_dim=head_dim, means=True,
            balance=True, dtype=dtype, n_repeats=2, n_rows=33, options={"mask": "causal"},
        )  # fmt: skip
        want = to_numpy(problem.run())
        k, v = problem.packed_k, problem.packed_v
        for view in (swapped, spread):
            packed_k = k._replace(codes=view(k.codes), norms=view(k.norms), means=view(k.means))
            packed_v = v._replace(codes=view(v.codes), params=view(v.params))
            exact = {name: tuple(map(view, getattr(problem, name))) for name in ("first", "tail")}
            got = problem.run(q=view(problem.q), packed_k=packed_k, packed_v=packed_v, **exact)
            assert np.array_equal(to_numpy(got), want)
        exact = {name: tuple(poisoned(x, np.nan) for x in getattr(problem, name)) for name in ("first", "tail")}
        got = problem.run(q=poisoned(problem.q, np.nan), packed_k=poisoned_tokens(k), packed_v=poisoned_tokens(v), **exact)
        assert np.array_equal(to_numpy(got), want)


def test_prompt_attention_repeated_runs_are_identical():
    problem = Problem(n_coded=5000, n_tail=33, n_repeats=8, n_rows=33, n_kv_heads=1, dtype=mx.float16)
    first = to_numpy(problem.run())
    for _ in range(5):
        assert np.array_equal(to_numpy(problem.run()), first)


@pytest.mark.parametrize("case", range(60))
def test_prompt_attention_random_mixtures(case):
    rng = np.random.default_rng(1000 + case)

    def pick(*choices):
        return choices[rng.integers(len(choices))]

    n_rows, batch = pick(9, 17, 33, 50, 129), pick(1, 1, 2)
    n_first, n_coded = pick(0, 1, 4, 70), pick(0, 1, 64, 100, 257, 700)
    n_tail = n_rows + pick(0, 1, 31, 70)
    n_keys = n_first + n_coded + n_tail
    mask = pick(None, "causal", "causal", "bool", "float32")
    options = {"mask": mask}
    if mask not in (None, "causal"):
        allowed = rng.random((pick(1, batch), 1, n_rows, n_keys)) < 0.6
        options["mask"] = mx.array(allowed if mask == "bool" else np.where(allowed, 0.5, -np.inf).astype(np.float32))
    ragged = pick(None, "left_padding", "lengths")
    if ragged == "left_padding":
        options["left_padding"] = mx.array(rng.integers(0, n_keys + 1, batch).astype(np.int32))
    elif ragged == "lengths" and mask in (None, "causal"):
        ends = [n_first, n_coded, n_tail - n_rows]
        options["lengths"] = mx.array(np.stack([rng.integers(0, n + 1, batch) for n in ends], 1).astype(np.int32))
    head_dim = pick(32, 64, 80, 96, 128, 128, 192, 256)
    coding, value_bits = pick(*CODINGS)
    Problem(
        batch=batch, n_kv_heads=pick(1, 2), n_repeats=pick(1, 2, 3, 4, 7, 8), n_rows=n_rows, n_first=n_first, n_coded=n_coded,
        n_tail=n_tail, head_dim=head_dim, value_dim=pick(head_dim, head_dim, 64), key_bits=pick(2, 3, 3, 4),
        value_coding=coding, value_bits=value_bits, dtype=pick(mx.float32, mx.float16, mx.bfloat16), means=pick(False, True),
        balance=pick(False, True), sinks=pick(False, False, True), scale=pick(None, 0.1), seed=case, options=options,
    ).check()  # fmt: skip


@pytest.mark.gpu
def test_prompt_attention_takes_no_memory_that_grows_with_the_context():
    """Beside its output a call takes partial results, at most 64 MiB; MLX counts them, and frees them when asked."""
    if not mx.is_available(mx.gpu):
        pytest.fail("this machine has no GPU that MLX can use")
    taken = []
    for n_coded in (8192, 65536):
        problem = Problem(n_coded=64, n_kv_heads=8, n_rows=512, head_dim=128, dtype=mx.float16)
        k, v = problem.packed_k, problem.packed_v
        repeats = n_coded // 64
        k = k._replace(codes=mx.repeat(k.codes, repeats, axis=2), norms=mx.repeat(k.norms, repeats, axis=2))
        v = v._replace(codes=mx.repeat(v.codes, repeats, axis=2), params=mx.repeat(v.params, repeats, axis=2))
        mx.eval(k.codes, k.norms, v.codes, v.params, problem.q)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(problem.run(packed_k=k, packed_v=v))
        taken.append(mx.get_peak_memory() - before)
    assert max(taken) <= (64 << 20) + 2 * problem.q.nbytes
    mx.clear_cache()
    assert mx.get_cache_memory() == 0

"""Attention composed of MLX's operations, for shapes that a GPU has no kernel for: the same answers, in bounded memory.

The operations run on any device; the tests ask for them on the CPU, whose kernels take every shape.
"""

import functools

import mlx.core as mx
import numpy as np
import pytest

import tqext
import tqext.ops
from support import KERNEL_TOLERANCE, Problem, assert_close, decoded_keys, to_numpy, token_lists

SMALL = 1 << 14  # bytes: 64 columns at a time, few rows


@pytest.fixture(params=[SMALL, 1 << 28], ids=["many pieces", "one piece"])
def composed(request, monkeypatch):
    original = tqext._ext.turboquant_attention

    class Composing:
        def __getattr__(self, name):
            return getattr(tqext._ext, name)

    with mx.stream(mx.cpu):
        replaced = Composing()
        replaced.turboquant_attention = functools.partial(original, composed_bytes=request.param)
        monkeypatch.setattr(tqext.ops, "_ext", replaced)
        yield request.param


CODED = dict(n_coded=200, n_first=4, means=True, balance=True)


@pytest.mark.covering
@pytest.mark.parametrize("n_rows", [1, 5, 40])
@pytest.mark.parametrize("head_dim, value_dim", [(64, 64), (320, 320), (512, 512), (320, 64)])
def test_composed_attention(composed, head_dim, value_dim, n_rows):
    for mask in (None, "causal"):
        Problem(
            **CODED, head_dim=head_dim, value_dim=value_dim, n_rows=n_rows, n_tail=n_rows + 3, sinks=mask is None,
            value_coding="lloyd", value_bits=3, options={"mask": mask},
        ).check()  # fmt: skip


@pytest.mark.parametrize("rotation", ["none", "orthogonal"])
def test_composed_attention_rotations(composed, rotation):
    problem = Problem(n_rows=9, n_coded=150, n_tail=9, head_dim=64, rotation=rotation)
    assert_close(problem.run(), problem.answer(), 2e-5 if rotation == "orthogonal" else 1e-5)


def test_composed_attention_of_no_coded_tokens_and_of_none_at_all(composed):
    Problem(n_coded=0, n_tail=100, n_rows=3, head_dim=320).check()
    assert not to_numpy(Problem(n_coded=0, n_rows=3, head_dim=320, sinks=True).run()).any()
    got = to_numpy(Problem(n_rows=60, n_coded=20, head_dim=320, options={"mask": "causal"}).run())
    assert not got[:, :, :40].any() and got[:, :, 40:].all()


@pytest.mark.parametrize("kind", ["bool", "float32"])
@pytest.mark.parametrize("shape", [(2, 8, 20, 207), (2, 1, 20, 207), (1, 8, 1, 207), (207,), (2, 1, 20, 1)])
def test_composed_attention_array_mask(composed, kind, shape, rng):
    problem = Problem(batch=2, n_rows=20, n_first=4, n_coded=170, n_tail=33, head_dim=64, means=True)
    allowed = rng.random(shape) < 0.6
    values = allowed if kind == "bool" else np.where(allowed, rng.normal(size=shape), -np.inf).astype(np.float32)
    problem.options["mask"] = mx.array(values)
    problem.check()


@pytest.mark.parametrize("causal", [False, True])
def test_composed_attention_of_batches(composed, causal):
    lengths = [[4, 150, 30], [0, 0, 0], [2, 33, 0], [0, 1, 7]]
    options = {"lengths": mx.array(lengths), "mask": "causal" if causal else None}
    Problem(batch=4, n_rows=20, n_first=4, n_coded=150, n_tail=50 if causal else 30, head_dim=64, options=options).check()
    padding = {"left_padding": mx.array([0, 3, 70, 190]), "mask": "causal" if causal else None}
    Problem(batch=4, n_rows=20, n_first=4, n_coded=150, n_tail=36, head_dim=64, means=True, options=padding).check()


def test_composed_attention_rounds_as_the_type_of_the_queries(composed):
    """Tokens, scaled queries and scores, the last by up to 2^-11 of the largest one."""
    problem = Problem(**CODED, n_rows=9, n_tail=9, head_dim=320, dtype=mx.float16)

    def as_fp16(x):
        return to_numpy(mx.array(x.astype(np.float32)).astype(mx.float16))

    rounded = problem.answer(as_fp16, as_fp16)
    keys = decoded_keys(problem.packed_k).repeat(problem.n_repeats, 1)
    largest_score = np.abs(to_numpy(problem.q).astype(np.float64) @ keys.swapaxes(2, 3)).max() / np.sqrt(320)
    assert_close(problem.run(), rounded, KERNEL_TOLERANCE[mx.float16] + 2 * 2.0**-11 * largest_score)


@pytest.mark.covering
@pytest.mark.parametrize("case", range(24))
def test_composed_attention_of_listed_tokens(composed, case):
    """Gathered first: what Metal does, and every backend for large heads."""
    rng = np.random.default_rng(case)

    def one_of(*choices):
        return choices[rng.integers(len(choices))]

    n_rows, batch, n_coded = one_of(1, 2, 5), one_of(1, 3), one_of(0, 1, 130, 300)
    problem = Problem(
        n_coded=n_coded, n_rows=n_rows, batch=batch, n_repeats=one_of(1, 3), head_dim=one_of(64, 80), n_first=one_of(0, 4),
        n_tail=5 + one_of(0, 9), means=one_of(True, True, False), balance=one_of(True, False), sinks=one_of(True, False),
        value_coding=one_of("groups", "lloyd"), rotation=one_of("hadamard", "hadamard", "orthogonal", "none"), seed=case,
    )  # fmt: skip
    problem.options["indices"] = ids = token_lists(
        problem, one_of(0, 1, 70), per_head=one_of(True, False), per_query=one_of(True, False)
    )
    kind = one_of(None, "causal", "bool", "float32")
    problem.options["mask"] = kind
    if kind not in (None, "causal"):
        shape = (one_of(1, batch), one_of(1, problem.n_q_heads), one_of(1, n_rows), one_of(1, problem.n_keys))
        allowed = rng.random(shape) < 0.6
        numbers = np.where(allowed, rng.normal(size=shape), -np.inf).astype(np.float32)
        problem.options["mask"] = mx.array(allowed if kind == "bool" else numbers)
    if case % 3 == 1:
        problem.options["left_padding"] = mx.array(rng.integers(0, problem.n_keys, batch).astype(np.int32))
    if case % 3 == 2:
        tops = (problem.n_first, n_coded, problem.n_tail - 5)
        problem.options["lengths"] = mx.array(np.stack([rng.integers(0, n + 1, batch) for n in tops], 1).astype(np.int32))
    problem.check()
    if case % 4 == 0:
        assert_close(problem.run(indices=ids.view(mx.uint32)), problem.answer(), KERNEL_TOLERANCE[mx.float32])


def test_composed_attention_takes_memory_that_does_not_grow_with_the_context():
    """Two pieces at most, within some copies that MLX makes, beside the output; the history would be 168 and 671 MB."""
    bytes, taken = 1 << 25, []
    for n_coded in (16384, 65536):
        problem = Problem(n_coded=64, n_kv_heads=4, n_repeats=1, n_rows=16, head_dim=320)
        k, v = problem.packed_k, problem.packed_v
        codes, norms, values, params = (mx.repeat(x, n_coded // 64, 2) for x in (k.codes, k.norms, v.codes, v.params))
        mx.eval(codes, norms, values, params, problem.q)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        out = tqext._ext.turboquant_attention(
            problem.q, codes, norms, None, None, None, None, 3, 320, "none", values, params, 2, 320, "groups", "none", None,
            None, None, None, None, None, None, None, mx.cpu, composed_bytes=bytes,
        )  # fmt: skip
        mx.eval(out)
        taken.append(mx.get_peak_memory() - before)
    print([round(x / 2**20) for x in taken], "MB")
    assert max(taken) <= 3 * bytes and taken[1] <= 1.5 * taken[0]

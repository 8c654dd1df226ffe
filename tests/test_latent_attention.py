"""Attention over packed latents, which are keys and values at once, against float64 over the same bytes."""

import functools

import mlx.core as mx
import numpy as np
import pytest

import reference
import tqext
import tqext.ops
from support import DTYPES, KERNEL_TOLERANCE, assert_close, decoded_keys, error_line, poisoned, poisoned_tokens, to_numpy

pytestmark = pytest.mark.usefixtures("device")
SCALE = 192**-0.5


class Problem:
    """One call on random latents that drift from block to block, with queries that attend to some of them."""

    def __init__(
        self, *, dim=512, rope_dim=64, batch=1, n_kv_heads=1, n_repeats=4, n_rows=1, n_first=0, n_coded=129, n_tail=0, bits=3,
        means=True, balance=False, dtype=mx.float32, rotation="hadamard", seed=0,
    ):  # fmt: skip
        rng = np.random.default_rng(seed)
        self.n_keys, n_q_heads = n_first + n_coded + n_tail, n_kv_heads * n_repeats
        self.full = (batch, n_q_heads, n_rows, self.n_keys)

        def draw(heads, n, dim, dtype=dtype):
            return mx.array(rng.normal(size=(batch, heads, n, dim)).astype(np.float32)).astype(dtype)

        latents = draw(n_kv_heads, n_coded, dim, mx.float32)
        if n_coded:
            drift = draw(n_kv_heads, tqext.format.n_blocks(n_coded), dim, mx.float32)
            latents += mx.repeat(drift, tqext.format.BLOCK, 2)[:, :, :n_coded]
        factor = mx.array(2.0 ** rng.uniform(-2, 2, (n_kv_heads, dim)).astype(np.float32)) if balance else None
        self.q = draw(n_q_heads, n_rows, dim)
        self.packed = tqext.quantize_keys(
            latents, bits=bits, means=tqext.block_means(latents) if means else None, balance=factor, rotation=rotation
        )
        self.first = draw(n_kv_heads, n_first, dim) if n_first else None
        self.tail = draw(n_kv_heads, n_tail, dim) if n_tail else None
        self.q_rope = draw(n_q_heads, n_rows, rope_dim) if rope_dim else None
        self.k_rope = draw(n_kv_heads, self.n_keys, rope_dim) if rope_dim else None
        self.n_repeats, self.dtype = n_repeats, dtype
        self.rng = rng

    def run(self, **changes):
        arguments = dict(q_rope=self.q_rope, k_rope=self.k_rope, first=self.first, tail=self.tail, scale=SCALE)
        arguments = {**arguments, **changes}
        return tqext.latent_attention(arguments.pop("q", self.q), arguments.pop("packed", self.packed), **arguments)

    def answer(self, mask=None):
        """float64 over the decoded latents."""
        scores = np.zeros(self.full)
        if self.q_rope is not None:
            k = np.repeat(to_numpy(self.k_rope).astype(np.float64), self.n_repeats, 1)
            scores = SCALE * to_numpy(self.q_rope).astype(np.float64) @ k.swapaxes(-1, -2)
        if isinstance(mask, str):
            scores = np.where(reference.allowed_columns(self.full[2], 0, self.n_keys, 0, causal=True), scores, -np.inf)
        elif mask is not None:
            scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
        x = decoded_keys(self.packed)
        first, tail = (None if part is None else (to_numpy(part),) * 2 for part in (self.first, self.tail))
        return reference.attention(to_numpy(self.q), x, x, scale=SCALE, mask=scores, first=first, tail=tail)

    def check(self, mask=None, **changes):
        given = mask if mask is None or isinstance(mask, str) else mx.array(mask)
        assert_close(self.run(mask=given, **changes), self.answer(mask), KERNEL_TOLERANCE[self.dtype])


@pytest.fixture(params=["kernel", "composed", "composed of many pieces"])
def way(request, monkeypatch):
    """The operator as the device has it, and as MLX's operations do its work where the device has no kernel."""
    if request.param == "kernel":
        yield
        return
    if mx.default_device() == mx.gpu:
        pytest.skip("on the CPU's kernels' inputs")
    original = tqext._ext.latent_attention

    class Composing:
        def __getattr__(self, name):
            return getattr(tqext._ext, name)

    replaced = Composing()
    n_bytes = 1 << 28 if request.param == "composed" else 1 << 14
    replaced.latent_attention = functools.partial(original, composed_bytes=n_bytes)
    with mx.stream(mx.cpu):
        monkeypatch.setattr(tqext.ops, "_ext", replaced)
        yield


@pytest.mark.covering
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dim, rope_dim", [(512, 64), (256, 64), (40, 8), (64, None)])
def test_latent_attention(way, dim, rope_dim, bits):
    for n_rows in (1, 3):
        Problem(dim=dim, rope_dim=rope_dim, n_rows=n_rows, bits=bits, n_first=5, n_coded=200, n_tail=37, n_repeats=6).check()


@pytest.mark.parametrize("n_coded", [0, 1, 63, 64, 65, 257])
def test_latent_attention_of_any_number_of_blocks(way, n_coded):
    Problem(dim=96, n_coded=n_coded, n_tail=3, n_repeats=3).check()
    if n_coded:
        Problem(dim=96, n_coded=n_coded, n_repeats=3).check()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("n_rows", [1, 20])
def test_latent_attention_types(dtype, n_rows):
    """20 rows are a prompt's: its threads have a part of the queries each."""
    Problem(dim=256, dtype=dtype, n_rows=n_rows, n_coded=300, n_first=4, n_tail=n_rows, n_repeats=16).check("causal")


# Query rows of one tile of a GPU's kernel and of several, with the mask's forms.
@pytest.mark.covering
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("dim", [256, 512])
@pytest.mark.parametrize(
    "n_repeats, n_rows, mask",
    [(5, 1, None), (16, 2, "causal"), (20, 1, "bool"), (40, 1, "float"), (128, 1, None), (33, 7, "causal")],
)
def test_latent_attention_of_half_precision(dtype, dim, n_repeats, n_rows, mask):
    for bits, n_coded, n_first, n_tail in ((3, 64 * 9, 64, 70), (2, 129, 0, n_rows), (4, 0, 3, 64 + n_rows)):
        sizes = dict(n_repeats=n_repeats, n_rows=n_rows, n_coded=n_coded, n_first=n_first, n_tail=n_tail)
        kind = dict(bits=bits, means=bits != 2, balance=bits == 4, rope_dim=64 if bits == 3 else None)
        problem = Problem(dim=dim, dtype=dtype, **sizes, **kind)
        shape = (*problem.full[:2], 1, problem.full[3])
        given = mask
        if mask in ("bool", "float"):
            allowed = problem.rng.random(shape) < 0.6
            given = allowed if mask == "bool" else np.where(allowed, problem.rng.normal(size=shape), -np.inf)
        problem.check(given)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_latent_attention_of_half_precision_in_a_long_context(dtype):
    """Shares of the tokens, whose maxima differ by more than a weight's 16 bits hold; in several sequences and heads."""
    problem = Problem(dim=512, dtype=dtype, n_coded=64 * 40, n_tail=5, n_repeats=17)
    problem.q *= 3
    problem.check()
    Problem(dim=256, dtype=dtype, batch=2, n_kv_heads=3, n_coded=64 * 20, n_first=4, n_tail=9, n_repeats=6, n_rows=2).check()
    packed = poisoned_tokens(problem.packed._replace(means=None))
    want = problem.run(packed=problem.packed._replace(means=None))
    np.testing.assert_array_equal(to_numpy(problem.run(packed=packed)), to_numpy(want))


@pytest.mark.parametrize("means", [False, True])
@pytest.mark.parametrize("balance", [False, True])
def test_latent_attention_without_means_and_with_a_balance(way, means, balance):
    Problem(dim=64, means=means, balance=balance, n_coded=150, n_first=2, n_tail=2).check()


def test_latent_attention_in_the_rotated_space(way):
    Problem(dim=64, rotation="none", n_coded=150, n_tail=9).check()


def test_latent_attention_of_batches_and_several_heads(way):
    Problem(dim=64, batch=3, n_kv_heads=2, n_repeats=5, n_rows=2, n_coded=190, n_first=3, n_tail=8).check()


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("rope_dim", [8, None])
def test_latent_attention_array_masks(way, kind, rope_dim):
    problem = Problem(dim=64, rope_dim=rope_dim, n_rows=4, n_coded=130, n_tail=10)
    allowed = problem.rng.random(problem.full) < 0.5
    problem.check(allowed if kind == "bool" else np.where(allowed, problem.rng.normal(size=problem.full), -np.inf))


def test_latent_attention_of_a_long_context():
    """Longer than a kernel call's tokens, with weights that differ by more than fp32 holds."""
    problem = Problem(dim=64, n_coded=64 * 300, n_repeats=2)
    problem.q *= 6
    problem.check()


def test_latent_attention_of_nothing():
    problem = Problem(dim=64, n_coded=70, n_rows=2)
    mask = np.zeros(problem.full, bool)
    mask[:, :, 1] = True
    got = to_numpy(problem.run(mask=mx.array(mask)))
    assert not got[:, :, 0].any() and got[:, :, 1].all()


def test_latent_attention_reads_nothing_beside_its_tokens():
    problem = Problem(dim=64, n_coded=150, n_first=3, n_tail=20, batch=2, means=False)
    want = problem.run()
    packed = poisoned_tokens(problem.packed)
    got = problem.run(packed=packed, first=poisoned(problem.first, np.nan), tail=poisoned(problem.tail, np.nan))
    np.testing.assert_array_equal(to_numpy(got), to_numpy(want))


def test_latent_attention_of_a_number_that_is_not_finite():
    """A damaged norm or mean is seen by who attends to its tokens, and on CPUs by nobody else."""
    if mx.default_device() == mx.gpu:
        pytest.skip("MLX's product of a weight of zero with infinity")
    problem = Problem(dim=64, n_coded=192, n_rows=2, rope_dim=None)
    mask = np.ones(problem.full, bool)
    mask[:, :, 0, 64:128] = False
    means, norms = np.array(problem.packed.means), np.array(problem.packed.norms)
    means[:, :, 1], norms[:, :, 70] = np.inf, np.inf
    for changes in ({"means": mx.array(means)}, {"norms": mx.array(norms)}):
        got = to_numpy(problem.run(mask=mx.array(mask), packed=problem.packed._replace(**changes)))
        assert np.isfinite(got[:, :, 0]).all() and np.isnan(got[:, :, 1]).all()


def test_latent_attention_within_compile():
    problem = Problem(dim=64, n_coded=130, n_tail=4)
    step = mx.compile(lambda q, packed, tail: tqext.latent_attention(q, packed, scale=SCALE, tail=tail))
    want = problem.run(q_rope=None, k_rope=None)
    np.testing.assert_array_equal(to_numpy(step(problem.q, problem.packed, problem.tail)), to_numpy(want))


def bad_calls():
    p = Problem(dim=64, n_coded=70, n_first=2, n_tail=4, rope_dim=8)
    packed = p.packed
    signed = tqext.quantize_keys(mx.ones((1, 1, 70, 64)), qjl=True)
    dense = tqext.quantize_keys(mx.ones((1, 1, 70, 64)), rotation="orthogonal")
    return {
        "q axes": (dict(q=p.q[0]), "q"),
        "q type": (dict(q=p.q.astype(mx.int32)), "q"),
        "q dimension": (dict(q=p.q[..., :32]), "q"),
        "q of NumPy": (dict(q=to_numpy(p.q)), "q"),
        "no heads": (dict(packed=packed._replace(codes=packed.codes[:, :0], norms=packed.norms[:, :0])), "q"),
        "batch": (dict(q=mx.concatenate([p.q, p.q])), "packed.codes"),
        "packed": (dict(packed=(1, 2)), "packed"),
        "signs": (dict(packed=signed), "packed.signs"),
        "dense": (dict(packed=dense), "packed.rotation"),
        "means": (dict(packed=packed._replace(means=packed.means[:, :, :1])), ".*means"),
        "scale": (dict(scale=float("nan")), "scale"),
        "tail": (dict(tail=p.tail[..., :32]), "tail"),
        "tail axes": (dict(tail=p.tail[0]), "tail"),
        "first": (dict(first=mx.concatenate([p.first, p.first], axis=1)), "first"),
        "first type": (dict(first=p.first.astype(mx.int32)), "first"),
        "one of two": (dict(q_rope=None), "k_rope"),
        "q_rope": (dict(q_rope=p.q_rope[:, :2]), "q_rope"),
        "q_rope axes": (dict(q_rope=p.q_rope[0]), "q_rope"),
        "k_rope": (dict(k_rope=p.k_rope[:, :, 1:]), "k_rope"),
        "k_rope type": (dict(k_rope=p.k_rope.astype(mx.int32)), "k_rope"),
        "mask": (dict(mask=mx.zeros((3, 5))), "mask"),
        "mask type": (dict(mask=mx.zeros(p.full, mx.int32)), "mask"),
        "mask name": (dict(mask="full"), "mask"),
    }


@pytest.mark.parametrize("case", bad_calls())
def test_latent_attention_refuses(case):
    changes, argument = bad_calls()[case]
    problem = Problem(dim=64, n_coded=70, n_first=2, n_tail=4, rope_dim=8)
    with pytest.raises(ValueError, match=error_line("latent_attention", argument)):
        mx.eval(problem.run(**changes))

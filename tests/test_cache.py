"""The single-stream cache against the specification told again in sequence.py."""

import copy

import mlx.core as mx
import numpy as np
import pytest

import tqext
from sequence import STEP, Sequence, attention
from support import KERNEL_TOLERANCE, on_cuda
from tqext import BatchTurboQuantKVCache, Recipe, TurboQuantKVCache, get_policy
from tqext.cache import GROWTH
from tqext.presets import PRESETS

pytestmark = pytest.mark.usefixtures("device")

H, HQ, D, DV = 2, 4, 64, 32

RECIPES = {
    "default": Recipe(),
    "plain": PRESETS["tq3-plain"].recipe,
    "tq4": PRESETS["tq4"].recipe,
    "no-sinks": Recipe(sinks=0, tail=8, flush=8),
    "no-tail": Recipe(tail=0, flush=16),
    "orthogonal": Recipe(rotation="orthogonal"),
}


def tokens(n, seed):
    random = np.random.default_rng(seed)
    k = random.standard_normal((H, n, D), np.float32) + np.linspace(-2, 2, D, dtype=np.float32)
    return k, random.standard_normal((H, n, DV), np.float32), random.standard_normal((HQ, n, D), np.float32)


def close(got, expected, *, dense=False):
    """`dense`: by a cache with a dense rotation. On a GPU its products round otherwise than NumPy's, and a code that lies at a
    threshold may turn over: a step of a value's group, times the token's weight."""
    got, expected = np.array(got, np.float64), np.array(expected, np.float64)
    assert got.shape == expected.shape
    # Of the largest output: both sides have the kernel's error.
    tolerance = 2e-2 if dense and on_cuda() else 2 * KERNEL_TOLERANCE[mx.float32]
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


def answer(reference, k, v, q, sinks=None, window=None):
    """Append tokens; what their queries find. A few tokens after others find what they would find one by one."""
    n = k.shape[1]
    if not 1 < n <= STEP or reference.n_tokens == 0:
        return attention(q, *reference.append(k, v), D**-0.5, sinks, window)
    alone, rows = copy.deepcopy(reference), []
    for i in range(n):
        attended = alone.append(k[:, i : i + 1], v[:, i : i + 1])
        rows.append(attention(q[:, i : i + 1], *attended, D**-0.5, sinks, window))
    reference.append(k, v)
    return np.concatenate(rows, axis=1)


def step(cache, reference, n, seed, **kwargs):
    """Append n tokens to both, and compare attention and counts."""
    k, v, q = tokens(n, seed)
    mask = cache.make_mask(n)
    snapshot, _ = cache.update_and_fetch(mx.array(k)[None], mx.array(v)[None])
    got = snapshot.attend(mx.array(q)[None], D**-0.5, mask, **kwargs)
    sinks = kwargs.get("sinks")
    close(got[0], answer(reference, k, v, q, None if sinks is None else np.array(sinks)))
    assert (cache.n_first, cache.n_coded, cache.n_tail) == (reference.n_first, reference.n_coded, reference.n_tail)
    assert cache.offset == cache.size() == reference.n_tokens


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("lengths", [(1,) * 75, (300, *(1,) * 70), (3, 5, 20, 100, 1, 1, 8, 4, 9, 700, 1), (2, 2, 62, 63, 65)])
def test_cache_attends_as_specified(recipe, lengths):
    cache, reference = TurboQuantKVCache(recipe), Sequence(recipe, H, D, DV)
    for i, n in enumerate(lengths):
        step(cache, reference, n, i)


@pytest.mark.parametrize("seed", range(6))
def test_cache_trim_is_exact(seed):
    """Random appends and trims: what is trimmed is gone, what is left is as it was."""
    random = np.random.default_rng(seed)
    recipe = list(RECIPES.values())[seed % len(RECIPES)]
    cache, reference = TurboQuantKVCache(recipe), Sequence(recipe, H, D, DV)
    for i in range(25):
        step(cache, reference, int(random.choice([1, 1, 2, 7, 8, 9, 40, 130])), 100 * seed + i)
        if random.random() < 0.5:
            n = int(random.choice([0, 1, 3, 31, 64, 200, 10_000], p=[0.1, 0.3, 0.2, 0.15, 0.1, 0.1, 0.05]))
            gone = min(n, reference.n_tokens)
            assert cache.trim(n) == gone
            reference.trim(n)
            assert cache.offset == reference.n_tokens
            assert cache.empty() == (reference.n_tokens == 0)


def test_cache_draft_step_then_trim_equals_no_draft():
    """A wrong draft that is trimmed leaves the codes that would have come without it."""
    plain, drafted = TurboQuantKVCache(), TurboQuantKVCache()
    for i in range(150):
        k, v, _ = (mx.array(x)[None] for x in tokens(1, i))
        plain.update_and_fetch(k, v)
        wrong_k, wrong_v, _ = (mx.array(x)[None] for x in tokens(4, 1000 + i))
        drafted.update_and_fetch(mx.concatenate([k, wrong_k], axis=2), mx.concatenate([v, wrong_v], axis=2))
        assert drafted.trim(4) == 4
    plain._flush()
    drafted._flush()
    for a, b in zip(plain.state, drafted.state, strict=True):
        assert mx.array_equal(a, b)
    assert plain.n_coded >= 64


def test_cache_sinks_join_the_denominator():
    cache, reference = TurboQuantKVCache(), Sequence(Recipe(), H, D, DV)
    sinks = mx.array([0.5, -1.0, 3.0, 0.0])
    for i, n in enumerate((100, 1, 4, 1)):
        step(cache, reference, n, i, sinks=sinks)


def test_cache_takes_window_masks():
    cache, reference = TurboQuantKVCache(), Sequence(Recipe(), H, D, DV)
    for i, n in enumerate((123, 1, 6, 8)):
        k, v, q = tokens(n, i)
        mask = cache.make_mask(n, window_size=50)
        snapshot, _ = cache.update_and_fetch(mx.array(k)[None], mx.array(v)[None])
        assert mask.shape[-1] == snapshot.shape[2]
        close(snapshot.attend(mx.array(q)[None], D**-0.5, mask)[0], answer(reference, k, v, q, window=50))


def test_cache_holds_several_sequences_in_step():
    """Batched evaluation with a single cache: rows of equal length."""
    cache = TurboQuantKVCache()
    references = [Sequence(Recipe(), H, D, DV) for _ in range(3)]
    for i, n in enumerate((90, 1, 1, 30, 1)):
        rows = [tokens(n, 10 * i + row) for row in range(3)]
        k, v, q = (mx.array(np.stack([row[part] for row in rows])) for part in range(3))
        mask = cache.make_mask(n)
        got = cache.update_and_fetch(k, v)[0].attend(q, D**-0.5, mask)
        for row, reference in enumerate(references):
            attended = reference.append(rows[row][0], rows[row][1])
            close(got[row], attention(rows[row][2], *attended, D**-0.5))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_cache_keeps_the_model_type(dtype):
    cache = TurboQuantKVCache()
    for i, n in enumerate((100, 1, 1)):
        k, v, q = (mx.array(x)[None].astype(dtype) for x in tokens(n, i))
        snapshot, _ = cache.update_and_fetch(k, v)
        out = snapshot.attend(q, D**-0.5, "causal" if n > 1 else None)
        assert out.dtype == dtype
        assert mx.isfinite(out).all()
    assert snapshot.tail.keys.dtype == snapshot.first.values.dtype == dtype


def test_cache_first_chunk_is_exact():
    """A prompt of one chunk attends to itself without any coding error."""
    k, v, q = tokens(500, 0)
    got = TurboQuantKVCache().update_and_fetch(mx.array(k)[None], mx.array(v)[None])[0].attend(mx.array(q)[None], 0.1, "causal")
    close(got[0], attention(q, k, v, 0.1))


def test_cache_snapshot_is_immutable():
    """Steps after a snapshot do not change what it attends to."""
    cache = TurboQuantKVCache()
    k, v = (mx.array(x)[None] for x in tokens(200, 0)[:2])
    cache.update_and_fetch(k, v)
    one_k, one_v, one_q = (mx.array(x)[None] for x in tokens(1, 1))
    snapshot, _ = cache.update_and_fetch(one_k, one_v)
    before = snapshot.attend(one_q, D**-0.5)
    mx.eval(before)
    later = snapshot
    for i in range(70):
        cache.update_and_fetch(*(mx.array(x)[None] for x in tokens(1, i + 2)[:2]))
        mx.eval(cache.state)
    assert mx.array_equal(later.attend(one_q, D**-0.5), before)


def test_cache_deepcopy_is_independent():
    cache = TurboQuantKVCache()
    cache.update_and_fetch(*(mx.array(x)[None] for x in tokens(300, 0)[:2]))
    mx.eval(cache.state)
    twin = copy.deepcopy(cache)
    kept = [mx.array(np.array(x)) for x in twin.state]
    cache.trim(10)
    for i in range(80):
        cache.update_and_fetch(*(mx.array(x)[None] for x in tokens(1, i + 5)[:2]))
    mx.eval(cache.state)
    for a, b in zip(twin.state, kept, strict=True):
        assert mx.array_equal(a, b)


@pytest.mark.parametrize("cls", [TurboQuantKVCache, lambda recipe, shared: BatchTurboQuantKVCache([0], recipe, shared=shared)])
def test_cache_deepcopy_in_the_middle_of_a_step(cls):
    """A cache that other layers share holds the step's snapshot; a copy of it attends to the same."""
    cache = cls(Recipe(), shared=True)
    for n in (100, 1):
        k, v, q = (mx.array(x)[None] for x in tokens(n, n))
        cache.make_mask(n)
        cache.update_and_fetch(k, v)
    snapshots = [c.keys_and_values()[0] for c in (cache, copy.deepcopy(cache))]
    assert mx.array_equal(*(s.attend(q, D**-0.5, None) for s in snapshots))


def test_cache_nbytes_are_the_formats_bytes():
    cache = TurboQuantKVCache()
    k, v = (mx.array(x)[None] for x in tokens(4 + 10 * GROWTH + 32, 0)[:2])
    cache.update_and_fetch(k, v)
    recipe = Recipe()
    exact = 4 * (D + DV) * H  # fp32 here
    coded = cache.n_coded * H * recipe.bytes_per_token(D, DV) + H * D * 4
    assert cache.nbytes == coded + exact * (recipe.sinks + 72)  # the tail has room for 72
    assert cache.used_nbytes == coded + exact * (recipe.sinks + 32)
    assert cache.n_coded == 10 * GROWTH
    assert cache.fp16_nbytes == cache.offset * H * (D + DV) * 2


def test_cache_keeps_nothing_but_its_own_bytes():
    k, v = (mx.random.normal((1, H, 2048, 64)) for _ in range(2))
    mx.eval(k, v)
    mx.synchronize()  # a buffer is freed after the task that used it, which may be after the evaluation is done
    cache = TurboQuantKVCache()
    before = mx.get_active_memory()
    for _ in range(2):
        cache.update_and_fetch(k, v)
        mx.eval(cache.state)
    mx.synchronize()
    page = 4096 if mx.default_device() == mx.cpu else 16384  # what the allocator may add to each array
    assert mx.get_active_memory() - before <= cache.nbytes + page * len(cache.state)
    batch = TurboQuantKVCache.merge([cache])
    mx.eval(batch.state)
    cache = batch.extract(0)
    del batch
    mx.eval(cache.state)
    mx.synchronize()
    assert mx.get_active_memory() - before <= cache.nbytes + page * len(cache.state)


def test_cache_is_not_taken_for_mlx_lms_own_quantised_one():
    for name in ("bits", "group_size", "to_quantized"):
        assert not hasattr(TurboQuantKVCache(), name)


def test_cache_growth_copies_nothing_per_step():
    """The packed buffers are the same memory from one step to the next."""
    cache = TurboQuantKVCache(Recipe(tail=0, flush=1, mean=False, sinks=0))
    cache.update_and_fetch(*(mx.array(x)[None] for x in tokens(20 * GROWTH - 200, 0)[:2]))
    mx.eval(cache.state)
    growth = []
    for first in range(0, 60, 20):
        mx.synchronize()  # a GPU frees what a step used when it is done, which may be after the evaluation
        mx.reset_peak_memory()
        active = mx.get_active_memory()
        for i in range(first, first + 20):
            k, v, q = (mx.array(x)[None] for x in tokens(1, i))
            mx.eval(cache.update_and_fetch(k, v)[0].attend(q, D**-0.5))
            mx.synchronize()
        growth.append(mx.get_peak_memory() - active)
    assert min(growth) < max(x.nbytes for x in cache._packed)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_bytes_per_token_are_what_the_operators_pack(preset):
    recipe = get_policy(preset).recipe
    for key_dim, value_dim in ((64, 64), (128, 64), (80, 112)):
        cache = TurboQuantKVCache(recipe)
        cache.update_and_fetch(mx.ones((1, 3, 200, key_dim)), mx.ones((1, 3, 200, value_dim)))
        used = sum(x[:, :, : cache.n_coded].nbytes for x in cache._packed)
        assert used == cache.n_coded * 3 * recipe.bytes_per_token(key_dim, value_dim)
        assert cache.n_coded > 0


@pytest.mark.parametrize(
    "wrong",
    [{"key_bits": 5}, {"value_bits": 3}, {"rotation": "none"}, {"tail": -1}, {"flush": 0}, {"first_last": -1}, {"x": 1}],
)
def test_policy_rejects_wrong_fields(wrong):
    with pytest.raises(ValueError, match=r"^\[policy\] \w+: expected .*, got "):
        get_policy("tq3", **wrong)
    with pytest.raises(ValueError, match="expected one of tq3"):
        get_policy("tq5")


def test_policy_of_layer():
    policy = get_policy("bonsai", layers={10: None, 0: Recipe(key_bits=4)}, tail=64)
    recipes = [policy.of_layer(i, 36) for i in range(36)]
    assert recipes[0].key_bits == 4
    assert recipes[1:4] == [None] * 3
    assert recipes[32:] == [None] * 4
    assert recipes[10] is None
    assert recipes[4] == Recipe(tail=64)


def test_tqext_names_are_there():
    for name in tqext.__all__:
        assert getattr(tqext, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tqext.nothing

"""The single-stream cache against the specification told again in sequence.py."""

import collections
import copy
import dataclasses
import io
import itertools
import re

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import BatchKVCache, KVCache
from tqext._ext import append_token, append_tokens

import tqext
from cache_support import (
    DV,
    HQ,
    RECIPES,
    D,
    H,
    answer,
    check_drafts_leave_no_trace,
    close,
    make,
    make_reference,
    random_tokens,
    step,
    tokens,
)
from sequence import BLOCK, attention
from tqext import BatchTurboQuantKVCache, Recipe, TurboQuantKVCache, get_policy
from tqext.kv.schedule import GROWTH
from tqext.presets import PRESETS

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.covering
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize(
    "lengths",
    [
        (1,) * 270,
        (300, *(1,) * 70),
        (3, 5, 20, 100, 1, 1, 8, 64, 64, 4, 9, 50, 700, 1),
        (2, 2, 62, 63, 65, 64, 33, 64, 64, 2, 130, 40, 40),
    ],
    ids=["decode", "prompt-decode", "mixed", "short"],
)
def test_cache_attends_as_specified(recipe, lengths):
    cache, reference = make(recipe), make_reference(recipe)
    for i, n in enumerate(lengths):
        step(cache, reference, n, i)


@pytest.mark.parametrize("seed", range(2 * len(RECIPES)))
def test_cache_trim_is_exact(seed):
    """Random appends and trims: what is trimmed is gone, what is left is as it was."""
    random = np.random.default_rng(seed)
    recipe = list(RECIPES.values())[seed % len(RECIPES)]
    cache, reference = make(recipe), make_reference(recipe)
    for i in range(25):
        step(cache, reference, int(random.choice([1, 1, 2, 9, 40, 64, 65, 130, 300])), 100 * seed + i)
        if random.random() < 0.5:
            n = int(random.choice([0, 1, 3, 31, 64, 200, 10_000], p=[0.1, 0.3, 0.2, 0.15, 0.1, 0.1, 0.05]))
            gone = min(n, reference.n_tokens)
            assert cache.trim(n) == gone
            reference.trim(n)
            assert cache.offset == reference.n_tokens
            assert cache.empty() == (reference.n_tokens == 0)


BOUNDED = {
    "least": (Recipe(tail=20, first=4), 152),
    "default": (Recipe(), 400),
    "no-first": (Recipe(first=0, tail=8, balance=False), 200),
}


@pytest.mark.covering
@pytest.mark.parametrize(("recipe", "max_size"), BOUNDED.values(), ids=BOUNDED)
@pytest.mark.parametrize("window", [None, 170])
@pytest.mark.parametrize(
    "lengths",
    [(1,) * 300, (700, *(1,) * 140), (3, 200, 64, 64, 1, 40, 60, 2, 1000, 1, 64, 64)],
    ids=["decode", "prompt", "mixed"],
)
def test_bounded_cache_attends_as_specified(recipe, max_size, window, lengths):
    """The first tokens and the last ones, and never many more than the bound."""
    cache, reference = make(recipe, max_size), make_reference(recipe, max_size)
    for i, n in enumerate(lengths):
        step(cache, reference, n, i, window)
        assert cache.size() <= max_size + (64 if 1 < n <= 64 else 0)
    assert cache.offset == sum(lengths)
    assert cache.n_dropped > 0 or cache.offset <= max_size


@pytest.mark.parametrize("seed", range(9))
def test_bounded_cache_trim_is_exact(seed):
    """As far as the tokens go that were not dropped."""
    random = np.random.default_rng(seed)
    recipe, max_size = list(BOUNDED.values())[seed % len(BOUNDED)]
    cache, reference = make(recipe, max_size), make_reference(recipe, max_size)
    for i in range(25):
        step(cache, reference, int(random.choice([1, 1, 2, 40, 64, 65, 130, 600])), 100 * seed + i)
        n = int(random.choice([0, 1, 31, 64, 200, reference.n_tokens]))
        after, n_dropped = reference.n_tokens - max(reference.n_first, 1), reference.n_dropped
        if n_dropped and after < n < reference.n_tokens + n_dropped:
            with pytest.raises(ValueError, match=rf"\[trim\] n: expected at most {after}, as older tokens were dropped"):
                cache.trim(n)
            n = int(random.choice([after, reference.n_tokens + n_dropped]))
        n = min(n, reference.n_tokens + n_dropped)
        assert cache.trim(n) == n
        reference.trim(n)
        assert cache.size() == reference.n_tokens
        assert cache.empty() == (reference.n_tokens == 0)
        loaded = TurboQuantKVCache.from_state(cache.state)
        assert (loaded.offset, loaded.max_size) == (cache.offset, max_size)


def test_bounded_cache_takes_no_more_memory():
    cache = make(Recipe(), 1000)
    sizes = []
    for _ in range(40):
        cache.update_and_fetch(*random_tokens(256))
        mx.eval(cache.state)
        sizes.append(cache.nbytes)
    assert max(sizes[10:]) == max(sizes[30:])
    exact, coded = 4 * (D + DV) * H, H * Recipe().bytes_per_token(D, DV)
    assert sizes[-1] <= exact * (64 + 64 + 63 + 64) + 1024 * coded


@pytest.mark.parametrize("max_size", [0, -1, 100, 255])
def test_bound_without_room_for_codes_is_refused(max_size):
    with pytest.raises(ValueError, match=r"max_size: expected None or 256 \(first \+ tail \+ 128\) or more, got"):
        TurboQuantKVCache(max_size=max_size)


@pytest.mark.parametrize("n_draft", [4, 40, 63])
@pytest.mark.parametrize("recipe", [Recipe(), Recipe(tail=0, first=3)], ids=["default", "no-tail"])
def test_cache_draft_step_then_trim_equals_no_draft(recipe, n_draft):
    """A wrong draft that is trimmed leaves the codes that would have come without it."""
    plain, drafted = make(recipe), make(recipe)
    check_drafts_leave_no_trace(plain, drafted, 270, n_draft)
    assert plain.n_coded >= 128


def test_cache_sinks_join_the_denominator():
    cache, reference = make(Recipe()), make_reference(Recipe())
    sinks = mx.array([0.5, -1.0, 3.0, 0.0])
    for i, n in enumerate((300, 1, 60, 1)):
        step(cache, reference, n, i, sinks=sinks)


def test_cache_takes_window_masks():
    cache, reference = make(Recipe()), make_reference(Recipe())
    for i, n in enumerate((223, 1, 60, 64)):
        k, v, q = tokens(n, i)
        mask = cache.make_mask(n, window_size=150)
        snapshot, _ = cache.update_and_fetch(mx.array(k)[None], mx.array(v)[None])
        assert mask.shape[-1] == snapshot.shape[2]
        close(snapshot.attend(mx.array(q)[None], D**-0.5, mask)[0], answer(reference, k, v, q, window=150))


def test_cache_holds_several_sequences_in_step():
    """Batched evaluation with a single cache: rows of equal length."""
    cache = make(Recipe())
    references = [make_reference(Recipe()) for _ in range(3)]
    for i, n in enumerate((290, 1, 1, 130, 1)):
        rows = [tokens(n, 10 * i + row) for row in range(3)]
        k, v, q = (mx.array(np.stack([row[part] for row in rows])) for part in range(3))
        mask = cache.make_mask(n)
        got = cache.update_and_fetch(k, v)[0].attend(q, D**-0.5, mask)
        for row, reference in enumerate(references):
            attended = reference.append(rows[row][0], rows[row][1])
            close(got[row], attention(rows[row][2], *attended, D**-0.5))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_cache_keeps_the_model_type(dtype):
    cache = make(Recipe())
    for i, n in enumerate((250, 1, 1)):
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
    for i in range(140):
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
    for n in (200, 1):
        k, v, q = (mx.array(x)[None] for x in tokens(n, n))
        cache.make_mask(n)
        cache.update_and_fetch(k, v)
    snapshots = [c.keys_and_values()[0] for c in (cache, copy.deepcopy(cache))]
    assert mx.array_equal(*(s.attend(q, D**-0.5, None) for s in snapshots))


@pytest.mark.parametrize("preset", ["tq3", "tq33", "tq3-qjl"])
def test_cache_nbytes_are_the_formats_bytes(preset):
    recipe = PRESETS[preset].recipe
    cache = make(recipe)
    k, v = (mx.array(x)[None] for x in tokens(recipe.first + 10 * GROWTH + recipe.tail, 0)[:2])
    cache.update_and_fetch(k, v)
    exact = 4 * (D + DV) * H  # fp32 here
    coded = cache.n_coded // BLOCK * H * recipe.bytes_per_block(D, DV)
    assert cache.n_coded == 10 * GROWTH
    assert cache.used_nbytes == coded + exact * (recipe.first + recipe.tail)
    assert cache.nbytes == coded + exact * (recipe.first + recipe.tail + BLOCK)  # the tail has room for a block
    assert cache.fp16_nbytes == cache.offset * H * (D + DV) * 2


@pytest.mark.parametrize("preset", [name for name, policy in PRESETS.items() if not policy.study])
@pytest.mark.parametrize("as_prompt", [False, True])
def test_cache_of_a_short_context_is_no_larger_than_without_compression(preset, as_prompt):
    """By no more than a tenth, at every length."""
    cache = TurboQuantKVCache(PRESETS[preset].recipe)
    for n in range(1, 301):
        k, v = (mx.zeros((1, H, n if as_prompt else 1, D), mx.float16) for _ in range(2))
        if as_prompt:
            cache = TurboQuantKVCache(PRESETS[preset].recipe)
        cache.update_and_fetch(k, v)
        assert cache.offset == n
        assert cache.nbytes <= 1.1 * cache.fp16_nbytes, n


def test_cache_builds_what_attention_takes_once_per_block():
    """Between two blocks the packed objects and the first tokens are the same ones."""
    cache = make(Recipe())
    cache.update_and_fetch(*(mx.array(x)[None] for x in tokens(256, 0)[:2]))
    seen = []
    for i in range(2 * BLOCK):
        snapshot, _ = cache.update_and_fetch(*(mx.array(x)[None] for x in tokens(1, i)[:2]))
        seen.append((snapshot.packed_keys, snapshot.packed_values, snapshot.first))
    changes = sum(any(a is not b for a, b in zip(one, other, strict=True)) for one, other in itertools.pairwise(seen))
    assert changes == 1  # after 64 steps, and before the first


@pytest.mark.parametrize("n", [1, 10, 50, 100, 200, 300])
@pytest.mark.parametrize("as_prompt", [False, True])
def test_short_contexts_take_no_more_than_mlx_lms_caches(n, as_prompt):
    """One sequence and a batch, whose caches mlx-lm makes for 256 tokens at once."""
    for batch, kinds in ((1, (KVCache, TurboQuantKVCache)), (3, (BatchKVCache, BatchTurboQuantKVCache))):
        stock, cache = (kind() if batch == 1 else kind([0] * batch) for kind in kinds)
        for _ in range(1 if as_prompt else n):
            k, v = (mx.zeros((batch, H, n if as_prompt else 1, dim), mx.float16) for dim in (D, DV))
            stock.update_and_fetch(k, v)
            cache.update_and_fetch(k, v)
        exact = batch * H * n * (D + DV) * 2
        assert stock.keys.nbytes + stock.values.nbytes >= exact
        assert cache.nbytes <= 1.1 * exact


def operations(*arrays):
    """The MLX operations that a graph consists of, by name."""
    dot = io.StringIO()
    mx.export_to_dot(dot, *arrays)
    return collections.Counter(re.findall(r'label ="(\w+)", shape=rectangle', dot.getvalue()))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("n_stored", [100, 300])
def test_a_step_takes_as_few_operations_as_mlx_lms_cache(batch, n_stored):
    """Between two blocks: write keys and values, take the columns that are filled, attend."""
    stock, cache = (KVCache(), TurboQuantKVCache()) if batch == 1 else (BatchKVCache([0] * 3), BatchTurboQuantKVCache([0] * 3))
    for n in (n_stored, 1, 1):
        k, v, q = (mx.random.normal((batch, heads, n, D)) for heads in (H, H, HQ))
        mx.eval(k, v, q)
        keys_and_values = stock.update_and_fetch(k, v)
        snapshot, _ = cache.update_and_fetch(k, v)
        if n == 1:
            last = operations(*keys_and_values), operations(snapshot.attend(q, 1.0))
        mx.eval(stock.keys, stock.values, *cache._packed, *cache._tail, *(cache._first or ()))
    assert last[0] == {"SliceUpdate": 2, "Slice": 2}
    assert last[1] == {**last[0], "TurboQuantAttention": 1}


def test_append_token_writes_in_place_or_not_at_all():
    k, v = (mx.zeros((1, H, 4, dim)) for dim in (D, DV))
    token = [mx.ones((1, H, 1, dim)) for dim in (D, DV)]
    wrong = [
        (token[0].astype(mx.float16), token[1], 0),
        (token[0], token[1][..., :-1], 0),
        (mx.ones((1, H + 1, 1, D)), token[1], 0),
        (mx.ones((2, H, 1, D)), mx.ones((2, H, 1, DV)), 0),
        (mx.ones((1, H, 2, D)), mx.ones((1, H, 2, DV)), 0),
        (token[0][0], token[1], 0),
        (*token, 4),
        (*token, -1),
    ]
    columns = mx.zeros((1, 1, 1, 1), mx.int32)
    for *new, at in wrong:
        assert append_token(k, v, *new, at) is None
        assert append_tokens(k, v, *new, columns, at) is None
    assert not k.any() and not v.any()
    views = append_token(k, v, *token, 1)
    assert [x.shape[2] for x in views] == [2, 2]
    for x, buffer in zip(views, (k, v), strict=True):
        assert buffer.sum(axis=(0, 1, 3)).tolist() == [0, H * x.shape[3], 0, 0]
        assert mx.array_equal(x, buffer[:, :, :2])


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


# ---- refusals ------------------------------------------------------------------------------------


MISFITS = {
    "values longer": lambda: (random_tokens(5)[0], random_tokens(7)[1]),
    "values shorter": lambda: (random_tokens(60)[0], random_tokens(1)[1]),
    "fewer heads": lambda: random_tokens(1, heads=1),
    "fewer heads of values": lambda: (random_tokens(1)[0], random_tokens(1, heads=1)[1]),
    "batch": lambda: random_tokens(1, batch=2),
    "head dimension 1": lambda: random_tokens(1, dim=1),
    "value dimension": lambda: random_tokens(1, value_dim=D),
    "rank": lambda: [x[0] for x in random_tokens(1)],
    "integers": lambda: [x.astype(mx.int32) for x in random_tokens(1)],
    "another type": lambda: random_tokens(1, dtype=mx.float16),
    "another type of values": lambda: (random_tokens(1)[0], random_tokens(1, dtype=mx.bfloat16)[1]),
}


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("n_before", [10, 250])
def test_update_refuses_tokens_that_do_not_fit(misfit, batch, n_before):
    """Before anything is written: the cache goes on as if nothing had been asked."""
    cache = BatchTurboQuantKVCache([0]) if batch else TurboQuantKVCache()
    k, v = random_tokens(n_before)
    cache.update_and_fetch(k, v)
    before = [np.array(x) for x in cache.state if isinstance(x, mx.array)]
    with pytest.raises(ValueError, match=r"^\[update_and_fetch\] (keys|values): expected .*, got "):
        cache.update_and_fetch(*MISFITS[misfit]())
    after = [np.array(x) for x in cache.state if isinstance(x, mx.array)]
    assert len(after) == len(before)
    assert all(np.array_equal(a, b) for a, b in zip(after, before, strict=True))
    assert cache.size() == n_before


@pytest.mark.parametrize("misfit", ["values longer", "fewer heads of values", "rank", "integers"])
def test_update_refuses_first_tokens_that_do_not_fit_each_other(misfit):
    cache = TurboQuantKVCache()
    with pytest.raises(ValueError, match=r"^\[update_and_fetch\] (keys|values): expected .*, got "):
        cache.update_and_fetch(*MISFITS[misfit]())
    assert cache.empty()
    cache.update_and_fetch(*random_tokens(3))
    assert cache.offset == 3


def test_trim_of_a_negative_number_is_refused():
    for cache in (TurboQuantKVCache(), BatchTurboQuantKVCache([0])):
        cache.update_and_fetch(*random_tokens(100))
        with pytest.raises(ValueError, match=r"^\[trim\] n: expected at least 0, got -50"):
            cache.trim(-50)
        assert cache.size() == 100


def test_balance_has_to_fit():
    good = mx.ones((H, D))
    for wrong in (mx.ones((D,)), good.astype(mx.float16), [1.0]):
        with pytest.raises(ValueError, match=r"balance: expected float32 \[n_kv_heads, head_dim\], got "):
            TurboQuantKVCache(balance=wrong)
    with pytest.raises(ValueError, match="balance: expected None for a recipe without balance"):
        TurboQuantKVCache(Recipe(balance=False), balance=good)
    cache = TurboQuantKVCache(balance=mx.ones((H + 1, D)))
    with pytest.raises(ValueError, match=r"\[update_and_fetch\] keys: expected .* as the balance has, got"):
        cache.update_and_fetch(*random_tokens(3))
    assert cache.empty()


# ---- keys that are not finite --------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("preset", ["tq3", "tq4", "tq3-plain"])
def test_a_key_that_is_not_finite_spoils_no_other_token(value, preset):
    """It stays what it was; the others have the codes that they have without it."""
    recipe = dataclasses.replace(PRESETS[preset].recipe, tail=0, first=0)
    k, v, _ = tokens(3 * BLOCK, 0)
    spoiled = k.copy()
    spoiled[0, 70, 5] = value
    decoded = []
    for keys in (k, spoiled):
        cache = make(recipe)
        snapshot = [cache.update_and_fetch(mx.array(x)[None], mx.array(y)[None]) for x, y in ((keys, v), (k[:, :1], v[:, :1]))]
        decoded.append(np.array(tqext.dequantize(snapshot[1][0].packed_keys))[0])
    others = np.ones((H, 3 * BLOCK), bool)
    others[0, 70] = False
    assert not np.isfinite(decoded[1][0, 70]).all()
    assert np.isfinite(decoded[1][others]).all()
    apart = np.ones((H, 3 * BLOCK), bool)
    apart[0, BLOCK : 2 * BLOCK] = False  # its block has another mean
    assert np.array_equal(decoded[0][apart], decoded[1][apart])
    # The error of the block's other tokens is what it was, but for the mean of 63 instead of 64.
    same_block = others & ~apart
    error, expected = (np.square(x[same_block] - k[same_block]).mean() for x in (decoded[1], decoded[0]))
    assert error < 1.2 * expected


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [3000, 700, 100, 3])
def test_trim_gives_memory_back(left):
    cache = make(Recipe())
    cache.update_and_fetch(*random_tokens(8000, dtype=mx.float16))
    large = cache.nbytes
    cache.trim(8000 - left)
    fresh = make(Recipe())
    fresh.update_and_fetch(*random_tokens(left, dtype=mx.float16))
    assert cache.nbytes <= max(2 * fresh.nbytes, large // 8)
    cache.trim(left)
    assert cache.nbytes == 0


def test_trim_of_a_step_copies_nothing():
    """A rejected draft costs no copy of the buffers."""
    cache = make(Recipe())
    cache.update_and_fetch(*random_tokens(300))
    cache.update_and_fetch(*random_tokens(5))
    buffers = [*cache._packed, *cache._tail, *cache._first]
    cache.trim(4)
    assert all(a is b for a, b in zip(buffers, [*cache._packed, *cache._tail, *cache._first], strict=True))


def test_copies_share_the_balance():
    cache = make(Recipe())
    cache.update_and_fetch(*random_tokens(300))
    cache.update_and_fetch(*random_tokens(1))
    twin = copy.deepcopy(cache)
    assert twin.balance is cache.balance
    assert twin.update_and_fetch(*random_tokens(1))[0].packed_keys.balance is cache.balance


def test_cache_is_not_taken_for_mlx_lms_own_quantised_one():
    for name in ("bits", "group_size"):
        assert not hasattr(TurboQuantKVCache(), name)


def test_cache_growth_copies_nothing_per_step():
    """The packed buffers are the same memory from one step to the next."""
    cache = make(Recipe(tail=0, first=0))
    cache.update_and_fetch(*(mx.array(x)[None] for x in tokens(40 * GROWTH - 5 * BLOCK, 0)[:2]))
    mx.eval(cache.state)
    n_before, buffers = cache.n_coded, sum(x.nbytes for x in cache._packed)
    for i in range(4 * BLOCK):
        k, v, q = (mx.array(x)[None] for x in tokens(1, i))
        mx.synchronize()  # a GPU frees what a step used when it is done, which may be after the evaluation
        mx.reset_peak_memory()
        active = mx.get_active_memory()
        mx.eval(cache.update_and_fetch(k, v)[0].attend(q, D**-0.5))
        mx.synchronize()
        assert mx.get_peak_memory() - active < buffers / 4
    assert cache.n_coded > n_before + 2 * BLOCK
    assert sum(x.nbytes for x in cache._packed) == buffers


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_bytes_per_token_are_what_the_operators_pack(preset):
    recipe = get_policy(preset).recipe
    for key_dim, value_dim in ((64, 64), (128, 64), (80, 112)):
        cache = TurboQuantKVCache(recipe)
        cache.update_and_fetch(mx.ones((1, 3, 400, key_dim)), mx.ones((1, 3, 400, value_dim)))
        used = sum(x.nbytes for x in cache._coded_arrays())
        assert used == cache.n_coded // BLOCK * 3 * recipe.bytes_per_block(key_dim, value_dim)
        assert 0 <= recipe.bytes_per_token(key_dim, value_dim) - used / cache.n_coded / 3 < 1
        assert cache.n_coded > 0


def test_presets_are_those_of_the_table():
    """RECIPE: bytes of a coded token at head dimension 128, the block's mean included."""
    sizes = {name: p.recipe.bytes_per_token(128) for name, p in PRESETS.items() if not p.study}
    assert sizes == {"tq3": 102, "tq33": 104, "tq4": 136, "tq2": 72}
    plain = PRESETS["tq3-plain"].recipe
    assert (plain.means, plain.balance, plain.tail, plain.first, plain.bytes_per_token(128)) == (False, False, 0, 0, 98)


@pytest.mark.parametrize(
    "wrong",
    [
        {"key_bits": 5},
        {"value_bits": 3},
        {"value_bits": 5, "value_coding": "lloyd"},
        {"value_coding": "uniform"},
        {"rotation": "none"},
        {"means": 2},
        {"tail": -1},
        {"first": 2.5},
        {"first_last": -1},
        {"x": 1},
    ],
)
def test_policy_rejects_wrong_fields(wrong):
    with pytest.raises(ValueError, match=r"^\[policy\] \w+: expected .*, got "):
        get_policy("tq3", **wrong)
    with pytest.raises(ValueError, match="expected one of tq3"):
        get_policy("tq5")


def test_policy_of_layer():
    policy = get_policy("bonsai", layers={10: None, 0: Recipe(key_bits=4)}, tail=32)
    recipes = [policy.of_layer(i, 36) for i in range(36)]
    assert recipes[0].key_bits == 4
    assert recipes[1:4] == [None] * 3
    assert recipes[32:] == [None] * 4
    assert recipes[10] is None
    assert recipes[4] == Recipe(tail=32)


def test_tqext_names_are_there():
    for name in tqext.__all__:
        assert getattr(tqext, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tqext.nothing

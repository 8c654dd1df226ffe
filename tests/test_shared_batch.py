"""Sequences of a batch that are copies of one cache: it holds one copy of what they share, and each is as if alone."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import BatchKVCache, KVCache

from cache_support import DV, RECIPES, Batch, D, H, make, make_reference, step, tokens
from tqext import BatchTurboQuantKVCache, Recipe, TurboQuantKVCache
from tqext.kv.prefix import MIN_SHARED, _partition, distinct_roots, sharing

pytestmark = pytest.mark.usefixtures("device")
RECIPE = Recipe(first=8, tail=16)


class Kept:
    """A cache of one sequence beside its specification."""

    def __init__(self, recipe=RECIPE, n=700, seed=0):
        self.recipe, self.cache, self.reference = recipe, make(recipe), make_reference(recipe)
        step(self.cache, self.reference, n, seed)

    def copy(self, n_trimmed=0):
        out = copy.deepcopy(self)
        if n_trimmed:
            assert out.cache.trim(n_trimmed) == n_trimmed
            out.reference.trim(n_trimmed)
        return out


def merged(kept, seed=0):
    """A `Batch` that goes on from these caches."""
    out = Batch(kept[0].recipe, len(kept), seed=seed)
    out.cache = BatchTurboQuantKVCache.merge([one.cache for one in kept])
    out.rows = [copy.deepcopy(one.reference) for one in kept]
    stock = [KVCache() for _ in kept]
    for cache, row in zip(stock, out.rows, strict=True):
        cache.update_and_fetch(mx.zeros((1, H, row.n_tokens, D)), mx.zeros((1, H, row.n_tokens, DV)))
    out.stock = BatchKVCache.merge(stock)
    out.check()
    return out


def extracted(batch, i):
    out = object.__new__(Kept)
    out.recipe, out.cache, out.reference = batch.recipe, batch.cache.extract(i), copy.deepcopy(batch.rows[i])
    return out


def groups(batch):
    """The sequences of each shared prefix, and its tokens."""
    found = batch.cache._groups
    return {} if found is None else {tuple(rows.tolist()): prefix.n_tokens for prefix, rows in found.members}


@pytest.mark.parametrize(
    "recipe, mask",
    [
        ("default", "own"),
        ("default", "stock"),
        ("default", "additive"),
        ("tq33", "stock"),
        ("no-first", "own"),
        ("no-tail", "own"),
    ],
)
def test_shared_sequences_are_as_if_alone(recipe, mask):
    """Prompts of unlike lengths, steps past several blocks, a block within a few new tokens, and a stranger in the middle."""
    recipe = RECIPES[recipe]
    kept, stranger = Kept(recipe, 800), Kept(recipe, 90, seed=5)
    batch = merged([kept.copy(), stranger, kept.copy(), kept.copy(70)])
    n_shared = int(batch.cache.counts[3, :2].sum())
    assert groups(batch) == {(0, 2, 3): n_shared}
    for lengths in ((5, 300, 70, 1), (1, 1, 1, 1), (64, 2, 0, 40), (1, 1, 1, 1), (1, 1, 1, 1), (30, 64, 64, 130)):
        batch.step(lengths, mask=mask)
    for _ in range(3):
        batch.step((1,) * 4, mask=mask)
    assert groups(batch) == {(0, 2, 3): n_shared}


def test_shared_steps_past_two_blocks():
    kept = Kept()
    batch = merged([kept.copy(n) for n in (0, 3, 40)])
    for _ in range(140):
        batch.step((1, 1, 1))
    assert list(groups(batch)) == [(0, 1, 2)]


@pytest.mark.parametrize("seed", range(3))
def test_shared_random_histories(seed):
    """Sequences come and go, and go on from those that went; trims that reach into what is shared."""
    random = np.random.default_rng(seed)
    prompts = [Kept(seed=seed), Kept(n=900, seed=50 + seed)]
    kept = list(prompts)
    batch, most = merged([prompts[0].copy(), prompts[0].copy()], seed), 0
    for i in range(20):
        n = len(batch.rows)
        most = max(most, *(len(rows) for rows in groups(batch)), 0)
        action = random.random()
        if action < 0.45 or n == 0:
            lengths = [1] * n if action < 0.25 else random.choice([1, 2, 33, 64, 150], size=n).tolist()
            batch.step(tuple(lengths), mask=str(random.choice(["own", "stock", "additive"])))
        elif action < 0.6 and n > 1:
            batch.filter(sorted(random.choice(n, size=int(random.integers(1, n)), replace=False).tolist()))
        elif action < 0.7:
            one = extracted(batch, int(random.integers(n)))
            if random.random() < 0.7:
                one.cache.share()
            kept.append(one)
        elif action < 0.78:
            batch.trimmed(int(random.integers(1, min(row.n_tokens for row in batch.rows))))
        elif n < 6:
            chosen = kept[int(random.integers(len(kept)))]
            n_held = chosen.reference.n_tokens
            more = [chosen.copy(int(random.choice([0, 1, 90, n_held // 2, n_held - 70]))) for _ in range(2)]
            batch.extend(merged(more[: int(random.integers(1, 3))], 1000 * i))
    assert most >= 2
    for i, row in enumerate(batch.rows):  # and each goes on alone, also from its state
        one = extracted(batch, i)
        loaded = TurboQuantKVCache.from_state(copy.deepcopy(one.cache).state)
        for cache in (one.cache, loaded):
            own = copy.deepcopy(row)
            for n in (1, 70, 1):
                step(cache, own, n, seed=31)
    for one in kept:
        step(one.cache, one.reference, 5, seed=77)


def test_shared_cache_answers_like_a_plain_one():
    """Whatever is asked of a cache whose tokens are in a prefix."""
    plain, kept = Kept(), Kept()
    batch = merged([kept.copy(), kept.copy()])
    batch.step((200, 90))
    own = extracted(batch, 0)
    shared = kept.copy()
    shared.cache.share()
    assert shared.cache._base is not None and own.cache._base is not None
    assert copy.deepcopy(shared.cache)._base is shared.cache._base

    def answers(cache, reference):
        c = copy.deepcopy(cache)
        yield repr(c), c.used_nbytes, c.fp16_nbytes, c.offset, c.size(), c.n_exact, c.is_trimmable()
        for begin, end in ((0, 128), (0, c.n_coded), (c.n_coded - 128, c.n_coded), (64, 64)):
            yield copy.deepcopy(cache).coded_parts(begin, end)
        yield [x for part in copy.deepcopy(cache).exact_parts() for x in part]
        yield copy.deepcopy(cache).state
        yield copy.deepcopy(cache).keys_and_values()[0].packed_keys.codes
        for n in (1, 100, 500, reference.n_tokens - 5, reference.n_tokens):
            c = copy.deepcopy(cache)
            yield c.trim(n), c.size(), c.n_coded, c.state

    def same(a, b):
        if isinstance(a, mx.array):
            return bool(mx.array_equal(a, b))
        if isinstance(a, tuple | list):
            return len(a) == len(b) and all(map(same, a, b))
        return a == b

    for one, other in ((shared, plain), (own, extracted(merged([own.copy()]), 0))):
        expected = copy.deepcopy(other.cache)
        expected._hold_all()
        assert expected._base is None
        for got, want in zip(answers(one.cache, one.reference), answers(expected, one.reference), strict=True):
            assert same(got, want)
    step(shared.cache, shared.reference, 100, 3)
    step(own.cache, own.reference, 100, 3)


def test_shared_bytes_are_held_once():
    n, recipe = 20_000, Recipe(first=8, tail=64)
    cache = TurboQuantKVCache(recipe)
    keys, values = (mx.array(x)[None] for x in tokens(n, 0)[:2])
    cache.update_and_fetch(keys, values)
    mx.eval(cache.state)
    cache.share()
    one = cache.nbytes
    before = mx.get_active_memory()
    batch = BatchTurboQuantKVCache.merge([copy.deepcopy(cache) for _ in range(8)])
    new = [mx.array(np.stack([tokens(100, i)[part] for i in range(8)])) for part in range(2)]
    batch.update_and_fetch(*new)
    mx.eval(batch.state[:-1])
    del new
    exact = 8 * (64 + 200) * H * (D + DV) * 4  # of each sequence, at most
    assert mx.get_active_memory() - before < exact
    assert one <= batch.nbytes < one + exact
    assert batch.used_nbytes < cache.used_nbytes + exact and batch.fp16_nbytes > 7.9 * cache.fp16_nbytes
    assert batch.n_coded == batch.counts[:, 1].sum() > 8 * 19_800
    # Nor do those that are taken out hold another.
    out = [batch.extract(i) for i in range(8)]
    mx.eval([c._packed for c in out], [c._tail for c in out])
    assert mx.get_active_memory() - before < 3 * exact
    assert distinct_roots([c._base for c in [cache, *out]]) == {cache._base.root.number: cache._base.root.nbytes}
    # Nor two that go on from a small part of the cache, which is copied once.
    few = [copy.deepcopy(cache) for _ in range(2)]
    for each in few:
        each.trim(each.size() - 2000)
    assert few[0]._base is few[1]._base and few[0]._base.root.nbytes < cache.nbytes / 9
    # A sequence that is left alone goes on; a cache that is used again holds its own.
    del batch, out
    cache.update_and_fetch(*(x[:, :, :1] for x in (keys, values)))
    assert cache._base is None and cache.nbytes <= one


def test_shared_prefix_is_the_one_that_spares_most():
    """Conversations among others that have the system prompt in common, and prompts that are too short to share."""
    system = Kept(n=800)
    n_system = system.cache.n_first + system.cache.n_coded
    long, longer = system.copy(), system.copy()
    step(long.cache, long.reference, 600, 9)
    step(longer.cache, longer.reference, 900, 9)
    few = merged([longer.copy(), system.copy(), longer.copy()])
    few.extend(merged([system.copy(), system.copy()]))
    assert groups(few) == {(0, 2): longer.cache.n_first + longer.cache.n_coded, (1, 3, 4): n_system}
    few.step((1, 70, 70, 1, 200))
    few = merged([long.copy(), long.copy()])
    n_long = long.cache.n_first + long.cache.n_coded
    assert groups(few) == {(0, 1): n_long}
    few.extend(merged([system.copy(), system.copy()]))
    assert groups(few) == {(0, 1, 2, 3): n_system}
    few.step((1, 70, 1, 200))
    few.filter([0, 3, 1])
    few.extend(merged([long.copy(), long.copy()]))
    assert groups(few) == {(0, 2, 3, 4): n_long, (1,): n_system}
    few.step((1, 70, 1, 200, 64))
    short = Kept(n=MIN_SHARED)
    assert groups(merged([short.copy(), short.copy()])) == {}
    # The same tokens, but encoded twice: nothing says that they are the same.
    assert groups(merged([Kept(), Kept()])) == {}


def test_sharing_partitions():
    ids = [[], range(20), [*range(12), 50, 51], [*range(12), 60], range(100, 140), range(100, 139), range(7)]
    found = sharing([np.array(x, np.int64) for x in ids])
    assert sorted((sorted(rows), n) for rows, n in found) == [([1, 2, 3], 12 * 64), ([4, 5], 39 * 64)]
    assert _partition((8, 100, 8), 8) == [(1, 3, 100)]
    assert _partition((90, 100, 90), 8) == [(0, 4, 90)]
    assert _partition((20, 7, 30), 8) == [(0, 2, 20), (2, 4, 30)]
    assert _partition((7, 7), 8) == []

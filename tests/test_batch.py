"""The ragged batch: every sequence holds and answers what it would alone, whatever happens to the batch."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import BatchKVCache, KVCache

from cache_support import (
    DV,
    HQ,
    RECIPES,
    Batch,
    D,
    H,
    close,
    make,
    make_batch,
    make_reference,
    random_tokens,
    tokens,
)
from sequence import attention
from tqext import BatchTurboQuantKVCache, Recipe, TurboQuantKVCache

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.covering
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("mask", ["own", "stock", "additive"])
def test_batch_rows_are_as_if_alone(recipe, mask):
    batch = Batch(recipe, 3)
    batch.step((300, 37, 450), mask=mask)
    for _ in range(70):
        batch.step((1, 1, 1), mask=mask)
    batch.step((20, 1, 60), mask=mask)
    batch.step((64, 300, 33), mask=mask)
    for _ in range(3):
        batch.step((1, 1, 1), mask=mask)


def test_batch_decode_over_every_phase_of_the_schedule():
    """Rows whose blocks fill at different steps, for two whole blocks."""
    batch = Batch(Recipe(tail=8, first=16), 4)
    batch.step((70, 181, 5, 2))
    for _ in range(150):
        batch.step((1,) * 4)
    assert min(row.n_coded for row in batch.rows) > 0
    assert len({row.n_coded for row in batch.rows}) > 1


@pytest.mark.covering
@pytest.mark.parametrize("mask", ["own", "stock", "additive"])
@pytest.mark.parametrize("window", [None, 30])
def test_batch_follow_ups_of_a_few_tokens_are_as_if_alone(mask, window):
    """A block of some rows is encoded within the new tokens, whatever the others get."""
    batch = Batch(Recipe(tail=16, first=8), 4)
    batch.step((100, 37, 250, 61), mask=mask)
    for lengths in ((5, 2, 8, 7), (64, 64, 64, 64), (30, 90, 1, 60), (7, 0, 58, 20), (8, 55, 5, 33), (6, 64, 0, 140)):
        batch.step(lengths, mask=mask, window=window)
        batch.step((1, 1, 1, 1), mask=mask, window=window)


@pytest.mark.covering
@pytest.mark.parametrize("mask", ["own", "stock", "additive"])
@pytest.mark.parametrize("window", [None, 170])
def test_batch_of_bounded_sequences(mask, window):
    """Each drops its own blocks; rows come, go and are taken apart."""
    recipe, max_size = Recipe(tail=20, first=4), 152
    batch = Batch(recipe, 3, max_size=max_size)
    batch.step((300, 37, 650), mask=mask, window=window)
    for lengths in ((1, 1, 1), (64, 60, 90), (33, 64, 2), (1, 1, 1), (400, 3, 64), (64, 64, 64)):
        batch.step(lengths, mask=mask, window=window)
    other = Batch(recipe, 2, seed=777, max_size=max_size)
    other.step((200, 9))
    batch.extend(other)
    batch.filter([4, 0, 3, 2])
    for _ in range(70):
        batch.step((1,) * 4, mask=mask, window=window)
    assert min(row.n_dropped for row in batch.rows[1:]) > 0
    batch.trimmed(70)
    batch.step((5, 64, 1, 30), mask=mask, window=window)
    caches = [batch.cache.extract(i) for i in (2, 0, 3, 1)]
    assert [cache.n_dropped for cache in caches] == [batch.rows[i].n_dropped for i in (2, 0, 3, 1)]
    batch.filter([2, 0, 3, 1])
    batch.cache = BatchTurboQuantKVCache.merge(caches)
    batch.step((1, 64, 100, 1), mask=mask, window=window)
    with pytest.raises(ValueError, match=r"\[trim\] n: expected at most \d+, as older tokens were dropped"):
        batch.cache.trim(250)


@pytest.mark.parametrize("short", [0, 1, 59, 63, 64])
def test_batch_with_sequences_shorter_than_the_first_tokens(short):
    batch = Batch(Recipe(), 2)
    batch.step((short, 240))
    for _ in range(6):
        batch.step((1, 1))
    assert batch.rows[0].n_first == min(64, short + 6)
    batch.step((200, 1))
    batch.step((1, 1))
    assert batch.rows[0].n_coded == (short + 206 - 64 - 64) // 64 * 64


def test_batch_window_masks():
    batch = Batch(Recipe(), 3)
    batch.step((300, 37, 450), window=130, mask="own")
    batch.step((1, 1, 1), window=130, mask="stock")
    batch.step((5, 1, 60), window=130, mask="stock")


@pytest.mark.parametrize("seed", range(8))
def test_batch_random_histories(seed):
    """Random prompts, steps, departures and arrivals."""
    random = np.random.default_rng(seed)
    recipe = list(RECIPES.values())[seed % len(RECIPES)]
    batch = Batch(recipe, 2, seed=seed)
    for i in range(25):
        n = len(batch.rows)
        action = random.random()
        if action < 0.55 or n == 0:
            for _ in range(int(random.integers(1, 8))):
                batch.step((1,) * n, mask=str(random.choice(["own", "stock"])))
        elif action < 0.75:
            batch.step(
                tuple(int(x) for x in random.choice([1, 2, 33, 64, 190], size=n)), mask=str(random.choice(["own", "stock"]))
            )
        elif action < 0.87 and n > 1:
            keep = sorted(random.choice(n, size=int(random.integers(1, n)), replace=False).tolist())
            batch.filter(keep)
        elif n < 6:
            other = Batch(recipe, int(random.integers(1, 3)), seed=10_000 + i)
            if random.random() < 0.8:
                other.step(tuple(int(x) for x in random.choice([1, 3, 90, 320], size=len(other.rows))))
            batch.extend(other)


def test_batch_left_padding():
    """The older way of mlx-lm: prompts padded on the left."""
    lengths, n = (300, 137, 3), 300
    recipe = Recipe(first=20)
    cache = make_batch([n - length for length in lengths], recipe)
    stock = BatchKVCache([n - length for length in lengths])
    rows = [make_reference(recipe) for _ in lengths]
    for chunk in (180, 120, 1, 1):
        new = [tokens(chunk, 7 * i + cache.size()) for i in range(len(lengths))]
        k, v, q = (mx.array(np.stack([x[part] for x in new])) for part in range(3))
        mask = cache.make_mask(chunk)
        assert mx.array_equal(mask, stock.make_mask(chunk))
        assert mx.array_equal(cache.offset, stock.offset)
        padding = np.clip(-np.array(cache.offset), 0, chunk)
        got = cache.update_and_fetch(k, v)[0].attend(q, D**-0.5, mask)
        stock.update_and_fetch(k, v)
        assert mx.isfinite(got).all()
        for i, row in enumerate(rows):
            p = int(padding[i])
            if p < chunk:
                attended = row.append(new[i][0][:, p:], new[i][1][:, p:])
                close(got[i, :, p:], attention(new[i][2][:, p:], *attended, D**-0.5))
    assert cache.counts.tolist() == [row.counts for row in rows]
    assert max(row.n_coded for row in rows) > 0


def test_batch_prepare_left_padding_needs_an_empty_cache():
    cache = BatchTurboQuantKVCache([0, 0])
    cache.prepare(left_padding=[3, 0])
    assert cache.offset.tolist() == [-3, 0]
    cache.update_and_fetch(mx.ones((2, H, 5, D)), mx.ones((2, H, 5, DV)))
    with pytest.raises(ValueError, match=r"\[prepare\] left_padding: expected an empty cache"):
        cache.prepare(left_padding=[1, 1])
    with pytest.raises(ValueError, match=r"\[prepare\] lengths"):
        cache.prepare(right_padding=[1, 0])


def single(recipe, n, seed):
    cache, row = make(recipe), make_reference(recipe)
    if n:
        k, v, _ = tokens(n, seed)
        cache.update_and_fetch(mx.array(k)[None], mx.array(v)[None])
        row.append(k, v)
    return cache, row


@pytest.mark.parametrize("lengths", [(300, 30, 0, 197), (0, 0), (5,), (264, 264)])
def test_batch_merge_and_extract_are_bit_exact(lengths):
    """Out of the batch comes the state that went in."""
    recipe = Recipe()
    singles = [single(recipe, n, i) for i, n in enumerate(lengths)]
    before = [[np.array(x) for x in cache.state] for cache, _ in singles]
    merged = TurboQuantKVCache.merge([cache for cache, _ in singles])
    assert type(merged) is BatchTurboQuantKVCache
    assert merged.offset.tolist() == list(lengths)
    for i in range(len(lengths)):
        out = merged.extract(i)
        if not lengths[i]:
            assert out.empty()
            continue
        for a, b in zip(out.state, before[i], strict=True):
            assert np.array_equal(np.array(a), b)


def test_batch_extracted_sequences_go_on_as_if_they_had_been_alone():
    recipe = Recipe()
    singles = [single(recipe, n, i) for i, n in enumerate((400, 30, 197))]
    batch = Batch(recipe, 3)
    batch.rows = [row for _, row in singles]
    batch.cache = BatchTurboQuantKVCache.merge([cache for cache, _ in singles])
    stock = []
    for i, n in enumerate((400, 30, 197)):
        member = KVCache()
        member.update_and_fetch(*(mx.array(x)[None] for x in tokens(n, i)[:2]))
        stock.append(member)
    batch.stock = BatchKVCache.merge(stock)
    for _ in range(50):
        batch.step((1, 1, 1))
    for i, row in enumerate(batch.rows):
        out = batch.cache.extract(i)
        assert [out.n_first, out.n_coded, out.n_tail] == row.counts
        for j in range(40):
            k, v, q = tokens(1, 5000 + j)
            attended = row.append(k, v)
            got = out.update_and_fetch(mx.array(k)[None], mx.array(v)[None])[0].attend(mx.array(q)[None], D**-0.5)
            close(got[0], attention(q, *attended, D**-0.5))


@pytest.mark.parametrize("trims", [(1, 5, 70), (250, 40), (290, 5), (64, 64, 64)])
def test_batch_trim(trims):
    """Into the tail, blocks and first tokens of every sequence, some of them at once."""
    batch = Batch(Recipe(first=30), 3)
    batch.step((450, 390, 300))
    for n in trims:
        assert batch.cache.trim(n) == n
        batch.stock.trim(n)
        for row in batch.rows:
            row.trim(n)
        batch.check()
        batch.step((1, 1, 1))
        batch.step((3, 60, 90))
    large = batch.cache.nbytes
    batch.cache.trim(min(row.n_tokens for row in batch.rows) - 1)
    assert batch.cache.nbytes < large


def test_batch_trim_of_padding_that_is_to_come():
    """Columns of padding come again: what is fed after the trim is what was fed before it."""
    cache, stock = BatchTurboQuantKVCache([0, 30]), BatchKVCache([0, 30])
    row = make_reference(Recipe(balance=False))
    for n, cut in ((20, 10), (15, 3), (200, 100), (200, 0)):
        k, v = random_tokens(n, batch=2)
        begin = max(0, -int(cache.offset[1].item()))
        out = cache.update_and_fetch(k, v)[0]
        stock.update_and_fetch(k, v)
        row.append(*(np.array(x)[1, :, begin:] for x in (k, v)))
        assert out.shape[2] == stock.size()
        for c in (cache, stock):
            assert c.trim(cut) == cut
        row.trim(cut)
        assert mx.array_equal(cache.offset, stock.offset)
        assert cache.counts.sum(axis=1).tolist() == [max(n, 0) for n in cache.offset.tolist()]
        assert cache.counts[1].tolist() == row.counts


def test_batch_trim_within_a_prompt_padded_on_the_right_is_refused():
    cache = BatchTurboQuantKVCache([0, 0])
    cache.prepare(lengths=[20, 5], right_padding=[0, 15])
    cache.update_and_fetch(*random_tokens(20, batch=2))
    with pytest.raises(ValueError, match=r"\[trim\] cache: expected a complete prompt"):
        cache.trim(3)
    cache.finalize()
    assert cache.trim(3) == 3
    assert cache.offset.tolist() == [17, 2]


@pytest.mark.parametrize("rows", [[True, False], [2], [-1], [0.5], [[0]], mx.array([True, False])])
def test_batch_filter_refuses_what_is_no_index(rows):
    cache = BatchTurboQuantKVCache([0, 3])
    cache.update_and_fetch(*random_tokens(100, batch=2))
    with pytest.raises(ValueError, match=r"\[filter\] batch_indices: expected indices of 2 sequences"):
        cache.filter(rows)
    assert cache.counts.sum(axis=1).tolist() == [100, 97]


@pytest.mark.parametrize("idx", [-1, 2])
def test_batch_extract_refuses_what_is_no_index(idx):
    cache = BatchTurboQuantKVCache([0, 3])
    cache.update_and_fetch(*random_tokens(100, batch=2))
    with pytest.raises(ValueError, match=r"\[extract\] idx: expected 0 to 1, got"):
        cache.extract(idx)


def test_batch_shared_snapshot_ends_with_the_tokens_it_shows():
    """What other layers attend to is never that of before a trim, a filter or an extension."""

    def shared():
        cache = BatchTurboQuantKVCache([0, 0], shared=True)
        cache.update_and_fetch(*random_tokens(10, batch=2))
        return cache

    cache = shared()
    cache.trim(3)
    assert cache.keys_and_values()[0].tail.n_tokens == 7
    cache = shared()
    cache.filter([1])
    assert cache.keys_and_values()[0].shape[0] == 1
    cache = shared()
    cache.extend(shared())
    assert cache.keys_and_values()[0].shape[0] == 4


def test_batch_of_another_recipe_is_refused():
    with pytest.raises(ValueError, match=r"\[extend\] other: expected the recipe"):
        BatchTurboQuantKVCache([0], Recipe()).extend(BatchTurboQuantKVCache([0], Recipe(key_bits=4)))
    with pytest.raises(ValueError, match=r"\[merge\] caches: expected the recipe"):
        BatchTurboQuantKVCache.merge([TurboQuantKVCache(), TurboQuantKVCache(Recipe(key_bits=4))])
    balances = [mx.ones((H, D)), mx.ones((H, D)), mx.full((H, D), 2.0), None]
    caches = [TurboQuantKVCache(balance=balance) for balance in balances]
    assert BatchTurboQuantKVCache.merge(caches[:2]).balance is balances[0]
    for wrong in caches[2:]:
        with pytest.raises(ValueError, match=r"\[merge\] caches: expected the balance of the first cache, got another"):
            BatchTurboQuantKVCache.merge([caches[0], wrong])
    for other in (random_tokens(5, heads=1), random_tokens(5, dim=32), random_tokens(5, dtype=mx.float16)):
        caches = [TurboQuantKVCache() for _ in range(2)]
        caches[0].update_and_fetch(*random_tokens(5))
        caches[1].update_and_fetch(*other)
        with pytest.raises(ValueError, match=r"\[merge\] caches: expected KV heads, head dimension and type"):
            BatchTurboQuantKVCache.merge(caches)
    with pytest.raises(ValueError, match="expected 2 sequences, got 3"):
        BatchTurboQuantKVCache([0, 0]).update_and_fetch(mx.ones((3, H, 1, D)), mx.ones((3, H, 1, DV)))


def test_batch_nbytes_shrink_with_the_sequences():
    batch = Batch(Recipe(), 2)
    batch.step((2000, 20))
    large = batch.cache.nbytes
    batch.filter([1])
    assert batch.cache.nbytes < large / 4


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_batch_keeps_the_model_type(dtype):
    cache = make_batch([0, 0], Recipe())
    for n in (250, 1, 1):
        k, v, q = (mx.array(x)[None].astype(dtype) for x in tokens(n, n))
        k, v, q = (mx.concatenate([x, x]) for x in (k, v, q))
        mask = cache.make_mask(n)
        assert cache.update_and_fetch(k, v)[0].attend(q, D**-0.5, mask).dtype == dtype
    assert q.shape == (2, HQ, 1, D)

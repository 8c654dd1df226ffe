"""The ragged batch: every sequence holds and answers what it would alone, whatever happens to the batch."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import BatchKVCache, KVCache

from sequence import Sequence, attention
from test_cache import DV, HQ, RECIPES, D, H, answer, close, tokens
from tqext import BatchTurboQuantKVCache, Recipe, TurboQuantKVCache

pytestmark = pytest.mark.usefixtures("device")


class Batch:
    """A compressed batch, mlx-lm's own beside it, and a `Sequence` for each row."""

    def __init__(self, recipe, n_rows, seed=0):
        self.recipe = recipe
        self.cache = BatchTurboQuantKVCache([0] * n_rows, recipe)
        self.stock = BatchKVCache([0] * n_rows)
        self.rows = [Sequence(recipe, H, D, DV) for _ in range(n_rows)]
        self.seed = seed

    def step(self, lengths, *, mask="own", window=None):
        """Append `lengths` tokens to the rows, padded on the right, and compare the attention of each."""
        self.prepare(lengths)
        self.feed(max(lengths), [0] * len(lengths), lengths, mask=mask, window=window)
        self.finalize()

    def prepare(self, lengths):
        """Announce a prompt of so many tokens for each row, padded on the right."""
        padding = [max(lengths) - length for length in lengths]
        if any(padding):
            for cache in (self.cache, self.stock):
                cache.prepare(lengths=list(lengths), right_padding=padding)

    def finalize(self):
        for cache in (self.cache, self.stock):
            cache.finalize()
        self.check()

    def feed(self, n, skip, lengths, *, mask="own", window=None):
        """One call of the model with `n` columns: `skip` of padding, then `lengths` tokens, then padding, for each row."""
        new = [tokens(n, self.seed + 17 * i) for i in range(len(lengths))]
        self.seed += 1000
        k, v, q = (mx.array(np.stack([x[part] for x in new])) for part in range(3))
        masks = [c.make_mask(n, window_size=window) for c in (self.cache, self.stock)]
        assert mx.array_equal(*masks)
        assert mx.array_equal(self.cache.offset, self.stock.offset)
        if mask == "own":
            chosen = masks[0]
        elif mask == "stock":
            chosen = masks[1]
        else:
            chosen = mx.where(masks[1], 0.0, -float("inf"))
        snapshot, _ = self.cache.update_and_fetch(k, v)
        self.stock.update_and_fetch(k, v)
        assert snapshot.shape[2] == chosen.shape[-1]
        got = snapshot.attend(q, D**-0.5, chosen)
        assert mx.isfinite(got).all()
        for i, (begin, length) in enumerate(zip(skip, lengths, strict=True)):
            if length:
                k, v, q = (x[:, begin : begin + length] for x in new[i])
                expected = answer(self.rows[i], k, v, q, window=window)
                close(got[i, :, begin : begin + length], expected, dense=self.recipe.rotation == "orthogonal")

    def check(self):
        counts = [[r.n_first, r.n_coded, r.n_tail] for r in self.rows]
        assert self.cache._counts.tolist() == counts
        assert mx.array_equal(self.cache.offset, self.stock.offset)
        assert mx.array_equal(self.cache.left_padding, self.stock.left_padding)
        assert self.cache.size() == self.stock.size()
        assert self.cache.offset.tolist() == [r.n_tokens for r in self.rows]

    def filter(self, keep, *, check=True):
        self.cache.filter(keep)
        self.stock.filter(mx.array(keep))
        self.rows = [self.rows[i] for i in keep]
        if check:
            self.check()

    def extend(self, other):
        self.cache.extend(other.cache)
        self.stock.extend(other.stock)
        self.rows = self.rows + other.rows
        self.check()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("mask", ["own", "stock", "additive"])
def test_batch_rows_are_as_if_alone(recipe, mask):
    batch = Batch(recipe, 3)
    batch.step((100, 37, 250), mask=mask)
    for _ in range(40):
        batch.step((1, 1, 1), mask=mask)
    batch.step((20, 1, 9), mask=mask)
    for _ in range(3):
        batch.step((1, 1, 1), mask=mask)


def test_batch_decode_over_every_phase_of_the_schedule():
    """Rows whose blocks fill at different steps, for two whole blocks."""
    batch = Batch(Recipe(), 4)
    batch.step((70, 81, 5, 2))
    for _ in range(130):
        batch.step((1,) * 4)
    assert len({row.n_coded for row in batch.rows}) > 1


@pytest.mark.parametrize("mask", ["own", "stock", "additive"])
@pytest.mark.parametrize("window", [None, 30])
def test_batch_follow_ups_of_a_few_tokens_are_as_if_alone(mask, window):
    """A block of some rows is encoded within the new tokens, whatever the others get."""
    batch = Batch(Recipe(), 4)
    batch.step((100, 37, 250, 61), mask=mask)
    for lengths in ((5, 2, 8, 7), (8, 8, 8, 8), (3, 20, 1, 6), (7, 0, 8, 2), (8, 5, 5, 8), (6, 8, 0, 40)):
        batch.step(lengths, mask=mask, window=window)
        batch.step((1, 1, 1, 1), mask=mask, window=window)


@pytest.mark.parametrize("short", [0, 1, 2, 3])
def test_batch_with_sequences_shorter_than_the_first_tokens(short):
    batch = Batch(Recipe(), 2)
    batch.step((short, 40))
    for _ in range(6):
        batch.step((1, 1))
    assert batch.rows[0].n_first == 4


def test_batch_window_masks():
    batch = Batch(Recipe(), 3)
    batch.step((100, 37, 150), window=30, mask="own")
    batch.step((1, 1, 1), window=30, mask="stock")
    batch.step((5, 1, 12), window=30, mask="stock")


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
                tuple(int(x) for x in random.choice([1, 2, 6, 33, 90], size=n)), mask=str(random.choice(["own", "stock"]))
            )
        elif action < 0.87 and n > 1:
            keep = sorted(random.choice(n, size=int(random.integers(1, n)), replace=False).tolist())
            batch.filter(keep)
        elif n < 6:
            other = Batch(recipe, int(random.integers(1, 3)), seed=10_000 + i)
            if random.random() < 0.8:
                other.step(tuple(int(x) for x in random.choice([1, 3, 50, 120], size=len(other.rows))))
            batch.extend(other)


def test_batch_left_padding():
    """The older way of mlx-lm: prompts padded on the left."""
    lengths, n = (100, 37, 3), 100
    cache = BatchTurboQuantKVCache([n - length for length in lengths])
    stock = BatchKVCache([n - length for length in lengths])
    rows = [Sequence(Recipe(), H, D, DV) for _ in lengths]
    for chunk in (60, 40, 1, 1):
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
    assert cache._counts.tolist() == [[r.n_first, r.n_coded, r.n_tail] for r in rows]


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
    cache, row = TurboQuantKVCache(recipe), Sequence(recipe, H, D, DV)
    if n:
        k, v, _ = tokens(n, seed)
        cache.update_and_fetch(mx.array(k)[None], mx.array(v)[None])
        row.append(k, v)
    return cache, row


@pytest.mark.parametrize("lengths", [(200, 30, 0, 97), (0, 0), (5,), (64, 64)])
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
    singles = [single(recipe, n, i) for i, n in enumerate((200, 30, 97))]
    batch = Batch(recipe, 3)
    batch.rows = [row for _, row in singles]
    batch.cache = BatchTurboQuantKVCache.merge([cache for cache, _ in singles])
    stock = []
    for i, n in enumerate((200, 30, 97)):
        member = KVCache()
        member.update_and_fetch(*(mx.array(x)[None] for x in tokens(n, i)[:2]))
        stock.append(member)
    batch.stock = BatchKVCache.merge(stock)
    for _ in range(50):
        batch.step((1, 1, 1))
    for i, row in enumerate(batch.rows):
        out = batch.cache.extract(i)
        assert (out.n_first, out.n_coded, out.n_tail) == (row.n_first, row.n_coded, row.n_tail)
        for j in range(40):
            k, v, q = tokens(1, 5000 + j)
            attended = row.append(k, v)
            got = out.update_and_fetch(mx.array(k)[None], mx.array(v)[None])[0].attend(mx.array(q)[None], D**-0.5)
            close(got[0], attention(q, *attended, D**-0.5))


def test_batch_trim():
    batch = Batch(Recipe(), 3)
    batch.step((150, 90, 20))
    for n in (1, 5, 70):
        assert batch.cache.trim(n) == n
        batch.stock.trim(n)
        for row in batch.rows:
            row.trim(n)
        assert batch.cache._counts.tolist() == [[r.n_first, r.n_coded, r.n_tail] for r in batch.rows]
        if n < 70:
            batch.step((1, 1, 1))


def test_batch_of_another_recipe_is_refused():
    with pytest.raises(ValueError, match=r"\[extend\] other: expected the recipe"):
        BatchTurboQuantKVCache([0], Recipe()).extend(BatchTurboQuantKVCache([0], Recipe(key_bits=4)))
    with pytest.raises(ValueError, match=r"\[merge\] caches: expected the recipe"):
        BatchTurboQuantKVCache.merge([TurboQuantKVCache(), TurboQuantKVCache(Recipe(key_bits=4))])
    with pytest.raises(ValueError, match="expected 2 sequences, got 3"):
        BatchTurboQuantKVCache([0, 0]).update_and_fetch(mx.ones((3, H, 1, D)), mx.ones((3, H, 1, DV)))


def test_batch_nbytes_shrink_with_the_sequences():
    batch = Batch(Recipe(), 2)
    batch.step((3000, 20))
    large = batch.cache.nbytes
    batch.filter([1])
    assert batch.cache.nbytes < large / 4


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_batch_keeps_the_model_type(dtype):
    cache = BatchTurboQuantKVCache([0, 0])
    for n in (100, 1, 1):
        k, v, q = (mx.array(x)[None].astype(dtype) for x in tokens(n, n))
        k, v, q = (mx.concatenate([x, x]) for x in (k, v, q))
        mask = cache.make_mask(n)
        assert cache.update_and_fetch(k, v)[0].attend(q, D**-0.5, mask).dtype == dtype
    assert q.shape == (2, HQ, 1, D)

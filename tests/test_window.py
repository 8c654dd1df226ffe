"""The cache of a layer with a sliding window against attention over exactly the window's tokens."""

import copy

import mlx.core as mx
import numpy as np
import pytest

from cache_support import (
    DV,
    RECIPES,
    Batch,
    D,
    H,
    answer,
    balance_of,
    check_drafts_leave_no_trace,
    close,
    random_tokens,
    tokens,
)
from sequence import WindowSequence
from tqext import Recipe
from tqext.kv import BatchTurboQuantWindowKVCache, TurboQuantKVCache, TurboQuantWindowKVCache, state, window_snapshot

pytestmark = pytest.mark.usefixtures("device")


def make(recipe, window):
    return TurboQuantWindowKVCache(window, recipe, balance=balance_of(recipe))


def make_reference(recipe, window):
    return WindowSequence(recipe, H, D, DV, balance_of(recipe), window)


def step(cache, reference, n, seed, **kwargs):
    """Append n tokens to both, and compare attention and counts."""
    k, v, q = tokens(n, seed)
    mask = cache.make_mask(n, window_size=reference.window)
    snapshot, _ = cache.update_and_fetch(mx.array(k)[None], mx.array(v)[None])
    got = snapshot.attend(mx.array(q)[None], D**-0.5, mask, **kwargs)
    sinks = kwargs.get("sinks")
    close(got[0], answer(reference, k, v, q, None if sinks is None else np.array(sinks), reference.window))
    assert [cache.n_first, cache.n_coded, cache.n_tail, cache.n_dropped] == [*reference.counts, reference.n_dropped]
    assert cache.offset == reference.n_tokens


@pytest.mark.covering
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize(
    "lengths",
    [(1,) * 330, (700, *(1,) * 70), (3, 200, 64, 64, 1, 40, 60, 2, 600, 1, 64, 64)],
    ids=["decode", "prompt", "mixed"],
)
def test_tokens_see_the_window_and_nothing_else(recipe, lengths):
    window = 170
    cache, reference = make(recipe, window), make_reference(recipe, window)
    for i, n in enumerate(lengths):
        step(cache, reference, n, i)
    assert cache.n_dropped > 0
    assert cache.size() < window + 128 + 64


@pytest.mark.covering
@pytest.mark.parametrize("window", [2, 16, 64, 65, 128, 200, 257])
@pytest.mark.parametrize("recipe", ["default", "no-tail"])
def test_windows_of_any_size(window, recipe, monkeypatch):
    """Smaller than the exact tokens, and not of whole blocks; prompts in pieces that are smaller and larger than they are."""
    monkeypatch.setattr(window_snapshot, "PIECE", 100)
    recipe = RECIPES[recipe]
    cache, reference = make(recipe, window), make_reference(recipe, window)
    for i, n in enumerate((1, 66, 1, 350, 1, 64, 64, 63, 2, 130, 1, 1, 5)):
        step(cache, reference, n, i)


def test_a_tail_as_long_as_the_window_codes_nothing():
    recipe, window = Recipe(first=0, tail=100), 100
    cache, reference = make(recipe, window), make_reference(recipe, window)
    for i, n in enumerate((300, *(1,) * 70, 64, 30)):
        step(cache, reference, n, i)
        assert cache.n_coded == 0
        assert cache.size() < window + 2 * 64 + (n if n <= 64 else 0)


def test_sinks_join_the_denominator():
    cache, reference = make(Recipe(), 130), make_reference(Recipe(), 130)
    for i, n in enumerate((300, 1, 60, 1)):
        step(cache, reference, n, i, sinks=mx.array([0.5, -1.0, 3.0, 0.0]))


@pytest.mark.parametrize("seed", range(4))
def test_trim_is_exact_or_refused(seed):
    """As many as came in the last step can always be forgotten; what has left the window does not come back."""
    random = np.random.default_rng(seed)
    recipe, window = list(RECIPES.values())[seed], 140
    cache, reference = make(recipe, window), make_reference(recipe, window)
    n_refused = 0
    for i in range(25):
        n = int(random.choice([1, 2, 9, 40, 64, 65, 130, 250]))
        step(cache, reference, n, 100 * seed + i)
        assert cache.is_trimmable() == (reference.n_dropped == 0)
        gone = min(int(random.choice([0, 1, 9, n, 100, 10_000], p=[0.1, 0.2, 0.2, 0.2, 0.25, 0.05])), cache.offset)
        most = reference.n_tokens - reference.n_dropped - window + 1
        assert n > 64 or cache.can_trim(n)
        if reference.n_dropped and most < gone < cache.offset:
            assert not cache.can_trim(gone)
            with pytest.raises(ValueError, match=rf"expected at most {most}, as older tokens have left the window"):
                cache.trim(gone)
            n_refused += 1
            continue
        assert cache.can_trim(gone)
        assert cache.trim(gone) == gone
        reference.trim(gone)
        assert cache.empty() == (reference.n_tokens == 0)
        loaded = TurboQuantWindowKVCache.from_state(cache.state)
        assert (loaded.offset, loaded.window, loaded.n_dropped) == (cache.offset, window, cache.n_dropped)
    assert n_refused > 0


@pytest.mark.parametrize("n_draft", [4, 63])
def test_a_draft_that_is_taken_back_leaves_no_trace(n_draft):
    recipe = Recipe(tail=20, first=4)
    plain, drafted = make(recipe, 100), make(recipe, 100)
    check_drafts_leave_no_trace(plain, drafted, 200, n_draft)
    assert plain.n_dropped > 0


def test_copies_and_saved_states_go_on_alike():
    caches = [make(Recipe(tail=20, first=4), 170)]
    caches[0].update_and_fetch(*random_tokens(300))
    caches += [copy.deepcopy(caches[0]), TurboQuantWindowKVCache.from_state(caches[0].state)]
    for i, n in enumerate((1, 30, 64, 200, 1)):
        k, v, q = (mx.array(x)[None] for x in tokens(n, i))
        outs = [c.update_and_fetch(k, v)[0].attend(q, 0.1, c.make_mask(n)) for c in caches]
        assert all(mx.array_equal(outs[0], out) for out in outs[1:])
    assert caches[2].window == 170
    with pytest.raises(ValueError, match="expected a cache of all tokens, got a window of 170"):
        TurboQuantKVCache.from_state(caches[0].state)
    with pytest.raises(ValueError, match="expected a cache of a sliding window, got one of all tokens"):
        TurboQuantWindowKVCache.from_state(TurboQuantKVCache().state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({22: 1}, "a window of at least 2 tokens, got 1"),
        ({22: 100_000}, "the last 99999 tokens, got"),
        ({21: -64}, "dropped tokens, got -64"),
        ({20: 512}, "no other bound than the window, got 512"),
        ({14: 4, 16: 24}, "the first 0 tokens exact, got 4"),
        ({21: 0}, "the first 4 tokens exact, got 0"),
    ],
)
def test_states_that_no_window_has_are_refused(changes, message):
    cache = make(Recipe(tail=20, first=4), 170)
    cache.update_and_fetch(*random_tokens(300))
    numbers = cache.state[0].tolist()[:-1]
    for place, number in changes.items():
        numbers[place] = number
    arrays = cache.state[1:]
    forged = [state.header_array(numbers, state.checksum(numbers, arrays)), *arrays]
    with pytest.raises(ValueError, match=message):
        TurboQuantWindowKVCache.from_state(forged)


def test_an_interrupt_leaves_what_was_there(monkeypatch):
    cache, reference = make(Recipe(), 170), make_reference(Recipe(), 170)
    for i, n in enumerate((290, 60)):
        step(cache, reference, n, i)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_append", lambda tokens: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cache.update_and_fetch(*random_tokens(1))
    for i in range(3):
        step(cache, reference, 1, 10 + i)


def test_masks_for_those_who_ask():
    """Arrays over the snapshot's columns; of a narrower or wider window what mlx-lm's cache shows of it."""
    cache, reference = make(Recipe(), 170), make_reference(Recipe(), 170)
    for i, (n, window) in enumerate(((400, 170), (30, 100), (1, 100), (64, 170), (1, 170))):
        k, v, q = tokens(n, i)
        mask = cache.make_mask(n, return_array=True, window_size=window)
        assert (mask is None) == (n == 1 and window == 170)
        snapshot, _ = cache.update_and_fetch(mx.array(k)[None], mx.array(v)[None])
        close(snapshot.attend(mx.array(q)[None], D**-0.5, mask)[0], answer(reference, k, v, q, window=window))
    assert cache.make_mask(5, window_size=171)[0].sum().item() == 170
    with pytest.raises(ValueError, match=r"mask: expected .* columns, as make_mask of the compressed cache makes them"):
        snapshot.attend(mx.array(q)[None], 1.0, mx.ones((1, 7), mx.bool_))
    with pytest.raises(ValueError, match='mask: expected None, "causal" or an array, got sliding'):
        snapshot.attend(mx.array(q)[None], 1.0, "sliding")


@pytest.mark.parametrize("window", [-1, 0, 1])
def test_windows_of_nothing_are_refused(window):
    with pytest.raises(ValueError, match="window: expected at least 2 tokens"):
        TurboQuantWindowKVCache(window)


class WindowBatch(Batch):
    """A batch of windows, and a `WindowSequence` for each row."""

    def __init__(self, recipe, n_rows, window, seed=0):
        super().__init__(recipe, n_rows, seed)
        self.window = window
        self.cache = BatchTurboQuantWindowKVCache([0] * n_rows, window, recipe, balance=balance_of(recipe))
        self.rows = [make_reference(recipe, window) for _ in range(n_rows)]

    def feed(self, n, skip, lengths, **_):
        new = [tokens(n, self.seed + 17 * i) for i in range(len(lengths))]
        self.seed += 1000
        k, v, q = (mx.array(np.stack([x[part] for x in new])) for part in range(3))
        assert mx.array_equal(self.cache.offset, self.stock.offset)
        mask = self.cache.make_mask(n, window_size=self.window)
        snapshot, _ = self.cache.update_and_fetch(k, v)
        self.stock.update_and_fetch(k, v)
        got = snapshot.attend(q, D**-0.5, mask)
        assert mx.isfinite(got).all()
        for i, (begin, length) in enumerate(zip(skip, lengths, strict=True)):
            if length:
                k, v, q = (x[:, begin : begin + length] for x in new[i])
                close(got[i, :, begin : begin + length], answer(self.rows[i], k, v, q, window=self.window))

    def check(self):
        assert self.cache.counts.tolist() == [row.counts for row in self.rows]
        assert self.cache._dropped.tolist() == [row.n_dropped for row in self.rows]
        assert self.cache.offset.tolist() == [row.n_tokens for row in self.rows]
        assert mx.array_equal(self.cache.left_padding, self.stock.left_padding)


@pytest.mark.parametrize("recipe", ["default", "no-first", "no-tail"])
def test_batch_rows_are_as_if_alone(recipe, monkeypatch):
    monkeypatch.setattr(window_snapshot, "PIECE", 100)
    batch = WindowBatch(RECIPES[recipe], 3, 170)
    batch.step((300, 37, 150))
    for _ in range(70):
        batch.step((1, 1, 1))
    for lengths in ((20, 1, 60), (64, 64, 64), (64, 250, 33), (1, 1, 1), (30, 0, 64)):
        batch.step(lengths)
    for _ in range(3):
        batch.step((1, 1, 1))


@pytest.mark.parametrize("window", [16, 65, 170])
def test_batch_rows_come_and_go(window):
    recipe = Recipe(tail=20, first=4)
    batch = WindowBatch(recipe, 3, window)
    batch.step((300, 37, 650))
    for lengths in ((1, 1, 1), (64, 60, 90), (33, 64, 2)):
        batch.step(lengths)
    other = WindowBatch(recipe, 2, window, seed=777)
    other.step((200, 9))
    batch.extend(other)
    batch.filter([4, 0, 3, 2])
    for _ in range(70):
        batch.step((1,) * 4)
    batch.step((5, 64, 1, 30))
    caches = [batch.cache.extract(i) for i in (2, 0, 3, 1)]
    assert [type(cache) for cache in caches] == [TurboQuantWindowKVCache] * 4
    assert [cache.n_dropped for cache in caches] == [batch.rows[i].n_dropped for i in (2, 0, 3, 1)]
    batch.filter([2, 0, 3, 1])
    batch.cache = TurboQuantWindowKVCache.merge(caches)
    batch.step((1, 64, 100, 1))
    batch.step((40, 40, 40, 40))
    batch.trimmed(40)
    batch.step((1, 1, 1, 1))
    with pytest.raises(ValueError, match=r"\[trim\] n: expected at most \d+, as older tokens have left the window"):
        batch.cache.trim(300)
    assert not batch.cache.is_trimmable()


def test_batch_padded_on_the_left():
    batch = WindowBatch(Recipe(tail=20, first=4), 3, 100)
    padding = [0, 150, 40]
    for cache in (batch.cache, batch.stock):
        cache.prepare(left_padding=padding)
    batch.feed(128, [*padding[:1], 128, 40], [128, 0, 88])
    batch.feed(128, [0, 22, 0], [128, 106, 128])
    for _ in range(3):
        batch.step((1, 1, 1))


def test_batches_of_other_windows_are_refused():
    a, b = make(Recipe(), 200), make(Recipe(), 201)
    with pytest.raises(ValueError, match=r"\[merge\] caches: expected a window of 200 tokens, got a window of 201 tokens"):
        TurboQuantWindowKVCache.merge([a, b])
    with pytest.raises(ValueError, match=r"\[merge\] caches: expected a window of 200 tokens, got no window"):
        TurboQuantWindowKVCache.merge([a, TurboQuantKVCache(Recipe(), balance=balance_of(Recipe()))])
    with pytest.raises(ValueError, match="window_size: expected the cache's 200 and no array in a batch, got 100"):
        TurboQuantWindowKVCache.merge([a]).make_mask(5, window_size=100)


def test_memory_is_bounded():
    """Up to 127 tokens more than the window, of them up to 127 exact ones."""
    cache, window = make(Recipe(), 500), 500
    used, reserved = [], []
    for i in range(60):
        cache.update_and_fetch(*random_tokens(200 if i % 3 else 1))
        used.append(cache.used_nbytes)
        reserved.append(cache.nbytes)
    exact, coded = 4 * (D + DV) * H, H * Recipe().bytes_per_token(D, DV)
    assert max(used[10:]) <= 127 * exact + window * coded
    assert max(reserved[10:]) <= (127 + 64) * exact + 512 * coded

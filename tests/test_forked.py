"""Sequences that go on from one prompt, of which there is one copy: as each would go on alone."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache

import tqext
import zoo
from support import to_numpy
from tqext.kv import ForkedKVCache, TurboQuantKVCache, fork

N = 3


@pytest.fixture(scope="module", params=["qwen3", "gpt_oss", "qwen3_5"])
def prompt(request):
    """A model and its cache after a prompt. Special: sinks and windows, and states that are no keys and values."""
    model = zoo.make(request.param, {**zoo.PLAIN, **zoo.SPECIAL}[request.param][1])
    cache = tqext.make_prompt_cache(model)
    model(mx.array(np.random.default_rng(0).integers(0, 32, (1, 330))), cache=cache)
    mx.eval([c.state for c in cache])
    yield model, cache
    tqext.detach(model)


def steps(rng, counts):
    """Tokens of each step, another for each sequence."""
    return [mx.array(rng.integers(0, 32, (N, n))) for n in counts]


def close(got, want):
    """Logits within what the order of fp32 sums changes."""
    got, want = to_numpy(got), to_numpy(want)
    assert np.abs(got - want).max() <= 2e-4 * np.abs(want).max()


def test_forked_sequences_answer_as_each_alone(prompt, rng):
    model, cache = prompt
    forked, alone = fork(cache, N), [copy.deepcopy(cache) for _ in range(N)]
    assert sum(isinstance(c, ForkedKVCache) for c in forked) == sum(isinstance(c, TurboQuantKVCache) for c in cache) > 0
    # Past the next two blocks, with drafts that a block is encoded within, and a prompt that is encoded at once.
    for tokens in steps(rng, [1, 1, 5, 40, 9, 20, 1, 30, 64, 100, 1]):
        got = model(tokens, cache=forked)
        for i, one in enumerate(alone):
            close(got[i : i + 1], model(tokens[i : i + 1], cache=one))


def test_forked_cache_does_not_change_the_prompts(prompt, rng):
    model, cache = prompt
    before = copy.deepcopy(cache)
    forked = fork(cache, N)
    for tokens in steps(rng, [90, 1]):
        model(tokens, cache=forked)
    tokens = mx.array([[1, 2, 3]])
    want = to_numpy(model(tokens, cache=before))
    going_on = copy.deepcopy(cache)
    assert np.array_equal(to_numpy(model(tokens, cache=going_on)), want)
    # Nor does a prompt that goes on change the sequences.
    one, other = fork(going_on, N), None
    model(mx.array(rng.integers(0, 32, (1, 200))), cache=going_on)
    other = fork(before, N)
    tokens = steps(rng, [1])[0]
    close(model(tokens, cache=one), model(tokens, cache=other))


def layers(batch=1, n_tokens=400, **recipe):
    """One layer's cache."""
    cache = TurboQuantKVCache(tqext.Recipe(**{"first": 8, "tail": 64, **recipe}))
    rng = np.random.default_rng(1)
    cache.update_and_fetch(*(mx.array(rng.normal(size=(batch, 2, n_tokens, 64)).astype(np.float32)) for _ in range(2)))
    return cache


def random_step(rng, n, batch=N):
    return [mx.array(rng.normal(size=(batch, heads, n, 64)).astype(np.float32)) for heads in (4, 2, 2)]


@pytest.mark.parametrize("n", [1, 6])
@pytest.mark.parametrize("kind", [None, "bool", "float32", "one column"])
def test_forked_snapshot_takes_any_mask(n, kind, rng):
    """Also one that hides shared tokens, or adds to their scores."""
    cache = layers()
    forked, alone = fork([cache], N)[0], [copy.deepcopy(cache) for _ in range(N)]
    q, k, v = random_step(rng, n)
    mask = forked.make_mask(n)
    if kind is not None:
        allowed = rng.random((N, 1, n, 1 if kind == "one column" else forked.size() + n)) < 0.7
        numbers = np.where(allowed, rng.normal(size=allowed.shape), -1e30).astype(np.float32)
        mask = mx.array(numbers) if kind == "float32" else mask & mx.array(allowed)
    got = forked.update_and_fetch(k, v)[0].attend(q, 0.125, mask)
    for i, one in enumerate(alone):
        snapshot = one.update_and_fetch(k[i : i + 1], v[i : i + 1])[0]
        close(got[i : i + 1], snapshot.attend(q[i : i + 1], 0.125, mask[i : i + 1]))


def test_forked_cache_filters_and_trims(rng):
    """One of the two from a cache that shares its tokens already."""
    cache = layers(n_tokens=700)
    forked = fork([cache], N)[0]
    cache.share()
    assert cache._base is not None
    other = fork([cache], N)[0]
    begun = forked.size()
    q, k, v = random_step(rng, 5)
    forked.update_and_fetch(k, v)
    assert forked.trim(5) == 5 and forked.size() == begun
    with pytest.raises(ValueError, match=r"^\[trim\] n: expected at most 0, the tokens since the fork, got 1"):
        forked.trim(1)
    forked.filter([2, 0])
    other.filter([2, 0])
    q, k, v = random_step(rng, 1, batch=2)
    close(*(c.update_and_fetch(k, v)[0].attend(q, 0.125) for c in (forked, other)))
    assert forked.offset.tolist() == [begun + 1] * 2


def test_forked_caches_hold_one_copy():
    """Eight sequences: the shared tokens' bytes once, and little more than the recent tokens of each."""
    cache = layers(n_tokens=20_000)
    forked, batch = fork([cache], 8)[0], TurboQuantKVCache.batch_class.merge([copy.deepcopy(cache) for _ in range(8)])
    shared = sum(x.nbytes for x in forked.shared_arrays)
    assert shared <= cache.nbytes
    assert forked.nbytes < shared + 8 * cache.nbytes / 20
    assert forked.nbytes == batch.nbytes  # which finds out by itself
    assert copy.deepcopy(forked).shared_arrays[0] is forked.shared_arrays[0]


@pytest.mark.parametrize(
    "argument, make",
    [
        ("n", lambda: fork([layers()], 0)),
        ("n", lambda: fork([layers()], 2.5)),
        ("n", lambda: fork([KVCache()], 0)),
        ("caches", lambda: fork(None, 2)),
        ("caches", lambda: fork("caches", 2)),
        ("caches", lambda: fork([layers(), 1], 2)),
        ("cache", lambda: fork([TurboQuantKVCache()], 2)),
        ("cache", lambda: fork([layers(n_tokens=20)], 2)),
        ("cache", lambda: fork([layers(batch=2)], 2)),
    ],
)
def test_fork_rejects(argument, make):
    with pytest.raises(ValueError, match=rf"^\[fork\] {argument}: expected .+, got .+"):
        make()


def test_forked_cache_has_no_window():
    with pytest.raises(ValueError, match=r"^\[make_mask\] window_size: expected None"):
        fork([layers()], 2)[0].make_mask(1, window_size=4)

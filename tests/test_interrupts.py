"""Interrupted and concurrent generations: what was stored stays right, and threads do not see each other."""

import sys
import threading

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step

import tqext
from cache_support import D, answer, close, make, make_reference, step, tokens
from tiny import greedy, kl, logits_after, make_llama, prompt
from tqext import BatchTurboQuantKVCache, Recipe

pytestmark = pytest.mark.usefixtures("uninstalled")
N_NEW = 30


@pytest.fixture(scope="module")
def model():
    return make_llama()


class InterruptAt:
    """Raises KeyboardInterrupt at the n-th line that tqext runs, as Ctrl-C may between any two."""

    def __init__(self, n):
        self.left = n
        self.hit = False

    def __enter__(self):
        sys.settrace(self.call)

    def __exit__(self, kind, *rest):
        sys.settrace(None)
        self.hit = kind is KeyboardInterrupt
        return self.hit

    def call(self, frame, event, arg):
        # Not in update_and_fetch itself, whose own handler the interrupt would hit.
        name = frame.f_code.co_filename.replace("\\", "/")
        ours = "/tqext/kv/" in name and frame.f_code.co_name != "update_and_fetch"
        return self.line if ours else None

    def line(self, frame, event, arg):
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self.line


def interrupted_steps(cache, feed):
    """Interrupt `feed` at one line after another until it comes to its end; returns how often."""
    n = 1
    while True:
        at = InterruptAt(n)
        with at:
            feed()
        if not at.hit:
            return n - 1
        n += 3


@pytest.mark.parametrize("n_new", [1, 40, 100])
@pytest.mark.parametrize("n_before", [2, 150, 192, 250])
def test_cache_update_is_all_or_nothing(n_before, n_new):
    """An update that is interrupted at any of its lines has not happened."""
    cache, reference = make(Recipe()), make_reference(Recipe())
    step(cache, reference, n_before, 0)
    k, v, _ = (mx.array(x)[None] for x in tokens(n_new, 99))
    assert interrupted_steps(cache, lambda: cache.update_and_fetch(k, v)) > 5
    cache.trim(n_new)
    reference.append(*tokens(n_new, 99)[:2])
    reference.trim(n_new)
    for i in range(3):
        step(cache, reference, 60, 7 + i)


@pytest.mark.parametrize("max_size", [None, 320])
@pytest.mark.parametrize("n_new", [1, 40, 100])
def test_batch_update_is_all_or_nothing(n_new, max_size):
    lengths = (170, 250 if max_size is None else 450, 2)
    recipe = Recipe(balance=False)
    cache = BatchTurboQuantKVCache([0] * 3, recipe, max_size=max_size)
    rows = [make_reference(recipe, max_size) for _ in lengths]

    def feed(seed, real):
        n = max(real)
        new = [tokens(n, seed + i) for i in range(3)]
        k, v, q = (mx.array(np.stack([x[part] for x in new])) for part in range(3))
        cache.prepare(lengths=list(real), right_padding=[n - r for r in real])
        mask = cache.make_mask(n)
        if seed == 20:
            assert interrupted_steps(cache, lambda: cache.update_and_fetch(k, v)) > 5
        else:
            out = cache.update_and_fetch(k, v)[0].attend(q, D**-0.5, mask)
        for i, row in enumerate(rows):
            expected = answer(row, *(x[:, : real[i]] for x in new[i]))
            if seed != 20:
                close(out[i, :, : real[i]], expected)
        cache.finalize()
        assert cache.counts.tolist() == [row.counts for row in rows]

    feed(0, lengths)
    feed(20, (n_new,) * 3)
    feed(40, (50, 50, 50))
    feed(60, (1, 1, 1))


def test_exception_in_the_progress_callback_leaves_whole_chunks(model):
    tokens = prompt(400)
    cache = tqext.make_prompt_cache(model)

    def callback(done, total):
        if done >= 200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(
            generate_step(mx.array(tokens), model, prompt_cache=cache, prefill_step_size=100, prompt_progress_callback=callback)
        )
    offset = cache[0].offset
    assert [c.offset for c in cache] == [offset] * 3
    assert 200 <= offset < 400
    whole = tqext.make_prompt_cache(model)
    expected = greedy(model, tokens, N_NEW, cache=whole, prefill_step_size=100)
    assert greedy(model, tokens[offset:], N_NEW, cache=cache, prefill_step_size=100) == expected


@pytest.mark.parametrize("n_stored", [0, 300])
@pytest.mark.parametrize("n_fed", [1, 60, 100])
def test_interrupt_within_a_model_call(model, monkeypatch, n_stored, n_fed):
    """Some layers have the tokens and others not: trimmed to the shortest, the cache goes on."""
    tokens = prompt(n_stored + n_fed + 5)
    caches = [tqext.make_prompt_cache(model) for _ in range(2)]
    for cache in caches:
        if n_stored:
            logits_after(model, cache, tokens[:n_stored])
            mx.eval([c.state for c in cache])
    cache, undisturbed = caches

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache[2], "update_and_fetch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(mx.array([tokens[n_stored : n_stored + n_fed]]), cache=cache)
    assert [c.offset for c in cache] == [n_stored + n_fed, n_stored + n_fed, n_stored]
    for c in cache:
        c.trim(c.offset - n_stored)
    got, expected = (logits_after(model, c, tokens[n_stored:]) for c in (cache, undisturbed))
    if n_stored and n_fed > 64:
        # Tokens before the prompt were encoded in two layers when it came: an error of the codec, and no other.
        assert 0 < kl(expected, got) < 1.0
    else:
        assert mx.allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_threads_generate_what_each_does_alone(model):
    """Each with a cache and a stream of its own, on one model."""
    prompts = [prompt(250 + 10 * i, seed=i) for i in range(4)]
    alone = [greedy(model, p, N_NEW, cache=tqext.make_prompt_cache(model)) for p in prompts]
    found, start = {}, threading.Barrier(len(prompts))

    def run(i):
        start.wait()
        with mx.stream(mx.new_stream(mx.default_device())):
            found[i] = greedy(model, prompts[i], N_NEW, cache=tqext.make_prompt_cache(model))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found.get(i) for i in range(len(prompts))] == alone


@pytest.mark.parametrize("after", [1, 2, 33, 70])
def test_a_consumer_that_raises_can_go_on(model, after):
    """The loop is a step ahead of what it has handed out."""
    tokens = prompt(250)
    whole = tokens + greedy(model, tokens, 100, cache=tqext.make_prompt_cache(model))
    cache = tqext.make_prompt_cache(model)
    steps = generate_step(mx.array(tokens), model, max_tokens=80, prompt_cache=cache)
    with pytest.raises(KeyboardInterrupt):
        for i, _ in enumerate(steps, 1):
            if i == after:
                raise KeyboardInterrupt
    (fed,) = {layer.offset for layer in cache}
    assert greedy(model, whole[fed : fed + 1], 10, cache=cache) == whole[fed + 1 : fed + 11]

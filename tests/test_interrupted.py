"""Generation that is interrupted anywhere leaves a cache of the tokens that it holds, which can be used on."""

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step

import tqext
import tqext.mlx_lm
from tiny import greedy, logits_after, make_llama, prompt

N_PROMPT, N_NEW = 150, 80


@pytest.fixture(scope="module")
def model():
    return make_llama()


@pytest.fixture(scope="module")
def whole(model):
    """The prompt and its answer without an interruption."""
    tqext.mlx_lm.hook()
    tokens = prompt(N_PROMPT)
    yield tokens + greedy(model, tokens, N_NEW + 20, cache=tqext.make_prompt_cache(model), prefill_step_size=64)
    tqext.uninstall()


def goes_on(model, whole, cache):
    """The answer is what it would have been."""
    (fed,) = {layer.offset for layer in cache}
    assert 0 < fed < len(whole) - 10
    rest = whole[fed:N_PROMPT] or [whole[fed]]
    begin = fed + len(rest)
    assert greedy(model, rest, 10, cache=cache, prefill_step_size=64) == whole[begin : begin + 10]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("after", [1, 2, 33, 70])
def test_a_consumer_that_raises(model, whole, error, after):
    """The loop is a step ahead of what it has handed out."""
    cache = tqext.make_prompt_cache(model)
    with pytest.raises(error):
        for i, _ in enumerate(
            generate_step(mx.array(whole[:N_PROMPT]), model, max_tokens=N_NEW, prompt_cache=cache, prefill_step_size=64), 1
        ):
            if i == after:
                raise error
    goes_on(model, whole, cache)


def test_a_progress_callback_that_raises(model, whole):
    cache, calls = tqext.make_prompt_cache(model), []

    def progress(done, total):
        calls.append((done, total))
        if done >= 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        greedy(model, whole[:N_PROMPT], 5, cache=cache, prefill_step_size=64, prompt_progress_callback=progress)
    assert calls[-1][1] == N_PROMPT
    goes_on(model, whole, cache)


@pytest.mark.parametrize("call", [1, 3, 4, 40])
def test_an_interrupt_between_two_layers(model, whole, call, monkeypatch):
    """The first layer has the step's tokens, the others do not: trimmed to what all have, they go on."""
    cache, calls = tqext.make_prompt_cache(model), []
    mlp = type(model.layers[0].mlp)
    original = mlp.__call__

    def interrupted(self, x):
        if self is model.layers[0].mlp:
            calls.append(x.shape)
            if len(calls) > call:
                raise KeyboardInterrupt
        return original(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(mlp, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            greedy(model, whole[:N_PROMPT], N_NEW, cache=cache, prefill_step_size=64)
    least = min(layer.offset for layer in cache)
    assert cache[0].offset > least
    for layer in cache:
        layer.trim(layer.offset - least)
    if call > 1:
        goes_on(model, whole, cache)
    else:
        # Cut in the prompt: the first layer had encoded tokens of before that chunk, which stay codes, so the answer differs.
        assert mx.isfinite(logits_after(model, cache, whole[least:N_PROMPT])).all()
        assert {layer.offset for layer in cache} == {N_PROMPT}

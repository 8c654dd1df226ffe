"""Every kind of model: what routes is compressed and agrees with the uncompressed cache, the rest is left alone and said so."""

import copy

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache

import tqext
import zoo
from tiny import logits_after
from tqext import TurboQuantKVCache
from tqext.mlx_lm import stock_cache
from tqext.mlx_lm.caches import members as all_members
from tqext.mlx_lm.caches import replaced

REASONS = {
    "ArraysCache": "a state of fixed size",
    "RotatingKVCache": "a sliding window",
    "KVCache": "computes with the keys itself",
}
# All different: a token that comes twice brings the same values twice, and so the same error, which then does not average out.
TOKENS = [37 * i % 127 + 1 for i in range(120)]
N_PROMPT = 110
AFTER = ((110, 114), (114, 115), (115, 120))  # a draft, a single token, a draft; no block is encoded in between
# A block of codes from so short a prompt. What random weights do to a layer's accuracy is not the subject.
SHORT = {"tail": 20, "first": 4, "guard": False}
# fp32 in another order. The largest found is 2e-6.
pytestmark = pytest.mark.usefixtures("uninstalled")
SAME_BYTES = 2e-5
NOISE_DRAWS = 5


def members(caches):
    return {path: cache for path, cache in all_members(caches) if type(cache) is TurboQuantKVCache}


def exchanged(caches, new):
    """A copy of a prompt cache with these members in place of its own."""
    return replaced(copy.deepcopy(caches), lambda path, cache: new.get(path, cache))


def filled(keys, values):
    cache = KVCache()
    cache.update_and_fetch(keys, values)
    return cache


def decoded(cache):
    """An uncompressed cache of what the bytes of a compressed one stand for."""
    packed = cache._snapshot()
    assert packed.first is not None
    keys, values = (tqext.dequantize(p) for p in (packed.packed_keys, packed.packed_values))
    first, tail = packed.first, packed.tail
    return filled(
        mx.concatenate([first.keys, keys, tail.keys], axis=2), mx.concatenate([first.values, values, tail.values], axis=2)
    )


def distortion(quantize, dim, **options):
    """The share of a vector's power that coding it turns into error."""
    x = mx.random.normal((1, 1, 4096, dim))
    error = tqext.dequantize(quantize(x, **options)) - x
    return float((error.square().sum() / x.square().sum()).item())


def noisy(stock, packed):
    """The tokens of an uncompressed cache, the coded ones with noise of the power that the codec's error has.

    It is white where keys and values are coded: of keys, less the mean of the block and balanced.
    """
    recipe, coded = packed.recipe, slice(packed.n_first, packed.n_first + packed.n_coded)

    def add(x, mean, balance, share):
        kept = x[:, :, : stock.offset]
        power = ((kept[:, :, coded] - mean) * balance).square().mean(axis=-1, keepdims=True)
        out = kept + 0
        out[:, :, coded] += mx.sqrt(power * share) * mx.random.normal(out[:, :, coded].shape) / balance
        return out

    means = mx.repeat(packed._snapshot().packed_keys.means.astype(mx.float32), 64, axis=2)
    balance = 1.0 if packed.balance is None else packed.balance[:, None]
    of_keys = distortion(tqext.quantize_keys, stock.keys.shape[-1], bits=recipe.key_bits)
    of_values = distortion(tqext.quantize_values, stock.values.shape[-1], bits=recipe.value_bits, coding=recipe.value_coding)
    return filled(add(stock.keys, means, balance, of_keys), add(stock.values, 0.0, 1.0, of_values))


def size(x):
    return float(x.square().mean().sqrt().item())


@pytest.mark.parametrize("kind", [*zoo.PLAIN, *zoo.SPECIAL])
def test_model_compresses_what_it_can(kind):
    """On the same bytes a compressed cache answers as an uncompressed one, and what the bytes lose acts as noise does."""
    n_compressed, changes = {**zoo.PLAIN, **zoo.SPECIAL}[kind]
    model = zoo.make(kind, changes)
    report = tqext.probe(model)
    assert len(report.compressed) == n_compressed, str(report)
    for layer in report.layers:
        if layer.recipe is None:
            assert REASONS[layer.cache] in layer.reason
            assert layer.path in str(report)
    if not n_compressed:
        assert [type(c) for c in tqext.make_prompt_cache(model)] == [type(c) for c in stock_cache(model)]
        return
    tqext.verify(model, "tq4", n_tokens=N_PROMPT, balance=False, **SHORT)

    stock, packed = stock_cache(model), tqext.make_prompt_cache(model, "tq4", **SHORT)
    exact, got = (logits_after(model, cache, TOKENS[:N_PROMPT]) for cache in (stock, packed))
    assert size(exact - got) < SAME_BYTES * size(exact), "the first chunk attends to itself exactly"
    in_place, plain = members(packed), dict(all_members(stock))
    n_coded = {path: cache.n_coded for path, cache in in_place.items()}
    assert min(n_coded.values()) >= 64

    def after(cache):
        return mx.concatenate([logits_after(model, cache, TOKENS[a:b]) for a, b in AFTER])

    on_decoded = exchanged(packed, {path: decoded(cache) for path, cache in in_place.items()})
    on_noise = [
        exchanged(stock, {path: noisy(plain[path], cache) for path, cache in in_place.items()}) for _ in range(NOISE_DRAWS)
    ]
    exact, got, same = after(stock), after(packed), after(on_decoded)
    assert {path: cache.n_coded for path, cache in in_place.items()} == n_coded, "other bytes than at the start"
    assert size(got - same) < SAME_BYTES * size(same)

    # How far a model's logits move differs by a factor of 40: gemma's norms and scales make random attention sharp, and
    # a router can send a token elsewhere. Noise of the codec's power tells how far this model's have to.
    noise = [size(after(cache) - exact) for cache in on_noise]
    assert min(noise) / 3 < size(got - exact) < 1.5 * max(noise)

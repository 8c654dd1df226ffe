"""Quality by position: against an independent computation, its spans, its control, and what fails."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache

from numpy_qwen2 import Qwen2, Scheme, mean_kl
from tiny import make_llama, make_qwen2, prompt
from tqext import TurboQuantKVCache
from tqext.by_position import Contender, as_row, by_position, contenders, table
from tqext.mlx_lm import hook, make_prompt_cache, stock_cache
from tqext.presets import get_policy

CHUNK = 96


def scheme_of(cache):
    """A layer's cache as the independent model takes it, None if it is exact. The balance is the cache's own."""
    if not isinstance(cache, TurboQuantKVCache):
        return None
    r, balance = cache.recipe, None if cache.balance is None else np.array(cache.balance)
    return Scheme(r.key_bits, r.value_bits, r.value_coding, r.first, r.tail, balance)


@pytest.mark.covering
@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("preset", ["tq3", "tq33", "tq4"])
def test_by_position_agrees_with_an_independent_computation(preset, balanced):
    """KL within 5 %, from weights and tokens on: another model, another cache, another codec."""
    model = make_qwen2(hidden_size=256)
    tokens = prompt(4 * CHUNK + 1)
    layers = range(len(model.layers))
    balances = [mx.exp(mx.random.normal((2, 64)) / 2) if balanced else None for _ in layers]
    # The first layer stays exact, as a policy or the guard may leave it.
    cache = [KVCache(), *(TurboQuantKVCache(get_policy(preset).recipe, balance=balances[i]) for i in layers[1:])]
    hook()
    (found,) = by_position(model, tokens, [Contender(preset, cache, 0.0)], chunk=CHUNK)
    twin = Qwen2(model.args, {name: np.array(value) for name, value in tree_flatten(model.parameters())})
    n = len(tokens) - 1
    expected = twin.log_probabilities(tokens[:n], CHUNK)
    got = twin.log_probabilities(tokens[:n], CHUNK, [scheme_of(c) for c in cache])
    want = mean_kl(expected, got, n)
    assert found.whole.kl == pytest.approx(want, rel=0.05)
    assert want > 1e-4  # or nothing was coded
    nll = -expected[np.arange(n), tokens[1:]]
    assert found.reference == pytest.approx(np.exp(nll.mean()), rel=1e-3)


def test_by_position_cuts_at_the_edges():
    model = make_llama()
    tokens = prompt(400)
    seen = []
    entry = Contender("tq4", make_prompt_cache(model, "tq4"), 0.0)
    (found,) = by_position(model, tokens, [entry], chunk=64, edges=(0, 128, 256, 1000), at_edge=seen.append)
    assert [(s.begin, s.end) for s in found.spans] == [(0, 128), (128, 256), (256, 399)]
    assert found.n_tokens == 399
    sizes = np.array([s.end - s.begin for s in found.spans])
    assert found.whole.kl == pytest.approx((np.array([s.kl for s in found.spans]) * sizes).sum() / 399)
    assert [r.n_tokens for (r,) in seen] == [128, 256]
    assert seen[0][0].whole.kl == pytest.approx(found.spans[0].kl)
    assert found.spans[0].kl < found.spans[2].kl  # the first tokens are exact


def test_by_position_control_and_identical_caches():
    model = make_llama()
    same = Contender("same", stock_cache(model), 0.0)
    control = contenders(model, [], stock_bits=())[0]
    identical, halves = by_position(model, prompt(200), [same, control], chunk=50)
    assert identical.whole.kl == 0
    assert identical.whole.top1 == 1
    assert identical.whole.ratio == 1
    assert 0 <= halves.whole.kl < 1e-6
    assert halves.whole.top1 > 0.99


def test_by_position_orders_the_caches_and_counts_bytes():
    model = make_llama()
    entries = contenders(model, ["tq4"], stock_bits=(8, 3))
    control, tq4, eight, three = by_position(model, prompt(300), entries, chunk=64)
    assert control.whole.kl < eight.whole.kl < three.whole.kl
    assert tq4.whole.kl < three.whole.kl
    assert control.bytes_per_token == 2 * 64 * 2
    assert eight.bytes_per_token == 2 * (64 + 4)
    assert three.bytes_per_token == 2 * (24 + 4)
    assert tq4.bytes_per_token == get_policy("tq4").recipe.bytes_per_token(64)
    assert tq4.layers.startswith("tq4: 3 of 3 layers compressed")


class Failing(KVCache):
    def update_and_fetch(self, keys, values):
        raise RuntimeError("no kernel of this shape\nand more")


def test_by_position_says_how_a_stock_cache_failed():
    model = make_llama()
    failing = [Failing() for _ in model.layers]
    (found,) = by_position(model, prompt(70), [Contender("mlx-lm 4-bit", failing, 1.0, stock=True)], chunk=64)
    assert found.whole is None
    assert found.failure == "RuntimeError: no kernel of this shape"
    assert "does not run: RuntimeError: no kernel of this shape" in table([found])
    assert as_row(found)["whole"] is None
    with pytest.raises(RuntimeError, match="no kernel"):
        by_position(model, prompt(70), [Contender("tq3", failing, 1.0)], chunk=64)


def test_by_position_checks_its_arguments():
    model = make_llama()
    with pytest.raises(ValueError, match=r"^\[by_position\] tokens: expected at least 2, got 1"):
        by_position(model, [1], [])
    with pytest.raises(ValueError, match=r"^\[by_position\] chunk: expected at least 2, got 1"):
        by_position(model, [1, 2], [Contender("x", stock_cache(model), 0.0, pieces=2)], chunk=1)


def test_by_position_holds_no_more_than_a_chunk_of_logits():
    """Logits of the whole text would be 1500 x 8000 in fp32: 48 MB."""
    model = make_llama(vocab_size=8000, num_hidden_layers=1, hidden_size=32, intermediate_size=32)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    by_position(model, prompt(1500), [Contender("tq3", make_prompt_cache(model, "tq3"), 0.0)], chunk=128)
    assert mx.get_peak_memory() - before < 24e6

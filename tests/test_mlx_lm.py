"""The hooks, the probe, the path proof, and generation through mlx-lm's own functions."""

import copy

import mlx.core as mx
import mlx_lm.models.cache as stock
import mlx_lm.utils
import pytest
from mlx_lm.generate import batch_generate, speculative_generate_step
from mlx_lm.models import qwen2
from tqext._ext import pipelines

import tqext
import tqext.mlx_lm
from tiny import CONFIG, Words, greedy, kl, logits_after, make_biased_qwen2, make_llama, prompt, save_folder
from tqext import BatchTurboQuantKVCache, Recipe, TurboQuantKVCache, get_policy
from tqext.mlx_lm import PathError, stock_cache

pytestmark = pytest.mark.usefixtures("device", "uninstalled")
N_PROMPT, N_NEW = 300, 60
# Random weights are too sharp for a codec: the accuracy of a layer is not what these proofs are about.
PATH_ONLY = {"guard": False, "balance": False}


@pytest.fixture(scope="module")
def model():
    return make_llama()


@pytest.fixture(scope="module")
def expected(model):
    return greedy(model, prompt(N_PROMPT), N_NEW)


# Hooks


def test_uninstall_restores_what_was_there(tmp_path):
    attention, load_model = mx.fast.scaled_dot_product_attention, mlx_lm.utils.load_model
    tqext.install("tq4")
    tqext.install("tq3")
    assert mx.fast.scaled_dot_product_attention is not attention
    assert mlx_lm.utils.load_model is not load_model
    tqext.uninstall()
    tqext.uninstall()
    assert mx.fast.scaled_dot_product_attention is attention
    assert mlx_lm.utils.load_model is load_model


def test_hook_chains_and_refuses_to_unhook_another(monkeypatch):
    calls = []
    before = mx.fast.scaled_dot_product_attention

    def other(*args, **kwargs):
        calls.append("before")
        return before(*args, **kwargs)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", other)
    tqext.mlx_lm.hook()
    x = mx.ones((1, 2, 3, 32))
    mx.fast.scaled_dot_product_attention(x, x, x, scale=1.0)
    assert calls == ["before"]
    ours = mx.fast.scaled_dot_product_attention
    mx.fast.scaled_dot_product_attention = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(RuntimeError, match="replaced again"):
        tqext.uninstall()
    mx.fast.scaled_dot_product_attention = ours
    tqext.uninstall()
    assert mx.fast.scaled_dot_product_attention is other


def test_hook_rejects_what_is_not_the_snapshots():
    tqext.mlx_lm.hook()
    snapshot, _ = TurboQuantKVCache().update_and_fetch(mx.ones((1, 2, 3, 32)), mx.ones((1, 2, 3, 32)))
    q = mx.ones((1, 2, 3, 32))
    with pytest.raises(TypeError, match="values of the keys' snapshot"):
        mx.fast.scaled_dot_product_attention(q, snapshot, q, scale=1.0)
    with pytest.raises(TypeError, match="unknown arguments"):
        mx.fast.scaled_dot_product_attention(q, snapshot, snapshot, scale=1.0, softcap=3.0)
    got = mx.fast.scaled_dot_product_attention(q, snapshot, snapshot, scale=1.0, mask="causal", stream=mx.cpu)
    assert mx.allclose(got, mx.ones_like(got), atol=1e-5)


def test_install_compresses_models_that_are_loaded_later(tmp_path, model):
    folder = save_folder(model, tmp_path / "m")
    tqext.install("tq4", tail=40)
    loaded, _ = mlx_lm.utils.load_model(folder)
    cache = stock.make_prompt_cache(loaded)
    assert [type(c) for c in cache] == [TurboQuantKVCache] * 3
    assert cache[0].recipe == Recipe(key_bits=4, value_bits=4, value_coding="lloyd", tail=40)
    tqext.uninstall()
    assert type(stock.make_prompt_cache(mlx_lm.utils.load_model(folder)[0])[0]) is stock.KVCache


def test_attach_and_detach(model):
    tqext.attach(model, "bonsai", first_last=1)
    kinds = [type(c).__name__ for c in stock.make_prompt_cache(model)]
    assert kinds == ["KVCache", "TurboQuantKVCache", "KVCache"]
    tqext.detach(model)
    assert type(stock.make_prompt_cache(model)[1]) is stock.KVCache


# Generation


def test_generate_agrees_with_the_uncompressed_cache(model):
    tokens = prompt(N_PROMPT + 50)
    reference = logits_after(model, stock_cache(model), tokens)
    errors = {}
    for preset in ("tq4", "tq33", "tq3", "tq2"):
        got = logits_after(model, tqext.make_prompt_cache(model, preset, guard=False), tokens, chunk=8)
        errors[preset] = kl(reference, got)
    # Random weights are harder on a codec than trained ones: the order is the claim, the bars are bench_quality.py's.
    assert 0 < errors["tq4"] < errors["tq33"] / 2 < errors["tq3"] / 2 < errors["tq2"] / 2
    assert errors["tq4"] < 0.1


def test_generate_first_chunk_is_as_uncompressed(model):
    tokens = prompt(400)
    got = logits_after(model, tqext.make_prompt_cache(model), tokens)
    reference = logits_after(model, stock_cache(model), tokens)
    assert float(mx.abs(got - reference).max().item()) < 1e-3 * float(mx.abs(reference).max().item())


def prompts():
    return [prompt(n, seed=i) for i, n in enumerate((250, 3, 197, 140, 1))]


@pytest.mark.parametrize("preset", ["tq3", "tq33", "tq4", "tq3-plain", "bonsai"])
def test_batch_generate_equals_alone(model, preset):
    """Greedy answers are the same alone and in company."""
    tqext.attach(model, preset, first_last=1 if preset == "bonsai" else None, guard=False)
    alone = [greedy(model, p, N_NEW) for p in prompts()]
    together = batch_generate(model, Words(), prompts(), max_tokens=N_NEW, return_token_ids=True)
    tqext.detach(model)
    assert together.token_ids == alone


def test_batch_generate_with_different_lengths_of_answers(model):
    """Sequences leave the batch at different times, and their caches go on alone."""
    tqext.attach(model, "tq3", guard=False)
    lengths = [60, 5, 33, 1, 50]
    alone = [greedy(model, p, n + 10) for p, n in zip(prompts(), lengths, strict=True)]
    out = batch_generate(model, Words(), prompts(), max_tokens=lengths, return_token_ids=True, return_prompt_caches=True)
    assert out.token_ids == [a[:n] for a, n in zip(alone, lengths, strict=True)]
    for tokens, n, cache in zip(alone, lengths, out.caches, strict=True):
        assert type(cache[0]) is TurboQuantKVCache
        # The last token of the answer has not been fed yet, or has, depending on how the batch ended.
        fed, asked = cache[0].offset, prompts()[out.caches.index(cache)]
        assert fed in (len(asked) + n - 1, len(asked) + n)
        full = asked + tokens
        assert greedy(model, full[fed : fed + 1], 5, cache=cache) == full[fed + 1 : fed + 6]
    tqext.detach(model)


@pytest.mark.parametrize("preset", ["tq3", "tq3-plain"])
def test_batch_follow_ups_equal_alone(model, preset):
    """Kept caches go on with prompts of a few tokens, within some of which a block is encoded."""
    tqext.attach(model, preset, guard=False)
    histories = [prompt(n, seed=i) for i, n in enumerate((190, 191, 197, 266, 20, 330))]
    follow_ups = [prompt(n, seed=40 + i) for i, n in enumerate((9, 5, 2, 70, 3, 60))]
    caches = [stock.make_prompt_cache(model) for _ in histories]
    for history, cache in zip(histories, caches, strict=True):
        logits_after(model, cache, history)
    alone = [greedy(model, f, N_NEW, cache=copy.deepcopy(c)) for f, c in zip(follow_ups, caches, strict=True)]
    together = batch_generate(model, Words(), follow_ups, caches, max_tokens=N_NEW, return_token_ids=True)
    tqext.detach(model)
    assert together.token_ids == alone


@pytest.mark.covering
@pytest.mark.parametrize("n_draft", [40, 4])
@pytest.mark.parametrize("draft_seed", [0, 1])
def test_speculative_decoding_equals_plain_decoding(model, draft_seed, n_draft):
    """A draft model that is always right, and one that is mostly wrong."""
    tokens = prompt(N_PROMPT)
    draft = make_llama(draft_seed)
    plain = greedy(model, tokens, N_NEW, cache=tqext.make_prompt_cache(model, guard=False))
    caches = [cache for m in (model, draft) for cache in tqext.make_prompt_cache(m, guard=False)]
    options = dict(num_draft_tokens=n_draft, max_tokens=N_NEW, prompt_cache=caches)
    steps = speculative_generate_step(mx.array(tokens), model, draft, **options)
    got = [(int(token), from_draft) for token, _, from_draft in steps]
    assert [token for token, _ in got] == plain
    if draft_seed == 0:
        assert sum(from_draft for _, from_draft in got) > N_NEW // 2


def test_upgrade_in_the_middle_of_a_generation(model, expected):
    """The same list of caches, compressed between two steps."""
    tokens = prompt(N_PROMPT)
    cache = stock_cache(model)
    first = greedy(model, tokens, 20, cache=cache)
    assert tqext.upgrade(cache, "tq4", model=model) is cache
    assert all(type(c) is TurboQuantKVCache for c in cache)
    assert cache[0].offset == N_PROMPT + 20
    assert cache[0].n_coded > 0
    twin = tqext.make_prompt_cache(model, "tq4")
    logits_after(model, twin, [*tokens, *first][: cache[0].offset])
    following = [first[-1]]
    got, reference = (logits_after(model, c, following) for c in (cache, twin))
    assert kl(reference, got) < 0.1


def test_upgrade_leaves_other_layers_alone(model):
    cache = stock_cache(model)
    cache[1] = stock.RotatingKVCache(max_size=64)
    logits_after(model, cache, prompt(80))
    with pytest.warns(UserWarning, match="left out by the policy"):
        tqext.upgrade(cache, get_policy("tq3", first_last=1))
    assert [type(c).__name__ for c in cache] == ["KVCache", "RotatingKVCache", "KVCache"]
    tqext.upgrade(cache)
    assert [type(c).__name__ for c in cache] == ["TurboQuantKVCache", "RotatingKVCache", "TurboQuantKVCache"]


# Probe and path proof


def test_probe_computes_nothing(model):
    mx.clear_cache()
    mx.reset_peak_memory()
    active = mx.get_active_memory()
    report = tqext.probe(model)
    assert mx.get_peak_memory() - active < 100_000
    assert len(report.compressed) == 3
    assert "3 of 3 layers compressed" in str(report)
    per_token = 3 * 2 * Recipe().bytes_per_token(64)
    assert f"{per_token} bytes per token instead of {3 * 2 * 128 * 2}" in str(report)


def test_a_generation_compiles_no_metal_kernel():
    """Those of its model are there with its first cache; on the CPU and on CUDA there are none."""
    model = tqext.attach(make_llama(7), "tq3", guard=False)
    cache = model.make_cache()
    compiled = pipelines()
    assert compiled or mx.default_device() == mx.cpu or not mx.metal.is_available()
    greedy(model, prompt(N_PROMPT), N_NEW, cache)
    assert [x["name"] for x in pipelines()[len(compiled) :]] == []


def test_probe_gives_reasons():
    class Manual(qwen2.Model):
        """Computes with the keys itself in its second layer."""

        def __call__(self, inputs, cache=None):
            h = self.model.embed_tokens(inputs)
            for i, (layer, c) in enumerate(zip(self.layers, cache, strict=True)):
                if i == 1:
                    keys, values = c.update_and_fetch(mx.ones((1, 2, h.shape[1], 64)), mx.ones((1, 2, h.shape[1], 64)))
                    h = h + (mx.softmax(keys.sum(axis=-1, keepdims=True) * values, axis=-1)).sum()
                else:
                    h = layer(h, "causal" if h.shape[1] > 1 else None, c)
            return self.lm_head(h)

    mx.random.seed(0)
    report = tqext.probe(Manual(qwen2.ModelArgs.from_dict(CONFIG | {"rope_theta": 1e4})))
    assert [layer.recipe is not None for layer in report.layers] == [True, False, True]
    assert "computes with the keys itself" in report.layers[1].reason
    assert "AttributeError" in report.layers[1].reason


def test_verify_passes_and_changes_nothing(model, expected):
    report = tqext.verify(model, **PATH_ONLY)
    assert len(report.compressed) == 3
    assert greedy(model, prompt(N_PROMPT), N_NEW) == expected


def test_verify_finds_a_layer_that_does_not_read_its_codes(model, monkeypatch):
    def blind(self, queries, *args):
        return mx.zeros(queries.shape)

    monkeypatch.setattr("tqext.cache.Snapshot._attend_whole", blind)
    with pytest.raises(PathError, match=r"layer 0: overwriting its codes leaves the logits as they were"):
        tqext.verify(model, **PATH_ONLY)


def test_verify_finds_bytes_that_no_token_owns(model, monkeypatch):
    def whole_tail(self):
        snapshot = cut(self)
        snapshot.tail = self._tail.cut(0, self.n_tail + 1)
        return snapshot

    cut = TurboQuantKVCache._snapshot
    monkeypatch.setattr(TurboQuantKVCache, "_snapshot", whole_tail)
    with pytest.raises(PathError, match="belong to no token"):
        tqext.verify(model, **PATH_ONLY)


@pytest.mark.parametrize(
    "changes",
    [
        dict(tail=300),
        dict(first=370),
        dict(means=False, tail=0, first=0),
        dict(layers={1: Recipe(tail=250)}),
    ],
    ids=lambda changes: " ".join(changes),
)
def test_verify_takes_a_prompt_that_the_recipes_encode(model, changes):
    """However many tokens stay exact."""
    assert len(tqext.verify(model, **(PATH_ONLY | changes)).compressed) == 3


def test_verify_needs_codes(model):
    with pytest.raises(PathError, match="nothing was encoded after 20 tokens"):
        tqext.verify(model, n_tokens=20, **PATH_ONLY)


# Key bias


def bias_costs(bias_norm, gain, presets):
    """Mean KL to the uncompressed cache, token by token."""
    model = make_biased_qwen2(bias_norm, gain)
    tokens = prompt(300)
    reference = logits_after(model, stock_cache(model), tokens)
    costs = []
    for preset in presets:
        got = logits_after(model, tqext.make_prompt_cache(model, preset), tokens, chunk=1)
        assert mx.isfinite(got).all()
        costs.append(kl(reference, got))
    return costs


@pytest.mark.parametrize("bias_norm", [200.0, 500.0])
def test_large_key_bias_is_taken_out(bias_norm):
    """Qwen2.5-style keys: a tenth of the error of plain 3-bit coding, and no NaN."""
    mean_removed, plain = bias_costs(bias_norm, 1.6, ("tq3", "tq3-plain"))
    assert mean_removed <= plain / 10, (mean_removed, plain)


@pytest.mark.parametrize("gain", [1.0, 1.6, 2.5])
def test_large_key_bias_costs_no_more_than_none(gain):
    """However sharp the model: what the codes cost is what they cost without the bias."""
    (without,), (with_bias,) = (bias_costs(norm, gain, ("tq3",)) for norm in (0.0, 500.0))
    assert abs(with_bias / without - 1) < 0.1, (with_bias, without)


# Pipelines


def test_keys_can_be_set_for_pipelines(model):
    """Pipeline models hang a dependency on the last cache's keys."""
    for cache in (tqext.make_prompt_cache(model)[0], BatchTurboQuantKVCache([0])):
        cache.update_and_fetch(mx.ones((1, 2, 100, 64)), mx.ones((1, 2, 100, 64)))
        before = cache.state
        cache.keys = mx.depends(cache.keys, mx.ones((3,)))
        for a, b in zip(cache.state, before, strict=True):
            assert not isinstance(a, mx.array) or mx.array_equal(a, b)

"""Models with latent attention: their latents are coded, their rotary keys are not, and prompts come in pieces."""

import copy
import re
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.generate import batch_generate, generate_step
from mlx_lm.models import cache as stock_caches
from mlx_lm.models.cache import KVCache, load_prompt_cache, save_prompt_cache
from mlx_lm.models.mla import MultiLinear

import tqext
import zoo
from support import error_line, to_numpy
from tiny import Words, greedy, logits_after, make_llama
from tqext.commands.plan import plan, quality
from tqext.kv import ForkedKVCache, fork, latent
from tqext.kv.latent import BatchTurboQuantLatentCache, LatentCodec, TurboQuantLatentCache, latent_recipe
from tqext.mlx_lm import stock_cache
from tqext.mlx_lm.caches import members, replaced
from tqext.mlx_lm.prefix_store import PrefixStore

pytestmark = pytest.mark.usefixtures("uninstalled")
TOKENS = [37 * i % 127 + 1 for i in range(400)]
N_PROMPT = 200
# A draft, single tokens, a follow-up as long as a prompt, a token.
AFTER = ((200, 204), (204, 205), (205, 206), (206, 296), (296, 297))
SHORT = {"tail": 20, "first": 4, "guard": False}
# MLX's experts run in fp32 alone on CPUs.
DENSE = {"first_k_dense_replace": 4}
# fp32 in another order.
SAME_BYTES = 3e-5


def make(kind="deepseek_v3", **changes):
    return zoo.make(kind, {**zoo.LATENT[kind][1], **changes})


def size(x):
    return float(x.square().mean().sqrt().item())


def latents_of(caches):
    return {path: cache for path, cache in members(caches) if type(cache) is TurboQuantLatentCache}


def decoded(cache):
    """mlx-lm's cache of what the bytes of a compressed one stand for."""
    first, tail = cache.exact_parts()
    coded = cache._codec.decode(cache._packed, 0, cache.n_coded, *(x.dtype for x in tail))
    out = KVCache()
    parts = [first, coded, tail] if first is not None else [coded, tail]
    out.update_and_fetch(*(mx.concatenate(x, axis=2) for x in zip(*parts, strict=True)))
    return out


def on_decoded(caches):
    """A copy of a prompt cache with mlx-lm's caches of the same bytes in it."""
    return replaced(copy.deepcopy(caches), lambda _, c: decoded(c) if isinstance(c, TurboQuantLatentCache) else c)


def after(model, cache, spans=AFTER):
    return mx.concatenate([logits_after(model, cache, TOKENS[a:b]) for a, b in spans])


@pytest.mark.parametrize("kind", zoo.LATENT)
def test_model_compresses_its_latents(kind, monkeypatch):
    """On the same bytes a compressed cache answers as mlx-lm's, whatever the steps, and more bits are closer to it."""
    model = make(kind)
    report = tqext.probe(model, "tq4")
    assert len(report.compressed) == zoo.LATENT[kind][0], str(report)
    assert all(layer.is_latent and layer.label == "L4" for layer in report.compressed)
    for layer in report.layers:
        assert layer.recipe is not None or layer.reason
    if kind in ("deepseek_v3", "mistral4"):
        tqext.verify(model, "tq4", balance=False, **SHORT)

    exact = stock_cache(model)
    want = logits_after(model, exact, TOKENS[:N_PROMPT])
    errors = []
    for preset in ("tq2", "tq4"):
        packed = tqext.make_prompt_cache(model, preset, **SHORT)
        got = logits_after(model, packed, TOKENS[:N_PROMPT])
        assert size(got - want) < SAME_BYTES * size(want), "the first prompt attends to itself exactly"
        assert {c.n_coded for c in latents_of(packed).values()} == {128}
        bytes_alone, pieces = on_decoded(packed), copy.deepcopy(packed)
        # No block is encoded but in the follow-up, whose logits do not see it.
        for a, b in AFTER[:4]:
            same = logits_after(model, bytes_alone, TOKENS[a:b])
            with monkeypatch.context() as small:
                small.setattr(latent, "PIECE_BYTES", 1 << 18)
                in_pieces = logits_after(model, pieces, TOKENS[a:b])
            got = logits_after(model, packed, TOKENS[a:b])
            assert size(got - same) < SAME_BYTES * size(same)
            assert size(in_pieces - got) < SAME_BYTES * size(got)
        errors.append(size(got - after(model, copy.deepcopy(exact), AFTER[:4])[-len(got) :]))
    assert errors[1] < errors[0]


def test_steps_find_what_single_tokens_find():
    """A step of 64 tokens, in which a block is encoded, is 64 steps."""
    model = make()
    packed = tqext.make_prompt_cache(model, "tq4", **SHORT)
    logits_after(model, packed, TOKENS[:150])
    one_by_one = copy.deepcopy(packed)
    got = logits_after(model, packed, TOKENS[150:214])
    want = mx.concatenate([logits_after(model, one_by_one, TOKENS[i : i + 1]) for i in range(150, 214)])
    assert {c.n_coded for c in packed} == {64} and {c.n_coded for c in one_by_one} == {128}
    assert size(got - want) < SAME_BYTES * size(want)


def test_drafts_are_trimmed():
    model = make()
    packed, plain = tqext.make_prompt_cache(model, "tq4", **SHORT), None
    logits_after(model, packed, TOKENS[:N_PROMPT])
    plain = copy.deepcopy(packed)
    logits_after(model, packed, TOKENS[300:340])
    assert stock_caches.can_trim_prompt_cache(packed)
    stock_caches.trim_prompt_cache(packed, 40)
    same, got = (logits_after(model, c, TOKENS[200:203]) for c in (plain, packed))
    assert size(got - same) < SAME_BYTES * size(same)
    stock_caches.trim_prompt_cache(packed, 60)  # into a block
    assert {c.offset for c in packed} == {143} and {c.n_coded for c in packed} == {128}
    assert np.isfinite(to_numpy(logits_after(model, packed, TOKENS[143:150]))).all()


def test_sparse_attention_reads_the_tokens_that_its_indexer_picks():
    """DeepSeek V3.2 gathers latents for a single token, once there are more of them than it wants."""
    model = make("deepseek_v32", index_topk=48)
    packed = tqext.make_prompt_cache(model, "tq3", **SHORT)
    logits_after(model, packed, TOKENS[:N_PROMPT])
    plain = on_decoded(packed)
    spans = [(i, i + 1) for i in range(200, 205)]
    want, got = after(model, plain, spans), after(model, packed, spans)
    assert size(got - want) < SAME_BYTES * size(want)


def test_gathered_latents_are_those_of_all_parts():
    cache = TurboQuantLatentCache(tqext.Recipe(tail=20, first=4))
    x, rope = mx.random.normal((2, 1, 300, 64)), mx.random.normal((2, 1, 300, 8))
    for begin, end in ((0, 1), (1, 3), (3, 250), (250, 251), (251, 300)):
        tokens, _ = cache.update_and_fetch(x[:, :, begin:end], rope[:, :, begin:end])
        whole = mx.concatenate(list(latent.Latents(cache._snapshot())._pieces(64, lambda x: x)), axis=2)
        assert whole.shape == (2, 1, end, 64)
        if tokens.snapshot.earlier is None:
            at = mx.array(np.random.default_rng(end).permutation(end)[:17])[None, None, :, None]
            got = tokens.gathered(mx.broadcast_to(at, (2, 1, at.shape[2], 64)))
            whole = mx.concatenate(list(tokens._pieces(64, lambda x: x)), axis=2)
            np.testing.assert_allclose(to_numpy(got), to_numpy(mx.take(whole, at[0, 0, :, 0], axis=2)), rtol=1e-6, atol=1e-6)


def test_a_prompt_takes_memory_that_does_not_grow_with_the_history(monkeypatch):
    """What the heads make of the history would be 4 and 17 MB, and as much again its scores."""
    tqext.mlx_lm.hook()
    monkeypatch.setattr(latent, "PIECE_BYTES", 1 << 20)
    embed_q, unembed_out = MultiLinear(32, 64, 4), MultiLinear(64, 32, 4)
    queries = mx.random.normal((1, 4, 96, 32))
    taken = []
    with mx.stream(mx.cpu):
        for n_blocks in (64, 256):
            cache = TurboQuantLatentCache()
            for _ in range(n_blocks // 32):
                cache.update_and_fetch(mx.random.normal((1, 1, 2048, 64)), mx.random.normal((1, 1, 2048, 8)))
                mx.eval(cache.state)
            x, _ = cache.update_and_fetch(mx.random.normal((1, 1, 96, 64)), mx.random.normal((1, 1, 96, 8)))
            keys, values = embed_q(x, transpose=False), unembed_out(x)
            out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.1, mask="causal")
            mx.eval(cache.state, embed_q.parameters(), unembed_out.parameters(), queries)
            mx.synchronize()
            mx.clear_cache()
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            mx.eval(out)
            taken.append(mx.get_peak_memory() - before)
    assert max(taken) <= 1 << 20 and taken[1] <= 1.1 * taken[0], taken


def test_quantised_models_route_too():
    model = make(hidden_size=128)
    nn.quantize(model, group_size=32, bits=4, class_predicate=lambda path, module: "embed_q" in path or "unembed_out" in path)
    assert type(model.layers[0].self_attn.embed_q).__name__ == "QuantizedMultiLinear"
    packed = tqext.make_prompt_cache(model, "tq4", **SHORT)
    want = logits_after(model, stock_cache(model), TOKENS[:N_PROMPT])
    assert size(logits_after(model, packed, TOKENS[:N_PROMPT]) - want) < SAME_BYTES * size(want)
    assert {c.n_coded for c in packed} == {128}
    plain = on_decoded(packed)
    want, got = after(model, plain), after(model, packed)
    assert size(got[:6] - want[:6]) < SAME_BYTES * size(want)


def test_half_precision_models_generate():
    model = make(**DENSE)
    model.set_dtype(mx.bfloat16)
    tqext.attach(model, "tq4", **SHORT)
    cache = stock_caches.make_prompt_cache(model)
    made = [token for token, _ in generate_step(mx.array(TOKENS[:N_PROMPT]), model, max_tokens=80, prompt_cache=cache)]
    assert len(made) == 80 and {type(c) for c in cache} == {TurboQuantLatentCache}
    assert {c.n_coded for c in cache} == {192} and cache[0]._packed[2].dtype == mx.bfloat16
    again = tqext.make_prompt_cache(model, "tq4", **SHORT)
    assert made == [t for t, _ in generate_step(mx.array(TOKENS[:N_PROMPT]), model, max_tokens=80, prompt_cache=again)]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("n", [0, 10, 200])
def test_latent_caches_are_saved(tmp_path, dtype, n):
    model = make(**DENSE)
    model.set_dtype(dtype)
    packed = tqext.make_prompt_cache(model, "tq3", **SHORT)
    if n:
        logits_after(model, packed, TOKENS[:n])
    save_prompt_cache(str(tmp_path / "c.safetensors"), packed)
    loaded = load_prompt_cache(str(tmp_path / "c.safetensors"))
    assert [repr(c) for c in loaded] == [repr(c) for c in packed]
    span = TOKENS[n : n + 3]
    np.testing.assert_array_equal(*(to_numpy(logits_after(model, c, span)) for c in (loaded, packed)))


def test_state_is_of_latents_alone():
    packed = TurboQuantLatentCache()
    packed.update_and_fetch(mx.ones((1, 1, 200, 64)), mx.ones((1, 1, 200, 8)))
    plain = tqext.TurboQuantKVCache()
    plain.update_and_fetch(mx.ones((1, 1, 200, 64)), mx.ones((1, 1, 200, 8)))
    for cls, state in ((tqext.TurboQuantKVCache, packed.state), (TurboQuantLatentCache, plain.state)):
        with pytest.raises(ValueError, match=r"^\[TurboQuantKVCache\] state: expected a cache of .+, got one of .+"):
            cls.from_state(state)
    damaged = packed.state
    damaged[3] = damaged[3] + 1  # the rotary keys of coded tokens
    with pytest.raises(ValueError, match="checksum"):
        TurboQuantLatentCache.from_state(damaged)
    with pytest.raises(ValueError, match="arrays after the header"):
        TurboQuantLatentCache.from_state(packed.state[:-1])


def test_upgrade_compresses_the_latents_of_a_conversation():
    model = make()
    stock = stock_cache(model)
    logits_after(model, stock, TOKENS[:N_PROMPT])
    exact = copy.deepcopy(stock)
    tqext.upgrade(stock, "tq4", model=model, **SHORT)
    assert {type(c) for c in stock} == {TurboQuantLatentCache} and {c.n_coded for c in stock} == {128}
    want, got = (logits_after(model, c, TOKENS[200:204]) for c in (exact, stock))
    assert size(got - want) < 0.2 * size(want)


def test_prefixes_of_latents_are_stored(tmp_path):
    model = tqext.attach(make(), "tq4", **SHORT)
    cache = stock_caches.make_prompt_cache(model)
    logits_after(model, cache, TOKENS[:N_PROMPT])
    with PrefixStore(tmp_path / "store") as store:
        store.save(model, TOKENS[:N_PROMPT], cache)
        store.flush()
        found, n = store.fetch(model, [*TOKENS[:N_PROMPT], 5, 6])
    assert {type(c) for c in found} == {TurboQuantLatentCache}
    assert N_PROMPT >= n == found[0].offset > 100
    stock_caches.trim_prompt_cache(cache, cache[0].offset - n)
    want, got = (logits_after(model, c, [5, 6]) for c in (cache, found))
    assert size(got - want) < SAME_BYTES * size(want)


def test_calibration_and_guard():
    """The guard sees the error of latents as scores and values; a scale that fp16 does not hold is refused."""
    model = make()
    report = tqext.attach(model, "tq2") and stock_caches.make_prompt_cache(model) and tqext.mlx_lm.report(model)
    errors = [layer.calibration for layer in report.layers]
    assert all(c is not None and c.accurate and 0 < c.output_error < 1 and c.score_error > 0 for c in errors)
    finer = tqext.calibrate(model, "tq4").layers
    assert all(finer[x.path, latent_recipe(tqext.get_policy("tq4").recipe)].output_error < 0.5 * c.output_error
               for x, c in zip(report.layers, errors, strict=True))  # fmt: skip
    wide = make()
    for layer in wide.layers:
        layer.self_attn.kv_a_layernorm.weight = layer.self_attn.kv_a_layernorm.weight * 1e5
    tqext.attach(wide, "tq4")
    caches = stock_caches.make_prompt_cache(wide)
    assert {type(c) for c in caches} == {KVCache}
    assert "4-bit latents" in str(tqext.mlx_lm.report(wide))


def test_error_of_calibration_is_that_of_the_attention():
    """Against float64 over the same tokens: the errors are those of the last queries of the prompt."""
    model = make()
    recipe = latent_recipe(tqext.get_policy("tq3").recipe)
    cache = stock_cache(model)
    from tqext.calibration import N_LEFT_OUT, N_QUERIES, prompt

    logits_after(model, cache, prompt(model)[0].tolist())
    x = cache[0].keys[:, :, N_LEFT_OUT : cache[0].offset]
    codec = LatentCodec(recipe, 64, 16)
    coded = codec.decode(codec.encode(tqext.kv.tokens.Exact(x, x[..., :16])), 0, x.shape[2], mx.float32, mx.float32).keys
    attention = model.layers[0].self_attn
    hidden = model.layers[0].input_layernorm(model.model.embed_tokens(prompt(model)))[:, -N_QUERIES:]
    q = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(hidden)))
    q = q.reshape(1, N_QUERIES, attention.num_heads, -1).swapaxes(1, 2)
    nope, rope = mx.split(q, [attention.qk_nope_head_dim], axis=-1)
    rope = attention.rope(rope, 512 - N_QUERIES)
    k_rope = cache[0].values[:, :, N_LEFT_OUT:512]
    q = to_numpy(attention.embed_q(nope)).astype(np.float64)[0] * attention.scale
    bias = to_numpy(rope).astype(np.float64)[0] * attention.scale @ to_numpy(k_rope).astype(np.float64)[0].swapaxes(-1, -2)
    seen = np.tril(np.ones((N_QUERIES, x.shape[2])), x.shape[2] - N_QUERIES) > 0
    old, new = (to_numpy(y)[0, 0].astype(np.float64) for y in (x, coded))
    weights = []
    for y in (old, new):
        scores = np.where(seen, q @ y.T + bias, -np.inf)
        weights.append(np.exp(scores - scores.max(-1, keepdims=True)))
        weights[-1] /= weights[-1].sum(-1, keepdims=True)
    change = weights[1] @ new - weights[0] @ old
    want = np.sqrt((change**2).sum() / (weights[0] @ (old**2).sum(-1)).sum())
    found = tqext.calibrate(model, "tq3").layers["0", recipe]
    assert abs(found.output_error - want) < 2e-3 * want
    change = q @ (new - old).T
    change -= change.mean(-1, keepdims=True)
    assert abs(found.score_error - np.sqrt((change**2).mean())) < 2e-3 * found.score_error


def test_what_latents_cannot_do_is_said():
    model = make()
    with pytest.raises(ValueError, match=error_line("make_prompt_cache", "max_kv_size")):
        tqext.make_prompt_cache(model, max_kv_size=512)
    for preset, why in (("tq3-qjl", "residual signs"), ("polarquant", "dense")):
        report = tqext.probe(model, preset)
        assert not report.compressed and all(why in layer.reason for layer in report.layers)
    plain = tqext.TurboQuantKVCache(tqext.Recipe(balance=False, value_bits=3, value_coding="lloyd"))
    full = tqext.make_prompt_cache(model, **SHORT)
    logits_after(model, full, TOKENS[:N_PROMPT])
    with pytest.raises(ValueError, match=error_line("fork", "cache")):
        ForkedKVCache(full[0], 2)
    assert {type(c) for c in fork(full, 2)} == {BatchTurboQuantLatentCache}  # a copy for each sequence
    with pytest.raises(ValueError, match="caches of one kind"):
        TurboQuantLatentCache.merge([TurboQuantLatentCache(), plain])
    tokens, _ = TurboQuantLatentCache().update_and_fetch(mx.ones((1, 1, 3, 32)), mx.ones((1, 1, 3, 8)))
    q = mx.ones((1, 4, 1, 32))
    with pytest.raises(TypeError, match="the latents that are the keys"):
        mx.fast.scaled_dot_product_attention(q, tokens, q, scale=1.0)
    keys = model.layers[0].self_attn.embed_q
    with pytest.raises(TypeError, match="made of the keys' latents"):
        mx.fast.scaled_dot_product_attention(q, keys(tokens, transpose=False), q, scale=1.0)
    with pytest.raises(TypeError, match="axis 2"):
        mx.take_along_axis(tokens, mx.zeros((1, 1, 1, 1), mx.int32), axis=1)
    with pytest.raises(TypeError, match="rotary keys"):
        mx.concatenate([keys(tokens, transpose=False), q], axis=1)
    with pytest.raises(ValueError, match="Hadamard"):
        TurboQuantLatentCache().update_and_fetch(mx.ones((1, 1, 3, 288)), mx.ones((1, 1, 3, 8)))


@pytest.mark.parametrize("kind", ["deepseek_v3", "deepseek_v32", "mistral4", "kimi_linear"])
def test_batches_answer_as_alone(kind):
    """Prompts of unlike lengths, some with coded tokens and some without, through single tokens that encode blocks."""
    model = make(kind, **({"index_topk": 48} if kind == "deepseek_v32" else {}))
    tqext.attach(model, "tq4", **SHORT)
    prompts = [[(t * (i + 3)) % 127 + 1 for t in TOKENS[:n]] for i, n in enumerate((150, 7, 230, 90))]
    alone = [greedy(model, p, 70) for p in prompts]
    out = batch_generate(model, Words(), prompts, max_tokens=70, return_token_ids=True, return_prompt_caches=True)
    assert out.token_ids == alone
    for caches, p in zip(out.caches, prompts, strict=True):
        cache = latents_of(caches)
        assert cache and {c.offset for c in cache.values()} <= {len(p) + 69, len(p) + 70}


def test_a_batch_is_its_sequences():
    """Logits of drafts and follow-ups in a batch, after sequences left it and came to it, are those alone."""
    model = make()
    alone = [tqext.make_prompt_cache(model, "tq4", **SHORT) for _ in range(3)]
    for cache, n in zip(alone, (130, 9, 200), strict=True):
        logits_after(model, cache, TOKENS[:n])
    layers = [layer[0].merge(layer) for layer in zip(*copy.deepcopy(alone), strict=True)]

    def check(rows, span):
        want = [logits_after(model, alone[row], [(t + row) % 127 for t in span]) for row in rows]
        got = model(mx.array([[(t + row) % 127 for t in span] for row in rows]), cache=layers)
        for x, y in zip(got, want, strict=True):
            assert size(x - y) < SAME_BYTES * size(y)

    check([0, 1, 2], TOKENS[300:301])
    check([0, 1, 2], TOKENS[301:331])  # a block is encoded within it
    for layer in layers:
        layer.filter([2, 0])
    check([2, 0], TOKENS[331:333])
    others = [layer[0].merge(layer) for layer in zip(copy.deepcopy(alone[1]), strict=True)]
    for layer, other in zip(layers, others, strict=True):
        layer.extend(other)
    check([2, 0, 1], TOKENS[333:334])
    check([2, 0, 1], TOKENS[200:300])  # a prompt
    check([2, 0, 1], TOKENS[334:335])
    one = [layer.extract(1) for layer in layers]
    assert {type(c) for c in one} == {TurboQuantLatentCache} and [repr(c) for c in one] == [repr(c) for c in alone[0]]


def test_plan_and_the_page_have_the_bytes():
    """The plan of DeepSeek V3's attention in four layers, and the page's tables, from the sizes of published configurations."""
    model = make(kv_lora_rank=512, qk_rope_head_dim=64, num_attention_heads=2)
    model.set_dtype(mx.float16)
    plans = {name: plan(model, name).bytes_per_token for name in (None, "tq2", "tq3", "tq33", "tq4")}
    assert plans == {None: 4 * 1152, "tq2": 4 * 274, "tq3": 4 * 338, "tq33": 4 * 338, "tq4": 4 * 402}
    assert quality("tq4", 512, latent=True) == "not measured"
    text = (Path(__file__).parents[1] / "docs" / "latent_attention.md").read_text()
    rows = re.findall(r"^\| (.+) \| (\d+) \| ([\d.]+) GB \| ([\d.]+) GB \| ([\d.]+) GB \|$", text, re.MULTILINE)
    assert len(rows) == 5
    for name, layers, *shown in rows:
        dim = 256 if "256" in name else 512
        coded = [tqext.get_policy(preset).recipe.bytes_per_latent(dim) + 128 for preset in ("tq3", "tq4")]
        want = [int(layers) * n * 131072 / 1e9 for n in (2 * dim + 128, *coded)]
        assert [float(x) for x in shown] == [round(x, 2) for x in want], name


def test_hooks_are_given_back():
    from mlx_lm.models import mla

    before = mla.MultiLinear.__call__, mla.QuantizedMultiLinear.__call__, mx.take_along_axis, mx.concatenate
    tqext.install()
    assert mla.MultiLinear.__call__ is not before[0] and mx.concatenate is not before[3]
    tqext.uninstall()
    assert (mla.MultiLinear.__call__, mla.QuantizedMultiLinear.__call__, mx.take_along_axis, mx.concatenate) == before


def test_functions_of_mlx_are_replaced_for_latents_alone(monkeypatch):
    monkeypatch.setattr(latent.first_use, "_happened", False)
    before = mx.concatenate, mx.take_along_axis, MultiLinear.__call__
    tqext.make_prompt_cache(make_llama(), "tq3", guard=False)
    assert (mx.concatenate, mx.take_along_axis, MultiLinear.__call__) == before
    TurboQuantLatentCache()  # one from a file, say
    assert not {mx.concatenate, mx.take_along_axis, MultiLinear.__call__} & set(before)
    tqext.uninstall()
    assert (mx.concatenate, mx.take_along_axis, MultiLinear.__call__) == before

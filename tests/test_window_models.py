"""Models with sliding windows: their windows compressed, beside mlx-lm's own caches."""

import mlx.core as mx
import mlx_lm.models.cache as stock
import pytest
from mlx_lm.generate import BatchGenerator, speculative_generate_step

import tqext
import tqext.mlx_lm
import zoo
from tiny import logits_after, save_folder
from tqext import Recipe, TurboQuantKVCache, TurboQuantWindowKVCache, get_policy
from tqext.commands import cli, plan
from tqext.commands.metrics import holding
from tqext.commands.options import ArgumentParser, add_kv_options, policy_of
from tqext.mlx_lm import stock_cache
from tqext.mlx_lm.caches import members, replaced
from tqext.mlx_lm.windows import CLIENT_TOKENS, weight_bytes

pytestmark = pytest.mark.usefixtures("uninstalled")

WINDOW = 200
KINDS = {kind: {**zoo.SPECIAL[kind][1], "sliding_window": WINDOW} for kind in ("gemma3_text", "gpt_oss", "cohere2")}
# Layers that share keys and values with one in a window.
KINDS["gemma3n"] = {"text_config": {**zoo.GEMMA3N, "sliding_window": WINDOW}}
TOKENS = [37 * i % 127 + 1 for i in range(700)]
ON = {"guard": False, "balance": False, "windows": True}


def make(kind="gemma3_text", **changes):
    tqext.mlx_lm.hook()
    return zoo.make(kind, {**KINDS[kind], **changes})


def exact_windows(model):
    """Windows of this package whose tokens all stay exact, and mlx-lm's other caches."""

    def new(path, cache):
        if type(cache) is not stock.RotatingKVCache:
            return cache
        return TurboQuantWindowKVCache(cache.max_size, Recipe(first=0, tail=cache.max_size, balance=False))

    return replaced(type(model).make_cache(model), new)


def windows_of(cache):
    return [c for _, c in members(cache) if type(c) is TurboQuantWindowKVCache]


def decoded(cache):
    """mlx-lm's cache of what the bytes of a compressed one stand for."""
    packed = cache._snapshot()
    exact = [] if packed.first is None else [packed.first]
    coded = [tqext.dequantize(p) for p in (packed.packed_keys, packed.packed_values)]
    keys, values = (mx.concatenate(x, axis=2) for x in zip(*exact, coded, packed.tail, strict=True))
    if not cache.n_dropped:
        out = stock.KVCache()
        out.update_and_fetch(keys, values)
        return out
    out = stock.RotatingKVCache(WINDOW)
    out.update_and_fetch(keys[:, :, -WINDOW:], values[:, :, -WINDOW:])
    out.offset = cache.offset
    return out


def close(a, b):
    assert mx.abs(a - b).max() <= 2e-4 * mx.abs(b).max()


@pytest.mark.parametrize("kind", KINDS)
def test_windows_are_mlx_lms(kind):
    """Without codes the logits are the stock model's: prompts longer than the window, in chunks, follow-ups and steps."""
    model = make(kind)
    own, plain = exact_windows(model), stock_cache(model)
    assert windows_of(own)
    begin = 0
    for n in (150, 300, 1, 64, 1, 1, 30, 100):
        tokens = TOKENS[begin : begin + n]
        close(logits_after(model, own, tokens), logits_after(model, plain, tokens))
        begin += n
    assert all(c.n_dropped > 0 for c in windows_of(own))


@pytest.mark.parametrize("kind", ["gemma3_text", "gpt_oss"])
def test_batches_of_windows_are_mlx_lms(kind):
    """Requests of unlike lengths that come while others are decoded."""
    model = make(kind)

    def generated():
        batch = BatchGenerator(model, max_tokens=70, prefill_step_size=130)
        found = {}

        def step():
            for r in batch.next_generated():
                found.setdefault(r.uid, []).append(r.token)
            return len(found)

        batch.insert([TOKENS[:450], TOKENS[:20]])
        for _ in range(30):
            step()
        batch.insert([TOKENS[100:330], TOKENS[7:199]])
        before = -1
        while (now := sum(map(len, found.values()))) != before or now < 4 * 70:
            before = now
            step()
        return found

    plain = generated()
    model.make_cache = lambda: exact_windows(model)
    assert generated() == plain


def test_requests_of_a_batch_are_as_if_alone():
    """With codes: each one's cache is what it would be alone, and goes on in a follow-up."""
    model = tqext.attach(make(), "tq4", **ON)
    prompts = [TOKENS[:450], TOKENS[:20], TOKENS[100:330]]

    def caches_of(prompts, given=None):
        batch = BatchGenerator(model, max_tokens=70, prefill_step_size=1000)
        uids = batch.insert(prompts, caches=given)
        found = {}
        while len(found) < len(prompts):
            found.update((r.uid, r.prompt_cache) for r in batch.next_generated() if r.prompt_cache is not None)
        return [found[uid] for uid in uids]

    together = caches_of(prompts)
    for prompt, cache in zip(prompts, together, strict=True):
        alone = caches_of([prompt])[0]
        for a, b in zip(alone, cache, strict=True):
            assert type(a) is type(b)
            assert (a.offset, a.n_first, a.n_coded, a.n_tail) == (b.offset, b.n_first, b.n_coded, b.n_tail)
    more = caches_of([[5], TOKENS[:300], TOKENS[:40]], together)
    assert [c[0].offset - c[0].n_dropped for c in more] == [c[0].size() for c in more]
    assert all(type(c[0]) is TurboQuantWindowKVCache for c in more)


def test_codes_of_windows_are_what_the_logits_come_from():
    """As `verify` says; and what is coded acts on the logits as coding full attention does."""
    model = make()
    report = tqext.verify(model, "tq4", **ON)
    assert [layer.window for layer in report.compressed] == [WINDOW, None] * 2
    cache, plain = tqext.make_prompt_cache(model, "tq4", **ON), stock_cache(model)
    assert [type(c) for c in cache] == [TurboQuantWindowKVCache, TurboQuantKVCache] * 2
    a, b = (logits_after(model, c, TOKENS[:450]) for c in (cache, plain))
    close(a, b)  # a prompt finds itself exact
    assert all(0 < c.n_coded < WINDOW + 64 for c in windows_of(cache))
    on_decoded = [decoded(c) for c in cache]
    for tokens in (TOKENS[450:460], TOKENS[460:461]):
        a, b, c = (logits_after(model, x, tokens) for x in (cache, on_decoded, plain))
        close(a, b)
        assert mx.abs(a - c).max() > 1e-3 * mx.abs(c).max()


def test_a_layer_that_is_left_out_keeps_the_columns_of_the_others():
    model = make()
    cache = tqext.make_prompt_cache(model, "tq4", layers={0: None, 1: None}, **ON)
    assert [type(c) for c in cache] == [TurboQuantWindowKVCache, stock.KVCache, TurboQuantWindowKVCache, TurboQuantKVCache]
    logits_after(model, cache, TOKENS[:500])
    logits_after(model, cache, TOKENS[500:510])
    assert cache[0].n_coded == 0
    assert cache[2].n_coded > 0
    # None of them compressed: mlx-lm's own.
    cache = tqext.make_prompt_cache(model, "tq4", layers={0: None, 2: None}, **ON)
    assert type(cache[0]) is type(cache[2]) is stock.RotatingKVCache


def test_windows_that_cannot_be_compressed_say_why(monkeypatch):
    reasons = {layer.reason for layer in tqext.probe(zoo.make("gemma3_text", {}), windows=True).layers if layer.recipe is None}
    assert reasons == {"a sliding window of 16 tokens leaves no room for codes beside the exact ones"}
    model = make()
    reasons = {layer.reason for layer in tqext.probe(model, windows=False).layers if layer.recipe is None}
    assert reasons == {"a sliding window is small already"}
    call = type(model.model).__call__
    monkeypatch.setattr(
        type(model.model), "__call__", lambda self, *a, **k: (setattr(self, "window_size", 90), call(self, *a, **k))[1]
    )
    report = tqext.probe(model, windows=True)
    reasons = [layer.reason for layer in report.layers if layer.recipe is None]
    other = "the model asks for another mask than that of a sliding window"
    assert reasons == [other, f"a sliding window like that of layer 0: {other}"]


def test_windows_are_compressed_where_that_saves_a_fifth():
    """Of the weights and the caches of all clients, 4096 tokens each; the switch goes both ways."""
    model = make(max_position_embeddings=8192)
    weights = weight_bytes(model)
    plain, packed = (tqext.probe(model, windows=on) for on in (False, True))
    window = sum(layer.stock_nbytes_at(CLIENT_TOKENS) for layer in plain.layers if layer.window)
    saved = window - sum(layer.nbytes_at(CLIENT_TOKENS) for layer in packed.layers if layer.window)
    each = plain.nbytes_at(CLIENT_TOKENS) + window
    # clients * saved = weights / 5 + clients * each / 5
    least = weights / 5 / (saved - each / 5)
    assert 0 < saved < each
    if least > 0:
        assert len(tqext.probe(model, clients=int(least) + 1).compressed) == 4
        below = tqext.probe(model, clients=max(1, int(least)))
        assert len(below.compressed) == 2
        share = 100 * saved / (weights + each)
        assert f"windows=True would save {share:.0f}% of the memory of one client" in str(tqext.probe(model))
    assert len(packed.compressed) == 4
    assert ", 2 sliding windows in " in str(packed)
    with pytest.raises(ValueError, match="windows: expected None, True or False, got auto"):
        tqext.probe(model, windows="auto")
    with pytest.raises(ValueError, match="clients: expected at least 1, got 0"):
        tqext.probe(model, clients=0)


def test_bytes_of_windows_are_those_of_the_caches():
    layer = tqext.probe(make(), "tq3", **ON).layers[0]
    cache = TurboQuantWindowKVCache(WINDOW, layer.recipe)
    x = mx.zeros((1, layer.n_kv_heads, 1, layer.head_dim))
    n_compared = 0
    for n in range(1, 600):
        cache.update_and_fetch(x, x)
        if cache.n_tail < layer.recipe.tail + 64:  # else a block waits for the next token
            n_compared += 1
            assert cache.used_nbytes == layer.nbytes_at(n)
    assert n_compared > 500
    assert layer.stock_nbytes_at(600) == layer.fp16_nbytes_at(600) * 2 == WINDOW * layer.exact_bytes_per_token


def test_upgrade_takes_windows_over():
    """In the middle of a generation, before and after tokens have left."""
    model = make()
    for n in (100, 450):
        plain = stock_cache(model)
        logits_after(model, plain, TOKENS[:n])
        cache = tqext.upgrade([*stock_cache(model)], "tq4", model=model, **ON)
        logits_after(model, cache, TOKENS[:n])
        taken = stock_cache(model)
        logits_after(model, taken, TOKENS[:n])
        tqext.upgrade(taken, "tq4", model=model, **ON)
        assert [type(c) for c in taken] == [TurboQuantWindowKVCache, TurboQuantKVCache] * 2
        assert [c.offset for c in taken] == [n] * 4
        for tokens in (TOKENS[n : n + 1], TOKENS[n : n + 80]):
            a, b, c = (logits_after(model, x, tokens) for x in (cache, taken, plain))
            assert mx.abs(b - c).mean() < 2 * mx.abs(a - c).mean() + 1e-3
    with pytest.warns(UserWarning, match="sliding window"):
        tqext.upgrade([stock.RotatingKVCache(400)])
    assert type(tqext.upgrade([stock.RotatingKVCache(400)], windows=True)[0]) is TurboQuantWindowKVCache


def test_drafts_go_beyond_the_window():
    """mlx-lm's own windows forget no wrong draft once they are full; these do, or say that they cannot."""
    model, draft = make(), zoo.make("llama", {})
    cache = exact_windows(model)

    def generated(tokens, n):
        return [int(t) for t, *_ in speculative_generate_step(tokens, model, draft, prompt_cache=cache_of(), max_tokens=n)]

    def cache_of():
        return [*exact_windows(model), *stock_cache(draft)]

    tokens = mx.array(TOKENS[:190])
    found = generated(tokens, 90)
    expected, last = [], tokens
    for _ in range(90):
        last = mx.argmax(logits_after(model, cache, last.tolist())[-1], keepdims=True)
        expected.append(last.item())
    assert found == expected
    # A draft model's own windows moved on a token at a time.
    windows = [TurboQuantWindowKVCache(150, Recipe(first=0, tail=20, balance=False))]
    for _ in range(300):
        windows[0].update_and_fetch(mx.ones((1, 1, 1, 64)), mx.ones((1, 1, 1, 64)))
    with pytest.raises(
        ValueError, match=r"\[trim_prompt_cache\] num_tokens: expected tokens whose sliding window is still held"
    ):
        stock.trim_prompt_cache(windows, 130)


def test_saved_windows_come_back(tmp_path):
    model = make()
    cache = tqext.make_prompt_cache(model, "tq3", **ON)
    logits_after(model, cache, TOKENS[:500])
    file = str(tmp_path / "cache.safetensors")
    stock.save_prompt_cache(file, cache)
    loaded = stock.load_prompt_cache(file)
    assert [type(c) for c in loaded] == [TurboQuantWindowKVCache, TurboQuantKVCache] * 2
    for tokens in (TOKENS[500:501], TOKENS[501:570]):
        assert mx.array_equal(*(logits_after(model, c, tokens) for c in (cache, loaded)))


def test_the_plan_counts_windows_and_clients(tmp_path, capsys):
    model = make(max_position_embeddings=8192)
    none, off, on = (plan.plan(model, p, 3) for p in (None, get_policy("tq3", windows=False), get_policy("tq3", windows=True)))
    window = 2 * WINDOW * 2 * 64 * 4  # layers, tokens, heads of keys and values, bytes
    assert none.windows == off.windows == window
    assert on.windows < 0.75 * window
    assert (off.bytes_per_token, off.fixed) == (on.bytes_per_token, on.fixed)
    assert off.nbytes(1000) - on.nbytes(1000) == 3 * (window - on.windows)
    cache = tqext.make_prompt_cache(model, "tq3", **ON)[0]
    sizes = []
    for _ in range(500):
        cache.update_and_fetch(*[mx.zeros((1, 2, 1, 32))] * 2)
        sizes.append(cache.used_nbytes)
    assert max(sizes[2 * WINDOW :]) <= on.windows / 2 + 4 * 2 * 64  # a block that waits for the next token is a token longer
    assert on.longest(on.nbytes(777)) == 777

    folder = save_folder(model, tmp_path / "model", zoo.SIZES | KINDS["gemma3_text"] | {"model_type": "gemma3_text"})
    for windows in ("on", "off"):
        args = ["--context", "900", "--clients", "3", "--kv", "tq3", "--kv-windows", windows]
        cli.main(["plan", "--model", str(folder), "--memory", "1GB", *args])
        out = capsys.readouterr().out
        assert " 3 times 900 tokens" in out
        expected = (on if windows == "on" else off).windows
        assert (
            f"sliding windows, MB for each client when they are full: none {window / 1e6:.1f}, tq3 {expected / 1e6:.1f}" in out
        )


def test_the_servers_clients_are_those_it_decodes_at_once():
    assert [cli._n_clients(args) for args in ([], ["--decode-concurrency", "7"], ["--decode-concurrency=x"])] == [32, 7, 32]
    parser = ArgumentParser()
    add_kv_options(parser)
    for args, windows in (([], None), (["--kv-windows", "on"], True), (["--kv-windows", "off"], False)):
        policy = policy_of(parser.parse_args(args), 7)
        assert (policy.windows, policy.clients) == (windows, 7)


def test_metrics_count_the_tokens_of_layers_that_keep_them():
    model = make()
    cache = tqext.make_prompt_cache(model, "tq3", **ON)
    logits_after(model, cache, TOKENS[:500])
    held = holding(cache)
    assert (held.n_coded, held.n_exact) == (cache[1].n_coded, cache[1].n_exact)
    assert held.n_coded + held.n_exact == 500
    assert held.used == sum(c.used_nbytes for c in cache)
    batch = holding([c.merge([c, c]) for c in cache], 2)
    assert batch.n_coded == 2 * held.n_coded

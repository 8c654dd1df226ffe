"""What tqext replaces in MLX and mlx-lm: every use finds it, nothing of it is left behind, and no request passes it by.

Without the guard, which would leave layers of these sharp models uncompressed.
"""

import copy
import gc
import importlib
import sys
import threading
import types

import mlx.core as mx
import mlx_lm.models.cache as stock
import mlx_lm.utils
import pytest
from mlx_lm.generate import BatchGenerator, generate_step

import q1_models
import tqext
import tqext.mlx_lm
from tiny import greedy, logits_after, make_llama, make_qwen2, prompt, save_chat_folder, save_folder
from tqext import BatchTurboQuantKVCache, TurboQuantKVCache, nn, one_bit
from tqext.mlx_lm import stock_cache

# `mlx_lm.generate` is the function.
generate, server = (importlib.import_module(f"mlx_lm.{name}") for name in ("generate", "server"))

pytestmark = pytest.mark.usefixtures("uninstalled")


@pytest.fixture(autouse=True)
def unhooked():
    yield
    one_bit.unhook()


@pytest.fixture
def model():
    return make_llama()


def kinds(cache):
    return {type(c) for c in cache}


def replaced():
    """All that tqext replaces, as it is now."""
    names = [(mx.fast, "scaled_dot_product_attention"), (mlx_lm.utils, "load_model")]
    names += [(stock, "save_prompt_cache"), *((module, "make_prompt_cache") for module in (stock, generate, server))]
    return [getattr(module, name) for module, name in names]


# Taking back


def test_uninstall_gives_everything_back(model):
    before, seen = replaced(), []
    tqext.install("tq3", guard=False)
    assert all(a is not b for a, b in zip(replaced(), before, strict=True))
    tqext.mlx_lm.on_cache(lambda report, cache: seen.append(report))
    stock.make_prompt_cache(model)
    assert len(seen) == 1
    assert stock.TurboQuantKVCache is TurboQuantKVCache and stock.BatchTurboQuantKVCache is BatchTurboQuantKVCache
    tqext.uninstall()
    assert replaced() == before
    assert not hasattr(stock, "TurboQuantKVCache") and not hasattr(stock, "BatchTurboQuantKVCache")
    assert kinds(stock.make_prompt_cache(model)) == {stock.KVCache}
    tqext.install("tq3", guard=False)
    stock.make_prompt_cache(model)
    assert len(seen) == 1


@pytest.mark.parametrize("first", ["kv", "1-bit"])
def test_one_bit_loading_outlives_uninstall(tmp_path, first):
    """Whichever of the two wrapped load_model first."""
    settings = q1_models.config()
    affine = q1_models.make_affine(q1_models.make_model(settings))
    q1_models.write_affine(tmp_path / "affine", settings, affine)
    model, tokenizer, config = tqext.load(str(tmp_path / "affine"), return_config=True)
    one_bit.save(tmp_path / "native", model, config, tokenizer)
    one_bit.unhook()
    before = mlx_lm.utils.load_model

    for step in ("kv", "1-bit") if first == "kv" else ("1-bit", "kv"):
        tqext.install("tq3", guard=False) if step == "kv" else one_bit.hook()
    loaded, _ = mlx_lm.utils.load(str(tmp_path / "native"))
    assert len(nn.q1_paths(loaded)) == 3 * 7 + 2
    assert kinds(stock.make_prompt_cache(loaded)) == {TurboQuantKVCache}
    tqext.uninstall()
    again, _ = mlx_lm.utils.load(str(tmp_path / "native"))
    assert len(nn.q1_paths(again)) == 3 * 7 + 2
    assert kinds(stock.make_prompt_cache(again)) == {stock.KVCache}
    one_bit.unhook()
    assert mlx_lm.utils.load_model is before


@pytest.mark.parametrize(
    "module, name", [(mlx_lm.utils, "load_model"), (stock, "make_prompt_cache"), (stock, "save_prompt_cache")]
)
def test_uninstall_refuses_whole_when_another_wrapped_a_hook(model, module, name):
    tqext.install("tq3", guard=False)
    stock.make_prompt_cache(model)
    ours = getattr(module, name)
    setattr(module, name, lambda *args, **kwargs: ours(*args, **kwargs))
    with pytest.raises(RuntimeError, match=rf"{name} was replaced again"):
        tqext.uninstall()
    assert kinds(stock.make_prompt_cache(model)) == {TurboQuantKVCache}
    setattr(module, name, ours)
    tqext.uninstall()


def test_detach_gives_the_models_own_make_cache_back(model):
    def own():
        return [stock.RotatingKVCache(64), stock.KVCache(), stock.KVCache()]

    cls = type(model)
    model.make_cache = own
    tqext.attach(model, "tq3", guard=False)
    tqext.attach(model, "tq4", guard=False)
    assert [type(c) for c in stock_cache(model)] == [stock.RotatingKVCache, stock.KVCache, stock.KVCache]
    assert [type(c) for c in model.make_cache()] == [stock.RotatingKVCache, TurboQuantKVCache, TurboQuantKVCache]
    assert model.make_cache()[1].recipe.key_bits == 4
    tqext.detach(model)
    assert model.make_cache is own and type(model) is cls
    tqext.detach(model)
    assert model.make_cache is own


def test_a_class_own_make_cache_is_asked(monkeypatch):
    model = make_llama()
    monkeypatch.setattr(type(model), "make_cache", lambda self: [stock.KVCache(), stock.RotatingKVCache(9)], raising=False)
    tqext.attach(model, guard=False)
    assert [type(c) for c in stock_cache(model)] == [stock.KVCache, stock.RotatingKVCache]


def test_attach_refuses_what_is_no_model():
    with pytest.raises(ValueError, match=r"\[attach\] model: expected a model of mlx.nn, got SimpleNamespace"):
        tqext.attach(types.SimpleNamespace(layers=[]))


# Memory


@pytest.mark.parametrize("how", ["attach", "install"])
def test_an_unloaded_model_frees_its_weights_at_once(how):
    """Without a garbage collection, as without tqext."""
    gc.collect()
    gc.disable()
    try:
        before = mx.get_active_memory()
        model = make_llama(hidden_size=256, vocab_size=8000)
        tqext.attach(model, guard=False) if how == "attach" else tqext.install(guard=False)
        cache = stock.make_prompt_cache(model)
        assert kinds(cache) == {TurboQuantKVCache}
        mx.eval(model(mx.array([[1, 2, 3]]), cache=cache))
        size = mx.get_active_memory() - before
        assert size > 8e6
        del model, cache
        assert mx.get_active_memory() - before < 0.05 * size
    finally:
        gc.enable()


def test_a_copy_of_a_model_is_attached_to_itself():
    model = tqext.attach(make_llama(), "tq4", guard=False)
    stock.make_prompt_cache(model)
    other = copy.deepcopy(model)
    other.lm_head.weight = other.lm_head.weight * 0
    del model
    assert greedy(other, prompt(50), 3) == [0, 0, 0]
    assert kinds(stock.make_prompt_cache(other)) == {TurboQuantKVCache}
    tqext.detach(other)
    assert kinds(stock.make_prompt_cache(other)) == {stock.KVCache}


# Nothing passes by


def test_install_reaches_models_that_are_loaded_already(model):
    kept, attached = make_llama(1), tqext.attach(make_llama(2), "tq4", guard=False)
    tqext.detach(kept)
    tqext.install("tq3", tail=40, guard=False)
    cache = generate.make_prompt_cache(model)
    assert kinds(cache) == {TurboQuantKVCache} and cache[0].recipe.tail == 40
    tqext.install("tq3", tail=50, guard=False)
    assert stock.make_prompt_cache(model)[0].recipe.tail == 50
    assert kinds(stock.make_prompt_cache(kept)) == {stock.KVCache}
    assert stock.make_prompt_cache(attached)[0].recipe.key_bits == 4


@pytest.mark.parametrize("how", ["install", "attach", "neither", "detach"])
def test_without_a_preset_the_one_in_effect_is_meant(how):
    """`install("tq2")` and then `verify(model)`: the proof is of the caches that generations get."""
    model = make_llama()  # loaded before
    if how in ("install", "detach"):
        tqext.install("tq2", guard=False)
    if how == "attach":
        tqext.attach(model, "tq2", guard=False)
    if how == "detach":
        tqext.detach(model)
    expected = "tq2" if how in ("install", "attach") else "tq3"
    recipe = tqext.PRESETS[expected].recipe
    assert {x.recipe for x in tqext.probe(model).compressed} == {recipe}
    assert {x.recipe for x in tqext.verify(model, guard=False).compressed} == {recipe}
    assert {recipe for _, recipe in tqext.calibrate(model).layers} >= {recipe}
    assert {cache.recipe for cache in tqext.make_prompt_cache(model, guard=False)} == {recipe}
    assert {cache.recipe for cache in tqext.upgrade(stock_cache(model), model=model, guard=False)} == {recipe}
    if how == "install":
        assert {cache.recipe for cache in stock.make_prompt_cache(model)} == {recipe}
        assert {cache.recipe for cache in tqext.upgrade(stock_cache(model))} == {recipe}
    assert {x.recipe for x in tqext.probe(model, "tq4").compressed} == {tqext.PRESETS["tq4"].recipe}
    assert {x.recipe.tail for x in tqext.probe(model, tail=9).compressed} == {9}


def test_install_is_seen_by_modules_that_imported_the_function_by_name(model):
    importer = types.ModuleType("an_engine")
    importer.make_prompt_cache = stock.make_prompt_cache
    sys.modules["an_engine"] = importer
    try:
        before = importer.make_prompt_cache
        tqext.install("tq3", guard=False)
        assert kinds(importer.make_prompt_cache(model)) == {TurboQuantKVCache}
        tqext.uninstall()
        assert importer.make_prompt_cache is before
    finally:
        del sys.modules["an_engine"]


@pytest.mark.parametrize("how", ["attach", "install"])
def test_threads_get_compressed_caches_only(model, how):
    tqext.attach(model, guard=False) if how == "attach" else tqext.install(guard=False)
    seen, errors = set(), []

    def work():
        try:
            for _ in range(100):
                seen.update(kinds(stock.make_prompt_cache(model)))
        except Exception as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            stock_cache(model)
            if how == "attach":
                tqext.attach(model, "tq4", guard=False)
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    assert seen == {TurboQuantKVCache}


@pytest.mark.parametrize("make", [make_llama, make_qwen2])
def test_max_kv_size_bounds_every_layer(make):
    """Also for llama, whose own make_cache lets mlx-lm pass the bound by in silence."""
    model = tqext.attach(make(), "tq3", guard=False)
    caches = {kind: ask(model, 300) for kind, ask in BOUNDED.items()}
    for kind, cache in caches.items():
        assert kinds(cache) == {TurboQuantKVCache}, kind
        assert {layer.max_size for layer in cache} == {300}, kind
        assert {layer.offset for layer in cache} in ({810}, {809}), kind
        assert max(layer.size() for layer in cache) <= 300, kind
    assert {layer.max_size for layer in stock.make_prompt_cache(model, max_kv_size=None)} == {None}


def generated(model, max_kv_size):
    cache = stock.make_prompt_cache(model, max_kv_size=max_kv_size)
    for _ in generate_step(mx.array(prompt(800)), model, max_tokens=10, prompt_cache=cache, prefill_step_size=200):
        pass
    return cache


def generated_in_a_batch(model, max_kv_size):
    batch = BatchGenerator(model, max_tokens=10, max_kv_size=max_kv_size, prefill_step_size=200)
    batch.insert([prompt(800), prompt(30, 1)])
    caches = []
    while responses := batch.next_generated():
        caches += [r.prompt_cache for r in responses if r.prompt_cache is not None]
    return max(caches, key=lambda cache: cache[0].offset)


BOUNDED = {"alone": generated, "in a batch": generated_in_a_batch}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(guard=False), r"max_size: expected None or 256 \(first \+ tail \+ 128\) or more, got 64"),
        (dict(first_last=1), r"\[make_prompt_cache\] max_kv_size: expected None, as the layers 0, 2 are not compressed"),
    ],
)
def test_max_kv_size_that_cannot_hold_is_refused(options, message):
    model = tqext.attach(make_llama(), "tq3", **options)
    tokens = mx.array(prompt(20))
    for ask in (
        lambda: stock.make_prompt_cache(model, max_kv_size=64),
        lambda: next(generate_step(tokens, model, max_kv_size=64)),
        lambda: BatchGenerator(model, max_kv_size=64).insert([[1, 2]]),
        lambda: tqext.make_prompt_cache(model, "tq3", max_kv_size=64, **options),
    ):
        with pytest.raises(ValueError, match=message):
            ask()


def test_max_kv_size_is_mlx_lms_where_nothing_is_compressed():
    model = tqext.attach(make_qwen2(), first_last=2, guard=False)
    assert kinds(stock.make_prompt_cache(model, max_kv_size=64)) == {stock.RotatingKVCache}
    tqext.detach(model)
    assert kinds(stock.make_prompt_cache(model, max_kv_size=64)) == {stock.RotatingKVCache}


def test_kv_bits_are_refused(model):
    """At the first step, not when mlx-lm would begin to quantise."""
    tqext.attach(model, "tq3", guard=False)
    with pytest.raises(ValueError, match=r"\[generate\] kv_bits: expected None for a compressed cache"):
        next(generate_step(mx.array(prompt(20)), model, kv_bits=8))
    with pytest.raises(ValueError, match=r"\[generate\] kv_bits: expected None"):
        next(generate_step(mx.array(prompt(20)), model, kv_bits=4, quantized_kv_start=0))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_plain_and_compressed_caches_in_one_batch_are_refused(model, order):
    tqext.attach(model, guard=False)
    caches = [stock_cache(model), stock.make_prompt_cache(model)]
    for cache in caches:
        mx.eval(model(mx.array([prompt(100)]), cache=cache))
    batch = BatchGenerator(model, max_tokens=4)
    with pytest.raises(ValueError, match=r"expected (caches of one kind|compressed caches).*tqext.upgrade compresses"):
        batch.insert([[5, 6], [5, 6]], caches=[caches[i] for i in order])
        while batch.next_generated():
            pass
    assert kinds(tqext.upgrade(caches[0], model=model, guard=False)) == {TurboQuantKVCache}


def test_a_plain_batch_cannot_be_appended():
    ours = BatchTurboQuantKVCache([0])
    theirs = stock.BatchKVCache([0])
    for cache in (ours, theirs):
        cache.update_and_fetch(mx.ones((1, 2, 9, 64)), mx.ones((1, 2, 9, 64)))
    with pytest.raises(ValueError, match=r"\[extend\] other: expected compressed caches .* got a BatchKVCache"):
        ours.extend(theirs)
    with pytest.raises(ValueError, match="expected caches of one kind"):
        theirs.extend(ours)


# upgrade


def test_upgrade_that_changes_nothing_says_why(model):
    class KVCache(stock.KVCache):
        """Of another package."""

    other = [KVCache() for _ in range(3)]
    with pytest.warns(UserWarning, match=r"\[upgrade\] cache: .*layers 0, 1, 2: KVCache stays: a class of test_hooks, not mlx"):
        assert kinds(tqext.upgrade(other)) == {KVCache}
    with pytest.warns(UserWarning, match="left out by the policy"):
        tqext.upgrade(stock_cache(model), first_last=2)
    with pytest.warns(UserWarning, match="sliding window"):
        tqext.upgrade([stock.RotatingKVCache(8)])
    with pytest.warns(UserWarning, match="an empty list"):
        tqext.upgrade([])
    with pytest.warns(UserWarning, match="compressed with another recipe"):
        tqext.upgrade(tqext.make_prompt_cache(model, "tq3", guard=False), "tq4")


def test_upgrade_twice_is_silent(model, recwarn):
    cache = [*stock_cache(model), stock.RotatingKVCache(8)]
    for _ in range(2):
        tqext.upgrade(cache)
    assert [type(c) for c in cache] == [TurboQuantKVCache] * 3 + [stock.RotatingKVCache]
    assert not recwarn


def test_upgrade_with_a_model_gives_the_probes_reason():
    class Manual(type(make_llama())):
        def __call__(self, inputs, cache=None):
            for c in cache:
                keys, _ = c.update_and_fetch(mx.ones((1, 2, 1, 64)), mx.ones((1, 2, 1, 64)))
                keys.sum()
            return mx.zeros((1, 1, 3))

    model = Manual(make_llama().args)
    with pytest.warns(UserWarning, match="computes with the keys itself"):
        tqext.upgrade(stock_cache(model), model=model)


def test_load_hook_reaches_models_loaded_later(tmp_path, model):
    folder = save_folder(model, tmp_path / "m")
    tqext.install("tq4", guard=False)
    loaded, _ = mlx_lm.utils.load_model(folder)
    assert kinds(loaded.make_cache()) == {TurboQuantKVCache}
    want = logits_after(model, stock.make_prompt_cache(model), prompt(30))
    assert mx.array_equal(logits_after(loaded, loaded.make_cache(), prompt(30)), want)


def test_sharded_load_asks_for_no_sum_on_the_cpu(tmp_path, monkeypatch):
    """NCCL has none. Other sums go on as they are, and MLX has its function back in the end."""
    folder = save_chat_folder(make_llama(), tmp_path / "model")

    def all_sum(x, *, group=None, stream=None):
        if isinstance(stream, mx.DeviceType) and stream == mx.cpu:
            raise RuntimeError("There is no Stream(gpu, 1) in current thread.")
        return x

    monkeypatch.setattr(mx.distributed, "all_sum", all_sum)
    with pytest.raises(RuntimeError, match="no Stream"):
        mlx_lm.utils.sharded_load(str(folder))
    tqext.install("tq3", guard=False)
    loaded, _ = mlx_lm.utils.sharded_load(str(folder))
    assert mx.distributed.all_sum is all_sum
    assert isinstance(stock.make_prompt_cache(loaded)[0], TurboQuantKVCache)

"""The prefix store: a prompt goes on from disk as it would have gone on, and never from another prompt, model or recipe."""

import json
import os
import random
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import mlx.core as mx
import mlx_lm.models.cache as stock
import numpy as np
import pytest

import tqext
import zoo
from tiny import greedy, make_llama, prompt
from tqext import TurboQuantKVCache, entry_store
from tqext.mlx_lm import prefix_store
from tqext.mlx_lm.caches import members

ALL_KINDS = {**zoo.PLAIN, **zoo.SPECIAL}


@pytest.fixture
def store(tmp_path):
    with tqext.PrefixStore(tmp_path / "store") as store:
        yield store


def computed(model, tokens, chunk=10**9, preset="tq33", **overrides):
    cache = tqext.make_prompt_cache(model, preset, **overrides)
    for i in range(0, len(tokens), chunk):
        model(mx.array([tokens[i : i + chunk]]), cache=cache)
        mx.eval([c.state for c in cache])
    return cache


def empty(model, preset="tq33", **overrides):
    return tqext.make_prompt_cache(model, preset, **overrides)


def leaves(state):
    if isinstance(state, (list, tuple)):
        return [x for part in state for x in leaves(part)]
    return [state]


def content(cache):
    """A cache's state, without room for growth."""
    if type(cache) is stock.KVCache:
        return [cache.keys[:, :, : cache.offset], cache.values[:, :, : cache.offset], cache.offset]
    return leaves(cache.state)


def assert_same(expected, got):
    """The same bytes in all layers."""
    pairs = list(zip(members(expected), members(got), strict=True))
    assert pairs
    for (path, a), (_, b) in pairs:
        assert type(a) is type(b)
        for x, y in zip(content(a), content(b), strict=True):
            if isinstance(x, mx.array):
                assert (x.shape, x.dtype) == (y.shape, y.dtype), path
                as_bytes = [np.array(z.view(mx.uint16) if z.dtype == mx.bfloat16 else z).tobytes() for z in (x, y)]
                assert as_bytes[0] == as_bytes[1], path
            else:
                assert x == y, path


def assert_goes_on_alike(model, expected, got, more):
    for tokens in (more[:100], more[100:101], more[101:131], more[131:]):
        a, b = (model(mx.array([tokens]), cache=cache) for cache in (expected, got))
        assert mx.array_equal(a, b)
    assert_same(expected, got)


MORE = prompt(260, seed=9)


@pytest.mark.parametrize("preset", ["tq3", "tq33", "tq4", "tq2", "tq3-plain", "tq3-qjl", "polarquant", "none"])
def test_a_prompt_goes_on_from_its_end_as_if_it_had_not_stopped(store, tmp_path, preset):
    """State bytes and logits, with another process's view of the folder."""
    model, tokens = make_llama(), prompt(777)
    if preset == "none":
        expected, like = stock.make_prompt_cache(model), stock.make_prompt_cache(model)
        model(mx.array([tokens]), cache=expected)
    else:
        expected, like = computed(model, tokens, 300, preset), empty(model, preset)
    assert store.save(model, tokens, expected) == 777
    store.flush()
    with tqext.PrefixStore(tmp_path / "store") as again:
        got, n = again.fetch(model, tokens + MORE, like=like)
    assert n == 777 and all(c.offset == 777 for c in got)
    assert_same(expected, got)
    assert_goes_on_alike(model, expected, got, MORE)


def test_caches_that_are_read_from_the_same_entries_share_them(store):
    """Those of two requests at once; not what another computation stored in between."""
    model, tokens = make_llama(), prompt(900)
    store.save(model, tokens, computed(model, tokens, 300))
    store.flush()
    first, second = (store.fetch(model, tokens + MORE[:i], like=empty(model))[0] for i in (20, 30))
    for layers in zip(first, second, strict=True):
        batch = layers[0].merge(layers)
        assert batch.prefixes[0] is batch.prefixes[1] is not None
        assert batch.prefixes[0].n_tokens > 700
    with tqext.PrefixStore(store.path.parent / "other") as other:
        other.save(model, tokens, computed(model, tokens, 100))  # other chunks: other bytes for the same tokens
        other.flush()
        third, _ = other.fetch(model, tokens, like=empty(model))
    differ = [not mx.array_equal(a.state[1], b.state[1]) for a, b in zip(first, third, strict=True)]
    assert any(differ)
    batch = [a.merge([a, b]) for a, b in zip(first, third, strict=True)][differ.index(True)]
    assert batch.prefixes == [None, None]


def test_a_shorter_beginning_goes_on_as_a_cache_that_was_trimmed(store):
    """What mlx-lm's server does with a cache that it has kept."""
    model, tokens = make_llama(), prompt(1500)
    cache = computed(model, tokens, 512)
    store.save(model, tokens, cache)
    store.flush()
    for n_common in (130, 192, 700, 1499):
        got, n = store.fetch(model, tokens[:n_common] + MORE, like=empty(model))
        assert n == min(n_common, 1408) // 64 * 64, "whole blocks; the last 92 tokens were not encoded"
        trimmed = computed(model, tokens, 512)
        for c in trimmed:
            c.trim(1500 - n)
        assert_same(trimmed, got)
        assert_goes_on_alike(model, trimmed, got, tokens[n:n_common] + MORE)


def test_logits_are_within_the_codec_of_a_prompt_that_is_computed_at_once(store):
    """The tokens after the last block see codes where they would have seen exact tokens."""
    model, tokens = make_llama(), prompt(900)
    store.save(model, tokens, computed(model, tokens, 512), end=False)
    store.flush()
    got, n = store.fetch(model, tokens, like=empty(model))
    assert n == 832
    ours = model(mx.array([tokens[n:]]), cache=got)[0, -1]
    fresh = model(mx.array([tokens]), cache=empty(model))[0, -1]
    reused = computed(model, tokens[:n], 512)
    kept = model(mx.array([tokens[n:]]), cache=reused)[0, -1]
    # Kept in memory, the same prompt differs from one that is computed at once by as much.
    a, b = (float(mx.linalg.norm(x - fresh)) for x in (ours, kept))
    assert 0 < a < 2 * b


def test_nothing_is_found_for_other_tokens_models_recipes_or_balances(store):
    model, tokens = make_llama(), prompt(600)
    store.save(model, tokens, computed(model, tokens))
    store.flush()

    def found(model, tokens, like):
        cache, n = store.fetch(model, tokens, like=like)
        assert (cache is None) == (n == 0)
        return n

    assert found(model, [*tokens, 1], empty(model)) == 600
    assert found(model, [tokens[0] + 1, *tokens[1:]], empty(model)) == 0
    assert found(model, [*tokens[:100], 0, *tokens[101:]], empty(model)) == 0, "the first tokens alone are of no use"
    assert found(model, [*tokens[:200], 0, *tokens[201:]], empty(model)) == 192
    assert found(model, tokens, empty(model, "tq4")) == 0
    assert found(model, tokens, empty(model, tail=128)) == 0
    assert found(model, tokens, empty(model, first_last=1)) == 0
    assert found(model, tokens, stock.make_prompt_cache(model)) == 0
    other_balance = empty(model)
    other_balance[1] = TurboQuantKVCache(other_balance[1].recipe, balance=other_balance[1].balance * 1.0001)
    assert found(model, tokens, other_balance) == 0
    other = make_llama(1)
    assert found(other, tokens, [TurboQuantKVCache(c.recipe, balance=c.balance) for c in empty(model)]) == 0
    longer_context = make_llama(rope_theta=20000.0)
    assert found(longer_context, tokens, [TurboQuantKVCache(c.recipe, balance=c.balance) for c in empty(model)]) == 0


def test_an_attached_model_is_looked_at_again_when_it_is_attached_again(store):
    model, tokens = make_llama(), prompt(500)
    tqext.attach(model, "tq33")
    cache = stock.make_prompt_cache(model)
    model(mx.array([tokens]), cache=cache)
    store.save(model, tokens, cache)
    store.flush()
    assert store.fetch(model, [*tokens, 1])[1] == 500
    model.update(make_llama(1).parameters())
    tqext.attach(model, "tq33", guard=False)
    assert store.fetch(model, [*tokens, 1])[1] == 0


def test_prompts_that_begin_alike_share_what_they_store(store, tmp_path):
    model, system = make_llama(), prompt(1000)
    sizes = []
    for seed in range(3):
        tokens = system + prompt(300, seed=seed + 20)
        store.save(model, tokens, computed(model, tokens), end=False)
        store.flush()
        sizes.append(store.stats()["bytes"])
    # 64 first tokens and 14 blocks are common, 4 blocks are each prompt's own (the last tokens are not encoded).
    per_block = (sizes[2] - sizes[1]) / 5
    assert sizes[1] - sizes[0] == sizes[2] - sizes[1] and sizes[0] > 17 * per_block
    before = store.stats()["written_bytes"]
    store.save(model, tokens, computed(model, tokens), end=False)
    store.flush()
    assert store.stats()["written_bytes"] == before


def test_a_conversation_that_grows_writes_what_is_new(store):
    model, tokens = make_llama(), prompt(2000)
    cache = empty(model)
    counts = []
    for begin in range(0, 2000, 200):
        model(mx.array([tokens[begin : begin + 200]]), cache=cache)
        store.save(model, tokens[: begin + 200], cache, end=False)
        store.flush()
        counts.append(store.stats()["entries"])
    assert counts[-1] == 1 + (2000 - 64 - 64) // 64 and counts == sorted(counts)
    got, n = store.fetch(model, tokens, like=empty(model))
    assert n == 64 * counts[-1]
    for c in cache:
        c.trim(2000 - n)
    assert_same(cache, got)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_type_of_model_comes_back(store, dtype):
    model, tokens = make_llama(), prompt(400)
    model.set_dtype(getattr(mx, dtype))
    cache = computed(model, tokens, first_last=1)
    assert {type(c).__name__ for c in cache} == {"KVCache", "TurboQuantKVCache"}
    store.save(model, tokens, cache)
    store.flush()
    got, n = store.fetch(model, [*tokens, 1], like=empty(model, first_last=1))
    assert n == 400
    assert_same(cache, got)
    part, n = store.fetch(model, tokens[:300], like=empty(model, first_last=1))
    assert n == 256
    for c in cache:
        c.trim(400 - n)
    assert_same(cache, part)


# One whose windows are compressed as well, and are longer than the prompt or shorter.
WINDOWS = {"gemma3_text 200": {"sliding_window": 200}, "gemma3_text 450": {"sliding_window": 450}}
HYBRIDS = ["qwen3_next", "jamba", "falcon_h1", "lfm2", "gemma3_text", "gemma3n", "gpt_oss", "nemotron_h", "cohere2"]


@pytest.mark.parametrize("kind", [*HYBRIDS, *WINDOWS])
def test_layers_with_a_state_come_back_at_ends(store, kind):
    """Recurrent layers and sliding windows, beside compressed ones."""
    windows = kind in WINDOWS
    kind, changes = (kind.split()[0], WINDOWS[kind]) if windows else (kind, {})
    n_compressed, more = ALL_KINDS[kind]
    model = zoo.make(kind, {**more, **changes})
    how = {"guard": False, "windows": windows}
    tokens = [1 + t % 120 for t in prompt(430)]
    cache = computed(model, tokens[:400], **how)
    kinds = [c for _, c in members(cache)]
    assert n_compressed and any(type(c) not in (TurboQuantKVCache, stock.KVCache) for c in kinds)
    assert store.save(model, tokens[:400], cache) == 400
    store.flush()
    got, n = store.fetch(model, tokens, like=empty(model, **how))
    assert n == 400
    assert_same(cache, got)
    assert [getattr(c, "shared", None) for c in got] == [getattr(c, "shared", None) for c in cache]
    a, b = (model(mx.array([tokens[400:]]), cache=c) for c in (cache, got))
    assert mx.array_equal(a, b)
    assert store.fetch(model, tokens[:399], like=empty(model, **how)) == (None, 0), "a state is at one place only"
    if windows:
        assert store.fetch(model, tokens, like=empty(model, guard=False, windows=False)) == (None, 0), "of other bytes"


def test_what_cannot_be_stored_is_refused(store):
    model, tokens = make_llama(), prompt(400)
    bounded = tqext.make_prompt_cache(model, "tq33", max_kv_size=512)
    with pytest.raises(ValueError, match=r"\[PrefixStore.fetch\] cache: expected caches that keep every token, got max_size"):
        store.fetch(model, tokens, like=bounded)
    quantized = [stock.QuantizedKVCache() for _ in range(3)]
    with pytest.raises(ValueError, match="got QuantizedKVCache at layer 0"):
        store.save(model, tokens, quantized)
    with pytest.raises(ValueError, match="expected a layer that keeps keys and values"):
        store.fetch(model, tokens, like=[stock.ArraysCache(2)])
    batch = TurboQuantKVCache.merge([computed(model, tokens)[0]])
    with pytest.raises(ValueError, match="got BatchTurboQuantKVCache"):
        store.save(model, tokens, [batch] * 3)
    two = empty(model)
    model(mx.array([tokens, tokens]), cache=two)
    with pytest.raises(ValueError, match="expected one sequence, got 2"):
        store.save(model, tokens, two)
    with pytest.raises(ValueError, match="expected a model"):
        store.fetch("a name", tokens)
    with pytest.raises(ValueError, match="max_bytes: expected at least"):
        tqext.PrefixStore(store.path, max_bytes=1000)
    assert repr(store) == f"PrefixStore({str(store.path)!r}, 0 entries, 0.0 MB)"
    (store.path / "file").touch()
    for path in (None, 3, store.path / "file", store.path / "file" / "below", "/proc/tqext"):
        with pytest.raises(ValueError, match=r"^\[PrefixStore\] path: expected a folder.+, got .+"):
            tqext.PrefixStore(path)


def test_tokens_that_are_no_text_end_a_prefix(store):
    """mlx-lm's server numbers images below zero."""
    model, tokens = make_llama(), prompt(600)
    cache = computed(model, tokens)
    with_image = [*tokens[:300], *[-123456789012345] * 100, *tokens[400:]]
    assert store.save(model, with_image, cache) == 256
    store.flush()
    assert store.fetch(model, with_image, like=empty(model))[1] == 256


def test_a_short_prompt_is_not_stored_and_a_longer_key_than_cache_is_cut(store):
    model, tokens = make_llama(), prompt(600)
    short = computed(model, tokens[:150])
    assert store.save(model, tokens[:150], short) == 0
    assert store.fetch(model, tokens[:1], like=empty(model)) == (None, 0)
    assert store.fetch(model, [], like=empty(model)) == (None, 0)
    cache = computed(model, tokens[:500])
    assert store.save(model, tokens, cache) == 384, "100 tokens of these the cache has not seen: no end"
    store.flush()
    assert store.fetch(model, mx.array(tokens), like=empty(model))[1] == 384


def flip(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def test_damaged_files_shorten_what_is_found_and_change_no_answer(tmp_path):
    rng = random.Random(3)
    model, tokens = make_llama(), prompt(1000)
    cache = computed(model, tokens)
    lengths = set()
    for i in range(12):
        with tqext.PrefixStore(tmp_path / str(i)) as store:
            store.save(model, tokens, cache)
        files = sorted((tmp_path / str(i) / "v1").glob("??/*"))
        assert len(files) == 15
        flip(rng.choice(files), rng)
        with tqext.PrefixStore(tmp_path / str(i)) as store:
            got, n = store.fetch(model, [*tokens, 1], like=empty(model))
            lengths.add(n)
            if got is not None:
                expected = computed(model, tokens)
                for c in expected:
                    c.trim(1000 - n)
                assert n < 1000
                assert_same(expected, got)
            assert store.stats()["damaged"] >= 1
            store.save(model, tokens, cache)
            store.flush()
            assert store.fetch(model, [*tokens, 1], like=empty(model))[1] == 1000
    assert len(lengths) > 3


@pytest.mark.parametrize("kind", ["empty", "text", "no description", "other layers", "short", "long", "types", "end"])
def test_whole_files_with_other_contents_change_no_answer(store, kind):
    """What a checksum cannot see: nothing is raised, what is found is right, and the next save mends it."""
    model, tokens = make_llama(), prompt(700)
    cache = computed(model, tokens)
    store.save(model, tokens, cache)
    store.flush()
    entries = store._entries
    for path in sorted(entries._home.glob("??/*")):
        raw = path.read_bytes()
        entry, _, _ = entry_store.unpack_header(raw)
        if entry.start != (576 if kind == "end" else 128):
            continue
        payload = raw[144:]
        n = int.from_bytes(payload[:4], "little")
        description = json.loads(payload[4 : 4 + n])
        if kind == "empty":
            payload = b""
        elif kind == "text":
            payload = b"x" * len(payload)
        elif kind == "no description":
            payload = (2).to_bytes(4, "little") + b"{}" + payload[4 + n :]
        elif kind == "short":
            payload = payload[:-1]
        elif kind == "long":
            payload += b"x"
        else:
            if kind == "types":
                description["layers"][0][5] = "no_type"
            else:
                description["layers"] = description["layers"][:2]
            description.pop("states", None)
            text = json.dumps(description).encode()
            payload = len(text).to_bytes(4, "little") + text + payload[4 + n :]
        assert entry.kind == (1 if kind == "end" else 0)
        path.write_bytes(entry_store.pack(entry, [payload]) + payload)
    got, n = store.fetch(model, [*tokens, 1], like=empty(model))
    if got is not None:
        for c in cache:
            c.trim(700 - n)
        assert_same(cache, got)
        cache = computed(model, tokens)
    assert n < 700 and store.stats()["damaged"] >= 1
    store.save(model, tokens, cache)
    store.flush()
    assert store.fetch(model, [*tokens, 1], like=empty(model))[1] == 700


def test_the_bound_holds_and_old_prompts_make_room(tmp_path):
    model = make_llama()
    prompts = [prompt(700, seed=i) for i in range(10)]
    caches = [computed(model, p) for p in prompts]
    with tqext.PrefixStore(tmp_path / "s", max_bytes=1 << 20) as store:
        for tokens, cache in zip(prompts, caches, strict=True):
            store.save(model, tokens, cache, end=False)
            store.flush()
            store.fetch(model, prompts[0], like=empty(model))
            store.flush()
            assert store.stats()["bytes"] <= 1 << 20
        lengths = [store.fetch(model, p, like=empty(model))[1] for p in prompts]
        assert lengths[0] == lengths[-1] == 576, "the one that is used and the newest"
        assert lengths[1] == 0 and store.stats()["evicted"] > 0
        assert sum(p.stat().st_size for p in (tmp_path / "s" / "v1").glob("??/*")) == store.stats()["bytes"]


def test_what_waits_is_bounded_and_the_rest_is_stored_the_next_time(store, monkeypatch):
    model, tokens = make_llama(), prompt(1000)
    cache = computed(model, tokens)
    monkeypatch.setattr(prefix_store, "MAX_PENDING", 250_000)
    done = []
    for _ in range(20):
        done.append(store.save(model, tokens, cache, end=False))
        store.flush()
    assert 0 < done[0] < 896 == done[-1] and done == sorted(done)
    assert store.stats()["skipped_tokens"] > 0
    assert store.fetch(model, tokens, like=empty(model))[1] == 896


def test_generation_reports_and_continues(store):
    """With mlx-lm's own loop, whose answer is that of the cache that was never put away."""
    model, tokens = make_llama(), prompt(500)
    tqext.attach(model, "tq33")
    cache = stock.make_prompt_cache(model)
    model(mx.array([tokens]), cache=cache)
    store.save(model, tokens, cache)
    store.flush()
    got, n = store.fetch(model, tokens + MORE[:50])
    assert greedy(model, (tokens + MORE[:50])[n:], 40, got) == greedy(model, MORE[:50], 40, cache)
    stats = store.stats()
    assert (stats["hits"], stats["misses"], stats["restored_tokens"]) == (1, 0, 500)
    assert stats["read_bytes"] > 0 and stats["errors"] == 0


CHILD = """
    import sys
    sys.path.insert(0, {tests!r})
    import mlx.core as mx, tqext
    from tiny import make_llama, prompt
    model = make_llama()
    tokens = prompt(int(sys.argv[2]), seed=int(sys.argv[3]))
    cache = tqext.make_prompt_cache(model, "tq33")
    model(mx.array([tokens]), cache=cache)
    store = tqext.PrefixStore(sys.argv[1])
    for n in range(200, len(tokens) + 1, 100):
        store.save(model, tokens, cache)
    if sys.argv[4] == "stay":
        store.flush()
        print("saved", flush=True)
        sys.stdin.read()
"""


def child(folder, n, seed, how):
    script = textwrap.dedent(CHILD).format(tests=os.path.dirname(__file__))
    command = [sys.executable, "-c", script, str(folder), str(n), str(seed), how]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_processes_share_prompts_and_an_exit_writes_what_waits(tmp_path):
    model = make_llama()
    first, second = child(tmp_path / "s", 600, 1, "stay"), child(tmp_path / "s", 600, 1, "stay")
    for process in (first, second):
        assert "saved\n" in iter(process.stdout.readline, "")
    third = child(tmp_path / "s", 900, 2, "leave")  # ends without a word while it writes
    assert third.wait(120) == 0
    with tqext.PrefixStore(tmp_path / "s") as store:
        for n, seed in ((600, 1), (900, 2)):
            tokens = prompt(n, seed=seed)
            got, found = store.fetch(model, [*tokens, 1], like=empty(model))
            assert found == n
            assert_same(computed(model, tokens), got)
    for process in (first, second):
        process.communicate("", timeout=60)
        assert process.returncode == 0
    for path in (tmp_path / "s" / "v1").rglob("*"):
        assert stat.S_IMODE(path.lstat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_the_description_of_a_payload_is_the_documented_one(store, tmp_path):
    """A reader that knows docs/prefix_store.md alone finds the arrays."""
    model, tokens = make_llama(), prompt(400)
    cache = computed(model, tokens)
    store.save(model, tokens, cache)
    store.flush()
    seen = {"first": 0, "block": 0, "end": 0}
    for path in sorted(Path(tmp_path / "store" / "v1").glob("??/*")):
        raw = path.read_bytes()
        kind, start, n = (int.from_bytes(raw[a:b], "little") for a, b in ((12, 16), (112, 120), (120, 128)))
        length = int.from_bytes(raw[144:148], "little")
        description, at = json.loads(raw[148 : 148 + length]), 148 + length
        for i, (place, how, heads, dim, value_dim, key_type, value_type) in enumerate(description["layers"]):
            assert (place, how, heads, dim, value_dim, key_type, value_type) == (
                str(i),
                "compressed",
                2,
                64,
                64,
                "float32",
                "float32",
            )
            if kind == 1:
                expected, name = cache[i].exact_parts()[1], "end"
            elif start == 0:
                expected, name = cache[i].exact_parts()[0], "first"
            else:
                expected, name = cache[i].coded_parts(start - 64, start - 64 + n), "block"
            for x in expected:
                stored = np.array(x).tobytes()
                assert raw[at : at + len(stored)] == stored
                at += len(stored)
            seen[name] += 1
        assert at == len(raw)
    assert seen == {"first": 3, "block": 12, "end": 3}

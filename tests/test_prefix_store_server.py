"""``tqext server --prefix-store``: what a server has read, the next one need not compute."""

import json
import stat
import time
import types
import urllib.request

import mlx.core as mx
import mlx_lm.models.cache as stock
import pytest
from prometheus_client.parser import text_string_to_metric_families

import tqext
import zoo
from server_support import Server
from tiny import make_llama, prompt, save_chat_folder
from tqext.commands import cli
from tqext.commands import server as door
from tqext.commands.metrics import STORE_COUNTERS, STORE_GAUGES

SYSTEM = {"role": "system", "content": "You know 19 things about foxes and 7 about dogs. " * 20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_chat_folder(make_llama(), tmp_path_factory.mktemp("model"))


def get(server, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=30) as reply:
        return reply.read().decode()


def store_stats(server):
    return json.loads(get(server, "/stats"))["prefix_store"]


def settled(server):
    """The store's numbers once nothing is being written any more."""
    deadline = time.monotonic() + 60
    before, now = None, store_stats(server)
    while before != now or not now["entries"]:
        assert time.monotonic() < deadline
        time.sleep(0.5)
        before, now = now, store_stats(server)
    return now


def question(i):
    return [SYSTEM, {"role": "user", "content": f"What is number {i}?"}]


def cached(reply):
    return reply["usage"].get("prompt_tokens_details", {}).get("cached_tokens", 0)


def test_a_server_begins_where_the_one_before_it_ended(folder, tmp_path):
    place = tmp_path / "prefixes"
    arguments = ("--kv", "tq33", "--prefix-store", str(place), "--prefix-store-size", "50MB")
    first = Server(folder, *arguments)
    try:
        reply = first.chat(question(1))
        n = reply["usage"]["prompt_tokens"]
        assert n > 900 and cached(reply) == 0
        stored = settled(first)
        assert stored["max_bytes"] == 50_000_000 and stored["misses"] == 1 and stored["hits"] == 0
        assert stored["entries"] >= (n - 192) // 64
    finally:
        first.process.kill()  # without a chance to say goodbye
        first.close()
    answers = []
    for i in (1, 2, 1):
        server = Server(folder, *arguments)
        try:
            reply = server.chat(question(i))
            answers.append(reply["choices"][0]["message"]["content"])
            assert n - 192 <= cached(reply) < n and cached(reply) % 64 == 0
            found = settled(server)
            assert (found["hits"], found["misses"], found["restored_tokens"]) == (1, 0, cached(reply))
            # In memory there is more of this one than on disk.
            assert cached(server.chat(question(i))) >= cached(reply) and store_stats(server)["hits"] == 1
            families = text_string_to_metric_families(get(server, "/metrics"))
            told = {s.name: s.value for family in families for s in family.samples}
            now = store_stats(server)
            for name in STORE_COUNTERS:
                assert told[f"tqext_prefix_store_{name}_total"] == now[name]
            for name in STORE_GAUGES:
                assert told[f"tqext_prefix_store_{name}"] == now[name]
            assert "Prefix store: " in server.text()
        finally:
            server.close()
    assert answers[0] == answers[2]
    for path in (place / "v1").rglob("*"):
        assert stat.S_IMODE(path.lstat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    other = Server(folder, "--kv", "tq4", *arguments[2:])
    try:
        assert cached(other.chat(question(1))) == 0 and store_stats(other)["misses"] == 1
    finally:
        other.close()


def test_servers_share_a_folder_while_they_run(folder, tmp_path):
    arguments = ("--kv", "tq33", "--prefix-store", str(tmp_path / "prefixes"))
    first, second = Server(folder, *arguments), Server(folder, *arguments)
    try:
        n = first.chat(question(1))["usage"]["prompt_tokens"]
        settled(first)
        assert cached(second.chat(question(1))) >= n - 192
    finally:
        first.close()
        second.close()


def test_without_a_store_none_is_told_of(folder):
    server = Server(folder, "--kv", "tq33")
    try:
        assert json.loads(get(server, "/stats"))["prefix_store"] is None
        assert "prefix_store" not in get(server, "/metrics")
    finally:
        server.close()


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """mlx-lm's store of prompts with ours behind it, as a server has them."""
    with tqext.PrefixStore(tmp_path / "s") as store:
        monkeypatch.setattr(door.PromptCache, "store", store)

        def new(model, draft=None):
            cache = door.PromptCache(10)
            cache.provider = types.SimpleNamespace(model=model, draft_model=draft, model_key="key")
            return cache

        yield store, new


def test_a_recurrent_model_begins_at_the_ends_of_prompts(kept):
    store, new = kept
    _, changes = zoo.SPECIAL["qwen3_next"]
    model = tqext.attach(zoo.make("qwen3_next", changes), "tq33", guard=False)
    tokens = [1 + t % 120 for t in prompt(500)]
    cache = stock.make_prompt_cache(model)
    model(mx.array([tokens[:400]]), cache=cache)
    new(model).insert_cache("key", tokens[:400], cache)
    store.flush()
    got, rest = new(model).fetch_nearest_cache("key", tokens)
    assert rest == tokens[400:]
    assert mx.array_equal(model(mx.array([rest]), cache=got), model(mx.array([rest]), cache=cache))


def test_memory_is_preferred_and_nothing_is_read_for_a_few_tokens(kept):
    store, new = kept
    model = tqext.attach(make_llama(), "tq33")
    tokens = prompt(1500)
    cache = stock.make_prompt_cache(model)
    model(mx.array([tokens]), cache=cache)
    store.save(model, tokens, cache)
    store.flush()
    short = stock.make_prompt_cache(model)
    model(mx.array([tokens[:1400]]), cache=short)
    prompts = new(model)
    prompts.insert_cache("key", tokens[:1400], short)
    assert len(prompts.fetch_nearest_cache("key", tokens)[1]) == 100 and store.stats()["hits"] == 0
    assert len(prompts.fetch_nearest_cache("another model", tokens)[1]) == 1500
    far = new(model)
    far.insert_cache("key", tokens[:1000], short)
    assert len(far.fetch_nearest_cache("key", [*tokens, 1])[1]) == 1 and store.stats()["hits"] == 1


def test_a_model_that_cannot_be_kept_is_said_once_and_served(kept, caplog):
    store, new = kept
    model = make_llama()
    tokens = prompt(500)
    prompts = new(model, draft=make_llama())
    with caplog.at_level("WARNING"):
        for _ in range(3):
            assert prompts.fetch_nearest_cache("key", tokens) == (None, tokens)
            prompts.insert_cache("key", tokens, stock.make_prompt_cache(model))
            prompts._lru.pop()
            prompts._trie.pop("key", tokens)
    assert [r.getMessage() for r in caplog.records] == [
        "Prefix store: nothing is kept of this model: [server] --prefix-store: expected no draft model, got one, whose tokens "
        "are not kept"
    ]
    assert store.stats()["entries"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prefix-store-size", "1GB"], "--prefix-store-size needs --prefix-store"),
        (["--prefix-store", "x", "--prefix-store-size", "much"], "expected a size such as 16GB or 16GiB, got 'much'"),
        (["--prefix-store", "x", "--draft-model", "y"], "leave one of the two out"),
    ],
)
def test_wrong_options_are_refused_in_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        cli.main(["server", "--model", "x", *arguments])
    assert exit.value.code == 2
    text = capsys.readouterr().err
    assert message in text and text.count("\n") == 1

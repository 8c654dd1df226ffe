"""``tqext server``: requests that begin with the same kept prompt hold one copy of it, and answer as each with its own."""

import copy
import json
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import pytest

from server_support import Server
from tiny import make_llama, save_chat_folder
from tqext.commands.metrics import Holding, flat, holding
from tqext.kv import TurboQuantKVCache
from tqext.mlx_lm import make_prompt_cache

SYSTEM = {"role": "system", "content": "You know 19 things about foxes and 7 about dogs. " * 20}
N = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_chat_folder(make_llama(), tmp_path_factory.mktemp("model"))


def numbers(server):
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/stats", timeout=30) as reply:
        return json.load(reply)


def question(i):
    return [SYSTEM, {"role": "user", "content": f"What is number {i}?"}]


def asked(folder, n_at_once):
    """Answers to N questions after another one, and the numbers of what was kept before, of what ran, and of what was kept."""
    server = Server(folder, "--kv", "tq33", "--prompt-cache-size", "32")
    try:
        server.answer(question(99), max_tokens=2)
        alone, running = numbers(server)["kept"], []
        time.sleep(1.1)  # the batch is looked at once a second
        with ThreadPoolExecutor(n_at_once) as pool:
            answers = [pool.submit(server.answer, question(i), max_tokens=80) for i in range(N)]
            while not all(answer.done() for answer in answers):
                running.append(numbers(server)["running"])
                time.sleep(0.02)
        assert "Traceback" not in server.text()
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=30) as reply:
            assert 'tqext_cache_shared_bytes{where="kept"}' in reply.read().decode()
        return [answer.result() for answer in answers], alone, running, numbers(server)["kept"]
    finally:
        server.close()


def test_requests_that_begin_alike_hold_one_copy(folder):
    one_by_one, alone, _, _ = asked(folder, 1)
    at_once, _, running, kept = asked(folder, N)
    assert len(set(at_once)) > N // 2, "the model says the same to everybody, so this shows nothing"
    assert at_once == one_by_one
    most = max(running, key=lambda now: now["n_sequences"])
    # Each request spares the prefix: the kept prompt holds it. What is left is exact, fp32 beside fp16, but for few tokens.
    prefix = most["shared"] // most["n_sequences"]
    assert alone["shared"] == 0
    assert 0.5 * alone["used"] < prefix < alone["used"]
    assert kept["n_sequences"] == N + 1 and kept["shared"] >= N * prefix
    assert kept["used"] < prefix + (N + 1) * (alone["used"] - prefix) * 2
    assert kept["fp16"] > N * alone["fp16"]


def test_holdings_count_a_prefix_once():
    model = make_llama()
    cache = make_prompt_cache(model, "tq3")
    model(mx.array([[i % 250 for i in range(1500)]]), cache=cache)
    plain = holding(cache).numbers()
    for layer in flat(cache):
        assert isinstance(layer, TurboQuantKVCache)
        layer.share()
    one = holding(cache)
    assert one.numbers() == plain and plain["shared"] == 0
    copies = [holding(copy.deepcopy(cache)) for _ in range(3)]
    batch = holding([c.merge([copy.deepcopy(c) for _ in range(4)]) for c in cache], 4)
    prefix = sum(used for used, _ in one.roots.values())
    assert len(one.roots) == 3 and prefix > plain["used"] // 3
    for whole, n in ((sum(copies, Holding()), 3), (batch, 4)):
        now = whole.numbers()
        assert now["n_sequences"] == n and now["fp16"] == n * plain["fp16"]
        assert now["used"] == n * plain["used"] - (n - 1) * prefix and now["shared"] == (n - 1) * prefix
        elsewhere = whole.numbers(one.roots)
        assert elsewhere["used"] == n * (plain["used"] - prefix) and elsewhere["shared"] == n * prefix
    assert sum([*copies, batch], one).numbers()["used"] == 8 * plain["used"] - 7 * prefix

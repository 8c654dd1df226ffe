"""``tqext server``: concurrent requests answer as alone, prompts are reused, and rude clients do no harm."""

import random
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from covering import FULL
from server_support import Server, history
from tiny import make_llama, save_chat_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_chat_folder(make_llama(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(folder):
    """Keeps no prompts: one that is reused is read as codes, where a new one attends to itself exactly."""
    server = Server(folder, "--kv", "tq3", "--prompt-cache-size", "0")
    yield server
    server.close()


@pytest.fixture(scope="module")
def keeping_server(folder):
    server = Server(folder, "--kv", "tq3")
    yield server
    server.close()


def test_server_answers_are_the_same_alone_and_in_company(server):
    histories = [history(i, n_turns=i % 3 + 1) for i in range(8)]
    alone = [server.answer(h) for h in histories]
    assert len(set(alone)) > 4, "the model says the same to everybody, so this shows nothing"
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(server.answer, histories * 2))
        streamed = list(pool.map(server.stream, histories))
    assert together == alone * 2
    assert streamed == alone
    assert "3 of 3 layers compressed" in server.text()


def test_server_reuses_prompts_and_edited_histories(keeping_server):
    server = keeping_server
    first = history(77, n_turns=3)
    server.chat(first)
    longer = server.chat([*first, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And then?"}])
    usage = longer["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > usage["prompt_tokens"] // 2
    edited = [*first[:-1], {"role": "user", "content": "Something else at the end."}]
    reused = server.chat(edited)
    assert reused["usage"]["prompt_tokens_details"]["cached_tokens"] > 20
    assert reused["choices"][0]["message"]["content"] is not None


def test_server_survives_clients_that_hang_up_and_wrong_requests(server):
    expected = server.answer(history(5))
    with ThreadPoolExecutor(6) as pool:
        aborted = [pool.submit(server.abort, history(20 + i, 2)) for i in range(3)]
        answers = [pool.submit(server.answer, history(5)) for _ in range(3)]
        for future in aborted:
            future.result()
        assert [f.result() for f in answers] == [expected] * 3
    with pytest.raises(urllib.error.HTTPError):
        server.chat("not a list of messages")
    assert server.answer(history(5)) == expected


def test_server_with_a_seed_goes_the_single_path(server):
    """Requests that mlx-lm does not batch, one after another and between batched ones."""
    alone = server.answer(history(3), seed=7)
    with ThreadPoolExecutor(3) as pool:
        seeded = [pool.submit(server.answer, history(3), seed=7) for _ in range(2)]
        batched = pool.submit(server.answer, history(4))
        assert [f.result() for f in seeded] == [alone] * 2
    assert batched.result() == server.answer(history(4))


@pytest.mark.parametrize("seed", [0, 5])
def test_server_with_a_draft_model(server, folder, tmp_path, seed):
    """A draft that is always right, and one that is mostly wrong; a request may also bring its own."""
    draft = save_chat_folder(make_llama(seed), tmp_path / "draft")
    histories = [history(i, n_turns=i % 3 + 1) for i in range(4)]
    expected = [server.answer(h) for h in histories]
    options = ("--kv", "tq3", "--prompt-cache-size", "0", "--draft-model", str(draft), "--num-draft-tokens", "4")
    drafting = Server(folder, *options)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(drafting.answer, histories)) == expected
        assert drafting.stream(histories[2]) == expected[2]
        assert drafting.text().count("3 of 3 layers compressed") >= 1
        asked = [server.answer(h, draft_model=str(draft), num_draft_tokens=2) for h in histories]
        assert asked == expected
        assert [server.answer(h) for h in histories] == expected
    finally:
        drafting.close()


SOAK_CLIENTS, SOAK_REQUESTS = 8, 25 if FULL else 15


def soak_text(client, i):
    """A prompt of its own: fewer tokens in common with any other than stay exact, so that reuse changes nothing."""
    tag = 26 * client + i
    return chr(97 + tag % 26) + chr(65 + tag // 26) + f" {client}-{i} " * (10 + 7 * (tag % 9))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_server_soak(server, keeping_server):
    """120 or 200 mixed requests from 8 clients: no error, no leak, and every greedy answer is what it is alone."""
    reference, server = server, keeping_server
    alone = {(c, i): reference.complete(soak_text(c, i)) for c in range(SOAK_CLIENTS) for i in range(0, SOAK_REQUESTS, 5)}
    assert len(set(alone.values())) > len(alone) // 2, "the model says the same to everybody, so this shows nothing"

    def client(number, rounds):
        rng = random.Random(number)
        turns = history(100 + number)
        for i in rounds:
            kind = ("whole", "follow-up", "stream", "hang up", "seed" if rng.random() < 0.5 else "edit")[i % 5]
            if kind == "whole":
                assert server.complete(soak_text(number, i)) == alone[number, i]
            elif kind == "follow-up":
                answer = server.answer(turns)
                turns = [*turns, {"role": "assistant", "content": answer}, {"role": "user", "content": f"And {i}?"}][-9:]
            elif kind == "stream":
                assert server.stream(turns)
            elif kind == "hang up":
                server.abort(turns)
            elif kind == "seed":
                assert server.answer(turns, seed=i, temperature=1.0)
            else:
                assert server.answer([*turns[:-1], {"role": "user", "content": f"No, {i}."}])
        return len(rounds)

    def run(rounds):
        with ThreadPoolExecutor(SOAK_CLIENTS) as pool:
            assert sum(pool.map(lambda n: client(n, rounds), range(SOAK_CLIENTS))) == SOAK_CLIENTS * len(rounds)
        time.sleep(0.5)  # the last aborted request is found out about at its next token
        return server.resident()

    warm = run(range(SOAK_REQUESTS * 2 // 5))
    grown = run(range(SOAK_REQUESTS * 2 // 5, SOAK_REQUESTS)) - warm
    assert server.process.poll() is None
    text = server.text()
    hung_up = text.count("BrokenPipeError: ") + text.count("ConnectionResetError: ")
    assert text.count("Traceback") == hung_up, text
    # A request's caches take 0.4 MB; 72 of them kept would be 29 MB, and 120 of them 48 MB.
    assert grown < 24e6, f"{grown / 1e6:.1f} MB more than after the first half"

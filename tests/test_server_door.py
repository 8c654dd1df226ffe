"""What ``tqext server`` refuses at its door: requests that end mlx-lm's generation thread, and clients that hold it up."""

import argparse
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import mlx_lm.server
import pytest

from server_support import Server, history
from tiny import make_llama, save_chat_folder
from tqext.commands import server as door


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(save_chat_folder(make_llama(), tmp_path_factory.mktemp("model")), "--kv", "tq3", "--prompt-cache-size", "0")
    yield server
    server.close()


def status(port, data, path="/v1/completions", timeout=60, **headers):
    """Status and JSON of the answer to a POST."""
    headers = {"Content-Type": "application/json"} | headers
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"{}")


COMPLETION = {"prompt": "abc", "max_tokens": 3, "temperature": 0.0}
CHAT = {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 3}
# Changes of a completion, and the words of the refusal.
REFUSED = {
    "empty prompt": ({"prompt": ""}, "prompt: expected a text, not empty"),
    "no prompt": ({"prompt": None}, "prompt: expected a text"),
    "prompt of numbers": ({"prompt": [1, 2]}, "prompt: expected a text"),
    "prompt of nothing": ({"prompt": {}}, "prompt: expected a text"),
    "stop list of lists": ({"stop": [[["x"]]]}, "stop: expected a text or a list of texts"),
    "stop of numbers": ({"stop": [1]}, "stop: expected a text or a list of texts"),
    "stop number": ({"stop": 5}, "stop: expected a text or a list of texts"),
    "stop object": ({"stop": {"a": 1}}, "stop: expected a text or a list of texts"),
    "stop with half a surrogate pair": ({"stop": ["\ud800"]}, "stop: expected a text or a list of texts"),
    "bias beyond the vocabulary": ({"logit_bias": {"999999": 5}}, "logit_bias: expected tokens from 0 to 299, got 999999"),
    "bias of the first unknown token": ({"logit_bias": {"300": 5}}, "logit_bias: expected tokens from 0 to 299, got 300"),
    "bias of a negative token": ({"logit_bias": {"-1": 5}}, "logit_bias: expected tokens by their number, got '-1'"),
    "bias of a word": ({"logit_bias": {"the": 5}}, "logit_bias: expected tokens by their number, got 'the'"),
    "bias of a huge token": ({"logit_bias": {str(2**70): 5}}, "logit_bias: expected tokens from 0 to 299"),
    "bias without a number": ({"logit_bias": {"3": []}}, "logit_bias[3]: expected a finite number"),
    "infinite bias": ({"logit_bias": {"3": float("inf")}}, "logit_bias[3]: expected a finite number"),
    "biases in a list": ({"logit_bias": [3]}, "logit_bias: expected an object"),
    "temperature NaN": ({"temperature": float("nan")}, "temperature: expected a finite number"),
    "top_p NaN": ({"top_p": float("nan")}, "top_p: expected a finite number"),
    "infinite penalty": ({"presence_penalty": float("-inf")}, "presence_penalty: expected a finite number"),
    "penalty beyond floats": ({"frequency_penalty": 10**400}, "frequency_penalty: expected a finite number"),
    "top_k of the vocabulary": ({"top_k": 300, "temperature": 1.0}, "top_k: expected less than 300, got 300"),
    "draft model in a list": ({"draft_model": []}, "draft_model: expected a text"),
    "stream options without usage": ({"stream_options": {"a": 1}}, "stream_options: expected include_usage"),
    "stream options in a list": ({"stream_options": [1]}, "stream_options: expected an object"),
    "max_tokens 0": ({"max_tokens": 0}, "max_tokens must be at least 1"),
}
CHATS_REFUSED = {
    "no messages": ({"messages": []}, "messages: expected a list of messages, at least one"),
    "messages in an object": ({"messages": {}}, "messages: expected a list"),
    "message without role": ({"messages": [{"content": "x"}]}, "messages[0]: expected an object with a role"),
    "message of text": ({"messages": ["x"]}, "messages[0]: expected an object with a role"),
    "template options in a list": ({"chat_template_kwargs": [1]}, "chat_template_kwargs: expected an object"),
    "tools in an object": ({"tools": {"a": 1}}, "tools: expected a list"),
}


@pytest.fixture(scope="module")
def busy(server):
    """An answer in progress: the next requests join its batch, where mlx-lm has another way in."""
    stop = threading.Event()

    def keep_busy():
        while not stop.is_set():
            server.stream(history(1), max_tokens=60)

    thread = threading.Thread(target=keep_busy)
    thread.start()
    yield server
    stop.set()
    thread.join()


@pytest.mark.parametrize("case", [*REFUSED, *CHATS_REFUSED])
def test_requests_that_cannot_be_served_are_refused_with_400(busy, case):
    """Alone and beside another one; both go on."""
    if case in REFUSED:
        (change, message), path, body = REFUSED[case], "/v1/completions", COMPLETION
    else:
        (change, message), path, body = CHATS_REFUSED[case], "/v1/chat/completions", CHAT
    code, answer = status(busy.port, json.dumps(body | change).encode(), path)
    assert (code, message in answer["error"]) == (400, True), (code, answer)
    assert status(busy.port, json.dumps(body).encode(), path)[0] == 200
    assert busy.process.poll() is None


@pytest.mark.parametrize(
    "case", ["empty prompt", "stop list of lists", "bias beyond the vocabulary", "top_k of the vocabulary"]
)
def test_an_idle_server_refuses_them_as_well(server, case):
    change, message = REFUSED[case]
    for _ in range(2):
        code, answer = status(server.port, json.dumps(COMPLETION | {"seed": 1} | change).encode())
        assert (code, message in answer["error"]) == (400, True), (code, answer)
    assert status(server.port, json.dumps(COMPLETION).encode())[0] == 200


def test_ordinary_options_are_taken(server):
    options = {"stop": ["zz", "y"], "logit_bias": {"5": 2, "299": -1.5}, "top_k": 299, "temperature": 1, "top_p": 0.9}
    assert status(server.port, json.dumps(COMPLETION | options).encode())[0] == 200
    assert (
        status(server.port, json.dumps(COMPLETION | {"stop": "z", "stream_options": {"include_usage": True}}).encode())[0]
        == 200
    )
    assert (
        status(server.port, json.dumps(COMPLETION | {"stop": None, "logit_bias": None, "draft_model": None}).encode())[0] == 200
    )
    assert status(server.port, json.dumps(CHAT).encode(), "/v1/chat/completions")[0] == 200


@pytest.mark.parametrize(
    ("data", "headers", "code"),
    [
        (b"\xff\xfe", {}, 400),
        (b"[" * 200_000, {}, 400),
        (b"{", {}, 400),
        (b"[]", {}, 400),
        (b"", {"Content-Length": "-5"}, 400),
        (b"", {"Content-Length": "many"}, 400),
        (b"", {"Content-Length": str(10**12)}, 413),
    ],
)
def test_bodies_that_are_no_requests(server, data, headers, code):
    assert status(server.port, data, **headers)[0] == code
    assert status(server.port, json.dumps(COMPLETION).encode())[0] == 200


def test_two_hundred_connections_at_once_are_taken(server):
    def ask(_):
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health", timeout=60) as reply:
            return reply.status

    with ThreadPoolExecutor(200) as pool:
        assert list(pool.map(ask, range(200))) == [200] * 200


# The classes alone


class Provider:
    """As much of mlx-lm's ModelProvider as a generation thread that dies at once asks for."""

    cli_args = argparse.Namespace(
        allowed_origins="*", num_draft_tokens=3, max_tokens=4, temp=0.0, top_p=1.0, top_k=0, min_p=0.0
    )

    def load_default(self):
        raise MemoryError("no room for the model")


@pytest.fixture
def dead(monkeypatch):
    """The port of a server whose generation thread has died."""
    generator = door.Generator(Provider(), None)
    generator.join()
    monkeypatch.setattr(door.Handler, "timeout", 1.0)
    monkeypatch.setattr(door, "MAX_CONNECTIONS", 30)
    httpd = door.Server(("127.0.0.1", 0), lambda *args: door.Handler(generator, *args, system_fingerprint="x"))
    thread = threading.Thread(target=httpd.serve_forever, args=(0.05,))
    thread.start()
    yield httpd.server_address[1]
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_health_tells_that_the_generation_thread_has_died(dead):
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"http://127.0.0.1:{dead}/health", timeout=10)
    assert error.value.code == 503
    assert status(dead, json.dumps(COMPLETION).encode()) == (404, {"error": "generation thread died"})


def received(connection):
    """All that the server says until it closes the connection, and the seconds it took."""
    begin, data = time.monotonic(), b""
    try:
        while part := connection.recv(1000):
            data += part
    except ConnectionResetError:
        pass
    return data, time.monotonic() - begin


@pytest.mark.parametrize("begin", [b"", b"POST /v1/completions HTTP/1.1\r\n", b"POST / HTTP/1.0\r\nContent-Length: 9\r\n\r\n{"])
def test_a_client_that_sends_nothing_more_is_let_go(dead, begin):
    with socket.create_connection(("127.0.0.1", dead), timeout=30) as connection:
        connection.sendall(begin)
        _, seconds = received(connection)
    assert seconds < 10


def test_a_client_that_sends_drop_by_drop_is_let_go(dead):
    """Each byte comes in time, the request does not."""
    with socket.create_connection(("127.0.0.1", dead), timeout=30) as connection:
        begin = time.monotonic()
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        with pytest.raises(OSError):
            for _ in range(200):
                connection.sendall(b"X-Header: y\r\n")
                time.sleep(0.1)
        assert time.monotonic() - begin < 15


def test_clients_beyond_the_number_get_503(dead, monkeypatch):
    opened = []
    try:
        monkeypatch.setattr(door.Handler, "timeout", 30.0)
        for _ in range(door.MAX_CONNECTIONS):
            opened.append(socket.create_connection(("127.0.0.1", dead), timeout=30))
        with socket.create_connection(("127.0.0.1", dead), timeout=30) as connection:
            assert received(connection)[0].startswith(b"HTTP/1.0 503 ")
    finally:
        for connection in opened:
            connection.close()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:  # they are found out about one by one
        with socket.create_connection(("127.0.0.1", dead), timeout=30) as connection:
            connection.sendall(b"GET /nothing HTTP/1.0\r\n\r\n")
            if received(connection)[0].startswith(b"HTTP/1.0 404 "):
                return
        time.sleep(0.1)
    raise AssertionError("the connections that were closed still count")


def test_the_guard_is_in_the_places_that_mlx_lm_looks_at(monkeypatch):
    """A version of mlx-lm without them would run unguarded."""
    run = mlx_lm.server.run
    assert {"ResponseGenerator", "_run_http_server"} <= set(run.__code__.co_names)
    for name in ("_tokenize", "_make_state_machine", "generate"):
        assert callable(getattr(mlx_lm.server.ResponseGenerator, name))
    for name in ("_make_sampler", "_make_logits_processors"):
        assert callable(getattr(mlx_lm.server, name))
    assert callable(mlx_lm.server.APIHandler.validate_model_parameters)

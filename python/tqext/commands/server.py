"""The door of ``tqext server``: mlx-lm's server, with requests refused that would end it for everybody.

mlx-lm generates in one thread, which an exception outside of a request's own part ends: an empty prompt, a stop sequence that
is no string, a `top_k` beyond the vocabulary. A bias of a token beyond the vocabulary writes outside of the logits and ends the
process. Such requests are answered with status 400 here. Connections are bounded in number, size and time.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import logging
import math
import os
import socket
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import mlx.core as mx
import mlx_lm.server as mlx_lm_server
from huggingface_hub.errors import CacheNotFound

from tqext.commands import metrics
from tqext.commands.metrics import Holding, flat, holding, stats
from tqext.kv import TurboQuantKVCache
from tqext.mlx_lm.prefix_store import DEFAULT_BYTES, PrefixStore
from tqext.protocols import Model, Tokenizer
from tqext.ranks import Ranks

# Connections that wait to be taken; the system may allow fewer.
BACKLOG = 128
# Clients served at once, each by a thread; more of them get status 503.
MAX_CONNECTIONS = 512
# Seconds that a client may take to send its request, and to take each part of the answer.
CLIENT_SECONDS = 60.0
# Bytes of a request: some images, or a text of a million tokens many times over.
MAX_REQUEST_BYTES = 128 << 20
# Seconds between two looks at what the batch holds.
LOOK_SECONDS = 1.0
# Tokens, and the share of a prompt, that the prefix store must add to what is in memory: the whole prefix is read for them.
STORE_GAIN, STORE_SHARE = 64, 32
PAGE = Path(__file__).with_name("server.html")

_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "xtc_probability",
    "xtc_threshold",
)


class RequestError(ValueError):
    """A request that cannot be served, whoever sends it."""


class _Refusal(BaseException):
    """Carries a `RequestError` past mlx-lm's handler, which answers every Exception with status 404."""


def _check(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise RequestError(f"[request] {name}: expected {expected}, got {got!r:.100}")


# What a request says


def check_body(body: dict[str, Any], path: str) -> None:
    """Raise a RequestError unless the parts that mlx-lm does not check are of the right kind.

    Args:
        body: A completion request's JSON.
        path: The URL's, which tells chats from texts.
    """
    if path.endswith("/chat/completions"):
        messages = body.get("messages")
        _check(isinstance(messages, list) and bool(messages), "messages", "a list of messages, at least one", messages)
        for i, message in enumerate(cast("list[Any]", messages)):
            is_message = isinstance(message, dict) and isinstance(message.get("role"), str)
            _check(is_message, f"messages[{i}]", "an object with a role", message)
    else:
        prompt = body.get("prompt")
        _check(isinstance(prompt, str) and bool(prompt), "prompt", "a text, not empty", prompt)
    stop = body.get("stop")
    words = [stop] if isinstance(stop, str) else stop
    _check(words is None or isinstance(words, list), "stop", "a text or a list of texts", stop)
    for word in words or []:
        _check(isinstance(word, str) and _is_unicode(word), "stop", "a text or a list of texts", stop)
    bias = body.get("logit_bias")
    _check(bias is None or isinstance(bias, dict), "logit_bias", "an object of token to number", bias)
    for token, value in (bias or {}).items():
        _check(token.isascii() and token.isdigit(), "logit_bias", "tokens by their number", token)
        _check(_is_finite(value), f"logit_bias[{token}]", "a finite number", value)
    for name in _NUMBERS:
        if isinstance(value := body.get(name), int | float):
            _check(_is_finite(value), name, "a finite number", value)
    for name, kind, expected in (
        ("draft_model", str, "a text"),
        ("stream_options", dict, "an object"),
        ("chat_template_kwargs", dict, "an object"),
        ("role_mapping", dict, "an object"),
        ("tools", list, "a list"),
    ):
        _check(body.get(name) is None or isinstance(body[name], kind), name, expected, body.get(name))
    if body.get("stream_options"):
        _check("include_usage" in body["stream_options"], "stream_options", "include_usage", body["stream_options"])


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold
        return False
    return True


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def check_tokens(prompt: list[int], args: mlx_lm_server.GenerationArguments, vocab_size: int) -> None:
    """Raise a RequestError unless a tokenised request fits the model.

    Args:
        prompt: The tokens.
        args: mlx-lm's GenerationArguments.
        vocab_size: Tokens that the model tells apart.
    """
    _check(len(prompt) > 0, "prompt", "at least one token", "none")
    _check(all(isinstance(token, int) for token in prompt), "prompt", "tokens", prompt)
    for token in args.logits.logit_bias or {}:
        _check(0 <= token < vocab_size, "logit_bias", f"tokens from 0 to {vocab_size - 1}", token)
    _check(args.sampling.top_k < vocab_size, "top_k", f"less than {vocab_size}", args.sampling.top_k)
    _check(args.top_logprobs < vocab_size, "top_logprobs", f"less than {vocab_size}", args.top_logprobs)


class Generator(mlx_lm_server.ResponseGenerator):
    """mlx-lm's generation thread, which refuses what it could not finish."""

    def _tokenize(
        self, tokenizer: Tokenizer, request: mlx_lm_server.CompletionRequest, args: mlx_lm_server.GenerationArguments
    ) -> Any:
        """mlx-lm calls this where an exception is the request's own; what comes next is tried here for that reason."""
        tokenized = super()._tokenize(tokenizer, request, args)
        check_tokens(tokenized[0], args, self._vocab_size(tokenizer))
        self._make_state_machine(self.model_provider.model_key, tokenizer, args.stop_words)
        mlx_lm_server._make_sampler(args, tokenizer)
        mlx_lm_server._make_logits_processors(args)
        return tokenized

    def _vocab_size(self, tokenizer: Tokenizer) -> int:
        """The model's, no more than the tokenizer's: beyond the one are no logits, beyond the other no tokens."""
        known: Any = getattr(self, "_known_vocab", None)
        if known is None or known[0] is not tokenizer:
            known = self._known_vocab = (tokenizer, max(tokenizer.get_vocab().values(), default=-1) + 1)
        of_model = getattr(getattr(self.model_provider.model, "args", None), "vocab_size", None)
        return min(known[1], of_model) if isinstance(of_model, int) else int(known[1])

    def __init__(self, model_provider: mlx_lm_server.ModelProvider, prompt_cache: mlx_lm_server.LRUPromptCache) -> None:
        if isinstance(prompt_cache, PromptCache):
            prompt_cache.provider = model_provider
        super().__init__(model_provider, prompt_cache)

    # As the command line names the model, which mlx-lm knows by its folder.
    model_names: frozenset[str] = frozenset()

    def generate(
        self,
        request: mlx_lm_server.CompletionRequest,
        generation_args: mlx_lm_server.GenerationArguments,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if generation_args.model.model in self.model_names:
            # One name for one model: mlx-lm does not batch requests that name it differently.
            model = dataclasses.replace(generation_args.model, model="default_model")
            generation_args = dataclasses.replace(generation_args, model=model)
        stats.count("requests")
        try:
            context, responses = super().generate(request, generation_args, *args, **kwargs)
        except RequestError as error:
            stats.count("refused_requests")
            raise _Refusal(str(error)) from None
        stats.count("prompt_tokens", len(context.prompt))
        return context, _counted(responses)

    def _log_cache_stats(self) -> None:
        kept = stats.read()["kept"]
        used, reserved, fp16 = (f"{kept[name] / 1e6:.1f} MB" for name in ("used", "reserved", "fp16"))
        text = f"{len(self.prompt_cache)} sequences, {used} of tokens in {reserved} of buffers, {fp16} in fp16"
        logging.info(f"Prompt cache: {text}")
        if PromptCache.store is not None:
            now = PromptCache.store.stats()
            found = f"{now['hits']} prompts and {now['restored_tokens']} tokens were read"
            logging.info(f"Prefix store: {now['bytes'] / 1e6:.1f} MB in {now['entries']} entries, {found}")


def _counted(responses: Iterator[Any]) -> Iterator[Any]:
    for response in responses:
        stats.count("generated_tokens")
        yield response


T = TypeVar("T")


class _Order(mlx_lm_server.LRUPromptCache.CacheOrder):
    """Which kept cache is thrown away next. mlx-lm calls `pop` where one makes room for others, and nowhere else."""

    incoming: Holding = Holding()

    def push(self, model: Hashable, tokens: list[int], *args: Any, **kwargs: Any) -> None:
        super().push(model, tokens, *args, **kwargs)
        stats.keep((model, tuple(tokens)), self.incoming)

    def remove(self, model: Hashable, tokens: list[int]) -> None:
        super().remove(model, tokens)
        stats.drop((model, tuple(tokens)))

    def pop(self) -> tuple[Hashable, list[int]]:
        model, tokens = super().pop()
        stats.drop((model, tuple(tokens)))
        stats.count("prompt_cache_evictions")
        return model, tokens


class PromptCache(mlx_lm_server.LRUPromptCache):
    """mlx-lm's store of the caches of earlier requests, counted, with a prefix store on disk behind it.

    Attributes:
        store: Where prefixes are kept, None for nowhere.
        provider: mlx-lm's ModelProvider, which holds the model that is served.
    """

    store: ClassVar[PrefixStore | None] = None
    provider: mlx_lm_server.ModelProvider | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lru = self._order = _Order()
        # Models whose caches cannot be stored: on all ranks, or on this one, which goes on to ask with the others.
        self._refused: set[Hashable] = set()
        self._not_saved: set[Hashable] = set()
        self._known_ranks: tuple[weakref.ref[Any], Ranks] | None = None

    def fetch_nearest_cache(self, model: Hashable, tokens: list[int]) -> tuple[list[Any] | None, list[int]]:
        cache, rest = super().fetch_nearest_cache(model, tokens)
        ranks = self._ranks(model)
        if ranks is not None and not ranks.agree([len(rest)]):  # a bound in bytes can throw away other caches on other ranks
            cache, rest = None, tokens
        stats.count("prompt_cache_misses" if cache is None else "prompt_cache_hits")
        n_kept = len(tokens) - len(rest)
        least = 0 if cache is None else max(STORE_GAIN, len(tokens) // STORE_SHARE)
        beyond = n_kept + least
        nothing: tuple[list[Any] | None, int] = (None, 0)
        found, n = self._with_store(model, self._refused, nothing, lambda store, m: store.fetch(m, tokens, beyond=beyond))
        if found is not None:
            cache, rest = found, tokens[n:]
            _share(found)
        stats.count("reused_tokens", len(tokens) - len(rest))
        return cache, rest

    def insert_cache(self, model: Hashable, tokens: list[int], prompt_cache: list[Any], **kwargs: Any) -> None:
        self._with_store(model, self._not_saved, 0, lambda store, m: store.save(m, tokens, prompt_cache, end=None))
        _share(prompt_cache)
        self._order.incoming = holding(prompt_cache)
        super().insert_cache(model, tokens, prompt_cache, **kwargs)

    def trim_to(self, *, n_sequences: int | None = None, n_bytes: int | None = None) -> None:
        """As mlx-lm's, but what kept caches share counts once."""
        super().trim_to(n_sequences=n_sequences)
        while n_bytes is not None and len(self) and stats.kept_bytes() > n_bytes:
            super().trim_to(n_sequences=len(self) - 1)

    def _ranks(self, model: Hashable) -> Ranks | None:
        """The processes that hold the model which is served."""
        served = self.provider
        if served is None or served.model is None or served.model_key != model:
            return None
        if self._known_ranks is None or self._known_ranks[0]() is not served.model:
            self._known_ranks = (weakref.ref(served.model), Ranks(served.model))
        return self._known_ranks[1]

    def _with_store(self, model: Hashable, refused: set[Hashable], otherwise: T, use: Callable[[PrefixStore, Model], T]) -> T:
        """What the store does for the model that is served, if it can keep its caches."""
        served = self.provider
        if self.store is None or model in self._refused | refused or served is None or served.model_key != model:
            return otherwise
        try:
            if served.draft_model is not None:
                raise ValueError("[server] --prefix-store: expected no draft model, got one, whose tokens are not kept")
            return use(self.store, cast(Model, served.model))
        except ValueError as error:
            refused.add(model)
            logging.warning(f"Prefix store: nothing is kept of this model: {error}")
            return otherwise


def _share(cache: Sequence[Any]) -> None:
    """Requests that begin like this one go on from the tokens that are kept here, instead of copies."""
    for layer in flat(cache):
        if isinstance(layer, TurboQuantKVCache):
            layer.share()


class Batch(mlx_lm_server.BatchGenerator):
    """mlx-lm's batch, looked at about once a second."""

    _looked = 0.0

    def next(self) -> Any:
        responses = super().next()
        now = time.monotonic()
        if now - self._looked > LOOK_SECONDS or not self._generation_batch.uids:
            self._looked = now
            self._look()
        return responses

    def close(self) -> None:
        super().close()
        stats.run(Holding())

    def _look(self) -> None:
        stats.run(self._running())

    def _running(self) -> Holding:
        batches = (self._prompt_batch, self._generation_batch)
        return sum((holding(batch.prompt_cache, len(batch.uids)) for batch in batches if batch.uids), Holding())

    @property
    def prompt_cache_nbytes(self) -> int:
        """Bytes of the caches of requests, without what kept caches hold as well."""
        waiting = (holding(sequence[3]) for sequence in self._unprocessed_sequences)
        return sum(waiting, self._running()).numbers(stats.kept_roots())["reserved"]


# Who sends it


class _Request(io.RawIOBase):
    """What a client sends, until its time is over."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self.connection = connection
        self.seconds = seconds
        self.deadline = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request took too long to come")
        self.connection.settimeout(left)
        try:
            return self.connection.recv_into(buffer)
        finally:
            self.connection.settimeout(self.seconds)


class Handler(mlx_lm_server.APIHandler):
    """mlx-lm's handler of one connection, behind the checks."""

    timeout = CLIENT_SECONDS  # of the socket

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(_Request(self.connection, self.timeout))

    def do_POST(self) -> None:
        try:
            length = int(self.headers.get("Content-Length", "0"))
        except ValueError:
            length = -1
        if length < 0:
            return self._refuse(400, "[request] Content-Length: expected a number of bytes")
        if length > MAX_REQUEST_BYTES:
            return self._refuse(413, f"[request] Content-Length: expected at most {MAX_REQUEST_BYTES} bytes, got {length}")
        body = self.rfile.read(length)
        try:
            json.loads(body.decode())
        except (ValueError, RecursionError) as error:
            return self._refuse(400, f"[request] body: expected JSON, got {type(error).__name__}: {error!s:.200}")
        self.rfile = io.BytesIO(body)
        super().do_POST()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/":
            self._answer(200, "text/html; charset=utf-8", PAGE.read_bytes())
        elif path == "/stats":
            self._answer(200, "application/json", json.dumps(stats.read()).encode())
        elif path == "/metrics":
            try:
                text, kind = metrics.prometheus()
            except ImportError:
                return self._refuse(501, "[request] /metrics: needs a package: pip install 'tqext[serve]'")
            self._answer(200, kind, text)
        else:
            super().do_GET()

    def _answer(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self._set_cors_headers()
        self.end_headers()
        self.wfile.write(content)

    def handle_models_request(self) -> None:
        """mlx-lm's list, with the name that the server was started with."""
        answer, self.wfile = self.wfile, io.BytesIO()
        try:
            super().handle_models_request()
            listed = json.loads(self.wfile.getvalue().partition(b"\r\n\r\n")[2])
        finally:
            self.wfile = answer
        wanted = "/".join(self.path.partition("?")[0].split("/")[3:])
        known = {entry["id"] for entry in listed["data"]}
        for name in sorted(Generator.model_names - known):
            if wanted in ("", name):
                listed["data"].insert(0, {"id": name, "object": "model", "created": self.created})
        self._answer(200, "application/json", json.dumps(listed).encode())

    def validate_model_parameters(self) -> None:
        check_body(self.body, self.path)
        super().validate_model_parameters()

    def handle_completion(self, request: mlx_lm_server.CompletionRequest, stop_words: list[str]) -> None:
        try:
            super().handle_completion(request, stop_words)
        except _Refusal as refusal:
            self._refuse(400, str(refusal))

    def _refuse(self, status: int, message: str) -> None:
        answer = json.dumps({"error": message}).encode()
        self.close_connection = True
        self._set_completion_headers(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


class Server(ThreadingHTTPServer):
    """One thread for each connection, up to a number."""

    request_queue_size = BACKLOG
    daemon_threads = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._free = threading.Semaphore(MAX_CONNECTIONS)
        super().__init__(*args, **kwargs)

    def process_request(self, request: Any, client_address: object) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        try:
            request.settimeout(1.0)
            request.sendall(b"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n")
        except OSError:
            pass
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: object) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()


def _scan_cache_dir(scan: Callable[[], Any]) -> Any:
    """mlx-lm lists the hub's models in the middle of an answer; there may be none, and no folder of them."""
    try:
        return scan()
    except CacheNotFound:
        return types.SimpleNamespace(repos=())


def check_address(host: str, port: int) -> None:
    """Raise a ValueError unless a server can listen there.

    mlx-lm finds out when its generation thread runs already, which then keeps the process alive.
    """
    try:
        if not 0 <= port <= 65535:  # the C library takes it modulo 65536
            raise OverflowError("ports end at 65535")
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, address = infos[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, Server.allow_reuse_address)
            probe.bind(address)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        expected = "expected an address of this machine and a free port"
        raise ValueError(f"[server] --host, --port: {expected}, got {host} and {port}: {why}") from None


def _run(run: Callable[..., None], host: str, port: int, *args: Any, **kwargs: Any) -> None:
    if mx.distributed.init().rank() == 0:  # the others do not listen
        check_address(host, port)
    run(host, port, *args, **kwargs)
    # Ctrl-C, and all requests are done. An interpreter that ends in order can abort here, in the destructors of MLX's threads.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def guard(module: Any, named: str | None = None) -> None:
    """Let mlx-lm's server module run with these classes.

    Args:
        module: ``mlx_lm.server``.
        named: The model as the command line names it.
    """
    stats.model = named or ""
    Generator.model_names = frozenset([named] if named else [])
    module.ResponseGenerator = Generator
    module.LRUPromptCache = PromptCache
    module.BatchGenerator = Batch
    module.scan_cache_dir = functools.partial(_scan_cache_dir, module.scan_cache_dir)
    module.run = functools.partial(_run, module.run)
    module._run_http_server = functools.partial(module._run_http_server, server_class=Server, handler_class=Handler)


def keep_prefixes(folder: str, max_bytes: int | None) -> None:
    """Let the server keep prefixes of prompts in a folder; each of several ranks keeps its own part of the model's.

    Raises:
        ValueError: The folder is of no use.
    """
    store = PrefixStore(folder, max_bytes=DEFAULT_BYTES if max_bytes is None else max_bytes)
    PromptCache.store = store
    stats.prefix_store = store.stats

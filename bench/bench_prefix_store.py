"""Prompts after a restart: computed again, read from the prefix store, or read from mlx-lm's file; and an agent's day.

    python bench/bench_prefix_store.py --json bench/results/prefix_store.json

A restart: everything in memory is forgotten, and by default the system's copies of the files as well. Timed is what lies
between the prompt and its first token: opening and reading what is stored, and computing the rest. The fp16 cache is what
mlx-lm's save_prompt_cache writes of an uncompressed cache in fp16, whatever the model's own type.

An agent's day: turns of several conversations with a common system prompt, in turn, and a restart every few turns. Answers are
given tokens, fed in as a prompt, so that both ways compute the same ones. Prompts go through the server's own store of prompts.

The default model has random weights, small matrices and KV heads of realistic number and size (8 of dimension 128 in 4
layers). Its prompts are cheap to compute, compared with what its cache weighs: a real model computes longer for the same bytes.
`--model` takes any other.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.models.cache as mlx_lm_cache

import tqext
from timing import save, table
from tqext.commands import server

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "vocab_size": 1024,
    "tie_word_embeddings": True,
}
RESTART_COLUMNS = {
    "tokens": "d",
    "way": "",
    "first s": ".3f",
    "least s": ".3f",
    "read MB": ".1f",
    "reused": "d",
    "times": ".1f",
}
DAY_COLUMNS = {
    "way": "",
    "turns": "d",
    "prompt tokens": "d",
    "computed": "d",
    "from memory": "d",
    "from store": "d",
    "store hits": "d",
    "first s mean": ".3f",
    "after restart s": ".3f",
    "all s": ".1f",
    "stored MB": ".1f",
}
CHUNK = 2048


def load(name: str | None) -> Any:
    if name is not None:
        return tqext.load(name)[0]
    from mlx_lm.models import llama

    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(CONFIG))
    if mx.default_device() == mx.gpu:
        model.set_dtype(mx.float16)
    mx.eval(model.parameters())
    return model


def tokens_of(n: int, seed: int, vocabulary: int) -> list[int]:
    return [(7919 * i * (i + seed + 3) + 31 * seed) % (vocabulary - 2) + 1 for i in range(n)]


def feed(model: Any, tokens: list[int], cache: Any) -> None:
    """Compute tokens in mlx-lm's steps, up to the next token."""
    for i in range(0, len(tokens), CHUNK):
        logits = model(mx.array([tokens[i : i + CHUNK]]), cache=cache)
        mx.eval([c.state for c in cache])
    mx.eval(mx.argmax(logits[0, -1]))


def forget(folder: Path) -> None:
    """Drop the system's copies of the files: they are read from the disk again."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


# After a restart


def restart_rows(model: Any, n: int, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    vocabulary = model.args.vocab_size
    tokens, more = tokens_of(n, 1, vocabulary), tokens_of(32, 2, vocabulary)
    store_folder, file = folder / "store", folder / "fp16" / "cache.safetensors"
    file.parent.mkdir()

    stock = [mlx_lm_cache.KVCache() for _ in model.layers]
    feed(model, tokens, stock)
    for cache in stock:
        cache.keys, cache.values = (x[:, :, :n].astype(mx.float16) for x in (cache.keys, cache.values))
    mlx_lm_cache.save_prompt_cache(str(file), stock)
    del stock
    packed = tqext.make_prompt_cache(model, options.preset)
    feed(model, tokens, packed)
    for end in (True, False):
        with tqext.PrefixStore(store_folder / f"end-{end}") as store:
            store.save(model, tokens, packed, end=end)
            store.flush()
    del packed
    dtype = model.layers[0].self_attn.k_proj.weight.dtype
    dtype = dtype if dtype in (mx.float32, mx.float16, mx.bfloat16) else mx.float16

    def again() -> tuple[int, int]:
        feed(model, tokens + more, tqext.make_prompt_cache(model, options.preset))
        return 0, 0

    def from_store(where: Path) -> tuple[int, int]:
        with tqext.PrefixStore(where) as store:
            cache, reused = store.fetch(model, tokens + more, like=tqext.make_prompt_cache(model, options.preset))
            assert cache is not None
            feed(model, (tokens + more)[reused:], cache)
            return reused, store.stats()["read_bytes"]

    def from_file() -> tuple[int, int]:
        cache = mlx_lm_cache.load_prompt_cache(str(file))
        for c in cache:
            c.keys, c.values = c.keys.astype(dtype), c.values.astype(dtype)
        feed(model, more, cache)
        return n, file.stat().st_size

    ways: dict[str, Callable[[], tuple[int, int]]] = {
        "computed again": again,
        f"prefix store, {options.preset}, blocks": lambda: from_store(store_folder / "end-False"),
        f"prefix store, {options.preset}, blocks and end": lambda: from_store(store_folder / "end-True"),
        "mlx-lm's file, fp16": from_file,
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    found: dict[str, tuple[int, int]] = {}
    for _ in range(options.repeats):
        for way, run in ways.items():
            if not options.warm:
                forget(folder)
            begin = time.perf_counter()
            found[way] = run()
            seconds[way].append(time.perf_counter() - begin)
    base = statistics.median(seconds["computed again"])
    return [
        {
            "tokens": n,
            "way": way,
            "first s": statistics.median(seconds[way]),
            "least s": min(seconds[way]),
            "read MB": found[way][1] / 1e6,
            "reused": found[way][0],
            "times": base / statistics.median(seconds[way]),
        }
        for way in ways
    ]


# An agent's day


def day_row(model: Any, options: argparse.Namespace, folder: Path | None) -> dict[str, Any]:
    vocabulary = model.args.vocab_size
    system = tokens_of(options.system, 3, vocabulary)
    texts = [list(system) for _ in range(options.conversations)]
    all_prompt = computed = from_memory = from_store = 0
    first, after, seconds, store_stats = [], [], 0.0, {"hits": 0, "bytes": 0}
    hits = 0
    store = None
    for turn in range(options.turns):
        if turn % options.restart_every == 0:
            if store is not None:
                hits += store.stats()["hits"]
                store.close()
            server.PromptCache.store = store = None if folder is None else tqext.PrefixStore(folder)
            kept = server.PromptCache(options.kept)
            kept.provider = types.SimpleNamespace(model=model, draft_model=None, model_key="model")
            fresh: set[int] = set()
        talk = turn % options.conversations
        texts[talk] += tokens_of(options.user, 100 + turn, vocabulary)
        answer = tokens_of(options.answer, 500 + turn, vocabulary)
        before = 0 if store is None else store.stats()["restored_tokens"]
        begin = time.perf_counter()
        cache, rest = kept.fetch_nearest_cache("model", texts[talk])
        if cache is None:
            cache = mlx_lm_cache.make_prompt_cache(model)
        feed(model, rest, cache)
        first.append(time.perf_counter() - begin)
        if talk not in fresh:
            after.append(first[-1])
            fresh.add(talk)
        restored = 0 if store is None else store.stats()["restored_tokens"] - before
        all_prompt += len(texts[talk])
        computed += len(rest)
        from_store += restored
        from_memory += 0 if restored else len(texts[talk]) - len(rest)
        feed(model, answer, cache)
        texts[talk] += answer
        kept.insert_cache("model", list(texts[talk]), cache, cache_type="assistant")
        seconds += time.perf_counter() - begin
    if store is not None:
        store.flush()
        store_stats = store.stats()
        hits += store_stats["hits"]
        store.close()
    server.PromptCache.store = None
    return {
        "way": "memory alone" if folder is None else "with the prefix store",
        "turns": options.turns,
        "prompt tokens": all_prompt,
        "computed": computed,
        "from memory": from_memory,
        "from store": from_store,
        "store hits": hits,
        "first s mean": statistics.mean(first),
        "after restart s": statistics.mean(after),
        "all s": seconds,
        "stored MB": store_stats["bytes"] / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, a hub id or smollm2; default: random weights, as above")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="default: MLX's own")
    parser.add_argument("--preset", default="tq33")
    parser.add_argument("--tokens", type=int, nargs="*", default=[2048, 8192], help="of the prompts (default 2048 8192)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warm", action="store_true", help="leave the files in the system's memory")
    parser.add_argument("--turns", type=int, default=50, help="of the agent's day, 0 for none (default 50)")
    parser.add_argument("--conversations", type=int, default=3)
    parser.add_argument("--restart-every", type=int, default=10, metavar="TURNS")
    parser.add_argument("--system", type=int, default=1500, help="tokens of the common system prompt")
    parser.add_argument("--user", type=int, default=120, help="tokens of a question or of a tool's result")
    parser.add_argument("--answer", type=int, default=40, help="tokens of an answer")
    parser.add_argument("--kept", type=int, default=10, help="prompt caches that are kept in memory")
    parser.add_argument("--folder", type=Path, help="where to store: on the disk to be measured (default: a temporary folder)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.device:
        mx.set_default_device(getattr(mx, options.device))
    model = load(options.model)
    tqext.attach(model, options.preset)
    feed(model, [1, 2, 3], mlx_lm_cache.make_prompt_cache(model))
    names = ("preset", "repeats", "warm")
    settings = {"bench": "prefix-store", "model": options.model or "4 layers of 8 KV heads of 128, random weights"}
    settings |= {"device": str(mx.default_device()), **{name: getattr(options, name) for name in names}}
    for n in options.tokens:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            rows = restart_rows(model, n, options, Path(folder))
        print(table(rows, RESTART_COLUMNS), flush=True)
        if options.json:
            save(options.json, settings | {"part": "restart", "tokens": n}, {}, rows)
    if options.turns:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            rows = [day_row(model, options, None), day_row(model, options, Path(folder))]
        print(table(rows, DAY_COLUMNS))
        names = ("turns", "conversations", "restart_every", "system", "user", "answer", "kept")
        if options.json:
            save(options.json, settings | {"part": "day"} | {name: getattr(options, name) for name in names}, {}, rows)


if __name__ == "__main__":
    sys.exit(main())

"""Clients whose prompts begin alike, with one copy of the common tokens and with one each: memory, first token, time per token.

    python -m bench shared-prefix --json bench/results/shared_prefix.json

The server's prompt cache holds a prefix. Each client fetches it, appends a question of its own and generates, all in one of the
server's batches. The model has random weights, small matrices and KV heads of realistic number and size; the prefix's keys and
values are random numbers, as only their bytes matter. Both ways take turns.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from bench_server import CONFIG

COLUMNS = {
    "clients": "d",
    "prefix": "",
    "MB kept": ".0f",
    "MB running": ".0f",
    "MB peak": ".0f",
    "MB afterwards": ".0f",
    "first s": ".2f",
    "ms per step": ".1f",
    "processor first s": ".2f",
    "processor ms": ".1f",
}


def make_model(kv: str, device: str) -> Any:
    import mlx.core as mx
    from mlx_lm.models import llama

    import tqext

    mx.set_default_device(mx.Device(mx.DeviceType.gpu if device == "gpu" else mx.DeviceType.cpu))
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(CONFIG))
    if device == "gpu":
        model.set_dtype(mx.float16)
    mx.eval(model.parameters())
    tqext.attach(model, kv)
    return model


def filled(model: Any, n_tokens: int) -> list[Any]:
    """A prompt cache that holds so many tokens."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    cache, dtype = make_prompt_cache(model), model.model.embed_tokens.weight.dtype
    shape = (1, CONFIG["num_key_value_heads"], 2048, CONFIG["head_dim"])
    for layer in cache:
        for begin in range(0, n_tokens, shape[2]):
            keys, values = (mx.random.normal(shape).astype(dtype)[:, :, : n_tokens - begin] for _ in range(2))
            layer.update_and_fetch(keys, values)
            mx.eval(layer.state)
    return cache


def clocks() -> tuple[float, float]:
    """Of the wall, and of the processor: all threads', whatever else runs on the machine."""
    return time.perf_counter(), time.process_time()


def run(model: Any, n_clients: int, shared: bool, options: argparse.Namespace) -> dict[str, Any]:
    import mlx.core as mx

    from tqext.commands import server
    from tqext.kv import prefix

    least, prefix.MIN_SHARED = prefix.MIN_SHARED, prefix.MIN_SHARED if shared else sys.maxsize
    gc.collect()
    mx.clear_cache()
    at_rest = mx.get_active_memory()

    def held() -> float:
        mx.clear_cache()
        return (mx.get_active_memory() - at_rest) / 1e6

    try:
        kept = server.PromptCache(max_size=n_clients + 1)
        system = [i % 250 for i in range(options.prefix)]
        kept.insert_cache("model", system, filled(model, options.prefix), cache_type="system")
        before = held()
        generator = server.Batch(
            model, max_tokens=options.max_tokens, completion_batch_size=n_clients, prefill_batch_size=n_clients
        )
        mx.reset_peak_memory()
        start = clocks()
        for i in range(n_clients):
            prompt = system + [(7 * i + j) % 250 for j in range(options.question)]
            cache, rest = kept.fetch_nearest_cache("model", prompt)
            assert len(rest) == options.question
            generator.insert_segments([[rest]], caches=[cache], all_tokens=[system[:]])
            del cache
        first: tuple[float, float] | None = None
        running, ends, n_done = 0.0, [], 0
        while n_done < n_clients:
            _, responses = generator.next()
            ends.append(clocks())
            if responses and first is None:
                first = ends[-1][0] - start[0], ends[-1][1] - start[1]
                ends = ends[-1:]
            if len(ends) == options.max_tokens // 2:
                running = held() - before
            for response in responses:
                if response.finish_reason is not None:
                    n_done += 1
                    kept.insert_cache("model", response.all_tokens[:], response.prompt_cache)
        mx.synchronize()
        peak = (mx.get_peak_memory() - at_rest) / 1e6
        generator.close()
        del generator, responses, response
        gc.collect()
        afterwards = held()
    finally:
        prefix.MIN_SHARED = least
    pairs = list(itertools.pairwise(ends))[: options.max_tokens // 2 - 1]
    wall, processor = (statistics.median(b[i] - a[i] for a, b in pairs) * 1e3 for i in range(2))
    assert first is not None
    return {
        "clients": n_clients,
        "prefix": "one copy" if shared else "one each",
        "MB kept": before,
        "MB running": running,
        "MB peak": peak,
        "MB afterwards": afterwards,
        "first s": first[0],
        "ms per step": wall,
        "processor first s": first[1],
        "processor ms": processor,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv", default="tq33")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prefix", type=int, default=32768, help="tokens that all prompts begin with (default 32768)")
    parser.add_argument("--question", type=int, default=100, help="tokens of each prompt behind them (default 100)")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3, help="of both ways in turn; medians (default 3)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from timing import save, table

    model = make_model(options.kv, options.device)
    rows = []
    for n_clients in options.clients:
        found: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for _ in range(options.rounds):
            for shared in (True, False):
                found[shared].append(run(model, n_clients, shared, options))
        for runs in found.values():
            numbers = {key for key, form in COLUMNS.items() if form.endswith("f")}
            rows.append({key: statistics.median(r[key] for r in runs) if key in numbers else runs[0][key] for key in COLUMNS})
    print(table(rows, COLUMNS))
    print("MB: of arrays, without the model; running: of the requests, without what was kept for them before")
    if options.json:
        names = ("kv", "device", "prefix", "question", "max_tokens", "rounds")
        settings = {"bench": "shared_prefix", "model": "4 layers of 8 KV heads of 128, random weights"}
        save(options.json, settings | {name: getattr(options, name) for name in names}, {}, rows)


if __name__ == "__main__":
    main()

"""Memory of a growing cache as the system sees it: resident bytes and peak, beside fp16 and mlx-lm's quantised cache.

    python bench/bench_memory.py --json bench/results/memory.json

Each line is a process of its own that feeds random keys and values, in chunks as a prompt brings them, into the caches of a few
layers shaped like Qwen3-8B's (8 KV heads, head dimension 128).

    python bench/bench_memory.py --prompt 16384 --json bench/results/memory.json

runs a model with such layers on a prompt. Attention is computed for the last chunk only, whose history is the longest and whose
scores and copies so are the largest: on a CPU, MLX would take hours for all. fp32, as MLX's half precision is slower still.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from timing import save, table

LAYERS, N_KV_HEADS, HEAD_DIM, CHUNK = 4, 8, 128, 2048
CACHES = ("fp16", "mlx-lm 4 bits", "tq3", "tq4")
PROMPT_CACHES = ("fp32", "mlx-lm 4 bits", "tq3", "tq4")
PROMPT_CHUNK = 256


def make_cache(name: str):
    from mlx_lm.models.cache import KVCache, QuantizedKVCache

    if name in ("fp16", "fp32"):
        return KVCache()
    if name.startswith("mlx-lm"):
        return QuantizedKVCache(group_size=64, bits=4)
    from tqext import TurboQuantKVCache, get_policy

    return TurboQuantKVCache(get_policy(name).recipe)


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def work(name: str, context: int) -> dict:
    import mlx.core as mx
    import numpy as np

    mx.set_default_device(mx.cpu)
    mx.set_cache_limit(0)  # freed buffers go back at once: they are not the cache's
    rng = np.random.default_rng(0)
    caches = [make_cache(name) for _ in range(LAYERS)]
    shape = (1, N_KV_HEADS, CHUNK, HEAD_DIM)
    chunk = [mx.array(rng.standard_normal(shape, dtype=np.float32)).astype(mx.float16) for _ in range(2)]
    mx.eval(chunk)
    before = resident()
    for begin in range(0, context, CHUNK):
        n = min(CHUNK, context - begin)
        for cache in caches:
            cache.update_and_fetch(chunk[0][:, :, :n], chunk[1][:, :, :n])
            mx.eval(cache.state)
    after = resident()
    return {
        "resident": after - before,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
        "nbytes": sum(c.nbytes for c in caches),
    }


def run_prompt(name: str, n_tokens: int, chunk: int) -> dict:
    """A whole prompt through a model; peak and final growth of this process."""
    import mlx.core as mx
    from mlx_lm.models import base, llama

    import tqext.mlx_lm

    mx.set_default_device(mx.cpu)
    mx.set_cache_limit(0)
    args = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "intermediate_size": 32,
        "num_attention_heads": N_KV_HEADS,
        "num_key_value_heads": N_KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-5,
        "vocab_size": 128,
    }
    model = llama.Model(llama.ModelArgs.from_dict(args))
    mx.eval(model.parameters())
    tqext.mlx_lm.hook()
    attention = (mx.fast.scaled_dot_product_attention, base.quantized_scaled_dot_product_attention)

    def compute_attention(on: bool) -> None:
        def nothing(q: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            return mx.zeros(q.shape, q.dtype)

        chosen = attention if on else (nothing, nothing)
        mx.fast.scaled_dot_product_attention, base.quantized_scaled_dot_product_attention = chosen

    def feed(tokens: mx.array, caches: list) -> None:
        mx.eval(model(tokens[None], cache=caches)[:, -1], [c.state for c in caches])

    tokens = mx.arange(n_tokens) * 37 % 127
    warm = [make_cache(name) for _ in range(LAYERS)]
    feed(tokens[:64], warm)
    feed(tokens[:64], warm)
    del warm
    caches = [make_cache(name) for _ in range(LAYERS)]
    before = resident()
    last = (n_tokens - 1) // chunk * chunk
    compute_attention(False)
    for begin in range(0, last, chunk):
        feed(tokens[begin : begin + chunk], caches)
    compute_attention(True)
    start = time.perf_counter()
    feed(tokens[last:], caches)
    seconds = time.perf_counter() - start
    return {
        "resident": resident() - before,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
        "nbytes": sum(c.nbytes for c in caches),
        "seconds": seconds,
    }


def bench_prompt(n_tokens: int, chunk: int) -> list[dict]:
    rows = []
    for name in PROMPT_CACHES:
        row = run_worker(name, n_tokens, chunk)
        sizes = {f"{key} MB": row[key] / 1e6 for key in ("nbytes", "resident", "peak")}
        rows.append({"cache": name, "n_tokens": n_tokens, **row, **sizes})
    columns = {"cache": "", "n_tokens": "d", "nbytes MB": ".1f", "resident MB": ".1f", "peak MB": ".1f", "seconds": ".1f"}
    print(table(rows, columns))
    print("growth of the process; nbytes: of the cache; seconds: the last chunk")
    return rows


def run_worker(*args: object) -> dict:
    command = [sys.executable, __file__, "--worker", *map(str, args)]
    # glibc keeps freed blocks for later unless told to hand them back.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--prompt", type=int, metavar="TOKENS", help="measure a model's prompt in place of caches alone")
    parser.add_argument("--chunk", type=int, default=PROMPT_CHUNK, help="of the prompt (default %(default)s)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, *numbers = options.worker
        done = (run_prompt if len(numbers) == 2 else work)(name, *map(int, numbers))
        print(json.dumps(done))
        return
    shape = {"layers": LAYERS, "n_kv_heads": N_KV_HEADS, "head_dim": HEAD_DIM}
    if options.prompt:
        rows = bench_prompt(options.prompt, options.chunk)
        if options.json:
            save(options.json, {"bench": "prompt_memory", **shape, "chunk": options.chunk}, {}, rows)
        return
    rows = []
    for context in options.contexts:
        for name in CACHES:
            row = run_worker(name, context)
            unit = context * LAYERS * N_KV_HEADS
            sizes = {"bytes": row["resident"] / unit, "stored": row["nbytes"] / unit, "peak MB": row["peak"] / 1e6}
            rows.append({"cache": name, "n_tokens": context, **row, **sizes})
    print(table(rows, {"cache": "", "n_tokens": "d", "bytes": ".1f", "stored": ".1f", "peak MB": ".0f"}))
    print("bytes: resident, stored: nbytes of the cache; both per token, layer and KV head (fp16: 512, the packed format: 98)")
    if options.json:
        save(options.json, {"bench": "memory", **shape, "chunk": CHUNK}, {}, rows)


if __name__ == "__main__":
    main()

"""Memory of a growing cache as the system sees it: resident bytes and peak, beside fp16 and mlx-lm's quantised cache.

    python bench/bench_memory.py --json bench/results/memory.json

Each line is a process of its own that feeds random keys and values, in chunks as a prompt brings them, into the caches of a few
layers shaped like Qwen3-8B's (8 KV heads, head dimension 128), then lets one query attend to them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

LAYERS, N_KV_HEADS, N_Q_HEADS, HEAD_DIM, CHUNK = 4, 8, 32, 128, 2048
CACHES = ("fp16", "mlx-lm 4 bits", "tq3", "tq4")


def make_cache(name: str):
    from mlx_lm.models.cache import KVCache, QuantizedKVCache

    if name == "fp16":
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options.worker[0], int(options.worker[1]))))
        return
    from timing import save, table

    rows = []
    for context in options.contexts:
        for name in CACHES:
            command = [sys.executable, __file__, "--worker", name, str(context)]
            # glibc keeps freed blocks for later unless told to hand them back.
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            row = json.loads(done.stdout)
            unit = context * LAYERS * N_KV_HEADS
            sizes = {"bytes": row["resident"] / unit, "stored": row["nbytes"] / unit, "peak MB": row["peak"] / 1e6}
            rows.append({"cache": name, "n_tokens": context, **row, **sizes})
    print(table(rows, {"cache": "", "n_tokens": "d", "bytes": ".1f", "stored": ".1f", "peak MB": ".0f"}))
    print("bytes: resident, stored: nbytes of the cache; both per token, layer and KV head (fp16: 512, the packed format: 98)")
    if options.json:
        settings = {"bench": "memory", "layers": LAYERS, "n_kv_heads": N_KV_HEADS, "head_dim": HEAD_DIM, "chunk": CHUNK}
        save(options.json, settings, {}, rows)


if __name__ == "__main__":
    main()

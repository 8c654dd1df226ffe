"""Decode speed of SmolLM2-135M after a long context, compressed and not, in one run.

    python bench/bench_decode.py --context 8192 --json bench/results/decode_smollm2.json

The context is random keys and values of unit variance: what they are does not change the work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import mlx.core as mx

import tqext
from tqext.doctor import backend, versions
from tqext.mlx_lm import stock_cache
from tqext.models import load


def filled(model: Any, context: int) -> list[Any]:
    caches = stock_cache(model)
    args = model.args
    shape = (1, args.num_key_value_heads, context, args.head_dim or args.hidden_size // args.num_attention_heads)
    for cache in caches:
        cache.update_and_fetch(mx.random.normal(shape), mx.random.normal(shape))
        mx.eval(cache.state)
    return caches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--kv", default="tq3")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model, _ = load("smollm2")
    caches = {"uncompressed": filled(model, options.context)}
    caches[options.kv] = tqext.upgrade(filled(model, options.context), options.kv)
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    for i in range(options.steps + 2):
        for name, cache in caches.items():  # taking turns: both see the same disturbance
            start = time.perf_counter()
            mx.eval(model(mx.array([[7]]), cache=cache))
            if i >= 2:
                seconds[name].append(time.perf_counter() - start)
    rows = {}
    for name, cache in caches.items():
        median = statistics.median(seconds[name])
        spread = (max(seconds[name]) - min(seconds[name])) / median
        rows[name] = {
            "ms_per_token": round(median * 1e3, 2),
            "spread": round(spread, 3),
            "cache_mb": round(sum(c.nbytes for c in cache) / 1e6, 2),
        }
        print(f"{name:<14} {median * 1e3:9.1f} ms/token  {rows[name]['cache_mb']:9.2f} MB")
    if options.json:
        data = {"machine": backend(), "versions": versions(), "context": options.context, "decode": rows}
        options.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()

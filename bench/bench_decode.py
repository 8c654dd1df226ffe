"""Decode speed of a model after long contexts, compressed and not, and the share of encoding in it.

    python bench/bench_decode.py --n-tokens 1024 8192

The context is random keys and values of unit variance: what they are does not change the work. Encoding happens once every
64 tokens; its time per token is that of all layers' blocks over their length.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import mlx.core as mx

import tqext
from timing import RESULTS, machine, measure_in_turns, save, table
from tqext.cache import TurboQuantKVCache
from tqext.kv.codec import Codec
from tqext.kv.schedule import BLOCK
from tqext.kv.tokens import Exact
from tqext.mlx_lm import stock_cache
from tqext.models import load


def filled(model: Any, n_tokens: int) -> list[Any]:
    caches = stock_cache(model)
    args = model.args
    shape = (1, args.num_key_value_heads, n_tokens, args.head_dim or args.hidden_size // args.num_attention_heads)
    for cache in caches:
        cache.update_and_fetch(mx.random.normal(shape), mx.random.normal(shape))
        mx.eval(cache.state)
    return caches


def encode_ms(caches: list[Any], seconds: float) -> float:
    """Milliseconds of encoding per generated token, all layers."""
    total = 0.0
    for cache in caches:
        if not isinstance(cache, TurboQuantKVCache):
            continue
        snapshot = cache.keys_and_values()[0]
        n, keys, values = BLOCK, snapshot.packed_keys, snapshot.packed_values
        n_heads = keys.codes.shape[1]
        codec = Codec(cache.recipe, keys.head_dim, values.head_dim, cache.balance)
        block = Exact(mx.random.normal((1, n_heads, n, keys.head_dim)), mx.random.normal((1, n_heads, n, values.head_dim)))
        mx.eval(block.keys, block.values)
        total += (
            measure_in_turns(
                [lambda codec=codec, block=block: mx.eval(codec.encode(block))],
                seconds=seconds / len(caches),
            )[0].median
            / n
        )
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--n-tokens", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--kv", default="tq3")
    parser.add_argument("--seconds", type=float, default=10, help="time per line")
    parser.add_argument("--json", type=Path, default=RESULTS / f"decode_{machine()['system'].lower()}.json")
    options = parser.parse_args()
    model, _ = load(options.model)
    rows: list[dict[str, Any]] = []
    for n in options.n_tokens:
        caches = {"uncompressed": filled(model, n), options.kv: tqext.upgrade(filled(model, n), options.kv)}
        timings = measure_in_turns(
            [lambda c=c: mx.eval(model(mx.array([[7]]), cache=c)) for c in caches.values()], seconds=options.seconds
        )
        for (name, cache), t in zip(caches.items(), timings, strict=True):
            row: dict[str, Any] = {"cache": name, "n_tokens": n, "ms per token": t.median, "least": t.least, "spread": t.spread}
            row["times"] = timings[0].median / t.median
            row["cache MB"] = sum(c.nbytes for c in cache) / 1e6
            if encoding := encode_ms(cache, options.seconds / 5):
                row |= {"encode ms per token": encoding, "encode share": encoding / t.median}
            rows.append(row)
    columns = {"cache": "", "n_tokens": "d", "ms per token": ".1f", "least": ".1f", "spread": ".0f", "times": ".2f"}
    columns |= {"cache MB": ".1f", "encode ms per token": ".3f", "encode share": ".2%"}
    print(table(rows, columns))
    save(options.json, {"bench": "decode", "model": options.model, "kv": options.kv}, {}, rows)


if __name__ == "__main__":
    main()

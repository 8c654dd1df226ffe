"""Quality of every preset on SmolLM2-135M: perplexity, KL and passkeys through the cache, as JSON and a table.

    python -m bench quality --json quality.json

One window of each text in TEXTS, fed 8 tokens at a time, each of which finds what it would find alone. A run goes on where
the file ends: rows that it holds are not measured again. With --by-position it is bench_by_position.py that runs, on any model.
"""

from __future__ import annotations

import os

# A second BLAS thread waits more than it works on products of a few rows. Before NumPy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

import texts
from tqext import get_policy
from tqext.blas import use_blas
from tqext.commands.doctor import backend
from tqext.commands.evaluate import measure, passkeys, reference_logprobs, windows
from tqext.commands.versions import versions
from tqext.models import load
from tqext.presets import PRESETS, Policy

VARIANTS = [
    replace(get_policy("tq3", tail=128), name="tq3, tail 128"),
    replace(get_policy("tq3", tail=0), name="tq3, no tail"),
]
STOCK_BITS = (8, 4, 3)
TEXTS = ("emma", "modern")
PASSKEY_PRESETS = ("tq3", "tq4", "tq2-qjl", "tq3-plain")


def policies() -> list[Policy]:
    return [p for p in PRESETS.values() if p.recipe.tail] + VARIANTS[:1] + [PRESETS["tq3-plain"], VARIANTS[1]]


def bits_per_element(policy: Policy, head_dim: int) -> float:
    """Stored bits of a coded token per element of keys and values, norms and parameters included."""
    return policy.recipe.bytes_per_token(head_dim) * 8 / (2 * head_dim)


def stock_quantised(n_layers: int, bits: int) -> list[Any]:
    from mlx_lm.models.cache import QuantizedKVCache

    return [QuantizedKVCache(group_size=64, bits=bits) for _ in range(n_layers)]


def main() -> None:
    if "--by-position" in sys.argv:
        import bench_by_position

        bench_by_position.main()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--by-position", action="store_true", help="another measurement, with other options")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--step", type=int, default=8)
    parser.add_argument("--only", nargs="*", help="names of presets")
    parser.add_argument("--leave-out", nargs="*", choices=("quality", "mlx-lm", "passkeys"), default=[])
    parser.add_argument("--trials", type=int, help="passkey trials; default: the full number")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    model, tokenizer = load("smollm2")
    use_blas(model)
    head_dim = model.args.head_dim or model.args.hidden_size // model.args.num_attention_heads
    prose = {name: texts.read(name) for name in TEXTS}
    tokens = mx.concatenate([windows(tokenizer, text, options.window, 1) for text in prose.values()])
    chosen = [p for p in policies() if not options.only or p.name in options.only]
    data: dict[str, Any] = {
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {backend()}",
        "versions": versions(),
        "model": "SmolLM2-135M-Instruct, fp32 weights",
        "texts": list(prose),
        "window": options.window,
        "quality": [],
        "passkeys": [],
    }

    if options.json.exists():  # go on where another run stopped
        before = json.loads(options.json.read_text())
        if [before[key] for key in ("model", "texts", "window")] == [data[key] for key in ("model", "texts", "window")]:
            data |= {kind: before[kind] for kind in ("quality", "passkeys")}
    done = {row["preset"] for row in data["quality"]}

    def save(kind: str, row: dict[str, Any]) -> None:
        data[kind].append(row)
        print(json.dumps(row), flush=True)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(data, indent=1) + "\n")

    def quality(bits: float, step: int, **kwargs: Any) -> None:
        start = time.perf_counter()
        q = measure(model, tokens, reference=reference, step=step, **kwargs)
        seconds = round(time.perf_counter() - start)
        save("quality", asdict(q) | {"bits_per_element": round(bits, 3), "seconds": seconds})

    rows = [] if "quality" in options.leave_out else [p for p in chosen if p.name not in done]
    stock = [] if "mlx-lm" in options.leave_out else [bits for bits in STOCK_BITS if f"mlx-lm {bits}-bit" not in done]
    reference = reference_logprobs(model, tokens) if rows or stock else None
    for policy in rows:
        quality(bits_per_element(policy, head_dim), options.step, preset=policy)
    for bits in stock:
        cache = stock_quantised(len(model.layers), bits)
        named = replace(get_policy(), name=f"mlx-lm {bits}-bit")
        quality(bits + 32 / 64, options.step, preset=named, cache=cache)
    data["passkeys"] = data["passkeys"] if "passkeys" in options.leave_out else []
    for n_keys in () if "passkeys" in options.leave_out else (1, 4):
        presets = [None, *(p for p in chosen if p.name in PASSKEY_PRESETS)]
        for found in passkeys(model, tokenizer, prose["emma"], presets, n_keys=n_keys, trials=options.trials):
            save("passkeys", asdict(found))


if __name__ == "__main__":
    main()

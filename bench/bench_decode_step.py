"""The host's part of a decoding step: building the graph, encoding it and waiting for it, compressed and not.

    python bench/bench_decode_step.py
    python bench/bench_decode_step.py --device gpu --context 512 8192 --batch 1 8

A model of many small layers, so that what Python and MLX do for each layer is most of the step. `build` is the call of the
model, `encode` is ``mx.async_eval``, both in the calling thread's own time: MLX lets it wait for the device when it is too far
ahead. `wait` is the rest of the step until the token is there. `pipelined` is the time of a step as mlx-lm runs it: the next
step is built while the last one is computed. Steps that encode a block are among the others. The compressed and the
uncompressed cache take turns of a few steps; figures are medians of steps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models import qwen3

import tqext
from timing import save, table
from tqext.mlx_lm import stock_cache

SHAPE = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "vocab_size": 256,
    "tie_word_embeddings": True,
}
PHASES = ("build", "encode", "wait")


def filled(model: Any, context: int, batch: int, kv: str) -> list[Any]:
    """Caches of random tokens; sequences of a batch differ in length by a token each."""
    sequences = []
    for i in range(batch):
        caches = stock_cache(model)
        shape = (1, SHAPE["num_key_value_heads"], context - i, SHAPE["head_dim"])
        for cache in caches:
            cache.update_and_fetch(*(mx.random.normal(shape).astype(mx.float16) for _ in range(2)))
        sequences.append(caches if kv == "none" else tqext.upgrade(caches, kv))
    # One sequence stays what it is; a batch is what mlx-lm's server makes of several.
    merged = sequences[0] if batch == 1 else [type(row[0]).merge(row) for row in zip(*sequences, strict=True)]
    mx.eval([x for cache in merged for x in cache.state if isinstance(x, mx.array)])
    return list(merged)


class Run:
    """The steps of one kind of cache."""

    def __init__(self, model: Any, caches: list[Any], batch: int) -> None:
        self.model, self.caches = model, caches
        self.token = mx.zeros((batch, 1), mx.int32)
        self.times: dict[str, list[float]] = {name: [] for name in (*PHASES, "pipelined")}

    def build(self) -> mx.array:
        return mx.argmax(self.model(self.token, cache=self.caches)[:, -1:], axis=-1)

    def split(self, n: int) -> None:
        """Steps of which each waits for the one before."""
        for _ in range(n):
            begin, start = time.perf_counter(), time.thread_time()
            token = self.build()
            built = time.thread_time()
            mx.async_eval(token)
            encoded = time.thread_time()
            mx.eval(token)
            rest = time.perf_counter() - begin - (encoded - start)
            self.token = token
            for name, seconds in zip(PHASES, (built - start, encoded - built, rest), strict=True):
                self.times[name].append(seconds * 1e3)

    def pipelined(self, n: int) -> None:
        """Steps as mlx-lm's generation runs them."""
        begin = time.perf_counter()
        for _ in range(n):
            token = self.build()
            mx.async_eval(token)
            mx.eval(self.token)
            self.token = token
            now = time.perf_counter()
            self.times["pipelined"].append((now - begin) * 1e3)
            begin = now
        mx.eval(self.token)

    def row(self) -> dict[str, float]:
        found = {f"{name} ms": statistics.median(times) for name, times in self.times.items()}
        found["build + encode ms"] = statistics.median(
            a + b for a, b in zip(self.times["build"], self.times["encode"], strict=True)
        )
        found["mean build + encode ms"] = statistics.mean(self.times["build"]) + statistics.mean(self.times["encode"])
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--context", type=int, nargs="+", default=[512])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--kv", default="tq3")
    parser.add_argument("--steps", type=int, default=256, help="of each kind; encoding a block comes once in 64")
    parser.add_argument("--json", type=Path, help="file to add the run to")
    options = parser.parse_args()
    mx.set_default_device(mx.cpu if options.device == "cpu" else mx.gpu)
    mx.random.seed(0)
    tqext.mlx_lm.hook()
    model = qwen3.Model(qwen3.ModelArgs.from_dict({**SHAPE, "num_hidden_layers": options.layers}))
    model.set_dtype(mx.float16)
    mx.eval(model.parameters())
    rows: list[dict[str, Any]] = []
    turn = 16
    for batch in options.batch:
        for context in options.context:
            kinds = {name: Run(model, filled(model, context, batch, name), batch) for name in ("none", options.kv)}
            for run in kinds.values():
                run.split(2)
                run.times = {name: [] for name in run.times}
            for _ in range(max(1, options.steps // (2 * turn))):
                for step in ("split", "pipelined"):
                    for run in kinds.values():
                        getattr(run, step)(turn)
            found = {name: run.row() for name, run in kinds.items()}
            for name, row in found.items():
                times = row["build + encode ms"] / found["none"]["build + encode ms"]
                whole = row["pipelined ms"] / found["none"]["pipelined ms"]
                label = "uncompressed" if name == "none" else name
                rows.append({"cache": label, "batch": batch, "context": context, **row, "host": times, "step": whole})
    columns = {"cache": "", "batch": "d", "context": "d"} | {f"{name} ms": ".2f" for name in PHASES}
    columns |= {
        "build + encode ms": ".2f",
        "mean build + encode ms": ".2f",
        "host": ".2f",
        "pipelined ms": ".2f",
        "step": ".2f",
    }
    print(table(rows, columns))
    if options.json:
        settings = {"bench": "decode_step", "device": options.device, "layers": options.layers, "kv": options.kv}
        save(options.json, {**settings, "context": options.context, "batch": options.batch}, {}, rows)


if __name__ == "__main__":
    main()

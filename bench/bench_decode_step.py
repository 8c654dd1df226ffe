"""The host's part of a decoding step: building the graph, encoding it and waiting for it, compressed and not.

    python bench/bench_decode_step.py
    python bench/bench_decode_step.py --device gpu --context 512 8192 --batch 1 8 --ragged 0 7

A model of many small layers, so that what Python and MLX do for each layer is most of the step. `build` is the call of the
model, `encode` is ``mx.async_eval``, both in the calling thread's own time: MLX lets it wait for the device when it is too far
ahead. `wait` is the rest of the step until the token is there. `pipelined` is the time of a step as mlx-lm runs it: the next
step is built while the last one is computed. Steps that encode a block are among the others. The compressed and the
uncompressed cache take turns of a few steps; figures are medians of steps.
"""

from __future__ import annotations

import argparse
import itertools
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
# Times of the uncompressed cache's.
RATIOS = {"build x": "build", "host x": "build + encode", "mean host x": "mean build + encode", "step x": "pipelined"}


def filled(model: Any, context: int, batch: int, kv: str, ragged: int, dtype: mx.Dtype) -> list[Any]:
    """Caches of random tokens; each sequence of a batch is `ragged` tokens shorter than the one before."""
    sequences = []
    for i in range(batch):
        caches = stock_cache(model)
        shape = (1, SHAPE["num_key_value_heads"], context - i * ragged, SHAPE["head_dim"])
        for cache in caches:
            cache.update_and_fetch(*(mx.random.normal(shape).astype(dtype) for _ in range(2)))
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
    parser.add_argument("--ragged", type=int, nargs="+", default=[0, 1], help="tokens by which the sequences of a batch differ")
    parser.add_argument("--kv", default="tq3")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: float32 on the CPU, else float16")
    parser.add_argument(
        "--steps", type=int, default=128, help="of each kind, split and pipelined; encoding a block comes once in 64"
    )
    parser.add_argument("--json", type=Path, help="file to add the run to")
    options = parser.parse_args()
    mx.set_default_device(mx.cpu if options.device == "cpu" else mx.gpu)
    mx.random.seed(0)
    tqext.mlx_lm.hook()
    model = qwen3.Model(qwen3.ModelArgs.from_dict({**SHAPE, "num_hidden_layers": options.layers}))
    dtype = getattr(mx, options.dtype or ("float32" if options.device == "cpu" else "float16"))
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    rows: list[dict[str, Any]] = []
    turn = 16
    cases = [(batch, ragged) for batch in options.batch for ragged in (options.ragged if batch > 1 else [0])]
    for (batch, ragged), context in itertools.product(cases, options.context):
        names = ("none", options.kv)
        kinds = {name: Run(model, filled(model, context, batch, name, ragged, dtype), batch) for name in names}
        for run in kinds.values():
            run.split(2)
            run.times = {name: [] for name in run.times}
        for _ in range(max(1, options.steps // turn)):
            for step in ("split", "pipelined"):
                for run in kinds.values():
                    getattr(run, step)(turn)
        found = {name: run.row() for name, run in kinds.items()}
        for name, row in found.items():
            times = {key: row[f"{of} ms"] / found["none"][f"{of} ms"] for key, of in RATIOS.items()}
            label = "uncompressed" if name == "none" else name
            rows.append({"cache": label, "batch": batch, "ragged": ragged, "context": context, **row, **times})
    columns = {"cache": "", "batch": "d", "ragged": "d", "context": "d"} | {f"{name} ms": ".2f" for name in PHASES}
    columns |= {"build + encode ms": ".2f", "mean build + encode ms": ".2f", "pipelined ms": ".2f"} | dict.fromkeys(
        RATIOS, ".2f"
    )
    print(table(rows, columns))
    if options.json:
        settings = {
            "bench": "decode_step",
            "device": options.device,
            "layers": options.layers,
            "kv": options.kv,
            "steps": options.steps,
        }
        save(options.json, {**settings, "context": options.context, "batch": options.batch, "ragged": options.ragged}, {}, rows)


if __name__ == "__main__":
    main()

"""The host's part of a decoding step: building the graph, encoding it and waiting for it, compressed and not.

    python bench/bench_decode_step.py
    python bench/bench_decode_step.py --sweep --json bench/results/mine.json
    python bench/bench_decode_step.py --device gpu --context 512 8192 --batch 1 8 --ragged 0 7

A model of many small layers, so that what Python and MLX do for each layer is most of the step. `build` is the call of the
model, `encode` is ``mx.async_eval``, both in the calling thread's own time: MLX lets it wait for the device when it is too far
ahead. `wait` is the rest of the step until the token is there. `pipelined` is the time of a step as mlx-lm runs it: the next
step is built while the last one is computed. Steps that encode a block are among the others. The compressed and the
uncompressed cache take turns of a few steps; figures are medians of steps.

--sweep is another bench, of whole steps: a model of the shape of Qwen3-8B with 1-bit, 4-bit and 16-bit weights, on a GPU, one
sequence at contexts of 512 to 131072 tokens and batches of 8 x 32768 and 32 x 8192. Caches are filled with one random block of
keys and values after the other, without running a prompt. Tokens per second are of the median step, pipelined; `times` is
tokens per second over those of the 16-bit cache.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models import qwen3

import bench_cuda
import tqext
from shapes import QWEN3_8B
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


# Batch and context of --sweep.
CASES = ((1, 512), (1, 2048), (1, 8192), (1, 32768), (1, 131072), (8, 32768), (32, 8192))
WEIGHTS = ("q1", "4bit", "fp16")
MOST_TOKENS_TOGETHER = 131072
SWEEP_TURNS = 3


def random_caches(model: Any, kv: str, batch: int, context: int, dtype: mx.Dtype) -> list[Any]:
    """Caches of `context` tokens: one random block, again and again."""
    shape, block = model.args, min(context, max(64, 32768 // batch))
    k, v = (mx.random.normal((batch, shape.num_key_value_heads, block, shape.head_dim)).astype(dtype) for _ in range(2))
    caches = stock_cache(model) if kv == "none" else bench_cuda.compressed_caches(vars(shape), kv)
    for cache in caches:
        for begin in range(0, context, block):
            n = min(block, context - begin)
            cache.update_and_fetch(k[:, :, :n], v[:, :, :n])
            mx.eval([x for x in cache.state if isinstance(x, mx.array)])
    return list(caches)


def sweep(options: argparse.Namespace, settings: dict[str, Any], dtype: mx.Dtype) -> list[dict[str, Any]]:
    """Each cache of each case under all kinds of weights: filling a cache takes longer than its steps."""
    start, rows = time.perf_counter(), []
    models = {kind: bench_cuda.make_model(kind, settings, dtype) for kind in options.weights}
    print(f"made {len(models)} models in {time.perf_counter() - start:.0f} s", flush=True)
    for batch, context in options.cases:
        if time.perf_counter() - start > options.budget:
            print(f"{options.budget:.0f} s are over: {batch} x {context} and what follows is left out", flush=True)
            break
        names = ("none", *options.presets)
        found: dict[tuple[str, str], dict[str, Any]] = {}
        # Side by side, and in turns, where memory holds them all.
        for together in [names] if batch * context <= MOST_TOKENS_TOGETHER else [(name,) for name in names]:
            caches = {name: random_caches(models[options.weights[0]], name, batch, context, dtype) for name in together}
            for kind, model in models.items():
                runs = {name: Run(model, caches[name], batch) for name in together}
                for run in runs.values():
                    run.pipelined(3)
                    run.times["pipelined"] = []
                for _ in range(SWEEP_TURNS):
                    for run in runs.values():
                        run.pipelined(max(1, options.steps // SWEEP_TURNS))
                for name, run in runs.items():
                    ms = statistics.median(run.times["pipelined"])
                    found[kind, name] = {
                        "weights": kind, "batch": batch, "context": context,
                        "cache": "uncompressed" if name == "none" else name, "ms": ms, "tokens/s": batch * 1e3 / ms,
                        "cache GB": sum(x.nbytes for x in caches[name]) / 1e9,
                    }  # fmt: skip
            del caches, runs, run
            gc.collect()
            mx.clear_cache()
        for (kind, _), row in found.items():
            row["times"] = row["tokens/s"] / found[kind, "none"]["tokens/s"]
            print({key: round(x, 3) if isinstance(x, float) else x for key, x in row.items()}, flush=True)
        rows += [found[kind, name] for kind in models for name in names]
        if options.json:  # a long run that is cut off keeps what it has
            save_sweep(options, settings, rows)
    return rows


def save_sweep(options: argparse.Namespace, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    chosen = {name: getattr(options, name) for name in ("weights", "presets", "steps", "device")}
    chosen["cases"] = [list(case) for case in options.cases]
    save(options.json, {"bench": "decode_sweep", **chosen, "layers": settings["num_hidden_layers"]}, {}, rows)


def pair(text: str) -> tuple[int, int]:
    """Batch and context of BATCHxCONTEXT."""
    batch, context = (int(x) for x in text.split("x"))
    return batch, context


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
    parser.add_argument("--sweep", action="store_true", help="whole steps of the 8B shape (see above); needs a GPU")
    parser.add_argument("--weights", nargs="+", default=list(WEIGHTS), choices=WEIGHTS, help="of --sweep")
    parser.add_argument("--presets", nargs="+", default=["tq3", "tq33"], help="of --sweep")
    parser.add_argument("--cases", nargs="+", type=pair, default=list(CASES), help="of --sweep: BATCHxCONTEXT ...")
    parser.add_argument("--budget", type=float, default=130, help="of --sweep: seconds after which no new case is begun")
    parser.add_argument("--small", action="store_true", help="of --sweep: a tiny model on any device")
    parser.add_argument("--json", type=Path, help="file to add the run to")
    options = parser.parse_args()
    if options.sweep and not options.small:
        if mx.default_device() != mx.gpu:
            raise SystemExit("bench_decode_step: expected a GPU for --sweep, got the CPU only (--small runs anywhere)")
        options.device = "gpu"
    mx.set_default_device(mx.cpu if options.device == "cpu" else mx.gpu)
    mx.random.seed(0)
    tqext.mlx_lm.hook()
    if options.sweep:
        options.steps = min(options.steps, 24)
        settings = {**SHAPE, "num_hidden_layers": 2, "hidden_size": 128} if options.small else QWEN3_8B
        dtype = getattr(mx, options.dtype or "float16")
        rows = sweep(options, settings, dtype)
        columns = {"weights": "", "batch": "d", "context": "d", "cache": "", "ms": ".2f", "tokens/s": ".1f", "times": ".2f"}
        print(table(rows, {**columns, "cache GB": ".2f"}))
        return
    model = qwen3.Model(qwen3.ModelArgs.from_dict({**SHAPE, "num_hidden_layers": options.layers}))
    dtype = getattr(mx, options.dtype or ("float32" if options.device == "cpu" else "float16"))
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    rows = []
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

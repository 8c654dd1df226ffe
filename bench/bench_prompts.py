"""Prompts and chat turns: many query tokens at once, their attention alone and a model's time and memory, beside fp16.

    python bench/bench_prompts.py
    python bench/bench_prompts.py --device gpu --only turns --contexts 32768 --json bench/results/prompts_h200.json

`attention`: one call of the operator, causal, over coded tokens, 64 exact first ones and the exact recent ones among which
the queries' own keys are, beside ``mx.fast.scaled_dot_product_attention`` in half precision (fp32 on a CPU). Calls wait for
each other, as those of a model's layers do.

`prompt`: a whole prompt in chunks, as mlx-lm's generation evaluates them, up to the first token. The peak of memory is MLX's
own on a GPU, the resident one of the process on a CPU (Linux); `more` is what came to that of the model.

`turns`: new tokens after a history, several times in a row. The first turn of a kind compiles kernels and makes graphs, and
is listed apart; the others are medians. `build` is the call of the model, `encode` is ``mx.async_eval``, `wait` the rest until
the first token is there: what the device takes longer than the host.

On a GPU the model has the shape of Qwen3-8B and random 1-bit weights; on a CPU it is a small one (`--layers`).
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

import tqext
from bench_cuda import DIM, make_model, packed, timed
from bench_decode_step import SHAPE
from timing import save, table
from tqext.mlx_lm import stock_cache

N_KV_HEADS, N_REPEATS, N_FIRST, N_BEFORE = 8, 4, 64, 64  # N_BEFORE: exact tokens before the queries' own
PARTS = ("attention", "prompt", "turns")
PHASES = ("build", "encode", "wait")
DEFAULTS = {
    "gpu": {"contexts": [8192, 32768, 131072], "queries": [9, 32, 100, 128, 512, 2048], "chunks": [512, 2048]},
    "cpu": {"contexts": [8192], "queries": [9, 100, 512], "chunks": [512]},
}


def half(*shape: int) -> mx.array:
    return mx.random.normal(shape).astype(mx.float16 if mx.default_device() == mx.gpu else mx.float32)


def attention(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for context, n in itertools.product(options.contexts, options.queries):
        q = half(1, N_KV_HEADS * N_REPEATS, n, DIM)
        first, tail = ([half(1, N_KV_HEADS, m, DIM) for _ in range(2)] for m in (N_FIRST, N_BEFORE + n))
        # MLX's attention is several times slower where the number of keys is no multiple of 8.
        n_keys = (context + N_BEFORE + n) // 8 * 8
        plain = [half(1, N_KV_HEADS, n_keys, DIM) for _ in range(2)]
        mx.eval(q, first, tail, plain)
        operations = 4 * DIM * N_KV_HEADS * N_REPEATS * n * (context + N_BEFORE + n / 2)
        calls = max(1, min(40, int(options.operations / operations)))

        def theirs(x: mx.array, _: int, plain: list[mx.array] = plain) -> mx.array:
            return mx.fast.scaled_dot_product_attention(x, *plain, scale=DIM**-0.5, mask="causal")

        fp16, _ = timed(theirs, q, n=calls, repeats=options.repeats)
        for preset in options.presets:
            k, v = packed(1, N_KV_HEADS, context - N_FIRST, preset)

            def ours(
                x: mx.array, _: int, k: Any = k, v: Any = v, first: Any = tuple(first), tail: Any = tuple(tail)
            ) -> mx.array:
                return tqext.turboquant_attention(x, k, v, first=first, tail=tail, mask="causal")

            us, spread = timed(ours, q, n=calls, repeats=options.repeats)
            yield {"preset": preset, "keys": context, "queries": n, "us": us, "spread %": spread,
                   "TFLOP/s": operations / us / 1e6, "uncompressed us": fp16, "times": fp16 / us}  # fmt: skip


def small_model(layers: int) -> Any:
    from mlx_lm.models import qwen3

    model = qwen3.Model(qwen3.ModelArgs.from_dict({**SHAPE, "max_position_embeddings": 262144, "num_hidden_layers": layers}))
    mx.eval(model.parameters())
    return model


class Memory:
    """The most memory since it was made: MLX's on a GPU, the process's on Linux, else None."""

    def __init__(self) -> None:
        gc.collect()
        mx.clear_cache()
        if mx.default_device() == mx.gpu:
            mx.reset_peak_memory()
        elif (reset := Path("/proc/self/clear_refs")).exists():
            reset.write_text("5")
        self.before = self._read("VmRSS") if mx.default_device() == mx.cpu else mx.get_active_memory()

    @staticmethod
    def _read(name: str) -> int | None:
        status = Path("/proc/self/status")
        lines = status.read_text().splitlines() if status.exists() else []
        return next((int(line.split()[1]) << 10 for line in lines if line.startswith(name)), None)

    def row(self) -> dict[str, float | None]:
        peak = self._read("VmHWM") if mx.default_device() == mx.cpu else mx.get_peak_memory()
        if peak is None or self.before is None:
            return {"peak GB": None, "more GB": None}
        return {"peak GB": peak / 1e9, "more GB": (peak - self.before) / 1e9}


def make_cache(model: Any, name: str) -> list[Any]:
    return list(stock_cache(model) if name == "uncompressed" else tqext.make_prompt_cache(model, name, guard=False))


def feed(model: Any, cache: list[Any], tokens: mx.array, is_last: bool = True) -> dict[str, float]:
    """A chunk through the model, as mlx-lm runs it; seconds of its phases."""
    begin = time.perf_counter()
    logits = model(tokens, cache=cache)
    wanted = [c.state for c in cache] + ([mx.argmax(logits[:, -1], axis=-1)] if is_last else [])
    del logits
    built = time.perf_counter()
    mx.async_eval(wanted)
    encoded = time.perf_counter()
    mx.eval(wanted)
    mx.synchronize()
    return dict(zip(PHASES, (built - begin, encoded - built, time.perf_counter() - encoded), strict=True))


def prompt(options: argparse.Namespace, model: Any) -> Iterator[dict[str, Any]]:
    warm = max(options.chunks)
    for name in ("uncompressed", *options.presets):
        cache = make_cache(model, name)
        for _ in range(2):
            feed(model, cache, mx.zeros((1, warm), mx.int32))
        del cache
    for context, chunk in itertools.product(options.contexts, options.chunks):
        fp16 = 0.0
        for name in ("uncompressed", *options.presets):
            cache, memory = make_cache(model, name), Memory()
            tokens = mx.random.randint(0, SHAPE["vocab_size"], (1, context))
            mx.eval(tokens)
            phases = dict.fromkeys(PHASES, 0.0)
            begin = time.perf_counter()
            for at in range(0, context, chunk):
                times = feed(model, cache, tokens[:, at : at + chunk], at + chunk >= context)
                phases = {key: phases[key] + times[key] for key in PHASES}
                mx.clear_cache()
            seconds = time.perf_counter() - begin
            fp16 = fp16 or seconds
            yield {"cache": name, "tokens": context, "chunk": chunk, "seconds": seconds, "times": seconds / fp16,
                   **{f"{key} s": x for key, x in phases.items()}, **memory.row(),
                   "cache GB": sum(c.nbytes for c in cache) / 1e9}  # fmt: skip
            del cache


def filled(model: Any, name: str, context: int) -> list[Any]:
    """Caches of so many random tokens."""
    cache, arguments = make_cache(model, name), model.args
    for layer in cache:
        for begin in range(0, context, 4096):
            shape = (1, arguments.num_key_value_heads, min(4096, context - begin), arguments.head_dim)
            layer.update_and_fetch(half(*shape), half(*shape))
            mx.eval(layer.state)
    gc.collect()
    mx.clear_cache()
    return cache


def turns(options: argparse.Namespace, model: Any) -> Iterator[dict[str, Any]]:
    for context in options.contexts:
        fp16: dict[int, float] = {}
        for name in ("uncompressed", *options.presets):
            cache = filled(model, name, context)
            for n in options.turns:
                found = []
                for _ in range(options.repeats + 1):
                    tokens = mx.random.randint(0, SHAPE["vocab_size"], (1, n))
                    mx.eval(tokens)
                    found.append({key: 1e3 * x for key, x in feed(model, cache, tokens).items()})
                    mx.clear_cache()
                whole = [sum(times.values()) for times in found]
                median = statistics.median(whole[1:])
                fp16.setdefault(n, median)
                yield {"cache": name, "history": context, "tokens": n, "first ms": whole[0], "ms": median,
                       "most ms": max(whole[1:]), "times": median / fp16[n],
                       **{f"{key} ms": statistics.median(times[key] for times in found[1:]) for key in PHASES}}  # fmt: skip
            del cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="gpu" if mx.default_device() == mx.gpu else "cpu")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--presets", nargs="+", default=["tq3", "tq33"])
    parser.add_argument("--contexts", type=int, nargs="+")
    parser.add_argument("--queries", type=int, nargs="+", help="of `attention`")
    parser.add_argument("--chunks", type=int, nargs="+", help="of `prompt`")
    parser.add_argument("--turns", type=int, nargs="+", default=[20, 100, 500], help="new tokens")
    parser.add_argument("--repeats", type=int, default=5, help="of a turn, and of a call's measurement")
    parser.add_argument("--layers", type=int, default=4, help="of the small model")
    parser.add_argument("--operations", type=float, help="of the calls of `attention` that are timed together, about")
    parser.add_argument("--json", type=Path, help="file to add the run to")
    options = parser.parse_args()
    mx.set_default_device(mx.cpu if options.device == "cpu" else mx.gpu)
    for name, values in DEFAULTS[options.device].items():
        setattr(options, name, getattr(options, name) or values)
    options.operations = options.operations or (1e10 if options.device == "cpu" else 1e13)
    mx.random.seed(0)
    model: Any = None
    for part in options.only:
        if part != "attention" and model is None:
            tqext.mlx_lm.hook()
            model = make_model("q1") if options.device == "gpu" else small_model(options.layers)
        rows: list[dict[str, Any]] = []
        for row in attention(options) if part == "attention" else {"prompt": prompt, "turns": turns}[part](options, model):
            rows.append(row)
            print(part, *(f"{key} {x:.4g}" if isinstance(x, float) else f"{key} {x}" for key, x in row.items()), flush=True)
            if options.json:  # after each row: a long run that is cut off keeps what it has
                settings = {"bench": f"prompts_{part}", "device": options.device, "presets": options.presets}
                settings |= {"contexts": options.contexts, "layers": options.layers if options.device == "cpu" else 36}
                save(options.json, settings, {}, rows)
        print(table(rows, {key: ".3f" if isinstance(x, float) else "" for key, x in rows[0].items()}))


if __name__ == "__main__":
    main()

"""A Qwen3 of Bonsai-8B's shape with 1-bit weights and a compressed cache: memory, and tokens per second while decoding.

    python bench/bench_bonsai_shape.py
    python bench/bench_bonsai_shape.py --context 8192 --kv none --mlx

Weights are random bits made in place (a real 1-bit model has the same bytes and takes the same time); the cache is filled with
random keys and values up to the context, so that no long prefill is needed. `--mlx` adds MLX's own affine 1-bit path on the
same bits, one token: on a CPU half a minute with fp32 activations, a quarter of an hour with fp16.
"""

import argparse
import gc
import os
import resource
import statistics
import time
from pathlib import Path
from typing import Any

from shapes import QWEN3_8B

SHAPE = {**QWEN3_8B, "max_position_embeddings": 65536}
DTYPES = ("float32", "float16", "bfloat16")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=512, help="tokens in the cache when decoding starts")
    parser.add_argument("--tokens", type=int, default=16, help="tokens to decode")
    parser.add_argument("--kv", default="bonsai", help="preset of the cache, or none")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of activations")
    parser.add_argument("--prefill", type=int, default=0, help="also time a prompt of so many tokens")
    parser.add_argument("--mlx", action="store_true", help="also MLX's own 1-bit path, one token")
    parser.add_argument("--json", type=Path, help="file to add the run to")
    return parser.parse_args()


def resident_megabytes() -> float:
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1e3


def make_model(n_layers: int, dtype: Any) -> Any:
    import mlx.core as mx
    import mlx.nn
    from mlx.utils import tree_flatten
    from mlx_lm.models import qwen3

    from tqext import nn

    model = qwen3.Model(qwen3.ModelArgs.from_dict({**SHAPE, "num_hidden_layers": n_layers}))  # lazy: no weight is made
    leaves = tree_flatten(model.leaf_modules(), is_leaf=lambda m: isinstance(m, mlx.nn.Module))
    paths = {path for path, layer in leaves if isinstance(layer, (mlx.nn.Linear, mlx.nn.Embedding))}
    nn.insert_empty(model, paths, dtype)
    mx.random.seed(0)
    for path, layer in tree_flatten(model.leaf_modules(), is_leaf=lambda m: isinstance(m, mlx.nn.Module)):
        if path in paths:
            rows, words = layer.weight.shape
            layer.weight = mx.random.randint(-(2**31), 2**31 - 1, (rows, words)).view(mx.uint32)
            layer.scales = mx.full((rows, words // 4), (words * 32) ** -0.5, dtype=mx.float16)
        elif "weight" in layer:
            layer.weight = layer.weight.astype(dtype)
        mx.eval(layer.parameters())
    return model


def embedding_bytes(model: Any) -> int:
    return sum(value.nbytes for value in model.model.embed_tokens.parameters().values())


def make_affine(model: Any, dtype: Any) -> None:
    """MLX's own layers on the same words; in place."""
    import mlx.nn
    from mlx.utils import tree_flatten, tree_unflatten

    from tqext import nn

    layers = []
    for path, layer in tree_flatten(model.leaf_modules(), is_leaf=lambda m: isinstance(m, mlx.nn.Module)):
        if not isinstance(layer, (nn.Q1Linear, nn.Q1Embedding)):
            continue
        kind = mlx.nn.QuantizedEmbedding if isinstance(layer, nn.Q1Embedding) else mlx.nn.QuantizedLinear
        affine = kind(128, 128, group_size=128, bits=1)
        affine.pop("bias", None)
        affine.weight = layer.weight
        affine.scales = 2 * layer.scales.astype(dtype)
        affine.biases = -layer.scales.astype(dtype)
        layers.append((path, affine))
    model.update_modules(tree_unflatten(layers))


def filled_cache(model: Any, preset: str, context: int, dtype: Any) -> Any:
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    import tqext

    cache = make_prompt_cache(model) if preset == "none" else tqext.make_prompt_cache(model, preset)
    shape = (1, SHAPE["num_key_value_heads"], context, SHAPE["head_dim"])
    for layer in cache:
        layer.update_and_fetch(mx.random.normal(shape).astype(dtype), mx.random.normal(shape).astype(dtype))
        mx.eval(layer.state)
    return cache


def decode(model: Any, cache: Any, n: int) -> list[float]:
    """Seconds of each of `n` steps, the first of which warms up."""
    import mlx.core as mx

    token, times = mx.array([[1]]), []
    for _ in range(n + 1):
        begin = time.perf_counter()
        logits = model(token, cache=cache)
        token = mx.argmax(logits[:, -1:], axis=-1)
        mx.eval(token)
        times.append(time.perf_counter() - begin)
    return times[1:]


def main() -> None:
    args = arguments()
    import mlx.core as mx
    import mlx_lm.utils

    import timing
    import tqext

    mx.set_default_device(mx.cpu)
    dtype = getattr(mx, args.dtype)
    bandwidth = timing.read_bandwidth(tqext.num_threads())
    before = resident_megabytes()
    model = make_model(args.layers, dtype)
    gc.collect()
    mx.clear_cache()
    weights = sum(value.nbytes for _, value in mlx_lm.utils.tree_flatten(model.parameters()))
    n_weights = mlx_lm.utils.get_total_parameters(model)
    loaded = resident_megabytes()
    mx.reset_peak_memory()
    cache = filled_cache(model, args.kv, args.context, dtype)
    held = sum(layer.nbytes for layer in cache)
    gc.collect()
    mx.clear_cache()
    filled = resident_megabytes()
    times = decode(model, cache, args.tokens)
    # A token reads all weights but the embedding's, of which it takes one row, and the cache.
    rate = (weights - embedding_bytes(model) + held) / statistics.median(times) / 1e9
    row: dict[str, Any] = {
        "weights": "tqext Q1_0",
        "type": args.dtype,
        "cache": args.kv,
        "context": args.context,
        "tokens/s": 1 / statistics.median(times),
        "best": 1 / min(times),
        "ms": 1e3 * statistics.median(times),
        "GB/s": rate,
        "share %": 100 * rate / bandwidth,
        "bits/weight": 8 * weights / n_weights,
        "weights MB": weights / 1e6,
        "weights RSS": loaded - before,
        "cache MB": held / 1e6,
        "cache RSS": filled - loaded,
        "peak MB": mx.get_peak_memory() / 1e6,
    }
    rows = [row]
    if args.prefill:
        prompt = mx.random.randint(0, SHAPE["vocab_size"], (1, args.prefill))
        empty = filled_cache(model, args.kv, 0, dtype) if args.kv == "none" else tqext.make_prompt_cache(model, args.kv)
        begin = time.perf_counter()
        mx.eval(model(prompt, cache=empty)[:, -1])
        row["prompt tokens/s"] = args.prefill / (time.perf_counter() - begin)
    if args.mlx:
        make_affine(model, dtype)
        stock = sum(value.nbytes for _, value in mlx_lm.utils.tree_flatten(model.parameters()))
        begin = time.perf_counter()
        mx.eval(model(mx.array([[1]]), cache=filled_cache(model, "none", args.context, dtype)))
        spent = time.perf_counter() - begin
        plain = {"weights": "mlx affine 1-bit", "type": args.dtype, "cache": "none", "context": args.context}
        rows.append({**plain, "tokens/s": 1 / spent, "ms": 1e3 * spent, "weights MB": stock / 1e6})
        rows[-1]["bits/weight"] = 8 * stock / n_weights
    print(
        f"{tqext.isa()}, {tqext.num_threads()} threads, {args.layers} layers, "
        f"reading {bandwidth:.1f} GB/s, load {os.getloadavg()[0]:.1f}"
    )
    columns = {"weights": "", "type": "", "cache": "", "context": "d", "tokens/s": ".3f", "best": ".3f", "ms": ".0f"}
    columns |= {"GB/s": ".2f", "share %": ".0f"}
    sizes = ("weights MB", "weights RSS", "cache MB", "cache RSS", "peak MB")
    columns = {**columns, "bits/weight": ".4f", **dict.fromkeys(sizes, ".0f"), "prompt tokens/s": ".1f"}
    print(timing.table(rows, columns))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e3 if os.uname().sysname == "Linux" else 1e6)
    print(f"largest resident size of the process: {peak:.0f} MB")
    if args.json:
        settings = {"bench": "bonsai_shape", "context": args.context, "kv": args.kv, "dtype": args.dtype, "layers": args.layers}
        timing.save(
            args.json,
            {**settings, "isa": tqext.isa(), "threads": tqext.num_threads()},
            {"largest_mb": peak, "read_gb_per_s": bandwidth},
            rows,
        )


if __name__ == "__main__":
    main()

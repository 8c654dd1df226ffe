"""NVIDIA GPUs: attention and 1-bit products against MLX's own, and a model of the shape of Qwen3-8B end to end.

Several calls are evaluated as one graph that was built before the clock starts, as a model's layers are: one evaluation
alone has a floor of about 25 us. The arrays rotate among several sets, together larger than the last-level cache.

    python bench/bench_cuda.py --json bench/results/cuda_h200.json [--only attention q1 scores model]
"""

import argparse
import gc
import json
import math
import statistics
import time

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

import tqext

DIM = 128


def timed(call, n=40, repeats=9):
    """Median microseconds per call, and half the distance of the fastest and the slowest run in percent."""
    times = []
    for i in range(repeats + 2):
        graph = [call(k) for k in range(n)]
        mx.synchronize()
        start = time.perf_counter()
        mx.eval(graph)
        mx.synchronize()
        if i >= 2:
            times.append((time.perf_counter() - start) / n * 1e6)
    middle = statistics.median(times)
    return middle, 50 * (max(times) - min(times)) / middle


def words(*shape):
    return mx.random.randint(0, 2**31 - 1, shape).astype(mx.uint32) * 2 + mx.random.randint(0, 2, shape).astype(mx.uint32)


def packed(batch, heads, keys):
    k = tqext.PackedKeys(codes=words(batch, heads, keys, DIM // 32 * 3), bits=3, head_dim=DIM,
                         norms=(mx.random.uniform(shape=(batch, heads, keys, 1)) + 0.5).astype(mx.float16))  # fmt: skip
    v = tqext.PackedValues(
        codes=words(batch, heads, keys, DIM // 32 * 2),
        bits=2,
        head_dim=DIM,
        params=(mx.random.uniform(shape=(batch, heads, keys, DIM // 16)) - 0.5).astype(mx.float16),
    )
    mx.eval(k.codes, k.norms, v.codes, v.params)
    return k, v


def halves(*shape):
    return mx.random.normal(shape).astype(mx.float16)


def copy_bandwidth():
    x = mx.zeros((1 << 30,), dtype=mx.uint8)
    mx.eval(x)
    us, _ = timed(lambda _: x + 1, n=4)
    return 2 * x.nbytes / us / 1e3


def attention(copy):
    rows = []
    for heads in (8, 16, 32, 64, 128):
        for keys in (512, 1024, 4096, 16384, 32768, 131072):
            if heads * keys > 64 * 65536:
                continue
            for tail in (0, 52):
                if tail and heads not in (8, 64):
                    continue
                sets = 3 if heads * keys < 1 << 21 else 2
                q, compressed = halves(1, 4 * heads, 1, DIM), [packed(1, heads, keys) for _ in range(sets)]
                exact = {"tail": (halves(1, heads, tail, DIM), halves(1, heads, tail, DIM))} if tail else {}
                mx.eval(q, exact)
                us, spread = timed(lambda i: tqext.turboquant_attention(q, *compressed[i % sets], **exact))
                del compressed
                plain = [(halves(1, heads, keys + tail, DIM), halves(1, heads, keys + tail, DIM)) for _ in range(sets)]
                mx.eval(plain)
                fp16, _ = timed(lambda i: mx.fast.scaled_dot_product_attention(q, *plain[i % sets], scale=DIM**-0.5))
                row = {"heads": heads, "keys": keys, "tail": tail, "us": us, "spread": spread, "fp16_us": fp16}
                row |= {"ratio": fp16 / us, "gbs": heads * keys * 98 / us / 1e3}
                row["share_of_copy"] = row["gbs"] / copy
                if not tail and heads in (8, 64):
                    row["mlx_4bit_us"] = stock_quantised(q, plain[0], heads)
                rows.append(row)
                print("attention", {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
                del plain
    return rows


def stock_quantised(q, plain, heads):
    """mlx-lm's attention on its 4-bit cache, as models/base.py writes it."""
    from mlx_lm.models.base import quantized_scaled_dot_product_attention as attend

    k, v = (mx.quantize(x, group_size=64, bits=4) for x in plain)
    mx.eval(k, v)
    return timed(lambda _: attend(q, k, v, scale=DIM**-0.5, mask=None, group_size=64, bits=4), n=10)[0]


def q1(copy):
    rows = []
    for out, cols in ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (151936, 4096)):
        n_bytes = out * cols * 1.125 / 8
        sets = max(2, min(30, int(150e6 / n_bytes) + 1))
        weights = [(words(out, cols // 32), mx.full((out, cols // 128), 0.02, dtype=mx.float16)) for _ in range(sets)]
        mx.eval(weights)
        for n in (1, 8, 32):
            x = halves(n, cols)
            mx.eval(x)
            us, spread = timed(lambda i: tqext.q1_matmul(x, *weights[i % sets]), n=60)
            row = {"rows": out, "cols": cols, "n": n, "us": us, "spread": spread, "gbs": n_bytes / us / 1e3}
            rows.append(row | {"share_of_copy": row["gbs"] / copy})
            print("q1", {k: round(v, 2) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    return rows


def scores():
    """The TurboQuant paper's claim ("up to 8 x"): scores of compressed keys against a product with fp32 keys."""
    rows = []
    for heads, keys in ((8, 131072), (64, 32768)):
        k, _ = packed(1, heads, keys)
        # The narrowest values there are: attention reads them too.
        narrow = tqext.PackedValues(codes=words(1, heads, keys, 2), params=halves(1, heads, keys, 2), bits=2, head_dim=32)
        q = mx.random.normal((1, 4 * heads, 1, DIM))
        full = mx.random.normal((1, heads, keys, DIM))
        mx.eval(q, full, narrow.codes, narrow.params)
        us, _ = timed(lambda _: tqext.turboquant_attention(q, k, narrow), n=10)
        fp32, _ = timed(lambda _: q.reshape(1, heads, 4, DIM) @ full.swapaxes(-1, -2), n=10)
        rows.append({"heads": heads, "keys": keys, "us": us, "fp32_us": fp32, "ratio": fp32 / us})
        print("scores", rows[-1], flush=True)
        del full
    return rows


def make_model(kind):
    from mlx_lm.models import qwen3

    from tqext.nn import Q1Linear

    arguments = qwen3.ModelArgs(
        model_type="qwen3", hidden_size=4096, num_hidden_layers=36, intermediate_size=12288, num_attention_heads=32,
        rms_norm_eps=1e-6, vocab_size=151936, num_key_value_heads=8, max_position_embeddings=262144, rope_theta=1e6,
        head_dim=DIM, tie_word_embeddings=False)  # fmt: skip
    model = qwen3.Model(arguments)  # its own weights are never evaluated
    shapes = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    replaced = []
    for name, module in shapes:
        rows, cols = module.weight.shape
        if kind == "q1":
            new = Q1Linear(words(rows, cols // 32), mx.full((rows, cols // 128), 0.02, dtype=mx.float16))
        elif kind == "4bit":
            new = nn.QuantizedLinear(128, 8, bias=False, group_size=64, bits=4)
            new.weight, new.scales = words(rows, cols // 8), mx.full((rows, cols // 64), 0.004, dtype=mx.float16)
            new.biases = mx.full((rows, cols // 64), -0.03, dtype=mx.float16)
        else:
            new = nn.Linear(8, 8, bias=False)
            new.weight = halves(rows, cols) * 0.02
        replaced.append((name, new))
    model.update_modules(tree_unflatten(replaced))
    model.model.embed_tokens.weight = halves(151936, 4096) * 0.02
    for _, module in model.named_modules():
        if isinstance(module, nn.RMSNorm):
            module.weight = mx.ones(module.weight.shape, dtype=mx.float16)
    mx.eval(model.parameters())
    return model


def fill(cache, batch, context):
    """Random tokens in every layer's cache."""
    for layer in cache:
        for begin in range(0, context, 4096):
            n = min(4096, context - begin)
            out = layer.update_and_fetch(halves(batch, 8, n, DIM), halves(batch, 8, n, DIM))
            mx.eval(layer.state)
            del out
    gc.collect()
    mx.clear_cache()


def model_steps(model, cache, batch, steps=24):
    token, times = mx.zeros((batch, 1), dtype=mx.int32), []
    for _ in range(steps):
        start = time.perf_counter()
        token = mx.argmax(model(token, cache=cache)[:, -1:], axis=-1)
        mx.eval(token)
        times.append(time.perf_counter() - start)
    return statistics.median(times[4:])


def end_to_end(budget):
    from mlx_lm.models.cache import KVCache

    rows, begin = [], time.perf_counter()
    for kind in ("fp16", "4bit", "q1"):
        model = make_model(kind)
        cases = [(1, 2048), (1, 32768), (1, 131072), (8, 32768), (16, 32768), (32, 2048), (32, 32768)] if kind == "fp16" else [
            (1, 2048), (1, 32768), (32, 2048)]  # fmt: skip
        for batch, context in cases:
            for name in ("fp16", "tq3"):
                row = {"weights": kind, "cache": name, "batch": batch, "context": context}
                if time.perf_counter() - begin > budget:
                    continue
                mx.clear_cache()
                mx.reset_peak_memory()
                try:
                    cache = [KVCache() for _ in range(36)] if name == "fp16" else tqext.make_prompt_cache(model, "tq3")
                    fill(cache, batch, context)
                    seconds = model_steps(model, cache, batch)
                    row |= {"ms": seconds * 1e3, "tokens_per_s": batch / seconds, "peak_gb": mx.get_peak_memory() / 1e9}
                except Exception as error:  # out of memory is a result
                    row |= {"error": str(error)[:120]}
                cache = None
                gc.collect()
                mx.clear_cache()
                rows.append(row)
                print("model", row, flush=True)
        del model
        gc.collect()
        mx.clear_cache()
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    parser.add_argument("--only", nargs="*", default=["attention", "q1", "scores", "model"])
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds for the model")
    arguments = parser.parse_args()
    mx.random.seed(0)
    copy = copy_bandwidth()
    result = {"device": dict(mx.device_info()), "mlx": mx.__version__, "tqext": tqext.__version__, "copy_gbs": copy}
    print(result, flush=True)

    def save():
        if arguments.json:
            with open(arguments.json, "w") as file:
                json.dump(result, file, indent=1, default=str)

    for name, run in (("attention", lambda: attention(copy)), ("q1", lambda: q1(copy)), ("scores", scores),
                      ("model", lambda: end_to_end(arguments.budget))):  # fmt: skip
        if name in arguments.only:
            result[name] = run()
            save()


if __name__ == "__main__":
    main()

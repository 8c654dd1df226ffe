"""NVIDIA GPUs: attention and 1-bit products against MLX's own, and a model of the shape of Qwen3-8B end to end.

Forty calls are evaluated as one graph that was built before the clock starts, as a model's layers are: one evaluation alone
has a floor of about 25 us. As in a model each call of attention waits for the one before (its output is the next one's query);
a second figure is of calls that do not wait, which MLX may run side by side. The arrays rotate among several sets, together
larger than the last-level cache.

    python bench/bench_cuda.py --json bench/results/h100.json [--only attention presets shapes lists q1 ternary scores model]
"""

import argparse
import gc
import importlib.util
import itertools
import math
import statistics
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

import tqext
from shapes import PRESETS, QWEN3_8B, QWEN3_8B_HEAD, QWEN3_8B_LAYER, TODAY
from timing import save

DIM = 128


def timed(call, first=None, n=40, repeats=9):
    """Median microseconds per call(x, k), and half the distance of the fastest and the slowest run in percent.

    With `first` a call's x is the output of the one before, else None.
    """
    times = []
    for i in range(repeats + 2):
        graph, x = [], first
        for k in range(n):
            graph.append(call(x, k))
            x = None if first is None else graph[-1]
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


def packed(batch, heads, keys, preset="tq3", centred=True, dim=DIM):
    """Random bytes of a preset; centred: with means of blocks and a balance, as a cache has them."""
    recipe = tqext.get_policy(preset).recipe

    def norms():
        return (mx.random.uniform(shape=(batch, heads, keys, 1)) + 0.5).astype(mx.float16)

    k = tqext.PackedKeys(
        codes=words(batch, heads, keys, dim // 32 * recipe.key_bits), norms=norms(), bits=recipe.key_bits, head_dim=dim
    )
    if centred:
        n_blocks = tqext.format.n_blocks(keys)
        k = k._replace(means=halves(batch, heads, n_blocks, dim), balance=mx.exp(mx.random.normal((heads, dim)) / 2))
    if recipe.value_coding == "groups":
        params = (mx.random.uniform(shape=(batch, heads, keys, dim // 16)) - 0.5).astype(mx.float16)
    else:
        params = norms()
    codes = words(batch, heads, keys, dim // 32 * recipe.value_bits)
    v = tqext.PackedValues(codes=codes, params=params, bits=recipe.value_bits, head_dim=dim, coding=recipe.value_coding)
    mx.eval([x for x in (*k, *v) if isinstance(x, mx.array)])
    return k, v


def halves(*shape):
    return mx.random.normal(shape).astype(mx.float16)


def copy_bandwidth():
    x = mx.zeros((1 << 30,), dtype=mx.uint8)
    mx.eval(x)
    us, _ = timed(lambda _x, _k: x + 1, n=4)
    return 2 * x.nbytes / us / 1e3


def attention(copy):
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

                def ours(x, k, q=q, packed=compressed, exact=exact):
                    return tqext.turboquant_attention(q if x is None else x, *packed[k % len(packed)], **exact)

                us, spread = timed(ours, q)
                apart, _ = timed(ours)
                n_bytes = sum(x.nbytes for x in compressed[0])
                del compressed, ours
                plain = [(halves(1, heads, keys + tail, DIM), halves(1, heads, keys + tail, DIM)) for _ in range(sets)]
                mx.eval(plain)

                def theirs(x, k, q=q, plain=plain):
                    return mx.fast.scaled_dot_product_attention(q if x is None else x, *plain[k % len(plain)], scale=DIM**-0.5)

                fp16, _ = timed(theirs, q)
                fp16_apart, _ = timed(theirs)
                gbs = (n_bytes + heads * tail * 512) / us / 1e3
                row = {"KV heads": heads, "keys": keys, "tail": tail, "us": us, "spread": spread, "GB/s": gbs,
                       "share": gbs / copy, "fp16 us": fp16, "times": fp16 / us,
                       "times, not waiting": fp16_apart / apart}  # fmt: skip
                if not tail and heads in (8, 64):
                    row["mlx-lm 4 bits us"] = stock_quantised(q, plain[0])
                    row["FlashAttention us"] = flash_attention(heads, keys)
                yield row
                del plain, theirs


def presets(copy):
    """The presets beside each other, and tq3 without means and balance; 4 query heads per KV head."""
    for batch, heads, keys in ((1, 8, 16384), (1, 8, 32768), (1, 8, 131072), (8, 8, 16384), (8, 8, 32768), (8, 8, 131072)):
        q = halves(batch, 4 * heads, 1, DIM)
        mx.eval(q)
        first = None
        for preset, centred in (("tq3", False), *((name, True) for name in PRESETS)):
            one = packed(batch, heads, keys, preset, centred)
            n_bytes = sum(x.nbytes for x in one)
            # More than the last-level cache holds.
            sets = [one, *(packed(batch, heads, keys, preset, centred) for _ in range(min(12, max(1, int(150e6 / n_bytes)))))]
            us, spread = timed(lambda x, k, sets=sets: tqext.turboquant_attention(x, *sets[k % len(sets)]), q)
            first = first or us
            gbs = n_bytes / us / 1e3
            yield {"batch": batch, "KV heads": heads, "keys": keys, "preset": preset if centred else "tq3, no means",
                   "bytes per token": n_bytes / (batch * heads * keys), "us": us, "spread": spread, "GB/s": gbs,
                   "share": gbs / copy, "time of tq3 without means": us / first}  # fmt: skip
            del one, sets


def shapes(copy, batch=8, keys=32768, queries=range(1, 9)):
    """Shapes of today's models: a step of decoding, and of checking drafted tokens (causal), with an exact tail."""
    for dim, repeats, heads in TODAY:
        tail = 56  # with contexts that are no multiple of 8 MLX's attention takes several times as long
        sets = [packed(batch, heads, keys, dim=dim) for _ in range(2)]
        n_bytes = sum(x.nbytes for x in (*sets[0][0], *sets[0][1]) if isinstance(x, mx.array))
        exact = tuple(halves(batch, heads, tail, dim) for _ in range(2))
        plain = [tuple(halves(batch, heads, keys + tail, dim) for _ in range(2)) for _ in range(2)]
        mx.eval(exact, plain)
        for n in queries:
            q, mask = halves(batch, heads * repeats, n, dim), "causal" if n > 1 else None
            mx.eval(q)

            def ours(x, k, sets=sets, mask=mask, exact=exact):
                return tqext.turboquant_attention(x, *sets[k % 2], mask=mask, tail=exact)

            def theirs(x, k, plain=plain, mask=mask, dim=dim):
                return mx.fast.scaled_dot_product_attention(x, *plain[k % 2], scale=dim**-0.5, mask=mask)

            us, spread = timed(ours, q, n=10, repeats=5)
            fp16, _ = timed(theirs, q, n=4, repeats=5)
            gbs = (n_bytes + sum(x.nbytes for x in exact)) / us / 1e3
            yield {"head dim": dim, "query heads per KV head": repeats, "KV heads": heads, "batch": batch, "keys": keys,
                   "queries": n, "us": us, "spread": spread, "GB/s": gbs, "share": gbs / copy, "fp16 us": fp16,
                   "times": fp16 / us}  # fmt: skip
        del sets, plain


def lists(copy, n_listed=2048):
    """A list of 2048 tokens, in no order, beside all of them; 4 query heads per KV head."""
    for batch, heads, keys in ((1, 8, 32768), (1, 8, 131072), (8, 8, 32768), (8, 8, 131072)):
        q, both = halves(batch, 4 * heads, 1, DIM), [packed(batch, heads, keys) for _ in range(2)]
        ids = [mx.argsort(mx.random.uniform(shape=(batch, heads, 1, keys)))[..., :n_listed].astype(mx.int32) for _ in range(8)]
        mx.eval(q, ids)

        def call(x, k, both=both, ids=ids, heads=heads):
            return tqext.turboquant_attention(x, *both[k % 2], indices=ids[k % 8][:, :heads])

        all_us, _ = timed(lambda x, k, both=both: tqext.turboquant_attention(x, *both[k % 2]), q)
        us, spread = timed(call, q)
        shared_us, _ = timed(lambda x, k, call=call: call(x, k, heads=1), q)
        few = packed(batch, heads, n_listed)
        few_us, _ = timed(lambda x, k, few=few: tqext.turboquant_attention(x, *few), q)
        yield {"batch": batch, "KV heads": heads, "keys": keys, "listed": n_listed, "us": us, "spread": spread,
               "us, one list for all heads": shared_us, "all keys us": all_us, "times": all_us / us,
               "us of as many keys": few_us}  # fmt: skip
        del both, few


def stock_quantised(q, plain):
    """mlx-lm's attention on its 4-bit cache, as models/base.py writes it."""
    from mlx_lm.models.base import quantized_scaled_dot_product_attention as attend

    k, v = (mx.quantize(x, group_size=64, bits=4) for x in plain)
    mx.eval(k, v)

    def call(x, _):
        return attend(x, k, v, scale=DIM**-0.5, mask=None, group_size=64, bits=4)

    return timed(call, q, n=10)[0]


def flash_attention(heads, keys, n=20):
    """PyTorch's FlashAttention on fp16, microseconds per call in a CUDA graph; None without PyTorch."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def tensor(n_tokens):
        return torch.randn(1, heads, n_tokens, DIM, device="cuda", dtype=torch.float16)

    q, sets = tensor(4), [(tensor(keys), tensor(keys)) for _ in range(2)]
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        for k, v in sets:
            torch.nn.functional.scaled_dot_product_attention(q, k, v)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(n):
                torch.nn.functional.scaled_dot_product_attention(q, *sets[i % 2])
    times = []
    for _ in range(9):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / n)
    del q, sets, graph
    torch.cuda.empty_cache()
    return statistics.median(times)


def one_bit(rows, cols):
    return words(rows, cols // 32), mx.full((rows, cols // 128), 0.01, dtype=mx.float16)


def q1(copy):
    for out, cols in (*QWEN3_8B_LAYER, QWEN3_8B_HEAD):
        n_bytes = out * cols * 1.125 / 8
        sets = max(2, min(30, int(150e6 / n_bytes) + 1))
        weights = [one_bit(out, cols) for _ in range(sets)]
        dense = [halves(out, cols) for _ in range(2)]
        mx.eval(weights, dense)
        for n in (1, 2, 4, 8, 9, 16, 32, 64, 100, 128, 256, 512, 2048):
            x = halves(n, cols)
            mx.eval(x)
            us, spread = timed(lambda _, k, x=x, w=weights: tqext.q1_matmul(x, *w[k % len(w)]), n=60 if n < 16 else 20)
            fp16, _ = timed(lambda _, k, x=x, w=dense: x @ w[k % 2].T, n=20)
            gbs = n_bytes / us / 1e3
            yield {"rows": out, "columns": cols, "rows of x": n, "us": us, "spread": spread, "GB/s": gbs, "share": gbs / copy,
                   "fp16 us": fp16, "times": fp16 / us}  # fmt: skip
        del weights, dense
    # All matrices of the model for one token, each waiting for the one before.
    layers = [[one_bit(*shape) for shape in QWEN3_8B_LAYER] for _ in range(36)]
    head = one_bit(*QWEN3_8B_HEAD)
    x = {cols: halves(1, cols) for cols in (4096, 12288)}
    mx.eval(layers, head, x)

    def step():
        y = x[4096]
        for qkv, out, up, down in layers:
            y = tqext.q1_matmul(y, *qkv)[:, :4096]
            y = tqext.q1_matmul(y, *out)
            y = tqext.q1_matmul(tqext.q1_matmul(y, *up)[:, :12288], *down)
        return tqext.q1_matmul(y, *head)

    us, spread = timed(lambda _x, _k: step(), n=4)
    gbs = (36 * sum(r * c for r, c in QWEN3_8B_LAYER) + math.prod(QWEN3_8B_HEAD)) * 1.125 / 8 / us / 1e3
    yield {"rows": "all of an 8B model", "rows of x": 1, "us": us, "spread": spread, "GB/s": gbs, "share": gbs / copy}


# A feed-forward layer and the head of Qwen3.5-27B.
TERNARY_ROWS = (1, 2, 4, 7, 8, 16, 32, 64, 512)
TERNARY_MATRICES = ((17408, 5120), (5120, 17408), (248320, 5120))


def ternary(copy, rows=TERNARY_ROWS):
    """Beside MLX's product of the same words with float16 scales and biases, and fp16 weights.

    Of many rows also the weights decoded for the call, and the kernel for a few rows, eight at a time.
    """
    for out, cols in TERNARY_MATRICES:
        n_bytes = out * cols * 2.125 / 8
        weights = [(words(out, cols // 16), halves(out, cols // 128)) for _ in range(max(2, min(8, int(150e6 / n_bytes) + 1)))]
        biases = [-scales for _, scales in weights]
        dense = [halves(out, cols) for _ in range(2)]
        mx.eval(weights, biases, dense)
        affine = [(weight, scales, bias) for (weight, scales), bias in zip(weights, biases, strict=True)]
        settings = {"group_size": 128, "bits": 2}
        kernel = mx.compile(tqext.ternary_matmul, shapeless=True)  # traced with one row, it stays the kernel with many
        kernel(halves(1, cols), *weights[0])
        for n, dtype in itertools.product(rows, ("float16", "bfloat16")):
            if ((n > 8 or dtype != "float16") and out > 100000) or (dtype != "float16" and n not in (1, 16, 512)):
                continue
            x = halves(n, cols).astype(getattr(mx, dtype))
            mx.eval(x)
            effort = {"n": 20, "repeats": 5} if n <= 8 else {"n": 6, "repeats": 3}

            def decoded(_, k, x=x, affine=affine):
                wide = mx.float16 if x.dtype == mx.float16 else mx.float32
                w = mx.dequantize(affine[k % 2][0], *(y.astype(wide) for y in affine[k % 2][1:]), **settings)
                return (x.astype(wide) @ w.T).astype(x.dtype)

            us, spread = timed(lambda _, k, x=x, w=weights: tqext.ternary_matmul(x, *w[k % len(w)]), **effort)
            row = {"rows": out, "columns": cols, "rows of x": n, "type": dtype, "us": us, "spread": spread}
            row |= {"GB/s": n_bytes / us / 1e3, "share": n_bytes / us / 1e3 / copy}
            if dtype == "float16":
                row["affine us"], _ = timed(
                    lambda _, k, x=x, w=affine: mx.quantized_matmul(x, *w[k % len(w)], transpose=True, **settings), **effort
                )
                row["fp16 us"], _ = timed(lambda _, k, x=x, w=dense: x @ w[k % 2].T, **effort)
            if n > 8:
                row["decoded us"], _ = timed(decoded, **effort)
                row["kernel us"], _ = timed(lambda _, k, x=x, w=weights, f=kernel: f(x, *w[k % len(w)]), **effort)
            yield row
        del weights, biases, dense, affine


def scores(_copy):
    """The TurboQuant paper's claim ("up to 8 x"): scores of compressed keys against a product with fp32 keys."""
    for heads, keys in ((8, 131072), (64, 32768)):
        k, _ = packed(1, heads, keys, centred=False)
        # The narrowest values there are: attention reads them too.
        narrow = tqext.PackedValues(codes=words(1, heads, keys, 2), params=halves(1, heads, keys, 2), bits=2, head_dim=32)
        q = mx.random.normal((1, 4 * heads, 1, DIM))
        full = mx.random.normal((1, heads, keys, DIM))
        mx.eval(q, full, narrow.codes, narrow.params)
        us, _ = timed(lambda _x, _k, k=k, v=narrow, q=q: tqext.turboquant_attention(q, k, v), n=10)
        fp32, _ = timed(lambda _x, _k, k=full, q=q: q.reshape(1, -1, 4, DIM) @ k.swapaxes(-1, -2), n=10)
        yield {"KV heads": heads, "keys": keys, "us": us, "fp32 us": fp32, "times": fp32 / us}
        del full


def make_model(kind, settings=QWEN3_8B, dtype=mx.float16):
    """Random weights of a kind: "q1", "4bit" or "fp16" (the given dtype)."""
    from mlx_lm.models import qwen3

    from tqext.nn import Q1Linear

    model = qwen3.Model(qwen3.ModelArgs.from_dict(settings))  # its own weights are never evaluated

    def random(*shape):
        return (mx.random.normal(shape) * 0.02).astype(dtype)

    replaced = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        rows, cols = module.weight.shape
        if kind == "q1":
            new = Q1Linear(*one_bit(rows, cols))
        elif kind == "4bit":
            new = nn.QuantizedLinear(128, 8, bias=False, group_size=64, bits=4)
            new.weight, new.scales = words(rows, cols // 8), mx.full((rows, cols // 64), 0.004, dtype=dtype)
            new.biases = mx.full((rows, cols // 64), -0.03, dtype=dtype)
        else:
            new = nn.Linear(8, 8, bias=False)
            new.weight = random(rows, cols)
        replaced.append((name, new))
    model.update_modules(tree_unflatten(replaced))
    model.model.embed_tokens.weight = random(settings["vocab_size"], settings["hidden_size"])
    for _, module in model.named_modules():
        if isinstance(module, nn.RMSNorm):
            module.weight = mx.ones(module.weight.shape, dtype=dtype)
    mx.eval(model.parameters())
    return model


def compressed_caches(settings, preset):
    """Caches of a preset for a model of these sizes; of random weights no balance can be calibrated."""

    def balance():
        return mx.exp(0.3 * mx.random.normal((settings["num_key_value_heads"], settings["head_dim"])))

    recipe = tqext.get_policy(preset).recipe
    return [tqext.TurboQuantKVCache(recipe, balance=balance()) for _ in range(settings["num_hidden_layers"])]


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


# Batch and context, by the weights.
CASES = {
    "q1": [(1, 2048), (1, 131072), (32, 2048), (32, 32768), (8, 32768), (1, 32768)],
    "4bit": [(1, 2048), (1, 131072), (32, 2048), (32, 32768), (8, 32768), (1, 32768)],
    "fp16": [(1, 2048), (1, 131072), (8, 32768), (32, 2048), (32, 32768), (1, 32768)],
}


def end_to_end(_copy, weights=tuple(CASES), budget=math.inf):
    """Both caches in every case; no new case after `budget` seconds of one kind of weights."""
    from mlx_lm.models.cache import KVCache

    for kind in weights:
        begin, model = time.perf_counter(), make_model(kind)
        for batch, context in CASES[kind]:
            if time.perf_counter() - begin > budget:
                break
            found = {}
            for name in ("fp16", "tq3"):
                row = {"weights": kind, "batch": batch, "context": context, "cache": name}
                mx.clear_cache()
                mx.reset_peak_memory()
                try:
                    cache = [KVCache() for _ in range(36)] if name == "fp16" else compressed_caches(QWEN3_8B, "tq3")
                    fill(cache, batch, context)
                    found[name] = model_steps(model, cache, batch)
                    row |= {"tokens/s": batch / found[name], "peak GB": mx.get_peak_memory() / 1e9}
                    if name == "tq3" and "fp16" in found:
                        row["times"] = found["fp16"] / found["tq3"]
                except RuntimeError as error:  # that memory is short is a result
                    row["failed"] = str(error)[:120]
                cache = None
                gc.collect()
                mx.clear_cache()
                yield row
        del model
        gc.collect()
        mx.clear_cache()


def main():
    parts = {"attention": attention, "presets": presets, "shapes": shapes, "lists": lists}
    parts |= {"q1": q1, "ternary": ternary, "scores": scores, "model": end_to_end}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="*", choices=list(parts), default=list(parts))
    parser.add_argument("--rows", type=int, nargs="*", default=TERNARY_ROWS, help="of x, for `ternary`")
    parser.add_argument("--weights", nargs="*", choices=list(CASES), default=list(CASES), help="of the model")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds for each kind of weights of the model")
    arguments = parser.parse_args()
    if mx.default_device() != mx.gpu:
        raise SystemExit("bench_cuda: expected a GPU that MLX can use, got the CPU only")
    mx.random.seed(0)
    copy = copy_bandwidth()
    print(f"{mx.device_info()['device_name']}: MLX copies {copy:.0f} GB/s", flush=True)
    options = {"model": {"weights": arguments.weights, "budget": arguments.budget}, "ternary": {"rows": arguments.rows}}
    for name in arguments.only:
        rows = []
        for row in parts[name](copy, **options.get(name, {})):
            rows.append({key: round(x, 3) if isinstance(x, float) else x for key, x in row.items() if x is not None})
            print(name, rows[-1], flush=True)
            if arguments.json:  # after each row: a long run that is cut off keeps what it has
                save(arguments.json, {"bench": f"cuda_{name}", "dim": DIM}, {"copy_gbs": round(copy)}, rows)


if __name__ == "__main__":
    main()

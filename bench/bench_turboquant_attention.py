"""Attention on packed keys and values beside MLX's, PyTorch's and mlx-lm's quantised attention, through whole operators.

    python bench/bench_turboquant_attention.py
    python bench/bench_turboquant_attention.py --n-keys 1024 16384 131072 --threads 1 --isa avx2 --json bench/results/mine.json
    python bench/bench_turboquant_attention.py --formats plain tq3 tq33 --only tqext
    python bench/bench_turboquant_attention.py --shapes today --formats tq3 --n-queries 4 --n-keys 8192
    python bench/bench_turboquant_attention.py --n-queries 512 --n-keys 8192 --formats tq3 tq33 --only tqext torch
    python bench/bench_turboquant_attention.py --n-listed 2048 --n-keys 32768 131072 --formats tq3 --only tqext

Lines: "tqext" is the plain call, without means and balance, with --key-bits and --value-bits; "tqext tq3" and the like are what
a cache of that preset asks for, with the means of blocks and a balance, without its exact tokens. "torch" is there where
PyTorch is installed (only this bench uses it): its attention on as many threads, a KV head's query heads as rows when decoding,
an additive causal mask in the query's type for several query tokens. "listed": a list of --n-listed tokens in no order, another
for each KV head (`indices`); its bytes are theirs, and the means of as many blocks. "one copy for 8": --n-sequences sequences
over keys that they share, with 64 packed tokens of their own each (`shared_prefix_attention`), beside as many copies.
Every line reads the whole history once per call: bytes are those of the keys and values as stored, GB/s is bytes over the
median time, share is GB/s over the read bandwidth measured by the same run on the same number of threads. With
--processor-time, which is for a busy machine, there is no share: a bandwidth can only be measured by the wall.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

from shapes import PRESETS, TODAY
from timing import machine, measure_in_turns, operator_arguments, read_bandwidth, save, table

QUERIES = ("fp32", "fp16", "bf16")


def shape(text: str) -> tuple[int, ...]:
    """Head dimension, query heads and KV heads of DIMxQUERYHEADSxKVHEADS."""
    sizes = tuple(int(size) for size in text.split("x"))
    if len(sizes) != 3:
        raise argparse.ArgumentTypeError(f"expected DIMxQUERYHEADSxKVHEADS, got {text}")
    return sizes


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-keys", type=int, nargs="+", default=[1024, 16384])
    parser.add_argument("--n-queries", type=int, default=1, help="query tokens at the end of the history (causal beyond 1)")
    parser.add_argument("--n-listed", type=int, default=0, help="tokens of a list beside all of them (default: no such line)")
    parser.add_argument(
        "--n-sequences",
        type=int,
        default=0,
        help="sequences that share all keys, beside as many copies (default: no such lines)",
    )
    parser.add_argument("--n-q-heads", type=int, default=32)
    parser.add_argument("--n-kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument(
        "--shapes",
        nargs="+",
        help="DIMxQUERYHEADSxKVHEADS ..., instead of the three options before; today: those of models of 2026",
    )
    parser.add_argument("--key-bits", type=int, default=3)
    parser.add_argument("--value-bits", type=int, default=2)
    parser.add_argument("--formats", nargs="+", default=["plain", *PRESETS], choices=["plain", *PRESETS])
    args = operator_arguments(parser)
    today = [(dim, repeats * heads, heads) for dim, repeats, heads in TODAY]
    args.shapes = today if args.shapes == ["today"] else [shape(text) for text in args.shapes or []]
    return args


def lines(args: argparse.Namespace, n_keys: int) -> Iterator[tuple[str, str, int, Callable[[], Any]]]:
    """Name, dtype, bytes to read and one call of every attention that is compared."""
    import mlx.core as mx

    import tqext

    dim, scale = args.head_dim, args.head_dim**-0.5
    mask = "causal" if args.n_queries > 1 else None
    mx.random.seed(0)
    k, v = (mx.random.normal((1, args.n_kv_heads, n_keys, dim)) for _ in range(2))
    q = mx.random.normal((1, args.n_q_heads, args.n_queries, dim))
    mx.eval(q, k, v)
    dtypes = dict(zip(QUERIES, (mx.float32, mx.float16, mx.bfloat16), strict=True))

    for packing in args.formats:
        if packing == "plain":
            keys, values = tqext.quantize_keys(k, bits=args.key_bits), tqext.quantize_values(v, bits=args.value_bits)
        else:
            recipe = tqext.get_policy(packing).recipe
            balance = mx.exp(0.3 * mx.random.normal((args.n_kv_heads, dim)))
            keys = tqext.quantize_keys(k, bits=recipe.key_bits, means=tqext.block_means(k), balance=balance)
            values = tqext.quantize_values(v, bits=recipe.value_bits, coding=recipe.value_coding)
        packed = [x for x in (*keys, *values) if isinstance(x, mx.array)]
        mx.eval(packed)
        for name, dtype in dtypes.items():
            qd = q.astype(dtype)
            mx.eval(qd)
            title = "tqext" if packing == "plain" else f"tqext {packing}"
            yield (
                title, name, sum(x.nbytes for x in packed),
                lambda qd=qd, keys=keys, values=values: mx.eval(
                    tqext.turboquant_attention(qd, keys, values, scale=scale, mask=mask)
                ),
            )  # fmt: skip
            if args.n_sequences:
                yield from shared_lines(title, name, qd, keys, values, args.n_sequences, scale)
            if 0 < args.n_listed <= n_keys:
                order = mx.random.uniform(shape=(1, args.n_kv_heads, 1, n_keys))
                ids = mx.argsort(order)[..., : args.n_listed].astype(mx.int32)
                mx.eval(ids)
                n_means = min(args.n_listed, tqext.format.n_blocks(n_keys)) if keys.means is not None else 0
                n_bytes = sum(x.nbytes for x in (keys.codes, keys.norms, values.codes, values.params)) * args.n_listed // n_keys
                yield (
                    f"{title}, {args.n_listed} listed", name, n_bytes + n_means * args.n_kv_heads * dim * 2,
                    lambda qd=qd, keys=keys, values=values, ids=ids: mx.eval(
                        tqext.turboquant_attention(qd, keys, values, scale=scale, mask=mask, indices=ids)
                    ),
                )  # fmt: skip
    for name, dtype in dtypes.items():
        qd, kd, vd = (x.astype(dtype) for x in (q, k, v))
        mx.eval(qd, kd, vd)
        yield (
            "mx.fast", name, kd.nbytes + vd.nbytes,
            lambda qd=qd, kd=kd, vd=vd: mx.eval(mx.fast.scaled_dot_product_attention(qd, kd, vd, scale=scale, mask=mask)),
        )  # fmt: skip
    yield from torch_lines(q, k, v, scale)
    try:
        from mlx_lm.models.base import quantized_scaled_dot_product_attention
    except ImportError:
        print("mlx-lm is not installed: its quantised attention is left out")
        return
    for bits in (4, 3):
        qk, qv = mx.quantize(k, group_size=64, bits=bits), mx.quantize(v, group_size=64, bits=bits)
        mx.eval(qk, qv)
        yield (
            f"mlx-lm {bits} bit", "fp32", sum(x.nbytes for x in (*qk, *qv)),
            # It scales its queries in place.
            lambda qk=qk, qv=qv, bits=bits: mx.eval(
                quantized_scaled_dot_product_attention(q + 0, qk, qv, scale, mask, group_size=64, bits=bits)
            ),
        )  # fmt: skip


def shared_lines(
    title: str, name: str, q: Any, keys: Any, values: Any, n: int, scale: float
) -> Iterator[tuple[str, str, int, Callable[[], Any]]]:
    """Sequences that share all keys but 64 of their own."""
    import mlx.core as mx

    import tqext

    def arrays(*packed: Any) -> list[Any]:
        return [x for p in packed for x in p if isinstance(x, mx.array)]

    def change(packed: Any, how: Callable[[Any], Any], but: str = "balance") -> Any:
        return packed._replace(**{f: how(x) for f, x in packed._asdict().items() if isinstance(x, mx.array) and f != but})

    queries = mx.repeat(q, n, axis=0)
    own = [change(p, lambda x: mx.repeat(x[:, :, : 1 if x is keys.means else 64], n, axis=0)) for p in (keys, values)]
    copies = [change(p, lambda x: mx.contiguous(mx.repeat(x, n, axis=0))) for p in (keys, values)]
    mx.eval(queries, *arrays(*own, *copies))
    yield (
        f"{title}, one copy for {n}", name, sum(x.nbytes for x in arrays(keys, values, *own)),
        lambda: mx.eval(tqext.shared_prefix_attention(queries, keys, values, *own, scale=scale)),
    )  # fmt: skip
    yield (
        f"{title}, {n} copies", name, sum(x.nbytes for x in arrays(*copies)),
        lambda: mx.eval(tqext.turboquant_attention(queries, *copies, scale=scale)),
    )  # fmt: skip


def torch_lines(q: Any, k: Any, v: Any, scale: float) -> Iterator[tuple[str, str, int, Callable[[], Any]]]:
    """PyTorch's scaled_dot_product_attention, in fp32 and bf16."""
    try:
        import torch
    except ImportError:
        print("PyTorch is not installed: its attention is left out")
        return
    import numpy as np

    import tqext

    torch.set_grad_enabled(False)
    torch.set_num_threads(tqext.num_threads())
    n_queries, n_keys = q.shape[2], k.shape[2]
    arrays = [torch.from_numpy(np.array(x)) for x in (q, k, v)]
    if n_queries == 1:  # less work for PyTorch than enable_gqa
        arrays[0] = arrays[0].reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        qd, kd, vd = (x.to(dtype) for x in arrays)
        mask = None
        if n_queries > 1:
            attended = torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries)
            mask = torch.zeros(n_queries, n_keys, dtype=dtype).masked_fill(~attended, -torch.inf)
        yield (
            "torch", name, kd.nbytes + vd.nbytes,
            lambda qd=qd, kd=kd, vd=vd, mask=mask: torch.nn.functional.scaled_dot_product_attention(
                qd, kd, vd, attn_mask=mask, scale=scale, enable_gqa=mask is not None
            ),
        )  # fmt: skip


def measure(args: argparse.Namespace, measured: dict[str, float]) -> None:
    """One shape: its table, and its run in the file. `measured`: what is known of the machine."""
    import tqext

    n_threads = tqext.num_threads()
    rows = []
    for n_keys in args.n_keys:
        chosen = [line for line in lines(args, n_keys) if any(part in line[0] for part in args.only)]
        clock = time.process_time if args.processor_time else time.perf_counter
        timings = measure_in_turns([line[3] for line in chosen], seconds=args.seconds, clock=clock)
        for (name, dtype, n_bytes, _), timing in zip(chosen, timings, strict=True):
            rate = n_bytes / timing.median / 1e6
            share = rate / measured["read_bandwidth_gbs"] if measured else None
            rows.append({
                "attention": name, "query": dtype, "n_keys": n_keys, "ms": timing.median, "least": timing.least,
                "spread": timing.spread, "runs": timing.runs, "MB": n_bytes / 1e6, "GB/s": rate, "share": share,
            })  # fmt: skip
        for row in rows:
            base = [r for r in rows if (r["attention"], r["query"], r["n_keys"]) == ("mx.fast", row["query"], row["n_keys"])]
            row["times"] = base[0]["ms"] / row["ms"] if base else None
            row["times least"] = base[0]["least"] / row["least"] if base else None
            # PyTorch's attention in fp16 is not measured: bf16 stands for both.
            peer = ("torch", "fp32" if row["query"] == "fp32" else "bf16", row["n_keys"])
            base = [r for r in rows if (r["attention"], r["query"], r["n_keys"]) == peer]
            row["times torch"] = base[0]["ms"] / row["ms"] if base else None
    columns = {"attention": "", "query": "", "n_keys": "d", "ms": ".3f", "least": ".3f", "spread": ".0f", "runs": "d"}
    columns |= {"MB": ".1f", "GB/s": ".2f", "share": ".1%", "times": ".1f", "times least": ".1f", "times torch": ".1f"}
    print(table(rows, columns))
    if args.json:
        names = (
            "n_keys",
            "n_listed",
            "n_sequences",
            "n_queries",
            "n_q_heads",
            "n_kv_heads",
            "head_dim",
            "key_bits",
            "value_bits",
            "formats",
        )
        settings = {"bench": "turboquant_attention", **{name: getattr(args, name) for name in names}}
        settings |= {"threads": n_threads, "isa": tqext.isa()}
        if args.processor_time:
            settings["processor_time"] = True
        save(args.json, settings, measured, rows)


def main() -> None:
    args = arguments()
    import mlx.core as mx

    import tqext

    mx.set_default_device(mx.cpu)
    print(f"{machine()['cpu']}, {tqext.num_threads()} threads, isa {tqext.isa()}")
    measured = {}
    if not args.processor_time:
        measured["read_bandwidth_gbs"] = round(read_bandwidth(tqext.num_threads()), 1)
        print(f"reads {measured['read_bandwidth_gbs']} GB/s")
    for sizes in args.shapes or [(args.head_dim, args.n_q_heads, args.n_kv_heads)]:
        args.head_dim, args.n_q_heads, args.n_kv_heads = sizes
        print(f"{args.n_q_heads} query heads, {args.n_kv_heads} KV heads, head dimension {args.head_dim}")
        measure(args, measured)
    print("spread in percent; times: mx.fast with the same query type over this line, of the medians and of the least times;")
    print("times torch: PyTorch with fp32, or with bf16 for both 16-bit types, over this line, of the medians")


if __name__ == "__main__":
    main()

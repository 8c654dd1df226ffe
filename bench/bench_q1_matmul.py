"""Products with 1-bit and with ternary weights beside MLX's affine paths with 1 and 2 bits and its matmul on decoded weights.

    python bench/bench_q1_matmul.py
    python bench/bench_q1_matmul.py --weights ternary --only tqext "mlx matmul"
    python bench/bench_q1_matmul.py --shapes 4096x4096 151936x4096 --rows 1 8 --isa avx2 --json bench/results/mine.json

Bytes are those of the weights as each path stores them, read once per call; share is GB/s over the read bandwidth measured by
the same run on the same number of threads. A matrix larger than the last-level cache is read from memory, a smaller one is not.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from typing import Any

import timing


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "151936x4096"], help="output x input sizes")
    parser.add_argument("--weights", choices=["q1", "ternary"], default="q1")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="rows of x")
    return timing.operator_arguments(parser)


# MLX's half-precision path takes 0.06 s per million weights: beyond this it is left out.
MOST_WEIGHTS_IN_HALF = 4096 * 4096 * 2


def lines(shape: tuple[int, int], n: int, ternary: bool) -> Iterator[tuple[str, str, int, Callable[[], Any]]]:
    """Name, dtype, bytes of weights and one call of every product that is compared."""
    import mlx.core as mx

    import tqext

    rows, columns = shape
    mx.random.seed(0)
    bits = 2 if ternary else 1
    if ternary:
        codes = mx.random.randint(0, 3, (rows, columns // 16, 16)).astype(mx.uint32)
        weight = (codes << mx.arange(0, 32, 2, dtype=mx.uint32)).sum(axis=-1).astype(mx.uint32)
    else:
        weight = mx.random.randint(-(2**31), 2**31 - 1, (rows, columns // 32)).view(mx.uint32)
    scales = mx.random.uniform(0.01, 0.02, (rows, columns // 128)).astype(mx.float16)
    x = mx.random.normal((n, columns))
    mx.eval(weight, scales, x)
    product = tqext.ternary_matmul if ternary else tqext.q1_matmul
    dtypes = ((mx.float32, "fp32"), (mx.float16, "fp16"), (mx.bfloat16, "bf16"))
    for dtype, name in dtypes:
        xd = x.astype(dtype)
        mx.eval(xd)
        yield "tqext", name, weight.nbytes + scales.nbytes, lambda xd=xd: mx.eval(product(xd, weight, scales))
    for dtype, name in dtypes:
        if dtype != mx.float32 and rows * columns * n > MOST_WEIGHTS_IN_HALF:
            continue
        step = scales.astype(mx.float32) * (1 if ternary else 2)
        xd, factors, biases = (y.astype(dtype) for y in (x, step, -scales.astype(mx.float32)))
        mx.eval(xd, factors, biases)
        yield (
            f"mlx affine {bits}-bit", name, weight.nbytes + factors.nbytes + biases.nbytes,
            lambda xd=xd, factors=factors, biases=biases: mx.eval(
                mx.quantized_matmul(xd, weight, factors, biases, transpose=True, group_size=128, bits=bits)
            ),
        )  # fmt: skip
    if rows * columns * 4 < 2**30:
        if ternary:
            dense = mx.dequantize(weight, scales.astype(mx.float32), -scales.astype(mx.float32), group_size=128, bits=2)
        else:
            dense = tqext.q1_dequantize(weight, scales)
        mx.eval(dense)
        yield "mlx matmul", "fp32", dense.nbytes, lambda: mx.eval(x @ dense.T)
    if ternary and rows * columns * n <= MOST_WEIGHTS_IN_HALF:
        for dtype, name in dtypes[1:]:
            xd, half = x.astype(dtype), dense.astype(dtype)
            mx.eval(xd, half)
            yield "mlx matmul", name, half.nbytes, lambda xd=xd, half=half: mx.eval(xd @ half.T)


def main() -> None:
    args = arguments()
    import mlx.core as mx

    import tqext

    mx.set_default_device(mx.cpu)
    bandwidth = timing.read_bandwidth(tqext.num_threads())
    print(f"{tqext.isa()}, {tqext.num_threads()} threads, reading {bandwidth:.1f} GB/s, load {os.getloadavg()[0]:.1f}")
    rows = []
    for text in args.shapes:
        shape = tuple(int(size) for size in text.split("x"))
        for n in args.rows:
            ours: dict[str, float] = {}
            for name, dtype, size, call in lines(shape, n, args.weights == "ternary"):
                if not any(part in f"{name} {dtype}" for part in args.only):
                    continue
                quick = name == "tqext" or dtype == "fp32"
                t = timing.measure(call, seconds=args.seconds, warm_up=2 if quick else 0, least_runs=5 if quick else 2)
                if name == "tqext":
                    ours[dtype] = t.median
                rate = size / t.median / 1e6
                rows.append(
                    {
                        "op": name,
                        "type": dtype,
                        "weights": text,
                        "rows": n,
                        "ms": t.median,
                        "least": t.least,
                        "spread %": t.spread,
                        "MB": size / 1e6,
                        "GB/s": rate,
                        "share %": 100 * rate / bandwidth,
                        "tqext is": t.median / ours[dtype] if dtype in ours and name != "tqext" else None,
                    }
                )
    columns = {"op": "", "type": "", "weights": "", "rows": "d", "ms": ".3f", "least": ".3f", "spread %": ".0f"}
    print(timing.table(rows, {**columns, "MB": ".1f", "GB/s": ".2f", "share %": ".0f", "tqext is": ".0f"}))
    if args.json:
        settings = {"bench": "q1_matmul", "shapes": args.shapes, "rows": args.rows, "isa": tqext.isa()}
        settings["threads"] = tqext.num_threads()
        if args.weights != "q1":  # older runs do not name it
            settings["weights"] = args.weights
        timing.save(args.json, settings, {"read_gb_per_s": bandwidth}, rows)


if __name__ == "__main__":
    main()

"""Attention of one token over packed latents, against MLX's own attention over uncompressed ones.

python -m bench latent-attention --device gpu --heads 128 20 --n-keys 8192 32768 131072
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

from timing import machine, measure_in_turns, operator_arguments, save, table

N_FIRST, N_TAIL, SCALE = 64, 64, 192**-0.5


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--heads", type=int, nargs="+", default=[16], help="query heads of the one latent")
    parser.add_argument("--n-keys", type=int, nargs="+", default=[8192])
    parser.add_argument("--dim", type=int, default=512, help="of the latent")
    parser.add_argument("--bits", type=int, default=3)
    return operator_arguments(parser)


def lines(args: argparse.Namespace, heads: int, n_keys: int) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """Name, bytes of the latents and call of each way; all finish their work."""
    import mlx.core as mx

    import tqext
    from tqext import _ext

    mx.random.seed(0)
    n_coded = (n_keys - N_FIRST - N_TAIL) // tqext.format.BLOCK * tqext.format.BLOCK
    x = mx.random.normal((1, 1, n_coded, args.dim))
    packed = tqext.quantize_keys(x, bits=args.bits, means=tqext.block_means(x))
    q = mx.random.normal((1, heads, 1, args.dim)).astype(mx.float16)
    first, tail = (mx.random.normal((1, 1, n, args.dim)).astype(mx.float16) for n in (N_FIRST, N_TAIL))
    mask = mx.random.normal((1, heads, 1, n_coded + N_FIRST + N_TAIL)).astype(mx.float16)
    latents = mx.concatenate([first, x.astype(mx.float16), tail], axis=2)
    mx.eval(packed[:3], q, first, tail, mask, latents)
    n_bytes = packed.nbytes + first.nbytes + tail.nbytes

    def attend(composed_bytes: int | None) -> None:
        arrays = (*packed[:6], packed.bits, args.dim, packed.rotation)
        mx.eval(_ext.latent_attention(q, *arrays, SCALE, mask, None, None, first, tail, None, composed_bytes))

    yield "tqext", n_bytes, lambda: attend(None)
    yield "composed", n_bytes, lambda: attend(1 << 28)
    yield (
        "mx.fast", latents.nbytes,
        lambda: mx.eval(mx.fast.scaled_dot_product_attention(q, latents, latents, scale=SCALE, mask=mask)),
    )  # fmt: skip


def main() -> None:
    args = arguments()
    import mlx.core as mx

    import tqext

    mx.set_default_device(getattr(mx, args.device))
    print(f"{machine()['cpu']}, {args.device}, {tqext.num_threads()} threads, isa {tqext.isa()}")
    rows = []
    for heads in args.heads:
        for n_keys in args.n_keys:
            chosen = [line for line in lines(args, heads, n_keys) if any(part in line[0] for part in args.only)]
            timings = measure_in_turns([call for _, _, call in chosen], seconds=args.seconds)
            for (name, n_bytes, _), timing in zip(chosen, timings, strict=True):
                rows.append({
                    "attention": name, "heads": heads, "n_keys": n_keys, "ms": timing.median, "spread": timing.spread,
                    "runs": timing.runs, "MB": n_bytes / 1e6,
                })  # fmt: skip
    print(table(rows, {"attention": "", "heads": "d", "n_keys": "d", "ms": ".3f", "spread": ".0f", "runs": "d", "MB": ".1f"}))
    if args.json:
        names = ("device", "heads", "n_keys", "dim", "bits")
        save(args.json, {"bench": "latent_attention", **{name: getattr(args, name) for name in names}}, {}, rows)


if __name__ == "__main__":
    main()

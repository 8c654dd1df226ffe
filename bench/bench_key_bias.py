"""Large key biases, as Qwen2.5 has them, in an otherwise trained model: what they cost a compressed cache.

    python bench/bench_key_bias.py --json bench/results/key_bias.json

The weights are SmolLM2-135M's, in a Qwen2 model, whose layers have biases on queries, keys and values. Every KV head of every
layer gets a key bias of the given norm in its slowest rotary pairs, where it stays a constant over the context.
"""

from __future__ import annotations

import os

# A second BLAS thread waits more than it works on products of a few rows. Before NumPy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import qwen2

import texts
from timing import save, table
from tqext.blas import use_blas
from tqext.commands.evaluate import measure, reference_logprobs, windows
from tqext.models import load

SLOW_PAIRS = 4  # of 32: they turn by 0.2 radians or less in 512 tokens
COLUMNS = {"preset": "", "bias": ".0f", "perplexity": ".2f", "ratio": ".3f", "kl": ".4f", "kl_p99": ".3f", "top1": ".1%"}


def as_qwen2(model: Any) -> qwen2.Model:
    """The same model with room for biases, all of them zero."""
    wanted = qwen2.ModelArgs.__dataclass_fields__
    same = {name: value for name, value in vars(model.args).items() if name in wanted}
    twin = qwen2.Model(qwen2.ModelArgs(**same | {"model_type": "qwen2"}))
    twin.load_weights(tree_flatten(model.parameters()), strict=False)
    for layer in twin.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.bias = mx.zeros_like(projection.bias)
    return twin


def set_key_bias(model: qwen2.Model, norm: float) -> None:
    """A random key bias of this norm for every head."""
    mx.random.seed(1)
    n_heads = model.args.num_key_value_heads
    for layer in model.layers:
        dim = layer.self_attn.k_proj.bias.size // n_heads
        slow = mx.arange(dim) % (dim // 2) >= dim // 2 - SLOW_PAIRS
        bias = mx.random.normal((n_heads, dim)) * slow
        layer.self_attn.k_proj.bias = (bias * (norm / mx.linalg.norm(bias, axis=1, keepdims=True))).flatten()
    mx.eval(model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norms", type=float, nargs="+", default=[0, 300, 600])
    parser.add_argument("--presets", nargs="+", default=["tq3", "tq3-plain"])
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    small, tokenizer = load("smollm2")
    model = as_qwen2(small)
    use_blas(model)
    tokens = windows(tokenizer, texts.read("emma"), options.window, 1)
    rows = []
    for norm in options.norms:
        set_key_bias(model, norm)
        reference = reference_logprobs(model, tokens)
        for preset in options.presets:
            q = measure(model, tokens, preset, reference=reference)
            rows.append({"bias": norm, **{name: getattr(q, name) for name in COLUMNS if name != "bias"}})
    print(table(rows, COLUMNS))
    if options.json:
        save(options.json, {"bench": "key_bias", "model": "SmolLM2-135M as Qwen2", "window": options.window}, {}, rows)


if __name__ == "__main__":
    main()

"""Trains a small language model with 1-bit weights (straight-through estimator), saves it, runs it on a compressed cache.

    python examples/train_one_bit.py --out tiny-one-bit
    tqext generate --model tiny-one-bit --kv bonsai --kv-first-last 0 --ignore-chat-template --prompt "The " --temp 0.5

(`--kv-first-last 0` because `bonsai` leaves the first and last four layers alone, and this model has fewer.)

The forward pass sees the rounded weights (signs, and one scale per group of 128), the backward pass the float weights behind
them. Text: plain text files (`--text`), by default the licences and documentation that come with Python; characters are bytes.
A few minutes on two cores give text in the style of the source, not sense.
"""

import argparse
import json
import math
import os
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

# Its threads would wait for each other at every small product.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3

GROUP = 128


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--text", type=Path, nargs="+", help="plain text files")
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--steps", type=int, default=1500, help="at most so many")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    return parser.parse_args(argv)


def read_text(files: list[Path] | None) -> bytes:
    if not files:
        library = Path(sysconfig.get_paths()["stdlib"])
        files = [library / "LICENSE.txt", *sorted(library.glob("pydoc_data/topics.py"))]
    text = b"".join(file.read_bytes() for file in files if file.exists())
    if len(text) < 10_000:
        raise SystemExit("train_one_bit: expected at least 10000 bytes of text; name files with --text")
    return text


def byte_tokens() -> list[str]:
    """The printable stand-ins of the 256 bytes in byte-level tokenizers, by byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


@mx.custom_function
def round_to_one_bit(weight: mx.array) -> mx.array:
    groups = weight.reshape(weight.shape[0], -1, GROUP)
    scale = mx.abs(groups).mean(axis=-1, keepdims=True).astype(mx.float16).astype(weight.dtype)
    return mx.where(groups >= 0, scale, -scale).reshape(weight.shape)


@round_to_one_bit.vjp
def _straight_through(weight: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
    return cotangent


# On Linux MLX's CPU products go through a plain BLAS, NumPy's through a fast one: a step takes a tenth of the time.
@mx.custom_function
def product(a: mx.array, b: mx.array) -> mx.array:
    return mx.array(np.matmul(np.asarray(a), np.asarray(b)))


@product.vjp
def _product_vjp(inputs: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    a, b = (np.asarray(x) for x in inputs)
    c = np.asarray(cotangent)
    if b.ndim == 2:  # a weight: one product over all tokens
        return mx.array(c @ b.T), mx.array(a.reshape(-1, a.shape[-1]).T @ c.reshape(-1, c.shape[-1]))
    return mx.array(np.matmul(c, b.swapaxes(-1, -2))), mx.array(np.matmul(a.swapaxes(-1, -2), c))


def forward(p: dict[str, mx.array], tokens: mx.array, config: dict[str, Any]) -> mx.array:
    """mlx-lm's qwen3 in terms of `product`, with rounded weights; p by parameter name."""
    n_heads, n_kv_heads, head_dim = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    eps, (batch, length) = config["rms_norm_eps"], tokens.shape

    def norm(x: mx.array, name: str) -> mx.array:
        return mx.fast.rms_norm(x, p[f"{name}.weight"], eps)

    def linear(x: mx.array, name: str) -> mx.array:
        return product(x, round_to_one_bit(p[f"{name}.weight"]).T)

    def heads(x: mx.array, n: int) -> mx.array:
        return x.reshape(batch, length, n, head_dim).swapaxes(1, 2)

    def rope(x: mx.array) -> mx.array:
        return mx.fast.rope(x, head_dim, traditional=False, base=config["rope_theta"], scale=1.0, offset=0)

    mask = mx.where(mx.tri(length, length) > 0, 0.0, -1e9)
    x = round_to_one_bit(p["model.embed_tokens.weight"])[tokens]
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        y = norm(x, f"{at}.input_layernorm")
        q = rope(norm(heads(linear(y, f"{at}.self_attn.q_proj"), n_heads), f"{at}.self_attn.q_norm"))
        k = rope(norm(heads(linear(y, f"{at}.self_attn.k_proj"), n_kv_heads), f"{at}.self_attn.k_norm"))
        v = heads(linear(y, f"{at}.self_attn.v_proj"), n_kv_heads)
        k, v = (mx.repeat(z, n_heads // n_kv_heads, axis=1) for z in (k, v))
        weights = mx.softmax(product(q * head_dim**-0.5, k.swapaxes(-1, -2)) + mask, axis=-1)
        y = product(weights, v).swapaxes(1, 2).reshape(batch, length, -1)
        x = x + linear(y, f"{at}.self_attn.o_proj")
        y = norm(x, f"{at}.post_attention_layernorm")
        y = nn.silu(linear(y, f"{at}.mlp.gate_proj")) * linear(y, f"{at}.mlp.up_proj")
        x = x + linear(y, f"{at}.mlp.down_proj")
    return linear(norm(x, "model.norm"), "lm_head")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "hidden_size": args.width,
        "intermediate_size": 3 * args.width,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.width // 32,
        "num_key_value_heads": args.width // 64,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "vocab_size": 257,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": 256,
        "eos_token_id": 256,
    }


def train(model: nn.Module, config: dict[str, Any], text: bytes, args: argparse.Namespace) -> float:
    """Trains in place; returns the loss on text that was held out, in bits per byte."""
    data = np.frombuffer(text, np.uint8)
    split = int(0.95 * len(data))
    rng = np.random.default_rng(0)
    warm_up = 30
    schedule = optim.join_schedules(
        [optim.linear_schedule(0, 3e-3, warm_up), optim.cosine_decay(3e-3, args.steps - warm_up, 1e-4)], [warm_up]
    )
    optimizer = optim.AdamW(schedule, weight_decay=0.01)

    def loss_of(parameters: dict[str, mx.array], tokens: mx.array) -> mx.array:
        return nn.losses.cross_entropy(forward(parameters, tokens[:, :-1], config), tokens[:, 1:], reduction="mean")

    def batch(low: int, high: int) -> mx.array:
        starts = rng.integers(low, high - args.length - 1, args.batch)
        return mx.array(np.stack([data[s : s + args.length + 1] for s in starts]).astype(np.int32))

    step_of = mx.value_and_grad(loss_of)
    weights = dict(tree_flatten(model.trainable_parameters()))
    begin = time.perf_counter()
    for step in range(args.steps):
        loss, gradients = step_of(weights, batch(0, split))
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        weights = optimizer.apply_gradients(gradients, weights)
        mx.eval(weights, optimizer.state, loss)
        minutes = (time.perf_counter() - begin) / 60
        if step % 50 == 0 or minutes > args.minutes:
            print(f"step {step}  {minutes:.1f} min  {loss.item() / math.log(2):.2f} bits per byte", file=sys.stderr)
        if minutes > args.minutes:
            break
    held_out = [loss_of(weights, batch(split, len(data))).item() for _ in range(8)]
    model.load_weights(list(weights.items()))
    return sum(held_out) / len(held_out) / math.log(2)


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(byte_tokens())}
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, "<|end|>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    from tqext import nn as one_bit_nn
    from tqext import one_bit

    mx.random.seed(0)
    config = settings(args)
    model = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    text = read_text(args.text)
    n = sum(w.size for _, w in tree_flatten(model.parameters()))
    print(f"{n / 1e6:.1f} M weights, {len(text) / 1e6:.2f} MB of text", file=sys.stderr)
    bits = train(model, config, text, args)
    swap = one_bit_nn.quantize(model)  # exact: the forward pass has seen these very weights
    if swap.kept:
        raise SystemExit(f"train_one_bit: {swap}")
    mx.eval(model.parameters())
    one_bit.save(args.out, model, config)
    write_tokenizer(args.out)
    print(f"{swap}; {bits:.2f} bits per byte on held-out text; written to {args.out}")


if __name__ == "__main__":
    main()

"""Trains a small language model with 1-bit weights by the straight-through estimator, saves it, and runs it on a compressed cache.

    python examples/train_one_bit.py --out tiny-one-bit
    tqext generate --model tiny-one-bit --kv bonsai --ignore-chat-template --prompt "The cache" --temp 0

The forward pass sees the rounded weights (signs, and one scale per group of 128), the backward pass the float weights behind
them. Text: plain text files (`--text`), by default the licences and documentation that come with Python; characters are bytes.
A few minutes on two cores give text in the style of the source, not sense.
"""

import argparse
import json
import math
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import qwen3

GROUP = 128


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--text", type=Path, nargs="+", help="plain text files")
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--steps", type=int, default=1500, help="at most so many")
    parser.add_argument("--layers", type=int, default=9, help="--kv bonsai leaves the first and last four alone")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
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




def rounded(parameters: Any) -> Any:
    return tree_map(lambda w: round_to_one_bit(w) if w.ndim == 2 else w, parameters)


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


def train(model: nn.Module, text: bytes, args: argparse.Namespace) -> float:
    """Trains in place; returns the loss on text that was held out, in bits per byte."""
    data = np.frombuffer(text, np.uint8)
    split = int(0.95 * len(data))
    rng = np.random.default_rng(0)
    warm_up = 30
    schedule = optim.join_schedules(
        [optim.linear_schedule(0, 3e-3, warm_up), optim.cosine_decay(3e-3, args.steps - warm_up, 1e-4)], [warm_up]
    )
    optimizer = optim.AdamW(schedule, weight_decay=0.01)

    def loss_of(parameters: Any, tokens: mx.array) -> mx.array:
        model.update(rounded(parameters))
        logits = model(tokens[:, :-1])
        return nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="mean")

    def batch(low: int, high: int) -> mx.array:
        starts = rng.integers(low, high - args.length - 1, args.batch)
        return mx.array(np.stack([data[s : s + args.length + 1] for s in starts]).astype(np.int32))

    step_of = mx.value_and_grad(loss_of)
    weights = model.trainable_parameters()
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
    model.update(weights)
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
    bits = train(model, text, args)
    swap = one_bit_nn.quantize(model)  # exact: the forward pass has seen these very weights
    if swap.kept:
        raise SystemExit(f"train_one_bit: {swap}")
    one_bit.save(args.out, model, config)
    write_tokenizer(args.out)
    print(f"{swap}; {bits:.2f} bits per byte on held-out text; written to {args.out}")


if __name__ == "__main__":
    main()

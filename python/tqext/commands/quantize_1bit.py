"""``tqext quantize-1bit``: round a model's weights to 1 bit."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import mlx_lm.utils
from mlx import nn
from mlx.utils import tree_flatten

from tqext.commands.options import MODEL_HELP, ArgumentParser
from tqext.models import load
from tqext.one_bit.checkpoint import FLOATS, save
from tqext.one_bit.nn import q1_paths, quantize


def main(argv: Sequence[str]) -> None:
    """``tqext quantize-1bit --model IN --out OUT``."""
    parser = ArgumentParser(
        prog="tqext quantize-1bit",
        description="Round a model's weights to 1 bit (Q1_0, 1.125 bits per weight). A model that was not trained for it "
        "answers nonsense afterwards.",
    )
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    parser.add_argument("--out", required=True, type=Path, help="folder to write; must not exist")
    options = parser.parse_args(argv)
    if options.out.exists():
        parser.error(f"--out: {options.out} exists")
    model, tokenizer, config = load(options.model, return_config=True)
    if any(isinstance(layer, (nn.QuantizedLinear, nn.QuantizedEmbedding)) for layer in model.modules()):
        model = mlx_lm.utils.dequantize_model(model)
    before = q1_paths(model)  # of a model that was 1-bit already: written as they are
    swap = quantize(model)
    swap.swapped += before
    if not swap.swapped:
        raise SystemExit(f"tqext quantize-1bit: no layer can be 1-bit; {swap}")
    parameters = dict(tree_flatten(model.parameters()))
    dtypes = [value.dtype for name, value in parameters.items() if name.endswith("norm.weight")]
    names = [name for name, dtype in FLOATS.items() if dtype in dtypes]
    save(options.out, model, {**config, "torch_dtype": names[0] if names else "float16"}, tokenizer)
    size = sum(file.stat().st_size for file in options.out.glob("*.safetensors"))
    print(f"{swap}\n{options.out}: {size / 1e6:.1f} MB, {mlx_lm.utils.compute_bits_per_weight(model):.3f} bits per weight")
    print("Warning: weights were rounded, not trained: expect nonsense unless they were 1-bit before.", file=sys.stderr)

"""Tiny models and tokenizers for the tests of 1-bit weights."""

import json

import mlx.core as mx
import mlx.nn
import mlx_lm.utils
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from tqext import nn

BYTES = sorted(ByteLevel.alphabet())
SPECIAL = ["<|begin|>", "<|end|>"]
TOKENS = [*BYTES, *SPECIAL]


def config(model_type="qwen3", **changes):
    base = {
        "model_type": model_type,
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "vocab_size": len(TOKENS),
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": len(BYTES),
        "eos_token_id": len(BYTES) + 1,
    }
    return {**base, **changes}


def make_model(settings, seed=0):
    """An mlx-lm model with random weights."""
    mx.random.seed(seed)
    model_class, args_class = mlx_lm.utils._get_classes(settings)
    model = model_class(args_class.from_dict(settings))
    # Norms that are not ones, so that a mistaken name would show.
    norms = [(name, value + 0.1 * mx.random.normal(value.shape)) for name, value in parameters(model) if "norm" in name]
    model.load_weights(norms, strict=False)
    mx.eval(model.parameters())
    return model


def make_one_bit():
    """A model with 1-bit weights whose layers two processes can share: an even number of groups everywhere."""
    model = make_model(config(intermediate_size=512, vocab_size=300))
    nn.quantize(model)
    return model


def parameters(model):
    return tree_flatten(model.parameters())


def make_affine(model, group_size=128):
    """MLX's affine 1-bit layers with biases = -scales / 2, the form of the published 1-bit checkpoints; in place."""
    mlx.nn.quantize(model, group_size=group_size, bits=1)
    for _, layer in model.named_modules():
        if hasattr(layer, "bits"):
            layer.scales = (2 * mx.abs(mx.random.normal(layer.scales.shape)) + 0.1).astype(mx.float16).astype(mx.float32)
            layer.scales = layer.scales / 16
            layer.biases = -layer.scales / 2
    mx.eval(model.parameters())
    return model


def write_tokenizer(folder):
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(TOKENS)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_affine(folder, settings, model):
    """A stock mlx-lm folder of `make_affine`'s model."""
    mlx_lm.utils.save_model(folder, model)
    quantized = {**settings, "quantization": {"group_size": 128, "bits": 1}}
    (folder / "config.json").write_text(json.dumps(quantized))
    write_tokenizer(folder)


def logits(model, tokens=(1, 5, 9, 200, 3, 3, 7, 80, 41)):
    return model(mx.array([tokens]))

"""Tiny models and tokenizers for the tests of 1-bit weights."""

import json

import gguf
import mlx.core as mx
import mlx.nn
import mlx_lm.utils
import numpy as np
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from support import to_numpy
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


# GGUF files

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(path):
    if path.startswith("model.layers."):
        _, _, layer, part = path.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[part]}"
    return GGUF_NAMES[path]


def layer_paths(settings):
    """The places of all layers of a plain llama model."""
    parts = [part for part in GGUF_NAMES if "." in part and not part.startswith("model.") and "_norm" not in part]
    parts += ["input_layernorm", "post_attention_layernorm"]
    blocks = [f"model.layers.{i}.{part}" for i in range(settings["num_hidden_layers"]) for part in parts]
    return ["model.embed_tokens", "model.norm", "lm_head", *blocks]


def interleave(rows, n_heads):
    """llama.cpp's order: row i and row i + half of a head side by side."""
    out = np.empty_like(rows)
    size = rows.shape[0] // n_heads
    for head in range(n_heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = rows[head * size + i]
            out[head * size + 2 * i + 1] = rows[head * size + size // 2 + i]
    return out


def blocks(words, scales):
    """block_q1_0 by block_q1_0."""
    rows = []
    for row_words, row_scales in zip(words, scales, strict=True):
        row = b""
        for g, scale in enumerate(row_scales):
            row += np.float16(scale).tobytes() + row_words[4 * g : 4 * g + 4].astype("<u4").tobytes()
        rows.append(np.frombuffer(row, np.uint8))
    return np.stack(rows)


def add(writer, key, value):
    """A metadata value of the type that its Python type stands for."""
    kinds = {str: "string", float: "float32", bool: "bool", int: "uint32", list: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(key, value)


def write_gguf(
    path, model, settings, *, metadata=None, rename=None, change=None, plain_type=None, tokens=None, kinds=None, **options
):
    """A GGUF of a model with Q1 layers.

    Args:
        metadata: More of it; None takes a value away.
        rename: Tensors' names.
        change: Makes other blocks of a tensor's: ``change(name, data)``.
        plain_type: Of matrices that are not Q1.
        tokens: The vocabulary.
        kinds: Its types.
        **options: Of gguf.GGUFWriter.
    """
    arch = settings["model_type"]
    writer = gguf.GGUFWriter(str(path), arch, **options)
    tokens = tokens or TOKENS
    writer.add_embedding_length(settings["hidden_size"])
    writer.add_feed_forward_length(settings["intermediate_size"])
    writer.add_block_count(settings["num_hidden_layers"])
    writer.add_head_count(settings["num_attention_heads"])
    writer.add_head_count_kv(settings["num_key_value_heads"])
    writer.add_key_length(settings["head_dim"])
    writer.add_context_length(settings["max_position_embeddings"])
    writer.add_layer_norm_rms_eps(settings["rms_norm_eps"])
    writer.add_rope_freq_base(settings["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2" if arch == "qwen3" else "llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds or [1] * len(BYTES) + [3] * (len(tokens) - len(BYTES)))
    if "tokenizer.ggml.merges" not in (metadata or {}):
        writer.add_token_merges([])
    writer.add_bos_token_id(settings["bos_token_id"])
    writer.add_eos_token_id(settings["eos_token_id"])
    for key, value in (metadata or {}).items():
        for values in writer.kv_data:
            values.pop(key, None)
        if value is not None:
            add(writer, key, value)
    values = {name: to_numpy(value) for name, value in parameters(model)}
    for name, value in values.items():
        layer, _, suffix = name.rpartition(".")
        if suffix == "scales":
            continue
        target = f"{gguf_name(layer)}.{suffix}"
        target = (rename or {}).get(target, target)
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(layer.rpartition(".")[2])

        def order(rows, heads=heads):
            return interleave(rows, settings[heads]) if arch == "llama" and heads else rows

        if f"{layer}.scales" in values:
            data = blocks(order(value), order(values[f"{layer}.scales"]))
            kind = gguf.GGMLQuantizationType.Q1_0
            if change:
                data = change(target, data)
            writer.add_tensor(target, data, raw_dtype=kind)
        elif value.ndim == 2 and plain_type:
            writer.add_tensor(target, gguf.quants.quantize(order(value), plain_type), raw_dtype=plain_type)
        else:
            writer.add_tensor(target, order(value).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dtype():
    """What the loader makes of all that is not 1-bit."""
    return mx.float32 if mx.default_device() == mx.cpu else mx.float16


def make(arch, **changes):
    settings = config(arch, **changes)
    model = make_model(settings)
    nn.quantize(model)
    for name, value in parameters(model):
        if "norm" in name:
            model.load_weights([(name, value.astype(dtype()))], strict=False)
    model.model.embed_tokens.dtype = dtype()
    return model, settings


def set_types(path, tensors):
    """Give tensors of bytes their type and width: the gguf package does not know these types."""
    data = bytearray(path.read_bytes())
    for name, (columns, number) in tensors.items():
        begin = len(name).to_bytes(8, "little") + name.encode()
        at = data.rfind(begin) + len(begin) + 4  # metadata may have the name too
        data[at : at + 8] = columns.to_bytes(8, "little")
        data[at + 16 : at + 20] = number.to_bytes(4, "little")
    path.write_bytes(data)
    return path

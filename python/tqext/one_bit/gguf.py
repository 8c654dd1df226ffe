"""GGUF files as mlx-lm folders: Q1_0 tensors (ggml type 41) as native 1-bit layers, ternary ones as MLX's affine 2-bit layers.

Tensors of all other types are dequantised, and in a file with Q1_0 tensors the ternary ones too.

Needs the package ``gguf`` for all types but the ternary ones and those of `plain_types`. ``mx.load`` is no substitute: it drops
tensors of types it does not know without a word.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from tqext import disk
from tqext.one_bit import checkpoint, gguf_file, plain_types, qwen35, ternary
from tqext.one_bit.checkpoint import Config
from tqext.one_bit.gguf_file import Metadata, Tensor
from tqext.one_bit.nn import GROUP_SIZE

_BLOCK_BYTES = 2 + GROUP_SIZE // 8  # fp16 scale, then sign bits, low bit first
# GGUF architecture: mlx-lm's model type and the class of the checkpoint.
_ARCHITECTURES = {
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    qwen35.ARCHITECTURE: (qwen35.MODEL_TYPE, "Qwen3_5ForCausalLM"),
}
# GGUF names of the tensors of one block and of those outside, and where mlx-lm's llama and qwen3 have them.
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# Gemma 3 has norms after attention and after the MLP too, and its GGUF names the former as others name the latter's input norm.
_GEMMA3_NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GEMMA3_WINDOW_PATTERN = 6  # of six layers the last one is global; no GGUF says so
_GEMMA3_LOCAL_ROPE_BASE = 10_000.0  # of the windowed layers; few GGUFs say so
# Two quantisations of one matrix differ by no more than this share of its norm: Q4_K and Q6_K of the same weights by 0.08.
_SAME_MATRIX = 0.2
# Pre-tokenizers by their name in a GGUF, as the models' own tokenizer.json files have them.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DIGITS = {"qwen2": "", "llama-bpe": "{1,3}", "llama3": "{1,3}", "llama-v3": "{1,3}"}
_SPLITS = {name: f"{_CONTRACTIONS}|{_SPLIT.replace('DIGITS', digits)}" for name, digits in _DIGITS.items()}
_SPLITS["qwen35"] = _SPLITS["qwen2"].replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
# Vocabularies of Llama 3 take a word that they hold as it is, and begin every text with their first token (llama.cpp).
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
# Tokens that end a turn, as llama.cpp has them: the ids in the metadata name one of a chat model's two or three, or none.
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")
# Metadata of an architecture that `_config` reads, or that says nothing which a model here could need.
_KNOWN = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "vocab_size",
}


def folder_of(path: str | Path, cache: Path) -> Path:
    """The mlx-lm folder of a GGUF file, converted on first use.

    Args:
        path: The file.
        cache: Where converted models are kept; a changed file is converted anew.

    Raises:
        ValueError: The file is not one that can be converted; the message says why.
        ImportError: A tensor has a type of the package ``gguf``, which is not installed.
    """
    path = Path(path).resolve()
    stats = [(part.name, stat.st_size, stat.st_mtime_ns) for part in gguf_file.parts_of(path) for stat in [part.stat()]]
    # MLX's half-precision products on the CPU are several times slower than its fp32 ones.
    dtype = mx.float32 if mx.default_device() == mx.cpu else mx.float16
    key = hashlib.sha256(f"{path}\0{stats}\0{dtype}".encode()).hexdigest()[:16]
    folder = cache / f"gguf-{path.stem}-{key}"
    return disk.make_once(folder, lambda made: convert(path, made, dtype))


def convert(
    path: str | Path, folder: str | Path, dtype: mx.Dtype = mx.float16, *, dense: bool = False, progress: bool = False
) -> None:
    """Write a GGUF file of one of `_ARCHITECTURES` as an mlx-lm folder, what is not 1-bit or ternary in `dtype`.

    Args:
        path: The file.
        folder: Must not exist.
        dtype: Of the dequantised weights and of ternary weights' scales.
        dense: Also take a file without any 1-bit or ternary tensor. All its weights are dequantised, which makes them larger.
        progress: Show a bar on stderr.

    Raises:
        ValueError: The file is not one that can be converted; the message says why.
        ImportError: A tensor has a type of the package ``gguf``, which is not installed.
    """
    tensors, metadata = read(path)
    try:
        _convert(path, Path(folder), tensors, metadata, dtype, dense, progress)
    except (ValueError, OSError):
        raise
    except Exception as error:  # of whatever kind tokenizers or a metadata entry of another type make
        raise ValueError(f"[gguf] {path}: expected sound metadata, got {type(error).__name__}: {error}") from error


def _convert(
    path: str | Path,
    folder: Path,
    tensors: dict[str, Tensor],
    metadata: Metadata,
    dtype: mx.Dtype,
    dense: bool,
    progress: bool,
) -> None:
    from tqdm import tqdm  # type: ignore[import-untyped]

    fold = qwen35.read_fold(metadata, tensors)
    if dense and fold is None:
        tensors = _tied(tensors)
    config = {**_config(metadata, tensors), "torch_dtype": str(dtype).rpartition(".")[2]}
    weights: dict[str, mx.array] = {}
    # One config names one form of packed weights; a file of both is not known.
    packed_kinds = {tensor.tensor_type.name for tensor in tensors.values()}
    keep_ternary = "Q1_0" not in packed_kinds
    bar = tqdm(tensors.items(), desc="Converting", unit="tensor", file=sys.stderr, disable=not progress)
    for name, tensor in bar:
        made = _convert_tensor(name, tensor, config, dtype, keep_ternary, fold)
        mx.eval(made)  # or the fp32 values of all tensors are held until the end
        weights.update(made)
    _check_layers(tensors, config["num_hidden_layers"], config.get("full_attention_interval", 1))
    native = "Q1_0" in packed_kinds
    groups = {tensor.tensor_type.group for tensor in tensors.values() if isinstance(tensor.tensor_type, ternary.Type)}
    if not native and not groups and not dense:
        raise ValueError(f"[gguf] {path}: expected tensors of Q1_0 (type 41) or a ternary type, got none")
    if native:
        checkpoint.check_tensors(weights)
    elif groups:
        config["quantization"] = {"group_size": max(groups), "bits": ternary.BITS, "mode": "affine"}
    if config["model_type"] == qwen35.MODEL_TYPE:
        config = qwen35.finish(config, fold, _modules(weights, fold))
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    _write_tokenizer(metadata, folder)
    if native:
        checkpoint.write_config(folder, config)
    else:
        (folder / "config.json").write_text(json.dumps(config, indent=2))


def _modules(weights: dict[str, mx.array], fold: qwen35.Fold | None) -> list[dict[str, Any]]:
    """mlx-lm's list of the packed layers of a folded model."""
    return [
        {
            "path": path,
            "embedding": path == _OUTER_NAMES["token_embd"],
            "dtype": "float16",  # the only name that mlx-lm takes; it computes in the dtype of the input
            "block": fold.block_size if fold is not None and f"{path}.signs" in weights else 0,
        }
        for path in sorted(checkpoint.one_bit_paths(weights))
    ]


def _tied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model with one matrix for embedding and output: where a file holds two quantisations, the finer one."""
    embedding, output = tensors.get("token_embd.weight"), tensors.get("output.weight")
    if embedding is None or output is None or list(embedding.shape) != list(output.shape):
        return tensors
    # A few thousand rows tell: other matrices have nothing in common.
    n_rows = min(4096, np.asarray(embedding.data).shape[0])
    a, b = (_plain(tensor, name, n_rows) for tensor, name in ((embedding, "token_embd.weight"), (output, "output.weight")))
    if np.linalg.norm(a - b) > _SAME_MATRIX * np.linalg.norm(b):
        return tensors
    finer = max(embedding, output, key=lambda tensor: int(tensor.n_bytes))
    return {name: finer if name == "token_embd.weight" else tensor for name, tensor in tensors.items() if tensor is not output}


def read(path: str | Path) -> tuple[dict[str, Tensor], Metadata]:
    """Tensors and metadata of a GGUF file, the data still on disk.

    Raises:
        ValueError: The file cannot be read, or its weights are Hadamard-folded and those of another model than qwen35.
        ImportError: A tensor has a type of the package ``gguf``, which is not installed.
    """
    tensors, metadata = gguf_file.read(path)
    folded = [name for name in metadata if "hadamard" in name.lower()]
    if folded and metadata.get("general.architecture") != qwen35.ARCHITECTURE:
        raise ValueError(
            f"[gguf] {path}: expected plain weights, got Hadamard-folded ones ('Bonsai 2', {folded[0]}) of another model than "
            "qwen35; their inputs must be rotated before every product, which mlx-lm does for qwen35 only, and without it the "
            "model would answer nonsense"
        )
    return tensors, metadata


def _convert_tensor(
    name: str, tensor: Tensor, config: Config, dtype: mx.Dtype, keep_ternary: bool, fold: qwen35.Fold | None
) -> dict[str, mx.array]:
    path = _mlx_name(name, config["model_type"])
    restore = _order_of(name, path, config, fold)
    kind = tensor.tensor_type
    folded = fold is not None and name in fold.names
    if folded and not (isinstance(kind, ternary.Type) and kind.group == qwen35.GROUP_SIZE and keep_ternary):
        raise ValueError(f"[gguf] {name}: expected a ternary type with scales for 128 weights when folded, got {kind.name}")
    if name.rpartition(".")[2] != "weight":
        suffix, path = path.rpartition(".")[2], path.rpartition(".")[0]
    else:
        suffix = "weight"
    if kind.name == "Q1_0" and suffix == "weight":
        words, scales = unpack_blocks(np.asarray(tensor.data), name)
        return {f"{path}.weight": mx.array(restore(words)), f"{path}.scales": mx.array(restore(scales))}
    if isinstance(kind, ternary.Type) and suffix == "weight" and keep_ternary:
        codes, scales = ternary.unpack(np.asarray(tensor.data), kind, name)
        # float16's scales are exact in float32 and not in bfloat16, where they round as every other weight does.
        scale = mx.array(restore(scales)).astype(dtype)
        made = {f"{path}.weight": mx.array(ternary.pack(restore(codes))), f"{path}.scales": scale, f"{path}.biases": -scale}
        if folded:
            assert fold is not None
            made[f"{path}.signs"] = mx.array(fold.signs_of(name, codes.shape[1]))
        return made
    plain = restore(_plain(tensor, name))
    if config["model_type"] == "gemma3_text" and path.endswith("norm"):
        plain = plain - 1  # llama.cpp stores what the layer multiplies by, mlx-lm what it adds to 1
    if suffix == "A_log":  # a factor of a state's decay, which float16 would round
        if not np.all(plain < 0):
            raise ValueError(f"[gguf] {name}: expected negative numbers, got others")
        return {f"{path}.{suffix}": mx.array(np.log(-plain))}
    if path.endswith("conv1d"):
        plain = plain[..., None]
    return {f"{path}.{suffix}": mx.array(plain).astype(dtype)}


def _order_of(name: str, path: str, config: Config, fold: qwen35.Fold | None) -> Callable[[np.ndarray], np.ndarray]:
    """From llama.cpp's order of a tensor's rows and columns to mlx-lm's."""
    if config["model_type"] == "llama" and path.endswith(("self_attn.q_proj", "self_attn.k_proj")):
        heads = config["num_attention_heads" if path.endswith("q_proj") else "num_key_value_heads"]
        return lambda x: _uninterleave_rows(x, heads) if x.ndim == 2 else x
    if config["model_type"] == qwen35.MODEL_TYPE and name.startswith("blk."):
        part = name.split(".")[2]
        if part == "ssm_out" and (fold is None or name not in fold.names):
            return lambda x: qwen35.ungrouped_columns(x, config)
        return lambda x: qwen35.ungrouped_rows(x, part, config)
    return lambda x: x


def unpack_blocks(data: np.ndarray, name: str = "tensor") -> tuple[np.ndarray, np.ndarray]:
    """Bytes of block_q1_0 ``[rows, bytes]`` as (words uint32, scales float16).

    Raises:
        ValueError: Rows that are not whole blocks.
    """
    if data.ndim != 2 or data.dtype != np.uint8 or data.shape[1] % _BLOCK_BYTES:
        raise ValueError(f"[gguf] {name}: expected rows of {_BLOCK_BYTES}-byte blocks, got {data.dtype} {data.shape}")
    blocks = data.reshape(data.shape[0], -1, _BLOCK_BYTES)
    scales = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0]
    words = np.ascontiguousarray(blocks[..., 2:]).view("<u4")
    return words.reshape(data.shape[0], -1), scales


def _plain(tensor: Tensor, name: str, n_rows: int | None = None) -> np.ndarray:
    """A tensor (its first rows) of floats, or of a type that is decoded here or by the gguf package, as fp32."""
    data, kind = np.asarray(tensor.data)[:n_rows], tensor.tensor_type
    if isinstance(kind, ternary.Type):
        return ternary.dequantize(*ternary.unpack(data, kind, name))
    if isinstance(kind, plain_types.Type):
        return kind.decode(data)
    from gguf import quants

    try:
        return np.asarray(quants.dequantize(data, cast(Any, kind)), np.float32)
    except NotImplementedError:
        raise ValueError(f"[gguf] {name}: expected Q1_0 or a type that the gguf package decodes, got {kind.name}") from None


def _check_layers(tensors: dict[str, Tensor], n_layers: int, interval: int) -> None:
    """Raise a ValueError unless every layer has the tensors of its kind, and there are as many as the metadata says.

    Of `interval` layers the last one is of another kind than those before it.
    """
    layers: dict[str, set[str]] = {}
    for name in tensors:
        if name.startswith("blk."):
            _, layer, part = name.split(".", 2)
            layers.setdefault(layer, set()).add(part)
    if layers.keys() != {str(i) for i in range(n_layers)}:
        raise ValueError(f"[gguf] block_count: expected the tensors of {n_layers} layers, got those of {sorted(layers)}")
    for layer, parts in layers.items():
        first = str(interval - 1 if int(layer) % interval == interval - 1 else 0)
        if parts != layers[first]:
            odd = ", ".join(sorted(parts ^ layers[first]))
            raise ValueError(f"[gguf] blk.{layer}: expected the tensors of blk.{first}, got others: {odd}")


def _mlx_name(name: str, model_type: str) -> str:
    """mlx-lm's name of a weight's layer, or of another parameter."""
    stem, _, suffix = name.rpartition(".")
    more = {"gemma3_text": _GEMMA3_NAMES, qwen35.MODEL_TYPE: qwen35.BLOCK_NAMES}.get(model_type, {})
    names = _BLOCK_NAMES | more
    block = name.split(".", 2)
    if len(block) == 3 and block[0] == "blk" and block[1].isdigit():
        part, _, kind = block[2].partition(".")
        if model_type == qwen35.MODEL_TYPE and block[2] in qwen35.PARAMETERS:
            return f"model.layers.{block[1]}.{qwen35.PARAMETERS[block[2]]}"
        if part in names and kind in ("weight", "bias"):
            return f"model.layers.{block[1]}.{names[part]}" + (".bias" if kind == "bias" else "")
    elif suffix in ("weight", "bias") and stem in _OUTER_NAMES:
        return _OUTER_NAMES[stem] + (".bias" if suffix == "bias" else "")
    reason = " (rope factors of Llama 3.1 and later)" if stem == "rope_freqs" else ""
    raise ValueError(f"[gguf] {name}: expected a tensor of a plain {model_type} model, got an unknown name{reason}")


def _uninterleave_rows(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Undo llama.cpp's order of the query and key rows (rotary pairs side by side)."""
    n, width = rows.shape
    return np.ascontiguousarray(rows.reshape(n_heads, n // n_heads // 2, 2, width).swapaxes(1, 2).reshape(n, width))


def _config(metadata: Metadata, tensors: dict[str, Tensor]) -> Config:
    arch = metadata.get("general.architecture")
    if arch not in _ARCHITECTURES:
        raise ValueError(f"[gguf] general.architecture: expected one of {sorted(_ARCHITECTURES)}, got {arch!r}")

    def get(key: str, *default: Any) -> Any:
        if f"{arch}.{key}" not in metadata:
            if default:
                return default[0]
            raise ValueError(f"[gguf] {arch}.{key}: expected a value, got none")
        return metadata[f"{arch}.{key}"]

    _check_metadata(metadata, arch)
    n_heads, hidden = int(get("attention.head_count")), int(get("embedding_length"))
    config: Config = {
        "model_type": _ARCHITECTURES[arch][0],
        "architectures": [_ARCHITECTURES[arch][1]],
        "hidden_size": hidden,
        "intermediate_size": int(get("feed_forward_length")),
        "num_hidden_layers": int(get("block_count")),
        "num_attention_heads": n_heads,
        "num_key_value_heads": int(get("attention.head_count_kv", n_heads)),
        "head_dim": int(get("attention.key_length", hidden // n_heads)),
        "max_position_embeddings": int(get("context_length")),
        "rms_norm_eps": float(get("attention.layer_norm_rms_epsilon")),
        "rope_theta": float(get("rope.freq_base", 10000.0)),
        "vocab_size": _vocab_size(metadata, tensors),
        "tie_word_embeddings": "output.weight" not in tensors,
        **_special_ids(metadata),
    }
    if len(stops := _stop_ids(metadata)) > 1:
        config["eos_token_id"] = stops
    if (value_dim := int(get("attention.value_length", config["head_dim"]))) != config["head_dim"]:
        raise ValueError(f"[gguf] {arch}.attention.value_length: expected {config['head_dim']}, got {value_dim}")
    window = int(get("attention.sliding_window", 0))
    if arch != "gemma3" and 0 < window < config["max_position_embeddings"]:
        raise ValueError(f"[gguf] {arch}.attention.sliding_window: expected none in a plain {arch} model, got {window}")
    if arch == qwen35.ARCHITECTURE:
        config |= qwen35.settings(get)
    rotary = int(get("rope.dimension_count", config["head_dim"]))
    if arch != qwen35.ARCHITECTURE and rotary != config["head_dim"]:
        raise ValueError(f"[gguf] {arch}.rope.dimension_count: expected {config['head_dim']}, got {rotary}")
    scaling = get("rope.scaling.type", "none")
    if scaling in ("linear", "yarn"):
        config["rope_scaling"] = {"type": scaling, "rope_type": scaling, "factor": float(get("rope.scaling.factor"))}
        if scaling == "yarn":
            original = int(get("rope.scaling.original_context_length"))
            config["rope_scaling"]["original_max_position_embeddings"] = original
    elif scaling != "none":
        raise ValueError(f"[gguf] {arch}.rope.scaling.type: expected none, linear or yarn, got {scaling!r}")
    if arch == qwen35.ARCHITECTURE and scaling != "none":
        raise ValueError(f"[gguf] {arch}.rope.scaling.type: expected none, got {scaling!r}")
    if arch == "gemma3":
        config |= {
            "sliding_window": int(get("attention.sliding_window")),
            "sliding_window_pattern": _GEMMA3_WINDOW_PATTERN,
            "rope_local_base_freq": float(get("rope.freq_base_swa", _GEMMA3_LOCAL_ROPE_BASE)),
            "query_pre_attn_scalar": config["head_dim"],
        }
    return config


def _tokens(metadata: Metadata) -> list[str]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise ValueError("[gguf] tokenizer.ggml.tokens: expected a vocabulary, got none")
    return list(tokens)


def _check_metadata(metadata: Metadata, arch: str) -> None:
    """Raise a ValueError for metadata that changes what the model computes, or how it is used, and is not taken over."""
    if (kind := metadata.get("general.type", "model")) != "model":
        raise ValueError(f"[gguf] general.type: expected 'model', got {kind!r}")
    known = _KNOWN | qwen35.KNOWN if arch == qwen35.ARCHITECTURE else _KNOWN
    for name, value in metadata.items():
        key = name.removeprefix(f"{arch}.")
        if key != name and key not in known and value not in (0, "", []):  # nothing, and no experts
            raise ValueError(f"[gguf] {name}: expected no such setting in a plain {arch} model, got {value!r:.100}")
    for key in ("add_eos_token", "suppress_tokens"):
        if value := metadata.get(f"tokenizer.ggml.{key}"):
            raise ValueError(f"[gguf] tokenizer.ggml.{key}: expected none, which cannot be followed here, got {value!r:.100}")


def _vocab_size(metadata: Metadata, tensors: dict[str, Tensor]) -> int:
    """Rows of the embedding. There may be more of them than tokens, and fewer if the surplus tokens are unused."""
    tokens = _tokens(metadata)
    if "token_embd.weight" not in tensors:
        raise ValueError("[gguf] token_embd.weight: expected an embedding, got none")
    n_rows = int(tensors["token_embd.weight"].shape[-1])
    surplus = _token_kinds(metadata)[n_rows:]
    if any(kind != _UNUSED for kind in surplus):
        raise ValueError(f"[gguf] token_embd.weight: expected a row for each of the {len(tokens)} tokens, got {n_rows}")
    if "output.weight" in tensors and (n_outputs := int(tensors["output.weight"].shape[-1])) != n_rows:
        raise ValueError(f"[gguf] output.weight: expected {n_rows} rows as in token_embd.weight, got {n_outputs}")
    return n_rows


def _token_id(metadata: Metadata, role: str) -> int | None:
    """The token of a role (bos, eos, eot, ...), None if the file names none."""
    number, n_tokens = metadata.get(f"tokenizer.ggml.{role}_token_id"), len(_tokens(metadata))
    if number is not None and not (isinstance(number, int) and 0 <= number < n_tokens):
        raise ValueError(f"[gguf] tokenizer.ggml.{role}_token_id: expected a token from 0 to {n_tokens - 1}, got {number!r}")
    return number


def _special_ids(metadata: Metadata) -> dict[str, int]:
    ids = {role: _token_id(metadata, role) for role in ("bos", "eos")}
    return {f"{role}_token_id": value for role, value in ids.items() if value is not None}


def _stop_ids(metadata: Metadata) -> list[int]:
    """Tokens that end an answer: the end of the text first, then those of a turn or message."""
    stops = [_token_id(metadata, role) for role in ("eos", "eot", "eom")]
    # Whatever their type: Gemma's are exported as normal tokens.
    stops += [number for number, token in enumerate(_tokens(metadata)) if token in _END_OF_TURN]
    return list(dict.fromkeys(number for number in stops if number is not None))


def _write_tokenizer(metadata: Metadata, folder: Path) -> None:
    from tokenizers import AddedToken, processors

    makers = {"gpt2": _byte_level_tokenizer, "llama": _sentencepiece_tokenizer}
    if (maker := metadata.get("tokenizer.ggml.model")) not in makers:
        expected = "'gpt2' (byte-level BPE) or 'llama' (SentencePiece)"
        raise ValueError(f"[gguf] tokenizer.ggml.model: expected {expected}, got {maker!r}")
    tokenizer = makers[maker](metadata)
    tokens, kinds = _tokens(metadata), _token_kinds(metadata)
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    own = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    # SentencePiece finds its own symbols in the normalised text, where a space is another character.
    tokenizer.add_tokens([AddedToken(token, normalized=maker == "llama") for token in own])
    begins = maker == "llama" or metadata.get("tokenizer.ggml.pre") in _LLAMA3  # as llama.cpp does where the file is silent
    if metadata.get("tokenizer.ggml.add_bos_token", begins) and (number := _token_id(metadata, "bos")) is not None:
        bos = tokens[number]
        template = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, number)])
        tokenizer.post_processor = template
    tokenizer.save(str(folder / "tokenizer.json"))

    config: Config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for role in ("bos", "eos", "unknown", "padding"):
        if (number := _token_id(metadata, role)) is not None:
            config[{"unknown": "unk", "padding": "pad"}.get(role, role) + "_token"] = tokens[number]
    if chat_template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def _token_kinds(metadata: Metadata) -> list[int]:
    tokens = _tokens(metadata)
    kinds = list(metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens)))
    if len(kinds) != len(tokens):
        raise ValueError(f"[gguf] tokenizer.ggml.token_type: expected {len(tokens)} numbers, got {len(kinds)}")
    return kinds


def _byte_level_tokenizer(metadata: Metadata) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = metadata.get("tokenizer.ggml.pre", "default")
    digits = pre_tokenizers.Digits(individual_digits=True)
    words: pre_tokenizers.PreTokenizer
    if pre in _SPLITS:
        split = pre_tokenizers.Split(Regex(_SPLITS[pre]), "isolated")
        words = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    elif pre == "smollm":
        words = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    elif pre == "gpt-2":
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        expected = sorted([*_SPLITS, "gpt-2", "smollm"])
        raise ValueError(f"[gguf] tokenizer.ggml.pre: expected one of {expected}, got {pre!r}")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    whole_words = pre in _LLAMA3
    tokenizer = Tokenizer(models.BPE(vocab=_vocabulary(metadata), merges=merges, ignore_merges=whole_words))
    if pre in ("qwen2", "qwen35"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_tokenizer(metadata: Metadata) -> Any:
    """SentencePiece's BPE: pairs are merged in the order of the scores of what they make."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        raise ValueError("[gguf] tokenizer.ggml.add_space_prefix: expected false for a SentencePiece vocabulary, got true")
    vocabulary, kinds = _vocabulary(metadata), _token_kinds(metadata)
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(kinds):
        raise ValueError(f"[gguf] tokenizer.ggml.scores: expected {len(kinds)} numbers, got {len(scores or [])}")
    ranked = []
    for token, number in vocabulary.items():
        if kinds[number] not in (_NORMAL, _USER_DEFINED):
            continue
        for i in range(1, len(token)):
            left, right = vocabulary.get(token[:i]), vocabulary.get(token[i:])
            if left is not None and right is not None:
                ranked.append((-scores[number], number, left, right, (token[:i], token[i:])))
    ranked.sort()
    if (unknown_id := _token_id(metadata, "unknown")) is None:
        raise ValueError("[gguf] tokenizer.ggml.unknown_token_id: expected a token, got none")
    unknown = _tokens(metadata)[unknown_id]
    merges = [pair for *_, pair in ranked]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _vocabulary(metadata: Metadata) -> dict[str, int]:
    return {token: i for i, token in enumerate(_tokens(metadata))}

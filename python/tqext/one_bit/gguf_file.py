"""The container of a GGUF file: metadata and tensors, each size compared with the file's before anything is read.

Types that `ternary` and `plain_types` do not have are those of the package ``gguf``, with their sizes and decoders. Its reader
is not used: it takes a Python step for every element of an array, 10 s for an ordinary vocabulary and for ever for a number in
a damaged file.
Source of the layout: ggml/docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from tqext.one_bit import plain_types, ternary

_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_ALIGNMENT = 32
# The largest vocabulary known, 262,144 tokens with scores, types and merges, takes 1.3 million.
_MAX_ELEMENTS = 1 << 22
_MAX_DIMS = 4  # ggml's
# Types that other programs than ggml have under these numbers. Microsoft's BitNet files are laid out for its own kernels, with
# one scale per tensor.
_FOREIGN = {
    36: "I2_S of Microsoft's bitnet.cpp; mlx-lm reads the safetensors files of BitNet models",
    37: "I8_S of Microsoft's bitnet.cpp",
    38: "TL1 of Microsoft's bitnet.cpp; mlx-lm reads the safetensors files of BitNet models",
}
# llama.cpp's names of the parts of a split file, counted from 1.
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)


# By name. A value has any type that its file gives it; what reads one says what it expects.
Metadata = dict[str, Any]


class TensorType(Protocol):
    """What all types of tensors have, the package ``gguf``'s as well."""

    @property
    def name(self) -> str:
        """As in the program that writes it."""


class Tensor(NamedTuple):
    """A tensor of a file.

    Attributes:
        name: Its name.
        tensor_type: A `plain_types.Type`, a `ternary.Type`, or for all other types a ``gguf.GGMLQuantizationType``.
        shape: In ggml's order, columns first.
        n_bytes: Size in the file.
        data_offset: Place in the file.
        data: Rows first, still on disk: numbers of float and integer types, bytes of all others.
    """

    name: str
    tensor_type: TensorType
    shape: tuple[int, ...]
    n_bytes: int
    data_offset: int
    data: np.ndarray


def read(path: str | Path) -> tuple[dict[str, Tensor], Metadata]:
    """Tensors and metadata of a model, of all the parts of a split file.

    Args:
        path: The file, or the first part.

    Raises:
        ValueError: A damaged file, a big-endian one, a part that is missing or does not belong to the others.
        ImportError: A tensor has a type of the package ``gguf``, which is not installed.
    """
    parts = [_read_part(part) for part in parts_of(path)]
    tensors, metadata = dict(parts[0][0]), parts[0][1]
    for number, (more, about) in enumerate(parts):
        _check_part(path, number, about, len(parts))
        if number:
            if twice := more.keys() & tensors.keys():
                raise ValueError(f"[gguf] {path}: expected each tensor in one part of the split file, got {min(twice)} twice")
            tensors |= more
    n_tensors = metadata.get("split.tensors.count", len(tensors)) if len(parts) > 1 else len(tensors)
    if n_tensors != len(tensors):
        raise ValueError(f"[gguf] {path}: expected {n_tensors} tensors in the split file's parts, got {len(tensors)}")
    return tensors, metadata


def parts_of(path: str | Path) -> list[Path]:
    """The files of a model: the file itself, or all parts of a split file.

    Raises:
        ValueError: This is another part than the first, or a part is missing.
    """
    path = Path(path)
    name = _PART.fullmatch(path.name)
    if name is None:
        return [path]
    stem, number, count = name[1], int(name[2]), int(name[3])
    if not 1 <= number <= count:
        raise ValueError(f"[gguf] {path}: expected a part from 1 to {count} of a split file, got {number}")
    first = path.with_name(f"{stem}-00001-of-{name[3]}{path.suffix}")
    if number != 1:
        raise ValueError(
            f"[gguf] {path}: expected the first part of the split file, {first.name}, got part {number} of {count}"
        )
    paths = [path.with_name(f"{stem}-{i:05d}-of-{name[3]}{path.suffix}") for i in range(1, count + 1)]
    if missing := [part.name for part in paths if not part.is_file()]:
        raise ValueError(f"[gguf] {path}: expected all {count} parts of the split file, got none named {', '.join(missing)}")
    return paths


def _check_part(path: str | Path, number: int, metadata: Metadata, n_parts: int) -> None:
    got = metadata.get("split.no", 0), metadata.get("split.count", 0) or 1
    if got == (number, n_parts):
        return
    if n_parts == 1:
        raise ValueError(
            f"[gguf] {path}: expected a whole model or all parts of a split file, got part {got[0] + 1} of {got[1]} in a file "
            f"that is not named NAME-00001-of-{got[1]:05d}.gguf"
        )
    raise ValueError(
        f"[gguf] {path}: expected part {number + 1} of {n_parts} in the split file's part of that name, got part {got[0] + 1} "
        f"of {got[1]}"
    )


class _Cursor:
    """Reads one thing after another."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = memoryview(data)  # type: ignore[arg-type]
        self.at = 0
        self.elements = 0

    def take(self, n: int) -> memoryview:
        if n > len(self.data) - self.at:
            raise ValueError(f"expected {n} bytes at byte {self.at}, got {len(self.data) - self.at} until the end")
        self.at += n
        return self.data[self.at - n : self.at]

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def string(self) -> str:
        return str(self.take(self.u64()), "utf-8")

    def strings(self, n: int) -> list[str]:
        """As n times `string`: a vocabulary has hundreds of thousands."""
        data, at, out = self.data, self.at, []
        for _ in range(n):
            begin = at + 8
            at = begin + int.from_bytes(data[at:begin], "little")
            if at > len(data):
                raise ValueError(f"expected a string up to byte {at}, got {len(data)} bytes")
            out.append(str(data[begin:at], "utf-8"))
        self.at = at
        return out

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(self.u32(), self.u64())
        dtype = self.scalar(kind)
        return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()

    def array(self, kind: int, n: int) -> list[Any]:
        self.elements += n
        if self.elements > _MAX_ELEMENTS:
            raise ValueError(f"expected at most {_MAX_ELEMENTS} elements in all arrays of the metadata, got {self.elements}")
        if kind == _STRING:
            return self.strings(n)
        dtype = self.scalar(kind)
        return np.frombuffer(self.take(n * dtype.itemsize), dtype).tolist()

    def scalar(self, kind: int) -> np.dtype[Any]:
        if kind not in _SCALARS:
            raise ValueError(f"expected a value of a known type, got type {kind} at byte {self.at}")
        return np.dtype(_SCALARS[kind])


def _read_part(path: Path) -> tuple[dict[str, Tensor], Metadata]:
    data = np.memmap(path, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
    try:
        cursor = _Cursor(data)
        n_tensors, n_values = _header(cursor)
        metadata: Metadata = {}
        for _ in range(n_values):
            name = cursor.string()
            if name in metadata:
                raise ValueError(f"expected every name once, got {name} twice")
            metadata[name] = cursor.value(cursor.u32())
        return _tensors(cursor, n_tensors, _alignment(metadata), data), metadata
    except (ValueError, struct.error) as error:
        raise ValueError(f"[gguf] {path}: expected a readable GGUF file, got an error: {error}") from error


def _header(cursor: _Cursor) -> tuple[int, int]:
    """Numbers of tensors and of metadata values."""
    if (magic := bytes(cursor.take(4))) != b"GGUF":
        raise ValueError(f"expected it to begin with b'GGUF', got {magic!r}")
    version = cursor.u32()
    if version and version & 0xFFFF == 0:
        raise ValueError("expected a little-endian file, got a big-endian one")
    if version not in _VERSIONS:
        raise ValueError(f"expected version {' or '.join(map(str, _VERSIONS))}, got {version}")
    return cursor.u64(), cursor.u64()


def _alignment(metadata: Metadata) -> int:
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise ValueError(f"expected a power of two as general.alignment, got {alignment!r}")
    return alignment


def _tensors(cursor: _Cursor, n: int, alignment: int, data: np.ndarray) -> dict[str, Tensor]:
    """The tensors, which must fill the file one after the other, as ggml's own reader wants them."""
    infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(n):
        name, n_dims = cursor.string(), cursor.u32()
        if name in infos:
            raise ValueError(f"expected every tensor once, got {name} twice")
        if not 1 <= n_dims <= _MAX_DIMS:
            raise ValueError(f"expected 1 to {_MAX_DIMS} axes of {name}, got {n_dims}")
        infos[name] = tuple(cursor.u64() for _ in range(n_dims)), cursor.u32(), cursor.u64()
    start = -(-cursor.at // alignment) * alignment
    try:
        return _place(infos, start, alignment, data, ternary.TYPES)
    except ValueError:
        # Tensors of one size fill the file and those of the other do not: a file is of one kind, whatever its name.
        if all(kind != ternary.Q2_0 for _, kind, _ in infos.values()):
            raise
        try:
            return _place(infos, start, alignment, data, {**ternary.TYPES, ternary.Q2_0: ternary.OLD_Q2_0})
        except ValueError:
            pass
        raise  # what is wrong with the file as ggml reads it


def _place(
    infos: dict[str, tuple[tuple[int, ...], int, int]],
    start: int,
    alignment: int,
    data: np.ndarray,
    ternary_types: dict[int, ternary.Type],
) -> dict[str, Tensor]:
    end, tensors = start, {}
    for name, (shape, kind, offset) in infos.items():
        tensor_type, dtype, row_bytes = _layout(name, shape, kind, ternary_types)
        begin, n_bytes = -(-end // alignment) * alignment, row_bytes * math.prod(shape[1:])
        if start + offset != begin:
            raise ValueError(f"expected {name} at byte {begin}, got {start + offset}")
        end = begin + n_bytes
        if end > len(data):
            raise ValueError(f"expected {name} up to byte {end}, got a file of {len(data)} bytes")
        rows = data[begin:end].view(dtype).reshape(*reversed(shape[1:]), row_bytes // dtype.itemsize)
        tensors[name] = Tensor(name, tensor_type, shape, n_bytes, begin, rows)
    if not end <= len(data) <= -(-end // alignment) * alignment:
        raise ValueError(f"expected tensors up to byte {end}, got a file of {len(data)} bytes")
    return tensors


def _layout(
    name: str, shape: tuple[int, ...], kind: int, ternary_types: dict[int, ternary.Type]
) -> tuple[TensorType, np.dtype[Any], int]:
    """A tensor's type, the dtype of its data and the bytes of a row."""
    tensor_type: TensorType
    if kind in _FOREIGN:
        raise ValueError(f"expected a type of {name} that is read here, got {kind}, which was {_FOREIGN[kind]}")
    if own := ternary_types.get(kind) or plain_types.TYPES.get(kind):
        tensor_type, n_block, block_bytes = own, own.block, own.block_bytes
    else:
        gguf = _gguf()
        try:
            tensor_type = gguf.GGMLQuantizationType(kind)
        except ValueError:
            raise ValueError(f"expected a type of {name} that the gguf package knows, got {kind}") from None
        n_block, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
    if shape[0] % n_block:
        raise ValueError(f"expected rows of {name} in blocks of {n_block} for {tensor_type.name}, got {shape[0]} columns")
    dtypes = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
    return tensor_type, np.dtype(dtypes.get(tensor_type.name, "<u1")), shape[0] // n_block * block_bytes


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "this GGUF file has a type that is read with the package gguf: run `pip install 'tqext[gguf]'`"
        ) from error
    return gguf

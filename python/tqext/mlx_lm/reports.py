"""What the probe found about each cache of a model, and what became of it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tqext._ext import format as packed_format
from tqext.calibration import LayerCalibration
from tqext.presets import Policy, Recipe


class Queries(NamedTuple):
    """Whose attention goes to a cache, as the probe saw it."""

    n_heads: int
    dtype: str  # as in `Layer.dtype`
    has_sinks: bool


@dataclass(frozen=True, slots=True)
class Layer:
    """What the probe found about one cache of a model.

    Attributes:
        path: The cache's place: ``"3"``, or ``"3.1"`` for the second member of a ``CacheList``.
        cache: The class of the cache mlx-lm makes.
        recipe: How it is compressed, None if it is not.
        reason: Why not, empty if it is.
        n_kv_heads: 0 for a cache without keys and values. So are `head_dim` and `value_dim`.
        dtype_size: Bytes of an element of its keys.
        shared: Whether other layers attend to its tokens.
        calibration: Its balance and errors under `recipe`, None before the calibration (`probe`) or without a need for one.
        note: Why the guard chose another recipe than the policy's, empty if it did not.
        dtype: Of the keys, as ``"float16"``: a type of MLX cannot be copied. None for a cache that the probe could not look
            into. `dtype_size` are the bytes of it.
        queries: What attends to it; more than one kind where layers share it.
        window: Tokens of a sliding window, None for a layer that attends to all.
        is_latent: Whether its keys are latents, which are coded, and its values rotary keys, which stay exact.
    """

    path: str
    cache: str
    recipe: Recipe | None = None
    reason: str = ""
    n_kv_heads: int = 0
    head_dim: int = 0
    value_dim: int = 0
    dtype_size: int = 2
    shared: bool = False
    calibration: LayerCalibration | None = None
    note: str = ""
    dtype: str | None = None
    queries: tuple[Queries, ...] = ()
    window: int | None = None
    is_latent: bool = False

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a coded token in all heads."""
        if self.recipe is None:
            return 0
        if self.is_latent:
            return self.n_kv_heads * (self.recipe.bytes_per_latent(self.head_dim) + self.value_dim * self.dtype_size)
        return self.n_kv_heads * self.recipe.bytes_per_token(self.head_dim, self.value_dim)

    @property
    def label(self) -> str:
        """How it is coded, in short; empty if it is not."""
        if self.recipe is None:
            return ""
        return f"L{self.recipe.key_bits}" if self.is_latent else self.recipe.label

    @property
    def fp16_bytes_per_token(self) -> int:
        return self.n_kv_heads * (self.head_dim + self.value_dim) * 2

    @property
    def exact_bytes_per_token(self) -> int:
        """Bytes of an exact token in all heads."""
        return self.n_kv_heads * (self.head_dim + self.value_dim) * self.dtype_size

    def nbytes_at(self, n_tokens: int) -> int:
        """Bytes of `n_tokens` tokens, without room for growth, as the layer would hold them if it is compressed."""
        if self.recipe is None:
            return 0
        block, n_first = packed_format.BLOCK, min(self.recipe.first, n_tokens)
        n_coded = max(0, (n_tokens - n_first - self.recipe.tail) // block * block)
        n_exact = n_tokens - n_coded
        if self.window is not None and n_coded:
            n_seen = (
                n_first + n_coded + self.recipe.tail - self.window + 1
            )  # the oldest token that was seen after the last block
            if n_seen >= n_first:
                n_coded -= (n_seen - n_first) // block * block
                n_exact -= n_first
        return n_coded * self.bytes_per_token + n_exact * self.exact_bytes_per_token

    def stock_nbytes_at(self, n_tokens: int) -> int:
        """Bytes of `n_tokens` tokens in mlx-lm's own cache, without room for growth."""
        return self._held(n_tokens) * self.exact_bytes_per_token

    def fp16_nbytes_at(self, n_tokens: int) -> int:
        """As `stock_nbytes_at`, in fp16."""
        return self._held(n_tokens) * self.fp16_bytes_per_token

    def _held(self, n_tokens: int) -> int:
        return n_tokens if self.window is None else min(n_tokens, self.window)


@dataclass(frozen=True, slots=True, repr=False)
class Report:
    """Which caches of a model are compressed, and why the others are not. Notebooks show it as a table."""

    policy: Policy
    layers: tuple[Layer, ...]

    @property
    def compressed(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.recipe is not None)

    def nbytes_at(self, n_tokens: int) -> int:
        """Bytes of `n_tokens` tokens in the compressed layers, without room for growth."""
        return sum(layer.nbytes_at(n_tokens) for layer in self.compressed)

    def fp16_nbytes_at(self, n_tokens: int) -> int:
        """Bytes of `n_tokens` tokens in the same layers in fp16."""
        return sum(layer.fp16_nbytes_at(n_tokens) for layer in self.compressed)

    def __str__(self) -> str:
        done = self.compressed
        lines = [f"{self.policy.name}: {len(done)} of {len(self.layers)} layers compressed"]
        grown, windows = [x for x in done if x.window is None], [x for x in done if x.window is not None]
        if packed := sum(layer.bytes_per_token for layer in grown):
            plain = sum(layer.fp16_bytes_per_token for layer in grown)
            lines[0] += f", {packed} bytes per token instead of {plain} in fp16 ({plain / packed:.2f} times less)"
        if windows:
            n = 2 * max(layer.window or 0 for layer in windows)  # all of them are full
            packed, plain = (sum(getattr(layer, f"{name}_at")(n) for layer in windows) for name in ("nbytes", "fp16_nbytes"))
            what = f"{len(windows)} sliding window{'s' if len(windows) > 1 else ''}"
            lines[0] += f", {what} in {packed / 1e6:.2f} MB instead of {plain / 1e6:.2f} MB in fp16"
        for (cache, reason), paths in _grouped(self.layers).items():
            lines.append(f"  layers {', '.join(paths)}: {cache} stays: {reason}")
        lines += [f"  layer {layer.path}: {layer.note}" for layer in done if layer.note]
        return "\n".join(lines)

    def table(self) -> str:
        """One line for every layer."""
        lines = [str(self).splitlines()[0]]
        for layer in self.layers:
            r = layer.recipe
            how = f"{layer.cache} stays: {layer.reason}"
            if r is not None:
                kind = "latent" if layer.is_latent else "heads"
                dims = f"{layer.n_kv_heads} {kind} of {layer.head_dim}/{layer.value_dim}"
                how = f"{layer.label}, tail {r.tail}, first {r.first}, {dims}, {layer.bytes_per_token} bytes per token"
                how += f", a sliding window of {layer.window} tokens" if layer.window is not None else ""
                how += "".join(f", {x}" for x in (layer.calibration, layer.note) if x)
            lines.append(f"  {layer.path:>5}  {how}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Report {self}>"

    def _repr_html_(self) -> str:
        """For notebooks: a table with one row for every kind of layer."""
        rows: dict[tuple[str, ...], list[str]] = {}
        for layer in self.layers:
            rows.setdefault(_row(layer), []).append(layer.path)
        head = ("layers", "cache", "bytes per token", "in fp16", "output error", "why")
        lines = ["".join(f"<th>{name}</th>" for name in head)]
        lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in (_spans(paths), *row)) for row, paths in rows.items()]
        table = "".join(f"<tr>{line}</tr>" for line in lines)
        return f"<p>{html.escape(str(self).splitlines()[0])}</p><table>{table}</table>"


def _row(layer: Layer) -> tuple[str, ...]:
    if layer.recipe is None:
        return (layer.cache, "", "", "", layer.reason)
    error = "" if layer.calibration is None else f"{layer.calibration.output_error:.1f}"
    return (layer.label, str(layer.bytes_per_token), str(layer.fp16_bytes_per_token), error, layer.note)


def _spans(paths: Sequence[str]) -> str:
    """Neighbouring layers as ``0-3, 5``; members of a list of caches one by one."""
    spans: list[list[str]] = []
    for path in paths:
        if spans and path.isdigit() and spans[-1][-1].isdigit() and int(path) == int(spans[-1][-1]) + 1:
            spans[-1].append(path)
        else:
            spans.append([path])
    return ", ".join(span[0] if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans)


def _grouped(layers: Sequence[Layer]) -> dict[tuple[str, str], list[str]]:
    groups: dict[tuple[str, str], list[str]] = {}
    for layer in layers:
        if layer.recipe is None:
            groups.setdefault((layer.cache, layer.reason), []).append(layer.path)
    return groups

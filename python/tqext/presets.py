"""What is compressed and how: the recipe of one layer's cache, the policy of a model, and named presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from tqext._ext import format as packed_format

ROTATIONS = ("hadamard", "orthogonal")
VALUE_BITS = {"groups": (2, 4), "lloyd": (2, 3, 4)}
# The most exact tokens that a recipe may ask for, also one from a damaged file.
MAX_EXACT_TOKENS = 1 << 20
# Exact tokens of the recipes that do not say otherwise.
DEFAULT_TAIL = 64
DEFAULT_FIRST = 64


def _check(ok: bool, argument: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"[policy] {argument}: expected {expected}, got {got}")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one layer stores its tokens.

    Tokens are coded in blocks of 64 (``format.BLOCK``), oldest first: when `tail` + 64 recent tokens are held, the oldest 64
    of them become a block. So `tail` to `tail` + 63 recent tokens are exact between two steps of decoding.

    Attributes:
        key_bits: Bits of a key code: 2, 3 or 4.
        value_bits: Bits of a value code: 2 or 4 with groups, 2, 3 or 4 with Lloyd-Max codes.
        value_coding: ``"groups"`` (a scale and a bias per 32 dimensions) or ``"lloyd"`` (the keys' codebook and one norm).
        qjl: One more bit per key dimension: the sign of the rotated residual.
        rotation: ``"hadamard"``, or ``"orthogonal"`` for a dense seeded matrix.
        means: Store the keys of each block less their mean, which is kept in fp16.
        balance: Weigh the key's channels by what the queries need, if the model was calibrated (`TurboQuantKVCache`'s
            ``balance``).
        tail: The number of most recent tokens that stay exact.
        first: The number of first tokens that stay exact: attention goes back to them from everywhere.
    """

    key_bits: int = 3
    value_bits: int = 2
    value_coding: str = "groups"
    qjl: bool = False
    rotation: str = "hadamard"
    means: bool = True
    balance: bool = True
    tail: int = DEFAULT_TAIL
    first: int = DEFAULT_FIRST

    def __post_init__(self) -> None:
        _check(self.key_bits in (2, 3, 4), "key_bits", "2, 3 or 4", self.key_bits)
        _check(self.value_coding in VALUE_BITS, "value_coding", f"one of {', '.join(VALUE_BITS)}", self.value_coding)
        bits = VALUE_BITS[self.value_coding]
        _check(self.value_bits in bits, "value_bits", f"one of {bits} ({self.value_coding})", self.value_bits)
        _check(self.rotation in ROTATIONS, "rotation", f"one of {ROTATIONS}", self.rotation)
        for name in ("qjl", "means", "balance"):
            _check(isinstance(getattr(self, name), bool), name, "True or False", getattr(self, name))
        for name in ("tail", "first"):
            n = getattr(self, name)
            _check(isinstance(n, int) and 0 <= n <= MAX_EXACT_TOKENS, name, f"0 to {MAX_EXACT_TOKENS}", n)

    @property
    def label(self) -> str:
        """Bits of keys and values, such as ``K3 V3 Lloyd``."""
        return (
            f"K{self.key_bits}{'+1' if self.qjl else ''} V{self.value_bits}{' Lloyd' if self.value_coding == 'lloyd' else ''}"
        )

    def bytes_per_block(self, key_dim: int, value_dim: int | None = None) -> int:
        """Packed bytes of a block of 64 tokens of one KV head, its mean included."""
        value_dim = value_dim or key_dim
        padded_key, padded_value = packed_format.padded_dim(key_dim), packed_format.padded_dim(value_dim)
        keys = padded_key * self.key_bits // 8 + 2 + (padded_key // 8 + 2 if self.qjl else 0)
        params = 2 if self.value_coding == "lloyd" else padded_value // 32 * 4
        values = padded_value * self.value_bits // 8 + params
        return packed_format.BLOCK * (keys + values) + (2 * key_dim if self.means else 0)

    def bytes_per_latent(self, dim: int) -> int:
        """Packed bytes of one coded latent, with its share of the block's mean, rounded up; the rotary key is not in it."""
        codes = packed_format.padded_dim(dim) * self.key_bits // 8 + 2
        return codes + (-(-2 * dim // packed_format.BLOCK) if self.means else 0)

    def bytes_per_token(self, key_dim: int, value_dim: int | None = None) -> int:
        """Packed bytes of one coded token of one KV head, with its share of the block's mean, rounded up."""
        return -(-self.bytes_per_block(key_dim, value_dim) // packed_format.BLOCK)


@dataclass(frozen=True, slots=True)
class Policy:
    """Which layers are compressed, and how.

    Attributes:
        name: The preset's name.
        recipe: The recipe of every compressed layer.
        first_last: Number of layers at each end of the model that keep mlx-lm's cache.
        layers: Layer index to its own recipe, or to None to leave that layer alone.
        guard: Step a layer up that the calibration finds inaccurate: to 4-bit keys, then to no compression.
        windows: Whether layers with a sliding window are compressed. None: where that saves more than a fifth of the memory
            that the weights and the caches of `clients` take (`tqext.mlx_lm.windows`).
        clients: Sequences that are held at once.
        study: Whether the preset is there to reproduce or to compare, not to be used.
    """

    name: str
    recipe: Recipe = field(default_factory=Recipe)
    first_last: int = 0
    layers: Mapping[int, Recipe | None] = field(default_factory=dict)
    guard: bool = True
    study: bool = False
    windows: bool | None = None
    clients: int = 1

    def __post_init__(self) -> None:
        _check(self.windows in (None, True, False), "windows", "None, True or False", self.windows)
        _check(isinstance(self.clients, int) and self.clients > 0, "clients", "at least 1", self.clients)
        _check(self.first_last >= 0, "first_last", "at least 0", self.first_last)

    def of_layer(self, layer: int, n_layers: int) -> Recipe | None:
        """The recipe of a layer, None where it keeps its own cache."""
        if layer in self.layers:
            return self.layers[layer]
        if min(layer, n_layers - 1 - layer) < self.first_last:
            return None
        return self.recipe


# Recipes for study are taken as they are: the guard would make others of them.
PRESETS: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy("tq3"),
        Policy("tq33", Recipe(value_bits=3, value_coding="lloyd")),
        Policy("tq4", Recipe(key_bits=4, value_bits=4, value_coding="lloyd")),
        Policy("tq2", Recipe(key_bits=2, value_bits=2, value_coding="lloyd")),
        Policy("tq3-plain", Recipe(means=False, balance=False, tail=0, first=0), guard=False, study=True),
        Policy("tq3-qjl", Recipe(qjl=True), guard=False, study=True),
        Policy("tq2-qjl", Recipe(key_bits=2, qjl=True), guard=False, study=True),
        Policy("bonsai", first_last=4, guard=False, study=True),
        Policy("paper-mse", Recipe(value_bits=4), guard=False, study=True),
        Policy("paper-prod", Recipe(value_bits=4, qjl=True), guard=False, study=True),
        Policy("polarquant", Recipe(value_bits=4, rotation="orthogonal"), guard=False, study=True),
    )
}
DEFAULT_PRESET = "tq3"


def get_policy(preset: str | Policy = DEFAULT_PRESET, **overrides: Any) -> Policy:
    """A preset, with changes.

    Args:
        preset: A name of `PRESETS`, or a policy.
        **overrides: Fields of `Recipe` or of `Policy` to change; None leaves a field as it is.

    Raises:
        ValueError: An unknown preset, an unknown field or a value out of range.
    """
    if isinstance(preset, str):
        hint = " (mlx-lm's own cache: tqext.uninstall() or tqext.detach(model))" if preset == "none" else ""
        _check(preset in PRESETS, "preset", f"one of {', '.join(PRESETS)}", f"{preset}{hint}")
        preset = PRESETS[preset]
    _check(isinstance(preset, Policy), "preset", "a preset's name or a Policy", repr(preset)[:100])
    given = {name: value for name, value in overrides.items() if value is not None}
    of_recipe = {name: given.pop(name) for name in [f.name for f in fields(Recipe)] if name in given}
    unknown = set(given) - {"first_last", "layers", "guard", "windows", "clients"}
    _check(not unknown, "overrides", "fields of Recipe or Policy", ", ".join(sorted(unknown)))
    return replace(preset, recipe=replace(preset.recipe, **of_recipe), **given)

"""What is compressed and how: the recipe of one layer's cache, the policy of a model, and named presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

ROTATIONS = ("hadamard", "orthogonal")
# Codings of values, and the bits that each has. The order is that of saved states.
VALUE_CODINGS = {"groups": (2, 4), "lloyd": (2, 3, 4)}
# Coded tokens that share a mean; they are coded together. tqext.format.BLOCK, without loading the extension.
BLOCK = 64
# Room for exact tokens is set aside at once: a number from a damaged file must not ask for more than a machine has.
MAX_EXACT_TOKENS = 1 << 20


def _padded(head_dim: int) -> int:
    return (head_dim + 31) // 32 * 32


def _check(ok: bool, argument: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"[policy] {argument}: expected {expected}, got {got}")


# Exact tokens of a recipe: decided by KL on four models (docs/quality.md).
DEFAULT_TAIL = 64
DEFAULT_FIRST = 64


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one layer stores its tokens: the first ones exact, then coded blocks of 64, then the recent ones exact.

    Attributes:
        key_bits: Bits of a key code: 2, 3 or 4.
        value_bits: Bits of a value code: 2 or 4 as groups, 2, 3 or 4 as lloyd.
        value_coding: ``"groups"`` (scale and bias per 32) or ``"lloyd"`` (the keys' codebook and one norm).
        qjl: One more bit per key dimension: the sign of the rotated residual.
        rotation: ``"hadamard"``, or ``"orthogonal"`` for a dense seeded matrix.
        means: Store the keys of each block less their mean.
        balance: Give each channel of the keys the precision that queries need, from a calibration of the model.
        tail: The number of most recent tokens that stay exact (residual window). Between `tail` and `tail` + 63 are held.
        first: The number of first tokens that stay exact.
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
        _check(self.value_coding in VALUE_CODINGS, "value_coding", f"one of {tuple(VALUE_CODINGS)}", self.value_coding)
        bits = VALUE_CODINGS[self.value_coding]
        _check(self.value_bits in bits, "value_bits", f"one of {bits} for {self.value_coding!r}", self.value_bits)
        _check(self.rotation in ROTATIONS, "rotation", f"one of {ROTATIONS}", self.rotation)
        for name in ("tail", "first"):
            n = getattr(self, name)
            _check(0 <= n <= MAX_EXACT_TOKENS, name, f"0 to {MAX_EXACT_TOKENS}", n)

    def bytes_per_token(self, key_dim: int, value_dim: int | None = None) -> int:
        """Packed bytes of one token of one KV head (what a coded token costs), its share of the block's mean included."""
        value_dim = _padded(value_dim or key_dim)
        mean = -(-2 * key_dim // BLOCK) if self.means else 0
        key_dim = _padded(key_dim)
        keys = key_dim * self.key_bits // 8 + 2 + (key_dim // 8 + 2 if self.qjl else 0)
        values = value_dim * self.value_bits // 8 + (2 if self.value_coding == "lloyd" else value_dim // 32 * 4)
        return keys + mean + values


@dataclass(frozen=True, slots=True)
class Policy:
    """Which layers are compressed, and how.

    Attributes:
        name: The preset's name.
        recipe: The recipe of every compressed layer.
        first_last: So many first and so many last layers keep their own cache.
        layers: Layer index to its own recipe, or to None to leave that layer alone.
        guard: Step a layer up that the calibration finds inaccurate: to 4-bit keys, then to no compression.
        study: A published or reduced recipe, for comparison.
    """

    name: str
    recipe: Recipe = field(default_factory=Recipe)
    first_last: int = 0
    layers: Mapping[int, Recipe | None] = field(default_factory=dict)
    guard: bool = True
    study: bool = False

    def __post_init__(self) -> None:
        _check(self.first_last >= 0, "first_last", "at least 0", self.first_last)

    def of_layer(self, layer: int, n_layers: int) -> Recipe | None:
        """The recipe of a layer, None where it keeps its own cache."""
        if layer in self.layers:
            return self.layers[layer]
        if min(layer, n_layers - 1 - layer) < self.first_last:
            return None
        return self.recipe


def _study(name: str, recipe: Recipe | None = None, first_last: int = 0) -> Policy:
    """A recipe as it is: the guard would make another one of it."""
    return Policy(name, recipe or Recipe(), first_last, guard=False, study=True)


PRESETS: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy("tq3"),
        Policy("tq33", Recipe(value_bits=3, value_coding="lloyd")),
        Policy("tq4", Recipe(key_bits=4, value_bits=4, value_coding="lloyd")),
        Policy("tq2", Recipe(key_bits=2, value_bits=2, value_coding="lloyd")),
        _study("tq3-plain", Recipe(means=False, balance=False, tail=0, first=0)),
        _study("tq3-qjl", Recipe(qjl=True)),
        _study("tq2-qjl", Recipe(key_bits=2, qjl=True)),
        _study("bonsai", first_last=4),
        _study("paper-mse", Recipe(value_bits=4)),
        _study("paper-prod", Recipe(value_bits=4, qjl=True)),
        _study("polarquant", Recipe(value_bits=4, rotation="orthogonal")),
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
        _check(preset in PRESETS, "preset", f"one of {', '.join(PRESETS)}", preset)
        preset = PRESETS[preset]
    given = {name: value for name, value in overrides.items() if value is not None}
    of_recipe = {name: given.pop(name) for name in [f.name for f in fields(Recipe)] if name in given}
    unknown = set(given) - {"first_last", "layers", "guard"}
    _check(not unknown, "overrides", "fields of Recipe or Policy", ", ".join(sorted(unknown)))
    return replace(preset, recipe=replace(preset.recipe, **of_recipe), **given)

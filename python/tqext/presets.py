"""What is compressed and how: the recipe of one layer's cache, the policy of a model, and named presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

ROTATIONS = ("hadamard", "orthogonal")
# Room for exact tokens is set aside at once: a number from a damaged file must not ask for more than a machine has.
MAX_EXACT_TOKENS = 1 << 20


def _padded(head_dim: int) -> int:
    return (head_dim + 31) // 32 * 32


def _check(ok: bool, argument: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"[policy] {argument}: expected {expected}, got {got}")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one layer stores its tokens.

    Attributes:
        key_bits: Bits of a key code: 2, 3 or 4.
        value_bits: Bits of a value code: 2 or 4.
        qjl: One more bit per key dimension: the sign of the rotated residual.
        rotation: ``"hadamard"``, or ``"orthogonal"`` for a dense seeded matrix.
        mean: Store keys less their mean over the first encoded tokens, which softmax cannot see.
        tail: The number of most recent tokens that stay exact. Between `tail` and `tail` + `flush` - 1 are held.
        sinks: The number of first tokens that stay exact.
        flush: Tokens are encoded in blocks of this many.
    """

    key_bits: int = 3
    value_bits: int = 2
    qjl: bool = False
    rotation: str = "hadamard"
    mean: bool = True
    tail: int = 32
    sinks: int = 4
    flush: int = 32

    def __post_init__(self) -> None:
        _check(self.key_bits in (2, 3, 4), "key_bits", "2, 3 or 4", self.key_bits)
        _check(self.value_bits in (2, 4), "value_bits", "2 or 4", self.value_bits)
        _check(self.rotation in ROTATIONS, "rotation", f"one of {ROTATIONS}", self.rotation)
        for name, least in (("tail", 0), ("sinks", 0), ("flush", 1)):
            n = getattr(self, name)
            _check(least <= n <= MAX_EXACT_TOKENS, name, f"{least} to {MAX_EXACT_TOKENS}", n)

    def bytes_per_token(self, key_dim: int, value_dim: int | None = None) -> int:
        """Packed bytes of one token of one KV head (what a coded token costs)."""
        key_dim, value_dim = _padded(key_dim), _padded(value_dim or key_dim)
        keys = key_dim * self.key_bits // 8 + 2 + (key_dim // 8 + 2 if self.qjl else 0)
        return keys + value_dim * self.value_bits // 8 + value_dim // 32 * 4


@dataclass(frozen=True, slots=True)
class Policy:
    """Which layers are compressed, and how.

    Attributes:
        name: The preset's name.
        recipe: The recipe of every compressed layer.
        first_last: So many first and so many last layers keep their own cache.
        layers: Layer index to its own recipe, or to None to leave that layer alone.
    """

    name: str
    recipe: Recipe = field(default_factory=Recipe)
    first_last: int = 0
    layers: Mapping[int, Recipe | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self.first_last >= 0, "first_last", "at least 0", self.first_last)

    def of_layer(self, layer: int, n_layers: int) -> Recipe | None:
        """The recipe of a layer, None where it keeps its own cache."""
        if layer in self.layers:
            return self.layers[layer]
        if min(layer, n_layers - 1 - layer) < self.first_last:
            return None
        return self.recipe


PRESETS: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy("tq3"),
        Policy("tq4", Recipe(key_bits=4, value_bits=4)),
        Policy("tq2", Recipe(key_bits=2, value_bits=2)),
        Policy("tq3-plain", Recipe(mean=False, tail=0, sinks=0, flush=1)),
        Policy("tq3-qjl", Recipe(qjl=True)),
        Policy("tq2-qjl", Recipe(key_bits=2, qjl=True)),
        Policy("bonsai", first_last=4),
        Policy("paper-mse", Recipe(value_bits=4)),
        Policy("paper-prod", Recipe(value_bits=4, qjl=True)),
        Policy("polarquant", Recipe(value_bits=4, rotation="orthogonal")),
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
    unknown = set(given) - {"first_last", "layers"}
    _check(not unknown, "overrides", "fields of Recipe or Policy", ", ".join(sorted(unknown)))
    return replace(preset, recipe=replace(preset.recipe, **of_recipe), **given)

"""``tqext plan``: does a model with a context fit, and how long a context does."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from tqext._ext import format as packed_format
from tqext.presets import PRESETS, Policy, get_policy

UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
# What is left to the system, the activations and the allocator's pool.
USABLE = 0.85


class Plan(NamedTuple):
    """The memory of a model under one policy.

    Attributes:
        preset: The policy's name, ``"none"`` for mlx-lm's own cache.
        bytes_per_token: What one more token costs in all growing caches.
        fixed: Bytes of the exact tokens, which do not grow.
        weights: Bytes of the weights.
    """

    preset: str
    bytes_per_token: int
    fixed: int
    weights: int

    def nbytes(self, context: int) -> int:
        """Weights and caches with that many tokens."""
        return self.weights + self.fixed + self.bytes_per_token * context

    def longest(self, memory: float) -> int:
        """Tokens that fit into so many bytes."""
        return max(0, int((memory - self.weights - self.fixed) / max(self.bytes_per_token, 1)))


def plan(model: Any, preset: str | Policy | None) -> Plan:
    """The memory of a model, from a dry run that loads no weights.

    Args:
        model: Any mlx-lm model; it may be loaded with ``lazy=True``.
        preset: See `tqext.install`; None for mlx-lm's own cache.
    """
    from mlx.utils import tree_reduce

    from tqext.mlx_lm import probe

    policy = get_policy() if preset is None else get_policy(preset)
    grows = fixed = 0
    for layer in probe(model, policy).layers:
        plain = layer.n_kv_heads * (layer.head_dim + layer.value_dim) * layer.dtype_size
        if preset is not None and layer.recipe is not None:
            grows += layer.bytes_per_token
            fixed += plain * (layer.recipe.first + layer.recipe.tail + packed_format.BLOCK - 1)
        elif layer.cache == "KVCache":
            grows += plain
    weights = tree_reduce(lambda n, x: n + x.nbytes, model.parameters(), 0)
    return Plan("none" if preset is None else policy.name, grows, fixed, weights)


def parse_bytes(text: str) -> int:
    """``"16G"`` and the like as a number of bytes."""
    unit = text[-1:].upper()
    number = text[:-1] if unit in UNITS else text
    try:
        return int(float(number) * UNITS.get(unit, 1))
    except ValueError:
        raise ValueError(f"[plan] memory: expected a number and one of {', '.join(UNITS)}, got {text!r}") from None


def total_memory() -> int:
    """Bytes of memory that a model can have: the GPU's working set, else this machine's."""
    if mx.default_device() == mx.gpu:
        info: Any = mx.device_info()
        for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
            if info.get(key):
                return int(info[key])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="tqext plan", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, help="a folder, a hub id, or smollm2")
    parser.add_argument("--memory", type=parse_bytes, help="such as 16G; default: what this machine has")
    parser.add_argument("--context", type=int, help="tokens that are to fit")
    parser.add_argument("--kv", choices=PRESETS, metavar="PRESET", help="default: all presets")
    options = parser.parse_args(argv)
    from mlx_lm.utils import load_model

    from tqext.models import local_folder

    model, _ = load_model(Path(local_folder(options.model)), lazy=True)
    memory = (options.memory or total_memory()) * USABLE
    plans = [plan(model, preset) for preset in (None, *([options.kv] if options.kv else PRESETS))]
    print(f"{options.model}: weights {plans[0].weights / 1e9:.2f} GB, {memory / 1e9:.1f} GB usable")
    print(f"{'preset':<12} {'bytes/token':>11} {'longest context':>16}", end="")
    print(f" {f'at {options.context} tokens':>20}" if options.context else "")
    for p in plans:
        print(f"{p.preset:<12} {p.bytes_per_token:>11} {p.longest(memory):>16}", end="")
        if options.context:
            fits = "fits" if p.nbytes(options.context) <= memory else "does not fit"
            print(f" {p.nbytes(options.context) / 1e9:>8.2f} GB, {fits}", end="")
        print()

"""``tqext plan``: does a model with a context fit, how long a context does, and which preset to take."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from tqext._ext import format as packed_format
from tqext.commands.options import MODEL_HELP, SHOWN_PRESETS, ArgumentParser, positive, preset_name
from tqext.presets import Policy, get_policy

# Of a number of bytes: 16G and 16GiB are powers of two, as tools of the system print them; 16GB is a power of ten.
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]?)(I?B?)", re.IGNORECASE)
_POWERS = " KMGT"
# What is left to the system, the activations and the allocator's pool.
USABLE = 0.85
# KL of the next token in nats at head dimension 128 (Qwen2.5-Coder-1.5B) and 64 (0.5B), 32768 tokens of prose: docs/quality.md.
QUALITY = {"tq3": (0.0133, 0.0230), "tq33": (0.0050, 0.0166), "tq4": (0.0011, 0.0040)}
# Assumed where neither the user nor the model names a context.
DEFAULT_CONTEXT = 8192
# From the most accurate one: the first that fits is recommended.
_BY_QUALITY = ("tq4", "tq33", "tq3", "tq2")


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
        """Tokens that fit into `memory` bytes."""
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
    """``"16G"``, ``"16GiB"`` (both 16 * 2**30), ``"16GB"`` (16 * 10**9) and the like as a number of bytes.

    Raises:
        ValueError: The text is no size, or less than one byte.
    """
    found = _SIZE.fullmatch(text.strip())
    number = 0
    if found is not None:
        value, prefix, unit = found.groups()
        base = 1000 if prefix and unit.upper() == "B" else 1024
        number = int(float(value) * base ** (_POWERS.index(prefix.upper()) if prefix else 0))
    if number < 1:
        raise ValueError(f"[plan] memory: expected a size such as 16GB or 16GiB, got {text!r}")
    return number


def _memory(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:  # argparse would put a sentence of its own in its place
        raise argparse.ArgumentTypeError(str(error).partition(": ")[2]) from None


def total_memory() -> int:
    """Bytes of memory that a model can have: the GPU's working set, else this machine's."""
    if mx.default_device() == mx.gpu:
        info: Any = mx.device_info()
        for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
            if info.get(key):
                return int(info[key])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def quality(preset: str, head_dim: int, *, latent: bool = False) -> str:
    """The measured error of a preset in words, for models of such a head dimension; `latent`: with latent attention."""
    if preset == "none":
        return "exact"
    if preset not in QUALITY or latent:
        return "not measured"
    return f"KL {QUALITY[preset][head_dim < 128]:.4f}"


def recommended(plans: Sequence[Plan], memory: float, context: int) -> str | None:
    """The most accurate of the presets for use with which `context` tokens fit, None if there is none."""
    by_name = {p.preset: p for p in plans}
    fitting = (name for name in _BY_QUALITY if name in by_name and by_name[name].nbytes(context) <= memory)
    return next(fitting, None)


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = ArgumentParser(prog="tqext plan", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    parser.add_argument("--memory", type=_memory, help="such as 16GB or 16GiB; default: what this machine has")
    parser.add_argument("--context", type=positive, metavar="N", help="tokens that are to fit; default: the model's limit")
    kv = f"default: none, {', '.join(SHOWN_PRESETS)} (help shows all presets)"
    parser.add_argument("--kv", type=preset_name, metavar="PRESET", help=kv)
    options = parser.parse_args(argv)
    from mlx_lm.utils import load_model

    from tqext.calibration import known_context
    from tqext.mlx_lm import probe
    from tqext.models import local_folder

    model, _ = load_model(Path(local_folder(options.model)), lazy=True)
    memory = (options.memory or total_memory()) * USABLE
    limit = known_context(model)
    context = options.context or limit or DEFAULT_CONTEXT
    names = ["none", *([options.kv] if options.kv else SHOWN_PRESETS)]
    plans = [plan(model, None if name == "none" else name) for name in dict.fromkeys(names)]
    trained = f"trained for {limit} tokens" if limit else "its trained length is unknown"
    print(f"{options.model}: weights {plans[0].weights / 1e9:.2f} GB, {trained}; {memory / 1e9:.1f} GB usable")
    print(f"{'preset':<11} {'bytes/token':>11}  {f'at {context} tokens':>24}  {'longest context':>15}  quality")
    layers = probe(model).compressed
    head_dim = max((layer.head_dim for layer in layers), default=0)
    latent = any(layer.is_latent for layer in layers)
    for p in plans:
        fits = "fits" if p.nbytes(context) <= memory else "does not fit"
        at = f"{p.nbytes(context) / 1e9:.2f} GB, {fits}"
        longest = p.longest(memory)
        shown = f"{min(longest, limit)} (limit)" if limit and longest >= limit else str(longest)
        print(f"{p.preset:<11} {p.bytes_per_token:>11}  {at:>24}  {shown:>15}  {quality(p.preset, head_dim, latent=latent)}")
    if latent:
        print("quality: no model with latent attention was measured yet; tqext eval compares this one with its own cache.")
    else:
        like = "Qwen2.5-Coder with the same head dimension or the next smaller one"
        print(f"quality: KL of the next token in nats, of {like}, prose")
    if any(layer.dtype_size == 4 for layer in layers):
        print("none: this model's own cache is in fp32; in fp16 it takes half.")
    if options.context and limit and options.context > limit:
        print(f"{options.context} tokens are more than the model was trained for.")
    if head_dim == 0:
        print("No layer of this model can be compressed: tqext generate --kv-report says why.")
    elif not options.kv:
        name = recommended(plans, memory, context)
        fits = f"the most accurate preset with which {context} tokens fit"
        print(f"Recommended: --kv {name}, {fits}" if name else f"No preset fits {context} tokens into the memory.")

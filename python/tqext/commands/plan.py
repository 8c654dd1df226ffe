"""``tqext plan``: does a model with a context fit, how long a context does, and which preset to take."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from tqext._ext import format as packed_format
from tqext.commands.options import (
    MODEL_HELP,
    SHOWN_PRESETS,
    WINDOWS,
    WINDOWS_HELP,
    ArgumentParser,
    n_bytes,
    positive,
    preset_name,
)
from tqext.presets import Policy, get_policy
from tqext.protocols import Model

# What is left to the system, the activations and the allocator's pool.
USABLE = 0.85
# KL of the next token in nats at head dimension 128 (Qwen2.5-Coder-1.5B) and 64 (0.5B), 32768 tokens of prose: docs/quality.md.
QUALITY = {"tq2": (None, 0.0714), "tq3": (0.0133, 0.0230), "tq33": (0.0050, 0.0166), "tq4": (0.0011, 0.0040)}
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
        windows: Bytes of the sliding windows when they are full.
        clients: Sequences of as many tokens each.
    """

    preset: str
    bytes_per_token: int
    fixed: int
    weights: int
    windows: int = 0
    clients: int = 1

    def nbytes(self, context: int) -> int:
        """Weights and caches with that many tokens for each client."""
        return self.weights + self.clients * self.client_nbytes(context)

    def client_nbytes(self, context: int) -> int:
        """The caches of one client."""
        return self.fixed + self.windows + self.bytes_per_token * context

    def longest(self, memory: float) -> int:
        """Tokens of each client that fit into `memory` bytes."""
        each = (memory - self.weights) / self.clients - self.fixed - self.windows
        return max(0, int(each / max(self.bytes_per_token, 1)))


def plan(model: Model, preset: str | Policy | None, clients: int = 1) -> Plan:
    """The memory of a model, from a dry run that loads no weights.

    Args:
        model: Any mlx-lm model; it may be loaded with ``lazy=True``.
        preset: See `tqext.install`; None for mlx-lm's own cache.
        clients: Sequences that are held at once; a policy's own are those that it decides by.
    """
    from tqext.mlx_lm import probe
    from tqext.mlx_lm.windows import weight_bytes

    policy = get_policy(windows=False) if preset is None else get_policy(preset)
    grows = fixed = windows = 0
    for layer in probe(model, policy).layers:
        is_compressed = preset is not None and layer.recipe is not None
        plain = layer.exact_bytes_per_token
        if layer.window is not None:
            # When they are full: what a window holds goes up and down by a block.
            full = range(4 * layer.window, 4 * layer.window + packed_format.BLOCK)
            windows += max(map(layer.nbytes_at, full)) if is_compressed else layer.stock_nbytes_at(layer.window)
        elif is_compressed and layer.recipe is not None:
            grows += layer.bytes_per_token
            fixed += plain * (layer.recipe.first + layer.recipe.tail + packed_format.BLOCK - 1)
        elif layer.cache == "KVCache":
            grows += plain
    return Plan("none" if preset is None else policy.name, grows, fixed, weight_bytes(model), windows, clients)


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
    found = None if latent else QUALITY.get(preset, (None, None))[head_dim < 128]
    return "not measured" if found is None else f"KL {found:.4f}"


def recommended(plans: Sequence[Plan], memory: float, context: int) -> str | None:
    """The most accurate of the presets for use with which `context` tokens fit, None if there is none."""
    by_name = {p.preset: p for p in plans}
    fitting = (name for name in _BY_QUALITY if name in by_name and by_name[name].nbytes(context) <= memory)
    return next(fitting, None)


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = ArgumentParser(prog="tqext plan", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    parser.add_argument("--memory", type=n_bytes, help="such as 16GB or 16GiB; default: what this machine has")
    parser.add_argument("--context", type=positive, metavar="N", help="tokens that are to fit; default: the model's limit")
    parser.add_argument("--clients", type=positive, default=1, metavar="N", help="sequences that are held at once (default 1)")
    parser.add_argument("--kv-windows", default="auto", choices=WINDOWS, metavar="WHEN", help=WINDOWS_HELP)
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
    clients, windows = options.clients, WINDOWS[options.kv_windows]
    policies = [None if name == "none" else get_policy(name, windows=windows, clients=clients) for name in dict.fromkeys(names)]
    plans = [plan(model, policy, clients) for policy in policies]
    trained = f"trained for {limit} tokens" if limit else "its trained length is unknown"
    print(f"{options.model}: weights {plans[0].weights / 1e9:.2f} GB, {trained}; {memory / 1e9:.1f} GB usable")
    at = f"at {context} tokens" if clients == 1 else f"{clients} times {context} tokens"
    print(f"{'preset':<11} {'bytes/token':>11}  {at:>24}  {'longest context':>15}  quality")
    layers = probe(model).compressed
    head_dim = max((layer.head_dim for layer in layers), default=0)
    latent = any(layer.is_latent for layer in layers)
    for p in plans:
        fits = "fits" if p.nbytes(context) <= memory else "does not fit"
        at = f"{p.nbytes(context) / 1e9:.2f} GB, {fits}"
        longest = p.longest(memory)
        shown = f"{min(longest, limit)} (limit)" if limit and longest >= limit else str(longest)
        print(f"{p.preset:<11} {p.bytes_per_token:>11}  {at:>24}  {shown:>15}  {quality(p.preset, head_dim, latent=latent)}")
    if any(p.windows for p in plans):
        sizes = ", ".join(f"{p.preset} {p.windows / 1e6:.1f}" for p in plans)
        print(f"sliding windows, MB for each client when they are full: {sizes}")
    if clients > 1:
        print(f"caches of a client, MB: {', '.join(f'{p.preset} {p.client_nbytes(context) / 1e6:.1f}' for p in plans)}")
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

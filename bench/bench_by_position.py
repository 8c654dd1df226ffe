"""Quality over the length of the context on a real model: KL by position beside mlx-lm's caches and a control, and passkeys.

    python -m bench quality --by-position --model qwen2.5-coder-0.5b-4bit --tokens 4096 --json results.json

The text is fed in order, a chunk at a time, through an uncompressed cache and all others side by side. The control is the
uncompressed cache fed in halves of a chunk: what lies below it is rounding. Rows that the file holds are not measured again;
what an interrupted run had reached is kept too, and replaced.

With --moved all positions of a text are so many tokens further from the start of the context. Distances stay as they are, so
the uncompressed model computes the same, and what differs is what the place does to compressed keys:

    python -m bench quality --by-position --model smollm2-135m-4bit --tokens 1024 --skip 2000 --chunk 8 --moved 0,3500,7000
"""

from __future__ import annotations

import os

# A second BLAS thread waits more than it works on products of a few rows. Before NumPy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx

import fetch_models
import texts
import timing
from tqext import get_policy
from tqext.blas import for_evaluation
from tqext.by_position import CHUNK, STOCK_BITS, ByPosition, as_row, by_position, contenders, table
from tqext.commands.evaluate import passkeys
from tqext.models import load
from tqext.presets import PRESETS

DEFAULT_PRESETS = "tq3,tq33,tq4,tq2"


def words(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def numbers(text: str) -> list[int]:
    return [int(part) for part in words(text)]


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--by-position", action="store_true", help=argparse.SUPPRESS)
    out.add_argument("--model", required=True, help="a folder, a hub id, or a name of fetch-models (-4bit: with 4-bit weights)")
    out.add_argument("--tokens", type=int, default=4096, help="of each text; 0: passkeys alone")
    out.add_argument("--chunk", type=int, default=CHUNK)
    out.add_argument("--presets", type=words, default=words(DEFAULT_PRESETS), help="those that this version has are measured")
    out.add_argument("--stock-bits", type=numbers, default=list(STOCK_BITS), help="mlx-lm's quantised caches; '' for none")
    out.add_argument("--texts", type=words, default=["prose", "code"], help=f"of {', '.join(texts.TEXTS)}, or text files")
    out.add_argument("--skip", type=int, default=0, help="tokens of each text before those that are fed")
    out.add_argument("--moved", type=numbers, default=[0], help="tokens by which all positions are moved, as 0,3500,7000")
    out.add_argument(
        "--windows", choices=("on", "off"), help="compress sliding windows in any case, or never; default: by the rule"
    )
    out.add_argument("--passkeys", type=numbers, default=[], help="contexts in tokens, as 4096,28000")
    out.add_argument("--trials", type=int, default=20, help="for each number of hidden keys")
    out.add_argument("--device", choices=("cpu", "gpu"), help="default: MLX's own")
    out.add_argument("--json", type=Path, help="file to add the run to")
    return out


def known(names: list[str]) -> list[str]:
    """Those of the presets that this version has; the others are named."""
    for name in names:
        if name not in PRESETS:
            print(f"{name}: not a preset of this version", flush=True)
    return [name for name in names if name in PRESETS]


class File:
    """The rows of one run, on disk after each change."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path, self.settings, self.rows = path, settings, []
        if path and path.exists():
            runs = json.loads(path.read_text())["runs"]
            self.rows = next((run["rows"] for run in runs if run["settings"] == settings), [])

    def has(self, **keys: Any) -> bool:
        return any(row.get("complete", True) and all(row.get(k) == v for k, v in keys.items()) for row in self.rows)

    def put(self, row: dict[str, Any], *keys: str) -> None:
        """A row in place of those with the same values of `keys`."""
        self.rows = [r for r in self.rows if any(r.get(k) != row[k] for k in keys)] + [row]
        if self.path:
            timing.save(self.path, self.settings, {}, self.rows)


def recipe_of(name: str) -> str | None:
    """What a preset stands for: a row of another recipe with the same name is out of date."""
    return repr(get_policy(name)) if name in PRESETS else None


class _MovedRope:
    """A model's rotary embedding at positions that lie further from the start."""

    def __init__(self, rope: Callable[..., mx.array], moved: int) -> None:
        self.rope, self.moved = rope, moved

    def __call__(self, x: mx.array, offset: Any = 0, **options: Any) -> mx.array:
        return self.rope(x, offset=offset + self.moved, **options)


@contextmanager
def moved_by(model: Any, n_tokens: int) -> Iterator[None]:
    """Positions further from the start by so many tokens in every attention layer that has its rotary embedding as `rope`."""
    attentions = [module for _, module in model.named_modules() if callable(getattr(module, "rope", None))] if n_tokens else []
    if n_tokens and not attentions:
        raise SystemExit("--moved: expected a model whose attention layers have a rope, got none")
    ropes = [module.rope for module in attentions]
    for module, rope in zip(attentions, ropes, strict=True):
        module.rope = _MovedRope(rope, n_tokens)
    try:
        yield
    finally:
        for module, rope in zip(attentions, ropes, strict=True):
            module.rope = rope


def measure_text(model: Any, tokenizer: Any, text: str, options: argparse.Namespace, file: File, moved: int) -> None:
    tokens = tokenizer.encode(texts.read(text))[options.skip :][: options.tokens]
    if len(tokens) < options.tokens:
        print(f"{text}: {len(tokens)} tokens, fewer than asked for")
    name = Path(text).stem
    windows = {None: None, "on": True, "off": False}[options.windows]
    policies = [get_policy(preset, windows=windows) for preset in known(options.presets)]
    entries = [
        entry
        for entry in contenders(model, policies, stock_bits=options.stock_bits)
        if not file.has(text=name, cache=entry.name, recipe=recipe_of(entry.name))
    ]
    if not entries:
        print(f"{name}: measured already")
        return
    for entry in entries:
        if entry.layers:
            print(entry.layers, flush=True)
    start = time.perf_counter()

    def keep(results: list[ByPosition], complete: bool = False) -> None:
        for result in results:
            row = {"text": name, "recipe": recipe_of(result.cache), "complete": complete, **as_row(result)}
            file.put(row, "text", "cache")
        if results[0].n_tokens and not complete:
            print(f"{name}: {results[0].n_tokens} tokens, {time.perf_counter() - start:.0f} s", flush=True)

    with moved_by(model, moved):
        results = by_position(model, tokens, entries, chunk=options.chunk, at_edge=keep)
    keep(results, complete=True)
    print(f"\n{name}, {len(tokens)} tokens, uncompressed perplexity {results[0].reference:.3f}, "
          f"{time.perf_counter() - start:.0f} s\n{table(results)}\n", flush=True)  # fmt: skip


def measure_passkeys(model: Any, tokenizer: Any, options: argparse.Namespace, file: File) -> None:
    text = texts.read(options.texts[0])
    for context in options.passkeys:
        for n_keys in (1, 4):
            for name in ("none", *known(options.presets)):
                if file.has(context=context, n_keys=n_keys, preset=name, trials=options.trials, recipe=recipe_of(name)):
                    continue
                start = time.perf_counter()
                preset = None if name == "none" else name
                (found,) = passkeys(
                    model, tokenizer, text, [preset], n_keys=n_keys, trials=options.trials, context=context
                )  # fmt: skip
                row = {"context": context, **asdict(found), "recipe": recipe_of(name)}
                file.put(row | {"seconds": round(time.perf_counter() - start, 1)}, "context", "n_keys", "preset")
                print(f"passkeys, {context} tokens, {n_keys} hidden, {name}: {found.found} of {found.trials}, "
                      f"{time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip


def main() -> None:
    options = parser().parse_args()
    if options.device:
        mx.set_default_device(getattr(mx, options.device))
    model, tokenizer = load(fetch_models.resolve(options.model))
    model = for_evaluation(model)
    name = Path(options.model.rstrip("/")).name
    device = "gpu" if mx.default_device() == mx.gpu else "cpu"
    if options.tokens:
        settings = {
            "bench": "by_position", "model": name, "tokens": options.tokens, "chunk": options.chunk, "device": device
        }  # fmt: skip
        if options.skip:
            settings["skip"] = options.skip
        if options.windows:
            settings["windows"] = options.windows
        for moved in options.moved:
            file = File(options.json, settings | ({"moved": moved} if moved else {}))
            if moved:
                print(f"positions moved by {moved}", flush=True)
            for text in options.texts:
                measure_text(model, tokenizer, text, options, file, moved)
    if options.passkeys:
        settings = {"bench": "passkeys", "model": name, "text": Path(options.texts[0]).stem, "device": device}
        measure_passkeys(model, tokenizer, options, File(options.json, settings))


if __name__ == "__main__":
    main()

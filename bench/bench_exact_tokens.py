"""How many first and recent tokens should stay exact: KL divergence by `first` and `tail`, on one model.

    python -m bench exact-tokens --model qwen2.5-coder-0.5b-4bit --tokens 8192 --texts prose,code --json results.json

The text goes through the product's own cache in chunks of 64 tokens, as in `quality --by-position`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import fetch_models
import texts
from bench_by_position import words
from timing import save, table
from tqext.blas import for_evaluation
from tqext.by_position import by_position, contenders
from tqext.models import load
from tqext.presets import get_policy

CHUNK = 64
PAIRS = [(4, 32), (4, 64), (32, 32), (32, 64), (64, 32), (64, 64), (64, 128), (128, 64)]


def pair(text: str) -> tuple[int, int]:
    first, tail = text.split(",")
    return int(first), int(tail)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, a hub id, or a name of fetch-models")
    parser.add_argument("--preset", default="tq33")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--texts", type=words, default=["prose", "code"], help=f"of {', '.join(texts.TEXTS)}, or text files")
    parser.add_argument("--pairs", nargs="+", type=pair, default=PAIRS, help="FIRST,TAIL ...")
    parser.add_argument("--json", type=Path, help="file to add the run to")
    options = parser.parse_args()
    model, tokenizer = load(fetch_models.resolve(options.model))
    model = for_evaluation(model)
    policies = [get_policy(options.preset, first=first, tail=tail) for first, tail in options.pairs]
    rows: list[dict[str, Any]] = []
    for name in options.texts:
        tokens = tokenizer.encode(texts.read(name))[: options.tokens]
        entries = [contenders(model, [policy], stock_bits=())[1] for policy in policies]
        for (first, tail), found in zip(options.pairs, by_position(model, tokens, entries, chunk=CHUNK), strict=True):
            spans = [[span.begin, span.end, span.kl] for span in found.spans]
            rows.append({"text": Path(name).stem, "first": first, "tail": tail, "kl": found.whole.kl, "spans": spans})
            print(f"{Path(name).stem} first {first} tail {tail}: KL {found.whole.kl:.4f}", flush=True)
        if options.json:
            settings = {"bench": "exact_tokens", "model": Path(options.model).name, "preset": options.preset}
            save(options.json, settings | {"tokens": options.tokens, "chunk": CHUNK}, {}, rows)
    print(table(rows, {"text": "", "first": "d", "tail": "d", "kl": ".4f"}))


if __name__ == "__main__":
    main()

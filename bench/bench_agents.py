"""What agents do, with and without compression: tool calls, code that runs, and the acceptance of speculative decoding.

    python -m bench agents --model qwen2.5-coder-1.5b-4bit --draft-model qwen2.5-coder-0.5b-4bit --json results.json

All greedy. Tool calls and code are answered in conversations whose prompt cache is kept from turn to turn, so that what came
before is read from the cache. The code that a model writes is run, in another process, with limits of time and memory, in an
empty folder; that is no sandbox. `tqext eval --agents` does the tool calls alone.
"""

from __future__ import annotations

import os

# A second BLAS thread waits more than it works on products of a few rows. Before NumPy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx

import fetch_models
import texts
from bench_by_position import DEFAULT_PRESETS, File, known, recipe_of, words
from code_tasks import TASKS, Task
from tqext.agents import ROWS, Board, KeptCache, conversations, tool_calls
from tqext.blas import for_evaluation
from tqext.mlx_lm import make_prompt_cache, stock_cache
from tqext.models import load

CODE_TOKENS = 256
RUN_SECONDS = 10
RUN_BYTES = 1 << 30
PARTS = ("tools", "code", "drafts")
LIMITS = "import resource as r; r.setrlimit(r.RLIMIT_AS, ({0}, {0})); r.setrlimit(r.RLIMIT_CPU, ({1}, {1}))\n"


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--model", required=True, help="a folder, a hub id, or a name of fetch-models")
    out.add_argument("--draft-model", help="a smaller model with the same tokens, for speculative decoding")
    out.add_argument("--presets", type=words, default=words(DEFAULT_PRESETS), help="those that this version has are measured")
    out.add_argument("--parts", type=words, default=list(PARTS), help=f"of {', '.join(PARTS)} (default all)")
    out.add_argument("--rows", type=int, default=ROWS, help="records of each table that a tool finds: longer contexts")
    out.add_argument("--conversations", type=int, help="tool calls: only so many (default all)")
    out.add_argument("--turns", type=int, help="tool calls: only so many of each conversation (default all)")
    out.add_argument("--tasks", type=int, help="code: only so many (default all)")
    out.add_argument("--context", type=int, default=2048, help="drafts: tokens of code before what is continued")
    out.add_argument("--draft-prompts", type=int, default=4)
    out.add_argument("--draft-tokens", type=int, default=96, help="to generate after each prompt")
    out.add_argument("--num-draft-tokens", type=int, default=4, help="that are drafted at a time")
    out.add_argument("--text", default="code", help=f"drafts: one of {', '.join(texts.TEXTS)}, or a text file")
    out.add_argument("--device", choices=("cpu", "gpu"), help="default: MLX's own")
    out.add_argument("--json", type=Path, help="file to add the run to")
    return out


# Code


def code_of(answer: str) -> str:
    """The first fenced block of an answer, or all of it."""
    found = re.search(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", answer, re.DOTALL)
    return found[1] if found else answer


def passes(code: str, task: Task, *, seconds: float = RUN_SECONDS) -> bool:
    """Whether a task's assertions hold for some code, in a process of its own."""
    source = f"{code}\n{task.checks}\nprint('all assertions hold')\n"
    if sys.platform != "win32":
        source = LIMITS.format(RUN_BYTES, int(seconds) + 1) + source
    with tempfile.TemporaryDirectory() as folder:
        try:
            command = [sys.executable, "-I", "-c", source]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=seconds, env={}, check=False)
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0 and done.stdout.endswith("all assertions hold\n")


def code_prompt(tokenizer: Any, i: int) -> list[int]:
    """Tokens up to the answer to task `i`; the tasks before it are answered with their solutions."""
    messages = []
    for task in TASKS[:i]:
        messages.append({"role": "user", "content": task.request})
        messages.append({"role": "assistant", "content": f"```python\n{task.solution}```"})
    messages.append({"role": "user", "content": TASKS[i].request})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))


def write_code(model: Any, tokenizer: Any, preset: str | None, n_tasks: int | None) -> tuple[list[str], list[bool], int]:
    """The code of every task, whether it passes, and the tokens of the last prompt."""
    kept, codes, good, context = KeptCache(model, preset), [], [], 0
    for i, task in enumerate(TASKS[:n_tasks]):
        prompt = code_prompt(tokenizer, i)
        answer = kept.answer(tokenizer, prompt, CODE_TOKENS, lambda text: text.count("```") >= 2)
        codes.append(code_of(answer))
        good.append(passes(codes[-1], task))
        context = len(prompt)
    return codes, good, context


# Drafts


def accepted(
    model: Any, draft: Any, tokenizer: Any, preset: str | None, prompts: list[list[int]], options: argparse.Namespace
) -> tuple[list[list[int]], int]:
    """The tokens after every prompt, and how many of them the draft model found."""
    from mlx_lm import stream_generate

    out, drafted = [], 0
    for prompt in prompts:
        caches = [stock_cache(m) if preset is None else make_prompt_cache(m, preset) for m in (model, draft)]
        steps = list(
            stream_generate(
                model, tokenizer, mx.array(prompt), max_tokens=options.draft_tokens, draft_model=draft,
                num_draft_tokens=options.num_draft_tokens, prompt_cache=caches[0] + caches[1], prefill_step_size=2048,
            )
        )  # fmt: skip
        out.append([step.token for step in steps])
        drafted += sum(step.from_draft for step in steps)
    return out, drafted


def draft_prompts(tokenizer: Any, options: argparse.Namespace) -> list[list[int]]:
    tokens = tokenizer.encode(texts.read(options.text))
    n = options.draft_prompts
    stride = (len(tokens) - options.context) // n
    if stride < 1:
        raise SystemExit(f"--text: expected more than {options.context} tokens, got {len(tokens)}")
    return [tokens[i * stride : i * stride + options.context] for i in range(n)]


# Runs


def measured(file: File, presets: list[str], part: str) -> bool:
    """Whether the file holds every row. If not, the uncompressed answers are needed again."""
    done = all(file.has(preset=name, recipe=recipe_of(name)) for name in ("none", *presets))
    if done:
        print(f"{part}: measured already")
    return done


def run_tools(model: Any, tokenizer: Any, presets: list[str], options: argparse.Namespace, settings: dict[str, Any]) -> None:
    n = len(conversations(options.rows)[: options.conversations])
    settings = {"bench": "agents", **settings, "rows": options.rows, "conversations": n, "turns": options.turns}
    file = File(options.json, settings)
    if measured(file, presets, "tools"):
        return
    reference: Board | None = None
    for name in ("none", *presets):
        if name != "none" and file.has(preset=name, recipe=recipe_of(name)):
            continue
        start = time.perf_counter()
        preset = None if name == "none" else name
        board = tool_calls(
            model, tokenizer, preset, reference=reference, rows=options.rows, n_conversations=options.conversations,
            n_turns=options.turns,
        )  # fmt: skip
        reference = reference or board
        seconds = time.perf_counter() - start
        file.put({**board.as_row(), "recipe": recipe_of(name), "seconds": round(seconds, 1)}, "preset")
        print(f"tools   {board}; {seconds:.0f} s", flush=True)


def run_code(model: Any, tokenizer: Any, presets: list[str], options: argparse.Namespace, settings: dict[str, Any]) -> None:
    settings = {"bench": "agents_code", **settings, "tasks": len(TASKS[: options.tasks])}
    file = File(options.json, settings)
    if measured(file, presets, "code"):
        return
    reference: list[str] | None = None
    for name in ("none", *presets):
        if name != "none" and file.has(preset=name, recipe=recipe_of(name)):
            continue
        start = time.perf_counter()
        codes, good, context = write_code(model, tokenizer, None if name == "none" else name, options.tasks)
        reference = reference or codes
        same = sum(a == b for a, b in zip(codes, reference, strict=True))
        seconds = round(time.perf_counter() - start, 1)
        failed = [{"task": i, "code": code} for i, (code, ok) in enumerate(zip(codes, good, strict=True)) if not ok]
        row = {"preset": name, "tasks": len(codes), "pass": sum(good), "same": same, "context": context, "failed": failed}
        file.put({**row, "recipe": recipe_of(name), "seconds": seconds}, "preset")
        print(f"code    {name:<12} {sum(good)} of {len(good)} pass, {same} as uncompressed, up to {context} tokens of context; "
              f"{seconds:.0f} s", flush=True)  # fmt: skip


def run_drafts(model: Any, tokenizer: Any, presets: list[str], options: argparse.Namespace, settings: dict[str, Any]) -> None:
    draft, _ = load(fetch_models.resolve(options.draft_model))
    draft = for_evaluation(draft)
    settings = {
        "bench": "agents_drafts", **settings, "draft_model": Path(options.draft_model.rstrip("/")).name,
        "context": options.context, "prompts": options.draft_prompts, "tokens": options.draft_tokens,
        "num_draft_tokens": options.num_draft_tokens, "text": Path(options.text).stem,
    }  # fmt: skip
    file = File(options.json, settings)
    prompts = draft_prompts(tokenizer, options)
    if measured(file, presets, "drafts"):
        return
    reference: list[list[int]] | None = None
    for name in ("none", *presets):
        if name != "none" and file.has(preset=name, recipe=recipe_of(name)):
            continue
        start = time.perf_counter()
        tokens, drafted = accepted(model, draft, tokenizer, None if name == "none" else name, prompts, options)
        reference = reference or tokens
        n = sum(len(t) for t in tokens)
        same = sum(a == b for a, b in zip(tokens, reference, strict=True))
        row = {"preset": name, "n_tokens": n, "accepted": drafted / n, "tokens_per_pass": n / max(1, n - drafted), "same": same}
        file.put({**row, "recipe": recipe_of(name), "seconds": round(time.perf_counter() - start, 1)}, "preset")
        seconds = time.perf_counter() - start
        print(f"drafts  {name:<12} {drafted / n:.1%} of {n} tokens from the draft model, {row['tokens_per_pass']:.2f} "
              f"tokens a pass, {same} of {len(tokens)} texts as uncompressed; {seconds:.0f} s", flush=True)  # fmt: skip


def main() -> None:
    options = parser().parse_args()
    if unknown := set(options.parts) - set(PARTS):
        raise SystemExit(f"--parts: expected some of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    if options.device:
        mx.set_default_device(getattr(mx, options.device))
    model, tokenizer = load(fetch_models.resolve(options.model))
    model = for_evaluation(model)
    presets = known(options.presets)
    device = "gpu" if mx.default_device() == mx.gpu else "cpu"
    settings = {"model": Path(options.model.rstrip("/")).name, "device": device}
    if not getattr(tokenizer, "chat_template", None):
        print("tools, code: the model has no chat template")
        options.parts = [part for part in options.parts if part == "drafts"]
    for part, run in (("tools", run_tools), ("code", run_code), ("drafts", run_drafts)):
        if part in options.parts and (part != "drafts" or options.draft_model):
            run(model, tokenizer, presets, options, settings)


if __name__ == "__main__":
    main()

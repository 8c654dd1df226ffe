"""`tqext server` under load, compressed beside uncompressed: latency, throughput and memory of the process.

    python bench/bench_server.py --json bench/results/server.json

Clients ask at once and again as soon as they have their answer, each time with a text of its own, and read the stream. The
default model has random weights, small matrices and KV heads of realistic number and size (8 of dimension 128 in 4 layers):
what is measured is the cache. `--model` takes any other. Prompts are short because MLX multiplies matrices slowly on a CPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "vocab_size": 257,
    "tie_word_embeddings": True,
    "eos_token_id": 256,
}
COLUMNS = {
    "kv": "",
    "first s": ".2f",
    "first p90": ".2f",
    "ms per token": ".1f",
    "p90": ".1f",
    "tokens per s": ".1f",
    "MB at rest": ".0f",
    "MB peak": ".0f",
}


def save_model(folder: Path) -> None:
    """Random weights and a tokenizer of one token per byte."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(CONFIG))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))


class Server:
    """A server process, and the largest resident size that a thread saw of it."""

    def __init__(self, model: str, kv: str, options: list[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        port = self.url.rsplit(":", 1)[1]
        command = [sys.executable, "-m", "tqext", "server", "--model", model, "--kv", kv, "--port", port, *options]
        # glibc keeps freed blocks for later unless told to hand them back.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        self.peak = 0
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).read()
                break
            except (urllib.error.URLError, ConnectionError):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the server did not start: {' '.join(command)}") from None
                time.sleep(0.2)
        threading.Thread(target=self._watch, daemon=True).start()

    def resident(self) -> int:
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def _watch(self) -> None:
        while self.process.poll() is None:
            try:
                self.peak = max(self.peak, self.resident())
            except (OSError, IndexError):
                return
            time.sleep(0.02)

    def stream(self, text: str, n_tokens: int) -> list[float]:
        """Seconds from the request to each piece of its answer."""
        body = {"prompt": text, "max_tokens": n_tokens, "temperature": 0.0, "stream": True}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v1/completions", json.dumps(body).encode(), headers)
        start, times = time.perf_counter(), []
        with urllib.request.urlopen(request, timeout=3600) as reply:
            for line in reply:
                if line.startswith(b"data: {"):
                    times.append(time.perf_counter() - start)
        return times

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)


def text(client: int, i: int, n_characters: int) -> str:
    """Begins differently for every request, so that no kept prompt is reused."""
    words = f"{client * 1000 + i} is the number of request {i} of client {client}, and the rest is filler. "
    return (words * (n_characters // len(words) + 1))[:n_characters]


def run(model: str, kv: str, options: argparse.Namespace) -> dict[str, Any]:
    server = Server(model, kv, ["--prompt-cache-size", str(options.kept)])
    try:
        server.stream(text(999, 0, 64), 4)  # loads the model
        at_rest = server.resident()
        server.peak = 0

        def client(number: int) -> list[list[float]]:
            n = options.characters
            return [server.stream(text(number, i, n), options.max_tokens) for i in range(options.requests)]

        start = time.perf_counter()
        with ThreadPoolExecutor(options.clients) as pool:
            answers = [times for each in pool.map(client, range(options.clients)) for times in each]
        seconds = time.perf_counter() - start
    finally:
        server.close()
    first = [times[0] for times in answers]
    between = [b - a for times in answers for a, b in itertools.pairwise(times)]
    deciles = [statistics.quantiles(x, n=10)[-1] for x in (first, between)]
    return {
        "kv": kv,
        "first s": statistics.median(first),
        "first p90": deciles[0],
        "ms per token": statistics.median(between) * 1e3,
        "p90": deciles[1] * 1e3,
        "tokens per s": sum(map(len, answers)) / seconds,
        "MB at rest": at_rest / 1e6,
        "MB peak": server.peak / 1e6,
        "answers": len(answers),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, a hub id or smollm2; default: random weights, as above")
    parser.add_argument("--kv", nargs="+", default=["none", "tq3"])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=2, help="of each client, one after another (default 2)")
    parser.add_argument("--characters", type=int, default=600, help="of each prompt: tokens, with the default model")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--kept", type=int, default=8, help="prompt caches that the server keeps (default 8)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from timing import save, table

    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            save_model(Path(folder))
        rows = [run(options.model or folder, kv, options) for kv in options.kv]
    print(table(rows, COLUMNS))
    print("first: seconds to the first token; MB: resident memory of the server")
    if options.json:
        names = ("clients", "requests", "characters", "max_tokens", "kept")
        settings = {"bench": "server", "model": options.model or "4 layers of 8 KV heads of 128, random weights, fp32"}
        save(options.json, settings | {name: getattr(options, name) for name in names}, {}, rows)


if __name__ == "__main__":
    main()

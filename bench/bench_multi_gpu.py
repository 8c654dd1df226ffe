"""One model on one GPU and on two: its heads split (tensor parallel) or its layers (a pipeline), compressed caches or not.

    python bench/bench_multi_gpu.py --json bench/results/multi_gpu_h100.json
    python bench/bench_multi_gpu.py --device cpu --tiny                       # anywhere, to see that it runs

The bench starts its own ranks, one process for each GPU, and waits for them. Heads are split over NCCL on GPUs. A pipeline
runs over the ring backend, whose messages go through the CPU: NCCL's backend in MLX cannot send from one rank to another. On
the CPU both run over the ring.

The model is mlx-lm's Qwen2 with the shape of Qwen3-8B and random weights: mlx-lm pipelines Qwen2, and not Qwen3. All ranks draw
the same numbers and keep their part. The prompt is run in chunks as mlx-lm runs it; its time is the median of the runs after
the first. Then the caches are filled with random tokens up to each context, and decoding steps are timed as mlx-lm runs them
(the next step is built while the last one is computed); a `waiting` step waits for the one before. Memory is each rank's own,
as MLX counts it: `weights`, `caches`, and the peak of the prompt and of the steps. `error` is the distance of the prompt's last
logits from those of one process, relative to their length; `same` says whether the largest logit is the same one.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.models import qwen2

import bench_cuda
import tqext
from bench_decode_step import PHASES, Run
from shapes import QWEN3_8B
from timing import save, table
from tqext.mlx_lm import stock_cache
from tqext.nn import Q1Linear

SHAPE = {name: value for name, value in QWEN3_8B.items() if name != "head_dim"} | {"model_type": "qwen2"}
TINY = {
    **SHAPE,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
PARTS = ("one", "tensor", "pipeline")
WEIGHTS = ("q1", "fp16")
CHUNK = 2048  # mlx-lm's prefill_step_size
N_RANKS = 2


def make_model(kind: str, shape: dict[str, Any], dtype: mx.Dtype) -> Any:
    """Random weights of a kind, not computed yet: a rank computes its part alone."""
    model = qwen2.Model(qwen2.ModelArgs.from_dict(shape))

    def random(*dims: int) -> mx.array:
        return (mx.random.normal(dims) * 0.02).astype(dtype)

    replaced: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.RMSNorm):
            module.weight = mx.ones(module.weight.shape, dtype=dtype)
        if not isinstance(module, nn.Linear):
            continue
        rows, columns = module.weight.shape
        bias = random(rows) if "bias" in module else None
        new: Any
        if kind == "q1":
            new = Q1Linear(*bench_cuda.one_bit(rows, columns), bias)
        else:
            new = nn.Linear(8, 8, bias=bias is not None)
            new.weight = random(rows, columns)
            if bias is not None:
                new.bias = bias
        replaced.append((name, new))
    model.update_modules(tree_unflatten(replaced))
    model.model.embed_tokens.weight = random(shape["vocab_size"], shape["hidden_size"])
    return model


def make_caches(model: Any, shape: dict[str, Any], name: str, part: str, rank: int) -> list[Any]:
    """Empty caches of this rank's layers and heads; of random weights no balance can be calibrated."""
    if name == "none":
        return list(stock_cache(model))
    heads, dim = shape["num_key_value_heads"], shape["hidden_size"] // shape["num_attention_heads"]
    spread = np.random.default_rng(0).normal(size=(shape["num_hidden_layers"], heads, dim)) * 0.3
    layers = slice(model.model.start_idx, model.model.end_idx)
    own = slice(rank * heads // N_RANKS, (rank + 1) * heads // N_RANKS) if part == "tensor" else slice(None)
    recipe = tqext.get_policy(name).recipe
    return [tqext.TurboQuantKVCache(recipe, balance=mx.exp(mx.array(x.astype(np.float32)))) for x in spread[layers, own]]


def run_prompt(model: Any, tokens: mx.array, caches: list[Any]) -> mx.array:
    """fp32 ``[n_vocabulary]``: the logits of the last token."""
    for begin in range(0, tokens.shape[1], CHUNK):
        logits = model(tokens[:, begin : begin + CHUNK], cache=caches)[0, -1]
        mx.eval(logits, [x for cache in caches for x in cache.state if isinstance(x, mx.array)])
    return logits.astype(mx.float32)


def grow(model: Any, caches: list[Any], context: int, dtype: mx.Dtype) -> None:
    """Random tokens in every layer, up to a context."""
    attention = model.layers[0].self_attn
    dim = attention.k_proj.weight.shape[0] // attention.n_kv_heads
    shape = (1, attention.n_kv_heads, CHUNK * 4, dim)
    k, v = (mx.random.normal(shape).astype(dtype) for _ in range(2))
    for cache in caches:
        while cache.offset < context:
            n = min(shape[2], context - cache.offset)
            cache.update_and_fetch(k[:, :, :n], v[:, :, :n])
            mx.eval([x for x in cache.state if isinstance(x, mx.array)])
    gc.collect()
    mx.clear_cache()


class Rank:
    """One process of a part: measures, and writes what it has after each row."""

    def __init__(self, part: str, folder: Path, options: argparse.Namespace) -> None:
        self.part, self.folder, self.options = part, folder, options
        self.group = None if part == "one" else mx.distributed.init(strict=True, backend=backend(part, options))
        self.rank = 0 if self.group is None else self.group.rank()
        if self.group is not None and self.group.size() != N_RANKS:
            raise SystemExit(f"bench_multi_gpu: expected {N_RANKS} ranks, got {self.group.size()}")
        self.shape = {**(TINY if options.tiny else SHAPE), **({"num_hidden_layers": options.layers} if options.layers else {})}
        self.dtype = mx.float16 if options.device == "gpu" else mx.float32
        self.rows: list[dict[str, Any]] = []

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.group is not None:
            mx.eval(mx.distributed.all_sum(mx.array(1.0), group=self.group))
        mx.synchronize()

    def run(self) -> None:
        for kind in self.options.weights:
            mx.random.seed(0)
            model = make_model(kind, self.shape, self.dtype)
            if self.part == "tensor":
                model.shard(self.group)
            elif self.part == "pipeline":
                model.model.pipeline(self.group)
            for layer in model.layers:
                mx.eval(layer.parameters())
            mx.eval(model.parameters())
            mx.clear_cache()
            print(f"{self.part} {kind}: {mx.get_active_memory() / 1e9:.2f} GB", flush=True)
            for name in self.options.caches:
                self.measure(model, kind, name)
                gc.collect()
                mx.clear_cache()
            del model
            gc.collect()
            mx.clear_cache()

    def measure(self, model: Any, kind: str, name: str) -> None:
        common = {"part": self.part, "weights": kind, "cache": "uncompressed" if name == "none" else name}
        weights = mx.get_active_memory() / 1e9
        n = self.options.prompt
        tokens = mx.array(np.random.default_rng(1).integers(0, self.shape["vocab_size"], (1, n)))
        times: list[float] = []
        for _ in range(1 + self.options.repeats):
            caches = make_caches(model, self.shape, name, self.part, self.rank)
            mx.reset_peak_memory()
            self.wait()
            begin = time.perf_counter()
            logits = run_prompt(model, tokens, caches)
            mx.eval(logits)
            self.wait()
            times.append((time.perf_counter() - begin) * 1e3)
        del times[0]  # kernels are compiled and chosen
        peak = mx.get_peak_memory() / 1e9
        found = self.compared(np.array(logits), f"{kind}-{name}")
        row = {**common, "tokens": n, "prompt ms": statistics.median(times), **found}
        self.add({**row, "weights GB": weights, "peak GB": peak})
        for context in self.options.contexts:
            grow(model, caches, context, self.dtype)
            own = sum(x.nbytes for x in caches) / 1e9
            run = Run(model, caches, 1)
            mx.reset_peak_memory()
            self.wait()
            run.pipelined(8)
            run.times["pipelined"] = []
            run.pipelined(self.options.steps)
            ms, peak = statistics.median(run.times["pipelined"]), mx.get_peak_memory() / 1e9
            run.split((self.options.steps + 1) // 2)
            alone = statistics.median(sum(phases) for phases in zip(*(run.times[name] for name in PHASES), strict=True))
            row = {**common, "context": context, "step ms": ms, "tokens/s": 1e3 / ms, "waiting step ms": alone}
            self.add({**row, "weights GB": weights, "caches GB": own, "peak GB": peak})

    def compared(self, logits: np.ndarray, name: str) -> dict[str, Any]:
        """What differs from one process, which is measured first."""
        file = self.folder / f"logits-{name}.npy"
        if self.part == "one":
            np.save(file, logits)
        if not np.isfinite(logits).all():
            return {"error": None, "same": False}
        if self.part == "one" or not file.exists():
            return {}
        expected = np.load(file)
        error = float(np.linalg.norm(logits - expected) / np.linalg.norm(expected))
        return {"error": error, "same": bool(logits.argmax() == expected.argmax())}

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        new = self.folder / f"{self.part}-{self.rank}.new"
        new.write_text(json.dumps(self.rows))
        new.replace(self.folder / f"{self.part}-{self.rank}.json")
        if self.rank == 0:
            print({key: round(x, 4) if isinstance(x, float) else x for key, x in row.items()}, flush=True)


# The ranks


def backend(part: str, options: argparse.Namespace) -> str:
    return "nccl" if part == "tensor" and options.device == "gpu" else "ring"


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def environments(part: str, folder: Path, options: argparse.Namespace) -> list[dict[str, str]]:
    """What mlx.launch would set for each rank."""
    if part == "one":
        return [{"CUDA_VISIBLE_DEVICES": "0"}]
    ports = free_ports(N_RANKS)
    if backend(part, options) == "nccl":
        common = {"NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": str(ports[0]), "MLX_WORLD_SIZE": str(N_RANKS)}
    else:
        hosts = folder / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
        common = {"MLX_HOSTFILE": str(hosts)}
    return [{**common, "MLX_RANK": str(rank), "CUDA_VISIBLE_DEVICES": str(rank)} for rank in range(N_RANKS)]


def launch(part: str, folder: Path, options: argparse.Namespace) -> bool:
    """Run the ranks of a part to their end; whether all of them were well. One that fails ends the others."""
    command = [sys.executable, os.path.abspath(__file__), *sys.argv[1:], "--rank-of", part, "--folder", str(folder)]
    processes, logs = [], []
    for rank, own in enumerate(environments(part, folder, options)):
        logs.append((folder / f"{part}-{rank}.txt").open("w+"))
        inherited = {name: value for name, value in os.environ.items() if name not in ("MLX_RANK", "MLX_HOSTFILE")}
        env = {"NCCL_DEBUG": "WARN", "PYTHONUNBUFFERED": "1", **inherited, **own}
        processes.append(subprocess.Popen(command, env=env, stdout=logs[-1], stderr=subprocess.STDOUT))
    deadline = time.monotonic() + options.seconds
    why = ""
    while not why and any(process.poll() is None for process in processes):
        if time.monotonic() > deadline:
            why = f"ended after {options.seconds:.0f} s"
        elif any(process.poll() for process in processes):
            time.sleep(2)  # the others may say why, too
            why = "a rank failed"
        time.sleep(0.1)
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()
    well = not any(process.returncode for process in processes)
    for rank, log in enumerate(logs):
        log.seek(0)
        text = log.read()
        log.close()
        if not well or rank == 0:
            print(f"-- {part}, rank {rank}, exit status {processes[rank].returncode} {why}\n{text.strip()[-4000:]}", flush=True)
    return well


MEMORY = ("weights GB", "caches GB", "peak GB")


def merged(part: str, folder: Path) -> list[dict[str, Any]]:
    """The rows of rank 0, with what memory every rank used."""
    files = [folder / f"{part}-{rank}.json" for rank in range(1 if part == "one" else N_RANKS)]
    if not all(file.exists() for file in files):
        return []
    rows = []
    for of_ranks in zip(*(json.loads(file.read_text()) for file in files), strict=False):
        memory = {name: [row[name] for row in of_ranks] for name in MEMORY if name in of_ranks[0]}
        rows.append({**of_ranks[0], **memory})
    return rows


def with_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`times`: how much faster than one process with the same weights and cache."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in ("weights", "cache", "tokens", "context"))

    def ms(row: dict[str, Any]) -> float:
        return float(row["prompt ms"] if "prompt ms" in row else row["step ms"])

    alone = {key(row): ms(row) for row in rows if row["part"] == "one"}
    return [{**row, "times": alone[key(row)] / ms(row)} if key(row) in alone else row for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="gpu")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--weights", nargs="+", default=list(WEIGHTS), choices=WEIGHTS)
    parser.add_argument("--caches", nargs="+", default=["none", "tq3"], help="none, or presets")
    parser.add_argument("--prompt", type=int, default=8192, help="tokens of the prompt")
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=2, help="runs of the prompt that are timed")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on any device")
    parser.add_argument("--seconds", type=float, default=120, help="after which the ranks of a part are ended")
    parser.add_argument("--json", type=Path, help="file to add the run to")
    parser.add_argument("--rank-of", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "gpu" and not mx.is_available(mx.gpu):
        raise SystemExit("bench_multi_gpu: expected GPUs, got none (--device cpu --tiny runs anywhere)")
    mx.set_default_device(mx.cpu if options.device == "cpu" else mx.gpu)
    if options.rank_of:
        tqext.mlx_lm.hook()
        Rank(options.rank_of, options.folder, options).run()
        return
    rows: list[dict[str, Any]] = []
    failed = []
    chosen = {name: getattr(options, name) for name in ("device", "parts", "weights", "caches", "prompt", "contexts", "steps")}
    shape = TINY if options.tiny else SHAPE
    chosen["layers"] = options.layers or shape["num_hidden_layers"]
    with tempfile.TemporaryDirectory() as name:
        for part in options.parts:
            if not launch(part, Path(name), options):
                failed.append(part)
            rows = with_times([*rows, *merged(part, Path(name))])
            if options.json:  # a run that is cut off keeps what it has
                measured = {"ranks": N_RANKS, "tensor": backend("tensor", options), "pipeline": "ring", "failed": failed}
                save(options.json, {"bench": "multi-gpu", **chosen, "tiny": options.tiny}, measured, rows)
    shown = [{**row, **{name: " + ".join(f"{x:.2f}" for x in row[name]) for name in MEMORY if name in row}} for row in rows]
    columns = {"part": "", "weights": "", "cache": "", "tokens": "d", "prompt ms": ".1f", "context": "d", "step ms": ".2f"}
    columns["waiting step ms"] = ".2f"
    print(table(shown, {**columns, "tokens/s": ".1f", "times": ".2f", **dict.fromkeys(MEMORY, ""), "error": ".1e"}))
    if failed:
        raise SystemExit(f"bench_multi_gpu: {', '.join(failed)} failed")


if __name__ == "__main__":
    main()

"""Tables and plots of the documentation, from the JSON files under bench/results/.

    python -m bench report

Writes docs/generated/*.md and docs/generated/*.{png,svg}. A figure exists only where a file under bench/results/ holds it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
OUT = ROOT / "docs" / "generated"

Rows = list[dict[str, Any]]


def runs(bench: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(machine, run) of every recorded run of a bench."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        data = json.loads(path.read_text())
        found += [(data["machine"], run) for run in data.get("runs", []) if run["settings"].get("bench") == bench]
    return found


def quality() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("quality*.json"))]


def markdown(rows: Rows, columns: dict[str, str]) -> str:
    """columns: key to format specification."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [format(row[key], spec) if row.get(key) is not None else "" for key, spec in columns.items()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def source(machine: dict[str, Any], run: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items())
    name = machine.get("gpu") or f"{machine['cpu']}, {machine['processors']} processors"
    found = run["measured"]
    load = f", load average {found['load_average']}" if found["load_average"] is not None else ""
    note = f"; {found['note']}" if "note" in found else ""
    return f"{name}{load}{note}; {versions}; `{run['command']}`"


def save(figure: Any, name: str) -> str:
    for kind in ("png", "svg"):
        figure.savefig(OUT / f"{name}.{kind}", bbox_inches="tight", dpi=150)
    plt.close(figure)
    return f"![{name}](generated/{name}.svg)"


def loglog(series: dict[str, list[tuple[float, float]]], x: str, y: str, name: str) -> str:
    figure, axes = plt.subplots(figsize=(6.5, 4))
    for label, points in series.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    return save(figure, name)


def attention() -> str:
    parts = []
    for i, (machine, run) in enumerate(runs("turboquant_attention")):
        s = run["settings"]
        rows: Rows = [{**r, "attention": f"{r['attention']}, {r['query']} query"} for r in run["rows"]]
        title = (
            f"{s['n_q_heads']} query heads, {s['n_kv_heads']} KV heads, head dimension {s['head_dim']}, {s['n_queries']} quer"
        )
        title += f"{'y' if s['n_queries'] == 1 else 'ies'}, {s['threads']} threads, {s['isa']}"
        parts.append(
            f"### {title}\n\n{source(machine, run)}; measured read bandwidth {run['measured']['read_bandwidth_gbs']} GB/s\n"
        )
        lengths = {r["n_keys"] for r in rows}
        if len(lengths) > 2:
            series: dict[str, list[tuple[float, float]]] = {}
            shares: dict[str, list[tuple[float, float]]] = {}
            for r in rows:
                series.setdefault(r["attention"], []).append((r["n_keys"], r["ms"]))
                shares.setdefault(r["attention"], []).append((r["n_keys"], r["share"]))
            parts.append(loglog(series, "keys", "ms per call", f"attention_{i}") + "\n")
            parts.append(loglog(shares, "keys", "share of the read bandwidth", f"share_{i}") + "\n")
        columns = {"attention": "", "n_keys": "d", "ms": ".3f", "spread": ".0f", "MB": ".1f", "GB/s": ".2f", "share": ".1%",
                   "times": ".1f", "times least": ".1f"}  # fmt: skip
        note = (
            "spread in percent; times: MLX's attention with the same query type over this line, of the medians and least times"
        )
        parts.append(f"{markdown(rows, columns)}\n\n{note}\n")
    return "\n".join(parts)


def overview() -> None:
    """The README's picture: time of an attention call and memory of the cache over the context."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    names = {
        ("tqext", "fp32"): "tqext, fp32 query",
        ("tqext", "fp16"): "tqext, fp16 query",
        ("mx.fast", "fp32"): "MLX, fp32",
        ("mx.fast", "fp16"): "MLX, fp16",
        ("mlx-lm 4 bit", "fp32"): "mlx-lm, 4 bits",
    }
    _, run = max(runs("turboquant_attention"), key=lambda found: len({r["n_keys"] for r in found[1]["rows"]}))
    for (attention, query), label in names.items():
        points = [(r["n_keys"], r["ms"]) for r in run["rows"] if (r["attention"], r["query"]) == (attention, query)]
        left.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    left.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="ms per attention call", title="Time, Linux CPU")
    _, run = runs("memory")[0]
    for cache in ("fp16", "mlx-lm 4 bits", "tq3"):
        points = [(r["n_tokens"], r["resident"] / 1e6) for r in run["rows"] if r["cache"] == cache]
        right.plot(*zip(*sorted(points), strict=True), marker="o", label=cache)
    layers = run["settings"]["layers"]
    right.set(xlabel="tokens of context", ylabel=f"resident MB of {layers} layers", ylim=(0, None), title="Memory of the cache")
    for axes in (left, right):
        axes.grid(True, alpha=0.3)
        axes.legend(fontsize=8)
    save(figure, "overview")


def memory() -> str:
    parts = []
    for i, (machine, run) in enumerate(runs("memory")):
        series: dict[str, list[tuple[float, float]]] = {}
        for r in run["rows"]:
            series.setdefault(r["cache"], []).append((r["n_tokens"], r["resident"] / 1e6))
        plot = loglog(series, "tokens", "resident MB of 4 layers", f"memory_{i}")
        table = markdown(run["rows"], {"cache": "", "n_tokens": "d", "bytes": ".0f", "stored": ".0f", "peak MB": ".0f"})
        note = "bytes: resident, stored: the cache's own count; per token, layer and KV head"
        parts.append(f"{source(machine, run)}\n\n{plot}\n\n{table}\n\n{note}\n")
    return "\n".join(parts)


QUALITY_COLUMNS = {"preset": "", "bits_per_element": ".2f", "ratio": ".3f", "kl": ".3f", "kl_p99": ".2f", "top1": ".1%"}


def quality_table(data: dict[str, Any], rows: Rows) -> str:
    texts = f"{len(data['texts'])} windows of {data['window']} tokens ({', '.join(data['texts'])})"
    return f"{data['model']}; {texts}; {data['machine']}; `{data['command']}`\n\n{markdown(rows, QUALITY_COLUMNS)}\n"


def passkey_table(data: dict[str, Any]) -> str:
    rows: Rows = data.get("passkeys", [])
    return markdown(rows, dict.fromkeys(rows[0], "")) + "\n" if rows else ""


def pareto(data: dict[str, Any], name: str) -> str:
    figure, axes = plt.subplots(figsize=(6.5, 4))
    for r in data["quality"]:
        axes.scatter(r["bits_per_element"], r["kl"], marker="s" if r["preset"].startswith("mlx-lm") else "o")
        axes.annotate(r["preset"], (r["bits_per_element"], r["kl"]), fontsize=7, xytext=(4, 4), textcoords="offset points")
    axes.set(yscale="log", xlabel="bits per element of a coded token", ylabel="mean KL to the uncompressed cache (nats)")
    axes.grid(True, which="both", alpha=0.3)
    return save(figure, name)


def peers() -> str:
    parts = []
    for machine, run in runs("peers"):
        columns = {"name": "", "perplexity": ".2f", "kl": ".3f", "top1": ".1%", "bytes_per_token_layer_head": ".0f",
                   "decode_ms": ".1f", "max_rss_mb": ".0f", "skipped": ""}  # fmt: skip
        parts.append(f"{source(machine, run)}\n\n{markdown(run['rows'], columns)}\n")
    return "\n".join(parts)


CUDA = {
    "Attention": ("cuda_attention", {"KV heads": "d", "keys": "d", "tail": "d", "us": ".0f", "spread": ".0f", "share": ".0%",
                  "fp16 us": ".0f", "times": ".2f", "times, not waiting": ".2f", "mlx-lm 4 bits us": ".0f",
                  "FlashAttention us": ".0f"}),
    "Presets": ("cuda_presets", {"batch": "d", "KV heads": "d", "keys": "d", "preset": "", "bytes per token": ".1f",
                "us": ".1f", "spread": ".0f", "GB/s": ".0f", "share": ".0%", "time of tq3 without means": ".2f"}),
    "Scores alone": ("cuda_scores", {"KV heads": "d", "keys": "d", "us": ".0f", "fp32 us": ".0f", "times": ".1f"}),
    "1-bit weights": ("cuda_q1", {"rows": "", "columns": "d", "rows of x": "d", "us": ".1f", "spread": ".0f", "GB/s": ".0f",
                      "share": ".0%", "fp16 us": ".0f", "times": ".1f"}),
    "A model of the shape of Qwen3-8B": ("cuda_model", {"weights": "", "batch": "d", "context": "d", "cache": "",
                                         "tokens/s": ".0f", "peak GB": ".1f", "times": ".2f", "failed": ""}),
    "The host's part of a call": ("cuda_host", {"KV heads": "d", "keys": "d", "tail": "d", "us": ".1f", "host us": ".1f",
                                  "fp16 us": ".1f", "fp16 host us": ".1f"}),
    "Profile": ("cuda_profile", {"kernel": "", "us": ".1f", "MB read": ".0f", "DRAM throughput %": ".0f",
                "instructions per cycle and multiprocessor": ".2f", "ALU pipe %": ".0f", "warps active %": ".0f",
                "registers": ".0f"}),
}  # fmt: skip


def cuda() -> str:
    parts = []
    for title, (bench, columns) in CUDA.items():
        parts.append(f"### {title}\n")
        for machine, run in runs(bench):
            copy = run["measured"].get("copy_gbs")
            copied = f"; MLX copies {copy} GB/s" if copy else ""
            if bench == "cuda_attention":
                by_heads: dict[str, list[tuple[float, float]]] = {}
                for r in run["rows"]:
                    if not r["tail"]:
                        by_heads.setdefault(f"{r['KV heads']} KV heads", []).append((r["keys"], r["share"]))
                parts.append(
                    loglog(by_heads, "keys", "share of the copy bandwidth", f"share_{machine['gpu'].split()[1]}") + "\n"
                )
            parts.append(f"{source(machine, run)}{copied}\n\n{markdown(run['rows'], columns)}\n")
    return "\n".join(parts)


def other(bench: str) -> str:
    """A bench whose rows are plain tables."""
    parts = []
    for machine, run in runs(bench):
        keys = dict.fromkeys(key for row in run["rows"] for key in row)
        rows = [{k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items()} for row in run["rows"]]
        parts.append(f"{source(machine, run)}\n\n{markdown(rows, dict.fromkeys(keys, ''))}\n")
    return "\n".join(parts)


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    overview()
    recipe, guide = "", ""
    for i, data in enumerate(quality()):
        by_name = {r["preset"]: r for r in data["quality"]}
        steps = [by_name[n] for n in ("tq3-plain", "tq3, no tail", "tq3", "tq3, tail 128") if n in by_name]
        recipe += quality_table(data, steps)
        guide += quality_table(data, data["quality"]) + "\n" + pareto(data, f"quality_{i}") + "\n\n" + passkey_table(data)
    sections = {
        "Attention": attention(),
        "Threads": other("threads"),
        "Memory": memory(),
        "Memory of a prompt": other("prompt_memory"),
        "Beside other packages": peers(),
        "1-bit matrices": other("q1_matmul"),
        "An 8B-shaped 1-bit model": other("bonsai_shape"),
        "Generation after a long context": other("decode"),
        "Large key biases": other("key_bias"),
        "Serving": other("server"),
    }
    for name, text in (
        ("recipe.md", recipe),
        ("quality.md", guide),
        ("cuda.md", cuda()),
        ("measurements.md", "\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text)),
    ):
        (OUT / name).write_text(text.rstrip() + "\n")
        print(OUT / name)


if __name__ == "__main__":
    main()

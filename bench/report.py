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

# One colour for one thing, in every figure and on the server's page: blues for tqext, greys for the uncompressed, warm ones for
# mlx-lm's quantised caches.
COLOURS = {
    "tqext": "#1f6fb4",
    "tq3": "#1f6fb4",
    "tq33": "#0b3c6f",
    "tq4": "#36a2a2",
    "tq2": "#8fc1ea",
    "MLX": "#777777",
    "mx.fast": "#777777",
    "fp16": "#777777",
    "fp32": "#777777",
    "uncompressed": "#777777",
    "mlx-lm 3": "#b2182b",
    "mlx-lm 4": "#e08214",
    "mlx-lm 8": "#b8a200",
    "torch": "#7a4fa3",
    "PyTorch": "#7a4fa3",
}
STYLES = {"fp32": "-", "fp16": "--", "bf16": ":"}
# Sizes of one thing, from small to large.
SHADES = ("#c6dbef", "#9ecae1", "#6baed6", "#3182bd", "#08519c", "#08306b")


def colour(label: str) -> str:
    """The colour of what a label names; a KeyError names a thing that has none yet."""
    found = [name for name in COLOURS if label == name or label.startswith((f"{name} ", f"{name},", f"{name}-"))]
    if not found:
        raise KeyError(f"report.COLOURS: no colour for {label!r}")
    return COLOURS[max(found, key=len)]


def legend_beside(axes: Any) -> None:
    """Off the curves."""
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, frameon=False)


def legend_below(axes: Any, columns: int) -> None:
    axes.legend(fontsize=10, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncol=columns, frameon=False)


def runs(bench: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(machine, run) of every recorded run of a bench."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        data = json.loads(path.read_text())
        found += [(data["machine"], run) for run in data.get("runs", []) if run["settings"].get("bench") == bench]
    return found


def quality() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("quality*.json"))]


def markdown(rows: Rows, columns: dict[str, str], names: dict[str, str] | None = None) -> str:
    """columns: key to format specification; names: key to heading, where that is another."""
    headings = [(names or {}).get(key, key) for key in columns]
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(columns)]
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


def save(figure: Any, name: str, alt: str) -> str:
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        figure.savefig(OUT / f"{name}.{kind}", bbox_inches="tight", dpi=150, metadata=metadata)
    plt.close(figure)
    return f"![{alt}](generated/{name}.svg)"


def loglog(series: dict[str, list[tuple[float, float]]], x: str, y: str, name: str, alt: str, shades: bool = False) -> str:
    """Curves by label; `shades` for sizes of one thing instead of different things."""
    figure, axes = plt.subplots(figsize=(6.5, 4))
    for i, (label, points) in enumerate(series.items()):
        line = STYLES.get(label.removesuffix(" query").rpartition(" ")[2], "-")
        drawn = SHADES[i - len(series)] if shades else colour(label)
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label, color=drawn, linestyle=line)
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    axes.grid(True, which="both", alpha=0.3)
    legend_beside(axes)
    return save(figure, name, alt)


def attention() -> str:
    parts = []
    for i, (machine, run) in enumerate(runs("turboquant_attention")):
        s = run["settings"]
        rows: Rows = [{**r, "attention": f"{r['attention']}, {r['query']} query"} for r in run["rows"]]
        title = (
            f"{s['n_q_heads']} query heads, {s['n_kv_heads']} KV heads, head dimension {s['head_dim']}, {s['n_queries']} quer"
        )
        n_threads = f"{s['threads']} thread{'' if s['threads'] == 1 else 's'}"
        title += f"{'y' if s['n_queries'] == 1 else 'ies'}, {n_threads}, {s['isa']}"
        if s.get("processor_time"):
            title += ", processor time"
        bandwidth = run["measured"].get("read_bandwidth_gbs")
        reads = f"; measured read bandwidth {bandwidth} GB/s" if bandwidth else ""
        parts.append(f"### {title}\n\n{source(machine, run)}{reads}\n")
        lengths = {r["n_keys"] for r in rows}
        if len(lengths) > 2:
            series: dict[str, list[tuple[float, float]]] = {}
            shares: dict[str, list[tuple[float, float]]] = {}
            for r in rows:
                series.setdefault(r["attention"], []).append((r["n_keys"], r["ms"]))
                if r["share"] is not None:
                    shares.setdefault(r["attention"], []).append((r["n_keys"], r["share"]))
            context = "cached tokens (keys) of the call"
            alt = "Time of an attention call over the number of cached tokens"
            parts.append(loglog(series, context, "ms per call", f"attention_{i}", alt) + "\n")
            share = "bytes read per second,\nas a share of the measured bandwidth"
            alt = "Share of the memory bandwidth that an attention call reaches, over the number of cached tokens"
            if shares:
                parts.append(loglog(shares, context, share, f"share_{i}", alt) + "\n")
        columns = {"attention": "", "n_keys": "d", "ms": ".3f", "spread": ".0f", "MB": ".1f", "GB/s": ".2f", "share": ".1%",
                   "times": ".1f", "times least": ".1f"}  # fmt: skip
        note = (
            "spread in percent; times: MLX's attention with the same query type over this line, of the medians and least times"
        )
        if any(r.get("times torch") is not None for r in rows):
            columns["times torch"] = ".1f"
            note += "; times torch: PyTorch with fp32, or with bf16 for both 16-bit types, over this line, of the medians"
        parts.append(f"{markdown(rows, columns)}\n\n{note}\n")
    return "\n".join(parts)


def overview() -> None:
    """The README's picture: time of an attention call and memory of the cache over the context."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    names = {
        ("tqext", "fp32"): "tqext, fp32",
        ("tqext", "fp16"): "tqext, fp16",
        ("mx.fast", "fp32"): "MLX, fp32",
        ("mx.fast", "fp16"): "MLX, fp16",
        ("mlx-lm 4 bit", "fp32"): "mlx-lm 4 bits, fp32",
    }
    _, run = max(runs("turboquant_attention"), key=lambda found: len({r["n_keys"] for r in found[1]["rows"]}))
    times = {key: {r["n_keys"]: r["ms"] for r in run["rows"] if (r["attention"], r["query"]) == key} for key in names}
    for key, label in names.items():
        points = sorted(times[key].items())
        left.plot(*zip(*points, strict=True), marker="o", label=label, color=colour(label), linestyle=STYLES[key[1]])
    at = 16384
    slow, fast = times["mx.fast", "fp32"][at], times["tqext", "fp32"][at]
    between(left, at, fast, slow, f"{slow / fast:.0f} ×", (slow * fast) ** 0.5)
    left.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="ms per attention call", title="Time, Linux CPU")
    _, run = runs("memory")[0]
    resident: dict[str, dict[int, float]] = {}
    for r in run["rows"]:
        resident.setdefault(r["cache"], {})[r["n_tokens"]] = r["resident"] / 1e6
    for cache in ("fp16", "mlx-lm 4 bits", "tq3"):
        label = {"fp16": "MLX, fp16", "tq3": "tqext, tq3"}.get(cache, cache)
        points, line = sorted(resident[cache].items()), STYLES.get(cache, "-")
        right.plot(*zip(*points, strict=True), marker="o", label=label, color=colour(label), linestyle=line)
    last = max(resident["tq3"])
    large, small = resident["fp16"][last], resident["tq3"][last]
    between(right, last, small, large, f"{large / small:.1f} ×", (large + small) / 2)
    layers = run["settings"]["layers"]
    right.set(xlabel="tokens of context", ylabel=f"resident MB of {layers} layers", ylim=(0, None), title="Memory of the cache")
    for axes in (left, right):
        axes.grid(True, alpha=0.3)
        legend_below(axes, 3)
    save(figure, "overview", "")


def between(axes: Any, x: float, low: float, high: float, text: str, middle: float) -> None:
    """Marks the distance of two curves."""
    axes.annotate("", (x, low), (x, high), arrowprops={"arrowstyle": "<->", "color": "black", "shrinkA": 5, "shrinkB": 5})
    axes.annotate(text, (x, middle), xytext=(-6, 0), textcoords="offset points", ha="right", va="center", fontsize=12)


def memory() -> str:
    parts = []
    for i, (machine, run) in enumerate(runs("memory")):
        series: dict[str, list[tuple[float, float]]] = {}
        for r in run["rows"]:
            series.setdefault(r["cache"], []).append((r["n_tokens"], r["resident"] / 1e6))
        alt = "Resident memory of the cache of four layers over its tokens"
        plot = loglog(series, "tokens in the cache", "resident MB of 4 layers", f"memory_{i}", alt)
        table = markdown(run["rows"], {"cache": "", "n_tokens": "d", "bytes": ".0f", "stored": ".0f", "peak MB": ".0f"})
        note = "bytes: resident, stored: the cache's own count; per token, layer and KV head"
        parts.append(f"{source(machine, run)}\n\n{plot}\n\n{table}\n\n{note}\n")
    return "\n".join(parts)


QUALITY_COLUMNS = {"preset": "", "bits_per_element": ".2f", "ratio": ".3f", "kl": ".3f", "kl_p99": ".2f", "top1": ".1%"}
QUALITY_NAMES = {"bits_per_element": "bits per element", "ratio": "perplexity ×", "kl": "KL", "kl_p99": "KL, 99th percentile",
                 "top1": "same first choice"}  # fmt: skip


def quality_table(data: dict[str, Any], rows: Rows) -> str:
    texts = f"{len(data['texts'])} windows of {data['window']} tokens ({', '.join(data['texts'])})"
    table = markdown(rows, QUALITY_COLUMNS, QUALITY_NAMES)
    return f"{data['model']}; {texts}; {data['machine']}; `{data['command']}`\n\n{table}\n"


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
    return save(figure, name, "Divergence from the uncompressed cache over the bits of a coded element")


def peers() -> str:
    parts = []
    for machine, run in runs("peers"):
        columns = {"name": "", "perplexity": ".2f", "kl": ".3f", "top1": ".1%", "bytes_per_token_layer_head": ".0f",
                   "decode_ms": ".1f", "max_rss_mb": ".0f", "skipped": ""}  # fmt: skip
        names = {"kl": "KL", "top1": "same first choice", "bytes_per_token_layer_head": "bytes per token, layer and KV head",
                 "decode_ms": "ms per token", "max_rss_mb": "peak MB"}  # fmt: skip
        parts.append(f"{source(machine, run)}\n\n{markdown(run['rows'], columns, names)}\n")
    return "\n".join(parts)


CUDA = {
    "Attention": ("cuda_attention", {"KV heads": "d", "keys": "d", "tail": "d", "us": ".0f", "spread": ".0f", "share": ".0%",
                  "fp16 us": ".0f", "times": ".2f", "times, not waiting": ".2f", "mlx-lm 4 bits us": ".0f",
                  "FlashAttention us": ".0f"}),
    "Presets": ("cuda_presets", {"batch": "d", "KV heads": "d", "keys": "d", "preset": "", "bytes per token": ".1f",
                "us": ".1f", "spread": ".0f", "GB/s": ".0f", "share": ".0%", "time of tq3 without means": ".2f"}),
    "Attention of many query tokens": ("prompts_attention", {"preset": "", "keys": "d", "queries": "d", "us": ".0f",
                                       "spread %": ".1f", "TFLOP/s": ".0f", "uncompressed us": ".0f", "times": ".2f"}),
    "Prompts": ("prompts_prompt", {"cache": "", "tokens": "d", "chunk": "d", "seconds": ".2f", "times": ".2f",
                "build s": ".2f", "encode s": ".2f", "wait s": ".2f", "peak GB": ".1f", "more GB": ".1f", "cache GB": ".2f"}),
    "Chat turns": ("prompts_turns", {"cache": "", "history": "d", "tokens": "d", "first ms": ".0f", "ms": ".0f",
                   "most ms": ".0f", "times": ".2f", "build ms": ".1f", "encode ms": ".1f", "wait ms": ".1f"}),
    "Shapes of today's models": ("cuda_shapes", {"head dim": "d", "query heads per KV head": "d", "KV heads": "d", "batch": "d",
                                 "keys": "d", "queries": "d", "us": ".0f", "spread": ".0f", "share": ".0%", "fp16 us": ".0f",
                                 "times": ".2f"}),
    "A list of tokens": ("cuda_lists", {"batch": "d", "KV heads": "d", "keys": "d", "listed": "d", "us": ".0f", "spread": ".0f",
                                        "us, one list for all heads": ".0f", "all keys us": ".0f", "times": ".1f",
                                        "us of as many keys": ".0f"}),
    "Scores alone": ("cuda_scores", {"KV heads": "d", "keys": "d", "us": ".0f", "fp32 us": ".0f", "times": ".1f"}),
    "1-bit weights": ("cuda_q1", {"rows": "", "columns": "d", "rows of x": "d", "us": ".1f", "spread": ".0f", "GB/s": ".0f",
                      "share": ".0%", "fp16 us": ".0f", "times": ".1f"}),
    "Ternary weights": ("cuda_ternary", {"rows": "d", "columns": "d", "rows of x": "d", "type": "", "us": ".1f",
                        "spread": ".0f", "GB/s": ".0f", "share": ".0%", "affine us": ".1f", "decoded us": ".0f",
                        "kernel us": ".0f", "fp16 us": ".0f"}),
    "A model of the shape of Qwen3-8B": ("cuda_model", {"weights": "", "batch": "d", "context": "d", "cache": "",
                                         "tokens/s": ".0f", "peak GB": ".1f", "times": ".2f", "failed": ""}),
    "Whole steps of that model": ("decode_sweep", {"weights": "", "batch": "d", "context": "d", "cache": "", "ms": ".2f",
                                  "tokens/s": ".0f", "times": ".2f", "cache GB": ".2f"}),
    "The host's part of a call": ("cuda_host", {"KV heads": "d", "keys": "d", "tail": "d", "us": ".1f", "host us": ".1f",
                                  "fp16 us": ".1f", "fp16 host us": ".1f"}),
    "Profile": ("cuda_profile", {"kernel": "", "us": ".1f", "MB read": ".0f", "DRAM throughput %": ".0f",
                "instructions per cycle and multiprocessor": ".2f", "ALU pipe %": ".0f", "warps active %": ".0f",
                "registers": ".0f"}),
}  # fmt: skip


def cuda() -> str:
    parts = []
    for title, (bench, columns) in CUDA.items():
        found = runs(bench)
        if found:
            parts.append(f"### {title}\n")
        for machine, run in found:
            copy = run["measured"].get("copy_gbs")
            copied = f"; MLX copies {copy} GB/s" if copy else ""
            if bench == "cuda_attention":
                by_heads: dict[str, list[tuple[float, float]]] = {}
                for r in run["rows"]:
                    if not r["tail"]:
                        by_heads.setdefault(f"{r['KV heads']} KV heads", []).append((r["keys"], r["share"]))
                gpu = machine["gpu"].split()[1]
                alt = f"Share of the copy bandwidth that attention reaches on an {gpu}, over the number of cached tokens"
                share = "bytes read per second,\nas a share of the rate of MLX's copies"
                parts.append(
                    loglog(by_heads, "cached tokens (keys) of the call", share, f"share_{gpu}", alt, shades=True) + "\n"
                )
            parts.append(f"{source(machine, run)}{copied}\n\n{markdown(run['rows'], columns)}\n")
    return "\n".join(parts)


BY_POSITION = {
    "text": "",
    "cache": "",
    "bytes": ".0f",
    "KL": ".4f",
    "s.e.": ".4f",
    "p99": ".3f",
    "ratio": ".4f",
    "top-1": ".1%",
}


def by_position() -> str:
    """Real models: tables, KL by position and KL compared with bytes, a run each."""
    parts = []
    for i, (machine, run) in enumerate(runs("by_position")):
        s = run["settings"]
        rows: Rows = []
        bounds: list[int] = []
        for r in run["rows"]:
            text = r["text"] if r["complete"] else f"{r['text']}, {r['n_tokens']} tokens so far"
            row = {"text": text, "cache": r["cache"], "bytes": r["bytes_per_token"], "does not run": r["failure"] or None}
            if w := r["whole"]:
                row |= {"KL": w["kl"], "s.e.": w["kl_se"], "p99": w["kl_p99"], "ratio": w["ratio"], "top-1": w["top1"]}
                row |= {f"KL < {span['end']}": span["kl"] for span in r["spans"]}
                bounds = max(bounds, [span["end"] for span in r["spans"]], key=len)
            rows.append(row)
        columns = {**BY_POSITION, **{f"KL < {bound}": ".4f" for bound in bounds}}
        if any(row["does not run"] for row in rows):
            columns["does not run"] = ""
        perplexity = ", ".join(
            f"{text} {value:.2f}" for text, value in {r["text"]: r["reference"] for r in run["rows"]}.items()
        )  # fmt: skip
        title = f"### {s['model']}, {s['tokens']} tokens in chunks of {s['chunk']}, {s['device'].upper()}"
        if "windows" in s:
            title += f", sliding windows {'compressed' if s['windows'] == 'on' else 'as they are'}"
        if "skip" in s:
            title += f", the first {s['skip']} tokens of the text left out, positions moved by {s.get('moved', 0)}"
        plots = (
            ""
            if "skip" in s
            else f"{kl_by_position(run['rows'], f'by_position_{i}')}\n\n{kl_and_bytes(run['rows'], f'kl_and_bytes_{i}')}"
        )
        source_line = f"{source(machine, run)}; uncompressed perplexity: {perplexity}"
        parts.append(f"{title}\n\n{source_line}\n\n{markdown(rows, columns)}\n\n{plots}\n")
    return "\n".join(parts)


def kl_by_position(rows: Rows, name: str) -> str:
    names = list(dict.fromkeys(r["text"] for r in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(6 * len(names), 4), sharey=True, squeeze=False)
    for text, ax in zip(names, axes[0], strict=True):
        for r in rows:
            if r["text"] == text and r["whole"]:
                points = [(span["end"], max(span["kl"], 1e-6)) for span in r["spans"]]
                ax.plot(*zip(*points, strict=True), marker="o", label=r["cache"], color=colour(r["cache"]))
        ax.set(xscale="log", yscale="log", xlabel="tokens of context, up to", title=text)
        ax.grid(True, which="both", alpha=0.3)
    axes[0][0].set_ylabel("mean KL to the uncompressed cache (nats)")
    legend_beside(axes[0][-1])
    return save(figure, name, "Divergence from the uncompressed cache over the position in the text")


def kl_and_bytes(rows: Rows, name: str) -> str:
    figure, axes = plt.subplots(figsize=(6.5, 4))
    texts = dict(zip(dict.fromkeys(r["text"] for r in rows), "osv^D", strict=False))
    caches = dict.fromkeys(r["cache"] for r in rows if r["whole"] and not r["cache"].startswith("uncompressed"))
    for r in rows:
        if r["whole"] and r["cache"] in caches:
            place = (r["bytes_per_token"], r["whole"]["kl"])
            axes.scatter(*place, marker=texts[r["text"]], color=colour(r["cache"]))
    for cache in caches:
        axes.scatter([], [], color=colour(cache), label=cache)
    for text, marker in texts.items():
        axes.scatter([], [], marker=marker, facecolors="none", edgecolors="black", label=text)
    axes.set(yscale="log", xlabel="bytes of a stored token, per layer and KV head", ylabel="mean KL (nats)")
    axes.grid(True, which="both", alpha=0.3)
    legend_beside(axes)
    return save(figure, name, "Divergence from the uncompressed cache over the bytes of a stored token")


def exact_tokens() -> str:
    """KL by the numbers of first and recent tokens that stay exact: a table for each model, a column for each text."""
    parts = []
    for machine, run in runs("exact_tokens"):
        rows: dict[tuple[int, int], dict[str, Any]] = {}
        for r in run["rows"]:
            row = rows.setdefault((r["first"], r["tail"]), {"first": r["first"], "tail": r["tail"]})
            row[f"KL {r['text']}"] = r["kl"]
        columns = {"first": "d", "tail": "d", **dict.fromkeys([f"KL {r['text']}" for r in run["rows"]], ".4f")}
        s = run["settings"]
        title = f"### {s['model']}, {s['preset']}, {s['tokens']} tokens in chunks of {s['chunk']}"
        parts.append(f"{title}\n\n{source(machine, run)}\n\n{markdown(list(rows.values()), columns)}\n")
    return "\n".join(parts)


def long_passkeys() -> str:
    """One line for each context and number of hidden keys, one column for each cache."""
    parts = []
    for machine, run in runs("passkeys"):
        rows: dict[tuple[int, int], dict[str, Any]] = {}
        for r in run["rows"]:
            row = rows.setdefault((r["context"], r["n_keys"]), {"context": r["context"], "hidden": r["n_keys"]})
            row["uncompressed" if r["preset"] == "none" else r["preset"]] = f"{r['found']} of {r['trials']}"
        columns = dict.fromkeys((key for row in rows.values() for key in row), "")
        table = markdown([rows[key] for key in sorted(rows)], columns)
        parts.append(f"### {run['settings']['model']}\n\n{source(machine, run)}\n\n{table}\n")
    return "\n".join(parts)


AGENTS = {
    "agents": ("Tool calls", {"preset": "", "requests": "d", "right": "d", "valid": "d", "same": "d"}),
    "agents_code": ("Code that runs", {"preset": "", "tasks": "d", "pass": "d", "same": "d", "context": "d"}),
    "agents_drafts": (
        "Speculative decoding",
        {"preset": "", "n_tokens": "d", "accepted": ".1%", "tokens_per_pass": ".2f", "same": "d"},
    ),
}


def agents() -> str:
    parts = []
    for bench, (title, columns) in AGENTS.items():
        for machine, run in runs(bench):
            rows: Rows = run["rows"]
            wanted = dict(columns)
            if bench == "agents":
                bounds = sorted({int(bound) for row in rows for bound in row["by_context"]})
                wanted |= {f"right, context < {bound}": "" for bound in bounds}
                rows = [
                    {**row, **{f"right, context < {n}": "{} of {}".format(*found) for n, found in row["by_context"].items()}}
                    for row in rows
                ]
            draft = f", drafts by {run['settings']['draft_model']}" if "draft_model" in run["settings"] else ""
            head = f"### {title}: {run['settings']['model']}{draft}"
            parts.append(f"{head}\n\n{source(machine, run)}\n\n{markdown(rows, wanted)}\n")
    return "\n".join(parts)


def other(bench: str) -> str:
    """A bench whose rows are plain tables."""
    parts = []
    for machine, run in runs(bench):
        keys = dict.fromkeys(key for row in run["rows"] for key in row)
        rows = [{k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items()} for row in run["rows"]]
        parts.append(f"{source(machine, run)}\n\n{markdown(rows, dict.fromkeys(keys, ''))}\n")
    return "\n".join(parts)


PARTS = {"one": "one GPU", "tensor": "two, heads", "pipeline": "two, layers"}


def multi_gpu() -> str:
    """One model on one GPU and on two: a row for each case, columns for how it is split."""
    found = []
    for machine, run in runs("multi-gpu"):
        prompts: dict[tuple[Any, ...], dict[str, Any]] = {}
        steps: dict[tuple[Any, ...], dict[str, Any]] = {}
        for r in run["rows"]:
            name, case = PARTS[r["part"]], {"weights": r["weights"], "cache": r["cache"]}
            memory = max(r["peak GB"])
            if "prompt ms" in r:
                row = prompts.setdefault((*case.values(), r["tokens"]), {**case, "tokens": r["tokens"]})
                row |= {f"{name}: ms": r["prompt ms"], f"{name}: GB": memory, f"{name}: error": r.get("error")}
            else:
                row = steps.setdefault((*case.values(), r["context"]), {**case, "context": r["context"]})
                row |= {f"{name}: tokens/s": r["tokens/s"], f"{name}: GB": memory}
        head = {"weights": "", "cache": ""}
        names = PARTS.values()
        of_prompts = {
            **head,
            "tokens": "d",
            **{f"{name}: ms": ".0f" for name in names},
            **{f"{name}: GB": ".1f" for name in names},
        }
        of_prompts |= {f"{name}: error": ".0e" for name in list(names)[1:]}
        of_steps = {
            **head,
            "context": "d",
            **{f"{name}: tokens/s": ".0f" for name in names},
            **{f"{name}: GB": ".1f" for name in names},
        }
        tables = (markdown(list(prompts.values()), of_prompts), markdown(list(steps.values()), of_steps))
        found.append(f"{source(machine, run)}\n\nPrompts:\n\n{tables[0]}\n\nDecoding:\n\n{tables[1]}\n")
    return "\n".join(found)


def main() -> None:
    plt.rcParams["svg.hashsalt"] = "tqext"  # the same data give the same bytes
    OUT.mkdir(parents=True, exist_ok=True)
    overview()
    windows = "".join(
        quality_table(data, data["quality"]) + "\n" + pareto(data, f"quality_{i}") + "\n\n" + passkey_table(data)
        for i, data in enumerate(quality())
    )
    sections = {
        "Attention": attention(),
        "Threads": other("threads"),
        "Memory": memory(),
        "Memory of a prompt": other("prompt_memory"),
        "Beside other packages": peers(),
        "1-bit and ternary matrices": other("q1_matmul"),
        "An 8B-shaped 1-bit model": other("bonsai_shape"),
        "Generation after a long context": other("decode"),
        "Large key biases": other("key_bias"),
        "Serving": other("server"),
    }
    real = {
        "Quality by position": by_position(),
        "Short windows": windows,
        "First and recent tokens": exact_tokens(),
        "Passkeys": long_passkeys(),
        "Agents": agents(),
    }
    for name, text in (
        ("real_models.md", "\n".join(f"## {title}\n\n{text}" for title, text in real.items() if text)),
        ("cuda.md", cuda()),
        ("several_machines.md", multi_gpu()),
        ("measurements.md", "\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text)),
    ):
        (OUT / name).write_text(text.rstrip() + "\n")
        print(OUT / name)


if __name__ == "__main__":
    main()

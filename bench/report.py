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
                ax.plot(*zip(*points, strict=True), marker="o", label=r["cache"])
        ax.set(xscale="log", yscale="log", xlabel="tokens of context, up to", title=text)
        ax.grid(True, which="both", alpha=0.3)
    axes[0][0].set_ylabel("mean KL to the uncompressed cache (nats)")
    axes[0][-1].legend(fontsize=8)
    return save(figure, name)


def kl_and_bytes(rows: Rows, name: str) -> str:
    figure, axes = plt.subplots(figsize=(6.5, 4))
    for text, marker in zip(dict.fromkeys(r["text"] for r in rows), "osv^D", strict=False):
        chosen = [r for r in rows if r["text"] == text and r["whole"] and not r["cache"].startswith("uncompressed")]
        axes.scatter(
            [r["bytes_per_token"] for r in chosen], [r["whole"]["kl"] for r in chosen], marker=marker, label=text
        )  # fmt: skip
        for r in chosen:
            place = (r["bytes_per_token"], r["whole"]["kl"])
            axes.annotate(r["cache"], place, fontsize=7, xytext=(4, 4), textcoords="offset points")
    axes.set(yscale="log", xlabel="bytes of a stored token, per layer and KV head", ylabel="mean KL (nats)")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    return save(figure, name)


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


def main() -> None:
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
        "1-bit matrices": other("q1_matmul"),
        "An 8B-shaped 1-bit model": other("bonsai_shape"),
        "Generation after a long context": other("decode"),
        "Large key biases": other("key_bias"),
        "Serving": other("server"),
    }
    real = {
        "Quality by position": by_position(),
        "Short windows": windows,
        "Passkeys": long_passkeys(),
        "Agents": agents(),
    }
    for name, text in (
        ("real_models.md", "\n".join(f"## {title}\n\n{text}" for title, text in real.items() if text)),
        ("cuda.md", cuda()),
        ("measurements.md", "\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text)),
    ):
        (OUT / name).write_text(text.rstrip() + "\n")
        print(OUT / name)


if __name__ == "__main__":
    main()

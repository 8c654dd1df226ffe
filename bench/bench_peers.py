"""Side by side: what a user on this machine could pick instead of tqext, on the same model, text and protocol.

Every other package gets a virtual environment of its own with the same MLX and mlx-lm, at a pinned version; one that cannot be
installed or run is reported with its reason. Each runs SmolLM2-135M-Instruct in fp32: a prompt of 256 tokens at once, then the
text 8 tokens at a time to 512 (teacher-forced), scored against the uncompressed cache; then 16 single decoding steps are timed.

    python bench/bench_peers.py --text FILE [--only NAME ...] [--json bench/results/peers.json]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

PROMPT, STEP, END, TIMED = 256, 8, 512, 16
MLX = ["mlx[cpu]==0.32.4", "mlx-lm==0.32.2"]


def stock(**options):
    def make(model):
        from mlx_lm.models.cache import QuantizedKVCache

        return [QuantizedKVCache(**options) for _ in model.layers]

    return make


def uncompressed(model):
    from mlx_lm.models.cache import KVCache

    return [KVCache() for _ in model.layers]


def tqext_preset(preset):
    def make(model):
        import tqext

        return tqext.make_prompt_cache(model, preset)

    return make


def turboquant_mlx_full(**options):
    def make(model):
        from turboquant_mlx.layers.polar_kv_cache import TurboQuantKVCache

        return [TurboQuantKVCache(group_size=64, min_tokens_before_quant=0, **options) for _ in model.layers]

    return make


def veloxquant(**options):
    def make(model):
        from veloxquant_mlx import KVCacheBuilder, KVCacheConfig

        return KVCacheBuilder.for_model(model, KVCacheConfig(**options))

    return make


def mlx_turboquant(**options):
    def make(model):
        import mlx_turboquant

        mlx_turboquant.register()
        return mlx_turboquant.make_prompt_cache(model, **options)

    return make


def tqai(**options):
    def make(model):
        import mlx_lm.models.cache
        import tqai

        tqai.patch(model, backend="mlx", **options)
        return mlx_lm.models.cache.make_prompt_cache(model)

    return make


# name: (packages beside MLX, cache factory); no packages and no MLX of its own: this interpreter.
CONTENDERS = {
    "uncompressed fp32": (None, uncompressed),
    "tqext tq3": (None, tqext_preset("tq3")),
    "tqext tq3-plain": (None, tqext_preset("tq3-plain")),
    "tqext tq4": (None, tqext_preset("tq4")),
    "mlx-lm 4 bits": (None, stock(bits=4, group_size=64)),
    "mlx-lm 3 bits": (None, stock(bits=3, group_size=64)),
    "turboquant-mlx-full K3 V2": (["turboquant-mlx-full==0.30.0"], turboquant_mlx_full(k_bits=3, v_bits=2)),
    "turboquant-mlx-full K8 V3": (["turboquant-mlx-full==0.30.0"], turboquant_mlx_full(k_bits=8, v_bits=3)),
    "veloxquant-mlx rvq 2": (["veloxquant-mlx==0.94.15"], veloxquant(method="turboquant_rvq", bit_width_inlier=2)),
    "mlx-turboquant 3 bits": (["mlx-turboquant==0.0.2"], mlx_turboquant(kv_bits=3, kv_group_size=64)),
    "tqai K3 V2": (["tqai==0.6.1"], tqai(bits_k=3, bits_v=2)),
    "tqai K4 V2": (["tqai==0.6.1"], tqai(bits_k=4, bits_v=2)),
}
BASELINE = "uncompressed fp32"


# Worker: runs in the contender's environment


def work(name: str, folder: Path) -> dict:
    import mlx.core as mx
    import numpy as np
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    task = json.loads((folder / "task.json").read_text())
    model, _ = load_model(Path(task["model"]))
    tokens = mx.array(task["tokens"])[None]
    cache = CONTENDERS[name][1](model)
    logprobs = []

    def feed(begin, end):
        logits = model(tokens[:, begin:end], cache=cache)[0].astype(mx.float32)
        out = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        mx.eval(out)
        return out

    feed(0, PROMPT)
    for begin in range(PROMPT, END, STEP):
        logprobs.append(np.array(feed(begin, begin + STEP)))
    q = np.concatenate(logprobs)
    nbytes = [getattr(c, "nbytes", None) for c in cache]
    times = []
    for i in range(TIMED):
        start = time.perf_counter()
        feed(END + i, END + i + 1)
        times.append(time.perf_counter() - start)

    reference = folder / "reference.npy"
    if name == BASELINE:
        np.save(reference, q)
    p = np.load(reference)
    following = np.array(task["tokens"][PROMPT + 1 : END + 1])
    rows = np.arange(len(following))
    kl = (np.exp(p) * (p - q)).sum(-1)
    layers, heads = len(cache), task["n_kv_heads"]
    known = None not in nbytes and sum(nbytes) > 0
    return {
        "perplexity": float(np.exp(-q[rows, following].mean())),
        "kl": float(kl.mean()),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "top1": float((p.argmax(-1) == q.argmax(-1)).mean()),
        "bytes_per_token_layer_head": sum(nbytes) / (END * layers * heads) if known else None,
        "decode_ms": statistics.median(times) * 1e3,
        "decode_spread": (max(times) - min(times)) / statistics.median(times),
        "max_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


# Orchestrator


def environment(packages: list[str], root: Path) -> str:
    """The interpreter of a virtual environment that holds the packages."""
    folder = root / packages[0].replace("==", "-")
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, *MLX, "numpy", "scipy", "setuptools"], check=True, capture_output=True, text=True)
        subprocess.run([*pip, "--no-deps", *packages], check=True, capture_output=True, text=True)
        (folder / "ready").touch()
    return str(python)


def run(name: str, folder: Path, environments: Path) -> dict:
    packages = CONTENDERS[name][0]
    try:
        python = environment(packages, environments) if packages else sys.executable
        command = [python, __file__, "--worker", name, "--folder", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=True)
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"skipped": "took longer than 30 minutes"}
    except subprocess.CalledProcessError as error:
        lines = [line for line in (error.stderr or "").splitlines() if line.strip()]
        return {"skipped": lines[-1] if lines else f"exit status {error.returncode}"}


def prepare(options: argparse.Namespace, folder: Path) -> None:
    import tqext
    from tqext.models import local_folder

    model = local_folder(options.model)
    config = json.loads((model / "config.json").read_text())
    _, tokenizer = tqext.load(options.model)
    tokens = tokenizer.encode(options.text.read_text()[:20000])[: END + TIMED + 1]
    if len(tokens) < END + TIMED + 1:
        raise SystemExit(f"the text has {len(tokens)} tokens, {END + TIMED + 1} are needed")
    task = {"model": str(model), "tokens": tokens, "n_kv_heads": config["num_key_value_heads"]}
    (folder / "task.json").write_text(json.dumps(task))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a plain text of at least 530 tokens")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--only", nargs="*", choices=list(CONTENDERS))
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()) / "tqext-peers")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options.worker, options.folder)))
        return
    if not options.text:
        parser.error("--text is needed")
    names = [n for n in CONTENDERS if not options.only or n in options.only or n == BASELINE]
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(options, folder)
        print(f"{'':28} {'perplexity':>10} {'KL':>7} {'top-1':>6} {'bytes':>7} {'decode ms':>10} {'RSS MB':>7}")
        for name in names:
            row = run(name, folder, options.environments)
            rows.append({"name": name, "packages": CONTENDERS[name][0] or [], **row})
            if "skipped" in row:
                print(f"{name:28} skipped: {row['skipped']}")
                continue
            size = row["bytes_per_token_layer_head"]
            print(
                f"{name:28} {row['perplexity']:10.2f} {row['kl']:7.3f} {row['top1']:6.1%} "
                f"{f'{size:.0f}' if size else 'unknown':>7} {row['decode_ms']:10.1f} {row['max_rss_mb']:7.0f}",
                flush=True,
            )
    if options.json:
        from timing import save

        save(
            options.json,
            {"bench": "peers", "model": options.model, "mlx": MLX, "prompt": PROMPT, "step": STEP, "end": END},
            {},
            rows,
        )


if __name__ == "__main__":
    main()

"""One entry for all benches: `python -m bench` in a checkout, `tqext bench` anywhere.

python -m bench                     list them
python -m bench attention [...]     run one; what follows are its own options
python -m bench all                 run them with their defaults, into bench/results/
python -m bench report              tables and plots of the documentation from bench/results/
"""

import subprocess
import sys
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__).resolve().parent
BENCHES = {
    "fetch-models": "fetch_models.py",
    "texts": "texts.py",
    "attention": "bench_turboquant_attention.py",
    "latent-attention": "bench_latent_attention.py",
    "threads": "bench_threads.py",
    "q1": "bench_q1_matmul.py",
    "bonsai": "bench_bonsai_shape.py",
    "memory": "bench_memory.py",
    "decode": "bench_decode.py",
    "decode-step": "bench_decode_step.py",
    "quality": "bench_quality.py",
    "key_bias": "bench_key_bias.py",
    "exact-tokens": "bench_exact_tokens.py",
    "agents": "bench_agents.py",
    "server": "bench_server.py",
    "prefix-store": "bench_prefix_store.py",
    "shared-prefix": "bench_shared_prefix.py",
    "peers": "bench_peers.py",
    "prompts": "bench_prompts.py",
    "cuda": "bench_cuda.py",
    "multi-gpu": "bench_multi_gpu.py",
    "report": "report.py",
}
# They need arguments, a GPU, a large download, or what other benches wrote.
NOT_IN_ALL = ("agents", "cuda", "exact-tokens", "fetch-models", "multi-gpu", "texts", "report")


def title(path: Path) -> str:
    return path.read_text().split('"""')[1].splitlines()[0]


def main(argv: list[str]) -> NoReturn:
    """Runs a bench; exits with its status."""
    present = {name: HERE / file for name, file in BENCHES.items() if (HERE / file).exists()}
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        for name, path in present.items():
            print(f"  {name:12} {title(path)}")
        raise SystemExit(0 if argv else 2)
    if argv[0] == "all":
        chosen = [path for name, path in present.items() if name not in NOT_IN_ALL]
        raise SystemExit(max(subprocess.call([sys.executable, str(path)]) for path in chosen))
    if argv[0] not in present:
        raise SystemExit(f"bench: expected one of {', '.join(present)} or all, got {argv[0]}")
    raise SystemExit(subprocess.call([sys.executable, str(present[argv[0]]), *argv[1:]]))


if __name__ == "__main__":
    main(sys.argv[1:])

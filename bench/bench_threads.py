"""Attention on packed keys and values with 1 .. N threads: what each further thread gains.

    python bench/bench_threads.py --n-keys 16384

The number of threads is fixed when the extension is loaded, so every count is a process of its own; they take turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

BENCH = Path(__file__).with_name("bench_turboquant_attention.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-keys", type=int, default=16384)
    parser.add_argument("--most", type=int, default=os.cpu_count(), help="threads")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file to add the run to")
    args = parser.parse_args()
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(args.turns):
        for n in range(1, args.most + 1):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "run.json"
                command = [
                    sys.executable,
                    BENCH,
                    "--threads",
                    n,
                    "--n-keys",
                    args.n_keys,
                    "--formats",
                    "tq33",
                    "--only",
                    "tqext",
                ]
                command += ["--seconds", 0.5]
                subprocess.run([*map(str, command), "--json", str(path)], check=True, stdout=subprocess.DEVNULL)
                for row in json.loads(path.read_text())["runs"][0]["rows"]:
                    found.setdefault((row["query"], n), []).append(row["ms"])
    rows: list[dict[str, Any]] = []
    for (query, n), times in found.items():
        gains = [one / many for one, many in zip(found[query, 1], times, strict=True)]
        rows.append({"query": query, "threads": n, "ms": statistics.median(times), "times": statistics.median(gains)})
    from timing import save, table

    print(table(rows, {"query": "", "threads": "d", "ms": ".3f", "times": ".2f"}))
    if args.json:
        save(args.json, {"bench": "threads", "n_keys": args.n_keys}, {}, rows)


if __name__ == "__main__":
    main()

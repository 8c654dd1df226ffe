"""Warm-up, median, spread, bytes, GB/s and the machine's own read bandwidth: what every bench reports with."""

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


@dataclass(frozen=True)
class Timing:
    """Wall times of one call in milliseconds; `spread`: half the distance of the 10th and 90th percentile, in percent."""

    median: float
    least: float
    spread: float
    runs: int


def operator_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The parser's arguments with those of every operator's bench, of which tqext's are put into effect."""
    parser.add_argument("--threads", type=int, help="threads of tqext (default: all processors)")
    parser.add_argument("--isa", help="instruction set of tqext (default: the best)")
    parser.add_argument("--only", nargs="+", default=[""], help="only lines whose name contains one of these")
    parser.add_argument("--seconds", type=float, default=1.0, help="time per line")
    parser.add_argument(
        "--processor-time", action="store_true", help="time the processor, not the wall: for one thread on a busy machine"
    )
    parser.add_argument("--json", type=Path, help="file to add the run to")
    args = parser.parse_args()
    if args.processor_time and args.threads != 1:
        parser.error("--processor-time: expected --threads 1, whose work is all a call's, got other threads")
    # Read once, when tqext is imported or first used: it may not be imported yet.
    if args.isa:
        os.environ["TQEXT_ISA"] = args.isa
    if args.threads:
        os.environ["TQEXT_NUM_THREADS"] = str(args.threads)
    return args


def measure_in_turns(
    calls: Sequence[Callable[[], Any]],
    *,
    seconds: float = 1.0,
    warm_up: int = 2,
    turns: int = 5,
    most_runs: int = 300,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Times calls that must finish their own work, each for about `seconds` in all and at least once per turn.

    They take turns, so that a machine that changes its speed on the way slows all of them down, and their ratios stay.
    `clock`: what a call is timed with; `seconds` are those of the wall.
    """
    for call in calls:
        for _ in range(warm_up):
            call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(turns):
        for call, found in zip(calls, times, strict=True):
            start, most = time.perf_counter(), len(found) + max(1, most_runs // turns)
            while True:
                begin = clock()
                call()
                found.append((clock() - begin) * 1e3)
                if time.perf_counter() - start >= seconds / turns or len(found) >= most:
                    break
    return [_timing(found) for found in times]


def _timing(times: list[float]) -> Timing:
    median = statistics.median(times)
    deciles = statistics.quantiles(times, n=10) if len(times) > 1 else times
    return Timing(median, min(times), 50 * (deciles[-1] - deciles[0]) / median, len(times))


def measure(call: Callable[[], Any], *, seconds: float = 1.0, warm_up: int = 2, least_runs: int = 5) -> Timing:
    """Times one call, which must finish its own work, for about `seconds`."""
    return measure_in_turns([call], seconds=seconds, warm_up=warm_up, turns=least_runs)[0]


def read_bandwidth(n_threads: int, *, megabytes: int = 256, repeats: int = 7) -> float:
    """Best GB/s at which `n_threads` NumPy sums read their own arrays, each larger than any last-level cache share."""
    arrays = [np.ones(megabytes * 2**20 // 8, dtype=np.int64) for _ in range(n_threads)]
    best = 0.0
    for _ in range(repeats):
        threads = [threading.Thread(target=x.sum) for x in arrays]
        begin = time.perf_counter()
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        best = max(best, n_threads * megabytes * 2**20 / (time.perf_counter() - begin) / 1e9)
    return best


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text())
        cpu = found[1] if found else cpu
    found = {"cpu": cpu, "processors": os.cpu_count(), "system": platform.system(), "python": platform.python_version()}
    if mx.default_device() == mx.gpu:
        found["gpu"] = mx.device_info()["device_name"]
    return found


def versions() -> dict[str, str]:
    found = {}
    for name in ("tqext", "mlx", "mlx-lm", "numpy", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            if name != "torch":  # used by one bench, where it is there
                found[name] = "not installed"
    return found


def portable(argument: str) -> str:
    """An argument without the folders of this machine: relative to the checkout, or the bare name."""
    if not os.path.isabs(argument):
        return argument
    path = Path(argument).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def save(path: Path, settings: dict[str, Any], measured: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Adds a run to the machine's file; a run with the same settings replaces the older one.

    `measured` is what the run found out about the machine; the load average tells whether it was quiet.
    """
    data = json.loads(path.read_text()) if path.exists() else {"machine": machine(), "runs": []}
    command = "python " + shlex.join(portable(x) for x in (os.path.abspath(sys.argv[0]), *sys.argv[1:]))
    data["runs"] = [run for run in data["runs"] if run["settings"] != settings]
    measured = {"load_average": round(os.getloadavg()[0], 1), **measured}
    data["runs"].append({"command": command, "versions": versions(), "settings": settings, "measured": measured, "rows": rows})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """Rows as aligned text; `columns` maps keys to format specifications, a missing value prints as a dash."""
    cells = [[format(row[key], spec) if row.get(key) is not None else "-" for key, spec in columns.items()] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(columns)]
    lines = [list(columns), *cells]
    aligned = [
        [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]
    return "\n".join("  ".join(line) for line in aligned)

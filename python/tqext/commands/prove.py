"""``tqext doctor --prove``: what this machine settles, in one command of less than two minutes.

On a Mac it answers the open questions of docs/metal.md: what the GPU and its compiler do with half subnormals, 8x8 matrices,
contraction, division, -inf and NaN (`PROBES`), what each kernel costs to compile, whether packed bytes equal the CPU's, and how
fast attention is. On the CPU and on CUDA it answers what applies there.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

import tqext
from tqext import _ext
from tqext.commands.options import ArgumentParser
from tqext.commands.versions import versions
from tqext.presets import DEFAULT_PRESET, Recipe, get_policy

VERSION = 1  # of the JSON
Json = dict[str, Any]

# Largest error of attention relative to the largest output, as the operator tests have it.
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.2e-2}
CUDA_TOLERANCE = 1e-3  # there the softmax weights enter fp16 tensor cores (docs/cuda.md)
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@dataclass(frozen=True)
class Plan:
    """How much is asked."""

    problems: int  # per dtype, fewer where time is up
    lengths: tuple[int, ...]  # tokens of the history
    query_heads: tuple[int, ...]  # per KV head
    prompts: tuple[tuple[int, int], ...]  # tokens of the history, and how many of them, the last ones, are the prompt
    speed_seconds: float
    bandwidth_bytes: int
    dims: tuple[int, ...] = (64, 128, 256)  # of the kernels whose first use is timed
    rows: tuple[int, ...] = (1, 2, 4, 8)
    parity_seconds: float = 45.0
    seconds: float = 110.0  # of all parts; speed takes what is left, but no less than a quarter of its own


FULL = Plan(40, (4096, 16384, 65536, 131072), (1, 4, 8), ((4096, 512), (16384, 512)), 50.0, 1 << 28)
QUICK = Plan(4, (512,), (1, 4), ((256, 32),), 3.0, 1 << 24, dims=(128,), rows=(1, 8), parity_seconds=20.0, seconds=50.0)
# On CUDA a kernel of attention takes about 2 s to compile, each for its dtype: so many different ones per dtype.
CUDA_KERNELS = {"full": 6, "quick": 2}
N_KV_HEADS, HEAD_DIM = 8, 128
N_SHOWN = 16  # pipelines in the block; the JSON has all


def backend() -> str:
    """``metal``, ``cuda`` or ``cpu``: what the operators run on by default."""
    if mx.default_device() == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


# --- facts ---------------------------------------------------------------------------------------------------------------


def _said(*command: str, seconds: float = 20) -> str:
    """What a command prints, "" where there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _gpu_cores() -> int | None:
    try:
        displays = json.loads(_said("system_profiler", "-json", "SPDisplaysDataType") or "{}").get("SPDisplaysDataType", [])
        return next((int(x["sppci_cores"]) for x in displays if "sppci_cores" in x), None)
    except ValueError:
        return None


def facts() -> Json:
    """Device, system, versions, and where the kernels come from."""
    info = {k: v for k, v in dict(mx.device_info()).items() if isinstance(v, str | int | float)}
    out: Json = {"backend": backend(), "versions": versions(), "system": platform.platform(), "machine": platform.machine()}
    out["device"] = info
    tags = (importlib.metadata.distribution("mlx").read_text("WHEEL") or "").splitlines()
    out["mlx_wheel"] = [line.removeprefix("Tag: ") for line in tags if line.startswith("Tag: ")]
    if backend() == "cpu":
        out |= {"isa": tqext.isa(), "threads": tqext.num_threads()}
    if sys.platform == "darwin":
        library = Path(str(_ext.__file__)).parent / "tqext.metallib"
        out |= {
            "macos": platform.mac_ver()[0],
            "chip": _said("sysctl", "-n", "machdep.cpu.brand_string"),
            "gpu_cores": _gpu_cores(),
            "metal_compiler": _said("xcrun", "-sdk", "macosx", "metal", "--version").partition("\n")[0] or "none",
            "kernels": "compiled ahead of time" if library.exists() else "compiled at first use",
        }
    return out


# --- probes --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """A question to the GPU and its compiler.

    Attributes:
        name: what is asked about.
        threads: of the grid, in threadgroups of 32.
        source: body of a kernel in the Metal language; it reads `inputs` and writes `outputs` by name.
        inputs: arrays of at least eight numbers: MLX passes shorter ones in another address space.
        outputs: shape and dtype of each.
        judge: whether what our kernels rely on holds, and the figures in one line.
        header: text before the kernel.
    """

    name: str
    threads: int
    source: str
    inputs: dict[str, np.ndarray]
    outputs: Mapping[str, tuple[tuple[int, ...], Any]]
    judge: Callable[[dict[str, np.ndarray]], tuple[bool, str]]
    header: str = ""


def ulps(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Distance in units of the last place, of fp32 numbers."""
    low, high = (np.asarray(x, np.float32).view(np.int32).astype(np.int64) for x in (got, want))
    low, high = (np.where(x < 0, -(x & 0x7FFFFFFF), x) for x in (low, high))
    return np.abs(low - high)


def _unequal(got: np.ndarray, want: np.ndarray) -> int:
    """How many numbers have other bits."""
    unsigned = f"u{want.dtype.itemsize}"
    return int((np.ascontiguousarray(got).view(unsigned) != np.ascontiguousarray(want).view(unsigned)).sum())


def _half_subnormals() -> Probe:
    bits = np.arange(1024, dtype=np.uint16)
    halves = bits.view(np.float16)
    wide = halves.astype(np.float32)

    def judge(out: dict[str, np.ndarray]) -> tuple[bool, str]:
        wrong = {
            "to float": _unequal(out["wide"], wide),
            "as a factor": _unequal(out["scaled"], halves * np.float16(16384)),
            "from float": _unequal(out["narrow"], bits),
        }
        return not any(wrong.values()), ", ".join(f"{name} {n} of 1024 wrong" for name, n in wrong.items())

    source = """
    uint i = thread_position_in_grid.x;
    half h = as_type<half>(ushort(bits[i]));
    wide[i] = float(h);
    scaled[i] = h * half(16384.0f);
    narrow[i] = as_type<ushort>(half(numbers[i]));
"""
    outputs = {"wide": ((1024,), mx.float32), "scaled": ((1024,), mx.float16), "narrow": ((1024,), mx.uint16)}
    return Probe("half subnormals", 1024, source, {"bits": bits, "numbers": wide}, outputs, judge)


def _matrix_lanes() -> Probe:
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-8, 8, (8, 8)).astype(np.float32) for _ in range(2))
    lane = np.arange(32)
    rows, columns = (lane // 4 & 4) + (lane // 2 & 3), (lane // 4 & 2) * 2 + (lane & 1) * 2
    layout = np.zeros((8, 8), np.float32)
    layout[rows, columns], layout[rows, columns + 1] = 2 * lane, 2 * lane + 1

    def judge(out: dict[str, np.ndarray]) -> tuple[bool, str]:
        places, products = _unequal(out["layout"], layout), _unequal(out["multiplied"], a @ b)
        return places + products == 0, f"{places} of 64 elements elsewhere, {products} of 64 products wrong"

    source = """
    uint lane = thread_index_in_simdgroup;
    simdgroup_float8x8 m, x, y, z;
    reinterpret_cast<thread float2&>(m.thread_elements()) = float2(2 * lane, 2 * lane + 1);
    simdgroup_store(m, layout, 8);
    simdgroup_load(x, a, 8);
    simdgroup_load(y, b, 8);
    reinterpret_cast<thread float2&>(z.thread_elements()) = float2(0);
    simdgroup_multiply_accumulate(z, x, y, z);
    simdgroup_store(z, multiplied, 8);
"""
    outputs = {"layout": ((8, 8), mx.float32), "multiplied": ((8, 8), mx.float32)}
    header = "#include <metal_simdgroup_matrix>\nusing namespace metal;\n"
    return Probe("matrix lanes", 32, source, {"a": a, "b": b}, outputs, judge, header)


def _contraction() -> Probe:
    rng = np.random.default_rng(1)
    a, b = (rng.uniform(1, 2, 1024).astype(np.float32) for _ in range(2))
    c = -(a * b)  # rounded: what is left of a * b + c shows an unrounded product
    left = (a.astype(np.float64) * b + c) != 0

    def judge(out: dict[str, np.ndarray]) -> tuple[bool, str]:
        off, plain = (int((out[x] != 0).sum()) for x in ("off", "plain"))
        return off == 0, f"of {left.sum()} products {off} fused under contract(off), {plain} without"

    source = """
    uint i = thread_position_in_grid.x;
    off[i] = separate(a[i], b[i], c[i]);
    plain[i] = a[i] * b[i] + c[i];
"""
    header = """
inline float separate(float a, float b, float c) {
#pragma clang fp contract(off)
  return a * b + c;
}
"""
    outputs = dict.fromkeys(("off", "plain"), ((1024,), mx.float32))
    return Probe("contraction", 1024, source, {"a": a, "b": b, "c": c}, outputs, judge, header)


def _rounding() -> Probe:
    n = 100_000 // 32 * 32
    rng = np.random.default_rng(2)
    x, y = (np.exp2(rng.uniform(-20, 20, n)).astype(np.float32) for _ in range(2))
    exponents = rng.uniform(-24, 0, n).astype(np.float32)  # of softmax weights; smaller ones vanish in the sum
    square_roots = np.sqrt(x.astype(np.float64)).astype(np.float32)
    powers = np.exp2(exponents.astype(np.float64)).astype(np.float32)

    def judge(out: dict[str, np.ndarray]) -> tuple[bool, str]:
        far = {
            "/": ulps(out["quotient"], x / y),
            "sqrt": ulps(out["square_root"], square_roots),
            "fast exp2": ulps(out["fast_power"], powers),
            "precise exp2": ulps(out["precise_power"], powers),
        }
        text = ", ".join(f"{name} {d.max()} ulp ({(d > 0).sum()} of {n})" for name, d in far.items())
        # Bytes need exact / and sqrt. An error of e ulp in the weights is 2 e 2^-24 of an output: 83 ulp are 1e-5.
        return bool(far["/"].max() == 0 and far["sqrt"].max() == 0 and far["fast exp2"].max() <= 83), text

    source = """
    uint i = thread_position_in_grid.x;
    quotient[i] = x[i] / y[i];
    square_root[i] = metal::precise::sqrt(x[i]);
    fast_power[i] = metal::fast::exp2(exponents[i]);
    precise_power[i] = metal::precise::exp2(exponents[i]);
"""
    outputs = dict.fromkeys(("quotient", "square_root", "fast_power", "precise_power"), ((n,), mx.float32))
    return Probe("rounding", n, source, {"x": x, "y": y, "exponents": exponents}, outputs, judge)


def _reductions() -> Probe:
    x = np.tile(np.arange(32, dtype=np.float32), (5, 1))
    x[1] = -np.inf
    x[2], x[2, 7] = -np.inf, 3.0
    x[3, 9] = np.nan
    x[4], x[4, 9] = -np.inf, np.nan

    def judge(out: dict[str, np.ndarray]) -> tuple[bool, str]:
        top, total, votes = out["top"], out["total"], out["votes"]
        wrong = [
            name
            for name, right in (
                ("max of numbers", top[0] == 31),
                ("sum of numbers", total[0] == 496),
                ("max of -inf", np.isneginf(top[1])),
                ("max of -inf and 3", top[2] == 3),
                ("sum of NaN", np.isnan(total[3]) and np.isnan(total[4])),
                ("or", (votes == ((x >= 0) << np.arange(32)).sum(1)).all()),
                ("== -inf", (out["infinite"].reshape(5, 32) == np.isneginf(x)).all()),
                ("isnan", (out["strange"].reshape(5, 32) == np.isnan(x)).all()),
            )
            if not right
        ]
        text = f"max of 0 ... 31 and NaN is {top[3]:g}, of -inf and NaN {top[4]:g}; wrong: {', '.join(wrong) or 'none'}"
        return not wrong, text

    source = """
    uint i = thread_position_in_grid.x;
    uint lane = thread_index_in_simdgroup;
    float v = x[i];
    float largest = metal::simd_max(v);
    float sum = metal::simd_sum(v);
    uint word = metal::simd_or(v >= 0.0f ? 1u << lane : 0u);
    infinite[i] = v == -INFINITY ? 1 : 0;
    strange[i] = metal::isnan(v) ? 1 : 0;
    if (lane == 0) {
      top[i / 32] = largest;
      total[i / 32] = sum;
      votes[i / 32] = word;
    }
"""
    outputs = {
        "top": ((5,), mx.float32),
        "total": ((5,), mx.float32),
        "votes": ((5,), mx.uint32),
        "infinite": ((160,), mx.uint8),
        "strange": ((160,), mx.uint8),
    }
    return Probe("-inf and NaN", 160, source, {"x": x}, outputs, judge)


def _float_subnormals() -> Probe:
    x = (np.arange(1, 1025, dtype=np.uint32) * 8191).view(np.float32)

    def judge(out: dict[str, np.ndarray]) -> tuple[bool, str]:
        zeros, kept = int((out["y"] == 0).sum()), len(x) - _unequal(out["y"], x)
        # Nothing relies on them: vectors below 1e-38 only lose accuracy.
        return zeros + kept == len(x), f"{zeros} of 1024 flushed, {kept} kept"

    source = "    uint i = thread_position_in_grid.x;\n    y[i] = x[i] * one[i];\n"
    inputs = {"x": x, "one": np.ones(1024, np.float32)}
    return Probe("float subnormals", 1024, source, inputs, {"y": ((1024,), mx.float32)}, judge)


def _variable_index() -> Probe:
    rng = np.random.default_rng(3)
    x, at = rng.normal(size=(256, 8)).astype(np.float32), rng.integers(0, 8, 256).astype(np.uint32)

    def judge(out: dict[str, np.ndarray]) -> tuple[bool, str]:
        wrong = _unequal(out["picked"], x[np.arange(256), at])
        kept = _unequal(out["kept"], np.where(np.arange(8) == at[:, None], x + 1, x))
        return wrong + kept == 0, f"{wrong} of 256 reads and {kept} of 2048 writes wrong"

    source = """
    uint i = thread_position_in_grid.x;
    float numbers[8];
    for (uint j = 0; j < 8; j++) numbers[j] = x[8 * i + j];
    picked[i] = numbers[at[i]];
    numbers[at[i]] += 1.0f;
    for (uint j = 0; j < 8; j++) kept[8 * i + j] = numbers[j];
"""
    outputs = {"picked": ((256,), mx.float32), "kept": ((256, 8), mx.float32)}
    return Probe("variable index", 256, source, {"x": x, "at": at}, outputs, judge)


PROBES = (
    _half_subnormals,
    _matrix_lanes,
    _contraction,
    _rounding,
    _reductions,
    _float_subnormals,
    _variable_index,
)


def ask_metal(probe: Probe) -> dict[str, np.ndarray]:
    """The probe's outputs, from a kernel that the system compiles now."""
    kernel = mx.fast.metal_kernel(
        name="tqext_probe_" + "".join(c if c.isalnum() else "_" for c in probe.name),
        input_names=list(probe.inputs),
        output_names=list(probe.outputs),
        source=probe.source,
        header=probe.header,
    )
    arrays = kernel(  # type: ignore[operator]
        inputs=[mx.array(x) for x in probe.inputs.values()],
        grid=(probe.threads, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[shape for shape, _ in probe.outputs.values()],
        output_dtypes=[dtype for _, dtype in probe.outputs.values()],
    )
    return {name: np.array(x) for name, x in zip(probe.outputs, arrays, strict=True)}


def probes(ask: Callable[[Probe], dict[str, np.ndarray]] = ask_metal) -> Json:
    """Every probe's answer; one that fails to compile is an answer too."""
    out: Json = {}
    for make in PROBES:
        probe = make()
        try:
            held, text = probe.judge(ask(probe))
        except Exception as error:  # a compiler's message is what is looked for
            held, text = False, f"{type(error).__name__}: {error}"
        out[probe.name] = {"held": held, "answer": text}
    return out


# --- problems ------------------------------------------------------------------------------------------------------------


def _keys_of(recipe: Recipe, k: mx.array, balance: mx.array | None, stream: Any = None) -> tqext.PackedKeys:
    means = tqext.block_means(k) if recipe.means else None
    return tqext.quantize_keys(k, bits=recipe.key_bits, means=means, balance=balance, qjl=recipe.qjl, stream=stream)


def _attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool) -> np.ndarray:
    """float64 attention, [batch, heads, tokens, dim]."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, repeats, axis=1) for x in (k, v))
    scores = q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        n, m = scores.shape[-2:]
        scores = np.where(np.arange(m) <= m - n + np.arange(n)[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def _float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def _problem(seed: int, dtype: mx.Dtype, kernel: int | None = None) -> Json:
    """One random call: unequal bytes of what the GPU packs, and the error of attention.

    Args:
        seed: of the data, and of how many tokens and heads there are.
        dtype: of queries, keys and values.
        kernel: seed of what a kernel is compiled for; None: `seed`.
    """
    rng, cpu = np.random.default_rng(seed), mx.Device(mx.cpu)
    compiled = np.random.default_rng([1, seed if kernel is None else kernel])

    def choose(*options: Any, by: np.random.Generator = compiled) -> Any:
        return options[int(by.integers(len(options)))]

    dim, repeats, n_queries = choose(64, 80, 128, 256), choose(1, 2, 4, 8), choose(1, 1, 1, 4)
    n_coded, n_exact, heads = int(rng.integers(1, 700)), choose(0, 64, 100, by=rng), choose(1, 2, by=rng)
    key_bits, (coding, value_bits) = choose(2, 3, 4), choose(("groups", 2), ("groups", 4), ("lloyd", 3), ("lloyd", 4))

    def draw(n_heads: int, n: int) -> mx.array:
        return mx.array(rng.normal(size=(1, n_heads, n, dim)).astype(np.float32)).astype(dtype)

    k, v, q = draw(heads, n_coded), draw(heads, n_coded), draw(heads * repeats, n_queries)
    balance = mx.array(np.exp2(rng.uniform(-2, 2, (heads, dim))).astype(np.float32)) if choose(0, 1) else None
    means = tqext.block_means(k, stream=cpu) if choose(0, 1) else None

    def pack(stream: Any) -> tuple[tqext.PackedKeys, tqext.PackedValues]:
        keys = tqext.quantize_keys(k, bits=key_bits, means=means, balance=balance, stream=stream)
        return keys, tqext.quantize_values(v, bits=value_bits, coding=coding, stream=stream)

    (keys, values), gpu = pack(cpu), pack(None)
    unequal = {}
    for name, one, other in (
        ("key codes", keys.codes, gpu[0].codes),
        ("key norms", keys.norms, gpu[0].norms),
        ("value codes", values.codes, gpu[1].codes),
        ("value params", values.params, gpu[1].params),
    ):
        a, b = (np.ascontiguousarray(np.array(x)).view(np.uint8) for x in (one, other))
        unequal[name] = [int((a != b).sum()), a.size]

    exact = (draw(heads, n_exact), draw(heads, n_exact)) if n_exact else None
    mask = "causal" if n_queries > 1 and n_exact else None
    got = tqext.turboquant_attention(q, keys, values, tail=exact, mask=mask)
    plain_k, plain_v = (_float64(tqext.dequantize(x, stream=cpu)) for x in (keys, values))
    if exact:
        plain_k, plain_v = (np.concatenate([a, _float64(b)], 2) for a, b in zip((plain_k, plain_v), exact, strict=True))
    want = _attention(_float64(q), plain_k, plain_v, mask is not None)
    return {"unequal": unequal, "error": float(np.abs(_float64(got) - want).max() / np.abs(want).max())}


def parity(plan: Plan) -> Json:
    """Packed bytes on the GPU compared with the CPU's, and attention compared with float64, `plan.problems` per dtype."""
    kernels = CUDA_KERNELS["quick" if plan is QUICK else "full"] if backend() == "cuda" else plan.problems
    end = time.perf_counter() + plan.parity_seconds
    of_dtype: dict[str, list[Json]] = {name: [] for name in DTYPES}
    for seed in range(plan.problems):
        for name, dtype in DTYPES.items():
            of_dtype[name].append(_problem(seed, dtype, seed % kernels))
        if time.perf_counter() > end:
            break
    out: Json = {}
    for name, problems in of_dtype.items():
        counts = {}
        for part in problems[0]["unequal"] if backend() != "cpu" else ():  # the CPU equals itself
            pairs = [x["unequal"][part] for x in problems]
            counts[part] = {"unequal": sum(x[0] for x in pairs), "bytes": sum(x[1] for x in pairs)}
        tolerance = max(TOLERANCE[name], CUDA_TOLERANCE) if backend() == "cuda" else TOLERANCE[name]
        errors = [x["error"] for x in problems]
        largest = max(errors) if all(np.isfinite(errors)) else float("inf")
        out[name] = {
            "problems": len(problems),
            "wanted": plan.problems,
            "error": largest,
            "tolerance": tolerance,
            "held": largest <= tolerance and not any(x["unequal"] for x in counts.values()),
            "bytes_unequal": counts,
        }
    return out


# --- first use -----------------------------------------------------------------------------------------------------------


def first_use(plan: Plan) -> Json:
    """Milliseconds of the first and of a later call of each kernel, and on Metal what the system says of each pipeline."""
    calls: dict[str, float] = {}
    for dim, rows, (bits, value_bits, coding) in product(plan.dims, plan.rows, ((3, 2, "groups"), (3, 3, "lloyd"))):
        x = mx.random.normal((1, 1, 1024, dim), key=mx.random.key(0)).astype(mx.float16)
        q = mx.random.normal((1, rows, 1, dim), key=mx.random.key(1)).astype(mx.float16)
        keys = tqext.quantize_keys(x, bits=bits, means=tqext.block_means(x), balance=mx.ones((1, dim)))
        values = tqext.quantize_values(x, bits=value_bits, coding=coding)
        mx.eval(q, [a for a in (*keys, *values) if isinstance(a, mx.array)])
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            mx.eval(tqext.turboquant_attention(q, keys, values))
            seconds.append(time.perf_counter() - start)
        calls[f"attention d{dim} rows {rows} k{bits}v{value_bits} {coding}"] = round(1e3 * (seconds[0] - seconds[1]), 3)
    weight, scales = tqext.q1_quantize(mx.random.normal((512, 256), key=mx.random.key(2)))
    mx.eval([tqext.q1_matmul(mx.ones((n, 256)), weight, scales) for n in (1, 2, 4, 8, 64)], tqext.q1_dequantize(weight, scales))
    return {"extra_ms_of_the_first_call": calls, "pipelines": _ext.pipelines()}


# --- speed ---------------------------------------------------------------------------------------------------------------


def _median_ms(calls: dict[str, Callable[[mx.array], mx.array]], q: mx.array, seconds: float) -> dict[str, float]:
    """Median milliseconds of each call, in turns. Calls are chained, each on the last one's output, so that they cannot overlap
    and what a launch costs the host is hidden, as in a model."""

    def run(call: Callable[[mx.array], mx.array], count: int) -> float:
        start, x = time.perf_counter(), q
        for _ in range(count):
            x = call(x)
        mx.eval(x)
        return (time.perf_counter() - start) / count

    counts = {}
    for name, call in calls.items():
        run(call, 1)
        counts[name] = min(32, max(1, int(0.02 / run(call, 1))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while len(times[next(iter(calls))]) < 9:
        for name, call in calls.items():
            times[name].append(run(call, counts[name]))
        if time.perf_counter() > end:
            break
    return {name: round(1e3 * statistics.median(x), 4) for name, x in times.items()}


def _speed_row(n_keys: int, repeats: int, n_queries: int, recipe: Recipe, seconds: float) -> Json:
    mx.random.seed(0)
    shape, scale = (1, N_KV_HEADS, n_keys, HEAD_DIM), HEAD_DIM**-0.5
    dtype = mx.float16 if backend() != "cpu" else mx.float32  # MLX's fp16 is slow there
    k, v = (mx.random.normal(shape, dtype=dtype) for _ in range(2))
    q = mx.random.normal((1, N_KV_HEADS * repeats, n_queries, HEAD_DIM), dtype=dtype)
    keys = _keys_of(recipe, k, mx.ones((N_KV_HEADS, HEAD_DIM)) if recipe.balance else None)
    values = tqext.quantize_values(v, bits=recipe.value_bits, coding=recipe.value_coding)
    mask: Any = "causal" if n_queries > 1 else None
    calls: dict[str, Callable[[mx.array], mx.array]] = {
        "tqext": lambda x: tqext.turboquant_attention(x, keys, values, scale=scale, mask=mask),
        "mx.fast": lambda x: mx.fast.scaled_dot_product_attention(x, k, v, scale=scale, mask=mask),
    }
    try:
        from mlx_lm.models.base import quantized_scaled_dot_product_attention as quantized

        qk, qv = (mx.quantize(x, group_size=64, bits=4) for x in (k, v))
        mx.eval(qk, qv)
        # It scales its queries in place.
        calls["mlx-lm 4 bit"] = lambda x: quantized(x + 0, qk, qv, scale, mask, group_size=64, bits=4)
    except ImportError:
        pass  # the row says so by having no such time
    mx.eval(q, k, v, [a for a in (*keys, *values) if isinstance(a, mx.array)])
    return {
        "n_keys": n_keys,
        "query_heads": repeats,
        "n_queries": n_queries,
        "dtype": str(dtype).rpartition(".")[2],
        "ms": _median_ms(calls, q, seconds),
        "MB": {"tqext": round((keys.nbytes + values.nbytes) / 1e6, 1), "mx.fast": round((k.nbytes + v.nbytes) / 1e6, 1)},
    }


def speed(plan: Plan) -> Json:
    """Attention of one layer beside mx.fast in fp16 (fp32 on the CPU) and mlx-lm's quantised path.

    What would not fit the memory or the time is left out, and named.
    """
    recipe = get_policy(DEFAULT_PRESET).recipe
    rows, left_out = [], []
    info: Any = mx.device_info()
    room = info.get("max_recommended_working_set_size") or info.get("memory_size") or 0
    end = time.perf_counter() + plan.speed_seconds
    rate = 0.0  # seconds of one call of each line, per key and query, as last measured
    wanted = [(n, r, 1) for n, r in product(plan.lengths, plan.query_heads)] + [(n, 4, m) for n, m in plan.prompts]
    for i, (n_keys, repeats, n_queries) in enumerate(wanted):
        name = f"{n_keys} tokens, {repeats} query heads, {n_queries} queries"
        # Keys and values as they are, packed, quantised, and while they are drawn and packed.
        need = 5 * 2 * N_KV_HEADS * n_keys * HEAD_DIM * (4 if backend() == "cpu" else 2)
        left = end - time.perf_counter()
        if 3 * rate * n_keys * repeats * n_queries > left:  # two calls to warm up and one to measure
            left_out.append(f"{name}: no time left")
        elif 0 < room < need:
            left_out.append(f"{name}: needs {need / 1e9:.1f} GB")
        else:
            rows.append(_speed_row(n_keys, repeats, n_queries, recipe, left / (len(wanted) - i)))
            rate = sum(rows[-1]["ms"].values()) / 1e3 / (n_keys * repeats * n_queries)
            mx.clear_cache()
    return {"preset": DEFAULT_PRESET, "n_kv_heads": N_KV_HEADS, "head_dim": HEAD_DIM, "rows": rows, "left_out": left_out}


def bandwidth(plan: Plan) -> Json:
    """GB/s of copying, read and written bytes together."""
    x = mx.zeros((plan.bandwidth_bytes // 4,))
    mx.eval(x)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        y = x
        for _ in range(4):
            y = y + 1.0
            mx.eval(y)
        best = max(best, 4 * 2 * x.nbytes / (time.perf_counter() - start))
    return {"copy_gb_per_s": round(best / 1e9, 1), "bytes": x.nbytes}


# --- the report ----------------------------------------------------------------------------------------------------------


def _part(report: Json, name: str, make: Callable[[], Json]) -> None:
    """One part of the report; an error in it is a finding, and the other parts go on."""
    print(f"{name} ...", flush=True)
    start = time.perf_counter()
    try:
        report[name] = make()
    except Exception as error:  # whatever it is, it is what the report is for
        report[name] = {"failed": f"{type(error).__name__}: {error}"}
    report["seconds"][name] = round(time.perf_counter() - start, 1)


def prove(plan: Plan, ask: Callable[[Probe], dict[str, np.ndarray]] | None = None) -> Json:
    """The whole report.

    Args:
        plan: how much is asked.
        ask: what answers the probes; None: the GPU where there is Metal, else nothing.
    """
    report: Json = {"tqext_proof": VERSION, "quick": plan is QUICK, "seconds": {}}
    end = time.perf_counter() + plan.seconds
    if ask is None and backend() == "metal":
        ask = ask_metal
    _part(report, "facts", facts)
    _part(report, "probes", lambda: probes(ask) if ask else {})
    _part(report, "first use", lambda: first_use(plan))
    _part(report, "parity", lambda: parity(plan))
    if "failed" not in report["first use"]:
        report["first use"]["pipelines"] = _ext.pipelines()  # with those of every dtype
    _part(report, "bandwidth", lambda: bandwidth(plan))
    left = max(plan.speed_seconds / 4, end - time.perf_counter())
    _part(report, "speed", lambda: speed(replace(plan, speed_seconds=min(plan.speed_seconds, left))))
    return report


def findings(report: Json) -> dict[str, bool]:
    """What was asked and whether it held."""
    out = {}
    for name in ("facts", "first use", "bandwidth", "speed"):
        out[name] = "failed" not in report[name]
    for part in ("probes", "parity"):
        if "failed" in report[part]:
            out[part] = False
        else:
            out |= {f"{part}: {name}": bool(x["held"]) for name, x in report[part].items()}
    return out


def headline(report: Json) -> str:
    """The one line."""
    held = findings(report)
    wrong = [name for name, ok in held.items() if not ok]
    text = f"PROVED {len(held) - len(wrong)}/{len(held)}" + (f", NOT: {', '.join(wrong)}" if wrong else "")
    rows = [x for x in report["speed"].get("rows", ()) if x["n_queries"] == 1]
    if rows:
        row = max(rows, key=lambda x: (x["n_keys"], x["query_heads"] == 4))
        times = row["ms"]["mx.fast"] / row["ms"]["tqext"]
        where = f"{row['n_keys']} tokens, {row['query_heads']} query heads per KV head"
        text += f"; attention {times:.2f}x as fast as mx.fast {row['dtype']} at {where}"
    return text


def block(report: Json) -> str:
    """The text for an issue, without its fence."""
    lines = [f"tqext doctor --prove{' --quick' if report['quick'] else ''}, report {VERSION}"]

    def line(name: str, text: object) -> None:
        # A compiler's message has many lines; a fence in it would end the block.
        lines.append(f"{name:<17} " + " / ".join(str(text).replace("```", "'''").splitlines())[:400])

    for name in ("facts", "probes", "first use", "parity", "bandwidth", "speed"):
        if "failed" in report[name]:
            line(name, f"FAILED: {report[name]['failed']}")
    if "failed" not in (f := report["facts"]):
        device = f["device"]
        cores = f", {f['gpu_cores']} GPU cores" if f.get("gpu_cores") else ""
        line("device", f"{f['backend']}: {device.get('device_name', '?')}, {device.get('architecture', '?')}{cores}")
        line("system", f"{f['system']}, MLX wheel {' '.join(f['mlx_wheel'])}")
        line("versions", ", ".join(f"{k} {v}" for k, v in f["versions"].items()))
        if "kernels" in f:
            line("kernels", f"{f['kernels']}; compiler: {f['metal_compiler']}")
    if not report["probes"]:
        line("probes", "none: they are for Metal")
    elif "failed" not in report["probes"]:
        for name, x in report["probes"].items():
            line(name, f"{'ok' if x['held'] else 'NOT AS ASSUMED'}: {x['answer']}")
    if "failed" not in (u := report["first use"]):
        extra = u["extra_ms_of_the_first_call"]
        slowest = max(extra, key=extra.__getitem__)
        line("first use", f"{extra[slowest]:.0f} ms more at most ({slowest}), {sum(extra.values()):.0f} ms in all")
        slow = sorted(u["pipelines"], key=lambda x: (x["max_threads"], -x["ms"]))
        if slow:
            line("pipelines", f"{len(slow)}, {sum(x['ms'] for x in slow):.0f} ms in all; those of the most registers:")
        for x in slow[:N_SHOWN]:
            line(
                "pipeline",
                f"{x['name']}: {x['ms']:.1f} ms, {x['max_threads']} threads at most, {x['threads']} launched, "
                f"{x['threadgroup_bytes']} static bytes",
            )
    if "failed" not in report["parity"]:
        for name, x in report["parity"].items():
            counts = ", ".join(f"{part} {c['unequal']}/{c['bytes']}" for part, c in x["bytes_unequal"].items()) or "no GPU"
            held = "ok" if x["held"] else "NOT"
            problems = (
                f"{x['problems']} problems" if x["problems"] == x["wanted"] else f"{x['problems']} of {x['wanted']} problems"
            )
            line(name, f"{held}: error {x['error']:.1e} (of {x['tolerance']:.1e}), {problems}, unequal: {counts}")
    if "failed" not in (b := report["bandwidth"]):
        line("copy", f"{b['copy_gb_per_s']} GB/s")
    if "failed" not in (s := report["speed"]):
        names = list(dict.fromkeys(name for row in s["rows"] for name in row["ms"]))
        line(f"ms, {s['preset']}", f"{'tokens':>7} {'heads':>5} {'queries':>7} " + " ".join(f"{x:>12}" for x in names))
        for row in s["rows"]:
            times = " ".join(f"{row['ms'][x]:>12.3f}" if x in row["ms"] else f"{'-':>12}" for x in names)
            line("", f"{row['n_keys']:>7} {row['query_heads']:>5} {row['n_queries']:>7} {times}")
        for text in s["left_out"]:
            line("left out", text)
    line("seconds", ", ".join(f"{k} {v}" for k, v in report["seconds"].items()))
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """The command; exits with status 1 if anything did not hold."""
    parser = ArgumentParser(prog="tqext doctor --prove", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few problems and short contexts: for CI")
    parser.add_argument("--json", type=Path, default=Path("tqext-proof.json"), help="file of all figures (%(default)s)")
    args = parser.parse_args(argv)
    report = prove(QUICK if args.quick else FULL)
    args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"all figures: {args.json}")
    print(headline(report))
    digest = hashlib.sha256(args.json.read_bytes()).hexdigest()
    print(f"```text\n{headline(report)}\n{block(report)}\nSHA-256 of the JSON {digest}\n```")
    raise SystemExit(0 if all(findings(report).values()) else 1)

"""The operators of tqext on the simulated GPU: MLX arrays in, MLX arrays out.

The launch comes from metal/dispatch_plan.h, the same functions as in the Metal host code; only the binding of arrays to
buffer indices is repeated here.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import re
import subprocess

import cost
import metal_simulator as sim
import mlx.core as mx
import numpy as np

from tqext import PackedValues

ROOT = sim.HERE.parents[1]
INCLUDES = [ROOT / "metal", ROOT / "csrc"]
TYPES = [mx.float32, mx.float16, mx.bfloat16]


@functools.cache
def header_enums(*names: str) -> dict[str, int]:
    """Enumerators of the headers that Metal and the host share, by name."""
    values: dict[str, int] = {}
    for name in names:
        text = re.sub(r"//[^\n]*", "", (ROOT / "csrc" / name).read_text())
        for body in re.findall(r"enum\s*\w*\s*(?::\s*int)?\s*{([^}]*)}", text):
            following = 0
            for item in filter(None, (x.strip() for x in body.split(","))):
                key, _, value = (x.strip() for x in item.partition("="))
                values[key] = int(value, 0) if value else following
                following = values[key] + 1
    return values


ENUM = header_enums("params.h", "q1_params.h", "format.h")

STRIDES4, STRIDES3, STRIDES2 = ctypes.c_int64 * 4, ctypes.c_int64 * 3, ctypes.c_int64 * 2


class AttentionShape(ctypes.Structure):
    _fields_ = (
        [
            (name, ctypes.c_int32)
            for name in [
                "type",
                "batch",
                "n_q_heads",
                "n_kv_heads",
                "n_queries",
                "head_dim",
                "value_dim",
                "n_first",
                "n_coded",
                "n_tail",
                "key_bits",
                "value_bits",
                "value_coding",
                "hadamard",
                "causal",
                "means_kind",
                "has_balance",
                "has_residual",
                "mask_kind",
                "has_sinks",
                "has_left_padding",
                "has_lengths",
                "latent",
                "has_indices",
                "n_listed",
                "n_lists",
                "n_cores",
            ]
        ]
        + [("scale", ctypes.c_float)]
        + [
            (name, STRIDES4)
            for name in ["q", "means", "first_keys", "first_values", "tail_keys", "tail_values", "mask", "indices"]
        ]
        + [
            (name, STRIDES3)
            for name in ["key_codes", "key_norms", "key_signs", "residual_norms", "value_codes", "value_params"]
        ]
        + [("balance", STRIDES2)]
    )


class EncodeShape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ["type", "batch", "n_heads", "n_tokens", "head_dim", "bits", "flags"]] + [
        ("in_", STRIDES4),
        ("means", STRIDES4),
        ("in_params", STRIDES3),
        ("balance", STRIDES2),
    ]


@functools.cache
def plans() -> ctypes.CDLL:
    """metal/dispatch_plan.h, compiled for this machine."""
    sim.require_clang()
    sources = [sim.HERE / "plan_api.cpp", *sorted((ROOT / "metal").glob("*.h")), *sorted((ROOT / "csrc").glob("*.h"))]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    sim.BUILD.mkdir(parents=True, exist_ok=True)
    path = sim.BUILD / f"plan.{key}.so"
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}")
        flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
        includes = [f"-I{folder}" for folder in INCLUDES]
        subprocess.run([sim.CLANG, *flags, *includes, str(sources[0]), "-o", str(part)], check=True)
        part.replace(path)
    lib = ctypes.CDLL(str(path))
    lists = "tq_pipelines_of_a_generation", "tq_pipelines_of_a_layer"
    for name in (*lists, "tq_plan_attention", "tq_plan_encode", "tq_plan_compact", "tq_plan_q1"):
        getattr(lib, name).restype = ctypes.c_char_p
    for ours, theirs in ((AttentionShape, "tq_sizeof_attention_shape"), (EncodeShape, "tq_sizeof_encode_shape")):
        if ctypes.sizeof(ours) != getattr(lib, theirs)():
            raise RuntimeError(f"{ours.__name__}: expected {getattr(lib, theirs)()} bytes as in dispatch_plan.h")
    return lib


class Device:
    """How the simulated GPU runs the operators, and what it did since `reset`.

    Attributes:
        mode: `fast` or `check`.
        schedule: order of threads and threadgroups (`metal_simulator`).
        seed: of random schedules.
        n_cores: GPU cores that the plan spreads the work over.
        kernel: of attention (`KERNELS`) instead of the one that the plan chooses.
        log: (kernel name, counters) of each dispatch.
    """

    def __init__(self, mode="fast", schedule=sim.IN_ORDER, seed=0, n_cores=10, kernel=None):
        self.mode, self.schedule, self.seed, self.n_cores, self.kernel = mode, schedule, seed, n_cores, kernel
        self.sources: dict[str, str] = {}  # texts that replace those of metal/*.metal, by name: for the mutation tests
        self.spared: tuple[str, ...] = ()  # macros of kernels that are compiled from metal/*.metal all the same
        self.log: list[tuple[str, sim.Stats]] = []

    def reset(self) -> None:
        self.log = []

    @functools.cache  # noqa: B019 - devices live as long as the tests
    def library(self, source: str, instance: str, mode: str, text: str | None) -> sim.Library:
        body = text if text is not None else f'#include "{source}.metal"'
        return sim.build(f"{body}\n{instance}\n", includes=INCLUDES, mode=mode)

    def dispatch(self, plan: dict, buffers: dict) -> sim.Stats:
        text = None if plan["instance"].startswith(self.spared) else self.sources.get(plan["source"])
        stats = self.library(plan["source"], plan["instance"], self.mode, text).run(
            plan["kernel"],
            buffers,
            plan["grid"],
            (plan["threads"],),
            constants=plan.get("constants"),
            threadgroup_memory=dict(enumerate(plan["threadgroup_bytes"])),
            seed=self.seed,
            schedule=self.schedule,
        )
        self.log.append((plan["kernel"], stats))
        return stats


def as_numpy(x: mx.array | np.ndarray) -> np.ndarray:
    """The array's memory with its strides, not a copy; bfloat16 as uint16."""
    if isinstance(x, np.ndarray):
        return x
    return np.asarray(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)


def buffer_of(x: np.ndarray) -> np.ndarray:
    """The bytes from the first to the last element of a view, with what lies between its rows."""
    n_bytes = x.itemsize + sum((n - 1) * step for n, step in zip(x.shape, x.strides, strict=True))
    return np.frombuffer((ctypes.c_uint8 * n_bytes).from_address(x.ctypes.data), np.uint8)


def strides(x: np.ndarray, n: int, unit: int | None = None):
    """The first n strides in elements, or in `unit` bytes."""
    steps = [step // (unit or x.itemsize) for step in x.strides]
    return {4: STRIDES4, 3: STRIDES3, 2: STRIDES2}[n](*steps[:n])


def means_of(means, batch: int, n_kv_heads: int, n_tokens: int) -> tuple[np.ndarray, bool]:
    """Means of blocks as the op hands them to the kernels [batch, n_kv_heads, n_blocks, D], and whether they are fp32."""
    array = as_numpy(means)
    shape = batch, n_kv_heads, -(-n_tokens // ENUM["kBlockTokens"]), array.shape[-1]
    return np.broadcast_to(array, shape), array.dtype == np.float32


def _empty(n_numbers: int) -> sim.Output:
    return sim.Output((max(1, n_numbers),), np.float32)


def _to_mx(x: np.ndarray, dtype: mx.Dtype) -> mx.array:
    return mx.array(x).view(dtype) if dtype == mx.bfloat16 else mx.array(x)


def _mx_type(x) -> mx.Dtype:
    """Of an MLX array, or of a NumPy view that is float32 or float16."""
    return x.dtype if isinstance(x, mx.array) else mx.float32 if x.dtype == np.float32 else mx.float16


def _numpy_type(dtype: mx.Dtype):
    return {mx.float32: np.float32, mx.float16: np.float16, mx.bfloat16: np.uint16}[dtype]


def packed_input(device, x) -> np.ndarray:
    """As in metal/launch.cpp: the array, or a contiguous copy by the kernel for arrays whose last axis is strided."""
    array = as_numpy(x)
    pairs = array.shape[-1] > 1 and array.itemsize == 2
    fits = array.shape[-1] == 1 or array.strides[-1] == array.itemsize
    fits = fits and all(n == 1 or step % 4 == 0 or not pairs for n, step in zip(array.shape[:3], array.strides, strict=False))
    fits = fits and (not pairs or array.ctypes.data % 4 == 0)
    if fits or array.size == 0:
        return array
    lib, params, out = plans(), np.zeros(plans().tq_sizeof_encode_params(), np.uint8), sim.Output(array.shape, array.dtype)
    plan = json.loads(
        lib.tq_plan_compact(array.itemsize, *array.shape, strides(array, 4), params.ctypes.data_as(ctypes.c_void_p))
    )
    buffers = {"kEncodeIn": buffer_of(array), "kEncodeOut": out, "kEncodeParams": params}
    device.dispatch(plan, {ENUM[name]: value for name, value in buffers.items()})
    return out.array


KERNELS = "split", "matrix", "prompt32", "prompt64"  # in the order of AttentionKernel


def plan_attention(lib, shape, kernel: str | None = None) -> tuple[dict, np.ndarray]:
    """The plan, and the kernel's parameter struct as bytes. kernel: one of KERNELS instead of the chosen one."""
    params = np.zeros(lib.tq_sizeof_attention_params(), np.uint8)
    number = -1 if kernel is None else KERNELS.index(kernel)
    plan = json.loads(lib.tq_plan_attention(ctypes.byref(shape), number, params.ctypes.data_as(ctypes.c_void_p)))
    return plan, params


def attention_cycles(shape: AttentionShape) -> dict[str, float]:
    """Core cycles of each kernel by the plan's cost model, infinite for one that does not take the shape."""
    cycles = (ctypes.c_double * len(KERNELS))()
    plans().tq_attention_cycles(ctypes.byref(shape), cycles)
    return dict(zip(KERNELS, cycles, strict=True))


def kernel_figures(kernel: str, dims: int, rows: int = 0) -> dict[str, int]:
    """KernelFigures of dispatch_plan.h for keys and values of `dims` dimensions together."""
    names = "dims", *cost.Figures.__dataclass_fields__
    figures = (ctypes.c_int * len(names))()
    plans().tq_kernel_figures(KERNELS.index(kernel), rows, dims, figures)
    return dict(zip(names, figures, strict=True))


def has_kernel(q, packed_k, packed_v) -> bool:
    """Whether the Metal backend runs the attention kernels for these shapes; otherwise the op is composed."""
    value_dim = packed_v.head_dim or packed_v.codes.shape[-1] * 32 // packed_v.bits
    return packed_k.rotation != "orthogonal" and bool(
        plans().tq_has_attention_kernel(q.shape[3], value_dim, packed_k.rotation == "hadamard")
    )


def has_latent_kernel(q) -> bool:
    """Whether the Metal backend runs the kernel of latents for these queries."""
    return bool(plans().tq_has_latent_kernel(q.shape[3], q.shape[2]))


def turboquant_attention(
    device,
    q,
    packed_k,
    packed_v,
    *,
    scale=None,
    mask=None,
    tail=None,
    sinks=None,
    first=None,
    left_padding=None,
    lengths=None,
    indices=None,
    latent=False,
):
    """`tqext.turboquant_attention` for valid arguments and rotations "hadamard" and "none".

    Packed arrays may also be NumPy views of longer buffers; q may be one when it is float32 or float16.
    latent: values are the keys, `packed_v` is `packed_k`.
    """
    dtype = _mx_type(q)
    queries = as_numpy(q)
    batch, n_q_heads, n_queries, head_dim = queries.shape
    codes, values = as_numpy(packed_k.codes), as_numpy(packed_v.codes)
    n_kv_heads, n_coded = codes.shape[1:3]
    value_dim = packed_v.head_dim or values.shape[-1] * 32 // packed_v.bits
    buffers, shape, keep = {}, AttentionShape(), []
    lib = plans()
    hadamard = packed_k.rotation == "hadamard"
    if not (has_latent_kernel(q) if latent else has_kernel(q, packed_k, packed_v)):
        raise ValueError("no kernel for these shapes: the op is composed")

    def bind(index, array):
        keep.append(array)
        buffers[ENUM[index]] = buffer_of(array) if array.size else np.zeros(4, np.uint8)

    def packed(index, name, array, unit):
        array = packed_input(device, array)
        bind(index, array)
        setattr(shape, name, strides(array, 3, unit))

    def vectors(index, name, array):
        bind(index, array)
        setattr(shape, name, strides(array, 4))

    shape.type = TYPES.index(dtype)
    shape.batch, shape.n_q_heads, shape.n_kv_heads, shape.n_queries = batch, n_q_heads, n_kv_heads, n_queries
    shape.head_dim, shape.value_dim, shape.n_coded = head_dim, value_dim, n_coded
    shape.key_bits, shape.value_bits, shape.hadamard = packed_k.bits, packed_v.bits, hadamard
    lloyd = packed_v.coding == "lloyd"
    shape.value_coding = ENUM["kValueLloyd" if lloyd else "kValueGroups"]
    shape.causal, shape.n_cores, shape.latent = isinstance(mask, str), device.n_cores, latent
    shape.scale = scale if scale is not None else head_dim**-0.5
    vectors("kAttentionQueries", "q", queries)
    packed("kAttentionKeyCodes", "key_codes", packed_k.codes, 4)
    packed("kAttentionKeyNorms", "key_norms", packed_k.norms, 2)
    packed("kAttentionValueCodes", "value_codes", packed_v.codes, 4)
    packed("kAttentionValueParams", "value_params", packed_v.params, 2 if lloyd else 4)
    if packed_k.means is not None and n_coded > 0:
        means, is_float = means_of(packed_k.means, batch, n_kv_heads, n_coded)
        shape.means_kind = ENUM["kMeansFloat" if is_float else "kMeansHalf"]
        vectors("kAttentionMeans", "means", means)
    if packed_k.balance is not None:
        balance = as_numpy(packed_k.balance)
        bind("kAttentionBalance", balance)
        shape.has_balance, shape.balance = 1, strides(balance, 2)
    if packed_k.signs is not None:
        shape.has_residual = 1
        packed("kAttentionKeySigns", "key_signs", packed_k.signs, 4)
        packed("kAttentionResidualNorms", "residual_norms", packed_k.residual_norms, 2)
    for name, tokens in (("first", first), ("tail", tail)):
        if tokens is None or tokens[0].shape[2] == 0:
            continue
        k, v = (as_numpy(x.astype(dtype)) if isinstance(x, mx.array) else x for x in tokens)
        setattr(shape, f"n_{name}", k.shape[2])
        vectors(f"kAttention{name.capitalize()}Keys", f"{name}_keys", k)
        vectors(f"kAttention{name.capitalize()}Values", f"{name}_values", v)
    if mask is not None and not isinstance(mask, str):
        array = as_numpy(mask if mask.dtype in (mx.bool_, np.bool_) else mask.astype(mx.float32))
        n_keys = shape.n_first + n_coded + shape.n_tail
        array = np.broadcast_to(array, (batch, n_q_heads, n_queries, n_keys))
        shape.mask_kind = ENUM["kMaskBool"] if array.dtype == np.bool_ else ENUM["kMaskFloat"]
        vectors("kAttentionMask", "mask", array)
    for name, array, kind in (
        ("Sinks", sinks, mx.float32),
        ("LeftPadding", left_padding, mx.int32),
        ("Lengths", lengths, mx.int32),
    ):
        if array is not None:
            bind(f"kAttention{name}", as_numpy(array.astype(kind) if isinstance(array, mx.array) else array))
    if indices is not None:
        array = as_numpy(indices)
        bind("kAttentionIndices", array)
        steps = [0 if n == 1 else step // 4 for n, step in zip(array.shape, array.strides, strict=True)]
        shape.has_indices, shape.n_lists, shape.n_listed, shape.indices = 1, *array.shape[2:], STRIDES4(*steps)
    shape.has_sinks, shape.has_left_padding, shape.has_lengths = (
        sinks is not None,
        left_padding is not None,
        lengths is not None,
    )

    out = sim.Output((batch, n_q_heads, n_queries, value_dim), _numpy_type(dtype))
    if out.array.size == 0:
        return _to_mx(out.array, dtype)
    plan, params = plan_attention(lib, shape, device.kernel)
    parts, states = _empty(plan["part_numbers"]), _empty(plan["state_numbers"])
    buffers[ENUM["kAttentionParams"]] = params
    for step, dispatch in enumerate(plan["dispatches"]):
        last = step + 1 == len(plan["dispatches"])
        scratch = (parts.array, states.array) if step else (parts, states)
        buffers |= {ENUM["kAttentionParts"]: scratch[0], ENUM["kAttentionStates"]: scratch[1]}
        if last:
            buffers[ENUM["kAttentionOut"]] = out
        device.dispatch(dispatch, buffers)
    return _to_mx(out.array, dtype)


def latent_attention(device, q, packed, *, scale, mask=None, q_rope=None, k_rope=None, first=None, tail=None):
    """`tqext.latent_attention` for valid arguments: the scores of rotary keys go into the mask, as the operator makes them."""
    if q_rope is not None:
        repeats = q.shape[1] // k_rope.shape[1]
        k = mx.repeat(k_rope.astype(mx.float32), repeats, axis=1)
        scores = scale * q_rope.astype(mx.float32) @ k.swapaxes(-1, -2)
        if isinstance(mask, str):
            n_queries, n_keys = scores.shape[2:]
            mask = mx.arange(n_keys) <= mx.arange(n_keys - n_queries, n_keys)[:, None]
        if mask is not None:
            scores = mx.where(mask, scores, -mx.inf) if mask.dtype == mx.bool_ else mask + scores
        mask = scores
    values = PackedValues(packed.codes, packed.norms, packed.bits, packed.head_dim, "lloyd", packed.rotation)
    tokens = {name: (x, x) for name, x in (("first", first), ("tail", tail)) if x is not None}
    return turboquant_attention(device, q, packed, values, scale=scale, mask=mask, latent=True, **tokens)


ENCODE_OPS = [
    "quantize_keys",
    "quantize_values_groups",
    "quantize_values_lloyd",
    "dequantize_levels",
    "dequantize_groups",
    "rotate",
]


def plan_encode(lib, op, shape) -> tuple[dict, np.ndarray]:
    """The plan, and the kernel's parameter struct as bytes."""
    params = np.zeros(lib.tq_sizeof_encode_params(), np.uint8)
    plan = json.loads(lib.tq_plan_encode(ENCODE_OPS.index(op), ctypes.byref(shape), params.ctypes.data_as(ctypes.c_void_p)))
    return plan, params


def _encode(
    device,
    op,
    vectors_or_codes,
    dtype,
    head_dim,
    bits,
    *,
    params=None,
    means=None,
    balance=None,
    flags=0,
    outputs=(),
    unit=None,
):
    """Runs one kernel of turboquant_encode.metal on [B, H, n, last]; outputs: (buffer name, Output)."""
    lib, shape = plans(), EncodeShape()
    source = packed_input(device, vectors_or_codes) if params is not None else as_numpy(vectors_or_codes)
    shape.type, shape.head_dim, shape.bits = TYPES.index(dtype), head_dim, bits
    shape.batch, shape.n_heads, shape.n_tokens = source.shape[:3]
    shape.in_ = strides(source, 4)
    buffers = {ENUM["kEncodeIn"]: buffer_of(source)} if source.size else {}
    if params is not None:
        array = packed_input(device, params)
        shape.in_params = strides(array, 3, unit)
        if array.size:
            buffers[ENUM["kEncodeInParams"]] = buffer_of(array)
    if means is not None:
        array, is_float = means_of(means, *source.shape[:3])
        shape.means = strides(array, 4)
        buffers[ENUM["kEncodeMeanVectors"]] = buffer_of(array)
        flags |= ENUM["kEncodeMeans"] | (ENUM["kEncodeFloatMeans"] if is_float else 0)
    if balance is not None:
        array = as_numpy(balance)
        shape.balance = strides(array, 2)
        buffers[ENUM["kEncodeBalanceVectors"]] = buffer_of(array)
        flags |= ENUM["kEncodeBalance"]
    shape.flags = flags
    plan, blob = plan_encode(lib, op, shape)
    if not source.size:
        return
    buffers |= {ENUM[name]: out for name, out in outputs} | {ENUM["kEncodeParams"]: blob}
    device.dispatch(plan, buffers)


def padded(dim: int) -> int:
    return (dim + 31) // 32 * 32


def _rotation_flag(rotation: str) -> int:
    return ENUM["kEncodeHadamard"] if rotation == "hadamard" else 0


def quantize_keys(device, k, *, bits=3, means=None, balance=None, qjl=False, rotation="hadamard"):
    """codes, norms, and with `qjl` signs and residual norms."""
    lead, dim = k.shape[:3], padded(k.shape[3])
    outputs = [
        ("kEncodeOut", sim.Output((*lead, dim * bits // 32), np.uint32)),
        ("kEncodeOutParams", sim.Output((*lead, 1), np.float16)),
    ]
    if qjl:
        outputs += [
            ("kEncodeSigns", sim.Output((*lead, dim // 32), np.uint32)),
            ("kEncodeResidualNorms", sim.Output((*lead, 1), np.float16)),
        ]
    flags = _rotation_flag(rotation) | (ENUM["kEncodeResidual"] if qjl else 0)
    centre = dict(means=means, balance=balance)
    _encode(device, "quantize_keys", k, _mx_type(k), k.shape[3], bits, **centre, flags=flags, outputs=outputs)
    return [mx.array(out.array) for _, out in outputs]


def quantize_values(device, v, *, bits=2, coding="groups", rotation="hadamard"):
    """codes, params."""
    lead, dim = v.shape[:3], padded(v.shape[3])
    outputs = [
        ("kEncodeOut", sim.Output((*lead, dim * bits // 32), np.uint32)),
        ("kEncodeOutParams", sim.Output((*lead, 1 if coding == "lloyd" else dim // 16), np.float16)),
    ]
    op, flags = f"quantize_values_{coding}", _rotation_flag(rotation)
    _encode(device, op, v, v.dtype, v.shape[3], bits, flags=flags, outputs=outputs)
    return [mx.array(out.array) for _, out in outputs]


def dequantize(device, packed, *, rotated=False, dtype=mx.float32):
    """`tqext.dequantize` for rotations "hadamard" and "none"."""
    keys = hasattr(packed, "norms")
    levels = keys or packed.coding == "lloyd"
    head_dim = packed.head_dim or packed.codes.shape[-1] * 32 // packed.bits
    width = padded(head_dim) if rotated else head_dim
    out = sim.Output((*packed.codes.shape[:3], width), _numpy_type(dtype))
    centre = dict(means=packed.means, balance=packed.balance) if keys and not rotated else {}
    _encode(
        device,
        "dequantize_levels" if levels else "dequantize_groups",
        packed.codes,
        dtype,
        width,
        packed.bits,
        params=packed.norms if keys else packed.params,
        **centre,
        flags=0 if rotated else _rotation_flag(packed.rotation),
        outputs=[("kEncodeOut", out)],
        unit=2 if levels else 4,
    )
    return _to_mx(out.array, dtype)


def rotate(device, x, inverse=False):
    """`tqext.rotate` of the Hadamard kind, for [B, H, n, dim]."""
    out = sim.Output(x.shape, _numpy_type(x.dtype))
    flags = ENUM["kEncodeInverse"] if inverse else 0
    _encode(device, "rotate", x, x.dtype, x.shape[-1], 0, flags=flags, outputs=[("kEncodeOut", out)])
    return _to_mx(out.array, x.dtype)


# --- 1-bit weights -----------------------------------------------------------------------------------------------------


def _q1(device, op, dtype, sizes, buffers):
    """sizes: n_inputs, n_rows, n_groups, x_stride, weight_stride, scale_stride."""
    params = np.array(sizes, np.int32)
    kind = ["matmul", "quantize", "dequantize", "ternary"].index(op)
    plan = json.loads(plans().tq_plan_q1(kind, TYPES.index(dtype), params.ctypes.data_as(ctypes.c_void_p)))
    if 0 in plan["grid"]:
        return
    device.dispatch(plan, {ENUM[name]: value for name, value in buffers.items()} | {ENUM["kQ1Params"]: params})


def _rows(device, x) -> np.ndarray:
    """[n, last] with a contiguous last axis, as metal/q1_matmul.cpp makes it."""
    array = as_numpy(x)
    if array.ndim == 2 and (array.shape[1] == 1 or array.strides[1] == array.itemsize) and array.strides[0] >= 0:
        return array
    return np.ascontiguousarray(array).reshape(int(np.prod(array.shape[:-1])), array.shape[-1])


def q1_matmul(device, x, weight, scales, op="matmul"):
    """`tqext.q1_matmul`."""
    rows, words, halves = _rows(device, x), _rows(device, weight), _rows(device, scales)
    out = sim.Output((*x.shape[:-1], weight.shape[0]), _numpy_type(x.dtype))
    if out.array.size:
        steps = [y.strides[0] // y.itemsize for y in (rows, words, halves)]
        names = {"kQ1X": rows, "kQ1Weight": words, "kQ1Scales": halves}
        buffers = {name: buffer_of(y) for name, y in names.items() if y.size} | {"kQ1Out": out}
        _q1(device, op, x.dtype, [rows.shape[0], words.shape[0], halves.shape[1], *steps], buffers)
    return _to_mx(out.array, x.dtype)


def ternary_matmul(device, x, weight, scales):
    """The kernel of `tqext.ternary_matmul`, which the operator calls for up to 8 rows of x, for any number of them."""
    return q1_matmul(device, x, weight, scales, "ternary")


def q1_quantize(device, w):
    """`tqext.q1_quantize`."""
    rows, cols = _rows(device, w), w.shape[-1]
    words = sim.Output((*w.shape[:-1], cols // 32), np.uint32)
    scales = sim.Output((*w.shape[:-1], cols // 128), np.float16)
    if rows.size:
        buffers = {"kQ1X": buffer_of(rows), "kQ1Weight": words, "kQ1Scales": scales}
        _q1(device, "quantize", w.dtype, [0, rows.shape[0], cols // 128, rows.strides[0] // rows.itemsize, 0, 0], buffers)
    return mx.array(words.array), mx.array(scales.array)


def q1_dequantize(device, weight, scales, *, dtype=mx.float32):
    """`tqext.q1_dequantize`."""
    words, halves = _rows(device, weight), _rows(device, scales)
    out = sim.Output((*weight.shape[:-1], weight.shape[-1] * 32), _numpy_type(dtype))
    if out.array.size:
        steps = [y.strides[0] // y.itemsize for y in (words, halves)]
        buffers = {"kQ1Weight": buffer_of(words), "kQ1Scales": buffer_of(halves), "kQ1Out": out}
        _q1(device, "dequantize", dtype, [0, words.shape[0], halves.shape[1], 0, *steps], buffers)
    return _to_mx(out.array, dtype)

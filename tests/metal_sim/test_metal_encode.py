"""Packing, unpacking and rotating on the simulated Metal kernels: the CPU's bytes, and the CPU backend's own tests."""

import metal_ops
import mlx.core as mx
import pytest

import test_format
import test_quantize
import test_rotate
import tqext

# What the kernels cannot show: argument checks, compilation, and what the op composes.
OP_ONLY = (
    *("compile", "reject", "bad_", "reference_hadamard", "dense_matrix", "none_changes_nothing", "nothing_gives_nothing"),
    *("block_means", "quantize_blocks"),  # composed of MLX operations
    *("distortion", "unbiased", "closer"),  # averages over many tokens: the bytes are compared instead
)

for _module in (test_quantize, test_rotate):
    for _name, _test in vars(_module).items():
        if _name.startswith("test_") and not any(part in _name for part in OP_ONLY):
            globals()[_name] = _test


test_format_golden_keys = test_format.test_format_golden_keys
test_format_golden_values = test_format.test_format_golden_values


def SELECTION(name, params):
    """(a kernel exists for these parameters, they run by default)."""
    dim = params.get("head_dim", params.get("dim", 64))
    composed = params.get("rotation") == "orthogonal" or not tqext.format.hadamard_factor(metal_ops.padded(dim))
    if 0 in params.get("shape", ()) or (name.startswith("test_rotate") and params.get("rotation") == "none"):
        return False, False  # nothing to launch
    if name == "test_quantize_matches_reference_wherever_no_decision_is_close":
        return not composed, dim == 80 and params["rotation"] == "hadamard"  # thousands of tokens
    if "golden" in name:
        kernel = params["case"].get("rotation") != "orthogonal" and _has_factor(params["case"]["head_dim"])
        return kernel, params["dtype"] == "float32" and params["case"]["head_dim"] in (64, 80, 96, 128)
    few = dim == 128 or (params.get("dtype", "float32") == "float32" and dim in (32, 64, 80, 96, 160, 512))
    if name == "test_dequantize_matches_reference":
        few = few and dim in (80, 128)  # sixteen kernels each
    return not composed, few and params.get("rotation") != "none"


@pytest.fixture(autouse=True)
def on_the_simulated_gpu(request, scheduled, monkeypatch):
    """The operators of tqext, replaced by those on the simulated GPU where a kernel exists."""
    launched = []

    def replace(name, simulated, has_kernel):
        original = getattr(tqext, name)

        def call(*arguments, stream=None, **options):
            if not has_kernel(*arguments, **options):
                return original(*arguments, **options)
            launched.append(name)
            return simulated(*arguments, **options)

        monkeypatch.setattr(tqext, name, call)

    def hadamard(x, *_, rotation="hadamard", **__):
        return rotation in ("hadamard", "none") and _has_factor(x.shape[-1])

    def keys(k, *, bits=3, means=None, balance=None, qjl=False, rotation="hadamard"):
        centre = dict(means=means, balance=balance)
        parts = metal_ops.quantize_keys(scheduled, k, bits=bits, **centre, qjl=qjl, rotation=rotation)
        signs = parts[2:] if qjl else (None, None)
        return tqext.PackedKeys(parts[0], parts[1], means, balance, *signs, bits, k.shape[-1], rotation)

    def values(v, *, bits=2, coding="groups", rotation="hadamard"):
        parts = metal_ops.quantize_values(scheduled, v, bits=bits, coding=coding, rotation=rotation)
        return tqext.PackedValues(*parts, bits, v.shape[-1], coding, rotation)

    def rotate(x, inverse=False, *, rotation="hadamard"):
        # The host code counts rows the same way (metal/turboquant_encode.cpp).
        rows = x if x.ndim == 4 else x.reshape(1, 1, -1, x.shape[-1])
        return metal_ops.rotate(scheduled, rows, inverse).reshape(x.shape)

    replace("quantize_keys", keys, hadamard)
    replace("quantize_values", values, hadamard)
    replace(
        "dequantize",
        lambda packed, **options: metal_ops.dequantize(scheduled, packed, **options),
        lambda packed, rotated=False, **_: (
            packed.codes.size and (rotated or (packed.rotation == "hadamard" and _has_factor(packed.head_dim)))
        ),
    )
    replace(
        "rotate",
        rotate,
        lambda x, *_, rotation="hadamard", **__: rotation == "hadamard" and x.size and _has_factor(x.shape[-1]),
    )
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)
    assert launched, "the test never reached the kernels"


def _has_factor(dim):
    return bool(tqext.format.hadamard_factor(metal_ops.padded(dim)))

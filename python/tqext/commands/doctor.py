"""``tqext doctor``: what is installed, what it runs on, and the path proof on a tiny model; --prove measures the machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import tqext
from tqext.commands.options import ArgumentParser
from tqext.commands.versions import versions
from tqext.protocols import Model

# Only inside of the functions, as nothing of it may be there: MLX.


def backend() -> str:
    """What the operators run on."""
    import mlx.core as mx

    if mx.default_device() == mx.cpu:
        return f"CPU, {tqext.isa()} of {', '.join(tqext.available_isas())}, {tqext.num_threads()} threads"
    info: Any = mx.device_info()
    return f"GPU, {info.get('device_name', 'unnamed')}"


def tiny_model() -> Model:
    """A llama of two layers with random weights."""
    from mlx_lm.models import llama

    args = llama.ModelArgs(
        model_type="llama",
        hidden_size=128,
        num_hidden_layers=2,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        rms_norm_eps=1e-5,
        vocab_size=256,
    )
    return llama.Model(args)


def check_attention() -> str:
    """Attention over packed bytes compared with attention over what they stand for."""
    import mlx.core as mx

    key = mx.random.key(0)
    q, k, v = (mx.random.normal((1, heads, n, 128), key=key) for heads, n in ((8, 1), (2, 300), (2, 300)))
    packed_k, packed_v = tqext.quantize_keys(k), tqext.quantize_values(v)
    got = tqext.turboquant_attention(q, packed_k, packed_v)
    with mx.stream(mx.cpu):  # MLX multiplies fp32 matrices in TF32 on NVIDIA GPUs
        keys, values = (mx.repeat(tqext.dequantize(p), 4, axis=1) for p in (packed_k, packed_v))
        weights = mx.softmax((q * 128**-0.5) @ keys.swapaxes(-1, -2), axis=-1)
        expected = weights @ values
        error = cast(float, (mx.abs(got - expected).max() / mx.abs(expected).max()).item())
    # There the softmax weights enter fp16 tensor cores (docs/cuda.md).
    on_cuda = mx.default_device() == mx.gpu and not mx.metal.is_available()
    if not error <= (1e-3 if on_cuda else 1e-4):
        raise AssertionError(f"attention is off by {error:.1e} of the largest output")
    return f"largest error {error:.1e}"


def check_path() -> str:
    """The path proof through mlx-lm."""
    report = tqext.verify(tiny_model())
    return f"{len(report.compressed)} layers of a tiny model read their codes"


CHECKS: dict[str, Callable[[], str]] = {"attention": check_attention, "path proof": check_path}


def main(argv: Sequence[str]) -> None:
    """The command; exits with status 1 if a check fails."""
    proving = "--prove" in argv
    if proving and tqext.load_error is None:
        from tqext.commands import prove

        return prove.main([x for x in argv if x != "--prove"])
    parser = ArgumentParser(prog="tqext doctor", description=__doc__)
    parser.add_argument("--prove", action="store_true", help="probe, compare and time this machine; --prove -h: its options")
    parser.parse_args(["--prove"] if proving else argv)
    for name, version in versions().items():
        print(f"{name:<18}{version}")
    if tqext.load_error is not None:
        print(f"{'extension':<18}FAILED: {tqext.load_error}")
        raise SystemExit(1)
    print(f"{'backend':<18}{backend()}")
    failed = False
    for name, check in CHECKS.items():
        try:
            print(f"{name:<18}ok: {check()}")
        except Exception as error:  # every failure is a finding to report, whatever it is
            failed = True
            print(f"{name:<18}FAILED: {type(error).__name__}: {error}")
    raise SystemExit(1 if failed else 0)

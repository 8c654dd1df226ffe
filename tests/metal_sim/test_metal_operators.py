"""The operator tests of the CPU backend, on the simulated Metal kernels: the same functions, bytes and tolerances."""

import functools
import types

import metal_ops
import mlx.core as mx
import pytest

import test_turboquant_attention as attention
import tqext

# What the kernels cannot show: argument checks, compilation, streams and transforms belong to the op, not to a backend.
OP_ONLY = ("compile", "stream", "threads", "gradient", "vmap", "repeated_runs", "does_not_change")


def _shared(module):
    return {name: f for name, f in vars(module).items() if name.startswith("test_") and not any(x in name for x in OP_ONLY)}


globals().update(_shared(attention))


@functools.cache
def mixture(case):
    """The shapes that a case of the random mixtures draws, without running it."""
    seen = {}

    class Recorder:
        def __init__(self, **shapes):
            seen.update(shapes)

        def check(self):
            pass

    function = attention.test_turboquant_attention_random_mixtures
    scope = dict(function.__globals__, Problem=Recorder)
    types.FunctionType(function.__code__, scope)(case)
    return seen


# Sets with Lloyd-Max values that run by default: each is three kernels.
LLOYD = (
    ("float32", 128, 3, 3),
    ("float32", 128, 3, 2),  # tables of their own
    ("float32", 96, 2, 3),
    ("float32", 80, 3, 3),
    ("float32", 32, 4, 4),
    ("float32", 256, 4, 4),
    ("float16", 128, 3, 3),
    ("bfloat16", 64, 2, 3),
)
# Parameter sets that run by default, of tests where that is not all with a kernel.
DEFAULT = {
    "every_head_dim": lambda p: p["dtype"] == "float32" or p["head_dim"] == 128,
    "all_bits": lambda p: (
        p["dtype"] == "float32"
        and (
            p["head_dim"] == 128
            or (p["head_dim"], p["key_bits"], p["value_bits"]) in ((32, 3, 4), (64, 2, 2), (96, 2, 4), (256, 4, 2))
        )
    ),
    "lloyd_values": lambda p: (p["dtype"], p["head_dim"], p["key_bits"], p["value_bits"]) in LLOYD,
    "value_dim_differs": lambda p: p["coding"] == "groups" or p["key_dim"] in (128, 96),
    "block_means_at_every_length": lambda p: (p["dtype"] == "float32" and p["n_coded"] < 20000) or p["n_coded"] in (65, 257),
    "every_length": lambda p: p["dtype"] == "float32" or p["n_coded"] in (1, 257),
    "first_and_tail_lengths": lambda p: p["n_tail"] in (1, 33, 200) and p["n_first"] in (0, 4),
    "every_group_ratio": lambda p: p["dtype"] == "float32" or p["n_repeats"] in (4, 9),
    "residual_signs": lambda p: p["dtype"] != "bfloat16",
    "array_mask": lambda p: p["kind"] in ("bool", "float32") or p["axes"] == "full",
    "reads_nothing_around_its_views": lambda p: (p["n_coded"], p["head_dim"]) == (33, 64),
    "random_mixtures": lambda p: p["case"] % 12 == 0,
    "more_sequences_than_a_grid_has_rows": lambda p: False,  # a limit of CUDA's; minutes on the simulator
}


def SELECTION(name, params):
    """(a kernel exists for these parameters, they run by default)."""
    dims = [params.get("head_dim", 64), params.get("value_dim") or 64, params.get("key_dim", 64)]
    if "mixtures" in name:
        shapes = mixture(params["case"])
        dims = [shapes["head_dim"], shapes["value_dim"]]
    has_kernel = max(dims) <= 256 and params.get("rotation") != "orthogonal"
    chosen = DEFAULT.get(name.removeprefix("test_turboquant_attention_"))
    few = params.get("n_rows", 1) <= 9  # more: test_metal_prompts.py
    return has_kernel, few and (chosen is None or chosen(params))


@pytest.fixture(autouse=True)
def on_the_simulated_gpu(scheduled, monkeypatch):
    """`tqext.turboquant_attention` runs on the simulated GPU; packing stays on the CPU, which other tests compare."""
    launched = []
    original = tqext.turboquant_attention

    def simulated(q, packed_k, packed_v, *, stream=None, **options):
        # Some tests mix in shapes that the op composes of MLX's operations: not the kernels' matter.
        if not metal_ops.has_kernel(q, packed_k, packed_v):
            return original(q, packed_k, packed_v, **options)
        launched.append(q.shape)
        return metal_ops.turboquant_attention(scheduled, q, packed_k, packed_v, **options)

    monkeypatch.setattr(tqext, "turboquant_attention", simulated)
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)
    assert launched, "the test never reached the kernels"

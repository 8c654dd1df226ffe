"""The operator tests of many query rows, on the simulated Metal kernels: the same functions and tolerances."""

import mlx.core as mx
from test_metal_operators import OP_ONLY, on_the_simulated_gpu  # noqa: F401 - a fixture

import test_turboquant_attention_prompts as prompts

HOST = (*OP_ONLY, "takes_no_memory")
globals().update(
    {name: f for name, f in vars(prompts).items() if name.startswith("test_") and not any(x in name for x in HOST)}
)

# Parameter sets that run by default: some twelve variants of the kernel, every option, at most 129 queries.
DEFAULT = {
    "every_number_of_rows": lambda p: p["n_rows"] in (9, 17, 65, 100),
    "every_group_ratio": lambda p: p["n_repeats"] in (1, 3, 16),
    "every_head_dim_and_coding": lambda p: (
        (p["dtype"], p["head_dim"], p["coding"], p["value_bits"])
        in (
            ("float32", 32, "groups", 2),
            ("float32", 64, "lloyd", 3),
            ("float32", 80, "groups", 4),
            ("float32", 96, "lloyd", 4),
            ("float16", 128, "groups", 2),
            ("bfloat16", 128, "lloyd", 3),
            ("float32", 160, "lloyd", 2),
            ("float16", 192, "groups", 2),
            ("float32", 256, "groups", 4),
            ("bfloat16", 256, "lloyd", 3),
        )
    ),
    "value_dim_differs": lambda p: (
        (p["key_dim"], p["coding"]) in ((64, "lloyd"), (192, "groups"), (32, "lloyd"), (256, "groups"))
    ),
    "every_length": lambda p: p["dtype"] == "float32" and p["n_coded"] in (0, 1, 64, 65, 513),
    "left_padding": lambda p: p["n_rows"] == 40,
    "lengths": lambda p: p["n_rows"] == 40,
    "array_mask": lambda p: p["kind"] in ("bool", "float32") and p["shape"][0] != 207,
    "any_magnitude": lambda p: p["dtype"] != "bfloat16",
    "reads_views_of_any_strides": lambda p: p["head_dim"] == 80 and p["dtype"] == mx.float32,
    "random_mixtures": lambda p: p["case"] % 20 == 0,
}


def SELECTION(name, params):
    """(a kernel exists for these parameters, they run by default)."""
    chosen = DEFAULT.get(name.removeprefix("test_prompt_attention_"))
    return True, chosen is None or chosen(params)

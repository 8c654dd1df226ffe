"""turboquant_attention of many query rows on Hopper GPUs, where tiles of tokens are decoded in a launch of their own."""

import mlx.core as mx
import numpy as np
import pytest

from support import Problem

pytestmark = pytest.mark.usefixtures("device")

# 16 row tiles of 8 KV heads fill an H100: there the tiles of tokens are decoded before they are multiplied.
MANY = {"n_rows": 512, "n_kv_heads": 8, "n_repeats": 4, "means": True, "balance": True}
MANY_CASES = {
    "groups": {"n_first": 4, "n_tail": 600},
    "lloyd": {"n_first": 70, "n_tail": 512, "value_bits": 3, "value_coding": "lloyd"},
    "four bits, bf16": {"n_tail": 513, "key_bits": 4, "value_bits": 4, "value_coding": "lloyd", "dtype": mx.bfloat16},
    "64 dimensions": {"n_first": 3, "n_tail": 530, "head_dim": 64},
    "80 dimensions": {"n_tail": 530, "head_dim": 80, "value_bits": 4},
    "values of 64 dimensions": {"n_first": 1, "n_tail": 512, "head_dim": 128, "value_dim": 64},
    "keys of 64 dimensions": {"n_first": 1, "n_tail": 512, "head_dim": 64, "value_dim": 128},
    "no mask, whole blocks": {"n_coded": 640, "options": {"mask": None}},
    "exact tokens alone": {"n_coded": 0, "n_first": 9, "n_tail": 700},
    "no means": {"n_tail": 512, "means": False, "balance": False},
    "two sequences": {"batch": 2, "n_kv_heads": 4, "n_tail": 520},
    "heads one after the other": {"n_rows": 2048, "n_coded": 130, "n_tail": 2048},
    "sinks": {"n_tail": 512, "sinks": True},
    "rotated before": {"n_tail": 512, "rotation": "none"},
}


@pytest.mark.parametrize("device", [pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("case", MANY_CASES)
def test_prompt_attention_of_tiles_that_are_decoded_before(case):
    changes = {"head_dim": 128, "n_coded": 1000, "dtype": mx.float16, "options": {"mask": "causal"}} | MANY_CASES[case]
    problem = Problem(**(MANY | changes))
    problem.check()
    want = problem.run()
    for _ in range(3):
        assert mx.array_equal(problem.run(), want)


@pytest.mark.parametrize("device", [pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("kind", [mx.bool_, mx.float32])
def test_prompt_attention_of_decoded_tiles_with_a_mask(kind, rng):
    n_keys = 4 + 1000 + 512
    mask = mx.array(rng.random((512, n_keys)) < 0.7)
    if kind == mx.float32:
        mask = mx.where(mask, mx.array(rng.normal(size=mask.shape).astype(np.float32)), -mx.inf)
    Problem(**MANY, head_dim=128, n_coded=1000, n_first=4, n_tail=512, dtype=mx.float16, options={"mask": mask}).check()


@pytest.mark.parametrize("device", [pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
def test_prompt_attention_of_decoded_tiles_is_the_same_every_time():
    """The tiles of some heads are written where those of the heads before were read."""
    problem = Problem(**MANY | {"n_rows": 2048}, head_dim=128, n_coded=3000, n_tail=2048, dtype=mx.float16,
                      options={"mask": "causal"})  # fmt: skip
    want = problem.run()
    for _ in range(20):
        assert mx.array_equal(problem.run(), want)

"""Attention over a list of tokens on the simulated Metal kernel: the operator's tests, bytes read, seeded bugs."""

import metal_ops
import metal_simulator as sim
import mlx.core as mx
import numpy as np
import pytest
from mutations import ATTENTION, MATRIX, assert_caught, attention
from test_metal_operators import _shared

import test_turboquant_attention_indices as shared
import tqext
from covering import FULL
from support import KERNEL_TOLERANCE, assert_close
from test_turboquant_attention_indices import listed

globals().update(_shared(shared))
if not FULL:
    del globals()["test_indices_far_apart"]  # 131400 tokens

# Parameter sets that run by default.
DEFAULT = {
    "every_head_dim": lambda _: False,
    "all_bits": lambda _: False,
    "every_number_of_queries": lambda p: (
        (p["n_rows"], p["per_head"], p["per_query"]) in ((1, True, True), (5, False, True), (8, True, False))
    ),
    "every_length": lambda p: p["n_listed"] in (0, 1, 33),
    "of_all_tokens_equal_no_list": lambda _: False,
    "of_nothing_leave_the_exact_tokens": lambda p: p["n_rows"] == 10,
    "random_mixtures": lambda p: p["case"] == 3,
    "a_mean_that_is_not_finite_stays_in_its_block": lambda p: p["n_rows"] == 1,
    "nan_of_a_listed_token_reaches_the_output": lambda p: p["where"] == "keys",
    "with_residual_signs": lambda p: p["dtype"] == "float16",
}


def SELECTION(name, params):
    """(the kernel takes these parameters, they run by default)."""
    if "mutation_of" in name:
        return True, params["name"] in ("ids beyond the coded tokens", "list of another query")
    chosen = DEFAULT.get(name.removeprefix("test_indices_"))
    has_kernel = params.get("n_rows", 1) <= 16 and max(params.get("head_dim", 64), params.get("value_dim", 64)) <= 256
    return has_kernel and params.get("rotation") != "orthogonal", chosen is None or chosen(params)


@pytest.fixture(autouse=True)
def on_the_simulated_gpu(scheduled, monkeypatch):
    """`tqext.turboquant_attention` with a list runs on the simulated GPU where Metal has a kernel for it."""
    original = tqext.turboquant_attention

    def simulated(q, packed_k, packed_v, *, stream=None, indices=None, **options):
        kernel = indices is not None and metal_ops.plans().tq_has_listed_kernel(q.shape[2])
        if not (kernel and metal_ops.has_kernel(q, packed_k, packed_v)):
            return original(q, packed_k, packed_v, indices=indices, **options)
        return metal_ops.turboquant_attention(scheduled, q, packed_k, packed_v, indices=indices, **options)

    monkeypatch.setattr(tqext, "turboquant_attention", simulated)
    with mx.stream(mx.cpu):
        yield
    scheduled.kernel = None


def problem_of(**more):
    """300 coded tokens of which 70 are listed, with means and a balance."""
    return listed(**dict(n_kv_heads=2, n_repeats=5, n_coded=300, head_dim=64, means=True, balance=True, n_tail=3) | more)


@pytest.mark.parametrize("per_query", [False, True])
def test_bytes_of_listed_tokens_are_read_once(checked, per_query):
    """And the mean of a block once for each of its tokens: for all rows that share a list."""
    checked.reset()
    problem = problem_of(qjl=True, n_rows=3, per_query=per_query)
    assert_close(attention(checked, problem), problem.answer(), KERNEL_TOLERANCE[mx.float32])
    ids = np.array(problem.options["indices"])
    n = int(((ids >= 0) & (ids < 300)).sum())
    (name, stats), (combine, _) = checked.log
    assert "matrix" in name and "combine" in combine
    read = {name: stats.buffer_read[metal_ops.ENUM["kAttention" + name]] for name in ("KeyCodes", "KeyNorms", "ValueCodes",
            "ValueParams", "KeySigns", "ResidualNorms", "Means", "Indices")}  # fmt: skip
    k, v = problem.packed_k, problem.packed_v
    want = {"KeyCodes": k.codes, "KeyNorms": k.norms, "ValueCodes": v.codes, "ValueParams": v.params, "KeySigns": k.signs,
            "ResidualNorms": k.residual_norms, "Means": k.means}  # fmt: skip
    assert read == {name: n * x.shape[3] * x.itemsize for name, x in want.items()} | {"Indices": ids.nbytes}


def test_any_schedule_gives_the_same_answer():
    device = metal_ops.Device("check", schedule=sim.RANDOM + sim.PREEMPT, seed=3, n_cores=10)
    problem = problem_of(n_repeats=12, n_rows=2, n_first=2, options={"mask": "causal"})
    assert_close(attention(device, problem), problem.answer(), KERNEL_TOLERANCE[mx.float32])


def test_more_than_a_draft_is_gathered_first():
    lib = metal_ops.plans()
    assert lib.tq_has_listed_kernel(1) and lib.tq_has_listed_kernel(16) and not lib.tq_has_listed_kernel(17)


def test_memory_for_results_does_not_grow_with_the_lists():
    """Where lists alone fill the GPU, the tokens of each stay together."""

    def plan_of(n_lists):
        shape = metal_ops.AttentionShape(
            batch=1, n_q_heads=8, n_kv_heads=1, n_queries=16, head_dim=128, value_dim=128, n_coded=1 << 17, key_bits=3,
            value_bits=3, value_coding=1, hadamard=1, has_indices=1, n_listed=8192, n_lists=n_lists, n_cores=4,
        )  # fmt: skip
        return metal_ops.plan_attention(metal_ops.plans(), shape)[0]

    one, many = plan_of(1), plan_of(16)
    assert many["part_numbers"] <= one["part_numbers"] / 4
    assert one["dispatches"][0]["grid"][2] == 4 and many["dispatches"][0]["grid"][2] == 16


# name -> (function, text, replacement, occurrence)
MUTATIONS = {
    "ids staged over those in use": ("stage_list", "tile_barrier(alone);", "", 1),
    "ids read before they are there": ("stage_list", "tile_barrier(alone);", "", 2),
    "means read before they are there": ("stage_list", "tile_barrier(alone);", "", 3),
    "means staged over those in use": ("stage_list", "tile_barrier(alone);", "", 4),
    "slots beyond the list": ("stage_ids", "i < n ? list", "true ? list", 1),
    "ids beyond the coded tokens": ("stage_ids", "id >= b.coded_begin && id < b.coded_end", "id >= b.coded_begin", 1),
    "mean of the next block": ("stage_listed_means", "id / kBlockTokens", "(id + 1) / kBlockTokens", 1),
    "means of the first eight tokens": ("stage_list", "ids + 8 * i", "ids", 1),
    "tokens of the slots' numbers": ("token_at", "has_indices ? ids[t] : base + t", "base + t", 1),
    "list of another query": (MATRIX, "list * p.indices.token", "0 * p.indices.token", 1),
    "rows of another query": ("row_of_list", "row * p.n_lists + list", "row * p.n_lists", 1),
    "rows of one head after the other": ("row_of_list", "row * p.n_lists + list", "row + list * (p.n_rows / p.n_lists)", 1),
    "exact tokens of the list's rows": (MATRIX, "exact_row = 8 * n_blocks * int(tg.z)", "exact_row = first_row", 1),
    "coded tokens after the query": (
        MATRIX,
        "coded_limit(p, bounds.coded_end, row1",
        "coded_limit(p, bounds.coded_end, 1 + row1",
        1,
    ),
    "list of another head": (MATRIX, "kv_head * p.indices.head", "0 * p.indices.head", 1),
    "mask of the slots": (MATRIX, "p.n_first + number", "p.n_first + base + t", 1),
    "scores of means left out": (MATRIX, "has_indices ? listed_offsets[rt] : offset", "offset", 1),
}


def mutation_case(name=""):
    if name == "coded tokens after the query":
        return problem_of(n_repeats=2, n_rows=2, n_coded=40, n_tail=0, n_listed=40, options={"mask": "causal"})
    problem = problem_of(n_repeats=9, n_rows=2)
    mask = np.random.default_rng(1).random((1, 18, 2, problem.n_keys)) < 0.7
    problem.options["mask"] = mx.array(mask)
    return problem


def assert_lists(device, name, mutation):
    """The mutation, or None, is caught by its list of tokens."""
    problem = mutation_case(name)
    check = lambda out: assert_close(out, problem.answer(), KERNEL_TOLERANCE[mx.float32])  # noqa: E731
    assert_caught(device, "turboquant_attention", ATTENTION, mutation, lambda d: attention(d, problem), check)


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_of_lists_is_caught(name, mutant):
    assert_lists(mutant, name, MUTATIONS[name])


@pytest.mark.parametrize("name", ["", "coded tokens after the query"])
def test_unmutated_kernel_passes_the_same_check(name, mutant):
    assert_lists(mutant, name, None)

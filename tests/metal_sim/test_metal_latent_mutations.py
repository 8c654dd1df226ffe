# ruff: noqa: E501 - a table of source snippets
"""Bugs seeded into the kernel of attention over latents, as in test_metal_mutations.py."""

import mlx.core as mx
import numpy as np
import pytest
from mutations import BARRIER, LATENT, SIMD_BARRIER, assert_caught
from test_metal_latent import run

from support import KERNEL_TOLERANCE, assert_close
from test_latent_attention import Problem

KERNEL = "latent_attention"
SMALL = dict(n_repeats=5, n_coded=150)
BLOCKS = dict(n_repeats=5, n_coded=1300, balance=True)
EXACT = dict(n_repeats=5, n_coded=40, n_first=4, n_tail=37)
CAUSAL = dict(n_repeats=9, n_rows=2, n_coded=40, n_tail=5, mask="causal")
SPOILT = dict(n_repeats=5, n_coded=200, n_first=3, n_tail=9, mask="spoilt")
FOLLOW_UP = dict(n_repeats=1, n_rows=20, n_coded=40, n_tail=9, mask="causal")
PADDED = dict(n_repeats=5, n_coded=150, padding=45)
# name -> (function, text, replacement, occurrence, shape of the problem)
MUTATIONS = {
    "queries over those in use": (KERNEL, BARRIER, "", 1, SMALL),
    "queries read before they are there": (KERNEL, BARRIER, "", 2, SMALL),
    "codes stored over a tile in use": (KERNEL, BARRIER, "", 3, SMALL),
    "tile read before it is there": (KERNEL, BARRIER, "", 4, SMALL),
    "shares read before they are there": (KERNEL, BARRIER, SIMD_BARRIER, 5, SMALL),
    "weights read before they are there": (KERNEL, BARRIER, "", 6, SMALL),
    "exact latents stored over those in use": (KERNEL, BARRIER, "", 7, EXACT),
    "exact latents read before they are there": (KERNEL, BARRIER, "", 8, EXACT),
    "exact shares read before they are there": (KERNEL, BARRIER, "", 9, EXACT),
    "exact weights read before they are there": (KERNEL, BARRIER, "", 10, EXACT),
    "mean read before it is there": (KERNEL, SIMD_BARRIER, "", 1, SMALL),
    "key of the neighbour": ("leave_shares", "float(from[LINE])", "float(from[0])", 1, SMALL),
    "latent of another token": ("add_latents", "(8 * f + row) * LINE", "(8 * f + column) * LINE", 1, SMALL),
    "share of a simdgroup left out": ("join_shares", "int i = 0;", "int i = 1;", 1, SMALL),
    "maximum of half the tokens": ("weigh", "ushort h = 1; h < N", "ushort h = 2; h < N", 1, SMALL),
    "sum not rescaled": ("weigh", "fma(state.sum, factor, weight)", "state.sum + weight", 1, BLOCKS),
    "weights of a block not rescaled": ("weigh", "fma(state.block_sum, factor, weight)", "state.block_sum + weight", 1, BLOCKS),
    "weights of the blocks before kept": (KERNEL, "state.block_sum = 0.0f;", "", 1, BLOCKS),
    "sums not rescaled": ("add_latents", "get(acc[i]) * factor[i / M]", "get(acc[i])", 1, BLOCKS),
    "sums of other rows rescaled": ("add_latents", "factor[i / M]", "factor[0]", 1, dict(SMALL, n_repeats=16)),
    "norm left out of the weight": (KERNEL, "weight * norm", "weight", 1, SMALL),
    "norms past the last token": (KERNEL, "t >= range.begin && t < range.end ? float(key_norms", "t >= range.begin ? float(key_norms", 1, SMALL),
    "mean left out of the sums": (KERNEL, "+ weight * x", "+ 0.0f * x", 1, SMALL),
    "mean of the next block": (KERNEL, "held_block = next / kBlockTokens", "held_block = next / kBlockTokens + 1", 1, BLOCKS),
    "scores of the first block's mean kept": (KERNEL, "if (new_block) {\n          offset = 0.0f;", "if (new_block && block == 0) {\n          offset = 0.0f;", 1, BLOCKS),
    "butterfly between the wrong simdgroups": ("finish_mean", "(sg & 2u)", "(sg & 1u)", 1, SMALL),
    "mean not balanced": ("start_mean", "x[i] *= balance", "x[i] += 0.0f * balance", 1, BLOCKS),
    "query not balanced": (KERNEL, "x[i] /= balance", "x[i] += 0.0f * balance", 1, BLOCKS),
    "sums not balanced": ("combine_row", "coded[i] /= balance", "coded[i] += 0.0f * balance", 1, BLOCKS),
    "padding attended to": (KERNEL, "has_row && t >= range.begin && t < limit", "has_row && t < limit", 1, PADDED),
    "exact tokens of another threadgroup": (KERNEL, "(int(tg.x) - p.n_ranges) * each", "0", 1, EXACT),
    "first tokens from the tail": (KERNEL, "is_first = mine < p.n_first", "is_first = mine < 0", 1, EXACT),
    "exact tokens after the query": (KERNEL, "- p.n_queries + my_row % p.n_queries", "- 1", 1, CAUSAL),
    "rows of the first block": (KERNEL, "first_row = kLatentRows * int(tg.z)", "first_row = 0", 1, FOLLOW_UP),
    "coded tokens after the query": (KERNEL, "my_row % p.n_queries) : 0", "weight_row % p.n_queries) : 0", 1, FOLLOW_UP),
    "rows beyond the last one written": (KERNEL, "if (r < n_rows) {\n        *rein", "if (true) {\n        *rein", 1, SMALL),
    "part of another range": (KERNEL, "p.n_parts + int(tg.x)", "p.n_parts", 1, EXACT),
    "weight 0 times a NaN norm": (KERNEL, "skips && weight == 0.0f", "false", 1, SPOILT),
    "weight 0 times a NaN mean": (KERNEL, "if (weight != 0.0f) put", "put", 1, SPOILT),
    "weight 0 times a NaN latent": (KERNEL, "finite ? x : T(0.0f)", "x", 1, SPOILT),
}  # fmt: skip

# Those that run by default.
FEW = ("weights of a block not rescaled",)


def SELECTION(name, params):
    """(there is a kernel for these parameters, they run by default)."""
    return True, params["name"] in FEW


def mutation_case(mask=None, padding=None, **shape):
    """A call with a device for its argument, and its answer."""
    problem = Problem(dim=256, bits=2, rope_dim=None, **shape)
    if padding:
        allowed = np.arange(problem.n_keys) >= padding
        return lambda d: run(d, problem, left_padding=mx.array([padding])), problem.answer(
            np.broadcast_to(allowed, problem.full)
        )
    if mask != "spoilt":
        return lambda d: run(d, problem, mask), problem.answer(mask)
    allowed = np.broadcast_to(np.arange(problem.n_keys) % 7 != 2, problem.full).copy()
    allowed[..., 67:131] = False  # a block
    want, coded = problem.answer(allowed), ~allowed[0, 0, 0, 3:203]
    norms, means, tail = (np.array(x) for x in (problem.packed.norms, problem.packed.means, problem.tail))
    norms[:, :, coded], means[:, :, 1], tail[:, :, ~allowed[0, 0, 0, 203:]] = np.nan, np.nan, np.nan
    problem.packed = problem.packed._replace(norms=mx.array(norms), means=mx.array(means))
    problem.tail = mx.array(tail)
    return lambda d: run(d, problem, mx.array(allowed)), want


def assert_latents(device, mutation, shape):
    """The mutation, or None, is caught by this shape of a problem."""
    call, want = mutation_case(**shape)
    check = lambda out: assert_close(out, want, KERNEL_TOLERANCE[mx.float32])  # noqa: E731
    assert_caught(device, KERNEL, LATENT, mutation, call, check)


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_of_latents_is_caught(name, mutant):
    *mutation, shape = MUTATIONS[name]
    assert_latents(mutant, mutation, shape)


def test_unmutated_kernel_passes_the_same_checks(mutant):
    for shape in (SMALL, BLOCKS, EXACT, CAUSAL, SPOILT, PADDED, FOLLOW_UP, dict(SMALL, n_repeats=16)):
        assert_latents(mutant, None, shape)

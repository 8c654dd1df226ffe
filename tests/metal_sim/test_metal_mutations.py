# ruff: noqa: E501 - tables of source snippets
"""Bugs seeded into our kernels: each must be reported by the checker or change a result by more than the tolerance."""

import re

import metal_ops
import mlx.core as mx
import numpy as np
import pytest
from mutations import (
    ATTENTION,
    BARRIER,
    COMBINE,
    ENCODE,
    MATRIX,
    PROMPT,
    PROMPT_KERNEL,
    Q1,
    SIMD_BARRIER,
    SPLIT,
    assert_caught,
    attention,
    included,
    replace,
)

import reference
import tqext
from support import KERNEL_TOLERANCE, Problem, assert_close

# name -> (kernel function, text, replacement, occurrence, shape of the problem)
SMALL = dict(n_kv_heads=1, n_coded=300, head_dim=64)
TAIL = dict(n_kv_heads=1, n_coded=40, head_dim=64, n_first=4, n_tail=33)
ROWS = dict(n_kv_heads=1, n_coded=100, head_dim=64, n_repeats=8)
MANY = dict(n_kv_heads=1, n_coded=100, head_dim=64, n_repeats=9)
MEANS = dict(SMALL, n_kv_heads=2, n_coded=1300, means=True, balance=True)
MEANS_ROWS = dict(MEANS, n_repeats=9)
LONG_ROWS = dict(MEANS_ROWS, n_coded=2300)
PADDED = dict(MEANS, n_coded=300, options={"left_padding": mx.array([45])})
LLOYD = dict(SMALL, value_coding="lloyd", value_bits=3, n_coded=600)
LLOYD_ROWS = dict(LLOYD, n_repeats=8)
MUTATIONS = {
    "missing barrier before the weights are read": (SPLIT, SIMD_BARRIER, "", 2, SMALL),
    "missing barrier before norms are overwritten": (SPLIT, SIMD_BARRIER, "", 3, dict(SMALL, n_coded=1300)),
    "missing barrier after the table is filled": (SPLIT, BARRIER, "", 1, SMALL),
    "sums read before all simdgroups have written them": ("join_sums", BARRIER, "", 1, SMALL),
    "sums joined before they are complete": ("join_sums", BARRIER, "", 2, dict(SMALL, head_dim=160)),
    "sums of one row at another one's place": (SPLIT, "merged[first * V + i] = sum;", "merged[i] = sum;", 1, dict(SMALL, head_dim=160)),
    "one simdgroup's sums left out": (SPLIT, "for (int j = 1; j < NSG; j++) sum", "for (int j = 2; j < NSG; j++) sum", 1, SMALL),
    "barrier that orders nothing": (SPLIT, BARRIER, "threadgroup_barrier(mem_flags::mem_none);", 2, SMALL),
    "simdgroup barrier in place of the threadgroup's": (SPLIT, BARRIER, SIMD_BARRIER, 2, SMALL),
    "keys read past the last token": (SPLIT, "const bool load = t < n && has_unit;", "const bool load = has_unit;", 1, SMALL),
    "values read past the last token": ("GroupValues", "x[i] = t < n && has ?", "x[i] = has ?", 1, SMALL),
    "parameters of tokens beyond the range": (SPLIT, "const bool mine = int(lane) < n;", "const bool mine = int(lane) <= n;", 1, SMALL),
    "idle lanes decode": (SPLIT, "const bool has_unit = unit < NU;", "const bool has_unit = true;", 1, dict(SMALL, head_dim=96)),
    "shuffle in a divergent branch": (SPLIT, "if (simd_any(tile_max > row_max)) {", "if (tile_max > row_max) {", 1, dict(SMALL, n_coded=1300)),
    "sums not rescaled at a new maximum": (SPLIT, "row_sum *= factor;", "", 1, dict(SMALL, n_coded=1300)),
    "accumulators not rescaled": (SPLIT, "acc[i * R + r] *= row_factor;", ";", 1, dict(SMALL, n_coded=1300)),
    "accumulators not cleared": (SPLIT, "for (int i = 0; i < NA * R; i++) acc[i] = 0.0f;", ";", 1, SMALL),
    "matrices not cleared": (MATRIX, "put(acc[s], float2(0.0f));", ";", 1, ROWS),
    "wrong transposed reduction": (SPLIT, "const bool up = key_lane & h;", "const bool up = key_lane & 1;", 1, SMALL),
    "bias of another group": (SPLIT, "bias_sums[(int(sg) * R + r) * NG + d / 32]", "bias_sums[(int(sg) * R + r) * NG]", 1, SMALL),
    "output rows not all written": (SPLIT, "i < n_rows * V; i += NSG * 32", "i < n_rows * V - 1; i += NSG * 32", 1, SMALL),
    "write to a part of another range": (SPLIT, "p.n_parts + int(tg.x)) * n_rows;", "p.n_parts) * n_rows;", 2, SMALL),
    "threadgroup array one short": (SPLIT, "threadgroup float pool[POOL];", "threadgroup float pool[NSG * 32 * (R + 2) - 1];", 1, SMALL),
    "first tokens over those of the tail": ("exact_run", "part ? n_before : 0;", "0;", 1, TAIL),
    "tail begins a token late": ("exact_run", "max(begin - p.n_first, 0)", "max(begin - p.n_first, 1)", 1, TAIL),
    "tail read from the first tokens' length on": ("exact_run", "end - begin - n_before", "end - begin", 1, TAIL),
    "score of a neighbour's token": ("score_exact", "(up1 ? high : low)", "(up1 ? low : high)", 1, TAIL),
    "exact tokens read past the last": ("score_exact", "min(first + j, run.n - 1)", "(first + j)", 1, dict(TAIL, n_first=0)),
    "slices of values overlap": ("attend_exact", "partial[((slice - 1) * n + r) * V + d]", "partial[r * V + d]", 1, TAIL),
    "slices read before they are written": ("attend_exact", BARRIER, "", 3, TAIL),
    "one slice left out": ("attend_exact", "for (int i = 1; i < n_slices; i++) sum", "for (int i = 2; i < n_slices; i++) sum", 1, TAIL),
    "exact weights read before they are made": ("attend_exact", BARRIER, "", 2, TAIL),
    "tile overwritten while in use": (MATRIX, "tile_barrier(n_blocks == 1);", "", 3, dict(MANY, n_coded=700)),
    "tile read before it is staged": (MATRIX, "tile_barrier(n_blocks == 1);", "", 4, ROWS),
    "simdgroup barrier where two simdgroups share a tile": (MATRIX, "tile_barrier(n_blocks == 1);", "tile_barrier(true);", 4, MANY),
    "wrong column of the operand": (MATRIX, "row) * 8 + column;", "row) * 8 + row;", 1, ROWS),
    "rows beyond the last one written": (MATRIX, "if (r >= n_rows) continue;", "", 1, MANY),
    "scale of another token": (MATRIX, "tile_params[t * NG + g]", "tile_params[row * NG + g]", 1, ROWS),
    "one part left out": (COMBINE, "p.n_parts, p.n_ranges", "p.n_parts - 1, p.n_ranges", 1, SMALL),
    "misaligned read": (SPLIT, "4 * KB * unit + Keys::kBytes * part_of_unit;", "4 * KB * unit + Keys::kBytes * part_of_unit + 1;", 1, SMALL),
    "write through an input": (SPLIT, "const int n_exact = p.n_first + p.n_tail;", "const int n_exact = p.n_first + p.n_tail; const_cast<device half*>(key_norms)[0] = 0;", 1, SMALL),
    "tokens beyond the lengths of one row": ("coded_range", "clamp(b.coded_end, range.begin, limit)", "limit", 1, dict(SMALL, n_repeats=1, n_tail=3, beyond=200)),
    "tokens beyond the lengths of eight rows": ("coded_range", "clamp(b.coded_end, range.begin, limit)", "limit", 1, dict(ROWS, n_coded=300, n_tail=3, beyond=200)),
    # Means, balance
    "mean of another block": (SPLIT, "block_offset<K, R>(p, means, my_block,", "block_offset<K, R>(p, means, my_block / 2,", 1, MEANS),
    "offset of the first block kept": (SPLIT, "base / kBlockTokens != my_block", "my_block < 0", 1, MEANS),
    "blocks counted from the first token attended to": ("coded_range", "range.begin / kBlockTokens * kBlockTokens", "range.begin", 1, PADDED),
    "tiles of padding not cut": (SPLIT, "const int base = max(tile, range.begin),", "const int base = tile,", 1, PADDED),
    "unrotated queries over the rotated ones": (SPLIT, "merged + R * M;  // for the means", "merged;", 1, MEANS),
    "mean of the rotated query": (SPLIT, "my_block, plain_queries, lane)", "my_block, queries, lane)", 1, MEANS),
    "offsets of the rows swapped": ("block_offset", "(up ? high : low)", "(up ? low : high)", 1, MEANS),
    "balance left out": ("prepare_query", "x[i] /= balance", "x[i] += 0.0f * balance", 1, MEANS),
    "balance of another head": ("prepare_query", "kv_head * p.balance.head", "0 * p.balance.head", 1, MEANS),
    "balance multiplied": ("prepare_query", "x[i] /= balance", "x[i] *= balance", 1, MEANS_ROWS),
    "fp16 means read as fp32": ("mean_at", "means_kind == kMeansFloat", "means_kind == kMeansHalf", 1, MEANS),
    "fp32 means read as fp16": ("mean_at", "means_kind == kMeansFloat", "false", 1, dict(MEANS_ROWS, float_means=True)),
    "fp32 means staged as fp16": (MATRIX, "if (means_kind == kMeansHalf) {", "if (true) {", 1, dict(MEANS_ROWS, float_means=True)),
    "strides of fp32 means in fp16": (SPLIT, "TQ_ATTENTION_HEAD", "TQ_ATTENTION_HEAD means -= 2 * kv_head * p.means.head;", 1, dict(MEANS, float_means=True)),
    "means staged over a tile in use": (MATRIX, "tile_barrier(n_blocks == 1);", "", 1, LONG_ROWS),
    "means read before they are staged": (MATRIX, "tile_barrier(n_blocks == 1);", "", 2, MEANS_ROWS),
    "tile staged over means in use": (MATRIX, "tile_barrier(n_blocks == 1);", "", 3, MEANS_ROWS),
    "means read past the last block": (MATRIX, "b * kBlockTokens < end && d", "d", 1, MEANS_ROWS),
    "offset of the next block": (MATRIX, "i_tile / 2 % kStagedBlocks", "(i_tile + 1) / 2 % kStagedBlocks", 1, MEANS_ROWS),
    "offset of another lane's rows": (MATRIX, "int(lane & 9u)", "int(lane & 8u)", 1, MEANS_ROWS),
    "means of the first eight blocks kept": (MATRIX, "i_tile % (2 * kStagedBlocks) == 0", "i_tile == 0", 1, LONG_ROWS),
    "blocks shared out one tile off": (MATRIX, "+ block_tokens - 1) / block_tokens * kBlockTokens", "+ block_tokens - 1) / block_tokens * kBlockTokens - 32", 1, MEANS_ROWS),
    "means of another row's query": ("stage_offsets", "row1 % p.n_queries", "row0 % p.n_queries", 1, dict(MEANS, n_repeats=3, n_rows=3)),
    # Lloyd-Max values
    "norm of the value not applied": (SPLIT, "scaled = weight * as_type<float>(tile_params[t]);", "", 1, LLOYD),
    "norm of another value": (SPLIT, "as_type<float>(tile_params[t])", "as_type<float>(tile_params[lane])", 1, LLOYD),
    "norm in the denominator": (SPLIT, "row_sum += weight;\n", "row_sum += weight * (LLOYD ? as_type<float>(tile_params[lane]) : 1.0f);\n", 1, LLOYD),
    "norm not applied by matrices": (MATRIX, "float2 scaled = weights[rt] * norm;", "float2 scaled = weights[rt];", 1, LLOYD_ROWS),
    "levels of the keys": (SPLIT, "OWN_TABLE ? reinterpret_cast<threadgroup const uchar*>(value_table) + bank : lookup", "lookup", 1, dict(LLOYD, value_bits=2)),
    "levels of the keys in matrices": (MATRIX, "(OWN_TABLE ? reinterpret_cast<threadgroup const uchar*>(value_table) : lookup)", "lookup", 1, dict(LLOYD_ROWS, value_bits=4)),
    "levels of even dimensions only": (MATRIX, "4 * (row & 1)", "0", 1, LLOYD_ROWS),
    "bytes of the next token": (MATRIX, "bytes[4 * (VW + i)]", "bytes[4 * i]", 1, LLOYD_ROWS),
    "runs of a value out of order": ("LloydValues", "8 * (i / kRun)", "8 * (3 - i / kRun)", 1, LLOYD),
    "units of a value not scaled": ("LloydValues", "return 1.0f / float(kCodebookTop);", "return 1.0f;", 1, LLOYD),
    "Lloyd-Max values past the last token": ("LloydValues", "t < n && has, c)", "has, c)", 1, LLOYD),
    "weight 0 times a NaN norm": (SPLIT, "if (skips) scaled =", "if (false) scaled =", 1, dict(LLOYD, spoilt=True)),
    "weight 0 times a NaN norm in matrices": (MATRIX, "if (skips) scaled =", "if (false) scaled =", 1, dict(LLOYD_ROWS, spoilt=True)),
}  # fmt: skip


CHUNK = dict(n_kv_heads=1, n_repeats=1, n_rows=40, n_coded=300, head_dim=64)
CHUNK_LLOYD = dict(CHUNK, value_coding="lloyd", value_bits=3)
CHUNK_MEANS = dict(CHUNK, n_kv_heads=2, n_coded=700, means=True, balance=True)
CHUNK_TAIL = dict(CHUNK, n_coded=40, n_first=4, n_tail=60, options={"mask": "causal"})
CHUNK_CAUSAL = dict(CHUNK, options={"mask": "causal"})
CHUNK_SPLIT = dict(CHUNK, n_coded=900, n_tail=700)
CHUNK_WIDE = dict(CHUNK, head_dim=160, n_rows=20, n_tail=20)
CHUNK_HEADS = dict(CHUNK_TAIL, n_repeats=3, n_rows=13, n_coded=2, n_first=0, n_tail=13)
CHUNK_PADDED = dict(CHUNK, options={"left_padding": mx.array([45])})
PROMPT_MUTATIONS = {
    "means staged over a tile in use": (PROMPT_KERNEL, BARRIER, "", 1, CHUNK_MEANS),
    "means read before they are staged": (PROMPT_KERNEL, BARRIER, "", 2, CHUNK_MEANS),
    "keys staged over means in use": (PROMPT_KERNEL, BARRIER, "", 3, CHUNK_MEANS),
    "keys staged over values in use": (PROMPT_KERNEL, BARRIER, "", 3, CHUNK),
    "keys read before they are staged": (PROMPT_KERNEL, BARRIER, "", 4, CHUNK),
    "values staged over keys in use": (PROMPT_KERNEL, BARRIER, "", 5, CHUNK),
    "scores of the partner read before they are there": (PROMPT_KERNEL, BARRIER, SIMD_BARRIER, 5, CHUNK_WIDE),
    "values read before they are staged": (PROMPT_KERNEL, BARRIER, "", 6, CHUNK),
    "sums rotated over values in use": (PROMPT_KERNEL, BARRIER, "", 7, CHUNK),
    "exact keys staged over values in use": (PROMPT_KERNEL, BARRIER, "", 8, CHUNK_TAIL),
    "exact keys read before they are staged": (PROMPT_KERNEL, BARRIER, "", 9, CHUNK_TAIL),
    "exact values staged over keys in use": (PROMPT_KERNEL, BARRIER, "", 10, CHUNK_TAIL),
    "exact values read before they are staged": (PROMPT_KERNEL, BARRIER, "", 11, CHUNK_TAIL),
    "keys past the last token": ("LevelTile", "t >= begin && t < end", "t >= begin", 1, CHUNK),
    "value codes past the last token": ("CodeTile", "t >= begin && t < end", "t >= begin", 1, CHUNK),
    "bytes of another unit": ("LevelTile", "4 * BITS * (part / 4) + part % 4", "4 * BITS * (part % 2) + part % 4", 1, CHUNK),
    "halves of a word swapped": ("CodeTile", "8 * (part / 2) + 2 * (part % 2)", "8 * (part / 2) + 2 - 2 * (part % 2)", 1, CHUNK),
    "code of the next slot": ("CodeTile", "held[k] >> uint(BITS * s)", "held[k] >> uint(BITS * (s ^ 1))", 1, CHUNK),
    "bias without the middle of the codes": (PROMPT_KERNEL, "CodeTile<VB, NG, TT, NT>::kMiddle", "0.0f", 1, CHUNK),
    "the last tile of keys again": (PROMPT_KERNEL, "key_bytes, tile_begin + TT,", "key_bytes, tile_begin,", 1, CHUNK),
    "norms of the last tile again": (PROMPT_KERNEL, "key_signs, tile_begin + TT,", "key_signs, tile_begin,", 1, CHUNK),
    "key of the neighbour": (PROMPT_KERNEL, "float(from[KL])", "float(from[0])", 1, CHUNK),
    "exact key of the neighbour": (PROMPT_KERNEL, "float(from[KE])", "float(from[0])", 1, CHUNK_TAIL),
    "norm of the neighbour": (PROMPT_KERNEL, "float2(norms[t], norms[t + 1])", "float2(norms[t], norms[t])", 1, CHUNK),
    "value of another token": (PROMPT_KERNEL, "tile + (8 * f + row) * VL + column", "tile + (8 * f + column) * VL + column", 1, CHUNK),
    "scale of another group": (PROMPT_KERNEL, "tile_scales[t * NP + g], ", "tile_scales[t * NP], ", 1, CHUNK),
    "norm of another value": (PROMPT_KERNEL, "tile_scales[t], ", "tile_scales[t ^ 2], ", 1, CHUNK_LLOYD),
    "bias of another group": (PROMPT_KERNEL, "lane_of_column(lane, g)", "lane_of_column(lane, 0)", 1, dict(CHUNK, head_dim=128)),
    "query of the last row for all": ("keep_row", "mine ? y.x : old.x", "y.x", 1, CHUNK),
    "partner's scores left out": ("mask_coded", "if (S == 2) x = x + partial", "if (false) x = x + partial", 1, CHUNK_WIDE),
    "partner's exact scores left out": ("mask_exact", "if (S == 2) x = x + partial", "if (false) x = x + partial", 1, CHUNK_WIDE),
    "two simdgroups rotate one row": (PROMPT_KERNEL, "own = rows + part * V", "own = rows", 1, CHUNK_WIDE),
    "sums not rotated back": (PROMPT_KERNEL, "if (is_direct && has_hadamard)", "if (false)", 1, CHUNK),
    "sums of a split context rotated twice": (PROMPT_KERNEL, "if (is_direct && has_hadamard)", "if (has_hadamard)", 1, CHUNK_SPLIT),
    "weights not rescaled": (PROMPT_KERNEL, "row_sum *= factor;", "", 1, CHUNK),
    "sums not rescaled": (PROMPT_KERNEL, "put(acc[i], get(acc[i]) * factor);", ";", 1, CHUNK),
    "biases not rescaled": (PROMPT_KERNEL, "put(bias_acc, get(bias_acc) * factor);", ";", 1, CHUNK),
    "coded sums not rescaled by exact scores": (PROMPT_KERNEL, "put(acc[i], get(acc[i]) * factor);", ";", 2, CHUNK_TAIL),
    "sums not cleared": (PROMPT_KERNEL, "put(acc[i], float2(0.0f));", ";", 1, CHUNK),
    "biases not cleared": (PROMPT_KERNEL, "put(bias_acc, float2(0.0f));", "", 1, CHUNK),
    "maximum of half the columns": ("column_max", "ushort(8)", "ushort(1)", 1, CHUNK),
    "sum of half the columns": ("column_sum", "ushort(8)", "ushort(1)", 1, CHUNK),
    "vote that needs every lane": (PROMPT_KERNEL, "simd_any(tile_max > row_max)", "simd_all(tile_max > row_max)", 1, dict(CHUNK, n_coded=3)),
    "scores of means from another row": ("lane_of_column", "lane & 22u", "lane & 6u", 1, CHUNK_MEANS),
    "mean of the next block": (PROMPT_KERNEL, "lane_of_column(lane, b)", "lane_of_column(lane, b + 2)", 1, CHUNK_MEANS),
    "means of the first eight blocks kept": (PROMPT_KERNEL, "block >= first_block + kStagedBlocks", "first_block < 0", 1, CHUNK_MEANS),
    "means of the rotated query": (PROMPT_KERNEL, "mean_offsets<T, K>(p, query, has_row", "mean_offsets<T, K>(p, q, has_row", 1, CHUNK_MEANS),
    "padding attended to": ("mask_coded", "t >= begin && t < limit", "t < limit", 1, CHUNK_PADDED),
    "coded tokens after the query": (PROMPT_KERNEL, "coded_limit(p, range.end, my_query)", "range.end", 1, CHUNK_CAUSAL),
    "causal limit of a row of another head": (PROMPT_KERNEL, "last_row % p.n_queries : p.n_queries - 1", "last_row % p.n_queries : first_row % p.n_queries", 1, CHUNK_HEADS),
    "exact tokens after the query": (PROMPT_KERNEL, "last_column + my_query :", "last_column + my_query + 1 :", 1, CHUNK_TAIL),
    "a block's last exact token left out": (PROMPT_KERNEL, "last_query - p.n_coded + 1", "last_query - p.n_coded", 1, CHUNK_TAIL),
    "first tokens from the tail": ("stage_exact", "e < p.n_first ?", "e < 0 ?", 1, CHUNK_TAIL),
    "tail read past its dimensions": ("stage_exact", "d < dim && ", "", 1, dict(CHUNK_TAIL, head_dim=72)),
    "exact tokens of a range from the beginning": (PROMPT_KERNEL, "(int(tg.x) - p.n_ranges) * p.range_tokens", "0", 1, CHUNK_SPLIT),
    "part of another range": (PROMPT_KERNEL, "p.n_parts + int(tg.x)) * n_rows + my_row", "p.n_parts) * n_rows + my_row", 1, CHUNK_SPLIT),
    "rows beyond the last one written": (PROMPT_KERNEL, "if (!has_row) return;", "", 1, dict(CHUNK, n_rows=33)),
    "sink left out": (PROMPT_KERNEL, "(sink == -INFINITY ? 0.0f : rescale(sink, all_max))", "0.0f", 1, dict(CHUNK, sinks=True)),
    "sign of the wrong bit": (PROMPT_KERNEL, "uint(d % 32 + row)", "uint(d % 32 + column)", 1, dict(CHUNK, qjl=True)),
    "norm of another sign": (PROMPT_KERNEL, "tile_residual_norms[t + 1])", "tile_residual_norms[t])", 1, dict(CHUNK, qjl=True)),
    "weight 0 times a NaN scale": (PROMPT_KERNEL, "none0 = skips &&", "none0 = false &&", 1, dict(CHUNK, spoilt=True)),
    "weight 0 times a NaN norm": (PROMPT_KERNEL, "none0 = skips &&", "none0 = false &&", 1, dict(CHUNK_LLOYD, spoilt=True)),
    "weight 0 times a NaN bias": (PROMPT_KERNEL, "finite ? bias : 0.0f", "bias", 1, dict(CHUNK, spoilt=True)),
    "weight 0 times a NaN exact value": ("stage_exact", "odd = odd ||", "odd = false &&", 1, dict(CHUNK, n_tail=20, spoilt=True)),
}  # fmt: skip


def kernel_for(problem, prompt=False):
    """The kernel that a mutation is tried in, whatever the plan would choose."""
    n_rows = problem.q.shape[1] // problem.packed_k.codes.shape[1] * problem.q.shape[2]
    if prompt:
        return "prompt64" if n_rows > 32 and problem.q.shape[3] <= metal_ops.ENUM["kPromptDim"] else "prompt32"
    return "split" if n_rows <= 4 else "matrix"


def make_problem(float_means=False, spoilt=False, beyond=None, **shape):
    """A problem and its answer.

    Args:
        float_means: in fp32, as a dense rotation gives them.
        spoilt: NaN in values of tokens that a mask hides.
        beyond: the number of coded tokens that are stored; those beyond hold NaN.
        shape: of `Problem`.
    """
    problem = Problem(rotation="none" if float_means else "hadamard", **shape)
    if float_means:
        means = problem.packed_k.means.astype(mx.float32) * 1.0001
        problem.packed_k = problem.packed_k._replace(means=means)
    want = problem.answer
    if spoilt:
        hidden = np.arange(problem.n_keys) % 7 == 3
        problem.options["mask"] = mx.array(~hidden)
        answer = problem.answer()
        params = np.array(problem.packed_v.params)
        params[:, :, hidden[: problem.n_coded]] = np.nan
        problem.packed_v = problem.packed_v._replace(params=mx.array(params))
        if problem.tail is not None:
            values = np.array(problem.tail[1])
            values[:, :, hidden[problem.n_coded :]] = np.nan
            problem.tail = problem.tail[0], mx.array(values)
        want = lambda: answer  # noqa: E731
    if beyond is not None:
        problem.options["lengths"] = mx.array([[0, beyond, problem.n_tail]])
        answer = problem.answer()
        norms, params = np.array(problem.packed_k.norms), np.array(problem.packed_v.params)
        norms[:, :, beyond:], params[:, :, beyond:] = np.nan, np.nan
        problem.packed_k = problem.packed_k._replace(norms=mx.array(norms))
        problem.packed_v = problem.packed_v._replace(params=mx.array(params))
        want = lambda: answer  # noqa: E731
    return problem, want


def assert_attention(device, name, text, mutation, shape):
    """The mutation of an attention kernel, or None, is caught by this shape of a problem."""
    problem, want = make_problem(**shape)
    device.kernel = kernel_for(problem, prompt=name == "turboquant_prompt")
    device.spared = SPARED if name == "turboquant_attention" and (mutation is None or mutation[0] != COMBINE) else ()
    check = lambda out: assert_close(out, want(), KERNEL_TOLERANCE[mx.float32])  # noqa: E731
    assert_caught(device, name, text, mutation, lambda d: attention(d, problem), check)


def shapes(mutations):
    return {str(shape): shape for *_, shape in mutations.values()}.values()


# One compilation for all mutations of other kernels.
SPARED = ("TQ_COMBINE",)


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_of_attention_is_caught(name, mutant):
    *mutation, shape = MUTATIONS[name]
    assert_attention(mutant, "turboquant_attention", ATTENTION, mutation, shape)


@pytest.mark.parametrize("shape", shapes(MUTATIONS), ids=str)
def test_unmutated_kernels_pass_the_same_check(mutant, shape):
    assert_attention(mutant, "turboquant_attention", ATTENTION, None, shape)


@pytest.mark.parametrize("name", PROMPT_MUTATIONS)
def test_mutation_of_prompts_is_caught(name, mutant):
    *mutation, shape = PROMPT_MUTATIONS[name]
    assert_attention(mutant, "turboquant_prompt", PROMPT, mutation, shape)


@pytest.mark.parametrize("shape", shapes(PROMPT_MUTATIONS), ids=str)
def test_unmutated_prompt_kernel_passes_the_same_check(mutant, shape):
    assert_attention(mutant, "turboquant_prompt", PROMPT, None, shape)
    assert "prompt" in mutant.log[0][0]


# name -> (operation, function, text, replacement, occurrence)
KEYS, GROUPS, LLOYD_VALUES = "quantize_keys", "quantize_values_groups", "quantize_values_lloyd"
ENCODE_MUTATIONS = {
    "codes shared without a barrier": (GROUPS, GROUPS, SIMD_BARRIER, "", 1),
    "level below the boundary": (KEYS, "encode_levels", ">= p.boundaries[k] * unit_length", "> p.boundaries[k] * unit_length + 0.02f", 1),
    "last token of a full threadgroup": (KEYS, KEYS, "if (row >= p.n_rows) return;", "if (row > p.n_rows) return;", 1),
    "spare bits of the wrong word": (KEYS, "encode_levels", ">> uint(k) & 1u) << 3", ">> uint(2 - k) & 1u) << 3", 1),
    "slots in another order": (GROUPS, GROUPS, "codes[W * s + w]", "codes[SLOTS * w + s]", 1),
    "mean of the wrong block": (KEYS, "token_of", "t / kBlockTokens", "(t + 1) / kBlockTokens", 1),
    "mean of the first block for all": (KEYS, "token_of", "t / kBlockTokens * p.means.token", "0 * p.means.token", 1),
    "fp16 means taken for fp32": (KEYS, "mean_at", "p.flags & kEncodeFloatMeans", "p.flags & kEncodeMeans", 1),
    "fp32 means taken for fp16": ("quantize_keys_float_means", "mean_at", "p.flags & kEncodeFloatMeans", "false", 1),
    "key not balanced": (KEYS, "load_vector", "x[i] *= balance", "x[i] += 0.0f * balance", 1),
    "balance of the first head": (KEYS, "token_of", "head * p.balance.head", "0 * p.balance.head", 1),
    "balance divided": (KEYS, "load_vector", "x[i] *= balance", "x[i] /= balance", 1),
    "key's norm for a value": (LLOYD_VALUES, LLOYD_VALUES, "coded.projection * float(kCodebookTop) / level_square", "coded.square / (coded.projection / float(kCodebookTop))", 1),
    "norm of one lane's levels": (LLOYD_VALUES, LLOYD_VALUES, "level_square = simd_sum(level_square);", "", 1),
    "norm of the scaled value": (LLOYD_VALUES, LLOYD_VALUES, "/ level_square / coded.safe", "/ level_square", 1),
    "mean left out": ("dequantize_keys", "store_vector", "x[i] += mean_at(p, means, token, d);", ";", 1),
    "balance not undone": ("dequantize_keys", "store_vector", "x[i] /= balance", "x[i] += 0.0f * balance", 1),
    "norm of the value left out": ("dequantize_lloyd", "dequantize_levels", "float(norms[token.params]) *", "", 1),
}  # fmt: skip


def assert_encode(device, operation, mutation):
    """The mutation of an encoding kernel, or None, is caught: other bytes than the CPU's."""
    rng = np.random.default_rng(0)
    x = mx.array(rng.normal(size=(1, 2, 133, 64)).astype(np.float32)) * 3
    means, balance = tqext.block_means(x), mx.array(np.exp2(rng.uniform(-2, 2, (2, 64))).astype(np.float32))
    means = means + mx.array(rng.normal(size=means.shape).astype(np.float16))
    name, options = operation.removesuffix("_groups").removesuffix("_lloyd"), {}
    if "keys" in operation:
        options = dict(means=means, balance=balance)
    if operation == "quantize_keys_float_means":
        name, options = "quantize_keys", dict(means=means.astype(mx.float32) * 1.0001, rotation="none")
    if operation == LLOYD_VALUES:
        options = dict(coding="lloyd", bits=3)
    argument = x
    if operation.startswith("dequantize"):
        name = "dequantize"
        lloyd = operation == "dequantize_lloyd"
        argument = tqext.quantize_values(x, coding="lloyd", bits=3) if lloyd else tqext.quantize_keys(x, **options)
        options = {}
    want = getattr(tqext, name)(argument, **options)

    def same(out):
        pairs = [(out, want)] if name == "dequantize" else zip(out, want[:2], strict=True)
        assert all(mx.array_equal(a, b).item() for a, b in pairs)

    run = lambda d: getattr(metal_ops, name)(d, argument, **options)  # noqa: E731
    assert_caught(device, "turboquant_encode", ENCODE, mutation, run, same)


@pytest.mark.parametrize("name", ENCODE_MUTATIONS)
def test_mutation_of_encode_is_caught(name, mutant):
    operation, *mutation = ENCODE_MUTATIONS[name]
    assert_encode(mutant, operation, mutation)


@pytest.mark.parametrize("operation", sorted({mutation[0] for mutation in ENCODE_MUTATIONS.values()}))
def test_unmutated_encode_passes_the_same_check(operation, mutant):
    assert_encode(mutant, operation, None)


# Other roundings than the CPU's: some parameters of a thousand change.
ROUNDING_MUTATIONS = {
    "last place of the rotation": ("apply_signs", "? -scale : scale", "? -scale * 1.0000001f : scale * 1.0000001f"),
    "butterflies from the farthest partner": ("sylvester", "ushort h = 1; h < 32 && h < n; h *= 2", "ushort h = 16; h >= 1; h /= 2"),
    "sum in another order": ("sum_lanes", "ushort h = 8; h >= 1; h /= 2", "ushort h = 1; h <= 8; h *= 2"),
    "quotient by a product": (KEYS, "coded.square / (coded.projection / float(kCodebookTop)) / coded.safe", "coded.square * (1.0f / (coded.projection / float(kCodebookTop)) / coded.safe)"),
}  # fmt: skip


def same_bytes_of_3000_tokens(device):
    rng = np.random.default_rng(5)
    x = mx.array((rng.normal(size=(1, 3, 1000, 128)) * np.exp(rng.normal(size=128))).astype(np.float32)).astype(mx.float16)
    keys = dict(means=tqext.block_means(x))
    values = dict(coding="groups", bits=4)
    pairs = (
        *zip(metal_ops.quantize_keys(device, x, **keys), tqext.quantize_keys(x, **keys)[:2], strict=True),
        *zip(metal_ops.quantize_values(device, x, **values), tqext.quantize_values(x, **values)[:2], strict=True),
    )
    return all(mx.array_equal(a, b).item() for a, b in pairs)


@pytest.mark.parametrize("name", ROUNDING_MUTATIONS)
def test_mutation_of_a_rounding_is_caught_by_3000_tokens(name):
    device = metal_ops.Device("fast")
    text = ENCODE.replace('#include "rotate_row.h"\n', included("rotate_row.h"))
    device.sources = {"turboquant_encode": replace(text, *ROUNDING_MUTATIONS[name])}
    assert not same_bytes_of_3000_tokens(device)


def test_unmutated_roundings_give_the_bytes_of_3000_tokens():
    device = metal_ops.Device("fast")
    device.sources = {"turboquant_encode": ENCODE.replace('#include "rotate_row.h"\n', included("rotate_row.h"))}
    assert same_bytes_of_3000_tokens(device)


Q1_MUTATIONS = {
    "columns of the next group": ("q1_matvec", "byte / kGroupBytes]", "byte / (2 * kGroupBytes)]", 2),
    "rows beyond the last one": ("q1_matvec", "if (row0 + r >= p.n_rows || !mine) continue;", "if (!mine) continue;", 2),
    "tile staged without a barrier": ("q1_matmul", BARRIER, "", 9),
    "sign of the wrong bit": ("q1_matmul", "8 * (step % 4) + row)", "8 * (step % 4) + column)", 9),
}


def assert_q1(device, n_inputs, mutation):
    """The mutation of a 1-bit product, or None, is caught by as many rows of x."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, (21, 16), dtype=np.uint32)
    scales = rng.normal(size=(21, 4)).astype(np.float16)
    x = rng.normal(size=(n_inputs, 512)).astype(np.float32)
    want = x.astype(np.float64) @ reference.q1_weights(words, scales).T
    run = lambda d: metal_ops.q1_matmul(d, mx.array(x), mx.array(words), mx.array(scales))  # noqa: E731
    assert_caught(device, "q1_matmul", Q1, mutation, run, lambda out: assert_close(out, want, 1e-5))


@pytest.mark.parametrize("name", Q1_MUTATIONS)
def test_mutation_of_q1_is_caught(name, mutant):
    *mutation, n_inputs = Q1_MUTATIONS[name]
    assert_q1(mutant, n_inputs, mutation)


@pytest.mark.parametrize("n_inputs", [2, 9])
def test_unmutated_q1_passes_the_same_check(n_inputs, mutant):
    assert_q1(mutant, n_inputs, None)


def test_at_least_twelve_kinds_of_bugs_are_seeded():
    mutations = (*MUTATIONS, *PROMPT_MUTATIONS, *ENCODE_MUTATIONS, *ROUNDING_MUTATIONS, *Q1_MUTATIONS)
    kinds = {re.sub(r"[^a-z ]", "", name) for name in mutations}
    assert len(kinds) >= 12

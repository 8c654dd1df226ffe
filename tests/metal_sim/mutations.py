"""Bugs seeded into the texts of our Metal kernels, for the tests that look whether they show.

A mutation is an edit of the kernel's source that must apply; many leave the values right on most schedules, so a comparison
of values alone would miss them. It is a function's name, a text in it, its replacement, and which occurrence is meant.
"""

import re

import metal_ops
import metal_simulator as sim

METAL = metal_ops.ROOT / "metal"


def included(name):
    return (METAL / name).read_text().replace("#pragma once", "")


def source(name):
    """The text of a source with what the attention kernels share."""
    return (METAL / f"{name}.metal").read_text().replace('#include "attention.h"\n', included("attention.h"))


ATTENTION, PROMPT, LATENT, ENCODE, Q1 = map(
    source, ("turboquant_attention", "turboquant_prompt", "latent_attention", "turboquant_encode", "q1_matmul")
)

SIMD_BARRIER = "simdgroup_barrier(mem_flags::mem_threadgroup);"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
SPLIT, MATRIX, COMBINE, PROMPT_KERNEL = (f"turboquant_attention_{x}" for x in ("split", "matrix", "combine", "prompt"))
# Kernel -> the functions that it is made of.
PARTS = {
    SPLIT: ("SplitKeys", "stage_split_queries", "stage_split_numbers", "join_states", "join_sums"),
    MATRIX: (
        "stage_matrix_queries",
        "stage_means",
        "stage_words",
        "stage_parameters",
        "multiply_keys",
        "add_lloyd_values",
        "write_matrix_part",
    ),
    PROMPT_KERNEL: (
        "keep_queries",
        "add_coded_values",
        "finish_coded_values",
        "rotate_sums_back",
        "score_exact_keys",
        "write_prompt_row",
    ),
}


def body(source, name):
    """Start and end of a function or a struct in the source."""
    start = source.find(f" {name}(")
    if start < 0:
        start = source.index(f"struct {name} {{")
    return start, re.compile(r"\n};?\n").search(source, start).start()


def replace(source, kernel, old, new, nth=1):
    """Replaces the nth occurrence of `old` inside a kernel, or inside the part of it that has as many."""
    for name in (kernel, *PARTS.get(kernel, ())):
        start, end = body(source, name)
        at = start - 1
        for _ in range(nth):
            at = source.find(old, at + 1, end)
            if at < 0:
                break
        if at >= 0:
            return source[:at] + new + source[at + len(old) :]
    raise AssertionError(f"{kernel}: mutation does not apply: {old}")


def caught(device, run, check):
    """Whether a report or a wrong value shows the bug; a mutation that does not compile is an error.

    run: with the device for its argument. check: raises AssertionError for a wrong result.
    """
    try:
        out = run(device)
    except sim.Fault:
        return True
    try:
        check(out)
    except AssertionError:
        return True
    return False


def assert_caught(device, name, text, mutation, run, check):
    """The mutation of a source, a file's name and its text, is caught; without one (None), the source as it is passes."""
    device.sources = {name: text if mutation is None else replace(text, *mutation)}
    assert caught(device, run, check) == (mutation is not None)


def attention(device, problem):
    return metal_ops.turboquant_attention(device, problem.q, problem.packed_k, problem.packed_v, **problem.arguments())

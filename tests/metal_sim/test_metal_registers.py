"""What a compiler for a GPU makes of the kernels: arrays that stay in memory, registers, length of the code.

Clang compiles them for AMD's gfx1030, for want of Apple's compiler; Apple's cores have 128 registers a lane at full occupancy.
Measured figures, with some room: a change that needs more should know it.
"""

import ctypes
import re

import cost
import metal_ops
import metal_simulator as sim
import pytest

LIMIT = 128
# As a decoding step or a prompt of a model runs them.
CONSTANTS = {
    "turboquant_attention": dict(
        has_hadamard=1, means_kind=metal_ops.ENUM["kMeansHalf"], has_balance=1, has_residual=0, mask_kind=0, has_sinks=0,
        has_left_padding=0, has_lengths=0, is_causal=0, has_indices=0, is_direct=0,
    ),
    "turboquant_prompt": dict(
        has_hadamard=1, means_kind=metal_ops.ENUM["kMeansHalf"], has_balance=1, has_residual=0, mask_kind=0, has_sinks=0,
        has_left_padding=0, has_lengths=0, is_causal=1, has_indices=0, is_direct=1,
    ),
    "latent_attention": dict(
        has_hadamard=1, means_kind=metal_ops.ENUM["kMeansHalf"], has_balance=0, has_residual=0, has_sinks=0,
        mask_kind=metal_ops.ENUM["kMaskFloat"], has_left_padding=0, has_lengths=0, is_causal=0, has_indices=0, is_direct=0,
    ),
    "turboquant_encode": {},
    "q1_matmul": {},
}  # fmt: skip
CONSTANTS["turboquant_attention of lists"] = CONSTANTS["turboquant_attention"] | {"has_indices": 1}
# source, instance -> most registers, most of them spilled with 128, most instructions, most of them in the longest loops that
# are in no other one: over tiles of 32 coded tokens, for the matrix kernel also over exact tokens; over 16 coded latents, then
# over 8 exact ones; over blocks of weights. The encoder has none.
MOST = {
    ("turboquant_attention", "TQ_SPLIT", "half, 64, 64, 3, 2, 0, 1"): (115, 0, 3300, [660]),
    ("turboquant_attention", "TQ_SPLIT", "half, 64, 64, 3, 2, 0, 2"): (140, 9, 4300, [860]),
    ("turboquant_attention", "TQ_SPLIT", "half, 64, 64, 3, 2, 0, 4"): (168, 39, 3800, [1090]),
    ("turboquant_attention", "TQ_SPLIT", "half, 128, 128, 3, 2, 0, 1"): (142, 11, 3900, [1030]),
    ("turboquant_attention", "TQ_SPLIT", "half, 128, 128, 3, 2, 0, 2"): (156, 15, 5100, [1330]),
    ("turboquant_attention", "TQ_SPLIT", "half, 128, 128, 3, 2, 0, 4"): (183, 60, 4800, [1830]),
    ("turboquant_attention", "TQ_SPLIT", "half, 256, 256, 3, 2, 0, 1"): (218, 74, 5300, [2010]),
    ("turboquant_attention", "TQ_SPLIT", "half, 256, 256, 3, 2, 0, 2"): (198, 80, 6600, [2420]),
    ("turboquant_attention", "TQ_SPLIT", "half, 256, 256, 3, 2, 0, 4"): (203, 158, 7100, [3700]),
    ("turboquant_attention", "TQ_SPLIT", "half, 64, 64, 3, 3, 1, 1"): (113, 0, 3200, [690]),
    ("turboquant_attention", "TQ_SPLIT", "half, 64, 64, 3, 3, 1, 2"): (136, 0, 4300, [880]),
    ("turboquant_attention", "TQ_SPLIT", "half, 64, 64, 3, 3, 1, 4"): (167, 35, 5200, [1110]),
    ("turboquant_attention", "TQ_SPLIT", "half, 128, 128, 3, 3, 1, 1"): (141, 10, 3800, [1020]),
    ("turboquant_attention", "TQ_SPLIT", "half, 128, 128, 3, 3, 1, 2"): (153, 13, 5000, [1330]),
    ("turboquant_attention", "TQ_SPLIT", "half, 128, 128, 3, 3, 1, 4"): (182, 60, 6100, [1810]),
    ("turboquant_attention", "TQ_SPLIT", "half, 256, 256, 3, 3, 1, 1"): (216, 87, 5200, [1920]),
    ("turboquant_attention", "TQ_SPLIT", "half, 256, 256, 3, 3, 1, 2"): (193, 74, 6500, [2330]),
    ("turboquant_attention", "TQ_SPLIT", "half, 256, 256, 3, 3, 1, 4"): (203, 155, 8100, [3620]),
    ("turboquant_attention", "TQ_SPLIT", "half, 128, 128, 4, 4, 1, 4"): (180, 61, 6000, [1780]),
    ("turboquant_attention", "TQ_MATRIX", "half, 128, 128, 3, 2, 0"): (177, 11, 5100, [1770, 1470]),
    ("turboquant_attention", "TQ_MATRIX", "half, 64, 64, 3, 3, 1"): (124, 0, 4200, [1700, 1080]),
    ("turboquant_attention", "TQ_MATRIX", "half, 128, 128, 3, 3, 1"): (163, 0, 5200, [1770, 1620]),
    ("turboquant_attention", "TQ_MATRIX", "half, 256, 256, 3, 3, 1"): (202, 45, 7000, [2760, 1910]),
    ("turboquant_attention of lists", "TQ_MATRIX", "half, 128, 128, 3, 3, 1"): (167, 0, 5500, [2020, 1780]),
    ("turboquant_attention", "TQ_COMBINE", "half, 128"): (33, 0, 400, [60]),
    ("turboquant_prompt", "TQ_PROMPT", "half, 64, 64, 3, 3, 1, 64"): (124, 0, 4800, [2120]),
    ("turboquant_prompt", "TQ_PROMPT", "half, 64, 64, 3, 3, 1, 32"): (131, 0, 4900, [2120]),
    ("turboquant_prompt", "TQ_PROMPT", "half, 128, 128, 3, 2, 0, 64"): (180, 45, 7300, [3090]),
    ("turboquant_prompt", "TQ_PROMPT", "half, 128, 128, 3, 3, 1, 64"): (164, 32, 7200, [3080]),
    ("turboquant_prompt", "TQ_PROMPT", "half, 128, 128, 3, 3, 1, 32"): (178, 52, 7400, [3080]),
    ("turboquant_prompt", "TQ_PROMPT", "half, 256, 256, 3, 3, 1, 32"): (157, 47, 6400, [2070]),
    ("latent_attention", "TQ_LATENT", "half, 512, 3"): (155, 44, 5300, [1220, 690]),
    ("latent_attention", "TQ_LATENT", "half, 256, 3"): (114, 0, 3300, [720, 450]),
    ("latent_attention", "TQ_LATENT_COMBINE", "half, 512"): (69, 0, 980, [145]),
    ("turboquant_encode", "TQ_QUANTIZE_KEYS", "half, 128, 3"): (48, 0, 1400, []),
    ("turboquant_encode", "TQ_QUANTIZE_VALUES_LLOYD", "half, 128, 3"): (44, 0, 1000, []),
    ("q1_matmul", "TQ_Q1_MATVEC", "half, 1, 4"): (82, 0, 1100, [750]),
    ("q1_matmul", "TQ_Q1_MATVEC", "half, 8, 1"): (150, 17, 2000, [1050]),
    ("q1_matmul", "TQ_TERNARY_MATVEC", "half, 1, 4"): (60, 0, 650, [400]),
    ("q1_matmul", "TQ_TERNARY_MATVEC", "half, 8, 2"): (148, 20, 2100, [1060]),
}


def SELECTION(name, params):
    """(a kernel exists for these parameters, they run by default): of each kernel those of a head of 128 dimensions."""
    usual = ("half, 128, 128, 3, 3, 1", "half, 512", "half, 128, 3", "half, 8", "half, 128")
    if name == "test_kernels_stay_in_registers":
        return True, params["arguments"].startswith(usual) and "3, 2, 0" not in params["arguments"]
    return True, params.get("dim", 128) == 128


def compiled(source, macro, arguments, text=None):
    body = text if text is not None else f'#include "{source.partition(" ")[0]}.metal"'
    kernel = f'{body}\n{macro}("k", {arguments})\n'
    return sim.compile_for_gpu(kernel, CONSTANTS[source], includes=metal_ops.INCLUDES, limit=LIMIT)


@pytest.mark.parametrize("source, macro, arguments", MOST)
def test_kernels_stay_in_registers(source, macro, arguments):
    figures = compiled(source, macro, arguments)
    print(macro, arguments, figures)
    assert figures.arrays == []
    registers, spilled, instructions, loops = MOST[source, macro, arguments]
    assert figures.registers <= registers and figures.spilled <= spilled and figures.instructions <= instructions
    found = figures.loops[: len(loops)] if loops else figures.loops
    assert all(n <= most for n, most in zip(found, loops, strict=True))


def _figures(kernel, dim, rows):
    """The figures of a kernel for 3-bit keys and 3-bit Lloyd-Max values, as clang compiles it."""

    def code(macro, rows=""):
        source = "turboquant_prompt" if macro == "TQ_PROMPT" else "turboquant_attention"
        return compiled(source, macro, f"half, {dim}, {dim}, 3, 3, 1" + (f", {rows}" if rows else ""))

    if kernel == "split":
        return cost.split_figures(code("TQ_SPLIT", rows), dim, rows)
    if kernel == "matrix":
        return cost.matrix_figures(code("TQ_MATRIX"), dim)
    staged = metal_ops.kernel_figures(kernel, 512, rows)["staged"]
    if dim <= metal_ops.ENUM["kPromptDim"]:
        staged = cost.prompt_staged(code("TQ_PROMPT", 32), code("TQ_PROMPT", 64))
    return cost.prompt_figures(code("TQ_PROMPT", rows), dim, rows, staged)


@pytest.mark.parametrize(
    "kernel, dim, rows",
    [
        *(("split", dim, rows) for dim in (64, 128, 256) for rows in (1, 2, 4)),
        *(("matrix", dim, 8) for dim in (64, 128, 256)),
        *(("prompt32", dim, 32) for dim in (64, 128, 256)),
        *(("prompt64", dim, 64) for dim in (64, 128)),
    ],
)
def test_the_plan_knows_the_figures_of_the_kernels(kernel, dim, rows):
    """KernelFigures of metal/dispatch_plan.h: its cost model chooses a kernel by them. They are in step with the kernels."""
    known, found = metal_ops.kernel_figures(kernel, 2 * dim, rows), _figures(kernel, dim, rows)
    assert known.pop("dims") == 2 * dim
    print(found)
    assert found.registers == known["registers"]
    for name, value in known.items():
        assert getattr(found, name) == pytest.approx(value, rel=0.04, abs=2), (name, found)


def test_the_plan_knows_the_figures_of_the_joining_kernel():
    code = compiled("turboquant_attention", "TQ_COMBINE", "half, 128").code
    once, parts = code.instructions + code.loops[0].all(), code.loops[1].all()
    known = (ctypes.c_int * 2)()
    metal_ops.plans().tq_combine_figures(known)
    assert [once, parts] == pytest.approx(list(known), rel=0.04)


def test_decoding_a_tile_costs_the_prompt_kernel_as_much_per_dimension():
    """Above dimension 128, where only blocks of 32 rows exist, the plan takes twice what 128 dimensions cost."""
    staged = {dim: metal_ops.kernel_figures("prompt32", 2 * dim, 32)["staged"] for dim in (64, 128, 256)}
    assert staged[128] == pytest.approx(2 * staged[64], rel=0.07) and staged[256] == 2 * staged[128]


def test_an_array_with_an_index_of_the_lane_is_seen():
    """The sum of a key's lanes once selected addresses instead of values: a memory array in the innermost loop."""
    text = (metal_ops.ROOT / "metal" / "turboquant_attention.metal").read_text()
    values = re.compile(r"const float low = sum\[i\], high = .*\n *sum\[i\] = .*;\n")
    elements = "sum[i] = (up ? sum[i + h] : sum[i]) + simd_shuffle_xor(up ? sum[i] : sum[i + h], h);\n"
    changed, n = values.subn(elements, text)
    assert n == 2
    assert compiled("turboquant_attention", "TQ_SPLIT", "half, 128, 128, 3, 2, 0, 4", changed).arrays


def test_instructions_of_a_loop_are_counted():
    """Of the whole outermost loop, and only of it."""
    assembly = """.LBB0_0:
\ts_mov_b32 s0, 0
.LBB0_1:                                ; =>This Loop Header: Depth=1
                                        ;     Child Loop BB0_2 Depth 2
\tv_add_u32 v0, v0, v1
\tglobal_load_dword v0, v[0:1], off
.LBB0_2:                                ;   Parent Loop BB0_1 Depth=1
                                        ; =>  This Inner Loop Header: Depth=2
\tds_read_b32 v0, v1
; %bb.3:                                ;   in Loop: Header=BB0_2 Depth=2
\tv_add_u32 v0, v0, v1
; %bb.4:                                ;   in Loop: Header=BB0_1 Depth=1
\ts_cbranch_scc0 .LBB0_1
.LBB0_5:                                ; =>This Inner Loop Header: Depth=1
\ts_nop 0
; %bb.6:
\ts_endpgm
"""
    code = sim._loops(assembly)
    first, second = code.loops
    assert (code.instructions, code.memory) == (2, 0)
    assert (first.all(), first.all_memory(), first.instructions, first.memory) == (5, 2, 3, 1)
    assert (first.loops[0].instructions, first.loops[0].threadgroup_bytes) == (2, 4)
    assert (second.all(), second.all_memory(), second.loops) == (1, 0, [])

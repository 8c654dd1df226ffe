"""The CUDA kernels compile for every architecture, with the compiler that users' machines run, and fit into registers.

By default a choice of the sets of parameters is compiled (covering.py). Registers are looked at, and code optimised, for some
of them, and for all with TQEXT_TESTS=full: optimising takes four fifths of the time.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nvrtc
from covering import FULL
from cuda_parameters import ATTENTION, PROMPT
from support import tool

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the CUDA kernels are part of Linux builds only")


def compile_kernel(name, architecture, *, optimised=True, **defines):
    """The compiler's log; of code that is not optimised the report of registers says nothing."""
    if optimised:
        compiles, text = nvrtc.compile_kernel(name, architecture, [], defines)
    else:
        compiles, text = nvrtc.compile_kernel_apart(name, architecture, ["--Ofast-compile=max"], defines)
    assert compiles and "error" not in text and "warning" not in text, text
    return text


# Keys, coding of the values and their bits of the presets.
PRESETS = {"tq3": (3, 0, 2), "tq33": (3, 1, 3), "tq4": (4, 1, 4)}


def preset(name, **changes):
    key_bits, lloyd, value_bits = PRESETS[name]
    return ATTENTION | {"KEY_BITS": key_bits, "LLOYD": lloyd, "VALUE_BITS": value_bits} | changes


@pytest.mark.covering
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["tq3", "tq33"])
def test_attention_compiles_for_every_architecture(name, architecture):
    # As the host chooses them: 100 KB of shared memory hold two blocks of three stages, not three blocks.
    small = {"BLOCKS_PER_SM": 2, "STAGES": 3} if architecture in ("sm_86", "sm_89", "sm_120") else {}
    optimised = FULL or architecture in ("sm_80", "sm_90", "sm_120")
    log = compile_kernel("turboquant_attention.cu", architecture, optimised=optimised, **preset(name, **small))
    assert "0 bytes spill stores" in log or not optimised, log


@pytest.mark.parametrize(
    "name, dim, rows",
    [("tq33", 128, 4), ("tq33", 128, 16), ("tq4", 128, 8), ("tq4", 256, 8)]
    + [("tq33", 128, 8), ("tq33", 256, 8), ("tq4", 128, 4), ("tq4", 128, 16)] * FULL,
)
def test_attention_of_lloyd_values_fits_into_registers(name, dim, rows):
    two_blocks = rows == 16 or dim > 128
    defines = preset(name, KEY_DIM=dim, VALUE_DIM=dim, ROWS=rows, BLOCKS_PER_SM=2 if two_blocks else 3)
    log = compile_kernel("turboquant_attention.cu", "sm_90", **defines)
    spilled = int(re.search(r"(\d+) bytes spill stores", log).group(1))
    # Four bits and the most registers there are: a few words, outside of the products.
    assert spilled <= (32 if name == "tq4" and two_blocks else 0), log


@pytest.mark.covering
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    "changes",
    [
        {"ROWS": 8, "TYPE": 2},
        {"ROWS": 16, "TYPE": 0, "BLOCKS_PER_SM": 2},
        {"KEY_DIM": 96, "VALUE_DIM": 64, "KEY_BITS": 4, "VALUE_BITS": 4},
        {"KEY_DIM": 256, "VALUE_DIM": 192, "ROWS": 8, "BLOCKS_PER_SM": 2},
        {"KEY_BITS": 2, "SIGNS": 1, "MASK": 2, "STRIDED": 1},
        {"LLOYD": 1, "VALUE_BITS": 3, "ROWS": 16, "TYPE": 0, "BLOCKS_PER_SM": 2},
        {"LLOYD": 1, "VALUE_BITS": 4, "KEY_DIM": 96, "VALUE_DIM": 224, "ROWS": 8, "BLOCKS_PER_SM": 2},
        {"LLOYD": 1, "VALUE_BITS": 2, "VALUE_DIM": 32, "SIGNS": 1, "MASK": 1, "STRIDED": 1},
        {"LISTED": 1, "KEY_DIM": 96, "VALUE_DIM": 64, "SIGNS": 1, "MASK": 2},
        {"LISTED": 1, "STRIDED": 1, "ROWS": 16, "TYPE": 0, "LLOYD": 1, "VALUE_BITS": 3, "BLOCKS_PER_SM": 2},
    ],
)
def test_attention_variants_compile(changes, architecture):
    compile_kernel("turboquant_attention.cu", architecture, optimised=FULL, **(ATTENTION | changes))


VALUES = [{"VALUE_BITS": bits, "LLOYD": lloyd} for bits, lloyd in ((2, 0), (4, 0), (2, 1), (3, 1), (4, 1))]


def compile_prompt(architecture, optimised=False, **changes):
    """Nothing spills where warpgroups multiply; without them a few registers do."""
    warpgroups = architecture == "sm_90" and changes.get("WGMMA", 1)
    optimised = optimised or FULL
    defines = PROMPT | {"WGMMA": int(bool(warpgroups))} | changes
    log = compile_kernel("prompt_attention.cu", architecture + "a" * bool(warpgroups), optimised=optimised, **defines)
    if warpgroups and optimised:
        assert "0 bytes spill stores" in log, log
    # Products of a warpgroup that wait for each other (C7510, C7514), and registers that are not moved (C7508).
    assert not any(f"(C{code})" in log for code in (7508, 7510, 7514)), log


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prompt_attention_compiles_for_every_architecture(architecture):
    compile_prompt(architecture, optimised=architecture == "sm_90")


@pytest.mark.covering
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("values", VALUES)
def test_prompt_attention_value_codings_compile(values, architecture):
    preset_values = values in ({"VALUE_BITS": 2, "LLOYD": 0}, {"VALUE_BITS": 3, "LLOYD": 1})
    compile_prompt(architecture, optimised=architecture == "sm_90" and preset_values, TYPE=2, **values)


@pytest.mark.covering
@pytest.mark.parametrize("architecture", ["sm_90", "sm_80"])
@pytest.mark.parametrize(
    "changes",
    [
        {"ROWS": 64, "BLOCKS_PER_SM": 2},
        {"ROWS": 64, "BLOCKS_PER_SM": 2, "VALUE_BITS": 3, "LLOYD": 1},
        {"ROWS": 64, "KEY_DIM": 256, "VALUE_DIM": 256, "KEY_BITS": 4, "VALUE_BITS": 4, "LLOYD": 1},
        # The rows of larger fp32 heads do not fit into shared memory: test_prompt_attention_of_large_float32_heads_compiles.
        {"ROWS": 64, "KEY_DIM": 192, "VALUE_DIM": 192, "VALUE_BITS": 4, "TYPE": 0},
        {"ROWS": 64, "KEY_DIM": 192, "VALUE_DIM": 128, "MASK": 2},
        {"ROWS": 64, "KEY_DIM": 224, "VALUE_DIM": 160, "TYPE": 2, "MASK": 1},
        {"KEY_DIM": 96, "VALUE_DIM": 64, "MASK": 1},
        {"TILES": 1, "SLOTS": 8, "VALUE_BITS": 3, "LLOYD": 1},
        {"TILES": 2, "SLOTS": 8},
        {"KEY_DIM": 64, "VALUE_DIM": 96, "KEY_BITS": 2, "TYPE": 0},
        {"KEY_DIM": 32, "VALUE_DIM": 32, "MASK": 2, "TYPE": 0},
    ],
)
def test_prompt_attention_variants_compile(changes, architecture):
    if architecture == "sm_80":
        if "TILES" not in changes:  # copies of the copy engine
            compile_prompt("sm_80", **(changes | {"BLOCKS_PER_SM": 1}))
        return
    # Two blocks with a preset's values, the largest dimensions, a mask with half of a head's dimensions, and float32.
    optimised = changes.get("KEY_DIM") in (32, 256) or changes.get("VALUE_BITS") == 3 or changes.get("MASK") == 1
    compile_prompt("sm_90", optimised=optimised and changes.get("TYPE") != 2, **changes)


@pytest.mark.parametrize("rows", [16, 32])
def test_prompt_attention_of_few_rows_compiles(rows):
    """What devices with little shared memory take for large heads."""
    compile_prompt("sm_86", ROWS=rows, KEY_DIM=256, VALUE_DIM=256, SLOTS=2)


def test_prompt_attention_of_large_float32_heads_compiles():
    """The 64 rows of a warpgroup do not fit into a block's shared memory: products of single warps, on sm_90 too."""
    compile_prompt("sm_90", WGMMA=0, ROWS=32, KEY_DIM=256, VALUE_DIM=256, TYPE=0)


@pytest.mark.parametrize("name", ["reserve.cu", "store_tokens.cu", "word_sum.cu"])
def test_kernels_without_variants_compile(name):
    for architecture in ("sm_80", "sm_90", "sm_120"):
        assert "0 bytes spill stores" in compile_kernel(name, architecture)


# As the host chooses them: by the rows, and by the shared memory.
@pytest.mark.covering
@pytest.mark.parametrize("bits, mask", [(3, 2), (4, 1), (2, 0)])
@pytest.mark.parametrize(
    "architecture, dim, rows, buffers",
    [("sm_80", 512, 64, 1), ("sm_86", 512, 16, 1), ("sm_86", 256, 32, 2), ("sm_90", 512, 64, 2), ("sm_90", 512, 32, 2),
     ("sm_90", 256, 64, 2), ("sm_100", 512, 64, 2), ("sm_120", 256, 16, 2)],
)  # fmt: skip
def test_latent_attention_compiles(architecture, dim, rows, buffers, bits, mask):
    defines = dict(DIM=dim, BITS=bits, ROWS=rows, MASK=mask, BUFFERS=buffers)
    optimised = FULL or bits >= 3
    log = compile_kernel("latent_attention.cu", architecture, optimised=optimised, **defines)
    # A word or two, outside of the products.
    assert not optimised or max(int(n) for n in re.findall(r"(\d+) bytes spill stores", log)) <= 32, log


# Operation (params.h), bits, means, balance, signs.
ENCODINGS = [
    (0, 3, 1, 1, 1),
    (0, 4, 2, 0, 0),
    (0, 2, 0, 1, 0),
    (1, 2, 0, 0, 0),
    (2, 3, 1, 1, 0),
    (2, 4, 0, 0, 0),
    (3, 4, 0, 0, 0),
    (4, 1, 0, 0, 0),
    (5, 3, 0, 0, 0),
    (6, 3, 0, 1, 0),
    (6, 4, 0, 0, 1),
]


@pytest.mark.covering
@pytest.mark.parametrize("dim", [128, 96, 512])
@pytest.mark.parametrize("operation, bits, means, balance, signs", ENCODINGS)
def test_encoding_compiles(operation, bits, means, balance, signs, dim):
    defines = dict(OPERATION=operation, BITS=bits, TYPE=1, HADAMARD=1, MEANS=means, BALANCE=balance, SIGNS=signs)
    optimised = FULL or dim == 512
    log = compile_kernel("turboquant_encode.cu", "sm_80", optimised=optimised, DIM=dim, **defines)
    assert "0 bytes spill stores" in log or not optimised, log


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_bit_weights_compile_for_every_architecture(architecture):
    for operation in range(4):
        defines = dict(OPERATION=operation, TYPE=1, ROW_TILES=2, COLUMN_TILES=2)
        compile_kernel("q1_matmul.cu", architecture, optimised=FULL, **defines)
    optimised = FULL or architecture in ("sm_80", "sm_90")
    for kind, inputs, warps in ((1, 1, 16), (0, 2, 16), (2, 8, 8)):
        defines = dict(TYPE=kind, INPUTS=inputs, WARPS=warps, STAGES=3, WEIGHT_BITS=2 if inputs == 2 else 1)
        log = compile_kernel("q1_matvec.cu", architecture, optimised=optimised, **defines)
        assert "0 bytes spill stores" in log or not optimised, log
    compile_kernel("ternary_matmul.cu", architecture, optimised=FULL, TYPE=1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_bit_weights_of_many_rows_compile_for_every_architecture(architecture):
    optimised = FULL or architecture == "sm_80"
    compile_kernel("q1_gemm.cu", architecture, optimised=optimised, OPERATION=4, TYPE=1)
    compile_kernel("q1_gemm.cu", architecture, optimised=optimised, OPERATION=5, TYPE=2, COLUMNS=64, WGMMA=0)


@pytest.mark.parametrize("columns", [16, 32, 64, 96, 128])
def test_one_bit_weights_of_many_rows_fit_into_registers(columns):
    log = compile_kernel("q1_gemm.cu", "sm_90a", OPERATION=5, TYPE=2, COLUMNS=columns, WGMMA=1)
    # A few words outside of the products.
    assert int(re.search(r"(\d+) bytes spill stores", log).group(1)) <= 16, log
    # What producers give back is what the others ask for (kEntryRegisters): of fewer they would wait forever.
    assert "Used 96 registers" in log, log
    # Products that wait for each other (C7510, C7512, C7514), and registers that are not moved (C7508).
    assert not any(f"(C{code})" in log for code in (7508, 7510, 7512, 7514)), log


def test_kernels_are_kept_on_disk(tmp_path):
    program, occupied = tmp_path / "check", tmp_path / "file"
    occupied.write_text("")
    source = ROOT / "tests/native/binary_cache_check.cpp"
    subprocess.run([tool("g++", "c++"), "-std=c++20", "-Wall", "-Wextra", source, "-o", program], check=True, timeout=300)
    (tmp_path / "cache").mkdir()
    done = subprocess.run([program, tmp_path / "cache", occupied / "below"], capture_output=True, text=True, timeout=60)
    assert done.stdout == "ok\n", done.stdout + done.stderr


def test_host_code_without_a_gpu(tmp_path):
    """The map of compiled kernels under four threads, and the sizes of scratch memory."""
    program, source = tmp_path / "check", ROOT / "tests/native/cuda_host_check.cpp"
    flags = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-pthread", "-fsanitize=thread"]
    subprocess.run([tool("g++", "c++"), *flags, source, "-o", program], check=True, timeout=300)
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    done = subprocess.run([program], capture_output=True, text=True, timeout=100, env=environment)
    assert done.stdout == "ok\n", done.stdout + done.stderr


def test_a_mistake_is_found():
    for optimised in (False, True):
        with pytest.raises(AssertionError, match="unknown_name"):
            defines = dict(OPERATION=0, TYPE=1, ROW_TILES=2, COLUMN_TILES="unknown_name")
            compile_kernel("q1_matmul.cu", "sm_80", optimised=optimised, **defines)

"""The CUDA kernels compile for every architecture, with the compiler that users' machines run, and fit into registers."""

import ctypes
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support import tool

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
FILES = [
    "csrc/format.h",
    "csrc/softmax.h",
    "csrc/hadamard.h",
    "cuda/params.h",
    "cuda/prompt_params.h",
    "cuda/device.cuh",
    "cuda/warpgroup.cuh",
    "cuda/levels.cuh",
    "cuda/latent_params.h",
]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the CUDA kernels are part of Linux builds only")


def compiler():
    spec = importlib.util.find_spec("nvidia")
    found = [
        path for root in (spec.submodule_search_locations if spec else []) for path in Path(root).glob("*/lib/libnvrtc.so.13")
    ]
    assert found, "pip install 'nvidia-cuda-nvrtc==13.0.*'"
    for builtins in found[0].parent.glob("libnvrtc-builtins.so.13*"):
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(found[0]))


def standard_header():
    """stdint.h as the build embeds it."""
    return re.search(r'"stdint.h", R"SOURCE\((.*?)\)SOURCE"', (ROOT / "cuda/sources.cpp.in").read_text(), re.S).group(1)


def compile_kernel(name, architecture, **defines):
    """The compiler's log, with the assembler's report of registers; a virtual architecture (compute_80) is not assembled."""
    nvrtc = compiler()
    headers = {Path(file).name: (ROOT / file).read_text() for file in FILES} | {"stdint.h": standard_header()}
    texts = (ctypes.c_char_p * len(headers))(*[text.encode() for text in headers.values()])
    names = (ctypes.c_char_p * len(headers))(*[key.encode() for key in headers])
    program = ctypes.c_void_p()
    source = (ROOT / "cuda" / name).read_text().encode()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, name.encode(), len(headers), texts, names) == 0
    options = [f"--gpu-architecture={architecture}", "--std=c++17", "--device-as-default-execution-space"]
    options += ["--ptxas-options=-v"] * architecture.startswith("sm_")
    # One file holds several operations: each leaves some helpers unused.
    options += ["-diag-suppress=177"]
    options += [f"-D{key}={value}" for key, value in defines.items()]
    result = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*[x.encode() for x in options]))
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    text = log.value.decode()
    assert result == 0, text
    assert "error" not in text and "warning" not in text, text
    return text


ATTENTION = {
    "KEY_DIM": 128,
    "VALUE_DIM": 128,
    "KEY_BITS": 3,
    "VALUE_BITS": 2,
    "LLOYD": 0,
    "ROWS": 4,
    "TYPE": 1,
    "MASK": 0,
    "SIGNS": 0,
    "STRIDED": 0,
    "LISTED": 0,
    "STAGES": 4,
    "BLOCKS_PER_SM": 3,
}


# Keys, coding of the values and their bits of the presets.
PRESETS = {"tq3": (3, 0, 2), "tq33": (3, 1, 3), "tq4": (4, 1, 4)}


def preset(name, **changes):
    key_bits, lloyd, value_bits = PRESETS[name]
    return ATTENTION | {"KEY_BITS": key_bits, "LLOYD": lloyd, "VALUE_BITS": value_bits} | changes


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["tq3", "tq33"])
def test_attention_compiles_for_every_architecture(name, architecture):
    # As the host chooses them: 100 KB of shared memory hold two blocks of three stages, not three blocks.
    small = {"BLOCKS_PER_SM": 2, "STAGES": 3} if architecture in ("sm_86", "sm_89", "sm_120") else {}
    log = compile_kernel("turboquant_attention.cu", architecture, **preset(name, **small))
    assert "0 bytes spill stores" in log, log


@pytest.mark.parametrize("name", ["tq33", "tq4"])
@pytest.mark.parametrize("dim, rows", [(128, 4), (128, 8), (128, 16), (256, 8)])
def test_attention_of_lloyd_values_fits_into_registers(name, dim, rows):
    two_blocks = rows == 16 or dim > 128
    defines = preset(name, KEY_DIM=dim, VALUE_DIM=dim, ROWS=rows, BLOCKS_PER_SM=2 if two_blocks else 3)
    log = compile_kernel("turboquant_attention.cu", "sm_90", **defines)
    spilled = int(re.search(r"(\d+) bytes spill stores", log).group(1))
    # Four bits and the most registers there are: a few words, outside of the products.
    assert spilled <= (32 if name == "tq4" and two_blocks else 0), log


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
def test_attention_variants_compile(changes):
    # The assembler takes half of the time: for the older architecture it has the presets, above, and the other types.
    for architecture in ("sm_80" if "TYPE" in changes else "compute_80", "sm_90"):
        compile_kernel("turboquant_attention.cu", architecture, **(ATTENTION | changes))


PROMPT = {
    "KEY_DIM": 128,
    "VALUE_DIM": 128,
    "KEY_BITS": 3,
    "VALUE_BITS": 2,
    "LLOYD": 0,
    "ROWS": 128,
    "TYPE": 1,
    "MASK": 0,
    "SLOTS": 4,
    "BLOCKS_PER_SM": 1,
    "WGMMA": 0,
}
VALUES = [{"VALUE_BITS": bits, "LLOYD": lloyd} for bits, lloyd in ((2, 0), (4, 0), (2, 1), (3, 1), (4, 1))]


def compile_prompt(architecture, **changes):
    """Nothing spills where warpgroups multiply; without them a few registers do."""
    warpgroups = architecture == "sm_90" and changes.get("WGMMA", 1)
    log = compile_kernel(
        "prompt_attention.cu", architecture + "a" * bool(warpgroups), **(PROMPT | {"WGMMA": int(bool(warpgroups))} | changes)
    )
    if warpgroups:
        assert "0 bytes spill stores" in log, log
    # Products of a warpgroup that wait for each other (C7510, C7514), and registers that are not moved (C7508).
    assert not any(f"(C{code})" in log for code in (7508, 7510, 7514)), log


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prompt_attention_compiles_for_every_architecture(architecture):
    compile_prompt(architecture)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("values", VALUES)
def test_prompt_attention_value_codings_compile(values, architecture):
    compile_prompt(architecture, TYPE=2, **values)


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
        {"KEY_DIM": 64, "VALUE_DIM": 96, "KEY_BITS": 2, "TYPE": 0},
        {"KEY_DIM": 32, "VALUE_DIM": 32, "MASK": 2, "TYPE": 0},
    ],
)
def test_prompt_attention_variants_compile(changes):
    compile_prompt("sm_90", **changes)
    # The assembler takes most of the time: here it has the smallest variant of float32, elsewhere those of the other types.
    assembled = changes.get("TYPE") == 0 and changes["KEY_DIM"] == 32
    compile_prompt("sm_80" if assembled else "compute_80", **(changes | {"BLOCKS_PER_SM": 1}))


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
@pytest.mark.parametrize(
    "architecture, dim, rows, buffers",
    [("sm_80", 512, 64, 1), ("sm_86", 512, 16, 1), ("sm_86", 256, 32, 2), ("sm_90", 512, 64, 2), ("sm_90", 512, 32, 2),
     ("sm_90", 256, 64, 2), ("sm_100", 512, 64, 2), ("sm_120", 256, 16, 2)],
)  # fmt: skip
def test_latent_attention_compiles(architecture, dim, rows, buffers):
    for bits, mask in ((3, 2), (4, 1), (2, 0)):
        log = compile_kernel("latent_attention.cu", architecture, DIM=dim, BITS=bits, ROWS=rows, MASK=mask, BUFFERS=buffers)
        # A word or two, outside of the products.
        assert max(int(n) for n in re.findall(r"(\d+) bytes spill stores", log)) <= 32, log


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


@pytest.mark.parametrize("operation, bits, means, balance, signs", ENCODINGS)
def test_encoding_compiles(operation, bits, means, balance, signs):
    defines = dict(OPERATION=operation, BITS=bits, TYPE=1, HADAMARD=1, MEANS=means, BALANCE=balance, SIGNS=signs)
    for dim in (128, 96, 512):
        log = compile_kernel("turboquant_encode.cu", "sm_80", DIM=dim, **defines)
        assert "0 bytes spill stores" in log, log


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_bit_weights_compile_for_every_architecture(architecture):
    for operation in range(4):
        compile_kernel("q1_matmul.cu", architecture, OPERATION=operation, TYPE=1, ROW_TILES=2, COLUMN_TILES=2)
    for kind, inputs, warps in ((1, 1, 16), (0, 2, 16), (2, 8, 8)):
        log = compile_kernel("q1_matvec.cu", architecture, TYPE=kind, INPUTS=inputs, WARPS=warps, STAGES=3)
        assert "0 bytes spill stores" in log, log


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_bit_weights_of_many_rows_compile_for_every_architecture(architecture):
    compile_kernel("q1_gemm.cu", architecture, OPERATION=4, TYPE=1)
    compile_kernel("q1_gemm.cu", architecture, OPERATION=5, TYPE=2, COLUMNS=64, WGMMA=0)


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
    with pytest.raises(AssertionError, match="error"):
        compile_kernel("q1_matmul.cu", "sm_80", OPERATION=0, TYPE=1, ROW_TILES=2, COLUMN_TILES="unknown_name")

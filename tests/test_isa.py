"""Every instruction set: those of this machine through TQEXT_ISA, older x86 and Arm under an emulator.

In CI (environment variable CI set) a missing compiler or emulator is a failure; elsewhere the tests that need it are skipped.
"""

import functools
import importlib.util
import itertools
import json
import os
import pathlib
import platform
import shlex
import signal
import subprocess
import sys
import sysconfig

import numpy as np
import pytest

import make_golden
import tqext
from covering import FULL
from support import tool

ROOT = pathlib.Path(__file__).parent.parent
NATIVE = ROOT / "tests" / "native"
GOLDEN = json.loads(make_golden.PATH.read_text())
ISAS = tqext.available_isas()

linux_x86 = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="user-mode emulation from Linux on x86-64"
)


def run(command, *, isa=None, **options):
    """Standard output of the command; its own words when it fails."""
    environment = {key: value for key, value in os.environ.items() if key != "TQEXT_ISA"}
    if isa:
        environment["TQEXT_ISA"] = isa
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500, **{"cwd": ROOT, **options})
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


# ---- this machine -------------------------------------------------------------------------------


def test_isa_in_use_is_the_fastest_of_this_machine():
    assert ISAS[0] == "portable"
    if not os.environ.get("TQEXT_ISA"):
        assert tqext.isa() == ISAS[-1]


@pytest.mark.parametrize("isa", ISAS)
def test_isa_can_be_chosen(isa):
    assert run([sys.executable, "-c", "import tqext; print(tqext.isa())"], isa=isa).strip() == isa


def test_isa_of_another_machine_is_refused():
    code = """
import tqext
try:
    tqext.isa()
except ValueError as error:
    print(error)
"""
    # Importing may use a kernel already: either way it is this sentence that the user sees.
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "TQEXT_ISA": "sve9"}, cwd=ROOT
    )
    assert "TQEXT_ISA: expected one of portable" in done.stdout + done.stderr
    assert "got sve9" in done.stdout + done.stderr


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != tqext.isa()])
def test_isa_passes_the_operator_tests(isa):
    """Those of the kernels, which this process ran with the ISA in use. They know float32 and half queries: no bfloat16."""
    names = "golden every_head_dim all_bits every_length lloyd_values not_finite like_tokens random_mixtures"
    chosen = f"({' or '.join(names.split())}) and not bfloat16 and not golden_file"
    # attention_kernels_check has every shape of these kernels, with queries of both types.
    chosen += "" if FULL else " and (128 or not float16) and (128 or 96 or not (all_bits or lloyd_values))"
    names = ("format", "quantize", "turboquant_attention", "turboquant_attention_indices")
    files = [f"tests/test_{name}.py" for name in names]
    out = run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen, *files], isa=isa)
    assert " passed" in out


def test_isa_does_not_change_a_byte():
    """Also where decisions are close: sums are taken in one order on every instruction set."""
    code = """
import hashlib, mlx.core as mx, numpy as np, tqext
rng, digest = np.random.default_rng(5), hashlib.sha256()
for dim in (32, 96, 128, 224, 512):
    x = mx.array(rng.normal(size=(1, 2, 300, dim)).astype(np.float32))
    centre = {"means": tqext.block_means(x), "balance": mx.array(np.exp(rng.normal(size=(2, dim))).astype(np.float32))}
    packed = [tqext.quantize_keys(x, bits=bits, qjl=True, **kind) for bits in (2, 3, 4) for kind in ({}, centre)]
    packed += [tqext.quantize_values(x, bits=bits) for bits in (2, 4)]
    packed += [tqext.quantize_values(x, bits=bits, coding="lloyd") for bits in (2, 3, 4)]
    for p in packed:
        for array in p:
            if isinstance(array, mx.array):
                digest.update(np.array(array).tobytes())
print(digest.hexdigest())
"""
    assert len({run([sys.executable, "-c", code], isa=isa) for isa in ISAS}) == 1


# ---- without MLX and Python, also under an emulator -----------------------------------------------


# Program -> the sources beside it that it is made of.
PROGRAMS = {
    "codec_golden": ["codec.cpp", "isa.cpp"],
    "attention_kernels_check": ["attention_kernels*.cpp", "codec.cpp", "isa.cpp", "scratch.cpp"],
    "q1_kernels_check": ["q1_matmul_*.cpp", "isa.cpp", "scratch.cpp"],
}


# As CMakeLists.txt compiles tqext_core: what is tested is what is installed, and ccache knows it from the build.
FLAGS = ["-Dtqext_core_EXPORTS", f"-I{ROOT}/csrc", f"-I{ROOT}/cuda", "-O3", "-DNDEBUG", "-std=c++20", "-fPIC"]
FLAGS += ["-fvisibility=hidden", "-fvisibility-inlines-hidden", "-fno-stack-protector", "-Wall", "-Wextra", "-ffp-contract=off"]


def build(folder, compiler, *options, optimise=()):
    """The programs of tests/native with the CPU kernels; `optimise`: options of the compiler in addition to the package's."""
    # ccache takes paths as they are seen from here, and so it does in the build's folder.
    here = ROOT / "build" / "native"
    here.mkdir(parents=True, exist_ok=True)
    # GCC 12 on its own AVX-512 intrinsics.
    quiet = {"q1_matmul_avx512": ["-Wno-maybe-uninitialized"]}

    @functools.cache
    def compiled(source):
        out = folder / f"{source.stem}.o"
        launcher = shlex.split(os.environ.get("CMAKE_CXX_COMPILER_LAUNCHER", ""))
        flags = [*FLAGS, *quiet.get(source.stem, ()), "-MD", "-MF", out.with_suffix(".d")]
        run([*launcher, compiler, *flags, *optimise, "-o", out, "-c", source], cwd=here)
        return out

    def program(name):
        parts = [sorted((ROOT / "csrc/cpu").glob(pattern)) for pattern in PROGRAMS[name]]
        objects = [compiled(source) for source in (NATIVE / f"{name}.cpp", *itertools.chain(*parts))]
        run([compiler, *options, *objects, "-pthread", "-o", folder / name])
        return folder / name

    return {name: program(name) for name in PROGRAMS}


def golden_lines():
    """Input of codec_golden and the output it must give."""
    asked, answers = [], []
    for case in GOLDEN["cases"]:
        keys = case["kind"] == "keys"
        if keys and case["rotation"] != "hadamard":
            continue  # the dense rotation is MLX's own product
        for t, row in enumerate(case["input"]):
            means = case.get("means")
            mean = means[t // 64] if means else []
            balance = case.get("balance") or []
            flags = [int(bool(mean)), int(bool(balance)), int(case["signs"] is not None)] if keys else []
            asked.append([case["kind"], case["head_dim"], case["bits"], *flags, *row, *mean, *balance])
            fields = ("codes", "norms", "signs", "residual_norms") if keys else ("codes", "params")
            answers.append(" ".join(case[field][t] for field in fields if case[field] is not None))
    return "\n".join(" ".join(map(str, line)) for line in asked), answers


def check_golden(program, isa, *emulator):
    asked, answers = golden_lines()
    name, *lines = run([*emulator, program], input=asked).splitlines()
    assert name == isa
    assert [line.strip() for line in lines] == answers


def check_kernels(program, isas, *emulator, every, options=()):
    """Its exit status is the number of errors above the tolerance; it prints a line for each instruction set it ran.

    `every`: a prime, so that no kind of case is left out which comes at equal distances.
    """
    lines = run([*emulator, program, *options, str(every)]).splitlines()
    assert [line.split()[0] for line in lines] == isas


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    # That of the build.
    (compiler, *_) = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
    return build(tmp_path_factory.mktemp("native"), tool(compiler, "c++", "g++", "clang++"))


@pytest.fixture(scope="module")
def arm(tmp_path_factory):
    # Nothing else in CI compiles for Arm: this takes half of the time.
    return build(tmp_path_factory.mktemp("arm"), tool("aarch64-linux-gnu-g++"), "-static", optimise=() if FULL else ["-O1"])


def test_isa_kernels_of_this_machine(host):
    check_golden(host["codec_golden"], ISAS[-1])
    check_kernels(host["attention_kernels_check"], ISAS, every=1 if FULL else 3)
    check_kernels(host["q1_kernels_check"], ISAS, every=1 if FULL else 7)


@pytest.mark.parametrize("isa", ISAS)
def test_isa_golden_bytes(host, isa):
    asked, answers = golden_lines()
    name, *lines = run([host["codec_golden"]], input=asked, isa=isa).splitlines()
    assert name == isa
    assert [line.strip() for line in lines] == answers


def test_isa_kernels_stay_in_their_arrays(tmp_path):
    """The programs above are built with the same guards: each of their calls is held to them, on every instruction set."""
    (mlx,) = importlib.util.find_spec("mlx").submodule_search_locations
    program = tmp_path / "arrays_check"
    flags = ["-std=c++20", "-g", "-I", ROOT / "csrc", "-I", f"{mlx}/include"]
    run([tool("c++", "g++", "clang++"), *flags, NATIVE / "arrays_check.cpp", ROOT / "csrc/cpu/scratch.cpp", "-o", program])
    assert run([program]) == "done\n"
    array = "[tqext] array {} of a kernel's working memory: expected writes to its {} bytes, got one to byte {}\n".format
    faults = {
        "first": array(0, 20, 20),
        "second": array(1, 100, 100),
        "far": array(1, 100, 150),
        "empty": array(2, 0, 0),
        "last": array(3, 64, 64),
        "grows": "[tqext] arrays of a kernel's working memory: expected at most 512 bytes, got 4096\n",
    }
    for fault, sentence in faults.items():
        done = subprocess.run([program, fault], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (-signal.SIGABRT, sentence)


@linux_x86
@pytest.mark.parametrize("cpu, isas", [("Haswell", ["portable", "avx2"]), ("Nehalem", ["portable"])])
def test_isa_kernels_of_an_older_x86(host, cpu, isas):
    """An instruction that this processor lacks ends the program."""
    emulator = tool("qemu-x86_64", "qemu-x86_64-static"), "-cpu", cpu
    check_golden(host["codec_golden"], isas[-1], *emulator)
    # The portable kernels run on the oldest one; with emulated FMA instructions they take as long as those of AVX2.
    check_kernels(host["attention_kernels_check"], isas[-1:], *emulator, every=41 if FULL else 89, options=isas[-1:])
    check_kernels(host["q1_kernels_check"], isas, *emulator, every=23 if FULL else 97)


@linux_x86
@pytest.mark.parametrize(
    "cpu, isas", [("neoverse-n1", ["portable", "neon", "neon_dotprod"]), ("cortex-a53", ["portable", "neon"])]
)
def test_isa_kernels_of_arm(arm, cpu, isas):
    """The Cortex-A53 has no dot-product instructions."""
    emulator = tool("qemu-aarch64", "qemu-aarch64-static"), "-cpu", cpu
    check_golden(arm["codec_golden"], isas[-1], *emulator)
    check_kernels(arm["attention_kernels_check"], isas, *emulator, every=31)
    check_kernels(arm["q1_kernels_check"], isas, *emulator, every=23)


def test_isa_golden_input_is_exact_in_every_dtype():
    """The native program divides by 32 what the golden file multiplies by its unit."""
    assert GOLDEN["input_unit"] == 1 / 32
    assert max(np.abs(case["input"]).max() for case in GOLDEN["cases"]) < 256

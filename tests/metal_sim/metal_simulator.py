"""Builds .metal sources for the simulated GPU and runs their kernels from NumPy arrays.

A source is preprocessed with our `metal_*` headers, translated to C++ (`msl_translate`), compiled by
clang 19 and linked with `runtime.cpp`. Two builds exist: `fast`, and `check`, which reports races,
accesses out of bounds, reads of uninitialised memory, divergence and unwritten outputs by file and line.
`report` is `check` compiled in a third of the time; only its counters of bytes mean nothing.
"""

from __future__ import annotations

import collections
import ctypes
import hashlib
import os
import pickle
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import msl_translate
import numpy as np

from locking import locked

HERE = Path(__file__).resolve().parent
INCLUDE = HERE / "include"
RUNTIME = HERE / "runtime.cpp"
CLANG = os.environ.get("TQEXT_CLANG", "clang++-19")
BUILD = Path(os.environ.get("TQEXT_METAL_SIM_BUILD", Path(tempfile.gettempdir()) / f"tqext_metal_sim_{os.getuid()}"))

# Excess precision off: every half and bfloat operation is rounded, as on the GPU.
COMMON_FLAGS = [
    "-std=c++20",
    "-fPIC",
    "-fno-exceptions",
    "-fno-rtti",
    "-ffp-contract=off",
    "-Xclang",
    "-ffloat16-excess-precision=none",
    "-Xclang",
    "-fbfloat16-excess-precision=none",
    "-fno-strict-aliasing",
    "-march=x86-64-v3",
    "-Wno-everything",
    "-gdwarf-4",
    "-gline-tables-only",
    "-fvisibility=hidden",
    "-fno-threadsafe-statics",
    f"-I{INCLUDE}",
]
CHECK_FLAGS = [
    "-fsanitize=thread",
    "-fsanitize=bounds,alignment,null,integer-divide-by-zero,shift-exponent",
    "-fno-vectorize",
    "-fno-slp-vectorize",
    # Variables that a kernel does not set hold NaN.
    "-ftrivial-auto-var-init=pattern",
]
MODE_FLAGS = {
    "fast": ["-O1"],
    "count": ["-O1", "-DMSL_COUNTING"],
    "flush": ["-O1", "-fno-vectorize", "-fno-slp-vectorize"],
    "check": ["-O1", *CHECK_FLAGS],
    "report": ["-O0", *CHECK_FLAGS],
}
STRICT_FLAGS = [
    "-std=c++20",
    "-fsyntax-only",
    "-nostdinc++",
    "-fno-exceptions",
    "-fno-rtti",
    f"-I{INCLUDE}",
    "-Wno-everything",
    "-Wdouble-promotion",
    "-Werror=double-promotion",
    "-Wvla",
    "-Werror=vla",
    "-ferror-limit=40",
]

# The GPU whose back end of clang's is nearest to Apple's in what it counts: 32 lanes, registers of 32 bits.
GPU_FLAGS = [
    "--target=amdgcn-amd-amdhsa",
    "-mcpu=gfx1030",
    "-nogpulib",
    "-std=c++20",
    "-nostdinc++",
    "-O3",
    "-ffp-contract=off",
    "-fno-exceptions",
    "-fno-rtti",
    f"-I{INCLUDE}",
    "-Wno-everything",
    "-mllvm",
    "-amdgpu-early-inline-all=true",
    "-mllvm",
    "-amdgpu-function-calls=false",
]

# Options of a dispatch (runtime.cpp): the order of threads, and whether subnormal floats are zero.
IN_ORDER, RANDOM, REVERSE, PREEMPT, FLUSH_FLOATS = 0, 2, 4, 8, 32


class Fault(AssertionError):
    """The checker reported an error; the text holds the reports."""


class Output:
    """An output buffer: its content is undefined before the dispatch and must be written completely."""

    def __init__(self, shape, dtype):
        self.array = np.zeros(shape, dtype)


@dataclass
class Stats:
    """Counters of one dispatch. Byte counters exist in `check` builds only."""

    device_read: int = 0
    device_written: int = 0
    threadgroup_read: int = 0
    threadgroup_written: int = 0
    simd_operations: int = 0
    barriers: int = 0
    switches: int = 0
    threads: int = 0
    threadgroup_bytes: int = 0
    unwritten: int = 0
    reports: int = 0
    seconds: float = 0.0
    report: str = ""
    buffer_read: list[int] = field(default_factory=list)
    buffer_written: list[int] = field(default_factory=list)


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("index", ctypes.c_int),
        ("out", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("n_bytes", ctypes.c_ulong),
    ]


class _Stats(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulong) for name in list(Stats.__dataclass_fields__)[:11]] + [("seconds", ctypes.c_double)]


def require_clang() -> None:
    """Raises RuntimeError when clang 19 is missing: the Metal tests fail then, they never skip."""
    if shutil.which(CLANG) is None:
        raise RuntimeError(f"{CLANG} not found: the Metal tests need clang 19 (apt-get install clang-19)")


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(" ".join(command) + "\n" + result.stderr[:6000])
    return result.stdout


def _digest(*parts: str) -> str:
    shim = "".join(path.read_text() for path in sorted(INCLUDE.rglob("*")) if path.is_file())
    return hashlib.sha256("\0".join([*parts, shim]).encode()).hexdigest()[:16]


def _runtime_object() -> Path:
    out = BUILD / f"runtime.{_digest(RUNTIME.read_text())}.o"
    with locked(out.with_suffix(".lock")):
        if not out.exists():
            part = out.with_suffix(f".{os.getpid()}.o")
            flags = ["-std=c++20", "-O2", "-fPIC", "-fno-exceptions", "-g1", f"-I{INCLUDE}"]
            _run([CLANG, *flags, "-c", str(RUNTIME), "-o", str(part)])
            part.replace(out)
    return out


def build(source: str | Path, *, includes=(), defines=(), mode: str = "fast") -> Library:
    """Returns the compiled kernels of a .metal file, or of source text.

    Args:
        source: path of the file, or the text itself.
        includes: folders of included headers.
        defines: macros, `NAME=VALUE`.
        mode: `fast`, `check`, `report`, `count` (FMA and exp2, in `Library.counter`), or `flush` (subnormal halves are zero
            wherever they are converted).
    """
    require_clang()
    BUILD.mkdir(parents=True, exist_ok=True)
    text = msl_translate.convert(_as_file(source), includes, defines, "exec", CLANG, INCLUDE / "msl_pp")
    runtime = _runtime_object()
    key = _digest(text, mode, str(COMMON_FLAGS), str(MODE_FLAGS[mode]), runtime.name)
    library = BUILD / f"kernels.{mode}.{key}.so"
    with locked(library.with_suffix(".lock")):
        if not library.exists():
            cpp = BUILD / f"kernels.{mode}.{key}.{os.getpid()}.cpp"
            obj, part = cpp.with_suffix(".o"), cpp.with_suffix(".so")
            cpp.write_text(text)
            if mode == "flush":
                ir = cpp.with_suffix(".ll")
                _run([CLANG, *COMMON_FLAGS, *MODE_FLAGS[mode], "-S", "-emit-llvm", str(cpp), "-o", str(ir)])
                ir.write_text(_with_flushed_halves(ir.read_text()))
                _run(
                    [CLANG, "-x", "ir", "-O1", "-fPIC", "-march=x86-64-v3", "-ffp-contract=off", "-c", str(ir), "-o", str(obj)]
                )
            else:
                _run([CLANG, *COMMON_FLAGS, *MODE_FLAGS[mode], "-c", str(cpp), "-o", str(obj)])
            _run([CLANG, "-shared", "-Wl,-Bsymbolic", str(obj), str(runtime), "-o", str(part), "-lm", "-lstdc++"])
            part.replace(library)
            obj.unlink()
    if library not in _loaded:
        _loaded[library] = Library(library)
    return _loaded[library]


def _with_flushed_halves(ir: str) -> str:
    """The module with conversions from and to half that make zero, with its sign, of subnormal halves."""
    ir = re.sub(r"= fpext half (\S+) to float", r"= call float @msl_from_half(half \1)", ir)
    ir = re.sub(r"= fptrunc float (\S+) to half", r"= call half @msl_to_half(float \1)", ir)
    flush = """define internal half @msl_flush(half %x) alwaysinline {
  %bits = bitcast half %x to i16
  %size = and i16 %bits, 31744
  %small = icmp eq i16 %size, 0
  %sign = and i16 %bits, -32768
  %kept = select i1 %small, i16 %sign, i16 %bits
  %y = bitcast i16 %kept to half
  ret half %y
}
"""
    for name, given, result in (("from", "half", "float"), ("to", "float", "half")):
        convert = ["%h = call half @msl_flush(half %x)", "%y = fpext half %h to float"]
        if name == "to":
            convert = ["%h = fptrunc float %x to half", "%y = call half @msl_flush(half %h)"]
        body = "\n  ".join([*convert, f"ret {result} %y"])
        flush += f"define internal {result} @msl_{name}_half({given} %x) alwaysinline {{\n  {body}\n}}\n"
    return ir + flush


_loaded: dict[Path, Library] = {}


def loaded(mode: str) -> list[Library]:
    """Libraries of a mode that this process has built, the latest first."""
    return [lib for path, lib in reversed(_loaded.items()) if path.name.startswith(f"kernels.{mode}.")]


def _as_file(source: str | Path) -> Path:
    if isinstance(source, Path):
        return source
    path = BUILD / f"source.{hashlib.sha256(source.encode()).hexdigest()[:16]}.metal"
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(source)
        part.replace(path)
    return path


@dataclass
class Loop:
    """Instructions of a loop that are in no loop within it; of the whole kernel, those in no loop at all."""

    instructions: int = 0
    memory: int = 0  # loads and stores among them
    threadgroup_bytes: int = 0  # that a lane reads and writes
    products: int = 0  # of matrices
    loops: list[Loop] = field(default_factory=list)  # within it, in the order of the code
    before: int = 0  # instructions, of those that are in no loop, that come before it
    barriers: list[int] = field(default_factory=list)  # of those of the whole kernel: how many come before each barrier

    def all(self) -> int:
        """Instructions, those of loops within it included."""
        return self.instructions + sum(loop.all() for loop in self.loops)

    def all_memory(self) -> int:
        return self.memory + sum(loop.all_memory() for loop in self.loops)

    def innermost(self) -> list[Loop]:
        """The loops that have no loop within them."""
        return [self] if not self.loops else [x for loop in self.loops for x in loop.innermost()]


@dataclass
class Compiled:
    """A kernel as clang compiles it for a GPU."""

    registers: int  # of a lane
    spilled: int  # with at most `limit` registers
    arrays: list[str]  # variables that are memory, and vectors of registers with an index that is not known
    instructions: int
    loops: list[int]  # instructions of each loop that is in no other one, those of loops within it included; the longest first
    memory: int  # loads and stores in the longest loop
    code: Loop


_INSTRUCTION = re.compile(r"\t((?:[vs]|ds|global|flat|buffer|scratch)_\w+)")
# Widths of loads and stores of threadgroup memory: ds_read_u8, ds_write2_b32, ds_read_b128 ...
_THREADGROUP = re.compile(r"ds_(?:read|write)(2?)(?:st64)?_(?:addtid_)?[bui](\d+)")


def _loops(assembly: str) -> Loop:
    """The loops of a kernel's code, as LLVM's comments tell which of them a block is in."""
    code, found = Loop(), collections.defaultdict(Loop)
    label, inside, around = None, code, code
    for line in assembly.splitlines():
        if block := re.match(r"(?:\.L(BB\d+_\d+)|; %bb\.\d+):", line):
            inside, label, around = code, block.group(1), code
        if parent := re.search(r";\s+Parent Loop (BB\d+_\d+) ", line):
            around = found[parent.group(1)]  # the innermost comes last
        if re.search(r"=>\s*This (?:Inner )?Loop Header", line):
            inside = found[label]
            inside.before = code.instructions
            around.loops.append(inside)
        elif header := re.search(r"in Loop: Header=(BB\d+_\d+) ", line):
            inside = found[header.group(1)]
        if instruction := _INSTRUCTION.match(line):
            name = instruction.group(1)
            inside.instructions += 1
            inside.memory += name.startswith(("ds_", "global_", "flat_", "buffer_", "scratch_"))
            inside.products += name == "v_matrix"
            if name == "s_barrier" and inside is code:
                code.barriers.append(code.instructions)
            if access := _THREADGROUP.match(name):
                inside.threadgroup_bytes += int(access.group(2)) // 8 * (2 if access.group(1) else 1)
    return code


def compile_for_gpu(source: str, constants: dict[str, int], *, includes=(), limit: int) -> Compiled:
    """Compiles the one kernel of a .metal source for AMD's gfx1030, without and with a limit of registers.

    Another compiler than Apple's for another GPU: the figures show what a change does, not what a Mac needs.

    Args:
        source: the text.
        constants: values of the function constants, by name.
        includes: folders of included headers.
        limit: of registers.
    """
    require_clang()
    BUILD.mkdir(parents=True, exist_ok=True)
    text = msl_translate.convert(_as_file(source), includes, (), "gpu", CLANG, INCLUDE / "msl_pp")
    for name, value in constants.items():
        text, n = re.subn(rf"extern MSL_AS2 (bool|int) {name}\s*;", rf"constexpr \1 {name} = \1({value});", text)
        if n != 1:
            raise KeyError(f"function constant {name}")
    text = text.replace("static MSL_AS3", "static __attribute__((loader_uninitialized)) MSL_AS3")
    text, n = re.subn(
        r"inline constexpr auto msl_inst_\d+ = &([^;]*);", r"template struct gpu::Kernel<&\1, decltype(\1)>;", text
    )
    if n != 1:
        raise ValueError(f"expected one kernel, got {n}")
    kept = BUILD / f"gpu.{_digest(text, str(GPU_FLAGS), str(limit), Path(__file__).read_text())}.pickle"
    with locked(kept.with_suffix(".lock")):
        if not kept.exists():
            part = kept.with_suffix(f".{os.getpid()}")
            part.write_bytes(pickle.dumps(_compiled_for_gpu(text, limit)))
            part.replace(kept)
    return pickle.loads(kept.read_bytes())


def _compiled_for_gpu(text: str, limit: int) -> Compiled:
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        cpp, plain, limited, assembly = (Path(folder) / name for name in ("k.cpp", "k.ll", "limited.ll", "k.s"))
        cpp.write_text(text)
        _run([CLANG, *GPU_FLAGS, "-S", "-emit-llvm", str(cpp), "-o", str(plain)])
        # Attributes that C++ has no words for.
        ir = plain.read_text()
        (group,) = set(re.findall(r"^define [^\n]*amdgpu_kernel[^\n]*#(\d+)", ir, re.M))

        def attributed(extra):
            path = limited
            path.write_text(re.sub(rf"^attributes #{group} = {{", rf"\g<0> {extra}", ir, flags=re.M))
            flags = [flag for flag in GPU_FLAGS if not flag.startswith(("-std", "-nostdinc++"))]
            _run([CLANG, "-x", "ir", *flags, "-Xclang", "-disable-llvm-passes", "-S", str(path), "-o", str(assembly)])
            return assembly.read_text()

        def figure(text, name):
            return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))

        threads = '"amdgpu-flat-work-group-size"="256,256"'
        free, tight = attributed(threads), attributed(f'{threads} "amdgpu-num-vgpr"="{limit}"')
        code = _loops(tight)
        longest = sorted(code.loops, key=Loop.all, reverse=True)
        return Compiled(
            registers=figure(free, "vgpr_count"),
            spilled=figure(tight, "vgpr_spill_count"),
            arrays=re.findall(r"alloca .*|(?:extract|insert)element .*, i\d+ %[\w.]+$", ir, re.M),
            instructions=code.all(),
            loops=[loop.all() for loop in longest],
            memory=longest[0].all_memory() if longest else 0,
            code=code,
        )


def strict_errors(source: str | Path, *, includes=(), defines=()) -> list[str]:
    """Errors of a syntax check in which address spaces are types and vectors are the compiler's own."""
    require_clang()
    BUILD.mkdir(parents=True, exist_ok=True)
    try:
        text = msl_translate.convert(_as_file(source), includes, defines, "strict", CLANG, INCLUDE / "msl_pp")
    except msl_translate.TranslationError as error:
        return [str(error)]
    path = BUILD / f"strict.{os.getpid()}.cpp"
    path.write_text(text)
    result = subprocess.run([CLANG, *STRICT_FLAGS, str(path)], capture_output=True, text=True, check=False)
    return [line for line in result.stderr.splitlines() if " error: " in line or "fatal" in line]


class Library:
    """Kernels of one source, ready to be dispatched on the simulated GPU."""

    def __init__(self, path: Path):
        self.path = path
        self._lib = ctypes.CDLL(str(path))
        self._lib.msl_name.restype = ctypes.c_char_p
        self.kernels = [self._lib.msl_name(i).decode() for i in range(self._lib.msl_count())]

    def run(
        self, kernel, buffers, grid, group, *, constants=None, threadgroup_memory=None, seed=0, schedule=IN_ORDER, check=True
    ) -> Stats:
        """Runs one dispatch and returns its counters.

        Args:
            kernel: its host name.
            buffers: buffer index -> array, NumPy scalar or `Output`. Arrays the kernel may write are changed in place.
            grid: threadgroups, up to three axes.
            group: threads per threadgroup, up to three axes.
            constants: function-constant id -> value. All constants of the source must be given.
            threadgroup_memory: index -> bytes of a threadgroup argument.
            seed: seed of the random schedules.
            schedule: IN_ORDER or a sum of RANDOM, REVERSE, PREEMPT.
            check: raise `Fault` when the checker reports something.
        """
        for index, value in (constants or {}).items():
            if self._lib.msl_set_fc(int(index), ctypes.c_double(float(value))):
                raise KeyError(f"function constant {index}")
        args, keep = (_Buffer * max(1, len(buffers)))(), []
        for n, (index, value) in enumerate(sorted(buffers.items())):
            is_output = isinstance(value, Output)
            array = value.array if is_output else np.atleast_1d(value)
            if not array.flags.c_contiguous:
                raise ValueError(f"buffer {index}: expected a contiguous array")
            keep.append(array)
            args[n] = _Buffer(index, int(is_output), array.ctypes.data, array.nbytes)
        memory = (ctypes.c_uint * 32)()
        for index, n_bytes in (threadgroup_memory or {}).items():
            memory[index] = n_bytes
        stats, report = _Stats(), ctypes.create_string_buffer(1 << 16)
        three = [(ctypes.c_uint * 3)(*((*tuple(int(x) for x in size), 1, 1, 1))[:3]) for size in (grid, group)]
        code = self._lib.msl_dispatch(
            kernel.encode(),
            args,
            len(buffers),
            memory,
            *three,
            ctypes.c_ulong(seed),
            schedule,
            ctypes.byref(stats),
            report,
            ctypes.c_size_t(1 << 16),
        )
        out = Stats(**{name: getattr(stats, name) for name, _ in _Stats._fields_})
        out.report = self._symbolize(report.value.decode())
        read, written = (ctypes.c_ulong * 32)(), (ctypes.c_ulong * 32)()
        self._lib.msl_buffer_bytes(read, written)
        out.buffer_read, out.buffer_written = list(read), list(written)
        if code < 0 or (check and out.report):
            raise Fault(f"{kernel}:\n{out.report}")
        return out

    def counter(self, name: str) -> int:
        """Operations of a `count` build since it was loaded: `fma` or `exp2`, over all lanes."""
        return ctypes.c_ulong.in_dll(self._lib, f"msl_counter_{name}").value

    def _symbolize(self, report: str) -> str:
        addresses = sorted(set(re.findall(r"^@([0-9a-f]+) ", report, re.M)))
        if not addresses:
            return report
        lines = _run(["addr2line", "-e", str(self.path), *("0x" + a for a in addresses)]).splitlines()
        names = dict(zip(addresses, (re.sub(r".*/([^/]+)$", r"\1", line) for line in lines), strict=True))
        return re.sub(r"^@([0-9a-f]+) ", lambda m: names[m.group(1)] + " ", report, flags=re.M)

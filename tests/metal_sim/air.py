"""Runs kernels that Apple's compiler made on the simulated GPU.

The macOS wheel of MLX holds `mlx.metallib`: one LLVM module per kernel in AIR, Apple's form of LLVM's IR, which clang 19
reads. A module is turned into one for x86-64: address spaces go, threadgroup variables become memory of the simulator,
and calls to `air.*` become calls to `air_runtime.cpp`, which calls the functions of our `metal_*` headers. So a result
that is right says that these functions mean what Apple's compiler means by them.

    python tests/metal_sim/air.py FILE             counts what the modules of a metallib call, and their options (12 a second)
    python tests/metal_sim/air.py FILE KERNEL      prints the module of one kernel
"""

from __future__ import annotations

import collections
import itertools
import mmap
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import metal_simulator as sim
from msl_translate import BUILTINS

from locking import locked

RUNTIME = Path(__file__).with_name("air_runtime.cpp")
CLANG_IR = [sim.CLANG, "-Wno-override-module", "--target=x86_64-linux-gnu", "-x", "ir"]
# Bytes of Ctx (include/msl/interface.h) before its threadgroup pointers and its builtin values.
CTX_TG, CTX_VAL = 32 * 8, 2 * 32 * 8


class Metallib:
    """A container of AIR modules.

    Layout: 24 bytes with the magic number, versions and the length; four pairs of an offset and a length, of which the first
    is the list of functions and the last their modules; a list holds entries of tags, and OFFT and MDSZ give a module's place.
    """

    def __init__(self, path: str | Path):
        with open(path, "rb") as file:
            self._data = data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if data[:4] != b"MTLB":
            raise ValueError(f"{path}: expected a metallib")
        offsets = struct.unpack("<8Q", data[24:88])
        functions, modules = offsets[0], offsets[6]
        (count,) = struct.unpack("<I", data[functions : functions + 4])
        at, self._place = functions + 4, {}
        for _ in range(count):
            (size,) = struct.unpack("<I", data[at : at + 4])
            tags = self._tags(at + 4, at + size)
            name = tags["NAME"].rstrip(b"\0").decode()
            self._place[name] = (modules + struct.unpack("<3Q", tags["OFFT"])[2], struct.unpack("<Q", tags["MDSZ"])[0])
            at += size

    def _tags(self, at: int, end: int) -> dict[str, bytes]:
        tags = {}
        while at < end and self._data[at : at + 4] != b"ENDT":
            (length,) = struct.unpack("<H", self._data[at + 4 : at + 6])
            tags[self._data[at : at + 4].decode()] = self._data[at + 6 : at + 6 + length]
            at += 6 + length
        return tags

    @property
    def kernels(self) -> list[str]:
        return list(self._place)

    def bitcode(self, kernel: str) -> bytes:
        offset, size = self._place[kernel]
        return self._data[offset : offset + size]


def disassemble(bitcode: bytes) -> str:
    """The text of a module, with clang's names for the target."""
    command = [*CLANG_IR, "-", "-S", "-emit-llvm", "-Xclang", "-disable-llvm-passes", "-o", "-"]
    done = subprocess.run(command, input=bitcode, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.decode()[:2000])
    return done.stdout.decode()


def build(
    metallib: Metallib, kernel: str, *, mode: str = "check", fused: bool = True, include: Path = sim.INCLUDE, edit=None
) -> sim.Library:
    """The library of one kernel of a metallib, to be run as one of ours.

    Args:
        metallib: where it is.
        kernel: its name.
        mode: `check` or `fast`, as in `metal_simulator.build`.
        fused: `llvm.fmuladd` is one operation, rounded once.
        include: our `metal_*` headers, which say what the `air.*` functions do.
        edit: changes the text of the module.
    """
    sim.require_clang()
    sim.BUILD.mkdir(parents=True, exist_ok=True)
    ir = disassemble(metallib.bitcode(kernel))
    module = Module(edit(ir) if edit else ir, kernel)
    text = module.retargeted(check=mode == "check")
    flags = ["-fPIC", "-O1", "-march=x86-64-v3", "-fno-vectorize", "-fno-slp-vectorize"]
    flags += [] if fused else ["-mno-fma"]
    flags += ["-fsanitize=thread"] if mode == "check" else []
    scheduler, functions = sim._runtime_object(), _functions_object(include)
    key = sim._digest(text, module.glue, str(flags), scheduler.name, functions.name)
    library = sim.BUILD / f"air.{mode}.{key}.so"
    with locked(library.with_suffix(".lock")):
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=sim.BUILD) as folder:
                ir, obj, glue, part = (Path(folder) / name for name in ("k.ll", "k.o", "glue.cpp", "k.so"))
                ir.write_text(text)
                glue.write_text(module.glue)
                sim._run([*CLANG_IR, *flags, "-c", str(ir), "-o", str(obj)])
                objects = [str(obj), str(functions), str(scheduler)]
                options = ["-std=c++20", f"-I{sim.INCLUDE}", "-fPIC", "-shared", "-Wl,-Bsymbolic", "-Wl,--no-undefined"]
                sim._run([sim.CLANG, *options, str(glue), *objects, "-o", str(part), "-lm", "-lstdc++"])
                part.replace(library)
    if library not in sim._loaded:
        sim._loaded[library] = sim.Library(library)
    return sim._loaded[library]


def _functions_object(include: Path) -> Path:
    flags = ["-O2", f"-I{include}", *(flag for flag in sim.COMMON_FLAGS if not flag.startswith(("-g", "-I")))]
    headers = "".join(path.read_text() for path in sorted(include.rglob("*")) if path.is_file())
    out = sim.BUILD / f"air_runtime.{sim._digest(RUNTIME.read_text(), str(flags[2:]), headers)}.o"
    with locked(out.with_suffix(".lock")):
        if not out.exists():
            part = out.with_suffix(".part.o")
            sim._run([sim.CLANG, *flags, "-c", str(RUNTIME), "-o", str(part)])
            part.replace(out)
    return out


def _split(text: str) -> list[str]:
    """Splits at the commas that are not within brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += c in "<([{"
        depth -= c in ">)]}"
        if c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


def _type(text: str) -> str:
    """The type at the start of an argument."""
    return re.match(r"<[^>]*>|[\w.%\"]+", text).group()


def _stored(type_: str) -> str:
    """How a value lies in memory. A lane's part of an 8x8 matrix is elements 0 and 1 of 64."""
    return "i8" if type_ in ("i1", "void") else re.sub("^<64 x", "<2 x", type_)


def _function_of_the_runtime(result: str, name: str, arguments: list[str]) -> list[str]:
    """IR of a function that hands its arguments to the runtime by memory, whatever C++ passes in registers."""
    if len(arguments) > 3:
        raise NotImplementedError(f"{name}: {len(arguments)} arguments")
    lines, addresses = [], []
    for i, type_ in enumerate(arguments):
        stored, value = _stored(type_), f"%a{i}"
        if stored != type_:
            value = f"%b{i}"
            narrow = f"shufflevector {type_} %a{i}, {type_} poison, <2 x i32> <i32 0, i32 1>"
            lines.append(f"  {value} = " + (f"zext i1 %a{i} to i8" if type_ == "i1" else narrow))
        lines += [f"  %s{i} = alloca {stored}, align 16", f"  store {stored} {value}, ptr %s{i}, align 16"]
        addresses.append(f"ptr %s{i}")
    addresses += ["ptr null"] * (3 - len(addresses))
    stored = _stored(result)
    lines += [f"  %r = alloca {stored}, align 16"]
    lines += [f'  call void @"msl.{name}"(ptr %r, {", ".join(addresses)}, i32 %at)']
    if result == "void":
        lines.append("  ret void")
    elif result == stored:
        lines += [f"  %v = load {stored}, ptr %r, align 16", f"  ret {result} %v"]
    else:
        places = ", ".join(["i32 0", "i32 1", *["i32 poison"] * 62])
        wide = f"shufflevector {stored} %v, {stored} poison, <64 x i32> <{places}>"
        lines.append(f"  %v = load {stored}, ptr %r, align 16")
        lines += ["  %o = " + ("trunc i8 %v to i1" if result == "i1" else wide), f"  ret {result} %o"]
    given = ", ".join([*(f"{type_} %a{i}" for i, type_ in enumerate(arguments)), "i32 %at"])
    declaration = f'declare void @"msl.{name}"(ptr, ptr, ptr, ptr, i32) convergent nounwind'
    return [declaration, f"define internal {result} @{name}({given}) alwaysinline convergent nounwind {{", *lines, "}"]


class Module:
    """One kernel of a metallib, on its way to x86-64."""

    def __init__(self, ir: str, kernel: str):
        self.ir, self.kernel = ir, kernel
        nodes = dict(re.findall(r"^!(\d+) = !\{(.*)\}$", ir, re.M))
        (entry,) = re.findall(r"^!air\.kernel = !\{!(\d+)\}$", ir, re.M)
        arguments = _split(nodes[entry])[2][1:]
        self.arguments = [self._argument(nodes[number[1:]]) for number in _split(nodes[arguments])]
        named = re.search(r"^!air\.function_constants = !\{(.*)\}$", ir, re.M)
        # Variables that hold function constants: id -> (symbol, type).
        self.constants = {}
        for number in _split(named.group(1)) if named else []:
            symbol, _, _, index, *_ = _split(nodes[number[1:]])
            symbol = symbol.split("@")[1]
            type_ = re.search(rf"^@{re.escape(symbol)} = .*? constant (\w+) ", ir, re.M).group(1)
            self.constants[int(index.split()[1])] = (symbol, type_)

    @staticmethod
    def _argument(node: str) -> tuple[str, int, bool]:
        """What an argument of the kernel is: a kind of `Param`, its index, and whether it is only read."""
        words = [part.removeprefix("!").strip('"') for part in _split(node)]
        kind = words[1].removeprefix("air.")
        kind = "buffer" if kind == "function_constant" and "air.buffer" in words else kind
        if kind == "buffer":
            index = int(words[words.index("air.location_index") + 1].split()[1])
            space = int(words[words.index("air.address_space") + 1].split()[1])
            return "MSL_TG" if space == 3 else "MSL_BUF", index, "air.read" in words
        if kind not in BUILTINS:
            raise NotImplementedError(f"argument {kind}")
        return "MSL_BUILTIN", BUILTINS[kind], True

    @property
    def glue(self) -> str:
        """C++ that tells the scheduler about the kernel, its arguments and its function constants."""
        kinds = {"MSL_BUF": 0, "MSL_TG": 1, "MSL_BUILTIN": 2}
        rows = ", ".join(f"{{{kinds[kind]}, {index}, nullptr, {str(ro).lower()}}}" for kind, index, ro in self.arguments)
        lines = ['#include "msl/interface.h"', 'extern "C" void air_entry(msl::Ctx&, const msl::Param*);']
        lines.append(f"static const msl::Param params[] = {{{rows}}};")
        lines.append(f'static msl::Reg kernel("{self.kernel}", air_entry, params, {len(self.arguments)});')
        for index, (symbol, type_) in self.constants.items():
            size = {"i8": 1, "i16": 2, "i32": 4, "i64": 8, "float": 4}[type_]
            lines.append(f'extern "C" char constant_{index} asm("{symbol}");')
            real = int(type_ == "float")
            lines.append(f'static msl::FCReg reg_{index}({index}, &constant_{index}, {size}, {real}, "{symbol}");')
        return "\n".join(lines) + "\n"

    def retargeted(self, *, check: bool) -> str:
        """The module for x86-64, with `air_entry` for the scheduler."""
        ir = re.sub(r"^@llvm\.[\w.]+ = .*\n", "", self.ir, flags=re.M)
        initialiser = re.search(r'^define .*@(\S+)\(\).*section "air.static_init"', ir, re.M)
        ir = re.sub(r',? section "air\.[^"]*"', "", ir)
        # A scheduler that reports every access wants no loads that the source does not ask for.
        ir = re.sub(r" dereferenceable\(\d+\)", "", ir)
        ir, shared = self._without_threadgroup_globals(ir)
        for symbol, type_ in self.constants.values():
            ir = re.sub(rf"^@{re.escape(symbol)} = .*", f"@{symbol} = hidden global {type_} zeroinitializer", ir, flags=re.M)
        ir = re.sub(r" addrspace\(\d\)", "", ir).replace("addrspacecast", "bitcast")
        ir = re.sub(r"@llvm\.[\w.]+", lambda m: re.sub(r"\.p\d(?=\.|$)", ".p0", m.group()), ir)
        intrinsics = {re.search(r"@([\w.]+)", x).group(): x for x in re.findall(r"^declare .*@llvm\..*\n", ir, re.M)}
        ir = re.sub(r"^declare .*@llvm\..*\n", "", ir, flags=re.M) + "".join(intrinsics.values())
        ir = self._with_functions_of_the_runtime(ir)
        out, at_body, n_shared = [], None, 0
        for line in ir.splitlines():
            if line.startswith("define "):
                line = line.replace("weak_odr ", "hidden ", 1)
                at_body = len(out) + 1
                if check and " alwaysinline " not in line:
                    line = re.sub(r"( #\d+)? \{$", r" sanitize_thread\1 {", line)
            out.append(line)
            if line == "}" and at_body is not None:
                n_shared = self._shared_in(out, at_body, shared, n_shared)
                at_body = None
        return "\n".join(out) + "\n" + self._entry(initialiser.group(1) if initialiser else None)

    @staticmethod
    def _without_threadgroup_globals(ir: str) -> tuple[str, dict[str, tuple[str, str]]]:
        shared = {}

        def take(match):
            shared[match.group(1)] = (match.group(2), match.group(3))
            return ""

        pattern = r'^@("[^"]*"|[\w.$]+) = [^\n]*addrspace\(3\) global (.*) (?:undef|poison), align (\d+)\n'
        return re.sub(pattern, take, ir, flags=re.M), shared

    def _shared_in(self, out: list[str], body: int, shared: dict, n: int) -> int:
        """Threadgroup variables of a function: memory of the scheduler, and constant expressions become instructions.

        `out` holds the module up to the end of the function, whose first line is `body`.
        """
        first = []
        for site, (name, (type_, align)) in enumerate(shared.items()):
            lines = [i for i in range(body, len(out)) if f"@{name}" in out[i]]
            if not lines:
                continue
            size = f"ptrtoint (ptr getelementptr ({type_}, ptr null, i32 1) to i64)"
            first.append(f"  %shared{site} = call ptr @msl_rt_tg(i32 {site}, i64 {size}, i64 {align}, ptr @air.shared)")
            address = rf"(getelementptr[ \w]*|bitcast) \(([^()]*@{re.escape(name)}(?![\w.$])[^()]*)\)"
            for i in lines:
                while match := re.search(address, out[i]):
                    first.append(f"  %place{n} = {match.group(1)} {match.group(2).replace('@' + name, f'%shared{site}')}")
                    out[i] = out[i].replace(match.group(), f"%place{n}")
                    n += 1
                out[i] = re.sub(rf"@{re.escape(name)}(?![\w.$])", f"%shared{site}", out[i])
        out[body:body] = first
        return n

    @staticmethod
    def _with_functions_of_the_runtime(ir: str) -> str:
        """Calls of `air.*` go to the runtime, with the number of the call: lanes meet at a call, as in a simdgroup."""
        defined = []

        def define(match):
            result, name, arguments = match.groups()
            result = re.search(r"(<[^>]*>|\w+)$", result).group(1)
            defined.extend(_function_of_the_runtime(result, name, [_type(x) for x in _split(arguments)]))
            return ""

        ir = re.sub(r"^declare (.*) @(air\.[\w.]+)\((.*?)\)[^\n)]*\n", define, ir, flags=re.M)
        numbers = itertools.count()

        def numbered(match):
            call, arguments = match.groups()
            return f"{call}{arguments}{', ' if arguments else ''}i32 {next(numbers)})"

        ir = re.sub(r"^(.*\bcall [^@\n]*@air\.[\w.]+\()([^()\n]*)\)", numbered, ir, flags=re.M)
        return ir + "\n".join(defined) + "\n"

    def _entry(self, initialiser: str | None) -> str:
        """The function that the scheduler calls for every thread."""
        (signature,) = re.findall(rf'^define .*@"?{re.escape(self.kernel)}"?\((.*)\) ', self.ir, re.M)
        types = [_type(argument) for argument in _split(signature)]
        lines = ["define hidden void @air_entry(ptr %ctx, ptr %params) {"]
        lines += [f"  call void @{initialiser}()"] if initialiser else []
        passed = []
        for i, ((kind, index, _), type_) in enumerate(zip(self.arguments, types, strict=True)):
            place = {"MSL_BUF": 8 * index, "MSL_TG": CTX_TG + 8 * index, "MSL_BUILTIN": CTX_VAL + 16 * index}[kind]
            loaded = type_.replace("i16", "i32")
            lines.append(f"  %p{i} = getelementptr i8, ptr %ctx, i64 {place}")
            lines.append(f"  %v{i} = load {loaded}, ptr %p{i}, align 8")
            if loaded != type_:
                lines.append(f"  %n{i} = trunc {loaded} %v{i} to {type_}")
            passed.append(f"{type_} {'%v' if loaded == type_ else '%n'}{i}")
        lines += [f"  call void @{self.kernel}({', '.join(passed)})", "  ret void", "}"]
        lines += ['@air.shared = internal constant [12 x i8] c"threadgroup\\00"', "declare ptr @msl_rt_tg(i32, i64, i64, ptr)"]
        return "\n".join(lines) + "\n"


FLAGGED = r"= (?:tail )?(?:f\w+|call|select|phi)((?: (?:fast|nnan|ninf|nsz|arcp|contract|afn|reassoc))+) "


def facts(ir: str) -> collections.Counter:
    """What a module says about its arithmetic: functions called, flags of operations, compile options, attributes."""
    found = collections.Counter(re.findall(r"call [^\n@]*@((?:air|llvm)\.[\w.]+)\(", ir))
    found.update(f"operation with{flags}" for flags in re.findall(FLAGGED, ir))
    found.update(re.findall(r'"(air\.compile\.\w+)"', ir))
    found.update(f"attribute {name}" for name in re.findall(r'"(denormal[^"]*|unsafe-fp-math|no-(?:infs|nans)[^"]*)"', ir))
    found["separate fmul"], found["separate fadd"] = len(re.findall(" = fmul ", ir)), len(re.findall(" = fadd ", ir))
    return found


def main() -> None:
    metallib = Metallib(sys.argv[1])
    if len(sys.argv) > 2:
        print(disassemble(metallib.bitcode(sys.argv[2])))
        return
    total, modules = collections.Counter(), collections.Counter()
    for kernel in metallib.kernels:
        found = facts(disassemble(metallib.bitcode(kernel)))
        total.update(found)
        modules.update(name for name, n in found.items() if n)
    print(f"{len(metallib.kernels)} modules")
    for name in sorted(total):
        print(f"{total[name]:9} in {modules[name]:6} modules: {name}")


if __name__ == "__main__":
    main()

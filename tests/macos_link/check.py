#!/usr/bin/env python3
"""Compiles the whole extension with its Metal host code for arm64 macOS 14 on Linux and links it strictly.

For the newest supported release of MLX, with TQEXT_TESTS=full for every one, against the real libmlx.dylib of its macOS wheel,
with no dynamic look-up: a missing or misspelt symbol is an error. The result is a check, nothing to ship: no Apple SDK is
involved, and the kernels' sources are only embedded.

    pip install ziglang==0.17.1 && python tests/macos_link/check.py --build DIR
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

sys.path.insert(0, str(ROOT / "scripts"))
sys.path.insert(1, str(ROOT / "tests"))
from mlx_releases import RELEASES  # noqa: E402

from covering import FULL  # noqa: E402

CHECKED = RELEASES if FULL else RELEASES[:1]

OBJC_SYMBOLS = ["_objc_msgSend", "_sel_registerName", "_objc_lookUpClass", "_objc_getProtocol"]


def run(command: list[str], **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(x) for x in command], capture_output=True, text=True, check=False, **options)


def write_stub(path: Path, library: str, symbols: list[str]) -> None:
    """A text stub (.tbd) that tells the linker which symbols a system library exports."""
    path.write_text(
        "--- !tapi-tbd\ntbd-version: 4\ntargets: [ arm64-macos ]\n"
        f"install-name: '{library}'\nexports:\n  - targets: [ arm64-macos ]\n    symbols: [ {', '.join(symbols)} ]\n...\n"
    )


def mlx_folder(build: Path, version: str) -> Path:
    """`mlx/` of the macOS wheel of a version of MLX, downloaded once."""
    folder = build / f"wheel-{version}"
    if not (folder / "mlx" / "lib" / "libmlx.dylib").exists():
        # The wheel names its macOS version; every MLX release has one for macOS 14.
        options = ["--platform", "macosx_14_0_arm64", "--only-binary=:all:", "--no-deps", "-q", "-d", build]
        done = run([sys.executable, "-m", "pip", "download", *options, f"mlx-metal=={version}"])
        if done.returncode:
            raise RuntimeError(f"cannot download mlx-metal {version}:\n{done.stderr}")
        with zipfile.ZipFile(next(build.glob(f"mlx_metal-{version}-*.whl"))) as wheel:
            wheel.extractall(folder)
    return folder / "mlx"


def prepare(build: Path) -> dict[str, str]:
    """Tools and stubs in the build folder; returns the environment for CMake."""
    tools, stubs = build / "tools", build / "stubs"
    tools.mkdir(parents=True, exist_ok=True)
    stubs.mkdir(exist_ok=True)
    for name in ("cc", "c++", "ar", "ranlib"):
        link = tools / name
        link.unlink(missing_ok=True)
        link.symlink_to(HERE / "compiler.py")
    # CMake asks the machine it runs on for its macOS version, and knows @rpath from 10.5 on.
    (tools / "sw_vers").write_text("#!/bin/sh\necho 14.0\n")
    (tools / "sw_vers").chmod(0o755)
    nanobind = Path(importlib.util.find_spec("nanobind").submodule_search_locations[0])
    lines = (nanobind / "cmake" / "darwin-ld-cpython.sym").read_text().split()
    write_stub(stubs / "libcpython.tbd", "@rpath/cpython", [x for x in lines if x.startswith("_")])
    write_stub(stubs / "libobjc.tbd", "/usr/lib/libobjc.A.dylib", OBJC_SYMBOLS)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {
        "PATH": path,
        "TQEXT_MACOS_TOOLS": str(tools),
        "TQEXT_MACOS_STUBS": str(stubs),
        "TQEXT_ZIG_PYTHON": sys.executable,
    }


def link(build: Path, source: Path = ROOT, name: str = "extension") -> subprocess.CompletedProcess:
    """Configures and builds the extension for these releases; return code 0: it compiled and linked."""
    build.mkdir(parents=True, exist_ok=True)
    environment, folder = prepare(build), build / name
    mlx = ";".join(str(mlx_folder(build, version)) for version in CHECKED)
    configured = run(
        [
            "cmake",
            "-S",
            source,
            "-B",
            folder,
            f"-DCMAKE_TOOLCHAIN_FILE={HERE / 'toolchain.cmake'}",
            f"-DTQEXT_MLX_DIR={mlx}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_CXX_FLAGS=-I{HERE / 'stubs'}",
            # Optimised code would be compiled for nobody.
            "-DCMAKE_BUILD_TYPE=Debug",
            "-DCMAKE_CXX_FLAGS_DEBUG=-O0 -DNDEBUG",
            "-DTQEXT_WERROR=OFF",
            "-DCMAKE_UNITY_BUILD=ON",
        ],
        env=environment,
    )
    if configured.returncode:
        return configured
    return run(["cmake", "--build", folder, "-j2"], env=environment)


# References to a function of libmlx that exists, and to one that does not.
PROBE = """
namespace mlx::core {{ struct Device; namespace metal {{ class Device; Device& {name}(mlx::core::Device); }} }}
struct mlx::core::Device {{ int type, index; }};
extern "C" __attribute__((visibility("default"))) void* tqext_probe() {{ return &mlx::core::metal::{name}({{0, 0}}); }}
"""


def links_with(build: Path, name: str) -> subprocess.CompletedProcess:
    """Links the built extension once more with a reference to `mlx::core::metal::NAME`."""
    environment, folder = prepare(build), build / "extension"
    source, probe = build / "probe.cpp", build / "probe.o"
    source.write_text(PROBE.format(name=name))
    compiled = run([build / "tools" / "c++", "-c", source, "-o", probe], env=environment)
    if compiled.returncode:
        raise RuntimeError(compiled.stderr)
    linking = next(folder.glob("mlx-*/CMakeFiles/*.dir/link.txt"))
    command = linking.read_text().split()
    command[command.index("-o") + 1] = str(build / "probe.so")
    return run([*command, probe], env=environment, cwd=linking.parents[2])


def self_test(build: Path) -> None:
    """The check must be able to fail: a name that libmlx does not export is an error, one that it does is none."""
    good = links_with(build, "device")
    if good.returncode:
        raise RuntimeError(f"a correct reference does not link:\n{good.stderr}")
    bad = links_with(build, "devise")
    if not bad.returncode or "devise" not in bad.stderr:
        raise RuntimeError(f"a misspelt symbol links:\n{bad.stdout}{bad.stderr}")


def check_embedded_sources(build: Path) -> None:
    """The kernels' texts in the module must stand alone: the run-time compiler takes ASCII and has no include path."""
    sys.path[:0] = [str(HERE.parent / "metal_sim"), str(HERE.parent)]
    import metal_simulator
    from instances import INSTANCES

    text = (build / "extension" / "metal_sources.cpp").read_text()
    embedded = dict(re.findall(r'name == "(\w+)"\) return R"metal\((.*?)\)metal"', text, re.S))
    if set(embedded) != set(INSTANCES):
        raise RuntimeError(f"embedded sources: expected {set(INSTANCES)}, got {set(embedded)}")
    for name, instances in INSTANCES.items():
        source = embedded[name] + "\n" + "\n".join(instances) + "\n"
        errors = ["#include of a file"] if '#include "' in source else metal_simulator.strict_errors(source)
        if errors or not source.isascii():
            raise RuntimeError(f"embedded {name}: {errors or 'not ASCII'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "macos_link")
    build = parser.parse_args().build.resolve()
    result = link(build)
    print(result.stdout[-4000:] + result.stderr[-8000:])
    if result.returncode:
        return result.returncode
    self_test(build)
    check_embedded_sources(build)
    print(f"linked for arm64 macOS 14 and mlx {', '.join(CHECKED)}; a misspelt symbol is refused")
    return 0


if __name__ == "__main__":
    sys.exit(main())

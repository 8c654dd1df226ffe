#!/usr/bin/env python3
"""Stands in for Apple's compiler, archiver and ranlib: zig with Apple's linker options removed or translated.

Called as cc, c++, ar or ranlib (by the name of a link to this file). TQEXT_MACOS_STUBS holds the .tbd files.
"""

import os
import subprocess
import sys

TARGET = "aarch64-macos.14.0"
DROP = ("-Wl,-headerpad_max_install_names", "-Wl,-search_paths_first", "-Wl,-x", "-Wl,-S", "-Wl,-dead_strip")


def translate(arguments: list[str], stubs: str) -> list[str]:
    """Options for zig: no frameworks, and the symbols of CPython from a stub in place of dynamic look-up."""
    out, rest = [], iter(arguments)
    for argument in rest:
        if argument == "-Xlinker":
            argument = next(rest)
            if argument == "-framework":
                next(rest), next(rest)  # -Xlinker NAME
            else:
                out += ["-Xlinker", argument]
        elif argument == "-framework":
            next(rest)
        elif argument == "-bundle":
            out.append("-shared")
        elif argument in DROP or argument.startswith("-F"):
            continue
        elif argument.startswith("-Wl,@"):
            out += [f"-L{stubs}", "-lcpython", "-lobjc"]
        else:
            out.append(argument)
    return out


def main() -> int:
    name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
    zig = [os.environ.get("TQEXT_ZIG_PYTHON", sys.executable), "-m", "ziglang", name]
    if name in ("cc", "c++"):
        zig += ["-target", TARGET, *translate(arguments, os.environ["TQEXT_MACOS_STUBS"])]
    else:
        zig += arguments
    return subprocess.run(zig, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

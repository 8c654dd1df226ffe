"""CUDA kernels compiled by NVRTC as tqext compiles them on users' machines.

As a program it takes the arguments of `compile_kernel` as JSON, and prints the compiler's log.
"""

import ctypes
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
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


def compile_kernel(name, architecture, options, defines):
    """Whether the kernel compiles, and the compiler's log with the assembler's report of registers."""
    nvrtc = compiler()
    headers = {Path(file).name: (ROOT / file).read_text() for file in FILES} | {"stdint.h": standard_header()}
    texts = (ctypes.c_char_p * len(headers))(*[text.encode() for text in headers.values()])
    names = (ctypes.c_char_p * len(headers))(*[key.encode() for key in headers])
    program = ctypes.c_void_p()
    source = (ROOT / "cuda" / name).read_text().encode()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, name.encode(), len(headers), texts, names) == 0
    options = [
        f"--gpu-architecture={architecture}",
        "--std=c++17",
        "--device-as-default-execution-space",
        "--ptxas-options=-v",
        # One file holds several operations: each leaves some helpers unused.
        "-diag-suppress=177",
        *options,
        *(f"-D{key}={value}" for key, value in defines.items()),
    ]
    result = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*[x.encode() for x in options]))
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return result == 0, log.value.decode()


def compile_kernel_apart(*arguments):
    """The same in a process of its own: in one process, some options act on every kernel that is compiled after."""
    done = subprocess.run([sys.executable, __file__], input=json.dumps(arguments), capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode == 0, done.stdout


if __name__ == "__main__":
    compiles, text = compile_kernel(*json.load(sys.stdin))
    print(text)
    sys.exit(0 if compiles else 1)

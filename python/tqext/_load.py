"""Loading of the native extension, with one plain sentence when the installation cannot work."""

import functools
import importlib
import importlib.metadata
import sys
from pathlib import Path
from typing import Any


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _mlx_requirement(version: str) -> str:
    return f"'mlx[cpu]=={version}'" if sys.platform == "linux" else f"mlx=={version}"


def runs_command() -> bool:
    """Whether this process was started as ``tqext ...`` or ``python -m tqext ...``."""
    program = sys.argv[0] if sys.argv else ""
    return Path(program).stem == "tqext" or (program == "-m" and _module_of(sys.orig_argv) == "tqext")


def _module_of(command: list[str]) -> str | None:
    """What follows ``-m``."""
    return command[command.index("-m") + 1] if "-m" in command[:-1] else None


def load_extension() -> None:
    """Imports ``mlx.core`` and then ``tqext._ext``.

    Raises:
        ImportError: the installed mlx or nanobind-backend is not the one this build was made for, or MLX has no library;
            the message says what to install.
    """
    try:
        build = importlib.import_module("tqext._build_info")
    except ModuleNotFoundError:
        raise ImportError("tqext is not built: install it with `pip install .` from its source folder.") from None
    mlx = _mlx_requirement(build.MLX_VERSION)
    # Versions come first: a library of another version ends in an undefined symbol, not in an explanation.
    found = _installed("mlx")
    if found != build.MLX_VERSION:
        raise ImportError(f"tqext was built for mlx {build.MLX_VERSION}, found {found or 'none'}: run `pip install {mlx}`.")
    found = _installed("nanobind-backend")
    if found != build.NANOBIND_BACKEND_VERSION:
        wanted = build.NANOBIND_BACKEND_VERSION
        raise ImportError(
            f"tqext needs nanobind-backend {wanted}, found {found or 'none'}: run `pip install nanobind-backend=={wanted}`."
        )
    try:
        core = importlib.import_module("mlx.core")
    except ImportError as error:
        raise ImportError(f"MLX has no library to run on ({error}): run `pip install {mlx}`.") from error
    try:
        ext = importlib.import_module("tqext._ext")
    except ImportError as error:
        raise ImportError(
            f"tqext's extension does not load with this MLX ({error}): run `pip install --force-reinstall {mlx}`, "
            "then reinstall tqext."
        ) from error
    try:
        ext.rotate(core.zeros((32,)), rotation="none", stream=core.cpu)  # takes an array and runs nothing
    except TypeError as error:
        raise ImportError(
            "tqext was built with a nanobind that does not match MLX's, so it cannot take an mlx.core.array: "
            f"reinstall tqext with nanobind=={build.NANOBIND_VERSION}."
        ) from error
    if core.cuda.is_available():
        extend_clear_cache(core, ext)


def extend_clear_cache(core: Any, ext: Any) -> None:
    """Let ``mx.clear_cache`` free what the CUDA kernels keep for later outputs, too: MLX has no other way to ask for it."""
    clear_cache = core.clear_cache

    @functools.wraps(clear_cache)
    def wrapper() -> None:
        clear_cache()
        ext.clear_gpu_memory()

    core.clear_cache = wrapper

"""Loading of the native extension, with one plain sentence when the installation cannot work."""

import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _mlx_requirement(version: str) -> str:
    if sys.platform != "linux":
        return f"mlx=={version}"
    # Both own the same library: the advice must not put the one for the CPU in the place of the one for NVIDIA GPUs.
    extra = next((x for x in ("cuda13", "cuda12") if _installed(f"mlx-{x[:4]}-{x[4:]}")), "cpu")
    return f"'mlx[{extra}]=={version}'"


def _numbers(release: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", release)]


def _listed(releases: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(releases[:-1]), releases[-1]]))


def choose(built: Sequence[str], supported: Sequence[str], installed: str | None) -> str:
    """The release of MLX whose extension fits the installed one.

    Args:
        built: releases that this build has an extension for, the newest first.
        supported: those that this version of tqext can be built for.
        installed: the installed release; None: there is none.

    Raises:
        ImportError: this build has none that fits.
    """
    if installed is not None and installed in built:
        return installed
    remedy = f"run `pip install {_mlx_requirement(built[0])}`"
    if installed in supported:
        remedy += f", or build tqext for this one: `TQEXT_MLX={installed} pip install .` in its source folder"
    elif installed is not None and _numbers(installed) > _numbers(built[0]):
        remedy += ", or look for a newer tqext"
    raise ImportError(f"tqext was built for mlx {_listed(built[::-1])}, found {installed or 'none'}: {remedy}.")


def _import_extension(folder: Path, release: str) -> ModuleType:
    """The extension for a release of MLX, as the module ``tqext._ext``."""
    stem = "_ext_mlx_" + release.replace(".", "_")
    files = (folder / f"{stem}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    file = next((x for x in files if x.exists()), None)
    spec = file and importlib.util.spec_from_file_location("tqext._ext", file)
    if not spec or not spec.loader:
        raise ImportError(f"no {stem} in {folder}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["tqext._ext"] = module
    # As an import statement would; the file has no name that one could find.
    setattr(sys.modules["tqext"], "_ext", module)  # noqa: B010
    return module


def runs_command() -> bool:
    """Whether this process was started as ``tqext ...`` or ``python -m tqext ...``."""
    program = sys.argv[0] if sys.argv else ""
    return Path(program).stem == "tqext" or (program == "-m" and _module_of(sys.orig_argv) == "tqext")


def _module_of(command: list[str]) -> str | None:
    """What follows ``-m``."""
    return command[command.index("-m") + 1] if "-m" in command[:-1] else None


def load_extension() -> None:
    """Imports ``mlx.core`` and then ``tqext._ext``, which is the extension for the installed release of MLX.

    Raises:
        ImportError: this build was not made for the installed mlx or nanobind-backend, or MLX has no library; the message
            says what to install.
    """
    try:
        build = importlib.import_module("tqext._build_info")
    except ModuleNotFoundError:
        raise ImportError("tqext is not built: install it with `pip install .` from its source folder.") from None
    # The version comes first: a library of another one ends in an undefined symbol, not in an explanation.
    release = choose(build.MLX_RELEASES, build.MLX_SUPPORTED, _installed("mlx"))
    mlx = _mlx_requirement(release)
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
        ext = _import_extension(Path(str(build.__file__)).parent, release)
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

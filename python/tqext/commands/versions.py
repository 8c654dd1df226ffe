"""What is installed."""

from __future__ import annotations

import importlib.metadata
import platform

import tqext


def versions() -> dict[str, str]:
    """Versions of tqext and of what it stands on."""
    out = {"tqext": tqext.__version__, "python": platform.python_version()}
    if tqext.load_error is None:
        out["format"] = str(tqext.format.VERSION)
    for package in ("mlx", "mlx-lm", "nanobind-backend"):
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            out[package] = "missing"
    return out

"""Names of a package that are imported on first use."""

import importlib
from collections.abc import Mapping
from typing import Any


def attribute(package: str, modules: Mapping[str, str], name: str) -> Any:
    """What a package's ``__getattr__`` answers.

    Args:
        package: The package.
        modules: The module of each of its names.
        name: The name that is asked for.

    Raises:
        AttributeError: There is no such name.
    """
    if name not in modules:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(importlib.import_module(modules[name]), name)

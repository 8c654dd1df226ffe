"""Writes the type stub of a built extension: make_stub.py EXTENSION FOLDER."""

import importlib.util
import pathlib
import sys

import mlx.core  # noqa: F401 - the extension's signatures name its types
import nanobind.stubgen

extension, folder = sys.argv[1], pathlib.Path(sys.argv[2])
# The file's name tells the release of MLX, the module's does not.
spec = importlib.util.spec_from_file_location("_ext", extension)
assert spec is not None and spec.loader is not None
module = importlib.util.module_from_spec(spec)
sys.modules["_ext"] = module
spec.loader.exec_module(module)
nanobind.stubgen.main(["-q", "-r", "-m", "_ext", "-O", str(folder)])
# The generator knows the module by its bare name; installed it is part of the package.
stub = folder / "_ext" / "__init__.pyi"
stub.write_text(stub.read_text().replace("from _ext import", "from tqext._ext import"))

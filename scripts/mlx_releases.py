#!/usr/bin/env python3
"""The MLX releases that tqext supports, and what the build takes from them.

RELEASES is the only list: the build, the package's dependency on mlx, the tests and the release job read it. TQEXT_MLX, an
environment variable, says which of them to build for: versions, separated by spaces, or ``all``. Without it, a build is for
the mlx that is installed beside the build backend, which is the newest supported one in an isolated build.

    scripts/mlx_releases.py list             the supported releases, the newest first
    scripts/mlx_releases.py test [VERSION]   one wheel for these releases (all), tested beside each of them
    scripts/mlx_releases.py add [VERSION]    supports another release (the newest on the index) if the whole suite passes
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
ROOT = HERE.parents[1]
TABLE = ROOT / "docs" / "platforms.md"

# The newest first.
RELEASES = [
    "0.32.4",
    "0.32.3",
]


def installed() -> str | None:
    """The version of mlx in this Python."""
    try:
        return importlib.metadata.version("mlx")
    except importlib.metadata.PackageNotFoundError:
        return None


def selected(wanted: str) -> list[str]:
    """The releases to build for, the newest first; `wanted` is what TQEXT_MLX holds."""
    if wanted.split() == ["all"]:
        return RELEASES
    if not wanted.split():
        found = installed()
        return [found] if found in RELEASES else RELEASES[:1]
    unknown = [x for x in wanted.split() if x not in RELEASES]
    if unknown:
        raise SystemExit(f"TQEXT_MLX: expected all, or releases among {' '.join(RELEASES)}, got {' '.join(unknown)}")
    return [x for x in RELEASES if x in wanted.split()]


def specifier(releases: list[str]) -> str:
    """A version specifier that of all RELEASES allows just these."""
    if len(releases) == 1:
        return f"=={releases[0]}"
    inside = RELEASES[RELEASES.index(releases[0]) : RELEASES.index(releases[-1]) + 1]
    return ",".join([f">={releases[-1]}", f"<={releases[0]}", *(f"!={x}" for x in inside if x not in releases)])


def requirements(releases: list[str]) -> list[str]:
    """The dependency on mlx, with its library: on Linux plain mlx has none."""
    allowed = specifier(releases)
    return [f"mlx[cpu]{allowed}; platform_system == 'Linux'", f"mlx{allowed}; platform_system == 'Darwin'"]


class Provider:
    """What pyproject.toml leaves to the build: a package depends on the releases it was built for."""

    state = "wheel"

    def build_state(self, state: str) -> None:
        self.state = state

    def get_requires_for_dynamic_metadata(self, _settings: dict[str, Any]) -> list[str]:
        releases = selected(os.environ.get("TQEXT_MLX", ""))
        # One release can be installed; the packages of the others are downloaded.
        return requirements(releases[:1]) + (["pip"] if len(releases) > 1 else [])

    def dynamic_metadata(self, _settings: dict[str, Any], _project: Any) -> dict[str, Any]:
        releases = RELEASES if self.state == "sdist" else selected(os.environ.get("TQEXT_MLX", ""))
        return {"dependencies": requirements(releases)}

    def dynamic_wheel(self, _settings: dict[str, Any]) -> dict[str, bool]:
        return {"dependencies": True}


def installed_folder() -> Path | None:
    """`mlx/` of this Python with headers and library, found without importing it."""
    spec = importlib.util.find_spec("mlx")
    for folder in (spec.submodule_search_locations if spec else None) or []:
        if (Path(folder) / "share" / "cmake" / "MLX" / "MLXConfig.cmake").exists():
            return Path(folder)
    return None


def download(version: str, cache: Path) -> Path:
    """`mlx/` of a release's package, with headers and library, from the index that pip uses."""
    folder = cache / version / "mlx"
    if (folder / "share" / "cmake" / "MLX" / "MLXConfig.cmake").exists():
        return folder
    package = "mlx-metal" if sys.platform == "darwin" else "mlx-cpu"
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as unpacked:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", unpacked]
        if subprocess.run([*command, f"{package}=={version}"], stdout=sys.stderr, check=False).returncode:
            raise SystemExit(f"cannot download {package} {version}, whose headers the build for mlx {version} needs")
        with zipfile.ZipFile(next(Path(unpacked).glob("*.whl"))) as wheel:
            wheel.extractall(Path(unpacked) / "wheel")
        folder.parent.mkdir(exist_ok=True)
        (Path(unpacked) / "wheel" / "mlx").rename(folder)
    return folder


def version_of(folder: Path) -> str:
    """The version that MLX's headers tell."""
    text = (folder / "include" / "mlx" / "version.h").read_text()
    return ".".join(re.findall(r"#define MLX_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", text))


def folders(wanted: str, folder: str, cache: Path) -> dict[str, Path]:
    """The releases' packages: `folder` (separated by semicolons) where given, else the installed one and downloads."""
    if folder:
        return {version_of(Path(x)): Path(x) for x in folder.split(";")}
    found, here = installed(), installed_folder()
    if not wanted.split() and (found is None or here is None):
        name = "mlx[cpu]" if sys.platform == "linux" else "mlx"
        raise SystemExit(f"MLX with its library is not installed in this Python: pip install '{name}=={RELEASES[0]}'")
    if not wanted.split() and found not in RELEASES:
        raise SystemExit(f"mlx {found} is installed; tqext can be built for {' '.join(RELEASES)}")
    return {x: here if x == found and here else download(x, cache) for x in selected(wanted)}


# What a release has to pass in each run of .ci/run; a new one has to pass the whole suite.
OPERATOR_TESTS = [
    f"tests/test_{x}.py"
    for x in ("format", "rotate", "quantize", "turboquant_attention", "q1_quantize", "q1_matmul", "bad_input")
]
# The kernels are one library beside every release (tqext_core), and the newest release has the whole suite. The others have
# what hands arrays over: all of the operators' tests, but of those that go through every shape only the variants with 128 in
# their name, and none that measure kernels or the theory of errors.
EVERY_SHAPE = (
    "all_bits lloyd_values dequantize_matches_reference no_decision_is_close is_quantize_keys_with block_means_at_every_length "
    "matches_float64 many_rows_of_x is_orthogonal"
)
NOT_OF_MLX = "many_tiles every_instruction_set distortion golden_file_is_what"
CHOSEN = f"not ({' or '.join(NOT_OF_MLX.split())}) and (not ({' or '.join(EVERY_SHAPE.split())}) or 128)"


def run(*command: str | Path, **environment: str) -> None:
    subprocess.run([str(x) for x in command], check=True, cwd=ROOT, env=os.environ | environment)


def build_wheel(releases: list[str], folder: Path) -> Path:
    """A wheel of this source tree for these releases."""
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ".", TQEXT_MLX=" ".join(releases))
    return next(folder.glob("*.whl"))


def test(releases: list[str], wheel: Path | None, whole: bool) -> None:
    """Installs one wheel beside each of the releases and runs the tests of the operators, or the whole suite."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        wheel = wheel or build_wheel(releases, work)
        for release in releases:
            print(f"== mlx {release}", flush=True)
            run(sys.executable, "-m", "venv", work / release)
            python = work / release / "bin" / "python"
            mlx = f"mlx[cpu]=={release}" if sys.platform == "linux" else f"mlx=={release}"
            tools = [f"{wheel}[test]"] if whole else [str(wheel), "pytest", "pytest-xdist", "hypothesis"]
            run(python, "-m", "pip", "install", "-q", mlx, *tools)
            run(python, "-m", "tqext", "doctor")
            # In one process: another one would collect the same thousands of tests to choose from.
            run(python, "-m", "pytest", "-q", *([] if whole else ["-n", "0", "-k", CHOSEN, *OPERATOR_TESTS]))


def newest() -> str:
    """The newest mlx on the index that pip uses."""
    options = ["--dry-run", "-q", "--ignore-installed", "--no-deps", "--report", "-"]
    report = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "mlx"], check=True, capture_output=True, text=True
    )
    return str(json.loads(report.stdout)["install"][0]["metadata"]["version"])


def add(version: str) -> None:
    """Puts a release into RELEASES and into the documentation's table, and runs the whole suite beside it."""
    if version in RELEASES:
        print(f"mlx {version} is supported already")
        return
    order = sorted([*RELEASES, version], key=lambda x: [int(n) for n in x.split(".")], reverse=True)
    before, after = ("".join(f'    "{x}",\n' for x in releases) for releases in (RELEASES, order))
    HERE.write_text(HERE.read_text().replace(before, after, 1))
    before, after = (f"| {', '.join(reversed(releases))} |" for releases in (RELEASES, order))
    TABLE.write_text(TABLE.read_text().replace(before, after, 1))
    # With the changed list: in a process of its own.
    run(sys.executable, HERE, "test", "--whole", version)
    print(f"mlx {version} passes: commit scripts/mlx_releases.py and docs/platforms.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list")
    command = commands.add_parser("test")
    command.add_argument("releases", nargs="*", metavar="VERSION")
    command.add_argument("--wheel", type=Path, help="this one; by default one is built")
    command.add_argument("--whole", action="store_true", help="the whole suite instead of tests of the operators")
    command = commands.add_parser("add")
    command.add_argument("version", nargs="?")
    command = commands.add_parser("folders")
    command.add_argument("--releases", default="")
    command.add_argument("--folder", default="")
    command.add_argument("--cache", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.command == "list":
        print(*RELEASES)
    elif arguments.command == "test":
        releases = selected(" ".join(arguments.releases) or "all")
        test(releases, arguments.wheel and arguments.wheel.resolve(), arguments.whole)
    elif arguments.command == "add":
        add(arguments.version or newest())
    else:
        print(*(f"{x}={y}" for x, y in folders(arguments.releases, arguments.folder, arguments.cache).items()), sep=";")


if __name__ == "__main__":
    main()

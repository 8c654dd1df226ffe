"""One package for several releases of MLX: what is built, what is depended on, what is loaded, and what is said.

`scripts/mlx_releases.py test` installs one wheel beside each release and runs tests of the operators there; `.ci/run` does so.
"""

import importlib.metadata
import importlib.util
import re
import shutil
import sys
import tomllib
from pathlib import Path

import mlx.core as mx
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import tqext
from tqext import _build_info, _load

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "mlx_releases.py"


TABLE = ROOT / "docs" / "platforms.md"


def listed_in(table):
    """The releases of MLX in the documentation's table of versions, the newest first."""
    version = tqext.__version__.rpartition(".")[0]
    row = next(x for x in table.read_text().splitlines() if x.startswith(f"| {version} |"))
    return row.split("|")[2].strip().split(", ")[::-1]


def load(script, name="mlx_releases"):
    spec = importlib.util.spec_from_file_location(name, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def releases(monkeypatch):
    module = load(SCRIPT)
    monkeypatch.setattr(module, "RELEASES", ["0.32.10", "0.32.4", "0.32.3", "0.31.2"])
    return module


def test_the_extension_is_that_of_the_installed_mlx():
    assert mx.__version__ in _build_info.MLX_RELEASES
    assert f"_ext_mlx_{mx.__version__.replace('.', '_')}." in Path(tqext._ext.__file__).name
    assert sys.modules["tqext._ext"] is tqext._ext


def test_the_installed_package_depends_on_the_releases_that_it_was_built_for():
    assert _build_info.MLX_SUPPORTED == load(SCRIPT).RELEASES
    wanted = [Requirement(x) for x in importlib.metadata.requires("tqext")]
    on_mlx = [x for x in wanted if x.name == "mlx" and x.marker.evaluate({"extra": ""})]
    assert len(on_mlx) == 1
    allowed = [x for x in _build_info.MLX_SUPPORTED if x in on_mlx[0].specifier]
    assert allowed == _build_info.MLX_RELEASES


def test_the_core_knows_nothing_of_mlx():
    folder = Path(tqext._ext.__file__).parent
    core = next(folder.glob("libtqext_core.*")).read_bytes()
    assert b"tqext3cpu" in core  # its own functions are found in this way
    assert b"mlx4core" not in core
    assert b"mlx4core" in Path(tqext._ext.__file__).read_bytes()


def test_only_one_header_asks_for_the_version_of_mlx():
    sources = [x for folder in ("csrc", "cuda", "metal") for x in (ROOT / folder).rglob("*") if x.suffix in {".h", ".cpp"}]
    asking = {x.name for x in sources if re.search(r"MLX_VERSION_|mlx/version\.h", x.read_text())}
    assert asking == {"mlx_compat.h"}


def test_the_version_stands_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" in project["dynamic"]
    assert "version" not in project
    assert importlib.metadata.version("tqext") == tqext.__version__


@pytest.mark.parametrize("installed", ["0.32.4", "0.32.3"])
def test_choose_takes_the_release_that_is_installed(installed):
    assert _load.choose(["0.32.4", "0.32.3"], ["0.32.4", "0.32.3"], installed) == installed


CHOICES = {
    "supported, not built": (
        ["0.32.4"],
        "0.32.3",
        "tqext was built for mlx 0.32.4, found 0.32.3",
        "`TQEXT_MLX=0.32.3 pip install .`",
    ),
    "unknown": (["0.32.4", "0.32.3"], "0.40.0", "tqext was built for mlx 0.32.3 and 0.32.4, found 0.40.0", "a newer tqext"),
    "older": (["0.32.4", "0.32.3"], "0.32.2", "tqext was built for mlx 0.32.3 and 0.32.4, found 0.32.2", "pip install"),
    "none": (["0.32.4", "0.32.3"], None, "tqext was built for mlx 0.32.3 and 0.32.4, found none", "pip install"),
    "three": (["0.32.5", "0.32.4", "0.32.3"], "1.0", "for mlx 0.32.3, 0.32.4 and 0.32.5, found 1.0", "a newer tqext"),
}


@pytest.mark.parametrize("case", CHOICES)
def test_choose_names_the_remedy_in_one_sentence(case):
    built, installed, start, remedy = CHOICES[case]
    with pytest.raises(ImportError) as error:
        _load.choose(built, ["0.32.5", "0.32.4", "0.32.3"], installed)
    text = str(error.value)
    assert start in text
    assert remedy in text
    assert f"=={built[0]}" in text
    assert len(text.splitlines()) == 1
    assert ("a newer tqext" in text) == (case in ("unknown", "three"))
    assert ("TQEXT_MLX" in text) == (case == "supported, not built")


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has one library of MLX")
@pytest.mark.parametrize(("package", "extra"), [("mlx-cuda-13", "cuda13"), ("mlx-cuda-12", "cuda12"), (None, "cpu")])
def test_the_remedy_keeps_the_kind_of_library(monkeypatch, package, extra):
    monkeypatch.setattr(_load, "_installed", lambda name: "0.32.3" if name == package else None)
    with pytest.raises(ImportError, match=re.escape(f"pip install 'mlx[{extra}]==0.32.4'")):
        _load.choose(["0.32.4"], ["0.32.4"], "0.32.3")


def test_a_missing_extension_file_is_an_import_error(tmp_path):
    before = tqext._ext
    with pytest.raises(ImportError, match="no _ext_mlx_0_0_0 in "):
        _load._import_extension(tmp_path, "0.0.0")
    assert sys.modules["tqext._ext"] is tqext._ext is before


SELECTIONS = {
    "all": ["0.32.10", "0.32.4", "0.32.3", "0.31.2"],
    "0.32.3": ["0.32.3"],
    "0.32.3 0.32.10": ["0.32.10", "0.32.3"],
    " 0.31.2  0.32.4 ": ["0.32.4", "0.31.2"],
}


@pytest.mark.parametrize("wanted", SELECTIONS)
def test_selected_and_specifier(releases, wanted):
    chosen = releases.selected(wanted)
    assert chosen == SELECTIONS[wanted]
    # The specifier allows these of all that are supported, and none that is not known.
    allowed = SpecifierSet(releases.specifier(chosen))
    assert [x for x in releases.RELEASES if x in allowed] == chosen
    assert not [x for x in ("0.31.1", "0.32.11", "0.33.0") if x in allowed]
    assert all(str(Requirement(x).specifier) == str(allowed) for x in releases.requirements(chosen))


@pytest.mark.parametrize(("installed", "chosen"), [("0.32.3", ["0.32.3"]), ("0.30.0", ["0.32.10"]), (None, ["0.32.10"])])
def test_without_a_wish_the_installed_release_is_selected_or_the_newest(releases, monkeypatch, installed, chosen):
    monkeypatch.setattr(releases, "installed", lambda: installed)
    assert releases.selected("") == chosen


@pytest.mark.parametrize("wanted", ["0.32.9", "newest", "all 0.32.4"])
def test_an_unknown_release_is_refused(releases, wanted):
    with pytest.raises(SystemExit, match=r"expected all, or releases among 0\.32\.10 0\.32\.4 0\.32\.3 0\.31\.2, got"):
        releases.selected(wanted)


def test_the_build_asks_for_one_release_and_for_pip_where_others_are_downloaded(releases, monkeypatch):
    provider = releases.Provider()
    monkeypatch.setenv("TQEXT_MLX", "0.32.3 0.32.4")
    assert provider.get_requires_for_dynamic_metadata({}) == [*releases.requirements(["0.32.4"]), "pip"]
    assert provider.dynamic_metadata({}, {})["dependencies"] == releases.requirements(["0.32.4", "0.32.3"])
    monkeypatch.setenv("TQEXT_MLX", "0.32.3")
    assert provider.get_requires_for_dynamic_metadata({}) == releases.requirements(["0.32.3"])
    provider.build_state("sdist")
    assert provider.dynamic_metadata({}, {})["dependencies"] == releases.requirements(releases.RELEASES)


def test_folders_takes_the_installed_package_and_downloads_the_others(releases, monkeypatch, tmp_path):
    monkeypatch.setattr(releases, "installed", lambda: "0.32.4")
    monkeypatch.setattr(releases, "installed_folder", lambda: tmp_path / "here")
    monkeypatch.setattr(releases, "download", lambda version, cache: cache / version)
    assert releases.folders("", "", tmp_path) == {"0.32.4": tmp_path / "here"}
    assert releases.folders("0.32.4 0.32.3", "", tmp_path) == {"0.32.4": tmp_path / "here", "0.32.3": tmp_path / "0.32.3"}
    monkeypatch.setattr(releases, "installed", lambda: "0.33.0")
    with pytest.raises(SystemExit, match="is installed; tqext can be built for"):
        releases.folders("", "", tmp_path)
    assert releases.folders("0.32.3", "", tmp_path) == {"0.32.3": tmp_path / "0.32.3"}


def test_the_headers_tell_their_version():
    module = load(SCRIPT)
    assert module.version_of(module.installed_folder()) == mx.__version__


@pytest.mark.parametrize(("version", "place"), [("0.99.1", 0), ("0.1.0", -1)])
def test_add_puts_a_release_in_its_place_and_runs_the_suite(tmp_path, monkeypatch, version, place):
    for file in (SCRIPT, TABLE):
        (tmp_path / file.relative_to(ROOT)).parent.mkdir()
        shutil.copy(file, tmp_path / file.relative_to(ROOT))
    copy, table = tmp_path / SCRIPT.relative_to(ROOT), tmp_path / TABLE.relative_to(ROOT)
    module = load(copy, "copy")
    before, calls = list(module.RELEASES), []
    monkeypatch.setattr(module, "run", lambda *command, **_: calls.append(command))
    module.add(before[0])
    assert not calls
    module.add(version)
    assert calls == [(sys.executable, copy, "test", "--whole", version)]
    after = load(copy, "after").RELEASES
    assert after[place] == version
    assert [x for x in after if x != version] == before
    assert listed_in(table) == after


def test_release_wheels_are_for_all_releases():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    # A platform's table takes the place of the general one.
    assert settings["environment"]["TQEXT_MLX"] == settings["macos"]["environment"]["TQEXT_MLX"] == "all"
    assert "environment" not in settings["linux"]


def test_the_table_names_the_supported_releases():
    assert listed_in(TABLE) == load(SCRIPT).RELEASES

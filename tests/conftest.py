import os
import random
import signal
from collections import Counter

# MLX multiplies fp32 matrices in TF32 on NVIDIA GPUs: too coarse for a test of fp32.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
# OpenBLAS would start a thread per core in every worker, and in each of the reference's own.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")

import mlx.core as mx
import numpy as np
import pytest

import tqext
from covering import left_out
from locking import locked
from tqext import calibration, models, one_bit

HAS_GPU = mx.is_available(mx.gpu)

# A shell without job control has commands in the background ignore SIGINT, and so would the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """The whole suite runs in two processes, file by file; parts of it run in this one, and so does all with ``-n 0``."""
    options = config.option
    whole = config.args_source is config.ArgsSource.TESTPATHS and not hasattr(config, "workerinput")
    if whole and not options.usepdb and getattr(options, "numprocesses", 0) is None:
        options.numprocesses, options.dist = 2, "loadfile"
        options.loadscopereorder = False  # in the order of their names, the last files are short ones


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    """The MLX default device of the test: the CPU, and the GPU where there is one."""
    if request.param == "gpu" and not HAS_GPU:
        pytest.fail("this machine has no GPU that MLX can use")
    before = mx.default_device()
    mx.set_default_device(getattr(mx, request.param))
    yield request.param
    mx.set_default_device(before)


@pytest.fixture
def no_kept_calibration(monkeypatch, tmp_path):
    """No calibration is kept from before."""
    monkeypatch.setattr(calibration, "folder", lambda: tmp_path / "calibration")
    calibration._kept.clear()
    yield
    calibration._kept.clear()


@pytest.hookimpl(trylast=True)  # of what -k and -m leave
def pytest_collection_modifyitems(config, items):
    gone = left_out(items)
    # Without a GPU its variants are not tests of this machine; asked for by name they fail (see `device`).
    if not HAS_GPU and not config.getoption("-m"):
        gone |= {item for item in items if item.get_closest_marker("gpu")}
    config.hook.pytest_deselected(items=[item for item in items if item in gone])
    items[:] = [item for item in items if item not in gone]


def pytest_report_teststatus(report):
    """No letter for a skipped test: without the optional tools there are hundreds. `pytest_terminal_summary` counts them."""
    if report.skipped and not hasattr(report, "wasxfail"):
        return "skipped", "", ("SKIPPED", {"yellow": True})
    return None


def pytest_terminal_summary(terminalreporter):
    """One line for every module."""
    modules = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        modules.setdefault(report.nodeid.partition("::")[0], Counter())[reason.removeprefix("Skipped: ")] += 1
    for module, reasons in sorted(modules.items()):
        terminalreporter.write_line(f"{module}: {reasons.total()} skipped ({'; '.join(reasons)})")


@pytest.fixture(scope="session")
def small_model():
    """The folder of the small real model. The first of the workers that wants it makes it, the others wait."""
    models.cache_dir().mkdir(parents=True, exist_ok=True)
    with locked(models.cache_dir() / "smollm2.lock"):
        return models.resolve("smollm2")


@pytest.fixture
def uninstalled():
    """No hook of other tests is there, and none of the test's is left behind."""
    one_bit.unhook()
    tqext.uninstall()
    yield
    tqext.uninstall()


@pytest.fixture(autouse=True)
def seed(request):
    """The same random numbers in every run, and alone as in company."""
    value = sum(request.node.name.encode()) % 2**31
    random.seed(value)
    np.random.seed(value)
    mx.random.seed(value)
    return value


@pytest.fixture
def rng(seed):
    return np.random.default_rng(seed)

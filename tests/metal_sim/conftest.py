import os
import platform
import zlib

import metal_ops
import metal_simulator as sim
import pytest

from support import tool

# The simulator switches threads in x86-64 assembly; on a Mac the operator tests use the real GPU.
if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
    collect_ignore_glob = ["test_*.py"]

SCHEDULES = [sim.IN_ORDER, sim.REVERSE, sim.RANDOM]


def pytest_collection_modifyitems(config, items):
    """Leaves out parameter sets of the shared operator tests that have no kernel, or a kernel another set runs too.

    TQEXT_METAL_SIM=full keeps every set that has a kernel (some ten minutes of one processor instead of two).
    """
    full = os.environ.get("TQEXT_METAL_SIM") == "full"
    dropped = []
    for item in items:
        selection = getattr(getattr(item, "module", None), "SELECTION", None)
        if selection is None or not hasattr(item, "callspec"):
            continue
        has_kernel, is_default = selection(item.originalname, item.callspec.params)
        if not (has_kernel and (full or is_default)):
            dropped.append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        gone = set(dropped)
        items[:] = [item for item in items if item not in gone]


@pytest.fixture(scope="session", autouse=True)
def clang():
    """The compiler that the simulator needs."""
    return tool(sim.CLANG)


@pytest.fixture(scope="session")
def checked():
    """A simulated GPU whose checker raises on the first report."""
    return metal_ops.Device("check")


@pytest.fixture(scope="session")
def fast():
    return metal_ops.Device("fast")


@pytest.fixture
def scheduled(checked, request):
    """The checked device with a schedule of threads and a number of cores that the test's name decides.

    One core: simdgroups have several tiles each, so that loops carry state.
    """
    number = zlib.crc32(request.node.name.encode())
    checked.schedule, checked.seed, checked.n_cores = SCHEDULES[number % 3], number, (1, 10)[number // 3 % 2]
    checked.reset()
    yield checked
    checked.schedule, checked.n_cores = sim.IN_ORDER, 10

import platform
import zlib

import metal_ops
import metal_simulator as sim
import pytest

from covering import FULL
from support import tool

# The simulator switches threads in x86-64 assembly; on a Mac the operator tests use the real GPU.
if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
    collect_ignore_glob = ["test_*.py"]

SCHEDULES = [sim.IN_ORDER, sim.REVERSE, sim.RANDOM]


# In the names of tests that have a bug for a parameter, or the shape that shows it.
MUTATIONS = ("mutation_of", "unmutated", "is_caught")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Leaves out parameter sets of the shared operator tests that have no kernel, or a kernel another set runs too.

    A call on the simulator takes up to a second, so every test here is one whose parameters are covered (covering.py), and of
    the mutations about a quarter runs by default. TQEXT_TESTS=full keeps every set that has a kernel, and every mutation.
    """
    dropped = []
    for item in items:
        if not hasattr(item, "callspec") or not item.module.__name__.startswith("test_metal"):
            continue
        selection = getattr(item.module, "SELECTION", None)
        has_kernel, is_default = (True, True) if selection is None else selection(item.originalname, item.callspec.params)
        if not (has_kernel and (FULL or is_default)):
            dropped.append(item)
        elif any(part in item.originalname for part in MUTATIONS):
            item.add_marker(pytest.mark.covering(share=4), append=False)
        else:
            item.add_marker(pytest.mark.covering(by="parameter"), append=False)
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


@pytest.fixture(scope="session")
def reporting():
    """The same for short calls whose counters nobody looks at: half of their time would be the compiler's."""
    return metal_ops.Device("check" if FULL else "report")


@pytest.fixture
def scheduled(request):
    """A device that reports, with a schedule of threads and a number of cores that the test's name decides.

    One core: simdgroups have several tiles each, so that loops carry state.
    """
    # Many rows: the kernels run for longer than the compiler does.
    long = request.module.__name__ in ("test_metal_prompts", "test_metal_q1")
    device = request.getfixturevalue("checked" if long else "reporting")
    number = zlib.crc32(request.node.name.encode())
    device.schedule, device.seed, device.n_cores = SCHEDULES[number % 3], number, (1, 10)[number // 3 % 2]
    device.reset()
    yield device
    device.schedule, device.n_cores = sim.IN_ORDER, 10


@pytest.fixture
def mutant():
    """A device of its own for edited kernels. One core: what goes wrong between a simdgroup's tiles shows."""
    return metal_ops.Device("check" if FULL else "report", n_cores=1)

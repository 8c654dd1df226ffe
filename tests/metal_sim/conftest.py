import platform
import zlib

import metal_ops
import metal_simulator as sim
import pytest

from support import FULL, tool

# The simulator switches threads in x86-64 assembly; on a Mac the operator tests use the real GPU.
if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
    collect_ignore_glob = ["test_*.py"]

SCHEDULES = [sim.IN_ORDER, sim.REVERSE, sim.RANDOM]


def pytest_collection_modifyitems(config, items):
    """Leaves out parameter sets of the shared operator tests that have no kernel, or a kernel another set runs too.

    Of the mutations about a quarter runs by default, and a third of the parameter sets where a test has more than four: a call
    on the simulator takes up to a second. TQEXT_TESTS=full keeps every set that has a kernel, and every mutation.
    """
    dropped, kept = [], {}
    for item in items:
        if not hasattr(item, "callspec") or not hasattr(item, "originalname"):
            continue
        selection = getattr(getattr(item, "module", None), "SELECTION", None)
        has_kernel, is_default = (True, True) if selection is None else selection(item.originalname, item.callspec.params)
        if not (has_kernel and (FULL or is_default)):
            dropped.append(item)
        else:
            kept.setdefault((item.module, item.originalname), []).append(item)
    for (module, name), sets in () if FULL else kept.items():
        if not module.__name__.startswith("test_metal") or len(sets) <= 4:
            continue
        share = 4 if "mutation_of" in name else 3
        # By a number of their names: evenly spaced ones could all have the same value of an inner parameter.
        chosen = {sets[0], sets[-1], *(item for item in sets if zlib.crc32(item.callspec.id.encode()) % share == 0)}
        dropped += [item for item in sets if item not in chosen]
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


@pytest.fixture
def mutant():
    """A checked device of its own for edited kernels. One core: what goes wrong between a simdgroup's tiles shows."""
    return metal_ops.Device("check", n_cores=1)

"""Which sets of parameters of a test run: all with TQEXT_TESTS=full, by default of some tests a choice that covers them.

A test with several ``parametrize`` decorators runs their product. Marked ``@pytest.mark.covering`` it runs by default with a
few sets that hold every value of every decorator: each value is seen at every landing, and each combination every night.
``covering(pairs=True)`` keeps every pair of values; ``covering(by="parameter")`` takes the parameters of one decorator apart.
``covering(share=4)`` is for many values of one parameter, each long: about one in four of them, by a number of its name.
"""

import collections
import itertools
import os
import zlib

# Every parameter set, also those that take longer than they are worth each time.
FULL = os.environ.get("TQEXT_TESTS") == "full"


def covering(sets, strength=1):
    """The places of few of these sets that hold every value of every axis; with strength 2, every pair of values there is.

    A set is a sequence of hashable values, one for each axis. The choice is always the same: the set with the most that is
    new; of equals the one whose values were taken least, so that an axis of few values changes with a longer one; the first.
    """

    def parts(values):
        axes = itertools.combinations(range(len(values)), min(strength, len(values)))
        return {(chosen, tuple(values[axis] for axis in chosen)) for chosen in axes}

    left = {place: parts(values) for place, values in enumerate(sets)}
    wanted, chosen, taken = set().union(*left.values()), [], collections.Counter()

    def worth(place):
        return len(left[place] & wanted), -sum(taken[axis, value] for axis, value in enumerate(sets[place]))

    while wanted:
        best = max(left, key=worth)
        wanted -= left.pop(best)
        chosen.append(best)
        taken.update(enumerate(sets[best]))
    return sorted(chosen)


def axes_of(item, by_parameter):
    """A value for each axis of the test's parameters: its decorators, and the fixtures that have parameters."""
    values = {name: repr(value) for name, value in item.callspec.params.items()}
    if by_parameter:
        return tuple(values.values())
    axes = []
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0] if mark.args else mark.kwargs["argnames"]
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
        axes.append(tuple(values.pop(name, None) for name in names))
    return (*axes, *values.values())


def left_out(items):
    """Of these tests those that do not run by default. What runs on a GPU is never left out: few machines have one."""
    groups = {}
    for item in items:
        mark = item.get_closest_marker("covering")
        if mark and hasattr(item, "callspec") and not item.get_closest_marker("gpu"):
            groups.setdefault((item.module, item.cls, item.originalname), []).append((item, mark.kwargs))
    gone = set()
    for group in () if FULL else groups.values():
        options = group[0][1]
        if share := options.get("share"):
            # By a number of their names: evenly spaced ones could all be of one kind. Of a few, all.
            kept = {place for place, (item, _) in enumerate(group) if zlib.crc32(item.callspec.id.encode()) % share == 0}
            kept = kept | {0, len(group) - 1} if len(group) > 4 else set(range(len(group)))
        else:
            sets = [axes_of(item, options.get("by") == "parameter") for item, _ in group]
            kept = set(covering(sets, 2 if options.get("pairs") else 1))
        gone |= {item for place, (item, _) in enumerate(group) if place not in kept}
    return gone

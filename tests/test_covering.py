"""The choice of parameter sets that runs by default (covering.py)."""

import itertools

import pytest

from covering import FULL, covering

PRODUCT = list(itertools.product("abcd", range(5), (True, False)))
seen, seen_pairs, seen_parameters, seen_of_many = [], [], [], []


def combinations(sets, strength):
    return {
        (axes, tuple(values[axis] for axis in axes))
        for values in sets
        for axes in itertools.combinations(range(len(values)), strength)
    }


@pytest.mark.parametrize("strength, most", [(1, 5), (2, 24), (3, 40)])
def test_covering_keeps_every_combination_of_so_many_values(strength, most):
    kept = [PRODUCT[place] for place in covering(PRODUCT, strength)]
    assert combinations(kept, strength) == combinations(PRODUCT, strength)
    assert len(kept) <= most


def test_covering_of_sets_with_holes():
    """Not every product is whole: some sets have no kernel."""
    sets = [values for values in PRODUCT if values[:2] != ("a", 0) and (values[0] != "d" or values[1:] == (4, False))]
    kept = [sets[place] for place in covering(sets)]
    assert ("d", 4, False) in kept
    assert combinations(kept, 1) == combinations(sets, 1)


def test_covering_changes_a_short_axis_with_a_long_one():
    chosen = covering(list(itertools.product(range(10), "ab")))
    assert [place % 2 for place in chosen].count(0) == 5


def test_covering_of_one_axis_and_of_nothing():
    assert covering([(1,), (2,), (1,), (3,)]) == [0, 1, 3]
    assert covering([]) == []


@pytest.mark.covering
@pytest.mark.parametrize("x, y", [(0, 0), (0, 1), (7, 7)])
@pytest.mark.parametrize("z", "abcd")
def test_product_that_is_covered(x, y, z):
    seen.append((x, y, z))


@pytest.mark.covering(pairs=True)
@pytest.mark.parametrize("x", range(2))
@pytest.mark.parametrize("y", range(2))
@pytest.mark.parametrize("z", range(2))
def test_product_whose_pairs_are_covered(x, y, z):
    seen_pairs.append((x, y, z))


@pytest.mark.covering(by="parameter")
@pytest.mark.parametrize("x, y", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_parameters_of_one_decorator_that_are_covered(x, y):
    seen_parameters.append((x, y))


@pytest.mark.covering(share=3)
@pytest.mark.parametrize("x", range(40))
def test_one_parameter_with_many_values(x):
    seen_of_many.append(x)


def test_what_ran_is_a_choice_or_everything():
    """The tests above, as pytest took them."""
    if not seen:
        pytest.skip("the tests above did not run")
    assert len(seen) == len(set(seen)) == (12 if FULL else 4)
    assert {(x, y) for x, y, _ in seen} == {(0, 0), (0, 1), (7, 7)}
    assert {z for *_, z in seen} == set("abcd")
    assert len(seen_pairs) == 8 if FULL else 4 <= len(seen_pairs) < 8
    assert combinations(seen_pairs, 2) == combinations(itertools.product(range(2), repeat=3), 2)
    assert len(seen_parameters) == 4 if FULL else len(seen_parameters) == 2
    assert len(seen_of_many) == 40 if FULL else 8 <= len(seen_of_many) <= 20

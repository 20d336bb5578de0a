"""A covering sample of a product holds every pair of values, in few combinations."""

import itertools

import pytest

from tests.covering import covering

PRODUCT = list(itertools.product(range(5), range(4), range(3), range(2)))


@pytest.mark.parametrize(("strength", "most"), [(1, 5), (2, 24)])
def test_a_sample_holds_all_meetings_and_is_small(strength, most):
    chosen = [PRODUCT[i] for i in covering(PRODUCT, strength)]
    for axes in itertools.combinations(range(4), strength):
        assert {tuple(c[a] for a in axes) for c in chosen} == {tuple(c[a] for a in axes) for c in PRODUCT}
    assert len(chosen) <= most


def test_of_one_parameter_all_values_are_held():
    assert covering([(0,), (1,), (2,)], 2) == [0, 1, 2]

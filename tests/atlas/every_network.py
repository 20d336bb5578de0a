"""Every network against the loop, which takes minutes: ``make atlas``. ``make test`` compares a sample."""

import pytest

from tests.atlas.registry import load
from tests.atlas.sample import sample, uncovered
from tests.atlas.test_atlas import check_network


@pytest.mark.parametrize("name", load())
@pytest.mark.filterwarnings("ignore")
def test_equals_the_loop(name):
    check_network(name)


@pytest.mark.filterwarnings("ignore")
def test_the_sample_calls_what_all_networks_call():
    assert len(uncovered([])) > 20
    assert not uncovered(sample()), "add these to COVER"

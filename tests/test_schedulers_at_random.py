"""A sample of random settings of schedulers; ``python -m tests.schedulers_at_random --draws 4000`` is the whole."""

import pytest

from tests import schedulers_at_random

KNOWN = {"ends in the data", "within rounding", "refused", "no scheduler"}


@pytest.mark.parametrize("block", range(3))
def test_every_setting_is_read_as_its_step_means_it_or_refused(block):
    found = [schedulers_at_random.verdict(seed) for seed in range(40 * block, 40 * block + 40)]
    assert set(found) <= KNOWN
    assert found.count("ends in the data") > 0.6 * len(found)


def test_what_is_read_wrongly_is_seen():
    """Runs of networks that give the data's noise, whatever their scheduler takes an output for."""
    found = [schedulers_at_random.verdict(seed, kind="score") for seed in range(40)]
    assert sum(outcome not in KNOWN for outcome in found) > 0.5 * len(found)

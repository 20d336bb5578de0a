"""Random networks, random assignments: each row is its member's. ``python -m tests.fuzz.assigned`` runs many more."""

import pytest

import fastens
from tests.fuzz import assigned


@pytest.mark.parametrize("group", range(6))
def test_each_row_is_what_the_loop_gives(group):
    for seed in range(group * 10, group * 10 + 10):
        assert assigned.outcome(seed)


def test_rows_of_other_members_are_found(monkeypatch):
    """Were the check blind, the test above could not fail."""
    enter, faults = fastens.Ensemble.assigned, 0
    monkeypatch.setattr(
        fastens.Ensemble, "assigned", lambda self, members, **scope: enter(self, members[::-1], **scope)
    )
    for seed in range(20):
        try:
            assigned.outcome(seed)
        except AssertionError:
            faults += 1
    assert faults

"""Random graphs of operations: each answer is the loop's. ``python -m tests.fuzz.graphs`` runs many more."""

import pytest

from tests.fuzz import graphs, plain


@pytest.mark.parametrize("group", range(12))
def test_plans_of_graphs_answer_as_the_loop(group):
    found = [graphs.outcome(seed) for seed in range(group * 10, group * 10 + 10)]
    assert found.count("fold, planned") >= 7, found


class FirstTwice(plain.PlainLoop):
    """The first member in the place of the last."""

    def evaluate(self, args, kwargs):
        found = super().evaluate(args, kwargs)
        return [*found[:-1], found[0]]


def test_what_is_another_is_told():
    """Were the check blind, or too strict, the test above would say nothing."""
    assert {graphs.outcome(seed, plain.PlainLoop) for seed in range(10)} == {"loop, no plan"}
    faults = 0
    for seed in range(10):
        try:
            graphs.outcome(seed, FirstTwice)
        except AssertionError:
            faults += 1
    assert faults >= 3

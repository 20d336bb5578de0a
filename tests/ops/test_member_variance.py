"""The public function of the variance over members."""

import pytest
import torch

from fastens.ops.member_variance import member_variance
from tests.tolerances import OP, relative_error


@pytest.mark.parametrize("num_members", [1, 2, 5])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_is_the_variance_over_members(num_members, backend):
    scores = torch.randn(num_members, 3, 4, dtype=torch.double)
    for given in (scores, list(scores)):
        expected = scores.var(0, correction=0)
        assert relative_error(member_variance(given, backend=backend), expected) <= OP[torch.double]


def test_does_not_cancel():
    scores = torch.tensor([1e4, 1e4 + 1, 1e4 + 2]).view(3, 1)
    assert abs(member_variance(scores).item() - 2 / 3) < 1e-6


def test_bad_input():
    with pytest.raises(ValueError, match="no members"):
        member_variance([])
    with pytest.raises(ValueError, match="unknown backend"):
        member_variance(torch.zeros(2, 3), backend="gpu")

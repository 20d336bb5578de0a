"""Members that hold ensembles themselves."""

import pytest
import torch
from torch import nn

import fastens
from tests.networks import mlp
from tests.tolerances import NETWORK, relative_error


class Holding(nn.Module):
    """A network that holds an ensemble."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = fastens.Ensemble([mlp(), mlp()]), nn.Linear(5, 4)

    def forward(self, x):
        """The ensemble's answer, and a layer."""
        return self.last(self.inner(x))


@pytest.mark.parametrize("num_members", [1, 3])
def test_members_that_hold_ensembles_are_looped_and_told(num_members):
    members, x = [Holding() for _ in range(num_members)], torch.randn(2, 5)
    with pytest.warns(UserWarning, match="inner is an ensemble itself"):
        ensemble = fastens.Ensemble(members)
    assert "make one ensemble of them" in ensemble.report().why
    assert relative_error(ensemble(x), torch.stack([each(x) for each in members]).mean(0)) < NETWORK[torch.float32]
    with pytest.raises(ValueError, match="inner is an ensemble itself"):
        fastens.MCDropout(members[0], 3, p=0.5)

"""Fresh dropout masks are drawn anew in each evaluation of whatever kind, one evaluation a call."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastens
from fastens.training import member_forward


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.drop, self.last = nn.Linear(4, 32), nn.Dropout(0.5), nn.Linear(32, 4)

    def forward(self, x):
        return self.last(self.drop(F.silu(self.first(x))))

    def twice(self, x):
        return 2 * self.forward(x)


WAYS = {
    "forward": lambda ensemble, x: ensemble(x),
    "member_outputs": lambda ensemble, x: ensemble.member_outputs(x),
    "method": lambda ensemble, x: ensemble.twice(x),
    "own rows": lambda ensemble, x: member_forward(ensemble, torch.stack([x, x + 1, x + 2])),
    "assigned": lambda ensemble, x: _assigned(ensemble, x),
}


def _assigned(ensemble, x):
    with ensemble.assigned([0, 1, 2, 0, 1]):
        return ensemble(x)


CASES = [(way, rule) for way in WAYS for rule in ("mean", "alternating")]
REFUSED = [("method", "alternating"), ("assigned", "alternating")]  # which are of calls of forward, and of a trajectory


@pytest.mark.parametrize(("way", "rule"), [case for case in CASES if case not in REFUSED])
def test_every_evaluation_has_masks_of_its_own(way, rule):
    ensemble, x = fastens.MCDropout(Dropping(), 3, rule, masks="fresh"), torch.randn(5, 4)
    with torch.no_grad():
        assert not torch.equal(WAYS[way](ensemble, x), WAYS[way](ensemble, x))
        runs = []
        for _ in range(2):
            with ensemble.trajectory(5, 0):
                runs.append([WAYS[way](ensemble, x) for _ in range(3)])
        with ensemble.trajectory(5, 0):  # one call is one evaluation, of whatever kind
            ensemble(x)
            WAYS[way](ensemble, x)
            third = WAYS[way](ensemble, x)
    assert all(map(torch.equal, *runs))
    assert not torch.equal(runs[0][0], runs[0][1])
    assert torch.equal(third, runs[0][2])

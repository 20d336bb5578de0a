"""The passes over launches: each keeps what the plan computes, and says what it rewrites."""

import pytest
import torch
from torch import nn

import fastens
from fastens.engine import planned
from fastens.plan.gpu import pipeline
from fastens.plan.gpu.passes.moments import skip_joins
from tests.fold.test_launch_counts import Network
from tests.networks import randomised
from tests.tolerances import NETWORK, OP, relative_error

# what skip_joins leaves to be placed is no launch before place_moments
WHOLE = [n for n in range(len(pipeline.PASSES) + 1) if n == 0 or pipeline.PASSES[n - 1] is not skip_joins]


@pytest.fixture(autouse=True)
def _launches(monkeypatch):
    monkeypatch.setattr(planned, "launches_on", lambda _: True)


@pytest.mark.parametrize("count", WHOLE)
def test_the_first_passes_alone_give_what_the_members_give(count, monkeypatch):
    monkeypatch.setattr(pipeline, "PASSES", pipeline.PASSES[:count])
    members = [randomised(lambda: Network(True, attention=True, skip=True), seed) for seed in range(2)]
    ensemble = fastens.Ensemble(members, engine="fold")
    x, t = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3)), torch.tensor([0.4])
    with torch.no_grad():
        expected = torch.stack([member(x, t) for member in members])
        outputs = [ensemble.member_outputs(x, t) for _ in range(2)]
    assert ensemble.report().plans, ensemble.report().why_no_plan
    for output in outputs:
        assert relative_error(output, expected) < NETWORK[torch.float32]


@pytest.mark.parametrize("rewriting", dict.fromkeys(pipeline.PASSES), ids=lambda rewriting: rewriting.__name__)
def test_a_pass_says_what_it_rewrites(rewriting):
    assert "  ->  " in rewriting.__doc__


class InDtypes(nn.Module):
    """Layers of one input in several dtypes."""

    def __init__(self, dtypes):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8).to(dtype) for dtype in dtypes)

    def forward(self, x):
        h = self.first(x)
        return torch.cat([layer(h.to(layer.weight.dtype)).float().tanh() for layer in self.layers], -1)


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32, torch.float16, torch.float32)], ids=str
)
def test_layers_of_several_dtypes_are_no_group(dtypes):
    torch.manual_seed(0)
    members = [InDtypes(dtypes).eval() for _ in range(2)]
    ensemble, x = fastens.Ensemble(members, engine="fold"), torch.randn(3, 8)
    with torch.no_grad():
        expected = torch.stack([member(x) for member in members])
        for _ in range(2):
            assert relative_error(ensemble.member_outputs(x), expected) < OP[torch.bfloat16]
    assert ensemble.report().plans, ensemble.report().why_no_plan

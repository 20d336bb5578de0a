"""The passes over launches: each keeps what the plan computes, and says what it rewrites."""

import pytest
import torch

import fastens
from fastens.engine import planned
from fastens.plan.gpu import pipeline
from fastens.plan.gpu.passes.moments import skip_joins
from tests.fold.test_launch_counts import Network
from tests.networks import randomised
from tests.tolerances import NETWORK, relative_error

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

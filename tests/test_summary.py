"""What an ensemble prints of itself."""

import re

import pytest
import torch
from torch import nn

import fastens
from fastens.ops.run_program import available
from tests.networks import mlp, randomised

planned = pytest.mark.skipif(not available(), reason="no compiled library")


def lines(ens):
    return repr(ens).splitlines()


def ensemble(**options):
    return fastens.Ensemble([randomised(mlp, k) for k in range(3)], **options)


@planned
def test_members_rule_engine_dtype_device_plans_and_network():
    ens, x = ensemble(rule=fastens.rules.Median("lower")), torch.randn(4, 5)
    head = "  3 members, rule=Median(even='lower'), engine='fold', torch.float32 on cpu"
    with torch.no_grad():
        assert lines(ens)[:3] == ["Ensemble(", head, "  no plan yet: the first call under torch.no_grad() makes one"]
        ens(x)
    assert lines(ens)[:3] == ["Ensemble(", head, "  1 plan"]
    assert "  (network): Sequential(" in lines(ens)
    assert any("Linear(in_features=5" in line for line in lines(ens))
    with torch.no_grad():
        ens(x[:2])
    assert lines(ens)[2] == "  2 plans"
    ens(x[:3])
    assert lines(ens)[2].startswith("  2 plans; the last call without one: gradients are enabled")


class Reading(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.net = randomised(mlp, seed)

    def forward(self, x):
        return self.net(x) if float(x.sum()) > 0 else -self.net(x)


class Random(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.net = randomised(mlp, seed)

    def forward(self, x):
        return self.net(x + torch.randn_like(x))


@planned
@pytest.mark.parametrize(
    ("make", "grad", "reason"),
    [
        (ensemble, True, "gradients .*no_grad"),
        (lambda: ensemble(engine="loop"), False, "called one by one, asked for"),
        (lambda: ensemble(backend="reference"), False, "backend='reference' has none; backend='auto'"),
        (lambda: ensemble().double(), False, "torch.float64"),
        (lambda: fastens.Ensemble([Reading(k) for k in range(2)]), False, "reads"),
        (lambda: fastens.Ensemble([Random(k).eval() for k in range(2)]), False, "random"),
        (
            lambda: fastens.Ensemble([nn.Linear(5, 5), nn.Sequential(nn.Linear(5, 5))], engine="loop"),
            False,
            "called one by one, member 1 differs from member 0",
        ),
        (lambda: ensemble(max_fold=1), False, "max_fold"),
        (lambda: ensemble().train(), True, "gradients"),
    ],
)
def test_where_there_is_no_plan_it_says_why(make, grad, reason):
    ens = make()
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            ens(torch.ones(4, 5, dtype=ens.dtype))
    found = lines(ens)[2]
    assert found.startswith("  no plan: ")
    assert re.search(reason, found), found


def test_masks():
    ens = fastens.MCDropout(nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.5)), 4)
    assert lines(ens)[0] == "MCDropout("
    assert lines(ens)[1].startswith("  4 members, rule=Mean(weights=None)")

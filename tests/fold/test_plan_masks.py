"""Plans of MC Dropout: the masks of every member and evaluation, on weights that are packed once."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastens
from fastens import _native
from fastens.program import steps
from tests.networks import NETWORKS, randomised, tensor_of, unet_2d
from tests.test_dropout import NETWORKS as DROPPING
from tests.tolerances import NETWORK, relative_error

pytestmark = pytest.mark.skipif(not _native.load(), reason=f"no compiled library: {_native.status()}")

K = 3
WITH_LAYERS = ("unet_2d", "unet_2d_attention", "unet_2d_condition", "dit", "unet_1d", "transformer")


def make(network, masks, rule="mean", engine="auto", p=None):
    return fastens.MCDropout(network, K, rule, masks=masks, p=p, seed=5, engine=engine)


def same_as_the_loop(network, masks, calls, p=None):
    """Hold the planned ensemble against the loop, evaluation by evaluation; return its report."""
    ours, loop = make(network, masks, p=p), make(network, masks, engine="loop", p=p)
    for batch, seed in ((4, 0), (4, 1)):
        with torch.no_grad(), ours.trajectory(batch, seed), loop.trajectory(batch, seed):
            for args, kwargs in calls:
                actual, expected = (ensemble.member_outputs(*args, **kwargs) for ensemble in (ours, loop))
                assert relative_error(tensor_of(actual), tensor_of(expected)) < NETWORK[torch.float32]
    return ours.report()


@pytest.mark.parametrize("masks", ["fixed", "fresh"])
@pytest.mark.parametrize("name", DROPPING)
def test_every_kind_of_dropout_is_planned(name, masks):
    x = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    report = same_as_the_loop(randomised(DROPPING[name], 0), masks, [((x,), {}), ((0.5 * x,), {}), ((-x,), {})])
    assert report.plans, report.why_no_plan


@pytest.mark.covering(1)
@pytest.mark.parametrize("masks", ["fixed", "fresh"])
@pytest.mark.parametrize("name", WITH_LAYERS)
def test_networks_that_were_built_without(name, masks):
    build, arguments = NETWORKS[name]
    args, kwargs = arguments(4)
    scaled = tuple(0.7 * x if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args)
    report = same_as_the_loop(randomised(build, 0), masks, [(args, kwargs), (scaled, kwargs), (args, kwargs)], p=0.3)
    assert report.plans, report.why_no_plan


@pytest.mark.parametrize("masks", ["fixed", "fresh"])
@pytest.mark.parametrize("rule", ["alternating", "mixture"])
@pytest.mark.parametrize("name", ["Dropout", "functional"])
def test_drawn_rules_under_masks(name, rule, masks):
    network = randomised(DROPPING[name], 0)
    ours, loop = make(network, masks, rule), make(network, masks, rule, engine="loop")
    x = torch.randn(5, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    for seed in range(4):
        with torch.no_grad(), ours.trajectory(5, seed), loop.trajectory(5, seed):
            for factor in (1.0, 0.6):
                batch = torch.cat([x * factor] * 2)  # guided
                actual = ours(batch)
                assert relative_error(actual, loop(batch)) < NETWORK[torch.float32]
                assert torch.equal(actual[:5], actual[5:])
    assert len(ours.report().plans) == 1, ours.report().why_no_plan


def test_one_plan_draws_the_masks_of_every_trajectory():
    ensemble = make(randomised(*DROPPING_UNET), "fresh", p=0.3)
    x, results = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), {}
    for seed in (0, 1, 0):  # the very first evaluation is the plan's as well
        with torch.no_grad(), ensemble.trajectory(2, seed):
            evaluations = torch.stack([tensor_of(ensemble.member_outputs(x, 5)) for _ in range(3)])
        results.setdefault(seed, []).append(evaluations)
    assert len(ensemble.report().plans) == 1
    assert torch.equal(*results[0])
    distinct = torch.cat([results[0][0], results[1][0]]).flatten(1)
    assert len(torch.unique(distinct, dim=0)) == 6
    with torch.no_grad():
        outside = [tensor_of(ensemble(x, 5)) for _ in range(2)]
    assert not torch.equal(*outside)


DROPPING_UNET = (lambda: unet_2d(True), 0)


@pytest.mark.parametrize("masks", ["fixed", "fresh"])
def test_masks_take_no_pass_of_their_own_and_weights_are_packed_once(masks, monkeypatch):
    monkeypatch.setattr(
        "fastens.plan.cpu.convolution.squares_of", lambda *_: 0
    )  # it depends on how many rows share a weight
    member = randomised(*DROPPING_UNET)
    dropout, deep = make(member, masks, p=0.3), fastens.Ensemble([randomised(DROPPING_UNET[0], k) for k in range(K)])
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for _ in range(2):
            dropout(x, 5), deep(x, 5)
    (plan,), (other,) = dropout.report().plans, deep.report().plans
    drops = sum(isinstance(m, nn.Dropout) for m in dropout.network.modules())
    # one pass where the members part, and small copies of what they share until then
    assert {**other, "Drop": 1, **({"Draw": drops} if masks == "fresh" else {})} == {
        **plan,
        "Pointwise": other["Pointwise"],
    }
    plans = dropout._engine.plans
    made = next(iter(plans.entries)).plan
    convolutions = [step for step in made.steps if isinstance(step, steps.Conv)]
    assert all(step.rows_per_member == step.rows for step in convolutions)  # one run of one packed weight
    assert plans._constants.num_bytes < 1.2 * deep._engine.plans._constants.num_bytes / K


class Called(nn.Module):
    """Layers as functions of raw parameters, as in EDM's networks, with one number for both dimensions."""

    def __init__(self):
        super().__init__()
        self.inner, self.bias = nn.Parameter(torch.randn(8, 2, 3, 3)), nn.Parameter(torch.randn(8))
        self.outer, self.scale = nn.Parameter(torch.randn(2, 8, 3, 3)), nn.Parameter(torch.randn(8))
        self.line, self.mix = nn.Parameter(torch.randn(8, 8, 3)), nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        h = F.conv2d(x, self.inner, padding=(1,)) + self.bias.reshape(1, -1, 1, 1)
        h = F.dropout(F.silu(F.group_norm(h, 4, self.scale, self.bias)), 0.4, self.training)
        tokens = F.conv1d(h.mean(3), self.line, self.bias, padding=1).mean(2)
        return F.conv2d(h + F.linear(tokens, self.mix, self.bias)[:, :, None, None], self.outer, stride=(2,))


@pytest.mark.parametrize("masks", ["fixed", "fresh"])
def test_layers_that_are_functions_are_steps(masks):
    x = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    report = same_as_the_loop(randomised(Called, 0), masks, [((x,), {}), ((0.5 * x,), {}), ((-x,), {})])
    (plan,) = report.plans
    called = {name for name in plan if name.startswith("aten.")}
    assert called <= {"aten.mean.dim"}
    assert plan["Conv"] == 4

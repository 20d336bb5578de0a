"""Products: sums of scores under weights of any sign and sum, in whatever the members predict."""

import copy

import pytest
import torch
from torch import nn

import fastens
from fastens import rules, schedules
from fastens.evaluation import Denoiser
from fastens.samplers import Sampler
from tests.networks import randomised

SCHEDULE = schedules.VP()
WEIGHTS = (1.5, 1.0, -0.7)
BY_LEVEL = rules.Product(((1.0, 1.0, 0.0), (0.5, 2.0, -1.0)), (-2.0, 2.0))
KINDS = ["epsilon", "score", "x0", "v", "flow"]


class Network(nn.Module):
    def __init__(self, channels=2):
        super().__init__()
        self.inner = nn.Conv2d(2, channels, 3, padding=1)
        self.time = nn.Linear(1, channels)

    def forward(self, x, t):
        return self.inner(x).tanh() + self.time(t.to(x.dtype).reshape(-1, 1).expand(len(x), 1))[:, :, None, None]


@pytest.fixture
def members():
    return [randomised(Network, seed).double() for seed in range(3)]


@pytest.fixture
def x():
    return torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


T = torch.tensor([0.2, 0.4, 0.6, 0.9], dtype=torch.float64)


def by_hand(members, weights, x, t, kind):
    """Member by member: its score, from its data by algebra of its own; the sum; and back. weights: K of them, [B]."""
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in (SCHEDULE.alpha(t), SCHEDULE.sigma(t)))
    rates = [r.view(-1, 1, 1, 1) for r in (SCHEDULE.alpha_rate(t), SCHEDULE.sigma_rate(t))]
    total = 0
    for member, weight in zip(copy.deepcopy(members), weights, strict=True):
        y = member(x, t)
        epsilon = {
            "epsilon": lambda y: y,
            "score": lambda y: -sigma * y,
            "x0": lambda y: (x - alpha * y) / sigma,
            "v": lambda y: (sigma * x + alpha * y) / (alpha**2 + sigma**2),
            "flow": lambda y: (y - rates[0] / alpha * x) / (rates[1] - rates[0] * sigma / alpha),
        }[kind](y)
        total = total + torch.as_tensor(weight, dtype=x.dtype).view(-1, 1, 1, 1) * epsilon
    data = (x - sigma * total) / alpha
    return {
        "epsilon": total,
        "score": -total / sigma,
        "x0": data,
        "v": alpha * total - sigma * data,
        "flow": rates[0] * data + rates[1] * total,
    }[kind]


@pytest.mark.parametrize("engine", ["fold", "loop"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_sums_scores_whatever_the_members_predict(members, x, kind, engine):
    ensemble = fastens.Ensemble(members, rules.Product(WEIGHTS), prediction=kind, schedule=SCHEDULE, engine=engine)
    expected = by_hand(members, WEIGHTS, x, T, kind)
    torch.testing.assert_close(ensemble(x, T), expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        for _ in range(6):  # planned, and audited
            torch.testing.assert_close(ensemble(x, T), expected, rtol=1e-10, atol=1e-10)
        next(iter(ensemble.parameters()))[0].mul_(1.5)
        next(members[0].parameters()).mul_(1.5)
        changed = by_hand(members, WEIGHTS, x, T, kind)
        assert not torch.allclose(changed, expected)
        torch.testing.assert_close(ensemble(x, T), changed, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_by_noise_level(members, x, kind):
    ensemble = fastens.Ensemble(members, BY_LEVEL, prediction=kind, schedule=SCHEDULE)
    weights = torch.tensor([BY_LEVEL.at(float(SCHEDULE.log_snr(t))).weights for t in T], dtype=torch.float64).T
    expected = by_hand(members, weights, x, T, kind)
    torch.testing.assert_close(ensemble(x, T), expected, rtol=1e-9, atol=1e-9)
    denoiser = Denoiser(ensemble)
    torch.testing.assert_close(denoiser.combine(denoiser.outputs(x, T), BY_LEVEL, x, T), expected, rtol=1e-9, atol=1e-9)


def test_gradients_are_those_of_the_loop(members, x):
    ensemble = fastens.Ensemble(members, rules.Product(WEIGHTS), prediction="v", schedule=SCHEDULE)
    y, z = (x.clone().requires_grad_() for _ in "yz")
    ensemble(y, T).square().sum().backward()
    by_hand(members, WEIGHTS, z, T, "v").square().sum().backward()
    torch.testing.assert_close(y.grad, z.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_half_precision(members, x, dtype):
    singles = [copy.deepcopy(member).to(torch.float32) for member in members]
    ensemble = fastens.Ensemble(singles, rules.Product(WEIGHTS), prediction="v", schedule=SCHEDULE)
    expected = by_hand(members, WEIGHTS, x, T, "v")
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found = ensemble(x.float(), T.float()).double()
    scale = expected.abs().max()
    assert float(((found - expected).abs().max() / scale).detach()) < (1e-5 if dtype == torch.float32 else 3e-2)


def test_a_member_without_weight_is_not_used_and_variances_are_averaged(x):
    members = [randomised(lambda: Network(4), seed).double() for seed in range(3)]
    ensemble = fastens.Ensemble(
        members, rules.Product((1.0, 0.5, 0.0)), prediction=schedules.Prediction("epsilon", variances=True)
    )
    outputs = torch.stack([member(x, T) for member in members])
    expected = torch.cat([outputs[0, :, :2] + 0.5 * outputs[1, :, :2], outputs[:, :, 2:].mean(0)], 1)
    torch.testing.assert_close(ensemble(x, T), expected)
    scores = outputs[:, :, :2].clone()
    scores[2] = torch.nan
    assert fastens.aggregate(scores, rules.Product((1.0, 0.5, 0.0))).isfinite().all()
    assert fastens.aggregate(scores, rules.Product((1.0, 0.5, 1e-9))).isnan().any()


@pytest.mark.parametrize("method", ["ddim", "heun"])
def test_samplers_take_it(members, method):
    ensemble = fastens.Ensemble(members, rules.Product(WEIGHTS), prediction="v", schedule=SCHEDULE)

    class ByHand(nn.Module):
        def __init__(self):
            super().__init__()
            self.members = nn.ModuleList(copy.deepcopy(members))

        def forward(self, x, t):
            return by_hand(list(self.members), WEIGHTS, x, t.double(), "v")

    found = Sampler(Denoiser(ensemble), method, steps=4)(3, (2, 5, 5), 1)
    expected = Sampler(Denoiser(ByHand(), SCHEDULE, "v"), method, steps=4)(3, (2, 5, 5), 1)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_rules_are_values():
    for rule in (rules.Product(), rules.Product(WEIGHTS), BY_LEVEL):
        assert rules.from_dict(rule.to_dict()) == rule
        assert hash(rule) == hash(rules.from_dict(rule.to_dict()))
    assert rules.get("product") == rules.Product()
    assert not rules.Product((0.5, 0.5)).of_scores


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "what the members predict is not known; pass prediction="),
        ({"prediction": "v"}, "predict 'v', which a noise schedule converts: pass schedule="),
        ({"prediction": "v", "schedule": SCHEDULE, "aggregate_in": "x0"}, "aggregate_in is 'x0'; leave it out"),
    ],
)
def test_what_members_predict_must_be_known(members, options, message):
    with pytest.raises(ValueError, match=message):
        fastens.Ensemble(members, rules.Product(WEIGHTS), **options)
    ensemble = fastens.Ensemble(members, **options)
    with pytest.raises(ValueError, match=message):
        ensemble.with_rule("product")
    ensemble.rule = rules.Product((2.0, -0.5, -0.5))  # a sum of 1 is a mean, in every parameterisation


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: rules.Product("ab"), TypeError, "one number per member"),
        (lambda: rules.Product(()), ValueError, "one per member"),
        (lambda: rules.Product((1.0, float("nan"))), ValueError, "finite numbers"),
        (lambda: rules.Product(((1.0,), (2.0,)), (1.0, 0.0)), ValueError, "rising finite numbers"),
        (lambda: rules.Product(((1.0,),), (1.0, 2.0)), ValueError, "one tuple of K weights per level"),
        (lambda: rules.Product((1.0,)).check(2), ValueError, "as many weights as members"),
        (lambda: BY_LEVEL.combine(torch.ones(3, 1)), ValueError, "needs the noise level"),
    ],
)
def test_bad_weights(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_weights_by_level_need_a_schedule(members):
    with pytest.raises(ValueError, match="needs the noise level: pass schedule="):
        fastens.Ensemble(members, BY_LEVEL, prediction="epsilon")

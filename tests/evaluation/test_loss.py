"""The denoising loss, and the weights that come out of its Gram matrices."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import fastens
from fastens.evaluation import Denoiser, denoising_loss, fit_weights, held_out_gain, noise_levels, weighted_loss
from fastens.evaluation.loss import level_weights, subsets_of, times_at
from fastens.evaluation.weights import _simplex
from fastens.parameterisation import PREDICTIONS
from fastens.rules import NoiseDependentMean
from fastens.schedules import EDM, VE, VP, Discrete, Flow
from tests.evaluation.densities import MixtureNetwork

K, D = 3, 4
RULES = ("mean", "sum", "median", "geometric", "dominant", "max_abs", "alternating", "mixture")


class Member(nn.Module):
    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(0.5 * torch.eye(D) + 0.1 * torch.randn(D, D, generator=generator))
        self.calls = []

    def forward(self, x, t):
        self.calls.append(len(x))
        return x @ self.weight + 1e-3 * t.unsqueeze(-1).to(x.dtype) / 1000


@pytest.fixture(scope="module")
def denoiser():
    return Denoiser(fastens.Ensemble([Member(k) for k in range(K)]), Discrete.linear())


@pytest.fixture(scope="module")
def data():
    return torch.rand(12, D, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def loss(denoiser, data):
    return denoising_loss(denoiser, data, rule_names=RULES, by_size=("mean", "median"), times=5)


def test_identity(loss):
    assert loss.diversity.shape == (12, 5)
    assert loss.identity_gap() < 1e-9
    gain = loss.member_mean.mean() - loss.rules["mean"].mean()
    assert gain == pytest.approx(loss.diversity.mean(), abs=1e-7)
    assert loss.diversity.mean() > 1e-3


def test_rules_are_those_of_the_ensemble(denoiser, data, loss):
    """Each rule's loss, read off one stack, is that of the ensemble called with the rule."""
    from fastens.reference.normal import normal

    for rule, (i, t) in itertools.product(RULES[:6], enumerate(loss.times)):
        noise = normal(0, torch.full((12,), i), torch.arange(12), (D,))
        alpha, sigma = denoiser.schedule.coefficients(torch.tensor(t), data)
        ensemble = denoiser.model
        ensemble.rule = rule
        epsilon = denoiser.epsilon(alpha * data + sigma * noise, torch.tensor(t))
        expected = (epsilon - noise).square().mean(1).detach().numpy()
        assert np.allclose(loss.rules[rule][:, i], expected, rtol=1e-5)
        ensemble.rule = "mean"


def test_random_rules_are_members(loss):
    for rule in ("alternating", "mixture"):
        picked = np.isclose(loss.rules[rule][None], loss.members, rtol=1e-6)
        assert picked.any(0).all()
        assert (picked.any(1).sum(0) > 1).any()  # several members were drawn
    assert (np.isclose(loss.rules["mixture"][None], loss.members, rtol=1e-6).all(-1).any(0)).all()  # one for all levels


def test_sizes(denoiser, data, loss):
    pairs = list(itertools.combinations(range(K), 2))
    expected = np.mean([loss.gram[..., list(p), :][..., list(p)].mean((-1, -2)) for p in pairs], 0)
    assert np.allclose(loss.by_size["mean"][2], expected, rtol=1e-5)
    assert np.allclose(loss.by_size["median"][1], loss.member_mean, rtol=1e-6)


def test_one_pass_per_batch():
    members = [Member(k) for k in range(K)]
    denoiser = Denoiser(fastens.Ensemble(members, engine="loop"), Discrete.linear())
    views = denoiser.model._engine.views
    denoising_loss(denoiser, torch.zeros(8, D), rule_names=RULES, by_size=("mean",), times=4, batch_size=16)
    assert [view.calls[-2:] for view in views] == [
        [16, 16]
    ] * K  # 32 inputs, two batches, K members: however many rules


def test_batch_size_does_not_matter(denoiser, data, loss):
    other = denoising_loss(denoiser, data, rule_names=RULES, times=5, batch_size=7)
    for rule in RULES:
        assert np.allclose(other.rules[rule], loss.rules[rule], rtol=1e-5)


def test_paired_error_is_below_the_losses_own(loss):
    assert 0 < loss.compare("mean").error < 0.5 * loss.estimate(loss.rules["mean"]).error


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", [VP(), Discrete.linear(), Flow(), Flow(data_at=1)], ids=lambda s: s.name)
def test_every_prediction_is_one_noise(schedule, prediction):
    network = MixtureNetwork(schedule, [[0.5, -0.3], [-0.2, 0.1]], 0.3, prediction).double()
    exact = MixtureNetwork(schedule, [[0.5, -0.3], [-0.2, 0.1]], 0.3).double()
    x = network.sample(4)
    t = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64) * max(schedule.t_prior, schedule.t_data)
    given, wanted = Denoiser(network, schedule, prediction), Denoiser(exact, schedule)
    assert torch.allclose(given.epsilon(x, t), wanted.epsilon(x, t), rtol=1e-4, atol=1e-5)


def test_best_possible_loss():
    """A Gaussian's exact denoiser reaches the loss that its posterior variance dictates."""
    schedule, std = VP(), 0.4
    network = MixtureNetwork(schedule, [[0.0, 0.0]], std).double()
    found = denoising_loss(Denoiser(network, schedule), network.sample(4000), times=3, data_range=(-9, 9))
    for i, t in enumerate(found.times):
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        expected = alpha**2 * std**2 / (alpha**2 * std**2 + sigma**2)
        assert found.members[0, :, i].mean() == pytest.approx(expected, rel=0.05)


def test_weightings():
    denoiser = Denoiser(Member(0), VP())
    t = noise_levels(denoiser, 4)
    for weighting in ("uniform", "likelihood", "edm"):
        assert level_weights(denoiser, t, weighting).sum() == pytest.approx(1)
    expected = denoiser.schedule.beta(t) / denoiser.schedule.sigma(t) ** 2
    assert np.allclose(level_weights(denoiser, t, "likelihood"), (expected / expected.sum()).numpy())
    assert (noise_levels(Denoiser(Member(0), EDM()), 3).log().diff().diff().abs() < 1e-9).all()
    assert noise_levels(Denoiser(Member(0), Discrete.linear()), 3).tolist() == [166, 500, 832]
    with pytest.raises(ValueError, match="uniform, likelihood, edm"):
        level_weights(denoiser, t, "snr")


@pytest.mark.parametrize(
    "schedule", [VP(), VE(), EDM(), Flow(), Flow(data_at=1), Discrete.linear(num_steps=801)], ids=repr
)
def test_likelihood_weights_are_steps_of_log_snr(schedule):
    share = torch.linspace(0.1, 0.9, 321, dtype=torch.float64)  # so close that the middle of an interval stands for it
    steps = schedule.log_snr(times_at(schedule, share)).diff().abs()
    middles = times_at(schedule, (share[1:] + share[:-1]) / 2)
    weights = level_weights(Denoiser(Member(0), schedule), middles, "likelihood")
    np.testing.assert_allclose(weights, (steps / steps.sum()).numpy(), rtol=2e-3)


def test_rules_of_one_name_have_results_each(denoiser, data):
    first, second = (NoiseDependentMean((row,), (0.0,)) for row in ((1, 0, 0), (0, 0, 1)))
    found = denoising_loss(denoiser, data, rule_names=[first, "mean", second, first], times=2)
    assert list(found.rules) == ["noise_dependent_mean", "mean", "noise_dependent_mean 2"]
    assert np.allclose(found.rules["noise_dependent_mean"], found.members[0])
    assert np.allclose(found.rules["noise_dependent_mean 2"], found.members[2])


def test_subsets():
    assert subsets_of(5, 2, 100) == list(itertools.combinations(range(5), 2))
    assert len(subsets_of(12, 6, 10)) == 10
    assert len(set(subsets_of(12, 6, 10))) == 10


# Weights


def test_weights_are_the_minimum(loss):
    grid = [np.array(w) / 20 for w in itertools.product(range(21), repeat=K) if sum(w) == 20]
    affine, simplex = fit_weights(loss, constraint="affine"), fit_weights(loss)
    for i, gram in enumerate(loss.gram.mean(0)):
        at = {name: np.array(f.at(loss.log_snr[i]).weights) for name, f in (("a", affine), ("s", simplex))}
        value = {name: w @ gram @ w for name, w in at.items()}
        assert min(at["s"]) >= 0
        assert value["s"] <= min(w @ gram @ w for w in grid) + 1e-12
        assert value["a"] <= value["s"] + 1e-12
    assert weighted_loss(simplex, loss).mean() <= loss.rules["mean"].mean()


def test_levels_that_are_one_are_fitted_as_one(data):
    denoiser = Denoiser(fastens.Ensemble([Member(k) for k in range(K)]), Discrete.linear(num_steps=10))
    found = denoising_loss(denoiser, data, times=torch.tensor([7.0, 3.0, 7.0]))
    fitted = fit_weights(found, constraint="affine")
    grams = found.gram.mean(0)
    expected = np.linalg.solve(grams[[0, 2]].mean(0), np.ones(K))
    assert fitted.log_snr == tuple(float(found.log_snr[i]) for i in (0, 1))
    assert np.allclose(fitted.weights[0], expected / expected.sum())
    fit_weights(denoising_loss(denoiser, data, times=20))


def test_levels_without_noise_have_no_weights(data):
    denoiser = Denoiser(fastens.Ensemble([Member(k) for k in range(K)]), Flow())
    with pytest.raises(ValueError, match="data alone, or of noise alone"):
        fit_weights(denoising_loss(denoiser, data, times=torch.tensor([1.0, 0.5])))


@pytest.mark.parametrize("seed", range(20))
def test_simplex_satisfies_its_conditions(seed):
    a = np.random.default_rng(seed).normal(size=(6, 4))
    gram = a @ a.T / 4 + 0.01 * np.eye(6)
    w = _simplex(gram)
    slope = gram @ w
    value = w @ slope
    assert w.min() >= 0
    assert w.sum() == pytest.approx(1)
    assert (slope >= value - 1e-7).all()  # no member outside would lower it
    assert np.allclose(slope[w > 1e-9], value, atol=1e-7)


def test_weights_find_the_good_member(data):
    class Bad(Member):
        def forward(self, x, t):
            return super().forward(x, t) + 3

    ensemble = fastens.Ensemble([Member(0), Bad(1)], engine="loop")
    denoiser = Denoiser(ensemble, Discrete.linear())
    fit = denoising_loss(denoiser, data[:6], times=3)
    held = denoising_loss(denoiser, data[6:], times=3, seed=1)
    fitted = fit_weights(fit)
    gain = held_out_gain(fitted, held)
    assert np.array(fitted.weights)[:, 0].min() > 0.9
    assert gain.value > 5 * gain.error > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": torch.full((2, D), 3.0)}, "expected"),
        ({"rule_names": ("meen",)}, "mean"),
        ({"by_size": ("alternating",)}, "subset"),
        ({"draws": 0}, "at least 1"),
        ({"times": 0}, "at least one"),
        ({"times": torch.tensor(3.0)}, r"times is \[\], expected \[L\]"),
        ({"times": torch.zeros(0)}, r"times is \[0\], expected \[L\]"),
        ({"by_size": ("mean",), "most_subsets": 0}, "most_subsets 0"),
        ({"weighting": "snr"}, "uniform"),
        ({"weighting": "likelihood", "schedule": Flow(data_at=1), "times": torch.tensor([0.0, 0.5])}, "not finite"),
    ],
)
def test_bad_input(denoiser, options, message):
    options = dict(options)
    data = options.pop("data", torch.zeros(2, D))
    denoiser = Denoiser(denoiser.model, options.pop("schedule", denoiser.schedule))
    with pytest.raises(ValueError, match=message):
        denoising_loss(denoiser, data, **options)


def test_bad_denoiser():
    with pytest.raises(ValueError, match="epsilon"):
        Denoiser(Member(0), VE(), "noise")
    with pytest.raises(TypeError, match="from_scheduler"):
        Denoiser(Member(0), object())  # pyright: ignore

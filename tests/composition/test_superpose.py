"""Densities along the path, mixtures, equal densities and corrected products, where the truth is known."""

import copy
import math

import pytest
import torch
from torch import nn

import fastens
from fastens import rules, schedules
from fastens.composition import And, Or, superpose
from fastens.composition.particles import effective_size, systematic
from fastens.composition.path import Path
from fastens.evaluation import Denoiser
from fastens.evaluation.levels import levels
from fastens.ops.normal import normal
from tests.evaluation.densities import MixtureNetwork
from tests.networks import randomised

SCHEDULE = schedules.VP()
MEANS = ([[-1.5, 0.0]], [[1.5, 1.0]])
STD = 0.5


def networks(means=MEANS, schedule=SCHEDULE, std=STD, prediction="epsilon"):
    return [MixtureNetwork(schedule, mean, std, prediction) for mean in means]


def denoiser_of(members, schedule=SCHEDULE, prediction="epsilon", **options):
    return Denoiser(fastens.Ensemble(members, prediction=prediction, schedule=schedule, **options))


def true_log_densities(members, samples, schedule=SCHEDULE):
    t = torch.tensor(schedule.t_data, dtype=torch.float64)
    return torch.stack([member.log_density(samples.double(), t) for member in members]).detach()


class Network(nn.Module):
    def __init__(self, size=3):
        super().__init__()
        self.first, self.last = nn.Linear(size + 1, 8), nn.Linear(8, size)

    def forward(self, x, t):
        return self.last(self.first(torch.cat([x, t.to(x.dtype)[:, None]], 1)).tanh()) + 0.8 * x


def by_hand(members, target, num, size, steps, start, seed):
    """The SDE with Ito's estimator, member by member, in float64; the samples and log-densities at its end."""
    members = copy.deepcopy(members)
    ratios, times = levels(SCHEDULE, steps, start)
    numbers = torch.arange(num)
    weights = target.weights if isinstance(target, rules.Product) else None
    y = float(ratios[0]) / math.sqrt(sum(weights) if weights else 1) * normal(seed, 0, numbers, (size,)).double()
    u = float(ratios[0]) ** 2
    logs = [-0.5 * y.square().sum(1) / u - 0.5 * size * math.log(2 * math.pi * u) for _ in members]
    for i in range(steps):
        t, r = times[i], float(ratios[i])
        span = r**2 - float(ratios[i + 1]) ** 2
        x = float(SCHEDULE.alpha(t)) * y
        scores = [-member(x, t.expand(num)).detach() / r for member in members]
        if weights is None:
            total = sum(log.exp() for log in logs)
            mixed = sum((log.exp() / total)[:, None] * score for log, score in zip(logs, scores, strict=True))
        else:
            mixed = sum(weight * score for weight, score in zip(weights, scores, strict=True))
        moved = span * mixed + math.sqrt(span) * normal(seed, (1 << 20) + i, numbers, (size,)).double()
        logs = [
            log + (score * moved).sum(1) - 0.5 * span * score.square().sum(1)
            for log, score in zip(logs, scores, strict=True)
        ]
        y = y + moved
    return float(SCHEDULE.alpha(times[-1])) * y, torch.stack(logs)


@pytest.mark.parametrize("engine", ["fold", "loop"])
@pytest.mark.parametrize("target", [Or(), rules.Product((1.5, 0.5, -0.7))], ids=str)
def test_it_is_the_loop_over_the_members(target, engine):
    members = [randomised(Network, seed).double() for seed in range(3)]
    denoiser = denoiser_of(members, engine=engine)
    for _ in range(2):
        found = superpose(denoiser, 5, (3,), target, steps=12, start=2.0, seed=3)
        samples, logs = by_hand(members, target, 5, 3, 12, 2.0, 3)
        torch.testing.assert_close(found.samples, samples, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.log_densities, logs, rtol=1e-9, atol=1e-9)
        assert found.variance.abs().max() == 0
        with torch.no_grad():  # and as the members are now
            next(iter(denoiser.model.parameters()))[1].mul_(1.3)
            next(members[1].parameters()).mul_(1.3)


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [
        (SCHEDULE, "epsilon"),
        (SCHEDULE, "v"),
        (schedules.EDM(), "x0"),
        (schedules.Flow(), "flow"),
        (schedules.Discrete.linear(), "epsilon"),
        (schedules.VE(), "score"),
    ],
    ids=str,
)
def test_densities_along_the_ode_are_the_true_ones(schedule, prediction):
    members = networks(schedule=schedule, prediction=prediction)
    start = {"edm": 60.0, "ve": 40.0, "flow": 100.0}.get(schedule.name)  # else far above the data
    found = superpose(denoiser_of(members, schedule, prediction), 100, (2,), Or(), noise="ode", steps=120, start=start)
    error = found.log_densities - true_log_densities(members, found.samples, schedule)
    assert float(error.abs().mean()) < 0.15  # nats, where log-densities range over tens


def test_ito_estimates_approach_the_truth_with_the_steps():
    members = networks()
    errors = []
    for steps in (50, 200, 800):
        found = superpose(denoiser_of(members), 200, (2,), Or(), steps=steps)
        true = true_log_densities(members, found.samples)
        gap = (found.log_densities[0] - found.log_densities[1]) - (true[0] - true[1])
        errors.append(float(gap.square().mean().sqrt()))
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2]
    assert errors[2] < 0.4


@pytest.mark.parametrize("noise", ["sde", "ode"])
def test_or_is_the_mixture(noise):
    num = 2000
    steps = 150 if noise == "ode" else 500  # of second order, and of first
    found = superpose(denoiser_of(networks()), num, (2,), Or((3.0, 1.0)), noise=noise, steps=steps).samples
    near = (found.unsqueeze(1) - torch.tensor(MEANS)[:, 0]).norm(dim=2).argmin(1)
    share = float((near == 0).double().mean())
    assert abs(share - 0.75) < 4 * math.sqrt(0.75 * 0.25 / num)
    for k in range(2):
        part = found[near == k]
        assert (part.mean(0) - torch.tensor(MEANS[k][0])).abs().max() < 5 * STD / math.sqrt(len(part)) + 0.02
        assert (part.std(0) - STD).abs().max() < 0.05


@pytest.mark.parametrize("target", [Or((3.0, 1.0)), And(0.1), rules.Product((0.7, 0.6))], ids=str)
def test_the_ode_is_solved_to_second_order(target):
    denoiser = denoiser_of(networks())
    exact, *found = (
        superpose(denoiser, 60, (2,), target, noise="ode", steps=steps, start=10.0).samples for steps in (640, 40, 80)
    )
    coarse, fine = ((each - exact).norm(dim=1).median() for each in found)
    assert float(coarse / fine) > 3.3  # 4, and 2 where the second stage takes shares of the first


@pytest.mark.parametrize("noise", ["sde", "ode"])
def test_and_is_where_densities_are_equal(noise):
    members = networks()
    found = superpose(denoiser_of(members), 200, (2,), And(), noise=noise, steps=300)
    true = true_log_densities(members, found.samples)
    gap = (true[0] - true[1]).abs()
    mean = superpose(denoiser_of(members), 200, (2,), rules.Product((0.5, 0.5)), noise=noise, steps=100).samples
    plain = true_log_densities(members, mean)
    assert float(gap.mean()) < 0.25
    assert float((plain[0] - plain[1]).abs().mean()) > 1.5  # equal weights alone do not make them equal


def test_variance_of_the_probe():
    """Held against the spread over many probes, where the network's Jacobian is full and not symmetric by much."""
    torch.manual_seed(0)  # of some other networks the bound is further than twice
    members = [MixtureNetwork(SCHEDULE, torch.randn(3, 6).double() * 2, 0.3) for _ in range(2)]
    path = Path(denoiser_of(members), 20, 20.0)
    y = torch.randn(40, 6, dtype=torch.float64)
    single, pairs, traces = [], [], []
    for seed in range(300):
        probes = normal(seed, 0, torch.arange(80), (6,)).double().sign().view(2, 40, 6)
        _, trace, variance = path.scores_along(y, 14, probes[:1])
        traces.append(trace)
        single.append(variance)
        pairs.append(path.scores_along(y, 14, probes)[2])
    spread = torch.stack(traces).var(0)
    exact = path.scores_along(y, 14, torch.ones(1, 40, 6).double())[0]
    assert exact.shape == (2, 40, 6)
    assert float(torch.stack(pairs).mean() / (spread.mean() / 2)) == pytest.approx(1, abs=0.1)
    assert 1 - 0.1 < float(torch.stack(single).mean() / spread.mean()) < 2  # a bound, and a near one


def test_a_planned_probe_is_one_gone_backward():
    members = [randomised(Network, seed).double() for seed in range(3)]
    probes = torch.randn(1, 4, 3, dtype=torch.float64)
    y = torch.randn(4, 3, dtype=torch.float64)
    planned, backward = (Path(denoiser_of(members, engine=engine), 10, 3.0) for engine in ("fold", "loop"))
    for _ in range(3):
        found, expected = (path.scores_along(y, 5, probes) for path in (planned, backward))
        for a, e in zip(found[:2], expected[:2], strict=True):
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


def gaussian_product(means, weights, std):
    precision = sum(weights) / std**2
    mean = sum(w * torch.tensor(m[0]) for w, m in zip(weights, means, strict=True)) / sum(weights)
    return mean.double(), 1 / precision


def divergence(samples, mean, variance):
    """KL of the Gaussian of the samples' moments to the true one."""
    x = samples.double()
    covariance = torch.cov(x.T) / variance
    gap = (x.mean(0) - mean).square().sum() / variance
    return float(0.5 * (covariance.trace() - len(mean) + gap - covariance.logdet()))


WEIGHTS = {"product": (1.0, 1.0), "power": (3.0, 0.0), "guidance": (2.0, -1.0)}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_corrected_products_are_the_products(weights):
    means = ([[-0.5, 0.3]], [[0.7, 0.0]])
    members = networks(means, std=0.8)
    if weights[1] < 0:
        members[1].std = 1.2  # a density to guide away from is a wider one
        precision = weights[0] / 0.64 + weights[1] / 1.44
        mean = (
            weights[0] / 0.64 * torch.tensor(means[0][0]) + weights[1] / 1.44 * torch.tensor(means[1][0])
        ).double() / precision
        variance = 1 / precision
    else:
        mean, variance = gaussian_product(means, weights, 0.8)
    denoiser = denoiser_of(members, engine="loop")
    product = rules.Product(weights)
    naive = superpose(denoiser, 2000, (2,), product, steps=100)
    found = superpose(denoiser, 2000, (2,), product, steps=100, start=20.0, resample=0.5, corrector="mala")
    assert divergence(naive.samples, mean, variance) > 5 * divergence(found.samples, mean, variance)
    assert found.resampled >= 1
    assert 0 < min(found.effective) < 1
    assert 0.4 < found.accepted < 0.9


def test_densities_go_where_their_samples_go():
    members = networks(([[-0.5, 0.3]], [[0.7, 0.0]]), std=0.8)
    options = {"noise": "ode", "steps": 100, "start": 20.0, "resample": 0.5, "corrector": "mala"}
    found = superpose(denoiser_of(members), 500, (2,), rules.Product(), **options)
    error = found.log_densities - true_log_densities(members, found.samples)
    assert found.resampled > 1
    assert float((error - error.mean(1, keepdim=True)).std()) < 0.2


def test_weights_put_right_how_many_samples_are_in_each_mode():
    """A product of mixtures whose modes meet unequally; moves at one noise level never cross between modes."""
    means = ([[-4.0, 0.0], [4.0, 0.0]], [[-4.0, 0.0], [4.0, 1.2]])
    members = networks(means, std=0.6)
    away = 0.5 * 1.2**2 / (2 * 0.36)  # of log-density, at the mode that the members place apart
    share = 1 / (1 + math.exp(-away))
    product = rules.Product((1.0, 1.0))
    shares = {}
    for name, options in {
        "naive": {},
        "corrected": {"resample": 0.5, "corrector": "mala", "start": 30.0},
    }.items():
        samples = superpose(denoiser_of(members), 4000, (2,), product, steps=150, **options).samples
        shares[name] = float((samples[:, 0] < 0).double().mean())
    assert abs(shares["corrected"] - share) < 0.05
    assert abs(shares["naive"] - share) > 0.1


def test_weights_by_noise_level_end_at_the_last_level():
    members = networks(([[-0.5, 0.3]], [[0.7, 0.0]]), std=0.8)
    product = rules.Product(((0.5, 0.5), (2.0, 1.0)), (-4.0, 2.0))
    mean, variance = gaussian_product(([[-0.5, 0.3]], [[0.7, 0.0]]), (2.0, 1.0), 0.8)
    denoiser = denoiser_of(members)
    found = superpose(denoiser, 2000, (2,), product, steps=200, start=20.0, resample=0.5, corrector="mala")
    assert divergence(found.samples, mean, variance) < 0.02


def test_resampling_keeps_what_weighs():
    log_weights = torch.tensor([0.0, math.log(2), -math.inf, math.log(5)], dtype=torch.float64)
    counts = sum(torch.bincount(systematic(log_weights, seed, 0), minlength=4) for seed in range(500)) / 500
    assert counts.tolist() == pytest.approx([0.5, 1.0, 0.0, 2.5], abs=0.1)
    assert effective_size(torch.zeros(7)) == pytest.approx(1)
    assert effective_size(torch.tensor([0.0, -1e9])) == pytest.approx(0.5)


class Labelled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.label = Network(2), nn.Embedding(3, 2)

    def forward(self, x, t, label=None):
        return self.inner(x, t) + self.label(label)


def test_guidance_is_a_product_of_one_network_under_two_conditions():
    network = randomised(Labelled, 0).double()
    ensemble = fastens.Ensemble([network, network], prediction="epsilon", schedule=SCHEDULE)
    labels = fastens.PerMember([torch.tensor([1]), torch.tensor([2])])
    found = superpose(
        Denoiser(ensemble, conditioning={"label": labels}), 4, (2,), rules.Product((3.0, -2.0)), steps=8, start=2.0
    )

    class Under(nn.Module):
        def __init__(self, label):
            super().__init__()
            self.network, self.number = copy.deepcopy(network), label

        def forward(self, x, t):
            return self.network(x, t, torch.tensor([self.number]))

    samples, _ = by_hand([Under(1), Under(2)], rules.Product((3.0, -2.0)), 4, 2, 8, 2.0, 0)
    torch.testing.assert_close(found.samples, samples, rtol=1e-9, atol=1e-9)


def dropping(masks):
    model = nn.Module()
    model.__class__ = type("Dropping", (Network,), {})
    Network.__init__(model, 2)
    model.drop = nn.Dropout(0.5)
    model.__class__.forward = lambda self, x, t: self.drop(Network.forward(self, x, t))
    return fastens.MCDropout(model, 3, masks=masks, prediction="epsilon", schedule=SCHEDULE)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": "or"}, TypeError, "expected Or, And or fastens.rules.Product"),
        ({"target": rules.Product((1.0,))}, ValueError, "as many weights as members"),
        ({"target": rules.Product((1.0, -1.0))}, ValueError, "weights whose sum is above 0"),
        ({"target": Or((1.0, 1.0, 1.0))}, ValueError, "one per member, 2"),
        ({"noise": "pde"}, ValueError, "expected 'sde' or 'ode'"),
        ({"num": 0}, ValueError, "at least 1"),
        ({"steps": 0}, ValueError, "at least 1"),
        ({"start": 1e9}, ValueError, "noise-to-signal ratio above"),
        ({"resample": 0.5}, ValueError, "needs neither"),
        ({"target": rules.Product(), "resample": 2.0}, ValueError, "share of the samples"),
        ({"target": rules.Product(), "resample": 0.5, "noise": "ode"}, ValueError, "copies stay equal"),
        ({"target": rules.Product(), "corrector": "gibbs"}, ValueError, "expected 'mala' or 'langevin'"),
    ],
)
def test_bad_input(options, error, message):
    options = {"num": 3, "target": Or(), **options}
    with pytest.raises(error, match=message):
        superpose(denoiser_of(networks()), options.pop("num"), (2,), options.pop("target"), **options)


def test_what_has_no_density_or_cannot_be_moved():
    with pytest.raises(ValueError, match="take MC Dropout with masks='fixed'"):
        superpose(Denoiser(dropping("fresh")), 3, (2,), Or())
    assert superpose(Denoiser(dropping("fixed")), 3, (2,), Or(), steps=3).samples.isfinite().all()
    with pytest.raises(TypeError, match=r"expected a fastens\.Ensemble"):
        superpose(Denoiser(networks()[0], SCHEDULE), 3, (2,), Or())
    with pytest.raises(ValueError, match="there is one"):
        superpose(denoiser_of(networks()[:1]), 3, (2,), And())
    ensemble = fastens.Ensemble([randomised(Labelled, k) for k in range(2)], prediction="epsilon", schedule=SCHEDULE)
    rows = Denoiser(ensemble, conditioning={"label": torch.tensor([0, 1, 2])})
    with pytest.raises(ValueError, match="'label' has a value for each of 3 rows"):
        superpose(rows, 3, (2,), rules.Product(), resample=0.5)
    denoiser = denoiser_of(networks())
    with denoiser.model.assigned([0, 1, 0]), pytest.raises(ValueError, match=r"leave ens\.assigned"):
        superpose(denoiser, 3, (2,), Or())


def test_a_weight_that_is_no_number_is_not_drawn_by():
    weights = torch.zeros(5, dtype=torch.float64)
    weights[3] = torch.nan
    for use in (effective_size, lambda w: systematic(w, 0, 0)):
        with pytest.raises(RuntimeError, match="weight of sample 3 of 5 is not a number"):
            use(weights)


def test_levels_lead_to_no_noise_nowhere():
    with pytest.raises(ValueError, match="no noise at its first time"):
        levels(schedules.Discrete((1.0, 0.9, 0.5, 0.1)), 3, None)

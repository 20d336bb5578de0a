"""Laplace: curvature against its definition, draws against their variance, seeds, bad input."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fastens
from fastens.laplace import LaplaceMembers, squared_gradients
from tests.networks import mlp, randomised
from tests.tolerances import relative_error


def losses(model, batch):
    x, noise = batch
    return (model(x + noise) - noise).square().mean(1)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 5, generator=generator), torch.randn(4, 5, generator=generator)) for _ in range(3)]


def test_curvature_is_the_sum_of_squared_gradients_of_each_sample(data):
    model = nn.Linear(5, 5)
    curvature = squared_gradients(model, losses, data)
    expected = torch.zeros(5, 5)
    for x, noise in data:
        for i in range(4):
            y = x[i] + noise[i]
            expected += (2 / 5 * (model(y) - noise[i])[:, None] * y[None]).square()
    assert relative_error(curvature["weight"], expected.detach()) < 1e-5
    assert model.weight.grad is None


def test_draws_have_the_posteriors_variance():
    model = nn.Linear(2, 1, bias=False)
    curvature = {"weight": torch.tensor([[0.0, 99.0]])}
    members = LaplaceMembers(model, curvature, 4000, temperature=2.0, prior_precision=1.0)
    draws = torch.stack([members[k].weight.detach() - model.weight.detach() for k in range(4000)])
    spread = draws.std(0).flatten()  # 2 / sqrt(0 + 1) and 2 / sqrt(99 + 1): little where the data say much
    assert relative_error(spread, torch.tensor([2.0, 0.2])) < 0.05
    assert abs(spread[1] - 0.2) < 0.02
    assert draws.mean(0).abs().max() < 0.15


def test_is_a_seeded_ensemble(data):
    model = randomised(mlp, 0)
    x = torch.randn(3, 5)
    with torch.no_grad():
        first, again, other = (fastens.laplace(model, losses, data, 3, seed=seed)(x) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        still = fastens.laplace(model, losses, data, 3, temperature=0.0, rule="median")
        assert relative_error(still(x), model(x)) < 1e-5
        assert still.engine == "fold"
        assert relative_error(fastens.laplace(model, losses, data, 3, prior_precision=1e8)(x), model(x)) < 1e-2


class Spectral(nn.Module):
    """Complex weights, as in neural operators."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, dtype=torch.complex64))

    def forward(self, x):
        return torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=x.shape[-1])


def test_real_and_imaginary_parts_have_a_curvature_each(data):
    torch.manual_seed(0)
    model, batches = Spectral(), [(x[:, :4], noise[:, :4]) for x, noise in data]

    def of_parts(parts, batch):
        x = batch[0] + batch[1]
        given = torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(parts), n=4)
        return (given - batch[1]).square().mean(1)

    parts = torch.view_as_real(model.weight.detach())
    expected = sum(torch.func.jacrev(of_parts)(parts, batch).square().sum(0) for batch in batches)
    curvature = squared_gradients(model, losses, batches)["weight"]
    assert relative_error(curvature, expected) < 1e-5
    members = LaplaceMembers(model, {"weight": torch.full((3, 2), 3.0)}, 4000)
    draws = torch.stack([torch.view_as_real(member.weight.detach()) - parts for member in members])
    assert (draws.std(0) - 0.5).abs().max() < 0.03


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_curvature_needs_no_gradients_of_the_caller(data, context):
    model, x = randomised(mlp, 0), torch.randn(3, 5)
    expected = fastens.laplace(model, losses, data, 2)(x).detach()
    with context():
        ensemble = fastens.laplace(model, losses, data, 2)
    assert relative_error(ensemble(x).detach(), expected) < 1e-6


@pytest.mark.filterwarnings("error:fastens")
@pytest.mark.parametrize("made", [LaplaceMembers, lambda *args: list(LaplaceMembers(*args))])
def test_draws_stay_where_the_checkpoint_is_trained_on(data, made):
    """And the ensemble stays folded; in another mode than the checkpoint as well."""
    model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Dropout(0.5)).train()
    draws = made(model, squared_gradients(model, losses, data), 3)
    expected, x = list(draws), torch.randn(3, 5)
    ensemble = fastens.Ensemble(draws).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
        outputs = ensemble.member_outputs(x)
        assert relative_error(outputs, torch.stack([member.eval()(x) for member in expected])) < 1e-5
    assert ensemble.engine == "fold"


def test_draws_are_a_sequence(data):
    draws = LaplaceMembers(nn.Linear(2, 2), {"weight": torch.ones(2, 2)}, 3)
    assert torch.equal(draws[-1].weight, draws[2].weight)
    with pytest.raises(IndexError, match="draw -4 of 3"):
        draws[-4]
    with pytest.raises(ValueError, match=r"curvature of 'weight' is \[2\], expected \[2, 2\]"):
        LaplaceMembers(nn.Linear(2, 2), {"weight": torch.ones(2)}, 3)[0]


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_a_curvature_is_of_squares(value):
    curvature = {"weight": torch.full((2, 2), value), "bias": torch.ones(2)}
    with pytest.raises(ValueError, match="curvature of 'weight' is below zero or not a number in 4 of 4 elements"):
        LaplaceMembers(nn.Linear(2, 2), curvature, 3)


def test_draws_stay_where_the_curvature_is_written_to():
    model = nn.Linear(2, 2)
    curvature = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    draws = LaplaceMembers(model, curvature, 2)
    before = draws[0].weight.clone()
    curvature["weight"].mul_(100)
    assert torch.equal(draws[0].weight, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": []}, "data is empty"),
        ({"loss": lambda m, b: losses(m, b).mean()}, "one number for each sample"),
        ({"prior_precision": 0.0}, "prior_precision is 0.0"),
        ({"num_members": 0}, "num_members is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
    ],
)
def test_bad_input_is_named(data, options, message):
    arguments = {"loss": losses, "data": data, "num_members": 2, **options}
    with pytest.raises(ValueError, match=message):
        fastens.laplace(randomised(mlp, 0), **arguments)


class Computed(nn.Module):
    """Weights that torch computes of others: by hooks before a call, or when they are read."""

    def __init__(self, norm):
        super().__init__()
        self.net = nn.Sequential(norm(nn.Linear(5, 5)), nn.Tanh(), nn.Linear(5, 5))

    def forward(self, x):
        return self.net(x)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, parametrizations.weight_norm], ids=["hooks", "read"])
def test_draws_around_computed_weights_are_networks_of_their_own(data, norm):
    torch.manual_seed(0)
    model = Computed(norm)
    x = torch.randn(3, 5)
    model(x)  # whose computed weight is part of a graph
    draws = list(LaplaceMembers(model, squared_gradients(model, losses, data), 3))
    ens = fastens.laplace(model, losses, data, 3)
    with torch.no_grad():
        expected = torch.stack([draw(x) for draw in draws])
        assert (expected[0] - expected[1]).abs().max() > 1e-2
        with parametrize.cached():
            assert relative_error(torch.stack([draw(x) for draw in draws]), expected) < 1e-6
            assert relative_error(ens.member_outputs(x), expected) < 1e-5

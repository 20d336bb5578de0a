"""score_sde_pytorch: model(x, labels) behind a score function that is made anew and calls eval() each time."""

import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn

import fastens
from fastens import _native
from tests.interop.loops import Looped
from tests.networks import randomised
from tests.tolerances import relative_error


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.time = nn.Conv2d(2, 8, 3, padding=1), nn.Linear(1, 8)
        self.drop = nn.Dropout(0.3)
        self.outer = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x, labels):
        return self.outer(self.drop(torch.tanh(self.inner(x) + self.time(labels[:, None] / 999)[:, :, None, None])))


def score_function(model, beta=(0.1, 20.0)):
    """The VP score of arXiv 2011.13456, -network / std, over a model that is put into evaluation mode first."""
    model.eval()

    def score(x, t):
        integral = beta[0] * t + (beta[1] - beta[0]) * t**2 / 2
        return -model(x, t * 999) / (1 - torch.exp(-integral)).sqrt()[:, None, None, None]

    return score


def euler_maruyama(model, batch=2, steps=5):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 2, 8, 8, generator=generator)
    for now in torch.linspace(1, 1e-3, steps):
        t = now.expand(batch)
        beta, dt = 0.1 + 19.9 * now, -1 / steps
        score = score_function(model)(x, t)  # made anew in each update, as there
        mean = x + (-beta * x / 2 - beta * score) * dt
        x = mean + (beta * -dt).sqrt() * torch.randn(x.shape, generator=generator)
    return mean


def test_predictor():
    members = [randomised(Network, seed) for seed in range(3)]
    with torch.no_grad():
        ensemble = fastens.Ensemble(members)
        assert relative_error(euler_maruyama(nn.DataParallel(ensemble)), euler_maruyama(Looped(members))) < 1e-4
    assert len(ensemble.report().plans) == 1 or not _native.load()
    assert not ensemble.report().why_no_plan or not _native.load()


def test_eval_at_every_evaluation_keeps_masks_and_draws():
    network = randomised(Network, 0)
    ensemble = fastens.MCDropout(network, 3)
    x, t = torch.randn(2, 2, 8, 8), torch.full((2,), 0.5)
    with torch.no_grad():
        first, second = score_function(ensemble)(x, t), score_function(ensemble)(x, t)
        assert torch.equal(first, second)
        assert relative_error(first, score_function(network)(x, t)) > 1e-3
        mixture = fastens.Ensemble([randomised(Network, seed) for seed in range(3)], "mixture")
        with mixture.trajectory(2, 0):
            assert torch.equal(score_function(mixture)(x, t), score_function(mixture)(x, t))


def test_probability_flow_in_scipy_refuses_what_changes():
    members = [randomised(Network, seed) for seed in range(2)]
    ensemble = fastens.Ensemble(members)

    def field(t, y):
        x = torch.from_numpy(y).float().reshape(1, 2, 4, 4)
        with torch.no_grad():
            score = score_function(ensemble)(x, torch.full((1,), float(t)))
        return (-0.5 * (0.1 + 19.9 * t) * (x + score)).numpy().ravel()

    start = torch.randn(32).numpy()
    solve_ivp(field, (1, 0.5), start, rtol=1e-2, atol=1e-2, method="RK45")
    ensemble.rule = "alternating"
    with pytest.raises(RuntimeError, match="adaptive solver"):
        solve_ivp(field, (1, 0.5), start, rtol=1e-2, atol=1e-2, method="RK45")


@pytest.mark.parametrize("rule", [name for name in fastens.rules.names() if not fastens.rules.get(name).random])
def test_rules_that_change_a_correctors_step_say_so(rule):
    """Langevin's step is 2 (snr |noise| / |score|)^2, arXiv 2011.13456, algorithm 4: it follows the score's norm."""
    truth = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    scores = truth + 0.1 * torch.randn(5, 4, 64, generator=torch.Generator().manual_seed(1))
    norm = fastens.aggregate(scores, rule).flatten(1).norm(dim=1).mean()
    step = float((scores.norm(dim=2).mean() / norm) ** 2)  # beside that of a member
    assert (abs(step - 1) > 0.04) == ("Langevin" in type(fastens.rules.get(rule)).__doc__), step

"""Random rules: who draws when, which rows go together, and the solvers that refuse them."""

from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn
from torchdiffeq import odeint

import fastens
from fastens.evaluation import Denoiser
from fastens.samplers import Sampler
from fastens.schedules import VP
from tests.networks import mlp, randomised
from tests.tolerances import relative_error


class Which(nn.Module):
    """A member that returns its own number, so that a draw can be read off."""

    def __init__(self, number):
        super().__init__()
        self.number = nn.Parameter(torch.tensor([float(number)]))

    def forward(self, x, sigma=None):
        return x * 0 + self.number


@pytest.fixture(params=["fold", "loop"])
def ensemble(request):
    return fastens.Ensemble([Which(k) for k in range(5)], "mixture", engine=request.param)


def draw(ensemble, x, *args):
    with torch.no_grad():
        return ensemble(x, *args)[:, 0].long().tolist()


def heun_with_churn(model, x, levels=(10.0, 5.0, 1.0, 0.1)):
    """Algorithm 2 of arXiv 2206.00364: two evaluations in a step, and noise raised inside the trajectory."""
    for now, then in pairwise(levels):
        raised = torch.tensor(now * 1.2)
        slope = (x - model(x, raised)) / raised
        other = x + (then - raised) * slope
        model(other, torch.tensor(then))
        x = other
    return x


def watched(ensemble):
    drawn = []

    def model(x, sigma):
        output = ensemble(x, sigma)
        drawn.append(output[:, 0].long().tolist())
        return output

    return model, drawn


def test_mixture_is_one_member_per_trajectory_through_heun_and_churn(ensemble):
    model, drawn = watched(ensemble)
    runs = []
    for seed in (0, 0, 1):
        drawn.clear()
        with torch.no_grad(), ensemble.trajectory(64, torch.Generator().manual_seed(seed)):
            heun_with_churn(model, torch.randn(64, 3))
        assert len(drawn) == 6
        assert all(each == drawn[0] for each in drawn)
        assert set(drawn[0]) == set(range(5))
        runs.append(drawn[0])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_alternating_draws_at_every_evaluation(ensemble):
    ensemble.rule = "alternating"
    model, drawn = watched(ensemble)
    runs = []
    for _ in range(2):
        drawn.clear()
        with torch.no_grad(), ensemble.trajectory(64, 3):
            heun_with_churn(model, torch.randn(64, 3))
        assert len({tuple(each) for each in drawn}) == 6
        runs.append(list(drawn))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("rule", ["alternating", "mixture"])
@pytest.mark.parametrize("times", [2, 3])
def test_guided_rows_share_their_member(ensemble, rule, times):
    ensemble.rule = rule
    x = torch.randn(16, 3)
    with ensemble.trajectory(16, 0):
        rows = torch.tensor(draw(ensemble, torch.cat([x] * times))).reshape(times, 16)
        assert (rows == rows[0]).all()
        with pytest.raises(ValueError, match="multiple of the trajectory's batch_size 16"):
            ensemble(torch.cat([x, x])[:31])
    if rule == "alternating":  # outside a trajectory the repetition shows it
        rows = torch.tensor(draw(ensemble, torch.cat([x] * times))).reshape(times, 16)
        assert (rows == rows[0]).all()
        assert len(set(rows[0].tolist())) > 1


def test_a_sample_keeps_its_member_in_a_smaller_batch(ensemble):
    x = torch.randn(16, 3)
    with ensemble.trajectory(16, 0):
        whole = draw(ensemble, x)
    with ensemble.trajectory(4, 0):
        assert draw(ensemble, x[:4]) == whole[:4]


@pytest.mark.parametrize("rule", ["alternating", "mixture"])
@pytest.mark.parametrize("times", [1, 2])
def test_samples_that_are_numbered_have_members_by_their_numbers(ensemble, rule, times):
    ensemble.rule = rule
    x, numbers = torch.randn(16, 3), torch.tensor([11, 3, 15, 4])
    with ensemble.trajectory(16, 0):
        whole = [draw(ensemble, x) for _ in range(3)]
    with ensemble.trajectory(4, 0, samples=numbers):
        found = [draw(ensemble, torch.cat([x[numbers]] * times)) for _ in range(3)]
    assert found == [[each[i] for i in numbers] * times for each in whole]
    with ensemble.trajectory(1, 0, samples=torch.tensor([2**40])):  # no list of all before it
        draw(ensemble, x[:1])
    for samples, message in (
        (numbers.float(), "is torch.float32"),
        (numbers[:2], r"expected int64 \[4\]"),
        (-numbers, "-15"),
    ):
        with pytest.raises(ValueError, match=message), ensemble.trajectory(4, 0, samples=samples):
            pass


def test_trajectory_ends_with_an_error_inside(ensemble):
    x = torch.randn(2, 3)
    with pytest.raises(ZeroDivisionError), ensemble.trajectory(2):
        _ = 1 / 0
    with pytest.raises(RuntimeError, match="trajectory"):
        ensemble(x)
    with pytest.raises(ValueError, match="batch_size is 0"), ensemble.trajectory(0):
        pass


@pytest.mark.parametrize("rule", ["alternating", "mixture"])
@pytest.mark.parametrize("max_fold", [None, 3])
def test_only_drawn_members_run(rule, max_fold):
    members = [randomised(mlp, seed) for seed in range(4)]
    x = torch.randn(8, 5)
    rows = []
    fold = fastens.Ensemble(members, rule, max_fold=max_fold)
    loop = fastens.Ensemble(members, rule, engine="loop")
    with torch.no_grad():
        hook = fold.network[0].register_forward_pre_hook(lambda *_: None)  # a plan calls none
        with fold.trajectory(8, 5):
            fold(x)  # held against the loop
        hook.remove()
        fold.network[0].register_forward_pre_hook(lambda _, args: rows.append(args[0].hidden.size))
        with fold.trajectory(8, 5), loop.trajectory(8, 5):
            assert relative_error(fold(x), loop(x)) < 1e-5
    assert sum(rows) == 8


def test_members_of_different_structure_take_random_rules_too():
    with pytest.warns(UserWarning, match="one by one"):
        ensemble = fastens.Ensemble([Which(0), nn.Sequential(Which(1))], "mixture")
    with ensemble.trajectory(32, 0):
        assert set(draw(ensemble, torch.randn(32, 2))) == {0, 1}


def test_autoguidance_with_a_weaker_network_of_another_structure():
    strong = randomised(mlp, 0)
    weak = randomised(lambda: nn.Linear(5, 5), 1)
    ensemble = fastens.Ensemble([strong, weak], fastens.rules.Mean([2.5, -1.5]), engine="loop")
    x = torch.randn(3, 5)
    with torch.no_grad():  # arXiv 2406.02507: weak + w (strong - weak)
        assert relative_error(ensemble(x), weak(x).lerp(strong(x), 2.5)) < 1e-5


SOLVERS = {
    "scipy": lambda f, x: solve_ivp(
        lambda t, y: f(torch.tensor(y).float().reshape(x.shape)).numpy().ravel(), (0, 1), x.ravel()
    ),
    "torchdiffeq": lambda f, x: odeint(lambda t, y: f(y), x, torch.tensor([0.0, 1.0]), method="dopri5"),
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_adaptive_solvers_refuse_what_changes_between_evaluations(solver):
    members = [randomised(mlp, seed) for seed in range(2)]
    x = torch.randn(2, 5)
    ensemble = fastens.Ensemble(members, "alternating")
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=f"{'scipy' if solver == 'scipy' else 'torchdiffeq'}.*adaptive solver"):
            SOLVERS[solver](ensemble, x)
        ensemble.rule = "mixture"
        with ensemble.trajectory(2, 0):
            SOLVERS[solver](ensemble, x)
        network = nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.5))
        with pytest.raises(RuntimeError, match="fresh dropout masks"):
            SOLVERS[solver](fastens.MCDropout(network, 2, masks="fresh"), x)
        SOLVERS[solver](fastens.MCDropout(network, 2), x)


def test_fixed_steps_take_alternating():
    ensemble = fastens.Ensemble([randomised(mlp, seed) for seed in range(2)], "alternating")
    with torch.no_grad():
        odeint(lambda t, y: ensemble(y), torch.randn(2, 5), torch.tensor([0.0, 0.5, 1.0]), method="euler")


class Refusing(nn.Linear):
    """Raises in the fold, and not by itself."""

    def __init__(self, error):
        super().__init__(4, 4)
        self.error = error

    def forward(self, x):
        h = super().forward(x)
        if type(h) is not torch.Tensor:
            raise self.error("a wrapper")
        return h


ERRORS = [RuntimeError, ValueError, TypeError, AssertionError, KeyError, AttributeError, ZeroDivisionError, OSError]


@pytest.mark.parametrize("scope", ["drawn", "assigned", "all"])
@pytest.mark.parametrize("error", ERRORS)
def test_what_fails_in_the_fold_alone_is_looped(error, scope):
    members, x = [Refusing(error) for _ in range(2)], torch.randn(3, 4)
    ensemble = fastens.Ensemble(members, "alternating" if scope == "drawn" else "mean")
    rows = torch.stack([member(x) for member in members])
    assigned = ensemble.assigned([1, 0, 1]) if scope == "assigned" else nullcontext()
    with assigned, pytest.warns(UserWarning, match="one by one"):
        found = ensemble(x)
    if scope == "drawn":
        assert float((found - rows).abs().amax(2).min(0).values.max()) < 1e-6
    else:
        expected = rows[[1, 0, 1], [0, 1, 2]] if scope == "assigned" else rows.mean(0)
        assert relative_error(found, expected) < 1e-6


SEEDS = [(np.int64(3), 3), (np.uint64(2**63), 2**63), (2**64 - 1, -1), (torch.tensor(3), 3), (-(2**63), -(2**63))]


@pytest.mark.parametrize(("given", "plain"), SEEDS, ids=repr)
def test_a_seed_is_a_whole_number_of_64_bits(given, plain):
    ensemble = fastens.Ensemble([Which(k) for k in range(5)], "mixture")
    drawn = []
    for seed in (given, plain):
        with ensemble.trajectory(40, seed):
            drawn.append(ensemble(torch.zeros(40, 1)))
    assert torch.equal(*drawn)
    shape = (np.int64(2), (3,))
    sampler = Sampler(Denoiser(randomised(Noisy, 0), VP(), "epsilon"), steps=2, eta=1.0)
    assert torch.equal(sampler(*shape, given), sampler(2, (3,), plain))
    runs = [
        fastens.sample_members(lambda n: ensemble(torch.randn(n, 1)), None, 2, ensemble=ensemble, generator=seed)
        for seed in (given, int(given))
    ]
    assert torch.equal(*runs)


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x, t):
        return self.layer(x)


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        (3.0, TypeError, "generator is a float, expected a torch.Generator, a seed"),
        ("3", TypeError, "generator is a str, expected a torch.Generator, a seed"),
        (2**64, ValueError, "the seed 18446744073709551616 has more than 64 bits"),
        (-(2**63) - 1, ValueError, "has more than 64 bits"),
    ],
)
def test_what_is_no_seed_is_named(seed, error, message, ensemble):
    with pytest.raises(error, match=message), ensemble.trajectory(4, seed):
        pass
    with pytest.raises(error, match=message):
        fastens.sample_members(lambda n: ensemble(torch.randn(n, 1)), None, 2, ensemble=ensemble, generator=seed)

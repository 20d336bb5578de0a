"""Optimizers on the stacks of an ensemble: the steps of separate training, or an error, or a warning."""

import copy

import pytest
import torch
from torch import nn, optim

import fastens
from fastens.training import check_optimizer, training_step
from tests.networks import mlp, randomised


class OfOwn(optim.Optimizer):
    """An optimizer that is none of torch's, by its update of one parameter."""

    def __init__(self, params, lr=0.1, coefficient=1.0):
        super().__init__(params, {"lr": lr})
        self.coefficient = coefficient  # which is in no state dict

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(self.update(p), alpha=group["lr"] * self.coefficient)


class Lion(OfOwn):
    def update(self, p):
        average = self.state[p].setdefault("average", torch.zeros_like(p))
        found = (0.9 * average + 0.1 * p.grad).sign()
        average.lerp_(p.grad, 0.01)
        return found


class Lars(OfOwn):
    def update(self, p):
        return p.grad * (p.norm() / p.grad.norm())


class DecayOfMatrices(OfOwn):
    def update(self, p):
        return p.grad + 0.1 * p if p.ndim > 1 else p.grad


class OfOneNorm(OfOwn):
    def update(self, p):
        return p.grad / sum(q.grad.norm() for group in self.param_groups for q in group["params"] if q.grad is not None)


class Langevin(OfOwn):
    def update(self, p):
        return p.grad + torch.randn_like(p)


class Wrapper(optim.Optimizer):
    def __init__(self, optimizer):
        self.optimizer, self.param_groups, self.defaults = optimizer, optimizer.param_groups, optimizer.defaults

    def step(self, closure=None):
        self.optimizer.step()


class OwnAdam(optim.Adam):
    pass


def ensemble_of(engine):
    members = [randomised(mlp, seed).double().train() for seed in range(3)]
    if engine == "modules":
        members[1] = nn.Sequential(members[1], nn.Tanh())
    return members, fastens.Ensemble(members, engine="fold" if engine == "fold" else "loop")


CASES = {  # what is done with it on stacks, and where each member's parameters are its own
    "Lion": (Lion, None, None),
    "coefficient": (lambda p: Lion(p, 0.01, 7.0), None, None),
    "OwnAdam": (lambda p: OwnAdam([{"params": [x], "lr": 0.01} for x in p]), None, None),
    "Lars": (Lars, TypeError, None),
    "DecayOfMatrices": (DecayOfMatrices, TypeError, None),
    "OfOneNorm": (OfOneNorm, TypeError, TypeError),
    "Adafactor": (optim.Adafactor, TypeError, None),
    "LBFGS": (optim.LBFGS, TypeError, TypeError),
    "Langevin": (Langevin, UserWarning, UserWarning),
    "Wrapper": (lambda p: Wrapper(optim.SGD(p, 0.1)), UserWarning, UserWarning),
    "other parameters": (lambda p: optim.SGD([nn.Parameter(torch.ones(3))], 0.1), ValueError, ValueError),
}
if hasattr(optim, "Muon"):
    CASES["Muon"] = (lambda p: optim.Muon([x for x in p if x.ndim == 2]), TypeError, None)


@pytest.mark.parametrize("engine", ["fold", "modules"])
@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_separate_training_or_named(name, engine, recwarn):
    make, *expected = CASES[name]
    members, ensemble = ensemble_of(engine)
    twins = [copy.deepcopy(member) for member in members]
    optimizer = make(list(ensemble.parameters()))
    expected = expected[engine == "modules"]
    before = [p.detach().clone() for p in ensemble.parameters()]
    random, x = (
        torch.get_rng_state(),
        torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    )
    if expected in (TypeError, ValueError):
        with pytest.raises(expected, match="the ensemble" if expected is ValueError else type(optimizer).__name__):
            training_step(ensemble, optimizer, lambda y: y.square(), x)
    else:
        for _ in range(2):
            check_optimizer(ensemble, optimizer)
    assert all(map(torch.equal, ensemble.parameters(), before))  # what is tried is another
    assert torch.equal(torch.get_rng_state(), random)
    assert len([w for w in recwarn if "is not known" in str(w.message)]) == (expected is UserWarning)
    if expected is not None:
        return
    for _ in range(2):
        training_step(ensemble, optimizer, lambda y: y.square(), x)
    for k, twin in enumerate(twins):
        own = make(list(twin.parameters()))
        for _ in range(2):
            own.zero_grad()
            twin(x[k]).square().mean().backward()
            own.step()
        for a, b in zip(ensemble.members[k].parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_what_is_one_object_in_all_members_is_stepped_as_any():
    shared = nn.Linear(5, 5)
    ensemble = fastens.Ensemble([nn.Sequential(shared, randomised(mlp, seed)) for seed in range(3)])
    check_optimizer(ensemble, Lars(ensemble.network[0].parameters()))
    masked = fastens.MCDropout(nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.5)), 3)
    check_optimizer(masked, Lars(masked.parameters()))


@pytest.mark.parametrize("rate", [0.1, 0.0])
def test_a_schedule_that_begins_at_zero_hides_nothing(rate):
    _, ensemble = ensemble_of("fold")
    optimizer = Lars(ensemble.parameters(), rate)
    schedule = optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.0)  # which puts itself around the optimizer's step
    with pytest.raises(TypeError, match="Lars computes a step from a whole tensor"):
        check_optimizer(ensemble, optimizer)
    assert schedule.last_epoch == 0


@pytest.mark.parametrize("name", ["Lars", "OfOneNorm", "DecayOfMatrices", "Adafactor"])
def test_of_one_member_norms_are_its_own_and_dimensions_are_not(name):
    make, member = CASES[name][0], randomised(mlp, 0).double().train()
    twin, ensemble = copy.deepcopy(member), fastens.Ensemble([member])
    optimizer = make(list(ensemble.parameters()))
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if name == "DecayOfMatrices":
        with pytest.raises(TypeError, match="whole tensor"):
            training_step(ensemble, optimizer, lambda y: y.square(), x[None])
        return
    own = make(list(twin.parameters()))
    for _ in range(2):
        training_step(ensemble, optimizer, lambda y: y.square(), x[None])
        own.zero_grad()
        twin(x).square().mean().backward()
        own.step()
    torch.testing.assert_close([p[0] for p in ensemble.parameters()], list(twin.parameters()))

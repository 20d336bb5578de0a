"""Views: one ensemble under several rules, from several threads, without copies."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import fastens
from tests.interop.test_edm import Preconditioned
from tests.networks import mlp, randomised, small_unet


def dropout_network():
    return nn.Sequential(nn.Linear(5, 16), nn.SiLU(), nn.Dropout(0.5), nn.Linear(16, 5))


def of_unets():
    return fastens.Ensemble([randomised(small_unet, k) for k in range(3)])


def looped():
    return fastens.Ensemble([randomised(mlp, k) for k in range(3)], engine="loop")


def of_two_structures():
    return fastens.Ensemble([nn.Sequential(nn.Linear(5, 5)).eval(), nn.Linear(5, 5).eval()], engine="loop")


def mlps():
    return fastens.Ensemble([randomised(mlp, k) for k in range(3)])


def masks():
    return fastens.MCDropout(randomised(dropout_network, 0), 3)


def masks_of_a_unet():
    return fastens.MCDropout(randomised(small_unet, 0), 3, p=0.2)


KINDS = [mlps, looped, of_two_structures, masks, of_unets, masks_of_a_unet]


def call(ens):
    x = torch.linspace(-1, 1, 128).view(2, 1, 8, 8) if hasattr(ens, "config") else torch.linspace(-1, 1, 10).view(2, 5)
    with torch.no_grad():
        return ens(x, 3).sample if hasattr(ens, "config") else ens(x)


def members_of(ens):
    x = torch.linspace(-1, 1, 128).view(2, 1, 8, 8) if hasattr(ens, "config") else torch.linspace(-1, 1, 10).view(2, 5)
    with torch.no_grad():
        return ens.member_outputs(x, 3) if hasattr(ens, "config") else ens.member_outputs(x)


@pytest.mark.parametrize("make", KINDS)
def test_a_view_has_another_rule_and_the_same_weights(make):
    ens = make()
    view = ens.with_rule("max_abs")
    assert type(view) is type(ens)
    assert (ens.rule.name, view.rule.name) == ("mean", "max_abs")
    assert [a is b for a, b in zip(ens.parameters(), view.parameters(), strict=True)] == [True] * len(
        [*ens.parameters()]
    )
    for _ in range(2):
        torch.testing.assert_close(call(view), members_of(ens).abs().amax(0))
        torch.testing.assert_close(call(ens), members_of(ens).mean(0))
    view.rule = "sum"
    assert (ens.rule.name, view.rule.name) == ("mean", "sum")
    with torch.no_grad():
        next(ens.parameters()).mul_(0.5)
    torch.testing.assert_close(call(view), members_of(ens).sum(0))


def test_a_view_uses_the_plans_of_its_ensemble():
    ens = mlps()
    call(ens)
    plans = ens.report().plans
    view = ens.with_rule("median")
    call(view)
    assert ens.report().plans == view.report().plans == plans


def test_threads_with_rules_of_their_own_get_their_answers():
    ens = of_unets()
    names = ["mean", "median", "max_abs", "sum"]
    expected = {name: call(ens.with_rule(name)) for name in names}
    wrong = []

    def ask(name):
        for _ in range(15):
            if not torch.allclose(call(ens.with_rule(name)), expected[name], rtol=1e-4, atol=1e-5):
                wrong.append(name)

    threads = [threading.Thread(target=ask, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("make", [mlps, masks])
def test_all_views_are_in_one_mode(make):
    ens = make()
    view = ens.with_rule("median")
    for tell, other in ((ens, view), (view, ens)):
        tell.train()
        assert ens.training
        assert view.training
        other.eval()
        assert not ens.training
        assert not view.training


def test_a_trajectory_of_the_ensemble_is_its_views():
    ens = mlps()
    view = ens.with_rule("mixture")
    with ens.trajectory(2, 7):
        first = call(view)
    with view.trajectory(2, 7):
        assert torch.equal(call(view), first)
    with pytest.raises(RuntimeError, match="inside"):
        call(view)


@pytest.mark.parametrize("make", [mlps, masks, of_unets])
def test_a_copy_of_a_view_is_an_ensemble_of_its_own(make):
    ens = make()
    view = ens.with_rule("max_abs")
    for twin in (copy.deepcopy(view), pickle.loads(pickle.dumps(view))):
        assert twin.rule == view.rule
        torch.testing.assert_close(call(twin), call(view))
        with torch.no_grad():
            next(twin.parameters()).zero_()
        assert next(ens.parameters()).abs().sum() > 0


def test_an_adapted_ensemble_keeps_its_adapter():
    ens = fastens.Ensemble([Preconditioned(k) for k in range(2)])
    view = ens.with_rule("sum")
    assert view.sigma_min == ens.sigma_min
    assert type(view) is type(ens)


def test_what_watches_one_ensemble_does_not_answer_for_its_views():
    from fastens.interop.diffusers import VarianceMaps

    ens = of_unets()
    with VarianceMaps(ens) as maps:
        view = ens.with_rule("max_abs")
        torch.testing.assert_close(call(view), members_of(ens).abs().amax(0))
        assert maps.steps == []


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        ("medain", ValueError, "did you mean 'median'"),
        (fastens.rules.Mean((0.5, 0.5)), ValueError, "one weight per member, 3"),
        (fastens.rules.NoiseDependentMean(((0.2, 0.3, 0.5),), (0.0,)), ValueError, "pass schedule="),
        (None, TypeError, "expected a name or a value"),
    ],
    ids=str,
)
def test_rules_that_do_not_fit_are_refused(rule, error, message):
    with pytest.raises(error, match=message):
        mlps().with_rule(rule)

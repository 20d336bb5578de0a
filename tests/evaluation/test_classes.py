"""Class likelihoods against Bayes' rule, for classes whose densities are known."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import fastens
from fastens.evaluation import Denoiser, class_log_likelihoods
from fastens.schedules import VP
from tests.evaluation.densities import MixtureNetwork

CENTRES = [[-0.4, 0.0], [0.4, 0.0], [0.0, 0.6]]
STD = 0.3
SCHEDULE = VP()


class Conditional(nn.Module):
    """The exact noise prediction under each class, a little moved."""

    def __init__(self, moved=0.0):
        super().__init__()
        self.centres = nn.Parameter(torch.tensor(CENTRES, dtype=torch.float64) + moved)

    def forward(self, x, network_time, class_labels):
        alpha, sigma = SCHEDULE.coefficients(SCHEDULE.time(network_time), x)
        variance = (alpha * STD) ** 2 + sigma**2
        return sigma * (x - alpha * self.centres[class_labels].to(x.dtype)) / variance


def images(num=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (num,), generator=generator)
    data = torch.tensor(CENTRES)[labels] + STD * torch.randn(num, 2, generator=generator)
    return data.double(), labels


def true(data):
    """Log-densities of each class, but for what all have alike, [N, C]."""
    gaps = data.unsqueeze(1) - torch.tensor(CENTRES, dtype=torch.float64)
    logs = -0.5 * gaps.square().sum(-1) / STD**2
    return (logs - logs.mean(1, keepdim=True)).numpy()


def conditional(members=(0.0, 0.02)):
    return Denoiser(fastens.Ensemble([Conditional(moved) for moved in members]), SCHEDULE)


def per_class():
    return [Denoiser(fastens.Ensemble([MixtureNetwork(SCHEDULE, [c], STD)]), SCHEDULE) for c in CENTRES]


@pytest.mark.parametrize("make", [lambda: (conditional((0.0,)), [0, 1, 2]), lambda: (per_class(), None)])
def test_denoising_errors_are_log_likelihoods_in_nats(make):
    model, classes = make()
    data, _ = images()
    found = class_log_likelihoods(model, data, classes, draws=400, data_range=(-9, 9))
    values = found.values - found.values.mean(1, keepdims=True)
    assert np.abs(values - true(data)).mean() < 0.15 * np.abs(true(data)).mean()
    assert (found.draws == 400).all()


def test_the_ode_gives_the_same():
    data, _ = images(12)
    exact = {"dequantisation": "none", "divergence": "exact", "method": "rk4", "steps": 24, "levels": None}
    found = class_log_likelihoods(conditional((0.0,)), data, [0, 1, 2], by="likelihood", data_range=(-9, 9), **exact)
    values = found.values - found.values.mean(1, keepdims=True)
    assert np.abs(values - true(data)).max() < 0.1
    assert found.members is None


def test_members_are_read_off_the_same_pass():
    data, labels = images(40)
    found = class_log_likelihoods(conditional(), data, [0, 1, 2], draws=30, data_range=(-9, 9))
    for k, moved in enumerate((0.0, 0.02)):
        alone = class_log_likelihoods(conditional((moved,)), data, [0, 1, 2], draws=30, data_range=(-9, 9))
        np.testing.assert_allclose(found.members[k], alone.values, rtol=1e-9)
        assert found.accuracy(labels, k).value == alone.accuracy(labels).value
    interval = found.accuracy(labels)
    assert interval.low < interval.value < interval.high


def test_results_do_not_depend_on_the_batch():
    data, _ = images(20)
    one, other = (
        class_log_likelihoods(conditional(), data, [0, 1, 2], draws=8, batch_size=size, data_range=(-9, 9)).values
        for size in (3, 512)
    )
    np.testing.assert_allclose(one, other, rtol=1e-9)


def test_classes_are_given_up_without_changing_the_answer():
    data, _ = images(60)
    options = {"draws": 200, "data_range": (-9, 9)}
    whole = class_log_likelihoods(conditional(), data, [0, 1, 2], **options)
    saved = class_log_likelihoods(conditional(), data, [0, 1, 2], give_up=3.0, stages=8, **options)
    assert saved.draws.mean() < 0.8 * 200
    assert (saved.draws[np.arange(60), saved.predicted] == 200).all()
    assert (saved.predicted == whole.predicted).mean() > 0.98


def test_the_likeliest_class_is_bayes():
    data, labels = images(300, seed=1)
    found = class_log_likelihoods(conditional((0.0,)), data, [0, 1, 2], draws=300, data_range=(-9, 9))
    best = float((true(data).argmax(1) == labels.numpy()).mean())
    assert math.isclose(found.accuracy(labels).value, best, abs_tol=0.03)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"classes": None}, ValueError, "the values of 'class_labels', one per class"),
        ({"classes": []}, ValueError, "one per class"),
        ({"by": "guess"}, ValueError, "'denoising', 'likelihood'"),
        ({"draws": 0}, ValueError, "at least one draw"),
        ({"stages": 99}, ValueError, "at least one draw"),
        ({"steps": 3}, TypeError, "options of by='likelihood'"),
    ],
)
def test_bad_input(options, error, message):
    data, _ = images(3)
    with pytest.raises(error, match=message):
        class_log_likelihoods(conditional(), data, **{"classes": [0, 1], "data_range": (-9, 9), **options})


def test_models_that_do_not_belong_together():
    data, _ = images(3)
    with pytest.raises(ValueError, match="pass either"):
        class_log_likelihoods(per_class(), data, [0, 1], data_range=(-9, 9))
    with pytest.raises(ValueError, match="expected a Denoiser, or one per class"):
        class_log_likelihoods([], data, data_range=(-9, 9))
    drawn = Denoiser(fastens.Ensemble([Conditional(), Conditional(0.1)], "alternating"), SCHEDULE)
    with pytest.raises(ValueError, match=r"take ens\.with_rule"):
        class_log_likelihoods(drawn, data, [0, 1], data_range=(-9, 9))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("member", [0, 1])
@pytest.mark.parametrize("give_up", [None, 3.0])
def test_an_error_that_is_no_number_is_not_left_out(value, member, give_up):
    members = [Conditional(), Conditional(0.02)]
    with torch.no_grad():
        members[member].centres[2, 0] = value
    model = Denoiser(fastens.Ensemble(members), SCHEDULE)
    with pytest.raises(RuntimeError, match="error of image 0 under class 2 is not finite"):
        class_log_likelihoods(model, torch.zeros(3, 2, dtype=torch.float64), [0, 1, 2], draws=4, give_up=give_up)

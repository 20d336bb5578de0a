"""Conversions between what networks predict, and rules applied in another parameterisation."""

import inspect
import itertools
import types

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

import fastens
from fastens import parameterisation, schedules
from fastens.evaluation import Denoiser
from fastens.parameterisation import PREDICTIONS, convert
from tests.networks import Scaled, randomised
from tests.tolerances import relative_error

SCHEDULES = [(schedules.VP(), 0.4), (schedules.EDM(), 1.7), (schedules.Flow(), 0.3), (schedules.Discrete.linear(), 321)]


class Network(nn.Module):
    def __init__(self, channels=2):
        super().__init__()
        self.inner = nn.Conv2d(2, channels, 3, padding=1)

    def forward(self, x, t):
        return self.inner(x).tanh() + 0.1


@pytest.fixture
def members():
    return [randomised(Network, seed) for seed in range(4)]


@pytest.fixture
def x():
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("schedule", "t"), SCHEDULES, ids=str)
@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(PREDICTIONS, 2)))
def test_round_trip_and_known_values(schedule, t, source, target):
    x0, eps = torch.randn(2, 3, 5, dtype=torch.float64).unbind(0)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x = alpha * x0 + sigma * eps
    known = {
        "epsilon": eps,
        "x0": x0,
        "v": alpha * eps - sigma * x0,
        "score": -eps / sigma,
        "flow": schedule.alpha_rate(t) * x0 + schedule.sigma_rate(t) * eps,
    }
    there = convert(known[source], x, t, schedule, source, target)
    assert relative_error(there, known[target]) < 1e-8
    assert relative_error(convert(there, x, t, schedule, target, source), known[source]) < 1e-8


def test_without_data_score_and_noise_determine_each_other():
    """At zero terminal signal-to-noise ratio alpha is 0, and x says nothing."""
    schedule, x = schedules.Flow(), torch.randn(3, 2, dtype=torch.float64)
    assert float(schedule.alpha(1.0)) == 0
    assert torch.equal(convert(x, x, 1.0, schedule, "score", "epsilon"), -x)
    assert torch.equal(convert(x, x, 1.0, schedule, "epsilon", "score"), -x)


def test_times_of_each_sample():
    schedule, x = schedules.VP(), torch.randn(3, 2, 4)
    t = torch.tensor([0.1, 0.5, 0.9])
    whole = convert(x.sin(), x, t, schedule, "epsilon", "x0")
    apart = [convert(x[i : i + 1].sin(), x[i : i + 1], t[i].item(), schedule, "epsilon", "x0") for i in range(3)]
    assert relative_error(whole, torch.cat(apart)) < 1e-5


@pytest.mark.parametrize("target", PREDICTIONS[1:])
def test_mean_commutes_and_geometric_does_not(members, x, target):
    schedule = schedules.Discrete.linear()
    for rule, same in (("mean", True), ("geometric", False)):
        plain = fastens.Ensemble(members, rule, prediction="epsilon")
        other = fastens.Ensemble(members, rule, prediction="epsilon", aggregate_in=target, schedule=schedule)
        with torch.no_grad():
            error = relative_error(other(x, 400), plain(x, 400))
        assert (error < 1e-4) is same


@pytest.mark.parametrize("time", [400, torch.tensor(400), torch.full((3,), 400)], ids=str)
@pytest.mark.parametrize("engine", ["fold", "loop"])
def test_rule_is_applied_in_the_other_parameterisation(members, x, time, engine):
    schedule = schedules.Discrete.linear()
    ensemble = fastens.Ensemble(
        members, "dominant", prediction="epsilon", aggregate_in="x0", schedule=schedule, engine=engine
    )
    with torch.no_grad():
        stack = torch.stack([member(x, time) for member in members])
        wanted = fastens.aggregate(convert(stack, x, 400, schedule, "epsilon", "x0"), "dominant")
        assert relative_error(ensemble(x, t=time), convert(wanted, x, 400, schedule, "x0", "epsilon")) < 1e-4


@pytest.mark.parametrize("rule", ["median", "dominant", "geometric"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kind", "target"), [("x0", "score"), ("epsilon", "score"), ("x0", "epsilon"), ("v", "x0")])
def test_half_precision_is_converted_wide(kind, target, dtype, rule):
    schedule, sigma = schedules.EDM(sigma_min=1e-5), 1e-5 if target == "score" else 0.5
    networks = [Scaled(scale).to(dtype) for scale in (0.5, 1.25, 1.5, 1.75)]
    x, t = torch.full((2, 3), 0.75, dtype=dtype), torch.full((2,), sigma)
    outputs = torch.stack([network(x, t) for network in networks]).detach()
    moved = convert(outputs.double(), x.double(), t, schedule, kind, target)
    expected = convert(fastens.aggregate(moved, rule), x.double(), t, schedule, target, kind)
    ensemble = fastens.Ensemble(networks, rule, prediction=kind, schedule=schedule, aggregate_in=target)
    denoised = Denoiser(ensemble).combine(outputs, ensemble.rule, x, t)
    for found in (ensemble(x, t), denoised):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("rule", ["median", "dominant", "sum"])
def test_variance_channels_are_averaged_apart(x, rule):
    members = [randomised(lambda: Network(4), seed) for seed in range(3)]
    with torch.no_grad():
        stack = torch.stack([member(x, 1) for member in members])
        output = fastens.Ensemble(members, rule)(x, 1)
    assert relative_error(output[:, :2], fastens.aggregate(stack[:, :, :2].contiguous(), rule)) < 1e-5
    assert relative_error(output[:, 2:], stack[:, :, 2:].mean(0)) < 1e-5


def test_schedule_from_a_scheduler(members, x):
    scheduler = DDIMScheduler(prediction_type="v_prediction")
    ensemble = fastens.Ensemble(members, "median", aggregate_in="epsilon", schedule=scheduler)
    given = fastens.Ensemble(
        members, "median", prediction="v", aggregate_in="epsilon", schedule=schedules.from_scheduler(scheduler)
    )
    with torch.no_grad():
        assert torch.equal(ensemble(x, 5), given(x, 5))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prediction": "noise"}, ValueError, "prediction 'noise' is unknown"),
        ({"aggregate_in": "x0"}, ValueError, "needs prediction="),
        ({"prediction": "epsilon", "aggregate_in": "x0"}, ValueError, "needs schedule="),
        ({"prediction": "epsilon", "schedule": 3}, TypeError, "schedule is a int"),
        ({"prediction": "v", "schedule": DDIMScheduler()}, ValueError, "prediction_type is 'epsilon'"),
    ],
)
def test_contradictions_are_named(members, options, error, message):
    with pytest.raises(error, match=message):
        fastens.Ensemble(members, **options)


def test_flow_scheduler_gives_a_flow():
    from fastens.parameterisation import resolve

    assert isinstance(resolve("flow", None, FlowMatchEulerDiscreteScheduler())[2], schedules.Flow)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(3, 3, 1)

    def forward(self, x, t):
        return self.inner(x)


ZERO_SNR = schedules.Discrete((0.9, 0.5, 0.1, 0.0))
UNDETERMINED = [  # schedule, prediction, aggregate_in, a time at which the one does not say the other
    (schedules.Flow(), "flow", "epsilon", 1.0),
    (schedules.Flow(), "flow", "score", 1.0),
    (schedules.Flow(), "flow", "x0", 0.0),
    (ZERO_SNR, "v", "epsilon", 3),
    (ZERO_SNR, "epsilon", "x0", 3),
    (ZERO_SNR, "x0", "score", torch.tensor([1, 3])),
]


@pytest.mark.parametrize(("schedule", "kind", "target", "t"), UNDETERMINED, ids=str)
def test_a_time_at_which_the_input_does_not_say_the_other_is_an_error(schedule, kind, target, t):
    networks = [randomised(Linear, seed) for seed in range(3)]
    said = {"prediction": kind, "schedule": schedule}
    ensemble = fastens.Ensemble(networks, "dominant", aggregate_in=target, **said)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with pytest.raises(
            ValueError, match=r"noise alone, or data alone.*take aggregate_in= one of \[(.*)\]"
        ) as error:
            ensemble(x, t)
        remedies = error.value.args[0].partition("one of [")[2].partition("]")[0].replace("'", "").split(", ")
        assert target not in remedies
        for other in remedies:
            assert fastens.Ensemble(networks, "dominant", aggregate_in=other, **said)(x, t).isfinite().all()
        assert ensemble(x, 0.5 if isinstance(schedule, schedules.Flow) else 1).isfinite().all()
        assert torch.equal(ensemble.with_rule("mean")(x, t), fastens.Ensemble(networks, **said)(x, t))


@pytest.mark.parametrize(
    ("forward", "named"),
    [
        (lambda x, labels: x, ()),
        (lambda x, noise, labels: x, ()),
        (lambda x, noise, labels: x, ("labels", "noise")),
        (lambda x, labels, timestep: x, ("timestep",)),
        (lambda x, labels, sigma: x, ("sigma", "labels")),
    ],
)
def test_labels_are_classes_behind_a_time(forward, named):
    """Arguments that are named are given by name, in the order of the call."""
    x, time, classes = torch.randn(2, 3), torch.tensor([0.5, 0.25]), torch.tensor([1, 2])
    names = list(inspect.signature(forward).parameters)
    values = {"x": x, "labels": classes if len(names) > 2 else time} | {
        n: time for n in names if n not in ("x", "labels")
    }
    args, kwargs = [values[n] for n in names if n not in named], {n: values[n] for n in named}
    called = types.SimpleNamespace(batch=x, leaves=[*args, *kwargs.values()])
    assert parameterisation.time_of(forward, called, tuple(args), kwargs) is time

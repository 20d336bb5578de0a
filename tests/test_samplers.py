"""Whole runs: against the sampler of the evaluation, against exact solutions, and recorded against step by step."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastens
from fastens import schedules
from fastens.evaluation import Denoiser, sample
from fastens.reference.normal import normal
from fastens.samplers import METHODS, Sampler
from tests.evaluation.densities import MixtureNetwork
from tests.tolerances import NETWORK, relative_error

SCHEDULES = {
    "vp": schedules.VP(),
    "flow": schedules.Flow(eps=0.05),  # nearer to the noise, data divided by its share is rounding
    "edm": schedules.EDM(0.02, 20.0),
    "ve": schedules.VE(0.01, 10.0),
    "discrete": schedules.Discrete.linear(num_steps=200),
}
MEANS = [[0.5, -0.3, 0.1], [-0.6, 0.4, 0.2]]


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x, t):
        return self.layer(x).tanh() + 0.1 * t.reshape(-1, 1).to(x.dtype).sin()


def ensemble(rule="mean", dtype=torch.float32):
    torch.manual_seed(0)
    return fastens.Ensemble([Network().to(dtype) for _ in range(3)], rule).eval()


@pytest.mark.parametrize("clip", [None, (-1.0, 1.0)])
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_is_the_sampler_of_the_evaluation(name, eta, clip):
    denoiser = Denoiser(ensemble(), SCHEDULES[name], "epsilon")
    found = Sampler(denoiser, steps=7, eta=eta, clip=clip)(4, (3,), seed=5)
    expected = sample(denoiser, 4, (3,), steps=7, eta=eta, clip=clip, seed=5)
    assert found.dtype == torch.float32
    assert relative_error(found, expected) <= NETWORK[torch.float32]


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "score", "flow"])
@pytest.mark.parametrize("method", METHODS)
def test_every_prediction_gives_the_same_samples(method, prediction):
    schedule = SCHEDULES["flow"]
    found, expected = (
        Sampler(Denoiser(MixtureNetwork(schedule, MEANS, 0.2, kind), schedule, kind), method, steps=9)(5, (3,))
        for kind in (prediction, "epsilon")
    )
    assert relative_error(found, expected) <= 1e-10  # float64, and divisions by the noise that is left


@pytest.mark.parametrize("name", ["vp", "flow", "edm"])
def test_methods_converge_at_their_order(name):
    schedule = SCHEDULES[name]
    denoiser = Denoiser(MixtureNetwork(schedule, [[0.4, -0.2, 0.1]], 0.3), schedule)
    start = schedule.prior_std * normal(0, 0, torch.arange(6), (3,)).double()
    first, end = schedule.t_prior, schedule.t_data
    deviation, alphas = zip(
        *(
            ((float(schedule.alpha(t)) ** 2 * 0.3**2 + float(schedule.sigma(t)) ** 2) ** 0.5, float(schedule.alpha(t)))
            for t in (first, end)
        ),
        strict=True,
    )
    mean = torch.tensor([0.4, -0.2, 0.1], dtype=torch.float64)
    exact = alphas[1] * mean + deviation[1] / deviation[0] * (start - alphas[0] * mean)
    errors = {
        method: [relative_error(Sampler(denoiser, method, steps=n)(6, (3,)), exact) for n in (160, 320)]
        for method in ("euler", "heun")
    }
    assert errors["euler"][0] / errors["euler"][1] == pytest.approx(2, rel=0.2)
    assert errors["heun"][0] / errors["heun"][1] == pytest.approx(4, rel=0.35)
    assert errors["heun"][1] < errors["euler"][1]


@torch.no_grad()
def test_heun_ends_without_noise_by_eulers_step():
    schedule = SCHEDULES["edm"]
    denoiser = Denoiser(MixtureNetwork(schedule, MEANS, 0.2, "x0"), schedule, "x0")
    times = [20.0, 5.0, 1.0, 0.2, 0.0]
    found = Sampler(denoiser, "heun", times=times)(4, (3,))
    x = 20 * normal(0, 0, torch.arange(4), (3,)).double()
    for now, then in itertools.pairwise(times):  # Karras et al., algorithm 1
        d = (x - denoiser.predict(x, torch.full((4,), now, dtype=torch.float64))) / now
        moved = x + (then - now) * d
        if then > 0:
            d2 = (moved - denoiser.predict(moved, torch.full((4,), then, dtype=torch.float64))) / then
            moved = x + (then - now) * (d + d2) / 2
        x = moved
    assert relative_error(found, x) <= 1e-10


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "score", "flow"])
@pytest.mark.parametrize("schedule", [schedules.Flow(), schedules.Flow(data_at=1), schedules.EDM()], ids=repr)
def test_heun_asks_no_network_where_there_is_no_noise(schedule, prediction):
    asked = []

    class Noted(Network):
        def forward(self, x, t):
            asked.append(float(t[0]))
            return super().forward(x, t)

    first, middle, last = (0.1, 0.5, 1.0) if getattr(schedule, "data_at", 0) else (0.9, 0.5, 0.0)
    Sampler(Denoiser(Noted().eval(), schedule, prediction), "heun", times=[first, middle, last])(2, (3,))
    assert asked == pytest.approx([first, middle, middle])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_times_lead_from_noise_to_data(name, method):
    schedule = SCHEDULES[name]
    share = torch.tensor([0.8, 0.8, 0.3, 0.5, 0.1], dtype=torch.float64)
    times = schedule.t_data + share * (schedule.t_prior - schedule.t_data)
    denoiser = Denoiser(MixtureNetwork(schedule, MEANS, 0.4), schedule)
    with pytest.raises(ValueError, match=f"times go from {times[2]:g} to {times[3]:g}, where there is more noise"):
        Sampler(denoiser, method, times=times)
    Sampler(denoiser, method, times=times[[0, 1, 2, 4]])


@pytest.mark.parametrize("rule", ["mixture", "alternating", "median"])
def test_random_rules_draw_from_the_seed(rule):
    sampler = Sampler(Denoiser(ensemble(rule), SCHEDULES["vp"]), steps=5)
    first, again, other = (sampler(6, (3,), seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def dropping(masks):
    torch.manual_seed(0)
    return fastens.MCDropout(nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 3)), 3, masks=masks)


class Timeless(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, t):
        return self.model(x)

    def trajectory(self, *args, **kwargs):
        return self.model.trajectory(*args, **kwargs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "model",
    [
        *(lambda rule=rule: ensemble(rule) for rule in ("mean", "mixture", "alternating")),
        lambda: Timeless(dropping("fixed")),
        lambda: Timeless(dropping("fresh")),
    ],
    ids=["mean", "mixture", "alternating", "fixed masks", "fresh masks"],
)
def test_a_sample_depends_on_the_seed_and_its_number_alone(model, method):
    sampler = Sampler(Denoiser(model(), SCHEDULES["vp"]), method, steps=5)
    whole = sampler(8, (3,), 3)
    for numbers in ([0, 1, 2, 3], [4, 5, 6, 7], [6], [7, 2, 5]):
        assert relative_error(sampler(torch.tensor(numbers), (3,), 3), whole[numbers]) <= NETWORK[torch.float32]
    assert torch.equal(sampler(torch.arange(8), (3,), 3), whole)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_begins_with_the_noise_of_its_first_time(name):
    schedule = SCHEDULES[name]
    denoiser = Denoiser(MixtureNetwork(schedule, MEANS, 0.2, "x0"), schedule, "x0")
    t = schedule.t_prior + 0.3 * (schedule.t_data - schedule.t_prior)
    times = torch.tensor([t, t + 0.1 * (schedule.t_data - schedule.t_prior)], dtype=torch.float64)
    std = float(schedule.sigma(t)) if name in ("edm", "ve") else 1.0  # where the data stays, the noise is all there is
    x = std * normal(0, 0, torch.arange(4), (3,)).double()
    (alpha, sigma), (alpha1, sigma1) = (map(float, (schedule.alpha(at), schedule.sigma(at))) for at in times)
    data = denoiser.at(x, times[0])
    expected = alpha1 * data + sigma1 * (x - alpha * data) / sigma
    assert relative_error(Sampler(denoiser, times=times)(4, (3,)), expected) <= 1e-6


def test_a_half_precision_network_keeps_its_state_in_float32():
    half = Sampler(Denoiser(ensemble(dtype=torch.bfloat16), SCHEDULES["vp"]), steps=20)(3, (3,))
    single = Sampler(Denoiser(ensemble(), SCHEDULES["vp"]), steps=20)(3, (3,))
    assert half.dtype == torch.float32
    assert relative_error(half, single) <= 5e-2  # rounded outputs, twenty of them


def test_the_seed_may_be_a_tensor():
    numbers = torch.arange(3)
    for seed in (0, 12345, 2**63 + 5, 2**64 - 1):
        held = torch.full((), seed - 2**64 if seed >= 2**63 else seed)
        assert torch.equal(normal(held, 4, numbers, (5,)), normal(seed, 4, numbers, (5,)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: Sampler(d, "dpm"), "method 'dpm' is unknown"),
        (lambda d: Sampler(d, steps=0), "steps is 0"),
        (lambda d: Sampler(d, times=[1.0]), r"times is \[1\]"),
        (lambda d: Sampler(d, eta=2.0), "eta is 2"),
        (lambda d: Sampler(d, "heun", eta=1.0), "eta, clip and to_data are of 'ddim'"),
        (
            lambda d: Sampler(Denoiser(d.model, schedules.EDM(), "x0"), "euler", times=[0.0, 0.0]),
            "no finite coeff",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(Denoiser(ensemble(), SCHEDULES["vp"]))


def test_refusals():
    denoiser = Denoiser(ensemble(), SCHEDULES["vp"])
    with pytest.raises(RuntimeError, match="is on cpu, expected a CUDA device"):
        Sampler(denoiser).capture(2, (3,))
    with pytest.raises(ValueError, match="draws members"):
        Sampler(Denoiser(ensemble("alternating"), SCHEDULES["vp"]))._record(2, (3,))
    denoiser.model.train()
    with pytest.raises(ValueError, match="training mode"):
        Sampler(denoiser)._record(2, (3,))
    dropped = fastens.MCDropout(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).eval(), 3, masks="fresh").eval()
    with pytest.raises(ValueError, match="fresh masks"):
        Sampler(Denoiser(dropped, SCHEDULES["vp"]))._record(2, (3,))


def test_a_graph_being_recorded_holds_no_replay_of_another(monkeypatch):
    model = ensemble()
    model.__dict__["_recorded"] = {"any": SimpleNamespace(is_current=lambda _: True)}
    monkeypatch.setattr(type(model), "_signature", lambda *_: "any")
    with torch.no_grad():
        assert model._recorded_step((), {}) is not None
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert model._recorded_step((), {}) is None

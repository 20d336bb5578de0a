"""Schedules against closed forms, finite differences and diffusers' schedulers."""

import copy
import importlib
import json
import math
import pickle

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from fastens import schedules
from fastens.schedules import EDM, VE, VP, Discrete, Flow, SubVP

ALL = [VP(), SubVP(), VE(), EDM(), Flow(), Flow(data_at=1), Discrete.linear(), VP(0.1, 8.0).discretised(50)]
ALL += [EDM(0.3, 500.0, atan_time=True), EDM(log_time=True)]
INSIDE = [0.05, 0.3, 0.5, 0.81, 0.97]


def identity(schedule):
    return repr(schedule)[:40]


def times(schedule):
    return schedule.t_data + torch.tensor(INSIDE, dtype=torch.float64) * (schedule.t_prior - schedule.t_data)


@pytest.mark.parametrize("schedule", ALL, ids=identity)
def test_rates_are_derivatives(schedule):
    t = times(schedule)
    h = 1e-5 * abs(schedule.t_prior - schedule.t_data)
    for value, rate in ((schedule.alpha, schedule.alpha_rate), (schedule.sigma, schedule.sigma_rate)):
        numeric = (value(t + h) - value(t - h)) / (2 * h)
        assert torch.allclose(rate(t), numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("schedule", [s for s in ALL if s != Flow(data_at=1)], ids=identity)
def test_sde_has_the_marginals(schedule):
    """The moments of dx = f x dt + g dw, integrated, are alpha and sigma."""
    start, stop = times(schedule)[[0, -1]].tolist()

    def moments(t, y):
        f, g = float(schedule.drift(t)), float(schedule.diffusion(t))
        return [f * y[0], 2 * f * y[1] + g * g]

    y0 = [float(schedule.alpha(start)), float(schedule.sigma(start)) ** 2]
    y1 = solve_ivp(moments, (start, stop), y0, rtol=1e-8, atol=1e-10).y[:, -1]
    assert np.allclose(y1, [float(schedule.alpha(stop)), float(schedule.sigma(stop)) ** 2], rtol=1e-5, atol=1e-7)


def test_closed_forms():
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    beta = 0.1 + 19.9 * t
    integral = 0.1 * t + 19.9 * t**2 / 2
    assert torch.allclose(VP().diffusion(t), beta.sqrt())
    assert torch.allclose(VP().beta(t), beta)
    assert torch.allclose(VP().alpha(t).square() + VP().sigma(t).square(), torch.ones(2, dtype=torch.float64))
    assert torch.allclose(SubVP().diffusion(t), (beta * (1 - (-2 * integral).exp())).sqrt())
    assert torch.allclose(VE().diffusion(t), VE().sigma(t) * math.sqrt(2 * math.log(5000)))
    assert torch.allclose(EDM().diffusion(t), (2 * t).sqrt())
    assert torch.allclose(Flow().log_snr(t), 2 * ((1 - t) / t).log())
    assert VE().sigma(1.0).item() == pytest.approx(50)
    assert (VE().prior_std, EDM().prior_std, VP().prior_std) == (50, 80, 1)


def test_discrete_is_the_continuous_process_in_the_limit():
    steps = VP().discretised(1000)
    assert steps == Discrete.linear()
    fine = VP().discretised(100_000)
    for t in (0.1, 0.4, 0.6):
        assert float(fine.alpha(t * 100_000 - 1)) == pytest.approx(float(VP().alpha(t)), rel=1e-3)


def test_discrete_is_exact_at_steps_and_smooth_between():
    schedule = Discrete.linear()
    kept = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    whole = torch.arange(1000)
    assert torch.equal(schedule.alpha(whole), torch.tensor(schedule.alphas_cumprod, dtype=torch.float64).sqrt())
    assert torch.allclose(schedule.alpha(whole).square(), kept, rtol=1e-12)
    between = torch.linspace(0, 999, 9991, dtype=torch.float64)
    assert (schedule.alpha(between).diff() < 0).all()
    rates = schedule.drift(between)
    assert (rates.diff().abs() < 2e-6).all()  # beta falls by 2e-6 in a tenth of a step, times one half
    assert float(schedule.alpha(torch.tensor(2000))) == float(schedule.alpha(999))


def test_zero_terminal_snr():
    schedule = Discrete((0.9, 0.5, 0.1, 0.0))
    assert float(schedule.alpha(3)) == 0
    assert float(schedule.sigma(3)) == 1
    assert torch.isfinite(schedule.drift(torch.linspace(0, 3, 31))).all()
    assert (schedule.alpha(torch.linspace(0, 3, 31)).diff() < 0).all()


def test_the_noise_falls_to_the_last_step_of_zero_snr():
    """A table that falls below 2^-24 before it ends in zero is followed there: its rates are its steps'."""
    values = [4.0**-i for i in range(1, 14)]
    schedule = schedules.Discrete((*values, 0.0))
    steps = torch.arange(1.0, 13.0, dtype=torch.float64)
    assert torch.allclose(schedule.drift(steps), torch.full_like(steps, -math.log(2)), rtol=1e-9)
    assert torch.equal(schedule.alpha(steps), torch.tensor(values, dtype=torch.float64)[1:].sqrt())
    assert schedule.alpha(13) == 0


@pytest.mark.parametrize(
    "kind", ["DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_diffusers_schedulers(kind, betas):
    scheduler = getattr(importlib.import_module("diffusers"), kind)(beta_schedule=betas)
    schedule = schedules.from_scheduler(scheduler)
    t = torch.tensor([0, 1, 17, 500, 998, 999])
    x, noise = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0)).unbind(0)
    alpha, sigma = schedule.coefficients(t, x)
    assert alpha.shape == (6, 1)
    assert alpha.dtype == torch.float32
    assert torch.allclose(alpha.flatten().double().square(), scheduler.alphas_cumprod[t].double(), rtol=1e-4, atol=1e-7)
    if kind.startswith("DD"):
        assert torch.allclose(alpha * x + sigma * noise, scheduler.add_noise(x, noise, t), atol=1e-5)


def test_diffusers_zero_terminal_snr():
    from diffusers import DDIMScheduler

    schedule = schedules.from_scheduler(DDIMScheduler(rescale_betas_zero_snr=True))
    assert float(schedule.alpha(999)) == 0


def test_diffusers_flow():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    schedule = schedules.from_scheduler(scheduler)
    assert torch.allclose(schedule.sigma(schedule.time(scheduler.timesteps)), scheduler.sigmas[:-1].double(), atol=1e-6)


def test_diffusers_edm():
    from diffusers import EDMEulerScheduler

    scheduler = EDMEulerScheduler(sigma_min=0.01, sigma_max=50.0)
    scheduler.set_timesteps(10)
    schedule = schedules.from_scheduler(scheduler)
    assert schedule == EDM(0.01, 50.0, log_time=True)
    sigmas = scheduler.sigmas[:-1].double()
    assert torch.allclose(schedule.network_time(sigmas), scheduler.timesteps.double(), atol=1e-6)
    assert torch.allclose(schedule.time(scheduler.timesteps), sigmas, rtol=1e-4)


def test_diffusers_ve():
    from diffusers import ScoreSdeVeScheduler

    scheduler = ScoreSdeVeScheduler(num_train_timesteps=100)
    schedule = schedules.from_scheduler(scheduler)
    t = torch.linspace(0, 1, 100, dtype=torch.float64)
    assert torch.allclose(schedule.sigma(t), scheduler.discrete_sigmas.double(), rtol=1e-4)
    assert torch.allclose(schedule.time(schedule.network_time(t)), t)


def test_unknown_scheduler_is_refused():
    from diffusers import VQDiffusionScheduler

    with pytest.raises(ValueError, match="VQDiffusionScheduler"):
        schedules.from_scheduler(VQDiffusionScheduler(num_vec_classes=8))


@pytest.mark.parametrize("schedule", ALL, ids=identity)
def test_values_survive(schedule):
    assert schedules.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule
    for twin in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert twin == schedule
        assert hash(twin) == hash(schedule)
    t = times(schedule)
    assert torch.allclose(schedule.time(schedule.network_time(t)), t)
    assert schedule.alpha(t.reshape(1, 5)).shape == (1, 5)
    assert schedule.alpha(t.float()).dtype == torch.float64
    assert float(schedule.log_snr(schedule.t_data)) > float(schedule.log_snr(schedule.t_prior))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VP(2.0, 1.0), "beta_min"),
        (lambda: VE(0.0, 1.0), "sigma_min"),
        (lambda: EDM(2.0, 1.0), "sigma_min"),
        (lambda: EDM(log_time=True, atan_time=True), "one of them"),
        (lambda: Flow(data_at=2), "data_at"),
        (lambda: VP(time_scale=0.0), "time_scale"),
        (lambda: Discrete((0.9, 0.8)), "at least 3"),
        (lambda: Discrete((0.9, 0.95, 0.8)), r"alphas_cumprod\[1\]"),
        (lambda: Discrete((0.9, float("nan"), 0.8)), r"alphas_cumprod\[1\]"),
        (lambda: schedules.from_dict({"schedule": "vq"}), "unknown"),
        (lambda: schedules.from_dict({"schedule": "vp", "gamma": 1}), "gamma"),
    ],
)
def test_bad_parameters(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("schedule", [Discrete.linear(), VP(), Flow(), EDM()], ids=repr)
def test_a_time_that_is_nan_has_no_noise_level(schedule):
    """Schedulers of diffusers give such timesteps where their tables overflow; as an index it would stop a device."""
    noise = schedule.sigma(schedule.time(torch.tensor([float("nan"), 0.5])))
    assert noise.isnan().tolist() == [True, False]

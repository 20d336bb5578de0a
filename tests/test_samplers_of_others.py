"""Whole runs against the samplers of diffusers, on their own timesteps, and against published loops."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastens import samplers, schedules
from fastens.evaluation import Denoiser, sample
from fastens.reference.normal import normal
from fastens.samplers import Sampler
from tests.tolerances import relative_error

diffusers = pytest.importorskip("diffusers")

SHAPE, SAMPLES, SEED = (3, 4, 4), 5, 11
EXACT = 2e-5  # of runs in float32, whose coefficients diffusers computes in float32


class Network(nn.Module):
    """Smooth in x and in a time of 0 to 1000."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.mix = nn.Parameter(torch.randn(3, 3, generator=generator) / 2)

    def forward(self, x, t):
        mixed = torch.einsum("oc,bchw->bohw", self.mix, x)
        return 0.8 * x + (mixed + (t.reshape(-1, 1, 1, 1) / 300).to(x.dtype).cos()).tanh() / 3


def start():
    return normal(SEED, 0, torch.arange(SAMPLES), SHAPE)


@torch.no_grad()
def diffusers_run(scheduler, network, eta):
    """The loop of diffusers' pipelines; its noise, where it draws some, is that of our steps."""
    x = start() * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        options = {}
        if isinstance(
            scheduler, diffusers.DDIMScheduler
        ):  # guided-diffusion's, and ours, find the noise in clipped data
            options = {"eta": eta, "use_clipped_model_output": scheduler.config.clip_sample}
        if eta:
            options["variance_noise"] = normal(SEED, i + 1, torch.arange(SAMPLES), SHAPE)
        output = network(scheduler.scale_model_input(x, t), t.expand(SAMPLES))
        x = scheduler.step(output, t, x, **options).prev_sample
    return x


def denoiser_of(scheduler, network, prediction="epsilon"):
    return Denoiser(network, schedules.Discrete(tuple(scheduler.alphas_cumprod.double().tolist())), prediction)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(
    ("theirs", "ours"), [("epsilon", "epsilon"), ("sample", "x0"), ("v_prediction", "v")], ids=["epsilon", "x0", "v"]
)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_on_the_timesteps_of_diffusers(spacing, theirs, ours, eta, clip):
    scheduler = diffusers.DDIMScheduler(1000, timestep_spacing=spacing, prediction_type=theirs, clip_sample=clip)
    scheduler.set_timesteps(20)
    network, times = Network(), scheduler.timesteps
    sampler = Sampler(
        denoiser_of(scheduler, network, ours), times=times, eta=eta, clip=(-1.0, 1.0) if clip else None, to_data=True
    )
    assert sampler.num_steps == len(times)
    assert relative_error(sampler(SAMPLES, SHAPE, SEED), diffusers_run(scheduler, network, eta)) <= EXACT


# Its steps may end where the next does not begin, or short of the data: its times alone do not say where.
@pytest.mark.parametrize("config", [
    {"timestep_spacing": "linspace"}, {"timestep_spacing": "trailing"}, {"set_alpha_to_one": False},
    {"steps_offset": 1, "set_alpha_to_one": False, "beta_schedule": "scaled_linear"}, {"clip_sample": True},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    {"clip_sample": True, "timestep_spacing": "linspace", "set_alpha_to_one": False, "prediction_type": "sample"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [7, 20])
def test_the_steps_of_a_ddim_scheduler(config, eta, steps):
    scheduler = diffusers.DDIMScheduler(1000, **{"clip_sample": False, **config})
    scheduler.set_timesteps(steps)
    network, clip = Network(), (-1.0, 1.0) if config.get("clip_sample") else None
    sampler = Sampler(Denoiser(network, scheduler), times=scheduler, eta=eta, clip=clip)
    assert relative_error(sampler(SAMPLES, SHAPE, SEED), diffusers_run(scheduler, network, eta)) <= EXACT


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: diffusers.DDIMScheduler(), {}, r"clip=\(-1.0, 1.0\)"),
        (lambda: diffusers.DDIMScheduler(thresholding=True, clip_sample=False), {}, "thresholding"),
        (
            lambda: diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False),
            {},
            "prediction is 'epsilon'",
        ),
        (lambda: diffusers.DDIMScheduler(beta_end=0.01, clip_sample=False), {}, "schedule is"),
        (lambda: diffusers.DDIMScheduler(clip_sample=False), {"to_data": True}, "without to_data"),
        (lambda: diffusers.DDIMScheduler(clip_sample=False), {"method": "euler"}, "of 'ddim'"),
        (lambda: diffusers.DDPMScheduler(clip_sample=False), {}, "DDPMScheduler, expected DDIMScheduler"),
    ],
)
def test_a_scheduler_whose_steps_the_sampler_would_not_take_is_refused(make, options, message):
    scheduler = make()
    denoiser = Denoiser(Network(), schedules.Discrete.linear(), "epsilon")
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match=message):
        Sampler(denoiser, times=scheduler, **options)


def test_a_scheduler_without_steps_is_refused():
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    with pytest.raises(ValueError, match=r"call its set_timesteps\(...\) first"):
        Sampler(Denoiser(Network(), scheduler), times=scheduler)


@pytest.mark.parametrize("prediction", ["v", "x0", "flow"])
@pytest.mark.parametrize("method", ["ddim", "euler"])
def test_a_run_begins_without_any_data(method, prediction):
    """Zero terminal signal-to-noise ratio: what the data is cannot be told by dividing by their share."""
    schedule = schedules.Flow() if prediction == "flow" else schedules.Discrete((0.9, 0.5, 0.1, 0.0))
    times = [1.0, 0.5, 0.1] if prediction == "flow" else [3, 2, 1, 0]
    denoiser = Denoiser(Network(), schedule, prediction)
    assert torch.isfinite(Sampler(denoiser, method, times=times)(SAMPLES, SHAPE, SEED)).all()
    if method == "ddim" and prediction != "flow":
        assert torch.isfinite(sample(denoiser, 3, SHAPE, steps=3)).all()
    with pytest.raises(ValueError, match="no data or no noise there"):
        Sampler(Denoiser(Network(), schedule, "epsilon"), method, times=times)


def test_euler_of_diffusers_is_ddim_in_other_variables():
    """diffusers' x is ours divided by alpha, its Euler steps in sigma / alpha are DDIM's without noise."""
    scheduler = diffusers.EulerDiscreteScheduler(1000, timestep_spacing="leading")
    scheduler.set_timesteps(20)
    network = Network()
    sampler = Sampler(denoiser_of(scheduler, network), times=scheduler.timesteps, to_data=True)
    assert relative_error(sampler(SAMPLES, SHAPE, SEED), diffusers_run(scheduler, network, 0.0)) <= EXACT


@torch.no_grad()
def test_heun_is_that_of_edm_on_its_own_times():
    """Karras et al., arXiv 2206.00364, algorithm 1 without churn, on the 18 noise levels of rho = 7."""
    n, rho, low, high = 18, 7, 0.002, 80.0
    levels = torch.arange(n, dtype=torch.float64) / (n - 1)
    sigmas = (high ** (1 / rho) + levels * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
    network = Network().double()
    denoiser = Denoiser(network, schedules.EDM(low, high), "x0")
    found = Sampler(denoiser, "heun", times=sigmas)(SAMPLES, SHAPE, SEED)
    x = high * start().double()
    for now, then in itertools.pairwise(sigmas):
        d = (x - denoiser.predict(x, denoiser.schedule.network_time(now).expand(SAMPLES))) / now
        moved = x + (then - now) * d
        if then > 0:
            second = (moved - denoiser.predict(moved, denoiser.schedule.network_time(then).expand(SAMPLES))) / then
            moved = x + (then - now) * (d + second) / 2
        x = moved
    assert relative_error(found, x) <= 1e-10


class Counted(TorchDispatchMode):
    """Operations that compute, outside of the network and of the step's op; views are none."""

    def __init__(self):
        super().__init__()
        self.names, self.inside = [], False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.inside and not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("method", "options", "per_step"),
    [
        ("ddim", {}, ["sampler_step"]), ("ddim", {"clip": (-1.0, 1.0)}, ["sampler_step"]),
        ("ddim", {"eta": 1.0}, ["arange", "add", "sampler_step"]), ("euler", {}, ["sampler_step"]),
        ("heun", {}, ["sampler_step", "sampler_step"]),
    ],
)  # fmt: skip
@torch.no_grad()
def test_a_step_is_one_kernel_beside_the_network(method, options, per_step, monkeypatch):
    network, counted, step = Network(), Counted(), samplers.sampler_step

    def named(*args, **kwargs):
        counted.names.append("sampler_step")
        counted.inside = True  # the reference, which a GPU does not run, is made of many
        result = step(*args, **kwargs)
        counted.inside = False
        return result

    monkeypatch.setattr(samplers, "sampler_step", named)
    network.register_forward_pre_hook(lambda *_: setattr(counted, "inside", True))
    network.register_forward_hook(lambda *_: setattr(counted, "inside", False))
    sampler = Sampler(Denoiser(network, schedules.VP()), method, steps=6, **options)
    x = start()
    given = (*sampler._rows(0, 4, x), torch.arange(SAMPLES), torch.tensor(SEED), torch.tensor(0), False)
    with counted:
        sampler._run(x, *given)
    steps, before = per_step[-1:] * (4 * per_step.count("sampler_step")), per_step[: -per_step.count("sampler_step")]
    assert counted.names == [*before, *steps]

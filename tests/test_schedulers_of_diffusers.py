"""Every scheduler of the installed diffusers: its own ``step`` takes an output for what we say it is, or it is refused.

The network is an oracle: it knows the data, finds the noise in its own input by what we read from the scheduler, and
says both as the scheduler is said to want it. Then whatever the method, the run ends in that data.
"""

import dataclasses
import inspect
import itertools
import warnings

import diffusers
import diffusers.schedulers
import pytest
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from fastens.parameterisation import combination, path_input
from fastens.schedules import prediction_of

CLASSES = {
    name: cls
    for name in dir(diffusers.schedulers)
    if inspect.isclass(cls := getattr(diffusers.schedulers, name)) and issubclass(cls, SchedulerMixin)
    if cls is not SchedulerMixin
}
NEEDED = {
    "mask_token_id": 5,
    "num_vec_classes": 8,
    "schedule_mode": "log",
    "noise_mode": "tan",
    "tsr_k": 1.0,
    "tsr_sigma": 1.0,
}
REFUSED = """AmusedScheduler BlockRefinementScheduler CMStochasticIterativeScheduler ConsistencyDecoderScheduler
    DDIMInverseScheduler DDPMWuerstchenScheduler DPMSolverMultistepInverseScheduler DiscreteDDIMScheduler
    EntropyBoundScheduler FlowMapEulerDiscreteScheduler HeliosDMDScheduler HeliosScheduler IPNDMScheduler
    KarrasVeScheduler PiflowScheduler RFD4ProteinaScheduler SCMScheduler ScoreSdeVpScheduler
    VQDiffusionScheduler""".split()
X0 = torch.tensor([[[[0.8, -0.3], [0.5, -0.9]]]], dtype=torch.float64).expand(1, 3, 2, 2)


def made(name, **config):
    taken = inspect.signature(CLASSES[name].__init__).parameters
    if "kwargs" not in taken and not config.keys() <= taken.keys():
        pytest.skip(f"{name} has no {', '.join(config.keys() - taken.keys())}")
    config = {**{k: v for k, v in {**NEEDED, "clip_sample": False}.items() if k in taken}, **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CLASSES[name](**config)


def oracle(prediction, given, network_time):
    """The output of a network that knows the data; given: its input."""
    schedule = prediction.schedule
    t = schedule.time(torch.as_tensor(network_time).double())
    x = path_input(prediction, given.double(), t, given.shape[1])
    noise = (x - schedule.alpha(t) * X0) / schedule.sigma(t)
    noise = torch.where(schedule.sigma(t) == 0, 0.0, noise)  # asked at a time that was rounded to the data itself
    of_data, of_noise = combination(prediction.kind, schedule, t, prediction.sigma_data)
    return (of_data * X0 + of_noise * noise).to(given.dtype)


@torch.no_grad()
def run(scheduler, prediction, steps, network=oracle):
    """The scheduler's own loop as its pipelines write it: where it ends, and the data that it finds on the way."""
    name = type(scheduler).__name__
    generator = torch.Generator().manual_seed(0)
    options = {"mu": 0.7} if scheduler.config.get("use_dynamic_shifting") else {}
    options |= {"jump_length": 1, "jump_n_sample": 1} if name == "RePaintScheduler" else {}
    scheduler.set_timesteps(steps, **options)
    if name == "ScoreSdeVeScheduler":
        scheduler.set_sigmas(steps)
    schedule = prediction.schedule
    scale = float(getattr(scheduler, "init_noise_sigma", 1.0))
    share = 1.0 if scale > 2 else float(schedule.alpha(schedule.time(scheduler.timesteps[0])))
    x = scale * torch.randn(X0.shape, generator=generator) + share * X0.float()
    found, old, back = [], None, None
    for i, t in enumerate(scheduler.timesteps):
        given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = network(prediction, given, scheduler.sigmas[i] if name == "ScoreSdeVeScheduler" else t)
        if name == "ScoreSdeVeScheduler":
            x = scheduler.step_pred(output, t, x, generator=generator).prev_sample_mean
            continue
        options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        if name == "CogVideoXDPMScheduler":
            x, old = scheduler.step(output, old, t, back, x, **options)
            back = t
            found.append(old)
            continue
        if name == "RePaintScheduler":
            options |= {"original_image": torch.zeros_like(x), "mask": torch.zeros_like(x)}
        if name == "UnCLIPScheduler" and i + 1 < len(scheduler.timesteps):
            options["prev_timestep"] = scheduler.timesteps[i + 1]
        stepped = scheduler.step(output, t, x, **options)
        x = stepped.prev_sample
        found += [stepped.pred_original_sample] if getattr(stepped, "pred_original_sample", None) is not None else []
    return x, found


def error(name, steps, kind=None, **config):
    """How far from the data the run ends, beside the noise that the last step leaves, and what it finds on the way."""
    scheduler = made(name, **config)
    prediction = prediction_of(scheduler)
    prediction = dataclasses.replace(prediction, kind=kind or prediction.kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ended, found = run(scheduler, prediction, steps)
    left = float(prediction.schedule.sigma(0)) if name == "TCDScheduler" else 0.0
    left = float(scheduler.sigmas[-1]) if name in ("DEISMultistepScheduler", "SASolverScheduler") else left
    left = float(scheduler.sigmas[-1]) if config.get("final_sigmas_type") == "sigma_min" else left
    errors = [float((x - X0).abs().max()) for x in found]
    return max([0.0, float((ended - X0).abs().max()) - 4 * left, *errors])


def accepted(name):
    """Its kinds of prediction, of those that diffusers has, which we do not refuse."""
    if "prediction_type" not in inspect.signature(CLASSES[name].__init__).parameters:
        return [{}]
    few = {"num_train_timesteps": 20}  # some make a thousand in Python, which takes longer than all else that collects
    few = few if few.keys() <= inspect.signature(CLASSES[name].__init__).parameters.keys() else {}
    kinds = [{"prediction_type": kind} for kind in ("epsilon", "sample", "v_prediction", "flow_prediction")]
    return [config for config in kinds if not refusal(made(name, **config, **few))]


def refusal(scheduler):
    try:
        prediction_of(scheduler)
    except ValueError as error:
        return str(error)
    return ""


KNOWN = [(name, config) for name in CLASSES if name not in REFUSED for config in accepted(name)]


@pytest.mark.parametrize(("name", "config"), KNOWN, ids=str)
def test_a_run_with_an_oracle_ends_in_the_data(name, config):
    if name == "PNDMScheduler":  # it extrapolates outputs of several times, whatever they are
        assert error(name, 100, **config, set_alpha_to_one=True) <= 1e-3
    else:
        assert error(name, 5, **config) <= 2e-3  # float32, divided by the little data at the first step


@pytest.mark.parametrize(("name", "config"), KNOWN, ids=str)
def test_an_oracle_of_another_kind_does_not(name, config):
    """What the runs above can tell apart: from one step of much noise to none, the network is taken at its word."""
    high = {"timestep_spacing": "trailing"} if "timestep_spacing" in inspect.signature(CLASSES[name]).parameters else {}
    high |= {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    one = name != "MiniMaxH3Scheduler" and prediction_of(made(name)).schedule.name in ("edm", "flow")
    right = prediction_of(made(name, **config)).kind
    for kind in {"epsilon", "x0", "v", "flow", "score"} - {right}:
        assert not error(name, 1 if one else 2, kind, **config, **high) <= 0.05, kind


SPACINGS = [{"timestep_spacing": spacing} for spacing in ("leading", "trailing", "linspace")]
KARRAS = [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}]
BETAS = [{"beta_schedule": "scaled_linear"}, {"beta_schedule": "squaredcos_cap_v2"}]
ZERO = [{"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}]
STRAIGHT = [
    {"use_flow_sigmas": True, "flow_shift": shift, "prediction_type": kind}
    for shift in (1.0, 3.0)
    for kind in ("flow_prediction", "sample")
]
SOLVERS = "DPMSolverMultistepScheduler DPMSolverSinglestepScheduler UniPCMultistepScheduler".split()
STEPPED = "DDIMScheduler DDIMParallelScheduler DDPMScheduler EulerDiscreteScheduler".split()
IN_SIGMA = """EulerDiscreteScheduler HeunDiscreteScheduler LMSDiscreteScheduler KDPM2DiscreteScheduler
    KDPM2AncestralDiscreteScheduler DPMSolverSDEScheduler""".split()
VARIANTS = [
    *itertools.product(STEPPED, [*SPACINGS, *BETAS, *ZERO]),
    *itertools.product(IN_SIGMA, [*KARRAS[:2], *SPACINGS, {"prediction_type": "v_prediction", **KARRAS[0]}]),
    *itertools.product(SOLVERS, [*SPACINGS, *BETAS, *ZERO, *STRAIGHT, *KARRAS, {"use_lu_lambdas": True}]),
    *itertools.product(("DEISMultistepScheduler", "SASolverScheduler"), STRAIGHT),
    *(("UniPCMultistepScheduler", {**straight, **KARRAS[0]}) for straight in STRAIGHT),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("UniPCMultistepScheduler", {"predict_x0": False}),
    ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
    ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction", **KARRAS[0]}),
    ("EulerDiscreteScheduler", {"timestep_type": "continuous", **ZERO[0]}),
    ("EulerDiscreteScheduler", {"prediction_type": "original_sample"}),
    *itertools.product(
        ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"),
        [{"sigma_schedule": "exponential"}, {"sigma_data": 1.0, "prediction_type": "v_prediction"}],
    ),
    *itertools.product(
        ["FlowMatchEulerDiscreteScheduler"],
        [{"shift": 3.0}, {"invert_sigmas": True}, {"use_dynamic_shifting": True}, {"shift_terminal": 0.1},
         {"stochastic_sampling": True}, KARRAS[0]],
    ),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    ("CogVideoXDDIMScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config"), VARIANTS, ids=str)
def test_every_config_is_read(name, config):
    rounded = any(config.get(c) for c in ("use_flow_sigmas", "use_karras_sigmas", "use_lu_lambdas", "use_beta_sigmas"))
    steps = 100 if name in ("DEISMultistepScheduler", "SASolverScheduler") else 5
    assert error(name, steps, **config) <= (5e-3 if rounded else 2e-3)


@pytest.mark.parametrize("name", REFUSED)
def test_the_others_are_refused_by_name(name):
    scheduler = made(name)
    with pytest.raises(ValueError, match=rf"{name}.*; say schedule=.*prediction="):
        prediction_of(scheduler)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}, "needs use_flow_sigmas=True"),
        ("UniPCMultistepScheduler", {"prediction_type": "v_prediction", "use_flow_sigmas": True}, "straight path"),
        *((name, {"use_flow_sigmas": True, "use_beta_sigmas": True}, "those of a variance preserving path")
          for name in (*SOLVERS, "DEISMultistepScheduler", "SASolverScheduler")),
        ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, "do not say the noise level"),
        ("FlowMatchLCMScheduler", {"invert_sigmas": True}, "another path"),
        ("DDIMScheduler", {"prediction_type": "noise"}, "expected one of epsilon, sample, v_prediction"),
    ],
)  # fmt: skip
def test_configs_that_contradict_themselves_are_refused(name, config, message):
    assert message in refusal(made(name, **config))


def test_learned_variances_are_read():
    assert prediction_of(made("DDPMScheduler", variance_type="learned_range")).variances is True
    assert prediction_of(made("DDPMScheduler")).variances is None


def test_a_subclass_is_read_until_it_means_something_else():
    class Spaced(diffusers.DDIMScheduler):
        def set_timesteps(self, *args, **kwargs):
            super().set_timesteps(*args, **kwargs)

    class Centred(diffusers.DDIMScheduler):
        def step(self, *args, **kwargs):
            return super().step(*args, **kwargs)

    assert prediction_of(Spaced()).schedule == prediction_of(diffusers.DDIMScheduler()).schedule
    assert "Centred is a DDIMScheduler with its own step" in refusal(Centred())
    assert "Namesake is not known" in refusal(type("Namesake", (), {"config": {}, "alphas_cumprod": torch.ones(3)})())

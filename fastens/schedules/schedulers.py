"""What the schedulers of diffusers say of the networks that they step: the only place where their configs are read.

Every class is named here, with what its own ``step`` does, or with the reason why it is refused: two schedulers that
carry the same tables may take the same output for different things. ``tests/test_schedulers_of_diffusers.py`` holds
each against its ``step``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fastens.schedules.base import Schedule
from fastens.schedules.continuous import EDM, VE, Flow
from fastens.schedules.discrete import Discrete
from fastens.schedules.prediction import Prediction

_KINDS = {"epsilon": "epsilon", "sample": "x0", "original_sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}
_ALL = ("epsilon", "sample", "v_prediction")
# Their state is the variance preserving path itself, and the network's time is the step.
_ON_STEPS = {
    "DDPMScheduler": _ALL,
    "DDPMParallelScheduler": _ALL,
    "DDIMScheduler": _ALL,
    "DDIMParallelScheduler": _ALL,
    "CogVideoXDDIMScheduler": _ALL,
    "CogVideoXDPMScheduler": _ALL,
    "LCMScheduler": _ALL,
    "TCDScheduler": _ALL,
    "PNDMScheduler": ("epsilon", "v_prediction"),
    "UnCLIPScheduler": ("epsilon", "sample"),
    "RePaintScheduler": ("epsilon",),
}
# The same, or a straight path with ``use_flow_sigmas``.
_SOLVERS = (
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "SASolverScheduler",
)
_OTHER_SIGMAS = (
    "use_karras_sigmas",
    "use_lu_lambdas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
)  # asked in this order
# Their state is x_0 + sigma eps, and the network takes it over sqrt(sigma^2 + 1): the variance preserving path again.
_IN_SIGMA = {
    "EulerDiscreteScheduler": (*_ALL, "original_sample"),
    "EulerAncestralDiscreteScheduler": ("epsilon", "v_prediction"),
    "HeunDiscreteScheduler": ("epsilon", "v_prediction"),
    "LMSDiscreteScheduler": _ALL,
    "KDPM2DiscreteScheduler": ("epsilon", "v_prediction"),
    "KDPM2AncestralDiscreteScheduler": ("epsilon", "v_prediction"),
    "DPMSolverSDEScheduler": ("epsilon", "v_prediction"),
}
_FLOWS = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "LTXEulerAncestralRFScheduler",
    "MiniMaxH3Scheduler",
)
_PRECONDITIONED = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler")
_TOKENS = "it removes noise from tokens, which is no Gaussian path"
_INVERSE = "it runs from data to noise, and tells the network the time that a step leads to, not that of its input"
_STAGES = "its stages change resolution and noise together, so no one path says what an output means"
_REFUSED = {
    "AmusedScheduler": _TOKENS,
    "BlockRefinementScheduler": _TOKENS,
    "DiscreteDDIMScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS,
    "VQDiffusionScheduler": _TOKENS,
    "DDIMInverseScheduler": _INVERSE,
    "DPMSolverMultistepInverseScheduler": _INVERSE,
    "HeliosScheduler": _STAGES,
    "HeliosDMDScheduler": _STAGES,
    "CMStochasticIterativeScheduler": "a consistency model gives the end of a trajectory, no mean of the data",
    "ConsistencyDecoderScheduler": "a consistency model gives the end of a trajectory, no mean of the data",
    "FlowMapEulerDiscreteScheduler": "a flow map gives the mean velocity between two times, not that at one",
    "PiflowScheduler": "its networks give the parameters of a policy over many steps",
    "SCMScheduler": "its pipelines turn the network's output into TrigFlow's before they call step",
    "IPNDMScheduler": "its schedule is a sine of the time, which none of fastens.schedules is",
    "DDPMWuerstchenScheduler": "its schedule is a clamped cosine of the time, which none of fastens.schedules is",
    "KarrasVeScheduler": "its pipeline shifts input and time before it calls the network",
    "ScoreSdeVpScheduler": "it does not say what the network takes as its time, as fastens.schedules.VP does",
    "RFD4ProteinaScheduler": "its step rescales the score and masks atoms",
}
_MEANING = ("step", "scale_model_input", "convert_model_output", "precondition_outputs", "precondition_inputs")
_REMEDY = "say schedule=, one of fastens.schedules, and prediction=, what the network gives on it"


def prediction_of(scheduler: Any) -> Prediction:
    """Return what a diffusers scheduler takes a network's output for, with the schedule of the network's input.

    A time that the scheduler rounds (Karras' sigmas in the DPM solvers, shifted sigmas of a flow) means the noise of
    the rounded time, at which the network was asked: at most one training step from the scheduler's own.

    Raises:
        ValueError: a scheduler of another kind than those known, refused by name and with the reason, or a config that
            contradicts itself.
    """
    name = _known_name(scheduler)
    return dataclasses.replace(_read(name, scheduler, scheduler.config), source=type(scheduler).__name__)


def _read(name: str, scheduler: Any, config: Any) -> Prediction:
    if name in _PRECONDITIONED:
        return _preconditioned(name, config)
    if name == "ScoreSdeVeScheduler":
        return Prediction("score", VE(config["sigma_min"], config["sigma_max"]))
    if name in _FLOWS:
        return Prediction("flow", _flow(name, config))
    said = config.get("prediction_type", "epsilon")
    solver = name in _SOLVERS
    allowed = (*_ALL, "flow_prediction") if solver else {**_ON_STEPS, **_IN_SIGMA}[name]
    if said not in allowed:
        raise ValueError(
            f"scheduler {name}: prediction_type is {said!r}, expected one of {', '.join(allowed)}, as its step does; "
            + _REMEDY
        )
    variances = True if config.get("variance_type") in ("learned", "learned_range") else None
    if solver and config.get("use_flow_sigmas"):
        other = next((c for c in _OTHER_SIGMAS if config.get(c)), None)
        if other is not None and (name, other) != ("UniPCMultistepScheduler", "use_karras_sigmas"):
            raise ValueError(
                f"scheduler {name}: with {other}=True its sigmas and times are those of a variance preserving path, "
                "which its step takes for the straight one of use_flow_sigmas=True; expected one of the two, or "
                + _REMEDY
            )
        if said == "v_prediction":
            raise ValueError(
                f"scheduler {name}: prediction_type 'v_prediction' is none on the straight path of use_flow_sigmas; "
                "expected 'flow_prediction', 'epsilon' or 'sample'"
            )
        schedule: Schedule = Flow(time_scale=float(config["num_train_timesteps"]))
        return Prediction(_KINDS[said], schedule, variances=variances)
    if said == "flow_prediction":
        raise ValueError(
            f"scheduler {name}: prediction_type 'flow_prediction' needs use_flow_sigmas=True, without which its sigmas "
            "are those of a variance preserving path"
        )
    table = _table(scheduler)
    if config.get("timestep_type") == "continuous" and said == "v_prediction":
        # Stable Video Diffusion: the network takes log(sigma) / 4, and v is EDM's output for data of deviation 1.
        # Where no data is left at the last step, the scheduler puts 2^-24.
        low, high = ((1 / max(table[i], 2.0**-24) - 1) ** 0.5 for i in (0, -1))
        return Prediction("edm_v", EDM(low, high, log_time=True), 1.0, "unit_variance", variances=variances)
    if config.get("interpolation_type", "linear") != "linear":
        raise ValueError(
            f"scheduler {name}: with interpolation_type {config['interpolation_type']!r} its timesteps do not say the "
            "noise level; expected 'linear', or timestep_type='continuous' with 'v_prediction'"
        )
    return Prediction(_KINDS[said], Discrete(table), variances=variances)


def described(scheduler: Any) -> str:
    """The scheduler as messages name it: its class and what its config says."""
    said = getattr(scheduler, "config", {}).get("prediction_type")
    return f"the scheduler {type(scheduler).__name__}" + (f", whose prediction_type is {said!r}" if said else "")


def _known_name(scheduler: Any) -> str:
    """The class of diffusers by which the scheduler is read.

    Raises:
        ValueError: there is none, it is refused, or a subclass changes what an output means.
    """
    name = type(scheduler).__name__
    known = {*_ON_STEPS, *_SOLVERS, *_IN_SIGMA, *_FLOWS, *_PRECONDITIONED, "ScoreSdeVeScheduler"}
    for parent in type(scheduler).__mro__:
        if parent.__module__.partition(".")[0] != "diffusers":
            continue
        if parent.__name__ in known:
            changed = [m for m in _MEANING if getattr(type(scheduler), m, None) is not getattr(parent, m, None)]
            if changed:
                raise ValueError(
                    f"scheduler {name} is a {parent.__name__} with its own {', '.join(changed)}, so what it takes an "
                    f"output for is not known here; {_REMEDY}"
                )
            return parent.__name__
        if parent.__name__ in _REFUSED:
            raise ValueError(f"scheduler {name}: {_REFUSED[parent.__name__]}; {_REMEDY}")
    raise ValueError(f"scheduler {name} is not known here; expected one of {', '.join(sorted(known))}, or {_REMEDY}")


def _preconditioned(name: str, config: Any) -> Prediction:
    kinds = {"epsilon": "edm", "v_prediction": "edm_v"}
    said = config["prediction_type"]
    if said not in kinds:
        raise ValueError(
            f"scheduler {name}: prediction_type is {said!r}, expected one of {', '.join(kinds)}, as its step does"
        )
    time = {"atan_time": True} if name.startswith("Cosine") else {"log_time": True}
    schedule = EDM(config["sigma_min"], config["sigma_max"], **time)
    return Prediction(kinds[said], schedule, config["sigma_data"], "unit_variance")


def _flow(name: str, config: Any) -> Flow:
    if name == "MiniMaxH3Scheduler":
        return Flow(data_at=1)
    scale = float(config["num_train_timesteps"])
    if not config.get("invert_sigmas"):
        return Flow(time_scale=scale)
    if name != "FlowMatchEulerDiscreteScheduler" or config.get("stochastic_sampling"):
        raise ValueError(
            f"scheduler {name}: with invert_sigmas=True its step takes the output for a velocity on another path than "
            f"that of its sigmas; {_REMEDY}"
        )
    return Flow(data_at=1, time_scale=scale)


def _table(scheduler: Any) -> tuple[float, ...]:
    """``alphas_cumprod`` in float64."""
    kept = torch.as_tensor(scheduler.alphas_cumprod).double().cpu()
    betas = getattr(scheduler, "betas", None)
    if betas is not None and len(betas) == len(kept):
        # The float32 products in alphas_cumprod are rough at the first steps; the betas say the same more exactly.
        exact = (1 - torch.as_tensor(betas).double().cpu()).cumprod(0)
        if torch.allclose(exact, kept, rtol=1e-4, atol=1e-7):
            kept = exact  # also where some put 2^-24 for no data at all, more than in the step before
    return tuple(kept.clamp(0, 1).tolist())


def ddim_steps(scheduler: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The steps that a DDIM scheduler takes after ``set_timesteps``: they may end where the next does not begin.

    Returns:
        The network's times and ``alphas_cumprod`` where each step ends, each float64 [n].

    Raises:
        ValueError: another scheduler, or one whose timesteps were not set.
    """
    names = ("DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler")
    name = _known_name(scheduler)
    if name not in names:
        raise ValueError(f"times is a {name}, expected {', '.join(names)}, or a sequence of times")
    if not scheduler.num_inference_steps:
        raise ValueError(f"times is a {name} without steps; call its set_timesteps(...) first")
    times = torch.as_tensor(scheduler.timesteps).cpu()
    before = times.long() - scheduler.config["num_train_timesteps"] // scheduler.num_inference_steps
    table = torch.tensor(_table(scheduler), dtype=torch.float64)
    last = torch.as_tensor(scheduler.final_alpha_cumprod).double().cpu()
    last = table[0] if not scheduler.config["set_alpha_to_one"] else last
    return times.double(), torch.where(before >= 0, table[before.clamp_min(0)], last)

"""Noise schedules: how much of the data and how much noise there is at a time, and the SDE that leads there.

Every schedule is a Gaussian path ``x_t = alpha(t) x_0 + sigma(t) eps``. It is the marginal of the SDE
``dx = f(t) x dt + g(t) dw`` with ``f = alpha'/alpha`` and ``g^2 = 2 sigma (sigma' - f sigma)``, and of the flow with
velocity ``alpha'(t) x_0 + sigma'(t) eps`` (Song et al., "Score-based generative modeling through stochastic
differential equations", ICLR 2021; Lipman et al., "Flow matching for generative modeling", ICLR 2023).

Times are floats, integers or tensors of any shape; nothing here reads a tensor's value on the host. Coefficients are
computed and returned in float64, shaped as the times; :meth:`Schedule.coefficients` gives them in the data's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastens.schedules.base import Schedule, Time, per_sample
from fastens.schedules.continuous import EDM, VE, VP, Flow, SubVP
from fastens.schedules.discrete import Discrete

__all__ = [
    "EDM",
    "SCHEDULES",
    "VE",
    "VP",
    "Discrete",
    "Flow",
    "Schedule",
    "SubVP",
    "Time",
    "from_dict",
    "from_scheduler",
    "per_sample",
]

SCHEDULES: Mapping[str, type[Schedule]] = {cls.name: cls for cls in (VP, SubVP, VE, EDM, Flow, Discrete)}


def from_dict(data: Mapping[str, Any]) -> Schedule:
    """Return the schedule that :meth:`Schedule.to_dict` wrote.

    Raises:
        ValueError: "schedule" is missing or unknown, or a parameter is not one of the schedule's.
    """
    parameters = dict(data)
    name = parameters.pop("schedule", None)
    if name not in SCHEDULES:
        raise ValueError(f"schedule {name!r} is unknown; the schedules are {', '.join(SCHEDULES)}")
    try:
        return SCHEDULES[name](**parameters)
    except TypeError as error:
        raise ValueError(f"schedule {name!r}: {error}") from error


def from_scheduler(scheduler: Any) -> Schedule:
    """Return the schedule that a diffusers scheduler was configured with.

    What the network predicts is the scheduler's ``config.prediction_type``, and not part of this.

    Raises:
        ValueError: a scheduler whose process is none of those here.
    """
    config = getattr(scheduler, "config", {})
    kind = type(scheduler).__name__
    steps = config.get("num_train_timesteps", 1000)
    flows = kind.startswith("FlowMatch") or config.get("use_flow_sigmas")
    if flows or config.get("prediction_type") == "flow_prediction":
        return Flow(time_scale=float(steps))
    if kind.startswith("EDM"):
        return EDM(config["sigma_min"], config["sigma_max"], log_time=True)
    if kind == "ScoreSdeVeScheduler":
        return VE(config["sigma_min"], config["sigma_max"])
    kept = getattr(scheduler, "alphas_cumprod", None)
    if kept is None:
        known = "alphas_cumprod (DDPM, DDIM, Euler, DPM-Solver, ...), FlowMatch*, EDM* or ScoreSdeVe"
        raise ValueError(f"scheduler {kind}: its noise schedule is not known here; expected one with {known}")
    kept = torch.as_tensor(kept).double().cpu()
    betas = getattr(scheduler, "betas", None)
    if betas is not None and len(betas) == len(kept):
        # The float32 products in alphas_cumprod are rough at the first steps; the betas say the same more exactly.
        exact = (1 - torch.as_tensor(betas).double().cpu()).cumprod(0)
        if torch.allclose(exact, kept, rtol=1e-4, atol=1e-7):
            kept = exact
    return Discrete(tuple(kept.clamp(0, 1).tolist()))

"""Noise schedules: how much of the data and how much noise there is at a time, and the SDE that leads there.

Every schedule is a Gaussian path ``x_t = alpha(t) x_0 + sigma(t) eps``. It is the marginal of the SDE
``dx = f(t) x dt + g(t) dw`` with ``f = alpha'/alpha`` and ``g^2 = 2 sigma (sigma' - f sigma)``, and of the flow with
velocity ``alpha'(t) x_0 + sigma'(t) eps`` (Song et al., "Score-based generative modeling through stochastic
differential equations", ICLR 2021; Lipman et al., "Flow matching for generative modeling", ICLR 2023).

Times are floats, integers or tensors of any shape; nothing here reads a tensor's value on the host. Coefficients are
computed and returned in float64, shaped as the times; :meth:`Schedule.coefficients` gives them in the data's dtype.
"""

from __future__ import annotations

from typing import Any

from fastens.schedules.base import Schedule, Time, per_sample
from fastens.schedules.continuous import EDM, VE, VP, Flow, SubVP
from fastens.schedules.discrete import Discrete
from fastens.schedules.names import SCHEDULES, from_dict
from fastens.schedules.prediction import Prediction, prediction_from_dict
from fastens.schedules.schedulers import prediction_of

__all__ = [
    "EDM",
    "SCHEDULES",
    "VE",
    "VP",
    "Discrete",
    "Flow",
    "Prediction",
    "Schedule",
    "SubVP",
    "Time",
    "from_dict",
    "from_scheduler",
    "per_sample",
    "prediction_from_dict",
    "prediction_of",
]


def from_scheduler(scheduler: Any) -> Schedule:
    """Return the schedule that a diffusers scheduler was configured with: of what the network takes as its input.

    What the network predicts, and how its input is scaled, is in :func:`prediction_of`, and goes with this schedule to
    the ensembles and denoisers that it is given to.

    Raises:
        ValueError: a scheduler whose process is none of those here, or whose config contradicts itself.
    """
    said = prediction_of(scheduler)
    assert said.schedule is not None
    object.__setattr__(said.schedule, "said", said)
    return said.schedule

"""The schedules by name, and from the dictionaries that describe them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastens.schedules.base import Schedule
from fastens.schedules.continuous import EDM, VE, VP, Flow, SubVP
from fastens.schedules.discrete import Discrete

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

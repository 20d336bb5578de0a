"""What a network's output means: one value that the ensemble, the denoiser, the samplers and the evaluation share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch

from fastens.schedules.base import Schedule
from fastens.schedules.names import from_dict

PREDICTIONS = ("epsilon", "x0", "v", "score", "flow")
PRECONDITIONED = ("edm", "edm_v")
SCALINGS = ("none", "unit_variance")


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a network predicts, of what input, under which schedule; a field that is none was not said.

    Args:
        kind: one of PREDICTIONS, or the raw output inside EDM's preconditioning (Karras et al., NeurIPS 2022, table 1):
            ``"edm"`` where ``D = c_skip x + c_out F``, ``"edm_v"`` where ``D = c_skip x - c_out F``.
        schedule: the path ``x = alpha x_0 + sigma eps``.
        sigma_data: standard deviation of the data in that preconditioning, and in the scaling of the input.
        input_scaling: ``"none"`` where the network takes x as the path has it, ``"unit_variance"`` where it takes
            ``x / sqrt(alpha^2 sigma_data^2 + sigma^2)``; not said, it is none.
        noisy_channels: which channels of the network's first input are x, [start, stop), or how many of the first; not
            said, all are. Networks for inpainting and super-resolution take an image beside the noise.
        variances: whether the second half of the output's channels are variances, which every rule averages; not said,
            they are where the output has twice as many channels as x and else its shape.
        source: the scheduler that the schedule was read from, if it was; not a part of the value.

    Raises:
        ValueError: an unknown kind or scaling, one without the sigma_data that it needs, or no such channels.
        TypeError: a schedule that is none of :mod:`fastens.schedules`.
    """

    kind: str | None = None
    schedule: Schedule | None = None
    sigma_data: float | None = None
    input_scaling: str | None = None
    noisy_channels: tuple[int, int] | None = None
    variances: bool | None = None
    source: str | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Check the fields, and keep a number of channels as a range."""
        if self.kind is not None:
            check_kind("prediction", self.kind)
        if self.schedule is not None and not isinstance(self.schedule, Schedule):
            raise TypeError(
                f"schedule is a {type(self.schedule).__name__}, expected one of fastens.schedules; "
                "of a diffusers scheduler take fastens.schedules.prediction_of(scheduler)"
            )
        if self.input_scaling is not None and self.input_scaling not in SCALINGS:
            raise ValueError(f"input_scaling {self.input_scaling!r} is unknown, expected one of {', '.join(SCALINGS)}")
        if self.sigma_data is not None and not (math.isfinite(self.sigma_data) and self.sigma_data > 0):
            raise ValueError(f"sigma_data is {self.sigma_data!r}, expected a finite number above 0")
        if self.sigma_data is None and (self.kind in PRECONDITIONED or self.input_scaling == "unit_variance"):
            what = f"prediction {self.kind!r}" if self.kind in PRECONDITIONED else "input_scaling 'unit_variance'"
            raise ValueError(f"{what} needs sigma_data=, the standard deviation of the data that it was trained with")
        channels: Any = self.noisy_channels
        if channels is not None:
            channels = (0, channels) if isinstance(channels, int) else tuple(channels)
            if (
                len(channels) != 2
                or not all(isinstance(c, int) for c in channels)
                or not 0 <= channels[0] < channels[1]
            ):
                raise ValueError(
                    f"noisy_channels is {self.noisy_channels!r}, expected a number of channels, or (start, stop) with "
                    "0 <= start < stop"
                )
            object.__setattr__(self, "noisy_channels", channels)

    def check_said(self) -> None:
        """Raise ValueError where the schedule is of networks inside EDM's preconditioning and no more is said."""
        inside = getattr(self.schedule, "log_time", False) or getattr(self.schedule, "atan_time", False)
        if inside and (self.kind is None or self.input_scaling is None):
            missing = "kind" if self.kind is None else "input_scaling"
            raise ValueError(
                f"{missing} is not said, and {self.schedule} is of networks inside EDM's preconditioning, which give "
                "neither noise nor data; pass the diffusers scheduler itself as schedule=, or prediction="
                "fastens.schedules.Prediction('edm', sigma_data=..., input_scaling='unit_variance')"
            )

    def filled(self, **said: Any) -> Prediction:
        """The same, with fields that were not said taken from ``said``."""
        return dataclasses.replace(self, **{name: v for name, v in said.items() if getattr(self, name) is None})

    def with_(self, other: Prediction, ours: str, theirs: str) -> Prediction:
        """What two sources say together.

        Args:
            other: from the second source.
            ours: the first source, for messages.
            theirs: the second.

        Raises:
            ValueError: they contradict each other; the message names the field and both values.
        """
        said: dict[str, Any] = {"source": other.source if self.schedule is None else self.source}
        for field in _fields(self):
            a, b = getattr(self, field.name), getattr(other, field.name)
            same = agree(a, b) if isinstance(a, Schedule) and isinstance(b, Schedule) else a == b
            if a is not None and b is not None and not same:
                name = "prediction" if field.name == "kind" else field.name
                raise ValueError(
                    f"{name} is {a!r} by {ours}, but {b!r} by {theirs}; one of them is wrong, and samples would be too"
                )
            said[field.name] = b if a is None else a
        return Prediction(**said)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that were said as JSON-able values."""
        said = {f.name: getattr(self, f.name) for f in _fields(self) if getattr(self, f.name) is not None}
        if self.schedule is not None:
            said["schedule"] = self.schedule.to_dict()
        if self.noisy_channels is not None:
            said["noisy_channels"] = list(self.noisy_channels)
        return said


def _fields(prediction: Prediction) -> list[dataclasses.Field[Any]]:
    """Those that are part of the value."""
    return [field for field in dataclasses.fields(prediction) if field.compare]


def prediction_from_dict(data: Mapping[str, Any] | str | None) -> Prediction:
    """Return what :meth:`Prediction.to_dict` wrote; a name alone is a kind, as older files have it.

    Raises:
        ValueError: a field that there is none of, or a value that does not fit.
    """
    if data is None or isinstance(data, str):
        return Prediction(data)
    fields = dict(data)
    if fields.get("schedule") is not None:
        fields["schedule"] = from_dict(fields["schedule"])
    try:
        return Prediction(**fields)
    except TypeError as error:
        raise ValueError(f"prediction: {error}") from error


def check_kind(what: str, name: Any, kinds: tuple[str, ...] = PREDICTIONS + PRECONDITIONED) -> None:
    """Raise ValueError unless ``name`` is one of ``kinds``."""
    if name not in kinds:
        raise ValueError(f"{what} {name!r} is unknown, expected one of {', '.join(kinds)}")


def agree(one: Schedule, other: Schedule) -> bool:
    """Whether two schedules give the same noise at what a network takes as its time."""
    if one == other:
        return True
    share = torch.linspace(0.02, 0.98, 9, dtype=torch.float64)
    times = one.t_data + share * (one.t_prior - one.t_data)
    there = other.time(one.network_time(times))
    return all(
        torch.allclose(a(times), b(there), rtol=1e-3, atol=1e-4)
        for a, b in ((one.alpha, other.alpha), (one.sigma, other.sigma))
    )

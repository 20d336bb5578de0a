"""What every schedule has: alpha, sigma, their derivatives, and what follows from them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

Time = float | int | Tensor


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Base of the schedules: what follows from alpha, sigma and their derivatives.

    Attributes:
        name: as :func:`from_dict` takes it.
        said: what else the scheduler said that it was read from, a :class:`Prediction`; not a part of the value.
    """

    name: ClassVar[str]
    said: ClassVar[Any] = None  # of one schedule, where it has it

    @property
    def t_data(self) -> float:
        """The time of least noise."""
        raise NotImplementedError

    @property
    def t_prior(self) -> float:
        """The time of most noise."""
        raise NotImplementedError

    @property
    def prior_std(self) -> float:
        """Standard deviation of the centred Gaussian that sampling starts from."""
        return 1.0

    def start_std(self, t: Time) -> float:
        """Standard deviation of the centred Gaussian that sampling starts from at ``t``: the prior's at any time."""
        return self.prior_std

    def alpha(self, t: Time) -> Tensor:
        """Factor of the data at ``t``."""
        raise NotImplementedError

    def sigma(self, t: Time) -> Tensor:
        """Standard deviation of the noise at ``t``."""
        raise NotImplementedError

    def alpha_rate(self, t: Time) -> Tensor:
        """Derivative of alpha by time."""
        raise NotImplementedError

    def sigma_rate(self, t: Time) -> Tensor:
        """Derivative of sigma by time."""
        raise NotImplementedError

    def drift(self, t: Time) -> Tensor:
        """``f`` in ``dx = f(t) x dt + g(t) dw``."""
        return self.alpha_rate(t) / self.alpha(t)

    def diffusion(self, t: Time) -> Tensor:
        """``g`` in ``dx = f(t) x dt + g(t) dw``; not a number where noise falls with time (a reversed flow)."""
        sigma = self.sigma(t)
        return (2 * sigma * (self.sigma_rate(t) - self.drift(t) * sigma)).sqrt()

    def beta(self, t: Time) -> Tensor:
        """Rate at which the data is forgotten, ``-2 f(t)``; for VP this is ``g^2``."""
        return -2 * self.drift(t)

    def log_snr(self, t: Time) -> Tensor:
        """``log(alpha^2 / sigma^2)``."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def coefficients(self, t: Time, like: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha and sigma, ready to be multiplied with data.

        Args:
            t: one time, or one per sample, [B].
            like: data [B, ...].

        Returns:
            Each [] or [B, 1, ...], of the dtype of ``like`` (float32 for half precision) and on its device.
        """
        return per_sample(self.alpha(t), like), per_sample(self.sigma(t), like)

    def network_time(self, t: Time) -> Tensor:
        """What a network trained under this schedule takes as its time argument."""
        return as_time(t)

    def time(self, network_time: Time) -> Tensor:
        """The inverse of :meth:`network_time`."""
        return as_time(network_time)

    def to_dict(self) -> dict[str, Any]:
        """Return the schedule as JSON-able values: its name under "schedule", beside its parameters."""
        return {"schedule": self.name, **dataclasses.asdict(self)}


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """Shape ``value``, [] or [B], so that it broadcasts over data ``like`` [B, ...], in its dtype and on its device."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    shaped = value if value.ndim == 0 else value.view(-1, *[1] * (like.ndim - 1))
    return shaped.to(like.device, dtype)


def as_time(t: Time) -> Tensor:
    """The time in float64."""
    return t.to(torch.float64) if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)


def check_order(what: str, low: float, high: float, smallest: float = 0.0, strict: bool = True) -> None:
    """Raise ValueError unless ``smallest <= low < high``."""
    if not (math.isfinite(low) and math.isfinite(high) and smallest <= low <= high) or (strict and low == high):
        raise ValueError(f"{what}: expected {smallest:g} <= low < high, both finite, got {low!r} and {high!r}")

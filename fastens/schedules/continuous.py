"""Schedules in continuous time: VP, sub-VP, VE, EDM, flow."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from fastens.schedules.base import Schedule, Time, as_time, check_order
from fastens.schedules.discrete import Discrete


@dataclasses.dataclass(frozen=True)
class LinearBeta(Schedule):
    """What the variance preserving SDEs share: ``alpha = exp(-B/2)``, ``B = ∫ beta``, and beta linear in time.

    Args:
        beta_min: beta at t = 0.
        beta_max: beta at t = 1.
        eps: the time of least noise; the time of most is 1.
        time_scale: the network takes ``t * time_scale`` (score_sde: 999).

    Raises:
        ValueError: betas or times out of order.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    eps: float = 1e-5
    time_scale: float = 1.0

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_order("beta_min, beta_max", self.beta_min, self.beta_max, strict=False)
        check_order("eps, 1", self.eps, 1.0)
        check_order("0, time_scale", 0.0, self.time_scale)

    @property
    def t_data(self) -> float:
        """The time of least noise."""
        return self.eps

    @property
    def t_prior(self) -> float:
        """The time of most noise, 1."""
        return 1.0

    def _beta(self, t: Time) -> Tensor:
        return self.beta_min + as_time(t) * (self.beta_max - self.beta_min)

    def _integral(self, t: Time) -> Tensor:
        t = as_time(t)
        return self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t * t

    def alpha(self, t: Time) -> Tensor:
        """``exp(-B/2)``."""
        return (-0.5 * self._integral(t)).exp()

    def alpha_rate(self, t: Time) -> Tensor:
        """``-beta/2 alpha``."""
        return -0.5 * self._beta(t) * self.alpha(t)

    def network_time(self, t: Time) -> Tensor:
        """``t * time_scale``."""
        return as_time(t) * self.time_scale

    def time(self, network_time: Time) -> Tensor:
        """``network_time / time_scale``."""
        return as_time(network_time) / self.time_scale


@dataclasses.dataclass(frozen=True)
class VP(LinearBeta):
    """Variance preserving SDE: ``sigma^2 = 1 - exp(-B)``; see :class:`LinearBeta` for the parameters."""

    name: ClassVar[str] = "vp"

    def sigma(self, t: Time) -> Tensor:
        """``sqrt(1 - exp(-B))``."""
        return (-torch.expm1(-self._integral(t))).sqrt()

    def sigma_rate(self, t: Time) -> Tensor:
        """``beta/2 alpha^2 / sigma``."""
        return 0.5 * self._beta(t) * self.alpha(t).square() / self.sigma(t)

    def discretised(self, num_steps: int = 1000) -> Discrete:
        """The discrete process of as many steps, ``beta_i = linspace(beta_min, beta_max) / num_steps`` (DDPM)."""
        return Discrete.linear(self.beta_min / num_steps, self.beta_max / num_steps, num_steps)


@dataclasses.dataclass(frozen=True)
class SubVP(LinearBeta):
    """Sub-variance preserving SDE: ``sigma = 1 - exp(-B)``; see :class:`LinearBeta` for the parameters."""

    name: ClassVar[str] = "sub_vp"

    def sigma(self, t: Time) -> Tensor:
        """``1 - exp(-B)``."""
        return -torch.expm1(-self._integral(t))

    def sigma_rate(self, t: Time) -> Tensor:
        """``beta exp(-B)``."""
        return self._beta(t) * self.alpha(t).square()


@dataclasses.dataclass(frozen=True)
class VE(Schedule):
    """Variance exploding SDE: ``alpha = 1``, ``sigma = sigma_min (sigma_max / sigma_min)^t``.

    Args:
        sigma_min: sigma at t = 0.
        sigma_max: sigma at t = 1, and the prior's.
        sigma_time: the network takes sigma instead of t (score_sde, diffusers).

    Raises:
        ValueError: sigmas out of order.
    """

    name: ClassVar[str] = "ve"
    sigma_min: float = 0.01
    sigma_max: float = 50.0
    sigma_time: bool = True

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_order("sigma_min, sigma_max", self.sigma_min, self.sigma_max)
        check_order("0, sigma_min", 0.0, self.sigma_min)

    @property
    def t_data(self) -> float:
        """The time of least noise, 0."""
        return 0.0

    @property
    def t_prior(self) -> float:
        """The time of most noise, 1."""
        return 1.0

    @property
    def prior_std(self) -> float:
        """``sigma_max``."""
        return self.sigma_max

    def start_std(self, t: Time) -> float:
        """``sigma`` at ``t``, beside which the data is small."""
        return float(self.sigma(t))

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t: Time) -> Tensor:
        """1."""
        return torch.ones_like(as_time(t))

    def sigma(self, t: Time) -> Tensor:
        """``sigma_min (sigma_max / sigma_min)^t``."""
        return self.sigma_min * (as_time(t) * self._log_ratio).exp()

    def alpha_rate(self, t: Time) -> Tensor:
        """0."""
        return torch.zeros_like(as_time(t))

    def sigma_rate(self, t: Time) -> Tensor:
        """``sigma log(sigma_max / sigma_min)``."""
        return self.sigma(t) * self._log_ratio

    def network_time(self, t: Time) -> Tensor:
        """Sigma, or ``t`` where ``sigma_time`` is false."""
        return self.sigma(t) if self.sigma_time else as_time(t)

    def time(self, network_time: Time) -> Tensor:
        """The time of a sigma."""
        value = as_time(network_time)
        return (value / self.sigma_min).log() / self._log_ratio if self.sigma_time else value


@dataclasses.dataclass(frozen=True)
class EDM(Schedule):
    """The process of EDM (Karras et al., NeurIPS 2022): ``alpha = 1`` and time is sigma itself.

    Args:
        sigma_min: least sigma.
        sigma_max: largest sigma, and the prior's.
        log_time: the network takes ``log(sigma) / 4`` instead of sigma (the network inside EDM's preconditioning, as
            diffusers' EDM schedulers call it).
        atan_time: it takes ``2 atan(sigma) / pi`` (Stable Audio).

    Raises:
        ValueError: sigmas out of order, or both times.
    """

    name: ClassVar[str] = "edm"
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    log_time: bool = False
    atan_time: bool = False

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_order("sigma_min, sigma_max", self.sigma_min, self.sigma_max)
        check_order("0, sigma_min", 0.0, self.sigma_min)
        if self.log_time and self.atan_time:
            raise ValueError("log_time and atan_time: expected one of them, got both")

    @property
    def t_data(self) -> float:
        """``sigma_min``."""
        return self.sigma_min

    @property
    def t_prior(self) -> float:
        """``sigma_max``."""
        return self.sigma_max

    @property
    def prior_std(self) -> float:
        """``sigma_max``."""
        return self.sigma_max

    def start_std(self, t: Time) -> float:
        """``sigma`` at ``t``, beside which the data is small."""
        return float(self.sigma(t))

    def alpha(self, t: Time) -> Tensor:
        """1."""
        return torch.ones_like(as_time(t))

    def sigma(self, t: Time) -> Tensor:
        """``t``."""
        return as_time(t)

    def alpha_rate(self, t: Time) -> Tensor:
        """0."""
        return torch.zeros_like(as_time(t))

    def sigma_rate(self, t: Time) -> Tensor:
        """1."""
        return torch.ones_like(as_time(t))

    def network_time(self, t: Time) -> Tensor:
        """Sigma, ``log(sigma) / 4`` or ``2 atan(sigma) / pi``."""
        if self.atan_time:
            return as_time(t).atan() * (2 / math.pi)
        return as_time(t).log() / 4 if self.log_time else as_time(t)

    def time(self, network_time: Time) -> Tensor:
        """The sigma."""
        if self.atan_time:
            return (as_time(network_time) * (math.pi / 2)).tan()
        return (4 * as_time(network_time)).exp() if self.log_time else as_time(network_time)


@dataclasses.dataclass(frozen=True)
class Flow(Schedule):
    """Straight path between data and noise (rectified flow, conditional flow matching).

    ``alpha = 1 - t``, ``sigma = t`` (diffusers, Stable Diffusion 3); ``data_at=1`` exchanges the ends (torchcfm), so
    that the velocity ``alpha' x_0 + sigma' eps`` is ``x_0 - eps``.

    Args:
        data_at: the time of the data, 0 or 1; the noise is at the other.
        time_scale: the network takes ``t * time_scale`` (diffusers: 1000).
        eps: distance from both ends that integration and sampling keep, where a conversion would divide by zero.

    Raises:
        ValueError: another end, or a scale or distance out of range.
    """

    name: ClassVar[str] = "flow"
    data_at: int = 0
    time_scale: float = 1.0
    eps: float = 1e-5

    def __post_init__(self) -> None:
        """Check the parameters."""
        if self.data_at not in (0, 1):
            raise ValueError(f"data_at: expected 0 or 1, the time of the data, got {self.data_at!r}")
        check_order("eps, 0.5", self.eps, 0.5)
        check_order("0, time_scale", 0.0, self.time_scale)

    @property
    def t_data(self) -> float:
        """The time of least noise."""
        return abs(self.data_at - self.eps)

    @property
    def t_prior(self) -> float:
        """The time of most noise."""
        return abs(self.data_at - (1 - self.eps))

    def _noise(self, t: Time) -> Tensor:
        t = as_time(t)
        return 1 - t if self.data_at else t

    def alpha(self, t: Time) -> Tensor:
        """The share of the data."""
        return 1 - self._noise(t)

    def sigma(self, t: Time) -> Tensor:
        """The share of the noise."""
        return self._noise(t)

    def alpha_rate(self, t: Time) -> Tensor:
        """-1, or 1 where the data is at 1."""
        return torch.full_like(as_time(t), 2.0 * self.data_at - 1)

    def sigma_rate(self, t: Time) -> Tensor:
        """1, or -1 where the data is at 1."""
        return -self.alpha_rate(t)

    def network_time(self, t: Time) -> Tensor:
        """``t * time_scale``."""
        return as_time(t) * self.time_scale

    def time(self, network_time: Time) -> Tensor:
        """``network_time / time_scale``."""
        return as_time(network_time) / self.time_scale

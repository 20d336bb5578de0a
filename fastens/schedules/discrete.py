"""Schedules in steps: the process of DDPM, and its continuation between the steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastens.schedules.base import Schedule, Time, as_time


@dataclasses.dataclass(frozen=True, repr=False)
class Discrete(Schedule):
    """A variance preserving process of N steps (DDPM): time is the step's index, 0 to N - 1.

    At whole times alpha is ``sqrt(alphas_cumprod[t])``, exactly. In between ``log alphas_cumprod`` is interpolated by
    monotone cubics, whose derivative is continuous, so that the probability-flow ODE of a network trained on steps can
    be solved by any method. Times outside are taken to the nearest end.

    Args:
        alphas_cumprod: N >= 3 falling numbers in [0, 1]. A last value of zero (zero terminal SNR) is kept at the last
            step; the interpolation goes there to 2^-24, or on as it fell before where that is less.

    Raises:
        ValueError: too few numbers, out of range, or not falling.
    """

    name: ClassVar[str] = "discrete"
    alphas_cumprod: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check the table and prepare the interpolation."""
        values = tuple(float(value) for value in self.alphas_cumprod)
        if len(values) < 3:
            raise ValueError(f"alphas_cumprod: expected at least 3 steps, got {len(values)}")
        for i, value in enumerate(values):
            before = values[i - 1] if i else 1.0
            if not 0 <= value <= before or (value == 0 and i < len(values) - 1):
                raise ValueError(f"alphas_cumprod[{i}]: expected falling numbers in [0, 1], got {before!r}, {value!r}")
        object.__setattr__(self, "alphas_cumprod", values)
        table = torch.tensor(values, dtype=torch.float64)
        least = min(2.0**-24, values[-2] ** 2 / values[-3])
        logs = torch.where(table > 0, table, least).log()
        object.__setattr__(self, "_tables", {torch.device("cpu"): (table, logs, _monotone_slopes(logs))})

    def __repr__(self) -> str:
        first, last = self.alphas_cumprod[0], self.alphas_cumprod[-1]
        return f"Discrete(alphas_cumprod=({first:g}, ..., {last:g}), {self.num_steps} steps)"

    @classmethod
    def from_betas(cls, betas: Sequence[float]) -> Discrete:
        """The process that keeps ``1 - beta_i`` of the variance in step i."""
        kept = 1 - torch.tensor([float(beta) for beta in betas], dtype=torch.float64)
        return cls(tuple(kept.cumprod(0).tolist()))

    @classmethod
    def linear(cls, beta_start: float = 1e-4, beta_end: float = 0.02, num_steps: int = 1000) -> Discrete:
        """Linear betas (Ho et al., "Denoising diffusion probabilistic models", NeurIPS 2020)."""
        return cls.from_betas(torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64).tolist())

    @property
    def num_steps(self) -> int:
        """How many steps the process has, N."""
        return len(self.alphas_cumprod)

    @property
    def t_data(self) -> float:
        """0, where there is already the noise of one step."""
        return 0.0

    @property
    def t_prior(self) -> float:
        """``N - 1``."""
        return self.num_steps - 1.0

    def _interpolated(self, t: Time) -> tuple[Tensor, Tensor]:
        """The share of the data's variance, and the derivative of its logarithm."""
        t = as_time(t)
        tables: dict[torch.device, tuple[Tensor, ...]] = self.__dict__["_tables"]
        if t.device not in tables:
            tables[t.device] = tuple(x.to(t.device) for x in tables[torch.device("cpu")])
        table, logs, slopes = tables[t.device]
        t = t.clamp(0, self.num_steps - 1)
        step = t.nan_to_num(0).floor().clamp(max=self.num_steps - 2)  # NaN is no index, and stays NaN in u
        index, u = step.long(), t - step
        y0, y1, m0, m1 = logs[index], logs[index + 1], slopes[index], slopes[index + 1]
        rise = y1 - y0
        square, cube = 3 * rise - 2 * m0 - m1, m0 + m1 - 2 * rise
        value = (y0 + u * (m0 + u * (square + u * cube))).exp()
        value = torch.where(u == 0, table[index], torch.where(u == 1, table[index + 1], value))
        return value, m0 + u * (2 * square + 3 * u * cube)

    def alpha(self, t: Time) -> Tensor:
        """``sqrt(alphas_cumprod)``."""
        return self._interpolated(t)[0].sqrt()

    def sigma(self, t: Time) -> Tensor:
        """``sqrt(1 - alphas_cumprod)``."""
        return (1 - self._interpolated(t)[0]).sqrt()

    def alpha_rate(self, t: Time) -> Tensor:
        """Derivative of alpha by the step's index."""
        kept, slope = self._interpolated(t)
        return 0.5 * slope * kept.sqrt()

    def sigma_rate(self, t: Time) -> Tensor:
        """Derivative of sigma by the step's index."""
        kept, slope = self._interpolated(t)
        return -0.5 * slope * kept / (1 - kept).sqrt()

    def drift(self, t: Time) -> Tensor:
        """Half the derivative of ``log alphas_cumprod``."""
        return 0.5 * self._interpolated(t)[1]

    def to_dict(self) -> dict[str, Any]:
        """Return the schedule as JSON-able values."""
        return {"schedule": self.name, "alphas_cumprod": list(self.alphas_cumprod)}


def _monotone_slopes(y: Tensor) -> Tensor:
    """Slopes at the nodes: of the parabola through three neighbours, held monotone (Fritsch and Carlson, 1980)."""
    rise = y.diff()
    first, last = (3 * rise[:1] - rise[1:2]) / 2, (3 * rise[-1:] - rise[-2:-1]) / 2
    slopes = torch.cat([first, (rise[1:] + rise[:-1]) / 2, last])
    least = torch.maximum(torch.cat([rise[:1], rise]), torch.cat([rise, rise[-1:]]))  # rises are negative
    return torch.maximum(slopes, 3 * least).clamp_max(0)

"""Noise levels at equal intervals of log-SNR."""

from __future__ import annotations

import torch
from torch import Tensor

from fastens.schedules import Schedule


def levels(schedule: Schedule, steps: int, start: float | None) -> tuple[Tensor, Tensor]:
    """Noise-to-signal ratios in geometric steps, and the times that have them, each float64 [steps + 1].

    Args:
        schedule: of the path.
        steps: of the sampler.
        start: the greatest ratio; none for the schedule's, but at most 1e3.

    Raises:
        ValueError: fewer than one step, a start outside the schedule, or a schedule that begins without noise.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    ends = torch.tensor([schedule.t_data, schedule.t_prior], dtype=torch.float64)
    least, most = (float(v) for v in torch.exp(-schedule.log_snr(ends) / 2))
    if not least > 0:
        raise ValueError(
            f"{schedule} has no noise at its first time, {schedule.t_data:g}, to which no ratio leads down; leave out "
            "the steps without noise (alphas_cumprod of 1)"
        )
    begin = min(most, 1e3) if start is None else start
    if not least < begin <= most * (1 + 1e-9):
        raise ValueError(f"start is {start}, expected a noise-to-signal ratio above {least:g} and at most {most:g}")
    ratios = begin * (least / begin) ** (torch.arange(steps + 1, dtype=torch.float64) / steps)
    low, high = (torch.full_like(ratios, float(end)) for end in ends)  # bisection: the ratio rises from low to high
    for _ in range(80):
        middle = (low + high) / 2
        above = torch.exp(-schedule.log_snr(middle) / 2) > ratios
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return ratios, (low + high) / 2

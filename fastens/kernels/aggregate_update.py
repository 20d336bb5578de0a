"""Launcher of aggregation with guidance, update and variance in the kernel of :mod:`fastens.kernels.aggregate`."""

from torch import Tensor

from fastens.kernels import _members
from fastens.kernels._members import result_like
from fastens.kernels.aggregate import launch


def aggregate_update(
    scores: list[Tensor],
    rule: str,
    option: str,
    values: list[float],
    seed: int,
    offset: int,
    x: Tensor | None,
    noise: Tensor | None,
    coefficients: Tensor | None,
    guidance: Tensor | None,
    variance: bool,
) -> tuple[Tensor, Tensor]:
    """Combine and continue; the arguments are those of ``fastens::aggregate_update``."""
    out = result_like(scores, None if guidance is None else scores[0].shape[0] // 2)
    spread = result_like(scores) if variance else scores[0].new_empty(0)
    x, noise = (None if t is None else _members.flattened([t], out)[0] for t in (x, noise))
    coefficients, guidance = (None if t is None else t.contiguous() for t in (coefficients, guidance))
    launch(
        scores, out, spread if variance else None, rule, option, tuple(values), seed, offset, x, noise, coefficients,
        guidance,
    )  # fmt: skip
    return out, spread

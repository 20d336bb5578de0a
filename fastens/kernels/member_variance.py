"""Launcher of the variance over members: the kernel of :mod:`fastens.kernels.aggregate` without a rule."""

from torch import Tensor

from fastens.kernels._members import result_like
from fastens.kernels.aggregate import launch


def member_variance(scores: list[Tensor]) -> Tensor:
    """Return sum_k (S_k - mean)**2 / K."""
    out = result_like(scores)
    launch(scores, None, out, "none")
    return out

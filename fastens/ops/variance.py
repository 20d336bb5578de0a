"""Variance over members."""

from collections.abc import Sequence

from torch import Tensor

from fastens.ops._member_op import define
from fastens.ops._scores import as_scores
from fastens.reference import variance as reference

_variance = define("member_variance(Tensor[] scores) -> Tensor", reference.member_variance)


def member_variance(scores: Tensor | Sequence[Tensor]) -> Tensor:
    """The variance of the members around their arithmetic mean, Σ_k (S_k - mean)² / K.

    Args:
        scores: [K, B, ...], or a sequence of K tensors [B, ...]; floating point.

    Returns:
        [B, ...], of the members' dtype; reduced in float32 at least.

    Raises:
        TypeError: scores that are not floating-point tensors.
        ValueError: no members, or members that differ.
    """
    return _variance(as_scores("member_variance", scores))

"""Aggregation of member outputs by a rule."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastens import rules
from fastens.ops._scores import as_scores, check_backend, seed_from
from fastens.reference import aggregate as reference


def aggregate(
    scores: Tensor | Sequence[Tensor],
    rule: str | rules.Rule = "mean",
    *,
    weights: Sequence[float] | None = None,
    backend: str = "auto",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Combine the outputs of K members by a rule (arXiv 2601.11444).

    Args:
        scores: [K, B, ...], or a sequence of K tensors [B, ...]; floating point.
        rule: name, alias or value of a rule, see :mod:`fastens.rules`.
        weights: K numbers that sum to 1, for a mean that has none of its own.
        backend: the code that runs it.
        generator: from which ``alternating`` draws one member per sample; none for torch's global one.

    Returns:
        [B, ...], of the members' dtype; reduced in float32 at least. NaN in one member reaches it.

    Raises:
        TypeError: scores that are not floating-point tensors.
        ValueError: no members, members that differ, an unknown rule or backend, weights that do not fit, or the rule
            ``mixture``, which needs the trajectory of an ensemble.
    """
    members = as_scores("aggregate", scores)
    resolved = rules.get(rule)
    check_backend("aggregate", backend)
    if resolved.per_trajectory:
        raise ValueError(
            "aggregate: rule 'mixture' draws one member per sample and trajectory; use fastens.Ensemble(..., "
            "rule='mixture') inside `with ens.trajectory(batch_size):`"
        )
    if weights is not None:
        if not isinstance(resolved, rules.Mean) or resolved.weights is not None:
            raise ValueError(f"aggregate: weights given with {resolved}, which takes none or has its own")
        resolved = rules.Mean(weights)
    own = getattr(resolved, "weights", None) or ()
    if own and len(own) != len(members):
        raise ValueError(f"aggregate: {len(own)} weights for {len(members)} members, expected one per member")
    seed = seed_from(generator) if resolved.per_evaluation else 0
    return reference.aggregate(members, resolved, seed=seed)

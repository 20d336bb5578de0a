"""Aggregation of member outputs by a rule."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

from fastens import rules
from fastens.kernels._members import result_like
from fastens.ops._dispatch import Op
from fastens.ops._scores import as_scores, check_defined, seed_from
from fastens.reference import aggregate as reference


def _by_schema(scores: list[Tensor], rule: str, option: str, values: list[float], seed: int, offset: int) -> Tensor:
    return reference.aggregate(scores, rules.from_schema(rule, option, values), seed=seed, offset=offset)


def _fake(scores: list[Tensor], rule: str, option: str, values: list[float], seed: int, offset: int) -> Tensor:
    return result_like(scores)


_aggregate = Op(
    "aggregate(Tensor[] scores, str rule, str option, float[] values, int seed, int offset) -> Tensor",
    _by_schema,
    {"native": _fake, "triton": _fake},
)


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
        scores: [K, B, ...], or a sequence of K tensors [B, ...], of which no stack is made by the fast backends;
            floating point.
        rule: name, alias or value of a rule, see :mod:`fastens.rules`.
        weights: K numbers that sum to 1, for a mean that has none of its own.
        backend: the code that runs it: ``"auto"``, ``"reference"``, ``"native"`` or ``"triton"``.
        generator: from which ``alternating`` draws one member per sample; none for torch's global one.

    Returns:
        [B, ...], of the members' dtype; reduced in float32 at least. NaN in one member reaches it.

    Raises:
        TypeError: scores that are not floating-point tensors.
        ValueError: no members, members that differ, an unknown rule or backend, weights that do not fit, a rule whose
            definition returns another shape, or the rule ``mixture``, which needs the trajectory of an ensemble.
        RuntimeError: a backend asked for by name that cannot run here, or that has no kernel of the rule.
    """
    members = as_scores("aggregate", scores)
    resolved = rules.get(rule)
    if resolved.per_trajectory:
        raise ValueError(
            "aggregate: rule 'mixture' draws one member per sample and trajectory; use fastens.Ensemble(..., "
            "rule='mixture') inside `with ens.trajectory(batch_size):`"
        )
    if weights is not None:
        if type(resolved) is not rules.Mean or resolved.weights is not None:
            raise ValueError(f"aggregate: weights given with {resolved}, which takes none or has its own")
        resolved = rules.Mean(tuple(weights))
    if resolved.needs_noise_level:
        raise ValueError(
            f"aggregate: rule {resolved.name!r} needs the noise level; use fastens.Ensemble, or rule.at(log_snr)"
        )
    resolved.check(len(members))
    members, resolved = resolved.used(members)
    seed = seed_from(generator) if resolved.per_evaluation else 0
    if not resolved.has_kernels:
        check_defined("aggregate", resolved, backend)
        return reference.aggregate(members, resolved)
    if not torch.compiler.is_compiling() and peek_interpreter_stack() is not None:
        return reference.aggregate(members, resolved, seed=seed)
    return _aggregate.resolve(backend, members)(members, resolved.name, resolved.option, resolved.values, seed, 0)

"""Variance over members."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

from fastens.kernels._members import result_like
from fastens.ops._dispatch import Op
from fastens.ops._scores import as_scores
from fastens.reference import member_variance as reference

_variance = Op(
    "member_variance(Tensor[] scores) -> Tensor",
    reference.member_variance,
    {"native": result_like, "triton": result_like},
)


def member_variance(scores: Tensor | Sequence[Tensor], *, backend: str = "auto") -> Tensor:
    """Compute the variance of the members around their arithmetic mean, Σ_k (S_k - mean)² / K.

    Args:
        scores: [K, B, ...], or a sequence of K tensors [B, ...]; floating point.
        backend: the code that runs it.

    Returns:
        [B, ...], of the members' dtype; reduced in float32 at least.

    Raises:
        TypeError: scores that are not floating-point tensors.
        ValueError: no members, members that differ, or an unknown backend.
        RuntimeError: a backend asked for by name that cannot run here.
    """
    members = as_scores("member_variance", scores)
    if not torch.compiler.is_compiling() and peek_interpreter_stack() is not None:
        return reference.member_variance(members)
    return _variance.resolve(backend, members)(members)

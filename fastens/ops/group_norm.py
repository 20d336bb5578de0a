"""Group normalisation with each member's own scale and shift, and what a network does with the result."""

import torch
from torch import Tensor

from fastens.ops._dispatch import Op
from fastens.ops._rows import check_activation, check_masks, check_rows, check_stack, is_dense
from fastens.reference import group_norm as reference


def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x) if is_dense(x) else x.new_empty(x.shape)


_group_norm = Op(
    "group_norm(Tensor x, SymInt num_groups, Tensor? weight=None, Tensor? bias=None, float eps=1e-05, "
    'Tensor? offsets=None, Tensor? scale=None, Tensor? shift=None, str activation="none", '
    "Tensor? members=None, Tensor? samples=None, float p=0., int key=0, int evaluation=0) -> Tensor",
    reference.group_norm,
    {"triton": _fake},
)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    offsets: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "none",
    members: Tensor | None = None,
    samples: Tensor | None = None,
    p: float = 0.0,
    key: int = 0,
    evaluation: int = 0,
    *,
    backend: str = "auto",
) -> Tensor:
    """Normalise each row over groups of channels, then scale and shift by its member (Wu and He, arXiv 1803.08494).

    ``act((norm(x) * weight + bias) * (1 + scale) + shift)``, with the scale and shift of each row as in ADM (arXiv
    2105.05233).

    Args:
        x: [R, C, *space], rows grouped by member.
        num_groups: how many groups the C channels form.
        weight: [K, C], or none.
        bias: [K, C], or none.
        eps: added to the variance.
        offsets: int64 [K+1], the first row of each member's group and R; none for K equal groups.
        scale: [R, C], or none.
        shift: [R, C], or none.
        activation: ``"none"`` or ``"silu"``.
        members: int64 [R], the member of each row, by which its elements are dropped; none where none are.
        samples: int64 [R], the sample of each row, as in :func:`fastens.ops.dropout.dropout`.
        p: the probability that an element of the result is dropped.
        key: of the masks.
        evaluation: of fresh masks.
        backend: the code that runs it.

    Returns:
        [R, C, *space].

    Raises:
        ValueError: rows that cannot be dealt out to the members, groups, parameter shapes or dtypes that do not fit, or
            an unknown activation or backend.
        RuntimeError: a backend asked for by name that cannot run here.
    """
    if x.ndim < 2 or num_groups < 1 or x.shape[1] % num_groups:
        raise ValueError(
            f"group_norm: x is {list(x.shape)}, expected [R, C, ...] with {num_groups} groups of C channels"
        )
    check_masks("group_norm", x, p, members, samples)
    check_activation("group_norm", activation, ("none", "silu"))
    for name, stack in (("weight", weight), ("bias", bias)):
        if stack is not None:
            check_rows("group_norm", x, stack.shape[0], offsets)
            check_stack("group_norm", name, stack, (stack.shape[0], x.shape[1]))
    for name, tensor in (("scale", scale), ("shift", shift)):
        check_stack("group_norm", name, tensor, (x.shape[0], x.shape[1]), "rows first")
    tensors = [t for t in (x, weight, bias, scale, shift) if t is not None]
    return _group_norm.resolve(backend, tensors)(
        x, num_groups, weight, bias, eps, offsets, scale, shift, activation, members, samples, p, key, evaluation
    )

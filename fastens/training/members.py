"""Training K members at once: one folded forward and backward pass for all of them.

The members of an :class:`fastens.Ensemble` share no parameter, so the gradient of the SUM of their losses holds, in
entry k of every stack, exactly what member k's own loss gives it. (A mean would divide every gradient by K.)
An optimizer that treats every number alone (SGD, Adam, AdamW, RMSprop, ...) then takes the steps of K optimizers;
whatever looks at a whole member, as clipping the gradient's norm does, must be done per member. Dropout draws other
masks than in a run of one member alone. A parameter that only some members' code uses in a step has a gradient of zero
for the others, where separate training has none: weight decay and momentum move it all the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fastens.engine.arguments import PerMember
from fastens.ensemble import Ensemble
from fastens.internal import engine_of
from fastens.training.optimizers import check_optimizer


def member_forward(ensemble: Ensemble, *args: Any, **kwargs: Any) -> Any:
    """Evaluate each member on rows of its own, in one folded pass.

    Args:
        ensemble: of K members.
        *args: the members' arguments. The first tensor of at least two dimensions is [K, B, ...]: entry k is member
            k's batch, and so for every tensor whose first two dimensions are K and B. A tensor [B, ...] is the same
            for all members, anything else is passed as it is.
        **kwargs: likewise.

    Returns:
        [K, B, ...]; for a diffusers output its tensor; other structures keep their structure, each tensor stacked.

    Raises:
        ValueError: the first tensor has not one group of rows per member; an ensemble over a mesh.
    """
    if "_share" in vars(ensemble):
        raise ValueError("an ensemble over a mesh is not trained; train the members apart, or in one process")
    leaves, spec = pytree.tree_flatten((args, kwargs))
    shape = next((x.shape for x in leaves if isinstance(x, Tensor) and x.ndim > 1), None)
    if shape is None or shape[0] != ensemble.num_members:
        found = "no tensor of two dimensions" if shape is None else f"{list(shape)}"
        raise ValueError(
            f"each member takes rows of its own: expected a tensor [{ensemble.num_members}, B, ...], got {found}"
        )
    own = [PerMember.of(x) if isinstance(x, Tensor) and x.shape[:2] == shape[:2] else x for x in leaves]
    args, kwargs = pytree.tree_unflatten(own, spec)
    return ensemble.member_outputs(*args, **kwargs)


def training_step(
    ensemble: Ensemble,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Any], Tensor],
    *args: Any,
    max_norm: float | None = None,
    **kwargs: Any,
) -> Tensor:
    """Train all members by one step, each on its own batch.

    Args:
        ensemble: of K members, in the mode to train them in.
        optimizer: of ``ensemble.parameters()``; one that treats every number alone.
        loss: from the outputs [K, B, ...] to losses [K, ...] that are not summed over members, as
            ``lambda predicted: (predicted - noise).square()``; a member's loss is the mean of its entries.
        *args: as in :func:`member_forward`.
        max_norm: the largest norm of each member's gradient; none for any.
        **kwargs: as in :func:`member_forward`.

    Returns:
        [K], each member's loss before the step.

    Raises:
        TypeError: an optimizer whose steps are not those of separate training; see :func:`check_optimizer`.
        ValueError: an optimizer of other parameters; losses without the member axis, or arguments without rows of every
            member.
    """
    check_optimizer(ensemble, optimizer)
    optimizer.zero_grad()
    losses = loss(member_forward(ensemble, *args, **kwargs))
    if losses.ndim == 0 or losses.shape[0] != ensemble.num_members:
        raise ValueError(
            f"loss gave a tensor of shape {list(losses.shape)}, expected [{ensemble.num_members}, ...]: leave the "
            "losses apart (reduction='none'), since a mean over members would divide every gradient by their number"
        )
    losses = losses.reshape(ensemble.num_members, -1).mean(1)
    losses.sum().backward()
    if max_norm is not None:
        clip_member_grad_norms(ensemble, max_norm)
    unreached = _unreached(ensemble)
    optimizer.step()
    _warn_of_moved(unreached)
    return losses.detach()


def _unreached(ensemble: Ensemble) -> list[tuple[str, int, Tensor, Tensor]]:
    """Parameters that some members' gradients reach and one member's does not: name, member, stack, and its values.

    Empty for members that are folded: their code takes one way for all.
    """
    engine = engine_of(ensemble)
    if engine is None or not engine.behaviour.looped:
        return []
    shared = engine.shared
    trained = [(n, p) for n, p in ensemble.network.named_parameters() if p.grad is not None and n not in shared]
    if not trained:
        return []
    reached = torch.stack([p.grad.reshape(len(p), -1).any(1) for _, p in trained if p.grad is not None]).tolist()
    return [
        (name, k, p, p.detach()[k].clone())
        for (name, p), by_member in zip(trained, reached, strict=True)
        for k, found in enumerate(by_member)
        if not found and any(by_member)
    ]


def _warn_of_moved(unreached: list[tuple[str, int, Tensor, Tensor]]) -> None:
    for name, k, p, before in unreached:
        if not torch.equal(p.detach()[k], before):
            warnings.warn(
                f"fastens: the optimizer moved {name} of member {k}, which no gradient reached, as weight decay and "
                "momentum do; where that member's code did not use it in this step, separate training would leave it: "
                "train such members apart, or without weight decay and momentum",
                stacklevel=3,
            )
            return


@torch.no_grad()
def clip_member_grad_norms(ensemble: Ensemble, max_norm: float) -> Tensor:
    """Scale each member's gradient down to a norm, as ``torch.nn.utils.clip_grad_norm_`` does for a member alone.

    Args:
        ensemble: of K members, after ``backward``.
        max_norm: the largest 2-norm of one member's gradient.

    Returns:
        [K], the norms before.

    Raises:
        ValueError: a parameter that all members share has a gradient, which belongs to no member.
    """
    engine = engine_of(ensemble)
    if engine is None:
        members = ensemble.network.children()
        return torch.stack([nn.utils.clip_grad_norm_(member.parameters(), max_norm) for member in members])
    gradients = []
    for name, parameter in ensemble.network.named_parameters():
        if parameter.grad is not None:
            if name in engine.shared:
                raise ValueError(f"{name} is one tensor for all members and has a gradient; it belongs to none of them")
            gradients.append(parameter.grad)
    if not gradients:
        return torch.zeros(ensemble.num_members)
    norms = torch.stack(
        [torch.linalg.vector_norm(gradient.reshape(len(gradient), -1), dim=1) for gradient in gradients]
    )
    norms = torch.linalg.vector_norm(norms, dim=0)
    scale = (max_norm / (norms + 1e-6)).clamp(max=1.0)  # the formula of clip_grad_norm_
    for gradient in gradients:
        gradient.mul_(scale.view(-1, *(1,) * (gradient.ndim - 1)))
    return norms

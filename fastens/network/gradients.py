"""Each member's own of the gradient that a stack has, which may be none while others have one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

# Members without a gradient of their own in one that a stack has, by that gradient, and how often it was written to
# then: the next backward pass gives them one.
_WITHOUT: Any = WeakTensorKeyDictionary()


def warn_of_hooks(members: Iterable[nn.Module]) -> None:
    """Warn where hooks wait for gradients of members' weights: those of an ensemble are others, and have none."""
    for k, member in enumerate(members):
        for name, p in member.named_parameters():
            if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
                warnings.warn(
                    f"fastens: hooks on the gradient of {name} of member {k} are not the ensemble's: register them on "
                    f"dict(ens.named_parameters())['network.{name}']",
                    stacklevel=4,
                )
                return


def gradient_of(stack: Tensor, k: int) -> Tensor | None:
    """Member k's part of the gradient of a stack; none where it has none of its own."""
    grad = stack.grad
    return None if grad is None or k in _without(grad) else grad[k]


def set_gradient(stack: Tensor, k: int, value: Tensor | None) -> None:
    """Give member k its own of the gradient of a stack, in which those of others without one are zero; or take it.

    Raises:
        RuntimeError: it is of another shape, dtype or device.
    """
    stack.detach()[k].grad = value  # torch's own checks
    grad, without = stack.grad, set(range(len(stack)))
    if grad is not None:
        without = set(_without(grad))
    elif value is not None:
        grad = stack.grad = torch.zeros_like(stack)
    if grad is None:
        return
    with torch.no_grad():
        grad[k] = 0.0 if value is None else value
    without = without | {k} if value is None else without - {k}
    if len(without) == len(stack):
        stack.grad = None
    else:
        _WITHOUT[grad] = grad._version, without


def _without(grad: Tensor) -> set[int]:
    version, without = _WITHOUT.get(grad, (None, set()))
    return without if version == grad._version else set()


class Reached:
    """A hook of a member's part of a stack: which backward pass was the last that reached it."""

    def __init__(self) -> None:
        self._task = -1

    def __call__(self, grad: Tensor) -> None:
        """Note the pass in progress."""
        self._task = torch._C._current_graph_task_id()

    @property
    def now(self) -> bool:
        """Whether that is the one in progress."""
        return self._task == torch._C._current_graph_task_id()


def hook_of_member(stack: Tensor, k: int, hook: Callable[[Tensor], Tensor | None], reached: Reached) -> Any:
    """Register a member's hook of its weight: it gets the member's part of the gradient that the stack is about to get.

    Args:
        stack: what the weight is a part of.
        k: the member.
        hook: as of ``Tensor.register_hook``.
        reached: whether there is a gradient of this member.

    Returns:
        The handle that removes it.
    """

    def of_stack(grad: Tensor) -> Tensor | None:
        own = hook(grad[k]) if reached.now else None
        return None if own is None else grad.select_scatter(own, 0, k)

    return stack.register_hook(of_stack)

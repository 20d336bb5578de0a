"""Parameters that members still have, but as other objects: an optimizer of the ones that were is told, and stops."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

_ABANDONED: Any = WeakIdKeyDictionary()  # parameters, with their names


def abandon(stacks: Mapping[str, Tensor], network: nn.Module, members: Iterable[nn.Module]) -> None:
    """Keep which stacks a network has no more, whose values members still have, as they do where they come apart.

    Args:
        stacks: parameters that were, by their names in a member, each one for all or a stack.
        network: what holds the members' parameters now.
        members: what they are now.
    """
    held = {id(parameter) for parameter in network.parameters()}
    lost = {name: stack for name, stack in stacks.items() if id(stack) not in held}
    for member in members if lost else ():
        for name, own in member.named_parameters():
            stack = lost.get(name)
            if stack is not None and own.shape in (stack.shape, stack.shape[1:]):
                _ABANDONED[stack] = name


def _refuse_abandoned(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Raise where an optimizer would train what no member has.

    Raises:
        RuntimeError: names the parameter.
    """
    for parameter in (p for group in optimizer.param_groups for p in group["params"]) if _ABANDONED else ():
        name = _ABANDONED.get(parameter)
        if name is not None:
            raise RuntimeError(
                f"{name} {list(parameter.shape)} of this optimizer is no parameter of the ensemble any more: members "
                "have become of different structure since, and each has a parameter of its own. Make the optimizer "
                "anew of ens.parameters()"
            )


register_optimizer_step_pre_hook(_refuse_abandoned)

"""What a member reads of the stacks: its part of each, which to its code is a tensor of its own."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastens.fold.tensor import memory_of
from fastens.network.gradients import Reached, hook_of_member

# Stacks that members write to in place, by identity: each writes to a copy, which takes its place after the call, so
# that what autograd saved of the member before is as it was.
COPIED: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


@dataclasses.dataclass(frozen=True)
class Reference:
    """A part of a stack that an attribute of a member holds, as in a list of weights, and no table reads anew.

    Attributes:
        part: the member's part.
        stack: what it is of.
        trained: whether that had gradients where the part was made; a part says what its stack does by now.
    """

    part: Tensor
    stack: Tensor
    trained: bool

    @property
    def stale(self) -> bool:
        """Whether the stack has other memory or another layout since, or is trained, or not any more."""
        part, stack = self.part, self.stack
        kept = part.dtype == stack.dtype and (part.shape, part.stride()) == (stack.shape[1:], stack.stride()[1:])
        return not kept or self.trained is not stack.requires_grad or memory_of(part) != memory_of(stack)


Place = tuple[nn.Parameter, int]  # a stack, and a member


class Parts(weakref.WeakValueDictionary[Any, Tensor]):
    """What a member read of each stack, while somebody holds it.

    Args:
        k: the member.

    Attributes:
        asked: whether the member's code asks what only a call of it can answer; see :mod:`fastens.network.asked`.
        hooked: by the identity of each stack of which the member hooked its part, what tells when that has a gradient.
    """

    asked = False

    def __init__(self, k: int) -> None:
        super().__init__()
        self._k = k
        self.hooked: dict[int, Reached] = {}

    def __setitem__(self, key: Any, part: Tensor) -> None:
        super().__setitem__(key, part)
        if self.hooked and key[1] in self.hooked and part.requires_grad:
            part.register_hook(self.hooked[key[1]])

    def place(self, x: Tensor) -> Place | None:
        """The parameter that a tensor is this member's part of; none where it is no such part."""
        if not isinstance(x, nn.Parameter):
            return None
        stack, k = x._base, self._k
        if isinstance(stack, nn.Parameter):
            k = (x.storage_offset() - stack.storage_offset()) // max(stack.stride(0), 1)
        else:  # of a copy
            keys = (key for key, part in list(self.items()) if part is x and key[1] in COPIED)
            stack = next((COPIED.get(key[1]) for key in keys), None)
        if not isinstance(stack, nn.Parameter) or stack.shape[1:] != x.shape or k != self._k:
            return None
        return stack, self._k

    def hook(self, part: Tensor, stack: Tensor, k: int, hook: Callable[[Tensor], Tensor | None]) -> Any:
        """Register a hook of the member's part of a stack, whichever call reads it; return what removes it."""
        if id(stack) not in self.hooked:
            self.hooked[id(stack)] = Reached()
            part.register_hook(self.hooked[id(stack)])
        return hook_of_member(stack, k, hook, self.hooked[id(stack)])

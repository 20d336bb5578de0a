"""Member k's part of a stack, as the member's own code reads it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode_temporarily

from fastens.fold.attributes import standing_for
from fastens.fold.stand_ins import tracing


def part_of(stack: Tensor, k: int, copied: bool = False) -> Tensor:
    """Member k's part of a stack: a parameter where that is one, but no leaf, so that gradients reach the stack."""
    with _unseen() if torch._C._len_torch_dispatch_stack() else nullcontext():
        own: Any = stack[k].clone() if copied else stack[k]
        if isinstance(stack, nn.Parameter):
            if type(own) is Tensor and peek_interpreter_stack() is None and not tracing():
                own = own.as_subclass(nn.Parameter)
            else:
                own._is_param = True
    return standing_for(own, stack)


@contextmanager
def _unseen() -> Iterator[None]:
    """Scope that the modes do not see which watch what members call, to whom a weight is there and not computed.

    A selective checkpoint, say, keeps results of operations by their order in the member's own code. Modes that make
    other tensors of all (fake ones, or those of a trace) have a key, and take part.
    """
    mode = _get_current_dispatch_mode()
    if mode is None or getattr(mode, "_mode_key", None) is not None:
        yield
        return
    popped: AbstractContextManager[Any] = _pop_mode_temporarily()
    with popped, _unseen():
        yield

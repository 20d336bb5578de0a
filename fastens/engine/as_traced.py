"""An op in compiled graphs that raises where members' code would read other values than when the graph was traced.

Dynamo notices what changes in modules; what code reads outside of them, or inside of what they hold, only the guards of
an engine do (:mod:`fastens.network.surroundings`), and they are asked when the graph runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

from fastens.fold.stand_ins import ENGINES
from fastens.ops._dispatch import LIBRARY

_NAME = "fastens::as_traced"


def as_traced(tensors: tuple[Tensor, ...], number: str) -> tuple[Tensor, ...]:
    """What a trace gives, the smallest of it through the op; an export and a transform, which end with the call, as is.

    Args:
        tensors: [K, ...] each.
        number: of the engine.
    """
    if not tensors or torch.compiler.is_exporting() or peek_interpreter_stack() is not None:
        return tensors
    k = min(range(len(tensors)), key=lambda i: tensors[i].ndim)
    epoch = ENGINES[number].guards.read
    return *tensors[:k], torch.ops.fastens.as_traced(tensors[k], number, epoch), *tensors[k + 1 :]


def _checked(x: Tensor, number: str, epoch: int) -> Tensor:
    engine = ENGINES.get(number)
    if engine is not None and engine.guards.read != epoch:
        engine.guards.barrier.wrote()  # by which dynamo traces anew
        raise RuntimeError(
            "a compiled ensemble was traced when its members' code read other values, of globals, of what lists, "
            "dictionaries or objects hold, or the like: call it again, and it is traced anew"
        )
    return x.clone()


def _vmapped(info: Any, in_dims: tuple[Any, ...], x: Tensor, number: str, epoch: int) -> tuple[Tensor, Any]:
    return torch.ops.fastens.as_traced(x, number, epoch), in_dims[0]


# By the tag, Inductor and the backend "cudagraphs" leave the op out of their CUDA graphs, whose replays would not ask.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)

LIBRARY.define("as_traced(Tensor x, str number, int epoch) -> Tensor", tags=_TAGS)
LIBRARY.impl("as_traced", _checked, "CompositeExplicitAutograd")
torch.library.register_fake(_NAME, lambda x, number, epoch: torch.empty_like(x), lib=LIBRARY)
torch.library.register_autograd(_NAME, lambda ctx, grad: (grad, None, None), lib=LIBRARY)
torch.library.register_vmap(_NAME, _vmapped, lib=LIBRARY)

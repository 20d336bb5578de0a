"""Torch's functions by their names, and its operations, which code may call as well."""

import functools
import types
from typing import Any

import torch

_NAMESPACES: tuple[Any, ...] = (
    torch,
    torch.Tensor,
    torch.nn.functional,
    torch.special,
    *(getattr(torch._C, name) for name in ("_nn", "_VariableFunctions")),  # in no stub
)


def named(*names: str) -> list[Any]:
    """Every torch function and method of these names, each once; ``linalg.norm`` is that of ``torch.linalg`` alone."""
    found: dict[Any, None] = {}
    for name in " ".join(names).split():
        module, _, name = name.rpartition(".")
        for space in (getattr(torch, module),) if module else _NAMESPACES:
            function = getattr(space, name, None)
            if callable(function) and not isinstance(function, type | types.ModuleType):
                found.setdefault(function)
    return list(found)


OPERATIONS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)


@functools.cache
def tag_of(operation: Any) -> Any:
    """The tag of operations that draw, else none; one name may have several."""
    whole = isinstance(operation, torch._ops.OpOverloadPacket)
    each = [getattr(operation, name) for name in operation.overloads()] if whole else [operation]
    tag = torch.Tag.nondeterministic_seeded
    return tag if any(tag in op.tags for op in each) else None

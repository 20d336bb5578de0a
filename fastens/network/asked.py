"""What a member's own code asks of its tensors beside their values, answered as for a member that is by itself.

A part of a stack is a view and, where gradients are enabled, no leaf of a graph: a member's parameter is a leaf.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastens.fold.dispatch import named
from fastens.fold.tensor import getters
from fastens.network.member_tables import Parts, parts_of

_MOST = 512  # kinds of calls that are remembered


class Questions:
    """Whether the members of an ensemble ask such things: each kind of call is watched once, and answered right then.

    A mode around every call would cost each torch function some microseconds, and torch its fast paths.
    """

    def __init__(self) -> None:
        self._asked = False
        self._watched: set[Any] = set()

    def answered(self, member: nn.Module, kind: Any) -> AbstractContextManager[Any]:
        """Scope of a call of a member.

        Args:
            member: whose tables may be of parts of stacks.
            kind: what tells this call from others; none where it is always watched.
        """
        parts = parts_of(member)
        if parts is None:
            return nullcontext()
        if not (self._asked or kind is None):
            if kind in self._watched:
                return nullcontext()
            if len(self._watched) >= _MOST:
                self._watched.clear()
            self._watched.add(kind)
        return _Answers(parts, self._note)

    def _note(self) -> None:
        self._asked = True


class _Answers(TorchFunctionMode):
    """Answers what is asked of parts of stacks."""

    def __init__(self, parts: Parts, note: Callable[[], None]) -> None:
        super().__init__()
        self._parts, self._note = parts, note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = _ANSWERS.get(func)
        if answer is None:
            return func(*args) if kwargs is None else func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            part = _part_behind(args[0], self._parts)
            if part is not None:
                self._note()
                self._parts.asked = True
                return answer(func, part, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _part_behind(x: Any, parts: Parts) -> Tensor | None:
    """The part of a stack that a tensor is, or is a view of."""
    if not isinstance(x, Tensor):
        return None
    held = list(parts.items())
    if isinstance(x, nn.Parameter) or any(x is part for _, part in held):
        return x
    base = x._base if x.layout is torch.strided else None
    return None if base is None else next((part for key, part in held if key[1] == id(base)), None)


def _of_part(value: Any) -> Callable[..., Any]:
    """What is always so of a member's own tensor, and of a view of it is what torch says."""
    return lambda func, part, x, *args, **kwargs: value if x is part else func(x, *args, **kwargs)


def _is_leaf(func: Any, part: Tensor, x: Tensor) -> bool:
    return isinstance(x, nn.Parameter) or func(x)


def _grad_fn(func: Any, part: Tensor, x: Tensor) -> Any:
    return None if isinstance(x, nn.Parameter) else func(x)


def _base(func: Any, part: Tensor, x: Tensor) -> Tensor | None:
    return None if x is part else part


def _offset(func: Any, part: Tensor, x: Tensor) -> int:
    return func(x) - part.storage_offset() if part._is_view() else func(x)


def _windows(position: int) -> Callable[..., Any]:
    """Windows on memory, which begin where the member's own memory does.

    Args:
        position: of the argument that says at which element they begin.
    """

    def answer(func: Any, part: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        begin = part.storage_offset() if part._is_view() else 0
        if x is part and func in _SCATTERS:  # torch differentiates none of what begins later in its memory
            return func(x.clone(), *args, **kwargs)
        if kwargs.get("storage_offset") is not None:
            kwargs = {**kwargs, "storage_offset": kwargs["storage_offset"] + begin}
        elif len(args) > position and args[position] is not None:
            args = (*args[:position], args[position] + begin, *args[position + 1 :])
        return func(x, *args, **kwargs)

    return answer


def _place(part: Tensor, x: Tensor) -> tuple[nn.Parameter, int] | None:
    """The stack that a tensor is a member's part of, and which member's; none where it is no such part."""
    stack = x._base if x is part else None
    if stack is None or not isinstance(stack, nn.Parameter) or stack.shape[1:] != x.shape:
        return None
    return stack, (x.storage_offset() - stack.storage_offset()) // max(stack.stride(0), 1)


def _grad(func: Any, part: Tensor, x: Tensor) -> Tensor | None:
    """The member's own of the gradient that its stack has."""
    place = _place(part, x)
    if place is None:
        return func(x)
    stack, k = place
    return None if stack.grad is None else stack.grad[k]


def _set_grad(func: Any, part: Tensor, x: Tensor, value: Tensor | None) -> None:
    """Give the member its own of the gradient of the stack, in which those of others without one are zero."""
    place = _place(part, x)
    if place is None:
        return func(x, value)
    stack, k = place
    if stack.grad is None and value is not None:
        stack.grad = torch.zeros_like(stack)
    if stack.grad is not None:
        with torch.no_grad():
            stack.grad[k] = 0.0 if value is None else value


def _switch(func: Any, part: Tensor, x: Tensor, requires_grad: bool = True) -> Tensor:
    """Train, or freeze, the stack with the part: it is one parameter, whose members agree on that."""
    place = _place(part, x)
    if place is None:
        func(x, requires_grad)
    else:
        place[0].requires_grad_(requires_grad)
    return x


def _retain(func: Any, part: Tensor, x: Tensor) -> None:
    if not (x.requires_grad and isinstance(x, nn.Parameter)):  # of a leaf it does nothing
        func(x)


def _repr(func: Any, part: Tensor, x: Tensor, **kwargs: Any) -> str:
    own = nn.Parameter(x.detach(), x.requires_grad) if isinstance(x, nn.Parameter) else x
    return func(own, **kwargs)


def _storage(func: Any, part: Tensor, x: Tensor) -> Any:
    if part._is_view():
        warnings.warn(
            "fastens: a member looks at the storage of a weight, which in an ensemble is that of all members' weights: "
            "its size and address are not those of the member alone",
            stacklevel=3,
        )
    return func(x)


def _answers(answers: dict[str, Callable[..., Any]]) -> dict[Any, Callable[..., Any]]:
    """By the function that torch calls for each name."""
    return {(getters(name) or [getattr(Tensor, name)])[0]: answer for name, answer in answers.items()}


_SCATTERS = named("as_strided_scatter")
_SET_REQUIRES_GRAD: Any = Tensor.requires_grad.__set__  # pyright: ignore[reportAttributeAccessIssue]  # not in its stub
_ANSWERS: dict[Any, Callable[..., Any]] = (
    {_SET_REQUIRES_GRAD: _switch}
    | _answers(
        {
            "is_leaf": _is_leaf,
            "grad_fn": _grad_fn,
            "grad": _grad,
            "retains_grad": _of_part(False),
            "retain_grad": _retain,
            "requires_grad_": _switch,
            "_base": _base,
            "_is_view": _of_part(False),
            "storage_offset": _offset,
            "untyped_storage": _storage,
            "storage": _storage,
            "__repr__": _repr,
        }
    )
    | {vars(torch._C.TensorBase)["grad"].__set__: _set_grad}
    | dict.fromkeys(named("as_strided as_strided_ as_strided_copy"), _windows(2))
    | dict.fromkeys(_SCATTERS, _windows(3))
)

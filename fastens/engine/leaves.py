"""The outputs of a recorded pass: its tensors as a plan writes them, and what makes the members' outputs of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastens.fold.tensor import Hidden, MemberTensor, NotFoldable
from fastens.trace.record import NotRecordable


@dataclasses.dataclass(frozen=True)
class Leaves:
    """What each leaf of an output is.

    Attributes:
        kinds: of each leaf: ``rows`` [N * B, ...] with the hidden dimension folded into the first, ``entries`` [N],
            ``common`` without it, or ``value`` for what is no tensor.
        values: of the leaves that are no tensors, else none.
        spec: how the leaves are nested.
        size: N.
    """

    kinds: tuple[str, ...]
    values: tuple[Any, ...]
    spec: Any
    size: int

    def whole(self, tensors: list[Tensor]) -> list[Any]:
        """The leaves [N, ...] of the members' outputs, or N times the same, and the structure last."""
        given = iter(tensors)
        leaves: list[Any] = []
        for kind, value in zip(self.kinds, self.values, strict=True):
            if kind == "value":
                leaves.append([value] * self.size)
                continue
            x = next(given)
            if kind == "rows":
                x = x.view(self.size, x.shape[0] // self.size, *x.shape[1:])
            elif kind == "common":
                x = x.expand(self.size, *x.shape)
            leaves.append(x)
        return [*leaves, self.spec]


def recorded(output: Any, hidden: Hidden) -> tuple[list[Tensor], Leaves]:
    """The tensors that a plan of a pass is to write, and what they are.

    Raises:
        NotRecordable: a leaf whose values may change from call to call, and is no tensor.
    """
    leaves, spec = pytree.tree_flatten(output)
    tensors: list[Tensor] = []
    kinds, values = [], []
    for leaf in leaves:
        values.append(None if isinstance(leaf, Tensor) else leaf)
        if not isinstance(leaf, Tensor):
            if not isinstance(leaf, int | float | str | None):
                raise NotRecordable(f"an output is a {type(leaf).__name__}")
            kinds.append("value")
        elif isinstance(leaf, MemberTensor) and leaf.hidden is not None:
            stack = leaf.stack if leaf.hidden is hidden else hidden.entries(leaf.stack)
            kinds.append("rows" if stack.ndim > 1 else "entries")
            tensors.append(stack.flatten(0, 1) if stack.ndim > 1 else stack)
        else:
            kinds.append("common")
            tensors.append(leaf.stack if isinstance(leaf, MemberTensor) else leaf)
    return tensors, Leaves(tuple(kinds), tuple(values), spec, hidden.size)


def recorded_rows(output: Any, hidden: Hidden) -> tuple[list[Tensor], Leaves]:
    """The tensors that a plan of a pass over rows is to write, [R, ...], and what they are."""
    leaves, spec = pytree.tree_flatten(output)
    tensors = [without_hidden(x, hidden) for x in leaves if isinstance(x, Tensor)]
    kinds = tuple("entries" if isinstance(x, Tensor) else "value" for x in leaves)
    values = tuple(None if isinstance(x, Tensor) else x for x in leaves)
    if not all(isinstance(x, int | float | str | None) for x in values):
        raise NotFoldable("an output that is neither a tensor nor a number")
    return tensors, Leaves(kinds, values, spec, hidden.size)


def without_hidden(leaf: Any, hidden: Hidden) -> Any:
    """Return a leaf of a pass over rows as [R, ...], without the batch of one that each row's member sees.

    Raises:
        NotFoldable: it does not carry the batch.
    """
    if not isinstance(leaf, Tensor):
        return leaf
    if isinstance(leaf, MemberTensor) and leaf.hidden is not None:
        stack = leaf.stack if leaf.hidden is hidden else hidden.entries(leaf.stack)
        if stack.ndim > 1 and stack.shape[1] == 1:
            return stack.flatten(0, 1)
        raise NotFoldable(f"an output of shape {list(leaf.shape)} does not carry the samples in dimension 0")
    value = leaf.stack if isinstance(leaf, MemberTensor) else leaf
    if value.ndim and value.shape[0] == 1:
        return value.expand(hidden.size, *value.shape[1:])
    raise NotFoldable(f"an output of shape {list(value.shape)} does not carry the samples in dimension 0")


def unwrapped(leaf: Any, hidden: Hidden) -> Any:
    """A leaf of a pass's output: [N, ...] where it is a tensor, else N times the same."""
    if isinstance(leaf, MemberTensor):
        if leaf.hidden is None:
            return leaf.stack.expand(hidden.size, *leaf.stack.shape)
        return leaf.stack if leaf.hidden is hidden else hidden.entries(leaf.stack)
    if isinstance(leaf, Tensor):
        return leaf.expand(hidden.size, *leaf.shape)
    return [leaf] * hidden.size


def columns_of(outputs: list[tuple[list[Any], Any]]) -> list[Any]:
    """The leaves of the members' outputs side by side, and their structure last.

    Raises:
        TypeError: outputs of different structure.
    """
    if any(spec != outputs[0][1] for _, spec in outputs):
        raise TypeError("members return outputs of different structure, which no rule combines")
    return [*(list(column) for column in zip(*(leaves for leaves, _ in outputs), strict=True)), outputs[0][1]]


# What a member may return beside tensors: values that hold none.
VALUES = (
    *(type(None), bool, int, float, complex, str, bytes, slice, range, type, type(...)),
    *(torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format),
    *(torch.SymInt, torch.SymFloat, torch.SymBool),
)


def alike(column: Sequence[Any], of: str = "members") -> Any:
    """Return the value, no tensor, that all members (or rows) return alike.

    Raises:
        TypeError: they differ, or it is an object that may hold tensors of a member.
    """
    first = column[0]
    if not isinstance(first, VALUES):
        raise TypeError(
            f"members return a {type(first).__name__}, whose tensors the ensemble does not know; "
            "register it with torch.utils._pytree.register_pytree_node, or return tensors, tuples or dicts"
        )
    different = next((other for other in column[1:] if not same(first, other)), first)
    if different is not first:
        raise TypeError(
            f"{of} return {first!r} and {different!r}: a rule combines floating-point tensors only; "
            "return torch.tensor(...) of it, or what is the same for all"
        )
    return first


def same(a: Any, b: Any) -> bool:
    """Whether two values that are no tensors are equal; NaN is equal to itself."""
    return a is b or (type(a) is type(b) and (a == b or (a != a and b != b)))


def joined(parts: list[list[Any]], dim: int = 0) -> list[Any]:
    """The leaves of several passes as those of one: over some members each, or (dim 1) over some rows of one."""

    def one(column: tuple[Any, ...]) -> Any:
        if isinstance(column[0], Tensor):
            return torch.cat(column, dim)
        if dim == 0:
            return [x for part in column for x in part]
        return [
            torch.cat(of_member) if isinstance(of_member[0], Tensor) else alike(of_member, "rows")
            for of_member in zip(*column, strict=True)
        ]

    if len(parts) == 1:
        return parts[0]
    return [*map(one, zip(*(part[:-1] for part in parts), strict=True)), parts[0][-1]]

"""Operations in place as operations whose results are new, so that every value is written once."""

from __future__ import annotations

import dataclasses
import itertools

import torch

from fastens.trace.record import NotLowerable, Operation, Ref, mapped, same_view

aten = torch.ops.aten


def functionalized(
    operations: list[Operation], outputs: list[Ref], inputs: list[Ref]
) -> tuple[list[Operation], list[Ref]]:
    """Give the result of an operation in place a storage of its own.

    What overwrites a part of a value becomes an operation into fresh memory, and a copy of that into the part:
    ``aten.copy_`` is the one operation left that writes to a part of what is there. An input that is written to is
    copied first.

    Args:
        operations: the operations of a recording.
        outputs: what it returned.
        inputs: what it was given.

    Returns:
        The operations and outputs.

    Raises:
        NotLowerable: an operation changes what it does not return.
    """
    current: dict[int, int] = {}
    whole: dict[int, Ref] = {}
    given = {ref.storage: ref for ref in inputs}
    numbers = itertools.count(-1, -1)

    def renamed(leaf: Ref) -> Ref:
        return dataclasses.replace(leaf, storage=current.get(leaf.storage, leaf.storage))

    result: list[Operation] = []
    for op in operations:
        for written in op.writes:
            if written.storage in given and written.storage not in current:
                x = given[written.storage]
                current[x.storage] = next(numbers)
                result.append(Operation(aten.clone.default, (x,), {}, [renamed(x)], []))
        args, kwargs = mapped(Ref, renamed, (op.args, op.kwargs)) if current else (op.args, op.kwargs)
        outs, behind = [], []
        for out in op.outs:
            if not any(same_view(out, written) for written in op.writes):
                outs.append(renamed(out))
                continue
            made = whole.get(out.storage)
            if made is not None and same_view(made, out) and op.outs == [out]:
                current[out.storage] = next(numbers)
                outs.append(renamed(out))
            elif op.name == "aten.copy_":
                outs.append(renamed(out))
            else:
                fresh = Ref(next(numbers), 0, out.size, contiguous(out.size), out.dtype)
                outs.append(fresh)
                part = renamed(out)
                behind.append(Operation(aten.copy_.default, (part, fresh), {}, [part], []))
        if any(not any(same_view(out, written) for out in op.outs) for written in op.writes):
            raise NotLowerable(f"{op.name} changes what it does not return")
        if not op.writes:
            whole.update((out.storage, out) for out in op.outs)
        result += [dataclasses.replace(op, args=args, kwargs=kwargs, outs=outs, writes=[]), *behind]
    return result, [renamed(out) for out in outputs]


def contiguous(size: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    stride, step = [], 1
    for n in reversed(size):
        stride.append(step)
        step *= n
    return tuple(reversed(stride))

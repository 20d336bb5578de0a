"""Operations in place as operations whose results are new, so that every value is written once."""

from __future__ import annotations

import dataclasses
import itertools

import torch

from fastens.trace.record import Node, NotLowerable, Ref, mapped, same_view

aten = torch.ops.aten


def functionalized(nodes: list[Node], outputs: list[Ref], inputs: list[Ref]) -> tuple[list[Node], list[Ref]]:
    """Give the result of an operation in place a storage of its own.

    What overwrites a part of a value becomes an operation into fresh memory, and a copy of that into the part:
    ``aten.copy_`` is the one operation left that writes to a part of what is there. An input that is written to is
    copied first.

    Args:
        nodes: the operations of a recording.
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

    result: list[Node] = []
    for node in nodes:
        for written in node.writes:
            if written.storage in given and written.storage not in current:
                x = given[written.storage]
                current[x.storage] = next(numbers)
                result.append(Node(aten.clone.default, (x,), {}, [renamed(x)], []))
        args, kwargs = mapped(Ref, renamed, (node.args, node.kwargs)) if current else (node.args, node.kwargs)
        outs, behind = [], []
        for out in node.outs:
            if not any(same_view(out, written) for written in node.writes):
                outs.append(renamed(out))
                continue
            made = whole.get(out.storage)
            if made is not None and same_view(made, out) and node.outs == [out]:
                current[out.storage] = next(numbers)
                outs.append(renamed(out))
            elif node.name == "aten.copy_":
                outs.append(renamed(out))
            else:
                fresh = Ref(next(numbers), 0, out.size, contiguous(out.size), out.dtype)
                outs.append(fresh)
                part = renamed(out)
                behind.append(Node(aten.copy_.default, (part, fresh), {}, [part], []))
        if any(not any(same_view(out, written) for out in node.outs) for written in node.writes):
            raise NotLowerable(f"{node.name} changes what it does not return")
        if not node.writes:
            whole.update((out.storage, out) for out in node.outs)
        result += [dataclasses.replace(node, args=args, kwargs=kwargs, outs=outs, writes=[]), *behind]
    return result, [renamed(out) for out in outputs]


def contiguous(size: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    stride, step = [], 1
    for n in reversed(size):
        stride.append(step)
        step *= n
    return tuple(reversed(stride))

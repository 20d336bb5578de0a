"""Reading a view of a copied tensor from where the copy came from, so that the copy need not be made."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Protocol

from fastens.plan.lowering.builder import Emitter
from fastens.plan.lowering.values import Apply, Expression, Leaf
from fastens.program.steps import Opcode
from fastens.trace.record import Ref

Factors = list[tuple[int, int]]  # sizes and strides that one dimension is made of, innermost first


@dataclasses.dataclass(frozen=True)
class Origin:
    """The elements of a view, times a number, in the storage that they were copied from."""

    ref: Ref  # of that storage and its offset; size and strides are those of `dims`, one after the other
    dims: list[Factors]  # of each dimension of the view
    scale: float

    def simple(self) -> Ref | None:
        """The view itself with strides of the origin, none where a dimension has several."""
        if any(len(factors) > 1 for factors in self.dims):
            return None
        pairs = [factors[0] if factors else (1, 0) for factors in self.dims]
        return dataclasses.replace(self.ref, size=tuple(n for n, _ in pairs), stride=tuple(s for _, s in pairs))


def origin(emitter: Emitter, ref: Ref, scaled: bool = False) -> Origin:
    """Follow a view back through copies that were not made yet.

    Args:
        emitter: knows which those are.
        ref: the view.
        scaled: follow multiplications and divisions by a number too; only for what goes into softmax, since the scale
            is the product of factors and reciprocals, rounded once.
    """
    dims: list[Factors] = [[(n, s)] if n > 1 else [] for n, s in zip(ref.size, ref.stride, strict=True)]
    storage, offset, dtype, scale = ref.storage, ref.offset, ref.dtype, 1.0
    while isinstance(value := emitter.values.get(storage), Expression):
        root, number = value.root, 1.0
        if scaled and isinstance(root, Apply) and root.opcode in (Opcode.MULTIPLY_NUMBER, Opcode.DIVIDE_NUMBER):
            number = 1 / root.number if root.opcode is Opcode.DIVIDE_NUMBER and root.number else root.number
            if not number:
                break
            root = root.operands[0]
        if not isinstance(root, Leaf) or root.ref.size != value.ref.size or not root.ref.dtype.is_floating_point:
            break
        found = followed(value.ref, root.ref, offset, dims)
        if found is None:
            break
        offset, dims = found[0], [joined(factors) for factors in found[1]]
        storage, dtype, scale = root.ref.storage, root.ref.dtype, scale * number
    flat = [pair for factors in dims for pair in factors]
    size, stride = tuple(n for n, _ in flat), tuple(s for _, s in flat)
    return Origin(Ref(storage, offset, size, stride, dtype), dims, scale)


class Layout(Protocol):
    """The place of a tensor's elements in a memory, counted in elements: offset, sizes and strides."""

    @property
    def offset(self) -> int:
        """The position of the first element."""
        ...

    @property
    def size(self) -> tuple[int, ...]:
        """The length of each dimension."""
        ...

    @property
    def stride(self) -> tuple[int, ...]:
        """The distance between neighbours in each dimension."""
        ...


def followed(copy: Layout, source: Layout, offset: int, dims: list[Factors]) -> tuple[int, list[Factors]] | None:
    """Offset and dimensions of a view of a copy in its source; none where a dimension does not follow the copy's.

    The sizes of the factors of a dimension depend on the copy alone.
    """
    # the copy's dimensions, outermost first: where they overlap, a position says not which element it is
    own = sorted((s, n, t) for n, s, t in zip(copy.size, copy.stride, source.stride, strict=True) if n > 1)[::-1]
    if any(inner[0] * inner[1] > outer[0] for outer, inner in itertools.pairwise(own)):
        return None
    reached, start, rest = [], source.offset, offset - copy.offset
    for stride, _, theirs in own:
        index, rest = divmod(rest, stride)
        start += index * theirs
        reached.append(index)
    if rest:
        return None
    result = []
    for factors in dims:
        moved: Factors = []
        for size, stride in factors:
            while size > 1:
                i = next((i for i, (s, n, _) in enumerate(own) if s <= stride < s * n), None)
                if i is None or stride % own[i][0]:
                    return None
                s, n, theirs = own[i]
                jump = stride // s
                taken = min(size, -(-n // jump))
                if size % taken or (taken < size and n % jump):
                    return None
                moved.append((taken, jump * theirs))
                reached[i] += (taken - 1) * jump
                size, stride = size // taken, stride * taken
        result.append(moved)
    if any(last >= n for last, (_, n, _) in zip(reached, own, strict=True)):
        return None
    return start, result


def joined(factors: Factors) -> Factors:
    """Factors with those that lie in line as one."""
    result: Factors = []
    for size, stride in factors:
        if result and result[-1][0] * result[-1][1] == stride:
            result[-1] = (result[-1][0] * size, result[-1][1])
        else:
            result.append((size, stride))
    return result

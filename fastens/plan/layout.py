"""Where the elements of a tensor are in a memory, and in what that memory was copied from."""

from __future__ import annotations

import itertools
from typing import Protocol

Factors = list[tuple[int, int]]  # sizes and strides that one dimension is made of, innermost first


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
    # the copy's dimensions, outermost first: where they overlap, a position says not which element it is, but for
    # those that repeat one
    own = sorted((s, n, t) for n, s, t in zip(copy.size, copy.stride, source.stride, strict=True) if n > 1 and s)[::-1]
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

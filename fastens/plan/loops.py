"""The loops of an elementwise step."""

from __future__ import annotations

from fastens.program import steps
from fastens.trace.record import NotLowerable


def in_line(sizes: list[int], strides: list[list[int]]) -> list[tuple[int, list[int]]]:
    """Dimensions and their strides, sorted by the first operand's, those that lie in line as one."""
    order = sorted((d for d in range(len(sizes)) if sizes[d] != 1), key=lambda d: -strides[0][d])
    found: list[tuple[int, list[int]]] = []
    for d in order:
        size, inner = sizes[d], [s[d] for s in strides]
        if found and all(a == b * size for a, b in zip(found[-1][1], inner, strict=True)):
            found[-1] = (found[-1][0] * size, inner)
        else:
            found.append((size, inner))
    return found


def simplified(sizes: list[int], strides: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    """Sort the dimensions by the first operand's strides, join those that lie in line, and pad to six in front."""
    found = in_line(sizes, strides)
    if len(found) == 1 and found[0][0] > 1024:
        size, inner = found[0]
        run = next((n for n in range(1024, 63, -1) if size % n == 0), size)
        found = [(size // run, [s * run for s in inner]), (run, inner)]
    if len(found) > steps.MAX_DIMS:
        raise NotLowerable(f"an elementwise operation over {len(found)} dimensions")
    missing = steps.MAX_DIMS - len(found)
    out_sizes = [1] * missing + [size for size, _ in found]
    out_strides = [[0] * missing + [inner[i] for _, inner in found] for i in range(len(strides))]
    return out_sizes, out_strides

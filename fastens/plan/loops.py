"""The loops of an elementwise step."""

from __future__ import annotations

from fastens.plan.record import NotLowerable
from fastens.program import steps


def simplified(sizes: list[int], strides: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    """Sort the dimensions by the first operand's strides, join those that lie in line, and pad to six in front."""
    order = sorted((d for d in range(len(sizes)) if sizes[d] != 1), key=lambda d: -strides[0][d])
    kept = [(sizes[d], [s[d] for s in strides]) for d in order]
    joined: list[tuple[int, list[int]]] = []
    for size, inner in kept:
        if joined and all(a == b * size for a, b in zip(joined[-1][1], inner, strict=True)):
            joined[-1] = (joined[-1][0] * size, inner)
        else:
            joined.append((size, inner))
    if len(joined) == 1 and joined[0][0] > 1024:
        size, inner = joined[0]
        run = next((n for n in range(1024, 63, -1) if size % n == 0), size)
        joined = [(size // run, [s * run for s in inner]), (run, inner)]
    if len(joined) > steps.MAX_DIMS:
        raise NotLowerable(f"an elementwise operation over {len(joined)} dimensions")
    missing = steps.MAX_DIMS - len(joined)
    out_sizes = [1] * missing + [size for size, _ in joined]
    out_strides = [[0] * missing + [inner[i] for _, inner in joined] for i in range(len(strides))]
    return out_sizes, out_strides

"""Vectors, rows and images that lie equally far apart, as kernels read and write them without a copy."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def strided_vectors(x: Tensor, copy: bool = False) -> tuple[Tensor, int]:
    """Return x [..., C] and how many elements each of its vectors is behind the one before.

    Args:
        x: contiguous in its last dimension.
        copy: whether x may be copied where its vectors are not equally far apart.

    Raises:
        ValueError: vectors that are not equally far apart, or not contiguous, and no copy is allowed.
    """
    distance = merged(x.shape[:-1], x.stride()[:-1])
    if distance is None or (x.shape[-1] > 1 and x.stride(-1) != 1):
        if not copy:
            raise _refusal("contiguous vectors", x)
        return x.contiguous(), x.shape[-1]
    return x, distance


def strided_rows(x: Tensor, last: int, copy: bool = False) -> tuple[Tensor, tuple[int, int]]:
    """Return x [R, ..., *vector] and the strides of its rows, and of the vectors of a row.

    Args:
        x: with vectors of ``last`` dimensions, contiguous; or of one row, where they take all dimensions.
        last: dimensions of a vector.
        copy: whether x may be copied where the vectors of a row are not equally far apart.

    Raises:
        ValueError: vectors that are not equally far apart, or not contiguous, and no copy is allowed.
    """
    split = x.ndim - last
    distance = merged(x.shape[1:split], x.stride()[1:split])
    if distance is None or merged(x.shape[split:], x.stride()[split:]) != 1:
        if not copy:
            raise _refusal("contiguous vectors", x)
        x = x.contiguous()
        distance = x.shape[split:].numel()
    return x, (x.stride(0) if split else 0, distance)


def strided_images(x: Tensor, copy: bool = False) -> tuple[Tensor, tuple[int, int, int]]:
    """Return x [R, C, *space] and the strides of its rows, channels and places.

    Args:
        x: of one place or more.
        copy: whether x may be copied where its places are not equally far apart.

    Raises:
        ValueError: places that are not equally far apart, and no copy is allowed.
    """
    distance = merged(x.shape[2:], x.stride()[2:])
    if distance is None:
        if not copy:
            raise _refusal("places", x)
        x, distance = x.contiguous(), 1
    return x, (x.stride(0), x.stride(1), distance)


def merged(sizes: Sequence[int], strides: Sequence[int]) -> int | None:
    """Stride of these dimensions as one, none where they are not equally far apart; of a single element, 1."""
    distance, expected = None, 0
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size == 1:
            continue
        if distance is None:
            distance = stride
        elif stride != expected:
            return None
        expected = stride * size
    return 1 if distance is None else distance


def _refusal(what: str, x: Tensor) -> ValueError:
    return ValueError(
        f"{list(x.shape)} with strides {list(x.stride())} is written to: expected {what} equally far apart"
    )

"""Tensors of vectors that lie equally far apart, as kernels read and write them without a copy."""

from __future__ import annotations

from torch import Tensor


def strided_vectors(x: Tensor, copy: bool = False) -> tuple[Tensor, int]:
    """Return x [..., C] and how many elements each of its vectors is behind the one before.

    Args:
        x: of one vector or more.
        copy: whether x may be copied where its vectors are not equally far apart.

    Raises:
        ValueError: vectors that are not equally far apart, or not contiguous, and no copy is allowed.
    """
    distance = _distance(x)
    if distance is None:
        if not copy:
            raise ValueError(
                f"vectors of {list(x.shape)} with strides {list(x.stride())}: expected contiguous ones, equally far "
                "apart"
            )
        x, distance = x.contiguous(), x.shape[-1]
    return x, distance


def _distance(x: Tensor) -> int | None:
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return None
    distance, expected = None, 0
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if distance is None:
            distance, expected = stride, stride
        elif stride != expected:
            return None
        expected *= size
    return x.shape[-1] if distance is None else distance

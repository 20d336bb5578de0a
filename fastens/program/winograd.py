"""Weights of 3x3 convolutions for Winograd's minimal filtering, as csrc/kernels/program/winograd.h multiplies them.

A square of m x m pixels of the output takes a x a products of a square of the input, a = m + 2, in the place of 9 m^2
(Lavin and Gray, arXiv 1509.09308): A^T (G g G^T * B^T d B) A.
"""

import functools
import math

import torch
from torch import Tensor

TILES = (2, 4)  # m


@functools.cache
def filter_matrix(tile: int) -> Tensor:
    """G, float64 [tile + 2, 3]: for the points 0, +-1 and infinity, or 0, +-sqrt(1/2), +-sqrt(2) and infinity."""
    low, high = math.sqrt(0.5), math.sqrt(2)
    rows = {
        2: [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]],
        4: [
            [1, 0, 0],
            [-2 / 3, -2 / 3 * low, -1 / 3],
            [-2 / 3, 2 / 3 * low, -1 / 3],
            [1 / 6, 1 / 6 * high, 1 / 3],
            [1 / 6, -1 / 6 * high, 1 / 3],
            [0, 0, 1],
        ],
    }
    return torch.tensor(rows[tile], dtype=torch.float64, device="cpu")


def transformed(weight: Tensor, tile: int) -> Tensor:
    """G g G^T of kernels [..., 3, 3]: [..., a, a] in their dtype."""
    return _both_sides(filter_matrix(tile), weight)


def recovered(transformed: Tensor, tile: int) -> Tensor:
    """The kernels [..., 3, 3] that :func:`transformed` made [..., a, a] of, but for rounding."""
    return _both_sides(torch.linalg.pinv(filter_matrix(tile)), transformed)


def _both_sides(matrix: Tensor, kernels: Tensor) -> Tensor:
    """M k M^T, as one product over flattened kernels."""
    both = torch.kron(matrix, matrix).to(kernels.dtype)
    size = len(matrix)
    return (kernels.flatten(-2) @ both.T).unflatten(-1, (size, size))

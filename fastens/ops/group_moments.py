"""Mean and scatter of each group of channels, which a convolution normalises its input by."""

import math

import torch
from torch import Tensor

from fastens.ops._dispatch import Op
from fastens.reference import group_moments as reference


def _fake(x: Tensor, num_groups: int) -> Tensor:
    spans = (math.prod(x.shape[2:]) + reference.SPAN - 1) // reference.SPAN
    return x.new_empty(x.shape[0], num_groups, spans, 2, dtype=torch.promote_types(x.dtype, torch.float32))


_group_moments = Op("group_moments(Tensor x, SymInt num_groups) -> Tensor", reference.group_moments, {"triton": _fake})


def group_moments(x: Tensor, num_groups: int, *, backend: str = "auto") -> Tensor:
    """Take mean and sum of squared differences from it, of each group of channels and each span of the space.

    The space is cut into T spans of 128 places, the last one shorter. Moments of spans join exactly (Chan et al.,
    "Updating formulae and a pairwise algorithm for computing sample variances", 1979), also at means that are large
    beside the deviation.

    Args:
        x: [R, C, *space].
        num_groups: G, how many groups the C channels form.
        backend: the code that runs it.

    Returns:
        [R, G, T, 2], float32, or float64 for float64.

    Raises:
        ValueError: channels that do not form so many groups, or an unknown backend.
        RuntimeError: a backend asked for by name that cannot run here.
    """
    if x.ndim < 3 or num_groups < 1 or x.shape[1] % num_groups:
        raise ValueError(
            f"group_moments: x is {list(x.shape)}, expected [R, C, *space] with {num_groups} groups of C channels"
        )
    return _group_moments.resolve(backend, [x])(x, num_groups)

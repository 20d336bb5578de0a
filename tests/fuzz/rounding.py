"""How much of a difference the members' own rounding explains."""

import copy
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from tests.fuzz import oracle

SMALL = 0.02  # of the largest magnitude: what is off by more is no rounding
WITNESS = 10  # how many times the difference of one rounding another's may be


def own_rounding(members: list[nn.Module], call: Any, expected: list[Any]) -> float:
    """How far what members gave is from what they give in float64, relative to the largest magnitude of a score.

    Zero where that cannot be told: for what float64 gives, and where a copy does not run in it.
    """

    def wide(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    args, kwargs = pytree.tree_map(wide, call)
    farthest = 0.0
    for member, output in zip(members, expected, strict=True):
        try:
            precise = copy.deepcopy(member).double()(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        except Exception:
            return 0.0
        for a, b in zip(pytree.tree_leaves(output), pytree.tree_leaves(precise), strict=True):
            if oracle.is_score(a) and a.dtype != torch.float64 and a.numel():
                a, b = a.detach().double(), b.detach()
                apart = torch.where(a.isfinite() & b.isfinite(), a - b, 0.0).abs().max()
                farthest = max(farthest, float(apart) / max(oracle.largest([b]), oracle.FLOOR))
    return farthest

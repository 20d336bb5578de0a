"""A forest on tensors: every tree followed level by level, then the rule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastens import rules
from fastens.reference.aggregate import aggregate


def forest_predict(
    x: Tensor,
    trees: Sequence[Tensor],
    forest: int,
    depth: int,
    double_inputs: bool,
    rule: str,
    option: str,
    values: Sequence[float],
    seed: int,
    offset: int,
) -> Tensor:
    """Combine the members of a forest by a rule.

    Args:
        x: [n, features], float32 or float64; NaN is missing.
        trees: root [T] of each tree among N nodes; feature [N], -1 for a leaf; threshold [N]; left and right [N],
            nodes; default_left [N]; leaf [N], row of the leaves; leaves [L, p]; ranges [K + 1], member k sums trees
            [ranges[k], ranges[k + 1]); base [K, p], added to it.
        forest: number of the packed forest, which this function does without.
        depth: of the deepest tree.
        double_inputs: compare in float64, otherwise in float32.
        rule: name of the rule.
        option: of the rule, as :mod:`fastens.rules` has it.
        values: of the rule.
        seed: of a random rule.
        offset: of a random rule.

    Returns:
        float64 [n, p].
    """
    root, feature, threshold, left, right, default_left, leaf, leaves, ranges, base = trees
    compared = (x if double_inputs else x.to(torch.float32)).to(torch.float64)
    rows = torch.arange(len(x), device=x.device)
    at = root[:, None].expand(-1, len(x))  # [T, n]
    for _ in range(depth):
        split = feature[at]
        value = compared[rows, split.clamp(min=0)]
        goes_left = torch.where(value.isnan(), default_left[at].bool(), value <= threshold[at])
        at = torch.where(split < 0, at, torch.where(goes_left, left[at], right[at]))
    outputs = leaves[leaf[at]]  # [T, n, p]
    member = torch.repeat_interleave(ranges.diff(), output_size=len(root))  # [T]
    members = base[:, None].expand(-1, len(x), -1).index_add(0, member, outputs)
    return aggregate(members, rules.from_schema(rule, option, values), seed=seed, offset=offset)

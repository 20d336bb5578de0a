"""A forest as the paper's code evaluates it: one tree after the other."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import numpy as np
import numpy.typing as npt
import torch

from fastens import rules
from fastens.reference.aggregate import aggregate

Array = npt.NDArray


@dataclasses.dataclass(frozen=True, eq=False)
class Trees:
    """The trees of a forest in arrays over all nodes; children come after their parents.

    A row goes left where ``x <= threshold``. N nodes, T trees, L leaves, p outputs.

    Attributes:
        offsets: [T + 1], the first node of each tree.
        feature: [N], the feature that a node splits on, -1 for a leaf.
        threshold: [N].
        left: [N], index within the tree.
        right: [N], index within the tree.
        default_left: [N], whether a missing value goes left.
        values: [L, p], the i-th leaf in node order has row i.
        num_features: features of a row.
    """

    offsets: Array  # int64
    feature: Array  # int32
    threshold: Array  # float64
    left: Array  # int32
    right: Array  # int32
    default_left: Array  # uint8
    values: Array  # float64
    num_features: int

    def __post_init__(self) -> None:
        """Bring the arrays to their dtypes, make them read-only, and check that they are trees.

        Raises:
            ValueError: shapes that disagree, or a feature, threshold or child out of range.
        """
        dtypes = {"offsets": np.int64, "feature": np.int32, "threshold": np.float64, "left": np.int32}
        dtypes |= {"right": np.int32, "default_left": np.uint8, "values": np.float64}
        for name, dtype in dtypes.items():
            array = np.array(getattr(self, name), dtype=dtype, order="C")
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        self._check()

    @property
    def num_trees(self) -> int:
        """T."""
        return len(self.offsets) - 1

    @functools.cached_property
    def depth(self) -> int:
        """Splits on the longest path from a root to a leaf."""
        deep, level = 0, self.offsets[:-1][self.feature[self.offsets[:-1]] >= 0]
        first = np.repeat(self.offsets[:-1], np.diff(self.offsets))
        while len(level):
            deep += 1
            below = np.concatenate([first[level] + self.left[level], first[level] + self.right[level]])
            level = below[self.feature[below] >= 0]
        return deep

    def as_tensors(self) -> tuple[Array, ...]:
        """Arrays for tensors: root [T], and by node feature, threshold, left, right, default_left, leaf; leaves [L, p].

        Children are numbered among all nodes, and leaf is a row of the leaves.
        """
        first = np.repeat(self.offsets[:-1], np.diff(self.offsets))
        leaf = np.cumsum(self.feature < 0) - 1
        nodes = (self.feature.astype(np.int64), np.array(self.threshold), first + self.left, first + self.right)
        return (np.array(self.offsets[:-1]), *nodes, np.array(self.default_left), leaf, np.array(self.values))

    def _check(self) -> None:
        nodes = len(self.feature)
        for name in ("threshold", "left", "right", "default_left"):
            if getattr(self, name).shape != (nodes,):
                raise ValueError(f"`{name}` is {list(getattr(self, name).shape)}, expected one value per node, {nodes}")
        if self.offsets.ndim != 1 or self.num_trees < 1 or self.offsets[0] != 0 or self.offsets[-1] != nodes:
            raise ValueError("`offsets` does not span the nodes of at least one tree")
        sizes = np.diff(self.offsets)
        if sizes.min() < 1:
            raise ValueError(f"tree {int(sizes.argmin())} has no nodes")
        if self.values.ndim != 2 or len(self.values) != np.count_nonzero(self.feature < 0) or self.values.shape[1] < 1:
            raise ValueError(f"`values` is {list(self.values.shape)}, expected a row per leaf and a column per output")
        own = np.arange(nodes) - np.repeat(self.offsets[:-1], sizes)
        split = self.feature >= 0
        bad = split & ((self.feature >= self.num_features) | np.isnan(self.threshold))
        for child in (self.left, self.right):
            bad |= split & ((child <= own) | (child >= np.repeat(sizes, sizes)))
        if bad.any():
            raise ValueError(f"node {int(bad.argmax())} has a feature, threshold or child out of range")
        begin = np.repeat(self.offsets[:-1], sizes)[split]
        children = np.concatenate([begin + self.left[split], begin + self.right[split]])
        parents = np.bincount(np.concatenate([children, self.offsets[:-1]]), minlength=nodes)
        if (parents != 1).any():
            raise ValueError(f"node {int((parents != 1).argmax())} has two parents, or none")


def predict_members(trees: Trees, x: Array, ranges: Array | None = None) -> Array:
    """Evaluate every member: a tree, or the sum of trees [ranges[k], ranges[k + 1]).

    Args:
        trees: the forest.
        x: [n, num_features], in the dtype that the source library compares in; NaN is missing.
        ranges: [K + 1]; by default every tree is a member.

    Returns:
        float64 [K, n, p].
    """
    first_leaf = np.concatenate([[0], np.cumsum(trees.feature < 0)])
    outputs = [_predict_tree(trees, tree, first_leaf, x) for tree in range(trees.num_trees)]
    if ranges is None:
        return np.stack(outputs)
    zeros = np.zeros((len(x), trees.values.shape[1]))
    return np.stack([sum(outputs[a:b], zeros) for a, b in itertools.pairwise(ranges)])


def combine(members: Array, rule: rules.Rule, seed: int = 0, offset: int = 0) -> Array:
    """Combine members by a rule, to the last bit as the kernels do: members one after the other, no fused additions.

    The geometric mean is the logarithm of one product, kept as fraction and exponent, by the C library's functions.

    Args:
        members: float64 [K, n, p].
        rule: the rule.
        seed: of the member draw of "alternating".
        offset: of the member draw of "alternating".

    Returns:
        [n, p].
    """
    if not rule.has_kernels:
        return aggregate(torch.from_numpy(members), rule).numpy()
    if isinstance(rule, rules.Mean | rules.Sum):
        weights = rule.values or itertools.repeat(1.0)
        zeros = np.zeros(members.shape[1:])
        total = sum((w * member for w, member in zip(weights, members, strict=False) if w), zeros)
        return total / len(members) if isinstance(rule, rules.Mean) and not rule.values else total
    if isinstance(rule, rules.Geometric) and members.size:
        return _geometric(members, rule)
    return aggregate(torch.from_numpy(members), rule, seed=seed, offset=offset).numpy()


def _geometric(members: Array, rule: rules.Geometric) -> Array:
    low = members.min((0, 2))[:, None] if rule.shift == "sample" else members.min()
    base, shift = np.minimum(low, 0.0), np.maximum(low, 0.0)
    product = np.full(members.shape[1:], 0.5)  # times two: a fraction in [1, 2), as log2 takes it below
    exponent = np.zeros(members.shape[1:])
    for member in members:
        fraction, power = np.frexp(((member - base) + shift) + rule.eps)
        product, carried = np.frexp(product * fraction)
        exponent += power + carried
    logarithm = np.array([math.log2(2 * value) for value in product.flat]).reshape(product.shape)
    mean = np.array([math.exp2(value) for value in ((logarithm + exponent) / len(members)).flat]).reshape(product.shape)
    return (mean - rule.eps) + (base - shift)


def _predict_tree(trees: Trees, tree: int, first_leaf: Array, x: Array) -> Array:
    at = np.full(len(x), trees.offsets[tree])
    rows = np.arange(len(x))
    while (trees.feature[at] >= 0).any():
        split = trees.feature[at] >= 0
        value = x[rows, np.maximum(trees.feature[at], 0)]
        left = np.where(np.isnan(value), trees.default_left[at] != 0, value <= trees.threshold[at])
        at = np.where(split, trees.offsets[tree] + np.where(left, trees.left[at], trees.right[at]), at)
    return trees.values[first_leaf[at]]

"""A forest on tensors."""

from __future__ import annotations

import itertools
import weakref
from typing import Protocol

import numpy.typing as npt
import torch
from torch import Tensor

from fastens import rules
from fastens.ops._dispatch import LIBRARY, Op
from fastens.reference import forest_predict as reference


class PackedForest(Protocol):
    """What the kernel for the CPU calls."""

    def predict_by_rule(self, rows: npt.NDArray, rule: rules.Rule, seed: int, offset: int) -> npt.NDArray:
        """Combine the members for float32 or float64 rows [n, features]; float64 [n, p]."""
        ...


_numbers = itertools.count()
_forests: weakref.WeakValueDictionary[int, PackedForest] = weakref.WeakValueDictionary()


def number_of(forest: PackedForest) -> int:
    """Make a forest known to the op, as long as it lives, and return the number that stands for it there."""
    number = next(_numbers)
    _forests[number] = forest
    return number


def _fake(
    x: Tensor,
    trees: list[Tensor],
    forest: int,
    depth: int,
    double_inputs: bool,
    rule: str,
    option: str,
    values: list[float],
    seed: int,
    offset: int,
) -> Tensor:
    return x.new_empty((x.shape[0], trees[-1].shape[1]), dtype=torch.float64)


_SCHEMA = (
    "forest_predict(Tensor x, Tensor[] trees, int forest, int depth, bool double_inputs, str rule, str option, "
    "float[] values, int seed, int offset) -> Tensor"
)
_predict = Op(_SCHEMA, reference.forest_predict, {"native": _fake})


def _on_cpu(
    x: Tensor,
    trees: list[Tensor],
    forest: int,
    depth: int,
    double_inputs: bool,
    rule: str,
    option: str,
    values: list[float],
    seed: int,
    offset: int,
) -> Tensor:
    packed = _forests.get(forest)
    if packed is None:
        raise RuntimeError(f"forest_predict: forest {forest} is gone; keep the Forest alive as long as its graph")
    rows = x.detach().numpy()  # the tensor's own memory
    return torch.from_numpy(packed.predict_by_rule(rows, rules.from_schema(rule, option, values), seed, offset))


LIBRARY.impl(_predict.kernels["native"], _on_cpu, "CPU")


def forest_predict(
    x: Tensor,
    trees: list[Tensor],
    forest: int,
    depth: int,
    double_inputs: bool,
    rule: rules.Rule,
    *,
    seed: int = 0,
    offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Combine the members of a forest by a rule; no gradient, since trees are constant between their thresholds.

    Args:
        x: [n, features], float32 or float64, on the device of the trees; NaN is missing.
        trees: see :func:`fastens.reference.forest_predict.forest_predict`.
        forest: from :func:`number_of`.
        depth: of the deepest tree.
        double_inputs: compare in float64, otherwise in float32.
        rule: the rule.
        seed: of a random rule.
        offset: of a random rule.
        backend: "auto", "reference" or "native".

    Returns:
        float64 [n, p].
    """
    given = x.detach()
    arguments = (rule.name, rule.option, rule.values, seed, offset)
    return _predict.resolve(backend, [given])(given, trees, forest, depth, double_inputs, *arguments)

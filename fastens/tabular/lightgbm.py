"""Boosters of LightGBM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastens.reference.forest import Trees
from fastens.tabular.inputs import LIGHTGBM_ZERO, Inputs
from fastens.tabular.own_code import check_own_code

IDENTITY_LINK = ("regression", "regression_l1", "huber", "fair", "quantile", "mape")
CATEGORICAL, DEFAULT_LEFT = 1, 2  # bits of a split's decision type; above them the kind of missing values
NO_MISSING, ZERO_IS_MISSING = 0, 1


def read_boosters(models: Any) -> dict[str, Any]:
    """Return the arguments of :class:`fastens.Forest`; errors as :meth:`fastens.Forest.from_lightgbm`.

    LightGBM compares float64 values with float64 thresholds.
    """
    boosters = [_Booster(model) for model in (models if isinstance(models, Sequence) else [models])]
    if not boosters:
        raise ValueError("`models` is empty, expected at least one booster")
    first = boosters[0].inputs
    for k, booster in enumerate(boosters):
        own = booster.inputs
        if own.num_features != first.num_features:
            raise ValueError(
                f"models[{k}] has {own.num_features} features, models[0] {first.num_features}; members must agree"
            )
        if own.estimator != first.estimator:
            raise ValueError(
                f"models[{k}] is a {own.estimator}, models[0] a {first.estimator}, which read tables apart"
            )
    averaged = [booster.averaged for booster in boosters]
    if averaged == [True]:
        ranges = None
    elif any(averaged):
        raise ValueError("a model of boosting='rf' has its trees as members; pass one such model alone")
    else:
        ranges = np.cumsum([0, *(len(booster.trees) for booster in boosters)])
    trees = [_nodes(tree) for booster in boosters for tree in booster.trees]
    fields = {name: np.concatenate([tree[name] for tree in trees]) for name in trees[0]}
    offsets = np.cumsum([0, *(len(tree["feature"]) for tree in trees)])
    return {
        "trees": Trees(offsets=offsets, num_features=first.num_features, **fields),
        "ranges": ranges,
        "inputs": first,
        "double_inputs": True,
        "single_output": True,
    }


class _Booster:
    """One model, parsed from its text form: JSON has no infinities, and their thresholds come out finite there."""

    def __init__(self, model: Any) -> None:
        import lightgbm

        booster = model
        if isinstance(model, lightgbm.LGBMModel):
            check_own_code(model, lightgbm.LGBMModel, "predict", "_process_params")
            booster = model.booster_
        if not isinstance(booster, lightgbm.Booster):
            raise TypeError(f"expected a lightgbm Booster or LGBMRegressor, got {type(model).__name__}")
        check_own_code(booster, lightgbm.Booster, "predict")
        if booster.pandas_categorical:  # by which it holds every later frame to its categories, split on or not
            raise ValueError("columns of categories are not taken; encode the categories as numbers")
        best = booster.best_iteration if booster.best_iteration > 0 else None
        head, *trees = booster.model_to_string(num_iteration=best).split("end of trees")[0].split("\nTree=")
        header = _fields(head)
        objective = header.get("objective", "").split(" ")
        if header["num_tree_per_iteration"] != "1" or objective[0] not in IDENTITY_LINK or "sqrt" in objective:
            raise ValueError(f"objective {header.get('objective')!r} is not taken, only {', '.join(IDENTITY_LINK)}")
        self.averaged = "average_output" in head.split("\n")
        self.trees = [_fields(tree) for tree in trees]
        if not self.trees:
            raise ValueError("the booster has no trees: train it first")
        kind = "Booster" if booster is model else type(model).__name__
        self.inputs = Inputs(int(header["max_feature_idx"]) + 1, "lightgbm", kind)


def _fields(text: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in text.split("\n") if "=" in line)


def _nodes(tree: dict[str, str]) -> dict[str, np.ndarray]:
    """The nodes of one tree as the fields of :class:`Trees`: splits, each before those below it, then leaves."""
    if tree.get("is_linear", "0") != "0":
        raise ValueError("linear trees are not taken; train with linear_tree=False")
    value = _numbers(tree["leaf_value"], np.float64)
    splits = int(tree["num_leaves"]) - 1
    if not splits:
        nothing = np.zeros(1, int)
        names = ("threshold", "left", "right", "default_left")
        return {"feature": nothing - 1, **dict.fromkeys(names, nothing), "values": value[:1, None]}
    decision = _numbers(tree["decision_type"], np.int64)
    missing = decision >> 2 & 3
    if (decision & CATEGORICAL).any():
        raise ValueError("categorical splits are not taken; encode the categories as numbers")
    if (missing == ZERO_IS_MISSING).any():
        raise ValueError("zero as missing value is not taken; train with zero_as_missing=False")
    threshold = _around_zero(_numbers(tree["threshold"], np.float64))
    # Without missing values in training, NaN counts as zero.
    default_left = np.where(missing == NO_MISSING, threshold >= 0, decision & DEFAULT_LEFT)
    children = np.stack([_numbers(tree[name], np.int64) for name in ("left_child", "right_child")], 1)
    order = [0]
    for split in order:
        order += [int(child) for child in children[split] if child >= 0]
    place = np.empty(splits, np.int64)
    place[order] = np.arange(splits)
    # A leaf is written as the complement of its number.
    below = np.where(children >= 0, place[np.maximum(children, 0)], splits + ~children)[order]
    leaves = np.zeros(splits + 1, np.int64)
    return {
        "feature": np.concatenate([_numbers(tree["split_feature"], np.int64)[order], leaves - 1]),
        "threshold": np.concatenate([threshold[order], leaves]),
        "left": np.concatenate([below[:, 0], leaves]),
        "right": np.concatenate([below[:, 1], leaves]),
        "default_left": np.concatenate([default_left[order] != 0, leaves]),
        "values": value[:, None],
    }


def _around_zero(threshold: np.ndarray) -> np.ndarray:
    """Thresholds that send every value within ``LIGHTGBM_ZERO`` of zero where LightGBM sends zero."""
    moved = np.where(threshold >= 0, LIGHTGBM_ZERO, np.nextafter(-LIGHTGBM_ZERO, -np.inf))
    return np.where(np.abs(threshold) <= LIGHTGBM_ZERO, moved, threshold)


def _numbers(text: str, dtype: type) -> np.ndarray:
    return np.array(text.split(), dtype)

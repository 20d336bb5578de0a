"""Forests of scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastens.reference.forest import Trees
from fastens.tabular.inputs import Inputs
from fastens.tabular.own_code import check_own_code


def read_forest(forest: Any) -> dict[str, Any]:
    """Return the arguments of :class:`fastens.Forest`; errors as :meth:`fastens.Forest.from_sklearn`.

    scikit-learn compares float32 values with float64 thresholds: ``x <= t`` holds for a float32 x exactly where it
    does for the largest float32 that is at most t.
    """
    from sklearn.ensemble import ExtraTreesRegressor, RandomForestRegressor
    from sklearn.exceptions import NotFittedError
    from sklearn.tree import DecisionTreeRegressor

    name = type(forest).__name__
    if not isinstance(forest, RandomForestRegressor | ExtraTreesRegressor):
        raise TypeError(f"expected a RandomForestRegressor or ExtraTreesRegressor, got {name}")
    if not hasattr(forest, "estimators_"):
        raise NotFittedError(f"this {name} is not fitted: call `fit` first")
    kind = RandomForestRegressor if isinstance(forest, RandomForestRegressor) else ExtraTreesRegressor
    check_own_code(forest, kind, "predict", "_validate_X_predict")
    estimators = forest.estimators_
    for estimator in estimators:
        if not isinstance(estimator, DecisionTreeRegressor):
            raise TypeError(f"expected trees for regression in `estimators_`, got {type(estimator).__name__}")
        check_own_code(estimator, DecisionTreeRegressor, "predict", "_validate_X_predict", "_support_missing_values")
    trees = [estimator.tree_ for estimator in estimators]
    leaf = [tree.children_left < 0 for tree in trees]
    names = getattr(forest, "feature_names_in_", None)
    num_features = int(getattr(forest, "n_features_in_"))  # noqa: B009
    allow_nan = bool(estimators[0]._support_missing_values(np.empty((0, num_features))))
    inputs = Inputs(
        num_features,
        "sklearn",
        kind.__name__,
        None if names is None else tuple(map(str, names)),
        allow_nan,
    )
    return {
        "trees": Trees(
            offsets=np.concatenate([[0], np.cumsum([tree.node_count for tree in trees])]),
            feature=np.concatenate([np.where(x, -1, tree.feature) for x, tree in zip(leaf, trees, strict=True)]),
            threshold=float32_at_most(np.concatenate([tree.threshold for tree in trees])),
            left=np.concatenate([tree.children_left for tree in trees]),
            right=np.concatenate([tree.children_right for tree in trees]),
            default_left=np.concatenate([tree.missing_go_to_left for tree in trees]),
            values=np.concatenate([tree.value[x][:, :, 0] for x, tree in zip(leaf, trees, strict=True)]),
            num_features=inputs.num_features,
        ),
        "inputs": inputs,
        "single_output": forest.n_outputs_ == 1,
    }


def float32_at_most(values: np.ndarray) -> np.ndarray:
    """The largest float32 that is at most each float64, as float64."""
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float32)
    down = np.nextafter(rounded, np.float32(-np.inf))
    return np.where(rounded > values, down, rounded).astype(np.float64)

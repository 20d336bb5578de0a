"""Boosters of LightGBM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastens.reference.forest import Trees

IDENTITY_LINK = ("regression", "regression_l1", "huber", "fair", "quantile", "mape")


def read_boosters(models: Any) -> dict[str, Any]:
    """Return the arguments of :class:`fastens.Forest`; errors as :meth:`fastens.Forest.from_lightgbm`.

    LightGBM compares float64 values with float64 thresholds.
    """
    boosters = [_dump(model) for model in (models if isinstance(models, Sequence) else [models])]
    if not boosters:
        raise ValueError("`models` is empty, expected at least one booster")
    num_features = boosters[0]["max_feature_idx"] + 1
    for k, booster in enumerate(boosters):
        own = booster["max_feature_idx"] + 1
        if own != num_features:
            raise ValueError(f"models[{k}] has {own} features, models[0] {num_features}; members must agree")
    nodes: list[list[tuple]] = [_nodes(tree) for booster in boosters for tree in booster["tree_info"]]
    averaged = [booster["average_output"] for booster in boosters]
    if averaged == [True]:
        ranges = None
    elif any(averaged):
        raise ValueError("a model of boosting='rf' has its trees as members; pass one such model alone")
    else:
        ranges = np.cumsum([0, *(len(booster["tree_info"]) for booster in boosters)])
    feature, threshold, left, right, default_left, value = zip(*(node for tree in nodes for node in tree), strict=True)
    leaf = np.array(feature) < 0
    trees = Trees(
        offsets=np.cumsum([0, *(len(tree) for tree in nodes)]),
        feature=np.array(feature),
        threshold=np.array(threshold),
        left=np.array(left),
        right=np.array(right),
        default_left=np.array(default_left),
        values=np.array(value, np.float64)[leaf][:, None],
        num_features=num_features,
    )
    return {"trees": trees, "ranges": ranges, "double_inputs": True, "single_output": True}


def _dump(model: Any) -> dict[str, Any]:
    import lightgbm

    booster = getattr(model, "booster_", model) if isinstance(model, lightgbm.LGBMModel) else model
    if not isinstance(booster, lightgbm.Booster):
        raise TypeError(f"expected a lightgbm Booster or LGBMRegressor, got {type(model).__name__}")
    best = booster.best_iteration if booster.best_iteration > 0 else None
    dump = booster.dump_model(num_iteration=best)
    objective = str(dump.get("objective", "")).split(" ")
    if dump["num_tree_per_iteration"] != 1 or objective[0] not in IDENTITY_LINK or "sqrt" in objective:
        raise ValueError(f"objective {dump.get('objective')!r} is not taken, only {', '.join(IDENTITY_LINK)}")
    return dump


def _nodes(tree: dict[str, Any]) -> list[tuple]:
    """(feature, threshold, left, right, default left, value) of each node, parents first."""
    queue, nodes = [tree["tree_structure"]], []
    for node in queue:
        if "split_feature" not in node:
            if "leaf_coeff" in node:
                raise ValueError("linear trees are not taken; train with linear_tree=False")
            nodes.append((-1, 0.0, 0, 0, 0, node["leaf_value"]))
            continue
        if node["decision_type"] != "<=":
            raise ValueError("categorical splits are not taken; encode the categories as numbers")
        missing = node["missing_type"]
        if missing == "Zero":
            raise ValueError("zero as missing value is not taken; train with zero_as_missing=False")
        # Without missing values in training, NaN counts as zero.
        default_left = node["default_left"] if missing == "NaN" else node["threshold"] >= 0
        nodes.append((node["split_feature"], node["threshold"], len(queue), len(queue) + 1, default_left, 0.0))
        queue += [node["left_child"], node["right_child"]]
    return nodes

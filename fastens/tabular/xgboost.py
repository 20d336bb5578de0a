"""Boosters of XGBoost."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastens.reference.forest import Trees
from fastens.tabular.inputs import Inputs
from fastens.tabular.own_code import check_own_code

IDENTITY_LINK = ("reg:squarederror", "reg:absoluteerror", "reg:pseudohubererror", "reg:quantileerror")


def read_boosters(models: Any) -> dict[str, Any]:
    """Return the arguments of :class:`fastens.Forest`; errors as :meth:`fastens.Forest.from_xgboost`."""
    boosters = [_Booster(model) for model in (models if isinstance(models, Sequence) else [models])]
    if not boosters:
        raise ValueError("`models` is empty, expected at least one booster")
    first = boosters[0]
    for k, booster in enumerate(boosters):
        if (booster.num_features, booster.num_outputs) != (first.num_features, first.num_outputs):
            raise ValueError(
                f"models[{k}] has {booster.num_features} features and {booster.num_outputs} outputs, models[0] "
                f"{first.num_features} and {first.num_outputs}; members must agree"
            )
        if booster.inputs.names != first.inputs.names:
            raise ValueError(f"models[{k}] names its features otherwise than models[0]; members must agree")
    if len(boosters) == 1 and first.parallel > 1 and first.rounds == 1:
        # Rounds are laid out output by output; a leaf holds 1/K of its tree's prediction.
        order = np.arange(first.parallel * first.num_outputs).reshape(first.num_outputs, first.parallel).T.ravel()
        nodes = [first.nodes(tree, scale=first.parallel) for tree in order.tolist()]
        ranges = np.arange(first.parallel + 1) * first.num_outputs
        base = np.tile(first.base, (first.parallel, 1))
    else:
        nodes = [booster.nodes(tree) for booster in boosters for tree in range(booster.num_trees)]
        ranges = np.cumsum([0, *(booster.num_trees for booster in boosters)])
        base = np.stack([booster.base for booster in boosters])
    columns = {name: np.concatenate([tree[name] for tree in nodes]) for name in nodes[0]}
    offsets = np.cumsum([0, *(len(tree["feature"]) for tree in nodes)])
    return {
        "trees": Trees(offsets=offsets, num_features=first.num_features, **columns),
        "ranges": ranges,
        "base": base,
        "inputs": first.inputs,
        "allow_inf": True,
        "single_output": first.num_outputs == 1,
        "dtype": np.float32,
    }


def predictions(models: Any) -> list[Callable]:
    """The models' own predictions of arrays."""
    held = models if isinstance(models, Sequence) else [models]
    return [getattr(model, "inplace_predict", None) or model.predict for model in held]


_OF_MODELS = ("predict", "get_booster", "best_iteration", "_get_iteration_range", "_can_use_inplace_predict")


class _Booster:
    """One model, parsed from its JSON form."""

    def __init__(self, model: Any) -> None:
        import xgboost

        last_round = None
        if isinstance(model, xgboost.XGBModel):
            check_own_code(model, xgboost.XGBModel, *_OF_MODELS)
            if not np.isnan(model.missing):
                raise ValueError(f"`missing` is {model.missing}; only NaN is taken: replace the value in the data")
            booster = model.get_booster()
            with contextlib.suppress(AttributeError):  # known to the booster, whoever stopped it and wherever it was
                last_round = booster.best_iteration + 1
        elif isinstance(model, xgboost.Booster):
            booster = model  # predicts with all its trees, wherever it was best
        else:
            raise TypeError(f"expected an xgboost Booster or XGBModel, got {type(model).__name__}")
        check_own_code(booster, xgboost.Booster, "predict", "inplace_predict")
        learner = json.loads(bytes(booster.save_raw("json")))["learner"]
        parameters, objective = learner["learner_model_param"], learner["objective"]["name"]
        kind, holder = learner["gradient_booster"]["name"], learner["gradient_booster"]
        if kind not in ("gbtree", "dart"):
            raise ValueError(f"booster {kind!r} is not taken, only 'gbtree' and 'dart'")
        if objective not in IDENTITY_LINK:
            raise ValueError(f"objective {objective!r} is not taken, only {', '.join(IDENTITY_LINK)}")
        gradient = holder["gbtree"]["model"] if kind == "dart" else holder["model"]
        # Of trees trained with dropout; XGBoost 3.4 files them under gbtree, beside the trees.
        weights = holder.get("weight_drop", gradient.get("weight_drop", []))
        if "c" in learner["feature_types"]:
            raise ValueError("categorical features are not taken; encode the categories as numbers")
        self.num_features = int(parameters["num_feature"])
        names = learner["feature_names"]
        self.inputs = Inputs(self.num_features, "xgboost", type(model).__name__, tuple(names) if names else None)
        self.num_outputs = max(1, int(parameters.get("num_target", 1)))
        self.parallel = int(gradient["gbtree_model_param"]["num_parallel_tree"])
        rounds = gradient["iteration_indptr"]
        self.rounds = len(rounds) - 1 if last_round is None else last_round
        if not 1 <= self.rounds < len(rounds):
            raise ValueError(
                f"the model predicts with {self.rounds} rounds of the {len(rounds) - 1} that its booster has; train it "
                "or pass model.get_booster(), which predicts with all"
            )
        self._trees = gradient["trees"][: rounds[self.rounds]]
        self._output = gradient["tree_info"]
        self.num_trees = len(self._trees)
        self._weights = weights or [1.0] * self.num_trees
        base = np.atleast_1d(json.loads(parameters["base_score"])).astype(np.float32)
        self.base = np.broadcast_to(base, self.num_outputs).astype(np.float64)

    def nodes(self, index: int, scale: int = 1) -> dict[str, np.ndarray]:
        """The nodes of one tree, as the fields of :class:`Trees`; leaf values are multiplied by ``scale``.

        XGBoost goes left where x < t, in float32: x <= the next smaller float32.
        """
        tree = self._trees[index]
        if int(tree["tree_param"]["size_leaf_vector"]) > 1:
            raise ValueError("vector leaves are not taken; train with multi_strategy='one_output_per_tree'")
        if any(tree["split_type"]):
            raise ValueError("categorical splits are not taken; encode the categories as numbers")
        left, right = np.array(tree["left_children"]), np.array(tree["right_children"])
        order = np.arange(len(left))
        if int(tree["tree_param"]["num_deleted"]):
            order = _reached(left, right)
            place = np.full(len(left), -1)
            place[order] = np.arange(len(order))
            left, right = (np.where(child >= 0, place[child], -1)[order] for child in (left, right))
        leaf = left < 0
        condition = np.array(tree["split_conditions"], np.float32)[order]
        values = np.zeros((np.count_nonzero(leaf), self.num_outputs))
        values[:, self._output[index]] = condition[leaf].astype(np.float64) * (scale * self._weights[index])
        return {
            "feature": np.where(leaf, -1, np.array(tree["split_indices"])[order]),
            "threshold": np.nextafter(condition, np.float32(-np.inf)).astype(np.float64),
            "left": left,
            "right": right,
            "default_left": np.array(tree["default_left"])[order],
            "values": values,
        }


def _reached(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The nodes that the root reaches, parents first; pruning leaves others behind."""
    order = [0]
    for node in order:
        order += [int(child[node]) for child in (left, right) if child[node] >= 0]
    return np.array(order)

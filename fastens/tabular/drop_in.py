"""Packed forests in a fitted ``ForestDiffusionModel`` (the package ForestDiffusion, as published)."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt

from fastens import rules
from fastens.tabular.forest import Forest
from fastens.tabular.own_code import check_own_code

NEEDED = ("regr", "predict_over_c", "my_model", "generate", "y_uniques", "n_t", "p_in_one")


def accelerate(model: Any, rule: str | rules.Rule = "mean") -> Any:
    """Return a fitted ForestDiffusion model that evaluates packed forests and combines their trees by a rule.

    The result shares everything else with ``model``, which stays as it is: it generates, imputes and classifies by its
    own code. Random forests have their trees as members; XGBoost and LightGBM models are one member each. With
    ``"mean"`` the results are the model's own for the same state of NumPy's global generator, which both draw from.
    "mixture" draws one member per row for each call of ``generate`` or ``impute``, "alternating" one at every
    evaluation; both take their seed from that generator.

    Args:
        model: a fitted ``ForestDiffusionModel``.
        rule: name, alias or value of :mod:`fastens.rules`. The rule acts on noise predictions (``"vp"``) or
            velocities (``"flow"``).

    Raises:
        TypeError: not such a model, one that predicts by code of its own, or one of CatBoost's.
        ValueError: weights that do not fit the members.
    """
    missing = [name for name in NEEDED if not hasattr(model, name)]
    if missing:
        raise TypeError(f"expected a fitted ForestDiffusionModel, got {type(model).__name__} without {missing[0]!r}")
    if not isinstance(vars(model).get("predict_over_c"), PackedPredictor):
        for base in type(model).__mro__:
            if base.__module__.partition(".")[0] == "ForestDiffusion":
                check_own_code(model, base, "predict_over_c")
                break
    predictor = PackedPredictor(model.regr, rules.get(rule))
    fast = copy.copy(model)
    fast.predict_over_c = predictor
    if predictor.rule.random:
        fast.generate = _Trajectory(fast, "generate", predictor)
        fast.impute = _Trajectory(fast, "impute", predictor)
    else:
        fast.my_model = _Repeated(fast)
    return fast


class PackedPredictor:
    """Stands for ``ForestDiffusionModel.predict_over_c``.

    Args:
        models: ``regr[label][level]``, or ``regr[label][level][column]``.
        rule: the aggregation rule.
    """

    def __init__(self, models: list, rule: rules.Rule) -> None:
        self.rule = rule
        self._forests = _packed(models)
        for forest in _leaves(self._forests):
            rule.check(forest.num_members)
        self._seed: int | None = None
        self._evaluation = 0

    def start_trajectory(self) -> None:
        """Draw the seed of the members that a random rule sends rows to."""
        self._seed = int(np.random.randint(2**31))
        self._evaluation = 0

    def end_trajectory(self) -> None:
        """Forget the draw of a mixture."""
        self._seed = None

    def __call__(
        self,
        X: npt.NDArray,
        i: int,
        j: int,
        k: int | None,
        dmat: bool = False,
        expand: bool = False,
        X_covs: npt.NDArray | None = None,
    ) -> npt.NDArray:
        """Predict rows of label j at noise level i, all columns or column k, as the package does.

        Raises:
            ValueError: the rule is "mixture", and no call of ``generate`` or ``impute`` is under way.
        """
        rows = X if X_covs is None else np.concatenate((X, X_covs), axis=1)
        forest = self._forests[j][i] if k is None else self._forests[j][i][k]
        out = self._drawn(forest, rows, j) if self.rule.random else forest.predict(rows, self.rule)
        return out[:, None] if expand else out

    def _drawn(self, forest: Forest, rows: npt.NDArray, label: int) -> npt.NDArray:
        if self.rule.per_trajectory:
            if self._seed is None:
                raise ValueError("rule 'mixture' draws members per trajectory: `generate` and `impute` have one")
            return forest.predict_drawn(rows, self._seed, label)
        if self._seed is None:
            self.start_trajectory()
            assert self._seed is not None
        self._evaluation += 1
        return forest.predict_drawn(rows, self._seed, self._evaluation)


class _Repeated:
    """The model's score, evaluated once where the package's reverse SDE asks twice with equal arguments."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._last: tuple | None = None

    def __call__(self, t: float, y: npt.NDArray, mask_y: Any = None, **options: Any) -> npt.NDArray:
        if self._last is not None:
            at, of, masks, others, out = self._last
            same = t == at and mask_y is masks and options.keys() == others.keys()
            if same and all(options[key] is others[key] for key in options) and np.array_equal(y, of):
                return out.copy()
        out = type(self._model).my_model(self._model, t=t, y=y, mask_y=mask_y, **options)
        self._last = (t, y.copy(), mask_y, options, out)
        return out.copy()


class _Trajectory:
    """A sampler of the model, as one trajectory of its predictor."""

    def __init__(self, model: Any, name: str, predictor: PackedPredictor) -> None:
        self._model, self._name, self._predictor = model, name, predictor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._predictor.start_trajectory()
        try:
            return getattr(type(self._model), self._name)(self._model, *args, **kwargs)
        finally:
            self._predictor.end_trajectory()


def _packed(models: Any) -> Any:
    if isinstance(models, list):
        return [_packed(model) for model in models]
    module = type(models).__module__.split(".")[0]
    if module == "sklearn":
        return Forest.from_sklearn(models)
    if module == "xgboost":
        return Forest.from_xgboost(models)
    if module == "lightgbm":
        return Forest.from_lightgbm(models)
    raise TypeError(
        f"models of {module} are not taken ({type(models).__name__}); expected sklearn, xgboost or lightgbm"
    )


def _leaves(forests: Any) -> list[Forest]:
    return [leaf for entry in forests for leaf in _leaves(entry)] if isinstance(forests, list) else [forests]

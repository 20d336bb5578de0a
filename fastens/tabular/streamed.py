"""XGBoost over noisy copies of a table, made one at a time; of each only its bins stay, a byte or two a value."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import xgboost

from fastens.tabular.forest import Forest

Noisy = Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]


class _Copies(xgboost.DataIter):
    def __init__(self, noisy: Noisy, column: int | None, copies: int, seed: int) -> None:
        self._noisy, self._column, self._copies, self._seed = noisy, column, copies, seed
        self._next = 0
        super().__init__()

    def reset(self) -> None:
        self._next = 0

    def next(self, input_data: Callable) -> bool:
        if self._next == self._copies:
            return False
        # XGBoost passes over the data several times: a copy's noise depends on its number only.
        x, target = self._noisy(np.random.default_rng([self._seed, self._next]))
        if self._column is not None:
            present = ~np.isnan(target[:, self._column])
            x, target = x[present], target[present, self._column]
        input_data(data=x, label=target)
        self._next += 1
        return True


def fit_streamed(
    noisy: Noisy, column: int | None, copies: int, rounds: int, max_depth: int | None, seed: int
) -> Forest:
    """Boost trees on ``copies`` draws of ``noisy(rng) -> (x [n, d], target [n, d])``; one column, or all for None."""
    data = xgboost.QuantileDMatrix(_Copies(noisy, column, copies, seed))
    parameters = {"max_depth": max_depth or 0, "eta": 0.3, "lambda": 0.0, "nthread": 1, "seed": seed}
    return Forest.from_xgboost(xgboost.train(parameters, data, num_boost_round=rounds))

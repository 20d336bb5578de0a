"""A packed forest beside its source, once, when it is packed: another version's model may mean something else."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from fastens.tabular.forest import Forest

Predict = Callable[[npt.NDArray], npt.NDArray]
ROWS = 8


def hold_against(forest: Forest, sources: Sequence[Predict]) -> None:
    """Compare a forest with the models that it was read from, on rows of its own thresholds.

    Args:
        forest: the packed forest.
        sources: predictions of its one model, or of the model of each member.

    Raises:
        ValueError: one differs by more than rounding.
    """
    rows = _rows_at_thresholds(forest)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of names, which these rows have not
        expected = [np.asarray(source(rows)).reshape(ROWS, -1) for source in sources]
    actual = forest.predict_members(rows) if len(sources) > 1 else [forest.predict(rows).reshape(ROWS, -1)]
    trees = forest.trees
    first_leaf = np.concatenate([[0], np.cumsum(trees.feature < 0)])[trees.offsets[:-1]]
    largest = np.maximum.reduceat(np.abs(trees.values).max(1), first_leaf).sum() + np.abs(expected).max()
    bound = (trees.num_trees + 2) * (2.0**-23 if expected[0].dtype == np.float32 else 2.0**-48) * largest
    for k, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        if ours.shape != theirs.shape or not (np.abs(ours - theirs.astype(np.float64)) <= bound).all():
            raise ValueError(
                f"model {k} predicts otherwise than the trees that were read from it: this version of its library is "
                f"not understood, or the model was changed; call its own predict"
            )


def _rows_at_thresholds(forest: Forest) -> npt.NDArray:
    """Rows of each feature's thresholds and of values beyond them; one of missing values where they are taken."""
    trees = forest.trees
    rows = np.zeros((ROWS, trees.num_features), np.float64 if forest.double_inputs else np.float32)
    most = np.finfo(rows.dtype).max / 4
    for feature in np.unique(trees.feature[trees.feature >= 0]):
        cuts = np.clip(np.unique(trees.threshold[trees.feature == feature]), -most, most).astype(rows.dtype)
        column = np.resize(cuts[:: max(1, len(cuts) // (ROWS // 2))], ROWS)
        column[1::2] = np.nextafter(column[1::2], rows.dtype.type(np.inf))
        rows[:, feature] = np.roll(column, feature)
    if forest.allow_nan:
        rows[-1] = np.nan
    return rows

"""How good generated rows are: distance, coverage, use for training, and whether a classifier tells them from real.

All take numeric tables [n, d]; distances are L1 after scaling every column by the real table's range.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def wasserstein(real: npt.ArrayLike, generated: npt.ArrayLike) -> float:
    """1-Wasserstein distance between two tables, solved exactly by POT; memory grows with the product of their rows.

    Raises:
        ValueError: tables of different columns, without rows, or with NaN or infinities.
    """
    import ot

    cost = _distances(*_scaled(real, generated))
    distance: Any = ot.emd2([], [], cost, numItermax=10_000_000)
    return float(distance)


def coverage(real: npt.ArrayLike, generated: npt.ArrayLike, neighbours: int = 5) -> float:
    """Share of real rows with a generated row no farther than their k-th real neighbour (Naeem et al., ICML 2020).

    Raises:
        ValueError: as :func:`wasserstein`; also fewer than ``neighbours + 1`` real rows.
    """
    ours, theirs = _scaled(real, generated)
    if not 1 <= neighbours < len(ours):
        raise ValueError(f"`neighbours`: expected 1 to {len(ours) - 1} for {len(ours)} real rows, got {neighbours}")
    radius = np.partition(_distances(ours, ours), neighbours, axis=1)[:, neighbours]  # position 0 is the row itself
    return float((_distances(ours, theirs).min(1) <= radius).mean())


def downstream(
    generated: npt.ArrayLike, target: npt.ArrayLike, test: npt.ArrayLike, test_target: npt.ArrayLike
) -> float:
    """Quality on real test rows of forests trained on generated rows: macro F1 for labels, R² for a float target."""
    from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
    from sklearn.metrics import f1_score, r2_score

    target, test_target = np.asarray(target), np.asarray(test_target)
    if np.issubdtype(target.dtype, np.floating):
        fitted = RandomForestRegressor(random_state=0).fit(generated, target)
        return float(r2_score(test_target, fitted.predict(test)))
    fitted = RandomForestClassifier(random_state=0).fit(generated, target)
    return float(f1_score(test_target, fitted.predict(test), average="macro"))


def real_versus_generated(real: npt.ArrayLike, generated: npt.ArrayLike) -> float:
    """Cross-validated ROC area of a forest that tells generated from real rows: 0.5 where it cannot, 1 where it can."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    ours, theirs = _scaled(real, generated)
    rows, is_real = np.concatenate([ours, theirs]), np.repeat([1, 0], [len(ours), len(theirs)])
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    forest = RandomForestClassifier(random_state=0, class_weight="balanced")
    return float(cross_val_score(forest, rows, is_real, cv=folds, scoring="roc_auc").mean())


def _scaled(real: npt.ArrayLike, generated: npt.ArrayLike) -> tuple[npt.NDArray, npt.NDArray]:
    ours, theirs = np.asarray(real, np.float64), np.asarray(generated, np.float64)
    if ours.ndim != 2 or theirs.ndim != 2 or ours.shape[1] != theirs.shape[1] or 0 in (*ours.shape, *theirs.shape):
        raise ValueError(f"tables are {list(ours.shape)} and {list(theirs.shape)}, expected rows of the same columns")
    for name, table in (("real", ours), ("generated", theirs)):
        if not np.isfinite(table).all():
            row, column = np.argwhere(~np.isfinite(table))[0]
            raise ValueError(
                f"the {name} table has {table[row, column]} in row {row}, column {column}, which is at no distance "
                "from others: impute it, or leave the row out"
            )
    low, span = ours.min(0), np.ptp(ours, 0)
    span = np.where(span > 0, span, 1.0)
    return (ours - low) / span, (theirs - low) / span


def _distances(a: npt.NDArray, b: npt.NDArray) -> npt.NDArray:
    from scipy.spatial.distance import cdist

    return cdist(a, b, "cityblock")

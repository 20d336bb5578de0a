"""Diffusion of tables with forests (Jolicoeur-Martineau et al., arXiv 2309.09968), by any aggregation rule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError

from fastens import rules
from fastens.tabular.columns import Columns
from fastens.tabular.forest import Forest


class ForestDiffusion(BaseEstimator):
    """A generator of table rows: one forest per noise level (and label) predicts the noise, or the velocity.

    Args:
        n_t: noise levels, ``linspace(eps, 1, n_t)``.
        diffusion_type: "vp" predicts the noise of a variance-preserving SDE, "flow" the velocity from noise to data.
        learner: "random_forest", whose trees are members, or "xgboost", one member, which takes missing values and
            streams the noisy copies instead of holding them.
        rule: how the trees are combined: name, alias or value of :mod:`fastens.rules`.
        n_estimators: trees of a forest, or boosting rounds.
        max_depth: of a tree; None for unlimited.
        duplicate_K: noisy copies of each row.
        beta_min: of the VP schedule at t = 0.
        beta_max: of the VP schedule at t = 1.
        eps: smallest time.
        categorical: names (positions) of columns to treat as categories, besides text that repeats and booleans.
        integer: names of columns to round.
        leave_out: names of columns that are not learnt and not sampled: ids, free text.
        n_jobs: processes of the training, as in joblib.
        progress: show a progress bar of the training.
        random_state: seed of the training.

    Attributes:
        columns_: the table's code.
        labels_: distinct labels, or [None].
        probabilities_: their frequencies.
        forests_: indexed by label, level and column, one column for all where one forest predicts every column.
    """

    def __init__(
        self,
        n_t: int = 50,
        diffusion_type: str = "vp",
        learner: str = "random_forest",
        rule: str | rules.Rule = "mean",
        n_estimators: int = 100,
        max_depth: int | None = 7,
        duplicate_K: int = 100,
        beta_min: float = 0.1,
        beta_max: float = 8.0,
        eps: float = 1e-3,
        categorical: tuple = (),
        integer: tuple = (),
        leave_out: tuple = (),
        n_jobs: int | None = None,
        progress: bool = False,
        random_state: int = 0,
    ) -> None:
        self.n_t = n_t
        self.diffusion_type = diffusion_type
        self.learner = learner
        self.rule = rule
        self.n_estimators = n_estimators
        self.max_depth = max_depth
        self.duplicate_K = duplicate_K
        self.beta_min = beta_min
        self.beta_max = beta_max
        self.eps = eps
        self.categorical = categorical
        self.integer = integer
        self.leave_out = leave_out
        self.n_jobs = n_jobs
        self.progress = progress
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> ForestDiffusion:
        """Train on a table [n, d] (DataFrame or array), with one model per label of y [n] where it is given.

        Raises:
            ValueError: parameters out of range, missing values with random forests, or a table that has no code: ids
                and free text, which would be repeated, are named.
        """
        self._check_parameters()
        self.columns_ = Columns(X, tuple(self.categorical), tuple(self.integer), tuple(self.leave_out))
        rows = self.columns_.encode(X)
        if self.learner == "random_forest" and np.isnan(rows).any():
            raise ValueError("the table has missing values: use learner='xgboost', or impute them first")
        labels = np.zeros(len(rows)) if y is None else np.asarray(y)
        if len(labels) != len(rows):
            raise ValueError(f"`y` has {len(labels)} labels, `X` {len(rows)} rows")
        if lost := int(pd.isna(labels).sum()):
            raise ValueError(f"`y` has no label for {lost} of {len(rows)} rows: leave those out, or label them")
        values, counts = np.unique(labels, return_counts=True)
        self.labels_ = [None] if y is None else values.tolist()
        self.probabilities_ = counts / counts.sum()
        jobs = [(j, i) for j in range(len(values)) for i in range(self.n_t)]
        seeds = np.random.SeedSequence(self.random_state).spawn(len(jobs))
        tasks = (
            delayed(self._fit_level)(rows[labels == values[j]], self._time(i), seed)
            for (j, i), seed in zip(jobs, seeds, strict=True)
        )
        done: Any = Parallel(n_jobs=self.n_jobs, return_as="generator")(tasks)
        if self.progress:
            from tqdm import tqdm

            done = tqdm(done, total=len(jobs), desc="training", unit="level")
        fitted = list(done)
        self.forests_ = [fitted[j * self.n_t : (j + 1) * self.n_t] for j in range(len(values))]
        return self

    def sample(
        self,
        n: int,
        *,
        rule: str | rules.Rule | None = None,
        random_state: int = 0,
        labels: Any = None,
        sampler: str = "stochastic",
        gain: float = 1.0,
    ) -> Any:
        """Generate n rows in the form of the fitted table; with labels fitted, a pair (table, labels [n]).

        Args:
            n: how many.
            rule: in place of the estimator's.
            random_state: seed.
            labels: [n], labels to generate for; drawn by frequency by default.
            sampler: of "vp": "stochastic" (Euler-Maruyama of the reverse SDE) or "deterministic" (Euler of the
                probability flow ODE); both end with a Tweedie step. A flow is deterministic.
            gain: factor of the combined predictions: trees shrink what they predict, and a gain above 1 undoes it.

        Raises:
            ValueError: labels that were not fitted, or an unknown sampler.
            sklearn.exceptions.NotFittedError: not fitted.
        """
        self._check_fitted()
        if sampler not in ("stochastic", "deterministic"):
            raise ValueError(f"`sampler`: expected 'stochastic' or 'deterministic', got {sampler!r}")
        rng = np.random.default_rng(random_state)
        drawn = (
            rng.choice(len(self.labels_), n, p=self.probabilities_) if labels is None else self._label_codes(labels, n)
        )
        x = rng.normal(size=(n, self.columns_.width))
        evaluate = self._evaluator(rule, drawn, rng, gain=gain)
        if self.diffusion_type == "flow":
            for i in range(self.n_t - 1):
                x = x + evaluate(x, i) / (self.n_t - 1)
        else:
            x = self._reverse(x, evaluate, rng if sampler == "stochastic" else None)
        table = self.columns_.decode(x)
        return table if self.labels_ == [None] else (table, np.array(self.labels_)[drawn])

    def impute(self, X: Any, y: Any = None, *, rule: str | rules.Rule | None = None, random_state: int = 0) -> Any:
        """Fill the missing values of a table, given the others; the others come back as they are.

        Raises:
            ValueError: a flow, which cannot impute; no labels of a table that was fitted with labels, or others.
            sklearn.exceptions.NotFittedError: not fitted.
        """
        self._check_fitted()
        if self.diffusion_type == "flow":
            raise ValueError("imputation needs diffusion_type='vp'")
        rng = np.random.default_rng(random_state)
        rows = self.columns_.encode(X)
        holes = np.isnan(rows)
        codes = self._label_codes(y, len(rows))
        evaluate = self._evaluator(rule, codes, rng)

        def given(x: np.ndarray, level: int) -> np.ndarray:
            alpha, sigma = self._coefficients(self._time(level))
            return np.where(holes, x, alpha * np.nan_to_num(rows) + sigma * rng.normal(size=x.shape))

        x = self._reverse(rng.normal(size=rows.shape), lambda x, level: evaluate(given(x, level), level), rng)
        return self.columns_.fill(X, np.where(holes, x, rows))

    def score(
        self,
        X: Any,
        y: Any = None,
        *,
        rule: str | rules.Rule | None = None,
        random_state: int = 0,
        gain: float = 1.0,
    ) -> float:
        """The negative mean squared error of the noise (of the velocity) over all levels; higher is better.

        Raises:
            ValueError: no labels of a table that was fitted with labels, or others.
        """
        self._check_fitted()
        rng = np.random.default_rng(random_state)
        rows = self.columns_.encode(X)
        codes = self._label_codes(y, len(rows))
        evaluate = self._evaluator(rule, codes, rng, as_score=False, gain=gain)
        errors = []
        for i in range(self.n_t):
            noisy, target = self._noisy(rows, self._time(i), rng)
            errors.append(np.nanmean((evaluate(noisy, i) - target) ** 2))
        return -float(np.mean(errors))

    def _reverse(self, x: np.ndarray, evaluate: Any, rng: np.random.Generator | None) -> np.ndarray:
        """Euler steps from t = 1 of the reverse SDE, of the probability flow without rng; a Tweedie step at eps."""
        for level in range(self.n_t - 1, 0, -1):
            t, score = self._time(level), evaluate(x, level)
            beta, h = self.beta_min + t * (self.beta_max - self.beta_min), t - self._time(level - 1)
            if rng is None:
                x = x + 0.5 * beta * (x + score) * h
            else:
                x = x + (0.5 * beta * x + beta * score) * h + np.sqrt(beta * h) * rng.normal(size=x.shape)
        alpha, sigma = self._coefficients(self.eps)
        return (x + sigma**2 * evaluate(x, 0)) / alpha

    def _evaluator(
        self,
        rule: str | rules.Rule | None,
        codes: np.ndarray,
        rng: np.random.Generator,
        as_score: bool = True,
        gain: float = 1.0,
    ) -> Any:
        """The field of one trajectory: (x, level) -> score (the velocity of a flow), or the forest's own prediction."""
        value = rules.get(self.rule if rule is None else rule)
        seed, evaluations = int(rng.integers(2**31)), 0

        def evaluate(x: np.ndarray, level: int) -> np.ndarray:
            nonlocal evaluations
            evaluations += 1
            out = np.empty_like(x)
            for j, levels in enumerate(self.forests_):
                mine = codes == j
                if not mine.any():
                    continue
                offset = j if value.per_trajectory else evaluations * len(self.forests_) + j
                parts = [
                    forest.predict_drawn(x[mine], seed, offset) if value.random else forest.predict(x[mine], value)
                    for forest in levels[level]
                ]
                out[mine] = gain * np.concatenate([part.reshape(len(part), -1) for part in parts], 1)
            return -out / self._coefficients(self._time(level))[1] if as_score and self.diffusion_type == "vp" else out

        return evaluate

    def _fit_level(self, rows: np.ndarray, t: float, seed: np.random.SeedSequence) -> list[Forest]:
        number = int(seed.generate_state(1)[0] >> 1)
        if self.learner == "xgboost":
            from fastens.tabular.streamed import fit_streamed

            columns = range(rows.shape[1]) if np.isnan(rows).any() else [None]
            return [
                fit_streamed(
                    lambda rng: self._noisy(rows, t, rng),
                    column,
                    self.duplicate_K,
                    self.n_estimators,
                    self.max_depth,
                    number,
                )
                for column in columns
            ]
        from sklearn.ensemble import RandomForestRegressor

        noisy, target = self._noisy(np.tile(rows, (self.duplicate_K, 1)), t, np.random.default_rng(seed))
        forest = RandomForestRegressor(self.n_estimators, max_depth=self.max_depth, random_state=number)
        return [Forest.from_sklearn(forest.fit(noisy, target[:, 0] if target.shape[1] == 1 else target))]

    def _noisy(self, rows: np.ndarray, t: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Rows at time t, and what is to be predicted from them; both NaN where a value is missing."""
        noise = np.where(np.isnan(rows), np.nan, rng.normal(size=rows.shape))
        if self.diffusion_type == "flow":
            return t * rows + (1 - t) * noise, rows - noise
        alpha, sigma = self._coefficients(t)
        return alpha * rows + sigma * noise, noise

    def _coefficients(self, t: float) -> tuple[float, float]:
        """(alpha, sigma) of the VP SDE at t."""
        log_alpha = -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min
        return float(np.exp(log_alpha)), float(np.sqrt(-np.expm1(2 * log_alpha)))

    def _time(self, level: int) -> float:
        return float(np.linspace(self.eps, 1, self.n_t)[level])

    def _label_codes(self, labels: Any, n: int) -> np.ndarray:
        if (labels is None) != (self.labels_ == [None]):
            raise ValueError(
                "there were no labels in training, so none are taken: leave `y` out"
                if labels is not None
                else f"each label has forests of its own: pass `y`, the label of each row, of {self.labels_}"
            )
        if labels is None:
            return np.zeros(n, int)
        labels = np.asarray(labels)
        if labels.shape != (n,):
            raise ValueError(f"labels are {list(labels.shape)}, expected [{n}]")
        unknown = [label for label in np.unique(labels).tolist() if label not in self.labels_]
        if unknown:
            raise ValueError(f"label {unknown[0]!r} was not there in training; there were {self.labels_}")
        return np.array([self.labels_.index(label) for label in labels], int)

    def _check_fitted(self) -> None:
        if not hasattr(self, "forests_"):
            raise NotFittedError("this ForestDiffusion is not fitted: call `fit` first")

    def _check_parameters(self) -> None:
        rules.get(self.rule)
        for name, choices in (("diffusion_type", ("vp", "flow")), ("learner", ("random_forest", "xgboost"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}`: expected {' or '.join(map(repr, choices))}, got {getattr(self, name)!r}")
        if self.diffusion_type == "vp":
            if not 0 < self.eps < 1:
                raise ValueError(f"`eps`: expected a time above 0, where there is noise, and below 1, got {self.eps!r}")
            if not 0 <= self.beta_min <= self.beta_max < np.inf or not self.beta_max > 0:
                raise ValueError(
                    f"`beta_min`, `beta_max`: expected 0 <= beta_min <= beta_max, the latter above 0 and finite, got "
                    f"{self.beta_min!r} and {self.beta_max!r}"
                )
        elif not 0 <= self.eps < 1:
            raise ValueError(f"`eps`: expected a time of at least 0 and below 1, got {self.eps!r}")
        for name, least in (("n_t", 2), ("n_estimators", 1), ("duplicate_K", 1), ("max_depth", 1)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"`{name}`: expected at least {least}, got {getattr(self, name)}")

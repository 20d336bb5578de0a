"""A random forest as an ensemble: every tree is a member, and a rule combines them (arXiv 2601.11444)."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from fastens import _native, rules
from fastens.ops._scores import seed_from
from fastens.ops.aggregate import aggregate
from fastens.ops.forest_predict import forest_predict, number_of
from fastens.reference.forest import Trees, combine
from fastens.reference.forest import predict_members as reference_members
from fastens.tabular import forest_file
from fastens.tabular.inputs import Inputs
from fastens.tabular.packed import PackedForest
from fastens.tabular.probe import hold_against

CHUNK = 1 << 22  # member outputs that are held at a time where members are not single trees
LARGEST_LEAF = 1e300  # beyond it, and for NaN, the fused kernels do not serve


class Forest:
    """Trees packed once, evaluated and combined in one pass; immutable, picklable and safe to share between threads.

    Made by :meth:`from_sklearn`, :meth:`from_xgboost` or :meth:`from_lightgbm`. A row takes the branches that the
    source library would take, to the last bit.

    Args:
        trees: all trees.
        ranges: [K + 1], member k is the sum of trees [ranges[k], ranges[k + 1]); by default every tree is a member.
        base: [K, p], added to each member's sum; by default nothing.
        double_inputs: thresholds are compared with float64 values (LightGBM), otherwise with values rounded to float32.
        inputs: how tables are read, and whether NaN is a missing value; by default arrays of numbers, where it is.
        allow_inf: whether infinities, after rounding to float32, are values, or an error.
        single_output: results are [n] instead of [n, 1].
        dtype: of the results, float64 or float32.

    Attributes:
        num_members: K.
        num_features: features of a row.
        num_outputs: p.
    """

    def __init__(
        self,
        trees: Trees,
        *,
        ranges: npt.ArrayLike | None = None,
        base: npt.ArrayLike | None = None,
        inputs: Inputs | None = None,
        double_inputs: bool = False,
        allow_inf: bool = False,
        single_output: bool = False,
        dtype: npt.DTypeLike = np.float64,
    ) -> None:
        self.trees = trees
        self.num_features = trees.num_features
        self.num_outputs = trees.values.shape[1]
        whole = np.arange(trees.num_trees + 1)
        self._ranges = whole if ranges is None else np.asarray(ranges, np.int64)
        if self._ranges.ndim != 1 or len(self._ranges) < 2:
            raise ValueError("`ranges`: expected the bounds of at least one member")
        if self._ranges[0] != 0 or self._ranges[-1] != trees.num_trees or np.diff(self._ranges).min() < 0:
            raise ValueError(f"`ranges`: expected ascending numbers from 0 to {trees.num_trees}")
        self.num_members = len(self._ranges) - 1
        shape = (self.num_members, self.num_outputs)
        self._base = np.zeros(shape) if base is None else np.array(base, np.float64).reshape(shape)
        self._inputs = Inputs(trees.num_features) if inputs is None else inputs
        if self._inputs.num_features != trees.num_features:
            raise ValueError(f"`inputs` has {self._inputs.num_features} features, the trees {trees.num_features}")
        self._double_inputs, self._allow_inf = double_inputs, allow_inf or double_inputs
        self._single_output, self._dtype = single_output, np.dtype(dtype)
        if self._dtype not in (np.float64, np.float32):
            raise ValueError(f"`dtype`: expected float64 or float32, got {dtype}")
        if single_output and self.num_outputs != 1:
            raise ValueError(f"`single_output` with {self.num_outputs} outputs")
        largest = np.abs(trees.values).max()
        # Members that are single trees, with leaves that every rule's kernel takes, are combined as they are found.
        self._fused = np.array_equal(self._ranges, whole) and not self._base.any() and bool(largest <= LARGEST_LEAF)
        self._plain = self._dtype == np.float64 and not single_output
        self._input = np.dtype(np.float64 if double_inputs else np.float32)
        self._takes = (self._inputs.allow_nan, self._allow_inf)
        self._packed: Any = None
        self._number: int | None = None
        self._tensors: dict[torch.device, list[torch.Tensor]] = {}

    @property
    def double_inputs(self) -> bool:
        """Whether thresholds are compared with float64 values, otherwise with values rounded to float32."""
        return self._double_inputs

    @property
    def allow_nan(self) -> bool:
        """Whether NaN is a missing value, or an error."""
        return self._inputs.allow_nan

    @classmethod
    def from_sklearn(cls, forest: Any) -> Forest:
        """Pack a fitted ``RandomForestRegressor`` or ``ExtraTreesRegressor``; each tree is a member.

        Raises:
            TypeError: another estimator, or one that predicts by code of its own.
            ValueError: it predicts otherwise than its trees.
            sklearn.exceptions.NotFittedError: it is not fitted.
        """
        from fastens.tabular.sklearn import read_forest

        packed = cls(**read_forest(forest))
        alone: Any = copy.copy(forest).set_params(n_jobs=1, verbose=0)
        hold_against(packed, [alone.predict])
        return packed

    @classmethod
    def from_xgboost(cls, models: Any) -> Forest:
        """Pack XGBoost regressors.

        Args:
            models: a ``Booster`` or ``XGBModel``, or K of them: members are whole boosters, since boosted trees add
                up. The one exception is a single model of one round of parallel trees (``XGBRFRegressor``): its
                trees are the members.

        Raises:
            TypeError: not XGBoost models, or ones that predict by code of their own.
            ValueError: categorical features, vector leaves, linear boosters, an objective with a link function, models
                that disagree in features or outputs, or one that predicts otherwise than its trees.
        """
        from fastens.tabular.xgboost import predictions, read_boosters

        packed = cls(**read_boosters(models))
        hold_against(packed, predictions(models))
        return packed

    @classmethod
    def from_lightgbm(cls, models: Any) -> Forest:
        """Pack LightGBM regressors.

        Args:
            models: a ``Booster`` or ``LGBMRegressor``, or K of them: members are whole boosters. A single model of
                ``boosting="rf"`` has its trees as members.

        Raises:
            TypeError: not LightGBM models, or ones that predict by code of their own.
            ValueError: categorical splits, linear trees, zero as missing value, an objective with a link function,
                models that disagree in features, or one that predicts otherwise than its trees.
        """
        from fastens.tabular.lightgbm import read_boosters

        packed = cls(**read_boosters(models))
        hold_against(packed, [model.predict for model in (models if isinstance(models, Sequence) else [models])])
        return packed

    def predict(
        self,
        X: npt.ArrayLike,
        rule: str | rules.Rule = "mean",
        *,
        generator: torch.Generator | None = None,
        backend: str = "auto",
    ) -> npt.NDArray:
        """Combine the members' predictions by a rule.

        Args:
            X: [n, num_features]; float32 and float64 arrays of any strides are read in place, everything else as the
                source library reads it.
            rule: name, alias or value of :mod:`fastens.rules`.
            generator: draws the members of "alternating", one per row; torch's global one by default.
            backend: "native", "reference" (the per-tree loop) or "auto".

        Returns:
            [n, p], or [n] where the source's ``predict`` gives that.

        Raises:
            ValueError: other features, or values that the source's ``predict`` does not take; a rule that needs a
                trajectory.
            TypeError: a container that is not read as the source library reads it; the message says what to pass.
            RuntimeError: ``backend="native"`` without the compiled library.
        """
        value = self._checked_rule(rule)
        rows = self._rows(X)
        return self._predict(rows, value, seed_from(generator) if value.per_evaluation else 0, 0, backend)

    def predict_drawn(self, X: npt.ArrayLike, seed: int, offset: int) -> npt.NDArray:
        """Predict row i by the member that (seed, offset, i) draws, see :func:`fastens.ops.draw_members.draw_members`.

        Equal arguments draw equal members, which is what a trajectory needs; otherwise as :meth:`predict`.
        """
        return self._predict(self._rows(X), rules.Alternating(), seed, offset, "auto")

    def predict_tensor(
        self,
        x: torch.Tensor,
        rule: str | rules.Rule = "mean",
        *,
        generator: torch.Generator | None = None,
        backend: str = "auto",
    ) -> torch.Tensor:
        """Combine the members' predictions for a tensor, on its device and without a copy of it on the CPU.

        Goes through ``torch.compile``. There is no gradient: trees are constant between their thresholds. On a GPU,
        infinities and missing values are not looked for, which would wait for the device.

        Args:
            x: [n, num_features], floating point.
            rule: as in :meth:`predict`.
            generator: as in :meth:`predict`.
            backend: "auto", "native" or "reference".

        Returns:
            [n, p], of x's dtype.

        Raises:
            ValueError: as :meth:`predict`.
            TypeError: ``x`` is no floating-point tensor.
        """
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            raise TypeError(f"`x`: expected a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
        if x.dim() != 2 or x.shape[1] != self.num_features:
            raise ValueError(f"`x` is {list(x.shape)}, expected [n, {self.num_features}]: rows, then features")
        value = self._checked_rule(rule)
        wide = x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)
        trees, number, depth = self._on(x.device)
        seed = seed_from(generator) if value.per_evaluation else 0
        out = forest_predict(wide, trees, number, depth, self._double_inputs, value, seed=seed, backend=backend)
        return out.to(x.dtype)

    def predict_by_rule(self, rows: npt.NDArray, rule: rules.Rule, seed: int, offset: int) -> npt.NDArray:
        """Combine the members for rows as they are; float64 [n, p]. What the op calls, see :meth:`predict_tensor`."""
        return self._combined(rows, rule, seed, offset, self._native("auto"))

    def _on(self, device: torch.device) -> tuple[list[torch.Tensor], int, int]:
        """The trees as tensors on a device, the forest's number in the op, and its depth; kept."""
        if device not in self._tensors:  # threads that come at once each make them; a lock would survive a fork locked
            arrays = (*self.trees.as_tensors(), np.array(self._ranges), self._base)
            self._number = number_of(self) if self._number is None else self._number
            self._tensors[device] = [torch.from_numpy(array).to(device) for array in arrays]
        assert self._number is not None
        return self._tensors[device], self._number, self.trees.depth

    def _checked_rule(self, rule: str | rules.Rule) -> rules.Rule:
        value = rules.get(rule)
        value.check(self.num_members)
        if value.per_trajectory:
            raise ValueError(f"`rule`: {value!r} draws one member per trajectory; use fastens.tabular.accelerate")
        return value

    def _predict(self, rows: npt.NDArray, rule: rules.Rule, seed: int, offset: int, backend: str) -> npt.NDArray:
        out = self._combined(rows, rule, seed, offset, self._native(backend))
        return out if self._plain else self._finished(out)

    def _combined(self, rows: npt.NDArray, rule: rules.Rule, seed: int, offset: int, packed: Any) -> npt.NDArray:
        if packed is not None and self._fused and rule.has_kernels:
            return packed.predict(rows, rule.name, rule.option, rule.values, seed, offset, "auto")
        return self._predict_by_members(rows, rule, seed, offset, packed)

    def predict_members(self, X: npt.ArrayLike, *, backend: str = "auto") -> npt.NDArray:
        """Return every member's prediction, [K, n, p]; arguments and errors as :meth:`predict`."""
        return self._members(self._rows(X), self._native(backend)).astype(self._dtype, copy=False)

    def save(self, file: str | os.PathLike[str] | BinaryIO) -> None:
        """Write the forest to one file; :meth:`load` reads it without executing anything in it."""
        about = {"double_inputs": self._double_inputs, "allow_inf": self._allow_inf}
        about |= {"single_output": self._single_output, "dtype": self._dtype.name}
        forest_file.write(file, self.trees, self._ranges, self._base, self._inputs, about)

    @classmethod
    def load(cls, file: str | os.PathLike[str] | BinaryIO) -> Forest:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: not such a file, a damaged one, or arrays that are no trees.
            OSError: the file cannot be read.
        """
        with forest_file.reading(file) as fields:
            return cls(**fields)

    def __getstate__(self) -> bytes:
        stream = io.BytesIO()
        self.save(stream)
        return stream.getvalue()

    def __setstate__(self, state: bytes) -> None:
        self.__dict__.update(type(self).load(io.BytesIO(state)).__dict__)

    def __repr__(self) -> str:
        counts = f"{self.num_members} members, {self.trees.num_trees} trees"
        return f"Forest({counts}, {self.num_features} features, {self.num_outputs} outputs)"

    def _rows(self, X: npt.ArrayLike) -> npt.NDArray:
        """X as the kernels read it: float32 or float64 [n, num_features], without a copy where it is that."""
        if type(X) is not np.ndarray or X.dtype not in _READ_IN_PLACE or not X.flags.aligned:
            X = np.require(self._inputs.rows(X), requirements="A")
        if X.ndim != 2 or X.shape[1] != self.num_features:
            raise ValueError(
                f"`X` is {list(X.shape)}, expected [n, {self.num_features}]: rows, then the forest's features"
            )
        return X

    def _native(self, backend: str) -> Any:
        """The packed forest, or None for the reference."""
        if self._packed is not None and (backend == "auto" or backend == "native"):
            return self._packed
        if backend not in ("auto", "native", "reference"):
            raise ValueError(f"`backend`: expected 'auto', 'native' or 'reference', got {backend!r}")
        if backend == "reference":
            return None
        library = _native.functions()
        if library is None:
            if backend == "native":
                raise RuntimeError(f"backend 'native' is not available: {_native.status()}")
            _warn_of_the_reference()
            return None
        packed = PackedForest(library, self.trees, self._double_inputs, *self._takes)
        self._packed = packed
        return packed

    def _members(self, rows: npt.NDArray, packed: Any) -> npt.NDArray:
        if packed is None:
            members = reference_members(self.trees, self._checked(rows), self._ranges)
        else:
            members = packed.members(rows, self._ranges.tolist(), "auto")
        return members + self._base[:, None] if self._base.any() else members

    def _predict_by_members(
        self, rows: npt.NDArray, rule: rules.Rule, seed: int, offset: int, packed: Any
    ) -> npt.NDArray:
        # a definition of a user's may depend on all rows
        whole = rule.random or not rule.has_kernels or (isinstance(rule, rules.Geometric) and rule.shift == "batch")
        chunk = len(rows) if whole else max(1, CHUNK // (self.num_members * self.num_outputs))
        parts = []
        for start in range(0, len(rows), max(1, chunk)):
            members = self._members(rows[start : start + chunk], packed)
            with _threads_of_this_process():
                if packed is not None and isinstance(rule, rules.Median | rules.Dominant | rules.MaxAbs):
                    parts.append(aggregate(torch.from_numpy(members), rule).numpy())
                else:
                    parts.append(combine(members, rule, seed, offset))
        return np.concatenate(parts) if parts else np.zeros((0, self.num_outputs))

    def _finished(self, out: npt.NDArray) -> npt.NDArray:
        out = out.astype(self._dtype, copy=False)
        return out[:, 0] if self._single_output else out

    def _checked(self, rows: npt.NDArray) -> npt.NDArray:
        """The rows in the dtype of the comparisons; the same refusals as the native kernels."""
        with np.errstate(over="ignore"):
            rows = rows.astype(self._input, copy=False)
        for bad, what in (
            (
                np.isnan(rows) & (not self._inputs.allow_nan),
                "is NaN, but this forest has no missing-value support; impute it first",
            ),
            (np.isinf(rows) & (not self._allow_inf), "is infinite or too large for float32"),
        ):
            if bad.any():
                row, feature = np.argwhere(bad)[0]
                raise ValueError(f"X[{row}, {feature}] {what}")
        return rows


@functools.cache
def _warn_of_the_reference() -> None:
    """Once: it is slower than the source library itself."""
    warnings.warn(
        f"forests are evaluated tree by tree, by NumPy, some hundred times slower than natively: {_native.status()}",
        stacklevel=5,
    )


_PROCESS = os.getpid()
_READ_IN_PLACE = (np.dtype(np.float32), np.dtype(np.float64))


@contextlib.contextmanager
def _threads_of_this_process() -> Iterator[None]:
    """One thread for torch in a forked process: those of OpenMP stayed behind, and it would wait for them forever."""
    threads = torch.get_num_threads()
    if os.getpid() == _PROCESS or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

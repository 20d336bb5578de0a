"""What each source library reads from a table: names, casts, missing values, absent entries of a sparse matrix."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclasses.dataclass(frozen=True)
class Inputs:
    """How a packed forest reads what is not an array of float32 or float64: as its source library does.

    Attributes:
        num_features: features of a row.
        library: "sklearn", "xgboost", "lightgbm", or "arrays" for a forest that has no source.
        estimator: class of the source; of LightGBM, a "Booster" casts otherwise than an estimator.
        names: of the features, where the library holds tables to them.
        allow_nan: whether NaN is a missing value, or an error.
    """

    num_features: int
    library: str = "arrays"
    estimator: str = "Forest"
    names: tuple[str, ...] | None = None
    allow_nan: bool = True

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: a field that is none of those above.
        """
        if type(self.num_features) is not int or not 1 <= self.num_features <= MOST_FEATURES:
            raise ValueError(f"`num_features`: expected 1 to {MOST_FEATURES}, got {self.num_features!r}")
        if self.library not in _READERS:
            raise ValueError(f"`library`: expected one of {', '.join(_READERS)}, got {self.library!r}")
        if type(self.estimator) is not str or not self.estimator.isidentifier() or type(self.allow_nan) is not bool:
            raise ValueError("`estimator`: expected the name of a class; `allow_nan`: expected True or False")
        named = self.names is None or (
            len(self.names) == self.num_features and all(type(name) is str for name in self.names)
        )
        if not named:
            raise ValueError(f"`names`: expected {self.num_features} strings, one per feature")

    def rows(self, X: Any) -> npt.NDArray:
        """Return a table as float32 or float64 [n, num_features], with the values that the library would compare.

        Raises:
            ValueError: other names or another order of features, or values that the library does not take.
            TypeError: a container that the library does not take, or takes in a way of its own.
            ImportError: a table for a forest of scikit-learn, which is not installed.
        """
        try:
            return _READERS[self.library](self, X)
        except RuntimeError as error:  # of a container that is no array until something is done to it
            raise TypeError(f"`X` is a {type(X).__name__} that is no array yet ({error}); convert it") from error


LIGHTGBM_ZERO = float(np.float32(1e-35))  # in a dense table it takes what is no larger for zero
MOST_FEATURES = 1 << 22  # more than hashing makes; beyond it the kernels' tables would not fit in memory


def _arrays(inputs: Inputs, X: Any) -> npt.NDArray:
    if _pandas("DataFrame", X):
        raise TypeError("`X` is a DataFrame, but this forest has no names: pass X[features].to_numpy(), in its order")
    if _is_sparse(X):
        raise TypeError("`X` is sparse, and this forest does not say what an absent entry is: pass X.toarray()")
    return _real(np.asarray(X)).astype(np.float64)


def _sklearn(inputs: Inputs, X: Any) -> npt.NDArray:
    """The rows as scikit-learn validates them, with the errors and warnings of its forests."""
    try:
        from sklearn.base import BaseEstimator
        from sklearn.utils.validation import validate_data
    except ImportError as error:
        raise ImportError(
            f"a {type(X).__name__} is read by scikit-learn, as in {inputs.estimator}.predict, but it does not import "
            f"({error}); install it, or pass a float32 array"
        ) from error
    stand_in: Any = type(inputs.estimator, (BaseEstimator,), {})()
    stand_in.n_features_in_ = inputs.num_features
    if inputs.names is not None:
        stand_in.feature_names_in_ = np.array(inputs.names, object)
    finite = "allow-nan" if inputs.allow_nan and not _is_sparse(X) else True
    options = {"dtype": np.float32, "accept_sparse": "csr", "ensure_all_finite": finite}
    checked: Any = validate_data(stand_in, X, reset=False, **options)
    if not _is_sparse(checked):
        return checked
    if np.isnan(checked.data).any():
        raise ValueError("`X` is sparse and has NaN, which trees send another way than in a dense table: pass that")
    return _dense(checked, 0.0)


def _xgboost(inputs: Inputs, X: Any) -> npt.NDArray:
    """What ``XGBModel.predict`` and ``Booster.inplace_predict`` read: every value cast to float32 at once."""
    if _pandas("DataFrame", X):
        names = [" ".join(map(str, name)) if isinstance(name, tuple) else str(name) for name in X.columns]
        if inputs.names is not None and names != list(inputs.names):
            raise ValueError(
                f"`X` has the columns {names}, but the {inputs.estimator} was trained on {list(inputs.names)}: pass "
                f"these, in this order"
            )
        if not X.columns.is_unique:
            raise ValueError(f"`X` has two columns of one name: {names}; rename one, expected distinct names")
        _check_numbers(X)
        if len(names) != inputs.num_features:
            raise ValueError(f"`X` has {len(names)} columns, expected the forest's {inputs.num_features} features")
        return np.stack([X.iloc[:, i].to_numpy(np.float32, na_value=np.nan) for i in range(len(names))], 1)
    if _is_sparse(X):
        if X.format != "csr" or type(X).__name__ != "csr_matrix":
            raise TypeError(
                f"`X` is a {type(X).__name__}; pass scipy.sparse.csr_matrix(X), of which absent entries are missing"
            )
        return _dense(X, np.nan)
    array = _array_of(X, (np.ndarray, list, tuple), object_as=np.float32)
    if not array.dtype.isnative:
        raise ValueError("`X` has swapped bytes, which XGBoost misreads; pass X.astype(X.dtype.newbyteorder())")
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)


def _lightgbm(inputs: Inputs, X: Any) -> npt.NDArray:
    """What ``Booster.predict`` and ``LGBMModel.predict`` read: tables by position, what is no float as float32."""
    if _pandas("DataFrame", X):
        _check_numbers(X, numpy=True)
        common = np.result_type(*(dtype.type for dtype in X.dtypes), np.float32)
        return X.to_numpy(np.float64 if common == np.float64 else np.float32, na_value=np.nan)
    if _is_sparse(X):
        if X.format not in ("csr", "csc") or X.dtype not in (np.float32, np.float64):
            raise TypeError(f"`X` is sparse, {X.format} of {X.dtype}; pass X.tocsr().astype(float)")
        if ((np.abs(X.data) <= LIGHTGBM_ZERO) & (X.data != 0)).any():
            raise ValueError("`X` is sparse and stores values of at most 1e-35, zero in a dense table only: pass that")
        return _dense(X.tocsr(), 0.0)
    if isinstance(X, np.matrix):
        raise TypeError("`X` is a np.matrix, which estimators of LightGBM refuse; pass np.asarray(X)")
    taken = (np.ndarray, list) if inputs.estimator == "Booster" else (np.ndarray, list, tuple)
    validated = inputs.estimator != "Booster" and isinstance(X, np.ndarray)  # by scikit-learn, which leaves lists alone
    array = _array_of(X, taken, object_as=np.float64 if validated else np.float32)
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)


_READERS: dict[str, Callable[[Inputs, Any], npt.NDArray]] = {
    "arrays": _arrays,
    "sklearn": _sklearn,
    "xgboost": _xgboost,
    "lightgbm": _lightgbm,
}


def _pandas(kind: str, X: Any) -> bool:
    """Whether X is of a class of pandas, which need not be installed."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(X, getattr(pandas, kind))


def _is_sparse(X: Any) -> bool:
    return hasattr(X, "toarray") and hasattr(X, "format")


def _check_numbers(frame: Any, numpy: bool = False) -> None:
    """Columns of integers, floats and booleans, and where ``numpy`` asks for it NumPy's; those of others are named."""
    for name, dtype in zip(frame.columns, frame.dtypes, strict=True):
        if getattr(dtype, "kind", "O") not in "biuf" or (numpy and not issubclass(dtype.type, np.number | np.bool_)):
            raise ValueError(
                f"column {name!r} of `X` is {dtype}, expected integers, floats or booleans: convert it as in training"
            )


def _array_of(X: Any, taken: tuple[type, ...], object_as: type) -> npt.NDArray:
    if not isinstance(X, taken):
        raise TypeError(f"`X` is a {type(X).__name__}; pass an array of NumPy, or a DataFrame of pandas")
    array = np.asarray(X)
    if array.dtype == object:
        try:
            return array.astype(object_as)
        except (TypeError, ValueError) as error:
            raise ValueError(f"`X` holds objects that are no numbers: {error}") from None
    return _real(array)


def _real(array: npt.NDArray) -> npt.NDArray:
    if array.dtype.kind not in "biuf":
        raise ValueError(f"`X` is an array of {array.dtype}, expected integers, floats or booleans")
    return array


def _dense(matrix: Any, absent: float) -> npt.NDArray:
    """A CSR matrix as an array, with a value in place of absent entries.

    Raises:
        ValueError: entries that are stored twice, of which libraries take the last and SciPy the sum.
    """
    sizes = np.diff(matrix.indptr)
    row = np.repeat(np.arange(len(sizes)), sizes)
    places = row.astype(np.int64) * matrix.shape[1] + matrix.indices
    if len(np.unique(places)) != len(places):
        raise ValueError("`X` is sparse and stores an entry twice: call X.sum_duplicates() first")
    dtype = np.float64 if matrix.dtype == np.float64 else np.float32
    out = np.full(matrix.shape, absent, dtype)
    out.ravel()[places] = matrix.data
    return out

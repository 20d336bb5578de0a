"""Tables as rows of numbers in [-1, 1], and back with dtypes and names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd


class Columns:
    """The code of one table: categories one-hot, everything scaled to [-1, 1]; missing values stay NaN.

    Args:
        table: DataFrame or array [n, d].
        categorical: names (positions for an array) of categorical columns, besides those of such a dtype.
        integer: names of columns to round, besides those of an integer dtype.

    Raises:
        ValueError: no rows, a column without any value, infinities, or a name that is not a column.
    """

    def __init__(self, table: Any, categorical: tuple = (), integer: tuple = ()) -> None:
        self.is_frame = isinstance(table, pd.DataFrame)
        frame = as_frame(table)
        self.names, self.dtypes = list(frame.columns), dict(frame.dtypes)
        unknown = [name for name in (*categorical, *integer) if name not in self.dtypes]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no column; the columns are {self.names}")
        if frame.empty:
            raise ValueError(f"the table is {list(frame.shape)}, expected rows and columns")
        without = [name for name in self.names if bool(frame[name].isna().to_numpy().all())]
        if without:
            raise ValueError(f"column {without[0]!r} has no value")
        self.categories: dict[Any, list] = {}
        self.integer = {name for name in self.names if pd.api.types.is_integer_dtype(self.dtypes[name])} | set(integer)
        for name in self.names:
            number = pd.api.types.is_numeric_dtype(self.dtypes[name]) and not pd.api.types.is_bool_dtype(
                self.dtypes[name]
            )
            if name in categorical or not number:
                self.categories[name] = sorted(frame[name].dropna().unique().tolist())
        raw = self._numbers(frame)
        self.low, self.high = np.nanmin(raw, 0), np.nanmax(raw, 0)
        if not np.isfinite(self.low).all() or not np.isfinite(self.high).all():
            raise ValueError("the table has infinities")

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return len(self.low)

    def encode(self, table: Any) -> np.ndarray:
        """Return the table as [n, width] in [-1, 1], where its values lie in the fitted ranges.

        Raises:
            ValueError: other columns, or a category that was not there.
        """
        frame = as_frame(table)
        if list(frame.columns) != self.names:
            raise ValueError(f"columns are {list(frame.columns)}, expected {self.names}")
        span = np.where(self.high > self.low, self.high - self.low, 1.0)
        return 2 * (self._numbers(frame) - self.low) / span - 1

    def decode(self, rows: np.ndarray) -> Any:
        """Return rows [n, width] as a table like the fitted one: clipped to its ranges, rounded, in its dtypes."""
        raw = np.clip((rows + 1) / 2, 0, 1) * (self.high - self.low) + self.low
        columns, at = {}, 0
        for name in self.names:
            categories = self.categories.get(name)
            if categories is not None:
                chosen = rows[:, at : at + len(categories)].argmax(1)
                columns[name] = pd.Series(np.array(categories, dtype=object)[chosen]).astype(self.dtypes[name])
                at += len(categories)
                continue
            values = np.rint(raw[:, at]) if name in self.integer else raw[:, at]
            columns[name] = pd.Series(values).astype(self.dtypes[name])
            at += 1
        frame = pd.DataFrame(columns, columns=pd.Index(self.names))
        return frame if self.is_frame else frame.to_numpy()

    def _numbers(self, frame: pd.DataFrame) -> np.ndarray:
        parts = []
        for name in self.names:
            categories = self.categories.get(name)
            if categories is None:
                parts.append(frame[name].to_numpy(np.float64, na_value=np.nan)[:, None])
                continue
            values = frame[name].to_numpy(object, na_value=None)
            unknown = [value for value in values if value is not None and value not in categories]
            if unknown:
                raise ValueError(f"column {name!r} has {unknown[0]!r}, which was not there in training")
            codes = np.array([np.nan if value is None else categories.index(value) for value in values], np.float64)
            parts.append(np.where(np.isnan(codes)[:, None], np.nan, codes[:, None] == np.arange(len(categories))))
        return np.concatenate(parts, 1)


def as_frame(table: Any) -> pd.DataFrame:
    """A DataFrame; the columns of an array [n, d] are numbered.

    Raises:
        ValueError: not two-dimensional.
    """
    if isinstance(table, pd.DataFrame):
        return table
    array = np.asarray(table)
    if array.ndim != 2:
        raise ValueError(f"the table is {list(array.shape)}, expected [n, d]")
    return pd.DataFrame(array)

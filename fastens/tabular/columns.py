"""Tables as rows of numbers in [-1, 1], and back with dtypes and names."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pandas as pd

from fastens.tabular.column_codes import Categories, Code, code_of


class Columns:
    """The code of one table, scaled to [-1, 1]: categories one-hot, dates on their grid; missing values stay NaN.

    Args:
        table: DataFrame or array [n, d].
        categorical: names (positions for an array) of categorical columns, besides those that are text or booleans.
        integer: names of columns to round, besides those of integers.
        leave_out: names of columns that are no part of the code, such as ids.

    Raises:
        ValueError: no rows, a column without any value or without a code, infinities, a name that is not a column, or
            that two columns have.
    """

    def __init__(self, table: Any, categorical: tuple = (), integer: tuple = (), leave_out: tuple = ()) -> None:
        self.is_frame = isinstance(table, pd.DataFrame)
        frame = as_frame(table)
        self.left_out = tuple(leave_out)
        unknown = [name for name in (*categorical, *integer, *leave_out) if name not in frame.columns]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no column; the columns are {list(frame.columns)}")
        frame = self._kept(frame)
        self.names = list(frame.columns)
        if frame.empty:
            raise ValueError(f"the table is {list(frame.shape)}, expected rows and columns")
        without = [name for name in self.names if bool(frame[name].isna().to_numpy().all())]
        if without:
            raise ValueError(f"column {without[0]!r} has no value")
        self.codes: dict[Any, Code] = {
            name: code_of(name, _column(frame, name), name in categorical, name in integer) for name in self.names
        }
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
        frame = self._kept(as_frame(table))
        if list(frame.columns) != self.names:
            raise ValueError(f"columns are {list(frame.columns)}, expected {self.names}")
        span = np.where(self.high > self.low, self.high - self.low, 1.0)
        return 2 * (self._numbers(frame) - self.low) / span - 1

    def decode(self, rows: np.ndarray) -> Any:
        """Return rows [n, width] as a table like the fitted one: clipped to its ranges, rounded, in its dtypes."""
        raw = np.clip((rows + 1) / 2, 0, 1) * (self.high - self.low) + self.low
        columns, at = {}, 0
        for name, code in self.codes.items():
            part = slice(at, at + code.width)
            columns[name] = code.decode((rows if isinstance(code, Categories) else raw)[:, part])
            at += code.width
        frame = pd.DataFrame(columns, columns=pd.Index(self.names))
        return frame if self.is_frame else frame.to_numpy()

    def fill(self, table: Any, rows: np.ndarray) -> Any:
        """Return the table with its missing values from rows [n, width], and everything else as it is."""
        filled = self.decode(rows)
        if not self.is_frame:
            given = np.array(table)
            kept = [place for place in range(given.shape[1]) if place not in self.left_out]
            given[:, kept] = np.where(pd.isna(given[:, kept]), filled, given[:, kept])
            return given
        out = table.copy()
        for name in self.names:
            out[name] = table[name].where(table[name].notna(), filled[name].set_axis(table.index))
        return out

    def _kept(self, frame: pd.DataFrame) -> pd.DataFrame:
        if not frame.columns.is_unique:
            twice = frame.columns[frame.columns.duplicated()][0]
            raise ValueError(f"two columns are named {twice!r}; rename one of them")
        return frame.drop(columns=[name for name in self.left_out if name in frame.columns])

    def _numbers(self, frame: pd.DataFrame) -> np.ndarray:
        return np.concatenate([code.encode(_column(frame, name)) for name, code in self.codes.items()], 1)


def _column(frame: pd.DataFrame, name: Any) -> pd.Series:
    return cast(pd.Series, frame[name])  # no two are named alike


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

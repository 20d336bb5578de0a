"""Which code a column of a table gets: a number, dates on their grid, or categories; ids and free text get none."""

from __future__ import annotations

import re
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from fastens.tabular.dates import Dates

ROWS_PER_CATEGORY = 2  # on average; with fewer, most values stand for one row of the training data
MANY, ROWS_OF_MANY = 100, 10  # and of more than MANY categories, that many rows each
FEWEST_NUMBERS = 10  # whole numbers of which it is no accident that they are the numbers of the rows
IDENTIFIER = re.compile(r"(^|[^a-z])(id|uid|uuid|guid|key|index)s?$", re.IGNORECASE)
DATE = re.compile(
    r"\d{4}-(?:0?[1-9]|1[0-2])(?:-\d\d?(?:[T ]\d\d?:\d\d.*)?)?|\d{1,2}[./]\d{1,2}[./]\d{2,4}|\d{4}/\d\d?/\d\d?"
)


class Code(Protocol):
    """How the values of one column become ``width`` numbers, and how numbers become such values."""

    width: int

    def encode(self, column: pd.Series) -> npt.NDArray:
        """Values as float64 [n, width]; NaN is missing."""
        ...

    def decode(self, rows: npt.NDArray) -> pd.Series:
        """Numbers [n, width] as values of the column's dtype."""
        ...


def code_of(name: Any, column: pd.Series, categorical: bool, integer: bool) -> Code:
    """Choose the code of a column, of which at least one value is there.

    Args:
        name: of the column.
        column: its values.
        categorical: whether it was named as one of categories.
        integer: whether it was named as one to round.

    Raises:
        ValueError: ids, free text, dates or numbers written as text, or objects that have no code.
    """
    if categorical:
        return Categories(name, column)
    if pd.api.types.is_numeric_dtype(column.dtype) and not pd.api.types.is_bool_dtype(column.dtype):
        return _number(name, column, integer)
    if isinstance(column.dtype, pd.PeriodDtype) or getattr(column.dtype, "kind", "") in ("M", "m"):
        return Dates(column)
    content = pd.api.types.infer_dtype(column, skipna=True)
    if column.dtype == object and content in ("date", "datetime", "datetime64"):
        return Dates(column)
    if content in ("integer", "floating", "mixed-integer-float") and column.dtype == object:
        return _number(name, column, integer)
    if content == "string":
        _check_text(name, column.dropna().astype(str))
    elif content not in ("boolean", "categorical", "bytes") or isinstance(column.dtype, pd.IntervalDtype):
        raise ValueError(f"column {name!r} holds {content} ({column.dtype}), expected {_TAKEN}; {_SETTLED}")
    _check_repeated(name, column)
    return Categories(name, column)


class Numbers:
    """Numbers as they are; rounded on the way back where they are whole."""

    width = 1

    def __init__(self, dtype: Any, whole: bool) -> None:
        self.dtype, self.whole = dtype, whole

    def encode(self, column: pd.Series) -> npt.NDArray:
        """The values."""
        return column.to_numpy(np.float64, na_value=np.nan)[:, None]

    def decode(self, rows: npt.NDArray) -> pd.Series:
        """The values, rounded where they are whole."""
        values = pd.Series(np.rint(rows[:, 0]) if self.whole else rows[:, 0])
        if self.dtype == object and self.whole:
            values = values.astype("int64")
        return values.astype(self.dtype)


class Categories:
    """One number per category, 1 for the value's own."""

    def __init__(self, name: Any, column: pd.Series) -> None:
        self.name, self.dtype = name, column.dtype
        try:
            self.values: list = sorted(column.dropna().unique().tolist())
        except TypeError as error:
            raise ValueError(f"column {name!r} has values that are no categories of one kind: {error}") from None
        self.width = len(self.values)

    def encode(self, column: pd.Series) -> npt.NDArray:
        """One-hot rows; NaN in all of them where there is no value.

        Raises:
            ValueError: a category that was not there in training.
        """
        values = column.to_numpy(object, na_value=None)
        place = {value: code for code, value in enumerate(self.values)}
        unknown = [value for value in values if value is not None and value not in place]
        if unknown:
            raise ValueError(f"column {self.name!r} has {unknown[0]!r}, which was not there in training")
        codes = np.array([np.nan if value is None else place[value] for value in values], np.float64)[:, None]
        return np.where(np.isnan(codes), np.nan, codes == np.arange(self.width))

    def decode(self, rows: npt.NDArray) -> pd.Series:
        """The category of the largest number."""
        return pd.Series(np.array(self.values, dtype=object)[rows.argmax(1)]).astype(self.dtype)


_TAKEN = "numbers, dates, booleans or text that repeats"
_SETTLED = "leave it out (`leave_out=`), or name it in `categorical=` if its values are categories"


def _number(name: Any, column: pd.Series, integer: bool) -> Numbers:
    if pd.api.types.is_complex_dtype(column.dtype):
        raise ValueError(f"column {name!r} is {column.dtype}, expected {_TAKEN}: split it into two columns")
    values = column.dropna().to_numpy(np.float64)
    integers = pd.api.types.is_integer_dtype(column.dtype) or pd.api.types.infer_dtype(column) == "integer"
    distinct = len(values) >= FEWEST_NUMBERS and len(np.unique(values)) == len(values)
    if not integer and distinct and np.isfinite(values).all() and (values == np.rint(values)).all():
        numbered = np.ptp(values) == len(values) - 1
        if numbered or IDENTIFIER.search(str(name)):
            why = "numbers its rows" if numbered else "has a number of its own for every row"
            raise ValueError(
                f"column {name!r} {why}, as ids do, which say nothing of other rows: leave it out (`leave_out=`), or "
                f"name it in `integer=` if it is a quantity"
            )
    return Numbers(column.dtype, integers or integer)


def _all_numbers(text: pd.Series) -> bool:
    read: Any = pd.to_numeric(text, errors="coerce")  # of a Series it is one
    return bool(read.notna().all())


def _check_text(name: Any, text: pd.Series) -> None:
    """Dates and measured values that are written as text; codes such as "02139" are text."""
    if DATE.fullmatch(text.iloc[0]) and text.str.fullmatch(DATE.pattern).all():
        kind, remedy = "dates", "pd.to_datetime"
    elif text.str.contains(r"[.eE]").any() and _all_numbers(text):
        kind, remedy = "numbers", "pd.to_numeric"
    else:
        return
    raise ValueError(
        f"column {name!r} holds {kind} as text, such as {text.iloc[0]!r}: convert it by {remedy}, or name it in "
        f"`categorical=` if its values are categories"
    )


def _check_repeated(name: Any, column: pd.Series) -> None:
    there = column.dropna()
    distinct = there.nunique()
    rows = len(there) / distinct
    if rows < ROWS_PER_CATEGORY or (distinct > MANY and rows < ROWS_OF_MANY):
        raise ValueError(
            f"column {name!r} has {distinct} values in {len(there)} rows, such as {there.iloc[0]!r:.60}: ids or free "
            f"text, which would be repeated word for word; {_SETTLED}"
        )

"""Dates as numbers of steps on the grid that they lie on, and back: sampled dates are dates of that grid."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pandas as pd

FEWEST_BUSINESS_DAYS = 10  # distinct dates without a weekend among them that are no accident


class Dates:
    """The code of a column of dates, times, durations or periods.

    The grid is the coarsest that holds every value: a day of the month (its first, its last, or one between) every so
    many months; business days; else the largest step of time that divides all distances. A time zone's grid is that of
    its clocks.

    Args:
        column: values of a datetime, timedelta or period dtype, or ``datetime.date`` and ``datetime`` objects.
    """

    width = 1

    def __init__(self, column: pd.Series) -> None:
        self.dtype = column.dtype
        self.plain_dates = pd.api.types.infer_dtype(column, skipna=True) == "date"
        times = _times(column.dropna())
        self._unit = np.datetime_data(times.dtype)[0] if times.dtype.kind in "mM" else ""
        self._first, self._step, self._kind = times.min(), 1, "step"
        if times.dtype.kind == "M":
            days = times.astype("M8[D]")
            if _day_of_month(times) is not None:
                self._kind = "month"
            elif (
                (times - days == times[0] - days[0]).all()
                and np.is_busday(days).all()
                and len(np.unique(days)) >= FEWEST_BUSINESS_DAYS
            ):
                self._kind = "business day"
        self._rest = _day_of_month(times) if self._kind == "month" else self._first - self._floor(self._first)
        self._months_on = int(self._kind == "month" and self._rest.astype(int) < 0)
        steps = self._kind == "step"
        counts = (times - self._first).astype(np.int64) if steps else np.rint(self._counts(times)).astype(np.int64)
        self._step = int(np.gcd.reduce(counts)) or 1

    def encode(self, column: pd.Series) -> npt.NDArray:
        """Steps from the first fitted date, float64 [n, 1]; NaN where there is no date, fractions between steps."""
        out = np.full((len(column), 1), np.nan)
        there = column.notna().to_numpy()
        if there.any():
            out[there, 0] = self._counts(_times(column.loc[there])) / self._step
        return out

    def decode(self, rows: npt.NDArray) -> pd.Series:
        """The nearest dates of the grid to steps [n, 1], in the fitted dtype."""
        counts = np.rint(rows[:, 0]).astype(np.int64) * self._step
        if self._kind == "month":
            times = (self._first.astype("M8[M]") + counts + self._months_on).astype(self._first.dtype) + self._rest
        elif self._kind == "business day":
            times = np.busday_offset(self._first.astype("M8[D]"), counts).astype(self._first.dtype) + self._rest
        elif self._unit:
            times = self._first + counts.astype(f"m8[{self._unit}]")
        else:
            periods = cast(pd.PeriodDtype, self.dtype)
            return pd.Series(pd.PeriodIndex.from_ordinals(self._first + counts, freq=periods.freq))
        out = pd.Series(times)
        if self.dtype == object:
            return pd.Series(list(out.dt.date if self.plain_dates else out.dt.to_pydatetime()), dtype=object)
        zone = getattr(self.dtype, "tz", None)
        if zone is not None:  # an hour that clocks skip is the next, one that they show twice the first
            first = np.ones(len(out), bool)
            out = out.dt.tz_localize(zone, ambiguous=first, nonexistent="shift_forward")
        return out.astype(self.dtype)

    def _floor(self, times: Any) -> Any:
        if self._kind == "step":
            return times
        return times.astype("M8[D]").astype(times.dtype)

    def _counts(self, times: npt.NDArray) -> npt.NDArray:
        """Grid units from the first date, with fractions where a date is off the grid."""
        if self._kind == "month":
            months = times.astype("M8[M]")
            anchor = (months + self._months_on).astype(times.dtype) + self._rest
            length = ((months + 1).astype(times.dtype) - months.astype(times.dtype)).astype(float)
            first = self._first.astype("M8[M]")
            return (months - first).astype(float) + (times - anchor).astype(float) / length
        if self._kind == "business day":
            days = times.astype("M8[D]")
            part = (times - self._floor(times) - self._rest) / np.timedelta64(1, "D")
            return np.busday_count(self._first.astype("M8[D]"), days) + part
        return (times - self._first).astype(float)


def _times(column: pd.Series) -> npt.NDArray:
    """Wall times, durations, or ordinals of periods, of a column without missing values."""
    if isinstance(column.dtype, pd.PeriodDtype):
        return column.astype("int64").to_numpy()
    if column.dtype == object:
        column = pd.to_datetime(column)
    if getattr(column.dtype, "tz", None) is not None:
        column = column.dt.tz_localize(None)
    kind = "timedelta64" if getattr(column.dtype, "kind", "") == "m" else "datetime64"
    return column.to_numpy() if isinstance(column.dtype, np.dtype) else column.astype(f"{kind}[us]").to_numpy()


def _is_constant(values: npt.NDArray) -> bool:
    return bool((values == values[0]).all())


def _day_of_month(times: npt.NDArray) -> Any:
    """How long after their month's first day, or before the next month's, all dates of several months are, or None.

    The days that not every month has are counted from its end.
    """
    months = times.astype("M8[M]")
    if _is_constant(months):
        return None
    for months_on in (0, 1):
        rest = times - (months + months_on).astype(times.dtype)
        if _is_constant(rest) and abs(rest[0]) <= np.timedelta64(28, "D"):
            return rest[0]
    return None

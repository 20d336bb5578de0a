"""What becomes of each kind of column: numbers, dates on their grid, categories, or an error that names it."""

import datetime
import decimal
import uuid

import numpy as np
import pandas as pd
import pytest

from fastens.tabular import ForestDiffusion
from fastens.tabular.columns import Columns

N = 60
RNG = np.random.default_rng(0)


def picked(dates):
    """Sixty of the dates, the first and the last among them, in any order."""
    chosen = pd.Series(dates).take(RNG.integers(0, len(dates), N)).reset_index(drop=True)
    chosen.iloc[0], chosen.iloc[1] = dates[0], dates[-1]
    return chosen


def weekday(dates):
    """Days from Monday."""
    return (pd.to_datetime(dates).to_numpy().astype("M8[D]").astype(int) + 3) % 7


DATES = {
    "days": picked(pd.date_range("2020-01-01", periods=900)),
    "weeks": picked(pd.date_range("2020-01-01", periods=90, freq="7D")),
    "months": picked(pd.date_range("2020-01-01", periods=50, freq="MS")),
    "ends of months": picked(pd.date_range("2019-01-31", periods=50, freq="ME")),
    "the 31st": picked([d for d in pd.date_range("2019-01-31", "2024-12-31") if d.day == 31]),
    "quarters": picked(pd.date_range("2010-02-15", periods=50, freq="3MS") + pd.Timedelta(days=14)),
    "years": picked(pd.date_range("1960-01-01", periods=50, freq="YS")),
    "business days": picked(pd.bdate_range("2020-01-01", periods=300)),
    "hours": picked(pd.date_range("2020-01-01", periods=999, freq="h")),
    "milliseconds": picked(pd.date_range("2020-01-01", periods=999, freq="7ms")),
    "clock of a zone": picked(pd.date_range("2020-01-01", periods=500, tz="Europe/Berlin")),
    "durations": picked(pd.timedelta_range("0h", periods=500, freq="15min")),
    "periods": picked(pd.period_range("2001-01", periods=80, freq="M")),
    "seconds": picked(pd.date_range("2020-01-01", periods=999, freq="s").astype("datetime64[s]")),
    "date objects": picked([datetime.date(2020, 1, 1) + datetime.timedelta(days=7 * i) for i in range(70)]),
    "datetime objects": picked([datetime.datetime(2020, 1, 1) + datetime.timedelta(hours=i) for i in range(70)]).astype(
        object
    ),
}
LIES_ON = {
    "days": lambda d: d.dt.normalize() == d,
    "weeks": lambda d: weekday(d) == 2,
    "months": lambda d: d.dt.is_month_start,
    "ends of months": lambda d: d.dt.is_month_end,
    "quarters": lambda d: (d.dt.day == 15) & d.dt.month.isin([3, 6, 9, 12]),
    "years": lambda d: d.dt.is_year_start,
    "business days": lambda d: weekday(d) < 5,
    "hours": lambda d: d.dt.floor("h") == d,
    "milliseconds": lambda d: (d - pd.Timestamp("2020-01-01")).dt.total_seconds().mul(1000).round(6) % 7 == 0,
    "clock of a zone": lambda d: d.dt.normalize() == d,
    "durations": lambda d: d.dt.total_seconds() % 900 == 0,
    "date objects": lambda d: weekday(d) == 2,
}


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("kind", DATES)
def test_dates_come_back_in_their_dtype(kind, missing):
    column = DATES[kind].copy()
    if missing:
        column.iloc[5:9] = None
    frame = pd.DataFrame({"at": column})
    columns = Columns(frame)
    rows = columns.encode(frame)
    assert rows.shape == (N, 1)
    assert np.array_equal(np.isnan(rows[:, 0]), column.isna())
    there = column.notna().to_numpy()
    back = columns.decode(rows[there])
    assert list(back["at"]) == list(column[there])
    assert back["at"].dtype == column.dtype


@pytest.mark.parametrize("kind", LIES_ON)
def test_sampled_dates_lie_on_the_grid(kind):
    frame = pd.DataFrame({"at": DATES[kind]})
    at = Columns(frame).decode(RNG.uniform(-1.1, 1.1, (400, 1)))["at"]
    assert LIES_ON[kind](at).all()
    assert at.min() == frame["at"].min()
    assert at.max() == frame["at"].max()
    assert len(set(at) - set(frame["at"])) > 0, "only dates of the training data"


def test_an_hour_that_clocks_skip_or_repeat_is_one_that_there_is():
    days = pd.date_range("2021-01-01 02:30", periods=365, tz="UTC").tz_localize(None)
    column = pd.Series(days).dt.tz_localize("Europe/Berlin", ambiguous=np.ones(365, bool), nonexistent="shift_forward")
    columns = Columns(pd.DataFrame({"at": column}))
    assert columns.decode(np.linspace(-1, 1, 365)[:, None])["at"].notna().all()


def test_training_dates_are_not_repeated():
    days = pd.date_range("2000-01-01", "2020-01-01")
    frame = pd.DataFrame({"born": days[RNG.choice(len(days), N, replace=False)], "height": RNG.normal(size=N)})
    model = ForestDiffusion(n_t=5, n_estimators=4, duplicate_K=3).fit(frame)
    born = model.sample(200)["born"]
    inside = born[(born > born.min()) & (born < born.max())]  # what is beyond the training data comes back as its ends
    assert len(inside) > 50
    assert inside.isin(frame["born"]).mean() < 0.2


LETTERS = ["oak", "pine", "yew"]
REFUSED = {
    "names": ([f"name {i}" for i in range(N)], "ids or free text"),
    "free text": ([" ".join(RNG.choice(LETTERS, 12)) for _ in range(N)], "ids or free text"),
    "text that hardly repeats": ([f"name {i // 2}" if i < 20 else f"name {i}" for i in range(N)], "ids or free text"),
    "UUIDs as text": ([str(uuid.UUID(int=i)) for i in range(N)], "ids or free text"),
    "UUIDs": ([uuid.UUID(int=i) for i in range(N)], "expected numbers"),
    "categories of one row": (pd.Categorical([f"name {i}" for i in range(N)]), "ids or free text"),
    "bytes of one row": ([bytes([i]) for i in range(N)], "ids or free text"),
    "numbers of rows": (RNG.permutation(N) + 7, "numbers its rows"),
    "numbers of rows as floats": (RNG.permutation(N) + 7.0, "numbers its rows"),
    "dates as text": (np.resize(["2020-01-05", "2020-02-01"], N), "pd.to_datetime"),
    "times as text": (np.resize(["2020-01-05T10:00", "2020-02-01 11:00:01.5"], N), "pd.to_datetime"),
    "dates with dots": (np.resize(["5.1.2020", "01.02.2020"], N), "pd.to_datetime"),
    "numbers as text": (np.resize(["1.5", "2.5e3"], N), "pd.to_numeric"),
    "lists": ([[1]] * N, "expected numbers"),
    "decimals": ([decimal.Decimal(i) for i in range(N)], "expected numbers"),
    "text and numbers": (["oak", 1] * (N // 2), "expected numbers"),
    "times of day": ([datetime.time(i % 24) for i in range(N)], "expected numbers"),
    "complex numbers": (np.full(N, 1j), "expected numbers"),
    "intervals": (pd.interval_range(0, N), "expected numbers"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_columns_without_a_code_are_named(kind):
    values, message = REFUSED[kind]
    frame = pd.DataFrame({"height": RNG.normal(size=N), "it": values})
    with pytest.raises(ValueError, match=f"column 'it'.*{message}"):
        Columns(frame)
    left = Columns(frame, leave_out=("it",))
    assert list(left.decode(left.encode(frame)).columns) == ["height"]
    assert np.array_equal(left.encode(frame), left.encode(frame[["height"]]))


@pytest.mark.parametrize("name", ["id", "customer_id", "User ID", "uuid", "row index", "ids"])
def test_a_number_of_its_own_for_every_row_is_an_id_by_its_name(name):
    values = RNG.choice(10**9, N, replace=False)
    with pytest.raises(ValueError, match=f"column '{name}' has a number of its own"):
        Columns(pd.DataFrame({name: values}))
    assert Columns(pd.DataFrame({name: values}), integer=(name,)).width == 1
    assert Columns(pd.DataFrame({"income": values})).width == 1
    assert Columns(pd.DataFrame({name: values // 2 * 0 + RNG.integers(0, 9, N)})).width == 1


TAKEN = {
    "text that repeats": (np.resize(LETTERS, N), 3),
    "codes": (np.resize(["02139", "10115"], N), 2),
    "booleans": (RNG.random(N) < 0.5, 2),
    "boolean objects": (np.resize(np.array([True, False, None], object), N), 2),
    "whole numbers as objects": (np.resize(np.array([1, 2, 5], object), N), 1),
    "numbers as objects": (np.resize(np.array([1, 2.5, None], object), N), 1),
    "categories": (pd.Categorical(np.resize(LETTERS, N)), 3),
    "nullable": (pd.array(np.resize([1, 2, 4], N), dtype="Int64"), 1),
}


@pytest.mark.parametrize("kind", TAKEN)
def test_other_columns_come_back(kind):
    values, width = TAKEN[kind]
    frame = pd.DataFrame({"it": values})
    columns = Columns(frame)
    rows = columns.encode(frame)
    assert rows.shape == (N, width)
    there = frame["it"].notna().to_numpy()
    assert list(columns.decode(rows[there])["it"]) == list(frame["it"][there])


def test_what_is_named_as_categories_is_taken_as_such():
    for values in (REFUSED["names"][0], REFUSED["numbers of rows"][0], REFUSED["dates as text"][0], DATES["days"]):
        frame = pd.DataFrame({"it": values})
        columns = Columns(frame, categorical=("it",))
        assert columns.width == frame["it"].nunique()


def test_two_columns_of_one_name_are_refused():
    frame = pd.DataFrame(np.ones((9, 2)), columns=["a", "a"])
    with pytest.raises(ValueError, match="two columns are named 'a'"):
        Columns(frame)


@pytest.mark.parametrize("as_array", [False, True])
def test_left_out_columns_stay_as_they_are_where_holes_are_filled(as_array):
    frame = pd.DataFrame({0: RNG.normal(size=N), 1: [f"name {i}" for i in range(N)], 2: RNG.normal(size=N)})
    table = frame.to_numpy() if as_array else frame
    options = {"n_t": 4, "n_estimators": 4, "duplicate_K": 3, "leave_out": (1,)}
    model = ForestDiffusion(**options).fit(table)
    holes = table.copy()
    if as_array:
        holes[3:9, 2] = np.nan
    else:
        holes.loc[3:8, 2] = np.nan
    filled = pd.DataFrame(model.impute(holes))
    assert not filled.isna().any().any()
    assert list(filled[1]) == list(frame[1])
    assert list(filled[0]) == list(frame[0])
    assert list(filled[2].iloc[9:]) == list(frame[2].iloc[9:])

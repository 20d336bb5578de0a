import functools
import pickle

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.exceptions import NotFittedError

import fastens
from fastens.tabular import ForestDiffusion
from fastens.tabular.columns import Columns
from fastens.tabular.streamed import fit_streamed

SMALL = {"n_t": 8, "n_estimators": 8, "max_depth": 5, "duplicate_K": 6}


def table(n=120, missing=False):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "length": rng.normal(3, 1, n),
            "count": rng.integers(0, 9, n),
            "kind": rng.choice(["oak", "pine", "yew"], n),
            "dead": rng.random(n) < 0.3,
            "size": pd.Categorical(rng.choice(["s", "l"], n), categories=["s", "m", "l"]),
        },
        index=np.arange(n) + 5,
    )
    frame["width"] = (2 * frame["length"] + (frame["kind"] == "oak")).astype(np.float32)
    if missing:
        frame.loc[frame.index[::4], "length"] = np.nan
        frame.loc[frame.index[::5], "kind"] = None
    return frame


@functools.cache
def fitted(labels=False, **options):
    data = load_iris()
    return ForestDiffusion(**(SMALL | options)).fit(data.data, data.target if labels else None)


def test_columns_round_trip():
    frame = table()
    columns = Columns(frame)
    rows = columns.encode(frame)
    assert rows.shape == (120, 3 + 3 + 2 + 2)
    assert np.abs(rows).max() <= 1 + 1e-12
    pd.testing.assert_frame_equal(columns.decode(rows).set_axis(frame.index), frame)
    array = load_iris().data
    assert np.allclose(Columns(array).decode(Columns(array).encode(array)), array)


def test_columns_refuse_what_they_cannot_code():
    frame = table()
    with pytest.raises(ValueError, match="'height' is no column"):
        Columns(frame, categorical=("height",))
    with pytest.raises(ValueError, match="column 'length' has no value"):
        Columns(frame.assign(length=np.nan))
    with pytest.raises(ValueError, match="infinities"):
        Columns(frame.assign(length=np.inf))
    with pytest.raises(ValueError, match="'kind' has 'elm'"):
        Columns(frame).encode(frame.assign(kind="elm"))
    with pytest.raises(ValueError, match="columns are"):
        Columns(frame).encode(frame[["length"]])
    with pytest.raises(ValueError, match=r"expected \[n, d\]"):
        Columns(np.zeros(3))


@pytest.mark.parametrize("rule", [*fastens.rules.names(), fastens.rules.Geometric("batch")])
@pytest.mark.parametrize("diffusion_type", ["vp", "flow"])
def test_samples_lie_in_the_table_s_range(diffusion_type, rule):
    model = fitted(diffusion_type=diffusion_type)
    out = model.sample(50, rule=rule)
    data = load_iris().data
    assert out.shape == (50, 4)
    assert (out >= data.min(0)).all()
    assert (out <= data.max(0)).all()
    assert np.array_equal(out, model.sample(50, rule=rule))
    assert not np.array_equal(out, model.sample(50, rule=rule, random_state=1))


def test_samples_are_distributed_as_the_data():
    """The published package, with these parameters, is 0.33 from the data's correlations."""
    model = fitted(n_t=30, n_estimators=20, duplicate_K=20, diffusion_type="flow")
    out, data = model.sample(600), load_iris().data
    assert np.abs(out.mean(0) - data.mean(0)).max() < 0.1
    assert np.abs(np.corrcoef(out.T) - np.corrcoef(data.T)).max() < 0.4


def test_labels():
    model = fitted(labels=True, diffusion_type="flow")
    _, labels = model.sample(90)
    assert set(labels) <= {0, 1, 2}
    asked, same = model.sample(40, labels=np.full(40, 2))
    assert (same == 2).all()
    data = load_iris()
    nearest = [np.abs(asked.mean(0) - data.data[data.target == j].mean(0)).sum() for j in range(3)]
    assert np.argmin(nearest) == 2
    assert model.score(data.data, data.target) > model.score(data.data, 2 - data.target)
    with pytest.raises(ValueError, match="label 7 was not there"):
        model.sample(1, labels=[7])


@pytest.mark.parametrize("learner", ["random_forest", "xgboost"])
def test_frames_keep_names_and_dtypes(learner):
    frame = table()
    out = ForestDiffusion(learner=learner, **SMALL).fit(frame).sample(30)
    assert list(out.columns) == list(frame.columns)
    assert out.dtypes.to_dict() == frame.dtypes.to_dict()
    assert set(out["kind"]) <= {"oak", "pine", "yew"}


def test_imputation_fills_holes_and_nothing_else():
    frame = table(missing=True)
    model = ForestDiffusion(learner="xgboost", **SMALL).fit(frame)
    out = model.impute(frame)
    assert not out.isna().any().any()
    pd.testing.assert_frame_equal(out.where(frame.notna()), frame.where(frame.notna()), check_dtype=False)
    data = load_iris().data.copy()
    data[::3, 2] = np.nan
    filled = fitted(n_t=30, n_estimators=20, duplicate_K=20, max_depth=9).impute(data)
    truth, hole = load_iris().data, np.isnan(data)
    assert np.array_equal(filled[~hole], truth[~hole])
    assert np.abs(filled[hole] - truth[hole]).mean() < np.abs(truth[:, 2].mean() - truth[hole]).mean()


def test_score_prefers_the_mean_to_the_largest_tree():
    data = load_iris().data
    assert fitted().score(data) > fitted().score(data, rule="dominant") > -10


def test_it_is_an_estimator():
    model = fitted()
    assert clone(model).get_params() == model.get_params()
    copied = pickle.loads(pickle.dumps(model))
    assert np.array_equal(copied.sample(20), model.sample(20))


def test_training_shows_its_progress(capfd):
    ForestDiffusion(n_t=3, n_estimators=1, duplicate_K=1, progress=True).fit(load_iris().data)
    assert "3/3" in capfd.readouterr().err
    ForestDiffusion(n_t=3, n_estimators=1, duplicate_K=1).fit(load_iris().data)
    assert not capfd.readouterr().err


def test_noisy_copies_are_drawn_one_at_a_time():
    """XGBoost is handed one copy after the other, the same ones at every pass."""
    rows, drawn = load_iris().data, []

    def noisy(rng):
        noise = rng.normal(size=rows.shape)
        drawn.append(noise[0, 0])
        return rows + noise, noise

    forest = fit_streamed(noisy, None, 7, rounds=2, max_depth=3, seed=1)
    assert len(set(drawn)) == 7
    assert drawn == drawn[:7] * (len(drawn) // 7)
    assert forest.num_outputs == rows.shape[1]


@pytest.mark.parametrize("use", [ForestDiffusion.score, ForestDiffusion.impute])
def test_rows_are_those_of_their_labels(use):
    data = load_iris()
    with pytest.raises(ValueError, match=r"pass `y`, the label of each row, of \[0, 1, 2\]"):
        use(fitted(True), data.data)
    with pytest.raises(ValueError, match="leave `y` out"):
        use(fitted(), data.data, data.target)
    use(fitted(True), data.data, data.target)
    use(fitted(), data.data)


def test_bad_input():
    data = load_iris().data
    with pytest.raises(NotFittedError, match="call `fit` first"):
        ForestDiffusion().sample(1)
    for options, message in (
        ({"n_t": 1}, "`n_t`"),
        ({"learner": "tree"}, "`learner`"),
        ({"diffusion_type": "ve"}, "`diffusion_type`"),
        ({"rule": "mode"}, "unknown rule"),
        ({"eps": 0.0}, "`eps`: expected a time above 0, where there is noise"),
        ({"eps": float("nan")}, "`eps`"),
        ({"eps": -0.1, "diffusion_type": "flow"}, "`eps`: expected a time of at least 0"),
        ({"beta_min": -5.0}, "`beta_min`, `beta_max`"),
        ({"beta_min": 9.0}, "`beta_min`, `beta_max`"),
        ({"beta_min": 0.0, "beta_max": 0.0}, "`beta_min`, `beta_max`"),
        ({"max_depth": 0}, "`max_depth`: expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ForestDiffusion(**(SMALL | options)).fit(data)
    with pytest.raises(ValueError, match="learner='xgboost'"):
        ForestDiffusion(**SMALL).fit(np.where(data > 7, np.nan, data))
    with pytest.raises(ValueError, match="`y` has 3 labels"):
        ForestDiffusion(**SMALL).fit(data, [1, 2, 3])
    with pytest.raises(ValueError, match="`y` has no label for 50 of 150 rows"):
        ForestDiffusion(**SMALL).fit(data, np.where(np.arange(150) < 50, np.nan, 1.0))
    with pytest.raises(ValueError, match="'vp'"):
        fitted(diffusion_type="flow").impute(data)


class Exact:
    """In a forest's place: the noise of rows of unit variance, which says at what time it was asked."""

    def __init__(self, t, sigma, asked):
        self.t, self.sigma, self.asked = t, sigma, asked

    def predict(self, x, rule):
        self.asked.append(self.t)
        return self.sigma * x


@pytest.mark.parametrize("sampler", ["stochastic", "deterministic"])
@pytest.mark.parametrize(("n_t", "eps"), [(8, 1e-3), (12, 0.2), (40, 0.05), (1200, 1e-3)])
def test_each_time_asks_the_forest_of_its_level(n_t, eps, sampler):
    model = fitted(n_t=2)
    model = clone(model).set_params(n_t=n_t, eps=eps)
    model.columns_, model.labels_, model.probabilities_ = fitted(n_t=2).columns_, [None], np.ones(1)
    asked, times = [], np.linspace(eps, 1, n_t)
    model.forests_ = [[[Exact(t, model._coefficients(t)[1], asked)] for t in times]]
    model.sample(3, sampler=sampler)
    np.testing.assert_array_equal(asked, times[::-1])
    asked.clear()
    model.score(load_iris().data)
    np.testing.assert_array_equal(asked, times)
    asked.clear()
    holes = load_iris().data.copy()
    holes[::3, 1] = np.nan
    model.impute(holes)
    np.testing.assert_array_equal(asked, times[::-1])


def test_the_last_step_is_tweedies():
    model = clone(fitted(n_t=2)).set_params(n_t=2, eps=0.5)
    alpha, sigma = model._coefficients(0.5)
    x = np.random.default_rng(0).normal(size=(5, 4))
    found = model._reverse(x, lambda x, level: np.zeros_like(x) if level else -x / 3, None)
    begun = x * (1 + 0.5 * 0.5 * model.beta_max)
    np.testing.assert_allclose(found, (begun - sigma**2 * begun / 3) / alpha, rtol=1e-12)  # E[x_0 | x]


def test_samplers_and_gain():
    model = fitted()
    stochastic, deterministic = (model.sample(40, sampler=name) for name in ("stochastic", "deterministic"))
    assert not np.array_equal(stochastic, deterministic)
    assert np.array_equal(deterministic, model.sample(40, sampler="deterministic"))
    assert not np.array_equal(stochastic, model.sample(40, gain=1.5))
    data = load_iris().data
    at = {gain: model.score(data, gain=gain) for gain in (0.0, 1.0, 2.0)}
    assert at[1.0] > at[0.0]  # of no prediction
    parabola = at[2.0] - 2 * at[1.0] + at[0.0]  # minus twice the mean square of the predictions
    assert parabola < 0
    with pytest.raises(ValueError, match="`sampler`"):
        model.sample(2, sampler="heun")

import pickle

import numpy as np
import pandas as pd
import pytest
import torch

import fastens
from fastens import rules

xgboost = pytest.importorskip("xgboost")
lightgbm = pytest.importorskip("lightgbm")


def table(missing=0.2, n=400):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 4)).astype(np.float32)
    y = np.stack([x[:, 0] - x[:, 1] ** 2, x[:, 2] * x[:, 3], x[:, 0]], 1)
    x[rng.random(x.shape) < missing] = np.nan
    return x, y + 5


def close(actual, expected):
    assert actual.shape == expected.shape
    return np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("missing", [0.0, 0.2])
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("options", [{}, {"gamma": 2.0, "tree_method": "exact"}, {"base_score": 0.25}])
def test_a_booster_of_xgboost_is_one_member(outputs, missing, options):
    x, y = table(missing)
    y = y[:, 0] if outputs == 1 else y
    model = xgboost.XGBRegressor(n_estimators=12, max_depth=4, n_jobs=1, **options).fit(x, y)
    forest = fastens.Forest.from_xgboost(model)
    assert forest.num_members == 1
    for backend in ("auto", "reference"):
        assert close(forest.predict(x, backend=backend), model.predict(x))
    assert close(fastens.Forest.from_xgboost(model.get_booster()).predict(x, "median"), model.predict(x))


def test_values_on_a_threshold_go_right_in_xgboost():
    x = np.array([[0.0], [1.0], [2.0], [3.0]], np.float32)
    model = xgboost.XGBRegressor(n_estimators=3, max_depth=2, tree_method="exact", n_jobs=1).fit(x, x[:, 0])
    cuts = [float(v) for v in model.get_booster().trees_to_dataframe()["Split"].dropna()]
    probe = np.array([[v] for c in cuts for v in (c, np.nextafter(np.float32(c), np.float32(-9)))], np.float32)
    assert close(fastens.Forest.from_xgboost(model).predict(probe), model.predict(probe))


def test_several_boosters_are_members():
    x, y = table()
    models = [xgboost.XGBRegressor(n_estimators=n, max_depth=3, n_jobs=1).fit(x, y) for n in (3, 5, 9)]
    forest = fastens.Forest.from_xgboost(models)
    stack = np.stack([model.predict(x) for model in models])
    assert close(forest.predict_members(x), stack)
    assert close(forest.predict(x, "median"), np.median(stack, 0))
    assert close(forest.predict(x, rules.Mean((0.5, 0.25, 0.25))), np.einsum("k,knp->np", [0.5, 0.25, 0.25], stack))


@pytest.mark.parametrize("outputs", [1, 3])
def test_parallel_trees_of_xgboost_are_members(outputs):
    x, y = table()
    y = y[:, 0] if outputs == 1 else y
    model = xgboost.XGBRFRegressor(n_estimators=7, max_depth=4, n_jobs=1).fit(x, y)
    forest = fastens.Forest.from_xgboost(model)
    assert forest.num_members == 7
    assert close(forest.predict(x), model.predict(x))
    assert np.ptp(forest.predict_members(x), axis=0).max() > 0


def stopped(how, tmp_path):
    """A model that was stopped long after its best round, in each way that there is."""
    x, y = table()
    rounds = {"early_stopping_rounds": 9}
    if "callback" in how:
        rounds = {"callbacks": [xgboost.callback.EarlyStopping(rounds=9, save_best="best kept" in how)]}
    model = xgboost.XGBRegressor(n_estimators=60, max_depth=6, n_jobs=1, learning_rate=0.9, **rounds)
    model.fit(x[:300], y[:300, 1], eval_set=[(x[300:], y[300:, 1])], verbose=False)
    if "reloaded" in how:
        model.save_model(tmp_path / "model.ubj")
        model = xgboost.XGBRegressor()
        model.load_model(tmp_path / "model.ubj")
    if "pickled" in how:
        model = pickle.loads(pickle.dumps(model))
    return model


@pytest.mark.parametrize(
    "how", ["fit", "callback", "callback, best kept", "reloaded", "callback, reloaded", "callback, pickled"]
)
def test_early_stopping_keeps_the_best_round(how, tmp_path):
    model = stopped(how, tmp_path)
    x, _ = table()
    assert close(fastens.Forest.from_xgboost(model).predict(x), model.predict(x))


def test_a_booster_predicts_with_all_rounds(tmp_path):
    """As ``Booster.predict`` does, which an estimator does not."""
    model = stopped("fit", tmp_path)
    x, _ = table()
    expected = model.get_booster().predict(xgboost.DMatrix(x))
    assert not close(expected, model.predict(x))
    assert close(fastens.Forest.from_xgboost(model.get_booster()).predict(x), expected)


def test_infinities_are_values_to_boosters_and_errors_to_scikit_learn():
    x, y = table()
    probe = np.array([[np.inf] * 4, [-np.inf] * 4, [1e300] * 4, [np.nan] * 4])
    for model, pack in (
        (xgboost.XGBRegressor(n_estimators=5, n_jobs=1).fit(x, y), fastens.Forest.from_xgboost),
        (lightgbm.LGBMRegressor(n_estimators=5, n_jobs=1, verbose=-1).fit(x, y[:, 0]), fastens.Forest.from_lightgbm),
    ):
        forest = pack(model)
        for backend in ("auto", "reference"):
            assert close(forest.predict(probe, backend=backend), model.predict(probe))
        assert close(
            forest.predict_tensor(torch.from_numpy(probe)).numpy().reshape(model.predict(probe).shape),
            model.predict(probe),
        )


def test_lightgbm_splits_between_values_and_missing_ones():
    """The threshold of such a split is infinite, and an infinite value is on its left."""
    x = np.array([[0.0], [1.0], [np.nan], [np.nan]] * 20)
    options = {"n_estimators": 3, "min_child_samples": 1, "verbose": -1, "n_jobs": 1}
    model = lightgbm.LGBMRegressor(**options).fit(x, np.isnan(x[:, 0]).astype(float))
    forest = fastens.Forest.from_lightgbm(model)
    assert np.isinf(forest.trees.threshold).any()
    probe = np.array([[np.inf], [1e301], [np.nan], [-np.inf]])
    assert np.array_equal(forest.predict(probe), model.predict(probe))


def test_lightgbm_takes_values_near_zero_for_zero():
    near = np.float32(1e-35)
    pool = [0.0, near, -near, 5e-324, -5e-324, np.nextafter(near, 1), np.nextafter(-near, -1), 1.0, -1.0]
    x = np.array(pool * 9, np.float64)[:, None]
    options = {"n_estimators": 9, "min_child_samples": 1, "verbose": -1, "n_jobs": 1, "max_bin": 255}
    model = lightgbm.LGBMRegressor(**options).fit(x, np.sign(x[:, 0]) + (np.abs(x[:, 0]) > 2e-35))
    assert np.array_equal(fastens.Forest.from_lightgbm(model).predict(x), model.predict(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"multi_strategy": "multi_output_tree"}, "one_output_per_tree"),
        ({"booster": "gblinear"}, "'gblinear' is not taken"),
        ({"objective": "reg:tweedie"}, "objective 'reg:tweedie' is not taken"),
        ({"missing": -1.0}, "only NaN"),
    ],
)
def test_what_is_not_taken_from_xgboost(options, message):
    x, y = table(missing=0)
    y = np.abs(y) if "multi_strategy" in options else np.abs(y[:, 0])
    model = xgboost.XGBRegressor(n_estimators=2, n_jobs=1, **options).fit(x, y)
    with pytest.raises(ValueError, match=message):
        fastens.Forest.from_xgboost(model)


def test_trees_trained_with_dropout_keep_their_weights():
    x, y = table(missing=0)
    options = {"booster": "dart", "rate_drop": 0.5, "one_drop": 1}
    model = xgboost.XGBRegressor(n_estimators=6, n_jobs=1, **options).fit(x, y[:, 0])
    assert close(fastens.Forest.from_xgboost(model).predict(x), model.predict(x))


def test_members_must_agree():
    x, y = table()
    models = [xgboost.XGBRegressor(n_estimators=2, n_jobs=1).fit(x[:, :f], y) for f in (4, 3)]
    with pytest.raises(ValueError, match=r"models\[1\] has 3 features"):
        fastens.Forest.from_xgboost(models)
    with pytest.raises(TypeError, match="got str"):
        fastens.Forest.from_xgboost(["model"])


@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_a_booster_of_lightgbm_is_one_member(missing):
    x, y = table(missing)
    x = x.astype(np.float64) + 1e-12  # thresholds lie between float32 values
    model = lightgbm.LGBMRegressor(n_estimators=15, verbose=-1, n_jobs=1).fit(x, y[:, 0])
    x[::7, 1] = np.nan  # where there was none in training, it counts as zero
    x[3, 0] = np.inf
    forest = fastens.Forest.from_lightgbm(model)
    for backend in ("auto", "reference"):
        actual, expected = forest.predict(x, backend=backend), model.predict(x)
        assert np.abs(actual - expected).max() <= 1e-12 * np.abs(expected).max()


def test_trees_of_lightgbm_in_forest_mode_are_members():
    x, y = table()
    options = {"boosting_type": "rf", "subsample": 0.5, "subsample_freq": 1, "verbose": -1, "n_jobs": 1}
    model = lightgbm.LGBMRegressor(n_estimators=9, **options).fit(x, y[:, 0])
    forest = fastens.Forest.from_lightgbm(model)
    assert forest.num_members == 9
    assert close(forest.predict(x), model.predict(x))


def test_categories_that_no_tree_splits_on_are_not_taken_from_lightgbm():
    x = pd.DataFrame({"a": np.arange(60.0), "b": pd.Categorical(["one"] * 60)})
    model = lightgbm.LGBMRegressor(n_estimators=2, verbose=-1).fit(x, np.arange(60.0))
    for each in (model, model.booster_, lightgbm.Booster(model_str=model.booster_.model_to_string())):
        with pytest.raises(ValueError, match="encode the categories as numbers"):
            fastens.Forest.from_lightgbm(each)


def test_what_is_not_taken_from_lightgbm():
    x, y = table(missing=0)
    category = np.random.default_rng(0).integers(0, 9, len(x))
    x[:, 0] = category
    target = y[:, 0] + 3 * (category % 2)
    options = {"n_estimators": 3, "verbose": -1, "n_jobs": 1}
    with pytest.raises(ValueError, match="categorical"):
        fastens.Forest.from_lightgbm(lightgbm.LGBMRegressor(**options).fit(x, target, categorical_feature=[0]))
    with pytest.raises(ValueError, match="linear trees"):
        fastens.Forest.from_lightgbm(lightgbm.LGBMRegressor(linear_tree=True, **options).fit(x, target))
    with pytest.raises(ValueError, match="zero as missing"):
        fastens.Forest.from_lightgbm(lightgbm.LGBMRegressor(zero_as_missing=True, **options).fit(x, target))
    with pytest.raises(ValueError, match="objective"):
        fastens.Forest.from_lightgbm(lightgbm.LGBMRegressor(objective="poisson", **options).fit(x, np.abs(target)))


@pytest.mark.parametrize("rule", ["mean", "median", "geometric"])
def test_members_are_combined_in_chunks_of_rows(rule, monkeypatch):
    x, y = table()
    models = [xgboost.XGBRegressor(n_estimators=3, max_depth=2, n_jobs=1, random_state=s).fit(x, y) for s in range(3)]
    forest = fastens.Forest.from_xgboost(models)
    whole = forest.predict(x, rule)
    monkeypatch.setattr("fastens.tabular.forest.CHUNK", 70)
    assert np.array_equal(forest.predict(x, rule), whole)


def test_models_of_different_outputs_are_refused():
    x, y = table()
    models = [xgboost.XGBRegressor(n_estimators=2, n_jobs=1).fit(x, target) for target in (y, y[:, 0])]
    with pytest.raises(ValueError, match="outputs"):
        fastens.Forest.from_xgboost(models)


@pytest.mark.parametrize("best", ["12", "50", "-1", None])
def test_a_booster_without_the_rounds_that_it_predicts_with_is_refused(best):
    x, y = table()
    rounds = 0 if best is None else 12
    booster = xgboost.train({"max_depth": 2}, xgboost.DMatrix(x, y[:, 0]), rounds)
    model = xgboost.XGBRegressor()
    model._Booster = booster
    if best is not None:
        booster.set_attr(best_iteration=best)
        assert close(fastens.Forest.from_xgboost(booster).predict(x), booster.inplace_predict(x))
    with pytest.raises(ValueError, match=rf"rounds of the {rounds} that its booster has; train it"):
        fastens.Forest.from_xgboost(booster if best is None else model)

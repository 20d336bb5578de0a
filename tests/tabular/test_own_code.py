"""Models that predict by code of their own are not packed."""

import types

import numpy as np
import pytest
from sklearn.ensemble import ExtraTreesRegressor, RandomForestRegressor
from sklearn.tree import DecisionTreeRegressor

import fastens

xgboost = pytest.importorskip("xgboost")
lightgbm = pytest.importorskip("lightgbm")

X = np.random.default_rng(0).normal(size=(60, 3))
Y = X[:, 0] - X[:, 1] ** 2
OPTIONS = {"n_estimators": 3, "n_jobs": 1}
KINDS = [
    (RandomForestRegressor, OPTIONS, fastens.Forest.from_sklearn),
    (ExtraTreesRegressor, OPTIONS, fastens.Forest.from_sklearn),
    (xgboost.XGBRegressor, OPTIONS, fastens.Forest.from_xgboost),
    (xgboost.XGBRFRegressor, OPTIONS, fastens.Forest.from_xgboost),
    (lightgbm.LGBMRegressor, OPTIONS | {"verbose": -1}, fastens.Forest.from_lightgbm),
]


def halved(self, X, *args, **kwargs):
    return super(type(self), self).predict(X, *args, **kwargs) / 2


@pytest.mark.parametrize(("kind", "options", "pack"), KINDS, ids=lambda kind: getattr(kind, "__name__", ""))
def test_a_subclass_with_its_own_predict_is_refused(kind, options, pack):
    own = type("Halved", (kind,), {"predict": halved})(**options).fit(X, Y)
    with pytest.raises(TypeError, match="its own 'predict'"):
        pack(own)
    plain = kind(**options).fit(X, Y)
    assert pack(plain).num_features == 3
    plain.predict = types.MethodType(lambda self, X: np.zeros(len(X)), plain)
    with pytest.raises(TypeError, match="its own 'predict'"):
        pack(plain)


@pytest.mark.parametrize(("kind", "options", "pack"), KINDS, ids=lambda kind: getattr(kind, "__name__", ""))
def test_a_subclass_that_predicts_as_its_library_is_taken(kind, options, pack):
    own = type("Named", (kind,), {"name": "mine"})(**options).fit(X, Y)
    assert np.allclose(pack(own).predict(X), own.predict(X), rtol=1e-5)


def test_parts_that_predict_otherwise_are_refused():
    class Tree(DecisionTreeRegressor):
        def predict(self, X, check_input=True):
            return super().predict(X, check_input) + 1

    forest = RandomForestRegressor(3).fit(X, Y)
    forest.estimators_[1] = Tree().fit(X, Y)
    with pytest.raises(TypeError, match="Tree has its own 'predict'"):
        fastens.Forest.from_sklearn(forest)
    forest.estimators_[1] = lightgbm.LGBMRegressor(n_estimators=1, verbose=-1).fit(X, Y)
    with pytest.raises(TypeError, match="expected trees"):
        fastens.Forest.from_sklearn(forest)

    class Model(xgboost.XGBRegressor):
        def get_booster(self):
            return super().get_booster()[:1]

    with pytest.raises(TypeError, match="'get_booster'"):
        fastens.Forest.from_xgboost(Model(**OPTIONS).fit(X, Y))


def test_a_classifier_that_learns_a_regression_is_refused():
    with pytest.raises((TypeError, ValueError), match=r"'predict'|objective"):
        fastens.Forest.from_xgboost(xgboost.XGBClassifier(objective="reg:squarederror", **OPTIONS).fit(X, Y > 0))

"""A reader that misunderstands a model is found out when the model is packed."""

import numpy as np
import pytest
from sklearn.ensemble import RandomForestRegressor

import fastens
from fastens.reference.forest import Trees
from fastens.tabular.probe import hold_against

xgboost = pytest.importorskip("xgboost")
lightgbm = pytest.importorskip("lightgbm")

X = np.random.default_rng(0).normal(size=(150, 3)).astype(np.float32)
Y = X[:, 0] - X[:, 1] ** 2
OPTIONS = {"n_estimators": 20, "n_jobs": 1}
PACK = {
    "sklearn": lambda: fastens.Forest.from_sklearn(RandomForestRegressor(20, random_state=0).fit(X, Y)),
    "xgboost": lambda: fastens.Forest.from_xgboost(
        [xgboost.XGBRegressor(**OPTIONS, random_state=s, subsample=0.9).fit(X, Y) for s in range(2)]
    ),
    "lightgbm": lambda: fastens.Forest.from_lightgbm(lightgbm.LGBMRegressor(verbose=-1, **OPTIONS).fit(X, Y)),
}
MISTAKES = {
    "a threshold on the other side": lambda fields: (
        fields | {"threshold": np.nextafter(fields["threshold"], -np.inf, dtype=np.float32)}
    ),
    "missing values on the other side": lambda fields: (
        fields | {"default_left": 1 - np.asarray(fields["default_left"])}
    ),
    "leaves of another size": lambda fields: fields | {"values": fields["values"] * (1 + 1e-4)},
    "children in the other order": lambda fields: fields | {"left": fields["right"], "right": fields["left"]},
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("library", PACK)
def test_what_is_read_wrongly_is_refused(library, mistake, monkeypatch):
    PACK[library]()
    monkeypatch.setattr(f"fastens.tabular.{library}.Trees", lambda **fields: Trees(**MISTAKES[mistake](fields)))
    with pytest.raises(ValueError, match="predicts otherwise than the trees"):
        PACK[library]()


def test_every_member_is_held_against_its_own_model():
    forest = PACK["xgboost"]()
    right = [lambda rows, k=k: forest.predict_members(rows)[k] for k in range(2)]
    hold_against(forest, right)
    with pytest.raises(ValueError, match="model 0 predicts"):
        hold_against(forest, right[::-1])


def test_the_model_is_asked_on_one_thread_and_stays_as_it_is():
    model = RandomForestRegressor(3, n_jobs=2, verbose=1).fit(X, Y)
    fastens.Forest.from_sklearn(model)
    assert model.n_jobs == 2
    assert model.verbose == 1

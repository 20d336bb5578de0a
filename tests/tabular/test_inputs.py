"""What is not an array of floats is read as the source library reads it, or refused."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from sklearn.ensemble import RandomForestRegressor

import fastens
from fastens.tabular.inputs import MOST_FEATURES, Inputs
from tests.fresh import python
from tests.tabular.forests import fitted, rows

xgboost = pytest.importorskip("xgboost")
lightgbm = pytest.importorskip("lightgbm")

pytestmark = pytest.mark.filterwarnings("ignore:X does not have valid feature names")
RNG = np.random.default_rng(0)
TABLE = pd.DataFrame(RNG.normal(size=(200, 3)), columns=["width", "length", "mass"])
TARGET = TABLE["width"] - 2 * TABLE["length"] * TABLE["mass"]


def models():
    options = {"n_estimators": 5, "n_jobs": 1}
    return {
        "sklearn": RandomForestRegressor(5, random_state=0).fit(TABLE, TARGET),
        "xgboost": xgboost.XGBRegressor(**options).fit(TABLE, TARGET),
        "lightgbm": lightgbm.LGBMRegressor(verbose=-1, **options).fit(TABLE, TARGET),
    }


MODELS = models()
PACK = {name: getattr(fastens.Forest, f"from_{name}") for name in MODELS}


@pytest.mark.parametrize("library", ["sklearn", "xgboost"])
@pytest.mark.parametrize(
    "other",
    [
        lambda x: x[["mass", "width", "length"]],
        lambda x: x.rename(columns={"mass": "weight"}),
        lambda x: x.assign(age=1.0),
        lambda x: x[["width", "length"]],
    ],
    ids=["another order", "another name", "one more", "one less"],
)
def test_columns_of_other_names_are_refused_as_by_the_library(library, other):
    forest = PACK[library](MODELS[library])
    with pytest.raises(ValueError, match=r"."):
        MODELS[library].predict(other(TABLE))
    for predict in (forest.predict, forest.predict_members, lambda x: forest.predict_drawn(x, 0, 0)):
        with pytest.raises(ValueError, match=r"feature names|was trained on"):
            predict(other(TABLE))


@pytest.mark.parametrize("library", MODELS)
def test_missing_values_of_nullable_columns_are_the_library_s(library):
    x = TABLE.astype({"width": "Float64", "length": "Float32"}).assign(mass=pd.array([1] * 200, dtype="Int64"))
    x.iloc[::3, 0] = x.iloc[::4, 1] = x.iloc[::5, 2] = pd.NA
    actual, expected = PACK[library](MODELS[library]).predict(x), MODELS[library].predict(x)
    assert np.allclose(actual, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("library", MODELS)
def test_names_outlive_the_file(library, tmp_path):
    PACK[library](MODELS[library]).save(tmp_path / "forest")
    forest = fastens.Forest.load(tmp_path / "forest")
    assert np.allclose(forest.predict(TABLE), MODELS[library].predict(TABLE), rtol=1e-6, atol=0)
    if library != "lightgbm":  # which reads tables by position itself
        with pytest.raises(ValueError, match=r"feature names|was trained on"):
            forest.predict(TABLE[["mass", "width", "length"]])


def test_an_absent_entry_is_what_the_library_takes_it_for():
    held = scipy.sparse.csr_matrix(np.where(TABLE.abs() > 1, TABLE, 0))
    expected = {name: model.predict(held) for name, model in MODELS.items()}
    for name, model in MODELS.items():
        assert np.allclose(PACK[name](model).predict(held), expected[name], rtol=1e-6, atol=0)
    assert not np.allclose(expected["xgboost"], MODELS["xgboost"].predict(held.toarray()))  # there it is missing


@pytest.mark.parametrize("library", MODELS)
def test_an_entry_that_is_stored_twice_is_refused(library):
    twice = scipy.sparse.csr_matrix((np.ones(2, np.float32), np.zeros(2, int), np.array([0, 2])), shape=(1, 3))
    with pytest.raises(ValueError, match="sum_duplicates"):
        PACK[library](MODELS[library]).predict(twice)


def test_a_forest_without_a_source_reads_arrays_of_numbers():
    forest = fastens.Forest(fastens.Forest.from_sklearn(fitted()).trees)
    assert np.array_equal(forest.predict(rows().tolist()), forest.predict(rows()))
    with pytest.raises(TypeError, match="to_numpy"):
        forest.predict(pd.DataFrame(rows()))
    with pytest.raises(TypeError, match="toarray"):
        forest.predict(scipy.sparse.csr_matrix(rows()))
    with pytest.raises(ValueError, match="complex128"):
        forest.predict(rows().astype(complex))


def test_arrays_are_read_without_the_library(tmp_path):
    fastens.Forest.from_sklearn(MODELS["sklearn"]).save(tmp_path / "forest")
    code = """
import sys
for name in ("sklearn", "pandas", "scipy"):
    sys.modules[name] = None
import fastens, numpy
forest = fastens.Forest.load(sys.argv[1])
forest.predict(numpy.zeros((2, 3)))
try:
    forest.predict([[1, 2, 3]])
except ImportError as error:
    print(error)
"""
    result = python(code, tmp_path / "forest")
    assert "install it, or pass a float32 array" in result.stdout


@pytest.mark.parametrize(
    "fields",
    [
        {"num_features": 0},
        {"num_features": MOST_FEATURES + 1},
        {"num_features": 2.0},
        {"num_features": True},
        {"library": "catboost"},
        {"estimator": "a b"},
        {"names": ("one",)},
        {"names": (1, 2)},
        {"allow_nan": 1},
    ],
    ids=str,
)
def test_fields_out_of_range_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Inputs(**({"num_features": 2} | fields))

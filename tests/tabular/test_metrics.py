import numpy as np
import pytest
from sklearn.datasets import load_diabetes, load_iris

from fastens.tabular.metrics import coverage, downstream, real_versus_generated, wasserstein


def test_wasserstein_of_known_distances():
    real = np.array([[0.0, 0.0], [1.0, 10.0]])
    assert wasserstein(real, real[::-1]) == pytest.approx(0)
    assert wasserstein(real, real + np.array([0.5, 0])) == pytest.approx(0.5)
    assert wasserstein(real, [[0.0, 5.0]]) == pytest.approx((0.5 + 1.5) / 2)
    # In one dimension it is the mean distance of the sorted values.
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 1)), rng.normal(1, 2, size=(40, 1))
    expected = np.abs(np.sort(a, 0) - np.sort(b, 0)).mean() / np.ptp(a)
    assert wasserstein(a, b) == pytest.approx(expected)


def test_coverage():
    rng = np.random.default_rng(0)
    real = np.concatenate([rng.normal(size=(50, 2)), 100 + rng.normal(size=(50, 2))])
    assert coverage(real, real) == 1
    assert coverage(real, real[:50]) == 0.5
    assert coverage(real, real + 1000) == 0
    with pytest.raises(ValueError, match="`neighbours`"):
        coverage(real, real, neighbours=100)


def test_downstream():
    iris, diabetes = load_iris(), load_diabetes()
    odd = np.arange(150) % 2 == 1
    good = downstream(iris.data[odd], iris.target[odd], iris.data[~odd], iris.target[~odd])
    assert good > 0.9
    shuffled = np.random.default_rng(0).permutation(iris.target[odd])
    assert downstream(iris.data[odd], shuffled, iris.data[~odd], iris.target[~odd]) < 0.6
    assert (
        0.3 < downstream(diabetes.data[:300], diabetes.target[:300], diabetes.data[300:], diabetes.target[300:]) < 0.6
    )


def test_a_classifier_tells_noise_from_data():
    data = load_iris().data
    rng = np.random.default_rng(0)
    noise = rng.uniform(data.min(0), data.max(0), size=data.shape)
    assert real_versus_generated(data, noise) > 0.95
    order = rng.permutation(150)
    assert abs(real_versus_generated(data[order[:75]], data[order[75:]]) - 0.5) < 0.2


def test_tables_that_cannot_be_compared():
    with pytest.raises(ValueError, match="the same columns"):
        wasserstein(np.zeros((3, 2)), np.zeros((3, 1)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("measure", [wasserstein, coverage, real_versus_generated])
@pytest.mark.parametrize("which", [0, 1])
def test_what_has_no_distance_is_named(measure, value, which):
    tables = [np.random.default_rng(i).normal(size=(12, 2)) for i in range(2)]
    tables[which][7, 1] = value
    name = ("real", "generated")[which]
    with pytest.raises(ValueError, match=f"the {name} table has {value} in row 7, column 1"):
        measure(*tables)

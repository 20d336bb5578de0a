"""The arithmetic of the forest's CUDA kernels, compiled for the host by g++, against Forest; launches need a GPU."""

import ctypes

import numpy as np
import pytest
import torch

import fastens
from fastens import rules
from fastens.reference.forest import Trees
from tests.tabular.forests import fitted, rows

CASES = {  # rule -> its number in csrc/cuda/job.h, average, absolute, whole batch
    rules.Mean(): (1, True, False, False),
    rules.Sum(): (1, True, False, False),
    rules.Median(): (2, True, False, False),
    rules.Median("lower"): (2, False, False, False),
    rules.Dominant(): (3, True, False, False),
    rules.MaxAbs(): (3, True, True, False),
    rules.Geometric(): (4, True, False, False),
    rules.Geometric("batch", 1e-9): (4, True, False, True),
    rules.Alternating(): (5, True, False, False),
}
EXACT = (rules.Median, rules.Dominant, rules.MaxAbs, rules.Alternating)


def on_host(library, forest, x, rule, weights=None):
    trees = forest._on(torch.device("cpu"))[0]
    number, average, absolute, whole_batch = CASES[rule]
    out = np.full((len(x), forest.num_outputs), 7.0)
    divisor = forest.num_members if rule == rules.Mean() and weights is None else 1
    pointers = (ctypes.c_void_p * 10)(*(tensor.data_ptr() for tensor in trees))
    library("forest").forest_on_host(
        number, x.ctypes.data_as(ctypes.c_void_p), x.dtype == np.float64, forest._double_inputs,
        ctypes.c_int64(len(x)), ctypes.c_int64(x.shape[1]), pointers, ctypes.c_int64(forest.trees.num_trees),
        ctypes.c_int64(forest.num_members), ctypes.c_int64(forest.num_outputs),
        None if weights is None else weights.ctypes.data_as(ctypes.c_void_p), ctypes.c_double(divisor),
        ctypes.c_double(getattr(rule, "eps", 0)), average, absolute, whole_batch, ctypes.c_int64(33),
        out.ctypes.data_as(ctypes.c_void_p),
    )  # fmt: skip
    return out


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rule", CASES, ids=repr)
@pytest.mark.parametrize("options", [{}, {"outputs": 1, "trees": 9}, {"name": "iris", "depth": None}], ids=str)
def test_equals_forest(library, options, rule, dtype):
    forest = fastens.Forest.from_sklearn(fitted(**options))
    x = rows(options.get("name", "diabetes"), n=70, dtype=dtype)
    expected = forest._predict(x, rule, 7, 0, "reference").reshape(len(x), -1)
    actual = on_host(library, forest, x, rule)
    if isinstance(rule, EXACT):
        assert np.array_equal(actual, expected)
    else:
        assert np.abs(actual - expected).max() <= 1e-12 * np.abs(expected).max()


def test_weights_boosters_and_missing_values(library):
    source = {"offsets": [0, 3, 4], "feature": [0, -1, -1, -1], "threshold": [0.5, 0, 0, 0], "left": [1, 0, 0, 0]}
    source |= {"right": [2, 0, 0, 0], "default_left": [0] * 4, "values": [[1.0], [2.0], [4.0]], "num_features": 1}
    x = np.array([[0.0], [1.0], [np.nan]])
    two = fastens.Forest(Trees(**source))
    weights = np.array([0.25, 0.75])
    assert on_host(library, two, x, rules.Mean(), weights).tolist() == [[3.25], [3.5], [3.5]]
    one = fastens.Forest(Trees(**source), ranges=[0, 2], base=[[0.5]])
    assert on_host(library, one, x, rules.Median()).tolist() == [[5.5], [6.5], [6.5]]


def test_nan_of_a_leaf_reaches_the_result(library):
    source = {"offsets": [0, 1, 2], "feature": [-1, -1], "threshold": [0, 0], "left": [0, 0], "right": [0, 0]}
    forest = fastens.Forest(Trees(**source, default_left=[0, 0], values=[[1.0], [np.nan]], num_features=1))
    for rule in CASES:
        if not rule.random:
            assert np.isnan(on_host(library, forest, np.zeros((1, 1)), rule)).all(), rule

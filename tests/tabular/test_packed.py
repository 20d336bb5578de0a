"""The ctypes calls of the native forest: what they refuse, and that they keep nothing that they are given."""

import gc
import sys
import weakref

import numpy as np
import pytest

import fastens
from fastens import _native
from fastens.tabular import packed
from fastens.tabular.packed import PackedForest
from tests.tabular.forests import fitted, rows

if _native.functions() is None:
    pytest.skip(_native.status(), allow_module_level=True)


def made():
    return PackedForest(_native.functions(), fastens.Forest.from_sklearn(fitted()).trees, False, True, False)


def ask(forest, x, rule="mean", values=(), instruction_set="auto"):
    return forest.predict(x, rule, "", values, 0, 0, instruction_set)


@pytest.mark.parametrize(
    ("x", "error"),
    [
        (np.zeros((2, 3)), "rows of 10 features"),
        (np.zeros(10), "rows of 10 features"),
        (np.zeros((2, 10, 1)), "rows of 10 features"),
        (np.zeros((2, 10), np.int64), "float32 or float64"),
        (np.zeros((2, 10), ">f8"), "float32 or float64"),
        (np.zeros((2, 10), np.longdouble), "float32 or float64"),
        (np.full((2, 10), np.inf), r"X\[0, 0\] is infinite"),
        (np.ndarray((2, 10), np.float64, bytearray(400), 0, (84, 8)), "not aligned|float32 or float64"),
    ],
    ids=str,
)
def test_arrays_that_are_no_rows_are_refused(x, error):
    with pytest.raises(ValueError, match=error):
        ask(made(), x)
    with pytest.raises(ValueError, match=error):
        made().members(x, [0, 5, 10], "auto")


def test_what_is_no_array_is_an_error_of_python():
    with pytest.raises(TypeError, match="bytes-like"):
        ask(made(), [[0.0] * 10])


@pytest.mark.parametrize("ranges", [[], [0], [0, 11], [0, 5, 3], [-1, 5]])
def test_ranges_that_are_no_members_are_refused(ranges):
    with pytest.raises(ValueError, match="members"):
        made().members(rows(), ranges, "auto")


def test_rules_and_instruction_sets_that_there_are_not_are_refused():
    for call in ({"rule": "mode"}, {"instruction_set": "avx1024"}, {"values": (0.5,)}):
        with pytest.raises(ValueError, match="forest:"):
            ask(made(), rows(), **call)


def test_arrays_that_are_no_trees_are_refused():
    trees = fastens.Forest.from_sklearn(fitted()).trees
    for name, value in (("left", trees.left[:-1]), ("threshold", trees.threshold.astype(np.float32))):
        broken = object.__new__(type(trees))
        for field in vars(trees):
            object.__setattr__(broken, field, value if field == name else getattr(trees, field))
        with pytest.raises(ValueError, match=f"`{name}` has"):
            PackedForest(_native.functions(), broken, False, True, False)


def test_a_forest_is_freed_and_holds_no_array():
    forest, x = made(), rows()
    before = sys.getrefcount(x)
    for _ in range(9):
        out = ask(forest, x)
    assert sys.getrefcount(x) == before
    assert sys.getrefcount(out) == 2
    gone = weakref.ref(forest)
    del forest
    gc.collect()
    assert gone() is None


def test_few_rules_are_kept():
    forest, x = made(), rows(n=3)
    for k in range(2 * packed.MOST_CALLS):
        weights = tuple(np.full(10, 0.1 + k))
        assert np.allclose(ask(forest, x, values=weights), (0.1 + k) * 10 * ask(forest, x))
    assert len(forest._calls) <= packed.MOST_CALLS

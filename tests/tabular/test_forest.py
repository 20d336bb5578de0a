import pickle
import warnings

import numpy as np
import pytest
import torch
from sklearn.ensemble import ExtraTreesRegressor, RandomForestClassifier, RandomForestRegressor
from sklearn.exceptions import NotFittedError

import fastens
from fastens import _native, rules
from fastens.ops._scores import seed_from
from fastens.reference.aggregate import aggregate
from fastens.reference.forest import Trees, combine
from fastens.tabular.forest import _warn_of_the_reference
from fastens.tabular.inputs import Inputs
from fastens.tabular.sklearn import float32_at_most
from tests.fresh import python
from tests.tabular.forests import DATA, data, fitted, rows, stacked

SETS = ["avx512", "avx2", "baseline"]
RULES = ["mean", "sum", "geometric", rules.Geometric("batch", 1e-9), rules.Geometric("sample", 1e-3)]
RULES += ["median", rules.Median("lower"), "dominant", "max_abs", "alternating"]


def needs_module():
    if _native.functions() is None:
        pytest.skip(_native.status())


def force(forest, instruction_set, x, rule="mean"):
    """Run one instruction set's kernels."""
    needs_module()
    value = rules.get(rule)
    try:
        return forest._native("native").predict(x, value.name, value.option, value.values, 7, 0, instruction_set)
    except ValueError as error:
        if "this processor has no" in str(error) or "no target of this build" in str(error):
            pytest.skip(str(error))
        raise


def close(actual, expected):
    return np.abs(actual - expected).max() <= 1e-12 * np.abs(expected).max()


@pytest.mark.parametrize("depth", [7, None])
@pytest.mark.parametrize("name", DATA)
def test_mean_equals_sklearn(name, depth):
    forest = fitted(name, depth=depth)
    x = np.concatenate([rows(name), data(name)[:50]])
    assert close(fastens.Forest.from_sklearn(forest).predict(x), forest.predict(x))


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("name", DATA)
def test_rules_equal_the_loop_over_trees_on_every_data_set(name, rule):
    source = fitted(name)
    x = np.concatenate([rows(name), data(name)[:50]])
    actual = fastens.Forest.from_sklearn(source).predict(x, rule, generator=torch.Generator().manual_seed(3))
    seed = seed_from(torch.Generator().manual_seed(3))
    assert np.array_equal(actual, combine(stacked(source, x), rules.get(rule), seed))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_loop_over_trees_is_the_definition_of_the_rule(rule):
    """The reference in an order of its own, beside the formula as the paper has it."""
    members = stacked(fitted(), rows())
    value = rules.get(rule)
    assert close(combine(members, value, 5), aggregate(torch.from_numpy(members), value, seed=5).numpy())


@pytest.mark.covering(2)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize(
    "options",
    [
        {"outputs": 6},
        {"outputs": 1},
        {"outputs": 2, "depth": 3},
        {"outputs": 4, "depth": 8},
        {"outputs": 32, "depth": 2, "trees": 5},
        {"name": "iris", "depth": None},
        {"name": "breast cancer", "outputs": 5, "depth": 1},
        {"name": "iris", "cls": ExtraTreesRegressor, "depth": None, "max_leaf_nodes": 40},
        {"trees": 1},
    ],
    ids=str,
)
def test_rules_equal_the_loop_over_trees(options, instruction_set, rule):
    source = fitted(**options)
    forest = fastens.Forest.from_sklearn(source)
    x = rows(options.get("name", "diabetes"))
    expected = combine(stacked(source, x), rules.get(rule), 7)
    assert np.array_equal(force(forest, instruction_set, x, rule), expected)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("features", [1, 2, 3, 5, 7, 8, 9, 12, 14, 17, 33, 50, 64, 65])
def test_numbers_of_features(features, instruction_set):
    x = np.random.default_rng(features).normal(size=(400, features))
    source = RandomForestRegressor(4, max_depth=7, random_state=0, max_features=1).fit(x, x[:, 0] ** 2 + x[:, -1])
    forest = fastens.Forest.from_sklearn(source)
    expected = combine(stacked(source, x), rules.Dominant())
    assert np.array_equal(force(forest, instruction_set, x, "dominant"), expected)
    assert np.array_equal(forest.predict_members(x)[:, :, 0], [tree.predict(x) for tree in source.estimators_])


@pytest.mark.parametrize("target", ["avx512_bf16", "avx2", "baseline", "avx1024"])
def test_a_target_of_the_environment_is_taken(target, tmp_path):
    needs_module()
    fastens.Forest.from_sklearn(fitted()).save(tmp_path / "forest.bin")
    code = "import fastens, sys; f = fastens.Forest.load(sys.argv[1]); print(f._native('native').describe())"
    result = python(code, tmp_path / "forest.bin", FASTENS_CPU_TARGET=target)
    if target == "avx1024":
        assert "FASTENS_CPU_TARGET: 'avx1024' is no target of this build, which has" in result.stderr
    elif result.returncode:
        assert f"FASTENS_CPU_TARGET: this processor has no {target}, for want of" in result.stderr
    else:
        assert f"'instruction_set': '{target.removesuffix('_bf16')}'" in result.stdout


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("trees", [1, 2, 99, 300])
def test_many_trees(trees, instruction_set):
    source = fitted("iris", outputs=3, trees=trees, depth=4)
    x = rows("iris", 70)
    members = stacked(source, x)
    forest = fastens.Forest.from_sklearn(source)
    for rule in ("mean", "median", "dominant", "geometric"):
        assert np.array_equal(force(forest, instruction_set, x, rule), combine(members, rules.get(rule)))


def test_thresholds_are_compared_as_float32():
    """Values on a threshold, next to it, and float64 values that round across it."""
    source = fitted("iris", depth=5)
    cuts = np.concatenate([tree.tree_.threshold for tree in source.estimators_])
    near = [cuts, cuts.astype(np.float32), np.nextafter(cuts, 9), np.nextafter(cuts.astype(np.float32), np.float32(-9))]
    values = np.concatenate([np.asarray(x, np.float64) for x in near])
    x = np.resize(np.random.default_rng(0).permutation(values), (len(values) // 4 * 4, 4))
    forest = fastens.Forest.from_sklearn(source)
    for backend in ("auto", "reference"):
        assert np.array_equal(forest.predict_members(x, backend=backend), stacked(source, x))


def test_float32_at_most():
    value = np.array([0.1, -0.1, 0.5, np.float64(np.float32(0.1))])
    assert (float32_at_most(value) <= value).all()
    assert (np.nextafter(float32_at_most(value).astype(np.float32), np.float32(9)) > value).all()


@pytest.mark.parametrize("cls", [RandomForestRegressor, ExtraTreesRegressor])
def test_missing_values_go_where_sklearn_sends_them(cls):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 4))
    y = np.stack([x[:, 0] + 3 * (rng.random(500) < 0.5), x[:, 1]], 1)
    x[rng.random(x.shape) < 0.2] = np.nan
    source = cls(8, max_depth=6, random_state=0).fit(x, y)
    forest = fastens.Forest.from_sklearn(source)
    for backend in ("auto", "reference"):
        assert np.array_equal(forest.predict_members(x, backend=backend), stacked(source, x))


def test_missing_values_without_support_are_refused():
    trees = fastens.Forest.from_sklearn(fitted("iris")).trees
    x = rows("iris", 40)
    x[33, 2] = np.nan
    for backend in ("auto", "reference"):
        with pytest.raises(ValueError, match=r"X\[33, 2\] is NaN"):
            fastens.Forest(trees, inputs=Inputs(4, allow_nan=False)).predict(x, backend=backend)


@pytest.mark.parametrize("value", [np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_infinities_are_refused(value, backend):
    x = rows("iris", 40)
    x[39, 0] = value
    with pytest.raises(ValueError, match=r"X\[39, 0\] is infinite"):
        fastens.Forest.from_sklearn(fitted("iris")).predict(x, backend=backend)


@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 255, 257, 1030])
def test_numbers_of_rows(n):
    source = fitted()
    x = rows(n=n)
    forest = fastens.Forest.from_sklearn(source)
    whole = forest.predict(rows(n=1030), "median")
    assert np.array_equal(
        forest.predict(x, "median"), whole[:0] if n == 0 else forest.predict(x, "median", backend="reference")
    )
    assert forest.predict(x, "geometric").shape == (n, 3)
    assert forest.predict_members(x).shape == (10, n, 3)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 33])
@pytest.mark.parametrize("missing", [False, True])
def test_few_rows_of_deep_trees(n, missing, instruction_set):
    """Trees are followed side by side instead of rows."""
    source = fitted(depth=None, trees=21)
    forest = fastens.Forest(fastens.Forest.from_sklearn(source).trees)  # NaN goes where the node says
    x = rows(n=n)
    if missing:
        x[::2, 3] = np.nan
    expected = forest.predict(x, "dominant", backend="reference")
    assert np.array_equal(force(forest, instruction_set, x, "dominant"), expected)


def test_one_output_is_one_dimensional():
    source = fitted(outputs=1)
    forest = fastens.Forest.from_sklearn(source)
    assert forest.predict(rows()).shape == source.predict(rows()).shape == (300,)
    assert forest.predict_members(rows()).shape == (10, 300, 1)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: np.asfortranarray(x),
        lambda x: np.repeat(x, 2, 0)[::2],
        lambda x: x[::-1][::-1],
        lambda x: np.concatenate([x, x], 1)[:, : x.shape[1]],
        lambda x: x.astype(">f8"),
        lambda x: x.tolist(),
        lambda x: np.frombuffer(b"0" + x.tobytes(), np.uint8)[1:].view(np.float64).reshape(x.shape),
    ],
)
def test_any_strides_and_types(view):
    forest = fastens.Forest.from_sklearn(fitted())
    assert np.array_equal(forest.predict(view(rows())), forest.predict(rows()))


def test_integers_are_taken_as_sklearn_takes_them():
    source = fitted("iris")
    x = np.arange(80).reshape(20, 4) % 5 - 2
    assert close(fastens.Forest.from_sklearn(source).predict(x), source.predict(x))


def test_rows_are_not_modified_and_results_are_fresh():
    forest = fastens.Forest.from_sklearn(fitted())
    x = rows()
    copy, first = x.copy(), forest.predict(x)
    first[:] = 0
    assert np.array_equal(x, copy)
    assert forest.predict(x).any()


def test_weights():
    source = fitted()
    weights = np.arange(1, 11) / 55
    rule = rules.Mean(tuple(weights))
    expected = combine(stacked(source, rows()), rule)
    assert close(expected, np.einsum("k,knp->np", weights, stacked(source, rows())))
    for instruction_set in SETS:
        assert np.array_equal(force(fastens.Forest.from_sklearn(source), instruction_set, rows(), rule), expected)
    with pytest.raises(ValueError, match="one weight per member, 10"):
        fastens.Forest.from_sklearn(source).predict(rows(), rules.Mean((1.0,)))


def test_alternating_is_seeded():
    forest = fastens.Forest.from_sklearn(fitted())
    draw = [forest.predict(rows(), "alternating", generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert np.array_equal(draw[0], draw[1])
    assert not np.array_equal(draw[0], draw[2])


@pytest.mark.parametrize("outputs", [1, 3])
def test_file_and_pickle(tmp_path, outputs):
    forest = fastens.Forest.from_sklearn(fitted(outputs=outputs))
    forest.save(tmp_path / "forest.bin")
    expected = forest.predict(rows(), "median")
    for copy in (fastens.Forest.load(tmp_path / "forest.bin"), pickle.loads(pickle.dumps(forest))):
        assert np.array_equal(copy.predict(rows(), "median"), expected)


def test_arrays_that_are_no_trees_are_refused():
    good = {"offsets": [0, 3], "feature": [0, -1, -1], "threshold": [0.5, 0, 0], "left": [1, 0, 0], "right": [2, 0, 0]}
    good |= {"default_left": [0, 0, 0], "values": [[1.0], [2.0]], "num_features": 1}
    assert fastens.Forest(Trees(**good)).predict([[0.0], [1.0]]).tolist() == [[1.0], [2.0]]
    for name, value in (
        ("offsets", [0, 2]),
        ("feature", [5, -1, -1]),
        ("threshold", [np.nan, 0, 0]),
        ("right", [3, 0, 0]),
        ("right", [1, 0, 0]),
        ("values", [[1.0]]),
    ):
        with pytest.raises(ValueError, match=r"expected|span|has"):
            Trees(**(good | {name: value}))


def test_leaves_that_are_not_finite_reach_the_result():
    source = {"offsets": [0, 1, 2], "feature": [-1, -1], "threshold": [0, 0], "left": [0, 0], "right": [0, 0]}
    trees = Trees(**source, default_left=[0, 0], values=[[np.nan], [1.0]], num_features=1)
    for rule in ("mean", "median", "dominant", "max_abs", "geometric", "sum"):
        assert np.isnan(fastens.Forest(trees).predict([[0.0]], rule)).all()


def test_ties_of_dominant_go_to_the_first_tree():
    source = {"offsets": [0, 1, 2, 3], "feature": [-1] * 3, "threshold": [0] * 3, "left": [0] * 3, "right": [0] * 3}
    for values in ([-2.0, 2.0, 1.0], [2.0, -2.0, 1.0], [1.0, -2.0, 2.0]):
        trees = Trees(**source, default_left=[0] * 3, values=np.array(values)[:, None].repeat(8, 1), num_features=1)
        expected = next(v for v in values if abs(v) == 2)
        for instruction_set in SETS:
            out = force(fastens.Forest(trees), instruction_set, np.zeros((1, 1)), "dominant")
            assert (out == expected).all(), (values, instruction_set)


def test_errors_say_what_to_do():
    with pytest.raises(NotFittedError, match="call `fit` first"):
        fastens.Forest.from_sklearn(RandomForestRegressor())
    with pytest.raises(TypeError, match="got RandomForestClassifier"):
        fastens.Forest.from_sklearn(RandomForestClassifier())
    forest = fastens.Forest.from_sklearn(fitted())
    with pytest.raises(ValueError, match=r"`X` is \[300, 4\], expected \[n, 10\]"):
        forest.predict(rows("iris"))
    with pytest.raises(ValueError, match="trajectory"):
        forest.predict(rows(), "mixture")
    with pytest.raises(ValueError, match="unknown rule"):
        forest.predict(rows(), "mode")
    with pytest.raises(ValueError, match="`backend`"):
        forest.predict(rows(), backend="cuda")


def test_a_missing_library_is_loud_and_an_error_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(_native, "functions", lambda: None)
    monkeypatch.setattr(_native, "status", lambda: "no compiler")
    _warn_of_the_reference.cache_clear()
    with pytest.warns(UserWarning, match="tree by tree.*no compiler"):
        forest = fastens.Forest.from_sklearn(fitted())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert close(forest.predict(rows()), fitted().predict(rows()))
        assert close(forest.predict(rows(), backend="reference"), fitted().predict(rows()))
    with pytest.raises(RuntimeError, match="no compiler"):
        forest.predict(rows(), backend="native")


def test_wide_codes():
    """More distinct thresholds than 16 bits can number."""
    needs_module()
    rng = np.random.default_rng(0)
    x = rng.normal(size=(70_000, 1)).astype(np.float32)
    source = ExtraTreesRegressor(1, random_state=0, bootstrap=False).fit(x, np.stack([x[:, 0], -x[:, 0]], 1))
    forest = fastens.Forest.from_sklearn(source)
    assert forest._native("native").describe()["codes"] == "32-bit"
    for rule, n in (("dominant", 999), ("median", 999), ("median", 2)):
        assert np.array_equal(forest.predict(x[:n], rule), source.predict(x[:n]))

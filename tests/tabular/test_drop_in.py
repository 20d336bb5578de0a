import copy
import functools
import pickle

import numpy as np
import pytest
from sklearn.datasets import load_iris

import fastens
from fastens import rules
from fastens.tabular import accelerate

package = pytest.importorskip("ForestDiffusion.diffusion_with_trees_class", exc_type=ImportError)
OPTIONS = {"n_t": 6, "max_depth": 5, "n_estimators": 8, "duplicate_K": 4, "n_jobs": 1, "n_batch": 0}


@functools.cache
def fitted(labels=False, missing=False, **options):
    data = load_iris()
    x = data.data.copy()
    if missing:
        x[np.random.default_rng(0).random(x.shape) < 0.15] = np.nan
    options = OPTIONS | {"model": "random_forest", "diffusion_type": "vp"} | options
    return package.ForestDiffusionModel(x, label_y=data.target if labels else None, **options)


def seeded(run, seed=0):
    np.random.seed(seed)
    return run()


MODELS = [
    {},
    {"labels": True},
    {"diffusion_type": "flow"},
    {"p_in_one": False},
    {"model": "xgboost"},
    {"model": "xgboost", "n_batch": 1},
    {"model": "xgboost", "n_batch": 1, "diffusion_type": "flow"},
    {"model": "xgboost", "missing": True},
    {"model": "lgbm", "p_in_one": False},
]


@pytest.mark.parametrize("options", MODELS, ids=str)
def test_mean_generates_what_the_package_generates(options):
    model = fitted(**options)
    expected = seeded(lambda: model.generate(batch_size=60))
    actual = seeded(lambda: accelerate(model).generate(batch_size=60))
    # A split may fall the other way where the float64 sums differ in the last bit: rare, and then one row differs.
    scale = np.abs(expected).max()
    assert actual.shape == expected.shape
    assert np.median(np.abs(actual - expected)) <= 1e-6 * scale
    assert (np.abs(actual - expected).max(1) > 1e-4 * scale).mean() <= 0.05


@pytest.mark.parametrize("options", [{"model": "xgboost", "missing": True}, {}], ids=str)
@pytest.mark.parametrize("repaint", [False, True])
def test_imputation_is_the_package_s(options, repaint):
    model = fitted(**options)
    holes = load_iris().data.copy()
    holes[::3, 1] = np.nan
    holes = model.scaler.transform(holes)
    expected = seeded(lambda: model.impute(X=holes, repaint=repaint))
    actual = seeded(lambda: accelerate(model).impute(X=holes, repaint=repaint))
    assert np.isfinite(actual).all()
    assert (np.abs(actual - expected).max(1) > 1e-4).mean() <= 0.05


def test_classification_is_the_package_s():
    model = fitted(labels=True)
    x = load_iris().data[::5]
    expected, actual = model.predict_proba(x, n_t=4, n_z=2), accelerate(model).predict_proba(x, n_t=4, n_z=2)
    assert np.abs(actual - expected).max() <= 1e-6


@pytest.mark.parametrize("rule", ["median", "dominant", "max_abs", "sum", "geometric", rules.Geometric("batch", 1e-9)])
def test_a_rule_combines_the_trees(rule):
    model = fitted()
    rows = np.random.default_rng(0).normal(size=(50, 4))
    fast = accelerate(model, rule)
    for level in (0, 5):
        expected = fastens.Forest.from_sklearn(model.regr[0][level]).predict(rows, rule, backend="reference")
        actual = fast.predict_over_c(X=rows, i=level, j=0, k=None, dmat=False)
        assert np.abs(actual - expected).max() <= 1e-12 * np.abs(expected).max()
    assert np.isfinite(fast.generate(batch_size=20)).all()


def test_mixture_keeps_a_row_s_member_for_a_trajectory():
    fast = accelerate(fitted(labels=True), "mixture")
    first, second = (seeded(lambda: fast.generate(batch_size=30), seed) for seed in (1, 1))
    assert np.array_equal(first, second)
    predictor = fast.predict_over_c
    rows = np.random.default_rng(0).normal(size=(200, 4))
    with pytest.raises(ValueError, match="per trajectory"):
        predictor(rows, 0, 0, None)
    predictor.start_trajectory()
    members = [fastens.Forest.from_sklearn(fast.regr[0][i]).predict_members(rows) for i in range(6)]
    drawn = []
    for level, stack in enumerate(members):
        equal = (stack == predictor(rows, level, 0, None)).all(-1)  # [K, n]
        drawn.append(equal)
    assert np.logical_and.reduce(drawn).any(0).all()  # one member explains a row at every level
    assert len(np.unique(np.logical_and.reduce(drawn).argmax(0))) == 8


def test_alternating_draws_anew_at_every_evaluation():
    fast = accelerate(fitted(), "alternating")
    rows = np.random.default_rng(0).normal(size=(200, 4))
    np.random.seed(0)
    assert not np.array_equal(fast.predict_over_c(rows, 0, 0, None), fast.predict_over_c(rows, 0, 0, None))
    assert np.array_equal(*(seeded(lambda: fast.generate(batch_size=9), 3) for _ in range(2)))


def test_results_are_fresh():
    fast = accelerate(fitted())
    rows = np.zeros((3, 4))
    first = fast.predict_over_c(rows, 0, 0, None)
    kept = first.copy()
    first[:] = 9
    assert np.array_equal(fast.predict_over_c(rows, 0, 0, None), kept)
    rows[:] = 1  # the caller's buffer is used again
    expected = accelerate(fitted()).predict_over_c(np.ones((3, 4)), 0, 0, None)
    assert np.array_equal(fast.predict_over_c(rows, 0, 0, None), expected)


def test_the_model_stays_as_it_is():
    model = copy.copy(fitted())
    before = dict(vars(model))
    accelerate(model, "dominant").generate(batch_size=5)
    assert vars(model) == before


@pytest.mark.parametrize("rule", ["mean", "mixture"])
def test_an_accelerated_model_can_be_pickled(rule):
    fast = accelerate(fitted(), rule)
    copied = pickle.loads(pickle.dumps(fast))
    assert np.array_equal(*(seeded(lambda m=m: m.generate(batch_size=9)) for m in (fast, copied)))


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="expected a fitted ForestDiffusionModel, got dict"):
        accelerate({})
    with pytest.raises(TypeError, match="got list"):  # models fit scalers of their own, so their trees do not mix
        accelerate([fitted(), fitted()])
    model = copy.copy(fitted())
    model.regr = [[object()]]
    with pytest.raises(TypeError, match="are not taken"):
        accelerate(model)
    with pytest.raises(ValueError, match="one weight per member, 8"):
        accelerate(fitted(), rules.Mean((0.5, 0.5)))


def test_a_subclass_with_its_own_prediction_is_refused():
    class Own(package.ForestDiffusionModel):
        def predict_over_c(self, *args, **kwargs):
            return super().predict_over_c(*args, **kwargs) / 2

    own = copy.copy(fitted())
    own.__class__ = Own
    with pytest.raises(TypeError, match="its own 'predict_over_c'"):
        accelerate(own)
    again = accelerate(accelerate(fitted(), "median"))
    assert np.array_equal(*(seeded(lambda m=m: m.generate(batch_size=9)) for m in (again, accelerate(fitted()))))

"""A forest on tensors: the op against Forest.predict, and as an op of torch."""

import numpy as np
import pytest
import torch

import fastens
from fastens import _native, rules
from tests.tabular.forests import fitted, rows

RULES = ["mean", "sum", "median", "geometric", "dominant", "max_abs", rules.Median("lower"), rules.Geometric("batch")]
BACKENDS = ["reference", "native"]


def arguments(forest, rule="mean"):
    value = rules.get(rule)
    trees, number, depth = forest._on(torch.device("cpu"))
    return trees, number, depth, forest._double_inputs, value.name, value.option, list(value.values), 0, 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("options", [{}, {"outputs": 1}, {"name": "iris", "depth": None}], ids=str)
def test_equals_predict(options, rule, backend):
    if backend == "native" and not _native.load():
        pytest.skip(_native.status())
    forest = fastens.Forest.from_sklearn(fitted(**options))
    x = torch.from_numpy(rows(options.get("name", "diabetes")))
    expected = forest.predict(x.numpy(), rule).reshape(len(x), -1)
    for given in (x, x.float(), x.t().contiguous().t(), torch.cat([x, x], 1)[:, : x.shape[1]]):
        actual = forest.predict_tensor(given, rule, backend=backend)
        assert actual.dtype == given.dtype
        tolerance = 1e-12 if given.dtype == torch.float64 else 1e-6
        assert np.abs(actual.double().numpy() - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_boosters_and_missing_values(backend):
    xgboost = pytest.importorskip("xgboost")
    if backend == "native" and not _native.load():
        pytest.skip(_native.status())
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 4)).astype(np.float32)
    x[rng.random(x.shape) < 0.2] = np.nan
    y = np.nan_to_num(x).sum(1)
    models = [
        xgboost.XGBRegressor(n_estimators=5, max_depth=3, random_state=s, subsample=0.5).fit(x, y) for s in (0, 1)
    ]
    forest = fastens.Forest.from_xgboost(models)
    for rule in ("mean", "dominant"):
        actual = forest.predict_tensor(torch.from_numpy(x), rule, backend=backend)
        assert np.allclose(actual[:, 0].numpy(), forest.predict(x, rule), rtol=1e-5)


def test_alternating_draws_as_predict_does():
    forest = fastens.Forest.from_sklearn(fitted())
    draw = [
        call(given, "alternating", generator=torch.Generator().manual_seed(3))
        for call, given in ((forest.predict, rows()), (forest.predict_tensor, torch.from_numpy(rows())))
    ]
    assert np.array_equal(draw[0], draw[1].numpy())


@pytest.mark.parametrize("op", ["forest_predict", "_forest_predict_native"])
def test_opcheck(op):
    forest = fastens.Forest.from_sklearn(fitted("iris"))
    given = (torch.from_numpy(rows("iris", 8)), *arguments(forest, "dominant"))
    torch.library.opcheck(getattr(torch.ops.fastens, op).default, given)


def test_compiles_whole():
    forest = fastens.Forest.from_sklearn(fitted("iris"))
    x = torch.from_numpy(rows("iris", 8))
    expected = 2 * forest.predict_tensor(x, "median")
    compiled = torch.compile(lambda x: 2 * forest.predict_tensor(x, "median"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)


def test_no_copy_and_no_gradient():
    forest = fastens.Forest.from_sklearn(fitted("iris"))
    x = torch.from_numpy(rows("iris", 8)).requires_grad_()
    before = x.detach().clone()
    out = forest.predict_tensor(x)
    assert not out.requires_grad
    assert torch.equal(x, before)
    seen = []
    forest.predict_by_rule = lambda rows, *rest: seen.append(rows.ctypes.data) or np.zeros((8, 3))
    forest.predict_tensor(x, backend="native" if _native.load() else "reference")
    assert seen in ([x.data_ptr()], [])


def test_bad_input():
    forest = fastens.Forest.from_sklearn(fitted("iris"))
    with pytest.raises(TypeError, match="floating-point tensor"):
        forest.predict_tensor(torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"`x` is \[2, 5\], expected \[n, 4\]"):
        forest.predict_tensor(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="trajectory"):
        forest.predict_tensor(torch.zeros(2, 4), "mixture")
    assert forest.predict_tensor(torch.zeros(0, 4)).shape == (0, 3)
    number = arguments(fastens.Forest.from_sklearn(fitted("iris", trees=2)))
    if _native.load():
        with pytest.raises(RuntimeError, match="is gone"):
            torch.ops.fastens._forest_predict_native(torch.zeros(2, 4), *number)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", [*RULES, "alternating"], ids=str)
def test_on_gpu(rule, backend):
    forest = fastens.Forest.from_sklearn(fitted())
    x = torch.from_numpy(rows())
    draw = {"generator": torch.Generator().manual_seed(0)} if rule == "alternating" else {}
    expected = forest.predict_tensor(x, rule, **draw)
    draw = {"generator": torch.Generator().manual_seed(0)} if rule == "alternating" else {}
    actual = forest.predict_tensor(x.cuda(), rule, backend=backend, **draw).cpu()
    assert (actual - expected).abs().max() <= 1e-12 * expected.abs().max()

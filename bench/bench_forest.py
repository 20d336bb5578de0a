"""C5, C6: a forest of 100 trees by every rule, and tabular sampling, against the paper's per-tree path and others.

Rows are float64, as ForestDiffusion's sampler has them; ONNX Runtime, Treelite and tl2cgen get them in float32. The
goals are ``test_rules``, ``test_one_row`` and ``test_sampling``. ``test_rules`` times a call both ways that a sampler
makes it: the first of a forest, after others have used the caches (a sampler that has one forest per noise level), and
one of many in succession (a solver that evaluates a level again, imputation, data in chunks).

The whole grid takes long: choose a part, such as ``-k "test_grid and trees100-depth7-outputs6"``. Forests are kept in
``build/bench-cache``; ``python -m bench.bench_forest`` fits them all beforehand. tl2cgen, which compiles for a minute,
takes part where FASTENS_BENCH_TL2CGEN=1 and it is installed: ``pip install --no-deps tl2cgen``.
"""

import functools
import itertools
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import fastens
import fastens.tabular
from bench.contest import contest
from fastens.reference.aggregate import aggregate

ROWS = 1503


@functools.cache
def noisy(rows=15_030, outputs=6):
    """Rows of a nonlinear table at a middle noise level, and their noise."""
    rng = np.random.default_rng(0)
    clean = np.tanh(rng.normal(size=(rows, 3)) @ rng.normal(size=(3, outputs))) + 0.1 * rng.normal(size=(rows, outputs))
    clean = 2 * (clean - clean.min(0)) / np.ptp(clean, 0) - 1
    noise = rng.normal(size=clean.shape)
    return 0.6 * clean + 0.8 * noise, noise


KEPT = Path(__file__).parents[1] / "build" / "bench-cache" / "forests"


@functools.lru_cache(maxsize=1)
def fitted(trees=100, depth=7, outputs=6):
    """Unlimited depth learns fewer rows, and many features try six a split: it is the evaluation that is timed."""
    import sklearn
    from sklearn.ensemble import RandomForestRegressor

    path = KEPT / f"{trees}-{depth}-{outputs}-{sklearn.__version__}.pkl"
    if path.exists():
        return pickle.loads(path.read_bytes())
    x, y = noisy(outputs=outputs)
    rows = len(x) if depth else 2000 if trees > 100 or outputs > 6 else 5000
    forest = RandomForestRegressor(trees, max_depth=depth, random_state=0, n_jobs=2, max_features=min(6, outputs))
    forest.fit(x[:rows], y[:rows, 0] if outputs == 1 else y[:rows]).set_params(n_jobs=1)
    KEPT.mkdir(parents=True, exist_ok=True)
    path.with_suffix(f".{os.getpid()}").write_bytes(pickle.dumps(forest))
    path.with_suffix(f".{os.getpid()}").replace(path)
    return forest


def stack(forest, x):
    return np.array([tree.predict(x) for tree in forest.estimators_])


def by_the_paper(rule, forest, x):
    """The paper's code for one rule."""
    out = stack(forest, x)
    if rule == "mean":
        return np.mean(out, axis=0)
    if rule == "median":
        return np.median(out, axis=0)
    if rule == "dominant":
        largest = np.argmax(np.abs(out), axis=0)
        rows, columns = np.meshgrid(np.arange(out.shape[1]), np.arange(out.shape[2]), indexing="ij")
        return out[largest, rows, columns]
    offset = abs(np.min(out)) + 1e-9
    return np.exp(np.mean(np.log(out + offset), axis=0)) - offset


def onnx(forest, x):
    import onnxruntime
    from skl2onnx import to_onnx

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    model = to_onnx(forest, x[:1].astype(np.float32)).SerializeToString()
    x = x.astype(np.float32)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda: torch.from_numpy(session.run(None, {"X": x})[0])


def gtil(forest, x):
    import treelite

    x = x.astype(np.float32)
    model, threads = treelite.sklearn.import_model(forest), torch.get_num_threads()

    def run():
        per_tree = treelite.gtil.predict_per_tree(model, x, nthread=threads)
        return torch.from_numpy(per_tree.reshape(len(x), len(forest.estimators_), -1).mean(1))

    return run


@functools.cache
def tl2cgen_predictor(trees, depth, outputs):
    import tempfile

    import tl2cgen
    import treelite

    path = f"{tempfile.mkdtemp()}/forest.so"
    model = treelite.sklearn.import_model(fitted(trees, depth, outputs))
    tl2cgen.export_lib(model, toolchain="gcc", libpath=path, params={"parallel_comp": 16}, options=["-O1"])
    return tl2cgen.Predictor(path, nthread=torch.get_num_threads())


def tl2cgen_rival(shape, x):
    import tl2cgen

    predictor, rows = tl2cgen_predictor(*shape), tl2cgen.DMatrix(x.astype(np.float32))
    return lambda: torch.from_numpy(predictor.predict(rows)).reshape(len(x), -1)


WANTED = {"mean": 80, "median": 60, "dominant": 90}
RULES = {name: name for name in WANTED} | {"geometric": fastens.rules.Geometric("batch", 1e-9)}
MOST = 1 << 31  # bytes of all trees' outputs, which the rivals that go tree by tree hold


def run_contest(benchmark, shape, x, rule, name, wanted, rounds, in_succession=1):
    forest = fitted(*shape)
    packed = fastens.Forest.from_sklearn(forest)
    trees, _, outputs = shape
    by_tree = trees * len(x) * outputs * 8 <= MOST
    rivals = {"the paper's path": lambda: torch.from_numpy(by_the_paper(rule, forest, x))} if by_tree else {}
    if rule == "mean":
        rivals |= {"scikit-learn": lambda: torch.from_numpy(forest.predict(x)), "ONNX Runtime": onnx(forest, x)}
        if by_tree:
            rivals["Treelite GTIL per tree"] = gtil(forest, x)
        if os.environ.get("FASTENS_BENCH_TL2CGEN") == "1":
            rivals["tl2cgen"] = tl2cgen_rival(shape, x)
        expected = torch.from_numpy(forest.predict(x).reshape(len(x), outputs))
    else:
        wide = torch.from_numpy(stack(forest, x).reshape(trees, len(x), outputs))
        expected = aggregate(wide, RULES[rule])
    if outputs == 1:
        rivals = {key: lambda run=run: run().reshape(len(x), 1) for key, run in rivals.items()}
    contest(
        benchmark,
        lambda: torch.from_numpy(packed.predict(x, RULES[rule]).reshape(len(x), outputs)),
        rivals,
        expected,
        1e-5,
        "C5",
        f"forest {rule}, {name}",
        name,
        {key: value for key, value in wanted.items() if key in rivals},
        rounds=rounds,
        warmup_rounds=2 if rounds > 2 else 0,
        in_succession=in_succession,
    )


@pytest.mark.parametrize("in_succession", [1, 10], ids=["after_others", "in_succession"])
@pytest.mark.parametrize("rule", RULES)
def test_rules(benchmark, rule, in_succession):
    x = noisy()[0][:ROWS]
    wanted = {"ONNX Runtime": 15, "Treelite GTIL per tree": 25}
    wanted |= {"the paper's path": WANTED[rule]} if rule in WANTED else {}
    name = "100 trees, depth 7, 6 outputs, 1503 rows" + (", in succession" if in_succession > 1 else "")
    run_contest(benchmark, (100, 7, 6), x, rule, name, wanted, 15, in_succession)


def test_one_row(benchmark):
    """One row, over and over: the time of a call where nothing else runs, at most 10 microseconds."""
    packed, x = fastens.Forest.from_sklearn(fitted()), noisy()[0][:1]
    benchmark.pedantic(packed.predict, (x,), rounds=200, iterations=50, warmup_rounds=5)
    assert benchmark.stats["median"] <= 10e-6


@pytest.mark.parametrize("rows", [1, 16, ROWS, 100_000], ids="rows{}".format)
@pytest.mark.parametrize("outputs", [1, 6, 32], ids="outputs{}".format)
@pytest.mark.parametrize("depth", [3, 7, None], ids="depth{}".format)
@pytest.mark.parametrize("trees", [10, 100, 1000], ids="trees{}".format)
def test_grid(benchmark, trees, depth, outputs, rows):
    x = np.resize(noisy(outputs=outputs)[0], (rows, outputs))
    name = f"{trees} trees, depth {depth or 'unlimited'}, {outputs} outputs, {rows} rows"
    rounds = 2 if trees * rows * outputs > 10_000_000 else 7
    run_contest(benchmark, (trees, depth, outputs), x, "mean", name, {}, rounds)


@pytest.mark.parametrize("rule", WANTED)
def test_sampling(benchmark, rule):
    """`generate` of the published package, its forests' prediction replaced by the paper's per-tree code, and ours."""
    package = pytest.importorskip("ForestDiffusion.diffusion_with_trees_class", exc_type=ImportError)
    rows = noisy()[0][:ROWS]
    options = {"model": "random_forest", "diffusion_type": "vp", "n_estimators": 100, "max_depth": 7, "n_t": 50}
    model = package.ForestDiffusionModel(rows, duplicate_K=1, n_jobs=2, n_batch=0, **options)

    class Paper(package.ForestDiffusionModel):
        def __init__(self):
            vars(self).update(vars(model))

        def predict_over_c(self, X, i, j, k, dmat, expand=False, X_covs=None):
            return by_the_paper(rule, self.regr[j][i], X)

    def seeded(generate):
        np.random.seed(0)
        return torch.from_numpy(generate())

    paper, fast = Paper(), fastens.tabular.accelerate(model, rule)
    contest(
        benchmark,
        lambda: seeded(fast.generate),
        {"the paper's generate": lambda: seeded(paper.generate)},
        seeded(paper.generate),
        1e-4,
        "C6",
        f"tabular sampling by {rule}",
        "1503 rows, 6 columns, 50 levels, 100 trees of depth 7",
        {"the paper's generate": 60},
        rounds=3,
    )


if __name__ == "__main__":
    for shape in itertools.product((10, 100, 1000), (3, 7, None), (1, 6, 32)):
        fitted(*shape)
        print(*shape, flush=True)

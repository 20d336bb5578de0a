"""Small fitted forests, each made once per process."""

import functools

import numpy as np
from sklearn import datasets
from sklearn.ensemble import ExtraTreesRegressor, RandomForestRegressor

DATA = {
    "iris": datasets.load_iris,
    "wine": datasets.load_wine,
    "breast cancer": datasets.load_breast_cancer,
    "diabetes": datasets.load_diabetes,
    "digits": datasets.load_digits,
    "linnerud": datasets.load_linnerud,
}


@functools.cache
def data(name):
    return DATA[name]().data


@functools.cache
def fitted(name="diabetes", cls=RandomForestRegressor, outputs=3, trees=10, depth=7, **options):
    """A forest that predicts noise from noisy rows, as a diffusion model of the data would."""
    rng = np.random.default_rng(0)
    x = data(name)
    x = 2 * (x - x.min(0)) / np.maximum(np.ptp(x, 0), 1e-9) - 1  # some pixels of digits are always 0
    noise = rng.normal(size=x.shape)
    y = np.resize(noise, (len(x), outputs)) if outputs > x.shape[1] else noise[:, :outputs]
    forest = cls(trees, max_depth=depth, random_state=0, **options)
    return forest.fit(0.6 * x + 0.8 * noise, y[:, 0] if outputs == 1 else y)


def rows(name="diabetes", n=300, seed=1, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=(n, data(name).shape[1])).astype(dtype)


def stacked(forest, x):
    """Every tree's prediction, [K, n, p]."""
    outputs = [tree.predict(x) for tree in forest.estimators_]
    return np.stack([out.reshape(len(x), -1) for out in outputs])


EXTRA = ExtraTreesRegressor

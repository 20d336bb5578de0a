"""Anomaly scores: what is far from the reference scores high, on either side, and AUROC is a count."""

import numpy as np
import pytest
import torch

import fastens
from fastens.evaluation import Denoiser, anomaly, auroc
from fastens.schedules import VP
from tests.evaluation.densities import MixtureNetwork


def denoiser(members=2):
    networks = [MixtureNetwork(VP(), [[0.02 * k, 0.0]], 0.1) for k in range(members)]
    return Denoiser(fastens.Ensemble(networks), VP())


def drawn(num, mean, std, seed):
    return mean + std * torch.randn(num, 2, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("mean", "std"), [(0.6, 0.1), (0.0, 0.4)])
def test_another_kind_scores_higher(mean, std):
    found = anomaly(denoiser(), drawn(60, 0, 0.1, 0), drawn(60, 0, 0.1, 1), drawn(60, mean, std, 2), data_range=(-9, 9))
    assert set(found.auroc) == {"ensemble", "member 0", "member 1", "variance"}
    assert found.auroc["ensemble"].low > 0.75
    assert found.single in (found.auroc["member 0"], found.auroc["member 1"])


def test_the_same_kind_does_not():
    found = anomaly(denoiser(1), drawn(90, 0, 0.1, 0), drawn(90, 0, 0.1, 1), drawn(90, 0, 0.1, 2), data_range=(-9, 9))
    assert set(found.auroc) == {"ensemble", "member 0"}
    assert found.auroc["ensemble"].low < 0.5 < found.auroc["ensemble"].high


def test_auroc_counts_pairs():
    rng = np.random.default_rng(0)
    inliers, outliers = rng.integers(5, size=40), rng.integers(2, 7, size=30)
    pairs = [(o > i) + 0.5 * (o == i) for o in outliers for i in inliers]
    found = auroc(inliers, outliers)
    assert found.value == pytest.approx(np.mean(pairs))
    assert found.low < found.value < found.high
    assert auroc(np.zeros(3), np.ones(3)).value == 1


def test_bad_input():
    few = drawn(3, 0, 0.1, 0)
    with pytest.raises(ValueError, match="expected one shape"):
        anomaly(denoiser(), few, few, torch.zeros(3, 5))
    with pytest.raises(ValueError, match="at least two images"):
        anomaly(denoiser(), few[:1], few, few)
    with pytest.raises(ValueError, match="scores of both kinds"):
        auroc(np.zeros(0), np.ones(2))

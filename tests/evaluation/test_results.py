"""What results of the evaluation say, tabulate and draw."""

import matplotlib
import numpy as np
import pytest
import torch

import fastens
from fastens.evaluation import Denoiser, denoising_loss, likelihood, quality
from tests.networks import randomised, small_unet

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def denoiser():
    members = [randomised(small_unet, seed) for seed in range(2)]
    return Denoiser(fastens.Ensemble(members), fastens.schedules.Discrete.linear())


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_a_loss(denoiser, images):
    loss = denoising_loss(denoiser, images, rule_names=("mean", "max_abs"), times=2)
    frame = loss.to_frame()
    assert list(frame.index) == ["member 0", "member 1", "mean", "max_abs"]
    assert frame.loss["mean"] == pytest.approx(loss.estimate(loss.rules["mean"]).value)
    assert frame.against_member_mean["mean"] == pytest.approx(loss.compare("mean").value)
    assert loss.summary().startswith(f"{frame.loss[['mean', 'max_abs']].idxmin()} has the least loss of 2 rules")
    axis = loss.plot()
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["mean", "max_abs"]
    drawn = axis.containers[0].lines[0].get_ydata()
    np.testing.assert_allclose(drawn, 100 * (loss.rules["mean"].mean(0) / loss.member_mean.mean(0) - 1))


def test_a_likelihood(denoiser, images):
    found = likelihood(denoiser, images, method="rk4", steps=1, repeats=2)
    frame = found.to_frame()
    assert frame.shape == (3, 2)
    assert frame.to_numpy().mean() == pytest.approx(found.mean)
    assert found.summary().startswith(f"{found.mean:.4f} ± {found.error:.4f} bits/dim over 3 samples")
    assert sum(patch.get_height() for patch in found.plot().patches) == 3


def test_a_quality():
    a, b = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(0))
    found = quality(a, b, resamples=5)
    frame = found.to_frame()
    assert frame.value["Fréchet distance"] == found.frechet.value
    assert frame.low["Fréchet distance"] <= found.frechet.value <= frame.high["Fréchet distance"]
    assert f"precision {found.precision:.3f}" in found.summary()
    assert len(found.plot().containers) == 2

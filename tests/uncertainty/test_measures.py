"""Measures of uncertainty against their definitions, distributions that are known, and libraries that have them."""

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torchmetrics.functional.regression import continuous_ranked_probability_score

import fastens.uncertainty as unc

RNG = np.random.default_rng(0)
NAN = np.array([0.5, np.nan])


def test_parts_of_the_variance_add_up_to_that_of_all_samples():
    x = RNG.normal(size=(4, 6, 3, 2)) + RNG.normal(size=(4, 1, 3, 2))
    found = unc.decompose(x)
    np.testing.assert_allclose(found.total, x.reshape(24, 3, 2).var(0))
    np.testing.assert_allclose(found.epistemic + found.aleatoric, found.total)


def test_unbiased_parts_are_those_of_the_distributions():
    members = 2 * RNG.normal(size=(400, 1, 2000))
    found = unc.decompose(members[:5] * 0 + RNG.normal(size=(5, 3, 2000)), unbiased=True)
    assert abs(found.epistemic.mean()) < 0.02  # biased it would be a third of the noise
    found = unc.decompose(members + RNG.normal(size=(400, 3, 2000)), unbiased=True)
    np.testing.assert_allclose((found.epistemic.mean(), found.aleatoric.mean()), (4, 1), rtol=0.02)


def density(m, s):
    return lambda x: stats.norm.pdf(x, m, s)


def test_distances_are_the_integrals_that_define_them():
    m, v = np.array([0.3, -0.5]), np.array([0.7, 1.9])
    p, q = density(m[0], v[0] ** 0.5), density(m[1], v[1] ** 0.5)
    kl = integrate.quad(lambda x: p(x) * np.log(p(x) / q(x)), -15, 15)[0]
    overlap = -np.log(integrate.quad(lambda x: np.sqrt(p(x) * q(x)), -15, 15)[0])
    u = (np.arange(200_000) + 0.5) / 200_000  # of the quantile functions, which transport at least cost
    moved = np.mean((stats.norm.ppf(u, m[0], v[0] ** 0.5) - stats.norm.ppf(u, m[1], v[1] ** 0.5)) ** 2)
    for kind, expected, rtol in (("kl", kl, 1e-8), ("bhattacharyya", overlap, 1e-8), ("wasserstein", moved, 1e-3)):
        found = unc.distances(m, v, kind)
        np.testing.assert_allclose(found[0, 1], expected, rtol=rtol)
        np.testing.assert_allclose(np.diag(found), 0, atol=1e-15)


def test_disagreement_is_nothing_where_all_agree_and_log_k_where_none_do():
    assert unc.disagreement(np.zeros((4, 4))) == pytest.approx(0)
    apart = np.full((4, 4), 1e3) * (1 - np.eye(4))
    assert unc.disagreement(apart) == pytest.approx(np.log(4))


def test_standard_crps_is_that_of_torchmetrics_and_fair_that_of_the_distribution():
    x, y = RNG.normal(size=(5, 40)), RNG.normal(size=40)
    theirs = continuous_ranked_probability_score(torch.tensor(x.T), torch.tensor(y))
    np.testing.assert_allclose(unc.crps(x, y, fair=False).mean(), float(theirs))
    x, y = RNG.normal(size=(3, 200_000)), 0.4 * np.ones(200_000)
    z = 0.4
    exact = z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / np.sqrt(np.pi)  # Gneiting et al., 2005
    np.testing.assert_allclose(unc.crps(x, y).mean(), exact, atol=5e-3)
    assert abs(unc.crps(x, y, fair=False).mean() - exact) > 0.1
    np.testing.assert_allclose(unc.crps(x[:1], y, fair=False), np.abs(x[0] - y))


def test_spread_is_skill_where_truth_is_one_of_them():
    x, y = RNG.normal(size=(4, 100_000)), RNG.normal(size=100_000)
    found = unc.spread_skill(x, y)
    assert found.spread == pytest.approx(found.skill, rel=0.01)
    assert unc.spread_skill(0.5 * x, y).spread < 0.6 * unc.spread_skill(0.5 * x, y).skill


def test_ranks_are_flat_where_truth_is_one_of_them_and_ties_are_drawn():
    counts = unc.rank_histogram(RNG.normal(size=(4, 50_000)), RNG.normal(size=50_000))
    assert stats.chisquare(counts).pvalue > 1e-3
    assert list(unc.rank_histogram(np.array([[1.0], [3.0]]), np.array([2.0]))) == [0, 1, 0]
    assert stats.chisquare(unc.rank_histogram(np.zeros((3, 40_000)), np.zeros(40_000))).pvalue > 1e-3
    narrow = unc.rank_histogram(0.2 * RNG.normal(size=(4, 1000)), RNG.normal(size=1000))
    assert min(narrow[0], narrow[-1]) > 2 * max(narrow[1:-1])


def test_an_uncertainty_that_ranks_as_the_error_has_no_area():
    error = RNG.exponential(size=(20, 50))
    right = unc.sparsification(error, error**2)
    assert right.ause == pytest.approx(0)
    np.testing.assert_allclose(right.by_uncertainty[0], 1)
    np.testing.assert_allclose(right.by_error[10], np.sort(error.ravel())[:500].mean() / error.mean())
    none, wrong = unc.sparsification(error, RNG.normal(size=error.shape)), unc.sparsification(error, -error)
    assert 0.1 < none.ause < wrong.ause


@pytest.mark.parametrize("size", [4, 7, 100])
def test_equal_uncertainties_are_removed_in_no_order(size):
    error = RNG.exponential(size=size)
    for of in (error, np.sort(error), np.sort(error)[::-1]):
        found = unc.sparsification(of, np.ones(size))
        np.testing.assert_allclose(found.by_uncertainty, 1, rtol=1e-12)
    uncertainty = RNG.integers(3, size=size)
    orders = [RNG.permutation(size) for _ in range(3)]
    one, *others = (unc.sparsification(error[order], uncertainty[order]) for order in orders)
    for other in others:
        np.testing.assert_allclose(other.by_uncertainty, one.by_uncertainty, rtol=1e-12)


@pytest.mark.parametrize("steps", [7, 29, 100])
def test_as_many_are_removed_as_the_fraction_says(steps):
    error = np.arange(1.0, steps + 1)
    kept = np.array([error[: steps - i].mean() for i in range(steps)])
    np.testing.assert_allclose(unc.sparsification(error, error, steps).by_error, kept / error.mean(), rtol=1e-12)


@pytest.mark.parametrize("measure", [unc.crps, unc.spread_skill, unc.rank_histogram, unc.calibration])
def test_one_truth_is_a_truth_of_one_element(measure):
    samples, truth = RNG.normal(size=9), 0.1
    one, other = measure(samples, truth), measure(samples[:, None], [truth])
    pairs = [(one, other[0])] if measure is unc.crps else zip(one, other, strict=True)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs)


@pytest.mark.parametrize("dtype", [np.float16, np.int8, np.int16, np.uint16, np.float32])
def test_every_real_dtype_and_layout_is_read(dtype):
    samples = RNG.integers(0, 9, size=(3, 4, 5)).astype(dtype)
    samples.flags.writeable = False
    for given in (samples, samples[::-1], samples[:, ::-1, ::2]):
        found, expected = unc.decompose(given), given.astype(float).var((0, 1))
        np.testing.assert_allclose(found.total, expected)


def test_intervals_hold_what_they_should_where_truth_is_one_of_them():
    x, y = RNG.normal(size=(50, 20_000)), RNG.normal(size=20_000)
    assert unc.calibration(x, y).error < 0.02
    assert unc.calibration(0.3 * x, y).error > 0.2
    np.testing.assert_allclose(unc.calibration(x, y, [0.5, 0.8]).coverage, [0.5, 0.8], atol=0.03)


def test_tensors_give_tensors_of_the_same_values():
    x, y = torch.randn(6, 30), torch.randn(30)
    for ours, theirs in zip(unc.calibration(x, y)[:2], unc.calibration(x.numpy(), y.numpy())[:2], strict=True):
        assert isinstance(ours, torch.Tensor)
        np.testing.assert_allclose(ours.numpy(), theirs)
    assert isinstance(unc.crps(x, y), torch.Tensor)
    assert isinstance(unc.decompose(x.view(2, 3, 30)).total, torch.Tensor)
    assert isinstance(unc.crps(x.tolist(), y.tolist()), np.ndarray)


BAD = [
    (lambda: unc.decompose(np.zeros(3)), ValueError, r"samples is \[3\], expected \[K, N, ...\]"),
    (lambda: unc.decompose(np.zeros((0, 3))), ValueError, r"samples is \[0, 3\]"),
    (lambda: unc.decompose(np.zeros((1, 3)), unbiased=True), ValueError, "at least two members"),
    (lambda: unc.decompose(np.zeros((2, 3), dtype=complex)), TypeError, "expected real numbers"),
    (lambda: unc.distances(np.zeros(3), np.ones(3), "energy"), ValueError, "kind 'energy' is unknown"),
    (lambda: unc.distances(np.zeros(3), -np.ones(3)), ValueError, "variances has values below zero"),
    (lambda: unc.distances(np.zeros(3), np.zeros(3), "kl"), ValueError, "variances has values of zero"),
    (lambda: unc.disagreement(np.zeros((3, 2))), ValueError, r"pairwise is \[3, 2\]"),
    (lambda: unc.crps(np.zeros((3, 2)), np.zeros(3)), ValueError, r"truth is \[3\], expected \[2\]"),
    (lambda: unc.crps(np.zeros((1, 2)), np.zeros(2)), ValueError, "expected at least 2"),
    (lambda: unc.spread_skill(np.zeros((1, 2)), np.zeros(2)), ValueError, "expected at least 2"),
    (lambda: unc.sparsification(np.zeros(3), np.zeros(3)), ValueError, "some above zero"),
    (lambda: unc.sparsification(np.ones(4), np.zeros((2, 2))), ValueError, r"uncertainty is \[2, 2\]"),
    (lambda: unc.sparsification(np.ones(3), np.zeros(3), 0), ValueError, "at least one step"),
    (lambda: unc.calibration(np.zeros((3, 2)), np.zeros(2), [0.5, 1.0]), ValueError, "above 0 and below 1"),
    (lambda: unc.calibration(np.zeros((3, 2)), NAN), ValueError, "truth is NaN in 1 of 2 elements"),
    (lambda: unc.rank_histogram(np.zeros((3, 2)), NAN), ValueError, "truth is NaN in 1 of 2 elements"),
    (lambda: unc.rank_histogram(np.stack([NAN, NAN]), np.zeros(2)), ValueError, "samples is NaN in 2 of 4"),
    (lambda: unc.sparsification(np.ones(2), NAN), ValueError, "uncertainty is NaN"),
    (lambda: unc.plot_maps(np.zeros((3, 2)), "x.png"), ValueError, r"expected \[K, N, B, C, H, W\]"),
]


@pytest.mark.parametrize(("use", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input_is_named(use, error, message):
    with pytest.raises(error, match=message):
        use()


def test_pictures_are_drawn(tmp_path):
    x, y = RNG.normal(size=(3, 2, 2, 1, 4, 4)), RNG.normal(size=(2, 1, 4, 4))
    unc.plot_maps(x, tmp_path / "maps.png", truth=y, given=y[..., ::2, ::2])
    unc.plot_maps(torch.tensor(x[..., 0, :, :]), tmp_path / "plain.png")
    unc.plot_rank_histogram(unc.rank_histogram(x[0, :, :1], y[:1]), tmp_path / "ranks.png")
    unc.plot_sparsification(unc.sparsification(np.abs(y), y), tmp_path / "curves.png")
    assert all(p.stat().st_size > 1000 for p in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 4

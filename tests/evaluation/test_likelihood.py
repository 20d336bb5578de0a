"""Likelihood against densities that are known."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import fastens
from fastens.evaluation import Denoiser, bits_offset, likelihood
from fastens.schedules import EDM, VE, VP, Discrete, Flow, SubVP
from tests.evaluation.densities import MixtureNetwork
from tests.networks import Scaled

GAUSSIAN = [[0.3, -0.2, 0.5]]
MIXTURE = [[0.6, 0.6], [-0.6, 0.2], [0.1, -0.7]]
WIDE = (-9.0, 9.0)
EXACT = {"levels": None, "data_range": WIDE, "divergence": "exact", "batch_size": 32}


def true_bits(network, x):
    return -network.log_density(x, network.schedule.t_data).numpy() / (x.shape[1] * math.log(2))


@pytest.mark.parametrize("means", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [
        # up to beta 40, so that what is left of the data at t = 1 does not count (0.007 of it does up to 20)
        (VP(beta_max=40.0), "epsilon"),
        (VP(beta_max=40.0, time_scale=999.0), "score"),
        (SubVP(beta_max=40.0), "epsilon"),
        (VP(beta_max=40.0).discretised(), "v"),
        (VE(sigma_max=2000.0), "score"),
        (EDM(sigma_max=2000.0), "x0"),
        (Flow(), "flow"),
        (Flow(data_at=1), "flow"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_known_density(means, schedule, prediction):
    network = MixtureNetwork(schedule, means, 0.3, prediction).double()
    x = network.sample(24)
    found = likelihood(Denoiser(network, schedule, prediction), x, **EXACT)
    assert np.abs(found.rows - true_bits(network, x)).max() < 1e-3


@pytest.mark.parametrize(("method", "steps"), [("rk4", 40), ("heun2", 200)])
def test_fixed_steps(method, steps):
    network = MixtureNetwork(Discrete.linear(), MIXTURE, 0.3)
    x = network.sample(8)
    found = likelihood(Denoiser(network, network.schedule), x, method=method, steps=steps, **EXACT)
    assert np.abs(found.rows - true_bits(network, x)).max() < 1e-3
    assert found.evaluations == [steps * (4 if method == "rk4" else 2)]


@pytest.mark.parametrize("divergence", ["rademacher", "gaussian"])
def test_probes_agree_with_the_exact_divergence(divergence):
    network = MixtureNetwork(VP(), MIXTURE, 0.3)
    denoiser, x = Denoiser(network, network.schedule), network.sample(64)
    options = {**EXACT, "divergence": divergence, "num_probes": 8, "repeats": 4}
    found = likelihood(denoiser, x, **options)
    exact = likelihood(denoiser, x, **EXACT)
    spread = found.bits_per_dim.mean(1).std(ddof=1) / 2
    assert abs(found.mean - exact.mean) < 4 * spread + 1e-3
    assert np.abs(found.rows - exact.rows).max() > 1e-4  # the probes were used


def test_ensemble_of_equal_members_is_the_member():
    network = MixtureNetwork(VP(), MIXTURE, 0.3)
    ensemble = fastens.Ensemble([network, network], engine="loop")
    x = network.sample(8)
    one = likelihood(Denoiser(network, network.schedule), x, **EXACT)
    two = likelihood(Denoiser(ensemble, network.schedule), x, **EXACT)
    assert np.allclose(one.rows, two.rows, atol=1e-6)


def test_fixed_masks_have_a_likelihood():
    ensemble = fastens.MCDropout(Linear(0.5), 2)
    found = likelihood(Denoiser(ensemble, VP()), torch.full((3, 2), 0.3), method="rk4", steps=4)
    assert np.isfinite(found.rows).all()


def test_offsets():
    assert bits_offset((-1, 1 - 2 / 256), 256) == pytest.approx(7)
    assert bits_offset((-1, 1), 17) == pytest.approx(3)
    assert bits_offset((0, 255), 256) == pytest.approx(0)


@pytest.mark.parametrize("dequantisation", ["uniform", "gaussian"])
def test_quantised_data_are_bounded_by_their_entropy(dequantisation):
    """Cells of a wide Gaussian: the bound is nearly tight, in bits per dimension of the lattice's own probability."""
    schedule = VP(eps=1e-4)
    network = MixtureNetwork(schedule, [[0.0, 0.0]], 0.3).double()
    step = 2 / 64
    x = (network.sample(256).clamp(-1, 1) / step).round() * step
    options = {"levels": 65, "divergence": "exact", "dequantisation": dequantisation, "batch_size": 256, "repeats": 2}
    found = likelihood(Denoiser(network, schedule), x, **options).mean
    variance = float(schedule.alpha(1e-4)) ** 2 * 0.09 + float(schedule.sigma(1e-4)) ** 2
    lattice = torch.special.ndtr((x + step / 2) / variance**0.5) - torch.special.ndtr((x - step / 2) / variance**0.5)
    truth = float(-lattice.log2().mean())
    # the Gaussian's noise is narrower than a cell (0.0033 of 0.031), so it sees a density, not the lattice
    assert found == pytest.approx(truth, abs=0.01 if dequantisation == "uniform" else 4)
    assert found > truth - 0.01


def test_interrupted_run_goes_on(tmp_path):
    network = MixtureNetwork(VP(), MIXTURE, 0.3)
    denoiser, x = Denoiser(network, network.schedule), network.sample(12)
    options = {**EXACT, "batch_size": 4, "cache": tmp_path}
    whole = likelihood(denoiser, x, **options)
    files = sorted(tmp_path.rglob("*.npz"))
    assert len(files) == 3
    files[1].write_bytes(files[1].read_bytes()[:100])  # cut off
    files[2].unlink()
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    again = likelihood(denoiser, x, **options)
    assert np.array_equal(whole.rows, again.rows)
    assert 2 < len(calls) == sum(again.evaluations[1:]) + 2  # two batches anew, and the check
    assert likelihood(denoiser, x, **{**options, "seed": 1}).rows.shape == (12,)
    assert len(list(tmp_path.iterdir())) == 2  # other settings, other parts


def test_results_do_not_depend_on_the_batch():
    network = MixtureNetwork(Discrete.linear(), MIXTURE, 0.3)
    x = network.sample(12)
    options = {**EXACT, "divergence": "rademacher", "method": "rk4", "steps": 20}
    whole, parts = (likelihood(Denoiser(network, network.schedule), x, **{**options, "batch_size": b}) for b in (12, 5))
    assert np.allclose(whole.rows, parts.rows, atol=1e-9)


class Linear(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, t):
        return self.dropout(x @ self.weight)


@pytest.mark.parametrize("looped", [False, True])
@pytest.mark.parametrize("divergence", ["exact", "rademacher"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_of_the_network_alone(dtype, divergence, looped):
    x = (torch.rand(4, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1).to(dtype).float()
    options = {"levels": None, "divergence": divergence, "method": "rk4", "steps": 8}

    def bits(data, kind):  # weights and slope have no rounding, so that the whole error is the solver's
        model = fastens.Ensemble([Scaled(0.5).to(kind), Scaled(0.25).to(kind)], engine="loop" if looped else "auto")
        return likelihood(Denoiser(model, VP()), data.to(kind), **options).rows

    np.testing.assert_allclose(bits(x, dtype), bits(x, torch.float32), atol=2e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "alternating"}, "draws members"),
        ({"rule": "mixture"}, "draws members"),
        ({"rule": fastens.rules.Geometric("batch"), "divergence": "exact"}, "rows depend on each other"),
        ({"data": torch.full((2, 2), 1.5)}, r"expected \[-1, 1\]"),
        ({"data": torch.full((2, 2), float("nan"))}, "nan"),
        ({"data": torch.zeros(0, 2)}, "N >= 1"),
        ({"method": "rk5"}, "dopri5"),
        ({"divergence": "sliced"}, "rademacher"),
        ({"dequantisation": "variational"}, "uniform"),
        ({"levels": 1}, "at least 2"),
        ({"repeats": 0}, "at least 1"),
        ({"dropout": 0.5}, "two results"),
        ({"masks": "fresh"}, "two results"),
        ({"masks": "fresh", "method": "rk4"}, "two results"),
    ],
)
def test_bad_input(options, message):
    options = dict(options)
    data = options.pop("data", torch.zeros(2, 2))
    dropout = options.pop("dropout", 0.0)
    if "masks" in options:
        ensemble = fastens.MCDropout(Linear(0.5), 2, masks=options.pop("masks"))
    else:
        members = [Linear(dropout).train(dropout > 0)] * 2
        ensemble = fastens.Ensemble(members, options.pop("rule", "mean"), engine="loop")
    with pytest.raises(ValueError, match=message):
        likelihood(Denoiser(ensemble, VP()), data, **options)

"""Sampling, the noise that it starts from, and the judgement of samples."""

import numpy as np
import pytest
import torch
from torch import nn

import fastens
from fastens.composition import Guided, compose
from fastens.evaluation import Denoiser, features, quality, sample
from fastens.evaluation.classifier import train_classifier
from fastens.evaluation.results import Parts
from fastens.files import write_whole
from fastens.reference.normal import normal
from fastens.schedules import EDM, VP, Discrete, Flow
from tests.evaluation.densities import MixtureNetwork


def test_normal_is_standard():
    x = normal(1, 0, torch.arange(2000), (33,)).double()
    assert x.shape == (2000, 33)
    assert abs(float(x.mean())) < 0.02
    assert abs(float(x.var()) - 1) < 0.02
    assert float((x.T @ x / 2000 - torch.eye(33)).abs().max()) < 0.12
    tail = (x.abs() > 1.959964).double().mean()
    assert abs(float(tail) - 0.05) < 0.005


def test_normal_is_a_function_of_its_counter():
    whole = normal(5, 3, torch.arange(10), (2, 3))
    assert torch.equal(whole[[7, 2]], normal(5, 3, torch.tensor([7, 2]), (2, 3)))
    assert torch.equal(whole.flatten(1)[:, :5], normal(5, 3, torch.arange(10), (5,)))
    assert torch.equal(whole[4:5], normal(5, torch.tensor([3]), torch.tensor([4]), (2, 3)))
    for other in (normal(6, 3, torch.arange(10), (2, 3)), normal(5, 4, torch.arange(10), (2, 3))):
        assert not torch.isclose(whole, other).any()
    far = normal(5, 3, torch.tensor([2**40, 2**40 + 1]), (2, 3))
    assert torch.isfinite(far).all()
    assert not torch.equal(far[0], far[1])


@pytest.fixture(scope="module")
def denoiser():
    schedule = Discrete.linear()
    networks = [MixtureNetwork(schedule, [[0.5, 0.5], [-0.5, m]], 0.1) for m in (0.0, 0.1)]
    return Denoiser(fastens.Ensemble(networks, engine="loop"), schedule)


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [(Discrete.linear(), "epsilon"), (VP(), "v"), (EDM(), "x0"), (Flow(), "flow"), (Flow(1), "flow")],
)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_follow_the_data(schedule, prediction, eta):
    network = MixtureNetwork(schedule, [[0.5, 0.5], [-0.5, 0.0]], 0.1, prediction)
    drawn = sample(Denoiser(network, schedule, prediction), 400, (2,), steps=60, eta=eta, clip=None, batch_size=400)
    upper = drawn[:, 0] > 0
    assert abs(float(upper.double().mean()) - 0.5) < 0.1
    assert torch.allclose(drawn[upper].mean(0), torch.tensor([0.5, 0.5]), atol=0.05)
    assert torch.allclose(drawn[~upper].std(0), torch.tensor([0.1, 0.1]), atol=0.03)


@pytest.mark.parametrize("rule", ["mean", "median", "alternating", "mixture"])
def test_batch_size_does_not_matter(denoiser, rule):
    denoiser.model.rule = rule
    options = {"steps": 8, "eta": 0.5}
    whole, parts = (sample(denoiser, 11, (2,), batch_size=b, **options) for b in (11, 4))
    assert torch.allclose(whole, parts, atol=1e-5)
    assert not torch.allclose(whole, sample(denoiser, 11, (2,), seed=1, **options), atol=0.1)
    denoiser.model.rule = "mean"


class Dropping(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.drop, self.last = nn.Linear(2, 16), nn.Dropout(0.4), nn.Linear(16, 2)

    def forward(self, x, t, label=0.0):
        return self.last(self.drop(self.first(x + torch.as_tensor(label).reshape(-1, 1)).tanh()))


@pytest.mark.parametrize(
    "model",
    [
        lambda: fastens.MCDropout(Dropping(), 3, masks="fresh"),
        lambda: fastens.MCDropout(Dropping(), 3, "alternating", masks="fresh"),
        lambda: compose(
            fastens.Ensemble([Dropping(k).eval() for k in range(3)], "alternating"),
            Guided(2.0, unconditional={"label": 1.0}, conditional={"label": 0.0}),
        ),
    ],
    ids=["fresh masks", "fresh masks of drawn members", "a composition"],
)
def test_what_is_drawn_depends_on_seed_and_sample_alone(model):
    denoiser = Denoiser(model(), VP())
    options = {"steps": 4, "seed": 5}
    whole = sample(denoiser, 7, (2,), batch_size=7, **options)
    assert torch.allclose(sample(denoiser, 7, (2,), batch_size=3, **options), whole, atol=1e-5)  # in any batches, again
    assert torch.allclose(sample(Denoiser(model(), VP()), 2, (2,), **options), whole[:2], atol=1e-5)
    assert not torch.allclose(sample(denoiser, 7, (2,), steps=4, seed=6), whole, atol=0.05)


def test_interrupted_sampling_goes_on(denoiser, tmp_path):
    options = {"steps": 5, "eta": 1.0, "batch_size": 4}
    whole = sample(denoiser, 12, (2,), **options)
    sample(denoiser, 8, (2,), cache=tmp_path, **options)
    files = sorted(tmp_path.rglob("*.npz"))
    assert len(files) == 2
    stamp = files[0].stat().st_mtime_ns
    files[1].write_bytes(b"PK half of a file")
    assert torch.equal(sample(denoiser, 12, (2,), cache=tmp_path, **options), whole)
    assert files[0].stat().st_mtime_ns == stamp


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write_whole(path, b"before")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"report\.json cannot be written: No space left"):
        write_whole(path, b"after" * 1000)
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    with pytest.raises(OSError, match="cannot be written"):
        Parts(tmp_path, "key").write("part", {"x": np.zeros(3)})
    assert Parts(tmp_path, "key").read("part") is None


@pytest.mark.parametrize("options", [{"steps": 0}, {"eta": 1.5}, {"batch_size": 0}])
def test_bad_sampling(denoiser, options):
    with pytest.raises(ValueError, match="at least 1"):
        sample(denoiser, 2, (2,), **options)


# Quality


def gaussian(num, size, shift=0.0, scale=1.0, seed=0):
    return shift + scale * torch.randn(num, size, generator=torch.Generator().manual_seed(seed))


def test_frechet_distance_of_gaussians():
    """|m1 - m2|^2 + d (s1 - s2)^2 for isotropic Gaussians."""
    found = quality(gaussian(4000, 4, 0.5, 1.5), gaussian(4000, 4, seed=1), resamples=20)
    expected = 4 * 0.25 + 4 * 0.25
    assert found.frechet.low < expected < found.frechet.high
    assert found.frechet.value == pytest.approx(expected, rel=0.08)


def test_equal_distributions():
    found = quality(gaussian(1000, 8), gaussian(1000, 8, seed=1), logits=gaussian(1000, 5), resamples=20)
    assert found.frechet.value < 0.1
    assert abs(found.kernel.value) < 0.02
    assert found.precision > 0.9
    assert found.recall > 0.9
    assert found.score is not None
    assert 1 < found.score.value < 5


@pytest.mark.parametrize(("number", "subset_size"), [(240, 1000), (240, 60)])
def test_kernel_distance_strays_as_its_interval_says(number, subset_size):
    seeds = range(0, 160, 2)
    pairs = [(gaussian(number, 8, 0.3, 1.2, seed), gaussian(number, 8, seed=seed + 1)) for seed in seeds]
    found = [quality(*pair, resamples=1, subset_size=subset_size).kernel for pair in pairs]
    strays = np.std([each.value for each in found], ddof=1)  # of so many: 8 % off, two times out of three
    said = np.mean([each.high - each.value for each in found]) / 1.959964
    assert 0.85 < said / strays < 1.4


@pytest.mark.parametrize("shift", [0.0, 300.0])
def test_kernel_distance_is_computed_in_float64(shift):
    one, other = gaussian(60, 3) + shift, gaussian(60, 3, seed=1) + shift
    ours, theirs, both = (
        (x.double() @ y.double().T / 3 + 1) ** 3 for x, y in ((one, one), (other, other), (one, other))
    )
    apart = 1 - torch.eye(60, dtype=torch.float64)
    expected = ((ours + theirs) * apart).sum() / (60 * 59) - 2 * both.mean()
    assert quality(one, other, resamples=1).kernel.value == pytest.approx(float(expected), rel=1e-6)


def test_manifolds_are_where_they_are_shifted_to():
    one, other = gaussian(200, 8), gaussian(200, 8, scale=0.9, seed=1)
    here, there = (quality(one + shift, other + shift, resamples=1) for shift in (0.0, 1024.0))
    assert (here.precision, here.recall) == pytest.approx((there.precision, there.recall), abs=0.006)


def test_far_distributions():
    found = quality(gaussian(300, 4, 20.0), gaussian(300, 4), resamples=5)
    assert (found.precision, found.recall) == (0, 0)
    assert found.frechet.value == pytest.approx(1600, rel=0.05)


def test_narrow_samples_lose_recall():
    found = quality(gaussian(500, 4, scale=0.2), gaussian(500, 4), resamples=5)
    assert found.precision > 0.95
    assert found.recall < 0.6


def test_generators_of_other_devices_are_left_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the GPUs' generators were seeded"))
    quality(gaussian(60, 4), gaussian(60, 4, seed=1), resamples=1)
    train_classifier(torch.randn(8, 1, 4, 4), torch.arange(8) % 2, epochs=1)


def test_quality_is_reproducible():
    sets = gaussian(200, 4), gaussian(150, 4, seed=1)
    state = torch.random.get_rng_state()
    assert quality(*sets, resamples=5) == quality(*sets, resamples=5)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("generated", "real", "message"),
    [
        (gaussian(4, 8), gaussian(100, 8), "4 generated samples are too few .* at least 9"),
        (gaussian(100, 8), gaussian(8, 8), "8 real samples are too few .* at least 9"),
        (gaussian(100, 7), gaussian(100, 8), "one feature network"),
        (torch.full((100, 8), float("nan")), gaussian(100, 8), "not all finite"),
    ],
)
def test_bad_features(generated, real, message):
    with pytest.raises(ValueError, match=message):
        quality(generated, real)


@pytest.mark.parametrize("neighbours", [0, 100])
def test_neighbours_that_there_are_not(neighbours):
    with pytest.raises(ValueError, match=f"neighbours is {neighbours}, expected 1 to 99 for 100 samples"):
        quality(gaussian(100, 8), gaussian(100, 8, seed=1), resamples=1, neighbours=neighbours)


def test_features_stream():
    network = nn.Flatten()
    images = torch.arange(24.0).reshape(6, 1, 2, 2)
    streamed = features(network, (part for part in images.split(4)))
    assert torch.equal(streamed, features(network, images))
    with pytest.raises(ValueError, match=r"\[6, 1, 2, 2\]"):
        features(nn.Identity(), images)
    with pytest.raises(ValueError, match="no images"):
        features(network, [])

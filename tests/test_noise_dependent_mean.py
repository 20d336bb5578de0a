"""Weights that depend on the noise level, as an ensemble's rule: in pipelines, EDM samplers, files and evaluation."""

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import nn

import fastens
from fastens import rules, schedules
from fastens.aggregation import weights_at
from fastens.evaluation import Denoiser, denoising_loss, fit_weights, held_out_gain, likelihood, sample
from tests.interop.test_edm import Preconditioned, edm_sampler
from tests.networks import randomised, small_unet
from tests.tolerances import relative_error

SCHEDULE = schedules.Discrete.linear()
# all of member 0 where there is little noise, all of member 1 where there is much
RULE = rules.NoiseDependentMean(((0.0, 1.0), (0.5, 0.5), (1.0, 0.0)), (-4.0, 0.0, 4.0))


class Network(nn.Module):
    def __init__(self, channels=2):
        super().__init__()
        self.inner = nn.Conv2d(2, channels, 3, padding=1)

    def forward(self, x, t):
        return self.inner(x).tanh() + 0.1


def by_hand(members, rule, x, t, schedule=SCHEDULE):
    """Row by row: a plain mean with the weights of the row's noise level."""
    outputs = torch.stack([member(x, t) for member in members])
    times = torch.as_tensor(t).reshape(-1).expand(len(x))
    rows = [
        fastens.aggregate(outputs[:, i : i + 1], rule.at(float(schedule.log_snr(schedule.time(time)))))
        for i, time in enumerate(times)
    ]
    return torch.cat(rows)


@pytest.fixture
def members():
    return [randomised(Network, seed) for seed in range(2)]


@pytest.fixture
def x():
    return torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("engine", ["fold", "loop"])
@pytest.mark.parametrize(
    "t", [0, 20.5, 999, torch.tensor(300), torch.tensor([300]), torch.tensor([3, 200, 500, 999])], ids=str
)
def test_every_row_has_the_weights_of_its_level(members, x, engine, t):
    ensemble = fastens.Ensemble(members, RULE, schedule=SCHEDULE, engine=engine)
    with torch.no_grad():
        expected = by_hand(members, RULE, x, t)
        assert relative_error(ensemble(x, t), expected) < 1e-6
        assert relative_error(ensemble(x, t=t), expected) < 1e-6
        assert relative_error(ensemble.forward_with_variance(x, t)[0], expected) < 1e-6
    ensemble(x, t).sum().backward()
    assert all(p.grad is not None for p in ensemble.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_and_nan(members, x, dtype):
    ensemble = fastens.Ensemble(members, RULE, schedule=SCHEDULE).to(dtype)
    with torch.no_grad():
        assert ensemble(x.to(dtype), 500).dtype == dtype
        first = next(iter(ensemble.parameters()))
        first[1].fill_(torch.nan)
        ensemble.refresh()
        assert ensemble(x.to(dtype), 500).isnan().all()
        assert ensemble(x.to(dtype), 0).isfinite().all()  # member 1 has no weight there


def test_levels_beyond_the_ends():
    levels = torch.tensor([-torch.inf, torch.inf, torch.nan], dtype=torch.float64)
    assert torch.equal(weights_at(RULE, levels)[:, :2], torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double())
    assert weights_at(RULE, levels)[:, 2].isnan().all()
    one = rules.NoiseDependentMean(((0.3, 0.7),), (0.0,))
    assert weights_at(one, levels[:2]).tolist() == [[0.3, 0.3], [0.7, 0.7]]


def test_another_schedule_has_other_times(members, x):
    """A rule knows noise levels, not times: fitted under one schedule it holds under another."""
    vp = schedules.VP()
    t = 0.3
    step = float(torch.tensor([float(SCHEDULE.log_snr(i)) for i in range(1000)]).sub(vp.log_snr(t)).abs().argmin())
    ensemble = fastens.Ensemble(members, RULE, schedule=vp)
    other = fastens.Ensemble(members, RULE, schedule=SCHEDULE)
    with torch.no_grad():
        assert relative_error(ensemble(x, t), other(x, step)) < 1e-2
        assert relative_error(ensemble(x, 0.9), ensemble(x, 0.01)) > 1e-2


@pytest.mark.parametrize("saved", [False, True])
def test_diffusers_pipeline(saved, tmp_path):
    members = [randomised(small_unet, seed) for seed in range(2)]
    scheduler = DDIMScheduler()
    ensemble = fastens.Ensemble(members, RULE, schedule=scheduler)
    if saved:
        ensemble.save_pretrained(tmp_path)
        ensemble = fastens.Ensemble.from_pretrained(tmp_path)
        assert ensemble.rule == RULE
    pipe = DDIMPipeline(unet=ensemble, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    options = {"batch_size": 2, "num_inference_steps": 4, "output_type": "np"}
    images = pipe(generator=torch.Generator().manual_seed(0), **options).images

    class ByHand(nn.Module):
        config, dtype, device = members[0].config, torch.float32, torch.device("cpu")

        def forward(self, x, t, return_dict=True):
            singles = [lambda x, t, member=member: member(x, t, return_dict=False)[0] for member in members]
            return type("Output", (), {"sample": by_hand(singles, RULE, x, t)})

    pipe.unet = ByHand()
    with torch.no_grad():
        expected = pipe(generator=torch.Generator().manual_seed(0), **options).images
    assert np.abs(images - expected).max() < 1e-4


def test_edm_sampler():
    """Networks of EDM take sigma itself: their noise level is known without a schedule."""
    members = [randomised(Preconditioned, seed) for seed in range(2)]
    noise = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))

    class ByHand(nn.Module):
        sigma_min, sigma_max, round_sigma = 0.0, float("inf"), members[0].round_sigma

        def forward(self, x, sigma, labels=None):
            return by_hand([lambda x, s, m=m: m(x, s, labels) for m in members], RULE, x, sigma, schedules.EDM())

    with torch.no_grad():
        ours = edm_sampler(fastens.Ensemble(members, RULE), noise, churn=10.0)
        assert relative_error(ours, edm_sampler(ByHand(), noise, churn=10.0)) < 1e-5


def test_held_out_gain_is_the_ensembles(members):
    """What is reported from Gram matrices is what the ensemble with the rule does."""
    data = torch.rand(12, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ensemble = fastens.Ensemble(members, schedule=SCHEDULE)
    denoiser = Denoiser(ensemble, SCHEDULE)
    fitted = fit_weights(denoising_loss(denoiser, data[:6], times=5))
    held = denoising_loss(denoiser, data[6:], times=5, seed=1, rule_names=("mean", fitted))
    gain = held_out_gain(fitted, held)
    assert isinstance(fitted, rules.Mean)
    assert gain.value > 0
    from_stack = held.estimate(held.rules["mean"] - held.rules["noise_dependent_mean"])
    assert (from_stack.value, from_stack.error) == pytest.approx((gain.value, gain.error), rel=1e-3)

    class OneModel(nn.Module):  # seen from outside: nothing but what the ensemble returns
        def __init__(self):
            super().__init__()
            self.inner = ensemble

        def forward(self, x, t):
            return self.inner(x, t)

    losses = {}
    for rule in ("mean", fitted):
        ensemble.rule = rule
        alone = denoising_loss(Denoiser(OneModel(), SCHEDULE), data[6:], times=5, seed=1)
        losses[rule] = alone.members[0]
    seen = held.estimate(losses["mean"] - losses[fitted])
    assert (seen.value, seen.error) == pytest.approx((gain.value, gain.error), rel=1e-3)


def test_samples_and_likelihood_under_it(members):
    ensemble = fastens.Ensemble(members, RULE, schedule=SCHEDULE)
    denoiser = Denoiser(ensemble, SCHEDULE)
    drawn = sample(denoiser, 3, (2, 4, 4), steps=3)
    ensemble.rule = "mean"
    assert not torch.allclose(drawn, sample(denoiser, 3, (2, 4, 4), steps=3), atol=1e-3)
    ensemble.rule = RULE
    options = {"method": "rk4", "steps": 2, "divergence": "exact", "levels": None}
    assert np.isfinite(likelihood(denoiser, drawn[:1], **options).rows).all()


def test_where_no_noise_level_is_found(members, x):
    with pytest.raises(ValueError, match="needs the noise level: pass schedule="):
        fastens.Ensemble(members, RULE)
    ensemble = fastens.Ensemble(members)
    with pytest.raises(ValueError, match="needs the noise level: pass schedule="):
        ensemble.rule = RULE
    assert ensemble.rule == rules.Mean()
    with pytest.raises(ValueError, match="one weight per member, 3, got 2"):
        fastens.Ensemble([members[0]] * 3, RULE, schedule=SCHEDULE)
    with pytest.raises(ValueError, match=r"aggregate: rule 'noise_dependent_mean' needs the noise level"):
        fastens.aggregate(torch.zeros(2, 3, 4), RULE)
    timeless = [randomised(lambda: nn.Conv2d(2, 2, 1), seed) for seed in range(2)]
    with pytest.raises(ValueError, match="found no time among the arguments"):
        fastens.Ensemble(timeless, RULE, schedule=SCHEDULE)(x)
    with pytest.raises(ValueError, match=r"the time is \[3\], expected one number, or one per sample, \[4\]"):
        fastens.Ensemble(members, RULE, schedule=SCHEDULE)(x, torch.zeros(3))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(members, x, dynamic):
    torch.compiler.reset()  # recompilations of all tests in one process would exceed their limit
    ensemble = fastens.Ensemble(members, RULE, schedule=SCHEDULE)
    compiled = torch.compile(ensemble, fullgraph=True, dynamic=dynamic, backend="eager")
    t = torch.tensor([3, 200, 500, 999])
    with torch.no_grad():
        for rows in (4, 3, 2) if dynamic else (4,):
            assert relative_error(compiled(x[:rows], t[:rows]), ensemble(x[:rows], t[:rows])) < 1e-6

"""guided-diffusion: model(x, t, y=...) with 2C output channels, of which the second half are variances."""

import pytest
import torch
from torch import nn

import fastens
from tests.networks import randomised
from tests.tolerances import relative_error


class LearnedSigma(nn.Module):
    """Labels by keyword; normalisation that computes in float32, as there."""

    def __init__(self):
        super().__init__()
        self.inner, self.emb = nn.Conv2d(3, 8, 3, padding=1), nn.Embedding(4, 8)
        self.time, self.outer = nn.Linear(1, 8), nn.Conv2d(8, 6, 3, padding=1)

    def forward(self, x, timesteps, y=None):
        emb = self.time(timesteps[:, None].float() / 1000) + self.emb(y)
        return self.outer(torch.tanh(self.inner(x) + emb[:, :, None, None]))


def ancestral(model, labels, steps=4):
    """Ancestral sampling with learned variances, arXiv 2102.09672: log variance between beta and its posterior."""
    assert next(model.parameters()).device.type == "cpu"
    generator = torch.Generator().manual_seed(0)
    kept = torch.linspace(0.99, 0.05, steps)
    x = torch.randn(len(labels), 3, 8, 8, generator=generator)
    for i in reversed(range(steps)):
        output = model(x, torch.full((len(labels),), i * 1000 // steps), y=labels)
        eps, share = output.chunk(2, 1)
        before = kept[i - 1] if i else torch.tensor(1.0)
        beta = 1 - kept[i] / before
        x0 = ((x - (1 - kept[i]).sqrt() * eps) / kept[i].sqrt()).clamp(-1, 1)
        mean = (before.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - before) * x) / (1 - kept[i])
        posterior = (beta * (1 - before) / (1 - kept[i])).clamp_min(1e-6)
        share = (share + 1) / 2
        deviation = (0.5 * (share * beta.log() + (1 - share) * posterior.log())).exp()
        x = mean + (deviation * torch.randn(x.shape, generator=generator) if i else 0)
    return x


@pytest.mark.parametrize("rule", ["mean", "median", "dominant"])
def test_sampler(rule):
    members = [randomised(LearnedSigma, seed) for seed in range(3)]
    labels = torch.tensor([0, 3])

    class Expected(nn.Module):
        def __init__(self):
            super().__init__()
            self.members = nn.ModuleList(members)

        def forward(self, *args, **kwargs):
            stack = torch.stack([member(*args, **kwargs) for member in self.members])
            first = fastens.aggregate(stack[:, :, :3].contiguous(), rule, backend="reference")
            return torch.cat([first, stack[:, :, 3:].mean(0)], 1)

    with torch.no_grad():
        assert relative_error(ancestral(fastens.Ensemble(members, rule), labels), ancestral(Expected(), labels)) < 1e-4


def ddim(model, labels, kept):
    """DDIM from pure noise, arXiv 2010.02502, with x0 clamped at each step: every x after it."""
    x = torch.randn(len(labels), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    steps = []
    for i in reversed(range(len(kept))):
        eps = model(x, torch.full((len(labels),), i * 1000 // len(kept)), y=labels)[:, :3]
        x0 = ((x - (1 - kept[i]).sqrt() * eps) / kept[i].sqrt()).clamp(-1, 1)
        eps = (x - kept[i].sqrt() * x0) / (1 - kept[i]).sqrt()
        before = kept[i - 1] if i else torch.tensor(1.0)
        x = before.sqrt() * x0 + (1 - before).sqrt() * eps
        steps.append(x)
    return steps


def test_ddim_multiplies_rounding_by_the_first_step():
    """Where the schedule begins in pure noise, x0 is the network's output times 1 / sqrt(kept), its rounding too.

    So samples in float32 differ by more than outputs do, whoever computed them: by half a unit in the last place of the
    outputs, the members' own loop moves as far as the ensemble is from it.
    """
    members = [randomised(LearnedSigma, seed) for seed in range(3)]
    labels, kept = torch.tensor([0, 3]), torch.tensor([0.9999, 0.3186, 0.010984, 4.0358e-5])  # beta linear to 0.02
    ensemble = fastens.Ensemble(members)
    looped = lambda *args, **kwargs: torch.stack([m(*args, **kwargs) for m in members]).mean(0)  # noqa: E731
    moved = lambda *args, **kwargs: looped(*args, **kwargs) * (1 + 2**-22)  # noqa: E731
    with torch.no_grad():
        ours, loop, other = (ddim(model, labels, kept) for model in (ensemble, looped, moved))
        x, t = torch.randn(2, 3, 8, 8), torch.full((2,), 999)
        apart = (ensemble(x, t, y=labels) - looped(x, t, y=labels)).abs().max()
    assert apart < 1e-5
    for a, b, c in zip(ours, loop, other, strict=True):
        assert (a - b).abs().max() <= 4 * (c - b).abs().max() + 1e-6
        assert (a - b).abs().max() < 1e-5 / kept[-1].sqrt()


@pytest.mark.parametrize("rule", ["mixture", "alternating"])
def test_random_rules_take_the_drawn_members_variances(rule):
    members = [randomised(LearnedSigma, seed) for seed in range(3)]
    ensemble = fastens.Ensemble(members, rule)
    x, t, y = torch.randn(6, 3, 8, 8), torch.zeros(6), torch.arange(6) % 4
    with torch.no_grad(), ensemble.trajectory(6, 0):
        output = ensemble(x, t, y=y)
        stack = torch.stack([member(x, t, y=y) for member in members])
    nearest = (stack - output).abs().amax((2, 3, 4)).amin(0)
    assert nearest.max() < 1e-4

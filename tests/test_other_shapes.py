"""Scores of other shapes, sampled as by the loop: ratios of tokens, strokes, heads of tokens, augmentation's labels."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastens
from tests.atlas.of_papers import SEDD
from tests.networks import EDMLike, GRUDenoiser, randomised

K, VOCABULARY = 3, 11


def members_of(make):
    return [randomised(make, seed).eval().double() for seed in range(K)]


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@fastens.rule
def mean_ratio(log_ratios: torch.Tensor) -> torch.Tensor:
    """The arithmetic mean of ratios that networks give by their logarithm, as SEDD's; log_ratios: [K, B, ...]."""
    return log_ratios.logsumexp(0) - torch.tensor(float(len(log_ratios)), dtype=log_ratios.dtype).log()


# The mean of log-ratios is the geometric mean of the ratios.
IN_LOG_SPACE = {
    "geometric": ("mean", lambda logs: logs.exp().log().mean(0)),
    "arithmetic": (mean_ratio(), lambda logs: logs.exp().mean(0).log()),
    "product": ("sum", lambda logs: logs.exp().prod(0).log()),
}


def tau_leaping(log_ratios, steps=5, rows=4, length=6):
    """SEDD's sampler under uniform noise (arXiv 2310.16834, eq. 17): a step by the rates of every other token."""
    tokens = torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
    for step, sigma in enumerate(torch.linspace(2, 0.1, steps)):
        rates = 0.3 * log_ratios(tokens, sigma.repeat(rows)).exp() / VOCABULARY
        rates = rates.scatter(-1, tokens[..., None], 0.0)
        stay = (1 - rates.sum(-1, keepdim=True)).clamp(min=0)
        weights = rates.scatter(-1, tokens[..., None], stay)
        uniform = torch.rand(weights.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        tokens = (weights.log() - (-uniform.log()).log()).argmax(-1)  # Gumbel's
    return tokens


@pytest.mark.parametrize("name", IN_LOG_SPACE)
def test_ratios_are_combined_in_log_space(name):
    rule, of_loop = IN_LOG_SPACE[name]
    members = [member.float() for member in members_of(functools.partial(SEDD, masked=False))]  # as its sigma_map is
    ensemble = fastens.Ensemble(members, rule)

    def loop(tokens, sigma):
        return of_loop(torch.stack([member(tokens, sigma) for member in members]))

    with torch.no_grad():
        tokens, sigma = torch.arange(12).view(2, 6) % VOCABULARY, torch.tensor([0.3, 1.5])
        torch.testing.assert_close(ensemble(tokens, sigma), loop(tokens, sigma), rtol=1e-5, atol=1e-5)
        found = tau_leaping(ensemble)
        assert torch.equal(found, tau_leaping(loop))
        assert not torch.equal(found, tau_leaping(members[0]))
    assert ensemble.engine == "fold"


def test_masked_tokens_are_uncovered_as_by_the_loop():
    """MDLM's ancestral sampler (arXiv 2406.07524): the mask has no mass in the mixture, and known tokens stay."""
    members = [member.float() for member in members_of(functools.partial(SEDD, masked=True))]
    ensemble = fastens.Ensemble(members, mean_ratio())  # the mixture of the members' probabilities

    def loop(tokens, t):
        return torch.stack([member(tokens, t) for member in members]).exp().mean(0).log()

    def sampled(log_probabilities, steps=5):
        tokens = torch.full((4, 6), VOCABULARY - 1)
        for step in range(steps):
            t, s = 1 - step / steps, 1 - (step + 1) / steps
            weights = (t - s) / t * log_probabilities(tokens, torch.full((4,), t)).exp()
            weights[..., -1] = s / t
            uniform = torch.rand(weights.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
            new = (weights.log() - (-uniform.log()).log()).argmax(-1)
            tokens = torch.where(tokens == VOCABULARY - 1, new, tokens)
        return tokens

    with torch.no_grad():
        found = sampled(ensemble)
        assert torch.equal(found, sampled(loop))
    assert (found < VOCABULARY - 1).all()


def euler(predict, x, steps=5):
    for t in torch.linspace(1, 0.2, steps).double():
        x = x - predict(x, t.repeat(len(x))) / steps
    return x


def mean_of(members):
    return lambda *args, **kwargs: torch.stack([member(*args, **kwargs) for member in members]).mean(0)


@pytest.mark.parametrize("batch_first", [True, False])
def test_recurrent_denoisers_of_strokes(batch_first):
    members = members_of(functools.partial(GRUDenoiser, batch_first))
    strokes = drawn(4, 7, 3)  # of a pen: two coordinates, and whether it is down
    with torch.no_grad():
        found = euler(fastens.Ensemble(members), strokes)
        torch.testing.assert_close(found, euler(mean_of(members), strokes), rtol=1e-10, atol=1e-10)


class TokenHead(nn.Module):
    """The diffusion head of masked autoregressive models (arXiv 2406.11838): a small MLP on each token, given its z."""

    def __init__(self, channels=4, width=16, given=6):
        super().__init__()
        self.inner, self.given, self.time = nn.Linear(channels, width), nn.Linear(given, width), nn.Linear(1, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.modulation = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.SiLU()) for _ in range(2))
        self.outer = nn.Linear(width, channels)

    def forward(self, x, t, z):
        c = F.silu(self.given(z) + self.time(t.to(x)[:, None]))
        h = self.inner(x)
        for norm, modulation, mlp in zip(self.norms, self.modulation, self.mlps, strict=True):
            shift, scale, gate = modulation(c).chunk(3, -1)
            h = h + gate * mlp(norm(h) * (1 + scale) + shift)
        return self.outer(h)


def test_heads_of_tokens_have_each_members_own_condition():
    """Each member's backbone gives its own z for every token of the batch."""
    members, tokens = members_of(TokenHead), drawn(10, 4)
    given = [drawn(10, 6, seed=1 + k) for k in range(K)]
    with torch.no_grad():
        ensemble = fastens.Ensemble(members)
        found = euler(lambda x, t: ensemble(x, t, fastens.PerMember(given)), tokens)
        pairs = list(zip(members, given, strict=True))
        expected = euler(lambda x, t: torch.stack([member(x, t, z) for member, z in pairs]).mean(0), tokens)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


class Augmented(EDMLike):
    """An EDM network that is told how its input was augmented, as ScoreAug's are."""

    def __init__(self):
        super().__init__()
        self.map_augment = nn.Linear(3, 2, bias=False)

    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        if augment_labels is not None:
            x = x + self.map_augment(augment_labels.to(x))[:, :, None, None]
        return super().forward(x, sigma.to(torch.float32), class_labels)[..., : x.shape[2], : x.shape[3]]


def test_edm_networks_with_labels_of_augmentation():
    members = [randomised(Augmented, seed).eval() for seed in range(K)]  # whose norm is in float32
    ensemble, x, labels = fastens.Ensemble(members), drawn(4, 2, 8, 8).float(), drawn(4, 3, seed=2).float()

    def sampled(network, augment_labels):
        return euler(lambda x, t: network(x, t.float(), augment_labels=augment_labels), x)

    with torch.no_grad():
        found = sampled(ensemble, labels)
        torch.testing.assert_close(found, sampled(mean_of(members), labels), rtol=1e-4, atol=1e-4)
        assert (found - sampled(ensemble, torch.zeros_like(labels))).abs().max() > 1e-2


CALLS = {
    "sedd": (functools.partial(SEDD, masked=False), lambda: (torch.arange(12).view(2, 6) % VOCABULARY, torch.ones(2))),
    "token head": (TokenHead, lambda: (torch.randn(5, 4), torch.ones(5), torch.randn(5, 6))),
    "augmented": (Augmented, lambda: (torch.randn(2, 2, 8, 8), torch.ones(2), None, torch.randn(2, 3))),
}


@pytest.mark.parametrize("name", CALLS)
def test_they_are_planned(name):
    make, arguments = CALLS[name]
    ensemble = fastens.Ensemble([randomised(make, seed).eval() for seed in range(K)])
    given = arguments()
    with torch.no_grad():
        for _ in range(3):
            ensemble(*given)
        assert ensemble.verify(*given) < 1e-5
    report = ensemble.report()
    assert report.plans or not report.target, report.why_no_plan

"""Networks that draw random numbers are held against their members, both of which draw alike for once."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastens
from fastens.engine.predictable import PredictableDraws, Unpredictable
from fastens.fold.dispatch import RULES
from tests.fold.contract import K, made, near

ROWS, WIDTH = 4, 6
DRAWS = {
    "dropout": lambda h: F.dropout(h, 0.3, True),
    "dropout of channels": lambda h: F.dropout2d(h[..., None, None], 0.3, True)[..., 0, 0],
    "alpha dropout": lambda h: F.alpha_dropout(h, 0.3, True),
    "alpha dropout of channels": lambda h: F.feature_alpha_dropout(h[..., None, None], 0.3, True)[..., 0, 0],
    "attention": lambda h: F.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None], dropout_p=0.3)[:, 0],
    "rrelu": lambda h: F.rrelu(h, training=True),
    "randn": lambda h: h + torch.randn(len(h), WIDTH),
    "like": lambda h: h + torch.randn_like(h) * torch.rand_like(h),
    "randint": lambda h: h + torch.randint(2, 5, (len(h), 1)) + torch.randint(3, (1,)),
    "normal in place": lambda h: h + torch.empty_like(h).normal_(1, 2),
    "normal around values": lambda h: h + torch.normal(h.detach(), 0.5) + torch.normal(0.0, 1.0, (WIDTH,)),
    "uniform in place": lambda h: h + torch.empty(len(h), WIDTH).uniform_(-1, 2),
    "other distributions": lambda h: h + torch.empty_like(h).exponential_(2.0) + torch.empty_like(h).cauchy_(),
    "counts": lambda h: h + torch.poisson(h.abs()) + torch.empty_like(h).geometric_(0.5),
    "bernoulli": lambda h: h * torch.bernoulli(torch.sigmoid(h)) + torch.empty_like(h).bernoulli_(0.3),
    "gumbel": lambda h: F.gumbel_softmax(h, hard=True),
    "multinomial": lambda h: h[:, torch.multinomial(h.softmax(-1), 3)[0]].repeat(1, 2),
    "permutation": lambda h: h[torch.randperm(len(h))],
    "none": lambda h: h,
}


class Drawing(nn.Module):
    """Draws between two layers."""

    def __init__(self, draw):
        super().__init__()
        self.first, self.second, self.draw = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), draw

    def forward(self, x):
        return self.second(torch.tanh(DRAWS[self.draw](self.first(x))))


def ensemble_of(draw, **options):
    return fastens.Ensemble([made(lambda k: Drawing(draw), k) for k in range(K)], **options).train()


@pytest.mark.parametrize("grad", [False, True], ids=["no gradients", "gradients"])
@pytest.mark.parametrize("draw", DRAWS)
def test_fold_and_members_draw_alike(draw, grad):
    x, ensemble = torch.randn(ROWS, WIDTH), ensemble_of(draw)
    members = [made(lambda k: Drawing(draw), k).train() for k in range(K)]
    with torch.set_grad_enabled(grad):
        ensemble(x)
        assert ensemble.engine == "fold"
        with PredictableDraws():
            near(ensemble(x), torch.stack([member(x) for member in members]).mean(0))


@pytest.fixture
def wrong_rule(monkeypatch):
    """A fold whose hyperbolic tangents are those of the first member."""

    def wrong(fold, func, x):
        return fold.common(func(fold.stack(x)[0]))

    monkeypatch.setitem(RULES, torch.tanh, wrong)


@pytest.mark.parametrize("rule", ["mean", "alternating"])
@pytest.mark.parametrize("draw", DRAWS)
def test_a_fold_that_is_wrong_is_noticed(draw, rule, wrong_rule):
    """Whatever they draw: such a network was folded unchecked once."""
    ensemble = ensemble_of(draw, rule=rule)
    with torch.no_grad(), pytest.warns(UserWarning, match="one by one"):
        ensemble(torch.randn(ROWS, WIDTH))
    assert ensemble.engine == ("loop" if rule == "mean" else "fold")  # drawn rows are looped by themselves


def test_draws_leave_the_generator_as_the_call_does():
    x, one, other = torch.randn(ROWS, WIDTH), ensemble_of("like"), ensemble_of("like")
    other(x)
    torch.manual_seed(0)
    one(x)
    after_first = torch.rand(3)
    torch.manual_seed(0)
    other(x)
    assert torch.equal(torch.rand(3), after_first)


def test_a_network_that_draws_until_it_likes_the_number():
    """It is not held against its members, and no call goes on for good."""

    def until(h):
        while float(torch.rand(())) > 0.3:
            pass
        return h

    with PredictableDraws(), pytest.raises(Unpredictable, match="more than"):
        until(torch.zeros(1))


def test_what_is_drawn_in_an_unknown_way():
    with PredictableDraws(), pytest.raises(Unpredictable, match="dirichlet"):
        torch._sample_dirichlet(torch.ones(3))


def test_an_ensemble_whose_members_draw_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ensemble_of("dropout")(torch.randn(ROWS, WIDTH))

"""Methods of members: what their parameters enter is combined by the rule, what they do not enter is all members'."""

import pytest
import torch
from torch import nn

import fastens


class Network(nn.Module):
    """Methods as samplers call them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.inner, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
        self.register_buffer("levels", torch.linspace(0.1, 2.0, 5))

    @property
    def dtype(self):
        return next(self.parameters()).dtype

    def forward(self, x):
        return self.drop(self.inner(x))

    def velocity(self, x):
        return self.forward(x) - x

    def of_zero_head(self, x):
        return self.inner(x) * 0 + x

    def of_bias_alone(self, x):
        return x + self.inner.bias.to(x.dtype)

    def with_its_input(self, x):
        return self.inner(x), x

    def round_sigma(self, x):
        return self.levels[(self.levels - x.reshape(-1, 1)).abs().argmin(1)].to(self.dtype)

    def scaled(self, x):
        return x.to(self.inner.weight.device, self.dtype) / self.inner.weight.shape[0]


COMBINED = ["velocity", "of_zero_head", "of_bias_alone", "with_its_input"]
TAKEN = ["round_sigma", "scaled"]
MEMBERS = {
    "one": lambda: [Network(0)],
    "three": lambda: [Network(k) for k in range(3)],
    "equal": lambda: [Network(0) for _ in range(3)],
    "frozen": lambda: [Network(0).requires_grad_(False) for _ in range(3)],
    "one frozen": lambda: [Network(0).requires_grad_(False)],
    "one object": lambda: [Network(0)] * 3,
    "of other structure": lambda: [Network(0), Network(1).double().float(), differing(Network(2))],
}


def differing(network):
    network.apart = True
    return network


@pytest.mark.filterwarnings("ignore:fastens. all", "ignore:fastens. members are evaluated one by one")
@pytest.mark.parametrize("settings", [{}, {"engine": "loop"}, {"max_fold": 2}], ids=["folded", "looped", "in passes"])
@pytest.mark.parametrize("members", MEMBERS)
@pytest.mark.parametrize("method", COMBINED + TAKEN)
def test_weights_that_do_not_sum_to_one(method, members, settings):
    modules = [m.eval() for m in MEMBERS[members]()]
    ensemble = fastens.Ensemble(modules, fastens.rules.Product([0.7] * len(modules)), prediction="score", **settings)
    x = torch.rand(5, 4)
    with torch.no_grad():
        for call in range(3):
            each = [getattr(m, method)(x) for m in modules]
            found = getattr(ensemble, method)(x)
            if method in TAKEN:
                torch.testing.assert_close(found, each[0])
            else:
                columns = zip(*each, strict=True) if isinstance(each[0], tuple) else [each]
                leaves = found if isinstance(found, tuple) else (found,)
                for leaf, column in zip(leaves, columns, strict=True):
                    torch.testing.assert_close(leaf, 0.7 * torch.stack(list(column)).sum(0))
            ensemble(x + call)


@fastens.rule("of_corners")
def of_corners(scores):
    """A user's rule, of images alone."""
    return scores.mean(0) + scores[:, :, :, :1, :1].mean(0)


class Image(nn.Module):
    """A network of images with a method."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1)

    def forward(self, x):
        return self.layer(x)

    def twice(self, x):
        return self(self(x))


def test_a_rule_for_images_alone():
    members, x = [Image() for _ in range(3)], torch.randn(2, 1, 3, 3)
    found, stack = fastens.Ensemble(members, of_corners()).twice(x), torch.stack([m.twice(x) for m in members])
    torch.testing.assert_close(found, stack.mean(0) + stack[:, :, :, :1, :1].mean(0))

"""Methods named as forward is: one that needs a member's forward alone guides the ensemble's, others are members'."""

import pytest
import torch
from torch import nn

import fastens


class Network(nn.Module):
    """Methods as networks with guidance, and with a forward in parts, have them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.null = nn.Parameter(torch.empty(4))
        self.register_buffer("mean", torch.empty(4))
        with torch.no_grad():
            for x in (*self.parameters(), *self.buffers()):
                x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        self.scale, self.scales, self.calls = 2.0, {"guidance": 1.5}, 0

    def forward(self, x, null=False):
        return self.head((self.body(x) + (self.null if null else 0)).tanh())

    def forward_with_cfg(self, x, scale=3.0):
        return self.guided(self(x), self.forward(x, null=True), scale) * self.scale

    def guided(self, given, null, scale):
        return null + self.of_scale(scale) * (given - null)

    @staticmethod
    def of_scale(scale):
        return scale + 1

    def forward_features(self, x):
        return self.body(x)

    def forward_and_features(self, x):
        return self(x), self.body(x)

    def forward_head(self, x):
        return self.head(self.forward(x))

    def forward_from_null(self, x):
        return self.forward(x) - self.forward(self.null.expand_as(x))

    def forward_centred(self, x):
        return self(x - self.mean)

    def forward_by_weights(self, x):
        return self(x) * sum(p.pow(2).sum() for p in self.parameters())

    def forward_tried(self, x):
        try:
            return self.body(self(x))
        except Exception:
            return x

    def forward_by_a_part(self, x):
        return self.forward_helped(self(x))

    def forward_helped(self, x):
        return self.head(x)

    def forward_counted(self, x):
        self.calls += 1
        return self(x) * self.calls


class Derived(Network):
    """A class whose methods begin with those of its parent."""

    def forward_with_cfg(self, x, scale=3.0):
        return super().forward_with_cfg(x, scale) + 1

    def forward_features(self, x):
        return super().forward_features(x) + 1

    def forward_of_parent(self, x):
        return super().forward(x)


def scaled(network, scale):
    network.scale = network.scales["guidance"] = scale
    return network


def other_method(network):
    network.of_scale = lambda scale: 0.0
    return network


MEMBERS = {
    "alike": lambda kind: [kind(k) for k in range(3)],
    "of other values": lambda kind: [scaled(kind(k), k + 1.0) for k in range(3)],
    "of another class": lambda kind: [kind(0), type("Other", (kind,), {"of_scale": lambda self, s: s})(1), kind(2)],
    "of another method": lambda kind: [kind(0), other_method(kind(1)), kind(2)],
}


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")
@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("members", MEMBERS)
@pytest.mark.parametrize(
    ("kind", "method"),
    [(kind, name) for kind in (Network, Derived) for name in dir(kind) if name.startswith("forward_")],
)
def test_the_loop_s(kind, method, members, engine):
    ensemble, modules = fastens.Ensemble(MEMBERS[members](kind), engine=engine), MEMBERS[members](kind)
    for call in range(4):
        x = torch.randn(call % 2 + 2, 4, generator=torch.Generator().manual_seed(call))
        with torch.set_grad_enabled(call > 2):
            each, found = [getattr(m, method)(x) for m in modules], getattr(ensemble, method)(x)
        columns = zip(*each, strict=True) if isinstance(each[0], tuple) else [each]
        for leaf, column in zip(found if isinstance(found, tuple) else (found,), columns, strict=True):
            assert type(leaf) is torch.Tensor
            torch.testing.assert_close(leaf, torch.stack(list(column)).mean(0))


@pytest.mark.parametrize("kind", [Network, Derived])
def test_guidance_is_of_what_the_rule_gives(kind):
    modules, x = [kind(k) for k in range(3)], torch.randn(5, 4)
    ensemble = fastens.Ensemble(modules, "median")
    given, null = (torch.stack([m(x, each) for m in modules]).median(0).values for each in (False, True))
    expected = (null + 4 * (given - null)) * 2 + (kind is Derived)
    torch.testing.assert_close(ensemble.forward_with_cfg(x), expected)
    with ensemble.assigned([0, 1, 2, 1, 0]):
        rows = torch.stack(
            [modules[k].forward_with_cfg(row[None])[0] for k, row in zip([0, 1, 2, 1, 0], x, strict=True)]
        )
        torch.testing.assert_close(ensemble.forward_with_cfg(x), rows)
        with pytest.raises(ValueError, match="forward_features: members differ"):
            ensemble.forward_features(x)


@pytest.mark.parametrize(("method", "whole"), [("forward_with_cfg", True), ("forward_from_null", False)])
def test_compiled(method, whole):
    modules, x = [Network(k) for k in range(3)], torch.randn(2, 4)
    ensemble = fastens.Ensemble(modules)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: getattr(ensemble, method)(x), fullgraph=whole, backend="eager")
    torch.testing.assert_close(compiled(x), torch.stack([getattr(m, method)(x) for m in modules]).mean(0))

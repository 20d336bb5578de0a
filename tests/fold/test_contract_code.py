"""Members with code of their own, by patches, classes, hooks or options, run each by that code."""

import types

import pytest
import torch
from torch import nn

import fastens
from tests.fold.contract import Held, K, made
from tests.fold.test_contract_state import VECTORS


def patched(k):
    layer = nn.Linear(4, 4)
    forward = layer.forward
    layer.forward = lambda x: (k + 1) * forward(x)
    return nn.Sequential(layer, nn.Tanh())


def patched_method(k):
    layer = nn.Linear(4, 4)
    layer.forward = types.MethodType([nn.Linear.forward, doubled, negative][k], layer)
    return nn.Sequential(layer)


def doubled(layer, x):
    return 2 * nn.Linear.forward(layer, x)


def negative(layer, x):
    return -nn.Linear.forward(layer, x)


def class_of_its_own(k):
    class Own(nn.Linear):
        def forward(self, input):
            return super().forward(input) * (k + 1)

    return nn.Sequential(Own(4, 4))


def class_with_a_layer(k):
    """As a U-Net whose blocks are made by a function that holds one layer for all of them."""
    layer = nn.Linear(4, 4)

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return layer(x) + self.layer(x.tanh())

    return Own()


def class_attribute(k):
    return nn.Sequential(type("Own", (nn.Linear,), {"gain": k + 1.0, "forward": gained})(4, 4))


def gained(layer, x):
    return nn.Linear.forward(layer, x) * layer.gain


def hooked(k):
    layer, adapter = nn.Linear(4, 4), nn.Linear(4, 4)
    layer.register_forward_hook(lambda module, args, output: output + adapter(args[0]))
    network = nn.Sequential(layer, nn.Tanh())
    network.adapter = adapter
    network.forward = lambda x: network[1](network[0](x))
    return network


def pre_hooked(k):
    layer = nn.Linear(4, 4)
    layer.register_forward_pre_hook(lambda module, args: ((k + 1) * args[0],))
    return nn.Sequential(layer, nn.Tanh())


def hooked_or_not(k):
    layer = nn.Linear(4, 4)
    if k == 1:
        layer.register_forward_hook(twice)
    return nn.Sequential(layer)


def twice(module, args, output):
    return 2 * output


def other_option(k):
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, eps=10.0**-k), nn.GELU(["none", "tanh", "none"][k]))


def other_activation(k):
    return nn.Sequential(nn.Linear(4, 4), [nn.ReLU, nn.Tanh, nn.SiLU][k]())


def other_width(k):
    return nn.Sequential(nn.Linear(4, 3 + k), nn.Linear(3 + k, 4))


def ties(k):
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    if k:
        network[1].weight = network[0].weight
    return network


def inner_rules(k):
    inner = [made(lambda j: nn.Linear(4, 4), 5 + j) for j in range(2)]
    return fastens.Ensemble(inner, ["mean", "sum", "dominant"][k])


def inner_weights(k):
    inner = [made(lambda j: nn.Linear(4, 4), 5 + j) for j in range(2)]
    return fastens.Ensemble(inner, fastens.rules.Mean([0.25 + k, 0.75 - k]))


OWN_CODE = [
    patched, patched_method, class_of_its_own, class_with_a_layer, class_attribute, hooked, pre_hooked, hooked_or_not,
    other_option, other_activation, other_width, ties, inner_rules, inner_weights,
]  # fmt: skip


@pytest.mark.parametrize("make", OWN_CODE, ids=lambda make: make.__name__)
def test_code_of_its_own(make):
    held = Held(make)
    held.sampling(VECTORS)
    if make not in (other_width, ties, inner_rules, inner_weights):
        held.gradients(VECTORS)
    assert held.ensemble.engine == "loop"
    assert held.warned
    assert held.ensemble.verify(torch.randn(5, 4)) < 1e-5
    if make is not inner_rules:
        held.drawn(VECTORS)
    with pytest.raises(ValueError, match=r"differs from member 0|closure|copied|an ensemble itself"):
        fastens.Ensemble([made(make, k) for k in range(K)], engine="fold")

"""A compiled ensemble follows its network: modes, attributes, tensors and modules are what they are now."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import fastens
from tests.tolerances import NETWORK, relative_error


class Net(nn.Module):
    """Reads its mode, an attribute, a buffer and a submodule."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.norm, self.last = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 5)
        self.norm.get_buffer("running_mean").normal_()
        self.scale = 1.0
        self.register_buffer("shift", torch.randn(6))
        self.scales, self.options = [], {"negative": False}

    def append(self):
        self.scales.append(3.0)

    def choose(self):
        self.options["negative"] = True

    def ask(self):
        return len(self.scales)

    def forward(self, x):
        scale = -self.scale if self.options["negative"] else self.scale
        return scale * sum(self.scales, 1.0) * self.last(torch.relu(self.norm(self.first(x)) + self.shift))


class Compiled:
    """A compiled ensemble, and the members that stand for its loop."""

    def __init__(self):
        torch.compiler.reset()
        self.members = [Net(seed).double().eval() for seed in range(3)]
        self.ensemble = fastens.Ensemble(copy.deepcopy(self.members), engine="fold")
        self.graphs = 0
        self.run = torch.compile(self.ensemble, fullgraph=True, backend=self._compile)

    def _compile(self, graph, inputs):
        self.graphs += 1
        return aot_eager(graph, inputs)

    def check(self):
        x = torch.randn(4, 5, dtype=torch.float64)
        expected = torch.stack([member(x) for member in self.members]).mean(0)
        assert relative_error(self.run(x), expected) < NETWORK[torch.float64]


def trained(network):
    network.train()


def one_trained(network):
    network.norm.train()


def scaled(network):
    network.scale = 2.5


def other_parameter(network):
    network.first.weight = nn.Parameter(dict(network.named_parameters())["first.weight"].detach() * 2)


def other_buffer(network):
    network.shift = dict(network.named_buffers())["shift"] * 2


def other_module(network):
    torch.manual_seed(9)
    network.last = nn.Linear(6, 5).double()


@pytest.mark.parametrize("change", [trained, one_trained, scaled, other_parameter, other_buffer, other_module])
def test_a_change_after_compiling_is_noticed(change):
    compiled = Compiled()
    compiled.check()
    for network in (compiled.ensemble.network, *compiled.members):
        change(network)
    compiled.check()
    compiled.check()
    assert compiled.graphs == 2


def test_modes_that_come_back_and_trained_weights_compile_no_further():
    compiled = Compiled()
    for _ in range(5):
        for mode in (False, True):
            for module in (compiled.ensemble, *compiled.members):
                module.train(mode)
                with torch.no_grad():
                    for parameter in module.parameters():
                        parameter.mul_(1.1)
            compiled.check()
    assert compiled.graphs == 2


@pytest.mark.parametrize(("method", "graphs"), [("append", 2), ("choose", 2), ("ask", 1)])
def test_what_methods_change_inside_of_attributes_is_noticed(method, graphs):
    compiled = Compiled()
    compiled.check()
    for network in (compiled.ensemble, *compiled.members):
        getattr(network, method)()
    compiled.check()
    compiled.check()
    assert compiled.graphs == graphs

"""A compiled ensemble follows its network: modes, attributes, tensors and modules are what they are now."""

import copy
import types

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import aot_eager
from torch._functorch.aot_autograd import make_boxed_func

import fastens
from tests.fold.contract import made, near
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


GAIN = 1.0


class Reads(nn.Module):
    """Reads a global, and what is inside of a list, a dictionary and an object."""

    def __init__(self):
        super().__init__()
        self.layer, self.past, self.options, self.held = (
            nn.Linear(5, 5),
            [0.5],
            {"gain": 1.0},
            types.SimpleNamespace(x=2.0),
        )

    def forward(self, x):
        """All of them."""
        return GAIN * self.options["gain"] * self.held.x * self.layer(x) + sum(self.past)


OTHERS = {
    "global": lambda _, patch: patch.setitem(globals(), "GAIN", 3.0),
    "list": lambda m, _: m.past.append(1.5),
    "dictionary": lambda m, _: m.options.update(gain=2.0),
    "object": lambda m, _: setattr(m.held, "x", 4.0),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("change", OTHERS)
def test_a_graph_that_was_traced_when_code_read_other_values_raises(change, grad, monkeypatch):
    torch.compiler.reset()
    members = [made(lambda _: Reads(), k) for k in range(3)]
    ensemble = fastens.Ensemble(copy.deepcopy(members))
    compiled = torch.compile(ensemble, backend="aot_eager", fullgraph=True)

    def called():
        x = torch.randn(4, 5)
        with torch.set_grad_enabled(grad):
            found, expected = compiled(x), torch.stack([member(x) for member in members]).mean(0)
        near(found, expected)
        if grad:
            found.sum().backward()
            expected.sum().backward()
            weights = [member.layer.weight.grad for member in members]
            near(dict(ensemble.named_parameters())["network.layer.weight"].grad, torch.stack(weights), 1e-5)

    called()
    called()
    for each in (ensemble, *members):
        OTHERS[change](each, monkeypatch)
    with pytest.raises(RuntimeError, match="call it again, and it is traced anew"):
        called()
    called()
    called()


def test_no_cuda_graph_of_torchs_compilers_replays_without_asking():
    """Inductor cuts its graphs at the op, and the backend "cudagraphs" makes none: both ask this of a graph's nodes."""
    from torch._inductor.utils import get_first_incompatible_cudagraph_node

    torch.compiler.reset()
    graphs = []

    def keeps(graph, inputs):
        graphs.append(get_first_incompatible_cudagraph_node(graph))
        return make_boxed_func(graph.forward)

    ensemble = fastens.Ensemble([made(lambda _: Reads(), k) for k in range(3)])
    compiled = torch.compile(ensemble, backend=aot_autograd(fw_compiler=keeps), fullgraph=True)
    with torch.no_grad():
        compiled(torch.randn(4, 5))
    assert [node.target for node in graphs] == [torch.ops.fastens.as_traced.default]


class Leaves(nn.Module):
    """Does one thing to itself in every call."""

    def __init__(self, does):
        super().__init__()
        self.layer, self.does, self.kept = nn.Linear(4, 4), does, None
        self.register_buffer("average", torch.zeros(4))

    def forward(self, x):
        """One layer."""
        y = self.layer(x)
        self.does(self, y.detach())
        return y + self.average + (0 if self.kept is None else self.kept)


def scales_a_weight(member, y):
    with torch.no_grad():
        member.layer.bias.mul_(0.9)


def averages_in_place(member, y):
    member.average.mul_(0.9).add_(y.mean(0))


def keeps(member, y):
    member.kept = y.mean(0)


def keeps_and_scales(member, y):
    keeps(member, y)
    scales_a_weight(member, y)


@pytest.mark.covering(2)
@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize(
    ("called", "around", "backend"),
    [(False, False, "eager"), (True, False, "eager"), (False, True, "aot_eager")],
    ids=["ensemble", "called before", "function"],
)
@pytest.mark.parametrize("does", [scales_a_weight, averages_in_place, keeps, keeps_and_scales])
@pytest.mark.filterwarnings("ignore:fastens")
def test_members_that_write_to_themselves_are_compiled_or_called_outside(does, called, around, backend, engine):
    """Also where they become looped as the graph runs first, and where its batch is of any size."""
    torch._dynamo.reset()
    members = [made(lambda _: Leaves(does), k) for k in range(3)]
    ensemble = fastens.Ensemble(copy.deepcopy(members), engine=engine)
    compiled = torch.compile((lambda x: ensemble(2 * x) + 1) if around else ensemble, backend=backend)
    with torch.no_grad():
        for call, rows in enumerate((4, 5, 5)):
            x = torch.randn(rows, 4)
            own = [member(2 * x) + 1 if around else member(x) for member in members]
            near(ensemble(x) if called and not call else compiled(x), torch.stack(own).mean(0))

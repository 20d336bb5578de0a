"""The graph that a recording is lowered to, for both back ends."""

import inspect
import types

import pytest
import torch
import torch.utils._pytree as pytree

import fastens
from fastens import _native
from fastens.engine import planned
from fastens.plan import graph
from fastens.plan.cpu.emit import Emitter
from fastens.plan.gpu.legalize import Legalizer
from fastens.plan.lowering.lower import lower_all
from fastens.plan.memory import Argument, Cast, Constant, Constants, KeptTensors
from fastens.trace.jvp import EMPTY
from tests.networks import NETWORKS, randomised

pytestmark = pytest.mark.skipif(not _native.load(), reason=f"no compiled library: {_native.status()}")
BACK_ENDS = {"programs": "fastens.plan.cpu.plan", "launches": "fastens.plan.gpu.plan"}


def graphs_of(name, back_end, monkeypatch, batch=2):
    """The graphs that an ensemble's first call lowers its recordings to: builders."""
    make, arguments = NETWORKS[name]
    found = []

    def lowered(*given):
        found.append(lower_all(*given)[0])
        return lower_all(*given)

    monkeypatch.setattr(f"{BACK_ENDS[back_end]}.lower_all", lowered)
    monkeypatch.setattr(planned, "launches_on", lambda _: back_end == "launches")
    args, kwargs = arguments(batch)
    with torch.no_grad():
        fastens.Ensemble([randomised(make, seed) for seed in range(2)], engine="fold")(*args, **kwargs)
    return found


class Memory:
    """Which bytes of each buffer and output have been written."""

    def __init__(self):
        self.written = {}

    def part(self, view):
        where, size = view.where, view.dtype.itemsize
        where = where.where if isinstance(where, Cast) else where
        if where not in self.written:
            self.written[where] = torch.zeros(1 << 20, dtype=torch.bool)
        stride = tuple(step * size for step in view.stride)
        return self.written[where].as_strided((*view.size, size), (*stride, 1), view.offset * size)


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_what_a_node_reads_was_written_and_what_it_writes_is_read(name, back_end, monkeypatch):
    graphs = graphs_of(name, back_end, monkeypatch)
    assert graphs
    for builder in graphs:
        inputs, memory = len(builder.recording.inputs), Memory()
        # torch itself copies what is not written yet where it pads in circles, and writes it later
        every = torch.any if any(operation.name in EMPTY for operation in builder.recording.operations) else torch.all

        def given(view, inputs=inputs):
            where = view.where.where if isinstance(view.where, Cast) else view.where
            return isinstance(where, Constant) or (isinstance(where, Argument) and where.number < inputs)

        for node in builder.nodes:
            for view in node.reads():
                assert given(view) or every(memory.part(view)), (node.name, view)
            for view in node.writes():
                assert not given(view), (node.name, view)
                memory.part(view).fill_(True)
        read = [(i, view.where) for i, node in enumerate(builder.nodes) for view in node.reads()]
        for i, node in enumerate(builder.nodes):
            outputs = any(view.where in builder.arguments[inputs:] for view in node.writes())
            assert outputs or any(j > i and where in {view.where for view in node.writes()} for j, where in read), node
        for place, ref in zip(builder.arguments[inputs:], builder.recording.outputs, strict=True):
            assert bool(memory.written[place][: ref.numel * ref.dtype.itemsize].all())


def test_both_back_ends_take_every_kind_of_node():
    classes = (kind for _, kind in inspect.getmembers(graph, inspect.isclass) if issubclass(kind, graph.Node))
    kinds = set(classes) - {graph.Node, graph.Outputs}
    nothing = types.SimpleNamespace(nodes=[])
    assert set(Emitter(Constants(), 1, False).kinds) == kinds
    assert set(Legalizer(nothing, KeptTensors(), torch.device("cpu")).kinds) == kinds


@pytest.mark.parametrize("name", NETWORKS)
def test_operands_are_found_by_name_wherever_they_are(name, monkeypatch):
    """Replacing every view by another one, and back, is nothing; and each is seen by what reads or writes it."""
    for builder in graphs_of(name, "programs", monkeypatch):
        for node in builder.nodes:
            before = node.operands
            for view in dict.fromkeys(node.reads()):
                other = graph.View(view.where, view.offset + 1, view.size, view.stride)
                node.replace(view, other)
                assert view not in node.reads()
                node.replace(other, view)
            assert pytree.tree_map(str, node.operands) == pytree.tree_map(str, before)

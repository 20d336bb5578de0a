"""Replays on a device, with stand-ins on the CPU: changes after a recording, a second device, streams of threads."""

import ast
import contextlib
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastens
from fastens.device import device_of
from fastens.kernels import _graph
from tests.fold.test_launches import plan_of
from tests.fold.test_replays import MANY, log  # noqa: F401
from tests.tolerances import NETWORK, relative_error

KERNELS = Path(fastens.__file__).parent / "kernels"


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 3, 1)
        self.dropout = nn.Dropout(0.9)
        self.register_buffer("shift", torch.zeros(3, 1, 1))

    def forward(self, x):
        return self.last(self.dropout(nn.functional.silu(self.norm(self.first(x))))) + self.shift


def every(ensemble, change):
    for k, member in enumerate(ensemble.members):
        change(member)
        ensemble.replace_member(k, member)


def by_data(ensemble):
    for p in ensemble.parameters():
        p.data.mul_(1.5)
    ensemble.refresh()  # which is asked for: nothing else notices


def by_step(ensemble):
    optimizer = torch.optim.SGD(ensemble.parameters(), lr=0.5)
    for p in ensemble.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()


CHANGES = {
    "weights in place": lambda ensemble: [p.mul_(1.5) for p in ensemble.parameters()],
    "weights by data, and refreshed": by_data,
    "an optimizer's step": by_step,
    "buffers in place": lambda ensemble: [b.add_(1) for b in ensemble.buffers()],
    "a state dict": lambda ensemble: ensemble.load_state_dict({k: v + 1 for k, v in ensemble.state_dict().items()}),
    "members replaced": lambda ensemble: every(ensemble, lambda member: member.first.weight.data.mul_(2)),
    "the rule": lambda ensemble: setattr(ensemble, "rule", "median"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CHANGES)
def test_what_changed_since_the_recording_shows(log, name):  # noqa: F811
    torch.manual_seed(0)
    ensemble = fastens.Ensemble([Network().eval() for _ in range(3)], engine="fold").eval()
    x = torch.randn(2, 3, 6, 6)
    for _ in range(MANY):
        before = ensemble(x)
    assert "replay" in log
    CHANGES[name](ensemble)
    for _ in range(MANY):
        stack = torch.stack([member(x) for member in ensemble.members])
        assert relative_error(ensemble(x), fastens.aggregate(stack, ensemble.rule)) < NETWORK[torch.float32]
    assert relative_error(ensemble(x), before) > 1e-3


class Streams:
    """Streams, events and graphs of several devices, a current stream a thread, as a list of what is asked of them."""

    def __init__(self, monkeypatch):
        self.log, self.now = [], threading.local()
        for name in ("Stream", "CUDAGraph", "current_stream", "stream", "graph", "device"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def handle(self, name):
        def verb(what):
            return lambda other=None: self.log.append((name, what, getattr(other, "name", None)))

        return SimpleNamespace(
            name=name, **{what: verb(what) for what in ("wait_stream", "wait_event", "record", "replay")}
        )

    def Stream(self, device=None):
        return self.handle(f"side of {device}")

    def CUDAGraph(self):
        return self.handle("graph")

    def current_stream(self, device=None):
        return self.handle(getattr(self.now, "stream", None) or f"main of {device}")

    @contextlib.contextmanager
    def device(self, device):
        self.log.append(("enter", str(device), None))
        yield
        self.log.append(("leave", str(device), None))

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.now.stream = getattr(self.now, "stream", None), stream.name
        yield
        self.now.stream = before

    @contextlib.contextmanager
    def graph(self, graph, stream, capture_error_mode):
        self.log.append((graph.name, "capture on", stream.name))
        with self.stream(stream):
            yield


def test_a_graph_of_a_second_device_is_recorded_there(monkeypatch):
    cuda, second = Streams(monkeypatch), torch.device("cuda", 1)
    replay, _ = _graph.record_graph(lambda: cuda.log.append(("run", cuda.current_stream(second).name, None)), second, 1)
    ran = [i for i, (what, *_) in enumerate(cuda.log) if what == "run"]
    assert len(ran) == 2
    for i in ran:
        assert cuda.log[i][1] == "side of cuda:1"
        entered = [event for event in cuda.log[:i] if event[0] in ("enter", "leave")]
        assert entered[-1] == ("enter", "cuda:1", None)
    assert ("graph", "capture on", "side of cuda:1") in cuda.log
    assert ("side of cuda:1", "wait_stream", "main of cuda:1") in cuda.log
    assert ("main of cuda:1", "wait_stream", "side of cuda:1") in cuda.log
    replay()


@torch.no_grad()
def test_threads_with_streams_of_their_own_use_a_plan_one_after_another(log, monkeypatch):  # noqa: F811
    """Each waits on its own stream until the one before has read its result, and says on it when it has."""
    torch.manual_seed(0)
    ensemble = fastens.Ensemble([Network().eval() for _ in range(2)], engine="fold").eval()
    inputs = [torch.randn(1, 3, 6, 6) for _ in range(3)]
    expected = [torch.stack([member(x) for member in ensemble.members]).mean(0) for x in inputs]
    ensemble(inputs[0])
    plan = plan_of(ensemble)
    cuda = Streams(monkeypatch)
    monkeypatch.setattr(torch.cuda, "Event", lambda: cuda.handle("done"))
    plan._turns = device_of("cuda:1").turns()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    launch = plan._bound.launch

    def launched(*given):
        cuda.log.append((cuda.current_stream().name, "launch", None))
        return launch(*given)

    plan._bound.launch = launched
    wrong = []

    def work(number):
        with torch.no_grad(), cuda.stream(SimpleNamespace(name=f"stream {number}")):
            for _ in range(MANY):
                if relative_error(ensemble(inputs[number]), expected[number]) >= NETWORK[torch.float32]:
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    waits = [i for i, event in enumerate(cuda.log) if event[1] == "wait_event"]
    assert len({cuda.log[i][0] for i in waits}) == 3
    for start, end in zip(waits, [*waits[1:], len(cuda.log)], strict=True):
        (waiting, _, event), *inside, last = cuda.log[start:end]
        assert event == "done"
        assert last == ("done", "record", waiting)
        assert inside
        assert all(event == (waiting, "launch", None) for event in inside)


def guarded(call, parents):
    """Whether a call is within ``with device_of(x).current()``, and the function that it is in."""
    found, node = False, call
    while node in parents:
        node = parents[node]
        if isinstance(node, ast.With):
            found |= any(re.fullmatch(r"device_of\(\w+\)\.current\(\)", ast.unparse(item)) for item in node.items)
        if isinstance(node, ast.FunctionDef):
            return found, node.name
    return found, ""


def test_every_kernel_is_launched_on_the_device_of_its_tensors():
    """Triton launches on the current device; a launcher enters that of its tensors, or all that call it have."""
    unguarded, calls = set(), {}
    for file in KERNELS.glob("*.py"):
        tree = ast.parse(file.read_text())
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            within, function = guarded(call, parents)
            if isinstance(call.func, ast.Subscript) and not within:
                unguarded.add(function)
            name = getattr(call.func, "attr", getattr(call.func, "id", None))
            calls.setdefault(name, []).append(within)
    assert {name for name in unguarded if not calls.get(name) or not all(calls[name])} == set()

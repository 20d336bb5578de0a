"""Recorded steps: what is replayed and what is not, with code that runs again in place of a CUDA graph."""

import gc
import math
import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastens
from fastens import capture
from fastens.device import device_of
from fastens.engine import planned
from fastens.kernels import _graph
from fastens.trace.record import mapped
from tests.fold.test_plans import members_of
from tests.replayed import replayed_by_code


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, t, scale=1.0):
        return {"sample": self.layer(x) * scale + t.reshape(-1, 1)}


@pytest.fixture
def ens(monkeypatch):
    """An ensemble whose recordings count their replays and write the same memory every time."""
    replays = replayed_by_code(monkeypatch)
    torch.manual_seed(0)
    ensemble = fastens.Ensemble([Net() for _ in range(3)], "median").eval()
    ensemble.__dict__["replays"] = replays
    return ensemble


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 4))

    def forward(self, x, t):
        return self.layers(x) + t.reshape(-1, 1)


X, T = torch.randn(2, 4), torch.tensor([1.0, 2.0])


def test_replays_with_new_values_and_returns_the_callers_memory(ens):
    with torch.no_grad():
        expected = [ens(X, T)["sample"], ens(2 * X, T + 1)["sample"]]
        ens._record((X, T), {})
        first = ens(X, T)["sample"]
        kept = first.clone()
        second = ens(2 * X, T + 1)["sample"]
        assert len(ens.replays) == 2
        torch.testing.assert_close(first, kept)  # the second call did not write to it
        second.clamp_(-0.1, 0.1)
        torch.testing.assert_close(ens(2 * X, T + 1)["sample"], expected[1])
        torch.testing.assert_close(first, expected[0])


def autocasting(ens):
    with torch.autocast("cpu", torch.bfloat16):
        ens(X, T)


def in_another_precision(ens):
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee" if before == "tf32" else "tf32"
    try:
        ens(X, T)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize(
    "call",
    [
        lambda ens: ens(torch.randn(3, 4), torch.zeros(3)),
        lambda ens: ens(X.double().float(), T, scale=2.0),
        lambda ens: ens(X, T, 1.0),
        lambda ens: (setattr(ens, "rule", "mean"), ens(X, T)),
        lambda ens: (ens.train(), ens(X, T)),
        lambda ens: (ens.refresh(), ens(X, T)),
        lambda ens: (ens.double(), ens(X.double(), T)),
        lambda ens: ens(X, T[:, None]),
        lambda ens: ens(X, T.double()),
        lambda ens: ens(X, t=T),
        lambda ens: ens(X, T, scale=True),
        autocasting,
        in_another_precision,
    ],
    ids="shape keyword number rule training refresh dtype dimensions t by_name type autocast precision".split(),
)
def test_falls_back_where_nothing_fits(ens, call):
    ens._record((X, T), {})
    with torch.no_grad():
        ens(X, T)
        call(ens)
    assert len(ens.replays) == 1


def test_gradients_are_never_replayed(ens):
    ens._record((X, T), {})
    ens(X, T)["sample"].sum().backward()
    assert not ens.replays
    assert all(p.grad is not None for p in ens.parameters())


def test_in_place_changes_show(ens):
    ens._record((X, T), {})
    with torch.no_grad():
        before = ens(X, T)["sample"]
        for parameter in ens.parameters():
            parameter.mul_(2)
        assert not torch.equal(ens(X, T)["sample"], before)
        assert len(ens.replays) == 1  # the recording may hold what was derived from the old weights
        ens._record((X, T), {})
        ens(X, T)
    assert len(ens.replays) == 2


def test_refusals(ens):
    with pytest.raises(RuntimeError, match="is on cpu, expected a CUDA device"):
        ens.capture(X, T)
    ens.rule = "alternating"
    with pytest.raises(ValueError, match="draws members"):
        ens._record((X, T), {})
    with pytest.raises(ValueError, match="training mode"):
        ens.train()._record((X, T), {})


class Reading(Net):
    """What of its arguments a network's Python may read."""

    def forward(self, x, other, number=1.0):
        scale = 2 if x is other else 3 if x.stride(-1) == 0 else 5
        scale = scale if not isinstance(number, SimpleNamespace) else number.scale
        return self.layer(x) * scale * math.copysign(1.0, number if isinstance(number, float) else 1.0) + other


class Writing(Net):
    def forward(self, x, other):
        x.mul_(2)
        return self.layer(x) + other


CALLS = {
    "the same tensor twice": (X, X),
    "another tensor": (X, X.clone()),
    "elements that are repeated": (X[:, :1].expand(2, 4), X),
    "a number": (X, X.clone(), 0.0),
    "its negative": (X, X.clone(), -0.0),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_pythons_of_members_read_of_a_call_is_part_of_its_signature(call, ens):
    members = [Reading().eval() for _ in range(2)]
    other = fastens.Ensemble(members, engine="fold")
    with torch.no_grad():
        for args in CALLS.values():
            expected = torch.stack([member(*args) for member in members]).mean(0)
            torch.testing.assert_close(other(*args), expected)
        other._record(CALLS[call], {})
        for name, args in CALLS.items():
            replays = len(ens.replays)
            expected = torch.stack([member(*args) for member in members]).mean(0)
            torch.testing.assert_close(other(*args), expected)
            assert len(ens.replays) == replays + (name == call)


def test_what_may_change_inside_is_not_recorded(ens):
    class Scale(SimpleNamespace):
        __hash__ = object.__hash__

    with torch.no_grad(), pytest.raises(TypeError, match="a replay sees nothing else change"):
        fastens.Ensemble([Reading(), Reading()]).eval()._record((X, X, Scale(scale=2.0)), {})


def test_arguments_that_share_memory_and_are_written_to_are_not_recorded(ens):
    members = [Writing().eval() for _ in range(2)]
    other, memory = fastens.Ensemble(members), torch.randn(2, 6)
    apart = [x.clone() for x in (memory[:, :4], memory[:, 2:])]
    with torch.no_grad():
        other._record((*apart,), {})
        with pytest.raises(ValueError, match="share memory"):
            other._record((memory[:, :4], memory[:, 2:]), {})
        shared = torch.randn(2, 4)
        expected = other.member_outputs(shared, shared).mean(0)
        torch.testing.assert_close(other(shared, shared), expected)
    assert not ens.replays


def test_every_signature_has_a_recording_of_its_own(ens):
    more, times = torch.randn(3, 4), torch.zeros(3)
    with torch.no_grad():
        expected = ens(X, T)["sample"], ens(more, times)["sample"], ens(X, T, scale=2.0)["sample"]
        for args, kwargs in (((X, T), {}), ((more, times), {}), ((X, T), {"scale": 2.0})):
            ens._record(args, kwargs)
        actual = ens(X, T)["sample"], ens(more, times)["sample"], ens(X, T, scale=2.0)["sample"]
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)
    assert len(ens.replays) == 3


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        ("geometric", {"prediction": "epsilon", "aggregate_in": "x0", "schedule": fastens.schedules.VP()}),
        ("dominant", {"max_fold": 3}),
        ("median", {"engine": "loop"}),
        (fastens.rules.Mean((0.5, 0.2, 0.3)), {"backend": "reference"}),
    ],
    ids=["converted", "several passes", "loop", "weighted"],
)
def test_settings_are_part_of_what_is_recorded(ens, rule, settings):
    torch.manual_seed(1)
    other = fastens.Ensemble([Net() for _ in range(3)], rule, **settings).eval()
    times = torch.tensor([0.25, 0.5])
    with torch.no_grad():
        expected = other(X / 2, times + 0.1)["sample"]
        other._record((X, times), {})
        torch.testing.assert_close(other(X / 2, times + 0.1)["sample"], expected)
    assert len(ens.replays) == 1


def test_mc_dropout_replays_fixed_masks_and_refuses_fresh_ones(ens):
    torch.manual_seed(0)
    network = Dropping()
    fixed = fastens.MCDropout(network, 3)
    with torch.no_grad():
        expected = fixed(2 * X, T)
        fixed._record((X, T), {})
        torch.testing.assert_close(fixed(2 * X, T), expected)
        assert len(ens.replays) == 1
        fixed.refresh()  # drops the masks that the recording read
        torch.testing.assert_close(fixed(2 * X, T), expected)
        assert len(ens.replays) == 1
    with pytest.raises(ValueError, match="fresh dropout masks are drawn at every call"):
        fastens.MCDropout(network, 3, masks="fresh")._record((X, T), {})


class FakeCuda:
    """CUDA's streams, events and graphs as a list of what was asked of them."""

    def __init__(self, monkeypatch):
        self.log, self.stream_now = [], "main"
        for name in ("Stream", "Event", "CUDAGraph", "current_stream", "stream", "graph", "device"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def handle(self, name):
        def of(verb):
            return lambda other=None: self.log.append(f"{name} {verb}" + (f" {other.name}" if other else ""))

        verbs = ("wait_stream", "wait_event", "record", "replay")
        return SimpleNamespace(name=name, **{verb: of(verb) for verb in verbs})

    def Stream(self, device=None):
        return self.handle("side")

    def Event(self, **_):
        return self.handle("event")

    def CUDAGraph(self):
        return self.handle("graph")

    def current_stream(self, device=None):
        return self.handle(self.stream_now)

    def device(self, _):
        return nullcontext()

    @contextmanager
    def stream(self, stream):
        before, self.stream_now = self.stream_now, stream.name
        yield
        self.stream_now = before

    @contextmanager
    def graph(self, graph, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.log.append(f"capture begins on {stream.name}")
        with self.stream(stream):
            yield
        self.log.append("capture ends")


def test_a_graph_is_recorded_after_a_warm_up_beside_the_callers_stream(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    replay, output = capture.record_graph(
        lambda: cuda.log.append(f"run on {cuda.stream_now}") or 5, torch.device("cuda")
    )
    assert output == 5
    assert cuda.log == [
        "side wait_stream main", *["run on side"] * _graph.WARM_UP, "main wait_stream side",
        "capture begins on side", "run on side", "capture ends",
    ]  # fmt: skip
    replay()
    assert cuda.log[-1] == "graph replay"


def test_a_step_waits_for_whoever_reads_its_last_result(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    memory = torch.zeros(2, 4)
    monkeypatch.setattr(
        capture, "record_graph", lambda run, device: (lambda: cuda.log.append("replay"), {"sample": memory})
    )
    step = capture.RecordedStep(lambda args, kwargs: None, (X,), {}, fastens.Ensemble([Net(), Net()]))
    step._turns = device_of("cuda").turns()
    cuda.stream_now = "other"  # the caller's stream, not that of the recording
    result = step((2 * X,), {})
    assert cuda.log == ["other wait_event event", "replay", "event record other"]
    assert torch.equal(step.inputs[0], 2 * X)
    assert result["sample"].data_ptr() != memory.data_ptr()


def test_what_a_graph_reads_lives_as_long_as_it(monkeypatch):
    FakeCuda(monkeypatch)
    references = []

    def run():
        tensor = torch.ones(3)  # as of a cache that will drop it
        references.append(weakref.ref(tensor))
        _graph.keep(tensor)
        if len(references) == 3:  # a plan inside that records itself while the outer one warms up
            inner.append(capture.record_graph(lambda: _graph.keep(torch.ones(2)), torch.device("cuda"), 0))

    inner = []
    replay, _ = capture.record_graph(run, torch.device("cuda"))
    alive = [reference() is not None for reference in references]
    assert alive == [False] * _graph.WARM_UP + [True]
    assert len(inner) == 1
    del replay
    gc.collect()
    assert references[-1]() is None
    run()
    assert references[-1]() is None  # outside of a recording nothing is kept


@torch.no_grad()
def test_constants_of_a_recorded_plan_outlive_the_plan(monkeypatch):
    monkeypatch.setattr(planned, "launches_on", lambda _: True)
    members, arguments = members_of("unet_2d", 2)
    ensemble = fastens.Ensemble(members, engine="fold")
    args, _ = arguments(1)
    ensemble(*args)
    (plan,) = [entry.plan for entry in ensemble._engine.plans.entries]
    read = []
    mapped(torch.Tensor, read.append, [launch.operands for launch in plan._launches])
    own = {id(p) for p in ensemble.parameters()}
    constants = [weakref.ref(tensor) for tensor in read if id(tensor) not in own]
    assert len(constants) > 20
    del read
    FakeCuda(monkeypatch)
    plan._on = device_of("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    replay, _ = capture.record_graph(lambda: ensemble._evaluated(args, {}), torch.device("cuda"), 0)
    del plan
    ensemble.refresh()
    gc.collect()
    assert all(reference() is not None for reference in constants)
    del replay
    gc.collect()
    assert all(reference() is None for reference in constants)


def test_captured_signatures_are_in_the_report(ens):
    call = "float32[2, 4], float32[2]"
    with torch.no_grad():
        ens(X, T)
        ens._record((X, T), {})
        assert [(c.state, c.why) for c in ens.report().calls if c.call == call] == [("captured", "")]
        next(ens.parameters()).mul_(2)
        ((state, why),) = [(c.state, c.why) for c in ens.report().calls if c.call == call]
    assert state == "captured"
    assert "capture them again" in why

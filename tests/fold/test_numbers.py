"""Numbers among the arguments: inputs of one plan where they are only numbers, else no reason to record for ever."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import fastens
from fastens import _native
from fastens.engine.planned import Plans
from tests.networks import NETWORKS, randomised, tensor_of
from tests.tolerances import NETWORK, relative_error

planned = pytest.mark.skipif(not _native.load(), reason=f"no compiled library: {_native.status()}")


class Timed(nn.Module):
    """A network that makes of its time what a function says."""

    def __init__(self, use):
        super().__init__()
        self.use = use
        self.inner = nn.Linear(4, 8)
        self.time = nn.Linear(1, 8)
        self.table = nn.Embedding(2000, 8)
        self.out = nn.Linear(8, 4)

    def forward(self, x, t):
        return self.out(torch.tanh(self.inner(x) + self.use(self, x, t)))


def as_column(net, x, values):
    return net.time(values.to(x.dtype).reshape(-1, 1))


NUMBERS_ONLY = {
    "factor": lambda net, x, t: t * net.inner(x),
    "reflected": lambda net, x, t: net.inner(x) * (1 - t) + net.inner(x) / (t + 1),
    "full": lambda net, x, t: as_column(net, x, torch.full((len(x),), t)),
    "full of a dtype": lambda net, x, t: as_column(net, x, torch.full((len(x),), t, dtype=torch.float64)),
    "list": lambda net, x, t: as_column(net, x, torch.tensor([t])),
    "lists": lambda net, x, t: as_column(net, x, torch.tensor([t] * len(x))),
    "tensor": lambda net, x, t: as_column(net, x, torch.as_tensor(t).expand(len(x))),
    "new_full": lambda net, x, t: as_column(net, x, x.new_full((len(x),), t)),
    "full_like": lambda net, x, t: as_column(net, x, torch.full_like(x[:, 0], t)),
    "python first": lambda net, x, t: as_column(net, x, torch.tensor([1000 * (t / 7) ** 2 - 3])),
    "in place": lambda net, x, t: net.inner(x).mul_(t),
    "whole numbers": lambda net, x, t: torch.arange(4, 12) * t * 0.01,
    "row of a table": lambda net, x, t: net.table(torch.tensor([t / 1000 * 1000]).long()),
}
READ = {
    "branch": lambda net, x, t: net.inner(x) * (2 if t > 2 else 3) + t,
    "math": lambda net, x, t: net.inner(x) * math.sqrt(t),
    "float": lambda net, x, t: net.inner(x) * float(t),
    "slice": lambda net, x, t: net.inner(x) + net.table.weight[: int(t)].sum(),
    "bare slice": lambda net, x, t: net.inner(x) + net.table.weight[: t.__index__()].sum(),
    "key": lambda net, x, t: net.inner(x) * {2: 0.5, 3: 0.25}.get(t, 1.0),
    "shape": lambda net, x, t: net.inner(x) + torch.ones(int(t), 1).sum(),
    "text": lambda net, x, t: net.inner(x) * len(f"{t:.3f}"),
    "plain text": lambda net, x, t: net.inner(x) * len(str(t)),
    "alpha": lambda net, x, t: torch.add(net.inner(x), net.inner(x), alpha=t),
}
VALUES = {"float": (2.0, 3.5, 9.25, 500.5, 6.0, 7.5, 3.5, 11.0), "int": (2, 3, 9, 503, 6, 7, 3, 11)}


def ensemble_of(use, **options):
    members = [randomised(lambda: Timed(use), seed) for seed in range(3)]
    return fastens.Ensemble(members, **options), members, torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def held(ensemble, members, x, values):
    for i, t in enumerate(values):
        given = x * (1 + i / 8)
        with torch.no_grad():
            expected = torch.stack([member(given, t) for member in members])
            assert relative_error(ensemble.member_outputs(given, t), expected) < NETWORK[torch.float32]


@planned
@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("use", NUMBERS_ONLY.values(), ids=NUMBERS_ONLY)
def test_a_number_that_is_only_a_number_is_an_input_of_one_plan(use, values, monkeypatch):
    made, make = [], Plans.make
    monkeypatch.setattr(Plans, "make", lambda self, key, *a, **k: (made.append(key), make(self, key, *a, **k))[1])
    ensemble, members, x = ensemble_of(use)
    held(ensemble, members, x, values)
    assert len(made) == 2, ensemble.report().why_no_plan  # the first value's own, and that of all
    assert len(ensemble.report().plans) == 2


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("use", READ, ids=READ)
def test_a_number_that_python_reads_is_folded_after_four_values(use, values):
    if use == "bare slice" and isinstance(values[0], float):
        pytest.skip("a float has no __index__")
    ensemble, members, x = ensemble_of(READ[use])
    held(ensemble, members, x, values)
    assert ensemble.engine == "fold"
    report = ensemble.report()
    assert len(report.plans) <= 4
    if _native.load():
        assert "a number among the arguments varies" in report.why_no_plan
        assert f"{__file__}:" in report.why_no_plan or use in ("key", "plain text")


def caught(net, x, t):
    try:
        return [0.5, 2.0][t]
    except (IndexError, TypeError):
        return 1.0


OF_NUMBERS = {  # what a network has a branch for, and tensors of no dimension have another; the last values tell
    "clamp": lambda net, x, t: min(t, 900) if isinstance(t, int | float) else t,
    "no tensor": lambda net, x, t: t if torch.is_tensor(t) else torch.full((len(x), 1), max(t, 2)),
    "condition": lambda net, x, t: 0.5 if not torch.is_tensor(t) and 2 * t - 1 > 1800 else 1.0,
    "converted": lambda net, x, t: t if torch.is_tensor(t) else torch.tensor(min(float(t), 900.0)),
    "by NumPy": lambda net, x, t: t if torch.is_tensor(t) else float(np.clip(t, 2, 900)),
    "key": lambda net, x, t: 1.0 if torch.is_tensor(t) else {1: 3.0, 950: 2.0}.get(int(t), 1.0),
    "error that is caught": caught,
}


@pytest.mark.parametrize("kind", [int, float])
@pytest.mark.parametrize("use", OF_NUMBERS)
def test_a_branch_for_numbers_is_taken_for_every_number(use, kind, monkeypatch):
    monkeypatch.setenv("FASTENS_AUDIT", "off")
    ensemble, members, x = ensemble_of(lambda net, x, t: net.inner(x) * 0.01 * OF_NUMBERS[use](net, x, t))
    held(ensemble, members, x, [kind(t) for t in (100, 200, 300, 400, 500, 950, 1, 960, 0)])
    assert ensemble.engine == "fold"


def test_many_values_are_checked_a_few_times(monkeypatch):
    ensemble, _, x = ensemble_of(READ["branch"])
    loops = []
    call_module = type(ensemble._engine).call_module
    monkeypatch.setattr(
        type(ensemble._engine), "call_module", lambda self, *a: (loops.append(1), call_module(self, *a))[1]
    )
    monkeypatch.setenv("FASTENS_AUDIT", "off")
    with torch.no_grad():
        for t in range(40):
            ensemble(x, t)
    assert len(loops) <= 6 * 3 + 4  # a check takes three members, a plan's second check one


@planned
@pytest.mark.parametrize("name", ["unet_2d", "unet_2d_condition"])
@pytest.mark.parametrize("kind", [int, float])
def test_times_of_published_networks(name, kind):
    make, arguments = NETWORKS[name]
    members = [randomised(make, seed) for seed in range(2)]
    (x, _, *rest), kwargs = arguments(2)
    ensemble = fastens.Ensemble(members)
    for t in (999, 500, 20, 3, 1, 0):
        with torch.no_grad():
            expected = torch.stack([tensor_of(member(x, kind(t), *rest, **kwargs)) for member in members])
            assert relative_error(ensemble.member_outputs(x, kind(t), *rest, **kwargs), expected) < 1e-5
    assert len(ensemble.report().plans) == 2


@planned
@pytest.mark.parametrize("kind", [float, np.float64])
@pytest.mark.parametrize("order", [(0.0, -0.0), (-0.0, 0.0)])
@pytest.mark.parametrize("use", ["tensor", "python"])
def test_zeros_of_both_signs_are_two_numbers(use, order, kind, monkeypatch):
    monkeypatch.setenv("FASTENS_AUDIT", "off")
    signs = {
        "tensor": lambda net, x, t: torch.copysign(net.inner(x), t),
        "python": lambda net, x, t: net.inner(x) * math.copysign(1.0, t),
    }
    order = tuple(map(kind, order))
    members = [randomised(lambda: Timed(signs[use]), k) for k in range(3)]
    ensemble, (a, b) = fastens.Ensemble(members), order
    with torch.no_grad():
        for t in (a, a, a, b, b, b, a, b, a):
            x = torch.randn(2, 4)
            expected = torch.stack([m(x, t) for m in members]).mean(0)
            assert relative_error(ensemble(x, t), expected) < NETWORK[torch.float32]


def test_drawn_rows_take_numbers_too():
    ensemble, members, x = ensemble_of(NUMBERS_ONLY["full"], rule="mixture")
    for i, t in enumerate(VALUES["float"]):
        with torch.no_grad(), ensemble.trajectory(5, generator=i):
            output = ensemble(x, t)
            stack = torch.stack([member(x, t) for member in members])
        assert (output - stack).abs().amax(-1).min(0).values.max() < 1e-5
    assert len(ensemble.report().plans) == 2


@planned
def test_keywords_and_several_numbers():
    def use(net, x, t):
        return t["scale"] * net.inner(x) + as_column(net, x, torch.tensor([t["time"]]))

    ensemble, members, x = ensemble_of(use)
    values = [{"scale": 1.0 + i % 2, "time": 3 * i} for i in range(8)]
    held(ensemble, members, x, values)
    assert len(ensemble.report().plans) <= 3


@planned
def test_a_network_that_changes_its_own_state_is_not_recorded_at_every_call(monkeypatch):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.inner(x) * self.calls

    recorded, checked = [], Plans._checked
    monkeypatch.setattr(Plans, "_checked", lambda self, *a: (recorded.append(1), checked(self, *a))[1])
    members = [Counting() for _ in range(2)]
    ensemble, x = fastens.Ensemble(members), torch.randn(3, 4)
    with torch.no_grad():
        for _ in range(10):
            stack = torch.stack([member(x) for member in members])
            assert relative_error(ensemble(x), stack.mean(0)) < 1e-5
    assert len(recorded) <= 3
    assert "change from call to call" in ensemble.report().why_no_plan


@planned
def test_weights_that_change_before_every_call_are_not_packed_every_time(monkeypatch):
    recorded, checked = [], Plans._checked
    monkeypatch.setattr(Plans, "_checked", lambda self, *a: (recorded.append(1), checked(self, *a))[1])
    ensemble, _, x = ensemble_of(NUMBERS_ONLY["factor"])
    with torch.no_grad():
        for _ in range(10):
            for p in ensemble.parameters():
                p.mul_(0.99)
            stack = torch.stack([member(x, 2.0) for member in ensemble.members])
            assert relative_error(ensemble(x, 2.0), stack.mean(0)) < 1e-5
        assert len(recorded) <= 3
        ensemble(x, 2.0)  # the second call with these weights
        assert len(ensemble.report().plans) == 1


@planned
def test_plans_come_back_when_nothing_writes_to_the_weights_any_more(monkeypatch):
    """As where another thread trains them: recordings become rarer while they are in vain, and then there is a plan."""
    recorded, checked, writing = [], Plans._checked, [True]
    ensemble, _, x = ensemble_of(NUMBERS_ONLY["factor"])

    def disturbed(self, *args):
        recorded.append(1)
        if writing:
            next(ensemble.parameters()).mul_(1.0)
        return checked(self, *args)

    monkeypatch.setattr(Plans, "_checked", disturbed)
    with torch.no_grad():
        for _ in range(100):
            ensemble(x, 2.0)
        assert 3 <= len(recorded) < 10
        assert not ensemble.report().plans
        assert "written to while" in ensemble.report().why_no_plan
        writing.clear()
        for _ in range(200):
            ensemble(x, 2.0)
        assert len(ensemble.report().plans) == 1
        stack = torch.stack([member(x, 2.0) for member in ensemble.members])
        assert relative_error(ensemble(x, 2.0), stack.mean(0)) < 1e-5


OTHER_TYPES = {
    "product with integers": lambda net, x, n: torch.arange(8) * 2 ** (n - 3),
    "tensor": lambda net, x, n: net.inner(x) * torch.tensor(2 ** (n - 3)),
    "full": lambda net, x, n: net.inner(x) * torch.full((8,), 2 ** (n - 3)),
    "complex": lambda net, x, n: (net.inner(x) * (n - 3) ** 0.5).abs(),
}


class Reciprocal(Timed):
    """Catches an error that Python makes of a number."""

    def __init__(self):
        super().__init__(None)

    def forward(self, x, t):
        try:
            scale = 1 / (t - 3)
        except ZeroDivisionError:
            scale = 7.0
        return self.out(torch.tanh(self.inner(x) * scale))


@planned
@pytest.mark.parametrize("make", [*(lambda use=use: Timed(use) for use in OTHER_TYPES.values()), Reciprocal])
def test_a_number_of_another_type_or_an_error_is_no_input(make, monkeypatch):
    monkeypatch.setenv("FASTENS_AUDIT", "off")
    members = [randomised(make, k) for k in range(3)]
    ensemble = fastens.Ensemble(members)
    with torch.no_grad():
        for t in (5, 4, 6, 4, 5, 1, 2, 7, 1, 3, 5):
            x = torch.randn(2, 4)
            expected = torch.stack([m(x, t) for m in members]).mean(0)
            assert relative_error(ensemble(x, t), expected) < NETWORK[torch.float32]


@planned
@pytest.mark.parametrize(("values", "last"), [((2, 3, 4, 5, 6, 7), 2**70), ((1.0, 2.0, 3.0, 4.0, 5.0), 1e300)])
def test_a_number_that_torch_refuses_is_refused(values, last):
    members = [randomised(lambda: Timed(lambda net, x, t: torch.where(net.inner(x) > 0, t, 0.5)), k) for k in range(2)]
    ensemble, x = fastens.Ensemble(members), torch.randn(3, 4)
    with torch.no_grad():
        for t in values:
            ensemble(x, t)
        with pytest.raises((RuntimeError, OverflowError)) as theirs:
            members[0](x, last)
        with pytest.raises(theirs.type) as ours:
            ensemble(x, last)
    assert str(ours.value) == str(theirs.value)


class Labelled(float):
    """A number of a class of the user's, with an attribute that a network reads."""


@torch.no_grad()
def test_a_number_with_attributes_has_no_plan(monkeypatch):
    monkeypatch.setenv("FASTENS_AUDIT", "off")
    members = [randomised(lambda: Timed(lambda net, x, t: net.inner(x) * t.gain), k) for k in range(2)]
    ensemble, x = fastens.Ensemble(members), torch.randn(3, 4)
    for gain in (1.0, 2.0, 3.0, 1.0, 5.0):
        t = Labelled(0.5)
        t.gain = gain
        assert relative_error(ensemble(x, t), torch.stack([m(x, t) for m in members]).mean(0)) < NETWORK[torch.float32]
    assert not ensemble.report().plans

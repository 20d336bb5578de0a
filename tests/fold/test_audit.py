"""Plans are held against a member, drawn, at calls 2, 4, 8, ...: what no guard can notice is found."""

import warnings

import pytest
import torch
from torch import nn

import fastens
from fastens import _native
from fastens.engine.calls import PlannedCall
from fastens.engine.engine import Engine
from fastens.engine.planned import Plans
from tests.networks import randomised
from tests.tolerances import relative_error

pytestmark = pytest.mark.skipif(not _native.load(), reason=f"no compiled library: {_native.status()}")


class Scaled(nn.Module):
    """A network that has a number as a default of a function, where no write is noticed."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 16), nn.Linear(16, 4)

    def scaled(self, x, scale=2.0):
        return scale * x

    def forward(self, x):
        return self.scaled(self.second(torch.tanh(self.first(x))))


def in_memory(ensemble):
    next(ensemble.parameters()).detach().numpy()[...] *= 2


@pytest.fixture(autouse=True)
def default(monkeypatch):
    monkeypatch.setattr(Scaled.scaled, "__defaults__", (2.0,))


def in_a_default(ensemble):
    Scaled.scaled.__defaults__ = (3.0,)


def through_the_stacks(ensemble):
    for p in ensemble.parameters():
        p.data.mul_(0.5)


UNNOTICED = [in_memory, in_a_default, through_the_stacks]


def planned_ensemble(rule="mean"):
    ensemble = fastens.Ensemble([randomised(Scaled, seed) for seed in range(3)], rule)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), ensemble.trajectory(6, generator=0):
        ensemble(x)
    assert ensemble.report().plans
    return ensemble, x


def by_members(ensemble, x):
    return torch.stack([member(x) for member in ensemble.members]).mean(0)


@pytest.mark.parametrize("change", UNNOTICED)
@pytest.mark.parametrize("calls", [1, 2, 7])
@torch.no_grad()
def test_what_no_guard_notices_the_audit_finds(change, calls):
    """Until then the answers are the old ones, for fewer calls than there were before."""
    ensemble, x = planned_ensemble()
    for _ in range(calls):
        ensemble(x)
    old = ensemble(x)
    change(ensemble)
    expected = by_members(ensemble, x)
    assert relative_error(old, expected) > 1e-3
    messages, answers = [], []
    for _ in range(2 * calls + 4):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            answers.append(ensemble(x))
        messages += [str(w.message) for w in caught]
    assert len(messages) == 1
    assert "it is dropped" in messages[0]
    assert relative_error(answers[-1], expected) < 1e-5
    wrong = [relative_error(a, expected) > 1e-3 for a in answers]
    assert wrong == sorted(wrong, reverse=True)  # right from the warning on


@torch.no_grad()
def test_the_warning_names_the_first_step_that_differs(monkeypatch):
    monkeypatch.setenv("FASTENS_AUDIT", "always")
    ensemble, x = planned_ensemble()
    in_a_default(ensemble)
    with pytest.warns(UserWarning, match=r"first at step \d+, aten.mul.*2.0.*now aten.mul.*3.0"):
        ensemble(x)


@pytest.mark.parametrize(("mode", "expected"), [("off", 0), ("sampled", 4), ("always", 20)])
@torch.no_grad()
def test_how_often_is_a_setting(mode, expected, monkeypatch):
    audits, holds = [], PlannedCall._holds
    monkeypatch.setattr(PlannedCall, "_holds", lambda self, *a: (audits.append(1), holds(self, *a))[1])
    monkeypatch.setenv("FASTENS_AUDIT", mode)
    ensemble, x = planned_ensemble()
    for _ in range(20):
        ensemble(x)
    assert len(audits) == expected  # at calls 2, 4, 8 and 16


@pytest.mark.parametrize("rule", ["mixture", "alternating"])
@pytest.mark.parametrize("change", UNNOTICED)
@torch.no_grad()
def test_drawn_rows_are_audited(rule, change, monkeypatch):
    monkeypatch.setenv("FASTENS_AUDIT", "always")
    ensemble, x = planned_ensemble(rule)
    change(ensemble)
    with ensemble.trajectory(6, generator=0):
        with pytest.warns(UserWarning, match="it is dropped"):
            ensemble(x)
        output = ensemble(x)
    stack = torch.stack([member(x) for member in ensemble.members])
    assert (output - stack).abs().amax(-1).min(0).values.max() < 1e-5


@torch.no_grad()
def test_fixed_and_fresh_masks_are_audited(monkeypatch):
    monkeypatch.setenv("FASTENS_AUDIT", "always")
    network = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 4))
    for masks in ("fixed", "fresh"):
        ensemble = fastens.MCDropout(network, 3, masks=masks)
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(6):
                ensemble(x)
        assert ensemble.report().plans
        ensemble.network[2].bias.data.add_(1.0)
        with pytest.warns(UserWarning, match="it is dropped"):
            ensemble(x)


@torch.no_grad()
def test_sums_on_launches_are_audited(monkeypatch):
    from fastens.engine import planned

    monkeypatch.setattr(planned, "launches_on", lambda _: True)
    monkeypatch.setenv("FASTENS_AUDIT", "always")
    ensemble = fastens.Ensemble([randomised(lambda: nn.Conv2d(3, 3, 3, padding=1), seed) for seed in range(2)])
    x = torch.randn(2, 3, 8, 8)
    for _ in range(3):
        ensemble(x)
    assert ensemble.report().plans
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ensemble(x)


class Layers(nn.Module):
    """A network of one layer between two of ordinary kind."""

    def __init__(self, layer):
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(4, 8), layer(), nn.Linear(8, 4)

    def forward(self, x):
        x = self.layer(self.first(x))
        return self.last(x[0] if isinstance(x, tuple) else x)


@pytest.mark.parametrize(("layer", "folds"), [
    (lambda: nn.LayerNorm(8), 0),
    (lambda: nn.GRU(8, 8), 7),
], ids=["norm", "recurrent"])  # fmt: skip
@torch.no_grad()
def test_an_audit_costs_what_a_member_does_and_leaves_nothing_behind(layer, folds, monkeypatch):
    """The network's own modules run on the member's tensors, where they write nothing to themselves."""
    monkeypatch.setenv("FASTENS_AUDIT", "always")
    passes, one_pass, recorded, checked = [], Engine.one_pass, [], Plans._checked
    monkeypatch.setattr(Plans, "_checked", lambda self, *a: (recorded.append(1), checked(self, *a))[1])
    ensemble = fastens.Ensemble([randomised(lambda: Layers(layer), seed) for seed in range(3)])
    x = torch.randn(6, 4)
    ensemble(x)
    monkeypatch.setattr(Engine, "one_pass", lambda self, *a: (passes.append(1), one_pass(self, *a))[1])
    state = ensemble._engine.plans.guards.state()
    for _ in range(7):
        ensemble(x)
    assert len(passes) == folds
    assert len(recorded) == 1
    assert ensemble._engine.plans.guards.state() == state


class Listing(nn.Module):
    """A network that reads a weight where no table has it."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.listed = [self.inner.weight]

    def forward(self, x):
        return self.last(torch.tanh(x @ self.listed[0].mT))


@torch.no_grad()
def test_a_network_that_only_the_fold_runs_is_audited_by_the_fold(monkeypatch):
    monkeypatch.setenv("FASTENS_AUDIT", "always")
    members, x = [randomised(Listing, seed) for seed in range(3)], torch.randn(6, 4)
    ensemble = fastens.Ensemble(members)
    passes, one_pass = [], Engine.one_pass
    ensemble(x)
    assert ensemble.report().plans
    monkeypatch.setattr(Engine, "one_pass", lambda self, *a: (passes.append(1), one_pass(self, *a))[1])
    expected = torch.stack([member(x) for member in members]).mean(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert relative_error(ensemble(x), expected) < 1e-5
    assert len(passes) == 1

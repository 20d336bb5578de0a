"""Rows of members of every kind: masks, draws of a posterior, other structures; and arguments of each member."""

import warnings

import pytest
import torch
from torch import nn
from torchdiffeq import odeint

import fastens
from fastens.fold.dispatch import RULES
from fastens.fold.tensor import ReadsValues
from tests.networks import mlp, randomised
from tests.test_assigned import K, RowByRow
from tests.tolerances import NETWORK, relative_error


@pytest.mark.parametrize("masks", ["fixed", "fresh"])
def test_masks_are_members_too(masks):
    model = randomised(lambda: nn.Sequential(nn.Linear(5, 16), nn.SiLU(), nn.Dropout(0.5), nn.Linear(16, 5)), 0)
    ens, x = fastens.MCDropout(model, K, masks=masks), torch.randn(K, 5)
    with torch.no_grad():
        with ens.trajectory(K, 3):
            whole = ens.member_outputs(x)
        for _ in range(2):
            with ens.assigned(per_member=1), ens.trajectory(K, 3):
                torch.testing.assert_close(ens(x), whole[range(K), range(K)])


def test_members_of_different_structure_have_rows_too():
    members = [nn.Linear(5, 5).eval(), nn.Sequential(nn.Linear(5, 5)).eval()]
    ens, x = fastens.Ensemble(members, engine="loop"), torch.randn(3, 5)
    with torch.no_grad(), ens.assigned([1, 0, 1]):
        torch.testing.assert_close(ens(x), RowByRow(members, [1, 0, 1])(x))


def test_draws_of_a_posterior_have_rows_too():
    model = randomised(mlp, 0)
    ens = fastens.laplace(model, lambda m, x: (m(x) - x).square().mean(1), [torch.randn(4, 5)], K)
    x, rows = torch.randn(3, 5), [3, 0, 3]
    with torch.no_grad(), ens.assigned(rows):
        torch.testing.assert_close(ens(x), RowByRow(ens.members, rows)(x))


def test_an_adaptive_solver_runs_in_it():
    """The field of each row is fixed; its steps are those that the rows together ask for."""
    members, rows = [randomised(mlp, k).double() for k in range(K)], [2, 0, 3]
    ens, x, t = fastens.Ensemble(members), torch.randn(3, 5, dtype=torch.float64), torch.tensor([0.0, 1.0])
    with torch.no_grad():
        with ens.assigned(rows):
            ours = odeint(lambda t, y: ens(y), x, t, method="dopri5")
        theirs = odeint(lambda t, y: RowByRow(members, rows)(y), x, t, method="dopri5")
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_an_ensemble_of_one_has_rows_too():
    member, x = randomised(mlp, 0), torch.randn(4, 5)
    ens = fastens.Ensemble([member])
    with torch.no_grad(), ens.assigned(per_member=2):
        for _ in range(3):
            torch.testing.assert_close(ens(x), member(x))


class Conditioned(nn.Module):
    def __init__(self, k):
        super().__init__()
        self.net = randomised(mlp, k)

    def forward(self, x, condition, scale=1.0):
        return scale * self.net(x + condition)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (6, 5), ()])
@pytest.mark.parametrize("drawn_rule", [False, True])
@pytest.mark.parametrize("max_fold", [None, 4])
def test_arguments_of_each_member_are_its_rows(shape, drawn_rule, max_fold):
    members, rows, x = [Conditioned(k).eval() for k in range(K)], [3, 0, 1, 1, 2, 0], torch.randn(6, 5)
    conditions, scales = torch.randn(K, *shape), [1.0, 2.0, 3.0, 4.0]
    ens = fastens.Ensemble(members, "mixture" if drawn_rule else "mean", max_fold=max_fold)
    given = fastens.PerMember(list(conditions)), fastens.PerMember(scales)
    with torch.no_grad():
        if drawn_rule:
            with ens.trajectory(6, 5):
                ours = ens(x, *given)
                rows = ens._draws.members(ens.rule, ens._draws.begin(x), 6).tolist()
        else:
            with ens.assigned(rows):
                ours = ens(x, *given)
        for i, k in enumerate(rows):
            own = conditions[k][i : i + 1] if shape == (6, 5) else conditions[k]
            torch.testing.assert_close(ours[i : i + 1], members[k](x[i : i + 1], own, scales[k]))
    assert ens.engine == "fold"


class Tabled(nn.Module):
    """Its times are those that it has noise levels for, as score_sde's and CompVis' networks; it may keep these."""

    def __init__(self, check, keeps):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.register_buffer("levels", torch.linspace(0.1, 1, 8))
        self.check, self.keeps = check, keeps

    def forward(self, x, t):
        self.check(t)
        if self.keeps:
            self.double = self.levels * 2
        return self.inner(x) / (self.double if self.keeps else self.levels)[t.long()][:, None]


class Own(Exception):
    """Of a network's author."""


def in_range(t):
    assert not ((t < 0) | (t > 7)).any()


def whole(t):
    if not (t == t.round()).all():
        raise Own("a time between two steps")


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("check", [lambda t: None, in_range, whole])
def test_members_that_have_numbers_for_some_times_only(check, keeps):
    members = [randomised(lambda: Tabled(check, keeps), k) for k in range(K)]
    ens, rows = fastens.Ensemble(members), [3, 0, 3, 1]
    with torch.no_grad():
        for t in ([7.0, 7.0, 7.0, 7.0], [7.0, 6.0, 5.0, 0.0], [0.0, 0.0, 0.0, 0.0]):
            x, t = torch.randn(4, 3), torch.tensor(t)
            with ens.assigned(rows):
                torch.testing.assert_close(ens(x, t), RowByRow(members, rows)(x, t))
            torch.testing.assert_close(ens(x, t), torch.stack([m(x, t) for m in members]).mean(0))


@pytest.mark.parametrize("check", [lambda t: None, in_range])
def test_rows_alone_of_members_that_have_numbers_for_some_times_only(check):
    members = [randomised(lambda: Tabled(check, False), k) for k in range(K)]
    ens, x, t = fastens.Ensemble(members), torch.randn(4, 3), torch.full((4,), 7.0)
    with torch.no_grad(), fastens.deterministic():
        torch.testing.assert_close(ens(x, t), torch.stack([m(x, t) for m in members]).mean(0))
        assert torch.equal(ens(x[:1], t[:1]), ens(x, t)[:1])


def test_rows_that_cannot_be_folded_leave_other_calls_as_they_are(monkeypatch):
    """Each row's member is called by itself then, in calls of this signature."""

    def of_all_members_alone(fold, func, x):
        if fold.hidden.row_members is not None:
            raise ReadsValues("there is no rule for rows")
        return tanh(fold, func, x)

    tanh = RULES[torch.tanh]
    monkeypatch.setitem(RULES, torch.tanh, of_all_members_alone)
    members = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)]
    ensemble, x, whose = fastens.Ensemble(members), torch.randn(4, 4), torch.tensor([0, 1, 2, 1])
    expected = torch.stack([members[k](row) for k, row in zip(whose.tolist(), x, strict=True)])
    with torch.no_grad():
        ensemble(x)
        with ensemble.assigned(whose):
            with pytest.warns(UserWarning, match="one by one where each row has its own, .* there is no rule for rows"):
                torch.testing.assert_close(ensemble(x), expected)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                torch.testing.assert_close(ensemble(x), expected)
        torch.testing.assert_close(ensemble(x), torch.stack([member(x) for member in members]).mean(0))
    assert ensemble.engine == "fold"
    assert any("one member a row" in call.call and call.state == "looped" for call in ensemble.report().calls)


class ReadsItsTime(nn.Module):
    """Multiplies each row by a number that Python reads of its time."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x, t):
        return self.inner(x) * torch.tensor([float(each) for each in t])[:, None]


@pytest.mark.parametrize("first", ["whole", "assigned"])
def test_rows_of_values_that_python_reads_leave_the_fold_of_all_members(first):
    members = [randomised(ReadsItsTime, seed) for seed in range(3)]
    ensemble = fastens.Ensemble(members)
    x, late, early = torch.randn(3, 4), torch.tensor([1, 2, 5]), torch.tensor([1, 2, 3])

    def whole():
        for t in (late, early):
            expected = torch.stack([member(x, t) for member in members]).mean(0)
            assert relative_error(ensemble(x, t), expected) < NETWORK[torch.float32]

    def assigned():
        for t in (late, early):
            with ensemble.assigned([2, 0, 1]):
                ours = ensemble(x, t)
            expected = torch.stack([members[k](x, t)[i] for i, k in enumerate((2, 0, 1))])
            assert relative_error(ours, expected) < NETWORK[torch.float32]

    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for run in (whole, assigned, whole) if first == "whole" else (assigned, whole, assigned):
            run()
    assert ensemble.engine == "fold"
    assert any("one by one where each row has its own" in str(each.message) for each in caught)


class ReadsFirst(nn.Module):
    """Looks its first row's class up for all rows, as code does that takes a batch to be of one time."""

    def __init__(self, drops=0.0):
        super().__init__()
        self.linear, self.scale, self.drop = nn.Linear(4, 4), nn.Embedding(5, 4), nn.Dropout(drops)

    def forward(self, x, number):
        return self.linear(self.drop(x)) * self.scale(number[:1].long())


NUMBERS = {
    "classes": ([3, 3, 3, 3], [0, 2, 1, 4]),
    "no class": ([0, 0, 0, 0], [1, 0, 2, 0]),
    "two classes": ([1, 1, 1, 1], [0, 1, 1, 0]),
    "flags": ([False, False, False, False], [True, False, False, True]),
}


@pytest.mark.parametrize("masked", [False, True], ids=["weights", "masks"])
@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS)
def test_rows_that_are_alike_at_first_may_be_mixed_later(numbers, masked):
    if masked:
        ensemble = fastens.MCDropout(ReadsFirst(0.5), 3)
    else:
        ensemble = fastens.Ensemble([ReadsFirst().eval() for _ in range(3)])
    rows = [2, 0, 1, 2]
    with torch.no_grad():
        for each in (numbers[0], numbers[0], numbers[1], numbers[1]):
            x, number = torch.randn(4, 4), torch.tensor(each)
            expected = torch.stack([ensemble.members[k](x, number)[row] for row, k in enumerate(rows)])
            with ensemble.assigned(rows):
                assert relative_error(ensemble(x, number), expected) < 1e-5

"""What a first call does not show, since a branch that does it is taken later: it is each member's all the same."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

import fastens

COUNT = [0]
TABLE = {"calls": 0}


def to_buffer(self, h):
    self.kept.add_(h.mean())
    return h + self.kept


def to_new_buffer(self, h):
    self.kept = self.kept + h.mean(0)
    return h + self.kept


def to_attribute(self, h):
    self.last = self.last + h.mean(0)
    return h + self.last


def to_global(self, h):
    COUNT[0] += 1
    return h * COUNT[0]


def to_table(self, h):
    TABLE["calls"] += 1
    return h + TABLE["calls"]


def to_class(self, h):
    type(self).calls += 1
    return h + type(self).calls


def by_python(self, h):
    return h * (random.random() + 0.5)


def by_numpy(self, h):
    return h * float(np.random.rand() + 0.5)


def by_torch(self, h):
    return h * (torch.rand(()) + 0.5)


def of_values(self, h):
    try:
        return h / float(h.abs().max())
    except Exception:  # of no member, but of a pass of all
        return h


def of_shapes(self, h):
    try:
        return h[h > 0].sum() + h
    except Exception:
        return h


LATE = [
    of_values,
    of_shapes,
    to_buffer,
    to_new_buffer,
    to_attribute,
    to_global,
    to_table,
    to_class,
    by_python,
    by_numpy,
    by_torch,
]


class Late(nn.Module):
    calls = 0

    def __init__(self, function):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.register_buffer("kept", torch.zeros(6))
        self.last = torch.zeros(6)
        self.function = function

    def forward(self, x):
        h = self.layer(x)
        if bool(x.max() > 50):
            h = self.function(self, h)
        return h


class Direct(Late):
    """The same, where the class itself names what it calls."""

    def forward(self, x):
        h = self.layer(x)
        if bool(x.max() > 50):
            name = self.function.__name__
            if name == "by_python":
                return by_python(self, h)
            if name == "by_numpy":
                return by_numpy(self, h)
            if name == "to_global":
                return to_global(self, h)
            return self.function(self, h)
        return h


def started():
    """Put what members share where it was."""
    COUNT[0], TABLE["calls"], Late.calls, Direct.calls = 0, 0, 0, 0
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def inputs(rows=2):
    generator = torch.Generator().manual_seed(1)
    for late in (False, False, False, True, True, False, True):
        x = torch.randn(rows, 6, generator=generator)
        x[0, 0] = 100.0 if late else 1.0
        yield x


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one", "ignore:fastens. a plan is")
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("kind", [Late, Direct])
@pytest.mark.parametrize("function", LATE)
def test_a_branch_that_is_taken_later(function, kind, gradients):
    torch.manual_seed(0)
    members = [kind(function).eval() for _ in range(3)]
    ensemble = fastens.Ensemble(copy.deepcopy(members))
    with torch.set_grad_enabled(gradients):
        started()
        expected = [torch.stack([member(x) for member in members]).detach() for x in inputs()]
        shared = COUNT[0], TABLE["calls"], kind.calls
        started()
        answers = [ensemble.member_outputs(x).detach() for x in inputs()]
        assert (COUNT[0], TABLE["calls"], kind.calls) == shared
    for x, answer, own in zip(inputs(), answers, expected, strict=True):
        if function is by_torch and bool(x.max() > 50):  # numbers of the fold's own
            scale = (answer / torch.stack([member.layer(x) for member in members])).mean((1, 2))
            assert len({round(float(s), 4) for s in scale}) == 3
        else:
            torch.testing.assert_close(answer, own, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one", "ignore:fastens. a plan is")
@pytest.mark.parametrize("function", [by_python, by_numpy, to_global])
def test_a_branch_that_is_taken_later_in_rows_of_members(function):
    """A call of some members leaves what they share as one of these members does."""
    torch.manual_seed(0)
    members = [Direct(function).eval() for _ in range(3)]
    ensemble = fastens.Ensemble(copy.deepcopy(members))
    with torch.no_grad(), ensemble.assigned(torch.tensor([0, 2])):
        started()
        for x in inputs():
            before = COUNT[0], random.getstate(), np.random.get_state()[2]
            ensemble(x)
            after = COUNT[0], random.getstate(), np.random.get_state()[2]
            assert (before != after) == bool(x.max() > 50)


def test_an_error_of_the_callers_leaves_shared_weights_shared():
    """A frozen trunk is not held K times after one batch of a wrong shape."""
    trunk = nn.Linear(6, 6).requires_grad_(False)
    members = [nn.Sequential(copy.deepcopy(trunk), nn.Linear(6, 6)).eval() for _ in range(3)]
    ensemble = fastens.Ensemble(members)
    shapes = {name: p.shape for name, p in ensemble.named_parameters()}
    with torch.no_grad():
        ensemble(torch.randn(2, 6))
        with pytest.raises(RuntimeError):
            ensemble(torch.randn(2, 5))
        ensemble(torch.randn(2, 6))
    assert {name: p.shape for name, p in ensemble.named_parameters()} == shapes
    assert ensemble.engine == "fold"

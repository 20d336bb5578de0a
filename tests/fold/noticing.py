"""How it is seen that an ensemble notices a change of what its members' code reads."""

import warnings

import torch

import fastens
from tests.tolerances import relative_error

X, T = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(2)


def loop(members):
    return torch.stack([member(X, T) for member in members]).mean(0)


def check_noticed(members, change):
    """Change something of members, and of their ensemble, that a plan rests on: the next answer is the new one."""
    ensemble = fastens.Ensemble(members)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):  # the next audit is at call 8
            assert relative_error(ensemble(X, T), loop(members)) < 1e-6
        (entry,) = ensemble._engine.plans.entries
        assert entry.calls == 4  # nothing has changed
        before = loop(members)
        change([*members, ensemble])
        expected = loop(members)
        assert (expected - before).abs().max() > 1e-2
        for _ in range(2):
            assert relative_error(ensemble(X, T), expected) < 1e-6
        (other,) = ensemble._engine.plans.entries
        assert other is not entry
        assert other.calls == 2

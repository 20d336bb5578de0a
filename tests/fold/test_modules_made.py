"""Members that make, replace or remove modules when they are called."""

import copy
import functools

import pytest
import torch
from torch import nn

import fastens


class Building(nn.Module):
    """Builds, replaces or removes a part of itself in its forward.

    Args:
        how: what it does.
        when: in which of its calls.
    """

    def __init__(self, how: str, when: int) -> None:
        super().__init__()
        self.first, self.last, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.Tanh()
        self.how, self.when, self.calls = how, when, 0

    def change(self) -> None:
        """Change the modules."""
        if self.how == "makes a linear layer":
            self.part = nn.Linear(4, 4)
            with torch.no_grad():
                self.part.weight.copy_(self.first.weight * 2)
        elif self.how == "makes one inside another":
            self.part = nn.Sequential(nn.ReLU(), nn.LayerNorm(4))
        elif self.how == "puts in its own once more":
            self.part = nn.Sequential(nn.ReLU(), self.last)
        elif self.how == "replaces one that has weights":
            self.last = nn.Linear(4, 4)
        elif self.how == "replaces one by one that has weights":
            self.act = nn.BatchNorm1d(4)
        elif self.how == "removes one that has weights":
            self.part = nn.Identity()
            del self.last
        elif self.how == "makes an activation":
            self.part = nn.ReLU()
        elif self.how == "adds an activation":
            self.add_module("part", nn.Sequential(nn.ReLU(), nn.Dropout(0.0)))
        elif self.how == "replaces an activation":
            self.act = nn.SiLU()
        elif self.how == "removes an activation":
            del self.act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, 4] to [B, 4]."""
        self.calls += 1
        if self.calls == self.when:
            self.change()
        h = self.first(x)
        h = self.act(h) if hasattr(self, "act") else h
        part = getattr(self, "part", None)
        if part is not None:
            h = part(h) * (3 if part.training else 1)
        return self.last(h) if hasattr(self, "last") else h


def members_that_build(how, when):
    """Three members, copies of them for the loop, and the modules that they have."""
    torch.manual_seed(0)
    members = [Building(how, when).eval() for _ in range(3)]
    return members, copy.deepcopy(members), [dict(m._modules) for m in members]


def mean_of(members, x):
    """What the loop returns."""
    return torch.stack([member(x) for member in members]).mean(0)


assert_close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
WITH_TENSORS = [
    "makes a linear layer", "makes one inside another", "puts in its own once more", "replaces one that has weights",
    "replaces one by one that has weights", "removes one that has weights",
]  # fmt: skip
WITHOUT = ["makes an activation", "adds an activation", "replaces an activation", "removes an activation"]


@pytest.mark.parametrize("grad", [False, True], ids=["sampling", "gradients"])
@pytest.mark.parametrize("when", [1, 2, 4])
@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("how", WITHOUT)
def test_modules_without_tensors_are_each_members_own(how, engine, when, grad):
    members, loop, before = members_that_build(how, when)
    ensemble = fastens.Ensemble(members, engine=engine)
    with torch.set_grad_enabled(grad):
        for i, x in enumerate(torch.randn(8, 2, 4)):
            expected = mean_of(loop, x)
            assert_close(ensemble(x), expected)
            if i in (4, 5):
                ensemble.train(i == 4)
                for member in loop:
                    member.train(i == 4)
            if i == 6:
                ensemble = copy.deepcopy(ensemble)
    assert [dict(m._modules) for m in members] == before
    alone = ensemble.members[1]
    x = torch.randn(2, 4)
    assert_close(alone(x), loop[1](x))
    assert hasattr(alone, "part") == hasattr(loop[1], "part")
    assert hasattr(alone, "act") == hasattr(loop[1], "act")


@pytest.mark.parametrize("grad", [False, True], ids=["sampling", "gradients"])
@pytest.mark.parametrize("when", [1, 2, 4])
@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("how", WITH_TENSORS)
def test_modules_with_tensors_are_an_error_that_says_what_to_do(how, engine, when, grad):
    members, loop, before = members_that_build(how, when)
    ensemble = fastens.Ensemble(members, engine=engine)
    x = torch.randn(2, 4)
    with torch.set_grad_enabled(grad):
        for _ in range(when - 1):
            assert_close(ensemble(x), mean_of(loop, x), rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="call every member once, and make the ensemble of them then"):
            _ = [ensemble(x) for _ in range(2)]  # what a member alone removes is missed by the next call
    assert [dict(m._modules) for m in members] == before

    for member in members:  # what it says
        for _ in range(when):
            member(x)
    loop, ensemble = copy.deepcopy(members), fastens.Ensemble(members, engine=engine)
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            assert_close(ensemble(x), mean_of(loop, x), rtol=1e-5, atol=1e-5)

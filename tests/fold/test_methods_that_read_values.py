"""Methods without tensors that read values and run on each member: weights stay the same objects, errors undo all."""

import copy

import pytest
import torch
from torch import nn

import fastens
from tests.fold.contract import K, made, near
from tests.fold.test_what_code_does_to_weights import same_gradients

pytestmark = pytest.mark.filterwarnings("ignore:fastens")
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Reads(nn.Module):
    """Counts its calls if asked, so that looped members have state of their own."""

    def __init__(self, counts):
        super().__init__()
        self.first, self.last, self.counts, self.calls, self.past = nn.Linear(4, 4), nn.Linear(4, 4), counts, 0, []

    def forward(self, x):
        """Two layers."""
        self.calls += self.counts
        return self.last(torch.tanh(self.first(x))) + self.calls + len(self.past)

    def looks(self):
        """Read values, and change nothing."""
        assert self.first.weight.norm().item() > 0

    def normalises(self):
        """Divide a weight by its norm."""
        with torch.no_grad():
            self.first.weight.div_(self.first.weight.norm().item())

    def clips(self):
        """Divide each gradient by its norm."""
        for p in self.parameters():
            p.grad.mul_(0.5)
            p.grad.div_(p.grad.norm().item() + 1)

    def drops(self):
        """Take away a gradient, and halve the next."""
        if self.first.weight.norm().item() > 0:
            self.first.weight.grad = None
            self.last.weight.grad *= 0.5

    def sets(self):
        """Give a weight another gradient."""
        self.first.weight.grad = self.first.weight.detach() * self.first.weight.norm().item()

    def freezes(self):
        """Freeze a layer."""
        if self.first.weight.norm().item() > 0:
            self.first.requires_grad_(False)

    def norm(self):
        """A number that is each member's own."""
        self.past.append(1)
        return self.first.weight.norm().item()

    def fails(self, bound):
        """Change everything, and fail in one member."""
        self.calls += 10
        self.past.append(1)
        self.last.requires_grad_(False)
        with torch.no_grad():
            self.first.weight.mul_(2)
        self.first.bias = nn.Parameter(self.first.bias.detach() * 2)
        for p in self.parameters():
            if p.grad is not None:
                p.grad.mul_(2)
        self.last.weight.grad = None
        if self.first.weight.norm().item() == bound:
            raise KeyError("no such value")


def both(counts, engine, backward):
    members = [made(lambda _: Reads(counts), k) for k in range(K)]
    ensemble = fastens.Ensemble(copy.deepcopy(members), engine=engine)
    found, expected = ensemble(X), torch.stack([member(X) for member in members]).mean(0)
    if backward:
        found.sum().backward()
        expected.sum().backward()
    return ensemble, members


KINDS = pytest.mark.parametrize(
    ("counts", "engine"), [(False, "auto"), (False, "loop"), (True, "loop")], ids=["fold", "loop", "own state"]
)


@KINDS
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("method", ["looks", "normalises", "clips", "drops", "sets", "freezes"])
def test_parameters_are_the_same_objects_with_the_members_gradients(method, counts, engine, backward):
    if method in ("clips", "drops") and not backward:
        pytest.skip("there is no gradient")
    ensemble, members = both(counts, engine, backward)
    before = dict(ensemble.named_parameters())
    pending = ensemble(X)
    for member in members:
        member(X)
        getattr(member, method)()
    getattr(ensemble, method)()
    after = dict(ensemble.named_parameters())
    assert all(after[name] is p for name, p in before.items())
    same_gradients(ensemble, members)
    if method == "looks":
        pending.sum().backward()  # nothing was written to
        ensemble.zero_grad()
        for member in members:
            member.zero_grad()
    for _ in range(2):
        found, expected = ensemble(X), torch.stack([member(X) for member in members]).mean(0)
        near(found, expected)
        found.sum().backward()
        expected.sum().backward()
        same_gradients(ensemble, members)


@KINDS
@pytest.mark.parametrize("backward", [False, True])
def test_a_method_that_fails_in_one_member_changes_none(counts, engine, backward):
    ensemble, members = both(counts, engine, backward)
    before = dict(ensemble.named_parameters())
    with pytest.raises(KeyError):
        ensemble.fails((2 * members[1].first.weight).norm().item())
    after = dict(ensemble.named_parameters())
    assert all(after[name] is p and p.requires_grad for name, p in before.items())
    same_gradients(ensemble, members)
    near(ensemble(X), torch.stack([member(X) for member in members]).mean(0))


@KINDS
def test_numbers_in_which_members_differ_are_an_error_that_changes_none(counts, engine):
    ensemble, members = both(counts, engine, False)
    with pytest.raises(TypeError, match="members return"):
        ensemble.norm()
    near(ensemble(X), torch.stack([member(X) for member in members]).mean(0))

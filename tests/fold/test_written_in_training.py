"""Networks that write to their own weights or buffers while they are trained: as K separate trainings."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastens
from fastens.training import training_step
from tests.tolerances import relative_error


class Normalised(nn.Module):
    """Weights are made of unit length before they are used, as EDM2's are in training."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        for layer in (self.first, self.second):
            if self.training:
                with torch.no_grad():
                    layer.weight.copy_(layer.weight / layer.weight.norm(dim=1, keepdim=True))
            x = torch.sin(layer(x))
        return x


class Tied(Normalised):
    """Two layers of one weight, which is written to by the first's name."""

    def __init__(self):
        super().__init__()
        self.second.weight = self.first.weight

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.first.weight.mul_(0.9)
        return self.second(torch.sin(self.first(x)))


class Codebook(nn.Module):
    """A codebook that follows what is encoded, before it is looked up."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("codes", torch.randn(5, 6))

    def forward(self, x):
        h = self.encode(x)
        if self.training:
            with torch.no_grad():
                self.codes.lerp_(h.mean(0, keepdim=True).expand_as(self.codes), 0.1)
        return self.decode(torch.cdist(h, self.codes).softmax(-1) @ self.codes)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.calls += 1
        return self.layer(x) * self.calls


class Plain(nn.Module):
    """Writes to nothing."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.second(torch.sin(self.first(x)))


class Again(nn.Module):
    """Runs a part of itself again in the backward pass."""

    def __init__(self, part, reentrant):
        super().__init__()
        self.inner, self.part, self.reentrant = nn.Linear(6, 6), part, reentrant

    def forward(self, x):
        return checkpoint(self.part, self.inner(x), use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one", "ignore:None of the inputs have")
@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("again", [None, False, True], ids=["once", "again", "again, reentrant"])
@pytest.mark.parametrize("kind", [Plain, Normalised, Tied, Codebook, Counting])
def test_trains_as_members_do_apart(kind, again, engine):
    torch.manual_seed(0)
    members = [kind() if again is None else Again(kind(), again) for _ in range(3)]
    ensemble = fastens.Ensemble(copy.deepcopy(members), engine=engine)
    optimizer = torch.optim.SGD(ensemble.parameters(), 0.1, momentum=0.9)
    apart = [torch.optim.SGD(member.parameters(), 0.1, momentum=0.9) for member in members]
    for step in range(4):
        x, y = torch.randn(2, 3, 4, 6)
        training_step(ensemble, optimizer, lambda outputs, y=y: (outputs - y).square(), x)
        for k, member in enumerate(members):
            apart[k].zero_grad()
            (member(x[k]) - y[k]).square().mean().backward()
            apart[k].step()
        for member, one in zip(members, ensemble.members, strict=True):
            for name, expected in member.state_dict().items():
                assert relative_error(one.state_dict()[name], expected) < 1e-5, (step, name)
        for mode, context in ((False, torch.no_grad), (True, torch.no_grad), (True, torch.inference_mode)):
            ensemble.train(mode)
            with context():
                x = torch.randn(4, 6)
                expected = torch.stack([member.train(mode)(x) for member in members])
                assert relative_error(ensemble.member_outputs(x), expected) < 1e-5, (step, mode, context)


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("enabled", [False, True])
def test_a_member_copies_layers_of_its_own(enabled, engine):
    class Copying(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            twice = copy.deepcopy(self.layer)
            with torch.no_grad():
                twice.weight.mul_(2)
            return twice(x) + copy.copy(self.layer)(x)

    members = [Copying() for _ in range(3)]
    ensemble = fastens.Ensemble(copy.deepcopy(members), engine=engine)
    with torch.set_grad_enabled(enabled):
        for _ in range(3):
            x = torch.randn(2, 6)
            expected = torch.stack([member(x) for member in members])
            assert relative_error(ensemble.member_outputs(x), expected) < 1e-5


def test_a_branch_by_torch_cond_runs_in_the_loop():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda h: self.layer(h).sin(), lambda h: self.layer(h).cos(), (x,))

    members = [Branching() for _ in range(2)]
    ensemble = fastens.Ensemble(copy.deepcopy(members), engine="loop")
    with torch.no_grad():
        for x in (torch.ones(2, 6), -torch.ones(2, 6)):
            expected = torch.stack([member(x) for member in members])
            assert relative_error(ensemble.member_outputs(x), expected) < 1e-6

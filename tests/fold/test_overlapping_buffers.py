"""Buffers of one member that share memory: read as they are, and never written to apart from one another."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastens
from tests.tolerances import NETWORK, relative_error

K = 3
KINDS = {
    "part": lambda t: t[1:3],
    "every other": lambda t: t.detach()[::2],
    "whole": lambda t: t.view(4),
    "apart": lambda t: t.chunk(2)[1],
}
pytestmark = pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")


class Network(nn.Module):
    whole: torch.Tensor
    part: torch.Tensor

    def __init__(self, kind, writes):
        super().__init__()
        self.layer, self.writes, memory = nn.Linear(4, 4), writes, torch.randn(8)
        self.register_buffer("whole", memory[:4])
        self.register_buffer("part", memory[4:6] if kind == "apart" else KINDS[kind](self.whole))

    def forward(self, x, late=True):
        if self.writes and late:
            getattr(self, self.writes).add_(1)
        return self.layer(x) * self.whole + self.part.sum()


def made(kind, writes):
    torch.manual_seed(0)
    return [Network(kind, writes).eval() for _ in range(K)]


@pytest.mark.parametrize("engine", ["auto", "fold", "loop"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("writes", ["whole", "part", ""])
@pytest.mark.parametrize("kind", KINDS)
def test_writes_are_errors_and_reads_are_none(kind, writes, late, grad, engine):
    """Also where no first call wrote; buffers that share memory and no element are written to as any."""
    members, references = made(kind, writes), made(kind, writes)
    ensemble = fastens.Ensemble(members, engine=engine)
    x = torch.randn(3, 4)
    with torch.set_grad_enabled(grad):
        if late:
            ensemble(x, False)
        if writes and kind != "apart":
            with pytest.raises(ValueError, match="shares memory"):
                ensemble(x, True)
            return
        for _ in range(2):
            expected = torch.stack([each(x, True) for each in references]).mean(0)
            assert relative_error(ensemble(x, True), expected) < NETWORK[torch.float32]
        if not writes and engine != "loop":
            assert ensemble.engine == "fold"
            assert grad or any(call.state == "planned" for call in ensemble.report().calls)


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("writes", ["whole", "part"])
@pytest.mark.parametrize("apart", [False, True])
def test_attributes_that_are_parts_of_buffers(apart, writes, engine):
    """Members that differ are modules, in which memory stays shared; others are refused as where both are buffers."""

    def network(number):
        member = made("part", writes)[number]
        part = member.part
        del member.part
        member.part = part
        member.whole.add_(number if apart else 0)
        return member

    members, references = [network(k) for k in range(K)], [network(k) for k in range(K)]
    if not apart:
        for each in (*members, *references):
            with torch.no_grad():
                each.whole.copy_(members[0].whole)
    ensemble = fastens.Ensemble(members, engine=engine)
    for _ in range(2):
        x = torch.randn(3, 4)
        with torch.no_grad():
            if not apart:
                with pytest.raises(ValueError, match="shares memory"):
                    ensemble(x)
            else:
                expected = torch.stack([each(x) for each in references]).mean(0)
                assert relative_error(ensemble(x), expected) < NETWORK[torch.float32]


@pytest.mark.parametrize("way", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))], ids=["copy", "pickle"])
@pytest.mark.parametrize("called", [False, True])
def test_copies_refuse_writes_too(called, way):
    ensemble, x = fastens.Ensemble(made("part", "part")), torch.randn(3, 4)
    if called:
        ensemble(x, False)
    with pytest.raises(ValueError, match="shares memory"):
        way(way(ensemble))(x)


def from_files(members, make, folder):
    paths = [folder / f"{k}.pt" for k in range(len(members))]
    for member, path in zip(members, paths, strict=True):
        torch.save(member.state_dict(), path)
    return fastens.load_members(paths, make)


def saved(members, make, folder):
    fastens.Ensemble(members).save_pretrained(folder)
    return fastens.Ensemble.from_pretrained(folder, make)


ROUTES = {
    "files": lambda *given: fastens.Ensemble(from_files(*given)),
    "saved": saved,
    "dtype": lambda members, *_: fastens.Ensemble(members, dtype=torch.float32),
    "dropout": lambda members, *_: fastens.MCDropout(members[0], K, p=0.5),
    "new weights": lambda members, *_: fastens.Ensemble(members).renewed(),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("writes", ["whole", "part", ""])
def test_members_by_every_route(writes, route, tmp_path):
    class Dropping(Network):
        def forward(self, x, late=True):
            return torch.dropout(super().forward(x, late), 0.5, self.training)

        def renewed(self):
            self.layer.weight = nn.Parameter(torch.from_numpy(2 * self.layer.weight.detach().numpy()))
            return self

    members = [Dropping("part", writes).eval() for _ in range(K)]
    ensemble, x = ROUTES[route](members, lambda: Dropping("part", writes).eval(), tmp_path), torch.randn(3, 4)
    ensemble(x, False)
    if writes:
        with pytest.raises(ValueError, match="shares memory"):
            ensemble(x)
    else:
        assert ensemble(x).isfinite().all()
        assert ensemble.engine == "fold"


class Tied(nn.Module):
    """Two parameters, or a parameter and a buffer, in one memory."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        if kind == "parameters":
            self.second.weight = nn.Parameter(self.first.weight.data)
        elif kind == "part":
            self.second.bias = nn.Parameter(self.first.weight.data[1])
        elif kind == "buffer":
            self.register_buffer("row", self.first.weight.data[2])

    def forward(self, x):
        y = self.second(torch.tanh(self.first(x)))
        return y + getattr(self, "row", 0)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", ["parameters", "part", "buffer"])
def test_what_is_trained_together_is_so_in_the_ensemble(kind, frozen):
    def made():
        torch.manual_seed(0)
        return [Tied(kind).requires_grad_(not frozen) for _ in range(K)]

    members, references = made(), made()
    ensemble = fastens.Ensemble(members)
    for _ in range(3):
        x = torch.randn(5, 4)
        with torch.no_grad():
            expected = torch.stack([each(x) for each in references]).mean(0)
            assert relative_error(ensemble(x), expected) < NETWORK[torch.float32]
        if frozen:
            continue
        found = torch.stack([each(x) for each in references]).mean(0)
        for answer, trained in ((ensemble(x), [ensemble]), (found, references)):
            answer.square().sum().backward()
            with torch.no_grad():
                for p in (p for each in trained for p in each.parameters()):
                    p -= 0.01 * p.grad
                    p.grad = None
    assert ensemble.engine == ("fold" if frozen else "loop")


ROUTES_OF_TIED = {
    "dropout": lambda tied: fastens.MCDropout(tied, K, p=0.5),
    "unfrozen": lambda tied: fastens.Ensemble([tied.requires_grad_(False), frozen_like(tied)]).requires_grad_(),
    "one unfrozen": lambda tied: unfrozen(fastens.Ensemble([tied.requires_grad_(False), frozen_like(tied)])),
    "unfrozen dropout": lambda tied: fastens.MCDropout(tied.requires_grad_(False), K, p=0.5).requires_grad_(),
    "replaced": lambda tied: fastens.Ensemble([Tied("apart") for _ in range(K)]).replace_member(1, tied),
}


def frozen_like(tied):
    made = copy.deepcopy(tied)
    made.second.weight = nn.Parameter(made.first.weight.data.mul_(0.5), requires_grad=False)
    return made


def unfrozen(ensemble):
    ensemble.second.weight.requires_grad_(True)
    return ensemble


@pytest.mark.parametrize("route", ROUTES_OF_TIED)
def test_what_would_be_trained_apart_is_an_error(route):
    with pytest.raises(ValueError, match=r"shared? memory"):
        ROUTES_OF_TIED[route](Tied("parameters"))(torch.randn(5, 4))


@pytest.mark.parametrize("kind", ["parameters", "part", "buffer"])
def test_members_from_files_are_trained_together(kind, tmp_path):
    def made():
        torch.manual_seed(0)
        return [Tied(kind).eval() for _ in range(K)]

    ensemble = fastens.Ensemble(from_files(made(), lambda: Tied(kind), tmp_path))
    assert "share memory" in ensemble.report().why
    x, references = torch.randn(5, 4), made()
    for answer in (ensemble(x), torch.stack([each(x) for each in references]).mean(0)):
        answer.square().sum().backward()
    with torch.no_grad():
        for p in (p for each in (ensemble, *references) for p in each.parameters()):
            p -= 0.1 * p.grad
        expected = torch.stack([each(x) for each in references]).mean(0)
        assert relative_error(ensemble(x), expected) < NETWORK[torch.float32]

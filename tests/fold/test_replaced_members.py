"""Members that are replaced after calls: of a state_dict the weights are taken, of a module what it remembers too."""

import copy

import pytest
import torch
from torch import nn

import fastens
from tests.networks import randomised
from tests.tolerances import relative_error

K = 3
X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Cached(nn.Module):
    """Makes a table of each length once."""

    def __init__(self, reads):
        super().__init__()
        self.layer, self.reads, self.tables = nn.Linear(4, 4), reads, {}

    def forward(self, x):
        if x.shape[0] not in self.tables:
            self.tables[x.shape[0]] = torch.arange(float(x.shape[0]))[:, None]
        return self.seen(self.layer(x) + self.tables[x.shape[0]])

    def seen(self, h):
        return h * 0 if self.reads and h.isnan().any() else h  # each member by its own Python


class Counting(Cached):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return self.seen(self.layer(x) * self.calls)


class Remembering(Cached):
    last = None

    def forward(self, x):
        h = self.layer(x)
        last, self.last = self.last, h.detach()
        return self.seen(h if last is None else h + last.mean())


class Accumulating(Cached):
    def __init__(self, reads):
        super().__init__(reads)
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x):
        h = self.layer(x)
        self.total = self.total + h.detach().mean(0)
        return self.seen(h + self.total)


CLASSES = [Cached, Counting, Remembering, Accumulating]


def made(kind, reads, seed=None):
    return [randomised(lambda: kind(reads), k) for k in ([*range(K)] if seed is None else [seed])]


def called(ensemble, singles):
    with torch.no_grad():
        assert relative_error(ensemble(X), torch.stack([member(X) for member in singles]).mean(0)) < 1e-5


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")
@pytest.mark.parametrize("given", ["a state_dict", "its own", "new", "called before"])
@pytest.mark.parametrize("reads", [False, True], ids=["folded", "looped"])
@pytest.mark.parametrize("kind", CLASSES)
def test_replaced_after_calls(kind, reads, given):
    singles = made(kind, reads)
    ensemble = fastens.Ensemble(copy.deepcopy(singles))
    for _ in range(3):
        called(ensemble, singles)
    assert ensemble.engine == ("loop" if reads else "fold")
    new = made(kind, reads, 7)[0]
    if given == "called before":
        new(X[:1]), new(X)
    if given == "a state_dict":
        ensemble.replace_member(1, new.state_dict())
        singles[1].load_state_dict(new.state_dict())
    elif given == "its own":
        ensemble.replace_member(1, ensemble.members[1])
    elif reads or kind is Accumulating:
        ensemble.replace_member(1, new)
        singles[1] = new
    else:  # one pass has one state of Python's
        with pytest.raises(ValueError, match="give its state_dict where only its weights are meant"):
            ensemble.replace_member(1, new)
    for _ in range(3):
        called(ensemble, singles)
    for copied in (copy.deepcopy(ensemble), fastens.Ensemble(list(ensemble.members))):
        called(copied, copy.deepcopy(singles))


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")
def test_other_modules_are_refused_after_calls():
    ensemble = fastens.Ensemble(made(Counting, True))
    ensemble(X)
    new = made(Counting, True, 7)[0]
    new.layer = nn.Sequential(new.layer)
    with pytest.raises(ValueError, match="member 1 cannot be replaced"):
        ensemble.replace_member(1, new)
    hooked = made(Counting, True, 7)[0]
    hooked.register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(ValueError, match="member 1 cannot be replaced"):
        ensemble.replace_member(1, hooked)

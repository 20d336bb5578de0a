"""A thread that trains while another makes a first call: what it writes to weights is kept."""

import contextlib
import queue
import threading
import warnings

import pytest
import torch
from torch import nn

import fastens

K = 3


class Waiting(nn.Module):
    """A network in whose first call somebody else writes to weights."""

    def __init__(self, called, written):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        object.__setattr__(self, "wait", lambda: (called.set(), written.wait(10)))

    def forward(self, x):
        self.wait()
        return self.linear(x)


@pytest.mark.filterwarnings("error:fastens")
@pytest.mark.parametrize("refreshed", [False, True])
@pytest.mark.parametrize("which", ["stacks", "members"])
def test_what_another_thread_writes_is_kept(which, refreshed):
    called, written = threading.Event(), threading.Event()
    network = Waiting(called, written)
    members = [network] + [Waiting(called, written) for _ in range(K - 1)]
    for member in members[1:]:
        object.__setattr__(member, "wait", network.wait)
    ensemble = fastens.Ensemble(members)
    if refreshed:  # the members that were handed in are the oracle no more
        ensemble.refresh()

    def train():
        called.wait(10)
        with torch.no_grad():
            for p in ensemble.parameters() if which == "stacks" else members[0].parameters():
                p.fill_(7.0)
        written.set()

    thread = threading.Thread(target=train)
    thread.start()
    with torch.no_grad():
        ensemble(torch.randn(2, 4))
        thread.join()
        of = ensemble.parameters() if which == "stacks" else members[0].parameters()
        assert all(bool((p == 7).all()) for p in of)
        x = torch.randn(2, 4)
        expected = torch.stack([member(x) for member in ensemble.members]).mean(0)
        torch.testing.assert_close(ensemble(x), expected)
    assert ensemble.engine == "fold"


class Writing(nn.Module):
    """A network whose every call of a member somebody else's write falls into, until there were enough."""

    def __init__(self, write):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        object.__setattr__(self, "write", write)

    def forward(self, x):
        h = self.linear(x)
        self.write()
        return h


@pytest.mark.filterwarnings("error:fastens")
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("rows", [False, True], ids=["all", "rows"])
@pytest.mark.parametrize("which", ["stacks", "members"])
def test_a_check_that_writes_fell_into_is_made_again(which, rows, gradients):
    asked, done, ensembles, counted = queue.Queue(), queue.Queue(), [], [0]

    def train():
        while asked.get():
            if ensembles and counted[0] < 12:
                counted[0] += 1
                with torch.no_grad():
                    for p in ensembles[0].parameters() if which == "stacks" else members[0].parameters():
                        p.fill_(float(counted[0]))
            done.put(True)

    def write():
        asked.put(True)
        done.get(timeout=10)

    thread = threading.Thread(target=train)
    thread.start()
    members = [Writing(write) for _ in range(K)]
    ensembles.append(fastens.Ensemble(members))
    with torch.set_grad_enabled(gradients):
        for _ in range(12):
            x = torch.randn(K, 4)
            with ensembles[0].assigned([2, 0, 1]) if rows else contextlib.nullcontext():
                found = ensembles[0](x)
            written = ensembles[0].parameters() if which == "stacks" else members[0].parameters()
            assert all(bool((p == counted[0]).all()) for p in written)
        outputs = torch.stack([member(x) for member in ensembles[0].members])
        expected = outputs[[2, 0, 1], [0, 1, 2]] if rows else outputs.mean(0)
        torch.testing.assert_close(found, expected)
    asked.put(False)
    thread.join()
    assert ensembles[0].engine == "fold"


class Own(nn.Module):
    """A network that writes to its own weight, in ways that are counted and not."""

    def __init__(self, how):
        super().__init__()
        self.linear, self.how = nn.Linear(4, 4), how

    def forward(self, x):
        h = self.linear(x)
        if self.how == "numpy":
            self.linear.bias.detach().numpy()[:] += 1
        with torch.no_grad():
            if self.how == "in place":
                self.linear.bias.add_(1)
            if self.how == "data":
                self.linear.bias.data += 1
            if self.how == "listed":
                torch._foreach_add_([self.linear.bias], 1)
        return h


@pytest.mark.parametrize("how", ["numpy", "in place", "data", "listed"])
def test_what_a_network_writes_to_its_own_weights_makes_it_loop(how):
    members, own = ([Own(how) for _ in range(K)] for _ in range(2))
    for a, b in zip(members, own, strict=True):
        b.load_state_dict(a.state_dict())
    ensemble = fastens.Ensemble(members)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(2, 4)
            expected = torch.stack([member(x) for member in own]).mean(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.testing.assert_close(ensemble(x), expected)
    assert ensemble.engine == "loop"

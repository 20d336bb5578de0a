"""A thread that trains while another makes a first call: what it writes to weights is kept."""

import threading

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


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")
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

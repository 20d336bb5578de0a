"""Recorded steps: what is replayed and what is not, with code that runs again in place of a CUDA graph."""

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

import fastens
from fastens import capture


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, t, scale=1.0):
        return {"sample": self.layer(x) * scale + t.reshape(-1, 1)}


@pytest.fixture
def ens(monkeypatch):
    """An ensemble whose recordings count their replays and write the same memory every time."""
    replays = []

    def record(run, device):
        output = run()

        def replay():
            replays.append(1)
            for old, new in zip(pytree.tree_leaves(output), pytree.tree_leaves(run()), strict=True):
                old.copy_(new)

        return replay, output

    monkeypatch.setattr(capture, "record_graph", record)
    torch.manual_seed(0)
    ensemble = fastens.Ensemble([Net() for _ in range(3)], "median").eval()
    ensemble.__dict__["replays"] = replays
    return ensemble


X, T = torch.randn(2, 4), torch.tensor([1.0, 2.0])


def test_replays_with_new_values_and_returns_the_callers_memory(ens):
    with torch.no_grad():
        expected = [ens(X, T)["sample"], ens(2 * X, T + 1)["sample"]]
        ens._record((X, T), {})
        first = ens(X, T)["sample"]
        kept = first.clone()
        second = ens(2 * X, T + 1)["sample"]
        assert len(ens.replays) == 2
        torch.testing.assert_close(first, kept)  # the second call did not write to it
        second.clamp_(-0.1, 0.1)
        torch.testing.assert_close(ens(2 * X, T + 1)["sample"], expected[1])
        torch.testing.assert_close(first, expected[0])


@pytest.mark.parametrize(
    "call",
    [
        lambda ens: ens(torch.randn(3, 4), torch.zeros(3)),
        lambda ens: ens(X.double().float(), T, scale=2.0),
        lambda ens: ens(X, T, 1.0),
        lambda ens: (setattr(ens, "rule", "mean"), ens(X, T)),
        lambda ens: (ens.train(), ens(X, T)),
        lambda ens: (ens.refresh(), ens(X, T)),
        lambda ens: (ens.double(), ens(X.double(), T)),
    ],
    ids=["shape", "keyword", "number", "rule", "training", "refresh", "dtype"],
)
def test_falls_back_where_nothing_fits(ens, call):
    ens._record((X, T), {})
    with torch.no_grad():
        ens(X, T)
        call(ens)
    assert len(ens.replays) == 1


def test_gradients_are_never_replayed(ens):
    ens._record((X, T), {})
    ens(X, T)["sample"].sum().backward()
    assert not ens.replays
    assert all(p.grad is not None for p in ens.parameters())


def test_in_place_changes_show(ens):
    ens._record((X, T), {})
    with torch.no_grad():
        before = ens(X, T)["sample"]
        for parameter in ens.parameters():
            parameter.mul_(2)
        assert not torch.equal(ens(X, T)["sample"], before)
    assert len(ens.replays) == 2


def test_refusals(ens):
    with pytest.raises(RuntimeError, match="is on cpu, expected a CUDA device"):
        ens.capture(X, T)
    ens.rule = "alternating"
    with pytest.raises(ValueError, match="draws members"):
        ens._record((X, T), {})
    with pytest.raises(ValueError, match="training mode"):
        ens.train()._record((X, T), {})

"""Recurrent layers step by step for all members at once, and where they run member by member instead."""

import itertools

import pytest
import torch
from torch import nn

import fastens
from fastens.fold.rules.recurrent import MOST_STEPS
from tests.tolerances import NETWORK, relative_error

K = 3
KINDS = {
    "gru": (nn.GRU, {}),
    "lstm": (nn.LSTM, {}),
    "rnn": (nn.RNN, {}),
    "rnn with relu": (nn.RNN, {"nonlinearity": "relu"}),
}


class Outputs(nn.Module):
    """A recurrent layer, all of whose results count."""

    def __init__(self, kind, **settings):
        super().__init__()
        self.layer = kind(5, 7, **settings)

    def forward(self, x):
        first = self.layer.batch_first
        y, last = self.layer(x if first else x.transpose(0, 1))
        y = y if first else y.transpose(0, 1)
        last = last if isinstance(last, tuple) else (last,)
        return torch.cat([y.flatten(1), *(state.transpose(0, 1).flatten(1) for state in last)], 1)


def members_of(kind, **settings):
    torch.manual_seed(0)
    return [Outputs(kind, **settings).eval() for _ in range(K)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_steps_equal_the_members(name, dtype):
    kind, settings = KINDS[name]
    for layers, both, first, bias in itertools.product((1, 2), (False, True), (False, True), (False, True)):
        own = {"num_layers": layers, "bidirectional": both, "batch_first": first, "bias": bias}
        members = [member.to(dtype) for member in members_of(kind, **settings, **own)]
        ensemble, x = fastens.Ensemble(members, engine="fold"), torch.randn(2, 4, 5, dtype=dtype)
        with torch.no_grad():
            ensemble.member_outputs(0.5 * x)
            outputs, expected = ensemble.member_outputs(x), torch.stack([member(x) for member in members])
        assert relative_error(outputs, expected) <= NETWORK[dtype]
        assert not ensemble.report().looped


@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_the_members(name):
    kind, settings = KINDS[name]
    members = members_of(kind, batch_first=True, **settings)
    ensemble, x = fastens.Ensemble(members, engine="fold"), torch.randn(2, 4, 5)
    ensemble.member_outputs(x).square().sum().backward()
    assert list(ensemble.report().slices) == [
        kind.__name__.lower() if kind is not nn.RNN else f"rnn_{settings.get('nonlinearity', 'tanh')}"
    ]
    gradients = dict(ensemble.network.named_parameters())
    for k, member in enumerate(members):
        member(x).square().sum().backward()
        for path, parameter in member.named_parameters():
            assert relative_error(gradients[path].grad[k], parameter.grad) <= NETWORK[torch.float32]


def test_long_sequences_run_member_by_member():
    members = members_of(nn.GRU, batch_first=True)
    ensemble, x = fastens.Ensemble(members, engine="fold"), torch.randn(2, MOST_STEPS + 1, 5)
    with torch.no_grad():
        outputs, expected = ensemble.member_outputs(x), torch.stack([member(x) for member in members])
    assert relative_error(outputs, expected) <= NETWORK[torch.float32]
    assert ensemble.report().slices == {"gru": 1}

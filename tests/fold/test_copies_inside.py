"""Copies of activations and weights that a network makes: their memory and their graph are those of a member's."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.fold.contract import Held, batch


def _written(net, h):
    y = h.detach() * 1
    copy.copy(y).add_(1)
    return net.b(y) + h


def _saved(net, h):
    file = io.BytesIO()
    torch.save(h.detach(), file)
    file.seek(0)
    return net.b(torch.load(file, weights_only=False)) + h


USES = {
    "copy": lambda net, h: net.b(copy.copy(h)) + h,
    "copy of a weight": lambda net, h: F.linear(h, copy.copy(net.b.weight)) + net.b.bias,
    "copy that is written to": _written,
    "deepcopy": lambda net, h: net.b(copy.deepcopy(h.detach())) + h,
    "deepcopy of a weight": lambda net, h: F.linear(h, copy.deepcopy(net.b.weight)) + net.b.bias,
    "pickle": lambda net, h: net.b(pickle.loads(pickle.dumps(h.detach()))) + h,
    "file": _saved,
}


class Network(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.a, self.b, self.use = nn.Linear(4, 6), nn.Linear(6, 6), use

    def forward(self, x):
        return self.use(self, torch.tanh(self.a(x)))


@pytest.mark.parametrize("use", USES)
def test_copies(use):
    held = Held(lambda k: Network(USES[use]))
    held.everywhere(batch(3, 4))
    assert held.ensemble.engine == "fold"

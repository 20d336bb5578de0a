"""Small networks that tests of guidance share, and what they are called with."""

import itertools

import torch
from torch import nn

from fastens import schedules
from tests.networks import randomised

SCHEDULE = schedules.VP()
CLASSES, NULL = 4, 4
B = 3
T = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
LABELS = torch.tensor([0, 3, 1])
NULLS = torch.full((B,), NULL)


class Network(nn.Module):
    """A conditional network; ``out`` channels for 2 that come in."""

    def __init__(self, out=2, width=6):
        super().__init__()
        self.first = nn.Conv2d(2, width, 3, padding=1)
        self.last = nn.Conv2d(width, out, 3, padding=1)
        self.time = nn.Linear(1, width)
        self.label = nn.Embedding(CLASSES + 1, width)

    def forward(self, x, t, class_labels=None, scale=1.0):
        t = torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1).expand(len(x), 1)
        h = self.first(x) + (self.time(t) + self.label(class_labels))[:, :, None, None]
        return self.last(h.tanh()) * scale


class Unconditional(nn.Module):
    def __init__(self, width=4, depth=2):
        super().__init__()
        widths = [2, *[width] * depth, 2]
        pairs = itertools.pairwise(widths)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in pairs)

    def forward(self, x, t, class_labels=None):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def made(make=Network, number=3):
    return [randomised(make, seed).double() for seed in range(number)]

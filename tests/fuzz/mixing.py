"""Features in which rows of the batch meet, or stand in another dimension than the first."""

from random import Random

import torch
from torch import Tensor, nn

from tests.fuzz.registry import Block, Sizes, feature


@feature(weight=1.5, mixing=True)
class MixedRows(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.p = nn.Parameter(torch.zeros(sizes.width))
        kinds = "mean var softmax roll first norm flip cumsum sum amax cdist randn_free rows matmul numbered halves"
        self.how = draw.choice(kinds.split())

    def forward(self, h: Tensor) -> Tensor:
        y = h * self.per_channel(self.p, h)
        flat = y.flatten(1)
        if self.how == "mean":
            return y + y.mean(0)
        if self.how == "var":
            return y / (1 + y.var(0, correction=0, keepdim=True)).sqrt()
        if self.how == "softmax":
            return h * flat.mean(1).softmax(0).reshape(-1, *[1] * (h.ndim - 1))
        if self.how == "roll":
            return h + y.roll(1, 0)
        if self.how == "first":
            return h + y[0]
        if self.how == "norm":
            return y / (1 + y.norm())
        if self.how == "flip":
            return h + y.flip(0)
        if self.how == "cumsum":
            return y.cumsum(0)
        if self.how == "sum":
            return h + 0.1 * y.sum()
        if self.how == "amax":
            return y - y.amax(dim=0, keepdim=True)
        if self.how == "cdist":
            return h * torch.cdist(flat, flat).mean(1).reshape(-1, *[1] * (h.ndim - 1))
        if self.how == "matmul":
            return h + ((flat @ flat.t()).tanh() @ flat).reshape(h.shape) / flat.shape[1]
        if self.how == "numbered":
            return h * (1 + torch.arange(len(h), dtype=h.dtype)).reshape(-1, *[1] * (h.ndim - 1))
        if self.how == "halves":
            a, b = torch.cat([y, h]).chunk(2)
            return a + 0.5 * (b - a)
        if self.how == "rows":
            return torch.stack([row * (i + 1) for i, row in enumerate(y)])
        return torch.cat([h, y.mean(0, keepdim=True)])[: len(h)] + y.std()


@feature("vector", weight=1)
class FeatureFirst(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.w = nn.Parameter(torch.zeros(sizes.width, sizes.width))
        self.norm = nn.LayerNorm(sizes.width)

    def forward(self, h: Tensor) -> Tensor:
        y = torch.mm(self.w, h.t())  # [C, B]
        return self.norm(y.t())


@feature(weight=1)
class CalledTwice(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.linear = nn.Linear(sizes.width, sizes.width)
        self.pattern = draw.choice([(False, True), (False, True, False), (True, False)])

    def forward(self, h: Tensor) -> Tensor:
        y = h.movedim(self.channel_dim, -1)
        for swapped in self.pattern:
            y = self.linear(y.transpose(0, 1)).transpose(0, 1) if swapped and y.ndim > 2 else self.linear(y)
            y = torch.tanh(y)
        return y.movedim(-1, self.channel_dim)

"""Small networks of images and times, for ensembles over ranks."""

from torch import nn


class Convolutional(nn.Module):
    """A plan has it."""

    def __init__(self):
        super().__init__()
        self.first, self.time = nn.Conv2d(2, 8, 3, padding=1), nn.Linear(1, 8)
        self.norm, self.last = nn.GroupNorm(2, 8), nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x, t):
        h = self.first(x) + self.time(t[:, None].to(x.dtype))[..., None, None]
        return self.last(nn.functional.silu(self.norm(h)))


class OfTorch(nn.Module):
    """No plan has it: products of odd sizes, whose bits depend on how many there are and on where they begin."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(18, 37), nn.GELU(), nn.Linear(37, 18))

    def forward(self, x, t):
        h = x.flatten(1)
        return (self.layers(h) * h.exp().mean(1, keepdim=True)).view_as(x) * t.view(-1, 1, 1, 1)


class Reading(OfTorch):
    """Its Python reads a weight's value, so that members are looped."""

    def forward(self, x, t):
        sign = 1.0 if float(self.layers[0].weight[0, 0]) > 0 else -1.0
        return sign * super().forward(x, t)


class Deeper(OfTorch):
    def __init__(self):
        super().__init__()
        self.layers.append(nn.Tanh())

"""Features that keep Python state, write it in forward, or draw random numbers there."""

import dataclasses
import enum
import functools
import types
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz.registry import Block, Sizes, feature


@dataclasses.dataclass
class Settings:
    gain: float
    shift: float = 0.0


class Level(enum.Enum):
    LOW = 0.5
    HIGH = 2.0


def scaled(h: Tensor, by: float) -> Tensor:
    return h * by


def halved(h: Tensor) -> Tensor:
    return h / 2


CONTAINERS = (
    "float list tuple dict dataclass numpy array enum function partial closure namespace complex nested private none "
    "tensor tensors named_tensors string dtype torch"
).split()


class Stateful(Block):
    """Multiplies by a number that is kept in a container."""

    def keep(self, how: str, value: float) -> None:
        self.how = how
        tensor = torch.tensor(value)
        makers = {
            "float": lambda: value,
            "list": lambda: [1.0, value],
            "tuple": lambda: (value, "x"),
            "dict": lambda: {"gain": value},
            "dataclass": lambda: Settings(value),
            "numpy": lambda: np.float64(value),
            "array": lambda: np.array([1.0, value]),
            "enum": lambda: Level.LOW if value < 1 else Level.HIGH,
            "function": lambda: halved if value < 1 else torch.tanh,
            "partial": lambda: functools.partial(scaled, by=value),
            "closure": lambda: lambda h: h * value,
            "namespace": lambda: types.SimpleNamespace(gain=value),
            "complex": lambda: complex(value, 1),
            "nested": lambda: {"levels": [(1, {"gain": value})]},
            "none": lambda: None if value < 1 else value,
            "tensor": lambda: tensor,
            "tensors": lambda: [torch.ones(()), tensor],
            "named_tensors": lambda: {"gain": tensor},
            "string": lambda: "double" if value < 1 else "plain",
            "dtype": lambda: torch.float64 if value < 1 else torch.float32,
            "torch": lambda: F.silu if value < 1 else F.gelu,
            "private": lambda: value,
        }
        setattr(self, "_kept" if how == "private" else "kept", makers[how]())

    def forward(self, h: Tensor) -> Tensor:
        if self.how == "private":
            return h * self._kept
        if self.how in ("function", "partial", "closure", "torch"):
            return self.kept(h)
        if self.how == "string":
            return h * 2 if self.kept == "double" else h
        if self.how == "dtype":
            return h * 2 if self.kept is torch.float64 else h
        if self.how == "none":
            return h if self.kept is None else h * self.kept
        kept = self.kept
        gain = {
            "list": lambda: kept[1],
            "tuple": lambda: kept[0],
            "dict": lambda: kept["gain"],
            "dataclass": lambda: kept.gain + kept.shift,
            "array": lambda: float(kept[1]),
            "enum": lambda: kept.value,
            "namespace": lambda: kept.gain,
            "complex": lambda: kept.real,
            "nested": lambda: kept["levels"][0][1]["gain"],
            "tensors": lambda: kept[1],
            "named_tensors": lambda: kept["gain"],
        }.get(self.how, lambda: kept)()
        return h * gain


@feature(weight=3)
class SameState(Stateful):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.keep(draw.choice(CONTAINERS), draw.choice([0.5, 2.0, 1.25]))


@feature(weight=0.5, differs=True, own_python=True)
class OwnState(Stateful):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.keep(draw.choice(CONTAINERS), sizes.own.choice([0.25, 0.5, 0.75, 1.25, 1.5, 2.0]))


@feature(weight=0.3, differs=True, own_python=True)
class OwnForward(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.linear = nn.Linear(sizes.width, sizes.width)
        gain, inner = sizes.own.choice([0.5, 1.5, 2.0]), self.linear.forward
        how = draw.choice(["patched", "class", "hook"])
        if how == "patched":
            self.linear.forward = lambda h: gain * inner(h)
        elif how == "class":
            own = type("Own", (nn.Linear,), {"forward": lambda self, h: gain * nn.Linear.forward(self, h)})
            self.linear.__class__ = own
        else:
            self.linear.register_forward_hook(lambda module, args, output: gain * output)

    def forward(self, h: Tensor) -> Tensor:
        return self.linear(h.movedim(self.channel_dim, -1)).movedim(-1, self.channel_dim)


@feature(weight=0.7)
class SameHook(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.linear = nn.Linear(sizes.width, sizes.width)
        if draw.random() < 0.5:
            self.linear.register_forward_hook(doubled)
        else:
            self.linear.register_forward_pre_hook(doubled_input)

    def forward(self, h: Tensor) -> Tensor:
        return self.linear(h.movedim(self.channel_dim, -1)).movedim(-1, self.channel_dim)


def doubled(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return 2 * output


def doubled_input(module: nn.Module, args: tuple) -> tuple:
    return (2 * args[0],)


@feature(weight=1)
class ParameterContainers(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.several = nn.ParameterList([nn.Parameter(torch.zeros(sizes.width)) for _ in range(3)])
        self.named = nn.ParameterDict({"a": nn.Parameter(torch.zeros(sizes.width)), "b": nn.Parameter(torch.ones(1))})

    def forward(self, h: Tensor) -> Tensor:
        for p in self.several:
            h = torch.tanh(h * self.per_channel(p, h))
        return h * self.named["b"] + self.per_channel(self.named["a"], h)


@feature(weight=1)
class ModuleContainers(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.several = nn.ModuleList([nn.Linear(sizes.width, sizes.width) for _ in range(2)])
        self.named = nn.ModuleDict({"norm": nn.LayerNorm(sizes.width)})
        self.order = draw.choice([(0, 1), (1, 0, 1)])

    def forward(self, h: Tensor) -> Tensor:
        y = h.movedim(self.channel_dim, -1)
        for i in self.order:
            y = F.silu(self.several[i](y))
        return self.named["norm"](y).movedim(-1, self.channel_dim)


@feature(weight=0.7)
class TiedWeights(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.first = nn.Linear(sizes.width, sizes.width)
        self.second = nn.Linear(sizes.width, sizes.width)
        if draw.random() < 0.5:
            self.second.weight = self.first.weight
        else:
            self.second = self.first

    def forward(self, h: Tensor) -> Tensor:
        y = torch.tanh(self.first(h.movedim(self.channel_dim, -1)))
        return self.second(y).movedim(-1, self.channel_dim)


@feature(weight=1, equal=True)
class Frozen(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.trunk = nn.Linear(sizes.width, sizes.width).requires_grad_(False)
        self.adapter = nn.Linear(sizes.width, 2, bias=False)
        self.up = nn.Linear(2, sizes.width, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        y = h.movedim(self.channel_dim, -1)
        return (self.trunk(y) + self.up(self.adapter(y))).movedim(-1, self.channel_dim)


@feature(weight=0.5, stateful=True)
class Counter(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.calls, self.p = 0, nn.Parameter(torch.zeros(sizes.width))
        self.read = draw.random() < 0.7

    def forward(self, h: Tensor) -> Tensor:
        self.calls += 1
        return h * self.per_channel(self.p, h) * (1 + 0.1 * self.calls if self.read else 1)


@feature(weight=0.4, stateful=True)
class RememberedActivation(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.last, self.p = None, nn.Parameter(torch.zeros(sizes.width))
        self.in_list, self.history = draw.random() < 0.3, []

    def forward(self, h: Tensor) -> Tensor:
        y = h * self.per_channel(self.p, h)
        last = (self.history[-1] if self.history else None) if self.in_list else self.last
        out = y if last is None or last.shape != y.shape else y + 0.5 * last.to(y.dtype)
        if self.in_list:
            self.history.append(y.detach())
        else:
            self.last = y.detach()
        return out


@feature("sequence", "vector", weight=1)
class CachedTable(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.cache, self.how = {}, draw.choice(["dict", "attribute"])
        self.cached = None

    def forward(self, h: Tensor) -> Tensor:
        key = (h.shape[-1], h.dtype)
        if self.how == "dict":
            if key not in self.cache:
                self.cache[key] = torch.linspace(0, 1, h.shape[-1], dtype=h.dtype)
            return h + self.cache[key]
        if self.cached is None or self.cached.dtype != h.dtype or self.cached.shape[0] != h.shape[-1]:
            self.cached = torch.linspace(0, 1, h.shape[-1], dtype=h.dtype)
        return h + self.cached


@feature(weight=0.5, stateful=True, mixing=True)
class BufferWritten(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.register_buffer("average", torch.zeros(sizes.width))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.p = nn.Parameter(torch.zeros(sizes.width))
        self.how = draw.choice(["lerp", "assign", "copy", "count"])
        self.always = draw.random() < 0.5

    def forward(self, h: Tensor) -> Tensor:
        y = h * self.per_channel(self.p, h)
        if self.training or self.always:
            dims = [d for d in range(h.ndim) if d != self.channel_dim % h.ndim]
            with torch.no_grad():
                mean = y.detach().mean(dims).to(self.average.dtype)
                if self.how == "lerp":
                    self.average.lerp_(mean, 0.5)
                elif self.how == "copy":
                    self.average.copy_(mean)
                elif self.how == "assign":
                    self.average = 0.5 * self.average + 0.5 * mean
                self.steps += 1
        return y - self.per_channel(self.average, h).to(y.dtype) / (1 + self.steps)


@feature(weight=0.5, stateful=True)
class ParameterWritten(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.p = nn.Parameter(torch.zeros(sizes.width))

    def forward(self, h: Tensor) -> Tensor:
        self.p.data = self.p.data * 0.9
        return h * self.per_channel(self.p, h)


@feature(weight=0.8, random=True)
class RandomDraws(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.p = nn.Parameter(torch.zeros(sizes.width))
        self.how = draw.choice("randn_like randn rand_rows dropout bernoulli normal_ randperm training noise".split())

    def forward(self, h: Tensor) -> Tensor:
        y = h * self.per_channel(self.p, h)
        if self.how == "randn_like":
            return y + 0.1 * torch.randn_like(y)
        if self.how == "randn":
            return y + 0.1 * torch.randn(y.shape, dtype=y.dtype, device=y.device)
        if self.how == "rand_rows":
            return y * torch.rand(len(y), dtype=y.dtype).reshape(-1, *[1] * (y.ndim - 1))
        if self.how == "dropout":
            return F.dropout(y, 0.3, training=True)
        if self.how == "bernoulli":
            return y * torch.bernoulli(torch.full_like(h, 0.5))
        if self.how == "normal_":
            return y + torch.empty_like(h).normal_(0, 0.1)
        if self.how == "randperm":
            return y + h[torch.randperm(len(h))]
        if self.how == "training":
            return F.dropout(y, 0.3, self.training)
        return y + 0.1 * torch.randn_like(h) if self.training else y


@feature(weight=0.5)
class OptionalDropout(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.dropout, self.path = nn.Dropout(0.0), nn.Dropout2d(0.0)
        self.linear = nn.Linear(sizes.width, sizes.width)

    def forward(self, h: Tensor) -> Tensor:
        y = self.linear(self.dropout(h).movedim(self.channel_dim, -1)).movedim(-1, self.channel_dim)
        return F.dropout(y, p=0.0, training=self.training)

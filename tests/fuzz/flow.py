"""Features whose Python decides: branches, loops, reads of values, gradients taken inside forward."""

from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.fuzz.registry import Block, Sizes, feature


class Mixed(Block):
    """Base of features that need one linear layer over channels."""

    def build(self, draw: Random, sizes: Sizes) -> None:
        self.linear = nn.Linear(sizes.width, sizes.width)
        self.setup(draw, sizes)

    def setup(self, draw: Random, sizes: Sizes) -> None:
        """Make what else the feature has."""

    def mix(self, h: Tensor) -> Tensor:
        return self.linear(h.movedim(self.channel_dim, -1)).movedim(-1, self.channel_dim)


@feature(weight=1, mixing=True)
class BranchOnSize(Mixed):
    def setup(self, draw: Random, sizes: Sizes) -> None:
        self.at = draw.choice([sizes.rows, sizes.rows * sizes.members, sizes.members, 1])
        self.by = draw.choice(["len", "shape", "numel", "size"])

    def forward(self, h: Tensor) -> Tensor:
        n = {"len": len(h), "shape": h.shape[0], "numel": h.numel() // h[0].numel(), "size": h.size(0)}[self.by]
        return self.mix(h) if n == self.at else h * 0.5


@feature(weight=1, mixing=True)
class BranchOnTime(Mixed):
    takes = ("h", "t")

    def setup(self, draw: Random, sizes: Sizes) -> None:
        self.how = draw.choice(["max", "item", "tolist", "numpy", "all", "where", "float", "len_nonzero"])

    def forward(self, h: Tensor, t: Tensor) -> Tensor:
        if self.how == "max":
            return self.mix(h) if t.max() > 0.5 else h
        if self.how == "item":
            return self.mix(h) * t.flatten()[0].item()
        if self.how == "tolist":
            return self.mix(h) * sum(t.flatten().tolist()) / t.numel()
        if self.how == "numpy":
            return self.mix(h) * float(t.detach().numpy().mean())
        if self.how == "all":
            return self.mix(h) if (t < 0.7).all() else h - 1
        if self.how == "float":
            return self.mix(h) + float(t.flatten()[-1])
        if self.how == "len_nonzero":
            return self.mix(h) * (1 + len(torch.nonzero(t.flatten() > 0.5)))
        return torch.where(t.reshape(-1, *[1] * (h.ndim - 1)) > 0.5, self.mix(h), h)


@feature(weight=0.6, own_python=True)
class ReadParameter(Mixed):
    def setup(self, draw: Random, sizes: Sizes) -> None:
        self.p = nn.Parameter(torch.zeros(3))
        self.how = draw.choice(["float", "item", "if", "tolist", "numpy", "bool", "int"])

    def forward(self, h: Tensor) -> Tensor:
        y = self.mix(h)
        if self.how == "float":
            return y * float(self.p[0])
        if self.how == "item":
            return y * self.p.mean().item()
        if self.how == "if":
            return y if self.p[0] > 0 else h
        if self.how == "tolist":
            return y * self.p.tolist()[1]
        if self.how == "numpy":
            return y + float(self.p.detach().numpy().max())
        if self.how == "int":
            return y * int(10 * self.p[0].abs())
        return y if bool((self.p > 0).any()) else 2 * h


@feature(weight=0.4, coarse=True, mixing=True, own_python=True)
class ReadActivation(Mixed):
    def setup(self, draw: Random, sizes: Sizes) -> None:
        self.how = draw.choice(["max", "item", "while", "isfinite"])

    def forward(self, h: Tensor) -> Tensor:
        y = self.mix(h)
        if self.how == "max":
            return y / y.abs().max() if y.abs().max() > 1 else y
        if self.how == "item":
            return y / (1 + y.square().mean().item())
        if self.how == "isfinite":
            return y if torch.isfinite(y).all() else torch.zeros_like(y)
        while y.abs().amax() > 2:
            y = y / 2
        return y


@feature(weight=1)
class Looping(Mixed):
    def setup(self, draw: Random, sizes: Sizes) -> None:
        self.times = draw.choice([0, 1, 3])
        self.skips = draw.random() < 0.5

    def forward(self, h: Tensor) -> Tensor:
        kept = []
        for _ in range(self.times):
            kept.append(h)
            h = torch.tanh(self.mix(h))
        while kept and self.skips:
            h = h + 0.1 * kept.pop()
        return h


@feature(weight=1)
class Flipped(Mixed):
    takes = ("h", "flip")

    def forward(self, h: Tensor, flip: int) -> Tensor:
        if flip == 2:
            return self.mix(h) - h.mean(self.channel_dim, keepdim=True)
        return self.mix(h.flip(self.channel_dim) if flip else h)


@feature(weight=1)
class Gained(Mixed):
    takes = ("h", "gain")

    def forward(self, h: Tensor, gain: float) -> Tensor:
        return self.mix(h) * gain


@feature(weight=1)
class TrainingFlag(Mixed):
    def forward(self, h: Tensor) -> Tensor:
        return self.mix(h) if self.training else torch.tanh(self.mix(h))


@feature(weight=0.8)
class Checks(Mixed):
    def forward(self, h: Tensor) -> Tensor:
        if not isinstance(h, torch.Tensor) or not torch.is_tensor(self.linear.weight):
            raise TypeError("expected a tensor")
        assert h.is_floating_point()
        assert isinstance(self.linear.weight, nn.Parameter)
        assert self.linear.weight.shape == (h.shape[self.channel_dim],) * 2
        y = self.mix(h) if hasattr(self, "linear") and self.linear.bias is not None else h
        return y.contiguous() if not y.is_contiguous() else y


@feature(weight=0.7)
class Caught(Mixed):
    def forward(self, h: Tensor) -> Tensor:
        try:
            return self.mix(h).view(h.shape[0], -1).reshape(h.shape)
        except RuntimeError:
            return self.mix(h) + 1


@feature(weight=0.7)
class InsideNoGrad(Mixed):
    def setup(self, draw: Random, sizes: Sizes) -> None:
        self.detached = draw.random() < 0.5

    def forward(self, h: Tensor) -> Tensor:
        if self.detached:
            return h + self.mix(h.detach()).detach()
        with torch.no_grad():
            scale = self.mix(h).abs().amax(self.channel_dim, keepdim=True)
        return self.mix(h) / (1 + scale)


@feature(weight=0.7)
class Checkpointed(Mixed):
    def setup(self, draw: Random, sizes: Sizes) -> None:
        self.reentrant = draw.random() < 0.3

    def forward(self, h: Tensor) -> Tensor:
        return checkpoint(self.mix, h, use_reentrant=self.reentrant)


@feature(weight=0.5)
class Energy(Mixed):
    def forward(self, h: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            x = h.clone() if h.is_inference() else h.detach()
            x = x.requires_grad_()
            (gradient,) = torch.autograd.grad(torch.tanh(self.mix(x)).square().sum(), x)
        return gradient.detach()


class Swish(torch.autograd.Function):
    """Swish with a backward of its own, as memory-saving networks have it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * (s + x * s * (1 - s))


@feature(weight=0.7)
class OwnBackward(Mixed):
    def forward(self, h: Tensor) -> Tensor:
        return Swish.apply(self.mix(h))


@feature(weight=0.5)
class DictOfActivations(Mixed):
    def forward(self, h: Tensor) -> Tensor:
        found = {"h": h, "mixed": self.mix(h), "scale": 0.5}
        found["sum"] = found["h"] + found["mixed"] * found["scale"]
        return torch.stack([v for v in found.values() if isinstance(v, Tensor)], dim=-1).mean(-1)


@feature(weight=0.5)
class DtypesInside(Mixed):
    def setup(self, draw: Random, sizes: Sizes) -> None:
        self.how = draw.choice(["double", "type_as", "weight"])

    def forward(self, h: Tensor) -> Tensor:
        if self.how == "double":
            return (self.mix(h).double().softmax(self.channel_dim) * 3).to(h.dtype)
        if self.how == "type_as":
            return torch.ones(h.shape).type_as(h) * self.mix(h)
        return self.mix(h.to(self.linear.weight.dtype)).to(h.dtype)


@feature(weight=0.5)
class ScriptedStyle(Mixed):
    def forward(self, h: Tensor) -> Tensor:
        y = torch.nn.functional.gelu(self.mix(h), approximate="tanh")
        y = F.normalize(y, dim=self.channel_dim, eps=1e-3)
        y = F.layer_norm(y.movedim(self.channel_dim, -1), (y.shape[self.channel_dim],))
        return y.movedim(-1, self.channel_dim)


@feature(weight=0.4, refusable=True)
class Mapped(Mixed):
    def forward(self, h: Tensor) -> Tensor:
        return torch.vmap(lambda row: torch.tanh(row) * row.sum())(self.mix(h))

"""Random networks: a small value that prints, and the members that are built from it."""

import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz import arithmetic, attention, flow, layers, mixing, state  # noqa: F401 - they register their features
from tests.fuzz.layers import CONV
from tests.fuzz.registry import CHANNELS_FIRST, FEATURES, FRAMES, Block, Sizes, pick

CONTINUOUS = ("linear", "sinusoidal", "fourier", "perceptron", "number", "none")
INTEGER = ("embedding", "table", "scaled")
CONTEXTS = ("none", "tokens", "labels", "same", "pooled", "mask", "pair", "named", "bank")
OUTPUTS = ("tensor", "tuple", "dict", "none", "integer", "ids", "list", "nested")
LEVELS = 10


@dataclass(frozen=True)
class Network:
    """A network of which every member is rebuilt; ``blocks`` are names of features, each with its seed."""

    frame: str = "vector"
    members: int = 2
    rows: int = 2
    width: int = 4
    size: int = 4
    blocks: tuple[tuple[str, int], ...] = ()
    time: str = "linear"
    context: str = "none"
    output: str = "tensor"
    batch_second: bool = False
    dtype: str = "float64"
    training: bool = False
    zero_head: bool = False
    fresh: bool = False  # vectors as torch initialises them: equal in all members, and yet each member's own
    seed: int = 0

    def tagged(self, tag: str, training: bool = False) -> bool:
        """Whether a feature has a tag, in evaluation or training mode."""
        found = (FEATURES[name] for name, _ in self.blocks)
        return any(getattr(block, tag) and (training or not block.in_training) for block in found)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def draw_network(seed: int) -> Network:
    """Draw a network: mostly such as diffusion has, now and then an odd one."""
    draw = Random(f"network {seed}")
    frame = draw.choices(FRAMES, [3, 3, 1.5, 4, 0.6])[0]
    members = draw.choices([1, 2, 3, 4, 5], [0.3, 4, 4, 1, 1])[0]
    rows = draw.choice([1, 2, 2, 3, 4, members, 2 * members])
    width = draw.choice([4, 4, 6, 8])
    size = 4 if frame == "volume" else draw.choice([4, 4, 6, 8])
    blocks = tuple((pick(draw, frame), draw.randrange(10_000)) for _ in range(draw.choice([1, 2, 2, 3, 3, 4, 5, 6])))
    return Network(
        frame=frame,
        members=members,
        rows=rows,
        width=width,
        size=size,
        blocks=blocks,
        time=draw.choices([*CONTINUOUS, *INTEGER], [3, 3, 2, 2, 0.3, 1, 2, 0.5, 0.5])[0],
        context=draw.choices(CONTEXTS, [6, 2, 1.5, 1, 1, 0.5, 0.4, 0.4, 0.3])[0],
        output=draw.choices(OUTPUTS, [10, 1, 1, 0.7, 0.5, 0.4, 0.4, 0.4])[0],
        batch_second=draw.random() < 0.06,
        dtype=draw.choices(["float32", "float64"], [2, 1])[0],
        training=draw.random() < 0.15,
        zero_head=draw.random() < 0.08,
        fresh=draw.random() < 0.2,
        seed=seed,
    )


class Time(nn.Module):
    """Embeds times [B] as [B, C]."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind, self.width = kind, width
        if kind == "linear":
            self.linear = nn.Linear(1, width)
        elif kind == "sinusoidal":
            self.mlp = nn.Sequential(nn.Linear(width, 8), nn.SiLU(), nn.Linear(8, width))
        elif kind == "fourier":
            self.register_buffer("frequencies", torch.arange(1, width // 2 + 1) * 0.7)
            self.linear = nn.Linear(width, width)
        elif kind == "perceptron":
            self.mlp = nn.Sequential(nn.Linear(1, 8), nn.GELU(), nn.Linear(8, width), nn.LayerNorm(width))
        elif kind in INTEGER:
            self.embedding = nn.Embedding(LEVELS, width)
        else:
            self.constant = nn.Parameter(torch.zeros(width))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        if self.kind == "embedding":
            return self.embedding(t.long())
        if self.kind == "table":
            return self.embedding.weight[t.long()]
        if self.kind == "scaled":
            return F.embedding((t.to(dtype) / LEVELS * LEVELS).long(), self.embedding.weight)
        t = t.to(dtype)
        if self.kind == "linear":
            return self.linear(t[:, None])
        if self.kind == "perceptron":
            return self.mlp(t.unsqueeze(-1).log1p())
        if self.kind == "sinusoidal":
            half = self.width // 2
            rates = torch.exp(-math.log(100.0) * torch.arange(half, dtype=dtype, device=t.device) / half)
            angle = t[:, None] * rates[None]
            return self.mlp(torch.cat([angle.sin(), angle.cos()], dim=-1))
        if self.kind == "fourier":
            angle = 2 * math.pi * t[:, None] * self.frequencies.to(dtype)
            return F.silu(self.linear(torch.cat([angle.sin(), angle.cos()], 1)))
        if self.kind == "number":
            return self.constant.expand(len(t), -1) * math.sin(float(t[0]))
        return self.constant.expand(len(t), -1)


class Member(nn.Module):
    """The network of a specification; calls look like ``member(x, t, context, flip=0, gain=1.0)``."""

    def __init__(self, spec: Network, k: int) -> None:
        super().__init__()
        own = Random(f"member {spec.seed} {k}")
        sizes = Sizes(spec.frame, spec.width, spec.size, spec.members, spec.rows, own)
        self.batch_second, self.output, self.context = spec.batch_second, spec.output, spec.context
        self.residual = [Random(f"residual {seed}").random() < 0.5 for _, seed in spec.blocks]
        self.scale = 1.0
        channels = data_channels(spec)
        if spec.frame in CHANNELS_FIRST:
            self.inward = CONV[spec.frame](channels, spec.width, 3, padding=1)
            self.outward = CONV[spec.frame](spec.width, channels, 1)
        else:
            self.inward, self.outward = nn.Linear(channels, spec.width), nn.Linear(spec.width, channels)
        self.time = Time(spec.time, spec.width)
        if spec.context == "labels":
            self.labels = nn.Embedding(LEVELS, spec.width, padding_idx=0)
        elif spec.context == "pooled":
            self.pooled = nn.Linear(spec.width, spec.width, bias=False)
        self.blocks = nn.ModuleList([FEATURES[name](Random(f"block {seed}"), sizes) for name, seed in spec.blocks])

    def forward(self, x: Tensor, t: Any, context: Any = None, *, flip: int = 0, gain: float = 1.0) -> Any:
        if self.batch_second:
            x = x.transpose(0, 1)
        t = self._times(t, x)
        emb = self.time(t, x.dtype)
        if self.context == "same" and context is not None:
            x = x + 0.5 * (context.transpose(0, 1) if self.batch_second else context)
        elif self.context == "labels" and context is not None:
            emb = emb + self.labels(context)
        elif self.context == "pooled" and context is not None:
            emb = emb + self.pooled(context)
        elif self.context == "tokens" and context is not None:
            emb = emb + context.mean(1)
        elif self.context == "pair" and context is not None:
            emb = emb + context[0] * context[1]
        elif self.context == "named" and context is not None:
            emb = emb + context["text"] + context["size"].mean(1, keepdim=True)
        elif self.context == "bank" and context is not None:
            emb = emb + torch.softmax(emb @ context.t(), -1) @ context
        elif self.context == "mask" and context is not None:
            x = x * context.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        h = self.inward(x)
        if self.time.kind != "none":
            h = h + (emb if h.ndim == 2 else emb.reshape(len(emb), *self.spread(h)))
        if flip == 2:
            h = h.flip(-1)
        if gain != 1.0:
            h = h * gain
        given = {"emb": emb, "t": t.to(x.dtype), "context": context, "flip": flip, "gain": gain}
        for block, residual in zip(self.blocks, self.residual, strict=True):
            y = block(*[h if name == "h" else given[name] for name in block.takes])
            h = 0.7 * (h + y) if residual else y
        y = self.outward(h) * self.scale
        return self._returned(y.transpose(0, 1) if self.batch_second else y)

    def spread(self, h: Tensor) -> tuple[int, ...]:
        """The shape of a row of values per channel that meets a hidden state."""
        channels_first = isinstance(self.inward, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        ones = (1,) * (h.ndim - 2)
        return (h.shape[1], *ones) if channels_first else (*ones, h.shape[-1])

    def _times(self, t: Any, x: Tensor) -> Tensor:
        if not torch.is_tensor(t):
            t = torch.tensor([t], dtype=torch.long if isinstance(t, int) else x.dtype, device=x.device)
        elif t.ndim == 0:
            t = t[None].to(x.device)
        return t.expand(x.shape[0])

    def _returned(self, y: Tensor) -> Any:
        if self.output == "tuple":
            return y, 2 * y
        if self.output == "dict":
            return {"sample": y, "scale": y.square()}
        if self.output == "none":
            return y, None
        if self.output == "integer":
            return {"sample": y, "count": 3}
        if self.output == "ids":
            return y, torch.arange(3)
        if self.output == "list":
            return [y, y + 1]
        if self.output == "nested":
            return {"a": (y, [y.tanh(), None])}
        return y

    def velocity(self, x: Tensor, t: Any) -> Any:
        """Another method that calls forward."""
        y = self.forward(x, t)
        return (y * 2 - x) if torch.is_tensor(y) else y

    def set_scale(self, scale: float) -> None:
        """A setter that forward reads."""
        self.scale = scale


def data_channels(spec: Network) -> int:
    return 3 if spec.seed % 3 else 2


def build(spec: Network, k: int) -> Member:
    """Member k of a network, the same at every call."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(spec.seed)
        member = Member(spec, k).to(spec.torch_dtype)
        for name, p in member.named_parameters():
            p.copy_(_values(spec, _origin(spec, member, name, p, k), name, p))
        for name, b in member.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(_noise(spec, k, name, b) * 0.3)
            elif name.endswith("running_var"):
                b.copy_(0.5 + _noise(spec, k, name, b).abs())
        if spec.zero_head:
            member.outward.weight.zero_()
            member.outward.bias.zero_()
    return member.train(spec.training)


def _origin(spec: Network, member: Member, name: str, p: nn.Parameter, k: int) -> Any:
    """Whose values a parameter has: the member's or, where all have the same, nobody's."""
    parts = name.split(".")
    block = member.blocks[int(parts[1])] if parts[0] == "blocks" else None
    return "all" if isinstance(block, Block) and block.equal and not p.requires_grad else k


def _values(spec: Network, k: Any, name: str, p: Tensor) -> Tensor:
    if p.ndim <= 1:
        if spec.fresh:
            return p
        return _noise(spec, k, name, p) * 0.25 + (1.0 if name.endswith(("weight", "scale", "gain")) else 0.0)
    return _noise(spec, k, name, p) / math.sqrt(p[0].numel())


def _noise(spec: Network, k: Any, name: str, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{spec.seed} {k} {name}".encode()))
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)


def members_of(spec: Network) -> list[Member]:
    return [build(spec, k) for k in range(spec.members)]


def named(tensors: Iterable[tuple[str, Tensor]], path: str) -> list[tuple[str, Tensor]]:
    """Those of an ensemble's or a member's tensors that stand for a member's tensor of this path."""
    return [(name, t) for name, t in tensors if name == path or name.endswith(f".{path}")]

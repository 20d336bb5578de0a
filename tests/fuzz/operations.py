"""Operations on what earlier ones left, each drawn for the shapes that are there: what :mod:`tests.fuzz.graphs` joins.

Each function takes the graph that is being drawn, with the tensors that it has so far, and gives an operation on its
tensors and weights. One that these do not fit raises, when it is drawn or when it is run.
"""

from collections.abc import Callable
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INPUTS = 2  # tensors that are given, which nothing writes to
Op = Callable[[list[Tensor], nn.ParameterDict], Tensor]
OPS: dict[str, Callable[[Any, Random], Op]] = {}
OFTEN = {"convolution": 4, "norm": 2, "with_weight": 2, "product": 2, "write": 2}


def op(make: Callable[[Any, Random], Op]) -> Callable[[Any, Random], Op]:
    """Register what draws an operation."""
    OPS[make.__name__] = make
    return make


UNARY = (
    *(F.silu, F.gelu, torch.tanh, torch.sigmoid, torch.sin, torch.cos, F.relu, torch.square, torch.abs, F.softplus),
    *(lambda x: F.gelu(x, approximate="tanh"), lambda x: x.abs().sqrt(), lambda x: (x.abs() + 1).log(), torch.neg),
    *(lambda x: x.clamp(-1, 0.5), lambda x: x.tanh().exp(), lambda x: 1 - x, lambda x: 2 / (x.abs() + 1)),
    *(lambda x: x.double().to(x.dtype), lambda x: torch.where(x > 0, x, 0.1 * x), lambda x: x.masked_fill(x > 1, 1.0)),
)
COARSE = (  # not continuous: of what has the same bits everywhere
    *(lambda x: x.to(torch.bfloat16).to(x.dtype), lambda x: x.half().to(x.dtype), lambda x: (x * 3).long().to(x.dtype)),
    *(lambda x: (x * 5).int().to(x.dtype), lambda x: (x > 0).to(x.dtype), lambda x: x.floor(), lambda x: x.sign()),
)
BINARY = (
    *(torch.add, torch.sub, torch.mul, lambda a, b: a / (b.abs() + 1), torch.maximum, torch.minimum),
    *(lambda a, b: torch.add(a, b, alpha=0.5), lambda a, b: a.sub(b, alpha=2), lambda a, b: torch.rsub(a, b)),
    *(lambda a, b: torch.lerp(a, b.expand_as(a), 0.3) if a.shape == (a + b).shape else a - b, torch.atan2),
    *(lambda a, b: torch.addcmul(a, a, b, value=0.5), lambda a, b: torch.where(a > b, a, b)),
)


def some(graph: Any, draw: Random, least: int = 0) -> int:
    """Which tensor is taken, most often a late one."""
    most = len(graph.pool)
    i = most - 1 if draw.random() < 0.6 else draw.randrange(most)
    if graph.pool[i].ndim < least:
        raise ValueError("too few dimensions")
    return i


def line(draw: Random, shape: torch.Size) -> list[int]:
    """A shape that broadcasts to another: of some of its dimensions, from the last one on."""
    kept = [n if draw.random() < 0.5 else 1 for n in shape[1:]]
    return kept[draw.randrange(len(kept) + 1) :] if kept else []


@op
def unary(graph: Any, draw: Random) -> Op:
    i, function = some(graph, draw), draw.choice(UNARY)
    return lambda pool, w: function(pool[i])


@op
def coarse(graph: Any, draw: Random) -> Op:
    i, function = draw.randrange(INPUTS), draw.choice(COARSE)
    return lambda pool, w: function(pool[i])


@op
def binary(graph: Any, draw: Random) -> Op:
    i, j, function = some(graph, draw), some(graph, draw), draw.choice(BINARY)
    return lambda pool, w: function(pool[i], pool[j])


@op
def with_weight(graph: Any, draw: Random) -> Op:
    i, function = some(graph, draw), draw.choice(BINARY)
    name = graph.weight(*line(draw, graph.pool[i].shape))
    if draw.random() < 0.3:
        return lambda pool, w: function(w[name].expand_as(pool[i]), pool[i])
    return lambda pool, w: function(pool[i], w[name])


@op
def against_part(graph: Any, draw: Random) -> Op:
    """With a part of another tensor, which broadcasts."""
    i, j, function = some(graph, draw), some(graph, draw, 1), draw.choice(BINARY)
    dim, keep = draw.randrange(graph.pool[j].ndim), draw.random() < 0.5
    return lambda pool, w: function(pool[i], pool[j].mean(dim, keepdim=keep) if dim else pool[j][:1])


@op
def with_number(graph: Any, draw: Random) -> Op:
    i, number = some(graph, draw), draw.choice([0.5, 2, -1, 1e-3, 3.0])
    forms = (
        *(
            lambda x: x + number,
            lambda x: x * number,
            lambda x: number - x,
            lambda x: x / number,
            lambda x: number / (x.abs() + 1),
        ),
        *(lambda x: torch.add(x, number, alpha=2), lambda x: x.clamp(min=number), lambda x: x.pow(2)),
    )
    form = draw.choice(forms)
    return lambda pool, w: form(pool[i])


@op
def turn(graph: Any, draw: Random) -> Op:
    i = some(graph, draw, 2)
    dims = list(range(graph.pool[i].ndim))
    if draw.random() < 0.3:
        draw.shuffle(dims)
    else:
        dims = [0, *draw.sample(dims[1:], len(dims) - 1)]
    return lambda pool, w: pool[i].permute(dims)


@op
def reshape(graph: Any, draw: Random) -> Op:
    i = some(graph, draw, 1)
    x = graph.pool[i]
    form = draw.choice(["flatten", "split", "merge", "add", "drop", "whole"])
    if form == "flatten":
        return lambda pool, w: pool[i].flatten(1)
    if form == "whole":
        return lambda pool, w: pool[i].reshape(-1)
    if form == "merge":
        dim = draw.randrange(max(x.ndim - 1, 1))
        return lambda pool, w: pool[i].flatten(dim, dim + 1)
    if form == "add":
        dim = draw.randrange(x.ndim + 1)
        return lambda pool, w: pool[i].unsqueeze(dim)
    if form == "drop":
        return lambda pool, w: pool[i].squeeze()
    dim = draw.randrange(x.ndim)
    parts = draw.choice([n for n in range(1, x.shape[dim] + 1) if x.shape[dim] % n == 0])
    return lambda pool, w: pool[i].unflatten(dim, (parts, -1))


@op
def cut(graph: Any, draw: Random) -> Op:
    """A part with room between its rows, or a step through it."""
    i = some(graph, draw, 1)
    dim = draw.randrange(graph.pool[i].ndim)
    size = graph.pool[i].shape[dim]
    begin = draw.randrange(size)
    end, step = draw.randint(begin + 1, size), draw.choice([1, 1, 2])
    at = (slice(None),) * dim
    form = draw.choice(["slice", "slice", "select", "chunk", "narrow"])
    if form == "select":
        return lambda pool, w: pool[i].select(dim, begin)
    if form == "chunk":
        return lambda pool, w: pool[i].chunk(2, dim)[-1]
    if form == "narrow":
        return lambda pool, w: pool[i].narrow(dim, begin, end - begin)
    return lambda pool, w: pool[i][(*at, slice(begin, end, step))]


@op
def join(graph: Any, draw: Random) -> Op:
    i, j = some(graph, draw, 1), some(graph, draw, 1)
    dim = draw.randrange(graph.pool[i].ndim)
    if draw.random() < 0.3:
        return lambda pool, w: torch.stack([pool[i], pool[j].expand_as(pool[i])], dim)
    return lambda pool, w: torch.cat([pool[i], pool[j], pool[i]][: 2 + (i % 2)], dim)


@op
def spread(graph: Any, draw: Random) -> Op:
    i = some(graph, draw, 1)
    x = graph.pool[i]
    dim = draw.randrange(x.ndim)
    form = draw.choice(["repeat", "interleave", "expand", "flip", "roll", "pad"])
    if form == "repeat":
        times = [1 + (d == dim) for d in range(x.ndim)]
        return lambda pool, w: pool[i].repeat(times)
    if form == "interleave":
        return lambda pool, w: pool[i].repeat_interleave(2, dim)
    if form == "expand":
        shape = [*x.shape[:dim], 3, *x.shape[dim:]]
        return lambda pool, w: pool[i].unsqueeze(dim).expand(shape)
    if form == "flip":
        return lambda pool, w: pool[i].flip(dim)
    if form == "roll":
        return lambda pool, w: pool[i].roll(1, dim)
    mode = draw.choice(["constant", "constant", "reflect", "replicate", "circular"])
    sides = [draw.choice([0, 1, 2]) for _ in range(2 * min(x.ndim - 1, draw.choice([1, 2])))]
    return lambda pool, w: F.pad(pool[i], sides, mode=mode)


@op
def reduce(graph: Any, draw: Random) -> Op:
    i = some(graph, draw, 1)
    n = graph.pool[i].ndim
    dims = draw.sample(range(n), draw.randint(1, n))
    keep = draw.random() < 0.6
    dims = [d - n if draw.random() < 0.3 else d for d in dims]
    form = draw.choice(["mean", "sum", "amax", "var", "softmax", "cumsum", "norm", "logsumexp"])
    if form == "softmax":
        return lambda pool, w: pool[i].softmax(dims[0])
    if form == "cumsum":
        return lambda pool, w: pool[i].cumsum(dims[0])
    if form == "norm":
        return lambda pool, w: F.normalize(pool[i], dim=dims[0])
    if form == "var":
        return lambda pool, w: pool[i].var(dims, correction=0, keepdim=keep)
    return lambda pool, w: getattr(pool[i], form)(dims, keepdim=keep)


@op
def norm(graph: Any, draw: Random) -> Op:
    i = some(graph, draw, 2)
    x = graph.pool[i]
    eps = draw.choice([1e-5, 1e-3])
    if draw.random() < 0.5:
        last = draw.randint(1, x.ndim - 1)
        shape = x.shape[-last:]
        names = [graph.weight(*shape) for _ in range(draw.choice([0, 1, 2]))]
        if draw.random() < 0.3:
            return lambda pool, w: F.rms_norm(pool[i], shape, w[names[0]] if names else None, 1e-5)
        return lambda pool, w: F.layer_norm(pool[i], shape, *[w[n] for n in names], eps=eps)
    channels = x.shape[1]
    groups = draw.choice([n for n in range(1, channels + 1) if channels % n == 0])
    names = [graph.weight(channels) for _ in range(draw.choice([0, 1, 2]))]
    return lambda pool, w: F.group_norm(pool[i], groups, *[w[n] for n in names], eps=eps)


@op
def linear(graph: Any, draw: Random) -> Op:
    i, out = some(graph, draw, 1), draw.choice([1, 3, 4, 8])
    name = graph.weight(out, graph.pool[i].shape[-1])
    bias = graph.weight(out) if draw.random() < 0.6 else None
    return lambda pool, w: F.linear(pool[i], w[name], None if bias is None else w[bias])


@op
def product(graph: Any, draw: Random) -> Op:
    i, j = some(graph, draw, 2), some(graph, draw, 2)
    form = draw.choice(["matmul", "transposed", "einsum", "attention"])
    if form == "matmul":
        return lambda pool, w: pool[i] @ pool[j] * 0.3
    if form == "transposed":
        return lambda pool, w: pool[i] @ pool[j].transpose(-1, -2) * 0.3
    if form == "einsum":
        return lambda pool, w: torch.einsum("b...c,b...c->b...", pool[i], pool[j])
    return lambda pool, w: F.scaled_dot_product_attention(pool[i], pool[j], pool[j], is_causal=i % 2 == 0)


@op
def convolution(graph: Any, draw: Random) -> Op:
    i = some(graph, draw, 3)
    x = graph.pool[i]
    if x.ndim > 4:
        raise ValueError("too many dimensions")
    frame, channels = x.ndim - 2, x.shape[1]
    groups = draw.choice([n for n in range(1, channels + 1) if channels % n == 0]) if draw.random() < 0.3 else 1
    kernel = (
        [draw.choice([1, 2, 3, 3, 5]) for _ in range(frame)]
        if draw.random() < 0.3
        else [draw.choice([1, 3, 3])] * frame
    )
    options = {
        "stride": draw.choice([1, 1, 2]),
        "padding": draw.choice([0, 1, 1, 2]),
        "dilation": draw.choice([1, 1, 1, 2]),
        "groups": groups,
    }
    out = groups * draw.choice([1, 2, 4])
    bias = graph.weight(out) if draw.random() < 0.6 else None
    if draw.random() < 0.25:
        name = graph.weight(channels, out // groups, *kernel)
        transposed = getattr(F, f"conv_transpose{frame}d")
        return lambda pool, w: transposed(pool[i], w[name], None if bias is None else w[bias], **options)
    name = graph.weight(out, channels // groups, *kernel)
    function = getattr(F, f"conv{frame}d")
    return lambda pool, w: function(pool[i], w[name], None if bias is None else w[bias], **options)


@op
def resize(graph: Any, draw: Random) -> Op:
    i = some(graph, draw, 3)
    frame = graph.pool[i].ndim - 2
    form = draw.choice(["nearest", "nearest", "linear", "size", "avg", "max", "shuffle", "unshuffle"])
    if form == "nearest":
        return lambda pool, w: F.interpolate(pool[i], scale_factor=2, mode="nearest")
    if form == "linear":
        mode, corners = {1: "linear", 2: "bilinear"}[min(frame, 2)], draw.random() < 0.5
        return lambda pool, w: F.interpolate(pool[i], scale_factor=2, mode=mode, align_corners=corners)
    if form == "size":
        return lambda pool, w: F.interpolate(pool[i], size=[5] * frame, mode=("nearest", "nearest-exact")[i % 2])
    if form == "shuffle":
        return lambda pool, w: F.pixel_shuffle(pool[i], 2)
    if form == "unshuffle":
        return lambda pool, w: F.pixel_unshuffle(pool[i], 2)
    pool_of = getattr(F, f"{form}_pool{frame}d")
    options = {"kernel_size": draw.choice([2, 3]), "stride": draw.choice([1, 2]), "padding": draw.choice([0, 1])}
    return lambda pool, w: pool_of(pool[i], **options, ceil_mode=i % 2 == 0)


@op
def write(graph: Any, draw: Random) -> Op:
    """To a tensor that others have read, or to a part of it; what was written to is the tensor."""
    i, j = some(graph, draw, 1), some(graph, draw)
    if i < INPUTS:
        raise ValueError("an input")
    dim = draw.randrange(graph.pool[i].ndim)
    half = (graph.pool[i].shape[dim] + 1) // 2
    form = draw.choice(["add", "mul", "part", "set", "activation"])

    def step(pool: list[Tensor], w: nn.ParameterDict) -> Tensor:
        x, y = pool[i], pool[j]
        if form == "add":
            x.add_(y, alpha=0.5)
        elif form == "mul":
            x.mul_(y)
        elif form == "activation":
            F.relu(x, inplace=True)
        elif form == "part":
            x.narrow(dim, 0, half).mul_(0.5)
        else:
            x.narrow(dim, 0, half).copy_(y.mean())
        return x

    return step

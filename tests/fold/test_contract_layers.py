"""Layers and functions of all members against the loop: sampling, gradients, training, drawn rows."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.fold.contract import Held, batch


class Of(nn.Module):
    """A network of one function of its layers and input."""

    def __init__(self, forward, *layers, **parameters):
        super().__init__()
        self.use = forward
        self.layers = nn.ModuleList(layers)
        for name, shape in parameters.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape)))

    def forward(self, *args, **kwargs):
        return self.use(self, *args, **kwargs)


def through(net, x):
    for layer in net.layers:
        x = layer(x)
    return x


def ids(x):
    return (x * 3).long() % 5


def cell(net, x):
    h = net.layers[0](x, net.layers[0](x))
    return h[0] * h[1] if isinstance(h, tuple) else h


def written(net, x):
    start = torch.zeros_like(x)
    start += net.slope
    start[:, 0] = 1
    return start


VECTORS, IMAGES = batch(5, 4), batch(5, 4, 6, 6)
FOLDED = {
    "PReLU": (lambda: Of(through, nn.PReLU()), VECTORS),
    "PReLU of channels": (lambda: Of(through, nn.Conv2d(4, 4, 3), nn.PReLU(4)), IMAGES),
    "F.prelu": (lambda: Of(lambda net, x: F.prelu(x, net.slope), slope=(1,)), VECTORS),
    "InstanceNorm2d": (lambda: Of(through, nn.InstanceNorm2d(4, affine=True)), IMAGES),
    "InstanceNorm1d": (lambda: Of(through, nn.InstanceNorm1d(4, affine=True)), batch(5, 4, 6)),
    "InstanceNorm3d": (lambda: Of(through, nn.InstanceNorm3d(4, affine=True)), batch(2, 4, 3, 3, 3)),
    "InstanceNorm2d with statistics": (
        lambda: Of(through, nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)), IMAGES),
    "InstanceNorm2d of one image": (lambda: Of(through, nn.InstanceNorm2d(4, affine=True)), batch(4, 6, 6)),
    "EmbeddingBag": (lambda: Of(lambda net, x: net.layers[0](ids(x)), nn.EmbeddingBag(5, 3)), VECTORS),
    "EmbeddingBag of sums": (
        lambda: Of(lambda net, x: net.layers[0](ids(x), None, x.sigmoid()), nn.EmbeddingBag(5, 3, mode="sum")),
        VECTORS),
    "EmbeddingBag of maxima": (
        lambda: Of(lambda net, x: net.layers[0](ids(x)), nn.EmbeddingBag(5, 3, mode="max")), VECTORS),
    "EmbeddingBag of offsets": (
        lambda: Of(lambda net, x: net.layers[0](ids(x).flatten(), torch.arange(0, 4 * len(x), 4)),
                   nn.EmbeddingBag(5, 3)), VECTORS),
    "GRUCell": (lambda: Of(cell, nn.GRUCell(4, 4)), VECTORS),
    "LSTMCell": (lambda: Of(cell, nn.LSTMCell(4, 4)), VECTORS),
    "RNNCell": (lambda: Of(cell, nn.RNNCell(4, 4)), VECTORS),
    "table[ids]": (lambda: Of(lambda net, x: net.table[ids(x)], table=(5, 3)), VECTORS),
    "table[ids, :2]": (lambda: Of(lambda net, x: net.table[ids(x), :2], table=(5, 3)), VECTORS),
    "table[:, ids]": (lambda: Of(lambda net, x: net.table[:, ids(x)[0]].T + x.mean(), table=(3, 5)), VECTORS),
    "table[mask]": (lambda: Of(lambda net, x: x * net.table[torch.arange(5) < 4], table=(5,)), VECTORS),
    "masked_select": (
        lambda: Of(lambda net, x: x * net.table.masked_select(torch.arange(5) < 4), table=(5,)), VECTORS),
    "masked_select by the input": (
        lambda: Of(lambda net, x: net.layers[0](x) + net.layers[0](x).masked_select(x > 0).mean(), nn.Linear(4, 4)),
        VECTORS),
    "F.embedding": (lambda: Of(lambda net, x: F.embedding(ids(x), net.table), table=(5, 3)), VECTORS),
    "gather": (lambda: Of(lambda net, x: net.table.expand(len(x), 5).gather(1, ids(x)), table=(5,)), VECTORS),
    "torch.gather of activations": (
        lambda: Of(lambda net, x: torch.gather(net.layers[0](x), 1, ids(x)), nn.Linear(4, 5)), VECTORS),
    "index_select": (lambda: Of(lambda net, x: net.table.index_select(0, ids(x).flatten()), table=(5, 3)), VECTORS),
    "take": (lambda: Of(lambda net, x: torch.take(net.table, ids(x)), table=(5, 1)), VECTORS),
    "take_along_dim": (
        lambda: Of(lambda net, x: torch.take_along_dim(net.table[None], ids(x), 1), table=(5,)), VECTORS),
    "ids of its own": (
        lambda: Of(lambda net, x: net.table[net.layers[0](x).argmax(1)] + 0 * x[:, :3], nn.Linear(4, 5), table=(5, 3)),
        VECTORS),
    "index_put": (
        lambda: Of(lambda net, x: x.clone().index_put((torch.tensor([0, 2]),), net.table, accumulate=True),
                   table=(2, 4)), VECTORS),
    "zeros written in place": (lambda: Of(lambda net, x: x * written(net, x), slope=(4,)), VECTORS),
    "scatter_add": (
        lambda: Of(lambda net, x: torch.zeros(5, 5).scatter_add(1, ids(x), net.layers[0](x)), nn.Linear(4, 4)),
        VECTORS),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDED)
def test_functions_that_raised_in_sampling(name):
    make, draw = FOLDED[name]
    held = Held(lambda k: make())
    held.everywhere(draw)
    assert held.ensemble.engine == "fold"
    assert not held.warned


@pytest.mark.parametrize("name", ["PReLU of channels", "GRUCell", "table[ids]", "F.embedding", "EmbeddingBag"])
def test_functions_that_raised_under_drawn_rules(name):
    make, draw = FOLDED[name]
    held = Held(lambda k: make(), engine="fold")
    held.drawn(draw)
    held.drawn(draw, "mixture")


READS = {
    "float": lambda net, x: x * float(net.p[0]),
    "float of a function": lambda net, x: x * float(net.p.detach().square().sum().sqrt()),
    "item": lambda net, x: x * net.p[1].item(),
    "int": lambda net, x: x * int(net.p[0] * 10),
    "tolist": lambda net, x: x * net.p.tolist()[0],
    "numpy": lambda net, x: x * float(net.p.detach().numpy()[0]),
    "if": lambda net, x: x * net.p if net.p[0] > 0 else x - net.p,
    "if of an activation": lambda net, x: x * 2 if (x * net.p).sum() > 0 else x * net.p,
    "while": lambda net, x: halved_while_large(x * net.p),
    "max": lambda net, x: x * max(net.p),
    "in": lambda net, x: x * (2 if net.p[0] in (net.p[1],) else 3),
    "text": lambda net, x: x * len(f"{net.p[0]:.2f}"),
    "index": lambda net, x: x[:, : 1 + int(net.p.argmax())].mean(1, keepdim=True) * net.p,
    "nonzero": lambda net, x: x * net.p[net.p > 0].sum(),
    "equal": lambda net, x: x * 2 if torch.equal(net.p, net.p.abs()) else x * net.p,
    "allclose": lambda net, x: x * (2 if torch.allclose(net.p, net.p.abs()) else 3) * net.p,
    "dict": lambda net, x: x * {True: 2, False: 3}[bool(net.p[0] > net.p[1])],
    "assert": lambda net, x: checked(x * net.p),
    "tensor of": lambda net, x: x * torch.tensor([float(v) for v in net.p]),
    "unpacked": lambda net, x: x * (lambda a, b, c, d: a if a > b else c - d)(*net.p),
}


def halved_while_large(h):
    while h.abs().max() > 0.5:
        h = h / 2
    return h


def checked(h):
    assert torch.isfinite(h).all()
    return h


@pytest.mark.parametrize("first", ["sampling", "gradients"])
@pytest.mark.parametrize("name", READS)
def test_python_that_reads_a_members_values(name, first):
    held = Held(lambda k: Of(READS[name], p=(4,)))
    getattr(held, first)(VECTORS)
    held.everywhere(VECTORS)
    assert held.ensemble.engine == "loop" or name in ("max", "in", "nonzero", "text", "unpacked") or not held.warned
    assert held.ensemble.engine == "fold" or held.warned
    held.drawn(VECTORS)


# Gradients that a layer's options decide about

TABLES = {
    "padding": lambda: nn.Embedding(5, 3, padding_idx=0),
    "padding from the end": lambda: nn.Embedding(5, 3, padding_idx=-1),
    "by frequency": lambda: nn.Embedding(5, 3, scale_grad_by_freq=True),
    "both": lambda: nn.Embedding(5, 3, padding_idx=1, scale_grad_by_freq=True),
    "sparse": lambda: nn.Embedding(5, 3, sparse=True),
    "of norm at most one": lambda: nn.Embedding(5, 3, max_norm=0.3),
    "bag with padding": lambda: nn.EmbeddingBag(5, 3, padding_idx=0),
    "bag by frequency": lambda: nn.EmbeddingBag(5, 3, scale_grad_by_freq=True, mode="sum"),
}


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("name", TABLES)
def test_options_of_embeddings(name, engine):
    def use(net, x):
        return torch.tanh(net.layers[0](ids(x))).flatten(1)

    held = Held(lambda k: Of(use, TABLES[name]()), engine=engine)
    held.gradients(VECTORS)
    held.everywhere(VECTORS)


def functional(net, x):
    return F.embedding(ids(x), net.table, padding_idx=2, scale_grad_by_freq=True)


def of_own_ids(net, x):
    return net.layers[1](net.layers[0](x).argmax(1))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Of(functional, table=(5, 3)),
        lambda: Of(of_own_ids, nn.Linear(4, 5), nn.Embedding(5, 3, padding_idx=1, scale_grad_by_freq=True)),
    ],
)
def test_gradients_of_tables(make):
    Held(lambda k: make()).everywhere(VECTORS)


class Packed(nn.Module):
    """A weight of one byte a number, which its code scales."""

    def __init__(self, dtype, k):
        super().__init__()
        values = torch.randn(4, 4, generator=torch.Generator().manual_seed(k))
        self.register_buffer("packed", values.to(dtype) if dtype.is_floating_point else (40 * values).to(dtype))
        self.scale = nn.Parameter(torch.ones(4, 1))

    def forward(self, x):
        return nn.functional.linear(x, self.packed.to(x.dtype) * self.scale)


@pytest.mark.parametrize("same", [False, True], ids=["of each member", "of all members"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_weights_of_one_byte(dtype, same):
    held = Held(lambda k: Packed(dtype, 0 if same else k))
    held.everywhere(batch(3, 4))
    assert held.ensemble.engine == "fold"

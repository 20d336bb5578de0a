"""Functions and idioms that networks use rarely: outputs, and gradients of inputs and weights, are those of members."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.fold.contract import Held, near

K = 3


def ties(x, scale):
    """Numbers of which many are equal, with the derivatives of ``x * scale``."""
    h = x * scale
    return h + (h.clamp(-0.1, 0.1).round() - h).detach()


def graph_of_a_view(net, x):
    """A part of what all members share receives a member's numbers: the rest keeps its derivatives."""
    h = x.clone()
    h[:, 2:6].mul_(net.s)
    return h + 1


def a_view_of_no_graph(net, x):
    h = torch.zeros(x.shape)
    h.t()[2:5].add_(net.b[:3].unsqueeze(1))
    return x + h


def seen_through_another_view(net, x):
    h = x.cos()
    seen = h.view(-1, 2, 4)[:, 1]
    h.add_(net.b)
    return x + seen.sum(1, keepdim=True)


def behind_the_graph(net, x):
    h = x * 1
    h.detach().mul_(net.s.detach())
    return h + net.b


def data_of_it(net, x):
    h = x * 1
    h.data.mul_(net.s.detach())
    return h + net.b


def without_gradients(net, x):
    h = x.clone()
    with torch.no_grad():
        h[:, 2:6].mul_(net.s)
    return h + net.b


FORMS = {
    "a part of a common tensor is written to": graph_of_a_view,
    "a view of a common tensor without a graph": a_view_of_no_graph,
    "written and seen through another view": seen_through_another_view,
    "written behind the graph": behind_the_graph,
    "written to data": data_of_it,
    "written under no_grad": without_gradients,
    "the largest of equal numbers": lambda net, x: x * net.s + ties(x, net.s).max() + torch.min(ties(x, net.s)),
    "the middle of equal numbers": lambda net, x: x * net.s + ties(x, net.s).median() + ties(x, net.s).nanmedian(),
    "sum of nothing": lambda net, x: net.b[:0].sum().expand(x.shape),
    "triangle in place": lambda net, x: (x * net.s).tril_() + x,
    "cumsum in place": lambda net, x: (x * net.s).cumsum_(1),
    "scatter_reduce in place": lambda net, x: (x * net.s).scatter_reduce_(
        1, net.index.expand(len(x), 8) // 2, x * net.b, "sum", include_self=False
    ),
    "rolled along dimensions, by name": lambda net, x: torch.roll(x * net.b, shifts=(1, -2), dims=(0, -1)),
    "rolled along one": lambda net, x: (x * net.b).roll(3, 1) + net.w.roll(shifts=-1, dims=1)[0],
    "rolled as a row": lambda net, x: torch.roll(x * net.b, 3) + net.w.roll((5,))[:3],
    "put in place": lambda net, x: (x * net.s).put_(net.index[:2], net.b[:2]),
    "fill by a number of each member": lambda net, x: (x * 1).fill_(net.s) + x,
    "clamp between a number and one of each member": lambda net, x: (x * net.b).clamp(-1, net.s.detach()),
    "index_fill of no dimension": lambda net, x: x + net.s.index_fill(0, torch.tensor(0), 0.5),
    "grid of images": lambda net, x: F.grid_sample(
        x.view(-1, 2, 2, 2),
        F.affine_grid(net.w[:2, :3].expand(len(x), 2, 3), [len(x), 2, 2, 2], align_corners=False),
        align_corners=False,
    ).flatten(1),
    "einsum of a dimension of one": lambda net, x: torch.einsum("bi,ij->bj", x[:, :1], net.w),
    "complex convolution": lambda net, x: F.conv1d(
        torch.complex(x, x * net.s).unsqueeze(1), torch.complex(net.b[:3], net.b[3:6]).view(1, 1, 3), padding=1
    ).abs()[:, 0],
    "dropout of nothing": lambda net, x: F.dropout(x * net.s, 0.0, True) + F.dropout(x, 0.0, True),
}


class Net(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.empty(8, 8)), nn.Parameter(torch.empty(8))
        self.s = nn.Parameter(torch.empty(()))
        self.register_buffer("index", torch.tensor([3, 1, 4, 0, 5, 7, 2, 6]))
        self.form = form

    def forward(self, x):
        return FORMS[self.form](self, x)


def inputs(seed):
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("form", FORMS)
def test_outputs_and_gradients_are_those_of_members(form):
    held = Held(lambda k: Net(form), K)
    for call in range(3):
        ours, theirs = inputs(call).requires_grad_(), inputs(call).requires_grad_()
        found = held.quietly(lambda x=ours: held.ensemble.member_outputs(x))
        expected = torch.stack([member(theirs) for member in held.members])
        near(found, expected)
        direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(8))
        for module in (held.ensemble, *held.members):
            module.zero_grad()
        found.backward(direction)
        expected.backward(direction)
        near(ours.grad, theirs.grad, 1e-4)
        for name, stack in held.ensemble.network.named_parameters():
            own = [dict(member.named_parameters())[name] for member in held.members]
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in own]
            near(torch.zeros_like(stack) if stack.grad is None else stack.grad, torch.stack(grads), 1e-4)
    with torch.no_grad():
        for call in range(3):
            found = held.quietly(lambda call=call: held.ensemble.member_outputs(inputs(call)))
            near(found, torch.stack([member(inputs(call)) for member in held.members]))
    assert held.ensemble.report().engine == "fold", held.warned
    if form.startswith("rolled"):
        assert not held.ensemble.report().slices


OUTPUTS = {
    "complex": lambda net, x: torch.complex(x @ net.w, x * net.s) @ torch.complex(net.w, net.w),
    "complex of nothing": lambda net, x: torch.complex(net.b[:0], net.b[:0]).mean() + x * net.s,
    "sparse": lambda net, x: (x * net.b).relu().to_sparse().coalesce(),
    "double": lambda net, x: ((x @ net.w) @ net.w.softmax(1)).double(),
}


@pytest.mark.parametrize("form", OUTPUTS)
def test_outputs_of_other_kinds_are_folded(form, monkeypatch):
    monkeypatch.setitem(FORMS, form, OUTPUTS[form])
    held = Held(lambda k: Net(form), K)
    for call in range(2):
        x = inputs(call)[:1].expand(3, 8)  # which tells no rows apart, so that others are drawn
        found = held.quietly(lambda x=x: held.ensemble.member_outputs(x))
        for k, member in enumerate(held.members):
            ours, theirs = (x.detach().to_dense() if x.is_sparse else x.detach() for x in (found[k], member(x)))
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert held.ensemble.report().engine == "fold", held.warned


CAST = {
    "sums of products": lambda net, x: functools.reduce(lambda h, w: h @ w, [net.w] * 6, x).float().softmax(1),
    "slopes": lambda net, x: F.prelu(x * net.s, net.b),
}


@pytest.mark.parametrize("form", CAST)
def test_autocast_is_folded(form, monkeypatch):
    """Outputs in float32 are as near as what was multiplied in bfloat16 leaves them."""
    monkeypatch.setitem(FORMS, form, CAST[form])
    held = Held(lambda k: Net(form), K)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for call in range(2):
            found = held.quietly(lambda call=call: held.ensemble.member_outputs(inputs(call)))
            near(found, torch.stack([member(inputs(call)) for member in held.members]), 0.05)
    assert held.ensemble.report().engine == "fold", held.warned

"""Operators of torch that trace what they are given: what they fail to trace in a fold, members call afterwards."""

import pytest
import torch
from torch import nn
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop

from tests.fold.contract import Held, averaged, batch


def _while_loop(net, x, h):
    return while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y * 1.1), (torch.tensor(0), h))[1]


USES = {
    "cond of the input": lambda net, x, h: torch.cond(x.sum() > 0, lambda y: net.b(y), lambda y: net.b(y) * 2, (h,)),
    "cond of members": lambda net, x, h: torch.cond(h.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (h,)),
    "cond of a shape": lambda net, x, h: torch.cond(x.shape[0] > 2, lambda y: y.sin(), lambda y: y.cos(), (h,)),
    "while loop": _while_loop,
    "scan": lambda net, x, h: scan(lambda c, y: (c + y, c * y), h[0] * 0, h)[1],
}


class Network(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.a, self.b, self.use = nn.Linear(4, 4), nn.Linear(4, 4), use

    def forward(self, x):
        return self.use(self, x, torch.tanh(self.a(x)))


@pytest.mark.parametrize("use", USES)
def test_what_traces_its_branches(use):
    torch._dynamo.reset()
    held = Held(lambda k: Network(USES[use]), 2)
    x = torch.randn(3, 4)
    before = averaged(held.loop(x)).detach()
    held.sampling(batch(3, 4))
    torch.testing.assert_close(averaged(held.loop(x)).detach(), before)  # not spoilt for others
    held.call(x)
    assert held.ensemble.engine == ("fold" if use == "cond of a shape" else "loop")

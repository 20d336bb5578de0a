"""What a network writes to itself where its first call does not show it: its values are zero then."""

import copy

import pytest
import torch
from torch import nn

import fastens


def set_data(tensor, values):
    tensor.data = values


WRITES = {
    "parameter's data replaced": lambda m: set_data(m.p, m.p.data * 0.9),
    "parameter's data in place": lambda m: m.p.data.mul_(0.9),
    "parameter detached": lambda m: m.p.detach().mul_(0.9),
    "parameter copied to": lambda m: m.p.data.copy_(m.p.data * 0.9),
    "a part of a parameter": lambda m: m.p.data.__setitem__(0, m.p.data[0] * 0.9),
    "parameter by a list": lambda m: torch._foreach_mul_([m.p], 0.9),
    "buffer in place": lambda m: m.b.mul_(0.9),
    "buffer by a view": lambda m: m.b.view(1, -1)[0, :2].mul_(0.9),
    "buffer by a conversion": lambda m: m.b.to(m.b.dtype).contiguous().detach().mul_(0.9),
    "buffer replaced": lambda m: setattr(m, "b", m.b * 0.9),
    "buffer's data replaced": lambda m: set_data(m.b, m.b.data * 0.9),
    "attribute replaced": lambda m: setattr(m, "a", m.a * 0.9),
    "attribute in place": lambda m: m.a.mul_(0.9),
}


class Network(nn.Module):
    """Writes to itself in every call, which changes nothing while its values are zero."""

    def __init__(self, write, frozen):
        super().__init__()
        self.p, self.layer, self.write = nn.Parameter(torch.zeros(3)), nn.Linear(3, 3), write
        self.register_buffer("b", torch.zeros(3))
        self.a = torch.zeros(3, dtype=torch.float64)
        self.p.requires_grad_(not frozen)

    def forward(self, x):
        with torch.no_grad():
            WRITES[self.write](self)
        return self.layer(x * (1 + self.p + self.b + self.a))


def filled(module, values):
    """The values that are zero at first."""
    for tensor in (module.p, module.b):
        getattr(tensor, "stack", tensor).data.copy_(values)
    module.a = values.clone()


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("kind", ["whole", "some members", "some rows", "assigned", "looped", "differentiated"])
@pytest.mark.parametrize("write", WRITES)
def test_a_write_that_the_first_call_does_not_show(write, kind, frozen):
    torch.manual_seed(0)
    members = [Network(write, frozen).double() for _ in range(3)]
    theirs = copy.deepcopy(members)
    settings = {"some members": {"max_fold": 6}, "some rows": {"max_fold": 2}, "looped": {"engine": "loop"}}
    ensemble = fastens.Ensemble(members, **settings.get(kind, {})).eval()
    with torch.set_grad_enabled(kind == "differentiated"):
        for call in range(5):
            x = torch.randn(3, 3, dtype=torch.float64)
            if call == 2:
                values = torch.randn(3, dtype=torch.float64)
                for module in theirs:
                    filled(module, values)
                filled(ensemble.network, values)
                ensemble.a = values.clone()  # of all members, each of which may have its own
                ensemble.refresh()
            if kind == "assigned":
                with ensemble.assigned([2, 0, 1]):
                    found = ensemble(x)
                expected = torch.cat([theirs[k](x[i : i + 1]) for i, k in enumerate([2, 0, 1])])
            else:
                found, expected = ensemble.member_outputs(x), torch.stack([module(x) for module in theirs])
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)

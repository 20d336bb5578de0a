"""Rows that have members of their own: whose weights a row has is no matter of how many rows or members there are."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastens
from tests.tolerances import relative_error

K = 3


class Net(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.use = use
        self.w, self.b = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
        self.kernel, self.table = nn.Parameter(torch.randn(4, 4, 1)), nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        return self.use(self, x)


def convolved_by_activations(net, x):
    kernel = (net.kernel * x.mean()).contiguous()
    return F.conv1d(x[:, :, None], kernel, net.b * x.sum())[:, :, 0]


USES = {
    "mm from the left": lambda net, x: torch.mm(net.w, x.t()).t(),
    "weights by activations": lambda net, x: F.linear(x, net.w * x.mean(), net.b),
    "biases by activations": lambda net, x: F.linear(x, net.w, net.b * x.mean()),
    "both": lambda net, x: F.linear(x, net.w * x.mean(), net.b * x.sum()),
    "scales by activations": lambda net, x: F.layer_norm(x, (4,), net.b * x.mean(), net.b),
    "groups": lambda net, x: F.group_norm(x, 2, net.b * x.mean(), net.b * x.sum()),
    "kernels by activations": convolved_by_activations,
    "tables by activations": lambda net, x: F.embedding(x.argmax(1), net.table * x.mean()),
    "rows by rows": lambda net, x: (x[:, :, None] @ x[:, None, :]).sum(1) @ net.w,
    "einsum": lambda net, x: torch.einsum("bi,ij,kj->bk", x, net.w, net.w * x.mean()),
    "addmm": lambda net, x: torch.addmm(net.b, x, net.w * x.mean()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 2, K, K + 1, 2 * K])
@pytest.mark.parametrize("use", USES.values(), ids=USES)
@torch.no_grad()
def test_every_row_is_its_members(use, rows, dtype):
    torch.manual_seed(0)
    members = [Net(use).to(dtype) for _ in range(K)]
    ensemble = fastens.Ensemble(members)
    x = torch.randn(rows, 4, dtype=dtype)
    for seed in range(3):  # recorded, then planned
        of = torch.randint(0, K, (rows,), generator=torch.Generator().manual_seed(seed))
        with ensemble.assigned(of):
            found = ensemble((1 + seed) * x)
        alone = [members[k]((1 + seed) * x[i : i + 1])[0] for i, k in enumerate(of.tolist())]
        whole = [members[k]((1 + seed) * x)[i] for i, k in enumerate(of.tolist())]
        assert min(relative_error(found, torch.stack(rows)) for rows in (alone, whole)) < 1e-5

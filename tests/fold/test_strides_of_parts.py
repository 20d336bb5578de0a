"""Parts of stacks have the strides of a member's own tensors, by which torch's kernels tell memory formats apart."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastens.fold.slices import with_usual_strides
from tests.fold.contract import Held, K


class Normalised(nn.Module):
    """A convolution, what torch derives by the memory format of a gradient, and another memory format."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.kind = nn.Conv2d(3, 8, 3, padding=1, bias=False), kind
        self.norm = nn.BatchNorm2d(8, track_running_stats=False)

    def forward(self, x):
        h = self.norm(self.first(x))
        if self.kind == "antialiased":
            h = F.interpolate(h, scale_factor=1.7, mode="bilinear", antialias=True)
        return h.contiguous(memory_format=torch.channels_last) * 1.5


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("last", [False, True], ids=["", "channels last"])
@pytest.mark.parametrize("kind", ["norm", "antialiased"])
def test_gradients_of_one_row(kind, last, rows):
    held = Held(lambda k: Normalised(kind))
    x = torch.randn(rows, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(held.members[0](x).shape, generator=torch.Generator().manual_seed(1))
    weight = weight.contiguous(memory_format=torch.channels_last) if last else weight
    for _ in range(2):
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        (held.ensemble.member_outputs(ours) * weight).sum().backward()
        for member in held.members:
            (member(theirs).contiguous() * weight).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    assert held.ensemble.engine == "fold"
    assert len(held.members) == K


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(1, 3, 2, 2), (1, 3, 1, 2), (2, 1, 3, 1), (1, 1, 1, 1), (2, 3, 2, 2)])
def test_usual_strides(shape, format):
    x = torch.randn(shape).contiguous(memory_format=format)
    usual = torch.empty(shape, memory_format=format).stride()
    odd = x.as_strided(shape, [7 if n == 1 else step for n, step in zip(shape, x.stride(), strict=True)])
    made = with_usual_strides(odd)
    assert torch.equal(made, x)
    assert made.stride() == usual or (made.is_contiguous() and made.stride() == torch.empty(shape).stride())
    assert (made is odd) == (odd.stride() == made.stride())
    assert with_usual_strides(made) is made

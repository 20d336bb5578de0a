"""What launches read of a call: each input as it is given, in memory of the plan's own."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastens
from fastens import device
from fastens.engine import planned
from tests.tolerances import NETWORK, relative_error


class Embedded(nn.Module):
    """An image, or its channels as they come, and what a layer makes of the time."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 4)

    def forward(self, x, t):
        return self.conv(x) + self.linear(torch.sin(t[:, None] * torch.arange(4)))[:, :, None, None] + x


@pytest.mark.parametrize("shape", [(1, 4, 6, 6), (3, 1, 6, 6), (3, 4, 6, 1), (3, 4, 1, 1), (1, 1, 1, 1)], ids=str)
def test_inputs_that_repeat_their_elements(shape, monkeypatch):
    monkeypatch.setattr(planned, "launches_on", lambda _: True)
    torch.manual_seed(0)
    members = [Embedded().eval() for _ in range(2)]
    ensemble = fastens.Ensemble(members, engine="fold")
    with torch.no_grad():
        for _ in range(4):
            x, t = torch.randn(shape).expand(3, 4, 6, 6), torch.rand(()).expand(3)
            expected = torch.stack([member(x, t) for member in members])
            assert relative_error(ensemble.member_outputs(x, t), expected) < NETWORK[torch.float32]
    assert ensemble.report().plans, ensemble.report().why_no_plan


class Copies(TorchDispatchMode):
    """Notes which copies are not waited for."""

    def __init__(self):
        super().__init__()
        self.later = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self.later.append(bool(args[2:] and args[2]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize("pinned", [False, True])
def test_memory_that_is_read_later_is_waited_for(pinned, recording, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: pinned)
    monkeypatch.setattr(device, "capturing", lambda: recording)  # where nothing can be waited for
    with Copies() as copies:
        device.copy_given(torch.empty(3), torch.ones(3))
    assert copies.later == [recording or not pinned]

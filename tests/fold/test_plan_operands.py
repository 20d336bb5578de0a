"""What a plan takes into a step is what the network computes, also where the recorded call could not tell."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastens
from fastens import _native
from fastens.engine import planned
from fastens.plan.cpu.plan import TARGET
from fastens.plan.graph import views
from fastens.plan.lowering.lower import lower_all
from fastens.plan.memory import Buffer, address_unit
from fastens.trace.record import record

pytestmark = pytest.mark.skipif(not _native.load(), reason=f"no compiled library: {_native.status()}")


class Added(nn.Module):
    """The result of a layer, and what a function makes of a second input."""

    def __init__(self, layer, function):
        super().__init__()
        self.layer, self.function = layer(), function

    def forward(self, x, y):
        return self.layer(x) + self.function(y)


def linear():
    return nn.Linear(8, 8)


CASES = {  # layer, function of the second input, both shapes
    "a number for each of the lines of tokens": (linear, lambda y: y, (2, 5, 3, 8), (2, 5, 1, 1)),
    "as many lines as channels": (linear, lambda y: y, (2, 8, 3, 8), (2, 8, 1, 1)),
    "tokens with their channels elsewhere": (linear, lambda y: y.permute(0, 3, 1, 2), (2, 8, 3, 8), (2, 3, 8, 8)),
    "tokens turned": (linear, lambda y: y.transpose(1, 3), (2, 8, 1, 8), (2, 8, 1, 8)),
    "a signal as long as it has channels": (lambda: nn.Conv1d(8, 8, 3, padding=1), lambda y: y, (2, 8, 8), (2, 8, 8)),
    "a signal of a transposed convolution": (
        lambda: nn.ConvTranspose1d(8, 8, 3, padding=1), lambda y: y, (2, 8, 8), (2, 8, 8),
    ),
    "bits of bfloat16": (linear, lambda y: y.bfloat16().view(torch.int16).float(), (2, 8), (2, 8)),
    "an image": (lambda: nn.Conv2d(3, 8, 3, padding=1), lambda y: y, (2, 3, 8, 8), (2, 8, 8, 8)),
    "a number for each channel": (lambda: nn.Conv2d(3, 8, 3, padding=1), lambda y: y, (2, 3, 8, 8), (2, 8, 1, 1)),
    "an image of 2 by 2, 3.2 times as large": (
        lambda: nn.Conv2d(3, 8, 3, padding=1), lambda y: F.interpolate(y, scale_factor=3.2), (2, 3, 6, 6), (2, 8, 2, 2),
    ),
    "an image of 2 by 2, 3 times as large": (
        lambda: nn.Conv2d(3, 8, 3, padding=1), lambda y: F.interpolate(y, scale_factor=3), (2, 3, 6, 6), (2, 8, 2, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_operand_that_was_zero_when_the_plan_was_made(case):
    layer, function, *shapes = CASES[case]
    torch.manual_seed(0)
    members = [Added(layer, function).eval() for _ in range(2)]
    ensemble, (x, y) = fastens.Ensemble(members, engine="fold"), (torch.randn(shape) for shape in shapes)
    with torch.no_grad():
        for _ in range(2):  # the plan is held against the members at both
            ensemble.member_outputs(x, torch.zeros_like(y))
        assert ensemble.report().plans, ensemble.report().why_no_plan
        torch.testing.assert_close(ensemble.member_outputs(x, y), torch.stack([member(x, y) for member in members]))


class Paired(nn.Module):
    """The size of pairs of numbers, as complex ones."""

    def __init__(self):
        super().__init__()
        self.linear = linear()

    def forward(self, x):
        return self.linear(x) + torch.view_as_complex(x.view(2, 4, 2)).abs().repeat(1, 2)


@pytest.mark.parametrize("start", [1, 2, 3])
def test_an_input_seen_as_another_dtype_may_begin_anywhere(start):
    torch.manual_seed(0)
    members = [Paired().eval() for _ in range(2)]
    ensemble, numbers = fastens.Ensemble(members, engine="fold"), torch.randn(40)
    with torch.no_grad():
        for _ in range(2):
            ensemble.member_outputs(numbers[:16].view(2, 8))
        assert ensemble.report().plans, ensemble.report().why_no_plan
        x = numbers[start : start + 16].view(2, 8)
        torch.testing.assert_close(ensemble.member_outputs(x), torch.stack([m(x.clone()) for m in members]))


def apart(x):
    """Memory with room between its rows, written in parts."""
    made = x.new_empty_strided((4, 8), (64, 1))
    made[:, 1:] = x[:, :-1]
    made[:, :1] = x[:, -1:]
    return made * 2


@pytest.mark.parametrize("function", [apart, lambda x: x.flip(1).cumsum(1), lambda x: x.bfloat16().float() + x])
def test_every_operand_lies_in_its_buffer(function):
    x = torch.randn(4, 8)
    builder, _ = lower_all(record(lambda: function(x), [x])[0], 1, TARGET)
    for node in builder.nodes:
        for view in views(list(node.operands.values())):
            if isinstance(view.where, Buffer):
                last = view.offset + sum((n - 1) * s for n, s in zip(view.size, view.stride, strict=True))
                assert (last + 1) * address_unit(view.where.dtype) <= view.where.num_bytes


class Written(nn.Module):
    """What two layers make of an image, a part of which is written to in between."""

    def __init__(self, layer, last):
        super().__init__()
        self.image, self.before, self.behind = nn.Conv2d(3, 8, 3, padding=1), layer(), layer()
        self.last = last

    def forward(self, x, part):
        image = self.image(x)
        if self.last:
            image = image.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
        before = self.before(image)
        if part.dtype == torch.bool:
            before = before.cumsum(1)  # by torch, now
        image[:, :1] = part
        return before * 2 + self.behind(image)


class JoinedWith(nn.Module):
    """A convolution of an image and its negative."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        return self.conv(torch.cat([x, -x], 1))


LAYERS = {  # and whether the channels are last
    "a normalisation": (lambda: nn.GroupNorm(2, 8), False),
    "a block": (lambda: nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 3)), False),
    "a convolution": (lambda: nn.Conv2d(8, 4, 3), False),
    "a convolution of pixels": (lambda: nn.Conv2d(8, 4, 1), False),
    "a linear layer": (lambda: nn.Linear(8, 4), True),
    "two images": (JoinedWith, False),
}


@pytest.mark.parametrize("launches", [False, True])
@pytest.mark.parametrize("by_torch", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_reads_what_was_written_since(layer, by_torch, launches, monkeypatch):
    monkeypatch.setattr(planned, "launches_on", lambda _: launches)
    make, last = LAYERS[layer]
    torch.manual_seed(0)
    members = [Written(make, last).eval() for _ in range(2)]
    part = torch.randn(2, 1, 6, 8 if last else 6)
    part = part > 0 if by_torch else part
    ensemble, x = fastens.Ensemble(members, engine="fold"), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        ensemble.member_outputs(x, part)
        outputs = ensemble.member_outputs(x, part)
        assert ensemble.report().plans, ensemble.report().why_no_plan
        torch.testing.assert_close(outputs, torch.stack([member(x, part) for member in members]))

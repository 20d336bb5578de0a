"""Scripted functions inside a network, as SEDD and MDLM fuse their modulations: folded entry by entry, and planned."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastens
from fastens import _native
from tests.networks import randomised
from tests.tolerances import relative_error


@torch.jit.script
def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


@torch.jit.script
def gated(x: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    return residual + gate * F.dropout(x, p=0.1, training=False)


@torch.jit.script
def normalised(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    mean = x.mean(dim=-1, keepdim=True)
    return (x - mean) * torch.rsqrt(((x - mean) ** 2).mean(dim=-1, keepdim=True) + 1e-5) * scale + shift


@torch.jit.script
def chunked(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    a, b = torch.chunk(x * scale, 2, dim=-1)
    return torch.cat([a.sigmoid() * b, b - shift[:, :2]], dim=1)


FUNCTIONS = {f.name: f for f in (modulated, normalised, chunked)}  # a member that holds one has no copy


class Scripted(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.inner, self.outer = function, nn.Linear(4, 8), nn.Linear(4, 4)

    def forward(self, x):
        shift, scale = self.inner(x).chunk(2, dim=-1)
        function = FUNCTIONS[self.function]
        h = self.outer(function(function(x, shift, scale), shift, scale))
        return gated(h, scale, x)


@pytest.mark.skipif(not _native.load(), reason=f"no compiled library: {_native.status()}")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_scripted_functions_are_planned(function):
    ensemble = fastens.Ensemble([randomised(lambda: Scripted(function), seed) for seed in range(3)])
    with torch.no_grad():
        for factor in (1.0, 0.5):
            for p in ensemble.parameters():
                p.mul_(factor)
            for batch in (2, 2, 2, 5, 3, 3):
                x = torch.randn(batch, 4)
                expected = torch.stack([member(x) for member in ensemble.members])
                assert relative_error(ensemble(x), expected.mean(0)) < 1e-5
                assert relative_error(ensemble.member_outputs(x), expected) < 1e-5
    report = ensemble.report()
    assert report.plans, report.why_no_plan


def test_scripted_functions_are_counted_as_entry_by_entry():
    ensemble = fastens.Ensemble([randomised(lambda: Scripted("modulated"), seed) for seed in range(3)], engine="fold")
    with torch.no_grad(), torch.autocast("cpu", enabled=True):  # where members' own functions run
        for _ in range(2):
            ensemble(torch.randn(2, 4))
    assert ensemble.report().slices["mul.Tensor"] >= 3
